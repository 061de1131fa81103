"""Time of a step and peak memory of each way to update, relative to full fine-tuning (FFT), in
paired runs of train.py.

    python tests/bench_methods.py                       # the embedded model: half an hour on two
    cores python tests/bench_methods.py --methods ssu-wanda hft --rounds 5 --model MODEL --data
    TEXT.jsonl --precision bf16

In each round every method trains for a few steps in a process of its own, FFT first; its first
step is warm-up and the median of the others counts. The table has the median over rounds of the
ratio to FFT of the same round, with the smallest and the largest. Peak memory is that of the
process on a CPU, of torch's allocator on a GPU; bytes of gradients and moments are those that
train.py announces, without adapters. Run data/prepare_embedded.py first, and nothing else
meanwhile.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
# what makes the mask, what train.py is told; a score needs no text to be as expensive as any other
METHODS = {
    "ssu-wanda": (["--method", "random"], []),
    "ssu-wanda-element": (["--method", "random", "--axis", "element"], []),
    "hft": (["hft"], []),
    "s2ft-down": (["s2ft-down"], []),
    "gmt": (None, ["--gmt-ratio", "0.5"]),
    "fft, 4 micro-batches": (None, []),
    "adalora": (None, ["--adalora"]),
}


def call(script, *argv):
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, argv)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"bench_methods.py: {script} failed: {done.stderr[-1000:]}")
    return done.stdout


def make_mask(method, model, folder):
    how, _ = METHODS[method]
    mask = folder / f"{method}.safetensors"
    if len(how) == 1:
        call("make_mask.py", "--method", how[0], "--model", model, "--out", mask)
    else:
        call("score.py", "--model", model, "--out", folder / "scores", *how)
        call("make_mask.py", "--scores", folder / "scores", "--out", mask)
    return mask


def measure(args, folder, mask, more):
    """(seconds of a step, peak bytes, bytes of gradients and moments) of one run of train.py."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        said = call(
            "train.py",
            "--model",
            args.model,
            "--data",
            args.data,
            "--out",
            f"{out}/run",
            "--steps",
            args.steps,
            "--batch-size",
            args.batch_size,
            "--micro-batch-size",
            args.batch_size,
            "--seq-len",
            args.seq_len,
            "--lr",
            5e-4,
            "--precision",
            args.precision,
            "--log-every",
            1,
            *(["--mask", mask] if mask else []),
            *more,
        )
        lines = [
            json.loads(line) for line in Path(f"{out}/run/train.jsonl").read_text().splitlines()
        ]
    lines = [line for line in lines if line.get("step")]
    until = [
        line["step"] * line["ms_per_step"] / 1000 for line in lines
    ]  # seconds since the first step began
    seconds = statistics.median(b - a for a, b in zip(until, until[1:], strict=False))
    state = re.search(r"gradients ([\d,]+), Adam's moments ([\d,]+)", said)
    return seconds, lines[-1]["peak_memory"], sum(int(n.replace(",", "")) for n in state.groups())


def main():
    parser = argparse.ArgumentParser(
        "bench_methods.py",
        argparse.SUPPRESS,
        __doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=ROOT / "data/embedded/model")
    parser.add_argument("--data", default=ROOT / "data/embedded/ne/train.jsonl")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="fp32")
    args = parser.parse_args()
    if args.steps < 2 or args.rounds < 1 or args.batch_size % 4:
        parser.error(
            "--steps must be at least 2, --rounds at least 1, --batch-size a multiple of 4"
        )
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        masks = {
            m: make_mask(m, args.model, folder) if METHODS[m][0] else None for m in args.methods
        }
        found = {m: [] for m in ("fft", *args.methods)}
        for _ in tqdm(range(args.rounds), unit="round"):
            for m in found:
                more = METHODS[m][1] if m in METHODS else []
                if m in ("gmt", "fft, 4 micro-batches"):  # Table 8: accumulation interval 4
                    more = [*more, "--micro-batch-size", args.batch_size // 4]
                found[m].append(measure(args, folder, masks.get(m), more))
    seconds, peak, state = (statistics.median(run[i] for run in found["fft"]) for i in range(3))
    print(
        f"fft: {seconds:.2f} s a step, {peak / 1e9:.2f} GB at the peak, {state / 1e9:.2f} "
        f"GB of gradients and "
        f"moments; {args.rounds} rounds of {args.steps} steps of {args.batch_size} x "
        f"{args.seq_len} tokens, "
        f"{args.precision}"
    )
    print(
        "| method | time of a step / FFT | peak memory / FFT | gradients and moments / "
        "FFT |\n|---|---|---|---|"
    )
    for m, runs in found.items():
        cells = []
        for i in range(3):
            ratios = [run[i] / fft[i] for run, fft in zip(runs, found["fft"], strict=True)]
            spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if i < 2 and m != "fft" else ""
            cells.append(f"{statistics.median(ratios):.2f}{spread}")
        print(f"| {m} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
