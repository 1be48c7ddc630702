"""REINFORCE leave-one-out: sample several answers to a prompt, and raise the odds of those that beat the others.

A step's prompts are answered num_samples times each by the model as it is, a reward judges every answer (eval/rewards.py),
and an answer's advantage is its reward less what its siblings got on average: a baseline that needs no second network
(arXiv 2402.14740). A whole answer is one action. Leaving the reference, the model as it was at the start, costs reward.
Beside SFT's forward and backward a step costs the sampling and two forwards of every answer, the policy's (whose numbers
the ratio needs in the very arithmetic of training; a sampler's differ in their last digits) and the reference's.
"""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.errors import UserError
from stages import sft
from training.guards import halving
from training.journal import PatientFile
from training.options import option

if TYPE_CHECKING:
    import torch

    from data.batches import Packed
    from data.labels import Example
    from data.records import Record
    from eval.generate import Answer
    from eval.metrics import Reply
    from eval.tasks import Task
    from eval.vllm_backend import Engine
    from model.family import Model

NOT_SHOWN = ("advantage", "old_logprob")  # values of an answer that are no figures of the step
SILENT_STEPS = 10  # in a row without a prompt that teaches, after which the run says so
SMALLEST_SPREAD = 1e-4  # what --advantage group_std adds to the standard deviation, as TRL does


@dataclass
class Flags:
    reward: str | None = option(None, "what judges an answer: a rule (countdown, text, box_iou, ..), a reward model's folder, "
                                "MODEL@URL of a server, or module:function of yours", shown="NAME")
    requests_per_minute: float = option(0.0, "to a reward's server at most; 0: as many as it takes", steers=False)
    num_samples: int = option(8, "answers to each prompt, of max_new_tokens at most: CS224R's 8; TRL takes 2", low=2)
    temperature: float = option(1.0, "of sampling and of every log-probability: TRL's and CS224R's 1", low=0.01)
    advantage: str = option("loo", "of an answer: reward less the mean of the prompt's other answers (loo), less the mean of "
                            "all (group), or that divided by their standard deviation (group_std, GRPO's)",
                            words="loo group group_std")
    kl_beta: float = option(0.05, "reward that a nat of log p/reference costs: TRL's default; CS224R and TinyZero, whose "
                            "rewards cannot be gamed, take 0.001; 0: no reference")
    kl_placement: str = option("reward", "the KL is part of the reward before the baseline (arXiv 2402.14740, TRL), or comes "
                               "off the advantage after it (OpenRLHF, there from each token on)", words="reward advantage")
    num_iterations: int = option(1, "updates on the answers of a step, each on all of them: TRL's default", low=1)
    clip_range: float = option(0.2, "from the second of these updates on, how far an answer's probability may move for gain, "
                               "as a share: PPO's and TRL's")
    mask_truncated_completions: bool = option(False, "no loss for answers that max_new_tokens cut off; their rewards stay in "
                                              "the baseline")
    missing_eos_penalty: float = option(0.0, "reward that an answer cut off by max_new_tokens loses")
    rollout_backend: str = option("own", "what samples: eval/generate.py, or vllm, which is to be installed beside this",
                                  words="own vllm")

    # CS224R's constant rate. Without dropout the first ratio of policy and sampler is 1; evaluation is by answers.
    defaults = {"lora_dropout": 0.0, "lr_schedule": "constant", "predict_with_generate": True}

    def __post_init__(self):
        if self.reward is None:
            raise UserError("--reward is missing; name what judges the answers, such as countdown or text")


@dataclass
class Question:
    """A row before it is answered: the prompt, and the record with what an answer is judged by."""

    prompt: "Example"
    record: "Record"
    num_supervised = 0

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def id(self) -> str:
        return self.record.id


