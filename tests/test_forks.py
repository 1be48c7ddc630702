"""The price of a fork: what people change most costs one file, dropped in its place, and no edit elsewhere.

Each file of tests/forks lies there as it would in the project. It is copied into a copy of the project's sources, train.py
runs with it, and what it does is compared with transformers' own network and a formula written out here. README states
the price, and is compared with the files.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from data.batches import pack_row
from eval.metrics import Reply
from model import load_model
from model.tiny import write_tiny
from training import optim
from training.journal import read_journal

FORKS = {
    "a token-weighted loss": "stages/weighted.py",
    "KL to a teacher": "stages/distill.py",
    "SimPO": "stages/simpo.py",
    "GRPO": "stages/grpo.py",
    "a new optimizer": "training/optim_lion.py",
    "a dialect": "data/dialect_gsm8k.py",
    "a metric": "eval/tasks/transcription.py",
}
SOURCES = ("data", "eval", "lora", "model", "stages", "training")
CHATS = [("2 + 2", "four"), ("name a colour", "blue, or any other"), ("3 + 5 + 1", "nine"), ("say it", "it"), ("and?", "no")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Another model: the base's layout, other weights, and ten times as sure of its answers."""
    folder = tmp_path_factory.mktemp("teacher") / "qwen2"
    write_tiny("qwen2", folder, seed=1)
    net = Qwen2ForCausalLM.from_pretrained(folder)
    net.model.norm.weight.data *= 10
    net.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path) -> Path:
    messages = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in CHATS]
    return write_rows(tmp_path / "rows.jsonl", [{"messages": turns} for turns in messages])


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_fork(tmp_path: Path, place: str, base: Path, rows: Path, *more) -> tuple[Path, str]:
    """train.py of a copy of the project with one more file, all rows in each update; (output folder, what it printed)."""
    project, output = tmp_path / "project", tmp_path / "out"
    for path in [ROOT / "train.py", *(path for name in SOURCES for path in (ROOT / name).rglob("*.py"))]:
        copy = project / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    assert not (project / place).exists(), f"{place} of tests/forks would replace a file of the project"
    shutil.copy(ROOT / "tests" / "forks" / place, project / place)
    flags = {"base_model": base, "data_path": rows, "output_dir": output, "batch_size": len(CHATS), "num_workers": 0,
             "device": "cpu", "precision": "fp32", "eval_every": "no", "lr_schedule": "constant", "warmup_steps": 0,
             "max_grad_norm": 0}  # fmt: skip
    said = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "train.py", *said, *map(str, more)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return output, done.stdout


