"""One row's JSON, turns, tool calls and pictures, read in every shape in which people write them.

What is common to all dialects (data/dialects.py): typed or plain content, roles under two names, calls as objects or as
strings, pictures named in the row or in the turn and placed by a mark in the text. What cannot be read is a Problem.
"""

import json
import math
import re
from collections import Counter

MAX_ROW_BYTES = 64 * 2**20
MAX_DEPTH = 100  # of a row: what walks one later has Python's limit of 1,000 frames, and not all of them to itself
MARK = "<image>"
MARKS = re.compile(r"(<image(?:_\d+)?>)")  # GUICourse numbers them where a row has several pictures
PICTURE_KEYS = ("image", "images", "screenshot")
PART_KEYS = ("image", "image_url", "path", "url")  # of a picture among the parts of a turn
NOT_TAKEN = ("video", "videos", "audio", "audios")  # by any model here
# What a reader of one shape of row meets in a row of another shape.
MISSHAPEN = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
TURN_KEYS = {"role", "from", "content", "value", "tool_calls", "function_call", "train", *PICTURE_KEYS}
ROLES = {name: name for name in ("system", "user", "assistant", "tool")} | {
    "human": "user", "gpt": "assistant", "developer": "system", "observation": "tool", "function_call": "assistant",
    "function": "tool",
}  # fmt: skip


class Problem(Exception):
    """What is wrong with one row. `kind` reads the same for the same fault, so that a summary can count it."""

    def __init__(self, kind: str, detail: str = "", folder: str | None = None):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.folder = folder  # the image root that would admit the picture
        self.row_id = None


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- JSON ----------------------------------------------------------------------------------------------------------

def decode(raw: bytes | str, is_row: bool = False) -> object:
    """JSON that can be tokenized and written again: UTF-8, no lone surrogate, no infinity, not MAX_DEPTH deep, no key twice in
    one object, of which JSON would keep the last in silence, and NaN only as a field of a row: so pandas writes an empty
    cell, and it is null here."""
    if len(raw) > MAX_ROW_BYTES:
        raise Problem("row too large", f"more than {MAX_ROW_BYTES:,} bytes")
    try:
        text = (raw if isinstance(raw, str) else raw.decode("utf-8-sig")).rstrip("\r\n")
        value = _decoder.decode(text)
        if "NaN" in text:
            value = _without_nan(value, is_row)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise Problem("not valid UTF-8", f"{error.reason}; save the file as UTF-8") from None
    except RecursionError:
        raise Problem("nested too deeply", f"more than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:  # by its place in the row: the line is the file's
        raise Problem("not valid JSON", f"{error.msg} (after {error.pos} of {len(text)} letters)") from None
    except ValueError as error:
        raise Problem("not valid JSON", str(error)) from None
    _refuse_deep(value)
    return value


def _refuse_deep(value: object) -> None:
    """Problem for lists and objects inside each other more than MAX_DEPTH times."""
    level = [value]
    for _ in range(MAX_DEPTH):
        nodes = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list)]
        if not nodes:
            return
        level = [child for node in nodes for child in node]
    raise Problem("nested too deeply", f"more than {MAX_DEPTH} levels")


def _without_nan(value: object, is_row: bool) -> object:
    """The value, a row with null for NaN in its fields; Problem for a NaN anywhere else."""
    if is_row and isinstance(value, dict):
        value = {key: None if isinstance(cell, float) and math.isnan(cell) else cell for key, cell in value.items()}
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise Problem("a number is NaN", "what is trained on has to be a number or null") from None
    return value


def _finite(number: str) -> float:
    value = float(number)  # "NaN" and "Infinity" come here too, and 1e999 is infinite
    if math.isinf(value):
        raise Problem("a number is infinite", number[:20])
    return value


def _once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise Problem("a key stands twice in one object", short(next(name for name in names if names.count(name) > 1)))
    return found


_decoder = json.JSONDecoder(parse_float=_finite, parse_constant=_finite, object_pairs_hook=_once)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_objects(value: object, name: str) -> list[dict]:
    """`tools` or `tool_calls`: a list of objects, or the same as a JSON string."""
    if value is None or value == "":
        return []
    value = decode(value) if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Problem(f"{name} is not a list of objects", short(value))
    return value


def read_tools(value: object) -> list[dict]:
    """A row's tools, each {"type": "function", "function": {"name", ..}} or the inner object alone."""
    tools = read_objects(value, "tools")
    for tool in tools:
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise Problem("a tool has no name", short(tool))
    return tools


# ---- Turns: every shape of a message as one ------------------------------------------------------------------------

def parts_of(content: str | list[dict]) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def role_of(turn: dict) -> str | None:
    """Who speaks in a turn, under whichever name; None where the name is none of ROLES."""
    name = turn.get("role", turn.get("from"))
    return ROLES.get(name) if isinstance(name, str) else None


