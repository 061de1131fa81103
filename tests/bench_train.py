"""Time and memory of a training step: full fine-tuning, masked, compact and others, in paired runs.

    . ./setup.sh {,data/,tests/}requirements.txt
    python tests/bench_train.py --precision fp32   # ten minutes on two cores
    python tests/bench_train.py --shape 7B --batch-size 32 --seq-len 512 --ways compact

fft, masked, compact, bf16-true (compact too): train.py's own loop, half of the columns frozen.
trainer: transformers.Trainer with full-size masks in gradient hooks, on weights and moments in
--precision.
lora: peft's LoRA, r = 8 on every matrix, in train.py's loop. Weights and text are random. In each
round every way runs in a process of its own. The first step is warm-up, and the median of the
others counts. The table has medians over the rounds, and of the ratio to the first way in the same
round the median with the smallest and largest. State is counted: weights, gradients, moments. Peak
memory is that of torch's allocator on a GPU and of the process on a CPU. Utilization counts 6
floating-point operations per parameter (but the input embeddings') and token, and attention, over
the device's peak where it is known (MFU), else over what matrix products alone reach.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo2Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from variants import compact, files  # noqa: E402

SHAPES = {
    "tiny": LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
    "smollm2": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "1B": Olmo2Config(
        vocab_size=100352,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=16,
        max_position_embeddings=4096,
    ),
    "7B": Olmo2Config(
        vocab_size=100352,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    ),
}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16
WAYS = ["masked", "fft", "compact", "bf16-true", "trainer", "lora"]


def flops(model, seq_len):
    """Floating-point operations a token, forward and backward, without what is computed again."""
    count = sum(p.numel() for p in model.parameters())
    if not model.config.tie_word_embeddings:
        count -= model.get_input_embeddings().weight.numel()
    attention = 12 * model.config.num_hidden_layers * model.config.hidden_size * seq_len
    return 6 * count + attention // 2  # causal


def matmul_rate(args):
    """Return the floating-point operations a second of matrix products in the shape of an MLP."""
    config, tokens = SHAPES[args.shape], args.micro_batch_size * args.seq_len
    options = {"dtype": torch.float32 if args.precision == "fp32" else torch.bfloat16}
    options["device"] = args.device
    x = torch.randn(tokens, config.hidden_size, **options)
    weight = torch.randn(config.hidden_size, config.intermediate_size, **options)
    fastest = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        product = x @ weight
        product.sum().item()  # waits for a GPU
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * x.numel() * config.intermediate_size / fastest


def plain_state(model, masks):
    """Bytes of weights, gradients, moments of the same precision, and full-size masks."""
    return sum(p.nbytes * (4 if p.requires_grad else 1) for p in model.parameters()) + sum(
        model.get_parameter(name).numel() for name in masks
    )


def ours(way, args, model, masks, out):  # noqa: C901
    """By train.py's loop: (seconds since the first step began at the end of each step, bytes of
    state).
    """
    argv = ["--model", "random", "--data", "random", "--out", str(out), "--log-every", "1"]
    argv += ["--steps", str(args.steps), "--batch-size", str(args.batch_size)]
    argv += ["--micro-batch-size", str(args.micro_batch_size), "--seq-len", str(args.seq_len)]
    argv += ["--precision", "bf16-true" if way == "bf16-true" else args.precision]
    argv += ["--device", args.device]
    if args.compile:
        argv.append("--compile")
    if masks:
        argv += ["--mask", "random"]
    if way in ("compact", "bf16-true"):
        argv.append("--compact")
    loop = train.parse_args(argv)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and (name not in masks or bool(masks[name].any())))
    if loop.compact:
        compact.make_compact(model, masks, loop.precision)
    model.to(args.device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, model.config.vocab_size, (64, args.seq_len))
    sequences = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    train.train(loop, model, masks, sequences, {}, {})
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    ends = [0.0]
    for line in lines:
        if line.get("step"):
            ends.append(line["step"] * line["ms_per_step"] / 1000)
    state = sum(p.nbytes for p in model.parameters())
    for p in model.parameters():
        if p.requires_grad:
            state += p.nbytes + 8 * p.numel()
    return ends, state


def random_masks(model):
    """Half of the columns of every matrix, norm and bias."""
    masks = {}
    for name in files.maskable(model):
        p = model.get_parameter(name)
        mask = torch.arange(p.shape[-1]).remainder(2).to(torch.uint8)
        masks[name] = mask.view((1,) * (p.dim() - 1) + (-1,))
    return masks


def trainer(args, model, masks, out):
    """The same by transformers.Trainer and hooks, with the update that its optimizer makes of
    masked gradients.
    """
    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            if args.device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    for name, p in model.named_parameters():
        if name in masks:
            full = masks[name].bool().expand(p.shape).contiguous().to(p.device)
            p.register_hook(lambda grad, full=full: grad * full)
    rows = torch.randint(0, model.config.vocab_size, (args.batch_size * args.steps, args.seq_len))
    settings = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=args.steps,
        per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.batch_size // args.micro_batch_size,
        optim="adamw_torch_fused",
        learning_rate=5e-5,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=args.device == "cpu",
        disable_tqdm=True,
        gradient_checkpointing=args.gradient_checkpointing,
        torch_compile=args.compile,
    )
    runner = transformers.Trainer(
        model,
        settings,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[Clock()],
    )
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    runner.train()
    return [0.0] + [end - began for end in ends], plain_state(model, masks)


def worker(args):
    """Prints {"seconds": a step, "bytes": peak, "state": bytes, "flops": a token} of one way, as
    the last line.
    """
    dtype = torch.float32
    if args.precision == "bf16" and args.worker in ("trainer", "bf16-true", "lora"):
        dtype = torch.bfloat16  # peft's adapters stay fp32
    with torch.device(args.device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(SHAPES[args.shape], dtype=dtype)
    if attention := files.fastest_attention(args, model):
        model.set_attn_implementation(attention)
    model.train()
    masks, operations = random_masks(model), flops(model, args.seq_len)
    with tempfile.TemporaryDirectory() as out:
        if args.worker == "trainer":
            ends, state = trainer(args, model, masks, Path(out))
        elif args.worker == "lora":
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8)
            model = get_peft_model(model, config)
            ends, state = ours("lora", args, model, {}, Path(out))
        else:
            used = {} if args.worker == "fft" else masks
            ends, state = ours(args.worker, args, model, used, Path(out))
    # The first step is warm-up.
    seconds = statistics.median(b - a for a, b in zip(ends[1:], ends[2:], strict=False))
    print(
        json.dumps(
            {
                "seconds": seconds,
                "bytes": files.peak_memory(args.device),
                "state": state,
                "flops": operations,
            }
        )
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="smollm2")
    add("--ways", nargs="+", choices=WAYS, default=WAYS)
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=5)
    add("--batch-size", type=int, default=8)
    add("--micro-batch-size", type=int, default=4)
    add("--seq-len", type=int, default=128)
    add("--precision", choices=["bf16", "fp32"], default="bf16")
    add("--gradient-checkpointing", action="store_true")
    add("--compile", action="store_true", help="torch.compile")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--worker", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 3:
        parser.error("--steps must be at least 3: the first is warm-up")
    if args.worker:
        return worker(args)
    ways = args.ways
    if args.precision == "fp32":
        ways = [way for way in ways if way != "bf16-true"]
    found = {way: [] for way in ways}
    for _ in tqdm(range(args.rounds), unit="round"):
        for way in list(found):
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", way]
            done = subprocess.run(command, capture_output=True, text=True)
            if "out of memory" in done.stderr.lower():
                found.pop(way, None)
                print(f"{way}: out of memory")
            elif done.returncode:
                sys.exit(f"bench_train.py: {way} failed: {done.stderr[-1500:]}")
            else:
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
    if not found:
        sys.exit("bench_train.py: nothing fits into the memory")
    print_table(args, found)


def median_ratio(runs, first, key):
    """Return the median ratio to the runs of the first way, with the smallest and the largest."""
    ratios = sorted(run[key] / base[key] for run, base in zip(runs, first, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def print_table(args, found):
    """Print a row for each way of {way: [what worker() printed in each round]}."""
    first = next(iter(found))
    device = f"CPU, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
    peak, what = None, "MFU"
    for name, number in PEAKS.items():
        if name in device:
            peak = number
    if peak is None:
        peak, what = matmul_rate(args), "of matrix products"
    tokens = args.batch_size * args.seq_len
    print(
        f"{args.shape}, {args.precision}, {args.batch_size} x {args.seq_len} tokens a step in "
        f"micro-batches of {args.micro_batch_size}, gradient checkpointing: "
        f"{args.gradient_checkpointing}; {device}; torch {torch.__version__}; "
        f"{what}: of {peak / 1e9:,.0f} GFLOP/s\n"
    )
    head = ["", "s a step (fastest)", f"to {first}", "state GB", "peak GB", f"to {first}"]
    head += ["tokens/s", what]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for way, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        peak_memory = statistics.median(run["bytes"] for run in runs)
        speed = tokens / statistics.median(seconds)
        cells = [way, f"{statistics.median(seconds):.2f} ({min(seconds):.2f})"]
        cells += [median_ratio(runs, found[first], "seconds")]
        cells += [f"{runs[0]['state'] / 1e9:.2f}", f"{peak_memory / 1e9:.2f}"]
        cells += [median_ratio(runs, found[first], "bytes"), f"{speed:.0f}"]
        # LoRA does not compute the gradients of the weights.
        cells += ["-"] if way == "lora" else [f"{speed * runs[0]['flops'] / peak:.1%}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
