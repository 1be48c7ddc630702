"""Rows of one or more sources as conversations, every row checked before the first training step.

A source is gone through once, and a row is parsed again when it is asked for, so that no source lies in memory (about
70 bytes a row do). The check reads structure and picture headers, decodes no picture, costs about 30 us a text row, and
turns whatever is wrong with a row into one sentence with file:line and the row's id.
"""

import json
import os
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import reduce
from itertools import accumulate
from operator import iadd

from data import index
from data.boxes import KEEP, BoxRule
from data.dialects import read_row
from data.errors import UserError
from data.images import DATA_URL, OutsideRoot, find_image, image_size, split_part
from data.paths import open_sources
from data.sources import Source
from data.template import Template
from data.turns import ROLES, Problem, parts_of, short

SPEAKERS = tuple(dict.fromkeys(ROLES.values()))
ID_KEYS = ("id", "uid", "prompt_id")
KINDS = {
    "conversation": "a conversation (for SFT: it ends with an answer to learn)",
    "preference": "a preference (for DPO: a chosen and a rejected answer)",
    "problem": "a problem (for RLOO: a prompt, and what its answer is checked against)",
}


@dataclass
class Record:
    """One row. messages: [{"role", "content": str | [text and image parts], "tool_calls"?, "train"?}].

    A preference: messages end with the chosen answer, and rejected is the same conversation with the rejected one. A
    problem: messages end with the user's turn, and truth is what a reward checks an answer against.
    """

    id: str
    where: str  # "rows.jsonl:17"
    messages: list[dict]
    tools: list[dict] | None
    dialect: str
    image_sizes: list[tuple[int, int]]  # (width, height) of each picture, in order
    rejected: list[dict] | None = None
    truth: dict | None = None
    notes: Counter[str] = field(default_factory=Counter)  # what was changed or is worth saying about it

    @property
    def kind(self) -> str:
        """"preference", "problem" or "conversation": what a stage says that it takes."""
        if self.rejected is not None:
            return "preference"
        return "conversation" if self.truth is None or self.messages[-1]["role"] == "assistant" else "problem"

    @property
    def conversations(self) -> list[list[dict]]:
        """What runs through the network for this row: its messages, and those of the rejected answer if it has one; an
        answer that a problem lacks as yet is empty."""
        if self.kind == "problem":
            return [[*self.messages, {"role": "assistant", "content": ""}]]
        return [self.messages] if self.rejected is None else [self.messages, self.rejected]

    def num_text_bytes(self) -> int:
        """UTF-8 bytes of texts, calls and tools: what the text tokens can be estimated from without tokenizing."""
        turns = sum(self.conversations, [])
        texts = [part.get("text", "") for turn in turns for part in parts_of(turn["content"])]
        calls = [turn["tool_calls"] for turn in turns if "tool_calls" in turn]
        texts += [json.dumps([calls, self.tools], ensure_ascii=False)] if calls or self.tools else []
        return sum(len(text.encode()) for text in texts)

    def shape(self) -> int:
        """Who speaks, and whether there are calls, tools and pictures, a bit each: a model's chat format has them or not."""
        turns = sum(self.conversations, [])
        roles = {turn["role"] for turn in turns}
        has_calls = any("tool_calls" in turn for turn in turns)
        facts = [*(role in roles for role in SPEAKERS), has_calls, bool(self.tools), bool(self.image_sizes)]
        return sum(fact << place for place, fact in enumerate(facts))

    def pictures(self) -> list[dict]:
        """The image parts, in order; "image" is an absolute path, or the bytes of a picture that the row itself holds."""
        return [part for turn in self.messages for part in parts_of(turn["content"]) if part["type"] == "image"]


