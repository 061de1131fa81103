"""AdamW for weights in bf16: fp32 moments, each update computed in fp32 and rounded once.

This is the arithmetic of apex's FusedAdam, with which the paper's models were trained. No
optimizer of PyTorch has it: torch.optim.AdamW keeps the moments of bf16 weights in bf16, where
they stall, because 0.999 * v rounds back to v.
"""

import torch
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """AdamW with fp32 state for parameters of any floating-point dtype.

    `decayed` maps each parameter that decays to its mask (1 = update, 0 = freeze), or to 1.
    """

    def __init__(self, params, lr, betas, eps, weight_decay, decayed):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.decayed = decayed

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)

    def update(self, p, group):
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        weight = p.float()
        weight.mul_(1 - group["lr"] * group["weight_decay"] * self.decayed.get(p, 0))
        adamw(
            [weight],
            [p.grad.float()],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
        p.copy_(weight)
