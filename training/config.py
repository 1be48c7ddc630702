"""Every setting of a run in one dataclass, read from flags over a YAML file over defaults.

The flags, their help and their checks are built from the fields of Config, so a setting is written once. The keys of
the recipes this project grew from (TrainingArguments, LoraConfig, CogAgent's nested YAML, MiniCPM's shell scripts) are
read too: RENAMED, SeedKeys and IGNORED say what becomes of each. Nothing is dropped in silence: an unknown key is an
error that names the nearest one, a key without effect prints why. Nothing heavy is imported: --help answers at once.
"""

import argparse
import dataclasses
import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.boxes import FORMATS
from data.errors import UserError
from training.options import Parser, Said, add_flag, collect, convert, help_text, note, option, put, read_yaml

# A new optimizer is a file training/optim_NAME.py; it is found here by listing, without importing it.
OPTIMIZERS = " ".join(["adamw adamw_8bit paged_adamw_8bit",
                       *sorted(path.stem.removeprefix("optim_") for path in Path(__file__).parent.glob("optim_*.py"))])


@dataclass
class Config:
    # Model
    base_model: str | None = option(None, "model folder or hub id", shown="DIR", group="Model")
    stage: str = option("sft", "what is trained for: a file of stages/", shown="NAME")
    adapter: str | None = option(None, "folder of an adapter to start from; its base, rank and every tensor must match",
                                 shown="DIR")
    use_8bit: bool = option(False, "hold the frozen base in 8 bits; slower than bf16, about half the memory")
    use_4bit: bool = option(False, "hold the frozen base in 4 bits (NF4, double-quantised); about a quarter")
    # Data
    data_path: str | None = option(None, "training rows: a .json, .jsonl, .csv or .parquet file, a folder of them, "
                                   "ORG/NAME[:SPLIT] of the hub, or several, with how often an epoch sees each: "
                                   "a.json*2,b.jsonl*0.5", shown="ROWS", group="Data")
    eval_path: str | None = option(None, "rows to evaluate on, before, while and after training; as data_path, and each "
                                  "entry is a set of its own", shown="ROWS", steers=False)
    eval_split: float = option(0.0, "without eval_path, rows of data_path held out: a share below 1, or their number")
    test_path: str | None = option(None, "rows answered once, at the end of the run; as data_path", shown="ROWS", steers=False)
    image_root: str | None = option(None, "folder that picture paths are relative to and may not leave; "
                                    "default: the folder of the rows", shown="DIR", steers=False)
    allow_outside_images: bool = option(False, "open pictures outside image_root too", steers=False)
    prompt_template: str | None = option(None, "words that make a prompt of a table's row, its columns in braces: "
                                         "\"Describe {title}.\"; alone, the prompt of problems", shown="TEXT")
    response_template: str | None = option(None, "words that make the answer of a table's row", shown="TEXT")
    image_column: str | None = option(None, "column of a table with the path of the picture", shown="NAME")
    box_format: str = option("keep", "what boxes in the rows count: thousandths or fractions of a picture's sides, or its "
                             "pixels; they are rewritten to what the model was taught. keep: text as it stands", words=FORMATS)
    on_bad_row: str = option("stop", "what a row that cannot be used does to the run", words="stop skip", steers=False)
    labels: str = option("ours", "tokens with a loss: every answer and its stop token (ours), or as the model's makers "
                         "did it", words="ours official")
    tool_template: str = option("none", "render tools where the model's template cannot", words="none qwen")
    max_length: int | str = option("auto", "positions of one example at most, pictures included; auto: the longest row "
                                   "if it fits", words="auto", low=1)
    max_text_length: int | None = option(None, "text tokens of one example at most, with pictures on top; instead of "
                                         "max_length", low=1)
    max_pixels: int | None = option(None, "pixels of one picture at most, larger ones are shrunk; default: the model's",
                                    low=1)
    num_workers: int = option(2, "processes that open pictures", steers=False)
    image_cache: str | None = option(None, "folder that keeps resized pictures: opened faster from the second pass on, for "
                                     "about 0.5 MB each", shown="DIR", steers=False)
    # What is trained
    use_lora: bool = option(False, "train an adapter (of peft_type) on a frozen base instead of all weights",
                            group="What is trained")
    peft_type: str = option("LORA", "kind of adapter", words="LORA PREFIX_TUNING")
    num_virtual_tokens: int = option(20, "tokens of a PREFIX_TUNING prefix", low=1)
    lora_r: int = option(16, "rank of LoRA", low=1)
    lora_alpha: int = option(32, "LoRA is scaled by lora_alpha / lora_r")
    lora_dropout: float = option(0.05, "share of LoRA inputs dropped", high=0.9)
    lora_targets: list[str] = option(["auto"], "module names, separated by commas; auto: the family's default")
    lora_parts: list[str] = option(["auto"], "parts that get LoRA: language, projector, vision; auto: the family's",
                                   words="auto language projector vision")
    use_rslora: bool = option(False, "scale LoRA by lora_alpha / sqrt(lora_r)")
    use_dora: bool = option(False, "weight-decomposed LoRA")
    freeze_vision: bool = option(False, "leave the vision tower untrained")
    freeze_projector: bool = option(False, "leave the projector between vision and language untrained")
    # Optimisation
    learning_rate: float | None = option(None, "peak learning rate; default: the family's, by what is trained and the stage",
                                         group="Optimisation")
    optim: str = option("adamw", "optimizer; its states take 8 bytes a trained weight, 2 in 8 bits", words=OPTIMIZERS)
    lr_schedule: str = option("cosine", "shape of the learning rate after warm-up", words="cosine linear constant")
    warmup_steps: float = option(0.03, "updates of warm-up, or their share of the run when below 1")
    adam_beta2: float = option(0.999, "decay of the squared gradients that AdamW averages", high=0.99999)
    weight_decay: float = option(0.0, "decoupled weight decay of matrices")
    max_grad_norm: float = option(1.0, "gradient norm to clip to; 0: no clipping")
    skip_spikes: bool = option(False, "leave out updates whose loss or gradient norm is 6 sigma above the last 128")
    epochs: int | str = option("auto", "passes over the rows; auto: 3, more for few rows: 200 updates or 20 passes",
                               words="auto", low=1)
    max_steps: int | None = option(None, "updates; ends the run instead of epochs", low=1)
    batch_size: int = option(16, "examples: batch_size x grad_accum make one update; only the product counts, because "
                             "micro_tokens decides what runs at once", low=1)
    grad_accum: int = option(1, "factor of batch_size", low=1)
    # Precision and memory
    precision: str = option("auto", "computing type; auto: bf16 where the device has it", words="auto bf16 fp16 fp32",
                            group="Precision and memory")
    micro_tokens: int | str = option("auto", "tokens run at once: changes memory and speed, never the update; auto: by "
                                     "free memory", words="auto", low=1, steers=False)
    gradient_checkpointing: bool = option(True, "compute activations again in backward: slower, far less memory",
                                          steers=False)
    offload_activations: bool = option(False, "keep the activations between blocks in main memory", steers=False)
    # Saving and evaluating
    output_dir: str | None = option(None, "folder of the run; default: checkpoints/STAGE", shown="DIR", steers=False,
                                    group="Saving and evaluating")
    save_every: int | str = option("epoch", "updates between checkpoints", words="epoch no", low=1, steers=False)
    eval_every: int | str = option("epoch", "updates between evaluations", words="epoch no", low=1, steers=False)
    save_total_limit: int = option(2, "checkpoints kept, the newest ones", low=1, steers=False)
    logging_steps: int = option(1, "updates between lines on screen and of --report_to", low=1, steers=False)
    report_to: str = option("none", "also report to", words="none wandb tensorboard", steers=False)
    # Generation
    predict_with_generate: bool = option(False, "evaluate with generated answers too, not the loss alone", steers=False,
                                         group="Generation")
    eval_task: str = option("auto", "metrics of generated answers: a file of eval/tasks/, or module:function of your own",
                            shown="NAME", steers=False)
    max_new_tokens: int = option(512, "tokens of one generated answer at most", low=1, steers=False)
    # Run
    seed: int = option(0, "of the order of rows, new weights and dropout", high=2**32 - 1, group="Run")
    device: str = option("auto", "auto: the CUDA card if there is one", words="auto cpu cuda", steers=False)
    resume: str = option("no", "yes (newest checkpoint), a step number or a checkpoint folder", shown="yes|STEP|DIR",
                         steers=False, recorded=False)
    replay_step: int | None = option(None, "run the batch of that step of the run in output_dir again, row by row, without "
                                     "an update; its settings are read from the folder", low=1, steers=False,
                                     recorded=False)
    force: bool = option(False, "start although the plan says that the memory will not do", steers=False, recorded=False)
    demo: bool = option(False, "the built-in task, as without any argument", steers=False)
    config: str | None = option(None, "YAML file of these settings; flags win over it", shown="FILE", steers=False,
                                recorded=False, compare=False)
    print_config: bool = option(False, "print the resolved settings and stop", steers=False, recorded=False)
    stage_options: Any = None

    @property
    def length_limit(self) -> int | None:
        """max_length as a number of positions; None where it is auto."""
        return None if self.max_length == "auto" else self.max_length


