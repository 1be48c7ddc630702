"""Memory and machine: what a run will need before it starts, what it took, and which device it runs on.

The plan is arithmetic on the model's own parameters and shapes, part by part, so that a reader sees which part to
shrink. Peak = weights + gradients + optimizer states + block inputs kept for the backward pass + the largest of three
things that never live at the same moment (one block's recomputed activations, one chunk of logits, one vision block).
A block's activations are estimated 15-34 % above what was measured, so the plan errs on the safe side. Costs
milliseconds; the functions that plan take plain numbers and run without a card.
"""

import ctypes
import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import UserError

if TYPE_CHECKING:
    import torch

GIB = 2**30
CUDA_CONTEXT_GIB, CUDA_WORKSPACE_GIB = 0.5, 0.4  # the driver's own; cuBLAS workspaces and fragmentation
PYTHON_GIB = 0.4  # the interpreter with torch and transformers imported
STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.04, "paged_adamw_8bit": 2.04}  # a trained parameter
QUANTISED_BYTES = {"int8": 1.0, "nf4": 0.516}  # a weight with its scales (those of nf4 are themselves in 8 bits)
STORED_NAMES = {"int8": "int8", "uint8": "nf4"}  # bitsandbytes keeps two 4-bit weights in one uint8
LOGIT_BYTES = 12  # a logit: bf16 value, fp32 softmax, fp32 gradient and what casts leave behind
MINIMUM_DRIVER = {13: 580, 12: 525}  # NVIDIA driver by CUDA major version (NVIDIA's CUDA release notes)


@dataclass(frozen=True)
class Stack:
    """The repeated blocks of a language model or a vision tower, in the numbers that its activations depend on."""

    tokens: int  # T (or P patches) of one micro-batch
    hidden: int  # D
    query: int  # H x K
    key: int  # key heads x K; fewer than query with grouped heads
    intermediate: int
    layers: int
    trained: bool = True  # False: nothing in it or before it is trained, so that nothing is kept for a backward pass


def stack_from_config(config: Any, tokens: int, trained: bool = True) -> Stack:
    """Stack of a transformers text or vision config (Qwen's vision towers say depth and num_heads)."""
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    layers = getattr(config, "num_hidden_layers", None) or config.depth
    return Stack(tokens, config.hidden_size, heads * head_size, key_heads * head_size, config.intermediate_size,
                 layers, trained)


def block_bytes(stack: Stack, element_bytes: int = 2, dropout: bool = False) -> float:
    """Activations that one block keeps for its backward pass: T (4D + 2(q + 2k) + q + 4i) elements and two fp32 norms.

    LoRA dropout adds half: each adapted layer keeps its own dropped copy of the input (measured 42-53 %).
    """
    elements = 4 * stack.hidden + 2 * (stack.query + 2 * stack.key) + stack.query + 4 * stack.intermediate
    return stack.tokens * (element_bytes * elements + 8 * stack.hidden) * (1.5 if dropout else 1.0)


def cache_bytes(stack: Stack, element_bytes: int = 2) -> float:
    """One position of a KV cache: a key and a value of every layer."""
    return 2 * stack.layers * stack.key * element_bytes


def plan(weights: dict[tuple[str, str], float], num_trained: int, language: Stack, vision: Stack | None = None, *,
         vocabulary: int, head_positions: int, gradient_bytes: float = 4, state_bytes: float = 8,
         element_bytes: int = 2, checkpointing: bool = True, dropout: bool = False,
         cuda: bool = True) -> list[tuple[str, float]]:
    """Peak memory of a run as [(part, GiB)]; the total is the sum. The formula is the module's docstring.

    weights: bytes by (part, dtype), as weights_by_part counts them. head_positions: positions whose logits exist at
    the same time. gradient_bytes and state_bytes are for one trained parameter (STATE_BYTES), element_bytes for one
    activation.
    """
    parts = [(f"{part} weights, {dtype}", size) for (part, dtype), size in weights.items()]
    parts += [("gradients", num_trained * gradient_bytes), ("optimizer states", num_trained * state_bytes)]
    moments = {"one chunk of logits": LOGIT_BYTES * head_positions * vocabulary}
    for name, stack in (("language", language), ("vision", vision)):
        if stack is None:
            continue
        block = block_bytes(stack, element_bytes, dropout)
        if stack.trained and not checkpointing:
            parts.append((f"{name} activations", stack.layers * block))
            continue
        if stack.trained:
            parts.append((f"{name} block inputs", element_bytes * stack.tokens * stack.hidden * stack.layers))
        moments[f"one {name} block"] = block
    parts.append(max(moments.items(), key=lambda moment: moment[1]))
    fixed = ("CUDA context", CUDA_CONTEXT_GIB + CUDA_WORKSPACE_GIB) if cuda else ("Python and libraries", PYTHON_GIB)
    return [(part, size / GIB) for part, size in parts if size] + [fixed]


