"""Evaluation, `python -m eval` and `python -m eval ask`, on a tiny random model with pictures and one without."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from PIL import Image

from data.records import open_records
from eval import __main__ as door
from eval.evaluate import Evaluation, label_of
from eval.subject import open_subject
from eval.tasks import Task, find_task
from lora.adapter import Settings, attach
from lora.files import save_adapter
from model import load_model
from model.family import Options, families, find_family
from model.tiny import write_tiny
from stages import sft

pytestmark = pytest.mark.slow

TOOL = {
    "type": "function",
    "function": {"name": "click", "parameters": {"properties": {"mark_id": {"type": "integer"}}}},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of each kind, rows with pictures, and rows with a tool call."""
    top = tmp_path_factory.mktemp("eval")
    write_tiny("qwen2_5_vl", top / "vision")
    write_tiny("qwen2", top / "text")
    rows = []
    for number in range(5):
        Image.effect_noise((60 + 20 * number, 90), 50).convert("RGB").save(top / f"{number}.png")
        content = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": f'where is "{number}"?'}]
        label = f"<box>{number} 2 30 40</box>"
        rows.append(
            {
                "id": f"row-{number}",
                "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": label}],
            }
        )
    write_rows(top / "rows.jsonl", rows)
    return top


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_rows(path, *pairs):
    return write_rows(path, [{"id": f"t{n}", "prompt": q, "completion": a} for n, (q, a) in enumerate(pairs)])


def run(*arguments, monkeypatch, stdin=""):
    """The command in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["eval", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    with pytest.raises(SystemExit) as left:
        door.command(door.main)
    return left.value.code


# ---- Evaluation ------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_all_supervised_tokens(place):
    model, family = load_model(place / "vision", dtype="float32")
    records = open_records(place / "rows.jsonl")
    examples = [family.encode(r.messages, r.tools) for r in records]
    losses = [
        torch.nn.functional.cross_entropy(model.logits([e])[0][:-1], e.labels[1:], reduction="none") for e in examples
    ]
    supervised = torch.cat(losses)[torch.cat([e.labels[1:] != -100 for e in examples])]
    expected, total = supervised.mean().item(), len(supervised)
    for batch_tokens in (1, 100, 10**6):
        found = Evaluation(model, stage=sft.Stage(sft.Flags(), model), batch_tokens=batch_tokens).run(records)
        assert found.figures["loss"] == pytest.approx(expected, abs=1e-5)
        assert found.figures["num_tokens"] == total
        assert found.lines == []


def test_prompts_and_labels_are_what_training_sees(place):
    _, family = load_model(place / "vision", dtype="float32")
    text = {"role": "user", "content": "and then?"}
    calls = [{"type": "function", "function": {"name": "click", "arguments": {"mark_id": 3}}}]
    record = open_records(place / "rows.jsonl")[0]
    for messages, label in (
        (record.messages, "<box>0 2 30 40</box>"),
        ([*record.messages, text, {"role": "assistant", "content": "nothing"}], "nothing"),
        ([*record.messages, {"role": "assistant", "content": " twice\n"}], " twice\n"),
    ):
        example = family.encode(messages)
        prompt, expected = family.prompt_of(example), family.encode_prompt(messages)
        assert torch.equal(prompt.input_ids, expected.input_ids)
        assert torch.equal(prompt.positions, expected.positions)
        assert all(torch.equal(prompt.pixels[name], expected.pixels[name]) for name in expected.pixels)
        assert family.answer_start(example) == len(expected)
        assert label_of(family, example) == label
    family.options.tool_template = "qwen"
    example = family.encode([text, {"role": "assistant", "content": "so", "tool_calls": calls}], [TOOL])
    assert label_of(family, example) == 'so\n<tool_call>\n{"name": "click", "arguments": {"mark_id": 3}}\n</tool_call>'


@pytest.mark.parametrize("labels", ["ours", "official"])
@pytest.mark.parametrize("name", [f.name for f in families()])
def test_prompts_of_every_family_and_recipe(place, tmp_path, name, labels):
    """Evaluation asks with the ids of encode_prompt, and the label is the answer's text, whatever carries a loss."""
    write_tiny(name, tmp_path / name)
    family = find_family(tmp_path / name, Options(labels=labels))
    picture = [{"type": "image", "image": str(place / "1.png")}] if "vision" in family.parts else []
    asked = [{"role": "user", "content": [*picture, {"type": "text", "text": "where?"}]}]
    more = [{"role": "assistant", "content": "at 1 2"}, {"role": "user", "content": "sure?"}]
    for question in (asked, asked + more):
        example = family.encode([*question, {"role": "assistant", "content": "yes"}])
        assert torch.equal(family.prompt_of(example).input_ids, family.encode_prompt(question).input_ids)
        assert label_of(family, example).removesuffix("\n") == "yes"


