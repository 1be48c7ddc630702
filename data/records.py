"""Rows of a json or jsonl file as conversations, every row checked before the first training step.

A file is indexed once and a row is parsed again when it is asked for, so a jsonl never lies in memory (about 50 bytes
a row do); a json array lies there as text. The check reads structure and picture headers, decodes no picture, costs
about 30 us a text row, and turns whatever is wrong with a row into one sentence with file:line and the row's id.

How a row's keys become turns is a dialect: one small function in a table. A dialect of your own is a file of yours
with such a function under `@dialect(...)`, imported before open_records is called.
"""

import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError
from data.images import OutsideRoot, find_image

MAX_ROW_BYTES = 64 * 2**20
MARK = "<image>"
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


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- JSON ----------------------------------------------------------------------------------------------------------

def _decode(raw: bytes | str) -> object:
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


def _read_objects(value: object, name: str) -> list[dict]:
    """`tools` or `tool_calls`: a list of objects, or the same as a JSON string."""
    value = _decode(value) if isinstance(value, str) and value else value or []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Problem(f"{name} is not a list of objects", _short(value))
    return value


# ---- Turns: every shape of a message as one ------------------------------------------------------------------------

def _parts(content: str | list[dict]) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _read_part(part: object, number: int) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "image_url"):
        raise Problem("a content part is neither text nor image", f"turn {number} has {_short(part)}")
    path = next((part[key] for key in ("image", "image_url", "path", "url") if part.get(key) is not None), None)
    return {"type": "image", "image": path.get("url") if isinstance(path, dict) else path}


def _read_calls(value: object, notes: Counter) -> list[dict]:
    calls = []
    for call in _read_objects(value, "tool_calls"):
        call = call["function"] if isinstance(call.get("function"), dict) else call
        name, arguments = call.get("name"), call.get("arguments")
        if not isinstance(name, str) or not name:
            raise Problem("a tool call has no name", _short(call))
        if isinstance(arguments, str):
            arguments = _decode(arguments)
            notes["arguments decoded from a JSON string"] += 1
        if not isinstance(arguments, dict):
            raise Problem("the arguments of a tool call are not an object", f"{name} has {_short(arguments)}")
        calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def _read_turn(item: object, number: int, notes: Counter) -> dict:
    if not isinstance(item, dict):
        raise Problem("a turn is not an object", f"turn {number} is {_short(item)}")
    name = item.get("role", item.get("from"))
    if not isinstance(name, str) or name not in ROLES:
        raise Problem("unknown role", f"turn {number} has {_short(name)}; known are {', '.join(ROLES)}")
    role, content, train = ROLES[name], item.get("content", item.get("value")), item.get("train")
    if isinstance(content, list):
        content = [_read_part(part, number) for part in content]
    elif content is None and role == "assistant":
        content = ""
    elif not isinstance(content, str):
        raise Problem("content is neither text nor a list of parts", f"turn {number} has {_short(content)}")
    turn = {"role": role, "content": content}
    if calls := _read_calls(item.get("tool_calls"), notes):
        turn["tool_calls"] = calls
    if calls and role != "assistant":
        raise Problem("tool calls outside an assistant turn", f"turn {number} is the {role}'s")
    if train is not None:
        turn["train"] = train
    if not isinstance(train, bool | None):
        raise Problem("train is neither true nor false", f"turn {number} has {_short(train)}")
    for key in item.keys() - TURN_KEYS:
        notes[f"key {_short(key)} of a turn ignored"] += item[key] is not None
    if pictures := _read_pictures(item):
        _place_pictures([turn], pictures, {mark for mark, _ in pictures}, last=False, gap="")
    return turn


def _finish_turns(turns: list[dict]) -> None:
    """Join neighbouring texts, and refuse what cannot be trained on: no user first, nothing to learn, an empty answer."""
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
        elif all(mark.startswith("<") and mark.endswith(">") for mark in value):
            pictures += value.items()
        else:
            raise Problem("the names of pictures are not marks", f"{_short(list(value))}; expected such as <image_00>")
    return pictures