def weights_by_part(parameters: Iterable[tuple[str, "torch.Tensor"]], part_of: Callable[[str], str],
                    vocabulary: int) -> dict[tuple[str, str], float]:
    """Bytes by (part, dtype) of a loaded model's named parameters; part_of(name) is the family's.

    Embedding and output head (V rows) are a part of their own, since they stay 16-bit when the rest is quantised.
    Trained parameters are one part whatever they belong to: they say what the adapters cost.
    """
    found: dict[tuple[str, str], float] = {}
    for name, parameter in parameters:
        dtype = str(parameter.dtype).removeprefix("torch.")
        dtype = STORED_NAMES.get(dtype, dtype)
        part = "trained" if parameter.requires_grad else part_of(name)
        if not parameter.requires_grad and parameter.ndim == 2 and parameter.shape[0] == vocabulary:
            part = "embedding"
        scales = 2 * QUANTISED_BYTES["nf4"] if dtype == "nf4" else 1.0  # they lie beside the packed weights
        size = parameter.numel() * parameter.element_size() * scales
        found[part, dtype] = found.get((part, dtype), 0) + size
    return found


def advise(weights: dict[tuple[str, str], float], total_gib: float, free_gib: float) -> str | None:
    """One sentence if another weight format of the language part would be the better choice, else None."""
    language = {dtype: weights.get(("language", dtype), 0) / GIB for dtype in ("bfloat16", "int8", "nf4")}
    if total_gib > free_gib:
        found = f"{total_gib:.1f} GiB are needed and {free_gib:.1f} are free"
        for flag, dtype in (("--use_8bit", "int8"), ("--use_4bit", "nf4")):
            smaller = total_gib - language["bfloat16"] * (1 - QUANTISED_BYTES[dtype] / 2)
            if smaller <= free_gib:
                return f"{found}: {flag} needs {smaller:.1f}."
        return f"{found}: lower --max_pixels or --max_length, or take --use_lora with --use_4bit and --freeze_vision."
    wider = total_gib + sum(language[dtype] * (2 / QUANTISED_BYTES[dtype] - 1) for dtype in QUANTISED_BYTES)
    if total_gib < wider <= 0.9 * free_gib:
        return f"16-bit weights would need {wider:.1f} of {free_gib:.1f} GiB, and they are faster and exact."
    return None


def choose_micro_tokens(peak_gib: Callable[[int], float], free_gib: float, longest: int, most: int) -> int:
    """The largest micro-batch (tokens) from `longest` to `most` whose planned peak leaves 5 % of free_gib free.

    peak_gib(tokens) must not fall with tokens. Raises UserError if the longest row alone does not fit.
    """
    usable = 0.95 * free_gib
    if peak_gib(longest) > usable:
        raise UserError(f"the longest row has {longest} tokens and needs about {peak_gib(longest):.1f} GiB, but "
                        f"{free_gib:.1f} GiB are free: lower --max_pixels or --max_length, or take --use_4bit.")
    low, high = longest, max(longest, most)  # low always fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if peak_gib(middle) <= usable else (low, middle - 1)
    return low


def free_gib(device: "torch.device") -> float:
    """Memory that this process can have in all: what is free now and what it already holds."""
    if device.type == "cuda":
        import torch
        free, total = torch.cuda.mem_get_info(device)
        allowed = torch.cuda.get_per_process_memory_fraction(device) * total  # what torch may reserve, if someone has set it
        return min(total, min(free + torch.cuda.memory_reserved(device), allowed) + CUDA_CONTEXT_GIB * GIB) / GIB
    available = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip().isdecimal():  # a container's own, below the machine's
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return (available + resident) / GIB


