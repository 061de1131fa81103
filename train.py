"""Stage 3 of SSU: continued pre-training on raw target text, the shielded columns held (Section 3.3, Table 8).

The standard causal language modelling objective in PyTorch's mixed precision, and one line that is the method:
    theta_ij <- theta_ij - lr * b_ij * update_ij          param.grad.mul_(mask), before clipping and Adam
Adam's moments of a frozen weight thus stay zero. Decoupled weight decay would move it still, so decay is masked too.
Every static method is such a mask; a matrix that is wholly frozen gets neither gradient nor moments. Without --mask
everything is updated: full fine-tuning (FFT, Section 4.4). --gmt-ratio and --adalora are the paper's two baselines that
are no static mask. Text is raw, never templated: documents, each ended by the end-of-text token, are concatenated and
cut into blocks of --seq-len tokens.

--compact gives the same updates for less: a frozen column needs no gradient, no master and no moments. Its matrix stays
in bf16 as the forward pass reads it, and only the updatable columns have the rest, in fp32. --master none trains bf16
weights in place, as the authors do (their moments are bf16, too; these are fp32). Most small updates are then lost in
rounding, so it is another experiment.

Before it saves, it compares every frozen weight with the source model, bit by bit. --save-every N writes a checkpoint;
the same command with --resume then goes on to the very bits (on a CPU) that a run without interruption would give.

Tiny, on a CPU:
    python train.py --model data/embedded/model --data data/embedded/ne/train.jsonl \
        --mask runs/ne/ssu-wanda/mask.safetensors --out runs/ne/ssu-wanda --steps 32 --batch-size 8 \
        --micro-batch-size 8 --seq-len 128 --lr 5e-4
The paper's setting, on one GPU of 80 GB (without --compact 16 bytes a parameter: 117 GB); --plan says what fits:
    python train.py --model allenai/OLMo-2-1124-7B-Instruct --data madlad:ne --compact --gradient-checkpointing auto \
        --mask runs/ne/ssu-wanda/mask.safetensors --out runs/ne/ssu-wanda --save-every 500
    python train.py --plan --model allenai/OLMo-2-1124-7B-Instruct
"""
import argparse
import copy
import fcntl
import functools
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import types
import zlib
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import transformers
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file, is_flash_attn_2_available

MADLAD = "allenai/MADLAD-400", "ecd71297d60c1eb996cd3d7c44c60ad5b55adfc6"  # --data madlad:LANG (Section 4.2)
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # ends a document; a chat turn may end otherwise
WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".md"}
QUESTION = "What is the capital of France?"
LOGITS = 2**28  # logits that exist at once: 1 GiB in fp32
GPUS = {24: 23, 40: 39, 80: 78, 141: 139}  # for --plan: GB by name, GiB that PyTorch finds free


