"""Whole runs on tiny models: the loop against a plain one, exact resume, what lies in the output folder, wrong input."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import shared
from safetensors.torch import load_file
from small_run import flags, run

import train
from model import load_model
from model.tiny import write_tiny
from training import opening
from training.journal import read_journal

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """22 ragged sums as chats."""
    source = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    with open(path, "w") as file:
        for number in range(22):
            terms = [source.randint(0, 9) for _ in range(source.randint(1, 12))]
            messages = [
                {"role": "user", "content": " + ".join(map(str, terms))},
                {"role": "assistant", "content": str(sum(terms))},
            ]
            file.write(json.dumps({"id": f"sum-{number}", "messages": messages}) + "\n")
    return path


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    step = sorted((output / "checkpoints").glob("step-*"))[-1]
    return load_file(step / "trained.safetensors")


def losses_of(output: Path) -> list[float]:
    return [record["loss"] for record in read_journal(output / "journal.jsonl") if "event" not in record]


# ---- the loop against a plain one -----------------------------------------------------------------------------------------


def test_twenty_steps_equal_a_plain_loop(monkeypatch, tmp_path, base, rows):
    """transformers' module, one row at a time, sum / total, clipping, torch AdamW, the same order of rows."""
    from transformers import Qwen2ForCausalLM

    from data.batches import Batches
    from data.records import open_records

    more = ["--learning_rate", "1e-4", "--max_steps", 20, "--lr_schedule", "constant", "--warmup_steps", 0]
    assert run(monkeypatch, *flags(base, rows, tmp_path / "out", *more)) == 0
    ours = losses_of(tmp_path / "out")

    _, family = load_model(base, dtype="float32")
    records = open_records(rows)
    examples = [family.encode(records[i].messages) for i in range(len(records))]
    net = Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)
    theirs = []
    for step_rows in Batches(examples, 4, seed=0).rows(0, 20):
        total = sum(examples[i].num_supervised for i in step_rows)
        loss_sum = 0.0
        for i in step_rows:
            logits = net(input_ids=examples[i].input_ids[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, examples[i].labels[1:], reduction="sum") / total
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss_sum)
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours[-1] < ours[0] - 0.05


def test_cut_into_packed_rows_does_not_change_the_run(monkeypatch, tmp_path, base, rows):
    found = []
    for micro_tokens, accumulation in ((10**6, ["--batch_size", 4]), (1, ["--batch_size", 2, "--grad_accum", 2])):
        output = tmp_path / str(micro_tokens)
        more = ["--micro_tokens", micro_tokens, "--max_steps", 8, "--learning_rate", "1e-3", "--no_gradient_checkpointing"]
        assert run(monkeypatch, *flags(base, rows, output, *more, *accumulation)) == 0
        found.append(losses_of(output))
    assert found[0] == pytest.approx(found[1], abs=1e-4)


# ---- resume -----------------------------------------------------------------------------------------------------------------

CASES = {
    "full": ["--learning_rate", "1e-3"],
    "lora-dropout": ["--use_lora", "--lora_dropout", "0.2", "--learning_rate", "1e-2"],
    "lora-workers": ["--use_lora", "--lora_dropout", "0.2", "--num_workers", 2],
    "lora-adamw_8bit": ["--use_lora", "--use_8bit", "--optim", "adamw_8bit", "--lora_dropout", "0.1"],
}


