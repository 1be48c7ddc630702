"""Answers from a model: prompts of any length in batches, a KV cache, and only the stop ids that are asked for.

Training runs packed rows; here a row must grow, so prompts are padded on the left into a batch whose rows all grow at
the right end (eval/decoding.py), and the decoder is switched to transformers' SDPA path with an explicit mask while
generate() runs. Rows that are finished leave the batch. The settings of generation_config.json (Qwen's ask for a
repetition penalty) are NOT picked up: what is sampled is the policy itself. The cache takes 2 x layers x Hkv x K numbers a
token in the computing dtype, 36 KiB for Qwen2.5-VL-3B; the head runs on one position a row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from data.batches import hash_seed
from data.labels import Example
from eval.decoding import Decoding, decode
from model.family import Family, Model


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
    first_prompt: int = 0,
) -> list[Answer]:
    """num_samples answers to each prompt: answer j of prompt i is number i * num_samples + j of the list.

    stop_ids None means the family's. Temperature 0 takes the likeliest token; above it, tokens are drawn from
    softmax(logits / temperature) cut by top_k (0 = off), top_p and min_p in this order, as transformers cuts. Each
    answer draws from a random generator of its own, made from seed and its number: the same answers for any cut into
    batches, up to rounding, and into calls (first_prompt is the number of prompts[0] in all of them). batch_tokens bounds
    rows x (longest prompt + max_new_tokens) of one batch; a prompt that is longer runs alone. Runs in eval mode and without
    gradients, in the caller's autocast; the model is put back after.
    """
    stops = model.family.stop_ids if stop_ids is None else stop_ids
    pick = partial(choose, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    answers: list[Answer] = [None] * (len(prompts) * num_samples)
    with ready_to_generate(model):
        for numbers in batches_by_length([len(p) for p in prompts], num_samples, max_new_tokens, batch_tokens):
            rows = [i * num_samples + j for i in numbers for j in range(num_samples)]
            drawn = [first_prompt * num_samples + row for row in rows]
            uniform = draw_uniform(drawn, max_new_tokens, seed).to(model.device)
            ids, logprobs = decode(Decoding(model, [prompts[i] for i in numbers], uniform, pick), stops)
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
    tokens = tokens.clamp(max=logits.shape[-1] - 1)  # it is V where a logit is NaN, as the log-probability then tells
    return tokens[:, 0], every.gather(-1, tokens)[:, 0]


def drop_below(probabilities: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """(B, V) with 0 where less than bound (B, 1)."""
    return probabilities.where(probabilities >= bound, 0)
