"""Measure what a model keeps of its source language (English) and gains in the target language (Section 4.5).

    bpb   bits per byte of held-out text; of an English chat, the last answer is scored
    mcq   multiple choice: the option with the highest log-likelihood per byte
    mt    machine translation: mean chrF++ over sentences, with Table 7's prompts and Table 9's decoding
    sum   summarisation (XL-Sum), zero-shot, likewise
    mrc   reading comprehension (Belebele), 3-shot: the letter with the highest log-likelihood
    mmlu  knowledge (MMLU, Global-MMLU), 5-shot with questions of the same subject, likewise
    chat  fixed English prompts: does the model stop by itself, repeat itself, still answer in English?
    ae2   answers to AlpacaEval's instructions, as files that alpaca_eval judges (README.md has the command)
    codemix        the share of ae2's answers that GlotLID does not hold for English (Section 6, footnote 9)
    ifeval, gsm8k  as lm-evaluation-harness has them

`source` is English (in mt: X to English) and `target` the new language (in mt: English to X), as in the paper. The
default is bpb, mcq, mt and chat.
The paper's tasks and decoding, on one GPU:
    python evaluate.py --model MODEL --lang ne --data-dir data/paper --out eval.json \
        --tasks mt,sum,mrc,mmlu,ifeval,gsm8k,ae2,codemix
Tiny, on a CPU, in a minute or two:
    python evaluate.py --model runs/ne/fft/model --lang ne --data-dir data/embedded --out runs/ne/fft/eval.json \
        --num-samples 100 --greedy --max-new-tokens 32
Then table and picture; with several run folders (one for each seed), mean and standard deviation:
    python evaluate.py --report runs/ne

Every finished item goes to eval.items.jsonl beside eval.json, with its prompt, prediction and scores. The same command
repeated goes on from there, and ends with the very results of a run that was never interrupted.
"""

import argparse
import hashlib
import itertools
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
# Table 7, word for word: X-En MT, En-X MT, SUM, MRC, and what MMLU puts before the words of MRC. X-En is asked with the
# English row, all else with the language's own.
TEMPLATES = {
    "en": ("Translate {X} to English: {sentence} =", "Translate English to {X}: {sentence} =",
           "Summarize the following text in English: {text} Summary:",
           "{context} Question: {question} A. {a} B. {b} C. {c} D. {d} Answer:",
           "The following are multiple choice questions (with answers) about {subject}."),
    "ne": ("नेपालीलाई अङ्ग्रेजीमा अनुवाद गर्नुहोस्: {sentence} =", "अङ्ग्रेजीलाई नेपालीमा अनुवाद गर्नुहोस्: {sentence} =",
           "तलको पाठलाई नेपालीमा संक्षेपमा लेख्नुहोस्: {text} सारांश:",
           "{context} प्रश्न: {question} A. {a} B. {b} C. {c} D. {d} उत्तर:",
           "तल {subject} सम्बन्धी बहु-विकल्प प्रश्नहरू (उत्तर सहित) दिइएका छन्।"),
    "ky": ("Кыргызчадан англисчеге которуу: {sentence} =", "Англисчеден кыргызчага которуу: {sentence} =",
           "Төмөнкү текстти кыргызча кыскача жазыңыз: {text} Кыскача:",
           "{context} Суроо: {question} A. {a} B. {b} C. {c} D. {d} Жооп:",
           "Бул {subject} боюнча бир нече тандоо суроолору (жооптор менен) төмөндө келтирилген."),
    "am": ("እማርኛን ወደ እንግሊዝኛ ተርጉሞ: {sentence} =", "እንግሊዝኛን ወደ እማርኛ ተርጉሞ: {sentence} =",
           "የታችኛው ጽሁፍን በእማርኛ አጭር በማድረግ አሳትረኝ:: {text} አጭር መግለጫ:",
           "{context} ጥያቄ: {question} A. {a} B. {b} C. {c} D. {d} መልስ:",
           "ከታች ስለ {subject} የቀረቡ ባለብዙ ሞርጫ ጥያቄዎች (ከመልሶች ጋር) ናቸው::"),
    "ha": ("Fassara Hausa zuwa Turanci: {sentence} =", "Fassara Turanci zuwa Hausa: {sentence} =",
           "Takaita rubutu mai zuwa cikin Hausa: {text} Takaitawa:",
           "{context} Tambaya: {question} A. {a} B. {b} C. {c} D. {d} Amsa:",
           "Wadannan tambayoyi masu zaɓi da yawa (tare da amsoshi) game da {subject} ne."),
    "ig": ("Sùgharịa Igbo gaa na Bekee: {sentence} =", "Sùgharịa Bekee gaa n'Igbo: {sentence} =",
           "Chịkọta edemede a n'Igbo: {text} Nchịkọta:",
           "{context} Ajụjụ: {question} A. {a} B. {b} C. {c} D. {d} Azịza:",
           "Nke a bụ ajuju onu nhorọ otutu (na azịza) gbasara {subject}."),
}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1}  # Table 9
CHAT_SAMPLING = SAMPLING | {"top_p": 0.8}  # Table 9: AE2, IFEval, GSM8K
CHAT_PROMPTS = (
    "Why do leaves change colour in autumn? Answer in two or three sentences.",
    "What is the capital of France? Answer in one sentence.",
    "How do I make a cup of tea?",
    "Write a short, polite message asking a neighbour to turn the music down.",
    "I could not sleep last night. What can I do this evening?",
    "Name three things to pack for a day in the mountains, and say why.",
)
CHAT_TOKENS = {"chat": 128, "ae2": 512}  # chat: room for a few sentences to end by themselves; AE2: Table 9
GLOTLID = ("cis-lmu/glotlid", "model_v3.bin", "e773fb98e530c58837b11c61f94653f6fe7e1465")
LATIN = ("ha", "ig")  # languages in English's own script
HARNESS = {  # lm-eval's task, examples, metric, filter; IFEval's limit of 1,280 new tokens is its own there
    "ifeval": ("leaderboard_ifeval", 0, "prompt_level_strict_acc", "none"),
    "gsm8k": ("gsm8k", 5, "exact_match", "strict-match")}
TASKS = {  # what each one reads below --data-dir
    "bpb": ("en/heldout", "LANG/heldout", "en/prose", "en/news"),  # prose and news only where they exist
    "mcq": ("en/mmlu.test", "LANG/mmlu.test"),
    "mt": ("LANG/flores.dev", "LANG/flores.devtest"),
    "sum": ("en/xlsum", "LANG/xlsum"),
    "mrc": ("en/belebele", "LANG/belebele"),
    "mmlu": ("en/mmlu.dev", "en/mmlu.test", "LANG/mmlu.dev", "LANG/mmlu.test"),
    "chat": ("en/heldout", "LANG/heldout"),  # to tell the languages apart
    "ifeval": (), "gsm8k": (),  # lm-eval asks the hub
    "ae2": ("en/ae2",), "codemix": ("en/ae2",),
}
SHOTS = {"mrc": 3, "mmlu": 5}  # Section 4.5
TEXTS = ("text", "summary", "question", "instruction", "flores_passage", "eng_Latn",
         *(code for _, code in LANGUAGES.values()))  # columns that must hold strings; the others also numbers
OPTIONS = ("option_a", "option_b", "option_c", "option_d")
ANSWERS = ("mc_answer1", "mc_answer2", "mc_answer3", "mc_answer4")
NAMES = {  # in the order of the paper's Tables 2, 4, 3 and 6
    "source": "Source", "fft": "FFT", "adalora": "AdaLoRA", "hft": "HFT", "gmt": "GMT", "ssu-rand": "SSU-Rand",
    "ssu-mag": "SSU-Mag", "ssu-wanda": "SSU-Wanda", "ssu-sparsegpt": "SSU-SparseGPT", "ssu-fim": "SSU-FIM",
    "ssu-wanda-row": "SSU-Wanda, rows", "ssu-wanda-element": "SSU-Wanda, elements", "lota": "LoTA",
    "lota-90": "LoTA (90%)", "lota-50": "LoTA (50%)", "s2ft-down": "S2FT (down)",
    "s2ft-down-output": "S2FT (down, output)"}
