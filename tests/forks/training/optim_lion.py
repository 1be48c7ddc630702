"""Lion (arXiv 2302.06675): the sign of a momentum, so every weight moves by the rate; 4 bytes a weight, AdamW has 8.

Its authors advise a third to a tenth of AdamW's rate and --adam_beta2 0.99.
"""

import torch

from training.optim import OPTIMIZERS


class Lion(torch.optim.Optimizer):
    """c = beta1 m + (1 - beta1) g; w -= lr (sign(c) + weight_decay w); m = beta2 m + (1 - beta2) g."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                direction = state["momentum"].lerp(p.grad, 1 - beta1).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                state["momentum"].lerp_(p.grad, 1 - beta2)


OPTIMIZERS["lion"] = lambda groups, lr, betas, eps: Lion(groups, {"lr": lr, "betas": betas})
