r"""Stage 2 of SSU: freeze the top k% of the columns of every matrix (paper, Section 3.2).

A mask is 1 where a weight is trained and 0 where it is frozen. In each parameter, the columns are
ranked by their importance S_j (score.py), and the int(ratio * columns) highest are frozen. No
parameter is compared with another. Of equal scores, the lower index is frozen first.

    python make_mask.py --scores runs/ne/scores-wanda.safetensors --ratio 0.5 \
        --out runs/ne/ssu-wanda/mask.safetensors
    python make_mask.py --method hft --model data/embedded/model --out runs/ne/hft/mask.safetensors

HFT (Section 4.4) and S2FT (Section 6) choose at random, and need no scores. The paper does not say
whether S2FT trains embeddings and LM head: s2ft-down-embeddings does, as the authors' code does.
LoTA (Section 6) trains the weights that moved furthest, so the lowest delta scores are frozen.
Masks are made on a CPU. They are uint8, in the smallest shape that broadcasts onto the parameter:
[1, d_in] for columns, [d_out, 1] for rows, [d_out, d_in] for elements, [1, 1] or [1] for a whole
parameter, [d] for a 1-D parameter.
"""

import data.interrupt  # noqa: F401  # isort: skip (Ctrl-C in the imports below)
import argparse
import functools
import json
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from data import errors
from data.identity import digest_of, fingerprint, format_of, save_tensors, shapes_of
from data.models import embeddings_and_head, load_skeleton, stop_clock

fail = functools.partial(errors.fail, "make_mask.py")

METHODS = ("hft", "s2ft-down", "s2ft-down-output", "s2ft-down-embeddings")


