"""Packed rows: attention against a dense mask, examples that do not see their neighbours, checkpointed blocks."""

import random
from dataclasses import replace

import pytest
import torch
from PIL import Image

from data.batches import pack_row
from model import attention, load_model
from model.attention import segment_attention
from model.checkpointing import checkpoint, checkpoint_blocks
from model.head import negative_log_likelihood, per_token
from model.tiny import write_tiny

# ---- against a dense mask -------------------------------------------------------------------------------------------


def dense_attention(query, key, value, lengths, causal, scale, window, prefix):
    """The same by one (T, P + T) mask over the whole row. query (H, T, K), key and value (Hkv, T, K) -> (T, H, K)."""
    num_prefix = 0 if prefix is None else prefix[0].shape[1]
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    place = torch.cat([torch.arange(n) for n in lengths]) + num_prefix  # in what a query of this segment may see
    seen = segment[:, None] == segment[None]  # (T, T)
    if prefix is not None:
        key, value = torch.cat([prefix[0], key], 1), torch.cat([prefix[1], value], 1)
        seen = torch.cat([torch.ones(len(segment), num_prefix, dtype=torch.bool), seen], 1)
    if causal:
        places = torch.cat([torch.arange(num_prefix), place])
        seen = seen & (places[None] <= place[:, None])
        if window is not None:
            seen = seen & (places[None] > place[:, None] - window)
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = (query @ key.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1)


@pytest.mark.parametrize("num_prefix", [0, 3])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_segments_equal_a_dense_mask(causal, window, num_prefix, heads):
    generator = torch.Generator().manual_seed(0)
    for lengths in ([9], [1], [5, 5, 5], [3, 7, 7, 1, 1, 2, 9, 3]):

        def draw(num_heads, length):
            return torch.randn(num_heads, length, 8, generator=generator, dtype=torch.float64).requires_grad_()

        q, k, v = draw(heads[0], sum(lengths)), draw(heads[1], sum(lengths)), draw(heads[1], sum(lengths))
        prefix = (draw(heads[1], num_prefix), draw(heads[1], num_prefix)) if num_prefix else None
        inputs = [q, k, v, *(prefix or ())]
        ours = segment_attention(q, k, v, lengths, causal=causal, scale=0.3, window=window, prefix=prefix)
        theirs = dense_attention(q, k, v, lengths, causal, 0.3, window, prefix)
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        upstream = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
        found, expected = (torch.autograd.grad((out * upstream).sum(), inputs) for out in (ours, theirs))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no card with a varlen kernel")
@pytest.mark.parametrize("causal", [True, False])
def test_varlen_kernel_equals_segments(causal):
    q, k, v = (torch.randn(h, 40, 64, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))
    lengths = [9, 30, 1]
    ours = segment_attention(q, k, v, lengths, causal=causal, scale=0.125)
    theirs = dense_attention(*(x.double().cpu() for x in (q, k, v)), lengths, causal, 0.125, None, None)
    torch.testing.assert_close(ours.double().cpu(), theirs, atol=2e-2, rtol=0)


