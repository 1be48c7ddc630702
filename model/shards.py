"""Sharded safetensors by hand: the index, reading tensor by tensor, writing shard by shard.

A checkpoint is a folder with model.safetensors, or with model.safetensors.index.json that maps each tensor to its file.
Nothing else is ever opened: no pickle, and no file outside the folder, whatever the index says (transformers 5.23 loads
"../secret.safetensors" from an index without a word). Reading holds one tensor at a time; a file is complete or absent,
because it is written under a temporary name, flushed to disk and renamed.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from data.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # weights, by safetensors' names
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.float64: "F64", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}


class Shards:
    """The tensors of one checkpoint folder: names, shapes, and one tensor at a time.

    Raises UserError for a folder without safetensors weights, a broken or hostile index, or a damaged file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.file_of = self._index() if (self.folder / INDEX).exists() else self._single()

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX
        try:
            file_of = json.loads(path.read_text(), object_pairs_hook=unique)["weight_map"]
            names = dict.fromkeys(file_of.values())
        except (ValueError, KeyError, AttributeError, TypeError, OSError, RecursionError) as error:
            raise UserError(f"{path}: not an index of shards ({error!r}); download the model again") from None
        held: dict[str, str] = {}
        for name in names:
            refuse_outside(self.folder, name, path)
            for tensor in self._header(name):
                if tensor in held:
                    raise UserError(f"{path}: tensor {tensor} is in {held[tensor]} and in {name}; download the model again")
                held[tensor] = name
        for tensor, name in file_of.items():
            if held.get(tensor) != name:
                raise UserError(f"{path}: names tensor {tensor} in {name}, which does not hold it; download the model again")
        return held

    def _single(self) -> dict[str, str]:
        if not (self.folder / SINGLE).exists():
            found = sorted(p.name for p in self.folder.glob("*"))[:10] if self.folder.is_dir() else "no such folder"
            raise UserError(
                f"{self.folder}: holds neither {SINGLE} nor {INDEX} (found: {found}). Weights in other formats (.bin, .pt) "
                "are not read, because unpickling runs code: convert them to safetensors first"
            )
        refuse_outside(self.folder, SINGLE, self.folder)
        return {name: SINGLE for name in self._header(SINGLE)}

    def _header(self, name: str) -> list[str]:
        with self._open(name) as file:
            return list(file.keys())

    def _open(self, name: str):
        path = self.folder / name
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise UserError(f"{path}: the shard is missing; download the model again") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a whole safetensors file ({error}); download the model again") from None

    def files(self) -> list[str]:
        """Shard files in the order in which the tensors name them."""
        return list(dict.fromkeys(self.file_of.values()))

    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Tensor name -> (shape, safetensors dtype such as "BF16"), from the headers alone."""
        headers = {}
        for name in self.files():
            with self._open(name) as file:
                for tensor in (t for t, f in self.file_of.items() if f == name):
                    view = file.get_slice(tensor)
                    headers[tensor] = (tuple(view.get_shape()), view.get_dtype())
        return headers

    def stream(self, only: set[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) for every tensor (or those in `only`), file by file; the tensor is a view of the file."""
        for name in self.files():
            with self._open(name) as file:
                for tensor in (t for t, f in self.file_of.items() if f == name and (only is None or t in only)):
                    yield tensor, file.get_tensor(tensor)


def unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object whose keys are all different: json keeps the last of two without a word. Raises ValueError."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} stands there twice")
    return found


def refuse_outside(folder: Path, name: str, source: Path) -> None:
    """UserError unless folder/name lies inside the folder (a hub snapshot's links into its own blobs count as inside)."""
    root = folder.resolve()
    if root.parent.name == "snapshots":  # <cache>/models--org--name/snapshots/<revision>, files linked into ../../blobs
        root = root.parent.parent
    inside = isinstance(name, str) and "\0" not in name and not Path(name).is_absolute()
    if not inside or not (folder / name).resolve().is_relative_to(root):
        raise UserError(f"{source}: names the file {name!r}, which lies outside {folder}; do not trust this model folder")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, there whole or not at all: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_header(path: Path) -> tuple[bytes, dict[str, dict]]:
    """(the bytes before the first tensor, tensor name -> {dtype, shape, data_offsets} in the order of the bytes)."""
    with open(path, "rb") as file:
        size = file.read(8)  # of the JSON that follows, little-endian
        text = file.read(int.from_bytes(size, "little"))
    entries = json.loads(text)
    entries.pop("__metadata__", None)
    return size + text, dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"]))


def make_header(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes before the first tensor of a file that holds these tensors one after another."""
    entries, place = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0
    for name, tensor in tensors.items():
        end = place + tensor.nbytes
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's values as they lie in a file."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def file_chunks(
    tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, tensor by tensor: the library's save_file would copy all of a card's at once.

    Wide elements come first, so that each tensor starts at a multiple of its element's size.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    yield make_header(tensors, metadata)
    yield from map(tensor_bytes, tensors.values())


def write_file(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """One safetensors file, whole or not at all."""
    with whole_file(path) as file:
        file.writelines(file_chunks(tensors, metadata))


def write_shards(folder: str | Path, tensors: dict[str, torch.Tensor], plan: dict[str, str]) -> None:
    """Write each tensor into the file that plan names for it, then the index: a folder with an index is complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(plan.values()):
        write_file(folder / name, {tensor: tensors[tensor] for tensor in plan if plan[tensor] == name})
    if set(plan.values()) != {SINGLE}:
        index = {"metadata": {"total_size": sum(tensors[name].nbytes for name in plan)}, "weight_map": plan}
        with whole_file(folder / INDEX) as file:
            file.write(json.dumps(index, indent=2).encode() + b"\n")


def plan_shards(bytes_of: dict[str, int], shard_bytes: int = 5 * 10**9) -> dict[str, str]:
    """Tensor name -> file name, filling files of at most shard_bytes in the order given (the hub's naming)."""
    groups: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in bytes_of.items():
        if groups[-1] and size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {name: SINGLE for name in groups[0]}
    return {n: f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i, group in enumerate(groups, 1) for n in group}
