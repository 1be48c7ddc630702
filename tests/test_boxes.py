"""Boxes from what a data set counts to what a model counts: within half a unit, once, for training and evaluation alike."""

import importlib
import json
import random
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from conftest import shared
from PIL import Image

from data.boxes import FORMATS, KEEP, BoxRule, Convention, boxes_of, parse_boxes, place_boxes, strip_boxes
from data.errors import UserError
from data.images import smart_resize
from data.records import open_records
from data.turns import Problem
from eval import ask
from eval.actions import step_success
from eval.evaluate import label_of
from eval.metrics import Reply, box_iou, centre_in_box
from model.family import Options, families, find_family
from model.tiny import write_tiny

SIZE = (1428, 1193)
OWN = {family.name: family.box_convention for family in families() if family.box_convention}
FROM = FORMATS.split()[1:]


def rule(rows, own, seen=lambda width, height: smart_resize(height, width, 28, 3136, 1_003_520)[::-1]):
    return BoxRule(rows, own, seen)


def rewrite(boxes, text, size=SIZE):
    return boxes.rewrite_text(text, size, Counter())


# ---- arithmetic ----------------------------------------------------------------------------------------------------------


def test_every_vision_family_says_how_it_writes_boxes():
    assert {name: (own.unit, own.box, own.most < 1000) for name, own in OWN.items()} == {
        "qwen2_5_vl": ("pixels", "", False),
        "qwen3_vl": ("thousandths", "", False),
        "minicpm_v": ("thousandths", "<box>{} {} {} {}</box>", False),
        "cogagent": ("thousandths", "box=[[{},{},{},{}]]", True),
    }


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("rows", FROM)
def test_a_rewritten_box_stands_within_half_a_unit_of_where_it_stood(name, rows):
    draw, boxes = random.Random(f"{name} {rows}"), rule(rows, OWN[name])
    for _ in range(300):
        size = draw.randint(30, 3000), draw.randint(30, 3000)
        right, bottom = boxes.row_extent(size)
        digits = 3 if rows == "fractions" else 0
        xs, ys = (sorted(round(draw.uniform(0, most), digits) for _ in range(2)) for most in (right, bottom))
        text = f"<box>{xs[0]:g} {ys[0]:g} {xs[1]:g} {ys[1]:g}</box>"
        ((*written,),) = parse_boxes(rewrite(boxes, text, size))
        for number, was, most, reach in zip(
            written, (xs[0], ys[0], xs[1], ys[1]), (right, bottom) * 2, boxes.extent(size) * 2, strict=True
        ):
            exact = was / most * reach
            assert abs(number - min(exact, OWN[name].most)) <= 0.5 + 1e-9
            assert 0 <= number <= min(reach, OWN[name].most)


@pytest.mark.parametrize("seen", [(1000, 1000), (1120, 1120), (1428, 1176), (3000, 2100)])
def test_there_and_back_is_the_same_where_the_model_counts_finer(seen):
    there, back = rule("thousandths", Convention("pixels"), lambda *_: seen), rule("pixels", Convention("thousandths"))
    for number in range(1001):
        text = f"<box>{number} {number} {number} {number}</box>"
        assert rewrite(back, rewrite(there, text), seen) == text


def test_there_and_back_is_within_half_a_coarser_unit_where_it_does_not():
    seen = (280, 504)
    there, back = rule("thousandths", Convention("pixels"), lambda *_: seen), rule("pixels", Convention("thousandths"))
    for number in range(1001):
        ((*found,),) = parse_boxes(rewrite(back, rewrite(there, f"<point>{number} {number}</point>"), seen))
        for place, side in zip(found, seen, strict=False):
            assert abs(place - number) <= 0.5 * 1000 / side + 0.5  # and half a unit of the rounding back


# ---- text ------------------------------------------------------------------------------------------------------------------

