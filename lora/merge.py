"""Merge an adapter into the 16-bit weights of its base, by hand, a block of rows at a time.

W + scale B A is computed in fp32 and rounded once to the dtype of W; the base is the original checkpoint even where
the adapter was trained on an 8-bit or 4-bit one, so the quantisation error is not merged in. Every shard keeps its
name, its header and so its size to the byte; every other file is copied as it is. In memory are the adapter and one
block, whatever the size of the model. merge.json in the output says what was merged: no adapter is merged twice.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from data.errors import UserError
from lora.files import AdapterFile, read_adapter
from model.family import find_family
from model.files import read_json
from model.load import copy_companions
from model.shards import DTYPES, INDEX, Shards, read_header, tensor_bytes, whole_file

BLOCK_BYTES = 64 * 2**20  # of fp32 rows at a time
RECORD = "merge.json"


@dataclass
class Update:
    """What an adapter does to one weight of (out, in): W + scale B A, rescaled to row norms m by DoRA."""

    a: torch.Tensor  # (r, in) fp32
    b: torch.Tensor  # (out, r) fp32
    scale: float
    magnitude: torch.Tensor | None = None  # (out,) fp32

    def apply(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        """New values of some rows of the weight, (n, in), in its dtype."""
        merged = torch.addmm(weight.float(), self.b[rows], self.a, alpha=self.scale)
        if self.magnitude is not None:  # DoRA, equation 5 of arXiv 2402.09353
            merged *= (self.magnitude[rows] / merged.norm(dim=1))[:, None]
        return merged.to(weight.dtype)


def merge(base_folder: str | Path, adapter_folder: str | Path, output_dir: str | Path) -> dict:
    """Write the merged model as a folder like the base's, whole or not at all; returns what merge.json says.

    Raises UserError for a prefix, an adapter of another base, one that this base already holds, and an output_dir that
    holds something.
    """
    base, output = Path(base_folder), Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output_dir {output}: exists and is not empty; merging writes a new folder")
    shards = Shards(base)
    adapter = read_adapter(adapter_folder)
    history = read_json(base / RECORD)["merged"] if (base / RECORD).exists() else []
    if adapter.sha256 in [entry["adapter_sha256"] for entry in history]:
        raise UserError(f"{base}: already holds the adapter {adapter.folder} ({RECORD}); again it would count twice")
    updates = find_updates(adapter, shards)
    total_bytes = sum((base / name).stat().st_size for name in shards.files())
    output.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(output.parent).free) < total_bytes:
        need = f"{total_bytes / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
        raise UserError(f"--output_dir {output}: the merged model takes {need}; make room or name another disk")

    temporary = output.with_name(f".{output.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        copy_companions(base, temporary)
        for name in shards.files():
            merge_shard(base / name, temporary / name, updates)
        if (base / INDEX).exists():
            shutil.copyfile(base / INDEX, temporary / INDEX)
        entry = {
            "adapter": str(adapter.folder.resolve()),
            "adapter_sha256": adapter.sha256,
            "base_model": str(base.resolve()),
            "scale": adapter.scale,
            "tensors": sorted(updates),
        }
        record = {"merged": [*history, entry]}
        write_record(temporary, record)
        os.replace(temporary, output)  # onto nothing or an empty folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def write_record(folder: Path, record: dict) -> None:
    """merge.json: {"merged": [one entry a merge, the oldest first]}."""
    with whole_file(folder / RECORD) as file:
        file.write(json.dumps(record, indent=2).encode() + b"\n")


def find_updates(adapter: AdapterFile, shards: Shards) -> dict[str, Update]:
    """Tensor name of the base -> its update. Raises UserError where a module is none of this base, or misshapen."""
    if adapter.config["peft_type"] != "LORA":
        raise UserError(f"{adapter.folder}: a prefix changes no weights, so it cannot be merged; keep it as an adapter")
    family, headers = find_family(shards.folder), shards.headers()
    updates = {}
    for module, tensors in adapter.modules().items():
        name = family.tensor_name(f"{module}.weight")  # the hub's older names are tensor names already and stay
        a, b = tensors["lora_A.weight"].float(), tensors["lora_B.weight"].float()
        if name not in headers:
            raise UserError(f"{adapter.folder}: changes {name}, which {shards.folder} has not; its base is another")
        shape, dtype = headers[name]
        magnitude = tensors.get("lora_magnitude_vector")
        if shape != (len(b), a.shape[1]) or (magnitude is not None and magnitude.shape != shape[:1]):
            raise UserError(
                f"{adapter.folder}: changes {name} as one of {(len(b), a.shape[1])}, but it is {shape} in "
                f"{shards.folder}; the adapter is of another base"
            )
        if dtype not in DTYPES:
            raise UserError(f"{shards.folder}: {name} is {dtype}; an adapter is merged into 16- or 32-bit weights only")
        updates[name] = Update(a, b, adapter.scale, None if magnitude is None else magnitude.float())
    return updates


def merge_shard(source: Path, target: Path, updates: dict[str, Update]) -> None:
    """Copy a shard byte by byte, but for the tensors that have an update."""
    header, entries = read_header(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as old, whole_file(target) as new:
        old.seek(len(header))
        new.write(header)
        for name, entry in entries.items():
            if name in updates:
                merge_tensor(old, new, entry, updates[name])
            else:
                start, end = entry["data_offsets"]
                copy_bytes(old, new, end - start)


def merge_tensor(old: BinaryIO, new: BinaryIO, entry: dict, update: Update) -> None:
    """Read a weight of (out, in) where the file stands, write its merged values, a block of rows at a time."""
    (num_rows, num_columns), dtype = entry["shape"], DTYPES[entry["dtype"]]
    step = max(1, BLOCK_BYTES // (4 * num_columns))
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        block = bytearray(old.read((rows.stop - start) * num_columns * dtype.itemsize))
        weight = torch.frombuffer(block, dtype=dtype).view(-1, num_columns)  # (n, in)
        new.write(tensor_bytes(update.apply(weight, rows)))


def copy_bytes(old: BinaryIO, new: BinaryIO, num_bytes: int) -> None:
    """Copy a stretch of a file, a block at a time."""
    while num_bytes:
        block = old.read(min(num_bytes, BLOCK_BYTES))
        new.write(block)
        num_bytes -= len(block)