def peak_gib(device: "torch.device") -> float:
    """The most this process has held so far: torch's reserve and the context on a card, resident memory on a CPU."""
    if device.type == "cuda":
        import torch
        return torch.cuda.max_memory_reserved(device) / GIB + CUDA_CONTEXT_GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, as torch's allocator for cards does. By default each tensor over 32 MiB comes
    from the kernel as fresh zeroed pages and goes back to it: a fifth of a step's processor time (bench/RESULTS.md)."""
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # numbers of malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**31 - 1)


def size_text(gib: float) -> str:
    """A size to read: 2.58 GiB, or 12.3 MiB where two places of a GiB would show nothing."""
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{gib * 1024:.1f} MiB"


def machine_line(device: "torch.device", folder: str | Path) -> str:
    """Python, torch, the device, its free memory, and the free disk space where folder is or will be."""
    import torch
    name = f"CPU with {os.cpu_count()} cores"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, driver {find_driver()}, CUDA {torch.version.cuda}"
    folder = Path(folder).resolve()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return (f"Python {platform.python_version()}, torch {torch.__version__}, {name}, "
            f"{free_gib(device):.1f} GiB memory free, {shutil.disk_usage(existing).free / GIB:.0f} GiB disk free")


def find_driver() -> str | None:
    """Version of the NVIDIA driver, such as "580.65.06"; None without one. (WSL2 has nvidia-smi only.)"""
    version = Path("/proc/driver/nvidia/version")
    if version.exists():
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?", version.read_text())
        return found[0] if found else "unknown"
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return answer.stdout.split("\n")[0].strip() or None if answer.returncode == 0 else None


def explain_unusable_card(driver: str, cuda: str | None, visible: str | None) -> str:
    """One sentence: why torch does not see the card of that driver, and what to do.

    cuda: the version torch was built for, None for a CPU build; visible: CUDA_VISIBLE_DEVICES.
    """
    insist = "or pass --device cpu to train on the processor."
    if visible is not None and not re.match(r"\d|GPU|MIG", visible):
        return f"the NVIDIA card is hidden by CUDA_VISIBLE_DEVICES={visible!r}: unset it, {insist}"
    if cuda is None:
        return (f"there is an NVIDIA card, but this torch was built without CUDA: install torch's build cu130 "
                f"(driver {MINIMUM_DRIVER[13]} or newer) or cu126 (pytorch.org, Get Started), {insist}")
    minimum = MINIMUM_DRIVER.get(int(cuda.split(".")[0]), 0)
    if driver != "unknown" and int(driver.split(".")[0]) < minimum:
        return (f"the NVIDIA driver {driver} is too old for CUDA {cuda}, which this torch was built for: install "
                f"driver {minimum} or newer, or torch's build cu126 (pytorch.org, Get Started), {insist}")
    return (f"there is an NVIDIA driver ({driver}), but torch cannot use a card: look at what nvidia-smi says, start a "
            f"container with its card (docker run --gpus all), {insist}")


def supports_card(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether torch's build runs on a card: machine code (sm_) of its generation, or older code to compile."""
    for kind, number in (name.split("_") for name in architectures):
        built = divmod(int(re.match(r"\d+", number)[0]), 10)
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def check_device(device: str) -> "torch.device":
    """The device for --device auto, cpu, cuda or cuda:1. A card that torch cannot use is a UserError, never the CPU."""
    import torch
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device} is none of auto, cpu, cuda, cuda:0, cuda:1.")
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        driver = find_driver()
        if driver is not None:
            raise UserError(explain_unusable_card(driver, torch.version.cuda, os.environ.get("CUDA_VISIBLE_DEVICES")))
        if device != "auto":
            raise UserError(f"--device {device}, but there is no NVIDIA driver: install one, or pass --device cpu.")
        return torch.device("cpu")
    chosen = torch.device("cuda:0" if device in ("auto", "cuda") else device)
    if chosen.index >= torch.cuda.device_count():
        raise UserError(f"--device {device}, but torch sees {torch.cuda.device_count()} card(s), counted from cuda:0.")
    if not supports_card(torch.cuda.get_device_capability(chosen), torch.cuda.get_arch_list()):
        raise UserError(f"this torch has no code for the {torch.cuda.get_device_name(chosen)}: install its build "
                        "cu126 (pytorch.org, Get Started), or pass --device cpu.")
    torch.cuda.set_device(chosen)  # the card whose random state is saved, and that libraries without a device argument take
    return chosen
