"""What --data_path names: files of rows, folders of them, data sets of the hub, several with weights.

    rows.json    runs/    runs/:test    org/name    org/name:test    a.json*2,b.jsonl,c.parquet*0.5

A folder is all files below it, laid out as on the hub; those that their names put into a held-out split are passed over.
"""

import os
import re
import sys
from pathlib import Path

from data.errors import UserError
from data.sources import Array, Document, Lines, Sheet, Source
from data.turns import MAX_ROW_BYTES

FORMATS = (".json", ".jsonl", ".csv", ".parquet")
HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?::([\w.-]+))?")
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "validation": "validation",
          "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation"}  # words of a path
NO_ROWS = {"manifest.json", "plan.json", "bad_rows.jsonl", "bad_images.jsonl", "images.jsonl", "judged_answers.jsonl",
           "summary.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # what commands leave
NOT_ROWS = {  # by the first bytes
    b"\x1f\x8b": "is packed with gzip; unpack it", b"PK\x03\x04": "is packed with zip; unpack it",
    b"\x28\xb5\x2f\xfd": "is packed with zstandard; unpack it", b"\xff\xfe": "is UTF-16; save it as UTF-8",
    b"\xfe\xff": "is UTF-16; save it as UTF-8", b"version https://git-lfs": "is a pointer of Git LFS and not the rows; git lfs "
    "pull fetches them",
}  # fmt: skip
WEIGHT = re.compile(r"(.+)\*(\d+\.?\d*|\.\d+)")


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
    folder, _, split = name.rpartition(":")
    if folder and split in SPLITS and Path(folder).is_dir():
        return list(map(_open_file, find_files(folder, split)))
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
        there = sorted(os.path.relpath(path, folder) for path in Path(folder).rglob("[!.]*") if path.is_file())[:3]
        missing = f"of {split}, only {kinds}" if kinds else f"of rows, which end in {', '.join(FORMATS)}"
        saved = ", or write what save_to_disk wrote with to_parquet" if (Path(folder) / "state.json").exists() else ""
        raise UserError(f"the folder {folder} holds no file {missing}" + f" (there are {', '.join(there)})" * bool(there)
                        + f"; give one with rows{saved}")  # fmt: skip
    others = [(name, found) for name, found in by_split.items() if name not in wanted]
    passed = [f"{len(found)} of {name or 'no split'} ({found[0]})" for name, found in others]
    span = paths[0] if len(paths) == 1 else f"{len(paths)} files, {paths[0]} to {paths[-1]}"
    over = f"; passed over {', '.join(passed)}; {folder}:SPLIT reads a split" if passed else ""
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
    with open(path, "rb") as file:
        head = file.read(2**16)
        if words := next((words for start, words in NOT_ROWS.items() if head.startswith(start)), None):
            raise UserError(f"{path} {words}")
        if path.suffix == ".parquet":
            from data.tables import open_parquet

            return open_parquet(path)
        if path.suffix == ".csv":
            return Sheet(path)
        body = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(len(head) - len(body))
        first, rest = file.readline(MAX_ROW_BYTES).rstrip(), file.read(2**16).lstrip()
    if path.suffix == ".jsonl" and first == b"{" and rest.startswith(b'"'):
        raise UserError(f"{path}: its first row goes on over several lines; write one row a line, or a list of all as .json")
    # one value a line: the first line closes what it opens (a .json's array may close another there), or is a damaged one
    # that no object could follow; and more follows
    closing = b"}" if body.startswith(b"{") else b"]" if path.suffix == ".jsonl" else None
    is_damaged = rest.startswith(b"{") and not first.endswith((b"{", b"[", b",", b":"))
    is_lines = closing and rest and (first.endswith(closing) or is_damaged)
    if body.startswith(b"[") and not is_lines:
        return Array(path, len(head) - len(body))
    return Document(path) if path.suffix == ".json" and body.startswith(b"{") and not is_lines else Lines(path)
