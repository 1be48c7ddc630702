"""What --data_path names: files of rows, folders of them, data sets of the hub, several with weights.

    rows.json    runs/    runs/:test    org/name    org/name:test    a.json*2,b.jsonl,c.parquet*0.5

A folder is all files below it, laid out as on the hub; those that their names put into a held-out split are passed over.
Every source gives its rows one after the other with the place of each, and reads any row again from its place, so that
no source lies in memory. A row of json, jsonl or csv is a piece of the file by byte offset, and may hold other types
than its neighbours; parquet and the hub (data/tables.py) come as columns. Which keys a row has is not looked at here.
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
from data.turns import MAX_ROW_BYTES, Problem, decode

FORMATS = (".json", ".jsonl", ".csv", ".parquet")
TEXT_COLUMNS = {"prompt", "query", "completion", "text"}  # of a csv: text even where it looks like a JSON list or object
HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?::([\w.-]+))?")
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "validation": "validation",
          "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation"}  # words of a path
NO_ROWS = {"manifest.json", "plan.json", "bad_rows.jsonl", "bad_images.jsonl", "images.jsonl", "summary.json",
           "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # what downloads and checks leave
WEIGHT = re.compile(r"(.+)\*(\d+\.?\d*|\.\d+)")
Piece = tuple[int, int, int, object]  # number of a row, where it lies (byte offset, size; 0, 0 in a table), what lies there


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in one pass with little memory."""
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

    def pieces(self) -> Iterator[Piece]:
        """Every row, in order. UserError for a file that does not come apart into rows."""
        raise NotImplementedError

    def read(self, number: int, start: int, size: int) -> object:
        """What lies at one place."""
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(min(size, MAX_ROW_BYTES + 1))

    def parse(self, raw: object) -> object:
        """What lies at a place as a row. Raises Problem."""
        return decode(raw)

    def stamp(self) -> list:
        """Changes when the rows change: path, size and time of the file."""
        found = self.path.stat()
        return [os.path.realpath(self.path), found.st_size, found.st_mtime_ns]

    def sha256(self) -> str:
        """Of all that the rows are read from."""
        return sha256_of(self.path)


class Lines(Source):
    """One JSON row a line; the number is that of the line in the file, blank lines counted."""

    def pieces(self) -> Iterator[Piece]:
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

    def pieces(self) -> Iterator[Piece]:
        return split_array(self.path, self.begin)


class Document(Source):
    """A file that is one JSON object: one row, or a recorded run of which every step is one (number: the step)."""

    def pieces(self) -> Iterator[Piece]:
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
        """The rows that the first dialect that knows such a file makes of it, else itself as the one row, or its Problem."""
        found = [getattr(module, "expand", None) for name, module in sys.modules.items() if name.startswith("data.dialect_")]
        try:
            document = decode(raw)
            return next(filter(None, (expand(document) for expand in found if expand)), [document])
        except Problem as problem:
            return [problem]


class Sheet(Source):
    """A csv file with names in its first row, which shows what separates cells: commas, else semicolons, else tabs. The number
    is that of the line a row begins on. A cell is text, or the JSON list or object that it holds; an empty cell is none."""

    def __init__(self, path: Path):
        super().__init__(path)
        csv.field_size_limit(MAX_ROW_BYTES)
        with open(path, "rb") as file:
            names = file.readline(MAX_ROW_BYTES)
        self.separator = "," if b"," in names else next((mark for mark in ";\t" if mark.encode() in names), ",")
        try:
            self.columns = next((self._cells(raw) for _, _, _, raw in self._split()), [])
        except Problem as problem:
            raise UserError(f"{path}: its first row, the names of the columns, is {problem}; correct it") from None
        if twice := [name for name in self.columns if name and self.columns.count(name) > 1]:
            raise UserError(f"{path} has two columns called {twice[0]!r}; rename or remove one")

    def pieces(self) -> Iterator[Piece]:
        rows = self._split()
        next(rows, None)
        return rows

    def _split(self) -> Iterator[Piece]:
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
                            f"{self.name}:{number} is not valid CSV ({error}): a quoted cell goes on over {len(taken)} lines, "
                            "which may be rows of their own; close its quotes, or remove them"
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
            raise Problem("the row has another number of cells than the first", f"{len(cells)}, not {len(self.columns)}")
        return {name: _cell(name, text) for name, text in zip(self.columns, cells, strict=True) if text}

    def _cells(self, raw: bytes) -> list[str]:
        try:
            lines = io.StringIO(raw.decode("utf-8-sig"), newline="")
            return next(csv.reader(lines, delimiter=self.separator, strict=True), [])
        except UnicodeError as error:
            raise Problem("not valid UTF-8", f"{error.reason}; save the file as UTF-8") from None
        except csv.Error as error:
            raise Problem("not valid CSV", str(error)) from None


def _cell(name: str, text: str) -> object:
    if name in TEXT_COLUMNS or text[0] not in "[{":
        return text
    try:
        return decode(text)
    except Problem:
        return text


# ---- The grammar of --data_path ------------------------------------------------------------------------------------


