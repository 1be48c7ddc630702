"""Rows of web agents: Proxy-Lite's saved runs, Mind2Web's actions on cropped pages, WebVoyager's tasks."""

import base64
import json
import random
from io import BytesIO

import pytest
from conftest import shared
from PIL import Image

from data.boxes import parse_boxes
from data.dialect_browser import WINDOW, window_around
from data.dialect_proxy_lite import TOOLS, expand
from data.dialects import read_row
from data.errors import UserError
from data.images import image_size, open_image
from data.records import open_records
from data.turns import Problem, parts_of

pytestmark = pytest.mark.slow


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- Proxy-Lite ----------------------------------------------------------------------------------------------------

def screenshot(number):
    stream = BytesIO()
    Image.new("RGB", (64, 40), (number, 0, 0)).save(stream, "png")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


CALLS = [("goto", {"url": "https://example.com"}), ("click", {"mark_id": 7}),
         ("type", {"entries": [{"mark_id": 3, "content": "tea"}], "submit": True}), ("return_value", {"value": "done"})]


def make_run():
    """A run as the agent's recorder dumps it: pydantic fields, labels, typed content, arguments as JSON strings."""
    messages = [
        {"label": None, "content": [{"type": "text", "text": "You act on a screen."}], "role": "system"},
        {"label": "user_input", "content": [{"type": "text", "text": "Task: buy tea"}], "role": "user"},
    ]
    for number, (name, arguments) in enumerate(CALLS):
        arguments = json.dumps(arguments)
        if name == "return_value":
            arguments = json.dumps(arguments)  # encoded twice, as its solver expects
        messages += [
            {"label": "screenshot", "role": "user", "content": [
                {"type": "text", "text": f"URL: https://example.com/{number}\n<a id=7>Tea</a>"},
                {"type": "image_url", "image_url": {"url": screenshot(number)}}]},
            {"label": "agent_model_response", "role": "assistant", "tool_calls": [
                {"id": f"call-{number}", "type": "function", "function": {"name": name, "arguments": arguments}}],
             "content": [{"type": "text", "text": f"<observation>screen {number}</observation><thinking>on</thinking>"}]},
        ]
    return {"complete": True, "run_id": "1b2f", "task": "buy tea", "created_at": "2025-02-24T10:00:00+00:00",
            "status": "completed", "terminated_at": None, "evaluation": None, "history": [], "result": "done",
            "env_info": {}, "environment": {"name": "webbrowser"}, "solver": {"name": "simple"},
            "solver_history": {"messages": messages}}


@pytest.fixture
def steps(tmp_path):
    return open_records(write_jsonl(tmp_path / "steps.jsonl", expand(json.loads(json.dumps(make_run())))))


def test_each_action_of_a_run_is_trained_exactly_once(steps):
    trained = []
    for record in steps:
        answers = [message for message in record.messages if message["role"] == "assistant"]
        own = [message for message in answers if message.get("train", True)]
        assert own == answers[-1:] == record.messages[-1:]
        trained += own
    calls = [(call["function"]["name"], call["function"]["arguments"]) for turn in trained for call in turn["tool_calls"]]
    assert calls == CALLS and [turn["content"][:22] for turn in trained] == [f"<observation>screen {n}<" for n in range(4)]


def test_a_step_shows_what_the_agent_saw(steps):
    """System, task, the earlier actions in a row, then the newest screen alone: the agent's own context rule."""
    for number, record in enumerate(steps):
        assert [turn["role"] for turn in record.messages] == ["system", "user", *["assistant"] * number, "user", "assistant"]
        assert record.messages[0]["content"] == "You act on a screen." and record.messages[1]["content"] == "Task: buy tea"
        text, picture = record.messages[-2]["content"]
        assert text["text"].startswith(f"URL: https://example.com/{number}") and record.image_sizes == [(64, 40)]
        assert open_image(picture["image"]).getpixel((0, 0)) == (number, 0, 0)
        assert (record.id, record.dialect, record.kind) == (f"1b2f-{number + 1}", "Proxy-Lite run", "conversation")
    names = "goto google_search click type scroll back wait reload do_nothing_tool return_value".split()
    assert [tool["function"]["name"] for tool in steps[0].tools] == names


