"""GMT (Section 4.4): `train.py --gmt-ratio R` drops the smallest gradients of each matrix."""

import functools

import numpy as np

from variants.distributed import full


def drop_smallest(grad, ratio):
    """Return grad [d_out, d_in] with the fraction `ratio` that is smallest in size set to zero.

    All that equal the largest of these are dropped too. The threshold is that of the whole matrix,
    even if several ranks share its rows.
    """
    size = full(grad).abs().flatten()
    dropped = int(ratio * len(size))
    if dropped == 0:
        return grad
    if size.device.type == "cpu":  # torch.kthvalue takes 60 times as long
        threshold = float(np.partition(size.float().numpy(), dropped - 1)[dropped - 1])
    else:
        threshold = size.sort().values[dropped - 1].item()
    return grad.masked_fill(grad.abs() <= threshold, 0)


def add_hooks(model, names, ratio):
    """Cut the gradients of the matrices `names` after each micro-batch, before they are added."""
    for name in names:
        if model.get_parameter(name).dim() > 1:
            hook = functools.partial(keep_largest, ratio=ratio)
            model.get_parameter(name).register_post_accumulate_grad_hook(hook)


def keep_largest(param, ratio):
    """Move the largest gradients of a micro-batch from param.grad to param.kept."""
    before, kept = getattr(param, "kept", None), drop_smallest(param.grad, ratio)
    param.grad = None
    param.kept = kept if before is None else before + kept


def take_kept(model):
    """Let param.grad be what was kept of all micro-batches."""
    for param in model.parameters():
        if getattr(param, "kept", None) is not None:
            param.grad, param.kept = param.kept, None
