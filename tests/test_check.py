"""`python -m data check`: what it finds, what it says, and that a run refuses the same rows."""

import copy
import json
import os
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import shared
from PIL import Image

import data.__main__ as doors
from data.batches import Encoded
from data.check import damage_of_file, fitting_pixels, is_outside, shrink
from data.errors import UserError, command
from data.rows import open_rows
from model.family import Options, find_family
from model.tiny import write_tiny
from stages import sft
from training.config import Config
from training.guards import open_folder

PROBLEM_KEYS = {"where", "id", "problem"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """text/, vl/: tiny models; a.png (400 x 300), cut.png (its first half), torn.png (without its middle)."""
    folder = tmp_path_factory.mktemp("world")
    for name, family in (("text", "qwen2"), ("vl", "qwen2_5_vl")):
        write_tiny(family, folder / name)
    noise = random.Random(0).randbytes(400 * 300 * 3)
    Image.frombytes("RGB", (400, 300), noise).save(folder / "a.png")
    Image.new("RGB", (20, 10), "red").save(folder / "b.png")
    raw = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(raw[: len(raw) // 2])
    (folder / "torn.png").write_bytes(raw[: len(raw) // 2] + raw[-100:])
    return folder


@pytest.fixture
def check(world, monkeypatch, capsys):
    """check(rows, *flags, base=) -> exit code, page, problems by number of row, summary.json; rows may be bytes."""

    def function(rows, *flags, base="vl", name="rows.jsonl"):
        path, output = world / name, world / "out"
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        damage_of_file.cache_clear()
        given = {"--base_model": world / base, "--data_path": path, "--output_dir": output, "--num_workers": 0}
        given |= dict(zip(flags[::2], flags[1::2], strict=True))
        opened = Path(given["--data_path"]).name
        monkeypatch.setattr(sys, "argv", ["python -m data", "check", *(str(part) for pair in given.items() for part in pair)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            command(doors.main)
        bad = output / "bad_rows.jsonl"
        found = [json.loads(line) for line in bad.read_text().splitlines()] if bad.exists() else []
        assert all(line.keys() == PROBLEM_KEYS and line["where"].startswith(f"{opened}:") for line in found)
        assert exit.value.code == (1 if found else 0)
        by_row = {int(line["where"].rpartition(":")[2]): line["problem"] for line in found}
        assert list(by_row) == sorted(by_row) and len(by_row) == len(found)
        return capsys.readouterr().out, by_row, json.loads((output / "summary.json").read_text())

    return function


def chat(question="2 + 2?", answer="4", **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]} | more


def picture(image="a.png", question="where?", answer="there", **more):
    return {"image": image, **chat([{"type": "image"}, {"type": "text", "text": question}], answer, **more)}


def test_clean_rows(check, world):
    page, bad, summary = check([chat(id="one"), picture(answer="<box>10 20 30 40</box>"), chat("3 + 3?", "6")])
    assert bad == {} and not (world / "out" / "bad_rows.jsonl").exists()
    assert page.startswith("3 rows in ") and "3 good, 0 with a problem" in page and "1 CogAgent" in page
    assert summary["rows"] == 3 and summary["bad_rows"] == 0 and summary["dialects"] == {"messages": 2, "CogAgent": 1}
    assert set(os.listdir(world / "out")) == {"summary.json"}


def test_figures_are_those_of_training(check, world):
    rows = [chat("x" * n, "y" * (n // 2 + 1)) for n in (1, 9, 40, 200)] + [picture(), picture("b.png", answer="z" * 30)]
    _, _, summary = check(rows)
    family = find_family(world / "vl")
    from data.records import open_records

    records = open_records(world / "rows.jsonl")
    examples = [family.encode(records[i].messages) for i in range(6)]
    num_pictures = [sum(end - start for start, end in example.image_spans) for example in examples]
    tokens = summary["tokens"]
    assert tokens["supervised"]["sum"] == sum(example.num_supervised for example in examples)
    assert tokens["pictures"]["sum"] == sum(num_pictures)
    assert tokens["text"]["sum"] == sum(map(len, examples)) - sum(num_pictures)
    assert tokens["text"]["most"] == max(len(e) - n for e, n in zip(examples, num_pictures, strict=True))
    assert all(sum(rows for _, _, rows in t["histogram"]) == 6 for t in tokens.values())
    longest = max(range(6), key=lambda i: len(examples[i]))
    assert summary["longest"][0]["where"] == f"rows.jsonl:{longest + 1}"
    assert summary["longest"][0]["positions"] == len(examples[longest])


CALL = {"type": "function", "function": {"name": "click", "arguments": {"mark_id": 3}}}
TOOL_ROW = {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "ok", "tool_calls": [CALL]}]}
KINDS = {  # words of the problem: the row
    "damaged or cut short": picture("cut.png"),
    "no file": picture("gone.png"),
    "neither text nor tool call": chat(answer=""),
    "no assistant turn to learn from": {"messages": [chat()["messages"][0], chat()["messages"][1] | {"train": False}]},
    "fits neither 392 x 308 nor 400 x 300 pixels nor thousandths": picture(answer="<box>10 20 1430 40</box>"),
    "the user's (-5, 2, 9, 9)": picture(question="what is at [-5, 2, 9, 9]?"),
    "pass --tool_template qwen": TOOL_ROW,
    "not valid JSON": b'{"messages": ',
    "takes 2": chat("x" * 2000),
}


def test_each_problem_is_found_where_it_is(check):
    rows = [row for bad in KINDS.values() for row in (chat(id=str(len(str(bad)))), bad)]
    page, bad, summary = check(rows, "--max_length", 1000)
    assert list(bad) == [2 * n for n in range(1, len(KINDS) + 1)]
    for words, problem in zip(KINDS, bad.values(), strict=True):
        assert words in problem
        assert "\n" not in problem
    assert all(f"rows.jsonl:{number}" in page for number in bad) and summary["bad_rows"] == len(KINDS)
    assert sum(summary["problems"].values()) == len(KINDS)


def test_pictures_for_a_model_that_takes_none(check):
    _, bad, _ = check([chat(image="b.png"), chat()], base="text")
    assert list(bad) == [1] and "takes no pictures, but the row has one" in bad[1]


def test_what_may_be_is_no_problem(check):
    silent = {"role": "assistant", "content": "", "train": False}
    first, last = chat()["messages"]
    rows = [{"messages": [first, silent, first, last]}, picture(answer="<box>(10,20),(999,1000)</box>"),
            picture(answer="click(390, 299)"), chat("[1, 2, -3, 40000]")]  # the last has no picture
    assert check(rows)[1] == {}
    assert check([TOOL_ROW], "--tool_template", "qwen")[1] == {}


def test_pictures_inside_a_table(check, world):
    import pyarrow
    from pyarrow.parquet import write_table

    raw = (world / "a.png").read_bytes()
    pictures = [raw, raw[:5000], b"", raw, None]
    rows = [{"prompt": "what?", "completion": "red", "image": {"bytes": some, "path": None}} for some in pictures]
    write_table(pyarrow.Table.from_pylist(rows), world / "table.parquet")
    page, bad, summary = check([], "--data_path", world / "table.parquet")
    assert list(bad) == [2, 3] and "cut short" in bad[2] and "not named by a path: b''" in bad[3]
    assert summary["repeated"] == [["table.parquet:4", "table.parquet:1"]] and "in 2 rows, of 400 x 300" in page


def test_boxes_that_are_rewritten(check):
    boxes = ("900 900 1000 1000", "900 900 1000 1010", "1200 20 1430 40")  # the second is trained on, cut
    _, bad, summary = check([picture(answer=f"<box>{box}</box>") for box in boxes], "--box_format", "thousandths")
    assert list(bad) == [2, 3] and "over the edge in thousandths" in bad[2] and "as --box_format says" in bad[3]
    assert summary["notes"] == {"boxes rewritten from thousandths": 2, "box cut at its picture's edge": 1}
    assert summary["problems"] == {"a box lies outside its picture": 2}


def test_the_boxes_of_calls_are_looked_at(check):
    rows = [picture(), picture()]
    for row, x in zip(rows, (1000, 1430), strict=True):
        row["messages"][-1]["tool_calls"] = [{"function": {"name": "click", "arguments": {"x": x, "y": 9}}}]
    _, bad, _ = check(rows, "--tool_template", "qwen")
    assert list(bad) == [2] and "the assistant's (1430, 9, 1430, 9) fits neither" in bad[2]


def test_two_faults_of_a_row_are_one_line(check):
    _, bad, summary = check([picture("torn.png", answer="<box>-1 0 3 4</box>")])
    assert "cut short" in bad[1] and "box lies outside" in bad[1] and summary["bad_rows"] == 1
    assert len(summary["problems"]) == 2


def test_more_problems_than_fit_on_the_page(check, world):
    page, bad, _ = check([chat(answer="")] * 50)
    assert len(bad) == 50 and page.count("\n  rows.jsonl:") == 20 and "and 30 more; all are in" in page
    assert len(page.splitlines()) < 40
    assert max(map(len, page.splitlines())) <= 160


def test_a_narrow_terminal_shows_what_helps(check, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    page, _, _ = check([TOOL_ROW, TOOL_ROW, picture("none.png")])
    assert max(map(len, page.splitlines())) <= 80 and page.count("\n  rows.jsonl:") == 3
    assert page.count("pass --tool_template qwen") == 1 and "--image_root, now" in page


def test_what_a_row_says_cannot_break_the_page(check):
    page, _, _ = check([chat(id="a\x1b[31m\nb\u202e")] * 2 + [chat(answer="", id="c\r\x07")])
    assert page.replace("\n", "").isprintable() and "a?[31m?b?" in page


def test_duplicates_are_told_and_are_no_problem(check):
    rows = [chat(id="a"), chat(id="b"), chat("else", id="a"), chat("2 + 2?", "4", source="web")]
    page, bad, summary = check(rows)
    assert bad == {}
    assert summary["repeated"] == [["rows.jsonl:2", "rows.jsonl:1"], ["rows.jsonl:4", "rows.jsonl:1"]]
    assert summary["same_id"] == [["rows.jsonl:3", "rows.jsonl:1"]]
    assert "2 rows: rows.jsonl:2 as rows.jsonl:1" in page


def test_the_size_that_would_fit_fits(check, world):
    _, bad, summary = check([picture(), chat()], "--max_length", 120)
    assert list(bad) == [1] and "over 120" in bad[1]
    pixels = bad[1].partition("at most ")[2].split()[0]
    assert check([picture(), chat()], "--max_length", 120, "--max_pixels", pixels)[1] == {}
    width, height = map(int, bad[1].partition("(")[2].partition(" would fit")[0].rpartition("(")[2].strip(")").split(" x "))
    with Image.open(world / "a.png") as image:
        image.resize((width, height)).save(world / "small.png")
    assert check([picture("small.png")], "--max_length", 120)[1] == {}
    assert "no size of its pictures would fit" in check([picture(question="x" * 200)], "--max_length", 120)[1][1]


def test_fitting_pixels_is_the_most():
    def positions(width, height):
        return -(-width // 28) * -(-height // 28)

    sizes = [(1428, 1193), (640, 480)]
    pixels = fitting_pixels(sizes, positions, 600)
    fits = [sum(positions(*shrink(size, int(pixels * more))) for size in sizes) for more in (1, 1.03)]
    assert fits[0] <= 600 < fits[1]
    assert fitting_pixels(sizes, positions, 1) is None
    assert shrink((640, 480), 10**9) == (640, 480)


def test_is_outside():
    assert not is_outside((0, 0, 1000, 1000), [(1428, 900)]) and not is_outside((5, 5, 1428, 2), [(1428, 900)])
    assert is_outside((0, 0, 1429, 9), [(1428, 900)]) and is_outside((0, 0, 9, 1001), [(1428, 900)])


def test_kinds_of_row(check):
    pair = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
    countdown = {"nums": [3, 4], "target": 12}
    assert check([chat(), pair, countdown], base="text")[1] == {}
    _, bad, _ = check([chat(), pair, countdown], "--stage", "sft", base="text")
    assert list(bad) == [3] and "the stage takes" in bad[3]
    assert list(check([chat(), pair, countdown], "--stage", "dpo", base="text")[1]) == [1, 3]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data_pth", "1"], "the nearest is --data_path"), (["--max_length", "many"], "--max_length many"),
        (["--stage", "sftt"], "no such stage"), (["--data_path", "gone.jsonl"], "gone.jsonl"),
        (["--base_model", "gone"], "gone"), (["--image_root", "gone"], "gone"), (["--data_path", ""], "--data_path is missing"),
        (["--base_model", "mute"], "tokenizer"),
    ],
)  # fmt: skip
def test_wrong_flags(world, monkeypatch, capsys, tmp_path, flags, words):
    (tmp_path / "rows.jsonl").write_text(json.dumps(chat()) + "\n")
    given = {"--base_model": world / "text", "--data_path": tmp_path / "rows.jsonl", "--output_dir": tmp_path / "out"}
    given |= dict(zip(flags[::2], flags[1::2], strict=True))
    if given["--base_model"] == "mute":  # a model folder without a tokenizer
        given["--base_model"] = tmp_path / "mute"
        shutil.copytree(world / "text", tmp_path / "mute", ignore=shutil.ignore_patterns("*token*", "vocab*", "merges*"))
    monkeypatch.setattr(sys, "argv", ["python -m data", "check", *(str(part) for pair in given.items() for part in pair)])
    with pytest.raises(SystemExit) as exit:
        command(doors.main)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_recipe_is_checked_by_the_command_line_of_its_run(world, tmp_path, monkeypatch, capsys):
    """Flags over YAML over defaults, other settings of a run without effect; what is left behind is not in the run's way."""
    rows = [chat(), picture(answer="z" * 300), {"chosen": chat()["messages"], "rejected": chat(answer="5")["messages"]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"base_model": str(world / "vl"), "data_path": "gone.jsonl", "image_root": str(world), "max_length": 300,
              "training_args": {"learning_rate": "5e-4", "per_device_train_batch_size": 1}, "output_dir": str(tmp_path / "run"),
              "num_workers": 0}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    given = ["--config", tmp_path / "recipe.yaml", "--data-path", tmp_path / "rows.jsonl"]

    def problems(*more):
        monkeypatch.setattr(sys, "argv", ["python -m data", *map(str, (*more[:1], *given, *more[1:]))])
        code = doors.main()
        found = tmp_path / "run" / "check" / "bad_rows.jsonl"
        lines = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
        assert code is None or code == bool(lines)
        return [line["where"] for line in lines]

    assert problems("check", "--use_lora", "--lora_r", "8", "--resume", "yes") == ["rows.jsonl:2"]  # pictures are in max_length
    assert problems("check", "--max_length", "4000") == []
    assert problems("check", "--max_length", "4000", "--stage", "dpo", "--dpo_beta", "0.2") == ["rows.jsonl:1", "rows.jsonl:2"]
    problems("show", "--rows", "1")
    assert (tmp_path / "run" / "check" / "show.html").exists()
    open_folder(tmp_path / "run").release()
    for flags, words in (["--dpo_beta", "0.2"], "belongs to --stage dpo"), (["--use_8bit"], "add --use_lora"):
        with pytest.raises(UserError, match=words):
            problems("check", *flags)
    assert "per_device" not in capsys.readouterr().err


def test_writes_below_the_output_folder_alone(check, world, monkeypatch):
    monkeypatch.setattr("data.index.WORTH_SECONDS", -1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(world / "cache"))
    check([chat()], name="alone.jsonl")
    assert not (world / ".alone.jsonl.index").exists() and not (world / "cache").exists()


def test_workers_find_what_one_process_finds(check, world):
    rows = [row for _ in range(40) for row in (chat(), picture(), picture("cut.png"), chat(answer=""))]
    alone, together = check(rows), check(rows, "--num_workers", 2)
    assert alone[1] == together[1] and len(alone[1]) == 80
    assert {**alone[2], "seconds": 0} == {**together[2], "seconds": 0}


def test_a_row_that_wants_too_much_memory_is_a_problem(check, monkeypatch):
    def greedy(self, record, found):
        return bytearray(5 * 2**30)  # asked for, never touched

    monkeypatch.setattr("data.check.Inspector.decode", greedy)
    _, bad, _ = check([chat(), chat("3 + 3?")], "--num_workers", 1)
    assert list(bad) == [1, 2] and "more memory than a worker may have" in bad[1]


# ---- 1,000 damaged rows and pictures ----------------------------------------------------------------------------------

DEEP = b"[" * 900 + b"]" * 900  # where "deep" stands: json.dumps would not write it
WRONG = [None, True, -1, 0.5, float("nan"), float("inf"), "", "x", "\ud83d", "\0", [], {}, [[]], [None], {"": {}}, [{}], "deep",
         "../../etc/passwd", "http://host/a.png", "9" * 30000, "<image>" * 50, {"<image>": 1}, 10**400, "<|im_end|>",
         "\ufdd0", "{{ 1 }}", "<think>", {"role": "assistant"}]  # fmt: skip


def damage(row, rng):
    """Replace, remove, wrap, repeat or empty one random value anywhere in a row."""
    row = copy.deepcopy(row)
    places, queue = [], [row]
    while queue:
        node = queue.pop()
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            queue += [node[key]] if isinstance(node[key], dict | list) else []
    node, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        del node[key]
    elif kind == 1:
        node[key] = [node[key]] if rng.random() < 0.5 else {"role": node[key]}
    elif kind == 2 and isinstance(node[key], str):
        node[key] = node[key] * rng.choice([0, 2, 2000])
    else:
        node[key] = copy.deepcopy(rng.choice(WRONG))
    return row


def damage_bytes(line, rng):
    place = rng.randrange(len(line))
    return line[:place] + rng.choice([b"", b"\xc3", b"}", b"\\ud800", b"[" * 5000, b"NaN"]) + line[place + 1 :]


def damage_picture(path, source, rng):
    """A copy of a picture: cut, with other bytes, empty, another file altogether, or a header that promises too much."""
    raw = bytearray(source.read_bytes())
    kind = rng.randrange(5)
    if kind == 0:
        raw = raw[: rng.randrange(len(raw))]
    elif kind == 1:
        for _ in range(20):
            raw[rng.randrange(8, len(raw))] = rng.randrange(256)
    elif kind == 2:
        raw = bytearray(rng.choice([b"", b"\x89PNG\r\n\x1a\n", b"<svg/>", b"{}"]))
    elif kind == 3:
        raw[16:24] = rng.choice([b"\0\0\0\0\0\0\0\1", b"\x7f\xff\xff\xff\0\0\0\1", b"\0\0\xff\xff\0\0\xff\xff"])
    path.write_bytes(raw)


def damaged_lines(world, num_rows):
    """Lines of a jsonl file, a fifth of them with damaged pictures and a tenth with damaged bytes."""
    rng = random.Random(7)
    tool = {"type": "function", "function": {"name": "click", "parameters": {"type": "object", "properties": {}}}}
    originals = [
        chat(id="c"), picture(id="p"), TOOL_ROW | {"tools": [tool]}, chat("hi <image>", image=["a.png"]),
        {"id": "g", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nbox?"},
                                                        {"from": "gpt", "value": "<box>(1,2),(3,4)</box>"}]},
        {"messages": [{"role": "system", "content": "S"}, *chat()["messages"], *chat("more")["messages"]]},
        {"prompt": "2 + 2?", "completion": "4"},
    ]  # fmt: skip
    lines = []
    for number in range(num_rows):
        row = damage(rng.choice(originals), rng)
        if number % 5 == 0:
            damage_picture(world / f"{number}.png", world / "a.png", rng)
            row = picture(f"{number}.png", id=number)
        line = json.dumps(row).encode().replace(b'"deep"', DEEP)
        lines.append(damage_bytes(line, rng) if number % 10 == 1 else line)
    return lines


def refused_by_training(world, options, stage):
    """where of every row that a run with --on_bad_row skip leaves out, as train.py opens and encodes its rows."""
    family = find_family(world / "vl", options)
    config = Config(data_path=str(world / "rows.jsonl"), on_bad_row="skip", max_length=1500)
    folder = world / "run"
    folder.mkdir(exist_ok=True)
    rows = open_rows(config, family, folder, takes=stage.takes)
    encode = sft.Stage(sft.Flags(), SimpleNamespace(family=family), 1500).encode
    examples = Encoded(rows.train, encode, rows.lengths.kept)
    usable = rows.usable([examples[i] for i in range(len(examples))])
    refused = [json.loads(line)["where"] for line in (folder / "bad_rows.jsonl").read_text().splitlines()]
    assert len(set(refused)) == len(refused) and len(usable) + len(refused) == 1000
    return set(refused)


def test_rows_that_a_chat_format_has_no_place_for_are_found_before_the_first_step(tmp_path):
    """However short they are, and behind any number of rows that it takes."""
    family = write_tiny("phi3_vision", tmp_path / "base")
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    odd = [{"messages": [chat()["messages"][0], call]}, chat(tools=[{"name": "f"}])]
    rows = [*[chat("2 + 2? " * 9)] * 30, odd[0], *[chat("2 + 2? " * 9)] * 30, odd[1], odd[0]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(data_path=str(tmp_path / "rows.jsonl"), on_bad_row="skip")
    found = open_rows(config, family, tmp_path)
    assert [row["where"] for row in found.bad] == ["rows.jsonl:31", "rows.jsonl:62", "rows.jsonl:63"]
    assert found.text.startswith("skipped 3 of 63 rows\n") and len(found.lengths.kept) == 60
    config.on_bad_row = "stop"
    with pytest.raises(UserError, match="3 of 63 rows cannot be used; the first is rows.jsonl:31: .* no form for tools"):
        open_rows(config, family, tmp_path)


def test_a_thousand_damaged_rows_and_pictures(check, world, capsys):
    lines = damaged_lines(world, 1000)
    assert all(line.strip() and b"\n" not in line for line in lines)
    page, bad, summary = check(lines, "--max_length", 1500, "--stage", "sft", "--tool_template", "qwen")
    assert 300 < len(bad) < 950 and summary["rows"] == 1000 and summary["bad_rows"] == len(bad)
    assert f"{1000 - len(bad)} good, {len(bad)} with a problem" in page
    assert all(bad.values())
    boxes_alone = {number for number, problem in bad.items() if problem.startswith("a box lies outside")}
    refused = refused_by_training(world, Options(tool_template="qwen"), sft.Stage)
    assert {f"rows.jsonl:{number}" for number in bad.keys() - boxes_alone} == refused


def test_real_rows(check, world):
    path = shared("samples/guicourse/figure_rows.json")  # the number of a row of an array is that of the element
    _, bad, summary = check([], "--data_path", path)
    assert bad == {} and summary["rows"] == 27 and summary["tokens"]["pictures"]["sum"] > 10_000
