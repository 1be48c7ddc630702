"""Prompts whose answer a reward judges: Countdown as a table of numbers, and any prompt with its ground truth."""

from contextlib import suppress

from data.dialects import Question, dialect, has
from data.turns import Problem, decode, short, turns_of

# The table holds numbers alone; --prompt_template puts these words in another way. {nums} reads "44, 19, 35".
COUNTDOWN_PROMPT = (
    "Write an expression that equals {target} with the numbers {nums}. Use each of them exactly once, with +, -, *, / and "
    "parentheses, and no other number. Think it through between <think> and </think> first. Then give the expression "
    "alone between <answer> and </answer>, as in <answer>(1 + 2) / 3</answer>."
)


@dialect("target/nums", has("target", "nums"))
def _read_countdown(row: dict) -> Question:
    numbers, target = row["nums"], row["target"]
    prompt = COUNTDOWN_PROMPT.format(target=target, nums=", ".join(map(str, numbers)))
    return Question([{"role": "user", "content": prompt}], _countdown(numbers, target))


@dialect("prompt/ground_truth", has("prompt", "ground_truth"))
def _read_ground_truth(row: dict) -> Question:
    """ground_truth is {"numbers", "target"} (also as a JSON string), another object that a reward knows, or an answer."""
    truth = row["ground_truth"]
    if isinstance(truth, str) and truth.startswith("{"):
        with suppress(Problem):  # "{1, 2}" is an answer
            truth = decode(truth)
    if not isinstance(truth, dict):
        truth = {"answer": truth}
    elif truth.keys() >= {"numbers", "target"}:
        truth = truth | _countdown(truth["numbers"], truth["target"])
    return Question(turns_of(row["prompt"]), truth)


def _countdown(numbers: object, target: object) -> dict:
    """What Countdown's reward needs. Raises Problem unless all of it is whole numbers."""
    if not isinstance(numbers, list) or not numbers or not all(type(number) is int for number in [*numbers, target]):
        raise Problem("numbers and target are not whole numbers", f"{short(numbers)} and {short(target)}")
    return {"numbers": numbers, "target": target}
