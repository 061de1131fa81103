"""Lay out NTREX-128, professionally translated news, as data/prepare_embedded.py lays out its data.

    git clone https://github.com/MicrosoftTranslator/NTREX
    python data/prepare_ntrex.py NTREX                      # writes data/ntrex, in a second
    python data/prepare_ntrex.py NTREX --lang ne --out DIR

NTREX-128 is 1,997 lines of 123 news documents, aligned line by line, under CC BY-SA 4.0. It is
split by document, so that no story is on two sides. The last 20 documents are the test. The 5
before them are for few-shots. The other 98 are training text, of which only the target side is
written. The English chats and the multiple-choice items are copied from the embedded data, so run
data/prepare_embedded.py first.
"""

import argparse
import functools
import hashlib
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import errors
from data.rows import LANGUAGES, to_lines, write_atomically

fail = functools.partial(errors.fail, "prepare_ntrex.py")

HERE = Path(__file__).resolve().parent
CODES = {"ne": "nep", "ky": "kir", "am": "amh", "ha": "hau", "ig": "ibo"}  # in names of files
TEST_DOCUMENTS, VALIDATION_DOCUMENTS = 20, 5
SOURCE = "NTREX-128 (github.com/MicrosoftTranslator/NTREX), CC BY-SA 4.0"
ENGLISH_FILES = ["calibration", "heldout", "prose", "mmlu.test", "mmlu.dev"]


def read_text(path, hint):
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {path} ({getattr(error, 'strerror', None) or 'not UTF-8'}). {hint}")


def read_lines(path):
    # splitlines() would also break a line at the rare U+2028 or U+0085 inside a sentence.
    text = read_text(path, "Clone https://github.com/MicrosoftTranslator/NTREX")
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def split_documents(ids):
    """Return (training, validation, test), each a list of the line ranges of documents."""
    spans, start = [], 0
    for _, group in itertools.groupby(ids):
        length = len(list(group))
        spans.append(range(start, start + length))
        start += length
    first_test = len(spans) - TEST_DOCUMENTS
    first_validation = first_test - VALIDATION_DOCUMENTS
    if first_validation < 1:
        needed = TEST_DOCUMENTS + VALIDATION_DOCUMENTS
        what = f"{len(spans)} documents are too few: validation and test take {needed}"
        fail(f"{what}. Check DOCUMENT_IDS.tsv")
    return spans[:first_validation], spans[first_validation:first_test], spans[first_test:]


def read_texts(repo, lang, count):
    """Return the lines of a language, which must be as many as the document ids."""
    name = "newstest2019-src.eng.txt"
    if lang != "en":
        name = f"newstest2019-ref.{CODES[lang]}.txt"
    lines = read_lines(repo / "NTREX-128" / name)
    if len(lines) != count:
        fail(f"{name} has {len(lines)} lines, and DOCUMENT_IDS.tsv {count}. They must be aligned")
    if "" in lines:
        fail(f"{name} line {lines.index('') + 1} is empty. Get NTREX-128 again")
    return lines


def news_files(repo, languages):
    """Return {file name: rows} of the news in English and the target languages."""
    ids = read_lines(repo / "DOCUMENT_IDS.tsv")
    train, validation, test = split_documents(ids)
    texts = {lang: read_texts(repo, lang, len(ids)) for lang in ["en", *languages]}

    def rows(lang, documents, **more):
        return [{"text": "\n".join(texts[lang][i] for i in lines), **more} for lines in documents]

    def pairs(lang, documents):
        found = []
        for lines in documents:
            for number, i in enumerate(lines, 1):
                pair = {"eng_Latn": texts["en"][i], LANGUAGES[lang]["flores"]: texts[lang][i]}
                found.append({"id": f"{ids[i]}.{number}", **pair, "domain": "news"})
        return found

    files = {"en/news.jsonl": rows("en", test)}
    for lang in languages:
        files[f"{lang}/train.jsonl"] = rows(lang, train)
        files[f"{lang}/heldout.jsonl"] = rows(lang, test, domain="news")
        files[f"{lang}/flores.dev.jsonl"] = pairs(lang, validation)
        files[f"{lang}/flores.devtest.jsonl"] = pairs(lang, test)
    return files


def prepare(args):
    """Read and check everything, then write it."""
    texts, sources = {}, {}
    for name, rows in news_files(args.repo, args.lang).items():
        texts[name] = to_lines(rows)
        sources[name] = [SOURCE]
    copied = [f"en/{name}.jsonl" for name in ENGLISH_FILES]
    for lang in args.lang:
        copied += [f"{lang}/mmlu.test.jsonl", f"{lang}/mmlu.dev.jsonl"]
    hint = "Run python data/prepare_embedded.py first"
    origin = args.embedded / "provenance.json"
    try:
        made = json.loads(read_text(origin, hint))["files"]
        for name in copied:
            texts[name] = read_text(args.embedded / name, hint)
            sources[name] = made[name]["sources"]
    except (ValueError, LookupError, TypeError):
        fail(f"{origin} is damaged, or does not list all that is copied. {hint}")

    listing = args.out / "provenance.json"
    listed = {}
    if listing.exists():  # languages of an earlier call stay listed
        try:
            old = json.loads(listing.read_text(encoding="utf-8"))
            _, listed = old["license"], dict(old["files"])  # another script's has no license
        except (ValueError, LookupError, TypeError):
            fail(f"{listing} is not from here, or damaged. Choose another --out, or delete it")
    for name, text in texts.items():
        path = args.out / name
        if path.exists() and name not in listed and path.read_bytes() != text.encode():
            fail(f"{path} is not from here and is not overwritten. Choose another --out")
    for name, text in texts.items():
        write_atomically(args.out / name, text)
        listed[name] = {
            "rows": text.count("\n"),
            "bytes": len(text.encode()),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "sources": sources[name],
        }
    license = f"{SOURCE}, for the news files; the others as listed"
    facts = {"license": license, "files": dict(sorted(listed.items()))}
    write_atomically(listing, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    print(f"{args.out}: {len(texts)} files for en {' '.join(args.lang)}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("repo", type=Path, help="clone of github.com/MicrosoftTranslator/NTREX")
    add("--out", type=Path, default=HERE / "ntrex", help="directory to write")
    add("--embedded", type=Path, default=HERE / "embedded", help="output of prepare_embedded.py")
    add("--lang", nargs="+", default=list(CODES), help=f"some of {' '.join(CODES)} (default: all)")
    args = parser.parse_args(argv)
    for lang in args.lang:
        if lang not in CODES or "flores" not in LANGUAGES.get(lang, {}):
            fail(f"unknown language {lang!r}. Choose from {' '.join(CODES)}")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        prepare(args)
    except OSError as error:
        fail(f"cannot write {args.out}: {error.strerror or error}. Choose another --out")
    except KeyboardInterrupt:
        print("prepare_ntrex.py: interrupted. Run it again", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
