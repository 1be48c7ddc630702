"""The keys of a row -> the turns of a conversation, in one form for every dialect, or one sentence why not.

A dialect is one small function in the table DIALECTS. A dialect of your own is a file data/dialect_<name>.py with such a
function under `@dialect(...)`; it is found by listing, and asked before those of this file.
"""

import importlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MAX_ROW_BYTES = 64 * 2**20
MARK = "<image>"
MARKS = re.compile(r"(<image(?:_\d+)?>)")  # GUICourse numbers them where a row has several pictures
PICTURE_KEYS = ("image", "images", "screenshot")
TURN_KEYS = {"role", "from", "content", "value", "tool_calls", "train", *PICTURE_KEYS}
ID_KEYS = ("id", "uid", "prompt_id")
ROLES = {name: name for name in ("system", "user", "assistant", "tool")} | {"human": "user", "gpt": "assistant"}


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

def decode(raw: bytes | str) -> object:
    """JSON that can be tokenized and written again: UTF-8, no lone surrogate, no NaN, no infinity."""
    if len(raw) > MAX_ROW_BYTES:
        raise Problem("row too large", f"more than {MAX_ROW_BYTES:,} bytes")
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8-sig")
        value = _decoder.decode(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise Problem("not valid UTF-8", error.reason) from None
    except RecursionError:
        raise Problem("nested too deeply") from None
    except ValueError as error:
        raise Problem("not valid JSON", str(error)) from None
    return value


def _finite(number: str) -> float:
    value = float(number)  # "NaN" and "Infinity" come here too, and 1e999 is infinite
    if value - value != 0:
        raise Problem("a number is NaN or infinite", number[:20])
    return value


_decoder = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_objects(value: object, name: str) -> list[dict]:
    """`tools` or `tool_calls`: a list of objects, or the same as a JSON string."""
    if value is None or value == "":
        return []
    value = decode(value) if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Problem(f"{name} is not a list of objects", short(value))
    return value


# ---- Turns: every shape of a message as one ------------------------------------------------------------------------

def parts_of(content: str | list[dict]) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _read_part(part: object, number: int) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "image_url"):
        raise Problem("a content part is neither text nor image", f"turn {number} has {short(part)}")
    path = next((part[key] for key in ("image", "image_url", "path", "url") if part.get(key) is not None), None)
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
            notes["arguments decoded from a JSON string"] += 1
        if not isinstance(arguments, dict):
            raise Problem("the arguments of a tool call are not an object", f"{name} has {short(arguments)}")
        calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def _read_turn(item: object, number: int, notes: Counter) -> dict:
    if not isinstance(item, dict):
        raise Problem("a turn is not an object", f"turn {number} is {short(item)}")
    name = item.get("role", item.get("from"))
    if not isinstance(name, str) or name not in ROLES:
        raise Problem("unknown role", f"turn {number} has {short(name)}; known are {', '.join(ROLES)}")
    role, content, train = ROLES[name], item.get("content", item.get("value")), item.get("train")
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
    if pictures := _read_pictures(item):
        _place_pictures([turn], pictures, marks=True, last=False, gap="")
    return turn


def _finish_turns(turns: list[dict]) -> None:
    """Join neighbouring texts; refuse what cannot be trained on: no user first, nothing to learn, an empty answer."""
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
    if not trained:
        raise Problem("no assistant turn to learn from")
    if any(not turn["content"] and "tool_calls" not in turn for turn in trained):
        raise Problem("an assistant turn has neither text nor tool call", 'give it "train": false or remove it')


# ---- Pictures: which, and where in the turns -----------------------------------------------------------------------

def _read_pictures(source: dict) -> list[tuple[str, object]]:
    """(mark in the text, path) of the pictures of a row or a turn: a path, a list of paths, or {"<image_00>": path}."""
    pictures = []
    for value in (source[key] for key in PICTURE_KEYS if source.get(key) is not None):
        if not isinstance(value, dict):
            pictures += [(MARK, path) for path in (value if isinstance(value, list) else [value])]
        elif all(map(MARKS.fullmatch, value)):
            pictures += value.items()
        else:
            raise Problem("the names of pictures are not marks", f"{short(list(value))}; expected such as <image_00>")
    return pictures


def _place_pictures(turns: list[dict], pictures: list, marks: bool, last: bool, gap: str) -> None:
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


# ---- Dialects: the keys of a row -> turns --------------------------------------------------------------------------

