"""`python -m eval`: score a model on rows. `python -m eval ask`: put one question to it, or talk with it.

    python -m eval --model DIR --data_path rows.jsonl --task box
    python -m eval ask --model DIR --image screen.png --draw answer.png "where is the search field?"

DIR is a model folder, a merged folder, a run's output folder or an adapter folder. A row that no metric can judge is
listed and counted, and the command fails only where no row could be scored.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.boxes import FORMATS
from data.errors import UserError, command
from training.options import Parser

TEMPLATE_FLAGS = ("prompt_template", "response_template", "image_column")
PROBLEMS_SHOWN = 3
SAMPLING = ("num_samples", "temperature", "top_p", "top_k", "min_p", "seed")
RULES = "countdown, cs224r, tinyzero, box_centre, box_iou, gui_action, tool_call, text"  # eval/rewards.py has them


def main() -> int | None:
    """Read the command line and run one of the two commands."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["ask"]:
        return ask(ask_parser().parse_args(arguments[1:]))
    return score(score_parser().parse_args(arguments))


def score_parser() -> Parser:
    """Flags of `python -m eval`."""
    tasks = ", ".join(sorted(path.stem for path in (Path(__file__).parent / "tasks").glob("[!_]*.py")))
    parser = Parser(
        prog="python -m eval", description="Score a model's answers to the rows of a file.",
        epilog="python -m eval ask --help: one question, or a dialogue.", allow_abbrev=False,
    )
    add_model_flags(parser)
    parser.add_argument("--data_path", required=True, metavar="ROWS", help="rows, as for train.py; the last answer of each is "
                        "its label")
    parser.add_argument("--task", default="auto", help=f"{tasks}, or module:function of yours (default auto: by label)")
    parser.add_argument("--image_root", metavar="DIR", help="folder of the pictures; default: the rows' folder")
    for name in TEMPLATE_FLAGS:
        parser.add_argument(f"--{name}", metavar="TEXT", help="as in train.py, for rows of a table; default: as trained")
    parser.add_argument("--on_bad_row", choices=("stop", "skip"), default="stop", help="what a broken row does (stop)")
    parser.add_argument("--output_dir", metavar="DIR", help="where outputs/TASK.jsonl and TASK.json go; default: eval/ "
                        "in the run's folder, else the current folder")
    parser.add_argument("--max_new_tokens", type=positive, metavar="N", help="longest answer; default: the task's")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N rows")
    parser.add_argument("--batch_tokens", type=positive, default=16384, metavar="N", help="positions at once (16384)")
    add_sampling_flags(parser)
    judge = parser.add_argument_group("judging")
    judge.add_argument("--reward", metavar="NAME", help=f"score answers by this instead of by the task's metrics: {RULES}; "
                       "the folder of a reward model; MODEL@URL of an OpenAI-compatible server, its key in REWARD_API_KEY; "
                       "module:function of yours; for win_rate also pairwise:MODEL@URL")  # fmt: skip
    judge.add_argument("--against", metavar="DIR", help="win_rate, preference: the other model, or the .jsonl of its lines")
    judge.add_argument("--requests_per_minute", type=positive, default=40, metavar="N", help="to a server at most (40)")
    return parser


def add_sampling_flags(parser: Parser) -> None:
    """How answers are drawn; a default of None is what the task's figures are published with, else one greedy answer."""
    add = parser.add_argument_group("sampling (default: one greedy answer; countdown: 16, 0.6, 0.95, 20)").add_argument
    add("--num_samples", type=positive, metavar="K", help="answers to each row")
    add("--temperature", type=share(100), metavar="T", help="0 takes the likeliest token")
    add("--top_p", type=share(1), metavar="P", help="only the likeliest tokens that together reach P")
    add("--top_k", type=int, metavar="K", help="only the K likeliest tokens; 0 or -1: all")
    add("--min_p", type=share(1), metavar="P", help="only tokens at least P times as likely as the likeliest")
    add("--seed", type=int, metavar="S", help="another seed, other answers (0)")


