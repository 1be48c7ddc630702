"""The rows of a run: training and evaluation sets opened, checked, measured, and accounted for before the first step.

Whatever is refused, here or later in a worker process, ends in one list that becomes bad_rows.jsonl; a refused row is
never replaced by another. Held-out rows and the shares that weights take are drawn by the seed alone.
"""

import hashlib
import json
import os
import sys
from bisect import bisect_left
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from data.batches import epoch_order, hash_seed
from data.boxes import boxes_of
from data.errors import UserError, printable
from data.lengths import Lengths, find_longest, measure, remedy
from data.paths import name_apart, open_sources
from data.records import KINDS, Record, Records, read_sources
from data.sources import Source
from data.template import make_template


@dataclass
class Rows:
    """The training records, of which an epoch sees lengths.kept (repeated by weight), and the evaluation sets by name, each
    as (records, row numbers)."""

    bad_path: Path
    on_bad_row: str
    bad: list[dict]  # the lines of bad_rows.jsonl
    train: Records = field(init=False)
    lengths: Lengths = field(init=False)  # of train
    eval_sets: dict[str, tuple[Records, list[int]]] = field(default_factory=dict)
    test_set: tuple[Records, list[int]] | None = None
    files: list[dict] = field(default_factory=list)  # [{"file", "rows", "sha256", "weight"}], those of train first

    @property
    def text(self) -> str:
        """What the start of a run prints about its rows."""
        dialects = ", ".join(f"{count} {name}" for name, count in self.train.dialects.items())
        notes = "".join(f"; {count} x {note}" for note, count in self.train.notes.items())
        held = "".join(f", {len(rows)} in {name}" for name, (_, rows) in self.eval_sets.items())
        skipped = f"{self.skipped}\n" if self.bad else ""
        weights = [f"{part.source.entry} x {part.source.weight:g}" for part in self.train.parts]
        weighed = f", an epoch is {', '.join(dict.fromkeys(weights))}" if any(not w.endswith(" x 1") for w in weights) else ""
        rows = f"{len(self.lengths.kept)} rows to train on ({dialects}{notes}){weighed}{held}"
        return f"{skipped}{rows}, the longest {self.lengths.longest} positions"

    @property
    def skipped(self) -> str:
        """How many rows have been skipped until now; a file that is trained on and evaluated counts once."""
        total = sum({file["file"]: file["rows"] for file in self.files}.values())
        return f"skipped {len(self.bad)} of {total} rows"

    @property
    def sha256(self) -> str:
        """Hash of the training files and their weights: a resumed run must read the same rows."""
        found = [[file["sha256"], file["weight"]] for file in self.files[: len(self.train.parts)]]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def usable(self, examples: list) -> list:
        """The examples without the rows that turned out bad in a worker. Raises the first one's UserError unless such
        rows are to be skipped; then they are counted and written down."""
        errors = [e for e in examples if isinstance(e, UserError)]
        bad = [{"where": e.where, "id": e.id, "problem": str(e).removeprefix(f"{e.where}: ")} for e in errors]
        sentences = [f"{row['where']}: {row['problem']}" for row in bad]
        if bad and self.on_bad_row == "stop":
            raise UserError(f"{sentences[0]}; correct it and start again, or go on without it: --on_bad_row skip --resume yes")
        for sentence in sentences:
            print(f"skipped {printable(sentence)}")
        if self.refuse(bad):
            print(self.skipped)
        return [e for e in examples if not isinstance(e, UserError)]

    def refuse(self, bad: list[dict]) -> bool:
        """Take rows into the list of refused ones, each once, and write the file anew. Whether one was new."""
        known = {row["where"] for row in self.bad}
        new = [row for row in bad if row["where"] not in known]
        if not new:
            return False
        self.bad += new
        part = self.bad_path.with_name(f".{self.bad_path.name}.part")
        try:  # whole or as it was, and a full disk ends no run
            part.write_text("".join(json.dumps(row) + "\n" for row in self.bad), encoding="utf-8")
            os.replace(part, self.bad_path)
        except OSError as error:
            print(f"warning: {self.bad_path} cannot be written ({error.strerror}); the run goes on", file=sys.stderr)
        return True


