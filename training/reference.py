"""reference.safetensors: what DPO's reference says of every pair, computed once and read from then on.

A pair is found by a hash of all that the network sees of it: the order of the rows does not matter, and a row or picture
that has changed is noticed. The file is of one start (its settings, files of rows and weights); any other start makes it
anew, and a start that was killed while making it goes on where it last saved. Costs 24 bytes a pair, and the reading of all
weights once for their hash.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.labels import Example

FILE, SAVE_SECONDS = "reference.safetensors", 300
Known = dict[bytes, tuple[float, float]]  # key_of(a pair) -> the reference's log-probabilities of chosen and rejected


def key_of(sides: list["Example"]) -> bytes:
    """16 bytes that stand for all that the network sees of a pair, whose pictures are the first side's."""
    from model.shards import tensor_bytes

    digest = hashlib.sha256()
    for example in sides:
        digest.update(tensor_bytes(example.input_ids))
        digest.update(tensor_bytes(example.labels))
    for _, tensor in sorted(sides[0].pixels.items()):
        digest.update(tensor_bytes(tensor))
    return digest.digest()[:16]


def fingerprint(run: Any) -> str:
    """sha256 of what the numbers depend on: settings, files of rows, and every weight of the start."""
    from model.shards import tensor_bytes

    digest = hashlib.sha256(json.dumps([run.identity, run.rows.files], sort_keys=True).encode())
    for _, parameter in run.model.named_parameters():
        digest.update(tensor_bytes(parameter))
    return digest.hexdigest()


def read_reference(path: Path, purpose: str) -> tuple[Known, int]:
    """(pairs, steps of the first epoch that were done) of a file made for this purpose; nothing of any other."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("purpose") != purpose:
                return {}, 0
            keys, logprobs = file.get_tensor("keys"), file.get_tensor("logprobs")
    except (FileNotFoundError, SafetensorError):
        return {}, 0
    return {bytes(key): tuple(two) for key, two in zip(keys.tolist(), logprobs.tolist(), strict=True)}, int(metadata["steps"])


def write_reference(path: Path, purpose: str, known: Known, num_done: int) -> None:
    """Two fp32 numbers and a key a pair; whole or not at all."""
    import torch

    from model.shards import write_file

    tensors = {"keys": torch.tensor([list(key) for key in known], dtype=torch.uint8).reshape(-1, 16)}  # (N, 16)
    tensors["logprobs"] = torch.tensor(list(known.values()), dtype=torch.float32).reshape(-1, 2)  # (N, 2)
    write_file(path, tensors, {"purpose": purpose, "steps": str(num_done)})
