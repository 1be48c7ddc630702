"""Rewards by name, GUI actions by the published rules, and learned rewards against what they are made of."""

import itertools
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import shared
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from data.errors import UserError
from eval.actions import Action, parse_actions, step_success
from eval.judges import Server
from eval.metrics import Reply
from eval.rewards import RULES, find_reward
from eval.tasks import find_task
from eval.tasks.win_rate import compare
from model.tiny import write_tiny


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
    for values in ({"length": 1}, 1.0, None, {"score": "high"}, {"score": None}, {"score": 1.0, "why": "because"}):
        monkeypatch.setattr("my_reward.bad", lambda reply, values=values: values)
        with pytest.raises(UserError, match=re.escape(f"gives {values!r}; a reward gives numbers by name")):
            find_reward("my_reward:bad")([reply("abc")])
    for wrong in ("count", "my_reward:nothing", "no_such_file:f"):
        with pytest.raises(UserError, match=f"--reward {wrong}"):
            find_reward(wrong)


@pytest.mark.parametrize("find, flag", [(find_reward, "--reward"), (find_task, "--task")])
def test_a_module_that_fails_is_a_sentence(tmp_path, monkeypatch, find, flag):
    monkeypatch.syspath_prepend(tmp_path)
    texts = {"raises_early": "1 / 0", "half_written": "def judge(:", "lacks_it": "", "lacks_more": "import no_such_package"}
    words = ["ZeroDivisionError: division by zero", "SyntaxError: invalid syntax (half_written.py, line 1)",
             "module 'lacks_it' has no attribute 'judge'", "No module named 'no_such_package'"]  # fmt: skip
    for (module, text), word in zip(texts.items(), words, strict=True):
        (tmp_path / f"{module}.py").write_text(text)
        with pytest.raises(UserError, match=re.escape(f"{flag} {module}:judge: {word}")):
            find(f"{module}:judge")


def test_a_row_without_the_truth_is_a_problem():
    for truth in (None, {"answer": "6"}):
        answered = reply("<answer>2*3</answer>", truth=truth)
        with pytest.raises(UserError, match=f"{answered.where}: the row has no numbers and target"):
            find_reward("countdown")([answered])


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


# ---- learned rewards -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    """A tiny sequence classifier with one output, with a tokenizer and its chat template."""
    folder = tmp_path_factory.mktemp("reward")
    write_tiny("qwen2", folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, num_labels=1)
    net = AutoModelForSequenceClassification.from_config(config)
    net.config.pad_token_id = 0
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    net.save_pretrained(folder)
    return folder


QUESTION = [{"role": "user", "content": [{"type": "text", "text": "How high is "}, {"type": "text", "text": "K2?"}]}]


def test_a_reward_model_gives_its_output_for_the_conversation(reward_folder):
    replies = [reply(text, messages=QUESTION) for text in ("8611 m", "I do not know, but it is a very high one", "8611 m")]
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the policy's precision is not the judge's
        found = find_reward(str(reward_folder))(replies)
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    net = AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()
    for answered, values in zip(replies, found, strict=True):
        turns = [{"role": "user", "content": "How high is K2?"}, {"role": "assistant", "content": answered.response}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            assert values["score"] == pytest.approx(net(ids).logits.item(), abs=1e-6)
    assert found[0] == found[2] != found[1]
    assert find_reward(str(reward_folder)).num_bytes == sum(p.nbytes for p in net.parameters())


def test_a_folder_that_is_no_reward_model_is_refused(tmp_path, reward_folder, capfd):
    with pytest.raises(UserError, match="no sequence classifier"):
        find_reward(str(tmp_path))
    shutil.copytree(reward_folder, tmp_path / "two")
    config = json.loads((tmp_path / "two" / "config.json").read_text()) | {"id2label": {"0": "a", "1": "b"}}
    (tmp_path / "two" / "config.json").write_text(json.dumps(config))
    AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path / "two")).save_pretrained(
        tmp_path / "two"
    )
    with pytest.raises(UserError, match="2 outputs"):
        find_reward(str(tmp_path / "two"))
    capfd.readouterr()
    write_tiny("qwen2", tmp_path / "chat")  # a language model: transformers would draw the score's weights at random
    config = json.loads((tmp_path / "chat" / "config.json").read_text()) | {"id2label": {"0": "score"}}
    (tmp_path / "chat" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="hold no score.weight"):
        find_reward(str(tmp_path / "chat"))
    assert capfd.readouterr().err == ""  # the sentence alone


def test_a_picture_is_no_text(reward_folder):
    pictured = [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]
    with pytest.raises(UserError, match="picture"):
        find_reward(str(reward_folder))([reply("a", messages=pictured)])


