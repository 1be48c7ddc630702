"""A tiny random model in the hub's original config and tensor layout, for tests and lessons.

It is a checkpoint folder like any other: config.json, safetensors, a tokenizer, a picture processor where the family
has one. With the tokenizer files of a real model the vocabulary and the special ids are that model's; without, a
byte-level tokenizer (256 bytes and the family's special tokens, no merges) is made here. Under 1 MB and a second, the
embedding of a real vocabulary aside (151,936 words x 64 x 4 bytes = 39 MB).
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

from data.errors import UserError
from model.family import Family, families, find_family
from model.load import copy_companions, write_weights


def write_tiny(
    name: str, folder: str | Path, tokenizer: str | Path | None = None, vocab_size: int | None = None, seed: int = 0
) -> Family:
    """Write a tiny random model of the family `name` into a new folder; a pure function of its arguments.

    tokenizer is a folder whose files are copied (its config.json and weights are not). Raises UserError for an unknown
    family, a folder with something in it, and a vocabulary smaller than the tokenizer's.
    """
    family_class = next((c for c in families() if c.name == name), None)
    if family_class is None:
        raise UserError(f"no family {name!r}; known are {', '.join(sorted(c.name for c in families()))}")
    folder = Path(folder)
    refuse_used(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        part = Path(scratch) / "model"  # complete or absent, as every output
        if tokenizer is not None:
            copy_companions(Path(tokenizer), part)
        else:
            part.mkdir()
            write_byte_tokenizer(family_class, part)
        for file, content in family_class.tiny_files().items():
            if file == "config.json" or not (part / file).exists():
                write_json(part / file, content)
        set_vocabulary(find_family(part), vocab_size)
        family = find_family(part)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            write_weights(family.build(), family, part)
        os.replace(part, folder)
    return find_family(folder)


def refuse_used(folder: Path) -> None:
    """UserError unless a folder is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder; name a new one")


def write_byte_tokenizer(family_class: type[Family], folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of 256 byte tokens and the family's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in family_class.tiny_tokens])
    backend.save(str(folder / "tokenizer.json"))
    config = family_class.tiny_files()["config.json"]
    ids = config | config.get("text_config", {})
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": list(family_class.tiny_tokens),
        "eos_token": ids["eos_token_id"],
        "pad_token": ids["bos_token_id"],
        "chat_template": family_class.tiny_template,
    }
    write_json(folder / "tokenizer_config.json", settings)


def set_vocabulary(family: Family, vocab_size: int | None) -> None:
    """Put the ids of the special tokens and the vocabulary's size (a multiple of 64, if not given) into config.json."""
    tokenizer, config = family.tokenizer, family.config
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    if vocab_size is not None and vocab_size < num_tokens:
        raise UserError(f"--vocab_size {vocab_size}: the tokenizer has {num_tokens} tokens; give at least as many")
    known, text = tokenizer.get_vocab(), config.get("text_config", config)
    for part in (config, text):
        for key, token in part.items():
            if isinstance(token, str) and key.endswith("_token_id"):
                if token not in known:
                    raise UserError(f"the tokenizer lacks {token}, the {key} of {family.name}; give one of that family")
                part[key] = known[token]
    text["vocab_size"] = vocab_size or -(-num_tokens // 64) * 64
    write_json(family.folder / "config.json", config)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_whole(source: Path, folder: Path) -> list[str]:
    """Copy a model folder, its safetensors and every other file but weights in other formats, into a new one.

    Each copied weight file is compared with its source byte by byte. Returns the names of the weight files.
    """
    import filecmp

    from model.shards import INDEX, Shards

    refuse_used(folder)
    weights = Shards(source).files() + [INDEX] * (source / INDEX).exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        part = Path(scratch) / "model"
        copy_companions(source, part)
        for name in weights:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, part / name)
            if not filecmp.cmp(source / name, part / name, shallow=False):
                raise UserError(f"{folder}: the copy of {source / name} differs from it; look at the disk")
        os.replace(part, folder)
    return weights
