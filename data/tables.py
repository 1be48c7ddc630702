"""Rows that come as columns: parquet files, and data sets of the hub.

A parquet file is read by row groups, straight from the file: nothing is copied to disk, and a few groups stay in memory.
Where a group is too large for that, and for the hub, the `datasets` library keeps an Arrow file in its cache and maps
it into memory. Columns cannot tell "absent" from "null", so null fields are left out of a row. Imported lazily.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import UserError
from data.sources import RawRow, Source
from data.turns import Problem

if TYPE_CHECKING:
    import datasets
    import pyarrow

HELD_BYTES = 256 * 2**20  # of row groups in memory: shuffled rows of what fits are 20,000 a second, of more 70 to 1,000
GROUP_BYTES = HELD_BYTES // 4  # files with larger groups are read through an Arrow file, 30,000 rows a second, at any size
AT_ONCE = 64  # rows made into Python objects together

_held: dict[tuple, tuple["pyarrow.Table", int]] = {}  # of this process: row groups and their bytes, the newest at the end


class Table(Source):
    """What parquet and Arrow have in common: rows are numbered from 1 and have no place in a file."""

    def parse(self, raw: object) -> object:
        if isinstance(raw, Problem):
            raise raw
        return plain({name: cell for name, cell in raw.items() if cell == cell})  # NaN is how pandas writes an empty cell

    def rows_of(self, table: "pyarrow.Table") -> list[dict | Problem]:
        try:
            return table.to_pylist()
        except UnicodeDecodeError as error:  # parquet does not check what is written as text
            if len(table) == 1:
                return [Problem("not valid UTF-8", error.reason)]
            return [row for place in range(len(table)) for row in self.rows_of(table.slice(place, 1))]


class Parquet(Table):
    """A parquet file, read by row groups."""

    def __init__(self, path: Path, group_rows: list[int]):
        super().__init__(path)
        self.first_rows = list(accumulate(group_rows, initial=0))

    def pieces(self) -> Iterator[RawRow]:
        for group, first in enumerate(self.first_rows[:-1]):
            table = self.group(group)
            for start in range(0, len(table), AT_ONCE):
                for number, row in enumerate(self.rows_of(table.slice(start, AT_ONCE)), first + start + 1):
                    yield number, 0, 0, row

    def read(self, number: int, start: int, size: int) -> object:
        group = bisect_right(self.first_rows, number - 1) - 1
        return self.rows_of(self.group(group).slice(number - 1 - self.first_rows[group], 1))[0]

    def group(self, group: int) -> "pyarrow.Table":
        """The rows of a row group. UserError where they are damaged."""
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        key = (*self.stamp(), group)
        held = _held.pop(key, None)
        if held is None:
            try:
                with ParquetFile(self.path) as file:
                    table = file.read_row_group(group, use_threads=False)  # threads do not live on in a forked worker
            except (ArrowException, OSError) as error:
                rows = f"rows {self.first_rows[group] + 1} to {self.first_rows[group + 1]}"
                raise UserError(f"{self.path}: {rows} cannot be read ({error}); save or download the file again") from None
            while _held and sum(size for _, size in _held.values()) + table.nbytes > HELD_BYTES:
                del _held[next(iter(_held))]
            held = table, table.nbytes
        _held[key] = held
        return held[0]


class Arrow(Table):
    """A data set of the `datasets` library: Arrow files in its cache, mapped into memory; of a file, or of the hub."""

    def __init__(self, dataset: "datasets.Dataset", name: str, path: Path | None = None):
        super().__init__(path or Path(name))
        self.dataset, self.name, self.is_file = dataset.with_format("arrow"), name, path is not None
        self.folder = path.parent if path else Path()

    def pieces(self) -> Iterator[RawRow]:
        rows = (row for table in self.dataset.iter(AT_ONCE) for row in self.rows_of(table))
        for number, row in enumerate(rows, 1):
            yield number, 0, 0, row

    def read(self, number: int, start: int, size: int) -> object:
        return self.rows_of(self.dataset[number - 1 : number])[0]

    def stamp(self) -> list:
        return super().stamp() if self.is_file else [self.name, self.sha256()]

    def sha256(self) -> str:
        """Of the file, or the library's fingerprint of what a hub's data set was made of."""
        return super().sha256() if self.is_file else self.dataset._fingerprint


def open_parquet(path: Path) -> Table:
    """A parquet file as rows. UserError for one that cannot be read."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            sizes, counts = [group.total_byte_size for group in groups], [group.num_rows for group in groups]
            names = file.schema_arrow.names
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}; save or download it again") from None
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path} has two columns called {twice[0]!r}; rename or remove one")
    if max(sizes, default=0) <= GROUP_BYTES:
        return Parquet(path, counts)
    refusal = f"{path} cannot be read as parquet ({{}}); save or download it again"
    return Arrow(load(refusal, "parquet", "train", data_files=str(path)), path.name, path)


def open_hub(name: str, config: str | None, split: str | None) -> Table:
    """A split (train, if none is named) of a data set of the hub. UserError for one that cannot be had."""
    import datasets

    offline, silence = datasets.config.HF_HUB_OFFLINE, "" if datasets.config.HF_HUB_OFFLINE else silence_of_hub(name)
    reason = f"the hub does not answer, {silence}, and the library's cache does not hold it" if silence else "{}"
    refusal = (f"{name} is no file or folder here, and as a data set of the hub it cannot be had ({reason}); look for its "
               "name, and for a private one set HF_TOKEN")
    datasets.config.HF_HUB_OFFLINE = offline or bool(silence)  # then the library takes what it has at once
    try:
        found = load(refusal, name, split or "train", name=config)
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    return Arrow(found, ":".join(filter(None, [name, config, split])))


def silence_of_hub(name: str) -> str:
    """Why the hub cannot be asked for a data set, "" where it answers: one request, where the library would make six."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(name, timeout=10)
    except HfHubHTTPError:
        return ""  # it has answered, and the library will say what
    except Exception as error:  # of the network, in types that change with the library's version
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def load(refusal: str, path: str, split: str, **more) -> "datasets.Dataset":
    """What the datasets library makes of a path. UserError, the refusal with the library's reason in it, where it cannot."""
    import datasets

    try:
        return datasets.load_dataset(path, split=split, **more)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).partition("\nPlease")[0].split()) or type(error).__name__
        raise UserError(refusal.replace("{}", reason)) from None


def plain(value: object) -> object:
    """A value of a table as json would give it: without null fields, a picture as its bytes or path. Problem for a number
    that is none."""
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            return value["path"] if value["bytes"] is None else value["bytes"]
        fields = {key: plain(item) for key, item in value.items()}
        return {key: item for key, item in fields.items() if item is not None}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise Problem("a number is NaN or infinite", str(value))
    return value if isinstance(value, str | int | float | bytes | None) else str(value)
