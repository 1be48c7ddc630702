"""--rollout_backend vllm: beside a module of vLLM's shape that answers as eval/generate.py does, so that a whole run must be
the run of --rollout_backend own; and beside vLLM itself where it is installed."""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import small_run
import torch
from small_run import run, write_problems

import eval.generate
from data.errors import UserError
from eval import vllm_backend
from eval.generate import generate
from eval.vllm_backend import Engine
from lora import adapter, files
from model import load_model, save_model
from model.families.qwen2 import ChatML
from model.family import Model
from model.load import expected_tensors
from model.tiny import write_tiny
from training.journal import read_journal
from training.state import capture_random

pytestmark = pytest.mark.slow

FLAGS = {"stage": "rloo", "warmup_steps": 0, "reward": "test_vllm_backend:checksum", "num_samples": 3, "max_new_tokens": 8,
         "max_steps": 3, "save_every": "no", "rollout_backend": "vllm"}  # fmt: skip
flags = partial(small_run.flags, **FLAGS)
TEXTS = ["hello", "a much longer question, of more than one block of sixteen positions", "why?", "count to ten"]
HOW = {
    "full": ["--learning_rate", "3e-3"],
    "lora": ["--use_lora", "--learning_rate", "1e-2", "--lora_dropout", 0.1],
    "rslora": ["--use_lora", "--use_rslora", "--lora_r", 5, "--lora_alpha", 9, "--learning_rate", "1e-2"],
}


def checksum(reply) -> dict[str, float]:
    return {"score": sum(map(ord, reply.response)) % 11 / 10}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Tiny models with heads of 32, which vLLM's processor kernels have, weights large enough for answers that differ, and a
    generation_config.json that is to be passed by."""
    found, plain = {}, ChatML.tiny_files.__func__
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}

    def wider(cls) -> dict[str, dict]:
        named = plain(cls)
        named["config.json"] |= heads | {"tie_word_embeddings": cls.name == "qwen2"}
        return named

    for name in ("qwen2", "qwen3"):
        folder = tmp_path_factory.mktemp("bases")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ChatML, "tiny_files", classmethod(wider))
            write_tiny(name, folder / "random")
        model, _ = load_model(folder / "random", dtype="float32")
        source = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(std=0.15, generator=source)
        save_model(model, folder / name)
        settings = {"repetition_penalty": 1.5, "temperature": 0.3, "top_k": 3, "eos_token_id": [65, 66]}
        (folder / name / "generation_config.json").write_text(json.dumps(settings))
        found[name] = folder / name
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_problems(tmp_path_factory.mktemp("rows"))


def prompts_of(family) -> list:
    return [family.encode_prompt([{"role": "user", "content": text}]) for text in TEXTS]


def steps_of(output: Path) -> list[dict]:
    """The steps' records without what a clock says."""
    drop = {"seconds", "data_wait", "memory", "sampling_seconds", "scoring_seconds"}
    records = [record for record in read_journal(output / "journal.jsonl") if "event" not in record]
    return [{name: value for name, value in record.items() if name not in drop} for record in records]


# ---- beside a module of vLLM's shape --------------------------------------------------------------------------------------