@dataclass
class SeedKeys:
    """Keys of the seeds that say a setting in another shape; translate() and place_files() turn them into fields."""
    fp16: bool = option(False, "precision fp16")
    bf16: bool = option(False, "precision bf16")
    tune_vision: bool = option(True, "the opposite of freeze_vision")
    save_strategy: str = option("steps", "with save_steps: save_every", words="steps epoch no")
    save_steps: int = option(500, "with save_strategy: save_every", low=1)
    eval_strategy: str = option("steps", "with eval_steps: eval_every", words="steps epoch no")
    eval_steps: int = option(500, "with eval_strategy: eval_every", low=1)
    max_input_length: int = option(512, "text tokens; with max_output_length: max_text_length", low=1)
    max_output_length: int = option(512, "text tokens; with max_input_length: max_text_length", low=1)
    train_file: str = option("", "rows, relative to data_path")
    val_file: str = option("", "eval_path, relative to data_path")
    test_file: str = option("", "test_path, relative to data_path")
    bias: str = option("none", "biases are not trained beside LoRA", words="none")
    task_type: str = option("CAUSAL_LM", "the one task there is", words="CAUSAL_LM")


# The seeds' other names for fields, their other words for values, and what has no effect here, with the reason.
RENAMED = {old: new for new, old_names in {
    "base_model": "model_name_or_path", "eval_path": "eval_data_path", "batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps", "epochs": "num_train_epochs", "num_workers": "dataloader_num_workers",
    "lr_schedule": "lr_scheduler_type", "warmup_steps": "warmup_ratio", "max_length": "max_seq_length model_max_length",
    "lora_r": "r", "lora_targets": "target_modules lora_target_modules", "freeze_vision": "freezeV",
    "eval_strategy": "evaluation_strategy", "use_4bit": "q_lora load_in_4bit", "use_8bit": "load_in_8bit",
    "resume": "resume_from_checkpoint",
}.items() for old in old_names.split()}
SAME_WORD = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw_bnb_8bit": "adamw_8bit",
             "constant_with_warmup": "constant"}