COLUMNS = (  # of the report: side, heading (the arrow points to the better value), where in `results`, digits
    ("source", "chat bpb ↓", "bpb/source/heldout/bpb", 3), ("source", "prose bpb ↓", "bpb/source/prose/bpb", 3),
    ("source", "news bpb ↓", "bpb/source/news/bpb", 3), ("source", "MCQ accuracy ↑", "mcq/source/accuracy", 3),
    ("source", "MT X→en chrF++ ↑", "mt/source/chrf", 2), ("source", "SUM chrF++ ↑", "sum/source/chrf", 2),
    ("source", "MRC accuracy ↑", "mrc/source/accuracy", 3), ("source", "MMLU accuracy ↑", "mmlu/source/accuracy", 3),
    ("source", "stop rate ↑", "chat/stop_rate", 2),
    ("source", "repetition ↓", "chat/repetition", 2), ("source", "English share ↑", "chat/english_share", 2),
    ("source", "IFEval ↑", "ifeval/source/accuracy", 3), ("source", "GSM8K ↑", "gsm8k/source/accuracy", 3),
    ("source", "code-mixed ↓", "codemix/source/share", 3),
    ("target", "bpb ↓", "bpb/target/heldout/bpb", 3), ("target", "MCQ accuracy ↑", "mcq/target/accuracy", 3),
    ("target", "MT en→X chrF++ ↑", "mt/target/chrf", 2), ("target", "SUM chrF++ ↑", "sum/target/chrf", 2),
    ("target", "MRC accuracy ↑", "mrc/target/accuracy", 3), ("target", "MMLU accuracy ↑", "mmlu/target/accuracy", 3),
)