@pytest.mark.parametrize("release", ["2.11", "2.13"])
def test_the_kernel_is_called_as_each_release_of_torch_wants(monkeypatch, release):
    """On a card the row's segments go to torch's varlen_attn; its arguments are those of the release's own signature."""

    def attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size):
        assert cu_seq_q.tolist() == cu_seq_k.tolist() == [0, 9, 39, 40] and cu_seq_q.dtype == torch.int32
        assert (max_q, max_k) == (30, 30)
        q, k, v = (x.transpose(0, 1).float() for x in (query, key, value))
        return dense_attention(q, k, v, [9, 30, 1], window_size == (-1, 0), scale, None, None).to(query.dtype)

    def varlen_2_11(q, k, v, sq, sk, mq, mk, *, return_aux=None, scale=None, window_size=(-1, -1)):
        return attend(q, k, v, sq, sk, mq, mk, scale, window_size)

    def varlen_2_13(q, k, v, sq, sk, mq, mk, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa or q.shape[1] == k.shape[1]
        return attend(q, k, v, sq, sk, mq, mk, scale, window_size)

    kernel = {"2.11": varlen_2_11, "2.13": varlen_2_13}[release]
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    attention.varlen_kernel.cache_clear()
    monkeypatch.setattr(attention, "has_flash_attention", lambda device: True)
    try:
        for key_heads, size, causal in ((2, 64, True), (8, 64, False), (2, 20, True)):  # 20 channels fit no flash kernel
            q, k, v = (torch.randn(h, 40, size).bfloat16() for h in (8, key_heads, key_heads))
            ours = segment_attention(q, k, v, [9, 30, 1], causal=causal, scale=0.125)
            theirs = dense_attention(q.double(), k.double(), v.double(), [9, 30, 1], causal, 0.125, None, None)
            torch.testing.assert_close(ours.double(), theirs, atol=2e-2, rtol=0)
    finally:
        attention.varlen_kernel.cache_clear()


# ---- neighbours -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny checkpoint of each family."""
    found = {name: tmp_path_factory.mktemp("models") / name for name in ("qwen2", "qwen2_5_vl")}
    for name, folder in found.items():
        write_tiny(name, folder)
    return found


def load(folder, std=0.2):
    """The model with matrices large enough that attention and pictures matter to the logits."""
    model, family = load_model(folder, dtype="float32")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.net.parameters():
            low, high = (-std, std) if parameter.ndim > 1 else (0.5, 1)
            parameter.uniform_(low, high, generator=generator)
    return model, family


def make_examples(family, count, seed=0):
    """Chats of uneven length; for a vision model with 0, 1 or 2 pictures of uneven size each."""
    draw = random.Random(seed)
    examples = []
    for number in range(count):
        content = [{"type": "text", "text": "word " * draw.randint(0, 12)}]
        for _ in range(number % 3 if family.image_token_id is not None else 0):
            pixels = draw.randbytes(8 * 8 * 3)
            picture = Image.frombytes("RGB", (8, 8), pixels).resize((draw.randint(40, 260), draw.randint(40, 200)))
            content.insert(draw.randint(0, len(content)), {"type": "image", "image": picture})
        answer = "".join(draw.choice("abcdefgh ") for _ in range(draw.randint(1, 20)))
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        examples.append(family.encode(messages, id=str(number)))
    return examples


@pytest.mark.parametrize("name", ["qwen2", "qwen2_5_vl"])
def test_logits_do_not_depend_on_neighbours(folders, name):
    model, family = load(folders[name])
    examples = make_examples(family, 7)
    alone = [model.logits([example])[0] for example in examples]
    draw = random.Random(5)
    worst = 0.0
    for _ in range(6):
        order = draw.sample(range(7), draw.randint(2, 7))
        for place, logits in zip(order, model.logits([examples[i] for i in order]), strict=True):
            allowed = max(1e-5, 2e-6 * alone[place].abs().max().item())
            worst = max(worst, (logits - alone[place]).abs().max().item() / allowed)
    assert worst <= 1
    changed = examples[0]
    changed.input_ids = changed.input_ids.clone()
    changed.input_ids[1] += 1  # what the example itself says does matter, to its last position
    assert (model.logits([changed])[0][-1] - alone[0][-1]).abs().max() > 1e-2


def test_the_picture_matters(folders):
    model, family = load(folders["qwen2_5_vl"])
    one, two = make_examples(family, 6)[1::3]  # one picture each
    other = family.example(one.input_ids, one.labels, {k: v.clone() for k, v in one.pixels.items()})
    other.pixels["pixel_values"] = other.pixels["pixel_values"].flip(0)
    assert (model.logits([other])[0][-1] - model.logits([one])[0][-1]).abs().max() > 1e-2
    swapped = model.logits([two, one])
    torch.testing.assert_close(swapped[1], model.logits([one])[0], atol=1e-5, rtol=2e-6)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "minicpm_v", "cogagent", "phi3_vision"])
