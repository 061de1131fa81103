"""Say what a run needs before it starts: memory, downloads and disk.

    python tools/plan.py --model allenai/OLMo-2-1124-7B-Instruct
    python tools/plan.py --model allenai/OLMo-2-1124-13B-Instruct --gpus 8
    python tools/plan.py --model MODEL --lang ne --methods fft ssu-wanda

The first two print which GPU holds the training of a model, by layout and micro-batch size. --lang
plans a run of run_all.sh, which calls this script: does the hub give everything, and do memory and
disk of this machine suffice? The exit code is 2 if not. --check looks at the values of the options
alone and needs only the standard library.

tools/memory.py says how memory is counted.
"""

import argparse
import functools
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import errors
from data.rows import language_code, paper_language_code

fail = functools.partial(errors.fail, "plan.py")

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)

# Methods of run_all.sh: those without a ratio, then the others.
S2FT = ["s2ft-down", "s2ft-down-output", "s2ft-down-embeddings"]
SINGLE = ["fft", "adalora", "lota-90", "lota-50", *S2FT]
STATIC = ["ssu-wanda", "ssu-mag", "ssu-rand", "ssu-sparsegpt", "ssu-fim", "hft"]
METHODS = [*SINGLE, *STATIC, "ssu-wanda-row", "ssu-wanda-element", "gmt", "lota"]
COMPACT = [*STATIC, *S2FT]  # the methods that freeze whole columns
ELEMENTS = {"ssu-wanda-element", "lota", "lota-90", "lota-50"}  # that freeze single weights
OPTIMIZERS = ["adamw", "adamw8bit", "adamw8bit-nearest"]
EMBEDDED_TASKS = ["bpb", "mcq", "chat"]  # these need held-out text
CHAT_TASKS = ["chat", "ifeval", "gsm8k", "ae2", "codemix", "mtb", "t3"]  # of tools/chat_eval.py
TASKS = ["mt", "sum", "mrc", "mmlu", *CHAT_TASKS[1:]]
EMBEDDED_MODEL = "data/embedded/model"


# What is fetched from the hub: kind, repository, revision, files.
MADLAD = "dataset", "allenai/MADLAD-400", "ecd71297d60c1eb996cd3d7c44c60ad5b55adfc6"
GLOTLID = "model", "cis-lmu/glotlid", "e773fb98e530c58837b11c61f94653f6fe7e1465", ["*_v3.bin"]
ALPACA = "dataset", "tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017", ["data/*"]
TULU = "dataset", "allenai/tulu-3-sft-olmo-2-mixture", None, ["data/*"]
CALIBRATION = {"tulu": TULU, "alpaca": ALPACA}
TASK_SOURCES = {
    "ifeval": ("dataset", "wis-k/instruction-following-eval", None, ["*"]),
    "gsm8k": ("dataset", "openai/gsm8k", None, ["main/*"]),
    "codemix": GLOTLID,
    "mtb": ("model", "flowaicom/Flow-Judge-v0.1", None, ["*.safetensors"]),
    "t3": ("model", "allenai/wildguard", None, ["*.safetensors"]),
}


def is_calibrated(method):
    """Return whether a method of run_all.sh reads calibration text."""
    others = ("fft", "adalora", "hft", "gmt", "lota", "s2ft-", "ssu-rand", "ssu-mag")
    return not method.startswith(others)


def is_asked(prefix, args):
    """Return whether a method of that beginning is asked for."""
    return any(method.startswith(prefix) for method in args.methods)


