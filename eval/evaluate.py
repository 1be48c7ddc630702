"""Evaluation of a model on rows: the loss of the labels, and answers scored by a task's metrics.

The loss runs the packed path of training and keeps one number a token, never logits: its sum over all supervised tokens
divided by their count, so that no row counts more for standing in a short batch. The question of a row is everything
before its last trained answer, the label is that answer; both are cut out of the ids that training sees. Each line is
written when its answer is there, so what a killed run had finished is on disk. A row that cannot be encoded, or that a
metric cannot judge, is a line with its problem, and no score of another row takes its place.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from tqdm import tqdm

from data.batches import pack
from data.errors import UserError
from data.explain import explain
from data.labels import NO_LOSS, Example
from data.records import Record
from eval.generate import Answer, generate
from eval.metrics import Reply
from eval.tasks import Task
from model.family import Family, Model, images_of
from model.head import negative_log_likelihood, per_token

BATCHES_AT_ONCE = 4  # of examples in memory with their pictures: sorting by length needs some to choose from


@dataclass
class Evaluation:
    """figures: name -> value over all rows (num_rows, num_problems, loss, num_tokens, with a task stop_rate and its
    own); lines: one dict a row that was answered or has a problem."""

    figures: dict[str, float]
    lines: list[dict[str, Any]] = field(default_factory=list)


def evaluate(
    model: Model,
    records: Iterable[Record],
    task: Task | None = None,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    batch_tokens: int = 16384,
    output: TextIO | None = None,
    extra: dict[str, Any] | None = None,
) -> Evaluation:
    """The loss of the labels and, with a task, greedy answers and their scores.

    A row is one line {**extra, id, where, image?, prompt, response, label, stopped, scores...}, one with a problem
    {**extra, id, where, problem}; lines go to output as JSON. A row longer than max_length is a problem, as it is in
    training. batch_tokens bounds the positions that run at once. Runs in the caller's autocast; the modules' modes are
    put back, and no shared random state is drawn from.
    """
    records, lines = list(records), []
    total, count = 0.0, 0

    def write(line: dict[str, Any]) -> None:
        lines.append((extra or {}) | line)
        if output is not None:
            output.write(json.dumps(lines[-1], ensure_ascii=False) + "\n")
            output.flush()

    with tqdm(total=len(records), desc="evaluate", leave=False, disable=None) as bar:
        for rows in cut(encode_rows(model.family, records, max_length, write), BATCHES_AT_ONCE * batch_tokens):
            more, tokens = token_loss(model, [example for _, example in rows], batch_tokens)
            total, count = total + more, count + tokens
            if task is not None:
                prompts = [model.family.prompt_of(example) for _, example in rows]
                limit = max_new_tokens or task.max_new_tokens
                answers = generate(model, prompts, limit, batch_tokens=batch_tokens)
                for (record, example), prompt, answer in zip(rows, prompts, answers, strict=True):
                    write(score(model.family, task, record, example, prompt, answer))
            bar.update(len(rows))
    good = [line for line in lines if "problem" not in line]
    figures = {"num_rows": len(records), "num_problems": len(lines) - len(good), "num_tokens": count}
    if count:
        figures["loss"] = total / count
    if good:
        figures |= {"stop_rate": sum(line["stopped"] for line in good) / len(good), **task.summarize(good)}
    return Evaluation(figures, lines)


def encode_rows(
    family: Family, records: list[Record], max_length: int | None, write: Callable[[dict[str, Any]], None]
) -> Iterator[tuple[Record, Example]]:
    """Each record with its example; one that cannot be encoded is written as a line with the problem."""
    for record in records:
        try:
            yield record, family.encode(up_to_answer(record.messages), record.tools, max_length)
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


@torch.no_grad()
def token_loss(model: Model, examples: list[Example], micro_tokens: int) -> tuple[float, int]:
    """(sum of the negative log-likelihoods, number) of the supervised tokens, in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    sums, count = [], 0
    for row in pack(examples, micro_tokens):
        packed = row.to(model.device)
        where, target = packed.supervised()
        if len(where):
            losses = per_token(model.hidden(packed), model.head_weight, negative_log_likelihood, where, target)  # (n,)
            sums.append(losses.double().sum())
            count += len(where)
    for module in training:
        module.training = True
    return float(sum(sums)), count


def label_of(family: Family, example: Example) -> str:
    """The last trained answer as text, without its stop token: what the model would have to write."""
    ids = example.labels[family.answer_start(example) :].tolist()
    end = next((place for place, token in enumerate(ids) if token == NO_LOSS or token in family.stop_ids), len(ids))
    text = family.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return family.answer_text(text)


def score(
    family: Family, task: Task, record: Record, example: Example, prompt: Example, answer: Answer
) -> dict[str, Any]:
    """The line of an answered row."""
    place = {"id": record.id, "where": record.where}
    pictures = [image for image in images_of(record.messages) if isinstance(image, str)]
    if pictures:
        place["image"] = pictures[0] if len(pictures) == 1 else pictures
    text = explain(prompt, family.tokenizer, colour=False)
    reply = Reply(record.id, record.where, text, answer.text, label_of(family, example), answer.stopped, record.tools)
    line = place | {"prompt": text, "response": answer.text, "label": reply.label, "stopped": answer.stopped}
    try:
        return line | {name: float(value) for metric in task.metrics for name, value in metric(reply).items()}
    except Exception as error:  # a metric may be anyone's: its fault with one row must not end a night's run
        return line | {"problem": str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"}
