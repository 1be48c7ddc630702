"""How long the rows are, in positions, before the first step: exact where it matters, without opening a picture.

A byte of text is at most one token, so a row whose bytes, template and picture positions stay below the limit fits
without being tokenized; only the others are rendered and counted. A row is never cut: one that is too long is refused
with the numbers that would admit it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from data.errors import UserError
from data.records import Record, Records

TEMPLATE_BYTES = 1024  # what a chat template may add to a row's own text: roles, a default system turn
NUM_LONGEST = 16  # rows counted exactly to find the longest, taken by their estimate

Count = Callable[[Record], tuple[int, int]]  # record -> (text, picture) positions


@dataclass
class Lengths:
    """Which rows fit, and the longest of them: `longest` positions, rows of it first in `longest_rows`."""

    kept: list[int]
    longest: int
    longest_rows: list[int]
    bad: list[dict] = field(default_factory=list)


def measure(
    records: Records, count: Count, picture_positions: Callable[[int, int], int], limit: int | None, text_limit: int | None
) -> Lengths:
    """Count the rows that may exceed `limit` positions (or `text_limit` of text), and the longest of the rest.

    picture_positions(width, height) is the family's. Refused rows are in `.bad`, in the contract's form.
    """
    pictures = [sum(picture_positions(w, h) for w, h in sizes) for sizes in records.image_sizes]
    text = list(records.text_bytes)
    kept, bad = [], []
    for index in range(len(records)):
        most_text = text[index] + TEMPLATE_BYTES
        if (limit is None or most_text + pictures[index] <= limit) and (text_limit is None or most_text <= text_limit):
            kept.append(index)
            continue
        record = records[index]
        num_text, num_pictures = counted(count, record)
        problem = refuse(num_text, num_pictures, limit, text_limit)
        if problem:
            bad.append({"where": record.where, "id": record.id, "problem": problem})
        else:
            kept.append(index)
    by_estimate = sorted(kept, key=lambda i: text[i] / 3 + pictures[i], reverse=True)[:NUM_LONGEST]
    exact = {index: sum(counted(count, records[index])) for index in by_estimate}
    longest_rows = sorted(exact, key=exact.get, reverse=True)
    return Lengths(kept, exact[longest_rows[0]] if longest_rows else 0, longest_rows, bad)


def counted(count: Count, record: Record) -> tuple[int, int]:
    """count(record), with the row's place in front of whatever is wrong with it."""
    try:
        return count(record)
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from None


def refuse(num_text: int, num_pictures: int, limit: int | None, text_limit: int | None) -> str | None:
    """Why a row of so many positions is too long; None if it is not."""
    if limit is not None and num_text + num_pictures > limit:
        return f"takes {num_text + num_pictures} positions ({num_text} of text, {num_pictures} of pictures), over {limit}"
    if text_limit is not None and num_text > text_limit:
        return f"has {num_text} tokens of text, over {text_limit} (its {num_pictures} picture positions come on top)"
    return None


def remedy(lengths: Lengths, num_rows: int, limit: int, pixels_per_position: float | None) -> str:
    """One sentence for rows that are too long: how many, the first, and the settings that would admit them all."""
    first = lengths.bad[0]
    sentence = f"{len(lengths.bad)} of {num_rows} rows are too long; the first is {first['where']}, which {first['problem']}. "
    longest = max(int(row["problem"].split()[1]) for row in lengths.bad)
    sentence += f"--max_length {longest} admits all of them (rows are never cut)"
    if pixels_per_position and "of pictures" in first["problem"]:
        sentence += f", or lower --max_pixels below {int(limit * pixels_per_position * 0.9)}"
    return sentence + ", or --on_bad_row skip leaves them out"
