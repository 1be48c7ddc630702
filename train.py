"""Fine-tune a model: the whole run, from top to bottom.

    python train.py                                             the built-in task, on whatever machine this is
    python train.py --base_model DIR --data_path FILE --use_lora --use_8bit
    python train.py --help

Read Run.loop first: draw the examples of one optimizer step, count what their loss is divided by, run them in packed rows
that fit the memory, clip, judge, update, write down, save when due. All that a resume needs beside weights and optimizer
is one state object. What differs between SFT, DPO and RLOO is one file in stages/; what differs between models is one
file in model/families/.
"""

import math
import shutil
import sys
import time
from pathlib import Path

from data import demo
from data.errors import UserError, command
from data.sources import sha256_of
from stages import list_stages
from training import guards, memory
from training.config import Config, read_config, to_yaml, trajectory
from training.journal import Journal, is_finished, now
from training.waiting import Waiting

# What imports torch or transformers is imported where it is used, so that --help answers at once.


def main() -> int:
    """Read the settings, run them; returns the exit code."""
    modules = list_stages()
    config = read_config(sys.argv[1:], {name: module.Flags for name, module in modules.items()}, demo.SETTINGS)
    if config.print_config:
        print(to_yaml(config), end="")
        return 0
    stage = modules[config.stage].Stage
    if config.replay_step:
        from training.replay import find_weights, replay

        return replay(Run(config, stage, find_weights(config)))
    if config.demo and config.resume == "no":
        config.output_dir = demo.unused(config.output_dir)
    lock = guards.open_folder(config.output_dir)
    try:
        from training.checkpoint import find_resume

        return Run(config, stage, find_resume(config.output_dir, config.resume)).train()
    finally:
        lock.release()


