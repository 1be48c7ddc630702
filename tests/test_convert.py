"""GUICourse's published files as rows: raw rows of every kind, pictures out of parquet files, and what cannot be converted."""

import base64
import json
import subprocess
import sys
from io import BytesIO

import pytest
from conftest import ROOT, shared
from PIL import Image

from data.boxes import parse_boxes
from data.convert import convert_guicourse, converted, read_pictures
from data.errors import UserError
from data.guicourse import convert_row
from data.images import open_image
from data.records import open_records
from data.turns import Problem, parts_of

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

SIZE = {"width": 1428, "height": 1193}
BOX = {"absolute": "<box>162, 614, 337, 717</box>", "related": "<box>0.113, 0.514, 0.57, 0.601</box>"}
POINTS = {"absolute": {"from": "<point>645, 588</point>", "to": "<point>823, 608</point>"},
          "related": {"from": "<point>0.452, 0.493</point>", "to": "<point>0.577, 0.510</point>"}}
QWEN_BOX = "<box>(113,514),(570,601)</box>"  # int(1000 * 0.57) is 569
GUIENV = "If the input is a string, please give me the element regions including this string. Else if the input is a " \
         "region, please give me the string (text) in this region.## Input\n"


def guienv(**changes):
    return {"uid": "uid_img_C4web-1_bbox2text_00", "image_id": "C4web-1", "image_size": SIZE, "task_type": "bbox2text",
            "question": BOX, "answer": "Dix Angus"} | changes


def guiact(*actions, **changes):
    return {"uid": "uid_record_03567_step_01", "image_id": "uid_record_03567_step_01", "image_size": SIZE, "logs": "",
            "question": "Sign up", "actions_history": "step 0: hover", "thoughts": "", "actions_label": list(actions)} | changes


def action(name, **fields):
    return {"name": name} | fields


# What actions_label holds -> the answer's lines, in the words of the published answers (samples: web and smartphone).
ACTIONS = {
    "click": (action("click", element={"id": 7, **BOX}), f"click, {QWEN_BOX}"),
    "hover": (action("hover", element=BOX), f"hover, {QWEN_BOX}"),
    "tap": (action("tap", point={"absolute": "<point>720, 2300</point>", "related": "<point>0.5, 0.97</point>"}),
            "tap, <point>(500,970)</point>"),
    "input": (action("input", text="Chandler, AZ"), "input, Chandler, AZ"),
    "scroll": (action("scroll", scroll={"related": {"down": "0.53", "right": "0.1"}, "absolute": {"down": 1, "right": 0}}),
               "scroll, down 530 right 100"),
    "scroll up": (action("scroll", scroll={"related": {"down": -0.25, "right": 0}}), "scroll, down -250 right 0"),
    "select_text": (action("select_text", dual_point=POINTS),
                    "select_text, from <point>(452,493)</point> to <point>(577,510)</point>"),
    "swipe": (action("swipe", dual_point=POINTS["related"]),
              "swipe, from <point>(452,493)</point> to <point>(577,510)</point>"),
    "select": (action("select", element=BOX, text="2 rooms"), f"select, {QWEN_BOX}, 2 rooms"),
    "copy": (action("Copy_Text"), "copy"), "enter": (action("enter"), "enter"),
    "answer": (action("answer", text="task complete"), "answer, task complete"),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIONS)
def test_actions(name):
    raw, line = ACTIONS[name]
    row, ids = convert_row(guiact(raw))
    assert row["conversations"][1]["content"] == f"actions:\n{line}\n" and ids == ["uid_record_03567_step_01"]
    alone, _ = convert_row(guiact(actions_label=raw))  # smartphone rows have one action, not a list of them
    assert alone == row


def test_prompts_are_those_of_the_published_answers():
    """Prompts of GUICourse's own result files, where they lie: our rows ask in those words, the same for train and test."""
    for name in ("smartphone", "web_single", "web_multi"):
        for said in json.loads(shared(f"samples/guicourse/pred_minicpm_guiagent_{name}.first20.json").read_text()):
            history, _, question = said["prompt"].removeprefix("Actions History\n").rpartition("Your Task\n")
            question = question.removesuffix("\nGenerate next actions to do this task.")
            row, _ = convert_row(guiact(action("enter"), question=question, actions_history=history.removesuffix("\n")))
            assert row["conversations"][0]["content"] == "<image>\n" + said["prompt"]


def test_thoughts_and_logs():
    raw = guiact(action("enter"), action("enter"), logs="saw it", thoughts="click on it", actions_history=None)
    question, answer = (turn["content"] for turn in convert_row(raw)[0]["conversations"])
    assert question == "<image>\nInformations\nsaw it\nYour Task\nSign up\nGenerate next actions to do this task."
    assert answer == "thoughts: click on it\nactions:\nenter\nenter\n"


