"""Rows of GUICourse as its authors publish them (GUIEnv, GUIAct, GUIChat) in the words that the model is trained with.

The words are those of GUICourse's own converter, so that answers compare with its published ones; its faults are not:
`scroll` has its own share to the right (there it is a copy of the share down), an action with a name that is not known is
a problem of its row (there it is left out of the answer), thousandths are rounded (there int() makes 569 of 0.57), and
training and test rows share one prompt (there the test's begins otherwise). Boxes and points are written as
<box>(x1,y1),(x2,y2)</box> and <point>(x,y)</point>, in thousandths of the picture.
"""

import re

from data.turns import MARK, Problem, short

# The missing line end before "## Input" is the data set's; models are asked with it.
GUIENV_PROMPT = (
    MARK + "\n## Your Task\nIf the input is a string, please give me the element regions including this string. Else if "
    "the input is a region, please give me the string (text) in this region.## Input\n{}\n## Output\n"
)
PLACE = re.compile(r"<(box|point)>([^<]*)</\1>")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE]-?\d+)?")
INLINE = re.compile(r"<image>([^<>\n]+)</image>")
# What follows an action's name in its line of the answer.
ACTIONS = {
    "click": ["element"], "hover": ["element"], "tap": ["point"], "input": ["text"], "answer": ["text"],
    "select": ["element", "text"], "select_text": ["dual_point"], "swipe": ["dual_point"], "scroll": ["scroll"],
    "copy": [], "enter": [], "go_back": [], "go_home": [], "task_complete": [], "task_impossible": [],
}  # fmt: skip


def convert_row(row: dict) -> tuple[dict, list[str]]:
    """(a row to train on, whose pictures are still ids, the ids). Raises Problem, or LookupError, TypeError, ValueError for
    a row of another shape."""
    if "task_type" in row:
        turns = _guienv_turns(row)
    elif "actions_label" in row:
        turns = _guiact_turns(row)
    else:
        return _guichat_row(row)
    conversations = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=True)]
    return {"id": row["uid"], "image": row["image_id"], "conversations": conversations}, [row["image_id"]]


def _guienv_turns(row: dict) -> tuple[str, str]:
    question, answer = row["question"], row["answer"]
    if row["task_type"] == "bbox2text":
        question = _places(question)
    elif row["task_type"] == "text2bbox":
        answer = _places(answer)
    else:
        raise Problem("unknown task_type", short(row["task_type"]))
    return GUIENV_PROMPT.replace("{}", question), answer  # refuses what is no text, where format() writes None or a dict


def _guiact_turns(row: dict) -> tuple[str, str]:
    history, logs, thoughts = (row.get(name) for name in ("actions_history", "logs", "thoughts"))
    prompt = f"{MARK}\n" + f"Actions History\n{history}\n" * bool(history) + f"Informations\n{logs}\n" * bool(logs)
    prompt += "Your Task\n" + row["question"] + "\nGenerate next actions to do this task."
    actions = row["actions_label"] if isinstance(row["actions_label"], list) else [row["actions_label"]]
    answer = f"thoughts: {thoughts}\n" * bool(thoughts) + "actions:\n"
    return prompt, answer + "".join(_action_line(action) + "\n" for action in actions)


def _action_line(action: dict) -> str:
    """`click, <box>(328,502),(668,534)</box>`."""
    name = action["name"].lower()
    name = "copy" if name == "copy_text" else name
    if name not in ACTIONS:
        raise Problem("unknown action", short(action["name"]))
    words = [name]
    for field in ACTIONS[name]:
        value = action[field]
        if field == "dual_point":
            value = value.get("related", value)
            words.append(f"from {_places(value['from'])} to {_places(value['to'])}")
        elif field == "scroll":
            value = value.get("related", value)
            words.append("down {} right {}".format(*(round(1000 * float(value[way])) for way in ("down", "right"))))
        else:
            words.append(value if field == "text" else _places(value))
    return ", ".join(words)


def _places(value: dict | list | str) -> str:
    """Boxes or points given as shares of the picture, in thousandths, one a line. Raises Problem for one outside of it."""
    value = value["related"] if isinstance(value, dict) else value
    return "\n".join(map(_place, value)) if isinstance(value, list) else _place(value)


def _place(text: str) -> str:
    found = PLACE.fullmatch(text.strip())
    shares = [float(number) for number in NUMBER.findall(found[2])] if found else []
    if not found or len(shares) != {"box": 4, "point": 2}[found[1]]:
        raise Problem("not a box or point", short(text))
    if not all(0 <= share <= 1 for share in shares):
        raise Problem("a box or point outside of the picture", short(text))
    return _write(found[1], [round(1000 * share) for share in shares])


def _write(tag: str, numbers: list[int]) -> str:
    pairs = [f"({x},{y})" for x, y in zip(numbers[::2], numbers[1::2], strict=True)]
    return f"<{tag}>{','.join(pairs)}</{tag}>"


def _guichat_row(row: dict) -> tuple[dict, list[str]]:
    """A conversation with its pictures' ids inline and its boxes in thousandths already."""
    ids: list[str] = []

    def mark(found: re.Match) -> str:
        ids.append(found[1])
        return f"<image_{len(ids) - 1:02}>"

    turns = [{"from": turn["from"], "value": INLINE.sub(mark, PLACE.sub(_rewrite, turn["value"]))} for turn in row["text"]]
    image = {f"<image_{number:02}>": image_id for number, image_id in enumerate(ids)} or row["image_id"]
    return {"id": row["uid"], "image": image, "conversations": turns}, ids or [row["image_id"]]


def _rewrite(found: re.Match) -> str:
    """A box of an answer in the form of the other rows; what is none stays as it is."""
    numbers = [round(float(number)) for number in NUMBER.findall(found[2])]
    return _write(found[1], numbers) if len(numbers) == {"box": 4, "point": 2}[found[1]] else found[0]
