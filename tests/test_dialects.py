"""Dialects beyond plain conversations: what each row becomes, and what a stage says to a row that is not for it."""

import json
import re

import pytest
from PIL import Image

from data.dialects import DIALECTS, Question, dialect, has
from data.errors import UserError
from data.records import open_records
from data.turns import parts_of

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
    with pytest.raises(UserError) as caught:
        open_records(path, **options)
    assert "\n" not in str(caught.value)
    return open_records(path, **options, on_bad_row="skip").bad[0]["problem"]


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
    {"id": "p", "prompt": [USER], "chosen": GOOD, "rejected": BAD},
    {"id": "p", "prompt": "2 + 2?", "chosen": {"from": "gpt", "value": "4"}, "rejected": [{"from": "gpt", "value": "5"}]},
    {"id": "p", "prompt": "2 + 2?", "chosen": [{"from": "human", "value": "2 + 2?"}, GOOD], "rejected": [USER, BAD]},
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
    ({"chosen": "4", "rejected": "5", "question": "2?"}, "without a prompt.*'question'.*name what they answer \"prompt\""),
    ({"chosen": "4", "rejected": "5", "prompt": 4}, "a prompt is neither text nor turns"),
    ({"chosen": [USER, GOOD | {"content": ""}], "rejected": [USER, BAD]}, "neither text nor tool call"),
])
def test_bad_preferences(write, row, expected):
    assert re.search(expected, problem_of(write([row])))


def test_an_answer_may_be_refused_for_being_empty_or_equal(write):
    records = open_records(write([{"chosen": [USER, GOOD], "rejected": [USER, BAD | {"content": ""}]},
                                  {"chosen": [USER, GOOD], "rejected": [USER, GOOD]}]))
    assert records[0].rejected[-1]["content"] == "" and records.notes == {"chosen and rejected are the same answer": 1}


def test_a_question_is_a_problem(write, quiz):
    record = open_records(write([{"quiz": "2 + 2?"}]))[0]
    assert record.kind == "problem" and record.messages == [USER] and record.truth == {"answer": "4"}


KINDS_OF_ROWS = [{"messages": [USER, GOOD]}, {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, {"quiz": "2 + 2?"}]


@pytest.mark.parametrize("takes, good", [(("conversation",), [0, 1]), (("preference",), [1]), (("problem",), [1, 2]),
                                         (("problem", "preference"), [1, 2]), (("conversation", "preference"), [0, 1])])
def test_a_stage_takes_its_kinds(write, quiz, takes, good):
    path = write(KINDS_OF_ROWS)
    records = open_records(path, on_bad_row="skip", takes=takes)
    assert [record.where for record in records] == [f"rows.jsonl:{number + 1}" for number in good]
    assert all(" is a " in row["problem"] and "the stage takes a " in row["problem"] for row in records.bad)
    notes = {"conversation": "preference read as its chosen answer alone", "problem": "preference read as its prompt"}
    assert records.notes == ({notes[takes[0]]: 1} if takes[0] in notes and "preference" not in takes else {})
    alone = {takes[0]} if "preference" not in takes else None
    kinds = alone or {["conversation", "preference", "problem"][number] for number in good}
    assert {record.kind for record in records} == kinds and all(record.kind in takes for record in records)


def test_a_preference_as_a_problem_is_its_prompt(write):
    """For rewards that compare, the chosen answer is what is compared with."""
    [record] = open_records(write(KINDS_OF_ROWS[1:2]), takes=("problem",))
    assert (record.messages, record.truth, record.rejected) == ([USER], {"answer": GOOD["content"]}, None)


def test_sft_refuses_a_problem_in_one_sentence(write, quiz):
    from stages.sft import Stage

    with pytest.raises(UserError, match=r"rows.jsonl:1 the row is a problem \(.*the stage takes a conversation \("):
        open_records(write([{"quiz": "2 + 2?"}]), takes=Stage.takes)


def test_a_run_says_what_it_makes_of_its_rows(write, tmp_path):
    """The notes that a user reads at the start of --stage sft, and the sentence that ends it."""
    from data.rows import open_rows
    from model.family import find_family
    from model.tiny import write_tiny
    from stages import list_stages
    from training.config import read_config

    write_tiny("qwen2", tmp_path / "base")
    stages = {name: module.Flags for name, module in list_stages().items()}
    takes = list_stages()["sft"].Stage.takes

    def open_file(rows):
        config = read_config(["--base_model", str(tmp_path / "base"), "--data_path", str(write(rows))], stages)
        return open_rows(config, find_family(tmp_path / "base"), tmp_path, takes=takes)

    text = open_file([KINDS_OF_ROWS[0], KINDS_OF_ROWS[1]] * 4).text
    assert "4 messages" in text and "4 chosen/rejected" in text and "4 x preference read as its chosen answer alone" in text
    with pytest.raises(UserError, match="rows.jsonl:2 the row is a problem .*the stage takes a conversation"):
        open_file([KINDS_OF_ROWS[0], {"target": 3, "nums": [1, 2]}])


# ---- problems ------------------------------------------------------------------------------------------------------

TRUTH = {"numbers": [44, 19, 35], "target": 98}
RENDERED = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nUse [44 19 35].<|im_end|>\n"
            "<|im_start|>assistant\n")