def import_fork(place: str):
    """A file of tests/forks as a module, where no whole run is needed."""
    spec = importlib.util.spec_from_file_location(Path(place).stem, ROOT / "tests" / "forks" / place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses_of(output: Path) -> list[float]:
    return [record["loss"] for record in read_journal(output / "journal.jsonl") if "event" not in record]


def open_hub_model(folder: Path) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def examples_of(folder: Path) -> list:
    _, family = load_model(folder, dtype="float32")
    return [family.encode([{"role": "user", "content": q}, {"role": "assistant", "content": a}]) for q, a in CHATS]


def answers(net: Qwen2ForCausalLM, example) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities (n, V), tokens (n,)) at the supervised places of one row alone."""
    supervised = example.labels[1:] != -100
    logits = net(input_ids=example.input_ids[None]).logits[0, :-1]
    return F.log_softmax(logits, -1)[supervised], example.labels[1:][supervised]


def mean_loss(net: Qwen2ForCausalLM, examples: list, weights_of=lambda tokens: torch.ones(len(tokens))) -> torch.Tensor:
    """Sum of weight x negative log-likelihood over all answers / sum of the weights."""
    total, weight = 0.0, 0.0
    for example in examples:
        found, tokens = answers(net, example)
        weights = weights_of(tokens)
        total = total - (weights * found.gather(1, tokens[:, None])[:, 0]).sum()
        weight += weights.sum()
    return total / weight


# ---- what each does -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_token_weighted_loss(tmp_path, base, rows):
    """The first two tokens of every answer weigh 5, the others 1."""
    more = ["--stage", "weighted", "--first_tokens", 2, "--first_weight", 5, "--max_steps", 1]
    output, _ = run_fork(tmp_path, FORKS["a token-weighted loss"], base, rows, *more)
    net, examples = open_hub_model(base), examples_of(base)
    with torch.no_grad():
        expected = mean_loss(net, examples, lambda tokens: 1 + 4.0 * (torch.arange(len(tokens)) < 2))
        plain = mean_loss(net, examples)
    assert losses_of(output) == pytest.approx([expected.item()], abs=1e-5)
    assert abs(expected - plain) > 1e-3


@pytest.mark.slow
def test_kl_to_a_teacher(tmp_path, base, teacher, rows):
    """The first loss is KL(teacher || student) of transformers' networks; it falls, and the teacher is not trained."""
    more = ["--stage", "distill", "--teacher", teacher, "--learning_rate", "3e-3", "--max_steps", 10]
    output, _ = run_fork(tmp_path, FORKS["KL to a teacher"], base, rows, *more)
    student, master, values = open_hub_model(base), open_hub_model(teacher), []
    with torch.no_grad():
        for example in examples_of(base):
            (ours, _), (theirs, _) = answers(student, example), answers(master, example)
            values.append((theirs.exp() * (theirs - ours)).sum(-1))
    losses = losses_of(output)
    assert losses[0] == pytest.approx(torch.cat(values).mean().item(), rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    trained = load_file(output / "checkpoints" / "step-000010" / "trained.safetensors")
    assert trained.keys() == {f"net.{name}" for name, _ in student.named_parameters()}


@pytest.mark.slow
def test_simpo(tmp_path, base):
    """The first loss is the paper's formula on transformers' network; then the chosen answers' scores rise above the others."""
    pairs = [(CHATS[i], CHATS[i - 1][1]) for i in range(len(CHATS))]
    path = write_rows(tmp_path / "pairs.jsonl", [{"prompt": q, "chosen": a, "rejected": other} for (q, a), other in pairs])
    more = ["--stage", "simpo", "--simpo_margin", 0.5, "--learning_rate", "3e-3", "--max_steps", 5]
    output, _ = run_fork(tmp_path, FORKS["SimPO"], base, path, *more)
    _, family = load_model(base, dtype="float32")
    net, values = open_hub_model(base), []
    with torch.no_grad():
        for (question, answer), other in pairs:
            scores = []
            for text in (answer, other):
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
                found, tokens = answers(net, family.encode(turns))
                scores.append(2.0 * found.gather(1, tokens[:, None]).mean())
            values.append(-F.logsigmoid(scores[0] - scores[1] - 0.5))
    losses = losses_of(output)
    assert losses[0] == pytest.approx(torch.stack(values).mean().item(), abs=1e-5)
    assert losses[-1] < losses[0] - 0.1 and not (output / "reference.safetensors").exists()


@pytest.mark.slow
def test_grpo(tmp_path, base):
    """Its gradient is that of -mean_i A_i mean_t log p(token t of answer i) on transformers' network; a run has figures."""
    grpo = import_fork(FORKS["GRPO"])
    student, _ = load_model(base, dtype="float32")
    stage, examples, net = grpo.Stage(grpo.Flags("text"), student), examples_of(base), open_hub_model(base)
    expected = 0.0
    for number, example in enumerate(examples):
        example.values = {"advantage": number - 1.5, "answer_tokens": float(example.num_supervised), "reward": 0.5}
        found, tokens = answers(net, example)
        expected = expected - (number - 1.5) * found.gather(1, tokens[:, None]).mean() / len(examples)
    expected.backward()
    for row in stage.pack(examples, 60):
        loss, figures = stage.loss(student, row, stage.denominator(examples))
        loss.backward()
    theirs = dict(net.named_parameters())
    for name, p in student.net.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name].grad, atol=1e-5, rtol=1e-3)
    path = write_rows(tmp_path / "problems.jsonl", [{"prompt": q, "ground_truth": a} for q, a in CHATS])
    more = ["--stage", "grpo", "--reward", "text", "--num_samples", 3, "--max_new_tokens", 4, "--max_steps", 2]
    output, _ = run_fork(tmp_path, FORKS["GRPO"], base, path, *more)
    assert losses_of(output) == pytest.approx([0, 0], abs=1e-6)
    assert all("reward" in r and "entropy" in r for r in read_journal(output / "journal.jsonl") if "event" not in r)


