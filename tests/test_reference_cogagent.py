"""CogAgent: every quantity of its reference folders, and what the numbers do not show.

The folders hold two runs of the original code on the same tiny weights: golden.* with the rotary layout of their
config.json, golden_original_rope.* with original_rope true. Tolerances are those of the notes: image features 5e-6,
logits 2e-4 (here 1e-4), loss 1e-5, gradient norms 1e-4 relative. Ids, labels and positions start from the conversation.
"""

import json
import shutil

import pytest
import torch
from conftest import shared
from PIL import Image
from safetensors.torch import load_file
from test_reference import FOLDERS, KINDS, check_norms, folders, grad_norms, load, mean_loss

from data.batches import pack_row
from data.errors import UserError
from data.explain import explain
from data.labels import NO_LOSS
from eval.generate import generate
from lora.adapter import Settings, attach, find_targets, lora_layers
from lora.files import load_adapter, save_adapter
from lora.merge import merge
from model import load_model, save_model
from model.checkpointing import checkpoint_blocks
from model.family import Options, find_family
from model.glm_tokenizer import FILE, read_ranks
from model.load import build_on_meta, expected_tensors, quantized_names
from model.quantize import dequantize
from model.shards import Shards
from model.tiny import write_tiny

pytestmark = pytest.mark.slow

OFFICIAL = Options(labels="official")
RUNS = ("golden", "golden_original_rope")


def golden_cases(*runs):
    """(folder, run, case) of every golden batch."""
    found = [
        pytest.param(p, run, name, id=f"{p.name}-{run}-{name}")
        for p in FOLDERS
        if KINDS[p] == "chatglm"
        for run in runs
        if (p / f"{run}.json").exists()
        for name in json.loads((p / f"{run}.json").read_text())["cases"]
    ]
    return found or [pytest.param(None, None, None, marks=pytest.mark.skip(reason="no reference of chatglm"))]


def golden(folder, run="golden"):
    return load_file(folder / f"{run}.safetensors"), json.loads((folder / f"{run}.json").read_text())


def open_run(folder, run, tmp_path):
    """(model, family) of a golden run; the second has another config."""
    if run != "golden":
        folder = shutil.copytree(folder, tmp_path / "copy")
        config = json.loads((folder / "config.json").read_text()) | {"original_rope": True}
        (folder / "config.json").chmod(0o644)
        (folder / "config.json").write_text(json.dumps(config))
    return load(folder)


def messages_of(folder, conversation, name):
    """A golden conversation in our form. In multi_turn the makers' builder moves the picture to the first message."""
    picture = next((m["image"] for m in conversation if m.get("image")), None)
    place = 0 if name == "multi_turn" else next((i for i, m in enumerate(conversation) if m.get("image")), None)
    messages = []
    for number, message in enumerate(conversation):
        items = [{"type": "image", "image": folder / picture}] if picture and number == place else []
        items.append({"type": "text", "text": message["content"]})
        messages.append({"role": message["role"], "content": items if len(items) > 1 else message["content"]})
    return messages


def examples_of(folder, facts, name, options=OFFICIAL):
    family = find_family(folder, options)
    return [family.encode(messages_of(folder, c, name)) for c in facts["cases"][name]["conversations"]]




