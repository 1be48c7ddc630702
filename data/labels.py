"""The label masker: text pieces -> input_ids and labels, made by the same call so that they cannot drift apart.

A conversation is rendered by the model's own chat template and cut at the assistant turns; every piece is tokenized by
itself, the response pieces (stop token included) carry labels, all else is -100. Prompt and response are cut only at
special tokens, where tokenizing them apart or together gives the same ids, and generation feeds the very ids that
training puts before the answer. Words in a user's text that spell a special token stay text: they are marked before the
template sees them, so a special token in the rendered text can only come from the template.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from data.errors import UserError

if TYPE_CHECKING:
    import torch

NO_LOSS = -100
MARKS = [chr(point) for point in range(0xFDD0, 0xFDF0)]  # Unicode noncharacters: never in honest text


@dataclass
class Example:
    """One row as the network takes it: T positions, pictures' included.

    labels belong to the token of the same place (unshifted), -100 where there is no loss; weights scale the loss of a
    token; positions are (T,) or (3, T), as the family counts them; an image span is the [start, end) of one picture; values
    are a stage's own numbers, one of each for the whole example (a reference's log-probability, an advantage).
    """

    input_ids: "torch.Tensor"  # (T,)
    labels: "torch.Tensor"  # (T,)
    pixels: dict[str, "torch.Tensor"] = field(default_factory=dict)
    image_spans: list[tuple[int, int]] = field(default_factory=list)
    positions: "torch.Tensor | None" = None
    weights: "torch.Tensor | None" = None  # (T,) float
    values: dict[str, float] = field(default_factory=dict)
    id: str = ""
    where: str = ""
    encode_seconds: float = 0.0  # what encoding the row took, in whichever process

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        """Tokens that carry a loss; the first position has nothing before it to be predicted from."""
        return int((self.labels[1:] != NO_LOSS).sum())

    @property
    def supervised_weight(self) -> float:
        """The sum of the supervised tokens' weights."""
        if self.weights is None:
            return float(self.num_supervised)
        return float(self.weights[1:][self.labels[1:] != NO_LOSS].sum())


@dataclass
class Piece:
    """A run of rendered text that is tokenized by itself; trained pieces carry labels."""

    text: str
    trained: bool = False


class PieceTokenizer:
    """Tokenizes pieces: the template's special tokens become their ids, everything else is plain text."""

    def __init__(self, backend):
        """backend is a tokenizers.Tokenizer; it is copied, because it is switched to take special tokens as text."""
        self.backend = type(backend).from_str(backend.to_str())
        self.backend.encode_special_tokens = True
        self.special = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        longest_first = sorted(map(re.escape, self.special), key=len, reverse=True)
        self.pattern = re.compile("(" + "|".join(longest_first) + ")") if longest_first else re.compile(r"(?!)")
        self.encode_short = lru_cache(1024)(self.encode)  # most pieces are the template's own words, the same in every row

    def mark(self, value: Any) -> tuple[Any, str]:
        """(value, mark): value with the mark character put inside every special token that one of its strings spells."""
        text = json.dumps(value, ensure_ascii=False, default=str)
        mark = next((m for m in MARKS if m not in text), None)
        if mark is None:
            raise UserError("the row holds every Unicode noncharacter from U+FDD0 to U+FDEF; remove one of them")

        def walk(node: Any) -> Any:
            if isinstance(node, str):
                return self.pattern.sub(lambda found: found[0][0] + mark + found[0][1:], node)
            if isinstance(node, list):
                return [walk(item) for item in node]
            if isinstance(node, dict):
                return {walk(key): walk(item) for key, item in node.items()}
            return node

        return walk(value), mark

    def ids(self, text: str, mark: str = "") -> list[int]:
        """Token ids of rendered text; unmarked special tokens are the template's own."""
        ids: list[int] = []
        for part in self.pattern.split(text):
            if part in self.special:
                ids.append(self.special[part])
            elif part:
                text = part.replace(mark, "") if mark else part
                ids += self.encode_short(text) if len(text) < 100 else self.encode(text)
        return ids

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids


def cut_turns(text: str, header: str, stop: str) -> list[Piece]:
    """Cut rendered text into prompt and response pieces: a response runs from after `header` through `stop`.

    A text that ends inside a response (a prompt for generation) ends with that piece, without a stop.
    """
    pieces, place = [], 0
    while (start := text.find(header, place)) >= 0:
        start += len(header)
        end = text.find(stop, start)
        end = len(text) if end < 0 else end + len(stop)
        pieces += [Piece(text[place:start]), Piece(text[start:end], trained=True)]
        place = end
    return pieces + ([Piece(text[place:])] if place < len(text) else [])


def mask(pieces: Iterable[tuple[list[int], bool]]) -> tuple[list[int], list[int]]:
    """(ids, trained) pieces -> (input_ids, labels); the one place where labels are made."""
    input_ids: list[int] = []
    labels: list[int] = []
    for ids, trained in pieces:
        input_ids += ids
        labels += ids if trained else [NO_LOSS] * len(ids)
    return input_ids, labels
