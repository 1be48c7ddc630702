"""Distillation: KL(teacher || student), the mean over the supervised tokens (arXiv 1503.02531 without a temperature).

Beside the teacher's weights this costs one forward of it and a second chunk of logits: neither model's logits are ever
whole, because the teacher gives its hidden states and its head is applied where the student's is.
"""

from dataclasses import dataclass

from data.errors import UserError
from stages import sft
from training.options import option


@dataclass
class Flags:
    teacher: str | None = option(None, "model folder or hub id of the teacher; of the student's family and vocabulary")


class Stage(sft.Stage):
    def __init__(self, flags, model, max_length=None):
        from model import load_model

        super().__init__(flags, model, max_length)
        if flags.teacher is None:
            raise UserError("--teacher is missing; name the model to learn from")
        self.teacher, family = load_model(flags.teacher, dtype=model.head_weight.dtype, device=model.device)
        self.teacher.requires_grad_(False)
        if family.name != self.family.name or family.tokenizer.get_vocab() != self.family.tokenizer.get_vocab():
            raise UserError(f"--teacher {flags.teacher} is not of the base model's family and vocabulary; take a sibling")

    def loss(self, model, packed, total):
        import torch
        import torch.nn.functional as F

        from model.head import per_token

        where, _ = packed.supervised()
        with torch.no_grad():
            taught = self.teacher.hidden(packed)[where]  # (n, D of the teacher)
        num_words = min(len(model.head_weight), len(self.teacher.head_weight))  # sizes of a family pad differently
        head = self.teacher.head_weight[:num_words]

        def divergence(logits, taught):  # (c, V), (c, D) -> (c,)
            teacher = F.log_softmax(F.linear(taught, head).float(), dim=-1)
            student = F.log_softmax(logits[:, :num_words], dim=-1)
            return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)

        return per_token(model.hidden(packed), model.head_weight, divergence, where, taught).sum() / total, {}