def _place_pictures(turns: list[dict], pictures: list, marks: set[str], last: bool, gap: str) -> None:
    """Put each picture where its mark stands in a user turn (in the text, or a part {"type": "image"} without a path);
    without any mark, all go in front of the first (or last) user turn, followed by `gap`.
    """
    users = [turn for turn in turns if turn["role"] in ("user", "tool")]
    if pictures and not users:
        raise Problem("a picture outside a user turn")
    pattern = re.compile("(" + "|".join(map(re.escape, sorted(marks))) + ")")
    places = []
    for turn in users:
        parts = []
        for part in _parts(turn["content"]):
            if part["type"] == "image":
                parts.append(part)
                continue
            for position, piece in enumerate(pattern.split(part["text"]) if marks else [part["text"]]):
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
        raise Problem("marks and pictures do not match", f"{len(places)} marks ({', '.join(sorted(marks)) or 'parts'}) "
                      f"in the user turns, {len(pictures)} pictures in {' or '.join(PICTURE_KEYS)}")


# ---- Dialects: the keys of a row -> turns --------------------------------------------------------------------------

@dataclass(frozen=True)
class Dialect:
    """One shape of row: read(row) gives turns as {"role" | "from", "content" | "value"}; the rest is common to all."""

    name: str
    recognises: Callable[[dict], bool]
    read: Callable[[dict], list]
    marks: bool  # <image> in a user turn always stands for a picture; else only in a row that has pictures
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
        calls = [_decode(call.strip().removesuffix("</tool_call>")) for call in calls]
        turns.append({"role": role, "content": content, "tool_calls": calls})
    return turns


def _read_row(row: dict, notes: Counter) -> tuple[list[dict], str]:
    """(turns, name of the dialect) of a row: roles, parts, calls and picture places in one form, pictures unopened."""
    name = "a row"
    try:
        found = next((entry for entry in DIALECTS if entry.recognises(row)), None)
        if found is None:
            raise Problem("no dialect has these keys", f"{_short(sorted(row))}; known are "
                          + ", ".join(entry.name for entry in reversed(DIALECTS)))
        name = found.name
        items = found.read(row)
        if not isinstance(items, list):
            raise TypeError(f"the turns are not a list but {_short(items)}")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Problem(f"not readable as {name}", f"{type(error).__name__} {error}") from None
    items = [{"role": "system", "content": row["system"]}] * bool(row.get("system")) + items
    turns = [_read_turn(item, number, notes) for number, item in enumerate(items, 1)]
    pictures = _read_pictures(row)
    marks = {mark for mark, _ in pictures} or ({MARK} if found.marks else set())
    if marks or any(isinstance(turn["content"], list) for turn in turns):
        _place_pictures(turns, pictures, marks, found.last, found.gap)
    elif any(MARK in turn["content"] for turn in turns if turn["role"] == "user"):
        notes[f"{MARK} kept as plain text in a row without pictures"] += 1
    _finish_turns(turns)
    return turns, name


# ---- Files: where each row begins ----------------------------------------------------------------------------------

def _split_lines(path: Path) -> Iterator[tuple[int, int, int, bytes]]:
    """(physical line number, byte offset, size, line) of every line that is not blank; MAX_ROW_BYTES + 1 at most."""
    with open(path, "rb") as file:
        number = offset = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number, start, rest = number + 1, offset, line
            offset += len(line)
            while not rest.endswith(b"\n") and (rest := file.readline(2**20)):  # the tail of a line that is too long
                offset += len(rest)
            if line.strip():
                yield number, start, len(line), line


