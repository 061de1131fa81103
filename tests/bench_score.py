"""Wanda's scores in one forward pass: how much longer than the bare pass? Paired, taking turns in
one process.

    . ./setup.sh {,data/,tests/}requirements.txt
    python tests/bench_score.py    # SmolLM2's shape: minutes on two cores
    python tests/bench_score.py --shape 7B --samples 32 --seq-len 2048 --batch-size 4

score.py's own input_norms against the decoder alone on the same random tokens and weights, in
score.py's default precision for the device. setup.sh sets malloc as run_all.sh does; without it
the scores cost a CPU three times as much, in page faults. Every round gives one ratio; on a noisy
machine the fastest passes tell more. Memory is the most that either adds, where torch counts it.
"""

import argparse
import contextlib
import io
import statistics
import sys
import time
from pathlib import Path

import torch
from bench_train import SHAPES
from tqdm import tqdm
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import score  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="smollm2")
    add("--samples", type=int, default=8)
    add("--seq-len", type=int, default=512)
    add("--batch-size", type=int, default=4)
    add("--rounds", type=int, default=5)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[args.shape], dtype=dtype).eval()
    tokens = torch.randint(0, model.config.vocab_size, (args.samples, args.seq_len))
    owners = score.scored_parameters(model)

    @torch.inference_mode()
    def bare():
        for batch in tokens.split(args.batch_size):
            model.base_model(input_ids=batch.to(device), use_cache=False)

    def scored():
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            score.input_norms(model, owners, tokens, args.batch_size)

    def measure(work):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        return (
            time.perf_counter() - began,
            torch.cuda.max_memory_allocated() - before if cuda else 0,
        )

    measure(scored)
    pairs = [(measure(bare), measure(scored)) for _ in tqdm(range(args.rounds), unit="round")]
    ratios = sorted(b[0] / a[0] for a, b in pairs)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    seconds = statistics.median(a[0] for a, _ in pairs)
    print(
        f"{args.shape}, {args.samples} x {args.seq_len} tokens, batches of "
        f"{args.batch_size}, {dtype} on {name}\n"
        f"bare pass {seconds:.2f} s; scores over it: {statistics.median(ratios):.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f} in {args.rounds} rounds), of the fastest passes "
        f"{min(b[0] for _, b in pairs) / min(a[0] for a, _ in pairs):.3f}"
        + (
            f"; activations {max(a[1] for a, _ in pairs) / 1e9:.2f} GB, with scores "
            f"{max(b[1] for _, b in pairs) / 1e9:.2f}"
            if cuda
            else ""
        )
    )


if __name__ == "__main__":
    main()