class Run:
    """One training run: everything it consists of, built in the order of __init__."""

    def __init__(self, config: Config, stage_class: type, found: Path | None = None):
        """found: the checkpoint to resume from; None for a fresh run."""
        from data.batches import Batches, Encoded
        from data.rows import open_rows
        from eval.examiner import check_names
        from lora import adapter, files
        from model import load_model, options_of
        from model.checkpointing import checkpoint_blocks
        from training import optim, precision, rehearsal
        from training.state import State, seed_random

        # the machine, and where the run stands
        check_names(config)
        self.config, self.folder, self.found, self.journal = config, Path(config.output_dir), found, None
        self.device = memory.check_device(config.device)
        memory.keep_freed_memory()
        self.precision = precision.choose(config.precision, self.device)
        self.machine = memory.machine_line(self.device, self.folder)
        print(self.machine)
        if config.demo:
            demo.prepare(config)
        seed_random(config.seed)

        # the model, and which of its parameters are trained
        quant = "8bit" if config.use_8bit else "4bit" if config.use_4bit else None
        full = self.precision.full_8bit if "8bit" in config.optim else self.precision.full
        dtype = self.precision.frozen if config.use_lora else full
        if config.image_cache:  # now, because a worker that cannot write there goes on without a word
            Path(config.image_cache).mkdir(parents=True, exist_ok=True)
        self.model, self.family = load_model(config.base_model, quant, dtype, self.device, options_of(vars(config)))
        self.adapter_settings = adapter.Settings.from_config(config)
        self.parameter_table = adapter.attach(self.model, self.family, self.adapter_settings)
        if config.adapter:
            files.load_adapter(self.model, self.family, config.adapter)
        print(adapter.table_text(self.parameter_table))
        if config.gradient_checkpointing:
            blocks = [block for name in self.family.blocks for block in self.model.net.get_submodule(name)]
            checkpoint_blocks(blocks, config.offload_activations)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

        # the rows, and the steps they make
        self.stage = stage_class(config.stage_options, self.model, config.length_limit)
        self.rows = open_rows(config, self.family, self.folder, bool(found or config.replay_step), self.stage.takes)
        dataset = Encoded(self.rows.train, self.stage.encode, self.rows.lengths.kept)
        self.batches = Batches(dataset, config.batch_size * config.grad_accum, config.seed, config.num_workers)
        self.last = optim.count_updates(config.epochs, config.max_steps, self.batches.steps_per_epoch)
        print(f"{self.rows.text}; {self.last} updates of {self.batches.step_rows}, {self.batches.steps_per_epoch} an epoch")

        # the optimizer, and the state
        default_rate = self.family.learning_rate(full=not config.use_lora) * self.stage.rate
        self.rate = default_rate if config.learning_rate is None else config.learning_rate
        groups = optim.parameter_groups(self.model, config.weight_decay)
        self.optimizer = optim.build_optimizer(config.optim, groups, self.rate, betas=(0.9, config.adam_beta2))
        self.state = State(scaler=self.precision.scaler())
        self.identity = trajectory(config) | {"data_sha256": self.rows.sha256}
        if config.adapter:
            self.identity["adapter_sha256"] = sha256_of(Path(config.adapter) / files.WEIGHTS)
        self.plan = rehearsal.Plan(self.model, config, self.stage.num_answers, self.stage.held_bytes)
        self.state.micro_tokens, self.state.cache_tokens = self.plan.fit(self.rows.lengths.longest)
        self.model.train()

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> int:
        """Resume or rehearse, loop, save, evaluate, export; returns 0, 128 + the signal that ended the run, or 1 where the
        last checkpoint or the last lines of the journal could not be saved."""
        from eval.examiner import Examiner
        from training import opening

        if not self.found:
            expected = opening.rehearse_run(self)
        else:
            opening.refuse_another(self, self.found)  # before anything of the run there is written over
        self.stage.prepare(self)  # before a resume brings trained weights: DPO measures its reference here
        if self.found:
            self.resume(self.found)
            if self.state.step >= self.last and self.target.exists() and is_finished(self.folder):
                print(f"nothing to do: {self.folder} has all its {self.last} updates; train longer in a new --output_dir")
                return 0
        if not (self.folder / "run.yaml").exists():
            (self.folder / "run.yaml").write_text(to_yaml(self.config), encoding="utf-8")
        self.journal = Journal(self.folder, self.last, self.state.step, self.config.logging_steps, self.config.report_to)
        examiner = Examiner(self.config, self.model, self.stage, self.rows, self.precision, self.journal, self.state)
        if not self.found:
            opening.write(self, expected)
            examiner.examine(0, "before")
        elif self.state.step < self.last and due(self.config.eval_every, self.state.step, self.batches.steps_per_epoch):
            examiner.examine(self.state.step, "during")  # a kill came after the save and before the end of this
        stop = guards.Stop()
        try:
            self.loop(stop, examiner)
        except UserError:  # a bad row, no memory, a dead worker: what was learnt until then is saved
            if not stop.requested:  # else the stop signal went to all processes and ended a worker first
                if self.state.step:
                    self.commit()
                self.journal.close()
                stop.restore()
                raise
        saved = self.commit()
        finished = self.state.step == self.last
        if finished:
            examiner.examine(self.last, "after")
            self.export()
        stop.restore()
        examiner.compare()
        reason = "finished" if finished else "stopped by a signal"
        self.journal.event("finish", self.state.step, reason=reason, time=now(), skipped_rows=len(self.rows.bad))
        self.journal.close()
        examiner.close(finished)
        if not finished:
            return stop.exit_code
        return 0 if saved and not self.journal.file.waiting else 1

    def loop(self, stop, examiner) -> None:
        """Optimizer steps until the last one, or until a signal asks to stop."""
        import torch

        from training import optim

        config, state, per_epoch = self.config, self.state, self.batches.steps_per_epoch
        waiting = Waiting(config.num_workers)
        steps = self.batches.steps(state.step, self.last)
        while state.step < self.last and not stop.requested:
            started = time.perf_counter()
            rows = self.rows.usable(next(steps))  # 1 the rows of one step
            waited = time.perf_counter() - started
            rate = self.rate * optim.schedule(config.lr_schedule, state.step, config.warmup_steps, self.last)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            for examples in self.stage.collect(self, rows):  # the rows, once; RLOO: sampled answers, once for each update
                total = self.stage.denominator(examples)  # 2 what the loss is divided by, before any forward
                loss, figures = self.forward_backward(examples, total)  # 3 packed rows; every loss is a sum / total
                overflowed = state.scaler.unscale(self.trained.values())
                norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), config.max_grad_norm or math.inf).item()  # 4
                verdict = guards.judge(loss, norm, state.statistics, config.skip_spikes, state.scaler.scale)  # 5
                if verdict.action == "update":
                    self.optimizer.step()
                state.scaler.update(overflowed)
                self.optimizer.zero_grad(set_to_none=True)
                if verdict.action != "update":
                    break
            state.step += 1  # 6 the one state object
            seconds = time.perf_counter() - started
            self.journal.step(  # 7 one line on screen, one on disk
                state.step, epoch=state.step / per_epoch, loss=loss, lr=rate, grad_norm=norm,
                supervised_tokens=sum(e.num_supervised for e in examples), seconds=seconds, data_wait=waited, **figures,
                memory=memory.peak_gib(self.device), rows=[row.id for row in rows], skipped=verdict.action != "update",
            )
            waiting.watch(sum(row.encode_seconds for row in rows), waited, seconds, self.journal.say)
            if verdict.action != "update":
                self.no_update(verdict, rows)
            if state.step < self.last and due(config.save_every, state.step, per_epoch):  # 8 save, evaluate
                self.commit()
            if state.step < self.last and due(config.eval_every, state.step, per_epoch):
                examiner.examine(state.step, "during")

    def forward_backward(self, examples: list, total: float) -> tuple[float, dict[str, float]]:
        """Gradients of the step's loss, and its value. Out of memory anywhere drops all gradients, restores the random
        state and redoes the whole step in rows of half the size: the cut into rows cannot change the gradient."""
        from training.state import capture_random, restore_random

        random = capture_random()
        while True:
            try:
                return self.accumulate(examples, total)
            except (RuntimeError, MemoryError) as error:
                if not guards.is_out_of_memory(error):
                    raise
            self.optimizer.zero_grad(set_to_none=True)
            restore_random(random)
            if len(self.stage.pack(examples, self.state.micro_tokens)) == len(self.stage.pack(examples, 1)):
                raise UserError(
                    f"out of memory with one example of {max(map(len, examples))} positions at a time; lower --max_pixels or "
                    "--max_length, or use --use_8bit or --use_4bit. The last checkpoint is whole: --resume yes goes on from it"
                )
            self.state.micro_tokens = min(self.state.micro_tokens, sum(map(len, examples))) // 2
            self.journal.say(f"out of memory: the step is done again in packed rows of {self.state.micro_tokens} positions")

    def accumulate(self, examples: list, total: float) -> tuple[float, dict[str, float]]:
        """Forward and backward of every packed row of a step."""
        import torch

        loss_sum, figures = torch.zeros((), device=self.device), {}
        for row in self.stage.pack(examples, self.state.micro_tokens):
            with self.precision.autocast():
                loss, more = self.stage.loss(self.model, row.to(self.device), total)
            (loss * self.state.scaler.scale).backward()
            loss_sum += loss.detach()  # .item() waits for the card: once a step, not once a row
            figures = {name: figures.get(name, 0.0) + value for name, value in more.items()}
        return loss_sum.item(), {name: float(value) for name, value in figures.items()}

    def no_update(self, verdict, rows: list) -> None:
        """Write down a step whose update was not made, and why; end the run if the judge says so."""
        step = self.state.step
        self.journal.event(verdict.action, step, reason=verdict.reason)
        names = ", ".join(row.id for row in rows)
        self.journal.say(f"step {step}: no update, because {verdict.reason}; --replay_step {step} runs it again; rows: {names}")
        if verdict.action == "stop":
            raise UserError(f"step {step}: {verdict.reason}; {self.folder}/journal.jsonl has the rows of each step")

    # ---- saving -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[dict, dict]:
        """Everything a resume needs, as files of tensors and files of plain data."""
        from training import optim
        from training.state import capture_random

        moments, numbers = optim.optimizer_tensors(self.optimizer)
        random = capture_random()
        tensors = {"trained.safetensors": self.trained, "optimizer.safetensors": moments, "random.safetensors": random}
        return tensors, {"state.json": self.state.to_json(), "optimizer.json": numbers, "identity.json": self.identity}

    def commit(self) -> bool:
        """Save a checkpoint; where the disk refuses, say so and go on. Returns whether it is saved."""
        from training import checkpoint

        began = time.perf_counter()
        problem = checkpoint.commit(self.folder, self.state.step, *self.snapshot(), keep=self.config.save_total_limit)
        if problem:
            print(f"warning: {problem}; the run goes on and saves again when next due", file=sys.stderr)
        self.journal.event("commit", self.state.step, seconds=time.perf_counter() - began, problem=problem)
        return problem is None

    def resume(self, found: Path) -> None:
        """Put a checkpoint back: weights, optimizer, random state, state. Raises UserError where this run is another
        one: other settings that decide the weights, other rows, other trained parameters."""
        import torch

        from training import checkpoint, opening, optim
        from training.state import State, restore_random

        tensors, jsons = checkpoint.load(found)
        weights = tensors["trained.safetensors"]
        alone = [f"{name} is trained in only one of the two" for name in sorted(set(weights) ^ set(self.trained))[:3]]
        opening.refuse_another(self, found, alone)
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(weights[name])
        optim.load_optimizer_tensors(self.optimizer, tensors["optimizer.safetensors"], jsons["optimizer.json"])
        restore_random(tensors["random.safetensors"])
        self.state = State.from_json(jsons["state.json"])
        if self.config.micro_tokens != "auto":
            self.state.micro_tokens = self.config.micro_tokens
        print(f"resumed from {found}, after step {self.state.step}")

    @property
    def target(self) -> Path:
        """Where the result goes."""
        return self.folder / ("adapter" if self.config.use_lora else "model")

    def export(self) -> None:
        """Write adapter/ or model/, whole or not at all, and the README that says what to do with it."""
        from lora import files
        from model import save_model
        from training.readme import write_readme

        target = self.target
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        if self.config.use_lora:
            files.save_adapter(self.model, self.family, part, self.adapter_settings, self.config.base_model)
        else:
            save_model(self.model, part)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        write_readme(self.folder, self.config, self.family)


def due(every: int | str, step: int, steps_per_epoch: int) -> bool:
    """Whether something done every N steps, every "epoch" or never ("no") is due after this step."""
    return every != "no" and step % (steps_per_epoch if every == "epoch" else every) == 0


if __name__ == "__main__":
    command(main)
