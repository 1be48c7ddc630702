"""Is it right on a card? Small things against a CPU reference in fp32, for bench/gpu.py; on a CPU the same functions run.

Each check yields rows: what was compared, the largest relative error found, and the error that is allowed. The allowed ones
follow from the arithmetic (bf16 keeps 8 bits, int8 and nf4 what their tests say), not from what a card once gave.
"""

import contextlib
import io
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.real_size import REAL, TINY_PICTURE, TINY_ROW, write_rows
from data.labels import NO_LOSS
from data.records import open_records
from lora import adapter
from model import attention, load_model
from model.family import Family, Model
from model.tiny import write_tiny

Row = dict[str, Any]
SEGMENTS = [1, 200, 37, 64, 64, 64, 500]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted| over the whole tensor, in fp64 on the processor."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def check(what: str, error: float, allowed: float, **more: Any) -> Row:
    """A row that is ok or WRONG; NaN is WRONG."""
    return {"what": what, "status": "ok" if error <= allowed else "WRONG", "error": error, "allowed": allowed, **more}


def seconds_of(function, device: torch.device, rounds: int = 20) -> float:
    """Seconds of one call, after one that warms up."""
    from training.rehearsal import clock

    function()
    began = clock(device)
    for _ in range(rounds):
        function()
    return (clock(device) - began) / rounds


# ---- attention ----------------------------------------------------------------------------------------------------------


def check_attention(device: torch.device, scratch: Path, dry: bool) -> Iterator[Row]:
    """The row's one kernel (bf16) and the runs of segments (fp32) against the processor: outputs and gradients, for the head
    counts and sizes of the five families; then the kernel's speed against the runs, where there is a kernel."""
    flash = attention.has_flash_attention(device)
    yield {"what": "varlen kernel", "status": "ok", "used": flash, "torch": torch.__version__}
    for heads, key_heads, size, causal in ((14, 2, 64, True), (16, 16, 80, False), (16, 16, 112, False), (32, 32, 96, True),
                                           (32, 2, 128, True)):
        generator = torch.Generator().manual_seed(0)
        exact = [torch.randn(h, sum(SEGMENTS), size, generator=generator).bfloat16() for h in (heads, key_heads, key_heads)]
        reference = None
        what = f"attention {heads}/{key_heads} x {size}, {'causal' if causal else 'full'}"
        for place, dtype, allowed in ((torch.device("cpu"), torch.float32, 0.0), (device, torch.float32, 1e-4),
                                      (device, torch.bfloat16, 2e-2)):  # fmt: skip
            inputs = [x.to(place, dtype).requires_grad_() for x in exact]
            out = attention.segment_attention(*inputs, SEGMENTS, causal=causal, scale=size**-0.5)
            weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
            found = [out, *torch.autograd.grad((out.float() * weight.to(place)).sum(), inputs)]
            if reference is None:
                reference = found
                continue
            error = max(relative(a, b) for a, b in zip(found, reference, strict=True))
            yield check(f"{what}, {str(dtype)[6:]} on {place.type}", error, allowed)
    lengths = [50] * 2 if dry else [1024, 512, 300, 212] * 4
    q, k, v = (torch.randn(h, sum(lengths), 128, device=device, dtype=torch.bfloat16) for h in (16, 2, 2))
    run = lambda: attention.segment_attention(q, k, v, lengths, causal=True, scale=0.1)  # noqa: E731
    speed = {"seconds": seconds_of(run, device)}
    if flash:
        kernel, attention.has_flash_attention = attention.has_flash_attention, lambda device: False
        try:
            speed["seconds_by_segment"] = seconds_of(run, device)
        finally:
            attention.has_flash_attention = kernel
    yield {"what": f"forward of {sum(lengths)} positions in {len(lengths)} segments", "status": "ok"} | speed


# ---- whole networks, tiny -----------------------------------------------------------------------------------------------


def tiny(name: str, scratch: Path) -> Path:
    folder = scratch / f"tiny-{name}"
    if not folder.exists():
        write_tiny(name, folder)
    return folder


def examples_of(family: Family, name: str, scratch: Path) -> list:
    """A text row and, where the family takes pictures, one with a picture."""
    found = []
    for number, picture in enumerate([None] + [TINY_PICTURE] * bool(REAL[name].picture)):
        path = scratch / f"{name}-{number}.jsonl"
        write_rows(family.folder, path, TINY_ROW, picture, 1)
        record = open_records(path, None, False, "stop")[0]
        found.append(family.encode(record.messages))
    return found