QWEN = {
    "click,<box>  500 500 1000 1000</box>": "click,<box>  250 100 500 200</box>",
    "<box>(500,500),(1000,1000)</box>": "<box>(250,100),(500,200)</box>",
    "select_text, from <point>500 500</point> to <point>1000,1000</point>":
        "select_text, from <point>250 100</point> to <point>500,200</point>",
    '[{"bbox_2d": [0, 500, 500, 1000], "label": "2 items"}]': '[{"bbox_2d": [0, 100, 250, 200], "label": "2 items"}]',
    '{"point_2d": [500, 500]}': '{"point_2d": [250, 100]}',
    "<|box_start|>(500,500),(1000,1000)<|box_end|>": "<|box_start|>(250,100),(500,200)<|box_end|>",
    "CLICK(box=[[2,500,500,1000]], element_info='OK')": "CLICK(box=[[1,100,250,200]], element_info='OK')",
    "(500, 500)": "(250, 100)",
    "the numbers are [44, 19, 35, 3]": "the numbers are [44, 19, 35, 3]",  # no box: its corners are crossed
    "rows [1, 2, 3, 1001]": "rows [1, 2, 3, 1001]",  # nor is this one, which no tag marks and which lies outside
    "<box>1 2 3</box> at 12:30, step (3, 4)": "<box>1 2 3</box> at 12:30, step (3, 4)",
    "": "",
}  # fmt: skip


@pytest.mark.parametrize("text", QWEN)
def test_the_rows_words_stay_where_the_model_has_none(text):
    assert rewrite(rule("thousandths", OWN["qwen2_5_vl"], lambda *_: (500, 200)), text) == QWEN[text]


def test_marked_boxes_get_the_models_words():
    cogagent, minicpm = rule("thousandths", OWN["cogagent"]), rule("thousandths", OWN["minicpm_v"])
    assert rewrite(cogagent, "click, <box>(1,2),(988,1000)</box>") == "click, box=[[1,2,988,999]]"
    assert rewrite(cogagent, "tap, <point>500 970</point>") == "tap, box=[[500,970,500,970]]"
    assert rewrite(minicpm, "CLICK(box=[[1,2,3,4]])") == "CLICK(<box>1 2 3 4</box>)"
    assert rewrite(minicpm, "tap, <point>(500,970)</point>") == "tap, <point>500 970</point>"
    assert rewrite(minicpm, '{"bbox_2d": [1, 2, 3, 4]}') == '{"bbox_2d": [1, 2, 3, 4]}'  # or the JSON would break


CALLS = {  # arguments in thousandths -> of a picture that the model sees as 500 x 200
    '{"x": 412, "y": 18}': '{"x": 206, "y": 4}',
    '{"y": 1000, "button": "left", "x": 0}': '{"y": 200, "button": "left", "x": 0}',
    '{"action": "left_click", "coordinate": [500, 500]}': '{"action": "left_click", "coordinate": [250, 100]}',
    '{"bbox": [0, 100, 1000, 900], "text": "[1, 2, 3, 4]"}': '{"bbox": [0, 20, 500, 180], "text": "[1, 2, 3, 4]"}',
    '{"box": [[2, 5, 4, 10]], "point": [2.0, 5.0]}': '{"box": [[1, 1, 2, 2]], "point": [1, 1]}',
    '{"x": 100, "y": 100, "width": 200, "height": 500}': '{"x": 50, "y": 20, "width": 100, "height": 100}',
    '{"path": [{"x": 2, "y": 5}, {"x": 1000, "y": 1000}]}': '{"path": [{"x": 1, "y": 1}, {"x": 500, "y": 200}]}',
    '{"x1": 2, "y1": 5, "x2": 4, "y2": 10}': '{"x1": 1, "y1": 1, "x2": 2, "y2": 2}',
    '{"start_x": 2, "start_y": 5, "end_x": 4, "end_y": 10}': '{"start_x": 1, "start_y": 1, "end_x": 2, "end_y": 2}',
    '{"start_box": "<|box_start|>(2,5)<|box_end|>", "end_box": "(4, 10)"}':
        '{"start_box": "<|box_start|>(1,1)<|box_end|>", "end_box": "(2, 2)"}',
    '{"x": 500}': None, '{"x": "500", "y": "500"}': None, '{"x": true, "y": false}': None,
    '{"width": 500, "height": 500}': None,
    '{"scroll_x": 0, "scroll_y": 500}': None, '{"ids": [1, 2, 3, 4]}': None, '{"coordinate": [1, 2, 3]}': None,
    '{"text": "click [1, 2, 3, 4] or \\"x\\": 1, \\"y\\": 2"}': None,
}  # fmt: skip


