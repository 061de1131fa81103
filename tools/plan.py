"""Say what a run needs before it starts: memory, downloads, disk and hours.

    python tools/plan.py --model allenai/OLMo-2-1124-7B-Instruct
    python tools/plan.py --model MODEL --mask runs/ne/ssu-wanda/mask.safetensors
    python tools/plan.py --model MODEL --lang ne --methods fft ssu-wanda

The first two print which GPU holds the training of a model, by layout and micro-batch size. With
--lang, the plan also covers a run of run_all.sh's paper profile: it asks the hub whether everything
can be had and how large it is (offline: whether the caches have it), and compares disk and memory
with those of this machine. The exit code is 2 if something cannot be had or does not fit.

Bytes a weight for weights, gradients and moments (`t`: the trainable fraction):

    precision   masked training        compact training, for a matrix with frozen columns
    bf16, fp16  4 + 4 + 8 = 16         2 + 16 t
    fp32        4 + 4 + 8 = 16         4 + 16 t
    bf16-true   2 + 2 + 8 = 12         2 + 12 t

These are exact. Activations are a formula, for h the hidden and m the intermediate size: a token
keeps 50 h + 8 m bytes in a decoder layer of OLMo 2. Layers of other models keep less: those of
Llama and Qwen 20 to 40% less. With recomputation it keeps the input of each layer, and one layer
whole. Logits and their gradients take 12 bytes a token and vocabulary entry. Autocast adds a bf16
copy of each matrix of the layers that are not recomputed. Fragmentation is not counted.

Hours are computed, not measured: 8 floating-point operations a parameter and token in training
(6, and 2 for recomputation) at 40% of a GPU's peak.
"""

import argparse
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

GPUS = (24, 40, 80, 141)  # GB; they have some 6% more, which the CUDA context and fragments take
MICRO_BATCHES = (32, 16, 8, 4, 2, 1)
SEQ_LEN, BATCH_SIZE = 512, 32  # Table 8
PEAKS = {"H100": 989, "H200": 989, "A100": 312, "B200": 2250, "MI300X": 1307}  # dense bf16 TFLOP/s
WHOLE = re.compile("fft|gmt|adalora|lota|-row|-element")  # methods that cannot be compact


class Source(NamedTuple):
    """What is fetched from the hub, and the fraction of it that is read."""

    kind: str  # "dataset" or "model"
    repo: str
    revision: str | None = None
    folder: str | None = None
    part: str = ""  # of the file names
    fraction: float = 1.0


MADLAD_COMMIT = "ecd71297d60c1eb996cd3d7c44c60ad5b55adfc6"
CALIBRATION = {
    "tulu": Source("dataset", "allenai/tulu-3-sft-olmo-2-mixture", None, "data", "", 0.1),
    "alpaca": Source(
        "dataset", "tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017", "data"
    ),
}
TASKS = {
    "ifeval": Source("dataset", "wis-k/instruction-following-eval"),
    "gsm8k": Source("dataset", "openai/gsm8k", None, "main"),
    "codemix": Source(
        "model", "cis-lmu/glotlid", "e773fb98e530c58837b11c61f94653f6fe7e1465", None, "_v3.bin"
    ),
}


