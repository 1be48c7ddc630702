"""`python -m data check`: every row and every picture looked at as training will, before a run is paid for.

Reading a row refuses what its structure shows (data/records.py). Here the rest is rendered, tokenized and counted by the
model's own family, and every picture is decoded, in worker processes; so the rows that come out good are those that a run
with --on_bad_row skip trains on, but for boxes outside their picture, which no run refuses. Nothing is written but
bad_rows.jsonl and summary.json. Costs about 0.5 ms of one core a row of 600 characters, and a decoded picture is not
decoded again for the next rows that name it.
"""

import hashlib
import json
import math
import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.boxes import CUT, Box, place_boxes
from data.errors import UserError
from data.images import DATA_URL, open_image, split_part
from data.lengths import refuse
from data.records import Record, Records
from data.turns import Problem, short
from data.workers import limit_memory, read_ahead

AT_ONCE = 64  # rows that a worker looks at before it answers
COUNTED = ("text", "pictures", "supervised")
TOO_LONG, UNREADABLE, OUTSIDE = "too long", "a picture is missing or unreadable", "a box lies outside its picture"
UNREAD, TOO_MUCH = "cannot be read again", "it takes more memory than a worker may have"
NUM_LONGEST = 5  # rows told by name
Size = tuple[int, int]  # (width, height)


@dataclass
class Finding:
    """One row that could be read, and what is wrong with it after all, as (kind, sentence).

    counts: its positions by COUNTED, both sides of a preference together; None where it cannot be rendered. longest: those
    of its longest conversation. digest: of what it says. pixels: at how many a picture a row that is too long would fit.
    """

    id: str = ""
    counts: tuple[int, int, int] | None = None
    longest: int = 0
    digest: bytes = b""
    pixels: int | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)


class Inspector:
    """[i] -> the Finding of row i, in whichever process; limit and text_limit are --max_length and --max_text_length."""

    def __init__(self, records: Records, family: Any, limit: int | None, text_limit: int | None):
        self.records, self.family, self.limit, self.text_limit = records, family, limit, text_limit

    def __getitem__(self, index: int) -> Finding:
        found = Finding()
        try:
            record = self.records[index]
        except (UserError, MemoryError) as error:
            found.problems.append((UNREAD, str(error) or f"{UNREAD}: {TOO_MUCH}"))
            return found
        found.id = record.id
        for kind, look in (("the model cannot take it", self.count), (UNREADABLE, self.decode), (OUTSIDE, self.check_boxes)):
            try:
                look(record, found)
            except Problem as problem:
                found.problems.append((problem.kind, str(problem)))
            except UserError as error:
                found.problems.append((kind, f"{kind}: {error}"))
            except MemoryError:
                found.problems.append((kind, f"{kind}: {TOO_MUCH}"))
        return found

    def count(self, record: Record, found: Finding) -> None:
        """Positions and digest. Problem for a row that is too long or has no loss; UserError for one not rendered."""
        sides = [self.family.outline(turns, record.tools, record.image_sizes) for turns in record.conversations]
        said = [record.conversations, record.tools, record.truth]
        found.digest = hashlib.blake2b(json.dumps(said, default=digest_of).encode(), digest_size=16).digest()
        found.counts = tuple(map(sum, zip(*sides, strict=True)))
        num_text, num_pictures, _ = max(sides, key=lambda side: side[0] + side[1])
        found.longest = num_text + num_pictures
        if record.kind != "problem" and not all(num_supervised for _, _, num_supervised in sides):
            raise Problem("no token has a loss", 'every answer is empty or has "train": false')
        if too_long := refuse(num_text, num_pictures, self.limit, self.text_limit):
            raise Problem(TOO_LONG, too_long + self.fit(record.image_sizes, num_text, found))

    def fit(self, sizes: list[Size], num_text: int, found: Finding) -> str:
        """What size of pictures would make a row fit, if any does."""
        if not sizes or self.limit is None:
            return ""
        found.pixels = fitting_pixels(sizes, self.family.picture_positions, self.limit - num_text)
        if found.pixels is None:
            return "; no size of its pictures would fit"
        width, height = shrink(max(sizes, key=math.prod), found.pixels)
        return f"; pictures of at most {found.pixels} pixels ({width} x {height}) would fit"

    def decode(self, record: Record, found: Finding) -> None:
        """UserError for the first picture that does not decode."""
        for part in record.pictures():
            file, _ = split_part(part["image"])
            in_the_row = isinstance(file, bytes) or DATA_URL.match(file)
            if problem := damage_of(file) if in_the_row else damage_of_file(file):
                raise UserError(problem)

    def check_boxes(self, record: Record, found: Finding) -> None:
        """Problem for the first box that lies in none of the row's pictures, whatever its numbers count."""
        if record.notes[CUT]:
            raise Problem(OUTSIDE, f"it reaches over the edge in {self.family.options.box_format}, as --box_format says; a run "
                          "trains on it cut there")
        if found.counts is None:  # the model cannot take its pictures
            return
        sizes = [self.family.seen_size(*size) for size in record.image_sizes] + record.image_sizes
        for _, role, box in place_boxes(sum(record.conversations, [])) if sizes else []:
            if is_outside(box, sizes):
                raise Problem(OUTSIDE, f"the {role}'s {short(box)} fits neither "
                              f"{' nor '.join(f'{w} x {h}' for w, h in dict.fromkeys(sizes))} pixels nor thousandths")


