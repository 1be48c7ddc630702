"""Rows: every dialect in one form, every bad row accounted for by file:line, nothing outside the root."""

import copy
import gzip
import json
import pickle
import random
import shutil
import subprocess
import sys

import pytest
from conftest import shared
from PIL import Image
from test_check import damage

from data.dialects import DIALECTS, dialect, has
from data.errors import UserError
from data.records import open_records

CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


@pytest.fixture
def write(tmp_path):
    """write(rows, name) -> path of a file with those rows, in a folder with pictures a.png (40 x 30) and b.png."""
    for name, size in (("a.png", (40, 30)), ("b.png", (20, 10))):
        Image.new("RGB", size, "red").save(tmp_path / name)

    def function(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
        return path
    return function


def user_and_answer(user, answer="ok"):
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def problem_of(path, **options):
    """The problem of a file's only row."""
    with pytest.raises(UserError) as caught:
        open_records(path, **options)
    bad = open_records(path, **options, on_bad_row="skip").bad
    assert len(bad) == 1 and "\n" not in str(caught.value) and bad[0]["problem"] in str(caught.value)
    return bad[0]["problem"]


CALL = {"type": "function", "function": {"name": "click", "arguments": {"mark_id": 3}}}
# A row, the messages that it becomes (A and B are the two pictures), the dialect that it is named in the log.
ROWS = {
    "plain": ({"messages": CHAT}, CHAT, "messages"),
    "system, tool turn": (
        {"messages": [{"role": "system", "content": "S"}, CHAT[0], {"role": "assistant", "content": None, "tool_calls":
                      [{"id": "7", "function": {"name": "click", "arguments": "{\"mark_id\": 3}"}}]},
                      {"role": "tool", "content": "done"}, {"role": "assistant", "content": "4", "train": False}]},
        [{"role": "system", "content": "S"}, CHAT[0], {"role": "assistant", "content": "", "tool_calls": [CALL]},
         {"role": "tool", "content": "done"}, {"role": "assistant", "content": "4", "train": False}], "messages"),
    "typed text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "4"}]}]}, CHAT, "messages"),
    "typed picture": (
        {"messages": user_and_answer([{"type": "text", "text": "see"}, {"type": "image", "image": "a.png"},
                                      {"type": "image_url", "image_url": {"url": "file://b.png"}}])},
        user_and_answer(["see", "A", "B"]), "messages"),
    "parts without path": (
        {"messages": user_and_answer([{"type": "image"}, {"type": "text", "text": "<or>"}, {"type": "image"}]),
         "images": ["b.png", "a.png"]}, user_and_answer(["B", "<or>", "A"]), "messages"),
    "mark in a text row": ({"messages": user_and_answer("what is <image> in html?")},
                           user_and_answer("what is <image> in html?"), "messages"),
    "GUICourse": (
        {"id": "u1", "image": "a.png", "conversations": user_and_answer("<image>\n## Task")},
        user_and_answer(["A", "\n## Task"]), "GUICourse"),
    "GUICourse without mark": (
        {"image": ["a.png", "b.png"], "conversations": user_and_answer("hi") + user_and_answer("more")},
        user_and_answer(["A", "B", "\nhi"]) + user_and_answer("more"), "GUICourse"),
    "GUICourse, named marks": (
        {"image": {"<image_00>": "a.png", "<image_01>": "b.png"},
         "conversations": user_and_answer("<image_01> or\n<image_00>?", "the <image_01>")},
        user_and_answer(["B", " or\n", "A", "?"], "the <image_01>"), "GUICourse"),
    "human and gpt": (
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}], "image": None},
        CHAT, "GUICourse"),
    "CogAgent, two messages": (
        {"messages": [{"role": "user", "content": "Task", "image": "a.png"}, {"role": "assistant", "content": "ok"}]},
        user_and_answer(["A", "Task"]), "CogAgent"),
    "CogAgent, last user": ({"messages": CHAT + user_and_answer("Task"), "image": "a.png"},
                            CHAT + user_and_answer(["A", "Task"]), "CogAgent"),
    "chat text": (
        {"text": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>go"
                 "<|im_end|>\n<|im_start|>assistant\nI click\n<tool_call>\n{\"name\": \"click\", \"arguments\": "
                 "{\"mark_id\": 3}}\n</tool_call><|im_end|>\n", "screenshot": "a.png"},
        [{"role": "system", "content": "S"}, {"role": "user", "content": ["A", "go"]},
         {"role": "assistant", "content": "I click", "tool_calls": [CALL]}], "text + screenshot"),
    "completion": ({"prompt": "2 + 2?", "completion": "4"}, CHAT, "prompt/completion"),
    "completion of a dialogue": (
        {"prompt": [*CHAT, *user_and_answer("sure?", "yes")[:1]], "completion": user_and_answer("", "yes")[1:]},
        [CHAT[0], CHAT[1] | {"train": False}, *user_and_answer("sure?", "yes")], "prompt/completion"),
    "query": ({"query": "2 + 2?", "completion": "4"}, CHAT, "query/completion"),
    "system of the row": ({"system": "S", "messages": CHAT}, [{"role": "system", "content": "S"}, *CHAT], "messages"),
    "empty user": ({"messages": user_and_answer("")}, user_and_answer(""), "messages"),
}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("case", ROWS)
def test_dialects(write, tmp_path, case, name):
    row, expected, found = ROWS[case]
    expected = copy.deepcopy(expected)
    for message in expected:
        if isinstance(message["content"], list):
            pictures = {letter: {"type": "image", "image": str(tmp_path / f"{letter.lower()}.png")} for letter in "AB"}
            message["content"] = [pictures.get(part, {"type": "text", "text": part}) for part in message["content"]]
    records = open_records(write([row], name))
    record = records[0]
    assert record.messages == expected and record.dialect == found and records.dialects == {found: 1}
    assert (record.id, record.where) == (row.get("id", f"{name}:1"), f"{name}:1")
    sizes = {"a.png": (40, 30), "b.png": (20, 10)}
    assert record.image_sizes == [sizes[part["image"][-5:]] for message in expected for part in message["content"]
                                  if isinstance(part, dict) and part["type"] == "image"]
    # What comes out is a row that reads as itself.
    assert open_records(write([{"messages": record.messages}]))[0].messages == expected


