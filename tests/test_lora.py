"""Adapters: which modules get one, what is trained, what is saved and who can open it.

The oracles are peft and transformers alone: what is saved here must give the same logits there.
"""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from data.batches import pack_row
from data.errors import UserError
from lora.adapter import Settings, attach, disabled, find_targets, lora_layers, table_text, trainable_table
from lora.files import adapter_parameters, load_adapter, save_adapter
from model import load_model
from model.checkpointing import checkpoint_blocks
from model.family import find_family
from model.load import build_on_meta, expected_tensors
from model.shards import plan_shards, write_shards
from stages.sft import Flags, Stage

TEXT = dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6, vocab_size=128,
    max_position_embeddings=512, tie_word_embeddings=True, use_sliding_window=False, hidden_act="silu",
    bos_token_id=1, eos_token_id=2,
)
VISION = TEXT | dict(
    architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl", image_token_id=120,
    video_token_id=121, vision_start_token_id=122, vision_end_token_id=123, vision_token_id=124,
    rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
    vision_config=dict(
        depth=2, hidden_act="silu", hidden_size=32, intermediate_size=44, num_heads=2, in_chans=3, out_hidden_size=64,
        patch_size=14, spatial_merge_size=2, spatial_patch_size=14, window_size=56, fullatt_block_indexes=[1],
        tokens_per_second=2, temporal_patch_size=2,
    ),
)
PROCESSOR = dict(
    patch_size=14, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
    min_pixels=784, max_pixels=50176,
)
CONFIGS = {"text": TEXT, "vision": VISION}
PREFIX = dict(peft_type="PREFIX_TUNING", num_virtual_tokens=5)
SCALES = {"lora": dict(), "rslora": dict(use_rslora=True), "dora": dict(use_dora=True)}


