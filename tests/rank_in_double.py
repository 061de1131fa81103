"""Run the loop of train.py in float64, alone or under torchrun, and keep the weights it ends with.

torchrun --nproc_per_node=2 tests/rank_in_double.py WEIGHTS [arguments of train.py]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import train  # noqa: E402
from variants import compact, distributed, files  # noqa: E402


def keep_weights(args, model, *rest):
    weights = {name: distributed.full(p.detach()) for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, compact.CompactLinear):
            columns = weights.pop(f"{name}.columns")
            weights[f"{name}.weight"][:, module.index] = columns
    if distributed.RANK == 0:
        save_file({name: w.contiguous() for name, w in weights.items()}, sys.argv[1])


def in_double(function):
    def wrapped(*args, dtype, **options):
        return function(*args, dtype=torch.float64, **options)

    return wrapped


torch.set_default_dtype(torch.float64)  # of the factor by which masked weights decay
files.load_model = in_double(files.load_model)
distributed.empty_model = in_double(distributed.empty_model)
train.prove_and_save = keep_weights
train.main(sys.argv[2:])
