"""The keys of a row -> the turns of a conversation, in one form for every dialect, or one sentence why not.

A dialect is one small function in the table DIALECTS: it gives a conversation as a list of turns, two answers to compare
as a Preference, a prompt whose answer a reward judges as a Question. Related dialects share a file data/dialect_<name>.py;
so does one of your own: a function under `@dialect(...)` there is found by listing. Of several that recognise a row the
one that asks for more is taken (see `has`), and the log says which.
"""

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.template import Template
from data.turns import (
    MARK,
    MISSHAPEN,
    Problem,
    are_turns,
    finish_turns,
    place_pictures,
    read_pictures,
    read_tools,
    read_turn,
    short,
)  # fmt: skip


@dataclass(frozen=True)
class Preference:
    """What read(row) gives for two answers to one prompt: two lists of turns, equal up to the last turn."""

    chosen: list
    rejected: list


@dataclass(frozen=True)
class Question:
    """What read(row) gives for a prompt without an answer: turns that end with the user's, and what a reward checks an
    answer against, such as {"numbers": [3, 4], "target": 12}, {"box": [..]} or {"answer": ".."}."""

    turns: list
    truth: dict


@dataclass(frozen=True)
class Reading:
    """A row in the one form of all dialects; rejected and truth as data/records.py's Record has them."""

    messages: list[dict]
    dialect: str
    tools: list[dict]
    rejected: list[dict] | None = None
    truth: dict | None = None


@dataclass(frozen=True)
class Dialect:
    """One shape of row: read(row) gives turns as {"role" | "from", "content" | "value"}; the rest is common to all."""

    name: str
    recognises: Callable[[dict], bool]
    read: Callable[[dict], "list | Preference | Question"]
    marks: bool = False  # <image> or <image_1> in a user turn always stands for a picture; else only in a row that has some
    last: bool = False  # pictures without a mark go in front of the last user turn, else of the first
    gap: str = ""  # the text between such pictures and the turn
    pictures: bool = True  # the row's image, images or screenshot are the conversation's; else read(row) has placed them
    measures: bool = False  # read(row, size_of): size_of(path) is (width, height) of a picture that the row names
    note: Callable[[dict], str] = lambda row: ""  # what the log counts about a row, "" for nothing


DIALECTS: list[Dialect] = []  # asked in this order: who asks a row for more comes first, of equals the newest


@dataclass(frozen=True)
class Has:
    """Recognises a row that has all of these keys, and for which `when` holds."""

    keys: frozenset[str]
    when: Callable[[dict], bool] | None

    def __call__(self, row: dict) -> bool:
        return row.keys() >= self.keys and (self.when is None or self.when(row))

    @property
    def demands(self) -> int:
        return len(self.keys) + (self.when is not None)


def has(*keys: str, when: Callable[[dict], bool] | None = None) -> Has:
    """What most dialects recognise a row by: its keys, and perhaps a look at their values."""
    return Has(frozenset(keys), when)


def dialect(name: str, recognises: Callable[[dict], bool], **options):
    """Add the decorated function, read(row) -> turns, to the table, with Dialect's options. It may raise Problem.

    A function of your own as `recognises` is asked before every has(..).
    """
    def register(read: Callable[[dict], list]) -> Callable[[dict], list]:
        DIALECTS.insert(0, Dialect(name, recognises, read, **options))
        DIALECTS.sort(key=lambda entry: -getattr(entry.recognises, "demands", 1000))
        return read
    return register


# A table has whatever columns it has, so no dialect but the run's own template can know what they mean.
TABLE = Dialect("table", lambda row: True, Template.read, pictures=False)


def find_dialect(row: dict, notes: Counter) -> Dialect:
    """The dialect of a row. Raises Problem for none; of several the others are noted, unless they ask for less of the same."""
    found, *others = [entry for entry in DIALECTS if entry.recognises(row)] or [None]
    if found is None and are_turns(row):
        raise Problem("the row is one turn", 'a row is a whole conversation: {"messages": [its turns]}')
    if found is None:
        lists = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
        inside = f"; if the rows are in its {short(lists[0])}, save that list alone" if lists else ""
        raise Problem("no dialect has these keys", f"{short(sorted(row))}{inside}; --prompt_template, --response_template and "
                      "--image_column say which is what; known are " + ", ".join(entry.name for entry in reversed(DIALECTS)))
    asked = getattr(found.recognises, "keys", frozenset())
    for other in others:
        if not getattr(other.recognises, "keys", frozenset()) <= asked:
            notes[f"read as {found.name}, not as {other.name}"] += 1
    return found