def parse_args(argv):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("make_mask.py", description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--scores", type=Path, help="scores file of score.py")
    add("--method", choices=METHODS, help="mask without scores")
    add("--model", help="directory or hub id of the source model, for --method")
    add("--out", type=Path, required=True, help="mask.safetensors to write")
    add("--ratio", type=float, help="fraction to freeze, 0 to 1 (default: 0.5; S2FT: 0.985)")
    freeze = "scores to freeze (default: highest; of delta scores: lowest)"
    add("--freeze", choices=["highest", "lowest"], help=freeze)
    add("--freeze-chat-tokens", action="store_true", help="freeze rows of the chat's tokens, too")
    add("--seed", type=int, default=42, help="seed of the random choices of --method")
    args = parser.parse_args(argv)

    if bool(args.scores) == bool(args.method) or bool(args.method) != bool(args.model):
        fail("these do not say what to mask. Give --scores FILE alone, or --method and --model")
    if args.method and args.freeze:
        fail(f"--method {args.method} has no scores. Remove --freeze")
    if args.ratio is None:
        args.ratio = 0.985 if str(args.method).startswith("s2ft-") else 0.5
    if not 0 <= args.ratio <= 1:
        fail(f"--ratio is {args.ratio}. Give a number from 0 (nothing is frozen) to 1")
    if args.out.exists() and format_of(args.out) != "ssu-mask":
        fail(f"--out {args.out} exists and is not a mask. Choose another name")
    return args


def read_scores(path):
    """Return ({name: fp32 scores that broadcast onto it}, their metadata, the model's shapes)."""
    if path.is_dir():
        fail(f"--scores {path} is a directory. Name the file in it")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            scores = {name: file.get_tensor(name) for name in file.keys()}
        if (metadata.get("format"), metadata.get("version")) != ("ssu-scores", "1"):
            raise ValueError("not a scores file of version 1")
        about = {key: metadata[key] for key in ("method", "axis", "model", "fingerprint", "seed")}
        shapes = json.loads(metadata["shapes"])
        found = (digest_of(scores), fingerprint(shapes))
        if found != (metadata["tensors_sha256"], about["fingerprint"]):
            raise ValueError("damaged, its digest does not match")
        for name, score in scores.items():
            shape, ones = shapes[name], [1] * (len(shapes[name]) - 1)
            wide = {"column": ones + shape[-1:], "row": shape[:1] + ones, "element": shape}
            scores[name] = score.view(wide[about["axis"]])  # fails if the sizes differ
    except (OSError, SafetensorError, LookupError, ValueError, RuntimeError) as error:
        fail(f"--scores {path} cannot be read ({error}). Make it again with score.py")
    about["scores_sha256"] = metadata["tensors_sha256"]
    return scores, about, shapes


def top_mask(scores, ratio, freeze="highest"):
    """Return uint8 in the shape of scores, 0 for the int(ratio * n) highest or lowest."""
    # A stable sort freezes equal scores in index order, so the mask is the same on any machine.
    order = torch.sort(scores.flatten(), descending=freeze == "highest", stable=True).indices
    mask = torch.ones(scores.numel(), dtype=torch.uint8)
    mask[order[: int(ratio * len(order))]] = 0
    return mask.view(scores.shape)


def hft_groups(model):
    """Return {group: {layer: [module names]}} with groups self_attn, mlp and norm."""
    groups = {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        layer = re.search(r"\.(\d+)\.(.*)", name)
        if own and layer:
            group = layer[2].rpartition(".")[0] if isinstance(module, nn.Linear) else "norm"
            if group == "norm" and any(p.dim() > 1 for p in own):
                fail(f"{name} is not nn.Linear or a norm. Choose a model without fused experts")
            groups.setdefault(group, {}).setdefault(int(layer[1]), []).append(name)
    return groups


def hft_masks(model, ratio, seed):
    """Return the masks of HFT (Section 4.4; Hui et al. 2025): whole modules freeze at random.

    At ratio 0.5, a layer freezes two of q k v o, one or two of up down gate, and half of its
    norms. A bias follows its matrix. What is in no layer is trained.
    """
    rng, frozen, masks = random.Random(seed), set(), {}
    for group, layers in hft_groups(model).items():
        sizes = [len(names) for names in layers.values()]
        if len(set(sizes)) > 1:
            fail(f"--method hft: the layers differ in {group}. Choose a model of equal layers")
        # Half of 3 matrices in 10 layers is 15: one in each layer, and one more in 5 of them.
        quota, rest = divmod(int(ratio * sum(sizes)), len(layers))
        one_more = rng.sample(sorted(layers), rest)
        for layer, names in layers.items():
            frozen.update(rng.sample(names, quota + (1 if layer in one_more else 0)))
    always = embeddings_and_head(model)
    for name, p in model.named_parameters():
        if name not in always:
            trained = name.rpartition(".")[0] not in frozen
            masks[name] = torch.full((1,) * p.dim(), trained, dtype=torch.uint8)
    return masks


def s2ft_masks(model, ratio, seed, method):
    """Return the masks of S2FT (Section 6, Table 8; Yang et al. 2024): only 1 - ratio of the input
    channels of each down_proj and, in s2ft-down-output, of the heads of each o_proj is trained.
    """
    kinds = ["down_proj", "o_proj"] if method == "s2ft-down-output" else ["down_proj"]
    rng = random.Random(seed)
    masks = {n: torch.zeros((1,) * p.dim(), dtype=torch.uint8) for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        kind = name.removesuffix(".weight").split(".")[-1]
        if kind not in kinds or p.dim() != 2:
            continue
        units = torch.arange(p.shape[1])  # input channels [d_in]
        count = int((1 - ratio) * len(units) + 1e-6)  # a tenth of 50 is 5, but 1 - 0.9 < 0.1
        if kind == "o_proj":
            heads = model.config.get_text_config().num_attention_heads
            units = units.view(heads, -1)  # [heads, head_dim]
            count = max(1, round((1 - ratio) * heads))
        masks[name] = torch.zeros(1, p.shape[1], dtype=torch.uint8)
        masks[name][0, units[rng.sample(range(len(units)), count)].flatten()] = 1
    for kind in kinds:
        if not any(f"{kind}.weight" in name for name in masks):
            fail(f"S2FT trains {kind}, which {model.config.model_type} lacks. Use another method")
        if not any(mask.any() for name, mask in masks.items() if f"{kind}.weight" in name):
            fail(f"--ratio {ratio} trains no column of any {kind}. Lower it")
    always = embeddings_and_head(model) if method == "s2ft-down-embeddings" else set()
    return {name: mask for name, mask in masks.items() if name not in always}


def chat_token_ids(tokenizer):
    """Return the ids of the tokens that the chat template writes around the turns."""
    stop_clock()
    turns = [{"role": role, "content": "CONTENT"} for role in ("user", "assistant", "user")]
    for chat in ([{"role": "system", "content": "CONTENT"}, *turns], turns):
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError):
            continue  # some templates refuse a system turn
        pieces = tokenizer(text.split("CONTENT"), add_special_tokens=False)["input_ids"]
        return sorted(set().union(*pieces))
    fail("--freeze-chat-tokens: the chat template is missing or fails. Use a chat model")


def count_frozen(masks, shapes):
    """Return the fraction of all weights that is frozen, and print it for each kind of them."""
    weights, frozen = Counter(), Counter()
    for name, mask in masks.items():
        kind = re.sub(r"\.\d+\.", ".*.", name)
        weights[kind] += math.prod(shapes[name])
        frozen[kind] += int((mask == 0).sum()) * math.prod(shapes[name]) // mask.numel()
    for kind in weights:
        print(f"{kind:<52} {frozen[kind] / weights[kind]:>8.2%} of {weights[kind]:,} frozen")
    return frozen.total() / sum(math.prod(shape) for shape in shapes.values())


def run(args):
    print(f"mask by {args.method or args.scores}, ratio {args.ratio:.1%}")
    if args.scores:
        scores, about, shapes = read_scores(args.scores)
        default = "lowest" if about["method"] == "delta" else "highest"
        about["freeze"] = args.freeze or default
        progress = tqdm(scores.items(), desc="mask", unit="parameter")
        masks = {name: top_mask(score, args.ratio, about["freeze"]) for name, score in progress}
    else:
        model, tokenizer = load_skeleton(args.model, fail)
        shapes = shapes_of(model)
        axis = "module" if args.method == "hft" else "column"
        about = {"method": args.method, "axis": axis, "model": args.model, "seed": str(args.seed)}
        about["fingerprint"] = fingerprint(shapes)
        if args.method == "hft":
            masks = hft_masks(model, args.ratio, args.seed)
        elif args.method.startswith("s2ft-"):
            masks = s2ft_masks(model, args.ratio, args.seed, args.method)

    # For any mask: the rows of the chat template's tokens (docs/DIFFERENCES.md, 11)
    if args.freeze_chat_tokens:
        model, tokenizer = load_skeleton(about["model"], fail)
        if fingerprint(shapes_of(model)) != about["fingerprint"]:
            fail(f"{about['model']}: its parameters differ from those of --scores. Score it again")
        ids = chat_token_ids(tokenizer)
        about["chat_tokens"] = json.dumps(ids)
        print(f"freeze the rows of {len(ids)} tokens: {tokenizer.convert_ids_to_tokens(ids)}")
        for name in embeddings_and_head(model) - masks.keys():
            rows = [shapes[name][0], *[1] * (len(shapes[name]) - 1)]
            if rows[0] == model.get_input_embeddings().num_embeddings:
                masks[name] = torch.ones(rows, dtype=torch.uint8)
                masks[name][ids] = 0

    about |= {"format": "ssu-mask", "version": "1", "ratio": str(args.ratio)}
    fraction = count_frozen(masks, shapes)
    about |= {"frozen_fraction": f"{fraction:.6f}", "tensors_sha256": digest_of(masks)}
    save_tensors(args.out, masks, about)
    print(f"wrote {args.out}: {fraction:.2%} of all weights are frozen")
    print(f"next: python train.py --mask {args.out} --model {about['model']} --data TEXT --out DIR")


def main(argv=None):
    sys.stdout.reconfigure(errors="backslashreplace")  # tokens may not be in the locale
    try:
        run(parse_args(argv))
    except (OSError, SafetensorError) as error:
        fail(f"a file cannot be read or written ({error}). Check --model, --out and free space")
    except KeyboardInterrupt:
        print("\nmake_mask.py: interrupted", file=sys.stderr)  # below the progress bar
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