def test_tools_and_notes(write):
    tool = {"type": "function", "function": {"name": "click", "parameters": {"type": "object"}}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "click", "arguments": '{"mark_id": 3}'}] * 2}
    rows = [{"messages": [CHAT[0], call], "tools": [tool]}, {"messages": [CHAT[0], call], "tools": json.dumps([tool])},
            {"messages": [CHAT[0], CHAT[1] | {"weight": 0.5, "name": None}], "tools": []}]
    records = open_records(write(rows))
    assert [record.tools for record in records] == [[tool], [tool], None]
    assert records[1].messages[1]["tool_calls"] == [CALL, CALL]
    assert records.notes == {"arguments decoded from a JSON string": 4, "key 'weight' of a turn ignored": 1}
    assert records.text_bytes[0] > records.text_bytes[2] == len("2 + 2?4")


def picture_row(image, user="x"):
    return {"conversations": user_and_answer(user), "image": image}


def call_row(calls, role="assistant"):
    return {"messages": [CHAT[0], *[CHAT[0]] * (role == "user"), {"role": role, "content": "c", "tool_calls": calls}]}


def deep(levels):
    return json.loads("[" * levels + "]" * levels)


BAD = {  # what the sentence says: the row
    "unknown role": {"messages": [{"role": "bot", "content": "x"}, *CHAT]},
    "a turn is not an object": {"messages": ["hello"]},
    "content is neither": {"messages": [{"role": "user", "content": 5}, CHAT[1]]},
    "a content part is neither": {"messages": user_and_answer([{"type": "video", "video": "v.mp4"}])},
    "the first turn is not the user's": {"messages": CHAT[1:]},
    "no assistant turn": {"messages": [CHAT[0], CHAT[1] | {"train": False}]},
    "an assistant turn has neither text nor": {"messages": CHAT + user_and_answer("x", "")},
    "train is neither": {"messages": [CHAT[0], CHAT[1] | {"train": "no"}]},
    "tool_calls is not a list": call_row([3]),
    "a tool call has no name": call_row([{"function": "click"}]),
    "the arguments of a tool call are": call_row([{"name": "click", "arguments": "[1]"}]),
    "not valid JSON": call_row([{"name": "click", "arguments": "{'a': 1}"}]),
    "tool calls outside": call_row([CALL], role="user"),
    "tools is not a list": {"messages": CHAT, "tools": "{}"},
    "a tool has no name": {"messages": CHAT, "tools": [{"type": "function", "function": {"name": 5}}]},
    "a tool has no name: {'function'": {"messages": CHAT, "tools": [{"function": None}]},
    "nested too deeply: more than 100": {"messages": CHAT, "tools": [{"name": "f", "parameters": deep(300)}]},
    "nested too deeply": call_row([{"name": "click", "arguments": {"a": deep(300)}}]),
    "a picture outside a user": {"messages": user_and_answer("x", [{"type": "image", "image": "a.png"}])},
    "the user turns have 2": picture_row("a.png", "<image> <image>"),
    "or screenshot names 0": picture_row(None, "<image>"),
    "or screenshot names 0: []": picture_row({}, "<image_01>"),
    "or screenshot names 1": picture_row({"<image_00>": "a.png"}, "<image_00> <image_01>"),
    "or screenshot names 2": picture_row(["a.png", "b.png"], "<image>"),
    "the user turns have 1": {"messages": user_and_answer([{"type": "image"}])},
    "the names of pictures": picture_row({"path": "a.png"}),
    "a picture is not named": picture_row(5),
    "an image part names its picture in another way": {
        "messages": user_and_answer([{"type": "image", "source": {"type": "base64", "data": "iVBO"}}])},
    "video is not taken: 'a.mp4'": picture_row(None) | {"video": "a.mp4"},
    "videos is not taken: ['a.mp4']": {"messages": [CHAT[0] | {"videos": ["a.mp4"]}, CHAT[1]], "videos": []},
    "a picture is missing or unreadable: no file": picture_row("c.png"),
    "a picture is missing or unreadable: http": picture_row("http://host/c.png"),
    "a picture is missing or unreadable: picture": picture_row("rows.jsonl"),
    "not a path": picture_row("a\0.png"),
    "text without chat markup": {"text": "Question and answer", "screenshot": "a.png"},
    "no dialect has these keys": {"instruction": "x"},
    "['rows', 'version']; if the rows are in its 'rows', save that list alone": {"version": 1, "rows": [{"messages": CHAT}]},
    "not readable as messages": {"messages": None},
    "a row is not an object": [1],
    "the row is one turn: a row is a whole": {"from": "human", "value": "2 + 2?"},
    "a number is infinite": {"messages": CHAT, "score": float("inf")},
    "not valid UTF-8": {"messages": user_and_answer("\ud800")},
    "not readable as WebVoyager": {"web_name": "Allrecipes", "ques": None, "web": "https://x"},
}


