"""Fetch the paper's evaluation sets from the Hugging Face hub into the layout that evaluate.py reads (Section 4.5).

    python data/prepare_paper.py ne                        # writes data/paper/en and data/paper/ne
    HF_TOKEN=... python data/prepare_paper.py ne ig --flores gated
    python data/prepare_paper.py ne --plan --methods fft ssu-wanda    # only says what a whole run would need

    flores.{dev,devtest}   FLORES+: all of dev, 500 pairs of devtest (the authors' draw). The gated original needs
                           HF_TOKEN and its terms accepted; the ungated copy of mteb has devtest alone, so there the
                           examples come from the other 512 pairs.
    xlsum                  XL-Sum: of test and validation the 500 articles with the fewest tokens of --model
    belebele               Belebele: all 900 questions
    mmlu.{dev,test}        MMLU (English) and Global-MMLU, without questions that have an empty option
    ae2                    AlpacaEval's 805 instructions, in en/ alone

Each data set is read at the commit that it has now, the ungated FLORES+ at a pinned one; LANG/provenance.json says
which. What was fetched stays in the hub's cache, so nothing is downloaded twice, and evaluate.py needs no hub. Files
that this script did not write are never overwritten.

--plan asks the hub whether all that run_all.sh's paper profile needs can be had, and how large it is; offline, whether
the caches have it. Memory and disk are counted: 16 bytes a parameter in training (fp32 weights, gradients, two
moments), in compact training 9 for a matrix of which half is frozen; 12 in a checkpoint, twice while a new one replaces
the old. Hours are computed, not measured: 8 floating-point operations a parameter and token in training (6, and 2 for
gradient checkpointing) at 40% of a GPU's peak; evaluating, 0.03 s for each token that a batch of answers grows by, up
to the longest allowed. Exit code 2 if anything does not fit.
"""
import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

LANGUAGES = {"en": ("eng_Latn", "english"), "ne": ("npi_Deva", "nepali"), "ky": ("kir_Cyrl", "kyrgyz"),
             "am": ("amh_Ethi", "amharic"), "ha": ("hau_Latn", "hausa"), "ig": ("ibo_Latn", "igbo")}  # FLORES, XL-Sum
FLORES = {"gated": ("openlanguagedata/flores_plus", None),
          "ungated": ("mteb/FloresBitextMining", "2144d16cc15edd22d4a9237d12bff5f31f5c07fc")}
XLSUM, BELEBELE, MMLU, GLOBAL_MMLU, AE2 = (
    ("csebuetnlp/xlsum", "refs/convert/parquet"), ("facebook/belebele", None), ("cais/mmlu", None),
    ("CohereLabs/Global-MMLU", None), ("tatsu-lab/alpaca_eval", None))
FILES = {XLSUM[0]: ("parquet", "{config}/{split}/*.parquet"), AE2[0]: ("json", "alpaca_eval.json")}  # else scripts
# What score.py and train.py read: data set, revision, folder, part of the file names, what share is fetched.
CALIBRATION = {"tulu": ("allenai/tulu-3-sft-olmo-2-mixture", None, "data", "", 0.1),
               "alpaca": ("tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017", "data", "", 1)}
MADLAD = ("allenai/MADLAD-400", "ecd71297d60c1eb996cd3d7c44c60ad5b55adfc6", "data/LANG", "_clean_", 1)
EVALUATION = {"ae2": ("dataset", *AE2, None, "alpaca_eval.json", 1),  # what only some tasks of evaluate.py need
              "ifeval": ("dataset", "wis-k/instruction-following-eval", None, None, "", 1),
              "gsm8k": ("dataset", "openai/gsm8k", None, "main", "", 1),
              "codemix": ("model", "cis-lmu/glotlid", "e773fb98e530c58837b11c61f94653f6fe7e1465", None, "_v3.bin", 1)}
OPTIONS = ("option_a", "option_b", "option_c", "option_d")
ANSWERS = ("mc_answer1", "mc_answer2", "mc_answer3", "mc_answer4")
# Of evaluate.py's tasks that generate: answers (with run_all.sh's three runs), longest answer and prompt, in tokens.
ANSWERS_OF = {"mt": (3000, 128, 256), "sum": (3000, 128, 512), "ae2": (2415, 512, 64), "ifeval": (1623, 1280, 768),
              "gsm8k": (3957, 256, 1792)}