@pytest.mark.parametrize("case", CASES)
def test_resume_is_bit_exact_at_every_step(monkeypatch, tmp_path, base, rows, case):
    """22 rows in steps of 4 are 6 steps an epoch: every stop of two epochs, the boundary included."""
    last = 12
    more = [*CASES[case], "--epochs", 2, "--save_every", 1, "--save_total_limit", 100]
    straight = tmp_path / "straight"
    assert run(monkeypatch, *flags(base, rows, straight, *more)) == 0
    assert len(losses_of(straight)) == last
    stops = range(1, last) if case != "lora-workers" else (5, 6, 7)
    for step in stops:
        resumed = tmp_path / f"from-{step}"
        (resumed / "checkpoints").mkdir(parents=True)
        for name in ("run.yaml", "journal.jsonl"):
            shutil.copy(straight / name, resumed / name)
        shutil.copytree(straight / "checkpoints" / f"step-{step:06d}", resumed / "checkpoints" / f"step-{step:06d}")
        assert run(monkeypatch, *flags(base, rows, resumed, *more), "--resume", "yes") == 0
        records = read_journal(resumed / "journal.jsonl")
        assert {"event": "resume", "step": step} in records
        assert losses_of(resumed) == losses_of(straight)
        for name in ("trained", "optimizer"):
            file = f"checkpoints/step-{last:06d}/{name}.safetensors"
            ours, theirs = load_file(resumed / file), load_file(straight / file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), (step, name)
        shutil.rmtree(resumed)


def test_resume_says_what_it_finds(monkeypatch, tmp_path, base, rows, capsys):
    output = tmp_path / "out"
    arguments = flags(base, rows, output, "--use_lora", "--max_steps", 3, "--save_every", 2)
    assert run(monkeypatch, *arguments, "--resume", "yes") == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert run(monkeypatch, *arguments, "--resume", "yes") == 0
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(train.UserError, match="--resume yes"):
        run(monkeypatch, *arguments)
    with pytest.raises(train.UserError, match="lora_r was 16, is 8"):
        run(monkeypatch, *arguments, "--lora_r", 8, "--resume", "yes")
    text = rows.read_text().replace("sum-3", "sum-x")
    other = tmp_path / "sums.jsonl"
    other.write_text(text)
    with pytest.raises(train.UserError, match="data_sha256|data_path"):
        run(monkeypatch, *flags(base, other, output, "--use_lora", "--max_steps", 3, "--save_every", 2), "--resume", "2")


def test_same_seed_same_bits_whatever_the_workers(monkeypatch, tmp_path, base, rows):
    found = []
    for workers in (0, 2):
        output = tmp_path / str(workers)
        more = ["--use_lora", "--max_steps", 4, "--num_workers", workers]
        assert run(monkeypatch, *flags(base, rows, output, *more)) == 0
        found.append(weights_of(output))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# ---- what a run leaves, and what stops it ---------------------------------------------------------------------------


def test_output_folder(monkeypatch, tmp_path, base, rows):
    output = tmp_path / "out"
    more = ["--use_lora", "--max_steps", 3, "--eval_split", 4, "--predict_with_generate", "--max_new_tokens", 4]
    assert run(monkeypatch, *flags(base, rows, output, *more)) == 0
    names = {path.name for path in output.iterdir()}
    assert {"adapter", "checkpoints", "journal.jsonl", "report.html", "run.yaml", "README.md", "outputs"} <= names
    assert f"python train.py --config {output}/run.yaml --output_dir" in (output / "README.md").read_text()
    assert "bad_rows.jsonl" not in names
    steps = [r for r in read_journal(output / "journal.jsonl") if "event" not in r]
    keys = {"step", "loss", "lr", "grad_norm", "supervised_tokens", "seconds", "data_wait", "memory"}
    assert [r["step"] for r in steps] == [1, 2, 3] and all(keys <= r.keys() for r in steps)
    lines = [json.loads(line) for line in (output / "outputs" / "held_out.jsonl").read_text().splitlines()]
    assert [line["when"] for line in lines] == ["before"] * 4 + ["after"] * 4
    # the resolved configuration makes the run again
    assert run(monkeypatch, "--config", output / "run.yaml", "--output_dir", tmp_path / "again") == 0
    assert losses_of(tmp_path / "again") == losses_of(output)


