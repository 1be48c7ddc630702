"""Supervised fine-tuning: the mean negative log-likelihood of the supervised tokens of the whole optimizer step.

The denominator is counted before the first forward, over all examples of the step, and every packed row adds its sum
divided by it. A mean of per-batch means, which many loops take, weighs a token by how few others stand beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.errors import UserError

if TYPE_CHECKING:
    import torch

    from data.batches import Packed
    from data.labels import Example
    from data.records import Record
    from model.family import Model


@dataclass
class Flags:
    """Supervised fine-tuning has no settings of its own."""


class Stage:
    """See stages/__init__.py for what each method is asked for."""

    takes = ("conversation",)
    rate = 1.0
    num_answers, held_bytes, task = 0, {}, None

    def __init__(self, flags: Flags, model: Model, max_length: int | None = None):
        self.family = model.family
        self.max_length = max_length

    def encode(self, record: Record) -> Example:
        example = self.family.encode(record.messages, record.tools, self.max_length, id=record.id, where=record.where)
        if example.num_supervised == 0:
            raise UserError(f"{record.where}: no token of this row has a loss; remove it, or its \"train\": false")
        return example

    def sequences(self, example: Example) -> list[Example]:
        return [example]

    def prepare(self, run: Any) -> None:
        """Nothing is needed before the first step."""

    def collect(self, run: Any, examples: list[Any]) -> list[list[Any]]:
        return [examples]

    def denominator(self, examples: Iterable[Example]) -> float:
        """Supervised tokens of a step, each counted with its weight."""
        return sum(example.supervised_weight for example in examples)

    def pack(self, examples: list[Example], micro_tokens: int) -> list[Packed]:
        from data.batches import pack

        return pack(examples, micro_tokens)

    def loss(self, model: Model, packed: Packed, total: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """-sum_t w_t log p(token_t | tokens before it) / total, over the supervised tokens of a packed row."""
        from model.head import negative_log_likelihood, per_token

        where, target = packed.supervised()
        losses = per_token(model.hidden(packed), model.head_weight, negative_log_likelihood, where, target)  # (n,)
        if packed.weights is not None:
            losses = losses * packed.weights[where + 1]
        return losses.sum() / total, {}
