"""The paper's data sets and judges in miniature on the stand-in hub, for tests that fetch them."""

import csv
import gzip
import hashlib
import json
import shutil
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SIZES, TEXT, tiny_tokenizer
from hub import HUB, REQUESTS
from huggingface_hub import HfFileSystem
from transformers import MistralConfig, MistralForCausalLM, Phi3Config, Phi3ForCausalLM

from data import safety
from tools import judged

TULU, MADLAD = "allenai/tulu-3-sft-olmo-2-mixture", "allenai/MADLAD-400"


@pytest.fixture
def served():
    """The folder of the stand-in's data sets, empty, and nothing in the clients' caches."""
    shutil.rmtree(HUB, ignore_errors=True)
    HfFileSystem.clear_instance_cache()
    # Listings of commits, whose files never change on the hub
    if listings := sys.modules.get("huggingface_hub._tree_cache"):
        listings._IN_MEMORY_TREE_CACHE.clear()
    REQUESTS.clear()
    (HUB / "datasets").mkdir(parents=True)
    return HUB / "datasets"


def put_parquet(folder, rows, shards, group):
    folder.mkdir(parents=True)
    size = len(rows) // shards
    for i in range(shards):
        pq.write_table(
            pa.Table.from_pylist(rows[i * size : (i + 1) * size]),
            folder / f"train-{i:05}-of-{shards:05}.parquet",
            row_group_size=group,
        )


def put_tulu(served, rows=600):
    chats = [
        {
            "id": f"sft_{i}",
            "source": "somewhere",
            "messages": [
                {"role": "user", "content": f"{i} {TEXT[i % 5]}?"},
                {"role": "assistant", "content": TEXT[(i + 1) % 5]},
            ],
        }
        for i in range(rows)
    ]
    put_parquet(served / TULU / "data", chats, shards=3, group=10)
    return chats


def put_madlad(served, lang, documents):
    folder = served / MADLAD / "data" / lang
    folder.mkdir(parents=True)
    for i in range(2):
        with gzip.open(folder / f"{lang}_clean_{i:04}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents[i::2])
        with gzip.open(folder / f"{lang}_noisy_{i:04}.jsonl.gz", "wt") as file:
            file.write(json.dumps({"text": "noise"}) + "\n")


def configs(folder, found):
    """A data set's README with its configurations, as the hub has it: {config: {split: path}}."""
    lines = ["---", "configs:"]
    for name, splits in found.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def put_rows(folder, path, rows):
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / path)


