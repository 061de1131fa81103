"""Compact training: `train.py --compact` keeps gradients and Adam moments for the trainable
columns only.

A frozen column needs no gradient, and the gradient of the others does not need it either:

    dL/dW[:, index] = (dL/dy)^T x[:, index]

So each nn.Linear with frozen columns becomes a CompactLinear:

    weight   Parameter  [d_out, d_in]  the matrix that the forward pass reads, without gradient
    columns  Parameter  [d_out, k]     the trainable columns, all that the optimizer sees

After each optimizer step, `write_columns` copies the columns into the matrix. Optimizer, clipping
and checkpoints need no special case. The updates are those of masked training, up to rounding.

With 8-bit moments (adamw8bit.py), memory counts for more than time. In an InPlaceLinear, the
columns are a view of the matrix, whose trainable columns come first, and its input is put into the
same order.
"""

import torch
import torch.nn.functional as F
from torch import nn

from variants.distributed import local
from variants.files import fail


def select(x, index):
    """Return columns `index` of x [n, d] as [n, k]."""
    # On a CPU, gather is several times as fast as indexing in bf16.
    return x.gather(1, index.expand(len(x), -1))


class SelectedColumns(torch.autograd.Function):
    """Compute y = x W^T + b, with the gradient of W for the columns `index` only."""

    @staticmethod
    def forward(ctx, x, weight, columns, bias, index):
        x = x.to(weight.dtype)  # as autocast does
        ctx.save_for_backward(select(x.flatten(0, -2), index), weight)  # [tokens, k], [d_out, d_in]
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        grad = grad_y.flatten(0, -2)  # [tokens, d_out]
        grad_bias = grad.sum(0) if ctx.needs_input_grad[3] else None
        return grad_y @ weight, None, grad.T @ x, grad_bias, None


class CompactLinear(nn.Module):
    """Stand in for an nn.Linear of which only the columns `index` are trained."""

    def __init__(self, linear, index, low, high):
        super().__init__()
        weight = linear.weight.detach()
        self.weight = nn.Parameter(weight.to(low), requires_grad=False)  # [d_out, d_in]
        self.columns = nn.Parameter(select(weight, index.to(weight.device)).to(high))  # [d_out, k]
        self.bias = linear.bias
        self.register_buffer("index", index, persistent=False)  # [k]

    def forward(self, x):
        if not torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        return SelectedColumns.apply(x, self.weight, self.columns, self.bias, self.index)


class InPlaceLinear(CompactLinear):
    """A CompactLinear without a copy of its trainable columns. Sums are in another order."""

    def __init__(self, linear, index):
        weight = linear.weight.detach()
        frozen = torch.ones(weight.shape[1], dtype=torch.bool).index_fill(0, index, False)
        order = torch.cat([index, frozen.nonzero()[:, 0]])
        linear.weight.data = select(weight, order)
        first = torch.arange(len(index))  # where they are now
        super().__init__(linear, first, weight.dtype, weight.dtype)
        self.register_buffer("order", order, persistent=False)  # [d_in], trained columns first
        self.share()

    def share(self):
        self.columns.data = self.weight.data[:, : len(self.index)]

    def _apply(self, fn, recurse=True):  # .to(device) moves weight and columns apart
        super()._apply(fn, recurse)
        self.share()
        return self

    def forward(self, x):
        return super().forward(x.index_select(-1, self.order))


def trainable(mask, weight):
    """Return the trainable columns of a weight [d_out, d_in] by its mask [1, d_in]: [k]."""
    return mask[0].expand(weight.shape[1]).nonzero()[:, 0]


def make_compact(model, masks, precision, in_place=False):
    """Replace, in place, every nn.Linear whose mask [1, d_in] freezes some columns.

    A matrix that is frozen as a whole (mask [1, 1]) only loses its gradient. precision "bf16" keeps
    the matrices in bf16 and the columns in fp32; "fp32" and "bf16-true" keep both in one dtype.
    """
    for name, module in list(model.named_modules()):
        mask = masks.get(f"{name}.weight")
        if not isinstance(module, nn.Linear) or mask is None or mask.all() or len(mask) > 1:
            continue
        high = module.weight.dtype
        low = torch.bfloat16 if precision == "bf16" else high
        if mask.any():
            index = trainable(mask, module.weight)
            if in_place:
                model.set_submodule(name, InPlaceLinear(module, index))
            else:
                model.set_submodule(name, CompactLinear(module, index, low, high))
        else:
            module.weight.requires_grad_(False)
            module.weight.data = module.weight.data.to(low)


@torch.no_grad()
def write_columns(model, check_gradients=False):
    """Copy the columns into the matrices that the forward pass reads.

    With check_gradients, a matrix whose columns got no gradient is an error: the model reads its
    weight without calling its nn.Linear, so that the matrix would not be trained.
    """
    for name, module in model.named_modules():
        if isinstance(module, CompactLinear):
            if check_gradients and module.columns.grad is None:
                fail(
                    f"--compact: {name} got no gradient: the model does not call it. Omit --compact"
                )
            if isinstance(module, InPlaceLinear):
                continue
            weight, columns = local(module.weight), local(module.columns)
            weight.scatter_(1, module.index.expand(len(weight), -1), columns.to(weight.dtype))


def trained_columns(model):
    """Return {name: (index [k], columns [rows of this rank, k])} of the columns that are copies."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, CompactLinear) and not isinstance(module, InPlaceLinear):
            found[f"{name}.weight"] = module.index, local(module.columns.detach())
    return found


def as_in_source(model, name):
    """Return a parameter, without gradient, with the columns of a matrix as in the source model."""
    module = model.get_submodule(name.rpartition(".")[0])
    p = model.get_parameter(name).detach()
    if isinstance(module, InPlaceLinear) and p.dim() == 2:
        return select(p, module.order.argsort())
    return p


def in_fp32(model, name, before, columns):
    """Return a parameter in fp32 and in the source's order of columns, on the device of `before`.

    before: the source's fp32 weights, or this rank's rows of them. columns: of trained_columns.
    """
    after = unrounded(local(as_in_source(model, name)).to(before.device), before)
    if name in columns:
        index, copies = (tensor.to(before.device) for tensor in columns[name])
        after[:, index] = unrounded(copies, before[:, index])
    return after


def unrounded(now, before):
    """Return `now` in fp32, but `before` where they differ by rounding alone.

    So a weight of a bf16 model that did not move is saved as in the source.
    """
    return torch.where(now == before.to(now.dtype), before, now.float())


@torch.no_grad()
def fill_columns(model, masks, source):
    """Fill columns and indices of a model that was built without weights, from {name: weight}."""
    for name, module in model.named_modules():
        if isinstance(module, CompactLinear):
            module.index.copy_(trainable(masks[f"{name}.weight"], module.weight))
            local(module.columns).copy_(select(local(source[f"{name}.weight"]), module.index))
