"""Multiply bf16 matrices in fp32 and round the products: in score.py, train.py and evaluate.py.

    PYTHONPATH=results/fp32-products bash results/remake.sh precision eight-bit

A processor without instructions for bf16 multiplies them some thirty times slower than in fp32.
Rounded fp32 products are those of bf16 but for the order of the sums. Attention differs a little
more: it keeps its weights in fp32 here, where PyTorch's kernel for bf16 rounds them.
"""

import sys

NAMES = (
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


def multiply_in_fp32(library, name):
    """Replace the CPU kernel of an operator by one that computes bf16 arguments in fp32."""
    import torch

    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def in_fp32(value):
        is_bf16 = isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
        return value.float() if is_bf16 else value

    def call(keyset, *args, **kwargs):
        if args[0].dtype != torch.bfloat16:
            return kernel.call_boxed(keyset, *args, **kwargs)
        args = map(in_fp32, args)
        kwargs = {key: in_fp32(value) for key, value in kwargs.items()}  # a mask of attention
        out = kernel.call_boxed(keyset, *args, **kwargs)
        if isinstance(out, torch.Tensor):
            return out.bfloat16()
        if name.endswith("_cpu"):  # the second is log-sum-exp, which is fp32 for bf16 as well
            return out[0].bfloat16(), out[1]
        return tuple(gradient.bfloat16() for gradient in out)

    library.impl(name, call, "CPU", with_keyset=True)


def install():
    import torch

    library = torch.library.Library("aten", "IMPL")
    for name in NAMES:
        multiply_in_fp32(library, name)
    return library  # the kernels live as long as it does


if any(word.endswith(("score.py", "train.py", "evaluate.py")) for word in sys.orig_argv):
    library = install()
