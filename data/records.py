"""Rows of a json or jsonl file as conversations, every row checked before the first training step.

A file is indexed once and a row is parsed again when it is asked for, so a jsonl never lies in memory (about 50 bytes
a row do); a json array lies there as text. The check reads structure and picture headers, decodes no picture, costs
about 20 us a text row, and turns whatever is wrong with a row into one sentence with file:line and the row's id.
"""

import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.dialects import read_row
from data.errors import UserError
from data.images import OutsideRoot, find_image
from data.template import Template
from data.turns import MAX_ROW_BYTES, Problem, decode, parts_of, read_objects, short

ID_KEYS = ("id", "uid", "prompt_id")

# ---- Files: where each row begins ----------------------------------------------------------------------------------

def _split_lines(path: Path) -> Iterator[tuple[int, int, int, bytes]]:
    """(physical line number, byte offset, size, line) of every line that is not blank; MAX_ROW_BYTES + 1 at most."""
    with open(path, "rb") as file:
        number = offset = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number, start, rest = number + 1, offset, line
            offset += len(line)
            while not rest.endswith(b"\n") and (rest := file.readline(2**20)):  # the tail of a line that is too long
                offset += len(rest)
            if line.strip():
                yield number, start, len(line), line


def _split_array(text: str, name: str) -> Iterator[tuple[int, int, int, bytes]]:
    """(element number from 1, character offset, size, element) of a json array held as text."""
    skip_blank, scan = re.compile(r"[ \t\r\n]*").match, json.JSONDecoder().raw_decode
    position, number, problem = skip_blank(text, text.index("[") + 1).end(), 0, None
    while text[position : position + 1] not in ("]", ""):
        number += 1
        try:
            end = scan(text, position)[1]
        except (ValueError, RecursionError) as error:
            problem, position = str(error).split(": line")[0], getattr(error, "pos", position)
            break
        yield number, position, end - position, text[position:end].encode("utf-8", "surrogateescape")
        position = skip_blank(text, end).end()
        if text[position : position + 1] == ",":
            position = skip_blank(text, position + 1).end()
        elif text[position : position + 1] not in ("]", ""):
            problem = "a comma is missing"
            break
    if problem is None and text[position : position + 1] != "]":
        problem = "the array is cut short"
    elif problem is None and text[position + 1 :].strip():
        problem = "more follows the end of the array"
    if problem:
        line = text.count("\n", 0, position) + 1
        raise UserError(f"{name}:{number} is not valid JSON ({problem}; line {line} of the file); correct it, or save "
                        "one row a line as .jsonl, where one bad row does not hide the rest")


# ---- Records: all rows of a file -----------------------------------------------------------------------------------

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

    @property
    def kind(self) -> str:
        """"preference", "problem" or "conversation": what a stage says that it takes."""
        if self.rejected is not None:
            return "preference"
        return "conversation" if self.truth is None or self.messages[-1]["role"] == "assistant" else "problem"

    @property
    def conversations(self) -> list[list[dict]]:
        """What runs through the network for this row: its messages, and those of the rejected answer if it has one."""
        return [self.messages] if self.rejected is None else [self.messages, self.rejected]

    def num_text_bytes(self) -> int:
        """UTF-8 bytes of texts, calls and tools: what the text tokens can be estimated from without tokenizing."""
        turns = sum(self.conversations, [])
        texts = [part.get("text", "") for turn in turns for part in parts_of(turn["content"])]
        calls = [turn["tool_calls"] for turn in turns if "tool_calls" in turn]
        texts += [json.dumps([calls, self.tools], ensure_ascii=False)] if calls or self.tools else []
        return sum(len(text.encode()) for text in texts)


KINDS = {
    "conversation": "a conversation (it ends with an answer to learn)",
    "preference": "a preference (a chosen and a rejected answer)",
    "problem": "a problem (a prompt, and what its answer is checked against)",
}


class BadRows(UserError):
    """Rows were refused and the run ends; `.records.bad` lists them."""

    def __init__(self, message: str, records: "Records"):
        super().__init__(message)
        self.records = records


