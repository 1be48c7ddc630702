"""`python -m data make`: data sets that are drawn. `python -m data demo_base`: the base of the built-in task.

    python -m data make countdown --num 10000 --numbers 3 4 --output_dir data/raw/countdown --with_answers
    python -m data demo_base --output_dir runs/demo_base

The base is made from random weights by this trainer alone, in four lessons. Each is a whole run of train.py (all weights,
AdamW) on screens of its own that starts from the weights of the lesson before: reading one word, finding one of two or
three buttons in four cells, a whole screen, and a screen with text fields in any row. A lesson's rows are drawn before it
and removed after it; one that is finished is not run again.
"""

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError, command
from data.make import add_flags, make_countdown


@dataclass
class Lesson:
    """A task of data/demo.py, with the updates, screens an update and learning rate that teach it."""

    task: str
    steps: int
    screens: int
    rate: float


LESSONS = [Lesson("cell", 150, 32, 2e-3), Lesson("piece", 900, 64, 1.5e-3), Lesson("screen", 600, 48, 1.5e-3),
           Lesson("base", 900, 48, 1.5e-3)]  # fmt: skip
HELD_OUT = 400
SETTINGS = [
    "--weight_decay", "0.05", "--adam_beta2", "0.95", "--epochs", "1", "--save_every", "200", "--eval_every", "no",
    "--no_gradient_checkpointing", "--predict_with_generate", "--eval_task", "demo", "--max_new_tokens", "24",
    "--resume", "yes",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data", description="Data sets of the project's own.")
    doors = parser.add_subparsers(dest="door", required=True)
    base = doors.add_parser("demo_base", help="make the built-in task's base again, from random weights")
    base.add_argument("--output_dir", required=True, metavar="DIR", help="a folder for each lesson goes here")
    base.add_argument("--share", type=float, default=1.0, metavar="X", help="of the updates of every lesson (1.0)")
    base.add_argument("--device", default="auto", help="auto, cpu or cuda")
    add_flags(doors.add_parser("make", help="draw a data set: Countdown problems with exact answers"))
    flags = parser.parse_args()
    if flags.door == "make":
        make_countdown(flags)
    else:
        make_base(Path(flags.output_dir), flags.share, flags.device)


def make_base(folder: Path, share: float, device: str) -> None:
    """Run the lessons; the last one's model/ is the base. Raises UserError where a lesson ends with an error."""
    weights = folder / "random"
    if not weights.exists():
        write_random(weights)
    for number, lesson in enumerate(LESSONS, 1):
        run, rows = folder / f"{number}-{lesson.task}", folder / f"{number}-rows"
        if not (run / "model").exists():
            train(lesson, weights, run, rows, max(1, round(share * lesson.steps)), device)
            shutil.rmtree(rows)
        weights = run / "model"
    print(f"the base is {weights}")


def write_random(folder: Path) -> None:
    """The base's files with weights from N(0, 0.06^2), biases 0, norms 1."""
    import torch

    from data.demo import make_base_files
    from model.family import find_family
    from model.load import write_weights

    make_base_files(folder)
    torch.manual_seed(0)
    family = find_family(folder)
    net = family.build()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.06)
            else:
                parameter.fill_(1.0 if "norm" in name or "ln_q" in name else 0.0)
    write_weights(net.to(torch.bfloat16), family, folder)


def train(lesson: Lesson, weights: Path, run: Path, rows: Path, steps: int, device: str) -> None:
    """One lesson: draw its screens, every one new, and train on each once."""
    from data.demo import make_rows

    shutil.rmtree(rows, ignore_errors=True)
    path = make_rows(rows, lesson.task, steps * lesson.screens)
    held_out = make_rows(rows, lesson.task, HELD_OUT, split="held_out", name="held_out")
    arguments = ["--base_model", weights, "--data_path", path, "--eval_path", held_out, "--output_dir", run]
    arguments += ["--batch_size", lesson.screens, "--learning_rate", lesson.rate, "--device", device, *SETTINGS]
    program = Path(__file__).parent.parent / "train.py"
    done = subprocess.run([sys.executable, str(program), *map(str, arguments)])
    if done.returncode:
        raise UserError(f"lesson {lesson.task} ended with exit code {done.returncode}; the same command goes on from there")


if __name__ == "__main__":
    command(main)
