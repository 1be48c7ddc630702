"""Models and their weights: load_tokenizer, load_model, save_model.

The network is built on the meta device (no memory), then each tensor is read, cast or quantised, and put in its place;
above the finished model one tensor is in memory. Nothing but safetensors and JSON is read, and no code of a checkpoint
is ever run.
"""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from model.family import Family, Model, Options


def resolve(folder_or_hub_id: str | Path) -> Path:
    """A model folder as it stands, or a hub id downloaded to (or found in) the hub's cache: safetensors and text only.

    Raises UserError for neither, with the command that downloads.
    """
    from data.errors import UserError

    name = str(folder_or_hub_id)
    if Path(name).is_dir():
        part = next((part for part in ("model", "adapter") if (Path(name) / part).is_dir()), None)
        if part and not (Path(name) / "config.json").exists():
            what = {"model": "name the one of its model,", "adapter": "name its base, and beside it --adapter"}[part]
            raise UserError(f"{name}: is a run's folder; {what} {Path(name) / part}")
        return Path(name)
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such folder, and not a hub id of the form org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name}: no such folder, and the hub has not answered for it ({reason}); "
            f"check the name and the network, or download it first: hf download {name}"
        ) from None


def options_of(settings: dict[str, Any]) -> "Options":
    """What a run's settings (the fields of training/config.py's Config, by name) say about a family's encoding."""
    from model.family import Options

    return Options(**{field.name: settings[field.name] for field in fields(Options) if field.name in settings})


def open_family(folder_or_hub_id: str | Path, settings: dict[str, Any]) -> "Family":
    """The family of a checkpoint as a run's settings make it, without its weights."""
    from model.family import find_family

    return find_family(resolve(folder_or_hub_id), options_of(settings))


def load_tokenizer(folder_or_hub_id: str | Path, trust_remote_code: bool = False):
    """The checkpoint's tokenizer (transformers'). trust_remote_code is accepted, has no effect, and says so."""
    from model.family import find_family

    if trust_remote_code:
        print("note: trust_remote_code has no effect here: no code of a model folder is ever run")
    return find_family(resolve(folder_or_hub_id)).tokenizer


def load_model(
    folder_or_hub_id: str | Path,
    quant: str | None = None,
    dtype: "str | torch.dtype" = "bfloat16",
    device: "str | torch.device" = "cpu",
    options: "Options | None" = None,
) -> "tuple[Model, Family]":
    """(model, family) of a checkpoint in the hub's original layout, frozen or not as built, in eval mode.

    quant "8bit" or "4bit" quantises the linear layers of the family's quantised parts as they arrive. dtype is that of
    all other weights. Raises UserError for an unknown model, and for missing, unexpected or misshapen tensors by name.
    """
    from model.load import load

    return load(resolve(folder_or_hub_id), quant, dtype, device, options)


def save_model(model: "Model", folder: str | Path) -> None:
    """Write the model's weights in the original tensor names beside a byte-for-byte copy of every other file of its
    base. Raises UserError for a quantised model (merge its adapter into the 16-bit base instead)."""
    from model.load import save

    save(model, Path(folder))