def open_sources(text: str | os.PathLike) -> list[Source]:
    """The sources that a text names, in order. UserError for what is not there, or holds no known format."""
    text = str(text)
    sources = []
    for entry in [text] if os.path.exists(text) else text.split(","):
        weighed = None if os.path.exists(entry) else WEIGHT.fullmatch(entry.strip())
        name, weight = (weighed[1], float(weighed[2])) if weighed else (entry.strip(), 1.0)
        if weight == 0:
            raise UserError(f"{entry}: a weight of 0 leaves no row; leave the source out")
        found = _open_entry(name)
        for source in found:
            source.entry, source.weight = name, weight
        sources += found
    name_apart(sources)
    return sources


def name_apart(sources: list[Source]) -> None:
    """Give files of one name in different folders the path as their name, so that `where` says which."""
    for source in sources:
        if any(source.path.name == other.path.name and source.path != other.path for other in sources):
            source.name = str(source.path)


def _open_entry(name: str) -> list[Source]:
    path = Path(name)
    if name and path.is_dir():
        return list(map(_open_file, find_files(path)))
    if path.name.rpartition(":")[2] in SPLITS and Path(name.rpartition(":")[0]).is_dir():
        return list(map(_open_file, find_files(*name.rpartition(":")[::2])))
    if path.is_file() or path.suffix in FORMATS:
        return [_open_file(path)]
    if hub := HUB.fullmatch(name):
        from data.tables import open_hub

        return [open_hub(hub[1], *([hub[2], hub[3]] if hub[3] else [None, hub[2]]))]
    raise UserError(
        f"there is no file or folder {name}; give a {', '.join(FORMATS)} file, a folder of them, or ORG/NAME "
        "of a data set on the hub"
    )


def find_files(folder: str | os.PathLike, split: str = "") -> list[Path]:
    """The files of rows below a folder: of a split if one is named, else all but those of held-out splits. What is read and
    what is passed over is said. UserError for none, and for files of several held-out splits alone."""
    by_split = group_files(folder)
    kinds = ", ".join(f"{len(paths)} of {name or 'no split'}" for name, paths in sorted(by_split.items()))
    wanted = {SPLITS[split]} if split else by_split.keys() & {"", "train"} or by_split.keys()
    if "" not in wanted and len(wanted) > 1:
        raise UserError(f"the folder {folder} holds files of held-out splits alone, {kinds}; name one, such as {folder}:test")
    paths = sorted(path for name in wanted for path in by_split.get(name, []))
    if not paths:
        there = sorted(path.name for path in Path(folder).rglob("[!.]*") if path.is_file())[:3]
        missing = f"of {split}, only {kinds}" if kinds else f"that ends in {', '.join(FORMATS)}"
        saved = ", or write what save_to_disk wrote with to_parquet" if (Path(folder) / "state.json").exists() else ""
        raise UserError(f"the folder {folder} holds no file {missing}" + f" (there are {', '.join(there)})" * bool(there)
                        + f"; give one with rows{saved}")  # fmt: skip
    others = [(name, found) for name, found in by_split.items() if name not in wanted]
    passed = [f"{len(found)} of {name or 'no split'} ({found[0]})" for name, found in others]
    span = paths[0] if len(paths) == 1 else f"{len(paths)} files, {paths[0]} to {paths[-1]}"
    over = f"; passed over {', '.join(passed)}, see {folder}:SPLIT" if passed else ""
    print(f"note: {folder} is read as {span}{over}", file=sys.stderr)
    return [Path(folder) / path for path in paths]


def group_files(folder: str | os.PathLike) -> dict[str, list[str]]:
    """Split -> the files of rows below a folder, as paths below it, without hidden ones. Their split is what the last word
    of SPLITS in the path says ("data/train/0.parquet", "test-00000-of-00003.parquet"), "" without any."""
    by_split: dict[str, list[str]] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if Path(name).suffix in FORMATS and not name.startswith(".") and name not in NO_ROWS:
                path = os.path.relpath(os.path.join(place, name), folder)
                words = [word for word in re.split("[^a-z]+", path.lower()) if word in SPLITS]
                by_split.setdefault(SPLITS[words[-1]] if words else "", []).append(path)
    return by_split


def _open_file(path: Path) -> Source:
    if path.suffix not in FORMATS:
        raise UserError(f"{path} ends in none of {', '.join(FORMATS)}; rows are read from those, or from a folder of them")
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a {', '.join(FORMATS)} file that exists")
    if path.suffix == ".parquet":
        from data.tables import open_parquet

        return open_parquet(path)
    with open(path, "rb") as file:
        head = file.read(2**16)
        body = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(len(head) - len(body))
        # one value a line: the first line closes what it opens, and more follows; a .json's array may close another there
        closing = b"}" if body.startswith(b"{") else b"]" if path.suffix == ".jsonl" else None
        is_lines = closing and file.readline(MAX_ROW_BYTES).rstrip().endswith(closing) and file.read(2**16).strip()
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16; save it as UTF-8")
    if path.suffix == ".csv":
        return Sheet(path)
    if body.startswith(b"[") and not is_lines:
        return Array(path, len(head) - len(body))
    return Document(path) if path.suffix == ".json" and body.startswith(b"{") and not is_lines else Lines(path)