@pytest.mark.parametrize("row", [
    {"prompt": "Use 44, 19, 35.", "ground_truth": TRUTH, "target": 98, "nums": [44, 19, 35]},
    {"prompt": [{"role": "user", "content": "Use 44, 19, 35."}], "ground_truth": json.dumps(TRUTH)},
])
def test_a_prompt_with_its_ground_truth(write, row):
    records = open_records(write([row]))
    assert records[0].kind == "problem" and records[0].truth == TRUTH
    assert records[0].messages == [{"role": "user", "content": "Use 44, 19, 35."}]
    other = {"read as prompt/ground_truth, not as target/nums": 1}
    assert records.dialects == {"prompt/ground_truth": 1} and records.notes == (other if "nums" in row else {})


def test_a_prompt_that_is_rendered_already(write):
    """The 2026 course's prompts: Qwen's template around the words, up to the header of the answer."""
    system = {"role": "system", "content": "You are a helpful assistant."}
    user = {"role": "user", "content": "Use [44 19 35]."}
    rows = [{"prompt": RENDERED, "ground_truth": TRUTH}, {"query": RENDERED, "completion": "4"},
            {"query": RENDERED, "response_ws": "4", "response_ls": "5"}]
    records = open_records(write(rows))
    assert [record.messages[:2] for record in records] == [[system, user]] * 3
    assert [len(record.messages) for record in records] == [2, 3, 3]
    mentioned = "what does <|im_start|>user mean?"  # in the middle of a text it is text
    assert open_records(write([{"query": mentioned, "completion": "4"}]))[0].messages[0]["content"] == mentioned


def test_other_ground_truths(write):
    truths = {"4": {"answer": "4"}, "{1, 2}": {"answer": "{1, 2}"}, '{"box": [1, 2, 3, 4]}': {"box": [1, 2, 3, 4]}}
    records = open_records(write([{"prompt": "2 + 2?", "ground_truth": truth} for truth in truths]))
    assert [record.truth for record in records] == list(truths.values())


def test_countdown_as_numbers(write):
    record = open_records(write([{"target": 98, "nums": [44, 19, 35]}]))[0]
    assert record.truth == TRUTH and record.dialect == "target/nums" and record.kind == "problem"
    (turn,) = record.messages
    assert turn["role"] == "user" and "98" in turn["content"] and "44, 19, 35" in turn["content"]
    assert all(tag in turn["content"] for tag in ("<think>", "</think>", "<answer>", "</answer>"))


@pytest.mark.parametrize("row, expected", [
    ({"target": 98, "nums": []}, "are not whole numbers"), ({"target": "98", "nums": [1]}, "are not whole numbers"),
    ({"target": 98, "nums": [1.5]}, "are not whole numbers"), ({"target": True, "nums": [1]}, "are not whole numbers"),
    ({"prompt": "x", "ground_truth": {"numbers": "12", "target": 3}}, "are not whole numbers"),
    ({"prompt": None, "ground_truth": "4"}, "a prompt is neither text nor turns"),
    ({"prompt": RENDERED + "Let me think", "ground_truth": "4"}, "a prompt ends with the assistant's turn"),
])
def test_bad_problems(write, row, expected):
    assert expected in problem_of(write([row]))


