"""report.html: a whole run on one page that opens without a network, a server or an account.

Everything but the held-out samples comes from the output folder: journal.jsonl, run.yaml, bad_rows.jsonl and
outputs/rollouts.jsonl. So the report of an interrupted run is made from what lies there, and train.py only adds samples.
Curves are SVG drawn here, at most 400 points each; colours are CSS variables, light and dark. A page costs about 40 KB and
at most 300 KB for each picture.

The journal's events that this page shows (each has a step; all are optional):
  start      command, machine, time, versions {name: version}, last_step, data [{file, sha256, rows}],
             trainable [[part, trained parameters, all parameters]]
  forecast   gib [[part, GiB]], seconds_per_update, hours
  eval       eval_loss, any other figures, seconds      commit   seconds
  comparison name, before, after, unit                  finish   reason, time
"""

import json
import math
from dataclasses import dataclass, field
from html import escape
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from training.journal import read_journal
from training.memory import size_text
from training.page import Markup, Points, chart, clock, embed, legend, smooth, table, write_page

if TYPE_CHECKING:
    from PIL.Image import Image

NUM_ROLLOUTS = 8  # the last sampled answers of RLOO that the page shows
KINDS, ARROW = ("expected", "before", "after"), "\u2192"
STEP_KEYS = ("step", "loss", "lr", "grad_norm", "supervised_tokens", "seconds", "data_wait", "memory", "rows",
             "skipped")  # of any stage
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the picture


@dataclass
class Sample:
    """One held-out row: what was asked, what was expected, what the model said before and after training.

    Boxes are (left, top, right, bottom) in pixels of `picture`; right says whether the task's metric accepts an answer.
    """

    id: str
    prompt: str
    expected: str
    before: str | None = None
    after: str | None = None
    picture: "Image | None" = None
    expected_box: Box | None = None
    before_box: Box | None = None
    after_box: Box | None = None
    before_right: bool | None = None
    after_right: bool | None = None


@dataclass
class Report:
    """All that the page shows. read_report fills everything but the samples."""

    name: str
    journal: list[dict]
    config: str = ""
    bad_rows: list[dict] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def events(self, name: str) -> list[dict]:
        return [record for record in self.journal if record.get("event") == name]

    def last(self, name: str) -> dict:
        return (self.events(name) or [{}])[-1]

    def steps(self) -> list[dict]:
        return [record for record in self.journal if "event" not in record]


def read_report(folder: str | Path) -> Report:
    """The report of an output folder, finished or not; whatever file is absent leaves its section out."""
    folder = Path(folder)
    config, bad_rows = folder / "run.yaml", folder / "bad_rows.jsonl"
    lines = bad_rows.read_bytes().splitlines() if bad_rows.exists() else []
    rollouts = folder / "outputs" / "rollouts.jsonl"
    sampled = map(json.loads, rollouts.read_bytes().splitlines()[-NUM_ROLLOUTS:] if rollouts.exists() else [])
    shown = [Sample(f"{line['id']}, sampled in step {line['step']}: reward {line['reward']:.4g}, advantage "
                    f"{line['advantage']:.3g}", line["prompt"], line["label"], after=line["response"]) for line in sampled]
    return Report(folder.resolve().name, read_journal(folder / "journal.jsonl"),
                  config.read_text(encoding="utf-8") if config.exists() else "", [json.loads(line) for line in lines], shown)


def write_report(path: str | Path, report: Report) -> None:
    """Write report.html."""
    sections = [header(report), curves(report), time_spent(report), forecast_and_fact(report), tables(report),
                samples(report.samples), bad_rows(report), skipped_steps(report), configuration(report)]
    write_page(path, f"{report.name}: training report", sections)


# ----------------------------------------------------------------------------------------------------------------------
# The sections from top to bottom; one that has nothing to show is an empty string

def header(report: Report) -> str:
    """What ran, where, on what data, how far it came."""
    start, finish = report.last("start"), report.last("finish")
    is_done = bool(report.journal) and report.journal[-1].get("event") == "finish"
    state = f"{finish.get('reason', 'finished') if is_done else 'running, or interrupted'}: {_progress(report)}"
    facts = {"machine": start.get("machine"), "started": start.get("time"), "ended": finish.get("time"),
             "versions": ", ".join(f"{name} {version}" for name, version in start.get("versions", {}).items())}
    data = [[part["file"], part["rows"], part["sha256"]] for part in start.get("data", [])]
    boxes = [f'<div class="tile"><span class="dim">{escape(name)}</span><b>{escape(figure)}</b></div>'
             for name, figure in key_figures(report)]
    terms = [f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items() if value]
    command = f"<pre><code>{escape(start['command'])}</code></pre>" if "command" in start else ""
    colour = "good" if is_done else "bad"
    return (f'<p class="dim">Training report <span class="chip {colour}">{escape(state)}</span></p><h1>'
            f'{escape(report.name)}</h1><div class="tiles">{"".join(boxes)}</div>'
            + (f'<div class="card">{command}<dl>{"".join(terms)}</dl></div>' if command or terms else "")
            + (f"<h2>Data</h2>{table(['file', 'rows', 'sha256'], data)}" if data else ""))


