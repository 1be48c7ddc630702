"""Before the first step: the rehearsal, the forecast, three rows as the model sees them, and the journal's first records.

Both functions are given train.py's Run, whose own forward, backward and saving are what is rehearsed.
"""

import shlex
import sys
from importlib.metadata import version
from typing import Any

from data.batches import Encoded
from data.explain import explain_rows
from data.lengths import NUM_LONGEST
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


def write(run: Any, expected: Forecast) -> None:
    """The journal's first records: what runs where on what, and what it is expected to take."""
    run.journal.event(
        "start", 0, command=shlex.join(["python", "train.py", *sys.argv[1:]]), machine=run.machine,
        versions={name: version(name) for name in LIBRARIES}, time=now(), last_step=run.last,
        data=run.rows.files, trainable=run.parameter_table,
    )
    run.journal.event("forecast", 0, gib=expected.parts, seconds_per_update=expected.seconds_per_update, hours=expected.hours)
