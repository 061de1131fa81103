r"""Stage 1 of Source-Shielded Updates (SSU): score how much English needs each weight column.

An instruct model reads calibration text of the source language, English (Section 3.1). Wanda gives
every weight an importance, and the score of a column is the sum over its weights:

    s_ij = |theta_ij| * ||X_j||_2,    S_j = sum_i s_ij          (Sections 3.1 and 3.2)

X_j is the j-th input feature over all calibration tokens, and a column is an input feature. Each
element of a 1-D parameter is a column of its own. X depends on the kind of parameter:

    nn.Linear weight [d_out, d_in]    the input of the layer
    norm weight [d]                   the normalized input, which the weight multiplies
    bias or any other vector [d]      the constant 1, so ||X_j||_2 = sqrt(tokens)

Embeddings and the LM head are always trained, so they get no scores. --method selects another
s_ij, and --axis another sum (Table 3). data/calibration.py reads the text.

Tiny, on a CPU:
    python score.py --model data/embedded/model --data data/embedded/en/calibration.jsonl \
        --out runs/ne/scores-wanda.safetensors --num-samples 32 --seq-len 512
The paper's setting, on one GPU; the same file on four: torchrun --nproc_per_node=4 score.py ...
(they share the weights of a model that is too large for one)
    python score.py --model allenai/OLMo-2-1124-7B-Instruct --data tulu \
        --out runs/ne/scores-wanda.safetensors
LoTA (Section 6), how far 100 steps of full fine-tuning moved each weight:
    python score.py --model data/embedded/model --method delta --axis element \
        --adapted runs/ne/lota-calibration/model --out runs/ne/scores-delta-element.safetensors
"""

import data.interrupt  # noqa: F401  # isort: skip (Ctrl-C in the imports below)
import argparse
import copy
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm
from transformers.utils import cached_file

from data.calibration import calibration_tokens, fail
from data.identity import digest_of, fingerprint, format_of, save_tensors, shapes_of
from data.models import context_of, load_skeleton, load_weights
from variants import distributed
from variants.distributed import RANK, WORLD

CALIBRATED = ["wanda", "sparsegpt", "fim"]  # methods that read calibration text
METHODS = [*CALIBRATED, "magnitude", "random", "delta"]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def parse_args(argv):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("score.py", argparse.SUPPRESS, __doc__, formatter_class=raw)
    add = parser.add_argument
    add("--model", required=True, help="source model: directory or hub id")
    add("--data", help="calibration text: tulu, alpaca, .jsonl[.gz], .parquet, .txt (by line)")
    add("--out", required=True, type=Path, help="scores-<method>.safetensors to write")
    add("--method", choices=METHODS, default="wanda", help="importance of a weight")
    add("--axis", choices=["column", "row", "element"], default="column", help="unit to score")
    add("--adapted", help="fine-tuned model of --method delta: directory or hub id")
    add("--num-samples", type=int, default=500, help="calibration sequences")
    add("--seq-len", type=int, default=2048, help="tokens per sequence")
    add("--batch-size", type=int, default=4, help="sequences per forward pass (fim: 1)")
    add("--seed", type=int, default=42, help="seed of the text's order and of random scores")
    add("--dtype", choices=["float32", "bfloat16"], help="precision (default: bfloat16 on a GPU)")
    add("--device", choices=DEVICES, default=DEVICES[-1], help="device, for methods that read text")
    add("--timeout", type=float, default=10, help="minutes to wait for a rank that hangs")
    args = parser.parse_args(argv)

    if WORLD > 1 and args.method == "fim" and args.axis == "element":
        parser.error("--method fim --axis element runs in one process. Start without torchrun")
    if args.method in CALIBRATED and not args.data:
        parser.error(f"--method {args.method} needs calibration text. Add --data")
    if args.data and args.method not in CALIBRATED:
        parser.error(f"--method {args.method} reads no text. Remove --data")
    if (args.method == "delta") != bool(args.adapted):
        parser.error("--adapted belongs to --method delta. Add or remove it")
    if min(args.num_samples, args.seq_len - 1, args.batch_size) < 1:
        parser.error("--num-samples and --batch-size must be at least 1, --seq-len at least 2")
    if args.out.exists() and format_of(args.out) != "ssu-scores":
        parser.error(f"--out {args.out} exists and is not a score file. Choose another name")
    if args.method not in CALIBRATED:  # nothing to compute that would need a GPU
        args.device = "cpu"
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args


