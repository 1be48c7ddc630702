"""What a resume needs beside weights and optimizer: the one state object, and the random generators.

The place in the data is the step number, because the order of rows is a function of the seed (data/batches.py); the
learning rate is a function of the step. So little is left: counts, the loss scaler, the judge's memory, random state.
"""

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch

from training.guards import Statistics
from training.precision import LossScaler


@dataclass
class State:
    """All that a resume needs beside weights and optimizer; advanced once a step, saved whole."""

    step: int = 0  # optimizer steps done, skipped ones included; also the place in the data (data/batches.py)
    micro_tokens: int = 0  # longest packed row; another cut would change the last digits of sums
    cache_tokens: int = 0  # positions of one batch of sampled answers; another cut would change last digits of logits
    scaler: LossScaler = field(default_factory=LossScaler)
    statistics: Statistics = field(default_factory=Statistics)

    def to_json(self) -> dict:
        """The state as plain data; the number of threads goes along, because sums depend on it."""
        return asdict(self) | {"num_threads": torch.get_num_threads()}

    @classmethod
    def from_json(cls, saved: dict) -> "State":
        """The state that to_json gave; prints a note where this process cannot repeat the saved run bit for bit."""
        saved = dict(saved)
        before, now = saved.pop("num_threads"), torch.get_num_threads()
        if before != now:
            print(f"note: saved by a run of {before} threads, resumed with {now}: last digits will differ")
        saved["scaler"] = LossScaler(**saved["scaler"])
        saved["statistics"] = Statistics(**saved["statistics"])
        return cls(**saved)


def seed_random(seed: int) -> None:
    """Seed every generator whose state capture_random saves."""
    random.seed(seed)
    torch.manual_seed(seed)


def capture_random() -> dict[str, torch.Tensor]:
    """The state of every random generator a run draws from, as tensors: Python's, torch's, and the card's in use."""
    version, words, gauss = random.getstate()
    state = {"python": torch.tensor([version, *words]), "torch": torch.get_rng_state()}
    state["python_gauss"] = torch.tensor([] if gauss is None else [gauss], dtype=torch.float64)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random(state: Mapping[str, torch.Tensor]) -> None:
    """Put back what capture_random gave, where this process has such a generator."""
    version, *words = state["python"].tolist()
    random.setstate((version, tuple(words), next(iter(state["python_gauss"].tolist()), None)))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
