"""Countdown: the scorer against an oracle that never parses, the published rules against each other, the generator."""

import itertools
import json
import random
import re
import subprocess
import sys
import time
from fractions import Fraction

import pytest
from conftest import ROOT

import data.make as data_make
from data.errors import UserError
from data.make import draw_problems, reachable, render, solve, with_answer
from data.records import open_records
from data.template import make_template
from eval.rewards import countdown, cs224r, tinyzero

TIMES, OVER = "\u00d7", "\u00f7"


def tag(expression, before="", after=""):
    return f"{before}<answer>{expression}</answer>{after}"


# ---- the scorer against an oracle ------------------------------------------------------------------------------------


def draw_tree(numbers, source):
    """A random expression over all the numbers, in brackets where it must be and sometimes elsewhere: (its value or None,
    its text, how tightly it binds)."""
    if len(numbers) == 1:
        value, text = Fraction(numbers[0]), str(numbers[0])
        return (-value, f"(-{text})", 3) if source.random() < 0.05 else (value, text, 3)
    cut = source.randint(1, len(numbers) - 1)
    left, ours, left_binds = draw_tree(numbers[:cut], source)
    right, theirs, right_binds = draw_tree(numbers[cut:], source)
    sign = source.choice("+-*/" + TIMES + OVER)
    binds = 1 if sign in "+-" else 2
    ours = f"({ours})" if left_binds < binds else ours
    theirs = f"({theirs})" if right_binds <= binds else theirs
    blank = source.choice(["", " ", "  "])
    text, value = f"{ours}{blank}{sign}{blank}{theirs}", None
    if left is not None and right is not None and (right or sign not in "/" + OVER):
        value = {"+": left + right, "-": left - right, "*": left * right, TIMES: left * right}.get(sign)
        value = left / right if value is None else value
    return (value, f"({text})", 3) if source.random() < 0.2 else (value, text, binds)


def mutate(text, source):
    """One change that leaves the language of the answers or the numbers: what a policy would try."""
    place = source.randint(0, len(text))
    junk = source.choice(["**2", "//1", ".5", "e1", "_0", "+0", "*1", " 7 ", "abs", "%", "(", ")", ",", "0x", "j", "==", "!",
                          "\n#", "\u0663", "\u2212", "if", "[0]", "\x00", "'", "=1=1", "+-", "~", "()"])  # fmt: skip
    return text[:place] + junk + text[place:]


def check_random_expressions(count, seed):
    """Compare the scorer with the oracle on `count` expressions; returns how many were right."""
    source, num_right = random.Random(seed), 0
    for number in range(count):
        numbers = [source.randint(1, 99) for _ in range(source.randint(1, 5))]
        value, text, _ = draw_tree(source.sample(numbers, len(numbers)), source)
        whole = value is not None and value.denominator == 1
        target = int(value) if whole and source.random() < 0.7 else source.randint(-5, 100)
        kind, valid = source.randrange(6), value is not None
        if kind == 1:
            text += f"{source.choice(['', ' '])}= {target}\n"
        elif kind == 2:
            text, valid = f"{text} = {target + 1}", False
        elif kind == 3:  # a number too many, too few, or another one
            change = source.choice(["more", "fewer", "other"])
            numbers = {"more": [*numbers, 1], "fewer": numbers[1:], "other": [numbers[0] + 100, *numbers[1:]]}[change]
            valid = False
        elif kind == 4:
            text, valid = text.replace("*", "**", 1) if "*" in text else text + "//1", False
        scores = countdown(tag(text, "<think>or <answer>1</answer>?</think>"), numbers, target)
        correct = valid and value == target
        assert scores["valid"] == valid and scores["correct"] == correct, (number, text, numbers, target)
        assert scores["score"] == (1.0 if correct else 0.1) and scores["num_answers"] == 2
        num_right += correct
        if kind == 5:
            changed = mutate(text, source)
            found = countdown(tag(changed), numbers, target)
            allowed = re.fullmatch(r"[-+*/() 0-9=\u00d7\u00f7\n]*", changed)
            assert allowed or not found["valid"], (number, changed)
    return num_right


@pytest.mark.slow
def test_random_and_adversarial_expressions_agree_with_the_oracle():
    assert check_random_expressions(100_000, seed=1) > 15_000


