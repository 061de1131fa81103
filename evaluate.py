"""Measure what a model keeps of its source language (English) and gains in the target language.

Section 4.5 of the paper. Tasks:
    bpb    bits per byte of held-out text; in a chat, of the last answer
    mcq    multiple choice: the option with the highest log-likelihood per byte
    mt     translation: mean chrF++ over sentences, few-shot
    sum    summarization (XL-Sum): mean chrF++ over summaries, zero-shot
    mrc    reading comprehension (Belebele), 3-shot: the letter with the highest log-likelihood
    mmlu   knowledge (MMLU, Global-MMLU), 5-shot with questions of the subject: likewise
    chat   fixed English prompts: does the model stop, repeat itself, answer in English?

Prompts are those of Table 7, in data/languages.json; add a language there. Decoding is that of
Table 9. In the results `source` is English (mt: X to English), `target` the other language.

On a CPU, in a few minutes:
    python evaluate.py --model runs/ne/fft/model --lang ne --data-dir data/embedded \
        --out runs/ne/fft/eval.json --num-samples 100 --greedy --max-new-tokens 32
On one GPU, as published:
    python evaluate.py --model MODEL --lang ne --data-dir data/paper --out eval.json \
        --tasks mt,sum,mrc,mmlu

Examples that questions share are computed once, and prompts are scored and answered in batches.
Each of these is tried on a few rows when the model is loaded. What does not give the results of
single rows there is done one by one, and a line says so.
Each finished item is in eval.items.jsonl beside eval.json, with prompt, prediction and scores.
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
import re
import statistics
import subprocess
import sys
import time
import unicodedata
from collections import Counter

# torch, transformers and sacrebleu are imported where they are used: bad input fails at once.

HERE = os.path.dirname(os.path.abspath(__file__))
LANGUAGES = os.path.join(HERE, "data/languages.json")
SAMPLING = {  # Table 9
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
}
CHAT_SAMPLING = SAMPLING | {"top_p": 0.8}  # Table 9: AE2, IFEval, GSM8K
GREEDY = {"do_sample": False}
DATE = datetime.datetime(2025, 1, 1)  # the "today" of chat templates that write a date
CHAT_TOKENS = 128
CHAT_PROMPTS = (
    "Why do leaves change colour in autumn? Answer in two or three sentences.",
    "What is the capital of France? Answer in one sentence.",
    "How do I make a cup of tea?",
    "Write a short, polite message asking a neighbour to turn the music down.",
    "I could not sleep last night. What can I do this evening?",
    "Name three things to pack for a day in the mountains, and say why.",
)
FILES = {  # what each task reads in --data-dir
    "bpb": ("en/heldout", "LANG/heldout", "en/prose", "en/news"),  # the last two where they exist
    "mcq": ("en/mmlu.test", "LANG/mmlu.test"),
    "mt": ("LANG/flores.dev", "LANG/flores.devtest"),
    "sum": ("en/xlsum", "LANG/xlsum"),
    "mrc": ("en/belebele", "LANG/belebele"),
    "mmlu": ("en/mmlu.dev", "en/mmlu.test", "LANG/mmlu.dev", "LANG/mmlu.test"),
    "chat": ("en/heldout", "LANG/heldout"),  # to tell the languages apart
}
SHOTS = {"mrc": 3, "mmlu": 5}  # Section 4.5
OPTIONS = ("option_a", "option_b", "option_c", "option_d")
ANSWERS = ("mc_answer1", "mc_answer2", "mc_answer3", "mc_answer4")
MMLU = ("sample_id", "subject", "question", *OPTIONS, "answer")
COLUMNS = {
    "mmlu.dev": MMLU,
    "mmlu.test": MMLU,
    "xlsum": ("id", "text", "summary"),
    "belebele": ("link", "question_number", "flores_passage", "question", *ANSWERS)
    + ("correct_answer_num",),
}
ALLOWED = {"answer": tuple("ABCD"), "correct_answer_num": tuple("1234")}
NUMBERS = {"id", "sample_id", "link", "question_number", *OPTIONS, *ANSWERS, *ALLOWED}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # relative, between single rows and batches


def fail(message):
    """Print an error that the user can fix, in one line, and exit with code 2."""
    print(f"evaluate.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def write_atomically(path, text):
    """Write a text file such that no reader ever sees half of it."""
    try:
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    finally:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")


def git_commit():
    """Return the commit of this script, with -dirty after changes, or None outside a checkout."""
    command = ["git", "-C", HERE, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# Data


def check_messages(row, where):
    """Check that `messages` is a chat that ends with a question and its answer."""
    turns = row["messages"]
    texts = isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns
    )
    if not texts:
        fail(f"{where}: `messages` must be a list of {{role, content}} turns whose content is text")
    if [turn.get("role") for turn in turns[-2:]] != ["user", "assistant"]:
        fail(f"{where}: `messages` must end with a user's turn and the assistant's answer")
    if not turns[-1]["content"].strip():
        fail(f"{where}: the assistant's answer is empty")


def check_row(row, columns, where):
    """Check one row; a chat in `messages` may replace `text`."""
    if not isinstance(row, dict):
        fail(f"{where} is not an object; write one JSON object per line")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        fail(f"{where} has half of a surrogate pair (\\ud800 to \\udfff); repair the text")
    if row.get("messages"):
        check_messages(row, where)
        columns = [column for column in columns if column != "text"]
    for column in columns:
        value = row.get(column)
        kinds = (str, int, float) if column in NUMBERS else str
        if not isinstance(value, kinds) or not str(value).strip():
            fail(f"{where} has no `{column}`")
        if str(value) not in ALLOWED.get(column, (str(value),)):
            fail(f"{where}: `{column}` must be one of {ALLOWED[column]}, not {value!r}")
        if isinstance(value, str):
            row[column] = value.removeprefix("\ufeff")
    if not isinstance(row.get("domain"), (str, type(None))):
        fail(f"{where}: `domain` must be text")


def parse_line(line, where):
    """Return the JSON value of a line."""
    if line.strip() in (b"{", b"["):
        fail(f"{where}: JSON over several lines; write one JSON object per line (jq -c)")
    if line.lstrip().startswith(b"["):
        fail(f"{where} is not an object but a JSON array; write one JSON object per line (jq -c)")
    try:
        return json.loads(line.decode("utf-8"))
    except RecursionError:
        fail(f"{where} is nested too deeply; remove the row")
    except ValueError as error:
        fail(f"{where} is not JSON ({error}); repair or remove the row")


def read_rows(path, columns):
    """Return the rows of a JSON Lines file, each with text in every column; see check_row."""
    if not os.path.isfile(path):
        fail(f"{path} does not exist; --data-dir must have en/ and a directory for the language")
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                fail(f"{path}: line 1 is UTF-16; convert the file to UTF-8 (iconv)")
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                row = parse_line(line, f"{path}: line {number}")
                check_row(row, columns, f"{path}: line {number}")
                rows.append(row)
    return rows or fail(f"{path} is empty; write one JSON object per line")


def read_languages():
    """Return data/languages.json: {code: {"name": ..., "flores": ..., "prompts": {...}}}."""
    with open(LANGUAGES, encoding="utf-8") as file:
        return json.load(file)


def read_data(folder, lang, tasks):
    """Return what the tasks read, sha256 of it, and where provenance.json says it is from.

    The first and last are {"source/heldout": rows or origin, "target/flores.dev": ..., ...}.
    """
    data, origin, digest = {}, {}, hashlib.sha256()
    flores = ("id", "eng_Latn", read_languages()[lang]["flores"])
    columns = COLUMNS | {"flores.dev": flores, "flores.devtest": flores}
    for name in dict.fromkeys(name for task in tasks for name in FILES[task]):
        path = os.path.join(folder, name.replace("LANG", lang) + ".jsonl")
        base = name.split("/")[1]
        if base in ("prose", "news") and not os.path.exists(path):
            continue
        name = name.replace("en/", "source/").replace("LANG/", "target/")
        data[name] = read_rows(path, columns.get(base, ("text",)))
        listed = os.path.join(os.path.dirname(path), "provenance.json")
        if os.path.exists(listed):
            try:
                with open(listed, encoding="utf-8") as file:
                    origin[name] = json.load(file)[base + ".jsonl"]["from"]
            except (ValueError, KeyError, TypeError) as error:
                fail(f"{listed} does not say where {base}.jsonl is from ({error!r}); delete it")
        with open(path, "rb") as file:
            digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return data, digest.hexdigest(), origin


# Model, tokenizer, prompts


def find_model(name):
    """Return the local directory of a checkpoint and sha256 of its files.

    The hub is asked only for `owner/name`.
    """
    folder, kinds = os.path.expanduser(name), (".safetensors", ".json", ".jinja", ".model", ".txt")
    if not os.path.isdir(folder):
        if not re.fullmatch(r"[\w-]+/[\w.-]+", name) or os.path.isdir(name.split("/")[0]):
            fail(f"model {name} does not exist; give a directory or hub id")
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(
                name,
                allow_patterns=["*" + kind for kind in kinds],
                ignore_patterns=["consolidated*", "original/*"],
            )
        except (OSError, ValueError) as error:
            fail(f"model {name} is no local directory, and the hub did not give it: {error}")
    files, digest = sorted(f for f in os.listdir(folder) if f.endswith(kinds)), hashlib.sha256()
    for needed in ("config.json", "tokenizer_config.json", ".safetensors"):
        if not any(file.endswith(needed) for file in files):
            fail(f"model {name} has no {needed}; give a checkpoint of an instruct model")
    for file_name in files:
        with open(os.path.join(folder, file_name), "rb") as file:
            digest.update(file_name.encode() + hashlib.file_digest(file, "sha256").digest())
    return folder, digest.hexdigest()


def load_tokenizer(folder):
    """Return config and tokenizer of an instruct model; refuse what cannot be evaluated."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        fail(f"model {folder}: {error}")
    if config.is_encoder_decoder or type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        fail(f"model {folder}: {config.model_type} is not a decoder; give a causal language model")
    if tokenizer.chat_template is None:
        fail(f"model {folder} has no chat template; give an instruct model")
    return config, tokenizer


