"""Whether a run waits for its data, and the number of worker processes that would end the waiting.

A worker makes whole steps ahead, so n of them keep up where a step's rows take at most n times as long to encode as the
step takes to compute. Both are measured as the run goes; the warning comes once.
"""

import math
import os
from collections import deque
from collections.abc import Callable

START = 3  # steps in which workers start and fill their queues
WINDOW = 10
SHARE = 0.2  # of the time


class Waiting:
    """Watches the steps of one start of a run."""

    def __init__(self, num_workers: int):
        self.num_workers, self.num_seen, self.is_said = num_workers, 0, False
        self.steps: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)

    def watch(self, encode_seconds: float, waited: float, seconds: float, say: Callable[[str], None]) -> None:
        """Take in a step: seconds its rows took to encode, that it waited for them, that it took in all; say the warning
        where there is one."""
        self.num_seen += 1
        if self.num_seen > START:
            self.steps.append((encode_seconds, waited, seconds))
        encoding, waiting, whole = map(sum, zip(*self.steps, strict=True)) if self.steps else (0, 0, 0)
        if self.is_said or len(self.steps) < WINDOW or waiting <= SHARE * whole:
            return
        self.is_said = True
        enough = max(math.ceil(encoding / max(whole - waiting, 1e-9)), self.num_workers + 1)
        text = (
            f"warning: {waiting / whole:.0%} of the last {WINDOW} steps went into waiting for rows, which take "
            f"{encoding / WINDOW:.2g} s a step to encode, beside {(whole - waiting) / WINDOW:.2g} s to compute; "
            f"--num_workers {enough} would remove it"
        )
        cores = os.cpu_count() or 1
        say(text + f" (this machine has {cores} cores; a lower --max_pixels encodes faster)" * (enough > cores))