# ---- conversations of the recipes ----------------------------------------------------------------------------------

@pytest.fixture
def pictures(tmp_path):
    for name in "ab":
        Image.new("RGB", (8, 6)).save(tmp_path / f"{name}.jpg")


def parts_shown(record, turn=0):
    """The texts of a turn, and the first letters of its pictures' names."""
    parts = parts_of(record.messages[turn]["content"])
    return [part["text"] if part["type"] == "text" else part["image"].rpartition("/")[2][0].upper() for part in parts]


@pytest.mark.parametrize("conversation, expected", [
    ([{"images": ["a.jpg", "b.jpg"], "user": "Which?", "assistant": "x"}], [["A", "\n", "B", "\nWhich?"], ["x"]]),
    ([{"images": ["a.jpg", "b.jpg"], "user": "<|image_2|> or <|image_1|>?", "assistant": "x"}],
     [["B", " or ", "A", "?"], ["x"]]),
    ([{"images": ["a.jpg"], "user": "What?", "assistant": "x"}, {"user": "And?", "assistant": "y"}],
     [["A", "\nWhat?"], ["x"], ["And?"], ["y"]]),
    ([{"images": [], "user": "What is <|image_1|>?", "assistant": "x"}], [["What is <|image_1|>?"], ["x"]]),
])
def test_phi3_cookbook(write, pictures, conversation, expected):
    records = open_records(write([{"id": "val-1", "source": "ucf101", "conversations": conversation}]))
    assert [parts_shown(records[0], turn) for turn in range(len(expected))] == expected
    assert records.dialects == {"Phi-3 cookbook": 1} and not records.notes and records[0].id == "val-1"


def test_a_mark_without_a_picture_in_a_cookbook_row(write, pictures):
    row = {"conversations": [{"images": ["a.jpg"], "user": "<|image_1|> <|image_2|>", "assistant": "x"}]}
    assert "marks and pictures do not match" in problem_of(write([row]))


TRAINED = "Task: Save it\n(Platform: Mac)\n(Answer in Action-Operation-Sensitive format.)\nHistory steps: \n0. CLICK()\n"
ASKED = "Task: Save it\nHistory steps: \n0. CLICK()\n(Platform: Mac)\n(Answer in Action-Operation-Sensitive format.)\n"


@pytest.mark.parametrize("text, count", [
    (TRAINED, 1), (ASKED, 0), ("(Platform: Mac) " + ASKED, 1), ("(Platform " * 500_000, 0),  # the last in no time
], ids=["trained", "asked", "both", "long"])
def test_the_order_of_cogagents_prompt_is_warned_about(write, pictures, text, count):
    messages = [{"role": "user", "content": text, "image": "a.jpg"}, GOOD]
    records = open_records(write([{"messages": messages}]))
    assert parts_shown(records[0]) == ["A", text] and records.dialects == {"CogAgent": 1}
    assert list(records.notes.values()) == [1] * count


def test_smol_smoltalk(write):
    row = {"messages": [{"role": "system", "content": "S"}, USER, GOOD, USER, GOOD], "source": "smol-magpie-ultra-short"}
    records = open_records(write([row]))
    assert records[0].messages == row["messages"] and records.dialects == {"messages": 1} and not records.notes


def test_raw_guicourse_rows_are_sent_to_the_converter(write):
    rows = [{"uid": "u", "image_id": "i", "question": "x", "answer": "y"}, {"uid": "u", "image_id": "i", "text": []}]
    bad = open_records(write(rows), on_bad_row="skip").bad
    assert ["data convert guicourse" in row["problem"] for row in bad] == [True, True]