def encode(tokenizer, text, raw=False):
    """Return token ids, nothing added: a chat template writes its own BOS.

    In raw text, `<|endoftext|>` is text and not a control token.
    """
    return tokenizer(text, add_special_tokens=False, split_special_tokens=raw)["input_ids"]


def render(tokenizer, messages):
    """Return a chat as text, up to where an answer begins or to the end of the one given."""
    from jinja2 import TemplateError
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return DATE

    chat_template_utils.datetime = Clock  # strftime_now: results must not depend on the day
    asked = messages[-1]["role"] != "assistant"
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=asked, enable_thinking=False
        )
    except (TemplateError, TypeError, ZeroDivisionError) as error:
        roles = [turn["role"] for turn in messages]
        fail(f"the model's chat template refuses a chat of {roles} ({error})")


def split(tokenizer, prompt, text, raw=False):
    """Return the ids of prompt and of text, tokenized as one."""
    before, whole = encode(tokenizer, prompt, raw), encode(tokenizer, prompt + text, raw)
    n = len(os.path.commonprefix([before, whole]))
    return whole[:n], whole[n:]


def load_model(folder, tokenizer, dtype, device):
    """Return the model, the ids that end a turn, and the ids with a newline in them."""
    import torch
    import transformers
    from safetensors import SafetensorError

    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True
        )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        fail(f"model {folder}: {error}")
    if info["missing_keys"]:
        fail(f"model {folder}: its files lack {sorted(info['missing_keys'])[:3]}")
    # A chat ends with what the template closes a turn with, or what the model calls the end.
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    eos = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    closing = encode(tokenizer, render(tokenizer, turns).rstrip())[-1]
    ends |= {closing} & set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    model.generation_config = transformers.GenerationConfig()  # Table 9 alone decides
    newlines = [i for i, text in enumerate(texts) if "\n" in text]
    return model.to(device).eval(), sorted(ends), newlines


