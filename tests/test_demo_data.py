"""The built-in task: screens repeat, boxes hold their words, the held-out rows are unseen, the tokenizer is exact."""

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from data import demo
from data.errors import UserError


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def corner_of(answer: str) -> tuple[int, int]:
    left, top, _, _ = demo.parse_box(answer)
    return left - 2, top - 2


def pixels_of(rows: list[dict], folder: Path) -> set[bytes]:
    return {Image.open(folder / row["messages"][0]["content"][0]["image"]).tobytes() for row in rows}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    demo.make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_rows_are_a_pure_function_of_the_seed(tmp_path):
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        demo.make_rows(tmp_path / name, "base", 8, seed)
    assert digest(tmp_path / "first") == digest(tmp_path / "second") != digest(tmp_path / "other")


def test_held_out_screens_are_not_training_screens(tmp_path):
    train = read_rows(demo.make_rows(tmp_path / "train", "new", 150))
    held_out = read_rows(demo.make_rows(tmp_path / "held_out", "new", 150, split="held_out"))
    assert not pixels_of(train, tmp_path / "train") & pixels_of(held_out, tmp_path / "held_out")
    assert len({row["id"] for row in train + held_out}) == 300
    assert all(len(row["messages"]) == 2 and demo.parse_box(row["messages"][1]["content"]) for row in held_out)


def test_a_row_has_one_picture_and_typed_user_turns(tmp_path):
    for row in read_rows(demo.make_rows(tmp_path, "base", 30)):
        users, assistants = row["messages"][0::2], row["messages"][1::2]
        assert {turn["role"] for turn in users} == {"user"} and {turn["role"] for turn in assistants} == {"assistant"}
        kinds = [part["type"] for turn in users for part in turn["content"]]
        assert kinds[0] == "image" and kinds.count("image") == 1
        assert all(isinstance(turn["content"], str) for turn in assistants)
        assert Image.open(tmp_path / users[0]["content"][0]["image"]).size == (demo.SIDE, demo.SIDE)


@pytest.mark.parametrize("task", demo.TASKS)
def test_boxes_are_inside_disjoint_and_hold_what_is_asked_for(task):
    source = random.Random(task)
    for _ in range(60):
        screen = demo.draw_screen(demo.TASKS[task], source)
        things = screen.buttons + screen.fields
        assert demo.TASKS[task].num_buttons[0] <= len(screen.buttons) <= demo.TASKS[task].num_buttons[1]
        covered = set()
        for _, (left, top, right, bottom) in things:
            assert 0 <= left < right < demo.SIDE and 0 <= top < bottom < demo.SIDE
            area = {(x, y) for x in range(left, right + 1) for y in range(top, bottom + 1)}
            assert not area & covered
            covered |= area
        for word, box in screen.buttons:
            crop = screen.picture.crop((box[0] + 4, box[1] + 4, box[2] - 3, box[3] - 3))
            num_white = sum(count for count, colour in crop.getcolors(10_000) if min(colour) > 240)
            assert num_white >= 10, f"no text on the button {word}"


def test_the_new_task_has_its_buttons_where_the_old_one_has_none():
    base, new = demo.TASKS["base"], demo.TASKS["new"]
    assert not set(base.corners) & set(new.corners)
    assert new.words == base.words


def test_the_demos_rows_hold_both_tasks_and_the_held_out_rows_one_each(tmp_path):
    train, new, old = map(read_rows, demo.make_demo(tmp_path, 60, seed=1))
    assert (len(train), len(new), len(old)) == (80, 200, 200) and len({row["id"] for row in train + new + old}) == 480
    pixels = [pixels_of(rows, tmp_path) for rows in (train, new, old)]
    assert sum(map(len, pixels)) == len(set.union(*pixels)) == 480
    between = [{corner_of(turn["content"]) in demo.BETWEEN for row in rows for turn in row["messages"][1::2]
                if demo.parse_box(turn["content"])} for rows in (train, new, old)]
    assert between == [{True, False}, {True}, {False}]
    assert len(read_rows(demo.make_demo(tmp_path, 6, seed=1)[0])) == 8  # a second call starts anew


