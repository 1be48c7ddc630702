"""Adapters on disk, in PEFT's format: what is saved here, peft opens without this project, and the other way round.

Names are those of the network that peft will find under them: base_model.model.<module>.lora_A.weight. Reading is
strict where peft is silent: a tensor that fits nothing, one that is missing and one of another shape are errors, and so
is a kind of adapter that the merge would get wrong. Adapters with the hub's older Qwen2.5-VL names, for which peft only
warns and then changes nothing, are read too.
"""

import hashlib
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data.errors import UserError
from lora.adapter import ADAPTER, Settings, attach, inject, lora_layers
from model.family import Family, Model
from model.files import read_json
from model.quantize import is_quantized
from model.shards import whole_file, write_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OUTSIDE = "base_model.model."  # what peft's own two wrappers add in front of every module's name
PROMPT = "prompt_embeddings"
TENSOR = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
# keys of adapter_config.json that do not change what the tensors mean; any other must be empty
UNDERSTOOD = set(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules "
    "exclude_modules lora_alpha lora_dropout use_rslora use_dora layers_to_transform layers_pattern megatron_config "
    "megatron_core qalora_group_size num_virtual_tokens token_dim num_transformer_submodules num_attention_heads "
    "num_layers encoder_hidden_size init_weights ensure_weight_tying runtime_config eva_config".split()
)
BASE_KEPT = (True, False, None, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave the base as it was


@dataclass
class AdapterFile:
    """An adapter folder that was read: tensors by their names without base_model.model., the whole config."""

    folder: Path
    config: dict
    tensors: dict[str, torch.Tensor]
    base_quant: str | None  # how the base was held in training, where the writer says so
    sha256: str

    @property
    def settings(self) -> Settings:
        """The settings of attach() that make the same adapter, by the names that the file uses."""
        config = self.config
        if PROMPT in self.tensors:
            return Settings(peft_type="PREFIX_TUNING", num_virtual_tokens=len(self.tensors[PROMPT]))
        return Settings(
            r=config["r"], alpha=config["lora_alpha"], targets=list(self.modules()),
            use_rslora=bool(config.get("use_rslora")), use_dora=bool(config.get("use_dora")),
        )

    @property
    def scale(self) -> float:
        """What B A is multiplied by: alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
        return self.config["lora_alpha"] / self.config["r"] ** (0.5 if self.config.get("use_rslora") else 1)

    def modules(self) -> dict[str, dict[str, torch.Tensor]]:
        """Module name -> its tensors: lora_A.weight (r, in), lora_B.weight (out, r), lora_magnitude_vector (out,)."""
        modules: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors.items():
            module, kind = TENSOR.fullmatch(name).groups()
            modules.setdefault(module, {})[kind] = tensor
        return modules


# ---- writing ------------------------------------------------------------------------------------------------------


def adapter_parameters(model: Model) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by their names in a file, without base_model.model."""
    if model.prefix is not None:
        return {PROMPT: model.prefix.prompt_embeddings}
    found = {}
    for name, layer in lora_layers(model.net).items():
        found[f"{name}.lora_A.weight"] = layer.lora_A[ADAPTER].weight
        found[f"{name}.lora_B.weight"] = layer.lora_B[ADAPTER].weight
        if ADAPTER in layer.lora_magnitude_vector:
            found[f"{name}.lora_magnitude_vector"] = layer.lora_magnitude_vector[ADAPTER].weight
    return found


def save_adapter(model: Model, family: Family, folder: str | Path, settings: Settings, base_model: str | Path) -> None:
    """Write the attached adapter so that peft and transformers alone open it; the config, written last, completes it.

    The weights' file notes how the base was held (8bit, 4bit), for the merge report.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {type(module).__name__ for module in model.net.modules() if is_quantized(module)}
    note = {"base_quantization": "8bit" if "Linear8bitLt" in kinds else "4bit"} if kinds else {}
    outside = "" if model.prefix is not None else OUTSIDE
    write_file(folder / WEIGHTS, {outside + name: p for name, p in adapter_parameters(model).items()}, note)
    config = adapter_config(model, family, settings, base_model)
    with whole_file(folder / CONFIG) as file:
        file.write(json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def adapter_config(model: Model, family: Family, settings: Settings, base_model: str | Path) -> dict:
    """adapter_config.json as peft would write it, its sets in a fixed order.

    peft's AutoPeftModelForCausalLM builds the base by task_type, which knows no vision-language models; with task_type
    null and auto_mapping both of its automatic forms do. Prefix tuning exists in peft for CAUSAL_LM alone.
    """
    from peft import LoraConfig, PrefixTuningConfig

    base = str(Path(base_model).resolve()) if Path(base_model).is_dir() else str(base_model)
    common = dict(base_model_name_or_path=base, inference_mode=True)
    net, prefix = model.net, model.prefix
    if prefix is not None:
        config = PrefixTuningConfig(
            **common, task_type="CAUSAL_LM", num_virtual_tokens=prefix.num_virtual_tokens, num_layers=prefix.num_layers,
            num_attention_heads=prefix.num_heads, token_dim=prefix.num_heads * prefix.head_size,
            encoder_hidden_size=prefix.num_heads * prefix.head_size, num_transformer_submodules=1,
        )
    else:
        kind = {"task_type": "CAUSAL_LM"}
        if family.opens_in_transformers and "vision" in family.parts:
            kind = {"auto_mapping": {"base_model_class": type(net).__name__, "parent_library": type(net).__module__}}
        config = LoraConfig(
            **common, **kind, r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
            target_modules=shortest_targets(net), use_rslora=settings.use_rslora, use_dora=settings.use_dora,
        )
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def shortest_targets(net: torch.nn.Module) -> list[str]:
    """target_modules from which peft, which matches the ends of names, finds exactly the modules that have LoRA: their
    last words where these are nowhere else, else their full names."""
    names = set(lora_layers(net))
    words = {name.rpartition(".")[2] for name in names}
    inside = tuple(f"{name}." for name in names)
    outside = [name for name, _ in net.named_modules() if not name.startswith(inside)]
    hit = {name for name in outside if name.rpartition(".")[2] in words}
    return sorted(words if hit == names else names)


# ---- reading ------------------------------------------------------------------------------------------------------


def read_adapter(folder: str | Path) -> AdapterFile:
    """An adapter folder in PEFT's format, LoRA or prefix. Raises UserError for what is not understood."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the adapter/ of a finished run")
    if not (folder / CONFIG).exists() and (folder / "adapter" / CONFIG).exists():
        raise UserError(f"{folder}: is a run's folder; name the one of its adapter, {folder / 'adapter'}")
    config = read_json(folder / CONFIG)
    check_config(folder / CONFIG, config)
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name.removeprefix(OUTSIDE): file.get_tensor(name) for name in file.keys()}
            base_quant = (file.metadata() or {}).get("base_quantization")
    except FileNotFoundError:
        found = sorted(p.name for p in folder.iterdir())
        raise UserError(f"{path}: not found (in the folder: {found}); pickled adapters (.bin) are not read") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None
    adapter = AdapterFile(folder, config, tensors, base_quant, hashlib.sha256(path.read_bytes()).hexdigest())
    check_tensors(adapter)
    return adapter