@pytest.mark.parametrize("given", CALLS)
def test_coordinates_of_a_tool_call_are_those_that_are_named(given):
    """As an object of the row, and as the text that a template makes of it."""
    boxes, right = rule("thousandths", OWN["qwen2_5_vl"], lambda *_: (500, 200)), CALLS[given] or given
    call = {"type": "function", "function": {"name": "act", "arguments": json.loads(given)}}
    turn = {"role": "assistant", "content": "so:", "tool_calls": [call]}
    (written,) = boxes.rewrite([turn], [SIZE], notes := Counter())
    assert json.dumps(written["tool_calls"][0]["function"]["arguments"]) == right
    assert call["function"]["arguments"] == json.loads(given) and bool(notes) == bool(CALLS[given])
    shown = [f'so:\n<tool_call>\n{{"name": "act", "arguments": {words}}}\n</tool_call>' for words in (given, right)]
    assert rewrite(boxes, shown[0]) == shown[1]
    assert [box for _, _, box in place_boxes([written])] == parse_boxes(shown[1])
    assert bool(parse_boxes(shown[0])) == bool(CALLS[given])


def test_a_call_outside_its_picture_is_a_problem_and_one_cut_short_is_text():
    boxes = rule("thousandths", OWN["qwen2_5_vl"], lambda *_: (500, 200))
    with pytest.raises(Problem, match="outside its picture: 'x 1200, y 3', the picture is 1000 x 1000"):
        rewrite(boxes, '<tool_call>{"name": "click", "arguments": {"x": 1200, "y": 3}}</tool_call>')
    for text in ('<tool_call>{"name": "click", "arguments": {"x": 12, "y": 3', '{"x": 12, "y": 3}', "<tool_call>"):
        assert rewrite(boxes, text) == text and parse_boxes(text) == []
    assert rewrite(boxes, '{"action": "click", "coordinate": [500, 500]}') == '{"action": "click", "coordinate": [250, 100]}'


