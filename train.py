r"""Stage 3 of SSU: continue pre-training on raw target-language text, under a mask (Section 3.3).

The objective is ordinary causal language modeling on raw text (Section 3.3, Table 8). For a static
mask, the method is one line between the backward pass and gradient clipping:

    param.grad.mul_(mask)        # 1 = update, 0 = freeze; the mask broadcasts over the parameter

Weight decay is masked as well, because AdamW's decoupled decay moves a weight whose gradient is
zero. Without --mask, all weights are trained: full fine-tuning (FFT). GMT and AdaLoRA are not
static masks: use --gmt-ratio and --adalora. --compact makes the same updates, up to rounding, with
less memory. Before saving, every frozen weight is compared with the source model, bit by bit in the
precision of training.

On a CPU, in a few minutes:
    python train.py --model data/embedded/model --data data/embedded/ne/train.jsonl \
        --mask runs/ne/ssu-wanda/mask.safetensors --out runs/ne/ssu-wanda \
        --steps 32 --batch-size 8 --micro-batch-size 8 --seq-len 128 --lr 5e-4 --precision fp32
On one GPU, as published (`python tools/plan.py --model MODEL` says what fits where):
    python train.py --model allenai/OLMo-2-1124-7B-Instruct --data madlad:ne --precision bf16-true \
        --mask runs/ne/ssu-wanda/mask.safetensors --out runs/ne/ssu-wanda \
        --compact --gradient-checkpointing --save-every 500
By that plan, 40 GB hold it with --optimizer adamw8bit (pip install torchao==0.18.0).
On four GPUs, the same run: torchrun --nproc_per_node=4 train.py ...

OUT/train.jsonl begins with the settings and ends with a count of weights. Between them, the lines
have:
    step, lr, tokens                  tokens: trained on so far
    loss                              nats per token, mean of the step
    grad_norm                         of the gradients that the mask leaves, before clipping
    ms_per_step, tokens_per_second    since the start or --resume, without evaluation and saving
    peak_memory                       bytes
    {source,target}_{loss,bpb}        held-out text, chats whole: nats per token, bits per byte
"""

import data.interrupt  # noqa: F401  # isort: skip (Ctrl-C in the imports below)
import argparse
import functools
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from data.blocks import batch_indices, load_sequences
from data.identity import git_commit
from variants import adalora, adamw8bit, compact, distributed, files, fused_adam, gmt, model_card
from variants.distributed import RANK, WORLD, fail

PRECISIONS = ("bf16", "bf16-true", "fp16", "fp32")


