"""Checkpoints that a kill, a power cut or a full disk cannot tear: the commit protocol.

A checkpoint is written into a hidden folder, every file flushed to disk, a manifest of sizes and sha256 last; one
rename makes it visible, and only then are old ones removed. Reading takes the newest folder whose manifest verifies. So
at every instant there is a whole checkpoint on disk, and a damaged one is noticed. Only safetensors and JSON, because
unpickling runs code. Costs one tensor of memory, 0.6-1.2 s of sha256 a GiB, and the disk's true writing time.
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from data.errors import UserError
from data.sources import sha256_of
from model.shards import NAMES, file_chunks, read_header, tensor_bytes

MANIFEST = "manifest.json"
STEP = re.compile(r"(?:\.replaced-)?step-(\d+)")  # a replaced checkpoint counts until its successor stands
Tensors = Mapping[str, torch.Tensor]


def commit(
    folder: str | Path, step: int, tensors: dict[str, Tensors], jsons: dict[str, object], keep: int = 2
) -> str | None:
    """Save files of tensors and of plain data as folder/checkpoints/step-NNNNNN, then remove all but `keep` of them.

    Returns None, or the problem in a sentence where the disk refused: then the older checkpoints stand untouched, and
    the run can go on and try again at its next save. Checkpoints of later steps, left by a run that was resumed from
    before them, are removed too.
    """
    checkpoints = Path(folder) / "checkpoints"
    target = checkpoints / f"step-{step:06d}"
    temporary, replaced = checkpoints / f".saving-{target.name}", checkpoints / f".replaced-{target.name}"
    try:
        for leftover in (temporary, replaced) if target.exists() else (temporary,):  # of runs killed inside this save
            if leftover.exists():
                shutil.rmtree(leftover)
        os.makedirs(temporary)
        written = {name: _write(temporary / name, file_chunks(content)) for name, content in tensors.items()}
        written |= {name: _write(temporary / name, [_json(content)]) for name, content in jsons.items()}
        _write(temporary / MANIFEST, [_manifest(step, written)])
        _sync_folder(temporary)
        if target.exists():  # damaged, or of a run that was resumed from before it
            os.rename(target, replaced)
        os.rename(temporary, target)
        _sync_folder(checkpoints)
        _sync_folder(checkpoints.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        return f"{target} could not be saved ({error.strerror or error}); the checkpoints before it are untouched"
    _prune(checkpoints, step, keep)
    return None


def newest_whole(folder: str | Path, before: float = math.inf) -> Path | None:
    """The newest checkpoint of a step below `before` whose every byte is as written, None if there is none."""
    for path in _candidates(folder):
        if _step(path) >= before:
            continue
        problem = find_problem(path)
        if problem is None:
            return path
        print(f"note: {path} is not whole ({problem}); looking at the one before it", file=sys.stderr)
    return None


def find_resume(folder: str | Path, resume: str) -> Path | None:
    """The checkpoint that `--resume` means (no, yes, a step number, an output folder or a checkpoint); None: start fresh.

    Raises UserError where what was asked for is absent or damaged, or where a fresh start would run over a run.
    """
    steps = [path.name for path in _candidates(folder)]
    if resume == "no":
        if steps:
            raise UserError(f"{folder} holds a run ({steps[0]}): add --resume yes, or choose another --output_dir")
        return None
    if resume == "yes":
        found = newest_whole(folder)
        if found is None and steps:
            raise UserError(f"{folder}: none of {', '.join(steps)} is whole; start afresh in another --output_dir")
        if found is None:
            print(f"nothing to resume in {folder}: starting fresh")
        return found
    path = Path(folder, "checkpoints", f"step-{int(resume):06d}") if resume.isdecimal() else Path(resume)
    if not STEP.fullmatch(path.resolve().name):
        found = newest_whole(path)
        problem = None if found else "holds no whole checkpoint"
    else:
        found, problem = path, find_problem(path) if path.is_dir() else f"there is no {path}"
    if problem:
        raise UserError(f"--resume {resume}: {problem}; {folder} has {', '.join(steps) or 'no checkpoint'} to offer")
    return found


def find_problem(path: Path) -> str | None:
    """What is wrong with one checkpoint, None if nothing: the manifest must be, to the byte, what its files give."""
    try:
        manifest = (path / MANIFEST).read_bytes()
        listed = json.loads(manifest)["files"]
        if any(Path(name).name != name for name in listed):
            return f"{MANIFEST} names files outside the checkpoint"
        found = {name: {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)} for name in listed}
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    changed = [name for name in listed if found[name] != listed[name]]
    if changed:
        return f"{changed[0]} is not what was written"
    return None if manifest == _manifest(_step(path), found) else f"{MANIFEST} is not what was written"


class TensorFile(Mapping[str, torch.Tensor]):
    """A file of tensors, each read when it is asked for: states of 8 bytes a weight are never in memory twice. (The library
    maps the whole file, and its pages would count as this process's memory.)"""

    def __init__(self, path: Path):
        self.path = path
        self.header, self.entries = read_header(path)

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        tensor = torch.empty(entry["shape"], dtype=next(dtype for dtype in NAMES if NAMES[dtype] == entry["dtype"]))
        with open(self.path, "rb") as file:
            file.seek(len(self.header) + entry["data_offsets"][0])
            file.readinto(tensor_bytes(tensor))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def load(path: Path) -> tuple[dict[str, Tensors], dict[str, object]]:
    """The files of tensors and of plain data of a checkpoint that newest_whole or find_resume returned."""
    names = json.loads((path / MANIFEST).read_bytes())["files"]
    tensors = {name: TensorFile(path / name) for name in names if name.endswith(".safetensors")}
    return tensors, {name: json.loads((path / name).read_bytes()) for name in names if name not in tensors}


def _candidates(folder: str | Path) -> list[Path]:
    """Checkpoint folders, newest first, whole or not; of one step the visible one first."""
    paths = [path for path in Path(folder, "checkpoints").glob("*") if STEP.fullmatch(path.name)]
    return sorted(paths, key=lambda path: (-_step(path), path.name.startswith(".")))


def _step(path: Path) -> int:
    return int(STEP.fullmatch(path.resolve().name)[1])


def _prune(checkpoints: Path, step: int, keep: int) -> None:
    """Remove what the checkpoint of `step`, which is whole and on disk, has made useless; never that one."""
    steps = [path for path in _candidates(checkpoints.parent) if not path.name.startswith(".")]
    useless = [path for path in steps if _step(path) > step] + [path for path in steps if _step(path) <= step][keep:]
    for path in [*useless, *checkpoints.glob(".saving-*"), *checkpoints.glob(".replaced-*")]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            print(f"warning: the old checkpoint {path} could not be removed ({error.strerror})", file=sys.stderr)


def _json(content: object) -> bytes:
    return json.dumps(content, indent=1).encode()


def _manifest(step: int, files: dict[str, dict]) -> bytes:
    return _json({"step": step, "files": files})


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> dict:
    """Write a file through to the disk; returns its entry of the manifest."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _sync_folder(folder: Path) -> None:
    """Make the folder's list of names durable."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
