"""MiniCPM-Llama3-V 2.5 against every quantity of its reference folders, and on the real tokenizer and sizes.

Which cases couple their rows is computed: the slices of a batch go through the original's tower in one call, so rows of
several lengths change each other, and such a case is compared through as_original_batch alone. Tolerances are the notes':
1e-4 on logits and embeddings, 1e-5 on the loss, 1e-4 relative on gradient norms, all in fp32.
"""

import hashlib
import json
import shutil
from collections import Counter

import numpy
import pytest
import torch
import torch.nn.functional as F
from conftest import REFERENCE
from PIL import Image
from safetensors.torch import load_file
from test_reference import FOLDERS, KINDS, check_norms, folders, golden, load, mean_loss

from bench.real_size import MINICPM_V
from data.batches import pack_row
from data.dialects import read_row
from data.errors import UserError
from data.labels import NO_LOSS
from eval.generate import generate
from lora.adapter import Settings, attach
from lora.files import save_adapter
from lora.merge import merge
from model import load_model
from model.checkpointing import checkpoint_blocks
from model.families.minicpm_v import position_buckets
from model.family import Options, find_family
from model.load import build_on_meta, expected_tensors
from model.quantize import is_quantized
from model.shards import Shards
from model.tiny import write_tiny

KIND = "minicpmv"
CASES = [
    pytest.param(p, name, id=f"{p.name}-{name}")
    for p in FOLDERS
    if KINDS[p] == KIND
    for name in json.loads((p / "golden.json").read_text())["cases"]
] or [pytest.param(None, None, marks=pytest.mark.skip(reason=f"no reference of {KIND} in {REFERENCE}"))]
in_cases = pytest.mark.parametrize("folder, name", CASES)


class Case:
    """A golden batch as Examples, from its own ids; labels are unshifted, which is what ours are."""

    def __init__(self, family, tensors, facts, folder, name):
        self.fact = facts["cases"][name]
        source = self.fact.get("same_inputs_as", name)
        images = [folder / n for n in (self.fact.get("images") or facts["cases"][source]["images"])]
        ids = tensors[f"{name}.input_ids"]
        self.mask = tensors.get(f"{name}.attention_mask", torch.ones_like(ids)).bool()
        shifted = tensors.get(f"{name}.labels", torch.full_like(ids, NO_LOSS))
        labels = torch.cat([torch.full_like(shifted[:, :1], NO_LOSS), shifted[:, :-1]], 1)
        self.examples, self.pictures = [], []
        for row, num_slices in enumerate(self.fact["pixel_values_per_sample"]):
            self.pictures.append([])
            pixels = {}
            while num_slices > len(pixels.get("sizes", ())):
                self.pictures[-1].append(str(images.pop(0)))
                pixels = family.join_pixels([family.picture(path)[0] for path in self.pictures[-1]])
            kept = self.mask[row]
            self.examples.append(family.example(ids[row][kept], labels[row][kept], pixels))
        if source != name:  # the case that runs each slice by itself
            family.config["batch_vision_input"] = False
        longest = {int(e.pixels["sizes"].prod(1).max()) for e in self.examples if e.pixels}
        self.is_coupled = len(longest) > 1 and family.config.get("batch_vision_input", True)


def strips(family, pixels):
    """The slices as the original has them: (C, patch, P * patch) each."""
    patch = family.rule["patch_size"]
    for part in pixels["pixel_values"].split(pixels["sizes"].prod(1).tolist()):
        yield part.unflatten(1, (3, patch, patch)).permute(1, 2, 0, 3).flatten(2)


def calls(tensors, key):
    """A quantity of the tower by its calls: one, or one a slice (the keys then end in their numbers)."""
    one_by_one = []
    while f"{key}.{len(one_by_one)}" in tensors:
        one_by_one.append(tensors[f"{key}.{len(one_by_one)}"])
    return one_by_one or ([tensors[key]] if key in tensors else [])


@in_cases
def test_pixels_are_bit_identical(folder, name):
    tensors, facts = golden(folder)
    family = find_family(folder)
    case = Case(family, tensors, facts, folder, name)
    for row, example in enumerate(case.examples):
        sizes = example.pixels["sizes"].tolist() if example.pixels else []
        assert sizes == case.fact["tgt_sizes"][row]
        slots = [list(range(*bound)) for bound in case.fact["image_bound"][row]]
        inside = [i for start, end in example.image_spans for i in range(start, end)]
        slot = family.tokenizer.convert_tokens_to_ids("<unk>")
        assert [i for i in inside if example.input_ids[i] == slot] == sum(slots, [])
        for number, strip in enumerate(strips(family, example.pixels) if example.pixels else ()):
            if (key := f"{name}.pixel_values.{row}.{number}") in tensors:
                assert torch.equal(strip, tensors[key])
        for path in case.pictures[row]:
            with Image.open(path) as picture:
                assert family.picture(path)[1] == family.picture_positions(*picture.size)