@pytest.mark.parametrize("expected", BAD)
def test_bad_rows(write, expected):
    assert expected in problem_of(write([BAD[expected]]))


@pytest.mark.parametrize("line, expected", [
    (b'{"messages": ', "not valid JSON: Expecting value (after 13 of 13 letters)"),
    (b'{"messages": "x', "Unterminated string"), (b"[" * 100_000, "nested too deeply"), (b'{"a": ' * 100_000, "too deeply"),
    (b'{"messages": "\xff\xfe"}', "not valid UTF-8"), (b'{"messages": 1e999}', "a number is infinite"),
    (b'{"messages": ' + b"1" * 5000 + b"}", "not valid JSON"), (b"null", "not an object"), (b"\0\0", "not valid JSON"),
    (b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "'content'"),
])
def test_bad_lines(write, line, expected):
    path = write([{"messages": CHAT}] * 3)
    with open(path, "ab") as file:
        file.write(b"\n\r\n" + line + b"\n" + json.dumps({"messages": CHAT, "id": 9}).encode())
    records = open_records(path, on_bad_row="skip")
    assert len(records) == 4 and [row["where"] for row in records.bad] == ["rows.jsonl:6"]
    assert expected in records.bad[0]["problem"]
    assert (records[3].where, records[3].id) == ("rows.jsonl:7", "9")


