"""A save that dies: killed, out of power, out of disk or interrupted at every single file operation.

`Disk` stands between training/checkpoint.py and the operating system. It counts every operation that changes the disk
and does something terrible at the n-th; the sweep ends at the first n that a save does not reach. Kills happen in a
forked child with a real SIGKILL, in the middle of a write where there is one. After each the newest whole checkpoint
must load, be no older than the one before the save, and the next save must succeed.
"""

import errno
import os
import shutil
import signal
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

from training import checkpoint
from training.guards import Stop
from training.state import State

pytestmark = pytest.mark.slow

NAMES = ("fsync", "rename", "mkdir", "unlink", "rmdir")


@pytest.fixture(autouse=True)
def no_real_fsync(monkeypatch):
    """The sweeps count and model syncs; thousands of real ones would only wear the disk."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


class Disk:
    """Counts disk operations and calls strike() at number `at`, after half of the bytes where it is a write.

    Remembers what a power cut would take: files written since their last fsync, and names (new or renamed) whose folder
    was not synced since.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int, strike, sync: bool = True):
        self.at, self.strike, self.sync = at, strike, sync
        self.count = 0
        self.unsynced_files: set[str] = set()
        self.unsynced_names: list[tuple[str, str]] = []  # (old name or "", new name)
        self.real = {name: getattr(os, name) for name in NAMES}
        for name in NAMES:
            patch.setattr(os, name, lambda *args, _name=name, **kwargs: self.operate(_name, *args, **kwargs))
        patch.setattr(checkpoint, "open", self.open, raising=False)

    def reached(self) -> bool:
        self.count += 1
        return self.count == self.at

    def operate(self, name, *args, **kwargs):
        if self.reached():
            self.strike(self, name)
        if name == "fsync":
            return self.fsync(*args)
        result = self.real[name](*args, **kwargs)
        if name == "rename":
            old, new = map(str, args)
            self.unsynced_files = {path.replace(old + "/", new + "/") for path in self.unsynced_files}
            self.unsynced_names = [(was, path.replace(old + "/", new + "/")) for was, path in self.unsynced_names]
            self.unsynced_names.append((old, new))
        elif name == "mkdir":
            self.unsynced_names.append(("", str(args[0])))
        return result

    def fsync(self, number: int) -> None:
        if not self.sync:
            return
        self.real["fsync"](number)
        path = os.readlink(f"/proc/self/fd/{number}")
        self.unsynced_files.discard(path)
        self.unsynced_names = [pair for pair in self.unsynced_names if os.path.dirname(pair[1]) != path]

    def open(self, path, mode="r", **kwargs):
        if mode != "wb":
            return open(path, mode, **kwargs)
        if self.reached():
            self.strike(self, "open")
        self.unsynced_files.add(str(path))
        self.unsynced_names.append(("", str(path)))
        return File(self, open(path, mode, buffering=0))

    def lose_power(self, names: bool) -> None:
        """What the worst disk would show after a power cut: zeros for unsynced bytes and, with names, old names."""
        for path in filter(os.path.exists, self.unsynced_files):
            Path(path).write_bytes(bytes(os.path.getsize(path)))
        for old, new in reversed(self.unsynced_names) if names else []:
            if old:
                self.real["rename"](new, old)
            elif os.path.isdir(new):
                shutil.rmtree(new)
            elif os.path.exists(new):
                self.real["unlink"](new)


class File:
    """A file open for writing whose writes are counted."""

    def __init__(self, disk: Disk, file):
        self.disk, self.file = disk, file

    def write(self, data) -> None:
        half = len(data) // 2 if self.disk.reached() else 0
        self.disk.unsynced_files.add(str(self.file.name))
        if half:
            self.file.write(data[:half])
            self.disk.strike(self.disk, "write")
        self.file.write(data[half:])

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def contents(step: int) -> tuple[dict, dict]:
    """Files of a small checkpoint that depend on the step."""
    generator = torch.Generator().manual_seed(step)
    weights = {"a": torch.randn(7, 5, generator=generator).bfloat16(), "b": torch.randn(11, generator=generator)}
    tensors = {"weights.safetensors": weights, "random.safetensors": {"x": weights["b"] * 2}}
    return tensors, {"state.json": State(step=step).to_json()}


def save(folder: Path, step: int, keep: int = 2) -> str | None:
    return checkpoint.commit(folder, step, *contents(step), keep=keep)


def loaded_step(folder: Path) -> int:
    """The step of the newest whole checkpoint, 0 if there is none; its contents must be what that step saved."""
    path = checkpoint.newest_whole(folder)
    if path is None:
        return 0
    tensors, jsons = checkpoint.load(path)
    step = jsons["state.json"]["step"]
    expected, expected_jsons = contents(step)
    assert jsons == expected_jsons
    for file, named in expected.items():
        assert tensors[file].keys() == named.keys()
        assert all(torch.equal(tensors[file][name], named[name]) for name in named)
    return step


def first_save(folder: Path) -> int:
    return 0


def third_save(folder: Path) -> int:
    """Two checkpoints stand, the next save prunes one."""
    assert save(folder, 200) is None and save(folder, 400) is None
    return 400


def damaged_successor(folder: Path) -> int:
    """A damaged checkpoint of the very step that will be saved."""
    assert save(folder, 400) is None and save(folder, 600) is None
    with open(folder / "checkpoints/step-000600/weights.safetensors", "r+b") as file:
        file.write(b"damaged")
    return 400


def same_step(folder: Path) -> int:
    """The only checkpoint is replaced by one of the same step."""
    assert save(folder, 600) is None
    return 600


