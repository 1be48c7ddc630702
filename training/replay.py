"""`python train.py --output_dir RUN --replay_step N`: the very batch of step N once more, row by row, without an update.

Which rows a step had is a function of the seed and its number, so no record of them is needed. The weights are those of
the newest checkpoint from before the step, else the base; where it is the step just before, loss and gradient norm are
the journal's, dropout included (of several updates on one step's answers, RLOO's --num_iterations, the first is run, and
the journal has the last). Then every row runs alone, which says whose fault it was. Writes nothing (but DPO's reference
and what a reward's server replies, where these are gone).
"""

import math
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from training.checkpoint import newest_whole
from training.journal import read_journal


def find_weights(config: Any) -> Path | None:
    """The newest whole checkpoint from before the step that is asked for; None: the base. UserError without a run."""
    folder = Path(config.output_dir)
    if not (folder / "journal.jsonl").exists():
        raise UserError(f"{folder} holds no run to replay a step of; name a run's folder with --output_dir")
    config.demo = False  # its rows and settings are in the folder
    return newest_whole(folder, before=config.replay_step)


def replay(run: Any) -> int:
    """Print what step config.replay_step of `run` (train.py's Run) does; returns the exit code, 0."""
    step, journal = run.config.replay_step, read_journal(run.folder / "journal.jsonl")
    if step > run.last:
        raise UserError(f"--replay_step {step}: the run has {run.last} steps")
    start = next(record for record in journal if record.get("event") == "start")
    before, now = ([(part["sha256"], part["weight"]) for part in parts] for parts in (start["data"], run.rows.files))
    if before != now:
        raise UserError(f"{run.folder} was trained on other rows than {run.config.data_path} holds now; bring them back")
    run.stage.prepare(run)  # the weights are those of the start
    if run.found:
        run.resume(run.found)
    run.batches.num_workers = 0
    rows = run.rows.usable(next(run.batches.steps(step - 1, step)))
    place, ago = run.found or run.config.base_model, step - 1 - run.state.step
    print(f"step {step} with the weights of {place}" + f", which lack the {ago} updates before it" * bool(ago))
    run.state.step = step - 1
    examples = run.stage.collect(run, rows)[0]
    total = run.stage.denominator(examples)
    loss, norm, problem = backward(run, examples, total)
    print(f"{'row':<32}{'tokens':>8}{'with loss':>11}{'loss':>12}{'gradient norm':>15}")
    for example in examples:
        alone = backward(run, [example], run.stage.denominator([example]))
        numbers = f"{len(example):>8}{example.num_supervised:>11}{alone[0]:>12.5g}{alone[1]:>15.5g}"
        print(f"{example.id:<32}{numbers}{'  ' if alone[2] else ''}{alone[2]}  {example.where}")
    then = next((record for record in journal if "event" not in record and record["step"] == step), None)
    known = f"; the journal has {then['loss']:.5g} and {then['grad_norm']:.5g}" if then else "; the journal does not have it"
    print(f"the step: loss {loss:.5g}, gradient norm {norm:.5g}{known}")
    print(problem or "everything is finite")
    return 0


def backward(run: Any, examples: list, total: float) -> tuple[float, float, str]:
    """(loss, gradient norm, what is not finite or "") of examples as one step; their gradients are dropped again."""
    loss, _ = run.accumulate(examples, total)
    grads = {name: p.grad for name, p in run.trained.items() if p.grad is not None}
    norms = [grad.float().norm() for grad in grads.values()]
    norm = (torch.stack(norms).norm().item() if norms else 0.0) / run.state.scaler.scale
    bad = [name for name, grad in grads.items() if not grad.isfinite().all()]
    problem = "" if math.isfinite(loss) else "the loss is not finite"
    if bad:
        problem += f"{', ' if problem else ''}{len(bad)} of {len(grads)} gradients are not finite, first {bad[0]}"
    run.optimizer.zero_grad(set_to_none=True)
    return loss, norm, problem
