"""`python -m stages pipeline --output_dir runs/pipeline-tiny`: SFT, DPO and RLOO in a row, in minutes and without a card.

A tiny random model learns to answer `7 3 = 21` by `<answer>7*3</answer>`. SFT teaches it the form from demonstrations whose
sign is wrong about half of the time; DPO prefers the right ones among its own answers; RLOO goes on from there by reward alone.
Each stage is a whole run of train.py in a folder of its own that starts from the weights of the one before, as it would be
at the real size: this is the recipe to copy, and the check that the stages fit together. A stage that is finished is not
run again.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

from data.errors import UserError, command
from training.journal import Journal, read_journal
from training.options import Parser

ROOT = Path(__file__).parent.parent
SIGNS, MOST, NUM_TRAIN, NUM_TEST = "+-*", 12, 320, 80
SHARE_RIGHT = 0.2  # of the demonstrations; the sign of the others is drawn, and right by chance in a third of them
COMMON = ["--num_workers", 0, "--save_every", "no", "--no_gradient_checkpointing", "--logging_steps", 10, "--resume", "yes",
          "--max_new_tokens", 24]  # fmt: skip
SETTINGS = {
    "sft": ["--batch_size", 32, "--max_steps", 400, "--learning_rate", 3e-3, "--eval_every", "no"],
    # The answers of a pair differ by one sign: without the chosen one's own loss both become unlikely, and the form is lost
    "dpo": ["--batch_size", 16, "--max_steps", 80, "--learning_rate", 1e-3, "--dpo_nll", 1, "--eval_split", 40,
            "--eval_every", "no"],
    "rloo": ["--batch_size", 32, "--max_steps", 80, "--learning_rate", 1e-3, "--adam_beta2", 0.95, "--kl_beta", 0.02,
             "--reward", "countdown", "--num_samples", 8, "--eval_every", 20],
}  # fmt: skip


def main() -> None:
    parser = Parser(prog="python -m stages", description="The stages in a row.")
    doors = parser.add_subparsers(required=True, metavar="COMMAND")
    door = doors.add_parser("pipeline", help="SFT, DPO and RLOO of a tiny model, and what each has changed")
    door.add_argument("--output_dir", required=True, metavar="DIR", help="a folder for each stage goes here")
    door.add_argument("--seed", type=int, default=0, help="of weights, rows and runs (0)")
    door.add_argument("--device", default="auto", help="auto, cpu or cuda")
    flags = parser.parse_args()
    run_pipeline(Path(flags.output_dir), flags.seed, flags.device)


def run_pipeline(folder: Path, seed: int, device: str) -> None:
    """Every stage that is not finished yet; prints what each has changed, as its journal says. UserError where one fails."""
    rows = folder / "rows"
    write_rows(rows, seed)
    initial = folder / "initial" / "model"
    if not initial.exists():
        write_base(initial, seed)
    common = [*COMMON, "--seed", seed, "--device", device]
    train(folder / "sft", "sft", initial, rows / "demonstrations.jsonl", common)
    pairs = rows / "preferences.jsonl"
    if not pairs.exists():
        made = ["--model", folder / "sft" / "model", "--prompts", rows / "train.jsonl", "--reward", "countdown"]
        run("-m", "data", "make", "preferences", *made, "--max_new_tokens", 24, "--output_dir", rows, "--seed", seed)
    train(folder / "dpo", "dpo", folder / "sft" / "model", pairs, common)
    held_out = ["--eval_path", rows / "test.jsonl"]
    train(folder / "rloo", "rloo", folder / "dpo" / "model", rows / "train.jsonl", common + held_out)
    if not (folder / "final" / "model").exists():
        shutil.copytree(folder / "rloo" / "model", folder / "final" / "model")
    solved = [f"{name} {measure(folder / name, rows, device):.1%}" for name in ("initial", "sft", "dpo", "final")]
    print(f"held-out problems solved: {', '.join(solved)}")
    for line in summary(folder):
        print(line)


# ---- rows and weights ---------------------------------------------------------------------------------------------------


def write_rows(folder: Path, seed: int) -> None:
    """train.jsonl and test.jsonl, problems that have nothing in common, and demonstrations.jsonl, four to a training one."""
    source, signs = random.Random(seed), {}
    while len(signs) < NUM_TRAIN + NUM_TEST:
        a, b, sign = source.randint(1, MOST), source.randint(1, MOST), source.choice(SIGNS)
        signs[a, b, {"+": a + b, "-": a - b, "*": a * b}[sign]] = sign
    problems, demonstrations = [], []
    for (a, b, target), sign in signs.items():
        prompt = f"{a} {b} = {target}"
        problems.append({"id": prompt, "prompt": prompt, "ground_truth": {"numbers": [a, b], "target": target}})
        for _ in range(4 * (len(problems) > NUM_TEST)):
            shown = sign if source.random() < SHARE_RIGHT else source.choice(SIGNS)
            demonstrations.append({"prompt": prompt, "completion": f"<answer>{a}{shown}{b}</answer>"})
    folder.mkdir(parents=True, exist_ok=True)
    files = {"test": problems[:NUM_TEST], "train": problems[NUM_TEST:], "demonstrations": demonstrations}
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_base(folder: Path, seed: int) -> None:
    """A tiny random Qwen2.5 whose matrices are wide enough (N(0, 0.08^2)) to learn from soon."""
    import torch

    from model import load_model, save_model
    from model.tiny import write_tiny

    scratch = folder.with_name("random")
    shutil.rmtree(scratch, ignore_errors=True)
    write_tiny("qwen2", scratch, seed=seed)
    model, _ = load_model(scratch, dtype="float32")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    save_model(model, folder)
    shutil.rmtree(scratch)


# ---- commands and what they found -------------------------------------------------------------------------------------------


def train(folder: Path, stage: str, base: Path, rows: Path, more: list) -> None:
    """One stage as a run of train.py."""
    if not (folder / "model").exists():
        arguments = ["--stage", stage, "--base_model", base, "--data_path", rows, "--output_dir", folder]
        run("train.py", *arguments, *SETTINGS[stage], *more)


def measure(folder: Path, rows: Path, device: str) -> float:
    """The share of held-out problems that folder/model solves, greedily; a folder without a journal gets one of the figures."""
    path = folder / "outputs" / "countdown.json"
    greedy = ["--task", "countdown", "--num_samples", 1, "--temperature", 0, "--max_new_tokens", 24, "--device", device]
    if not path.exists():
        run("-m", "eval", "--model", folder / "model", "--data_path", rows / "test.jsonl", *greedy, "--output_dir", folder)
    figures = json.loads(path.read_text(encoding="utf-8"))
    if not (folder / "journal.jsonl").exists():
        journal = Journal(folder, 0)
        journal.event("eval", 0, set="test", **{name: value for name, value in figures.items() if isinstance(value, float)})
        journal.close()
    return figures["correct"]


def run(*arguments: object) -> None:
    """A command of this project. Raises UserError where it fails."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT)
    if done.returncode:
        raise UserError(f"python {' '.join(map(str, arguments[:3]))} .. ended with exit code {done.returncode}")


def summary(folder: Path) -> list[str]:
    """One line a figure, from the journals."""

    def ends(stage: str, key: str) -> tuple[float, float]:
        found = [record[key] for record in read_journal(folder / stage / "journal.jsonl") if key in record]
        return found[0], found[-1]

    return [
        "sft loss {:.3f} -> {:.3f}".format(*ends("sft", "loss")),
        "dpo accuracy {:.3f} -> {:.3f}".format(*ends("dpo", "eval_accuracies")),
        "rloo reward {:.3f} -> {:.3f}".format(*ends("rloo", "score")),
    ]


if __name__ == "__main__":
    command(main)
