"""Two models on the same rows: how often a judge prefers the first one's answer, with a confidence interval.

`--against` names the other model (such as the base) or the outputs/*.jsonl of its answers; `--reward` the judge: a reward,
whose higher score wins, or `pairwise:MODEL@URL`, a chat model that is shown both answers, in both orders because it may
prefer a place. order_agreement is the share of rows where the order does not matter. A tie counts half.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.errors import UserError
from eval.metrics import Reply, wilson_interval
from eval.rewards import PAIRWISE, find_reward
from eval.tasks import Metric, Task, means


def compare(name: str, **settings: Any) -> Metric:
    """The metric of this judge: 1 for an answer that wins against the other, 0 for one that loses, 0.5 for a tie."""
    judge = find_judge(name, **settings)

    def win(reply: Reply) -> dict[str, float]:
        if reply.other is None:
            raise UserError("the other model has no answer to this row")
        first, second = judge(reply, replace(reply, response=reply.other))
        return {"win": (first + second) / 2, "order_agreement": float(first == second)}

    return win


def find_judge(
    name: str, folder: Path | None = None, requests_per_minute: float = 0, device: str = "auto"
) -> Callable[[Reply, Reply], tuple[float, float]]:
    """judge(ours, theirs): twice how far ours is better (1, 0, or 0.5 for a tie), shown first and shown second."""
    if name.startswith(PAIRWISE):
        from eval.judges import Comparison, Server

        prefer = Comparison(Server(name.removeprefix(PAIRWISE), folder, requests_per_minute))
        return lambda ours, theirs: (prefer(ours, theirs), 1 - prefer(theirs, ours))
    reward = find_reward(name, folder, requests_per_minute, device)

    def judge(ours: Reply, theirs: Reply) -> tuple[float, float]:
        first, second = (values["score"] for values in reward([ours, theirs]))
        won = (first > second) + (first == second) / 2
        return won, won  # a score knows no order

    return judge


def with_interval(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The win rate with its 95 % interval over the rows, and the share of ties."""
    figures = means(lines)
    rate = figures.pop("win")
    low, high = wilson_interval(rate, len({line["where"] for line in lines}))
    ties = sum(line["win"] == 0.5 for line in lines) / len(lines)
    return {"win_rate": rate, "win_rate_low": low, "win_rate_high": high, "ties": ties, **figures}


TASK = Task([], with_interval, max_new_tokens=1024, judged=compare, compares=True)
