"""Fine-tune a model: the whole run, from top to bottom.

    python train.py                                             the built-in task, on whatever machine this is
    python train.py --base_model DIR --data_path FILE --use_lora --use_8bit
    python train.py --help

The loop below is the whole of it: draw the examples of one optimizer step, count what their loss is divided by, run them
in packed rows that fit the memory, clip, judge, update, write down, save when due. What is kept for a resume is one state
object; what differs between SFT, DPO and RLOO is one file in stages/; what differs between models is one file in
model/families/.
"""

import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from data import demo
from data.errors import UserError, command
from stages import list_stages
from training.config import Config, read_config, to_yaml, trajectory


TIME = "%Y-%m-%d %H:%M:%S"


def main() -> int:
    modules = list_stages()
    config = read_config(sys.argv[1:], {name: module.Flags for name, module in modules.items()}, getattr(demo, 'SETTINGS', {}))
    if config.print_config:
        print(to_yaml(config), end="")
        return 0
    return train(config, modules[config.stage].Stage)


def train(config: Config, stage_class: type) -> int:
    """Run the training that config describes; returns the exit code (0, or 128 + the signal that ended it)."""
    import torch

    from data.batches import Batches, Encoded
    from data.labels import explain
    from data.rows import open_rows
    from eval.examiner import Examiner
    from lora import adapter, files
    from model import load_model
    from model.checkpointing import checkpoint_blocks
    from model.family import Options
    from training import checkpoint, guards, memory, optim, precision
    from training.journal import Journal
    from training.rehearsal import MICRO_TOKENS, forecast, planned_parts, rehearse

    # ---- the machine, and the folder of this run
    device = memory.check_device(config.device)
    dtypes = precision.choose(config.precision, device)
    machine = memory.machine_line(device, config.output_dir)
    print(machine)
    folder = Path(config.output_dir)
    lock = guards.open_folder(folder)
    found = checkpoint.find_resume(folder, config.resume)
    if config.demo:
        demo.prepare(folder, config)
    torch.manual_seed(config.seed)

    # ---- the model, and what of it is trained
    quant = "8bit" if config.use_8bit else "4bit" if config.use_4bit else None
    storage = dtypes.frozen if config.use_lora else dtypes.full_8bit if "8bit" in config.optim else dtypes.full
    options = Options(max_pixels=config.max_pixels, tool_template=config.tool_template, labels=config.labels)
    model, family = load_model(config.base_model, quant, storage, device, options)
    settings = adapter.Settings.from_config(config)
    adapter.attach(model, family, settings)
    if config.adapter:
        files.load_adapter(model, family, config.adapter)
    print(adapter.table_text(model))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if config.gradient_checkpointing:
        blocks = [block for name in family.blocks for block in model.net.get_submodule(name)]
        checkpoint_blocks(blocks, config.offload_activations)

    # ---- the rows
    stage = stage_class(config.stage_options, family, None if config.max_length == "auto" else config.max_length)
    rows = open_rows(config, family, folder)
    dataset = Encoded(rows.train, stage.encode, rows.train_rows)
    batches = Batches(dataset, config.batch_size * config.grad_accum, config.seed, config.num_workers)
    last = config.max_steps or math.ceil(config.epochs * batches.steps_per_epoch)
    print(rows.text + f"; {last} updates of {batches.step_rows} rows, {batches.steps_per_epoch} an epoch")

    # ---- the optimizer, and where the run stands
    rate = config.learning_rate or family.learning_rate(full=not config.use_lora)
    groups = optim.parameter_groups(model, config.weight_decay)
    optimizer = optim.build_optimizer(config.optim, groups, rate, betas=(0.9, config.adam_beta2))
    state = checkpoint.State(scaler=dtypes.scaler())
    identity = trajectory(config) | {"data_sha256": rows.sha256}

    def snapshot() -> tuple[dict, dict]:
        """Everything a resume needs, as files of tensors and of plain data."""
        moments, numbers = optim.optimizer_tensors(optimizer)
        tensors = {"trained": trained, "optimizer": moments, "random": checkpoint.capture_random()}
        jsons = {"state.json": state.to_json(), "optimizer.json": numbers, "identity.json": identity}
        return {f"{name}.safetensors": content for name, content in tensors.items()}, jsons

    if found:
        state = resume(found, identity, trained, optimizer)
        if state.step >= last:
            print(f"nothing to do: {folder} has all {last} updates; raise --epochs or --max_steps in a new --output_dir")
            return 0
    else:
        (folder / "run.yaml").write_text(to_yaml(config), encoding="utf-8")

    # ---- micro-batches, and the rehearsal
    model.train()

    def accumulate(examples: list, total: float, micro_tokens: int) -> tuple[float, dict]:
        """Forward and backward of one optimizer step in packed rows; gradients add up to those of the sum / total."""
        loss_sum, statistics = 0.0, {}
        for row in stage.pack(examples, micro_tokens):
            with dtypes.autocast():
                loss, figures = stage.loss(model, row.to(device), total)
            (loss * state.scaler.scale).backward()
            loss_sum += loss.item()
            statistics = {name: statistics.get(name, 0.0) + value for name, value in figures.items()}
        return loss_sum, statistics

    longest = [stage.encode(rows.train[i]) for i in rows.lengths.longest_rows[: batches.step_rows]]

    def plan(tokens: int) -> list[tuple[str, float]]:
        dropout = config.use_lora and config.lora_dropout > 0
        return planned_parts(model, config.optim, tokens, tokens, config.gradient_checkpointing, dropout)

    micro_tokens = config.micro_tokens
    if micro_tokens == "auto":
        micro_tokens = memory.choose_micro_tokens(
            lambda tokens: sum(gib for _, gib in plan(tokens)), memory.free_gib(device), rows.lengths.longest, MICRO_TOKENS[device.type]
        )
    if not found:
        def worst() -> int:
            picked = fill(longest, micro_tokens)
            accumulate(picked, stage.denominator(picked), micro_tokens)
            return sum(map(len, picked))

        per_position = rehearse(folder, model, optimizer, worst, snapshot)
        expected = forecast(model, plan(micro_tokens), per_position, rows.mean_length * batches.step_rows, last)
        print(f"forecast, with packed rows of {micro_tokens} positions:\n{expected.text()}")
        print(f"a row as the model sees it, supervised tokens marked:\n{explain(longest[-1], family.tokenizer)[:4000]}")

    # ---- the loop
    journal = Journal(folder, last, state.step, config.logging_steps, config.report_to)
    if not found:
        journal.event("start", 0, command=shlex.join(["python", "train.py", *sys.argv[1:]]), machine=machine, versions=versions(),
                      time=time.strftime(TIME), last_step=last, data=rows.files, trainable=adapter.trainable_table(model))
        journal.event("forecast", 0, gib=expected.parts, seconds_per_update=expected.seconds_per_update, hours=expected.hours)
    examiner = Examiner(config, model, rows, dtypes, journal, micro_tokens, state.step)
    if not found:
        examiner.examine(0, "before")
    stop = guards.Stop()
    steps = batches.steps(state.step, last)
    while state.step < last and not stop.requested:
        started = time.perf_counter()
        examples = rows.usable(next(steps))  # 1 the examples of one optimizer step
        waited = time.perf_counter() - started
        total = stage.denominator(examples)  # 2 the denominator, before any forward
        loss, figures, micro_tokens = with_less_memory(accumulate, examples, total, micro_tokens, optimizer)  # 3
        overflowed = state.scaler.unscale(trained.values())
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm or math.inf).item()  # 4
        verdict = guards.judge(loss, norm, state.statistics, loss_scale=state.scaler.scale)  # 5
        multiplier = optim.schedule(config.lr_schedule, state.step, config.warmup_steps, last)
        if verdict.action == "update":
            for group in optimizer.param_groups:
                group["lr"] = rate * multiplier
            optimizer.step()
        state.scaler.update(overflowed)
        optimizer.zero_grad(set_to_none=True)
        supervised = sum(example.num_supervised for example in examples)
        state.advance(len(examples), supervised)  # 6 the one state object
        journal.step(  # 7
            state.step, epoch=state.step / batches.steps_per_epoch, loss=loss, lr=rate * multiplier, grad_norm=norm,
            supervised_tokens=supervised, seconds=time.perf_counter() - started, data_wait=waited,
            memory=memory.peak_gib(device), rows=None if verdict.action == "update" else [e.id for e in examples], **figures,
        )
        if verdict.action != "update":
            journal.event(verdict.action, state.step, reason=verdict.reason)
            print(f"step {state.step}: no update, because {verdict.reason}; rows: {', '.join(e.id for e in examples)}")
        if verdict.action == "stop":
            raise UserError(f"{verdict.reason}; the weights are those of step {state.step - guards.MAX_BAD}, see journal.jsonl")
        finished = state.step == last
        if finished or due(config.eval_every, state.step, batches.steps_per_epoch):  # 8
            examiner.examine(state.step, "after" if finished else "during")
        if finished or stop.requested or due(config.save_every, state.step, batches.steps_per_epoch):
            began = time.perf_counter()
            problem = checkpoint.commit(folder, state.step, *snapshot(), keep=config.save_total_limit)
            if problem:
                print(f"warning: {problem}; the run goes on and saves again when next due", file=sys.stderr)
            journal.event("commit", state.step, seconds=time.perf_counter() - began, problem=problem)

    # ---- the end
    finished = state.step == last
    examiner.compare()
    journal.event("finish", state.step, reason="finished" if finished else "stopped by a signal", time=time.strftime(TIME))
    journal.close()
    if finished:
        export(config, settings, model, folder)
    examiner.close(finished)
    lock.release()
    return 0 if finished else stop.exit_code


