"""Fetch the paper's evaluation sets (Section 4.5) from the hub into the layout of evaluate.py.

    python data/prepare_paper.py ne                        # writes data/paper/en and data/paper/ne
    HF_TOKEN=... python data/prepare_paper.py ne ig --flores gated
    HF_TOKEN=... python data/prepare_paper.py ne --safety-eval CLONE

    flores.{dev,devtest}   FLORES+: all of dev, 500 pairs of devtest (the authors' draw). The gated
                           original needs HF_TOKEN and its terms accepted. Of the ungated copy of
                           mteb, devtest is read alone: its examples are the pairs not drawn.
    xlsum                  XL-Sum: the 500 articles of test and validation with the fewest tokens
    belebele               Belebele: all 900 questions
    mmlu.{dev,test}        MMLU (English) and Global-MMLU, without questions with an empty option
    ae2, mtb               AlpacaEval's 805 instructions, MT-Bench's 80 questions; in en/ alone
    t3                     the Tulu 3 safety suite, in en/ alone: six files of CLONE, a clone of
                           github.com/allenai/safety-eval, and the gated allenai/wildguardmix

Each data set is read at its present commit, the ungated FLORES+ at a pinned one. provenance.json of
each language records them. The hub's cache keeps what was fetched, so nothing is downloaded twice.
A language that is complete stays as it is, and the hub is not asked. Files of others are never
overwritten. tools/plan.py says what a whole run downloads.
"""

import argparse
import functools
import hashlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import errors, safety
from data.rows import LANGUAGES, paper_language_code, to_lines, write_atomically

fail = functools.partial(errors.fail, "prepare_paper.py")

HERE = Path(__file__).resolve().parent
FLORES = {
    "gated": ("openlanguagedata/flores_plus", None),
    "ungated": ("mteb/FloresBitextMining", "2144d16cc15edd22d4a9237d12bff5f31f5c07fc"),
}
XLSUM, BELEBELE, AE2 = "csebuetnlp/xlsum", "facebook/belebele", "tatsu-lab/alpaca_eval"
MMLU, GLOBAL_MMLU, MTB = "cais/mmlu", "CohereLabs/Global-MMLU", "lighteval/mt-bench"
# Data sets with a loading script are read from their files: builder, path.
FILES = {
    XLSUM: ("parquet", "{config}/{split}/*.parquet"),
    AE2: ("json", "alpaca_eval.json"),
}
OPTIONS = ("option_a", "option_b", "option_c", "option_d")
ANSWERS = ("mc_answer1", "mc_answer2", "mc_answer3", "mc_answer4")


def repositories(flores, clone):
    """Return {data set: revision} of all that is read; None is the newest commit."""
    name, revision = FLORES[flores]
    newest = dict.fromkeys((BELEBELE, MMLU, GLOBAL_MMLU, AE2, MTB))
    if clone:
        newest[safety.WILDGUARDMIX] = None
    return {name: revision, XLSUM: "refs/convert/parquet", **newest}


def commit_of(repo, revision):
    """Return the present commit of a data set's revision, or fail if its files cannot be read."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        HfApi().auth_check(repo, repo_type="dataset")
        return HfApi().dataset_info(repo, revision=revision).sha
    except (OSError, HTTPError) as error:
        fail(
            f"the hub did not give {repo} ({error}). "
            "If it is gated, accept its terms on its page and set HF_TOKEN"
        )


def reader(commits):
    """Return load(repo, config, split, columns), which reads rows at the commit of the data set."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    def load(repo, config, split, columns):
        commit, place = commits[repo], f"{repo}, {config}, {split}"
        print(f"read {repo} {config or ''} {split}")
        try:
            if repo in FILES:
                builder, path = FILES[repo]
                path = f"hf://datasets/{repo}@{commit}/{path.format(config=config, split=split)}"
                rows = load_dataset(builder, data_files=path, split="train")
            else:
                rows = load_dataset(repo, config, split=split, revision=commit)
        except (OSError, ValueError, DatasetsError, HTTPError) as error:
            fail(f"{place}: cannot be read ({error}). Check the network, and start again")
        # If the hub fails half-way, `datasets` takes what it has cached of another commit.
        if repo not in FILES and not all(commit in file["filename"] for file in rows.cache_files):
            fail(f"{place}: not of commit {commit}. The hub may be out of reach: try again")
        missing = sorted(set(columns) - set(rows.column_names))
        if missing:
            fail(
                f"{place}: no column {missing} among {rows.column_names}. Has the data set changed?"
            )
        return [{column: row[column] for column in columns} for row in rows]

    return load