@pytest.mark.parametrize("seen", [(280, 504), (1120, 1120), (3000, 2100)])
def test_a_call_there_and_back_is_within_half_a_unit_of_each(seen):
    there, back = rule("thousandths", Convention("pixels"), lambda *_: seen), rule("pixels", Convention("thousandths"))
    for number in range(1001):
        call = {"function": {"arguments": {"x": number, "y": 1000 - number}}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        (seen_turn,) = there.rewrite([turn], [SIZE], Counter())
        (found,) = back.rewrite([seen_turn], [seen], Counter())
        arguments = found["tool_calls"][0]["function"]["arguments"]
        for place, right, side in zip(arguments.values(), (number, 1000 - number), seen, strict=True):
            assert abs(place - right) <= (0.5 * 1000 / side + 0.5 if side < 1000 else 0)


def test_keep_and_a_model_without_words_for_boxes_keep_the_text():
    turns = [{"role": "user", "content": "<box>1 2 3 4</box>"}]
    for boxes in (KEEP, rule("keep", OWN["qwen2_5_vl"]), rule("thousandths", None)):
        assert boxes.rewrite(turns, [SIZE], Counter()) is turns
    assert rule("thousandths", None).locate((500, 500, 1000, 1000), (200, 100)) == (100, 50, 200, 100)


def test_a_box_over_the_edge_is_cut_and_one_beyond_it_is_a_problem():
    boxes, notes = rule("thousandths", OWN["qwen2_5_vl"], lambda *_: (500, 200)), Counter()
    turn = {"role": "user", "content": "<box>-20 900 400 1040</box>"}
    assert boxes.rewrite([turn], [SIZE], notes)[0]["content"] == "<box>0 180 200 200</box>"
    assert notes == {"boxes rewritten from thousandths": 1, "box cut at its picture's edge": 1}
    with pytest.raises(Problem, match="outside its picture.*1200.*1000 x 1000 in thousandths"):
        boxes.rewrite([{"role": "user", "content": "<box>1100 1 1200 2</box>"}], [SIZE], notes)


def test_a_box_belongs_to_the_last_picture_before_it():
    boxes = rule("thousandths", Convention("pixels"), lambda width, height: (width, height))
    ask, picture = {"type": "text", "text": "<point>500 500</point>"}, {"type": "image", "image": "x.png"}
    turns = [
        {"role": "system", "content": "answer as <point>500 500</point>"},
        {"role": "user", "content": [ask, picture, ask, picture, ask]},
        {"role": "assistant", "content": "<point>1000 1000</point>"},
    ]
    system, user, assistant = boxes.rewrite(turns, [(100, 200), (300, 400)], Counter())
    assert system == turns[0]
    assert [part.get("text") for part in user["content"]] == [
        "<point>50 100</point>", None, "<point>50 100</point>", None, "<point>150 200</point>"]
    assert assistant["content"] == "<point>300 400</point>"
    assert turns[1]["content"][0]["text"] == "<point>500 500</point>"  # what was given is left alone


def test_a_number_without_end_is_no_box():
    for text in (f"<box>{'7' * 5000} 2 3 4</box>", f'<tool_call>{{"arguments": {{"x": 1, "y": {"7" * 400}}}}}</tool_call>'):
        assert parse_boxes(text) == [] and rewrite(rule("thousandths", OWN["qwen2_5_vl"]), text) == text


def test_text_without_its_boxes():
    assert strip_boxes("select, box=[[1,2,3,4]], Berlin").split() == ["select,", ",", "Berlin"]


# ---- rows --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model of every family that sees pictures."""
    folder = tmp_path_factory.mktemp("models")
    for family in families():
        if family.image_token_id is not None or family.box_convention:
            write_tiny(family.name, folder / family.name)
    return folder


@pytest.mark.parametrize("name", OWN)
def test_the_real_rows_of_guienv_land_on_their_elements(name, folders):
    """13 elements, each asked about both ways, with the pixels that their boxes have on the screenshot."""
    path = shared("samples/guicourse/figure_rows.json")
    rows = json.loads(path.read_text())
    expected = {row["id"]: row["_absolute"] for row in rows if "_absolute" in row}
    boxes = boxes_of(find_family(folders / name, Options(box_format="thousandths")))
    records, checked = open_records(path, boxes=boxes), 0
    for record in records:
        if record.id not in expected:
            continue
        text = record.messages[0]["content"][-1]["text"] + record.messages[1]["content"]
        (box,) = parse_boxes(text)
        unit = max(side / most for side, most in zip(SIZE, boxes.extent(SIZE), strict=True))
        for place, right in zip(boxes.locate(box, SIZE), expected[record.id], strict=True):
            assert abs(place - right) <= unit / 2 + 1.5, (record.id, box)  # the row's own thousandths are 1.4 pixels wide
        checked += 1
    assert checked == 26
    assert records.notes["boxes rewritten from thousandths"] == len(rows) == 27  # one more is GUIChat's, with a bare list


def write_rows(folder, *rows):
    Image.new("RGB", (200, 100)).save(folder / "a.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def test_both_answers_of_a_preference_and_what_a_reward_checks_are_rewritten(tmp_path):
    boxes = rule("thousandths", Convention("pixels"), lambda width, height: (width, height))
    ask = {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "<point>500 500</point>"}]}
    chosen, rejected = ([ask, {"role": "assistant", "content": f"<point>{n} 0</point>"}] for n in (1000, 0))
    (record,) = open_records(write_rows(tmp_path, {"chosen": chosen, "rejected": rejected}), boxes=boxes)
    assert record.messages[0]["content"][1]["text"] == "<point>100 50</point>"
    assert [side[-1]["content"] for side in record.conversations] == ["<point>200 0</point>", "<point>0 0</point>"]
    assert record.rejected[0] is record.messages[0]
    truth = {"box": [0, 500, 500, 1000], "elements": [[0, 0, 100, 100]], "answer": "<point>500 500</point>"}
    right = {"box": [0, 50, 100, 100], "elements": [[0, 0, 20, 10]], "answer": "<point>100 50</point>"}
    assert boxes.rewrite_truth(truth, [(200, 100)]) == right
    for wrong in ([1, 2, 3], ["1", "2", "3", "4"], "<box>", None):
        with pytest.raises(Problem, match="not four numbers"):
            boxes.rewrite_truth({"box": wrong}, [(200, 100)])
    assert boxes.rewrite_truth(None, [(200, 100)]) is None and boxes.rewrite_truth(truth, []) is truth


def test_what_no_box_can_be_made_of_is_one_bad_row(tmp_path):
    """A picture that the family cannot resize, and a number without end in what an answer is checked against."""
    for name, size in (("thin.png", (1, 900)), ("a.png", (200, 100))):
        Image.new("RGB", size).save(tmp_path / name)
    rows = [{"image": name, "prompt": "Where?", "completion": "[1, 2, 3, 4]"} for name in ("thin.png", "a.png")]
    rows.append({"image": "a.png", "prompt": "Where?", "ground_truth": {"box": [1, 2, 10**400, 4]}})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    records = open_records(tmp_path / "rows.json", boxes=rule("thousandths", OWN["qwen2_5_vl"]), on_bad_row="skip")
    assert [record.where for record in records] == ["rows.json:2"]
    problems = {row["where"]: row["problem"] for row in records.bad}
    assert problems["rows.json:1"].startswith("the model cannot take it: a picture of 1 x 900 pixels")
    assert problems["rows.json:3"].startswith("a box to check answers against is not four numbers")