class FakeServer(BaseHTTPRequestHandler):
    """Answers with the next of `replies`: (status, body) or a function from the request to a text."""

    replies: list = []
    requests: list = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.path, self.headers.get("Authorization"), body))
        found = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        status, text = (200, found(body)) if callable(found) else found
        if text == "break off":
            self.send_response(status)
            self.send_header(*(("Content-Length", "9") if status == 200 else ("Transfer-Encoding", "chunked")))
            self.end_headers()
            return
        if status == 200:
            text = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})
        self.send_response(status)
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """(MODEL@URL, the class whose replies and requests are the server's)."""
    FakeServer.replies, FakeServer.requests = [], []
    monkeypatch.delenv("REWARD_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeServer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"judge/model@http://127.0.0.1:{running.server_port}/v1", FakeServer
        running.shutdown()


def test_a_served_reward_is_asked_once_for_each_answer(server, tmp_path, monkeypatch):
    name, fake = server
    monkeypatch.setenv("REWARD_API_KEY", "secret")
    fake.replies = [lambda body: f"reward:-{len(body['messages'][-1]['content'])}.5"]
    replies = [reply(text, messages=QUESTION) for text in ("a", "bb", "ccc")]
    for _ in range(2):
        assert [values["score"] for values in find_reward(name, tmp_path)(replies)] == [-1.5, -2.5, -3.5]
    assert len(fake.requests) == 3  # the second time all are in the cache
    path, key, body = min(fake.requests, key=lambda request: len(request[2]["messages"][-1]["content"]))
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body == {"model": "judge/model", "messages": [
        {"role": "user", "content": "How high is K2?"}, {"role": "assistant", "content": "a"}]}  # fmt: skip
    assert "secret" not in (tmp_path / "reward_cache.jsonl").read_text()
    with open(tmp_path / "reward_cache.jsonl", "a") as file:
        file.write('{"key": "half a li')  # a kill
    assert find_reward(name, tmp_path)(replies)[0]["score"] == -1.5 and len(fake.requests) == 3
    assert find_reward(name, tmp_path)([reply("dddd", messages=QUESTION)])[0]["score"] == -4.5
    assert find_reward(name, tmp_path)(replies)[2]["score"] == -3.5 and len(fake.requests) == 4


def test_of_the_replies_to_the_same_answer_the_first_counts(server, tmp_path):
    """A judge that never says the same twice, asked for 24 answers of which 3 differ: the file tells what was told."""
    name, fake = server
    said, lock = itertools.count(), threading.Lock()

    def another(body):
        with lock:
            return f"reward:{next(said)}"

    fake.replies = [another]
    replies = [reply(text, messages=QUESTION) for text in ("a", "bb", "ccc") * 8]
    judge = find_reward(name)
    early = judge(replies[:3])  # the rehearsal of a run, before its folder is known
    judge.server.keep_in(tmp_path)
    told = judge(replies)
    assert told[:3] == early and find_reward(name, tmp_path)(replies) == told
    fresh = find_reward(name, tmp_path / "fresh")
    (tmp_path / "fresh").mkdir()
    told = fresh([reply(text, messages=QUESTION) for text in ("d", "e") * 12])
    assert len({values["score"] for values in told}) == 2
    again = find_reward(name, tmp_path / "fresh")
    assert again([reply(text, messages=QUESTION) for text in ("d", "e") * 12]) == told


SCORES = {"reward:-4.125": -4.125, " 1.5\n": 1.5, "helpfulness:1.25,correctness:2,verbosity:0.5": 1.25, "reward: 3e-2": 0.03,
          "reward:2.5e+01": 25, "+0.5": 0.5}  # fmt: skip


@pytest.mark.parametrize("text", SCORES)
def test_spellings_of_a_served_score(server, text):
    name, fake = server
    fake.replies = [(200, text)]
    assert find_reward(name)([reply("a", messages=QUESTION)])[0]["score"] == SCORES[text]


def test_a_busy_server_is_asked_again_and_one_that_refuses_is_not(server, monkeypatch):
    name, fake = server
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    fake.replies = [(429, "slow down"), (503, "soon"), (200, "break off"), (500, "break off"), (200, "reward:1.0")]
    assert find_reward(name)([reply("a", messages=QUESTION)])[0]["score"] == 1.0
    assert len(fake.requests) == 5
    wrong = {"401": [(401, "no key")], "tried 6 times": [(500, "never")], "no reward but 'Nice!'": [(200, "Nice!")],
             "another form": [(200, None)]}  # fmt: skip
    for sentence, replies in wrong.items():
        fake.replies = replies.copy()
        with pytest.raises(UserError, match=sentence):
            find_reward(name)([reply("a", messages=QUESTION)])
    nobody = "m@http://127.0.0.1:9/v1"
    with pytest.raises(UserError, match="127.0.0.1:9"):
        find_reward(nobody)([reply("a", messages=QUESTION)])


def test_a_server_that_is_away_is_waited_for_once(server, monkeypatch):
    """An evaluation of many rows is not held up by each of them; a server that is back is patiently asked again."""
    name, fake = server
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    judge = find_reward(name)
    for text, replies, tries in (("a", [(500, "no")], 6), ("b", [(500, "no")], 1), ("c", [(200, "reward:2")], 0)):
        fake.replies = replies
        if tries:
            with pytest.raises(UserError, match=f"tried {tries} times"):
                judge([reply(text, messages=QUESTION)])
        else:
            assert judge([reply(text, messages=QUESTION)])[0]["score"] == 2
    assert len(fake.requests) == 6 + 1 + 1
    fake.replies = [(500, "busy"), (200, "reward:3")]
    assert judge([reply("d", messages=QUESTION)])[0]["score"] == 3


def test_requests_are_spaced(server, monkeypatch):
    clock, slept = [100.0], []
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr("time.sleep", lambda seconds: (slept.append(seconds), clock.__setitem__(0, clock[0] + seconds)))
    asked = Server("m@http://127.0.0.1/v1", requests_per_minute=30)
    for _ in range(3):
        asked.wait_for_turn()
    assert slept == [0, 2, 2]


# ---- which of two answers --------------------------------------------------------------------------------------------


def win(metric, ours, theirs):
    found = metric(reply(ours, messages=QUESTION, other=theirs))
    return found["win"], found["order_agreement"]


def test_a_score_decides_between_two_answers():
    metric = compare("text")
    for ours, theirs, expected in (("8611 m", "?", 1.0), ("?", "8611 m", 0.0), ("?", "!", 0.5)):
        found = metric(reply(ours, "8611 m", other=theirs))
        assert found == {"win": expected, "order_agreement": 1.0}
    with pytest.raises(UserError, match="no answer"):
        metric(reply("8611 m", "8611 m"))


def test_a_chat_model_is_shown_both_orders(server):
    name, fake = server

    def prefers_longer(body):
        text = body["messages"][0]["content"]
        assert "user: How high is K2?" in text
        first, second = (part.split("\n\n")[0] for part in text.split("[Answer ")[1:])
        return "A." if len(first) > len(second) else "Answer: **B**"

    metric = compare("pairwise:" + name)
    fake.replies = [prefers_longer]
    assert win(metric, "a long answer", "short") == (1, 1) and win(metric, "short", "a long answer") == (0, 1)
    fake.replies = [lambda body: "A"]  # whatever stands first
    assert win(metric, "some", "other") == (0.5, 0)
    fake.replies = [lambda body: "C"]
    assert win(metric, "this", "that") == (0.5, 1)
    fake.replies = [lambda body: "A better answer is B"]  # which A is meant?
    with pytest.raises(UserError, match="neither A, B nor C"):
        win(metric, "x", "y")
    assert len(fake.requests) == 7  # the other way round is the same two questions


# ---- benchmarks ------------------------------------------------------------------------------------------------------


def figures_of(task, *pairs):
    """The figures of a task over (prompt, label, response) rows."""
    lines = []
    for number, (prompt, label, response) in enumerate(pairs):
        answered = reply(response, label, prompt=prompt)
        scores = {name: value for metric in task.metrics for name, value in metric(answered).items()}
        lines.append({"where": f"rows.jsonl:{number}", "prompt": prompt} | scores)
    return task.summarize(lines)


def test_guienv_in_both_directions():
    found = figures_of(
        find_task("guienv"),
        ("", "Green Flash", "Green flash"),
        ("", "<box>0 0 100 100</box>", "<box>0 0 100 60</box>"),
        ("", "<box>0 0 100 100</box><box>500 500 600 600</box>", "<box>(500,500),(600,600)</box>"),
        ("", "<box>0 0 100 100</box>", "I see no such text"),
    )
    shares = {f"iou@{bound}": pytest.approx(share) for bound, share in ((0.2, 2 / 3), (0.5, 2 / 3), (0.7, 1 / 3), (0.9, 1 / 3))}
    assert found == {"exact_match": 0, "f1": 1, "iou": pytest.approx(1.6 / 3), **shares}


def test_guiact_is_scored_on_answers_that_a_model_gave():
    rows = json.loads(shared("samples/guicourse/pred_minicpm_guiagent_web_single.first20.json").read_text())
    found = figures_of(find_task("guiact"), *((row["prompt"], row["pred"], row["pred"]) for row in rows))
    assert found["step_success"] == found["type_match"] == 1.0  # every answer parses, and equals itself


def test_mind2web_is_a_mean_of_tasks():
    label = "TYPE New York <box>(100,100),(200,200)</box>"
    found = figures_of(
        find_task("mind2web"),
        ("Task: fly\nActions so far: none", "CLICK <box>(0,0),(9,9)</box>", "CLICK <box>(4,4),(5,5)</box>"),
        ("Task: fly\nActions so far:\n1. x", label, "type york new <box>(100,100),(300,300)</box>"),
        ("Task: fly\nActions so far:\n1. x", label, "TYPE York <box>(500,100),(600,200)</box>"),
        ("Task: buy\nActions so far: none", label, "TYPE Boston <box>(100,100),(300,300)</box>"),
    )
    assert found == {"step_success": pytest.approx((2 / 3 + 0) / 2), "element_accuracy": pytest.approx((2 / 3 + 1) / 2),
                     "operation_f1": pytest.approx(((1 + 1 + 0.8) / 3 + 0.4) / 2), "task_success": 0.0}  # fmt: skip