def loss_and_gradients(model: Model, examples: list, precision: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits of all rows, loss, all LoRA gradients in one vector) of the product's stage on one packed row."""
    from stages.sft import Flags, Stage

    stage = Stage(Flags(), model)
    model.train()
    with precision.autocast():
        logits = torch.cat(model.logits(examples))
        (row,) = stage.pack(examples, 10**6)
        loss, _ = stage.loss(model, row.to(model.device), stage.denominator(examples))
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return logits, loss, gradients


def check_networks(device: torch.device, scratch: Path, dry: bool) -> Iterator[Row]:
    """Every family, tiny, with LoRA: logits, loss and gradients on the device in fp32 (convolutions in tf32, torch's default)
    and bf16 against fp32 on the CPU."""
    from training import precision

    for name in REAL:
        reference = None
        for place, kind, allowed in ((torch.device("cpu"), "fp32", 0.0), (device, "fp32", 2e-3), (device, "bf16", 6e-2)):
            dtypes = precision.choose(kind, place)
            model, family = load_model(tiny(name, scratch), None, dtypes.frozen, place)
            adapter.attach(model, family, adapter.Settings(r=4))
            seed_lora(model)
            found = loss_and_gradients(model, examples_of(family, name, scratch), dtypes)
            if reference is None:
                reference = found
                continue
            error = max(relative(a, b) for a, b in zip(found, reference, strict=True))
            yield check(f"{name}, {kind} on {place.type}: logits, loss, gradients", error, allowed)


def seed_lora(model: Model) -> None:
    """The same A and B on every device: small, and B not zero, so that all gradients count."""
    generator = torch.Generator().manual_seed(0)
    for p in (p for p in model.parameters() if p.requires_grad):
        p.data = torch.randn(p.shape, generator=generator).mul_(0.05).to(p.device)


def check_quantised(device: torch.device, scratch: Path, dry: bool) -> Iterator[Row]:
    """8-bit and 4-bit layers: filled on the device, dequantised as on the CPU, and the network's logits those of the 16-bit
    network with the dequantised weights; then the 8-bit product's time and error beside bitsandbytes' own."""
    from model.quantize import dequantize, is_quantized

    for quant, allowed in (("8bit", 1e-3), ("4bit", 1e-3)):
        model, family = load_model(tiny("qwen2_5_vl", scratch), quant, torch.float32, device)
        whole, _ = load_model(tiny("qwen2_5_vl", scratch), None, torch.float32, device)
        on_cpu, _ = load_model(tiny("qwen2_5_vl", scratch), quant, torch.float32)
        layers = {n: m for n, m in model.net.named_modules() if is_quantized(m)}
        there = all(m.weight.device.type == device.type and m.weight.element_size() == 1 for m in layers.values())
        yield check(f"{quant} weights are bytes on the device", 0.0 if layers and there else 1.0, 0.0, layers=len(layers))
        same = [relative(dequantize(m), dequantize(on_cpu.net.get_submodule(n))) for n, m in layers.items()]
        yield check(f"{quant} dequantised as on the CPU", max(same), 1e-2)  # a value between two levels may fall to either
        with torch.no_grad():
            for name, layer in layers.items():
                whole.net.get_submodule(name).weight.copy_(dequantize(layer))
        examples = examples_of(family, "qwen2_5_vl", scratch)
        error = max(relative(a, b) for a, b in zip(model.logits(examples), whole.logits(examples), strict=True))
        yield check(f"{quant} logits", error, allowed)
    yield from compare_eight_bit(device, 256 if dry else 4096, 64 if dry else 2048)


def compare_eight_bit(device: torch.device, width: int, tokens: int) -> Iterator[Row]:
    """One 8-bit layer forward and backward: ours (weight made 16-bit), bitsandbytes' (inputs in 8 bits), the 16-bit layer."""
    from torch import nn

    from model.quantize import quantize_linears, quantized_weight

    weight = torch.randn(width, width).mul_(0.02).bfloat16()
    with torch.device("meta"):
        net = nn.ModuleDict({"linear": nn.Linear(width, width, bias=False)})
    quantize_linears(net, ["linear"], "8bit", torch.bfloat16)
    net["linear"].state.threshold = 6.0  # LLM.int8 keeps outliers apart; ours has none to keep
    net["linear"].weight = quantized_weight(net["linear"], weight, device)
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    plain = weight.to(device)
    ways = {
        "bf16": lambda: torch.nn.functional.linear(x, plain),
        "ours": lambda: net["linear"](x),
        "bitsandbytes": lambda: type(net["linear"]).forward(net["linear"], x),
    }
    wanted = ways["bf16"]()
    for name, way in ways.items():
        error = relative(way(), wanted)
        seconds = seconds_of(lambda way=way: way().sum().backward(), device, 3)
        yield check(f"8-bit product of {tokens} x {width}: {name}", error, 3e-2, seconds=seconds)


