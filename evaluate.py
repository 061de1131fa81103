"""Measure what a model keeps of its source language (English) and gains in the target language (Section 4.5).

    bpb   bits per byte of held-out text; of an English chat, the last answer is scored
    mcq   multiple choice: the option with the highest log-likelihood per byte
    mt    machine translation: mean chrF++ over sentences, with Table 7's prompts and Table 9's decoding
    chat  fixed English prompts: does the model stop by itself, repeat itself, still answer in English?

`source` is English (in mt: X to English) and `target` the new language (in mt: English to X), as in the paper.
One GPU, the paper's decoding:
    python evaluate.py --model runs/ne/fft/model --lang ne --data-dir runs/data --out runs/ne/fft/eval.json
Tiny, on a CPU, in a minute or two: the same with --num-samples 100 --greedy --max-new-tokens 48
Then table and picture; with several run folders (one for each seed), mean and standard deviation:
    python evaluate.py --report runs/ne

Every finished item goes to eval.items.jsonl beside eval.json, with its prompt, prediction and scores. The same command
repeated goes on from there, and ends with the very results of a run that was never interrupted.
"""

import argparse
import hashlib
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

# torch, transformers, sacrebleu: imported where they are used, so that bad input and --report do not wait for them.

LANGUAGES = {"ne": ("Nepali", "npi_Deva"), "ky": ("Kyrgyz", "kir_Cyrl"), "am": ("Amharic", "amh_Ethi"),
             "ha": ("Hausa", "hau_Latn"), "ig": ("Igbo", "ibo_Latn")}  # name in prompts, column in FLORES
# Table 7, MT, word for word: (X-En, En-X). X-En is asked with the English row, En-X with the target language's.
TEMPLATES = {
    "en": ("Translate {X} to English: {sentence} =", "Translate English to {X}: {sentence} ="),
    "ne": ("नेपालीलाई अङ्ग्रेजीमा अनुवाद गर्नुहोस्: {sentence} =", "अङ्ग्रेजीलाई नेपालीमा अनुवाद गर्नुहोस्: {sentence} ="),
    "ky": ("Кыргызчадан англисчеге которуу: {sentence} =", "Англисчеден кыргызчага которуу: {sentence} ="),
    "am": ("እማርኛን ወደ እንግሊዝኛ ተርጉሞ: {sentence} =", "እንግሊዝኛን ወደ እማርኛ ተርጉሞ: {sentence} ="),
    "ha": ("Fassara Hausa zuwa Turanci: {sentence} =", "Fassara Turanci zuwa Hausa: {sentence} ="),
    "ig": ("Sùgharịa Igbo gaa na Bekee: {sentence} =", "Sùgharịa Bekee gaa n'Igbo: {sentence} ="),
}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1}  # Table 9
CHAT_PROMPTS = (
    "Why do leaves change colour in autumn? Answer in two or three sentences.",
    "What is the capital of France? Answer in one sentence.",
    "How do I make a cup of tea?",
    "Write a short, polite message asking a neighbour to turn the music down.",
    "I could not sleep last night. What can I do this evening?",
    "Name three things to pack for a day in the mountains, and say why.",
)
TASKS = {  # what each one reads below --data-dir
    "bpb": ("en/heldout", "LANG/heldout", "en/prose", "en/news"),  # prose and news only where they exist
    "mcq": ("en/mmlu.test", "LANG/mmlu.test"),
    "mt": ("LANG/flores.dev", "LANG/flores.devtest"),
    "chat": ("en/heldout", "LANG/heldout"),  # to tell the languages apart
}
OPTIONS = ("option_a", "option_b", "option_c", "option_d")
NAMES = {"source": "Source", "fft": "FFT", "ssu-rand": "SSU-Rand", "ssu-mag": "SSU-Mag", "ssu-wanda": "SSU-Wanda"}
COLUMNS = (  # of the report: side, heading (the arrow points to the better value), where in `results`, digits
    ("source", "chat bpb ↓", "bpb/source/heldout/bpb", 3), ("source", "prose bpb ↓", "bpb/source/prose/bpb", 3),
    ("source", "news bpb ↓", "bpb/source/news/bpb", 3), ("source", "MCQ accuracy ↑", "mcq/source/accuracy", 3),
    ("source", "MT X→en chrF++ ↑", "mt/source/chrf", 2), ("source", "stop rate ↑", "chat/stop_rate", 2),
    ("source", "repetition ↓", "chat/repetition", 2), ("source", "English share ↑", "chat/english_share", 2),
    ("target", "bpb ↓", "bpb/target/heldout/bpb", 3), ("target", "MCQ accuracy ↑", "mcq/target/accuracy", 3),
    ("target", "MT en→X chrF++ ↑", "mt/target/chrf", 2),
)