class Part:
    """The good rows of one source, as places to read them at and what they weigh; and the bad ones.

    notes: what was changed or is worth saying, counted. dialects: good rows by dialect. bad: the refused rows, as they
    stand in bad_rows.jsonl; kinds[i]: the kind of problem of bad[i]; folders: image roots that would admit some of them.
    pictures: the files that good rows name.
    """

    def __init__(
        self, source: Source, image_root: str | os.PathLike | None, allow_outside_images: bool, takes: Collection[str],
        template: Template | None, boxes: BoxRule,
    ):
        self.source, self.takes, self.template, self.boxes = source, takes, template, boxes
        root = source.folder if image_root is None else image_root
        self.roots = os.path.realpath(root), os.path.realpath(source.folder), allow_outside_images
        self.clear()

    def clear(self) -> None:
        """No row."""
        self.numbers, self.starts, self.sizes, self.sums, self.text_bytes, self.shapes = (array("Q") for _ in range(6))
        self.image_sizes: list[tuple[tuple[int, int], ...]] = []
        self.notes, self.dialects = Counter(), Counter()
        self.bad: list[dict] = []
        self.bad_places: list[tuple[int, int, int]] = []
        self.kinds: list[str] = []
        self.folders: list[str] = []
        self.pictures: set[str] = set()
        self.sha256 = ""
        self._seen_sizes: dict[tuple, tuple] = {}  # rows with pictures of the same sizes share one tuple

    def check(self, number: int, start: int, size: int, raw: object) -> None:
        """Take a row in, or write down why not."""
        where = f"{self.source.name}:{number}"
        try:
            record = self.record(raw, where)
        except Problem as problem:
            self.bad.append({"where": where, "id": problem.row_id or where, "problem": str(problem)})
            self.bad_places.append((number, start, size))
            self.kinds.append(problem.kind)
            self.folders += [problem.folder] if problem.folder else []
            return
        self.numbers.append(number)
        self.starts.append(start)
        self.sizes.append(size)
        self.sums.append(sum_of(raw))
        self.text_bytes.append(record.num_text_bytes())
        self.shapes.append(record.shape())
        image_sizes = tuple(record.image_sizes) * len(record.conversations)  # both sides of a pair have them
        self.image_sizes.append(self._seen_sizes.setdefault(image_sizes, image_sizes))
        names = (part["image"] for part in record.pictures() if isinstance(part["image"], str))
        self.pictures.update(split_part(name)[0] for name in names if not DATA_URL.match(name))
        self.dialects[record.dialect] += 1
        self.notes.update(record.notes)

    def read(self, index: int) -> Record:
        """Row `index` of the good ones."""
        number = self.numbers[index]
        where = f"{self.source.name}:{number}"
        try:
            raw = self.source.read(number, self.starts[index], self.sizes[index])
            if sum_of(raw) != self.sums[index]:  # a good row too would be one in the place of another
                raise Problem("its text was changed")
            return self.record(raw, where)
        except (Problem, OSError, UserError) as problem:
            error = UserError(f"{where}: it was good when the run began and is not now: {problem}")
            error.where = error.id = where
            raise error from None

    def describe(self) -> dict:
        """For the journal and the report: the file, its rows, refused ones included, and what it is known by."""
        self.sha256 = self.sha256 or self.source.sha256()
        facts = {"file": str(self.source.path), "rows": len(self.numbers) + len(self.bad)}
        return facts | {"sha256": self.sha256, "weight": self.source.weight}

    def record(self, raw: object, where: str) -> Record:
        """What a source gave for a row as a conversation. Raises Problem."""
        row = self.source.parse(raw)
        if not isinstance(row, dict):
            raise Problem("a row is not an object", short(row))
        ids = (row[key] for key in ID_KEYS if isinstance(row.get(key), str | int) and row[key] != "")
        row_id, notes = str(next(ids, where)), Counter()
        try:
            found = read_row(row, notes, self.template, lambda image: self._find({"image": image}))
            tools = found.tools or None
            record = Record(row_id, where, found.messages, tools, found.dialect, [], found.rejected, found.truth, notes)
            record.image_sizes = [self._find(part) for part in record.pictures()]
            self._rewrite_boxes(record)
            self._check_kind(record)
            if "preference" not in self.takes:
                record.rejected = None
            return record
        except Problem as problem:
            problem.row_id = row_id
            raise

    def _rewrite_boxes(self, record: Record) -> None:
        """What --box_format asks for: boxes in the family's own convention, in every text and truth of the record."""
        try:
            record.messages = self.boxes.rewrite(record.messages, record.image_sizes, record.notes)
            record.truth = self.boxes.rewrite_truth(record.truth, record.image_sizes)
            if record.rejected is not None:
                also = Counter()
                last = self.boxes.rewrite(record.rejected, record.image_sizes, also)[-1]
                record.rejected = [*record.messages[:-1], last]
                record.notes |= also  # the prompt's boxes are in both
        except UserError as error:  # a picture of a shape that the family cannot resize
            raise Problem("the model cannot take it", str(error)) from None

    def _check_kind(self, record: Record) -> None:
        """Problem for a kind of row that is not taken; where conversations are, a preference becomes its chosen side, and
        where problems are, its prompt, with the chosen answer for a reward that compares."""
        if record.kind in self.takes:
            return
        if record.kind == "preference" and "problem" in self.takes:
            answer = record.messages[-1]["content"]
            record.messages, record.rejected = record.messages[:-1], None
            record.truth = {"answer": "".join(part.get("text", "") for part in parts_of(answer))}
            record.notes["preference read as its prompt"] += 1
            return
        if record.kind != "preference" or "conversation" not in self.takes:
            wanted = " or ".join(KINDS[name] for name in self.takes)
            raise Problem(f"the row is {KINDS[record.kind]}", f"the stage takes {wanted}")
        record.rejected = None
        record.notes["preference read as its chosen answer alone"] += 1

    def _find(self, part: dict) -> tuple[int, int]:
        """Make the path of an image part absolute; (width, height) of its picture."""
        image = part["image"]
        if not isinstance(image, str | bytes) or not image:
            raise Problem("a picture is not named by a path", short(image))
        try:
            if isinstance(image, bytes):
                return image_size(image)
            part["image"], size = find_image(image, *self.roots)
        except OutsideRoot as error:
            raise Problem("a picture lies outside the image root", str(error), error.folder) from None
        except UserError as error:
            raise Problem("a picture is missing or unreadable", str(error)) from None
        return size