@pytest.fixture
def paper_sets(served, olmo2):
    """The paper's evaluation sets in miniature, each in the layout that it has on the hub."""
    codes = {"en": ("eng_Latn", "english"), "ig": ("ibo_Latn", "igbo")}
    plus, copy = served / "openlanguagedata/flores_plus", served / "mteb/FloresBitextMining"
    for code, _ in codes.values():
        for split in ("dev", "devtest"):
            put_rows(
                plus,
                f"{split}/{code}.parquet",
                [{"id": i, "text": f"{code} {split} {i}"} for i in range(600)],
            )
    configs(
        plus,
        {
            code: {split: f"{split}/{code}.parquet" for split in ("dev", "devtest")}
            for code, _ in codes.values()
        },
    )
    (plus / ".gated").touch()
    put_rows(
        copy,
        "data/devtest.parquet",
        [{code: f"{code} {i}" for code, _ in codes.values()} for i in range(600)],
    )
    configs(copy, {"default": {"devtest": "data/devtest.parquet"}})
    for lang, (code, name) in codes.items():
        for split, n in (("test", 5), ("validation", 3)):
            put_rows(
                served / "csebuetnlp/xlsum",
                f"{name}/{split}/0000.parquet",
                [
                    {
                        "id": f"{split}{i}",
                        "url": "u",
                        "title": "t",
                        "summary": TEXT[i],
                        "text": "word " * (10 - 2 * i - (split == "test")),
                    }
                    for i in range(n)
                ],
            )
        put_rows(
            served / "facebook/belebele",
            f"data/{code}.parquet",
            [
                {
                    "link": "l",
                    "question_number": i,
                    "flores_passage": "p",
                    "question": "q",
                    "mc_answer1": "1",
                    "mc_answer2": "2",
                    "mc_answer3": "3",
                    "mc_answer4": "4",
                    "correct_answer_num": "2",
                    "dialect": code,
                }
                for i in range(6)
            ],
        )
        for split, n in (("dev", 5), ("test", 4)):
            question = {"subject": "law", "question": "q"}
            if lang == "en":
                put_rows(
                    served / "cais/mmlu",
                    f"all/{split}.parquet",
                    [
                        question | {"choices": ["a", "b", "c", "d"], "answer": i % 4}
                        for i in range(n)
                    ],
                )
            else:
                put_rows(
                    served / "CohereLabs/Global-MMLU",
                    f"{lang}/{split}.parquet",
                    [
                        question
                        | {
                            "sample_id": f"{i}",
                            "option_a": "a",
                            "option_b": "b",
                            "option_c": "c",
                            "option_d": " " if split == "test" and i == 1 else "d",
                            "answer": "D",
                        }
                        for i in range(n)
                    ],
                )
    instructions = [
        {"dataset": "koala", "instruction": f"Say {text}", "output": "o"} for text in TEXT
    ]
    (served / "tatsu-lab/alpaca_eval").mkdir(parents=True)
    (served / "tatsu-lab/alpaca_eval/alpaca_eval.json").write_text(json.dumps(instructions))
    configs(
        served / "facebook/belebele",
        {code: {"test": f"data/{code}.parquet"} for code, _ in codes.values()},
    )
    configs(
        served / "cais/mmlu", {"all": {split: f"all/{split}.parquet" for split in ("dev", "test")}}
    )
    configs(
        served / "CohereLabs/Global-MMLU",
        {"ig": {split: f"ig/{split}.parquet" for split in ("dev", "test")}},
    )
    put_mtb(served)
    shutil.copytree(olmo2, HUB / "models/someone/tiny")
    return served


MTB = [  # without a reference, with one, and with a blank one
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."], "reference": []},
    {"question_id": 91, "category": "math", "turns": ["1 + 1?", "+ 1?"], "reference": ["2", "3"]},
    {"question_id": 92, "category": "math", "turns": ["Why?", "How?"], "reference": [" ", "So."]},
]


def put_mtb(served):
    put_rows(served / "lighteval/mt-bench", "data/train-00000-of-00001.parquet", MTB)


VERDICTS = {
    "mtb": "<score>\n4\n</score>",
    "t3": "Harmful request: yes\nResponse refusal: no\nHarmful response: no",
}


def put_judges(**verdicts):
    """Serve tiny judges of the kinds of Flow-Judge and WildGuard, which is gated.

    As on the hub, Flow-Judge's config names remote code, and WildGuard has no chat template. Each
    writes its verdict and nothing else: a token of its own after the line break that ends a prompt.
    """
    verdicts = VERDICTS | verdicts
    longrope = {"type": "longrope", "long_factor": [2.0] * 4, "short_factor": [1.0] * 4}
    contexts = {"original_max_position_embeddings": 4096, "max_position_embeddings": 131072}
    for task, name in judged.JUDGES.items():
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens([verdicts[task]])
        sizes = SIZES | {"vocab_size": len(tokenizer), "tie_word_embeddings": False}
        torch.manual_seed(1)
        if task == "mtb":
            more = contexts | {"num_key_value_heads": 4, "rope_scaling": longrope}
            model = Phi3ForCausalLM(Phi3Config(**sizes | more))
        else:
            more = {"num_key_value_heads": 2, "max_position_embeddings": 32768}
            model = MistralForCausalLM(MistralConfig(**sizes | more | {"sliding_window": None}))
            tokenizer.chat_template = None
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            model.lm_head.weight.zero_()
            chain = [tokenizer.encode("\n")[-1], len(tokenizer) - 1, tokenizer.eos_token_id]
            for token, after in zip(chain, chain[1:], strict=False):
                model.lm_head.weight[after] = 1e4 * model.model.embed_tokens.weight[token]
        folder = HUB / "models" / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if task == "mtb":
            config = json.loads((folder / "config.json").read_text())
            config["auto_map"] = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
            (folder / "config.json").write_text(json.dumps(config))
        else:
            (folder / ".gated").touch()


