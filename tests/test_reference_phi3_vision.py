"""Phi-3-vision against what the original code made on tiny random models, and what the references do not show.

Tolerances are the notes': logits, tower and projected features 5e-5, loss 1e-5, gradient norms 1e-4 relative, pictures
bit for bit. Whether a batch couples its rows is read off the golden batch and the config, never listed.
"""

import functools
import hashlib
import json
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import shared
from PIL import Image
from test_reference import FOLDERS, KINDS, check_norms, folders, golden, grad_norms, load, mean_loss

from bench.real_size import PHI3_VISION
from data.batches import pack_row
from data.errors import UserError
from data.labels import MARKS, NO_LOSS
from eval.generate import generate
from lora.adapter import Settings, attach, lora_layers
from lora.files import save_adapter
from lora.merge import merge
from model import load_model
from model.checkpointing import checkpoint_blocks
from model.family import Options, find_family
from model.load import build_on_meta, expected_tensors
from model.shards import Shards
from model.tiny import write_tiny

pytestmark = pytest.mark.slow

KIND = "phi3_v"
TOWER = "model.vision_embed_tokens.img_processor.vision_model"


class Golden:
    """A reference folder, read once: tensors, facts, pictures."""

    def __init__(self, folder):
        self.folder = folder
        self.tensors, self.facts = golden(folder)
        self.family = find_family(folder)
        self.official = find_family(folder, Options(labels="official"))

    @functools.cache  # noqa: B019 - lives as long as the tests
    def picture(self, name):
        return self.family.picture(self.folder / self.facts["image_files"][name]["file"])[0]


@functools.cache
def read(folder):
    return Golden(folder)


class Case:
    """A golden batch: its rows without padding, and whether the original's rows influence each other in it."""

    def __init__(self, gold, name):
        self.fact = gold.facts["cases"][name]
        self.get = lambda key: gold.tensors.get(f"{name}.{key}")
        ids = self.get("input_ids")
        labels = torch.full_like(ids, NO_LOSS) if self.get("labels") is None else self.get("labels")
        mask = torch.ones_like(ids) if self.get("attention_mask") is None else self.get("attention_mask")
        self.real = mask.bool()
        names = list(self.fact["images"])
        self.pictures = [gold.picture(n) for n in names]
        self.examples, self.starts, hides = [], [], False
        for row, target, seen in zip(ids, labels, self.real, strict=True):
            places = (seen | (target != NO_LOSS)).nonzero()[:, 0]
            start, end = int(places[0]), int(places[-1]) + 1
            hides |= not seen[start : int(seen.nonzero()[-1])].all()
            count = len(row[row < 0].unique())
            pixels, self.pictures[:count] = gold.family.join_pixels(self.pictures[:count]), []
            self.examples.append(gold.family.example(row[start:end], target[start:end], pixels))
            self.starts.append(start)
            assert torch.equal(self.examples[-1].input_ids, row[start:end])
        limit = gold.family.config["original_max_position_embeddings"]
        self.is_coupled = hides or len({len(e) > limit for e in self.examples}) > 1


def cases():
    return [
        pytest.param(p, name, id=f"{p.name}-{name}")
        for p in FOLDERS if KINDS[p] == KIND
        for name in json.loads((p / "golden.json").read_text())["cases"]
    ] or [pytest.param(None, None, marks=pytest.mark.skip(reason=f"no reference of {KIND}"))]


def close(ours, theirs, atol=5e-5):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


# ---- the references -------------------------------------------------------------------------------------------------


@folders(KIND)
def test_pictures_are_bit_identical(folder):
    gold = read(folder)
    for name, fact in gold.facts["images"].items():
        file = gold.facts["image_files"][name]
        pixels, count = gold.family.picture(folder / file["file"])
        assert count == fact["num_img_tokens"] == gold.family.picture_positions(*file["size_wh"])
        assert pixels["image_sizes"].tolist() == [fact["hd_size_hw"]] and gold.family.grids(pixels) == [tuple(fact["crops_hw"])]
        padded = torch.zeros(fact["pixel_values_shape"][1:])  # the original fills up with crops of zeros
        padded[: len(pixels["pixel_values"])] = pixels["pixel_values"]
        assert hashlib.sha256(padded.numpy().tobytes()).hexdigest() == fact["pixel_values_sha256"], name


