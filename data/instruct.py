"""An instruct model as evaluate.py and chat_eval.py use it: files, tokenizer, chats, weights."""

import json
import os
import random
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from jinja2 import TemplateError
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging

from data import models
from data.evaluation import fail
from data.identity import sha256_of


def find_model(name, out=None):
    """Return the local directory of a checkpoint, and sha256 of its files. Refuse `out` in it."""
    kinds = [".safetensors", ".json", ".jinja", ".model", ".txt"]
    folder = Path(name).expanduser()
    models.check_path(folder, fail)
    if not folder.is_dir():
        wanted = [f"*{kind}" for kind in kinds]
        try:
            folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns="*/*"))
        except models.BAD_MODEL as error:
            what = f"model {name} is no directory, and the hub does not give it"
            fail(f"{what}. Correct its name ({error})")
    check_outside(out, folder)
    files = [path for path in folder.iterdir() if path.suffix in kinds and path.is_file()]
    return folder, sha256_of(files)


def check_outside(out, folder):
    """Refuse a file `out` in the folder of a model, whose files say which model it is."""
    if out and out.parent.resolve() == Path(folder).expanduser().resolve():
        fail(f"--out {out}: lies among the files of the model. Choose another directory")


def load_tokenizer(folder):
    """Return config and tokenizer of an instruct model. Refuse what cannot be evaluated."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = models.load_skeleton(folder, fail)
    if tokenizer.chat_template is None:
        fail(f"model {folder} has no chat template. Give an instruct model")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        fail(f"model {folder}: its tokenizer has no BOS and no EOS token. Set one")
    return model.config, tokenizer


def load_model(folder, tokenizer, dtype, device):
    """Return the model, the ids that end a turn, and the ids with a newline in them."""
    model = models.load_weights(folder, fail, dtype=getattr(torch, dtype))
    ends = {tokenizer.eos_token_id, *end_tokens(folder)} - {None}
    # A turn also ends with what the template closes it with.
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    closing = encode(tokenizer, render(tokenizer, turns).rstrip())[-1]
    ends |= {closing} & set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    newlines = [i for i, text in enumerate(texts) if "\n" in text]
    return model.to(device).eval(), sorted(ends), newlines


def end_tokens(folder):
    """Return the end-of-text tokens that generation_config.json or config.json names."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_text())["eos_token_id"]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        found = found if isinstance(found, list) else [found]
        if all(isinstance(token, int) for token in found):
            return found
    return []


