"""A small run of train.py inside the test's own process."""

import sys

import train


def run(monkeypatch, *arguments) -> int:
    """train.py with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return train.main()


def flags(base, rows, output, *more, **common) -> list:
    """The arguments of a small fp32 run, and settings of a test file's own; `more` wins over them."""
    every = {"base_model": base, "data_path": rows, "output_dir": output, "batch_size": 4, "num_workers": 0, "device": "cpu"}
    every |= {"precision": "fp32", "eval_every": "no"} | common
    return [part for name, value in every.items() if f"--{name}" not in more for part in (f"--{name}", value)] + list(more)