def key_figures(report: Report) -> list[tuple[str, str]]:
    """The figures that a reader looks for first, as (name, text)."""
    steps, figures = report.steps(), []
    compared = {record["name"]: f"{_with_unit(record, 'before')} {ARROW} {_with_unit(record, 'after')}"
                for record in report.events("comparison")}
    losses = {"training loss": [record["loss"] for record in steps if _is_taken(record)]}
    losses |= {f"{name}: eval loss": [loss for _, loss in points] for name, points in _evaluated(report, "loss").items()}
    for name, values in losses.items():
        ends = values[::max(1, len(values) - 1)]  # the first and the last, or the only one
        figures += [(name, f" {ARROW} ".join(f"{loss:.3f}" for loss in ends))] if ends and name not in compared else []
    figures += compared.items()
    return figures + [("time in steps", clock(_total(steps, "seconds")))] if steps else figures


def curves(report: Report) -> str:
    """Loss, the stage's own figures, gradient norm, learning rate, speed and memory; skipped steps are marked and left out."""
    steps = report.steps()
    taken = [record for record in steps if _is_taken(record)]
    skipped = [record["step"] for record in steps if not _is_taken(record)]

    def curve(key: str) -> Points:
        return [(record["step"], record[key]) for record in taken if key in record]

    def beside_held_out(title: str, key: str) -> str:
        sets = zip(_evaluated(report, key).items(), cycle(("orange", "green", "magenta")))
        held_out = [(name, f"curve {colour}", points) for (name, points), colour in sets]
        step_by_step = [("step", "curve faint", curve(key)), ("smoothed", "curve blue", smooth(curve(key)))]
        return chart(title, step_by_step + held_out, skipped)

    own = dict.fromkeys(key for record in taken for key in record if key not in STEP_KEYS and not key.endswith("_seconds"))

    speed = [(record["step"], record["supervised_tokens"] / max(record["seconds"], 1e-9)) for record in taken]
    forecast = sum(size for _, size in report.last("forecast").get("gib", []))
    charts = [
        beside_held_out("Loss", "loss"),
        *(beside_held_out(key.replace("_", " "), key) for key in own),
        chart("Gradient norm", [("", "curve blue", curve("grad_norm"))], skipped),
        chart("Learning rate", [("", "curve blue", curve("lr"))]),
        chart("Supervised tokens per second", [("", "curve blue", speed)]),
        chart("Peak memory, GiB", [("", "curve blue", curve("memory"))], level=forecast),
        chart("Seconds waiting for data", [("", "curve blue", curve("data_wait"))]),
    ]
    return f'<h2>Curves</h2><div class="grid">{"".join(charts)}</div>' if any(charts) else ""


def time_spent(report: Report) -> str:
    """Shares of the run's time: data, what the steps were timed by (*_seconds), evaluation, saving."""
    steps = report.steps()
    timed = sorted({key for record in steps for key in record if key.endswith("_seconds")})
    spent = {"waiting for data": _total(steps, "data_wait")}
    spent |= {key.removesuffix("_seconds").replace("_", " "): _total(steps, key) for key in timed}
    spent["rest of the step"] = max(0.0, _total(steps, "seconds") - sum(spent.values()))
    spent["evaluation"] = _total(report.events("eval"), "seconds")
    spent["saving"] = _total(report.events("commit"), "seconds")
    shares = {name: seconds / sum(spent.values()) for name, seconds in spent.items() if seconds}
    rows = [[name, clock(spent[name]), f"{share:.1%}", Markup(f'<span class="bar" style="width:{share:.1%}"></span>')]
            for name, share in shares.items()]
    return f"<h2>Where the time went</h2>{table(['part', 'time', 'share', ''], rows)}" if rows else ""


def forecast_and_fact(report: Report) -> str:
    """Memory by part, pace and hours as planned before the first step, beside what was measured."""
    forecast, steps = report.last("forecast"), report.steps()
    sizes = forecast.get("gib", [])
    rows = [[part, size_text(size), ""] for part, size in sizes]
    if sizes:
        peak = size_text(max(record["memory"] for record in steps)) if steps else ""
        rows.append(["peak memory in all", size_text(sum(size for _, size in sizes)), peak])
    if "seconds_per_update" in forecast:
        pace = f"{median(record['seconds'] for record in steps):.3g} s" if steps else ""
        rows.append(["an update (median)", f"{forecast['seconds_per_update']:.3g} s", pace])
    if "hours" in forecast:
        rows.append(["time in steps", clock(forecast["hours"] * 3600), clock(_total(steps, "seconds"))])
    return f"<h2>Forecast and fact</h2>{table(['', 'forecast', 'fact'], rows)}" if rows else ""


