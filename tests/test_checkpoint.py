"""What a checkpoint holds, how damage is noticed, what --resume means, and that a resumed run is the same run."""

import json
import random
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.errors import UserError
from training import checkpoint
from training.checkpoint import commit, find_problem, find_resume, load, newest_whole
from training.guards import judge
from training.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors, parameter_groups, schedule
from training.state import State, capture_random, restore_random


def save(folder, step, keep=2):
    weights = {"a": torch.full((3, 4), float(step)), "b": torch.arange(5)}
    problem = commit(folder, step, {"weights.safetensors": weights}, {"state.json": State(step=step).to_json()}, keep)
    assert problem is None


def saved_steps(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_files_are_what_safetensors_reads_and_writes(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(), "half": torch.randn(7).half(), "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "transposed": torch.randn(4, 6).T,
        "bytes": torch.arange(7, dtype=torch.uint8), "double": torch.randn(3, dtype=torch.float64),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)), "slice": torch.arange(20)[3:9:2],
        "name with / and \u00e9": torch.ones(1),
    }  # fmt: skip
    files = {"w.safetensors": tensors, "none.safetensors": {}}
    assert commit(tmp_path, 7, files, {"x.json": {"k": [1, None, 0.1]}}) is None
    path = newest_whole(tmp_path)
    assert path == tmp_path / "checkpoints/step-000007"
    loaded, jsons = load(path)
    assert jsons == {"x.json": {"k": [1, None, 0.1]}} and loaded["none.safetensors"] == {}
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, tmp_path / "library")
    for reference in (tensors, load_file(tmp_path / "library")):
        assert loaded["w.safetensors"].keys() == reference.keys()
        for name, tensor in reference.items():
            assert loaded["w.safetensors"][name].dtype == tensor.dtype
            assert torch.equal(loaded["w.safetensors"][name], tensor)


def test_state_survives_json(tmp_path):
    state = State()
    state.scaler.dynamic, state.scaler.scale = True, 2.0**15
    for step in range(300):
        judge(0.1 + 1 / (step + 3), 1 / 3 if step % 7 else float("inf"), state.statistics, skip_spikes=True)
        state.step += 1
    again = State.from_json(json.loads(json.dumps(state.to_json())))
    assert again == state and again.step == 300
    assert len(again.statistics.losses) == 128


def test_another_number_of_threads_is_noted(capsys):
    saved = State().to_json()
    State.from_json(saved)
    assert capsys.readouterr().out == ""
    saved["num_threads"] += 3
    State.from_json(saved)
    assert "threads" in capsys.readouterr().out


@pytest.mark.parametrize("with_gauss", [False, True])
def test_random_generators_go_on_where_they_were(tmp_path, with_gauss):
    random.seed(5)
    torch.manual_seed(5)
    if with_gauss:  # Python keeps the second number of each pair for later
        random.gauss(0, 1)
    assert commit(tmp_path, 1, {"random.safetensors": capture_random()}, {}) is None

    def draw():
        dropped = torch.nn.functional.dropout(torch.ones(9)).tolist()
        return [random.random(), random.gauss(0, 1), torch.rand(3).tolist(), dropped]

    expected = draw()
    random.seed(1)
    torch.manual_seed(1)
    restore_random(load(newest_whole(tmp_path))[0]["random.safetensors"])
    assert draw() == expected


def flip(path, bit):
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_every_flipped_bit_of_the_manifest_is_noticed(tmp_path):
    save(tmp_path, 200)
    path = tmp_path / "checkpoints/step-000200"
    for bit in range((path / "manifest.json").stat().st_size * 8):
        flip(path / "manifest.json", bit)
        assert find_problem(path) is not None, bit
        flip(path / "manifest.json", bit)
    assert find_problem(path) is None