IGNORED = {key: why for why, keys in {
    "one process trains on one device": "deepspeed local_rank device_map",
    "rows keep all their keys, and labels come from the label masker": "remove_unused_columns label_names",
    "every update is one line on screen and one in journal.jsonl": "log_level logging_strategy logging_dir",
    "the run is named after its output folder": "run_name",
    "evaluation packs rows like training does, in the same precision":
        "per_device_eval_batch_size bf16_full_eval fp16_full_eval prediction_loss_only",
    "a run always trains, and evaluates where it has rows for it": "do_train do_eval do_predict",
    "rows are read once, and pictures by num_workers processes": "num_proc dataloader_pin_memory",
    "AdamW runs with beta1 0.9 and epsilon 1e-8": "adam_beta1 adam_epsilon",
    "config.json says which family a model is and how it slices pictures": "llm_type max_slice_nums",
    "use_lora decides whether the language model's own weights are trained": "tune_llm",
    "precision decides the type": "torch_dtype",
    "code that comes with a model is never run": "trust_remote_code",
    "a non-finite loss never reaches the weights": "debug",
    "the code of CogAgent does not use it either": "combine",
}.items() for key in keys.split()}
POSITIONS = ("data_path", "base_model", "config", "resume")
NESTS = ("data_config", "training_args", "generation_config", "peft_config")
LORA_FIELDS = {"lora_r", "lora_alpha", "lora_dropout", "lora_targets", "lora_parts", "use_rslora", "use_dora"}
ADAPTER_FIELDS = LORA_FIELDS | {"adapter", "peft_type", "num_virtual_tokens"}


