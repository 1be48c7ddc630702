"""GRPO: advantages in standard deviations of the prompt's answers, and every token an action of its own (arXiv 2402.03300).

The loss of an answer is the mean over its tokens, so a long answer's tokens count less; --advantage group_std alone keeps
RLOO's one action an answer.
"""

from dataclasses import dataclass
from functools import partial

from data.errors import UserError
from stages import rloo
from training.options import option


@dataclass
class Flags(rloo.Flags):
    advantage: str = option("group_std", "less the mean of the prompt's answers, over their deviation", words="group_std")

    def __post_init__(self):
        super().__post_init__()
        if self.num_iterations > 1:
            raise UserError("--num_iterations: GRPO here makes one update on a step's answers, where every ratio is 1")


class Stage(rloo.Stage):
    def loss(self, model, packed, total):
        from model.head import negative_log_likelihood, per_token, sum_by_example

        where, target = packed.supervised()
        function = partial(negative_log_likelihood, temperature=self.flags.temperature)
        losses = per_token(model.hidden(packed), model.head_weight, function, where, target)  # (n,)
        ratio = (losses.detach() - losses).exp()  # (n,) 1, with the gradient of log p
        means = sum_by_example(ratio, packed, where) / packed.values["answer_tokens"]  # (S,)
        figures = {name: value.sum() / total for name, value in packed.values.items() if name not in rloo.NOT_SHOWN}
        return -(means * packed.values["advantage"]).sum() / total, figures
