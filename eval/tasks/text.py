"""Answers that are compared as text: the same words in the same order, and the share of words that agree."""

from eval.metrics import exact_match, token_f1
from eval.tasks import Task

TASK = Task([exact_match, token_f1])
