"""Before the first step: the rehearsal, the forecast, three rows as the model sees them, the journal's first records. Before
a resume: whether the checkpoint is of this run.

All functions are given train.py's Run, whose own forward, backward and saving are what is rehearsed.
"""

import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data.batches import Encoded
from data.errors import UserError
from data.explain import explain_rows
from data.lengths import NUM_LONGEST
from model.files import read_json
from training.journal import now
from training.rehearsal import Forecast, fill, rehearse

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "tokenizers")


def rehearse_run(run: Any) -> Forecast:
    """Run the longest rows once and undo it; print the forecast and three rows as the model sees them."""
    rows, tokens, longest = run.rows, run.state.micro_tokens, []
    for index in rows.lengths.longest_first():  # the longest that can be used: a picture decodes or does not only now
        longest += rows.usable(list(Encoded(rows.train, run.stage.encode, [index])))
        if len(longest) == NUM_LONGEST:
            break
    worst, examples = fill(longest, tokens, run.batches.step_rows), []

    def backward() -> tuple[int, float]:
        examples[:] = run.stage.collect(run, worst)[0]
        return sum(map(len, worst)), run.accumulate(examples, run.stage.denominator(examples))[0]

    per_position, update = rehearse(run.folder, run.model, run.optimizer, backward, run.snapshot)
    seconds = per_position * rows.lengths.mean * min(run.batches.step_rows, len(rows.lengths.kept)) + update
    expected = run.plan.forecast(tokens, seconds, run.last)
    print(f"forecast, with packed rows of {tokens} positions:\n{expected.text()}")
    shown = [examples[-1], *rows.usable(list(Encoded(rows.train, run.stage.encode, rows.lengths.typical())))]
    print(explain_rows(list(map(run.stage.sequences, shown)), run.family.tokenizer))
    return expected


def refuse_another(run: Any, found: Path, more: Iterable[str] = ()) -> None:
    """UserError where a checkpoint is of a run whose rows, or settings that decide the weights, are not this one's."""
    saved = read_json(found / "identity.json")
    changed = [f"{key} was {saved.get(key)}, is {value}" for key, value in run.identity.items() if saved.get(key) != value]
    if changed := [*changed, *more]:
        raise UserError(f"{found} is of another run: {'; '.join(changed)}; give the same settings, or another --output_dir")


def write(run: Any, expected: Forecast) -> None:
    """The journal's first records: what runs where on what, and what it is expected to take."""
    run.journal.event(
        "start", 0, command=shlex.join(["python", "train.py", *sys.argv[1:]]), machine=run.machine,
        versions={name: version(name) for name in LIBRARIES}, time=now(), last_step=run.last,
        data=run.rows.files, trainable=run.parameter_table,
    )
    run.journal.event("forecast", 0, gib=expected.parts, seconds_per_update=expected.seconds_per_update, hours=expected.hours)
