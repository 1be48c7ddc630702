"""The lora.* quantities of every text reference: forward, gradient norms and merged weights that peft made.

Tolerances are the notes': logits 1e-4, loss 1e-5, gradient norms 1e-4 relative.
"""

import pytest
import torch
from safetensors.torch import load_file
from test_reference import Case, check_norms, folders, golden, load, mean_loss

from lora.files import load_adapter
from lora.merge import merge
from model import load_model
from model.shards import Shards


@folders("qwen2")
def test_adapter_forward_and_gradients(folder):
    tensors, facts = golden(folder)
    facts = facts["lora"]
    model, family = load(folder)
    settings = load_adapter(model, family, folder / "lora_adapter")
    assert (settings.r, settings.alpha) == (facts["r"], facts["alpha"])
    case = Case(family, tensors, f"sft.{facts['case']}")
    for ours, theirs, mask in zip(model.logits(case.examples), tensors["lora.logits"], case.mask, strict=True):
        torch.testing.assert_close(ours, theirs[mask], atol=1e-4, rtol=0)
    loss = mean_loss(model, case.examples)
    assert loss.item() == pytest.approx(facts["loss"], abs=1e-5)
    loss.backward()
    trained = {n.replace(".default.", "."): p for n, p in model.net.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == facts["n_trainable"]
    check_norms({name: p.grad.norm().item() for name, p in trained.items()}, facts["grad_norms"])


@folders("qwen2")
def test_merged_weights(folder, tmp_path):
    tensors, facts = golden(folder)
    merge(folder, folder / "lora_adapter", tmp_path / "merged")
    expected = {n.removeprefix("lora.merged."): t for n, t in tensors.items() if n.startswith("lora.merged.")}
    merged = dict(Shards(tmp_path / "merged").stream(only=set(expected)))
    assert expected and set(merged) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=0)
    model, family = load_model(tmp_path / "merged", dtype="float32")
    case = Case(family, tensors, f"sft.{facts['lora']['case']}")
    for ours, theirs, mask in zip(model.logits(case.examples), tensors["lora.logits"], case.mask, strict=True):
        torch.testing.assert_close(ours, theirs[mask], atol=1e-4, rtol=0)
    assert mean_loss(model, case.examples).item() == pytest.approx(facts["lora"]["merged_loss"], abs=1e-5)
    before = load_file(folder / Shards(folder).files()[0])
    assert set(before) == set(load_file(tmp_path / "merged" / Shards(folder).files()[0]))
