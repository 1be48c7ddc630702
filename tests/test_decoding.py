"""The decoding step on fixed buffers: against a cache that grows, and replayed from a trace as a card replays a graph."""

import gc
import weakref

import pytest
import torch
from test_generate import load, prompts_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import DynamicCache

from data.batches import pack_row
from eval import decoding
from eval.generate import choose, draw_uniform, generate, ready_to_generate
from lora.adapter import Settings, attach
from model.family import families
from model.tiny import write_tiny

NUM_TOKENS, NUM_SAMPLES = 14, 3
SAMPLED = dict(temperature=1.2, top_k=50, top_p=0.97, min_p=0.01)
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}  # for the card, to know a value or a shape
every = pytest.mark.parametrize("name", sorted(c.name for c in families()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("models")
    return lambda name: top / name if (top / name).exists() else write_tiny(name, top / name).folder


@pytest.fixture(autouse=True)
def small_blocks_of_rubbish(monkeypatch):
    """Memory that nobody has written is not a number."""
    monkeypatch.setitem(decoding.BLOCK, "cpu", 4)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Trace(TorchDispatchMode):
    """What a CUDA graph is, on the CPU: the operations of one call on the tensors that they met, with the numbers that they
    were given. Replayed, they read what is in those same tensors by then."""

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.outside = [], {}, {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name().partition(".")[0]
        if name in WAITS:
            raise RuntimeError(f"{name} waits for the card")
        marked = tree_map(self.mark, (args, kwargs or {}))
        out = operation(*args, **(kwargs or {}))
        self.calls.append((operation, marked, out))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and id(tensor) not in self.outside:
                self.made.setdefault(id(tensor), (len(self.made), tensor))
        return out

    def mark(self, x):
        """A tensor as ("made", its number) or as itself, if it was there before; the rest as it is."""
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in self.made:
            return Made(self.made[id(x)][0])
        self.outside[id(x)] = x
        return x

    @torch.autocast("cpu", enabled=False)  # its casts are among the operations
    def replay(self):
        found = {}
        for operation, marked, first in self.calls:
            args, kwargs = tree_map(lambda x: found[x.number] if isinstance(x, Made) else x, marked)
            out = operation(*args, **kwargs)
            pairs = zip(first, out, strict=True) if isinstance(out, (tuple, list)) else [(first, out)]
            for before, now in pairs:
                if id(before) in self.made:
                    found[self.made[id(before)][0]] = now


class Made:
    def __init__(self, number):
        self.number = number


class Traces(decoding.Graphs):
    """Graphs whose recordings are traces."""

    def __init__(self, device):
        self.traces, self.tried, self.replays = [], 0, 0
        Traces.last = self

    def try_out(self, function):
        self.tried += 1
        with Trace():
            function()

    def record(self, function):
        with Trace() as trace:
            function()
        self.traces.append(trace)

        def replay():
            self.replays += 1
            trace.replay()

        return replay


def growing(model, prompt, uniform, stops, settings):
    """An answer alone on a DynamicCache, without padding: ids and log-probabilities."""
    packed = pack_row([prompt])
    net, decoder = model.net, model.family.decoder(model.net)
    embeddings, positions = model.family.embed(net, packed)[None], model.family.decoder_positions(packed.positions)
    cache, ids, logprobs = DynamicCache(), [], []
    for number in uniform:
        seen = torch.ones(1, cache.get_seq_length() + embeddings.shape[1], dtype=torch.long)
        out = decoder(inputs_embeds=embeddings, position_ids=positions, attention_mask=seen, past_key_values=cache,
                      use_cache=True)  # fmt: skip
        logits = torch.nn.functional.linear(out.last_hidden_state[:, -1], model.head_weight).float()
        token, value = choose(logits, number[None], **settings)
        ids.append(token.item())
        logprobs.append(value.item())
        if ids[-1] in stops:
            break
        embeddings = net.get_input_embeddings()(token)[None]
        positions = (positions.amax() + 1).expand(*positions.shape[:-1], 1)
    return ids, logprobs


def stop_ids_of(model, prompts):
    """Ids that end some answers early and some late."""
    answers = generate(model, prompts, NUM_TOKENS, [], num_samples=NUM_SAMPLES, seed=4, **SAMPLED)
    return [answers[0].ids[1], answers[4].ids[3], answers[5].ids[6], answers[7].ids[6], answers[8].ids[9]]


@every
def test_equals_a_cache_that_grows(folders, name):
    """All families, ragged prompts, samples side by side, rows that end one by one, blocks of 4 columns."""
    model, family = load(folders(name))
    prompts = prompts_of(family)
    stops = stop_ids_of(model, prompts)
    found = generate(model, prompts, NUM_TOKENS, stops, num_samples=NUM_SAMPLES, seed=4, **SAMPLED)
    with ready_to_generate(model):
        for number, answer in enumerate(found):
            [uniform] = draw_uniform([number], NUM_TOKENS, 4)
            ids, logprobs = growing(model, prompts[number // NUM_SAMPLES], uniform, stops, SAMPLED)
            assert answer.ids == ids
            torch.testing.assert_close(answer.logprobs, logprobs, atol=1e-4, rtol=0)
    assert len({len(answer.ids) for answer in found}) > 2 and any(len(answer.ids) == NUM_TOKENS for answer in found)


@every
def test_a_replayed_step_is_the_step(folders, name, monkeypatch):
    """What is recorded once goes on with the values of every later step, and reads nothing but weights and buffers."""
    model, family = load(folders(name))
    prompts = prompts_of(family)
    stops = stop_ids_of(model, prompts)
    settings = dict(num_samples=NUM_SAMPLES, seed=4, **SAMPLED)
    plain = generate(model, prompts, NUM_TOKENS, stops, **settings)
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    monkeypatch.setattr(decoding, "graphs_of", Traces)
    replayed = []
    finish = decoding.decode

    def watched(batch, stops):
        before = buffers_of(batch)
        replayed.append(finish(batch, stops))
        assert buffers_of(batch) == before
        for trace in Traces.last.traces:
            assert {t.untyped_storage().data_ptr() for t in trace.outside.values()} <= known | set(before)
        return replayed[-1]

    monkeypatch.setattr("eval.generate.decode", watched)
    found = generate(model, prompts, NUM_TOKENS, stops, **settings)
    assert [a.ids for a in found] == [a.ids for a in plain]
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-5, rtol=0)
    graphs = Traces.last
    assert graphs.replays > len(graphs.traces) > 1 and graphs.tried + graphs.replays == max(len(a.ids) for a in found) - 1


@pytest.mark.parametrize("kind", ["8bit", "4bit", "prefix", "lora", "autocast"])
def test_replayed_with_quantised_layers_adapters_and_autocast(folders, kind, monkeypatch):
    model, family = load(folders("qwen2_5_vl"), quant=kind if kind.endswith("bit") else None)
    if kind == "prefix":
        attach(model, family, Settings(peft_type="PREFIX_TUNING", num_virtual_tokens=5))
        model.prefix.prompt_embeddings.data.normal_(generator=torch.Generator().manual_seed(5))
    elif kind != "autocast":
        attach(model, family, Settings(r=4))
    prompts = prompts_of(family)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        plain = generate(model, prompts, NUM_TOKENS, [], num_samples=2, seed=4, **SAMPLED)
        monkeypatch.setattr(decoding, "graphs_of", Traces)
        found = generate(model, prompts, NUM_TOKENS, [], num_samples=2, seed=4, **SAMPLED)
    assert found == plain and Traces.last.replays > 1  # no row leaves, so it is the same arithmetic


def test_a_step_that_waits_for_the_card_is_not_recorded(folders, monkeypatch, capsys):
    """It runs as it is, with the same answers, and the next batch does not try again."""
    model, family = load(folders("qwen2"))
    prompts = prompts_of(family)
    stops = stop_ids_of(model, prompts)
    plain = generate(model, prompts, NUM_TOKENS, stops, seed=4, **SAMPLED)
    model.net.model.norm.register_forward_pre_hook(lambda module, args: args[0].sum().item() and None)
    monkeypatch.setattr(decoding.Graphs, "usable", True)
    monkeypatch.setattr(decoding, "graphs_of", lambda device: Traces(device) if decoding.Graphs.usable else None)
    found = generate(model, prompts, NUM_TOKENS, stops, seed=4, batch_tokens=1, **SAMPLED)
    assert [a.ids for a in found] == [a.ids for a in plain]
    assert capsys.readouterr().out.count("cannot be recorded") == 1 and not decoding.Graphs.usable


def test_memory_that_does_not_do_is_said_as_it_is(monkeypatch):
    """Not taken for a step that cannot be recorded: who asked for the answers halves the batch."""

    def scarce():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        decoding.Replay(scarce, Traces(None))((2, 4))
    assert decoding.Graphs.usable


def test_only_the_shape_at_hand_has_a_recording():
    """It is given back before the next shape is run: its memory lies beside the cache."""
    made = []

    class Counted(decoding.Graphs):
        def __init__(self):
            pass

        def try_out(self, function):
            assert not [recording for recording in made if recording()]

        def record(self, function):
            recording = lambda: function()  # noqa: E731
            made.append(weakref.ref(recording))
            return recording

    step = decoding.Replay(lambda: None, Counted())
    for shape in [(4, 8)] * 3 + [(4, 16)] + [(2, 16)] * 2 + [(1, 24)]:
        step(shape)
    assert len(made) == 2


def test_rows_leave_one_by_one_or_by_halves():
    plain, recorded = decoding.Replay(None, None), decoding.Replay(None, Traces(None))
    assert [plain.rows_for(count, 23) for count in (23, 22, 5, 1)] == [23, 22, 5, 1]
    assert [recorded.rows_for(count, 23) for count in (23, 13, 12, 7, 6, 3, 2, 1)] == [23, 23, 12, 12, 6, 3, 2, 1]


def test_a_cache_is_given_back_before_the_next_batch(folders, monkeypatch):
    """And it holds no more than the rows times the columns that batch_tokens speaks of."""
    model, family = load(folders("qwen2"))
    alive, begin = [], decoding.KVCache.__init__

    def watched(cache, num_rows, num_columns, embeddings):
        assert not [x for x in alive if x() is not None] and num_rows * num_columns <= 160
        alive.append(weakref.ref(cache))
        begin(cache, num_rows, num_columns, embeddings)

    monkeypatch.setattr(decoding.KVCache, "__init__", watched)
    gc.disable()
    try:
        generate(model, prompts_of(family), NUM_TOKENS, [], num_samples=2, batch_tokens=160)
    finally:
        gc.enable()
    assert len(alive) > 1


def buffers_of(batch):
    """Addresses of all that lasts from step to step."""
    own = [x for x in vars(batch).values() if isinstance(x, torch.Tensor)]
    cache = [x for layer in batch.cache.buffers for x in layer]
    return [x.untyped_storage().data_ptr() for x in [*own, batch.cache.places, *cache]]

