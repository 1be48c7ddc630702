"""Loading and saving: real sizes on meta, the hub's cache, and everything that a broken or hostile folder can hold."""

import gc
import json
import os
import random
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, shared
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.real_size import QWEN_05B, QWEN_VL_3B
from data.errors import UserError
from model import load_model, load_tokenizer, save_model
from model.family import families, find_family
from model.files import read_json
from model.load import build_on_meta, expected_tensors, is_tied, quantized_names
from model.quantize import dequantize, is_quantized
from model.shards import INDEX, SINGLE, Shards
from model.tiny import write_tiny

FAMILIES = ["qwen2", "qwen2_5_vl"]

VISION = QWEN_VL_3B["vision_config"]
QWEN_VL_7B = QWEN_VL_3B | {
    "hidden_size": 3584, "intermediate_size": 18944, "max_window_layers": 28, "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "tie_word_embeddings": False, "vocab_size": 152064,
    "vision_config": VISION | {"out_hidden_size": 3584},
}
RESAVED_3B = QWEN_VL_3B | {  # as transformers 4.49 writes it back: the vision part lists what differs from its defaults
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "vision_config": {
        "hidden_size": 1280, "in_chans": 3, "model_type": "qwen2_5_vl", "out_hidden_size": 2048,
        "spatial_patch_size": 14, "tokens_per_second": 2,
    },
}
TOP_KEYS = {"architectures", "model_type", "tie_word_embeddings", "bos_token_id", "eos_token_id", "torch_dtype"}
TEXT_KEYS = set(QWEN_05B) - TOP_KEYS
NESTED_3B = {k: v for k, v in QWEN_VL_3B.items() if k not in TEXT_KEYS and k != "rope_scaling"} | {  # transformers 5
    "text_config": {k: v for k, v in QWEN_VL_3B.items() if k in TEXT_KEYS - {"rope_theta"}} | {
        "model_type": "qwen2_5_vl_text",
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [16, 24, 24]},
    },
}


def on_meta(folder, config):
    """(family, network on meta, its checkpoint's names and shapes) of a config alone."""
    (folder / "config.json").write_text(json.dumps(config))
    family = find_family(folder)
    net = build_on_meta(family)
    return family, net, expected_tensors(family, net)


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, tmp_path_factory):
    """A tiny checkpoint of each family; the tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("tiny") / request.param
    write_tiny(request.param, folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


@pytest.fixture
def sharded(copy):
    """The checkpoint cut in two in the middle of a layer, with an index."""
    tensors = load_file(copy / SINGLE)
    names = list(tensors)
    half = len(names) // 2
    plan = {n: f"model-0000{1 + (i >= half)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in sorted(set(plan.values())):
        save_file({n: tensors[n] for n in names if plan[n] == file}, copy / file)
    (copy / SINGLE).unlink()
    (copy / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": plan}))
    return copy


def refused(folder, *words, quant=None):
    """load_model's UserError, in which all the words stand."""
    with pytest.raises(UserError) as error:
        load_model(folder, quant=quant, dtype="float32")
    for word in words:
        assert word in str(error.value)
    return str(error.value)


# ---- real sizes, on meta --------------------------------------------------------------------------------------------


def test_real_text_sizes(tmp_path):
    _, net, tensors = on_meta(tmp_path, QWEN_05B)
    assert len(tensors) == 290 and sum(p.numel() for p in net.parameters()) == 494_032_768
    assert sum(s.numel() for s in tensors.values()) == 494_032_768 and is_tied(net)
    assert tensors["model.layers.23.self_attn.k_proj.bias"] == (128,)
    assert tensors["model.layers.0.mlp.down_proj.weight"] == (896, 4864)


def test_real_text_size_untied(tmp_path):
    config = json.loads(shared("tokenizers/qwen2.5/config.json").read_text())
    _, net, tensors = on_meta(tmp_path, config)
    assert len(tensors) == 339 and not is_tied(net)
    assert tensors["lm_head.weight"] == tensors["model.embed_tokens.weight"] == (152064, 3584)
    assert sum(s.numel() for s in tensors.values()) == 7_615_616_512  # what Qwen2.5-7B is published with