# Tasks. Each yields (record to be saved, prompt ids, [continuation ids, ...] to score).


def record(task, side, name, domain, prompt, reference, **more):
    start = {"task": task, "side": side, "run": 0, "id": name, "domain": domain}
    return start | {"prompt": prompt, "reference": reference} | more


def sides(args):
    """Return the sides with their entries of data/languages.json, English prompts by default."""
    english, target = args.languages["en"], args.languages[args.lang]
    return ("source", english), ("target", {"prompts": english["prompts"]} | target)


def sample(rows, args):
    chosen = random.Random(args.seed).sample(range(len(rows)), min(args.num_samples, len(rows)))
    return [rows[i] for i in sorted(chosen)]


def ask(tokenizer, text, shots=()):
    """Return the chat of few-shot examples, (question, answer) each, and a question, as text."""
    chat = []
    for question, answer in shots:
        chat.append({"role": "user", "content": question})
        chat.append({"role": "assistant", "content": answer})
    return render(tokenizer, [*chat, {"role": "user", "content": text}])


def start_ids(tokenizer):
    """Return what raw text follows: the beginning-of-text token, or else the end of a text."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [eos if bos is None else bos]


def last_answer(tokenizer, messages, where):
    """Return a chat as (prompt, answer with its end of turn)."""
    prompt, whole = render(tokenizer, messages[:-1]), render(tokenizer, messages)
    if whole.startswith(prompt):
        return prompt, whole[len(prompt) :].rstrip()
    at = whole.rfind(messages[-1]["content"].strip())  # an empty think block is only in the prompt
    if at < 0 or "</think>" not in prompt:
        fail(f"{where}: the chat template rewrites earlier turns; no answer can be scored")
    return prompt, whole[at:].rstrip()


def items_bpb(data, tokenizer, args):
    """Windows of max_length tokens that score each token once and overlap by one token."""
    size = min(args.max_length, args.context)
    for name in [name for name in data if name.endswith(("heldout", "prose", "news"))]:
        side, base = name.split("/")
        for number, row in sample([*enumerate(data[name], 1)], args):
            if row.get("messages"):
                said = row["messages"][-1]["content"]
                prompt, text = last_answer(tokenizer, row["messages"], f"{name}, row {number}")
                ids, tokens = split(tokenizer, prompt, text)
            else:
                prompt, said = "", row["text"]
                ids, tokens = start_ids(tokenizer), encode(tokenizer, said, raw=True)
            ids = ids[-(size // 2) :]
            cuts = [0, *range(size - len(ids), len(tokens), size - 1), len(tokens)]
            for a, b in zip(cuts, cuts[1:], strict=False):
                found = record("bpb", side, f"{base}:{number}:{a}", row.get("domain"), None, None)
                found |= {"set": base, "tokens": b - a, "bytes": 0}
                if a == 0:  # the first window has the text and its bytes, without the end of turn
                    found |= {"prompt": prompt, "reference": said, "bytes": len(said.encode())}
                yield found, tokens[a - 1 : a] if a else ids, [tokens[a:b]]


def items_mcq(data, tokenizer, args):
    """Source: a chat with the option as answer. Target: raw text, all that was trained on."""
    for side, _ in sides(args):
        raw = side == "target"
        before = start_ids(tokenizer) if raw else []
        for row in sample(data[f"{side}/mmlu.test"], args):
            options = [str(row[option]) for option in OPTIONS]
            prompt = row["question"] if raw else ask(tokenizer, row["question"])
            written = [" " + option for option in options] if raw else options
            parts = [split(tokenizer, prompt, option, raw) for option in written]
            more = {"options": options, "shared_stem": row.get("shared_stem")}
            saved = record(
                "mcq", side, row["sample_id"], row["subject"], prompt, row["answer"], **more
            )
            yield saved, before + parts[0][0], [ids for _, ids in parts]


def items_mt(data, tokenizer, args):
    """The few-shots are alike for all items. X to English is asked in English."""
    dev, test = data["target/flores.dev"], sample(data["target/flores.devtest"], args)
    if len(dev) < args.few_shots:
        fail(f"{args.lang}/flores.dev.jsonl has fewer rows than --few-shots {args.few_shots}")
    drawn = random.Random(args.seed).sample(dev, args.few_shots)
    (_, english), (_, target) = sides(args)
    into, out_of = english["prompts"]["mt_to_english"], target["prompts"]["mt_from_english"]
    ways = (
        ("source", into, target["flores"], english["flores"]),
        ("target", out_of, english["flores"], target["flores"]),
    )
    for side, template, origin, goal in ways:
        texts = [template.format(X=target["name"], sentence=row[origin]) for row in drawn + test]
        shots = [(text, row[goal]) for text, row in zip(texts, drawn, strict=False)]
        for text, row in zip(texts[len(drawn) :], test, strict=True):
            prompt = ask(tokenizer, text, shots)
            saved = record("mt", side, row["id"], row.get("domain"), prompt, row[goal])
            for run in range(args.runs):
                yield saved | {"run": run}, encode(tokenizer, prompt), []


def items_sum(data, tokenizer, args):
    for side, language in sides(args):
        for row in sample(data[f"{side}/xlsum"], args):
            prompt = ask(tokenizer, language["prompts"]["sum"].format(text=row["text"]))
            saved = record("sum", side, row["id"], None, prompt, row["summary"])
            for run in range(args.runs):
                yield saved | {"run": run}, encode(tokenizer, prompt), []


def lettered(task, side, shots, row, tokenizer, args):
    """Return the item of a question with options A to D, given (question, letter) examples.

    The first examples are left out where all do not fit the model's context.
    """
    *_, subject, text, answer = row
    while True:
        prompt = ask(tokenizer, text, shots)
        ids = encode(tokenizer, prompt)
        if len(ids) < args.context or not shots:
            break
        shots = shots[1:]
    tail = prompt[-16:]  # the template ends all prompts alike
    letters = [split(tokenizer, tail, letter)[1] for letter in "ABCD"]
    return record(task, side, row[0], subject, prompt, answer, shots=len(shots)), ids, letters


def items_mrc(data, tokenizer, args):
    """Belebele has one split: an item is never its own example."""
    for side, language in sides(args):
        rows = []
        for row in data[f"{side}/belebele"]:
            options = dict(zip("abcd", (row[answer] for answer in ANSWERS), strict=True))
            text = language["prompts"]["question"].format(
                context=row["flores_passage"], question=row["question"], **options
            )
            letter = "ABCD"[int(row["correct_answer_num"]) - 1]
            rows.append((f"{row['link']} {row['question_number']}", None, text, letter))
        drawn = random.Random(args.seed).sample(rows, min(SHOTS["mrc"] + 1, len(rows)))
        for row in rows[: args.num_questions]:
            shots = [shot[2:] for shot in drawn if shot[0] != row[0]][: SHOTS["mrc"]]
            yield lettered("mrc", side, shots, row, tokenizer, args)


def items_mmlu(data, tokenizer, args):
    """The examples are the first of the subject in the dev split."""
    for side, language in sides(args):
        found = {}
        for name in ("dev", "test"):
            for row in data[f"{side}/mmlu.{name}"]:
                subject = row["subject"].replace("_", " ")
                options = dict(zip("abcd", (row[option] for option in OPTIONS), strict=True))
                text = language["prompts"]["mmlu"].format(subject=subject) + language["prompts"][
                    "question"
                ].format(context="", question=row["question"], **options)
                found.setdefault(name, []).append((row["sample_id"], subject, text, row["answer"]))
        examples = group(found["dev"], lambda row: row[1])
        for row in found["test"][: args.num_questions]:
            if row[1] not in examples:
                fail(f"{side}/mmlu.dev.jsonl has no question about {row[1]}")
            shots = [shot[2:] for shot in examples[row[1]][: SHOTS["mmlu"]]]
            yield lettered("mmlu", side, shots, row, tokenizer, args)


def items_chat(data, tokenizer, args):
    for number, text in enumerate(CHAT_PROMPTS):
        prompt = ask(tokenizer, text)
        saved = record("chat", "source", number, None, prompt, None, question=text)
        yield saved, encode(tokenizer, prompt), []


TASKS = {
    "bpb": items_bpb,
    "mcq": items_mcq,
    "mt": items_mt,
    "sum": items_sum,
    "mrc": items_mrc,
    "mmlu": items_mmlu,
    "chat": items_chat,
}


# Log-likelihood and generation


def finite(values):
    if not values.isfinite().all():
        fail("the model gives logits that are not finite; its weights are damaged")
    return values


def loglik(model, rows, prefix=()):
    """Return the summed log-likelihood, in nats, of the last part of each row.

    rows: [(prompt ids, continuation ids), ...]. All rows follow `prefix`, which is computed once.
    Rows are padded on the right: a causal model needs no mask or positions for that. A last token
    predicts nothing, so continuations of one token share the row of their prompt.
    """
    import torch

    inputs = list(dict.fromkeys(tuple(prompt + part[:-1]) for prompt, part in rows))
    places = [range(len(prompt) - 1, len(prompt) + len(part) - 1) for prompt, part in rows]
    keep = sorted(set().union(*places))
    width = max(map(len, inputs))
    ids = torch.tensor([[*row, *row[-1:] * (width - len(row))] for row in inputs])  # [rows, width]
    options, wanted = {}, torch.tensor(keep, device=model.device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = wanted
    with torch.inference_mode():
        if prefix:
            start = torch.tensor([prefix], device=model.device)
            options["past_key_values"] = model(input_ids=start, use_cache=True).past_key_values
            options["past_key_values"].batch_repeat_interleave(len(inputs))
        logits = model(input_ids=ids.to(model.device), use_cache=bool(prefix), **options).logits
        if "logits_to_keep" not in options:
            logits = logits[:, wanted]  # [rows, kept, vocabulary]
        result = []
        for (prompt, part), at in zip(rows, places, strict=True):
            row, first = inputs.index(tuple(prompt + part[:-1])), keep.index(at[0])
            kept = [keep.index(place, first) for place in at]
            logprobs = logits[row, kept].float().log_softmax(-1)  # [tokens, vocabulary]
            token = torch.tensor(part, device=logits.device)[:, None]
            result.append(float(finite(logprobs.gather(1, token)).double().sum()))
    return result


def generate(model, prompts, max_new_tokens, stop_ids, sampling):
    """Return new token ids after each prompt, up to and including the first of `stop_ids`.

    The padding repeats a prompt's first token: the repetition penalty counts what it would alone.
    """
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([p[:1] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        new = model.generate(
            ids,
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
            **sampling,
        )[:, width:].tolist()
    answers = []
    for tokens in new:
        ends = [i + 1 for i, token in enumerate(tokens) if token in stop_ids]
        answers.append(tokens[: ends[0]] if ends else tokens)
    return answers


def first_logits(model, prompts):
    """Return the logits of the first generated tokens of each prompt, [prompts, 2, vocabulary]."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([p[:1] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        found = model.generate(
            ids,
            attention_mask=mask.to(model.device),
            max_new_tokens=2,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(found.logits, 1).float()


