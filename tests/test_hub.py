"""Data and models of the hub, through its real clients, against the stand-in of hub.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, TEXT, tiny_model, write_jsonl
from hub import COMMIT, HUB, REQUESTS
from paper_hub import configs, put_harness_data, put_madlad, put_parquet, put_rows, put_tulu, served  # noqa: F401
from safetensors.torch import load_file
from transformers import AutoTokenizer

import evaluate
import score
import train
from tools import chat_eval

TULU, ALPACA, MADLAD = "allenai/tulu-3-sft-olmo-2-mixture", "tatsu-lab/alpaca", "allenai/MADLAD-400"


def test_tulu_is_drawn_from_all_parts_recorded_and_not_fetched_again(
    served, olmo2, tmp_path, capsys
):
    chats = put_tulu(served)
    argv = ["--model", str(olmo2), "--data", "tulu", "--seq-len", "64", "--seed", "7", "--out"]
    score.main([*argv, str(tmp_path / "a.safetensors"), "--num-samples", "200"])
    drawn = [
        json.loads(line)
        for line in (tmp_path / "calibration-tulu-7.jsonl").read_text().splitlines()
    ]
    assert "rows drawn from the hub" in capsys.readouterr().out
    for row in drawn:
        original = chats[200 * row["file"] + row["row"]]
        assert (row["id"], row["messages"], row["data"]) == (
            original["id"],
            original["messages"],
            f"{TULU}@{COMMIT}",
        )
        assert "source" not in row
    places = [row["id"] for row in drawn]
    assert (
        len(set(places)) == len(places)
        and {row["file"] for row in drawn} == {0, 1, 2}
        and places != sorted(places)
    )

    # the same tokens as those rows in a file give, in their order
    tokenizer, ids = AutoTokenizer.from_pretrained(olmo2), []
    for row in drawn:
        ids += tokenizer.apply_chat_template(row["messages"], return_dict=False)
    tokens = score.calibration_tokens("tulu", tokenizer, 200, 64, 7, tmp_path)
    assert tokens.flatten().tolist() == ids[: 200 * 64]

    asked = len(REQUESTS)
    score.main([*argv, str(tmp_path / "b.safetensors"), "--num-samples", "200"])
    score.main(
        [*argv, str(tmp_path / "c.safetensors"), "--num-samples", "50", "--method", "sparsegpt"]
    )
    assert len(REQUESTS) == asked
    for name, tensor in load_file(tmp_path / "a.safetensors").items():
        assert tensor.equal(load_file(tmp_path / "b.safetensors")[name])
    score.main(
        [*argv, str(tmp_path / "d.safetensors"), "--num-samples", "210"]
    )  # more: goes on in the same order
    more = [
        json.loads(line)
        for line in (tmp_path / "calibration-tulu-7.jsonl").read_text().splitlines()
    ]
    assert more[: len(drawn)] == drawn and len(more) > len(drawn) and len(REQUESTS) > asked


def test_tulu_is_not_downloaded_whole(served, olmo2, tmp_path):
    answers = [np.random.default_rng(i).bytes(9000).hex() for i in range(3000)]
    put_parquet(
        served / TULU / "data",
        [
            {
                "id": f"{i}",
                "messages": [
                    {"role": "user", "content": f"{i}"},
                    {"role": "assistant", "content": answer},
                ],
            }
            for i, answer in enumerate(answers)
        ],
        shards=3,
        group=10,
    )
    score.calibration_tokens("tulu", AutoTokenizer.from_pretrained(olmo2), 4, 64, 0, tmp_path)
    spans = [
        span.removeprefix("bytes=").split("-")
        for _, path, span in REQUESTS
        if span and "/resolve/" in path
    ]
    size = sum(f.stat().st_size for f in served.rglob("*.parquet"))
    assert 0 < sum(int(last) - int(first) + 1 for first, last in spans) < size / 2


def test_alpaca_reads_as_the_authors_format_it(served, olmo2, tmp_path):
    put_parquet(
        served / ALPACA / "data",
        [
            {
                "instruction": f"Add {i}",
                "input": "3" if i % 2 else "",
                "output": "4",
                "text": "unused",
            }
            for i in range(40)
        ],
        shards=1,
        group=10,
    )
    tokens = score.calibration_tokens(
        "alpaca", AutoTokenizer.from_pretrained(olmo2), 5, 32, 0, tmp_path
    )
    first = json.loads((tmp_path / "calibration-alpaca-0.jsonl").read_text().splitlines()[0])
    user = first["instruction"] + ("\n\nInput: 3" if first["input"] else "")
    chat = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    assert AutoTokenizer.from_pretrained(olmo2).decode(tokens.flatten().tolist()).startswith(chat)
    assert first["data"] == f"{ALPACA}@{score.PRESETS['alpaca'][1]}"


@pytest.mark.parametrize("what", ["missing", "gated"])
def test_a_data_set_that_the_hub_does_not_give_is_one_line(what, served, olmo2, tmp_path, capsys):
    for repo, main in ((TULU, ["--data", "tulu"]), (MADLAD, ["--data", "madlad:ky"])):
        if what == "gated":
            put_tulu(served) if repo == TULU else put_madlad(served, "ky", TEXT)
            (served / repo / ".gated").touch()
        with pytest.raises(SystemExit) as stopped:
            if repo == TULU:
                score.main(
                    [
                        "--model",
                        str(olmo2),
                        *main,
                        "--seq-len",
                        "64",
                        "--out",
                        str(tmp_path / "s.safetensors"),
                    ]
                )
            else:
                train.main(["--model", str(olmo2), *main, "--out", str(tmp_path / "out")])
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert stopped.value.code == 2 and len(lines) == 1 and repo in lines[0]
        assert not list(tmp_path.iterdir())


def madlad(lang):
    return train.load_documents("--data", f"madlad:{lang}", None, "key")["text"][:]


def test_madlad_is_unescaped_fetched_once_and_trained_on(served, olmo2, tmp_path):
    put_madlad(served, "ne", [f"{i}" for i in range(30)])
    put_madlad(served, "ky", [f"{i}\\n{TEXT[i % 5]}" for i in range(40)])
    argv = ["--model", str(olmo2), "--data", "madlad:ky", "--steps", "2", "--batch-size", "2"]
    argv += ["--seq-len", "32", "--out"]
    train.main([*argv, str(tmp_path / "a")])
    assert (tmp_path / "a/model/model.safetensors").is_file()
    expected = [f"{i}\n{TEXT[i % 5]}" for k in range(2) for i in range(k, 40, 2)]
    assert madlad("ky") == expected
    gets = [path for command, path, _ in REQUESTS if command == "GET" and "/resolve/" in path]
    assert len(gets) == 2 and all("_clean_" in path and train.MADLAD[1] in path for path in gets)
    train.main([*argv, str(tmp_path / "b")])
    gets = [path for command, path, _ in REQUESTS if command == "GET" and "/resolve/" in path]
    assert len(gets) == 2

    # Of Nepali, what datasets' shuffle(seed=42) draws
    files = [str(i) for k in range(2) for i in range(k, 30, 2)]
    assert madlad("ne") == [files[i] for i in np.random.default_rng(42).permutation(30)]


@pytest.mark.slow
def test_of_nepali_250000_documents_are_drawn(served):
    put_madlad(served, "ne", [f"{i}" for i in range(250_010)])
    assert len(set(madlad("ne"))) == 250_000


def test_a_model_of_the_hub_is_scored_by_name(served, olmo2, chats, tmp_path):
    shutil.copytree(olmo2, HUB / "models/someone/tiny")
    argv = ["--data", str(chats), "--num-samples", "4", "--seq-len", "32", "--out"]
    score.main(["--model", "someone/tiny", *argv, str(tmp_path / "hub.safetensors")])
    score.main(["--model", str(olmo2), *argv, str(tmp_path / "folder.safetensors")])
    for name, tensor in load_file(tmp_path / "hub.safetensors").items():
        assert tensor.equal(load_file(tmp_path / "folder.safetensors")[name])


def put_glotlid(words):
    """A fastText model in GlotLID's place, which knows English and Nepali by the first words of
    TEXT.
    """
    import fasttext

    folder = HUB / "models" / chat_eval.GLOTLID[0]
    folder.mkdir(parents=True)
    lines = [
        f"__label__{'npi_Deva' if i in (2, 3) else 'eng_Latn'} "
        f"{' '.join(text.split()[j : j + words])}\n"
        for i, text in enumerate(TEXT)
        for j in range(4)
    ] * 20
    (folder / "text").write_text("".join(lines), encoding="utf-8")
    model = fasttext.train_supervised(
        str(folder / "text"), dim=8, lr=0.3, minn=2, maxn=3, thread=1, verbose=0
    )
    model.save_model(str(folder / chat_eval.GLOTLID[1]))
    return model


def test_code_mixed_answers_are_counted_and_written_for_the_judge(served, llama, tmp_path, capsys):
    lid = put_glotlid(words=4)
    english, nepali = (
        chat_eval.english_confidence("glotlid", "ne"),
        chat_eval.english_confidence("script", "ne"),
    )
    assert english(TEXT[0]) > 0.9 > 0.1 > english(TEXT[2]) and english("— 3 …") is None
    assert (
        nepali("नेपाल abc") == 3 / 6 and nepali("12") is None
    )  # its vowel signs are marks, not letters
    write_jsonl(tmp_path / "data/en/ae2.jsonl", [{"instruction": text} for text in TEXT])
    out = tmp_path / "fft/chat.json"
    argv = [
        "--model",
        str(llama),
        "--lang",
        "ne",
        "--data-dir",
        str(tmp_path / "data"),
        "--out",
        str(out),
        "--tasks",
        "codemix",
        "--runs",
        "2",
        "--num-questions",
        "3",
    ]
    chat_eval.main(argv)
    answers = [json.loads((out.parent / f"chat.ae2-{run}.json").read_text()) for run in range(2)]
    assert answers[0] != answers[1]
    for found in answers:
        assert [row["instruction"] for row in found] == TEXT[:3] and found[0]["generator"] == str(
            llama
        )
    outputs = [" ".join(row["output"].split()) for found in answers for row in found]
    outputs = [text for text in outputs if any(c.isalpha() for c in text)]
    expected = [
        dict(zip(*lid.predict(text, k=2), strict=True))["__label__eng_Latn"] < 0.9
        for text in outputs
    ]
    result = json.loads(out.read_text())["results"]["codemix"]["source"]
    assert result == {"share": sum(expected) / len(expected), "n": len(outputs)}

    shutil.rmtree(HUB / "models")
    shutil.rmtree(HUB / "home/hub")
    capsys.readouterr()
    for more, message in (
        ([], "the hub did not give cis-lmu/glotlid"),
        (["--lang", "ha", "--language-id", "script"], "ha and English share a script"),
    ):
        with pytest.raises(SystemExit) as stopped:
            chat_eval.main([*argv[:6], "--out", str(tmp_path / "other.json"), *argv[8:], *more])
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and message in line


def test_without_lm_eval_the_message_names_it(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(SystemExit) as stopped:
        chat_eval.main(
            [
                "--model",
                str(llama),
                "--lang",
                "ne",
                "--data-dir",
                str(tmp_path),
                "--tasks",
                "gsm8k",
                "--out",
                str(tmp_path / "eval.json"),
            ]
        )
    assert (
        stopped.value.code == 2 and "pip install 'lm-eval[hf,ifeval]==" in capsys.readouterr().err
    )


def test_lm_eval_is_asked_as_in_the_paper():
    """Section 4.5's shots, the strict metrics, Table 9's decoding."""
    assert chat_eval.HARNESS == {
        "ifeval": ("leaderboard_ifeval", 0, "prompt_level_strict_acc", "none"),
        "gsm8k": ("gsm8k", 5, "exact_match", "strict-match"),
    }
    assert evaluate.CHAT_SAMPLING == dict(
        do_sample=True, temperature=0.8, top_k=40, top_p=0.8, repetition_penalty=1.1
    )


@pytest.mark.slow
def test_gsm8k_and_ifeval_are_those_of_lm_eval(served, tmp_path, monkeypatch):
    put_harness_data(served, tmp_path, monkeypatch)
    model = tiny_model(
        tmp_path / "model", max_position_embeddings=2048
    )  # IFEval may take 1,280 tokens
    command = [
        sys.executable,
        ROOT / "evaluate.py",
        "--model",
        model,
        "--lang",
        "ne",
        "--data-dir",
        tmp_path,
        "--tasks",
        "ifeval,gsm8k",
        "--runs",
        "2",
        "--num-questions",
        "3",
        "--out",
        tmp_path / "eval.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "eval.json").read_text())["results"]
    items = [
        json.loads(line) for line in (tmp_path / "eval.items.jsonl").read_text().splitlines()[1:]
    ]
    assert [(r["task"], r["run"], len(r["samples"])) for r in items] == [
        (task, run, 3) for task in ("ifeval", "gsm8k") for run in (0, 1)
    ]
    for record in items[:2]:
        for sample in record["samples"]:
            words = re.findall(r"\w+", sample["prediction"].lower())
            assert sample["prompt"].count("<|im_start|>") == 2 and sample["correct"] == float(
                "e" not in words
            )
        assert (
            found["ifeval"]["source"]["runs"][record["run"]]
            == sum(s["correct"] for s in record["samples"]) / 3
        )
    assert items[0]["samples"] != items[1]["samples"]
    (first, *_) = items[2]["samples"]
    assert (
        first["prompt"].count("<|im_start|>assistant\nIt is ") == 5
        and "What is 0 + 2?" in first["prompt"]
    )

    shutil.rmtree(
        served / "openai"
    )  # what was fetched is there, and what is done is not done again
    again = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert (
        again.returncode == 0
        and "gsm8k source, run 1: lm-eval's questions, 0 of 1 batches to do" in again.stdout
    )


@pytest.mark.slow
def test_smollm2_scores_as_lm_eval_and_sacrebleu_do(tmp_path):
    """Letters and options by lm-eval's own scoring of the saved prompts, chrF++ by sacrebleu's
    command.
    """
    subprocess.run(
        [sys.executable, ROOT / "data/prepare_embedded.py", "--out", tmp_path, "--lang", "ne"],
        check=True,
    )
    for lang in ("en", "ne"):  # each subject's first questions become examples
        path, shots, seen = tmp_path / lang / "mmlu.test.jsonl", [], Counter()
        for row in map(json.loads, path.read_text().splitlines()):
            seen[row["subject"]] += 1
            shots += [row] * (seen[row["subject"]] <= 5)
        write_jsonl(tmp_path / lang / "mmlu.dev.jsonl", shots)
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "evaluate.py",
            "--model",
            tmp_path / "model",
            "--lang",
            "ne",
            "--data-dir",
            tmp_path,
            "--tasks",
            "mcq,mt,mmlu",
            "--num-samples",
            "16",
            "--num-questions",
            "16",
            "--greedy",
            "--max-new-tokens",
            "16",
            "--dtype",
            "float32",
            "--out",
            tmp_path / "eval.json",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    items = [
        json.loads(line) for line in (tmp_path / "eval.items.jsonl").read_text().splitlines()[1:]
    ]

    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(tmp_path / "model"), dtype="float32", device="cpu", batch_size=1)
    right = Counter()
    kinds = ("mcq", "source"), ("mmlu", "source"), ("mmlu", "target")
    for record in [r for r in items if (r["task"], r["side"]) in kinds]:
        options = [*"ABCD"] if record["task"] == "mmlu" else record["options"]
        # lm-eval scores the line break before an answer with the answer, and not the prompt's
        # first token
        prompt, line = (
            record["prompt"].rstrip("\n"),
            record["prompt"][len(record["prompt"].rstrip("\n")) :],
        )
        asked = [(prompt, line), *((prompt, line + option) for option in options)]
        before, *found = (
            nats
            for nats, _ in lm.loglikelihood(
                [Instance("loglikelihood", {}, arguments, 0) for arguments in asked],
                disable_tqdm=True,
            )
        )
        assert [nats - before for nats in found] == pytest.approx(
            record["scores"]["loglik"], abs=2e-3
        )
        lengths = [len(option) if record["task"] == "mcq" else 1 for option in options]
        scores = [(nats - before) / n for nats, n in zip(found, lengths, strict=True)]
        right[record["task"], record["side"]] += (
            "ABCD"[scores.index(max(scores))] == record["reference"]
        )
    assert {kind: right[kind] / 16 for kind in kinds} == {
        (task, side): results[task][side]["accuracy"] for task, side in kinds
    }
    for side in ("source", "target"):
        chosen = [r for r in items if r["task"] == "mt" and r["side"] == side]
        for name in ("prediction", "reference"):
            (tmp_path / name).write_text("".join(r[name] + "\n" for r in chosen))
        command = [
            sys.executable,
            "-m",
            "sacrebleu",
            tmp_path / "reference",
            "-i",
            tmp_path / "prediction",
            "-m",
            "chrf",
            "--chrf-word-order",
            "2",
            "-w",
            "6",
            "-b",
        ]
        for more, key in (([], "chrf_corpus"), (["--sentence-level"], "chrf")):
            printed = subprocess.run(
                [*command, *more], capture_output=True, text=True
            ).stdout.split()
            assert sum(map(float, printed)) / len(printed) == pytest.approx(
                results["mt"][side][key], abs=1e-5
            )
