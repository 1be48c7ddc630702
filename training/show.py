"""`python -m data show`: some rows as the model gets them, in the terminal and as one page, show.html, that opens offline.

Nothing is computed for the page that training would not compute: the tokens and their losses are the family's own, after
--box_format; each position of a picture is drawn as the part of the picture that it stands for (patches, slices or crops),
and boxes of the text where the model's numbers put them. A row's text is a stranger's: all of it is escaped, and the page
runs no script. Costs one encoding a row; a page of three screenshots is about 1 MB.
"""

from collections import Counter
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any

from data.boxes import boxes_of, place_boxes
from data.errors import UserError
from data.explain import CONTROLS, Run, describe, runs, sides
from data.images import open_image
from data.labels import Example
from data.lengths import Lengths
from data.records import Record, Records
from training.page import embed, legend

if TYPE_CHECKING:
    from data.boxes import Box

LABELLED = 40  # parts of a picture that get their positions written on them; patches are too many
CSS = """
.tokens { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .8rem 0 0 }
.t { unicode-bidi: isolate; border-radius: 3px; padding: .1rem 0 }
.t:nth-child(even) { background: color-mix(in srgb, var(--line) 45%, transparent) }
.t.loss:nth-child(even) { background: color-mix(in srgb, var(--green) 40%, transparent) }
.t.loss:nth-child(odd) { background: color-mix(in srgb, var(--green) 26%, transparent) }
.tokens .t.picture, p .t.picture { background: color-mix(in srgb, var(--blue) 24%, transparent); padding: .1rem .4rem }
.row .shot { max-width: 900px; margin: 0 auto .4rem } .row figcaption { text-align: center; margin-bottom: 1rem }
.row h2 { margin: 0 0 .2rem; overflow-wrap: anywhere } .row { margin: 1.2rem 0 }
.part { fill: transparent; stroke: #0b63b5; stroke-width: 1; stroke-opacity: .55; vector-effect: non-scaling-stroke }
.part:hover { fill: #0b63b5; fill-opacity: .3 } .slice { stroke-width: 3; stroke-opacity: .9 }
.shot text { fill: #0b63b5; stroke: #fff; stroke-width: 4; paint-order: stroke; stroke-linejoin: round }
.shot .expected { stroke: #c2570c; pointer-events: none } .shot .after { stroke: #d000b0; pointer-events: none }
.shot .halo { pointer-events: none } .shot .after-number { fill: #d000b0 } .shot .expected-number { fill: #c2570c }
.key .expected { stroke: #c2570c } .key .after { stroke: #d000b0 } .key .part { stroke-opacity: 1; stroke-width: 3 }
"""


def choose_rows(records: Records, lengths: Lengths, asked: str) -> list[int]:
    """Which rows are shown: so many, from the longest to the shortest, or those of these ids and places, commas between."""
    if not asked.isdecimal():
        return [find_row(records, name.strip()) for name in asked.split(",")]
    if int(asked) == 0:
        raise UserError("--rows 0: show one row at least")
    if left_out := lengths.unusable + lengths.bad:
        said = f"{len(left_out)} of {len(records)} rows; the first is {left_out[0]['where']}: {left_out[0]['problem']}"
        if not lengths.kept:
            raise UserError(f"{records.name}: no row is left to show, without {said}")
        print(f"left out: {said}")
    ordered = sorted(lengths.kept, key=lengths.estimates.__getitem__, reverse=True)
    count = min(int(asked), len(ordered))
    places = [round(number * (len(ordered) - 1) / max(count - 1, 1)) for number in range(count)]
    return [ordered[place] for place in places]


def find_row(records: Records, name: str) -> int:
    """The number of the row with this id, or at this place (rows.jsonl:17). UserError where there is none."""
    found = next((index for index, record in enumerate(records) if name in (record.id, record.where)), None)
    if found is None:
        raise UserError(f"--rows {name}: no good row has this id or place; give one (rows.jsonl:17), or how many to show")
    return found