def test_a_flipped_bit_anywhere_means_the_previous_checkpoint(tmp_path, capsys):
    save(tmp_path, 200)
    save(tmp_path, 400)
    newest = tmp_path / "checkpoints/step-000400"
    generator = random.Random(0)
    names = sorted(path.name for path in newest.iterdir())
    assert names == ["manifest.json", "state.json", "weights.safetensors"]
    for _ in range(400):
        path = newest / generator.choice(names)
        bit = generator.randrange(path.stat().st_size * 8)
        flip(path, bit)
        assert newest_whole(tmp_path) == tmp_path / "checkpoints/step-000200"
        assert f"{newest} is not whole" in capsys.readouterr().err
        flip(path, bit)
    assert newest_whole(tmp_path) == newest


def test_other_damage_is_noticed(tmp_path):
    save(tmp_path, 400)
    whole = tmp_path / "checkpoints/step-000400"

    def damaged(change) -> str | None:
        path = tmp_path / "other/checkpoints/step-000400"
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        shutil.copytree(whole, path)
        return find_problem(change(path) or path)

    assert damaged(lambda path: None) is None
    assert damaged(lambda path: (path / "notes.txt").write_text("mine") and None) is None  # a user's own file
    assert "weights.safetensors" in damaged(lambda path: (path / "weights.safetensors").unlink())
    assert "manifest.json" in damaged(lambda path: (path / "manifest.json").unlink())
    assert "state.json" in damaged(lambda path: (path / "state.json").write_text("") and None)
    assert "manifest.json" in damaged(lambda path: path.rename(path.with_name("step-000500")))
    manifest = {"step": 400, "files": {"../../step-000400/state.json": {}}}
    assert "outside" in damaged(lambda path: (path / "manifest.json").write_text(json.dumps(manifest)) and None)
    for text in ("[]", "{}", '{"files": 3}', "[" * 100000):
        assert damaged(lambda path, text=text: (path / "manifest.json").write_text(text) and None) is not None


def test_pruning_keeps_the_newest_and_drops_what_a_rollback_left(tmp_path):
    for step in (1, 2, 3, 999999, 1000000):
        save(tmp_path, step, keep=3)
    assert saved_steps(tmp_path) == ["step-000003", "step-1000000", "step-999999"]
    assert newest_whole(tmp_path).name == "step-1000000"
    save(tmp_path, 4, keep=3)  # resumed from step 3
    assert saved_steps(tmp_path) == ["step-000003", "step-000004"]
    save(tmp_path, 5, keep=1)
    assert saved_steps(tmp_path) == ["step-000005"]


def test_what_resume_means(tmp_path, capsys):
    assert find_resume(tmp_path, "no") is None
    assert find_resume(tmp_path, "yes") is None
    assert "starting fresh" in capsys.readouterr().out
    save(tmp_path, 200)
    save(tmp_path, 400)
    old, new = (tmp_path / f"checkpoints/step-000{step}" for step in (200, 400))
    assert find_resume(tmp_path, "yes") == new
    assert find_resume(tmp_path, "200") == old
    assert find_resume(tmp_path, str(old)) == old
    assert find_resume(tmp_path / "elsewhere", str(tmp_path)) == new
    with pytest.raises(UserError, match="holds a run .step-000400.*--resume yes"):
        find_resume(tmp_path, "no")
    with pytest.raises(UserError, match="--resume 300.*step-000400, step-000200"):
        find_resume(tmp_path, "300")
    with pytest.raises(UserError, match="no whole checkpoint"):
        find_resume(tmp_path, str(tmp_path / "nothing"))
    (new / "state.json").write_text("{}")
    assert find_resume(tmp_path, "yes") == old
    with pytest.raises(UserError, match="state.json is not what was written"):
        find_resume(tmp_path, "400")
    (old / "state.json").unlink()
    with pytest.raises(UserError, match="none of step-000400, step-000200 is whole"):
        find_resume(tmp_path, "yes")


