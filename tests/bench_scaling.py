"""Time of a training step and the bytes that its processes exchange, for 1, 2 and 4 processes.

    . ./setup.sh {,data/,tests/}requirements.txt
    python tests/bench_scaling.py                      # minutes on two cores
    python tests/bench_scaling.py --shape tiny --steps 3             # seconds
    python tests/bench_scaling.py --shape 7B --ranks 1 8 --batch-size 32 --seq-len 512

Each number of processes runs train.py's own loop under torchrun, on gloo or NCCL: half of the
columns frozen, random weights and text, the same global batch. The first step is warm-up, and the
median of the others counts. Bytes are those that a process receives in a step, counted from the
shapes that it hands to the collectives: of N processes, a gather or a reduce-scatter of B bytes
receives B (N - 1) / N, and a sum twice that. The losses of all are compared with the first's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from bench_train import SHAPES, random_masks
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from variants import compact, distributed, files  # noqa: E402


class Traffic(TorchDispatchMode):
    """Add up the bytes that this process receives in collectives, by kind."""

    def __init__(self):
        super().__init__()
        self.received = {"gather": 0, "reduce": 0, "sum": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name == "c10d::_allgather_base_":
            self.add("gather", args[0], 1)  # the output
        elif name == "c10d::_reduce_scatter_base_":
            self.add("reduce", args[1], 1)  # the input
        elif name == "c10d::allreduce_":
            self.add("sum", args[0][0], 2)
        elif name == "_c10d_functional::all_reduce":
            self.add("sum", args[0], 2)
        elif "c10d" in name and not name.endswith(("::barrier", "::wait_tensor")):
            raise NotImplementedError(f"bytes of {name}")
        return function(*args, **(kwargs or {}))

    def add(self, kind, tensor, times):
        ranks = dist.get_world_size()
        self.received[kind] += times * tensor.nbytes * (ranks - 1) / ranks


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="smollm2", help="shape of the model")
    add("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    add("--rounds", type=int, default=3, help="rounds, in each of which every number runs once")
    add("--steps", type=int, default=4, help="steps, the first of which is warm-up")
    add("--batch-size", type=int, default=8, help="sequences per step, of all processes")
    add("--micro-batch-size", type=int, default=2, help="sequences per forward pass")
    add("--seq-len", type=int, default=128, help="tokens per sequence")
    add("--precision", choices=train.PRECISIONS, default="fp32", help="precision")
    add("--compact", action="store_true", help="compact training")
    add("--gradient-checkpointing", action="store_true", help="recomputation of activations")
    add("--compare-shard", action="store_true", help="fully_shard on one process, or none")
    add("--shard", action="store_true", help=argparse.SUPPRESS)  # on one process, too
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cuda", "cpu"], default=device, help="device")
    add("--worker", type=Path, help=argparse.SUPPRESS)  # where a process writes what it found
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first is warm-up")
    return args


def worker(args):
    """Train, and write {"seconds": a step, "bytes": a step, "losses", "peak"} from rank 0."""
    out = args.worker.with_suffix("")
    argv = ["--model", "random", "--data", "random", "--mask", "random", "--out", str(out)]
    argv += ["--steps", str(args.steps), "--batch-size", str(args.batch_size), "--log-every", "1"]
    argv += ["--micro-batch-size", str(args.micro_batch_size), "--seq-len", str(args.seq_len)]
    argv += ["--precision", args.precision, "--device", args.device]
    if args.compact:
        argv.append("--compact")
    if args.gradient_checkpointing:
        argv.append("--gradient-checkpointing")
    loop = train.parse_args(argv)
    distributed.start(loop)
    if args.shard and distributed.WORLD == 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")

    # The same random model, masks and text in all processes
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.precision == "bf16-true" else torch.float32
    model = AutoModelForCausalLM.from_config(SHAPES[args.shape], dtype=dtype)
    ids = torch.randint(0, model.config.vocab_size, (64, args.seq_len))
    sequences = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    masks = random_masks(model)

    # What train.py does before its loop
    if args.compact:
        compact.make_compact(model, masks, args.precision)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.to(args.device)
    if distributed.WORLD > 1 or args.shard:
        distributed.shard(model, args.precision)
    out.mkdir(exist_ok=True)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with Traffic() as traffic:
        train.train(loop, model.train(), masks, sequences, {}, {})
    if dist.is_initialized():
        dist.destroy_process_group()
    if distributed.RANK > 0:
        return

    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("step")]
    ends = [line["step"] * line["ms_per_step"] / 1000 for line in steps]
    times = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    found = {
        "seconds": statistics.median(times),
        "bytes": {kind: count / args.steps for kind, count in traffic.received.items()},
        "losses": [line["loss"] for line in steps],
        "peak": files.peak_memory(args.device),
    }
    args.worker.write_text(json.dumps(found))


def launch(ranks, *more):
    """Return what `ranks` processes found, with more arguments for each."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={ranks}", __file__, *sys.argv[1:], *more]
        command += ["--worker", str(found)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"bench_scaling.py: {ranks} processes failed: {done.stderr[-3000:]}")
        return json.loads(found.read_text())


def compare_shard():
    """Print how far the losses of one process are apart with fully_shard and without."""
    plain, sharded = launch(1), launch(1, "--shard")
    apart = max(abs(a - b) for a, b in zip(plain["losses"], sharded["losses"], strict=True))
    ratio = sharded["seconds"] / plain["seconds"]
    peaks = sharded["peak"] / 1e9, plain["peak"] / 1e9
    said = f"losses within {apart:.1e}, step time x {ratio:.2f}, peak %.1f against %.1f GB" % peaks
    if apart > 1e-3:
        sys.exit(f"bench_scaling.py: fully_shard changes the result: {said}")
    print(said)


def main():
    args = parse_args()
    if args.worker:
        return worker(args)
    if args.compare_shard:
        return compare_shard()
    found = {ranks: [] for ranks in args.ranks}
    for _ in tqdm(range(args.rounds), unit="round"):
        for ranks, runs in found.items():
            runs.append(launch(ranks))

    way = "compact" if args.compact else "masked"
    print(f"{args.shape}, {way}, {args.precision}, {args.device}: {args.batch_size} x", end=" ")
    print(f"{args.seq_len} tokens a step in micro-batches of {args.micro_batch_size};", end=" ")
    print("MB are 1e6 bytes a step\n")
    first = args.ranks[0]
    head = ["processes", "s a step", f"to {first}", "gathered, MB", "reduced, MB", "summed, MB"]
    head += ["peak GB of rank 0", f"loss, most from {first}"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for ranks, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        ratios = []
        apart = 0.0
        for run, reference in zip(runs, found[first], strict=True):
            ratios.append(run["seconds"] / reference["seconds"])
            for loss, other in zip(run["losses"], reference["losses"], strict=True):
                apart = max(apart, abs(loss - other))
        row = [f"{ranks}", f"{seconds:.3f}", f"{statistics.median(ratios):.2f}"]
        row += [f"{count / 1e6:.3f}" for count in runs[0]["bytes"].values()]
        row += [f"{max(run['peak'] for run in runs) / 1e9:.2f}", f"{apart:.1e}"]
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
