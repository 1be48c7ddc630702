"""--stage rloo: advantages, KL and losses against NumPy, the reference whatever is trained, whole runs by command."""

import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import small_run
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from small_run import run, write_problems

import data.__main__ as data_door
import stages.__main__ as pipeline
from data.errors import UserError
from data.records import open_records
from data.rows import open_rows
from eval.preferences import pair_up
from lora import adapter
from model import load_model
from model.tiny import write_tiny
from stages import list_stages
from stages.rloo import Flags, Stage, advantages, column, shaped_advantages, spread_by_prompt
from training.config import read_config, trajectory
from training.journal import read_journal
from training.memory import GIB, Stack, cache_bytes
from training.precision import choose
from training.rehearsal import Plan

pytestmark = pytest.mark.slow

RLOO = {"stage": "rloo", "warmup_steps": 0, "reward": "test_rloo:checksum", "num_samples": 3, "max_new_tokens": 6}
flags = partial(small_run.flags, **RLOO)
FLAGS = {name: module.Flags for name, module in list_stages().items()}
FIGURES = {"reward", "reward_spread", "no_signal", "kl", "entropy", "answer_tokens", "stop_rate", "clipped"}


def checksum(reply) -> dict[str, float]:
    """A reward of one's own that differs from answer to answer."""
    return {"score": sum(map(ord, reply.response)) % 11 / 10, "long": float(len(reply.response) > 4)}