def fail(message):
    print("evaluate.py: error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def read_rows(path, columns):
    """Rows of a jsonl file, each with a value in every column; where text is asked for, a chat in `messages` will do."""
    if not os.path.isfile(path):
        fail(f"{path} does not exist: --data-dir names a folder with en/ and a folder for each target language")
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                turns = [(turn["role"], turn["content"] + "") for turn in row.get("messages") or ()]
            except ValueError as error:
                fail(f"{path}: line {number} is not JSON ({error})")
            except (AttributeError, KeyError, TypeError):
                fail(f"{path}: line {number} is not an object, or its `messages` are not {{role, content}} turns")
            for column in columns:
                if row.get(column) in (None, "") and not (column == "text" and turns):
                    fail(f"{path}: line {number} has no `{column}`")
            if turns and [role for role, _ in turns[-2:]] != ["user", "assistant"]:
                fail(f"{path}: line {number}: `messages` must end with a user's turn and the assistant's answer")
            if "answer" in columns and row["answer"] not in ("A", "B", "C", "D"):
                fail(f"{path}: line {number}: `answer` must be A, B, C or D, not {row['answer']!r}")
            rows.append(row)
    return rows or fail(f"{path} is empty")


def read_data(folder, lang, tasks):
    """What the tasks need, checked: {"source/heldout": rows, "target/flores.dev": rows, ...}, and a sha256 of it all."""
    data, digest, flores = {}, hashlib.sha256(), ("id", "eng_Latn", LANGUAGES[lang][1])
    columns = {"mmlu.test": ("sample_id", "subject", "question", *OPTIONS, "answer"),
               "flores.dev": flores, "flores.devtest": flores}
    for name in dict.fromkeys(name for task in tasks for name in TASKS[task]):
        path, base = os.path.join(folder, name.replace("LANG", lang) + ".jsonl"), name.split("/")[1]
        if base in ("prose", "news") and not os.path.exists(path):
            continue
        name = name.replace("en/", "source/").replace("LANG/", "target/")
        data[name] = read_rows(path, columns.get(base, ("text",)))
        with open(path, "rb") as file:
            digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return data, digest.hexdigest()


def find_model(name):
    """(local folder of a Hugging Face checkpoint, sha256 of its files). The hub is asked for nothing but `owner/name`."""
    folder, kinds = os.path.expanduser(name), (".safetensors", ".json", ".jinja", ".model", ".txt")
    if not os.path.isdir(folder):
        if not re.fullmatch(r"[\w-]+/[\w.-]+", name) or os.path.isdir(name.split("/")[0]):
            fail(f"model {name} does not exist")
        from huggingface_hub import snapshot_download
        try:
            folder = snapshot_download(name, allow_patterns=["*" + kind for kind in kinds])
        except (OSError, ValueError) as error:
            fail(f"model {name} is not a local folder, and the hub did not give it: {error}")
    files, digest = sorted(f for f in os.listdir(folder) if f.endswith(kinds)), hashlib.sha256()
    for needed in ("config.json", "tokenizer_config.json", ".safetensors"):
        if not any(f.endswith(needed) for f in files):
            fail(f"model {name} is not a checkpoint that can be evaluated: it has no {needed}")
    for file_name in files:
        with open(os.path.join(folder, file_name), "rb") as file:
            digest.update(file_name.encode() + hashlib.file_digest(file, "sha256").digest())
    return folder, digest.hexdigest()


def write_atomically(path, text):
    """Neither a reader nor a full disk ever meets half a file."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def encode(tokenizer, text):
    """Adds nothing: a chat template writes its own BOS, and a second one would change every number."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def render(tokenizer, messages):
    """A chat as text, up to where an answer would begin, or to the end of the answer that is there."""
    asked = messages[-1]["role"] != "assistant"
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)


