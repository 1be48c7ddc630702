"""Answers that call a tool: they parse, name and arguments are right, and the arguments agree word by word."""

from eval.metrics import tool_call
from eval.tasks import Task

TASK = Task([tool_call], max_new_tokens=512)
