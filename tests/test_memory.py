"""The plan against published and measured figures, the choice of a micro-batch, and what a machine is told."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from data.errors import UserError
from training import memory
from training.memory import GIB, Stack, advise, block_bytes, choose_micro_tokens, plan

ROOT = Path(__file__).parent.parent

# Sizes from the models' config.json: (D, query, key, intermediate, layers), V, parameters by part, LoRA r16 parameters.
MODELS = {
    "qwen2.5-0.5b": (Stack(2048, 896, 896, 128, 4864, 24), 151936, 0.358e9, 0.136e9, 0.0, 8.8e6),
    "proxy-lite": (Stack(2048, 2048, 2048, 256, 11008, 36), 151936, 2.775e9, 0.311e9, 0.669e9, 29.9e6),
    "minicpm": (Stack(2048, 4096, 4096, 1024, 14336, 32), 128256, 6.98e9, 1.051e9, 0.50e9, 41.9e6),
}


def planned(name, dtype="bfloat16", **settings):
    language, vocabulary, blocks, embedding, vision, adapter = MODELS[name]
    size = {"bfloat16": 2.0, **memory.QUANTISED_BYTES}[dtype]
    weights = {("language", dtype): blocks * size, ("embedding", "bfloat16"): embedding * 2,
               ("vision", "bfloat16"): vision * 2, ("trained", "float32"): adapter * 4}
    return plan(weights, int(adapter), language, vocabulary=vocabulary, **{"head_positions": 256, **settings})


def total(parts):
    return sum(size for _, size in parts)


@pytest.mark.parametrize("name, dtype, head_positions, expected", [
    ("qwen2.5-0.5b", "bfloat16", 256, 2.5), ("qwen2.5-0.5b", "int8", 256, 2.1), ("qwen2.5-0.5b", "nf4", 256, 2.0),
    ("proxy-lite", "bfloat16", 256, 9.1), ("proxy-lite", "bfloat16", 2048, 12.1), ("proxy-lite", "int8", 256, 6.5),
    ("proxy-lite", "nf4", 256, 5.2), ("minicpm", "bfloat16", 256, 18.4), ("minicpm", "int8", 256, 12.0),
    ("minicpm", "bfloat16", 2048, 20.9),
])
def test_lora_plans_agree_with_an_independent_model(name, dtype, head_positions, expected):
    assert total(planned(name, dtype, head_positions=head_positions)) == pytest.approx(expected, rel=0.025)


@pytest.mark.parametrize("gradient_bytes, state_bytes, weight_bytes, expected", [
    (2, memory.STATE_BYTES["adamw_8bit"], 2, 20.2),  # bf16 weights and gradients
    (4, memory.STATE_BYTES["adamw"], 4, 48.9),       # fp32 everything
])
def test_full_fine_tuning_of_proxy_lite(gradient_bytes, state_bytes, weight_bytes, expected):
    language, vocabulary, blocks, embedding, vision, _ = MODELS["proxy-lite"]
    num_trained = blocks + embedding
    weights = {("trained", "any"): num_trained * weight_bytes, ("vision", "bfloat16"): vision * 2}
    parts = plan(weights, int(num_trained), language, vocabulary=vocabulary, head_positions=256,
                 gradient_bytes=gradient_bytes, state_bytes=state_bytes)
    assert total(parts) == pytest.approx(expected, rel=0.025)


def test_the_estimate_of_a_block_is_above_what_autograd_keeps_but_not_far():
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

    config = Qwen2Config(hidden_size=256, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=2,
                         num_hidden_layers=1, vocab_size=64, attn_implementation="sdpa")
    torch.manual_seed(0)
    layer = Qwen2DecoderLayer(config, 0).to(torch.bfloat16)
    hidden = torch.randn(1, 300, 256, dtype=torch.bfloat16, requires_grad=True)  # (B, T, D)
    positions = Qwen2RotaryEmbedding(config)(hidden, torch.arange(300)[None])
    known = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept = {}  # one storage may be saved by several operations

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(hidden, position_embeddings=positions)
    measured = sum(size for address, size in kept.items() if address not in known)
    assert output.requires_grad
    estimate = block_bytes(memory.stack_from_config(config, 300))
    assert 1.0 <= estimate / measured <= 1.45


def test_the_total_is_the_sum_and_only_the_largest_moment_counts():
    parts = dict(planned("proxy-lite"))
    assert "one chunk of logits" in parts and "one language block" not in parts
    assert "one language block" in dict(planned("proxy-lite", head_positions=16))
    frozen = Stack(16000, 1280, 1280, 1280, 3420, 32, trained=False)
    assert "one vision block" in dict(planned("proxy-lite", vision=frozen))
    assert "vision block inputs" not in dict(planned("proxy-lite", vision=frozen))
    assert "vision block inputs" in dict(planned("proxy-lite", vision=replace(frozen, trained=True)))


def test_without_checkpointing_all_blocks_are_kept():
    language = MODELS["proxy-lite"][0]
    parts = dict(planned("proxy-lite", checkpointing=False))
    assert parts["language activations"] * GIB == pytest.approx(36 * block_bytes(language))
    assert "language block inputs" not in parts


def test_stack_from_config_reads_text_and_vision_configs():
    from transformers import Qwen2_5_VLConfig

    config = Qwen2_5_VLConfig(
        text_config=dict(hidden_size=2048, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008,
                         num_hidden_layers=36, layer_types=None),
        vision_config=dict(hidden_size=1280, depth=32, num_heads=16, intermediate_size=3420))
    assert memory.stack_from_config(config.text_config, 2048) == MODELS["proxy-lite"][0]
    assert memory.stack_from_config(config.vision_config, 9, False) == Stack(9, 1280, 1280, 1280, 3420, 32, False)


def test_weights_are_counted_by_part_and_dtype():
    net = nn.ModuleDict({"visual": nn.Linear(8, 4, bias=False), "model": nn.Linear(8, 6, bias=False),
                         "embed": nn.Embedding(50, 8), "lora": nn.Linear(8, 2, bias=False)}).to(torch.bfloat16)
    net.requires_grad_(False)
    net["lora"].float().requires_grad_(True)
    net["model"].weight = nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)  # 48 packed weights
    parts = memory.weights_by_part(
        net.named_parameters(), lambda name: "vision" if name.startswith("visual") else "language", vocabulary=50)
    assert parts == {("vision", "bfloat16"): 64, ("language", "nf4"): pytest.approx(48 * 0.516),
                     ("embedding", "bfloat16"): 800, ("trained", "float32"): 64}


def test_choose_micro_tokens_takes_the_most_that_fits():
    def peak(tokens):
        return 5 + tokens / 1000

    assert choose_micro_tokens(peak, free_gib=20, longest=1000, most=50_000) == 14_000  # 5 + 14 = 95 % of 20
    assert choose_micro_tokens(peak, free_gib=20, longest=1000, most=8000) == 8000
    assert choose_micro_tokens(peak, free_gib=20, longest=9000, most=8000) == 9000  # a row is never cut
    with pytest.raises(UserError, match="longest row has 20000 tokens and needs about 25.0 GiB"):
        choose_micro_tokens(peak, free_gib=20, longest=20_000, most=50_000)


def test_choose_micro_tokens_with_a_real_plan_stays_inside():
    language = MODELS["proxy-lite"][0]

    def peak(tokens):
        return total(plan({("language", "bfloat16"): 7.5e9}, 30_000_000, replace(language, tokens=tokens),
                          vocabulary=151936, head_positions=min(tokens, 220)))

    chosen = choose_micro_tokens(peak, free_gib=12, longest=2048, most=10**6)
    assert peak(chosen) <= 0.95 * 12 < peak(chosen + 1)


def test_advice():
    weights = {("language", "bfloat16"): 10 * GIB}
    assert advise(weights, 12, free_gib=24) is None
    assert "--use_8bit needs 15.0" in advise(weights, 20, free_gib=18)
    assert "--use_4bit needs 12.6" in advise(weights, 20, free_gib=13)
    assert "--max_pixels" in advise(weights, 20, free_gib=5)
    assert "would need 11.0" in advise({("language", "int8"): 5 * GIB}, 6, free_gib=24)
    assert advise({("language", "int8"): 5 * GIB}, 6, free_gib=11) is None


@pytest.mark.parametrize("driver, cuda, visible, words", [
    ("550.54.14", "13.0", None, "driver 580 or newer"), ("550.54.14", "13.0", "0", "too old for CUDA 13.0"),
    ("470.82", "12.6", None, "driver 525 or newer"), ("580.65.06", None, None, "built without CUDA"),
    ("580.65.06", "13.0", "", "CUDA_VISIBLE_DEVICES=''"), ("580.65.06", "13.0", "-1", "unset it"),
    ("580.65.06", "13.0", None, "docker run --gpus all"), ("unknown", "13.0", None, "nvidia-smi"),
])
def test_a_card_that_torch_cannot_use_is_explained(driver, cuda, visible, words):
    sentence = memory.explain_unusable_card(driver, cuda, visible)
    assert words in sentence and "--device cpu" in sentence


def test_an_unusable_card_is_never_silently_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(memory, "find_driver", lambda: "550.54.14")
    for device in ("auto", "cuda"):
        with pytest.raises(UserError, match="NVIDIA"):
            memory.check_device(device)
    assert memory.check_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(memory, "find_driver", lambda: None)
    assert memory.check_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="no NVIDIA driver"):
        memory.check_device("cuda")
    with pytest.raises(UserError, match="none of auto, cpu, cuda"):
        memory.check_device("tpu")


@pytest.mark.parametrize("capability, architectures, works", [
    ((8, 9), ["sm_75", "sm_80", "sm_86", "sm_90"], True),   # sm_86 code runs on 8.9
    ((6, 1), ["sm_75", "sm_80"], False), ((12, 0), ["sm_80", "sm_90a"], False),
    ((12, 0), ["sm_80", "compute_90"], True), ((9, 0), ["sm_90a"], True), ((8, 0), ["sm_86"], False),
])
def test_supports_card(capability, architectures, works):
    assert memory.supports_card(capability, architectures) is works


def test_the_driver_is_read_from_proc(monkeypatch, tmp_path):
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
                       "GCC version:  gcc version 12.3.0 (Debian 12.3.0-17)\n")
    monkeypatch.setattr(memory, "Path", lambda path: version if "nvidia" in path else path)
    assert memory.find_driver() == "580.65.06"


@pytest.mark.parametrize("fraction, reserved, expected", [(1.0, 0, 10.5), (1.0, 10, 20.5), (0.5, 10, 12.5), (1.0, 14, 24.0)])
def test_free_memory_of_a_card_keeps_to_what_torch_may_reserve(monkeypatch, fraction, reserved, expected):
    """A card of 24 GiB with 10 free; the context is the driver's, and torch's limit does not count it."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved * GIB)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
    assert memory.free_gib(torch.device("cuda:0")) == pytest.approx(expected)


