"""Tasks of web agents: Mind2Web's recorded actions on full-page screenshots, and WebVoyager's tasks without answers.

A page is up to ten screens high, and what an agent sees is one of them. So a row of Mind2Web shows the screen that its
target is on: 1280 x 720, the window in which it was recorded, at the place where scrolling by whole screens stops. The
place must not follow from the target: in a window centred on it, the answer is always the middle.
"""

from base64 import b64encode
from collections.abc import Callable

from data.dialects import Question, dialect, has
from data.images import picture_format
from data.turns import Problem, decode, short

WINDOW = (1280, 720)  # pixels; --max_pixels shrinks it further


def window_around(box: tuple, page: tuple[int, int], window: tuple[int, int] = WINDOW) -> tuple[int, int, int, int]:
    """(left, top, width, height) of the part of a page, (width, height), that shows a box (x, y, width, height).

    On each axis: the screen of the box's middle when scrolling by whole screens, moved as little as the box needs to be
    whole in it and the window to stay on the page.
    """
    starts, sizes = [], []
    for start, extent, length, size in zip(box[:2], box[2:], page, window, strict=True):
        size = min(size, length)
        place = (start + extent / 2) // size * size
        if extent <= size:
            place = max(start + extent - size, min(place, start))
        starts.append(int(max(0, min(place, length - size))))
        sizes.append(size)
    return (*starts, *sizes)


@dialect("Mind2Web", has("screenshot", "operation", "pos_candidates"), pictures=False, measures=True)
def _read_mind2web(row: dict, size_of: Callable[[str], tuple[int, int]]) -> list:
    """One recorded action: the screen, the task and the true actions before it -> `TYPE Boston <box>(x1,y1),(x2,y2)</box>`,
    the box in thousandths of the screen."""
    page = size_of(row["screenshot"])
    box = _target_box(row["pos_candidates"], page)
    left, top, width, height = window_around(box, page)
    x, y = box[0] - left, box[1] - top
    corners = [min(1000, max(0, round(1000 * place / size)))
               for place, size in ((x, width), (y, height), (x + box[2], width), (y + box[3], height))]
    operation = row["operation"] if isinstance(row["operation"], dict) else decode(row["operation"])
    words = " ".join(filter(None, (operation["op"], operation.get("value"))))
    done = (row.get("action_reprs") or [])[: int(row.get("target_action_index") or 0)]
    # + and not an f-string, which would write a number or an object as text where the row is wrong
    history = "".join(f"\n{number}. " + action for number, action in enumerate(done, 1)) or " none"
    picture = {"type": "image", "image": f"{_as_text(row['screenshot'])}#xywh={left},{top},{width},{height}"}
    prompt = ("Task: " + row["confirmed_task"] + f"\nActions so far:{history}\n"
              "What is the next action? Answer with CLICK, TYPE or SELECT, the text if there is one, and the element's box.")
    answer = "{} <box>({},{}),({},{})</box>".format(words, *corners)
    return [{"role": "user", "content": [picture, {"type": "text", "text": prompt}]}, {"role": "assistant", "content": answer}]


def _as_text(picture: str | bytes) -> str:
    """A path as it is, a picture out of a table as a data URL."""
    if isinstance(picture, str):
        return picture
    return f"data:image/{picture_format(picture).lower()};base64,{b64encode(picture).decode()}"


def _target_box(candidates: list, page: tuple[int, int]) -> tuple[float, float, float, float]:
    """(x, y, width, height) of the target on the page, cut to it. Raises Problem for a row without a visible target."""
    candidates = [decode(item) if isinstance(item, str) else item for item in candidates]
    if not candidates:
        raise Problem("no element to act on", "pos_candidates is empty")
    target = next((item for item in candidates if item.get("is_original_target")), candidates[0])
    attributes = target["attributes"]
    attributes = decode(attributes) if isinstance(attributes, str) else attributes
    x, y, width, height = map(float, attributes["bounding_box_rect"].split(","))
    right, bottom = min(x + width, page[0]), min(y + height, page[1])
    x, y = max(x, 0), max(y, 0)
    if right <= x or bottom <= y:
        raise Problem("the element to act on is not on the page", f"its box is {short(attributes['bounding_box_rect'])}")
    return x, y, right - x, bottom - y


@dialect("raw Mind2Web", has("annotation_id", "confirmed_task", "actions"))
def _read_raw_mind2web(row: dict) -> list:
    raise Problem("a raw Mind2Web task", "its actions have html and no screen; python -m data download mind2web fetches "
                  "Multimodal-Mind2Web, the same tasks with a screenshot for each action")


@dialect("WebVoyager", has("web_name", "ques", "web"))
def _read_webvoyager(row: dict) -> Question:
    """A task without its answer; the site is what scores are reported by."""
    prompt = "Task: " + row["ques"] + "\nStart page: " + row["web"]
    return Question([{"role": "user", "content": prompt}], {"site": row["web_name"], "url": row["web"]})
