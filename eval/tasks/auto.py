"""Rows of any kind: every label is compared as text, one with a box also as a box, one with a call also as a call."""

from data.boxes import parse_boxes
from eval.metrics import Reply, box_iou, centre_in_box, exact_match, parse_calls, token_f1, tool_call
from eval.tasks import Task


def by_label(reply: Reply) -> dict[str, float]:
    """The scores of the metrics that fit the label."""
    metrics = [exact_match, token_f1]
    if parse_calls(reply.label):
        metrics.append(tool_call)
    elif parse_boxes(reply.label):
        metrics += [centre_in_box, box_iou]
    return {name: score for metric in metrics for name, score in metric(reply).items()}


TASK = Task([by_label], max_new_tokens=512)
