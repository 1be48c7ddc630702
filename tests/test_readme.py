"""What README.md promises: its commands run as they stand, its row reads, its pages' paths exist."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from model.tiny import write_tiny

README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_ID = "convergence-ai/proxy-lite-3b"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_first_commands_run_as_they_stand(tmp_path):
    """The command on your own rows and the question after it, on a tiny model in the hub's cache under the same id."""
    revision = tmp_path / "hub" / ("models--" + HUB_ID.replace("/", "--"))
    (revision / "refs").mkdir(parents=True)
    (revision / "refs" / "main").write_text("0" * 40)
    write_tiny("qwen2_5_vl", revision / "snapshots" / ("0" * 40))
    (tmp_path / "screens").mkdir()
    Image.new("RGB", (280, 224), "white").save(tmp_path / "screens" / "shop.png")
    (tmp_path / "rows.json").write_text(blocks("json")[0])
    commands = next(block for block in blocks("bash") if HUB_ID in block)
    script = commands.replace("python train.py", f"{sys.executable} {ROOT}/train.py")
    script = script.replace("python -m eval", f"{sys.executable} -m eval")
    environment = dict(os.environ, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "finetuned" / "adapter" / "adapter_config.json").exists()
    assert (tmp_path / "finetuned" / "report.html").exists()


def test_the_row_is_fifteen_lines_and_json():
    block = blocks("json")[0]
    assert block.count("\n") <= 15
    row = json.loads(block)[0]
    assert row["tools"] and row["messages"][-1]["tool_calls"]


@pytest.mark.parametrize("page", ["README.md", "data/README.md", "stages/README.md"])
def test_every_path_of_a_page_exists(page):
    """Paths in backticks from the project's folder; links from the page's own."""
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:train|data|model|lora|stages|training|eval|bench|tests)[\w/]*(?:\.py|/))`", text)
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert paths or links
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.slow
def test_python_section_runs():
    code = blocks("python")[0]
    if not (Path(ROOT) / "data/demo_base/model.safetensors").exists():
        pytest.skip("the built-in base is not in this checkout")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("door", ["train.py", "-m eval", "-m eval ask", "-m lora", "-m model", "-m data", "-m bench"])
def test_help_needs_no_heavy_library(door):
    """--help answers at once because nothing heavy is imported: checked by what is loaded, not by a clock."""
    arguments = door.split()
    module = arguments[1] if arguments[0] == "-m" else None
    run = f"run_module({module!r}, alter_sys=True, " if module else "run_path('train.py', "
    target = f"runpy.{run}run_name='__main__')"
    code = (
        f"import runpy, sys\nsys.path.insert(0, '.')\nsys.argv = {['x', *arguments[2:], '--help']!r}\n"
        f"try:\n    {target}\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'datasets', 'bitsandbytes'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "usage" in done.stdout