def test_what_only_tells_of_a_run_cannot_end_it(monkeypatch, tmp_path, base, rows, capsys):
    """The report and the list of bad rows, where the disk refuses them (here: folders lie where files should)."""
    bad = tmp_path / "rows.jsonl"
    bad.write_text(rows.read_text() + "{}\n")
    output = tmp_path / "out"
    (output / ".bad_rows.jsonl.part").mkdir(parents=True)
    monkeypatch.setattr("training.guards.LEFT_BEHIND", (".bad_rows.jsonl.part",))
    monkeypatch.setattr("eval.examiner.write_report", lambda *_: open(tmp_path))
    more = ["--use_lora", "--max_steps", 2, "--eval_split", 4, "--on_bad_row", "skip", "--predict_with_generate"]
    assert run(monkeypatch, *flags(base, bad, output, *more, "--max_new_tokens", 4)) == 0
    said = capsys.readouterr()
    for name in ("report.html", "bad_rows.jsonl"):
        assert f"{name} cannot be written (Is a directory); the run goes on" in said.out + said.err
    assert (output / "adapter").exists() and len(losses_of(output)) == 2


def test_full_run_saves_a_model_that_transformers_opens(monkeypatch, tmp_path, base, rows):
    from transformers import Qwen2ForCausalLM

    output = tmp_path / "out"
    assert run(monkeypatch, *flags(base, rows, output, "--max_steps", 2)) == 0
    model, family = load_model(output / "model", dtype="float32")
    net = Qwen2ForCausalLM.from_pretrained(output / "model", dtype=torch.float32)
    example = family.encode([{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}])
    with torch.no_grad():
        theirs = net(input_ids=example.input_ids[None]).logits[0]
    torch.testing.assert_close(model.logits([example])[0], theirs, atol=1e-5, rtol=0)


def test_bad_rows_stop_the_run_or_are_skipped(monkeypatch, tmp_path, base, rows, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(rows.read_text() + '{"id": "x", "messages": [{"role": "user", "content": "only a question"}]}\n')
    with pytest.raises(train.UserError, match="bad.jsonl:23"):
        run(monkeypatch, *flags(base, bad, tmp_path / "out", "--use_lora", "--max_steps", 1))
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["where"] for row in listed] == ["bad.jsonl:23"] and listed[0]["id"] == "x"
    more = ["--use_lora", "--max_steps", 1, "--on_bad_row", "skip"]
    assert run(monkeypatch, *flags(base, bad, tmp_path / "out", *more)) == 0
    assert "skipped 1 of 23 rows" in capsys.readouterr().out


def test_rows_that_are_too_long(monkeypatch, tmp_path, base, rows):
    with pytest.raises(train.UserError, match=r"--max_length \d+ admits all"):
        run(monkeypatch, *flags(base, rows, tmp_path / "out", "--use_lora", "--max_steps", 1, "--max_length", 60))


def test_non_finite_step_never_reaches_the_weights(monkeypatch, tmp_path, base, rows):
    """One NaN loss: the update of that step is left out, its rows are written down, all else is as without it."""
    from stages import sft

    original, calls = sft.Stage.loss, []

    def broken(self, model, packed, total):
        loss, figures = original(self, model, packed, total)
        calls.append(packed.ids)
        return (loss * float("nan") if len(calls) == 3 else loss), figures  # the rehearsal, step 1, then step 2

    monkeypatch.setattr(sft.Stage, "loss", broken)
    output = tmp_path / "out"
    assert run(monkeypatch, *flags(base, rows, output, "--use_lora", "--max_steps", 4, "--micro_tokens", 10**6)) == 0
    records = read_journal(output / "journal.jsonl")
    skipped = [r for r in records if r.get("event") == "skip"]
    assert [r["step"] for r in skipped] == [2]
    step = next(r for r in records if "event" not in r and r["step"] == 2)
    assert sorted(step["rows"]) == sorted(calls[2]) and step["skipped"]
    assert all(r["rows"] and "skipped" not in r for r in records if "event" not in r and r["step"] != 2)
    assert all(tensor.isfinite().all() for tensor in weights_of(output).values())


