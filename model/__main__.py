"""`python -m model inspect | tiny | save_initial`: look at a checkpoint, make a tiny one, keep the untouched base.

inspect and save_initial read config.json and the headers of the shards and build the network on the meta device: names,
shapes and sizes of a 70 B model take a second or two and no memory.
"""

import argparse
from pathlib import Path

from data.errors import UserError, command
from training.options import Parser


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and run one of the three commands."""
    parser = Parser(prog="python -m model", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    inspecting = commands.add_parser("inspect", help="what a model folder holds and how much memory it takes")
    inspecting.add_argument("folder", metavar="DIR", help="a model folder or a hub id")
    tiny = commands.add_parser("tiny", help="write a tiny random model in the original config and tensor layout")
    tiny.add_argument("family", metavar="FAMILY", help="a family of model/families, such as qwen2 or qwen2_5_vl")
    tiny.add_argument("folder", metavar="OUT", help="the new model folder")
    tiny.add_argument("--tokenizer", metavar="DIR", help="a folder whose tokenizer and processor files are copied")
    tiny.add_argument("--vocab_size", type=int, metavar="N", help="rows of the embedding (as the tokenizer needs)")
    tiny.add_argument("--seed", type=int, default=0, metavar="N", help="of the random weights (0)")
    saving = commands.add_parser("save_initial", help="copy an untouched base model, whole and checked")
    saving.add_argument("--base_model", required=True, metavar="ID", help="a model folder or a hub id")
    saving.add_argument("--output_dir", required=True, metavar="DIR", help="the new folder")
    flags = parser.parse_args(arguments)
    if flags.command == "inspect":
        inspect(flags.folder)
    elif flags.command == "tiny":
        write(flags)
    else:
        save_initial(flags.base_model, flags.output_dir)


def inspect(name: str) -> None:
    """Print family, tensors, parameters by part, tokenizer and memory of a checkpoint; UserError if it is not whole."""
    from model import resolve

    folder = resolve(name)
    family, net, shards = open_checkpoint(folder)
    from model.load import is_tied

    parts: dict[str, int] = {}
    for parameter, tensor in net.named_parameters():
        part = family.part_of(parameter)
        parts[part] = parts.get(part, 0) + tensor.numel()
    dtypes: dict[str, int] = {}
    for _, dtype in shards.headers().values():
        dtypes[dtype] = dtypes.get(dtype, 0) + 1
    files = [f"{file} ({(folder / file).stat().st_size / 2**30:.2f} GiB)" for file in shards.files()]
    lines = {
        "family": f"{family.name} ({type(net).__name__})",
        "parameters": f"{sum(parts.values()):,} = " + " + ".join(f"{n:,} {part}" for part, n in parts.items()),
        "tensors": f"{len(shards.file_of)}: " + ", ".join(f"{n} {dtype}" for dtype, n in dtypes.items()),
        "files": ", ".join(files),
        "head": "tied to the input embedding" if is_tied(net) else "its own",
        "tokenizer": find_tokenizer(folder),
        "template": find_template(folder),
        "pictures": "taken" if "vision" in family.parts else "none",
        "LoRA targets": f"{', '.join(family.lora_targets)} in {', '.join(family.lora_parts)}",
        "weights, GiB": ", ".join(f"{gib:.2f} {quant}" for quant, gib in weight_gib(family, net).items()),
    }
    for key, value in lines.items():
        print(f"{key:14}{value}")


def open_checkpoint(folder: Path):
    """(family, network on meta, shards) of a folder whose headers fit its config.json, else UserError."""
    from model.family import find_family
    from model.load import build_on_meta, check_tensors
    from model.shards import Shards

    family, shards = find_family(folder), Shards(folder)
    net = build_on_meta(family)
    check_tensors(net, family, shards)
    return family, net, shards


def present(folder: Path, *names: str) -> str | None:
    """The names joined, if the folder has all of these files."""
    return " + ".join(names) if all((folder / name).is_file() for name in names) else None


def find_tokenizer(folder: Path) -> str:
    """The tokenizer's files, in the order in which they are looked for (tokenizer.model is GLM's)."""
    kinds = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
    return next(filter(None, (present(folder, *names) for names in kinds)), "none found")


def find_template(folder: Path) -> str:
    """Where the chat template is, in the order in which it is looked for."""
    from model.files import read_json

    if found := present(folder, "chat_template.jinja") or present(folder, "chat_template.json"):
        return found
    settings = read_json(folder / "tokenizer_config.json") if present(folder, "tokenizer_config.json") else {}
    return "in tokenizer_config.json" if settings.get("chat_template") else "none found"


def weight_gib(family, net) -> dict[str, float]:
    """GiB of the weights as "16-bit", "8-bit" and "4-bit" load them; what is not quantised stays 16-bit."""
    from model.load import quantized_names
    from training.memory import QUANTISED_BYTES

    num_all = sum(p.numel() for p in net.parameters())
    num_quantized = sum(net.get_submodule(name).weight.numel() for name in quantized_names(family, net))
    widths = {"16-bit": 2.0, "8-bit": QUANTISED_BYTES["int8"], "4-bit": QUANTISED_BYTES["nf4"]}
    return {name: (2 * (num_all - num_quantized) + width * num_quantized) / 2**30 for name, width in widths.items()}


def write(flags: argparse.Namespace) -> None:
    """Make a tiny model and say what it is."""
    from model.tiny import write_tiny

    if flags.tokenizer is not None and not Path(flags.tokenizer).is_dir():
        raise UserError(f"--tokenizer {flags.tokenizer}: no such folder")
    family = write_tiny(flags.family, flags.folder, flags.tokenizer, flags.vocab_size, flags.seed)
    print(f"{flags.folder}: a random {family.name}, {family.text_config['vocab_size']} words, seed {flags.seed}")


def save_initial(name: str, output: str) -> None:
    """Copy a base model before anything is trained on it; its headers are checked, its copied shards compared."""
    from model import resolve
    from model.tiny import copy_whole

    source = resolve(name)
    open_checkpoint(source)
    weights = copy_whole(source, Path(output))
    print(f"{output}: {name} as it stands, {', '.join(weights)} compared byte by byte")


if __name__ == "__main__":
    command(main)