@folders(KIND)
def test_sizes_without_opening(folder):
    gold = read(folder)
    for num_crops, rows in gold.facts["preproc_table"].items():
        family = find_family(folder, Options(max_pixels=int(num_crops) * gold.family.tower_settings["image_size"] ** 2))
        family.processor["num_crops"] = int(num_crops)  # also more than this folder's own
        for row in rows:
            height, width = family.grid(*row["wh"])
            assert [width * 336, height * 336] == row["hd_wh"] and family.picture_positions(*row["wh"]) == row["tokens"]


@folders(KIND)
def test_tokenizer_probes(folder):
    gold = read(folder)
    for probe in gold.facts["tokenizer_probes"]:
        assert gold.family.tokenizer(probe["text"]).input_ids == probe["ids"]
        assert gold.family.tokenizer(probe["text"], add_special_tokens=False).input_ids == probe["ids_no_special"]


def messages_of(prompt, answer, pictures, with_break):
    """A golden prompt as contract-4 messages; without the line break behind a picture it must come out the same."""
    messages = []
    for role, text in re.findall(r"<\|(system|user)\|>\n(.*?)<\|end\|>\n", prompt, re.DOTALL):
        first, *rest = re.split(r"<\|image_\d+\|>", text)
        content = [{"type": "text", "text": first}]
        for part in rest:
            part = part if with_break else part.removeprefix("\n")
            content += [{"type": "image", "image": pictures.pop(0)}, {"type": "text", "text": part}]
        messages.append({"role": role, "content": content if rest else text})
    return messages + [{"role": "assistant", "content": answer.removesuffix("<|end|>\n<|endoftext|>")}]


@pytest.mark.parametrize("with_break", [True, False], ids=["break", "no_break"])
@pytest.mark.parametrize("folder, name", cases())
def test_ids_and_labels(folder, name, with_break):
    gold = read(folder)
    case = Case(gold, name)
    pictures = [folder / gold.facts["image_files"][n]["file"] for n in case.fact["images"]]
    answers = case.fact["answers"] or [""] * len(case.fact["prompts"])
    turns = [messages_of(p, a, pictures, with_break) for p, a in zip(case.fact["prompts"], answers, strict=True)]
    rows = turns if case.fact["batch"] > 1 else [sum(turns, [])]
    for messages, expected in zip(rows, case.examples, strict=True):
        official, ours = gold.official.encode(messages), gold.family.encode(messages)
        if case.fact["answers"]:
            assert torch.equal(official.input_ids, expected.input_ids) and torch.equal(official.labels, expected.labels)
        end = gold.family.stop_ids[0]
        wanted = [m["content"] for m in messages if m["role"] == "assistant"]
        assert ours.labels[ours.labels != NO_LOSS].eq(end).sum() == len(wanted)
        trained = gold.family.tokenizer.decode(ours.labels[ours.labels != NO_LOSS])
        assert [text.strip() for text in trained.split("<|end|>")] == [*wanted, ""]
        assert (ours.labels[ours.input_ids < 0] == NO_LOSS).all() and len(ours.image_spans) == len(expected.image_spans)
        prompt = gold.official.encode_prompt(messages)
        assert torch.equal(prompt.input_ids, expected.input_ids[: len(prompt)]) and prompt.num_supervised == 0
        if len(wanted) == 1:
            assert torch.equal(gold.family.encode_prompt(messages).input_ids, prompt.input_ids)
        sizes = [gold.facts["image_files"][n]["size_wh"] for n in case.fact["images"]][: len(ours.image_spans)]
        if len(rows) == 1:
            assert sum(gold.family.count(messages, None, sizes)) == len(ours)


