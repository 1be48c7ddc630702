"""Worker processes that make items ahead of their use: rows opened and encoded for training, rows looked at by a check.

torch's DataLoader does the reading ahead and keeps the order; what is decided here is who gets which signal, what the
death of a worker becomes, and how much memory one may take.
"""

import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from data.errors import UserError

MEMORY_BYTES = 4 * 2**30  # beyond what a worker begins with; the largest picture that is opened takes 0.6 GiB


def leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C, which a terminal sends to all, is the run's affair. SIGTERM ends a worker: Python ends them with it at exit,
    and then waits for them. A run that was asked to stop too has its step's examples already, and stops after it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def limit_memory(worker: int) -> None:
    """The same, and what asks for MEMORY_BYTES more than the process has meets a MemoryError instead of the system's."""
    leave_signals_to_the_run(worker)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = has + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


def read_ahead(
    dataset: Any, groups: Iterable[list[int]], num_workers: int, prepare: Callable[[int], None] = leave_signals_to_the_run
) -> Iterator[list[Any]]:
    """dataset[i] for the numbers of each group, in their order; each worker process runs prepare(its number) first.

    UserError where one of them dies.
    """
    import torch
    from torch.utils.data import DataLoader

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # each tensor on its way from a worker is an open file
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    loader = DataLoader(
        dataset,
        batch_sampler=groups,
        collate_fn=list,
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,  # the default changes with Python 3.14
        prefetch_factor=1 if num_workers else None,  # a step is many rows: one ahead a worker is enough
        worker_init_fn=prepare,
        generator=torch.Generator(),  # the loader draws a seed for its workers: not from the run's random state
    )
    items = iter(loader)
    # torch's handler raises at once, in the middle of an update too; the wait for a batch finds a dead worker as well
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from items
    except (RuntimeError, ConnectionError, EOFError) as error:  # the last two: its tensors went with it
        if isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error):
            raise
        raise UserError("a data worker was ended from outside, perhaps for want of memory; lower --num_workers") from None