# --------------------------------------------------------------------------------------------------
# Options


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail
    add = parser.add_argument
    precisions = ["bf16", "bf16-true", "fp16", "fp32"]
    add("--model", required=True, help="source model: directory or hub id")
    add("--precision", choices=precisions, default="bf16-true", help="precision of train.py")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="optimizer of train.py")
    add("--compact", choices=["0", "1"], default="0", help="1: plan for train.py --compact")
    add("--batch-size", type=int, default=32, help="sequences per optimizer step")
    add("--micro-batch-size", type=int, default=4, help="sequences per forward pass")
    add("--seq-len", type=int, default=512, help="tokens per sequence")
    add("--gpus", type=int, default=1, help="GPUs that share the training, or processes on a CPU")
    add("--gradient-checkpointing", action="store_true", help="recomputation of activations")
    run = parser.add_argument_group("a run of run_all.sh").add_argument
    run("--check", action="store_true", help="check of the options alone, without a plan")
    run("--lang", type=language_code, help="code of the target language")
    run("--profile", choices=["embedded", "paper"], default="paper", help="profile of run_all.sh")
    help_methods = "methods (none: evaluation alone)"
    defaults = ["fft", "ssu-wanda"]
    run("--methods", nargs="*", choices=METHODS, default=defaults, help=help_methods)
    run("--ratios", nargs="+", type=float, default=[0.5], help="fractions of columns to freeze")
    run("--steps", type=int, default=12208, help="optimizer steps")
    run("--lr", type=float, default=5e-5, help="peak learning rate")
    run("--tasks", nargs="+", choices=EMBEDDED_TASKS + TASKS, default=["mt"], help="tasks")
    run("--calibration", default="tulu", help="tulu, alpaca, or a file")
    run("--num-samples", type=int, default=500, help="calibration sequences")
    run("--seed", type=int, default=42, help="seed of the run")
    run("--flores", choices=["gated", "ungated"], default="ungated", help="version of FLORES+")
    run("--language-id", choices=["glotlid", "script"], default="glotlid", help="for codemix")
    run("--data-dir", type=Path, default=Path("data/paper"), help="directory of the data")
    run("--runs", type=Path, default=Path("runs"), help="directory of the results")
    args = parser.parse_args(argv)
    check_values(args)
    if args.optimizer != "adamw" and (args.gpus > 1 or args.precision != "bf16-true"):
        fail(f"--optimizer {args.optimizer}: needs one GPU and bf16-true. Set NPROC and PRECISION")
    if not 0 <= args.lr < float("inf"):
        fail(f"--lr {args.lr}: must be a finite number of at least 0")
    if args.compact == "1" and args.precision == "fp16":
        fail("--compact 1 and --precision fp16: train.py takes one of them. Set COMPACT=0")
    if "adalora" in args.methods and (args.optimizer != "adamw" or args.precision == "fp16"):
        fail("adalora: takes neither 8-bit moments nor fp16. Leave it out of METHODS")
    return args