def test_the_click_of_an_answer_is_judged_and_drawn_like_the_rows(tmp_path, folders):
    """The README's row: what the model reads, what the metrics see in its answer, and where it lies on the picture."""
    call = {"type": "function", "function": {"name": "click", "arguments": {"x": 50, "y": 100}}}
    ask = {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "open it"}]}
    path = write_rows(tmp_path, {"messages": [ask, {"role": "assistant", "content": "", "tool_calls": [call]}]})
    family = find_family(folders / "qwen2_5_vl", Options(box_format="pixels", tool_template="qwen"))
    boxes = boxes_of(family)
    (record,) = open_records(path, boxes=boxes)
    example = family.encode(record.messages)
    label = label_of(family, example)
    assert "<tool_call>" in label
    (box,) = parse_boxes(label)
    assert boxes.locate(box, (200, 100)) == pytest.approx((50, 100, 50, 100), abs=1)
    assert centre_in_box(Reply("1", "x:1", "", label, "<box>{} {} {} {}</box>".format(*box), True)) == {"centre_in_box": 1.0}


def test_an_index_is_of_one_way_to_rewrite(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("data.index"), "WORTH_SECONDS", 0.0)
    row = {"image": "a.png", "conversations": [{"role": "user", "content": "<image>where?"},
                                              {"role": "assistant", "content": "<box>201 2 300 400</box>"}]}  # fmt: skip
    path = write_rows(tmp_path, row)
    pixels, cogagent = Convention("pixels"), OWN["cogagent"]
    for boxes in [KEEP, rule("thousandths", pixels), rule("thousandths", cogagent), rule("pixels", cogagent)] * 2:
        found = [open_records(path, boxes=boxes, on_bad_row="skip") for _ in range(2)]  # the second one from the index
        assert len({(len(r), tuple(r.notes), tuple(r.text_bytes)) for r in found}) == 1
        fits = boxes.rows != "pixels"  # of a picture of 200 x 100 the box is beyond the edge
        assert (len(found[0]), bool(found[0].notes)) == (int(fits), fits and boxes.rewrites)


@pytest.mark.parametrize("name", OWN)
def test_a_question_is_rewritten_and_its_answer_drawn_as_in_training(name, folders, tmp_path, monkeypatch):
    """The same words for every family; the model sees its own, and the answer in its own lands in the same place."""
    family = find_family(folders / name, Options(box_format="thousandths"))
    Image.new("RGB", (400, 200), "white").save(tmp_path / "a.png")
    answer = rewrite(boxes_of(family), "<box>500 500 1000 1000</box>", (400, 200))
    monkeypatch.setattr(ask, "generate", lambda model, prompts, most: [SimpleNamespace(text=answer, stopped=True)])
    subject = SimpleNamespace(family=family, model=None, precision=SimpleNamespace(autocast=nullcontext))
    dialogue = ask.Dialogue(subject, str(tmp_path / "a.png"), draw=str(tmp_path / "out.png"))
    assert dialogue.ask("what is in <box>500 500 1000 1000</box>?") == answer
    assert answer in dialogue.messages[0]["content"][1]["text"]
    drawn = Image.open(tmp_path / "out.png")
    red = [(x, y) for x in range(400) for y in range(200) if drawn.getpixel((x, y)) == (255, 0, 0)]
    assert abs(min(x for x, _ in red) - 200) <= 1 and abs(min(y for _, y in red) - 100) <= 1
    with pytest.raises(UserError, match="outside its picture.*--box_format"):
        dialogue.ask("and in <box>1200 500 1300 1000</box>?")


# ---- scores ------------------------------------------------------------------------------------------------------------


def test_scores_do_not_depend_on_what_boxes_count():
    draw, pixels = random.Random(0), rule("thousandths", Convention("pixels"), lambda *_: (5600, 2800))
    for _ in range(200):
        points = [draw.randint(0, 1000) for _ in range(4)]
        texts = [f"actions:\ntap, <point>{x} {y}</point>" for x, y in (points[:2], points[2:])]
        before = step_success(Reply("1", "x:1", "", *texts, True))
        after = step_success(Reply("1", "x:1", "", *(rewrite(pixels, t) for t in texts), True, extent=pixels.extent(SIZE)))
        assert before == after
    label, answer = "<box>100 100 300 300</box>", "<box>200 100 300 400</box>"
    before, after = (box_iou(Reply("1", "x:1", "", *texts, True)) for texts in (
        (answer, label), (rewrite(pixels, answer), rewrite(pixels, label))))  # fmt: skip
    assert before == pytest.approx(after)