def test_a_run_file_is_read_as_its_steps(tmp_path, steps):
    """As the recorder leaves it: one indented json object a file, a folder of them."""
    (tmp_path / "local_trajectories").mkdir()
    (tmp_path / "local_trajectories" / "1b2f.json").write_text(json.dumps(make_run(), indent=2))
    records = open_records(tmp_path / "local_trajectories")
    assert [record.where for record in records] == [f"1b2f.json:{number}" for number in range(1, 5)]
    assert [record.messages for record in records] == [record.messages for record in steps]


def test_a_run_may_bring_its_tools(tmp_path):
    rows = expand(make_run() | {"tools": TOOLS[:2]})
    assert open_records(write_jsonl(tmp_path / "rows.jsonl", rows))[0].tools == TOOLS[:2]


def test_supervised_text_of_a_run(steps, tmp_path):
    """On Qwen2.5-VL's tokenizer: the four actions' texts, calls and stops have a loss, nothing else does."""
    from test_labels import make_family, spans

    from model.family import Options, find_family

    make_family("qwen2_5_vl", tmp_path)
    family = find_family(tmp_path, Options(tool_template="qwen"))
    trained = [span for record in steps for span in spans(family, family.encode(record.messages, record.tools))]
    assert len(trained) == 4
    for number, (span, (name, arguments)) in enumerate(zip(trained, CALLS, strict=True)):
        call = json.dumps({"name": name, "arguments": arguments})
        said = f"<observation>screen {number}</observation><thinking>on</thinking>"
        assert span == f"{said}\n<tool_call>\n{call}\n</tool_call><|im_end|>"


@pytest.mark.parametrize("change, expected", [
    ({"solver_history": None}, "a run without messages"), ({"solver_history": {"messages": [3]}}, "without messages"),
    ({"solver_history": {"messages": []}}, "a run without actions"),
])
def test_runs_without_actions(change, expected):
    with pytest.raises(Problem, match=expected):
        expand(make_run() | change)


def test_a_whole_run_as_a_row_is_refused_in_words(tmp_path):
    with pytest.raises(UserError, match="a whole run in one row"):
        open_records(write_jsonl(tmp_path / "rows.jsonl", [make_run()]))


# ---- Mind2Web ------------------------------------------------------------------------------------------------------

def mind2web_row(box="587,596.59375,93,54", **changes):
    """The schema of Multimodal-Mind2Web, whose operation and candidates are JSON strings; the box is a real one."""
    attributes = json.dumps({"backend_node_id": "136", "bounding_box_rect": box, "class": "a", "data_pw_testid_buckeye": "x"})
    candidate = {"tag": "button", "attributes": attributes, "is_original_target": True, "is_top_level_target": True,
                 "backend_node_id": "136"}
    row = {"action_uid": "6c7a7082", "raw_html": "<html/>", "cleaned_html": "<html/>", "annotation_id": "cd8e",
           "website": "yelp", "domain": "Travel",
           "operation": json.dumps({"original_op": "TYPE", "value": "Boston", "op": "TYPE"}),
           "pos_candidates": [json.dumps(candidate | {"is_original_target": False, "attributes": "{}"}),
                              json.dumps(candidate)],
           "neg_candidates": [], "subdomain": "Restaurant", "confirmed_task": "Book a table in Boston",
           "screenshot": "page.png", "target_action_index": "2", "target_action_reprs": "[textbox]  City -> TYPE: Boston",
           "action_reprs": ["[link]  Go -> CLICK", "[span]  2 -> CLICK", "[textbox]  City -> TYPE: Boston"]}
    return row | changes


@pytest.fixture
def page(tmp_path):
    Image.effect_noise((1280, 2529), 60).save(tmp_path / "page.png")
    return tmp_path