def open_rows(
    config: Any, family: Any, folder: Path, resumed: bool = False, takes: Collection[str] = ("conversation",)
) -> Rows:
    """Open config.data_path, and eval_path (each entry is a set of its own) or eval_split rows of data_path.

    takes: the kinds of row that the stage is for; one of another kind is a bad row.

    Raises UserError for rows that cannot be used, unless on_bad_row is "skip"; bad_rows.jsonl in `folder` lists all.
    A resumed run keeps those that it had found.
    """
    bad_path = folder / "bad_rows.jsonl"
    if not resumed:
        bad_path.unlink(missing_ok=True)
    known = bad_path.read_text(encoding="utf-8").splitlines() if bad_path.exists() else []
    rows = Rows(bad_path, config.on_bad_row, [json.loads(line) for line in known])
    rules = reading(vars(config), family, takes)
    trained, evaluated, tested = (
        open_sources(path) if path else [] for path in (config.data_path, config.eval_path, config.test_path)
    )
    name_apart([*trained, *evaluated, *tested])

    def open_set(sources: list[Source]) -> tuple[Records, Lengths]:
        """The good rows of a set and their lengths; its bad ones are accounted for."""
        records = read_sources(sources, **rules)
        lengths = measure_rows(records, config, family)
        refuse_rows(rows, records, lengths, config, family)
        rows.files += [part.describe() for part in records.parts]
        return records, lengths

    rows.train, rows.lengths = open_set(trained)
    for entry, sources in groupby(evaluated, lambda source: source.entry):
        records, lengths = open_set(list(sources))
        rows.eval_sets[unique_name(Path(entry).stem, rows.eval_sets)] = records, weigh(records, lengths.kept, config.seed)
    if tested:
        records, lengths = open_set(tested)
        rows.test_set = records, weigh(records, lengths.kept, config.seed)
    if config.eval_split:
        hold_out(rows, config.eval_split, config.seed, family)
    rows.lengths.kept = weigh(rows.train, rows.lengths.kept, config.seed)
    if not rows.lengths.kept:
        raise UserError(f"--data_path {config.data_path}: the weights leave no row; give larger ones")
    return rows


def reading(settings: dict[str, Any], family: Any, takes: Collection[str] = KINDS) -> dict[str, Any]:
    """How a run's settings (the fields of training/config.py's Config, by name) have rows read for a family: arguments of
    read_sources and open_records."""
    template = make_template(*map(settings.get, ("prompt_template", "response_template", "image_column")))
    places = {name: settings.get(name) for name in ("image_root", "allow_outside_images")}
    return places | {"takes": takes, "template": template, "boxes": boxes_of(family)}


def weigh(records: Records, kept: list[int], seed: int) -> list[int]:
    """The kept rows, repeated by the weight of their source; the weight's fraction is a share of them drawn by the seed."""
    if all(part.source.weight == 1 for part in records.parts):
        return kept
    weighed = []
    for number, (part, places) in enumerate(zip(records.parts, records.numbers, strict=True)):
        rows = kept[bisect_left(kept, places.start) : bisect_left(kept, places.stop)]
        whole, rest = divmod(part.source.weight, 1)
        drawn = epoch_order(len(rows), hash_seed(seed, number), epoch=-2)[: round(rest * len(rows))]
        weighed += rows * int(whole) + [rows[place] for place in sorted(drawn)]
    return weighed


def counter(family: Any) -> Callable[[Record], list[tuple[int, int]]]:
    """(text, picture) positions of each of a record's conversations, as this family counts them."""
    return lambda record: [family.count(turns, record.tools, record.image_sizes) for turns in record.conversations]


def measure_rows(records: Records, config: Any, family: Any) -> Lengths:
    """Lengths of a file's rows under this run's limits."""
    return measure(records, counter(family), family.picture_positions, config.length_limit, config.max_text_length)


def refuse_rows(rows: Rows, records: Records, lengths: Lengths, config: Any, family: Any) -> None:
    """Account for a file's bad rows; with on_bad_row stop, or where none is left, they end the run in one sentence."""
    rows.refuse(records.bad + lengths.unusable + lengths.bad)
    total = len(records) + len(records.bad)
    stop = config.on_bad_row == "stop" or not lengths.kept
    if stop and records.bad:
        records.refuse(f"all are in {rows.bad_path}; ")
    if stop and lengths.unusable:
        first = lengths.unusable[0]
        raise UserError(
            f"{records.name}: {len(lengths.unusable)} of {total} rows cannot be used; the first is {first['where']}: "
            f"{first['problem']}; all are in {rows.bad_path}"
        )
    if stop and lengths.bad:
        raise UserError(f"{records.name}: {remedy(lengths, total, family.pixels_per_position)}; all are in {rows.bad_path}")


def hold_out(rows: Rows, amount: float, seed: int, family: Any) -> None:
    """Move rows from training to an evaluation set: a share below 1, or a number; drawn by the seed alone."""
    kept = rows.lengths.kept
    count = round(amount * len(kept)) if amount < 1 else int(amount)
    if not 0 < count < len(kept):
        raise UserError(f"--eval_split {amount:g} holds out {count} of {len(kept)} rows; at least one must stay on each side")
    held = {kept[i] for i in epoch_order(len(kept), seed, epoch=-1)[:count]}
    rows.eval_sets["held_out"] = rows.train, sorted(held)
    rows.lengths.kept = [index for index in kept if index not in held]
    find_longest(rows.lengths, rows.train, counter(family))


def unique_name(stem: str, taken: dict) -> str:
    """stem, or stem-2, stem-3, .. where it is taken."""
    number, name = 1, stem
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    return name

