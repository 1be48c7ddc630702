"""`python -m bench gpu`: all that only a card can show, in one call of at most 9 minutes (bash bench/gpu.sh).

First whether it is right (bench/gpu_checks.py), then what it takes: every family at its real size with random weights under
the memory of a 24 GB card, LoRA on 16, 8 and 4 bits, on rows of 2,048 positions and on a screenshot, each a whole run of
train.py; its forecast beside the measured peak. Cheap parts come first; a part that fails or cannot run becomes a row that
says why, and the next one starts. Rows are appended to a file as they come and printed as one table at the end. --dry runs
the same functions on the processor with tiny models.
"""

import contextlib
import gc
import json
import signal
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from bench import gpu_checks
from bench.gpu_checks import Row, run_train
from bench.real_size import REAL, TINY_PICTURE, TINY_ROW, RandomShards, write_folder, write_rows
from bench.train import TOLERANCE, machine
from data.errors import UserError
from training.memory import CUDA_CONTEXT_GIB, GIB, check_device

CARD_GIB = 23.5  # what a 24 GB card has to give, the driver's context included
TEXT_ROW, NUM_STEPS = 2048, 4
QUANTS = {"4bit": ["--use_4bit"], "8bit": ["--use_8bit"], "bf16": []}
VARIANTS = ("hf_trainer", "plain", "ours", "ours_checkpointing")


@dataclass(frozen=True)
class Part:
    """A function (device, scratch folder, dry) that yields rows, and the most seconds that it gets."""

    name: str
    run: Callable[[torch.device, Path, bool], Iterator[Row]]
    seconds: float


def list_parts() -> list[Part]:
    """All parts, the cheap ones first; of the real sizes those with few bits, which fit everywhere."""
    parts = [Part(name, function, 60) for name, function in gpu_checks.CHECKS.items()] + [Part("trainer", compare_trainer, 90)]
    return parts + [Part(f"{name}-{quant}", partial(measure, name, quant), 90) for quant in QUANTS for name in REAL]


def run(seconds: float, only: list[str], output: Path, dry: bool) -> int:
    """Run the parts for at most `seconds` in all; 1 where a row is WRONG or FAILED, else 0. Raises UserError for a part
    that does not exist, and where there is no card and no --dry."""
    parts = list_parts()
    unknown = [name for name in only if name not in [part.name for part in parts]]
    if unknown:
        raise UserError(f"--only {unknown[0]}: none of {', '.join(part.name for part in parts)}")
    device = check_device("cpu" if dry else "cuda")
    start = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    shm = Path("/dev/shm")  # checkpoints of the measured runs: no disk, no wait
    with open(output, "a", encoding="utf-8") as file, tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as scratch:
        chosen = [part for part in parts if not only or part.name in only]
        for row in all_rows(chosen, device, Path(scratch), dry, start + seconds):
            rows.append(row | {"after_seconds": round(time.monotonic() - start, 1)})
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            print(line(rows[-1]), flush=True)
    print("\n| part | what | | figures |\n|---|---|---|---|\n" + "\n".join(f"| {line(row)} |" for row in rows))
    return 1 if any(row["status"] in ("WRONG", "FAILED") for row in rows) else 0


