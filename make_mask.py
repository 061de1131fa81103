"""Stage 2 of SSU: freeze the top k% columns of every matrix (paper, Section 3.2); and every other
static mask.

Within each scored parameter the columns are ranked by their importance S_j (score.py) and the top
k% are frozen: B_j = 0 (freeze) for the int(k * columns) highest, 1 (update) for all others.
Nothing is compared across parameters, so each has the same share frozen. Of equal scores the lower
index freezes first. The mask is stored in the smallest shape that broadcasts onto its parameter,
uint8: [1, d_in] for columns of a matrix, [d_out, 1] for rows, [d_out, d_in] for elements, [1, 1]
for a whole matrix, [d] or [1] for a 1-D parameter.

    python make_mask.py --scores runs/ne/scores-wanda.safetensors --out
    runs/ne/ssu-wanda/mask.safetensors --ratio 0.5

LoTA (Section 6) updates the weights that went furthest, so it freezes the lowest scores:
    python make_mask.py --scores runs/ne/scores-delta-element.safetensors --freeze lowest --ratio
    0.9 --out MASK HFT (Section 4.4) and S2FT (Section 6) need no scores, only the names and shapes
    of a model: python make_mask.py --method hft --model data/embedded/model --out
    runs/ne/hft/mask.safetensors How far do two masks freeze the same weights? The Jaccard index
    for each matrix: python make_mask.py --compare runs/ne/ssu-wanda/mask.safetensors
    runs/ne/ssu-rand/mask.safetensors
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

ABOUT = {
    "method",
    "axis",
    "model",
    "fingerprint",
    "seed",
    "shapes",
}  # metadata that a mask takes over from its scores


def fail(message):
    """One line on stderr and exit code 2: something the user can mend."""
    print(f"make_mask.py: error: {' '.join(str(message).split())[:500]}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        "make_mask.py",
        argparse.SUPPRESS,
        __doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scores", type=Path, help="scores-<method>.safetensors of score.py")
    parser.add_argument(
        "--method", choices=["hft", "s2ft-down", "s2ft-down-output"], help="a mask without scores"
    )
    parser.add_argument("--model", help="with --method: folder or hub name of the source model")
    parser.add_argument("--out", type=Path, help="mask.safetensors to write")
    parser.add_argument(
        "--ratio",
        type=float,
        help="k: share to freeze, 0 to 1 (default as in the paper: 0.5; for s2ft 0.985)",
    )
    parser.add_argument(
        "--freeze",
        choices=["highest", "lowest"],
        help="scores to freeze (default: highest; delta scores must say which, LoTA's are "
        "the lowest)",
    )
    parser.add_argument(
        "--freeze-chat-tokens",
        action="store_true",
        help="freeze also the rows of embeddings and head "
        "of the tokens that the chat template writes, as the authors' code does",
    )
    parser.add_argument(
        "--seed", type=int, help="of hft and s2ft, which choose at random (default: 42)"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar="MASK",
        help="print the overlap of two masks, no more",
    )
    args = parser.parse_args(argv)
    given = [name for name, value in vars(args).items() if value not in (None, False)]
    if args.compare:
        return (
            args
            if given == ["compare"]
            else parser.error("--compare takes two masks and nothing else")
        )
    if bool(args.scores) == bool(args.method):
        parser.error("give --scores FILE, or --method with --model, or --compare with two masks")
    if bool(args.method) != bool(args.model):
        parser.error("--method and --model belong together; --scores knows its model")
    if args.method and args.freeze:
        parser.error(f"--freeze chooses among scores, and --method {args.method} has none")
    if args.scores and args.seed is not None:
        parser.error(
            "--seed is score.py's where there are scores: a mask of them has nothing random"
        )
    args.seed = 42 if args.seed is None else args.seed
    if not args.out:
        parser.error("--out is missing: the mask.safetensors to write")
    if args.ratio is None:
        args.ratio = 0.985 if (args.method or "").startswith("s2ft") else 0.5
    if not 0 <= args.ratio <= 1:
        parser.error(
            f"--ratio {args.ratio}: must lie between 0 (nothing frozen) and 1 (all scored "
            f"parameters frozen)"
        )
    if args.out.is_dir() or (args.out.exists() and format_of(args.out) != "ssu-mask"):
        parser.error(
            f"--out {args.out}: is there already, and is no mask file; choose another name"
        )
    return args


def format_of(path):
    """What the metadata of a safetensors file call it; None for any other file."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format")
    except (OSError, SafetensorError):
        return None