def test_out_of_memory_redoes_the_step(monkeypatch, tmp_path, base, rows, capsys):
    from stages import sft

    original = sft.Stage.loss
    plain = tmp_path / "plain"
    more = ["--use_lora", "--lora_dropout", 0, "--max_steps", 3, "--micro_tokens", 10**6]
    assert run(monkeypatch, *flags(base, rows, plain, *more)) == 0

    def tight(self, model, packed, total):
        loss = original(self, model, packed, total)
        if len(packed.ids) > 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("out of memory")
        return loss

    monkeypatch.setattr(sft.Stage, "loss", tight)
    monkeypatch.setattr(opening, "rehearse_run", lambda run: None)
    monkeypatch.setattr(opening, "write", lambda run, expected: None)
    assert run(monkeypatch, *flags(base, rows, tmp_path / "tight", *more)) == 0
    assert "done again in packed rows" in capsys.readouterr().out
    assert losses_of(tmp_path / "tight") == pytest.approx(losses_of(plain), abs=1e-5)


def test_out_of_memory_in_evaluation_takes_fewer_rows_at_a_time(monkeypatch, tmp_path, base, rows, capsys):
    from eval import examiner

    original, room = examiner.Evaluation, [1]

    def tight(*arguments, batch_tokens, **more):
        if batch_tokens > room[0]:
            raise torch.OutOfMemoryError("out of memory")
        return original(*arguments, batch_tokens=batch_tokens, **more)

    monkeypatch.setattr(examiner, "Evaluation", tight)
    more = ["--max_steps", 1, "--eval_split", 2, "--micro_tokens", 64]
    assert run(monkeypatch, *flags(base, rows, tmp_path / "fits", *more)) == 0
    assert "out of memory in evaluation: once more with 1 positions" in capsys.readouterr().out
    room[0] = 0
    with pytest.raises(train.UserError, match="one row at a time; lower --max_new_tokens or --max_pixels"):
        run(monkeypatch, *flags(base, rows, tmp_path / "tight", *more))


@pytest.mark.slow
def test_the_seeds_command_on_real_rows(monkeypatch, tmp_path):
    """A tiny random Qwen2.5-VL with the real tokenizer, on 27 real GUICourse rows, with the seed's own flags."""
    data = shared("samples/guicourse/figure_rows.json")
    base = tmp_path / "base"
    write_tiny("qwen2_5_vl", base, tokenizer=shared("tokenizers/qwen2.5-vl"), vocab_size=151936)
    arguments = ["--base_model", base, "--data_path", data, "--output_dir", tmp_path / "out"]
    arguments += ["--use_lora", "True", "--use_8bit", "True", "--max_pixels", 200000, "--epochs", 1]
    assert run(monkeypatch, *arguments) == 0
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert all(torch.isfinite(torch.tensor(losses_of(tmp_path / "out"))))


