"""The output head in chunks: equal to full logits in value and gradient, and never as large."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model.head
from model.head import negative_log_likelihood, per_token

T, D, V = 300, 16, 1000


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(model.head, "CHUNK_BYTES", 4 * V * 7)  # seven positions at a time, which divides nothing here


def inputs(dtype=torch.float32, trained=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_(trained)
    where = torch.randperm(T, generator=generator)[:200].sort().values
    target = torch.randint(V, (200,), generator=generator)
    upstream = torch.randn(200, generator=generator)
    return hidden, weight, where, target, upstream


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


def weighted(logits, target, weight):
    return negative_log_likelihood(logits, target) * weight


@pytest.mark.parametrize("function", [negative_log_likelihood, entropy, weighted])
def test_values_and_gradients_equal_full_logits(function):
    hidden, weight, where, target, upstream = inputs()
    extra = {entropy: (), weighted: (target, upstream)}.get(function, (target,))
    ours = per_token(hidden, weight, function, where, *extra)
    logits = F.linear(hidden.double(), weight.double())[where]
    theirs = function(logits, *(x.double() if x.is_floating_point() else x for x in extra))
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-6)
    found = backward(ours, upstream, hidden, weight)
    expected = torch.autograd.grad((theirs * upstream.double()).sum(), [hidden, weight])
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b.double()).norm() <= 1e-6 * b.norm()


def backward(values, upstream, *tensors):
    """Gradients by .backward(): a checkpoint accumulates into what its function reads."""
    for tensor in tensors:
        tensor.grad = None
    (values * upstream).sum().backward()
    return [tensor.grad for tensor in tensors]


def test_only_supervised_positions_get_a_gradient():
    hidden, weight, where, target, upstream = inputs()
    gradient, _ = backward(per_token(hidden, weight, negative_log_likelihood, where, target), upstream, hidden, weight)
    outside = torch.ones(T, dtype=torch.bool)
    outside[where] = False
    assert gradient[outside].abs().max() == 0 and gradient[where].abs().min(1).values.max() > 0


def test_frozen_head():
    hidden, weight, where, target, upstream = inputs(trained=False)
    values = per_token(hidden, weight, negative_log_likelihood, where, target)
    gradient, none = backward(values, upstream, hidden, weight)
    assert none is None and gradient.abs().max() > 0
    with torch.no_grad():
        assert torch.equal(per_token(hidden, weight, negative_log_likelihood, where, target), values)


def test_bf16_hidden_and_weight_give_an_fp32_loss():
    """The logits are bf16 products; from there on nothing is rounded: 1e-6 to the same logits in fp64."""
    hidden, weight, where, target, upstream = inputs(torch.bfloat16)
    ours = per_token(hidden, weight, negative_log_likelihood, where, target)
    assert ours.dtype == torch.float32
    logits = F.linear(hidden, weight)[where].double()
    torch.testing.assert_close(ours.double(), F.cross_entropy(logits, target, reduction="none"), atol=1e-5, rtol=1e-6)
    gradient, _ = backward(ours, upstream, hidden, weight)
    exact = hidden.detach().double().requires_grad_()
    values = F.cross_entropy(F.linear(exact, weight.detach().double())[where], target, reduction="none")
    expected = torch.autograd.grad((values * upstream.double()).sum(), exact)[0]
    assert (gradient.double() - expected).norm() <= 1e-2 * expected.norm()


def test_nothing_supervised():
    hidden, weight, where, target, _ = inputs()
    values = per_token(hidden, weight, negative_log_likelihood, where[:0], target[:0])
    assert values.shape == (0,)
    values.sum().backward()
    assert hidden.grad is None or hidden.grad.abs().max() == 0


class Largest(TorchDispatchMode):
    """The most elements that any operation put out."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_no_tensor_is_as_large_as_all_logits():
    hidden, weight, where, target, upstream = inputs()
    with Largest() as largest:
        per_token(hidden, weight, negative_log_likelihood, where, target).backward(upstream)
    assert weight.numel() <= largest.elements < 200 * V / 5  # the head's own gradient (V, D) is the largest
    with Largest() as full:
        F.cross_entropy(F.linear(hidden, weight)[where], target, reduction="none").backward(upstream)
    assert full.elements >= 200 * V  # the count sees what it is meant to see
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        per_token(hidden, weight, negative_log_likelihood, where, target)
    assert sum(kept) <= 3 * 200 * D + 1000  # between forward and backward only the hidden states are kept
