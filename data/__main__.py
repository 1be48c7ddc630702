"""`python -m data`: rows checked, shown, fetched, converted, made.

    python -m data check --base_model DIR --data_path ROWS   every row and picture, before a run; flags and YAML of train.py
    python -m data show --base_model DIR --data_path ROWS    some rows as the model gets them; the same
    python -m data download NAME                                       a data set of the recipes, into data/raw/NAME
    python -m data convert guicourse --input_dir DIR --output_dir DIR  GUICourse's published files as rows
    python -m data make countdown --num N --output_dir DIR             Countdown problems with exact answers
    python -m data make preferences --model DIR --prompts FILE --reward NAME --output_dir DIR   pairs of its own answers
    python -m data demo --rows N --output_dir DIR                      rows of the built-in task, and how to train on them
    python -m data demo_base --output_dir DIR                          the base of the built-in task, from random weights

The base takes five lessons, each a whole run of train.py (all weights, AdamW) on screens of its own that starts from the
weights of the lesson before: reading one word, finding one of two or three buttons in four cells, a whole screen, a screen
with text fields in any row, and one with buttons to read in any row. A lesson's rows are drawn before it and removed after
it; one that is finished is not run again.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from data import convert, download, make
from data.errors import UserError, command
from eval import preferences
from stages import list_stages
from training.config import Config, add_settings, settle_all
from training.options import Parser


@dataclass
class Lesson:
    """A task of data/demo.py, with the updates, screens an update and learning rate that teach it."""

    task: str
    steps: int
    screens: int
    rate: float


LESSONS = [Lesson("cell", 150, 32, 2e-3), Lesson("piece", 900, 64, 1.5e-3), Lesson("screen", 600, 48, 1.5e-3),
           Lesson("base", 900, 48, 1.5e-3), Lesson("read", 400, 48, 1e-3)]  # fmt: skip
HELD_OUT = 400
SETTINGS = [
    "--weight_decay", "0.05", "--adam_beta2", "0.95", "--epochs", "1", "--save_every", "200", "--eval_every", "no",
    "--no_gradient_checkpointing", "--predict_with_generate", "--eval_task", "demo", "--max_new_tokens", "24",
    "--resume", "yes",
]  # fmt: skip


def main() -> int | None:
    parser = Parser(prog="python -m data", description="Rows checked, shown, fetched, converted, made.")
    doors = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text, add_flags, run in (
        ("check", "look at every row and picture as training will", add_check_flags, check_rows),
        ("show", "print some rows as the model gets them, and write show.html", add_show_flags, show_rows),
        ("download", "fetch a data set of the recipes", download.add_flags, download.run),
        ("convert", "make rows of the files that GUICourse's authors publish", convert.add_flags, convert.run),
        ("make", "make a data set: Countdown problems, or pairs of a model's own answers", add_made, None),
        ("demo", "write rows of the built-in task, and its held-out rows", add_demo_flags, make_demo_rows),
        ("demo_base", "make the built-in task's base again, from random weights", add_base_flags, make_base),
    ):
        door = doors.add_parser(name, help=text, description=text, allow_abbrev=False)
        add_flags(door)
        if run:
            door.set_defaults(run=run)
    flags = parser.parse_args()
    return flags.run(flags)


def add_made(parser: argparse.ArgumentParser) -> None:
    """The data sets that `python -m data make` makes."""
    names = parser.add_subparsers(required=True, metavar="NAME")
    for name, text, add_flags, run in (
        ("countdown", "Countdown problems with exact answers", make.add_flags, make.make_countdown),
        ("preferences", "pairs of a model's own answers, by a reward", preferences.add_flags, preferences.make_preferences),
    ):
        door = names.add_parser(name, help=text, description=text)
        add_flags(door)
        door.set_defaults(run=run)


# ---- checking and showing ---------------------------------------------------------------------------------------------

SHOWN = {  # of train.py's settings, by --help; "": as there
    "base_model": "", "data_path": "", "output_dir": "what is written goes here (default: check/ in the output_dir of the run)",
    "stage": "take the rows of this stage alone; default: rows of every kind", "config": "", "max_pixels": "",
    "max_length": "positions of one example at most, pictures included (default auto: any number)", "max_text_length": "",
    "num_workers": "processes that look at rows and decode pictures (default 2)", "box_format": "", "labels": "",
    "tool_template": "", "image_root": "", "allow_outside_images": "", "prompt_template": "", "response_template": "",
    "image_column": "",
    "on_bad_row": "show: end at a row that cannot be used, or leave it out (default stop); check lists them all",
}  # fmt: skip


def add_check_flags(parser: Parser) -> None:
    """All settings of train.py, so that its own command line can be given; --help shows those that rows depend on."""
    parser.set_defaults(said=[])
    parser.epilog = "Every other flag of train.py is taken too, and changes nothing here."
    for name, flag in add_settings(parser, stage_flags()).items():
        flag.help = SHOWN.get(name, argparse.SUPPRESS) or flag.help


def check_rows(flags: argparse.Namespace) -> int:
    """Look at all rows and say what they are; returns 1 if there is a problem with one, else 0."""
    config, takes, folder = read_settings(flags)
    from data.check import check
    from data.check_page import page

    config.on_bad_row = "skip"
    family, records = open_family_and_rows(config, takes, keep_index=False)
    survey = check(records, family, folder, config.length_limit, config.max_text_length, config.num_workers)
    print(page(survey, shutil.get_terminal_size((160, 40)).columns, folder / "bad_rows.jsonl"))
    return 1 if survey.bad else 0


def add_show_flags(parser: Parser) -> None:
    add_check_flags(parser)
    parser.add_argument("--rows", default="3", metavar="N|NAMES", help="how many, from the longest to the shortest, or which: "
                        "their ids, or places such as rows.jsonl:17, commas between (default 3)")  # fmt: skip


def show_rows(flags: argparse.Namespace) -> None:
    """Print rows with their tokens marked, and write the page. Raises UserError for what cannot be opened or encoded."""
    config, takes, folder = read_settings(flags)
    from data.explain import explain_rows
    from data.rows import measure_rows
    from training.page import write_page
    from training.show import CSS, choose_rows, encode_row, page_sections

    family, records = open_family_and_rows(config, takes)
    if not len(records):
        records.refuse()
    if records.bad:
        print(f"left out: {records.refusal()}")
    rows = []
    for index in choose_rows(records, measure_rows(records, config, family), flags.rows):
        try:
            rows.append((records[index], encode_row(family, records[index])))
        except UserError as error:
            if config.on_bad_row == "stop":
                raise
            print(f"left out: {error}")
    print(explain_rows([examples for _, examples in rows], family.tokenizer, 4000 * len(rows)))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "show.html"
    write_page(path, "Rows as the model gets them", page_sections(family, rows), CSS)
    print(f"page {path}")


def stage_flags() -> dict[str, type]:
    return {name: module.Flags for name, module in list_stages().items()}


def read_settings(flags: argparse.Namespace) -> tuple[Config, Collection[str], Path]:
    """The settings as train.py would have them, the kinds of row that are taken, and the folder to write into."""
    from data.records import KINDS

    config, said = settle_all(flags.said, stage_flags())
    if config.demo and config.data_path is None:
        raise UserError("--demo draws its rows when a run begins; python -m data demo writes some to look at")
    takes = list_stages()[config.stage].Stage.takes if "stage" in said else KINDS
    given = any(flag.key == "output_dir" for flag in flags.said)
    return config, takes, Path(config.output_dir) / ("" if given else "check")


def open_family_and_rows(config: Config, takes: Collection[str], keep_index: bool = True):
    """The base model's family, without its weights, and the rows as it takes them."""
    from data.records import open_records
    from data.rows import reading
    from model import open_family

    family = open_family(config.base_model, vars(config))
    _ = family.tokenizer  # where it is missing, that is one fault of the folder and not one of every row
    rules = reading(vars(config), family, takes)
    return family, open_records(config.data_path, on_bad_row=config.on_bad_row, keep_index=keep_index, **rules)


