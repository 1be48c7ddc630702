"""Direct preference optimisation: of two answers to one prompt, raise the odds of the chosen one against the rejected one.

Both answers are measured against a reference, the model as it was at the start (Rafailov et al. 2023, arXiv 2305.18290), so
leading away from it costs. With an adapter the reference is the same weights with the adapter off, or as it was loaded
(--adapter): one more forward, and no second model. Full fine-tuning moves the only weights there are; there the reference's
two numbers a pair are computed before the first step, kept in reference.safetensors and read by row from then on.
"""

import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.errors import UserError
from stages import sft
from training.options import option
from training.reference import FILE, SAVE_SECONDS, Known, fingerprint, key_of, read_reference, write_reference

if TYPE_CHECKING:
    import torch

    from data.batches import Packed
    from data.labels import Example
    from data.records import Record
    from model.family import Model


@dataclass
class Flags:
    dpo_beta: float = option(0.1, "how much a distance from the reference costs: TRL's and CS224R's default", low=1e-4)
    dpo_loss: str = option("sigmoid", "sigmoid: -log sigmoid(beta h) of the margin h; ipo: (h - 1/(2 beta))^2, which stops at "
                           "a margin instead of widening it for ever (arXiv 2310.12036)", words="sigmoid ipo")
    dpo_length: str = option("sum", "log-probability of an answer: the sum over its tokens (DPO, and IPO in OpenRLHF and "
                             "CS224R), or the mean, which favours no length (IPO in TRL)", words="sum mean")
    label_smoothing: float = option(0.0, "share of pairs thought to be labelled the wrong way round (sigmoid only)", high=0.49)
    dpo_nll: float = option(0.0, "weight of the chosen answer's negative log-likelihood a token, against both answers "
                            "becoming unlikely (arXiv 2404.19733)")
    precompute_ref_log_probs: bool = option(False, "compute the reference once for all epochs, for adapters too; full "
                                            "fine-tuning always does")

    # Dropout would make policy and reference differ where the weights do not; TRL switches it off in DPO as well.
    defaults = {"lora_dropout": 0.0}

    def __post_init__(self):
        if self.label_smoothing and self.dpo_loss == "ipo":
            raise UserError("label_smoothing is for --dpo_loss sigmoid: ipo does not take labels for certain; drop one of them")


@dataclass
class Pair:
    """A row as it is trained on: two Examples that lie in one packed row and share nothing but the weights."""

    chosen: "Example"
    rejected: "Example"

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)

    @property
    def num_supervised(self) -> int:
        return self.chosen.num_supervised + self.rejected.num_supervised

    @property
    def id(self) -> str:
        return self.chosen.id

    @property
    def where(self) -> str:
        return self.chosen.where


