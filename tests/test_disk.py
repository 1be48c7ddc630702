"""What a run on pictures leaves on the disk: a few MB beside checkpoints and result, nothing elsewhere."""

import json
import sys
import tempfile

import numpy
import pytest
from PIL import Image

import train
from model.tiny import write_tiny
from training.journal import read_journal

NUM_ROWS, NUM_PICTURES = 1000, 10


def bytes_of(folder, without=()):
    return sum(path.stat().st_size for path in folder.rglob("*")
               if path.is_file() and path.relative_to(folder).parts[0] not in without)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model and 1,000 rows on ten pictures of 0.4 MB."""
    place = tmp_path_factory.mktemp("disk")
    write_tiny("qwen2_5_vl", place / "base")
    (place / "rows").mkdir()
    noise = numpy.random.default_rng(0)
    for number in range(NUM_PICTURES):
        pixels = noise.integers(0, 256, (300, 400, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(place / "rows" / f"{number}.png", compress_level=1)
    with open(place / "rows" / "rows.jsonl", "w") as file:
        for number in range(NUM_ROWS):
            picture = {"type": "image", "image": f"{number % NUM_PICTURES}.png"}
            messages = [{"role": "user", "content": [picture, {"type": "text", "text": f"Button {number}?"}]},
                        {"role": "assistant", "content": f"({number}, 7)"}]  # fmt: skip
            file.write(json.dumps({"messages": messages}) + "\n")
    return place


def run(monkeypatch, place, name, *more):
    """A run of three updates with 16 rows answered twice, in folders of its own; returns its output folder."""
    for folder in ("home", "tmp", "cwd"):
        (place / name / folder).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(place / name / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(place / name / "tmp"))
    monkeypatch.chdir(place / name / "cwd")
    flags = {"--base_model": place / "base", "--data_path": place / "rows/rows.jsonl", "--output_dir": place / name / "run",
             "--max_steps": 3, "--batch_size": 8, "--max_pixels": 12544, "--eval_split": 16, "--max_new_tokens": 4,
             "--device": "cpu", "--num_workers": 0}  # fmt: skip
    arguments = [str(part) for flag in flags.items() for part in flag] + ["--use_lora", "--predict_with_generate", *more]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    assert train.main() == 0
    return place / name / "run"


def losses(run):
    return [record["loss"] for record in read_journal(run / "journal.jsonl") if "event" not in record]


def test_a_run_leaves_a_few_megabytes_and_the_cache_changes_nothing(monkeypatch, place):
    rows_before = bytes_of(place / "rows")
    plain = run(monkeypatch, place, "plain")
    assert 0 < bytes_of(plain, without=("checkpoints", "adapter")) < 10_000_000
    assert [bytes_of(place / "plain" / folder) for folder in ("home", "tmp", "cwd")] == [0, 0, 0]
    assert bytes_of(place / "rows") == rows_before

    cached = run(monkeypatch, place, "cached", "--image_cache", str(place / "cache"))
    assert losses(cached) == losses(plain)
    assert len([path for path in (place / "cache").rglob("*") if path.is_file()]) == NUM_PICTURES
    assert bytes_of(cached, without=("checkpoints", "adapter")) < 10_000_000