def encode_row(family: Any, record: Record) -> list[Example]:
    """The row's conversations as a stage encodes them: of a preference both sides, of a problem its prompt."""
    if record.kind == "problem":
        return [family.encode_prompt(record.messages, record.tools, id=record.id, where=record.where)]
    return [family.encode(turns, record.tools, id=record.id, where=record.where) for turns in record.conversations]


def page_sections(family: Any, rows: Iterable[tuple[Record, list[Example]]]) -> list[str]:
    """The body of show.html."""
    keys = [legend(f"boxes in {name}", style) for name, style in (("prompts", "expected"), ("answers", "after"))]
    keys.append(legend("what a position of the picture stands for", "part"))
    head = ('<h1>Rows as the model gets them</h1><p class="dim">A token with a loss is <span class="t loss">green</span>, '
            'one without is <span class="t">plain</span>, a picture is its <span class="t picture">positions</span>. Point at '
            f"a token for its place and number, at a part of a picture for its positions.</p><p>{''.join(keys)}</p>")
    return [head, *(card(family, record, examples) for record, examples in rows)]


def card(family: Any, record: Record, examples: list[Example]) -> str:
    """One row: its pictures, then each of its conversations."""
    pictures = "".join(picture(family, record, examples[0], number) for number in range(len(record.image_sizes)))
    texts = "".join(f'<p><b>{side}</b> <span class="dim">{clean(describe(example))}</span></p>'
                    f"{tokens(example, family.tokenizer)}" for side, example in zip(sides(examples), examples, strict=True))
    kind = f"{clean(record.dialect)}, a {record.kind}"
    return f'<article class="card row"><h2>{clean(record.id)}</h2><p class="dim">{kind}</p>{pictures}{texts}</article>'


# ---- pictures ----------------------------------------------------------------------------------------------------------


def picture(family: Any, record: Record, example: Example, number: int) -> str:
    """One picture of a row, with the parts that its positions stand for and the boxes that the text places on it."""
    size, rule = record.image_sizes[number], boxes_of(family)
    start, end = example.image_spans[number]
    parts = group(family.regions(*size), start)
    turns = record.messages + (record.rejected or [])[-1:]
    found = [(role, rule.locate(box, size)) for place, role, box in place_boxes(turns) if place == number]
    letters = max(size) / 45
    shapes = [draw_part(part, span, letters) for span, part in parts]
    shapes += label_parts(parts, letters) if len(parts) <= LABELLED else []
    shapes += [draw_box(role, box, order, letters) for order, (role, box) in enumerate(found, 1)]
    seen = family.seen_size(*size)
    resized = f", seen as {seen[0]} x {seen[1]}" if tuple(seen) != tuple(size) else ""
    places = "".join(f"; {order}: {role}'s {name_place(box)}" for order, (role, box) in enumerate(found, 1))
    text = f"picture {number + 1}: {size[0]} x {size[1]}{resized}, positions {start} to {end - 1}, {len(parts)} parts{places}"
    image = open_image(record.pictures()[number]["image"])
    return (f'<figure><div class="shot"><img src="{embed(image)}" alt="{clean(text)}"><svg viewBox="0 0 {size[0]} {size[1]}">'
            f"{''.join(shapes)}</svg></div><figcaption>{clean(text)}</figcaption></figure>")


def group(regions: list["Box | None"], start: int) -> list[tuple[tuple[int, int], "Box"]]:
    """((first, last position), part of the picture) of neighbours that stand for one part; larger parts come first, so that
    those on top of them can be pointed at."""
    found: list[tuple[tuple[int, int], Any]] = []
    for position, part in enumerate(regions, start):
        if found and found[-1][1] == part:
            found[-1] = ((found[-1][0][0], position), part)
        else:
            found.append(((position, position), part))
    drawn = [(span, part) for span, part in found if part is not None]
    return sorted(drawn, key=lambda item: -(item[1][2] - item[1][0]) * (item[1][3] - item[1][1]))