def load_skeleton(model):
    """(the model without weights, on the meta device; its tokenizer) of a local folder or hub
    model.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
    )  # here: it takes seconds to import

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config), tokenizer
    except (OSError, ValueError) as error:
        fail(f"model {model}: {error}")


def embeddings_and_head(model):
    """Names of the parameters that are always updated (Section 3.1); a tied head has none of its
    own.
    """
    head = model.get_output_embeddings()
    ids = {
        id(p)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) or module is head
        for p in module.parameters(recurse=False)
    }
    return {name for name, p in model.named_parameters() if id(p) in ids}


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(shapes):
    """Identity of an architecture: sha256 over its sorted "name shape" lines, e.g.
    "model.norm.weight 576".
    """
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_scores(path):
    """Reads scores written by score.py: ({name: float32 scores}, metadata, {name: shape of every
    parameter}).

    Raises SystemExit(2) if they are unfit."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            scores = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        fail(f"--scores {path}: cannot be read ({error}); make it again with score.py")
    axis = metadata.get("axis")
    known = (metadata.get("format"), metadata.get("version")) == (
        "ssu-scores",
        "1",
    ) and ABOUT <= metadata.keys()
    if not known or axis not in ("column", "row", "element") or not scores:
        fail(f"--scores {path}: not a scores file of version 1; make it again with score.py")
    shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
    if fingerprint(shapes) != metadata["fingerprint"]:
        fail(
            f"--scores {path}: its shapes do not match its fingerprint; make it again with score.py"
        )
    for name, score in scores.items():
        shape = shapes.get(name, ())
        expected = shape if axis == "element" else shape[-1:] if axis == "column" else shape[:1]
        if not shape or score.shape != expected:
            fail(
                f"--scores {path}: {name} {list(score.shape)} does not fit its model; "
                f"make it again with score.py"
            )
        if not torch.isfinite(score).all():
            fail(
                f"--scores {path}: {name} holds scores that are not finite; make it again "
                f"with score.py"
            )
    return scores, metadata, shapes


def top_mask(scores, ratio, freeze="highest"):
    """uint8 in the shape of scores, 0 for the int(ratio * n) highest (or lowest) and 1 elsewhere
    (Section 3.2).

    The sort is stable, so equal scores freeze in index order and the mask is the same
    everywhere."""
    mask = torch.ones(scores.numel(), dtype=torch.uint8)
    order = torch.sort(scores.flatten(), descending=freeze == "highest", stable=True).indices
    mask[order[: int(ratio * len(order))]] = 0
    return mask.view(scores.shape)


def broadcasting(mask, axis, shape):
    """A mask of columns [d_in] or rows [d_out] as [1, d_in] or [d_out, 1]; of elements or 1-D
    parameters as it is.
    """
    return (
        mask
        if axis == "element" or len(shape) == 1
        else mask[None]
        if axis == "column"
        else mask[:, None]
    )


def whole(p, update):
    """A mask that freezes (0) or updates (1) all of a parameter: uint8 [1, 1], or [1] for a 1-D
    one.
    """
    return torch.full((1,) * p.dim(), update, dtype=torch.uint8)


