"""The merge report: how far the merged model's logits are from those of the adapter on its base, on rows of the user's.

One rounding to 16 bits moves every logit a little; whether that is little beside what the adapter does is what the last
line is for. Where the base was held in 8 or 4 bits while training, the merged model differs from the trained one by the
quantisation error too, and both gaps are shown. One model is in memory at a time, and logits of at most 256 positions.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from data.batches import pack_row
from data.errors import UserError
from data.labels import Example
from data.records import open_records
from lora.adapter import disabled
from lora.files import load_adapter, read_adapter
from model import load_model
from model.family import Family, Model, Options, find_family
from model.shards import DTYPES, Shards

NUM_POSITIONS = 256  # supervised ones, whose logits are compared: 156 MB for a vocabulary of 152k
TITLES = {
    "w16_plus_ba": "W16 + BA: the adapter on the 16-bit base",
    "dequantised_plus_ba": "dequant(Wq) + BA: the adapter on the {} base it was trained on",
    "without_adapter": "for scale: the base without the adapter",
}


def compare(
    base: Path, adapter: Path, merged: Path, data_path: Path, image_root: Path | None, device: str,
    options: Options | None = None,
) -> dict:
    """The largest and mean logit gap to the merged model, and the share of equal argmaxes, by the keys of TITLES.

    Raises UserError for rows that cannot be used.
    """
    examples = first_examples(find_family(base, options), data_path, image_root)
    dtype = DTYPES[next(iter(Shards(base).headers().values()))[1]]
    base_quant = read_adapter(adapter).base_quant
    model, _ = load_model(merged, dtype=dtype, device=device)
    expected = answer_logits(model, examples)  # (n, V)
    del model
    report = {"rows": len(examples), "positions": len(expected), "base_quantization": base_quant}
    for key, quant in {"w16_plus_ba": None, "dequantised_plus_ba": base_quant}.items():
        if key == "dequantised_plus_ba" and quant is None:
            continue
        model, family = load_model(base, quant=quant, dtype=dtype, device=device)
        load_adapter(model, family, adapter)
        report[key] = gap(answer_logits(model, examples), expected)
        if quant is None:
            with disabled(model):
                report["without_adapter"] = gap(answer_logits(model, examples), expected)
        del model
    return report


def first_examples(family: Family, data_path: Path, image_root: Path | None) -> list[Example]:
    """The first rows that hold NUM_POSITIONS supervised positions together."""
    records, examples = open_records(data_path, image_root), []
    for record in (records[i] for i in range(len(records))):
        examples.append(family.encode(record.messages, record.tools, id=record.id, where=record.where))
        if sum(e.num_supervised for e in examples) >= NUM_POSITIONS:
            break
    if not any(e.num_supervised for e in examples):
        raise UserError(f"{data_path}: no row has a supervised token to compare at; give rows with answers")
    return examples


@torch.no_grad()
def answer_logits(model: Model, examples: list[Example]) -> torch.Tensor:
    """Logits at the first NUM_POSITIONS supervised positions: (n, V) fp32, on the CPU."""
    rows, room = [], NUM_POSITIONS
    for example in examples:
        packed = pack_row([example]).to(model.device)
        where = packed.supervised()[0][:room]
        rows.append(F.linear(model.hidden(packed)[where], model.head_weight).float().cpu())  # (n, V)
        room -= len(where)
    return torch.cat(rows)


def gap(logits: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Largest and mean absolute difference, and the share of positions with the same argmax."""
    difference = (logits - expected).abs()
    same = logits.argmax(1) == expected.argmax(1)
    return {"max": difference.max().item(), "mean": difference.mean().item(), "same_argmax": same.float().mean().item()}


def report_text(report: dict) -> str:
    """The report as it is printed, with a warning where the rounding or the quantisation outweighs the adapter."""
    lines = [f"logits beside the merged model's, at {report['positions']} answer positions of {report['rows']} rows:"]
    lines.append(f"{'':<66}{'max gap':>10}{'mean gap':>10}{'same argmax':>13}")
    for key, title in TITLES.items():
        if key in report:
            found, title = report[key], title.format(report["base_quantization"])
            lines.append(f"{title:<66}{found['max']:>10.4f}{found['mean']:>10.4f}{found['same_argmax']:>12.1%}")
    if report["w16_plus_ba"]["mean"] >= 0.5 * report["without_adapter"]["mean"]:
        lines.append(
            "warning: rounding to the base's dtype moves the logits by half of what the adapter does, or more; the "
            "adapter is too weak to survive it: train longer, or keep the adapter beside its base"
        )
    return "\n".join(lines)
