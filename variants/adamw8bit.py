"""AdamW with moments of 8 bits, by torchao: `train.py --optimizer adamw8bit --precision bf16-true`.

A block of 256 values of a moment is kept as 256 codes of 8 bits and one fp32 scale, so that both
moments take 2.03 bytes a weight instead of 8. Parameters that blocks do not fit keep fp32 moments.
Each update is computed in fp32 and rounded to bf16 at random, up or down, so that on average none
is lost. adamw8bit-nearest rounds to the nearest, which loses small updates. With --compact, columns
have no copy: a trainable weight takes 6 bytes with its gradient and moments, a frozen one 2.
"""

import importlib.metadata
import logging
import shutil
import sysconfig
from pathlib import Path

import torch

from variants.distributed import WORLD
from variants.fused_adam import FusedAdam

CHOICES = ("adamw", "adamw8bit", "adamw8bit-nearest")
BLOCK = 256  # values that share a scale
VERSION = "0.18.0"  # of torchao


def check(args, error):
    """Call error(message) if the other arguments or this machine do not allow what is asked for."""
    if args.optimizer == "adamw":
        return
    if args.precision != "bf16-true":
        error(f"--optimizer {args.optimizer} needs --precision bf16-true")
    if WORLD > 1:
        error(f"--optimizer {args.optimizer} runs in one process. Start without torchrun")
    header = Path(sysconfig.get_paths()["include"], "Python.h")  # Triton compiles against it
    if args.device == "cuda" and not (any(map(shutil.which, ("gcc", "clang"))) and header.exists()):
        error(f"--optimizer {args.optimizer} needs gcc and python3-dev on a GPU. Install both")
    try:
        found = importlib.metadata.version("torchao")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found != VERSION:
        what = f"torchao {VERSION}, not {found}" if found else f"torchao {VERSION}"
        error(f"--optimizer {args.optimizer} needs {what}. Run: pip install torchao=={VERSION}")


class AdamW8bit(FusedAdam):
    """AdamW with 8-bit moments for parameters in bf16.

    `decayed` and `masked` list (parameter, mask), where a mask is 1 = update, 0 = freeze. The state
    is plain tensors, which a checkpoint can hold.
    """

    def __init__(self, params, decayed, masked, lr, betas, eps, weight_decay, stochastic):
        logging.getLogger("torchao").setLevel(logging.ERROR)  # of kernels that are not needed here
        from torchao.optim.adam import single_param_adam
        from torchao.optim.quant_utils import create_dynamic_map
        from torchao.optim.subclass_8bit import OptimState8bit

        super().__init__(params, lr, betas, eps, weight_decay, dict(decayed))
        self.masks, self.stochastic = dict(masked), stochastic
        device = self.param_groups[0]["params"][0].device
        self.signed = torch.tensor(create_dynamic_map(signed=True), device=device)
        self.unsigned = torch.tensor(create_dynamic_map(signed=False), device=device)
        self.quantized = OptimState8bit
        for p in self.param_groups[0]["params"]:
            self.state[p].update(new_state(p))  # now, as a checkpoint fills it in place
        self.adam = single_param_adam
        if device.type == "cuda":  # one kernel instead of a hundred
            torch.compiler.config.recompile_limit = 64  # it is compiled for each shape
            self.adam = torch.compile(single_param_adam, fullgraph=True, dynamic=False)

    def update(self, p, group):
        self.state[p]["step"] += 1
        mask = self.masks.get(p)
        before = None if mask is None else p.clone()
        lr = torch.tensor(group["lr"], device=p.device)  # a number would be compiled in
        self.adam(
            p.detach(),
            p.grad,
            self.state[p]["step"],
            self.moment(p, "exp_avg", self.signed),
            self.moment(p, "exp_avg_sq", self.unsigned),
            None,  # of AMSGrad
            lr,
            *group["betas"],
            group["weight_decay"] if p in self.decayed else 0.0,
            group["eps"],
            True,  # decoupled weight decay
            self.stochastic,
        )
        if mask is not None:  # torchao decays frozen weights, too
            p.copy_(torch.where(mask.bool(), p, before))

    def moment(self, p, name, levels):
        """Return a moment as torchao's update reads and writes it. Its memory is the state's."""
        state = self.state[p]
        if name in state:
            return state[name]
        codes, scale = state[f"{name}_codes"], state[f"{name}_scale"]
        return self.quantized(codes, scale, levels, signed=levels is self.signed)


def new_state(p):
    """Return the state of a parameter before its first step."""
    state = {"step": torch.zeros((), device=p.device)}
    for name in ("exp_avg", "exp_avg_sq"):
        if p.numel() < 4096 or p.numel() % BLOCK:
            state[name] = torch.zeros(p.shape, device=p.device)
        else:
            state[f"{name}_codes"] = torch.zeros(p.shape, dtype=torch.uint8, device=p.device)
            state[f"{name}_scale"] = torch.zeros(p.numel() // BLOCK, device=p.device)
    return state
