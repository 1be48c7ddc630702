"""The merge: what it changes, what it leaves byte for byte, who can open it, what it refuses, and its report."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_lora import (  # noqa: F401
    CONFIGS,
    SCALES,
    assert_same,
    bases,
    examples_of,
    hub_logits,
    hub_model,
    make,
    rename_as_older,
    tiny_base,
)

import lora.merge
from data.errors import UserError
from lora.adapter import inject, lora_layers, weight_of
from lora.compare import compare, gap, report_text
from lora.files import adapter_parameters, load_adapter, read_adapter, save_adapter
from lora.merge import merge
from model import load_model
from model.load import quantized_names
from model.shards import Shards

pytestmark = pytest.mark.slow


def saved(folder: Path, base: Path, **settings):
    """An adapter of a base on disk; returns (its model, family)."""
    model, family, settings = make(base, **settings)
    save_adapter(model, family, folder, settings, base)
    return model, family


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("variant", SCALES)
def test_transformers_opens_the_merged_model(bases, tmp_path, monkeypatch, kind, variant):  # noqa: F811
    monkeypatch.setattr(lora.merge, "BLOCK_BYTES", 5000)  # several blocks a tensor
    parts = ["language"] if kind == "text" else ["language", "projector", "vision"]
    model, family = saved(tmp_path / "adapter", bases[kind], parts=parts, **SCALES[variant])
    merge(bases[kind], tmp_path / "adapter", tmp_path / "merged")
    examples = examples_of(family)
    ours = model.logits(examples)
    net = hub_model(tmp_path / "merged")
    assert_same([hub_logits(net, family, example) for example in examples], ours)
    assert_same(load_model(tmp_path / "merged", dtype="float32")[0].logits(examples), ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_target_tensors_are_rounded_once_and_nothing_else_changes(tmp_path, dtype):
    base = tiny_base(tmp_path / "base", "vision", dtype)
    (base / "model-bonus.txt").write_text("kept")
    _, family = saved(tmp_path / "adapter", base, targets=["q_proj", "down_proj"], parts=["language", "vision"])
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    adapter = read_adapter(tmp_path / "adapter")
    changed = {family.tensor_name(f"{module}.weight"): tensors for module, tensors in adapter.modules().items()}
    assert len(Shards(base).files()) > 1 and len(changed) == 2 * 2 + 2
    merged = dict(Shards(tmp_path / "merged").stream())
    for name, weight in Shards(base).stream():
        assert merged[name].dtype == dtype
        if name in changed:
            a, b = (changed[name][f"lora_{letter}.weight"] for letter in "AB")
            exact = weight.double() + adapter.scale * (b.double() @ a.double())
            gap = (merged[name].double() - exact).abs()
            assert (gap <= torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + 1e-6).all()  # half of the last place
            assert not torch.equal(merged[name], weight)
        else:
            assert torch.equal(merged[name], weight)
    for path in base.iterdir():
        twin = tmp_path / "merged" / path.name
        assert twin.stat().st_size == path.stat().st_size
        assert path.suffix == ".safetensors" or twin.read_bytes() == path.read_bytes()
    assert {p.name for p in (tmp_path / "merged").iterdir()} == {p.name for p in base.iterdir()} | {"merge.json"}


def test_dora_sets_the_norm_of_every_row(bases, tmp_path):  # noqa: F811
    saved(tmp_path / "adapter", bases["text"], use_dora=True)
    merge(bases["text"], tmp_path / "adapter", tmp_path / "merged")
    merged = dict(Shards(tmp_path / "merged").stream())
    for module, tensors in read_adapter(tmp_path / "adapter").modules().items():
        torch.testing.assert_close(merged[f"{module}.weight"].norm(dim=1), tensors["lora_magnitude_vector"])


def test_older_names_are_merged(bases, tmp_path):  # noqa: F811
    saved(tmp_path / "adapter", bases["vision"], parts=["language", "vision"])
    merge(bases["vision"], tmp_path / "adapter", tmp_path / "merged")
    rename_as_older(tmp_path / "adapter" / "adapter_model.safetensors")
    merge(bases["vision"], tmp_path / "adapter", tmp_path / "older")
    for name in Shards(bases["vision"]).files():
        assert (tmp_path / "older" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_memory_is_one_block(tmp_path, monkeypatch):
    """Python's own buffers are counted exactly by tracemalloc; torch's are views of them and two blocks in fp32."""
    base = tiny_base(tmp_path / "base", "text", torch.bfloat16, vocab_size=20_000)
    saved(tmp_path / "adapter", base)
    monkeypatch.setattr(lora.merge, "BLOCK_BYTES", 20_000)
    adapter_bytes = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    merge(base, tmp_path / "adapter", tmp_path / "warm")
    tracemalloc.start()
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000 * 3 + adapter_bytes * 2 + 200_000 < 20_000 * 64 * 2  # the embedding alone is 2.5 MB


# ---- refused ------------------------------------------------------------------------------------------------------


def test_the_same_adapter_is_not_merged_twice(bases, tmp_path):  # noqa: F811
    saved(tmp_path / "adapter", bases["text"])
    saved(tmp_path / "second", bases["text"], seed=2)
    merge(bases["text"], tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(UserError, match="already holds the adapter"):
        merge(tmp_path / "merged", tmp_path / "adapter", tmp_path / "twice")
    with pytest.raises(UserError, match="exists and is not empty"):
        merge(bases["text"], tmp_path / "second", tmp_path / "merged")
    record = merge(tmp_path / "merged", tmp_path / "second", tmp_path / "both")  # another one is fine: SFT, then DPO
    assert [Path(entry["adapter"]).name for entry in record["merged"]] == ["adapter", "second"]
    with pytest.raises(UserError, match="already holds the adapter"):
        merge(tmp_path / "both", tmp_path / "adapter", tmp_path / "twice")


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(bases, tmp_path):  # noqa: F811
    saved(tmp_path / "prefix", bases["text"], peft_type="PREFIX_TUNING")
    saved(tmp_path / "text", bases["text"])
    saved(tmp_path / "vision", bases["vision"], parts=["vision"])
    wider = tiny_base(tmp_path / "wider", "text", intermediate_size=112)
    for adapter, base, words in (
        ("prefix", bases["text"], "keep it as an adapter"),
        ("text", wider, "the adapter is of another base"),
        ("vision", bases["text"], "its base is another"),
        ("nothing", bases["text"], "no such folder; name the adapter"),
        ("text", tmp_path, "neither model.safetensors"),
    ):
        with pytest.raises(UserError, match=words):
            merge(base, tmp_path / adapter, tmp_path / "out" / "merged")
    assert not list(tmp_path.glob("out/*"))


def test_a_merge_that_breaks_off_leaves_nothing(bases, tmp_path, monkeypatch):  # noqa: F811
    saved(tmp_path / "adapter", bases["text"])
    monkeypatch.setattr(lora.merge, "merge_tensor", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge(bases["text"], tmp_path / "adapter", tmp_path / "out" / "merged")
    assert not list((tmp_path / "out").iterdir())


# ---- the report, and the command ----------------------------------------------------------------------------------


def dequantized_base(base: Path, quant: str):
    """The base with every quantised weight replaced, before any forward, by the fp32 values it computes with."""
    model, family = load_model(base, quant=quant, dtype="float32")
    plain, _ = load_model(base, dtype="float32")
    for name in quantized_names(family, plain.net):
        plain.net.get_submodule(name).weight.data = weight_of(model.net.get_submodule(name))
    return plain, family


TEXTS = ["where is save", "open the file", "close", "what is written here", "go back"]


@pytest.fixture
def rows(tmp_path):
    """Five rows of chat that the tiny tokenizer of real_base reads."""
    path = tmp_path / "rows.jsonl"
    turns = [[{"role": "user", "content": t}, {"role": "assistant", "content": t[::-1]}] for t in TEXTS]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return path


@pytest.fixture
def real_base(tmp_path):
    """A text base with a tokenizer: bytes, ChatML's special tokens, Qwen's template in short."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    base = tiny_base(tmp_path / "base", "text", torch.bfloat16, vocab_size=300)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(base / "tokenizer.json"))
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, "eos_token": "<|im_end|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    return base


