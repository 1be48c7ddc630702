"""Training objectives, one file each, found by listing this folder.

A stage file defines `Flags`, a dataclass of its own settings (fields made by training.options.option; they appear in
--help and are refused with other stages; no `from __future__ import annotations` beside them, which would turn their types
into text), and `Stage`:

    Stage.takes                     the kinds of row (data/records.py KINDS) that it is for; a row of another kind is refused
    Stage(flags, model, max_length) made once, before the data is read; the model's family, device and types are there
    Stage.rate                      what the family's default learning rate is multiplied by
    encode(record) -> example       what one row becomes (something with len() in positions, id, num_supervised); in workers
    sequences(example)              its conversations as Examples: what is shown; evaluation asks for the first's answer
    prepare(run)                    once before the first step, on a resume or replay too; the weights are those of the start
    collect(run, examples) -> [examples, ..]  what the step's loss is computed on, once for each of its updates: RLOO's
                                    sampled answers; others the rows themselves, once
    denominator(examples) -> float  what the loss of a whole optimizer step is divided by, counted before its first forward
    pack(examples, micro_tokens)    the step cut into packed rows
    loss(model, packed, total) -> (sum of losses / total, figures by name, each a sum / total too)

    Stage.num_answers               how many answers of max_new_tokens are sampled to a row in collect()
    Stage.held_bytes                what the stage itself keeps in memory, bytes by name, for the plan
    Stage.task                      what answers are scored by in a run's evaluation where eval_task does not say; or None

sft.Stage has a plain answer to each, for a stage to inherit. `Flags.defaults` may hold other defaults of train.py's settings
for this stage. Evaluation in a run calls loss() too, on rows that have an answer.

Adding a stage edits nothing else. Stage files import nothing heavy at their top, so that --help answers at once.
"""

import importlib
import pkgutil
from types import ModuleType


def list_stages() -> dict[str, ModuleType]:
    """Stage name -> its module."""
    names = [info.name for info in pkgutil.iter_modules(__path__) if info.name != "__main__"]
    return {name: importlib.import_module(f"stages.{name}") for name in names}
