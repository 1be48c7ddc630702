"""SimPO: preferences without a reference; an answer's score is the mean log-probability of its tokens (arXiv 2405.14734)."""

from dataclasses import dataclass

from stages import dpo
from training.options import option


@dataclass
class Flags:
    simpo_beta: float = option(2.0, "scale of the scores")
    simpo_margin: float = option(1.0, "how far the chosen answer's score should lie above the rejected one's")


class Stage(dpo.Stage):
    def __init__(self, flags, model, max_length=None):
        super().__init__(dpo.Flags(), model, max_length)
        self.flags = flags

    def prepare(self, run):
        """There is no reference to compute."""

    def loss(self, model, packed, total):
        import torch.nn.functional as F

        from model.head import sequence_logprobs

        scores = self.flags.simpo_beta * sequence_logprobs(model, packed) / packed.values["num_tokens"]  # (2P,)
        margins = scores[0::2] - scores[1::2]  # (P,)
        losses = -F.logsigmoid(margins - self.flags.simpo_margin)
        return losses.sum() / total, {"margins": margins.detach().sum() / total}
