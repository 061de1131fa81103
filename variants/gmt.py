"""GMT (Section 4.4): `train.py --gmt-ratio R` drops the smallest gradients of each matrix."""

import functools

import numpy as np


def drop_smallest(grad, ratio):
    """Return grad [d_out, d_in] with the fraction `ratio` that is smallest in size set to zero."""
    size = grad.abs().flatten()
    dropped = int(ratio * len(size))
    if dropped == 0:
        return grad
    if size.device.type == "cpu":  # torch.kthvalue takes 60 times as long
        threshold = float(np.partition(size.numpy(), dropped - 1)[dropped - 1])
    else:
        threshold = size.sort().values[dropped - 1]
    return grad * (grad.abs() > threshold)


def add_hooks(model, names, ratio):
    """Cut the gradients of the matrices `names` in hooks, so that each micro-batch is cut alone."""
    for name in names:
        if model.get_parameter(name).dim() > 1:
            hook = functools.partial(drop_smallest, ratio=ratio)
            model.get_parameter(name).register_hook(hook)
