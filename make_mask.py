"""Stage 2 of SSU: freeze the top k% columns of every matrix (paper, Section 3.2).

Within each scored parameter the columns are ranked by their importance S_j (score.py) and the top k% are frozen:
    B_j = 0 (freeze) for the int(k * columns) highest, 1 (update) for all others.
Nothing is compared across parameters, so each has the same share frozen. Of equal scores the lower index freezes first.
The mask is stored in the smallest shape that broadcasts onto its parameter, uint8: [1, d_in] for a matrix, [d] for a
1-D parameter. It needs no model, no GPU and a second of time.

    python make_mask.py --scores runs/ne/scores-wanda.safetensors --out runs/ne/ssu-wanda/mask.safetensors --ratio 0.5
"""
import argparse
import hashlib
import json
import math
import os
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def fail(message):
    """One line on stderr and exit code 2: something the user can mend."""
    print(f"make_mask.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv):
    parser = argparse.ArgumentParser("make_mask.py", argparse.SUPPRESS, __doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", required=True, type=Path, help="scores-<method>.safetensors of score.py")
    parser.add_argument("--out", required=True, type=Path, help="mask.safetensors to write")
    parser.add_argument("--ratio", type=float, default=0.5, help="k: share of columns to freeze, 0 to 1 (paper: 0.5)")
    args = parser.parse_args(argv)
    if not 0 <= args.ratio <= 1:
        parser.error(f"--ratio {args.ratio}: must lie between 0 (nothing frozen) and 1 (all scored parameters frozen)")
    if args.out.absolute() == args.scores.absolute():
        parser.error("--out is the scores file: name another one")
    return args


def read_scores(path):
    """Reads scores written by score.py: ({name: float32 [columns]}, metadata). Raises SystemExit(2) if unfit."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            scores = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        fail(f"--scores {path}: cannot be read ({error}); make it again with score.py")
    kind = (metadata.get("format"), metadata.get("version"), metadata.get("axis"))
    if kind != ("ssu-scores", "1", "column") or "shapes" not in metadata or not scores:
        fail(f"--scores {path}: not column scores of version 1; make them again with score.py")
    shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    if hashlib.sha256("\n".join(lines).encode()).hexdigest() != metadata["fingerprint"]:
        fail(f"--scores {path}: its shapes do not match its fingerprint; make it again with score.py")
    for name, score in scores.items():
        if name not in shapes or score.shape != shapes[name][-1:]:
            fail(f"--scores {path}: {name} {list(score.shape)} does not fit its model; make it again with score.py")
        if not torch.isfinite(score).all():
            fail(f"--scores {path}: {name} holds scores that are not finite; make it again with score.py")
    return scores, metadata, shapes


def column_mask(scores, ratio):
    """uint8 [columns] with 0 for the int(ratio * columns) highest scores and 1 elsewhere (Section 3.2).

    The sort is stable, so equal scores freeze in index order and the mask is the same everywhere."""
    mask = torch.ones(len(scores), dtype=torch.uint8)
    mask[torch.sort(scores, descending=True, stable=True).indices[: int(ratio * len(scores))]] = 0
    return mask


def frozen_table(masks, shapes, ratio):
    """Lines of a table, by kind of parameter: how many, columns frozen, share of weights frozen; and that share of all
    weights of the model, embeddings and head included, as a float."""
    kinds = defaultdict(lambda: [0, 0, 0, 0, 0])  # parameters, columns, columns frozen, weights, weights frozen
    for name, mask in masks.items():
        frozen, per_column = int((mask == 0).sum()), math.prod(shapes[name]) // mask.numel()
        row = (1, mask.numel(), frozen, mask.numel() * per_column, frozen * per_column)
        kind = kinds[re.sub(r"\.\d+\.", ".*.", name)]
        kind[:] = [a + b for a, b in zip(kind, row, strict=True)]
    total = [sum(column) for column in zip(*kinds.values(), strict=True)]
    lines = [f"{'kind':<52} {'number':>6} {'columns':>9} {'frozen':>9} {'asked':>6} {'obtained':>8}"]
    for kind, (number, columns, frozen, weights, weights_frozen) in [*kinds.items(), ("all scored parameters", total)]:
        share = weights_frozen / weights
        lines.append(f"{kind:<52} {number:>6} {columns:>9,} {frozen:>9,} {ratio:>6.1%} {share:>8.2%}")
    everything = sum(math.prod(shape) for shape in shapes.values())
    lines.append(f"of all {everything:,} weights, embeddings and head (never frozen) included: "
                 f"{total[4] / everything:.2%} frozen")
    return lines, total[4] / everything


def save_atomically(tensors, path, metadata):
    """Writes a safetensors file so that `path` is always absent, the old one, or complete."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
        fail(f"--out {path}: cannot be written ({error})")


def main(argv=None):
    args = parse_args(argv)
    scores, source, shapes = read_scores(args.scores)
    print(f"freeze the {args.ratio:.1%} highest {source['method']} columns of {len(scores)} parameters of "
          f"{source['model']}")

    masks = {name: column_mask(score, args.ratio) for name, score in scores.items()}
    lines, frozen_fraction = frozen_table(masks, shapes, args.ratio)
    print("\n".join(lines))

    masks = {name: mask[None] if len(shapes[name]) == 2 else mask for name, mask in masks.items()}  # [1, d_in] or [d]
    carried = {key: source[key] for key in ("method", "axis", "model", "fingerprint", "seed", "shapes")}
    save_atomically(masks, args.out, {
        "format": "ssu-mask", "version": "1", **carried, "ratio": str(args.ratio),
        "frozen_fraction": f"{frozen_fraction:.6f}",
        "scores_sha256": hashlib.sha256(args.scores.read_bytes()).hexdigest()})
    print(f"mask: {args.out} ({args.out.stat().st_size / 1e6:.2f} MB)")
    print(f"next: python train.py --model {source['model']} --mask {args.out} --data TEXT --out {args.out.parent}")


if __name__ == "__main__":
    main()