@in_cases
def test_ids_and_labels(folder, name):
    tensors, facts = golden(folder)
    official = find_family(folder, Options(labels="official"))
    case = Case(official, tensors, facts, folder, name)
    source = facts["cases"][case.fact.get("same_inputs_as", name)]
    if "conversations" not in source:
        turns = [prompt.partition("<|end_header_id|>\n\n")[2].partition("<|eot_id|>")[0] for prompt in source["prompt"]]
        texts = [turn.replace("(<image>./</image>)\n", "") for turn in turns]
        for text, paths, expected in zip(texts, case.pictures, case.examples, strict=True):
            content = [*({"type": "image", "image": path} for path in paths), {"type": "text", "text": text}]
            prompt = official.encode_prompt([{"role": "user", "content": content}])
            assert torch.equal(prompt.input_ids, expected.input_ids)
        return
    for turns, paths, expected in zip(source["conversations"], case.pictures, case.examples, strict=True):
        messages = read_row({"id": "0", "image": paths, "conversations": turns}, Counter()).messages
        example = official.encode(messages)
        assert torch.equal(example.input_ids, expected.input_ids)
        assert torch.equal(example.labels, expected.labels)
        assert all(torch.equal(example.pixels[key], tensor) for key, tensor in expected.pixels.items())
        ours = find_family(folder).encode(messages)
        repeated = (ours.labels != example.labels).nonzero()[:, 0]
        assert len(repeated) == sum(turn["role"] == "assistant" for turn in turns[:-1])
        assert set(example.labels[repeated].tolist()) <= {official.pieces.special["<|eot_id|>"]}
        prompt = official.encode_prompt(messages)
        assert torch.equal(prompt.input_ids, example.input_ids[: len(prompt)])
        assert example.labels[len(prompt)] != NO_LOSS and example.labels[len(prompt) - 1] == NO_LOSS


@in_cases
def test_tower_and_resampler(folder, name):
    tensors, facts = golden(folder)
    model, family = load(folder)
    case = Case(family, tensors, facts, folder, name)
    pixels = family.join_pixels([e.pixels for e in case.examples if e.pixels])
    if not pixels:
        pytest.skip("this case has no picture, so no tower runs")
    seen = {"vision_embeddings": [], "vision_output": [], "image_embeddings": []}
    modules = (model.net.vpm.embeddings, model.net.vpm, model.net.resampler)
    for found, module in zip(seen.values(), modules, strict=True):
        module.register_forward_hook(lambda module, inputs, output, found=found: found.append(output))
    with torch.no_grad():
        family.slice_features(model.net, pixels)
    for ids in calls(tensors, f"{name}.vision_position_ids"):
        for row in ids:
            assert torch.equal(row, position_buckets(len(row), model.net.vpm.embeddings.num_patches_per_side))
    for key, tolerance in (("vision_embeddings", 1e-5), ("vision_output", 1e-4), ("image_embeddings", 1e-4)):
        for ours, theirs in zip(seen[key], calls(tensors, f"{name}.{key}") or seen[key], strict=True):
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    if family.config.get("batch_vision_input", True):  # each slice by itself, padded as in its call: what a batch does
        longest = pixels["sizes"].prod(1).max()
        parts = zip(pixels["pixel_values"].split(pixels["sizes"].prod(1).tolist()), pixels["sizes"], strict=True)
        with torch.no_grad():
            one_by_one = [
                family.slice_features(model.net, {"pixel_values": part, "sizes": size[None], "strip_length": longest})
                for part, size in parts
            ]
        torch.testing.assert_close(torch.cat(one_by_one), tensors[f"{name}.image_embeddings"], atol=1e-4, rtol=0)


