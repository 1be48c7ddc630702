"""An example as text that shows what is trained: the first thing to look at before a run.

An example is cut into runs: text with a loss, text without one, and pictures. A terminal, the prompts that an evaluation
writes down, and the page of `python -m data show` (training/show.py) all show the same runs.
"""

import sys
from collections.abc import Iterable
from typing import NamedTuple

from data.labels import NO_LOSS, Example

SHOWN = 4000  # characters of all rows together before a run
# All control characters but tab and line end, and those that turn the direction of writing.
CONTROLS = {code: rf"\u{code:04x}" for code in (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F),
                                               *range(0x2066, 0x206A))}  # fmt: skip


class Run(NamedTuple):
    """Neighbouring positions start .. end - 1 of one kind, "loss", "plain" or "picture", and their text."""

    kind: str
    text: str
    start: int
    end: int


def runs(example: Example, tokenizer) -> list[Run]:
    """The example from its first position to its last; a picture's text is <N picture positions>."""
    pictures = {start: end for start, end in example.image_spans}
    ids, labels = example.input_ids.tolist(), example.labels.tolist()
    found, place = [], 0
    while place < len(ids):
        if place in pictures:
            end = pictures[place]
            found.append(Run("picture", f"<{end - place} picture positions>", place, end))
        else:
            trained, end = labels[place] != NO_LOSS, place + 1
            while end < len(ids) and end not in pictures and (labels[end] != NO_LOSS) == trained:
                end += 1
            text = tokenizer.decode(ids[place:end], skip_special_tokens=False)
            found.append(Run("loss" if trained else "plain", text, place, end))
        place = end
    return found


def explain(example: Example, tokenizer, colour: bool = True) -> str:
    """The example as text: supervised tokens green (or in [[ ]]), pictures (blue) as <N picture positions>."""
    return paint(runs(example, tokenizer), colour)


def paint(some: Iterable[Run], colour: bool) -> str:
    around = {"loss": ("\x1b[32m", "\x1b[0m"), "picture": ("\x1b[34m", "\x1b[0m")} if colour else {"loss": ("[[", "]]")}
    return "".join(run.text.join(around.get(run.kind, ("", ""))) for run in some)


def explain_rows(rows: list[list[Example]], tokenizer, shown: int = SHOWN) -> str:
    """Some rows for a terminal, each conversation under a line about it; of long ones the end, where the answers are, so that
    all of them take about `shown` characters. Control characters are spelled out: a row cannot move the cursor."""
    examples = [pair for row in rows for pair in zip(sides(row), row, strict=True)]
    colour, each = sys.stdout.isatty(), shown // max(len(examples), 1)
    lines = [f"rows as the model sees them, supervised tokens {'green' if colour else 'in [[ ]]'}:"]
    for side, example in examples:
        lines.append(" ".join(filter(None, ("--", side, describe(example)))))
        lines.append(paint(last(runs(example, tokenizer), each), colour))
    return "\n".join(lines)


def sides(row: list[Example]) -> tuple[str, ...]:
    """What each conversation of a row is: a preference has two."""
    return ("chosen", "rejected") if len(row) == 2 else ("",) * len(row)


def describe(example: Example) -> str:
    """Where a row stands and what it weighs."""
    num_pictures = sum(end - start for start, end in example.image_spans)
    return f"{example.where}: {len(example)} positions, {num_pictures} of pictures, {example.num_supervised} with a loss"


def last(some: list[Run], most: int) -> list[Run]:
    """The last `most` characters of some runs, with a word about what is left out; control characters spelled out."""
    kept, room = [], most
    for run in reversed(some):
        text = run.text.translate(CONTROLS)
        kept.append(run._replace(text=text[-room:]))
        room -= len(text)
        if room <= 0:
            break
    if room < 0 or len(kept) < len(some):
        kept.append(Run("plain", "[..] ", 0, 0))
    return kept[::-1]