@pytest.mark.parametrize("folder, run, name", golden_cases(*RUNS))
def test_case(folder, run, name, tmp_path):
    tensors, facts = golden(folder, run)
    model, family = open_run(folder, run, tmp_path)
    examples, fact = examples_of(folder, facts, name), facts["cases"][name]
    mask = tensors[f"{name}.attention_mask"].bool()
    for row, example in enumerate(examples):
        ids, spans = example.input_ids.tolist(), example.image_spans
        kept = torch.ones(len(ids), dtype=torch.bool)
        for start, end in spans:
            assert end - start == facts["n_image_tokens"]
            kept[start + 1 : end] = False
        assert torch.equal(example.input_ids[kept], tensors[f"{name}.input_ids"][row][mask[row]])
        assert torch.equal(example.labels[kept], tensors[f"{name}.labels"][row][mask[row]])
        assert torch.equal(example.positions, tensors[f"{name}.position_ids_expanded"][row][-len(example) :])
        assert torch.all(example.labels[~kept] == NO_LOSS)
        if spans:
            assert torch.equal(example.pixels["images"][0], tensors[f"{name}.images"][row])
    for as_original in (False, True):
        for row, logits in enumerate(model.logits(examples, as_original_batch=as_original)):
            expected = tensors[f"{name}.logits"][row][-len(logits) :]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert sum(e.num_supervised for e in examples) == fact["n_label_tokens"]
    loss = mean_loss(model, examples)
    assert loss.item() == pytest.approx(fact["loss"], abs=1e-5)
    loss.backward()
    check_norms(grad_norms(model, family), fact["grad_norm"])
    total = torch.stack([p.grad.norm() for p in model.net.parameters() if p.grad is not None]).norm().item()
    assert total == pytest.approx(fact["total_grad_norm"], rel=1e-4)
    prefix = f"{name}.grad."
    for key in (key for key in tensors if key.startswith(prefix)):
        ours = model.net.get_parameter(family.module_name(key.removeprefix(prefix))).grad
        assert (ours - tensors[key]).norm() <= 1e-4 * tensors[key].norm() + 1e-7, key


@pytest.mark.parametrize("folder, run, name", golden_cases("golden"))
def test_case_in_parts(folder, run, name):
    tensors, facts = golden(folder)
    model, family = load(folder)
    examples = examples_of(folder, facts, name)
    seen = {}

    def watch(module, key):
        module.register_forward_hook(lambda module, args, out: seen.__setitem__(key, [*seen.get(key, []), out]))

    net = model.net.transformer
    watch(net.vision.patch_embedding, "patch_embedding_out")
    watch(net.vision.transformer, "vision_tower_out")
    watch(net.vision.conv, "vision_conv_out")
    watch(net.vision.linear_proj, "glu_out")
    watch(net.vision, "image_embeds")
    for number, layer in enumerate(net.vision.transformer.layers):
        watch(layer, f"vision_layer_{number}_out")
    for number, layer in enumerate(net.encoder.layers):
        watch(layer, f"llm_layer_{number}_out")
    packed = pack_row(examples)
    with torch.no_grad():
        embeddings = family.embed(model.net, packed)
        model.hidden(packed)
    pictures = {key: torch.cat(found[: len(examples)]) for key, found in seen.items() if not key.startswith("llm")}
    assert bool(pictures) == any(e.image_spans for e in examples)
    for key, ours in pictures.items():
        if f"{name}.{key}" in tensors:
            torch.testing.assert_close(ours, tensors[f"{name}.{key}"], atol=5e-6, rtol=1e-5)
    for row, ours in enumerate(embeddings.split(packed.lengths)):
        torch.testing.assert_close(ours, tensors[f"{name}.inputs_embeds"][row][-len(ours) :], atol=5e-6, rtol=0)
    if f"{name}.llm_layer_0_out" in tensors:
        for number in range(len(net.encoder.layers)):
            torch.testing.assert_close(
                seen[f"llm_layer_{number}_out"][0], tensors[f"{name}.llm_layer_{number}_out"], atol=1e-4, rtol=0
            )
    for row, logits in enumerate(model.logits(examples)):
        labels = examples[row].labels[1:]
        found = torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="none")
        torch.testing.assert_close(found, tensors[f"{name}.token_nll"][row][-len(found) :], atol=1e-4, rtol=0)


@folders("chatglm")
def test_saved_as_it_was_read(folder, tmp_path):
    model, _ = load_model(folder, dtype="float32")
    save_model(model, tmp_path / "saved")
    before, after = dict(Shards(folder).stream()), dict(Shards(tmp_path / "saved").stream())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# ---- labels and the tokenizer -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The family with the real tokenizer and the real config, without weights."""
    folder = tmp_path_factory.mktemp("real")
    for path in shared("tokenizers/cogagent").iterdir():
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(folder / "config_real_reconstructed.json", folder / "config.json")
    return find_family(folder)