@dataclass
class SamplingParams:
    """The fields that are used, by vLLM's names."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    max_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    detokenize: bool
    logprobs: int


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class Fake:
    """Holds a model of its own, read from the folder: what it samples with is what it was handed over."""

    problem = None  # what generate() raises

    def __init__(self, folder, **settings):
        self.folder, self.settings, self.seen, self.is_clean = folder, settings, set(), False
        self.model, self.family = load_model(folder, dtype=settings["dtype"])
        torch.manual_seed(0)

    def reset_prefix_cache(self):
        self.is_clean = True

    def collective_rpc(self, name, kwargs):
        assert name == "reload_weights"
        weights = dict(kwargs["weights_iterator"])
        assert set(weights) == set(expected_tensors(self.family, self.model.net))
        named = dict(self.model.net.named_parameters())
        for tensor, values in weights.items():
            named[self.family.module_name(tensor)].data.copy_(values)

    def apply_model(self, function):
        packed = []
        method = SimpleNamespace(process_weights_after_loading=packed.append)
        head = SimpleNamespace(quant_method=method)
        function(SimpleNamespace(lm_head=head))
        assert packed == [head]

    def generate(self, prompts, parameters, use_tqdm, lora_request):
        if Fake.problem:
            raise Fake.problem
        assert self.is_clean and use_tqdm is False
        self.is_clean = False
        if lora_request is not None:
            assert lora_request.lora_name not in self.seen and lora_request.lora_int_id not in self.seen
            self.seen |= {lora_request.lora_name, lora_request.lora_int_id}
            found = files.load_adapter(self.model, self.family, lora_request.lora_path)
            assert self.settings["enable_lora"] and self.settings["max_lora_rank"] >= found.r
        assert (lora_request is not None) == ("enable_lora" in self.settings)
        torch.rand(3)
        return [self.answer(prompt["prompt_token_ids"], one) for prompt, one in zip(prompts, parameters, strict=True)]

    def answer(self, ids, one: SamplingParams):
        assert one.ignore_eos and not one.detokenize and one.logprobs == 0 and 0 <= one.seed < 2**63
        assert len(ids) + one.max_tokens <= self.settings["max_model_len"]
        prompt = self.family.example(ids, [-100] * len(ids))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(eval.generate, "hash_seed", lambda seed, row: seed)  # the request's seed is the answer's
            [found] = generate(self.model, [prompt], one.max_tokens, one.stop_token_ids, temperature=one.temperature,
                               top_k=one.top_k, top_p=one.top_p, min_p=one.min_p, seed=one.seed)  # fmt: skip
        logprobs = [{token: SimpleNamespace(logprob=value)} for token, value in zip(found.ids, found.logprobs, strict=True)]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(found.ids), logprobs=logprobs)])


@pytest.fixture
def fake(monkeypatch):
    """A package vllm for the time of a test."""
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.platforms", "vllm.lora", "vllm.lora.request")}
    modules["vllm"].LLM, modules["vllm"].SamplingParams = Fake, SamplingParams
    modules["vllm.platforms"].current_platform = SimpleNamespace(device_type="cpu")
    modules["vllm.lora.request"].LoRARequest = LoRARequest
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in vllm_backend.ENVIRONMENT:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(Fake, "problem", None)
    return modules


@pytest.mark.parametrize("how", HOW)
def test_a_run_is_that_of_our_own_sampler(monkeypatch, tmp_path, base, rows, fake, how):
    """Answers, updates and figures: the engine has the weights of every step, and leaves the random generators alone."""
    for backend in ("own", "vllm"):
        assert run(monkeypatch, *flags(base, rows, tmp_path / backend, *HOW[how], "--rollout_backend", backend)) == 0
    ours, theirs = steps_of(tmp_path / "own"), steps_of(tmp_path / "vllm")
    assert len(ours) == 3 and abs(ours[-1]["kl"]) > 0.01
    for own, other in zip(ours, theirs, strict=True):
        assert own.pop("rows") == other.pop("rows") and own == pytest.approx(other, abs=1e-3, rel=1e-3)
        assert abs(other["sampler_kl"]) < 1e-4
    answers = [(tmp_path / backend / "outputs" / "rollouts.jsonl").read_text() for backend in ("own", "vllm")]
    texts = [[json.loads(line)["response"] for line in lines.splitlines()] for lines in answers]
    assert texts[0] == texts[1]


CUTS = [{}, {"temperature": 0.7, "num_samples": 3, "seed": 5}, {"stop_ids": list(range(150)), "temperature": 1.0},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "num_samples": 2}]  # fmt: skip


@pytest.mark.parametrize("settings", CUTS, ids=["greedy", "sampled", "stops", "cut"])
def test_every_setting_reaches_the_request(base, fake, settings):
    model, family = load_model(base, dtype="float32")
    engine = Engine(model, adapter.Settings(use_lora=False), torch.float32, 2000, 200)
    prompts, random = prompts_of(family), capture_random()
    found = engine.generate(prompts, 12, **settings)
    assert all(torch.equal(value, random[name]) for name, value in capture_random().items())
    for ours, theirs in zip(generate(model, prompts, 12, **settings), found, strict=True):
        assert (ours.ids, ours.text, ours.stopped) == (theirs.ids, theirs.text, theirs.stopped)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    with pytest.raises(UserError, match="up to .* positions, and vLLM was started for 200"):
        engine.generate(prompts, 199)


def test_how_the_engine_is_started(base, fake, monkeypatch):
    """With the cache that the plan found room for, no generation_config.json, a rank that it has kernels for."""
    model, family = load_model(base, dtype="float32")
    settings = adapter.Settings(r=20, alpha=8)
    adapter.attach(model, family, settings)
    engine = Engine(model, settings, torch.bfloat16, 2000, 10**6)
    asked = engine.llm.settings
    assert asked["dtype"] == "bfloat16" and asked["max_lora_rank"] == 32 and asked["max_model_len"] == 32768
    assert asked["kv_cache_memory_bytes"] == 2256 * 2 * 2 * 32 * 2  # positions, layers, k and v, 2 heads of 16, bytes
    assert asked["generation_config"] == "vllm" and engine.llm.folder == str(base)
    monkeypatch.setattr(Fake, "problem", RuntimeError("no kernel\nfor this"))
    with pytest.raises(UserError, match=r"vllm fails \(RuntimeError: no kernel for this\)"):
        engine.generate(prompts_of(family), 8)
    monkeypatch.setattr(fake["vllm"], "LLM", None)
    random = capture_random()
    with pytest.raises(UserError, match="vllm fails"):
        Engine(model, settings, torch.bfloat16, 2000, 200)
    assert all(torch.equal(value, random[name]) for name, value in capture_random().items())


# ---- what is refused, before the first step -------------------------------------------------------------------------------


def test_a_machine_without_vllm(monkeypatch, tmp_path, base, rows):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="there is no package vllm; pip install vllm==.* or take --rollout_backend own"):
        run(monkeypatch, *flags(base, rows, tmp_path / "out"))


def test_a_broken_vllm(monkeypatch, tmp_path, base, rows):
    """Built for another torch: the reason, in one sentence."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text('raise RuntimeError("undefined symbol: of another\\ntorch")')
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"does not import \(RuntimeError: undefined symbol: of another torch\); pip install"):
        run(monkeypatch, *flags(base, rows, tmp_path / "out"))


