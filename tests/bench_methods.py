"""Time of a step and peak memory of each method, relative to full fine-tuning (FFT).

    python tests/bench_methods.py              # the embedded model: half an hour on two cores
    python tests/bench_methods.py --methods ssu-wanda hft --rounds 5 --model MODEL \\
        --data TEXT.jsonl --precision bf16

In each round every method trains for a few steps in a process of its own, FFT first. Its first step
is warm-up, and the median of the others counts. The table has the median over rounds of the ratio
to FFT of the same round, with the smallest and the largest. Peak memory is that of the process on a
CPU, of torch's allocator on a GPU. Run data/prepare_embedded.py first, and nothing else meanwhile.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
# The arguments of score.py, or else of make_mask.py, and those of train.py. A score needs no text
# to cost as much in training as any other.
METHODS = {
    "fft": ([], [], []),
    "ssu-wanda": (["--method", "random"], [], []),
    "ssu-wanda-element": (["--method", "random", "--axis", "element"], [], []),
    "hft": ([], ["--method", "hft"], []),
    "s2ft-down": ([], ["--method", "s2ft-down"], []),
    "gmt": ([], [], ["--gmt-ratio", "0.5"]),
    "fft, 4 micro-batches": ([], [], []),
    "adalora": ([], [], ["--adalora"]),
}
IN_PARTS = ("gmt", "fft, 4 micro-batches")  # Table 8: accumulation interval 4


def call(script, *argv):
    command = [sys.executable, ROOT / script, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench_methods.py: {script} failed: {done.stderr[-1000:]}")


def options_of(method, args, folder):
    """Return what train.py is told for a method. Make its mask."""
    to_score, to_mask, options = METHODS[method]
    mask = folder / f"{method}.safetensors"
    if to_score:
        scores = folder / f"{method}.scores"
        call("score.py", "--model", args.model, "--out", scores, *to_score)
        call("make_mask.py", "--scores", scores, "--out", mask)
    elif to_mask:
        call("make_mask.py", "--model", args.model, "--out", mask, *to_mask)
    if to_score or to_mask:
        options = ["--mask", mask]
    parts = 4 if method in IN_PARTS else 1
    return [*options, "--micro-batch-size", args.batch_size // parts]


def measure(args, folder, options):
    """Return (seconds of a step, peak bytes) of one run of train.py."""
    shared = ["--model", args.model, "--data", args.data, "--precision", args.precision]
    shared += ["--steps", args.steps, "--batch-size", args.batch_size, "--seq-len", args.seq_len]
    with tempfile.TemporaryDirectory(dir=folder) as out:
        call("train.py", *shared, "--lr", 5e-4, "--log-every", 1, "--out", f"{out}/run", *options)
        rows = map(json.loads, Path(f"{out}/run/train.jsonl").read_text().splitlines())
        steps = [row for row in rows if row.get("step")]
    ends = [row["step"] * row["ms_per_step"] / 1000 for row in steps]  # since the first step began
    seconds = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    return statistics.median(seconds), steps[-1]["peak_memory"]


def ratio(numbers, others):
    """Return "0.95 (0.90 to 1.00)", of paired numbers."""
    ratios = [number / other for number, other in zip(numbers, others, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main():
    parser = argparse.ArgumentParser("bench_methods.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
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
        parser.error("--steps must be at least 2, --rounds at least 1, --batch-size 4 or 8 or ...")

    methods = dict.fromkeys(["fft", *args.methods])
    with tempfile.TemporaryDirectory() as folder:
        options = {method: options_of(method, args, Path(folder)) for method in methods}
        seconds, peaks = {method: [] for method in methods}, {method: [] for method in methods}
        with tqdm(total=args.rounds * len(methods), unit="run") as bar:
            for _ in range(args.rounds):
                for method in methods:
                    time, peak = measure(args, folder, options[method])
                    seconds[method].append(time)
                    peaks[method].append(peak)
                    bar.update()

    print(
        f"{args.rounds} rounds of {args.steps} steps of {args.batch_size} x {args.seq_len} tokens"
    )
    time, peak = statistics.median(seconds["fft"]), statistics.median(peaks["fft"])
    print(f"fft, {args.precision}: {time:.2f} s a step, {peak / 1e9:.2f} GB at the peak\n")
    print("| method | time of a step / FFT | peak memory / FFT |\n|---|---|---|")
    for method in methods:
        times = ratio(seconds[method], seconds["fft"])
        print(f"| {method} | {times} | {ratio(peaks[method], peaks['fft'])} |")


if __name__ == "__main__":
    main()
