"""One variant, measured in a process of its own: `python -m bench.variants TASK` (TASK as JSON; bench/train.py calls it).

Ours is the step of train.py from the same parts. The rivals are used as their documentation says, with the same rows in
the same steps, the same optimizer, clipping, precision and token-normalised loss, and without what only costs: logging,
saving, and TRL's gradient checkpointing, which it has on by default. One thread; the clock is the process's CPU
time, from the end of the first step (libraries prepare kernels in it) to the end of the last.
"""

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.workload import LEARNING_RATE, LORA_ALPHA, LORA_RANK, MICRO_BATCHES, ROWS_PER_STEP, SIZES, make_rows
from data.labels import NO_LOSS, Example

MICRO_ROWS = ROWS_PER_STEP // MICRO_BATCHES
LANGUAGE_LINEARS = r"(model\.|model\.language_model\.)layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"


@dataclass(frozen=True)
class Task:
    """What to run: a variant, what is trained (full, lora, lora_8bit), in which precision, on which rows."""

    variant: str
    method: str
    precision: str
    pictures: bool
    folder: str
    size: str
    steps: int
    device: str = "cpu"

    @property
    def storage(self) -> torch.dtype:
        """Of the base's weights, for everybody: fp32 where they are trained, bf16 where they are frozen."""
        return torch.float32 if self.method == "full" or self.precision == "fp32" else torch.bfloat16


class Meter:
    """Loss and CPU seconds at the end of each step; on a card, wall time once it is done with the step."""

    def __init__(self, device: str):
        self.device = device
        self.losses: list[float] = []
        self.ends: list[float] = []

    def step(self, loss: float) -> None:
        self.losses.append(loss)
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter() if self.device == "cuda" else time.process_time())


def peak_mib(device: str) -> float:
    """This process's largest resident memory (getrusage would count the parent's as well); of a card's, what torch reserved."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def seed_adapters(net: torch.nn.Module) -> None:
    """Give LoRA the same fp32 start in every variant: A by a generator of its own, B zero."""
    generator = torch.Generator().manual_seed(0)
    for name, p in sorted((n[n.index("layers.") :], p) for n, p in net.named_parameters() if "lora_" in n):
        p.data = torch.zeros_like(p, dtype=torch.float32)
        if "lora_A" in name:
            p.data = torch.empty(p.shape).normal_(std=p.shape[1] ** -0.5, generator=generator).to(p.device)


# ---- ours ---------------------------------------------------------------------------------------------------------------


def ours(task: Task, rows: list[Example], meter: Meter, checkpointing: bool = False) -> None:
    """The loop of train.py: a step's rows packed end to end, logits at supervised positions alone."""
    from lora import adapter
    from model import load_model
    from model.checkpointing import checkpoint_blocks
    from stages.sft import Flags, Stage
    from training import memory, optim, precision
    from training.rehearsal import MICRO_TOKENS

    memory.keep_freed_memory()
    dtypes = precision.choose(task.precision, torch.device(task.device))
    model, family = load_model(task.folder, "8bit" if task.method == "lora_8bit" else None, task.storage, task.device)
    adapter.attach(model, family, adapter.Settings(use_lora=task.method != "full", r=LORA_RANK, alpha=LORA_ALPHA))
    seed_adapters(model)
    if checkpointing:
        checkpoint_blocks([block for name in family.blocks for block in model.net.get_submodule(name)])
    stage = Stage(Flags(), model)
    optimizer = optim.build_optimizer("adamw", optim.parameter_groups(model, 0.0), LEARNING_RATE)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for start in range(0, len(rows), ROWS_PER_STEP):
        examples = rows[start : start + ROWS_PER_STEP]
        total, loss_sum = stage.denominator(examples), 0.0
        for row in stage.pack(examples, MICRO_TOKENS[task.device]):
            with dtypes.autocast():
                loss, _ = stage.loss(model, row.to(task.device), total)
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.step(loss_sum)


def ours_checkpointing(task: Task, rows: list[Example], meter: Meter) -> None:
    ours(task, rows, meter, checkpointing=True)


# ---- the others ---------------------------------------------------------------------------------------------------------