def test_real_tokenizer(real):
    facts = json.loads((real.folder / "golden_tokenizer.json").read_text())
    tokenizer = real.tokenizer
    for probe in facts["texts"]:
        assert tokenizer(probe["text"], add_special_tokens=False).input_ids == probe["ids"]
        assert tokenizer.decode(probe["ids"]) == probe["text"]
    words = {word.decode(): rank for word, rank in read_ranks(real.folder / FILE).items() if word.isalpha()}
    assert [e.ids for e in tokenizer.backend_tokenizer.encode_batch(list(words))] == [[rank] for rank in words.values()]
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in facts["special"]} == facts["special"]
    assert real.stop_ids == real.config["eos_token_id"] and real.image_token_id == 151329


def test_real_chats(real):
    official = find_family(real.folder, OFFICIAL)
    official.tokenizer, official.pieces = real.tokenizer, real.pieces  # reading takes seconds
    for chat in json.loads((real.folder / "golden_tokenizer.json").read_text())["chat"]:
        messages = []
        for message in chat["messages"]:
            picture = [{"type": "image", "image": Image.new("RGB", (50, 30))}] if "image" in message else []
            items = [*picture, {"type": "text", "text": message["content"]}]
            messages.append({key: value for key, value in message.items() if key != "image"} | {"content": items})
        if chat["kwargs"].get("add_generation_prompt"):
            example = real.encode_prompt(messages)
            assert torch.equal(example.input_ids, official.encode_prompt(messages).input_ids)
        else:
            example = real.encode(messages)
            assert example.input_ids[-1] == 151336
            example = real.example(example.input_ids[:-1], example.labels[:-1], example.pixels)
        kept = torch.ones(len(example), dtype=torch.bool)
        for start, end in example.image_spans:
            assert end - start == 1600
            kept[start + 1 : end] = False
        assert example.input_ids[kept].tolist() == chat["input_ids"]
        assert example.positions[kept].tolist() == chat["position_ids"]


TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "\nq1"}]},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": [{"type": "text", "text": "q2"}, {"type": "image", "image": Image.new("RGB", (9, 9))}]},
    {"role": "assistant", "content": "w", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
    {"role": "tool", "content": "r"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "a2", "train": False},
    {"role": "user", "content": "q3"},
    {"role": "assistant", "content": "a3"},
]


@folders("chatglm")
def test_which_tokens_are_trained(folder):
    family, official = find_family(folder), find_family(folder, OFFICIAL)
    places = family.count_positions(official.encode(TURNS).pixels)[0]
    text = (
        "[gMASK]<sop><|system|>\ns<|user|>\n\nq1<|assistant|>[[\na1<|user|>]]\n<|begin_of_image|><N picture positions>"
        '<|end_of_image|>q2<|assistant|>[[\nw<|assistant|>f\n{"x": 1}<|observation|>]]\nr<|assistant|>\na2<|user|>\nq3'
        "<|assistant|>[[\na3<|user|>]]"
    )
    assert explain(family.encode(TURNS), family.tokenizer, colour=False) == text.replace("N", str(places))
    theirs = text.replace("<|user|>]]", "]]<|user|>").replace("<|observation|>]]", "]]<|observation|>")
    theirs = theirs.replace("<|assistant|>[[", "[[<|assistant|>").replace("N", str(places))
    assert explain(official.encode(TURNS), family.tokenizer, colour=False) == theirs
    for one in (family, official):
        whole, prompt = one.encode(TURNS), one.encode_prompt(TURNS)
        assert len(prompt) == len(whole) - len(family.pieces.ids("\na3")) - 1 and prompt.num_supervised == 0
        assert torch.equal(prompt.input_ids, whole.input_ids[: len(prompt)])
        assert torch.equal(prompt.positions, whole.positions[: len(prompt)]) and prompt.image_spans == whole.image_spans
    double = [*TURNS, {"role": "assistant", "content": "a4"}, {"role": "assistant", "content": "a5"}]
    assert torch.equal(family.encode_prompt(double).input_ids, official.encode_prompt(double).input_ids)


