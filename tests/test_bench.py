"""The bench: ours and the plain loop do the same work on a tiny model, and the table says so. No timing is asserted."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT

from bench.train import GROUPS, Group, choose, table
from bench.workload import FULL, QUICK, ROWS_PER_STEP, make_rows, write_model
from data.errors import UserError
from model.family import find_family

pytestmark = pytest.mark.slow


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench", "train", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def test_ours_and_the_plain_loop_agree_and_the_table_prints():
    done = bench("--quick", "--only", "full_fp32", "ours", "plain")
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith(("| ours", "| plain"))]
    assert [row[0].strip() for row in rows] == ["plain", "ours"]
    assert all(float(row[1]) > 0 and float(row[3]) > 0 for row in rows)
    assert float(rows[1][5]) <= 1e-5


def test_pictures_agree_too():
    done = bench("--quick", "--only", "pictures_fp32", "ours", "plain")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| ours \| \d+ \|", done.stdout)


def test_a_name_that_is_nothing_is_refused():
    done = bench("--only", "llamas")
    assert (done.returncode, done.stdout) == (2, "")
    assert "llamas" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(UserError):
        choose(["ours", "llamas"])
    assert choose(["ours", "lora"])["lora"].variants == ("ours",)
    assert list(choose([])) == list(GROUPS)


def result(losses, seconds=1.0):
    return {"losses": losses, "seconds": seconds, "tokens": 100, "positions": 200, "peak_mib": 500.0}


def test_what_differs_breaks_or_is_missing_is_named():
    group = Group("full", "fp32", ("plain", "ours", "trl"))
    text, good = table("g", group, {"plain": [result([2.0, 1.0], 2.0)], "ours": [result([2.0, 1.0])]}, 2, 1)
    assert good and "| ours | 100 | 2.00 | 500 | 1.00 | 0.0e+00 |" in text
    text, good = table("g", group, {"plain": [result([2.0, 1.0])], "ours": [result([2.0, 1.0001])]}, 2, 1)
    assert not good and "DIFFERS" in text
    text, good = table("g", group, {"plain": [result([2.0])], "trl": [{"missing": "No module named 'trl'"}]}, 1, 1)
    assert good and "| trl | not installed (No module named 'trl')" in text
    text, good = table("g", group, {"plain": [result([2.0])], "trl": [{"broken": "ValueError: x"}]}, 1, 1)
    assert not good and "BROKEN: ValueError: x" in text


def test_the_workload_is_what_it_says(tmp_path):
    write_model(tmp_path / "text", QUICK, pictures=False)
    size = replace(FULL, vocabulary=QUICK.vocabulary)  # the lengths of the full workload, in words that the tiny model has
    rows = make_rows(find_family(tmp_path / "text"), size, 10 * ROWS_PER_STEP, pictures=False)
    lengths = sorted(map(len, rows))
    assert 180 <= lengths[len(lengths) // 2] <= 220 and lengths[-1] <= 1024
    assert 0.4 <= sum(row.num_supervised for row in rows) / sum(lengths) <= 0.6
