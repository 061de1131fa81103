"""The model card, OUT/model/README.md: what `hf upload` of the finished folder needs.

train.py writes it. tools/report.py adds the results of the evaluation, which comes later. A card
without this file's marks is its owner's, and is left alone.
"""

import re
from pathlib import Path

import yaml  # comes with huggingface_hub
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError, safe_open

from data.blocks import MADLAD, MADLAD_REVISION
from data.rows import LANGUAGES, write_atomically
from variants.distributed import RANK

START, END = "<!-- results, by tools/report.py -->", "<!-- end of results -->"
METHODS = {  # by the method in the mask file
    "wanda": "SSU-Wanda",
    "random": "SSU-Rand",
    "magnitude": "SSU-Mag",
    "sparsegpt": "SSU-SparseGPT",
    "fim": "SSU-FIM",
    "delta": "LoTA",
    "hft": "HFT",
    "s2ft-down": "S2FT (down)",
    "s2ft-down-output": "S2FT (down, output)",
    "s2ft-down-embeddings": "S2FT (down, embeddings)",
}
OPTIMIZERS = {
    "adamw": "AdamW",
    "adamw8bit": "AdamW with moments of 8 bits, updates rounded at random",
    "adamw8bit-nearest": "AdamW with moments of 8 bits",
}
TEXT = """
# {title}

{base_name}, adapted to {language} by continued pre-training on raw text. Method: {method}.
Made by the scripts of an implementation of [Source-Shielded Updates](https://arxiv.org/abs/2512.04844).

| | |
|---|---|
| source model | {base_name}{where} |
| method | {method} |
| frozen weights | {frozen:,} of {total:,}, compared bit by bit with the source model |
| trained weights that moved | {moved:,} of {trainable:,} |
| text | {text} |
| training | {steps:,} steps of {batch_size} sequences of {seq_len} tokens |
| optimizer | {optimizer}, learning rate {lr}, weight decay {weight_decay}, precision {precision} |
| seed | {seed} |
| scripts | commit {scripts} |
| license | {license} |

## Results

{start}
Not evaluated yet.
{end}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("OWNER/{title}")
model = AutoModelForCausalLM.from_pretrained("OWNER/{title}")
```

Tokenizer, chat template and generation settings are those of the source model.
"""


def source_card(name, directory, commit):
    """Return (hub id or None, metadata) of the source model, {} where it has no readable card."""
    hub_id = None if Path(name).is_dir() else name
    path = directory / "README.md"
    if not hub_id and not path.exists():
        print(f"{name} has no README.md, so the model card names no license")
        return None, {}
    try:
        if hub_id:
            path = hf_hub_download(name, "README.md", revision=commit)
        card = ModelCard.load(path, ignore_metadata_errors=True)
    except (OSError, ValueError, TypeError, HTTPError, yaml.YAMLError) as error:
        print(f"the model card names no license, because {name} has no readable card: {error}")
        return hub_id, {}
    found = {}
    for key, value in card.data.to_dict().items():
        texts = value if isinstance(value, list) else [value]
        if all(isinstance(text, str) and text.isprintable() for text in texts):
            found[key] = value  # its owner may have written anything
    return hub_id, found


def describe_method(args):
    """Return the name of the method, and how much it freezes."""
    if args.adalora:
        return "AdaLoRA"
    if args.gmt_ratio is not None:
        return f"GMT, which drops {args.gmt_ratio:.1%} of each gradient"
    if args.mask is None:
        return "full fine-tuning"
    try:
        with safe_open(args.mask, "pt") as file:
            about = file.metadata()
    except (OSError, SafetensorError):  # it was deleted since it was read
        about = {}
    name = METHODS.get(about.get("method"), about.get("method", "a mask"))
    if about.get("axis") in ("row", "element"):
        name += f" by {about['axis']}s"
    return f"{name}, ratio {about.get('ratio', 'unknown')}"


