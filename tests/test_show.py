"""Rows shown: each position of a picture is a part of it, tokens are marked by their labels, and no row's text is markup."""

import importlib
import json
import re
import sys
from array import array
from html.parser import HTMLParser

import pytest
from PIL import Image

from data.boxes import place_boxes
from data.errors import UserError
from data.explain import explain_rows, runs
from data.images import cells
from data.labels import NO_LOSS
from data.lengths import Lengths
from model.family import families, find_family
from model.tiny import write_tiny
from training.show import group, pieces, tokens

SIGHTED = ["cogagent", "minicpm_v", "phi3_vision", "qwen2_5_vl", "qwen3_vl"]
HOSTILE = '</span></title><script>alert(1)</script><img src=x onerror="alert(2)">\' & \x1b[2J\x00 \u202e caf\u00e9 \U0001f600'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model of every family that sees pictures, and rows with one, none, and two."""
    folder = tmp_path_factory.mktemp("show")
    for name in SIGHTED:
        write_tiny(name, folder / name)
    Image.new("RGB", (200, 100), "white").save(folder / "a.png")
    Image.new("RGB", (90, 300), "white").save(folder / "b.png")
    picture, other = ({"type": "image", "image": f"{name}.png"} for name in "ab")
    rows = [
        [{"role": "user", "content": [picture, {"type": "text", "text": "what is in <box>100 100 500 500</box>?"}]},
         {"role": "assistant", "content": "a <point>250 500</point>"}],
        [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}],
        [{"role": "user", "content": [picture, {"type": "text", "text": " or "}, other]},
         {"role": "assistant", "content": "<box>0 0 1000 1000</box>"}],
    ]  # fmt: skip
    lines = [json.dumps({"id": f"row {number} {HOSTILE}", "messages": row}) + "\n" for number, row in enumerate(rows, 1)]
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["data", *map(str, arguments)])
    return importlib.import_module("data.__main__").main()


def show(place, name, out, monkeypatch, *more):
    flags = ["--base_model", place / name, "--data_path", place / "rows.jsonl", "--output_dir", out]
    run(monkeypatch, "show", *flags, *more)
    return (out / "show.html").read_text(encoding="utf-8")


# ---- parts of a picture --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGHTED)
@pytest.mark.parametrize("size", [(200, 100), (100, 200), (640, 480), (37, 41), (1428, 1193)])
def test_every_position_of_a_picture_is_a_part_of_it(name, size, place):
    """As many as the picture takes; inside it; together all of it, in each of the views."""
    family = find_family(place / name)
    regions = family.regions(*size)
    assert len(regions) == family.picture_positions(*size)
    assert all(0 <= x0 < x1 <= size[0] + 1e-6 and 0 <= y0 < y1 <= size[1] + 1e-6 for x0, y0, x1, y1 in filter(None, regions))
    area = sum((x1 - x0) * (y1 - y0) for (x0, y0, x1, y1) in dict.fromkeys(filter(None, regions)))
    views = {"phi3_vision": 2, "minicpm_v": 2 if len(set(regions) - {None}) > 1 else 1}.get(name, 1)
    if name == "phi3_vision" and family.grid(*size) == (1, 1):
        views = 1  # the tile is the whole view, part for part
    assert area == pytest.approx(views * size[0] * size[1], rel=0.02)


def test_parts_are_where_the_pixels_are(place):
    """A picture with one dark corner: the positions whose patches are dark are those whose parts lie in that corner."""
    family = find_family(place / "qwen2_5_vl")
    picture = Image.new("RGB", (280, 140), "white")
    picture.paste("black", (140, 70, 280, 140))
    tensors, count = family.picture(picture)
    patches = tensors["pixel_values"].unflatten(0, (count, -1)).mean(dim=(1, 2))
    dark = [x0 >= 140 - 1 and y0 >= 70 - 1 for x0, y0, _, _ in family.regions(280, 140)]
    assert [bool(value < 0) for value in patches] == dark and any(dark)


def test_the_tiles_of_phi3_come_before_its_whole_view(place):
    family = find_family(place / "phi3_vision")
    regions, (rows, columns) = family.regions(400, 400), family.grid(400, 400)
    side = family.tower_settings["image_size"] // family.tower_settings["patch_size"] // 2
    tiles = rows * side * (columns * side + 1)
    assert regions[tiles] is None and regions[columns * side] is None  # the separator, and the end of a row
    assert regions[0] == pytest.approx((0, 0, 400 / columns / side, 400 / rows / side))
    assert regions[tiles + 1] == pytest.approx((0, 0, 400 / side, 400 / side))


def test_cells_beside_the_picture_are_none_of_it():
    assert cells((4, 2), 2, 1) == [(0, 0, 2, 2), (2, 0, 4, 2)]
    assert cells((4, 1), 1, 4, (4, 4)) == [None, (0, 0, 4, 0.5), (0, 0.5, 4, 1), None]


def test_neighbours_of_one_part_are_one_group_and_small_parts_lie_on_top():
    whole, left = (0, 0, 4, 2), (0, 0, 2, 2)
    assert group([None, left, left, None, whole], 10) == [((14, 14), whole), ((11, 12), left)]


# ---- tokens ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGHTED)
def test_every_token_is_shown_once_by_its_label(name, place):
    family = find_family(place / name)
    picture = Image.new("RGB", (64, 48))
    ask = [{"type": "image", "image": picture}, {"type": "text", "text": HOSTILE}]
    example = family.encode([{"role": "user", "content": ask}, {"role": "assistant", "content": HOSTILE}])
    shown = runs(example, family.tokenizer)
    assert [run.start for run in shown] == [0, *(run.end for run in shown[:-1])] and shown[-1].end == len(example)
    for part in shown:
        if part.kind == "picture":
            assert (part.start, part.end) in example.image_spans
            continue
        assert {bool(label != NO_LOSS) for label in example.labels[part.start : part.end].tolist()} == {part.kind == "loss"}
        listed = list(pieces(example, part, family.tokenizer))
        numbers = " ".join(title.partition("token ")[2] for _, title, _ in listed)
        assert list(map(int, numbers.split())) == example.input_ids[part.start : part.end].tolist()
        assert "".join(text for _, _, text in listed).strip() == part.text.strip()
    page = Page(tokens(example, family.tokenizer))
    assert {tag for tag, _ in page.tags} == {"div", "span"}
    assert "\\u001b[2J\\u0000 \\u202e caf\u00e9 \U0001f600" in page.text and "<script>" in page.text


def test_the_terminal_shows_the_end_of_long_rows_and_obeys_no_control_character(place):
    family = find_family(place / "qwen2_5_vl")
    example = family.encode([{"role": "user", "content": "x" * 900 + HOSTILE}, {"role": "assistant", "content": "the answer"}])
    text = explain_rows([[example], [example]], family.tokenizer, 400)
    assert text.count("[[the answer") == 2 and len(text) < 400 + 300
    assert not any(ord(character) < 32 and character != "\n" for character in text) and "\u202e" not in text


# ---- the command -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGHTED)
def test_the_page_is_offline_safe_and_has_every_row(name, place, tmp_path, monkeypatch, capsys):
    html = show(place, name, tmp_path, monkeypatch, "--box_format", "thousandths", "--rows", "9")
    page = Page(html)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("article") == 3 and tags.count("img") == 3 and "script" not in tags
    assert all(attributes["src"].startswith("data:image/") for tag, attributes in page.tags if tag == "img")
    assert not any(key.startswith("on") or key == "href" for _, attributes in page.tags for key in attributes)
    assert all(f"row {number} </span>" in page.text for number in (1, 2, 3))
    printed = capsys.readouterr().out
    assert printed.count("\n-- rows.jsonl:") == 3 and f"page {tmp_path / 'show.html'}" in printed


@pytest.mark.parametrize("name", SIGHTED)
def test_boxes_are_drawn_where_they_stand_in_the_picture(name, place, tmp_path, monkeypatch):
    """Rewritten for each family, and drawn in the pixels of the file: the same place for all."""
    html = show(place, name, tmp_path, monkeypatch, "--box_format", "thousandths", "--rows", "rows.jsonl:1")
    shapes = [(tag, a) for tag, a in Page(html).tags if a.get("class") in ("box expected", "box after")]
    (rect, asked), (circle, answered) = shapes
    assert (rect, circle, asked["class"], answered["class"]) == ("rect", "circle", "box expected", "box after")
    found = [float(asked[key]) for key in ("x", "y", "width", "height")] + [float(answered[key]) for key in ("cx", "cy")]
    assert found == pytest.approx([20, 10, 80, 40, 50, 50], abs=2)
    words = r"1: user's box at pixels \d+, \d+, \d+, \d+; 2: assistant's point at pixels \d+, \d+\b(?!,)"
    assert re.search(words, Page(html).text)


def test_boxes_are_of_the_picture_before_them():
    picture, text = {"type": "image"}, {"type": "text", "text": "<box>1 2 3 4</box>"}
    turns = [{"role": "system", "content": "<box>9 9 9 9</box>"}, {"role": "user", "content": [text, picture, picture, text]},
             {"role": "assistant", "content": "[5, 6, 7, 8]"}]  # fmt: skip
    assert place_boxes(turns) == [(0, "user", (1, 2, 3, 4)), (1, "user", (1, 2, 3, 4)), (1, "assistant", (5, 6, 7, 8))]


def test_rows_are_chosen_by_number_id_or_place(place, tmp_path, monkeypatch, capsys):
    def shown(*flags):
        show(place, "qwen2_5_vl", tmp_path, monkeypatch, *flags)
        lines = capsys.readouterr().out.splitlines()
        return [line.split()[1] for line in lines if line.startswith("-- ")]

    longest = shown("--rows", "3")
    assert sorted(longest) == [f"rows.jsonl:{number}:" for number in (1, 2, 3)]
    assert shown("--rows", "1") == longest[:1] and shown("--rows", "2") == [longest[0], longest[2]]
    assert shown("--rows", "rows.jsonl:2,rows.jsonl:1") == ["rows.jsonl:2:", "rows.jsonl:1:"]
    with pytest.raises(UserError, match="--rows nobody: no good row"):
        shown("--rows", "nobody")
    with pytest.raises(UserError, match="--rows 0"):
        shown("--rows", "0")
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="1 of 1 rows: bad.jsonl:1"):
        flags = ["--base_model", place / "qwen2_5_vl", "--data_path", tmp_path / "bad.jsonl", "--output_dir", tmp_path]
        run(monkeypatch, "show", *flags, "--on_bad_row", "skip")
    with pytest.raises(UserError, match="--data_path is missing"):
        run(monkeypatch, "show", "--base_model", place, "--output_dir", tmp_path)


def test_rows_that_are_too_long_are_told(place, tmp_path, monkeypatch, capsys):
    rows = [{"messages": [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y"}]} for n in (9, 900)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--base_model", place / "qwen2_5_vl", "--data_path", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out"]
    run(monkeypatch, "show", *flags, "--max_length", 400)
    said = capsys.readouterr().out
    assert "left out: 1 of 2 rows; the first is rows.jsonl:2: takes" in said and "-- rows.jsonl:1:" in said
    with pytest.raises(UserError, match="no row is left to show, without 2 of 2 rows; the first is rows.jsonl:1"):
        run(monkeypatch, "show", *flags, "--max_length", 5)


def test_a_damaged_picture_stops_the_page_or_is_left_out(place, tmp_path, monkeypatch, capsys):
    Image.effect_noise((90, 60), 50).save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(good[:2000] + good[-50:])  # seen by whoever decodes it alone
    content = [[{"type": "image", "image": f"{name}.png"}] for name in ("good", "torn")]
    rows = [{"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": "x"}]} for c in content]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--base_model", place / "qwen2_5_vl", "--data_path", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out"]
    with pytest.raises(UserError, match="rows.jsonl:2: .*torn.png"):
        run(monkeypatch, "show", *flags)
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"messages": "none"}')
    with pytest.raises(UserError, match="1 of 3 rows: rows.jsonl:3 not readable as messages"):
        run(monkeypatch, "show", *flags)
    run(monkeypatch, "show", *flags, "--on_bad_row", "skip")
    said = capsys.readouterr().out
    assert "left out: 1 of 3 rows: rows.jsonl:3 not readable as messages" in said
    assert "left out: rows.jsonl:2" in said and "-- rows.jsonl:1:" in said and "-- rows.jsonl:2:" not in said


def test_both_sides_of_a_preference_and_the_prompt_of_a_problem_are_shown(place, tmp_path, monkeypatch, capsys):
    ask = [{"role": "user", "content": "1 + 1?"}]
    rows = [{"prompt": ask, "chosen": ask + [{"role": "assistant", "content": "two"}],
             "rejected": ask + [{"role": "assistant", "content": "three"}]}, {"target": 24, "nums": [4, 6]}]  # fmt: skip
    path = tmp_path / "kinds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(monkeypatch, "show", "--base_model", place / "qwen2_5_vl", "--data_path", path, "--output_dir", tmp_path)
    html = (tmp_path / "show.html").read_text(encoding="utf-8")
    assert "<b>chosen</b>" in html and "<b>rejected</b>" in html and "a problem" in html
    printed = capsys.readouterr().out
    assert "[[two" in printed and "[[three" in printed and "0 with a loss" in printed
    assert all(f"\n-- {name}: " in printed for name in ("chosen kinds.jsonl:1", "rejected kinds.jsonl:1", "kinds.jsonl:2"))


def test_every_family_with_pictures_is_tested_here():
    assert sorted(family.name for family in families() if family.parts.get("vision")) == SIGHTED


def test_a_run_shows_its_longest_row_one_of_middle_length_and_the_shortest():
    lengths = Lengths(kept=[0, 2, 3, 4], estimates=array("d", [9, 1, 30, 5, 20]), longest_rows=[2])
    assert lengths.typical() == [4, 3]  # beside the longest; row 1 is not kept
    assert Lengths(kept=[7], estimates=array("d", range(8)), longest_rows=[7]).typical() == []
