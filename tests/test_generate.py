"""generate() against transformers' own generate, against the training path, and against plain probability."""

import pytest
import torch
from PIL import Image

from data.batches import pack_row
from data.labels import NO_LOSS
from eval.generate import batches_by_length, choose, draw_uniform, generate
from lora.adapter import Settings, attach
from model import load_model
from model.tiny import write_tiny

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny random model folder of each family."""
    top = tmp_path_factory.mktemp("models")
    return {name: write_tiny(name, top / name).folder for name in ("qwen2", "qwen2_5_vl")}


def load(folder, **kwargs):
    """The model with larger random weights: at the usual 0.02 it would repeat its last token."""
    model, family = load_model(folder, dtype="float32", **kwargs)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.net.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    if family.image_token_id is not None:  # an answer that spells a picture's place could not be run as a row
        model.net.get_input_embeddings().weight.data[family.image_token_id] = 0
    return model, family


def prompts_of(family):
    """Prompts of different lengths; with pictures of different sizes where the family takes them."""
    texts = ["hello", "a much longer question, to be padded against", "why?", "count to ten"]
    pictures = [[], [(70, 50)], [(60, 120), (90, 30)], []] if family.image_token_id is not None else [[]] * 4
    prompts = []
    for number, (text, sizes) in enumerate(zip(texts, pictures, strict=True)):
        images = [Image.effect_noise(size, 60 + number).convert("RGB") for size in sizes]
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
        prompts.append(family.encode_prompt([{"role": "user", "content": content if images else text}]))
    return prompts


def teacher_forced(model, family, prompt, ids):
    """(n, V) logits of the training path at the places that chose ids."""
    whole = family.example(prompt.input_ids.tolist() + ids, [NO_LOSS] * (len(prompt) + len(ids)), prompt.pixels)
    return model.logits([whole])[0][len(prompt) - 1 : -1]


both = pytest.mark.parametrize("name", ["qwen2", "qwen2_5_vl"])


@both
def test_equals_transformers_generate(folders, name):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

    model, family = load(folders[name])
    config, network = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    }[name]
    theirs = network(config(**family.config)).eval()
    theirs.load_state_dict(model.net.state_dict())
    theirs.set_attn_implementation("eager")
    prompts = prompts_of(family)
    longest = max(map(len, prompts))
    padded = torch.stack([torch.nn.functional.pad(p.input_ids, (longest - len(p), 0), value=256) for p in prompts])
    mask = torch.stack([(torch.arange(longest) >= longest - len(p)).long() for p in prompts])
    pixels = {}
    if name == "qwen2_5_vl":
        pixels = family.join_pixels([p.pixels for p in prompts if p.pixels])
        pixels["mm_token_type_ids"] = (padded == family.image_token_id).long()
    expected = theirs.generate(
        input_ids=padded, attention_mask=mask, **pixels, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None,
        pad_token_id=256,
    )[:, longest:]
    found = generate(model, prompts, NUM_TOKENS, stop_ids=[])
    assert [answer.ids for answer in found] == expected.tolist()
    assert len({tuple(answer.ids) for answer in found}) == len(prompts)  # else any row would do for any other


@both
def test_is_the_argmax_of_the_training_path(folders, name):
    model, family = load(folders[name])
    prompts = prompts_of(family)
    for prompt, answer in zip(prompts, generate(model, prompts, NUM_TOKENS, stop_ids=[]), strict=True):
        logits = teacher_forced(model, family, prompt, answer.ids)
        assert logits.argmax(-1).tolist() == answer.ids
        expected = logits.log_softmax(-1).max(-1).values
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)


@both
def test_rows_do_not_depend_on_their_batch(folders, name):
    model, family = load(folders[name])
    prompts = prompts_of(family)
    together = generate(model, prompts, NUM_TOKENS, stop_ids=[])
    alone = generate(model, prompts, NUM_TOKENS, stop_ids=[], batch_tokens=1)
    assert [a.ids for a in together] == [a.ids for a in alone]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-4, rtol=0)


def test_a_stop_id_ends_its_row_and_no_other(folders):
    model, family = load(folders["qwen2"])
    prompts = prompts_of(family)
    free = generate(model, prompts, NUM_TOKENS, stop_ids=[])
    stop = next(t for t in free[0].ids[2:] if t not in free[0].ids[:2])
    found = generate(model, prompts, NUM_TOKENS, stop_ids=[stop])
    for answer, whole in zip(found, free, strict=True):
        end = whole.ids.index(stop) + 1 if stop in whole.ids else NUM_TOKENS
        assert answer.ids == whole.ids[:end]
        assert answer.stopped == (stop in whole.ids)
        kept = answer.ids[:-1] if answer.stopped else answer.ids
        assert answer.text == family.tokenizer.decode(kept)
        assert len(answer.logprobs) == len(answer.ids)
    assert found[0].stopped and not all(answer.stopped for answer in found)


def test_the_checkpoints_generation_settings_are_not_picked_up(folders):
    model, family = load(folders["qwen2"])
    prompts = prompts_of(family)
    before = generate(model, prompts, NUM_TOKENS, stop_ids=[])
    model.net.generation_config.update(repetition_penalty=5.0, do_sample=True, top_k=1, eos_token_id=before[0].ids[:3])
    assert generate(model, prompts, NUM_TOKENS, stop_ids=[]) == before


@both
def test_samples_repeat_and_do_not_depend_on_the_cut_into_batches(folders, name):
    model, family = load(folders[name])
    prompts = prompts_of(family)
    settings = dict(stop_ids=[], temperature=1.3, top_k=50, top_p=0.95, min_p=0.01, num_samples=3)
    first = [a.ids for a in generate(model, prompts, NUM_TOKENS, seed=7, **settings)]
    assert first == [a.ids for a in generate(model, prompts, NUM_TOKENS, seed=7, batch_tokens=1, **settings)]
    assert len({tuple(ids) for ids in first}) == len(prompts) * 3
    other = [a.ids for a in generate(model, prompts, NUM_TOKENS, seed=8, **settings)]
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_sampled_log_probabilities_are_those_of_the_tempered_policy(folders):
    model, family = load(folders["qwen2"])
    prompts = prompts_of(family)[:2]
    found = generate(model, prompts, NUM_TOKENS, stop_ids=[], temperature=0.7, top_p=0.9, num_samples=2)
    for number, answer in enumerate(found):
        logits = teacher_forced(model, family, prompts[number // 2], answer.ids)
        chosen = (logits / 0.7).log_softmax(-1).gather(-1, torch.tensor(answer.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs), chosen, atol=1e-4, rtol=0)


CUTS = [
    dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
    dict(temperature=0.6, top_k=20, top_p=0.95, min_p=0.0),
    dict(temperature=1.7, top_k=5, top_p=1.0, min_p=0.0),
    dict(temperature=1.0, top_k=0, top_p=0.5, min_p=0.0),
    dict(temperature=1.0, top_k=0, top_p=0.001, min_p=0.0),
    dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.2),
    dict(temperature=2.0, top_k=30, top_p=0.8, min_p=0.1),
]


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(str(value) for value in cut.values()))
def test_draws_have_the_distribution_that_transformers_cuts_out(cut):
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3)) * 2
    expected = logits / cut["temperature"]
    if cut["top_k"]:
        expected = TopKLogitsWarper(cut["top_k"])(None, expected)
    if cut["top_p"] < 1:
        expected = TopPLogitsWarper(cut["top_p"])(None, expected)
    if cut["min_p"]:
        expected = MinPLogitsWarper(cut["min_p"])(None, expected)
    expected = expected.softmax(-1)[0]
    count = 20_000  # evenly spaced numbers instead of random ones: shares are exact to one place in `count` a token
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, logprobs = choose(logits.expand(count, -1), uniform, **cut)
    shares = torch.bincount(tokens, minlength=40) / count
    torch.testing.assert_close(shares, expected, atol=2 / count, rtol=0)
    assert set(tokens.tolist()) <= set(expected.nonzero()[:, 0].tolist())
    torch.testing.assert_close(logprobs, (logits / cut["temperature"]).log_softmax(-1)[0][tokens])


def test_every_answer_has_random_numbers_of_its_own():
    numbers = draw_uniform([0, 1, 2, 5], 1000, seed=3)
    assert torch.equal(numbers[3], draw_uniform([5], 1000, seed=3)[0])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert torch.corrcoef(numbers).fill_diagonal_(0).abs().max() < 0.15


def test_batches_keep_to_their_size_and_hold_every_prompt_once():
    lengths = [5, 900, 30, 31, 29, 5, 4, 200]
    batches = batches_by_length(lengths, num_samples=2, max_new_tokens=10, batch_tokens=300)
    assert sorted(n for batch in batches for n in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * 2 * (max(lengths[n] for n in batch) + 10) <= 300
    assert max(map(len, batches)) > 1


@both
def test_a_prefix_stands_in_front_of_every_row(folders, name):
    model, family = load(folders[name])
    prompts = prompts_of(family)
    plain = generate(model, prompts, NUM_TOKENS, stop_ids=[])
    attach(model, family, Settings(peft_type="PREFIX_TUNING", num_virtual_tokens=5))
    model.prefix.prompt_embeddings.data.normal_(generator=torch.Generator().manual_seed(5))
    found = generate(model, prompts, NUM_TOKENS, stop_ids=[])
    assert [a.ids for a in found] != [a.ids for a in plain]
    for prompt, answer in zip(prompts, found, strict=True):
        assert teacher_forced(model, family, prompt, answer.ids).argmax(-1).tolist() == answer.ids


@pytest.mark.parametrize("quant, autocast", [(None, False), (None, True), ("8bit", True), ("4bit", False)])
def test_adapters_on_any_base_with_and_without_autocast(folders, quant, autocast):
    model, family = load(folders["qwen2_5_vl"], quant=quant)
    attach(model, family, Settings(r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(2))
    prompts = prompts_of(family)[:2]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for prompt, answer in zip(prompts, generate(model, prompts, 4, stop_ids=[]), strict=True):
            logits = teacher_forced(model, family, prompt, answer.ids)
            behind = logits.max(-1).values - logits.gather(-1, torch.tensor(answer.ids)[:, None])[:, 0]
            assert behind.max() < 0.05 * logits.std()  # 8-bit rounds a row of activations together


def test_the_model_is_put_back_as_it_was(folders):
    model, family = load(folders["qwen2_5_vl"])
    model.train()
    model.net.model.visual.eval()
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    generate(model, prompts_of(family), 3, temperature=1.0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert model.net.model.language_model.config._attn_implementation == "packed"
    assert model.hidden(pack_row(prompts_of(family))).requires_grad