def resume(found: Path, identity: dict, trained: dict, optimizer):
    """Put a checkpoint back: weights, optimizer, random state; returns its State. Raises UserError where this run is
    another one: other settings that decide the weights, other rows, other trained parameters."""
    import torch

    from training import checkpoint, optim

    tensors, jsons = checkpoint.load(found)
    saved = jsons["identity.json"]
    changed = [f"{key} was {saved.get(key)}, is {value}" for key, value in identity.items() if saved.get(key) != value]
    if changed:
        raise UserError(f"{found} is of a run with other settings: {'; '.join(changed)}; give those again, or another --output_dir")
    weights = tensors["trained.safetensors"]
    if set(weights) != set(trained):
        odd = sorted(set(weights) ^ set(trained))
        raise UserError(f"{found} holds other trained tensors than this run: {', '.join(odd[:3])}")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(weights[name])
    optim.load_optimizer_tensors(optimizer, tensors["optimizer.safetensors"], jsons["optimizer.json"])
    checkpoint.restore_random(tensors["random.safetensors"])
    state = checkpoint.State.from_json(jsons["state.json"])
    print(f"resumed from {found}, after step {state.step}")
    return state


def export(config: Config, settings, model, folder: Path) -> None:
    """Write adapter/ or model/, whole or not at all, and the README that says what to do with it."""
    import shutil

    from lora import files
    from model import save_model
    from training.readme import write_readme

    name = "adapter" if config.use_lora else "model"
    temporary = folder / f".{name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    if config.use_lora:
        files.save_adapter(model, model.family, temporary, settings, config.base_model)
    else:
        save_model(model, temporary)
    shutil.rmtree(folder / name, ignore_errors=True)
    temporary.rename(folder / name)
    write_readme(folder, config, model.family)


