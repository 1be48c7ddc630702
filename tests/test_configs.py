"""The shipped recipes: each is read as it stands and accepts rows with its family's default picture."""

import json
import shutil

import pytest
from conftest import ROOT, shared
from PIL import Image

from data.rows import open_rows
from model.family import find_family
from model.tiny import write_tiny
from stages import list_stages
from training.config import read_config

STAGES = {name: module.Flags for name, module in list_stages().items()}
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def read(path, *more):
    return read_config(["--config", str(path), "--data_path", "rows.jsonl", *map(str, more)], STAGES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_read_and_says_its_command(path):
    config = read(path)
    assert config.base_model and config.output_dir
    assert path.read_text().startswith("# python train.py --config configs/" + path.name)


def test_proxy_lite_takes_its_default_picture(tmp_path):
    """An annotated 1280 x 1920 screenshot with its border is 1330 x 1970: 3,360 positions (facts of the model's rule)."""
    base = tmp_path / "base"
    write_tiny("qwen2_5_vl", base)
    shutil.copyfile(shared("tokenizers/qwen2.5-vl/preprocessor_config.json"), base / "preprocessor_config.json")
    Image.new("RGB", (1330, 1970)).save(tmp_path / "page.png")
    turns = [
        {"role": "user", "content": [{"type": "image", "image": "page.png"}, {"type": "text", "text": "Task: go on"}]},
        {"role": "assistant", "content": "<observation>a page</observation><thinking>on</thinking>"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "messages": turns}) + "\n" for i in range(40)))
    config = read_config(["--config", str(ROOT / "configs/proxy-lite-3b-lora.yaml"), "--data_path", str(path)], STAGES)
    rows = open_rows(config, find_family(base), tmp_path)
    assert rows.lengths.longest > 3360 and not rows.bad
    assert len(rows.lengths.kept) == 38 and len(rows.eval_sets["held_out"][1]) == 2
