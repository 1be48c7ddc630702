"""Rewards: one number for an answer, from rules that a policy cannot hang or talk its way around.

A reward is a metric (eval/metrics.py) that names one of its numbers "score": the same function judges evaluation and
RLOO. find_reward() gives a function of a list of answered rows, as a learned reward (eval/judges.py) needs it; a reward
of your own is a function from one Reply to {"score": ..}, named `module:function`. Countdown answers are parsed as syntax
trees over fractions and never run as code; an answer of 10^5 characters, whatever they are, costs less than a millisecond.
"""

import ast
import importlib
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from data.errors import UserError
from eval.actions import step_success
from eval.metrics import Reply, box_iou, centre_in_box, exact_match, tool_call

Reward = Callable[[list[Reply]], list[dict[str, float]]]

OPENING, CLOSING = "<answer>", "</answer>"
PAIRWISE = "pairwise:"  # begins the name of a judge that is shown two answers, eval/tasks/win_rate.py's
FORMAT_SCORE = 0.1  # of an answer in its tags that is not right, as published; right is 1, no answer is 0
MAX_CHARACTERS = 300  # of an expression, a run of blanks counted once; longer ones are wrong
MAX_BITS = 4096  # of a power, in the published rules
TOLERANCE = 1e-5  # of the published rules, which compute in floating point
TRUTH = {"numbers", "target"}

EXACT = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.USub: operator.neg,
}  # fmt: skip


# ---- Countdown -------------------------------------------------------------------------------------------------------


def countdown(response: str, numbers: list[int], target: int) -> dict[str, float]:
    """Whether the last <answer> makes the target from the numbers, each used exactly once, by + - * / exactly.

    An answer may end in `= target`, and may spell the signs as U+00D7 and U+00F7; a minus is free, so a number counts
    without its own. Returns score (1 if correct, 0.1 if there is an answer in its tags, else 0), correct, format (such an
    answer), valid (an expression of these numbers), num_answers.
    """
    numbers, target = [abs(int(number)) for number in numbers], Fraction(target)  # also of text, as some tables have them
    answers = [part for part in response.split(CLOSING)[:-1] if OPENING in part]
    value = exact_value(answers[-1].rpartition(OPENING)[2], numbers, target) if answers else None
    correct = value is not None and value == target
    return {
        "score": 1.0 if correct else FORMAT_SCORE if answers else 0.0,
        "correct": float(correct),
        "format": float(bool(answers)),
        "valid": float(value is not None),
        "num_answers": float(len(answers)),
    }


def exact_value(answer: str, numbers: list[int], target: Fraction) -> Fraction | None:
    """The value of an answer; None where it is no expression of the numbers, or claims to equal another number."""
    expression, equals, claim = " ".join(answer.split(None, MAX_CHARACTERS)).partition("=")  # with more pieces it is too long
    if equals and claim.strip() != str(target):
        return None
    expression = expression.strip().replace("\u00d7", "*").replace("\u00f7", "/")
    if not is_written_in(r"[0-9+\-*/() ]+", expression, numbers):
        return None
    return value_of(expression, EXACT, Fraction)


def is_written_in(characters: str, expression: str, numbers: list[int]) -> bool:
    """Whether an expression is short enough, of these characters, and its integers are the numbers, each used once."""
    if len(expression) > MAX_CHARACTERS or not re.fullmatch(characters, expression):
        return False
    return sorted(map(int, re.findall(r"\d+", expression))) == sorted(numbers)


def value_of(expression: str, operators: dict[type, Callable], number: Callable) -> Any:
    """The value of an arithmetic expression of these operators, every literal made by number(); None if it has none
    (a division by zero, nesting too deep for the parser)."""
    try:
        return compute(ast.parse(expression, mode="eval").body, operators, number)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None


