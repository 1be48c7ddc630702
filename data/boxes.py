"""Boxes and points in text: read in every spelling, and rewritten from what a data set counts to what a model counts.

Every data set writes boxes its own way, and a model that was trained on one and asked in the words of another mixes
them, so all spellings are read: `<box>a b c d</box>` with blanks, commas or `(a,b),(c,d)`; `box=[[a,b,c,d]]`; a bare
`[a, b, c, d]` or `(a,b),(c,d)`; Qwen's `<|box_start|>` and `"point_2d": [a, b]`; `<point>a b</point>`, a box without
extent; a text that is nothing but `(a, b)`. In the arguments of a tool call a name says what is a coordinate, NAMES and
TOGETHER, and nothing else is one. What the numbers count no text says: a run does, with --box_format.

Rewriting rounds to whole numbers, so a box stands within half a unit of what it is written in of where it stood.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from itertools import starmap
from typing import Any

from data.turns import Problem, decode, parts_of, short

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 with x1 <= x2 and y1 <= y2
FORMATS = "keep thousandths fractions pixels"  # of --box_format: what the rows' boxes count

CUT = "box cut at its picture's edge"  # a note about a row
MOST_DIGITS = 18

NUMBER = r"-?\d+(?:\.\d+)?"
PAIR = rf"\(\s*{NUMBER}\s*,\s*{NUMBER}\s*\)"
NAMES = ("bbox", "bbox_2d", "box", "box_2d", "point", "point_2d", "coordinate", "coordinates", "start_box", "end_box",
         "start_point", "end_point", "start_coordinate", "end_coordinate")  # of two or four numbers in JSON
TOGETHER = (("x", "y", "width", "height"), ("x", "y", "w", "h"), ("x1", "y1", "x2", "y2"), ("x", "y"), ("start_x", "start_y"),
            ("end_x", "end_y"))  # of numbers beside each other in one object
CALL = re.compile(r"(?<=<tool_call>)(.*?)(?=</tool_call>|\Z)", re.DOTALL)
NAMED = "|".join(f'(?<="{name}":)' for name in NAMES)
SPELLINGS = re.compile(
    r"<(?P<tag>box|point)>[^<]*</(?P=tag)>"
    r"|<\|box_start\|>[^<]*<\|box_end\|>"
    rf"|(?P<named>\bbox=)?(?P<twice>\[)?\[\s*{NUMBER}(?:[\s,]+{NUMBER}){{3}}\s*\](?(twice)\])"
    rf"|{PAIR}\s*,\s*{PAIR}"
    rf"|:(?:{NAMED})\s*\[\s*{NUMBER}\s*,\s*{NUMBER}\s*\]"
    rf"|\A\s*{PAIR}\s*\Z"
)


def parse_boxes(text: str) -> list[Box]:
    """All boxes and points of a text in reading order, those of the tool calls in it included; a tag with another count of
    numbers than 4 or 2 is none."""
    found: list[Box] = []
    for piece, call in split_calls(text):
        if call is None:
            found += map(ordered, filter(None, map(read_numbers, SPELLINGS.finditer(piece))))
        else:
            found += boxes_of_arguments(call.get("arguments"))
    return found


def split_calls(text: str) -> Iterator[tuple[str, dict | None]]:
    """A text in pieces, and the object of those that stand as JSON between <tool_call> and </tool_call>."""
    for number, piece in enumerate(CALL.split(text) if "<tool_call>" in text else [text]):
        call = None
        if number % 2:
            with suppress(Problem):
                call = decode(piece)
        yield piece, call if isinstance(call, dict) else None


def boxes_of_arguments(arguments: object) -> list[Box]:
    """All boxes and points in the arguments of a tool call."""
    found = []
    for owner, keys in coordinates(arguments):
        if isinstance(owner[keys[0]], str):
            found += parse_boxes(owner[keys[0]])
        else:
            found.append(ordered(corners(owner, keys)))
    return found


def ordered(box: list[float]) -> Box:
    x1, y1, x2, y2 = box
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def coordinates(node: object, named: bool = False) -> Iterator[tuple[Any, tuple]]:
    """(owner, keys): owner[key] of these keys are the two or four numbers of a point or box, or the text of some; `named`
    says that the name of `node` is one of NAMES."""
    if isinstance(node, dict):
        taken: set[str] = set()
        for keys in TOGETHER:
            if taken.isdisjoint(keys) and all(is_number(node.get(key)) for key in keys):
                taken.update(keys)
                yield node, keys
        for key, value in node.items():
            if isinstance(value, str) and key in NAMES:
                yield node, (key,)
            yield from coordinates(value, key in NAMES)
    elif isinstance(node, list) and named and len(node) in (2, 4) and all(map(is_number, node)):
        yield node, tuple(range(len(node)))
    elif isinstance(node, list):
        for item in node:
            yield from coordinates(item, named)


def is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 10**MOST_DIGITS


def corners(owner: Any, keys: tuple) -> list[float]:
    """x1, y1, x2, y2 of what coordinates() found."""
    first, second = ([owner[key] for key in some] for some in (keys[:2], keys[-2:]))
    if keys[-1] in ("height", "h"):
        second = [place + extent for place, extent in zip(first, second, strict=True)]
    return first + second


def place_boxes(turns: list[dict]) -> list[tuple[int, str, Box]]:
    """(number of the picture, role, box) of all boxes in a conversation; a box belongs to the last picture before it, else to
    the first. System turns speak of boxes, they place none."""
    found, seen = [], 0
    for turn in turns:
        for part in parts_of(turn["content"]):
            seen += part["type"] == "image"
            if part["type"] == "text" and turn["role"] != "system":
                found += [(max(seen - 1, 0), turn["role"], box) for box in parse_boxes(part["text"])]
        for call in turn.get("tool_calls", []):
            boxes = boxes_of_arguments(call["function"]["arguments"])
            found += [(max(seen - 1, 0), turn["role"], box) for box in boxes]
    return found


def strip_boxes(text: str) -> str:
    """The text without its boxes and points; those in the arguments of tool calls stay."""
    return SPELLINGS.sub(" ", text)


def read_numbers(match: re.Match) -> list[float]:
    """x1, y1, x2, y2 of one match of SPELLINGS, in the order in which they are written; [] where it is no box."""
    found = re.findall(NUMBER, match[0])
    if max(map(len, found), default=0) > MOST_DIGITS:  # a model that repeats itself
        return []
    numbers = [float(n) if "." in n else int(n) for n in found]
    numbers = numbers * 2 if len(numbers) == 2 else numbers
    return numbers if len(numbers) == 4 else []


def is_marked(match: re.Match) -> bool:
    """Whether the text itself says that this is a box or a point, by a tag or `box=`."""
    return match[0].startswith("<") or match["named"] is not None


@dataclass(frozen=True)
class Convention:
    """How a model was taught boxes: what they count, "pixels" of the picture as it sees it or "thousandths" of its sides,
    up to what number; and its words for a box and a point, by which marked ones are replaced ("": the row's words stay)."""

    unit: str
    box: str = ""  # for str.format, of the numbers x1, y1, x2, y2
    point: str = ""
    most: int = 1 << 30


@dataclass(frozen=True)
class BoxRule:
    """What the boxes of one run's text count. rows: --box_format; own: the model's Convention, None where it has none, and
    then text is kept; seen_size(width, height): at what size the model sees a picture."""

    rows: str
    own: Convention | None
    seen_size: Callable[[int, int], tuple[int, int]]

    @property
    def rewrites(self) -> bool:
        return self.rows != "keep" and self.own is not None

    @property
    def key(self) -> list:
        """All that rewritten text depends on beside the rows; the smallest and the largest picture tell the resize rule."""
        sizes = (1, 1), (9999, 9999)
        return [self.rows, repr(self.own), *map(list, starmap(self.seen_size, sizes))] if self.rewrites else []

    def row_extent(self, size: tuple[int, int]) -> tuple[float, float]:
        """The numbers at the right and the lower edge of a picture of this (width, height), as --box_format says."""
        return {"thousandths": (1000, 1000), "fractions": (1, 1)}.get(self.rows, size)

    def extent(self, size: tuple[int, int]) -> tuple[float, float]:
        """The same in the text that the model reads and writes; kept text is taken for the model's own convention."""
        if self.own is None:
            return self.row_extent(size)
        return (1000, 1000) if self.own.unit == "thousandths" else self.seen_size(*size)

    def locate(self, box: Box, size: tuple[int, int]) -> Box:
        """A box of the model's text in pixels of the picture as it is stored, of this (width, height)."""
        across, down = (side / most for side, most in zip(size, self.extent(size), strict=True))
        return box[0] * across, box[1] * down, box[2] * across, box[3] * down

    # ---- rewriting ----------------------------------------------------------------------------------------------------

    def rewrite(self, turns: list[dict], sizes: list[tuple[int, int]], notes: Counter) -> list[dict]:
        """The turns with the boxes of what is said to and by the model in its own convention. A box belongs to the last
        picture before it, else to the first; sizes are their (width, height). Problem for one outside its picture."""
        if not (self.rewrites and sizes):
            return turns
        seen, rewritten, found = 0, [], Counter()
        for turn in turns:
            parts = []
            for part in parts_of(turn["content"]):
                seen += part["type"] == "image"
                if part["type"] == "text" and turn["role"] != "system":
                    part = part | {"text": self.rewrite_text(part["text"], sizes[max(seen - 1, 0)], found)}
                parts.append(part)
            turn = turn | {"content": parts[0]["text"] if isinstance(turn["content"], str) else parts}
            if turn.get("tool_calls"):
                turn["tool_calls"] = deepcopy(turn["tool_calls"])
                for call in turn["tool_calls"]:
                    self.rewrite_arguments(call["function"]["arguments"], sizes[max(seen - 1, 0)], found)
            rewritten.append(turn)
        notes.update({f"boxes rewritten from {self.rows}": 1} if found else {})
        notes.update({CUT: 1} if found["cut"] else {})
        return rewritten

    def rewrite_text(self, text: str, size: tuple[int, int], found: Counter) -> str:
        """One text about one picture; `found` counts the boxes, and those "cut" at its edge."""

        def replace(match: re.Match) -> str:
            numbers = read_numbers(match)
            if not numbers:
                return match[0]
            x1, y1, x2, y2 = numbers
            right, bottom = self.row_extent(size)
            if not is_marked(match) and not (0 <= x1 <= x2 <= right and 0 <= y1 <= y2 <= bottom):
                return match[0]  # four numbers of something else
            return self.write(match, self.convert_box(numbers, size, match[0], found))

        written = ""
        for piece, call in split_calls(text):
            if call is None:
                written += SPELLINGS.sub(replace, piece)
                continue
            before = found["boxes"]
            self.rewrite_arguments(call.get("arguments"), size, found)
            changed = found["boxes"] > before  # else not a blank of it is touched
            written += piece.replace(piece.strip(), json.dumps(call, ensure_ascii=False)) if changed else piece
        return written

    def rewrite_arguments(self, arguments: object, size: tuple[int, int], found: Counter) -> None:
        """The boxes and points in the arguments of a tool call, in place. Problem for one outside its picture."""
        for owner, keys in list(coordinates(arguments)):
            if isinstance(owner[keys[0]], str):
                owner[keys[0]] = self.rewrite_text(owner[keys[0]], size, found)
                continue
            shown = ", ".join(f"{key} {owner[key]}" if isinstance(key, str) else str(owner[key]) for key in keys)
            numbers = self.convert_box(corners(owner, keys), size, shown, found)
            if keys[-1] in ("height", "h"):
                numbers[2:] = numbers[2] - numbers[0], numbers[3] - numbers[1]
            for key, number in zip(keys, numbers, strict=False):
                owner[key] = number

    def convert_box(self, box: list[float], size: tuple[int, int], shown: str, found: Counter) -> list[int]:
        """x1, y1, x2, y2 of the rows as whole numbers of the model's. Problem, with what is shown, for one outside its
        picture."""
        x1, y1, x2, y2 = box
        right, bottom = self.row_extent(size)
        if max(x1, x2) < 0 or max(y1, y2) < 0 or min(x1, x2) > right or min(y1, y2) > bottom:
            reach = f"{right} x {bottom} in {self.rows}, as --box_format says"
            raise Problem("a box lies outside its picture", f"{short(shown)}, the picture is {reach}")
        found["boxes"] += 1
        found["cut"] += min(box) < 0 or max(x1, x2) > right or max(y1, y2) > bottom
        return [self.convert(number, place % 2, size) for place, number in enumerate(box)]

    def convert(self, number: float, side: int, size: tuple[int, int]) -> int:
        """A number of the rows as a whole number of the model's; side 0 is along x, 1 along y."""
        most = self.extent(size)[side]
        return min(max(round(number / self.row_extent(size)[side] * most), 0), most, self.own.most)

    def write(self, match: re.Match, numbers: list[int]) -> str:
        """The box in the model's words, or in the row's: lists and pairs stay as they are, for they may stand in JSON."""
        words = self.own.point if match["tag"] == "point" else self.own.box
        if words and is_marked(match):
            return words.format(*numbers)
        written = iter(numbers)
        return re.sub(NUMBER, lambda _: str(next(written)), match[0])

    def rewrite_truth(self, truth: dict | None, sizes: list[tuple[int, int]]) -> dict | None:
        """What an answer is checked against, its "box", "elements" and "answer" as the model would write them, about the last
        picture. Problem for a box that is not four numbers."""
        if truth is None or not (self.rewrites and sizes):
            return truth

        def convert(box: list) -> list[int]:
            if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
                raise Problem("a box to check answers against is not four numbers", short(box))
            return [self.convert(number, place % 2, sizes[-1]) for place, number in enumerate(box)]

        changed = {"box": convert(truth["box"])} if "box" in truth else {}
        if isinstance(truth.get("elements"), list):
            changed["elements"] = list(map(convert, truth["elements"]))
        if isinstance(truth.get("answer"), str):
            changed["answer"] = self.rewrite_text(truth["answer"], sizes[-1], Counter())
        return truth | changed


def stored_size(width: int, height: int) -> tuple[int, int]:
    return width, height


KEEP = BoxRule("keep", None, stored_size)


def boxes_of(family: Any) -> BoxRule:
    """The rule of a family, made with the --box_format of its options."""
    return BoxRule(family.options.box_format, family.box_convention, family.seen_size)
