"""The GPU script on the processor: its whole path with tiny models, what becomes of parts that fail, and the real sizes."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from bench import gpu
from bench.real_size import REAL, RandomShards, write_folder, write_rows
from data.errors import UserError
from data.records import open_records
from model.family import find_family
from model.load import build_on_meta, check_tensors, load

pytestmark = pytest.mark.slow


@pytest.mark.slow
def test_the_whole_script_runs_dry(tmp_path):
    output = tmp_path / "gpu.jsonl"
    command = [sys.executable, "-m", "bench", "gpu", "--dry", "--seconds", "3000", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["part"] for row in rows} == {"machine", *(part.name for part in gpu.list_parts())}
    assert {row["status"] for row in rows} <= {"dry", "ok", "skipped"}
    assert all(row["part"] == "trainer" and "accelerate" in row["why"] for row in rows if row["status"] == "skipped")
    measured = [row for row in rows if "positions_per_second" in row]
    assert len(measured) == 3 * (1 + 2 * 4) and all(row["forecast_gib"] > 0 and row["peak_gib"] > 0 for row in measured)
    assert all(row["last_loss"] < row["first_loss"] for row in measured)  # it learns: its steps are the product's
    assert "| cogagent-bf16 | picture row of 200 | ok |" in done.stdout.split("| part | what |")[1]


def test_the_shell_script_hands_its_arguments_on(tmp_path):
    command = ["bash", "bench/gpu.sh", "--dry", "--only", "attention", "--output", str(tmp_path / "gpu.jsonl")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| attention | varlen kernel | ok | used False" in done.stdout and "networks" not in done.stdout


def run_parts(monkeypatch, tmp_path, seconds=100.0, **parts):
    """Exit code and rows of a run of these functions."""
    listed = [gpu.Part(name, lambda device, scratch, dry, f=f: f(), 0.1 if name == "slow" else 60) for name, f in parts.items()]
    monkeypatch.setattr(gpu, "list_parts", lambda: listed)
    code = gpu.run(seconds, [], tmp_path / "rows.jsonl", dry=True)
    return code, [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()][1:]


def test_a_part_that_fails_is_a_row_and_the_next_one_runs(monkeypatch, tmp_path, capsys):
    def broken():
        yield {"what": "first", "status": "ok", "figure": 1.5}
        raise RuntimeError("no such\nkernel")

    def absent():
        raise ModuleNotFoundError("No module named 'bitsandbytes'")

    def slow():
        time.sleep(30)
        yield {}

    code, rows = run_parts(monkeypatch, tmp_path, broken=broken, absent=absent, slow=slow, last=lambda: [])
    assert code == 1
    assert [(row["part"], row["status"]) for row in rows] == [
        ("broken", "ok"), ("broken", "FAILED"), ("absent", "skipped"), ("slow", "FAILED"),
    ]  # fmt: skip
    assert rows[1]["why"] == "RuntimeError: no such kernel" and "in broken" in rows[1]["traceback"]
    assert "longer than its 1 s" in rows[3]["why"]
    table = capsys.readouterr().out.split("| part | what |")[1]
    assert "| broken | first | ok | figure 1.5" in table and "traceback" not in table


def test_without_time_the_rest_is_skipped_and_wrong_is_an_error(monkeypatch, tmp_path):
    code, rows = run_parts(monkeypatch, tmp_path, seconds=1, late=lambda: [{"what": "", "status": "ok"}])
    assert (code, rows[0]["status"], rows[0]["why"]) == (0, "skipped", "no time left")
    (tmp_path / "rows.jsonl").unlink()
    code, rows = run_parts(monkeypatch, tmp_path, bad=lambda: [gpu.gpu_checks.check("x", float("nan"), 1.0)])
    assert (code, rows[0]["status"]) == (1, "WRONG")


def test_what_is_refused():
    with pytest.raises(UserError, match="--only llamas: none of attention"):
        gpu.run(10, ["llamas"], ROOT / "unused", dry=True)
    if not torch.cuda.is_available():
        command = [sys.executable, "-m", "bench", "gpu"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and "--device cuda" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", list(REAL))
def test_real_sizes_have_rows_of_the_length_that_is_said(tmp_path, name):
    folder, real = tmp_path / name, REAL[name]
    write_folder(name, folder, tiny=False)
    family, shards = find_family(folder), RandomShards(folder)
    check_tensors(build_on_meta(family), family, shards)
    sizes = {"qwen2": 494_032_768, "qwen2_5_vl": 3_754_622_976, "phi3_vision": 4_146_621_440, "minicpm_v": 8_537_092_336,
             "cogagent": 13_906_320_896 + 32}  # fmt: skip
    assert sum(shape.numel() for shape in shards.sizes.values()) == sizes[name]
    for tokens, picture in [(2048, None)] + [(real.picture_row, real.picture)] * bool(real.picture):
        write_rows(folder, folder / "rows.jsonl", tokens, picture, 1)
        example = family.encode(open_records(folder / "rows.jsonl", None, False, "stop")[0].messages)
        assert len(example) == tokens and len(example.image_spans) == bool(picture) and example.num_supervised > 40


def test_random_shards_load_like_a_checkpoint(monkeypatch, tmp_path):
    write_folder("qwen2_5_vl", tmp_path / "model", tiny=True)
    monkeypatch.setattr("model.load.Shards", RandomShards)
    monkeypatch.setattr(RandomShards, "BLOCK", 10_000)  # so that large tensors repeat it
    model, _ = load(tmp_path / "model", None, "bfloat16", "cpu", None)
    again, _ = load(tmp_path / "model", None, "bfloat16", "cpu", None)
    for (name, p), q in zip(model.net.named_parameters(), again.net.parameters(), strict=True):
        assert torch.equal(p, q) and p.dtype == torch.bfloat16
        is_norm = p.ndim == 1 and name.endswith("weight")
        assert (p == 1).all() if is_norm else 0.01 < p.float().std() < 0.03, name