def test_the_command_writes_the_rows_of_the_demo_itself(tmp_path, capsys, monkeypatch):
    import importlib

    monkeypatch.setattr("sys.argv", ["data", "demo", "--rows", "4", "--seed", "2", "--output_dir", str(tmp_path / "command")])
    importlib.import_module("data.__main__").main()
    monkeypatch.setattr(demo, "NUM_ROWS", 4)
    config = SimpleNamespace(output_dir=str(tmp_path / "demo"), seed=2)
    demo.prepare(config)
    assert digest(tmp_path / "command" / "rows") == digest(tmp_path / "demo" / "rows")
    assert f"--data_path {tmp_path}/command/rows/train.jsonl" in capsys.readouterr().out
    assert [Path(path).name for path in config.eval_path.split(",")] == ["demo.jsonl", "old.jsonl"]


def test_no_rows_are_refused_in_a_sentence(tmp_path):
    import importlib

    with pytest.raises(UserError, match="--rows 0: at least one row"):
        importlib.import_module("data.__main__").make_demo_rows(SimpleNamespace(rows=0, seed=1, output_dir=str(tmp_path)))
    assert not (tmp_path / "rows").exists()


def test_no_question_of_a_screen_gives_away_the_answer_to_another():
    source, task = random.Random(0), replace(demo.TASKS["base"], num_questions=9)
    for _ in range(100):
        asked = demo.questions(demo.draw_screen(task, source), task, source)
        words = [question.split('"')[1] if '"' in question else answer for question, answer in asked]
        assert len(words) == len(set(words))
        for question, answer in asked:
            if '"' in question:
                assert answer == question.split('"')[1] + demo.box_text(demo.parse_box(answer))


@pytest.mark.parametrize("response, hit", [
    ("<box>10 20 30 40</box>", True), ("It is <box> 0 10 38 49 </box>.", True), ("<box>30 40 30 40</box>", True),
    ("<box>31 41 60 60</box>", False), ("10 20 30 40", False), ("<box>10 20 30</box>", False), ("", False)])
def test_a_hit_is_a_centre_in_the_box(response, hit):
    assert demo.hits(response, "<box>10 20 30 40</box>") is hit


def test_every_digit_and_every_word_is_one_token(tokenizer):
    assert len(tokenizer) <= 512
    for digit in "0123456789":
        assert len(tokenizer(digit).input_ids) == 1
    assert len(tokenizer("<box>112 58 163 82</box>").input_ids) == 2 + 3 + 2 + 3 + 2 + 3
    for word in demo.BUTTON_WORDS:
        assert tokenizer(word).input_ids[0] in tokenizer(demo.ask_where(word)).input_ids
        assert len(tokenizer(word).input_ids) == 1
    text = "Grüße, 漢字 <box>1 2</box>\n\n  x = 3.5"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_chat_template_is_chatml_with_one_mark_a_picture(tokenizer):
    row = demo.messages_of("images/1.png", [(demo.ask_where("Save"), "<box>1 2 3 4</box>"), ("and now?", "no")])
    assert tokenizer.apply_chat_template(row, tokenize=False) == (
        '<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>where is "Save"?<|im_end|>\n'
        "<|im_start|>assistant\n<box>1 2 3 4</box><|im_end|>\n"
        "<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n")
    assert tokenizer.apply_chat_template(row[:1], tokenize=False, add_generation_prompt=True).endswith(
        '"Save"?<|im_end|>\n<|im_start|>assistant\n')


@pytest.mark.slow
def test_the_base_is_made_by_a_command_of_the_project(monkeypatch, tmp_path, capfd):
    """One short lesson from random weights: a model that loads, and a second start that does nothing again."""
    import importlib

    door = importlib.import_module("data.__main__")
    monkeypatch.setattr(door, "LESSONS", [door.Lesson("cell", 2, 4, 1e-3)])
    monkeypatch.setattr(door, "HELD_OUT", 4)
    door.make_base(SimpleNamespace(output_dir=str(tmp_path), device="cpu"))
    assert "step 2/2" in capfd.readouterr().out
    from model import load_model

    model, family = load_model(tmp_path / "1-cell" / "model")
    assert sum(p.numel() for p in model.net.parameters()) == 1_600_192
    door.make_base(SimpleNamespace(output_dir=str(tmp_path), device="cpu"))
    assert "step" not in capfd.readouterr().out