RIGHT = {  # numbers 3, 8, 8, 3; target 24
    "8 / (3 - 8 / 3)": 1,
    "8/(3-8/3) = 24": 1,
    f"8 {OVER} (3 {TIMES} (8 {OVER} 8) - 3)": 0,
    f"8 {OVER} (3 - 8 {OVER} 3)": 1,
    "  8 / (3 -\n 8 / 3)\n": 1,
    "--8 / (3 - 8 / 3)": 1,
    "-8 / (8 / 3 - 3)": 1,
    "8 / (3 - 8 / 3) = 25": 0,
    "8 / (3 - 8 / 3) = 24 = 24": 0,
    "24 = 8 / (3 - 8 / 3)": 0,
    "8 / (3 - 8 / 3) = 24.0": 0,
    "+8 / (3 - 8 / 3)": 0,
    "8 / (3 - 8 / 3": 0,
    "8 // (3 - 8 / 3)": 0,
    "8 / (3 - 8 / 3) * 1": 0,
    "3 * 8": 0,
    "24": 0,
    "8 / (8 / 8 - 3 / 3)": 0,
    "(8)(3)(8)(3)": 0,
    "8 8 3 3": 0,
    "": 0,
}


@pytest.mark.parametrize("answer", RIGHT)
def test_what_is_right(answer):
    assert countdown(tag(answer), [3, 8, 8, 3], 24)["correct"] == RIGHT[answer]


@pytest.mark.parametrize("numbers, target", [([-3, 5], 2), (["3", "5"], "2"), ([3.0, -5.0], 2.0)], ids=str)
def test_a_minus_is_free_and_numbers_may_be_texts(numbers, target):
    assert [countdown(tag(answer), numbers, target)["correct"] for answer in ("5 - 3", "-3 + 5 = 2", "3 + 5")] == [1, 1, 0]


def test_what_is_reported():
    def found(response):
        return tuple(countdown(response, [2, 3], 6)[name] for name in ("score", "correct", "format", "valid", "num_answers"))

    assert found(tag("2 * 3")) == (1, 1, 1, 1, 1)
    assert found(tag("2 + 3")) == (0.1, 0, 1, 1, 1)
    assert found(tag("2 + 2")) == (0.1, 0, 1, 0, 1)
    assert found("2 * 3") == found("<answer>2 * 3") == found("</answer>2 * 3<answer>") == (0, 0, 0, 0, 0)
    assert found(tag("2 + 3") + tag("2 * 3")) == (1, 1, 1, 1, 2)
    assert found(tag("2 * 3") + tag("2 + 3")) == (0.1, 0, 1, 1, 2)  # the last one counts
    assert found(tag("2 * 3", "I close with <answer>. ")) == (1, 1, 1, 1, 1)
    assert found(tag("(2 - 2) / 3")) == (0.1, 0, 1, 0, 1) and countdown(tag("2 / (3 - 3)"), [2, 3, 3], 6)["valid"] == 0