BATCH_TOKENS = 32768  # run_all.sh's --batch-tokens
PEAKS = {"H100": 989, "H200": 989, "A100": 312, "B200": 2250, "MI300X": 1307}  # dense bf16 TFLOP/s


def fail(message):
    print(f"prepare_paper.py: error: {' '.join(str(message).split())[:500]}", file=sys.stderr)
    raise SystemExit(2)


def commit_of(repo, revision):
    """The commit that a revision of a data set is now, and that its files may be read: SystemExit(2) if not."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError
    try:
        HfApi().auth_check(repo, repo_type="dataset")
        return HfApi().dataset_info(repo, revision=revision).sha
    except (OSError, HTTPError) as error:
        fail(f"the hub did not give {repo} ({error}). A gated set needs its terms accepted on its page and HF_TOKEN")


def reader(commits):
    """load(repo, config, split, columns): the rows of a data set at its commit. Raises SystemExit(2), naming it."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    def load(repo, config, split, columns):
        print(f"read {repo} {config or ''} {split}")
        try:
            if repo in FILES:
                kind, path = FILES[repo][0], FILES[repo][1].format(config=config, split=split)
                rows = load_dataset(kind, data_files=f"hf://datasets/{repo}@{commits[repo]}/{path}", split="train")
            else:
                rows = load_dataset(repo, config, split=split, revision=commits[repo])
        except (OSError, ValueError, DatasetsError, HTTPError) as error:
            fail(f"{repo}, {config}, {split}: {error}")
        # where the hub fails half-way, datasets takes what it has of another commit
        if repo not in FILES and not all(commits[repo] in file["filename"] for file in rows.cache_files):
            fail(f"{repo}, {config}, {split}: not of commit {commits[repo]}: is the hub out of reach? Try again")
        if missing := set(columns) - set(rows.column_names):
            fail(f"{repo}, {config}, {split} has no {sorted(missing)}, but {rows.column_names}: has it changed?")
        return [{column: row[column] for column in columns} for row in rows]
    return load


def flores_rows(load, which, lang):
    """{"dev": pairs, "devtest": pairs} of English and a language."""
    import pandas
    code, repo = LANGUAGES[lang][0], FLORES[which][0]
    if which == "gated":
        splits = {split: list(zip(*(load(repo, c, split, ("id", "text")) for c in ("eng_Latn", code)), strict=True))
                  for split in ("dev", "devtest")}
        if any(a["id"] != b["id"] for pairs in splits.values() for a, b in pairs):
            fail(f"{repo}: its languages are not in the same order")
        splits = {split: [{"id": a["id"], "eng_Latn": a["text"], code: b["text"]} for a, b in pairs]
                  for split, pairs in splits.items()}
    else:
        rows = load(repo, None, "devtest", ("eng_Latn", code))
        splits = {"devtest": [{"id": i} | row for i, row in enumerate(rows)]}
    everything = splits["devtest"]
    chosen = pandas.Series(range(len(everything))).sample(n=min(500, len(everything)), random_state=42).tolist()
    rest = [pair for i, pair in enumerate(everything) if i not in set(chosen)]
    return {"dev": splits.get("dev", rest), "devtest": [everything[i] for i in chosen]}


def xlsum_rows(load, lang, tokenizer):
    """The 500 articles of test and validation with the fewest tokens, shortest first; `id`, `text`, `summary`."""
    rows = [row | {"id": f"{split}/{row['id']}"} for split in ("test", "validation")
            for row in load(XLSUM[0], LANGUAGES[lang][1], split, ("id", "text", "summary"))]
    rows = [row for row in rows if row["text"] and row["summary"]]
    return sorted(rows, key=lambda row: len(tokenizer(row["text"])["input_ids"]))[:500]


def belebele_rows(load, lang):
    return load(BELEBELE[0], LANGUAGES[lang][0], "test", (
        "link", "question_number", "flores_passage", "question", *ANSWERS, "correct_answer_num"))