@pytest.mark.parametrize("folder, name", cases())
def test_logits_loss_and_gradients(folder, name):
    gold = read(folder)
    case = Case(gold, name)
    model, family = load(folder)
    logits = model.logits(case.examples, as_original_batch=case.is_coupled)
    if not case.is_coupled and case.fact["attention_mask"] == "given":
        for ours, packed in zip(model.logits(case.examples, as_original_batch=True), logits, strict=True):
            close(ours, packed)
    columns = gold.tensors["logits_cols_index"]
    for (row, place), expected in zip(case.get("logits_pos").tolist(), case.get("logits_cols"), strict=True):
        close(logits[row][place - case.starts[row], columns], expected)
    if case.get("full_rows") is not None:
        for (row, place), expected in zip(case.get("full_rows_pos").tolist(), case.get("full_rows"), strict=True):
            close(logits[row][place - case.starts[row]], expected)
    for row, (ours, start, example) in enumerate(zip(logits, case.starts, case.examples, strict=True)):
        places = slice(start, start + len(example))
        seen = case.real[row, places]
        close(ours.logsumexp(-1)[seen], case.get("logits_logsumexp")[row, places][seen])
        theirs = ours.gather(-1, case.get("logits_argmax")[row, places].long()[:, None])[:, 0]
        close(theirs[seen], ours.amax(-1)[seen])
    if "loss" not in case.fact:
        return
    assert sum(e.num_supervised for e in case.examples) == case.fact["loss_tokens"]
    if case.is_coupled:
        losses = [F.cross_entropy(o[:-1], e.labels[1:], reduction="sum") for o, e in zip(logits, case.examples, strict=True)]
        assert sum(losses).item() / case.fact["loss_tokens"] == pytest.approx(case.fact["loss"], abs=1e-5)
        return
    loss = mean_loss(model, case.examples)
    assert loss.item() == pytest.approx(case.fact["loss"], abs=1e-5)
    if "grad_norms" in case.fact:
        loss.backward()
        check_gradients(model, family, case)


def check_gradients(model, family, case):
    """Norms of every parameter, no gradient where the original has none, four whole gradients, the padding row."""
    norms, expected = grad_norms(model, family), case.fact["grad_norms"]
    assert not [name for name, norm in expected.items() if norm is None and name in norms]
    zero = {name for name in norms if name.endswith("k_proj.bias")}  # a bias of the keys changes no softmax
    assert all(norms[name] < 1e-6 for name in zero)
    check_norms(norms, {name: norm for name, norm in expected.items() if name not in zero})
    assert torch.tensor(list(norms.values())).norm().item() == pytest.approx(case.fact["grad_norm_total"], rel=1e-4)
    grads = {family.tensor_name(name): p.grad for name, p in model.net.named_parameters()}
    for name, grad in grads.items():
        if (whole := case.get(f"grad.{name}")) is not None:
            close(grad, whole, atol=1e-4 * whole.norm().item())
    assert not grads["model.embed_tokens.weight"][model.net.config.pad_token_id].any()


@pytest.mark.parametrize("folder, name", cases())
def test_tower_and_projected_features(folder, name):
    gold = read(folder)
    case = Case(gold, name)
    if not case.fact["images"]:
        pytest.skip("this case has no picture, so no tower runs")
    model, family = load(folder)
    with torch.no_grad():
        packed = pack_row(case.examples)
        embeddings = family.embed(model.net, packed)[packed.input_ids < 0]
        for number, picture in enumerate(case.fact["images"]):
            features = model.net.get_submodule(TOWER)(gold.picture(picture)["pixel_values"])
            for key, ours in (("crop0_full", features[0]), ("crop0_s8", features[0, ::8]), ("all_s32", features[:, ::32])):
                if (expected := case.get(f"vision.{number}.{key}")) is not None:
                    close(ours, expected)
    assert list(embeddings.shape) == case.fact["image_embeds_shape"]
    close(embeddings[-170:], case.get("image_embeds_last170"))
    for step in (5, 23):
        if (expected := case.get(f"image_embeds_s{step}")) is not None:
            close(embeddings[::step], expected)
    assert embeddings.abs().mean().item() == pytest.approx(case.fact["image_embeds_abs_mean"], rel=1e-5)


