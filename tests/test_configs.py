"""The shipped recipes: each is read as it stands, says what its guide says (or why not), and accepts rows with its family's
default picture."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, shared
from PIL import Image
from test_siblings import COGAGENT, MINICPM, PHI

from data.errors import UserError
from data.rows import open_rows
from lora.adapter import Settings, attach, find_targets
from lora.files import save_adapter
from lora.merge import merge
from model import load_model, save_model
from model.family import Options, find_family
from model.load import build_on_meta
from model.tiny import write_tiny
from stages import list_stages
from training.config import read_config

STAGES = {name: module.Flags for name, module in list_stages().items()}
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def read(name, *more):
    return read_config(["--config", str(ROOT / "configs" / f"{name}.yaml"), *map(str, more)], STAGES)


def write_rows(folder, size, words="go on", count=40):
    """Rows with one picture of this size, as a path."""
    Image.new("RGB", size).save(folder / "page.png")
    turns = [
        {"role": "user", "content": [{"type": "image", "image": "page.png"}, {"type": "text", "text": words}]},
        {"role": "assistant", "content": "<observation>a page</observation><thinking>on</thinking>"},
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "messages": turns}) + "\n" for i in range(count)))
    return path


def change(path, **changes):
    """Values of a JSON file, replaced."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_read_and_says_its_command(path):
    config = read(path.stem, "--data_path", "rows.jsonl")
    assert config.base_model and config.output_dir
    assert path.read_text().startswith("# python train.py --config configs/" + path.name)


# ---- the default picture of each family --------------------------------------------------------------------------------


def test_proxy_lite_takes_its_default_picture(tmp_path):
    """An annotated 1280 x 1920 screenshot with its border is 1330 x 1970: 3,360 positions (facts of the model's rule)."""
    base = tmp_path / "base"
    write_tiny("qwen2_5_vl", base)
    shutil.copyfile(shared("tokenizers/qwen2.5-vl/preprocessor_config.json"), base / "preprocessor_config.json")
    config = read("proxy-lite-3b-lora", "--data_path", write_rows(tmp_path, (1330, 1970)))
    rows = open_rows(config, find_family(base), tmp_path)
    assert rows.lengths.longest > 3360 and not rows.bad
    assert len(rows.lengths.kept) == 38 and len(rows.eval_sets["held_out"][1]) == 2


def minicpm(folder):
    """Slices of 448 pixels in 96 places, at most nine and the overview: 885 positions of a full screenshot."""
    write_tiny("minicpm_v", folder)
    change(folder / "config.json", query_num=96, slice_config={"max_slice_nums": 9, "patch_size": 14})
    change(folder / "preprocessor_config.json", scale_resolution=448)
    return 885


def cogagent(folder):
    """1120 x 1120 pixels, 40 x 40 places, and the two learned vectors around them."""
    write_tiny("cogagent", folder)
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    change(folder / "config.json", vision_config=vision | {"image_size": 1120, "num_positions": 6401})
    return 1602


def phi(folder):
    """Up to 16 tiles of 336 pixels: 3 x 5 of them for a full screenshot."""
    write_tiny("phi3_vision", folder)
    processor = json.loads((folder / "config.json").read_text())["img_processor"]
    tower = processor["clip_config_override"] | {"image_size": 336}
    change(folder / "config.json", img_processor=processor | {"clip_config_override": tower, "num_img_tokens": 144})
    change(folder / "preprocessor_config.json", num_crops=16)
    return (3 * 5 + 1) * 144 + 1 + (3 + 1) * 12


@pytest.mark.parametrize(
    "recipe, make",
    [
        ("minicpm-v-2.5-guicourse-lora", minicpm), ("minicpm-v-2.5-guicourse-full", minicpm),
        ("cogagent-9b-lora", cogagent), ("cogagent-9b-sft", cogagent), ("phi3-vision-lora", phi),
    ],
)  # fmt: skip
def test_a_recipe_takes_its_familys_default_picture(tmp_path, recipe, make):
    num_positions = make(tmp_path / "base")
    config = read(recipe, "--data_path", write_rows(tmp_path, (1920, 1080)))
    family = find_family(tmp_path / "base", Options(labels=config.labels))
    rows = open_rows(config, family, tmp_path)
    assert not rows.bad and len(rows.lengths.kept) == (38 if config.eval_split else 40)
    example = family.encode(rows.train[0].messages)
    text = family.count([{"role": "user", "content": "go on"}, rows.train[0].messages[1]], None, [])[0]
    assert num_positions <= len(example) - text <= num_positions + 3 and len(example) == rows.lengths.longest