def share(most: float) -> Callable[[str], float]:
    """A flag's type: a number from 0 to `most`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is no number from 0 to {most:g}")
        return value

    return number


def ask_parser() -> Parser:
    """Flags of `python -m eval ask`."""
    parser = Parser(
        prog="python -m eval ask", description="Ask a model one question, or talk with it.", allow_abbrev=False
    )
    add_model_flags(parser)
    parser.add_argument("prompt", nargs="?", help="the question, <image> where the picture stands (default: in front); "
                        "without one, a line of standard input at a time")
    parser.add_argument("--image", metavar="FILE", help="picture of the first question")
    parser.add_argument("--system", metavar="TEXT", help="system turn, where the training rows had one")
    parser.add_argument("--tools", metavar="FILE", help="JSON list of tools, as in the training rows")
    parser.add_argument("--draw", metavar="OUT.png", help="write the picture with the answer's box on it")
    parser.add_argument("--box_scale", choices=("pixels", "thousandths"), help="what the answer's boxes count: pixels of the "
                        "picture as the model sees it, or thousandths; default: what the model was taught")
    parser.add_argument("--max_new_tokens", type=positive, default=512, metavar="N", help="longest answer (512)")
    return parser


def add_model_flags(parser: Parser) -> None:
    """What both commands say about the model; a default of None is what the run was trained with."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="model, merged, run or adapter folder, or a hub id")
    add("--adapter", metavar="DIR", help="adapter folder on top of --model")
    add("--quant", choices=("8bit", "4bit", "none"), help="bits the base is held in; default: as trained")
    add("--max_pixels", type=positive, metavar="N", help="pixels of one picture at most; default: as trained")
    add("--box_format", choices=FORMATS.split(), help="what boxes of rows and questions count, as in train.py; default: as "
        "trained")
    add("--tool_template", choices=("none", "qwen"), help="render tools where the model's template cannot; default: as trained")
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), help="computing type; default: as trained")
    add("--device", default="auto", help="auto, cpu or cuda; auto: the CUDA card if there is one")


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def open_model(flags: argparse.Namespace):
    """The subject that the model flags name."""
    return open_one(flags, flags.model, flags.adapter)


def open_one(flags: argparse.Namespace, name: str, adapter: str | None = None):
    """A model, opened with the settings that the flags override."""
    from eval.subject import open_subject

    return open_subject(name, adapter, flags.quant, flags.max_pixels, flags.precision, flags.device, flags.box_format,
                        flags.tool_template)