def fail(message):
    print("evaluate.py: error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def read_rows(path, columns):
    """Rows of a jsonl file, each with a value in every column; a chat in `messages` may stand in for `text`."""
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
                missing = row.get(column) in (None, "") or not isinstance(
                    row[column], str if column in TEXTS else (str, int, float))
                if missing and not (column == "text" and turns):
                    fail(f"{path}: line {number} has no `{column}`")
            if turns and [role for role, _ in turns[-2:]] != ["user", "assistant"]:
                fail(f"{path}: line {number}: `messages` must end with a user's turn and the assistant's answer")
            for column, allowed in (("answer", "A, B, C or D"), ("correct_answer_num", "1, 2, 3 or 4")):
                if column in columns and str(row[column]) not in allowed.replace(" or", ",").split(", "):
                    fail(f"{path}: line {number}: `{column}` must be {allowed}, not {row[column]!r}")
            rows.append(row)
    return rows or fail(f"{path} is empty")


def read_data(folder, lang, tasks):
    """What the tasks need, checked: {"source/heldout": rows, "target/flores.dev": rows, ...}, sha256 of it all, and
    {"target/flores.dev": data set @ commit, ...} where the folder's provenance.json says that."""
    data, digest, flores, origin = {}, hashlib.sha256(), ("id", "eng_Latn", LANGUAGES[lang][1]), {}
    mmlu = ("sample_id", "subject", "question", *OPTIONS, "answer")
    columns = {"mmlu.dev": mmlu, "mmlu.test": mmlu, "flores.dev": flores, "flores.devtest": flores,
               "xlsum": ("id", "text", "summary"), "ae2": ("instruction",),
               "belebele": ("link", "question_number", "flores_passage", "question", *ANSWERS, "correct_answer_num")}
    for name in dict.fromkeys(name for task in tasks for name in TASKS[task]):
        path, base = os.path.join(folder, name.replace("LANG", lang) + ".jsonl"), name.split("/")[1]
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
                fail(f"{listed} does not say where {base}.jsonl is from ({error!r}): mend it, or delete it")
        with open(path, "rb") as file:
            digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return data, digest.hexdigest(), origin


def find_model(name):
    """(local folder of a Hugging Face checkpoint, sha256 of its files); the hub is asked for `owner/name` alone."""
    folder, kinds = os.path.expanduser(name), (".safetensors", ".json", ".jinja", ".model", ".txt")
    if not os.path.isdir(folder):
        if not re.fullmatch(r"[\w-]+/[\w.-]+", name) or os.path.isdir(name.split("/")[0]):
            fail(f"model {name} does not exist")
        from huggingface_hub import snapshot_download
        try:
            folder = snapshot_download(name, allow_patterns=["*" + kind for kind in kinds],
                                       ignore_patterns=["consolidated*", "original/*"])  # the weights once more
        except (OSError, ValueError) as error:
            fail(f"model {name} is not a local folder, and the hub did not give it: {error}")
    files, digest = sorted(f for f in os.listdir(folder) if f.endswith(kinds)), hashlib.sha256()
    for needed in ("config.json", "tokenizer_config.json", ".safetensors"):
        if not any(f.endswith(needed) for f in files):
            fail(f"model {name} is not a checkpoint that can be evaluated: {folder} has no {needed}")
    for file_name in files:
        with open(os.path.join(folder, file_name), "rb") as file:
            digest.update(file_name.encode() + hashlib.file_digest(file, "sha256").digest())
    return folder, digest.hexdigest()


def write_atomically(path, text):
    """Neither a reader nor a full disk ever meets half a file."""
    try:
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    finally:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")


def encode(tokenizer, text):
    """Adds nothing: a chat template writes its own BOS, and a second one would change every number."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def render(tokenizer, messages):
    """A chat as text, up to where an answer would begin, or to the end of the answer that is there."""
    from jinja2 import TemplateError
    asked = messages[-1]["role"] != "assistant"
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)
    except TemplateError as error:
        fail(f"the model's chat template refuses a chat of {[turn['role'] for turn in messages]} ({error})")


def question(task, lang, row):
    """A question in Table 7's words. Its {context} is the passage in mrc, and nothing in mmlu, where the examples are
    earlier turns of the chat."""
    said = TEMPLATES[lang][3].format(context=row["context"], question=row["question"],
                                     **dict(zip("abcd", row["options"], strict=True)))
    return f"{TEMPLATES[lang][4].format(subject=row['subject'])}{said}" if task == "mmlu" else said


def with_shots(task, side, data, settings):
    """Yields (examples, item) for each item of mrc or mmlu. Belebele has one split, and an item is never its own
    example; MMLU's examples are the first of its subject in the dev split."""
    if task == "mrc":
        rows = [{"id": f"{row['link']} {row['question_number']}", "subject": None, "context": row["flores_passage"],
                 "question": row["question"], "options": [str(row[answer]) for answer in ANSWERS],
                 "answer": "ABCD"[int(row["correct_answer_num"]) - 1]} for row in data[f"{side}/belebele"]]
        drawn = random.Random(settings["seed"]).sample(rows, min(SHOTS[task] + 1, len(rows)))
        for row in rows[:settings["num_questions"]]:
            yield [shot for shot in drawn if shot["id"] != row["id"]][:SHOTS[task]], row
        return
    dev, test = ([{"id": row["sample_id"], "subject": str(row["subject"]).replace("_", " "), "context": "",
                   "question": row["question"], "options": [str(row[option]) for option in OPTIONS],
                   "answer": row["answer"]} for row in data[f"{side}/mmlu.{split}"]] for split in ("dev", "test"))
    shots = {subject: rows[:SHOTS[task]] for subject, rows in group(dev, lambda row: row["subject"]).items()}
    for row in test[:settings["num_questions"]]:
        if row["subject"] not in shots:
            fail(f"{side}/mmlu.dev.jsonl has no question about {row['subject']}")
        yield shots[row["subject"]], row


def plan(data, tokenizer, lang, settings, context=math.inf):
    """Everything to ask, in a fixed order: (record to be saved, prompt ids, [continuation ids, ...] to score).

    context: the tokens that the model takes; where the examples of mrc and mmlu do not fit, the first are left out."""
    def sample(rows):
        order = random.Random(settings["seed"]).sample(range(len(rows)), min(settings["num_samples"], len(rows)))
        return [rows[i] for i in sorted(order)]

    def record(task, side, name, domain, prompt, reference, **more):
        return {"task": task, "side": side, "run": 0, "id": name, "domain": domain, "prompt": prompt,
                "reference": reference} | more

    # raw text follows the beginning-of-text token, or end-of-text where a model has only that
    start = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    size, tasks = settings["max_length"], settings["tasks"]
    texts = [(*name.split("/"), i, row) for name, rows in data.items() if name.endswith(("heldout", "prose", "news"))
             for i, row in sample([*enumerate(rows, 1)])]
    for side, base, number, row in texts if "bpb" in tasks else ():
        prompt, text, said, ids = "", row.get("text"), row.get("text"), start
        if row.get("messages"):
            said, prompt = row["messages"][-1]["content"], render(tokenizer, row["messages"][:-1])
            whole = render(tokenizer, row["messages"])
            if not whole.startswith(prompt):
                fail(f"{side}/{base}, line {number}: the chat template rewrites earlier turns, no answer can be scored")
            # scored up to the end-of-turn token; the line break that some templates put after it is not said
            text, ids = whole[len(prompt):].rstrip(), encode(tokenizer, prompt)
        # Windows of `size` tokens that score each token once; all but the first see one token of context, as is usual.
        # The bytes are those of what is said, without the end of turn; the first window counts them for the document.
        tokens, ids = encode(tokenizer, text), ids[-(size // 2):]
        cuts = [0, *range(size - len(ids), len(tokens), size - 1), len(tokens)]
        for a, b in zip(cuts, cuts[1:], strict=False):
            yield (record("bpb", side, f"{base}:{number}:{a}", row.get("domain"), prompt if a == 0 else None,
                          text if a == 0 else None, set=base, tokens=b - a, bytes=len(said.encode()) if a == 0 else 0),
                   tokens[a - 1:a] if a else ids, [tokens[a:b]])
    for side in ("source", "target") if "mcq" in tasks else ():
        # Source: a chat with the option as its answer. Target: plain text, all that an adapted model has seen of it.
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
    for side, language in (("source", "en"), ("target", lang)) if "sum" in tasks else ():
        for row in sample(data[f"{side}/xlsum"]):
            prompt = render(tokenizer, [{"role": "user", "content": TEMPLATES[language][2].format(text=row["text"])}])
            for run in range(settings["runs"]):
                yield (record("sum", side, row["id"], None, prompt, row["summary"]) | {"run": run},
                       encode(tokenizer, prompt), [])
    for task, side, language in ((task, side, language) for task in ("mrc", "mmlu") if task in tasks
                                 for side, language in (("source", "en"), ("target", lang))):
        known = {}  # examples -> (their turns, ids)
        for shots, row in with_shots(task, side, data, settings):
            while True:  # with fewer examples where the model's context is too short for all
                names = tuple(shot["id"] for shot in shots)
                if names not in known:
                    turns = [turn for shot in shots for turn in (
                        {"role": "user", "content": question(task, language, shot)},
                        {"role": "assistant", "content": shot["answer"]})]
                    known[names] = turns, encode(tokenizer, render(tokenizer, turns)) if turns else []
                turns, shared = known[names]
                prompt = render(tokenizer, [*turns, {"role": "user", "content": question(task, language, row)}])
                ids = encode(tokenizer, prompt)
                if len(ids) < context or not shots:
                    break
                shots = shots[1:]
            yield (record(task, side, row["id"], row["subject"], prompt, row["answer"], shots=len(shots),
                          shared=len(os.path.commonprefix([shared, ids]))), ids,
                   [encode(tokenizer, letter)[-1:] for letter in "ABCD"])
    asked = [("chat", i, None, said, 1) for i, said in enumerate(CHAT_PROMPTS)] if "chat" in tasks else []
    asked += [("ae2", i, row.get("dataset"), row["instruction"], settings["runs"])
              for i, row in enumerate(data["source/ae2"][:settings["num_questions"]])] if "ae2" in tasks else []
    for task, number, domain, said, runs in asked:
        prompt = render(tokenizer, [{"role": "user", "content": said}])
        for run in range(runs):
            yield (record(task, "source", number, domain, prompt, None, question=said) | {"run": run},
                   encode(tokenizer, prompt), [])
    for task in HARNESS:
        for run in range(settings["runs"]) if task in tasks else ():  # all questions of a run are one item here
            yield record(task, "source", "all", None, None, None) | {"run": run}, [], []


def batches(sizes, budget):
    """Indices in batches of at most `budget` tokens with padding, longest first: like lengths share a batch, and a
    budget too large for the memory shows at once. Nothing else decides: a resumed run meets the same batches."""
    found = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if found and (len(found[-1]) + 1) * sizes[found[-1][0]] <= budget:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def divide(task, members, args, width):
    """([batch of items, ...], tokens that each item costs) for all items of one task, side and run.

    width: of the hidden states. A token's matrices cost about 24 width^2 operations a layer, attention 4 width for each
    token of its row: questions cost least in rows of sqrt(p^2 + 6 width p) tokens behind p of examples."""
    sizes, budget = [len(prompt) + sum(map(len, parts)) for _, prompt, parts in members], args.batch_tokens
    if task in SHOTS:  # packed behind the examples that they share, in one row
        alike = group(zip(members, sizes, strict=True), lambda m: tuple(m[0][1][:m[0][0]["shared"]]))
        found = []
        for examples, some in alike.items():
            p = len(examples)
            fits = min(budget // 2 - p, math.isqrt(p * p + 6 * width * p))
            found += [[some[i][0] for i in batch] for batch in batches([size - p for _, size in some], fits)]
        return found, [len(prompt) - record["shared"] for record, prompt, _ in members]
    if task in ("bpb", "mcq"):  # scoring has logits at all tokens, generating at one in each row: a smaller share
        budget //= 8
    else:  # the beginning that all share is computed once, so it does not count
        shared = len(os.path.commonprefix([prompt for _, prompt, _ in members]))
        sizes = [size - shared + CHAT_TOKENS.get(task, args.max_new_tokens) for size in sizes]
    return [[members[i] for i in batch] for batch in batches(sizes, budget)], sizes


def beyond_window(model, length):
    """Must a text of so many tokens stand alone in its row? segment_mask would replace the model's sliding window."""
    return length > (getattr(model.config.get_text_config(), "sliding_window", None) or length)


def segment_mask(segment, dtype):
    """Additive attention mask [rows, 1, query, key] of rows of several texts, segment [rows, length]: a token sees what
    stands before it in segment 0, which all share, and in its own. Padding, -1, sees padding: no empty softmax."""
    import torch
    query, key = segment[:, None, :, None], segment[:, None, None, :]
    seen = ((query == key) | (key == 0)).tril()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def loglik(model, rows):
    """Summed log-likelihood, in nats, of each continuation: [(prompt ids, [ids, ...]), ...] -> [[float, ...], ...].

    A row is [pad | prompt | continuation 1 | continuation 2 | ...]; a continuation sees the prompt and itself, at the
    positions it would have alone, so that all options of a question cost one pass over the question. The padding is on
    the left because what is scored then stands last in every row: logits_to_keep spares the rest the output matrix, and
    the logits are the model's own, with whatever scaling or capping its architecture has.
    """
    import torch
    scored = [sum(map(len, parts)) for _, parts in rows]
    length, keep = max(len(prompt) + n for (prompt, _), n in zip(rows, scored, strict=True)), 1 + max(scored)
    if beyond_window(model, length) and any(len(parts) > 1 for _, parts in rows):
        return [[loglik(model, [(prompt, [part])])[0][0] for part in parts] for prompt, parts in rows]
    ids, position = torch.zeros(2, len(rows), length, dtype=torch.long)  # each [rows, length]
    segment = torch.full((len(rows), length), -1)  # -1 padding, 0 prompt, 1... continuations
    for r, (prompt, parts) in enumerate(rows):
        at = length - len(prompt) - scored[r]
        ids[r, at:] = torch.tensor(prompt + sum(parts, []))
        position[r, at:] = torch.tensor([*range(len(prompt)), *(len(prompt) + i for p in parts for i in range(len(p)))])
        segment[r, at:] = torch.tensor([0] * len(prompt) + [k for k, part in enumerate(parts, 1) for _ in part])
    if all(len(parts) == 1 for _, parts in rows):
        mask = (segment >= 0).long()  # ordinary attention: left to the model, sliding windows included
    else:
        mask = segment_mask(segment, model.dtype)
    ids, mask, position = (x.to(model.device) for x in (ids, mask, position))
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False,
                       logits_to_keep=keep).logits  # [rows, keep, vocabulary]
        result = []
        for (_, parts), n in zip(rows, scored, strict=True):
            first = keep - n  # where in `logits` the first continuation begins
            # a token is predicted by the one before it, the first token of each continuation by the prompt's last one
            by, at = [], first
            for part in parts:
                by, at = [*by, first - 1, *range(at, at + len(part) - 1)], at + len(part)
            token = torch.tensor(sum(parts, []), device=logits.device)[:, None]
            picked = logits[len(result), by].float().log_softmax(-1).gather(1, token)[:, 0].double()  # [n]
            result.append([float(part.sum()) for part in picked.split([len(part) for part in parts])])
    return result


def letter_loglik(model, prefix, questions, letters):
    """Log-likelihood of each letter as the next token after each question: prefix ids, [ids, ...], ids of the letters
    -> [[float] * 4, ...].

    One row [prefix | question 1 | question 2 | ...]: a question sees the prefix and itself, at the positions it would
    have alone. So the examples are computed once for the row, and the head at the last token of each question only."""
    import torch
    if len(questions) > 1 and beyond_window(model, len(prefix) + max(map(len, questions))):
        return [letter_loglik(model, prefix, [question], letters)[0] for question in questions]
    ids = torch.tensor([prefix + sum(questions, [])], device=model.device)  # [1, length]
    position = [*range(len(prefix)), *(len(prefix) + i for q in questions for i in range(len(q)))]
    segment = torch.tensor([[0] * len(prefix) + [k for k, q in enumerate(questions, 1) for _ in q]])
    mask = segment_mask(segment, model.dtype).to(model.device) if len(questions) > 1 else torch.ones_like(ids)
    last = torch.tensor([len(prefix) + n - 1 for n in itertools.accumulate(map(len, questions))], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=torch.tensor([position], device=model.device),
                       use_cache=False, logits_to_keep=last).logits[0]  # [questions, vocabulary]
        return logits.float().log_softmax(-1)[:, letters].tolist()


def generate(model, prompts, max_new_tokens, stop_ids, sampling):
    """New token ids after each prompt, up to and including the first of `stop_ids`.

    What all prompts begin with (system turn, few-shots) is computed once. The padding stands between that and the
    rest, masked, and repeats the first token: the repetition penalty then counts what it counts without padding.
    """
    import torch
    shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    length = max(map(len, prompts))
    ids = torch.tensor([p[:shared] + p[:1] * (length - len(p)) + p[shared:] for p in prompts])  # [prompts, length]
    mask = torch.tensor([[1] * shared + [0] * (length - len(p)) + [1] * (len(p) - shared) for p in prompts])
    ids, mask, cache = ids.to(model.device), mask.to(model.device), None
    with torch.inference_mode():
        if shared:
            cache = model(input_ids=ids[:1, :shared], use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(len(prompts))
        new = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=max_new_tokens,
                             eos_token_id=stop_ids, pad_token_id=stop_ids[0], **sampling)[:, length:].tolist()
    ends = [next((i + 1 for i, token in enumerate(answer) if token in stop_ids), len(answer)) for answer in new]
    return [answer[:end] for answer, end in zip(new, ends, strict=True)]


def trigrams(text):
    """[(word, its character trigrams), ...]; a word is lower-case letters with the marks that belong to them."""
    found = ("".join(c for c in word if unicodedata.category(c)[0] in "LM") for word in text.lower().split())
    return [(word, [f" {word} "[i:i + 3] for i in range(len(word))]) for word in found if word]


def english_odds(data):
    """Naive Bayes, add-one smoothed, from the held-out texts: {trigram: log-odds of English against the target}."""
    counts = [Counter(gram for row in data[f"{side}/heldout"]
                      for text in ([turn["content"] for turn in row.get("messages") or ()] or [row["text"]])
                      for _, grams in trigrams(text) for gram in grams) for side in ("source", "target")]
    english, target = counts
    prior = math.log((target.total() + len(english | target)) / (english.total() + len(english | target)))
    return {gram: math.log((english[gram] + 1) / (target[gram] + 1)) + prior for gram in english | target}


def chat_scores(text, odds):
    """Repeats among the word 4-grams, and letters in words more likely English than target. That is a rough measure: a
    name may fall on either side, a third language is not known, and a trigram in neither text counts nothing."""
    grams = list(zip(*(text.split()[i:] for i in range(4)), strict=False))
    return {"repetition": 1 - len(set(grams)) / len(grams) if grams else 0.0,
            "letters": sum(len(word) for word, _ in trigrams(text)),
            "english_letters": sum(len(w) for w, found in trigrams(text) if sum(odds.get(g, 0.0) for g in found) > 0)}


def english_confidence(how, lang):
    """codemix: a function from an answer to the confidence in [0, 1] that it is English, None if it has no letters.

    `glotlid` is the paper's (footnote 9). `script`, for where GlotLID cannot be had, is the share of Latin letters: it
    sees no language but those of another script, and is no measure for Hausa and Igbo."""
    def has_letters(text):
        return any(c.isalpha() for c in text)

    if how == "script":
        if lang in LATIN:
            fail(f"--language-id script: {LANGUAGES[lang][0]} and English share a script; take glotlid")
        return lambda text: statistics.fmean(
            unicodedata.name(c, "").startswith("LATIN") for c in text if c.isalpha()) if has_letters(text) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError
    try:
        import fasttext
        model = fasttext.load_model(hf_hub_download(*GLOTLID[:2], revision=GLOTLID[2]))
    except ImportError:
        fail("codemix by GlotLID needs fastText: pip install fasttext-numpy2==0.10.4, or --language-id script")
    except (OSError, ValueError, HTTPError) as error:
        fail(f"the hub did not give {GLOTLID[0]} ({error}); --language-id script does without it")

    def confidence(text):
        labels, odds = model.predict(" ".join(text.split()), k=-1)  # of one line, all languages
        return float(sum(p for label, p in zip(labels, odds, strict=True) if label == "__label__eng_Latn") / sum(odds))
    return lambda text: confidence(text) if has_letters(text) else None


def harness_tasks(tasks):
    """lm-eval's TaskManager, after data and metrics of `tasks` are there: what is missing shows before the model is
    loaded."""
    try:
        from lm_eval.models.huggingface import HFLM  # noqa: F401
        from lm_eval.tasks import TaskManager
        if "ifeval" in tasks:
            import nltk
            from lm_eval.tasks.leaderboard.ifeval import utils  # noqa: F401
            nltk.data.find("tokenizers/punkt_tab")
    except ImportError as error:
        fail(f"ifeval and gsm8k need lm-eval: pip install 'lm-eval[hf,ifeval]==0.4.13' ({error})")
    except LookupError:
        fail("ifeval counts sentences with a file of nltk's: python -m nltk.downloader punkt_tab")
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError
    manager = TaskManager()
    for name in (HARNESS[task][0] for task in tasks):
        try:
            manager.load([name])
        except (OSError, ValueError, DatasetsError, HTTPError) as error:
            fail(f"lm-eval could not load {name}: {error}")
    return manager


def harness(model, tokenizer, manager, task, seed, limit, sampling, batch_size):
    """One run of GSM8K or IFEval, as a chat, with lm-eval's own prompts, stops and metric: [{id, ...}, ...]."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    name, shots, metric, chosen = HARNESS[task]
    found = simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), tasks=[name],
                            num_fewshot=shots, limit=limit, apply_chat_template=True, fewshot_as_multiturn=True,
                            gen_kwargs=dict(sampling), torch_random_seed=seed, bootstrap_iters=0, task_manager=manager)
    return [{"id": sample["doc_id"], "prompt": sample["arguments"][0][0], "prediction": sample["resps"][0][0],
             "correct": float(sample[metric])} for sample in found["samples"][name] if sample["filter"] == chosen]


def score(record, answer, tokenizer, end_ids, odds, english):
    """The record with `prediction` and `scores`; answer: log-likelihoods (bpb, mcq, mrc, mmlu), new token ids, or what
    lm-eval found. odds, english: of english_odds and english_confidence, or None where that task is not asked for."""
    if record["task"] in HARNESS:
        right = statistics.fmean(sample["correct"] for sample in answer)
        return record | {"prediction": None, "samples": answer, "scores": {"accuracy": right}}
    if record["task"] == "bpb":
        return record | {"prediction": None, "scores": {"nats": -answer[0]}}
    if record["task"] == "mcq":
        per_byte = [nats / len(option.encode()) for nats, option in zip(answer, record["options"], strict=True)]
        best = "ABCD"[per_byte.index(max(per_byte))]
        return record | {"prediction": best, "scores": {"correct": best == record["reference"], "loglik": answer}}
    if record["task"] in SHOTS:
        best = "ABCD"[answer.index(max(answer))]
        return record | {"prediction": best, "scores": {"correct": best == record["reference"], "loglik": answer}}
    text, stopped = tokenizer.decode(answer, skip_special_tokens=True), answer[-1] in end_ids
    if record["task"] in CHAT_TOKENS:
        more = chat_scores(text, odds) if record["task"] == "chat" else {"english": english(text)} if english else {}
        return record | {"prediction": text.strip(), "scores": {"stopped": stopped} | more}
    from sacrebleu.metrics import CHRF
    text = text.split("\n")[0].strip()
    chrf = CHRF(word_order=2).sentence_score(text, [record["reference"]]).score
    return record | {"prediction": text, "scores": {"stopped": stopped, "chrf": chrf}}


def group(records, key):
    found = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return found


def bits_per_byte(records):
    nats = math.fsum(r["scores"]["nats"] for r in records)
    tokens, size = sum(r["tokens"] for r in records), sum(r["bytes"] for r in records)
    return {"bpb": nats / math.log(2) / size, "nats_per_token": nats / tokens, "tokens": tokens, "bytes": size,
            "documents": sum(r["bytes"] > 0 for r in records)}


def accuracy(records):
    """With Wilson's 95% interval, which stays honest for few items and near 0 and 1."""
    n, p, z2 = len(records), statistics.fmean(r["scores"]["correct"] for r in records), 1.96**2
    half = 1.96 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return {"accuracy": p, "n": n, "interval95": [(p + z2 / (2 * n) + d) / (1 + z2 / n) for d in (-half, half)]}


def chrf_mean(records):
    return statistics.fmean(r["scores"]["chrf"] for r in records)


def chrf_scores(records):
    """chrF++ as the mean over sentences (the authors' figure; its interval is over sentences) and over the corpus."""
    from sacrebleu.metrics import CHRF
    metric, runs = CHRF(word_order=2), list(group(records, lambda r: r["run"]).values())
    corpus = [metric.corpus_score([r["prediction"] for r in run], [[r["reference"] for r in run]]).score
              for run in runs]
    means, items = [chrf_mean(run) for run in runs], [chrf_mean(i) for i in group(records, lambda r: r["id"]).values()]
    half = 1.96 * statistics.stdev(items) / math.sqrt(len(items)) if len(items) > 1 else 0.0
    mean, domains = statistics.fmean(means), group([r for r in records if r["domain"]], lambda r: r["domain"])
    return {"chrf": mean, "interval95": [mean - half, mean + half], "chrf_corpus": statistics.fmean(corpus),
            "sd_over_runs": statistics.stdev(means) if len(means) > 1 else 0.0, "n": len(items),
            "runs": [{"chrf": m, "chrf_corpus": c} for m, c in zip(means, corpus, strict=True)],
            "domains": {name: {"chrf": chrf_mean(rs), "n": len(rs) // len(runs)} for name, rs in domains.items()},
            "signature": str(metric.get_signature())}


def summarise(records):
    """`results` of eval.json from all the records."""
    results = {}
    for (task, side), chosen in group(records, lambda r: (r["task"], r["side"])).items():
        scores, within = [r["scores"] for r in chosen], [r for r in chosen if r["domain"]]
        if task == "bpb":
            sets = group(chosen, lambda r: r["set"]) | group(within, lambda r: f"{r['set']}.{r['domain']}")
            results.setdefault(task, {})[side] = {name: bits_per_byte(rs) for name, rs in sets.items()}
        elif task == "mcq":
            apart = [r for r in chosen if r["shared_stem"] is False]
            results.setdefault(task, {})[side] = accuracy(chosen) | {
                "subjects": {name: accuracy(rs) for name, rs in group(within, lambda r: r["domain"]).items()},
                **({"without_shared_stem": accuracy(apart)} if apart else {})}
        elif task in SHOTS:
            results.setdefault(task, {})[side] = accuracy(chosen) | {
                "shots": statistics.fmean(r["shots"] for r in chosen),
                "subjects": {name: accuracy(rs) for name, rs in group(within, lambda r: r["domain"]).items()}}
        elif task in ("mt", "sum"):
            results.setdefault(task, {})[side] = chrf_scores(chosen)
        elif task in HARNESS:
            runs = [s["accuracy"] for s in scores]
            results[task] = {side: {
                "accuracy": statistics.fmean(runs), "sd_over_runs": statistics.stdev(runs) if len(runs) > 1 else 0.0,
                "runs": runs, "n": len(chosen[0]["samples"])}}
        elif task == "ae2":
            results[task] = {side: {"stop_rate": statistics.fmean(s["stopped"] for s in scores), "n": len(chosen)}}
            if "english" in scores[0]:  # below 0.9 an answer is code-mixed (footnote 9); one without letters is neither
                found = [s["english"] for s in scores if s["english"] is not None]
                results["codemix"] = {side: {
                    "share": statistics.fmean(c < 0.9 for c in found) if found else None, "n": len(found)}}
        else:
            results[task] = {
                "stop_rate": statistics.fmean(s["stopped"] for s in scores),
                "repetition": statistics.fmean(s["repetition"] for s in scores),
                "english_share": sum(s["english_letters"] for s in scores) / max(1, sum(s["letters"] for s in scores)),
                "n": len(chosen),
                "answers": [{"prompt": r["question"], "answer": r["prediction"], **r["scores"]} for r in chosen]}
    return results


def look_up(results, path):
    for key in path.split("/"):
        results = (results or {}).get(key)
    return results


def read_evals(folders, chosen):
    """{method: [eval.json of each run folder]}, known methods first; what cannot be compared is refused."""
    evals, first, seeds = {}, None, {}
    for folder in folders:
        there = os.listdir(folder) if os.path.isdir(folder) else ()
        methods = ["source", *(chosen or [*NAMES, *sorted(set(there) - set(NAMES))])]
        paths = {method: f"{folder}/{method}/eval.json" for method in methods}
        if not os.path.isfile(paths["source"]):
            fail(f"{paths['source']} is missing: all is relative to the source model, so evaluate that first")
        for method, path in paths.items():
            if not os.path.isfile(path):
                continue
            try:
                with open(path, encoding="utf-8") as file:
                    found = json.load(file)
                settings = found["settings"] | {"lang": found["lang"]}
                if (found["format"], found["version"], type(found["results"])) != ("ssu-eval", 1, dict):
                    raise ValueError("another format or version")
            except (ValueError, KeyError, TypeError) as error:
                fail(f"{path} cannot be read ({error}): remake it with evaluate.py --model ... --out {path}")
            first = first or settings
            seed = seeds.setdefault(folder, settings["seed"])  # may differ from one run folder to the next
            for key in settings.keys() - {"model_sha256"}:
                expected = seed if key == "seed" else first.get(key)
                if settings[key] != expected:
                    fail(f"{path} cannot be compared with {paths['source']}: {key} is {settings[key]}, not {expected}")
            evals.setdefault(method, []).append(found)
    order = [*NAMES, *sorted({m.partition("@")[0] for m in evals} - NAMES.keys())]
    return {m: evals[m] for m in sorted(evals, key=lambda m: (order.index(m.partition("@")[0]), m))}


def method_and_ratio(run):
    """("ssu-wanda", 0.25) of "ssu-wanda@0.25", ("lota", 0.9) of "lota-90"; 0.5 where a method has a ratio that the name
    of its folder does not say (run_all.sh), None where it has none."""
    run = re.sub(r"^lota-(\d+)$", r"lota@0.\1", run)
    method, ratio = re.fullmatch(r"(.*?)(?:@([\d.]+))?", run).groups()
    freezes = method.startswith("ssu-") or method in ("hft", "gmt", "lota")
    return method, float(ratio) if ratio else 0.5 if freezes else None


def overlap(a, b):
    """(Jaccard index, |frozen by both| / |frozen by either|; what two random masks of these shares would have) of two
    masks that broadcast onto the same parameter; None if neither freezes anything."""
    import numpy
    a, b = numpy.broadcast_arrays(a == 0, b == 0)
    both = a.mean() * b.mean()
    return ((a & b).sum() / (a | b).sum(), both / (a.mean() + b.mean() - both)) if (a | b).any() else None


def read_masks(folder, methods):
    """{method: masks} of a run folder, ssu-wanda's first: the others are compared with it; {} if there are no two."""
    from safetensors import SafetensorError, safe_open
    masks, models = {}, {}
    for m in sorted(methods, key=lambda m: m != "ssu-wanda"):
        path = os.path.join(folder, m, "mask.safetensors")
        if os.path.isfile(path):
            try:
                with safe_open(path, "np") as file:
                    masks[m] = {name: file.get_tensor(name) for name in file.keys()}
                    models[(file.metadata() or {}).get("fingerprint")] = path
            except SafetensorError as error:
                fail(f"{path} cannot be read ({error}): remake it with make_mask.py")
    if len(models) > 1:
        fail(f"the masks {' and '.join(models.values())} are of different models: remake them, or move one away")
    return masks if len(masks) > 1 else {}


def report(folders, chosen, out):
    """report.md, also printed, in the manner of Table 2; and report.png."""
    evals = read_evals(folders, chosen)
    one, sizes = evals["source"][0], []
    target = LANGUAGES[one["lang"]][0]
    names = {m: NAMES.get(m) or f"{NAMES.get(m.partition('@')[0], m.partition('@')[0])} {m.partition('@')[2]}".strip()
             for m in evals}
    value = {(m, c[2]): [look_up(e["results"], c[2]) for e in evals[m]] for m in evals for c in COLUMNS}
    value = {key: numbers for key, numbers in value.items() if None not in numbers}
    lines = [f"# English kept, {target} gained", "", "In brackets the change relative to Source, as in Table 2"
             + ("." if len(folders) == 1 else f"; mean ± standard deviation over {len(folders)} run folders."), ""]
    for side, title in (("source", "English"), ("target", target)):
        columns = [c for c in COLUMNS if c[0] == side and ("source", c[2]) in value]
        table = [[title, *(c[1] for c in columns)]]
        for m in evals if columns else ():
            table.append([names[m] + (f" (n={len(evals[m])})" if len(evals[m]) < len(folders) else "")])
            for _, _, path, digits in columns:
                if (m, path) not in value:  # nothing to measure, e.g. no answer with a letter in it
                    table[-1].append("-")
                    continue
                mean, base = statistics.fmean(value[m, path]), statistics.fmean(value["source", path])
                sd = f" ± {statistics.stdev(value[m, path]):.{digits}f}" if len(value[m, path]) > 1 else ""
                relative = f" ({100 * (mean / base - 1):+.1f}%)" if base and not path.startswith("chat/") else ""
                table[-1].append(f"{mean:.{digits}f}{sd}{relative}")
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        table.insert(1, ["-" * width for width in widths])
        lines += ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table] + [""] if columns else []
        for _, heading, path, _ in columns:
            found = look_up(one["results"], path.rsplit("/", 1)[0])
            n = f"{found['n']} items" if "n" in found else f"{found['documents']} documents, {found['tokens']} tokens"
            sizes.append(f"{title} {heading[:-2]}: {n}")
    shown = {k: ",".join(v) if k == "tasks" else v for k, v in one["settings"].items() if k != "model_sha256"}
    lines += [f"n: {'; '.join(sizes)}.", "",
              f"Run folders: {', '.join(folders)}.", "",
              f"Settings: {', '.join(f'{k} {v}' for k, v in shown.items())}.", "",
              f"Made with {', '.join(map(' '.join, one['versions'].items()))} on {one['device']}, "
              f"commit {one['git_commit']}.", ""]
    if one.get("data"):
        lines += [f"Data: {', '.join(f'{name} {origin}' for name, origin in one['data'].items())}.", ""]
    if "chat" in one["results"]:
        answers = {m: evals[m][0]["results"]["chat"]["answers"][0] for m in evals}
        lines += ["## One English prompt, answered by each model", "", "> " + answers["source"]["prompt"], ""]
        lines += [f"**{names[m]}:** {' '.join(answers[m]['answer'].split())}\n" for m in evals]
    os.makedirs(out, exist_ok=True)
    write_atomically(os.path.join(out, "report.md"), "\n".join(lines))
    print("\n".join(lines), f"wrote {out}/report.md", sep="\n")
    plot(value, names, target, read_masks(folders[0], evals), os.path.join(out, "report.png"))


def relative_to_source(value, names, side):
    """(what is compared, {method: [value over Source's, of each run folder]}) of one side: of bits per byte, or where
    there are none the mean over all columns that every method has, but chat's and codemix."""
    columns = [c for c in COLUMNS if c[0] == side and all((m, c[2]) in value for m in names)
               and not c[2].startswith(("chat/", "codemix/")) and statistics.fmean(value["source", c[2]])]
    columns = [c for c in columns if c[2].endswith("heldout/bpb")] or columns
    if not columns:
        return None, {}
    what = columns[0][1][:-2] if len(columns) == 1 else "mean of " + ", ".join(c[1].split()[0] for c in columns)
    base = {path: statistics.fmean(value["source", path]) for _, _, path, _ in columns}
    return what, {m: [statistics.fmean(found) for found in zip(
        *([x / base[path] for x in value[m, path]] for _, _, path, _ in columns), strict=True)] for m in names}


def plot(value, names, target, masks, path):
    """report.png: source kept against target gained; both against the freezing ratio (Figure 2), where there are
    several; which weights the masks freeze. matplotlib is optional."""
    (kept_what, kept), (gained_what, gained) = (relative_to_source(value, names, side) for side in ("source", "target"))
    if not kept or not gained:
        print("no report.png: it needs figures of both languages, from bpb, mcq, mt, sum, mrc or mmlu")
        return
    try:
        import matplotlib
    except ImportError:
        print("no report.png: it needs matplotlib (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    kept = {m: [100 / x if "bpb" in kept_what else 100 * x for x in found] for m, found in kept.items()}
    gained = {m: [100 * (1 - x if "bpb" in gained_what else x - 1) for x in found] for m, found in gained.items()}
    labels = (f"English kept: {kept_what}, " + ("Source / method (%)" if "bpb" in kept_what else "method / Source (%)"),
              f"{target} gained: " + ("reduction of bpb (%)" if "bpb" in gained_what else f"{gained_what} (%)"))
    curves = {}  # method -> [(ratio, run name)]
    for m in names:
        method, ratio = method_and_ratio(m)
        if ratio is not None:
            curves.setdefault(method, []).append((ratio, m))
    curves = {method: sorted(points) for method, points in curves.items() if len(points) > 1}
    panels = 1 + 2 * bool(curves) + 2 * bool(masks)
    rows, columns = math.ceil(panels / 3), min(3, panels)
    size = (6 * columns, 5.4 * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[panels:]:
        axes.remove()
    panel = iter(grid.flat)
    axes = next(panel)
    for m, name in names.items():
        x, y = statistics.fmean(gained[m]), statistics.fmean(kept[m])
        point = axes.scatter(x, y, s=60, zorder=3)
        if len(kept[m]) > 1:
            axes.scatter(gained[m], kept[m], s=10, color=point.get_facecolor(), alpha=0.6)
        axes.annotate(name, (x, y), (7, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel=labels[1], ylabel=labels[0])
    axes.margins(0.25)
    for numbers, label in ((kept, labels[0]), (gained, labels[1])) if curves else ():
        axes = next(panel)
        for method, points in curves.items():
            axes.plot([ratio for ratio, _ in points], [statistics.fmean(numbers[m]) for _, m in points], marker="o",
                      label=NAMES.get(method, method))
        axes.axhline(statistics.fmean(numbers["source"]), color="red", linestyle="--", label="Source")
        axes.set(xlabel="share frozen", ylabel=label)
        axes.legend(fontsize=8)
    if masks:
        (first, *others), found = masks, {}
        for m in others:
            for name in masks[first].keys() & masks[m].keys():
                if layer := re.search(r"\.(\d+)\..*?([^.]+)\.weight$", name):
                    if both := overlap(masks[first][name], masks[m][name]):
                        found.setdefault(m, []).append((int(layer[1]), layer[2], *both))
        for index, label in ((0, "layer"), (1, "kind of parameter")):
            axes = next(panel)
            for m, rows in found.items():
                keys = sorted({row[index] for row in rows})
                found_by, by_chance = ([statistics.fmean(row[i] for row in rows if row[index] == key) for key in keys]
                                       for i in (2, 3))
                (line,) = axes.plot(keys, found_by, marker="o", markersize=4, linestyle="" if index else "-",
                                    label=names[m])
                axes.plot(keys, by_chance, marker="_" if index else "", markersize=12, linestyle="" if index else ":",
                          linewidth=0.8, color=line.get_color())
            axes.plot([], [], color="grey", marker="_" if index else "", linestyle="" if index else ":",
                      label="random masks that freeze as much")
            axes.set(xlabel=label, ylabel=f"frozen weights: Jaccard index with {names[first]}", ylim=(0, 1.02))
            axes.tick_params("x", rotation=60 * index)
            if index == 0:
                axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.savefig(path + ".tmp", format="png", dpi=150 if panels == 1 else 100)
    pyplot.close(figure)
    os.replace(path + ".tmp", path)
    print("wrote", path)


def arguments(argv):
    def positive(text):
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
        return int(text)

    def tasks(text):
        asked = text.split(",") + ["ae2"] * ("codemix" in text)  # codemix looks at ae2's answers
        if set(asked) - set(TASKS):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of some of {','.join(TASKS)}")
        return [task for task in TASKS if task in asked]

    parser = argparse.ArgumentParser("evaluate.py", argparse.SUPPRESS, __doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder of a Hugging Face checkpoint, or owner/name on the hub")
    add("--lang", choices=LANGUAGES, help="target language")
    add("--data-dir", help="folder with en/ and a folder for each target language")
    add("--out", help="eval.json to write; with --report the folder to write to (default: the first run folder)")
    add("--report", nargs="+", metavar="RUNS", help="only make report.md and report.png of these run folders")
    add("--methods", nargs="+", help="with --report: of these methods beside source (default: all that were evaluated)")
    add("--tasks", type=tasks, default=["bpb", "mcq", "mt", "chat"],
        help=f"some of {','.join(TASKS)} (default: bpb,mcq,mt,chat)")
    add("--num-samples", type=positive, default=500, help="most items of each set and direction (default: 500)")
    add("--num-questions", type=positive, help="most questions of mrc, mmlu, ifeval, gsm8k, ae2 (default: all)")
    add("--runs", type=positive, default=3, help="sampled runs, with seeds seed, seed + 1, ... (default: 3)")
    add("--greedy", action="store_true", help="instead one deterministic run, no sampling, no repetition penalty")
    add("--few-shots", type=int, choices=range(21), metavar="N", default=3, help="mt examples (default: 3)")
    add("--max-new-tokens", type=positive, default=128, help="of an answer in mt and sum (default: 128)")
    add("--batch-tokens", type=positive, default=8192, help="most tokens in a batch, padding included (default: 8192)")
    add("--max-length", type=positive, default=1024, help="tokens of a window in bpb (default: 1024)")
    add("--language-id", choices=("glotlid", "script"), default="glotlid",
        help="codemix: by GlotLID (1.7 GB from the hub), or only by the script of the letters (default: glotlid)")
    add("--seed", type=int, default=42, help="draws items, few-shots and samples (default: 42)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on cuda, else float32")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one, else cpu")
    args = parser.parse_args(argv)
    lacking = [name for name in ("model", "lang", "data_dir", "out") if not args.report and not getattr(args, name)]
    if lacking or args.max_length < 16:
        fail(f"--{lacking[0].replace('_', '-')} is needed (or --report)" if lacking else "--max-length is below 16")
    return args


def key_of(record):
    return record["task"], record["side"], record["run"], record["id"]


def dump(record):
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_items(path, header):
    """{key: record} of what an interrupted run with the same header has finished, without the line it was killed in."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.endswith("\n")]
    if lines[:1] == [dump(header)]:
        try:
            return {key_of(record): record for record in map(json.loads, lines[1:])}
        except (ValueError, KeyError, TypeError) as error:
            fail(f"{path} is damaged ({error}): delete it, or the line, to have that done again")
    print(f"{path} is of other settings, data, model or versions: starting afresh")
    return {}


def git_commit():
    """The commit of this script, with -dirty where files were changed since; None outside a checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def load_model(folder, tokenizer, dtype, device):
    """(model, ids that end a turn, ids with a newline in them)."""
    import torch
    import transformers
    from safetensors import SafetensorError
    options = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last: shapes that are not those of config.json
        fail(f"model {folder}: {error}")
    if info["missing_keys"]:
        fail(f"model {folder}: its files lack {sorted(info['missing_keys'])[:3]}")
    # a chat ends with what its template closes a turn with, or with what the model or its tokenizer calls the end
    chat = render(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]).rstrip()
    eos = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    ends |= {encode(tokenizer, chat)[-1]} & set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    model.generation_config = transformers.GenerationConfig()  # Table 9 alone decides, not what came with the model
    return model.to(device).eval(), sorted(ends), [i for i, text in enumerate(texts) if "\n" in text]


def evaluate(args):
    started = time.monotonic()
    if os.path.isdir(args.out):
        fail(f"--out {args.out} is a folder: name the file, eval.json")
    data, data_sha256, origin = read_data(args.data_dir, args.lang, args.tasks)
    folder, model_sha256 = find_model(args.model)
    import sacrebleu
    import torch
    import transformers
    from tqdm import tqdm
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        fail("--device cuda: torch sees no CUDA device")
    device = args.device if args.device != "auto" else "cuda" if cuda else "cpu"
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    settings = {"tasks": args.tasks, "num_samples": args.num_samples, "num_questions": args.num_questions,
                "runs": 1 if args.greedy else args.runs, "greedy": args.greedy, "few_shots": args.few_shots,
                "max_new_tokens": args.max_new_tokens, "batch_tokens": args.batch_tokens, "max_length": args.max_length,
                "seed": args.seed, "dtype": dtype, "device": device, "model_sha256": model_sha256,
                "data_sha256": data_sha256} | ({"language_id": args.language_id} if "codemix" in args.tasks else {})
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__, "sacrebleu": sacrebleu.__version__}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fail(f"model {args.model}: {error}")
    if tokenizer.chat_template is None:
        fail(f"model {args.model} has no chat template: this evaluation is for instruct models")
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    items = list(plan(data, tokenizer, args.lang, settings, context))
    keys = [key_of(record) for record, _, _ in items]
    if len(set(keys)) < len(keys):
        fail(f"two items have the same id: {Counter(keys).most_common(1)[0][0]}")

    # The plan alone decides batches and seeds, and a batch is done whole or not at all: resuming changes no number.
    with open(__file__, "rb") as file:  # prompts and decoding stand in this very file
        script = hashlib.file_digest(file, "sha256").hexdigest()
    header = {"format": "ssu-eval-items", "version": 1, "lang": args.lang, "settings": settings, "versions": versions,
              "script": script}
    items_path = os.path.splitext(args.out)[0] + ".items.jsonl"
    done, todo = read_items(items_path, header), []
    print(f"{args.model} on {device} in {dtype}, batches of up to {args.batch_tokens} tokens")
    for (task, side, run), members in group(items, lambda item: key_of(item[0])[:3]).items():
        found, sizes = divide(task, members, args, config.get_text_config().hidden_size)
        left = [(args.seed + run, i, b) for i, b in enumerate(found) if any(key_of(item[0]) not in done for item in b)]
        todo += left
        few = sum(record["shots"] < SHOTS[task] for record, _, _ in members) if task in SHOTS else 0
        long = sum(len(prompt) >= context for _, prompt, _ in members)
        what = "lm-eval's questions" if task in HARNESS else f"{len(members)} items, {sum(sizes)} tokens"
        print(f"{task} {side}, run {run}: {what}, "
              f"{len(left)} of {len(found)} batches to do" + f"; {few} with fewer than {SHOTS.get(task)} examples"
              * bool(few) + f"; {long} longer than the {context} tokens that the model was made for" * bool(long))
    pending = {batch[0][0]["task"] for _, _, batch in todo}
    english = english_confidence(args.language_id, args.lang) if "codemix" in args.tasks and "ae2" in pending else None
    if "ifeval" in pending and context <= 1280:
        fail(f"ifeval generates up to 1,280 tokens, and {args.model} was made for {context}")
    manager = harness_tasks(pending & set(HARNESS)) if pending & set(HARNESS) else None
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    write_atomically(items_path, "".join(map(dump, [header, *done.values()])))
    if todo:
        model, end_ids, newline_ids = load_model(folder, tokenizer, dtype, device)
        odds = english_odds(data) if "chat" in args.tasks else None
    greedy = {"do_sample": False}
    sampling, chat_sampling = (greedy, greedy) if args.greedy else (SAMPLING, CHAT_SAMPLING)
    total = sum(len(batch) for _, _, batch in todo)
    with open(items_path, "a", encoding="utf-8") as file, tqdm(total=total, unit="item", disable=not todo) as bar:
        for seed, index, batch in todo:
            planned, prompts, parts = zip(*batch, strict=True)
            task = planned[0]["task"]
            bar.set_description(f"{task} {planned[0]['side']}")
            torch.manual_seed(seed * 1_000_003 + index)
            if task in ("bpb", "mcq"):
                answers = loglik(model, list(zip(prompts, parts, strict=True)))
            elif task in SHOTS:
                shared = planned[0]["shared"]
                answers = letter_loglik(model, prompts[0][:shared], [prompt[shared:] for prompt in prompts],
                                        [token for (token,) in parts[0]])
            elif task in ("mt", "sum"):  # Table 9's newline ends an answer
                answers = generate(model, list(prompts), args.max_new_tokens, end_ids + newline_ids, sampling)
            elif task in HARNESS:
                answers = [harness(model, tokenizer, manager, task, seed, args.num_questions, chat_sampling,
                                   max(1, args.batch_tokens // 2048))]
            else:
                answers = generate(model, list(prompts), CHAT_TOKENS[task], end_ids,
                                   chat_sampling if task == "ae2" else greedy)
            finished = [score(r, answer, tokenizer, end_ids, odds, english)
                        for r, answer in zip(planned, answers, strict=True)]
            done |= {key_of(record): record for record in finished}
            file.write("".join(map(dump, finished)))
            file.flush()
            bar.update(len(batch))

    records = [done[key] for key in keys]
    write_atomically(items_path, "".join(map(dump, [header, *records])))  # in the plan's order
    results = summarise(records)
    for run, answers in group((r for r in records if r["task"] == "ae2"), lambda r: r["run"]).items():
        write_atomically(f"{os.path.splitext(args.out)[0]}.ae2-{run}.json", json.dumps([
            {"instruction": r["question"], "output": r["prediction"], "generator": args.model, "dataset": r["domain"]}
            for r in answers], ensure_ascii=False, indent=1) + "\n")
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine() + " CPU"
    write_atomically(args.out, json.dumps({
        "format": "ssu-eval", "version": 1, "model": args.model, "lang": args.lang, "settings": settings,
        "data": origin, "versions": versions, "device": name, "git_commit": git_commit(),
        "seconds": round(time.monotonic() - started, 1), "results": results}, ensure_ascii=False, indent=1) + "\n")
    for _, _, path, digits in COLUMNS:
        if look_up(results, path) is not None:
            print(f"{path:<24} {look_up(results, path):.{digits}f}")
    runs = os.path.relpath(os.path.dirname(os.path.dirname(os.path.abspath(args.out))))
    print(f"wrote {args.out}; every item is in {items_path}\nnext: python evaluate.py --report {runs}")


def main(argv=None):
    args = arguments(argv)
    try:
        report(args.report, args.methods, args.out or args.report[0]) if args.report else evaluate(args)
    except OSError as error:  # a full disk, a folder that cannot be written, a checkpoint with a file missing
        fail(f"{error.filename or ''} {error.strerror or error}")


if __name__ == "__main__":
    main()
