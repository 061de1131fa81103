"""From raw text to sequences of token ids, for train.py.

    sequences, counts = load_sequences(tokenizer, model_key, 512, "--data", "ne/train.jsonl")

Documents are concatenated, each ended by the end-of-text token (ours), and cut into sequences of
equal length (Table 8).
`datasets` caches each step under a key of text, tokenizer and this file, and memory-maps it.
"""

import hashlib
import os
import zlib
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import multiprocess  # of datasets
import numpy as np
import transformers
from datasets import Dataset, Features, List, Value, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from jinja2 import TemplateError
from pyarrow import ArrowException

from data.identity import sha256_of
from data.models import check_unknown, end_of_text, stop_clock
from data.rows import read_rows
from variants.files import fail

MADLAD = "allenai/MADLAD-400"  # Section 4.3
MADLAD_REVISION = "ecd71297d60c1eb996cd3d7c44c60ad5b55adfc6"
BAD_ROW = (
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    UnicodeEncodeError,
    TemplateError,
)


def read_documents(flag, path, tokenizer):
    """Yield {"text", "templated"}: raw text as it is, chats of --source-eval in their template."""
    number = 1
    try:
        for row in read_rows(path):
            chat = row.get("messages") if flag == "--source-eval" else None
            text = render(chat, tokenizer) if chat else row["text"].removeprefix("\ufeff")
            if text.encode():  # a lone surrogate raises UnicodeEncodeError
                yield {"text": text, "templated": bool(chat)}
            number += 1
    except BAD_ROW as error:
        needed = "no usable `text`"
        if flag == "--source-eval":
            needed += ", nor `messages` that the chat template accepts"
        fail(f"{flag} {path}: row {number} has {needed} ({error!r}). Correct it or leave it out")
    except (OSError, EOFError, zlib.error, ArrowException) as error:
        fail(f"{flag} {path}: row {number} is damaged ({error}). Copy the file again")
    except ValueError as error:
        fail(f"{flag} {path}: row {number} is not JSON, or not UTF-8 ({error}). Correct it")


def render(chat, tokenizer):
    """Return a chat in the model's chat template, whose clock stands still."""
    if tokenizer.chat_template is None:
        fail("--source-eval: the model has no chat template for `messages`. Give rows with `text`")
    for turn in chat:
        turn["content"].encode()  # a template may write a list of parts as Python does
    stop_clock()
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False)
    except ValueError as error:
        raise TemplateError(str(error)) from None


def load_documents(flag, data, tokenizer, key):
    """Return the documents of a local file, or of MADLAD-400 (Section 4.3), as a Dataset."""
    if not data.startswith("madlad:"):
        source = {"flag": flag, "path": data, "tokenizer": tokenizer}
        if next(read_documents(**source), None) is None:
            fail(f"{flag} {data}: no text in it. Give a file with `text`")
        features = Features({"text": Value("string"), "templated": Value("bool")})
        options = {"gen_kwargs": source, "features": features, "fingerprint": key}
        try:
            return Dataset.from_generator(read_documents, **options)
        except DatasetsError as error:  # a full disk, for instance
            fail(f"{flag} {data}: its cache cannot be written ({error.__cause__}). Free space")
    lang = data.removeprefix("madlad:")
    files = f"data/{lang}/{lang}_clean_*.jsonl.gz"
    options = {"repo_type": "dataset", "revision": MADLAD_REVISION, "allow_patterns": files}
    try:
        folder = Path(snapshot_download(MADLAD, **options))
        paths = sorted(str(path) for path in folder.glob(files))
        documents = load_dataset("json", data_files=paths, split="train").select_columns("text")
    except (OSError, ValueError, DatasetsError, HTTPError) as error:
        fail(f"{flag} {data}: {MADLAD} did not give it ({error}). Check the code and the network")
    if lang == "ne":  # as the authors do
        documents = documents.shuffle(seed=42).select(range(min(len(documents), 250_000)))
    # MADLAD-400 writes a line break as a backslash and an n.
    return documents.map(lambda row: {"text": row["text"].replace("\\n", "\n"), "templated": False})