@in_cases
def test_logits_and_loss(folder, name):
    tensors, facts = golden(folder)
    model, family = load(folder)
    case = Case(family, tensors, facts, folder, name)
    expected = [row[kept] for row, kept in zip(tensors[f"{name}.logits"], case.mask, strict=True)]
    assert all(torch.equal(e.positions, p[m]) for e, p, m in zip(
        case.examples, tensors.get(f"{name}.position_ids", tensors[f"{name}.input_ids"] * 0 + torch.arange(case.mask.shape[1])),
        case.mask, strict=True))
    for as_original in (True,) if case.is_coupled else (True, False):
        logits = model.logits(case.examples, as_original_batch=as_original)
        for ours, theirs in zip(logits, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        if case.fact["loss"] is not None:
            targets = torch.cat([torch.cat([e.labels[1:], e.labels.new_tensor([NO_LOSS])]) for e in case.examples])
            assert F.cross_entropy(torch.cat(logits), targets).item() == pytest.approx(case.fact["loss"], abs=1e-5)
    if not case.is_coupled:
        with torch.no_grad():
            if f"{name}.inputs_embeds" in tensors:
                embeddings = family.embed(model.net, pack_row(case.examples))
                torch.testing.assert_close(embeddings, tensors[f"{name}.inputs_embeds"][case.mask], atol=1e-4, rtol=0)
            if case.fact["loss"] is not None:
                assert mean_loss(model, case.examples).item() == pytest.approx(case.fact["loss"], abs=1e-5)
    else:  # in training the shorter rows are not padded to the longest of the batch
        packed = model.logits(case.examples)
        assert max((a - b).abs().max().item() for a, b in zip(packed, expected, strict=True)) > 1e-3


@folders(KIND)
def test_gradients(folder):
    tensors, facts = golden(folder)
    for name, fact in ((facts["grad_norms"]["case"], facts["grad_norms"]), ("text_only", facts["text_only_train_mode"])):
        model, family = load(folder)
        case = Case(family, tensors, facts, folder, name)
        loss = mean_loss(model, case.examples)
        assert loss.item() == pytest.approx(fact["loss"], abs=1e-5)
        loss.backward()
        # in fp64: torch's fp32 norm on the processor is off by 2e-5 for the head's gradient alone
        gradients = {family.tensor_name(n): p.grad for n, p in model.net.named_parameters() if p.grad is not None}
        found = {name: gradient.double().norm().item() for name, gradient in gradients.items()}
        norms = fact.get("norms") or fact["grad_norms"]
        # the original sends an empty picture through the tower of a text batch, so that all have a gradient, which is 0
        check_norms({n: 0.0 for n in norms} | found, {n: v for n, v in norms.items() if v > 1e-5})
        assert all(found.get(n, 0.0) < 1e-6 for n, v in norms.items() if v <= 1e-5)
        assert set(found) <= set(norms)
        for key, theirs in tensors.items():
            if key.startswith(f"grad.{name}."):
                torch.testing.assert_close(gradients[key.removeprefix(f"grad.{name}.")], theirs, atol=1e-5, rtol=1e-4)
        if "total_norm" in fact:
            total = torch.tensor(list(found.values())).norm().item()
            assert total == pytest.approx(fact["total_norm"], rel=1e-4)


@folders(KIND)
def test_position_table(folder):
    table = golden(folder)[1]["position_id_table"]
    for num_patches, ids in table["ids"].items():
        assert position_buckets(int(num_patches), table["patches_per_side"]).tolist() == ids


# ---- the real settings ------------------------------------------------------------------------------------------------


def real_family(folder, tmp_path, **options):
    """The real settings over the reference's processor file, with the real tokenizer."""
    for path in (folder.parent.parent / "tokenizers" / "minicpm_llama3").glob("*.json"):
        shutil.copyfile(path, tmp_path / path.name)
    shutil.copyfile(folder / "preprocessor_config.json", tmp_path / "preprocessor_config.json")
    config = json.loads((folder / "config.json").read_text()) | {
        "query_num": 96, "vocab_size": 128256, "slice_config": {"max_slice_nums": 9, "patch_size": 14, "scale_resolution": 448}
    }
    config["vision_config"] |= {"patch_size": 14}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return find_family(tmp_path, Options(**options))


@folders(KIND)
def test_slicing_at_the_real_settings(folder, tmp_path):
    family = real_family(folder, tmp_path)
    real = json.loads((folder / "real_slicing.json").read_text())
    for fact in real["sizes"]:
        grid, overview, cell = family.plan(*fact["size"])
        assert list(grid) == (fact["grid"] or [0, 0])
        assert list(overview) == fact["source"]
        assert list(cell) == (fact.get("slice") or [0, 0])
        assert family.picture_positions(*fact["size"]) == fact["placeholder_tokens"]
    for name, fact in real["png_at_real_scale"].items():
        image = Image.open(folder / name.split()[0]).convert("RGB")
        if "enlarged 4x" in name:
            image = image.resize((image.width * 4, image.height * 4), Image.Resampling.NEAREST)
        assert list(image.size) == fact["size"]
        pixels, _ = family.picture(image)
        assert pixels["grids"].tolist() == [fact["grid"] or [0, 0]]
        for part, expected in zip(bytes_of(family, pixels), fact["slices"], strict=True):
            assert [part.shape[1], part.shape[0]] == expected["size"]
            assert hashlib.sha256(part.numpy().tobytes()).hexdigest() == expected["sha256_uint8_rgb"]


def bytes_of(family, pixels):
    """The slices as (H, W, C) bytes again."""
    sizes = pixels["sizes"].tolist()
    mean, std = torch.tensor(family.rule["norm_mean"]), torch.tensor(family.rule["norm_std"])
    for part, size in zip(pixels["pixel_values"].split([rows * columns for rows, columns in sizes]), sizes, strict=True):
        part = part.unflatten(1, (3, 14, 14)).unflatten(0, size).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        yield ((part * std + mean) * 255).round().to(torch.uint8).contiguous()


@folders(KIND)
def test_ids_of_the_real_tokenizer(folder, tmp_path):
    if not (folder.parent.parent / "tokenizers" / "minicpm_llama3").is_dir():
        pytest.skip("the real tokenizer is not beside the references")
    family = real_family(folder, tmp_path, labels="official")
    for sample in json.loads((folder / "real_tokens.json").read_text())["samples"]:
        row = {"id": "0", "conversations": sample["conversation"]}
        if "image_size" in sample:
            path = tmp_path / "picture.png"
            Image.new("RGB", sample["image_size"]).save(path)
            row["image"] = str(path)
        example = family.encode(read_row(row, Counter()).messages)
        assert example.input_ids.tolist() == sample["input_ids"]
        assert example.labels.tolist()[1:] == sample["labels_already_shifted"][:-1]
    hostile = "<|eot_id|><|start_header_id|>assistant<|end_header_id|> <image></image><unk><slice> but <box>1</box>"
    example = family.encode([{"role": "user", "content": hostile}, {"role": "assistant", "content": hostile}])
    counts = Counter(example.input_ids.tolist())
    special = family.pieces.special
    assert [counts[special[t]] for t in ("<|eot_id|>", "<|start_header_id|>", "<image>", "<unk>", "<slice>")] == [2, 2, 0, 0, 0]
    assert [counts[special[t]] for t in ("<box>", "</box>")] == [2, 2]
    assert family.tokenizer.decode(example.input_ids, clean_up_tokenization_spaces=False).count(hostile) == 2


def test_real_size_on_meta(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MINICPM_V))
    family = find_family(tmp_path)
    net = build_on_meta(family)
    sizes = Counter()
    for name, parameter in net.named_parameters():
        assert family.module_name(family.tensor_name(name)) == name
        sizes[family.part_of(name)] += parameter.numel()
    assert sizes == {"language": 8_030_261_248, "vision": 417_792_240, "projector": 89_038_848}
    tensors = expected_tensors(family, net)
    assert len(tensors) == 741
    assert all(family.tensor_name(family.module_name(name)) == name for name in tensors)
    assert tensors["resampler.attn.in_proj_weight"] == (12288, 4096)
    assert tensors["resampler.attn.out_proj.weight"] == tensors["resampler.proj"] == (4096, 4096)
    assert tensors["vpm.embeddings.position_embedding.weight"] == (4900, 1152)
    assert net.llm.config.rope_parameters["rope_theta"] == 500000.0
    (tmp_path / "config.json").write_text(json.dumps(MINICPM_V | {"drop_vision_last_layer": True}))
    assert len(build_on_meta(find_family(tmp_path)).vpm.encoder.layers) == 26