def tiny_base(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A random model in the hub's layout, in several shards, with files beside the weights that must survive."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind] | changes))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "NOTICE").write_bytes(b"kept\r\nbyte for byte\xff")
    family = find_family(folder)
    net = build_on_meta(family)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in expected_tensors(family, net).items():
        random = torch.randn(shape, generator=generator)
        tensors[name] = (1 + 0.1 * random if len(shape) == 1 and "bias" not in name else random * 0.08).to(dtype)
    write_shards(folder, tensors, plan_shards({n: t.nbytes for n, t in tensors.items()}, shard_bytes=150_000))
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {kind: tiny_base(root / kind, kind) for kind in CONFIGS}


def examples_of(family, seed: int = 0) -> list:
    """Three rows; in a vision family the first has two pictures, the second none, the third one."""
    generator = torch.Generator().manual_seed(seed)

    def words(count):
        return torch.randint(3, 100, (count,), generator=generator).tolist()

    examples = []
    for num_pictures, length in ((2, 20), (0, 9), (1, 14)):
        ids, pictures = words(length), []
        for number in range(num_pictures if family.image_token_id else 0):
            pixels, count = family.picture(Image.new("RGB", (60 + 30 * number, 80), (200, 40 * number, 90)))
            pictures.append(pixels)
            ids += [VISION["vision_start_token_id"], *[family.image_token_id] * count, VISION["vision_end_token_id"]]
            ids += words(4)
        labels = [-100] * (len(ids) - 4) + ids[-4:]
        examples.append(family.example(ids, labels, family.join_pixels(pictures)))
    return examples


def make(folder, seed: int = 1, quant=None, dtype="float32", **settings):
    """A model with a fresh adapter whose B (or prefix) is not zero, so that it has an effect."""
    model, family = load_model(folder, quant=quant, dtype=dtype)
    torch.manual_seed(seed)
    settings = Settings(**dict(r=4, alpha=16, targets=None) | settings)
    attach(model, family, settings)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif "prompt" in name:
                parameter.normal_(std=0.5)
    return model, family, settings


def gradients(model, family, examples) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    packed = pack_row(examples)
    Stage(Flags(), model).loss(model, packed, 10.0)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def hub_model(folder: Path):
    """The model as transformers alone reads it."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def hub_logits(net, family, example) -> torch.Tensor:
    """Logits of one example by transformers (and peft) alone, positions given (facts of the rule: the family's)."""
    inputs = {"input_ids": example.input_ids[None]}
    if family.image_token_id is not None:
        inputs |= {"position_ids": example.positions[:, None]} | example.pixels
    return net(**inputs).logits[0].float()


def assert_same(ours, theirs, atol=2e-5):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---- which modules ------------------------------------------------------------------------------------------------


def test_default_targets_are_those_of_the_language_model_alone(bases):
    family = find_family(bases["vision"])
    names = find_targets(build_on_meta(family), family, None, None)
    assert len(names) == 7 * 2 and all(name.startswith("model.language_model.layers.") for name in names)


@pytest.mark.parametrize(
    "targets, parts, count",
    [
        (["gate_proj"], ["language", "vision"], 2 + 2),
        (["q_proj", "model.language_model.layers.1.mlp.up_proj"], ["language"], 3),
        ([r".*layers\.0\..*(q|k)_proj"], ["language"], 2),
        (["all-linear"], ["vision"], 2 * 5),
        (None, ["projector"], 2),
        (None, ["language", "projector", "vision"], 14 + 2 + 10),
    ],
)
def test_targets_by_part(bases, targets, parts, count):
    family = find_family(bases["vision"])
    assert len(find_targets(build_on_meta(family), family, targets, parts)) == count


@pytest.mark.parametrize(
    "targets, parts, words",
    [
        (["q_prj"], ["language"], "near names: q_proj"),
        (["qkv"], ["language"], "add --lora_parts vision"),
        (["qkv"], ["language", "vision"], "no layer of the language part gets LoRA"),
        (["lm_head"], ["language"], "matches no linear layer"),
        (["q_proj"], ["audio"], "has the parts language, projector, vision"),
        (["(q_proj"], ["language"], "regular expression"),
    ],
)
def test_targets_that_match_nothing_are_refused(bases, targets, parts, words):
    family = find_family(bases["vision"])
    with pytest.raises(UserError, match=words):
        find_targets(build_on_meta(family), family, targets, parts)


def test_table_counts_each_part(bases):
    model, family, _ = make(bases["vision"], parts=["language", "vision"])
    base, _ = load_model(bases["vision"])
    rows = {part: (trained, total) for part, trained, total in trainable_table(model)}
    expected = {part: 0 for part in family.parts}
    for name, p in model.net.named_parameters():
        expected[family.part_of(name)] += p.numel() * p.requires_grad
    assert {part: trained for part, (trained, _) in rows.items()} == expected
    assert rows["projector"][0] == 0 < rows["vision"][0] < rows["language"][0]
    num_base = sum(p.numel() for p in base.parameters())
    assert sum(total - trained for trained, total in rows.values()) == num_base
    assert "language" in table_text(trainable_table(model))


def test_table_unpacks_quantised_weights(bases):
    plain, four = make(bases["text"])[0], make(bases["text"], quant="4bit", dtype="bfloat16")[0]
    assert trainable_table(plain) == trainable_table(four)


@pytest.mark.parametrize(
    "frozen, trained",
    [
        ((False, False), {"language", "projector", "vision"}),
        ((True, False), {"language", "projector"}),
        ((True, True), {"language"}),
    ],
)
def test_full_fine_tuning_by_part(bases, frozen, trained):
    model, family = load_model(bases["vision"], dtype="float32")
    attach(model, family, Settings(use_lora=False, freeze_vision=frozen[0], freeze_projector=frozen[1]))
    found = gradients(model, family, examples_of(family))
    assert {family.part_of(name.removeprefix("net.")) for name in found} == trained
    assert {part for part, count, _ in trainable_table(model) if count} == trained


def test_what_cannot_be_trained_is_refused(bases):
    model, family = load_model(bases["text"], quant="8bit")
    for settings, words in ((Settings(use_dora=True), "--use_4bit"), (Settings(use_lora=False), "--use_lora")):
        with pytest.raises(UserError, match=words):
            attach(model, family, settings)
    model, family = load_model(bases["text"])
    with pytest.raises(UserError, match="no vision part"):
        attach(model, family, Settings(use_lora=False, freeze_vision=True))


# ---- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "quant, dtype", [(None, "float32"), (None, "bfloat16"), ("8bit", "bfloat16"), ("4bit", "bfloat16")]
)
def test_a_fresh_adapter_changes_nothing_and_every_b_gets_a_gradient(bases, quant, dtype, dora):
    if quant == "8bit" and dora:
        pytest.skip("DoRA on an 8-bit base is refused (its own test)")
    model, family = load_model(bases["text"], quant=quant, dtype=dtype)
    examples = examples_of(family)
    before = model.logits(examples)
    attach(model, family, Settings(r=4, use_dora=dora, dropout=0.1))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32} and all("lora_" in name for name in trained)
    atol = 1e-5 if dtype == "float32" else 0.02 if dora else 1e-7  # DoRA subtracts and adds the base's result in bf16
    assert_same(model.logits(examples), before, atol)
    found = gradients(model, family, examples)
    num_b = [name for name in found if "lora_B" in name and found[name].abs().max() > 0]
    assert len(num_b) == 7 * 2