def unbounded(reply) -> dict[str, float]:
    """A reward as a learned one gives it, and a number whose name is taken."""
    return {"score": -1.0 - len(reply.response), "spread": 77.0, "long": float(len(reply.response) > 4)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_problems(tmp_path_factory.mktemp("rows"))


def steps_of(output: Path) -> list[dict]:
    return [record for record in read_journal(output / "journal.jsonl") if "event" not in record]


def set_adapter(model, seed: int = 0) -> None:
    """Give the attached LoRA an effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)


def open_run(folder, base, rows, options: Flags, lora=False, max_new_tokens=6, **state):
    """What collect() needs of a run, on a tiny model whose weights moved after the stage was made."""
    model, family = load_model(base, dtype="float32")
    if lora:
        adapter.attach(model, family, adapter.Settings(r=4, alpha=8, dropout=0.0))
    stage, records = Stage(options, model), open_records(rows)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    state = SimpleNamespace(**{"step": 3, "micro_tokens": 10**6, "cache_tokens": 10**6} | state)
    config = SimpleNamespace(seed=0, max_new_tokens=max_new_tokens)
    precision = choose("fp32", torch.device("cpu"))
    run = SimpleNamespace(model=model, folder=folder, state=state, config=config, precision=precision, device="cpu",
                          journal=True)  # fmt: skip
    return run, stage, [stage.encode(records[i]) for i in range(len(records))]


# ---- advantages against NumPy ---------------------------------------------------------------------------------------------


def oracle(rewards: np.ndarray, kind: str) -> np.ndarray:
    """Each answer by itself, in a loop."""
    found = np.zeros_like(rewards)
    for prompt, group in enumerate(rewards):
        for number, reward in enumerate(group):
            if kind == "loo":
                found[prompt, number] = reward - np.mean([r for place, r in enumerate(group) if place != number])
            elif kind == "group":
                found[prompt, number] = reward - np.mean(group)
            else:
                found[prompt, number] = (reward - np.mean(group)) / (np.std(group, ddof=1) + 1e-4)
    return found


@pytest.mark.parametrize("kind", ["loo", "group", "group_std"])
@pytest.mark.parametrize("num_samples", [2, 3, 8])
def test_advantages_equal_a_numpy_oracle(kind, num_samples):
    rewards = np.random.default_rng(num_samples).normal(size=(20, num_samples)).round(1)
    rewards[3] = 0.1  # no signal
    found = advantages(torch.tensor(rewards), kind).numpy()
    assert np.allclose(found, oracle(rewards, kind), atol=1e-12)
    assert np.abs(found.sum(1)).max() < 1e-9 and np.abs(found[3]).max() < 1e-9


def test_two_answers_by_hand():
    """k = 2: the baseline of each is the other."""
    rewards = torch.tensor([[1.0, 0.1], [0.0, 0.0]], dtype=torch.float64)
    assert advantages(rewards, "loo").tolist() == [[pytest.approx(0.9), pytest.approx(-0.9)], [0, 0]]
    assert advantages(rewards, "group").tolist() == [[pytest.approx(0.45), pytest.approx(-0.45)], [0, 0]]
    deviation = 0.9 / math.sqrt(2)
    assert advantages(rewards, "group_std")[0, 0].item() == pytest.approx(0.45 / (deviation + 1e-4))
    assert spread_by_prompt(column([1.0, 0.1, 0.0, 0.0]), 2).tolist() == [0.9, 0.9, 0, 0]


def test_where_the_kl_comes_off():
    """In the reward it is shared out by the baseline, so that advantages add up to 0; after it, each answer pays its own."""
    rewards, kl = column([1.0, 0.0, 0.5, 0.2]), column([2.0, -1.0, 0.0, 4.0])
    inside = shaped_advantages(rewards, kl, Flags("text", num_samples=2, kl_beta=0.1))
    assert inside.tolist() == pytest.approx([0.8 - 0.1, 0.1 - 0.8, 0.5 + 0.2, -0.2 - 0.5])
    outside = shaped_advantages(rewards, kl, Flags("text", num_samples=2, kl_beta=0.1, kl_placement="advantage"))
    assert outside.tolist() == pytest.approx([1 - 0.2, -1 + 0.1, 0.3, -0.3 - 0.4])


# ---- what is collected ----------------------------------------------------------------------------------------------------


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def answer_numbers(model, example, temperature: float) -> tuple[float, float]:
    """(log p, mean entropy of a token) of the answer from full logits of the example alone, in float64."""
    with torch.no_grad():
        every = log_softmax(model.logits([example])[0].double().numpy() / temperature)
    places = [t for t in range(1, len(example)) if example.labels[t] != -100]
    rows = every[[t - 1 for t in places]]
    return sum(rows[i, example.labels[t]] for i, t in enumerate(places)), -(np.exp(rows) * rows).sum(-1).mean()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("temperature, placement", [(1.0, "reward"), (0.7, "advantage")])
def test_what_an_answer_carries(tmp_path, base, rows, lora, temperature, placement):
    """Rewards, KL against the untouched base, entropy and advantage, each computed again from full logits."""
    options = Flags("test_rloo:checksum", num_samples=3, temperature=temperature, kl_beta=0.2, kl_placement=placement)
    run, stage, questions = open_run(tmp_path, base, rows, options, lora, micro_tokens=100, cache_tokens=200)
    [examples] = stage.collect(run, questions)
    untouched, _ = load_model(base, dtype="float32")
    assert len(examples) == 30 and stage.denominator(examples) == 30
    shaped, raw = np.zeros((10, 3)), np.zeros((10, 3))
    for number, example in enumerate(examples):
        question, values = questions[number // 3], example.values
        assert example.id == question.id
        assert example.input_ids[: len(question)].tolist() == question.prompt.input_ids.tolist()
        answer = example.labels[len(question) :]
        assert torch.equal(answer, example.input_ids[len(question) :]) and (example.labels[: len(question)] == -100).all()
        logprob, entropy = answer_numbers(run.model, example, temperature)
        kl = logprob - answer_numbers(untouched, example, temperature)[0]
        assert values["old_logprob"] == pytest.approx(logprob, abs=1e-4)
        assert values["entropy"] == pytest.approx(entropy, abs=1e-4)
        assert values["kl"] == pytest.approx(kl, abs=1e-4) and values["kl"] != 0
        stopped = answer[-1].item() in stage.family.stop_ids
        text = stage.family.tokenizer.decode(answer[:-1] if stopped else answer)
        assert values["reward"] == checksum(SimpleNamespace(response=text))["score"]
        assert values["answer_tokens"] == len(answer) and values["stop_rate"] == stopped
        raw[number // 3, number % 3], shaped[number // 3, number % 3] = values["reward"], values["reward"] - 0.2 * kl
    expected = oracle(shaped, "loo") if placement == "reward" else oracle(raw, "loo") - (raw - shaped)
    assert [e.values["advantage"] for e in examples] == pytest.approx(expected.flatten().tolist(), abs=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "outputs" / "rollouts.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["p1"] * 3 and all(line["step"] == 4 for line in lines)


def test_answers_do_not_depend_on_the_cut(tmp_path, base, rows):
    """Neither into batches nor into packed rows; another step has other answers."""
    options, found = Flags("test_rloo:checksum", num_samples=3), []
    for state in ({}, {"cache_tokens": 1}, {"cache_tokens": 90, "micro_tokens": 1}, {"step": 4}):
        run, stage, questions = open_run(tmp_path, base, rows, options, **state)
        [examples] = stage.collect(run, questions)
        found.append(([e.input_ids.tolist() for e in examples], [e.values["advantage"] for e in examples]))
    assert found[0][0] == found[1][0] == found[2][0] != found[3][0]
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-5) and found[0][1] == pytest.approx(found[2][1], abs=1e-5)


def test_truncated_answers(tmp_path, base, rows):
    """Six random tokens of 260 hardly ever stop: masked, nothing is left to learn from; or they lose reward."""
    found, cases = {}, {"plain": {}, "masked": {"mask_truncated_completions": True}, "fined": {"missing_eos_penalty": 0.5}}
    for name, options in cases.items():
        run, stage, questions = open_run(tmp_path, base, rows, Flags("test_rloo:checksum", num_samples=3, **options))
        [found[name]] = stage.collect(run, questions)
    for plain, masked, fined in zip(*found.values(), strict=True):
        stopped = plain.values["stop_rate"] == 1
        assert masked.values["advantage"] == (plain.values["advantage"] if stopped else 0)
        assert fined.values["reward"] == pytest.approx(plain.values["reward"] - 0.5 * (not stopped))
    assert sum(e.values["stop_rate"] for e in found["plain"]) < 10
    loss, _ = stage.loss(run.model, stage.pack([e for e in found["masked"] if e.values["stop_rate"] == 0], 10**6)[0], 1.0)
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in run.model.parameters())


def test_memory_that_does_not_do_for_the_cache(tmp_path, base, rows, monkeypatch, capsys):
    """Sampling is done again in smaller batches, with the same answers; at one prompt at a time it is given up."""
    import eval.generate

    generate, limit = eval.generate.generate, 100

    def scarce(*arguments, batch_tokens, **settings):
        if batch_tokens > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(*arguments, batch_tokens=batch_tokens, **settings)

    options = Flags("test_rloo:checksum", num_samples=3)
    run, stage, questions = open_run(tmp_path, base, rows, options)
    [expected] = stage.collect(run, questions)
    monkeypatch.setattr(eval.generate, "generate", scarce)
    run.state.cache_tokens = 350
    [found] = stage.collect(run, questions)
    assert [e.input_ids.tolist() for e in found] == [e.input_ids.tolist() for e in expected]
    assert run.state.cache_tokens == 87 and "out of memory" in capsys.readouterr().out
    limit = 0
    with pytest.raises(UserError, match="lower --num_samples"):
        stage.collect(run, questions)
    assert run.state.cache_tokens == 10 and capsys.readouterr().out.count("out of memory") == 3  # 3 answers of 6: one prompt's
    monkeypatch.undo()
    run, stage, questions = open_run(tmp_path, base, rows, options)
    score = stage.score

    def scarce_too(run, examples):
        return score(run, examples) if run.state.micro_tokens < 99 else torch.empty(2**60)  # more than there is

    monkeypatch.setattr(stage, "score", scarce_too)
    [found] = stage.collect(run, questions)
    assert [e.values["kl"] for e in found] == pytest.approx([e.values["kl"] for e in expected], abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_loss_equals_a_numpy_oracle(tmp_path, base, rows, temperature):
    """With ratios on both sides of the clipping, however the answers are cut into rows; gradients are those of one row."""
    options = Flags("test_rloo:checksum", num_samples=3, temperature=temperature, kl_beta=0.0, clip_range=0.1)
    run, stage, questions = open_run(tmp_path, base, rows, options)
    assert stage.reference is None
    [examples] = stage.collect(run, questions)
    assert all("kl" not in example.values for example in examples)
    source, gains, beyond = np.random.default_rng(0), [], 0
    for example in examples:
        logprob, _ = answer_numbers(run.model, example, temperature)
        example.values |= {"old_logprob": logprob + source.normal(0, 0.2), "advantage": source.normal()}
        ratio, advantage = np.exp(logprob - example.values["old_logprob"]), example.values["advantage"]
        gains.append(min(ratio * advantage, np.clip(ratio, 0.9, 1.1) * advantage))
        beyond += abs(ratio - 1) > 0.1
    gradients = []
    for micro_tokens in (10**6, 100, 1):
        run.model.zero_grad()
        value, clipped = 0.0, 0.0
        for row in stage.pack(examples, micro_tokens):
            loss, figures = stage.loss(run.model, row, stage.denominator(examples))
            loss.backward()
            value, clipped = value + loss.item(), clipped + figures["clipped"].item()
        assert value == pytest.approx(-np.mean(gains), abs=1e-5) and clipped == pytest.approx(beyond / 30)
        gradients.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
    assert all((other - gradients[0]).norm() <= 1e-5 * gradients[0].norm() for other in gradients[1:])


def test_rewards_that_fail_say_so(tmp_path, base, rows, monkeypatch):
    import eval.rewards

    run, stage, questions = open_run(tmp_path, base, rows, Flags("countdown", num_samples=2))
    with pytest.raises(UserError, match="problems|numbers and target"):
        stage.collect(run, questions)
    wrong = {"ZeroDivisionError": lambda replies: 1 / 0, "score of nan": lambda replies: [{"score": math.nan}] * 20}
    for words, judge in wrong.items():
        monkeypatch.setattr(eval.rewards, "find_reward", lambda name, judge=judge, **more: judge)
        run, stage, questions = open_run(tmp_path, base, rows, Flags("mine:own", num_samples=2))
        with pytest.raises(UserError, match=words):
            stage.collect(run, questions)


# ---- whole runs -----------------------------------------------------------------------------------------------------------

RUNS = {
    "full": ["--learning_rate", "3e-3"],
    "lora": ["--use_lora", "--learning_rate", "1e-2", "--num_workers", 2],
    "two-updates": ["--use_lora", "--learning_rate", "1e-2", "--num_iterations", 2, "--advantage", "group_std"],
}


@pytest.mark.parametrize("case", RUNS)
def test_resume_is_bit_exact(monkeypatch, tmp_path, base, rows, case):
    """10 prompts in steps of 4 are 3 steps an epoch; answers, KL and updates are those of the run that was not cut off."""
    more = [*RUNS[case], "--max_steps", 5, "--save_every", 1, "--save_total_limit", 100]
    straight = tmp_path / "straight"
    assert run(monkeypatch, *flags(base, rows, straight, *more)) == 0
    steps = steps_of(straight)
    assert FIGURES | {"reward_long"} <= set(steps[0])
    assert steps[0]["kl"] == 0 and steps[-1]["kl"] != 0 and steps[0]["reward_spread"] > 0
    assert abs(steps[0]["loss"]) < (1e-6 if case != "two-updates" else 1)
    assert all(step["grad_norm"] > 0 for step in steps)
    for step in (1, 4):
        resumed = tmp_path / f"from-{step}"
        (resumed / "checkpoints").mkdir(parents=True)
        for name in ("run.yaml", "journal.jsonl"):
            shutil.copy(straight / name, resumed / name)
        shutil.copytree(straight / "outputs", resumed / "outputs")
        with open(resumed / "outputs" / "rollouts.jsonl", "a", encoding="utf-8") as file:  # answers hold what they like
            file.write('{"step": 9, "response": "\u2028"}\n{"step": 9, "response": "torn by a ki')
        shutil.copytree(straight / "checkpoints" / f"step-{step:06d}", resumed / "checkpoints" / f"step-{step:06d}")
        assert run(monkeypatch, *flags(base, rows, resumed, *more), "--resume", "yes") == 0
        drop = {"seconds", "data_wait", "memory", "sampling_seconds", "scoring_seconds"}
        ours, theirs = ([{k: v for k, v in r.items() if k not in drop} for r in steps_of(x)] for x in (resumed, straight))
        assert ours == theirs and len(ours) == 5
        saved = [load_file(x / "checkpoints" / "step-000005" / "trained.safetensors") for x in (resumed, straight)]
        assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[1])
        rollouts = [(x / "outputs" / "rollouts.jsonl").read_text() for x in (resumed, straight)]
        assert rollouts[0] == rollouts[1] and len(rollouts[0].splitlines()) == 15
    with pytest.raises(UserError, match="max_new_tokens was 6"):
        shutil.rmtree(resumed / "checkpoints" / "step-000005")
        run(monkeypatch, *flags(base, rows, resumed, *more, "--max_new_tokens", 7), "--resume", "yes")


def test_an_sft_adapter_as_the_start_belongs_to_the_reference(monkeypatch, tmp_path, base, rows):
    """--adapter DIR: KL 0 at the start although the adapter moves the model."""
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": "a e i o u"}) + "\n" for n in range(6)))
    sft = ["--stage", "sft", "--use_lora", "--max_steps", 6, "--learning_rate", "2e-2"]
    common = flags(base, chats, tmp_path / "sft", *sft)
    for name in ("--reward", "--num_samples"):
        place = common.index(name)
        del common[place : place + 2]
    assert run(monkeypatch, *common) == 0
    more = ["--use_lora", "--adapter", tmp_path / "sft" / "adapter", "--max_steps", 2, "--learning_rate", "1e-2"]
    assert run(monkeypatch, *flags(base, rows, tmp_path / "rloo", *more)) == 0
    steps = steps_of(tmp_path / "rloo")
    assert steps[0]["kl"] == 0 and abs(steps[1]["kl"]) > 1e-4
    assert run(monkeypatch, *flags(base, rows, tmp_path / "fresh", "--use_lora", "--max_steps", 1)) == 0
    assert steps_of(tmp_path / "fresh")[0]["entropy"] != steps[0]["entropy"]  # the adapter matters


def test_evaluation_is_by_the_reward(monkeypatch, tmp_path, base, rows, capsys):
    """Held-out problems are answered and judged before, during and after; the report shows sampled answers and curves."""
    more = ["--eval_split", 3, "--eval_every", 2, "--max_steps", 3, "--micro_tokens", 64]
    assert run(monkeypatch, *flags(base, rows, tmp_path / "out", *more)) == 0
    found = [r for r in read_journal(tmp_path / "out" / "journal.jsonl") if r.get("event") == "eval"]
    assert [r["step"] for r in found] == [0, 2, 3] and {"score", "long", "stop_rate"} <= set(found[0])
    assert "eval_loss" not in found[0]
    text = capsys.readouterr().out
    assert "KV cache of sampled answers" in text and "reference weights" in text
    assert "<|im_start|>assistant\n[[" in text  # a sampled answer, marked
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(name in page for name in ("reward spread", "no signal", "entropy", "stop rate", "sampled in step 3", "sampling"))


def test_a_reward_may_be_any_number_of_any_name(monkeypatch, tmp_path, base, rows):
    more = ["--eval_split", 3, "--max_steps", 1, "--reward", "test_rloo:unbounded"]
    assert run(monkeypatch, *flags(base, rows, tmp_path / "out", *more)) == 0
    [step] = steps_of(tmp_path / "out")
    assert step["reward"] < -1 and 0 <= step["reward_long"] <= 1 and step["reward_spread"] < 77  # of a prompt's answers
    records = read_journal(tmp_path / "out" / "journal.jsonl")
    found = {record["name"]: record for record in records if record.get("event") == "comparison"}
    [start, *_] = [record for record in records if record.get("event") == "eval"]
    score = found["held_out: score"]
    assert (score["before"], score["unit"]) == (start["score"], "") and found["held_out: long"]["unit"] == "%"


def test_a_run_that_learns_nothing_says_so(monkeypatch, tmp_path, base, rows, capsys):
    monkeypatch.setattr("stages.rloo.SILENT_STEPS", 3)
    more = ["--max_steps", 5, "--num_samples", 2, "--max_new_tokens", 2]
    for reward, times in (("countdown", 1), ("test_rloo:checksum", 0)):
        problems = tmp_path / "problems.jsonl"
        problems.write_text("".join(json.dumps({"nums": [n, 2], "target": n + 2}) + "\n" for n in range(1, 9)))
        assert run(monkeypatch, *flags(base, problems, tmp_path / reward[:4], *more, "--reward", reward)) == 0
        assert capsys.readouterr().out.count("in 3 steps in a row all answers to a prompt got the same reward") == times


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "minicpm_v", "cogagent", "phi3_vision"])
def test_pictures(monkeypatch, tmp_path, family):
    """Problems with a picture and a box, judged by where the answer points."""
    write_tiny(family, tmp_path / "vl")
    lines = []
    for number in range(3):
        Image.effect_noise((60 + 20 * number, 90), 50).convert("RGB").save(tmp_path / f"{number}.png")
        content = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "where?"}]
        lines.append({"prompt": [{"role": "user", "content": content}], "ground_truth": {"box": [1, 2, 30, 40]}})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = ["--max_steps", 2, "--use_lora", "--learning_rate", "1e-2"]
    assert run(monkeypatch, *flags(tmp_path / "vl", path, tmp_path / "out", *more)) == 0
    steps = steps_of(tmp_path / "out")
    assert steps[0]["kl"] == 0 and steps[0]["grad_norm"] > 0 and steps[1]["kl"] != 0
    more = ["--max_steps", 1, "--use_lora", "--reward", "box_iou"]
    assert run(monkeypatch, *flags(tmp_path / "vl", path, tmp_path / "box", *more)) == 0


# ---- settings and memory --------------------------------------------------------------------------------------------------


def test_settings_of_the_stage(monkeypatch, tmp_path, base, capsys):
    common = ["--base_model", "b", "--data_path", "r.jsonl", "--stage", "rloo"]
    config = read_config([*common, "--reward", "text", "--use_lora"], FLAGS)
    assert (config.lora_dropout, config.lr_schedule, config.predict_with_generate) == (0.0, "constant", True)
    with pytest.raises(UserError, match="--reward is missing"):
        read_config(common, FLAGS)
    with pytest.raises(UserError, match="num_samples"):
        read_config([*common, "--reward", "text", "--num_samples", "1"], FLAGS)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        read_config(["--help"], FLAGS)
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"--{name} " in text for name in Flags.__dataclass_fields__)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "hello", "completion": "good day"}) + "\n")
    with pytest.raises(UserError, match=r"rows.jsonl:1.*a problem \(for RLOO: a prompt"):
        run(monkeypatch, *flags(base, path, tmp_path / "out"))
    with pytest.raises(UserError, match="--reward no_such"):
        run(monkeypatch, *flags(base, path, tmp_path / "out", "--reward", "no_such"))


def test_lengths_count_what_is_asked(tmp_path, base, rows):
    """The words that open an answer included, so that a packed row has room for what is sampled after them."""
    config = read_config([*map(str, flags(base, rows, tmp_path))], FLAGS)
    _, stage, questions = open_run(tmp_path, base, rows, Flags("text"))
    longest = open_rows(config, stage.family, tmp_path, takes=Stage.takes).lengths.longest
    assert max(map(len, questions)) < longest <= max(map(len, questions)) + 2


def test_the_plan_holds_the_cache_and_the_reference(tmp_path, base):
    """Qwen2.5-0.5B keeps 12 KiB a token: CS224R's batch of 128 x 8 answers of 1,024 and prompts of 256 is 15 GiB."""
    qwen = Stack(tokens=1, hidden=896, query=896, key=128, intermediate=4864, layers=24)
    assert cache_bytes(qwen) == 12 * 1024
    assert 128 * 8 * 1280 * cache_bytes(qwen) / GIB == 15
    model, _ = load_model(base, dtype="float32")
    config = read_config(["--base_model", "b", "--data_path", "r", "--stage", "rloo", "--reward", "text"], FLAGS)
    plan = Plan(model, config, num_answers=8, held_bytes={"reference weights": GIB, "reward model": 2 * GIB})
    micro_tokens, cache_tokens = plan.fit(100)
    parts = dict(plan.parts(micro_tokens))
    assert micro_tokens >= 612 and 8 * 612 <= cache_tokens <= 16384
    assert parts["reference weights"] == 1 and parts["reward model"] == 2
    assert parts["KV cache of sampled answers"] * GIB == cache_tokens * 2 * 2 * 32 * 4  # layers, k and v, 2 heads of 16, fp32
    assert Plan(model, config).fit(100)[1] == 0 and "reference weights" not in dict(Plan(model, config).parts(100))


def test_a_learned_reward_is_planned_for_and_remembered(tmp_path, base, rows, monkeypatch):
    """A reward model's weights are a part of the plan; what a server says is kept in the run's folder, at any pace."""
    import eval.rewards
    from eval.judges import ServedReward, Server

    judge = SimpleNamespace(num_bytes=7)
    monkeypatch.setattr(eval.rewards, "find_reward", lambda name, **how: how["device"] == "cpu" and judge)
    _, stage, _ = open_run(tmp_path, base, rows, Flags("folder"))
    assert stage.held_bytes["reward model"] == 7 and stage.held_bytes["reference weights"] > 1000
    judge = ServedReward(Server("m@http://127.0.0.1:9/v1"))
    run, stage, _ = open_run(tmp_path, base, rows, Flags("served"))
    run.identity = {}
    stage.prepare(run)
    assert judge.server.file.path == tmp_path / "reward_cache.jsonl"
    common = ["--base_model", "b", "--data_path", "r", "--stage", "rloo", "--reward", "text", "--requests_per_minute"]
    assert trajectory(read_config([*common, "9"], FLAGS)) == trajectory(read_config([*common, "8"], FLAGS))
    assert trajectory(read_config([*common, "9"], FLAGS))["num_samples"] == 8


@pytest.mark.parametrize("name", ["ultrafeedback", "countdown"])
def test_recipes(name):
    config = read_config(["--config", str(ROOT / f"configs/qwen2.5-0.5b-rloo-{name}.yaml"), "--data_path", "r.jsonl"], FLAGS)
    assert config.stage == "rloo" and config.stage_options.num_samples >= 4 and config.max_new_tokens >= 512


# ---- preferences of a model's own answers ---------------------------------------------------------------------------------


def test_pairs_of_own_answers(monkeypatch, tmp_path, base, rows, capsys):
    """The best finished answer against the worst, as rows that DPO takes; not cut ones, nor without a winner."""
    lines = [{"where": where, "stopped": stopped, "score": score, "response": text} for where, stopped, score, text in (
        ("a:1", True, 0.1, "poor"), ("a:1", True, 1.0, "good"), ("a:1", False, 2.0, "cut"), ("a:1", True, 0.5, "fair"),
        ("a:2", True, 0.5, "same"), ("a:2", True, 0.5, "as good"), ("a:3", False, 0.0, "cut"), ("a:3", True, 1.0, "alone"),
    )]  # fmt: skip
    turns = [{"role": "user", "content": "?"}]
    records = [SimpleNamespace(id=f"r{n}", where=f"a:{n}", messages=turns) for n in (1, 2, 3, 4)]
    [pair] = pair_up(records, lines)
    assert (pair["id"], pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]) == ("r1", "good", "poor")
    assert pair["chosen"][:-1] == pair["rejected"][:-1] == turns

    arguments = ["--model", base, "--prompts", rows, "--output_dir", tmp_path, "--max_new_tokens", 60, "--temperature", 2.0]
    monkeypatch.setattr(sys, "argv", ["data", "make", "preferences", *map(str, arguments), "--reward", "test_rloo:checksum"])
    bias_to_stop(monkeypatch)
    data_door.main()
    found = open_records(tmp_path / "preferences.jsonl", takes=("preference",))
    assert f"{len(found)} pairs of 10 prompts" in capsys.readouterr().out and len(found) >= 5
    for index in range(len(found)):
        chosen, rejected = (SimpleNamespace(response=side[-1]["content"]) for side in found[index].conversations)
        assert checksum(chosen)["score"] > checksum(rejected)["score"]
    assert len((tmp_path / "judged_answers.jsonl").read_text().splitlines()) == 80

    def fails_once(reply):  # one answer that cannot be judged costs its own place in a pair, not the others' night
        return judge(reply) if next(numbers) else 1 / 0

    judge, numbers = checksum, iter(range(80))
    monkeypatch.setattr(sys.modules["test_rloo"], "checksum", fails_once)
    data_door.main()
    said = capsys.readouterr().out
    assert "1 of 80 answers could not be judged" in said and "ZeroDivisionError" in said
    assert len(open_records(tmp_path / "preferences.jsonl", takes=("preference",))) >= len(found) - 1
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--num_samples", "1"])
    with pytest.raises(UserError, match="at least 2"):
        data_door.main()


