"""`python -m data make preferences`: pairs of a model's own answers, the better one by a reward against the worse one.

DPO learns most from answers that its own model gives. Each prompt is answered several times, and the answer with the highest
reward is chosen against the one with the lowest. Answers that were cut off are left out, since a pair ends with a stop token
that they never had; prompts whose answers all got the same reward make no pair. Costs the sampling.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from data.errors import UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="model, merged, run or adapter folder, or a hub id")
    add("--prompts", required=True, metavar="FILE", help="problems, as for train.py --stage rloo")
    add("--reward", required=True, metavar="NAME", help="what judges an answer, as for train.py --stage rloo")
    add("--output_dir", required=True, metavar="DIR", help="preferences.jsonl goes here, and all answers, judged_answers.jsonl")
    add("--num_samples", type=int, default=8, metavar="K", help="answers to each prompt (8)")
    add("--temperature", type=float, default=1.0, metavar="T", help="of sampling (1)")
    add("--max_new_tokens", type=int, default=512, metavar="N", help="longest answer (512)")
    add("--prompt_template", metavar="TEXT", help="words of the prompt, as train.py takes them")
    add("--seed", type=int, default=0, metavar="S", help="another seed, other answers (0)")
    add("--device", default="auto", help="auto, cpu or cuda")


def make_preferences(flags: argparse.Namespace) -> None:
    """Write DIR/preferences.jsonl. Raises UserError for rows that are no problems, and where no prompt makes a pair."""
    from data.records import open_records
    from data.template import make_template
    from eval.evaluate import Evaluation
    from eval.subject import open_subject
    from eval.tasks import Task, score_alone

    if flags.num_samples < 2 or not flags.temperature > 0:
        raise UserError("a pair needs --num_samples of at least 2, and a --temperature above 0 to make them differ")
    records = open_records(flags.prompts, takes=("problem",), template=make_template(flags.prompt_template, None, None))
    folder = Path(flags.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    reward = score_alone(flags.reward, folder=folder, device=flags.device)
    sampling = {"num_samples": flags.num_samples, "temperature": flags.temperature, "seed": flags.seed}
    task = Task([reward], max_new_tokens=flags.max_new_tokens, sampling=sampling)
    subject = open_subject(flags.model, device_name=flags.device)
    asked = [records[i] for i in range(len(records))]
    with open(folder / "judged_answers.jsonl", "w", encoding="utf-8", buffering=1) as output, subject.precision.autocast():
        found = Evaluation(subject.model, task, output=output).run(asked)
    problems = [line for line in found.lines if "problem" in line]
    if problems:
        first = f"{problems[0]['where']}: {problems[0]['problem']}"
        print(f"{len(problems)} of {len(found.lines)} answers could not be judged and make no pair; the first: {first}")
    pairs = pair_up(asked, found.lines)
    if not pairs:
        raise UserError(f"no prompt of {flags.prompts} has answers of different reward; {output.name} has the answers")
    path = folder / "preferences.jsonl"
    path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    print(f"{len(pairs)} pairs of {len(records)} prompts in {path}")


def pair_up(records: list, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for DPO from the answered lines of an Evaluation: the best and the worst finished answer of each record."""
    answers, pairs = defaultdict(list), []
    for line in lines:
        if "problem" not in line and line["stopped"]:
            answers[line["where"]].append(line)
    for record in records:
        ranked = sorted(answers[record.where], key=lambda line: line["score"])
        if ranked and ranked[0]["score"] < ranked[-1]["score"]:
            chosen, rejected = (
                [*record.messages, {"role": "assistant", "content": line["response"]}] for line in (ranked[-1], ranked[0])
            )
            pairs.append({"id": record.id, "chosen": chosen, "rejected": rejected})
    return pairs