@pytest.mark.parametrize("quant", [None, "8bit", "4bit"])
def test_report(tmp_path, real_base, rows, quant):
    """Each gap is that of models built here by hand; the quantised one is W16's gap and the quantisation error."""
    saved(tmp_path / "adapter", real_base, quant=quant, dtype="bfloat16")
    assert read_adapter(tmp_path / "adapter").base_quant == quant
    merge(real_base, tmp_path / "adapter", tmp_path / "merged")
    report = compare(real_base, tmp_path / "adapter", tmp_path / "merged", rows, None, "cpu")
    assert (report["rows"], report["positions"]) == (len(TEXTS), sum(len(text) + 1 for text in TEXTS))
    w16, without = report["w16_plus_ba"], report["without_adapter"]
    assert 0 < w16["mean"] < 0.1 * without["mean"] and w16["same_argmax"] > 0.9
    text = report_text(report)
    assert "W16 + BA" in text and "warning" not in text
    assert ("dequantised_plus_ba" in report) == (quant is not None) == ("dequant(Wq)" in text)
    if quant:
        assert report["dequantised_plus_ba"]["mean"] > {"8bit": 1.3, "4bit": 5}[quant] * w16["mean"]


@pytest.mark.parametrize("quant, smallest, largest", [("8bit", 1e-4, 0.05), ("4bit", 0.02, 0.5)])
def test_quantised_run_is_dequantised_weights_plus_adapter(bases, tmp_path, quant, smallest, largest):  # noqa: F811
    """In fp32: the model trained on a quantised base is dequant(Wq) + BA; the merged model is W16 + BA."""
    model, family = saved(tmp_path / "adapter", bases["text"], quant=quant)
    examples = examples_of(family)
    trained = torch.cat(model.logits(examples))
    by_hand, _ = dequantized_base(bases["text"], quant)
    load_adapter(by_hand, family, tmp_path / "adapter")
    assert gap(torch.cat(by_hand.logits(examples)), trained)["max"] < 1e-4 * trained.abs().max()
    merge(bases["text"], tmp_path / "adapter", tmp_path / "merged")
    merged = torch.cat(load_model(tmp_path / "merged", dtype="float32")[0].logits(examples))
    on_base, _ = load_model(bases["text"], dtype="float32")
    load_adapter(on_base, family, tmp_path / "adapter")
    assert gap(torch.cat(on_base.logits(examples)), merged)["max"] < 1e-5 * merged.abs().max()
    assert smallest < gap(trained, merged)["mean"] / merged.abs().mean() < largest