def check_values(args):
    """Fail if a value is out of range, or names something that is not there."""
    is_id = re.fullmatch(r"[\w-]+/[\w.-]+", args.model)
    if not is_id and not Path(args.model).is_dir() and args.model != EMBEDDED_MODEL:
        fail(f"--model {args.model}: neither a directory nor a hub id. Correct the name")
    for name in ("steps", "num_samples", "gpus", "batch_size", "micro_batch_size", "seq_len"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if not 0 <= args.seed < 10**18:
        fail(f"--seed {args.seed}: must lie between 0 and 10^18")
    if len(set(args.ratios)) < len(args.ratios):
        fail(f"--ratios {' '.join(map(str, args.ratios))}: names one twice. Leave it out")
    for ratio in args.ratios:
        if not 0 <= ratio <= 1 or (ratio == 1 and "gmt" in args.methods):
            fail(f"--ratios {ratio:g}: must lie between 0 and 1, and below 1 for gmt")
    if args.batch_size % args.gpus:
        fail(f"--gpus {args.gpus}: must divide the batch of {args.batch_size} sequences. Change it")
    check_tasks(args)
    made_here = args.profile == "paper" or args.data_dir == Path("data/embedded")
    if args.lang and not made_here and not args.data_dir.is_dir():
        fail(f"--data-dir {args.data_dir}: no such directory. See data/README.md")


def check_tasks(args):
    """Fail if a task's data cannot be had, or if a model would be without an evaluation."""
    if args.lang and args.profile == "paper":
        try:
            paper_language_code(args.lang)
        except argparse.ArgumentTypeError as error:
            fail(error)
    held_out = set(EMBEDDED_TASKS) & set(args.tasks)
    if args.profile == "paper" and held_out:
        fail(f"--tasks {' '.join(held_out)}: the paper profile has no held-out text. Drop them")
    new = []
    if args.lang and set(args.tasks) <= set(CHAT_TASKS):
        folders = [args.runs / args.lang / "source", *models_of(args)]
        new = [folder.name for folder in folders if not (folder / "eval.json").exists()]
    if new:
        some = "mmlu" if args.profile == "paper" else "bpb"
        what = f"--tasks {' '.join(args.tasks)}: none is of evaluate.py"
        fail(f"{what}, which has not evaluated {' '.join(new)}. Add {some}, for instance")


# --------------------------------------------------------------------------------------------------
# Memory


def print_table(args, model):
    """Print which GPU holds which layout, and with which micro-batch size."""
    from tools.memory import GPUS, bytes_per_gpu

    layouts = ["masked, bf16", "compact, bf16", "masked, bf16-true", "compact, bf16-true"]
    if args.gpus == 1:
        layouts.append("compact, bf16-true, adamw8bit")
    head = ["training", "state, GB", *[f"{name} GPU" for name in GPUS]]
    print(f"Under a GPU: the largest micro-batch of sequences of {args.seq_len} tokens that fits,")
    print("without / with --gradient-checkpointing. A dash means that none fits.")
    if args.gpus > 1:
        head.insert(2, f"per GPU, {args.gpus} GPUs")
        print(f"Per GPU: GB for a micro-batch of {args.micro_batch_size}, with recomputation.")
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for layout in layouts:
        kind, precision, *optimizer = layout.split(", ")
        way = model, precision, kind == "compact", args.gpus
        tokens = args.micro_batch_size * args.seq_len
        state, needed = bytes_per_gpu(*way, tokens, True, bool(optimizer))
        row = [layout, f"{state * args.gpus / 1e9:.1f}"]
        if args.gpus > 1:
            row.append(f"{needed / 1e9:.1f}")
        for memory in GPUS.values():
            fits = {False: "-", True: "-"}
            for recompute in fits:
                for size in MICRO_BATCHES:
                    tokens = size * args.seq_len
                    _, needed = bytes_per_gpu(*way, tokens, recompute, bool(optimizer))
                    if needed <= memory and size <= args.batch_size // args.gpus:
                        fits[recompute] = size
            row.append(f"{fits[False]} / {fits[True]}")
        print(f"| {' | '.join(row)} |")
    print()


def device_memory(gpus):
    """Return (bytes, name) of what would hold the training of one process on this machine."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total / gpus, "this machine, without a CUDA device,"


def bytes_of(method, args, model):
    """Return (GPUs that share it, state, all bytes) of a process of a method's training."""
    from tools.memory import bytes_per_gpu

    precision, gpus, micro_batch = args.precision, args.gpus, args.micro_batch_size
    if method == "adalora":
        precision = precision.removesuffix("-true")
    if method == "adalora" or precision == "fp16":
        gpus = 1  # train.py runs these in one process
    if method == "gmt":
        micro_batch = max(1, args.batch_size // 4 // gpus)  # four micro-batches (Table 8)
    compact = args.compact == "1" and method in COMPACT
    eight_bit = args.optimizer != "adamw"
    way = model, precision, compact, gpus, micro_batch * args.seq_len, args.gradient_checkpointing
    state, needed = bytes_per_gpu(*way, eight_bit)
    _, sizes, matrices = model
    if method == "adalora":  # matrices have neither gradients nor moments. Adapters are small
        frozen = 12 * sum(sizes[name] for name in matrices)
        state, needed = state - frozen, needed - frozen
    if method in ELEMENTS:
        needed += sum(sizes.values()) / gpus  # their masks have a byte for each weight
    return gpus, state, needed


def check_memory(args, model):
    """Print what the largest training of the run needs. Return the problems."""
    found = []
    for method in args.methods:
        gpus, state, needed = bytes_of(method, args, model)
        has, name = device_memory(gpus)
        found.append((needed - has, method, state, needed, has, name))
    lacking, method, state, needed, has, name = max(found, key=lambda row: row[0])
    print(
        f"memory of a process of {method}: {state / 1e9:.1f} GB of weights, gradients and moments, "
        f"about {(needed - state) / 1e9:.1f} GB of all else; {name} has {has / 1e9:.1f} GB"
    )
    if lacking <= 0:
        return []
    remedies = []
    if method != "adalora" and args.precision != "bf16-true":
        remedies.append("PRECISION=bf16-true")
    if method != "adalora" and args.optimizer == "adamw" and args.gpus == 1:
        remedies.append("OPTIMIZER=adamw8bit")
    if method in COMPACT and args.compact == "0":
        remedies.append("COMPACT=1")
    remedies = ", ".join([*remedies, "leave it out of METHODS"])
    sizes = f"training by {method} takes {needed / 1e9:.1f} GB, and {name} has {has / 1e9:.1f}"
    return [f"{sizes}. Try {remedies}"]


# --------------------------------------------------------------------------------------------------
# Downloads and disk


def wanted_sources(args):
    """Return what the stages read from the hub. data/prepare_paper.py checks the other sets."""
    sources = []
    if args.profile == "paper" and args.methods:
        sources.append((*MADLAD, [f"data/{args.lang}/*_clean_*"]))
    if args.calibration in CALIBRATION and any(map(is_calibrated, args.methods)):
        sources.append(CALIBRATION[args.calibration])
    for task, source in TASK_SOURCES.items():
        if task in args.tasks and (task != "codemix" or args.language_id == "glotlid"):
            sources.append(source)
    if not Path(args.model).is_dir():
        sources.append(("model", args.model, None, ["*.safetensors"]))
    return sources


def check_downloads(args):
    """Print each source. Return ({kind: bytes to download}, problems)."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import disable_progress_bars

    if HF_HUB_OFFLINE:
        print("HF_HUB_OFFLINE is set, so nothing is downloaded. The cache is not checked")
        return Counter(), []
    disable_progress_bars()
    downloads, problems = Counter(), []
    for kind, repo, revision, patterns in wanted_sources(args):
        wanted = dict(repo_type=kind, revision=revision, allow_patterns=patterns)
        try:
            HfApi().auth_check(repo, repo_type=kind)
            files = snapshot_download(repo, dry_run=True, **wanted)
            if not files:
                raise FileNotFoundError(f"it has no files {' '.join(patterns)}")
        except (OSError, HTTPError) as error:
            why = " ".join(str(error).split())[:160]
            reason = f"{why}. Set HF_TOKEN and accept its terms; offline, HF_HUB_OFFLINE=1"
            problems.append(f"the hub does not give {repo}: {reason}")
            print(f"{repo:<36} not to be had")
            continue
        size = sum(file.file_size for file in files if file.will_download)
        downloads[kind] += size
        print(f"{repo:<36} download {size / 1e9:8.3f} GB")
    return downloads, problems


def models_of(args):
    """Return the folders of the models that run_all.sh makes."""
    names = []
    for method in args.methods:
        for ratio in [0.5] if method in SINGLE else args.ratios:
            names.append(method if ratio == 0.5 else f"{method}@{ratio:g}")
    return [args.runs / args.lang / name for name in names]


def check_disk(args, weights, itemsize, downloads):
    """Print what comes to the disks. Return the problems.

    weights: the number of weights; itemsize: bytes of each in a saved model; downloads: of
    check_downloads.
    """
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = models_of(args)
    models = len(folders) + is_asked("lota", args)  # it first trains a model to choose weights by
    checkpoints = 24  # bytes a weight, the last two: weights and two moments
    if args.precision == "bf16-true":
        checkpoints = 20
    if args.optimizer != "adamw":
        checkpoints = 9
    results = (checkpoints + models * itemsize) * weights
    if ELEMENTS & set(args.methods):
        results += (4 + models) * weights  # scores and masks of every weight
    if not args.methods:
        results = 0
    for folder in folders:
        results -= sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    # A data set is kept compressed, and as Arrow, which takes up to three times as much.
    coming = [(HF_HUB_CACHE, downloads.total()), (HF_DATASETS_CACHE, 3 * downloads["dataset"])]
    coming.append((args.runs, max(0, results)))

    problems, disks = [], {}
    for place, size in coming:
        place = Path(place).absolute()
        folder = next(p for p in (place, *place.parents) if p.exists())
        disk = disks.setdefault(folder.stat().st_dev, {"folder": folder, "coming": 0})
        disk["coming"] += size
        print(f"disk: {size / 1e9:.1f} GB for {place}")
        if not os.access(folder, os.W_OK) and (size or place != Path(HF_HUB_CACHE)):
            problems.append(f"{folder} cannot be written. Set HF_HOME or RUNS to another place")
    for disk in disks.values():
        lacking = disk["coming"] - shutil.disk_usage(disk["folder"]).free
        if lacking > 0:
            problems.append(f"the disk at {disk['folder']} lacks {lacking / 1e9:.1f} GB")
    return problems


def check_main_memory(weights, args):
    """Return the problems of main memory on a machine whose GPUs train.

    At its end, train.py reads the source again in fp32, and rounds it weight by weight. For lota,
    score.py reads two models in fp32 and writes a score of each weight.
    """
    bytes_per_weight = 12 if is_asked("lota", args) else 4.5
    needed = bytes_per_weight * weights + 3e9  # 3 GB of libraries
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(f"main memory: up to {needed / 1e9:.1f} GB; this machine has {has / 1e9:.1f} GB")
    return [] if needed <= has else [f"main memory lacks {(needed - has) / 1e9:.1f} GB"]


def plan(args):
    """Print the plan. Return the problems."""
    import torch

    from data.models import build_skeleton
    from tools.memory import is_counted, trained_fractions

    downloads, problems = check_downloads(args) if args.lang else (Counter(), [])
    if any(f" {args.model}: " in problem for problem in problems):
        return problems
    skeleton, _ = build_skeleton(args.model, fail)
    if args.lang and any(method.startswith(("ssu-", "lota")) for method in args.methods):
        import score

        score.scored_parameters(skeleton)  # score.py refuses experts, which FFT is trained with
    config, dtype = skeleton.config.get_text_config(), skeleton.config.dtype
    sizes = {name: p.numel() for name, p in skeleton.named_parameters()}
    fractions = trained_fractions(skeleton, min(args.ratios))
    model, weights = (config, sizes, fractions), sum(sizes.values())
    counted = fractions and hasattr(config, "intermediate_size")
    counted = counted and is_counted(config, {args.precision, "bf16", "bf16-true"})
    print(f"{args.model}: {weights:,} parameters")
    if not counted:
        print(f"memory: not counted for {config.model_type}")
    elif args.profile == "paper":
        print_table(args, model)
    if args.lang:
        problems += check_disk(args, weights, dtype.itemsize if dtype else 4, downloads)
    if args.lang and args.methods and counted:
        problems += check_memory(args, model)
    if args.lang and args.methods and torch.cuda.is_available():
        problems += check_main_memory(weights, args)
    return problems


def run(args):
    """Check or plan what is asked for. Return the exit code."""
    if args.check:
        return 0
    if args.model == EMBEDDED_MODEL and not Path(args.model).exists():
        print("the model is made first; it takes up to 6.5 GB of memory, 0.6 GB of disk per method")
        return 0
    problems = plan(args)
    for problem in problems:
        print(f"problem: {problem}")
    return 2 if problems else 0


def main(argv=None):
    try:
        return run(parse_args(argv))
    except OSError as error:
        fail(f"a file cannot be read ({error}). Check --model and --data-dir")
    except KeyboardInterrupt:
        print("plan.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
