"""Several GPUs: `torchrun --nproc_per_node=N train.py ...`.

In a single process these functions do nothing, or what their name says.
PyTorch's fully_shard (FSDP2) splits each parameter by rows over the ranks, with its gradient and
Adam's moments. The global batch, the order of tokens and the schedule are those of one process.
score.py and evaluate.py split their batches instead: each rank has the whole model. score.py
shards one that is too large for that, and all ranks then run all batches.
"""

import copy
import os
import sys
import time
import warnings
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from pathlib import Path
from traceback import print_exception

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

WORLD = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0)) if WORLD > 1 else 0  # on this machine
SCRIPT = Path(sys.argv[0]).name if WORLD > 1 else "train.py"  # one process may be pytest
STDERR = sys.stderr
FULL = 0.8  # the share of a memory that weights may fill
NOTHING = torch.empty(0)
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said to a single process


def say(message, script=SCRIPT):
    """Print an error of a script in one line.

    Most errors are met by all ranks, and rank 0 says them. Another rank waits for torchrun to end
    it, and speaks only if that does not happen.
    """
    line = " ".join(str(message).split())[:500]
    stderr = sys.stderr
    if RANK > 0:
        time.sleep(3)
        line, stderr = f"rank {RANK}: {line}", STDERR
    tqdm.write(f"{script}: error: {line}", file=stderr)


def fail(message, script=SCRIPT):
    """Print an error that the user can fix, in one line, and exit with code 2."""
    say(message, script)
    raise SystemExit(2)


def start(args):
    """Join the other ranks. Exit with an error if the arguments do not allow several."""
    if WORLD == 1:
        return
    if args.batch_size % WORLD:
        fail(f"--batch-size {args.batch_size}: not a multiple of the {WORLD} ranks. Change it")
    if args.adalora or args.precision == "fp16":
        fail("--adalora and --precision fp16 run in one process. Start without torchrun")
    join(args.device, args.timeout)


def join(device, timeout):
    """Wait for all ranks, each on a GPU of its own. timeout: minutes to wait for one that hangs."""
    if WORLD == 1:
        return
    if not 0 < timeout < 1e6:
        fail(f"--timeout {timeout}: not a number of minutes above 0. Change it")
    if device == "cuda":
        if LOCAL_RANK >= torch.cuda.device_count():
            fail(f"{torch.cuda.device_count()} GPUs are fewer than the processes. Start as many")
        torch.cuda.set_device(LOCAL_RANK)
    backend = "nccl" if device == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout))
    except ValueError as error:
        fail(f"WORLD_SIZE is {WORLD}, but not by torchrun ({error}). Unset it, or use torchrun")


def quiet():
    """Let rank 0 alone print, but for errors that the others do not share, in any locale."""
    sys.stdout.reconfigure(errors="backslashreplace")
    if WORLD > 1:
        sys.excepthook = show
    if RANK > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")


def show(kind, error, trace):
    """Print an error that nothing has caught: in one line if it is that another rank is gone."""
    if issubclass(kind, dist.DistError) or "gloo" in str(error):
        what = "another rank has ended, or was silent for longer than --timeout"
        say(f"{what}. Look for its own error, and start again ({error})")
    else:
        print_exception(error, file=STDERR)


def barrier():
    """Wait for the other ranks."""
    if WORLD > 1:
        dist.barrier()


@contextmanager
def rank_zero_first():
    """Run the body on rank 0, then on a rank of each other machine, then on those that are left.

    They find its files, whether or not the machines share a disk.
    """
    turn = 0
    if RANK > 0:
        turn = 1 if LOCAL_RANK == 0 else 2
    for _ in range(turn):
        barrier()
    yield
    for _ in range(2 - turn):
        barrier()


@contextmanager
def one_error():
    """Let what the ranks raise in torch.distributed.checkpoint, with tracebacks, be one OSError."""
    try:
        yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        if isinstance(first, KeyboardInterrupt):
            raise first from None
        raise OSError(str(first)) from None


def add_up(tensor):
    """Add up a tensor over the ranks, in place, and return it."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def mine(items):
    """Return this rank's part of a list that all ranks share."""
    return items[RANK::WORLD]


def local(tensor):
    """Return the rows of a tensor that this rank holds: a view, all rows in a single process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor):
    """Return a whole tensor. All ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(mask, param):
    """Return a mask laid out like its parameter, so that products with it need no communication."""
    mask = mask.to(param.device)
    if not isinstance(param, DTensor):
        return mask
    by_rows = mask.shape[0] == param.shape[0] > 1
    placement = [Shard(0) if by_rows else Replicate()]
    return distribute_tensor(mask, param.device_mesh, placement, src_data_rank=None)


