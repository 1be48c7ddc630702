"""Before the first step: the largest step and a save, all undone, so that a run that will fail fails in its first minute.

The longest rows run forward and backward, the optimizer allocates its state, a checkpoint is written, verified and read
back, and everything is put back as it was: weights, random state, folder. What is learnt becomes the forecast: GiB by part
against free memory, seconds per update, hours for the run. Costs about one update and one save.
"""

import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from model.head import CHUNK_BYTES
from model.shards import tensor_bytes
from training import checkpoint
from training.guards import is_out_of_memory
from training.memory import (
    GIB,
    STATE_BYTES,
    advise,
    cache_bytes,
    choose_micro_tokens,
    free_gib,
    peak_gib,
    plan,
    size_text,
    stack_from_config,
    weights_by_part,
)
from training.state import capture_random, restore_random

MICRO_TOKENS = {"cpu": 2048, "cuda": 16384}  # the longest packed row: more gains nothing
CACHE_TOKENS = {"cpu": 16384, "cuda": 2**21}  # of answers sampled at once; 128 prompts x 8 of 1,200 positions are 1.2 million


@dataclass
class Forecast:
    """What the run is expected to take: (part, GiB) lines that add up, free GiB, seconds an update, hours in all."""

    parts: list[tuple[str, float]]
    free_gib: float
    seconds_per_update: float
    hours: float
    advice: str | None

    def text(self) -> str:
        lines = [f"  {part:28s} {size_text(gib):>11s}" for part, gib in self.parts]
        total = sum(gib for _, gib in self.parts)
        lines.append(f"  {'sum, of ' + format(self.free_gib, '.1f') + ' GiB free':28s} {size_text(total):>11s}")
        hours = f"{self.hours:.1f} hours" if self.hours >= 1 else f"{self.hours * 60:.1f} minutes"
        lines.append(f"  {self.seconds_per_update:.2f} seconds an update, about {hours} for the run")
        return "\n".join(lines + ([f"  {self.advice}"] if self.advice else []))