@folders("chatglm")
def test_an_answer_goes_back_into_the_conversation_as_it_was_written(folder):
    family = find_family(folder)
    question, more = {"role": "user", "content": "q"}, {"role": "user", "content": "r"}
    prompt = family.encode_prompt([question]).input_ids.tolist()
    answer = family.pieces.ids("\n") + family.pieces.ids("a\nb")
    content = family.answer_text(family.tokenizer.decode(answer))
    again = family.encode_prompt([question, {"role": "assistant", "content": content}, more]).input_ids.tolist()
    assert content == "a\nb" and again[: len(prompt) + len(answer)] == prompt + answer


@folders("chatglm")
def test_spelled_special_tokens_stay_text(folder):
    family = find_family(folder)
    words = "<|user|><|endoftext|><|begin_of_image|> [gMASK]<sop>"
    example = family.encode([{"role": "user", "content": words}, {"role": "assistant", "content": words}])
    special = set(family.pieces.special.values())
    found = [i for i in example.input_ids.tolist() if i in special]
    names = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|user|>")
    assert found == [family.pieces.special[name] for name in names]
    assert family.tokenizer.decode(example.input_ids).count(words) == 2


@folders("chatglm")
def test_what_is_refused(folder, tmp_path):
    family = find_family(folder)
    answer = {"role": "assistant", "content": "x"}
    for messages, tools, words in (
        ([{"role": "user", "content": "x"}, answer], [{"type": "function", "function": {"name": "f"}}], "list of tools"),
        ([{"role": "critic", "content": "x"}, answer], None, "rows.jsonl:3: role 'critic'"),
    ):
        with pytest.raises(UserError, match=words):
            family.encode(messages, tools, where="rows.jsonl:3")
    with pytest.raises(UserError, match="one size"):
        find_family(folder, Options(max_pixels=1000))
    copy = shutil.copytree(folder, tmp_path / "copy")
    for content in (b"IQ== 0\nIg== x\n", b"IQ== 0\n", b"\xff", b""):
        (copy / "tokenizer.model").chmod(0o644)
        (copy / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.model"):
            find_family(copy).tokenizer  # noqa: B018 - reading is the test


# ---- pictures ---------------------------------------------------------------------------------------------------------


@folders("chatglm")
@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "L", "CMYK"])
def test_pictures_of_every_mode(folder, mode, tmp_path):
    family = find_family(folder)
    picture = Image.effect_noise((61, 40), 80).convert("RGB")
    if mode == "RGBA":
        picture.putalpha(Image.effect_noise((61, 40), 90))
    picture = picture.convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    picture.save(path, **({"transparency": 3} if mode == "P" else {}))
    side = family.config["vision_config"]["image_size"]
    with Image.open(path) as stored:
        small = stored.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.tensor(list(small.getdata())).reshape(side, side, 3).permute(2, 0, 1).float() / 255
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    expected = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    found, count = family.picture(path)
    assert torch.equal(found["images"][0], expected) and count == family.picture_positions(61, 40)
    with Image.open(path) as stored:
        assert torch.equal(family.picture(stored)[0]["images"], found["images"])


@folders("chatglm")
def test_a_sliver(folder):
    family = find_family(folder)
    found, count = family.picture(Image.new("RGB", (1, 5000)))
    assert family.picture_positions(1, 5000) == count == family.count_positions(found)[0]
    content = [{"type": "image", "image": Image.new("RGB", (1, 5000))}] * 2
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
    text, pictures = family.count(messages, None, [(1, 5000)] * 2)
    assert pictures == 2 * count and text + pictures == len(family.encode(messages))