def shard(model, precision):
    """Split a model over the ranks: each decoder layer is a unit, and all else is one.

    Under autocast, linear layers are gathered in bf16: the same bits for half of the bytes.
    """
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    at_least_fp32 = torch.promote_types(model.dtype, torch.float32)
    policy = MixedPrecisionPolicy(reduce_dtype=at_least_fp32)  # gradients are added up in it
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        if precision == "bf16":
            matrices = []
            for module in layer.modules():
                weight = getattr(module, "weight", None)  # None in norms without weights
                if weight is not None and weight.dim() == 2:
                    matrices.append(module)
            fully_shard(matrices, mesh=mesh, mp_policy=bf16)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def reshard(model):
    """Give up what a forward pass without a backward pass has gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def read_source(model, name, directory, dtype=torch.float32):
    """Return {parameter name: weights of the source in dtype, laid out as the model's}.

    Each rank reads its rows from the safetensors files.
    """
    source = {}
    for key, p in model.named_parameters():
        if not key.endswith(".columns"):
            source[key] = torch.zeros_like(p, dtype=dtype, device=p.device).detach()
    try:
        if not Path(name).is_dir():
            with rank_zero_first():  # directory: that of a commit
                snapshot_download(name, revision=directory.name, allow_patterns="*.safetensors")
        check_files(name, directory)
        with one_error():
            dcp.load(source, storage_reader=HuggingFaceStorageReader(str(directory)))
    except (OSError, ValueError, HTTPError, SafetensorError) as error:
        fail(f"--model {name}: cannot be read by several ranks ({error}). Start without torchrun")
    return source


def check_files(name, directory):
    """Exit with an error if two files hold the same tensor, of which transformers reads one."""
    holder = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                other = holder.setdefault(key, path.name)
                if other != path.name:
                    fail(f"--model {name}: {other} and {path.name} both hold {key}. Remove one")


def check_tied(model, name, directory):
    """Exit with an error if the files hold two different weights that config.json ties.

    In one process transformers unties them. Here they are tied before the files are read.
    """
    pairs = model.all_tied_weights_keys.items()
    found = read_tensors(set(chain.from_iterable(pairs)), directory)
    for key, other in pairs:
        if key in found and other in found and not torch.equal(found[key], found[other]):
            what = f"{key} and {other} differ, but tie_word_embeddings is true"
            fail(f"--model {name}: {what}. Correct config.json, or start without torchrun")


def read_buffers(model, directory):
    """Return {name: tensor} of what a model's files hold beside weights: Apertus's beta and eps."""
    return read_tensors(dict(model.named_buffers()).keys() & model.state_dict().keys(), directory)


def read_tensors(names, directory):
    """Return {name: tensor} of those names that the files have."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in names & set(file.keys())}
    return found


@torch.no_grad()
def fill(model, device, name, directory, dtype=torch.float32):
    """Fill a sharded model without weights from the source's files.

    Return the source's weights, in dtype.
    """
    model.to_empty(device=device)
    for module in model.modules():
        if module._buffers:  # rotary frequencies, which no file holds
            model._init_weights(module)
    source = read_source(model, name, directory, dtype)
    check_tied(model, name, directory)
    for key, buffer in read_buffers(model, directory).items():
        model.get_buffer(key).copy_(buffer)
    for key, p in model.named_parameters():
        if key in source:
            p.copy_(source[key])
    return source


def empty_model(config, **options):
    """Return the model without weights."""
    with torch.device("meta"):
        # A copy, as transformers writes the dtype into the config, and the source's is needed.
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)


def is_too_large(model, dtype, device):
    """Return whether the weights of a model fill most of a GPU, or of a rank's part of the RAM."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / WORLD
    if device == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    weights = sum(p.numel() for p in model.parameters())
    return weights * dtype.itemsize > FULL * memory


def compile_layers(model):
    """Compile each decoder layer by itself."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    torch._dynamo.config.recompile_limit = 8 + len(layers)  # layers differ in what is frozen
    for layer in layers:
        layer.compile(dynamic=False)


# Batches that are split over the ranks, of which each has the whole model


def rounds(batches):
    """Yield this rank's batch of each round of WORLD batches, in a list, which may be empty."""
    for first in range(0, len(batches), WORLD):
        yield batches[first : first + WORLD][RANK : RANK + 1]


def gather(value):
    """Return the values of all ranks, in their order, on rank 0, and none on the others."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD if RANK == 0 else None
    dist.gather_object(value, values)
    return values or []


def from_rank_zero(value):
    """Return the value that rank 0 has."""
    values = [value]
    if WORLD > 1:
        dist.broadcast_object_list(values)
    return values[0]


def check_alike(values):
    """Exit with an error if this rank's {what: value} are not those of rank 0."""
    if WORLD == 1:
        return
    for what, value in from_rank_zero(values).items():
        if values.get(what) != value:
            fail(f"{what} is {values.get(what)}, but {value} on rank 0. Give all the same")


def decoder_of(model):
    """Return the forward pass of a model without its head. It gathers what the ranks share."""
    model.decode = model.base_model.forward
    register_fsdp_forward_method(model, "decode")
    return model.decode


def batches_of(model, batches, sums):
    """Yield what `in_order` does, but all batches where the ranks share the model's weights."""
    if isinstance(model, FSDPModule):
        return tqdm(batches, desc="calibrate", unit="batch")
    return in_order(batches, sums, "batch")


def in_order(batches, sums, unit):
    """Yield this rank's batches, whose sums {name: tensor} the caller adds to `sums`.

    At the end, `sums` has the totals on rank 0, and nothing on the others. The sums of batches are
    added in the order of one process, so that rounding gives the same bits.
    """
    totals = {}
    with tqdm(total=len(batches), desc="calibrate", unit=unit) as bar:
        for some in rounds(batches):
            yield from some
            bar.update(min(WORLD, bar.total - bar.n))
            if WORLD == 1:
                continue
            device = next(iter(sums.values()), NOTHING).device  # rank 0 has a batch in each round
            for part in gather({name: value.cpu() for name, value in sums.items()}):
                for name, value in part.items():
                    totals[name] = totals.get(name, 0) + value.to(device)
            sums.clear()
    sums.update(totals)
