"""Which parameters of a model are trained: LoRA layers, a prefix, or its own weights by part; and the base without them.

LoRA layers are peft's, put into the network in place, so the network keeps its names and peft can open what is saved.
peft matches target names by their ends, which would reach a vision tower's gate_proj along with the language model's;
here the modules are found by part and peft gets their full names. A and B are fp32 (18 MiB at rank 16 of a 3B model)
beside a base that stays as it was loaded. Prefix tuning is a table of keys and values of our own, laid out as peft's.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from data.errors import UserError
from model.family import Family, Model
from model.quantize import dequantize, is_quantized

ADAPTER = "default"  # peft's name of an only adapter
Row = tuple[str, int, int]  # part, trainable parameters, all parameters


@dataclass
class Settings:
    """What is trained. Without use_lora: the model's own weights, less the frozen parts."""

    use_lora: bool = True
    peft_type: str = "LORA"  # or PREFIX_TUNING
    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: list[str] | None = None  # names, ends of names, patterns or all-linear; None: the family's
    parts: list[str] | None = None  # language, projector, vision; None: the family's
    use_rslora: bool = False
    use_dora: bool = False
    num_virtual_tokens: int = 20
    freeze_vision: bool = False
    freeze_projector: bool = False

    @classmethod
    def from_config(cls, config: Any) -> "Settings":
        """From the settings of a run (the fields of training/config.py's Config)."""
        return cls(
            use_lora=config.use_lora, peft_type=config.peft_type, r=config.lora_r, alpha=config.lora_alpha,
            dropout=config.lora_dropout, targets=None if config.lora_targets == ["auto"] else config.lora_targets,
            parts=None if config.lora_parts == ["auto"] else config.lora_parts,
            use_rslora=config.use_rslora, use_dora=config.use_dora, num_virtual_tokens=config.num_virtual_tokens,
            freeze_vision=config.freeze_vision, freeze_projector=config.freeze_projector,
        )