def fail(message):
    """One line on stderr, below any progress bar, and exit code 2: something the user can mend."""
    tqdm.write(f"train.py: error: {' '.join(str(message).split())[:500]}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv):
    parser = argparse.ArgumentParser("train.py", argparse.SUPPRESS, __doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model, data, output").add_argument
    add("--model", required=True, help="folder or hub name of the source model")
    add("--data", help="target text: .jsonl, .jsonl.gz, .parquet with `text`; .txt, a "
        "document a line; or madlad:LANG (ne, ky, am, ha, ig, ...), MADLAD-400's clean part from the hub")
    add("--mask", type=Path, help="mask.safetensors of make_mask.py; none: full fine-tuning")
    add("--out", type=Path, help="folder for model/, checkpoint/ and train.jsonl")
    add("--source-eval", help="held-out source text or chats, for bits per byte along the way")
    add("--target-eval", help="held-out target text, likewise")
    add = parser.add_argument_group("hyperparameters (defaults: Table 8)").add_argument
    add("--steps", type=int, default=12208, help="optimizer steps")
    add("--batch-size", type=int, default=32, help="blocks in a step")
    add("--micro-batch-size", type=int, default=4, help="blocks in a forward pass; the rest is accumulated")
    add("--seq-len", type=int, default=512, help="tokens in a block")
    add("--lr", type=float, default=5e-5, help="peak learning rate; cosine to 0")
    add("--warmup-ratio", type=float, default=0.05, help="share of the steps with rising learning rate")
    add("--weight-decay", type=float, default=0.01, help="decoupled; not on frozen weights, norms and biases")
    add("--max-grad-norm", type=float, default=1.0, help="global norm, after masking; 0: no clipping")
    add("--gmt-ratio", type=float, help="GMT: share of each matrix's gradient dropped in a micro-batch (paper: 0.5, in "
        "4 micro-batches: --micro-batch-size 8)")
    add("--adalora", action="store_true", help="AdaLoRA by peft, merged into the weights when it saves; no --resume")
    add("--precision", choices=["bf16", "fp16", "fp32"], default="bf16", help="of autocast; masters are fp32")
    add("--master", choices=["fp32", "none", "stochastic"], default="fp32", help="none: bf16 weights updated in place, "
        "as the authors do; stochastic: likewise, rounded at random so that small updates count. Moments stay fp32")
    add("--seed", type=int, default=42, help="order of the blocks")
    add = parser.add_argument_group("along the way").add_argument
    add("--eval-every", type=int, default=500, help="steps between held-out losses; 0: only first and last")
    add("--eval-tokens", type=int, default=65536, help="held-out tokens to look at, spread over the file")
    add("--log-every", type=int, default=10, help="steps between lines of train.jsonl")
    add("--save-every", type=int, default=0, help="steps between checkpoints; 0: none")
    add("--resume", action="store_true", help="go on from OUT/checkpoint")
    add("--gradient-checkpointing", nargs="?", const="all", default="none", choices=["none", "auto", "all"],
        help="activations of all layers are computed again, a third more time; auto: of as many as memory demands")
    add("--compact", action="store_true", help="no gradients, moments and masters for frozen columns: the same "
        "updates, up to rounding, with less memory and time; column masks only")
    add("--compile", action="store_true", help="torch.compile of the layers; for long runs on a GPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--plan", action="store_true", help="only say which GPU is large enough for --model, from its config")
    args = parser.parse_args(argv)
    if not args.plan and not (args.data and args.out):
        parser.error("--data and --out are required")
    if min(args.steps, args.batch_size, args.micro_batch_size, args.log_every) < 1 or args.seq_len < 2:
        parser.error("--steps, --batch-size, --micro-batch-size, --log-every must be at least 1, --seq-len at least 2")
    if not (0 < args.lr < math.inf and 0 <= args.weight_decay < math.inf and 0 <= args.warmup_ratio <= 1):
        parser.error("--lr must be above 0, --weight-decay at least 0, --warmup-ratio between 0 and 1")
    if not args.max_grad_norm >= 0 or min(args.seed, args.eval_every, args.eval_tokens, args.save_every) < 0:
        parser.error("--max-grad-norm, --seed, --eval-every, --eval-tokens and --save-every must be at least 0")
    if args.seed >= 2**32:
        parser.error("--seed must be below 2^32")
    if args.gmt_ratio is not None and not 0 <= args.gmt_ratio < 1:
        parser.error("--gmt-ratio must be at least 0 and below 1")
    if bool(args.mask) + (args.gmt_ratio is not None) + args.adalora > 1:
        parser.error("--mask, --gmt-ratio and --adalora are three methods: choose one")
    if args.adalora and args.precision == "fp16":
        parser.error("--adalora needs --precision bf16 or fp32: a step left out by fp16 could be the one that prunes")
    if args.precision == "fp16" and (args.compact or args.master != "fp32"):
        parser.error("--compact and --master none have no loss scaling: take --precision bf16 or fp32")
    if args.master != "fp32" and (args.precision != "bf16" or args.adalora or args.gmt_ratio is not None):
        parser.error(f"--master {args.master} is for --precision bf16, and not for AdaLoRA and GMT")
    if args.adalora and (args.save_every or args.resume):
        parser.error("--adalora cannot resume (peft's rank allocator has a state of its own): leave out --save-every")
    if args.adalora and not importlib.util.find_spec("peft"):
        parser.error("--adalora needs peft: pip install peft==0.21.2")
    if args.compile and (args.adalora or not any(map(shutil.which, ("g++", "clang++", "c++")))):
        parser.error("--compile needs a C++ compiler, g++ or clang++, and is not for AdaLoRA: leave it out")
    devices = ["cpu", "cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if args.device not in devices or (args.device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device {args.device}: must be cpu or cuda, and PyTorch sees {len(devices) - 2} GPUs here")
    if args.plan:
        return args
    if args.compact and not args.mask:
        parser.error("--compact trains the columns that a --mask leaves to update: give one")
    parent = next(folder for folder in (args.out.absolute(), *args.out.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        parser.error(f"--out {args.out}: no folder can be made there: {parent} is a file or not writable")
    return args


def load_skeleton(model):
    """(config, the model on the meta device: names and shapes, no weights) of a local folder or hub model."""
    if not Path(model).is_dir() and (Path(model).is_absolute() or model.startswith(".") or model.count("/") != 1):
        fail(f"--model {model}: no such folder")
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            fail(f"--model {model}: quantised weights cannot be trained in full; give the unquantised model")
        with torch.device("meta"):
            return config, AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:  # the latter: no causal language model
        fail(f"--model {model}: {error}")


def load_tokenizer(model):
    """(tokenizer, folder with the model's files) of a local folder or hub model."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        return tokenizer, Path(model) if Path(model).is_dir() else Path(cached_file(model, "config.json")).parent
    except (OSError, ValueError) as error:
        fail(f"--model {model}: {error}")


def load_model(model, dtype=torch.float32, **options):
    """The causal LM, its files complete: a tensor that they lack would be random."""
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options)
    except RuntimeError as error:  # shapes that are not those of config.json
        fail(f"--model {model}: {error}")
    if info["missing_keys"]:
        fail(f"--model {model}: its files lack {sorted(info['missing_keys'])[:3]}")
    return loaded


def fingerprint(model):
    """Identity of an architecture: sha256 over its sorted "name shape" lines, e.g. "model.norm.weight 576"."""
    lines = sorted(f"{name} {'x'.join(map(str, p.shape))}" for name, p in model.named_parameters())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def maskable(model):
    """Names of all parameters but the embeddings and the LM head, which are always updated (Section 3.1)."""
    head = model.get_output_embeddings()
    always = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) or module is head
              for p in module.parameters(recurse=False)}
    return {name for name, p in model.named_parameters() if id(p) not in always}


def load_masks(path, model):
    """{parameter name: uint8 mask, 1 = update, 0 = freeze, that broadcasts onto it}. `model` may be on the meta device.

    Raises SystemExit(2) unless the file has a fitting mask for every parameter that must have one (maskable). Only some
    methods mask embeddings and head as well."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            masks = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        fail(f"--mask {path}: cannot be read ({error}); make it again with make_mask.py")
    if (metadata.get("format"), metadata.get("version")) != ("ssu-mask", "1"):
        fail(f"--mask {path}: not a mask file of version 1; make it with make_mask.py")
    if metadata.get("fingerprint") != fingerprint(model):
        fail(f"--mask {path}: made for {metadata.get('model')}, whose parameters differ; score and mask this --model")
    known = {name for name, _ in model.named_parameters()}
    missing, extra = sorted(maskable(model) - set(masks)), sorted(set(masks) - known)
    if missing or extra:
        fail(f"--mask {path}: no mask for {missing[:3]}, masks for unknown {extra[:3]}; make it with make_mask.py")
    if not any(mask.any() for mask in masks.values()) and known <= set(masks):
        fail(f"--mask {path}: freezes every weight, so there is nothing to train; make another with make_mask.py")
    for name, mask in masks.items():
        shape = model.get_parameter(name).shape
        if mask.dim() != len(shape) or any(m not in (1, s) for m, s in zip(mask.shape, shape, strict=True)):
            fail(f"--mask {path}: {name} has a mask {list(mask.shape)} for weights {list(shape)}; make it again")
        if mask.dtype != torch.uint8 or mask.max() > 1:
            fail(f"--mask {path}: {name} holds other values than 0 and 1; make it again with make_mask.py")
    return masks


def has_columns(masks, model):
    """Is every matrix masked by columns, or as a whole, as --compact needs it?"""
    return all(len(masks[name]) == 1 for name in maskable(model) if masks[name].dim() == 2)


def parameter_table(model, masks):
    """Lines that account for every parameter, by kind: updated, or masked and by how much. Tied weights stand once."""
    kinds = defaultdict(lambda: [0, 0, 0])  # parameters, weights, frozen weights
    for name, p in model.named_parameters():
        frozen = p.numel() * (masks[name] == 0).float().mean().item() if name in masks else 0
        kind = kinds[re.sub(r"\.\d+\.", ".*.", name), "x".join(map(str, p.shape)), name in masks]
        kind[:] = [a + b for a, b in zip(kind, (1, p.numel(), frozen), strict=True)]
    lines = [f"  {kind:<50} {shape:>12} x {number:<4} "
             + (f"masked, {frozen / size:.2%} frozen" if masked else "updated")
             for (kind, shape, masked), (number, size, frozen) in kinds.items()]
    return lines + ["  lm_head: tied, the very storage of the embeddings"] * bool(model.config.tie_word_embeddings)


def sha256_of(paths):
    """sha256 over the names and bytes of files, in name order."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def madlad(lang):
    """MADLAD-400's clean documents of a language, fetched once into the hub's cache: a datasets.Dataset with `text`.

    Of Nepali 250,000 are drawn, as the authors do; of the others all are read."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError
    repo, revision = MADLAD
    try:
        folder = snapshot_download(repo, repo_type="dataset", revision=revision,
                                   allow_patterns=f"data/{lang}/{lang}_clean_*.jsonl.gz")
    except (OSError, HTTPError) as error:
        fail(f"--data madlad:{lang}: the hub did not give {repo} ({error}). Mend the network, or give a file")
    files = sorted(map(str, Path(folder, "data", lang).glob("*.jsonl.gz")))
    if not files:
        fail(f"--data madlad:{lang}: no such language in {repo}, whose card has the codes, or in the hub's cache")
    try:
        rows = load_dataset("json", data_files=files, split="train")
    except (DatasetsError, OSError, ValueError, zlib.error) as error:
        fail(f"--data madlad:{lang}: cannot be read ({error.__cause__ or error}). If a file is damaged, delete "
             f"{Path(folder).parents[1]} to fetch it again")
    return rows.shuffle(seed=42).select(range(min(len(rows), 250_000))) if lang == "ne" else rows


def read_texts(flag, data, tokenizer, templated):
    """Yields the documents of a data file or preset as strings; chats (held-out text only) through the template."""
    path, number = Path(data), 0
    try:
        if data.startswith("madlad:"):
            # the data set writes a line break as a backslash and an n
            rows = ({"text": row["text"].replace("\\n", "\n")} for row in madlad(data.removeprefix("madlad:")))
        elif path.suffix == ".parquet":
            from datasets import load_dataset  # here, because it takes a second to import
            rows = load_dataset("parquet", data_files=data, split="train", streaming=True)
        else:
            rows = (gzip.open if path.suffix == ".gz" else open)(path, "rb")
        for row in rows:
            number += 1
            if isinstance(row, bytes):
                row = {"text": row.decode().strip()} if path.suffix == ".txt" else json.loads(row)
            chat = isinstance(row, dict) and templated and row.get("messages")
            if chat and tokenizer.chat_template and isinstance(chat, list) and isinstance(chat[0], dict):
                try:
                    yield tokenizer.apply_chat_template(chat, tokenize=False)
                except TemplateError as error:
                    fail(f"{flag} {data}: the model's chat template refuses line {number} ({error})")
            elif chat or not isinstance(row, dict) or not isinstance(row.get("text"), str):
                fail(f"{flag} {data}: line {number} has no `text`"
                     + (" and no `messages` for which the tokenizer has a chat template" if templated else ""))
            elif row["text"]:
                yield row["text"]
    except (ValueError, OSError, EOFError) as error:
        fail(f"{flag} {data}: line {number} is not JSON in UTF-8, or the file is damaged ({error})")


def tokenise(texts, tokenizer, end_of_text, templated, dtype, path, done):
    """Appends the texts' token ids to the file `path`, a thousand texts at once, on all cores; returns counts of
    documents, tokens, bytes and words. Killed, it goes on after the last 10,000 documents; the file `done` counts them.
    """
    counts = dict(documents=0, tokens=0, bytes=0, words=0)
    with open(path, "ab") as file:
        if done.exists() and file.tell() >= (before := json.loads(done.read_text()))["tokens"] * dtype.itemsize:
            counts = before
        file.truncate(counts["tokens"] * dtype.itemsize)
        texts = itertools.islice(texts, counts["documents"], None)
        with tqdm(desc=f"tokenise {path.stem}", unit="doc", initial=counts["documents"]) as bar:
            while batch := list(itertools.islice(texts, 1000)):
                encoded = tokenizer(batch, add_special_tokens=not templated, return_attention_mask=False)["input_ids"]
                for ids in encoded:
                    ids += [end_of_text] * (ids[-1:] != [end_of_text])
                    file.write(np.array(ids, dtype).tobytes())
                more = dict(documents=len(batch), tokens=sum(map(len, encoded)),
                            bytes=sum(len(text.encode()) for text in batch), words=sum(len(t.split()) for t in batch))
                counts = {name: counts[name] + more[name] for name in counts}
                bar.update(len(batch))
                if counts["documents"] % 10_000 == 0:
                    file.flush()
                    os.fsync(file.fileno())
                    write_atomically(done, json.dumps(counts))
        file.flush()
        os.fsync(file.fileno())
    return counts


def token_file(flag, data, tokenizer, tokenizer_sha256, end_of_text, cache, at_least=1, templated=False):
    """Tokenises a data file or preset once: (memmap of token ids [tokens], facts about the text). Reruns read those.

    Every document gets the tokenizer's own BOS, if it has one, and ends with end-of-text. The dtype is the smallest of
    uint16 and uint32 that holds the vocabulary. Raises SystemExit(2) for unfit data or cache, naming the line."""
    preset = data.startswith("madlad:")
    if not preset and not Path(data).is_file():
        fail(f"{flag} {data}: no such file")
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    made_from = f"{data}@{MADLAD[1]}" if preset else sha256_of([Path(data)])
    key = hashlib.sha256(f"1 {made_from} {tokenizer_sha256} {end_of_text} {templated}".encode()).hexdigest()[:16]
    tokens_path = cache / f"{data.replace(':', '-') if preset else Path(data).stem}-{key}.bin"
    facts_path, part = tokens_path.with_suffix(".json"), tokens_path.with_suffix(".part")
    if not facts_path.exists():  # written last, so its presence says that the tokens are complete
        texts = read_texts(flag, data, tokenizer, templated)
        first = next(texts, None)
        if first is None:
            fail(f"{flag} {data}: no text in it")
        cache.mkdir(parents=True, exist_ok=True)
        done, locked = part.with_suffix(".done"), part.with_suffix(".lock")
        with open(locked, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be tokenising the same text: wait for it
            try:
                if not facts_path.exists():
                    texts = itertools.chain([first], texts)
                    counts = tokenise(texts, tokenizer, end_of_text, templated, dtype, part, done)
                    if counts["tokens"] < at_least:
                        fail(f"{flag} {data}: {counts['tokens']} tokens are too short for one block of {at_least}")
                    os.replace(part, tokens_path)
                    write_atomically(facts_path, json.dumps(dict(data=data, key=key, dtype=dtype.name) | counts))
            except SystemExit:  # unfit text: nothing to go on from
                part.unlink(missing_ok=True)
                raise
            finally:
                if not part.exists():
                    done.unlink(missing_ok=True)
                    locked.unlink(missing_ok=True)
                    if not any(cache.iterdir()):
                        cache.rmdir()
    try:
        facts = json.loads(facts_path.read_text())
        size = tokens_path.stat().st_size
    except (ValueError, OSError) as error:
        fail(f"{facts_path}: damaged ({error}); delete it and its .bin")
    if np.dtype(facts["dtype"]).itemsize < dtype.itemsize:
        fail(f"{tokens_path}: {facts['dtype']} cannot hold a vocabulary of {len(tokenizer):,}; delete it and its .json")
    if size != facts["tokens"] * np.dtype(facts["dtype"]).itemsize:
        fail(f"{tokens_path}: not the {facts['tokens']:,} tokens that its .json promises; delete both")
    if facts["tokens"] < at_least:
        fail(f"{flag} {data}: {facts['tokens']} tokens are too short for one block of {at_least}")
    return np.memmap(tokens_path, facts["dtype"], "r"), facts


def blocks(tokens, indices, seq_len):
    """Blocks of a token file as int64 [len(indices), seq_len]."""
    return torch.from_numpy(np.stack([tokens[i * seq_len:(i + 1) * seq_len] for i in indices]).astype(np.int64))


@functools.lru_cache(maxsize=2)
def epoch_order(num_blocks, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(num_blocks)


def batch_indices(step, batch_size, num_blocks, seed):
    """The blocks of step `step` (from 0): a new shuffle every epoch, a function of seed and step alone."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(epoch_order(num_blocks, seed, p // num_blocks)[p % num_blocks]) for p in positions]


def lr_at(step, steps, warmup_ratio, peak):
    """Learning rate of step `step` (from 0): linear warm-up over the first ceil(5%) steps, cosine to 0 (Table 8); the
    schedule of transformers, whose very first step has rate 0."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def logits_are_the_heads(model, args):
    """Does the model only apply its head to the decoder's output? Some scale or cap logits. Seen on a few tokens."""
    training, ids = model.training, torch.arange(8, device=next(model.parameters()).device)[None]
    model.eval()
    with autocast_of(args)():
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        heads, logits = model.get_output_embeddings()(hidden), model(input_ids=ids, use_cache=False).logits
    model.train(training)
    return torch.allclose(heads.float(), logits.float())


def loss_parts(config, tokens):
    """In how many parts, alike in size, the logits of so many tokens are computed."""
    return math.ceil(tokens / max(1, LOGITS // config.get_text_config().vocab_size))


def next_token_loss(model, tokens, in_parts=True):
    """Summed cross-entropy in nats, tokens [B, L]; position t predicts token t + 1.

    in_parts (logits_are_the_heads): the head is applied to a part of the tokens at a time, and again in the backward
    pass, so that no more than LOGITS numbers exist at once. torch's F.linear_cross_entropy would not repeat it, but
    it ignores autocast and rounds the loss to bf16."""
    def cross_entropy(logits, targets):
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")

    targets, head = tokens[:, 1:].flatten(), model.get_output_embeddings()
    if not in_parts:
        return cross_entropy(model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1), targets)
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    parts = loss_parts(model.config, len(targets))
    if parts == 1:
        return cross_entropy(head(hidden), targets)
    return torch.stack([
        torch.utils.checkpoint.checkpoint(lambda h, t: cross_entropy(head(h), t), h, t, use_reentrant=False)
        for h, t in zip(hidden.tensor_split(parts), targets.tensor_split(parts), strict=True)]).sum()


def drop_smallest(grad, ratio):
    """GMT (Section 4.4; Li et al. 2025): grad [d_out, d_in], its int(ratio * n) smallest by absolute value set to 0,
    and what equals the largest of them. What is not finite stays so, for the check of the norm to see."""
    size, dropped = grad.abs().flatten(), int(ratio * grad.numel())
    if not dropped:
        return grad
    if size.device.type == "cpu":  # torch's own selection takes 60 times as long there
        return grad * (size.view_as(grad) > float(np.partition(size.numpy(), dropped - 1)[dropped - 1]))
    return grad * (size.view_as(grad) > size.sort().values[dropped - 1])  # kthvalue is slower on a GPU


def add_adalora(model, steps):
    """AdaLoRA (Section 4.4) on every nn.Linear but the head, with Table 8's values; its schedule for 12,208 steps is
    scaled to `steps`. Embeddings and head stay as they are, to be trained in full."""
    from peft import AdaLoraConfig, get_peft_model
    share = steps / 12208
    return get_peft_model(model, AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", init_r=12, target_r=8, lora_alpha=32, lora_dropout=0.05,
        tinit=int(1000 * share), tfinal=int(8546 * share), deltaT=max(1, int(20 * share)), total_step=steps,
        beta1=0.85, beta2=0.85, orth_reg_weight=0.5))


def orthogonality(model):
    """AdaLoRA's regulariser, the mean of ||P P^T - I|| over its A and B; peft adds it only to a loss of its own."""
    grams = [p @ p.T if "lora_A" in name else p.T @ p for name, p in model.named_parameters()
             if "lora_A" in name or "lora_B" in name]
    return torch.stack([(gram - torch.eye(len(gram), device=gram.device)).norm() for gram in grams]).mean()


def source_parameters(model):
    """[(name, parameter)] of all that the source model has too, by the names there: what is left without adapters."""
    return [(name.removeprefix("base_model.model.").replace(".base_layer.", "."), p)
            for name, p in model.named_parameters() if ".lora_" not in name and ".ranknum." not in name]


def take(x, columns):
    """x [n, d] -> its columns [n, k]. On a CPU gather is five times as fast as index_select in bf16."""
    return x.gather(1, columns.expand(len(x), -1))


class SelectedColumns(torch.autograd.Function):
    """x W^T + b, W [d_out, d_in], of which only some `columns` are trained: the gradient is computed for these alone,
    gy^T x[:, columns], [d_out, k]. `updated` has that shape, but no storage, and receives it."""
    @staticmethod
    def forward(ctx, x, weight, bias, updated, columns):
        x = x.to(weight.dtype)  # as autocast does
        ctx.save_for_backward(take(x.flatten(0, -2), columns), weight)  # [tokens, k]
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gy):
        x, weight = ctx.saved_tensors
        flat = gy.flatten(0, -2)  # [tokens, d_out]
        return gy @ weight, None, flat.sum(0) if ctx.needs_input_grad[2] else None, flat.T @ x, None


# What make_optimizer leaves out: `weight` is updated in `columns` (None: all) by the gradient that `updated` gets,
# where `mask` is 1, through a `master` [d_out, k] of at least fp32, which `adam` holds. Is it kept between steps?
Leaf = namedtuple("Leaf", "weight columns updated mask master adam keeps_master")


def make_leaf(weight, columns, updated, mask, kept=None):
    """kept: the master's values; without them it is made from the weight in each step, and gone after it."""
    values = torch.empty(0, dtype=torch.promote_types(weight.dtype, torch.float32)) if kept is None else kept
    master = nn.Parameter(values.to(weight.device))
    adam = torch.optim.AdamW([master], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                             fused=weight.device.type in ("cpu", "cuda"))
    return Leaf(weight, columns, updated, mask.to(weight.device), master, adam, kept is not None)


def compact_linear(module, x):
    if not torch.is_grad_enabled():
        return F.linear(x, module.weight, module.bias)
    return SelectedColumns.apply(x, module.weight, module.bias, module.updated, module.columns)


def make_leaves(model, masks, args):
    """{parameter name: Leaf}, none in the reference loop; the model becomes what they need.

    --compact: one for each matrix with frozen columns. The whole matrix is kept as the forward pass reads it, in the
    precision of autocast, and the updatable columns in fp32 beside it; a wholly frozen matrix needs no leaf.
    --master none: one for every other parameter as well, of a model in bf16."""
    leaves, inside, device = {}, maskable(model), torch.device(args.device)
    for prefix, module in model.named_modules() if args.compact else ():
        name = f"{prefix}.weight"
        if not isinstance(module, nn.Linear) or name not in inside or masks[name].all():
            continue
        weight, columns, kept = module.weight.requires_grad_(False), masks[name][0].nonzero()[:, 0], None
        if args.precision == "bf16" and args.master == "fp32":
            kept = take(weight.detach(), columns)
            weight.data = weight.data.bfloat16()
        weight.data, columns = weight.data.to(device), columns.to(device)
        if len(columns):
            updated = weight.new_zeros(1).expand(len(weight), len(columns)).requires_grad_()
            leaves[name] = make_leaf(weight, columns, updated, torch.ones(1, 1, dtype=torch.uint8), kept)
            module.updated, module.columns = updated, columns
            module.forward = types.MethodType(compact_linear, module)
    model.to(device)
    for name, p in model.named_parameters() if args.master != "fp32" else ():
        if p.requires_grad:
            leaves[name] = make_leaf(p, None, p, masks.get(name, torch.ones((1,) * p.dim(), dtype=torch.uint8)))
    return leaves


def clip_gradients(model, leaves, limit):
    """clip_grad_norm_ where there are leaves: (global norm, factor for the gradients of leaves, which are low in
    precision and still to be multiplied); the others' are."""
    apart = {id(leaf.updated) for leaf in leaves.values()}
    others = [p.grad for p in model.parameters() if p.grad is not None and id(p) not in apart]
    grads = others + [leaf.updated.grad for leaf in leaves.values() if leaf.updated.grad is not None]
    norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
                        for g in grads]).norm()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for grad in others:
        grad.mul_(scale)
    return norm, scale


@torch.no_grad()
def step_leaves(leaves, lr, weight_decay, scale, stochastic):
    """One step of AdamW (Table 8) on each leaf, its gradient times `scale`: the arithmetic of the reference loop."""
    for name, (weight, columns, updated, mask, master, adam, keeps_master) in leaves.items():
        if updated.grad is None:
            if columns is not None:
                fail(f"--compact: {name} got no gradient: the model does not use it, or not by calling its layer; "
                     "train without --compact")
            continue
        if not keeps_master:
            part = weight.detach() if columns is None else take(weight.detach(), columns)
            master.data = part.to(master.dtype, copy=columns is None)
        if weight.dim() > 1 and weight_decay:
            master.mul_(1 - lr * weight_decay * mask)
        master.grad = updated.grad.to(master.dtype).mul_(scale)
        updated.grad = None
        adam.param_groups[0]["lr"] = lr
        adam.step()
        master.grad = None
        if stochastic and weight.dtype != master.dtype:  # bf16 is the upper half of fp32: carry into it at random
            bits = master.view(torch.int32)
            bits.add_(torch.randint_like(bits, 0, 2**16)).bitwise_and_(-(2**16))
        rounded = master.to(weight.dtype)
        weight.copy_(rounded) if columns is None else weight.scatter_(1, columns.expand(len(weight), -1), rounded)
        if not keeps_master:
            master.data = master.new_empty(0)


@torch.no_grad()
def restore(model, leaves, source):
    """Makes bf16 parameters fp32 again: what is still the source's value rounded to bf16 becomes that value, all else
    is as trained; kept masters replace their columns. A frozen weight that had moved would stay different."""
    for leaf in leaves.values():
        leaf.adam.state.clear()  # makes room for fp32 weights
    for name, p in model.named_parameters():
        if p.dtype == torch.bfloat16:
            before = source.get_parameter(name).detach().to(p.device)
            p.data = torch.where(p == before.bfloat16(), before, p.float())
        if name in leaves and leaves[name].keeps_master:
            p.data[:, leaves[name].columns] = leaves[name].master.data


def make_optimizer(model, masks, leaves, lr, weight_decay):
    """AdamW of Table 8, for all but the leaves. It decays the unmasked matrices; masked ones get the same decay,
    masked, in train()."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name not in leaves]
    decayed = [p for name, p in trained if p.dim() > 1 and name not in masks]
    others = [p for name, p in trained if p.dim() < 2 or name in masks]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=fused)


@torch.no_grad()
def heldout_loss(model, tokens, facts, args, autocast, in_parts):
    """(bits per byte, nats per token) on up to --eval-tokens tokens in blocks spread evenly over a token file."""
    num_blocks = len(tokens) // args.seq_len
    chosen = np.linspace(0, num_blocks - 1, min(num_blocks, max(1, args.eval_tokens // args.seq_len))).astype(int)
    total = 0.0
    model.eval()
    for batch in blocks(tokens, chosen, args.seq_len).to(args.device).split(args.micro_batch_size):
        with autocast():
            total += next_token_loss(model, batch, in_parts).item()
    model.train()
    nats = total / (len(chosen) * (args.seq_len - 1))
    return nats / math.log(2) * facts["tokens"] / facts["bytes"], nats


def state_bytes(model, masks, args):
    """Bytes of "weights", "masters", "gradients", "moments" and "masks", by counting, and of the fp32 "copies" that a
    step makes of one leaf at a time."""
    found, inside = Counter(masks=sum(mask.numel() for mask in masks.values())), maskable(model)
    leaves = [p.numel() for name, p in model.named_parameters()
              if args.master != "fp32" or (args.compact and name in inside)]
    found["copies"] = (10 if args.master == "stochastic" else 8) * max(leaves, default=0)
    for name, p in source_parameters(model):
        compact = args.compact and p.dim() == 2 and name in inside and not masks[name].all()
        low = args.precision == "bf16" and (compact or args.master != "fp32")
        size = p.numel() if name not in masks else p.numel() * masks[name].float().mean().item() if compact else \
            p.numel() * bool(masks[name].any())
        found += Counter(weights=p.numel() * (2 if low else 4), gradients=int(size) * (2 if low else 4),
                         masters=int(size) * 4 * (compact and low and args.master == "fp32"), moments=int(size) * 8)
    return found


def decoder_layers(model):
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        fail(f"--gradient-checkpointing, --compile and --plan need layers that transformers can checkpoint; "
             f"{type(model).__name__} has none")
    return layers


def layer_bytes(model, args):
    """(a, b, c): the backward pass of a decoder layer needs a + b * blocks bytes of activations, what autograd saves
    between its input and its output, parameters apart, in the layer that saves most; checkpointing keeps c * blocks
    bytes, the input, instead. Measured in forward passes that keep nothing."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def most(blocks_at_once):
        saved, sizes, inside = {}, [], []

        def pack(tensor):
            if inside and tensor.untyped_storage().data_ptr() not in parameters:
                saved[tensor.untyped_storage().data_ptr()] = tensor

        def end(*_):
            sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in saved.values()))
            saved.clear()
            inside.clear()
        hooks = [hook for layer in decoder_layers(model) for hook in (
            layer.register_forward_pre_hook(lambda *_: inside.append(True)), layer.register_forward_hook(end))]
        ids = torch.zeros(blocks_at_once, args.seq_len, dtype=torch.long, device=next(model.parameters()).device)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None), autocast_of(args)():
            model.get_decoder()(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return max(sizes)

    one, two = most(1), most(2)
    size = model.config.get_text_config().hidden_size * (2 if args.precision == "bf16" and args.master != "fp32" else 4)
    return 2 * one - two, two - one, args.seq_len * size


def head_bytes(config, tokens, in_parts):
    """Bytes at most for the logits of so many tokens, and for a copy and gradients of the head."""
    text, parts = config.get_text_config(), loss_parts(config, tokens) if in_parts else 1
    # of the head a bf16 copy, its gradient in bf16 and fp32, and the sum of the parts' gradients
    return 12 * tokens / parts * text.vocab_size + (8 if parts == 1 else 12) * text.vocab_size * text.hidden_size


def checkpointed_layers(layers, free, sizes, head, blocks_at_once):
    """(how many of the layers, from the first, must be computed again in the backward pass to fit into `free` bytes,
    bytes of activations then); more than there are if nothing fits. The others are gone when the first is computed."""
    constant, each, kept = sizes
    layer = constant + blocks_at_once * each
    for n in range(layers + 1):
        needed = n * blocks_at_once * kept + max((layers - n) * layer + head, layer * bool(n))
        if needed <= free:
            return n, needed
    return layers + 1, needed


def checkpoint_layers(model, masks, args):
    """--gradient-checkpointing: all layers, or as few as the memory demands that is free now, before gradients and
    moments; from what one layer saves in a first forward pass."""
    if args.gradient_checkpointing == "none":
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = decoder_layers(model)
    if args.gradient_checkpointing == "all":
        return
    for layer in layers:
        layer.gradient_checkpointing = False
    sizes, state = layer_bytes(model, args), state_bytes(model, masks, args)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading and measuring left is free, too
        free, total = torch.cuda.mem_get_info(device)
    else:
        free, total = (1024 * int(re.search(rf"{key}: +(\d+)", Path("/proc/meminfo").read_text())[1])
                       for key in ("MemAvailable", "MemTotal"))
    free -= 0.05 * total + state["gradients"] + state["moments"] + state["copies"]  # a twentieth for fragmentation
    head = head_bytes(model.config, args.micro_batch_size * args.seq_len, logits_are_the_heads(model, args))
    n, needed = checkpointed_layers(len(layers), free, sizes, head, args.micro_batch_size)
    print(f"gradient checkpointing: {min(n, len(layers))} of {len(layers)} layers; one saves {sizes[0] / 1e9:.3f} GB, "
          f"and {sizes[1] / 1e9:.3f} for each block; {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} needed")
    if n > len(layers):
        fail(f"activations need {needed / 1e9:.1f} GB, {max(0, free) / 1e9:.1f} are free: lower --micro-batch-size")
    for layer in layers[:n]:
        layer.gradient_checkpointing = True


def autocast_of(args):
    """The context manager of the forward pass; a model in bf16 (--master none) needs none. Its cache would keep a copy
    of all weights, and add up the gradients of the loss's parts in low precision."""
    return functools.partial(torch.autocast, torch.device(args.device).type, cache_enabled=False,
                             enabled=args.precision != "fp32" and args.master == "fp32",
                             dtype=torch.float16 if args.precision == "fp16" else torch.bfloat16)


def write_atomically(path, text):
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, step, model, leaves, optimizer, scaler, settings):
    """Writes all that --resume needs: weights, masters, Adam's moments and steps, the loss scale; all or nothing."""
    tensors = {f"weight/{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {f"master/{name}": leaf.master.detach() for name, leaf in leaves.items() if leaf.keeps_master}
    if not all(torch.isfinite(weight).all() for weight in tensors.values()):
        fail(f"step {step}: weights are not finite; what was saved before is intact. Lower --lr, or check the data")
    for name, p in model.named_parameters():
        state = leaves[name].adam.state[leaves[name].master] if name in leaves else optimizer.state.get(p, {})
        tensors |= {f"{key}/{name}": value for key, value in state.items()}
    metadata = {"format": "ssu-checkpoint", "version": "1", "step": str(step), "settings": json.dumps(settings),
                "scaler": json.dumps(scaler.state_dict())}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint_step(path, settings):
    """Step of a checkpoint. Raises SystemExit(2) when it is damaged, or of a run with other settings, naming them."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        fail(f"--resume: {path} is damaged ({error}); delete it to start anew")
    if (metadata.get("format"), metadata.get("version")) != ("ssu-checkpoint", "1"):
        fail(f"--resume: {path} is not a checkpoint of train.py; delete it and start anew")
    saved = json.loads(metadata["settings"])
    differing = [f"{key} was {saved.get(key)}, is {settings.get(key)}" for key in saved | settings
                 if saved.get(key) != settings.get(key)]
    if differing:
        fail(f"--resume: {path} belongs to a run with other settings: {'; '.join(differing)}. Run as before, or "
             "delete it to start anew")
    return int(metadata["step"])


@torch.no_grad()
def load_checkpoint(path, model, leaves, optimizer, scaler):
    with safe_open(path, "pt") as file:
        scaler.load_state_dict(json.loads(file.metadata()["scaler"]))
        names = set(file.keys())
        for name, p in model.named_parameters():
            p.copy_(file.get_tensor(f"weight/{name}"))
            state = {key: file.get_tensor(f"{key}/{name}").to(p.device)
                     for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in names}
            if name in leaves:
                leaves[name].adam.state[leaves[name].master] = state
                if leaves[name].keeps_master:
                    leaves[name].master.copy_(file.get_tensor(f"master/{name}"))
            else:
                optimizer.state[p] = state


def compare_with_source(model, masks, source):
    """(frozen weights, all bit-identical to the source; updatable weights; those of them that moved).

    Raises SystemExit(2) if any frozen weight differs in any bit from what Section 3.3 promises."""
    frozen = updatable = moved = 0
    for name, p in source_parameters(model):
        before = source.get_parameter(name)
        differs = p.detach().cpu().view(torch.int32) != before.detach().view(torch.int32)
        update = masks[name].bool().expand(p.shape) if name in masks else torch.ones_like(differs)
        if (differs & ~update).any():
            fail(f"{int((differs & ~update).sum())} frozen weights of {name} differ from the source model, so nothing "
                 "is saved. This is a defect of the loop: please report it")
        frozen += int((~update).sum())
        updatable += int(update.sum())
        moved += int((differs & update).sum())
    return frozen, updatable, moved


def save_model(model, source_folder, out, dtype):
    """Saves an ordinary Hugging Face folder: weights in the source model's dtype; tokenizer, chat template, config and
    generation files byte for byte those of the source. Then loads it again and returns its answer to one chat."""
    shutil.rmtree(out, ignore_errors=True)
    model.to(dtype).save_pretrained(out)
    for file in source_folder.iterdir():
        if file.is_file() and file.suffix not in WEIGHT_FILES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    for file in out.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    saved, tokenizer = AutoModelForCausalLM.from_pretrained(out, dtype=dtype), AutoTokenizer.from_pretrained(out)
    prompt = QUESTION
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": QUESTION}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(model.device)
    answer = saved.to(model.device).generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=24, do_sample=False,
        pad_token_id=tokenizer.eos_token_id)[0, inputs["input_ids"].shape[1]:]
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


def peak_memory(device):
    """Peak bytes: of torch's allocator on a GPU, of the process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def git_commit():
    """The commit of this script, with -dirty where files were changed since; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git on this machine
        return None


def train(args, model, masks, leaves, tokens, heldout, settings, start):
    """The loop of Section 3.3, from step `start`; --resume relies on its order of events. tokens: memmap [tokens];
    heldout: {"source" or "target": (tokens, facts)}. Trains `model` in place. Raises SystemExit(2) if not finite."""
    checkpoint, log = args.out / "checkpoint/state.safetensors", args.out / "train.jsonl"
    device = torch.device(args.device)
    optimizer = make_optimizer(model, masks, leaves, args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    autocast, in_parts = autocast_of(args), logits_are_the_heads(model, args)
    if not in_parts:
        print("the model scales or caps what its head gives, so all logits of a micro-batch are computed at once")
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # HFT's layers differ in what is frozen
        for layer in decoder_layers(model):
            layer.compile(dynamic=False)  # one graph for all alike, and no wrapper that would change names
    masked = [(p, masks[name].to(device)) for name, p in model.named_parameters() if name in masks and p.requires_grad]
    if args.gmt_ratio is not None:  # in hooks, so that each micro-batch is cut before it is added to .grad
        for p in map(model.get_parameter, maskable(model)):
            if p.dim() > 1:
                p.register_hook(functools.partial(drop_smallest, ratio=args.gmt_ratio))
    lines = [json.dumps({"settings": settings, "arguments": vars(args)}, default=str)]
    if start:
        load_checkpoint(checkpoint, model, leaves, optimizer, scaler)
        written = [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        lines = [json.dumps(line) for line in written if "summary" not in line and line.get("step", 0) <= start]
        print(f"resumed after step {start} of {args.steps}")
    write_atomically(log, "\n".join(lines) + "\n")

    num_blocks, tokens_per_step, seconds = len(tokens) // args.seq_len, args.batch_size * args.seq_len, 0.0

    def record(step, **values):
        for side, (side_tokens, facts) in heldout.items():
            if step in (0, args.steps) or (args.eval_every and step % args.eval_every == 0):
                bits, nats = heldout_loss(model, side_tokens, facts, args, autocast, in_parts)
                values |= {f"{side}_bpb": round(bits, 6), f"{side}_loss": round(nats, 6)}
                tqdm.write(f"step {step}: held-out {side} {bits:.4f} bits a byte, {nats:.4f} nats a token")
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    if not start:
        record(0)
    for step in (bar := tqdm(range(start, args.steps), initial=start, total=args.steps, unit="step", desc="train")):
        began = time.perf_counter()
        lr = lr_at(step, args.steps, args.warmup_ratio, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(args.seed * 1_000_003 + step)  # dropout, if the model has any, resumes alike
        batch = blocks(tokens, batch_indices(step, args.batch_size, num_blocks, args.seed), args.seq_len).to(device)
        loss = torch.zeros((), device=device)
        for micro_batch in batch.split(args.micro_batch_size):
            with autocast():
                part = next_token_loss(model, micro_batch, in_parts)
            part = part / (args.batch_size * (args.seq_len - 1))  # of the batch's mean
            loss += part.detach()
            if args.adalora:
                part = part + 0.5 * orthogonality(model) * len(micro_batch) / args.batch_size  # Table 8: 0.5
            scaler.scale(part).backward()
        scaler.unscale_(optimizer)

        for param, mask in masked:
            if param.grad is not None:
                param.grad.mul_(mask)  # the method: b_ij of Section 3.3
        # inf * 0 is NaN, so a non-finite gradient shows in the norm even where it is masked
        if leaves:
            norm, scale = clip_gradients(model, leaves, args.max_grad_norm or math.inf)
        else:
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
        if not torch.isfinite(loss) or not (torch.isfinite(norm) or scaler.get_scale() > 1):
            fail(f"step {step + 1}: loss {loss.item()}, gradient norm {norm.item()}; what was saved before is intact. "
                 "Lower --lr, or check the data")
        if torch.isfinite(norm) and args.weight_decay and args.master == "fp32":
            with torch.no_grad():
                for param, mask in masked:
                    if param.dim() > 1 and param.grad is not None:  # AdamW leaves those alone, too
                        param.mul_(1 - lr * args.weight_decay * mask)  # decoupled decay, of updatable weights alone
        scaler.step(optimizer)  # under fp16, leaves out a step whose gradients overflowed
        scaler.update()
        if leaves:
            step_leaves(leaves, lr, args.weight_decay, scale, args.master == "stochastic")
        if args.adalora and torch.isfinite(norm):
            model.base_model.update_and_allocate(step)  # reads the gradients, prunes singular values
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        logged = done % args.log_every == 0 or done == args.steps or (args.eval_every and done % args.eval_every == 0)
        value = loss.item() if logged else None  # waits for the GPU, so that the clock below is right
        seconds += time.perf_counter() - began
        if logged:
            bar.set_postfix(loss=f"{value:.4f}", refresh=False)
            record(done, loss=round(value, 6), grad_norm=round(norm.item(), 6) if torch.isfinite(norm) else None, lr=lr,
                   tokens=done * tokens_per_step, ms_per_step=round(1000 * seconds / (done - start)),
                   peak_memory=peak_memory(device), tokens_per_second=round((done - start) * tokens_per_step / seconds))
        if args.save_every and done % args.save_every == 0 and done < args.steps:
            save_checkpoint(checkpoint, done, model, leaves, optimizer, scaler, settings)


def made_up_masks(model):
    """For --plan without --mask: half of the columns of every matrix, of every norm and bias."""
    inside = maskable(model)
    return {name: torch.arange(p.shape[-1]).remainder(2).to(torch.uint8).view((1,) * (p.dim() - 1) + (-1,))
            for name, p in model.named_parameters() if name in inside}


def plan(args):
    """Prints what fits where: by counting, and by measuring what one random layer of this shape saves, on the CPU."""
    config, skeleton = load_skeleton(args.model)
    masks = load_masks(args.mask, skeleton) if args.mask else made_up_masks(skeleton)
    layers, small = config.get_text_config().num_hidden_layers, copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 1, 256, None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    print(f"{args.model}: {sum(p.numel() for p in skeleton.parameters()):,} parameters; micro-batches of up to "
          f"{args.micro_batch_size} x {args.seq_len} tokens, {args.precision}\n"
          "a cell: blocks in a micro-batch, layers computed again in the backward pass; - : does not fit\n\n"
          "| | state, GB | " + " | ".join(f"{size} GB" for size in GPUS) + " |\n|---|---|" + "---|" * len(GPUS))
    rows = [("masked", False, "fp32")]
    if has_columns(masks, skeleton):
        rows += [("compact", True, "fp32"), ("compact, no master", True, "none")][:2 if args.precision == "bf16" else 1]
    for label, compact, master in rows:
        args.compact, args.master, args.device, cells = compact, master, "cpu", []
        state = state_bytes(skeleton, masks, args)
        layer = AutoModelForCausalLM.from_config(small, dtype=torch.float32 if master == "fp32" else torch.bfloat16)
        names = {name: p.shape for name, p in layer.named_parameters()}
        make_leaves(layer, {name: masks[name] for name in masks if name in names}, args)
        sizes, in_parts = layer_bytes(layer, args), logits_are_the_heads(layer, args)
        for size in GPUS.values():
            free, blocks_at_once = 0.95 * 2**30 * size - state.total(), args.micro_batch_size
            while True:
                head = head_bytes(config, blocks_at_once * args.seq_len, in_parts)
                n, _ = checkpointed_layers(layers, free, sizes, head, blocks_at_once)
                if n <= layers or blocks_at_once == 1:
                    break
                blocks_at_once //= 2
            cells.append("-" if n > layers else f"{blocks_at_once}, {n} of {layers}")
        print(f"| {label} | {state.total() / 1e9:.1f} | " + " | ".join(cells) + " |")


def run(args):
    if args.plan:
        return plan(args)
    checkpoint, final = args.out / "checkpoint/state.safetensors", args.out / "model"
    if args.resume and not (checkpoint.is_file() and (args.out / "train.jsonl").is_file()):
        fail(f"--resume: no checkpoint at {checkpoint}, or no train.jsonl; leave --resume out to start")
    config, skeleton = load_skeleton(args.model)
    tokenizer, folder = load_tokenizer(args.model)
    masks = load_masks(args.mask, skeleton) if args.mask else {}
    if args.compact and not has_columns(masks, skeleton):
        fail(f"--compact: {args.mask} is no column mask. The gradient of a column needs its input feature alone; rows "
             "and elements are not supported. Train without --compact")
    if args.compile or args.gradient_checkpointing != "none":
        decoder_layers(skeleton)
    if args.adalora:  # all that carries adapters is frozen
        masks = {name: torch.zeros((1,) * skeleton.get_parameter(name).dim(), dtype=torch.uint8)
                 for name in maskable(skeleton)}
    vocabulary, embeddings = tokenizer.get_vocab(), skeleton.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        fail(f"--model {args.model}: its tokenizer has {len(tokenizer):,} tokens, its embeddings {embeddings:,} rows")
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or args.seq_len
    if args.seq_len > context:
        fail(f"--seq-len {args.seq_len}: {args.model} was made for {context} tokens at most")
    if final.exists():
        fail(f"--out {args.out}: holds a finished model; choose another folder or delete it")
    if checkpoint.exists() and not args.resume:
        fail(f"--out {args.out}: holds a checkpoint; add --resume to go on, or delete it to start anew")

    # Text is tokenised once, beside the run's other artifacts, for all methods.
    end_of_text = next((token for token in END_OF_TEXT if token in vocabulary), tokenizer.eos_token)
    tokenizer_files = [f for f in folder.iterdir()
                       if f.is_file() and f.name.startswith(("tokenizer", "chat_template", "vocab", "merges"))]
    read = functools.partial(token_file, tokenizer=tokenizer, tokenizer_sha256=sha256_of(tokenizer_files),
                             end_of_text=vocabulary[end_of_text], cache=args.out.parent / "tokens",
                             at_least=args.seq_len)
    tokens, facts = read("--data", args.data)
    heldout = {side: read(f"--{side}-eval", path, templated=side == "source")
               for side, path in (("source", args.source_eval), ("target", args.target_eval)) if path}
    num_blocks = len(tokens) // args.seq_len

    # What a resumed run must have in common with the interrupted one to reach the same bits.
    device, digest = torch.device(args.device), hashlib.sha256()
    for name in sorted(masks):
        digest.update(name.encode() + masks[name].numpy().tobytes())
    settings = {key: getattr(args, key) for key in (
        "steps", "batch_size", "micro_batch_size", "seq_len", "lr", "warmup_ratio", "weight_decay", "max_grad_norm",
        "precision", "master", "compact", "compile", "seed", "gradient_checkpointing", "gmt_ratio", "adalora")}
    settings |= {
        "model": getattr(config, "_commit_hash", None) or sha256_of(
            f for f in folder.iterdir() if f.suffix in (".safetensors", ".json", ".jinja", ".model")),
        "data": facts["key"], "mask": digest.hexdigest() if masks else None,
        "device": device.type, "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__, "transformers": transformers.__version__}
    start = read_checkpoint_step(checkpoint, settings) if args.resume else 0

    count = sum(p.numel() for p in skeleton.parameters())
    flash = device.type == "cuda" and args.precision != "fp32" and is_flash_attn_2_available()
    method = "AdaLoRA" if args.adalora else "static mask" if masks else "full fine-tuning"
    if args.gmt_ratio is not None:
        method = f"GMT, {args.gmt_ratio:.1%} of each matrix's gradient dropped"
    print(f"{method}: {args.model}, {count:,} parameters, {args.precision} on {device},"
          f" {'flash-attn' if flash else 'SDPA'}")
    print("\n".join(parameter_table(skeleton, masks)))
    for label, (_, f) in {"training": (None, facts), **heldout}.items():
        print(f"{label} text: {f['documents']:,} documents, {f['bytes']:,} bytes, {f['tokens']:,} tokens: "
              f"{f['tokens'] / f['bytes']:.3f} tokens a byte, {f['tokens'] / max(1, f['words']):.2f} a word")
    print(f"each document ends with {end_of_text!r} (id {vocabulary[end_of_text]}); the vocabulary is not extended")
    first = blocks(tokens, batch_indices(0, 1, num_blocks, args.seed), args.seq_len)[0]
    print(f"first block: {tokenizer.decode(first)!r}")
    drawn = args.steps * args.batch_size
    print(f"{args.steps:,} steps x {args.batch_size} blocks x {args.seq_len} = {drawn * args.seq_len:,} tokens, "
          f"{drawn / num_blocks:.2f} epochs of {num_blocks:,} blocks; "
          f"{math.ceil(args.batch_size / args.micro_batch_size)} micro-batches a step")
    state = state_bytes(skeleton, masks, args)
    print(f"bytes: weights {state['weights']:,}, masters beside them {state['masters']:,}, gradients "
          f"{state['gradients']:,}, Adam's moments {state['moments']:,}, masks {state['masks']:,}; "
          "activations come on top" + " and the adapters" * args.adalora)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    if (needed := state.total()) > memory:
        fail(f"these need {needed / 1e9:.1f} GB, and {device} has {memory / 1e9:.1f}: choose a smaller model"
             + ", or --compact for a column mask" * (not args.compact))

    args.out.mkdir(parents=True, exist_ok=True)
    model = load_model(args.model, torch.float32 if args.master == "fp32" else torch.bfloat16,
                       attn_implementation="flash_attention_2" if flash else "sdpa").train()
    if not args.compact:
        model.to(device)
    if args.adalora:
        torch.manual_seed(args.seed)
        model = add_adalora(model, args.steps)
    for name, p in source_parameters(model):
        p.requires_grad_(name not in masks or bool(masks[name].any()))  # wholly frozen: no gradient, no moments
    leaves = make_leaves(model, masks, args)  # in compact mode the whole fp32 model never meets the device
    checkpoint_layers(model, masks, args)
    train(args, model, masks, leaves, tokens, heldout, settings, start)

    # Proof before the save: what was frozen is what it was.
    model.zero_grad(set_to_none=True)
    source = load_model(args.model)
    restore(model, leaves, source)
    frozen, updatable, moved = compare_with_source(model, masks, source)
    dtype = config.dtype or torch.float32
    if any(not torch.equal(p.to(dtype).float(), p) for p in source.parameters()):
        dtype = torch.float32  # the files are finer than config.json says: rounding would move frozen weights
    del source
    if args.adalora:
        model = model.merge_and_unload()
    print(f"verified: {frozen:,} frozen weights are bit-identical to the source; "
          f"{moved / updatable:.2%} of {updatable:,} updatable ones moved")
    if moved / updatable < 0.5:
        print("warning: most updatable weights never moved; is the learning rate too small?")
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        fail("the trained weights are not finite; nothing is saved. Lower --lr, or check the data")
    temporary = final.with_name("model.tmp")  # gets its name when all else is done, so that a kill leaves no doubt
    answer = save_model(model, folder, temporary, dtype)
    with open(args.out / "train.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"summary": {
            "frozen_verified": frozen, "updatable": updatable, "moved": moved, "answer": answer,
            "peak_memory": peak_memory(device), "commit": git_commit()}}) + "\n")
    os.replace(temporary, final)
    shutil.rmtree(checkpoint.parent, ignore_errors=True)
    print(f"the saved model, asked {QUESTION!r}, says: {answer!r}")
    print(f"model: {final}; log: {args.out}/train.jsonl")
    print(f"next: python evaluate.py --model {final} --out {args.out}/eval.json --lang LANG --data-dir DIR")


def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
    except (OSError, SafetensorError) as error:  # a full disk, a folder that cannot be written, a damaged file
        fail(f"{error} (what was written before is intact)")
    except torch.OutOfMemoryError as error:
        fail(f"{error} (what was written before is intact). Lower --micro-batch-size, or add --gradient-checkpointing "
             "auto, or --compact for a column mask")


if __name__ == "__main__":
    main()
