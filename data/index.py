"""What the first pass over a source found, kept in a file, so that the next run opens a million rows in seconds.

An index is made where that pass took more than a second, and lies beside the rows as `.NAME.index`, else below the
user's cache folder. It is of one state of the rows, of the code that reads them, and of a run's image root, templates,
kinds of row and boxes; its pictures must lie there unchanged (one stat each), and bad rows are read again, for what was
missing may have come. Where any of this does not hold, or a byte is damaged, the pass is made again without a word. About
60 bytes a row, nothing pickled.
"""

import hashlib
import json
import os
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from data.dialects import DIALECTS

if TYPE_CHECKING:
    from data.records import Part

WORTH_SECONDS = 1.0
ARRAYS = ("numbers", "starts", "sizes", "sums", "text_bytes", "shapes")


def fill(part: "Part", keep: bool = True) -> None:
    """Check every row of the part's source, or take what was found when that was done before; keep: for the next time."""
    key = key_of(part)
    for path in places(part):
        if load(part, path, key):
            return
        part.clear()
    began = time.perf_counter()
    pieces = part.source.pieces()
    for piece in tqdm(pieces, desc=f"check {part.source.name}", unit=" rows", leave=False, disable=None, delay=1):
        part.check(*piece)
    if keep and time.perf_counter() - began > WORTH_SECONDS:
        part.sha256 = part.source.sha256()
        any(save(part, path, key) for path in places(part))
    part.pictures.clear()


def places(part: "Part") -> list[Path]:
    """Where the index may lie."""
    name = hashlib.sha256(json.dumps(part.source.stamp()[0]).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "rows", f"{name}.index")
    beside = part.source.path.with_name(f".{part.source.path.name}.index")
    return [beside, cache] if part.source.path.is_file() else [cache]


def key_of(part: "Part") -> list:
    """All that an index depends on, but the pictures."""
    run = [list(part.roots), sorted(part.takes), repr(part.template), *part.boxes.key]
    return [part.source.stamp(), *run, code_version(), [dialect.name for dialect in DIALECTS]]


@lru_cache
def code_version() -> str:
    """Of the files of this folder: whatever reads rows otherwise makes other indices."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def save(part: "Part", path: Path, key: list) -> bool:
    """Write the index, whole or not at all; whether the disk, and the pictures, let it be done."""
    temporary, check = path.with_name(f"{path.name}.{os.getpid()}"), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            for chunk in chunks(part, key):
                check = zlib.crc32(chunk, check)
                file.write(chunk)
            file.write(b"%08x" % check)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        return False
    return True


def chunks(part: "Part", key: list) -> Iterator[bytes]:
    """A line of facts, the arrays, a line for each picture."""
    codes: dict[tuple, int] = {}
    which = array("Q", (codes.setdefault(sizes, len(codes)) for sizes in part.image_sizes))
    facts = {
        "key": key, "num_rows": len(part.numbers), "num_pictures": len(part.pictures), "image_sizes": list(codes),
        "bad": part.bad_places, "notes": part.notes, "dialects": part.dialects, "sha256": part.sha256,
    }  # fmt: skip
    yield json.dumps(facts).encode() + b"\n"
    yield from (getattr(part, name).tobytes() for name in ARRAYS)
    yield which.tobytes()
    for picture in part.pictures:
        yield json.dumps([picture, *state_of(picture)]).encode() + b"\n"


def state_of(picture: str) -> list[int]:
    found = os.stat(picture)
    return [found.st_size, found.st_mtime_ns]


def load(part: "Part", path: Path, key: list) -> bool:
    """Fill the part from an index; whether it could be done. If not, the part is left in between."""
    try:
        with open(path, "rb") as file:
            return read(part, file, key)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False


def read(part: "Part", file, key: list) -> bool:
    check, left = 0, os.fstat(file.fileno()).st_size - 8
    while left > 0 and (chunk := file.read(min(left, 2**22))):
        check, left = zlib.crc32(chunk, check), left - len(chunk)
    if file.read() != b"%08x" % check:  # before any of it is believed
        return False
    file.seek(0)
    facts = json.loads(file.readline())
    if facts["key"] != key:
        return False
    found = [array("Q") for _ in (*ARRAYS, "which")]
    for numbers in found:
        numbers.frombytes(file.read(8 * facts["num_rows"]))
    for _ in range(facts["num_pictures"]):
        picture, *state = json.loads(file.readline())
        if state_of(picture) != state:
            return False
    for name, numbers in zip(ARRAYS, found, strict=False):
        setattr(part, name, numbers)
    image_sizes = [tuple(map(tuple, sizes)) for sizes in facts["image_sizes"]]
    part.image_sizes = list(map(image_sizes.__getitem__, found[-1]))
    part.notes, part.dialects, part.sha256 = Counter(facts["notes"]), Counter(facts["dialects"]), facts["sha256"]
    for place in facts["bad"]:
        part.check(*place, part.source.read(*place))
    return len(part.numbers) == facts["num_rows"]  # else a bad row has become a good one
