"""Which number is stored, computed and summed in which dtype, in one table, and the loss scaler that fp16 needs.

bf16 has the range of fp32 and needs no scaler, so it is the choice wherever the device computes it. fp16 overflows at
65,504 and loses gradients below 6e-8: the loss is multiplied by a power of two before backward, and gradients divided
after it. Norms, softmax, logits and loss are fp32 in the code that computes them, whatever this table says.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from data.errors import UserError

# name:   computed        frozen base     full           full, 8-bit optimizer (rounds stochastically)
TABLE = {
    "bf16": (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
    "fp16": (torch.float16, torch.float16, torch.float32, torch.float32),
    "fp32": (torch.float32, torch.float32, torch.float32, torch.float32),
}


@dataclass(frozen=True)
class Precision:
    """One row of the table: `compute` for matrix products, the others for how each kind of weight is stored.

    Adapters are stored in fp32 in every row (lora/adapter.py). Gradients have the dtype of the weight they belong to.
    """

    name: str
    device: torch.device
    compute: torch.dtype
    frozen: torch.dtype
    full: torch.dtype
    full_8bit: torch.dtype

    def autocast(self) -> torch.autocast:
        """The context of every forward: matrix products in `compute`, whatever dtype the weights are stored in.

        Without torch's cache of cast weights: a packed row uses each weight once, and the cache would hold a 16-bit copy of
        all fp32 weights through the forward.
        """
        mixed = self.compute != torch.float32
        return torch.autocast(self.device.type, dtype=self.compute, enabled=mixed, cache_enabled=False)

    def scaler(self) -> "LossScaler":
        """A loss scaler for this precision: dynamic for fp16, otherwise one that leaves everything as it is."""
        return LossScaler(dynamic=True, scale=2.0**16) if self.compute == torch.float16 else LossScaler()


def choose(name: str, device: torch.device) -> Precision:
    """The row of the table for `name` = auto | bf16 | fp16 | fp32 on this device; UserError where it cannot compute it.

    auto is bf16 where the device has it in hardware, else fp16 on a card and fp32 on a processor. bf16 on a processor
    without it is allowed when asked for by name: correct, but slower than fp32.
    """
    if name == "auto":
        name = "bf16" if computes_bf16(device) else "fp16" if device.type == "cuda" else "fp32"
    if name not in TABLE:
        raise UserError(f"--precision {name}: not one of auto, {', '.join(TABLE)}")
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a graphics card; on a processor use --precision bf16 or fp32")
    if name == "bf16" and device.type == "cuda" and not computes_bf16(device):
        card = torch.cuda.get_device_name(device)
        raise UserError(f"--precision bf16: {card} has no bf16 arithmetic; use --precision fp16 or auto")
    return Precision(name, device, *TABLE[name])


def computes_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware; emulation, which both kinds of device offer, does not count."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = Path("/proc/cpuinfo").read_text().split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


@dataclass
class LossScaler:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2): all of its state is two numbers.

    One step: (loss * scaler.scale).backward(), found_inf = scaler.unscale(parameters), no update if found_inf,
    scaler.update(found_inf). The scale is always a power of two, so scaling and unscaling are exact.
    """

    dynamic: bool = False
    scale: float = 1.0
    num_good_steps: int = 0  # since the last change of the scale

    def unscale(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Divide the gradients by the scale in place; True where any of them is not finite."""
        if not self.dynamic:
            return False
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient.mul_(1 / self.scale)
        return not math.isfinite(torch.nn.utils.get_total_norm(gradients))

    def update(self, found_inf: bool) -> None:
        """Halve the scale after an overflow (not below 1), double it after 2,000 steps without one."""
        if not self.dynamic:
            return
        self.num_good_steps = 0 if found_inf else self.num_good_steps + 1
        if found_inf:
            self.scale = max(self.scale / 2, 1.0)
        elif self.num_good_steps == 2000:
            self.scale, self.num_good_steps = self.scale * 2, 0
