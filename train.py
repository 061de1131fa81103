"""Stage 3 of SSU: continue pre-training on target-language text while frozen columns stay frozen.

The objective is ordinary causal language modeling on raw text (Section 3.3, Table 8). The method
is one line between the backward pass and gradient clipping:

    param.grad.mul_(mask)        # 1 = update, 0 = freeze; the mask broadcasts over the parameter

Weight decay is masked as well, because AdamW's decoupled decay moves a weight whose gradient is
zero. Without --mask, all weights are trained: full fine-tuning (FFT). Two baselines are not static
masks and have flags of their own: --gmt-ratio and --adalora. --compact gives the same updates for
less memory. Before saving, every frozen weight is compared with the source model, bit by bit.

On a CPU, in a few minutes:
    python train.py --model data/embedded/model --data data/embedded/ne/train.jsonl \
        --mask runs/ne/ssu-wanda/mask.safetensors --out runs/ne/ssu-wanda \
        --steps 32 --batch-size 8 --micro-batch-size 8 --seq-len 128 --lr 5e-4
On one GPU, as published (`python tools/plan.py --model MODEL` says what fits where):
    python train.py --model allenai/OLMo-2-1124-7B-Instruct --data madlad:ne --precision bf16-true \
        --mask runs/ne/ssu-wanda/mask.safetensors --out runs/ne/ssu-wanda \
        --compact --gradient-checkpointing --save-every 500

OUT/train.jsonl has the settings in its first line, then a line per log step: step, tokens (so far),
loss (mean of the step, nats per token), grad_norm (after masking, before clipping), lr,
ms_per_step, tokens_per_second, peak_memory (bytes), and where held-out text is measured
source_loss, target_loss (nats per token), source_bpb, target_bpb (bits per byte). The last line
counts the weights.
"""

import argparse
import functools
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_flash_attn_2_available

from data.blocks import batch_indices, load_sequences
from variants import adalora, compact, files, fused_adam, gmt
from variants.files import fail

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
DTYPES["bf16-true"] = torch.bfloat16
EVAL_TOKENS = 65536  # held-out tokens to measure, of each side


def parse_args(argv=None):  # noqa: C901
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("train.py", description=__doc__, formatter_class=formatter)
    add = parser.add_argument_group("model, data, output").add_argument
    add("--model", required=True, help="source model: directory or hub id")
    add("--data", required=True, help="target text: .jsonl[.gz], .parquet, .txt or madlad:LANG")
    add("--mask", type=Path, help="mask file of make_mask.py (default: train all weights)")
    add("--out", type=Path, required=True, help="directory for model/, checkpoint/, train.jsonl")
    add("--source-eval", help="held-out source text or chats, for the loss during training")
    add("--target-eval", help="held-out target text, for the loss during training")
    add = parser.add_argument_group("hyperparameters (defaults: Table 8)").add_argument
    add("--steps", type=int, default=12208, help="optimizer steps")
    add("--batch-size", type=int, default=32, help="sequences per optimizer step")
    add("--micro-batch-size", type=int, default=4, help="sequences per forward pass")
    add("--seq-len", type=int, default=512, help="tokens per sequence")
    add("--lr", type=float, default=5e-5, help="peak rate: linear warmup, cosine decay to 0")
    add("--warmup-ratio", type=float, default=0.05, help="fraction of the steps used for warmup")
    add("--weight-decay", type=float, default=0.01, help="decoupled decay of trainable matrices")
    add("--max-grad-norm", type=float, default=1.0, help="clipping threshold (0: no clipping)")
    add("--gmt-ratio", type=float, help="GMT: fraction of each gradient to drop (paper: 0.5)")
    add("--adalora", action="store_true", help="AdaLoRA (needs peft); cannot resume")
    add("--seed", type=int, default=42, help="seed of the order of sequences")
    add = parser.add_argument_group("precision, memory and speed").add_argument
    precision = "autocast over fp32 weights (bf16, fp16); bf16 weights, fp32 moments (bf16-true)"
    add("--precision", choices=DTYPES, default="bf16", help=precision)
    add("--compact", action="store_true", help="no gradients or moments for frozen columns")
    add("--gradient-checkpointing", action="store_true", help="recompute activations")
    add("--compile", action="store_true", help="torch.compile of each decoder layer")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="device to train on")
    add = parser.add_argument_group("logging and checkpoints").add_argument
    add("--log-every", type=int, default=10, help="steps between lines of train.jsonl")
    add("--eval-every", type=int, default=500, help="steps between held-out losses (0: ends only)")
    add("--save-every", type=int, default=0, help="steps between checkpoints (0: none)")
    add("--resume", action="store_true", help="continuation from OUT/checkpoint")
    args = parser.parse_args(argv)
    counts = [args.steps, args.batch_size, args.micro_batch_size, args.seq_len - 1, args.log_every]
    if min(counts) < 1:
        parser.error("--steps, --log-every and batch sizes must be at least 1, --seq-len 2")
    for name in ("lr", "weight_decay", "max_grad_norm", "eval_every", "save_every", "seed"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be at least 0")
    if args.seed >= 2**32:
        parser.error("--seed must be below 2^32")
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
    return args


# --------------------------------------------------------------------------------------------------
# Model


def build_model(args, masks):
    """Load the model to be trained. Parameters that are frozen as a whole get no gradient."""
    flash = args.device == "cuda" and args.precision != "fp32" and is_flash_attn_2_available()
    options = {"attn_implementation": "flash_attention_2"} if flash else {}
    dtype = torch.bfloat16 if args.precision == "bf16-true" else torch.float32
    model = files.load_model(args.model, dtype=dtype, **options).train()
    print(f"attention: {model.config._attn_implementation}")
    for name, mask in masks.items():
        model.get_parameter(name).requires_grad_(bool(mask.any()))
    if args.adalora:
        model = adalora.add_adapters(model, args.steps, args.seed)
    if args.gmt_ratio is not None:
        gmt.add_hooks(model, files.maskable(model), args.gmt_ratio)
    if args.compact:  # on the CPU, so that the whole fp32 model never meets the GPU
        compact.make_compact(model, masks, args.precision)
    model.to(args.device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if args.compile and isinstance(module, GradientCheckpointingLayer):
            torch._dynamo.config.recompile_limit = 64  # layers differ in what is frozen
            module.compile(dynamic=False)
    return model


# --------------------------------------------------------------------------------------------------
# Data order, schedule, loss, optimizer


def learning_rate(step, args):
    """Return the rate of step `step` (from 0): linear warmup, then cosine decay to 0 (Table 8)."""
    warmup = math.ceil(args.steps * args.warmup_ratio)
    if step < warmup:
        return args.lr * step / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))