def try_batches(model, config, context):
    """Return {way: True where it gives what single rows give}, and refuse models not causal.

    The rows are longer than a sliding window or chunk. One above 4,096 tokens is not tried.
    """
    import torch
    from transformers.cache_utils import DynamicCache, DynamicLayer

    text = config.get_text_config()
    names = ("sliding_window", "window_size", "attention_chunk_size")
    windows = [w for w in (getattr(text, name, None) for name in names) if isinstance(w, int)]
    window = max([w for w in windows if 0 < w < context], default=0)
    size = window + 12 if window <= 4096 else 32
    size = int(min(max(size, 32), context - 4))
    draw = random.Random(0)
    prompts = [draw.choices(range(text.vocab_size), k=n) for n in (size, size // 2, 9)]
    tolerance = TOLERANCE[str(model.dtype).removeprefix("torch.")]

    def close(a, b):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return bool(((a - b).norm() <= tolerance * b.norm()).item())

    with torch.inference_mode():
        changed = prompts[1][:-1] + [(prompts[1][-1] + 1) % text.vocab_size]
        both = [model(torch.tensor([ids], device=model.device)) for ids in (prompts[1], changed)]
    one, two = (finite(out.logits[0, :-1].float()) for out in both)
    if not close(one, two):
        fail(f"{config.model_type} is not a causal language model; what follows changes a token")
    cache = getattr(both[0], "past_key_values", None)
    rows = [(ids[:-3], ids[-3:]) for ids in prompts]
    alone = [loglik(model, [row])[0] for row in rows]
    start = prompts[0][: size // 2]
    after = [(ids[:2], ids[2:5]) for ids in (prompts[0], prompts[2])]
    after.append((prompts[0][: size // 2 - 1], prompts[1][:2]))
    ways = {"batched_scoring": close(loglik(model, rows), alone), "shared_examples": False}
    plain = isinstance(cache, DynamicCache) and all(
        isinstance(layer, DynamicLayer) for layer in cache.layers
    )
    if plain and window <= 4096:
        whole = [loglik(model, [(start + prompt, part)])[0] for prompt, part in after]
        ways["shared_examples"] = close(loglik(model, after, start), whole)
    single = torch.cat([first_logits(model, [prompt]) for prompt in prompts])
    ways["batched_generation"] = window <= 4096 and close(first_logits(model, prompts), single)
    for way, works in ways.items():
        if not works:
            print(f"{way}: not the same as one by one for {config.model_type}; one by one instead")
    return ways


def batches(sizes, budget):
    """Return indices in batches of at most `budget` tokens with padding, longest first."""
    found = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if found and (len(found[-1]) + 1) * sizes[found[-1][0]] <= budget:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def divide(task, members, ways, args):
    """Return the items of one task, side and run in batches.

    Items that share their examples are together. Scoring keeps logits at many tokens: it gets a
    smaller part of the budget.
    """
    scoring = bool(members[0][2])
    alike = [members]
    if task in SHOTS:
        alike = group(members, lambda item: (item[0]["domain"], item[0]["shots"])).values()
    budget = args.batch_tokens
    if not ways["batched_scoring" if scoring else "batched_generation"]:
        budget = 0
    if task in SHOTS and not ways["shared_examples"]:
        budget = 0
    more = CHAT_TOKENS if task == "chat" else args.max_new_tokens
    found = []
    for some in alike:
        sizes = []
        for _, prompt, parts in some:
            rows = len(parts) if task == "mcq" else 1
            longest = max(map(len, parts)) if scoring else more
            sizes.append(rows * (len(prompt) + longest))
        part = budget // 8 if scoring and task not in SHOTS else budget
        found += [[some[i] for i in batch] for batch in batches(sizes, part)]
    return found


def score_rows(model, batch, ways):
    """Return [log-likelihood of each continuation] of each item of a batch."""
    prompts = [prompt for _, prompt, _ in batch]
    shared = 0
    if batch[0][0]["task"] in SHOTS and len(batch) > 1 and ways["shared_examples"]:
        shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    rows = [(prompt[shared:], part) for _, prompt, parts in batch for part in parts]
    if ways["batched_scoring"]:
        found = loglik(model, rows, prompts[0][:shared])
    else:
        found = [loglik(model, [row])[0] for row in rows]
    sums = iter(found)
    return [[next(sums) for _ in parts] for _, _, parts in batch]


def answer(model, batch, ways, args, ends, newlines):
    """Return log-likelihoods or new token ids for each item of a batch."""
    task, prompts = batch[0][0]["task"], [prompt for _, prompt, _ in batch]
    if batch[0][2]:
        return score_rows(model, batch, ways)
    if task == "chat":
        return generate(model, prompts, CHAT_TOKENS, ends, GREEDY)
    sampling = GREEDY if args.greedy else SAMPLING
    return generate(model, prompts, args.max_new_tokens, ends + newlines, sampling)  # Table 9


# Metrics


def trigrams(text):
    """Return [(word, its character trigrams), ...]; a word is lower-case letters and marks."""
    words = []
    for word in text.lower().split():
        word = "".join(c for c in word if unicodedata.category(c)[0] in "LM")
        if word:
            words.append((word, [f" {word} "[i : i + 3] for i in range(len(word))]))
    return words


def english_odds(data):
    """Return {trigram: log-odds of English against the target}: add-one smoothed naive Bayes."""
    counts = {"source": Counter(), "target": Counter()}
    for side, count in counts.items():
        for row in data[f"{side}/heldout"]:
            turns = row.get("messages") or [{"content": row.get("text")}]
            for turn in turns:
                for _, grams in trigrams(turn["content"]):
                    count.update(grams)
    english, target = counts.values()
    both = english | target
    prior = math.log((target.total() + len(both)) / (english.total() + len(both)))
    return {gram: math.log((english[gram] + 1) / (target[gram] + 1)) + prior for gram in both}


def chat_scores(text, odds):
    """Return the fraction of repeated word 4-grams, and letters in words more likely English."""
    words = text.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    english = letters = 0
    for word, found in trigrams(text):
        letters += len(word)
        english += len(word) if sum(odds.get(gram, 0.0) for gram in found) > 0 else 0
    repetition = 1 - len(set(grams)) / len(grams) if grams else 0.0
    return {"repetition": repetition, "letters": letters, "english_letters": english}


def score(saved, found, tokenizer, ends, odds):
    """Return the record with `prediction` and `scores`, given log-likelihoods or new ids."""
    if saved["task"] == "bpb":
        return saved | {"prediction": None, "scores": {"nats": -found[0]}}
    if saved["task"] in ("mcq", "mrc", "mmlu"):
        values = found
        if saved["task"] == "mcq":
            sizes = [len(option.encode()) for option in saved["options"]]
            values = [nats / size for nats, size in zip(found, sizes, strict=True)]
        best = [letter for letter, x in zip("ABCD", values, strict=True) if x == max(values)]
        correct = (saved["reference"] in best) / len(best)  # a tie counts 1/k
        return saved | {"prediction": best[0], "scores": {"correct": correct, "loglik": found}}
    text, scores = tokenizer.decode(found, skip_special_tokens=True), {"stopped": found[-1] in ends}
    if saved["task"] == "chat":
        return saved | {"prediction": text.strip(), "scores": scores | chat_scores(text, odds)}
    from sacrebleu.metrics import CHRF

    text = text.split("\n")[0].strip()
    scores["chrf"] = CHRF(word_order=2).sentence_score(text, [saved["reference"]]).score
    return saved | {"prediction": text, "scores": scores}


def group(values, key):
    found = {}
    for value in values:
        found.setdefault(key(value), []).append(value)
    return found


def bits_per_byte(records):
    nats = math.fsum(r["scores"]["nats"] for r in records)
    tokens, size = sum(r["tokens"] for r in records), sum(r["bytes"] for r in records)
    found = {"bpb": nats / math.log(2) / size, "nats_per_token": nats / tokens, "tokens": tokens}
    return found | {"bytes": size, "documents": sum(r["bytes"] > 0 for r in records)}


def accuracy(records):
    """Return accuracy with Wilson's 95% interval, which holds for few items and near 0 and 1."""
    n, p, z2 = len(records), statistics.fmean(r["scores"]["correct"] for r in records), 1.96**2
    half = 1.96 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    interval = [(p + z2 / (2 * n) + d) / (1 + z2 / n) for d in (-half, half)]
    return {"accuracy": p, "n": n, "interval95": interval}


def chrf_mean(records):
    return statistics.fmean(r["scores"]["chrf"] for r in records)


def chrf_scores(records):
    """Return chrF++ as the mean over sentences (the paper's) and over the corpus."""
    from sacrebleu.metrics import CHRF

    metric, found = CHRF(word_order=2), []
    for run in group(records, lambda r: r["run"]).values():
        references = [[r["reference"] for r in run]]
        corpus = metric.corpus_score([r["prediction"] for r in run], references).score
        found.append({"chrf": chrf_mean(run), "chrf_corpus": corpus})
    means = [run["chrf"] for run in found]
    items = [chrf_mean(item) for item in group(records, lambda r: r["id"]).values()]
    half = 1.96 * statistics.stdev(items) / math.sqrt(len(items)) if len(items) > 1 else 0.0
    mean = statistics.fmean(means)
    domains = group([r for r in records if r["domain"]], lambda r: r["domain"])
    by_domain = {k: {"chrf": chrf_mean(v), "n": len(v) // len(found)} for k, v in domains.items()}
    return {
        "chrf": mean,
        "interval95": [mean - half, mean + half],
        "chrf_corpus": statistics.fmean(run["chrf_corpus"] for run in found),
        "sd_over_runs": statistics.stdev(means) if len(means) > 1 else 0.0,
        "n": len(items),
        "runs": found,
        "domains": by_domain,
        "signature": str(metric.get_signature()),
    }


def chat_summary(records):
    scores = [r["scores"] for r in records]
    letters = max(1, sum(s["letters"] for s in scores))
    answers = []
    for r in records:
        answers.append({"prompt": r["question"], "answer": r["prediction"], **r["scores"]})
    return {
        "stop_rate": statistics.fmean(s["stopped"] for s in scores),
        "repetition": statistics.fmean(s["repetition"] for s in scores),
        "english_share": sum(s["english_letters"] for s in scores) / letters,
        "n": len(records),
        "answers": answers,
    }


def choice_summary(records):
    subjects = group([r for r in records if r["domain"]], lambda r: r["domain"])
    found = accuracy(records)
    if records[0]["task"] in SHOTS:
        found["shots"] = statistics.fmean(r["shots"] for r in records)
    found["subjects"] = {name: accuracy(rows) for name, rows in subjects.items()}
    apart = [r for r in records if r.get("shared_stem") is False]
    if apart:
        found["without_shared_stem"] = accuracy(apart)
    return found


def bpb_summary(records):
    sets = group(records, lambda r: r["set"])
    sets |= group([r for r in records if r["domain"]], lambda r: f"{r['set']}.{r['domain']}")
    return {name: bits_per_byte(rows) for name, rows in sets.items()}


def summarize(records):
    """Return `results` of eval.json."""
    results = {}
    for (task, side), chosen in group(records, lambda r: (r["task"], r["side"])).items():
        if task == "chat":
            results[task] = chat_summary(chosen)
            continue
        metric = {"bpb": bpb_summary, "mt": chrf_scores, "sum": chrf_scores}
        results.setdefault(task, {})[side] = metric.get(task, choice_summary)(chosen)
    return results


# Command line, resume, main


def whole(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def task_list(text):
    asked = text.split(",")
    if set(asked) - set(TASKS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of some of {','.join(TASKS)}")
    return [task for task in TASKS if task in asked]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        "evaluate.py",
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    codes = [code for code in read_languages() if code != "en"]
    add("--model", required=True, help="directory or hub id of an instruct model")
    add("--lang", required=True, choices=codes, help="target language, of data/languages.json")
    add("--data-dir", required=True, help="directory with en/ and one for each target language")
    add("--out", required=True, help="file to write, eval.json")
    add(
        "--tasks",
        type=task_list,
        default=["bpb", "mcq", "mt", "chat"],
        help=f"some of {','.join(TASKS)} (default: bpb,mcq,mt,chat)",
    )
    add("--num-samples", type=whole, default=500, help="items of each set at most (default: 500)")
    add("--num-questions", type=whole, help="questions of mrc and mmlu at most (default: all)")
    add("--runs", type=whole, default=3, help="sampled runs of mt and sum (default: 3)")
    add("--greedy", action="store_true", help="one run without sampling and repetition penalty")
    add("--few-shots", type=int, choices=range(21), metavar="N", default=3, help="examples in mt")
    add("--max-new-tokens", type=whole, default=128, help="tokens of an answer (default: 128)")
    add("--batch-tokens", type=whole, default=8192, help="tokens of a batch, padding included")
    add("--max-length", type=whole, default=1024, help="tokens of a window in bpb (default: 1024)")
    add("--seed", type=int, default=42, help="seed of items, examples and samples (default: 42)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: by device")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if present")
    args = parser.parse_args(argv)
    if args.max_length < 16:
        fail("--max-length is below 16; give at least 16")
    if not 0 <= args.seed < 2**32:
        fail("--seed must be at least 0 and below 2^32")
    args.runs = 1 if args.greedy else args.runs
    args.languages, args.context = read_languages(), math.inf
    return args


def choose_device(args):
    import torch

    cuda = torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        fail("--device cuda: torch finds no CUDA device; leave --device out")
    if args.device == "auto":
        args.device = "cuda" if cuda else "cpu"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device == "cuda" else "float32"


def key_of(saved):
    return saved["task"], saved["side"], saved["run"], saved["id"]


def dump(value):
    return json.dumps(value, ensure_ascii=False) + "\n"


def lock(stem):
    """Return an open file that keeps other processes from this --out."""
    os.makedirs(os.path.dirname(os.path.abspath(stem)), exist_ok=True)
    file = open(stem + ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process writes {stem}.json; wait for it or choose another --out")
    return file


def check_out(path, form):
    """Refuse to overwrite a file that this script did not write."""
    if os.path.isdir(path):
        fail(f"--out {path} is a directory; name the file, eval.json")
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        start = file.read(200)
    if f'"format": "{form}"' not in start:
        fail(f"{path} exists and evaluate.py did not write it; choose another --out")


def read_items(path, header):
    """Return the ways and {key: record} of an interrupted run with the same header."""
    if not os.path.exists(path):
        return None, {}
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.endswith("\n")]
    try:
        first, *found = map(json.loads, lines)
        ways = first.pop("ways")
        if first == header:
            return ways, {key_of(saved): saved for saved in found}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{path} is damaged ({error}); delete it, or the line, to have that done again")
    print(f"{path} is of other settings, data, model, machine or versions: starting afresh")
    return None, {}


def make_header(args, model_sha256, data_sha256):
    import sacrebleu
    import torch
    import transformers

    names = ("tasks", "num_samples", "num_questions", "runs", "greedy", "few_shots")
    names += ("max_new_tokens", "batch_tokens", "max_length", "seed", "dtype", "device")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"model_sha256": model_sha256, "data_sha256": data_sha256}
    settings |= {"date": str(DATE.date()), "enable_thinking": False}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "sacrebleu": sacrebleu.__version__}
    versions |= {"cpu": torch.backends.cpu.get_cpu_capability()}
    versions |= {"threads": str(torch.get_num_threads())}
    script = hashlib.sha256()
    for path in (__file__, LANGUAGES):  # prompts and decoding are in these
        with open(path, "rb") as file:
            script.update(file.read())
    header = {"format": "ssu-eval-items", "version": 2, "lang": args.lang, "settings": settings}
    return header | {"versions": versions, "script": script.hexdigest()}


def plan(data, tokenizer, args):
    """Return all items, in a fixed order. Batches and seeds follow from it alone."""
    items = []
    for task in args.tasks:
        items += TASKS[task](data, tokenizer, args)
    keys = [key_of(saved) for saved, _, _ in items]
    if len(set(keys)) < len(keys):
        fail(f"two items have the same id: {Counter(keys).most_common(1)[0][0]}")
    unknown = tokenizer.unk_token_id
    if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        unknown = None
    total = lost = 0
    for saved, prompt, parts in items:
        if saved["task"] != "bpb" and not all(parts):
            fail(f"{key_of(saved)}: an option is no token at all; remove the question")
        for ids in (prompt, *parts):
            total += len(ids)
            lost += ids.count(unknown)
    if lost:
        print(f"{lost / total:.3%} of the tokens are <unk>")
    if lost > 0.01 * total:
        fail(f"{lost / total:.1%} of the tokens are <unk>; the tokenizer does not know the script")
    return items


def make_batches(items, done, ways, args, limit):
    """Return [(seed, index, batch)] with an item to do; a batch is done whole or not at all."""
    todo = []
    for (task, side, run), members in group(items, lambda item: key_of(item[0])[:3]).items():
        found = divide(task, members, ways, args)
        left = []
        for index, batch in enumerate(found):
            if any(key_of(item[0]) not in done for item in batch):
                left.append((args.seed + run, index, batch))
        print(
            f"{task} {side}, run {run}: {len(members)} items, {len(left)} of {len(found)} batches"
        )
        few = sum(r["shots"] < SHOTS[task] for r, _, _ in members) if task in SHOTS else 0
        if few:
            print(f"  {few} with fewer than {SHOTS[task]} examples: the context is too short")
        long = sum(len(prompt) >= limit for _, prompt, _ in members)
        if long:
            print(f"  {long} longer than the {limit} tokens that the model was made for")
        todo += left
    return todo


def run(args, folder, config, tokenizer, data, items, header, items_path):
    """Do what is left to do; return the header with the ways used, and all records."""
    import torch
    from tqdm import tqdm

    # What is done, and what is left.
    ways, done = read_items(items_path, header)
    if any(key_of(saved) not in done for saved, _, _ in items):
        model, ends, newlines = load_model(folder, tokenizer, args.dtype, args.device)
        ways = ways or try_batches(model, config, args.context)
    todo = make_batches(items, done, ways, args, args.context)
    header = header | {"ways": ways}
    write_atomically(items_path, "".join(map(dump, [header, *done.values()])))
    odds = english_odds(data) if "chat" in args.tasks else None

    # Each batch has its own seed: an interrupted run samples what a whole one does.
    bar = tqdm(total=sum(len(batch) for _, _, batch in todo), unit="item", disable=not todo)
    with open(items_path, "a", encoding="utf-8") as file, bar:
        for seed, index, batch in todo:
            bar.set_description(f"{batch[0][0]['task']} {batch[0][0]['side']}")
            torch.manual_seed(seed * 1_000_003 + index)
            found = answer(model, batch, ways, args, ends, newlines)
            for (saved, _, _), values in zip(batch, found, strict=True):
                finished = score(saved, values, tokenizer, ends, odds)
                done[key_of(saved)] = finished
                file.write(dump(finished))
            file.flush()
            bar.update(len(batch))

    # In the order of the plan.
    records = [done[key_of(saved)] for saved, _, _ in items]
    write_atomically(items_path, "".join(map(dump, [header, *records])))
    return header, records


def main(argv=None):
    args = parse_args(argv)
    try:
        evaluate(args)
    except OSError as error:  # a full disk, a directory that cannot be written
        fail(f"{error.filename or ''} {error.strerror or error}")
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None


def evaluate(args):
    started = time.monotonic()
    stem = os.path.splitext(args.out)[0]
    items_path = stem + ".items.jsonl"
    check_out(args.out, "ssu-eval")
    check_out(items_path, "ssu-eval-items")
    data, data_sha256, origin = read_data(args.data_dir, args.lang, args.tasks)
    folder, model_sha256 = find_model(args.model)
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    choose_device(args)
    config, tokenizer = load_tokenizer(folder)
    args.context = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    items = plan(data, tokenizer, args)

    print(f"{args.model} on {args.device} in {args.dtype}, batches of {args.batch_tokens} tokens")
    header = make_header(args, model_sha256, data_sha256)
    with lock(stem):
        header, records = run(args, folder, config, tokenizer, data, items, header, items_path)

    device = platform.machine() + " CPU"
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
    content = {"format": "ssu-eval", "version": 1, "model": args.model, "lang": args.lang}
    content |= {"settings": header["settings"] | header["ways"], "data": origin}
    content |= {"versions": header["versions"], "device": device, "git_commit": git_commit()}
    content |= {"seconds": round(time.monotonic() - started, 1), "results": summarize(records)}
    write_atomically(args.out, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    print(f"wrote {args.out}; every item is in {items_path}")
    print("next: python tools/report.py DIRECTORY, with that of the source model's evaluation")


if __name__ == "__main__":
    main()
