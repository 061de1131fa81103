"""Stage 3 of SSU: continue pre-training on target-language text while the shielded columns stay
frozen.

The objective is ordinary causal language modeling on raw text (Section 3.3, Table 8). The method
is one line between the backward pass and gradient clipping:

    param.grad.mul_(mask)        # 1 = update, 0 = freeze; the mask broadcasts over the parameter

Weight decay is masked as well, because AdamW's decoupled decay moves a weight whose gradient is
zero. Without --mask, all weights are trained: full fine-tuning (FFT). Two baselines are not static
masks and have their own flags: --gmt-ratio and --adalora. --compact gives the same updates for
less memory. Before saving, every frozen weight is compared with the source model, bit by bit.

On a CPU, in a few minutes:
    python train.py --model data/embedded/model --data data/embedded/ne/train.jsonl \
        --mask runs/ne/ssu-wanda/mask.safetensors --out runs/ne/ssu-wanda \
        --steps 32 --batch-size 8 --micro-batch-size 8 --seq-len 128 --lr 5e-4
On one GPU, as published (`python tools/plan.py --model MODEL` says what fits where):
    python train.py --model allenai/OLMo-2-1124-7B-Instruct --data madlad:ne --precision bf16-true \
        --mask runs/ne/ssu-wanda/mask.safetensors --out runs/ne/ssu-wanda \
        --compact --gradient-checkpointing --save-every 500

OUT/train.jsonl has the settings in its first line, then a line per log step: step, tokens (seen so
far), loss (mean over the step's tokens, nats), grad_norm (after masking, before clipping), lr,
ms_per_step, tokens_per_second, peak_memory (bytes), and where held-out text was measured
source_loss, target_loss (nats per token), source_bpb, target_bpb (bits per byte). The last line
counts the weights.
"""

import argparse
import contextlib
import fcntl
import functools
import gzip
import hashlib
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
import xxhash
from datasets import Dataset, Features, List, Value, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from jinja2 import TemplateError
from pyarrow import ArrowException
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file, is_flash_attn_2_available

from variants import adalora, compact