def next_token_loss(model, tokens):
    """Return the summed cross-entropy, in nats, of tokens [batch, seq_len], computed in fp32."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")


def accumulate(model, batch, args, autocast, scaler):
    """Add up the gradients of a batch [batch_size, seq_len] and return its mean loss."""
    loss = torch.zeros((), device=batch.device)
    for micro_batch in batch.split(args.micro_batch_size):
        with autocast():
            part = next_token_loss(model, micro_batch)
        part = part / (len(batch) * (args.seq_len - 1))  # its part of the batch's mean
        loss += part.detach()
        if args.adalora:
            part = part + adalora.penalty(model) * len(micro_batch) / len(batch)
        scaler.scale(part).backward()
    return loss


@torch.no_grad()
def heldout_losses(step, model, heldout, args, autocast):
    """Return the losses of {side: (sequences, counts)} on sequences spread evenly over each."""
    values = {}
    model.eval()
    for side, (sequences, counts) in heldout.items():
        count = min(len(sequences), max(1, EVAL_TOKENS // args.seq_len))
        chosen = np.linspace(0, len(sequences) - 1, count).astype(int)
        nats = 0.0
        for tokens in sequences[chosen]["input_ids"].to(args.device).split(args.micro_batch_size):
            with autocast():
                nats += next_token_loss(model, tokens).item() / (count * (args.seq_len - 1))
        bits = nats / math.log(2) * counts["tokens"] / counts["bytes"]
        values |= {f"{side}_loss": round(nats, 6), f"{side}_bpb": round(bits, 6)}
        tqdm.write(f"step {step}: {side} {bits:.4f} bits per byte, {nats:.4f} nats per token")
    model.train()
    return values


def make_optimizer(model, masks, args):
    """Return AdamW (Table 8), the list of (param, mask), and the list of (param, mask) to decay.

    Matrices decay; norms and biases do not. In bf16-true the optimizer applies the decay itself.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masks = {name: masks[name].to(p.device) for name, p in params.items() if name in masks}
    masked = [(params[name], mask) for name, mask in masks.items()]
    decayed = [(p, masks.get(name, 1)) for name, p in params.items() if p.dim() > 1]
    options = {"lr": args.lr, "betas": (0.9, 0.999), "eps": 1e-8}
    if args.precision == "bf16-true":
        options |= {"weight_decay": args.weight_decay, "decayed": dict(decayed)}
        return fused_adam.FusedAdam(params.values(), **options), masked, []
    adamw = torch.optim.AdamW(params.values(), weight_decay=0, fused=True, **options)
    return adamw, masked, decayed