class Records:
    """The good rows of a file: len(), [i] -> Record, read anew each time (so it may be sent to worker processes).

    bad: the refused rows, [{"where", "id", "problem"}]. notes: what was changed or is worth saying, counted. dialects:
    good rows by dialect. text_bytes[i], image_sizes[i]: what row i weighs, without reading it again.
    """

    def __init__(self, path: Path, image_root: Path, allow_outside_images: bool, takes: Collection[str] = KINDS,
                 template: Template | None = None):
        self.path = path
        self.takes, self.template = takes, template
        self.bad: list[dict] = []
        self.notes, self.dialects = Counter(), Counter()
        self.text_bytes = array("Q")
        self.image_sizes: list[tuple[tuple[int, int], ...]] = []
        self._numbers, self._starts, self._sizes = array("Q"), array("Q"), array("Q")
        self._text: str | None = None  # of a json array; a jsonl stays on disk
        self._roots = os.path.realpath(image_root), os.path.realpath(path.parent), allow_outside_images
        self._kinds: dict[str, list[int]] = {}  # kind of problem -> indices in bad
        self._folders: list[str] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        start, size = self._starts[index], self._sizes[index]
        if self._text is not None:
            raw = self._text[start : start + size].encode("utf-8", "surrogateescape")
        else:
            with open(self.path, "rb") as file:
                file.seek(start)
                raw = file.read(size)
        where = f"{self.path.name}:{self._numbers[index]}"
        try:
            return self._read(raw, where, Counter())
        except Problem as problem:
            raise UserError(f"{where} was good when the run began and is not now: {problem}") from None

    def _read(self, raw: bytes, where: str, notes: Counter) -> Record:
        row = decode(raw)
        if not isinstance(row, dict):
            raise Problem("a row is not an object", short(row))
        ids = (row[key] for key in ID_KEYS if isinstance(row.get(key), str | int) and row[key] != "")
        row_id = str(next(ids, where))
        try:
            found = read_row(row, notes, self.template, lambda path: self._find({"image": path}))
            tools = read_objects(row.get("tools"), "tools") or None
            pictures = [part for turn in found.messages for part in parts_of(turn["content"]) if part["type"] == "image"]
            sizes = [self._find(part) for part in pictures]
            record = Record(row_id, where, found.messages, tools, found.dialect, sizes, found.rejected, found.truth)
            self._check_kind(record.kind, notes)
            if "preference" not in self.takes:
                record.rejected = None
            return record
        except Problem as problem:
            problem.row_id = row_id
            raise

    def _check_kind(self, kind: str, notes: Counter) -> None:
        """Problem for a kind of row that is not taken; where conversations are, a preference is its chosen side."""
        if kind in self.takes:
            return
        if kind != "preference" or "conversation" not in self.takes:
            wanted = " or ".join(KINDS[name] for name in self.takes)
            raise Problem(f"the row is {KINDS[kind]}", f"the stage takes {wanted}")
        notes["preference read as its chosen answer alone"] += 1

    def _find(self, part: dict) -> tuple[int, int]:
        """Make the path of an image part absolute; (width, height) of its picture."""
        if not isinstance(part["image"], str) or not part["image"]:
            raise Problem("a picture is not named by a path", short(part["image"]))
        try:
            part["image"], size = find_image(part["image"], *self._roots)
        except OutsideRoot as error:
            raise Problem("a picture lies outside the image root", str(error), error.folder) from None
        except UserError as error:
            raise Problem("a picture is missing or unreadable", str(error)) from None
        return size

    def _check(self, number: int, start: int, size: int, raw: bytes) -> None:
        """Take a row in, or write down why not."""
        where, notes = f"{self.path.name}:{number}", Counter()
        try:
            record = self._read(raw, where, notes)
        except Problem as problem:
            self._kinds.setdefault(problem.kind, []).append(len(self.bad))
            self._folders += [problem.folder] if problem.folder else []
            self.bad.append({"where": where, "id": problem.row_id or where, "problem": str(problem)})
            return
        self._numbers.append(number)
        self._starts.append(start)
        self._sizes.append(size)
        self.text_bytes.append(record.num_text_bytes())
        self.image_sizes.append(tuple(record.image_sizes) * len(record.conversations))
        self.dialects[record.dialect] += 1
        self.notes.update(notes)

    def refusal(self) -> str:
        """`24 of 200 rows: ...`: the first three problems; past 5 % the kinds of problem, and what would help."""
        num_rows = len(self) + len(self.bad)
        sentences = [f"{row['where']} {row['problem']}" for row in self.bad]
        if len(self.bad) <= max(3, num_rows * 0.05):
            listed = sentences[:3] + [f"and {len(self.bad) - 3} more"] * (len(self.bad) > 3)
        else:
            kinds = sorted(self._kinds.items(), key=lambda item: -len(item[1]))
            listed = [f"{len(indices)} x {kind} (first {sentences[indices[0]]})" for kind, indices in kinds]
            if self._folders:
                listed.append(f"--image_root {os.path.commonpath(self._folders)} would admit {len(self._folders)} rows")
        return f"{len(self.bad)} of {num_rows} rows" + ": " * bool(listed) + "; ".join(listed)

    def write_bad_rows(self, path: str | os.PathLike) -> None:
        """One line a refused row: {"where", "id", "problem"}."""
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.bad)


def open_records(
    path: str | os.PathLike, image_root: str | os.PathLike | None = None,
    allow_outside_images: bool = False, on_bad_row: str = "stop", takes: Collection[str] = KINDS,
    template: Template | None = None,
) -> Records:
    """Index a .json array or a .jsonl file and check every row; pictures lie below image_root (the file's own folder).

    takes: the kinds of row that are good, as a stage names them. template: the run's words for the rows of a table.

    UserError for a file that cannot be read or holds no row; BadRows if a row is bad and on_bad_row is "stop". With
    "skip" the good rows come back, even if there are none.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        raise UserError(f"{path} is not a .json or .jsonl file; give one with a row a line, or with an array of rows")
    if image_root is not None and not os.path.isdir(image_root):
        raise UserError(f"--image_root {image_root} is not a folder")
    records = Records(path, Path(path.parent if image_root is None else image_root), allow_outside_images, takes,
                      template)
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16; save it as UTF-8")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        records._text = path.read_bytes().decode("utf-8", "surrogateescape")
    for row in _split_lines(path) if records._text is None else _split_array(records._text, path.name):
        records._check(*row)
    if not len(records) and not records.bad:
        raise UserError(f"{path} holds no rows")
    if records.bad and on_bad_row == "stop":
        raise BadRows(f"{path} has rows that cannot be trained on, {records.refusal()}; correct them, or pass "
                      "--on_bad_row skip to train without them", records)
    return records
