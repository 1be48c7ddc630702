"""The run's diary: journal.jsonl on disk, one line a step on screen.

Every step is one JSON object, appended and flushed before the next step begins, so that a killed run has told
everything up to its last step and `tail -f` works. Resuming at step k drops what came after k (atomically): the
file always tells one story, without repeated steps. The report is made from this file, hence no logger service is
needed; wandb and tensorboard are there for those who ask (--report_to). Costs about 10 microseconds a step.
"""

import json
import math
import os
import shutil
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.errors import UserError

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no such numbers: written as strings


def _to_json(value: Any) -> Any:
    """The value with every non-finite float as "nan", "inf" or "-inf", inside lists and dicts too."""
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: dict) -> str:
    return json.dumps(_to_json(record), ensure_ascii=False, allow_nan=False) + "\n"


def read_journal(path: str | Path) -> list[dict]:
    """The records of a journal, a record's own non-finite numbers as floats again; [] if the file does not exist.

    A power cut can tear the last line; it is left out. Any other broken line is a UserError with file:line.
    """
    path = Path(path)
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:  # UnicodeDecodeError is one too
            if number == len(lines):
                break
            raise UserError(f"{path}:{number} is not JSON, so this journal was changed by something else; "
                            "repair or remove that line.") from None
        records.append({key: NON_FINITE.get(value, value) if isinstance(value, str) else value
                        for key, value in record.items()})
    return records


def is_finished(folder: str | Path) -> bool:
    """Whether a folder's journal tells the end of its run; one that was taken away tells nothing, and is not missed."""
    records = read_journal(Path(folder) / "journal.jsonl")
    return not records or any(record.get("event") == "finish" and record["reason"] == "finished" for record in records)


def now() -> str:
    """The time of day, as records and pages show it."""
    return time.strftime("%Y-%m-%d %H:%M:%S")