def test_a_row_with_a_problem_is_listed_and_takes_no_other_rows_score(place, tmp_path):
    model, family = load_model(place / "text", dtype="float32")
    rows = text_rows(
        tmp_path / "rows.jsonl", ("a", "<box>1 2 3 4</box>"), ("b", "no box here"), ("c " * 200, "x"), ("d", "boom")
    )

    def fails_on_boom(reply):
        return {"number": 1 / (reply.label != "boom")}

    stage = sft.Stage(sft.Flags(), model, max_length=100)
    box = Evaluation(model, replace(find_task("box"), max_new_tokens=2), stage=stage).run(open_records(rows))
    problems = {line["id"]: line["problem"] for line in box.lines if "problem" in line}
    assert set(problems) == {"t1", "t2", "t3"}
    assert "no box" in problems["t1"] and "--max_length 100" in problems["t2"]
    assert box.figures["num_rows"] == 4 and box.figures["num_problems"] == 3 and box.figures["centre_in_box"] == 0.0
    ours = Evaluation(model, Task([fails_on_boom], max_new_tokens=2)).run(open_records(rows))
    assert [line.get("number") for line in sorted(ours.lines, key=lambda line: line["id"])] == [1.0, 1.0, 1.0, None]
    assert ours.figures["number"] == 1.0 and "ZeroDivisionError" in ours.lines[3]["problem"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_gives_no_numbers_is_a_problem_of_each_row(place, tmp_path, temperature):
    model, family = load_model(place / "text", dtype="float32")
    with torch.no_grad():
        model.head_weight[7] = torch.nan
    rows = text_rows(tmp_path / "rows.jsonl", ("a", "b"), ("c", "d"))
    task = replace(find_task("text"), max_new_tokens=3, sampling={"temperature": temperature})
    found = Evaluation(model, task).run(open_records(rows))
    assert ["not finite" in line["problem"] for line in found.lines] == [True, True]


def test_lines_are_written_with_what_the_caller_adds_and_the_model_is_put_back(place):
    model, family = load_model(place / "vision", dtype="float32")
    model.train()
    output = io.StringIO()
    task = replace(find_task("box"), max_new_tokens=3)
    found = Evaluation(model, task, output=output, extra={"when": "before"}).run(open_records(place / "rows.jsonl"))
    assert all(module.training for module in model.modules())
    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    assert lines == found.lines and [line["id"] for line in lines] == [f"row-{n}" for n in range(5)]
    first = lines[0]
    assert first["when"] == "before" and first["where"] == "rows.jsonl:1" and first["image"] == str(place / "0.png")
    assert first["label"] == "<box>0 2 30 40</box>" and 'where is "0"?' in first["prompt"]
    assert "picture positions" in first["prompt"] and first["prompt"].endswith("<|im_start|>assistant\n")
    assert found.figures["stop_rate"] == sum(line["stopped"] for line in lines) / 5


# ---- python -m eval --------------------------------------------------------------------------------------------------


def test_eval_writes_lines_and_summary_and_ask_gives_the_same_answer(place, tmp_path, monkeypatch, capsys):
    flags = ["--model", place / "vision", "--max_new_tokens", 8, "--precision", "fp32"]
    code = run(
        *flags, "--data_path", place / "rows.jsonl", "--task", "box", "--output_dir", tmp_path, monkeypatch=monkeypatch
    )
    assert code == 0
    assert "centre_in_box" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "outputs" / "box.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "outputs" / "box.json").read_text())
    assert summary["num_rows"] == len(lines) == 5 and summary["num_problems"] == 0 and summary["loss"] > 0
    for line in lines[::2]:
        question = f'where is "{line["id"][-1]}"?'
        code = run("ask", *flags, "--image", line["image"], question, monkeypatch=monkeypatch)
        assert code == 0
        assert capsys.readouterr().out.rstrip("\n") == line["response"].rstrip("\n")


def test_bad_rows_stop_the_command_or_are_skipped_and_listed(place, tmp_path, monkeypatch, capsys):
    rows = text_rows(tmp_path / "rows.jsonl", ("a", "b"), ("c", "d"))
    rows.write_text(rows.read_text() + '{"id": "odd", "messages": 3}\n')
    flags = ["--model", place / "text", "--data_path", rows, "--output_dir", tmp_path, "--max_new_tokens", 2]
    assert run(*flags, monkeypatch=monkeypatch) == 2
    assert "rows.jsonl:3" in capsys.readouterr().err
    assert run(*flags, "--limit", 1, "--on_bad_row", "skip", monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr()
    assert "skipped 1 of 3 rows" in shown.out and "rows.jsonl:3 (odd)" in shown.err
    assert run(*flags, "--task", "box", "--on_bad_row", "skip", monkeypatch=monkeypatch) == 2
    assert "no row could be scored" in capsys.readouterr().err
    summary = json.loads((tmp_path / "outputs" / "auto.json").read_text())
    assert summary["num_rows"] == 2 and summary["num_problems"] == 1
    assert [json.loads(line)["id"] for line in (tmp_path / "outputs" / "auto.jsonl").read_text().splitlines()] == [
        "odd",
        "t0",
    ]


def test_a_metric_of_ones_own_is_one_function(place, tmp_path, monkeypatch):
    (tmp_path / "my_metric.py").write_text("def length(reply):\n    return {'length': len(reply.response)}\n")
    monkeypatch.syspath_prepend(tmp_path)
    rows = text_rows(tmp_path / "rows.jsonl", ("a", "b"))
    flags = ["--model", place / "text", "--data_path", rows, "--output_dir", tmp_path, "--max_new_tokens", 2]
    assert run(*flags, "--task", "my_metric:length", monkeypatch=monkeypatch) == 0
    line = json.loads((tmp_path / "outputs" / "length.jsonl").read_text())
    assert line["length"] == len(line["response"])


# ---- what --model may be ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished_run(place):
    """An output folder with an adapter that changes the answers, and the run.yaml of its training."""
    model, family = load_model(place / "vision", dtype="float32")
    settings = Settings(r=2)
    attach(model, family, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    run_folder = place / "run"
    save_adapter(model, family, run_folder / "adapter", settings, place / "vision")
    (run_folder / "run.yaml").write_text(
        f"base_model: {place / 'vision'}\nmax_pixels: 4000\nprecision: fp32\nuse_4bit: true\n"
    )
    return run_folder, model


def test_run_adapter_and_base_with_adapter_are_the_same_model(place, finished_run):
    folder, model = finished_run
    messages = open_records(place / "rows.jsonl")[4].messages
    expected = model.logits([model.family.encode(messages)])[0]
    for arguments in (
        (folder,),
        (folder / "adapter",),
        (place / "vision", folder),
        (place / "vision", folder / "adapter"),
    ):
        subject = open_subject(*map(str, arguments), quant="none", max_pixels=10**6)
        torch.testing.assert_close(subject.model.logits([subject.family.encode(messages)])[0], expected)
        assert subject.run == folder and not subject.model.training
    plain = open_subject(str(place / "vision"), precision_name="fp32")
    assert open_subject(str(place / "vision"), tool_template="qwen").family.options.tool_template == "qwen"
    assert plain.run is None
    assert (plain.model.logits([plain.family.encode(messages)])[0] - expected).abs().max() > 1e-3


def test_a_run_is_asked_as_it_was_trained(place, finished_run):
    folder, _ = finished_run
    subject = open_subject(str(folder))
    assert subject.precision.name == "fp32" and subject.family.options.max_pixels == 4000
    assert any(type(module).__name__ == "Linear4bit" for module in subject.model.modules())
    with_model = place / "full_run"
    write_tiny("qwen2", with_model / "model")
    (with_model / "run.yaml").write_text("precision: fp32\n")
    assert open_subject(str(with_model)).family.folder == with_model / "model"


def test_answers_of_a_run_lie_in_its_folder_and_leave_the_runs_own_files_alone(place, finished_run, monkeypatch):
    folder, _ = finished_run
    flags = ["--model", folder, "--data_path", place / "rows.jsonl", "--limit", 1, "--max_new_tokens", 2]
    assert run(*flags, "--task", "demo", monkeypatch=monkeypatch) == 0
    assert (folder / "eval" / "outputs" / "demo.jsonl").exists() and not (folder / "outputs").exists()


# ---- ask -------------------------------------------------------------------------------------------------------------


def answers(monkeypatch, *texts):
    """Let the model say these texts, one after the other; returns the list that gets each prompt as text."""
    from eval import ask
    from eval.generate import Answer

    said, prompts = iter(texts), []

    def generate(model, examples, max_new_tokens):
        prompts.append(model.family.tokenizer.decode(examples[0].input_ids))
        return [Answer([1], next(said), True, [0.0])]

    monkeypatch.setattr(ask, "generate", generate)
    return prompts


def test_ask_prints_and_draws_the_box_on_the_picture_as_it_is(place, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (100, 70), "white").save(tmp_path / "screen.png")  # resized before the model sees it
    seen = open_subject(str(place / "vision")).family.picture(tmp_path / "screen.png")[0]["image_grid_thw"][0] * 14
    height, width = seen[1:].tolist()
    answers(monkeypatch, f"at <box>{width // 2} 0 {width} {height // 2}</box>", "<box>500 0 1000 500</box>")
    for scale in ("pixels", "thousandths"):
        out = tmp_path / f"{scale}.png"
        flags = ["--model", place / "vision", "--image", tmp_path / "screen.png", "--draw", out, "--box_scale", scale]
        assert run("ask", *flags, "where?", monkeypatch=monkeypatch) == 0
        drawn = Image.open(out)
        assert drawn.size == (100, 70)
        red = [(x, y) for x in range(100) for y in range(70) if drawn.getpixel((x, y)) == (255, 0, 0)]
        assert abs(min(x for x, _ in red) - 50) <= 1 and abs(max(y for _, y in red) - 35) <= 1
    assert f"box: {width // 2} 0 {width} {height // 2}" in capsys.readouterr().out


def test_ask_puts_the_picture_where_the_mark_stands_and_keeps_the_dialogue(place, monkeypatch, capsys):
    prompts = answers(monkeypatch, "hi", '<tool_call>{"name": "click", "arguments": {"mark_id": 3}}</tool_call>')
    flags = ["--model", place / "vision", "--image", place / "0.png", "--system", "Be kind."]
    assert run("ask", *flags, monkeypatch=monkeypatch, stdin="look: <image> what?\n\nand now?\n") == 0
    picture = "<|vision_start|>" + "<|image_pad|>" * prompts[0].count("<|image_pad|>") + "<|vision_end|>"
    opening = "<|im_end|>\n<|im_start|>assistant\n"
    first = f"<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nlook: {picture} what?{opening}"
    assert prompts == [first, f"{first}hi<|im_end|>\n<|im_start|>user\nand now?{opening}"]
    assert 'call: {"name": "click", "arguments": {"mark_id": 3}}' in capsys.readouterr().out


# ---- errors and --help -----------------------------------------------------------------------------------------------


def test_wrong_input_is_one_sentence_and_exit_code_2(place, finished_run, tmp_path, monkeypatch, capsys):
    rows, model = place / "rows.jsonl", ["--model", place / "text"]
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.yaml").write_text("{}")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "/no/such/base"}')
    wrong = {
        "no such folder": ["--model", "/no/such", "--data_path", rows],
        "not finished": ["--model", unfinished, "--data_path", rows],
        "/no/such/base": ["--model", tmp_path / "adapter", "--data_path", rows],
        "not one of auto": [*model, "--data_path", rows, "--task", "boxes"],
        "no.jsonl": [*model, "--data_path", place / "no.jsonl"],
        "another base": [*model, "--adapter", finished_run[0], "--data_path", rows],
        "--draw": ["ask", *model, "--draw", "x.png", "hello"],
        "no.png": ["ask", *model, "--image", place / "no.png", "hello"],
        "--tools": ["ask", *model, "--tools", rows, "hello"],
        "takes no pictures": ["ask", *model, "--image", place / "0.png", "hello"],
        "fp16": ["ask", *model, "--precision", "fp16", "--device", "cpu", "hello"],
    }
    for sentence, arguments in wrong.items():
        assert run(*arguments, monkeypatch=monkeypatch) == 2, sentence
        shown = capsys.readouterr().err
        assert sentence in shown and shown.startswith("error: ") and shown.count("\n") == 1, shown
    for arguments in (
        ["--model"],
        ["ask", *model, "--max_new_tokens", 0, "x"],
        [*model, "--data_path", rows, "--tasks", "box"],
    ):
        assert run(*arguments, monkeypatch=monkeypatch) == 2


def test_the_command_runs_on_its_own(place, tmp_path):
    command = [sys.executable, "-m", "eval", "ask", "--model", place / "text", "--max_new_tokens", "3", "hello"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    script = (
        f"import sys; sys.argv = ['eval', *{arguments}]\nfrom eval.__main__ import main\ntry: main()\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("[]\n") and "--model" in done.stdout


# ---- problems, samples and two models --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problems(place):
    path = place / "problems.jsonl"
    return write_rows(path, [{"id": f"c{n}", "nums": [n + 2, 3], "target": 3 * n + 6} for n in range(3)])


def lines_of(folder, name):
    return [json.loads(line) for line in (folder / "outputs" / f"{name}.jsonl").read_text().splitlines()]


def test_countdown_draws_samples_and_reports_pass_at_k(place, problems, tmp_path, monkeypatch):
    """Answers are put in the model's mouth: of 4 samples to each problem, 0, 1 and 4 are right."""
    num_right = {"c0": 0, "c1": 1, "c2": 4}
    from eval import evaluate as module
    from eval.generate import Answer

    asked = {}

    def generate(model, prompts, max_new_tokens, **settings):
        asked.update(settings, max_new_tokens=max_new_tokens)
        texts = []
        for (name, right), prompt in zip(num_right.items(), prompts, strict=True):
            numbers = f"{int(name[1]) + 2} * 3"
            assert numbers[0] in model.family.tokenizer.decode(prompt.input_ids)
            texts += [f"<answer>{numbers}</answer>"] * right + ["<answer>1</answer> or <answer>2</answer> so"] * (4 - right)
        return [Answer([1] * 10, text, number % 2 == 0, [0.0] * 10) for number, text in enumerate(texts)]

    monkeypatch.setattr(module, "generate", generate)
    flags = ["--model", place / "text", "--data_path", problems, "--task", "countdown", "--output_dir", tmp_path]
    assert run(*flags, "--num_samples", 4, "--seed", 5, "--min_p", 0.1, monkeypatch=monkeypatch) == 0
    assert {key: asked[key] for key in ("num_samples", "temperature", "top_p", "top_k", "min_p", "seed")} == {
        "num_samples": 4, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "seed": 5}  # fmt: skip
    assert asked["max_new_tokens"] == 1024
    figures = json.loads((tmp_path / "outputs" / "countdown.json").read_text())
    assert figures["pass@1"] == figures["correct"] == pytest.approx(5 / 12)
    assert figures["pass@2"] == pytest.approx((0 + 0.5 + 1) / 3) and figures["pass@4"] == pytest.approx(2 / 3)
    assert figures["num_answers"] == pytest.approx((5 + 7 * 2) / 12) and figures["format"] == 1
    assert figures["stop_rate"] == 0.5 and figures["answer_tokens"] == 10 and figures["stops_after_answer"] == 3 / 12
    assert figures["num_rows"] == 3 and figures["sampling"]["seed"] == 5 and "loss" not in figures
    lines = lines_of(tmp_path, "countdown")
    assert [(line["id"], line["sample"]) for line in lines] == [(name, k) for name in num_right for k in range(4)]
    assert lines[0]["truth"] == {"numbers": [2, 3], "target": 6} == json.loads(lines[0]["label"])
    assert run(*flags, "--reward", "tinyzero", "--num_samples", 4, monkeypatch=monkeypatch) == 0
    figures = json.loads((tmp_path / "outputs" / "countdown.json").read_text())
    assert figures["reward"] == "tinyzero" and "valid" not in figures and figures["pass@4"] == pytest.approx(2 / 3)


def test_samples_are_drawn_by_the_seed(place, problems, tmp_path, monkeypatch):
    flags = ["--model", place / "text", "--data_path", problems, "--task", "countdown", "--max_new_tokens", 6]
    flags += ["--num_samples", 2, "--temperature", 1, "--top_p", 1, "--top_k", -1]
    answers = []
    for number, (seed, batch_tokens) in enumerate([(0, 16384), (0, 1), (1, 16384)]):  # however the rows are cut
        folder = tmp_path / str(number)
        more = ["--output_dir", folder, "--seed", seed, "--batch_tokens", batch_tokens, "--precision", "fp32"]
        assert run(*flags, *more, monkeypatch=monkeypatch) == 0
        answers.append([line["response"] for line in lines_of(folder, "countdown")])
    assert answers[0] == answers[1] != answers[2]
    assert len(set(answers[0])) == 6 == len(answers[0])


def test_a_reward_may_score_any_task(place, tmp_path, monkeypatch):
    rows = text_rows(tmp_path / "rows.jsonl", ("a", "<box>1 2 3 4</box>"))
    flags = ["--model", place / "text", "--data_path", rows, "--output_dir", tmp_path, "--max_new_tokens", 2]
    assert run(*flags, "--reward", "box_iou", monkeypatch=monkeypatch) == 0
    assert lines_of(tmp_path, "auto")[0]["score"] == 0.0


def test_two_models_are_compared_on_the_same_rows(place, problems, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_judge.py").write_text("def first(reply):\n    return {'score': ord((reply.response or ' ')[0])}\n")
    monkeypatch.syspath_prepend(tmp_path)
    write_tiny("qwen2", place / "other", seed=1)
    rows = text_rows(tmp_path / "rows.jsonl", *((f"question {n}", "x") for n in range(6)))
    flags = ["--data_path", rows, "--task", "win_rate", "--reward", "my_judge:first", "--max_new_tokens", 4]
    found = {}
    for ours, theirs in (("text", "other"), ("other", "text"), ("text", "text")):
        folder = tmp_path / f"{ours}-{theirs}"
        models = ["--model", place / ours, "--against", place / theirs, "--output_dir", folder]
        assert run(*flags, *models, monkeypatch=monkeypatch) == 0
        found[ours, theirs] = json.loads((folder / "outputs" / "win_rate.json").read_text())
    first = found["text", "other"]
    assert first["win_rate"] == pytest.approx(1 - found["other", "text"]["win_rate"])
    assert first["win_rate_low"] < first["win_rate"] < first["win_rate_high"]
    assert found["text", "text"]["win_rate"] == 0.5 and found["text", "text"]["ties"] == 1
    both = [lines_of(tmp_path / "text-other", name) for name in ("win_rate", "win_rate.against")]
    scores = [[ord((line["response"] or " ")[0]) for line in lines] for lines in both]
    expected = sum((a > b) + (a == b) / 2 for a, b in zip(*scores, strict=True)) / 6
    assert first["win_rate"] == pytest.approx(expected)
    from_file = ["--against", tmp_path / "text-other" / "outputs" / "win_rate.against.jsonl", "--output_dir", tmp_path]
    assert run(*flags, "--model", place / "text", *from_file, monkeypatch=monkeypatch) == 0
    again = json.loads((tmp_path / "outputs" / "win_rate.json").read_text())
    assert {key: again[key] for key in ("win_rate", "win_rate_low", "ties")} == {
        key: first[key] for key in ("win_rate", "win_rate_low", "ties")
    }


def preference_rows(path, num_rows):
    answers = [f"answer number {n} " + "and more " * n for n in range(2 * num_rows)]
    rows = [{"id": f"p{n}", "prompt": f"question {n}", "chosen": answers[2 * n], "rejected": answers[2 * n + 1]}
            for n in range(num_rows)]  # fmt: skip
    return write_rows(path, rows)


def test_preferences_are_measured_against_the_model_without_its_adapter(place, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)  # of lora_A
    model, family = load_model(place / "text", dtype="float32")
    settings = Settings(r=2)
    attach(model, family, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    save_adapter(model, family, tmp_path / "adapter", settings, place / "text")
    rows = preference_rows(tmp_path / "rows.jsonl", 6)
    flags = ["--data_path", rows, "--task", "preference", "--precision", "fp32", "--output_dir", tmp_path]
    assert run("--model", tmp_path / "adapter", *flags, monkeypatch=monkeypatch) == 0
    figures = json.loads((tmp_path / "outputs" / "preference.json").read_text())
    base, _ = load_model(place / "text", dtype="float32")

    def logp(model, messages):
        example = model.family.encode(messages)
        losses = torch.nn.functional.cross_entropy(model.logits([example])[0][:-1], example.labels[1:], reduction="sum")
        return -losses.item()

    margins = []
    for record, line in zip(open_records(rows), lines_of(tmp_path, "preference"), strict=True):
        chosen, rejected = (logp(model, turns) for turns in (record.messages, record.rejected))
        assert (line["chosen_logp"], line["rejected_logp"]) == pytest.approx((chosen, rejected), abs=1e-3)
        margins.append(chosen - logp(base, record.messages) - rejected + logp(base, record.rejected))
        assert line["margin"] == pytest.approx(margins[-1], abs=1e-3)
    assert figures["accuracy"] == sum(margin > 0 for margin in margins) / 6 and 0 < figures["accuracy"] < 1
    assert run("--model", tmp_path / "adapter", *flags, "--against", place / "text", monkeypatch=monkeypatch) == 0
    again = json.loads((tmp_path / "outputs" / "preference.json").read_text())
    assert again["margin"] == pytest.approx(figures["margin"], abs=1e-3)
    capsys.readouterr()
    assert run("--model", place / "text", *flags, monkeypatch=monkeypatch) == 2
    assert "no adapter to switch off" in capsys.readouterr().err
    conversations = ["--data_path", text_rows(tmp_path / "text.jsonl", ("a", "b")), *flags[2:]]
    assert run("--model", tmp_path / "adapter", *conversations, monkeypatch=monkeypatch) == 2
    assert "a chosen and a rejected answer" in capsys.readouterr().err


def test_wrong_judges_and_samples_are_one_sentence(place, problems, tmp_path, monkeypatch, capsys):
    model = ["--model", place / "text", "--data_path", problems, "--output_dir", tmp_path]
    wrong = {
        "and another model, --against": [*model, "--task", "win_rate", "--reward", "text"],
        "needs a judge": [*model, "--task", "win_rate", "--against", place / "text"],
        "does not do": [*model, "--task", "countdown", "--against", place / "text"],
        "asks for none": [*model, "--task", "preference", "--reward", "text"],
        "--temperature": [*model, "--task", "text", "--num_samples", 2],
        "--reward nothing": [*model, "--reward", "nothing"],
        "--task win_rate takes it": [*model, "--task", "countdown", "--reward", "pairwise:m@http://127.0.0.1:9/v1"],
        "is no outputs": [*model, "--task", "win_rate", "--reward", "text", "--against", place / "text" / "config.json"],
        "1.5 is no number": [*model, "--top_p", 1.5],
    }
    for sentence, arguments in wrong.items():
        assert run(*arguments, monkeypatch=monkeypatch) == 2, sentence
        assert sentence in capsys.readouterr().err


def test_help_lists_every_reward():
    from eval.rewards import RULES

    assert door.RULES == ", ".join(RULES)