def test_guienv_rows():
    """In the words of the real training rows, to the byte: both directions."""
    there, _ = convert_row(guienv())
    assert there == {"id": "uid_img_C4web-1_bbox2text_00", "image": "C4web-1", "conversations": [
        {"role": "user", "content": f"<image>\n## Your Task\n{GUIENV}{QWEN_BOX}\n## Output\n"},
        {"role": "assistant", "content": "Dix Angus"}]}
    boxes = {name: [box, box] for name, box in BOX.items()}
    back, _ = convert_row(guienv(task_type="text2bbox", question="Dix {} Angus", answer=boxes))
    assert [turn["content"] for turn in back["conversations"]] == [
        f"<image>\n## Your Task\n{GUIENV}Dix {{}} Angus\n## Output\n", f"{QWEN_BOX}\n{QWEN_BOX}"]


def test_guienv_words_are_the_real_rows():
    real = json.loads(shared("samples/guicourse/figure_rows.json").read_text())
    for row in real:
        question = row["conversations"][0]["content"]
        if GUIENV in question and (boxes := parse_boxes(question)):
            related = "<box>{}</box>".format(", ".join(str(place / 1000) for place in boxes[0]))
            made, _ = convert_row(guienv(question={"related": related}, answer=row["conversations"][1]["content"]))
            assert made["conversations"] == row["conversations"]


def test_guichat_rows():
    text = [{"from": "human", "value": "<image>shot-1</image>\nWhat is new?"},
            {"from": "gpt", "value": "The door <box>10 276 390 305</box> and <box>x</box>, <box> 1, 2, 3, 4</box>."},
            {"from": "human", "value": "And on <image>shot-2</image> or <image>shot-1</image>?"},
            {"from": "gpt", "value": "No."}]
    row, ids = convert_row({"uid": "c1", "image_id": "shot-1", "text": text})
    assert ids == ["shot-1", "shot-2", "shot-1"]
    assert row["image"] == {"<image_00>": "shot-1", "<image_01>": "shot-2", "<image_02>": "shot-1"}
    assert [turn["value"] for turn in row["conversations"]] == [
        "<image_00>\nWhat is new?", "The door <box>(10,276),(390,305)</box> and <box>x</box>, <box>(1,2),(3,4)</box>.",
        "And on <image_01> or <image_02>?", "No."]
    alone, ids = convert_row({"uid": "c2", "image_id": "shot-1", "text": [{"from": "human", "value": "Hi"}]})
    assert alone["image"] == "shot-1" and ids == ["shot-1"]


@pytest.mark.parametrize("raw, expected", [
    (guiact(action("fly")), "unknown action"), (guienv(task_type="ocr"), "unknown task_type"),
    (guienv(question="<box>1, 2, 3</box>"), "not a box or point"), (guienv(question="text"), "not a box or point"),
    (guienv(question="<box>0.1, 0.2, 1.3, 0.4</box>"), "outside of the picture"),
    (guiact(action("tap", point={"related": "<point>-0.1, 0.5</point>"})), "outside of the picture"),
    (guiact(action("scroll", scroll={"down": "1e999", "right": "0"})), "OverflowError"),
    (guiact(action("enter"), question=None), "TypeError"), (guiact(action("enter"), image_id=["i"]), "id is no text"),
    (guienv(task_type="text2bbox", question=None, answer=BOX), "TypeError"),
])
def test_rows_that_are_not_converted(raw, expected):
    with pytest.raises(Problem, match=expected):
        converted(raw)


# ---- Whole files ---------------------------------------------------------------------------------------------------

def picture(colour, kind="png"):
    stream = BytesIO()
    Image.new("RGB", (30, 20), colour).save(stream, kind)
    return stream.getvalue()


def write_table(path, pictures, index="__index_level_0__", group=2):
    columns = {"base64": list(pictures.values()), "elements": [[{"uid": 1}]] * len(pictures), index: list(pictures)}
    parquet.write_table(pyarrow.table(columns), path, row_group_size=group)


@pytest.fixture
def raw_files(tmp_path):
    """Two of the data set's pairs of files: one with base64 text and sub-folder, one with raw bytes."""
    folder = tmp_path / "raw" / "GUIAct"
    folder.mkdir(parents=True)
    rows = [guiact(action("enter"), uid=f"u{number}", image_id=f"i{number}") for number in range(5)]
    rows[3]["actions_label"] = [action("fly")]
    rows += [guiact(action("enter"), uid="lost", image_id="nowhere"), [1],
             guiact(action("enter"), uid="up", image_id="../up"), guiact(action("enter"), uid="broken", image_id="broken")]
    (folder / "web-single_train_data.json").write_text(json.dumps(rows))
    pictures = {f"i{number}": base64.b64encode(picture((number, 0, 0))).decode() for number in range(7)}
    pictures |= {"../up": pictures["i0"], "broken": "!!"}
    write_table(folder / "web-single_train_images.parquet", pictures)
    text = [{"from": "human", "value": "<image>a</image> or <image>b</image>?"}, {"from": "gpt", "value": "both"}]
    (tmp_path / "raw" / "guichat_data.json").write_text(json.dumps([{"uid": "c", "image_id": "a", "text": text}]))
    write_table(tmp_path / "raw" / "guichat_images.parquet", {"a": picture("red", "jpeg"), "b": picture("blue")}, "image_id")
    return tmp_path / "raw"


