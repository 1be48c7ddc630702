"""Verdicts on steps, stop signals, out of memory, and who may write an output folder."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT

from data.errors import UserError
from training.guards import Statistics, Stop, is_out_of_memory, judge, open_folder

NAN, INF = math.nan, math.inf


def child(code: str, *arguments: str, **settings) -> subprocess.Popen:
    """A process that runs a few lines with the project importable."""
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, stdin=subprocess.PIPE, **settings)  # fmt: skip


def test_finite_steps_update_and_others_do_not():
    record = Statistics()
    assert judge(1.0, 2.0, record).action == "update"
    for loss, norm in ((NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (-INF, NAN)):
        record = Statistics()
        verdict = judge(loss, norm, record)
        assert verdict.action == "skip" and "not finite" in verdict.reason
        assert record.losses == record.grad_norms == []


def test_five_bad_steps_in_a_row_stop_and_a_good_one_between_does_not():
    record = Statistics()
    assert [judge(NAN, 1.0, record).action for _ in range(5)] == ["skip"] * 4 + ["stop"]
    record = Statistics()
    actions = [judge(NAN if step % 5 < 4 else 1.0, 1.0, record).action for step in range(25)]
    assert actions == (["skip"] * 4 + ["update"]) * 5


def test_an_fp16_overflow_is_skipped_for_as_long_as_the_scale_can_shrink():
    record = Statistics()
    assert {judge(1.0, INF, record, loss_scale=2.0**power).action for power in range(16, 0, -1)} == {"skip"}
    assert record.num_bad_in_a_row == 0
    assert [judge(1.0, INF, record, loss_scale=1.0).action for _ in range(5)][-1] == "stop"
    record = Statistics()
    assert [judge(NAN, NAN, record, loss_scale=1024.0).action for _ in range(5)][-1] == "stop"  # no overflow: the loss


def noisy(step: int) -> tuple[float, float]:
    generator = random.Random(step)
    return 2.0 + generator.gauss(0, 0.1), 1.0 + generator.gauss(0, 0.05)


def test_spikes_are_skipped_only_on_request_and_only_with_enough_history():
    for skip_spikes, num_before, expected in ((True, 64, "skip"), (True, 63, "update"), (False, 128, "update")):
        for spike in ((9.0, 1.0), (2.0, 5.0)):
            record = Statistics()
            assert all(judge(*noisy(step), record, skip_spikes).action == "update" for step in range(num_before))
            assert judge(*spike, record, skip_spikes).action == expected
    assert judge(-5.0, 0.1, record, True).action == "update"  # a fall is no spike


def test_a_lasting_new_level_is_accepted():
    record = Statistics()
    for step in range(128):
        judge(*noisy(step), record, True)
    actions = [judge(noisy(step)[0] + 5, noisy(step)[1], record, True).action for step in range(60)]
    assert actions[0] == "skip" and actions[-30:] == ["update"] * 30


@pytest.mark.parametrize("cut", [1, 70, 130, 200])
def test_verdicts_are_the_same_after_a_resume_inside_the_window(cut):
    steps = [noisy(step) for step in range(260)]
    for place in (3, 72, 131, 132, 133, 204, 230):
        steps[place] = (noisy(place)[0] + 4, noisy(place)[1] * 3)
    steps[201] = steps[202] = (NAN, 1.0)

    def verdicts(record, steps):
        return [judge(*step, record, skip_spikes=True) for step in steps]

    record = Statistics()
    expected = verdicts(Statistics(), steps)
    assert {verdict.action for verdict in expected} == {"update", "skip"}
    first = verdicts(record, steps[:cut])
    assert first + verdicts(Statistics(**json.loads(json.dumps(asdict(record)))), steps[cut:]) == expected


def test_stop_is_a_wish_first():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a run that another test broke off has left its own
    stop = Stop()
    try:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and stop.exit_code == 130
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


LOOP = """
import sys
from training.guards import Stop
stop = Stop()
print("ready", flush=True)
for line in sys.stdin:                      # each line is a step
    print("stopping" if stop.requested else "step", flush=True)
sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_process_as_promised(number, code):
    polite, urgent = child(LOOP), child(LOOP)
    for process in (polite, urgent):
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stderr.readline() == "\n" and "a second signal leaves at once" in process.stderr.readline()
    polite.stdin.write("\n")
    output, errors = polite.communicate()
    assert output == "stopping\n" and polite.returncode == code and "Traceback" not in errors
    urgent.send_signal(number)
    assert urgent.wait() == code and urgent.communicate()[0] == ""


def test_out_of_memory_is_told_from_other_failures():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(caught.value)
    assert not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(KeyboardInterrupt())


HOLD = """
import sys
from training.guards import open_folder
lock = open_folder(sys.argv[1])
print("locked", flush=True)
sys.stdin.read()
"""
TRY = """
import sys
from data.errors import command
from training.guards import open_folder
command(lambda: open_folder(sys.argv[1]) and 0)
"""


def test_two_runs_cannot_write_one_folder(tmp_path):
    folder = str(tmp_path / "runs/one")
    holder = child(HOLD, folder)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"process {holder.pid} is writing"):
        open_folder(folder)
    second = child(TRY, folder)
    output, errors = second.communicate()
    assert second.returncode == 2 and str(holder.pid) in errors and errors.count("\n") == 1  # a sentence
    open_folder(tmp_path / "runs/two").release()
    holder.kill()  # not a clean end, and the lock is gone all the same
    holder.communicate()
    open_folder(folder).release()


def test_a_worker_that_outlives_a_killed_run_does_not_hold_the_lock(tmp_path):
    code = HOLD.replace('print("locked"', 'import os; worker = os.fork()\nif worker: print(worker').replace(
        "sys.stdin.read()", "sys.stdin.read() if worker else __import__('signal').pause()")
    holder = child(code, str(tmp_path / "run"))
    worker = int(holder.stdout.readline())
    try:
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # still there
        open_folder(tmp_path / "run").release()
    finally:
        os.kill(worker, signal.SIGKILL)
        for pipe in (holder.stdin, holder.stdout, holder.stderr):
            pipe.close()


def test_whose_folder_it_is(tmp_path):
    open_folder(tmp_path / "new/deep").release()
    open_folder(tmp_path / "new/deep").release()  # holds our lock file and nothing else

    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="thesis.tex"):
        open_folder(stranger)
    assert [path.name for path in stranger.iterdir()] == ["thesis.tex"]

    for marks in (("run.yaml", "notes.txt"), ("bad_rows.jsonl",), ("reward_cache.jsonl",),
                  ("checkpoints/.saving-step-000001/weights",),
                  ("checkpoints/step-000001/manifest.json", "notes.txt")):  # fmt: skip
        ours = tmp_path / marks[0].replace("/", "-")
        for mark in marks:
            (ours / mark).parent.mkdir(parents=True, exist_ok=True)
            (ours / mark).touch()
        open_folder(ours).release()

    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be used as --output_dir"):
        open_folder(tmp_path / "file")


def test_the_guards_cost_no_heavy_import():
    output, _ = child("import sys, training.guards; print('torch' in sys.modules)").communicate()
    assert output == "False\n"
