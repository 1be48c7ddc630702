"""Every quantity of every reference folder: numbers that the original code made on tiny random models.

REFERENCE names the folder of folders (default: beside the project); each sub-folder is found by the model_type of its
config.json, so folders with other sizes and ids run the same tests. Tolerances are those of the notes: image features
1e-5, logits 1e-4, loss 1e-5, gradient norms 1e-4 relative, in fp32.
"""

import json

import pytest
import torch
from conftest import REFERENCE
from safetensors.torch import load_file

from data.batches import pack, pack_row
from data.images import open_image
from model import load_model
from stages.sft import Flags, Stage

FOLDERS = sorted(p.parent for p in REFERENCE.glob("*/config.json")) if REFERENCE.is_dir() else []
KINDS = {p: json.loads((p / "config.json").read_text())["model_type"] for p in FOLDERS}


def folders(*kinds: str):
    """The reference folders of these model types, as a parametrisation whose ids are the folders' names."""
    found = [pytest.param(p, id=p.name) for p in FOLDERS if KINDS[p] in kinds]
    if not found:
        found = [pytest.param(None, marks=pytest.mark.skip(reason=f"no reference of {kinds} in {REFERENCE}"))]
    return pytest.mark.parametrize("folder", found)


class Case:
    """A golden batch: its rows without padding, as Examples of the family."""

    def __init__(self, family, golden, name, pictures=(), padding_free=True):
        self.ids = golden[f"{name}.input_ids"]
        self.mask = golden[f"{name}.attention_mask"].bool()
        self.labels = golden[f"{name}.labels"]
        left = list(pictures)
        self.examples = []
        for ids, labels, mask in zip(self.ids, self.labels, self.mask, strict=True):
            ids = ids[mask]
            count = 0 if family.image_token_id is None else spans(ids == family.image_token_id)
            pixels = family.join_pixels(left[:count])
            left = left[count:]
            self.examples.append(family.example(ids, labels[mask], pixels))


def spans(is_picture: torch.Tensor) -> int:
    """Number of runs of True."""
    return int((is_picture[1:] & ~is_picture[:-1]).sum() + is_picture[0])


def golden(folder):
    return load_file(folder / "golden.safetensors"), json.loads((folder / "golden.json").read_text())


def load(folder):
    model, family = load_model(folder, dtype="float32")
    return model.train(), family


def loss_of(model, packed, total):
    return Stage(Flags(), model).loss(model, packed, total)


def mean_loss(model, examples):
    total = sum(e.num_supervised for e in examples)
    return sum(loss_of(model, row, total)[0] for row in pack(examples, 10**9))


def grad_norms(model, family):
    return {family.tensor_name(n): p.grad.norm().item() for n, p in model.net.named_parameters() if p.grad is not None}


def check_norms(found: dict, expected: dict):
    expected = {n: v for n, v in expected.items() if v is not None}
    assert set(expected) <= set(found)
    for name, norm in expected.items():
        assert found[name] == pytest.approx(norm, rel=1e-4, abs=1e-7), name


TEXT_CASES = ["single_turn", "multi_turn", "batch_right_padded", "batch_left_padded"]


@folders("qwen2")
@pytest.mark.parametrize("name", TEXT_CASES)
def test_text_logits_loss_and_gradients(folder, name):
    tensors, facts = golden(folder)
    facts = facts["sft"][name]
    model, family = load(folder)
    case = Case(family, tensors, f"sft.{name}")
    assert [len(e) for e in case.examples] == case.mask.sum(1).tolist()
    for positions, mask, example in zip(tensors[f"sft.{name}.position_ids"], case.mask, case.examples, strict=True):
        assert torch.equal(positions[mask], example.positions)
    logits = model.logits(case.examples)
    expected = [row[mask] for row, mask in zip(tensors[f"sft.{name}.logits"], case.mask, strict=True)]
    for ours, theirs in zip(logits, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert sum(e.num_supervised for e in case.examples) == facts["n_label_tokens"]
    loss = mean_loss(model, case.examples)
    assert loss.item() == pytest.approx(facts["loss"], abs=1e-5)
    loss.backward()
    check_norms(grad_norms(model, family), facts["grad_norms"])
    total = torch.stack([p.grad.norm() for p in model.net.parameters()]).norm().item()
    assert total == pytest.approx(facts["total_grad_norm"], rel=1e-4)


@folders("qwen2")
def test_text_accumulation_is_one_batch(folder):
    tensors, facts = golden(folder)
    facts = facts["grad_accumulation"]
    model, family = load(folder)
    case = Case(family, tensors, f"sft.{facts['case']}")
    total = sum(e.num_supervised for e in case.examples)
    assert total == facts["n_label_tokens"]
    for example in case.examples:
        loss_of(model, pack_row([example]), total)[0].backward()
    check_norms(grad_norms(model, family), facts["grad_norms"])


@folders("qwen2")
def test_text_five_adamw_steps(folder):
    tensors, facts = golden(folder)
    facts = facts["adamw_5_steps"]
    model, family = load(folder)
    examples = Case(family, tensors, f"sft.{facts['case']}").examples
    optimizer = torch.optim.AdamW(
        model.net.parameters(), lr=facts["lr"], betas=facts["betas"], eps=facts["eps"], weight_decay=facts["weight_decay"]
    )
    for loss_expected, norm_expected in zip(facts["losses"], facts["grad_norms_before_clip"], strict=True):
        optimizer.zero_grad()
        loss = mean_loss(model, examples)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.net.parameters(), facts["clip"])
        # Adam makes a whole step of a rounding error: sdpa in place of eager alone moves the loss by 9e-6
        assert loss.item() == pytest.approx(loss_expected, rel=1e-5)
        assert norm.item() == pytest.approx(norm_expected, rel=1e-4)
        optimizer.step()