def test_a_row_that_is_too_long(write, monkeypatch):
    for module in ("turns", "sources"):
        monkeypatch.setattr(f"data.{module}.MAX_ROW_BYTES", 3000)
    rows = [{"messages": CHAT}, {"messages": user_and_answer("x" * 5_000_000)}, {"messages": CHAT}]
    records = open_records(write(rows), on_bad_row="skip")
    assert "row too large" in records.bad[0]["problem"]
    assert [record.where for record in records] == ["rows.jsonl:1", "rows.jsonl:3"]
    path = write([])
    path.write_bytes(b" " * 4000 + json.dumps({"messages": CHAT}).encode())  # what is read of it is blank
    assert "row too large" in open_records(path, on_bad_row="skip").bad[0]["problem"]


def test_a_list_in_the_first_line_is_one_bad_row(write):
    records = open_records(write([[1], {"messages": CHAT}]), on_bad_row="skip")
    assert [row["where"] for row in records.bad] == ["rows.jsonl:1"] and records[0].where == "rows.jsonl:2"


@pytest.mark.parametrize("name, first", [
    ("rows.jsonl", '{"messages": [{"role": "us'), ("rows.jsonl", '[{"role": "us'), ("rows.json", '{"messages": [{"role": "us'),
    ("rows.json", '{"messages": nu'),
])
def test_a_first_line_that_is_cut_short_hides_no_row(write, name, first):
    path = write([], name)
    path.write_text("\n".join([first, *[json.dumps({"messages": CHAT})] * 2]))
    records = open_records(path, on_bad_row="skip")
    assert [row["where"] for row in records.bad] == [f"{name}:1"]
    assert [record.where for record in records] == [f"{name}:2", f"{name}:3"]


@pytest.mark.parametrize("content, words", [
    (gzip.compress(b"{}", mtime=0), "packed with gzip; unpack it"), (b"PK\3\4..", "packed with zip"),
    ("{}".encode("utf-16"), "UTF-16; save it as UTF-8"), (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    (json.dumps({"messages": CHAT}, indent=2).encode(), "goes on over several lines; write one row a line"),
])
def test_a_file_of_another_form_than_its_name_says(write, content, words):
    path = write([])
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        open_records(path, on_bad_row="skip")


def test_byte_order_mark_and_line_ends(write):
    path = write([])
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"messages": CHAT}).encode() + b"\r\n\r\n"
                     + json.dumps({"messages": user_and_answer("h\u00e9", "\U0001f600")}, ensure_ascii=False).encode())
    assert [record.where for record in open_records(path)] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert open_records(path)[1].messages == user_and_answer("h\u00e9", "\U0001f600")
    first, second = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\r\n\r\n")
    path.write_bytes(b"\xef\xbb\xbf [" + first + b" ,\n" + second + b"\n]\n")
    assert [record.where for record in open_records(path)] == ["rows.jsonl:1", "rows.jsonl:2"]


def test_one_bad_element_of_an_array(write):
    path = write([{"messages": CHAT, "score": "N"}, {"messages": CHAT, "score": "U"}, {"messages": CHAT}], "rows.json")
    path.write_bytes(path.read_bytes().replace(b'"N"', b"-Infinity").replace(b'"U"', b'"\xff"'))
    records = open_records(path, on_bad_row="skip")
    assert [row["where"] for row in records.bad] == ["rows.json:1", "rows.json:2"] and records[0].where == "rows.json:3"
    path.write_text('[{"messages": []},\n{"a" 1}, {"b": [}], ' + json.dumps({"messages": CHAT}) + "]")  # brackets even out
    records = open_records(path, on_bad_row="skip")
    assert [row["where"] for row in records.bad] == ["rows.json:1", "rows.json:2", "rows.json:3"]
    assert records[0].where == "rows.json:4" and records[0].messages == CHAT


@pytest.mark.parametrize("text, where", [
    ('[{"messages": []},\n{"a": [1}', "rows.json:2 .*line 2"),
    ('[1,,2]', "rows.json:2 .*missing"), ('[{"a": 1},\n{"b": 2}', "rows.json:2 .*cut short"),
    ('[{"a": 1}\n{"b": 2}]', "rows.json:1 .*comma .*line 2"), ("[" * 100_000, "rows.json:1"),
])
def test_broken_array(write, text, where):
    path = write([], "rows.json")
    path.write_text(text)
    with pytest.raises(UserError, match=where):
        open_records(path, on_bad_row="skip")