def test_an_adapter_too_weak_for_the_rounding_is_called_out(tmp_path, real_base, rows):
    model, family, settings = make(real_base)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "lora_B" in name:
                parameter.mul_(0.003)
    save_adapter(model, family, tmp_path / "adapter", settings, real_base)
    merge(real_base, tmp_path / "adapter", tmp_path / "merged")
    assert "warning" in report_text(compare(real_base, tmp_path / "adapter", tmp_path / "merged", rows, None, "cpu"))


def command(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "lora", *map(str, flags)], cwd=ROOT, capture_output=True, text=True)


def test_the_command(tmp_path, real_base, rows):
    saved(tmp_path / "adapter", real_base)
    flags = ["merge", "--base_model", real_base, "--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged"]
    done = command(*flags, "--data_path", rows)
    assert done.returncode == 0 and "merged 14 tensors" in done.stdout and "W16 + BA" in done.stdout, done.stderr
    entry = json.loads((tmp_path / "merged" / "merge.json").read_text())["merged"][0]
    assert len(entry["tensors"]) == 14 and entry["report"]["rows"] == 5
    click = {"type": "function", "function": {"name": "click", "arguments": {"x": 1}}}
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [click]}]}
    (tmp_path / "calls.jsonl").write_text(json.dumps(row))
    flags[-1] = tmp_path / "merged_too"
    done = command(*flags, "--data_path", tmp_path / "calls.jsonl", "--tool_template", "qwen")
    assert done.returncode == 0 and "W16 + BA" in done.stdout, done.stderr
    for wrong in ([], ["merge"], ["unmerge"], [*flags, "--lora_r", "4"]):
        done = command(*wrong)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_adapters_on_other_layers_do_not_meet(bases):  # noqa: F811
    """inject takes full names: a module is reached by its own name and by no other's."""
    model, family = load_model(bases["vision"])
    from lora.adapter import Settings

    names = ["model.visual.blocks.0.mlp.gate_proj", "model.visual.merger.mlp.0"]
    inject(model, Settings(), names)
    assert list(lora_layers(model.net)) == names