# ---- what the references do not show: a tiny model of our own -------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model whose rotary factors change at 60 positions, and four rows: no, one, two pictures, one long text."""
    folder = tmp_path_factory.mktemp("phi3") / "model"
    write_tiny("phi3_vision", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"original_max_position_embeddings": 60}))
    return folder


def chat(*content, answer="four"):
    parts = [{"type": "image", "image": c} if isinstance(c, Image.Image) else {"type": "text", "text": c} for c in content]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def noise(width, height, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


CHATS = [
    chat("2 + 2?"), chat(noise(90, 60), "what?"), chat(noise(30, 80, 1), noise(50, 50, 2), "which?", answer="the first"),
    chat("x" * 100),
]


def test_an_example_does_not_depend_on_its_neighbours(tiny):
    model, family = load_model(tiny, dtype="float32")
    examples = [family.encode(messages) for messages in CHATS]
    assert {len(e) > 60 for e in examples} == {True, False} and [len(e.image_spans) for e in examples] == [0, 1, 2, 0]
    alone = [model.logits([e])[0] for e in examples]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [0, 0, 2, 2]):
        for ours, number in zip(model.logits([examples[i] for i in order]), order, strict=True):
            close(ours, alone[number], atol=max(1e-5, 2e-6 * alone[number].abs().max().item()))
    short, long = examples[0], examples[3]
    together = model.logits([short, long], as_original_batch=True)  # the long row's factors for both
    close(together[1], alone[3])
    assert (together[0] - alone[0]).abs().max() > 1e-3


def test_rotary_factors_change_behind_the_limit(tiny):
    model, _ = load_model(tiny, dtype="float32")
    rotary = model.net.model.rotary_emb
    for length, frequencies in ((60, rotary.inv_freq), (61, rotary.long_inv_freq)):
        cos, _ = rotary(torch.zeros(1), torch.arange(length)[None])
        assert torch.equal(cos[0, -1, : len(frequencies)], ((length - 1) * frequencies).cos() * rotary.attention_scaling)


def test_generation_is_the_teacher_forced_argmax(tiny, tmp_path):
    folder = tmp_path / "model"
    write_tiny("phi3_vision", folder, seed=1)
    model, family = load_model(folder, dtype="float32")
    prompts = [family.encode_prompt(messages) for messages in CHATS]
    batch = generate(model, prompts, 20, stop_ids=[])
    for prompt, answer in zip(prompts, batch, strict=True):
        assert generate(model, [prompt], 20, stop_ids=[])[0].ids == answer.ids
        ids = torch.cat([prompt.input_ids, torch.tensor(answer.ids)])
        whole = family.example(ids, [NO_LOSS] * len(ids), prompt.pixels)
        assert model.logits([whole])[0][len(prompt) - 1 : -1].argmax(-1).tolist() == answer.ids
    model, family = load_model(tiny, dtype="float32")  # a prompt on either side of the limit
    for messages in CHATS[:1] + CHATS[3:]:
        prompt = family.encode_prompt(messages)
        first = generate(model, [prompt, family.encode_prompt(CHATS[2])], 1, stop_ids=[])[0].ids
        assert model.logits([prompt])[0][-1].argmax() == first[0]


def test_checkpointing_changes_no_gradient(tiny):
    norms = []
    for is_checkpointed in (False, True):
        model, family = load_model(tiny, dtype="float32")
        for name in family.blocks * is_checkpointed:
            checkpoint_blocks(model.net.get_submodule(name))
        mean_loss(model.train(), [family.encode(messages) for messages in CHATS]).backward()
        norms.append(grad_norms(model, family))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and f"{TOWER}.embeddings.class_embedding" in norms[0]