def test_a_model_is_no_distance_from_itself(monkeypatch, base):
    """KL and its gradient are zero where the teacher is the student, in chunks of three positions too."""
    import model.head

    distill = import_fork(FORKS["KL to a teacher"])
    student, family = load_model(base, dtype="float32")
    stage = distill.Stage(distill.Flags(teacher=str(base)), student)
    packed = pack_row(examples_of(base))
    for chunk in (model.head.CHUNK_BYTES, 3 * 4 * len(student.head_weight)):
        monkeypatch.setattr(model.head, "CHUNK_BYTES", chunk)
        student.zero_grad()
        loss, _ = stage.loss(student, packed, 1.0)
        loss.backward()
        assert abs(loss.item()) < 1e-5
        assert all(p.grad.abs().max() < 1e-5 for p in student.parameters())
        assert all(p.grad is None for p in stage.teacher.parameters())
    with pytest.raises(distill.UserError, match="--teacher is missing"):
        distill.Stage(distill.Flags(), student)


@pytest.mark.slow
def test_a_new_optimizer(tmp_path, base, rows):
    """One update of Lion from zero momentum: w - lr (sign(g) + decay w), and 0.01 g is kept."""
    more = ["--optim", "lion", "--adam_beta2", 0.99, "--learning_rate", "1e-3", "--weight_decay", 0.5, "--max_steps", 1]
    output, _ = run_fork(tmp_path, FORKS["a new optimizer"], base, rows, *more)
    net = open_hub_model(base)
    mean_loss(net, examples_of(base)).backward()
    saved = output / "checkpoints" / "step-000001"
    weights, moments = load_file(saved / "trained.safetensors"), load_file(saved / "optimizer.safetensors")
    num_compared = 0
    for name, p in net.named_parameters():
        torch.testing.assert_close(moments[f"net.{name}/momentum"], 0.01 * p.grad, rtol=1e-4, atol=1e-8)
        decay = 0.5 if p.ndim >= 2 else 0.0
        expected = p - 1e-3 * (p.grad.sign() + decay * p)
        sure = (p.grad.abs() > 1e-6) | (p.grad == 0)  # between them rounding decides the sign
        torch.testing.assert_close(weights[f"net.{name}"][sure], expected[sure], rtol=0, atol=1e-7)
        num_compared += int((p.grad.abs() > 1e-6).sum())
    assert num_compared > 0.3 * sum(p.numel() for p in net.parameters())


def test_lion_from_step_to_step(monkeypatch):
    """Three updates of three weights against numbers: the second gradient points back, and the momentum outweighs it."""
    monkeypatch.setattr(optim, "OPTIMIZERS", dict(optim.OPTIMIZERS))
    import_fork(FORKS["a new optimizer"])
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = optim.build_optimizer("lion", [{"params": [("w", p)], "weight_decay": 0.1}], 0.01, (0.9, 0.5))
    momentum, expected = torch.zeros(3), p.detach().clone()
    for gradient in ([1.0, 2.0, -3.0], [-1.0, -30.0, 3.0], [0.5, 0.0, 0.0]):
        p.grad = torch.tensor(gradient)
        optimizer.step()
        expected = expected - 0.01 * (torch.sign(0.9 * momentum + 0.1 * p.grad) + 0.1 * expected)
        momentum = 0.5 * momentum + 0.5 * p.grad
    torch.testing.assert_close(p.detach(), expected)


