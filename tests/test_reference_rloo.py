"""The rloo.* quantities of every text reference: log-probabilities, KL, advantages, losses and gradients.

Tolerances are the notes': log-probabilities of a token 1e-4, loss 1e-5, gradient norms 1e-4 relative.
"""

import pytest
import torch
from test_reference import check_norms, folders, golden, grad_norms, load

from data.batches import pack_row
from data.labels import NO_LOSS
from model.checkpointing import checkpoint_blocks
from model.head import sequence_logprobs
from stages.rloo import Flags, Stage, advantages, column, shaped_advantages


def open_answers(family, tensors) -> list:
    """The golden prompts and completions as Examples without padding."""
    examples = []
    batch = (tensors[f"rloo.{name}"] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"))
    for prompt, is_prompt, answer, is_answer in zip(*batch, strict=True):
        prompt, answer = prompt[is_prompt.bool()], answer[is_answer.bool()]
        labels = torch.cat([torch.full_like(prompt, NO_LOSS), answer])
        examples.append(family.example(torch.cat([prompt, answer]), labels))
    return examples


def flags_of(facts) -> Flags:
    return Flags(
        reward="text", num_samples=facts["samples_per_prompt"], kl_beta=facts["beta_kl"], clip_range=facts["clip_eps"]
    )


@folders("qwen2")
def test_log_probabilities_and_entropies(folder):
    """The policy's and the reference's, packed; entropies against full logits."""
    tensors, facts = golden(folder)
    facts = facts["rloo"]
    for where, name in ((folder, "on_policy.policy"), (folder / "ref_model", "ref")):
        model, family = load(where)
        examples = open_answers(family, tensors)
        stage = Stage(flags_of(facts), model)
        mask, token_logps = tensors["rloo.completion_mask"].bool(), tensors[f"rloo.{name}_token_logps"]
        expected = [row[here].sum().item() for row, here in zip(token_logps, mask, strict=True)]
        with torch.no_grad():
            found = stage.logprobs_and_entropies(model, pack_row(examples))
            assert found[:, 0].tolist() == pytest.approx(expected, abs=1e-3)
            assert sequence_logprobs(model, pack_row(examples)).tolist() == pytest.approx(expected, abs=1e-3)
            for example, entropy in zip(examples, found[:, 1].tolist(), strict=True):
                logits = model.logits([example])[0][:-1][example.labels[1:] != NO_LOSS].double()
                each = torch.distributions.Categorical(logits=logits).entropy()
                assert entropy == pytest.approx(each.sum().item(), rel=1e-4)


@folders("qwen2")
def test_kl_and_advantages(folder):
    tensors, facts = golden(folder)
    facts, mask = facts["rloo"], tensors["rloo.completion_mask"].bool()
    old, ref = ((tensors[f"rloo.{name}_token_logps"].double() * mask).sum(1) for name in ("old", "ref"))
    assert (old - ref).tolist() == pytest.approx(facts["kl"], abs=1e-4)
    rewards, k = torch.tensor(facts["rewards"], dtype=torch.float64), facts["samples_per_prompt"]
    assert advantages(rewards, "loo").flatten().tolist() == pytest.approx(sum(facts["advantages_without_kl"], []), abs=1e-9)
    found = shaped_advantages(rewards.flatten(), column(facts["kl"]), flags_of(facts))
    assert found.tolist() == pytest.approx(sum(facts["advantages"], []), abs=1e-6)
    assert found.reshape(-1, k).sum(1).abs().max() < 1e-6


@folders("qwen2")
@pytest.mark.parametrize("case", ["on_policy", "ratio"])
@pytest.mark.parametrize("micro_tokens, checkpointed", [(1, False), (50, True), (10**6, False), (10**6, True)])
def test_loss_and_gradients(folder, case, micro_tokens, checkpointed):
    """In one packed row or one row an answer, checkpointed or not."""
    tensors, facts = golden(folder)
    facts = facts["rloo"]
    expected = facts[case]
    model, family = load(folder)
    if checkpointed:
        checkpoint_blocks(block for name in family.blocks for block in model.net.get_submodule(name))
    examples = open_answers(family, tensors)
    for example, old, advantage in zip(examples, expected["old_logps"], sum(facts["advantages"], []), strict=True):
        example.values = {"old_logprob": old, "advantage": advantage}
    stage = Stage(flags_of(facts), model)
    rows = stage.pack(examples, micro_tokens)
    assert len(rows) == (len(examples) if micro_tokens == 1 else len(rows))
    value, clipped = 0.0, 0.0
    for row in rows:
        loss, figures = stage.loss(model, row, stage.denominator(examples))
        loss.backward()
        value, clipped = value + loss.item(), clipped + figures["clipped"].item()
    assert value == pytest.approx(expected["loss"], abs=1e-5)
    assert sum(abs(ratio - 1) > facts["clip_eps"] for ratio in expected["ratio"]) == round(clipped * len(examples))
    check_norms(grad_norms(model, family), expected["grad_norms"])
    total = torch.stack([p.grad.norm() for p in model.net.parameters()]).norm().item()
    assert total == pytest.approx(expected["total_grad_norm"], rel=1e-4)
