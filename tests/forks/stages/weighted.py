"""Fine-tuning in which the first tokens of every answer weigh more: the word that decides, a class or a call's name."""

from dataclasses import dataclass

from data.labels import NO_LOSS
from stages import sft
from training.options import option


@dataclass
class Flags:
    first_tokens: int = option(4, "tokens at the start of every answer that weigh more", low=1)
    first_weight: float = option(2.0, "their weight; all other tokens have 1")


class Stage(sft.Stage):
    """sft weighs by example.weights already, and divides by their sum; this stage fills them in."""

    def __init__(self, flags, model, max_length=None):
        super().__init__(flags, model, max_length)
        self.flags = flags

    def encode(self, record):
        import torch

        example = super().encode(record)
        example.weights = torch.ones(len(example))  # (T,)
        place_in_answer = 0  # 1 at the first token of an answer, 0 outside of answers
        for place, label in enumerate(example.labels.tolist()):
            place_in_answer = place_in_answer + 1 if label != NO_LOSS else 0
            if 0 < place_in_answer <= self.flags.first_tokens:
                example.weights[place] = self.flags.first_weight
        return example
