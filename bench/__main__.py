"""`python -m bench train`: the same training work by this project and by what a user would take instead; `gpu`: on a card."""

import argparse
from pathlib import Path

from data.errors import command


def main() -> int:
    """Read the command line and run the measurement."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="one workload through every variant, losses compared; prints a table a group")
    train.add_argument("--rounds", type=int, default=3, metavar="N", help="how often each variant runs; medians count (3)")
    train.add_argument("--steps", type=int, default=10, metavar="N", help="updates of 8 rows; the first is not timed (10)")
    train.add_argument("--only", nargs="+", default=[], metavar="NAME", help="groups and variants to run (all)")
    train.add_argument("--quick", action="store_true", help="a tiny model, one round of three steps: does everything run?")
    gpu = commands.add_parser("gpu", help="all that only a card can show; bench/gpu.sh calls it")
    gpu.add_argument("--seconds", type=float, default=500, metavar="S", help="what all parts together get (500)")
    gpu.add_argument("--only", nargs="+", default=[], metavar="PART", help="parts to run (all)")
    gpu.add_argument("--output", type=Path, default=Path("outputs/gpu.jsonl"), metavar="FILE", help="rows are appended to it")
    gpu.add_argument("--dry", action="store_true", help="on the processor, with tiny models: does everything run?")
    flags = parser.parse_args()
    if flags.command == "gpu":
        from bench import gpu as on_card

        return on_card.run(flags.seconds, flags.only, flags.output, flags.dry)
    from bench.train import run

    rounds, steps = (1, 3) if flags.quick else (flags.rounds, flags.steps)
    return run(rounds, max(2, steps), flags.only, flags.quick)


if __name__ == "__main__":
    command(main)
