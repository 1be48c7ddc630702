"""Files of rows, each kind read row by row from where it lies: json, jsonl and csv; tables are data/tables.py.

A source gives its rows one after the other with the place of each, and reads any row again from its place, so that no
source lies in memory. A row of json, jsonl or csv is a piece of the file by byte offset, and may hold other types than its
neighbours. Which keys a row has is not looked at here, and which files --data_path names is data/paths.py's.
"""

import csv
import hashlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from data.errors import UserError
from data.json_array import split_array
from data.turns import MAX_ROW_BYTES, Problem, are_turns, decode

TEXT_COLUMNS = {"prompt", "query", "completion", "text", "instruction", "input", "context", "output", "response", "chosen",
                "rejected", "ground_truth"}  # of a csv: text even where it looks like a JSON list or object, but for turns
RawRow = tuple[int, int, int, object]  # number of a row, byte offset and size (0, 0 in a table), and what lies there


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes, in one pass with little memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


class Source:
    """A file of rows. name: what `where` begins with; folder: where relative picture paths start; entry: the part of
    --data_path that named it, and weight: how often an epoch sees each row."""

    entry, weight = "", 1.0

    def __init__(self, path: Path):
        self.path, self.folder, self.name = path, path.parent, path.name

    def pieces(self) -> Iterator[RawRow]:
        """Every row, in order. UserError for a file that does not come apart into rows."""
        raise NotImplementedError

    def read(self, number: int, start: int, size: int) -> object:
        """The raw row at one place of the file."""
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(min(size, MAX_ROW_BYTES + 1))

    def parse(self, raw: object) -> object:
        """A raw row, of pieces() or read(), as a Python object. Raises Problem."""
        return decode(raw, is_row=True)

    def stamp(self) -> list:
        """Changes when the rows change: path, size and time of the file."""
        found = self.path.stat()
        return [os.path.realpath(self.path), found.st_size, found.st_mtime_ns]

    def sha256(self) -> str:
        """Hash of all that the rows are read from."""
        return sha256_of(self.path)


class Lines(Source):
    """One JSON row a line; the number is that of the line in the file, blank lines counted."""

    def pieces(self) -> Iterator[RawRow]:
        with open(self.path, "rb") as file:
            number = offset = 0
            while line := file.readline(MAX_ROW_BYTES + 1):
                number, start, rest = number + 1, offset, line
                offset += len(line)
                while not rest.endswith(b"\n") and (rest := file.readline(2**20)):  # the tail of a line that is too long
                    offset += len(rest)
                if line.strip() or len(line) > MAX_ROW_BYTES:
                    yield number, start, len(line), line


class Array(Source):
    """The elements of one JSON array; the number is that of the element, from 1."""

    def __init__(self, path: Path, begin: int):
        super().__init__(path)
        self.begin = begin

    def pieces(self) -> Iterator[RawRow]:
        return split_array(self.path, self.begin)


class Document(Source):
    """A file that is one JSON object: one row, or a recorded run of which every step is one (number: the step)."""

    def pieces(self) -> Iterator[RawRow]:
        with open(self.path, "rb") as file:
            raw = file.read(MAX_ROW_BYTES + 1)
        for number, row in enumerate(self.expand(raw), 1):
            yield number, 0, len(raw), row

    def read(self, number: int, start: int, size: int) -> object:
        steps = self.expand(super().read(number, start, size))
        return steps[number - 1] if number <= len(steps) else None

    def parse(self, raw: object) -> object:
        if isinstance(raw, Problem):
            raise raw
        return raw

    @staticmethod
    def expand(raw: bytes) -> list:
        """The rows that the first dialect with an expand() for it makes of the document, else it alone, or its Problem."""
        found = [getattr(module, "expand", None) for name, module in sys.modules.items() if name.startswith("data.dialect_")]
        try:
            document = decode(raw, is_row=True)
            return next(filter(None, (expand(document) for expand in found if expand)), [document])
        except Problem as problem:
            return [problem]


class Sheet(Source):
    """A csv file with names in its first row, which shows what separates cells: most often commas, semicolons or tabs. The
    number is that of the line a row begins on. A cell is text, or the JSON list or object in it (in TEXT_COLUMNS that has to
    be turns); an empty one is left out.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        csv.field_size_limit(MAX_ROW_BYTES)
        with open(path, "rb") as file:
            names = re.sub(rb'"[^"]*"', b"", file.readline(MAX_ROW_BYTES))
        self.separator = max(",;\t", key=lambda mark: names.count(mark.encode()))
        try:
            self.columns = next((self._cells(raw) for _, _, _, raw in self._split()), [])
        except Problem as problem:
            raise UserError(f"{path}: its first row, the names of the columns, is {problem}; correct it") from None
        if twice := [name for name in self.columns if name and self.columns.count(name) > 1]:
            raise UserError(f"{path} has two columns called {twice[0]!r}; rename or remove one")

    def pieces(self) -> Iterator[RawRow]:
        rows = self._split()
        next(rows, None)
        return rows

    def _split(self) -> Iterator[RawRow]:
        """Rows are cut by the csv reader itself, for a quoted cell may hold line ends. UserError where such a cell goes wrong:
        its quote may have taken the rows behind it in."""
        taken: list[bytes] = []  # the lines that the reader asked for until it had a row
        with open(self.path, "rb") as file:
            lines = (taken.append(line) or line.decode("utf-8-sig", "surrogateescape") for line in file)
            reader, number, offset, cells = csv.reader(lines, delimiter=self.separator, strict=True), 1, 0, []
            while cells is not None:
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    if len(taken) > 1:
                        raise UserError(
                            f"{self.name}:{number} is not valid CSV ({_fault(error)}): a quoted cell goes on over {len(taken)} "
                            "lines, which may be rows of their own; close its quotes, or remove them"
                        ) from None
                    cells = ["?"]  # parse() meets it again
                raw = b"".join(taken)
                if cells and raw.strip():
                    yield number, offset, len(raw), raw
                number, offset = number + len(taken), offset + len(raw)
                taken.clear()

    def parse(self, raw: object) -> object:
        cells = self._cells(raw)
        if len(cells) != len(self.columns):
            found = f"{len(cells)}, not {len(self.columns)}, cut at {self.separator!r}"
            raise Problem("the row has another number of cells than the first", found)
        return {name: _cell(name, text) for name, text in zip(self.columns, cells, strict=True) if text}

    def _cells(self, raw: bytes) -> list[str]:
        try:
            lines = io.StringIO(raw.decode("utf-8-sig"), newline="\n")  # a line ends as in _split(), not at a carriage return
            return next(csv.reader(lines, delimiter=self.separator, strict=True), [])
        except UnicodeError as error:
            raise Problem("not valid UTF-8", f"{error.reason}; save the file as UTF-8") from None
        except csv.Error as error:
            raise Problem("not valid CSV", _fault(error)) from None


def _fault(error: csv.Error) -> str:
    """What the csv reader met, without its advice to programmers."""
    is_bare = "new-line character" in str(error)
    return "a carriage return without a line feed; save the file with line feeds, or quote the cell" if is_bare else str(error)


def _cell(name: str, text: str) -> object:
    if text[0] not in "[{":
        return text
    try:
        value = decode(text)
    except Problem:
        return text
    return value if name not in TEXT_COLUMNS or are_turns(value) else text
