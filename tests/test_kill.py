"""Real runs that are killed and stopped from outside, at moments that nobody chose well.

Each run is `python train.py` as a process of its own. A kill waits for a line of journal.jsonl and then for a seeded number
of looks at the file more, so that it falls into steps, saves and starts alike; nothing here depends on how fast the
machine is. Whatever happens, the run that is resumed until it is done must hold the bits of the run left in peace.
"""

import json
import os
import random
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from model.tiny import write_tiny
from training.checkpoint import find_problem
from training.journal import read_journal

pytestmark = pytest.mark.slow
LAST = 12  # updates; 20 rows in steps of 4 are 5 updates an epoch


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """base/ and rows.jsonl, and straight/: the run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("kill")
    write_tiny("qwen2", folder / "base")
    source = random.Random(0)
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(22):
            terms = [source.randint(0, 9) for _ in range(source.randint(1, 12))]
            row = {"id": f"sum-{number}", "prompt": "+".join(map(str, terms)), "completion": str(sum(terms))}
            file.write(json.dumps(row) + "\n")
    process = start(folder, folder / "straight")
    assert process.wait() == 0
    return folder


def start(place: Path, output: Path, save_every="1") -> subprocess.Popen:
    """A run in a process group of its own, resuming what there is; its output goes to a file beside the folder."""
    flags = ["--base_model", place / "base", "--data_path", place / "rows.jsonl", "--output_dir", output, "--device", "cpu"]
    flags += ["--use_lora", "--lora_dropout", 0.2, "--batch_size", 4, "--max_steps", LAST, "--num_workers", 2]
    flags += ["--precision", "fp32", "--eval_split", 2, "--eval_every", 4, "--resume", "yes", "--save_every", save_every]
    with open(f"{output}.log", "ab") as log:
        return subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, flags)], cwd=place, stdout=log, stderr=log,
                                start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def steps_of(output: Path) -> list[int]:
    """Steps in the journal as it is now, the last line perhaps half written."""
    return [record["step"] for record in read_journal(output / "journal.jsonl") if "event" not in record]


def wait_for_step(process: subprocess.Popen, output: Path, step: int) -> bool:
    """Wait until the journal has this step; False if the run ended first."""
    gone = os.pidfd_open(process.pid)
    try:
        while step not in steps_of(output):
            if select.select([gone], [], [], 0.002)[0]:
                return False
        return True
    finally:
        os.close(gone)


def check_finished(place: Path, output: Path) -> None:
    """Every step once and in order with the losses of the straight run, and its weights bit for bit."""
    journals = (read_journal(folder / "journal.jsonl") for folder in (output, place / "straight"))
    ours, theirs = ([record for record in journal if "event" not in record] for journal in journals)
    assert [record["step"] for record in ours] == list(range(1, LAST + 1))
    for key in ("loss", "grad_norm", "lr", "supervised_tokens"):
        assert [record[key] for record in ours] == [record[key] for record in theirs], key
    names = ["adapter/adapter_model.safetensors"]
    names += [f"checkpoints/step-{LAST:06d}/{name}.safetensors" for name in ("trained", "optimizer", "random")]
    for name in names:
        mine, other = load_file(output / name), load_file(place / "straight" / name)
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine), name
    left = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert left == [f"step-{LAST - 1:06d}", f"step-{LAST:06d}"]  # nothing half-saved stays
    answers = [json.loads(line) for line in (output / "outputs" / "held_out.jsonl").read_text().splitlines()]
    assert len(answers) == len({(line["when"], line["step"], line["id"]) for line in answers})


def log_of(output: Path) -> str:
    """What the runs of this folder printed."""
    return Path(f"{output}.log").read_text()


def finish(place: Path, output: Path) -> None:
    assert start(place, output).wait() == 0, log_of(output)


def test_killed_six_times(place, tmp_path):
    """SIGKILL to the whole group, as the kernel's memory killer or a power button would; the first while it still loads."""
    output, source, reached = tmp_path / "out", random.Random(1), 0
    process = start(place, output)
    while not (output / ".lock").exists():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert steps_of(output) == []  # no run yet: the next one takes the folder
    for _ in range(5):
        process = start(place, output)
        assert wait_for_step(process, output, reached + source.randint(1, 2)), log_of(output)
        for _ in range(source.randint(0, 20)):  # some milliseconds further: into the save, the next step, or behind both
            steps_of(output)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, log_of(output)
        reached = steps_of(output)[-1]
    finish(place, output)
    check_finished(place, output)


def test_asked_to_stop_three_times(place, tmp_path):
    """By one signal: the step ends, a checkpoint of it is saved, the exit code says which signal it was."""
    output, reached = tmp_path / "out", 0
    for number, code, whole_group in (
        (signal.SIGTERM, 143, False),
        (signal.SIGTERM, 143, True),  # as a service manager or a scheduler does: the data workers get it too
        (signal.SIGINT, 130, True),  # Ctrl-C
    ):
        process = start(place, output, save_every="no")
        assert wait_for_step(process, output, reached + 2)
        (os.killpg if whole_group else os.kill)(process.pid, number)
        assert process.wait() == code, log_of(output)
        reached = steps_of(output)[-1]
        (saved,) = (output / "checkpoints").glob(f"step-{reached:06d}")
        assert find_problem(saved) is None
        last = read_journal(output / "journal.jsonl")[-1]
        assert last["reason"] == "stopped by a signal" and last["step"] == reached < LAST
    assert log_of(output).count("stopping after this step") == 3 and "Traceback" not in log_of(output)
    finish(place, output)
    check_finished(place, output)


def test_a_worker_is_killed(place, tmp_path):
    """The run ends in a sentence, saved, and goes on from there."""
    output = tmp_path / "out"
    process = start(place, output)
    assert wait_for_step(process, output, 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    assert process.wait() == 2, log_of(output)
    assert "error: a data worker was ended" in log_of(output) and "Traceback" not in log_of(output)
    finish(place, output)
    check_finished(place, output)


def test_a_bug_ends_the_process(place, tmp_path):
    """A traceback and exit code 1, with the workers gone too: a run that crashes at night must not hang until morning."""
    broken = "import sys, train; from training import guards; guards.judge = None; train.command(train.main)"
    flags = ["--base_model", place / "base", "--data_path", place / "rows.jsonl", "--output_dir", tmp_path / "out"]
    flags += ["--use_lora", "--num_workers", "2", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", broken, *map(str, flags)],
                          cwd=ROOT, capture_output=True, text=True, timeout=120)  # the pipes close when the last worker ends
    assert done.returncode == 1 and "'NoneType' object is not callable" in done.stderr