def all_rows(parts: list[Part], device: torch.device, scratch: Path, dry: bool, end: float) -> Iterator[Row]:
    """The machine, then each part's rows; whatever a part raises is a row too."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no card"
    yield {"part": "machine", "what": f"{name}; {machine()}", "status": "dry" if dry else "ok"}
    for part in parts:
        left = end - time.monotonic()
        if left < 5:
            yield {"part": part.name, "what": "", "status": "skipped", "why": "no time left"}
            continue
        try:
            with alarm(min(part.seconds * (10 if dry else 1), left)):
                for row in part.run(device, scratch, dry):
                    yield {"part": part.name} | row
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
            status = "skipped" if isinstance(error, ModuleNotFoundError) else "FAILED"
            place = traceback.format_exc()[-3000:]
            yield {"part": part.name, "what": "", "status": status, "why": why, "traceback": place}
        release(device)


class OutOfTime(Exception):
    """A part's time is up. No TimeoutError, which is an OSError: a run takes those for a full disk and goes on."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """OutOfTime inside the block after so many seconds."""

    def ring(number, frame):
        raise OutOfTime(f"the part took longer than its {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def release(device: torch.device) -> None:
    """Give back the memory of what ran before, and begin its peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def line(row: Row) -> str:
    """A row for people: part, what, status, the other figures."""
    hidden = ("part", "what", "status", "traceback")
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if k not in hidden}
    return f"{row['part']} | {row['what']} | {row['status']} | {', '.join(f'{k} {v}' for k, v in shown.items())}"


# ---- real sizes -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_card(device: torch.device) -> Iterator[None]:
    """A larger card gives no more than one of 24 GB; the driver's context lies outside of what torch counts."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.mem_get_info(device)[1] / GIB
    torch.cuda.set_per_process_memory_fraction(min(1.0, (CARD_GIB - CUDA_CONTEXT_GIB) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def measure(name: str, quant: str, device: torch.device, scratch: Path, dry: bool) -> Iterator[Row]:
    """LoRA on one kind of base: a run on text rows, and one on rows with a screenshot. What the product refuses for want of
    memory is a row: that is its answer on such a card."""
    folder, real = scratch / name, REAL[name]
    if not folder.exists():
        write_folder(name, folder, tiny=dry)
    kinds = [("text", None, TINY_ROW if dry else TEXT_ROW)]
    if real.picture:
        kinds.append(("picture", TINY_PICTURE if dry else real.picture, TINY_ROW if dry else real.picture_row))
    for kind, picture, tokens in kinds:
        release(device)
        row = {"what": f"{kind} row of {tokens}"}
        rows = folder / f"{kind}.jsonl"
        write_rows(folder, rows, tokens, picture, NUM_STEPS)
        flags = ["--device", device.type, "--use_lora", *QUANTS[quant], "--max_steps", NUM_STEPS, "--micro_tokens", tokens]
        began = time.perf_counter()
        try:
            with small_card(device), patch("model.load.Shards", RandomShards):
                journal = run_train(folder, rows, scratch / f"{name}-{quant}-{kind}", *flags)
            yield row | {"status": "ok"} | figures(journal, tokens, device, time.perf_counter() - began)
        except UserError as error:
            small = "fit" in str(error) or "out of memory" in str(error)
            yield row | {"status": "does not fit" if small else "FAILED", "why": str(error)[:300]}


def figures(journal: list[dict], tokens: int, device: torch.device, seconds: float) -> Row:
    """Forecast and peak in GiB, seconds an update and positions a second (the first update left out), the losses."""
    steps = [record for record in journal if "event" not in record]
    forecast = next(record for record in journal if record.get("event") == "forecast")
    update = statistics.median(record["seconds"] for record in steps[1:])
    planned, peak = sum(gib for _, gib in forecast["gib"]), max(record["memory"] for record in steps)
    found = {"forecast_gib": planned, "peak_gib": peak, "peak_to_forecast": peak / planned}
    if device.type == "cuda":
        found["allocated_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    found |= {"forecast_update_seconds": forecast["seconds_per_update"], "update_seconds": update}
    found |= {"positions_per_second": tokens / update, "data_wait": max(r["data_wait"] for r in steps[1:])}
    return found | {"first_loss": steps[0]["loss"], "last_loss": steps[-1]["loss"], "run_seconds": seconds}


# ---- beside transformers' Trainer -----------------------------------------------------------------------------------------


def compare_trainer(device: torch.device, scratch: Path, dry: bool) -> Iterator[Row]:
    """Qwen2.5-0.5B, LoRA, the same ragged rows through HF Trainer, a plain loop and ours, all in this process; the losses must
    agree."""
    from bench import variants
    from bench.workload import SIZES, write_model

    size, steps = ("quick", 3) if dry else ("qwen2.5-0.5b", 8)
    write_model(scratch / "trainer", SIZES[size], pictures=False)
    first = None
    for variant in VARIANTS:
        release(device)
        task = variants.Task(variant, "lora", "bf16", False, str(scratch / "trainer"), size, steps, device.type)
        found = variants.measure(task)
        if "missing" in found:
            yield {"what": variant, "status": "skipped", "why": found["missing"]}
            continue
        first = first or found
        gap = max(abs(a - b) for a, b in zip(found["losses"], first["losses"], strict=True))
        rate = found["tokens"] / found["seconds"]
        yield gpu_checks.check(
            f"{variant}: losses", gap, TOLERANCE["bf16"], supervised_tokens_per_second=rate, peak_gib=found["peak_mib"] / 1024,
            ratio=rate * first["seconds"] / first["tokens"],
        )
