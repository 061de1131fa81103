"""Compare questions scored in batches behind shared examples with one question at a time.

    python tests/bench_evaluate.py       # the embedded model: minutes on two cores
    python tests/bench_evaluate.py --model MODEL --data-dir data/paper --questions 500

Both use evaluate.py's items of `mmlu` (5-shot, English) and its scoring in float32. They take
turns, and each round gives one ratio of seconds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
from data import instruct  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "data/embedded/model"), help="directory")
    parser.add_argument("--data-dir", default=str(ROOT / "data/embedded"), help="with en/ and ne/")
    parser.add_argument("--questions", default="60", help="questions to score")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, one ratio each")
    bench = parser.parse_args()

    # The items of evaluate.py.
    argv = ["--model", bench.model, "--lang", "ne", "--data-dir", bench.data_dir]
    argv += ["--out", tempfile.mktemp(), "--tasks", "mmlu", "--num-questions", bench.questions]
    args = evaluate.parse_args([*argv, "--dtype", "float32"])
    folder, _ = instruct.find_model(args.model)
    config, tokenizer = instruct.load_tokenizer(folder)
    args.context, args.files = config.get_text_config().max_position_embeddings, []
    model, *_ = instruct.load_model(folder, tokenizer, args.dtype, args.device)
    if not instruct.can_batch(model, config, args.context, evaluate.loglik, evaluate.generate):
        parser.exit(message="There is nothing to compare\n")
    items = evaluate.make_items(args, tokenizer).values()
    items = [item for item in items if item[0]["side"] == "source"]
    together = [batch for _, batch in evaluate.make_batches(items, args)]

    def score(batches):
        """Return {id: log-likelihoods of the letters} and the seconds it took."""
        start, found = time.perf_counter(), {}
        for batch in batches:
            rows = evaluate.answer(model, batch, args, [])
            for (saved, _, _), row in zip(batch, rows, strict=True):
                found[saved["id"]] = row
        return found, time.perf_counter() - start

    # Rounds of both, after one batch to warm up.
    score(together[:1])
    ratios = []
    for _ in tqdm(range(bench.rounds), unit="round"):
        batched, fast = score(together)
        single, slow = score([[item] for item in items])
        ratios.append(slow / fast)

    differ, apart = 0, 0.0
    for name, row in single.items():
        other = batched[name]
        differ += row.index(max(row)) != other.index(max(other))
        apart = max(apart, *(abs(a - b) for a, b in zip(row, other, strict=True)))
    print(f"{len(items)} questions in {len(together)} batches, {args.device}, float32")
    print(f"{torch.get_num_threads()} threads")
    print(f"answers that differ: {differ}; largest difference {apart:.1e} nats")
    print(f"single / batched: median {statistics.median(ratios):.1f} of {ratios}")


if __name__ == "__main__":
    main()