class Stage(sft.Stage):
    """See stages/__init__.py for what each method is asked for."""

    takes = ("preference",)
    # A tenth of SFT's rate: 4.6e-6 for all weights of Qwen2.5-0.5B (CS224R: 5e-6), 1.1e-6 of a 7B (TRL: 1e-6), LoRA 10 times
    rate = 0.1

    def __init__(self, flags: Flags, model: "Model", max_length: int | None = None):
        from lora.adapter import reference_of

        super().__init__(flags, model, max_length)
        self.flags = flags
        go_back = reference_of(model)  # None: the weights themselves are trained
        self.reference = go_back or nullcontext
        self.precomputes = flags.precompute_ref_log_probs or go_back is None
        self.known: Known | None = None

    # ---- rows ---------------------------------------------------------------------------------------------------------

    def encode(self, record: "Record") -> Pair:
        """Both conversations; only their last answers, where they differ, have a loss."""
        place = {"id": record.id, "where": record.where}
        sides = [self.family.encode(turns, record.tools, self.max_length, **place) for turns in record.conversations]
        for side in sides:
            if side.num_supervised == 0:
                raise UserError(f"{record.where}: no token of an answer has a loss; remove the row")
            side.pixels = sides[0].pixels  # the same pictures: carried once
            side.values = {"num_tokens": float(side.num_supervised)}
        pair = Pair(*sides)
        if self.known is not None:
            found = self.known.get(key_of(sides))
            if found is None:
                raise UserError(f"{record.where}: the row or its picture is not what it was when {FILE} was made; put it back, "
                                "or delete that file to have it made again")
            for side, logprob in zip(sides, found, strict=True):
                side.values["reference"] = logprob
        return pair

    def sequences(self, pair: Pair) -> list["Example"]:
        return [pair.chosen, pair.rejected]

    def denominator(self, pairs: Iterable[Pair]) -> float:
        return float(sum(1 for _ in pairs))

    def pack(self, pairs: list[Pair], micro_tokens: int) -> list["Packed"]:
        """Packed rows of chosen, rejected, chosen, ..; a pair is never cut."""
        from data.batches import group, pack_row

        return [pack_row(sum(map(self.sequences, row), [])) for row in group(pairs, micro_tokens)]

    # ---- the loss -----------------------------------------------------------------------------------------------------

    def loss(self, model: "Model", packed: "Packed", total: float) -> tuple["torch.Tensor", dict[str, "torch.Tensor"]]:
        """The sum of the pairs' losses / total, and figures that TRL's users know.

        margins: beta h, by how much more the policy prefers the chosen answer than the reference does. accuracies: the share
        of positive margins, a margin of 0 counting half. chosen_logps, rejected_logps: of the answers under the policy; both
        falling is common, and dpo_nll's business. kl: mean of log reference - log policy over both answers, an estimate of
        KL(reference || policy) as if the reference had written them; it may be negative.
        """
        from model.head import sequence_logprobs

        num_tokens = packed.values["num_tokens"]
        known = packed.values.get("reference")
        reference = self.reference_logprobs(model, packed) if known is None else known
        policy = sequence_logprobs(model, packed)  # (2P,)
        per_length = num_tokens if self.flags.dpo_length == "mean" else 1
        scores, away = policy / per_length, (policy - reference) / per_length
        difference = away[0::2] - away[1::2]  # (P,) h
        losses = pair_losses(difference, self.flags)
        if self.flags.dpo_nll:
            losses = losses - self.flags.dpo_nll * (policy / num_tokens)[0::2]
        margins, seen, away = self.flags.dpo_beta * difference.detach(), scores.detach(), away.detach()
        figures = {
            "margins": margins, "accuracies": (margins.sign() + 1) / 2, "chosen_logps": seen[0::2],
            "rejected_logps": seen[1::2], "kl": -away / 2,
        }
        return losses.sum() / total, {name: values.sum() / total for name, values in figures.items()}

    def reference_logprobs(self, model: "Model", packed: "Packed") -> "torch.Tensor":
        """Log-probabilities of a packed row's answers under the reference, without dropout: (2P,)."""
        from eval.generate import inference
        from model.head import sequence_logprobs

        with inference(model), self.reference():
            return sequence_logprobs(model, packed)

    # ---- the reference, once ------------------------------------------------------------------------------------------

    def prepare(self, run: Any) -> None:
        """Make or read reference.safetensors. The first epoch's own packed rows run, so its first margins are exactly 0."""
        from tqdm import tqdm

        if not self.precomputes:
            return
        path, purpose = run.folder / FILE, fingerprint(run)
        num_steps = min(run.batches.steps_per_epoch, run.last)
        known, num_done = read_reference(path, purpose)
        started = saved = time.monotonic()
        if num_done <= num_steps:
            print(f"computing the reference's log-probabilities once, into {path}")
            steps = run.batches.steps(num_done, num_steps)
            for pairs in tqdm(steps, "reference", num_steps, leave=False, initial=num_done, disable=None):
                self.measure(run, run.rows.usable(pairs), known)
                num_done += 1
                if time.monotonic() - saved > SAVE_SECONDS:
                    write_reference(path, purpose, known, num_done)
                    saved = time.monotonic()
            self.measure_evaluation(run, known)
            write_reference(path, purpose, known, num_steps + 1)
        print(f"{FILE}: {len(known)} pairs, {time.monotonic() - started:.1f} seconds")
        self.known = known

    def measure(self, run: Any, pairs: list[Pair], known: Known) -> None:
        """Add the pairs' log-probabilities under the reference to `known`."""
        from data.batches import group, pack_row

        for row in group(pairs, run.state.micro_tokens):
            packed = pack_row(sum(map(self.sequences, row), [])).to(run.device)
            with run.precision.autocast():
                logprobs = self.reference_logprobs(run.model, packed).tolist()
            keys = [key_of(self.sequences(pair)) for pair in row]
            known.update(zip(keys, zip(logprobs[0::2], logprobs[1::2], strict=True), strict=True))

    def measure_evaluation(self, run: Any, known: Known) -> None:
        """measure() for the pairs that the run is evaluated on, in evaluation's own packed rows."""
        from eval.evaluate import BATCHES_AT_ONCE, cut, encode_rows

        for records, indices in [*run.rows.eval_sets.values(), *filter(None, [run.rows.test_set])]:
            rows = encode_rows(self.encode, (records[i] for i in indices), write=lambda line: None)
            for some in cut(rows, BATCHES_AT_ONCE * run.state.micro_tokens):
                self.measure(run, [pair for _, pair in some], known)


def pair_losses(difference: "torch.Tensor", flags: Flags) -> "torch.Tensor":
    """The loss of each pair from h, its log-ratio against the reference, chosen less rejected: (P,) -> (P,).

    DPO: equation 7 of arXiv 2305.18290; smoothed as in "conservative DPO" (E. Mitchell's note of 2023 on noisy preferences).
    IPO: equation 17 of arXiv 2310.12036, whose tau is beta.
    """
    import torch.nn.functional as F

    if flags.dpo_loss == "ipo":
        return (difference - 1 / (2 * flags.dpo_beta)) ** 2
    right, wrong = F.logsigmoid(flags.dpo_beta * difference), F.logsigmoid(-flags.dpo_beta * difference)
    return -(1 - flags.label_smoothing) * right - flags.label_smoothing * wrong