@pytest.mark.parametrize("config", [QWEN_VL_3B, RESAVED_3B, NESTED_3B], ids=["original", "resaved", "nested"])
def test_real_vision_size_in_every_form_of_its_config(tmp_path, config):
    family, net, tensors = on_meta(tmp_path, config)
    assert len(tensors) == 824 and sum(s.numel() for s in tensors.values()) == 3_754_622_976
    assert {n.split(".")[0] for n in tensors} == {"visual", "model"}
    vision = sum(s.numel() for n, s in tensors.items() if n.startswith("visual."))
    assert (vision, 3_754_622_976 - vision) == (668_684_288, 3_085_938_688)
    table = {
        "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        "visual.blocks.31.attn.qkv.weight": (3840, 1280),
        "visual.blocks.0.mlp.gate_proj.bias": (3420,),
        "visual.blocks.7.mlp.down_proj.weight": (1280, 3420),
        "visual.merger.ln_q.weight": (1280,),
        "visual.merger.mlp.0.weight": (5120, 5120),
        "visual.merger.mlp.2.weight": (2048, 5120),
        "model.embed_tokens.weight": (151936, 2048),
        "model.layers.35.self_attn.v_proj.weight": (256, 2048),
        "model.layers.0.self_attn.q_proj.bias": (2048,),
        "model.layers.0.mlp.up_proj.weight": (11008, 2048),
        "model.norm.weight": (2048,),
    }
    for name, shape in table.items():
        assert tensors[name] == shape, name
    text, vision = net.config.text_config, net.config.vision_config
    assert text.rope_parameters["rope_theta"] == 1e6 and list(text.rope_parameters["mrope_section"]) == [16, 24, 24]
    assert (vision.depth, vision.window_size, list(vision.fullatt_block_indexes)) == (32, 112, [7, 15, 23, 31])
    assert family.hidden_size == 2048 and family.merge_size == 2 and family.image_token_id == 151655


def test_real_vision_size_untied(tmp_path):
    _, net, tensors = on_meta(tmp_path, QWEN_VL_7B)
    assert not is_tied(net) and tensors["lm_head.weight"] == (152064, 3584)
    assert tensors["visual.merger.mlp.2.weight"] == (3584, 5120)
    assert len(tensors) == 729 and sum(s.numel() for s in tensors.values()) == 8_292_166_656  # Qwen2.5-VL-7B on the hub


@pytest.mark.parametrize("config", [QWEN_05B, QWEN_VL_3B, QWEN_VL_7B], ids=["text", "tied", "untied"])
def test_renaming_is_the_same_way_back(tmp_path, config):
    family, net, tensors = on_meta(tmp_path, config)
    modules = dict(net.named_parameters(remove_duplicate=False))
    for name in tensors:
        assert family.module_name(name) in modules
        assert family.tensor_name(family.module_name(name)) == name
    assert len({family.module_name(n) for n in tensors}) == len(tensors)
    for name in modules:
        assert family.module_name(family.tensor_name(name)) == name


def test_parts_and_quantised_layers(tmp_path):
    family, net, _ = on_meta(tmp_path, QWEN_VL_3B)
    names = quantized_names(family, net)
    assert len(names) == 36 * 7 and all(n.startswith("model.language_model.layers.") for n in names)
    assert family.part_of("model.visual.merger.mlp.0") == "projector"
    assert family.part_of("model.visual.blocks.0.mlp.gate_proj") == "vision"
    assert family.part_of("lm_head") == family.part_of("model.language_model.norm") == "language"


# ---- a whole checkpoint ---------------------------------------------------------------------------------------------


def test_one_file_and_shards_load_the_same(tiny, sharded):
    whole, _ = load_model(tiny, dtype="float32")
    parts, _ = load_model(sharded, dtype="float32")
    stored = load_file(tiny / SINGLE)
    for (name, a), b in zip(whole.net.named_parameters(), parts.net.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, stored[whole.family.tensor_name(name)])
    assert not any(t.is_meta for t in [*whole.net.parameters(), *whole.net.buffers()])


def test_buffers_stay_fp32_and_the_head_is_tied(tiny):
    model, _ = load_model(tiny, dtype="bfloat16")
    assert {p.dtype for p in model.net.parameters()} == {torch.bfloat16}
    assert model.head_weight.data_ptr() == model.net.get_input_embeddings().weight.data_ptr()
    ours = dict(model.net.named_buffers())
    theirs = dict(reopen(tiny).named_buffers())
    assert ours.keys() == theirs.keys() and len(ours) >= 2
    for name, buffer in ours.items():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, theirs[name]), name