def with_less_memory(accumulate: Callable, examples: list, total: float, micro_tokens: int, optimizer) -> tuple[float, dict, int]:
    """accumulate(...); out of memory anywhere drops all gradients, restores the random state and redoes the whole step
    with rows of half the size, down to one example a row. Returns (loss, statistics, the size that worked)."""
    from training.checkpoint import capture_random, restore_random
    from training.guards import is_out_of_memory

    random = capture_random()
    while True:
        try:
            return *accumulate(examples, total, micro_tokens), micro_tokens
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        optimizer.zero_grad(set_to_none=True)
        restore_random(random)
        if micro_tokens <= min(map(len, examples)):
            raise UserError(
                f"out of memory with one row of {max(map(len, examples))} positions at a time; lower --max_pixels or "
                "--max_length, or use --use_8bit or --use_4bit. The last checkpoint is whole: --resume yes goes on from it"
            )
        micro_tokens //= 2
        print(f"out of memory: the step is done again with packed rows of {micro_tokens} positions")


def due(every: int | str, step: int, steps_per_epoch: int) -> bool:
    """Whether something that happens every N steps, every "epoch" or "no" time happens after this step."""
    return every != "no" and step % (steps_per_epoch if every == "epoch" else every) == 0


def fill(examples: list, micro_tokens: int) -> list:
    """As many of the longest examples as fill one packed row."""
    picked = [examples[0]]
    for example in examples[1:]:
        if sum(map(len, picked)) + len(example) <= micro_tokens:
            picked.append(example)
    return picked


def versions() -> dict[str, str]:
    """The libraries that a run's figures depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "tokenizers")}


if __name__ == "__main__":
    command(main)