# Model --------------------------------------------------------------------------------------------


def scored_parameters(model):
    """Return {name: module} of all parameters but the embeddings and LM head (Section 3.1)."""
    names = dict(model.named_parameters())
    head = model.get_output_embeddings()
    owners = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) or module is head:
            continue
        for key, p in module.named_parameters(recurse=False):
            name = f"{path}.{key}".strip(".")
            # Conv1D is transposed and experts are 3-D: their columns would be scored wrongly.
            if p.dim() != 1 and not isinstance(module, nn.Linear):
                what = f"{name} {list(p.shape)} of {type(module).__name__}"
                fail(f"{what} cannot be scored: it is no nn.Linear. Choose another model")
            if name in names:  # otherwise it is tied to a parameter of another name
                owners[name] = module
    return owners


# Statistic of the inputs --------------------------------------------------------------------------


def input_reader(name, module, x):
    """Return (read, divisor): read(inputs, output) / divisor is what the weight multiplies, up to
    its sign.

    x is one input, to try it on. Fail if the module is neither nn.Linear nor a norm.
    """
    if isinstance(module, nn.Linear):
        return lambda inputs, output: inputs, 1.0

    if not torch.isfinite(x).all():
        fail(f"the input of {name} is not finite: weights are damaged. Copy the model again")

    # A norm is affine in its weight, norm(x) = weight * x_hat + rest, so two weights give x_hat.
    # This holds for RMSNorm and LayerNorm, and for norms that scale by 1 + weight.
    at_0, at_1, at_3 = (copy.deepcopy(module) for _ in range(3))
    for probe, weight in ((at_0, 0.0), (at_1, 1.0), (at_3, 3.0)):
        nn.init.constant_(probe.weight, weight)
    rest = at_0.forward(x)  # .forward: the copies have the module's hooks
    expected = 3.0 * (at_1.forward(x) - rest) + rest
    if not torch.allclose(at_3.forward(x), expected, rtol=2e-2, atol=2e-2):
        what = f"{name} of {type(module).__name__}"
        fail(f"{what} cannot be scored: it is not the weight of a norm. Choose another model")

    # For an RMSNorm, output / weight is x_hat, and nothing needs to be computed again.
    if rest.any() or not module.weight.all():
        return lambda inputs, output: at_1.forward(inputs) - at_0.forward(inputs), 1.0
    return lambda inputs, output: output, module.weight.abs()