@dataclass(frozen=True)
class Dialect:
    """One shape of row: read(row) gives turns as {"role" | "from", "content" | "value"}; the rest is common to all."""

    name: str
    recognises: Callable[[dict], bool]
    read: Callable[[dict], list]
    marks: bool  # <image> or <image_1> in a user turn always stands for a picture; else only in a row that has pictures
    last: bool  # pictures without a mark go in front of the last user turn, else of the first
    gap: str  # the text between such pictures and the turn


DIALECTS: list[Dialect] = []  # the newest is asked first


def dialect(name: str, recognises: Callable[[dict], bool], *, marks: bool = False, last: bool = False, gap: str = ""):
    """Add the decorated function, read(row) -> turns, to the table. It may raise Problem."""
    def register(read: Callable[[dict], list]) -> Callable[[dict], list]:
        DIALECTS.insert(0, Dialect(name, recognises, read, marks, last, gap))
        return read
    return register


def has(*keys: str) -> Callable[[dict], bool]:
    """Recognises a row that has all of these keys."""
    return lambda row: row.keys() >= set(keys)


def _has_cogagent_picture(row: dict) -> bool:
    messages = row.get("messages")
    return isinstance(messages, list) and any(isinstance(item, dict) and "image" in item for item in [row, *messages])


@dialect("messages", has("messages"))
def _read_messages(row: dict) -> list:
    return row["messages"]


@dialect("CogAgent", _has_cogagent_picture, last=True)
def _read_cogagent(row: dict) -> list:
    return row["messages"]


@dialect("GUICourse", has("conversations"), marks=True, gap="\n")
def _read_guicourse(row: dict) -> list:
    return row["conversations"]


@dialect("prompt/completion", has("prompt", "completion"))
def _read_completion(row: dict, key: str = "prompt") -> list:
    prompt, answer = row[key], row["completion"]
    prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    answer = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    # What the assistant said before the completion is context, not something to learn.
    return [turn | {"train": False} if turn.get("role") == "assistant" else turn for turn in prompt] + answer


@dialect("query/completion", has("query", "completion"))
def _read_query(row: dict) -> list:
    return _read_completion(row, "query")


@dialect("text + screenshot", has("text", "screenshot"), marks=True, last=True)
def _read_chat_text(row: dict) -> list:
    """A chat rendered with Qwen's template, taken apart again so that its answers are known from its prompts."""
    turn = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n?|\Z)", re.DOTALL)
    if turn.sub("", row["text"]).strip() or not turn.search(row["text"]):
        raise Problem("text without chat markup", "prompt and answer cannot be told apart; write <|im_start|>user ... "
                      "<|im_end|> turns into it, or give the row as messages or as prompt and completion")
    turns = []
    for role, content in turn.findall(row["text"].replace("<|vision_start|><|image_pad|><|vision_end|>", MARK)):
        content, *calls = re.split(r"\n?<tool_call>", content) if role == "assistant" else [content]
        calls = [decode(call.strip().removesuffix("</tool_call>")) for call in calls]
        turns.append({"role": role, "content": content, "tool_calls": calls})
    return turns


def read_row(row: dict, notes: Counter) -> tuple[list[dict], str]:
    """(turns, name of the dialect) of a row: roles, parts, calls and picture places in one form, pictures unopened."""
    name = "a row"
    try:
        found = next((entry for entry in DIALECTS if entry.recognises(row)), None)
        if found is None:
            raise Problem("no dialect has these keys", f"{short(sorted(row))}; known are "
                          + ", ".join(entry.name for entry in reversed(DIALECTS)))
        name = found.name
        items = found.read(row)
        if not isinstance(items, list):
            raise TypeError(f"the turns are not a list but {short(items)}")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Problem(f"not readable as {name}", f"{type(error).__name__} {error}") from None
    if row.get("system"):
        items = [{"role": "system", "content": row["system"]}, *items]
    turns = [_read_turn(item, number, notes) for number, item in enumerate(items, 1)]
    pictures = _read_pictures(row)
    if pictures or found.marks or any(isinstance(turn["content"], list) for turn in turns):
        _place_pictures(turns, pictures, bool(pictures) or found.marks, found.last, found.gap)
    elif any(MARK in turn["content"] for turn in turns if turn["role"] == "user"):
        notes[f"{MARK} kept as plain text in a row without pictures"] += 1
    _finish_turns(turns)
    return turns, name


for path in sorted(Path(__file__).parent.glob("dialect_*.py")):  # last, because each of them imports this file
    importlib.import_module(f"data.{path.stem}")