def leftovers(folder: Path) -> int:
    """Earlier saves of this step and of others were killed, and the run was rolled back from step 800."""
    assert save(folder, 400) is None and save(folder, 800) is None
    for name in (".saving-step-000600", ".saving-step-000500", ".replaced-step-000300"):
        shutil.copytree(folder / "checkpoints/step-000400", folder / "checkpoints" / name)
    return 800


SCENES = [first_save, third_save, damaged_successor, same_step, leftovers]


def in_child(work) -> int:
    """Run work() in a forked child; its exit code, or minus the signal that killed it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's idle threads; the child starts none
        child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying_save(folder: Path, at: int, strike, sync: bool) -> int:
    """Save step 600 until operation `at`; if that is never reached, cut the power after the save all the same."""
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, at, strike, sync)
        assert save(folder, 600) is None
        if strike is not kill:  # a save that has returned must be durable
            disk.lose_power(names=strike is cut_power)
    return 0


def sweep(tmp_path: Path, scene, strike, sync: bool = True) -> list[int]:
    """Kill a save of step 600 at operation 1, 2, ... until one ends well; the newest step before and after each."""
    found = []
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    before = scene(prepared)
    while True:
        folder = tmp_path / f"at-{len(found) + 1}"
        shutil.copytree(prepared, folder)
        work = partial(dying_save, folder, len(found) + 1, strike, sync)
        try:
            code = in_child(work) if strike is kill else work()
        except PowerCut:
            code = -signal.SIGKILL
        found.append(loaded_step(folder))
        if sync:
            assert save(folder, 610) is None and loaded_step(folder) == 610
            left = [path.name for path in (folder / "checkpoints").iterdir()]
            assert all(name.startswith("step-") for name in left) and len(left) <= 2
        shutil.rmtree(folder)
        if code == 0:
            return [before, *found]
        assert code == -signal.SIGKILL


class PowerCut(BaseException):
    """Ends a save as a kill would: training/checkpoint.py never catches it, and the test's files are unbuffered."""


def kill(disk: Disk, name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def cut_power(disk: Disk, name: str) -> None:
    disk.lose_power(names=True)
    raise PowerCut


def cut_power_keeping_names(disk: Disk, name: str) -> None:
    """What ext4 and xfs can do: the names are on disk, the bytes behind them are not."""
    disk.lose_power(names=False)
    raise PowerCut


@pytest.mark.parametrize("strike", [kill, cut_power, cut_power_keeping_names])
@pytest.mark.parametrize("scene", SCENES)
def test_a_killed_save_never_loses_the_checkpoint_before_it(tmp_path, scene, strike):
    before, *found = sweep(tmp_path, scene, strike)
    print(f"{len(found) - 1} kill points")  # the last save of the sweep was left in peace
    assert len(found) > 15
    assert all(step in (before, 600) for step in found)
    assert found == sorted(found, key=lambda step: step == 600)  # once the new one is the newest, it stays
    assert found[-1] == 600


def test_the_power_cut_has_teeth(tmp_path):
    """The same sweep over a save that never syncs must lose checkpoints, or the sweep above proves nothing."""
    assert 0 in sweep(tmp_path, same_step, cut_power_keeping_names, sync=False)


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("lasting", [False, True])
def test_a_failing_disk_leaves_the_old_checkpoint_and_the_run(tmp_path, scene, number, lasting, monkeypatch):
    """One operation fails, or it and all later ones that write; the retry succeeds when the disk is well again."""
    at = 0
    while True:
        at += 1
        folder = tmp_path / f"at-{at}"
        folder.mkdir()
        before = scene(folder)

        def fail(disk: Disk, name: str) -> None:
            if lasting and name not in ("unlink", "rmdir"):
                disk.at += 1
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            disk = Disk(patch, at, fail)
            problem = save(folder, 600)
        if problem:
            assert os.strerror(number) in problem and "step-000600" in problem
        assert loaded_step(folder) in (before, 600)
        assert save(folder, 600) is None
        assert loaded_step(folder) == 600
        assert [path.name for path in (folder / "checkpoints").glob(".*")] == []
        shutil.rmtree(folder)
        if disk.count < at:
            assert problem is None and at > 15
            return


def signalled_save(folder: Path, at: int, number: int, num_signals: int) -> int:
    """Save step 600 and send this process signals at operation `at`; leaves a mark where each part was reached."""

    def send(disk: Disk, name: str) -> None:
        (folder / "reached").touch()
        for _ in range(num_signals):
            os.kill(os.getpid(), number)

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    stop = Stop()
    Disk(pytest.MonkeyPatch(), at, send)
    assert save(folder, 600) is None
    (folder / "finished").touch()
    return stop.exit_code if stop.requested else 0


@pytest.mark.parametrize("number, expected", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("num_signals", [1, 2])
def test_a_signal_inside_a_save(tmp_path, num_signals, number, expected):
    """One signal: the save ends and the exit code says why. Two: the process leaves at once and nothing is torn."""
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    third_save(prepared)
    at = 0
    while True:
        at += 1
        folder = tmp_path / f"at-{at}"
        shutil.copytree(prepared, folder)
        code = in_child(partial(signalled_save, folder, at, number, num_signals))
        if not (folder / "reached").exists():
            assert code == 0 and at > 15
            return
        assert code == expected
        assert (folder / "finished").exists() == (num_signals == 1)
        assert loaded_step(folder) in ((600,) if num_signals == 1 else (400, 600))
        assert save(folder, 610) is None and loaded_step(folder) == 610
        shutil.rmtree(folder)
