"""What keeps a run honest overnight: the judge of every update, stop signals, out of memory, the lock of the folder.

A non-finite gradient must never reach weights, optimizer or checkpoint, so every step is judged before its update. The
rolling statistics that the judge uses are plain data inside the run's state: a resumed run gives the same verdicts.
Costs nothing measurable: one comparison of two numbers a step, and mean and deviation of 128 numbers where spikes are
judged too. Imports no torch, so that a door can take the lock before it loads anything heavy.
"""

import fcntl
import math
import os
import signal
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from data.errors import UserError

LOCK = ".lock"
LEFT_BEHIND = ("checkpoints", "bad_rows.jsonl", "summary.json", "show.html", "check", "rows", ".rehearsal",
               "reference.safetensors", "reward_cache.jsonl")  # without a step no run yet
WINDOW = 128  # steps; window and factor as in OLMo-core's skip-step optimizer
SIGMAS = 6.0
MAX_BAD = 5  # non-finite steps in a row


@dataclass
class Statistics:
    """What the judge remembers: the last WINDOW finite losses and gradient norms, and how many steps went wrong just now."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    num_bad_in_a_row: int = 0


@dataclass(frozen=True)
class Verdict:
    """`action` is "update", "skip" (drop the gradients, go on) or "stop"; `reason` is a clause for the log."""

    action: str
    reason: str = ""


def judge(
    loss: float, grad_norm: float, record: Statistics, skip_spikes: bool = False, loss_scale: float = 1.0
) -> Verdict:
    """The verdict on one step, from its loss and the norm of its unscaled, unclipped gradient; both enter the record.

    Non-finite: skip, and stop when it happens MAX_BAD times in a row; a finite loss whose gradient overflowed under an
    fp16 `loss_scale` above 1 is skipped but not counted, because the scale halves until it fits. With skip_spikes a
    loss or norm more than SIGMAS deviations above the window's mean is skipped once the window is half full; it still
    enters the window, so that a lasting change of level is soon accepted.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        if math.isfinite(loss) and loss_scale > 1:
            return Verdict("skip", f"the gradient overflowed fp16 at loss scale {loss_scale:g}")
        record.num_bad_in_a_row += 1
        reason = f"loss {loss:g}, gradient norm {grad_norm:g}"
        if record.num_bad_in_a_row >= MAX_BAD:
            return Verdict("stop", f"{reason}: not finite for {MAX_BAD} steps in a row")
        return Verdict("skip", f"{reason}: not finite")
    record.num_bad_in_a_row = 0
    spike = ""
    for name, value, window in (("loss", loss, record.losses), ("gradient norm", grad_norm, record.grad_norms)):
        if skip_spikes and len(window) >= WINDOW // 2:
            mean, deviation = statistics.fmean(window), statistics.stdev(window)
            if value > mean + SIGMAS * deviation:
                spike = f"{name} {value:g} is more than {SIGMAS:g} sigma above its mean {mean:g}"
        window.append(value)
        del window[:-WINDOW]
    return Verdict("skip", spike) if spike else Verdict("update")


class Stop:
    """Turns SIGTERM and SIGINT into a wish: `requested` becomes true, and the loop ends after its step and a commit.

    A second signal leaves at once with the same exit code, 143 or 130; a save it interrupts leaves the checkpoints as
    they were (training/checkpoint.py). Data workers ignore SIGINT and end at SIGTERM (data/workers.py).
    """

    def __init__(self):
        self.signal = 0
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}

    @property
    def requested(self) -> bool:
        return self.signal != 0

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it."""
        return 128 + self.signal

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        else:
            self.signal = number
            # os.write, because print is not safe inside a handler that may have interrupted another print
            os.write(2, b"\nstopping after this step and a save; a second signal leaves at once\n")

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is the accelerator's or the processor's allocator saying no, and not some other failure.

    Only the card has its own exception type; the CPU allocator raises RuntimeError with a text.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    texts = ("out of memory", "not enough memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def halving(state: Any, name: str, least: int, work: Callable[[], Any]) -> Any:
    """work(), which samples or scores answers; after each out of memory again, with half the positions at once.

    `name` is the field of state that holds them. Raises UserError below `least`, where nothing runs side by side any more.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if getattr(state, name) < least:
            raise UserError("out of memory with the answers to one prompt; lower --num_samples or --max_new_tokens")
        setattr(state, name, getattr(state, name) // 2)
        print(f"out of memory: the answers are done again with {name} {getattr(state, name)}")


class FolderLock:
    """The right to write one output folder, held until this process ends, however it ends.

    A POSIX record lock rather than flock: it belongs to the process alone, so data workers that outlive a killed run by
    a few seconds do not keep the folder closed to the run that resumes it.
    """

    def __init__(self, folder: Path, made: Sequence[Path]):
        """made: the folders that were created for this one, itself first."""
        self._made = made
        self._file = open(folder / LOCK, "a+")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            if isinstance(error, BlockingIOError | PermissionError):
                raise UserError(
                    f"{folder}: process {holder or '(unknown)'} is writing this output folder; "
                    "wait for it, stop it, or choose another --output_dir"
                ) from None
            raise UserError(f"{folder}: cannot be locked ({error}); choose an --output_dir on a local disk") from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let go before the process ends; folders made for a run that has written nothing are removed again."""
        folder = Path(self._file.name).parent
        if [path.name for path in folder.iterdir()] == [LOCK]:
            os.unlink(self._file.name)
            with suppress(OSError):  # a parent that others have used meanwhile
                for path in self._made:
                    path.rmdir()
        self._file.close()


def open_folder(folder: str | Path) -> FolderLock:
    """Create the output folder where it is missing, refuse a stranger's, and lock it.

    A stranger's folder has files but neither run.yaml nor a committed step; what `python -m data check` and a run that
    was killed before its first step leave behind does not count. UserError says which file was found.
    """
    folder = Path(folder)
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
        is_run = "run.yaml" in names or any((folder / "checkpoints").glob("step-*"))
        strangers = [name for name in names if name not in (LOCK, *LEFT_BEHIND)]
        if strangers and not is_run:
            raise UserError(
                f"{folder}: holds {strangers[0]!r} and no run of this trainer; choose an empty folder as --output_dir, "
                "so that nothing of yours is overwritten"
            )
        return FolderLock(folder, made)
    except OSError as error:
        raise UserError(f"{folder}: cannot be used as --output_dir ({error.strerror}); choose another") from None
