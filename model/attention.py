"""Attention over a packed row: every segment attends to itself alone.

A micro-batch is one row of T tokens that holds several examples end to end. transformers' own packed path builds a
dense T x T mask and leaks between examples in four ways; here the boundaries are explicit. The function is registered
with transformers' attention interface under the name "packed", so that its networks run packed rows unchanged: the
segment lengths travel through the model's keyword arguments. On a card with flash attention one varlen kernel does the
row; elsewhere neighbouring segments of equal length share one batched SDPA call (the windows of a vision tower all do).
Costs sum(length^2) instead of T^2.
"""

import functools
import inspect
from itertools import accumulate, groupby

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface


def segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention inside each segment of a packed row.

    query is (H, T, K), key and value (Hkv, T, K) with Hkv dividing H; the lengths add up to T. window limits a causal
    query to the last `window` keys, itself included. prefix is a (keys, values) pair of (Hkv, P, K) that every query
    of every segment sees first (prefix tuning). Returns (T, H, K).
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # fp32 masters under autocast: rotated queries come as fp32
    plain = window is None and prefix is None and dropout == 0.0
    if plain and fits_flash(query) and has_flash_attention(query.device):
        return varlen(query, key, value, lengths, causal, scale)
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    pieces = (x.split([length * count for length, count in runs], dim=1) for x in (query, key, value))
    rows = []  # split, not slices: each slice's backward would fill a gradient of the whole row with zeros
    for (length, count), *piece in zip(runs, *pieces, strict=True):
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in piece)  # (n, H, L, K)
        if prefix is not None:
            k, v = (torch.cat([p.to(x).expand(count, -1, -1, -1), x], 2) for p, x in zip(prefix, (k, v), strict=True))
        if q.is_cuda:  # SDPA's memory-efficient kernel takes no grouped heads, and its fallback holds (L, L) scores
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        needs_mask = causal and (prefix is not None or (window is not None and window < length))  # is_causal knows neither
        mask = causal_mask(length, k.shape[2], window, q.device) if needs_mask else None
        out = sdpa(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # (n, H, L, K)
        rows.append(out.permute(0, 2, 1, 3).flatten(0, 1))  # (n * L, H, K)
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(Lq, Lk) True where a query may look: at keys up to its own place, the queries being the last Lq places."""
    place = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]  # (Lq, 1)
    keys = torch.arange(num_keys, device=device)[None]  # (1, Lk)
    seen = keys <= place
    return seen & (keys > place - window) if window else seen


def fits_flash(query: torch.Tensor) -> bool:
    """Whether the varlen kernel takes such heads: 16-bit, of a multiple of 8 channels, 256 at most (SDPA pads to that)."""
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


@functools.cache
def has_flash_attention(device: torch.device) -> bool:
    """Whether this device runs the varlen kernel: cards from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def varlen_kernel():
    """torch's varlen attention with grouped heads: torch 2.12 and 2.13 ask for enable_gqa, 2.11 does without."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return functools.partial(varlen_attn, enable_gqa=True) if grouped else varlen_attn


@functools.lru_cache(maxsize=16)
def segment_ends(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(n + 1,) boundaries of the segments, on the device. Kept, because every block of the network asks for the same ones and
    each copy to a card waits until its queue is empty."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def varlen(query, key, value, lengths: list[int], causal: bool, scale: float) -> torch.Tensor:
    """One flash kernel over the whole row; the same shapes as segment_attention."""
    ends, longest = segment_ends(tuple(lengths), query.device), max(lengths)
    q, k, v = (x.transpose(0, 1).contiguous() for x in (query, key, value))  # (T, H, K)
    window = (-1, 0) if causal else (-1, -1)
    return varlen_kernel()(q, k, v, ends, ends, longest, longest, scale=scale, window_size=window)


def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, lengths=None, **kwargs):
    """The form that transformers calls: query (1, H, T, K) -> ((1, T, H, K), None)."""
    prefix = kwargs["prefix"](module.layer_idx) if kwargs.get("prefix") is not None else None
    out = segment_attention(
        query[0], key[0], value[0], lengths, causal=module.is_causal, scale=scaling or query.shape[-1] ** -0.5,
        window=kwargs.get("sliding_window"), prefix=prefix, dropout=dropout,
    )
    return out[None], None


def no_mask(*args, **kwargs) -> None:
    """The packed function knows its segments, so transformers need not build any mask."""


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", no_mask)