HOSTILE = {
    "a tower": tag("99**99**99"),
    "digits": tag("9" * 10**5),
    "brackets": tag("(" * 50_000 + "2*3" + ")" * 50_000),
    "signs": tag("-" * 10**5 + "2*3"),
    "some signs": tag("-" * 296 + "2*3"),
    "some brackets": tag("(" * 140 + "2*3" + ")" * 140),
    "openings": "<answer>" * 12_000,
    "closings": "</answer>" * 11_000,
    "pairs": "<answer></answer>" * 6_000,
    "lines": "<answer>\n" * 12_000,
    "equals": tag("=" * 10**5),
    "blanks": tag("2" + " " * 10**5 + "*3"),
    "numbers": tag("2  " * 33_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_answered(name):
    """A hang is what this finds: each takes less than a millisecond."""
    for scorer in (countdown, cs224r, tinyzero):
        seconds = []
        for _ in range(5):  # the fastest: others may have the processor in between
            started = time.thread_time()
            found = scorer("Assistant:" + HOSTILE[name], [99, 99, 99] if name == "a tower" else [2, 3], 6)
            seconds.append(time.thread_time() - started)
        assert min(seconds) < 2e-3, "not a millisecond, even on a machine half as fast"
        assert found["correct"] == (name in ("blanks", "some brackets", "some signs")), found


# ---- the published rules ---------------------------------------------------------------------------------------------

PUBLISHED = [  # answer, numbers, target, by the published rules, by ours
    ("2*3", [2, 3], 6, 1.0, 1.0),
    ("2**3", [2, 3], 8, 1.0, 0.1),
    ("7//2", [7, 2], 3, 1.0, 0.1),
    ("1.5*2", [1, 5, 2], 3, 1.0, 0.1),
    ("+2*3", [2, 3], 6, 1.0, 0.1),
    ("2*3 = 6", [2, 3], 6, 0.1, 1.0),
    (f"2 {TIMES} 3", [2, 3], 6, 0.1, 1.0),
    ("1/3*3", [1, 3, 3], 1, 1.0, 1.0),
    ("99999999/99999998", [99999999, 99999998], 1, 1.0, 0.1),  # within the tolerance of 1e-5
    ("4**-1*4", [4, 1, 4], 1, 1.0, 0.1),
    ("2*(3", [2, 3], 6, 0.1, 0.1),
    ("2*2", [2, 3], 4, 0.1, 0.1),
    ("02*3", [2, 3], 6, 0.1, 0.1),
    ("2/(3-3)", [2, 3, 3], 6, 0.1, 0.1),
    ("(2)(3)", [2, 3], 6, 0.1, 0.1),
    ("99**99**99", [99, 99, 99], 5, 0.1, 0.1),
    ("9**999", [9, 999], 5, 0.1, 0.1),
]


@pytest.mark.parametrize("answer, numbers, target, published, ours", PUBLISHED)
def test_published_rules(answer, numbers, target, published, ours):
    assert cs224r(tag(answer), numbers, target)["score"] == published
    assert tinyzero("Assistant: <think>\n</think>\n" + tag(answer), numbers, target)["score"] == published
    assert countdown(tag(answer), numbers, target)["score"] == ours


def test_where_the_published_rules_look_for_the_answer():
    right, wrong = tag("2*3"), tag("2+3")
    for header in ("User: hi\nAssistant: ", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"):
        assert tinyzero(header + right, [2, 3], 6)["score"] == 1
        assert tinyzero(header + right + "\n", [2, 3], 6)["score"] == 0  # the last line is empty
        assert tinyzero(header + right + "\nmore", [2, 3], 6)["score"] == 0
    assert tinyzero(right, [2, 3], 6)["score"] == 0
    assert tinyzero(right + "Assistant: ", [2, 3], 6)["score"] == 0
    assert cs224r(right + "\nmore\n", [2, 3], 6)["score"] == 1
    assert cs224r(wrong + "\n" + right, [2, 3], 6)["score"] == 1 and cs224r(right + wrong, [2, 3], 6)["score"] == 0.1
    assert cs224r("<answer>2*\n3</answer>", [2, 3], 6)["score"] == 0  # over two lines, no answer at all
    assert countdown("<answer>2*\n3</answer>", [2, 3], 6)["score"] == 1
    assert cs224r("<answer>\n" + right, [2, 3], 6)["score"] == 1
    assert cs224r("<answer>" + right, [2, 3], 6)["score"] == 0.1  # from the first opening of the line on


# ---- the generator ---------------------------------------------------------------------------------------------------


def every_value(numbers):
    """All values of all the numbers by joining any two of them until one is left: slow, and another way than ours."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [number for place, number in enumerate(numbers) if place not in (i, j)]
        a, b = numbers[i], numbers[j]
        for value in [a + b, a - b, a * b] + ([a / b] if b else []):
            found |= every_value([*rest, value])
    return found


@pytest.mark.parametrize("numbers", [[7], [3, 3], [1, 2, 3], [44, 19, 35], [3, 8, 8, 3], [0, 5, 5, 1]])
def test_the_solver_finds_every_value_and_how(numbers):
    found = reachable(numbers)
    assert set(found) == every_value([Fraction(number) for number in numbers])
    for value, tree in found.items():
        assert countdown(tag(render(tree)), numbers, value)["correct"] == 1, (value, render(tree))
    assert solve(numbers, 10**6) is None


def test_problems_are_different_solvable_and_a_function_of_the_seed():
    rows = list(draw_problems(100, 7, [3, 4], 20, 10, 30))
    assert rows == list(draw_problems(100, 7, [3, 4], 20, 10, 30)) != list(draw_problems(100, 8, [3, 4], 20, 10, 30))
    assert len({(*sorted(row["nums"]), row["target"]) for row in rows}) == len({row["id"] for row in rows}) == 100
    assert {len(row["nums"]) for row in rows} == {3, 4} and max(n for row in rows for n in row["nums"]) <= 20
    for row in rows:
        assert 10 <= row["target"] <= 30
        assert countdown(tag(row["solution"]), row["nums"], row["target"])["score"] == 1
    with pytest.raises(UserError, match="--max_number"):
        list(draw_problems(1000, 0, [2], 3, 1, 9))


def make(folder, *flags):
    command = [sys.executable, "-m", "data", "make", "countdown", "--output_dir", folder, *flags]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)


def test_the_command_writes_rows_that_are_read_as_problems_and_answers_that_score(tmp_path):
    done = make(tmp_path, "--num", 40, "--num_test", 10, "--numbers", 2, 3, "--max_number", 9, "--seed", 3, "--with_answers")
    assert done.returncode == 0, done.stderr
    train, test, answers = (open_records(tmp_path / f"{name}.jsonl") for name in ("train", "test", "answers"))
    assert (len(train), len(test), len(answers)) == (40, 10, 40)
    for wrong in (["--num", 0], ["--num_test", -1], ["--numbers", 9], ["--num", 10**4, "--numbers", 1]):
        assert make(tmp_path / "none", *wrong).returncode == 2
    assert not (tmp_path / "none").exists()
    tried = 0
    for problem, answer in zip(train, answers, strict=True):
        assert problem.kind == "problem" and answer.kind == "conversation" and problem.id == answer.id
        *question, reply = answer.messages
        assert question == problem.messages  # the words that reinforcement asks with
        assert countdown(reply["content"], **problem.truth)["score"] == 1
        *misses, hit = reply["content"].partition("</think>")[0].removeprefix("<think>").strip().split("\n")
        for line in misses:
            expression, _, value = line.partition(" = ")
            value, _, missed = value.partition(", not ")
            assert countdown(tag(expression), problem.truth["numbers"], Fraction(value))["correct"] == 1
            assert int(missed) == problem.truth["target"] != Fraction(value)
        tried += len(misses)
        assert countdown(tag(hit), **problem.truth)["correct"] == 1
    assert tried > 20
    words = "{nums} = {target}? <think>"
    question, reply = with_answer({"id": "x", "nums": [2, 3], "target": 6}, words)["messages"]
    assert question["content"] == "2, 3 = 6? <think>" and not reply["content"].startswith("<think>")
    nums = ", ".join(map(str, train[0].truth["numbers"]))
    asked = open_records(tmp_path / "train.jsonl", template=make_template(words, None, None))[0].messages
    assert asked[0]["content"] == f"{nums} = {train[0].truth['target']}? <think>"
    lines = [json.loads(line) for name in ("train", "test") for line in (tmp_path / f"{name}.jsonl").open()]
    assert len({(*sorted(line["nums"]), line["target"]) for line in lines}) == 50


def test_the_real_set_is_cut_as_tinyzero_cuts_it(tmp_path, monkeypatch):
    rows = list(draw_problems(30, 0, [2], 20, 1, 40))
    source = tmp_path / "real.jsonl"
    source.write_text("".join(json.dumps({"nums": row["nums"], "target": row["target"]}) + "\n" for row in rows))
    assert (data_make.TINYZERO_TRAIN, data_make.TINYZERO_TEST) == (327_680, 1_024)
    done = make(tmp_path, "--source", source)
    assert done.returncode == 2 and "the file has 30 rows" in done.stderr and done.stderr.count("\n") == 1
    monkeypatch.setattr(data_make, "TINYZERO_TRAIN", 20)
    train, test = data_make.read_real(source, 5, 3)
    for found, expected in ((train, rows[:5]), (test, rows[20:23])):
        assert [(row["nums"], row["target"]) for row in found] == [(row["nums"], row["target"]) for row in expected]
