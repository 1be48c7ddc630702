"""Rewards by name, GUI actions by the published rules, and learned rewards against what they are made of."""

import pytest

from data.errors import UserError
from eval.actions import Action, parse_actions, step_success
from eval.metrics import Reply
from eval.rewards import RULES, find_reward


def reply(response, label="", truth=None, prompt="", stopped=True, **more):
    return Reply("7", "rows.jsonl:7", prompt, response, label, stopped, truth=truth, **more)


# ---- by name ---------------------------------------------------------------------------------------------------------


def test_every_rule_gives_a_score():
    call = '<tool_call>{"name": "click", "arguments": {"mark_id": 3}}</tool_call>'
    right = {
        "countdown": reply("<answer>2*3</answer>", truth={"numbers": [2, 3], "target": 6}),
        "cs224r": reply("<answer>2*3</answer>", truth={"numbers": [2, 3], "target": 6}),
        "tinyzero": reply("<answer>2*3</answer>", truth={"numbers": [2, 3], "target": 6}, prompt="Assistant: "),
        "box_centre": reply("<box>2 2 8 8</box>", "<box>1 1 9 9</box>"),
        "box_iou": reply("<box>1 1 9 9</box>", "<box>1 1 9 9</box>"),
        "gui_action": reply("actions:\nclick, <box>2 2 8 8</box>", "actions:\nclick, <box>1 1 9 9</box>"),
        "tool_call": reply(call, call),
        "text": reply("Green Flash", "Green Flash"),
    }
    assert right.keys() == RULES.keys()
    for name, answered in right.items():
        wrong = reply("no idea", answered.label, answered.truth)
        scores = find_reward(name)([answered, wrong, answered])
        assert [found["score"] for found in scores] == [1.0, 0.0, 1.0], name


def test_an_answer_that_goes_on_is_seen():
    truth = {"numbers": [2, 3], "target": 6}
    for text, stopped, expected in (("<answer>2*3</answer>\n", True, 1.0), ("<answer>2*3</answer>", False, 0.0),
                                    ("<answer>2*3</answer> or", True, 0.0)):  # fmt: skip
        (found,) = find_reward("countdown")([reply(text, truth=truth, stopped=stopped)])
        assert found["score"] == 1.0 and found["stops_after_answer"] == expected


def test_a_tool_call_is_graded():
    label = '<tool_call>{"name": "click", "arguments": {"mark_id": 3}}</tool_call>'
    scores = [
        find_reward("tool_call")([reply(text, label)])[0]["score"]
        for text in ("", label.replace("click", "hover"), label.replace("3", "4"), label)
    ]
    assert scores == sorted(scores) and len(set(scores)) == 4