def _split_array(text: str, name: str) -> Iterator[tuple[int, int, int, bytes]]:
    """(element number from 1, character offset, size, element) of a json array held as text."""
    skip_blank, scan = re.compile(r"[ \t\r\n]*").match, json.JSONDecoder().raw_decode
    position, number, problem = skip_blank(text, text.index("[") + 1).end(), 0, "the array is cut short"
    while text[position : position + 1] not in ("]", ""):
        number += 1
        try:
            end = scan(text, position)[1]
        except (ValueError, RecursionError) as error:
            problem, position = str(error).split(": line")[0], getattr(error, "pos", position)
            break
        yield number, position, end - position, text[position:end].encode("utf-8", "surrogateescape")
        position = skip_blank(text, end).end()
        if text[position : position + 1] == ",":
            position = skip_blank(text, position + 1).end()
        elif text[position : position + 1] not in ("]", ""):
            problem = "a comma is missing"
            break
    if text[position : position + 1] != "]":
        line = text.count("\n", 0, position) + 1
        raise UserError(f"{name}:{number} is not valid JSON ({problem}; line {line} of the file); correct it, or save "
                        "one row a line as .jsonl, where one bad row does not hide the rest")


# ---- Records: all rows of a file -----------------------------------------------------------------------------------

@dataclass
class Record:
    """One conversation. messages: [{"role", "content": str | [text and image parts], "tool_calls"?, "train"?}]."""

    id: str
    where: str  # "rows.jsonl:17"
    messages: list[dict]
    tools: list[dict] | None
    dialect: str
    image_sizes: list[tuple[int, int]]  # (width, height) of each picture, in order

    def num_text_bytes(self) -> int:
        """UTF-8 bytes of texts, calls and tools: what the text tokens can be estimated from without tokenizing."""
        texts = [part.get("text", "") for message in self.messages for part in _parts(message["content"])]
        calls = [message["tool_calls"] for message in self.messages if "tool_calls" in message]
        texts += [json.dumps([calls, self.tools], ensure_ascii=False)] if calls or self.tools else []
        return sum(len(text.encode()) for text in texts)


class BadRows(UserError):
    """Rows were refused and the run ends; `.records.bad` lists them."""

    def __init__(self, message: str, records: "Records"):
        super().__init__(message)
        self.records = records