MADLAD = "allenai/MADLAD-400", "ecd71297d60c1eb996cd3d7c44c60ad5b55adfc6"  # Section 4.2
END_OF_TEXT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
)  # ends a document, not a chat turn
WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".md"}
COUNTS = ("tokens", "bytes", "words")
MOMENTS = ("exp_avg", "exp_avg_sq")
RESUME_SETTINGS = (
    "steps batch_size micro_batch_size seq_len lr warmup_ratio weight_decay max_grad_norm "
    "precision "
    "compact compile seed gradient_checkpointing gmt_ratio adalora"
).split()
DTYPES = {
    "bf16": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


def fail(message):
    """Print an error that the user can fix, in one line, and exit with code 2."""
    tqdm.write(f"train.py: error: {' '.join(str(message).split())[:500]}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv=None):  # noqa: C901
    parser = argparse.ArgumentParser(
        "train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("model, data, output").add_argument
    add("--model", required=True, help="source model: directory or hub id")
    add(
        "--data",
        required=True,
        help="target text: .jsonl, .jsonl.gz or .parquet with `text`; .txt with a "
        "document per line; or madlad:LANG (MADLAD-400, clean)",
    )
    add("--mask", type=Path, help="mask.safetensors of make_mask.py (default: train all weights)")
    add("--out", type=Path, required=True, help="directory for model/, checkpoint/ and train.jsonl")
    add("--source-eval", help="held-out source text or chats, for the loss during training")
    add("--target-eval", help="held-out target text, for the loss during training")
    add = parser.add_argument_group("hyperparameters (defaults: Table 8)").add_argument
    add("--steps", type=int, default=12208, help="optimizer steps")
    add("--batch-size", type=int, default=32, help="sequences per optimizer step")
    add("--micro-batch-size", type=int, default=4, help="sequences per forward pass")
    add("--seq-len", type=int, default=512, help="tokens per sequence")
    add(
        "--lr",
        type=float,
        default=5e-5,
        help="peak learning rate (linear warmup, cosine decay to 0)",
    )
    add("--warmup-ratio", type=float, default=0.05, help="fraction of the steps used for warmup")
    add(
        "--weight-decay",
        type=float,
        default=0.01,
        help="decoupled weight decay of trainable matrices",
    )
    add(
        "--max-grad-norm",
        type=float,
        default=1.0,
        help="clipping threshold of the norm (0: no clipping)",
    )
    add(
        "--precision",
        choices=DTYPES,
        default="bf16",
        help="bf16, fp16: autocast over fp32 weights; "
        "bf16-true: weights and gradients in bf16, moments in fp32, as the paper's models",
    )
    add(
        "--gmt-ratio",
        type=float,
        help="fraction of each matrix's gradient that GMT drops (paper: 0.5)",
    )
    add("--adalora", action="store_true", help="AdaLoRA (needs peft); cannot resume")
    add("--seed", type=int, default=42, help="order of the training sequences")
    add = parser.add_argument_group("memory and speed").add_argument
    add("--compact", action="store_true", help="no gradients or moments for frozen columns")
    add(
        "--gradient-checkpointing", action="store_true", help="recompute activations to save memory"
    )
    add("--compile", action="store_true", help="torch.compile of each decoder layer")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda[:N]")
    add = parser.add_argument_group("logging and checkpoints").add_argument
    add("--log-every", type=int, default=10, help="steps between lines of train.jsonl")
    add(
        "--eval-every",
        type=int,
        default=500,
        help="steps between held-out losses (0: first and last)",
    )
    add(
        "--eval-tokens",
        type=int,
        default=65536,
        help="held-out tokens to measure, spread over the file",
    )
    add("--save-every", type=int, default=0, help="steps between checkpoints (0: none)")
    add("--resume", action="store_true", help="continue from OUT/checkpoint")
    args = parser.parse_args(argv)
    if (
        min(args.steps, args.batch_size, args.micro_batch_size, args.log_every) < 1
        or args.seq_len < 2
    ):
        parser.error(
            "--steps, --batch-size, --micro-batch-size and --log-every must be at least 1, "
            "--seq-len at least 2"
        )
    if not (
        0 < args.lr < math.inf and 0 <= args.weight_decay < math.inf and 0 <= args.warmup_ratio <= 1
    ):
        parser.error(
            "--lr must be above 0, --weight-decay at least 0, --warmup-ratio between 0 and 1"
        )
    if not args.max_grad_norm >= 0 or min(args.eval_every, args.eval_tokens, args.save_every) < 0:
        parser.error(
            "--max-grad-norm, --eval-every, --eval-tokens and --save-every must be at least 0"
        )
    if not 0 <= args.seed < 2**32:
        parser.error("--seed must be at least 0 and below 2^32")
    if args.gmt_ratio is not None and not 0 <= args.gmt_ratio < 1:
        parser.error("--gmt-ratio must be at least 0 and below 1")
    if sum([args.mask is not None, args.gmt_ratio is not None, args.adalora]) > 1:
        parser.error("--mask, --gmt-ratio and --adalora are different methods: choose one")
    if args.adalora and (args.save_every or args.resume or args.precision not in ("bf16", "fp32")):
        parser.error(
            "--adalora cannot resume and needs --precision bf16 or fp32: leave out --save-every"
        )
    if args.compact and (not args.mask or args.precision == "fp16"):
        parser.error("--compact needs --mask and --precision bf16, bf16-true or fp32")
    if args.compile and (args.adalora or not any(map(shutil.which, ("g++", "clang++", "c++")))):
        parser.error("--compile needs a C++ compiler and is not for --adalora: leave it out")
    if args.adalora and not importlib.util.find_spec("peft"):
        parser.error("--adalora needs peft: pip install peft==0.21.2")
    devices = ["cpu", "cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if args.device not in devices or (args.device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device {args.device} does not exist: PyTorch sees {len(devices) - 2} GPUs")
    return args


# --------------------------------------------------------------------------------------------------
# Model and masks


def load_skeleton(model):
    """Return (the model on the meta device, tokenizer, directory of its files) of a directory or
    hub id.
    """
    if not Path(model).is_dir() and (
        Path(model).is_absolute() or model.startswith(".") or model.count("/") != 1
    ):
        fail(f"--model {model}: no such directory. Give a model directory or a hub id")
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        directory = (
            Path(model) if Path(model).is_dir() else Path(cached_file(model, "config.json")).parent
        )
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:  # ValueError: not a causal language model
        fail(f"--model {model}: {error}")
    if getattr(config, "quantization_config", None):
        fail(f"--model {model}: quantized weights cannot be trained. Give the unquantized model")
    rows = skeleton.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        fail(
            f"--model {model}: its tokenizer has {len(tokenizer):,} tokens, its "
            f"embeddings {rows:,} rows. "
            "Give a model whose files belong together"
        )
    return skeleton, tokenizer, directory


def load_model(model, **options):
    """Load the model. Fail if the checkpoint lacks a tensor, because it would be initialized
    randomly.
    """
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        fail(f"--model {model}: {error}")
    if info["missing_keys"]:
        fail(
            f"--model {model}: its files lack {sorted(info['missing_keys'])[:3]}. Download it again"
        )
    return loaded


def fingerprint(model):
    """Identify an architecture: sha256 over its sorted "name shape" lines."""
    lines = sorted(f"{name} {'x'.join(map(str, p.shape))}" for name, p in model.named_parameters())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def maskable(model):
    """Return the names of all parameters but embeddings and LM head, which are always trained."""
    always = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is model.get_output_embeddings():
            always |= {id(p) for p in module.parameters(recurse=False)}
    return {name for name, p in model.named_parameters() if id(p) not in always}


def load_masks(path, model):
    """Read {parameter name: uint8 mask} and check that it was made for exactly this model."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            masks = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        fail(f"--mask {path}: cannot be read ({error}). Make it again with make_mask.py")
    if (metadata.get("format"), metadata.get("version")) != ("ssu-mask", "1"):
        fail(f"--mask {path}: not a mask file of version 1. Make it with make_mask.py")
    if metadata.get("fingerprint") != fingerprint(model):
        fail(
            f"--mask {path}: made for {metadata.get('model')}, whose parameters differ. "
            "Score and mask this --model"
        )
    if metadata.get("tensors_sha256", digest_of(masks)) != digest_of(masks):
        fail(f"--mask {path}: damaged, its digest does not match. Make it again with make_mask.py")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    missing, extra = sorted(maskable(model) - masks.keys()), sorted(masks.keys() - shapes.keys())
    if missing or extra:
        fail(
            f"--mask {path}: no mask for {missing[:3]}, masks for unknown {extra[:3]}. "
            "Make it again with make_mask.py"
        )
    for name, mask in masks.items():
        fits = mask.dim() == len(shapes[name])
        fits = fits and all(m in (1, n) for m, n in zip(mask.shape, shapes[name], strict=True))
        if not fits or mask.dtype != torch.uint8 or mask.max() > 1:
            fail(
                f"--mask {path}: {name} has {mask.dtype} {list(mask.shape)} for weights "
                f"{list(shapes[name])}, or "
                "values other than 0 and 1. Make it again with make_mask.py"
            )
    if masks.keys() == shapes.keys() and not any(mask.any() for mask in masks.values()):
        fail(f"--mask {path}: freezes every weight. Make another with make_mask.py")
    return masks


def digest_of(tensors):
    """Return the sha256 over the names and bytes of tensors, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def drop_smallest(grad, ratio):
    """GMT (Section 4.4): zero the fraction `ratio` of a matrix's gradient that is smallest in
    size.
    """
    size = grad.abs().flatten()
    dropped = int(ratio * len(size))
    if dropped == 0:
        return grad
    if size.device.type == "cpu":  # torch.kthvalue takes 60 times as long
        threshold = float(np.partition(size.numpy(), dropped - 1)[dropped - 1])
    else:
        threshold = size.sort().values[dropped - 1]
    return grad * (grad.abs() > threshold)


# --------------------------------------------------------------------------------------------------
# Data: `datasets` caches every step by text and tokenizer, and memory-maps the result


def read_documents(flag, data):
    """Yield the rows of a local file: {"text": str} or {"messages": [...]}. Fail at the first bad
    line.
    """
    path, number = Path(data), 0
    try:
        if path.suffix == ".parquet":
            for batch in parquet.ParquetFile(path).iter_batches(1000):
                yield from batch.to_pylist()
            return
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007, the message below reads it
                if line.strip():
                    yield (
                        {"text": line.decode().strip()}
                        if path.suffix == ".txt"
                        else json.loads(line)
                    )
    except (ValueError, OSError, EOFError, zlib.error, RecursionError, ArrowException) as error:
        fail(f"{flag} {data}: line {number} is not JSON in UTF-8, or the file is damaged ({error})")


def render_documents(flag, data, tokenizer):
    """Yield {"text", "templated"}: raw text as it is, chats (held-out text only) in the chat
    template.
    """
    for number, row in enumerate(read_documents(flag, data), 1):
        chat = row.get("messages") if isinstance(row, dict) and flag == "--source-eval" else None
        try:
            if chat and tokenizer.chat_template:
                yield {
                    "text": tokenizer.apply_chat_template(chat, tokenize=False),
                    "templated": True,
                }
            elif row["text"].encode():  # a lone surrogate raises UnicodeEncodeError
                yield {"text": row["text"], "templated": False}
        except (TemplateError, KeyError, TypeError, AttributeError, ValueError) as error:
            fail(
                f"{flag} {data}: row {number} has no usable `text`, nor `messages` that "
                f"the model's chat "
                f"template accepts ({type(error).__name__}: {error}). Correct it or leave it out"
            )


def load_documents(flag, data, tokenizer, key):
    """Return a Dataset of the documents of a local file, or of MADLAD-400 (Section 4.2)."""
    if not data.startswith("madlad:"):
        arguments = {"flag": flag, "data": data, "tokenizer": tokenizer}
        if next(render_documents(**arguments), None) is None:
            fail(f"{flag} {data}: no text in it")
        features = Features({"text": Value("string"), "templated": Value("bool")})
        return Dataset.from_generator(
            render_documents, gen_kwargs=arguments, features=features, fingerprint=key
        )
    repo, revision = MADLAD
    lang = data.removeprefix("madlad:")
    files = f"data/{lang}/{lang}_clean_*.jsonl.gz"
    try:
        folder = snapshot_download(
            repo, repo_type="dataset", revision=revision, allow_patterns=files
        )
        paths = sorted(str(path) for path in Path(folder).glob(files))
        documents = load_dataset("json", data_files=paths, split="train").select_columns("text")
    except (OSError, ValueError, DatasetsError, HTTPError) as error:
        fail(
            f"{flag} {data}: {repo} has no such language, or the hub did not give it ({error}). "
            "Check the code and the network, or give a file"
        )
    if lang == "ne":  # as the authors do
        documents = documents.shuffle(seed=42).select(range(min(len(documents), 250_000)))
    # MADLAD-400 writes a line break as a backslash and an n.
    return documents.map(lambda row: {"text": row["text"].replace("\\n", "\n"), "templated": False})


def tokenize(batch, tokenizer, end_of_text):
    """Tokenize documents, each ended by the end-of-text token. Count their tokens, bytes and
    words.
    """
    ids = []
    for text, templated in zip(batch["text"], batch["templated"], strict=True):
        # Raw text is data: a control token quoted in it is spelled out. A template writes its own
        # BOS.
        one = tokenizer(text, add_special_tokens=not templated, split_special_tokens=not templated)[
            "input_ids"
        ]
        ids.append(one if one[-1:] == [end_of_text] else one + [end_of_text])
    return {
        "input_ids": ids,
        "tokens": [len(one) for one in ids],
        "bytes": [len(text.encode()) for text in batch["text"]],
        "words": [len(text.split()) for text in batch["text"]],
    }


def cut(batch, seq_len):
    """Concatenate documents and cut them into sequences. The remainder is dropped."""
    tokens = np.concatenate(batch["input_ids"])
    return {"input_ids": tokens[: len(tokens) // seq_len * seq_len].reshape(-1, seq_len)}


def load_sequences(flag, data, tokenizer, tokenizer_sha256, end_of_text, seq_len):
    """Return (Dataset of token ids [n, seq_len], counts of the text, key that identifies the
    text).
    """
    preset = data.startswith("madlad:")
    if not preset and not Path(data).is_file():
        fail(f"{flag} {data}: no such file")
    if not preset and not data.endswith((".jsonl", ".jsonl.gz", ".parquet", ".txt")):
        fail(f"{flag} {data}: unknown kind of file. Give .jsonl, .jsonl.gz, .parquet or .txt")
    source = f"{data}@{MADLAD[1]}" if preset else sha256_of([Path(data)])
    key = hashlib.sha256(f"{source} {tokenizer_sha256} {end_of_text} {flag}".encode()).hexdigest()[
        :32
    ]
    documents = load_documents(flag, data, tokenizer, key)
    tokens = documents.map(
        tokenize,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "end_of_text": end_of_text},
        remove_columns=documents.column_names,
        num_proc=min(os.cpu_count(), 1 + len(documents) // 10_000),
        features=Features(
            {"input_ids": List(Value("int32"))} | dict.fromkeys(COUNTS, Value("int64"))
        ),
        new_fingerprint=f"{key}-tokens",
        desc=f"tokenize {flag.strip('-')}",
    ).with_format("numpy")
    counts = {name: int(tokens[name][:].sum()) for name in COUNTS} | {"documents": len(tokens)}
    if counts["tokens"] < seq_len:
        fail(
            f"{flag} {data}: {counts['tokens']} tokens do not fill one sequence of "
            f"{seq_len}. Give more text"
        )
    sequences = tokens.map(
        cut,
        batched=True,
        batch_size=10_000,
        fn_kwargs={"seq_len": seq_len},
        remove_columns=tokens.column_names,
        features=Features({"input_ids": List(Value("int32"))}),
        new_fingerprint=f"{key}-{seq_len}",
        desc=f"cut {flag.strip('-')}",
    )
    return sequences.with_format("torch"), counts, key


def sha256_of(paths):
    """Return the sha256 over names and bytes of files, in name order."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@functools.lru_cache(maxsize=2)
def epoch_order(num_sequences, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(num_sequences)


def batch_indices(step, batch_size, num_sequences, seed):
    """Return the sequences of step `step` (from 0): a new shuffle each epoch, by seed and step
    alone.
    """
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, num_sequences)
        indices.append(int(epoch_order(num_sequences, seed, epoch)[offset]))
    return indices


# --------------------------------------------------------------------------------------------------
# Schedule, loss, optimizer


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


@torch.no_grad()
def heldout_loss(model, sequences, args, autocast):
    """Return the mean loss, nats per token, on up to --eval-tokens tokens spread evenly over the
    text.
    """
    count = min(len(sequences), max(1, args.eval_tokens // args.seq_len))
    chosen = np.linspace(0, len(sequences) - 1, count).astype(int)
    total = 0.0
    model.eval()
    for tokens in sequences[chosen]["input_ids"].to(args.device).split(args.micro_batch_size):
        with autocast():
            total += next_token_loss(model, tokens).item()
    model.train()
    return total / (count * (args.seq_len - 1))


def make_optimizer(model, masks, args):
    """Return AdamW (Table 8) over all trainable parameters, and the list of (parameter, mask) to
    decay.

    AdamW decays the matrices that have no mask. Masked ones are decayed in the loop, masked. Norms
    and biases are not decayed.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masked = {
        p: masks[name].to(p.device) for name, p in params.items() if name in masks and p.dim() > 1
    }
    decayed = [p for p in params.values() if p.dim() > 1 and p not in masked]
    others = [p for p in params.values() if p.dim() < 2 or p in masked]
    options = {"lr": args.lr, "betas": (0.9, 0.999), "eps": 1e-8}
    if args.precision == "bf16-true":  # a decay of lr * wd would round to nothing in bf16
        from variants.fused_adam import FusedAdam

        groups = [{"params": decayed + list(masked), "weight_decay": args.weight_decay}]
        groups.append({"params": [p for p in others if p not in masked], "weight_decay": 0.0})
        return FusedAdam(groups, weight_decay=0.0, decay_masks=masked, **options), []
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, fused=True, **options), list(masked.items())


# --------------------------------------------------------------------------------------------------
# Checkpoints: OUT/checkpoint/step-N, which gets its name when it is complete


def training_state(model, optimizer):
    """Return all trained tensors and Adam's moments and steps, to be saved or loaded in place."""
    state = {
        f"weight/{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad
    }
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            state[f"{key}/{name}"] = value
    return state


def save_checkpoint(folder, step, model, optimizer, scaler, settings):
    state = training_state(model, optimizer)
    if not all(torch.isfinite(value).all() for value in state.values()):
        fail(
            f"step {step}: the weights are not finite. Lower --lr; what was saved before is intact"
        )
    final, temporary = folder / f"step-{step}", folder / f"step-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
    try:
        dcp.save(state, storage_writer=writer, no_dist=True)
    except CheckpointException as error:  # a full disk, for instance
        cause, _ = next(iter(error.failures.values()))
        fail(f"step {step}: cannot save a checkpoint ({cause}). What was saved before is intact")
    about = {"step": step, "settings": settings, "scaler": scaler.state_dict()}
    about["files"] = shard_digests(temporary)
    write_atomically(temporary / "checkpoint.json", json.dumps(about))
    os.replace(temporary, final)
    remove_checkpoints(folder, keep=final)


def shard_digests(folder):
    """Return a fast digest of every tensor file, to find damage."""
    digests = {}
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            digests[path.name] = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    return digests


def find_checkpoint(folder):
    """Return the newest complete checkpoint, or None."""
    steps = [
        path
        for path in folder.glob("step-*")
        if (path / "checkpoint.json").is_file() and path.suffix != ".tmp"
    ]
    return max(steps, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def remove_checkpoints(folder, keep=None):
    for path in folder.glob("step-*"):
        if path != keep:
            shutil.rmtree(path)
    if not keep and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def check_resumable(path, settings):
    """Return the step and scaler state of a checkpoint. Fail if it belongs to a run with other
    settings.
    """
    try:
        about = json.loads((path / "checkpoint.json").read_text())
        saved = about["settings"]
        if about["files"] != shard_digests(path):
            raise ValueError("its tensor files are not as they were written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"--resume: {path} is damaged ({error}). Delete it to start again")
    changed = []
    for key in saved | settings:
        if saved.get(key) != settings.get(key):
            changed.append(f"{key} was {saved.get(key)}, is {settings.get(key)}")
    if changed:
        fail(
            f"--resume: {path} belongs to a run with other settings: {'; '.join(changed)}. "
            "Run as before, or delete it to start again"
        )
    return about["step"], about["scaler"]


def load_checkpoint(path, model, optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            moments = {
                key: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
                for key in MOMENTS
            }
            optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32)} | moments
    try:
        reader = HuggingFaceStorageReader(str(path))
        dcp.load(training_state(model, optimizer), storage_reader=reader, no_dist=True)
    except (CheckpointException, OSError, ValueError, RuntimeError, SafetensorError) as error:
        fail(f"--resume: {path} is damaged ({error}). Delete it to start again")


def write_atomically(path, text):
    """Write to a temporary file and rename it, so that the file is never incomplete."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# --------------------------------------------------------------------------------------------------
# Proof and final model


@torch.no_grad()
def take_over(model, source, masks):
    """Copy the trained weights into `source` and prove that the frozen ones did not move (Section
    3.3).

    A weight that is still the source's value, rounded to the precision of training, keeps the
    source's own bits. Return the numbers of frozen, trainable and moved weights.
    """
    frozen = trainable = moved = 0
    for name, p in model.named_parameters():
        before, now = source.get_parameter(name), p.detach().cpu()
        after = torch.where(now == before.to(now.dtype), before, now.float())
        changed = after.view(torch.int32) != before.view(torch.int32)
        update = masks[name].bool().expand(p.shape) if name in masks else torch.ones_like(changed)
        if (changed & ~update).any():
            fail(
                f"frozen weights of {name} differ from the source model, so nothing is saved. "
                "This is a bug in train.py: please report it"
            )
        if not torch.isfinite(after).all():
            fail(f"the trained weights of {name} are not finite, so nothing is saved. Lower --lr")
        frozen += int((~update).sum())
        trainable += int(update.sum())
        moved += int((changed & update).sum())
        before.copy_(after)
    return frozen, trainable, moved


def save_model(model, source_directory, out, dtype):
    """Write an ordinary Hugging Face directory; all files but the weights are the source's, byte
    for byte.
    """
    shutil.rmtree(out, ignore_errors=True)
    model.generation_config = transformers.GenerationConfig()  # the source's file is copied below
    model.to(dtype).save_pretrained(out)
    for file in source_directory.iterdir():
        if (
            file.is_file()
            and file.suffix not in WEIGHT_FILES
            and not file.name.endswith(".index.json")
        ):
            shutil.copyfile(file, out / file.name)
    for file in out.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def parameter_table(model, masks):
    """Return lines that account for every parameter, by kind: trained, masked or frozen."""
    kinds = {}
    for name, p in model.named_parameters():
        state = "trained"
        if name in masks:
            state = f"{(masks[name] == 0).float().mean().item():.2%} frozen"
        kind = re.sub(r"\.\d+\.", ".*.", name), "x".join(map(str, p.shape)), state
        kinds[kind] = kinds.get(kind, 0) + 1
    lines = [
        f"  {name:<50} {shape:>12} x {n:<4} {state}" for (name, shape, state), n in kinds.items()
    ]
    if model.config.tie_word_embeddings:
        lines.append("  lm_head: shares its weight with the embeddings")
    return lines


def peak_memory(device):
    """Return the peak bytes of PyTorch's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def git_commit():
    """Return the commit of this script, with -dirty if files changed since, or None outside a
    checkout.
    """
    command = [
        "git",
        "-C",
        str(Path(__file__).resolve().parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git on this machine
        return None


# --------------------------------------------------------------------------------------------------


def accumulate(model, batch, args, autocast, scaler):
    """Add up the gradients of a batch [batch_size, seq_len] over micro-batches. Return its mean
    loss.
    """
    loss = torch.zeros((), device=batch.device)
    for micro_batch in batch.split(args.micro_batch_size):
        with autocast():
            part = next_token_loss(model, micro_batch)
        part = part / (args.batch_size * (args.seq_len - 1))  # its part of the batch's mean
        loss += part.detach()
        if args.adalora:
            part = part + adalora.penalty(model) * len(micro_batch) / args.batch_size
        scaler.scale(part).backward()
    return loss


def check_finite(step, loss, norm, scaler):
    """Return whether the gradients are finite. Fail if they, or the loss, are not.

    Only fp16 may overflow: its scaler then skips the step and lowers the loss scale.
    """
    finite = bool(torch.isfinite(norm))
    if not torch.isfinite(loss) or not (finite or scaler.get_scale() > 1):
        fail(
            f"step {step + 1}: loss {loss.item()}, gradient norm {norm.item()}. Lower "
            f"--lr or check "
            "the data; what was saved before is intact"
        )
    return finite


@torch.no_grad()
def decay_weights(decayed, amount):
    """Apply decoupled weight decay to the trainable weights of masked matrices."""
    for param, mask in decayed:
        if param.grad is not None:  # as AdamW does
            param.mul_(1 - amount * mask.to(param.dtype))


def measure(step, model, heldout, args, autocast):
    """Return the held-out losses as fields of train.jsonl, if step `step` is one to measure at."""
    values = {}
    if step not in (0, args.steps) and not (args.eval_every and step % args.eval_every == 0):
        return values
    for side, (texts, counts, _) in heldout.items():
        nats = heldout_loss(model, texts, args, autocast)
        bits = nats / math.log(2) * counts["tokens"] / counts["bytes"]
        values |= {f"{side}_loss": round(nats, 6), f"{side}_bpb": round(bits, 6)}
        tqdm.write(
            f"step {step}: held-out {side} {bits:.4f} bits per byte, {nats:.4f} nats per token"
        )
    return values


def cut_gradients(model, ratio):
    """GMT: drop the smallest gradients in hooks, so that each micro-batch is cut on its own."""
    for name in maskable(model):
        if model.get_parameter(name).dim() > 1:
            hook = functools.partial(drop_smallest, ratio=ratio)
            model.get_parameter(name).register_hook(hook)


def train(args, model, masks, sequences, heldout, settings, start, scaler_state):  # noqa: C901
    """Run the loop of Section 3.3 from step `start`. --resume relies on the order of its events."""
    device, log = torch.device(args.device), args.out / "train.jsonl"
    optimizer, decayed = make_optimizer(model, masks, args)
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    masked = [(p, masks[name].to(device)) for name, p in params if name in masks]
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    autocast = functools.partial(
        torch.autocast,
        device.type,
        dtype=DTYPES[args.precision],
        enabled=args.precision in ("bf16", "fp16"),
        cache_enabled=False,  # the cache would keep a copy of all weights
    )
    if args.gmt_ratio is not None:
        cut_gradients(model, args.gmt_ratio)
    if start:
        load_checkpoint(find_checkpoint(args.out / "checkpoint"), model, optimizer)
        compact.write_columns(model)
        scaler.load_state_dict(scaler_state)
        print(f"resumed after step {start} of {args.steps}")
    else:
        append_line(log, {"step": 0} | measure(0, model, heldout, args, autocast))

    seconds = 0.0
    bar = tqdm(range(start, args.steps), "train", args.steps, initial=start, unit="step")
    for step in bar:
        began = time.perf_counter()
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(args.seed * 1_000_003 + step)  # dropout, if any, resumes alike

        # Forward and backward, accumulated over micro-batches
        indices = batch_indices(step, args.batch_size, len(sequences), args.seed)
        batch = sequences[indices]["input_ids"].to(device)
        loss = accumulate(model, batch, args, autocast, scaler)
        scaler.unscale_(optimizer)

        # The method: a frozen weight gets no gradient (b_ij of Section 3.3)
        for param, mask in masked:
            if param.grad is not None:
                param.grad.mul_(mask)

        # Clip. inf * 0 is NaN, so a non-finite gradient shows in the norm even where it is masked
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
        finite = check_finite(step, loss, norm, scaler)

        # Decoupled weight decay, of trainable weights alone, then Adam
        if args.compact and (unused := compact.without_gradient(model)):
            fail(f"--compact: {unused} got no gradient. The model does not call it: omit --compact")
        if finite:
            decay_weights(decayed, lr * args.weight_decay)
        scaler.step(optimizer)
        scaler.update()
        if args.compact:
            compact.write_columns(model)
        if args.adalora and finite:
            model.base_model.update_and_allocate(step)  # reads the gradients
        optimizer.zero_grad()

        # Log, measure, save
        done = step + 1
        logged = done == args.steps or done % args.log_every == 0
        logged = logged or bool(args.eval_every and done % args.eval_every == 0)
        if logged:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)  # waits for the GPU
        seconds += time.perf_counter() - began
        if logged:
            tokens_per_step = args.batch_size * args.seq_len
            line = {
                "step": done,
                "loss": round(loss.item(), 6),
                "grad_norm": round(norm.item(), 6) if finite else None,
                "lr": lr,
                "tokens": done * tokens_per_step,
                "ms_per_step": round(1000 * seconds / (done - start)),
                "tokens_per_second": round((done - start) * tokens_per_step / seconds),
                "peak_memory": peak_memory(device),
            }
            append_line(log, line | measure(done, model, heldout, args, autocast))
        if args.save_every and done % args.save_every == 0 and done < args.steps:
            save_checkpoint(args.out / "checkpoint", done, model, optimizer, scaler, settings)


def append_line(path, values):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def start_log(path, header, start):
    """Begin train.jsonl anew, or keep its readable lines up to step `start`."""
    lines = [json.dumps(header)]
    if start and path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
            try:
                values = json.loads(line)
            except ValueError:  # the line that a kill cut off
                continue
            if isinstance(values, dict) and values.get("step", start + 1) <= start:
                lines.append(line)
    write_atomically(path, "\n".join(lines) + "\n")


def check_out(args):
    """Fail if --out holds what this run would overwrite, or not what --resume needs."""
    final, log = args.out / "model", args.out / "train.jsonl"
    checkpoint = find_checkpoint(args.out / "checkpoint")
    if args.resume and final.exists() and checkpoint:  # killed while it removed the checkpoint
        remove_checkpoints(args.out / "checkpoint")
        print(f"finished before: {final}")
        raise SystemExit(0)
    if final.exists():
        fail(f"--out {args.out}: holds a finished model. Choose another directory, or delete it")
    if checkpoint and not args.resume:
        fail(f"--out {args.out}: holds a checkpoint. Add --resume, or delete it to start again")
    if args.resume and not checkpoint:
        fail(f"--resume: {args.out}/checkpoint holds no checkpoint. Leave --resume out to start")
    ours = log.exists() and '"settings"' in log.open(errors="replace").readline()
    if not args.resume and not ours and (log.exists() or final.with_name("model.tmp").exists()):
        fail(
            f"--out {args.out}: holds a train.jsonl or model.tmp that train.py did not write. "
            "Choose another directory"
        )


@contextlib.contextmanager
def locked(out):
    """Create --out and keep other runs from writing there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY)
    except OSError as error:
        fail(f"--out {out}: cannot create this directory or write to it ({error})")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        fail(f"--out {out}: another train.py writes there. Wait for it, or choose another one")
    finally:
        os.close(lock)


def check_arguments(args, skeleton, masks):
    """Fail if the model and the masks do not allow what the arguments ask for."""
    matrices = [masks[name] for name in maskable(skeleton) & masks.keys() if masks[name].dim() == 2]
    if args.compact and any(len(mask) > 1 for mask in matrices):
        fail(
            f"--compact: {args.mask} freezes rows or elements, but --compact needs "
            f"columns. Leave it out"
        )
    if args.gradient_checkpointing and not skeleton.supports_gradient_checkpointing:
        fail(
            f"--gradient-checkpointing: {type(skeleton).__name__} does not support it. Leave it out"
        )
    context = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    if context and args.seq_len > context:
        fail(f"--seq-len {args.seq_len}: {args.model} takes at most {context} tokens")


def load_texts(args, tokenizer, directory):
    """Return (training text, {side: held-out text}), each as load_sequences returns it."""
    vocabulary = tokenizer.get_vocab()
    end_of_text = next((token for token in END_OF_TEXT if token in vocabulary), tokenizer.eos_token)
    names = ("tokenizer", "chat_template", "vocab", "merges")
    files = [path for path in directory.iterdir() if path.is_file() and path.name.startswith(names)]
    read = functools.partial(
        load_sequences,
        tokenizer=tokenizer,
        tokenizer_sha256=sha256_of(files),
        end_of_text=vocabulary[end_of_text],
        seq_len=args.seq_len,
    )
    training = read("--data", args.data)
    heldout = {}
    if args.source_eval:
        heldout["source"] = read("--source-eval", args.source_eval)
    if args.target_eval:
        heldout["target"] = read("--target-eval", args.target_eval)
    for label, (_, counts, _) in {"training": training, **heldout}.items():
        print(
            f"{label} text: {counts['documents']:,} documents, {counts['bytes']:,} bytes, "
            f"{counts['tokens']:,} tokens: {counts['tokens'] / counts['bytes']:.3f} per byte, "
            f"{counts['tokens'] / max(1, counts['words']):.2f} per word"
        )
    print(f"each document ends with {end_of_text!r}; the vocabulary is not extended")
    return training, heldout


def resume_settings(args, masks, key, commit, directory):
    """Return what a resumed run must have in common with the interrupted one to reach the same
    bits.
    """
    kinds = (".safetensors", ".json", ".jinja", ".model")
    on_cpu = args.device == "cpu"
    return {name: getattr(args, name) for name in RESUME_SETTINGS} | {
        "model": commit
        or sha256_of([path for path in directory.iterdir() if path.suffix in kinds]),
        "data": key,
        "mask": digest_of(masks) if masks else None,
        "device": torch.device(args.device).type,
        "threads": torch.get_num_threads() if on_cpu else None,
        "cpu": torch.backends.cpu.get_cpu_capability() if on_cpu else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def build_model(args, masks):
    """Load the model to be trained, with the parameters that are frozen as a whole excluded."""
    device = torch.device(args.device)
    flash = device.type == "cuda" and args.precision != "fp32" and is_flash_attn_2_available()
    options = {"attn_implementation": "flash_attention_2"} if flash else {}
    dtype = torch.bfloat16 if args.precision == "bf16-true" else torch.float32
    model = load_model(args.model, dtype=dtype, **options).train()
    print(f"attention: {model.config._attn_implementation}")
    if args.adalora:
        model = adalora.add_adapters(model, args.steps, args.seed)
    for name, mask in masks.items():  # frozen as a whole: no gradient and no moments
        model.get_parameter(name).requires_grad_(bool(mask.any()))
    if args.compact:  # on the CPU, so that the whole fp32 model never meets the GPU
        compact.make_compact(model, masks, args.precision)
    model.to(device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # HFT's layers differ in what is frozen
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.compile(dynamic=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    print(
        f"bytes: weights {sum(p.nbytes for p in model.parameters()):,}, "
        f"gradients {sum(p.nbytes for p in trained):,}, "
        f"Adam's moments {sum(8 * p.numel() for p in trained):,}; activations come on top"
    )
    return model


def prove_and_save(args, model, masks, dtype, directory):
    """Compare the frozen weights with the source model, then write OUT/model."""
    source = load_model(args.model, dtype=torch.float32)
    if any(not torch.equal(p.to(dtype).float(), p) for p in source.parameters()):
        dtype = (
            torch.float32
        )  # the files are finer than config.json says: frozen weights would move
    if args.compact:
        compact.make_ordinary(model, source)
    if args.adalora:
        model = adalora.merge(model, source)
    frozen, trainable, moved = take_over(model, source, masks)
    print(
        f"verified: {frozen:,} frozen weights are bit-identical to the source; "
        f"{moved / trainable:.2%} of {trainable:,} trainable weights moved"
    )
    if moved / trainable < 0.5:
        print("warning: most trainable weights never moved. Is the learning rate too small?")
    final = args.out / "model"
    save_model(source, directory, final.with_name("model.tmp"), dtype)
    summary = {"frozen_verified": frozen, "trainable": trainable, "moved": moved}
    summary |= {"peak_memory": peak_memory(torch.device(args.device)), "commit": git_commit()}
    append_line(args.out / "train.jsonl", {"summary": summary})
    os.replace(final.with_name("model.tmp"), final)  # last, so that model/ is always complete
    remove_checkpoints(args.out / "checkpoint")
    print(f"model: {final}; log: {args.out}/train.jsonl")
    print(
        f"next: python evaluate.py --model {final} --out {args.out}/eval.json --lang LANG "
        f"--data-dir DIR"
    )


def run(args):
    # Check everything that needs no weights
    skeleton, tokenizer, directory = load_skeleton(args.model)
    masks = load_masks(args.mask, skeleton) if args.mask else {}
    check_arguments(args, skeleton, masks)
    check_out(args)

    # Say what will be done
    total = sum(p.numel() for p in skeleton.parameters())
    print(f"{args.model}, {total:,} parameters, {args.precision} on {args.device}")
    print("\n".join(parameter_table(skeleton, masks)))
    (sequences, _, key), heldout = load_texts(args, tokenizer, directory)
    first = sequences[batch_indices(0, 1, len(sequences), args.seed)[0]]["input_ids"]
    print(f"first sequence: {tokenizer.decode(first)!r}")
    drawn = args.steps * args.batch_size
    print(
        f"{args.steps:,} steps x {args.batch_size} sequences x {args.seq_len} tokens = "
        f"{drawn * args.seq_len:,} tokens, {drawn / len(sequences):.2f} epochs of "
        f"{len(sequences):,} sequences; "
        f"{math.ceil(args.batch_size / args.micro_batch_size)} micro-batches per step"
    )

    # Resume
    commit = getattr(skeleton.config, "_commit_hash", None)
    settings = resume_settings(args, masks, key, commit, directory)
    start, scaler_state = 0, None
    if args.resume:
        checkpoint = find_checkpoint(args.out / "checkpoint")
        start, scaler_state = check_resumable(checkpoint, settings)

    # Train, prove, save
    with locked(args.out):
        model = build_model(args, masks)
        arguments = {name: str(value) for name, value in vars(args).items()}
        header = {"settings": settings, "arguments": arguments}
        start_log(args.out / "train.jsonl", header, start)
        train(args, model, masks, sequences, heldout, settings, start, scaler_state)
        dtype = skeleton.config.dtype or torch.float32
        prove_and_save(args, model, masks, dtype, directory)


def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
    except (OSError, SafetensorError) as error:  # a full disk, for instance
        fail(f"{error}. What was written before is intact")
    except torch.OutOfMemoryError as error:
        fail(f"{error}. Lower --micro-batch-size, or add --gradient-checkpointing or --compact")
    except KeyboardInterrupt:
        tqdm.write("train.py: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