@pytest.mark.parametrize("content, name", [
    (b"", "rows.jsonl"), (b" \n", "rows.json"), (b"[ ]", "rows.json"), ("{}".encode("utf-16"), "rows.jsonl"),
    (b"a,b", "rows.csv"), (b"a", "rows.txt"), (b"PAR1", "rows.parquet"), (None, "rows.json"),
])
def test_unusable_files(tmp_path, content, name):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        open_records(tmp_path / name)


# ---- The image root ------------------------------------------------------------------------------------------------

@pytest.fixture
def elsewhere(tmp_path):
    """A folder tree rows/, pictures/x/far.png, pictures/y/far.png, and rows/link -> pictures/x."""
    for folder in ("x", "y"):
        (tmp_path / "pictures" / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / folder / "far.png")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "link").symlink_to(tmp_path / "pictures" / "x")
    return tmp_path


@pytest.mark.parametrize("picture", ["../pictures/x/far.png", "link/far.png", "{root}/pictures/x/far.png",
                                     "file://{root}/pictures/x/far.png", "./link/../../pictures/./x/far.png"])
def test_outside_picture_names_the_root_that_admits_it(elsewhere, picture):
    path = elsewhere / "rows" / "rows.jsonl"
    path.write_text(json.dumps(picture_row(picture.format(root=elsewhere))))
    problem = problem_of(path)
    assert problem.startswith("a picture lies outside the image root")
    root = problem.split("--image_root ")[1].split()[0]
    assert root == str(elsewhere / "pictures" / "x")
    for options in ({"image_root": root}, {"allow_outside_images": True}):
        assert open_records(path, **options)[0].messages[0]["content"][0]["image"] == f"{root}/far.png"
    assert "outside" in problem_of(path, image_root=elsewhere / "pictures" / "y")


def test_many_outside_pictures_are_one_sentence_with_one_root(elsewhere):
    path = elsewhere / "rows" / "rows.jsonl"
    rows = [picture_row(f"../pictures/{'xy'[i % 2]}/far.png") for i in range(2000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + [{"messages": [3]}] * 10 + [{"messages": CHAT}]))
    with pytest.raises(UserError) as caught:
        open_records(path)
    message = str(caught.value)
    assert "2010 of 2011 rows" in message and "2000 x a picture lies outside" in message and len(message) < 1000
    assert "10 x a turn is not an object (first rows.jsonl:2001" in message and "\n" not in message
    assert f"--image_root {elsewhere / 'pictures'} would admit 2000" in message
    assert len(open_records(path, image_root=elsewhere / "pictures", on_bad_row="skip")) == 2001


def test_traversal_finds_nothing(write):
    for picture in ("/etc/passwd", "../../../../../../etc/passwd", "a.png/../../../../etc/hosts", "~/a.png", "", "."):
        assert "picture" in problem_of(write([picture_row(picture)]))


def test_few_bad_rows_are_listed(write):
    path = write([{"messages": CHAT if i % 25 else [], "uid": f"u{i}"} for i in range(100)])
    sentence = "4 of 100 rows: rows.jsonl:1 the first.*rows.jsonl:51.*and 1 more.*--on_bad_row skip"
    with pytest.raises(UserError, match=sentence):
        open_records(path)
    lines = open_records(path, on_bad_row="skip").bad
    assert [line["where"] for line in lines] == [f"rows.jsonl:{number}" for number in (1, 26, 51, 76)]
    assert [line["id"] for line in lines] == ["u0", "u25", "u50", "u75"]
    assert all(line.keys() == {"where", "id", "problem"} for line in lines)
    records = open_records(path, on_bad_row="skip")
    assert len(records) == 96 and records.refusal().startswith("4 of 100 rows: ") and records[0].id == "u1"
    assert len(open_records(write([{"messages": []}]), on_bad_row="skip")) == 0


# ---- Access --------------------------------------------------------------------------------------------------------