def fail(message):
    """Print an error that the user can fix, in one line, and exit with code 2."""
    print(f"plan.py: error: {' '.join(str(message).split())[:500]}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="source model: directory or hub id")
    add("--mask", type=Path, help="mask.safetensors of make_mask.py (default: half of each matrix)")
    add("--precision", choices=["bf16", "bf16-true", "fp16", "fp32"], default="bf16-true")
    add("--compact", choices=["0", "1"], default="0", help="1: plan for train.py --compact")
    add("--micro-batch-size", type=int, default=4, help="sequences per forward pass")
    run = parser.add_argument_group("a run of the paper profile").add_argument
    run("--lang", help="code of the target language")
    run("--methods", nargs="+", default=["fft", "ssu-wanda"], help="methods of run_all.sh")
    run("--ratios", nargs="+", type=float, default=[0.5], help="fractions of columns to freeze")
    run("--steps", type=int, default=12208, help="optimizer steps")
    run("--tasks", nargs="+", default=["mt", "sum", "mrc", "mmlu"], help="tasks of run_all.sh")
    run("--calibration", default="tulu", help="tulu, alpaca, or a file")
    run("--flores", choices=["gated", "ungated"], default="ungated", help="version of FLORES+")
    run("--language-id", choices=["glotlid", "script"], default="glotlid", help="for codemix")
    run("--data-dir", type=Path, default=Path("data/paper"), help="output of prepare_paper.py")
    run("--runs", type=Path, default=Path("runs"), help="directory of the results")
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------
# Memory


def load_skeleton(name):
    """Return the model of a directory or hub id on the meta device: shapes without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        fail(f"--model {name}: {error}")


def read_mask(path, model):
    """Return {name: trainable fraction} of the matrices of which a mask freezes columns."""
    parameters = dict(model.named_parameters())
    fractions = {}
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") != "ssu-mask":
                fail(f"--mask {path}: not a mask file. Make it with make_mask.py")
            for name in file.keys():
                mask = file.get_tensor(name)
                if name not in parameters:
                    fail(f"--mask {path}: made for another model. Mask this --model")
                if mask.dim() == 2 and len(mask) == 1 and not mask.all():
                    fractions[name] = mask.float().mean().item()
    except (OSError, SafetensorError) as error:
        fail(f"--mask {path}: cannot be read ({error}). Make it again with make_mask.py")
    return fractions


def trainable_fractions(model, mask, ratio):
    """Return {name: trainable fraction} of the matrices that compact training takes.

    Without a mask file, it is 1 - ratio of each nn.Linear but the LM head.
    """
    if mask:
        return read_mask(mask, model)
    head = model.get_output_embeddings()
    return {
        f"{name}.weight": 1 - ratio
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def state_bytes(model, precision, fractions=None):
    """Return the bytes of weights, gradients and moments; masked unless `fractions` are given."""
    trained = 12 if precision == "bf16-true" else 16
    whole_matrix = 4 if precision == "fp32" else 2
    total = 0
    for name, p in model.named_parameters():
        if fractions and name in fractions:
            total += p.numel() * (whole_matrix + trained * fractions[name])
        else:
            total += p.numel() * trained
    return total


def activation_bytes(model, precision, compact, tokens, recompute):
    """Return the bytes of activations, logits and casts of a micro-batch of so many tokens."""
    text = model.config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    head = text.vocab_size * hidden
    size = {"bf16-true": 1, "bf16": 1, "fp16": 1, "fp32": 2}[precision]
    layer = tokens * (50 * hidden + 8 * text.intermediate_size) * size
    logits = 12 * tokens * text.vocab_size + 8 * head  # 8: a copy and gradients of the head
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - head
    copies = 2 * matrices if precision in ("bf16", "fp16") and not compact else 0
    if not recompute:
        return layers * layer + logits + copies
    inputs = layers * tokens * hidden * (2 if precision == "bf16-true" else 4)
    return inputs + max(layer + copies / layers, logits)


def largest_micro_batch(model, precision, compact, free, recompute):
    """Return the largest micro-batch size that fits into `free` bytes, or 0."""
    for size in MICRO_BATCHES:
        if activation_bytes(model, precision, compact, size * SEQ_LEN, recompute) <= free:
            return size
    return 0


def print_memory(model, fractions):
    """Print which GPU holds which layout, and with which micro-batch size."""
    print(
        f"Sequences of {SEQ_LEN} tokens in a micro-batch, without / with --gradient-checkpointing; "
        "-: does not fit\n"
    )
    print("| training | state, GB | " + " | ".join(f"{size} GB GPU" for size in GPUS) + " |")
    print("|---|---|" + "---|" * len(GPUS))
    for precision in ("bf16", "bf16-true"):
        for compact in (False, True):
            state = state_bytes(model, precision, fractions if compact else None)
            cells = []
            for gpu in GPUS:
                sizes = [
                    largest_micro_batch(model, precision, compact, gpu * 1e9 - state, recompute)
                    for recompute in (False, True)
                ]
                cells.append(" / ".join(str(size or "-") for size in sizes))
            label = f"{'compact' if compact else 'masked'}, {precision}"
            print(f"| {label} | {state / 1e9:.1f} | " + " | ".join(cells) + " |")
    print()


def device_memory():
    """Return (bytes, name) of what would hold the training on this machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, "this machine, without a CUDA device"


def check_memory(args, model, fractions):
    """Print what the largest training of the run needs; return the problems."""
    compact = args.compact == "1"
    whole = [method for method in args.methods if WHOLE.search(method)]
    if compact and whole:
        print(f"{' '.join(whole)} cannot be compact, so the memory is that of masked training")
        compact = False
    state = state_bytes(model, args.precision, fractions if compact else None)
    tokens = args.micro_batch_size * SEQ_LEN
    activations = activation_bytes(model, args.precision, compact, tokens, recompute=True)
    has, name = device_memory()
    needed = state + activations
    print(
        f"memory: {state / 1e9:.1f} GB of weights, gradients and moments, about "
        f"{activations / 1e9:.1f} GB of activations; {name} has {has / 1e9:.1f} GB"
    )
    if needed <= has:
        return []
    return [f"training takes {needed / 1e9:.1f} GB, and {name} has {has / 1e9:.1f}"]


# --------------------------------------------------------------------------------------------------
# Downloads, disk and hours


def wanted_sources(args):
    """Return the sources that the run reads from the hub."""
    from data import prepare_paper

    sources = [
        Source("dataset", "allenai/MADLAD-400", MADLAD_COMMIT, f"data/{args.lang}", "_clean_")
    ]
    if args.calibration in CALIBRATION:
        sources.append(CALIBRATION[args.calibration])
    if not all(prepare_paper.is_whole(args.data_dir / folder) for folder in ("en", args.lang)):
        repos = prepare_paper.repositories(args.flores)
        folders = {prepare_paper.MMLU: "all", prepare_paper.GLOBAL_MMLU: args.lang}
        sources += [
            Source("dataset", repo, revision, folders.get(repo)) for repo, revision in repos.items()
        ]
    for task, source in TASKS.items():
        if task in args.tasks and (task != "codemix" or args.language_id == "glotlid"):
            sources.append(source)
    if not Path(args.model).is_dir():
        sources.append(Source("model", args.model, part=".safetensors"))
    return sources


def size_on_hub(source):
    """Return (bytes, None), or (0, why it cannot be had)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError

    folder = "datasets/" if source.kind == "dataset" else ""
    page = f"https://huggingface.co/{folder}{source.repo}"
    try:
        HfApi().auth_check(source.repo, repo_type=source.kind)
        tree = HfApi().list_repo_tree(
            source.repo,
            source.folder,
            recursive=True,
            revision=source.revision,
            repo_type=source.kind,
        )
        size = sum(getattr(entry, "size", 0) for entry in tree if source.part in entry.path)
    except GatedRepoError:
        return 0, f"accept its terms at {page} and set HF_TOKEN"
    except (HfHubHTTPError, ValueError) as error:
        return 0, f"is there {page}, or does it need HF_TOKEN? {str(error)[:120]}"
    except (OSError, HTTPError) as error:
        fail(f"the hub does not answer ({error}). Try again, or set HF_HUB_OFFLINE=1")
    if not size:
        return 0, f"it has no files {source.folder or ''} {source.part}"
    return source.fraction * size, None


def is_cached(source):
    """Return whether the caches of huggingface_hub or datasets have a source."""
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub import snapshot_download

    if (Path(HF_DATASETS_CACHE) / source.repo.replace("/", "___")).exists():
        return True
    try:
        snapshot = snapshot_download(
            source.repo,
            repo_type=source.kind,
            revision=source.revision,
            local_files_only=True,
            allow_patterns=f"{source.folder or ''}*{source.part}*",
        )
    except OSError:
        return False
    return any(source.part in p.name for p in Path(snapshot, source.folder or "").rglob("*"))


def check_downloads(args):
    """Print each source; return (bytes to download by kind, problems)."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    download, problems = {"dataset": 0, "model": 0}, []
    print("offline, so all must be in the caches:" if HF_HUB_OFFLINE else "download, at most:")
    for source in wanted_sources(args):
        cached, size, reason = is_cached(source), 0, None
        if not HF_HUB_OFFLINE:
            size, reason = size_on_hub(source)
        elif not cached:
            reason = "it is not in the caches, and HF_HUB_OFFLINE is set"
        if reason:
            problems.append(f"{source.repo}: {' '.join(reason.split())}")
            said = "not to be had"
        elif cached:
            said = "in the cache"
        else:
            download[source.kind] += size
            said = f"{size / 1e9:8.3f} GB"
        print(f"  {source.repo:<36} {said}")
    return download, problems


def count_models(args):
    """Return how many models the run saves."""
    fixed = re.compile("fft|adalora|s2ft-.*|lota-.*")
    return sum(1 if fixed.fullmatch(method) else len(args.ratios) for method in args.methods)


def bytes_below(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def check_disk(args, model, download):
    """Print what comes to each disk; return the problems."""
    from huggingface_hub.constants import HF_HOME

    count, models = sum(p.numel() for p in model.parameters()), count_models(args)
    saved = count * (model.config.dtype or torch.float32).itemsize
    lota = any(method.startswith("lota") for method in args.methods)
    element = any(method.endswith("-element") for method in args.methods)
    results = 24 * count  # two checkpoints of 12 bytes a weight, while one replaces the other
    results += saved * (models + lota)
    results += (lota + element) * (4 + models) * count  # scores and masks of every weight
    coming = [
        # Text is kept compressed and as Arrow.
        (Path(HF_HOME), "downloads, text as Arrow", 4 * download["dataset"] + download["model"]),
        (args.runs, "checkpoints, models, scores", max(0, results - bytes_below(args.runs))),
    ]
    disks = {}  # device: [directory, what comes, bytes]
    for place, what, size in coming:
        place = place.absolute()
        folder = next(p for p in (place, *place.parents) if p.exists())
        disk = disks.setdefault(folder.stat().st_dev, [folder, [], 0])
        disk[1].append(what)
        disk[2] += size
    problems = []
    for folder, what, size in disks.values():
        free = shutil.disk_usage(folder).free
        print(f"disk: {size / 1e9:.1f} GB ({'; '.join(what)}) of {free / 1e9:.1f} free at {folder}")
        if size > free:
            problems.append(f"the disk at {folder} lacks {(size - free) / 1e9:.1f} GB")
    return problems


def print_hours(args, model):
    count, tokens = sum(p.numel() for p in model.parameters()), args.steps * BATCH_SIZE * SEQ_LEN
    print(
        f"train: {' '.join(args.methods)}: {count_models(args)} models of {count:,} parameters, "
        f"{tokens:,} tokens each"
    )
    name = device_memory()[1]
    known = {gpu: peak for gpu, peak in PEAKS.items() if gpu in name} or PEAKS
    hours = [
        f"{8 * count * tokens / (0.4 * peak * 1e12) / 3600:.1f} on {gpu}"
        for gpu, peak in known.items()
    ]
    print(f"hours to train one of them, computed at 40% of the peak: {', '.join(hours)}")


def main(argv=None):
    args = parse_args(argv)
    download, problems = check_downloads(args) if args.lang else ({}, [])
    if not any(problem.startswith(f"{args.model}: ") for problem in problems):
        model = load_skeleton(args.model)
        fractions = trainable_fractions(model, args.mask, min(args.ratios))
        print_memory(model, fractions)
        if args.lang:
            print_hours(args, model)
            problems += check_disk(args, model, download)
            problems += check_memory(args, model, fractions)
    for problem in problems:
        print(f"does not fit: {problem}")
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