def test_a_picture_that_examples_share_is_looked_at_once(tmp_path, name):
    """A pair's answers and a prompt's samples hold one picture: as if each had its own, in values and in gradients."""
    write_tiny(name, tmp_path / name)
    model, family = load(tmp_path / name)
    draw = random.Random(0)
    picture, other = (Image.frombytes("RGB", (w, h), draw.randbytes(w * h * 3)) for w, h in ((120, 80), (60, 90)))

    def encode(image, answer):
        content = [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}] if image else "what is it?"
        return family.encode([{"role": "user", "content": content}, {"role": "assistant", "content": answer}])

    apart = [encode(picture, "yes"), encode(None, "or"), encode(other, "no"), encode(picture, "never")]
    shared = [replace(example, pixels=apart[0].pixels if place == 3 else example.pixels) for place, example in enumerate(apart)]
    looked_at, features, found = [], family.features, []
    family.features = lambda net, pictures: looked_at.append(len(pictures)) or features(net, pictures)
    for examples in (apart, shared):
        embeddings = family.embed(model.net, pack_row(examples).to("cpu"))
        (embeddings * torch.linspace(-1, 1, len(embeddings))[:, None]).sum().backward()
        found.append((embeddings.detach(), {n: p.grad for n, p in model.net.named_parameters() if p.grad is not None}))
        model.net.zero_grad(set_to_none=True)
    assert looked_at == [3, 2]
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert found[0][1].keys() == found[1][1].keys() and any("vis" in n or "vpm" in n for n in found[0][1])
    allowed = 1e-5 * max(gradient.abs().max().item() for gradient in found[0][1].values())  # a key's bias has none but rounding
    for parameter, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][parameter], gradient, atol=allowed, rtol=1e-3)


def test_the_packed_row_equals_transformers(folders):
    """Each example alone through the network of transformers, eager attention and its own windows."""
    from transformers import AutoModelForImageTextToText

    model, family = load_model(folders["qwen2_5_vl"], dtype="float32")
    theirs = AutoModelForImageTextToText.from_pretrained(
        folders["qwen2_5_vl"], dtype=torch.float32, attn_implementation="eager"
    ).eval()
    examples = make_examples(family, 6)
    for example, ours in zip(examples, model.logits(examples), strict=True):
        pixels = {name: tensor for name, tensor in example.pixels.items()}
        with torch.no_grad():
            out = theirs(input_ids=example.input_ids[None], position_ids=example.positions[:, None], **pixels)
        torch.testing.assert_close(ours, out.logits[0], atol=1e-5, rtol=0)


# ---- checkpointed blocks --------------------------------------------------------------------------------------------


def gradients(model, examples):
    """Loss and gradients of one packed row, from a fixed random state."""
    model.zero_grad()
    torch.manual_seed(3)
    packed = pack_row(examples)
    where, target = packed.supervised()
    loss = per_token(model.hidden(packed), model.head_weight, negative_log_likelihood, where, target).mean()
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def checkpointed(model, family, offload=False):
    for name in family.blocks:
        checkpoint_blocks(model.net.get_submodule(name), offload=offload)
    return model


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "qwen2_5_vl"])
def test_checkpointing_changes_no_bit(folders, name, offload):
    """With attention dropout on: the second pass draws the same masks, and leaves the random state alone."""
    model, family = load(folders[name])
    for module in model.net.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    examples = make_examples(family, 4)
    loss, plain = gradients(model.train(), examples)
    after = torch.get_rng_state()
    loss_again, again = gradients(checkpointed(model, family, offload), examples)
    assert loss == loss_again and torch.equal(after, torch.get_rng_state())
    assert plain.keys() == again.keys() and len(plain) == len(list(model.parameters()))
    for key, gradient in plain.items():
        assert torch.equal(gradient, again[key]), key
    assert gradients(model.eval(), examples)[0] != loss  # dropout was on


def test_checkpointing_under_autocast_and_in_a_frozen_tower(folders):
    model, family = load(folders["qwen2_5_vl"], std=0.05)
    model.requires_grad_(False)
    model.net.model.language_model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    examples = make_examples(family, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, plain = gradients(model.train(), examples)
        _, again = gradients(checkpointed(model, family), examples)
    assert list(plain) == list(again) == ["net.model.language_model.layers.1.mlp.up_proj.weight"]
    (a,), (b,) = plain.values(), again.values()
    assert a.abs().max() > 0 and torch.equal(a, b)


def test_checkpointing_keeps_the_input_alone():
    kept = []
    weight = torch.randn(8, 8, requires_grad=True)

    def block(x):
        for _ in range(10):
            x = torch.tanh(x @ weight)
        return x

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        checkpoint(block, torch.randn(4, 8, requires_grad=True))
        num_checkpointed = len(kept)
        block(torch.randn(4, 8, requires_grad=True))
    assert num_checkpointed == 1 and len(kept) - num_checkpointed >= 20
    with torch.no_grad():
        assert not checkpoint(block, torch.randn(4, 8)).requires_grad
