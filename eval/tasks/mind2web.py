"""Mind2Web's steps: the element, the operation, and both, as a mean of the means of each task (arXiv 2306.06070).

An answer is an operation, its text if it has one, and a box, as data/dialect_browser.py writes the label. The element is
right where the middle of the answered box lies in the label's; operations are compared as sets of words; a step is right
where the element is and no word is missing or added. The actions before a step are the true ones.
"""

import re
from collections import defaultdict
from statistics import fmean
from typing import Any

from data.boxes import strip_boxes
from eval.metrics import Reply, centre_in_box
from eval.tasks import Task, means


def step(reply: Reply) -> dict[str, float]:
    """step_success, element_accuracy and operation_f1. Raises UserError for a label without a box."""
    element = centre_in_box(reply)["centre_in_box"]
    ours, theirs = (set(strip_boxes(text).lower().split()) for text in (reply.response, reply.label))
    f1 = 2 * len(ours & theirs) / (len(ours) + len(theirs)) if ours or theirs else 1.0
    return {"step_success": float(element == f1 == 1.0), "element_accuracy": element, "operation_f1": f1}


def by_task(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The mean over the tasks of each score's mean over the task's steps, and the share of tasks with every step right."""
    tasks = defaultdict(list)
    for line in lines:
        named = re.search(r"Task: (.*)\n", line["prompt"])
        tasks[named[1] if named else line["where"]].append(line)
    each = [means(steps) for steps in tasks.values()]
    figures = {name: fmean(figures[name] for figures in each) for name in each[0]}
    return figures | {"task_success": fmean(figures["step_success"] == 1.0 for figures in each)}


TASK = Task([step], by_task, max_new_tokens=128)
