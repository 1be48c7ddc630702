"""Dialects of preferences and problems: what each row becomes, and what a stage says to a row that is not for it."""

import json

import pytest

from data.dialects import DIALECTS, Question, dialect, has
from data.errors import UserError
from data.records import BadRows, open_records

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in
                   (("user", "2 + 2?"), ("assistant", "4"), ("assistant", "5")))


@pytest.fixture
def write(tmp_path):
    """write(rows, name) -> path of a file with those rows."""
    def function(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    return function


def problem_of(path, **options):
    """The problem of a file's only row."""
    with pytest.raises(BadRows) as caught:
        open_records(path, **options)
    assert len(caught.value.records.bad) == 1 and "\n" not in str(caught.value)
    return caught.value.records.bad[0]["problem"]


@pytest.fixture
def dialects():
    """The table of dialects, put back after the test."""
    before = list(DIALECTS)
    yield DIALECTS
    DIALECTS[:] = before


@pytest.fixture
def quiz(dialects):
    """A dialect of problems for one test."""
    dialect("quiz", has("quiz"))(lambda row: Question([{"role": "user", "content": row["quiz"]}], {"answer": "4"}))


# ---- which dialect a row is in -------------------------------------------------------------------------------------

def test_the_dialect_that_asks_for_more_is_taken_and_the_log_says_so(write):
    both = {"messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    records = open_records(write([both, {"messages": [USER, GOOD]}]))
    assert records.dialects == {"chosen/rejected": 1, "messages": 1}
    assert records.notes == {"read as chosen/rejected, not as messages": 1}


def test_a_function_of_your_own_is_asked_first(write, dialects):
    dialect("mine", lambda row: "chosen" in row)(lambda row: row["chosen"])
    records = open_records(write([{"chosen": [USER, GOOD], "rejected": [USER, BAD]}]))
    assert records[0].dialect == "mine" and records.notes == {"read as mine, not as chosen/rejected": 1}


# ---- kinds of row --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("row", [
    {"prompt": "2 + 2?", "prompt_id": "p", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
    {"id": "p", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"id": "p", "prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"id": "p", "prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    {"id": "p", "query": "2 + 2?", "response_ws": "4", "response_ls": "5", "completion": None},
])
def test_preferences(write, row):
    record = open_records(write([row]))[0]
    assert record.kind == "preference" and record.id == "p" and record.truth is None
    assert record.messages == [USER, GOOD] and record.rejected == [USER, BAD]


def test_earlier_answers_of_a_preference_are_context(write):
    record = open_records(write([{"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}]))[0]
    assert record.messages == [USER, GOOD | {"train": False}, USER, GOOD]
    assert record.rejected == [USER, GOOD | {"train": False}, USER, BAD]


@pytest.mark.parametrize("row, expected", [
    ({"chosen": [USER, GOOD], "rejected": [USER | {"content": "2+2?"}, BAD]}, "do not answer the same prompt.*turn 1"),
    ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "do not answer the same prompt.*turn 2"),
    ({"chosen": [USER, GOOD, USER], "rejected": [USER, BAD]}, "chosen does not end with an answer"),
    ({"chosen": [USER, GOOD | {"train": False}], "rejected": [USER, BAD]}, "no assistant turn"),
    ({"prompt": "3 + 3?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "prompt is not in the chosen"),
    ({"chosen": "4", "rejected": "5"}, "content is neither"),
    ({"chosen": [USER, GOOD | {"content": ""}], "rejected": [USER, BAD]}, "neither text nor tool call"),
])
def test_bad_preferences(write, row, expected):
    import re

    assert re.search(expected, problem_of(write([row])))


def test_an_answer_may_be_refused_for_being_empty_or_equal(write):
    records = open_records(write([{"chosen": [USER, GOOD], "rejected": [USER, BAD | {"content": ""}]},
                                  {"chosen": [USER, GOOD], "rejected": [USER, GOOD]}]))
    assert records[0].rejected[-1]["content"] == "" and records.notes == {"chosen and rejected are the same answer": 1}


def test_a_question_is_a_problem(write, quiz):
    record = open_records(write([{"quiz": "2 + 2?"}]))[0]
    assert record.kind == "problem" and record.messages == [USER] and record.truth == {"answer": "4"}


KINDS_OF_ROWS = [{"messages": [USER, GOOD]}, {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, {"quiz": "2 + 2?"}]


@pytest.mark.parametrize("takes, good", [(("conversation",), [0, 1]), (("preference",), [1]), (("problem",), [2]),
                                         (("problem", "preference"), [1, 2]), (("conversation", "preference"), [0, 1])])
def test_a_stage_takes_its_kinds(write, quiz, takes, good):
    path = write(KINDS_OF_ROWS)
    records = open_records(path, on_bad_row="skip", takes=takes)
    assert [record.where for record in records] == [f"rows.jsonl:{number + 1}" for number in good]
    assert all(" is a " in row["problem"] and "the stage takes a " in row["problem"] for row in records.bad)
    chosen_alone = takes == ("conversation",)
    assert records.notes == ({"preference read as its chosen answer alone": 1} if chosen_alone else {})


def test_sft_refuses_a_problem_in_one_sentence(write, quiz):
    from stages.sft import Stage

    with pytest.raises(UserError, match=r"rows.jsonl:1 the row is a problem \(.*the stage takes a conversation \("):
        open_records(write([{"quiz": "2 + 2?"}]), takes=Stage.takes)