def bias_to_stop(monkeypatch) -> None:
    """A random model hardly ever stops: have every answer stop with one chance in four."""
    import eval.generate

    choose = eval.generate.choose

    def often_stops(logits, uniform, **settings):
        tokens, values = choose(logits, uniform, **settings)
        return tokens.where(uniform > 0.25, torch.full_like(tokens, 256)), values

    monkeypatch.setattr(eval.generate, "choose", often_stops)


# ---- the stages in a row --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tiny_model_learns_by_reward(tmp_path, capfd, monkeypatch):
    """SFT, DPO and RLOO by one command: held-out problems are solved more often after each, and answers still stop."""
    fewer = [50 if part == 80 else part for part in pipeline.SETTINGS["rloo"]]  # updates, for the test's sake
    monkeypatch.setitem(pipeline.SETTINGS, "rloo", fewer)
    pipeline.run_pipeline(tmp_path, 0, "cpu")
    solved, *lines = capfd.readouterr().out.splitlines()[-4:]
    assert [line.rsplit(" ", 3)[0] for line in lines] == ["sft loss", "dpo accuracy", "rloo reward"]
    share = {name: pipeline.measure(tmp_path / name, tmp_path / "rows", "cpu") for name in ("initial", "sft", "dpo", "final")}
    assert solved == "held-out problems solved: " + ", ".join(f"{name} {value:.1%}" for name, value in share.items())
    assert share["dpo"] >= share["sft"] and share["final"] >= share["sft"] + 0.15 and share["initial"] == 0
    for name in ("initial", "sft", "dpo", "rloo", "final"):
        assert (tmp_path / name / "journal.jsonl").exists() and (tmp_path / name / "model" / "config.json").exists()
    found = [r for r in read_journal(tmp_path / "rloo" / "journal.jsonl") if r.get("event") == "eval"]
    assert found[-1]["correct"] >= found[0]["correct"] and found[-1]["stop_rate"] >= 0.95
    loss = [r["loss"] for r in steps_of(tmp_path / "sft")]
    assert lines[0] == f"sft loss {loss[0]:.3f} -> {loss[-1]:.3f}"
    pipeline.run_pipeline(tmp_path, 0, "cpu")  # nothing is run again
    assert capfd.readouterr().out.splitlines() == [solved, *lines]