def test_a_save_that_cannot_even_start_is_a_sentence(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    problem = commit(tmp_path, 5, {}, {})
    assert "step-000005 could not be saved" in problem


class Run:
    """A small run with dropout, ragged random batches, clipping, a schedule and the judge, as train.py is one."""

    def __init__(self, optim, dtype=torch.float32):
        torch.manual_seed(0)
        random.seed(0)
        first, last = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)
        self.net = torch.nn.Sequential(first, torch.nn.Dropout(0.2), last).to(dtype)
        self.optimizer = build_optimizer(optim, parameter_groups(self.net, 0.1), lr=1e-2)
        self.state = State()

    def step(self):
        rows = torch.randn(random.randint(1, 5), 64).to(self.net[0].weight.dtype)
        loss = (self.net(rows) - rows).float().pow(2).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        if judge(loss.item(), norm.item(), self.state.statistics).action == "update":
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-2 * schedule("cosine", self.state.step, 0.2, 10)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1

    def save(self, folder):
        tensors, numbers = optimizer_tensors(self.optimizer)
        files = {"weights.safetensors": dict(self.net.named_parameters()), "optimizer.safetensors": tensors}
        files["random.safetensors"] = capture_random()
        jsons = {"state.json": self.state.to_json(), "optimizer.json": numbers}
        assert commit(folder, self.state.step, files, jsons) is None

    def resume(self, folder):
        tensors, jsons = load(newest_whole(folder))
        self.net.load_state_dict(tensors["weights.safetensors"])
        load_optimizer_tensors(self.optimizer, tensors["optimizer.safetensors"], jsons["optimizer.json"])
        self.state = State.from_json(jsons["state.json"])
        restore_random(tensors["random.safetensors"])
        return self


@pytest.mark.parametrize(
    "optim, dtype", [("adamw", torch.float32), ("adamw_8bit", torch.float32), ("adamw_8bit", torch.bfloat16)]
)
def test_a_run_resumed_at_any_step_is_the_same_run(tmp_path, optim, dtype):
    whole = Run(optim, dtype)
    for step in range(10):
        whole.save(tmp_path / str(step))
        whole.step()
    for step in range(10):
        resumed = Run(optim, dtype)
        torch.rand(step), random.random()  # a resumed process has drawn other numbers before it resumes
        resumed.resume(tmp_path / str(step))
        assert resumed.state.step == step
        while resumed.state.step < 10:
            resumed.step()
        assert resumed.state == whole.state
        for (name, ours), theirs in zip(resumed.net.named_parameters(), whole.net.parameters(), strict=True):
            assert torch.equal(ours, theirs), f"{name} differs after a resume at step {step}"
        ours, theirs = optimizer_tensors(resumed.optimizer), optimizer_tensors(whole.optimizer)
        assert ours[1] == theirs[1] and ours[0].keys() == theirs[0].keys()
        assert all(torch.equal(ours[0][key], theirs[0][key]) for key in theirs[0])


def test_a_resume_reads_each_tensor_once(tmp_path, monkeypatch):
    whole = Run("adamw")
    whole.step()
    whole.save(tmp_path)
    reads, read = Counter(), checkpoint.TensorFile.__getitem__
    monkeypatch.setattr(checkpoint.TensorFile, "__getitem__", lambda file, name: reads.update([name]) or read(file, name))
    Run("adamw").resume(tmp_path)
    assert len(reads) > 12 and set(reads.values()) == {1}


def test_dropping_any_part_of_the_state_is_visible(tmp_path, monkeypatch):
    """The test above is only worth something if each part of the checkpoint matters to it."""
    whole = Run("adamw")
    for _ in range(4):
        whole.step()
    whole.save(tmp_path)
    for _ in range(2):
        whole.step()
    for part in ("restore_random", "load_optimizer_tensors", None):
        with monkeypatch.context() as patch:
            if part:
                patch.setitem(globals(), part, lambda *_: None)
            resumed = Run("adamw").resume(tmp_path)
        for _ in range(2):
            resumed.step()
        pairs = zip(resumed.net.parameters(), whole.net.parameters(), strict=True)
        same = all(torch.equal(ours, theirs) for ours, theirs in pairs)
        assert same == (part is None)


def test_nothing_is_pickled():
    text = open(checkpoint.__file__).read()
    assert "pickle" not in text.replace("unpickled", "") and "torch.load" not in text and "torch.save" not in text
