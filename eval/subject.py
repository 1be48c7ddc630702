"""Opening what is evaluated: a model folder, a run's output folder or an adapter, with the settings of its training.

A run is asked the way it was trained: its run.yaml says how large pictures may be, how tools are rendered, in what
precision and with how many bits the base was held, and a flag given here overrides each. For a folder without a
run.yaml the checkpoint's own values hold.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.errors import UserError
from model import load_model, options_of
from model.family import Family, Model
from model.files import read_json
from training import memory, precision
from training.precision import Precision


@dataclass
class Subject:
    """A model ready to answer; run is its output folder if it comes from one."""

    model: Model
    family: Family
    precision: Precision
    run: Path | None


@dataclass
class Place:
    """Where the weights lie: the base's folder or hub id, an adapter on top or None, and the run they come from."""

    base: str
    adapter: Path | None
    run: Path | None


def open_subject(
    name: str,
    adapter: str | None = None,
    quant: str | None = None,
    max_pixels: int | None = None,
    precision_name: str | None = None,
    device_name: str = "auto",
    box_format: str | None = None,
    tool_template: str | None = None,
) -> Subject:
    """Load what `name` means, in eval mode; None takes what the run was trained with. quant is 8bit, 4bit or none.

    Raises UserError for a folder that is none of model, run and adapter, and for an adapter of another base.
    """
    place = find(name, adapter)
    given = {"max_pixels": max_pixels, "precision": precision_name, "box_format": box_format, "tool_template": tool_template}
    settings = choose_settings(place.run, **given)
    if quant is None and place.adapter:  # merged weights were made for 16 bits, whatever the run held its base in
        quant = "8bit" if settings.get("use_8bit") else "4bit" if settings.get("use_4bit") else None
    device = memory.check_device(device_name)
    dtypes = precision.choose(settings.get("precision", "auto"), device)
    model, family = load_model(place.base, None if quant == "none" else quant, dtypes.frozen, device, options_of(settings))
    if place.adapter:
        from lora.files import load_adapter

        load_adapter(model, family, place.adapter)
        model.eval()
    return Subject(model, family, dtypes, place.run)


def choose_settings(run: Path | None, **given: Any) -> dict[str, Any]:
    """A run's settings ({} without one), overridden by those given (None: not given). Its image_root and image_cache are
    left out, because other rows are evaluated."""
    own = read_settings(run) | {"image_root": None, "image_cache": None}
    return own | {name: value for name, value in given.items() if value is not None}


def find(name: str, adapter: str | None) -> Place:
    """What --model (and --adapter) means. Raises UserError for an unfinished run and an adapter that names no base."""
    folder = Path(name)
    if adapter is not None:
        top = Path(adapter)
        if not (top / "adapter_config.json").exists() and (top / "adapter").is_dir():
            top = top / "adapter"
        return Place(name, top, run_of(top))
    if (folder / "config.json").exists() or not folder.is_dir():
        return Place(name, None, run_of(folder))
    if (folder / "adapter_config.json").exists():
        return Place(base_of(folder), folder, run_of(folder))
    if (folder / "model").is_dir():
        return Place(str(folder / "model"), None, run_of(folder / "model"))
    if (folder / "adapter").is_dir():
        return find(str(folder / "adapter"), None)
    if (folder / "run.yaml").exists():
        raise UserError(f"--model {name}: this run has not finished (no model/, no adapter/); go on with --resume yes")
    return Place(name, None, None)


def run_of(folder: Path) -> Path | None:
    """The output folder that a model/ or adapter/ lies in, if it is a run's."""
    return folder.parent if (folder.parent / "run.yaml").exists() else None


def base_of(adapter: Path) -> str:
    """The base that an adapter was made on. Raises UserError if it names none, or one that is not there any more."""
    base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise UserError(f"{adapter}/adapter_config.json names no base; give it: --model BASE --adapter {adapter}")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(f"{base}, the base of {adapter}, is not there any more; give --model BASE --adapter {adapter}")
    return base


def read_settings(run: Path | None) -> dict[str, Any]:
    """The settings of a run; {} without one."""
    if run is None:
        return {}
    try:
        settings = yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise UserError(f"{run}/run.yaml is not readable ({error}); restore it, or use --model and --adapter") from None
    return settings if isinstance(settings, dict) else {}
