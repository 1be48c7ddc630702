"""How often a model prefers the chosen answer to the rejected one more than its base does: DPO's implicit reward.

The reward of an answer is beta times the log of its probability under the model over that under the reference (arXiv
2305.18290, section 4); accuracy does not depend on beta, and margin is printed without it, in nats. The reference is the
same model with its adapter off, or the model that `--against` names. Nothing is generated: two forwards a pair.
"""

from collections.abc import Callable
from typing import Any

from data.batches import pack_row
from data.errors import UserError
from data.records import Record
from eval.generate import inference
from eval.tasks import Task, means
from lora.adapter import disabled, lora_layers
from model.family import Model
from model.head import sequence_logprobs


def measure(
    model: Model, records: list[Record], others: dict[str, dict] | None, write: Callable[[dict[str, Any]], None]
) -> None:
    """Write a line a pair: the log-probabilities of its answers and, where there is a reference, which one is preferred."""
    has_adapter = bool(lora_layers(model.net)) or model.prefix is not None
    for record in records:
        line: dict[str, Any] = {"id": record.id, "where": record.where}
        try:
            chosen, rejected = logprobs(model, record)
            line |= {"chosen_logp": chosen, "rejected_logp": rejected}
            reference = None
            if others is not None:
                reference = reference_of(others, record)
            elif has_adapter:
                with disabled(model):
                    reference = logprobs(model, record)
        except UserError as error:
            write({"id": record.id, "where": record.where, "problem": str(error)})
            continue
        if reference is not None:
            margin = (chosen - reference[0]) - (rejected - reference[1])
            line |= {"accuracy": float(margin > 0) + float(margin == 0) / 2, "margin": margin}
        write(line)


def logprobs(model: Model, record: Record) -> tuple[float, float]:
    """log p of the chosen and of the rejected answer. Raises UserError for a row that is no preference."""
    if record.kind != "preference":
        raise UserError(f"the row is a {record.kind}; --task preference takes a chosen and a rejected answer")
    sides = [model.family.encode(turns, record.tools) for turns in record.conversations]
    with inference(model):
        chosen, rejected = sequence_logprobs(model, pack_row(sides).to(model.device)).tolist()
    return chosen, rejected


def reference_of(others: dict[str, dict], record: Record) -> tuple[float, float]:
    """The other model's log-probabilities. Raises UserError where it has none for the row."""
    line = others.get(record.where, {})
    if "chosen_logp" not in line:
        raise UserError("the other model has no log-probabilities of this row")
    return line["chosen_logp"], line["rejected_logp"]


def with_reference(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the pairs. Raises UserError where there was nothing to compare with."""
    if not any("margin" in line for line in lines):
        raise UserError("the model has no adapter to switch off; name the model that it started from with --against")
    return means(lines)


TASK = Task([], with_reference, compares=True, measure=measure)
