"""Any table as conversations: --prompt_template, --response_template and --image_column name its columns.

"{title}" stands for the row's column, "{price:.2f}" writes a number by Python's format rules, "{{" is a brace, and <image>
in the prompt is the place of the picture (else it goes in front). Columns are text: a title that spells <image> stays one.
--prompt_template alone puts problems (Countdown's numbers) in other words and leaves what their answers are checked against.
"""

import json
from dataclasses import dataclass
from string import Formatter

from data.errors import UserError
from data.turns import MARK, MISSHAPEN, Problem, short


@dataclass(frozen=True)
class Template:
    """The three settings; make_template checks them."""

    prompt: str
    response: str | None = None
    image_column: str | None = None

    def read(self, row: dict) -> list:
        """A row as a prompt and its response. Raises Problem for a column that is missing or empty."""
        return [self.ask(row), {"role": "assistant", "content": fill(self.response, row)}]

    def ask(self, row: dict) -> dict:
        """The user's turn for a row."""
        pieces = [fill(piece, row) for piece in self.prompt.split(MARK)]
        if self.image_column is None:
            return {"role": "user", "content": MARK.join(pieces)}
        picture = {"type": "image", "image": column(row, self.image_column)}
        pieces = pieces if len(pieces) > 1 else ["", *pieces]
        texts = [{"type": "text", "text": piece} for piece in pieces]
        return {"role": "user", "content": [texts[0], picture, *texts[1:]]}


def make_template(prompt: str | None, response: str | None, image_column: str | None) -> Template | None:
    """The template that the settings ask for, None where they ask for none. UserError for one that cannot be filled in."""
    if prompt is None:
        if response or image_column:
            given = "response_template" if response else "image_column"
            raise UserError(f"--{given} is given without --prompt_template; give the words of the prompt too")
        return None
    if image_column and response is None:
        raise UserError("--image_column is given without --response_template; give the words of the answer too")
    if image_column and prompt.count(MARK) > 1:
        raise UserError(f"--prompt_template has {prompt.count(MARK)} {MARK} marks, and --image_column names one picture")
    for flag, text in (("prompt_template", prompt), ("response_template", response or "")):
        try:
            names = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
        except ValueError as error:
            raise UserError(f"--{flag} {text!r} cannot be read: {error}; write {{{{ for a brace") from None
        if "" in names:
            raise UserError(f"--{flag} {text!r} has {{}} without the name of a column")
    return Template(prompt, response, image_column)


def fill(template: str, row: dict) -> str:
    """The template with the row's columns in it; a list reads as "44, 19, 35", an object as the JSON that it is."""
    text = ""
    for literal, name, rule, _ in Formatter().parse(template):
        text += literal
        if name is None:
            continue
        value = column(row, name)
        try:
            text += format(_words(value) if isinstance(value, dict | list) else value, rule)
        except MISSHAPEN as error:
            raise Problem(f"column {name} does not fit {{{name}:{rule}}}", f"{short(value)}: {error}") from None
    return text


def _words(value: list | dict) -> str:
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        return ", ".join(map(str, value))
    return json.dumps(value, ensure_ascii=False)


def column(row: dict, name: str) -> object:
    """A column's value. Raises Problem where it is missing or empty."""
    if row.get(name) in (None, ""):
        raise Problem(f"column {name} is " + ("empty" if name in row else "missing"), f"the row has {short(sorted(row))}")
    return row[name]
