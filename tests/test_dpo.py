"""--stage dpo: losses against a plain formula in NumPy, the reference in its three forms, whole runs by command."""

import json
import math
import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import small_run
import torch
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_run import run

from data.batches import epoch_order
from data.errors import UserError
from data.records import open_records
from data.rows import open_rows
from lora import adapter
from lora.files import load_adapter
from model import load_model
from model.head import sequence_logprobs
from model.tiny import write_tiny
from stages import list_stages
from stages.dpo import FILE, Flags, Stage, pair_losses
from training.config import read_config
from training.journal import read_journal
from training.precision import choose

pytestmark = pytest.mark.slow

flags = partial(small_run.flags, stage="dpo", warmup_steps=0)
FLAGS = {name: module.Flags for name, module in list_stages().items()}
LN2 = math.log(2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "qwen2_5_vl"
    write_tiny("qwen2_5_vl", folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """14 sums: the right answer is chosen, one of other length is rejected; two rows have an earlier answer."""
    source = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    with open(path, "w") as file:
        for number in range(14):
            terms = [source.randint(0, 9) for _ in range(source.randint(1, 8))]
            prompt = [{"role": "user", "content": " + ".join(map(str, terms))}]
            if number % 7 == 3:
                prompt = [*prompt, {"role": "assistant", "content": "wait"}, {"role": "user", "content": "well?"}]
            answers = str(sum(terms)), "no idea" * source.randint(1, 3)
            chosen, rejected = ([*prompt, {"role": "assistant", "content": text}] for text in answers)
            file.write(json.dumps({"id": f"sum-{number}", "chosen": chosen, "rejected": rejected}) + "\n")
    return path


def steps_of(output: Path) -> list[dict]:
    return [record for record in read_journal(output / "journal.jsonl") if "event" not in record]


def set_adapter(model, seed: int = 0) -> None:
    """Give the attached LoRA an effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)


def open_stage(base, rows, options=None, lora=True, **more) -> tuple:
    """(model, stage, pairs) of a stage on a tiny model, with a fresh adapter that is its reference's."""
    model, family = load_model(base, dtype="float32")
    if lora:
        adapter.attach(model, family, adapter.Settings(r=4, alpha=8, **more))
    stage = Stage(options or Flags(), model)
    records = open_records(rows)
    return model.train(), stage, [stage.encode(records[i]) for i in range(len(records))]


# ---- the losses against NumPy ---------------------------------------------------------------------------------------------


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def answer_logprobs(model, example) -> np.ndarray:
    """log p of each supervised token from full logits of the example alone, in float64."""
    found = log_softmax(model.logits([example])[0].double().numpy())
    places = [t for t in range(1, len(example)) if example.labels[t] != -100]
    return np.array([found[t - 1, example.labels[t]] for t in places])


def oracle(policy: list, reference: list, options: Flags) -> float:
    """The mean loss of pairs; policy and reference hold (chosen, rejected) token log-probabilities of each."""
    losses = []
    for (w, loser), (ref_w, ref_loser) in zip(policy, reference, strict=True):
        total = np.sum if options.dpo_length == "sum" else np.mean
        h = (total(w) - total(ref_w)) - (total(loser) - total(ref_loser))
        if options.dpo_loss == "ipo":
            loss = (h - 1 / (2 * options.dpo_beta)) ** 2
        else:
            p = 1 / (1 + np.exp(-options.dpo_beta * h))
            loss = -(1 - options.label_smoothing) * np.log(p) - options.label_smoothing * np.log(1 - p)
        losses.append(loss - options.dpo_nll * np.mean(w))
    return float(np.mean(losses))


CASES = [
    Flags(), Flags(dpo_beta=0.5, label_smoothing=0.2), Flags(dpo_loss="ipo", dpo_beta=0.3), Flags(dpo_nll=0.7),
    Flags(dpo_loss="ipo", dpo_length="mean"), Flags(dpo_length="mean", dpo_beta=2.0, dpo_nll=0.1, label_smoothing=0.1),
]  # fmt: skip


@pytest.mark.parametrize("options", CASES, ids=str)
def test_losses_equal_a_numpy_oracle(base, rows, options):
    """However the pairs are cut into rows; gradients are those of one row."""
    model, stage, pairs = open_stage(base, rows, options, dropout=0.0)
    with adapter.disabled(model):
        reference = [[answer_logprobs(model, side) for side in stage.sequences(pair)] for pair in pairs]
    set_adapter(model)
    policy = [[answer_logprobs(model, side) for side in stage.sequences(pair)] for pair in pairs]
    expected, gradients = oracle(policy, reference, options), []
    for micro_tokens in (10**6, 150, 1):
        model.zero_grad()
        found = 0.0
        for row in stage.pack(pairs, micro_tokens):
            loss, figures = stage.loss(model, row, stage.denominator(pairs))
            loss.backward()
            found += loss.item()
        assert found == pytest.approx(expected, rel=1e-4)  # ipo squares the fp32 rounding of sums of about 200
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


def test_figures_are_means_over_the_step(base, rows):
    model, stage, pairs = open_stage(base, rows, Flags(dpo_beta=0.2), dropout=0.0)
    with adapter.disabled(model):
        reference = np.array([[answer_logprobs(model, s).sum() for s in stage.sequences(pair)] for pair in pairs])
    set_adapter(model)
    policy = np.array([[answer_logprobs(model, s).sum() for s in stage.sequences(pair)] for pair in pairs])
    sums: dict[str, float] = {}
    for row in stage.pack(pairs, 150):
        _, figures = stage.loss(model, row, stage.denominator(pairs))
        sums = {name: sums.get(name, 0.0) + value.item() for name, value in figures.items()}
    margins = 0.2 * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    assert sums["margins"] == pytest.approx(margins.mean(), abs=1e-5)
    assert sums["accuracies"] == pytest.approx((margins > 0).mean())
    assert (sums["chosen_logps"], sums["rejected_logps"]) == pytest.approx(tuple(policy.mean(0)), rel=1e-5)
    assert sums["kl"] == pytest.approx((reference - policy).mean(), abs=1e-4)


def test_losses_of_margins_by_hand():
    h = torch.tensor([0.0, 3.0, -200.0])
    assert pair_losses(h, Flags(dpo_beta=1.0)).tolist() == pytest.approx([LN2, math.log1p(math.exp(-3)), 200.0])
    assert pair_losses(h, Flags(dpo_beta=0.5, dpo_loss="ipo")).tolist() == pytest.approx([1.0, 4.0, 201.0**2])
    assert pair_losses(h, Flags(label_smoothing=0.25, dpo_beta=1.0))[2].item() == pytest.approx(150.0)
    with pytest.raises(UserError, match="label_smoothing"):
        Flags(dpo_loss="ipo", label_smoothing=0.1)


def test_only_the_last_answer_is_compared(base, rows):
    """An answer inside the prompt is context on both sides, and a pair is two whole conversations."""
    _, stage, pairs = open_stage(base, rows)
    records = open_records(rows)
    decode = stage.family.tokenizer.decode
    for index, pair in enumerate(pairs):
        for side, turns in zip(stage.sequences(pair), records[index].conversations, strict=True):
            assert decode(side.labels[side.labels != -100]) == turns[-1]["content"] + "<|im_end|>"
    assert "wait" in decode(pairs[3].chosen.input_ids) and "wait" in decode(pairs[3].rejected.input_ids)
    for micro_tokens in (1, 150, 10**6):
        packed = stage.pack(pairs, micro_tokens)
        assert all(row.ids[0::2] == row.ids[1::2] for row in packed)
        assert sorted(sum((row.ids[0::2] for row in packed), [])) == sorted(pair.id for pair in pairs)


def test_the_reference_has_no_dropout(base, rows):
    model, stage, pairs = open_stage(base, rows, dropout=0.5)
    set_adapter(model)
    stage = Stage(Flags(), model)  # the adapter is part of this one's reference
    [row] = stage.pack(pairs[:3], 10**6)
    with torch.no_grad():
        assert not torch.equal(sequence_logprobs(model, row), sequence_logprobs(model, row))
    assert torch.equal(stage.reference_logprobs(model, row), stage.reference_logprobs(model, row))


def test_other_stages_read_the_chosen_side(base, rows):
    record = open_records(rows, takes=("conversation",))[0]
    assert record.rejected is None and len(record.conversations) == 1


def test_a_pair_does_not_depend_on_its_neighbours(base, rows):
    model, stage, pairs = open_stage(base, rows)
    with torch.no_grad():
        together = sequence_logprobs(model.eval(), stage.pack(pairs[:3], 10**6)[0])
        alone = [sequence_logprobs(model, stage.pack([pair], 1)[0]) for pair in sorted(pairs[:3], key=len, reverse=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


# ---- the reference ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fresh", "dora", "loaded", "prefix"])
def test_the_reference_is_the_start_whatever_is_trained(base, rows, kind):
    """Loss ln 2 and margins 0 at the start, by the same forward; later the reference still says what it said."""
    model, family = load_model(base, dtype="float32")
    settings = adapter.Settings(r=4, alpha=8, dropout=0.5 if kind == "fresh" else 0.0, use_dora=kind == "dora")
    if kind == "prefix":
        settings = adapter.Settings(peft_type="PREFIX_TUNING", num_virtual_tokens=3)
    adapter.attach(model, family, settings)
    if kind == "loaded":
        set_adapter(model, seed=1)
    model.train()
    stage, records = Stage(Flags(), model), open_records(rows)
    [row] = stage.pack([stage.encode(records[i]) for i in range(6)], 10**6)
    loss, figures = stage.loss(model, row, 6.0)
    assert loss.item() == pytest.approx(LN2, abs=1e-6) and figures["margins"].item() == 0
    before = stage.reference_logprobs(model, row)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    values = [p.detach().clone() for p in trained]
    assert torch.equal(stage.reference_logprobs(model, row), before)
    assert all(torch.equal(p, value) for p, value in zip(trained, values, strict=True))
    assert all(p.requires_grad for p in trained) and all(m.training for m in model.modules())
    assert (sequence_logprobs(model, row) - before).abs().max() > 1e-2
    loss, _ = stage.loss(model, row, 6.0)
    loss.backward()
    assert all(p.grad is not None for p in trained)


def test_gradients_flow_in_mixed_precision_too(base, rows):
    """The reference's forward runs first, without gradients: no cast weight of it may be left for the policy's."""
    model, family = load_model(base, dtype="float32")
    adapter.attach(model, family, adapter.Settings(r=4, alpha=8, dropout=0.0))
    set_adapter(model)
    stage, records = Stage(Flags(), model), open_records(rows)
    [row] = stage.pack([stage.encode(records[0])], 1)
    with choose("bf16", torch.device("cpu")).autocast():
        loss, figures = stage.loss(model, row, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(LN2, abs=1e-6)
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("more", [(), ("--use_lora",), ("--use_lora", "--precompute_ref_log_probs")], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_loss_is_ln_2(monkeypatch, tmp_path, base, rows, more, precision):
    """By command, with and without an adapter, in rows that hold one pair or many: margins exactly 0, then apart."""
    rate = "1e-2" if more else "1e-3"
    for micro_tokens in (1, 10**6):
        output = tmp_path / str(micro_tokens)
        more = [*more, "--max_steps", 4, "--learning_rate", rate, "--micro_tokens", micro_tokens, "--precision", precision]
        assert run(monkeypatch, *flags(base, rows, output, *more)) == 0
        steps = steps_of(output)
        assert steps[0]["loss"] == pytest.approx(LN2, abs=1e-6)
        assert steps[0]["margins"] == 0 and steps[0]["kl"] == 0 and steps[0]["accuracies"] == 0.5
        assert steps[-1]["loss"] < LN2 - 0.02 and steps[-1]["margins"] > 0.02
        assert (output / FILE).exists() == ("--use_lora" not in more or "--precompute_ref_log_probs" in more)
        more = [*more[: more.index("--max_steps")]]


def test_an_sft_adapter_as_the_start_belongs_to_the_reference(monkeypatch, tmp_path, base, rows):
    """--adapter DIR: loss ln 2 at the start although the adapter moves the model; what follows is measured against it."""
    sft = ["--stage", "sft", "--use_lora", "--max_steps", 6, "--learning_rate", "2e-2"]
    assert run(monkeypatch, *flags(base, rows, tmp_path / "sft", *sft)) == 0
    start = tmp_path / "sft" / "adapter"
    more = ["--use_lora", "--adapter", start, "--max_steps", 3, "--learning_rate", "1e-2", "--save_every", 1]
    assert run(monkeypatch, *flags(base, rows, tmp_path / "dpo", *more)) == 0
    steps = steps_of(tmp_path / "dpo")
    assert steps[0]["loss"] == pytest.approx(LN2, abs=1e-6) and steps[0]["margins"] == 0
    model, family = load_model(base, dtype="float32")
    stage, records = Stage(Flags(), model), open_records(rows)
    first = [stage.encode(records[i]) for i in epoch_order(14, 0, 0)[4:8]]  # the second step's pairs
    untouched = np.mean([answer_logprobs(model, pair.chosen).sum() for pair in first])
    load_adapter(model, family, start)
    reference = np.array([[answer_logprobs(model, s).sum() for s in stage.sequences(pair)] for pair in first])
    assert abs(reference[:, 0].mean() - untouched) > 0.1  # the adapter matters
    policy = (steps[1]["chosen_logps"] + steps[1]["rejected_logps"]) / 2
    assert steps[1]["kl"] == pytest.approx(reference.mean() - policy, abs=1e-3)
    # another adapter under the same name is another reference: not this run
    shutil.copytree(tmp_path / "dpo" / "adapter", tmp_path / "other")
    shutil.rmtree(start)
    shutil.copytree(tmp_path / "other", start)
    shutil.rmtree(tmp_path / "dpo" / "checkpoints" / "step-000003")
    with pytest.raises(UserError, match="adapter_sha256"):
        run(monkeypatch, *flags(base, rows, tmp_path / "dpo", *more), "--resume", "yes")


def test_the_cached_reference_is_the_computed_one(monkeypatch, tmp_path, base, rows):
    """Full fine-tuning against a second model that stays as it was, on the pairs of the third step."""
    assert run(monkeypatch, *flags(base, rows, tmp_path / "out", "--max_steps", 3, "--learning_rate", "1e-3")) == 0
    model, stage, pairs = open_stage(base, rows, lora=False)
    known = load_file(tmp_path / "out" / FILE)
    assert known["keys"].shape == (12, 16) and known["logprobs"].dtype == torch.float32  # 3 steps of 4 pairs
    expected = [[answer_logprobs(model, s).sum() for s in stage.sequences(pairs[i])] for i in epoch_order(14, 0, 0)[:12]]
    assert np.sort(known["logprobs"].numpy(), 0) == pytest.approx(np.sort(np.array(expected), 0), abs=1e-3)
    third = np.array(expected)[8:12]
    step = steps_of(tmp_path / "out")[2]
    assert step["kl"] == pytest.approx(third.mean() - (step["chosen_logps"] + step["rejected_logps"]) / 2, abs=1e-3)


def test_a_cache_of_other_weights_or_other_rows_is_made_anew(monkeypatch, tmp_path, base, rows):
    """A killed start leaves its file; the next start reads it if it is its own, and goes on where it was cut off."""
    output, counts = tmp_path / "out", []
    measure = Stage.measure
    monkeypatch.setattr(Stage, "measure", lambda self, *a: (counts.append(len(a[1])), measure(self, *a))[1])

    def start(*more) -> list[int]:
        counts.clear()
        assert run(monkeypatch, *flags(base, rows, output, "--max_steps", 4, *more)) == 0
        for path in output.iterdir():  # as if it had been killed before its first step
            if path.name != FILE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return list(counts)

    assert start() == [4, 4, 4, 2]
    assert start() == []
    assert start("--dpo_beta", "0.2") == [4, 4, 4, 2]
    file = load_file(output / FILE)
    with safe_open(output / FILE, "pt") as opened:
        metadata = opened.metadata()
    kept = {"keys": file["keys"][:8].clone(), "logprobs": file["logprobs"][:8].clone()}
    save_file(kept, output / FILE, metadata | {"steps": "2"})
    assert start("--dpo_beta", "0.2") == [4, 2]
    assert torch.equal(load_file(output / FILE)["logprobs"], file["logprobs"])
    (output / FILE).write_bytes(b"torn")
    assert start("--dpo_beta", "0.2") == [4, 4, 4, 2]


def test_a_refused_resume_leaves_the_reference_as_it_is(monkeypatch, tmp_path, base, rows):
    output = tmp_path / "out"
    assert run(monkeypatch, *flags(base, rows, output, "--max_steps", 2)) == 0
    before = (output / FILE).read_bytes()
    with pytest.raises(UserError, match="is of another run"):
        run(monkeypatch, *flags(base, rows, output, "--max_steps", 2, "--dpo_beta", "0.2", "--resume", "yes"))
    assert (output / FILE).read_bytes() == before


def test_a_row_that_changes_during_the_run_is_refused(base, rows):
    _, stage, pairs = open_stage(base, rows)
    stage.known = {}
    with pytest.raises(UserError, match=r"sums.jsonl:1: the row or its picture is not what it was"):
        stage.encode(open_records(rows)[0])


# ---- whole runs -------------------------------------------------------------------------------------------------------------

RUNS = {
    "full": ["--learning_rate", "1e-3"],
    "lora-dropout": ["--use_lora", "--lora_dropout", "0.2", "--learning_rate", "1e-2"],
    "lora-cached": ["--use_lora", "--precompute_ref_log_probs", "--learning_rate", "1e-2", "--num_workers", 2],
}


@pytest.mark.parametrize("case", RUNS)
def test_resume_is_bit_exact(monkeypatch, tmp_path, base, rows, case):
    """14 pairs in steps of 4 are 4 steps an epoch; the reference's file is read again, or made again if it is lost."""
    more = [*RUNS[case], "--epochs", 2, "--save_every", 1, "--save_total_limit", 100]
    straight = tmp_path / "straight"
    assert run(monkeypatch, *flags(base, rows, straight, *more)) == 0
    kept = [name for name in ("run.yaml", "journal.jsonl", FILE) if (straight / name).exists()]
    for step in (1, 4, 6):
        resumed = tmp_path / f"from-{step}"
        (resumed / "checkpoints").mkdir(parents=True)
        for name in kept if step != 6 else kept[:2]:
            shutil.copy(straight / name, resumed / name)
        shutil.copytree(straight / "checkpoints" / f"step-{step:06d}", resumed / "checkpoints" / f"step-{step:06d}")
        assert run(monkeypatch, *flags(base, rows, resumed, *more), "--resume", "yes") == 0
        drop = {"seconds", "data_wait", "memory"}
        ours, theirs = ([{k: v for k, v in r.items() if k not in drop} for r in steps_of(x)] for x in (resumed, straight))
        assert ours == theirs and len(ours) == 8
        saved = [load_file(x / "checkpoints" / "step-000008" / "trained.safetensors") for x in (resumed, straight)]
        assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[1])


def test_held_out_pairs_are_measured(monkeypatch, tmp_path, base, rows):
    """eval_loss, eval_margins and the rest: before, during and after; answers are asked for the chosen side's prompt."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(rows.read_text().replace(" + ", " plus "))
    for name, more in {"full": ["--learning_rate", "1e-3"], "lora": ["--use_lora", "--learning_rate", "1e-2"]}.items():
        output = tmp_path / name
        more = [*more, "--eval_path", held_out, "--eval_every", 2, "--max_steps", 4]
        more += ["--predict_with_generate", "--eval_task", "text", "--max_new_tokens", 2]
        assert run(monkeypatch, *flags(base, rows, output, *more)) == 0
        found = [r for r in read_journal(output / "journal.jsonl") if r.get("event") == "eval"]
        assert [r["step"] for r in found] == [0, 2, 4]
        assert found[0]["eval_loss"] == pytest.approx(LN2, abs=1e-6)
        assert found[0]["eval_margins"] == pytest.approx(0, abs=1e-6)
        assert found[2]["eval_loss"] < LN2 - 0.02 and found[2]["eval_margins"] > 0.02 and found[2]["eval_accuracies"] > 0.5
        assert {"eval_chosen_logps", "eval_rejected_logps", "eval_kl", "stop_rate"} <= set(found[0])
        lines = [json.loads(line) for line in (output / "outputs" / "held_out.jsonl").read_text().splitlines()]
        assert lines[0]["label"] == open_records(rows)[0].messages[-1]["content"]
        page = (output / "report.html").read_text()
        assert all(name in page for name in ("margins", "accuracies", "chosen logps", "rejected logps", "kl"))
        compared = {r["name"]: r for r in read_journal(output / "journal.jsonl") if r.get("event") == "comparison"}
        assert compared["held_out: eval margins"]["unit"] == "" and compared["held_out: stop rate"]["unit"] == "%"


def test_pictures(monkeypatch, tmp_path, vision):
    """Both sides see their picture: another one is another log-probability; held in the cache by its pixels."""
    lines = []
    for number in range(5):
        Image.effect_noise((60 + 20 * number, 90), 50).convert("RGB").save(tmp_path / f"{number}.png")
        content = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "where is it?"}]
        chosen, rejected = (
            [{"role": "user", "content": content}, {"role": "assistant", "content": text}]
            for text in ("at the top", "I cannot see it")
        )
        lines.append({"id": str(number), "chosen": chosen, "rejected": rejected})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, more in {"full": ["--learning_rate", "1e-3"], "lora": ["--use_lora", "--learning_rate", "1e-2"]}.items():
        assert run(monkeypatch, *flags(vision, path, tmp_path / name, *more, "--max_steps", 4, "--batch_size", 5)) == 0
        steps = steps_of(tmp_path / name)
        assert steps[0]["loss"] == pytest.approx(LN2, abs=1e-6) and steps[-1]["loss"] < LN2 - 0.01
    model, stage, pairs = open_stage(vision, path, lora=False)
    known = load_file(tmp_path / "full" / FILE)
    assert len({tuple(key) for key in known["keys"].tolist()}) == 5
    with torch.no_grad():
        logprobs = sequence_logprobs(model.eval(), stage.pack(pairs[:1], 1)[0])
        pairs[0].chosen.pixels = {k: v.flip(0) if k == "pixel_values" else v for k, v in pairs[0].chosen.pixels.items()}
        moved = sequence_logprobs(model, stage.pack(pairs[:1], 1)[0])
    assert logprobs[0] != moved[0] and logprobs[1] == moved[1]
    assert known["logprobs"].flatten().tolist().count(pytest.approx(logprobs[0].item(), abs=1e-3)) == 1


@pytest.mark.parametrize("family", ["qwen3_vl", "minicpm_v", "cogagent", "phi3_vision"])
def test_pictures_of_every_family(monkeypatch, tmp_path, family):
    """Pairs about a picture; its own adapter off, or all weights against what they said at the start."""
    write_tiny(family, tmp_path / "model")
    Image.new("RGB", (120, 90), "teal").save(tmp_path / "page.png")
    content = [{"type": "image", "image": "page.png"}, {"type": "text", "text": "which colour?"}]
    row = {"prompt": [{"role": "user", "content": content}], "chosen": "teal", "rejected": "a shade of red"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    for name, more in {"full": ["--learning_rate", "1e-4"], "lora": ["--use_lora", "--learning_rate", "1e-2"]}.items():
        assert run(monkeypatch, *flags(tmp_path / "model", path, tmp_path / name, *more, "--max_steps", 3)) == 0
        steps = steps_of(tmp_path / name)
        assert steps[0]["loss"] == pytest.approx(LN2, abs=1e-6) and steps[2]["margins"] > 0


def test_lengths_count_both_sides(tmp_path, base, rows):
    """A limit holds for each conversation; memory is planned for the pair, which is never cut."""
    config = read_config([*map(str, flags(base, rows, tmp_path))], FLAGS)
    _, stage, pairs = open_stage(base, rows)
    found = open_rows(config, stage.family, tmp_path, takes=Stage.takes)
    assert found.lengths.longest == max(map(len, pairs))
    limit = max(len(side) for pair in pairs for side in stage.sequences(pair))
    assert limit < found.lengths.longest
    config.max_length = limit
    assert len(open_rows(config, stage.family, tmp_path, takes=Stage.takes).lengths.kept) == 14
    config.max_length = limit - 1
    with pytest.raises(UserError, match=f"takes {limit} positions"):
        open_rows(config, stage.family, tmp_path, takes=Stage.takes)


def test_settings_of_the_stage(capsys):
    """Its defaults stand below what is said, are shown in --help, and are not said to the user as his own."""
    common = ["--base_model", "b", "--data_path", "r.jsonl"]
    assert read_config([*common, "--stage", "dpo", "--use_lora"], FLAGS).lora_dropout == 0.0
    assert read_config([*common, "--stage", "dpo", "--lora_dropout", "0.1"], FLAGS).lora_dropout == 0.1
    assert read_config([*common, "--use_lora"], FLAGS).lora_dropout == 0.05
    assert not read_config([*common, "--stage", "dpo"], FLAGS).use_lora
    with pytest.raises(UserError, match="belongs to --stage dpo"):
        read_config([*common, "--dpo_beta", "0.2"], FLAGS)
    with pytest.raises(UserError, match="label_smoothing"):
        read_config([*common, "--stage", "dpo", "--dpo_loss", "ipo", "--label_smoothing", "0.1"], FLAGS)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        read_config(["--help"], FLAGS)
    text = " ".join(capsys.readouterr().out.split())
    assert "share of LoRA inputs dropped (default 0.05); --stage dpo: 0.0" in text
    assert all(f"--{name} " in text for name in Flags.__dataclass_fields__)


@pytest.mark.parametrize("name", ["ultrafeedback", "countdown"])
def test_recipes(name):
    config = read_config(["--config", str(ROOT / f"configs/qwen2.5-0.5b-dpo-{name}.yaml"), "--data_path", "r.jsonl"], FLAGS)
    assert config.stage == "dpo" and config.batch_size * config.grad_accum == 64 and config.epochs == 1
    assert config.stage_options.dpo_loss == {"ultrafeedback": "sigmoid", "countdown": "ipo"}[name]