class Prefix(nn.Module):
    """Prefix tuning (Li and Liang 2021): keys and values of P virtual tokens for each of L layers.

    One leaf of (P, L * 2 * Hkv * K) fp32, peft's layout. A block cuts its part out itself, so that under checkpointing
    the whole way from the block's output to the leaf lies inside the block's own backward.
    """

    def __init__(self, num_virtual_tokens: int, num_layers: int, num_heads: int, head_size: int):
        super().__init__()
        self.num_virtual_tokens, self.num_layers = num_virtual_tokens, num_layers
        self.num_heads, self.head_size = num_heads, head_size
        width = num_layers * 2 * num_heads * head_size
        # small, as a fresh embedding; peft starts from N(0, 1), keys as large as a trained model's own
        self.prompt_embeddings = nn.Parameter(torch.randn(num_virtual_tokens, width) * 0.02)  # (P, L * 2 * Hkv * K)

    def forward(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of one layer, (Hkv, P, K) each; keys are not rotated."""
        table = self.prompt_embeddings.unflatten(1, (self.num_layers, 2, self.num_heads, self.head_size))[:, layer]
        keys, values = table.permute(1, 2, 0, 3)  # (2, Hkv, P, K)
        return keys, values


def attach(model: Model, family: Family, settings: Settings) -> list[Row]:
    """Attach what settings ask for, and set requires_grad on exactly what is trained; returns trainable_table().

    Raises UserError for a target or part that matches nothing, and for DoRA on an 8-bit base.
    """
    if not settings.use_lora:
        freeze(model, family, settings.freeze_vision, settings.freeze_projector)
    elif settings.peft_type == "PREFIX_TUNING":
        config = model.net.config.get_text_config()
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        model.requires_grad_(False)
        heads, layers = config.num_key_value_heads, config.num_hidden_layers
        model.prefix = Prefix(settings.num_virtual_tokens, layers, heads, head_size).to(model.device)
    else:
        inject(model, settings, find_targets(model.net, family, settings.targets, settings.parts))
    return trainable_table(model)


def freeze(model: Model, family: Family, freeze_vision: bool, freeze_projector: bool) -> None:
    """Full fine-tuning: every weight is trained but those of the frozen parts. Raises UserError on a quantised base."""
    if any(is_quantized(module) for module in model.net.modules()):
        raise UserError("a quantised base is not trained itself: add --use_lora, or drop --use_8bit or --use_4bit")
    frozen = {part for part, is_frozen in (("vision", freeze_vision), ("projector", freeze_projector)) if is_frozen}
    for part in frozen - set(family.parts):
        raise UserError(f"--freeze_{part}: the model ({family.name}) has no {part} part; drop the flag")
    for name, parameter in model.net.named_parameters():
        parameter.requires_grad_(family.part_of(name) not in frozen)


# ---- which modules ------------------------------------------------------------------------------------------------


def find_targets(net: nn.Module, family: Family, targets: list[str] | None, parts: Iterable[str] | None) -> list[str]:
    """Full names of the linear layers that get LoRA: of the parts asked for, those that a target names.

    A target is a module's name or the end of one, a pattern for the whole name (regular expression), or all-linear.
    None takes the family's targets in the language model and every linear layer of other parts. Raises UserError where
    a target or a part ends up with nothing. The output head is no target: it is applied to chunks of positions, by its
    weight, and would pass its LoRA by.
    """
    parts = list(parts or family.lora_parts)
    for part in parts:
        if part not in family.parts:
            raise UserError(f"--lora_parts {part}: the model ({family.name}) has the parts {', '.join(family.parts)}")
    head = net.get_output_embeddings()
    linears = [name for name, module in net.named_modules() if isinstance(module, nn.Linear) and module is not head]
    inside = {part: [name for name in linears if family.part_of(name) == part] for part in parts}
    found: set[str] = set()
    for part in parts:
        wanted = targets or (family.lora_targets if part == "language" else ["all-linear"])
        found |= {name for name in inside[part] if any(matches(target, name) for target in wanted)}
    for target in targets or []:
        if not any(matches(target, name) for name in found):
            raise UserError(f"--lora_targets {target}: {nothing_matches(target, linears, family, parts)}")
    for part in parts:
        if found.isdisjoint(inside[part]):
            raise UserError(
                f"no layer of the {part} part gets LoRA, though --lora_parts has it; its linear layers are "
                f"{', '.join(leaf_names(inside[part]))}"
            )
    return [name for name in linears if name in found]


def matches(target: str, name: str) -> bool:
    """Whether a target names a module. Raises UserError for a broken pattern."""
    if target == "all-linear" or name == target or name.endswith(f".{target}"):
        return True
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise UserError(f"--lora_targets {target}: neither a name nor a regular expression ({error})") from None


def nothing_matches(target: str, linears: list[str], family: Family, parts: list[str]) -> str:
    """Why a target matches nothing, and what would."""
    elsewhere = sorted({family.part_of(name) for name in linears if matches(target, name)})
    if elsewhere:
        found, asked = ", ".join(elsewhere), ", ".join(parts)
        return f"such layers are in {found} and not in {asked}; add --lora_parts {elsewhere[0]}"
    names = leaf_names([name for name in linears if family.part_of(name) in parts])
    near = difflib.get_close_matches(target.rpartition(".")[2], names, n=3, cutoff=0.5)
    hint = f"near names: {', '.join(near)}; " if near else ""
    return f"matches no linear layer; {hint}there are {', '.join(names)}"


def leaf_names(names: list[str]) -> list[str]:
    """The different last words of module names (two words where the last is a number), in order of appearance."""
    return list(dict.fromkeys(re.search(r"[^.]+(\.\d+)?$", name).group() for name in names))


# ---- peft's layers ------------------------------------------------------------------------------------------------


def inject(model: Model, settings: Settings, names: list[str]) -> None:
    """Freeze the base and put peft's LoRA layers around the named modules, trainable, in fp32."""
    from peft import LoraConfig, inject_adapter_in_model

    kinds = {type(model.net.get_submodule(name)).__name__ for name in names}
    if settings.use_dora and "Linear8bitLt" in kinds:
        raise UserError("--use_dora needs the weights' norms, which 8-bit layers do not give; take --use_4bit")
    model.net.is_loaded_in_8bit = "Linear8bitLt" in kinds  # how peft learns that it may meet such layers
    model.net.is_loaded_in_4bit = "Linear4bit" in kinds
    config = LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=list(names),
        use_rslora=settings.use_rslora, use_dora=settings.use_dora,
    )
    inject_adapter_in_model(config, model.net)
    for layer in lora_layers(model.net).values():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if settings.use_dora:  # peft's norms are in the base's dtype; in bf16 they move the model before the first step
            layer.lora_magnitude_vector[ADAPTER].weight.data = weight_of(layer.get_base_layer()).norm(dim=1)


