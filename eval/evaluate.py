"""Evaluation of a model on rows: a stage's loss and figures, and answers scored by a task's metrics.

The loss is the stage's own, through the packed path of training, which never holds logits: its sum over all rows divided
by what the stage divides by, so that no row counts more for standing in a short batch. The question of a row is everything
before its last trained answer, the label is that answer; both are cut out of the ids that training sees. Each line is
written when its answer is there, so what a killed run had finished is on disk. A row that cannot be encoded, or that a
metric cannot judge, is a line with its problem, and no score of another row takes its place.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from statistics import fmean
from typing import Any

from tqdm import tqdm

from data.boxes import boxes_of
from data.errors import UserError
from data.explain import explain
from data.labels import NO_LOSS, Example
from data.records import Record
from eval.generate import Answer, generate, inference
from eval.metrics import Reply
from eval.tasks import Task
from model.family import Family, Model, images_of

BATCHES_AT_ONCE = 4  # of examples in memory with their pictures: sorting by length needs some to choose from


class Evaluation:
    """One pass over rows, and what it finds.

    lines: a dict for each answer, {**extra, id, where, image?, prompt, response, label, truth?, stopped, answer_tokens,
    scores.., sample?}, and for each row with a problem, {**extra, id, where, problem}.
    figures: name -> value over all rows: num_rows, num_problems, num_tokens; with a stage its loss and figures (the names in
    sums); with a task stop_rate, answer_tokens and its figures.
    """

    def __init__(
        self, model: Model, task: Task | None = None, *, stage: Any = None, batch_tokens: int = 16384, output: Any = None,
        extra: dict[str, Any] | None = None,
    ):
        """task: how rows are asked and scored; stage: whose loss is computed; None of either: not at all. batch_tokens bounds
        the positions that run at once. Lines go to output.write() as JSON, with `extra` in front."""
        self.model, self.task, self.stage, self.batch_tokens = model, task, stage, batch_tokens
        self.output, self.extra = output, extra or {}
        self.lines: list[dict[str, Any]] = []
        self.figures: dict[str, float] = {}
        self.sums: Counter[str] = Counter()  # of the stage's loss and figures, not yet divided by total
        self.total, self.num_tokens, self.num_asked = 0.0, 0, 0

    def run(self, records: Iterable[Record]) -> "Evaluation":
        """Fill lines and figures. Runs in the caller's autocast; the modules' modes are put back, and no shared random state
        is drawn from."""
        records = list(records)
        if self.task is not None and self.task.measure is not None:  # it asks for no answers
            self.task.measure(self.model, records, self.task.others, self.write)
        else:
            self.go_through(records)
        self.figures = self.summarize(len(records))
        return self

    def go_through(self, records: list[Record]) -> None:
        """Every row once, some at a time: their losses, then their answers."""
        with tqdm(total=len(records), desc="evaluate", leave=False, disable=None) as bar:
            for rows in cut(encode_rows(self.encode, records, self.write), BATCHES_AT_ONCE * self.batch_tokens):
                self.num_tokens += sum(example.num_supervised for _, example in rows)
                if self.stage is not None:
                    self.add_losses([example for _, example in rows if example.num_supervised])
                if self.task is not None:
                    self.add_answers(rows)
                bar.update(len(rows))

    def encode(self, record: Record) -> Any:
        """As the stage does, so that a row it refuses has a problem here too; a problem's prompt has no label and no loss."""
        if record.kind == "problem":
            return self.model.family.encode_prompt(record.messages, record.tools)
        if self.stage is None:
            return self.model.family.encode(up_to_answer(record.messages), record.tools)
        return self.stage.encode(record)

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(self.extra | line)
        if self.output is not None:
            self.output.write(json.dumps(self.lines[-1], ensure_ascii=False) + "\n")

    def add_losses(self, examples: list[Any]) -> None:
        """The sums of the stage's loss and figures over the examples, without dropout."""
        self.total += self.stage.denominator(examples)
        with inference(self.model):
            for row in self.stage.pack(examples, self.batch_tokens):
                loss, figures = self.stage.loss(self.model, row.to(self.model.device), 1.0)
                self.sums.update({name: float(value) for name, value in {"loss": loss, **figures}.items()})

    def add_answers(self, rows: list[tuple[Record, Any]]) -> None:
        """A line for each answer, those to one row after the other; of a preference the chosen side is asked."""
        task, family = self.task, self.model.family
        asked = [self.stage.sequences(e)[0] if self.stage and e.num_supervised else e for _, e in rows]
        prompts = [family.prompt_of(example) for example in asked]
        cut_as = {"batch_tokens": self.batch_tokens, "first_prompt": self.num_asked}
        answers = generate(self.model, prompts, task.max_new_tokens, **cut_as, **task.sampling)
        self.num_asked += len(rows)
        num_samples = len(answers) // len(rows)
        for number, answer in enumerate(answers):
            place, sample = divmod(number, num_samples)
            record = rows[place][0]
            reply = reply_to(family, record, asked[place], prompts[place], answer)
            reply.other = (task.others or {}).get(record.where, {}).get("response")
            self.write(score(task, reply, answer) | ({"sample": sample} if num_samples > 1 else {}))

    def summarize(self, num_rows: int) -> dict[str, float]:
        """The figures; a row with a problem is in none but num_problems."""
        good = [line for line in self.lines if "problem" not in line]
        bad = {line["where"] for line in self.lines if "problem" in line}
        figures = {"num_rows": num_rows, "num_problems": len(bad), "num_tokens": self.num_tokens}
        if self.total:
            figures |= {name: value / self.total for name, value in self.sums.items()}
        if good and "stopped" in good[0]:
            figures["stop_rate"] = fmean(line["stopped"] for line in good)
            figures["answer_tokens"] = fmean(line["answer_tokens"] for line in good)
        return figures | (self.task.summarize(good) if good else {})


