"""Settings: the seeds' own commands and files mean what they meant there, and nothing is ignored without a word."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from data.errors import UserError
from stages import list_stages
from training import config as settings
from training.config import Config, fields_of, read_config, to_yaml, trajectory
from training.options import option

ROOT = Path(__file__).resolve().parent.parent
MINIMAL = ["--base_model", "base", "--data_path", "rows.jsonl"]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Plain:
    """A stage without flags of its own."""


@dataclass
class Pairs:
    beta: float = option(0.1, "strength of the pull to the reference")
    pair_loss: str = option("sigmoid", "loss of a pair", words="sigmoid ipo")


@dataclass
class Rollouts:
    beta: float = option(0.05, "strength of the penalty, 100 % of it")


STAGES = {"sft": Plain, "dpo": Pairs, "rloo": Rollouts}

# The command line that others may rely on: a flag that goes, comes or changes its name must be changed here too.
FLAGS = """
adam_beta2 adapter allow_outside_images base_model batch_size box_format config data_path demo device epochs eval_every
eval_path eval_split eval_task force freeze_projector freeze_vision grad_accum gradient_checkpointing image_cache image_column
image_root labels learning_rate logging_steps lora_alpha lora_dropout lora_parts lora_r lora_targets lr_schedule max_grad_norm
max_length max_new_tokens max_pixels max_steps max_text_length micro_tokens num_virtual_tokens num_workers offload_activations
on_bad_row optim output_dir peft_type precision predict_with_generate print_config prompt_template replay_step report_to
response_template resume save_every save_total_limit seed skip_spikes stage test_path tool_template use_4bit use_8bit use_dora
use_lora use_rslora warmup_steps weight_decay
""".split()

COGAGENT_LORA = """
data_config:
  train_file: train.jsonl
  val_file: dev.jsonl
  test_file: dev.jsonl
  num_proc: 1
combine: True
freezeV: False
max_input_length: 512
max_output_length: 512
training_args:
  output_dir: ./output
  max_steps: 3000
  learning_rate: 5e-4
  per_device_train_batch_size: 1
  dataloader_num_workers: 16
  remove_unused_columns: false
  save_strategy: steps
  save_steps: 500
  log_level: info
  logging_strategy: steps
  logging_steps: 10
  per_device_eval_batch_size: 4
  eval_strategy: steps
  eval_steps: 400
  predict_with_generate: true
  generation_config:
    max_new_tokens: 256
  deepspeed: configs/ds_zero_3.json
peft_config:
  peft_type: LORA
  task_type: CAUSAL_LM
  r: 8
  lora_alpha: 32
  lora_dropout: 0.1
  target_modules: ["query_key_value"]