REFUSED = {
    "knows no prefix tuning": ["--use_lora", "--peft_type", "PREFIX_TUNING"],
    "knows no DoRA": ["--use_lora", "--use_dora"],
    "unquantised base": ["--use_lora", "--use_4bit"],
    "no LoRA of a rank above 512": ["--use_lora", "--lora_r", 600],
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_it_cannot_sample_from(monkeypatch, tmp_path, base, rows, fake, words):
    with pytest.raises(UserError, match=f"--rollout_backend vllm .*{words}.*; take --rollout_backend own"):
        run(monkeypatch, *flags(base, rows, tmp_path / "out", *REFUSED[words]))
    assert not (tmp_path / "out" / "journal.jsonl").exists()


def test_other_models_and_devices(monkeypatch, tmp_path, base, rows, fake):
    write_tiny("qwen2_5_vl", tmp_path / "vl")
    with pytest.raises(UserError, match=r"text models \(qwen2, qwen3\), this one is qwen2_5_vl"):
        run(monkeypatch, *flags(tmp_path / "vl", rows, tmp_path / "out"))
    fake["vllm.platforms"].current_platform.device_type = "cuda"
    with pytest.raises(UserError, match="built for cuda, and the run is on cpu"):
        run(monkeypatch, *flags(base, rows, tmp_path / "out"))
    model, _ = load_model(base)
    monkeypatch.setattr(Model, "device", torch.device("cuda:0"))
    vllm_backend.check(model)
    monkeypatch.setattr(Model, "device", torch.device("cuda:1"))  # its weights would lie on another card than the plan says
    with pytest.raises(UserError, match="first card alone, not on cuda:1, which CUDA_VISIBLE_DEVICES can make it"):
        vllm_backend.check(model)


def test_the_plan_has_the_engine_s_weights(base):
    model, _ = load_model(base, dtype="float32")
    assert vllm_backend.held_bytes(model) == 4 * sum(p.numel() for p in model.parameters())


# ---- beside vLLM itself ---------------------------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch) -> str:
    """Of the vLLM that is installed; without one the test is skipped."""
    for name, value in vllm_backend.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # no compiling
    pytest.importorskip("vllm", reason="vLLM, an optional package, is not installed")
    from vllm.platforms import current_platform

    return current_platform.device_type


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize("lora", [False, True])
def test_vllm_answers_as_we_do(bases, device, name, lora):
    """Greedy answers are the same and their log-probabilities within rounding, after each of three updates; sampled ones
    repeat, differ among each other, and have the log-probabilities of the packed forward."""
    model, family = load_model(bases[name], dtype="float32", device=device)
    settings = adapter.Settings(use_lora=lora, r=5, alpha=9, use_rslora=name == "qwen3")
    adapter.attach(model, family, settings)
    vllm_backend.check(model)
    engine, prompts, before = Engine(model, settings, torch.float32, 2000, 200), prompts_of(family), None
    trained = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
    for seed in range(3):
        source = torch.Generator().manual_seed(seed)
        for parameter in trained:
            parameter.data.copy_(torch.randn(parameter.shape, generator=source) * (0.3 if lora else 0.15))
        ours, theirs = generate(model, prompts, 12), engine.generate(prompts, 12)
        assert [answer.ids for answer in ours] == [answer.ids for answer in theirs] != before
        before = [answer.ids for answer in ours]
        for own, other in zip(ours, theirs, strict=True):
            assert (own.text, own.stopped) == (other.text, other.stopped)
            assert own.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    random, draw = capture_random(), partial(engine.generate, prompts, 12, temperature=0.7, num_samples=4)
    sampled = draw(seed=1)
    assert all(torch.equal(value, random[part]) for part, value in capture_random().items())
    assert sampled == draw(seed=1) != draw(seed=2) and len({tuple(answer.ids) for answer in sampled}) >= 12
    for number, answer in enumerate(sampled):
        ids = prompts[number // 4].input_ids.tolist() + answer.ids
        logits = model.logits([family.example(ids, ids)])[0][-len(answer.ids) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(answer.ids, device=device)[:, None])[:, 0]
        assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("how", ["full", "lora"])
def test_a_run_with_vllm(monkeypatch, tmp_path, bases, rows, device, how):
    """The policy moves, and what samples is the policy."""
    assert run(monkeypatch, *flags(bases["qwen2"], rows, tmp_path / "out", *HOW[how], "--device", device)) == 0
    steps = steps_of(tmp_path / "out")
    assert steps[0]["kl"] == 0 and abs(steps[-1]["kl"]) > 0.1 and all(abs(step["sampler_kl"]) < 1e-3 for step in steps)