def mmlu_rows(load, lang, split):
    """Questions in Global-MMLU's columns."""
    if lang == "en":
        rows = [{"sample_id": f"{row['subject']}/{split}/{i}", "subject": row["subject"], "question": row["question"],
                 **dict(zip(OPTIONS, row["choices"], strict=True)), "answer": "ABCD"[row["answer"]]}
                for i, row in enumerate(load(MMLU[0], "all", split, ("subject", "question", "choices", "answer")))]
    else:
        rows = load(GLOBAL_MMLU[0], lang, split, ("sample_id", "subject", "question", *OPTIONS, "answer"))
    return [row for row in rows if row["question"] and all(row[option] for option in OPTIONS)]


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def whole(folder):
    """Does a folder hold all files that its provenance.json lists, unchanged?"""
    listed = folder / "provenance.json"
    try:
        return listed.exists() and all(
            (folder / name).exists() and hashlib.sha256((folder / name).read_bytes()).hexdigest() == facts["sha256"]
            for name, facts in json.loads(listed.read_text()).items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{listed} is damaged ({error!r}): delete {folder} to fetch it anew")


def prepare(args):
    from transformers import AutoTokenizer
    parent = next(p for p in (args.out.absolute(), *args.out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        fail(f"--out {args.out}: no folder can be made there")
    for lang in ("en", *args.lang):
        if (args.out / lang).exists() and not (args.out / lang / "provenance.json").exists():
            fail(f"{args.out / lang} holds files that are not from here: choose another --out, or complete them")
    # Access to everything is checked before anything large is fetched.
    commits = {repo: commit_of(repo, revision)
               for repo, revision in (FLORES[args.flores], XLSUM, BELEBELE, MMLU, GLOBAL_MMLU, AE2)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fail(f"--model {args.model}: {error}")
    load = reader(commits)
    for lang in ("en", *args.lang):
        if lang == "en" and whole(args.out / lang):  # all languages are compared on the same English
            print(f"{args.out / lang} is complete and stays as it is; delete it to fetch English anew")
            continue
        files = {"xlsum": (XLSUM[0], xlsum_rows(load, lang, tokenizer)),
                 "belebele": (BELEBELE[0], belebele_rows(load, lang))}
        if lang == "en":
            files["ae2"] = AE2[0], load(AE2[0], None, "eval", ("instruction", "dataset"))
        else:
            files |= {f"flores.{split}": (FLORES[args.flores][0], rows)
                      for split, rows in flores_rows(load, args.flores, lang).items()}
        files |= {f"mmlu.{split}": (MMLU[0] if lang == "en" else GLOBAL_MMLU[0], mmlu_rows(load, lang, split))
                  for split in ("dev", "test")}
        texts = {name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                 for name, (_, rows) in files.items()}
        listed = {f"{name}.jsonl": {"rows": len(rows), "sha256": hashlib.sha256(texts[name].encode()).hexdigest(),
                                    "from": f"{repo}@{commits[repo]}"} for name, (repo, rows) in sorted(files.items())}
        write_text(args.out / lang / "provenance.json", json.dumps(listed, indent=1) + "\n")
        for name, text in texts.items():  # mmlu.test comes last
            write_text(args.out / lang / f"{name}.jsonl", text)
    print(f"wrote {', '.join(str(args.out / lang) for lang in ('en', *args.lang))}\nnext: python evaluate.py --model "
          f"{args.model} --lang {args.lang[0]} --data-dir {args.out} --tasks mt,sum,mrc,mmlu --out eval.json")


def size_of(kind, repo, revision=None, folder=None, part=""):
    """(bytes of the files of a repository, None), or (0, why they cannot be had)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError
    page = f"https://huggingface.co/{'datasets/' * (kind == 'dataset')}{repo}"
    try:
        HfApi().auth_check(repo, repo_type=kind)
        tree = HfApi().list_repo_tree(repo, folder, recursive=True, revision=revision, repo_type=kind)
        size = sum(getattr(entry, "size", 0) for entry in tree if part in entry.path)
        return size, None if size else f"it has no files {folder or ''} {part}"
    except GatedRepoError:
        return 0, f"accept its terms at {page} and set HF_TOKEN"
    except (HfHubHTTPError, ValueError) as error:
        return 0, f"is there {page}, or does it need HF_TOKEN? {' '.join(str(error).split())[:120]}"
    except (OSError, HTTPError) as error:
        fail(f"the hub does not answer ({error})")


def cached(kind, repo, revision=None, folder=None, part=""):
    """Is a repository in the caches of the hub's client or of datasets? HF_HUB_OFFLINE=1 then does without the hub."""
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub import snapshot_download
    if (Path(HF_DATASETS_CACHE) / repo.replace("/", "___")).exists():
        return True
    try:
        wanted = f"{folder + '/' if folder else ''}*{part}*"
        snapshot = snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=wanted,
                                     local_files_only=True)
        return any(part in path.name for path in Path(snapshot, folder or "").rglob("*"))
    except OSError:
        return False


def bytes_below(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink())


def plan(args):
    """Prints what a run of the paper profile downloads, needs and takes; returns what does not fit."""
    import torch
    from huggingface_hub.constants import HF_HOME, HF_HUB_OFFLINE
    from transformers import AutoConfig, AutoModelForCausalLM
    problems, download, lang, tasks = [], {"dataset": 0, "model": 0}, args.lang[0], args.tasks.split(",")
    sets = [] if all(whole(args.out / folder) for folder in ("en", lang)) else [  # fetched before, they are not again
        ("dataset", *FLORES[args.flores], None, "", 1), ("dataset", *XLSUM, None, "", 1),
        ("dataset", *BELEBELE, None, "", 1), ("dataset", *MMLU, "all", "", 1), ("dataset", *GLOBAL_MMLU, lang, "", 1),
        EVALUATION["ae2"]]
    drawn = (args.runs / lang / f"calibration-{args.calibration}-{args.seed}.jsonl").exists()  # score.py reads it again
    wanted = [("dataset", *MADLAD), *sets]
    wanted += [EVALUATION[task] for task in tasks if task in EVALUATION and task != "ae2"
               and (task, args.language_id) != ("codemix", "script")]
    wanted += [("dataset", *CALIBRATION[args.calibration])] if args.calibration in CALIBRATION and not drawn else []
    wanted += [("model", args.model, None, None, ".safetensors", 1)] if not os.path.isdir(args.model) else []
    print("offline, so all must be in the caches:" if HF_HUB_OFFLINE else "download, at most:")
    for kind, repo, revision, folder, part, share in wanted:
        folder = folder and folder.replace("LANG", lang)
        there = cached(kind, repo, revision, folder, part)
        size, reason = (0, None if there else "it is not in the caches, and HF_HUB_OFFLINE is set") \
            if HF_HUB_OFFLINE else size_of(kind, repo, revision, folder, part)
        download[kind] += share * size * (not there)
        problems += [f"{repo}: {reason}"] if reason else []
        print(f"  {repo:<36} " + ("not to be had" if reason else "in the cache" if there else
                                  f"{share * size / 1e9:8.3f} GB"))
    if any(problem.startswith(f"{args.model}: ") for problem in problems):
        return problems
    try:
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        return [*problems, f"{args.model}: {' '.join(str(error).split())[:300]}"]
    count = sum(p.numel() for p in model.parameters())
    halved = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)
                 and m is not model.get_output_embeddings()) if args.compact else 0
    if args.compact and (whole_ones := [m for m in args.methods if re.search("fft|gmt|adalora|lota|row|element", m)]):
        halved = 0
        print(f"{' '.join(whole_ones)} cannot be compact, so the memory is that of the masked loop")

    tokens, saved = args.steps * 32 * 512, count * (config.dtype or torch.float32).itemsize
    print(f"train: {' '.join(args.methods)}: {args.models} models of {count:,} parameters, {tokens:,} tokens each")
    print(f"evaluate: {args.tasks}, for the source model and each of these")
    lota, element = (any(word in method for method in args.methods) for word in ("lota", "element"))
    of_elements = (lota + element) * (4 + args.models) * count  # scores in fp32, and the masks
    outputs = 24 * count + saved * (args.models + lota) + of_elements
    disks = {}  # device -> [place, free, what, bytes to come]
    for place, what, size in (
            (HF_HOME, "downloads, text as Arrow", 4 * download["dataset"] + download["model"]),
            (args.runs, "checkpoints, models, scores less what is there", max(0, outputs - bytes_below(args.runs)))):
        folder = next(p for p in (Path(place).absolute(), *Path(place).absolute().parents) if p.exists())
        disk = disks.setdefault(folder.stat().st_dev, [folder, shutil.disk_usage(folder).free, [], 0])
        disk[2].append(what)
        disk[3] += size
    for folder, free, what, size in disks.values():
        print(f"disk: {size / 1e9:.1f} GB ({', '.join(what)}) of {free / 1e9:.1f} GB free at {folder}")
        problems += [f"the disk at {folder} lacks {(size - free) / 1e9:.1f} GB"] if size > free else []

    text = config.get_text_config()  # 4 x 512 tokens: logits, the head's gradient, inputs of all layers, one layer
    activations = (2048 * (12 * text.vocab_size + 4 * text.num_hidden_layers * text.hidden_size + 80 * text.hidden_size)
                   + 8 * text.vocab_size * text.hidden_size)
    needed = (state := 16 * (count - halved) + (16 - 14 * args.ratio) * halved) + activations
    if torch.cuda.is_available():
        has, name = torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name()
    else:
        has, name = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine, without a CUDA device"
    print(f"memory: {state / 1e9:.1f} GB of weights, gradients, moments, at least about {activations / 1e9:.1f} of "
          f"activations; {name} has {has / 1e9:.1f} GB")
    if needed > has:
        problems.append(f"training takes {needed / 1e9:.1f} GB, and {name} has {has / 1e9:.1f}")
    known = {gpu: peak for gpu, peak in PEAKS.items() if gpu in name} or PEAKS
    hours = ", ".join(f"{8 * count * tokens / (0.4 * peak * 1e12) / 3600:.1f} on {gpu}" for gpu, peak in known.items())
    print(f"hours to train one of them, at 40% of the peak: {hours}")
    grown = {task: longest * math.ceil(answers / max(1, BATCH_TOKENS // (longest + prompt)))
             for task, (answers, longest, prompt) in ANSWERS_OF.items() if task in tasks}
    print(f"hours to evaluate one of them, at most, and of the answers alone: {0.03 * sum(grown.values()) / 3600:.1f} ("
          + ", ".join(f"{task} {0.03 * steps / 3600:.1f}" for task, steps in grown.items())
          + "). All hours are computed, none is measured")
    return problems


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("lang", nargs="+", choices=list(LANGUAGES)[1:])
    add("--out", type=Path, default=Path(__file__).resolve().parent / "paper")
    add("--flores", choices=FLORES, default="ungated", help="which FLORES+ (default: ungated)")
    add("--model", default="allenai/OLMo-2-1124-7B-Instruct", help="its tokenizer counts XL-Sum's tokens")
    add("--plan", action="store_true", help="only say what a run needs; the options below are for it")
    add("--methods", nargs="+", default=["fft", "ssu-wanda"])
    add("--models", type=int, default=2, help="how many models the run saves (default: 2)")
    add("--steps", type=int, default=12208)
    add("--calibration", default="tulu")
    add("--seed", type=int, default=42, help="that drew the calibration text")
    add("--runs", type=Path, default=Path("runs"))
    add("--compact", action="store_true", help="that train.py --compact trains them")
    add("--ratio", type=float, default=0.5, help="the smallest share of columns frozen (default: 0.5)")
    add("--tasks", default="mt,sum,mrc,mmlu,ifeval,gsm8k,ae2,codemix", help="of evaluate.py")
    add("--language-id", choices=["glotlid", "script"], default="glotlid", help="of evaluate.py")
    args = parser.parse_args(argv)
    try:
        problems = plan(args) if args.plan else prepare(args)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(error)
    if not args.plan:
        return 0
    for problem in problems:
        print(f"does not fit: {problem}")
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