# ---- Qwen2.5-VL -----------------------------------------------------------------------------------------------------------


def vl_cases():
    return [
        pytest.param(p, name, id=f"{p.name}-{name}")
        for p in FOLDERS
        if KINDS[p] == "qwen2_5_vl"
        for name in json.loads((p / "golden.json").read_text())["cases"]
    ] or [pytest.param(None, None, marks=pytest.mark.skip(reason=f"no reference of qwen2_5_vl in {REFERENCE}"))]


def pictures_of(family, folder, facts, case):
    return [family.picture(folder / facts["images"][n]["file"])[0] for n in facts["cases"][case]["images"]]


@folders("qwen2_5_vl")
def test_pictures_are_bit_identical(folder):
    tensors, facts = golden(folder)
    _, family = load(folder)
    for name, fact in facts["images"].items():
        pixels, count = family.picture(folder / fact["file"])
        assert torch.equal(pixels["pixel_values"], tensors[f"image.{name}.pixel_values"])
        assert torch.equal(pixels["image_grid_thw"][0], tensors[f"image.{name}.image_grid_thw"][0])
        assert count == fact["num_image_tokens"] == family.picture_positions(fact["width"], fact["height"])
        assert open_image(folder / fact["file"]).size == (fact["width"], fact["height"])


@pytest.mark.parametrize("folder, name", vl_cases())
def test_vision_language_case(folder, name):
    tensors, facts = golden(folder)
    model, family = load(folder)
    pictures = pictures_of(family, folder, facts, name)
    case = Case(family, tensors, name, pictures)
    fact = facts["cases"][name]
    for row, (mask, example) in enumerate(zip(case.mask, case.examples, strict=True)):
        assert torch.equal(tensors[f"{name}.position_ids"][:, row][:, mask], example.positions)
    packed = pack_row(case.examples)
    with torch.no_grad():
        embeddings = family.embed(model.net, packed)
        hidden = model.hidden(packed)
    for key, ours in (("inputs_embeds", embeddings), ("last_hidden", hidden)):
        torch.testing.assert_close(ours, tensors[f"{name}.{key}"][case.mask], atol=1e-4, rtol=0)
    if pictures:
        torch.testing.assert_close(
            embeddings[packed.input_ids == family.image_token_id], tensors[f"{name}.image_embeds"], atol=1e-5, rtol=0
        )
    for as_original in (False, True):
        logits = torch.cat(model.logits(case.examples, as_original_batch=as_original))
        torch.testing.assert_close(logits, tensors[f"{name}.logits"][case.mask], atol=1e-4, rtol=0)
    assert sum(e.num_supervised for e in case.examples) == fact["n_label_tokens"]
    loss = mean_loss(model, case.examples)
    assert loss.item() == pytest.approx(fact["loss"], abs=1e-5)
    if pictures:
        assert abs(loss.item() - fact["loss_if_1d_positions"]) > 1e-3  # the picture's positions matter
    loss.backward()
    check_norms(grad_norms(model, family), fact["grad_norms"])


@pytest.mark.parametrize("folder, name", vl_cases())
def test_vision_tower_in_parts(folder, name):
    tensors, facts = golden(folder)
    if not facts["cases"][name]["images"]:
        pytest.skip("this case has no picture, so no tower runs")
    model, family = load(folder)
    pixels = family.join_pixels(pictures_of(family, folder, facts, name))
    tower = model.net.model.visual
    with torch.no_grad():
        torch.testing.assert_close(
            tower.patch_embed(pixels["pixel_values"]), tensors[f"{name}.vision_patch_embed"], atol=1e-5, rtol=0
        )
        out = tower(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"])
    expected = tensors[f"{name}.vision_hidden_window_order"]
    torch.testing.assert_close(out.last_hidden_state, expected, atol=1e-5 * max(1, expected.abs().max().item()), rtol=0)