def put_safety(served, clone, monkeypatch):
    """Serve WildGuardTest, and lay out a clone of safety-eval with two rows in each file."""
    rows = [
        {"prompt": f"guard {i}", "prompt_harm_label": prompt, "response_harm_label": response}
        for i, (prompt, response) in enumerate(
            [
                ("harmful", "harmful"),
                ("unharmful", "unharmful"),
                ("harmful", None),
                (None, "harmful"),
                ("harmful", "unharmful"),
            ]
        )
    ]
    mix = served / safety.WILDGUARDMIX
    put_rows(mix, "test/wildguard_test.parquet", rows)
    configs(mix, {"wildguardtest": {"test": "test/wildguard_test.parquet"}})
    (mix / ".gated").touch()
    for part, (name, _, columns) in safety.FILES.items():
        rows = []
        for i in range(2):
            row = {column: f"{part} {column} {i}" for column in columns}
            rows.append(row | {"type": ["homonyms", "contrast_homonyms"][i]})
        path = clone / "evaluation/tasks/generation" / part.partition(":")[0] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        monkeypatch.setitem(safety.FILES, part, (name, digest, columns))


def put_glotlid(words, target="npi_Deva"):
    """Serve a fastText model as GlotLID, which knows two languages by the words of TEXT."""
    import fasttext

    folder = HUB / "models" / "cis-lmu/glotlid"
    folder.mkdir(parents=True)
    lines = []
    for i, text in enumerate(TEXT):
        label = target if i in (2, 3) else "eng_Latn"
        for start in range(4):
            piece = " ".join(text.split()[start : start + words])
            lines += [f"__label__{label} {piece}\n"] * 20
    (folder / "text").write_text("".join(lines), encoding="utf-8")
    # fastText sets a tenth of its weights per thread. With fewer than ten threads,
    # or a size that ten does not divide, the rest is whatever the memory held.
    whole = {"thread": 10, "dim": 10}
    model = fasttext.train_supervised(
        str(folder / "text"), lr=0.3, epoch=10, minn=2, maxn=3, bucket=1000, verbose=0, **whole
    )
    model.save_model(str(folder / "model_v3.bin"))
    return model


def put_harness_data(served, tmp_path, monkeypatch):
    for split, plus in (("train", 1), ("test", 2)):
        put_rows(
            served / "openai/gsm8k",
            f"main/{split}.parquet",
            [
                {
                    "question": f"What is {i} + {plus}?",
                    "answer": f"It is {i + plus}.\n#### {i + plus}",
                }
                for i in range(6)
            ],
        )
    configs(
        served / "openai/gsm8k",
        {"main": {split: f"main/{split}.parquet" for split in ("train", "test")}},
    )
    put_rows(
        served / "wis-k/instruction-following-eval",
        "data/train.parquet",
        [
            {
                "key": i,
                "prompt": f"{text} Do not use the letter e.",
                "instruction_id_list": ["keywords:forbidden_words"],
                "kwargs": [{"forbidden_words": ["e"]}],
            }
            for i, text in enumerate(TEXT)
        ],
    )
    configs(
        served / "wis-k/instruction-following-eval", {"default": {"train": "data/train.parquet"}}
    )
    (tmp_path / "nltk/tokenizers/punkt_tab").mkdir(parents=True)  # no sentences are counted here
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "nltk"))