def digest_of(value: object) -> str:
    """The bytes of a picture inside a row, for json."""
    return hashlib.blake2b(value).hexdigest()


def damage_of(file: str | bytes) -> str | None:
    """Why a picture does not decode; None if it does."""
    try:
        open_image(file).close()
    except UserError as error:
        return str(error)
    return None


damage_of_file = lru_cache(maxsize=65536)(damage_of)


def is_outside(box: Box, sizes: list[Size]) -> bool:
    """Whether a number of the box is negative, or beyond both 1000 and every picture's pixels."""
    right, bottom = (max(1000, *(size[side] for size in sizes)) for side in (0, 1))
    return min(box) < 0 or box[2] > right or box[3] > bottom


def shrink(size: Size, pixels: int) -> Size:
    """A picture's size at no more than so many pixels, its shape kept."""
    scale = min(1.0, math.sqrt(pixels / math.prod(size)))
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def fitting_pixels(sizes: list[Size], positions: Callable[[int, int], int], room: int) -> int | None:
    """The most pixels a picture may have, within 1 %, for all to take at most `room` positions; None where none fits."""

    def fits(pixels: int) -> bool:
        try:
            return sum(positions(*shrink(size, pixels)) for size in sizes) <= room
        except UserError:
            return False

    low, high = 28 * 28, max(map(math.prod, sizes))
    if not fits(low):
        return None
    while high - low > low // 100 + 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ---- all rows -------------------------------------------------------------------------------------------------------