def check_config(path: Path, config: dict) -> None:
    """Refuse a kind of adapter that this project does not read, or that would mean something else than its tensors."""
    if config.get("peft_type") not in ("LORA", "PREFIX_TUNING"):
        raise UserError(f"{path}: peft_type {config.get('peft_type')!r}; only LORA and PREFIX_TUNING are read")
    for key, value in config.items():
        harmless = BASE_KEPT if key == "init_lora_weights" else (None, False, "none", [], {})
        if key not in UNDERSTOOD and value not in harmless:
            raise UserError(
                f"{path}: {key} is {value!r}, which changes what the tensors mean and is not read here; use peft for it"
            )
    numbers = () if config["peft_type"] == "PREFIX_TUNING" else ("r", "lora_alpha")
    for key in numbers:
        if isinstance(config.get(key), bool) or not isinstance(config.get(key), int | float) or not 0 < config[key] < math.inf:
            raise UserError(f"{path}: {key} is {config.get(key)!r} where a positive number is expected")


def check_tensors(adapter: AdapterFile) -> None:
    """Refuse tensors that the config does not announce, pairs that are not whole, and ranks that differ from r."""
    path, config = adapter.folder / WEIGHTS, adapter.config
    if config["peft_type"] == "PREFIX_TUNING":
        if set(adapter.tensors) != {PROMPT} or adapter.tensors[PROMPT].ndim != 2:
            raise UserError(f"{path}: a prefix is one matrix {PROMPT}, but there are {sorted(adapter.tensors)[:3]}")
        return
    odd = [name for name in adapter.tensors if not TENSOR.fullmatch(name)]
    if odd or not adapter.tensors:
        what = odd[0] if odd else "nothing inside"
        raise UserError(f"{path}: {what}: not a tensor of LoRA layers; is it another kind of adapter?")
    kinds = {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if config.get("use_dora") else set())
    for module, tensors in adapter.modules().items():
        if set(tensors) != kinds:
            raise UserError(f"{path}: {module} has {sorted(tensors)}, but {CONFIG} asks for {sorted(kinds)}")
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        if not (a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] == config["r"]):
            shapes = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
            raise UserError(f"{path}: {module} has {shapes}, but {CONFIG} says r {config['r']}")


