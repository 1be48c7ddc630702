"""journal.jsonl: one story whatever happens to the run, strict JSON, and what the screen says."""

import json
import sys
import types
from pathlib import Path

import pytest

from data.errors import UserError
from training import journal as module
from training.journal import Journal, PatientFile, read_journal

KEYS = ["step", "loss", "lr", "grad_norm", "supervised_tokens", "seconds", "data_wait", "memory", "rows"]


def write_steps(journal, first, last, **values):
    for step in range(first, last + 1):
        figures = dict(epoch=0.5, loss=1.0 / step, lr=1e-4, grad_norm=0.5, supervised_tokens=100, seconds=2.0,
                       data_wait=0.1, memory=1.5, rows=[f"r{step}"]) | values
        journal.step(step, **figures)


def raw(folder):
    return (folder / "journal.jsonl").read_text()


def test_a_step_has_exactly_the_agreed_keys(tmp_path):
    journal = Journal(tmp_path / "new" / "folder", last_step=3)
    write_steps(journal, 1, 3)
    records = [json.loads(line) for line in raw(tmp_path / "new" / "folder").splitlines()]  # flushed: not closed yet
    assert [list(record) for record in records] == [KEYS] * 3
    journal.close()


def test_statistics_rows_and_a_skipped_step_are_kept(tmp_path):
    journal = Journal(tmp_path, last_step=1)
    write_steps(journal, 1, 1, rows=["a", "b"], reward=0.25, skipped=True)
    assert read_journal(tmp_path / "journal.jsonl")[0] | {"rows": ["a", "b"], "reward": 0.25, "skipped": True} == \
        read_journal(tmp_path / "journal.jsonl")[0]


@pytest.mark.parametrize("resumed_at", [1, 3, 4])
def test_resuming_leaves_one_story(tmp_path, resumed_at):
    first = Journal(tmp_path, last_step=6)
    first.event("eval", 0, eval_loss=2.0)
    write_steps(first, 1, 4)
    first.event("eval", 4, eval_loss=1.0)
    first.close()
    before = raw(tmp_path).splitlines()
    second = Journal(tmp_path, last_step=6, step=resumed_at)
    write_steps(second, resumed_at + 1, 6)
    second.close()
    lines = raw(tmp_path).splitlines()
    kept = [line for line in before if json.loads(line)["step"] <= resumed_at]
    assert lines[:len(kept)] == kept, "what was kept is byte for byte what it was"
    assert json.loads(lines[len(kept)]) == {"event": "resume", "step": resumed_at}
    steps = [record["step"] for record in map(json.loads, lines) if "event" not in record]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert not any("loss" in record for record in map(json.loads, lines) if "event" in record)
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]


def test_a_fresh_run_begins_a_new_file(tmp_path):
    (tmp_path / "journal.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"torn')
    Journal(tmp_path, last_step=1).close()
    assert raw(tmp_path) == ""


def test_a_torn_last_line_is_left_out_wherever_it_is_torn(tmp_path):
    journal = Journal(tmp_path, last_step=3)
    write_steps(journal, 1, 3, rows=["\u00e9t\u00e9"])
    whole = (tmp_path / "journal.jsonl").read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole) - 1):
        for tail in (b"", b"\0" * 7):  # a power cut can leave a block of zeros
            (tmp_path / "torn.jsonl").write_bytes(whole[:end] + tail)
            assert [record["step"] for record in read_journal(tmp_path / "torn.jsonl")] == [1, 2]