# ---- optimizers -----------------------------------------------------------------------------------------------------------


def check_optimizers(device: torch.device, scratch: Path, dry: bool) -> Iterator[Row]:
    """Each optimizer on the device against fp32 AdamW on the CPU: the way of 20 steps, bytes of state, and that a new one with
    the saved state makes the very next step."""
    from training import optim

    start, target = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))

    def begin(name: str, place: torch.device, weight: torch.Tensor, dtype: torch.dtype):
        layer = torch.nn.Linear(512, 512, bias=False, device=place, dtype=dtype)
        layer.weight.data.copy_(weight)
        return layer, optim.build_optimizer(name, optim.parameter_groups(layer, 0.01), 1e-2)

    def walk(layer, optimizer, steps: int) -> torch.Tensor:
        torch.manual_seed(0)  # of the stochastic rounding
        for _ in range(steps):
            layer.weight.grad = (layer.weight.detach().float() - target.to(layer.weight.device)).to(layer.weight.dtype)
            optimizer.step()
        return layer.weight.detach().clone()

    reference = walk(*begin("adamw", torch.device("cpu"), start, torch.float32), 20)
    kinds = [("adamw", torch.float32, 1e-5)]
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        # of a way of 0.2: 8-bit moments are off by some percent, and each bf16 rounding of a weight near 1 by 0.002
        kinds += [(name, torch.float32, 5e-2), (name, torch.bfloat16, 1e-1)]
    for name, dtype, allowed in kinds:
        what = f"{name}, {str(dtype)[6:]} weights"
        layer, optimizer = begin(name, device, start, dtype)
        weight = walk(layer, optimizer, 20)
        tensors, numbers = optim.optimizer_tensors(optimizer)
        state = {"state_bytes": sum(t.nbytes for t in tensors.values()) / weight.numel()}
        state["paged"] = any(getattr(t, "is_paged", False) for t in tensors.values())
        yield check(f"{what}: 20 steps", relative(weight.cpu().float() - start, reference - start), allowed, **state)
        other, loaded = begin(name, device, weight, dtype)
        optim.load_optimizer_tensors(loaded, {key: tensor.clone() for key, tensor in tensors.items()}, numbers)
        error = relative(walk(other, loaded, 1), walk(layer, optimizer, 1))
        yield check(f"{what}: a loaded state goes on", error, 0.0)


# ---- a run ------------------------------------------------------------------------------------------------------------------


def run_train(folder: Path, rows: Path, output: Path, *flags: Any) -> list[dict]:
    """train.py's own run with these flags; its journal. What it prints goes to output/log.txt."""
    import train
    from stages import list_stages
    from training.checkpoint import find_resume
    from training.config import read_config
    from training.guards import open_folder
    from training.journal import read_journal

    modules = list_stages()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}  # a failed run keeps them
    argv = ["--base_model", folder, "--data_path", rows, "--output_dir", output, "--eval_every", "no", *flags]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            stage_flags = {name: module.Flags for name, module in modules.items()}
            config = read_config([*map(str, argv), "--batch_size", "1"], stage_flags)
            lock = open_folder(output)
            try:
                code = train.Run(config, modules[config.stage].Stage, find_resume(config.output_dir, config.resume)).train()
            finally:
                lock.release()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if output.exists():
            (output / "log.txt").write_text(printed.getvalue(), encoding="utf-8")
    assert code == 0, f"the run ended with {code}"
    return read_journal(output / "journal.jsonl")


def losses_of(journal: list[dict]) -> list[float]:
    return [record["loss"] for record in journal if "event" not in record]