def hft_masks(model, always_updated, ratio, seed):
    """HFT (Section 4.4; Hui et al. 2025): whole modules, chosen at random, are frozen in every
    layer.

    At ratio 0.5: two of q k v o; two of up down gate in a random half of the layers and one in the
    others; half of the norms. At any ratio int(ratio * n * layers) of a group of n modules a
    layer, as even over the layers as can be.
    A bias goes with its matrix. What is in no layer (the last norm) is updated. -> {name: uint8
    [1, 1] or [1]}"""
    groups = defaultdict(
        lambda: defaultdict(list)
    )  # "self_attn", "mlp" or "norm" -> layer -> names of modules
    for name, module in model.named_modules():
        layer = re.search(r"\.(\d+)\.(.*)", name)
        if layer and next(module.parameters(recurse=False), None) is not None:
            is_matrix = isinstance(module, torch.nn.Linear)
            if not is_matrix and any(p.dim() > 1 for p in module.parameters(recurse=False)):
                fail(
                    f"{name} in {type(module).__name__}: HFT knows nn.Linear matrices and "
                    f"norms, no fused experts"
                )
            groups[layer[2].rpartition(".")[0] if is_matrix else "norm"][int(layer[1])].append(name)
    rng, frozen = random.Random(seed), set()
    for group, layers in groups.items():
        if len(set(map(len, layers.values()))) > 1:
            fail(
                f"--method hft: the layers of this model differ in {group}, so they have "
                f"no common share to freeze"
            )
        each, left = divmod(int(ratio * sum(map(len, layers.values()))), len(layers))
        one_more = rng.sample(sorted(layers), left)
        for layer, names in layers.items():
            frozen |= set(rng.sample(names, each + (layer in one_more)))
    return {
        name: whole(p, name.rpartition(".")[0] not in frozen)
        for name, p in model.named_parameters()
        if name not in always_updated
    }


def s2ft_masks(model, ratio, seed, output):
    """S2FT (Section 6, Table 8; Yang et al. 2024): all is frozen, embeddings and head too, but 1 -
    ratio of the input
    channels of each down_proj and, with output, that share of o_proj's heads, at least one; both
    drawn at random."""
    masks = {name: whole(p, 0) for name, p in model.named_parameters()}
    rng, share, kinds = (
        random.Random(seed),
        1 - ratio,
        ["down_proj.weight"] + ["o_proj.weight"] * output,
    )
    for name, p in model.named_parameters():
        d_in = p.shape[-1]
        if name.endswith("down_proj.weight") and p.dim() == 2:
            chosen = rng.sample(range(d_in), int(share * d_in + 1e-6))
        elif name.endswith("o_proj.weight") and output:
            heads = model.config.get_text_config().num_attention_heads
            size = d_in // heads
            chosen = [
                head * size + i
                for head in rng.sample(range(heads), max(1, round(share * heads)))
                for i in range(size)
            ]
        else:
            continue
        masks[name] = torch.zeros(1, d_in, dtype=torch.uint8)
        masks[name][0, chosen] = 1
    for kind in kinds:
        if not any(mask.any() for name, mask in masks.items() if name.endswith(kind)):
            fail(
                f"--ratio {ratio} trains no weight of {kind}: this model has no such "
                f"matrices, or too few channels"
            )
    return masks


def chat_token_ids(tokenizer):
    """Sorted ids of the tokens that the chat template itself writes around a system's, user's and
    assistant's turn.
    """
    from jinja2 import TemplateError

    turns = [
        {"role": role, "content": "CONTENT"} for role in ("system", "user", "assistant", "user")
    ]
    for chat in (turns, turns[1:]):  # some templates know no system turn
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except TemplateError:
            continue
        pieces = text.split("CONTENT")
        return sorted(
            {i for piece in pieces for i in tokenizer(piece, add_special_tokens=False)["input_ids"]}
        )
    fail(
        "--freeze-chat-tokens: the chat template takes no chat of a user's and an assistant's turns"
    )


