"""Pieces of an HTML page: style sheet, tables, pictures, charts. They know nothing of training.

Charts are SVG written here instead of a plotting library's: they follow the reader's light or dark setting through CSS
variables, need no font and no script, and a curve costs about 5 KB because it is thinned out to 400 points.
"""

import base64
import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

Points = list[tuple[float, float]]
PICTURE_BYTES, PICTURE_SIDE = 300_000, 1280
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 210, 56, 22, 12, 30  # a chart and its margins
CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1b1f24; --dim: #545d68; --line: #d5dae1;
  --grid: #e8ebef; --blue: #0b63b5; --orange: #b45309; --magenta: #b5179e; --red: #b3261e; --green: #1a7f37 }
@media (prefers-color-scheme: dark) { :root { --page: #111418; --card: #1a1f26; --text: #e6e9ee; --dim: #a3adb9;
  --line: #39424e; --grid: #29303a; --blue: #6cb2ff; --orange: #f2a33c; --magenta: #f28be0; --red: #ff8a80;
  --green: #5fd38d } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.7rem; margin: .2rem 0 .6rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .8rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.5 ui-monospace, monospace }
figure { margin: 0 } svg { display: block; width: 100% } summary { cursor: pointer } details pre { margin-top: .8rem }
.dim, figcaption, caption, dt { color: var(--dim) } .good { color: var(--green) } .bad { color: var(--red) }
.card, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem }
.chip { border: 1px solid; border-radius: 99px; padding: .1rem .7rem; font-size: .85rem; white-space: nowrap }
.tiles, .grid, .samples { display: grid; gap: .8rem; margin: 1rem 0 }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(100%, 12.2rem), 1fr)) }
.tile b { display: block; font-size: 1.15rem } .tile .dim { font-size: .9rem }
.grid { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
.samples { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: .8rem 0 0 }
dd { margin: 0; overflow-wrap: anywhere } .sample dd { white-space: pre-wrap; max-height: 14rem; overflow: auto }
.scroll { overflow: auto; max-height: 40rem }
table { border-collapse: collapse; width: 100%; font-size: .92rem } caption { text-align: left; padding-bottom: .4rem }
th, td { text-align: left; padding: .35rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top }
thead th { border-bottom-width: 2px } tbody tr:last-child td { border-bottom: 0 }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.words { min-width: 9rem; overflow-wrap: anywhere }
.bar { display: block; height: .8rem; margin-top: .35rem; border-radius: 3px; background: var(--blue) }
figcaption b { color: var(--text); margin-right: .6rem }
.key { margin-right: .9rem; font-size: .88rem; white-space: nowrap }
.key svg { display: inline-block; width: 26px; height: 10px; margin-right: .35rem }
.chart text { fill: var(--dim); font-size: 13px } .grid-line { stroke: var(--grid) } .axis { stroke: var(--dim) }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round } .faint { opacity: .4; stroke-width: 1 }
.blue, .faint { stroke: var(--blue) } .orange { stroke: var(--orange) } .green { stroke: var(--green) }
.magenta { stroke: var(--magenta) } .mark { fill: var(--red) }
.level { stroke: var(--magenta); stroke-width: 2; stroke-dasharray: 6 4 }
.shot { position: relative; line-height: 0; margin-bottom: .8rem } .shot img { width: 100%; border-radius: 4px }
.shot svg { position: absolute; inset: 0; height: 100% } .box { fill: none; vector-effect: non-scaling-stroke }
.halo { stroke: #fff; stroke-width: 6 } .expected, .before, .after { stroke-width: 3 } .expected { stroke: #0b63b5 }
.before { stroke: #c2570c; stroke-dasharray: 4 3 } .after { stroke: #d000b0; stroke-dasharray: 12 6 }
.key .expected { stroke: var(--blue) } .key .before { stroke: var(--orange) } .key .after { stroke: var(--magenta) }
@media (max-width: 520px) { dl { grid-template-columns: 1fr } dd { margin-bottom: .4rem } .card { padding: .7rem } }
"""
NUMBER = re.compile(r"[\d.,:]+( ?[%a-zA-Z]{1,3})?")  # 1,200, 7:12 min, 2.58 GiB, 97.5 %


def write_page(path: str | Path, title: str, sections: list[str], css: str = "") -> None:
    """Write a page, whole or not at all: a reader never sees half of it. Empty sections are left out."""
    from model.shards import whole_file

    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the browser itself keeps the page offline
    page = ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><meta http-equiv="Content-Security-Policy" content="{policy}">'
            f"<title>{escape(title)}</title><style>{CSS}{css}</style></head><body><main>\n"
            + "\n".join(filter(None, sections)) + "\n</main></body></html>\n")
    with whole_file(Path(path)) as file:
        file.write(page.encode(errors="xmlcharrefreplace"))


class Markup(str):
    """HTML made by this project; table() escapes every other string."""


def table(head: list[str], rows: list[list[Any]], caption: str = "") -> Markup:
    """An HTML table that scrolls sideways on a narrow screen; columns of numbers are set flush right."""
    columns = [[cell for cell in column if cell != ""] for column in zip(*rows, strict=True)]
    kinds = ['class="number"' if all(map(_is_number, column)) else 'class="words"' for column in columns]

    def line(tag: str, row: list[Any]) -> str:
        cells = (f"<{tag} {kind}>{_text(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return Markup(f'<div class="card scroll" tabindex="0" role="region" aria-label="{escape(", ".join(head))}">'
                  f'<table>{title}<thead>{line("th", head)}</thead>'
                  f"<tbody>{''.join(line('td', row) for row in rows)}</tbody></table></div>")


def _is_number(cell: Any) -> bool:
    return isinstance(cell, float) or NUMBER.fullmatch(str(cell)) is not None


def _text(cell: Any) -> str:
    if isinstance(cell, Markup):
        return cell
    return escape(f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}" if isinstance(cell, float) else str(cell))


def clock(seconds: float) -> str:
    """12.3 s, 4:05 min or 7:03:20 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"


def embed(picture: "Image") -> str:
    """The picture as a data: address of at most 300 KB: PNG if that is small enough, else JPEG, ever coarser."""
    picture = picture.convert("RGB")
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    for kind, options in [("png", {"optimize": True})] + [("jpeg", {"quality": quality}) for quality in (85, 60, 30)]:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        if len(buffer.getvalue()) <= PICTURE_BYTES:
            break
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def smooth(points: Points) -> Points:
    """Mean over a fifteenth of the curve around each point (centred, so that it does not lag behind a fall)."""
    points, smoothed = thin_out(points), []
    for index, (x, _) in enumerate(points):
        reach = min(len(points) // 30, index, len(points) - 1 - index)  # as far to the left as to the right
        smoothed.append((x, fmean(y for _, y in points[index - reach:index + reach + 1])))
    return smoothed


def thin_out(points: Points, most: int = 400) -> Points:
    """At most `most` points: means over equal runs of neighbours."""
    size = max(1, math.ceil(len(points) / most))
    runs = [points[start:start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in run), fmean(y for _, y in run)) for run in runs]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high, 1, 2 or 5 times a power of ten apart, at most `most`."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    distance = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) < most)
    return [number * distance for number in range(math.ceil(low / distance), math.floor(high / distance + 1e-9) + 1)]


def chart(title: str, curves: list[tuple[str, str, Points]], skipped: Sequence[int] = (), level: float = 0.0) -> str:
    """One SVG chart over steps, "" if there is nothing to draw; non-finite points are left out.

    curves: (label, CSS class, points); skipped: steps that get a mark on the axis; level: a forecast, as a dashed line.
    """
    curves = [(label, style, [point for point in points if math.isfinite(point[1])]) for label, style, points in curves]
    right = max([1, *skipped, *(x for _, _, points in curves for x, _ in points)])
    curves = [(label, style, thin_out(points)) for label, style, points in curves if points]
    if not curves:
        return ""
    ys = [y for _, _, points in curves for _, y in points] + [level, 0.0]
    low, high = min(ys), max(max(ys) * 1.05, min(ys) + 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        return (LEFT + x / right * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM))

    shapes = _axes(ticks(low, high, 5), [step for step in ticks(0, right, 7) if step == int(step)], place)
    for _, style, points in curves:
        places = [place(*point) for point in points]
        shapes.append(f'<polyline class="curve {style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        if len(points) < 30:  # so few that one should see where they are
            shapes += [f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places]
    shapes += [f'<path class="mark" d="M{place(step, 0)[0]:.1f} {HEIGHT - BOTTOM - 9}l5 9h-10z"/>' for step in skipped]
    if level:
        shapes.append(f'<path class="level" d="M{LEFT} {place(0, level)[1]:.1f}H{WIDTH - RIGHT}"/>')
    keys = [legend(label, style) for label, style, _ in curves if label]
    keys += [legend("forecast", "level")] if level else []
    keys += [legend(f"{len(skipped)} skipped", "mark")] if skipped else []
    words = "; ".join(f"{label or title} {points[0][1]:.4g} at step {points[0][0]:.0f}, {points[-1][1]:.4g} at step "
                      f"{points[-1][0]:.0f}" for label, _, points in curves)
    return (f'<figure class="card chart"><figcaption><b>{escape(title)}</b>{"".join(keys)}</figcaption>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title} by step: {words}")}">'
            f"{''.join(shapes)}</svg></figure>")


def _axes(values: list[float], steps: list[float], place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    shapes = [f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>']
    for value in values:
        y = place(0, value)[1]
        shapes.append(f'<path class="grid-line" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
                      f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    return shapes + [f'<text x="{place(step, 0)[0]:.1f}" y="{HEIGHT - 9}" text-anchor="middle">{step:.0f}</text>'
                     for step in steps]


def legend(label: str, style: str) -> str:
    """One entry of a legend: a short piece of the line (or the mark) and its name."""
    line = "M13 0l6 10h-12z" if style == "mark" else "M0 5H26"
    return (f'<span class="key"><svg viewBox="0 0 26 10" aria-hidden="true"><path class="{style}" d="{line}"/></svg>'
            f"{escape(label)}</span>")
