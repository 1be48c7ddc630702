"""The dpo.* quantities of every text reference: log-probabilities, losses and gradients of a policy beside a reference model.

Tolerances are the notes': log-probabilities of a token 1e-4 (as logits), loss 1e-5, gradient norms 1e-4 relative.
"""

import pytest
import torch
from test_reference import check_norms, folders, golden, grad_norms, load

from data.batches import pack_row
from data.labels import NO_LOSS
from lora.adapter import Settings, attach
from model.checkpointing import checkpoint_blocks
from model.head import negative_log_likelihood, per_token, sequence_logprobs
from stages.dpo import Flags, Pair, Stage


def open_pairs(family, tensors) -> list[Pair]:
    """The golden batch, all chosen and then all rejected, as pairs without padding."""
    sides = []
    batch = (tensors[f"dpo.{name}"] for name in ("input_ids", "attention_mask", "completion_mask"))
    for ids, mask, answer in zip(*batch, strict=True):
        labels = torch.where(answer.bool(), ids, NO_LOSS)
        example = family.example(ids[mask.bool()], labels[mask.bool()])
        example.values = {"num_tokens": float(example.num_supervised)}
        sides.append(example)
    half = len(sides) // 2
    return [Pair(*pair) for pair in zip(sides[:half], sides[half:], strict=True)]


def token_logprobs(model, example) -> torch.Tensor:
    packed = pack_row([example])
    where, target = packed.supervised()
    return -per_token(model.hidden(packed), model.head_weight, negative_log_likelihood, where, target)


@folders("qwen2")
def test_log_probabilities(folder):
    tensors, facts = golden(folder)
    for where, name in ((folder, "policy"), (folder / "ref_model", "ref")):
        model, family = load(where)
        pairs = open_pairs(family, tensors)
        sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        with torch.no_grad():
            for example, expected, answer in zip(
                sides, tensors[f"dpo.{name}_token_logps"], tensors["dpo.completion_mask"].bool(), strict=True
            ):
                torch.testing.assert_close(token_logprobs(model, example), expected[answer[1:]], atol=1e-4, rtol=0)
            sums = sequence_logprobs(model, pack_row(sides))
        assert sums.tolist() == pytest.approx(facts["dpo"][f"{name}_logps"], abs=1e-3)


@folders("qwen2")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("micro_tokens", [1, 50, 10**6])
def test_loss_and_gradients(folder, micro_tokens, checkpointed):
    """In one packed row or one row a pair, checkpointed or not."""
    tensors, facts = golden(folder)
    facts = facts["dpo"]
    model, family = load(folder)
    if checkpointed:
        checkpoint_blocks(block for name in family.blocks for block in model.net.get_submodule(name))
    reference, _ = load(folder / "ref_model")
    pairs = open_pairs(family, tensors)
    stage = Stage(Flags(dpo_beta=facts["beta"]), model)
    for pair in pairs:
        sides = stage.sequences(pair)
        for side, logprob in zip(sides, sequence_logprobs(reference, pack_row(sides)).tolist(), strict=True):
            side.values["reference"] = logprob
    packed = stage.pack(pairs, micro_tokens)
    assert len(packed) == (len(pairs) if micro_tokens == 1 else len(packed))
    loss, figures = 0.0, {}
    for row in packed:
        more, found = stage.loss(model, row, stage.denominator(pairs))
        more.backward()
        loss += more.item()
        figures = {name: figures.get(name, 0.0) + value.item() for name, value in found.items()}
    assert loss == pytest.approx(facts["loss"], abs=1e-5)
    check_norms(grad_norms(model, family), facts["grad_norms"])
    total = torch.stack([p.grad.norm() for p in model.net.parameters()]).norm().item()
    assert total == pytest.approx(facts["total_grad_norm"], rel=1e-4)
    theirs = facts["trl_metrics"]
    for ours, name in (("margins", "rewards/margins"), ("accuracies", "rewards/accuracies")):
        assert figures[ours] == pytest.approx(theirs[name][0], abs=1e-5)
    for ours, name in (("chosen_logps", "logps/chosen"), ("rejected_logps", "logps/rejected")):
        assert figures[ours] == pytest.approx(theirs[name][0], abs=1e-3)


@folders("qwen2")
def test_swapped_answers_and_a_policy_that_is_its_reference(folder):
    tensors, facts = golden(folder)
    model, family = load(folder)
    reference, _ = load(folder / "ref_model")
    pairs = [Pair(pair.rejected, pair.chosen) for pair in open_pairs(family, tensors)]
    stage = Stage(Flags(dpo_beta=facts["dpo"]["beta"]), model)
    [row] = stage.pack(pairs, 10**6)
    with torch.no_grad():
        same, _ = stage.loss(model, row, len(pairs))
        row.values["reference"] = sequence_logprobs(reference, row)
        swapped, _ = stage.loss(model, row, len(pairs))
    assert swapped.item() == pytest.approx(facts["dpo"]["swapped_loss"], abs=1e-5)
    assert same.item() == pytest.approx(facts["dpo"]["loss_when_policy_is_reference"], abs=1e-6)


@folders("qwen2")
def test_an_adapter_beside_its_base(folder):
    """A fresh adapter is its reference; a changed one is measured against the base, which is never changed."""
    tensors, _ = golden(folder)
    model, family = load(folder)
    attach(model, family, Settings(r=4, alpha=8, dropout=0.0))
    stage, pairs = Stage(Flags(), model), open_pairs(family, tensors)
    [row] = stage.pack(pairs, 10**6)
    base = sequence_logprobs(model, row).detach()
    for name, parameter in model.net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    assert (sequence_logprobs(model, row) - base).abs().max() > 1e-2
    assert torch.equal(stage.reference_logprobs(model, row), base)