@pytest.mark.parametrize("recipe", ["cogagent-9b-lora", "cogagent-9b-sft"])
def test_cogagents_lengths_count_text_and_the_run_says_so(tmp_path, capsys, recipe):
    """900 letters fit 512 + 512 tokens of text whatever the picture takes; 1,100 do not, and the error names the setting."""
    cogagent(tmp_path / "base")
    family = find_family(tmp_path / "base")
    config = read(recipe, "--data_path", write_rows(tmp_path, (640, 480), "a" * 900))
    said = capsys.readouterr().err
    assert "max_input_length and max_output_length count text: 1024 text tokens an example at most, and the " in said
    assert "positions of its pictures on top" in said
    assert open_rows(config, family, tmp_path).lengths.longest > 1600 + 900
    config = read(recipe, "--data_path", write_rows(tmp_path, (640, 480), "a" * 1100))
    with pytest.raises(UserError, match="--max_text_length"):
        open_rows(config, family, tmp_path)
    refused = json.loads((tmp_path / "bad_rows.jsonl").read_text().splitlines()[0])
    assert "its 1600 picture positions come on top" in refused["problem"]


# ---- what the guides say -----------------------------------------------------------------------------------------------


def trained_by(recipe, config_json, folder):
    """(parameters that a recipe's LoRA trains at the real size, family, network on meta)."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json))
    family = find_family(folder)
    net = build_on_meta(family)
    settings = Settings.from_config(read(recipe, "--data_path", "rows.jsonl"))
    names = find_targets(net, family, settings.targets, settings.parts)
    layers = [net.get_submodule(name) for name in names]
    return sum(settings.r * (layer.in_features + layer.out_features) for layer in layers), family, net


def test_lora_trains_what_the_guides_train(tmp_path):
    """Parameters at the real sizes, as the makers' own code and peft count them."""
    assert trained_by("cogagent-9b-lora", COGAGENT, tmp_path / "c")[0] == 6_397_952  # 103 layers, the tower's with them
    assert trained_by("minicpm-v-2.5-guicourse-lora", MINICPM, tmp_path / "m")[0] == 54_525_952
    found, family, net = trained_by("phi3-vision-lora", PHI, tmp_path / "p")
    assert found == 32 * 16 * ((3072 + 9216) + (3072 + 3072) + (3072 + 16384) + (8192 + 3072))
    with pytest.raises(UserError, match="q_proj: such layers are in vision and not in language"):
        find_targets(net, family, ["q_proj", "v_proj"], None)  # what the guide asks for


def test_a_frozen_tower_is_frozen(tmp_path):
    """freezeV: nothing under transformer.vision is trained."""
    family = write_tiny("cogagent", tmp_path / "base")
    model, family = load_model(family.folder)
    attach(model, family, Settings.from_config(read("cogagent-9b-sft", "--data_path", "rows.jsonl")))
    frozen = {name for name, p in model.net.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.net.named_parameters() if name.startswith("transformer.vision.")}


TEMPLATE = (  # as the hub's MiniCPM folder has it: it opens an answer behind every conversation, asked or not
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


@pytest.mark.parametrize("recipe", ["minicpm-v-2.5-guicourse-lora", "minicpm-v-2.5-guicourse-full"])
def test_no_template_has_to_be_restored(tmp_path, recipe):
    """Training needs no other template than inference: the result holds the base's files byte for byte."""
    base, result = tmp_path / "base", tmp_path / "result"
    write_tiny("minicpm_v", base)
    plain = find_family(base).encode([{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}])
    change(base / "tokenizer_config.json", chat_template=TEMPLATE)
    (base / "LICENSE").write_bytes(b"theirs\r\n\xff")
    model, family = load_model(base, dtype="float32")
    settings = Settings.from_config(read(recipe, "--data_path", "rows.jsonl"))
    attach(model, family, settings)
    example = family.encode([{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}])
    assert torch.equal(example.input_ids, plain.input_ids) and torch.equal(example.labels, plain.labels)
    if settings.use_lora:
        save_adapter(model, family, tmp_path / "adapter", settings, base)
        merge(base, tmp_path / "adapter", result)
    else:
        save_model(model, result)
    files = {path.name for path in base.iterdir() if path.suffix != ".safetensors"}
    assert {"tokenizer.json", "tokenizer_config.json", "LICENSE"} <= files
    assert all((result / name).read_bytes() == (base / name).read_bytes() for name in files)