class Stage(sft.Stage):
    """See stages/__init__.py for what each method is asked for."""

    takes = ("problem",)
    rate = 0.2  # of SFT's: 9e-6 for all weights of Qwen2.5-0.5B (CS224R: 1e-5); TRL's 1e-6 is for larger models

    def __init__(self, flags: Flags, model: "Model", max_length: int | None = None):
        from eval.rewards import find_reward
        from lora.adapter import reference_of

        super().__init__(flags, model, max_length)
        self.flags, self.num_answers = flags, flags.num_samples
        self.judge = find_reward(flags.reward, requests_per_minute=flags.requests_per_minute, device=str(model.device))
        self.held_bytes = {"reward model": getattr(self.judge, "num_bytes", 0)}
        self.reference = reference_of(model) if flags.kl_beta else None
        if flags.kl_beta and self.reference is None:  # the weights themselves are trained: a second set of them is held
            self.reference = reference_of(model, copy=True)
            self.held_bytes["reference weights"] = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        self.samples: PatientFile | None = None
        self.silent_steps = 0
        self.engine = None  # vLLM's, started when it is first asked
        if flags.rollout_backend == "vllm":
            from eval import vllm_backend

            vllm_backend.check(model)
            self.held_bytes["vLLM and its weights"] = vllm_backend.held_bytes(model)

    @property
    def task(self) -> "Task":
        """Held-out problems are judged by the reward."""
        from eval.tasks import Task

        return Task([lambda reply: self.rewards([reply])[0]])

    def encode(self, record: "Record") -> Question:
        return Question(self.family.encode_prompt(record.messages, record.tools, id=record.id, where=record.where), record)

    def prepare(self, run: Any) -> None:
        """A resumed run must sample answers as long as before, and be told what a server has said of them before."""
        from eval.judges import ServedReward

        run.identity["max_new_tokens"] = run.config.max_new_tokens
        if isinstance(self.judge, ServedReward):
            self.judge.server.keep_in(run.folder)

    def sequences(self, row: "Question | Example") -> list["Example"]:
        return [getattr(row, "prompt", row)]

    def denominator(self, answers: Iterable["Example"]) -> float:
        """Sampled answers of a step, those without a loss included."""
        return float(sum(1 for _ in answers))

    # ---- answers and their advantages ---------------------------------------------------------------------------------

    def collect(self, run: Any, questions: list[Question]) -> list[list["Example"]]:
        """The step's answers as Examples that carry advantage, old_logprob and figures; once for each update on them."""
        if not questions:  # every row of the step was skipped
            return [[]]
        started = time.perf_counter()
        replies, examples = self.sample(run, questions)
        rewards = self.rewards(replies)
        sampled = time.perf_counter()
        scores = halving(run.state, "micro_tokens", min(map(len, examples)), lambda: self.score(run, examples))  # (3, N)
        seconds = {"sampling_seconds": sampled - started, "scoring_seconds": time.perf_counter() - sampled}
        values = self.weigh(replies, examples, rewards, scores)
        for number, example in enumerate(examples):
            example.values = {name: float(of_all[number]) for name, of_all in values.items()} | seconds
        if run.journal is not None:
            self.write_samples(run, replies, examples)
            self.watch(run, learns=bool(values["reward_spread"].any()))
        return [examples] * self.flags.num_iterations

    def watch(self, run: Any, learns: bool) -> None:
        """Say so when steps in a row had no prompt with two answers of different reward: a night could pass like this."""
        self.silent_steps = 0 if learns else self.silent_steps + 1
        if self.silent_steps == SILENT_STEPS:
            run.journal.say(
                f"note: in {SILENT_STEPS} steps in a row all answers to a prompt got the same reward, which teaches nothing; "
                "outputs/rollouts.jsonl shows some. SFT first, easier rows, more --num_samples or a higher --temperature help"
            )

    def sample(self, run: Any, questions: list[Question]) -> tuple[list["Reply"], list["Example"]]:
        """num_samples answers to each question, side by side: what a reward is given, and what is trained on. A function
        of weights, seed and step, so that a resumed run samples what the run would have."""
        from data.batches import hash_seed
        from eval.evaluate import reply_to

        seed, prompts = hash_seed(run.config.seed, run.state.step), [question.prompt for question in questions]
        one_prompt = self.num_answers * run.config.max_new_tokens
        answers = halving(run.state, "cache_tokens", one_prompt, lambda: self.answer(run, prompts, seed))
        asked = [question for question in questions for _ in range(self.num_answers)]
        pairs = list(zip(asked, answers, strict=True))
        return [reply_to(self.family, q.record, q.prompt, q.prompt, a) for q, a in pairs], [self.join(q, a) for q, a in pairs]

    def answer(self, run: Any, prompts: list["Example"], seed: int) -> list["Answer"]:
        from eval.generate import generate

        settings = {"temperature": self.flags.temperature, "num_samples": self.num_answers, "seed": seed}
        if self.flags.rollout_backend == "vllm":
            return self.start_engine(run).generate(prompts, run.config.max_new_tokens, **settings)
        with run.precision.autocast():
            return generate(run.model, prompts, run.config.max_new_tokens, **settings, batch_tokens=run.state.cache_tokens)

    def start_engine(self, run: Any) -> "Engine":
        from eval.vllm_backend import Engine

        if self.engine is None:
            tokens = run.state.cache_tokens
            self.engine = Engine(run.model, run.adapter_settings, run.precision.compute, tokens, tokens // self.num_answers)
        return self.engine

    def join(self, question: Question, answer: "Answer") -> "Example":
        """Prompt and answer as an Example whose supervised tokens are the answer's, the stop token included."""
        from data.labels import NO_LOSS

        prompt = question.prompt
        ids, labels = prompt.input_ids.tolist() + answer.ids, [NO_LOSS] * len(prompt) + answer.ids
        example = self.family.example(ids, labels, prompt.pixels)
        example.id, example.where, example.values = prompt.id, prompt.where, {"sampler_logprob": sum(answer.logprobs)}
        return example

    def rewards(self, replies: list["Reply"]) -> list[dict[str, float]]:
        """The reward's numbers of each answer. Raises UserError where it fails, or gives a score that is no number."""
        try:
            found = self.judge(replies)
        except UserError:
            raise
        except Exception as error:  # a reward may be anyone's
            raise UserError(f"--reward {self.flags.reward} fails ({type(error).__name__}: {error})") from error
        for reply, values in zip(replies, found, strict=True):
            if not math.isfinite(values["score"]):
                raise UserError(f"{reply.where}: --reward {self.flags.reward} gives a score of {values['score']}")
        return found

    def score(self, run: Any, examples: list["Example"]) -> "torch.Tensor":
        """log p, entropy (a sum over the tokens) and the reference's log p of N answers, in training's packed rows: (3, N)."""
        import torch

        from data.batches import group, pack_row
        from eval.generate import inference
        from model.head import sequence_logprobs

        places = {id(example): place for place, example in enumerate(examples)}
        found = torch.zeros(len(examples), 3, dtype=torch.float64)  # (N, 3)
        for row in group(examples, run.state.micro_tokens):
            packed, rows = pack_row(row).to(run.device), [places[id(example)] for example in row]
            with inference(run.model), run.precision.autocast():
                found[rows, :2] = self.logprobs_and_entropies(run.model, packed).cpu().double()
                found[rows, 2] = found[rows, 0]
                if self.reference:
                    with self.reference():
                        found[rows, 2] = sequence_logprobs(run.model, packed, self.flags.temperature).cpu().double()
        return found.T

    def logprobs_and_entropies(self, model: "Model", packed: "Packed") -> "torch.Tensor":
        """log p of each example's answer and the sum of its tokens' entropies, at the sampling temperature: (S, 2)."""
        import torch

        from model.head import per_token, sum_by_example

        def both(logits: "torch.Tensor", target: "torch.Tensor") -> "torch.Tensor":  # (c, V), (c,) -> (c, 2)
            every = (logits / self.flags.temperature).log_softmax(-1)
            return torch.stack([every.gather(1, target[:, None])[:, 0], -(every.exp() * every).sum(-1)], -1)

        where, target = packed.supervised()
        return sum_by_example(per_token(model.hidden(packed), model.head_weight, both, where, target), packed, where)

    def weigh(
        self, replies: list["Reply"], examples: list["Example"], rewards: list[dict[str, float]], scores: "torch.Tensor"
    ) -> dict[str, "torch.Tensor"]:
        """The values of N answers by name, (N,) each: what the loss reads, and the figures of the step. scores: see score()."""
        logprob, entropy, reference = scores
        stopped, num_tokens = column(r.stopped for r in replies), column(e.num_supervised for e in examples)
        reward = column(one["score"] for one in rewards) - self.flags.missing_eos_penalty * (1 - stopped)
        kl, spread = logprob - reference, spread_by_prompt(reward, self.num_answers)
        advantage = shaped_advantages(reward, kl, self.flags)
        if self.flags.mask_truncated_completions:
            advantage = advantage * stopped
        values = {
            "advantage": advantage, "old_logprob": logprob, "reward": reward, "reward_spread": spread, "no_signal": spread == 0,
            "entropy": entropy / num_tokens, "answer_tokens": num_tokens, "stop_rate": stopped,
            "sampler_kl": column(e.values["sampler_logprob"] for e in examples) - logprob,
        }  # fmt: skip
        if self.reference:
            values["kl"] = kl
        for name in sorted(set.intersection(*map(set, rewards)) - {"score"}):  # the reward's own numbers, where all have them
            values.setdefault(f"reward_{name}", column(one[name] for one in rewards))
        return values

    def write_samples(self, run: Any, replies: list["Reply"], examples: list["Example"]) -> None:
        """The answers to the step's first prompt, into outputs/rollouts.jsonl."""
        self.samples = self.samples or PatientFile(run.folder / "outputs" / "rollouts.jsonl")
        for reply, example in list(zip(replies, examples, strict=True))[: self.num_answers]:
            line = {"when": "rollout", "step": run.state.step + 1, "id": reply.id, "prompt": reply.prompt,
                    "response": reply.response, "label": reply.label, "stopped": reply.stopped}  # fmt: skip
            line |= {name: example.values[name] for name in ("reward", "advantage", "answer_tokens")}
            self.samples.write(json.dumps(line, ensure_ascii=False) + "\n")

    # ---- the loss -----------------------------------------------------------------------------------------------------

    def loss(self, model: "Model", packed: "Packed", total: float) -> tuple["torch.Tensor", dict[str, "torch.Tensor"]]:
        """-sum_i min(r_i A_i, clip(r_i, 1 - c, 1 + c) A_i) / total with r_i = p(answer i) / p when it was sampled.

        In the first update r is 1: the value is minus the mean advantage, 0 but for rounding, and the gradient is that of
        -A_i log p(answer i). clipped: the share of answers whose ratio is beyond the range.
        """
        from model.head import sequence_logprobs

        values, reach = packed.values, self.flags.clip_range
        ratio = (sequence_logprobs(model, packed, self.flags.temperature) - values["old_logprob"]).exp()  # (S,)
        gain = (ratio * values["advantage"]).minimum(ratio.clamp(1 - reach, 1 + reach) * values["advantage"])
        figures = {name: value.sum() / total for name, value in values.items() if name not in NOT_SHOWN}
        return -gain.sum() / total, figures | {"clipped": ((ratio.detach() - 1).abs() > reach).sum() / total}


def column(numbers: Iterable[float]) -> "torch.Tensor":
    """One number of each of the N answers: (N,) float64."""
    import torch

    return torch.tensor([float(number) for number in numbers], dtype=torch.float64)


def advantages(rewards: "torch.Tensor", kind: str) -> "torch.Tensor":
    """(P, k) rewards of k answers to each of P prompts -> (P, k), which add up to 0 for every prompt.

    loo: r - mean of the k - 1 others = (r - mean) k / (k - 1). group: r - mean. group_std: (r - mean) / standard deviation
    (of a sample, k - 1), as TRL computes GRPO's.
    """
    away = rewards - rewards.mean(1, keepdim=True)
    if kind == "loo":
        return away * rewards.shape[1] / (rewards.shape[1] - 1)
    return away if kind == "group" else away / (rewards.std(1, keepdim=True) + SMALLEST_SPREAD)


def shaped_advantages(reward: "torch.Tensor", kl: "torch.Tensor", flags: Flags) -> "torch.Tensor":
    """The advantage of each answer from its reward and its log p - log reference, an estimate of KL(p || reference) that
    may be negative (k1): (N,), (N,) -> (N,); a prompt's answers stand side by side."""
    reward, cost = (x.reshape(-1, flags.num_samples) for x in (reward, flags.kl_beta * kl))
    if flags.kl_placement == "reward":
        return advantages(reward - cost, flags.advantage).flatten()
    return (advantages(reward, flags.advantage) - cost).flatten()


def spread_by_prompt(reward: "torch.Tensor", num_samples: int) -> "torch.Tensor":
    """For each answer the largest less the smallest reward of its prompt's answers, (N,); 0: the prompt teaches nothing."""
    groups = reward.reshape(-1, num_samples)  # (P, k)
    return (groups.amax(1) - groups.amin(1)).repeat_interleave(num_samples)
