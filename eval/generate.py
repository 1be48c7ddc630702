"""Answers from a model: prompts of any length in batches, a KV cache, and only the stop ids that are asked for.

Training runs packed rows; here a row must grow, so prompts are padded on the left into a batch whose rows all grow at
the right end, and the decoder is switched to transformers' SDPA path with an explicit mask while generate() runs. Rows
that are finished leave the batch. The settings of generation_config.json (Qwen's ask for a repetition penalty) are NOT
picked up: what is sampled is the policy itself. The cache takes 2 x layers x Hkv x K numbers a token in the computing
dtype, 36 KiB for Qwen2.5-VL-3B; the head runs on one position a row.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from data.batches import hash_seed, pack_row
from data.labels import Example
from model.family import Family, Model
from model.head import CHUNK_BYTES


@dataclass
class Answer:
    """One answer: ids as they were chosen, the stop id included; text without it.

    logprobs are log softmax(logits / temperature) of each id (temperature 0: of the logits), before top-k, top-p and
    min-p: what a policy gradient needs. stopped is False where max_new_tokens ended the answer.
    """

    ids: list[int]
    text: str
    stopped: bool
    logprobs: list[float]


def generate(
    model: Model,
    prompts: list[Example],
    max_new_tokens: int,
    stop_ids: list[int] | None = None,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    num_samples: int = 1,
    seed: int = 0,
    batch_tokens: int = 16384,
) -> list[Answer]:
    """num_samples answers to each prompt: answer j of prompt i is number i * num_samples + j of the list.

    stop_ids None means the family's. Temperature 0 takes the likeliest token; above it, tokens are drawn from
    softmax(logits / temperature) cut by top_k (0 = off), top_p and min_p in this order, as transformers cuts. Each
    answer draws from a random generator of its own, made from seed and its number: the same answers for any cut into
    batches, up to rounding. batch_tokens bounds rows x (longest prompt + max_new_tokens) of one batch; a prompt that is
    longer runs alone. Runs in eval mode and without gradients, in the caller's autocast; the model is put back after.
    """
    stops = model.family.stop_ids if stop_ids is None else stop_ids
    pick = partial(choose, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    answers: list[Answer] = [None] * (len(prompts) * num_samples)
    with ready_to_generate(model):
        for numbers in batches_by_length([len(p) for p in prompts], num_samples, max_new_tokens, batch_tokens):
            rows = [i * num_samples + j for i in numbers for j in range(num_samples)]
            uniform = draw_uniform(rows, max_new_tokens, seed)
            decoding = Decoding(model, [prompts[i] for i in numbers])
            decoding.repeat(num_samples)
            ids, logprobs = decode(decoding, max_new_tokens, stops, uniform.to(model.device), pick)
            for row, chosen, values in zip(rows, ids, logprobs, strict=True):
                answers[row] = make_answer(model.family, chosen, values, stops)
    return answers


def make_answer(family: Family, ids: list[int], logprobs: list[float], stops: list[int]) -> Answer:
    """The Answer of what was chosen until a stop id, or until there was no more room."""
    stopped = ids[-1] in stops
    text = family.tokenizer.decode(
        ids[:-1] if stopped else ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return Answer(ids, family.answer_text(text), stopped, logprobs)


@contextmanager
def inference(model: Model) -> Iterator[None]:
    """Eval mode (no dropout) and no gradients; every module's mode is put back after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def ready_to_generate(model: Model) -> Iterator[None]:
    """inference() with SDPA in the decoder; the attention is put back after."""
    decoder = model.family.decoder(model.net)
    attention = decoder.config._attn_implementation
    decoder.set_attn_implementation("sdpa")
    try:
        with inference(model):
            yield
    finally:
        decoder.set_attn_implementation(attention)


def batches_by_length(lengths: list[int], num_samples: int, max_new_tokens: int, batch_tokens: int) -> list[list[int]]:
    """Numbers of the prompts in batches, longest prompts first, so that neighbours waste little padding."""
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and (len(batches[-1]) + 1) * num_samples * (longest + max_new_tokens) <= batch_tokens:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def draw_uniform(rows: list[int], count: int, seed: int) -> torch.Tensor:
    """(rows, count) numbers in [0, 1): those of a row depend on the seed and the row's number alone."""
    generators = (torch.Generator().manual_seed(hash_seed(seed, row)) for row in rows)
    return torch.stack([torch.rand(count, generator=g, dtype=torch.float64) for g in generators])


# ---- the batch in flight --------------------------------------------------------------------------------------------


