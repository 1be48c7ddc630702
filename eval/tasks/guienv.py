"""GUIEnv of GUICourse, both directions, by its rules: the text in a region, and the regions of a text.

Text: the same characters, and shared words. Regions: the mean over the answered boxes of the best overlap with any box of
the label (regions left out cost nothing), and the share of answers above 0.2, 0.5, 0.7 and 0.9 of it.
"""

from data.boxes import parse_boxes
from eval.metrics import Reply, box_iou, exact_match, token_f1
from eval.tasks import Task


def by_direction(reply: Reply) -> dict[str, float]:
    """exact_match and f1 where the label is text; iou and iou@.. where it is boxes."""
    if not parse_boxes(reply.label):
        return exact_match(reply) | token_f1(reply)
    scores = box_iou(reply)
    return scores | {f"iou@{bound}": float(scores["iou"] > bound) for bound in (0.2, 0.5, 0.7, 0.9)}


TASK = Task([by_direction], max_new_tokens=128)
