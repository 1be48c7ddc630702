"""python -m lora merge: an adapter and its base become one model folder, which any tool opens as it opens the base."""

import argparse
import sys

from data.errors import command


def main() -> None:
    from training.options import Parser

    parser = Parser(prog="python -m lora", description="Work on adapters.")
    commands = parser.add_subparsers(dest="command", required=True)
    about = "merge an adapter into the 16-bit weights of its base"
    merge = commands.add_parser("merge", help=about, description=about, allow_abbrev=False)
    merge.add_argument("--base_model", required=True, metavar="DIR", help="folder or hub id of the unquantised base")
    merge.add_argument("--adapter", required=True, metavar="DIR", help="folder with adapter_config.json")
    merge.add_argument("--output_dir", required=True, metavar="DIR", help="a new folder")
    merge.add_argument("--data_path", metavar="FILE", help="held-out rows to compare merged and adapter on")
    merge.add_argument("--image_root", metavar="DIR", help="folder that the rows' picture paths are relative to")
    merge.add_argument("--tool_template", default="none", choices=("none", "qwen"), help="for the rows' tools, as in train.py")
    merge.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where the comparison runs")
    run_merge(parser.parse_args(sys.argv[1:]))


def run_merge(flags: argparse.Namespace) -> None:
    """Merge, say what was done, compare where there are rows for it."""
    from pathlib import Path

    from data.records import open_records
    from lora.merge import merge, write_record
    from model import options_of, resolve

    base, adapter, output = resolve(flags.base_model), Path(flags.adapter), Path(flags.output_dir)
    if flags.data_path is not None:
        open_records(flags.data_path, flags.image_root)  # a wrong path is said before the merge
    record = merge(base, adapter, output)
    entry = record["merged"][-1]
    print(f"merged {len(entry['tensors'])} tensors of {adapter} into {base}, scale {entry['scale']:g}: {output}")
    if flags.data_path is None:
        print("pass --data_path FILE with held-out rows to compare the merged model with the adapter")
        return
    from lora.compare import compare, report_text
    from training.memory import check_device

    image_root = None if flags.image_root is None else Path(flags.image_root)
    entry["report"] = compare(base, adapter, output, Path(flags.data_path), image_root, check_device(flags.device),
                              options_of(vars(flags)))
    write_record(output, record)
    print(report_text(entry["report"]))


if __name__ == "__main__":
    command(main)