def tables(report: Report) -> str:
    """What is trained, tasks before and after, and the figures of every evaluation."""
    trainable = [[part, trained, whole, f"{trained / max(1, whole):.2%}"]
                 for part, trained, whole in report.last("start").get("trainable", [])]
    compared = [[record["name"], _with_unit(record, "before"), _with_unit(record, "after")]
                for record in report.events("comparison")]
    evals = report.events("eval")
    names = list(dict.fromkeys(key for record in evals for key in record if key not in ("event", "step", "seconds")))
    figures = [[record["step"], *(record.get(name, "") for name in names)] for record in evals]
    return "".join(f"<h2>{title}</h2>{table(head, rows)}" for title, head, rows in (
        ("What is trained", ["part", "trained parameters", "all parameters", "share"], trainable),
        ("Before and after", ["task", "before", "after"], compared),
        ("Evaluations", ["step", *names], figures)) if rows)


def samples(rows: list[Sample]) -> str:
    """Cards of held-out rows, with one legend for the boxes."""
    boxes = "".join(legend(f"{kind} (box)", kind) for kind in KINDS) if any(row.picture for row in rows) else ""
    return f'<h2>Samples</h2><p>{boxes}</p><div class="samples">{"".join(map(sample, rows))}</div>' if rows else ""


def sample(row: Sample) -> str:
    """One card. The boxes are an SVG over the picture, so that they stay sharp at every size."""
    marks = {None: "", True: '<b class="good">\u2713 right</b> ', False: '<b class="bad">\u2717 wrong</b> '}
    answers = [("prompt", row.prompt, None), ("expected", row.expected, None),
               ("before", row.before, row.before_right), ("after", row.after, row.after_right)]
    terms = "".join(f"<dt>{name}</dt><dd>{marks[right]}{escape(text.strip()) or '(empty)'}</dd>"
                    for name, text, right in answers if text is not None)
    shot = ""
    if row.picture:
        boxes = [(kind, box) for kind in KINDS if (box := getattr(row, f"{kind}_box"))]
        words = "".join(f"; {kind} box {tuple(map(round, box))}" for kind, box in boxes)
        shapes = "".join(f'<rect class="box {style}" x="{left:.1f}" y="{top:.1f}" width="{max(0, right - left):.1f}" '
                         f'height="{max(0, bottom - top):.1f}"/>'
                         for style, (left, top, right, bottom) in [("halo", box) for _, box in boxes] + boxes)
        shot = (f'<div class="shot"><img src="{embed(row.picture)}" alt="{escape(f"picture of row {row.id}{words}")}">'
                f'<svg viewBox="0 0 {row.picture.width} {row.picture.height}" aria-hidden="true">{shapes}</svg></div>')
    return f'<article class="card sample">{shot}<dl>{terms}</dl><p class="dim">row {escape(row.id)}</p></article>'


def bad_rows(report: Report) -> str:
    """Rows that could not be used, the first 100 of them."""
    num_rows = sum({part["file"]: part["rows"] for part in report.last("start").get("data", [])}.values())
    shown = [[row["where"], row["id"], row["problem"]] for row in report.bad_rows[:100]]
    caption = f"{len(report.bad_rows):,} {f'of {num_rows:,} ' if num_rows else ''}rows cannot be used"
    caption += f"; the first {len(shown)}" if len(shown) < len(report.bad_rows) else ""
    return f"<h2>Bad rows</h2>{table(['where', 'id', 'problem'], shown, caption)}" if shown else ""


def skipped_steps(report: Report) -> str:
    """Steps whose update was not taken, with the rows that were in them."""
    rows = [[record["step"], record["loss"], record["grad_norm"], ", ".join(map(str, record.get("rows", [])))]
            for record in report.steps() if not _is_taken(record)]
    return f"<h2>Skipped steps</h2>{table(['step', 'loss', 'gradient norm', 'rows'], rows)}" if rows else ""


def configuration(report: Report) -> str:
    return (f'<h2>Configuration</h2><details class="card"><summary>run.yaml, which repeats this run</summary>'
            f"<pre><code>{escape(report.config)}</code></pre></details>" if report.config else "")


def _progress(report: Report) -> str:
    steps, last = report.steps(), report.last("start").get("last_step")
    return f"step {steps[-1]['step'] if steps else 0:,}" + (f" of {last:,}" if last else "")


def _is_taken(record: dict) -> bool:
    return "skipped" not in record and math.isfinite(record["loss"])


def _evaluated(report: Report, key: str) -> dict[str, Points]:
    """(step, a figure of the stage) of each held-out set by its name."""
    found: dict[str, Points] = {}
    for record in report.events("eval"):
        if f"eval_{key}" in record:
            found.setdefault(record.get("set", "held out"), []).append((record["step"], record[f"eval_{key}"]))
    return found


def _total(records: list[dict], key: str) -> float:
    return sum(record.get(key, 0) for record in records)


def _with_unit(record: dict, key: str) -> str:
    unit = record.get("unit", "")
    return f"{record[key]:.1f} {unit}" if unit else f"{record[key]:.3f}"