def fields_of(*owners: type) -> dict[str, dataclasses.Field]:
    """Fields by name of those dataclasses, without the one that is no setting (stage_options)."""
    return {field.name: field for owner in owners for field in dataclasses.fields(owner) if field.metadata}


def read_config(argv: list[str], stages: dict[str, type], demo: dict[str, Any] | None = None) -> Config:
    """The settings of a run: flags over the YAML file over the demo's settings (in a demo) over defaults.

    `argv` are the arguments after the program's name; none at all means the built-in task. `stages` maps the name of
    each stage to the dataclass of its own flags; an instance of the chosen one becomes config.stage_options. Raises
    UserError for anything that is not known, not possible, or said twice and differently.
    """
    return settle_all(read_flags(argv, stages) if argv else [Said("no arguments", "demo", True)], stages, demo)[0]


def settle_all(
    flags: list[Said], stages: dict[str, type], demo: dict[str, Any] | None = None
) -> tuple[Config, dict[str, Said]]:
    """The same of flags that are read, and what was said about each field that is no default."""
    last_said = {said.key: said.value for said in flags}
    path = last_said.get("config")
    own = os.path.join(last_said.get("output_dir", ""), "run.yaml")
    if "replay_step" in last_said and path is None and os.path.exists(own):
        path = own
    lines = read_yaml(path, NESTS) if path else []
    stage = next((said for said in reversed(lines + flags) if said.key == "stage"), Said("--stage", "stage", "sft"))
    if stage.value not in list(stages):
        raise UserError(f"{stage.where} {stage.value}: no such stage; the stages are {', '.join(sorted(stages))}")
    from_flags = settle(flags, stage.value, stages)
    settled = settle(lines, stage.value, stages) | from_flags
    if "demo" in settled and settled["demo"].value:
        settled = settle([Said("demo", *item) for item in (demo or {}).items()], stage.value, stages) | settled
    place_files(settled)
    of_adapter = [said for name, said in settled.items() if name in ADAPTER_FIELDS and said.value is not None]
    if of_adapter and "use_lora" not in settled:
        settled["use_lora"] = of_adapter[0]._replace(value=True)
        note(f"{of_adapter[0].where} is given, so use_lora is true")
    owner = stages[stage.value]
    defaults = [Said(f"--stage {stage.value}", *item) for item in getattr(owner, "defaults", {}).items()]
    values = {name: said.value for name, said in (settle(defaults, stage.value, stages) | settled).items()}
    options = {name: values.pop(name) for name in fields_of(owner) if name in values}
    config = Config(**values, stage_options=owner(**options))
    config.output_dir = config.output_dir or os.path.join("checkpoints", config.stage)
    check(config, from_flags)
    return config, settled


def read_flags(argv: list[str], stages: dict[str, type]) -> list[Said]:
    """What the command line says, in order, its positional form (DATA MODEL CONFIG [yes|STEP]) included."""
    said, rest = collect(build_parser(stages), argv)
    unknown = next((arg.partition("=")[0] for arg in rest if arg.startswith("-")), None)
    if unknown:
        raise unknown_key(unknown, unknown.strip("-"), {one.key: one.value for one in said}.get("stage", ""), stages)
    if rest and len(rest) not in (3, 4):
        raise UserError(f"{' '.join(rest)}: arguments without a flag are DATA MODEL CONFIG [yes|STEP], three or four")
    return [Said(name, name, value) for name, value in zip(POSITIONS, rest, strict=False)] + said