@torch.inference_mode()
def input_norms(model, owners, tokens, batch_size):
    """Return {name: ||X_j||_2, fp32} of the scored parameters that receive tokens (Section 3.1).

    It is [d_in] for a matrix, [d] for a norm weight and [] for other vectors. Only the decoder of
    the model runs, on tokens, int64 [samples, seq_len].
    """
    names = {module: name for name, module in owners.items() if name.endswith(".weight")}
    readers = {}  # name -> its input_reader
    squares = {}  # name -> sum over tokens of x_j^2, fp32 [d]
    last = {"x": None, "sum": None}  # q, k and v read the same tensor: square it once

    def add(module, args, output):
        name = names[module]
        if name not in readers:
            readers[name] = input_reader(name, module, args[0])
        x = readers[name][0](args[0], output)
        if x is not last["x"]:
            squared = x.flatten(0, -2).float().square()  # [tokens, d]
            # On a CPU, a product with ones is twice as fast as .sum(0).
            last.update(x=x, sum=squared.new_ones(len(squared)) @ squared)
        squares[name] = squares.get(name, 0) + last["sum"]

    decode = distributed.decoder_of(model)
    hooks = [module.register_forward_hook(add) for module in names]
    for batch in distributed.batches_of(model, tokens.split(batch_size), squares):
        decode(input_ids=batch.to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()

    constant = torch.tensor(float(tokens.numel())).sqrt()
    norms = {name: constant for name in owners if not name.endswith(".weight")}
    for name, total in squares.items():
        norms[name] = total.sqrt() / readers[name][1]
    return norms


# Scores -------------------------------------------------------------------------------------------


def element_scores(method, weight, x_norm, num_tokens, adapted):
    """Return s_ij, fp32 in the shape of weight, [d_out, d_in] or [d]. Add a method here.

    x_norm is ||X_j||_2 over num_tokens tokens. adapted is the weight after fine-tuning.
    """
    if method == "wanda":  # Section 3.1
        return weight.float().abs() * x_norm
    if method == "magnitude":  # SSU-Mag, Section 4.4
        return weight.float().abs()
    if method == "sparsegpt":  # E[x_j^2], Appendix B.2
        return (x_norm.square() / num_tokens).expand(weight.shape)
    if method == "delta":  # LoTA, Section 6
        return (adapted.float() - weight.float()).abs()
    raise ValueError(method)


def sum_along(axis, s):
    """Sum s [d_out, d_in] over each column or row (Table 3), but leave elements and vectors."""
    if axis == "element" or s.dim() == 1:
        return s
    return s.sum(0) if axis == "column" else s.sum(1)


def random_scores(model, names, axis, seed):
    """Return SSU-Rand (Section 4.4): random rankings, drawn from the seed and the names."""
    scores = {}
    for name in names:
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        shape = sum_along(axis, model.get_parameter(name)).shape
        scores[name] = torch.rand(shape, generator=generator)
    return scores


def fisher_scores(model, names, tokens, axis):
    """Return SSU-FIM (Appendix B.2): s_ij = E[(dL/dtheta_ij)^2], summed along axis.

    L is the mean next-token loss of one sequence of tokens, int64 [samples, seq_len].
    """
    sums = {}

    # Called as soon as the gradient of p is complete, so that there is never more than one.
    def add_squares(name, p):
        sums[name] = sums.get(name, 0) + sum_along(axis, p.grad.float().square())
        p.grad = None

    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
        if name in names:
            p.register_post_accumulate_grad_hook(partial(add_squares, name))

    for sample in distributed.in_order(tokens.to(model.device), sums, "sequence"):
        logits = model(input_ids=sample[None], use_cache=False).logits[0]
        F.cross_entropy(logits[:-1].float(), sample[1:]).backward()
    return {name: total / len(tokens) for name, total in sums.items()}


def load_model(args, name, skeleton):
    """Return a model. Several ranks share its weights if these are too large for one."""
    dtype = getattr(torch, args.dtype)
    alone = WORLD == 1 or args.method not in CALIBRATED
    if alone or not distributed.is_too_large(skeleton, dtype, args.device):
        return load_weights(name, fail, dtype=dtype).to(args.device)
    if args.method == "fim":
        fail(f"--method fim needs GPUs that hold all of {name}. Choose another method")
    model = distributed.empty_model(skeleton.config, dtype=dtype)
    distributed.shard(model, args.dtype)
    directory = Path(cached_file(name, "config.json")).parent
    distributed.fill(model, args.device, name, directory, dtype)
    return model.eval()


def compute_scores(args, skeleton, owners, tokens):
    """Return {name: fp32 scores}, on rank 0. Parameters that no token has reached are missing."""
    if args.method == "random":
        return random_scores(skeleton, owners, args.axis, args.seed)

    model = load_model(args, args.model, skeleton)
    adapted = load_model(args, args.adapted, skeleton) if args.adapted else model
    owners = scored_parameters(model)  # the modules that run, not those of the skeleton
    if args.method == "fim":
        return fisher_scores(model, owners.keys(), tokens, args.axis)

    norms = dict.fromkeys(owners)
    if args.method in CALIBRATED:
        norms = input_norms(model, owners, tokens, args.batch_size)
    scores = {}
    with torch.no_grad():
        for name, x_norm in tqdm(norms.items(), desc="score", unit="parameter"):
            weight = distributed.full(model.get_parameter(name))
            if RANK == 0:
                after = adapted.get_parameter(name)
                s = element_scores(args.method, weight, x_norm, tokens.numel(), after)
                scores[name] = sum_along(args.axis, s).cpu()
    return scores


def check_model(args, skeleton, owners):
    """Fail if the method cannot score this model."""
    if args.adapted and shapes_of(load_skeleton(args.adapted, fail)[0]) != shapes_of(skeleton):
        fail(f"--adapted {args.adapted} and --model differ in their parameters. Correct one")
    biases = [name for name in owners if not name.endswith(".weight")]
    if args.method == "sparsegpt" and (biases or args.axis == "row"):
        fail("--method sparsegpt ranks neither rows nor biases. Choose another method")
    context = context_of(skeleton.config)
    if args.method in CALIBRATED and context < args.seq_len:
        fail(f"--seq-len {args.seq_len} exceeds the model's {context} positions. Lower it")


def run(args):
    # Check the model and read the text, before the weights are loaded.
    skeleton, tokenizer = load_skeleton(args.model, fail)
    owners, shapes = scored_parameters(skeleton), shapes_of(skeleton)
    check_model(args, skeleton, owners)
    print(f"{args.method} scores of {len(owners)} parameters of {args.model}, per {args.axis}")
    tokens = torch.empty(0, 0)
    if args.method in CALIBRATED:
        tokens = calibration_tokens(args.data, tokenizer, args.num_samples, args.seq_len, args.seed)
        print(f"{len(tokens)} of {args.num_samples} requested sequences, {tokens.numel():,} tokens")
        print(f"the first one begins: {tokenizer.decode(tokens[0, :48])!r}")
        distributed.join(args.device, args.timeout)
        read = {"model": fingerprint(shapes), "data": digest_of({"": tokens}), "out": ""}
        distributed.check_alike(vars(args) | read)
    elif RANK > 0:
        return

    # Score.
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(args.out.parent, os.W_OK):
        fail(f"--out {args.out}: its directory is not writable. Choose another place")
    scores = compute_scores(args, skeleton, owners, tokens)
    if RANK > 0:
        return
    if missing := sorted(owners.keys() - scores.keys()):
        fail(f"the model does not call {missing[:3]} as modules. Choose another model")
    scores = {name: score.contiguous().cpu() for name, score in scores.items()}
    if not 0 < sum(score.double().sum().item() for score in scores.values()) < float("inf"):
        fail("the scores are all 0, or not finite. Check the weights, --adapted and --dtype")

    # Write.
    metadata = {"format": "ssu-scores", "version": "1", "method": args.method, "axis": args.axis}
    metadata |= {"model": args.model, "data": args.adapted or args.data or ""}
    metadata |= {"fingerprint": fingerprint(shapes), "shapes": json.dumps(shapes)}
    metadata |= {"num_samples": str(len(tokens)), "seq_len": str(args.seq_len)}
    metadata |= {"num_tokens": str(tokens.numel()), "seed": str(args.seed)}
    metadata |= {"torch": torch.__version__, "transformers": transformers.__version__}
    save_tensors(args.out, scores, metadata | {"tensors_sha256": digest_of(scores)})
    lota = " --ratio 0.9" if args.method == "delta" else ""
    print(f"scores: {args.out}")
    print(f"next: python make_mask.py --scores {args.out}{lota} --out MASK")


def main(argv=None):
    distributed.quiet()
    try:
        run(parse_args(argv))
    except (OSError, SafetensorError) as error:
        fail(f"a file cannot be read or written ({error}). Check --model, --out and free space")
    except torch.OutOfMemoryError as error:
        fail(f"{error}. Lower --batch-size (fim: --seq-len), or try several GPUs with torchrun")
    except KeyboardInterrupt:
        tqdm.write("score.py: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
