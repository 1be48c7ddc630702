"""8-bit and 4-bit linear layers for a frozen base, filled while the shards stream in.

The layers are bitsandbytes': int8 with one scale a row, and NF4 with double quantisation, about 1.0 and 0.53 bytes a
weight. The network is built on the meta device, its linear layers are replaced by empty quantised ones, and each weight
is quantised as it arrives, so the 16-bit model never exists in memory. Quantisation saves memory, not time: int8 costs
about 30 % over bf16 at large batches here and more on some cards.

An 8-bit layer computes with a 16-bit copy of its weight, made for each product. bitsandbytes does so when training on a
CPU; on a card, and in eval mode, it rounds the inputs to 8 bits as well, passes them through fp16, waits for the card at
every layer to look for outliers, and says so each time: training and evaluation would compute with different numbers.
A 4-bit layer never leaves training mode: in eval mode on a CPU its weight is repacked in place and dequantises to garbage
afterwards. The layers hold no dropout and no statistics: nothing else changes.
"""

import functools
import logging

import torch
import torch.nn.functional as F
from torch import nn

QUANTS = ("8bit", "4bit")
# when it is imported, bitsandbytes warns of each optional CPU kernel that it does not find
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def quantize_linears(net: nn.Module, names: list[str], quant: str, compute_dtype: torch.dtype) -> None:
    """Replace the named nn.Linear layers of a network on meta by empty bitsandbytes layers of the same shape."""
    import bitsandbytes as bnb

    for name in names:
        parent, _, leaf = name.rpartition(".")
        old = net.get_submodule(name)
        shape = dict(input_features=old.in_features, output_features=old.out_features, bias=old.bias is not None)
        with torch.device("meta"):
            if quant == "8bit":
                new = bnb.nn.Linear8bitLt(**shape, has_fp16_weights=False)
                new.forward = functools.partial(eight_bit_linear, new)
            else:
                new = bnb.nn.Linear4bit(
                    **shape, compute_dtype=compute_dtype, quant_type="nf4", compress_statistics=True
                )
                new.train = lambda mode=True, layer=new: layer
        setattr(net.get_submodule(parent), leaf, new.requires_grad_(False))


def quantized_weight(layer: nn.Module, weight: torch.Tensor, device: torch.device) -> nn.Parameter:
    """The layer's weight parameter made from a 16-bit tensor (out, in); moving it to the device quantises it."""
    import bitsandbytes as bnb

    if isinstance(layer, bnb.nn.Linear8bitLt):
        return bnb.nn.Int8Params(weight.to(torch.float16), requires_grad=False, has_fp16_weights=False).to(device)
    parameter = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    )
    return parameter.to(device)


def eight_bit_linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x W^T + b of a Linear8bitLt layer: (.., in) -> (.., out), in autocast's dtype, else in that of x."""
    mixed = torch.is_autocast_enabled(x.device.type)
    x = x.to(torch.get_autocast_dtype(x.device.type)) if mixed else x
    out = _EightBitProduct.apply(x, layer.weight)
    return out if layer.bias is None else out + layer.bias.to(out.dtype)


class _EightBitProduct(torch.autograd.Function):
    """x W^T for a frozen W, which is dequantised again in backward: only its 8-bit form stays in memory."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return F.linear(x, eight_bit_weight(weight, x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ eight_bit_weight(ctx.weight, grad.dtype), None


def eight_bit_weight(weight: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
    """(out, in) of an Int8Params weight: its bytes times their row's largest absolute value / 127, rounded once."""
    return weight.data.to(dtype).mul_(weight.SCB[:, None] / 127)


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer holds an 8-bit or 4-bit weight."""
    return type(layer).__name__ in ("Linear8bitLt", "Linear4bit")


def dequantize(layer: nn.Module) -> torch.Tensor:
    """The weight that a quantised layer computes with: (out, in) fp32.

    bitsandbytes on the CPU repacks 4-bit weights in place at the first forward in eval mode and then dequantises to
    garbage without an error; such a layer is refused.
    """
    import bitsandbytes as bnb

    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return eight_bit_weight(weight, torch.float32)
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise RuntimeError("this 4-bit weight was repacked by a forward in eval mode; dequantise it before, or load it again")
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