def test_a_reward_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(
        "def length(reply):\n    return {'score': len(reply.response)}\ndef bad(reply):\n    return {'length': 1}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert find_reward("my_reward:length")([reply("abc")]) == [{"score": 3}]
    with pytest.raises(UserError, match="score"):
        find_reward("my_reward:bad")([reply("abc")])
    for wrong in ("count", "my_reward:nothing", "no_such_file:f"):
        with pytest.raises(UserError, match=f"--reward {wrong}"):
            find_reward(wrong)


def test_a_row_without_the_truth_is_a_problem():
    for truth in (None, {"answer": "6"}):
        with pytest.raises(UserError, match="no numbers and target"):
            find_reward("countdown")([reply("<answer>2*3</answer>", truth=truth)])


# ---- GUI actions -----------------------------------------------------------------------------------------------------


def test_actions_are_read_as_the_data_set_writes_them():
    text = (
        "thoughts: click, then type\nactions:\nclick,<box> 238 749 318 770</box>\ninput, Great, article!\nenter\n"
        "select_text, from <point> 60 304</point>  to <point> 158 362</point> \nscroll, down 530 right 0\n"
        "answer, one\ntwo lines"
    )
    actions = parse_actions(text)
    assert [action.name for action in actions] == ["click", "input", "enter", "select_text", "scroll", "answer"]
    assert actions[0].boxes == [(238, 749, 318, 770)] and actions[1].rest == "Great, article!"
    assert actions[3].span == (60, 304, 158, 362) and actions[5].rest == "one\ntwo lines"
    assert parse_actions("tap, <point> 500 970</point>")[0].boxes == [(500, 970, 500, 970)]
    assert parse_actions("I would click the button") == parse_actions("") == []


DIRECTIONS = {
    "down 530 right 0": "down", "down -530 right 0": "up", "down 0 right 10": "right", "down 0 right -10": "left",
    "down 5 right 5": "down", "down -5 right 5": "up", "down 0 right 0": "up", "down": "down", "left": "left", "away": None,
    "from <point>500 800</point> to <point>500 200</point>": "up",
    "from <point>(800,500)</point> to <point>(200,400)</point>": "left",
}  # fmt: skip


@pytest.mark.parametrize("rest", DIRECTIONS)
def test_directions(rest):
    assert Action("scroll", rest).direction == DIRECTIONS[rest]


SAME = [  # label, answer, whether the step succeeds
    ("click, <box>100 100 200 200</box>", "click, <box>150 150 160 160</box>", True),
    ("click, <box>100 100 200 200</box>", "click, <box>190 190 250 250</box>", False),
    ("click, <box>100 100 200 200</box>", "hover, <box>100 100 200 200</box>", False),
    ("tap, <point>500 500</point>", "tap, <point>500 640</point>", True),
    ("tap, <point>500 500</point>", "tap, <point>500 641</point>", False),
    ("input, cheap red shoes", "input, red shoes", True),
    ("input, cheap red shoes", "input, blue hats", False),
    ("select, <box>1 1 9 9</box>, large", "select, <box>2 2 8 8</box>, large", True),
    ("select, <box>1 1 9 9</box>, large", "select, <box>2 2 8 8</box>, small", False),
    ("select_text, from <point>0 0</point> to <point>100 100</point>",
     "select_text, from <point>0 100</point> to <point>100 20</point>", True),
    ("select_text, from <point>0 0</point> to <point>100 100</point>",
     "select_text, from <point>0 100</point> to <point>100 60</point>", False),
    ("scroll, down 530 right 0", "scroll, down 90 right 20", True),
    ("scroll, down 530 right 0", "scroll, down 90 right 120", False),
    ("swipe, from <point>500 800</point> to <point>500 200</point>",
     "swipe, from <point>400 900</point> to <point>450 100</point>", True),
    ("copy", "copy", True), ("enter", "enter", True), ("enter", "copy", False),
    ("tap, <point>1 1</point>", "tap", False), ("tap, <point>1 1</point>", "no", False),
    ("click, <box>1 1 9 9</box>\nenter", "click, <box>1 1 9 9</box>", False),
    ("click, <box>1 1 9 9</box>\nenter", "click, <box>1 1 9 9</box>\nenter\ncopy", True),
    ("click, <box>1 1 9 9</box>\nenter", "enter\nclick, <box>1 1 9 9</box>", False),
]  # fmt: skip


@pytest.mark.parametrize("label, answer, same", SAME)
def test_a_step_succeeds_by_guiacts_rules(label, answer, same):
    found = step_success(reply("actions:\n" + answer, "actions:\n" + label))
    assert found["step_success"] == same
    assert ("click_accuracy" in found) == ("click" in label or "tap" in label)


def test_a_click_belongs_to_an_element_where_they_are_known():
    truth = {"elements": [[0, 0, 100, 100], [100, 0, 200, 100], [900, 900, 1000, 1000]]}

    def clicks(box):
        return step_success(reply(f"click, <box>{box}</box>", "click, <box>100 0 200 100</box>", truth))["step_success"]

    assert clicks("110 0 260 100") == 1  # overlaps the second most
    assert clicks("40 0 130 100") == 0  # overlaps the first most
    assert clicks("300 50 300 50") == 1  # overlaps none, nearest to the second
    assert clicks("700 700 700 700") == 0


def test_types_are_compared_as_a_list_and_clicks_alone():
    label = "click, <box>1 1 9 9</box>\ninput, word"
    found = step_success(reply("click, <box>2 2 3 3</box>\ninput, other", label))
    assert found == {"step_success": 0.0, "type_match": 1.0, "click_accuracy": 1.0}
    assert step_success(reply("click, <box>2 2 3 3</box>", label))["type_match"] == 0.0
    with pytest.raises(UserError, match="no action"):
        step_success(reply("enter", "I press enter"))
