"""Sharded safetensors by hand: the index, reading tensor by tensor, writing shard by shard.

A checkpoint is a folder with model.safetensors, or with model.safetensors.index.json that maps each tensor to its file.
Nothing else is ever opened: no pickle, and no file outside the folder, whatever the index says (transformers 5.23 loads
"../secret.safetensors" from an index without a word). Reading holds one tensor at a time; a file is complete or absent,
because it is written under a temporary name, flushed to disk and renamed.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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
            file_of = json.loads(path.read_text())["weight_map"]
            names = set(file_of.values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path}: not an index of shards ({error!r}); download the model again") from None
        for name in names:
            refuse_outside(self.folder, name, path)
        held = {name: self._header(name) for name in names}
        for tensor, name in file_of.items():
            if tensor not in held[name]:
                raise UserError(f"{path}: names tensor {tensor} in {name}, which does not hold it; download the model again")
        return file_of

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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, from the headers alone."""
        return {name: shape for name, (shape, _) in self.headers().items()}

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


def refuse_outside(folder: Path, name: str, source: Path) -> None:
    """UserError unless folder/name lies inside the folder (a hub snapshot's links into its own blobs count as inside)."""
    root = folder.resolve()
    if root.parent.name == "snapshots":  # <cache>/models--org--name/snapshots/<revision>, files linked into ../../blobs
        root = root.parent.parent
    if not isinstance(name, str) or Path(name).is_absolute() or not (folder / name).resolve().is_relative_to(root):
        raise UserError(f"{source}: names the file {name!r}, which lies outside {folder}; the model folder is not to be trusted")


def write_file(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One safetensors file, whole or not at all: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.part")
    save_file(tensors, temporary, metadata={"format": "pt"})
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_shards(folder: str | Path, tensors: Iterable[tuple[str, torch.Tensor]], plan: dict[str, str]) -> None:
    """Write tensors that arrive in the order of plan (name -> file name), holding one shard at a time, then the index.

    The index is written last, so that a folder with an index is a complete one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held: dict[str, torch.Tensor] = {}
    current, total_bytes = None, 0
    for name, tensor in tensors:
        if current is not None and plan[name] != current:
            write_file(folder / current, held)
            held = {}
        current = plan[name]
        held[name] = tensor.contiguous()
        total_bytes += tensor.numel() * tensor.element_size()
    write_file(folder / current, held)
    if set(plan.values()) != {SINGLE}:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": plan}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


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
