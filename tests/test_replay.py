"""A step of a run done again: the journal's own figures from the checkpoint before it, whose row was at fault, no trace."""

import json
import math
import os
import re
import sys

import pytest
from PIL import Image

import train
from data.errors import UserError
from model.tiny import write_tiny
from stages.sft import Stage
from training.journal import read_journal
from training.waiting import START, WINDOW, Waiting


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A LoRA run of 6 steps of 4 rows with dropout and two workers; checkpoints of steps 4 and 5."""
    folder = tmp_path_factory.mktemp("replay")
    write_tiny("qwen2", folder / "base")
    rows = [{"id": f"sum-{n}", "messages": [{"role": "user", "content": f"{n} + {n}" + "?" * (n % 5)},
                                            {"role": "assistant", "content": str(2 * n)}]} for n in range(11)]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": 3}]))
    flags = ["--base_model", folder / "base", "--data_path", f"{folder}/rows.jsonl*1.5", "--output_dir", folder / "run"]
    flags += ["--use_lora", "--lora_dropout", 0.2, "--batch_size", 4, "--max_steps", 6, "--save_every", 1, "--eval_every", "no"]
    flags += ["--device", "cpu", "--precision", "fp32", "--learning_rate", 0.01, "--num_workers", 2, "--on_bad_row", "skip"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        assert train.main() == 0
    return folder


def replay(monkeypatch, capsys, output, step, *more) -> str:
    capsys.readouterr()
    arguments = ["train.py", "--output_dir", output, "--replay_step", step, *more]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    assert train.main() == 0
    return capsys.readouterr().out


def state_of(folder) -> dict:
    return {path: (os.stat(path).st_mtime_ns, os.stat(path).st_size) for path in sorted(folder.rglob("*"))}


def step_line(out) -> list[float]:
    """Loss and norm of the replayed step, and of the journal."""
    line = next(line for line in out.splitlines() if line.startswith("the step: "))
    return [float(number) for number in re.findall(r"\d[\d.e+-]*", line)]


def test_a_step_from_the_checkpoint_before_it_is_the_journals(finished, monkeypatch, capsys):
    before = state_of(finished)
    out = replay(monkeypatch, capsys, finished / "run", 6)
    assert state_of(finished) == before, "a replay writes nothing"
    loss, norm, then_loss, then_norm = step_line(out)
    assert (loss, norm) == (then_loss, then_norm) and "checkpoints/step-000005\n" in out
    assert out.splitlines()[-1] == "everything is finite"
    shown = [line for line in out.splitlines() if line.startswith("sum-")]
    assert len(shown) == 4 and all("rows.jsonl:" in line for line in shown)
    tokens, losses = [int(line.split()[2]) for line in shown], [float(line.split()[3]) for line in shown]
    journal = {record["step"]: record for record in read_journal(finished / "run/journal.jsonl") if "event" not in record}
    assert sum(tokens) == journal[6]["supervised_tokens"]
    mean = sum(n * value for n, value in zip(tokens, losses, strict=True)) / sum(tokens)
    assert mean == pytest.approx(loss, rel=0.2)  # dropout falls otherwise when each row runs alone


def test_older_weights_are_named(finished, monkeypatch, capsys):
    first = replay(monkeypatch, capsys, finished / "run", 1)
    assert f"with the weights of {finished / 'base'}\n" in first
    loss, norm, then_loss, then_norm = step_line(first)
    assert (loss, norm) == (then_loss, then_norm)
    later = replay(monkeypatch, capsys, finished / "run", 3)
    assert f"{finished / 'base'}, which lack the 2 updates before it" in later
    assert step_line(later)[0] != step_line(later)[2]


def test_the_row_at_fault_is_found(finished, monkeypatch, capsys):
    out = replay(monkeypatch, capsys, finished / "run", 2)
    names = [line.split()[0] for line in out.splitlines() if line.startswith("sum-")]
    plain = Stage.loss

    def loss(stage, model, packed, total):
        value, figures = plain(stage, model, packed, total)
        return value * (math.inf if names[1] in packed.ids else 1), figures

    monkeypatch.setattr(Stage, "loss", loss)
    out = replay(monkeypatch, capsys, finished / "run", 2)
    shown = [line.split()[0] for line in out.splitlines() if line.startswith("sum-") and "not finite" in line]
    assert set(shown) == {names[1]} != set(names)
    assert re.fullmatch(r"the loss is not finite, (\d+) of \1 gradients are not finite, first .*lora.*", out.splitlines()[-1])


@pytest.mark.parametrize("lora", [["--use_lora"], []], ids=["lora", "full"])
def test_a_step_of_pairs(finished, monkeypatch, capsys, tmp_path, lora):
    """Against the reference of the run's start, also where the weights themselves have moved since."""
    rows = [{"id": f"pair-{n}", "prompt": f"{n}?", "chosen": str(n), "rejected": "no"} for n in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--stage", "dpo", "--base_model", finished / "base", "--data_path", tmp_path / "pairs.jsonl"]
    flags += ["--output_dir", tmp_path / "run", *lora, "--batch_size", 2, "--max_steps", 2, "--save_every", 1]
    flags += ["--eval_every", "no", "--device", "cpu", "--precision", "fp32", "--num_workers", 0]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags), "--learning_rate", "0.01", "--warmup_steps", "0"])
    assert train.main() == 0
    before = state_of(tmp_path)
    out = replay(monkeypatch, capsys, tmp_path / "run", 2)
    loss, norm, then_loss, then_norm = step_line(out)
    assert (loss, norm) == (then_loss, then_norm) and abs(loss - math.log(2)) > 1e-3 and state_of(tmp_path) == before
    assert len(re.findall(r"^pair-\d .*pairs.jsonl:\d$", out, re.MULTILINE)) == 2


