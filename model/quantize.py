"""8-bit and 4-bit linear layers for a frozen base, filled while the shards stream in.

The layers are bitsandbytes': LLM.int8 (absmax per row) and NF4 with double quantisation, about 1.0 and 0.53 bytes a
weight. The network is built on the meta device, its linear layers are replaced by empty quantised ones, and each weight
is quantised as it arrives, so the 16-bit model never exists in memory. Quantisation saves memory, not time: int8 costs
about 30 % over bf16 at large batches here and more on some cards.

The layers never leave training mode. On the CPU bitsandbytes computes something else in eval mode (8-bit: other logits
by 0.9 %; 4-bit: the weight is repacked in place and dequantises to garbage afterwards), so a model would be evaluated
with other weights than it was trained with. They hold no dropout and no statistics: nothing else changes.
"""

import logging
from contextlib import contextmanager

import torch
from torch import nn

QUANTS = ("8bit", "4bit")


@contextmanager
def quiet_import():
    """bitsandbytes logs a line for each optional CPU kernel that it does not find; they change nothing for us."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def quantize_linears(net: nn.Module, names: list[str], quant: str, compute_dtype: torch.dtype) -> None:
    """Replace the named nn.Linear layers of a network on meta by empty bitsandbytes layers of the same shape."""
    with quiet_import():
        import bitsandbytes as bnb
    for name in names:
        parent, _, leaf = name.rpartition(".")
        old = net.get_submodule(name)
        shape = dict(input_features=old.in_features, output_features=old.out_features, bias=old.bias is not None)
        with torch.device("meta"):
            if quant == "8bit":
                new = bnb.nn.Linear8bitLt(**shape, has_fp16_weights=False, threshold=6.0)
            else:
                new = bnb.nn.Linear4bit(
                    **shape, compute_dtype=compute_dtype, quant_type="nf4", compress_statistics=True
                )
        new.train = lambda mode=True, layer=new: layer  # stays in training mode: see below
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
        state = weight.SCB if weight.SCB is not None else layer.state.SCB
        return weight.data.float() * state.float()[:, None] / 127
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise RuntimeError("this 4-bit weight was repacked by a forward in eval mode; dequantise it before, or load it again")
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