def check_run(device: torch.device, scratch: Path, dry: bool) -> Iterator[Row]:
    """Whole tiny runs: offloaded activations and a resume in the middle give the losses of the plain run; generation gives
    the CPU's answer; workers, a checkpoint and the rehearsal go along."""
    from eval.generate import generate

    folder, rows = tiny("qwen2_5_vl", scratch), scratch / "run.jsonl"
    write_rows(folder, rows, TINY_ROW, TINY_PICTURE, 6)
    flags = ["--device", device.type, "--use_lora", "--lora_r", 4, "--learning_rate", 1e-3]
    plain = losses_of(run_train(folder, rows, scratch / "plain", *flags, "--max_steps", 6, "--save_every", 3))
    offloaded = losses_of(run_train(folder, rows, scratch / "offloaded", *flags, "--max_steps", 6, "--offload_activations"))
    yield check("losses with offloaded activations", relative(torch.tensor(offloaded), torch.tensor(plain)), 1e-3)
    resumed = run_train(folder, rows, scratch / "plain", *flags, "--max_steps", 6, "--save_every", 3, "--resume", 3)
    last = {record["step"]: record["loss"] for record in resumed if "event" not in record}
    error = relative(torch.tensor([last[step] for step in (4, 5, 6)]), torch.tensor(plain[3:]))
    yield check("losses after a resume", error, 1e-3, bit_for_bit=error == 0.0)
    answers = []
    for place in (torch.device("cpu"), device):
        model, family = load_model(folder, None, torch.float32, place)
        prompt = family.encode_prompt([{"role": "user", "content": "good day"}])
        began = time.perf_counter()
        answers.append(generate(model, [prompt], 16, stop_ids=[])[0].ids)
        seconds = time.perf_counter() - began
    differ = sum(a != b for a, b in zip(*answers, strict=True)) / 16
    yield check("16 greedy tokens in fp32 differ from the CPU's", differ, 0.0, seconds=seconds)


# ---- answers --------------------------------------------------------------------------------------------------------------


def check_decoding(device: torch.device, scratch: Path, dry: bool) -> Iterator[Row]:
    """Answers by a step that is replayed as a CUDA graph against the same step called plainly: every family, tiny, in fp32 and
    on quantised layers, answers that end one by one; then tokens a second of both, Qwen2.5-0.5B in bf16."""
    from bench.real_size import RandomShards, write_folder

    for name, quant in [(name, None) for name in REAL] + [("qwen2_5_vl", "8bit"), ("qwen2_5_vl", "4bit")]:
        model, family = load_model(tiny(name, scratch), quant, torch.float32, device)
        prompts = [family.prompt_of(example) for example in examples_of(family, name, scratch)]
        (plain, _), (graphs, recorded) = (answer(model, prompts, 4, 48, replayed) for replayed in (False, True))
        differ = sum(a.ids != b.ids for a, b in zip(plain, graphs, strict=True)) / len(plain)
        wrong = 1.0 if device.type == "cuda" and not recorded else differ
        yield check(f"{name} {quant or 'fp32'}: answers by graphs that differ", wrong, 0.0, recorded=recorded)
    folder = scratch / "decoding"
    write_folder("qwen2", folder, tiny=dry)
    with patch("model.load.Shards", RandomShards):
        model, family = load_model(folder, None, torch.bfloat16, device)
    prompt, num_tokens = family.example(torch.arange(200) % 256, [NO_LOSS] * 200), 8 if dry else 256
    for num_samples in (1, 64):
        for replayed in (False, True):
            seconds = seconds_of(lambda: answer(model, [prompt], num_samples, num_tokens, replayed, []), device, 1)  # noqa: B023
            how, rate = "graphs" if replayed else "plain calls", num_samples * num_tokens / seconds
            yield {"what": f"{num_samples} answers by {how}", "status": "ok", "tokens_per_second": rate}


def answer(
    model: Model, prompts: list, num_samples: int, num_tokens: int, replayed: bool, stop_ids: list[int] | None = None
) -> tuple[list, bool]:
    """Sampled answers, with or without graphs, and whether every step could be recorded. Without stop_ids one token in
    eight stops."""
    from eval import decoding
    from eval.generate import generate

    stops = list(range(0, len(model.head_weight), 8)) if stop_ids is None else stop_ids
    with patch.object(decoding.Graphs, "usable", replayed):
        answers = generate(model, prompts, num_tokens, stops, temperature=1.0, num_samples=num_samples)
        return answers, decoding.Graphs.usable and model.device.type == "cuda"


CHECKS = {"attention": check_attention, "networks": check_networks, "quantised": check_quantised,
          "optimizers": check_optimizers, "decoding": check_decoding, "run": check_run}  # fmt: skip
