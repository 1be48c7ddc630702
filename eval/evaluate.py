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
from dataclasses import dataclass, field
from functools import partial
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


@dataclass
class Evaluation:
    """figures: name -> value over all rows: num_rows, num_problems, num_tokens; with a stage the loss and its figures; with a
    task stop_rate, answer_tokens and its figures. lines: one dict for each answer and for each row with a problem."""

    figures: dict[str, float]
    of_stage: list[str] = field(default_factory=list)  # the names of the stage's figures
    lines: list[dict[str, Any]] = field(default_factory=list)


def evaluate(
    model: Model,
    records: Iterable[Record],
    task: Task | None = None,
    *,
    stage: Any = None,
    max_new_tokens: int | None = None,
    batch_tokens: int = 16384,
    sampling: dict[str, Any] | None = None,
    others: dict[str, dict] | None = None,
    output: Any = None,
    extra: dict[str, Any] | None = None,
) -> Evaluation:
    """With a stage its loss and figures and, with a task, answers and their scores.

    An answer is one line {**extra, id, where, image?, prompt, response, label, truth?, stopped, answer_tokens, scores..,
    sample?}, a row with a problem {**extra, id, where, problem}; lines go to output.write() as JSON. sampling holds settings of
    generate(), several samples of a row included; None is one greedy answer. others: where -> another model's line, for a
    task that compares. A row that the stage refuses is a problem, as it is in training; a record of kind "problem" has no
    loss. batch_tokens bounds the positions that run at once. Runs in the caller's autocast; the modules' modes are put
    back, and no shared random state is drawn from.
    """
    records, lines = list(records), []
    sums, total, num_tokens, num_asked = Counter(), 0.0, 0, 0
    limit = (max_new_tokens or task.max_new_tokens) if task else 0
    ask = partial(generate, model, max_new_tokens=limit, batch_tokens=batch_tokens, **(sampling or {}))

    def write(line: dict[str, Any]) -> None:
        lines.append((extra or {}) | line)
        if output is not None:
            output.write(json.dumps(lines[-1], ensure_ascii=False) + "\n")

    def encode(record: Record) -> Any:
        return stage.encode(record) if stage and record.kind != "problem" else encode_row(model.family, record)

    asked = records
    if task is not None and task.measure is not None:  # it asks for no answers
        task.measure(model, records, others, write)
        asked = []
    with tqdm(total=len(records), desc="evaluate", leave=False, disable=None) as bar:
        for rows in cut(encode_rows(encode, asked, write), BATCHES_AT_ONCE * batch_tokens):
            num_tokens += sum(example.num_supervised for _, example in rows)
            if stage is not None:
                trained = [example for _, example in rows if example.num_supervised]
                total += stage.denominator(trained)
                sums.update(stage_sums(model, stage, trained, batch_tokens))
                # what is asked from here on: of a preference the chosen side
                rows = [(r, stage.sequences(example)[0] if example.num_supervised else example) for r, example in rows]
            if task is not None:
                for line in answer_lines(model.family, task, rows, partial(ask, first_prompt=num_asked), others or {}):
                    write(line)
            num_asked += len(rows)
            bar.update(len(rows))
    good = [line for line in lines if "problem" not in line]
    figures = {"num_rows": len(records), "num_problems": len({line["where"] for line in lines if "problem" in line})}
    figures["num_tokens"] = num_tokens
    if total:
        figures |= {name: value / total for name, value in sums.items()}
    if good and "stopped" in good[0]:
        figures["stop_rate"] = fmean(line["stopped"] for line in good)
        figures["answer_tokens"] = fmean(line["answer_tokens"] for line in good)
    return Evaluation(figures | (task.summarize(good) if good else {}), list(sums), lines)


def answer_lines(
    family: Family, task: Task, rows: list[tuple[Record, Example]], ask: Callable[..., list[Answer]], others: dict[str, dict]
) -> Iterator[dict[str, Any]]:
    """The lines of some rows: each one's answers, one after the other, with their scores."""
    prompts = [family.prompt_of(example) for _, example in rows]
    answers = ask(prompts)
    num_samples = len(answers) // len(rows)
    for number, answer in enumerate(answers):
        place, sample = divmod(number, num_samples)
        record, example = rows[place]
        reply = reply_to(family, record, example, prompts[place], answer)
        reply.other = others.get(record.where, {}).get("response")
        yield score(task, reply, answer) | ({"sample": sample} if num_samples > 1 else {})


def encode_rows(
    encode: Callable[[Record], Any], records: Iterable[Record], write: Callable[[dict[str, Any]], None]
) -> Iterator[tuple[Record, Any]]:
    """Each record with its example; one that cannot be encoded is written as a line with the problem."""
    for record in records:
        try:
            yield record, encode(record)
        except UserError as error:
            write({"id": record.id, "where": record.where, "problem": str(error)})


def encode_row(family: Family, record: Record) -> Example:
    """A record up to its last trained answer; of a problem the prompt, which has no label."""
    if record.kind == "problem":
        return family.encode_prompt(record.messages, record.tools)
    return family.encode(up_to_answer(record.messages), record.tools)


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


def stage_sums(model: Model, stage: Any, examples: list[Any], micro_tokens: int) -> dict[str, float]:
    """Sums of the stage's loss and figures over the examples, without dropout."""
    sums = Counter()
    with inference(model):
        for row in stage.pack(examples, micro_tokens):
            loss, figures = stage.loss(model, row.to(model.device), 1.0)
            sums.update({name: float(value) for name, value in {"loss": loss, **figures}.items()})
    return sums


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