def test_the_card_that_is_asked_for_becomes_the_current_one(monkeypatch):
    """Random state and libraries follow the current card: with --device cuda:1 that must not be the first."""
    current = []
    for name, value in (("is_available", True), ("device_count", 2), ("get_device_capability", (8, 9)),
                        ("get_arch_list", ["sm_86"])):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert memory.check_device("cuda:1") == torch.device("cuda:1") and current == [torch.device("cuda:1")]


def test_this_machine():
    cpu = torch.device("cpu")
    assert 0.05 < memory.peak_gib(cpu) < memory.free_gib(cpu) + memory.peak_gib(cpu)
    block = torch.ones(300 * 2**20 // 4)
    assert memory.peak_gib(cpu) * GIB >= block.numel() * 4
    line = memory.machine_line(cpu, "outputs/not/yet/there")
    assert "\n" not in line and f"torch {torch.__version__}" in line and "GiB memory free" in line and "disk" in line


@pytest.mark.slow
def test_freed_memory_is_kept():
    """Once the heap has grown, buffers of 64 MiB take pages that the process has, instead of new ones from the kernel."""
    script = """
import resource, sys
import torch
from training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for round in range(20):
    if round == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    a, b = torch.ones(2**24), torch.ones(2**24)
    c = a + b
    del a, b, c
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    new_pages = {}
    for mode in ("keep", "default"):
        done = subprocess.run([sys.executable, "-c", script, mode], cwd=ROOT, capture_output=True, text=True, check=True)
        new_pages[mode] = int(done.stdout)
    assert new_pages["keep"] < new_pages["default"] / 10, new_pages
