"""From a checkpoint folder to a network and back: meta device, stream, place; nothing is in memory twice."""

import shutil
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

import model.attention  # noqa: F401 - registers "packed"
from data.errors import UserError
from model.family import Family, Model, Options, find_family
from model.quantize import QUANTS, is_quantized, quantize_linears, quantized_weight
from model.shards import DTYPES, INDEX, SINGLE, Shards, plan_shards, write_shards


def load(folder: Path, quant: str | None, dtype, device, options: Options | None) -> tuple[Model, Family]:
    """See model.load_model."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    device = torch.device(device)
    family = find_family(folder, options)
    net = build_on_meta(family)
    if quant is not None:
        if quant not in QUANTS:
            raise UserError(f"quant {quant!r}: must be one of {', '.join(QUANTS)}, or None")
        quantize_linears(net, quantized_names(family, net), quant, dtype)
    try:
        fill(net, family, Shards(folder), dtype, device)
    except torch.OutOfMemoryError:
        gib = torch.cuda.mem_get_info(device)[1] / 2**30
        raise UserError(
            f"{folder}: the weights alone do not fit on {device} ({gib:.1f} GiB, less what others hold of it); hold the model "
            "in fewer bits (--use_lora with --use_8bit or --use_4bit), or free the card (nvidia-smi says who uses it)"
        ) from None
    for module in net.modules():  # rotary tables and the like; they stay fp32 whatever the model's dtype
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return Model(net, family).eval(), family


def build_on_meta(family: Family) -> nn.Module:
    """The network with parameters on meta (they cost nothing) and real buffers (they are in no checkpoint)."""
    try:
        with torch.device("meta"):
            net = family.build()
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{family.folder}/config.json: transformers builds no model from it ({reason})") from None
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if any(buffer.is_meta for buffer in child.buffers(recurse=False)):
                setattr(parent, name, type(child)(child.config))  # a rotary table: computed anew, outside of meta
    net.set_attn_implementation("packed")
    return net


def quantized_names(family: Family, net: nn.Module) -> list[str]:
    """Linear layers of the parts that the family quantises; the head and the embeddings stay 16-bit."""
    head = net.get_output_embeddings()
    return [
        name
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear) and module is not head and family.part_of(name) in family.quantized_parts
    ]


def stored(net: nn.Module) -> dict[str, torch.Tensor]:
    """Module name -> every tensor that a checkpoint holds: the parameters and the persistent buffers."""
    buffers = {
        f"{name}.{leaf}": buffer
        for name, module in net.named_modules()
        for leaf, buffer in module.named_buffers(recurse=False)
        if leaf not in module._non_persistent_buffers_set
    }
    return dict(net.named_parameters(remove_duplicate=False)) | buffers


def expected_tensors(family: Family, net: nn.Module) -> dict[str, torch.Size]:
    """Tensor name in the checkpoint -> shape, of all that is stored (a tied head has no tensor of its own)."""
    tied = is_tied(net)
    head = next(n for n, m in net.named_modules() if m is net.get_output_embeddings())
    return {family.tensor_name(n): t.shape for n, t in stored(net).items() if not (tied and n == f"{head}.weight")}


def is_tied(net: nn.Module) -> bool:
    """Whether the output head is the input embedding."""
    return any(getattr(config, "tie_word_embeddings", False) for config in (net.config, net.config.get_text_config()))


def fill(net: nn.Module, family: Family, shards: Shards, dtype: torch.dtype, device: torch.device) -> None:
    """Put every tensor of the checkpoint in its place. Raises UserError for what is missing, too many or misshapen."""
    wanted = check_tensors(net, family, shards)
    with torch.no_grad():
        for name, tensor in shards.stream(only=set(wanted)):
            module_name, _, leaf = family.module_name(name).rpartition(".")
            module = net.get_submodule(module_name)
            if is_quantized(module) and leaf == "weight":
                module.weight = quantized_weight(module, tensor, device)
            elif leaf in module._buffers:
                setattr(module, leaf, tensor.to(device, copy=True))
            else:
                trainable = tensor.is_floating_point() and not is_quantized(module)
                setattr(module, leaf, nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=trainable))
    if is_tied(net):
        net.get_output_embeddings().weight = net.get_input_embeddings().weight


def check_tensors(net: nn.Module, family: Family, shards: Shards) -> dict[str, torch.Size]:
    """The checkpoint's tensor names and shapes, from its headers. Raises UserError where they are not the network's."""
    wanted = expected_tensors(family, net)
    headers = shards.headers()
    if is_tied(net):
        headers.pop("lm_head.weight", None)  # some writers store the tied head as well
    refuse_differences(shards.folder, wanted, {name: shape for name, (shape, _) in headers.items()})
    plain = ("F64", "F32", "F16", "BF16")
    coded = [f"{name} ({dtype})" for name, (_, dtype) in headers.items() if dtype not in plain]
    if coded:
        raise UserError(f"{shards.folder}: tensor {coded[0]} is in no 16 or 32 bits; take the unquantised model")
    return wanted


def refuse_differences(folder: Path, wanted: dict, found: dict) -> None:
    """UserError that names the tensors which a checkpoint lacks, has too many, or has in another shape."""
    missing = [n for n in wanted if n not in found]
    unexpected = [n for n in found if n not in wanted]
    differ = [n for n in wanted if n in found and found[n] != wanted[n]]
    misshapen = [f"{n} is {tuple(found[n])}, config.json says {tuple(wanted[n])}" for n in differ]
    for what, names in (("lacks", missing), ("has unexpected", unexpected), ("has misshapen", misshapen)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            listed = "; ".join(names[:3]) + more
            raise UserError(f"{folder}: the checkpoint {what} tensors: {listed}; is config.json of this model?")


def save(model: Model, folder: Path) -> None:
    """See model.save_model."""
    net, family = model.net, model.family
    if any(is_quantized(m) for m in net.modules()):
        raise UserError("a quantised model is not saved whole; merge its adapter into the 16-bit base (python -m lora merge)")
    copy_companions(family.folder, folder)
    write_weights(net, family, folder)


def write_weights(net: nn.Module, family: Family, folder: Path) -> None:
    """The network's parameters as shards under the checkpoint's tensor names, in the dtypes that the base has them in
    (fp32 masters of a bf16 base are rounded once, here)."""
    named = stored(net)
    tensors = {name: named[family.module_name(name)].detach() for name in expected_tensors(family, net)}
    if has_weights(family.folder):
        dtypes = {name: DTYPES[dtype] for name, (_, dtype) in Shards(family.folder).headers().items()}
        tensors = {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in tensors.items()}
    write_shards(folder, tensors, plan_shards({name: tensor.nbytes for name, tensor in tensors.items()}))


def has_weights(folder: Path) -> bool:
    """Whether a model folder holds weights (a tiny model is built in one that does not yet)."""
    return (folder / INDEX).exists() or (folder / SINGLE).exists()


def copy_companions(source: Path, target: Path) -> None:
    """Copy every file of a model folder that is not weights, byte for byte: config, tokenizer, processor, licence."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or path.name.endswith(".index.json")
        if path.is_file() and not weights:
            shutil.copyfile(path, target / path.name)