@pytest.mark.parametrize("parts", [None, ["language", "projector", "vision"]], ids=["default", "all"])
def test_adapter_names_the_original_modules_and_merges(tiny, tmp_path, parts):
    model, family = load_model(tiny, dtype="float32")
    settings = Settings(r=4, alpha=8, parts=parts)
    attach(model, family, settings)
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model.net).values():
        layer.lora_B["default"].weight.data.normal_(std=0.1, generator=generator)
    tensors = Shards(tiny).headers()
    targets = {f"{name}.weight" for name in lora_layers(model.net)}
    assert targets <= set(tensors)  # the module names are the original's
    if parts is None:
        assert {name.split(".")[-2] for name in targets} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    save_adapter(model, family, tmp_path / "adapter", settings, tiny)
    merge(tiny, tmp_path / "adapter", tmp_path / "merged")
    merged, _ = load_model(tmp_path / "merged", dtype="float32")
    before, after = (dict(Shards(f).stream(only=set(tensors))) for f in (tiny, tmp_path / "merged"))
    assert {name for name in tensors if not torch.equal(before[name], after[name])} == targets
    examples = [family.encode(messages) for messages in CHATS]
    for ours, theirs in zip(model.logits(examples), merged.logits(examples), strict=True):
        close(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("quant", ["8bit", "4bit"])
def test_quantised_language_model_trains(tiny, quant):
    model, family = load_model(tiny, quant=quant, dtype="float32")
    full, _ = load_model(tiny, dtype="float32")
    examples = [family.encode(messages) for messages in CHATS]
    loss, exact = (mean_loss(m, examples).item() for m in (model, full))
    assert loss == pytest.approx(exact, rel=0.05)
    kinds = {name.split(".")[-1] for name, m in model.net.named_modules() if type(m).__name__.startswith("Linear") and
             type(m) is not torch.nn.Linear}
    assert kinds == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    attach(model, family, Settings(r=4))
    mean_loss(model.train(), examples).backward()
    assert all(layer.lora_B["default"].weight.grad.any() for layer in lora_layers(model.net).values())


def test_real_size(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PHI3_VISION))
    family = find_family(tmp_path)
    net = build_on_meta(family)
    shapes = expected_tensors(family, net)
    assert len(shapes) == 592 and sum(shape.numel() for shape in shapes.values()) == 4_146_621_440
    for name in dict(net.named_parameters()):
        assert family.module_name(family.tensor_name(name)) == name
    wanted = {
        "model.layers.31.self_attn.qkv_proj.weight": (9216, 3072), "model.layers.0.mlp.gate_up_proj.weight": (16384, 3072),
        f"{TOWER}.embeddings.position_embedding.weight": (577, 1024), f"{TOWER}.pre_layrnorm.bias": (1024,),
        f"{TOWER}.encoder.layers.23.mlp.fc1.weight": (4096, 1024), f"{TOWER}.post_layernorm.weight": (1024,),
        "model.vision_embed_tokens.glb_GN": (1, 1, 4096), "model.vision_embed_tokens.sub_GN": (1, 1, 1, 4096),
        "model.vision_embed_tokens.img_projection.0.weight": (3072, 4096), "lm_head.weight": (32064, 3072),
    }
    assert {name: tuple(shapes[name]) for name in wanted} == wanted
    assert net.config.sliding_window is None  # one over everything would keep the fast kernels away
    assert net.model.rotary_emb.attention_scaling == pytest.approx(1.1902380714, abs=1e-9)
    parts = {name: family.part_of(name) for name in shapes}
    assert sum(shapes[n].numel() for n, part in parts.items() if part == "vision") == 303_507_456
    assert sum(shapes[n].numel() for n, part in parts.items() if part == "projector") == 22_026_240 + 8_192
    assert [family.grid_positions(*g) for g in ((3, 5), (4, 4), (16, 1))] == [2353, 2509, 2653]


