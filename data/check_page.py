"""A check's findings as one screen of text: a line for each fact, histograms side by side, the first problems.

Whatever a row itself says (its id, a path) is cut to one line and to characters that a terminal prints.
"""

import math
import textwrap
from collections.abc import Iterator
from pathlib import Path

from data.check import COUNTED, UNREADABLE, Survey, bounds, figures_of, histogram

PROBLEMS_SHOWN, LONGEST_SHOWN, PAIRS_SHOWN, NOTES_SHOWN = 20, 3, 3, 2
LINES = 8  # of the kinds of problem, and of one problem
BAR, FINE = 11, 9  # letters of the longest bar; lines of a histogram up to which each is a doubling, else two


def page(survey: Survey, width: int, bad_path: Path) -> str:
    """The check on one screen, `width` columns wide."""
    num_rows, num_bad = survey.num_rows, len(survey.bad)
    read = f"{num_rows:,} rows in {survey.seconds:.0f} s: {num_rows - num_bad:,} good, {num_bad:,} with a problem"
    lines = [f"{read}; {survey.records.name}", ""]
    lines += [f"{name:<11} {text}" for name, text in facts(survey)]
    if any(survey.counts["text"]):
        lines += ["", *table(survey)]
    if survey.bad:
        kinds = ", ".join(f"{count:,} x {kind}" for kind, count in survey.kinds.most_common())
        lines += ["", *wrapped(kinds, width, "problems    ", " " * 12), *problems(survey, width)]
        more = num_bad - PROBLEMS_SHOWN
        lines.append(f"  {f'and {more:,} more; ' if more > 0 else ''}all are in {bad_path}")
    return "\n".join(cut(line, width) for line in lines)


def problems(survey: Survey, width: int) -> Iterator[str]:
    """The first rows with a problem, a line each; but the first of its kind is told whole, for it may say what helps."""
    told = set()
    for row in survey.bad[:PROBLEMS_SHOWN]:
        kind, line = row["problem"].partition(":")[0], f"{name_row(row['where'], row['id'])}  {row['problem']}"
        yield from [f"  {line}"] if kind in told else wrapped(line, width, "  ", " " * 6)
        told.add(kind)


def wrapped(text: str, width: int, first: str, rest: str) -> list[str]:
    """Lines of at most `width` columns, up to LINES; a word with hyphens, such as a flag, stays whole."""
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, max_lines=LINES, placeholder=" ..",
                         break_on_hyphens=False)  # fmt: skip


def facts(survey: Survey) -> Iterator[tuple[str, str]]:
    """What is said in a line each: its name and its text."""
    records = survey.records
    yield "read as", ", ".join(f"{count:,} {name}" for name, count in records.dialects.most_common()) or "nothing"
    for note, count in records.notes.most_common(NOTES_SHOWN):
        yield "note", f"{count:,} x {note}"
    if sizes := [size for row in set(records.image_sizes) for size in row]:
        smallest, largest = (f"{w} x {h}" for w, h in (min(sizes, key=math.prod), max(sizes, key=math.prod)))
        num_rows = sum(map(bool, records.image_sizes))
        unreadable = f"{survey.kinds[UNREADABLE]:,} rows with an unreadable one"
        span = f"from {smallest} to {largest}" if smallest != largest else f"of {smallest}"
        yield "pictures", f"in {num_rows:,} rows, {span}; {unreadable}"
    text, pictures, supervised = (sum(survey.counts[name]) for name in COUNTED)
    if text:
        of_all = f", {supervised / (text + pictures):.1%} of all positions" if pictures else ""
        yield "supervised", f"{supervised / text:.1%} of the text tokens{of_all}"
    for name, pairs in survey.again.items():
        if pairs:
            shown = ", ".join(f"{where} as {before}" for where, before in pairs[:PAIRS_SHOWN])
            yield name, f"{len(pairs):,} rows: {shown}{', ..' if len(pairs) > PAIRS_SHOWN else ''}"
    if survey.longest:
        shown = [f"{row[0]:,} positions {name_row(*row[1:3])}" for row in survey.longest[:LONGEST_SHOWN]]
        yield "longest", ", ".join(shown)
    if survey.too_long:
        pixels = [pixels for _, pixels in survey.too_long if pixels]
        also = f", --max_pixels {min(pixels)} the {len(pixels):,} whose pictures can shrink" if pixels else ""
        yield "too long", f"{len(survey.too_long):,} rows; --max_length {max(survey.too_long)[0]} admits all{also}"


def table(survey: Survey) -> Iterator[str]:
    """Histograms side by side, and figures below."""
    names = [name for name in COUNTED if any(survey.counts[name])]
    found = {name: histogram(survey.counts[name]) for name in names}
    used = {k for counts in found.values() for k in counts}
    first, last = min(used - {0}), max(used)
    bins = [[0]] * (0 in used)
    step = 1 if last - first < FINE else 2
    bins += [list(range(start, start + step)) for start in range(first, last + 1, step)]
    yield f"{'tokens a row':<14}" + "".join(f"{name:>10}{'':{BAR + 1}}" for name in names)
    rows = {name: [sum(found[name][k] for k in some) for some in bins] for name in names}
    for place, some in enumerate(bins):
        low, high = bounds(some[0])[0], bounds(some[-1])[1]
        cells = [f"{in_short(rows[name][place]):>10} {bar(rows[name], place):<{BAR}}" for name in names]
        yield f"{f'{low:,}-{high:,}' if high else '0':>14}" + "".join(cells)
    figures = {name: figures_of(survey.counts[name]) for name in names}
    for row in ("median", "most", "sum"):
        yield f"{row:>14}" + "".join(f"{in_short(figures[name][row]):>10}{'':{BAR + 1}}" for name in names)


def bar(rows: list[int], place: int) -> str:
    return "#" * math.ceil(rows[place] / max(rows) * BAR)


def in_short(count: int) -> str:
    return "-" if count == 0 else f"{count:,}" if count < 10**7 else f"{count / 1e6:,.1f} M"


def name_row(where: str, row_id: str) -> str:
    return where if row_id == where else f"{where} ({row_id})"


def cut(text: str, width: int) -> str:
    """One line of at most `width` columns."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text).rstrip()
    return text if len(text) <= width else text[: width - 2] + ".."
