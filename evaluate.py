"""Measure what a model keeps of its source language (English) and gains in the target language.

Stage 4 of SSU, Section 4.5 of the paper. Tasks:
    bpb    bits per byte of held-out text; in a chat, of the last answer
    mcq    multiple choice: the option with the highest log-likelihood per byte
    mt     translation: mean chrF++ over sentences, few-shot
    sum    summarization (XL-Sum): mean chrF++ over summaries, zero-shot
    mrc    reading comprehension (Belebele), 3-shot: the letter with the highest log-likelihood
    mmlu   knowledge (MMLU, Global-MMLU), 5-shot with questions of the subject: likewise

Prompts are those of Table 7, in data/languages.json: add a language there. Decoding is that of
Table 9. In the results, `source` is English (mt: X to English) and `target` the other language.

On a CPU, in a few minutes:
    python evaluate.py --model runs/ne/fft/model --lang ne --data-dir data/embedded \
        --out runs/ne/fft/eval.json --num-samples 100 --greedy --max-new-tokens 32
On one GPU, as published:
    python evaluate.py --model MODEL --lang ne --data-dir data/paper --out eval.json \
        --tasks mt,sum,mrc,mmlu

Every finished item goes to eval.items.jsonl beside eval.json, with prompt, prediction and scores.
The same command continues from there and gives the results of an uninterrupted run.
"""

import argparse
import datetime
import fcntl
import hashlib
import inspect
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import types
from collections import Counter
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import sacrebleu
import torch
import transformers
from huggingface_hub import snapshot_download
from jinja2 import TemplateError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import chat_template_utils

ROOT = Path(__file__).resolve().parent
LANGUAGES_FILE = ROOT / "data/languages.json"
LANGUAGES = json.loads(LANGUAGES_FILE.read_text(encoding="utf-8"))
GREEDY = dict(do_sample=False)
SAMPLING = dict(do_sample=True, temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.1)
SHOTS = {"mt": 3, "mrc": 3, "mmlu": 5}  # Section 4.5
WINDOW = 1024  # tokens of a window in bpb
DATE = datetime.datetime(2025, 1, 1)  # "today" in chat templates that write a date
OPTIONS = ["option_a", "option_b", "option_c", "option_d"]
ANSWERS = ["mc_answer1", "mc_answer2", "mc_answer3", "mc_answer4"]
BPB_SETS = [("source", "heldout"), ("source", "prose"), ("source", "news"), ("target", "heldout")]
MMLU = ["sample_id", "subject", "question", *OPTIONS, "answer"]
BELEBELE = ["link", "question_number", "flores_passage", "question", *ANSWERS, "correct_answer_num"]
DTYPES = ("float32", "bfloat16", "float16")
NOT_SETTINGS = ("model", "lang", "data_dir", "out")


def fail(message):
    """Print an error that the user can fix, in one line, and exit with code 2."""
    print(f"evaluate.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def write_atomically(path, text):
    """Write a text file under a temporary name and rename it, so that it is never incomplete."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(paths):
    """Return sha256 over the names and contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def git_commit():
    """Return the commit of this script, with -dirty after changes, or None outside a checkout."""
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---- Data ----------------------------------------------------------------------------------------


def read_rows(args, side, name, columns, optional=False):
    """Return the rows of a JSON Lines file of --data-dir, and remember the file in args.files.

    Every row has text in `columns`, or a chat in `messages` that ends with an answer.
    """
    path = Path(args.data_dir, "en" if side == "source" else args.lang, f"{name}.jsonl")
    if optional and not path.exists():
        return []
    args.files.append(path)
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
            json.dumps(row, ensure_ascii=False).encode()  # fails at half of a surrogate pair
            turns = row.get("messages") or []
            texts = [turn["content"].strip() for turn in turns] or [row[name] for name in columns]
            if not all(isinstance(text, (str, int, float)) and str(text).strip() for text in texts):
                raise ValueError("a text is empty")
            if turns and [turn["role"] for turn in turns[-2:]] != ["user", "assistant"]:
                raise ValueError("messages do not end with a user's turn and an assistant's")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            wanted = f"one JSON object in UTF-8 with {', '.join(columns)}"
            fail(f"{path}: line {number} is not {wanted} ({error}). Repair or remove it")
        rows.append(row)
    return rows or fail(f"{path} is empty. Write one JSON object per line")


# ---- Model, tokenizer, prompts -------------------------------------------------------------------


def find_model(name):
    """Return the local directory of a checkpoint, and sha256 of its files."""
    kinds = [".safetensors", ".json", ".jinja", ".model", ".txt"]
    folder = Path(name).expanduser()
    if not folder.is_dir():
        wanted = [f"*{kind}" for kind in kinds]
        try:
            folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns="*/*"))
        except (OSError, ValueError) as error:
            fail(f"model {name} is not a directory, and the hub did not give it: {error}")
    return folder, sha256_of(sorted(path for path in folder.iterdir() if path.suffix in kinds))