KINDS = {
    "full, fp32 masters": ["--precision", "bf16", "--learning_rate", "3e-3"],
    "full, bf16 rounded stochastically": ["--precision", "bf16", "--optim", "adamw_8bit", "--learning_rate", "3e-3"],
    "lora": ["--use_lora", "--precision", "bf16", "--optim", "paged_adamw_8bit"],
    "rslora": ["--use_lora", "--use_rslora"],
    "dora on 4 bits": ["--use_lora", "--use_dora", "--use_4bit", "--precision", "bf16"],
    "lora on 8 bits, offloaded": ["--use_lora", "--use_8bit", "--offload_activations"],
    "prefix": ["--use_lora", "--peft_type", "PREFIX_TUNING", "--num_virtual_tokens", 4, "--learning_rate", "3e-2"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_training_learns_and_can_be_asked(monkeypatch, tmp_path, base, rows, kind, capsys):
    output = tmp_path / "out"
    more = [*KINDS[kind], "--max_steps", 12, "--batch_size", 8, "--lr_schedule", "constant"]
    assert run(monkeypatch, *flags(base, rows, output, *more)) == 0
    losses = losses_of(output)
    assert sum(losses[-3:]) / 3 < losses[0] - 0.1
    from eval.subject import open_subject

    subject = open_subject(str(output))
    assert subject.run == output


# ---- what must survive a kill, a smaller machine, a second start -----------------------------------------------------------


@pytest.mark.parametrize("moment", ["Run.export", "examiner.Examiner.compare", "examiner.Examiner.close"])
def test_a_run_killed_before_its_last_word_is_finished_by_a_resume(monkeypatch, tmp_path, base, rows, moment):
    """Before the export, before the journal's last lines, and before the last report, which alone is not missed."""
    output = tmp_path / "out"
    arguments = flags(base, rows, output, "--use_lora", "--max_steps", 2, "--eval_split", 2)
    with monkeypatch.context() as patch:
        place = f"train.{moment}" if moment == "Run.export" else f"eval.{moment}"
        patch.setattr(place, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(patch, *arguments)
    assert (output / "adapter").exists() == (moment != "Run.export")
    assert run(monkeypatch, *arguments, "--resume", "yes") == 0
    assert (output / "adapter" / "adapter_model.safetensors").exists()
    records = read_journal(output / "journal.jsonl")
    assert [r["step"] for r in records if "event" not in r] == [1, 2]
    compared = [r for r in records if r.get("event") == "comparison"]
    assert [r["name"] for r in compared] == ["held_out: eval loss"] and compared[0]["before"] > 0
    assert [r["reason"] for r in records if r.get("event") == "finish"] == ["finished"]


@pytest.mark.parametrize("moment", ["in the evaluation", "after it", "before the export"])
def test_an_evaluation_that_a_kill_cut_off_is_made_by_the_resume(monkeypatch, tmp_path, base, rows, moment):
    """And one that was whole is not made twice: journal and answers are those of the run left in peace."""
    straight, output = tmp_path / "straight", tmp_path / "out"
    more = ["--use_lora", "--max_steps", 4, "--eval_split", 2, "--eval_every", 2, "--save_every", 2, "--save_total_limit", 9]
    more = ["--predict_with_generate", "--max_new_tokens", 4, "--learning_rate", "1e-2", *more]
    assert run(monkeypatch, *flags(base, rows, straight, *more)) == 0
    shutil.copytree(straight, output)
    shutil.rmtree(output / "adapter")
    step = 4 if moment == "before the export" else 2
    for name in ("journal.jsonl", "outputs/held_out.jsonl"):
        lines = [json.loads(line) for line in (output / name).read_text().splitlines()]
        kept = [line for line in lines if line["step"] <= step and line.get("event") not in ("comparison", "finish")]
        if moment == "in the evaluation":  # one of two answers, and no figure
            del kept[-1]
        (output / name).write_text("".join(json.dumps(line) + "\n" for line in kept))
    if step == 2:
        shutil.rmtree(output / "checkpoints" / "step-000004")
    assert run(monkeypatch, *flags(base, rows, output, *more), "--resume", "yes") == 0

    def story(folder):
        records = [r for r in read_journal(folder / "journal.jsonl") if r.get("event") in ("eval", "comparison")]
        return [{key: value for key, value in r.items() if key != "seconds"} for r in records]

    assert story(output) == story(straight) and [r["step"] for r in story(output)][:3] == [0, 2, 4]
    assert (output / "outputs/held_out.jsonl").read_text() == (straight / "outputs/held_out.jsonl").read_text()


def test_a_resume_cuts_rows_as_the_run_did(monkeypatch, tmp_path, base, rows):
    """Automatic micro-batches follow the free memory of the start; a resume on a fuller machine keeps the first cut."""
    from training import rehearsal

    more = ["--max_steps", 6, "--save_every", 1, "--save_total_limit", 9]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert run(monkeypatch, *flags(base, rows, straight, *more)) == 0
    shutil.copytree(straight, resumed)
    for step in (4, 5, 6):
        shutil.rmtree(resumed / "checkpoints" / f"step-{step:06d}")
    monkeypatch.setattr(rehearsal.Plan, "micro_tokens", lambda self, longest: longest)
    assert run(monkeypatch, *flags(base, rows, resumed, *more), "--resume", "yes") == 0
    ours, theirs = weights_of(resumed), weights_of(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_refused_rows_are_remembered_across_a_resume(monkeypatch, tmp_path, base, rows):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(rows.read_text() + '{"id": "x", "messages": []}\n')
    output = tmp_path / "out"
    arguments = flags(base, bad, output, "--use_lora", "--max_steps", 2, "--on_bad_row", "skip")
    assert run(monkeypatch, *arguments) == 0
    before = (output / "bad_rows.jsonl").read_text()
    assert run(monkeypatch, *arguments, "--resume", "yes") == 0
    assert (output / "bad_rows.jsonl").read_text() == before and '"id": "x"' in before


def test_a_picture_that_breaks_in_training_is_skipped_with_its_id(monkeypatch, tmp_path, capsys):
    from PIL import Image

    base = tmp_path / "base"
    write_tiny("qwen2_5_vl", base)
    rows = tmp_path / "rows.jsonl"
    with open(rows, "w") as file:
        for number in range(6):
            Image.effect_noise((56 + 28 * number, 56), 50).save(tmp_path / f"{number}.png")
            row = {"id": f"row-{number}", "prompt": "What?", "completion": "Noise.", "image": f"{number}.png"}
            file.write(json.dumps(row) + "\n")
    whole = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(whole[: len(whole) // 2])  # the header is sound, and it is the longest row
    more = ["--use_lora", "--max_steps", 2, "--batch_size", 6, "--on_bad_row", "skip"]
    assert run(monkeypatch, *flags(base, rows, tmp_path / "out", *more)) == 0
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["where"], row["id"]) for row in listed] == [("rows.jsonl:6", "row-5")]
    assert "5.png" in listed[0]["problem"]
    with pytest.raises(train.UserError, match="rows.jsonl:6.*5.png"):
        run(monkeypatch, *flags(base, rows, tmp_path / "stop", "--use_lora", "--max_steps", 2, "--batch_size", 6))


def test_loss_scaling_leaves_out_an_overflow_and_nothing_else(monkeypatch, tmp_path, base, rows):
    """The fp16 scaler in the real loop (no card is needed for that): one overflow halves the scale and skips the step."""
    from training.precision import LossScaler, Precision

    monkeypatch.setattr(Precision, "scaler", lambda self: LossScaler(dynamic=True, scale=2.0**10))
    original, calls = train.Run.accumulate, []

    def overflow(self, examples, total):
        found = original(self, examples, total)
        calls.append(len(calls))
        if len(calls) == 3:  # the rehearsal, step 1, then step 2
            next(iter(self.trained.values())).grad.view(-1)[0] = float("inf")
        return found

    output = tmp_path / "out"
    more = ["--max_steps", 4, "--save_every", 1, "--save_total_limit", 9, "--lr_schedule", "constant", "--warmup_steps", 0]
    monkeypatch.setattr(train.Run, "accumulate", overflow)
    assert run(monkeypatch, *flags(base, rows, output, *more)) == 0
    steps = [load_file(output / "checkpoints" / f"step-{step:06d}" / "trained.safetensors") for step in (1, 2, 3)]
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in steps[0])
    assert not all(torch.equal(steps[1][name], steps[2][name]) for name in steps[0])
    state = json.loads((output / "checkpoints" / "step-000004" / "state.json").read_text())
    assert state["scaler"]["scale"] == 2.0**9 and state["scaler"]["num_good_steps"] == 2
