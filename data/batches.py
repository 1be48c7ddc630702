"""Examples -> optimizer steps -> packed rows; the order is a pure function of (seed, epoch), the place is one number.

A step holds batch_size x grad_accum examples of one epoch's order; its examples are packed end to end into rows of at
most micro_tokens. The cut into rows cannot change the gradient (the loss is a sum over a denominator counted before), so
it may follow the memory. Nothing is random but the order: a run continues exactly from its step number, with any
number of worker processes.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from data.errors import UserError
from data.labels import NO_LOSS, Example
from data.workers import read_ahead


@dataclass
class Packed:
    """One row of T tokens that holds several examples end to end; lengths add up to T."""

    input_ids: torch.Tensor  # (T,)
    labels: torch.Tensor  # (T,) unshifted, -100 = no loss
    lengths: list[int]
    positions: torch.Tensor  # (T,) or (3, T), each example's own
    pixels: list[dict[str, torch.Tensor]]  # one dict an example, empty without pictures; the same object where shared
    image_spans: list[tuple[int, int]]  # in the packed row
    weights: torch.Tensor | None  # (T,) loss weight of each token, None = all 1
    values: dict[str, torch.Tensor]  # name -> (S,), a stage's own number of each of the S examples
    ids: list[str]

    def to(self, device: torch.device | str) -> "Packed":
        """The same row on a device."""

        def move(tensor):
            return tensor if tensor is None else tensor.to(device)

        moved = {id(p): {name: move(tensor) for name, tensor in p.items()} for p in self.pixels}
        return replace(
            self, input_ids=move(self.input_ids), labels=move(self.labels), positions=move(self.positions),
            weights=move(self.weights), values={name: move(tensor) for name, tensor in self.values.items()},
            pixels=[moved[id(p)] for p in self.pixels],
        )

    def supervised(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(where, target): positions whose next token, in the same example, is supervised, and that token. (n,) each."""
        target = self.labels[1:]
        inside = torch.ones_like(target, dtype=torch.bool)
        ends = torch.tensor(self.lengths, device=target.device).cumsum(0)[:-1] - 1
        inside[ends] = False  # the last position of an example has no next token
        where = ((target != NO_LOSS) & inside).nonzero()[:, 0]  # (n,)
        return where, target[where]


def pack_row(examples: list[Example]) -> Packed:
    """Lay examples end to end."""
    weights = None
    if any(e.weights is not None for e in examples):
        weights = torch.cat([torch.ones(len(e)) if e.weights is None else e.weights for e in examples])
    spans, start = [], 0
    for example in examples:
        spans += [(start + a, start + b) for a, b in example.image_spans]
        start += len(example)
    return Packed(
        input_ids=torch.cat([e.input_ids for e in examples]),
        labels=torch.cat([e.labels for e in examples]),
        lengths=[len(e) for e in examples],
        positions=torch.cat([e.positions for e in examples], dim=-1),
        pixels=[e.pixels for e in examples],
        image_spans=spans,
        weights=weights,
        values={name: torch.tensor([e.values[name] for e in examples]) for name in examples[0].values},
        ids=[e.id for e in examples],
    )


def pack(examples: list[Example], micro_tokens: int) -> list[Packed]:
    """Packed rows of at most micro_tokens positions."""
    return [pack_row(row) for row in group(examples, micro_tokens)]


def group(examples: list[Any], micro_tokens: int) -> list[list[Any]]:
    """The examples of each packed row: longest first, each into the first row with room; one over micro_tokens is alone.

    An example is anything with a length, such as a pair that must lie in one row.
    """
    rows: list[list[Any]] = []
    room: list[int] = []
    for example in sorted(examples, key=len, reverse=True):  # stable: equal lengths keep their order
        fits = next((i for i, left in enumerate(room) if left >= len(example)), None)
        if fits is None:
            rows.append([])
            room.append(micro_tokens)
            fits = len(rows) - 1
        rows[fits].append(example)
        room[fits] -= len(example)
    return rows


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits the rows: a pure function of its arguments."""
    generator = torch.Generator().manual_seed(hash_seed(seed, epoch))
    return torch.randperm(num_rows, generator=generator).tolist()


def hash_seed(seed: int, epoch: int) -> int:
    """One 63-bit seed from two numbers (splitmix64's mixing), so that seed 1 epoch 0 is not seed 0 epoch 1."""
    x = (seed * 0x9E3779B97F4A7C15 + (epoch + 1) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1


class Batches:
    """The steps of a run: an epoch's rows in order, cut into groups of step_rows; the last group of an epoch is smaller."""

    def __init__(self, dataset: Any, step_rows: int, seed: int, num_workers: int = 0):
        """dataset[i] is an Example (or what a stage trains on), made anew at each call, in a worker process if any."""
        self.dataset = dataset
        self.step_rows = step_rows
        self.seed = seed
        self.num_workers = num_workers
        self.steps_per_epoch = -(-len(dataset) // step_rows)

    def rows(self, start: int, stop: int) -> Iterator[list[int]]:
        """Row numbers of steps start .. stop - 1 (counted from 0 over the whole run): a pure function of the seed."""
        order, order_epoch = [], -1
        for step in range(start, stop):
            epoch, inside = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(len(self.dataset), self.seed, epoch), epoch
            yield order[inside * self.step_rows : (inside + 1) * self.step_rows]

    def steps(self, start: int, stop: int) -> Iterator[list[Any]]:
        """The examples of steps start .. stop - 1, read ahead by the workers. UserError where one of them dies."""
        return read_ahead(self.dataset, self.rows(start, stop), self.num_workers)


class Encoded:
    """Records seen as Examples: encode(record) at each access, nothing kept.

    A row that turns out bad is returned as its UserError, not raised: it crosses the border of a worker process whole,
    and the loop decides whether it stops the run or is skipped and counted.
    """

    def __init__(self, records: Any, encode: Callable[[Any], Example], indices: list[int]):
        """indices: the records that are seen, in this order."""
        self.records = records
        self.encode = encode
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example | UserError:
        record, began = None, time.perf_counter()
        try:
            record = self.records[self.indices[index]]
            example = self.encode(record)
            example.encode_seconds = time.perf_counter() - began
            return example
        except UserError as error:
            if record is not None:  # else the row could not be read, and the error has its place already
                error.where, error.id = record.where, record.id
            return error