def score(flags: argparse.Namespace) -> None:
    """`python -m eval`. Raises UserError for what cannot be opened, and where no row could be scored."""
    from data.records import open_records
    from data.rows import reading
    from eval.subject import choose_settings, find
    from eval.tasks import find_task
    from model import open_family

    task = find_task(flags.task)
    if flags.against and not task.compares:
        raise UserError(f"--against names a model to compare with, which --task {flags.task} does not do; leave it out")
    if not task.metrics and not task.measure and not (flags.reward and flags.against):
        raise UserError(f"--task {flags.task} needs a judge, --reward, and another model, --against")
    if task.measure and flags.reward:
        raise UserError(f"--reward scores answers, and --task {flags.task} asks for none; leave it out")
    place = find(flags.model, flags.adapter)
    run, settings = place.run, choose_settings(place.run, **vars(flags))
    rules = reading(settings, open_family(place.base, settings))
    records = open_records(flags.data_path, on_bad_row=flags.on_bad_row, **rules)
    if records.bad:
        print(f"skipped {len(records.bad)} of {len(records) + len(records.bad)} rows")
    folder = Path(flags.output_dir or (run / "eval" if run else ".")) / "outputs"
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {flags.output_dir}: cannot be written ({error.strerror})") from None
    name = flags.task.rpartition(":")[2]
    chosen = [records[i] for i in range(min(len(records), flags.limit or len(records)))]
    if flags.reward:
        how = {"folder": folder, "requests_per_minute": flags.requests_per_minute, "device": flags.device}
        task = replace(task, metrics=[task.judged(flags.reward, **how)])
    sampling = task.sampling | {key: getattr(flags, key) for key in SAMPLING if getattr(flags, key) is not None}
    if sampling.get("num_samples", 1) > 1 and not sampling.get("temperature"):
        raise UserError("--num_samples draws several answers, which are all the same at temperature 0; give --temperature")
    task = replace(task, max_new_tokens=flags.max_new_tokens or task.max_new_tokens, sampling=sampling)
    if flags.against:  # it answers before this one is loaded: they are never in memory together
        task = replace(task, others=other_lines(flags, chosen, task, folder / f"{name}.against.jsonl"))
    path = folder / f"{name}.jsonl"
    result = answer_rows(open_model(flags), chosen, task, flags, path, records.bad)
    problems = records.bad + [line for line in result.lines if "problem" in line]
    num_problems = len(records.bad) + result.figures["num_problems"]
    figures = result.figures | {"num_rows": len(chosen) + len(records.bad), "num_problems": num_problems}
    asked = {key: getattr(flags, key) for key in ("task", "model", "adapter", "reward", "against")}
    summary = asked | {"data": flags.data_path, "sampling": sampling} | figures
    (folder / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    report(figures, problems)
    if all("problem" in line for line in result.lines):
        raise UserError(f"no row could be scored by --task {flags.task}; {path} says why for each")
    print(f"answers in {path}")


def answer_rows(subject: Any, records: list, task: Any, flags: argparse.Namespace, path: Path, bad: list):
    """The Evaluation of the rows, its lines in a file, refused rows first."""
    from eval.evaluate import Evaluation
    from stages import sft

    with open(path, "w", encoding="utf-8", buffering=1) as output, subject.precision.autocast():
        for row in bad:
            output.write(json.dumps(row, ensure_ascii=False) + "\n")
        stage = sft.Stage(sft.Flags(), subject.model)
        return Evaluation(subject.model, task, stage=stage, batch_tokens=flags.batch_tokens, output=output).run(records)


def other_lines(flags: argparse.Namespace, records: list, task: Any, path: Path) -> dict[str, dict]:
    """where -> the line of --against, a model or the file of its lines. Raises UserError for neither."""
    against = Path(flags.against)
    if against.is_file():
        try:
            return {line["where"]: line for line in map(json.loads, against.read_bytes().splitlines())}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--against {against}: is no outputs/*.jsonl of an evaluation") from None
    other = open_one(flags, flags.against)
    alone = replace(task, metrics=[], summarize=lambda lines: {}, sampling=task.sampling | {"num_samples": 1})
    return {line["where"]: line for line in answer_rows(other, records, alone, flags, path, []).lines}


def report(figures: dict[str, float], problems: list[dict[str, Any]]) -> None:
    """The table, and the first rows with a problem."""
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:>10.4f}" if isinstance(value, float) else f"{name:<{width}}  {value:>10,}")
    for line in problems[:PROBLEMS_SHOWN]:
        row = line["where"] if line["id"] == line["where"] else f"{line['where']} ({line['id']})"
        print(f"{row}: {line['problem']}", file=sys.stderr)
    if len(problems) > PROBLEMS_SHOWN:
        print(f"and {len(problems) - PROBLEMS_SHOWN} more rows with a problem", file=sys.stderr)


def ask(flags: argparse.Namespace) -> int | None:
    """`python -m eval ask`."""
    from data.images import open_image
    from eval.ask import Dialogue, in_short, questions_from, read_tools

    if flags.draw and not flags.image:
        raise UserError("--draw draws on the picture of --image; give one")
    if flags.image:
        open_image(flags.image)  # a wrong path is said before the model loads
    tools = read_tools(flags.tools)
    dialogue = Dialogue(open_model(flags), flags.image, tools, flags.max_new_tokens, flags.draw, flags.box_scale)
    if flags.system:
        dialogue.messages.append({"role": "system", "content": flags.system})
    try:
        for question in questions_from(flags.prompt):
            answer = dialogue.ask(question)
            print("\n".join(filter(None, [answer, in_short(answer)])), flush=True)
    except KeyboardInterrupt:  # how people leave a dialogue
        return 130


if __name__ == "__main__":
    command(main)
