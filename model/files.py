"""The JSON and tokenizer files of a model folder, read so that a broken one is named and none runs code."""

import json
from collections.abc import Sequence
from pathlib import Path

from data.errors import UserError


def read_json(path: Path, needed: Sequence[str] = ()) -> dict:
    """A JSON object from a file. Raises UserError naming the file, and what it lacks of the needed keys."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = sorted(p.name for p in path.parent.glob("*"))[:8] if path.parent.is_dir() else "no such folder"
        raise UserError(f"{path}: not found (in the folder: {found}); give the folder of a model as downloaded") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__} where a JSON object is expected")
    if missing := [key for key in needed if key not in value]:
        raise UserError(f"{path}: lacks {', '.join(missing)}; download it again")
    return value


def read_tokenizer(folder: Path):
    """A fast tokenizer from tokenizer.json exactly as it stands (AutoTokenizer rebuilds some pipelines wrongly), or from
    vocab.json + merges.txt by Qwen's rules. Special tokens and chat template come from tokenizer_config.json."""
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    settings = read_json(folder / "tokenizer_config.json")
    if "auto_map" in settings:
        print(f"note: {folder}/tokenizer_config.json asks for code from its repository (auto_map); it is not run")
    try:
        if (folder / "tokenizer.json").exists():
            names = ("bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens", "chat_template")
            kept = {name: settings[name] for name in names if settings.get(name) is not None}
            return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **kept)
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            return Qwen2Tokenizer.from_pretrained(str(folder))
    except Exception as error:  # the tokenizers library raises nothing more exact
        raise UserError(f"{folder}: tokenizer.json (or vocab.json, merges.txt) is damaged ({error}); get it again") from None
    raise UserError(f"{folder}: holds neither tokenizer.json nor vocab.json + merges.txt; download the tokenizer files too")


def check_ids(largest: int, vocab_size: int, folder: Path) -> None:
    """UserError for a token, the largest of some, that the model's embedding has no row for."""
    if largest >= vocab_size:
        raise UserError(
            f"token {largest} of {folder}'s tokenizer is none of the {vocab_size} that its config.json counts (vocab_size); "
            "take the tokenizer files and the weights from one model"
        )