def overlap(a, b):
    """(Jaccard index, |frozen by both| / |frozen by either|; what two random masks of these shares
    would have) of two
    masks that broadcast onto the same parameter; None if neither freezes anything."""
    a, b = torch.broadcast_tensors(a == 0, b == 0)
    shares = [mask.double().mean().item() for mask in (a, b)]
    both = math.prod(shares)
    return (
        (((a & b).sum() / (a | b).sum()).item(), both / (sum(shares) - both))
        if (a | b).any()
        else None
    )


def read_mask(path):
    try:
        with safe_open(path, "pt") as file:
            metadata, masks = (
                file.metadata() or {},
                {name: file.get_tensor(name) for name in file.keys()},
            )
    except (OSError, SafetensorError) as error:
        fail(f"--compare {path}: cannot be read ({error}); make it again with make_mask.py")
    if (metadata.get("format"), metadata.get("version")) != (
        "ssu-mask",
        "1",
    ) or not ABOUT <= metadata.keys():
        fail(f"--compare {path}: not a mask file of version 1; make it with make_mask.py")
    for name, mask in masks.items():
        shape = json.loads(metadata["shapes"]).get(name, [])
        if mask.dim() != len(shape) or any(
            m not in (1, n) for m, n in zip(mask.shape, shape, strict=True)
        ):
            fail(
                f"--compare {path}: {name} {list(mask.shape)} does not fit its model; "
                f"make it again with make_mask.py"
            )
    return masks, metadata


def compare(path_a, path_b):
    """Prints the Jaccard index of what two masks freeze: a row for each layer, a column for each
    kind of parameter.
    """
    (a, about_a), (b, about_b) = map(read_mask, (path_a, path_b))
    if about_a["fingerprint"] != about_b["fingerprint"]:
        fail(f"--compare: made for models that differ, {about_a['model']} and {about_b['model']}")
    rows, widths, found = defaultdict(dict), {}, defaultdict(list)
    for name in json.loads(about_a["shapes"]):
        layer = re.search(r"\.(\d+)\..*?([^.]+)\.(weight|bias)$", name)
        if layer and name in a and name in b and (both := overlap(a[name], b[name])):
            kind = layer[2] if layer[3] == "weight" else f"{layer[2]}.bias"
            rows[layer[1]][kind], widths[kind] = both[0], max(6, len(kind))
            found[kind].append(both)
    for kind, pairs in found.items():
        rows["mean"][kind], rows["chance"][kind] = (
            sum(column) / len(pairs) for column in zip(*pairs, strict=True)
        )
    print(
        f"Jaccard index of the weights frozen by {about_a['method']} ({path_a}) and "
        f"{about_b['method']} ({path_b})\n"
        "last row: what two random masks that freeze as much would have; -: neither "
        "freezes anything"
    )
    print(" layer " + " ".join(f"{kind:>{width}}" for kind, width in widths.items()))
    for label, row in rows.items():
        cells = [f"{row[kind]:.3f}" if kind in row else "-" for kind in widths]
        print(
            f"{label:>6} "
            + " ".join(
                f"{cell:>{width}}" for cell, width in zip(cells, widths.values(), strict=True)
            )
        )


def frozen_table(masks, shapes):
    """Lines of a table, by kind of parameter: how many, columns frozen, share of weights frozen;
    and that share of all
    weights of the model, embeddings and head included, as a float."""
    kinds = defaultdict(
        lambda: [0, 0, 0, 0, 0]
    )  # parameters, columns, columns frozen, weights, weights frozen
    for name, mask in masks.items():
        frozen, per_column = int((mask == 0).sum()), math.prod(shapes[name]) // mask.numel()
        row = (1, mask.numel(), frozen, mask.numel() * per_column, frozen * per_column)
        kind = kinds[re.sub(r"\.\d+\.", ".*.", name)]
        kind[:] = [a + b for a, b in zip(kind, row, strict=True)]
    total = [sum(column) for column in zip(*kinds.values(), strict=True)]
    lines = [f"{'kind':<52} {'number':>6} {'columns':>11} {'frozen':>11} {'obtained':>8}"]
    for kind, (number, columns, frozen, weights, weights_frozen) in [
        *kinds.items(),
        ("all of these", total),
    ]:
        share = weights_frozen / weights
        lines.append(f"{kind:<52} {number:>6} {columns:>11,} {frozen:>11,} {share:>8.2%}")
    everything = sum(math.prod(shape) for shape in shapes.values())
    lines.append(
        f"of all {everything:,} weights, those without a mask included: "
        f"{total[4] / everything:.2%} frozen"
    )
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