class PatientFile:
    """A text file that lines are added to. What the disk refuses waits in memory for the next line, which tries again: a disk
    that is full for an hour ends no run, whose weights are well."""

    def __init__(self, path: str | Path):
        self.path, self.waiting, self.is_refused, self.is_begun = Path(path), b"", False, False

    def write(self, text: str, sync: bool = False) -> None:
        """Add the text; sync: and have it on the disk itself before this returns. OSError where nothing could ever be written:
        that is seen before the first step."""
        self.waiting += text.encode()
        try:
            self.path.parent.mkdir(exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                while self.waiting:
                    self.waiting = self.waiting[file.write(self.waiting) :]
                if sync:
                    os.fsync(file.fileno())
            self.is_refused, self.is_begun = False, self.is_begun or bool(text)
        except OSError as error:
            if not self.is_begun:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            if not self.is_refused:
                print(f"warning: {self.path} cannot be written ({error.strerror}); the run goes on and tries again with the "
                      "next line", file=sys.stderr)  # fmt: skip
            self.is_refused = True

    def place(self) -> tuple[int, bytes]:
        """Where the file ends now, for go_back()."""
        return self.path.stat().st_size if self.path.exists() else 0, self.waiting

    def go_back(self, place: tuple[int, bytes]) -> None:
        """Take back what was written since."""
        size, self.waiting = place
        if self.path.exists():
            os.truncate(self.path, size)


class Journal:
    """journal.jsonl of an output folder, the status line, and the loggers of --report_to.

    step is the step that the run stands at: 0 begins a new file, k > 0 continues an old one after its step k and
    notes {"event": "resume", "step": k}. The screen and the logger hear of every logging_steps-th step, the file of
    all. Raises UserError if a logger's package is missing.
    """

    def __init__(self, folder: str | Path, last_step: int, step: int = 0, logging_steps: int = 1,
                 report_to: str = "none"):
        self.path = Path(folder) / "journal.jsonl"
        from model.shards import whole_file  # which needs torch, as --help does not

        self.last_step, self.logging_steps = last_step, logging_steps
        self.shown_gib = 0.0  # the peak memory that the screen has shown
        self.seconds_per_step = 0.0  # running mean since this start, for the time that is left
        self.logger = None if report_to == "none" else open_logger(report_to, folder)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_journal(self.path) if record["step"] <= step] if step else []
        kept = [record for record in kept if record.get("event") != "comparison"]  # made again at the end
        with whole_file(self.path) as file:
            file.write("".join(map(_line, kept)).encode())
        self.file = PatientFile(self.path)
        self.bar = tqdm(total=last_step, initial=step, unit="step", leave=False, disable=None)  # None: terminals only
        if step:
            self.event("resume", step)

    def step(self, step: int, *, epoch: float, loss: float, lr: float, grad_norm: float, supervised_tokens: int,
             seconds: float, data_wait: float, memory: float, rows: list[str], skipped: bool = False,
             **statistics: float) -> None:
        """Write one step down. seconds = wall time of the whole step, data_wait (seconds) included; memory = peak GiB.

        rows: the ids of the step's rows. skipped: its update was not made. statistics: figures of the stage; those named
        *_seconds are shares of `seconds` and become the report's picture of where the time went.
        """
        record = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm, "supervised_tokens": supervised_tokens,
                  "seconds": seconds, "data_wait": data_wait, "memory": memory, **statistics, "rows": rows}
        if skipped:
            record["skipped"] = True
        self.file.write(_line(record))
        self.seconds_per_step = 0.9 * self.seconds_per_step + 0.1 * seconds if self.seconds_per_step else seconds
        self.bar.update()
        if step % self.logging_steps == 0 or step == self.last_step or skipped:
            self.say(*self._status(record, epoch, statistics))
            self._log(record)

    def event(self, event: str, step: int, **values: Any) -> None:
        """Write down something that is not a step: evaluation, commit, resume; values must not hold a `loss`."""
        record = {"event": event, "step": step, **values}
        self.file.write(_line(record), sync=True)  # rare, and a commit's record should survive what the commit survives
        self._log(record)

    def say(self, *parts: str) -> None:
        """Print a line above the status bar: the parts side by side, or below each other where the terminal is too narrow."""
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
        lines = [parts[0]]
        for part in parts[1:]:
            if len(lines[-1]) + 2 + len(part) <= width:
                lines[-1] += f"  {part}"
            else:
                lines.append(f"    {part}")
        tqdm.write("\n".join(lines))

    def _log(self, record: dict) -> None:
        if self.logger:
            self.logger.log({key: value for key, value in record.items() if isinstance(value, int | float)})

    def _status(self, record: dict, epoch: float, statistics: dict[str, float]) -> list[str]:
        left = int(self.seconds_per_step * (self.last_step - record["step"]))
        width = len(str(self.last_step))
        line = (f"step {record['step']:{width}d}/{self.last_step}  epoch {epoch:.2f}  loss {record['loss']:.4f}  "
                f"lr {record['lr']:.1e}  norm {record['grad_norm']:.2f}  "
                f"{record['supervised_tokens'] / max(record['seconds'], 1e-9):.0f} tok/s  "
                f"eta {tqdm.format_interval(left)}")  # 80 columns, with up to 9,999 steps; the rest where it is news
        if record["memory"] > self.shown_gib + 0.1:
            self.shown_gib = record["memory"]
            line += f"  peak {self.shown_gib:.2f} GiB"
        if record["data_wait"] > 0.2 * record["seconds"]:  # worth a look: num_workers, or a slow disk
            line += f"  wait {record['data_wait']:.2f} s"
        shown = [f"{key} {value:.4g}" for key, value in statistics.items() if not key.endswith("_seconds")]
        return [line, *shown] + (["SKIPPED"] if "skipped" in record else [])

    def close(self) -> None:
        self.bar.close()
        self.file.write("")
        if self.logger:
            self.logger.close()


class Wandb:
    """Records as a run of Weights & Biases, which needs an account and a network (or WANDB_MODE=offline)."""

    def __init__(self, folder: Path):
        import wandb
        self.run = wandb.init(dir=str(folder), name=folder.name)

    def log(self, record: dict[str, float]) -> None:
        self.run.log(record)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Records as TensorBoard event files in the folder tensorboard/ of the output folder."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, record: dict[str, float]) -> None:
        for key, value in record.items():
            self.writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self.writer.close()


def check_logger(name: str) -> None:
    """UserError if the package that --report_to names is not installed; asked before anything is loaded."""
    try:
        if name != "none":
            import_module({"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}[name])
    except ImportError:
        raise UserError(f"--report_to {name} needs a package that is not installed: pip install {name}") from None


def open_logger(name: str, folder: str | Path) -> Wandb | TensorBoard:
    """The logger that --report_to names."""
    check_logger(name)
    return {"wandb": Wandb, "tensorboard": TensorBoard}[name](Path(folder))
