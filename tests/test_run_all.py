"""The driver: a small end-to-end run of the real scripts through run_all.sh, and its refusals."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TEXT, tiny_model, write_jsonl
from safetensors import safe_open


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
    ("METHODS", "fft ssu-best"), ("PROFILE", "large"), ("STEPS", "many"), ("SEED", "-1"), ("RATIOS", "0.5 2"),
    ("PRECISION", "int8"), ("CALIBRATION", "nowhere"), ("NUM_SAMPLES", "0"), ("TASKS", "bpb,mtt"),
    ("MODEL", "./nowhere"), ("DATA_DIR", "nowhere"), ("MODEL", "with spaces"), ("LANGUAGE_ID", "nonsense")])
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
    tiny_model(root / "model", "llama", intermediate_size=96)  # 1.5% of its channels is one
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
    data = shutil.copytree(folder / "data", folder / "changing")
    settings = dict(MODEL=str(folder / "model"), DATA_DIR=str(data), RUNS=str(folder / "runs"), STEPS="2",
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

    (data / "ne/train.jsonl").write_text((data / "ne/train.jsonl").read_text() + '{"text": "more"}\n')
    (data / "ne/mmlu.test.jsonl").unlink()
    changed = run_all("ne", TASKS="bpb", COMPACT="1", **settings)
    assert changed.returncode == 0, changed.stderr[-3000:]
    assert json.loads((run / "source/eval.json").read_text())["results"].keys() == {"bpb"}
    log = [json.loads(line) for line in (run / "ssu-wanda/train.jsonl").read_text().splitlines()]
    assert log[0]["settings"]["compact"] and log[-1]["summary"]["frozen_verified"] > 0
    assert changed.stdout.count("done before:") == 2  # the scores and the mask; training and evaluations are made anew


@pytest.mark.slow
def test_every_method_by_name_and_two_ratios(folder):
    settings = dict(MODEL=str(folder / "model"), DATA_DIR=str(folder / "data"), RUNS=str(folder / "every"), STEPS="4")
    everything = ("fft adalora hft gmt ssu-rand ssu-mag ssu-wanda ssu-sparsegpt ssu-fim ssu-wanda-row "
                  "ssu-wanda-element lota-90 lota-50 s2ft-down s2ft-down-output")
    done = run_all("ne", METHODS=everything, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    run = folder / "every/ne"
    for method in everything.split():
        assert json.loads((run / method / "eval.json").read_text())["format"] == "ssu-eval"
    masks = {path.parent.name: safe_open(path, "np").metadata() for path in run.glob("*/mask.safetensors")}
    assert set(everything.split()) - masks.keys() == {"fft", "adalora", "gmt"}
    assert {m: masks[m]["ratio"] for m in ("lota-90", "lota-50", "s2ft-down", "hft", "ssu-fim")} == {
        "lota-90": "0.9", "lota-50": "0.5", "s2ft-down": "0.985", "hft": "0.5", "ssu-fim": "0.5"}
    assert masks["lota-90"]["freeze"] == "lowest"
    assert {m: (masks[m]["method"], masks[m]["axis"]) for m in masks} == {
        "hft": ("hft", "module"), "ssu-rand": ("random", "column"), "ssu-mag": ("magnitude", "column"),
        "ssu-wanda": ("wanda", "column"), "ssu-sparsegpt": ("sparsegpt", "column"), "ssu-fim": ("fim", "column"),
        "ssu-wanda-row": ("wanda", "row"), "ssu-wanda-element": ("wanda", "element"), "lota-90": ("delta", "element"),
        "lota-50": ("delta", "element"), "s2ft-down": ("s2ft-down", "column"),
        "s2ft-down-output": ("s2ft-down-output", "column")}
    methods = {m: json.loads((run / m / "train.jsonl").read_text().splitlines()[0])["settings"] for m in
               ("fft", "gmt", "adalora")}
    assert {m: (s["adalora"], s["gmt_ratio"], s["mask"]) for m, s in methods.items()} == {
        "fft": (False, None, None), "gmt": (False, 0.5, None), "adalora": (True, None, methods["adalora"]["mask"])}
    log = [json.loads(line) for line in (run / "lota-calibration/train.jsonl").read_text().splitlines()]
    assert log[0]["settings"]["steps"] == 100

    ratios = run_all("ne", METHODS="gmt lota ssu-wanda", RATIOS="0.25 0.5", **settings)
    assert ratios.returncode == 0, ratios.stderr[-3000:]
    assert safe_open(run / "ssu-wanda@0.25/mask.safetensors", "np").metadata()["ratio"] == "0.25"
    assert safe_open(run / "lota@0.25/mask.safetensors", "np").metadata()["ratio"] == "0.25"
    gmt = json.loads((run / "gmt@0.25/train.jsonl").read_text().splitlines()[0])["settings"]
    assert gmt["gmt_ratio"] == 0.25 and gmt["batch_size"] == 4 * gmt["micro_batch_size"]
    assert "done before: " + str(run / "ssu-wanda/model") in ratios.stdout
    assert "| GMT 0.25 " in (run / "report.md").read_text()