class Plan:
    """The arithmetic of training/memory.py on one model and its settings, as a function of the packed row's length."""

    def __init__(self, model: Any, config: Any, num_answers: int = 0, held_bytes: dict[str, int] | None = None):
        """model is a model.family.Model with its adapter attached; config the run's settings; num_answers are sampled to a
        row before it is trained on; held_bytes are what the stage keeps, beside the model, by name."""
        self.model, self.config, self.num_answers, self.held_bytes = model, config, num_answers, held_bytes or {}
        self.cache_tokens = 0  # of the KV cache that answers are sampled with
        self.vocabulary = model.head_weight.shape[0]
        self.weights = weights_by_part(model.net.named_parameters(), model.family.part_of, self.vocabulary)
        self.element_bytes = 4 if "32" in str(self.model.head_weight.dtype) else 2  # the residual stream's
        self.cache_bytes = cache_bytes(stack_from_config(model.net.config.get_text_config(), 1), self.element_bytes)
        self.trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def parts(self, tokens: int) -> list[tuple[str, float]]:
        """(part, GiB) of a run whose packed rows have `tokens` positions."""
        net, config = self.model.net, self.config
        vision = getattr(net.config, "vision_config", None)
        trains_vision = any(self.model.family.part_of(name.removeprefix("net.")) != "language" for name, _ in self.trained)
        patches = tokens * getattr(vision, "spatial_merge_size", 1) ** 2
        own = self.held_bytes | {"KV cache of sampled answers": self.cache_tokens * self.cache_bytes}
        return [(part, size / GIB) for part, size in own.items() if size] + plan(
            self.weights,
            sum(p.numel() for _, p in self.trained),
            stack_from_config(net.config.get_text_config(), tokens),
            stack_from_config(vision, patches, trains_vision) if vision is not None else None,
            vocabulary=self.vocabulary,
            head_positions=min(tokens, CHUNK_BYTES // (4 * self.vocabulary)),
            state_bytes=STATE_BYTES.get(config.optim, 8.0),
            gradient_bytes=max((p.element_size() for _, p in self.trained), default=4),
            element_bytes=self.element_bytes,
            checkpointing=config.gradient_checkpointing,
            dropout=config.use_lora and config.lora_dropout > 0,
            cuda=self.model.device.type == "cuda",
        )

    def micro_tokens(self, longest: int) -> int:
        """The longest packed row: as asked for, or what fits the free memory. UserError if not even one row does."""
        if self.config.micro_tokens != "auto":
            return self.config.micro_tokens
        needed = lambda tokens: sum(gib for _, gib in self.parts(tokens))  # noqa: E731
        try:
            return choose_micro_tokens(needed, free_gib(self.model.device), longest, MICRO_TOKENS[self.model.device.type])
        except UserError as error:
            if not self.config.force:
                raise UserError(f"{error} --force tries it all the same") from None
        print(f"--force: one row of {longest} positions at a time, though the plan says that it will not fit")
        return longest

    def fit(self, longest: int) -> tuple[int, int]:
        """(micro_tokens, cache_tokens) for rows of `longest` positions without their answers: the packed row is chosen beside a
        KV cache for one prompt's answers, which then grows into half of the memory left (the prompts' forward has the rest)."""
        if not self.num_answers:
            return self.micro_tokens(longest), 0
        longest += self.config.max_new_tokens
        self.cache_tokens = self.num_answers * longest
        micro_tokens = self.micro_tokens(longest)
        left = 0.95 * free_gib(self.model.device) - sum(gib for _, gib in self.parts(micro_tokens))
        more = min(int(left / 2 * GIB / self.cache_bytes), CACHE_TOKENS[self.model.device.type] - self.cache_tokens)
        self.cache_tokens += max(0, more)
        return micro_tokens, self.cache_tokens

    def forecast(self, tokens: int, seconds: float, steps: int) -> Forecast:
        """The plan beside the seconds of one update that the rehearsal measured."""
        parts, free = self.parts(tokens), free_gib(self.model.device)
        advice = advise(self.weights, sum(gib for _, gib in parts), free)
        return Forecast(parts, free, seconds, seconds * steps / 3600, advice)


def rehearse(
    folder: Path,
    model,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[], tuple[int, float]],
    snapshot: Callable[[], tuple[dict, dict]],
) -> tuple[float, float]:
    """Run backward() (the longest rows; returns their positions and loss), an empty update, a save and a reload; undo
    all of it.

    Returns seconds per position of forward and backward, and seconds of the optimizer's update. Raises UserError where
    memory or disk will not do, and for a loss that is not finite.
    """
    random = capture_random()
    try:
        if model.device.type == "cuda":  # a card loads and chooses its kernels in the first pass: that one is not timed
            backward()
            optimizer.zero_grad(set_to_none=True)
        started = clock(model.device)
        positions, loss = backward()
        seconds = clock(model.device) - started
        allocate_state(optimizer)
        update_seconds = clock(model.device) - started - seconds
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"the longest rows do not fit: {peak_gib(model.device):.1f} GiB used, {free_gib(model.device):.1f} there; "
            "lower --max_pixels or --max_length, or use --use_lora with --use_8bit or --use_4bit"
        ) from None
    finally:
        optimizer.zero_grad(set_to_none=True)
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} before the first update: {find_non_finite(model)}")
    rehearse_save(folder, *snapshot())
    optimizer.state = defaultdict(dict)
    restore_random(random)
    return seconds / positions, update_seconds


def clock(device: torch.device) -> float:
    """time.perf_counter(), read when the card has finished what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def find_non_finite(model) -> str:
    """A clause that says where a loss that is not finite can come from."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            return f"the weight {name.removeprefix('net.')} holds numbers that are not finite; download the model again"
    return "the weights are finite, so the numbers between them overflow; use --precision bf16 or fp32"


def fill(examples: list, micro_tokens: int, step_rows: int) -> list:
    """The examples, over and over, until they fill one packed row or a step. UserError if there is none."""
    if not examples:
        raise UserError("none of the rows can be used; each one's fault is in bad_rows.jsonl of the output folder")
    picked, room = [examples[0]], micro_tokens - len(examples[0])
    for example in islice(cycle(examples), 1, step_rows):
        if len(example) <= room:
            picked.append(example)
            room -= len(example)
    return picked


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """An update with zero gradients at rate 0: allocates all of the optimizer's state and changes no weight."""
    if "Paged" in type(optimizer).__name__:  # what does not fit goes to the host, and its pages are never given back
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def rehearse_save(folder: Path, tensors: dict, jsons: dict) -> None:
    """Commit a checkpoint beside the real ones, verify and read it back, and remove it."""
    place = folder / ".rehearsal"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        problem = checkpoint.commit(place, 0, tensors, jsons)
        found = None if problem else checkpoint.newest_whole(place)
        if found is None:
            raise UserError(f"a checkpoint cannot be saved in {folder}: {problem or 'it does not read back whole'}")
        read, _ = checkpoint.load(found)
        for file, wanted in tensors.items():
            for name, tensor in wanted.items():
                if tensor_bytes(read[file][name]).tobytes() != tensor_bytes(tensor).tobytes():
                    raise UserError(f"{folder}: tensor {name} of a saved checkpoint reads back changed; use another disk")
    finally:
        shutil.rmtree(place, ignore_errors=True)