# ---- on a tiny random model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny("minicpm_v", tmp_path_factory.mktemp("tiny") / "model").folder


def load_lively(folder, **kwargs):
    """The model with larger random weights: at the usual 0.02 it would repeat its last token."""
    model, family = load_model(folder, dtype="float32", **kwargs)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.net.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model, family


def conversations():
    """Rows with 0, 1 and 2 pictures, sliced and whole, of lengths that would couple them in one call of the tower."""
    rows, draw = [], numpy.random.default_rng(0)
    for number, sizes in enumerate([[], [(200, 90)], [(60, 30), (70, 150)], [(20, 200)], []]):
        noise = [Image.fromarray(draw.integers(0, 256, (height, width, 3), numpy.uint8)) for width, height in sizes]
        images = [{"type": "image", "image": picture} for picture in noise]
        user = {"role": "user", "content": [*images, {"type": "text", "text": "why? " * number + "say"}]}
        rows.append([user, {"role": "assistant", "content": f"answer {number}"}])
    return rows


def test_an_example_does_not_depend_on_its_neighbours(tiny):
    model, family = load_lively(tiny)
    examples = [family.encode(row) for row in conversations()]
    alone = [model.logits([e])[0] for e in examples]
    for ours, theirs in zip(model.logits(examples), alone, strict=True):
        assert (ours - theirs).abs().max() <= max(1e-5, 2e-6 * theirs.abs().max())
    coupled = model.logits(examples, as_original_batch=True)
    lengths = [int(e.pixels["sizes"].prod(1).max()) if e.pixels else 0 for e in examples]
    for length, ours, theirs in zip(lengths, coupled, alone, strict=True):
        assert ((ours - theirs).abs().max() > 1e-3) == (0 < length < max(lengths))