def are_turns(value: object) -> bool:
    """Whether a value is a turn or a list of some: objects that each say who speaks, and what."""
    turns = value if isinstance(value, list) else [value]
    said = {"content", "value", "tool_calls", "function_call"}
    return bool(turns) and all(isinstance(turn, dict) and role_of(turn) and not said.isdisjoint(turn) for turn in turns)


def answer_of(answer: object) -> list:
    """An answer as turns: turns as they are, one turn alone, anything else as the assistant's content."""
    if isinstance(answer, list):
        return answer
    return [answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}]


def turns_of(prompt: object) -> list:
    """A prompt as turns: turns as they are, a text rendered with Qwen's template taken apart, other text as the user's."""
    if isinstance(prompt, list):
        return prompt
    if not isinstance(prompt, str):
        raise Problem("a prompt is neither text nor turns", short(prompt))
    if not prompt.startswith("<|im_start|>"):
        return [{"role": "user", "content": prompt}]
    turns = split_chat(prompt)
    if turns[-1] == {"role": "assistant", "content": "", "tool_calls": []}:
        turns.pop()  # the header that a prompt for generation ends with
    return turns


def split_chat(text: str) -> list[dict]:
    """The turns of a chat rendered with Qwen's template, so that its answers are known from its prompts."""
    turn = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n?|\Z)", re.DOTALL)
    if turn.sub("", text).strip() or not turn.search(text):
        raise Problem("text without chat markup", "prompt and answer cannot be told apart; write <|im_start|>user ... "
                      "<|im_end|> turns into it, or give the row as messages or as prompt and completion")
    turns = []
    for role, content in turn.findall(text.replace("<|vision_start|><|image_pad|><|vision_end|>", MARK)):
        content, *calls = re.split(r"\n?<tool_call>", content) if role == "assistant" else [content]
        calls = [decode(call.strip().removesuffix("</tool_call>")) for call in calls]
        turns.append({"role": role, "content": content, "tool_calls": calls})
    return turns


def _read_part(part: object, number: int) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "image_url"):
        raise Problem("a content part is neither text nor image", f"turn {number} has {short(part)}")
    path = next((part[key] for key in PART_KEYS if part.get(key) is not None), None)
    if path is None and part.get("source") is not None:  # Anthropic's; without any of the two the row names the picture
        raise Problem("an image part names its picture in another way", f"turn {number} has {short(part)}; known are "
                      f"{', '.join(PART_KEYS)}: a path, or a URL that begins with data:image/png;base64,")
    return {"type": "image", "image": path.get("url") if isinstance(path, dict) else path}


def _read_calls(value: object, notes: Counter) -> list[dict]:
    calls = []
    for call in read_objects(value, "tool_calls"):
        call = call["function"] if isinstance(call.get("function"), dict) else call
        name, arguments = call.get("name"), call.get("arguments")
        if not isinstance(name, str) or not name:
            raise Problem("a tool call has no name", short(call))
        if isinstance(arguments, str):
            arguments = decode(arguments)
            if isinstance(arguments, str):  # some servers encode what is a string already
                arguments = decode(arguments)
            notes["arguments decoded from a JSON string"] += 1
        if not isinstance(arguments, dict):
            raise Problem("the arguments of a tool call are not an object", f"{name} has {short(arguments)}")
        calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def read_turn(item: object, number: int, notes: Counter) -> dict:
    if not isinstance(item, dict):
        raise Problem("a turn is not an object", f"turn {number} is {short(item)}")
    name, role = item.get("role", item.get("from")), role_of(item)
    if role is None:
        raise Problem("unknown role", f"turn {number} has {short(name)}; known are {', '.join(ROLES)}")
    content, train = item.get("content", item.get("value")), item.get("train")
    if name == "function_call":  # ShareGPT's: the turn is a call in JSON, or a list of some
        calls = decode(content) if isinstance(content, str) else content
        item, content = item | {"tool_calls": calls if isinstance(calls, list) else [calls]}, ""
    if item.get("function_call") is not None:  # OpenAI's word for one call, before tool_calls
        item = item | {"tool_calls": [*read_objects(item.get("tool_calls"), "tool_calls"), item["function_call"]]}
    if train is None and role == "assistant" and item.get("weight") in (0, 1):  # OpenAI's word for it
        item, train = item | {"weight": None}, bool(item["weight"])
    if isinstance(content, list):
        content = [_read_part(part, number) for part in content]
    elif content is None and role == "assistant":
        content = ""
    elif not isinstance(content, str):
        raise Problem("content is neither text nor a list of parts", f"turn {number} has {short(content)}")
    turn = {"role": role, "content": content}
    if calls := _read_calls(item.get("tool_calls"), notes):
        turn["tool_calls"] = calls
    if calls and role != "assistant":
        raise Problem("tool calls outside an assistant turn", f"turn {number} is the {role}'s")
    if train is not None:
        turn["train"] = train
    if not isinstance(train, bool | None):
        raise Problem("train is neither true nor false", f"turn {number} has {short(train)}")
    for key in item.keys() - TURN_KEYS:
        if item[key] is not None:
            notes[f"key {short(key)} of a turn ignored"] += 1
    if pictures := read_pictures(item):
        place_pictures([turn], pictures, marks=True, last=False, gap="")
    return turn