def load_tokenizer(folder):
    """Return config and tokenizer of an instruct model. Refuse what cannot be evaluated."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        fail(f"model {folder}: {error}")
    if config.is_encoder_decoder or type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        fail(f"model {folder}: {config.model_type} is not a decoder. Give a causal language model")
    if tokenizer.chat_template is None:
        fail(f"model {folder} has no chat template. Give an instruct model")
    return config, tokenizer


def load_model(folder, tokenizer, dtype, device):
    """Return the model, the ids that end a turn, and the ids with a newline in them."""
    options = dict(dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True)
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        fail(f"model {folder}: {error}")
    if info["missing_keys"]:
        fail(f"model {folder}: its files lack {sorted(info['missing_keys'])[:3]}. Copy it again")

    eos = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    # A turn also ends with what the template closes it with.
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    closing = encode(tokenizer, render(tokenizer, turns).rstrip())[-1]
    ends |= {closing} & set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    newlines = [i for i, text in enumerate(texts) if "\n" in text]
    model.generation_config = transformers.GenerationConfig()  # Table 9 alone decides
    return model.to(device).eval(), sorted(ends), newlines


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


def render(tokenizer, messages):
    """Return a chat as text, up to where an answer begins or to the end of the one given."""
    chat_template_utils.datetime = types.SimpleNamespace(now=lambda: DATE)  # of strftime_now
    options = dict(tokenize=False, enable_thinking=False)
    options["add_generation_prompt"] = messages[-1]["role"] != "assistant"
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (TemplateError, TypeError, ValueError, ZeroDivisionError) as error:
        roles = [turn["role"] for turn in messages]
        fail(f"the model's chat template refuses a chat of {roles} ({error}). Repair it")


def ask(tokenizer, text, shots=()):
    """Return the chat of few-shot examples, (question, answer) each, and a question, as text."""
    chat = []
    for question, answer in shots:
        chat.append({"role": "user", "content": question})
        chat.append({"role": "assistant", "content": answer})
    return render(tokenizer, [*chat, {"role": "user", "content": text}])


# ---- Tasks: each yields items, (what to save, prompt ids, [continuation ids to score, ...]) ------


def sides(args):
    """Return the sides with their entries of data/languages.json, English prompts by default."""
    english, target = LANGUAGES["en"], LANGUAGES[args.lang]
    return ("source", english), ("target", {"prompts": english["prompts"]} | target)


def sample(rows, args):
    """Return --num-samples random rows, in their order."""
    chosen = random.Random(args.seed).sample(range(len(rows)), min(args.num_samples, len(rows)))
    return [rows[i] for i in sorted(chosen)]


def last_answer(tokenizer, messages):
    """Return a chat as (prompt, answer with its end of turn)."""
    prompt, whole = render(tokenizer, messages[:-1]), render(tokenizer, messages)
    if whole.startswith(prompt):
        return prompt, whole[len(prompt) :].rstrip()
    at = whole.rfind(messages[-1]["content"].strip())  # an empty think block is only in the prompt
    if at < 0 or "</think>" not in prompt:
        fail("the model's chat template rewrites earlier turns, so bpb cannot score an answer")
    return prompt, whole[at:].rstrip()


def windows(prompt, tokens, size):
    """Yield (position, ids before, ids to score), `size` ids at most, so that each is scored once.

    The first window begins with the end of the prompt, any other with the last token before it.
    """
    before = prompt[-(size // 2) :]
    start, end = 0, size - len(before)
    while start < len(tokens):
        yield start, before, tokens[start:end]
        before = tokens[end - 1 : end]
        start, end = end, end + size - 1


def items_bpb(args, tokenizer):
    """Held-out text, or the last answer of a chat."""
    for side, base in BPB_SETS:
        rows = read_rows(args, side, base, ["text"], optional=base != "heldout")
        for number, row in sample(list(enumerate(rows, 1)), args):
            if row.get("messages"):
                said = row["messages"][-1]["content"]
                prompt, answer = last_answer(tokenizer, row["messages"])
                ids, tokens = split(tokenizer, prompt, answer)
            else:
                prompt, said = "", row["text"].removeprefix("\ufeff")
                ids, tokens = split(tokenizer, prompt, said, raw=True)
            for start, before, part in windows(ids, tokens, min(WINDOW, args.context)):
                saved = dict(side=side, id=f"{base}:{number}:{start}", domain=row.get("domain"))
                saved |= dict(prompt=prompt, reference=said, set=base)
                saved |= dict(tokens=len(part), bytes=len(said.encode()))
                yield saved, before, [part]
                prompt = said = ""  # the first window has the text and all its bytes


def items_mcq(args, tokenizer):
    """Source: a chat with the option as answer. Target: raw text, all that was trained on."""
    for side, _ in sides(args):
        raw = side == "target"
        for row in sample(read_rows(args, side, "mmlu.test", MMLU), args):
            prompt = row["question"] if raw else ask(tokenizer, row["question"])
            options = [str(row[option]) for option in OPTIONS]
            texts = [f" {option}" for option in options] if raw else options
            parts = [split(tokenizer, prompt, text, raw) for text in texts]
            saved = dict(side=side, id=row["sample_id"], domain=row["subject"], prompt=prompt)
            saved |= dict(reference=row["answer"], options=options)
            saved |= dict(shared_stem=row.get("shared_stem"))
            yield saved, parts[0][0], [ids for _, ids in parts]


def items_mt(args, tokenizer):
    """All items have the same examples. Translation to English is asked in English."""
    (_, english), (_, target) = sides(args)
    columns = ["id", english["flores"], target["flores"]]
    dev = read_rows(args, "target", "flores.dev", columns)
    drawn = random.Random(args.seed).sample(dev, min(SHOTS["mt"], len(dev)))
    test = sample(read_rows(args, "target", "flores.devtest", columns), args)
    to_english = (english["prompts"]["mt_to_english"], target["flores"], english["flores"])
    from_english = (target["prompts"]["mt_from_english"], english["flores"], target["flores"])
    for side, (template, origin, goal) in (("source", to_english), ("target", from_english)):
        texts = [template.format(X=target["name"], sentence=row[origin]) for row in drawn + test]
        shots = [(text, row[goal]) for text, row in zip(texts, drawn, strict=False)]
        for text, row in zip(texts[len(drawn) :], test, strict=True):
            prompt = ask(tokenizer, text, shots)
            saved = dict(side=side, id=row["id"], domain=row.get("domain"), prompt=prompt)
            yield saved | dict(reference=row[goal]), encode(tokenizer, prompt), []


def items_sum(args, tokenizer):
    """Zero-shot, asked in the language of the text."""
    for side, language in sides(args):
        for row in sample(read_rows(args, side, "xlsum", ["id", "text", "summary"]), args):
            prompt = ask(tokenizer, language["prompts"]["sum"].format(text=row["text"]))
            saved = dict(side=side, id=row["id"], domain=None, prompt=prompt)
            yield saved | dict(reference=row["summary"]), encode(tokenizer, prompt), []


def lettered(args, tokenizer, saved, text, shots):
    """Return the item of a question with options A to D, given (question, letter) examples.

    The first examples are left out where all do not fit the model's context.
    """
    prompt = ask(tokenizer, text, shots)
    while shots and len(encode(tokenizer, prompt)) >= args.context:
        shots = shots[1:]
        prompt = ask(tokenizer, text, shots)
    tail = prompt[-16:]  # the template ends all prompts alike
    letters = [split(tokenizer, tail, letter)[1] for letter in "ABCD"]
    return saved | dict(prompt=prompt, shots=len(shots)), encode(tokenizer, prompt), letters


def in_words(language, row, options, context=""):
    """Return the text of a question with options A to D, in the words of Table 7."""
    options = dict(zip("abcd", [row[option] for option in options], strict=True))
    template = language["prompts"]["question"]
    return template.format(context=context, question=row["question"], **options)


def items_mrc(args, tokenizer):
    """Belebele has one split, so an item is never its own example."""
    for side, language in sides(args):
        rows = []
        for row in read_rows(args, side, "belebele", BELEBELE):
            text = in_words(language, row, ANSWERS, row["flores_passage"])
            letter = dict(zip("1234", "ABCD", strict=True)).get(str(row["correct_answer_num"]))
            rows.append((f"{row['link']} {row['question_number']}", text, letter))
        drawn = random.Random(args.seed).sample(rows, min(SHOTS["mrc"] + 1, len(rows)))
        for name, text, letter in rows[: args.num_questions]:
            shots = [shot[1:] for shot in drawn if shot[0] != name][: SHOTS["mrc"]]
            saved = dict(side=side, id=name, domain=None, reference=letter)
            yield lettered(args, tokenizer, saved, text, shots)


def items_mmlu(args, tokenizer):
    """The examples are the first of the subject in the dev split."""
    for side, language in sides(args):
        dev, test = (read_rows(args, side, f"mmlu.{name}", MMLU) for name in ("dev", "test"))
        examples = {}  # {subject: [(question, letter), ...]}
        for number, row in enumerate(dev + test[: args.num_questions]):
            subject = row["subject"].replace("_", " ")
            text = language["prompts"]["mmlu"].format(subject=subject)
            text += in_words(language, row, OPTIONS)
            shots = examples.setdefault(subject, [])
            if number < len(dev):
                shots.append((text, row["answer"]))
                continue
            saved = dict(side=side, id=row["sample_id"], domain=subject, reference=row["answer"])
            yield lettered(args, tokenizer, saved, text, shots[: SHOTS["mmlu"]])


TASKS = dict(bpb=items_bpb, mcq=items_mcq, mt=items_mt, sum=items_sum, mrc=items_mrc)
TASKS["mmlu"] = items_mmlu


def key_of(saved):
    """Return what tells an item from all others."""
    return saved["task"], saved["side"], saved["run"], saved["id"]


def make_items(args, tokenizer):
    """Return {key: item} of all tasks, in a fixed order. Batches and seeds follow from it alone."""
    items, count = {}, Counter()
    for task in args.tasks:
        for saved, prompt, parts in TASKS[task](args, tokenizer):
            for run in range(1 if parts else args.runs):
                item = dict(task=task, run=run) | saved
                if key_of(item) in items:
                    fail(f"{key_of(item)}: two items have this id. Remove one")
                items[key_of(item)] = (item, prompt, parts)
            if len(parts) > 1 and (saved["reference"] not in list("ABCD") or not all(parts)):
                fail(f"{key_of(item)}: an option is no token, or no option is right. Repair it")
            for ids in (prompt, *parts):
                count.update(ids)

    # A tokenizer that does not know the script turns text into <unk>, which is easy to predict.
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    unknown = count[tokenizer.unk_token_id] / count.total()
    if unknown > 0.01 and tokenizer.unk_token_id not in special:
        fail(f"{unknown:.1%} of the tokens are <unk>. Choose a model that knows the script")
    return items


# ---- Log-likelihood and generation ---------------------------------------------------------------


def loglik(model, rows, shared=0):
    """Return the summed log-likelihood, in nats, of the last part of each row.

    rows: [(prompt ids, continuation ids), ...]. The first `shared` ids of all prompts are alike and
    are computed once. Rows are padded on the right, which a causal model does not see. The last
    token predicts nothing, so continuations of one token share the row of their prompt.
    """
    inputs = list(dict.fromkeys(tuple(prompt + part[:-1])[shared:] for prompt, part in rows))
    width = max(map(len, inputs))
    ids = torch.tensor([row + row[-1:] * (width - len(row)) for row in inputs])  # [rows, width]
    options = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = shared + width + 1 - min(len(prompt) for prompt, _ in rows)
    with torch.inference_mode():
        if shared:
            prefix = torch.tensor([rows[0][0][:shared]], device=model.device)
            options["past_key_values"] = model(prefix, use_cache=True).past_key_values
            options["past_key_values"].batch_repeat_interleave(len(inputs))
        logits = model(ids.to(model.device), use_cache=shared > 0, **options).logits

    sums = []
    left_out = shared + width - logits.shape[1]  # logits: [rows, places kept, vocabulary]
    for prompt, part in rows:
        row, first = inputs.index(tuple(prompt + part[:-1])[shared:]), len(prompt) - 1 - left_out
        logprobs = logits[row, first : first + len(part)].float().log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(part, device=logits.device)[:, None])
        sums.append(float(chosen.double().sum()))
    if not all(map(math.isfinite, sums)):
        fail("the model gives logits that are not finite. Its weights are damaged")
    return sums


def generate(model, prompts, max_new_tokens, stop_ids, options):
    """Return new ids after each prompt, up to the first of `stop_ids`, and their logits if asked.

    The padding repeats a prompt's first token: a repetition penalty counts what it would alone.
    """
    width = max(map(len, prompts))
    ids = [prompt[:1] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    options = dict(max_new_tokens=max_new_tokens, eos_token_id=stop_ids) | options
    with torch.inference_mode():
        found = model.generate(
            torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            pad_token_id=min(stop_ids or [0]),
            return_dict_in_generate=True,
            **options,
        )
    answers = []
    for tokens in found.sequences[:, width:].tolist():
        ends = [i + 1 for i, token in enumerate(tokens) if token in (stop_ids or [])]
        answers.append(tokens[: min(ends, default=len(tokens))])
    return answers, found.logits


def can_batch(model, config, context):
    """Return whether batches give, for a few rows, the results of single rows. Say so if not.

    Tried are padding, a shared beginning and generation, with rows longer than a sliding window or
    chunk. Refuse a model where the probability of a token depends on what follows.
    """
    text, draw = config.get_text_config(), random.Random(0)
    names = ("sliding_window", "window_size", "attention_chunk_size")
    window = max(getattr(text, name, None) or 0 for name in names)
    length = min(max(window + 12, 32), context - 4)
    prompts = [draw.choices(range(text.vocab_size), k=n) for n in (length, length // 2, 9)]
    rows = [(ids[:-3], ids[-3:]) for ids in prompts]
    start = prompts[1]
    after = [(start + ids[: length // 2 - 3], ids[-2:]) for ids in prompts]

    def one_by_one(rows):
        return [loglik(model, [row])[0] for row in rows]

    def first_logits(prompts):
        _, logits = generate(model, prompts, 2, None, GREEDY | dict(output_logits=True))
        return torch.stack(logits, 1).float()  # [prompts, 2, vocabulary]

    def same(batch, single):
        batch, single = torch.as_tensor(batch), torch.as_tensor(single)
        tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2
        return bool((batch - single).norm() <= tolerance * single.norm())

    alone = one_by_one(rows)
    ids = torch.tensor([start, start[:-1] + prompts[2][-1:]], device=model.device)
    with torch.inference_mode():
        one, other = (model(row[None], use_cache=True) for row in ids)
    if not same(one.logits[:, :-1], other.logits[:, :-1]):
        fail(f"{config.model_type} is not a causal language model. Give one")
    layers = getattr(one.get("past_key_values"), "layers", [None])
    if (
        {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
        and same(loglik(model, rows), alone)
        and same(loglik(model, after, len(start)), one_by_one(after))
        and same(first_logits(prompts), torch.cat([first_logits([ids]) for ids in prompts]))
    ):
        return True
    print(f"batches change the results of {config.model_type}: everything is done one by one")
    return False


def make_batches(items, args):
    """Return [(number, items), ...] with at most --batch-tokens tokens each, padding included.

    A batch is of one task, side and run, and of one set of examples in mrc and mmlu.
    """

    def tokens(item):
        saved, prompt, parts = item
        rows = len(parts) if saved["task"] == "mcq" else 1  # letters share a row
        return rows * (len(prompt) + max(map(len, parts), default=args.max_new_tokens))

    batches = {}
    for item in sorted(items, key=tokens, reverse=True):
        saved, budget = item[0], args.batch_tokens
        kind = (saved["task"], saved["side"], saved["run"])
        if saved["task"] in ("mrc", "mmlu"):
            kind = (*kind, saved["domain"], saved["shots"])
        elif saved["task"] in ("bpb", "mcq"):  # logits are kept at many places
            budget = budget // 8
        some = batches.setdefault(kind, [])
        if some and (len(some[-1]) + 1) * tokens(some[-1][0]) <= budget:
            some[-1].append(item)
        else:
            some.append([item])
    return [numbered for some in batches.values() for numbered in enumerate(some)]


def answer(model, batch, args, stop_ids):
    """Return new token ids, or the log-likelihoods of its continuations, for each item."""
    prompts = [prompt for _, prompt, _ in batch]
    rows = [(prompt, part) for _, prompt, parts in batch for part in parts]
    if not rows:
        options = GREEDY if args.greedy else SAMPLING
        return generate(model, prompts, args.max_new_tokens, stop_ids, options)[0]
    if args.batch_tokens == 0:
        sums = iter([loglik(model, [row])[0] for row in rows])
    else:
        shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
        sums = iter(loglik(model, rows, shared if len(batch) > 1 and "shots" in batch[0][0] else 0))
    return [list(islice(sums, len(parts))) for _, _, parts in batch]


# ---- Metrics -------------------------------------------------------------------------------------


def score(saved, found, tokenizer):
    """Return the record with `prediction` and `scores`, given log-likelihoods or new ids."""
    if saved["task"] == "bpb":
        return saved | dict(prediction=None, scores=dict(nats=-found[0]))
    if saved["task"] in ("mt", "sum"):
        text = tokenizer.decode(found, skip_special_tokens=True).split("\n")[0].strip()
        chrf = sacrebleu.sentence_chrf(text, [saved["reference"]], word_order=2).score
        return saved | dict(prediction=text, scores=dict(chrf=chrf))
    values = found
    if saved["task"] == "mcq":
        sizes = [len(option.encode()) for option in saved["options"]]
        values = [nats / size for nats, size in zip(found, sizes, strict=True)]
    best = [letter for letter, x in zip("ABCD", values, strict=True) if x == max(values)]
    correct = (saved["reference"] in best) / len(best)  # a tie counts 1/k
    return saved | dict(prediction=best[0], scores=dict(correct=correct, loglik=found))


def summarize(records):
    """Return {task: {side: numbers}}, in bpb {task: {side: {set: numbers}}}."""
    groups, results = {}, {}
    for saved in records:
        groups.setdefault((saved["task"], saved["side"], saved.get("set")), []).append(saved)
    for (task, side, base), rows in groups.items():
        sides = results.setdefault(task, {})
        if task == "bpb":
            bits = math.fsum(row["scores"]["nats"] for row in rows) / math.log(2)
            size, tokens = (sum(row[unit] for row in rows) for unit in ("bytes", "tokens"))
            documents = sum(row["bytes"] > 0 for row in rows)
            numbers = dict(bpb=bits / size, bytes=size, tokens=tokens, documents=documents)
            sides.setdefault(side, {})[base] = numbers
        elif task in ("mt", "sum"):
            runs = {}
            for row in rows:
                runs.setdefault(row["run"], []).append(row["scores"]["chrf"])
            means = [statistics.fmean(run) for run in runs.values()]
            spread = statistics.stdev(means) if len(means) > 1 else 0.0
            numbers = dict(chrf=statistics.fmean(means), sd_over_runs=spread, runs=means)
            sides[side] = numbers | dict(n=len(runs[0]))
        else:
            correct = [row["scores"]["correct"] for row in rows]
            sides[side] = dict(accuracy=statistics.fmean(correct), n=len(rows))
    return results


# ---- Command line, resume, main ------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser("evaluate.py", usage=argparse.SUPPRESS, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, names = parser.add_argument, ",".join(TASKS)
    add("--model", required=True, help="directory or hub id of an instruct model")
    add("--lang", required=True, choices=[*LANGUAGES][1:], help="target language")
    add("--data-dir", required=True, help="directory with en/ and one for each target language")
    add("--out", required=True, help="file to write, eval.json")
    add("--tasks", default="bpb,mcq,mt", help=f"some of {names} (default: bpb,mcq,mt)")
    add("--num-samples", type=int, default=500, help="items of bpb, mcq, mt, sum (default: 500)")
    add("--num-questions", type=int, help="items of mrc and mmlu (default: all)")
    add("--runs", type=int, default=3, help="sampled runs of mt and sum (default: 3)")
    add("--greedy", action="store_true", help="one run without sampling and repetition penalty")
    add("--max-new-tokens", type=int, default=128, help="tokens of an answer (default: 128)")
    add("--batch-tokens", type=int, default=8192, help="tokens of a batch (default: 8192)")
    add("--seed", type=int, default=42, help="seed of items, examples and samples (default: 42)")
    add("--dtype", choices=DTYPES, help="precision (default: bfloat16 on cuda, float32 on cpu)")
    add("--device", choices=("cpu", "cuda"), help="device (default: cuda if there is one)")
    args = parser.parse_args(argv)
    counts = [args.num_samples, args.runs, args.max_new_tokens, args.batch_tokens]
    if min(*counts, args.num_questions or 1) < 1 or not 0 <= args.seed < 2**32:
        fail("a number of items, runs or tokens is below 1, or --seed is not in [0, 2^32)")
    asked = args.tasks.split(",")
    if set(asked) - set(TASKS):
        fail(f"--tasks {args.tasks} is not a list of some of {names}")
    args.tasks = [task for task in TASKS if task in asked]
    args.runs = 1 if args.greedy else args.runs
    choose_device(args)
    return args


def choose_device(args):
    """Set the default device and dtype."""
    cuda = torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        fail("--device cuda: torch finds no CUDA device. Leave --device out")
    args.device = args.device or ("cuda" if cuda else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")


def read_items(path, header):
    """Return {key: record} of an interrupted run with the same header, or else nothing."""
    if not path.exists():
        return {}
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        first, *found = map(json.loads, lines)
        if first == header:
            return {key_of(saved): saved for saved in found}
    except (ValueError, KeyError, TypeError) as error:
        fail(f"{path} is damaged ({error}). Delete it, or the line, to have that done again")
    print(f"{path} is of other settings, data, model, machine or versions: starting again")
    return {}


def to_lines(values):
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def answer_all(args, folder, config, tokenizer, items, done, path):
    """Add what is not done yet to `done`, {key: record}, and to the items file."""
    model, ends, newlines = load_model(folder, tokenizer, args.dtype, args.device)
    if not can_batch(model, config, args.context):
        args.batch_tokens = 0
    with open(path, "a", encoding="utf-8") as file, tqdm(total=len(items), unit="item") as bar:
        for number, batch in make_batches(items.values(), args):
            first = batch[0][0]
            bar.set_description(f"{first['task']} {first['side']}")
            bar.update(len(batch))
            if all(key_of(saved) in done for saved, _, _ in batch):
                continue
            # Each batch has its own seed: an interrupted run samples what a whole one does.
            torch.manual_seed((args.seed + first["run"]) * 1_000_003 + number)
            found = answer(model, batch, args, ends + newlines)
            for (saved, _, _), values in zip(batch, found, strict=True):
                done[key_of(saved)] = score(saved, values, tokenizer)
                file.write(to_lines([done[key_of(saved)]]))
            file.flush()


def evaluate(args):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    # Read the data and build all prompts before the model is loaded.
    started, out = time.monotonic(), Path(args.out)
    items_path = out.with_suffix(".items.jsonl")
    for path, form in ((out, "ssu-eval"), (items_path, "ssu-eval-items")):
        if path.exists() and f'"format": "{form}"' not in path.read_text(errors="replace")[:100]:
            fail(f"{path} exists and evaluate.py did not write it. Choose another --out")
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    folder, model_sha256 = find_model(args.model)
    config, tokenizer = load_tokenizer(folder)
    args.context = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**40
    args.files = []
    items = make_items(args, tokenizer)
    print(f"{args.model} on {args.device} in {args.dtype}: {len(items)} items")

    # An interrupted run continues only with the same of all this.
    settings |= dict(model_sha256=model_sha256, data_sha256=sha256_of(args.files))
    settings |= dict(date=str(DATE.date()), enable_thinking=False)
    versions = {name: version(name) for name in ("torch", "transformers", "sacrebleu")}
    versions |= dict(python=platform.python_version(), threads=str(torch.get_num_threads()))
    versions |= dict(cpu=torch.backends.cpu.get_cpu_capability())
    script = sha256_of([Path(__file__), LANGUAGES_FILE])
    header = dict(format="ssu-eval-items", version=3, lang=args.lang, settings=settings)
    header |= dict(versions=versions, script=script)

    # One process at a time writes here.
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another process writes {out}. Wait for it, or choose another --out")
        done = read_items(items_path, header)
        write_atomically(items_path, to_lines([header, *done.values()]))
        if items.keys() - done.keys():
            answer_all(args, folder, config, tokenizer, items, done, items_path)
        records = [done[key] for key in items]
        write_atomically(items_path, to_lines([header, *records]))

        content = dict(format="ssu-eval", version=1, model=args.model, lang=args.lang)
        content |= dict(settings=settings, versions=versions, device=args.device)
        content |= dict(git_commit=git_commit(), seconds=round(time.monotonic() - started, 1))
        content |= dict(results=summarize(records))
        write_atomically(out, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    print(f"wrote {out}; every item is in {items_path}")
    print("next: python tools/report.py DIRECTORY, with that of the source model's evaluation")


def main(argv=None):
    try:
        evaluate(parse_args(argv))
    except OSError as error:  # a missing file, a full disk
        fail(f"{error.filename or ''} {error.strerror or error}")
    except KeyboardInterrupt:
        print("evaluate.py: interrupted. The same command continues", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
