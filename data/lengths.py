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
    """Rows by number: `kept` fit, `longest_rows` are the longest of them (the first has `longest` positions).

    bad: refused rows in the form of bad_rows.jsonl. longest_refused: positions of the longest of them. picture_room: the
    fewest positions that a refused row has left for each of its pictures.
    """

    kept: list[int] = field(default_factory=list)
    longest: int = 0
    longest_rows: list[int] = field(default_factory=list)
    bad: list[dict] = field(default_factory=list)
    longest_refused: int = 0
    picture_room: float = float("inf")


def measure(
    records: Records, count: Count, picture_positions: Callable[[int, int], int], limit: int | None, text_limit: int | None
) -> Lengths:
    """Count the rows that may exceed `limit` positions (or `text_limit` of text), and the longest of the rest.

    picture_positions(width, height) is the family's. Raises UserError for a row that cannot be rendered.
    """
    pictures = [sum(picture_positions(w, h) for w, h in sizes) for sizes in records.image_sizes]
    found = Lengths()
    for index, text_bytes in enumerate(records.text_bytes):
        most_text = text_bytes + TEMPLATE_BYTES
        if (limit is None or most_text + pictures[index] <= limit) and (text_limit is None or most_text <= text_limit):
            found.kept.append(index)
            continue
        record = records[index]
        num_text, num_pictures = counted(count, record)
        problem = refuse(num_text, num_pictures, limit, text_limit)
        if problem is None:
            found.kept.append(index)
            continue
        found.bad.append({"where": record.where, "id": record.id, "problem": problem})
        found.longest_refused = max(found.longest_refused, num_text + num_pictures)
        if limit is not None and record.image_sizes:
            found.picture_room = min(found.picture_room, (limit - num_text) / len(record.image_sizes))
    by_estimate = sorted(found.kept, key=lambda i: records.text_bytes[i] / 3 + pictures[i], reverse=True)[:NUM_LONGEST]
    exact = {index: sum(counted(count, records[index])) for index in by_estimate}
    found.longest_rows = sorted(exact, key=exact.get, reverse=True)
    found.longest = max(exact.values(), default=0)
    return found


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


def remedy(lengths: Lengths, num_rows: int, pixels_per_position: float | None) -> str:
    """One sentence for rows that are too long: how many, the first, and the settings that would admit them all."""
    first = lengths.bad[0]
    ways = [f"--max_length {lengths.longest_refused} admits all (rows are never cut)", "--on_bad_row skip leaves them out"]
    if pixels_per_position and 4 <= lengths.picture_room < float("inf"):
        ways.insert(1, f"--max_pixels {int(lengths.picture_room * pixels_per_position)} shrinks their pictures until they fit")
    return (
        f"{len(lengths.bad)} of {num_rows} rows are too long; the first is {first['where']}, which {first['problem']}: "
        + ", or ".join(ways)
    )