class Records:
    """The good rows of a file: len(), [i] -> Record, read anew each time (so it may be sent to worker processes).

    bad: the refused rows, [{"where", "id", "problem"}]. notes: what was changed or is worth saying, counted. dialects:
    good rows by dialect. text_bytes[i], image_sizes[i]: what row i weighs, without reading it again.
    """

    def __init__(self, path: Path, image_root: Path, allow_outside_images: bool):
        self.path = path
        self.bad: list[dict] = []
        self.notes, self.dialects = Counter(), Counter()
        self.text_bytes = array("Q")
        self.image_sizes: list[tuple[tuple[int, int], ...]] = []
        self._numbers, self._starts, self._sizes = array("Q"), array("Q"), array("Q")
        self._text: str | None = None  # of a json array; a jsonl stays on disk
        self._roots = os.path.realpath(image_root), os.path.realpath(path.parent), allow_outside_images
        self._kinds: dict[str, list[int]] = {}  # kind of problem -> indices in bad
        self._folders: list[str] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        start, size = self._starts[index], self._sizes[index]
        if self._text is not None:
            raw = self._text[start : start + size].encode("utf-8", "surrogateescape")
        else:
            with open(self.path, "rb") as file:
                file.seek(start)
                raw = file.read(size)
        where = f"{self.path.name}:{self._numbers[index]}"
        try:
            return self._read(raw, where, Counter())
        except Problem as problem:
            raise UserError(f"{where} was good when the run began and is not now: {problem}") from None

    def _read(self, raw: bytes, where: str, notes: Counter) -> Record:
        row = _decode(raw)
        if not isinstance(row, dict):
            raise Problem("a row is not an object", _short(row))
        ids = (row[key] for key in ID_KEYS if isinstance(row.get(key), str | int) and row[key] != "")
        row_id = str(next(ids, where))
        try:
            turns, name = _read_row(row, notes)
            tools = _read_objects(row.get("tools"), "tools") or None
            pictures = [part for turn in turns for part in _parts(turn["content"]) if part["type"] == "image"]
            return Record(row_id, where, turns, tools, name, [self._find(part) for part in pictures])
        except Problem as problem:
            problem.row_id = row_id
            raise

    def _find(self, part: dict) -> tuple[int, int]:
        """Make the path of an image part absolute; (width, height) of its picture."""
        if not isinstance(part["image"], str) or not part["image"]:
            raise Problem("a picture is not named by a path", _short(part["image"]))
        try:
            part["image"], size = find_image(part["image"], *self._roots)
        except OutsideRoot as error:
            raise Problem("a picture lies outside the image root", str(error), error.folder) from None
        except UserError as error:
            raise Problem("a picture is missing or unreadable", str(error)) from None
        return size

    def _check(self, number: int, start: int, size: int, raw: bytes) -> None:
        """Take a row in, or write down why not."""
        where = f"{self.path.name}:{number}"
        try:
            record = self._read(raw, where, self.notes)
        except Problem as problem:
            self._kinds.setdefault(problem.kind, []).append(len(self.bad))
            self._folders += [problem.folder] if problem.folder else []
            self.bad.append({"where": where, "id": problem.row_id or where, "problem": str(problem)})
            return
        self._numbers.append(number)
        self._starts.append(start)
        self._sizes.append(size)
        self.text_bytes.append(record.num_text_bytes())
        self.image_sizes.append(tuple(record.image_sizes))
        self.dialects[record.dialect] += 1

    def refusal(self) -> str:
        """`24 of 200 rows: ...`: the first three problems; past 5 % the kinds of problem, and what would help."""
        num_rows = len(self) + len(self.bad)
        sentences = [f"{row['where']} {row['problem']}" for row in self.bad]
        if len(self.bad) <= max(3, num_rows * 0.05):
            listed = sentences[:3] + [f"and {len(self.bad) - 3} more"] * (len(self.bad) > 3)
        else:
            kinds = sorted(self._kinds.items(), key=lambda item: -len(item[1]))
            listed = [f"{len(indices)} x {kind} (first {sentences[indices[0]]})" for kind, indices in kinds]
            if self._folders:
                listed.append(f"--image_root {os.path.commonpath(self._folders)} would admit {len(self._folders)} rows")
        return f"{len(self.bad)} of {num_rows} rows" + ": " * bool(listed) + "; ".join(listed)

    def write_bad_rows(self, path: str | os.PathLike) -> None:
        """One line a refused row: {"where", "id", "problem"}."""
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.bad)


def open_records(
    path: str | os.PathLike, image_root: str | os.PathLike | None = None,
    allow_outside_images: bool = False, on_bad_row: str = "stop",
) -> Records:
    """Index a .json array or a .jsonl file and check every row; pictures lie below image_root (the file's own folder).

    UserError for a file that cannot be read; BadRows if a row is bad and on_bad_row is "stop", or if no row is good.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        raise UserError(f"{path} is not a .json or .jsonl file; give one with a row a line, or with an array of rows")
    if image_root is not None and not os.path.isdir(image_root):
        raise UserError(f"--image_root {image_root} is not a folder")
    records = Records(path, Path(path.parent if image_root is None else image_root), allow_outside_images)
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16; save it as UTF-8")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        records._text = path.read_bytes().decode("utf-8", "surrogateescape")
    for row in _split_lines(path) if records._text is None else _split_array(records._text, path.name):
        records._check(*row)
    if not len(records) and not records.bad:
        raise UserError(f"{path} holds no rows")
    if records.bad and (on_bad_row == "stop" or not len(records)):
        raise BadRows(f"{path} has rows that cannot be trained on, {records.refusal()}; correct them, or pass "
                      "--on_bad_row skip to train without them", records)
    return records