def plan(data, tokenizer, lang, settings):
    """Everything to ask, in a fixed order: (record to be saved, prompt ids, [continuation ids, ...] to score)."""
    def sample(rows):
        order = random.Random(settings["seed"]).sample(range(len(rows)), min(settings["num_samples"], len(rows)))
        return [rows[i] for i in sorted(order)]

    def record(task, side, name, domain, prompt, reference, **more):
        return {"task": task, "side": side, "run": 0, "id": name, "domain": domain, "prompt": prompt,
                "reference": reference} | more

    # raw text follows the beginning-of-text token, or end-of-text where a model has only that
    start = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    size, tasks = settings["max_length"], settings["tasks"]
    texts = [name for name in data if name.split("/")[1] in ("heldout", "prose", "news")] if "bpb" in tasks else ()
    for side, base, number, row in ((*name.split("/"), i, row) for name in texts for i, row in enumerate(sample(data[name]), 1)):
        prompt, text, said, ids = "", row.get("text"), row.get("text"), start
        if row.get("messages"):
            said, prompt = row["messages"][-1]["content"], render(tokenizer, row["messages"][:-1])
            whole = render(tokenizer, row["messages"])
            if not whole.startswith(prompt):
                fail(f"{side}/{base}, row {number}: the chat template rewrites earlier turns, so no answer can be scored")
            # scored up to the end-of-turn token; the line break that some templates put after it is not said
            text, ids = whole[len(prompt):].rstrip(), encode(tokenizer, prompt)
        # Windows of `size` tokens that score each token once; all but the first see one token of context, as is usual.
        # The bytes are those of what is said, without the end of turn; the first window counts them for the document.
        tokens, ids = encode(tokenizer, text), ids[-(size // 2):]
        cuts = [0, *range(size - len(ids), len(tokens), size - 1), len(tokens)]
        for a, b in zip(cuts, cuts[1:], strict=False):
            yield (record("bpb", side, f"{base}:{number}:{a}", row.get("domain"), None if a else prompt, None if a else text,
                          set=base, tokens=b - a, bytes=0 if a else len(said.encode())),
                   tokens[a - 1:a] if a else ids, [tokens[a:b]])
    for side in ("source", "target") if "mcq" in tasks else ():
        # Source: a chat, of which the option is the answer. Target: plain text, as the adapted models have seen no other.
        chat = side == "source"
        for row in sample(data[f"{side}/mmlu.test"]):
            prompt, options = row["question"], [str(row[option]) for option in OPTIONS]
            prompt = render(tokenizer, [{"role": "user", "content": prompt}]) if chat else prompt
            yield (record("mcq", side, row["sample_id"], row["subject"], prompt, row["answer"], options=options,
                          shared_stem=row.get("shared_stem")),
                   ([] if chat else start) + encode(tokenizer, prompt),
                   [encode(tokenizer, option if chat else " " + option) for option in options])
    if "mt" in tasks:
        if len(data["target/flores.dev"]) < settings["few_shots"]:
            fail(f"{lang}/flores.dev.jsonl has fewer rows than --few-shots {settings['few_shots']}")
        shots = random.Random(settings["seed"]).sample(data["target/flores.dev"], settings["few_shots"])
        name, code = LANGUAGES[lang]
        for side, template, origin, goal in (("source", TEMPLATES["en"][0], code, "eng_Latn"),
                                             ("target", TEMPLATES[lang][1], "eng_Latn", code)):
            chat = []  # the few-shots, alike for all items, then the item
            for row in shots + sample(data["target/flores.devtest"]):
                chat.append({"role": "user", "content": template.format(X=name, sentence=row[origin])})
                if len(chat) < 2 * len(shots):
                    chat.append({"role": "assistant", "content": row[goal]})
                    continue
                prompt = render(tokenizer, chat)
                chat.pop()
                for run in range(settings["runs"]):
                    yield (record("mt", side, row["id"], row.get("domain"), prompt, row[goal]) | {"run": run},
                           encode(tokenizer, prompt), [])
    for number, question in enumerate(CHAT_PROMPTS) if "chat" in tasks else ():
        prompt = render(tokenizer, [{"role": "user", "content": question}])
        yield record("chat", "source", number, None, prompt, None, question=question), encode(tokenizer, prompt), []


def batches(sizes, budget):
    """Indices in batches of at most `budget` tokens with padding, longest first: like lengths share a batch, and a budget
    too large for the memory shows at once. Nothing else decides, so that a resumed run meets the same batches."""
    found = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if found and (len(found[-1]) + 1) * sizes[found[-1][0]] <= budget:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def loglik(model, rows):
    """Log-likelihood in nats, summed over its tokens, of each continuation: [(prompt ids, [ids, ...]), ...] -> [[float, ...], ...]

    A row is [pad | prompt | continuation 1 | continuation 2 | ...], and every continuation sees the prompt and itself, at the
    positions it would have alone: the options of a question cost one pass over the question. The padding is on the left because
    then what is scored stands last in each row, and logits_to_keep spares the rest the output matrix, in any architecture.
    """
    import torch
    length = max(len(prompt) + sum(map(len, parts)) for prompt, parts in rows)
    keep = 1 + max(sum(map(len, parts)) for _, parts in rows)  # the last token of the prompt predicts, too
    ids, position = torch.zeros(2, len(rows), length, dtype=torch.long)  # each [rows, length]
    segment = torch.full((len(rows), length), -1)  # -1 padding, 0 prompt, 1... continuations
    for r, (prompt, parts) in enumerate(rows):
        at = length - len(prompt) - sum(map(len, parts))
        ids[r, at:] = torch.tensor(prompt + sum(parts, []))
        position[r, at:] = torch.tensor([*range(len(prompt)), *(len(prompt) + j for p in parts for j in range(len(p)))])
        segment[r, at:] = torch.tensor([0] * len(prompt) + [k for k, part in enumerate(parts, 1) for _ in part])
    if all(len(parts) == 1 for _, parts in rows):
        mask = (segment >= 0).long()  # ordinary causal attention: left to the model, sliding windows included
    else:
        query, key = segment[:, None, :, None], segment[:, None, None, :]
        seen = ((query == key) | (key == 0)).tril()  # [rows, 1, query, key]; padding sees padding, no softmax is empty
        mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill_(~seen, torch.finfo(model.dtype).min)
    ids, mask, position = (x.to(model.device) for x in (ids, mask, position))
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False,
                       logits_to_keep=keep).logits  # [rows, keep, vocabulary]
        result = []
        for r, (_, parts) in enumerate(rows):
            ends = [keep - sum(map(len, parts[k:])) for k in range(len(parts) + 1)]  # of prompt and continuations, in `logits`
            # a token is predicted by the one before it, the first of each continuation by the prompt's last
            by = [i for a, b in zip(ends, ends[1:], strict=False) for i in [ends[0] - 1, *range(a, b - 1)]]
            token = torch.tensor(sum(parts, []), device=logits.device)
            picked = logits[r, by].float().log_softmax(-1).gather(1, token[:, None])[:, 0].double()  # [tokens]
            result.append([float(part.sum()) for part in picked.split([len(part) for part in parts])])
    return result


def generate(model, prompts, max_new_tokens, stop_ids, sampling):
    """New token ids for each prompt, up to and including the first of `stop_ids`; greedy where `sampling` is empty.

    What all prompts begin with (system turn, few-shots) is computed once. The padding stands between it and the rest, masked,
    and repeats the prompt's first token: the repetition penalty then counts the same tokens as without padding.
    """
    import torch
    shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    length = max(map(len, prompts))
    ids = torch.tensor([p[:shared] + p[:1] * (length - len(p)) + p[shared:] for p in prompts], device=model.device)
    mask = torch.tensor([[1] * shared + [0] * (length - len(p)) + [1] * (len(p) - shared) for p in prompts])
    with torch.inference_mode():
        cache = None
        if shared:
            cache = model(input_ids=ids[:1, :shared], use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(len(prompts))
        new = model.generate(ids, attention_mask=mask.to(model.device), past_key_values=cache, eos_token_id=stop_ids,
                             pad_token_id=stop_ids[0], max_new_tokens=max_new_tokens, **sampling)[:, length:].tolist()
    ends = [next((i + 1 for i, token in enumerate(answer) if token in stop_ids), len(answer)) for answer in new]
    return [answer[:end] for answer, end in zip(new, ends, strict=True)]


def trigrams(text):
    """[(word, its character trigrams), ...]: a word is lower-case letters with the marks that belong to them."""
    found = ("".join(c for c in word if unicodedata.category(c)[0] in "LM") for word in text.lower().split())
    return [(word, [f" {word} "[i:i + 3] for i in range(len(word))]) for word in found if word]


def english_odds(english, target):
    """Naive Bayes, add-one smoothed: {trigram: log-odds of English against the target language} from two lists of texts."""
    a, b = (Counter(g for t in texts for _, grams in trigrams(t) for g in grams) for texts in (english, target))
    prior = math.log((b.total() + len(a | b)) / (a.total() + len(a | b)))
    return {gram: math.log((a[gram] + 1) / (b[gram] + 1)) + prior for gram in a | b}


def chat_scores(text, odds):
    """Repeats among the word 4-grams, and letters in words more likely English than target: a rough measure, as names fall on
    either side and no third language is known; trigrams seen in neither count for nothing."""
    grams = list(zip(*(text.split()[i:] for i in range(4)), strict=False))
    found = trigrams(text)
    return {"repetition": 1 - len(set(grams)) / len(grams) if grams else 0.0, "letters": sum(len(w) for w, _ in found),
            "english_letters": sum(len(w) for w, grams in found if sum(odds.get(g, 0.0) for g in grams) > 0)}


def score(record, answer, tokenizer, ends, odds):
    """The record with `prediction` and `scores`; answer: log-likelihoods (bpb, mcq) or new token ids (mt, chat)."""
    if record["task"] == "bpb":
        return record | {"prediction": None, "scores": {"nats": -answer[0]}}
    if record["task"] == "mcq":
        per_byte = [nats / len(option.encode()) for nats, option in zip(answer, record["options"], strict=True)]
        best = "ABCD"[per_byte.index(max(per_byte))]
        return record | {"prediction": best, "scores": {"correct": best == record["reference"], "loglik": answer}}
    text, scores = tokenizer.decode(answer, skip_special_tokens=True), {"stopped": answer[-1] in ends}
    if record["task"] == "chat":
        return record | {"prediction": text.strip(), "scores": scores | chat_scores(text, odds)}
    from sacrebleu.metrics import CHRF
    text = text.split("\n")[0].strip()
    scores["chrf"] = CHRF(word_order=2).sentence_score(text, [record["reference"]]).score
    return record | {"prediction": text, "scores": scores}


def accuracy(records):
    """With Wilson's 95% interval, which stays honest for few items and near 0 and 1."""
    n, p = len(records), statistics.fmean(r["scores"]["correct"] for r in records)
    half, z2 = 1.96 * math.sqrt(p * (1 - p) / n + 1.96**2 / (4 * n * n)), 1.96**2 / n
    return {"accuracy": p, "n": n, "interval95": [(p + z2 / 2 + sign * half) / (1 + z2) for sign in (-1, 1)]}


def bits_per_byte(records):
    nats = math.fsum(r["scores"]["nats"] for r in records)
    tokens, size = sum(r["tokens"] for r in records), sum(r["bytes"] for r in records)
    return {"bpb": nats / math.log(2) / size, "nats_per_token": nats / tokens, "tokens": tokens, "bytes": size,
            "documents": sum(r["bytes"] > 0 for r in records)}


def group(records, key):
    found = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return found


def chrf_mean(records):
    return statistics.fmean(r["scores"]["chrf"] for r in records)


def summarise(records):
    """`results` of eval.json from all finished records."""
    from sacrebleu.metrics import CHRF
    results = {}
    for (task, side), chosen in group(records, lambda r: (r["task"], r["side"])).items():
        domains = {name: members for name, members in group(chosen, lambda r: r.get("domain")).items() if name}
        if task == "bpb":
            sets = group(chosen, lambda r: r["set"]) | group([r for r in chosen if r["domain"]],
                                                             lambda r: f"{r['set']}.{r['domain']}")
            found = {name: bits_per_byte(members) for name, members in sets.items()}
        elif task == "mcq":
            found = accuracy(chosen) | {"subjects": {name: accuracy(members) for name, members in domains.items()}}
            apart = [r for r in chosen if r["shared_stem"] is False]
            found |= {"without_shared_stem": accuracy(apart)} if apart else {}
        elif task == "mt":
            metric, runs = CHRF(word_order=2), group(chosen, lambda r: r["run"]).values()
            each = [{"chrf": chrf_mean(run), "chrf_corpus": metric.corpus_score(
                [r["prediction"] for r in run], [[r["reference"] for r in run]]).score} for run in runs]
            means = [chrf_mean(same) for same in group(chosen, lambda r: r["id"]).values()]
            half = 1.96 * statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
            found = {"chrf": chrf_mean(chosen), "chrf_corpus": statistics.fmean(run["chrf_corpus"] for run in each),
                     "interval95": [chrf_mean(chosen) - half, chrf_mean(chosen) + half], "n": len(means), "runs": each,
                     "sd_over_runs": statistics.stdev(run["chrf"] for run in each) if len(each) > 1 else 0.0,
                     "signature": str(metric.get_signature()),
                     "domains": {n: {"chrf": chrf_mean(m), "n": len(m) // len(each)} for n, m in domains.items()}}
        else:
            scores = [r["scores"] for r in chosen]
            results["chat"] = {
                "stop_rate": statistics.fmean(s["stopped"] for s in scores),
                "repetition": statistics.fmean(s["repetition"] for s in scores),
                "english_share": sum(s["english_letters"] for s in scores) / max(1, sum(s["letters"] for s in scores)),
                "n": len(chosen),
                "answers": [{"prompt": r["question"], "answer": r["prediction"], **r["scores"]} for r in chosen]}
            continue
        results.setdefault(task, {})[side] = found
    return results


def read_evals(folders):
    """{method: [eval.json of each run folder]}, known methods first. What cannot be compared is refused."""
    evals, first = {}, None
    for folder in folders:
        methods = os.listdir(folder) if os.path.isdir(folder) else ()
        methods = [m for m in [*NAMES, *sorted(set(methods) - set(NAMES))] if os.path.isfile(f"{folder}/{m}/eval.json")]
        if "source" not in methods:
            fail(f"{folder}/source/eval.json is missing: everything is relative to the source model, so evaluate it first")
        for method in methods:
            path = f"{folder}/{method}/eval.json"
            try:
                with open(path, encoding="utf-8") as file:
                    found = json.load(file)
                if (found["format"], found["version"]) != ("ssu-eval", 1):
                    raise ValueError("another format or version")
                settings = found["settings"] | {"lang": found["lang"], "folder": folder}
            except (ValueError, KeyError, TypeError) as error:
                fail(f"{path} cannot be read ({error}): remake it with evaluate.py --model ... --out {path}")
            first = first or (path, settings)
            if folder != first[1]["folder"]:  # another run folder may have another seed, alike within the folder
                first = (path, first[1] | {"seed": settings["seed"], "folder": folder})
            for key in settings.keys() - {"model_sha256"}:
                if settings[key] != first[1].get(key):
                    fail(f"{path} and {first[0]} differ in {key}: {settings[key]} and {first[1].get(key)}")
            evals.setdefault(method, []).append(found)
    return evals


def look_up(found, path):
    """A number of `results` by its path, None where the task was not evaluated."""
    for key in path.split("/"):
        found = (found or {}).get(key)
    return found


def report(folders, out):
    """report.md (printed, too) in the manner of Table 2, and report.png: source kept against target gained."""
    evals = read_evals(folders)
    one, sizes = evals["source"][0], []
    target = LANGUAGES[one["lang"]][0]
    value = {(m, c[2]): [look_up(e["results"], c[2]) for e in evals[m]] for m in evals for c in COLUMNS}
    value = {key: xs for key, xs in value.items() if None not in xs}
    mean = {key: statistics.fmean(xs) for key, xs in value.items()}
    lines = [f"# English kept, {target} gained", "", "In brackets: change relative to Source. "
             + f"{len(folders)} run folder(s)" + (", mean ± standard deviation." if len(folders) > 1 else "."), ""]
    for side, title in (("source", "English"), ("target", target)):
        columns = [c for c in COLUMNS if c[0] == side and ("source", c[2]) in value]
        table = [[title, *(heading for _, heading, _, _ in columns)]]
        for m in evals:
            table.append([NAMES.get(m, m) + (f" (n={len(evals[m])})" if len(evals[m]) < len(folders) else "")])
            for _, _, path, digits in columns:
                cell, xs = f"{mean[m, path]:.{digits}f}", value[m, path]
                cell += f" ± {statistics.stdev(xs):.{digits}f}" if len(xs) > 1 else ""
                change = 100 * (mean[m, path] / mean["source", path] - 1) if mean["source", path] else math.nan
                table[-1].append(cell + ("" if math.isnan(change) else f" ({change:+.1f}%)"))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        rows = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in table]
        lines += [rows[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *rows[1:], ""] if columns else []
        for _, heading, path, _ in columns:
            found = look_up(one["results"], path.rsplit("/", 1)[0])
            n = f"{found['documents']} documents, {found['tokens']} tokens" if "tokens" in found else f"{found['n']} items"
            sizes.append(f"{title} {heading[:-2]}: {n}")
    settings = " ".join(f"{key}={value}" for key, value in one["settings"].items())
    lines += ["n: " + "; ".join(sizes) + ".", "",
              f"Seeds: {', '.join(str(e['settings']['seed']) for e in evals['source'])}. Settings: {settings}.", "",
              "Models: " + "; ".join(f"{NAMES.get(m, m)} {e['model']}" for m in evals for e in evals[m]) + ".", "",
              f"Versions: {one['versions']}; {one['device']}; commit {one['git_commit']}.", ""]
    if "chat" in one["results"]:
        answers = {m: evals[m][0]["results"]["chat"]["answers"][0] for m in evals}
        lines += ["## One English prompt, answered by each model", "", "> " + answers["source"]["prompt"], ""]
        lines += [f"**{NAMES.get(m, m)}:** {' '.join(a['answer'].split())}\n" for m, a in answers.items()]
    write_atomically(os.path.join(out, "report.md"), "\n".join(lines))
    print("\n".join(lines))
    print("wrote", os.path.join(out, "report.md"))
    if ("source", "bpb/source/heldout/bpb") in value:
        picture(value, evals, target, os.path.join(out, "report.png"))


def git_commit():
    """The commit of this script, with -dirty where files have changed since; None outside a checkout."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty", "--abbrev=40"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def picture(value, evals, target, path):
    """x: target gained, the reduction of its bits per byte; y: source kept, bits per byte of Source over those of the method."""
    try:
        import matplotlib
    except ImportError:
        print("no report.png: it needs matplotlib (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
    source, gain = ([statistics.fmean(value["source", f"bpb/{side}/heldout/bpb"])] for side in ("source", "target"))
    for m in evals:
        y = [100 * source[0] / x for x in value[m, "bpb/source/heldout/bpb"]]
        x = [100 * (1 - x / gain[0]) for x in value[m, "bpb/target/heldout/bpb"]]
        dots = axes.scatter(statistics.fmean(x), statistics.fmean(y), s=60, zorder=3)
        if len(x) > 1:
            axes.scatter(x, y, s=10, color=dots.get_facecolor(), alpha=0.6)
        axes.annotate(NAMES.get(m, m), (statistics.fmean(x), statistics.fmean(y)), (6, 6), textcoords="offset points")
    axes.set_xlabel(f"{target} gained: reduction of bits per byte (%)")
    axes.set_ylabel("English kept: chat bits per byte, Source / method (%)")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    figure.savefig(path + ".tmp", format="png", dpi=150)
    os.replace(path + ".tmp", path)
    print("wrote", path)


def arguments(argv):
    def positive(text):
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
        return int(text)

    def task_names(text):
        if not text or set(text.split(",")) - set(TASKS):
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {','.join(TASKS)}, separated by commas")
        return [task for task in TASKS if task in text.split(",")]

    parser = argparse.ArgumentParser("evaluate.py", argparse.SUPPRESS, __doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--report", nargs="+", metavar="RUNS", help="run folders to make report.md and report.png of; nothing is evaluated")
    add("--model", help="folder of a Hugging Face checkpoint, or owner/name on the hub")
    add("--lang", choices=LANGUAGES, help="target language")
    add("--data-dir", help="folder of the evaluation data")
    add("--out", help="eval.json to write; with --report, the folder of the report (default: the first run folder)")
    add("--tasks", type=task_names, default=list(TASKS), help="some of bpb,mcq,mt,chat (default: all)")
    add("--num-samples", type=positive, default=500, help="documents of each bpb file, items of each mcq set and mt direction (default: 500)")
    add("--runs", type=positive, default=3, help="sampled mt runs, with seeds seed, seed+1, ... (default: 3)")
    add("--greedy", action="store_true", help="mt: one deterministic run, no sampling and no repetition penalty")
    add("--few-shots", type=int, choices=range(0, 21), metavar="N", default=3, help="mt examples (default: 3)")
    add("--max-new-tokens", type=positive, default=128, help="of each answer in mt and chat (default: 128)")
    add("--batch-tokens", type=positive, help="tokens in a batch, with padding (default: 8192)", default=8192)
    add("--max-length", type=positive, default=1024, help="tokens in a window of bpb (default: 1024)")
    add("--seed", type=int, default=42, help="draws items, few-shots and samples (default: 42)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on a GPU, else float32")
    add("--device", default="auto", help="auto: cuda where there is one, else cpu")
    args = parser.parse_args(argv)
    lacking = [] if args.report else [n for n in ("model", "lang", "data_dir", "out") if getattr(args, n) is None]
    if lacking:
        parser.error("needed: " + ", ".join("--" + name.replace("_", "-") for name in lacking) + " (or --report)")
    return args


def key_of(record):
    return record["task"], record["side"], record["run"], record["id"]


def dump(record):
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_items(path, header):
    """{key: record} that an interrupted run with the same header has finished; the line it was killed in is dropped."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.endswith("\n")]
    if lines[:1] == [dump(header)]:
        return {key_of(record): record for record in map(json.loads, lines[1:])}
    print(f"{path} was made with other settings, data, model or versions: starting afresh")
    return {}


def evaluate(args):
    """Section 4.5: ask the model everything that is not answered yet, then write eval.json."""
    started = time.monotonic()
    data, data_sha256 = read_data(args.data_dir, args.lang, args.tasks)
    folder, model_sha256 = find_model(args.model)
    import sacrebleu
    import torch
    import transformers
    from tqdm import tqdm
    transformers.logging.set_verbosity_error()
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = args.dtype if args.dtype != "auto" else "float32" if device == "cpu" else "bfloat16"
    settings = {"tasks": args.tasks, "num_samples": args.num_samples, "runs": 1 if args.greedy else args.runs,
                "greedy": args.greedy, "few_shots": args.few_shots, "max_new_tokens": args.max_new_tokens,
                "batch_tokens": args.batch_tokens, "max_length": args.max_length, "seed": args.seed, "dtype": dtype,
                "device": device, "model_sha256": model_sha256, "data_sha256": data_sha256}
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__, "sacrebleu": sacrebleu.__version__}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        fail(f"model {args.model} has no chat template: this evaluation is for instruct models")
    items = list(plan(data, tokenizer, args.lang, settings))
    keys = [key_of(record) for record, _, _ in items]
    if len(set(keys)) < len(keys):
        fail(f"two items have the same id: {Counter(keys).most_common(1)[0][0]}")

    # The plan alone decides the batches and their seeds, and a batch is done whole or not at all.
    header = {"format": "ssu-eval-items", "version": 1, "lang": args.lang, "settings": settings, "versions": versions}
    items_path = os.path.splitext(args.out)[0] + ".items.jsonl"
    done, todo, number = read_items(items_path, header), [], 0
    for (task, side, run), members in group(items, lambda item: key_of(item[0])[:3]).items():
        sizes, budget = [len(prompt) + sum(map(len, parts)) for _, prompt, parts in members], args.batch_tokens
        if task in ("mt", "chat"):  # the beginning that all share is computed once, and so not counted
            shared = len(os.path.commonprefix([prompt for _, prompt, _ in members]))
            sizes = [size - shared + args.max_new_tokens for size in sizes]
        else:  # scoring makes logits at every token, generating only at one of each row
            budget //= 4
        found = [[members[i] for i in batch] for batch in batches(sizes, budget)]
        left = [(args.seed + run, i, b) for i, b in enumerate(found) if any(key_of(item[0]) not in done for item in b)]
        todo, number = todo + left, number + len(found)
        print(f"{task} {side} run {run}: {len(members)} items, {sum(sizes)} tokens with room for answers, {len(found)} batches")
    print(f"{len(keys)} items in {number} batches of up to {args.batch_tokens} tokens, {len(todo)} to do; {device}, {dtype}")
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    write_atomically(items_path, "".join(map(dump, [header, *done.values()])))
    if todo:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), use_safetensors=True)
        model = model.to(device).eval()
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        end_of_turn = encode(tokenizer, tokenizer.apply_chat_template(chat, tokenize=False).rstrip())[-1]
        eos = model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        ends = sorted(ends | ({end_of_turn} & set(tokenizer.all_special_ids)))
        newlines = [i for i, t in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))])) if "\n" in t]
        model.generation_config = transformers.GenerationConfig()  # none of the model's own decoding settings
        texts = {side: [row.get("text") or " ".join(turn["content"] for turn in row["messages"])
                        for name, rows in data.items() if name == f"{side}/heldout" for row in rows] for side in ("source", "target")}
        odds = english_odds(texts["source"], texts["target"])
    with open(items_path, "a", encoding="utf-8") as file, tqdm(total=sum(len(b) for _, _, b in todo), unit="item") as bar:
        for seed, index, batch in todo:
            batch_records, prompts, parts = zip(*batch, strict=True)
            task = batch_records[0]["task"]
            bar.set_description(f"{task} {batch_records[0]['side']}")
            if task in ("bpb", "mcq"):
                answers = loglik(model, list(zip(prompts, parts, strict=True)))
            else:
                torch.manual_seed(seed * 1_000_003 + index)
                sampling = SAMPLING if task == "mt" and not args.greedy else {"do_sample": False}
                answers = generate(model, list(prompts), args.max_new_tokens, ends + (newlines if task == "mt" else []), sampling)
            for record, answer in zip(batch_records, answers, strict=True):
                done[key_of(record)] = score(record, answer, tokenizer, ends, odds)
            file.write("".join(dump(done[key_of(record)]) for record in batch_records))
            file.flush()
            bar.update(len(batch))

    records = [done[key] for key in keys]
    write_atomically(items_path, "".join(map(dump, [header, *records])))  # in the order of the plan, however it was reached
    results = summarise(records)
    write_atomically(args.out, json.dumps({
        "format": "ssu-eval", "version": 1, "model": args.model, "lang": args.lang, "settings": settings, "versions": versions,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine() + " CPU",
        "git_commit": git_commit(), "seconds": round(time.monotonic() - started, 1), "results": results},
        ensure_ascii=False, indent=1) + "\n")
    for _, heading, path, digits in COLUMNS:
        if look_up(results, path) is not None:
            print(f"{path:<26} {look_up(results, path):.{digits}f}")
    run_folder = os.path.dirname(os.path.dirname(os.path.abspath(args.out)))
    print(f"wrote {args.out} and {items_path}; the table of all methods: python evaluate.py --report {os.path.relpath(run_folder)}")


def main(argv=None):
    args = arguments(argv)
    try:
        report(args.report, args.out or args.report[0]) if args.report else evaluate(args)
    except OSError as error:
        fail(f"{error.filename or ''} {error.strerror or error}")


if __name__ == "__main__":
    main()