class ComputeCache(DynamicCache):
    """A KV cache in the computing dtype: under autocast rotary tables would leave fp32 keys beside bf16 values."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.compute_dtype = dtype

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        dtype = self.compute_dtype
        return super().update(key_states.to(dtype), value_states.to(dtype), layer_idx, *args, **kwargs)


class Decoding:
    """B rows in flight: their KV cache, the mask of what they may see, next positions, and last hidden states."""

    def __init__(self, model: Model, prompts: list[Example]):
        """Run the prompts: pictures are embedded on one packed row, which is then spread over a left-padded batch."""
        self.model = model
        self.decoder = model.family.decoder(model.net)
        packed = pack_row(prompts).to(model.device)
        embeddings = model.family.embed(model.net, packed)  # (T, D)
        lengths = torch.tensor(packed.lengths, device=model.device)
        longest = max(packed.lengths)
        real = torch.arange(longest, device=model.device) >= longest - lengths[:, None]  # (B, L)
        batch = embeddings.new_zeros(*real.shape, embeddings.shape[-1])
        batch[real] = embeddings  # (B, L, D)
        positions = packed.positions.new_zeros(*packed.positions.shape[:-1], *real.shape)
        positions[..., real] = packed.positions  # (B, L) or (3, B, L)
        autocast = torch.is_autocast_enabled(model.device.type)
        self.cache = ComputeCache(torch.get_autocast_dtype(model.device.type) if autocast else embeddings.dtype)
        self.mask = real.long()
        if model.prefix is not None:
            self._start_with_prefix(len(prompts))
            positions = positions + model.prefix.num_virtual_tokens
        self._feed(batch, positions)
        after = positions.amax(-1, keepdim=True) + 1  # (B, 1) or (3, B, 1), rows of a picture's grid apart
        self.next = after.amax(0, keepdim=True).expand_as(after) if after.dim() == 3 else after

    def _start_with_prefix(self, num_rows: int) -> None:
        """Prefix tuning: its keys and values stand in front of every row, also of the padding."""
        for layer in range(self.model.prefix.num_layers):
            keys, values = self.model.prefix(layer)  # (Hkv, P, K) each
            self.cache.update(keys.expand(num_rows, -1, -1, -1), values.expand(num_rows, -1, -1, -1), layer)
        self.mask = F.pad(self.mask, (self.model.prefix.num_virtual_tokens, 0), value=1)

    def _feed(self, embeddings: torch.Tensor, positions: torch.Tensor) -> None:
        out = self.decoder(
            inputs_embeds=embeddings, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache,
            use_cache=True,
        )
        self.hidden = out.last_hidden_state[:, -1]  # (B, D)

    def step(self, tokens: torch.Tensor) -> None:
        """Append one token (B,) to every row."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self._feed(self.model.net.get_input_embeddings()(tokens)[:, None], self.next)
        self.next = self.next + 1

    def repeat(self, count: int) -> None:
        """Every row `count` times, one after the other: samples of one prompt share its first run."""
        if count > 1:
            self.cache.batch_repeat_interleave(count)
            self.mask, self.hidden = self.mask.repeat_interleave(count, 0), self.hidden.repeat_interleave(count, 0)
            self.next = self.next.repeat_interleave(count, -2)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows (n,) alone."""
        self.cache.batch_select_indices(rows)
        self.mask, self.hidden, self.next = self.mask[rows], self.hidden[rows], self.next[..., rows, :]


def decode(
    decoding: Decoding,
    max_new_tokens: int,
    stops: list[int],
    uniform: torch.Tensor,
    pick: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[list[list[int]], list[list[float]]]:
    """(ids, log-probabilities) of each row, until a stop id or max_new_tokens; uniform is (B, max_new_tokens)."""
    weight = decoding.model.head_weight
    num_rows = max(1, CHUNK_BYTES // (4 * len(weight)))
    running = list(range(len(uniform)))
    ids: list[list[int]] = [[] for _ in running]
    logprobs: list[list[float]] = [[] for _ in running]
    for step in range(max_new_tokens):
        rows = uniform.new_tensor(running, dtype=torch.long)
        chunks = zip(decoding.hidden.split(num_rows), uniform[rows, step].split(num_rows), strict=True)
        chosen = [pick(F.linear(hidden, weight.to(hidden.dtype)).float(), drawn) for hidden, drawn in chunks]
        tokens = torch.cat([token for token, _ in chosen])  # (B,)
        values = torch.cat([value for _, value in chosen]).tolist()
        for row, token, value in zip(running, tokens.tolist(), values, strict=True):
            ids[row].append(token)
            logprobs[row].append(value)
        going_on = [place for place, row in enumerate(running) if ids[row][-1] not in stops]
        if not going_on or step + 1 == max_new_tokens:
            break
        if len(going_on) < len(running):
            running = [running[place] for place in going_on]
            places = tokens.new_tensor(going_on)
            decoding.keep(places)
            tokens = tokens[places]
        decoding.step(tokens)
    return ids, logprobs


def choose(
    logits: torch.Tensor, uniform: torch.Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(token, its log-probability) of each row of fp32 logits (B, V), by one number in [0, 1) a row, (B,) float64.

    Every rule is a lower bound on a token's probability: the k-th largest; the last of the largest that together reach
    top_p of what top_k left; min_p times the largest. Tokens keep their order for the draw, so rounding that swaps two
    nearly equal tokens does not change it.
    """
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    every = (logits / temperature).log_softmax(-1)  # (B, V)
    left = every.exp()
    if top_k > 0:
        left = drop_below(left, left.topk(min(top_k, left.shape[-1])).values[:, -1:])
    if top_p < 1:
        sorted_left = left.sort(-1, descending=True).values
        before = sorted_left.cumsum(-1) - sorted_left  # mass of the likelier tokens
        count = (before < top_p * sorted_left.sum(-1, keepdim=True)).sum(-1, keepdim=True)
        left = drop_below(left, sorted_left.gather(-1, count.clamp(min=1) - 1))
    if min_p > 0:
        left = drop_below(left, min_p * left.amax(-1, keepdim=True))
    cumulative = left.double().cumsum(-1)
    tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)  # (B, 1)
    return tokens[:, 0], every.gather(-1, tokens)[:, 0]


def drop_below(probabilities: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """(B, V) with 0 where less than bound (B, 1)."""
    return probabilities.where(probabilities >= bound, 0)