def lora_layers(net: nn.Module) -> dict[str, nn.Module]:
    """Module name -> peft's layer around it."""
    return {name: module for name, module in net.named_modules() if hasattr(module, "lora_A")}


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight that a linear layer computes with: (out, in) fp32."""
    return dequantize(layer) if is_quantized(layer) else layer.weight.detach().float()


@contextmanager
def disabled(model: Model) -> Iterator[None]:
    """The base model for a while: exactly what it is without its adapter."""
    layers, prefix = list(lora_layers(model.net).values()), model.prefix
    for layer in layers:
        layer.enable_adapters(False)
    model.prefix = None
    try:
        yield
    finally:
        model.prefix = prefix
        for layer in layers:
            layer.enable_adapters(True)


def reference_of(model: Model, copy: bool = False) -> Callable[[], AbstractContextManager[None]] | None:
    """The model as it is now, to be gone back to for a while whenever the result is called: DPO's and RLOO's reference.
    None without an adapter, where that takes a second set of the trained weights, unless `copy` asks for one.

    A fresh LoRA changes nothing, so there it is switched off. An adapter that was loaded belongs to the reference: its
    values are copied (18 MiB at rank 16 of a 3B model) and put back for that while.
    """
    layers = lora_layers(model.net).values()
    if not layers and model.prefix is None and not copy:
        return None
    if layers and all(ADAPTER not in x.lora_magnitude_vector and not x.lora_B[ADAPTER].weight.any() for x in layers):
        return lambda: disabled(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]

    @contextmanager
    def put_back() -> Iterator[None]:
        now = [p.data for p in trained]
        for p, values in zip(trained, start, strict=True):
            p.data = values
        try:
            yield
        finally:
            for p, values in zip(trained, now, strict=True):
                p.data = values

    return put_back


# ---- the table ----------------------------------------------------------------------------------------------------


def trainable_table(model: Model) -> list[Row]:
    """(part, trainable, all) parameters of each part of the model, a tied weight once, quantised ones unpacked."""
    counts: dict[str, list[int]] = {part: [0, 0] for part in model.family.parts}
    seen = set()
    for name, module in model.net.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            packed = is_quantized(module) and parameter is module.weight
            size = module.in_features * module.out_features if packed else parameter.numel()
            count = counts[model.family.part_of(name)]
            count[0] += size * parameter.requires_grad
            count[1] += size
    rows = [(part, *count) for part, count in counts.items()]
    if model.prefix is not None:
        size = model.prefix.prompt_embeddings.numel()
        rows.append(("prefix", size, size))
    return rows


def table_text(rows: list[Row]) -> str:
    """trainable_table() as it is printed before training, with a line for the whole."""
    rows = [*rows, ("all", sum(row[1] for row in rows), sum(row[2] for row in rows))]
    lines = [f"{part:<10} {some:>15,} of {total:>15,}  {some / max(total, 1):8.3%}" for part, some, total in rows]
    return "\n".join(["trained parameters", *lines])
