"""Stage 1 of SSU: which weight columns does the source language need? (paper, Section 3.1; S_j of
Section 3.2)

A frozen instruct model reads source-language (English) calibration text once. Every weight gets
Wanda's importance s_ij = |theta_ij| * ||X_j||_2,        X_j: the j-th input feature over all
calibration tokens, and every column, i.e. input feature, the sum of its weights' importances, S_j
= sum_i s_ij. In a 1-D parameter each element is a column of its own. What X is for each kind of
parameter: matrix of nn.Linear [d_out, d_in]   the layer's input
    norm weight [d]                     the normalised input, before the weight: that is what the
    weight multiplies bias [d]                            the constant 1, so ||X_j||_2 =
    sqrt(tokens) and the ranking is that of |b_j| Embeddings and the LM head are always trained
    (Section 3.1), so they are not scored.

--method chooses another s_ij (element_scores, fisher_scores), --axis another sum: over the weights
of a row, or none (Table 3). Scores of --axis element are as large as the model in fp32.

The text is packed: chats in the model's own template, shuffled by --seed, concatenated and cut
into --num-samples sequences of --seq-len tokens without padding. One forward pass of the decoder,
without its head, is all it takes; fim needs a backward pass for each sequence.

Tiny, on a CPU:
    python score.py --model data/embedded/model --data data/embedded/en/calibration.jsonl \
        --out runs/ne/scores-wanda.safetensors --num-samples 32 --seq-len 512
The paper's setting, on one GPU:
    python score.py --model allenai/OLMo-2-1124-7B-Instruct --data tulu --out
    runs/ne/scores-wanda.safetensors For LoTA (Section 6), how far each weight went in 100 steps of
    full fine-tuning: python score.py --model data/embedded/model --method delta --axis element
    --adapted runs/ne/lota-calibration/model \\ --out runs/ne/scores-delta-element.safetensors
"""

import argparse
import copy
import gzip
import hashlib
import itertools
import json
import os
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

CALIBRATED = ("wanda", "sparsegpt", "fim")  # the methods that read calibration text
PRESETS = {  # name of --data: data set of the hub, revision, files (Section 4.2 and Table 5)
    "tulu": ("allenai/tulu-3-sft-olmo-2-mixture", "main", "data/train-*.parquet"),
    "alpaca": (
        "tatsu-lab/alpaca",
        "dce01c9b08f87459cf36a430d809084718273017",
        "data/train-*.parquet",
    ),
}
COLUMNS = {"id", "messages", "instruction", "input", "output"}  # that are read of them


