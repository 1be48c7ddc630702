"""Data sets that are drawn, not downloaded: `python -m data make countdown`, problems with answers that are known.

A Countdown problem is a list of numbers and a target that + - * / make of them, each number used exactly once. Every
problem is solvable by construction: the exact solver lists all values of the numbers as fractions (5 ms for four
numbers, 0.2 s for five), and the target is drawn among them. The files are a pure function of the flags; no problem is
in both. With the real set given, it is cut as TinyZero cuts it.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path

from data.errors import UserError

Tree = int | tuple  # a number, or (sign, left, right)

TINYZERO_TRAIN, TINYZERO_TEST = 327_680, 1_024  # rows of Jiayi-Pan/Countdown-Tasks-3to4, from the first on
MAX_MISSES = 10_000  # draws in a row that give nothing new, after which there is taken to be nothing left
MAX_TRIES = 3  # wrong expressions in front of the right one, in a row that shows a search


def reachable(numbers: list[int]) -> dict[Fraction, Tree]:
    """Every value that the numbers make, each used exactly once, with one expression of it."""

    @cache
    def values(subset: int) -> dict[Fraction, Tree]:
        """Of the numbers whose bits are set."""
        if subset & (subset - 1) == 0:
            number = numbers[subset.bit_length() - 1]
            return {Fraction(number): number}
        found: dict[Fraction, Tree] = {}
        left = (subset - 1) & subset
        while left > subset ^ left:  # each cut into two once
            for a, ours in values(left).items():
                for b, theirs in values(subset ^ left).items():
                    found.setdefault(a + b, ("+", ours, theirs))
                    found.setdefault(a * b, ("*", ours, theirs))
                    found.setdefault(a - b, ("-", ours, theirs))
                    found.setdefault(b - a, ("-", theirs, ours))
                    if b:
                        found.setdefault(a / b, ("/", ours, theirs))
                    if a:
                        found.setdefault(b / a, ("/", theirs, ours))
            left = (left - 1) & subset
        return found

    return values((1 << len(numbers)) - 1)


def solve(numbers: list[int], target: int) -> str | None:
    """An expression that makes the target from the numbers; None if there is none."""
    tree = reachable(numbers).get(Fraction(target))
    return None if tree is None else render(tree)


def render(tree: Tree) -> str:
    """An expression as text, with the brackets that it needs."""
    if isinstance(tree, int):
        return str(tree)
    sign, left, right = tree
    ours, theirs = render(left), render(right)
    if sign in "*/" and binds(left) == 1:
        ours = f"({ours})"
    if binds(right) == 1 and sign != "+" or binds(right) == 2 and sign == "/":
        theirs = f"({theirs})"
    return f"{ours} {sign} {theirs}"


def binds(tree: Tree) -> int:
    """How tightly: 1 a sum, 2 a product, 3 a number."""
    return 3 if isinstance(tree, int) else 1 if tree[0] in "+-" else 2


# ---- problems --------------------------------------------------------------------------------------------------------


def draw_problems(
    count: int, seed: int, lengths: list[int], max_number: int, min_target: int, max_target: int
) -> Iterator[dict]:
    """`count` different problems {"id", "nums", "target", "solution"}: a pure function of the arguments.

    Numbers are drawn from 1 to max_number, as many as one of `lengths` says, and the target among what they make.
    Raises UserError where there are not so many problems.
    """
    source, seen, misses = random.Random(seed), set(), 0
    while len(seen) < count:
        numbers = [source.randint(1, max_number) for _ in range(source.choice(lengths))]
        found = reachable(numbers)
        targets = sorted(int(v) for v in found if v.denominator == 1 and min_target <= v <= max_target)
        target = source.choice(targets) if targets else None
        key = (*sorted(numbers), target)
        if target is None or key in seen:
            misses += 1
            if misses > MAX_MISSES:
                raise UserError(f"only {len(seen)} of {count} problems found; ask for fewer or raise --max_number")
            continue
        misses = 0
        yield {"id": f"countdown-{seed}-{len(seen)}", "nums": numbers, "target": target,
               "solution": render(found[Fraction(target)])}  # fmt: skip
        seen.add(key)


def with_answer(problem: dict, prompt: str | None = None) -> dict:
    """A conversation that answers a problem: some expressions that miss the target, then one that makes it, in <answer>.

    The question is worded by the dialect that reads the problem, or by the prompt template, as it is in reinforcement that
    goes on from here.
    """
    from data.dialects import read_row
    from data.template import make_template

    source = random.Random(problem["id"])
    numbers, target = problem["nums"], problem["target"]
    messages = read_row({"nums": numbers, "target": target}, Counter(), make_template(prompt, None, None)).messages
    solution = problem.get("solution") or solve(numbers, target)
    if solution is None:
        raise UserError(f"{problem['id']}: the numbers {numbers} do not make {target}")
    lines = []
    for _ in range(source.randint(0, MAX_TRIES)):
        tree, value = draw_tree(source.sample(numbers, len(numbers)), source)
        if value is not None and value != target:
            lines.append(f"{render(tree)} = {value}, not {target}")
    search = "\n".join([*lines, f"{solution} = {target}"])
    opening = "" if messages[-1]["content"].rstrip().endswith("<think>") else "<think>\n"
    response = f"{opening}{search}\n</think>\n<answer> {solution} </answer>"
    return {"id": problem["id"], "messages": [*messages, {"role": "assistant", "content": response}]}


def draw_tree(numbers: list[int], source: random.Random) -> tuple[Tree, Fraction | None]:
    """A random expression over the numbers in this order, and its value; None where it divides by zero."""
    if len(numbers) == 1:
        return numbers[0], Fraction(numbers[0])
    cut = source.randint(1, len(numbers) - 1)
    (left, a), (right, b) = draw_tree(numbers[:cut], source), draw_tree(numbers[cut:], source)
    sign = source.choice("+-*/")
    tree = (sign, left, right)
    if a is None or b is None or sign == "/" and not b:
        return tree, None
    return tree, {"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a / b


def read_real(path: str, count: int, num_test: int) -> tuple[list[dict], list[dict]]:
    """The first `count` training rows and `num_test` test rows of the real set's file, cut as TinyZero cuts it.

    Raises UserError for a file with fewer rows, or with rows that are no problems.
    """
    from data.records import open_records

    records = open_records(path, takes=("problem",))
    if len(records) < TINYZERO_TRAIN + num_test or count > TINYZERO_TRAIN:
        raise UserError(
            f"--source {path}: TinyZero trains on rows 0 to {TINYZERO_TRAIN:,} and tests on the {TINYZERO_TEST:,} after "
            f"them; the file has {len(records):,} rows, and {count:,} to train on and {num_test:,} to test on were asked for"
        )
    rows = []
    for number in [*range(count), *range(TINYZERO_TRAIN, TINYZERO_TRAIN + num_test)]:
        truth = records[number].truth
        rows.append({"id": f"countdown-real-{number}", "nums": list(truth["numbers"]), "target": truth["target"]})
    return rows[:count], rows[count:]


# ---- python -m data make countdown -----------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m data make countdown`."""
    add = parser.add_argument
    add("--output_dir", required=True, metavar="DIR", help="train.jsonl and test.jsonl go here")
    add("--num", type=at_least(1), metavar="N", help="training problems (10,000; of the real set: all 327,680)")
    add("--num_test", type=at_least(0), metavar="N", help="test problems, none in training (200; of the real set: 1,024)")
    add("--seed", type=int, default=0, metavar="S", help="another seed, other problems (0)")
    add("--numbers", type=int, nargs="+", default=[3, 4], choices=range(1, 7), metavar="K",
        help="how many numbers a problem has: one of these, 1 to 6 (3 4)")  # fmt: skip
    add("--max_number", type=at_least(1), default=99, metavar="N", help="numbers are 1 to N (99)")
    add("--min_target", type=int, default=1, metavar="N", help="smallest target (1)")
    add("--max_target", type=int, default=99, metavar="N", help="largest target (99)")
    add("--with_answers", action="store_true", help="also answers.jsonl: the training problems as conversations for SFT, "
        "each with a search and an answer")  # fmt: skip
    add("--prompt_template", metavar="TEXT", help="words of the question in answers.jsonl, as train.py takes them")
    add("--source", metavar="FILE", help="take the problems from the real set's file (Jiayi-Pan/Countdown-Tasks-3to4)")


def at_least(low: int) -> Callable[[str], int]:
    """A flag's type: a whole number from `low` on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {low} on")
        return int(text)

    return number


def make_countdown(flags: argparse.Namespace) -> None:
    """Write the files. Raises UserError for problems that do not exist."""
    num = flags.num or (TINYZERO_TRAIN if flags.source else 10_000)
    num_test = flags.num_test if flags.num_test is not None else TINYZERO_TEST if flags.source else 200
    if flags.source:
        train, test = read_real(flags.source, num, num_test)
    else:
        limits = flags.max_number, flags.min_target, flags.max_target
        rows = list(draw_problems(num + num_test, flags.seed, flags.numbers, *limits))
        train, test = rows[:num], rows[num:]
    folder = Path(flags.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "test.jsonl", test)
    if flags.with_answers:
        write_rows(folder / "answers.jsonl", (with_answer(row, flags.prompt_template) for row in train))


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """One row a line; says how many."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} rows in {path}")