@torch.no_grad()
def decay_weights(decayed, amount):
    for param, mask in decayed:
        if param.grad is not None:  # as AdamW does
            param.mul_(1 - amount * mask)


# --------------------------------------------------------------------------------------------------
# Log, proof, final model


@torch.no_grad()
def take_over(model, source, masks):
    """Copy trained weights into `source`; prove that frozen ones did not move (Section 3.3).

    A weight that still is the source's, rounded to the precision of training, keeps the source's
    bits. Return the numbers of frozen, trainable and moved weights.
    """
    frozen = trainable = moved = 0
    for name, p in model.named_parameters():
        before, now = source.get_parameter(name), p.detach().cpu()
        after = torch.where(now == before.to(now.dtype), before, now.float())
        changed = after.view(torch.int32) != before.view(torch.int32)
        update = masks.get(name, torch.ones(1)).bool().expand(p.shape)
        if (changed & ~update).any():
            fail(f"frozen weights of {name} moved, nothing is saved. Report this bug of train.py")
        if not torch.isfinite(after).all():
            fail(f"trained weights of {name} are not finite, nothing is saved. Lower --lr")
        frozen += int((~update).sum())
        trainable += int(update.sum())
        moved += int((changed & update).sum())
        before.copy_(after)
    return frozen, trainable, moved


def prove_and_save(args, model, masks, dtype, directory):
    """Compare frozen weights with the source model, then write OUT/model."""
    source = files.load_model(args.model, dtype=torch.float32)
    if any(not torch.equal(p.to(dtype).float(), p) for p in source.parameters()):
        dtype = torch.float32  # files finer than config.json says: frozen weights would be rounded
    if args.compact:
        compact.make_ordinary(model, source)
    if args.adalora:
        model = adalora.merge(model, source)
    frozen, trainable, moved = take_over(model, source, masks)
    print(f"verified: {frozen:,} frozen weights are bit-identical to the source")
    print(f"moved: {moved:,} of {trainable:,} trainable weights")
    final, temporary = args.out / "model", args.out / "model.tmp"
    files.save_model(source, directory, temporary, dtype)
    summary = {"frozen_verified": frozen, "trainable": trainable, "moved": moved}
    summary |= {"peak_memory": files.peak_memory(args.device), "commit": files.git_commit()}
    files.append_line(args.out / "train.jsonl", {"summary": summary})
    os.replace(temporary, final)  # last, so that model/ is always complete
    files.remove_checkpoints(args.out)
    print(f"model: {final}; log: {args.out}/train.jsonl")
    print(f"next: python evaluate.py --model {final} --out {args.out}/eval.json --lang LANG ...")


# --------------------------------------------------------------------------------------------------


def check_finite(step, loss, norm, scaler):
    """Return whether the gradients are finite. Exit with an error if they should be.

    Only fp16 may overflow: its scaler then leaves out the step and lowers the loss scale.
    """
    finite = bool(torch.isfinite(norm))
    if not torch.isfinite(loss) or not (finite or scaler.get_scale() > 1):
        what = f"loss {loss.item()}, gradient norm {norm.item()}"
        fail(f"step {step + 1}: {what}. Lower --lr; what was saved before is intact")
    return finite


def train(args, model, masks, sequences, heldout, settings):
    """Run the loop of Section 3.3. --resume relies on the order of its events."""
    log, tokens_per_step, seconds = args.out / "train.jsonl", args.batch_size * args.seq_len, 0.0
    optimizer, masked, decayed = make_optimizer(model, masks, args)
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    options = {"dtype": DTYPES[args.precision], "enabled": args.precision in ("bf16", "fp16")}
    options["cache_enabled"] = False  # the cache would keep a copy of all weights
    autocast = functools.partial(torch.autocast, args.device, **options)
    start = files.load_checkpoint(args.out, model, optimizer, scaler) if args.resume else 0
    compact.write_columns(model)
    files.start_log(log, {"settings": settings, "arguments": vars(args)}, start)
    if start == 0:
        files.append_line(log, {"step": 0} | heldout_losses(0, model, heldout, args, autocast))

    bar = tqdm(range(start, args.steps), "train", args.steps, initial=start, unit="step")
    for step in bar:
        began = time.perf_counter()
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        torch.manual_seed(args.seed * 1_000_003 + step)  # dropout, if any, resumes alike

        # Forward and backward, accumulated over micro-batches
        indices = batch_indices(step, args.batch_size, len(sequences), args.seed)
        batch = sequences[indices]["input_ids"].to(args.device)
        loss = accumulate(model, batch, args, autocast, scaler)
        scaler.unscale_(optimizer)

        # The method: a frozen weight gets no gradient (b_ij of Section 3.3)
        for param, mask in masked:
            if param.grad is not None:
                param.grad.mul_(mask)

        # Clip. inf * 0 is NaN, so a non-finite gradient shows in the norm even where it is masked
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
        finite = check_finite(step, loss, norm, scaler)

        # Decoupled weight decay of trainable weights alone, then Adam
        if finite:
            decay_weights(decayed, lr * args.weight_decay)
        scaler.step(optimizer)
        scaler.update()
        compact.write_columns(model, trained=True)
        if args.adalora and finite:
            model.base_model.update_and_allocate(step)  # reads the gradients
        optimizer.zero_grad()

        # Log, measure, save
        done = step + 1
        seconds += time.perf_counter() - began
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
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