def test_resuming_over_a_torn_line_repairs_the_file(tmp_path):
    (tmp_path / "journal.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    Journal(tmp_path, last_step=3, step=1).close()
    assert [json.loads(line) for line in raw(tmp_path).splitlines()] == [
        {"step": 1, "loss": 1.0}, {"event": "resume", "step": 1}]


def test_a_broken_line_inside_is_an_error_with_its_place(tmp_path):
    (tmp_path / "journal.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"journal\.jsonl:2 is not JSON"):
        read_journal(tmp_path / "journal.jsonl")


def test_non_finite_numbers_are_strict_json_and_come_back(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    journal = Journal(tmp_path, last_step=1)
    write_steps(journal, 1, 1, loss=float("nan"), grad_norm=float("inf"))
    journal.event("forecast", 1, gib=[["weights", float("-inf")]])
    step, event = (json.loads(line, parse_constant=refuse) for line in raw(tmp_path).splitlines())
    assert (step["loss"], step["grad_norm"], event["gib"]) == ("nan", "inf", [["weights", "-inf"]])
    record = read_journal(tmp_path / "journal.jsonl")[0]
    assert record["loss"] != record["loss"] and record["grad_norm"] == float("inf")


def test_no_journal_is_an_empty_one(tmp_path):
    assert read_journal(tmp_path / "journal.jsonl") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full, which refuses as a full disk does")
def test_what_a_full_disk_refuses_is_written_when_there_is_room(tmp_path, capsys):
    journal, path = Journal(tmp_path, last_step=4), tmp_path / "journal.jsonl"
    write_steps(journal, 1, 1)
    path.rename(tmp_path / "kept")
    path.symlink_to("/dev/full")
    write_steps(journal, 2, 3)
    journal.event("commit", 3)
    (tmp_path / "kept").replace(path)
    assert [record["step"] for record in read_journal(path)] == [1]
    write_steps(journal, 4, 4)
    assert [(record["step"], record.get("event")) for record in read_journal(path)] == [
        (1, None), (2, None), (3, None), (3, "commit"), (4, None)]  # fmt: skip
    assert capsys.readouterr().err.count("warning: ") == 1
    journal.close()
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left.*journal.jsonl"):  # never written to: that is no passing trouble
        PatientFile(path).write("line")


def test_what_is_wider_than_the_terminal_goes_on_below(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    journal = Journal(tmp_path, last_step=1)
    parts = ["held out at step 3:", "loss 1.25", "answer_tokens 12", "stop_rate 1", "one whose name is longer than the line"]
    journal.say(*parts)
    assert capsys.readouterr().out == "  ".join(parts) + "\n"  # a file is searched line by line
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    journal.say(*parts)
    assert capsys.readouterr().out.splitlines() == [
        "held out at step 3:  loss 1.25", "    answer_tokens 12  stop_rate 1", f"    {parts[-1]}"]  # fmt: skip


def test_the_status_line(tmp_path, capsys):
    journal = Journal(tmp_path, last_step=10, logging_steps=4)
    write_steps(journal, 1, 10, accuracy=0.5, forward_seconds=0.7)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["4/10", "8/10", "10/10"]
    for part in ("epoch 0.50", "loss 0.2500", "lr 1.0e-04", "norm 0.50", "50 tok/s", "peak 1.50 GiB",
                 "eta 00:12", "accuracy 0.5"):
        assert part in lines[0]
    assert "forward_seconds" not in lines[0] and "wait" not in lines[0]
    write_steps(journal, 12, 12, data_wait=1.5)
    assert "wait 1.50 s" in capsys.readouterr().out


def test_a_skipped_step_is_always_shown(tmp_path, capsys):
    journal = Journal(tmp_path, last_step=10, logging_steps=100)
    write_steps(journal, 2, 2)
    assert capsys.readouterr().out == ""
    write_steps(journal, 3, 3, skipped=True, loss=float("nan"))
    assert "loss nan" in (line := capsys.readouterr().out) and "SKIPPED" in line


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_logger_is_a_sentence(tmp_path, monkeypatch, name):
    for package in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)  # None makes an import fail
    with pytest.raises(UserError, match=f"pip install {name}"):
        Journal(tmp_path, last_step=1, report_to=name)
    assert not (tmp_path / "journal.jsonl").exists()


def test_wandb_hears_numbers_only(tmp_path, monkeypatch):
    heard = []
    run = types.SimpleNamespace(log=heard.append, finish=lambda: heard.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: run))
    journal = Journal(tmp_path, last_step=2, logging_steps=2, report_to="wandb")
    write_steps(journal, 1, 2)
    journal.event("eval", 2, eval_loss=0.5, file="x")
    journal.close()
    assert [set(record) for record in heard[:-1]] == [set(KEYS) - {"rows"}, {"step", "eval_loss"}] and heard[-1] == "finished"


def test_nothing_is_imported_for_loggers_nobody_asked_for(tmp_path, monkeypatch):
    for package in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(module, "open_logger", lambda *_: pytest.fail("opened a logger"))
    Journal(tmp_path, last_step=1).close()