class Survey:
    """What all rows have come to; data/check_page.py shows it.

    bad: the lines of bad_rows.jsonl. kinds: rows by kind of problem. counts: those of every row that could be counted, by
    COUNTED. longest: (positions, where, id, of text, of pictures). too_long: (positions, pixels at which it would fit).
    again: "repeated" and "same id" rows, as pairs of where and where it was before.
    """

    def __init__(self, records: Records, limit: int | None):
        self.records, self.limit = records, limit
        self.began = time.perf_counter()
        self.kinds = Counter(kind for part in records.parts for kind in part.kinds)
        self.bad = [  # until finish() with the place that it sorts by
            (number, place[0], line) for number, part in enumerate(records.parts)
            for place, line in zip(part.bad_places, part.bad, strict=True)
        ]
        self.counts = {name: array("Q") for name in COUNTED}
        self.longest: list[tuple[int, str, str, int, int]] = []
        self.too_long: list[tuple[int, int | None]] = []
        self.firsts: dict[str, dict] = {"repeated": {}, "same id": {}}
        self.again: dict[str, list[tuple[str, str]]] = {"repeated": [], "same id": []}

    def add(self, index: int, found: Finding) -> None:
        """Take in good row `index` of the records."""
        part, number = self.records.place(index)
        where = f"{self.records.parts[part].source.name}:{number}"
        kinds = {kind for kind, _ in found.problems}
        if kinds:
            sentence = "; ".join(sentence for _, sentence in found.problems)
            self.kinds.update(kinds)
            self.bad.append((part, number, {"where": where, "id": found.id or where, "problem": sentence}))
        if TOO_LONG in kinds:
            self.too_long.append((found.longest, found.pixels))
        if found.counts is None:
            return
        for name, count in zip(COUNTED, found.counts, strict=True):
            self.counts[name].append(count)
        num_text, num_pictures, _ = found.counts
        heappush(self.longest, (num_text + num_pictures, where, found.id, num_text, num_pictures))
        if len(self.longest) > NUM_LONGEST:
            heappop(self.longest)
        for name, key in (("repeated", found.digest), ("same id", found.id)):
            before = self.firsts[name].setdefault(key, where)
            if before != where:
                self.again[name].append((where, before))

    def finish(self) -> None:
        """Put the problems and the longest rows in order."""
        self.bad = [line for _, _, line in sorted(self.bad, key=lambda entry: entry[:2])]
        self.longest.sort(reverse=True)
        self.seconds = time.perf_counter() - self.began

    @property
    def num_rows(self) -> int:
        return len(self.records) + len(self.records.bad)

    def to_json(self) -> dict:
        """summary.json; a histogram is [[from, to, rows], ..]."""
        keys = ("positions", "where", "id", "text", "pictures")
        return {
            "rows": self.num_rows, "bad_rows": len(self.bad), "seconds": round(self.seconds, 2), "problems": dict(self.kinds),
            "dialects": dict(self.records.dialects), "notes": dict(self.records.notes), "max_length": self.limit,
            "tokens": {
                name: figures_of(counts) | {"histogram": [[*bounds(k), n] for k, n in sorted(histogram(counts).items())]}
                for name, counts in self.counts.items()
            },
            "longest": [dict(zip(keys, row, strict=True)) for row in self.longest],
            "repeated": self.again["repeated"], "same_id": self.again["same id"],
        }  # fmt: skip


def histogram(counts: array) -> Counter[int]:
    """How many lie in each bin: 0 is none, k holds the numbers of k binary digits, and 3 all below them too."""
    return Counter(max(count.bit_length(), 3) if count else 0 for count in counts)


def bounds(k: int) -> Size:
    """The smallest and the largest number of a bin."""
    return (0, 0) if k == 0 else (1 if k == 3 else 2 ** (k - 1), 2**k - 1)


def figures_of(counts: array) -> dict[str, int]:
    """What the middle row, the one above 95 % of them and the largest have, and all together."""
    ordered = sorted(counts) or [0]
    return {
        "median": ordered[len(ordered) // 2], "95 %": ordered[len(ordered) * 95 // 100], "most": ordered[-1],
        "sum": sum(ordered),
    }


def check(
    records: Records, family: Any, folder: Path, limit: int | None = None, text_limit: int | None = None, num_workers: int = 2
) -> Survey:
    """Look at every row; bad_rows.jsonl (if any is bad) and summary.json in `folder` are written anew."""
    folder.mkdir(parents=True, exist_ok=True)
    survey = Survey(records, limit)
    inspector = Inspector(records, family, limit, text_limit)
    groups = [list(range(len(records))[start : start + AT_ONCE]) for start in range(0, len(records), AT_ONCE)]
    with tqdm(total=len(records), desc="check", unit=" rows", leave=False, disable=None) as progress:
        for group, findings in zip(groups, read_ahead(inspector, groups, num_workers, limit_memory), strict=True):
            for index, found in zip(group, findings, strict=True):
                survey.add(index, found)
            progress.update(len(group))
    survey.finish()
    bad_path = folder / "bad_rows.jsonl"
    bad_path.unlink(missing_ok=True)
    if survey.bad:
        bad_path.write_text("".join(json.dumps(line) + "\n" for line in survey.bad), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(survey.to_json(), indent=2) + "\n", encoding="utf-8")
    return survey
