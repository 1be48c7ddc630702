"""Conversations as data sets and trainers write them: HF messages, GUICourse, CogAgent, Phi-3's cookbook, prompt and answer."""

import re

from data.dialects import dialect, has
from data.turns import Problem, answer_of, role_of, short, split_chat, turns_of


@dialect("messages", has("messages"))
def _read_messages(row: dict) -> list:
    return row["messages"]


# ---- CogAgent: messages and a picture ------------------------------------------------------------------------------

def _has_cogagent_picture(row: dict) -> bool:
    messages = row["messages"]
    return isinstance(messages, list) and any(isinstance(item, dict) and "image" in item for item in [row, *messages])


def _check_order(row: dict) -> str:
    """CogAgent's training guide puts Platform and Answer before the history, its programs that ask put them behind."""
    texts = [item.get("content") for item in row["messages"] if isinstance(item, dict)]
    fronts = [text.rpartition("History steps:")[0] for text in texts if isinstance(text, str)]
    if any(re.search(r"\((?:Platform|Answer)\b", front) for front in fronts):
        return "(Platform ..) or (Answer ..) before History steps, where CogAgent's own prompts have it behind"
    return ""


@dialect("CogAgent", has("messages", when=_has_cogagent_picture), last=True, note=_check_order)
def _read_cogagent(row: dict) -> list:
    return row["messages"]


# ---- GUICourse: for training, and as it is published ---------------------------------------------------------------

@dialect("GUICourse", has("conversations"), marks=True, gap="\n")
def _read_guicourse(row: dict) -> list:
    return row["conversations"]


@dialect("raw GUICourse", has("uid", "image_id", when=lambda row: "question" in row or "text" in row))
def _read_raw_guicourse(row: dict) -> list:
    raise Problem("a raw GUICourse row", "python -m data convert guicourse makes rows to train on")


# ---- Phi-3's cookbook: a picture list, a question and an answer a turn ---------------------------------------------

def _is_cookbook(row: dict) -> bool:
    turns = row["conversations"]
    return isinstance(turns, list) and bool(turns) and all(isinstance(item, dict) and "user" in item for item in turns)


@dialect("Phi-3 cookbook", has("conversations", when=_is_cookbook))
def _read_cookbook(row: dict) -> list:
    """Pictures stand where <|image_1|>, <|image_2|>, .. are, else each on a line of its own in front of the question."""
    turns = []
    for item in row["conversations"]:
        pictures = {f"<image_{number}>": path for number, path in enumerate(item.get("images") or [], 1)}
        text = item["user"]
        if pictures:
            marked = re.sub(r"<\|(image_\d+)\|>", r"<\1>", text)
            text = marked if marked != text else "".join(f"{mark}\n" for mark in pictures) + text
        turns += [{"role": "user", "content": text, "images": pictures}, {"role": "assistant", "content": item["assistant"]}]
    return turns


# ---- A prompt and its answer ---------------------------------------------------------------------------------------

@dialect("prompt/completion", has("prompt", "completion"))
def _read_completion(row: dict, key: str = "prompt") -> list:
    prompt, answer = turns_of(row[key]), answer_of(row["completion"])
    # What the assistant said before the completion is context, not something to learn.
    return [turn | {"train": False} if role_of(turn) == "assistant" else turn for turn in prompt] + answer


@dialect("query/completion", has("query", "completion"))
def _read_query(row: dict) -> list:
    return _read_completion(row, "query")


@dialect("instruction/output", has("instruction", "output"))
def _read_alpaca(row: dict, answer: str = "output") -> list:
    """Stanford's Alpaca: what an instruction is about follows it after a blank line; the chat template is its frame."""
    question = "\n\n".join(row[key] for key in ("instruction", "input", "context") if row.get(key))
    pairs = [*(row.get("history") or []), [question, row[answer]]]  # LLaMA-Factory's: what was said before
    return [turn for pair in pairs for turn in _read_pair(pair)]


def _read_pair(pair: object) -> list:
    """A question and its answer as turns; an object is a turn already."""
    if isinstance(pair, dict):
        return [pair]
    if not isinstance(pair, list) or len(pair) != 2:
        raise Problem("history is neither pairs of question and answer nor turns", short(pair))
    return [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]


@dialect("instruction/response", has("instruction", "response"))
def _read_dolly(row: dict) -> list:
    return _read_alpaca(row, "response")


@dialect("text + screenshot", has("text", "screenshot"), marks=True, last=True)
def _read_chat_text(row: dict) -> list:
    return split_chat(row["text"])