def fail(message):
    """One line on stderr, below any progress bar, and exit code 2: something the user can mend."""
    tqdm.write(f"score.py: error: {' '.join(str(message).split())[:500]}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        "score.py", argparse.SUPPRESS, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or hub name of the source model")
    parser.add_argument(
        "--data",
        help="calibration text (wanda, sparsegpt, fim): .jsonl, .jsonl.gz or .parquet with "
        "messages, instruction/output or text; .txt, a document a line; or tulu, alpaca "
        "from the hub",
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="scores-<method>.safetensors to write"
    )
    parser.add_argument(
        "--method",
        default="wanda",
        choices=["wanda", "magnitude", "random", "sparsegpt", "fim", "delta"],
    )
    parser.add_argument(
        "--axis",
        choices=["column", "row", "element"],
        default="column",
        help="what is scored as one: an input feature (default), an output feature, or each weight",
    )
    parser.add_argument("--adapted", help="delta only: folder of the adapted model")
    parser.add_argument(
        "--num-samples", type=int, default=500, help="calibration sequences (paper: 500)"
    )
    parser.add_argument(
        "--seq-len", type=int, default=2048, help="tokens in a calibration sequence (paper: 2,048)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=4, help="sequences in a forward pass; fim: always 1"
    )
    parser.add_argument(
        "--seed", type=int, default=42, help="order of the calibration rows; the random scores"
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of the forward pass; auto: bfloat16 on a GPU, else, and for delta, float32",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.method in CALIBRATED and not args.data:
        parser.error(f"--method {args.method} reads calibration text: add --data FILE")
    if args.method not in CALIBRATED and args.data:
        parser.error(f"--method {args.method} reads no calibration text: leave out --data")
    if (args.method == "delta") != bool(args.adapted):
        parser.error("--method delta and --adapted FOLDER belong together")
    if args.method == "sparsegpt" and args.axis == "row":
        parser.error(
            "--method sparsegpt gives all rows of a matrix the same score: choose --axis "
            "column or element"
        )
    if min(args.num_samples, args.seq_len - (args.method == "fim"), args.batch_size) < 1:
        parser.error(
            "--num-samples, --seq-len and --batch-size must be at least 1, --seq-len at "
            "least 2 for fim"
        )
    devices = ["cpu", "cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if args.device not in devices or (args.device == "cuda" and not torch.cuda.is_available()):
        parser.error(
            f"--device {args.device}: must be cpu or cuda, and PyTorch sees "
            f"{len(devices) - 2} GPUs here"
        )
    parent = next(folder for folder in args.out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK) or args.out.is_dir():
        parser.error(f"--out {args.out}: cannot be written there")
    if args.out.exists() and format_of(args.out) != "ssu-scores":
        parser.error(
            f"--out {args.out}: is there already, and is no file of scores; choose another name"
        )
    return args


def format_of(path):
    """What the metadata of a safetensors file call it; None for any other file."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format")
    except (OSError, SafetensorError):
        return None


def load_config(model, flag="--model"):
    """(the model on the meta device, without weights; its tokenizer) of a local folder or hub
    model. Raises
    SystemExit(2) for what is missing, quantised or no causal language model."""
    if not Path(model).is_dir() and (
        Path(model).is_absolute() or model.startswith(".") or model.count("/") != 1
    ):
        fail(f"{flag} {model}: no such folder")
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            fail(f"{flag} {model}: quantised weights cannot be scored; give the unquantised model")
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        fail(f"{flag} {model}: {error}")
    return skeleton, tokenizer


def read_rows(path):
    """Yields the rows of a data file as dicts; a .txt file gives {"text": line}. Raises
    SystemExit(2) at a bad line.
    """
    path = Path(path)
    if not path.is_file():
        fail(f"--data {path}: no such file")
    number = 0
    try:
        if path.suffix == ".parquet":
            from datasets import load_dataset  # here, because it takes a second to import

            yield from load_dataset("parquet", data_files=str(path), split="train", streaming=True)
            return
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for line in file:
                number += 1
                if line.strip():
                    yield (
                        {"text": line.decode().strip()}
                        if path.suffix == ".txt"
                        else json.loads(line)
                    )
    except (ValueError, OSError, EOFError) as error:
        fail(f"--data {path}: line {number} is not JSON in UTF-8, or the file is damaged ({error})")


def hub_rows(preset, seed, commit=None):
    """Yields rows of a data set of the hub in an order drawn by seed, each with the `file` and
    `row` that it is.

    Parquet files come in groups of about a thousand rows. Of all groups 32 are drawn and fetched,
    their rows shuffled and yielded, then 32 more: 500 sequences take some 100 MB out of the 1.4 GB
    of tulu. commit: the data set's, or the
    one that it has now. Raises SystemExit(2) when the hub does not give them."""
    import pyarrow.parquet as pq  # here, because it takes a second to import
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.errors import HTTPError

    repo, revision, pattern = PRESETS[preset]
    draw = random.Random(seed)
    try:
        commit = commit or HfApi().dataset_info(repo, revision=revision).sha
        hub = HfFileSystem()
        paths = sorted(hub.glob(f"datasets/{repo}@{commit}/{pattern}"))
        if not paths:
            fail(f"--data {preset}: {repo} at {commit} has no {pattern}: has it changed?")
        files = [
            pq.ParquetFile(hub.open(path, cache_type="none")) for path in paths
        ]  # only what is asked for
        starts = {
            (f, g): sum(file.metadata.row_group(i).num_rows for i in range(g))
            for f, file in enumerate(files)
            for g in range(file.num_row_groups)
        }
        groups = list(starts)
        draw.shuffle(groups)
        while groups:
            rows = []
            for f, g in tqdm(groups[:32], desc=f"fetch {preset}", unit="row group"):
                table = files[f].read_row_group(
                    g, columns=[c for c in files[f].schema_arrow.names if c in COLUMNS]
                )
                rows += [
                    {"data": f"{repo}@{commit}", "file": f, "row": starts[f, g] + i, **row}
                    for i, row in enumerate(table.to_pylist())
                ]
            draw.shuffle(rows)
            yield from rows
            groups = groups[32:]
    except (OSError, ValueError, HTTPError) as error:
        fail(
            f"--data {preset}: the hub did not give {repo} ({error}). Mend the network or "
            "HF_TOKEN, or give a file of your own"
        )


def load_model(model, device, dtype):
    """The causal LM in eval mode, its files complete: a tensor that they lack would be random."""
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (
        OSError,
        SafetensorError,
        RuntimeError,
    ) as error:  # the last: shapes that are not those of config.json
        fail(f"{model}: {error}")
    if info["missing_keys"]:
        fail(f"{model}: its files lack {sorted(info['missing_keys'])[:3]}")
    return loaded.to(device).eval()


def is_chat(messages):
    return (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
            for turn in messages
        )
    )


def row_ids(row, tokenizer):
    """Token ids of one row: chats go through the model's own chat template, plain text ends with
    end-of-text.

    Raises SystemExit(2) for a chat that the template refuses, and for plain text without an
    end-of-text token."""
    if not row.get("messages") and row.get("instruction") and row.get("output") is not None:
        prompt = row["instruction"] + (f"\n\nInput: {row['input']}" if row.get("input") else "")
        row = {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": row["output"]},
            ]
        }
    if row.get("messages"):
        try:
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        except TemplateError as error:  # a system turn, for instance
            fail(
                f"the model's chat template refuses {str(row['messages'])[:200]} "
                f"({error}): leave such rows out"
            )
        return tokenizer(text, add_special_tokens=False)[
            "input_ids"
        ]  # the template has written BOS already
    if tokenizer.eos_token_id is None:
        fail(
            "the tokenizer has no end-of-text token (eos_token) to put after plain text: "
            "set it, or give chats"
        )
    return tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id]


def checked(rows, data, tokenizer):
    """Yields the rows. Raises SystemExit(2) at one that is neither a chat nor text, or a chat
    without a template.
    """
    for number, row in enumerate(rows, 1):
        chat = isinstance(row, dict) and (
            is_chat(row.get("messages"))
            or (
                isinstance(row.get("instruction"), str)
                and isinstance(row.get("output"), str)
                and not row.get("messages")
            )
        )
        if not chat and not (
            isinstance(row, dict) and not row.get("messages") and isinstance(row.get("text"), str)
        ):
            fail(
                f"--data {data}: row {number} has neither `messages` of role and content, "
                f"`instruction` and `output`, "
                "nor `text`"
            )
        if chat and not tokenizer.chat_template:
            fail(
                f"--data {data}: row {number} is a chat, but the tokenizer has no "
                f"template: use an instruct model"
            )
        yield row


def calibration_tokens(data, tokenizer, num_samples, seq_len, seed, folder=Path(".")):
    """Packs calibration rows, in an order drawn by seed, into int64 tokens [samples, seq_len],
    samples <= num_samples.

    The rows that a preset gave are written to `folder`, and read from there another time. Raises
    SystemExit(2) when a
    row has no text or when the data do not fill one sequence."""
    if data in PRESETS:
        drawn = folder / f"calibration-{data}-{seed}.jsonl"
        before = list(read_rows(drawn)) if drawn.exists() else []
        commit = (
            before[0]["data"].split("@")[1] if before else None
        )  # more rows: of the data set as it was
        rows = itertools.chain(
            before, itertools.islice(hub_rows(data, seed, commit), len(before), None)
        )
        rows = checked(rows, data, tokenizer)
    else:
        rows = list(checked(read_rows(data), data, tokenizer))
        random.Random(seed).shuffle(rows)
    ids, used = [], []
    for row in tqdm(rows, desc="tokenise calibration", unit="row"):
        ids += row_ids(row, tokenizer)
        used.append(row)
        if len(ids) >= num_samples * seq_len:
            break
    samples = min(num_samples, len(ids) // seq_len)
    if samples == 0:
        fail(
            f"--data {data}: {len(ids)} tokens do not fill one sequence of {seq_len}: "
            f"give more text"
        )
    if data in PRESETS and len(used) > len(before):
        write_atomically(
            drawn, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in used))
        )
        print(f"the {len(used)} rows drawn from the hub, with their places there: {drawn}")
    return torch.tensor(ids[: samples * seq_len]).view(samples, seq_len)


def fingerprint(model):
    """Identity of an architecture: sha256 over its sorted "name shape" lines, e.g.
    "model.norm.weight 576".
    """
    lines = sorted(f"{name} {'x'.join(map(str, p.shape))}" for name, p in model.named_parameters())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def scored_parameters(model):
    """{parameter name: its module} for all parameters but the embeddings and the LM head (Section
    3.1).

    Raises SystemExit(2) for a layout whose columns would be scored wrongly, naming the
    parameter."""
    head = model.get_output_embeddings()
    always_trained = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding) or module is head
        for p in module.parameters(recurse=False)
    }
    names = {id(p): name for name, p in model.named_parameters()}
    owners = {
        names[id(p)]: module
        for module in model.modules()
        for p in module.parameters(recurse=False)
        if id(p) not in always_trained
    }
    for name, module in owners.items():
        p, kind = model.get_parameter(name), type(module).__name__
        if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            fail(
                f"{name} is {p.dtype}: quantised weights cannot be scored; give the "
                f"unquantised model"
            )
        if p.dim() > 1 and not isinstance(module, nn.Linear):
            fail(
                f"{name} {list(p.shape)} in {kind}: only nn.Linear matrices can be "
                f"scored; Conv1D (transposed), fused "
                "experts (3-D) and their routers would be scored wrongly"
            )
    return owners


def norm_probe(name, norm):
    """Returns f: input x [..., d] of a norm -> what its weight multiplies [..., d], the normalised
    x. None if that is
    its output over its weight, which then need not be computed again (RMSNorm, with no weight 0).

    A norm is affine in its weight: norm(x) = weight * x_hat + rest, so x_hat is its output at
    weight 1 less that at
    weight 0. This holds for RMSNorm and LayerNorm, with (1 + weight) too. Anything else is refused
    by name."""
    at_one, at_zero, check = (copy.deepcopy(norm) for _ in range(3))
    nn.init.ones_(at_one.weight)
    nn.init.zeros_(at_zero.weight)

    x = torch.randn(2, len(norm.weight), dtype=norm.weight.dtype, device=norm.weight.device)

    def normalised(x):
        return at_one(x) - at_zero(x)

    nn.init.constant_(check.weight, 3.0)
    if not torch.allclose(check(x), 3.0 * normalised(x) + at_zero(x), rtol=2e-2, atol=2e-2):
        fail(
            f"{name} in {type(norm).__name__}: not a norm whose output is weight * "
            f"normalised input; cannot be scored"
        )
    return normalised if at_zero(x).any() or not norm.weight.all() else None


@torch.inference_mode()
def input_norms(model, owners, tokens, batch_size):  # noqa: C901
    """||X_j||_2 over all calibration tokens, for every scored parameter: {name: float32 [d_in] or
    [d]} (Section 3.1).

    model: the whole causal LM; only its decoder runs. tokens: int64 [samples, seq_len]. The
    squares are summed in
    float32 on the device. Raises SystemExit(2) when a parameter's module never ran."""
    squares = {}  # module -> float32 sum over tokens of x_j^2
    counts = {}  # module -> tokens it saw
    last = [None, None]  # q, k, v (and gate, up) read the very same tensor: square it once

    def add(module, x):
        if x is not last[0]:
            squared = x.flatten(0, -2).float().square()  # [tokens, d]
            last[:] = (
                x,
                squared.new_ones(len(squared)) @ squared,
            )  # on a CPU twice as fast as .sum(0)
        squares[module] = squares.get(module, 0) + last[1]
        counts[module] = counts.get(module, 0) + x.numel() // x.shape[-1]

    hooks, divided = [], set()
    for module in set(owners.values()):
        name = next(n for n, m in owners.items() if m is module)
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(lambda m, args: add(m, args[0])))
        else:
            probe = norm_probe(name, module)
            if probe:
                hooks.append(
                    module.register_forward_pre_hook(
                        lambda m, args, probe=probe: add(m, probe(args[0]))
                    )
                )
            else:  # the very tensor that q, k and v or gate and up read
                divided.add(module)
                hooks.append(module.register_forward_hook(lambda m, args, output: add(m, output)))
    device = next(model.parameters()).device
    for batch in tqdm(tokens.split(batch_size), desc="calibrate", unit="batch"):
        model.base_model(input_ids=batch.to(device), use_cache=False)
    for hook in hooks:
        hook.remove()

    norms = {}
    for name, module in owners.items():
        if module not in squares:
            fail(
                f"{name} saw no calibration token (an expert never chosen?): give more "
                f"text or a higher --num-samples"
            )
        is_bias = name.endswith("bias")
        norms[name] = (
            squares[module].new_tensor(counts[module]).sqrt() if is_bias else squares[module].sqrt()
        )
        if module in divided:
            norms[name] /= module.weight.abs()
    return norms


def element_scores(method, weight, x_norm, num_tokens, adapted):
    """s_ij, float32 in the shape of weight, [d_out, d_in] or [d]. Another score is another line
    here.

    x_norm: ||X_j||_2 over num_tokens tokens, [d_in] or [d]. adapted: the weight after training on
    target text."""
    if method == "wanda":  # Section 3.1
        return weight.float().abs() * x_norm
    if method == "magnitude":  # SSU-Mag, Section 4.4
        return weight.float().abs()
    if method == "sparsegpt":  # E[x_j^2], Appendix B.2
        return (x_norm.square() / num_tokens).expand(weight.shape)
    if method == "delta":  # LoTA, Section 6
        return (adapted.float() - weight.float()).abs()
    raise ValueError(method)


def along(axis, s):
    """Scores of what is frozen as one: sums of s [d_out, d_in] over its columns [d_in] or rows
    [d_out] (Section 3.2,
    Table 3), or s itself. In a 1-D parameter each element stands alone."""
    return s if axis == "element" or s.dim() == 1 else s.sum(0 if axis == "column" else 1)


def random_scores(name, shape, seed):
    """SSU-Rand (Section 4.4): a random ranking, drawn from seed and the parameter's name."""
    seed = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def fisher_scores(model, names, tokens, axis):
    """SSU-FIM (Appendix B.2): s_ij = E[(dL/dtheta_ij)^2], L the mean next-token loss of a
    sequence; summed along axis.

    tokens: int64 [samples, seq_len]. Each gradient is squared, summed and freed in a hook as soon
    as the backward pass
    has made it, so there are never gradients of a whole model. Raises SystemExit(2) when a
    parameter got none."""
    sums = {}
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
        if name in names:

            def add(p, name=name):
                sums[name] = sums.get(name, 0) + along(axis, p.grad.float().square())
                p.grad = None

            p.register_post_accumulate_grad_hook(add)
    for sample in tqdm(
        tokens.to(next(model.parameters()).device), desc="calibrate", unit="sequence"
    ):
        logits = model(input_ids=sample[None], use_cache=False).logits[0]
        F.cross_entropy(logits[:-1].float(), sample[1:]).backward()
    if missing := names - sums.keys():
        fail(f"{sorted(missing)[:3]} got no gradient (an expert never chosen?): give more text")
    return {name: total / len(tokens) for name, total in sums.items()}


def write_atomically(path, write):
    """Has write(temporary path) write a file, so that `path` is always absent, the old one, or
    complete.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
        fail(f"{path}: cannot be written ({error})")


def main(argv=None):  # noqa: C901
    args = parse_args(argv)
    skeleton, tokenizer = load_config(args.model)
    owners = scored_parameters(skeleton)
    matrices = sum(skeleton.get_parameter(name).dim() == 2 for name in owners)
    if args.adapted and fingerprint(load_config(args.adapted, "--adapted")[0]) != fingerprint(
        skeleton
    ):
        fail(f"--adapted {args.adapted}: its parameters are not those of {args.model}")
    if len(tokenizer) > (rows := skeleton.get_input_embeddings().num_embeddings):
        fail(
            f"--model {args.model}: its tokenizer has {len(tokenizer):,} tokens, its "
            f"embeddings {rows:,} rows"
        )
    if args.method == "sparsegpt" and any(name.endswith("bias") for name in owners):
        fail(
            f"--method sparsegpt: {args.model} has biases, whose input is the constant 1: "
            f"nothing ranks them"
        )
    context = (
        getattr(skeleton.config.get_text_config(), "max_position_embeddings", None) or args.seq_len
    )
    if args.method in CALIBRATED and args.seq_len > context:
        fail(f"--seq-len {args.seq_len}: {args.model} was made for {context} tokens at most")
    print(
        f"{args.method} scores of {args.model}, one for each {args.axis}: {matrices} matrices, "
        f"{len(owners) - matrices} norm weights and biases; embeddings and LM head are not scored"
    )

    tokens = torch.empty(0, 0)
    if args.method in CALIBRATED:
        tokens = calibration_tokens(
            args.data, tokenizer, args.num_samples, args.seq_len, args.seed, args.out.parent
        )
        short = (
            ""
            if len(tokens) == args.num_samples
            else f" (asked: {args.num_samples}; the data hold no more)"
        )
        print(
            f"calibration: {len(tokens)} sequences x {args.seq_len} = {tokens.numel():,} "
            f"tokens{short}, {args.data}"
        )
        print(f"first sequence begins: {tokenizer.decode(tokens[0, :48])!r}")

    auto = "bfloat16" if args.device.startswith("cuda") and args.method != "delta" else "float32"
    dtype = getattr(torch, auto if args.dtype == "auto" else args.dtype)
    model = skeleton if args.method == "random" else load_model(args.model, args.device, dtype)
    owners = scored_parameters(model)
    adapted = load_model(args.adapted, args.device, dtype) if args.adapted else model
    if args.method == "random":
        shapes = {name: along(args.axis, model.get_parameter(name)).shape for name in owners}
        scores = {name: random_scores(name, shape, args.seed) for name, shape in shapes.items()}
    elif args.method == "fim":
        scores = fisher_scores(model, owners.keys(), tokens, args.axis)
    else:
        calibrated = args.method in CALIBRATED
        norms = (
            input_norms(model, owners, tokens, args.batch_size)
            if calibrated
            else dict.fromkeys(owners)
        )
        with torch.no_grad():
            scores = {
                name: along(
                    args.axis,
                    element_scores(
                        args.method,
                        model.get_parameter(name),
                        norms[name],
                        tokens.numel(),
                        adapted.get_parameter(name),
                    ),
                ).cpu()
                for name in tqdm(owners, desc="score", unit="parameter")
            }
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            fail(
                f"the scores of {name} are not finite: the model overflows in {dtype}; "
                f"try --dtype float32"
            )
    if not any(score.any() for score in scores.values()):
        fail(
            "all scores are 0"
            + (f": {args.adapted} is {args.model} itself" if args.adapted else "")
        )

    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    metadata = {
        "format": "ssu-scores",
        "version": "1",
        "method": args.method,
        "axis": args.axis,
        "model": args.model,
        "fingerprint": fingerprint(model),
        "seed": str(args.seed),
        "data": str(args.adapted or args.data),
        "num_samples": str(len(tokens)),
        "seq_len": str(args.seq_len),
        "num_tokens": str(tokens.numel()),
        "shapes": json.dumps(shapes),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    tensors = {name: score.contiguous().cpu() for name, score in scores.items()}
    write_atomically(args.out, lambda path: save_file(tensors, path, metadata=metadata))
    print(
        f"scores of {len(scores)} parameters: {args.out} ({args.out.stat().st_size / 1e6:.2f} MB)"
    )
    lota = " --freeze lowest --ratio 0.9" if args.method == "delta" else ""
    print(
        f"next: python make_mask.py --scores {args.out}{lota} --out "
        f"{args.out.parent}/METHOD/mask.safetensors"
    )


if __name__ == "__main__":
    main()