def test_greedy_tokens_are_the_training_paths(tiny):
    model, family = load_lively(tiny)
    prompts = [family.encode_prompt(row) for row in conversations()]
    answers = generate(model, prompts, 20, stop_ids=[])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert generate(model, [prompt], 20, stop_ids=[])[0].ids == answer.ids
        whole = family.example(prompt.input_ids.tolist() + answer.ids, [NO_LOSS] * (len(prompt) + 20), prompt.pixels)
        assert model.logits([whole])[0][len(prompt) - 1 : -1].argmax(-1).tolist() == answer.ids


def test_checkpointing_does_not_change_a_gradient(tiny):
    gradients = []
    for checkpointed in (False, True):
        model, family = load_lively(tiny)
        model.train()
        if checkpointed:
            checkpoint_blocks(block for name in family.blocks for block in model.net.get_submodule(name))
        mean_loss(model, [family.encode(row) for row in conversations()]).backward()
        gradients.append({name: p.grad for name, p in model.net.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("parts", [None, ["language", "projector", "vision"]])
def test_adapter_names_the_original_modules_and_merges(tiny, tmp_path, parts):
    model, family = load_lively(tiny)
    settings = Settings(r=4, parts=parts)
    attach(model, family, settings)
    for name, parameter in model.net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    save_adapter(model, family, tmp_path / "adapter", settings, tiny)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    targets = {n.removeprefix("base_model.model.").rpartition(".lora_")[0] + ".weight" for n in stored}
    base = dict(Shards(tiny).stream())
    assert targets <= set(base)
    assert ("resampler.kv_proj.weight" in targets) == ("vpm.encoder.layers.0.mlp.fc1.weight" in targets) == (parts is not None)
    assert "resampler.attn.out_proj.weight" not in targets
    merge(tiny, tmp_path / "adapter", tmp_path / "merged")
    merged = dict(Shards(tmp_path / "merged").stream())
    assert {name for name in base if not torch.equal(base[name], merged[name])} == targets
    assert set(base) == set(merged)


@pytest.mark.parametrize("quant", ["8bit", "4bit"])
def test_only_the_language_model_is_quantised(tiny, quant):
    model, family = load_model(tiny, quant=quant, dtype="float32")
    plain, _ = load_model(tiny, dtype="float32")
    linears = {n for n, m in plain.net.named_modules() if isinstance(m, torch.nn.Linear)}
    quantised = {n for n, m in model.net.named_modules() if is_quantized(m)}
    assert quantised == {n for n in linears if n.startswith("llm.model.")}
    attach(model, family, Settings(r=4))
    model.train()
    examples = [family.encode(row) for row in conversations()]
    loss = mean_loss(model, examples)
    loss.backward()
    assert loss.item() == pytest.approx(mean_loss(plain, examples).item(), abs=0.1)
    assert all(p.grad is not None for p in model.net.parameters() if p.requires_grad)


def test_limits_of_pictures(tiny):
    area = 56 * 56
    family = find_family(tiny, Options(max_pixels=4 * area))
    assert max(family.plan(w, 1000)[0][0] * family.plan(w, 1000)[0][1] for w in range(50, 5000, 50)) == 4
    assert find_family(tiny, Options(max_pixels=area)).plan(500, 500)[0] == (0, 0)
    with pytest.raises(UserError, match=f"give {area} or more"):
        find_family(tiny, Options(max_pixels=area - 1)).plan(500, 500)
    family = find_family(tiny)
    for size in ((1, 5000), (5000, 1), (1, 1)):
        pixels, count = family.picture(Image.new("RGB", size))
        assert count == family.picture_positions(*size) == family.count_positions(pixels)[0]
        assert len(pixels["pixel_values"]) == pixels["sizes"].prod(1).sum()
    with pytest.raises(UserError, match="too thin"):
        family.picture_positions(1, 40_000_000)
    with pytest.raises(UserError, match="template for tools"):
        family.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], [{"name": "click"}])