def draw_part(part: "Box", span: tuple[int, int], letters: float) -> str:
    left, top, right, bottom = part
    style = "part slice" if right - left > 4 * letters else "part"
    return (f'<rect class="{style}" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}">'
            f"<title>{name_of(span)}</title></rect>")


def label_parts(parts: list[tuple[tuple[int, int], "Box"]], letters: float) -> list[str]:
    """The positions in the corner of each part, below each other where parts share it."""
    labels, taken = [], Counter()
    for span, (left, top, *_) in parts:
        corner = round(left), round(top)
        taken[corner] += 1
        place = f'x="{left + letters / 2:.1f}" y="{top + letters * (0.1 + 1.2 * taken[corner]):.1f}" font-size="{letters:.1f}"'
        labels.append(f"<text {place}>{name_of(span)}</text>")
    return labels


def name_of(span: tuple[int, int]) -> str:
    return f"position {span[0]}" if span[0] == span[1] else f"positions {span[0]} to {span[1]}"


def name_place(box: "Box") -> str:
    name, numbers = ("point", box[:2]) if is_point(box) else ("box", box)
    return f"{name} at pixels {', '.join(f'{number:.0f}' for number in numbers)}"


def is_point(box: "Box") -> bool:
    return box[:2] == box[2:]


def draw_box(role: str, box: "Box", order: int, letters: float) -> str:
    """A box, or a disc for a point, with its number in the text."""
    left, top, right, bottom = box
    style = "after" if role == "assistant" else "expected"
    place = f'x="{right + letters / 4:.1f}" y="{top:.1f}" font-size="{letters:.1f}"'
    number = f'<text class="{style}-number" {place}>{order}</text>'
    if is_point(box):
        shape = f'cx="{left:.1f}" cy="{top:.1f}" r="{letters / 2:.1f}"'
        return f'<circle class="box halo" {shape}/><circle class="box {style}" {shape}/>{number}'
    shape = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"'
    return f'<rect class="box halo" {shape}/><rect class="box {style}" {shape}/>{number}'


# ---- text --------------------------------------------------------------------------------------------------------------


def tokens(example: Example, tokenizer: Any) -> str:
    """Every token as a span of its own; characters that several tokens make together are one span."""
    spans = []
    for run in runs(example, tokenizer):
        if run.kind == "picture":
            spans.append(f'<span class="t picture" title="positions {run.start} to {run.end - 1}">{clean(run.text)}</span>')
        else:
            spans += (span(piece) for piece in pieces(example, run, tokenizer))
    return f'<div class="tokens">{"".join(spans)}</div>'


def span(piece: tuple[str, str, str]) -> str:
    kind, title, text = piece
    return f'<span class="t{" loss" * (kind == "loss")}" title="{title}">{clean(text)}</span>'


def pieces(example: Example, run: Run, tokenizer: Any) -> Iterable[tuple[str, str, str]]:
    """(kind, title, text) of the tokens of a run. A token is decoded behind the one before it, for some tokenizers leave out
    the blank in front of a text's first word."""
    ids, first, before = example.input_ids.tolist(), run.start, []
    for place in range(run.start, run.end):
        head, text = decode(tokenizer, before), decode(tokenizer, before + ids[first : place + 1])
        text = text.removeprefix(head)
        if text.endswith("\ufffd") and place + 1 < run.end and place - first < 3:
            continue  # the middle of a character
        numbers = " ".join(map(str, ids[first : place + 1]))
        yield run.kind, f"position {first}, token {numbers}", text
        before, first = ids[place : place + 1], place + 1


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""


def clean(text: str) -> str:
    """Text as HTML, its control characters spelled out."""
    return escape(text.translate(CONTROLS))
