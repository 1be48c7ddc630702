"""Wrong input of every kind at every door: one sentence on stderr, exit code 2, no traceback, nothing half-written.

Most cases call a door's main() in this process under data.errors.command, as the command line does; any exception but
the user's own error is a failure here. A few start the interpreter. The sentence must name what was found, so each case
says which words it looks for.
"""

import builtins
import errno
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

import eval.__main__ as evaluation
import lora.__main__ as adapters
import model.__main__ as models
import train
from data.errors import command
from model.tiny import write_tiny
from training.journal import read_journal

ALLOWED = {"bad_rows.jsonl", ".lock"}  # what a refused run may leave: the list of its bad rows


def door(monkeypatch, capsys, main, *arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        command(main)
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


def check_sentence(code: int, err: str, *words: str) -> str:
    """The one sentence of a refused command, after the checks that hold for all of them."""
    lines = err.splitlines()
    assert code == 2, err
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:] != [], err
    assert all(line.startswith(("note: ", "warning: ")) for line in lines[:-1]), err
    for word in words:
        assert word in lines[-1], lines[-1]
    return lines[-1]


@pytest.fixture
def refused(monkeypatch, capsys):
    """refused(main, arguments, words): the command is refused in a sentence with those words."""

    def check(main, arguments, *words: str) -> str:
        code, _, err = door(monkeypatch, capsys, main, *arguments)
        return check_sentence(code, err, *words)

    return check


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """base/ (text) and vl/ (pictures), rows.jsonl and pictures.jsonl with shot.png, run/ (a finished LoRA run)."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny("qwen2", folder / "base")
    write_tiny("qwen2_5_vl", folder / "vl")
    write_rows(folder / "rows.jsonl", [chat(f"{n} + {n}", str(2 * n)) for n in range(8)])
    Image.new("RGB", (120, 90), "orange").save(folder / "shot.png")
    write_rows(folder / "pictures.jsonl", [picture_row("shot.png")] * 2)
    with pytest.MonkeyPatch.context() as patch:
        more = ["--use_lora", "--max_steps", 2, "--save_every", 1]
        patch.setattr(sys, "argv", ["train.py", *map(str, train_flags(folder, folder / "run", *more))])
        assert train.main() == 0
    return folder


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def picture_row(path: str) -> dict:
    content = [{"type": "image", "image": path}, {"type": "text", "text": "what is it?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a screen"}]}


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train_flags(world: Path, output, *more, base="base", rows="rows.jsonl") -> list:
    """Arguments of a small run on the processor; `more` wins over the common ones."""
    common = {"--base_model": world / base, "--data_path": world / rows, "--output_dir": output, "--device": "cpu"}
    common |= {"--precision": "fp32", "--num_workers": 0, "--batch_size": 4, "--eval_every": "no"}
    return [part for pair in common.items() if pair[0] not in more for part in pair] + list(more)


def left_by(output: Path) -> set[str]:
    """What is in an output folder, if there is one."""
    return {path.name for path in output.iterdir()} if output.is_dir() else set()


@pytest.fixture
def refused_run(refused, world, tmp_path):
    """refused_run(words, *flags, base=, rows=): train.py refuses, and leaves nothing but a list of bad rows."""

    def check(*words: str, flags=(), base="base", rows="rows.jsonl") -> str:
        output = tmp_path / "out"
        sentence = refused(train.main, train_flags(world, output, *flags, base=base, rows=rows), *words)
        assert left_by(output) <= ALLOWED and (left_by(output) or not output.exists())
        return sentence

    return check


# ---- flags and settings ----------------------------------------------------------------------------------------------

FLAGS = {
    "unknown": (["--frobnicate", 3], ["--frobnicate", "nearest"]),
    "misspelt": (["--lerning_rate", "1e-4"], ["--lerning_rate", "learning_rate"]),
    "abbreviated": (["--learn", "1e-4"], ["--learn", "learning_rate"]),
    "no value": (["--lora_r"], ["--lora_r", "expected"]),
    "text for a number": (["--lora_r", "many"], ["--lora_r many", "integer"]),
    "fraction for a count": (["--batch_size", "2.5"], ["--batch_size 2.5", "integer"]),
    "nan": (["--learning_rate", "nan"], ["--learning_rate nan", "number"]),
    "infinite": (["--weight_decay", "inf"], ["--weight_decay inf"]),
    "negative rate": (["--learning_rate=-1"], ["--learning_rate -1"]),
    "negative seed": (["--seed", "-1"], ["--seed -1", "0 to"]),
    "huge seed": (["--seed", str(2**70)], ["--seed", str(2**70)]),
    "no steps": (["--max_steps", 0], ["--max_steps 0"]),
    "word for a boolean": (["--use_lora", "perhaps"], ["--use_lora perhaps", "true"]),
    "unknown word": (["--lr_schedule", "zigzag"], ["zigzag", "cosine"]),
    "unknown stage": (["--stage", "sftt"], ["sftt", "sft"]),
    "unknown optimizer": (["--optim", "adamx"], ["adamx", "adamw"]),
    "unknown device": (["--device", "tpu"], ["tpu", "cuda"]),
    "unknown part": (["--use_lora", "--lora_parts", "ears"], ["ears", "language"]),
    "part the model lacks": (["--use_lora", "--lora_parts", "vision"], ["vision", "qwen2"]),
    "unknown target": (["--use_lora", "--lora_targets", "q_porj"], ["q_porj", "q_proj"]),
    "broken pattern": (["--use_lora", "--lora_targets", "(q"], ["(q", "expression"]),
    "both quantisations": (["--use_lora", "--use_8bit", "--use_4bit"], ["use_8bit", "use_4bit"]),
    "quantised and full": (["--use_8bit"], ["use_lora"]),
    "fp16 on a processor": (["--precision", "fp16"], ["fp16", "graphics card"]),
    "no rows left to train on": (["--eval_split", 8], ["--eval_split 8"]),
    "frozen part the model lacks": (["--freeze_vision"], ["--freeze_vision", "no vision"]),
    "a fourth word": (["one", "two"], ["one two", "DATA MODEL CONFIG"]),
    "missing value file": (["--eval_path", "no/such.jsonl"], ["no/such.jsonl"]),
    "missing test file": (["--test_path", "no/such.jsonl"], ["no/such.jsonl"]),
    "missing image root": (["--image_root", "no/such"], ["no/such"]),
    "unknown metric": (["--eval_split", 2, "--predict_with_generate", "--eval_task", "beauty"], ["beauty", "box"]),
    "too little length": (["--max_length", 3], ["--max_length", "rows are too long"]),
    "every row too long": (["--max_length", 3, "--on_bad_row", "skip"], ["rows are too long", "(rows are never cut); all"]),
    "TRL's name": (["--stage", "dpo", "--beta", 0.1], ["--beta", "the nearest is dpo_beta"]),
    "too little text": (["--max_text_length", 3], ["over 3", "--max_text_length 2"]),
    "config missing": (["--config", "no/such.yaml"], ["no/such.yaml"]),
    "config is a folder": (["--config", ROOT], [str(ROOT)]),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(refused_run, case):
    flags, words = FLAGS[case]
    refused_run(*words, flags=flags)


CONFIGS = {
    "not yaml": (b"batch_size: [1, 2\nseed: }", ["not YAML"]),
    "a list": (b"- seed\n- 3\n", ["key: value"]),
    "empty": (b"", ["key: value"]),
    "binary": (bytes(range(256)), ["not YAML"]),
    "python object": (b"seed: !!python/object/apply:os.system ['true']\n", ["not YAML"]),
    "unknown key": (b"sead: 3\n", ["sead", "seed"]),
    "unknown nest": (b"model_args:\n  lora_r: 4\n", ["model_args"]),
    "nested wrongly": (b"training_args:\n  peft_config:\n    lora_r:\n      value: 4\n", ["lora_r", "integer"]),
    "list for a number": (b"seed: [1, 2]\n", ["seed", "integer"]),
    "mapping for a text": (b"image_root: {a: b}\n", ["image_root"]),
    "nan": (b"learning_rate: .nan\n", ["learning_rate", "nan"]),
    "a key that is no text": (b"3: 4\n", ["3"]),
    "a group that is no mapping": (b"training_args: 3\n", ["training_args"]),
    "said twice": (b"epochs: 2\nnum_train_epochs: 3\n", ["epochs", "keep one"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_files(refused_run, tmp_path, case):
    content, words = CONFIGS[case]
    (tmp_path / "run.yaml").write_bytes(content)
    refused_run("run.yaml", *words, flags=["--config", tmp_path / "run.yaml"])


def test_missing_settings(refused, tmp_path, world):
    refused(train.main, ["--data_path", world / "rows.jsonl"], "--base_model is missing")
    refused(train.main, ["--base_model", world / "base"], "--data_path is missing")


# ---- model folders ---------------------------------------------------------------------------------------------------


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path, weight_map=None) -> None:
    """The weights under an index; weight_map replaces the index's own."""
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors") | (weight_map or {})}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


