"""What the paper profile would download, need and take, against what this machine has. It fetches config.json alone.

    python data/plan_paper.py ne --model allenai/OLMo-2-1124-7B-Instruct --methods fft ssu-wanda --steps 12208

run_all.sh LANG --dry-run calls it. Sizes are the hub's own; a set that it does not give is named. Memory and disk are
counted: 16 bytes a parameter in training (fp32 weights, gradients, two moments), 12 in a checkpoint. Hours are
computed, not measured: 8 floating-point operations a parameter and token (6, and 2 for gradient checkpointing) at 40%
of the GPU's peak. Exit code 2 if something does not fit or cannot be had.
"""
import argparse
import os
import shutil
import sys
from pathlib import Path

PEAKS = {"H100": 989, "H200": 989, "A100": 312, "B200": 2250, "MI300X": 1307}  # dense bf16 TFLOP/s
SETS = (  # data set, revision, folder, part of the file names, what share of the files is fetched at most
    ("allenai/tulu-3-sft-olmo-2-mixture", None, "data", "", 0.1),
    ("allenai/MADLAD-400", None, "data/LANG", "_clean_", 1),
    ("csebuetnlp/xlsum", "refs/convert/parquet", None, "", 1), ("facebook/belebele", None, None, "", 1),
    ("cais/mmlu", None, "all", "", 1), ("CohereLabs/Global-MMLU", None, "LANG", "", 1))
FLORES = {"gated": "openlanguagedata/flores_plus", "ungated": "mteb/FloresBitextMining"}
UNFINISHED = 8  # GB of activations and logits beside the state, with gradient checkpointing, 4 x 512 tokens


def size_of(repo, kind, revision=None, folder=None, part=""):
    """(bytes of files of a repository, None), or (0, the reason why the hub does not say)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    try:
        tree = HfApi().list_repo_tree(repo, folder, recursive=True, revision=revision, repo_type=kind)
        return sum(getattr(entry, "size", 0) for entry in tree if part in entry.path), None
    except HfHubHTTPError as error:
        return 0, " ".join(str(error).split())[:160]
    except (OSError, HTTPError) as error:
        print(f"does not fit: the hub does not answer ({error})")
        raise SystemExit(2) from None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lang")
    parser.add_argument("--model", default="allenai/OLMo-2-1124-7B-Instruct")
    parser.add_argument("--methods", nargs="+", default=["fft", "ssu-wanda"])
    parser.add_argument("--steps", type=int, default=12208)
    parser.add_argument("--flores", choices=FLORES, default="ungated")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"))
    args = parser.parse_args(argv)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    problems, download = [], 0

    print("download, at most:")
    wanted = [(share, (repo, "dataset", revision, folder and folder.replace("LANG", args.lang), part))
              for repo, revision, folder, part, share in (*SETS, (FLORES[args.flores], None, None, "", 1))]
    if not os.path.isdir(args.model):
        wanted.append((1, (args.model, "model", None, None, ".safetensors")))
    for share, what in wanted:
        size, reason = size_of(*what)
        download += share * size
        problems += [f"the hub does not give {what[0]}"] if reason else []
        print(f"  {what[0]:<36} " + (f"not to be had: {reason}" if reason else f"{share * size / 1e9:8.3f} GB"))
    try:
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        print(f"does not fit: {args.model}: {' '.join(str(error).split())[:300]}")
        return 2
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())

    tokens, saved = args.steps * 32 * 512, count * (config.dtype or torch.float32).itemsize
    print(f"train: {' '.join(args.methods)}: {count:,} parameters, each {tokens:,} tokens")
    print("evaluate: translation, summarisation, Belebele, MMLU, for the source model and each method")

    disk = download + 12 * count + saved * len(args.methods)
    folder = next(p for p in (args.runs.absolute(), *args.runs.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    print(f"disk: {download / 1e9:.1f} GB downloaded, {12 * count / 1e9:.1f} of a checkpoint, {saved / 1e9:.1f} of "
          f"each model: {disk / 1e9:.1f} of {free / 1e9:.1f} GB free at {folder}")
    if disk > free:
        problems.append(f"the disk at {folder} lacks {(disk - free) / 1e9:.1f} GB")

    needed, has, name = 16 * count + UNFINISHED * 1e9, 0, "no CUDA device"
    if torch.cuda.is_available():
        has, name = torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name()
    print(f"memory: {16 * count / 1e9:.1f} GB of weights, gradients and moments, about {UNFINISHED} of activations; "
          f"{name}, {has / 1e9:.1f} GB")
    if needed > has:
        problems.append(f"training takes {needed / 1e9:.1f} GB, and there is {name} with {has / 1e9:.1f}")
    operations = 8 * count * tokens
    for gpu, peak in PEAKS.items():
        if has == 0 or gpu in name:
            hours = operations / (0.4 * peak * 1e12) / 3600
            print(f"time: {operations:.2e} operations a method: {hours:.1f} hours on a {gpu} at "
                  f"40% of {peak} TFLOP/s (computed, not measured), and evaluation")
    for problem in problems:
        print(f"does not fit: {problem}")
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