@pytest.mark.parametrize("quant", [None, "8bit", "4bit"])
@pytest.mark.parametrize("settings", [dict(), PREFIX], ids=["lora", "prefix"])
def test_switched_off_is_the_base_exactly(bases, quant, settings):
    base, family = load_model(bases["text"], quant=quant, dtype="float32")
    model, family, _ = make(bases["text"], quant=quant, **settings)
    examples = examples_of(family)
    attached = model.logits(examples)
    with disabled(model):
        assert_same(model.logits(examples), base.logits(examples), 0)
    assert_same(model.logits(examples), attached, 0)
    assert all((a - b).abs().max() > 0.01 for a, b in zip(attached, base.logits(examples), strict=True))


CHECKPOINTED = [
    ("text", dict(dropout=0.3), None),
    ("vision", dict(), None),
    ("vision", dict(parts=["language", "vision"]), None),
    ("text", dict(use_dora=True), "4bit"),
    ("text", PREFIX, None),
    ("vision", PREFIX, None),
]


@pytest.mark.parametrize("kind, settings, quant", CHECKPOINTED)
def test_checkpointing_does_not_change_the_gradients(bases, kind, settings, quant):
    model, family, _ = make(bases[kind], quant=quant, **settings)
    examples = examples_of(family)
    torch.manual_seed(7)
    plain = gradients(model, family, examples)
    checkpoint_blocks(block for name in family.blocks for block in model.net.get_submodule(name))
    torch.manual_seed(7)
    checkpointed = gradients(model, family, examples)
    assert set(plain) == set(checkpointed) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name in plain:
        assert plain[name].norm() > 0
        assert (plain[name] - checkpointed[name]).norm() <= 1e-6 * plain[name].norm(), name


def test_neighbours_in_the_row_do_not_matter(bases):
    for settings in (dict(), PREFIX):
        model, family, _ = make(bases["vision"], **settings)
        examples = examples_of(family)
        assert_same(model.logits(examples), model.logits(examples, as_original_batch=True))


