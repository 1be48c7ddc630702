"""Which parameters decay, which optimizer moves them, how fast: groups, a registry, the schedule as a pure function.

The learning rate depends on the step number alone, so there is no scheduler whose state a resume could lose. Optimizer
state leaves and enters as plain named tensors, bit for bit. Memory per trained parameter beside weight and gradient: 8
bytes for AdamW, 2 for the 8-bit ones, which are slow on a processor (33 times AdamW's step). bf16 weights under an
8-bit optimizer are rounded stochastically: rounding to nearest would drop every update below 1/512 of a weight.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from data.errors import UserError

# Each takes the share of the way from the end of warm-up (0) to the end of the run (1). A fork adds a line.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def count_updates(epochs: int | str, max_steps: int | None, steps_per_epoch: int) -> int:
    """Updates of a run: max_steps, else epochs; "auto" is 3 epochs, for few rows as many as make 200 updates, 20 at most.

    Measured on the built-in task: 200 rows do not learn it in 3 passes of 13 updates, and do in 180 updates.
    """
    if max_steps is not None:
        return max_steps
    if epochs != "auto":
        return epochs * steps_per_epoch
    return max(3 * steps_per_epoch, min(200, 20 * steps_per_epoch))


def schedule(name: str, step: int, warmup: float, total: int) -> float:
    """The learning rate's multiplier for update `step` of `total`, counted from 0.

    Warm-up climbs linearly over `warmup` updates (below 1: that share of total, rounded up) from 1/(warmup + 1), not
    from 0, so that the first update is not wasted; update `warmup` has 1. The decay would reach 0 at `step` = total,
    which is never run: the last update still has 1/(total - warmup) of linear, and the like of cosine.
    """
    if name not in SCHEDULES:
        raise UserError(f"--lr_schedule {name}: not one of {', '.join(SCHEDULES)}")
    num_warmup = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    return SCHEDULES[name](min(1.0, (step - num_warmup) / max(1, total - num_warmup)))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """The trainable parameters, named, in two groups: matrices decay, vectors (biases, norms) and scalars do not."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in trainable if p.ndim >= 2]
    vectors = [(name, p) for name, p in trainable if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _adamw(groups: list[dict], **settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True, **settings)


def _adamw_8bit(groups: list[dict], **settings) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return _rounding(AdamW8bit)(groups, **settings)


def _paged_adamw_8bit(groups: list[dict], **settings) -> torch.optim.Optimizer:
    if groups[0]["params"][0][1].device.type == "cpu":
        print("note: paged_adamw_8bit pages between card and processor; on a processor it is adamw_8bit")
        return _adamw_8bit(groups, **settings)
    from bitsandbytes.optim import PagedAdamW8bit

    return _rounding(PagedAdamW8bit)(groups, **settings)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "paged_adamw_8bit": _paged_adamw_8bit,
}


def build_optimizer(
    name: str, groups: list[dict], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.Optimizer:
    """The optimizer `name` over the groups of parameter_groups; UserError for a name that nobody registered.

    A fork's optimizer is one file training/optim_<name>.py that adds to OPTIMIZERS; it is found here by listing.
    """
    for path in sorted(Path(__file__).parent.glob("optim_*.py")):
        importlib.import_module(f"training.{path.stem}")
    if name not in OPTIMIZERS:
        raise UserError(f"--optim {name}: not one of {', '.join(OPTIMIZERS)}")
    if not groups:
        raise UserError("nothing is trainable: every parameter is frozen; check --use_lora and the --freeze flags")
    return OPTIMIZERS[name](groups, lr=lr, betas=betas, eps=eps)


def round_stochastically_(target: torch.Tensor, exact: torch.Tensor) -> None:
    """Write fp32 `exact` into bf16 `target`, up or down with the probability that makes the mean exact.

    bf16 is the upper half of fp32: adding a uniform 16-bit number to the bits and cutting the lower half carries into
    the upper one exactly as often as it should. Draws from torch's generator, which checkpoints save.
    """
    noise = torch.randint(0, 1 << 16, exact.shape, dtype=torch.int32, device=exact.device)
    target.copy_(noise.add_(exact.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32))


def _rounding(eight_bit: type) -> type:
    """A bitsandbytes optimizer class whose bf16 parameters are updated in fp32, one at a time, and rounded back."""

    class Rounding(eight_bit):
        def update_step(self, group, p, gindex, pindex):
            if p.dtype != torch.bfloat16:
                return super().update_step(group, p, gindex, pindex)
            stored, gradient = p.data, p.grad
            p.grad = None  # a gradient must match its parameter's dtype whenever it is assigned
            p.data = stored.float()
            p.grad = gradient.float()
            super().update_step(group, p, gindex, pindex)
            p.grad = None
            round_stochastically_(stored, p.data)
            p.data = stored
            p.grad = gradient

    Rounding.__name__ = Rounding.__qualname__ = eight_bit.__name__
    return Rounding


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, float | None]]:
    """All state as tensors "parameter name/key" and the plain numbers beside them, under the same kind of name.

    The tensors ARE the live ones, because a copy would double the state for the length of a save: write them at once,
    or clone them.
    """
    tensors, numbers = {}, {}
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            for key, value in optimizer.state.get(p, {}).items():
                (tensors if isinstance(value, torch.Tensor) else numbers)[f"{name}/{key}"] = value
    return tensors, numbers


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], numbers: dict[str, float | None]
) -> None:
    """Put back what optimizer_tensors gave, copied, in the saved dtypes; UserError for state of unknown parameters.

    torch's and bitsandbytes' own load_state_dict cast to the parameter's dtype. bitsandbytes allocates first and is
    filled in place, because paged state lives in memory that only it can allocate.
    """
    saved: dict[str, dict[str, str]] = {}  # parameter -> key -> its name in the file
    for name in (*tensors, *numbers):
        parameter, key = name.rsplit("/", 1)
        saved.setdefault(parameter, {})[key] = name
    for group_index, group in enumerate(optimizer.param_groups):
        for index, (name, p) in enumerate(zip(group["param_names"], group["params"], strict=True)):
            state = saved.pop(name, {})
            if state and hasattr(optimizer, "init_state"):
                optimizer.init_state(group, p, group_index, index)
            for key, full_name in state.items():
                value = numbers[full_name] if full_name in numbers else tensors[full_name]  # asking tensors reads one
                live = optimizer.state[p].get(key)
                if not isinstance(value, torch.Tensor):
                    optimizer.state[p][key] = value
                elif isinstance(live, torch.Tensor):
                    live.copy_(value)
                else:  # torch counts steps on the processor unless the kernel is fused
                    home = p.device if key != "step" or group.get("fused") else torch.device("cpu")
                    optimizer.state[p][key] = value.to(home, copy=True)
    if saved:
        raise UserError(
            f"the checkpoint holds optimizer state of {next(iter(saved))} and {len(saved) - 1} more parameters that "
            "this run does not train; resume with the settings the run was started with"
        )
