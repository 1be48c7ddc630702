"""How long the rows are, in positions, before the first step: exact where it matters, without opening a picture.

A byte of text is at most one token, so a row whose bytes, template and picture positions stay below the limit fits
without being tokenized; only the others are rendered and counted, and one row of each shape: a chat format without tools has
no place for any row with some. A row is never cut: one that is too long is refused with the numbers that would admit it.
"""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import nlargest

from data.errors import UserError
from data.records import Record, Records

TEMPLATE_BYTES = 1024  # what a chat template may add to a row's own text: roles, a default system turn
NUM_LONGEST = 16  # rows counted exactly to find the longest, taken by their estimate

Count = Callable[[Record], list[tuple[int, int]]]  # (text, picture) positions of each conversation; a preference has two


@dataclass
class Lengths:
    """Rows by number: `kept` fit, `longest_rows` are the longest of them (the first has `longest` positions).

    A limit holds for each conversation; the length of a row is that of all it runs, both sides of a preference.

    bad: rows that are too long, in the form of bad_rows.jsonl. unusable: rows that the model cannot take at any length.
    limit_flag: the setting that refuses the bad ones, longest_refused: what it would have to be to admit them.
    picture_room: the fewest positions that a refused row has left for each of its pictures.
    """

    kept: list[int] = field(default_factory=list)
    estimates: array = field(default_factory=lambda: array("d"))  # positions of each row, kept or not, roughly
    longest: int = 0
    longest_rows: list[int] = field(default_factory=list)
    bad: list[dict] = field(default_factory=list)
    unusable: list[dict] = field(default_factory=list)
    limit_flag: str = "--max_length"
    longest_refused: int = 0
    picture_room: float = float("inf")

    @property
    def mean(self) -> float:
        """Positions of an average kept row: its estimate, corrected by what the longest rows turned out to be."""
        estimated = [self.estimates[index] for index in self.kept]
        return sum(estimated) / len(estimated) * self.longest / self.estimates[self.longest_rows[0]]

    def longest_first(self) -> Iterator[int]:
        """The kept rows, each once: longest_rows, then the others by their estimates, sorted when one is asked for."""
        yield from self.longest_rows
        others = set(self.kept).difference(self.longest_rows)
        yield from sorted(others, key=lambda index: (-self.estimates[index], index))

    def typical(self) -> list[int]:
        """A row of middle length and the shortest, by estimate: with the longest, what the data looks like."""
        ordered = sorted(self.kept, key=self.estimates.__getitem__)
        return [index for index in dict.fromkeys([ordered[len(ordered) // 2], ordered[0]]) if index != self.longest_rows[0]]


def measure(
    records: Records, count: Count, picture_positions: Callable[[int, int], int], limit: int | None, text_limit: int | None
) -> Lengths:
    """Count the rows that may exceed `limit` positions (or `text_limit` of text), those of a shape of which the model cannot
    take the first, and the longest of the rest.

    picture_positions(width, height) is the family's. A UserError of one of the two makes its row an unusable one.
    """
    found = Lengths(limit_flag="--max_length" if text_limit is None else "--max_text_length")
    strange = strange_shapes(records, count)
    for index, text_bytes in enumerate(records.text_bytes):
        found.estimates.append(0)
        try:
            num_pictures = sum(picture_positions(*size) for size in records.image_sizes[index])
            found.estimates[index] = text_bytes / 3 + num_pictures
            most_text = text_bytes + TEMPLATE_BYTES
            fits = limit is None or most_text + num_pictures <= limit
            if not fits or (text_limit is not None and most_text > text_limit) or records.shapes[index] in strange:
                record = records[index]
                if refused := refuse_long(found, record, *max(count(record), key=sum), limit, text_limit):
                    found.bad.append(refused)
                    continue
        except UserError as error:
            found.unusable.append(entry(records[index], str(error)))
            continue
        found.kept.append(index)
    find_longest(found, records, count)
    return found


def strange_shapes(records: Records, count: Count) -> set[int]:
    """The shapes of rows (roles, calls, tools, pictures) of which the model cannot take the first."""
    firsts: dict[int, int] = {}
    for index, shape in enumerate(records.shapes):
        firsts.setdefault(shape, index)
    strange = set()
    for shape, index in firsts.items():
        try:
            count(records[index])
        except UserError:
            strange.add(shape)
    return strange


def refuse_long(
    found: Lengths, record: Record, num_text: int, num_pictures: int, limit: int | None, text_limit: int | None
) -> dict | None:
    """The entry of a row that is too long, None for one that is not; notes in `found` what would admit it."""
    problem = refuse(num_text, num_pictures, limit, text_limit)
    if problem is None:
        return None
    counted = num_text + num_pictures if text_limit is None else num_text
    found.longest_refused = max(found.longest_refused, counted)
    if limit is not None and record.image_sizes:
        found.picture_room = min(found.picture_room, (limit - num_text) / len(record.image_sizes))
    return entry(record, problem)


def find_longest(found: Lengths, records: Records, count: Count) -> None:
    """Count kept rows from the largest estimate on exactly, until NUM_LONGEST can be used; those that cannot leave `kept`."""
    exact, unusable = {}, set()
    found.longest_rows = nlargest(NUM_LONGEST, found.kept, key=found.estimates.__getitem__)
    for index in found.longest_first():
        record = records[index]
        try:
            exact[index] = sum(map(sum, count(record)))
        except UserError as error:
            found.unusable.append(entry(record, str(error)))
            unusable.add(index)
        if len(exact) == NUM_LONGEST:
            break
    found.kept = [index for index in found.kept if index not in unusable]
    found.longest_rows = sorted(exact, key=exact.get, reverse=True)
    found.longest = max(exact.values(), default=0)


def entry(record: Record, problem: str) -> dict:
    """A line of bad_rows.jsonl."""
    return {"where": record.where, "id": record.id, "problem": problem}


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
    enough = f"{lengths.limit_flag} {lengths.longest_refused}"
    ways = [f"{enough} admits all (rows are never cut)", *["--on_bad_row skip leaves them out"] * bool(lengths.kept)]
    if pixels_per_position and 4 <= lengths.picture_room < float("inf"):
        ways.insert(1, f"--max_pixels {int(lengths.picture_room * pixels_per_position)} shrinks their pictures until they fit")
    return (
        f"{len(lengths.bad)} of {num_rows} rows are too long; the first is {first['where']}, which {first['problem']}: "
        + ", or ".join(ways)
    )
