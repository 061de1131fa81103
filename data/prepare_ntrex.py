"""Lay out NTREX-128, professionally translated news, as data/prepare_embedded.py lays out its data.

    git clone https://github.com/MicrosoftTranslator/NTREX
    python data/prepare_ntrex.py NTREX                      # writes data/ntrex, in a second
    python data/prepare_ntrex.py NTREX --lang ne --out DIR

NTREX-128 is 1,997 lines of 123 news documents, aligned line by line, under CC BY-SA 4.0. It is
split by document, so that no story is on two sides. The last 20 documents are the test. The 5
before them are for few-shots and for looking at during training. The other 98 are training text,
of which only the target side is written. The English chats and the multiple-choice items are
copied from the embedded data, so run data/prepare_embedded.py first.
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CODES = {
    "ne": ("nep", "npi_Deva"),
    "ky": ("kir", "kir_Cyrl"),
    "am": ("amh", "amh_Ethi"),
    "ha": ("hau", "hau_Latn"),
    "ig": ("ibo", "ibo_Latn"),
}  # NTREX file name, FLORES column
TEST_DOCUMENTS, VALIDATION_DOCUMENTS = 20, 5
SOURCE = "NTREX-128 (github.com/MicrosoftTranslator/NTREX), CC BY-SA 4.0"
ENGLISH_FILES = [
    "calibration.jsonl",
    "heldout.jsonl",
    "prose.jsonl",
    "mmlu.test.jsonl",
    "mmlu.dev.jsonl",
]


def fail(message):
    print(f"prepare_ntrex.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_text(path, hint):
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {path} ({getattr(error, 'strerror', None) or 'not UTF-8'}): {hint}")


def read_lines(path):
    # splitlines() would also break a line at the rare U+2028 or U+0085 inside a sentence.
    text = read_text(path, "REPO must be a clone of https://github.com/MicrosoftTranslator/NTREX")
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def write_text(path, text):
    """Write a file under a temporary name first, so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "w", encoding="utf-8", newline="\n") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def split_documents(ids):
    """(train, validation, test): for each document the range of its lines."""
    spans, start = [], 0
    for _, group in itertools.groupby(ids):
        length = len(list(group))
        spans.append(range(start, start + length))
        start += length
    first_test = len(spans) - TEST_DOCUMENTS
    first_validation = first_test - VALIDATION_DOCUMENTS
    if first_validation < 1:
        fail(
            f"{len(spans)} documents are too few: {TEST_DOCUMENTS} are the test, "
            f"{VALIDATION_DOCUMENTS} validation"
        )
    return spans[:first_validation], spans[first_validation:first_test], spans[first_test:]


def read_texts(repo, lang, count):
    """Return the lines of a language, which must be as many as the document ids."""
    name = "newstest2019-src.eng.txt"
    if lang != "en":
        name = f"newstest2019-ref.{CODES[lang][0]}.txt"
    lines = read_lines(repo / "NTREX-128" / name)
    if len(lines) != count:
        fail(
            f"{name} has {len(lines)} lines but DOCUMENT_IDS.tsv has {count}: they must be aligned"
        )
    if "" in lines:
        fail(f"{name} line {lines.index('') + 1} is empty")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("repo", type=Path, help="clone of github.com/MicrosoftTranslator/NTREX")
    parser.add_argument(
        "--out", type=Path, default=HERE / "ntrex", help="folder to write (default data/ntrex)"
    )
    parser.add_argument(
        "--embedded",
        type=Path,
        default=HERE / "embedded",
        help="what data/prepare_embedded.py wrote (default data/embedded)",
    )
    parser.add_argument(
        "--lang", nargs="+", default=list(CODES), help=f"of {' '.join(CODES)} (default: all)"
    )
    args = parser.parse_args(argv)
    for lang in args.lang:
        if lang not in CODES:
            fail(f"unknown language {lang!r}: choose from {' '.join(CODES)}")

    # Everything is read and checked before anything is written.
    ids = read_lines(args.repo / "DOCUMENT_IDS.tsv")
    train, validation, test = split_documents(ids)
    texts = {lang: read_texts(args.repo, lang, len(ids)) for lang in ["en", *args.lang]}
    copied = [f"en/{name}" for name in ENGLISH_FILES]
    copied += [f"{lang}/mmlu.{split}.jsonl" for lang in args.lang for split in ("test", "dev")]
    hint = "run python data/prepare_embedded.py first"
    files = {name: read_text(args.embedded / name, hint) for name in copied}
    origin = json.loads(read_text(args.embedded / "provenance.json", hint))["files"]

    def rows(lang, documents, **more):
        return [{"text": "\n".join(texts[lang][i] for i in lines), **more} for lines in documents]

    def pairs(lang, documents):
        return [
            {
                "id": f"{ids[i]}.{i - lines[0] + 1}",
                "eng_Latn": texts["en"][i],
                CODES[lang][1]: texts[lang][i],
                "domain": "news",
            }
            for lines in documents
            for i in lines
        ]

    made = {"en/news.jsonl": rows("en", test)}
    for lang in args.lang:
        made |= {
            f"{lang}/train.jsonl": rows(lang, train),
            f"{lang}/validation.jsonl": rows(lang, validation),
            f"{lang}/heldout.jsonl": rows(lang, test, domain="news"),
            f"{lang}/flores.dev.jsonl": pairs(lang, validation),
            f"{lang}/flores.devtest.jsonl": pairs(lang, test),
        }
    files |= {
        name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made[name])
        for name in made
    }

    listing = args.out / "provenance.json"
    try:
        old = json.loads(listing.read_text(encoding="utf-8")) if listing.exists() else {"files": {}}
        listed = old["files"]  # languages made by an earlier call stay listed
        for name, text in files.items():
            write_text(args.out / name, text)
            data = text.encode()
            listed[name] = {
                "rows": text.count("\n"),
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "sources": [SOURCE] if name in made else origin[name]["sources"],
            }
        text = json.dumps(
            {
                "licence": f"{SOURCE}, for the news files; the others as listed",
                "files": dict(sorted(listed.items())),
            },
            indent=1,
            ensure_ascii=False,
        )
        write_text(listing, text + "\n")
    except OSError as error:
        fail(f"cannot write {args.out}: {error.strerror or error}")
    print(
        f"{args.out}: {len(train)} training, {len(validation)} validation, "
        f"{len(test)} test documents "
        f"for {' '.join(args.lang)}"
    )


if __name__ == "__main__":
    main()