@pytest.mark.slow
def test_a_dialect(tmp_path, base):
    """GSM8K's rows give the loss of the same questions and answers as chats."""
    path = write_rows(tmp_path / "gsm8k.jsonl", [{"question": q, "answer": f"so\n#### {a}"} for q, a in CHATS])
    output, printed = run_fork(tmp_path, FORKS["a dialect"], base, path, "--max_steps", 1)
    assert "5 rows to train on (5 GSM8K)" in printed
    _, family = load_model(base, dtype="float32")
    answers = [{"role": "assistant", "content": f"so\n<answer>{a}</answer>"} for _, a in CHATS]
    examples = [family.encode([{"role": "user", "content": q}, turn]) for (q, _), turn in zip(CHATS, answers, strict=True)]
    with torch.no_grad():
        assert losses_of(output) == pytest.approx([mean_loss(open_hub_model(base), examples).item()], abs=1e-5)


@pytest.mark.slow
def test_a_metric(tmp_path, base, rows):
    """The figure in the journal is the mean, over the answers on disk, of the edit distance written another way."""
    more = ["--eval_split", 2, "--predict_with_generate", "--eval_task", "transcription", "--max_new_tokens", 4]
    output, _ = run_fork(tmp_path, FORKS["a metric"], base, rows, *more, "--max_steps", 1)
    lines = [json.loads(line) for line in (output / "outputs" / "held_out.jsonl").read_text().splitlines()]
    records = read_journal(output / "journal.jsonl")
    evaluations = [record for record in records if record.get("event") == "eval"]
    assert [record["step"] for record in evaluations] == [0, 1]
    for record, when in zip(evaluations, ("before", "after"), strict=True):
        rates = [distance(x["response"], x["label"]) / len(x["label"]) for x in lines if x["when"] == when]
        assert len(rates) == 2
        assert record["character_error_rate"] == pytest.approx(sum(rates) / 2)
        assert record["character_error_rate"] > 0


@pytest.mark.parametrize("response", ["", "sitting", "kitchen", "it", "mitten kitten", "network"])
def test_character_errors_are_counted(response):
    reply = Reply(id="", where="", prompt="", response=response, label="kitten", stopped=True)
    found = import_fork(FORKS["a metric"]).character_error_rate(reply)
    assert found == {"character_error_rate": distance(response, "kitten") / 6}


@cache
def distance(one: str, other: str) -> int:
    """Levenshtein's, by its definition."""
    if not one or not other:
        return len(one) + len(other)
    changed = distance(one[1:], other[1:]) + (one[0] != other[0])
    return min(changed, distance(one[1:], other) + 1, distance(one, other[1:]) + 1)


# ---- what each costs ------------------------------------------------------------------------------------------------


def test_readme_states_the_price():
    """Every file of tests/forks is one fork, and README has its lines."""
    files = {str(path.relative_to(ROOT / "tests" / "forks")) for path in (ROOT / "tests" / "forks").rglob("*.py")}
    assert files == set(FORKS.values())
    table = ["| what | file | files | lines |", "|---|---|---|---|"]
    for what, place in FORKS.items():
        path = ROOT / "tests" / "forks" / place
        table.append(f"| {what} | [{place}](tests/forks/{place}) | 1 | {len(path.read_text().splitlines())} |")
    expected = "\n".join(table)
    _, _, rest = (ROOT / "README.md").read_text().partition("<!-- forks -->\n")
    assert rest.partition("\n<!-- /forks -->")[0] == expected, f"README.md between its fork marks should be:\n{expected}"