# --------------------------------------------------------------------------------------------------
# The rows of each file


def has_text(cell):
    """Return whether a cell is more than white space: evaluate.py reads no other."""
    return bool(cell and cell.strip())


def aligned_pairs(load, repo, code, split):
    """Return the pairs of English and `code` in a split of the gated FLORES+."""
    english = load(repo, "eng_Latn", split, ("id", "text"))
    target = load(repo, code, split, ("id", "text"))
    if [row["id"] for row in english] != [row["id"] for row in target]:
        fail(f"{repo}: the sentences of eng_Latn and {code} differ in order. Has it changed?")
    return [
        {"id": a["id"], "eng_Latn": a["text"], code: b["text"]}
        for a, b in zip(english, target, strict=True)
    ]


def flores_rows(load, which, lang):
    """Return {"dev": pairs, "devtest": pairs} of English and a language."""
    import pandas

    code, repo = LANGUAGES[lang]["flores"], FLORES[which][0]
    if which == "gated":
        everything = aligned_pairs(load, repo, code, "devtest")
    else:
        rows = load(repo, None, "devtest", ("eng_Latn", code))
        everything = [{"id": i} | row for i, row in enumerate(rows)]
    # The authors draw with pandas: its `sample` decides which 500 pairs are the test.
    order = pandas.Series(range(len(everything)))
    chosen = order.sample(n=min(500, len(everything)), random_state=42).tolist()
    devtest = [everything[i] for i in chosen]
    if which == "gated":
        return {"dev": aligned_pairs(load, repo, code, "dev"), "devtest": devtest}
    drawn = set(chosen)
    return {"dev": [p for i, p in enumerate(everything) if i not in drawn], "devtest": devtest}


def xlsum_rows(load, lang, tokenizer):
    """Return the 500 articles of test and validation with the fewest tokens, shortest first."""
    name, rows = LANGUAGES[lang]["xlsum"], []
    for split in ("test", "validation"):
        for row in load(XLSUM, name, split, ("id", "text", "summary")):
            if has_text(row["text"]) and has_text(row["summary"]):
                rows.append(row | {"id": f"{split}/{row['id']}"})
    return sorted(rows, key=lambda row: len(tokenizer(row["text"])["input_ids"]))[:500]


def belebele_rows(load, lang):
    """Return the 900 questions of Belebele."""
    question = ("link", "question_number", "flores_passage", "question")
    columns = (*question, *ANSWERS, "correct_answer_num")
    return load(BELEBELE, LANGUAGES[lang]["belebele"], "test", columns)


def mmlu_rows(load, lang, split):
    """Return the questions of MMLU or Global-MMLU, in the columns of Global-MMLU."""
    if lang == "en":
        rows = []
        columns = ("subject", "question", "choices", "answer")
        for i, row in enumerate(load(MMLU, "all", split, columns)):
            question = {"sample_id": f"{row['subject']}/{split}/{i}"}
            question |= {"subject": row["subject"], "question": row["question"]}
            question |= dict(zip(OPTIONS, row["choices"], strict=True))
            rows.append(question | {"answer": "ABCD"[row["answer"]]})
    else:
        columns = ("sample_id", "subject", "question", *OPTIONS, "answer")
        rows = load(GLOBAL_MMLU, LANGUAGES[lang]["global_mmlu"], split, columns)
    needed = ("question", *OPTIONS)
    return [row for row in rows if all(has_text(row[column]) for column in needed)]


def mtb_rows(load):
    """Return the questions of MT-Bench, of two turns each; some have a reference answer."""
    rows = load(MTB, None, "train", ("question_id", "category", "turns", "reference"))
    return [row | {"reference": row["reference"] or []} for row in rows]


def files_of(load, lang, flores, tokenizer, clone):
    """Return {file name: (data set, rows)} of a language. clone: read_clone's texts, or None."""
    mmlu = MMLU if lang == "en" else GLOBAL_MMLU
    files = {
        "xlsum.jsonl": (XLSUM, xlsum_rows(load, lang, tokenizer)),
        "belebele.jsonl": (BELEBELE, belebele_rows(load, lang)),
    }
    if lang == "en":
        files["ae2.jsonl"] = AE2, load(AE2, None, "eval", ("instruction", "dataset"))
        files["mtb.jsonl"] = MTB, mtb_rows(load)
        if clone:
            files["t3.jsonl"] = safety.WILDGUARDMIX, safety.safety_rows(clone, load)
    else:
        for split, rows in flores_rows(load, flores, lang).items():
            files[f"flores.{split}.jsonl"] = FLORES[flores][0], rows
    for split in ("dev", "test"):
        files[f"mmlu.{split}.jsonl"] = mmlu, mmlu_rows(load, lang, split)
    return files