def test_rows_as_other_trainers_write_them(write, tmp_path):
    """LLaMA-Factory's ShareGPT with calls, OpenAI's developer and weight, a picture as the datasets library puts it in JSON,
    Alpaca, Dolly, and the NaN of pandas."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    said = [{"from": "human", "value": "weather?"}, {"from": "function_call", "value": '{"name": "w", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "sun"}, {"from": "gpt", "value": "sunny"}]  # fmt: skip
    rows = [
        {"conversations": said, "tools": '[{"name": "w"}]'},
        {"messages": [{"role": "developer", "content": "S"}, USER, GOOD | {"weight": 0}, USER, GOOD | {"weight": 1}]},
        {"messages": [USER, GOOD], "images": [{"bytes": None, "path": "a.png"}], "score": float("nan")},
        {"instruction": "a", "input": "", "output": "b"}, {"instruction": "a", "context": "c", "response": "b"},
        {"messages": [USER, GOOD], "image": float("nan")},
        {"instruction": "a", "input": "c", "response": "b", "history": [["q", "r"]]},
    ]  # fmt: skip
    records = open_records(write(rows))
    call = {"type": "function", "function": {"name": "w", "arguments": {"x": 1}}}
    assert [turn["role"] for turn in records[0].messages] == ["user", "assistant", "tool", "assistant"]
    assert records[0].messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert [turn.get("train") for turn in records[1].messages] == [None, None, False, None, True]
    assert records[1].messages[0]["role"] == "system" and not records.notes
    assert records[2].image_sizes == [(40, 30)] and records[5].image_sizes == []
    assert [records[n].messages[0]["content"] for n in (3, 4)] == ["a", "a\n\nc"]
    assert [turn["content"] for turn in records[6].messages] == ["q", "r", "a\n\nc", "b"]
    for arguments in ({"x": float("nan")}, '{"x": NaN}'):
        nan = {"messages": [USER, GOOD | {"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]}
        assert "a number is NaN" in open_records(write([nan]), on_bad_row="skip").bad[0]["problem"]
    bad = open_records(write([{"question": "a", "answer": "b"}]), on_bad_row="skip").bad[0]["problem"]
    assert bad.startswith("no dialect has these keys: ['answer', 'question']; --prompt_template, --response_template and")


def test_openais_functions_are_tools_and_a_function_call_is_a_call(write):
    said = {"role": "assistant", "content": "I look.", "function_call": {"name": "w", "arguments": '{"x": 1}'}}
    row = {"messages": [USER, said, {"role": "function", "name": "w", "content": "sun"}, GOOD], "functions": [{"name": "w"}]}
    (record,) = open_records(write([row]))
    call = {"type": "function", "function": {"name": "w", "arguments": {"x": 1}}}
    assert record.messages == [USER, {"role": "assistant", "content": "I look.", "tool_calls": [call]},
                               {"role": "tool", "content": "sun"}, GOOD]
    assert record.tools == [{"name": "w"}]


def test_what_was_said_before_is_context_under_either_name_of_a_role(write):
    before = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}, USER]
    for completion in ("4", GOOD, [GOOD]):
        (record,) = open_records(write([{"prompt": before, "completion": completion}]))
        assert [turn.get("train") for turn in record.messages] == [None, False, None, None] and record.messages[-1] == GOOD


@pytest.mark.parametrize("history, said", [
    ([["q", "r"]], ["q", "r"]), ([USER, GOOD], ["2 + 2?", "4"]), ([{"user": "q", "assistant": "r"}], "unknown role"),
    (["ab"], "history is neither pairs"), ("[]", "history is neither pairs"), ([["q"]], "history is neither pairs"),
])
def test_the_history_of_an_instruction(write, history, said):
    path = write([{"instruction": "a", "output": "b", "history": history}])
    if isinstance(said, str):
        assert problem_of(path).startswith(said)
    else:
        assert [turn["content"] for turn in open_records(path)[0].messages] == [*said, "a", "b"]


def test_arguments_encoded_twice(write):
    call = {"name": "return_value", "arguments": json.dumps(json.dumps({"value": "x"}))}
    record = open_records(write([{"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}]))[0]
    assert record.messages[1]["tool_calls"][0]["function"] == {"name": "return_value", "arguments": {"value": "x"}}