def reopen(folder, dtype=torch.bfloat16):
    """The folder opened by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    is_text = read_json(folder / "config.json")["model_type"] == "qwen2"
    auto = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    return auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def test_saved_model_is_the_hubs_layout(tiny, tmp_path):
    model, family = load_model(tiny, dtype="float32")
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / SINGLE)) == set(load_file(tiny / SINGLE))
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes()
    example = family.encode([{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}])
    with torch.no_grad():
        theirs = reopen(tmp_path / "saved", torch.float32)(example.input_ids[None]).logits[0]
    torch.testing.assert_close(model.logits([example])[0], theirs, atol=1e-5, rtol=0)
    again, _ = load_model(tmp_path / "saved", dtype="float32")
    assert torch.equal(again.logits([example])[0], model.logits([example])[0])


def test_large_models_are_saved_in_shards(tiny, tmp_path, monkeypatch):
    import model.load

    plan = model.load.plan_shards
    monkeypatch.setattr(model.load, "plan_shards", lambda sizes: plan(sizes, 100_000))
    saved, _ = load_model(tiny, dtype="float32")
    save_model(saved, tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 2 and not list((tmp_path / "saved").glob("*.part"))
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in saved.net.parameters())
    again, _ = load_model(tmp_path / "saved", dtype="float32")
    for a, b in zip(again.net.parameters(), saved.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_tied_head_stored_all_the_same_is_accepted(copy):
    tensors = load_file(copy / SINGLE)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, copy / SINGLE)
    model, _ = load_model(copy, dtype="float32")
    assert torch.equal(model.head_weight, tensors["model.embed_tokens.weight"])


def test_quantised_model_is_not_saved(tiny, tmp_path):
    model, _ = load_model(tiny, quant="8bit")
    with pytest.raises(UserError, match="merge"):
        save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(UserError, match="8bit, 4bit"):
        load_model(tiny, quant="3bit")


def test_weights_that_do_not_fit_the_card_are_a_sentence(tiny, monkeypatch):
    def refuse(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("model.load.fill", refuse)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 24 * 2**30))
    refused(tiny, "do not fit", "24.0 GiB", "--use_4bit")


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_an_8bit_layer_is_the_layer_with_its_dequantised_weight(tiny, compute):
    """In training and in eval mode, outputs and gradients; and nothing of its input stays behind."""
    model, _ = load_model(tiny, quant="8bit", dtype="float32")
    layer = next(m for m in model.net.modules() if is_quantized(m))
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    kept = []
    with torch.autocast("cpu", compute, enabled=compute != torch.float32):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            ours = layer.train()(x)
        theirs = torch.nn.functional.linear(x, dequantize(layer), layer.bias)
        assert not kept and ours.dtype == compute and torch.equal(ours, layer.eval()(x))
    tolerance = 1e-6 if compute == torch.float32 else 1e-2
    assert (ours - theirs).norm() < tolerance * theirs.norm()
    upstream = torch.randn_like(theirs)
    found, wanted = (torch.autograd.grad((out * upstream).sum(), x)[0] for out in (ours, theirs))
    assert found.dtype == torch.float32 and (found - wanted).norm() < tolerance * wanted.norm()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and nobody has let go of, and their peak."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor.numel():
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.live())
        return out

    def live(self) -> int:
        self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
        return sum(size for _, size in self.storages.values())


@pytest.mark.parametrize("quant", [None, "8bit", "4bit"])
def test_loading_holds_one_tensor_above_the_finished_model(tmp_path, quant):
    folder = tmp_path / "wide"
    write_tiny("qwen2", folder)
    config = read_json(folder / "config.json") | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
    (folder / "config.json").write_text(json.dumps(config))
    net = on_meta(folder, config)
    save_file({n: torch.randn(s, dtype=torch.bfloat16) for n, s in net[2].items()}, folder / SINGLE)
    largest = max(4 * s.numel() for s in net[2].values())  # one tensor, in fp32
    gc.collect()
    with LiveBytes() as bytes_of:
        model, _ = load_model(folder, quant=quant, dtype="float32" if quant is None else "bfloat16")
        gc.collect()
        finished = bytes_of.live()
    held = sum(p.numel() * p.element_size() for p in model.net.parameters())
    assert finished >= 0.95 * held  # the count sees the model
    assert bytes_of.peak - finished <= largest


# ---- what a folder must not hold ------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_tensors_are_named(copy):
    tensors = load_file(copy / SINGLE)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, copy / SINGLE)
    refused(copy, "lacks", name)
    save_file(tensors | {"model.layers.9.extra": torch.zeros(2)}, copy / SINGLE)
    refused(copy, "unexpected", "model.layers.9.extra")
    save_file(tensors | {name: tensors[name].T.contiguous()}, copy / SINGLE)
    refused(copy, "misshapen", name, str(tuple(tensors[name].T.shape)), str(tuple(tensors[name].shape)))
    save_file(tensors | {name: tensors[name].to(torch.int8)}, copy / SINGLE)
    refused(copy, name, "I8")
    save_file(tensors, copy / SINGLE)
    (copy / "config.json").write_text(json.dumps(read_json(copy / "config.json") | {"num_hidden_layers": 3}))
    refused(copy, "lacks", "model.layers.2.", "and 9 more")


def rewrite_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["above", "absolute", "link", "zero byte", "no text"])
def test_index_that_leads_out_of_the_folder(sharded, tmp_path, kind):
    name = "model.norm.weight"
    secret = tmp_path / "secret.safetensors"
    save_file({name: load_file(sharded / json.loads((sharded / INDEX).read_text())["weight_map"][name])[name]}, secret)
    target = {"above": "../secret.safetensors", "absolute": str(secret), "link": "inside.safetensors"}
    target |= {"zero byte": "a\0b", "no text": 3}
    (sharded / "inside.safetensors").symlink_to(secret)
    rewrite_index(sharded, lambda held: held.update({name: target[kind]}))
    refused(sharded, INDEX, "outside")


def test_single_file_that_is_a_link_out_of_the_folder(copy, tmp_path):
    (copy / SINGLE).rename(tmp_path / "elsewhere.safetensors")
    (copy / SINGLE).symlink_to(tmp_path / "elsewhere.safetensors")
    refused(copy, SINGLE, "outside")


def test_index_that_does_not_fit_its_shards(sharded):
    index = (sharded / INDEX).read_text()
    held = json.loads(index)["weight_map"]
    first, second = sorted(set(held.values()))
    name = next(n for n, f in held.items() if f == first)

    def broken(text, *words):
        (sharded / INDEX).write_text(text)
        refused(sharded, INDEX if not words else "", *words)

    broken(json.dumps({"weight_map": held | {name: second}}), name, second)
    broken(json.dumps({"weight_map": held | {"model.ghost": second}}), "model.ghost", second)
    broken(json.dumps({"weight_map": held | {name: "gone.safetensors"}}), "gone.safetensors", "missing")
    broken(index[:-1].replace(f'"{name}":', f'"{name}": "{second}", "{name}":') + "}", name, "twice")
    broken(json.dumps({"weight_map": {n: f for n, f in held.items() if f == first}}), "lacks")
    odd = ('{"weight_map": []}', '{"weight_map": {"a": ["b"]}}', '{"weight_map": {"a": ""}}', "[" * 100_000)
    for text in ("", "[]", "{}", *odd):
        (sharded / INDEX).write_text(text)
        refused(sharded)
    (sharded / INDEX).write_text(json.dumps({"weight_map": {n: f for n, f in held.items() if n != name}}))
    load_model(sharded, dtype="float32")  # the shard holds what the index forgot: nothing is lost


def test_tensor_in_two_shards(sharded):
    first, second = sorted(set(json.loads((sharded / INDEX).read_text())["weight_map"].values()))
    tensors = load_file(sharded / first)
    name = next(iter(tensors))
    save_file(load_file(sharded / second) | {name: tensors[name] + 1}, sharded / second)
    refused(sharded, name, first, second)


def test_truncated_shard(sharded):
    first, second = sorted(set(json.loads((sharded / INDEX).read_text())["weight_map"].values()))
    whole = (sharded / second).read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        (sharded / second).write_bytes(whole[:size])
        refused(sharded, second, "not a whole safetensors file")
    (sharded / second).write_bytes(whole + b"\0")
    refused(sharded, second)
    (sharded / second).unlink()
    refused(sharded, second, "missing")


def test_pickles_are_not_opened(copy):
    (copy / SINGLE).unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    refused(copy, "pytorch_model.bin", "safetensors", "convert")
    with pytest.raises(UserError, match="config.json"):
        load_model(copy.parent, dtype="float32")


def test_broken_config(copy):
    config = read_json(copy / "config.json")
    changes = [
        {"hidden_size": "wide"}, {"hidden_size": -3}, {"hidden_size": None}, {"num_attention_heads": 5},
        {"hidden_act": "nope"}, {"num_hidden_layers": -1}, {"vocab_size": 7}, {"rope_theta": "x"},
        {"rms_norm_eps": "x"}, {"model_type": "llama"}, {"model_type": ["qwen2"]}, {"model_type": None},
    ]  # fmt: skip
    for change in changes:
        (copy / "config.json").write_text(json.dumps(config | change))
        refused(copy)
    for text in ("", "[]", "{", "[" * 100_000, "\xff"):
        (copy / "config.json").write_text(text, encoding="latin-1")
        refused(copy, "config.json")


def test_header_mutations(tiny, tmp_path):
    """A few thousand broken headers: each is refused in a sentence, or what it says is a whole model of this config."""
    folder = shutil.copytree(tiny, tmp_path / "mutated")
    family = find_family(folder)
    net = build_on_meta(family)
    wanted = expected_tensors(family, net)
    whole = (tiny / SINGLE).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, body = whole[8 : 8 + length], whole[8 + length :]
    from model.load import check_tensors

    draw = random.Random(0)
    refusals = 0
    for _ in range(1200):
        changed = mutate(header, draw)
        size = len(changed) if draw.random() < 0.9 else draw.choice([0, 7, len(changed) + 9, 2**32, 2**63, 2**64 - 1])
        (folder / SINGLE).write_bytes(struct.pack("<Q", size) + changed + body)
        try:
            check_tensors(net, family, Shards(folder))
            names = {name: tuple(t.shape) for name, t in Shards(folder).stream()}
            assert {n: s for n, s in names.items() if n != "lm_head.weight"} == {n: tuple(s) for n, s in wanted.items()}
        except UserError as error:
            refusals += 1
            assert len(str(error).splitlines()) == 1
    assert refusals > 800  # the others changed a space, a metadata key, fp16 for bf16


def mutate(header: bytes, draw: random.Random) -> bytes:
    """The header with a few bytes changed, or one of its entries changed, dropped or doubled."""
    if draw.random() < 0.5:
        changed = bytearray(header)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(changed))
            action = draw.choice(["replace", "insert", "delete"])
            changed[place : place + (action != "insert")] = b"" if action == "delete" else bytes([draw.randrange(256)])
        return bytes(changed)
    entries = [[name, value] for name, value in json.loads(header).items()]
    entry = draw.choice([e for e in entries if e[0] != "__metadata__"])
    action = draw.choice(["drop", "double", "rename", "dtype", "shape", "offset", "swap", "odd"])
    if action == "drop":
        entries.remove(entry)
    elif action == "double":
        entries.append(list(entry))
    elif action == "rename":
        entry[0] = draw.choice(["", "../x", entry[0] + "\0", "model.norm.weight", "lm_head.weight"])
    elif action == "odd":
        entry[1] = draw.choice([None, [], 3, "x", {}, {"dtype": "F32"}])
    else:
        value = json.loads(json.dumps(entry[1]))
        start, end = value["data_offsets"]
        shapes = [[], [0], [-1], value["shape"][::-1], [2**40, 2**40], [2**63], ["a"], [1.5]]
        offsets = [[0, end], [start, end + 4], [end, start], [-4, end], [start], [2**63, 2**64]]
        changes = {
            "dtype": {"dtype": draw.choice(["F16", "I32", "U8", "F64", "BOOL", "nope", 3, None])},
            "shape": {"shape": draw.choice(shapes)},
            "offset": {"data_offsets": draw.choice(offsets)},
            "swap": {"data_offsets": list(draw.choice(entries)[1].get("data_offsets", [0, 0]))},
        }
        entry[1] = value | changes[action]
    return ("{" + ", ".join(f"{json.dumps(n)}: {json.dumps(v)}" for n, v in entries) + "}").encode()


# ---- the hub's cache, remote code -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_hub_id_loads_from_the_cache_without_network(tmp_path):
    """models--org--name/snapshots/<revision>, whose files are links into ../../blobs."""
    tiny = write_tiny("qwen2", tmp_path / "tiny").folder
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for number, path in enumerate(sorted(tiny.iterdir())):
        shutil.copyfile(path, repository / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    code = (
        "from model import load_model, load_tokenizer; m, f = load_model('org/tiny', dtype='float32');"
        "print(sum(p.double().sum().item() for p in m.net.parameters()));"
        "t = load_tokenizer('org/tiny', trust_remote_code=True); print(len(t));"
        "load_model('org/absent')"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")},
    )
    total, note, size = found.stdout.splitlines()
    assert float(total) == pytest.approx(sum(t.double().sum().item() for t in load_file(tiny / SINGLE).values()))
    assert "trust_remote_code has no effect" in note and int(size) == len(load_tokenizer(tiny))
    assert "UserError" in found.stderr and "hf download org/absent" in found.stderr


def test_neither_folder_nor_hub_id():
    for name in ("no_such_folder", "./org/name", "/nowhere/at/all", "a/b/c", str(ROOT / "README.md")):
        with pytest.raises(UserError, match="no such folder"):
            load_model(name)


def test_auto_map_is_ignored_with_a_note(copy, capsys):
    (copy / "evil.py").write_text("raise SystemExit('ran')\n")
    for file, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        content = read_json(copy / file) | {"auto_map": {key: "evil.Evil"}}
        (copy / file).write_text(json.dumps(content))
    load_model(copy, dtype="float32")
    load_tokenizer(copy)
    printed = capsys.readouterr().out
    for file in ("config.json", "tokenizer_config.json"):
        assert f"{file} asks for code" in printed


# ---- the commands ---------------------------------------------------------------------------------------------------


def run_command(*arguments):
    command = [sys.executable, "-m", "model", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_commands(tiny, tmp_path, capsys):
    from model.__main__ import main

    assert "save_initial" in run_command("--help").stdout
    main(["inspect", str(tiny)])
    printed = capsys.readouterr().out
    num_parameters = sum(t.numel() for t in load_file(tiny / SINGLE).values())
    for word in (find_family(tiny).name, f"{num_parameters:,}", "tied", "tokenizer.json", "q_proj", "F32", SINGLE):
        assert word in printed
    main(["save_initial", "--base_model", str(tiny), "--output_dir", str(tmp_path / "initial")])
    base, copy = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (tiny, tmp_path / "initial"))
    assert base == copy
    with pytest.raises(UserError, match="not an empty folder"):
        main(["save_initial", "--base_model", str(tiny), "--output_dir", str(tmp_path / "initial")])


@pytest.mark.parametrize("name", [family.name for family in families()])
def test_inspect_needs_no_tokenizer(name, tmp_path, capsys):
    from model.__main__ import main

    write_tiny(name, tmp_path / "model")
    for path in (tmp_path / "model").glob("tokenizer*"):
        path.unlink()
    main(["inspect", str(tmp_path / "model")])
    printed = capsys.readouterr().out
    assert f"{name} (" in printed and "none found" in printed
    assert ("pictures      taken" in printed) == (name not in ("qwen2", "qwen3"))


@pytest.mark.slow
def test_wrong_commands_end_in_one_sentence(tmp_path):
    for arguments in (["tiny", "gpt9", tmp_path / "x"], ["inspect", tmp_path / "none"]):
        found = run_command(*arguments)
        assert found.returncode == 2 and len(found.stderr.splitlines()) == 1, found.stderr
        assert found.stdout == "" and not (tmp_path / "x").exists()


@pytest.mark.parametrize("name, tokenizer", [("qwen2", "qwen2.5"), ("qwen2_5_vl", "qwen2.5-vl")])
def test_tiny_on_a_real_tokenizer(name, tokenizer, tmp_path):
    source = shared(f"tokenizers/{tokenizer}")
    family = write_tiny(name, tmp_path / "a", tokenizer=source, vocab_size=151936, seed=1)
    wanted = {"vocab_size": 151936, "eos_token_id": 151645, "bos_token_id": 151643}
    assert {key: family.config[key] for key in wanted} == wanted
    assert family.image_token_id in (None, 151655)
    for path in source.iterdir():
        assert path.name == "config.json" or (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()
    model, _ = load_model(tmp_path / "a")
    assert model.head_weight.shape == (151936, 64)
    with pytest.raises(UserError, match="151665"):
        write_tiny(name, tmp_path / "b", tokenizer=source, vocab_size=1000)
    assert not (tmp_path / "b").exists() and os.listdir(tmp_path) == ["a"]


def test_tiny_is_a_function_of_its_seed(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_tiny("qwen2", tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / SINGLE).read_bytes() for name in "abc")
    assert a == b != c