def parse_args(argv=None):  # noqa: C901
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("train.py", argparse.SUPPRESS, __doc__, formatter_class=raw)
    add = parser.add_argument_group("model, data, output").add_argument
    add("--model", required=True, help="source model: directory or hub id")
    add("--data", required=True, help="text: .jsonl[.gz], .parquet, .txt (by line), madlad:LANG")
    add("--mask", type=Path, help="mask file of make_mask.py (default: train all weights)")
    add("--out", type=Path, required=True, help="directory for model/, checkpoint/, train.jsonl")
    add("--source-eval", help="held-out source text or chats, for the loss during training")
    add("--target-eval", help="held-out target text, for the loss during training")
    add = parser.add_argument_group("hyperparameters (defaults: Table 8)").add_argument
    add("--steps", type=int, default=12208, help="optimizer steps")
    add("--batch-size", type=int, default=32, help="sequences per optimizer step")
    add("--micro-batch-size", type=int, default=4, help="sequences per forward pass (ours)")
    add("--seq-len", type=int, default=512, help="tokens per sequence")
    add("--lr", type=float, default=5e-5, help="peak rate: linear warmup, cosine decay to 0")
    add("--warmup-ratio", type=float, default=0.05, help="fraction of the steps used for warmup")
    add("--weight-decay", type=float, default=0.01, help="decoupled decay of trainable matrices")
    add("--max-grad-norm", type=float, default=1.0, help="clipping threshold, 0: none (ours)")
    add("--gmt-ratio", type=float, help="GMT: fraction to drop (paper: 0.5, in micro-batches of 8)")
    add("--adalora", action="store_true", help="AdaLoRA (needs peft); cannot resume")
    add("--seed", type=int, default=42, help="seed of the order of sequences, and of all else")
    add = parser.add_argument_group("precision, memory and speed").add_argument
    precision = "autocast over fp32 weights (bf16, fp16); bf16 weights, fp32 moments (bf16-true)"
    add("--precision", choices=PRECISIONS, default="bf16", help=precision)
    add("--compact", action="store_true", help="no gradients or moments for frozen columns")
    optimizer = "AdamW; by torchao with 8-bit moments, updates rounded at random or to the nearest"
    add("--optimizer", choices=adamw8bit.CHOICES, default="adamw", help=optimizer)
    add("--gradient-checkpointing", action="store_true", help="recompute activations")
    add("--compile", action="store_true", help="torch.compile of each decoder layer")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="device to train on")
    add("--timeout", type=float, default=10, help="minutes to wait for another rank")
    add = parser.add_argument_group("logging and checkpoints").add_argument
    add("--log-every", type=int, default=10, help="steps between lines of train.jsonl")
    add("--eval-every", type=int, default=500, help="steps between held-out losses (0: ends only)")
    add("--eval-tokens", type=int, default=65536, help="held-out tokens to evaluate per language")
    add("--save-every", type=int, default=0, help="steps between checkpoints (0: none)")
    add("--resume", action="store_true", help="resume from OUT/checkpoint")
    args = parser.parse_args(argv)
    counts = [args.steps, args.batch_size, args.micro_batch_size, args.seq_len - 1, args.log_every]
    if min(counts) < 1:
        parser.error("--steps, --log-every and the batch sizes must be at least 1, --seq-len 2")
    for name in ("lr", "weight_decay", "max_grad_norm", "eval_every", "save_every", "seed"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be a finite number of at least 0")
    if not 0 <= args.warmup_ratio <= 1 or not 0 <= (args.gmt_ratio or 0) < 1:
        parser.error("--warmup-ratio must be between 0 and 1, --gmt-ratio at least 0 and below 1")
    if sum([args.mask is not None, args.gmt_ratio is not None, args.adalora]) > 1:
        parser.error("--mask, --gmt-ratio and --adalora are different methods: choose one")
    if args.compact and (not args.mask or args.precision == "fp16"):
        parser.error("--compact needs --mask and --precision bf16, bf16-true or fp32")
    if args.compile and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        parser.error("--compile needs a C++ compiler: install one, or leave it out")
    if args.adalora:
        adalora.check(args, parser.error)
    adamw8bit.check(args, parser.error)
    return args


# --------------------------------------------------------------------------------------------------
# Model


def build_model(args, masks, skeleton, directory):
    """Return the model to train. Parameters that are frozen as a whole get no gradient.

    skeleton: the model without weights.
    masks: {parameter name: uint8 tensor that broadcasts to it}, 1 = update, 0 = freeze.
    """
    options = {"attn_implementation": files.fastest_attention(args, skeleton)}
    options["dtype"] = torch.bfloat16 if args.precision == "bf16-true" else torch.float32
    if WORLD == 1:
        model = files.load_model(args.model, directory, **options)
    else:
        model = distributed.empty_model(skeleton.config, **options)
    print(f"attention: {model.config._attn_implementation}")
    for name, mask in masks.items():
        model.get_parameter(name).requires_grad_(bool(mask.any()))
    if args.adalora:
        model = adalora.add_adapters(model, args.steps, args.seed)
    if args.compact:  # on the CPU, so that the full fp32 model is never moved to the GPU
        compact.make_compact(model, masks, args.precision, in_place=args.optimizer != "adamw")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.compile:
        distributed.compile_layers(model)
    if WORLD > 1:
        distributed.shard(model, args.precision)
        source = distributed.fill(model, args.device, args.model, directory)
        compact.fill_columns(model, masks, source)
    if args.gmt_ratio is not None:
        gmt.add_hooks(model, files.maskable(model), args.gmt_ratio)  # not embeddings, LM head
    return model.to(args.device).train()


# --------------------------------------------------------------------------------------------------
# Data order, schedule, loss, optimizer


def learning_rate(step, args):
    """Return the rate of a step (from 0): linear warmup, in which step 0 moves nothing, and cosine
    decay (Table 8).
    """
    warmup = math.ceil(args.steps * args.warmup_ratio)
    if step < warmup:
        return args.lr * step / warmup
    progress = (step - warmup) / (args.steps - warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def next_token_loss(model, tokens):
    """Return the summed cross-entropy, in nats, of tokens [batch, seq_len], computed in fp32."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # keeps float64
    return F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")


def accumulate(model, batch, args, autocast, scaler):
    """Add up the gradients of a batch [n, seq_len]. Return the mean loss of the step."""
    loss = torch.zeros((), device=batch.device)
    for micro_batch in batch.split(args.micro_batch_size):
        with autocast():
            micro_loss = next_token_loss(model, micro_batch)
        micro_loss = micro_loss / (args.batch_size * (args.seq_len - 1))  # adds up to the mean
        loss += micro_loss.detach()
        if args.adalora:
            micro_loss = micro_loss + adalora.penalty(model) * len(micro_batch) / len(batch)
        scaler.scale(micro_loss * WORLD).backward()  # FSDP averages the gradients of the ranks
    if args.gmt_ratio is not None:
        gmt.take_kept(model)
    return distributed.add_up(loss)


@torch.no_grad()
def heldout_losses(step, model, heldout, args, autocast):
    """Return {side}_loss and {side}_bpb. heldout: {side: (sequences, counts)}, sampled evenly."""
    values = {}
    model.eval()
    for side, (sequences, counts) in heldout.items():
        size = min(len(sequences), max(1, args.eval_tokens // args.seq_len))
        chosen = np.linspace(0, len(sequences) - 1, size).astype(int)
        nats = 0.0
        for tokens in sequences[chosen]["input_ids"].to(args.device).split(args.micro_batch_size):
            with autocast():
                nats += next_token_loss(model, tokens).item() / (size * (args.seq_len - 1))
        bits = nats / math.log(2) * counts["tokens"] / counts["bytes"]  # of the whole text
        values |= {f"{side}_loss": round(nats, 6), f"{side}_bpb": round(bits, 6)}
        tqdm.write(f"step {step}: {side} {bits:.4f} bits per byte, {nats:.4f} nats per token")
    model.train()
    distributed.reshard(model)
    return values


def make_optimizer(model, masks, args):
    """Return (AdamW of Table 8, masked, decayed), where the last two list (param, mask).

    Matrices decay; norms and biases do not. `decayed` is empty in bf16-true: there FusedAdam
    applies weight decay, before it rounds.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masked, decayed = [], []
    for name, p in params.items():
        mask = 1
        if name in masks:
            mask = distributed.like(masks[name], p)
            masked.append((p, mask))
        if p.dim() > 1:
            decayed.append((p, mask))
    options = {"lr": args.lr, "betas": (0.9, 0.999), "eps": 1e-8}
    if args.optimizer != "adamw":
        options |= {"weight_decay": args.weight_decay, "stochastic": args.optimizer == "adamw8bit"}
        return adamw8bit.AdamW8bit(params.values(), decayed, masked, **options), masked, []
    if args.precision == "bf16-true":
        options |= {"weight_decay": args.weight_decay, "decayed": dict(decayed)}
        return fused_adam.FusedAdam(params.values(), **options), masked, []
    adamw = torch.optim.AdamW(params.values(), weight_decay=0, fused=True, **options)
    return adamw, masked, decayed


@torch.no_grad()
def decay_weights(decayed, lr_times_decay):
    """Shrink the trainable weights of matrices (decoupled weight decay)."""
    for param, mask in decayed:
        if param.grad is not None:  # AdamW, too, skips parameters without a gradient
            param.mul_(1 - lr_times_decay * mask)


# --------------------------------------------------------------------------------------------------
# Log, proof, final model


@torch.no_grad()
def verify_and_copy(model, source, masks, dtype):
    """Check that frozen weights did not move, and copy trained ones into source.

    source: {parameter name: fp32 weights of the source model}, saved in dtype. Return the numbers
    of frozen, trainable and moved weights, before they are rounded to dtype.
    """
    counts = torch.zeros(3, dtype=torch.int64)
    columns = compact.trained_columns(model)
    for name, before in source.items():
        p = model.get_parameter(name)
        before = distributed.local(before)
        after = compact.in_fp32(model, name, before, columns)
        changed = after.view(torch.int32) != before.view(torch.int32)
        mask = distributed.local(distributed.like(masks.get(name, torch.ones(1)), p))
        update = mask.to(after.device).bool().expand(after.shape)
        if (changed & ~update).any():
            fail(f"frozen weights of {name} moved, nothing is saved. Report this bug of train.py")
        if not torch.isfinite(after.to(dtype)).all():
            fail(f"trained weights of {name} are not finite, nothing is saved. Lower --lr")
        counts += torch.stack([(~update).sum(), update.sum(), (changed & update).sum()]).cpu()
        before.copy_(after)
    return distributed.add_up(counts.to(p.device)).tolist()


def prove_and_save(args, model, masks, skeleton, directory):
    """Compare frozen weights with the source model, then write OUT/model."""
    dtype = skeleton.config.dtype or torch.float32
    if WORLD == 1:
        whole = files.load_model(args.model, directory, dtype=torch.float32)
        source = {name: p.detach() for name, p in whole.named_parameters()}
    else:
        whole = skeleton
        source = distributed.read_source(model, args.model, directory)
    if not files.is_exact(source, dtype):
        dtype = torch.float32  # config.json names a coarser dtype, which would round frozen weights
    if args.adalora:
        model, masks = adalora.merge(model, source)
    frozen, trainable, moved = verify_and_copy(model, source, masks, dtype)
    print(f"verified: {frozen:,} frozen weights are bit-identical to the source")
    print(f"moved: {moved:,} of {trainable:,} trainable weights")
    final = args.out / "model"
    files.save_model(whole, source, dtype, directory, args.out / "model.tmp")
    summary = {"frozen_verified": frozen, "trainable": trainable, "moved": moved}
    summary |= {"peak_memory": files.peak_memory(args.device), "commit": git_commit()}
    model_card.write(args, directory, files.commit_of(args.model, directory), summary)
    files.append_line(args.out / "train.jsonl", {"summary": summary})
    files.finish(args.out)
    print(f"model: {final}; log: {args.out}/train.jsonl")
    print(f"next: python evaluate.py --model {final} --out {args.out}/eval.json --lang LANG ...")


# --------------------------------------------------------------------------------------------------


def check_finite(step, loss, norm, scaler):
    """Return whether the gradients are finite. If not, exit, unless fp16 can lower its loss scale.

    A non-finite gradient shows in the norm even where it is masked, because inf * 0 is NaN.
    """
    finite = bool(torch.isfinite(norm))
    if not torch.isfinite(loss) or (not finite and scaler.get_scale() <= 1):  # 1 unless fp16
        what = f"loss {loss.item()}, gradient norm {norm.item()}"
        fail(f"step {step + 1}: {what}. Lower --lr; what was saved before is intact")
    return finite


def train(args, model, masks, sequences, heldout, settings):
    """Run the loop of Section 3.3.

    All that a step depends on follows from its number or is in the checkpoint, so that --resume
    gives the same bits on a CPU. A line of the log is written before the checkpoint of its step.
    """
    log = args.out / "train.jsonl"
    tokens_per_step = args.batch_size * args.seq_len
    seconds = 0.0
    optimizer, masked, decayed = make_optimizer(model, masks, args)
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    autocast = functools.partial(
        torch.autocast,
        args.device,
        dtype=torch.float16 if args.precision == "fp16" else torch.bfloat16,
        enabled=args.precision in ("bf16", "fp16"),
        cache_enabled=False,  # the cache would keep a copy of all weights
    )
    start = files.load_checkpoint(args.out, model, optimizer, scaler) if args.resume else 0
    compact.write_columns(model)  # a checkpoint has only the trainable columns of a matrix
    files.start_log(log, {"settings": settings, "arguments": vars(args)}, start)
    if start == 0:
        files.append_line(log, {"step": 0} | heldout_losses(0, model, heldout, args, autocast))

    bar = tqdm(total=args.steps, desc="train", unit="step", initial=start, disable=RANK > 0)
    for step in range(start, args.steps):
        began = time.perf_counter()
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        torch.manual_seed((args.seed * 1_000_003 + step) % 2**63)  # dropout, random rounding

        # Forward and backward, accumulated over micro-batches
        indices = batch_indices(step, args.batch_size, len(sequences), args.seed)
        batch = sequences[distributed.mine(indices)]["input_ids"].to(args.device)
        loss = accumulate(model, batch, args, autocast, scaler)
        scaler.unscale_(optimizer)

        # The method: a frozen weight gets no gradient
        for param, mask in masked:
            if param.grad is not None:
                param.grad.mul_(mask)

        # Clip by the norm of all gradients, over all ranks
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
        norm = distributed.full(norm)
        finite = check_finite(step, loss, norm, scaler)

        # Decoupled weight decay of trainable weights alone, then Adam
        if finite:
            decay_weights(decayed, lr * args.weight_decay)
        scaler.step(optimizer)
        scaler.update()
        compact.write_columns(model, check_gradients=args.compact)
        if args.adalora:
            model.base_model.update_and_allocate(step)  # reads the gradients
        optimizer.zero_grad()

        # Log, measure, save
        done = step + 1
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)  # waits for the GPU
        bar.update()
        seconds += time.perf_counter() - began
        measured = done == args.steps or (args.eval_every and done % args.eval_every == 0)
        if measured or done % args.log_every == 0:
            line = {
                "step": done,
                "loss": round(loss.item(), 6),
                "grad_norm": round(norm.item(), 6) if finite else None,
                "lr": lr,
                "tokens": done * tokens_per_step,
                "ms_per_step": round(1000 * seconds / (done - start)),
                "tokens_per_second": round((done - start) * tokens_per_step / seconds),
                "peak_memory": files.peak_memory(args.device),
            }
            if measured:
                line |= heldout_losses(done, model, heldout, args, autocast)
            files.append_line(log, line)
        if args.save_every and done % args.save_every == 0 and done < args.steps:
            files.save_checkpoint(args.out, done, model, optimizer, scaler, settings)


def run(args):
    # Check everything that needs no weights
    skeleton, tokenizer, directory = files.load_skeleton(args.model)
    masks = files.load_masks(args.mask, skeleton) if args.mask else {}
    files.check_fit(args, skeleton, masks)
    files.check_out(args.out, args.resume)

    # Read the text
    model_key = files.model_key(args.model, directory)
    read = functools.partial(load_sequences, tokenizer, model_key, args.seq_len)
    heldout = {}
    with distributed.rank_zero_first():
        sequences, counts = read("--data", args.data)
        if args.source_eval:
            heldout["source"] = read("--source-eval", args.source_eval)
        if args.target_eval:
            heldout["target"] = read("--target-eval", args.target_eval)
    settings = files.resume_settings(args, model_key, counts["key"], masks)
    if args.resume:
        files.check_checkpoint(args.out, settings)

    first = batch_indices(0, 1, len(sequences), args.seed)[0]
    text = tokenizer.decode(sequences[first]["input_ids"])
    files.print_plan(args, skeleton, masks, len(sequences), text)

    # Train, prove, save
    with files.locked(args.out, args.resume):
        model = build_model(args, masks, skeleton, directory)
        train(args, model, masks, sequences, heldout, settings)
        prove_and_save(args, model, masks, skeleton, directory)


def main(argv=None):
    distributed.quiet()
    args = parse_args(argv)
    distributed.start(args)
    try:
        run(args)
    except (OSError, SafetensorError) as error:  # a full disk, for instance
        fail(f"a file cannot be read or written ({error}). What was saved before is intact")
    except torch.OutOfMemoryError as error:
        fail(f"{error}. Lower --micro-batch-size, or see tools/plan.py for what needs less memory")
    except KeyboardInterrupt:
        tqdm.write("train.py: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