def load_rival(task: Task) -> torch.nn.Module:
    """transformers' model, as from_pretrained gives it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

    auto = AutoModelForImageTextToText if task.pictures else AutoModelForCausalLM
    quant = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)} if task.method == "lora_8bit" else {}
    model = auto.from_pretrained(task.folder, dtype=task.storage, **quant)
    model = model if quant else model.to(task.device)
    model.accepts_loss_kwargs = True  # Qwen2.5-VL's class says no, and HF Trainer then averages means of micro-batches
    return model


def lora_config():
    from peft import LoraConfig

    return LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=f".*{LANGUAGE_LINEARS}", task_type="CAUSAL_LM")


def load_trainable(task: Task) -> torch.nn.Module:
    """transformers' model, with peft's LoRA around it where the task has LoRA."""
    model = load_rival(task)
    if task.method != "full":
        from peft import get_peft_model, prepare_model_for_kbit_training

        if task.method == "lora_8bit":
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = get_peft_model(model, lora_config())
        seed_adapters(model)
    return model


def pad(examples: list[Example]) -> dict[str, torch.Tensor]:
    """A padded batch, as a collator makes it: right padding, masked; pictures one after another."""
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([e.input_ids for e in examples], batch_first=True)
    batch = {
        "input_ids": ids,
        "attention_mask": pad_sequence([torch.ones_like(e.input_ids) for e in examples], batch_first=True),
        "labels": pad_sequence([e.labels for e in examples], batch_first=True, padding_value=NO_LOSS),
    }
    if examples[0].pixels:
        marks = torch.zeros_like(ids)
        for row, example in zip(marks, examples, strict=True):
            for start, end in example.image_spans:
                row[start:end] = 1
        batch |= {"mm_token_type_ids": marks}  # without it transformers silently counts positions in one dimension
        batch |= {name: torch.cat([e.pixels[name] for e in examples]) for name in examples[0].pixels}
    return batch


def plain(task: Task, rows: list[Example], meter: Meter) -> None:
    """The loop that a tutorial shows: padded batches, the model's own loss over all logits."""
    model = load_trainable(task).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    for start in range(0, len(rows), ROWS_PER_STEP):
        examples = rows[start : start + ROWS_PER_STEP]
        total, loss_sum = sum(e.num_supervised for e in examples), 0.0
        for first in range(0, ROWS_PER_STEP, MICRO_ROWS):
            batch = {name: tensor.to(task.device) for name, tensor in pad(examples[first : first + MICRO_ROWS]).items()}
            with torch.autocast(task.device, dtype=torch.bfloat16, enabled=task.precision == "bf16"):
                loss = model(**batch, num_items_in_batch=total).loss
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.step(loss_sum)


def trainer_settings(task: Task, folder: str) -> dict:
    """The TrainingArguments of HF Trainer and TRL alike."""
    return dict(
        output_dir=folder, per_device_train_batch_size=MICRO_ROWS, gradient_accumulation_steps=MICRO_BATCHES,
        max_steps=task.steps, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
        optim="adamw_torch_fused", bf16=task.precision == "bf16", use_cpu=task.device == "cpu",
        train_sampling_strategy="sequential", gradient_checkpointing=False, logging_strategy="no", save_strategy="no",
        report_to="none", disable_tqdm=True, remove_unused_columns=False,
    )


def metered(trainer_class: type, meter: Meter) -> type:
    """The trainer class with the step's loss and end handed to the meter; it computes nothing else."""
    from transformers import TrainerCallback

    micro_losses: list[float] = []

    class Ends(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            meter.step(sum(micro_losses))
            micro_losses.clear()

    class Metered(trainer_class):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            micro_losses.append(loss.item())
            return loss

        def __init__(self, *args, **kwargs):
            super().__init__(*args, callbacks=[Ends()], **kwargs)

    return Metered


def hf_trainer(task: Task, rows: list[Example], meter: Meter) -> None:
    """transformers' Trainer with a padding collator."""
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(**trainer_settings(task, folder))
        metered(Trainer, meter)(model=load_trainable(task), args=settings, train_dataset=rows, data_collator=pad).train()


def trl(task: Task, rows: list[Example], meter: Meter, padding_free: bool = False) -> None:
    """TRL's SFTTrainer on tokenized rows."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    table = Dataset.from_list([{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in rows])
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            **trainer_settings(task, folder), padding_free=padding_free, max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        adapter = None if task.method == "full" else lora_config()
        trainer = metered(SFTTrainer, meter)(model=load_rival(task), args=settings, train_dataset=table, peft_config=adapter)
        seed_adapters(trainer.model)  # and fp32 again: TRL casts an 8-bit base's adapter to bf16
        trainer.train()


def trl_padding_free(task: Task, rows: list[Example], meter: Meter) -> None:
    trl(task, rows, meter, padding_free=True)


VARIANTS: dict[str, Callable[[Task, list[Example], Meter], None]] = {
    function.__name__: function for function in (ours, ours_checkpointing, plain, hf_trainer, trl, trl_padding_free)
}


def measure(task: Task) -> dict:
    """Run the task; {"losses", "seconds", "tokens", "peak_mib"}, or {"missing": ...} where its library is absent."""
    from model.family import find_family

    if task.device == "cpu":
        torch.set_num_threads(1)
    rows = make_rows(find_family(task.folder), SIZES[task.size], task.steps * ROWS_PER_STEP, task.pictures)
    meter = Meter(task.device)
    try:
        VARIANTS[task.variant](task, rows, meter)
    except ImportError as error:
        return {"missing": str(error)}
    counted = rows[ROWS_PER_STEP:]  # the first step is not timed
    return {
        "losses": meter.losses,
        "seconds": meter.ends[-1] - meter.ends[0],
        "tokens": sum(e.num_supervised for e in counted),
        "positions": sum(map(len, counted)),
        "peak_mib": peak_mib(task.device),
    }


if __name__ == "__main__":
    print(json.dumps(measure(Task(**json.loads(sys.argv[1])))))