NORM, PROJECTION = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
MODELS = {
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "not found"]),
    "broken config": (lambda f: (f / "config.json").write_text('{"model_type": "qwen2",'), ["config.json", "JSON"]),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), ["config.json", "object"]),
    "config is binary": (lambda f: (f / "config.json").write_bytes(bytes(range(256))), ["config.json", "JSON"]),
    "config nested deep": (lambda f: (f / "config.json").write_text("[" * 10**5), ["config.json", "JSON"]),
    "config is a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), ["config.json"]),
    "unknown model_type": (lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="gpt9")), ["gpt9", "qwen2"]),
    "no model_type": (lambda f: edit_json(f / "config.json", lambda c: c.pop("model_type")), ["model_type", "qwen2"]),
    "size is a text": (lambda f: edit_json(f / "config.json", lambda c: c.update(hidden_size="big")), ["config.json"]),
    "size is missing": (lambda f: edit_json(f / "config.json", lambda c: c.pop("hidden_size")), ["config.json"]),
    "size is negative": (lambda f: edit_json(f / "config.json", lambda c: c.update(hidden_size=-64)), ["config.json"]),
    "no heads": (lambda f: edit_json(f / "config.json", lambda c: c.update(num_attention_heads=0)), ["config.json"]),
    "other size": (lambda f: edit_json(f / "config.json", lambda c: c.update(hidden_size=128)), ["misshapen", "(64"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors"]),
    "pickled weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ["pytorch_model.bin", "pickl"]),
    "truncated weights": (lambda f: truncate(f / "model.safetensors"), ["model.safetensors", "whole"]),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), ["model.safetensors", "whole"]),
    "weights are text": (lambda f: (f / "model.safetensors").write_text("<html>404</html>"), ["model.safetensors", "whole"]),
    "missing tensor": (lambda f: edit_weights(f, lambda t: t.pop(NORM)), ["lacks", NORM]),
    "unexpected tensor": (lambda f: edit_weights(f, lambda t: t.update(extra=torch.zeros(2))), ["unexpected", "extra"]),
    "wrong shape": (lambda f: edit_weights(f, lambda t: t.update({NORM: torch.zeros(63)})), ["misshapen", NORM, "(63,)"]),
    "integer tensor": (lambda f: edit_weights(f, lambda t: t.update({NORM: torch.zeros(64, dtype=torch.int8)})), [NORM, "I8"]),
    "not a number": (lambda f: edit_weights(f, lambda t: t[PROJECTION].fill_(float("nan"))), [PROJECTION, "not finite"]),
    "broken index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), ["index.json"]),
    "missing shard": (lambda f: shard(f, {NORM: "model-00002-of-00002.safetensors"}), ["model-00002-of-00002", "missing"]),
    "index leads out": (lambda f: shard(f, {NORM: "../secret.safetensors"}), ["index.json", "../secret"]),
    "index names a number": (lambda f: shard(f, {NORM: 3}), ["index.json"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "no tokenizer config": (lambda f: (f / "tokenizer_config.json").unlink(), ["tokenizer_config.json"]),
    "broken tokenizer": (lambda f: truncate(f / "tokenizer.json"), ["tokenizer.json"]),
    "tokenizer is empty": (lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer.json"]),
    "broken tokenizer config": (lambda f: truncate(f / "tokenizer_config.json"), ["tokenizer_config.json", "JSON"]),
    "no template": (
        lambda f: edit_json(f / "tokenizer_config.json", lambda c: c.pop("chat_template")), ["template", "copy"]),
    "broken template": (
        lambda f: edit_json(f / "tokenizer_config.json", lambda c: c.update(chat_template="{% for %}")), ["template"]),
    "template of another model": (
        lambda f: edit_json(f / "tokenizer_config.json", lambda c: c.update(chat_template="[INST] hi")), ["template"]),
    "template.json without one": (lambda f: (f / "chat_template.json").write_text("{}"), ["chat_template"]),
    "tokenizer larger than the model": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(vocab_size=128))
        or edit_weights(f, lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:128].clone()})),
        ["vocab"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_model_folders(refused_run, world, tmp_path, case):
    damage, words = MODELS[case]
    shutil.copytree(world / "base", tmp_path / "broken")
    damage(tmp_path / "broken")
    refused_run(*words, flags=["--base_model", tmp_path / "broken"])


def test_model_paths(refused_run, refused, world, tmp_path):
    for path, word in ((tmp_path / "none", "no such"), (world / "rows.jsonl", "rows.jsonl"),
                       ("", "--base_model"), (tmp_path, "config.json"), (world / "run", "is a run's folder")):
        refused_run(word, flags=["--base_model", path])


# ---- rows ------------------------------------------------------------------------------------------------------------

GOOD = json.dumps(chat("a", "b")).encode() + b"\n"
ROWS = {
    "empty": ("x.jsonl", b"", ["x.jsonl", "no rows"]),
    "blank lines": ("x.jsonl", b"\n\n  \n", ["x.jsonl", "no rows"]),
    "empty array": ("x.json", b"[]", ["x.json", "no rows"]),
    "broken line": ("x.jsonl", GOOD + b'{"messages": [\n' + GOOD, ["x.jsonl:2", "on_bad_row"]),
    "broken array": ("x.json", b"[" + GOOD + b", {]", ["x.json:2"]),
    "binary": ("x.jsonl", bytes(range(256)) * 64, ["x.jsonl:"]),
    "binary array": ("x.json", b"[" + bytes(range(256)) * 64, ["x.json:"]),
    "zeros": ("x.jsonl", bytes(10000), ["x.jsonl:1"]),
    "a picture": ("x.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(100), ["x.jsonl:"]),
    "utf-16": ("x.jsonl", GOOD.decode().encode("utf-16"), ["UTF-16", "UTF-8"]),
    "latin-1": ("x.jsonl", GOOD.replace(b'"a"', b'"\xe9"'), ["x.jsonl:1", "UTF-8"]),
    "more behind an array": ("x.json", b"[" + GOOD + b"][" + GOOD + b"]", ["x.json:1", "more follows"]),
    "a number": ("x.jsonl", b"3\n", ["x.jsonl:1", "object"]),
    "an unknown shape": ("x.jsonl", b'{"foo": 1}\n', ["x.jsonl:1", "foo"]),
    "a question without answer": ("x.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', ["x.jsonl:1"]),
    "an unknown role": ("x.jsonl", GOOD.replace(b'"user"', b'"robot"'), ["x.jsonl:1", "robot"]),
    "content is a number": ("x.jsonl", GOOD.replace(b'"a"', b"7"), ["x.jsonl:1"]),
    "no messages": ("x.jsonl", b'{"messages": []}\n', ["x.jsonl:1"]),
    "nan for messages": ("x.jsonl", b'{"messages": NaN}\n', ["x.jsonl:1"]),
    "nested deep": ("x.jsonl", b'{"messages": ' + b"[" * 10**5 + b"\n", ["x.jsonl:1"]),
    "a half of a pair": ("x.jsonl", GOOD.replace(b'"b"', b'"\\ud800"'), ["x.jsonl:1"]),
    "nothing is trained": ("x.jsonl", GOOD.replace(b'"content": "b"', b'"content": "b", "train": false'), ["x.jsonl:1"]),
    "pictures for a text model": ("x.jsonl", json.dumps(picture_row("shot.png")).encode(), ["x.jsonl:1", "takes no pictures"]),
    "tools that the template leaves out": (
        "x.jsonl", json.dumps(chat("a", "b") | {"tools": [{"type": "function", "function": {"name": "click"}}]}).encode(),
        ["x.jsonl:1", "--tool_template qwen"]),
    "csv": ("x.csv", b"a,b\n1,2\n", ["x.csv", "jsonl"]),
    "no suffix": ("x", GOOD, ["x", "jsonl"]),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows(refused_run, world, tmp_path, case):
    name, content, words = ROWS[case]
    shutil.copy(world / "shot.png", tmp_path)
    (tmp_path / name).write_bytes(content)
    refused_run(*words, rows=tmp_path / name)


@pytest.mark.parametrize("case", ["broken line", "binary", "pictures for a text model"])
def test_skipping_every_row_is_refused(refused_run, world, tmp_path, case):
    name, content, _ = ROWS[case]
    shutil.copy(world / "shot.png", tmp_path)
    (tmp_path / name).write_bytes(content.replace(GOOD, b""))
    refused_run("x.jsonl", flags=["--on_bad_row", "skip"], rows=tmp_path / name)


def test_row_paths(refused_run, world, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    for path in (tmp_path, tmp_path / "folder.jsonl", tmp_path / "none.jsonl", "org/name", "/dev/null"):
        refused_run(str(path), rows=path)


# ---- pictures --------------------------------------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b""))]
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def save(path: Path, width: int, height: int) -> None:
    Image.new("RGB", (width, height), "navy").save(path)


def tear(path: Path) -> None:
    """Take the middle out: with its header and its end a picture is whole until it is decoded."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + content[-50:])


def damaged_picture(folder: Path, damage) -> None:
    noise = Image.effect_noise((200, 200), 90).convert("RGB")
    noise.save(folder / "x.png")
    damage(folder / "x.png")


PICTURES = {
    "missing": ("x.png", lambda f: None, ["x.jsonl:2", "no file"]),
    "truncated": ("x.png", lambda f: damaged_picture(f, truncate), ["1 of 2 rows: x.jsonl:2", "x.png", "cut short"]),
    "torn": ("x.png", lambda f: damaged_picture(f, tear), ["x.jsonl:2", "x.png", "cut short"]),
    "empty": ("x.png", lambda f: (f / "x.png").touch(), ["x.jsonl:2", "x.png"]),
    "text": ("x.png", lambda f: (f / "x.png").write_text("<svg/>"), ["x.jsonl:2", "x.png", "PNG"]),
    "a folder": ("x.png", lambda f: (f / "x.png").mkdir(), ["x.jsonl:2"]),
    "a pipe": ("x.png", lambda f: os.mkfifo(f / "x.png"), ["x.jsonl:2"]),
    "outside": ("../world.png", lambda f: save(f.parent / "world.png", 50, 50), ["x.jsonl:2", "--image_root"]),
    "a link that leads out": (
        "x.png", lambda f: (save(f.parent / "w.png", 50, 50), (f / "x.png").symlink_to(f.parent / "w.png")),
        ["x.jsonl:2", "--image_root"]),
    "absolute": ("/etc/passwd", lambda f: None, ["x.jsonl:2", "/etc/passwd"]),
    "a URL": ("https://example.com/x.png", lambda f: None, ["x.jsonl:2", "URL"]),
    "inline": ("data:image/png;base64,AAAA", lambda f: None, ["x.jsonl:2", "own picture"]),
    "a zero byte": ("x\0.png", lambda f: None, ["x.jsonl:2"]),
    "a long name": ("x" * 5000, lambda f: None, ["x.jsonl:2"]),
    "a number": (3, lambda f: None, ["x.jsonl:2"]),
    "a sliver": ("x.png", lambda f: save(f / "x.png", 5000, 1), ["x.jsonl:2", "5000 x 1"]),
    "a bomb": ("x.png", lambda f: (f / "x.png").write_bytes(png_of(60000, 60000)), ["x.jsonl:2", "3600000000 pixels"]),
    "a tiff": ("x.png", lambda f: Image.new("RGB", (9, 9)).save(f / "x.png", "TIFF"), ["x.jsonl:2", "PNG"]),
}


@pytest.mark.parametrize("case", PICTURES)
def test_pictures(refused_run, world, tmp_path, case):
    name, make, words = PICTURES[case]
    folder = tmp_path / "rows"
    folder.mkdir()
    shutil.copy(world / "shot.png", folder)
    make(folder)
    rows = write_rows(folder / "x.jsonl", [picture_row("shot.png"), picture_row(name)])
    refused_run(*words, base="vl", rows=rows)


def test_marks_and_pictures_must_agree(refused_run, world, tmp_path):
    shutil.copy(world / "shot.png", tmp_path)
    row = picture_row("shot.png")
    row["messages"][0]["content"].append({"type": "text", "text": "<|image_pad|>"})
    for rows in ([{"conversations": [{"from": "human", "value": "<image> <image>"}, {"from": "gpt", "value": "a"}],
                   "image": "shot.png"}],):
        refused_run("x.jsonl:1", base="vl", rows=write_rows(tmp_path / "x.jsonl", rows))


def test_a_bad_row_in_the_middle_of_a_run(refused, monkeypatch, capsys, world, tmp_path):
    """Found by a worker, because only pixels show it: the run ends saved, and goes on without the row when told to."""
    shutil.copy(world / "shot.png", tmp_path)
    shutil.copy(world / "shot.png", tmp_path / "x.png")  # as large as all others: not among the rows that are shown before
    tear(tmp_path / "x.png")
    rows = write_rows(tmp_path / "x.jsonl", [picture_row("shot.png")] * 20 + [picture_row("x.png")])
    flags = train_flags(world, tmp_path / "out", "--use_lora", "--epochs", 1, "--seed", 2, base="vl", rows=rows)
    refused(train.main, flags, "x.jsonl:21", "cut short", "--on_bad_row skip --resume yes")
    (saved,) = (tmp_path / "out" / "checkpoints").iterdir()
    code, out, _ = door(monkeypatch, capsys, train.main, *flags, "--on_bad_row", "skip", "--resume", "yes")
    assert code == 0 and saved.name == "step-000003" and "after step 3" in out
    steps = [line["step"] for line in read_journal(tmp_path / "out" / "journal.jsonl") if "event" not in line]
    assert steps == list(range(1, 7))


def test_the_longest_rows_are_bad(monkeypatch, capsys, world, tmp_path):
    """More of them than the rehearsal takes, and all but the last two rows: those are trained on."""
    damaged_picture(tmp_path, tear)
    shutil.copy(world / "shot.png", tmp_path)
    rows = write_rows(tmp_path / "x.jsonl", [picture_row("x.png")] * 17 + [picture_row("shot.png")] * 2)
    flags = train_flags(world, tmp_path / "out", "--use_lora", "--epochs", 1, "--on_bad_row", "skip", base="vl", rows=rows)
    code, out, _ = door(monkeypatch, capsys, train.main, *flags)
    assert code == 0 and "skipped x.jsonl:17: picture" in out and "\nskipped 17 of 19 rows\n" in out
    assert len((tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()) == 17


def test_the_longest_rows_have_no_form(monkeypatch, capsys, world, tmp_path):
    """As above, for rows that the template cannot render."""
    call = {"type": "function", "function": {"name": "click", "arguments": {}}}
    turns = [{"role": "user", "content": "w" * 99}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    rows = write_rows(tmp_path / "x.jsonl", [{"messages": turns}] * 17 + [picture_row("shot.png")] * 2)
    shutil.copy(world / "shot.png", tmp_path)
    flags = train_flags(world, tmp_path / "out", "--epochs", 1, "--on_bad_row", "skip", base="vl", rows=rows)
    code, out, _ = door(monkeypatch, capsys, train.main, *flags)
    assert code == 0 and "skipped 17 of 19 rows" in out


def test_every_picture_is_bad(refused_run, tmp_path):
    damaged_picture(tmp_path, tear)
    rows = write_rows(tmp_path / "x.jsonl", [picture_row("x.png")] * 2)
    refused_run("none of the rows", "bad_rows.jsonl", base="vl", rows=rows, flags=["--on_bad_row", "skip"])


def test_a_picture_that_cannot_be_resized_is_skipped(monkeypatch, capsys, world, tmp_path):
    save(tmp_path / "x.png", 5000, 1)
    shutil.copy(world / "shot.png", tmp_path)
    rows = write_rows(tmp_path / "x.jsonl", [picture_row("x.png"), picture_row("shot.png")])
    flags = train_flags(world, tmp_path / "out", "--use_lora", "--max_steps", 1, "--on_bad_row", "skip", base="vl", rows=rows)
    code, out, _ = door(monkeypatch, capsys, train.main, *flags, "--eval_path", rows)  # a row of both counts once
    assert code == 0 and "skipped 1 of 2 rows" in out


def test_a_processor_without_a_key(refused_run, world, tmp_path):
    shutil.copytree(world / "vl", tmp_path / "vl")
    edit_json(tmp_path / "vl" / "preprocessor_config.json", lambda c: c.pop("image_mean"))
    refused_run("preprocessor_config.json", "image_mean", flags=["--base_model", tmp_path / "vl"], rows="pictures.jsonl")


def test_too_few_pixels(refused_run):
    refused_run("--max_pixels 1", flags=["--max_pixels", 1], base="vl", rows="pictures.jsonl")


# ---- adapters --------------------------------------------------------------------------------------------------------

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTERS = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), [WEIGHTS, "not found"]),
    "no config": (lambda f: (f / CONFIG).unlink(), [CONFIG, "not found"]),
    "broken config": (lambda f: truncate(f / CONFIG), [CONFIG, "JSON"]),
    "truncated weights": (lambda f: truncate(f / WEIGHTS), [WEIGHTS, "whole"]),
    "pickled": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), ["adapter_model.bin", "pickled"]),
    "unknown kind": (lambda f: edit_json(f / CONFIG, lambda c: c.update(peft_type="IA3")), ["IA3"]),
    "rank is a text": (lambda f: edit_json(f / CONFIG, lambda c: c.update(r="16")), [CONFIG, "r is '16'"]),
    "alpha is nan": (lambda f: edit_json(f / CONFIG, lambda c: c.update(lora_alpha=float("nan"))), [CONFIG, "lora_alpha"]),
    "no tensors": (lambda f: save_file({}, f / WEIGHTS), [WEIGHTS]),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(refused_run, refused, world, tmp_path, case):
    damage, words = ADAPTERS[case]
    shutil.copytree(world / "run" / "adapter", tmp_path / "adapter")
    damage(tmp_path / "adapter")
    refused_run(*words, flags=["--use_lora", "--adapter", tmp_path / "adapter"])
    merging = ["merge", "--base_model", world / "base", "--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged"]
    refused(adapters.main, merging, *words)
    asking = ["ask", "--model", world / "base", "--adapter", tmp_path / "adapter", "--device", "cpu", "hello"]
    refused(evaluation.main, asking, *words)
    assert not (tmp_path / "merged").exists()


def test_adapter_paths(refused_run, refused, world, tmp_path):
    for path in (tmp_path / "none", world / "rows.jsonl", world / "base"):
        refused_run(str(path), flags=["--adapter", path])
        merging = ["merge", "--base_model", world / "base", "--adapter", path, "--output_dir", tmp_path / "merged"]
        refused(adapters.main, merging, str(path))
    refused_run("no such folder; name the adapter/", flags=["--adapter", tmp_path / "none"])
    refused_run("name its base, and beside it --adapter", flags=["--base_model", world / "run"])
    (tmp_path / "of_model" / "model").mkdir(parents=True)
    refused_run("is a run's folder", "of_model/model", flags=["--base_model", tmp_path / "of_model"])
    refused_run("is a run's folder", str(world / "run" / "adapter"), flags=["--adapter", world / "run"])
    refused_run("adapter", "--lora_r 16", flags=["--adapter", world / "run" / "adapter", "--lora_r", 4])


def test_adapter_of_another_base(refused_run, refused, world, tmp_path):
    """A base whose feed-forward layers are narrower."""
    other = shutil.copytree(world / "base", tmp_path / "other")

    def narrow(tensors: dict) -> None:
        for name in [name for name in tensors if ".mlp." in name]:
            tensors[name] = (tensors[name][:, :96] if "down_proj" in name else tensors[name][:96]).clone()

    edit_weights(other, narrow)
    edit_json(other / "config.json", lambda config: config.update(intermediate_size=96))
    refused_run("adapter", "mlp", "another", flags=["--base_model", other, "--adapter", world / "run/adapter"])
    merging = ["merge", "--base_model", other, "--adapter", world / "run/adapter", "--output_dir", tmp_path / "merged"]
    refused(adapters.main, merging, "mlp", "another base")
    asking = ["ask", "--model", other, "--adapter", world / "run/adapter", "--device", "cpu", "hello"]
    refused(evaluation.main, asking, "mlp", "another")
    assert left_by(tmp_path) == {"other"}


# ---- output folders and disks ----------------------------------------------------------------------------------------


def test_output_is_a_file(refused, world, tmp_path):
    (tmp_path / "taken").write_text("mine")
    for output in (tmp_path / "taken", tmp_path / "taken" / "below", "/dev/null", "/proc/nothing"):
        refused(train.main, train_flags(world, output), str(output), "--output_dir")
    assert (tmp_path / "taken").read_text() == "mine"


def test_output_is_a_strangers_folder(refused, world, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    refused(train.main, train_flags(world, tmp_path), "thesis.tex", "--output_dir")
    assert left_by(tmp_path) == {"thesis.tex"}
    refused(train.main, train_flags(world, world / "base"), "config.json", "--output_dir")
    merging = ["merge", "--base_model", world / "base", "--adapter", world / "run" / "adapter", "--output_dir", tmp_path]
    refused(adapters.main, merging, "not empty")
    refused(models.main, ["tiny", "qwen2", tmp_path], "not an empty folder")
    refused(models.main, ["save_initial", "--base_model", world / "base", "--output_dir", tmp_path], "not an empty folder")
    assert left_by(tmp_path) == {"thesis.tex"}


def test_output_cannot_be_written(refused, world, tmp_path, monkeypatch):
    """Root may write anywhere, so the refusal of the system is acted."""
    real = Path.mkdir

    def mkdir(path, *arguments, **options):
        if path.is_relative_to(tmp_path / "locked"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        real(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    refused(train.main, train_flags(world, tmp_path / "locked"), "locked", "Permission denied", "--output_dir")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_full_disk_before_the_first_step(refused, world, tmp_path, monkeypatch, number):
    """The rehearsal saves a checkpoint; a disk that refuses it refuses the run."""
    from training import checkpoint

    def refuse(path, chunks):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(checkpoint, "_write", refuse)
    output = tmp_path / "out"
    refused(train.main, train_flags(world, output, "--use_lora"), str(output), os.strerror(number))
    assert not output.exists()


@pytest.mark.parametrize("name", ["run.yaml", "journal.jsonl", "held_out.jsonl"])
def test_full_disk_at_every_file(refused, world, tmp_path, monkeypatch, name):
    """/dev/full behind a file of the run: every write to it fails with the disk's own error."""
    real = io.open

    def opened(path, mode="r", *arguments, **options):
        full = isinstance(path, str | Path) and Path(path).name == name and mode[0] in "wax"  # reading it never ends
        return real("/dev/full" if full else path, mode, *arguments, **options)

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(io, "open", opened)
    flags = ["--use_lora", "--max_steps", 1, "--eval_split", 2, "--predict_with_generate", "--max_new_tokens", 2]
    refused(train.main, train_flags(world, tmp_path / "out", *flags), os.strerror(errno.ENOSPC), "make room")


def test_a_copy_that_the_disk_refuses_names_what_is_written(refused):
    def main():  # what shutil.copyfile raises
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "base/config.json", None, "out/model/config.json")

    assert "base" not in refused(main, [], "out/model/config.json: No space left", "make room")


def test_two_runs_in_one_folder(refused, world, tmp_path):
    """The second is refused and touches nothing; the first is a process of its own, as the lock belongs to one."""
    output = tmp_path / "out"
    hold = "import sys; from training.guards import open_folder; lock = open_folder(sys.argv[1]); print(1, flush=True); input()"
    first = subprocess.Popen([sys.executable, "-c", hold, output], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"1\n"
        refused(train.main, train_flags(world, output), f"process {first.pid}", "--output_dir")
        assert left_by(output) == {".lock"}
    finally:
        first.communicate(b"\n")
    assert first.returncode == 0


# ---- resume ----------------------------------------------------------------------------------------------------------

RUN = ("--use_lora", "--max_steps", 2, "--save_every", 1)


@pytest.fixture
def copied(world, tmp_path) -> Path:
    return Path(shutil.copytree(world / "run", tmp_path / "run"))


def damage_checkpoint(run: Path, step: int = 2, file: str = "trained.safetensors") -> Path:
    path = run / "checkpoints" / f"step-{step:06d}" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


def test_resume_what_is_not_there(refused, world, tmp_path, copied):
    for resume, word in ((7, "step-000007"), ("no/such", "no/such"), (tmp_path / "none" / "step-000001", "step-000001"),
                         (world / "rows.jsonl", "rows.jsonl"), (-1, "--resume"), ("maybe", "maybe"), ("1.5", "1.5")):
        refused(train.main, [*train_flags(world, copied, *RUN), f"--resume={resume}"], word, "step-000002")


@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.json", "state.json", "manifest.json"])
def test_resume_of_a_damaged_checkpoint(refused, monkeypatch, capsys, world, copied, file):
    """By number it is refused; yes takes the one before it, and is refused where none is whole."""
    damage_checkpoint(copied, 2, file)
    refused(train.main, [*train_flags(world, copied, *RUN), "--resume", 2], file, "step-000001")
    code, out, err = door(monkeypatch, capsys, train.main, *train_flags(world, copied, *RUN), "--resume", "yes")
    assert code == 0 and "after step 1" in out and "not whole" in err
    for step in (1, 2):
        damage_checkpoint(copied, step, file)
    refused(train.main, [*train_flags(world, copied, *RUN), "--resume", "yes"], "step-000002", "whole")


def test_resume_of_another_run(refused, world, copied):
    for flags, word in ((["--seed", 1], "seed"), (["--lora_r", 4], "lora_r"), (["--lr_schedule", "linear"], "lr_schedule")):
        refused(train.main, [*train_flags(world, copied, *RUN, *flags), "--resume", "yes"], word, "another")
    refused(train.main, [*train_flags(world, copied, "--max_steps", 2), "--resume", "yes"], "use_lora")


def test_resume_of_a_broken_journal(refused, world, copied):
    shutil.rmtree(copied / "checkpoints" / "step-000002")
    (copied / "journal.jsonl").write_text("broken\n" + (copied / "journal.jsonl").read_text())
    refused(train.main, [*train_flags(world, copied, *RUN), "--resume", "yes"], "journal.jsonl:1")


# ---- the machine -----------------------------------------------------------------------------------------------------


def test_no_card(refused_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused_run("cuda", "--device cpu", flags=["--device", "cuda"])


@pytest.mark.parametrize("package, module", [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_missing_package(refused_run, monkeypatch, package, module):
    monkeypatch.setitem(sys.modules, module, None)
    refused_run(f"pip install {package}", flags=["--report_to", package])


# ---- the other doors -------------------------------------------------------------------------------------------------


def test_eval(refused, world, tmp_path):
    good = {"--model": world / "base", "--data_path": world / "rows.jsonl", "--task": "text", "--output_dir": tmp_path / "out"}
    (tmp_path / "file").touch()
    for change, words in (
        ({"--data_pth": 3}, ["--data_pth", "the nearest is --data_path"]),
        ({"--model": tmp_path / "none"}, ["none", "no such"]),
        ({"--model": world / "rows.jsonl"}, ["rows.jsonl", "no such"]),
        ({"--model": tmp_path}, ["config.json"]),
        ({"--adapter": tmp_path}, ["adapter_config.json"]),
        ({"--data_path": tmp_path}, ["jsonl"]),
        ({"--data_path": tmp_path / "none.jsonl"}, ["none.jsonl"]),
        ({"--task": "beauty"}, ["beauty", "box"]),
        ({"--task": "no.such:metric"}, ["no.such"]),
        ({"--task": "os:name"}, ["os:name"]),
        ({"--task": ":"}, ["--task"]),
        ({"--image_root": tmp_path / "none"}, ["none"]),
        ({"--output_dir": tmp_path / "file"}, ["file", "--output_dir"]),
        ({"--max_new_tokens": 0}, ["--max_new_tokens"]),
        ({"--limit": "two"}, ["--limit"]),
        ({"--quant": "3bit"}, ["3bit"]),
        ({"--device": "tpu"}, ["tpu"]),
        ({"--precision": "fp16", "--device": "cpu"}, ["fp16"]),
    ):
        flags = {"--device": "cpu"} | good | change
        refused(evaluation.main, [part for pair in flags.items() for part in pair], *words)
    refused(evaluation.main, ["--data_path", world / "rows.jsonl"], "--model")


def test_ask(refused, world, tmp_path):
    (tmp_path / "tools.json").write_text("{}")
    for arguments, words in (
        (["--model", tmp_path / "none", "hi"], ["no such"]),
        (["hi"], ["--model"]),
        (["--model", world / "vl", "--image", tmp_path / "none.png", "hi"], ["none.png"]),
        (["--model", world / "vl", "--image", world / "rows.jsonl", "hi"], ["rows.jsonl", "PNG"]),
        (["--model", world / "base", "--image", world / "shot.png", "hi"], ["no pictures"]),
        (["--model", world / "base", "--draw", tmp_path / "x.png", "hi"], ["--draw", "--image"]),
        (["--model", world / "base", "--tools", tmp_path / "none.json", "hi"], ["none.json"]),
        (["--model", world / "base", "--tools", tmp_path / "tools.json", "hi"], ["tools.json", "list"]),
        (["--model", world / "base", "--box_scale", "miles", "hi"], ["miles"]),
        (["--model", world / "base", "hi", "there"], ["there"]),
        (["--model", world / "base", "--frobnicate", "hi"], ["--frobnicate"]),
    ):
        refused(evaluation.main, ["ask", *arguments], *words)


def test_merge(refused, world, tmp_path):
    good = {"--base_model": world / "base", "--adapter": world / "run/adapter", "--output_dir": tmp_path / "merged"}
    (tmp_path / "file").touch()
    for change, words in (
        ({"--base_model": tmp_path / "none"}, ["no such"]),
        ({"--output_dir": tmp_path / "file"}, ["file"]),
        ({"--output_dir": tmp_path / "file" / "below"}, ["file"]),
        ({"--data_path": tmp_path / "none.jsonl"}, ["none.jsonl"]),
        ({"--data_path": world / "rows.jsonl", "--image_root": tmp_path / "none"}, ["none"]),
        ({"--frobnicate": 3}, ["--frobnicate"]),
        ({"--device": "tpu"}, ["tpu"]),
    ):
        refused(adapters.main, ["merge", *(part for pair in (good | change).items() for part in pair)], *words)
        assert left_by(tmp_path) == {"file"}
    refused(adapters.main, [], "command")
    refused(adapters.main, ["mrege"], "mrege")
    refused(adapters.main, ["merge"], "--base_model")


def test_model_commands(refused, world, tmp_path):
    (tmp_path / "file").touch()
    for arguments, words in (
        ([], ["command"]),
        (["inspekt", "x"], ["inspekt"]),
        (["inspect"], ["DIR"]),
        (["tiny", "qwen2", "x", "--tokeniser=y"], ["model tiny; the nearest is --tokenizer"]),
        (["inspect", tmp_path / "none"], ["no such"]),
        (["inspect", tmp_path], ["config.json"]),
        (["inspect", world / "run/adapter"], ["config.json"]),
        (["tiny", "gpt9", tmp_path / "out"], ["gpt9", "qwen2"]),
        (["tiny", "qwen2"], ["OUT"]),
        (["tiny", "qwen2", tmp_path / "file"], ["file"]),
        (["tiny", "qwen2", tmp_path / "file" / "below"], ["file"]),
        (["tiny", "qwen2", tmp_path / "out", "--tokenizer", tmp_path / "none"], ["none"]),
        (["tiny", "qwen2", tmp_path / "out", "--tokenizer", tmp_path], ["tokenizer"]),
        (["tiny", "qwen2", tmp_path / "out", "--vocab_size", 3], ["--vocab_size 3"]),
        (["tiny", "qwen2", tmp_path / "out", "--vocab_size", "x"], ["--vocab_size"]),
        (["save_initial", "--base_model", tmp_path, "--output_dir", tmp_path / "out"], ["config.json"]),
        (["save_initial", "--base_model", world / "base", "--output_dir", tmp_path / "file"], ["file"]),
        (["save_initial", "--base_model", world / "base", "--output_dir", tmp_path / "file" / "below"], ["file"]),
    ):
        refused(models.main, arguments, *words)
        assert left_by(tmp_path) == {"file"}


@pytest.mark.parametrize("case", ["truncated weights", "missing tensor", "wrong shape", "broken config", "index leads out"])
def test_inspect_and_copy_of_a_broken_model(refused, world, tmp_path, case):
    damage, words = MODELS[case]
    shutil.copytree(world / "base", tmp_path / "broken")
    damage(tmp_path / "broken")
    refused(models.main, ["inspect", tmp_path / "broken"], *words)
    refused(models.main, ["save_initial", "--base_model", tmp_path / "broken", "--output_dir", tmp_path / "copy"], *words)
    assert left_by(tmp_path) == {"broken"}


# ---- from the shell --------------------------------------------------------------------------------------------------

SHELL = {
    "train.py": (["train.py", "--lerning_rate", "1"], "learning_rate"),
    "train.py, no model": (["train.py", "--base_model", "no/such/folder", "--data_path", "x.jsonl"], "no/such/folder"),
    "eval": (["-m", "eval", "--model", "x"], "--data_path"),
    "ask": (["-m", "eval", "ask", "--modell", "x"], "--model"),
    "merge": (["-m", "lora", "merge", "--base_model", "x"], "--adapter"),
    "inspect": (["-m", "model", "inspect", "no/such/folder"], "no/such/folder"),
}


@pytest.mark.parametrize("case", SHELL)
def test_from_the_shell(tmp_path, case):
    arguments, word = SHELL[case]
    if arguments[0].endswith(".py"):
        arguments = [ROOT / arguments[0], *arguments[1:]]
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})
    check_sentence(done.returncode, done.stderr, word)
    assert left_by(tmp_path) == set()


# ---- what is not wrong -----------------------------------------------------------------------------------------------


def test_paths_with_spaces_and_letters_of_every_kind(monkeypatch, capsys, world, tmp_path):
    """A run, its resume, a question and a merge in a folder named as people name folders."""
    place = tmp_path / "Über uns & 日本 'quoted' $HOME #1"
    place.mkdir()
    for name in ("base", "rows.jsonl"):
        source = world / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, place / f"my {name}")
    flags = train_flags(place, place / "the run", *RUN, base="my base", rows="my rows.jsonl")
    assert door(monkeypatch, capsys, train.main, *flags)[0] == 0
    assert "nothing to do" in door(monkeypatch, capsys, train.main, *flags, "--resume", "yes")[1]
    asking = ["ask", "--model", place / "the run", "--max_new_tokens", 2, "--device", "cpu", "wie heißt das?"]
    assert door(monkeypatch, capsys, evaluation.main, *asking)[0] == 0
    merging = ["merge", "--base_model", place / "my base", "--adapter", place / "the run" / "adapter"]
    merging += ["--output_dir", place / "both, merged"]
    assert door(monkeypatch, capsys, adapters.main, *merging)[0] == 0
    assert "file:" not in (place / "the run" / "README.md").read_text(encoding="utf-8")


def test_a_reader_that_leaves_ends_a_command_without_a_traceback():
    script = "from data.errors import command; command(lambda: [print('row ' * 100) for _ in range(10_000)] and 0)"
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b"" and child.wait() == 141