def load_adapter(model: Model, family: Family, folder: str | Path) -> Settings:
    """Put a saved adapter's values into the attached one; where none is attached, attach what the folder says.

    Returns the folder's settings. Raises UserError for an adapter of another base, and for one whose kind, scale, rank
    or modules are not those attached: every tensor must find its place, and every place its tensor.
    """
    adapter = read_adapter(folder)
    said, layers = adapter.settings, lora_layers(model.net)
    names = {name: name if has_module(model.net, name) else family.module_name(name) for name in said.targets or []}
    for old, new in names.items():
        if not has_module(model.net, new):
            raise UserError(
                f"{folder}: has a tensor for {old}, but this model ({family.name}) has no such layer; it is for another base"
            )
    if not layers and model.prefix is None:
        if names:
            inject(model, said, list(names.values()))
        else:
            attach(model, family, said)
    elif names and any(not math.isclose(layer.scaling[ADAPTER], adapter.scale) for layer in layers.values()):
        flags = f"--lora_r {said.r} --lora_alpha {said.alpha}{' --use_rslora' if said.use_rslora else ''}"
        raise UserError(f"{folder}: its LoRA has another scale than this run's; start the run with {flags}")
    wanted = adapter_parameters(model)
    found = {renamed(name, names): tensor for name, tensor in adapter.tensors.items()}
    refuse_differences(Path(folder), wanted, found)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])
    named = adapter.config.get("base_model_name_or_path")
    if named and not is_base(named, family.folder):
        print(f"note: {folder} was made on {named} and fits {family.folder}, which has the same shapes; it is right only if "
              "that is the same model", file=sys.stderr)
    return said


def is_base(named: str, folder: Path) -> bool:
    """Whether the base that an adapter names is this folder; a hub id lies in the hub's cache under its own name."""
    return Path(named).resolve() == folder.resolve() or f"models--{named.replace('/', '--')}" in folder.parts


def has_module(net: torch.nn.Module, name: str) -> bool:
    """Whether the network has a linear layer of that name (LoRA around it or not)."""
    try:
        return hasattr(net.get_submodule(name), "in_features")
    except AttributeError:
        return False


def renamed(name: str, modules: dict[str, str]) -> str:
    """A tensor's name with its module's new one."""
    if name == PROMPT:
        return name
    module, kind = TENSOR.fullmatch(name).groups()
    return f"{modules[module]}.{kind}"


def refuse_differences(folder: Path, wanted: dict, found: dict) -> None:
    """UserError that names tensors which an adapter lacks, has too many, or has in another shape than the network."""
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    if missing or unexpected:
        what, names = ("lacks", missing) if missing else ("has, and this run's adapter has not,", unexpected)
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        raise UserError(
            f"{folder}: the adapter {what} {', '.join(names[:2])}{more}; give the --lora_targets, --lora_parts, "
            "--use_dora and --peft_type it was made with"
        )
    for name, parameter in wanted.items():
        if found[name].shape != parameter.shape:
            raise UserError(
                f"{folder}: {name} is {tuple(found[name].shape)}, this model's is {tuple(parameter.shape)}; another "
                "rank (--lora_r, --num_virtual_tokens) or another base model"
            )