# --------------------------------------------------------------------------------------------------
# Writing


def write_files(folder, files, commits):
    """Write the files of a language; provenance.json is written first and lists them all."""
    texts, listed = {}, {}
    for name, (repo, rows) in files.items():
        texts[name] = to_lines(rows)
        listed[name] = {
            "rows": len(rows),
            "sha256": hashlib.sha256(texts[name].encode()).hexdigest(),
            "from": f"{repo}@{commits[repo]}",
        }
    listing = json.dumps(dict(sorted(listed.items())), indent=1)
    write_atomically(folder / "provenance.json", listing + "\n")
    for name, text in texts.items():
        write_atomically(folder / name, text)


def is_complete(folder, flores, needed):
    """Return whether all files of a language are there, unchanged, and all of `needed`.

    Refuse the other FLORES+.
    """
    listing = folder / "provenance.json"
    if not listing.exists():
        return False
    try:
        listed = json.loads(listing.read_text(encoding="utf-8"))
        if not needed <= listed.keys():
            return False
        for name, facts in listed.items():
            path = folder / name
            if not path.exists():
                return False
            if hashlib.sha256(path.read_bytes()).hexdigest() != facts["sha256"]:
                return False
            if name.startswith("flores") and not facts["from"].startswith(FLORES[flores][0]):
                fail(f"{folder} holds the other FLORES+. Delete it to fetch the {flores} one")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{listing} is damaged ({error!r}). Delete {folder} to fetch it again")
    return True


def check_folders(out, languages):
    """Fail unless every folder can be written and holds only files of this script."""
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        fail(f"--out {out}: {parent} cannot be written. Choose another --out")
    for lang in languages:
        if (out / lang).exists() and not (out / lang / "provenance.json").exists():
            fail(f"{out / lang} holds files that are not from here. Choose another --out")


def prepare(args):
    """Fetch and write English, which all are compared on, and the target languages."""
    languages = ["en", *args.lang]
    check_folders(args.out, languages)
    needed = {"mtb.jsonl", "t3.jsonl"} if args.safety_eval else {"mtb.jsonl"}
    for lang in list(languages):
        if is_complete(args.out / lang, args.flores, needed if lang == "en" else set()):
            print(f"{args.out / lang} is complete and stays as it is. Delete it to fetch it again")
            languages.remove(lang)
    if not languages:
        return
    clone = None
    if args.safety_eval and "en" in languages:
        clone = safety.read_clone(args.safety_eval, fail)
    from transformers import AutoTokenizer

    # Access to everything is checked before anything large is fetched.
    revisions = repositories(args.flores, clone)
    commits = {repo: commit_of(repo, revision) for repo, revision in revisions.items()}
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fail(f"--model {args.model}: has no tokenizer ({error}). Correct the name")
    load = reader(commits)
    for lang in languages:
        files = files_of(load, lang, args.flores, tokenizer, clone)
        write_files(args.out / lang, files, commits)
    print(f"wrote {', '.join(str(args.out / lang) for lang in languages)}")
    print(
        f"next: python evaluate.py --model {args.model} --lang {args.lang[0]} "
        f"--data-dir {args.out} --tasks mt,sum,mrc,mmlu --out eval.json"
    )


def main(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("prepare_paper.py", description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("lang", nargs="+", type=paper_language_code, help="target languages, by code")
    add("--out", type=Path, default=HERE / "paper", help="directory to write")
    add("--flores", choices=FLORES, default="ungated", help="version of FLORES+")
    add("--safety-eval", type=Path, help="clone of github.com/allenai/safety-eval, for t3.jsonl")
    add(
        "--model",
        default="allenai/OLMo-2-1124-7B-Instruct",
        help="directory or hub id of the tokenizer that counts the tokens of XL-Sum",
    )
    args = parser.parse_args(argv)
    try:
        prepare(args)
    except OSError as error:  # a full disk, a directory that cannot be written
        fail(f"a file cannot be read or written ({error}). Free space, or choose another --out")
    except KeyboardInterrupt:
        print("prepare_paper.py: interrupted. Run it again to resume", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
