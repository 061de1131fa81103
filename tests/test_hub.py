"""Data and models of the hub, through its real clients, against the stand-in of hub.py."""

import os
import re
import shutil

import numpy as np
import pytest
from conftest import TEXT, forked
from hub import COMMIT, HUB, REQUESTS
from paper_hub import put_madlad, put_parquet, put_tulu, served  # noqa: F401
from safetensors.torch import load_file
from test_distributed import distance, finished, quick, start_ranks  # noqa: F401
from test_train import arguments, stop_after_saving, weights
from transformers import AutoTokenizer

import score
import train
from data import blocks, calibration

TULU, ALPACA, MADLAD = "allenai/tulu-3-sft-olmo-2-mixture", "tatsu-lab/alpaca", "allenai/MADLAD-400"


def test_alpaca_reads_as_the_authors_format_it(served, olmo2):
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
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    tokens = calibration.calibration_tokens("alpaca", tokenizer, 5, 32, 0)
    read = tokenizer.decode(tokens.flatten().tolist())
    first = re.search(r"Add (\d+)", read).group()
    question = first + ("\n\nInput: 3" if int(first[4:]) % 2 else "")
    chat = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    assert read.startswith(chat)
    revision = calibration.PRESETS["alpaca"][1]
    assert any(f"/resolve/{revision}/" in path for _, path, _ in REQUESTS)


@pytest.mark.parametrize("what", ["missing", "gated"])
def test_a_data_set_that_the_hub_does_not_give_is_one_line(what, served, olmo2, tmp_path, refused):
    stages = ((TULU, score.main, "tulu"), (MADLAD, train.main, "madlad:ky"))
    for repo, main, data in stages:
        if what == "gated":
            put_tulu(served) if repo == TULU else put_madlad(served, "ky", TEXT)
            (served / repo / ".gated").touch()
        argv = ["--model", olmo2, "--data", data, "--seq-len", "64", "--out", tmp_path / "out"]
        assert repo in refused(main, *argv)
        assert not list(tmp_path.iterdir())


def madlad(lang):
    return blocks.load_documents("--data", f"madlad:{lang}", None, "key")["text"][:]


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
    assert len(gets) == 2 and all(
        "_clean_" in path and blocks.MADLAD_REVISION in path for path in gets
    )
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


def test_a_model_of_the_hub_is_trained_and_resumed_by_its_commit(served, olmo2, text, tmp_path):
    """The killed run begins before the weights are in the cache, and its end after that."""
    folder = shutil.copytree(olmo2, HUB / "models/someone/other")
    argv = arguments("someone/other", text, tmp_path / "out", "--save-every", 10)
    pid = forked(train.main, argv, stop_after_saving)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    train.main([*argv, "--resume"])
    saved = tmp_path / "out/model/generation_config.json"
    assert saved.read_bytes() == (folder / "generation_config.json").read_bytes()
    card = (tmp_path / "out/model/README.md").read_text()
    assert f"| someone/other, commit {COMMIT} |" in card and "base_model: someone/other" in card


def test_ranks_read_a_model_of_the_hub(served, olmo2, text, tmp_path, quick):
    shutil.copytree(olmo2, HUB / "models/someone/third")
    more = ["--steps", "3", "--micro-batch-size", "1"]
    for process in start_ranks(quick, 2, *arguments("someone/third", text, tmp_path / "a", *more)):
        finished(process)
    train.main(arguments(olmo2, text, tmp_path / "b", *more))
    assert distance(weights(tmp_path / "a"), weights(tmp_path / "b")) < 1e-4