def tokenize(batch, tokenizer, end_id):
    """Tokenize documents, each ended by the end-of-text token. Count tokens, words and bytes."""
    ids = []
    for text, templated in zip(batch["text"], batch["templated"], strict=True):
        # Raw text is data: a control token quoted in it is spelled out. A template adds its BOS.
        options = {"add_special_tokens": not templated, "split_special_tokens": not templated}
        document = tokenizer(text, **options)["input_ids"]
        ids.append(document if document[-1:] == [end_id] else document + [end_id])
    return {
        "input_ids": ids,
        "tokens": [len(document) for document in ids],
        "unknown": [document.count(tokenizer.unk_token_id) for document in ids],
        "bytes": [len(text.encode()) for text in batch["text"]],
        "words": [len(text.split()) for text in batch["text"]],
    }


@contextmanager
def ended_processes():
    """Let Ctrl-C, or the end of a process that tokenizes, be what it is: datasets waits for it."""
    try:
        yield
    except (RuntimeError, multiprocess.TimeoutError) as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        what = str(error) or "one of its processes was killed"
        fail(f"tokenizing failed: {what}. Check the memory, and start again")


def cut(batch, seq_len):
    """Concatenate a batch of documents and cut it into sequences. What is left over is dropped."""
    tokens = np.concatenate(batch["input_ids"])
    return {"input_ids": tokens[: len(tokens) // seq_len * seq_len].reshape(-1, seq_len)}


def load_sequences(tokenizer, model_key, seq_len, flag, data):
    """Return (Dataset of token ids [n, seq_len], counts of the text and its key)."""
    if data.startswith("madlad:"):
        source = f"{data}@{MADLAD_REVISION}"
    elif data.endswith((".jsonl", ".jsonl.gz", ".parquet", ".txt")) and Path(data).is_file():
        source = sha256_of([Path(data)])
    else:
        fail(f"{flag} {data}: no such file, or not .jsonl, .jsonl.gz, .parquet or .txt. Make one")
    end, end_id = end_of_text(tokenizer, fail)
    key = hashlib.sha256(f"{source} {model_key} {flag}".encode()).hexdigest()[:32]
    files = [Path(__file__).with_name(name) for name in ("blocks.py", "models.py", "rows.py")]
    code = f"{sha256_of(files)} {transformers.__version__} {end_id}"
    cache = hashlib.sha256(f"{key} {code}".encode()).hexdigest()[:32]

    documents = load_documents(flag, data, tokenizer, cache)
    ids = {"input_ids": List(Value("int32"))}
    numbers = dict.fromkeys(("tokens", "unknown", "bytes", "words"), Value("int64"))
    with ended_processes():
        tokens = documents.map(
            tokenize,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer, "end_id": end_id},
            remove_columns=documents.column_names,
            num_proc=min(len(os.sched_getaffinity(0)), 1 + len(documents) // 10_000),
            features=Features(ids | numbers),
            new_fingerprint=f"{cache}-counted",
            desc=f"tokenize {flag}",
        ).with_format("numpy")
    counts = {name: int(tokens[name][:].sum()) for name in numbers}
    if counts["tokens"] < seq_len:
        what = f"{flag} {data}: {counts['tokens']} tokens do not fill one sequence of {seq_len}"
        fail(f"{what}. Give more text, or lower --seq-len")
    print(
        f"{flag} {data}: {len(tokens):,} documents, {counts['bytes']:,} bytes, "
        f"{counts['tokens']:,} tokens: {counts['tokens'] / counts['bytes']:.3f} per byte, "
        f"{counts['tokens'] / max(1, counts['words']):.2f} per word; {end!r} ends each"
    )
    check_unknown(tokenizer, counts["unknown"], counts["tokens"], f"{flag} {data}", fail)
    sequences = tokens.map(
        cut,
        batched=True,
        batch_size=10_000,
        fn_kwargs={"seq_len": seq_len},
        remove_columns=tokens.column_names,
        features=Features(ids),
        new_fingerprint=f"{cache}-{seq_len}",
        desc=f"cut {flag}",
    )
    return sequences.with_format("torch"), counts | {"documents": len(tokens), "key": key}


def batch_indices(step, batch_size, num_sequences, seed):
    """Return the sequences of step `step` (from 0): a shuffle per epoch, by seed and step alone."""
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, num_sequences)
        indices.append(int(epoch_order(num_sequences, seed, epoch)[offset]))
    return indices


@lru_cache(maxsize=2)
def epoch_order(num_sequences, seed, epoch):
    """Return the order of all sequences in an epoch (from 0)."""
    return np.random.default_rng([seed, epoch]).permutation(num_sequences)