def check_fit(args, model, masks):
    """Exit with an error if the model or the masks do not allow what the arguments ask for."""
    matrices = [masks[name] for name in files.maskable(model) & masks.keys()]
    if args.compact and any(mask.dim() == 2 and len(mask) > 1 for mask in matrices):
        fail(f"--compact: {args.mask} freezes rows or elements, not columns. Leave --compact out")
    if args.gradient_checkpointing and not model.supports_gradient_checkpointing:
        fail(f"--gradient-checkpointing: {type(model).__name__} has none. Leave it out")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and args.seq_len > context:
        fail(f"--seq-len {args.seq_len}: {args.model} takes at most {context} tokens")


def resume_settings(args, model_key, data_key, masks):
    """Return what a run that resumes must share with the interrupted one, to reach its bits."""
    free = {"model", "data", "mask", "source_eval", "target_eval"}  # compared by content, if at all
    free |= {"out", "eval_every", "log_every", "save_every", "resume"}
    settings = {name: value for name, value in vars(args).items() if name not in free}
    settings |= {"model": model_key, "data": data_key, "mask": files.digest_of(masks)}
    settings |= {"torch": torch.__version__, "transformers": transformers.__version__}
    if args.device == "cpu":
        settings["threads"] = torch.get_num_threads()
        settings["cpu"] = torch.backends.cpu.get_cpu_capability()
    return settings


def run(args):
    # Check everything that needs no weights
    skeleton, tokenizer, directory = files.load_skeleton(args.model)
    masks = files.load_masks(args.mask, skeleton) if args.mask else {}
    check_fit(args, skeleton, masks)
    files.check_out(args.out, args.resume)

    # Read the text
    model_key = files.model_key(skeleton, directory)
    read = functools.partial(load_sequences, tokenizer, model_key, args.seq_len)
    sequences, counts = read("--data", args.data)
    heldout = {}
    if args.source_eval:
        heldout["source"] = read("--source-eval", args.source_eval)
    if args.target_eval:
        heldout["target"] = read("--target-eval", args.target_eval)
    settings = resume_settings(args, model_key, counts["key"], masks)
    if args.resume:
        files.check_checkpoint(args.out, settings)

    # Say what will be done
    total, drawn = sum(p.numel() for p in skeleton.parameters()), args.steps * args.batch_size
    first = sequences[batch_indices(0, 1, len(sequences), args.seed)[0]]["input_ids"]
    frozen = 0.0
    for name, mask in masks.items():
        frozen += (mask == 0).float().mean().item() * skeleton.get_parameter(name).numel()
    print(f"{args.model}: {total:,} parameters, {frozen / total:.1%} of them frozen by the masks")
    print(f"{args.precision} on {args.device}, seed {args.seed}")
    print(f"first sequence: {tokenizer.decode(first)!r}")
    print(
        f"{args.steps:,} steps x {args.batch_size} sequences x {args.seq_len} tokens = "
        f"{drawn * args.seq_len:,} tokens, {drawn / len(sequences):.2f} epochs"
    )

    # Train, prove, save
    with files.locked(args.out):
        model = build_model(args, masks)
        train(args, model, masks, sequences, heldout, settings)
        prove_and_save(args, model, masks, skeleton.config.dtype or torch.float32, directory)


def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
    except (OSError, SafetensorError, CheckpointException) as error:  # a full disk, for instance
        fail(f"what was saved before is intact, but: {error}")
    except torch.OutOfMemoryError as error:
        fail(f"{error}. Lower --micro-batch-size, or add --gradient-checkpointing or --compact")
    except KeyboardInterrupt:
        tqdm.write("train.py: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
