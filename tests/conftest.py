"""Shared by all tests: where the references lie, and one thread so that figures repeat."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; child processes inherit it

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
REFERENCE = Path(os.environ.get("REFERENCE", SHARED / "reference"))


def shared(path: str) -> Path:
    """A file or folder of the material that lies beside the project; skips the test where it is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"{path} of the shared material is not on this machine")
    return found


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A tiny text model with a byte-level tokenizer of its own; nobody writes into it."""
    from model.tiny import write_tiny

    folder = tmp_path_factory.mktemp("base") / "qwen2"
    write_tiny("qwen2", folder)
    return folder