# ---- saved, and opened by peft alone ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("variant", SCALES)
def test_peft_opens_what_is_saved(bases, tmp_path, kind, variant):
    parts = ["language"] if kind == "text" else ["language", "projector", "vision"]
    model, family, settings = make(bases[kind], parts=parts, **SCALES[variant])
    examples = examples_of(family)
    save_adapter(model, family, tmp_path, settings, bases[kind])
    ours = model.logits(examples)
    forms = [peft.AutoPeftModelForCausalLM] if kind == "text" else [peft.AutoPeftModel, peft.AutoPeftModelForCausalLM]
    for form in forms:
        net = form.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert_same([hub_logits(net, family, example) for example in examples], ours)
    net = peft.PeftModel.from_pretrained(hub_model(bases[kind]), tmp_path).eval()
    assert_same([hub_logits(net, family, example) for example in examples], ours)
    found = {name for name, m in net.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert found == set(lora_layers(model.net))


@pytest.mark.parametrize(
    "targets, expected", [(["q_proj", "v_proj"], ["q_proj", "v_proj"]), (["gate_proj"], None)], ids=["short", "full"]
)
def test_target_modules_mean_the_same_modules_to_peft(bases, tmp_path, targets, expected):
    """Short names where they are enough; gate_proj would also reach the vision tower, so it gets full names."""
    model, family, settings = make(bases["vision"], targets=targets)
    save_adapter(model, family, tmp_path, settings, bases["vision"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == (expected or sorted(lora_layers(model.net)))
    assert config["task_type"] is None
    assert config["auto_mapping"]["base_model_class"] == VISION["architectures"][0]


def test_peft_opens_a_prefix_on_text_rows(bases, tmp_path):
    for kind in CONFIGS:
        model, family, settings = make(bases[kind], **PREFIX)
        save_adapter(model, family, tmp_path / kind, settings, bases[kind])
        net = peft.PeftModel.from_pretrained(hub_model(bases[kind]), tmp_path / kind).eval()
        example = examples_of(family)[1]  # the row without pictures
        mask = torch.ones(1, len(example), dtype=torch.long)
        with torch.no_grad():
            theirs = net(input_ids=example.input_ids[None], attention_mask=mask).logits[0]
        assert_same(model.logits([example]), [theirs])
        again, _ = load_model(bases[kind], dtype="float32")
        load_adapter(again, family, tmp_path / kind)
        assert_same(again.logits(examples_of(family)), model.logits(examples_of(family)), 0)


def test_an_adapter_made_by_peft_is_read(bases, tmp_path):
    """The other way round: rsLoRA and DoRA trained by peft, opened here."""
    for variant, options in SCALES.items():
        common = dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        config = peft.LoraConfig(task_type="CAUSAL_LM", **common, **options)
        net = peft.get_peft_model(hub_model(bases["text"]), config).eval()
        net.save_pretrained(tmp_path / variant)
        model, family = load_model(bases["text"], dtype="float32")
        load_adapter(model, family, tmp_path / variant)
        examples = examples_of(family)
        assert_same(model.logits(examples), [hub_logits(net, family, example) for example in examples])


def rename_as_older(path: Path) -> None:
    """Give the tensors of an adapter the names that they had when the hub's names were the modules' names."""
    tensors = load_file(path)
    new = {"model.model.language_model.": "model.model.", "model.model.visual.": "model.visual."}
    older = {name: name for name in tensors}
    for prefix, replacement in new.items():
        older = {name: old.replace(prefix, replacement) for name, old in older.items()}
    assert set(older.values()).isdisjoint(tensors)
    save_file({older[name]: tensor for name, tensor in tensors.items()}, path)


def test_older_names_of_qwen_vl_are_read(bases, tmp_path):
    model, family, settings = make(bases["vision"], parts=["language", "projector", "vision"])
    save_adapter(model, family, tmp_path, settings, bases["vision"])
    path = tmp_path / "adapter_model.safetensors"
    rename_as_older(path)
    again, family = load_model(bases["vision"], dtype="float32")
    load_adapter(again, family, tmp_path)
    examples = examples_of(family)
    assert_same(again.logits(examples), model.logits(examples), 0)


# ---- --adapter DIR ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", [None, "8bit", "4bit"])
def test_training_goes_on_from_a_saved_adapter(bases, tmp_path, quant):
    model, family, settings = make(bases["text"], quant=quant)
    save_adapter(model, family, tmp_path, settings, bases["text"])
    again, family, _ = make(bases["text"], seed=2, quant=quant)
    examples = examples_of(family)
    load_adapter(again, family, tmp_path)
    assert_same(again.logits(examples), model.logits(examples), 0)
    assert set(gradients(again, family, examples)) == set(gradients(model, family, examples))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(r=8, alpha=32), "--lora_r"),  # the same scale, another rank
        (dict(alpha=5), "--lora_r 4 --lora_alpha 16"),
        (dict(use_rslora=True), "another scale"),
        (dict(use_dora=True), "lacks .*magnitude"),
        (dict(targets=["q_proj"]), "has, and this run's adapter has not, "),
        (dict(peft_type="PREFIX_TUNING"), "lacks prompt_embeddings"),
    ],
)
def test_an_adapter_that_differs_from_the_run_is_refused(bases, tmp_path, change, words):
    model, family, settings = make(bases["text"])
    save_adapter(model, family, tmp_path, settings, bases["text"])
    again, family, _ = make(bases["text"], **change)
    before = {name: p.detach().clone() for name, p in again.named_parameters()}
    with pytest.raises(UserError, match=words):
        load_adapter(again, family, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in again.named_parameters())