def test_files_become_rows_that_train(raw_files, tmp_path, capsys):
    out = tmp_path / "out"
    convert_guicourse(raw_files, out)
    records = open_records(out / "web-single_train.jsonl", takes=("conversation",))
    assert [record.id for record in records] == ["u0", "u1", "u2", "u4"] and records.dialects == {"GUICourse": 4}
    for number, record in zip((0, 1, 2, 4), records, strict=True):
        shown, words = parts_of(record.messages[0]["content"])
        assert open_image(shown["image"]).getpixel((0, 0)) == (number, 0, 0)
        assert words["text"].startswith("\nActions History\nstep 0: hover\n")
    (chat,) = open_records(out / "guichat.jsonl")
    assert [part.get("text") or open_image(part["image"]).getpixel((0, 0))[0] > 250 for part in chat.messages[0]["content"]] \
        == [True, " or ", False, "?"]
    bad = [json.loads(line) for line in (out / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["where"].split(":")[1], row["id"]) for row in bad] == [
        ("4", "u3"), ("6", "lost"), ("7", "web-single_train_data.json:7"), ("8", "up"), ("9", "broken")]
    assert [row["problem"].split(":")[0] for row in bad] == [
        "unknown action", "no such picture in the parquet file", "a row is not an object",
        "no such picture in the parquet file", "no such picture in the parquet file"]
    said = capsys.readouterr().out
    assert "web-single_train: 4 rows and 4 pictures; 5 rows refused" in said and "guichat: 1 rows and 2 pictures" in said
    names = sorted(path.name for path in (out / "images" / "web-single_train").iterdir())
    assert names == ["i0.png", "i1.png", "i2.png", "i4.png"]


def test_pictures_keep_their_bytes_and_are_written_once(raw_files, tmp_path):
    out = tmp_path / "out"
    convert_guicourse(raw_files, out)
    file = out / "images" / "guichat" / "a.jpeg"
    assert file.read_bytes() == picture("red", "jpeg")
    rows = (out / "guichat.jsonl").read_bytes()
    (out / "images" / "guichat" / "b.png").unlink()  # as a killed run would leave it
    (out / "images" / "guichat" / "b.png.tmp").write_bytes(b"half")
    before = file.stat().st_mtime_ns
    convert_guicourse(raw_files, out)
    assert file.stat().st_mtime_ns == before and (out / "guichat.jsonl").read_bytes() == rows
    assert (out / "images" / "guichat" / "b.png").read_bytes() == picture("blue")


def test_an_index_as_pandas_writes_it(tmp_path):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"base64": ["eA==", "eQ=="]}, index=["one", "two"])
    table.to_parquet(tmp_path / "t.parquet")
    assert list(read_pictures(tmp_path / "t.parquet")) == [("one", "eA=="), ("two", "eQ==")]


@pytest.mark.parametrize("damage, expected", [
    (lambda raw: (raw / "guichat_images.parquet").unlink(), "no guichat_images.parquet beside it"),
    (lambda raw: (raw / "guichat_images.parquet").write_bytes(b"x"), "cannot be read as parquet"),
    (lambda raw: parquet.write_table(pyarrow.table({"a": [1]}), raw / "guichat_images.parquet"), "no column base64 .*only a"),
    (lambda raw: (raw / "guichat_data.json").write_text("{}"), "is not a json array"),
    (lambda raw: (raw / "guichat_data.json").write_text('[{"a": 1}'), "cut short"),
])
def test_files_that_cannot_be_read(raw_files, tmp_path, damage, expected):
    damage(raw_files)
    with pytest.raises(UserError, match=expected):
        convert_guicourse(raw_files, tmp_path / "out")


def test_the_command(raw_files, tmp_path):
    done = [subprocess.run([sys.executable, "-m", "data", "convert", "guicourse", "--input_dir", str(folder),
                            "--output_dir", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
            for folder in (raw_files, tmp_path / "nothing")]
    assert [run.returncode for run in done] == [0, 2], done[0].stderr
    assert "5 rows are in" in done[0].stdout and "has no *_data.json below it" in done[1].stderr
