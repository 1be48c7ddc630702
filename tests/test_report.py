"""The report: one offline page, made from an output folder at any moment, with every user's text escaped."""

import html.parser
import json
import re

import pytest
from PIL import Image

from training import page
from training.journal import Journal
from training.report import Sample, read_report, write_report

EVIL = '<script>alert("x")</script> & <img src="https://example.com/x.png">'
VOID = {"meta", "img", "br", "path", "rect", "circle", "polyline"}


class Reader(html.parser.HTMLParser):
    """Checks that tags nest, and collects text, tags and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "


def run(folder, num_steps=5, finished=True, name="task <1>"):
    journal = Journal(folder, last_step=num_steps, logging_steps=10**9)
    journal.event("start", 0, command=f"python train.py --data_path {EVIL}", machine="CPU with 2 cores", last_step=9,
                  versions={"torch": "2.13.0"}, data=[{"file": "rows.jsonl", "sha256": "ab" * 32, "rows": 200}],
                  trainable=[["language", 1000, 20000]])
    journal.event("forecast", 0, gib=[["language weights, int8", 1.5], ["gradients", 0.5]], seconds_per_update=1.0,
                  hours=1.0)
    journal.event("eval", 0, eval_loss=2.5, accuracy=0.25, seconds=4.0)
    for step in range(1, num_steps + 1):
        bad = {"skipped": True} if step == 3 else {}
        journal.step(step, epoch=0.1, loss=float("nan") if bad else 2.0 / step, lr=1e-4, grad_norm=1.0, data_wait=1.0,
                     supervised_tokens=50, seconds=10.0, memory=1.75, forward_seconds=3.0, rows=[f"row-{14 + step}"],
                     **bad)
    journal.event("comparison", num_steps, name=name, before=3.0, after=97.5, unit="%")
    if finished:
        journal.event("finish", num_steps, reason="finished")
    journal.close()


def read(folder, report=None):
    write_report(folder / "report.html", report or read_report(folder))
    text = (folder / "report.html").read_text()
    return text, Reader(text)


def test_an_unfinished_run_is_told_from_its_folder_alone(tmp_path):
    run(tmp_path, finished=False)
    (tmp_path / "run.yaml").write_text("learning_rate: 0.0001  # <note>\n")
    bad = [{"where": f"rows.jsonl:{line}", "id": f"r{line}", "problem": "no picture <x>"} for line in range(1, 25)]
    (tmp_path / "bad_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    text, page_read = read(tmp_path)
    for words in ("running, or interrupted: step 5 of 9", "python train.py", "ab" * 32, "24 of 200 rows cannot be used",
                  "rows.jsonl:24", "no picture <x>", "learning_rate: 0.0001  # <note>", "task <1>", "97.5 %", "5.00%",
                  "language weights, int8", "2.00 GiB", "1.75 GiB", "row-17", "0.25"):
        assert words in page_read.text, words
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bad_rows.jsonl", "journal.jsonl", "report.html", "run.yaml"]


def test_a_finished_run_says_so(tmp_path):
    run(tmp_path)
    assert "finished: step 5 of 9" in read(tmp_path)[1].text


def test_an_empty_folder_makes_a_page(tmp_path):
    _, page_read = read(tmp_path)
    assert "step 0" in page_read.text and "Curves" not in page_read.text


def test_the_page_is_offline_and_escapes_user_text(tmp_path):
    run(tmp_path, name=EVIL)
    report = read_report(tmp_path)
    report.samples = [Sample(EVIL, EVIL, EVIL, EVIL, EVIL, Image.new("RGB", (40, 20)), expected_box=(1, 2, 3, 4))]
    report.config, report.name = EVIL, EVIL
    report.bad_rows = [{"where": EVIL, "id": EVIL, "problem": EVIL}]
    text, page_read = read(tmp_path, report)
    assert not [tag for tag, _ in page_read.tags if tag in ("script", "link", "iframe", "base", "form", "a", "object")]
    for _, attributes in page_read.tags:
        assert not any(name.startswith("on") or name in ("href", "srcset", "action") for name in attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/")
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style and "@import" not in style
    assert any("default-src 'none'" in attributes.get("content", "") for _, attributes in page_read.tags)
    assert page_read.text.count(EVIL) >= 10


def test_odd_characters_do_not_stop_the_report(tmp_path):
    report = read_report(tmp_path)
    report.samples = [Sample("1", "half a pair \ud83d", "\u00e9\u4e2d", "\x00")]
    assert "\u00e9\u4e2d" in read(tmp_path, report)[1].text


def test_each_held_out_set_has_a_colour_of_its_own(tmp_path):
    run(tmp_path)
    report = read_report(tmp_path)
    report.journal += [{"event": "eval", "step": 0, "set": name, "eval_loss": 1.0} for name in ("new", "old")]
    styles = [attributes["class"] for tag, attributes in read(tmp_path, report)[1].tags if tag == "polyline"]
    sets = styles[2:5]  # after the loss of each step and its smoothed curve
    assert len(set(sets)) == 3 and not set(sets) & set(styles[:2])
    style = re.search(r"<style>(.*?)</style>", read(tmp_path, report)[0], re.S)[1]
    assert all(f".{name.split()[-1]} {{ stroke:" in style for name in sets)


def test_curves_mark_skipped_steps_and_leave_them_out(tmp_path):
    run(tmp_path)
    text, page_read = read(tmp_path)
    loss = next(attributes["aria-label"] for tag, attributes in page_read.tags if tag == "svg" and "role" in attributes)
    assert loss.startswith("Loss by step: step 2 at step 1, 0.4 at step 5") and "held out 2.5 at step 0" in loss
    assert "nan" not in "".join(attributes.get("points", "") for _, attributes in page_read.tags)
    assert page_read.text.count("1 skipped") == 2  # in the legends of loss and gradient norm


def test_time_adds_up(tmp_path):
    run(tmp_path)
    rows = re.findall(r"<td[^>]*>([^<]+)</td><td[^>]*>([^<]+)</td><td[^>]*>([\d.]+)%</td><td[^>]*><span class=\"bar\"",
                      read(tmp_path)[0])
    assert [row[:2] for row in rows] == [("waiting for data", "5 s"), ("forward", "15 s"),
                                         ("rest of the step", "30 s"), ("evaluation", "4 s")]
    assert sum(float(share) for *_, share in rows) == pytest.approx(100, abs=0.3)


def test_samples_show_boxes_over_the_picture(tmp_path):
    report = read_report(tmp_path)
    report.samples = [Sample("r1", "where?", "there", "no", "yes", Image.new("RGB", (400, 200), "navy"),
                             (10, 20, 110, 60), None, (12.5, 20, 110, 70), False, True)]
    text, page_read = read(tmp_path, report)
    boxes = [attributes for tag, attributes in page_read.tags if tag == "rect" and "halo" not in attributes["class"]]
    assert [(box["class"], box["x"], box["y"], box["width"], box["height"]) for box in boxes] == [
        ("box expected", "10.0", "20.0", "100.0", "40.0"), ("box after", "12.5", "20.0", "97.5", "50.0")]
    picture = next(attributes for tag, attributes in page_read.tags if tag == "img")
    assert picture["alt"] == "picture of row r1; expected box (10, 20, 110, 60); after box (12, 20, 110, 70)"
    assert 'viewBox="0 0 400 200"' in text and "expected (box)" in page_read.text
    assert "\u2717 wrong" in page_read.text and "\u2713 right" in page_read.text


def test_pictures_stay_small(tmp_path):
    noise = Image.effect_noise((1600, 2400), 120).convert("RGB")  # as bad as it gets for PNG and JPEG
    for picture, kind in ((noise, "jpeg"), (Image.new("RGBA", (300, 300), "red"), "png")):
        address = page.embed(picture)
        assert address.startswith(f"data:image/{kind};base64,")
        assert len(address) <= page.PICTURE_BYTES * 4 / 3 + 100
    assert noise.size == (1600, 2400)


@pytest.mark.parametrize("low, high, most, expected", [
    (0, 1200, 7, [0, 200, 400, 600, 800, 1000, 1200]), (0, 1, 5, [0, 0.5, 1]), (0, 3e-4, 5, [0, 1e-4, 2e-4, 3e-4]),
    (-1, 2.1, 5, [-1, 0, 1, 2]), (0, 1, 7, [0, 0.2, 0.4, 0.6, 0.8, 1]),
])
def test_ticks(low, high, most, expected):
    assert page.ticks(low, high, most) == pytest.approx(expected)


def test_long_curves_are_thinned_out_and_keep_their_mean():
    points = [(step, step % 7) for step in range(100_000)]
    thin = page.thin_out(points)
    assert len(thin) <= 400 and thin[0][0] < 300 and thin[-1][0] > 99_700
    assert sum(y for _, y in thin) / len(thin) == pytest.approx(3, abs=0.01)
    assert page.thin_out([]) == [] and page.thin_out([(1, 2.0)]) == [(1, 2.0)]


def test_smoothing_neither_lags_nor_moves_the_ends():
    line = [(step, 3.0 * step) for step in range(200)]
    assert [y for _, y in page.smooth(line)] == pytest.approx([y for _, y in line])


@pytest.mark.parametrize("points", [[(1, 0.0)], [(1, 5.0)], [(1, -2.0), (2, -3.0)], [(4, float("nan"))], []])
def test_charts_of_odd_curves(points):
    drawn = page.chart("Loss", [("", "blue", points)])
    assert "nan" not in drawn and (drawn == "") == (not points or points[0][1] != points[0][1])


@pytest.mark.parametrize("seconds, text", [
    (0.04, "0.04 s"), (59.9, "59.9 s"), (61, "1:01 min"), (7 * 3600 + 200, "7:03:20 h")])
def test_clock(seconds, text):
    assert page.clock(seconds) == text