def test_an_adapter_of_another_base_with_the_same_shapes_is_said(bases, tmp_path, capsys):
    model, family, settings = make(bases["text"])
    save_adapter(model, family, tmp_path / "adapter", settings, bases["text"])
    moved = shutil.copytree(bases["text"], tmp_path / "models--org--name")
    for folder, said in ((bases["text"], False), (moved, True)):
        load_adapter(*load_model(folder, dtype="float32"), tmp_path / "adapter")
        assert ("the same shapes" in capsys.readouterr().err) == said
    save_adapter(model, family, tmp_path / "adapter", settings, "org/name")
    load_adapter(*load_model(moved, dtype="float32"), tmp_path / "adapter")
    assert "note" not in capsys.readouterr().err


def test_an_adapter_of_another_base_is_refused(bases, tmp_path):
    model, family, settings = make(bases["text"])
    save_adapter(model, family, tmp_path / "adapter", settings, bases["text"])
    wider = tiny_base(tmp_path / "wider", "text", intermediate_size=112)
    shorter = tiny_base(tmp_path / "shorter", "text", num_hidden_layers=1)
    for folder, words in ((wider, r"is \(96, 4\), this model's is \(112, 4\)"), (shorter, "no such layer")):
        for attached in (False, True):  # as evaluation opens it, and as a run goes on from it
            other, family, _ = make(folder) if attached else (*load_model(folder, dtype="float32"), None)
            with pytest.raises(UserError, match=words):
                load_adapter(other, family, tmp_path / "adapter")


def rewrite(folder: Path, config: dict | None = None, tensors: dict | None = None, drop: str | None = None) -> None:
    """Change a saved adapter: keys of its config, tensors added, one tensor dropped."""
    path = folder / "adapter_model.safetensors"
    found = load_file(path) | (tensors or {})
    save_file({name: tensor for name, tensor in found.items() if name != drop}, path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(tensors={"base_model.model.lm_head.saved.weight": torch.zeros(2)}), "not a tensor of LoRA layers"),
        (dict(tensors={FIRST.replace("0", "9") + ".lora_A.weight": torch.zeros(4, 64)}), "layers.9.* has"),
        (dict(drop=f"{FIRST}.lora_B.weight"), "asks for"),
        (dict(tensors={f"{FIRST}.lora_A.weight": torch.zeros(3, 64)}), "says r 4"),
        (dict(config={"peft_type": "LOHA"}), "peft_type 'LOHA'"),
        (dict(config={"modules_to_save": ["lm_head"]}), "modules_to_save"),
        (dict(config={"rank_pattern": {"q_proj": 2}}), "rank_pattern"),
        (dict(config={"init_lora_weights": "pissa"}), "init_lora_weights"),
        (dict(config={"r": "four"}), "positive number"),
        (dict(config={"use_dora": True}), "lora_magnitude_vector"),
    ],
)
def test_damaged_adapters_are_refused(bases, tmp_path, change, words):
    model, family, settings = make(bases["text"])
    save_adapter(model, family, tmp_path, settings, bases["text"])
    rewrite(tmp_path, **change)
    again, family = load_model(bases["text"])
    with pytest.raises(UserError, match=words):
        load_adapter(again, family, tmp_path)


def test_a_folder_without_an_adapter_is_refused(bases, tmp_path):
    model, family = load_model(bases["text"])
    with pytest.raises(UserError, match="adapter_config.json"):
        load_adapter(model, family, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    with pytest.raises(UserError, match="adapter_model.safetensors: not found"):
        load_adapter(model, family, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_adapter(model, family, tmp_path)
