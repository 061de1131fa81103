"""Fetch the paper's evaluation sets from the Hugging Face hub into the layout that evaluate.py reads (Section 4.5).

    python data/prepare_paper.py ne                        # writes data/paper/en and data/paper/ne
    HF_TOKEN=... python data/prepare_paper.py ne ig --flores gated
    python evaluate.py --model MODEL --lang ne --data-dir data/paper --tasks mt,sum,mrc,mmlu --out eval.json

    flores.{dev,devtest}   FLORES+: all of dev, 500 pairs of devtest (the authors' draw). The gated original needs
                           HF_TOKEN and its terms accepted; the ungated copy of mteb has devtest alone, so there the
                           examples come from the other 512 pairs.
    xlsum                  XL-Sum: of test and validation the 500 articles with the fewest tokens (--tokenizer)
    belebele               Belebele: all 900 questions
    mmlu.{dev,test}        MMLU (English) and Global-MMLU, without questions that have an empty option

Each data set is read at the commit that it has now, the ungated FLORES+ at a pinned one; provenance.json says which.
What was fetched stays in the hub's cache, so nothing is downloaded twice, and evaluate.py needs no hub.
"""
import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

LANGUAGES = {"en": ("eng_Latn", "english"), "ne": ("npi_Deva", "nepali"), "ky": ("kir_Cyrl", "kyrgyz"),
             "am": ("amh_Ethi", "amharic"), "ha": ("hau_Latn", "hausa"), "ig": ("ibo_Latn", "igbo")}  # FLORES, XL-Sum
FLORES = {"gated": ("openlanguagedata/flores_plus", None),
          "ungated": ("mteb/FloresBitextMining", "2144d16cc15edd22d4a9237d12bff5f31f5c07fc")}
OPTIONS = ("option_a", "option_b", "option_c", "option_d")


def fail(message):
    print(f"prepare_paper.py: error: {' '.join(str(message).split())[:500]}", file=sys.stderr)
    raise SystemExit(2)


def commit_of(repo, revision):
    """The commit that a revision of a data set is now. Raises SystemExit(2) when the hub does not say."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError
    try:
        return HfApi().dataset_info(repo, revision=revision).sha
    except (OSError, HTTPError) as error:
        fail(f"the hub did not give {repo} ({error}). A gated set needs its terms accepted on its page and HF_TOKEN")


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def flores_rows(load, which, lang):
    """{"dev": pairs, "devtest": pairs} of English and a language."""
    import pandas
    code = LANGUAGES[lang][0]
    repo, _ = FLORES[which]
    if which == "gated":
        splits = {split: list(zip(load(repo, "eng_Latn", split), load(repo, code, split), strict=True))
                  for split in ("dev", "devtest")}
        if any(a["id"] != b["id"] for pairs in splits.values() for a, b in pairs):
            fail(f"{repo}: its languages are not in the same order")
        splits = {split: [{"id": a["id"], "eng_Latn": a["text"], code: b["text"]} for a, b in pairs]
                  for split, pairs in splits.items()}
    else:
        rows = load(repo, None, "devtest")
        splits = {"devtest": [{"id": i, "eng_Latn": row["eng_Latn"], code: row[code]} for i, row in enumerate(rows)]}
    everything = splits["devtest"]
    chosen = pandas.Series(range(len(everything))).sample(n=min(500, len(everything)), random_state=42)
    rest = [pair for i, pair in enumerate(everything) if i not in set(chosen)]
    return {"dev": splits.get("dev", rest), "devtest": [everything[i] for i in chosen]}


def xlsum_rows(load, lang, tokenizer):
    """The 500 articles of test and validation with the fewest tokens, shortest first; `id`, `text`, `summary`."""
    folder = LANGUAGES[lang][1]
    rows = [row for split in ("test", "validation") for row in load("csebuetnlp/xlsum", folder, split)]
    rows.sort(key=lambda row: len(tokenizer(row["text"])["input_ids"]))
    return [{key: row[key] for key in ("id", "text", "summary")} for row in rows[:500]]


def mmlu_rows(load, lang, split):
    """Questions in Global-MMLU's columns."""
    if lang == "en":
        rows = [{"sample_id": f"{row['subject']}/{split}/{i}", "subject": row["subject"], "question": row["question"],
                 **dict(zip(OPTIONS, row["choices"], strict=True)), "answer": "ABCD"[row["answer"]]}
                for i, row in enumerate(load("cais/mmlu", "all", split))]
    else:
        columns = ("sample_id", "subject", "question", *OPTIONS, "answer")
        rows = [{key: row[key] for key in columns} for row in load("CohereLabs/Global-MMLU", lang, split)]
    return [row for row in rows if row["question"] and all(row[option] for option in OPTIONS)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lang", nargs="+", choices=list(LANGUAGES)[1:])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "paper")
    parser.add_argument("--flores", choices=FLORES, default="ungated", help="which FLORES+ (default: ungated)")
    parser.add_argument("--tokenizer", default="allenai/OLMo-2-1124-7B-Instruct", help="counts XL-Sum's tokens")
    parser.add_argument("--check", nargs="+", default=[], help="data sets that a run will need later: can they be had?")
    args = parser.parse_args(argv)
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from transformers import AutoTokenizer

    # Access to everything is checked before anything large is fetched.
    xlsum = "csebuetnlp/xlsum"
    repos = {repo: commit_of(repo, revision) for repo, revision in (
        FLORES[args.flores], (xlsum, "refs/convert/parquet"), ("facebook/belebele", None), ("cais/mmlu", None),
        ("CohereLabs/Global-MMLU", None), *((repo, None) for repo in args.check))}
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fail(f"--tokenizer {args.tokenizer}: {error}")

    def load(repo, config, split):
        print(f"read {repo} {config or ''} {split}")
        try:
            if repo == xlsum:  # its own files need a loading script; the hub keeps them as parquet beside it
                files = f"hf://datasets/{repo}@{repos[repo]}/{config}/{split}/*.parquet"
                return load_dataset("parquet", data_files=files, split="train")
            return load_dataset(repo, config, split=split, revision=repos[repo])
        except (OSError, ValueError, DatasetsError) as error:
            fail(f"{repo}, {config}, {split}: {error}")

    belebele, files = "facebook/belebele", {}
    for lang in ("en", *args.lang):
        if lang != "en":
            for split, rows in flores_rows(load, args.flores, lang).items():
                files[f"{lang}/flores.{split}.jsonl"] = FLORES[args.flores][0], rows
        files[f"{lang}/xlsum.jsonl"] = xlsum, xlsum_rows(load, lang, tokenizer)
        files[f"{lang}/belebele.jsonl"] = belebele, list(load(belebele, LANGUAGES[lang][0], "test"))
        for split in ("dev", "test"):
            origin = "cais/mmlu" if lang == "en" else "CohereLabs/Global-MMLU"
            files[f"{lang}/mmlu.{split}.jsonl"] = origin, mmlu_rows(load, lang, split)

    listing = args.out / "provenance.json"
    listed = json.loads(listing.read_text(encoding="utf-8")) if listing.exists() else {}
    for name, (repo, rows) in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(args.out / name, text)
        listed[name] = {"rows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest(),
                        "from": f"{repo}@{repos[repo]}"}
    write_text(listing, json.dumps(dict(sorted(listed.items())), indent=1) + "\n")
    print(f"{args.out}: {len(files)} files for en {' '.join(args.lang)}\nnext: python evaluate.py --model MODEL "
          f"--lang {args.lang[0]} --data-dir {args.out} --tasks mt,sum,mrc,mmlu --out eval.json")


if __name__ == "__main__":
    main()