def build_parser(stages: dict[str, type]) -> Parser:
    """All fields as flags: those of Config by group, those of each stage, and the seeds' keys unlisted."""
    parser = Parser(
        usage="python train.py --base_model DIR --data_path FILE [flags]\n       python train.py DATA MODEL CONFIG "
              "[yes|STEP]\n       python train.py   (the built-in task)",
        description="Fine-tune a language or vision-language model on one device.", allow_abbrev=False,
        epilog="TrainingArguments' and LoraConfig's names (per_device_train_batch_size, ...) are read too, here and in YAML.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=44, width=120))
    add_settings(parser, stages)
    return parser


def add_settings(parser: Parser, stages: dict[str, type]) -> dict[str, argparse.Action]:
    """The flags of build_parser(), by name."""
    flags = {}
    for field in dataclasses.fields(Config)[:-1]:
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        flags[field.name] = add_flag(group, field.name, field)
    for stage, owner in stages.items():
        group = parser.add_argument_group(f"Only with --stage {stage}")
        for field in dataclasses.fields(owner):
            if field.name in flags:         # two stages may share a name
                flags[field.name].help += f"; --stage {stage}: {help_text(field)}"
            else:
                flags[field.name] = add_flag(group, field.name, field)
        for name, value in getattr(owner, "defaults", {}).items():
            flags[name].help += f"; --stage {stage}: {value}"
    known = fields_of(Config, SeedKeys)
    for name in [field.name for field in dataclasses.fields(SeedKeys)] + list(RENAMED):
        add_flag(parser, name, known[RENAMED.get(name, name)], listed=False)
    for name in IGNORED:
        add_flag(parser, name, None)
    return flags


def settle(source: list[Said], stage: str, stages: dict[str, type]) -> dict[str, Said]:
    """What one source (the flags, or the YAML file) says about each field, in our names and types."""
    known = fields_of(Config, SeedKeys, stages[stage])
    settled: dict[str, Said] = {}
    for where, key, value in source:
        name = RENAMED.get(key, key)
        if key in IGNORED:
            note(f"{where} {'' if value is None else value} has no effect: {IGNORED[key]}")
        elif name not in known:
            raise unknown_key(where, key, stage, stages)
        else:
            put(settled, name, Said(where, key, convert(where, value, known[name], SAME_WORD)))
    translate(settled)
    return settled


def translate(settled: dict[str, Said]) -> None:
    """Turn the seeds' keys of another shape into fields, in place."""
    for name in ("fp16", "bf16"):
        said = settled.pop(name, None)
        if said and said.value:
            put(settled, "precision", said._replace(value=name))
    if said := settled.pop("tune_vision", None):
        put(settled, "freeze_vision", said._replace(value=not said.value))
    for what in ("save", "eval"):
        strategy, steps = settled.pop(f"{what}_strategy", None), settled.pop(f"{what}_steps", None)
        if strategy and strategy.value != "steps":
            put(settled, f"{what}_every", strategy)
        elif strategy or steps:
            put(settled, f"{what}_every", steps or strategy._replace(value=500))    # 500: the Trainer's default
    lengths = [settled.pop(name) for name in ("max_input_length", "max_output_length") if name in settled]
    if len(lengths) == 1:
        raise UserError(f"{lengths[0].where} stands alone; give max_input_length and max_output_length together, or "
                        f"max_text_length, their sum")
    if lengths:
        put(settled, "max_text_length", lengths[0]._replace(value=sum(said.value for said in lengths)))
        note(f"{lengths[0].where} and max_output_length count text: {settled['max_text_length'].value} text tokens an "
             f"example at most, and the positions of its pictures on top")
    for name in ("bias", "task_type"):
        settled.pop(name, None)


def place_files(settled: dict[str, Said]) -> None:
    """Join the file names of CogAgent's data_config to the folder data_path; where that is a file, it is the rows."""
    data = settled.pop("data_path", None)
    folder = (data and data.value) or ""
    if os.path.isfile(folder):
        settled["data_path"], folder = data, os.path.dirname(folder)
    for key, name in (("train_file", "data_path"), ("val_file", "eval_path"), ("test_file", "test_path")):
        said = settled.pop(key, None)
        if said:
            settled.setdefault(name, said._replace(value=os.path.join(folder, said.value)))
    if data:
        settled.setdefault("data_path", data)


def unknown_key(where: str, key: str, stage: str, stages: dict[str, type]) -> UserError:
    """The error for a key that this run does not know: it belongs to another stage, or is near some other key."""
    owners = [name for name, owner in stages.items() if key in fields_of(owner)]
    if owners and stage:
        return UserError(f"{where} belongs to --stage {' or '.join(owners)}, and this run is --stage {stage}")
    own = [owner for name, owner in stages.items() if stage in (name, "")]
    names = [*fields_of(Config, SeedKeys, *own), *RENAMED, *IGNORED]
    nearest = difflib.get_close_matches(key.lower(), names, n=1, cutoff=0)[0]
    return UserError(f"{where} is no setting of train.py; the nearest is {nearest}, and --help lists all")


def check(config: Config, from_flags: dict[str, Said]) -> None:
    """Refuse combinations that cannot work, and flags that would have no effect."""
    lora = config.use_lora and config.peft_type == "LORA"
    prefix = config.use_lora and not lora
    bits = "use_8bit" if config.use_8bit else "use_4bit"
    idle = [name for name in from_flags if (name in LORA_FIELDS and not lora)
            or (name == "num_virtual_tokens" and not prefix)]
    missing = [name for name in ("base_model", "data_path") if getattr(config, name) is None and not config.demo]
    frozen = [part for part, is_frozen in (("vision", config.freeze_vision), ("projector", config.freeze_projector))
              if is_frozen and lora and part in config.lora_parts]
    fraction = [name for name in ("warmup_steps", "eval_split")
                if getattr(config, name) > 1 and not getattr(config, name).is_integer()]
    for refused, sentence in (
        (missing, "--{} is missing; at the least give --base_model DIR --data_path FILE"),
        (config.use_8bit and config.use_4bit, "use_8bit and use_4bit are both set; keep one"),
        ((config.use_8bit or config.use_4bit) and not config.use_lora,
         f"{bits} freezes the base, and nothing else would be trained; add --use_lora, or drop {bits}"),
        (config.adapter and not config.use_lora, "adapter is given, but use_lora is false; drop one of them"),
        (prefix and (config.use_dora or config.use_rslora),
         "use_dora and use_rslora are kinds of LoRA, but peft_type is PREFIX_TUNING; drop one of them"),
        (idle, "{} would have no effect: " + ("no LoRA is trained" if not lora else "peft_type is LORA")),
        (frozen, "freeze_{0} is set, but lora_parts puts LoRA into {0}; drop one of them"),
        (config.max_length != "auto" and config.max_text_length,
         "max_length counts pictures and max_text_length does not; give one of them"),
        (config.eval_path and config.eval_split, "eval_path names the rows to evaluate on; drop eval_split, or set it to 0"),
        (fraction, "{} is above 1 and no whole number; give a share below 1, or a whole number"),
    ):
        if refused:
            raise UserError(sentence.format(refused[0]) if isinstance(refused, list) else sentence)


def to_yaml(config: Config) -> str:
    """All settings that a run was made with, as a YAML file for --config that makes it again."""
    return yaml.safe_dump(select(config, "recorded"), sort_keys=False)


def trajectory(config: Config) -> dict[str, Any]:
    """The settings that decide which weights a run arrives at; a resumed run must have the same."""
    return select(config, "steers")


def select(config: Config, rule: str) -> dict[str, Any]:
    owners = [config] if config.stage_options is None else [config, config.stage_options]
    fields = ((owner, name, field) for owner in owners for name, field in fields_of(type(owner)).items())
    return {name: getattr(owner, name) for owner, name, field in fields if field.metadata[rule]}