def compute(node: ast.expr, operators: dict[type, Callable], number: Callable) -> Any:
    """The value of a syntax tree. Raises ValueError for a node that is not arithmetic."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return number(value)
        case ast.UnaryOp(op=op, operand=inner) if type(op) in operators:
            return operators[type(op)](compute(inner, operators, number))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in operators:
            return operators[type(op)](compute(left, operators, number), compute(right, operators, number))
    raise ValueError(f"{type(node).__name__} in an arithmetic expression")


def power(base: Any, exponent: Any) -> Any:
    """base ** exponent where that is a number of reasonable size. Raises OverflowError where it is not."""
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > MAX_BITS:
        raise OverflowError
    return base**exponent


PUBLISHED = EXACT | {ast.UAdd: operator.pos, ast.FloorDiv: operator.floordiv, ast.Pow: power}


def cs224r(text: str, numbers: list[int], target: int) -> dict[str, float]:
    """The scoring of Stanford's CS224R project, to compare with published figures; powers are bounded, no code runs.

    Unlike countdown() it takes //, ** and decimal points (`1.5*2` counts as 1, 5 and 2), and an answer only on one line.
    """
    lines = [part.rpartition("\n")[2] for part in text.split(CLOSING)[:-1] if OPENING in part]
    answers = [line for line in lines if OPENING in line]
    correct = bool(answers) and published_correct(answers[-1].partition(OPENING)[2].strip(), numbers, target)
    score = 1.0 if correct else FORMAT_SCORE if answers else 0.0
    return {"score": score, "correct": float(correct), "format": float(bool(answers)), "num_answers": float(len(answers))}


def published_correct(expression: str, numbers: list[int], target: int) -> bool:
    expression = expression.replace("\t", " ")
    while "  " in expression:  # halves long runs of blanks; a regular expression would look at every character by itself
        expression = expression.replace("  ", " ")
    if not is_written_in(r"[\d+\-*/().\s]+", expression, numbers):
        return False
    value = value_of(expression, PUBLISHED, lambda literal: literal)
    try:
        return value is not None and abs(value - target) < TOLERANCE
    except OverflowError:  # an integer beyond floating point
        return False


def tinyzero(text: str, numbers: list[int], target: int) -> dict[str, float]:
    """TinyZero's scoring of prompt and answer as one text: as cs224r, but the answer has to be in the very last line,
    and the text has to hold "Assistant:" or "<|im_start|>assistant". An answer that ends in a line break scores 0."""
    for header in ("Assistant:", "<|im_start|>assistant"):
        if header in text:
            return cs224r(text.partition(header)[2].rpartition("\n")[2], numbers, target)
    return cs224r("", numbers, target)


# ---- every reward by its name ----------------------------------------------------------------------------------------


def by_truth(scorer: Callable[[str, list[int], int], dict[str, float]], whole: bool, reply: Reply) -> dict[str, float]:
    """A Countdown scorer on an answered row; `whole` scores the prompt too. Adds whether the answer stops where it is
    given: models that go on after it score as well by their last answer, and lose this first."""
    truth = reply.truth or {}
    if not truth.keys() >= TRUTH:
        has = f"the row has no numbers and target to check against, only {sorted(truth) or 'a label'}"
        raise UserError(f"{has}; take another --reward or --task, such as text, or rows of nums and target")
    text = reply.prompt + reply.response if whole else reply.response
    stops = reply.stopped and reply.response.rstrip().endswith(CLOSING)
    return scorer(text, truth["numbers"], truth["target"]) | {"stops_after_answer": float(stops)}


def graded_call(reply: Reply) -> dict[str, float]:
    """The mean of the levels of metrics.tool_call: parses, valid for the tools, name, arguments, all exact."""
    levels = tool_call(reply)
    return {"score": sum(levels.values()) / len(levels)} | levels


def scored_by(metric: Callable[[Reply], dict[str, float]], name: str, reply: Reply) -> dict[str, float]:
    """A metric as a reward: the number of this name is the score."""
    values = metric(reply)
    return {"score": values[name]} | values


RULES: dict[str, Callable[[Reply], dict[str, float]]] = {
    "countdown": partial(by_truth, countdown, False),
    "cs224r": partial(by_truth, cs224r, False),
    "tinyzero": partial(by_truth, tinyzero, True),
    "box_centre": partial(scored_by, centre_in_box, "centre_in_box"),
    "box_iou": partial(scored_by, box_iou, "iou"),
    "gui_action": partial(scored_by, step_success, "step_success"),
    "tool_call": graded_call,
    "text": partial(scored_by, exact_match, "exact_match"),
}


def find_reward(name: str, folder: Path | None = None, requests_per_minute: float = 0, device: str = "auto") -> Reward:
    """The reward of this name: a rule, the folder of a reward model, MODEL@URL of a server, or module:function of yours.

    What a server replies is kept in `folder`; a reward model lies on `device`. Raises UserError for a name that is none of
    these.
    """
    if name in RULES:
        return partial(each, RULES[name])
    if name.startswith(PAIRWISE):
        raise UserError(f"--reward {name}: compares two models' answers; --task win_rate takes it, here name what scores one")
    if "@http" in name:
        from eval.judges import ServedReward, Server

        return ServedReward(Server(name, folder, requests_per_minute))
    if Path(name).is_dir():
        from eval.judges import RewardModel

        return RewardModel(name, device)
    if not name.partition(":")[2]:
        raise UserError(f"--reward {name}: not one of {', '.join(RULES)}, no folder, no MODEL@URL, nor module:function")
    return partial(each, import_function("--reward", name))


def import_function(flag: str, name: str) -> Any:
    """What `module:function` names. Raises UserError where it is not there, or its module fails."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # a module may be anyone's
        problem = error if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{flag} {name}: {problem}; module:function must be importable from the current folder") from None


def each(rule: Callable[[Reply], dict[str, float]], replies: list[Reply]) -> list[dict[str, float]]:
    """A rule on every reply. UserError with the row for one that cannot be judged, or is not given numbers with a score."""
    found = []
    for reply in replies:
        try:
            found.append(as_numbers(rule(reply)))
        except UserError as error:
            raise UserError(f"{reply.where}: {error}") from None
    return found


def as_numbers(values: Any) -> dict[str, float]:
    """What a reward gave, as floats. Raises UserError for anything but numbers by name, a score among them."""
    try:
        return {"score": float(values["score"])} | {name: float(value) for name, value in values.items()}
    except (TypeError, LookupError, AttributeError, ValueError):
        raise UserError(f'the reward gives {values!r}; a reward gives numbers by name, {{"score": ..}} at least') from None
