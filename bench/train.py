"""`python -m bench train`: ours beside what a user would take instead, on the same rows, one after another.

Each variant runs in a process of its own (its peak memory is its own), on one thread, and is judged by CPU seconds, which
a busy machine disturbs less than wall time; the variants of a group take turns, round after round, so that what disturbs
one disturbs all. First of all their losses must agree at every step: a variant that does other work is no comparison.
The figure of a variant is its median over the rounds. A full run takes about half an hour; --only names parts of it.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
TEXT = ("hf_trainer", "plain", "ours", "ours_checkpointing", "trl", "trl_padding_free")


@dataclass(frozen=True)
class Group:
    """Variants that do the same work; the first that runs is what the others are divided by."""

    method: str
    precision: str
    variants: tuple[str, ...]
    pictures: bool = False
    most_steps: int = 1000


GROUPS = {
    "full": Group("full", "bf16", TEXT),
    "lora": Group("lora", "bf16", TEXT),
    "lora_8bit": Group("lora_8bit", "bf16", ("trl", "trl_padding_free", "ours")),
    "pictures": Group("full", "bf16", ("hf_trainer", "plain", "ours"), pictures=True),
    "pictures_lora": Group("lora", "bf16", ("hf_trainer", "plain", "ours"), pictures=True),
    "full_fp32": Group("full", "fp32", TEXT, most_steps=3),
    "lora_fp32": Group("lora", "fp32", TEXT, most_steps=3),
    "pictures_fp32": Group("full", "fp32", ("hf_trainer", "plain", "ours"), pictures=True, most_steps=3),
}


def run(rounds: int, steps: int, only: list[str], quick: bool) -> int:
    """Measure and print; returns 1 if losses differ or a variant breaks, else 0. A variant whose library is absent is
    named and left out. Raises UserError for a name in `only` that is neither a group nor a variant."""
    chosen = choose(only)
    size = "quick" if quick else "full"
    print(machine())
    good = True
    with tempfile.TemporaryDirectory() as scratch:
        for name, group in chosen.items():
            folder = prepare(Path(scratch), size, group.pictures)
            task = {
                "method": group.method, "precision": group.precision, "pictures": group.pictures, "folder": str(folder),
                "size": size, "steps": min(steps, group.most_steps),
            }
            results: dict[str, list[dict]] = {variant: [] for variant in group.variants}
            for number in range(rounds):
                for variant in group.variants:
                    result = measure(task | {"variant": variant})
                    results[variant].append(result)
                    note = f"{result['tokens'] / result['seconds']:.0f} tokens / CPU s" if "losses" in result else "did not run"
                    print(f"{name}: round {number + 1} of {rounds}, {variant}, {note}", file=sys.stderr, flush=True)
            text, agree = table(name, group, results, min(steps, group.most_steps), rounds)
            print("\n" + text, flush=True)
            good = good and agree
    return 0 if good else 1


def choose(only: list[str]) -> dict[str, Group]:
    """The groups, and in them the variants, that `only` names; a kind that it does not name stays whole."""
    variants = {v for group in GROUPS.values() for v in group.variants}
    unknown = [name for name in only if name not in GROUPS and name not in variants]
    if unknown:
        known = f"neither a group ({', '.join(GROUPS)}) nor a variant ({', '.join(sorted(variants))})"
        raise UserError(f"--only {unknown[0]}: {known}")
    groups = {name: group for name, group in GROUPS.items() if name in only} or GROUPS
    wanted = variants & set(only) or variants
    narrowed = {
        name: Group(g.method, g.precision, tuple(v for v in g.variants if v in wanted), g.pictures, g.most_steps)
        for name, g in groups.items()
    }
    return {name: group for name, group in narrowed.items() if group.variants}


def prepare(scratch: Path, size: str, pictures: bool) -> Path:
    """The model folder of text or picture rows, made at first use."""
    from bench.workload import SIZES, write_model

    folder = scratch / ("pictures" if pictures else "text")
    if not folder.exists():
        write_model(folder, SIZES[size], pictures)
    return folder


def measure(task: dict) -> dict:
    """bench/variants.py's result of a task, from a fresh process; {"broken": its last words} if it does not end well."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    child = subprocess.run(
        [sys.executable, "-m", "bench.variants", json.dumps(task)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if child.returncode:
        return {"broken": (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]}
    return json.loads(child.stdout.splitlines()[-1])


def table(name: str, group: Group, results: dict[str, list[dict]], steps: int, rounds: int) -> tuple[str, bool]:
    """(the group's table, whether all that ran have the same losses and none broke)."""
    tolerance = TOLERANCE[group.precision]
    ran = {variant: found for variant, found in results.items() if all("losses" in r for r in found)}
    lines = [f"{name}: {group.method}, {group.precision}, {steps} steps, rounds: {rounds}, losses within {tolerance:g}"]
    lines.append("| variant | supervised tokens / CPU s | ratio | peak RSS MiB | ratio | largest loss difference | |")
    lines.append("|---|---|---|---|---|---|---|")
    first = next(iter(ran), None)
    for variant, found in results.items():
        if variant not in ran:
            problem = next(r for r in found if "losses" not in r)
            reason = f"not installed ({problem['missing']})" if "missing" in problem else f"BROKEN: {problem['broken']}"
            lines.append(f"| {variant} | {reason} | | | | | |")
            continue
        rate, peak = speed(found), statistics.median(r["peak_mib"] for r in found)
        base = ran[first]
        base_peak = statistics.median(r["peak_mib"] for r in base)
        gap = max(abs(a - b) for r in found for a, b in zip(r["losses"], base[0]["losses"], strict=True))
        figures = f"{rate:.0f} | {rate / speed(base):.2f} | {peak:.0f} | {peak / base_peak:.2f} | {gap:.1e}"
        lines.append(f"| {variant} | {figures} | {'' if gap <= tolerance else 'DIFFERS'} |")
    broken = any("broken" in r for found in results.values() for r in found)
    return "\n".join(lines), not broken and not any("DIFFERS" in line for line in lines)


def speed(found: list[dict]) -> float:
    """Supervised tokens a CPU second, the median over the rounds."""
    return statistics.median(r["tokens"] / r["seconds"] for r in found)


def machine() -> str:
    """Processor and versions, for the record."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "absent"

    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    bf16 = "with" if any("avx512_bf16" in line or "amx_bf16" in line for line in info) else "without"
    packages = ("torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate", "datasets")
    return f"{model} ({bf16} bf16 instructions), one thread; Python {platform.python_version()}, " + ", ".join(
        f"{package} {installed(package)}" for package in packages
    )
