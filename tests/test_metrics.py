"""Metrics against values worked out by hand, and boxes in every spelling that the data sets and models use."""

import itertools
import json
import random

import pytest
from PIL import Image

from data.boxes import parse_boxes
from data.errors import UserError
from eval.boxes import draw_boxes, intersection_over_union
from eval.metrics import (
    Reply,
    box_iou,
    centre_in_box,
    exact_match,
    f1,
    parse_calls,
    pass_at_k,
    token_f1,
    tool_call,
    wilson_interval,
)
from eval.tasks import Task, find_task, means, task_names


def reply(response, label, tools=None):
    return Reply("7", "rows.jsonl:7", "question", response, label, True, tools)


SPELLINGS = {
    "<box>426 937 481 960</box>": [(426, 937, 481, 960)],
    "click,<box>  296 301 327 320</box>": [(296, 301, 327, 320)],
    "<box>(426,937),(481,960)</box>": [(426, 937, 481, 960)],
    "<box>10, 20, 30.5, 40</box>": [(10, 20, 30.5, 40)],
    "<box>[[10,20,30,40]]</box>": [(10, 20, 30, 40)],
    "CLICK(box=[[655,842,671,857]], element_info='OK')": [(655, 842, 671, 857)],
    "CLICK(box=[655,842,671,857])": [(655, 842, 671, 857)],
    '{"bbox_2d": [1, 2, 3, 4], "label": "2 items"}': [(1, 2, 3, 4)],
    "It is at [10, 276, 390, 305].": [(10, 276, 390, 305)],
    "[0.452, 0.493, 0.5, 0.6]": [(0.452, 0.493, 0.5, 0.6)],
    "<|box_start|>(1,2),(3,4)<|box_end|>": [(1, 2, 3, 4)],
    "(1, 2), (3, 4)": [(1, 2, 3, 4)],
    "<point>500 970</point>": [(500, 970, 500, 970)],
    "<point>(500,970)</point>": [(500, 970, 500, 970)],
    "<box>30 40 10 20</box>": [(10, 20, 30, 40)],
    "<box>1 2 3 4</box> and <box>(5,6),(7,8)</box>": [(1, 2, 3, 4), (5, 6, 7, 8)],
    "<box>1 2 3</box>": [],
    "<box>1 2 3 4": [],
    "<box>1 2 3 4</point>": [],
    "[1, 2, 3]": [],
    "[1, 2, 3, 4, 5]": [],
    "step 3 of 4 at 12:30": [],
    "": [],
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_boxes_in_every_spelling(text):
    assert parse_boxes(text) == SPELLINGS[text]


def test_a_long_hostile_text_is_read_in_time():
    assert parse_boxes("[1, " * 50_000 + "<box>" * 50_000) == []


def test_overlap():
    assert intersection_over_union((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert intersection_over_union((0, 0, 10, 10), (20, 20, 30, 30)) == 0
    assert intersection_over_union((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert intersection_over_union((5, 5, 5, 5), (5, 5, 5, 5)) == 0


def test_centre_in_box_takes_the_first_box_and_the_edge_counts():
    label = "<box>100 100 200 200</box>"
    scores = {
        "<box>150 150 250 250</box>": 1.0,  # its centre is the label's corner
        "<box>151 150 251 250</box>": 0.0,
        "<point>100 200</point>": 1.0,
        "<box>0 0 10 10</box> or <box>120 120 130 130</box>": 0.0,
        "no idea": 0.0,
        "": 0.0,
    }
    for response, score in scores.items():
        assert centre_in_box(reply(response, label)) == {"centre_in_box": score}


def test_box_iou_is_the_mean_of_each_answers_best_label():
    labels = "<box>0 0 10 10</box><box>100 0 110 10</box>"
    assert box_iou(reply("<box>0 0 10 10</box>", labels)) == {"iou": 1.0}
    assert box_iou(reply("<box>100 0 110 10</box><box>50 50 60 60</box>", labels)) == {"iou": 0.5}
    assert box_iou(reply("nothing", labels)) == {"iou": 0.0}


def test_a_label_without_a_box_is_a_problem_and_no_score():
    for metric in (centre_in_box, box_iou):
        with pytest.raises(UserError, match="no box"):
            metric(reply("<box>1 2 3 4</box>", "Save"))


def test_text():
    assert exact_match(reply(" Green Flash\n", "Green Flash")) == {"exact_match": 1.0}
    assert exact_match(reply("green flash", "Green Flash")) == {"exact_match": 0.0}
    assert token_f1(reply("The green, flash!", "green flash")) == {"f1": 1.0}
    assert f1("green flash light", "a green dot") == pytest.approx(2 * 1 / (3 + 2))
    assert f1("go go go", "go") == pytest.approx(2 * 1 / (3 + 1))
    assert f1("", "") == f1("the", "!") == 1.0
    assert f1("", "word") == f1("word", "") == 0.0


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


TOOLS = [
    {"type": "function", "function": {"name": "click", "parameters": {
        "type": "object", "properties": {"mark_id": {"type": "integer"}}, "required": ["mark_id"]}}},
    {"type": "function", "function": {"name": "search", "parameters": {
        "properties": {"query": {"type": "string"}, "plan": {"type": "string"}}, "required": ["query"]}}},
    {"type": "function", "function": {"name": "back", "parameters": {"type": "object", "properties": {}}}},
]  # fmt: skip


def levels(response, label, tools=TOOLS):
    scores = tool_call(reply(response, label, tools))
    return tuple(scores[name] for name in ("call_parses", "call_name", "call_exact", "argument_f1", "call_valid"))


def test_tool_calls_by_level():
    label = "<thinking>x</thinking>" + call("click", mark_id=3)
    assert levels("other thoughts" + call("click", mark_id=3), label) == (1, 1, 1, 1, 1)
    assert levels(call("click", mark_id=4), label) == (1, 1, 0, 0, 1)
    assert levels(call("click", mark_id=True), label) == (1, 1, 0, 0, 0)
    assert levels(call("click", mark_id=3, fast=1), label) == (1, 1, 0, 0.5, 0)
    assert levels(call("click"), label) == (1, 1, 0, 0, 0)
    assert levels(call("hover", mark_id=3), label) == (1, 0, 0, 0, 0)
    assert levels(call("click", mark_id=3) * 2, label) == (1, 0, 0, 0.5, 1)
    assert levels(call("back"), call("back")) == (1, 1, 1, 1, 1)
    whole = call("click", mark_id=3)
    nameless = '<tool_call>{"arguments": {}}</tool_call>'
    for nonsense in ("click 3", "<tool_call>{}</tool_call>", "<tool_call>[1]</tool_call>", nameless, whole[:-5],
                     whole * 2 + "<tool_call>", ""):  # fmt: skip
        assert levels(nonsense, label) == (0, 0, 0, 0, 0), nonsense


def test_text_arguments_are_compared_by_words():
    label = call("search", query="cheap red shoes", plan="look")
    scores = tool_call(reply(call("search", query="red shoes", plan="look"), label))
    assert scores["argument_f1"] == pytest.approx((2 * 2 / (2 + 3) + 1) / 2)
    assert "call_valid" not in scores  # the row has no tools to check against


def test_arguments_as_a_json_string_are_decoded_once():
    text = '<tool_call>{"name": "click", "arguments": "{\\"mark_id\\": 3}"}</tool_call>'
    assert parse_calls(text) == [{"name": "click", "arguments": {"mark_id": 3}}]
    with pytest.raises(UserError, match="no tool call"):
        tool_call(reply(text, "click 3"))


def test_tasks_are_found_by_listing_and_by_function():
    assert {"auto", "box", "demo", "text", "tool_call"} <= set(task_names())
    for name in task_names():
        assert isinstance(find_task(name), Task)
    assert find_task("eval.metrics:exact_match").metrics == [exact_match]
    for wrong in ("boxes", "eval.metrics:nothing", "no_such_file:f"):
        with pytest.raises(UserError, match=f"--task {wrong}"):
            find_task(wrong)


def test_the_automatic_task_goes_by_the_label():
    (metric,) = find_task("auto").metrics
    assert set(metric(reply("Save", "Save"))) == {"exact_match", "f1"}
    assert set(metric(reply("Save", "<box>1 2 3 4</box>"))) == {"exact_match", "f1", "centre_in_box", "iou"}
    assert metric(reply(call("back"), call("back")))["call_exact"] == 1.0


def test_the_built_in_task():
    (metric,) = find_task("demo").metrics
    assert metric(reply("<box>12 12 18 18</box>", "<box>10 10 20 20</box>")) == {"correct": 1.0}
    assert metric(reply("<box>30 12 38 18</box>", "<box>10 10 20 20</box>")) == {"correct": 0.0}
    assert metric(reply("Save", "Save")) == {"correct": 1.0}


def test_a_mean_is_over_the_rows_that_have_the_score():
    lines = [{"id": "1", "stopped": True, "f1": 1.0, "iou": 0.5}, {"id": "2", "stopped": False, "f1": 0.0}]
    assert means(lines) == {"f1": 0.5, "iou": 0.5}


def test_boxes_are_drawn_where_they_are():
    picture = draw_boxes(Image.new("RGB", (200, 100), "white"), [(100, 200, 500, 800)], (0.2, 0.1))
    assert picture.getpixel((20, 50)) == (255, 0, 0)  # left edge
    assert picture.getpixel((60, 20)) == (255, 0, 0)  # top edge
    assert picture.getpixel((60, 50)) == (255, 255, 255)  # inside
    assert draw_boxes(Image.new("RGB", (50, 50), "white"), [(9, 9, 9, 9)], (1, 1)).getpixel((9, 9)) == (255, 0, 0)


def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples():
    for num_samples, num_correct in ((5, 0), (5, 2), (5, 5), (6, 1)):
        right = [1] * num_correct + [0] * (num_samples - num_correct)
        for k in range(1, num_samples + 1):
            choices = [max(chosen) for chosen in itertools.combinations(right, k)]
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(choices) / len(choices))


def test_wilsons_interval_holds_the_true_share_95_times_of_100():
    source, held = random.Random(0), 0
    for _ in range(2000):
        true = source.uniform(0.05, 0.95)
        low, high = wilson_interval(sum(source.random() < true for _ in range(40)) / 40, 40)
        held += low <= true <= high
    assert 0.93 < held / 2000 < 0.97
    assert wilson_interval(0.0, 10)[0] == pytest.approx(0) and wilson_interval(1.0, 10)[1] == pytest.approx(1)
    assert wilson_interval(0.0, 10)[1] == pytest.approx(0.2775, abs=1e-4)  # z^2 / (n + z^2)