def main(argv=None):  # noqa: C901
    args = parse_args(argv)
    if args.compare:
        return compare(*args.compare)
    if args.scores:
        scores, about, shapes = read_scores(args.scores)
        if about["method"] == "delta" and not args.freeze:
            fail(
                "delta scores: say --freeze lowest (LoTA updates the weights that went "
                "furthest) or --freeze highest"
            )
        about = {key: about[key] for key in sorted(ABOUT)} | {"freeze": args.freeze or "highest"}
        about["scores_sha256"] = sha256_of(args.scores)
        print(
            f"freeze the {args.ratio:.1%} {about['freeze']} {about['method']} scores, one "
            f"for each {about['axis']}, "
            f"of {len(scores)} parameters of {about['model']}"
        )
    else:
        print(
            f"freeze {args.ratio:.1%} of {args.model} by {args.method}, at random with "
            f"seed {args.seed}"
        )
    if args.method or args.freeze_chat_tokens:
        skeleton, tokenizer = load_skeleton(args.model or about["model"])
        always_updated = embeddings_and_head(skeleton)
    if args.method:
        shapes = {name: p.shape for name, p in skeleton.named_parameters()}
        about = {
            "method": args.method,
            "axis": "module" if args.method == "hft" else "column",
            "model": args.model,
            "fingerprint": fingerprint(shapes),
            "seed": str(args.seed),
            "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()}),
        }

    if args.scores:
        masks = {
            name: broadcasting(
                top_mask(score, args.ratio, about["freeze"]), about["axis"], shapes[name]
            )
            for name, score in tqdm(scores.items(), desc="mask", unit="parameter")
        }
    elif args.method == "hft":
        masks = hft_masks(skeleton, always_updated, args.ratio, args.seed)
    else:
        masks = s2ft_masks(
            skeleton, args.ratio, args.seed, output=args.method == "s2ft-down-output"
        )
    if args.freeze_chat_tokens:
        ids = (
            chat_token_ids(tokenizer)
            if tokenizer.chat_template
            else fail("the tokenizer has no chat template")
        )
        print(
            f"rows of embeddings and head frozen, {len(ids)} tokens: "
            f"{tokenizer.convert_ids_to_tokens(ids)}"
        )
        about["chat_tokens"] = json.dumps(ids)
        if about["fingerprint"] != fingerprint(
            {name: p.shape for name, p in skeleton.named_parameters()}
        ):
            fail(
                f"--scores {args.scores}: made for another model than {about['model']} "
                f"now is; make it again"
            )
        rows = skeleton.get_input_embeddings().num_embeddings
        for name in sorted(always_updated - masks.keys()):
            if shapes[name][0] == rows:  # position embeddings have no row for a token
                masks[name] = torch.ones(rows, *[1] * (len(shapes[name]) - 1), dtype=torch.uint8)
                masks[name][ids] = 0
    lines, frozen_fraction = frozen_table(masks, shapes)
    print("\n".join(lines))

    save_atomically(
        masks,
        args.out,
        {
            "format": "ssu-mask",
            "version": "1",
            **about,
            "ratio": str(args.ratio),
            "frozen_fraction": f"{frozen_fraction:.6f}",
        },
    )
    print(f"mask: {args.out} ({args.out.stat().st_size / 1e6:.2f} MB)")
    print(
        f"next: python train.py --model {about['model']} --mask {args.out} --data TEXT "
        f"--out {args.out.parent}"
    )


if __name__ == "__main__":
    main()