def encode_rows(
    encode: Callable[[Record], Any], records: Iterable[Record], write: Callable[[dict[str, Any]], None]
) -> Iterator[tuple[Record, Any]]:
    """Each record with its example; one that cannot be encoded is written as a line with the problem."""
    for record in records:
        try:
            yield record, encode(record)
        except UserError as error:
            write({"id": record.id, "where": record.where, "problem": str(error)})


def up_to_answer(messages: list[dict]) -> list[dict]:
    """The conversation without what follows its last trained answer."""
    answers = [n for n, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)]
    return messages[: answers[-1] + 1]


def cut(rows: Iterable[tuple[Record, Example]], num_tokens: int) -> Iterator[list[tuple[Record, Example]]]:
    """The rows in order, in lists of about num_tokens positions."""
    some, size = [], 0
    for row in rows:
        some.append(row)
        size += len(row[1])
        if size >= num_tokens:
            yield some
            some, size = [], 0
    if some:
        yield some


def label_of(family: Family, example: Example) -> str:
    """The last trained answer as text, without its stop token: what the model would have to write."""
    ids = example.labels[family.answer_start(example) :].tolist()
    end = next((place for place, token in enumerate(ids) if token == NO_LOSS or token in family.stop_ids), len(ids))
    text = family.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return family.answer_text(text)


def label_from(truth: dict[str, Any]) -> str:
    """What a problem's answer is checked against, as an answer would write it: {"answer": text}, {"box": [..]}; else JSON."""
    if isinstance(truth.get("answer"), str):
        return truth["answer"]
    if "box" in truth:
        return "<box>{} {} {} {}</box>".format(*truth["box"])
    return json.dumps(truth, ensure_ascii=False)


def reply_to(family: Family, record: Record, example: Example, prompt: Example, answer: Answer) -> Reply:
    """What a metric is given about an answered row."""
    problem, rule = record.kind == "problem", boxes_of(family)
    return Reply(
        id=record.id, where=record.where, prompt=explain(prompt, family.tokenizer, colour=False), response=answer.text,
        label=label_from(record.truth) if problem else label_of(family, example), stopped=answer.stopped,
        tools=record.tools, truth=record.truth,
        messages=record.messages if problem else up_to_answer(record.messages)[:-1],
        extent=rule.extent(record.image_sizes[-1]) if rule.rewrites and record.image_sizes else (1000, 1000),
    )


def score(task: Task, reply: Reply, answer: Answer) -> dict[str, Any]:
    """The line of an answered row."""
    line: dict[str, Any] = {"id": reply.id, "where": reply.where}
    pictures = [image for image in images_of(reply.messages) if isinstance(image, str) and not image.startswith("data:")]
    if pictures:
        line["image"] = pictures[0] if len(pictures) == 1 else pictures
    line |= {"prompt": reply.prompt, "response": reply.response, "label": reply.label, "stopped": reply.stopped,
             "answer_tokens": len(answer.ids)}  # fmt: skip
    if reply.truth is not None:
        line["truth"] = reply.truth
    if not all(map(math.isfinite, answer.logprobs)):
        return line | {"problem": "the model's logits are not finite; --precision bf16 or fp32 reaches further than fp16"}
    try:
        return line | {name: float(value) for metric in task.metrics for name, value in metric(reply).items()}
    except Exception as error:  # a metric may be anyone's: its fault with one row must not end a night's run
        return line | {"problem": str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"}