def test_a_mind2web_row(page):
    record = open_records(write_jsonl(page / "rows.jsonl", [mind2web_row()]))[0]
    user, answer = record.messages
    picture, text = user["content"]
    assert picture["image"].endswith("page.png#xywh=0,0,1280,720") and record.image_sizes == [(1280, 720)]
    assert open_image(picture["image"]).size == (1280, 720)
    history = "Actions so far:\n1. [link]  Go -> CLICK\n2. [span]  2 -> CLICK\n"
    assert text["text"].startswith("Task: Book a table in Boston\n" + history)
    assert "Boston" not in text["text"].partition("\n")[2]  # the action to predict is not in the history
    assert answer["content"] == "TYPE Boston <box>(459,829),(531,904)</box>" and record.dialect == "Mind2Web"


def test_a_mind2web_row_of_a_table_holds_its_page(page):
    """As the hub has it: the screenshot is a column of pictures."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    picture = {"bytes": (page / "page.png").read_bytes(), "path": None}
    write_table(pyarrow.Table.from_pylist([mind2web_row(screenshot=picture)]), page / "rows.parquet")
    (record,) = open_records(page / "rows.parquet")
    (expected,) = open_records(write_jsonl(page / "rows.jsonl", [mind2web_row()]))
    assert record.messages[1] == expected.messages[1] and record.image_sizes == expected.image_sizes
    shown, same = (open_image(row.messages[0]["content"][0]["image"]) for row in (record, expected))
    assert shown.tobytes() == same.tobytes()


@pytest.mark.parametrize("box", ["600,2480,90,40", "600,700,90,54", "0,1439,1280,2", "20,800,400,900", "-5,-5,30,30",
                                 "1270,2500,60,60"])
def test_the_box_is_where_the_target_is_on_the_picture(page, box):
    """Drawn on the page in red, the target is red on the row's picture where the answer's box says."""
    left, top, width, height = map(float, box.split(","))
    image = Image.new("RGB", (1280, 2529))
    image.paste("red", (round(left), round(top), round(left + width), round(top + height)))
    image.save(page / "page.png")
    record = open_records(write_jsonl(page / "rows.jsonl", [mind2web_row(box)]))[0]
    shown = open_image(record.messages[0]["content"][0]["image"])
    assert shown.size == (1280, 720) == record.image_sizes[0]
    seen = shown.getbbox()
    (found,) = parse_boxes(record.messages[1]["content"])
    scaled = [place * side / 1000 for place, side in zip(found, shown.size * 2, strict=True)]
    assert scaled == pytest.approx(seen, abs=1.5)


def test_windows():
    draw = random.Random(0)
    places = []
    for _ in range(2000):
        page = draw.randint(300, 3000), draw.randint(200, 8000)
        box = (draw.uniform(0, page[0] - 5), draw.uniform(0, page[1] - 5), draw.uniform(1, 300), draw.uniform(1, 200))
        box = (*box[:2], min(box[2], page[0] - box[0]), min(box[3], page[1] - box[1]))
        left, top, width, height = window_around(box, page)
        assert (width, height) == (min(page[0], WINDOW[0]), min(page[1], WINDOW[1]))
        assert 0 <= left <= page[0] - width and 0 <= top <= page[1] - height
        assert left - 1 < box[0] and box[0] + box[2] < left + width + 1
        assert top - 1 < box[1] and box[1] + box[3] < top + height + 1
        if page[1] > 3000:
            places.append((box[1] + box[3] / 2 - top) / height)
    thirds = [sum(low <= place < low + 1 / 3 for place in places) / len(places) for low in (0, 1 / 3, 2 / 3)]
    assert min(thirds) > 0.25  # the target's place says nothing: it is as often above or below as in the middle


@pytest.mark.parametrize("changes, expected", [
    (dict(pos_candidates=[]), "no element to act on"), (dict(box="-1,-1,-1,-1"), "is not on the page"),
    (dict(box="5000,5,9,9"), "is not on the page"), (dict(box="a,b"), "not readable as Mind2Web"),
    (dict(box="nan,nan,nan,nan"), "is not on the page|not readable"), (dict(screenshot="gone.png"), "missing or unreadable"),
    (dict(screenshot=None), "a picture is not named by a path"), (dict(operation="{"), "not valid JSON"),
    (dict(operation="[" * 99_999), "nested too deeply"), (dict(target_action_index="x"), "not readable as Mind2Web"),
])
def test_bad_mind2web_rows(page, changes, expected):
    with pytest.raises(UserError, match=expected):
        open_records(write_jsonl(page / "rows.jsonl", [mind2web_row(**changes)]))


def test_raw_mind2web_tasks_are_sent_to_the_set_with_screens(tmp_path):
    action = {"action_uid": "u", "raw_html": "<html>", "cleaned_html": "<a>", "pos_candidates": [], "neg_candidates": [],
              "operation": {"op": "CLICK", "original_op": "CLICK", "value": ""}}  # fmt: skip
    task = {"annotation_id": "a", "website": "aa", "domain": "Travel", "subdomain": "Airlines", "confirmed_task": "Book",
            "action_reprs": ["[a] Book -> CLICK"], "actions": [action]}  # fmt: skip
    (tmp_path / "train_0.json").write_text(json.dumps([task, task]))
    with pytest.raises(UserError, match="2 of 2 rows: train_0.json:1 a raw Mind2Web task: .*python -m data download mind2web"):
        open_records(tmp_path / "train_0.json")


# ---- WebVoyager ----------------------------------------------------------------------------------------------------

def test_real_webvoyager_tasks():
    path = shared("samples/webvoyager/WebVoyager_data.jsonl")
    records = open_records(path, takes=("problem",))
    assert len(records) == 643 and records.dialects == {"WebVoyager": 643} and not records.bad
    for row, record in zip(map(json.loads, path.read_text(encoding="utf-8").splitlines()), records, strict=True):
        assert record.id == row["id"] and record.truth == {"site": row["web_name"], "url": row["web"]}
        assert record.messages == [{"role": "user", "content": f"Task: {row['ques']}\nStart page: {row['web']}"}]


def test_a_row_of_each_agent_says_its_parts_once():
    """Reading is a pure function of the row: the row is not changed, and reads the same again."""
    row = mind2web_row()
    before = json.dumps(row)
    first, second = (read_row(row, {}, size_of=lambda path: (1280, 2529)) for _ in range(2))
    assert first == second and json.dumps(row) == before
    assert [part["type"] for part in parts_of(first.messages[0]["content"])] == ["image", "text"]


# ---- The real pictures ---------------------------------------------------------------------------------------------

def test_every_real_picture_opens():
    paths = [path for path in sorted(shared("samples").rglob("*")) if path.suffix in (".png", ".jpg")]
    assert len(paths) > 15
    for path in paths:
        assert open_image(path).size == image_size(path)


def test_cogagent_rows_with_real_pictures(tmp_path):
    """Its documented record (two messages, the picture in the user's) and the picture named by the row, later turns too."""
    first, second = (shared(f"samples/cogagent/app_{number}.png") for number in (1, 2))
    task = {"role": "user", "content": "Task: open it\n(Platform: Mac)\n(Answer in Action-Operation-Sensitive format.)\n"
                                       "History steps: \n"}
    answer = {"role": "assistant", "content": "Action: Click it.\nGrounded Operation:CLICK(box=[[655,842,671,857]], "
                                              "element_info='it')\n<<General Operation>>"}
    rows = [{"messages": [task | {"image": str(first)}, answer]},
            {"messages": [task, answer, task, answer], "image": str(second)}]
    records = open_records(write_jsonl(tmp_path / "rows.jsonl", rows), image_root=first.parent)
    assert records.dialects == {"CogAgent": 2} and sum(records.notes.values()) == 2  # the order of Platform and History
    for record, path, place in zip(records, (first, second), (0, 2), strict=True):
        picture, text = record.messages[place]["content"]
        assert picture["image"] == str(path.resolve()) and text["text"] == task["content"]
        assert record.image_sizes == [open_image(path).size] and record.messages[-1] == answer
