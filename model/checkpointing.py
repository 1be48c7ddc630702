"""Gradient checkpointing: keep a block's input, forget its insides, compute them again in backward.

One block's activations are alive at a time instead of all blocks': memory for a third more compute. The random state
is restored before the second pass, so dropout draws the same masks and the gradient is bit for bit that of the plain
block. With offload the kept inputs wait in host memory (2 bytes x T x D a block), for contexts that do not fit.
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import nn


class _Checkpoint(torch.autograd.Function):
    """y = function(x, *rest): saves x alone; gradients reach x directly and parameters by the inner backward."""

    @staticmethod
    def forward(ctx, function, offload, _anchor, x, *rest):
        ctx.function, ctx.rest = function, rest
        ctx.device = x.device
        ctx.autocast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        ctx.random = torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if x.is_cuda else None
        ctx.save_for_backward(to_host(x) if offload else x)
        with torch.no_grad():
            return function(x, *rest)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].to(ctx.device, non_blocking=True).detach().requires_grad_(ctx.needs_input_grad[3])
        cuda = [ctx.device] if ctx.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), torch.enable_grad():
            torch.set_rng_state(ctx.random[0])
            if cuda:
                torch.cuda.set_rng_state(ctx.random[1], ctx.device)
            mixed = ctx.autocast is not None
            with torch.autocast(ctx.device.type, dtype=ctx.autocast, enabled=mixed, cache_enabled=False):
                y = ctx.function(x, *ctx.rest)
        torch.autograd.backward(y, grad)
        return None, None, None, x.grad, *(None for _ in ctx.rest)


def to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy in host memory that the card writes by itself (pinned): neither it nor the fetch in backward stops the queue."""
    return torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x, non_blocking=True)


def checkpoint(function: Callable[..., torch.Tensor], x: torch.Tensor, *rest, offload: bool = False) -> torch.Tensor:
    """function(x, *rest) whose insides are computed again in backward.

    Gradients flow to x and to every parameter that function reads, not to tensors in rest (masks, rotary tables,
    targets). Returns one tensor. A frozen x is fine: an anchor that requires grad keeps the node in the graph.
    """
    if not torch.is_grad_enabled():
        return function(x, *rest)
    return _Checkpoint.apply(function, offload, torch.zeros((), requires_grad=True), x, *rest)


def checkpoint_blocks(blocks: Iterable[nn.Module], offload: bool = False) -> None:
    """Make each block's forward a checkpointed one while it trains; its first argument is the hidden state (.., D)."""
    for block in blocks:
        block.forward = functools.partial(_block_forward, block.forward, block, offload)


def _block_forward(forward, block: nn.Module, offload: bool, hidden: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    trained = hidden.requires_grad or any(p.requires_grad for p in block.parameters())  # a frozen tower keeps nothing
    if not (trained and block.training and torch.is_grad_enabled()):
        return forward(hidden, *args, **kwargs)
    return checkpoint(lambda x: forward(x, *args, **kwargs), hidden, offload=offload)