# ---- the built-in task ------------------------------------------------------------------------------------------------


def add_demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, required=True, metavar="N",
                        help="rows of the new task, of which the old one is a part")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the screens (0)")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="DIR/rows is emptied and filled")


def make_demo_rows(flags: argparse.Namespace) -> None:
    """The demo's rows as `python train.py` draws them, and the command that trains on them. UserError for no rows."""
    from data.demo import make_demo

    if flags.rows < 1:
        raise UserError(f"--rows {flags.rows}: at least one row is needed to train on")
    folder = Path(flags.output_dir)
    train, new, old = make_demo(folder / "rows", flags.rows, flags.seed)
    print(f"python train.py --base_model data/demo_base --data_path {train} --eval_path {new},{old} --output_dir "
          f"{folder / 'run'} --use_lora --seed {flags.seed} --eval_task demo --predict_with_generate --eval_every no")


def add_base_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="a folder for each lesson goes here")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def make_base(flags: argparse.Namespace) -> None:
    """Run the lessons; the last one's model/ is the base. Raises UserError where a lesson ends with an error."""
    folder = Path(flags.output_dir)
    weights = folder / "random"
    if not weights.exists():
        write_random(weights)
    for number, lesson in enumerate(LESSONS, 1):
        run, rows = folder / f"{number}-{lesson.task}", folder / f"{number}-rows"
        if not (run / "model").exists():
            train(lesson, weights, run, rows, flags.device)
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


def train(lesson: Lesson, weights: Path, run: Path, rows: Path, device: str) -> None:
    """One lesson: draw its screens, every one new, and train on each once."""
    from data.demo import make_rows

    shutil.rmtree(rows, ignore_errors=True)
    path = make_rows(rows, lesson.task, lesson.steps * lesson.screens)
    held_out = make_rows(rows, lesson.task, HELD_OUT, split="held_out", name="held_out")
    arguments = ["--base_model", weights, "--data_path", path, "--eval_path", held_out, "--output_dir", run]
    arguments += ["--batch_size", lesson.screens, "--learning_rate", lesson.rate, "--device", device, *SETTINGS]
    program = Path(__file__).parent.parent / "train.py"
    done = subprocess.run([sys.executable, str(program), *map(str, arguments)])
    if done.returncode:
        raise UserError(f"lesson {lesson.task} ended with exit code {done.returncode}; the same command goes on from there")


if __name__ == "__main__":
    command(main)
