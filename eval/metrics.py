"""Metrics: small functions from one answered row to named numbers; a figure is their mean over the rows.

A metric of your own is a function `def my_metric(reply: Reply) -> dict[str, float]` in a file of your own, asked for by
`python -m eval --task your_file:my_metric`. A metric that cannot judge a row (a label without a box) raises: the row is
listed with the reason and left out of the mean, and no row is ever given another row's score. A wrong answer is 0, not
an error. Written here without the evaluation code of any benchmark; benchmarks are eval/tasks/.
"""

import json
import math
import re
import string
from collections import Counter
from dataclasses import dataclass
from typing import Any

from data.boxes import parse_boxes
from data.errors import UserError
from eval.boxes import centre, holds, intersection_over_union


@dataclass
class Reply:
    """One row and the model's answer to it. label is the last assistant turn as the model would have to write it.

    truth is what a problem's answer is checked against; messages are the turns before the answer; other is another
    model's answer to the same row, where two are compared.
    """

    id: str
    where: str
    prompt: str
    response: str
    label: str
    stopped: bool
    tools: list[dict] | None = None
    messages: list[dict] | None = None
    truth: dict[str, Any] | None = None
    other: str | None = None
    extent: tuple[float, float] = (1000, 1000)  # what boxes count to, at the right and the lower edge of the picture


# ---- shares and intervals --------------------------------------------------------------------------------------------


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that one of k of the samples is correct, without bias: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374)."""
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a share of `count` independent rows (E. B. Wilson, 1927); halves may be in it."""
    middle = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - reach) / (1 + z * z / count), (middle + reach) / (1 + z * z / count)


# ---- text ------------------------------------------------------------------------------------------------------------


def exact_match(reply: Reply) -> dict[str, float]:
    """The same text, blanks around it aside."""
    return {"exact_match": float(reply.response.strip() == reply.label.strip())}


def token_f1(reply: Reply) -> dict[str, float]:
    """F1 of shared words as SQuAD counts them (arXiv 1606.05250)."""
    return {"f1": f1(reply.response, reply.label)}


def f1(response: str, label: str) -> float:
    """Harmonic mean of precision and recall over the words of both, counted with repetition; 1 if both have none."""
    ours, theirs = words(response), words(label)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs)) if ours or theirs else 1.0


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and without a, an, the."""
    kept = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


# ---- boxes -----------------------------------------------------------------------------------------------------------


def centre_in_box(reply: Reply) -> dict[str, float]:
    """Whether the centre of the first box of the answer lies in a box of the label (ScreenSpot's rule)."""
    boxes = parse_boxes(reply.response)
    return {"centre_in_box": float(bool(boxes) and any(holds(label, centre(boxes[0])) for label in label_boxes(reply)))}


def box_iou(reply: Reply) -> dict[str, float]:
    """Mean over the answer's boxes of the best overlap with any box of the label (GUICourse's rule); none is 0."""
    labels, boxes = label_boxes(reply), parse_boxes(reply.response)
    best = [max(intersection_over_union(box, label) for label in labels) for box in boxes]
    return {"iou": sum(best) / len(best) if best else 0.0}


def label_boxes(reply: Reply) -> list[tuple[float, float, float, float]]:
    boxes = parse_boxes(reply.label)
    if not boxes:
        raise UserError(f"the label has no box: {reply.label[:60]!r}")
    return boxes


# ---- tool calls ------------------------------------------------------------------------------------------------------


def tool_call(reply: Reply) -> dict[str, float]:
    """Tool calls by level: they parse, the names are the label's, names and arguments are, F1 of the argument values.

    With the row's tools given, also whether every call names one of them with the arguments that it takes.
    """
    expected = parse_calls(reply.label)
    if not expected:
        raise UserError(f"the label has no tool call that parses: {reply.label[:60]!r}")
    calls = parse_calls(reply.response)
    shared = sum(argument_f1(ours, theirs) for ours, theirs in zip(calls, expected, strict=False))
    scores = {
        "call_parses": float(bool(calls)),
        "call_name": float([c["name"] for c in calls] == [c["name"] for c in expected]),
        "call_exact": float(as_text(calls) == as_text(expected)),
        "argument_f1": shared / max(len(calls), len(expected)),
    }
    if reply.tools:
        scores["call_valid"] = float(bool(calls) and all(takes(reply.tools, call) for call in calls))
    return scores


def parse_calls(text: str) -> list[dict[str, Any]]:
    """[{"name", "arguments"}] of the `<tool_call>` blocks of a text; [] unless every block holds one proper call.

    Arguments that are a JSON string are decoded once (some templates encode twice).
    """
    blocks = re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL)
    if not blocks or len(blocks) != text.count("<tool_call>"):
        return []
    calls = []
    for block in blocks:
        try:
            call = json.loads(block)
            arguments = json.loads(call["arguments"]) if isinstance(call["arguments"], str) else call["arguments"]
            calls.append({"name": call["name"], "arguments": arguments})
        except (ValueError, KeyError, TypeError, RecursionError):
            return []
    proper = all(isinstance(c["name"], str) and isinstance(c["arguments"], dict) for c in calls)
    return calls if proper else []


def argument_f1(call: dict[str, Any], expected: dict[str, Any]) -> float:
    """Mean over the arguments that either call has: word F1 of two texts, else 1 for the same JSON value or 0.

    0 for another function, 1 where neither call has arguments.
    """
    if call["name"] != expected["name"]:
        return 0.0
    ours, theirs = call["arguments"], expected["arguments"]
    names = ours.keys() | theirs.keys()
    shared = sum(value_f1(ours[name], theirs[name]) for name in ours.keys() & theirs.keys())
    return shared / len(names) if names else 1.0


def value_f1(value: Any, expected: Any) -> float:
    if isinstance(value, str) and isinstance(expected, str):
        return f1(value, expected)
    return float(as_text(value) == as_text(expected))


def as_text(value: Any) -> str:
    """JSON in one spelling, in which true is not 1 (as it is in Python)."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


JSON_TYPES = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "array": list, "object": dict}


def takes(tools: list[dict], call: dict[str, Any]) -> bool:
    """Whether one of the tools has this name, all required arguments are there, none is unknown or of a wrong type."""
    tool = next((t for t in (tool.get("function", tool) for tool in tools) if t.get("name") == call["name"]), None)
    if tool is None:
        return False
    parameters = tool.get("parameters") or {}
    properties, arguments = parameters.get("properties") or {}, call["arguments"]
    known = set(parameters.get("required") or []) <= arguments.keys() <= properties.keys()
    return known and all(has_type(value, properties[name].get("type")) for name, value in arguments.items())


def has_type(value: Any, kind: str | None) -> bool:
    """Whether a JSON value has a schema's type; a schema without a plain type (a reference, a union) takes anything."""
    if not isinstance(kind, str) or kind not in JSON_TYPES:
        return True
    return isinstance(value, JSON_TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
