"""What is measured on which rows: one file a task in this folder, found by listing; TASK in it says the metrics.

A new benchmark is one new file here. A single metric of your own needs none: `--task module:function`.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from data.errors import UserError
from eval.metrics import Reply
from eval.rewards import find_reward, import_function

Metric = Callable[[Reply], dict[str, float]]


def means(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of every score over the rows that have it; scores are the floats of a line."""
    names = dict.fromkeys(name for line in lines for name, value in line.items() if isinstance(value, float))
    return {name: fmean(line[name] for line in lines if name in line) for name in names}


def score_alone(name: str, **settings: Any) -> Metric:
    """The metric that --reward makes: the reward of this name on each answer by itself. settings are find_reward's."""
    reward = find_reward(name, **settings)
    return lambda reply: reward([reply])[0]


@dataclass
class Task:
    """The metrics of one benchmark, how its rows become figures (a line is one answer of outputs/*.jsonl, its scores in
    it), how many tokens an answer may take, the settings of generate() that its figures are published with, how --reward,
    where it is given, becomes the one metric, and whether the task compares with another model (--against). A task that
    asks for no answers has measure(model, records, others, write), which writes the rows' lines, in place of metrics.
    A caller's own settings go in with replace(), and so does others: where -> the other model's line."""

    metrics: list[Metric]
    summarize: Callable[[list[dict[str, Any]]], dict[str, float]] = means
    max_new_tokens: int = 256
    sampling: dict[str, Any] = field(default_factory=dict)
    judged: Callable[..., Metric] = score_alone
    compares: bool = False
    measure: Callable[..., None] | None = None
    others: dict[str, dict[str, Any]] | None = None


def task_names() -> list[str]:
    """The tasks of this folder."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__))


def find_task(name: str) -> Task:
    """The task of this name, or of one metric `module:function`. Raises UserError with what there is."""
    if name in task_names():
        return importlib.import_module(f"eval.tasks.{name}").TASK
    if not name.partition(":")[2]:
        raise UserError(f"--task {name}: not one of {', '.join(task_names())}, nor module:function of yours")
    found = import_function("--task", name)
    if not isinstance(found, Task) and not callable(found):
        raise UserError(f"--task {name}: is neither a function nor a Task")
    return found if isinstance(found, Task) else Task([found])
