"""From source-language text to packed sequences of token ids, for score.py.

    tokens = calibration_tokens("tulu", tokenizer, 500, 2048, seed=42)

A document is a chat or raw text (sources and sizes: Section 4.3 and Table 5). Chats are written in
the model's chat template. Documents are shuffled, concatenated and cut without padding (ours).
"""

import random
import zlib

import torch
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError
from jinja2 import TemplateError
from pyarrow import ArrowException
from tqdm import tqdm

from data.models import check_unknown, end_of_text, stop_clock
from data.rows import read_rows
from variants import distributed

PRESETS = {  # --data: data set, revision, size of the download
    "tulu": ("allenai/tulu-3-sft-olmo-2-mixture", "main", "1.4 GB"),
    "alpaca": ("tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017", "24 MB"),
}
BAD_ROW = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
BAD_FILE = (*BAD_ROW, OSError, EOFError, ArrowException, zlib.error)
BAD_DOWNLOAD = (*BAD_ROW, OSError, DatasetsError, HTTPError)
BAD_TEMPLATE = (*BAD_ROW, ArithmeticError, TemplateError)


def fail(message):
    """Print an error that the user can fix, in one line, and exit with code 2."""
    distributed.fail(message, "score.py")


def to_document(row):
    """Return the chat of a row, a list of turns, or else its raw text. Raise if it has neither."""
    turns = row.get("messages")
    if not turns and row.get("instruction") and "output" in row:
        question, answer = row["instruction"], row["output"]
        if row.get("input"):
            question += f"\n\nInput: {row['input']}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    # encode() raises for what is not text, and for half of a surrogate pair.
    if not turns:
        row["text"].encode()
        return row["text"].removeprefix("\ufeff")
    for turn in turns:
        turn["role"].encode()
        turn["content"].encode()
    return turns


def read_documents(path):
    """Yield the documents of a local file. Fail at the first bad row."""
    number = 1
    try:
        for row in read_rows(path):
            document = to_document(row)
            if document:
                yield document
            number += 1
    except FileNotFoundError:
        fail(f"--data {path}: no such file. Give one, or {' or '.join(PRESETS)}")
    except BAD_FILE as error:
        fail(
            f"--data {path}: cannot read row {number} ({type(error).__name__}: {error}). Write one "
            "JSON object per line in UTF-8, with messages, instruction and output, or text"
        )


def load_preset(name, seed):
    """Yield the documents of a data set of the hub, in an order drawn by seed."""
    repo, revision, size = PRESETS[name]
    print(f"loading {repo}: a download of {size}, unless it is in the cache")
    try:
        rows = load_dataset(repo, revision=revision, split="train").shuffle(seed=seed)
        yield from map(to_document, rows)
    except BAD_DOWNLOAD as error:
        fail(f"--data {name}: cannot load {repo} ({error}). Check the network and HF_TOKEN")


def tokenize(document, tokenizer):
    """Return the token ids of a chat in the model's template, or of raw text and its end."""
    if isinstance(document, str):
        # Raw text is data: <|endoftext|> in it is a quotation, not a control token.
        ids = tokenizer(document, split_special_tokens=True)["input_ids"]
        end = [end_of_text(tokenizer, fail)[1]]
        return ids if ids[-1:] == end else ids + end

    if tokenizer.chat_template is None:
        fail("the model has no chat template for `messages`. Give rows with `text`")
    stop_clock()
    try:
        text = tokenizer.apply_chat_template(document, tokenize=False)
    except BAD_TEMPLATE as error:
        fail(f"the chat template refuses {str(document)[:200]} ({error}). Remove such chats")
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them


def calibration_tokens(data, tokenizer, num_samples, seq_len, seed):
    """Pack text, in an order drawn by seed, into int64 tokens [samples, seq_len].

    data is a preset or a file. There are fewer than num_samples if the text is too short.
    """
    if data in PRESETS:
        documents = load_preset(data, seed)
    else:
        documents = list(read_documents(str(data)))
        random.Random(seed).shuffle(documents)

    ids = []
    for document in tqdm(documents, desc="tokenize", unit="document"):
        ids += tokenize(document, tokenizer)
        if len(ids) >= num_samples * seq_len:
            break
    unknown = ids.count(tokenizer.unk_token_id)
    check_unknown(tokenizer, unknown, len(ids), f"--data {data}", fail)
    samples = min(num_samples, len(ids) // seq_len)
    if samples == 0:
        fail(f"--data {data}: {len(ids)} tokens do not fill one sequence. Give more text")
    return torch.tensor(ids[: samples * seq_len]).view(samples, seq_len)
