"""Countdown problems, by our rules: the share of right answers, and of problems with one right answer among k.

Sixteen answers a problem at the settings of the published figures; the first of each is not special. --reward cs224r or
tinyzero scores by their rules instead.
"""

from collections import defaultdict
from typing import Any

from eval.metrics import pass_at_k
from eval.tasks import Task, means, score_alone


def with_pass_at_k(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Means over all answers, and the mean over the problems of pass@k for k = 1, 2, 4, .. up to the answers of each.

    A reward that does not say which answers are correct has no pass@k.
    """
    problems, figures = defaultdict(list), means(lines)
    for line in lines:
        if "correct" in line:
            problems[line["where"]].append(line["correct"])
    num_samples = min(map(len, problems.values()), default=0)
    ks = {2**power for power in range(num_samples.bit_length())} | ({num_samples} if num_samples else set())
    for k in sorted(ks):
        chances = [pass_at_k(len(found), round(sum(found)), k) for found in problems.values()]
        figures[f"pass@{k}"] = sum(chances) / len(chances)
    return figures


TASK = Task(
    [score_alone("countdown")], with_pass_at_k, max_new_tokens=1024,
    sampling={"num_samples": 16, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
)