def describe_text(data):
    """Return (code of the language or None, a phrase for the training text, its hub id or None)."""
    if data.startswith("madlad:"):
        code = data.removeprefix("madlad:")
        return code, f"{MADLAD}, {code}, at {MADLAD_REVISION[:12]}", MADLAD
    code = Path(data).absolute().parent.name  # DIR/LANG/train.jsonl
    return (code if code in LANGUAGES else None), f"{Path(data).name}, a local file", None


def make(args, directory, commit, summary):
    """Return the card of a model that train.py made.

    commit: that of the source model on the hub, or None. summary: the last line of train.jsonl.
    """
    hub_id, source = source_card(args.model, directory, commit)
    lang, text, dataset = describe_text(args.data)
    method = describe_method(args)
    folder = Path(args.model).absolute().name
    base_model = hub_id
    # The card of a directory names the model from which its own was made: the same if quantized.
    if not hub_id and source.get("base_model_relation") == "quantized":
        base_model = source.get("base_model")
        if isinstance(base_model, list):
            base_model = next(iter(base_model), None)
    base_name = base_model or folder
    where = f", commit {commit}" if hub_id else f", in a local directory named {folder}"
    suffix = re.sub(r"[^A-Za-z0-9._-]+", "-", args.out.resolve().name)  # e.g. ssu-wanda-0.25
    title = "-".join(filter(None, [base_name.rpartition("/")[2], lang, suffix]))
    languages = source.get("language") or ["en"]
    languages = [languages] if isinstance(languages, str) else languages
    license_keys = ("license", "license_name", "license_link")
    data = ModelCardData(
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        language=list(dict.fromkeys([*languages, *filter(None, [lang])])),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["source-shielded-updates", "language-adaptation"],
        **{key: source[key] for key in license_keys if key in source},
    )
    frozen, trainable = summary["frozen_verified"], summary["trainable"]
    body = TEXT.format(
        title=title,
        base_name=base_name,
        where=where,
        scripts=summary["commit"] or "unknown",
        language=LANGUAGES[lang]["name"] if lang in LANGUAGES else lang or "another language",
        method=method,
        frozen=frozen,
        trainable=trainable,
        total=frozen + trainable,
        moved=summary["moved"],
        text=text,
        optimizer=OPTIMIZERS[args.optimizer],
        license=source.get("license") or "that of the source model, whose card does not name one",
        start=START,
        end=END,
        **{name: getattr(args, name) for name in ("steps", "batch_size", "seq_len", "lr")},
        **{name: getattr(args, name) for name in ("weight_decay", "precision", "seed")},
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def write(args, directory, commit, summary):
    """Write the card of OUT/model before the folder gets its name. For all ranks."""
    if RANK == 0:
        write_atomically(args.out / "model.tmp/README.md", make(args, directory, commit, summary))


def with_results(content, lang, table, numbers):
    """Return a card with the results of an evaluation, or None if the card is not ours any more.

    table: what a reader sees. numbers: [(where in `results`, heading, value, number of items)],
    such as ("mt/target/chrf", "MT en→X chrF++", 30.1, 500).
    """
    parts = re.fullmatch(f"(.*{re.escape(START)}\n).*?({re.escape(END)}.*)", content, re.DOTALL)
    if not parts:
        return None
    try:
        card = ModelCard(parts[1] + table + "\n" + parts[2])
        card.data.model_name = re.search("^# (.+)$", card.text, re.MULTILINE)[1]
    except (ValueError, TypeError, yaml.YAMLError):  # its owner has edited it
        return None
    card.data.eval_results = []
    for where, heading, value, size in numbers:
        task, *split, metric = where.split("/")
        found = EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            dataset_config=lang,
            dataset_split=" ".join(split) or None,
            dataset_args={"n": size} if size else None,
            metric_type=metric,
            metric_name=heading,
            metric_value=value,
        )
        card.data.eval_results.append(found)
    return card.content
