"""One question or a dialogue, with a picture or without: what the model sees is what training puts before an answer.

The turns go through the same template, tokens and picture rule as a row of training, so the answer equals the one that
`python -m eval` gets for the same row, and so do the boxes in a question (--box_format). Boxes in an answer count what the
model was taught, pixels of the picture as it sees it (resized) or thousandths of its sides, and are drawn accordingly.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.boxes import Box, boxes_of, parse_boxes
from data.errors import UserError
from data.images import image_size, open_image
from data.turns import Problem
from eval.boxes import draw_boxes
from eval.generate import generate
from eval.metrics import parse_calls
from eval.subject import Subject

MARK = "<image>"


@dataclass
class Dialogue:
    """A conversation so far; the picture, if any, stands in the first question. box_scale: pixels, thousandths or None."""

    subject: Subject
    image: str | None = None
    tools: list[dict] | None = None
    max_new_tokens: int = 512
    draw: str | None = None
    box_scale: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, question: str) -> str:
        """The model's answer; question and answer become part of the conversation."""
        first = not any(message["role"] == "user" for message in self.messages)
        content = place_picture(question, self.image) if first and self.image else question
        sizes = [image_size(self.image)] if self.image else []
        try:
            boxes = boxes_of(self.subject.family)
            self.messages += boxes.rewrite([{"role": "user", "content": content}], sizes, Counter())
        except Problem as problem:
            raise UserError(f"{problem}; correct the question, or --box_format") from None
        prompt = self.subject.family.encode_prompt(self.messages, self.tools)
        with self.subject.precision.autocast():
            answer = generate(self.subject.model, [prompt], self.max_new_tokens)[0]
        self.messages.append({"role": "assistant", "content": answer.text})
        if not answer.stopped:
            print(f"note: cut at {self.max_new_tokens} tokens, see --max_new_tokens", file=sys.stderr)
        if self.draw:
            self.draw_answer(parse_boxes(answer.text))
        return answer.text

    def draw_answer(self, boxes: list[Box]) -> None:
        """Write the picture with the answer's boxes on it; says so where the answer has none."""
        if not boxes:
            print(f"note: no box in the answer, {self.draw} is not written", file=sys.stderr)
            return
        picture, family = open_image(self.image), self.subject.family
        taught = boxes_of(family).extent(picture.size)
        width, height = {"pixels": family.seen_size(*picture.size), "thousandths": (1000, 1000)}.get(self.box_scale, taught)
        try:
            draw_boxes(picture, boxes, (picture.width / width, picture.height / height)).save(self.draw)
        except (OSError, ValueError) as error:
            raise UserError(f"--draw {self.draw}: not written ({error}); give a name such as answer.png") from None


def place_picture(question: str, image: str) -> list[dict[str, Any]]:
    """The question's parts: the picture where <image> stands in it, else in front."""
    before, mark, after = question.partition(MARK) if MARK in question else ("", MARK, question)
    parts = [{"type": "text", "text": before}, {"type": "image", "image": image}, {"type": "text", "text": after}]
    return [part for part in parts if part.get("text", mark)]


def in_short(text: str) -> str:
    """The boxes or tool calls of an answer, a line each, as a program would read them; "" where there are none."""
    calls = [json.dumps(call, ensure_ascii=False) for call in parse_calls(text)]
    boxes = [" ".join(f"{number:g}" for number in box) for box in parse_boxes(text)] if not calls else []
    return "\n".join([f"call: {call}" for call in calls] + [f"box: {box}" for box in boxes])


def questions_from(prompt: str | None) -> Iterable[str]:
    """The one question of the command line, or a line of standard input at a time until it ends."""
    if prompt is not None:
        yield prompt
        return
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            print("you: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def read_tools(path: str | None) -> list[dict] | None:
    """Tools from a JSON file: a list of function schemas. Raises UserError for anything else."""
    if path is None:
        return None
    try:
        tools = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--tools {path}: not a readable JSON file ({error})") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"--tools {path}: expected a list of function schemas, as in a row's `tools`")
    return tools