# ---- rows together ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["halves", "neighbours"])
def tiny(request, tmp_path_factory):
    """A tiny model with larger random weights: at the usual size its answers repeat themselves."""
    folder = tmp_path_factory.mktemp("tiny") / "cogagent"
    write_tiny("cogagent", folder)
    config = json.loads((folder / "config.json").read_text()) | {"original_rope": request.param, "rope_ratio": 50}
    (folder / "config.json").write_text(json.dumps(config))
    model, family = load_model(folder, dtype="float32")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.net.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.6 if "oi" in name else 0.15))
    save_model(model, folder.with_name("large"))
    return folder.with_name("large")


def rows_of(family, prompts=False):
    """Rows with no picture, one, two, and one in a later turn."""
    rows = []
    for number, (words, count) in enumerate((("hello there", 0), ("what is this?", 1), ("and these?", 2), ("x", 0))):
        pictures = [Image.effect_noise((40 + 9 * i, 50 - 7 * i), 60 + number).convert("RGB") for i in range(count)]
        content = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": words * 2}]
        rows.append([{"role": "user", "content": content}, {"role": "assistant", "content": f"answer {number}"}])
    rows.append([*rows[0], *rows[1]])
    return [family.encode_prompt(row) if prompts else family.encode(row) for row in rows]


def test_rows_do_not_see_each_other(tiny):
    model, family = load_model(tiny, dtype="float32")
    examples = rows_of(family)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [1, 1, 2]):
        together = model.logits([examples[i] for i in order])
        for place, number in enumerate(order):
            alone = model.logits([examples[number]])[0]
            assert (together[place] - alone).abs().max() <= max(1e-5, 2e-6 * alone.abs().max())


def test_generation_is_the_argmax_of_the_training_path(tiny):
    model, family = load_model(tiny, dtype="float32")
    prompts = rows_of(family, prompts=True)
    together = generate(model, prompts, 20, stop_ids=[])
    alone = generate(model, prompts, 20, stop_ids=[], batch_tokens=1)
    assert [a.ids for a in together] == [a.ids for a in alone]
    assert len({tuple(a.ids) for a in together}) == len(prompts)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = prompt.input_ids.tolist() + answer.ids
        logits = model.logits([family.example(ids, [NO_LOSS] * len(ids), prompt.pixels)])[0][len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer.ids


def test_rope_ratio_is_that_of_transformers_glm(tiny):
    """transformers' Glm has the neighbours' layout; it knows no pictures."""
    from transformers import GlmConfig, GlmForCausalLM

    model, family = load_model(tiny, dtype="float32")
    config = family.config
    if not config["original_rope"]:
        pytest.skip("transformers' Glm rotates neighbours")
    theirs = GlmForCausalLM(GlmConfig(
        vocab_size=model.head_weight.shape[0], hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, attention_bias=True, rms_norm_eps=1.5625e-07,
        pad_token_id=0, eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0 * 50, "partial_rotary_factor": 0.5},
    )).eval()  # fmt: skip
    names = {
        "model.embed_tokens": "embedding.word_embeddings", "model.norm": "encoder.final_layernorm",
        "lm_head": "output_layer", "model.layers": "encoder.layers", "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h", "self_attn.o_proj": "self_attention.dense",
    }
    ours, state = model.net.transformer.state_dict(), {}
    for name in theirs.state_dict():
        old = name
        for new, original in names.items():
            old = old.replace(new, original)
        if "self_attn" in old:
            block, _, leaf = old.partition(".self_attn.")
            fused = ours[f"{block}.self_attention.query_key_value.{leaf.rpartition('.')[2]}"]
            state[name] = fused.split([64, 32, 32])["qkv".index(leaf[0])]
        else:
            state[name] = ours[old]
    theirs.load_state_dict(state)
    example = rows_of(family)[0]
    with torch.no_grad():
        expected = theirs(input_ids=example.input_ids[None]).logits[0]
    torch.testing.assert_close(model.logits([example])[0], expected, atol=1e-5, rtol=1e-5)


