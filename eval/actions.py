"""Actions on a screen as GUICourse writes them, one a line (`click, <box>..</box>`), and when two of them do the same.

The rules are GUIAct's (arXiv 2406.11317, appendix): an answer's first actions are compared place by place with the
label's, a missing one fails, further ones are ignored, and a step succeeds if all of them do. Boxes are
compared in thousandths of the picture, which the data set counts. Written from the rules; no line of text is taken for an
action that it is not.
"""

import math
import re
from dataclasses import dataclass

from data.boxes import Box, parse_boxes, strip_boxes
from data.errors import UserError
from eval.boxes import centre, holds, intersection_over_union
from eval.metrics import Reply, f1

NAMES = ("click", "tap", "hover", "input", "answer", "select", "select_text", "scroll", "swipe", "copy", "enter")
LINE = re.compile(rf"({'|'.join(sorted(NAMES, key=len, reverse=True))})(?:[ \t]*[, ][ \t]*(.*)|[ \t]*)$")
NEAR = 140  # thousandths of the picture between two taps that do the same
SAME = 0.5  # word F1 of two texts, or overlap of two selections, above which they do the same
ATTACHED = 0.1  # overlap above which a box belongs to the element that it overlaps most, else to the nearest


@dataclass
class Action:
    """What is done, with the rest of its line."""

    name: str
    rest: str = ""
    extent: tuple[float, float] = (1000, 1000)

    @property
    def boxes(self) -> list[Box]:
        return [in_thousandths(box, self.extent) for box in parse_boxes(self.rest)]

    @property
    def text(self) -> str:
        """The rest without its boxes."""
        return strip_boxes(self.rest).strip(" ,")

    @property
    def span(self) -> Box | None:
        """From one point to another: x1, y1, x2, y2 in this order; None without two points."""
        boxes = self.boxes
        return centre(boxes[0]) + centre(boxes[1]) if len(boxes) == 2 else None

    @property
    def direction(self) -> str | None:
        """Where a scroll or a swipe goes, by its longer part: vertical if both are equal, up if both are 0."""
        found = re.search(r"down\s+(-?[\d.]+)\s+right\s+(-?[\d.]+)", self.rest)
        if found is None and self.span is None:
            word = re.match(r"(up|down|left|right)\b", self.rest)
            return word and word[0]
        x1, y1, x2, y2 = (0, 0, read_number(found[2]), read_number(found[1])) if found else self.span
        across, down = x2 - x1, y2 - y1
        if abs(down) >= abs(across):
            return "down" if down > 0 else "up"
        return "right" if across > 0 else "left"


def read_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # "1.2.3"
        return 0.0


def in_thousandths(box: Box, extent: tuple[float, float]) -> Box:
    """A box that counts to `extent`, in thousandths of the picture."""
    across, down = 1000 / extent[0], 1000 / extent[1]
    return box[0] * across, box[1] * down, box[2] * across, box[3] * down


def parse_actions(text: str, extent: tuple[float, float] = (1000, 1000)) -> list[Action]:
    """The actions of an answer, after its `actions:` line if it has one; other lines go on with the text before them."""
    actions: list[Action] = []
    for line in text.rpartition("actions:")[2].strip().split("\n"):
        found = LINE.match(line.strip())
        if found:
            actions.append(Action(found[1], (found[2] or "").strip(), extent))
        elif actions and line.strip():
            actions[-1].rest += "\n" + line.strip()
    return actions


def step_success(reply: Reply) -> dict[str, float]:
    """GUIAct's step: step_success, type_match (the same names in the same order) and, where the label clicks or taps,
    click_accuracy. A row whose truth has "elements" (boxes) compares the elements clicked on, else the click has to
    land in the label's box. Raises UserError for a label without actions."""
    expected = parse_actions(reply.label, reply.extent)
    if not expected:
        raise UserError(f"the label has no action: {reply.label[:60]!r}; one is a line such as 'click, <box>1 2 3 4</box>'")
    actions = parse_actions(reply.response, reply.extent)
    elements = [in_thousandths(box, reply.extent) for box in (reply.truth or {}).get("elements", [])]
    pairs = zip(actions + [None] * len(expected), expected, strict=False)
    done = [action is not None and does_the_same(action, other, elements) for action, other in pairs]
    clicks = [right for right, action in zip(done, expected, strict=True) if action.name in ("click", "tap")]
    scores = {
        "step_success": float(all(done)),
        "type_match": float([action.name for action in actions] == [action.name for action in expected]),
    }
    return scores | ({"click_accuracy": sum(clicks) / len(clicks)} if clicks else {})


def does_the_same(action: Action, expected: Action, elements: list[Box] | None = None) -> bool:
    """Whether an action succeeds where `expected` is right."""
    name = expected.name
    if action.name != name:
        return False
    if name in ("click", "hover"):
        return same_element(action, expected, elements)
    if name == "tap":
        return bool(action.boxes and expected.boxes) and distance(action.boxes[0], expected.boxes[0]) <= NEAR
    if name in ("input", "answer"):
        return f1(action.rest, expected.rest) > SAME
    if name == "select":
        return f1(action.text, expected.text) > SAME and same_element(action, expected, elements)
    if name == "select_text":
        return bool(action.span and expected.span) and overlap(action.span, expected.span) > SAME
    if name in ("scroll", "swipe"):
        return action.direction is not None and action.direction == expected.direction
    return True  # copy, enter


def same_element(action: Action, expected: Action, elements: list[Box] | None) -> bool:
    """Whether two actions point at one element; without a list of elements, whether the point lies in the label's box."""
    if not action.boxes or not expected.boxes:
        return False
    box, other = action.boxes[0], expected.boxes[0]
    if elements:
        return attached(box, elements) == attached(other, elements)
    return holds(other, centre(box))


def attached(box: Box, elements: list[Box]) -> int:
    """The number of the element that a box belongs to."""
    best = max(range(len(elements)), key=lambda n: intersection_over_union(box, tuple(elements[n])))
    if intersection_over_union(box, tuple(elements[best])) > ATTACHED:
        return best
    return min(range(len(elements)), key=lambda n: distance(box, tuple(elements[n])))


def distance(a: Box, b: Box) -> float:
    """Between the centres of two boxes."""
    return math.dist(centre(a), centre(b))


def overlap(a: Box, b: Box) -> float:
    """Of the boxes between two points each, whichever corner comes first."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    first = min(ax1, ax2), min(ay1, ay2), max(ax1, ax2), max(ay1, ay2)
    return intersection_over_union(first, (min(bx1, bx2), min(by1, by2), max(bx1, bx2), max(by1, by2)))
