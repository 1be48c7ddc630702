"""A small run of train.py inside the test's own process."""

import json
import sys

import train


def write_problems(folder):
    """Ten problems of different lengths, none of which a random model solves."""
    path = folder / "problems.jsonl"
    lines = [{"id": f"p{n}", "prompt": "add " + "1 " * n, "ground_truth": str(n)} for n in range(1, 11)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(monkeypatch, *arguments) -> int:
    """train.py with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return train.main()


def flags(base, rows, output, *more, **common) -> list:
    """The arguments of a small fp32 run, and settings of a test file's own; `more` wins over them."""
    every = {"base_model": base, "data_path": rows, "output_dir": output, "batch_size": 4, "num_workers": 0, "device": "cpu"}
    every |= {"precision": "fp32", "eval_every": "no"} | common
    return [part for name, value in every.items() if f"--{name}" not in more for part in (f"--{name}", value)] + list(more)