def test_rows_are_read_from_disk_again(write):
    path = write([{"messages": CHAT, "id": number} for number in range(50)])
    records = pickle.loads(pickle.dumps(open_records(path)))
    assert [record.id for record in records] == [str(number) for number in range(50)]
    assert records[-1].id == "49" and records[7].messages is not records[7].messages
    with pytest.raises(IndexError):
        records[50]
    path.write_bytes(path.read_bytes().replace(b"role", b"rule"))
    with pytest.raises(UserError, match="rows.jsonl:8: it was good"):
        records[7]


def test_a_row_does_not_take_the_place_of_another(write):
    path = write([{"messages": user_and_answer("a")}, {"messages": user_and_answer("b")}])
    records = open_records(path)
    path.write_bytes(b"\n".join(reversed(path.read_bytes().splitlines())) + b"\n")  # both are good, and as long
    with pytest.raises(UserError, match="^rows.jsonl:1: .* is not now: its text was changed"):
        records[0]


def test_a_file_of_rows_does_not_stay_in_memory(write):
    records = open_records(write([{"messages": user_and_answer("x" * 2000)} for _ in range(500)]))
    assert len(pickle.dumps(records)) < 500 * 100


def test_a_dialect_of_your_own(write):
    before = list(DIALECTS)

    @dialect("quiz", has("question", "choices"))
    def read_quiz(row):
        return user_and_answer(row["question"] + "".join(row["choices"]), row["choices"][row["right"]])
    try:
        records = open_records(write([{"question": "2 + 2?", "choices": ["3", "4"], "right": 1, "image": "a.png"},
                                      {"question": "2 + 2?", "choices": ["3"], "right": 1}]), on_bad_row="skip")
        assert records[0].messages[1]["content"] == "4" and records[0].messages[0]["content"][0]["type"] == "image"
        assert records.bad[0]["problem"].startswith(
            "not readable as quiz: a field has another form than in such rows (IndexError")
    finally:
        DIALECTS[:] = before
    assert "no dialect" in problem_of(write([{"question": "x", "choices": []}]))


def test_real_guicourse_rows():
    path = shared("samples/guicourse/figure_rows.json")
    records = open_records(path)
    assert len(records) == 27 and not records.bad and records.dialects == {"GUICourse": 27}
    for row, record in zip(json.loads(path.read_text()), records, strict=True):
        picture, text = record.messages[0]["content"]
        assert record.id == row["id"]
        assert picture == {"type": "image", "image": str(path.parent.resolve() / row["image"])}
        assert "<image>" + text["text"] == row["conversations"][0]["content"]
        assert record.messages[1]["content"] == row["conversations"][1]["content"]
        with Image.open(picture["image"]) as image:
            assert record.image_sizes == [image.size]


# ---- 1,000 damaged rows --------------------------------------------------------------------------------------------

def test_a_thousand_damaged_rows_are_all_accounted_for(write, tmp_path):
    rng = random.Random(0)
    originals = [row for row, _, _ in ROWS.values()]
    shutil.copy(tmp_path / "a.png", tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:20])
    lines = []
    for number in range(1000):
        line = json.dumps(damage(rng.choice(originals), rng)).encode()
        if number % 10 == 0:  # damage the bytes too
            position = rng.randrange(len(line))
            line = line[:position] + rng.choice([b"", b"\xc3", b"}", b"\\ud800", b"{" * 5000]) + line[position + 1:]
        if number % 10 == 1:
            line = line.replace(b"a.png", rng.choice([b"cut.png", b"gone.png", b"rows.jsonl", b"a" * 5000, b"."]))
        lines.append(line)
    path = write([])
    path.write_bytes(b"\n".join(lines))
    records = open_records(path, on_bad_row="skip")
    wheres = [record.where for record in records] + [row["where"] for row in records.bad]
    assert sorted(wheres, key=lambda where: int(where.split(":")[1])) == [f"rows.jsonl:{n}" for n in range(1, 1001)]
    assert len(records.bad) > 300 and all(row["problem"] and row["id"] for row in records.bad)
    assert all(len(row["problem"]) < 6000 for row in records.bad) and len(str(records.refusal())) < 60_000
    for record in records:  # what was taken can be written as UTF-8 JSON and has something to learn
        json.dumps(record.messages, allow_nan=False, ensure_ascii=False).encode()
        assert any(message["role"] == "assistant" and message.get("train", True) for message in record.messages)


def test_no_heavy_import():
    code = "import sys, data.records; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