def sum_of(raw: object) -> int:
    """Tells the bytes of one row from those of another; 0 for a row that is no bytes, of a table or a run."""
    return zlib.crc32(raw) if isinstance(raw, bytes) else 0


class Records:
    """The good rows of some sources: len(), [i] -> Record, read anew each time (so it may be sent to worker processes).

    bad: the refused rows, [{"where", "id", "problem"}]. text_bytes[i], image_sizes[i], shapes[i]: what row i weighs and what
    it asks of a chat format, without reading it again. notes, dialects: counts over all rows. parts: the same by source;
    part k's rows are numbers[k].
    """

    def __init__(self, parts: list[Part]):
        self.parts = parts
        self._ends = list(accumulate(len(part.numbers) for part in parts))
        self.numbers = [range(end - len(part.numbers), end) for end, part in zip(self._ends, parts, strict=True)]
        self.bad = [row for part in parts for row in part.bad]
        self.text_bytes = reduce(iadd, (part.text_bytes for part in parts), array("Q"))
        self.shapes = reduce(iadd, (part.shapes for part in parts), array("Q"))
        self.image_sizes = [sizes for part in parts for sizes in part.image_sizes]
        self.notes = sum((part.notes for part in parts), Counter())
        self.dialects = sum((part.dialects for part in parts), Counter())
        self.name = ",".join(str(part.source.path) for part in parts)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        part = bisect_right(self._ends, index)
        return self.parts[part].read(index - self.numbers[part].start)

    def place(self, index: int) -> tuple[int, int]:
        """(number of its part, its number there) of row `index`."""
        part = bisect_right(self._ends, index)
        return part, self.parts[part].numbers[index - self.numbers[part].start]

    def refuse(self, listed: str = "") -> None:
        """Raise the UserError of the bad rows; `listed` is a clause that says where all of them are written down."""
        hint = "correct them" + ", or pass --on_bad_row skip to go on without them" * bool(len(self))
        raise UserError(f"{self.name}: {self.refusal()}; {listed}{hint}")

    def refusal(self) -> str:
        """`24 of 200 rows: ...`: the first three problems; past 5 % the kinds of problem, and what would help."""
        num_rows = len(self) + len(self.bad)
        sentences = [f"{row['where']} {row['problem']}" for row in self.bad]
        if len(self.bad) <= max(3, num_rows * 0.05):
            listed = sentences[:3] + [f"and {len(self.bad) - 3} more"] * (len(self.bad) > 3)
        else:
            kinds = [kind for part in self.parts for kind in part.kinds]
            counts = Counter(kinds).most_common()
            listed = [f"{count} x {kind} (first {sentences[kinds.index(kind)]})" for kind, count in counts]
            if folders := [folder for part in self.parts for folder in part.folders]:
                listed.append(f"--image_root {os.path.commonpath(folders)} would admit {len(folders)} rows")
        return f"{len(self.bad)} of {num_rows} rows" + ": " * bool(listed) + "; ".join(listed)


def open_records(
    path: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    allow_outside_images: bool = False,
    on_bad_row: str = "stop",
    takes: Collection[str] = KINDS,
    template: Template | None = None,
    boxes: BoxRule = KEEP,
    keep_index: bool = True,
) -> Records:
    """Every row of what `path` names (see data/paths.py), checked; pictures lie below image_root, or, without one,
    below the folder of their file.

    takes: the kinds of row that are good, as a stage names them. template: the run's words for the rows of a table. boxes:
    how the boxes of its text are rewritten. keep_index: whether a file may be left beside the rows for the next run.
    UserError for what cannot be read or holds no row, and for a bad row if on_bad_row is "stop". With "skip" the good
    rows come back, even if there are none.
    """
    records = read_sources(open_sources(path), image_root, allow_outside_images, takes, template, boxes, keep_index)
    if records.bad and on_bad_row == "stop":
        records.refuse()
    return records


def read_sources(
    sources: list[Source],
    image_root: str | os.PathLike | None = None,
    allow_outside_images: bool = False,
    takes: Collection[str] = KINDS,
    template: Template | None = None,
    boxes: BoxRule = KEEP,
    keep_index: bool = True,
) -> Records:
    """Check every row of the sources. UserError for a source that cannot be read or holds no row."""
    if image_root is not None and not os.path.isdir(image_root):
        raise UserError(f"--image_root {image_root} is not a folder")
    parts = [Part(source, image_root, allow_outside_images, takes, template, boxes) for source in sources]
    for part in parts:
        index.fill(part, keep_index)
        if not part.numbers and not part.bad:
            raise UserError(f"{part.source.path} holds no rows")
    return Records(parts)
