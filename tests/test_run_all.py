"""The driver: a small end-to-end run of the real scripts through run_all.sh, and its refusals."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TEXT, tiny_model, write_jsonl


def run_all(*argv, **environment):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", "run_all.sh", *argv], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": path, **environment})


@pytest.mark.parametrize("argv", [[], ["xx"], ["english"]])
def test_usage_names_the_five_languages(argv):
    done = run_all(*argv)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert all(name in done.stderr for name in ("usage", "ne ", "ky ", "am ", "ha ", "ig "))


@pytest.mark.parametrize("setting,value", [
    ("METHODS", "fft ssu-best"), ("STEPS", "many"), ("SEED", "-1"), ("RATIO", "2"), ("MODEL", "./nowhere"),
    ("DATA_DIR", "nowhere"), ("MODEL", "with spaces")])
def test_bad_settings_are_refused_before_anything_is_deleted(setting, value, folder, tmp_path):
    settings = dict(RUNS=str(tmp_path), MODEL=str(folder / "model"), DATA_DIR=str(folder / "data")) | {setting: value}
    kept = tmp_path / "ne/source/eval.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("of an earlier run")
    done = run_all("ne", **settings)
    assert done.returncode == 2 and value.split()[-1] in done.stderr and len(done.stderr.splitlines()) == 1
    assert kept.read_text() == "of an earlier run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a data folder in the layout of data/embedded, all tiny."""
    root = tmp_path_factory.mktemp("all")
    tiny_model(root / "model", "llama")
    chats = [{"messages": [{"role": "user", "content": f"{TEXT[i % 5]} {i}?"},
                           {"role": "assistant", "content": TEXT[(i + 1) % 5]}]} for i in range(30)]
    items = [{"sample_id": f"{i}", "subject": "s", "question": f"{i}?", "option_a": "a", "option_b": "bb",
              "option_c": "c", "option_d": "dd", "answer": "ABCD"[i % 4]} for i in range(8)]
    pairs = [{"id": f"{i}", "eng_Latn": TEXT[0], "npi_Deva": TEXT[2]} for i in range(4)]
    for name, rows in {"en/calibration": chats, "en/heldout": chats[:6], "en/mmlu.test": items, "ne/mmlu.test": items,
                       "ne/train": [{"text": f"{TEXT[i % 5]} {i}"} for i in range(60)], "ne/flores.dev": pairs,
                       "ne/heldout": [{"text": text} for text in TEXT] * 2, "ne/flores.devtest": pairs}.items():
        write_jsonl(root / "data" / f"{name}.jsonl", rows)
    return root


def test_end_to_end_then_nothing_left_to_do_then_only_what_changed(folder):
    settings = dict(MODEL=str(folder / "model"), DATA_DIR=str(folder / "data"), RUNS=str(folder / "runs"), STEPS="2",
                    METHODS="ssu-wanda")
    done = run_all("ne", **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    run = folder / "runs/ne"
    for name in ("scores-wanda.safetensors", "ssu-wanda/mask.safetensors", "ssu-wanda/model/model.safetensors",
                 "ssu-wanda/train.jsonl", "ssu-wanda/eval.json", "source/eval.json", "report.md"):
        assert (run / name).is_file(), name
    assert "SSU-Wanda" in done.stdout and "SSU-Wanda" in (run / "report.md").read_text()
    assert json.loads((run / "ssu-wanda/eval.json").read_text())["format"] == "ssu-eval"

    again = run_all("ne", **settings)
    assert again.returncode == 0 and again.stdout.count("done before:") == 5 and "\n+ " not in again.stdout

    (folder / "data/ne/train.jsonl").write_text((folder / "data/ne/train.jsonl").read_text() + '{"text": "more"}\n')
    changed = run_all("ne", **settings)
    assert changed.returncode == 0, changed.stderr[-3000:]
    assert changed.stdout.count("done before:") == 2  # the scores and the mask; training and evaluations are made anew