@pytest.mark.parametrize("change, words", [
    (["--replay_step", 7], "has 6 steps"), (["--replay_step", 0], "expected"), (["--replay_step", "last"], "expected"),
    (["--output_dir", "{}/none"], "is missing"), (["--data_path", "{}/rows.jsonl"], "other rows|data_path was"),
    (["--output_dir", "{}/base", "--base_model", "x", "--data_path", "y"], "no run"),
])  # fmt: skip
def test_refused(finished, monkeypatch, change, words):
    flags = {"--output_dir": finished / "run", "--replay_step": 2} | dict(zip(change[::2], change[1::2], strict=True))
    arguments = [str(part).replace("{}", str(finished)) for pair in flags.items() for part in pair]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    before = state_of(finished)
    with pytest.raises(UserError, match=words):
        train.main()
    assert state_of(finished) == before


# ---- waiting for data ------------------------------------------------------------------------------------------------


def said(waiting: Waiting, *step: float, times: int) -> list[str]:
    found = []
    for _ in range(times):
        waiting.watch(*step, found.append)
    return found


def test_the_warning_names_the_workers_that_would_do():
    waiting = Waiting(num_workers=1)
    assert said(waiting, 9.0, 50.0, 60.0, times=START) == []  # workers start
    found = said(waiting, 3.4, 2.4, 3.4, times=50)  # a second to compute, 3.4 to encode with one worker
    assert len(found) == 1 and "--num_workers 4 would" in found[0] and "71% of the last 10 steps" in found[0]
    assert said(Waiting(2), 1.0, 0.19, 1.0, times=50) == []  # less than a fifth
    assert "--num_workers 3 would" in said(Waiting(2), 0.5, 0.5, 1.0, times=50)[0]  # what is slow is not encoding alone
    slow = said(Waiting(0), 1e6, 1e6, 1e6 + 1, times=START + WINDOW)
    assert f"this machine has {os.cpu_count()} cores" in slow[0]


def test_a_run_that_waits_says_so(tmp_path, monkeypatch, capsys):
    """One large picture a row, hardly any computing."""
    write_tiny("qwen2_5_vl", tmp_path / "vl")
    Image.new("RGB", (1500, 1500), "red").save(tmp_path / "a.png")
    row = {"image": "a.png", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--base_model", tmp_path / "vl", "--data_path", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "run"]
    flags += ["--batch_size", 1, "--max_steps", START + WINDOW, "--eval_every", "no", "--save_every", "no", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*flags, "--num_workers", 0, "--max_pixels", 3136])])
    assert train.main() == 0
    assert re.search(r"warning: \d+% of the last 10 steps .* --num_workers \d+ would remove it", capsys.readouterr().out)


def test_sampled_answers_are_sampled_again(tmp_path, monkeypatch, capsys):
    """RLOO: a replayed step has the answers, loss and norm of the journal; each answer has a line."""
    write_tiny("qwen2", tmp_path / "base")
    rows = [{"id": f"p{n}", "prompt": f"say {n}", "ground_truth": str(n)} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--base_model", tmp_path / "base", "--data_path", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "run"]
    flags += ["--stage", "rloo", "--reward", "test_rloo:checksum", "--num_samples", 3, "--max_new_tokens", 5, "--batch_size", 2]
    flags += ["--use_lora", "--max_steps", 3, "--save_every", 1, "--device", "cpu", "--precision", "fp32", "--num_workers", 0]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags), "--learning_rate", "0.05"])
    assert train.main() == 0
    before = state_of(tmp_path)
    out = replay(monkeypatch, capsys, tmp_path / "run", 3)
    assert state_of(tmp_path) == before and out.count("rows.jsonl:") == 6
    loss, norm, then_loss, then_norm = step_line(out)
    assert (loss, norm) == (then_loss, then_norm) and norm > 0