def encode(tokenizer, text, raw=False):
    """Return token ids. A chat template writes its own BOS; raw text has no control tokens."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=raw)["input_ids"]


def split(tokenizer, prompt, text, raw=False):
    """Return the ids of prompt and of text, tokenized as one. Raw text follows a BOS or EOS."""
    before, whole = encode(tokenizer, prompt, raw), encode(tokenizer, prompt + text, raw)
    n = len(os.path.commonprefix([before, whole]))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = [eos if bos is None else bos] if raw else []
    return start + whole[:n], whole[n:]


def split_all(tokenizer, prompt, texts, raw=False):
    """Return the ids that prompt + text begins with for all of the texts, and what follows in each.

    A text may join the end of the prompt in a token, and another not.
    """
    pairs = [split(tokenizer, prompt, text, raw) for text in texts]
    before = min((before for before, _ in pairs), key=len)
    return before, [(start + ids)[len(before) :] for start, ids in pairs]


def shorten(tokenizer, text, room):
    """Return the beginning of a text, of `room` tokens at most."""
    ids = encode(tokenizer, text, raw=True)
    if len(ids) <= room:
        return text
    return tokenizer.decode(ids[: max(0, room)]).rstrip("\ufffd")  # of half a character


def render(tokenizer, messages):
    """Return a chat as text, up to where an answer begins or to the end of the one given."""
    models.stop_clock()
    options = dict(tokenize=False, enable_thinking=False)
    options["add_generation_prompt"] = messages[-1]["role"] != "assistant"
    roles = [turn["role"] for turn in messages]
    try:
        text = tokenizer.apply_chat_template(messages, **options)
    except (TemplateError, *models.BAD_MODEL) as error:
        fail(f"the model's chat template refuses a chat of {roles} ({error}). Repair it")
    if not text.strip():
        fail(f"the model's chat template writes nothing for a chat of {roles}. Repair it")
    return text


def ask(tokenizer, text, shots=()):
    """Return the chat of few-shot examples, (question, answer) each, and a question, as text."""
    chat = []
    for question, answer in shots:
        chat.append({"role": "user", "content": question})
        chat.append({"role": "assistant", "content": answer})
    return render(tokenizer, [*chat, {"role": "user", "content": text}])


def ask_within(tokenizer, text, shots, room):
    """Return what `ask` does, its ids, and how many examples it has.

    The first examples are left out where all do not fit into `room` tokens.
    """
    while True:
        prompt = ask(tokenizer, text, shots)
        ids = encode(tokenizer, prompt)
        if len(ids) <= room or not shots:
            return prompt, ids, len(shots)
        shots = shots[1:]


def last_turn(tokenizer, messages):
    """Return a chat as (prompt, answer with its end of turn)."""
    prompt, whole = render(tokenizer, messages[:-1]), render(tokenizer, messages)
    if whole.startswith(prompt):
        return prompt, whole[len(prompt) :].rstrip()
    at = whole.rfind(messages[-1]["content"].strip())  # an empty think block is only in the prompt
    if at < 0 or "</think>" not in prompt:
        fail("bpb: the chat template rewrites earlier turns. Give texts and not chats")
    return prompt, whole[at:].rstrip()


def common_start(prompts):
    """Return how many ids all of several prompts begin with, at most all but one of each."""
    if len(prompts) == 1:
        return 0
    return min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)


def shared_start(model, prompts):
    """Return the common start, or 0 where padding after it would fill a sliding window."""
    if any(DynamicCache(config=model.config).is_sliding):
        return 0
    return common_start(prompts)


def cache_of(model, ids, rows):
    """Return the KV cache of ids, computed once, for a number of rows that begin with them."""
    cache = model(torch.tensor([ids], device=model.device), use_cache=True).past_key_values
    cache.batch_repeat_interleave(rows)
    return cache


def can_batch(model, config, context, loglik, generate):
    """Return whether batches give, for a few rows, the results of single rows. Say so if not.

    `loglik` and `generate` are those of evaluate.py. Tried are padding, a shared beginning and
    generation, with rows longer than a sliding window or chunk; one above 4,096 tokens is not
    tried. Refuse a model where the probability of a token depends on what follows.
    """
    text, draw = config.get_text_config(), random.Random(0)
    names = ("sliding_window", "window_size", "attention_chunk_size")
    sizes = [getattr(text, name, None) or 0 for name in names]
    window = max(size for size in [0, *sizes] if size < context)
    length = min(max(window + 12, 32), context - 4) if window <= 4096 else 32
    prompts = [draw.choices(range(text.vocab_size), k=n) for n in (length, length // 2, 9)]
    start = prompts[1]
    rows = [(ids[:-3], ids[-3:]) for ids in prompts]
    after = [(start + ids[: length // 2 - 3], ids[-2:]) for ids in prompts]
    begun = [before for before, _ in after]

    def first_logits(prompts):
        _, logits = generate(model, prompts, 2, None, dict(do_sample=False, output_logits=True))
        return torch.stack(logits, 1).float()  # [prompts, 2, vocabulary]

    def one_by_one(prompts):
        return torch.cat([first_logits([ids]) for ids in prompts])

    def same(found, wanted):
        found, wanted = torch.as_tensor(found), torch.as_tensor(wanted)
        tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2
        return bool((found - wanted).norm() <= tolerance * wanted.norm())

    def same_logits(prompts):  # of the second token if the first is the same: in bf16, many tie
        found, wanted = first_logits(prompts), one_by_one(prompts)
        agree = found[:, 0].argmax(-1) == wanted[:, 0].argmax(-1)
        return same(found[:, 0], wanted[:, 0]) and same(found[agree, 1], wanted[agree, 1])

    single = [loglik(model, [row])[0] for row in rows]
    single_after = [loglik(model, [row])[0] for row in after]
    ids = torch.tensor([start, start[:-1] + prompts[2][-1:]], device=model.device)
    with torch.inference_mode():
        one, other = (model(row[None], use_cache=True) for row in ids)
    if not same(one.logits[:, :-1], other.logits[:, :-1]):
        fail(f"{config.model_type} is not a causal language model. Give one")
    layers = getattr(one.get("past_key_values"), "layers", [None])
    if (
        window <= 4096
        and {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
        and same(loglik(model, rows), single)
        and same(loglik(model, after, len(start)), single_after)
        and all(same_logits(some) for some in (prompts, begun))
    ):
        return True
    print(f"batches change the results of {config.model_type}: everything is done one by one")
    return False