# ---- hostile rows and pictures --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    write_tiny("phi3_vision", folder, tokenizer=shared("tokenizers/phi3-vision"))
    return find_family(folder)


@pytest.mark.parametrize(
    "word", ["<|end|>", "<|assistant|>\n", "</s>", "<s>", "<|endoftext|>\n", "<|image_1|>", "<|image|>", MARKS[0] * 2, "<unk>"]
)
def test_text_that_spells_special_tokens_stays_text(real_tokenizer, word):
    family = real_tokenizer
    plain = family.encode(chat(noise(40, 40), "say   please", answer="please"))
    spelled = family.encode(chat(noise(40, 40), f"say {word} please", answer=f"a {word}"))
    special = set(family.tokenizer.added_tokens_decoder)
    count = lambda example: [i for i in example.input_ids.tolist() if i in special or i < 0]  # noqa: E731
    assert count(spelled) == count(plain) and len(spelled.image_spans) == 1
    answer = family.tokenizer.decode(spelled.labels[spelled.labels != NO_LOSS], skip_special_tokens=False)
    assert answer.strip() == f"a {word}<|end|>"


def test_turns_without_loss(real_tokenizer):
    both = [*chat("a", answer="one"), *chat("b", answer="two")]
    both[1] = both[1] | {"train": False}
    for labels, wanted in (("ours", "two<|end|>"), ("official", "two<|end|> \n<|endoftext|>")):
        example = find_family(real_tokenizer.folder, Options(labels=labels)).encode(both)
        assert real_tokenizer.tokenizer.decode(example.labels[example.labels != NO_LOSS]) == wanted


def test_rows_that_have_no_form(real_tokenizer):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    for messages, tools, said in (
        ([{"role": "user", "content": "a"}, call], None, "no form for tools"),
        (chat("a"), [{"type": "function"}], "no form for tools"),
        ([{"role": "critic", "content": "a"}, *chat("b")], None, "role 'critic'"),
    ):
        with pytest.raises(UserError, match=said):
            real_tokenizer.encode(messages, tools)


def test_pictures_of_every_mode_are_converted_as_the_original_does(real_tokenizer, tmp_path):
    clear = noise(70, 40).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    palette = noise(70, 40).convert("P")
    palette.info["transparency"] = 3
    for number, picture in enumerate((clear, palette, clear.convert("LA"), noise(70, 40).convert("1"))):
        picture.save(tmp_path / f"{number}.png")
        expected, _ = real_tokenizer.picture(picture.convert("RGB"))
        found, _ = real_tokenizer.picture(tmp_path / f"{number}.png")
        assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_long_thin_pictures(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PHI3_VISION))
    rule = {"num_crops": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(rule))
    family = find_family(tmp_path)
    pixels, count = family.picture(Image.new("RGB", (1, 5000)))
    assert count == family.picture_positions(1, 5000) == 2653
    assert pixels["pixel_values"][1, 0, 0, 166:169].tolist() == [1, -1, 1]  # 167 columns of white, one black, 168 white
    for size in ((1, 6000), (6000, 1)):
        with pytest.raises(UserError, match="nothing is left"):
            family.picture(Image.new("RGB", size))
    with pytest.raises(UserError, match="112896 pixels at least"):
        find_family(tmp_path, Options(max_pixels=100_000)).picture_positions(10, 10)
    fewer = find_family(tmp_path, Options(max_pixels=4 * 336 * 336))
    assert fewer.picture_positions(900, 900) == 757
    for room in (313, 700, 1500, 2700):  # what an error proposes as --max_pixels must fit
        limited = find_family(tmp_path, Options(max_pixels=room * family.pixels_per_position))
        if room * family.pixels_per_position >= 336 * 336:
            assert max(limited.picture_positions(w, h) for w in (1, 30, 99) for h in (1, 30, 99)) <= room
