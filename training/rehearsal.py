"""Before the first step: the worst of it once, all undone, so that a run that will fail fails in its first minute.

The longest rows run forward and backward, the optimizer allocates its state, a checkpoint is written, verified and read
back, and everything is put back as it was: weights, random state, folder. What is learnt becomes the forecast: GiB by part
against free memory, seconds per update, hours for the run. Costs about one update and one save.
"""

import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from model.head import CHUNK_BYTES
from training import checkpoint
from training.guards import is_out_of_memory
from training.memory import (
    STATE_BYTES,
    advise,
    choose_micro_tokens,
    free_gib,
    peak_gib,
    plan,
    stack_from_config,
    weights_by_part,
)
from training.state import capture_random, restore_random

MICRO_TOKENS = {"cpu": 4096, "cuda": 16384}  # the longest packed row: more gains nothing


@dataclass
class Forecast:
    """What the run is expected to take: (part, GiB) lines that add up, free GiB, seconds an update, hours in all."""

    parts: list[tuple[str, float]]
    free_gib: float
    seconds_per_update: float
    hours: float
    advice: str | None

    def text(self) -> str:
        lines = [f"  {part:28s} {gib:7.2f} GiB" for part, gib in self.parts]
        total = sum(gib for _, gib in self.parts)
        lines.append(f"  {'sum, of ' + format(self.free_gib, '.1f') + ' GiB free':28s} {total:7.2f} GiB")
        hours = f"{self.hours:.1f} hours" if self.hours >= 1 else f"{self.hours * 60:.1f} minutes"
        lines.append(f"  {self.seconds_per_update:.2f} seconds an update, about {hours} for the run")
        return "\n".join(lines + ([f"  {self.advice}"] if self.advice else []))


class Plan:
    """The arithmetic of training/memory.py on one model and its settings, as a function of the packed row's length."""

    def __init__(self, model: Any, config: Any):
        """model is a model.family.Model with its adapter attached; config the run's settings."""
        self.model, self.config = model, config
        self.vocabulary = model.head_weight.shape[0]
        self.weights = weights_by_part(model.net.named_parameters(), model.family.part_of, self.vocabulary)
        self.trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def parts(self, tokens: int) -> list[tuple[str, float]]:
        """(part, GiB) of a run whose packed rows have `tokens` positions."""
        net, config = self.model.net, self.config
        vision = getattr(net.config, "vision_config", None)
        trains_vision = any(self.model.family.part_of(name.removeprefix("net.")) != "language" for name, _ in self.trained)
        patches = tokens * getattr(vision, "spatial_merge_size", 1) ** 2
        return plan(
            self.weights,
            sum(p.numel() for _, p in self.trained),
            stack_from_config(net.config.get_text_config(), tokens),
            stack_from_config(vision, patches, trains_vision) if vision is not None else None,
            vocabulary=self.vocabulary,
            head_positions=min(tokens, CHUNK_BYTES // (4 * self.vocabulary)),
            state_bytes=STATE_BYTES.get(config.optim, 8.0),
            gradient_bytes=max((p.element_size() for _, p in self.trained), default=4),
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

    def forecast(self, tokens: int, seconds_per_position: float, positions_per_step: float, steps: int) -> Forecast:
        """The plan beside what the rehearsal measured."""
        parts, free = self.parts(tokens), free_gib(self.model.device)
        seconds = seconds_per_position * positions_per_step
        advice = advise(self.weights, sum(gib for _, gib in parts), free)
        return Forecast(parts, free, seconds, seconds * steps / 3600, advice)


def rehearse(
    folder: Path,
    model,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[], int],
    snapshot: Callable[[], tuple[dict, dict]],
) -> float:
    """Run backward() (the longest rows; returns their positions), an empty update, a save and a reload; undo all of it.

    Returns seconds per position of forward and backward. Raises UserError where memory or disk will not do.
    """
    random = capture_random()
    started = time.perf_counter()
    try:
        positions = backward()
        seconds = time.perf_counter() - started
        allocate_state(optimizer)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"the longest rows do not fit: {peak_gib(model.device):.1f} GiB used, {free_gib(model.device):.1f} there; "
            "lower --max_pixels or --max_length, or use --use_lora with --use_8bit or --use_4bit"
        ) from None
    finally:
        optimizer.zero_grad(set_to_none=True)
    rehearse_save(folder, *snapshot())
    optimizer.state = defaultdict(dict)
    restore_random(random)
    return seconds / positions


def fill(examples: list, micro_tokens: int) -> list:
    """As many of the examples, the first one at least, as fill one packed row."""
    picked, room = [], micro_tokens
    for example in examples:
        if len(example) <= room or not picked:
            picked.append(example)
            room -= len(example)
    return picked


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """An update with zero gradients at rate 0: allocates all of the optimizer's state and changes no weight."""
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
                if not torch.equal(read[file][name], tensor.detach().cpu()):
                    raise UserError(f"{folder}: tensor {name} of a saved checkpoint reads back changed; use another disk")
    finally:
        shutil.rmtree(place, ignore_errors=True)