def read_row(
    row: dict, notes: Counter, template: Template | None = None,
    size_of: Callable[[str], tuple[int, int]] | None = None,
) -> Reading:
    """A row's turns with roles, parts, calls and picture places in one form, and the name of its dialect.

    template puts any row, or a problem's prompt, in the words of a run. size_of gives (width, height) of a picture that a
    row names; none is decoded. Raises Problem.
    """
    name = "a row"
    try:
        found = find_dialect(row, notes) if template is None or template.response is None else TABLE
        name = found.name
        if found is TABLE:
            items = template.read(row)
        else:
            items = found.read(row, size_of) if found.measures else found.read(row)
        if not isinstance(items, list | Preference | Question):
            raise Problem(f"not readable as {name}", f"its turns are not a list but {short(items)}")
        if note := found.note(row):
            notes[note] += 1
    except MISSHAPEN as error:
        found = f"{type(error).__name__}: {error}"
        raise Problem(f"not readable as {name}", f"a field has another form than in such rows ({found})") from None
    if template is not None and found is not TABLE:
        if not isinstance(items, Question):
            raise Problem("--prompt_template alone is for problems", f"this is {name}; add --response_template")
        items = Question([template.ask(row)], items.truth)
    # A table's columns have names of their own. Before OpenAI's tools there were functions.
    tools = [] if found is TABLE else read_tools(row.get("tools") or row.get("functions"))
    if isinstance(items, Question):
        return Reading(_read_turns(row, items.turns, found, notes, "prompt"), name, tools, truth=items.truth)
    if isinstance(items, Preference):
        chosen = _read_turns(row, items.chosen, found, notes)
        rejected = _read_turns(row, items.rejected, found, Counter(), "rejected")
        return Reading(chosen, name, tools, rejected=_join_prefix(chosen, rejected, notes))
    return Reading(_read_turns(row, items, found, notes), name, tools)


def _read_turns(row: dict, items: list, found: Dialect, notes: Counter, side: str = "answer") -> list[dict]:
    """The turns that a dialect gave, with the row's system turn and pictures, in one form."""
    if row.get("system") and found is not TABLE:
        items = [{"role": "system", "content": row["system"]}, *items]
    turns = [read_turn(item, number, notes) for number, item in enumerate(items, 1)]
    pictures = read_pictures(row) if found.pictures else []
    if pictures or found.marks or any(isinstance(turn["content"], list) for turn in turns):
        place_pictures(turns, pictures, bool(pictures) or found.marks, found.last, found.gap)
    elif any(MARK in turn["content"] for turn in turns if turn["role"] == "user"):
        notes[f"{MARK} kept as plain text in a row without pictures"] += 1
    finish_turns(turns, side)
    return turns


def _join_prefix(chosen: list[dict], rejected: list[dict], notes: Counter) -> list[dict]:
    """The rejected side on the chosen side's own prompt. Raises Problem unless both are one prompt and an answer each.

    What the assistant said inside the prompt is context: chosen's copy is told so, which both sides share.
    """
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1]["role"] != "assistant" or not turns[-1].get("train", True):
            raise Problem(f"{name} does not end with an answer to learn from", f"it ends with {short(turns[-1])}")
    if chosen[:-1] != rejected[:-1]:
        pairs = enumerate(zip(chosen, rejected, strict=False), 1)
        place = next((n for n, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
        raise Problem("chosen and rejected do not answer the same prompt", f"they differ at turn {place}")
    if chosen[-1] == rejected[-1]:
        notes["chosen and rejected are the same answer"] += 1
    for turn in chosen[:-1]:
        if turn["role"] == "assistant":
            turn["train"] = False
    return [*chosen[:-1], rejected[-1]]


for path in sorted(Path(__file__).parent.glob("dialect_*.py")):  # last, because each of them imports this file
    importlib.import_module(f"data.{path.stem}")
