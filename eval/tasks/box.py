"""Answers that point at the screen: does the click land, and how well do the boxes agree."""

from eval.metrics import box_iou, centre_in_box
from eval.tasks import Task

TASK = Task([centre_in_box, box_iou], max_new_tokens=128)