def finish_turns(turns: list[dict], side: str) -> None:
    """Join neighbouring texts; refuse what cannot be trained on: no user first, nothing to learn, an empty answer (which
    a model may well have been refused for)."""
    speakers = [turn["role"] for turn in turns if turn["role"] != "system"]
    if speakers[:1] != ["user"]:
        raise Problem("the first turn is not the user's", f"it is the {speakers[0]}'s" if speakers else "there is none")
    for number, turn in enumerate(turns, 1):
        if isinstance(turn["content"], list):
            parts = []
            for part in turn["content"]:
                if parts and part["type"] == parts[-1]["type"] == "text":
                    parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
                else:
                    parts.append(part)
            has_picture = any(part["type"] == "image" for part in parts)
            turn["content"] = parts if has_picture else "".join(part["text"] for part in parts)
            if has_picture and turn["role"] in ("system", "assistant"):
                raise Problem("a picture outside a user turn", f"turn {number} is the {turn['role']}'s")
    trained = [turn for turn in turns if turn["role"] == "assistant" and turn.get("train", True)]
    if side == "prompt" and turns[-1]["role"] == "assistant":
        raise Problem("a prompt ends with the assistant's turn", "nothing is left to answer")
    if side != "prompt" and not trained:
        raise Problem("no assistant turn to learn from")
    if side != "rejected" and any(not turn["content"] and "tool_calls" not in turn for turn in trained):
        raise Problem("an assistant turn has neither text nor tool call", 'give it "train": false or remove it')


# ---- Pictures: which, and where in the turns -----------------------------------------------------------------------

def read_pictures(source: dict) -> list[tuple[str, object]]:
    """(mark in the text, path) of the pictures of a row or a turn: a path, a list of paths, or {"<image_00>": path}."""
    if other := next((key for key in NOT_TAKEN if source.get(key)), None):
        raise Problem(f"{other} is not taken", f"{short(source[other])}; pictures and text are; leave the row out")
    pictures = []
    for value in (source[key] for key in PICTURE_KEYS if source.get(key) is not None):
        if not isinstance(value, dict) or value.keys() == {"bytes", "path"}:
            pictures += [(MARK, _path_of(item)) for item in (value if isinstance(value, list) else [value])]
        elif all(map(MARKS.fullmatch, value)):
            pictures += value.items()
        else:
            raise Problem("the names of pictures are not marks", f"{short(list(value))}; expected such as <image_00>")
    return pictures


def _path_of(picture: object) -> object:
    """{"bytes": null, "path": ..} is how the datasets library writes a picture into JSON."""
    is_struct = isinstance(picture, dict) and picture.keys() == {"bytes", "path"} and picture["bytes"] is None
    return picture["path"] if is_struct else picture


def place_pictures(turns: list[dict], pictures: list, marks: bool, last: bool, gap: str) -> None:
    """Put each picture where its mark stands in a user turn (in the text if `marks`, or a part {"type": "image"}
    without a path); without any mark, all go in front of the first (or last) user turn, followed by `gap`.
    """
    users = [turn for turn in turns if turn["role"] in ("user", "tool")]
    if pictures and not users:
        raise Problem("a picture outside a user turn")
    places = []
    for turn in users:
        parts = []
        for part in parts_of(turn["content"]):
            if part["type"] == "image":
                parts.append(part)
                continue
            for position, piece in enumerate(MARKS.split(part["text"]) if marks else [part["text"]]):
                if position % 2:  # split() puts the marks between the texts
                    parts.append({"type": "image", "image": None, "mark": piece})
                elif piece:
                    parts.append({"type": "text", "text": piece})
        turn["content"] = parts
        places += [part for part in parts if part["type"] == "image" and part["image"] is None]
    if pictures and not places:
        turn = users[-1 if last else 0]
        turn["content"] = [{"type": "image", "image": path} for _, path in pictures] + \
            [{"type": "text", "text": gap}] * bool(gap) + turn["content"]
        return
    waiting = list(pictures)
    for place in places:
        mark = place.pop("mark", None)
        found = next((picture for picture in waiting if mark in (None, picture[0])), None)
        if found is not None:
            waiting.remove(found)
            place["image"] = found[1]
    if waiting or len(places) != len(pictures):
        raise Problem("marks and pictures do not match", f"the user turns have {len(places)} ({MARK} or image parts "
                      f"without a path), {' or '.join(PICTURE_KEYS)} names {len(pictures)}: {short(pictures)}")