"""

MINICPM_LORA = r"""
--model_name_or_path openbmb/MiniCPM-Llama3-V-2_5 --llm_type llama3 --data_path train.json --eval_data_path test.json
--remove_unused_columns false --label_names labels --prediction_loss_only false --bf16 true --bf16_full_eval true
--fp16 false --fp16_full_eval false --do_train --do_eval --dataloader_pin_memory false --dataloader_num_workers 1
--tune_vision true --tune_llm false --use_lora true --q_lora false
--lora_target_modules llm\.model\.layers\.\d+\.self_attn\.(q_proj|v_proj|k_proj|o_proj) --model_max_length 2048
--max_slice_nums 9 --max_steps 80000 --eval_steps 1000 --output_dir output/lora --logging_dir output/lora
--logging_strategy steps --per_device_train_batch_size 4 --per_device_eval_batch_size 1 --gradient_accumulation_steps 2
--evaluation_strategy steps --save_strategy steps --save_steps 1000 --save_total_limit 10 --learning_rate 1e-6
--weight_decay 0.1 --adam_beta2 0.95 --warmup_ratio 0.01 --lr_scheduler_type cosine --logging_steps 1
--gradient_checkpointing true --deepspeed ds_config_zero2.json --report_to tensorboard
""".split()

PROXY_LITE_ARGUMENTS = {
    "output_dir": "./finetuned-proxy-lite", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4,
    "learning_rate": 2e-5, "num_train_epochs": 3, "fp16": True, "save_strategy": "epoch",
    "evaluation_strategy": "epoch", "r": 16, "lora_alpha": 32, "target_modules": SEVEN, "lora_dropout": 0.05,
    "bias": "none", "task_type": "CAUSAL_LM",
}

PHI3_ARGUMENTS = {
    "output_dir": "./phi3-vision-finetuned", "num_train_epochs": 3, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4, "warmup_steps": 100, "logging_steps": 10, "save_steps": 500, "eval_steps": 500,
    "evaluation_strategy": "steps", "learning_rate": 2e-4, "fp16": True, "gradient_checkpointing": True,
    "optim": "paged_adamw_8bit", "report_to": "wandb", "run_name": "phi3-vision-finetune-burberry",
    "max_seq_length": 512, "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05,
    "bias": "none", "task_type": "CAUSAL_LM",
}


def read(*flags, stages=STAGES, **keywords) -> Config:
    return read_config([*MINIMAL, *flags], stages, **keywords)


def write_yaml(folder: Path, content: dict | str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def differing(config: Config) -> dict:
    """The fields that are not as in the shortest command."""
    plain = read()
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(Config) if field.compare
            and getattr(config, field.name) != getattr(plain, field.name)}


def refusal(*flags) -> str:
    with pytest.raises(UserError) as caught:
        read(*flags)
    return str(caught.value)


def test_defaults():
    expected = dict(
        batch_size=16, grad_accum=1, epochs="auto", lora_r=16, lora_alpha=32, lora_dropout=0.05, lr_schedule="cosine",
        warmup_steps=0.03, weight_decay=0, max_grad_norm=1.0, precision="auto", max_length="auto", micro_tokens="auto",
        seed=0, num_workers=2, save_every="epoch", eval_every="epoch", learning_rate=None, stage="sft",
        stage_options=Plain(), output_dir="checkpoints/sft", use_lora=False, demo=False)
    config = read()
    assert {name: getattr(config, name) for name in expected} == expected


# --- the seeds, as they are written ---------------------------------------------------------------------------------

def test_proxy_lite_command():
    config = read_config(["--base_model", "convergence-ai/proxy-lite-3b", "--data_path", "./your_dataset",
                          "--output_dir", "./finetuned-model", "--use_lora", "True", "--use_8bit", "True"], STAGES)
    assert differing(config) == dict(base_model="convergence-ai/proxy-lite-3b", data_path="./your_dataset",
                                     output_dir="./finetuned-model", use_lora=True, use_8bit=True)


def test_proxy_lite_training_arguments(tmp_path, capsys):
    config = read("--config", write_yaml(tmp_path, PROXY_LITE_ARGUMENTS))
    assert differing(config) == dict(output_dir="./finetuned-proxy-lite", epochs=3, batch_size=4, grad_accum=4,
                                     precision="fp16", learning_rate=2e-5, lora_targets=SEVEN, use_lora=True)
    assert "use_lora is true" in capsys.readouterr().err


def test_phi3_training_arguments(tmp_path, capsys):
    config = read("--config", write_yaml(tmp_path, PHI3_ARGUMENTS))
    assert differing(config) == dict(
        epochs=3,
        output_dir="./phi3-vision-finetuned", batch_size=4, grad_accum=4, warmup_steps=100, logging_steps=10,
        save_every=500, eval_every=500, learning_rate=2e-4, precision="fp16", optim="paged_adamw_8bit",
        report_to="wandb", max_length=512, lora_targets=["q_proj", "v_proj"], use_lora=True)
    assert "run_name" in capsys.readouterr().err


def test_minicpm_command(capsys):
    config = read_config(MINICPM_LORA, STAGES)
    assert differing(config) == dict(
        base_model="openbmb/MiniCPM-Llama3-V-2_5", data_path="train.json", eval_path="test.json", precision="bf16",
        num_workers=1, use_lora=True,
        lora_targets=[r"llm\.model\.layers\.\d+\.self_attn\.(q_proj|v_proj|k_proj|o_proj)"],
        max_length=2048, max_steps=80000, eval_every=1000, output_dir="output/lora", batch_size=4, grad_accum=2,
        save_every=1000, save_total_limit=10, learning_rate=1e-6, weight_decay=0.1, adam_beta2=0.95, warmup_steps=0.01,
        report_to="tensorboard")
    notes = capsys.readouterr().err
    for key in ("llm_type", "label_names", "do_train", "deepspeed", "tune_llm", "max_slice_nums"):
        assert f"--{key}" in notes


@pytest.mark.parametrize("resume", [[], ["yes"], ["600"]])
def test_cogagent_positional_form(tmp_path, capsys, resume):
    recipe = write_yaml(tmp_path, COGAGENT_LORA)
    config = read_config(["data/CogAgentData/", "THUDM/cogagent-9b-20241220", recipe, *resume], STAGES)
    assert differing(config) == dict(
        base_model="THUDM/cogagent-9b-20241220", data_path="data/CogAgentData/train.jsonl",
        eval_path="data/CogAgentData/dev.jsonl", test_path="data/CogAgentData/dev.jsonl", max_text_length=1024,
        output_dir="./output", max_steps=3000, learning_rate=5e-4, batch_size=1, num_workers=16, save_every=500,
        eval_every=400, logging_steps=10, predict_with_generate=True, max_new_tokens=256, use_lora=True, lora_r=8,
        lora_dropout=0.1, lora_targets=["query_key_value"]) | ({"resume": resume[0]} if resume else {})
    notes = capsys.readouterr().err
    for key in ("num_proc", "combine", "remove_unused_columns", "log_level", "per_device_eval_batch_size", "deepspeed"):
        assert key in notes
    assert "1024 text tokens" in notes


def test_cogagent_prefix_tuning_and_full(tmp_path):
    prefix = yaml.safe_load(COGAGENT_LORA)
    prefix["peft_config"] = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 64}
    config = read_config(["data", "model", write_yaml(tmp_path, prefix)], STAGES)
    assert (config.use_lora, config.peft_type, config.num_virtual_tokens) == (True, "PREFIX_TUNING", 64)
    del prefix["peft_config"]
    prefix["freezeV"] = True
    config = read_config(["data", "model", write_yaml(tmp_path, prefix), "--max_steps", "5"], STAGES)
    assert (config.use_lora, config.freeze_vision, config.max_steps) == (False, True, 5)


def test_data_files_follow_the_data_argument(tmp_path):
    rows = tmp_path / "mine.jsonl"
    rows.write_text("{}\n")
    config = read_config([str(rows), "model", write_yaml(tmp_path, COGAGENT_LORA)], STAGES)
    assert config.data_path == str(rows)                     # a file is the rows; its neighbours are found beside it
    assert config.eval_path == str(tmp_path / "dev.jsonl")
    config = read("--eval_path", "other.jsonl", "--config", write_yaml(tmp_path, COGAGENT_LORA))
    assert (config.eval_path, config.test_path) == ("other.jsonl", "rows.jsonl/dev.jsonl")


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_read_and_start_with_their_command(recipe, capsys):
    command = recipe.read_text().splitlines()[0].removeprefix("# python train.py ").split()
    assert command[:2] == ["--config", f"configs/{recipe.name}"]
    config = read_config(["--config", str(recipe), *command[2:]], {name: stage.Flags for name, stage in list_stages().items()})
    assert config.base_model and config.output_dir
    said = capsys.readouterr().err                          # nothing but what the lengths of CogAgent's guide count
    assert said.count("note:") == said.count("count text: 1024 text tokens") == (config.max_text_length is not None)


@pytest.mark.parametrize("recipe, guide, more, changed", [
    ("proxy-lite-3b-lora", PROXY_LITE_ARGUMENTS, ["--use_8bit"], "precision eval_split"),
    ("minicpm-v-2.5-guicourse-lora", MINICPM_LORA, [],
     "lora_r lora_alpha lora_targets use_8bit eval_path num_workers report_to"),
    ("cogagent-9b-lora", COGAGENT_LORA, ["--eval_every", "500", "--max_new_tokens", "512"],
     "lora_parts use_8bit precision eval_split eval_path test_path num_workers"),
    ("phi3-vision-lora", PHI3_ARGUMENTS, [], "lora_targets max_length precision eval_split report_to"),
])
def test_shipped_recipes_have_the_values_of_their_guides(tmp_path, recipe, guide, more, changed):
    """And differ in nothing but what their comments name."""
    ours = read("--config", str(ROOT / f"configs/{recipe}.yaml"))
    said = guide if isinstance(guide, list) else ["--config", write_yaml(tmp_path, guide), *MINIMAL]
    theirs = read_config([*said, *more], STAGES)
    names = {name for name in differing(ours) | differing(theirs) if getattr(ours, name) != getattr(theirs, name)}
    assert names - {"base_model", "data_path", "output_dir"} == set(changed.split())


# --- aliases --------------------------------------------------------------------------------------------------------

def test_every_alias_is_a_flag_and_a_key_of_a_field():
    known = fields_of(Config, settings.SeedKeys)
    assert set(settings.RENAMED.values()) <= set(known)
    names = [*known, *settings.RENAMED, *settings.IGNORED]
    assert len(names) == len(set(names))
    strings = settings.build_parser(STAGES)._option_string_actions
    assert not [name for name in names if f"--{name}" not in strings]


@pytest.mark.parametrize("key", sorted(settings.IGNORED))
def test_an_ignored_key_says_why(key, capsys):
    assert differing(read(f"--{key}", "anything")) == {}
    note = capsys.readouterr().err
    assert key in note and settings.IGNORED[key] in note and note.count("\n") == 1


@pytest.mark.parametrize("flags, expected", [
    ("--save_strategy no --eval_strategy no", {"save_every": "no", "eval_every": "no"}),
    ("--save_strategy steps", {"save_every": 500}),
    ("--save_strategy epoch --save_steps 100", {}),
    ("--save_steps 100", {"save_every": 100}),
    ("--bf16", {"precision": "bf16"}),
    ("--bf16 true --fp16 false", {"precision": "bf16"}),
    ("--bf16 false", {}),
    ("--tune_vision false", {"freeze_vision": True}),
    ("--freezeV", {"freeze_vision": True}),
    ("--optim adamw_torch --lr_scheduler_type constant_with_warmup", {"lr_schedule": "constant"}),
    ("--q_lora true --use_lora true", {"use_4bit": True, "use_lora": True}),
    ("--learning_rate none", {}),
    ("--batch-size 4 --grad-accum=2", {"batch_size": 4, "grad_accum": 2}),
    ("--lora_targets q_proj,v_proj", {"lora_targets": ["q_proj", "v_proj"], "use_lora": True}),
    ("--lora_targets q_proj v_proj", {"lora_targets": ["q_proj", "v_proj"], "use_lora": True}),
    ("--lora_parts language,vision --use_lora", {"lora_parts": ["language", "vision"], "use_lora": True}),
    ("--precision BF16 --epochs 2.0", {"precision": "bf16", "epochs": 2}),
    ("--adapter runs/sft", {"adapter": "runs/sft", "use_lora": True}),
])
def test_spellings(flags, expected):
    assert differing(read(*flags.split())) == expected


def test_yaml_booleans_that_are_words(tmp_path):
    text = "save_strategy: no\neval_every: no\nresume: yes\nlearning_rate: 5e-4\nmax_steps: null"
    recipe = write_yaml(tmp_path, text)
    expected = dict(save_every="no", eval_every="no", resume="yes", learning_rate=5e-4)
    assert differing(read("--config", recipe)) == expected


# --- flags, files, defaults -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, expected", [
    ("--use_lora", True), ("--use_lora True", True), ("--use_lora true", True), ("--use_lora=TRUE", True),
    ("--use_lora false", False), ("--use_lora False", False), ("--no_use_lora", False), ("--no-use-lora", False),
])
def test_boolean_forms(flags, expected):
    assert read(*flags.split()).use_lora is expected


@pytest.mark.parametrize("text", ["yes", "1", "0", "", "Truee"])
def test_other_booleans_are_refused(text):
    assert refusal(f"--use_lora={text}").startswith(f"--use_lora {text}: expected true or false")


def test_flags_win_over_yaml_over_defaults(tmp_path):
    recipe = write_yaml(tmp_path, {"batch_size": 2, "per_device_train_batch_size": 2, "epochs": 7, "use_lora": True})
    config = read("--config", recipe, "--batch_size", "5", "--use_lora", "false")
    assert differing(config) == {"batch_size": 5, "epochs": 7}


@pytest.mark.parametrize("flags, words", [
    ("--lerning_rate 1", ["--lerning_rate", "learning_rate"]),
    ("--per-device-batch-size 4", ["--per_device_batch_size", "per_device_"]),
    ("--batch_size four", ["--batch_size four", "integer >= 1"]),
    ("--batch_size 0", ["--batch_size 0", "integer >= 1"]),
    ("--batch_size 1.5", ["1.5", "integer >= 1"]),
    ("--per_device_train_batch_size -2", ["--per_device_train_batch_size -2", "integer >= 1"]),
    ("--learning_rate -1", ["--learning_rate -1", "number >= 0"]),
    ("--learning_rate nan", ["--learning_rate nan", "number >= 0"]),
    ("--lora_dropout 1", ["--lora_dropout 1", "0 to 0.9"]),
    ("--precision fp8", ["--precision fp8", "auto or bf16 or fp16 or fp32"]),
    ("--save_every often", ["epoch or no or integer >= 1"]),
    ("--lora_parts tongue", ["--lora_parts", "auto or language or projector or vision"]),
    ("--bias all", ["--bias all", "none"]),
    ("--batch_size", ["--batch_size", "expected one argument"]),
    ("--stage pretrain", ["pretrain", "dpo, rloo, sft"]),
    ("--batch_size 4 --per_device_train_batch_size 8", ["--batch_size and --per_device_train_batch_size", "4 and 8"]),
    ("--seed 1 --seed 2", ["--seed", "1 and 2"]),
    ("--fp16 --bf16", ["--fp16 and --bf16", "precision"]),
    ("--warmup_steps 0 --warmup_ratio 0.1", ["--warmup_steps and --warmup_ratio"]),
    ("--max_input_length 512", ["--max_input_length", "max_output_length"]),
    ("--use_lora --use_8bit --use_4bit", ["use_8bit and use_4bit"]),
    ("--use_8bit", ["use_8bit", "add --use_lora"]),
    ("--use_4bit True", ["use_4bit", "add --use_lora"]),
    ("--peft_type PREFIX_TUNING --use_dora", ["use_dora", "PREFIX_TUNING"]),
    ("--peft_type PREFIX_TUNING --lora_r 8", ["lora_r would have no effect"]),
    ("--use_lora --num_virtual_tokens 8", ["num_virtual_tokens would have no effect"]),
    ("--use_lora false --lora_r 8", ["lora_r would have no effect"]),
    ("--use_lora false --adapter runs/sft", ["adapter", "use_lora is false"]),
    ("--lora_parts vision --freeze_vision", ["freeze_vision", "lora_parts"]),
    ("--max_length 512 --max_text_length 512", ["max_length", "max_text_length"]),
    ("--eval_path dev.jsonl --eval_split 0.1", ["eval_path", "eval_split"]),
    ("--warmup_steps 1.5", ["warmup_steps", "whole number"]),
    ("DATA", ["DATA", "DATA MODEL CONFIG"]),
    ("--config missing.yaml", ["missing.yaml", "No such file"]),
])
def test_refusals_name_what_and_what_to_do(flags, words):
    message = refusal(*flags.split())
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("text, words", [
    ("batchsize: 4", ["recipe.yaml: batchsize", "batch_size"]),
    ("training_args:\n  max_step: 4", ["training_args.max_step", "max_steps"]),
    ("optimizer_args:\n  lr: 1", ["optimizer_args"]),
    ("lora_r: [1, 2]", ["lora_r", "integer >= 1"]),
    ("lora_r: true", ["lora_r", "integer >= 1"]),
    ("base_model:\n  name: x", ["base_model", "expected text"]),
    ("epochs: 1\nnum_train_epochs: 2", ["recipe.yaml: epochs and", "recipe.yaml: num_train_epochs", "1 and 2"]),
    ("epochs: [1", ["recipe.yaml is not YAML", "line"]),
    ("- epochs", ["recipe.yaml", "key: value"]),
    ("", ["recipe.yaml", "key: value"]),
    ("!!python/object/apply:os.getcwd []", ["recipe.yaml is not YAML"]),
])
def test_refusals_in_yaml_name_the_file(tmp_path, text, words):
    message = refusal("--config", write_yaml(tmp_path, text))
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("missing", ["base_model", "data_path"])
def test_a_run_needs_a_model_and_rows(missing):
    flags = [part for name in ("base_model", "data_path") if name != missing for part in (f"--{name}", "x")]
    with pytest.raises(UserError, match=f"--{missing} is missing"):
        read_config(flags, STAGES)


def test_no_arguments_are_the_demo_whose_settings_are_defaults():
    assert read_config([], STAGES).demo
    demo = {"base_model": "tiny", "epochs": 1, "lora_r": 4}
    assert read_config([], STAGES, demo).lora_r == 4
    assert read_config(["--demo", "--lora_r", "2"], STAGES, demo).lora_r == 2
    assert read("--seed", "1", demo=demo).epochs == "auto"


# --- stages ---------------------------------------------------------------------------------------------------------

def test_stage_options_belong_to_their_stage(tmp_path):
    config = read("--stage", "dpo", "--beta", "0.3")
    assert config.stage_options == Pairs(beta=0.3) and config.output_dir == "checkpoints/dpo"
    assert read("--stage", "rloo").stage_options == Rollouts(beta=0.05)
    assert read("--config", write_yaml(tmp_path, {"stage": "dpo", "pair_loss": "ipo"})).stage_options.pair_loss == "ipo"
    assert "belongs to --stage dpo, and this run is --stage sft" in refusal("--pair_loss", "ipo")
    assert "belongs to --stage dpo or rloo" in refusal("--beta", "1")
    assert "sigmoid or ipo" in refusal("--stage", "dpo", "--pair_loss", "hinge")


# --- what a run writes down -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [
    "", "--use_lora --use_8bit --learning_rate 2e-5 --lora_targets q_proj,v_proj --save_every 10 --max_length 512",
    "--peft_type PREFIX_TUNING --num_virtual_tokens 8 --seed 3",
    "--stage dpo --beta 0.2 --pair_loss ipo --adapter runs/sft",
    "--demo --max_steps 3 --eval_every no --max_input_length 5 --max_output_length 6",
])
def test_run_yaml_reproduces_the_settings(tmp_path, flags):
    config = read(*flags.split())
    again = read_config(["--config", write_yaml(tmp_path, to_yaml(config))], STAGES)
    assert again == config
    assert to_yaml(again) == to_yaml(config)


def test_run_yaml_leaves_out_what_belongs_to_one_start():
    written = yaml.safe_load(to_yaml(read("--resume", "yes", "--force", "--print_config")))
    assert set(FLAGS) - set(written) == {"resume", "force", "print_config", "config", "replay_step"}


def test_trajectory_changes_with_what_is_learned_and_with_nothing_else():
    base = trajectory(read())
    for flags in ("--learning_rate 1e-3", "--seed 1", "--use_lora", "--max_steps 9", "--labels official"):
        assert trajectory(read(*flags.split())) != base, flags
    for flags in ("--output_dir x", "--save_every 5", "--micro_tokens 64", "--resume yes", "--logging_steps 7",
                  "--no_gradient_checkpointing", "--num_workers 0", "--eval_path dev.jsonl"):
        assert trajectory(read(*flags.split())) == base, flags
    assert trajectory(read("--stage", "dpo", "--beta", "0.2"))["beta"] == 0.2


# --- the command line -----------------------------------------------------------------------------------------------

def test_command_line_is_frozen():
    assert sorted(fields_of(Config)) == FLAGS


def test_help_shows_every_setting_and_every_stage_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        read_config(["--help"], STAGES)
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert not [name for name in FLAGS if f"--{name} " not in text]
    assert "Only with --stage dpo" in text and "--stage rloo: strength of the penalty, 100 % of it" in text
    assert "--per_device_train_batch_size" not in text


def test_help_imports_nothing_heavy():
    heavy = "torch transformers datasets bitsandbytes peft PIL numpy".split()
    program = ("import sys\nfrom training.config import read_config\ntry:\n    read_config(['--help'], {})\n"
               f"except SystemExit:\n    print([name for name in {heavy} if name in sys.modules], file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_words_are_those_the_code_knows():
    from training.optim import OPTIMIZERS, SCHEDULES
    from training.precision import TABLE

    words = {name: field.metadata["words"] for name, field in fields_of(Config).items()}
    assert set(words["optim"]) == set(OPTIMIZERS)
    assert set(words["lr_schedule"]) == set(SCHEDULES)
    assert set(words["precision"]) == {"auto", *TABLE}
