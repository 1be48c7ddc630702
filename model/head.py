"""The output head, applied only where a token is supervised, a few hundred positions at a time.

Logits are the largest tensor of a small model's step (2,048 positions x 151,936 words x 4 bytes = 1.2 GiB, twice more
in backward). Prompts and pictures need none, and a chunk's logits can be made again in backward: then the head's memory
is one chunk whatever the row's length, for one extra matrix product. Everything from the logits on is fp32: torch's own
fused F.linear_cross_entropy reports a bf16 loss.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from model.checkpointing import checkpoint

if TYPE_CHECKING:
    from data.batches import Packed
    from model.family import Model

CHUNK_BYTES = 128 * 2**20  # fp32 logits of one chunk: about 220 positions of Qwen's 151,936 words


def per_token(
    hidden: torch.Tensor, weight: torch.Tensor, function: Callable[..., torch.Tensor], where: torch.Tensor, *extra: torch.Tensor
) -> torch.Tensor:
    """function(logits, *extra) at the positions `where`, without ever holding all logits.

    hidden (T, D); weight (V, D) of the head; where (n,) indices into T; each extra tensor (n, ...) is cut along with
    the positions. function maps (c, V) fp32 logits and its part of the extras to (c,) or (c, m). Returns (n,) or (n, m).
    """
    size = max(1, CHUNK_BYTES // (4 * weight.shape[0]))

    def values(rows: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        return function(F.linear(rows, weight.to(rows.dtype)).float(), *parts)

    if len(where) <= size:  # one chunk: backward begins with its logits, so forgetting them would save nothing
        return values(hidden[where], *extra)
    chunks = zip(hidden[where].split(size), *(x.split(size) for x in extra), strict=True)
    return torch.cat([checkpoint(values, *chunk) for chunk in chunks])


def sequence_logprobs(model: "Model", packed: "Packed", temperature: float = 1.0) -> torch.Tensor:
    """sum_t log p(token_t | tokens before it) over the supervised tokens of each example of a packed row: (S,) fp32."""
    where, target = packed.supervised()
    function = partial(negative_log_likelihood, temperature=temperature)
    return -sum_by_example(per_token(model.hidden(packed), model.head_weight, function, where, target), packed, where)


def sum_by_example(values: torch.Tensor, packed: "Packed", where: torch.Tensor) -> torch.Tensor:
    """Sums over each of the S examples of a packed row of the values (n, ...) at its positions `where`: (S, ...)."""
    segment = torch.repeat_interleave(torch.tensor(packed.lengths, device=values.device))[where]  # (n,) number of the example
    return values.new_zeros(len(packed.lengths), *values.shape[1:]).index_add(0, segment, values)


def negative_log_likelihood(logits: torch.Tensor, target: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """-log softmax(logits / temperature)[target] of each position: (c, V), (c,) -> (c,), in fp32."""
    return _NegativeLogLikelihood.apply(logits if temperature == 1 else logits / temperature, target)


class _NegativeLogLikelihood(torch.autograd.Function):
    """The gradient of -log softmax(x)[t] is softmax(x) - one_hot(t): one (c, V) buffer, where F.cross_entropy takes two."""

    @staticmethod
    def forward(ctx, logits, target):
        log_probs = logits.log_softmax(-1)  # (c, V)
        ctx.save_for_backward(log_probs, target)
        return -log_probs.gather(1, target[:, None])[:, 0]

    @staticmethod
    def backward(ctx, grad):
        log_probs, target = ctx.saved_tensors
        gradient = log_probs.exp_()  # in place: a second backward through the same graph is an error, not a wrong number
        gradient[torch.arange(len(target), device=target.device), target] -= 1
        return gradient.mul_(grad[:, None]), None