# ---- training, adapters, quantisation -----------------------------------------------------------------------------------


def gradients(model, examples):
    model.zero_grad()
    mean_loss(model, examples).backward()
    return {name: p.grad.clone() for name, p in model.net.named_parameters() if p.grad is not None}


def test_checkpointing_changes_nothing(tiny):
    model, family = load(tiny)
    examples = rows_of(family)
    plain = gradients(model, examples)
    assert len(plain) == len(list(model.net.parameters()))
    checkpoint_blocks([block for name in family.blocks for block in model.net.get_submodule(name)])
    again = gradients(model, examples)
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("quant", [None, "8bit", "4bit"])
def test_adapter_names_the_original_modules(tiny, tmp_path, quant):
    model, family = load_model(tiny, quant=quant, dtype="float32" if quant is None else "bfloat16")
    settings = Settings(r=4, alpha=8, targets=["query_key_value"], parts=["language", "vision"])
    attach(model, family, settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in lora_layers(model.net).values():
            weight = layer.lora_B["default"].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    examples = rows_of(family)
    found = gradients(model.train(), examples)
    names = {f"transformer.encoder.layers.{i}.self_attention.query_key_value" for i in range(2)}
    names |= {f"transformer.vision.transformer.layers.{i}.attention.query_key_value" for i in range(2)}
    assert {name.partition(".lora_")[0] for name in found} == names and all(g.abs().max() > 0 for g in found.values())
    save_adapter(model, family, tmp_path / "adapter", settings, tiny)
    other, _ = load_model(tiny, quant=quant, dtype="float32" if quant is None else "bfloat16")
    load_adapter(other, family, tmp_path / "adapter")
    before = model.eval().logits(examples)
    assert all(torch.equal(a, b) for a, b in zip(before, other.logits(examples), strict=True))
    merge(tiny, tmp_path / "adapter", tmp_path / "merged")
    base, merged = dict(Shards(tiny).stream()), dict(Shards(tmp_path / "merged").stream())
    assert base.keys() == merged.keys()
    assert {n for n in base if not torch.equal(base[n], merged[n])} == {f"{name}.weight" for name in names}
    if quant is None:
        after = load_model(tmp_path / "merged", dtype="float32")[0].logits(examples)
        for a, b in zip(before, after, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("quant", ["8bit", "4bit"])
def test_quantised_model_computes_with_its_weights(tiny, quant):
    """The whole model with the dequantised weights is the oracle."""
    whole, family = load_model(tiny, dtype="float32")
    model, _ = load_model(tiny, quant=quant, dtype="float32")
    names = quantized_names(family, whole.net)
    assert len(names) == 2 * 4 + 2 * 4 + 4 and sum("vision" in name for name in names) == 12
    with torch.no_grad():
        for name in names:
            weight = whole.net.get_submodule(name).weight
            close = dequantize(model.net.get_submodule(name))
            assert 0 < (weight - close).norm() / weight.norm() < 0.12, name
            weight.copy_(close)
    examples = rows_of(family)
    for a, b in zip(whole.logits(examples), model.logits(examples), strict=True):
        assert (a - b).norm() / a.norm() < 1e-5
    ids = [answer.ids for answer in generate(model, rows_of(family, prompts=True), 3, stop_ids=[])]
    assert [len(chosen) for chosen in ids] == [3] * len(examples)


def test_prefix_tuning(tiny):
    model, family = load(tiny)
    attach(model, family, Settings(peft_type="PREFIX_TUNING", num_virtual_tokens=3))
    examples = rows_of(family)
    mean_loss(model, examples).backward()
    assert model.prefix.prompt_embeddings.grad.abs().max() > 0
    prompts = rows_of(family, prompts=True)
    for prompt, answer in zip(prompts, generate(model, prompts, 4, stop_ids=[]), strict=True):
        ids = prompt.input_ids.tolist() + answer.ids
        logits = model.logits([family.example(ids, [NO_LOSS] * len(ids), prompt.pixels)])[0][len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer.ids


# ---- the real size ------------------------------------------------------------------------------------------------------


def test_real_size_on_meta(real):
    net = build_on_meta(real)
    tensors = expected_tensors(real, net)
    assert sum(p.numel() for p in net.parameters()) == 13_906_320_896
    assert len(tensors) == 1054 and tensors["transformer.rotary_pos_emb.inv_freq"] == (32,)
    sizes = {part: 0 for part in ("language", "projector", "vision")}
    for name, parameter in net.named_parameters():
        sizes[real.part_of(name)] += parameter.numel()
    assert sizes["language"] == 9_399_951_360 and sizes["projector"] == 185_081_856
    assert sizes["vision"] == 4_291_915_264 + 29_364_224 + 8_192
    block, vision = "transformer.encoder.layers.39.", "transformer.vision."
    tower = vision + "transformer.layers.62."
    table = {
        "transformer.embedding.word_embeddings.weight": (151552, 4096), "transformer.output_layer.weight": (151552, 4096),
        block + "input_layernorm.weight": (4096,), block + "self_attention.query_key_value.weight": (4608, 4096),
        block + "self_attention.query_key_value.bias": (4608,), block + "self_attention.dense.weight": (4096, 4096),
        block + "post_attention_layernorm.weight": (4096,), block + "mlp.dense_h_to_4h.weight": (27392, 4096),
        block + "mlp.dense_4h_to_h.weight": (4096, 13696), "transformer.encoder.final_layernorm.weight": (4096,),
        vision + "patch_embedding.proj.weight": (1792, 3, 14, 14), vision + "patch_embedding.proj.bias": (1792,),
        vision + "patch_embedding.cls_embedding": (1, 1792),
        vision + "patch_embedding.position_embedding.weight": (6401, 1792),
        tower + "attention.query_key_value.weight": (5376, 1792), tower + "attention.query_key_value.bias": (5376,),
        tower + "attention.dense.weight": (1792, 1792), tower + "attention.dense.bias": (1792,),
        tower + "input_layernorm.weight": (1792,), tower + "input_layernorm.bias": (1792,),
        tower + "mlp.fc1.weight": (15360, 1792), tower + "mlp.fc1.bias": (15360,),
        tower + "mlp.fc2.weight": (1792, 15360), tower + "mlp.fc2.bias": (1792,),
        tower + "post_attention_layernorm.weight": (1792,), tower + "post_attention_layernorm.bias": (1792,),
        vision + "conv.weight": (4096, 1792, 2, 2), vision + "conv.bias": (4096,),
        vision + "linear_proj.linear_proj.weight": (4096, 4096), vision + "linear_proj.norm1.weight": (4096,),
        vision + "linear_proj.norm1.bias": (4096,), vision + "linear_proj.gate_proj.weight": (13696, 4096),
        vision + "linear_proj.dense_h_to_4h.weight": (13696, 4096),
        vision + "linear_proj.dense_4h_to_h.weight": (4096, 13696),
        vision + "boi": (1, 1, 4096), vision + "eoi": (1, 1, 4096),
    }  # fmt: skip
    for name, shape in table.items():
        assert tensors[name] == shape, name
    assert all(real.tensor_name(real.module_name(name)) == name for name in tensors)
    targets = find_targets(net, real, ["query_key_value"], ["language", "vision"])
    assert len(targets) == 103  # the makers' LoRA: 40 layers and 63 blocks
    linears = [net.get_submodule(name) for name in targets]
    assert sum(8 * (x.in_features + x.out_features) for x in linears) == 6_397_952
    assert len(quantized_names(real, net)) == 40 * 4 + 63 * 4 + 4
    assert real.picture_positions(1920, 1080) == 1600 and real.seen_size(1920, 1080) == (1120, 1120)
