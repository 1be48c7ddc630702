"""Evaluation inside a run: before the first step, while training and at the end, and the report that shows it.

Every held-out set is a name and rows; a set's answers go to outputs/<name>.jsonl, each line saying when it was given, so
that any figure can be computed again from the file. Evaluating before training costs one pass and pays twice: it shows
what the model could do already, and a run whose evaluation would crash crashes before its first step.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.boxes import boxes_of, parse_boxes
from data.errors import UserError
from data.images import open_image
from data.rows import Rows
from eval.evaluate import Evaluation
from eval.tasks import Task, find_task
from model.family import Model
from model.shards import whole_file
from training.guards import is_out_of_memory
from training.journal import Journal, PatientFile, check_logger, read_journal
from training.report import Report, Sample, read_report, write_report
from training.state import State

NUM_SAMPLES = 6  # rows of each set on the report's page
NOT_COMPARED = ("num_rows", "num_problems", "num_tokens")
NO_SHARES = ("answer_tokens", "num_answers", "margin", "chosen_logp", "rejected_logp")  # figures that are no percentages


class Examiner:
    """The evaluation sets of one run, their figures and answers so far, and the report."""

    def __init__(
        self, config: Any, model: Model, stage: Any, rows: Rows, precision: Any, journal: Journal, state: State
    ):
        """stage: whose loss is computed. state: where the run stands."""
        self.config, self.model, self.stage, self.rows, self.precision = config, model, stage, rows, precision
        self.journal, self.state, self.start = journal, state, state.step
        self.folder = Path(config.output_dir)
        self.task: Task | None = None
        if config.predict_with_generate or rows.test_set:
            task = stage.task if config.eval_task == "auto" and stage.task else find_task(config.eval_task)
            self.task = replace(task, max_new_tokens=config.max_new_tokens, sampling={})  # one greedy answer a row
        # when -> set -> figure -> value, and when -> set -> lines; "resumed": at the step that a resumed run stands at
        self.figures: dict[str, dict[str, dict[str, float]]] = {}
        self.lines: dict[str, dict[str, list[dict]]] = {}
        self.files: dict[str, PatientFile] = {}  # set -> outputs/<set>.jsonl
        self._restore()

    def _restore(self) -> None:
        """What was found before the first step, and at the step that a resumed run stands at, from the journal and outputs/;
        lines of outputs/ from after this step, which the run writes again, are dropped."""
        for record in read_journal(self.journal.path):
            if record.get("event") == "eval" and record["step"] in (0, self.start):
                found = {key: value for key, value in record.items() if key not in ("event", "step", "set", "seconds")}
                self.figures.setdefault("resumed" if record["step"] else "before", {})[record["set"]] = found
        for path in (self.folder / "outputs").glob("*.jsonl"):
            whole = path.read_bytes().rpartition(b"\n")[0]  # a kill may have torn the last line
            lines = map(json.loads, whole.splitlines())  # of bytes: text is split at U+2028 and the like too
            kept = [line for line in lines if 0 < self.start and line.get("step", 0) <= self.start]
            if path.stem not in self.figures.get("resumed", {}):  # a kill has cut this evaluation off
                kept = [line for line in kept if not self._is_resumed(line)]
            self.lines.setdefault("before", {})[path.stem] = [line for line in kept if line.get("when") == "before"]
            self.lines.setdefault("resumed", {})[path.stem] = [line for line in kept if self._is_resumed(line)]
            with whole_file(path) as file:
                file.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in kept)

    def _is_resumed(self, line: dict) -> bool:
        """Whether a line of outputs/ is of an evaluation at the step that the run stands at."""
        return line.get("step") == self.start and line.get("when") in ("during", "after")

    def examine(self, step: int, when: str) -> None:
        """Evaluate every set; when is "before", "during" or "after". The test set is answered once, after. What a resumed run
        had found at its step before it was killed is not asked for again."""
        for name, (records, indices) in self.rows.eval_sets.items():
            self._examine_set(step, when, name, [records[i] for i in indices], self.config.predict_with_generate)
        if when == "after" and self.rows.test_set:
            records, indices = self.rows.test_set
            self._examine_set(step, when, "test", [records[i] for i in indices], True)
        if when != "before" and self.figures.get("before"):
            self._write_report()

    def _write_report(self) -> Path:
        path = self.folder / "report.html"
        try:
            write_report(path, self.page())
        except OSError as error:  # it can be made again, which cannot be said of the run
            self.journal.say(f"warning: {path} cannot be written ({error.strerror}); the run goes on")
        return path

    def _examine_set(self, step: int, when: str, name: str, records: list, answers: bool) -> None:
        if step == self.start and name in self.figures.get("resumed", {}):
            self.figures.setdefault(when, {})[name] = self.figures["resumed"][name]
            self.lines.setdefault(when, {})[name] = self.lines["resumed"].get(name, [])
            return
        started = time.perf_counter()
        file = self.files.setdefault(name, PatientFile(self.folder / "outputs" / f"{name}.jsonl"))
        file.write("")  # the file is made even where no answers are asked for
        found = self._evaluate(file, records, self.task if answers else None, {"when": when, "step": step})
        shown = {f"eval_{key}" if key in found.sums else key: value for key, value in found.figures.items()}
        self.figures.setdefault(when, {})[name] = shown
        self.lines.setdefault(when, {})[name] = found.lines
        self.journal.event("eval", step, set=name, seconds=time.perf_counter() - started, **shown)
        self.journal.say(f"{name} at step {step}:", *(f"{key} {value:.4g}" for key, value in shown.items()))

    def _evaluate(self, file: PatientFile, records: list, task: Task | None, extra: dict) -> Evaluation:
        """An Evaluation, and after each out of memory again with half the positions at once: no run dies of this."""
        batch_tokens = self.state.micro_tokens
        place = file.place()
        while True:
            try:
                with self.precision.autocast():
                    return Evaluation(
                        self.model, task, stage=self.stage, batch_tokens=batch_tokens, output=file, extra=extra
                    ).run(records)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if batch_tokens < 2:
                raise UserError("out of memory in evaluation with one row at a time; lower --max_new_tokens or --max_pixels, "
                                "or train without --eval_path and --eval_split and evaluate later, with python -m eval")
            file.go_back(place)
            batch_tokens //= 2
            print(f"out of memory in evaluation: once more with {batch_tokens} positions at a time")

    def compare(self) -> None:
        """Write each figure's value before and after into the journal."""
        for name, after in self.figures.get("after", {}).items():
            before = self.figures.get("before", {}).get(name, {})
            for key in (key for key in after if key in before and key not in NOT_COMPARED):
                is_share = not key.startswith("eval_") and key not in NO_SHARES
                is_share &= all(0 <= value <= 1 for value in (before[key], after[key]))  # a reward may be any number
                unit, scale = ("%", 100) if is_share else ("", 1)
                values = {"before": scale * before[key], "after": scale * after[key], "unit": unit}
                self.journal.event("comparison", self.state.step, name=f"{name}: {key.replace('_', ' ')}", **values)

    def page(self) -> Report:
        """The report's content: what lies in the folder, and samples of the rows answered before and after."""
        report = read_report(self.folder)
        for name, lines in self.lines.get("after", self.lines.get("during", {})).items():
            before = {line["id"]: line for line in self.lines.get("before", {}).get(name, [])}
            shown = [line for line in lines if "response" in line][:NUM_SAMPLES]
            report.samples += [self.sample_of(before.get(line["id"], {}), line) for line in shown]
        return report

    def sample_of(self, before: dict, after: dict) -> Sample:
        """One row of the report from its lines before and after; boxes in pixels of the picture as it lies on disk."""
        picture, boxes = None, {}
        if isinstance(after.get("image"), str):
            picture = open_image(after["image"])
            texts = {"expected": after["label"], "before": before.get("response", ""), "after": after["response"]}
            for name, text in texts.items():
                for box in parse_boxes(text)[:1]:
                    boxes[f"{name}_box"] = boxes_of(self.model.family).locate(box, picture.size)
        return Sample(
            id=after["id"], prompt=after["prompt"], expected=after["label"], before=before.get("response"),
            after=after["response"], picture=picture, before_right=is_right(before), after_right=is_right(after), **boxes,
        )

    def close(self, finished: bool) -> None:
        """Write the last report and print where it is; the built-in task's figures stand in front of it."""
        path = self._write_report()
        if self.config.demo and finished:
            for when in ("before", "after"):
                print(f"{when} {100 * self.figures[when]['demo']['correct']:.1f} %")
        print(f"report {path}")


def check_names(config: Any) -> None:
    """UserError for an eval_task or report_to that will not be found later, before anything is loaded."""
    task = find_task(config.eval_task)
    if not task.metrics and not task.measure:
        raise UserError(f"--eval_task {config.eval_task} compares two models; python -m eval does, after the run")
    check_logger(config.report_to)


def is_right(line: dict) -> bool | None:
    """Whether the task's first score of a line is full; None without a score."""
    scores = [value for value in line.values() if isinstance(value, float)]
    return bool(scores[0] == 1.0) if scores else None
