"""The four stages and the report on a tiny random model, with the commands of the README."""

import json

from conftest import TEXT, write_jsonl
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import evaluate
import make_mask
import score
import train
from tools import report


def test_from_text_to_report(llama, text, chats, tmp_path):
    data, run = tmp_path / "data", tmp_path / "runs/ne"
    scores, mask = run / "scores-wanda.safetensors", run / "ssu-wanda/mask.safetensors"
    model = run / "ssu-wanda/model"
    write_jsonl(data / "en/heldout.jsonl", [json.loads(chats.read_text().splitlines()[0])] * 3)
    write_jsonl(data / "ne/heldout.jsonl", [{"text": line} for line in TEXT])

    def command(main, *argv):
        main([str(a) for a in argv])

    command(
        score.main,
        *("--model", llama, "--data", chats, "--out", scores),
        *("--num-samples", 4, "--seq-len", 64),
    )
    command(make_mask.main, "--scores", scores, "--out", mask)
    command(
        train.main,
        *("--model", llama, "--data", text, "--mask", mask, "--out", run / "ssu-wanda"),
        *("--steps", 3, "--batch-size", 4, "--micro-batch-size", 2, "--seq-len", 32),
        *("--lr", 1e-3, "--precision", "fp32", "--device", "cpu"),
    )
    shared = ("--lang", "ne", "--tasks", "bpb", "--data-dir", data)
    command(evaluate.main, "--model", llama, *shared, "--out", run / "source/eval.json")
    command(evaluate.main, "--model", model, *shared, "--out", run / "ssu-wanda/eval.json")
    command(report.main, run)

    # The frozen columns are those of the source model, bit for bit, and the others moved.
    source = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    trained, masks = AutoModelForCausalLM.from_pretrained(model).state_dict(), load_file(mask)
    with safe_open(mask, "pt") as file:
        assert file.metadata()["ratio"] == "0.5"
    for name, update in masks.items():
        frozen = update.expand(source[name].shape) == 0
        assert frozen.any() or update.dim() == 1
        assert trained[name][frozen].equal(source[name][frozen])
        assert not trained[name][~frozen].equal(source[name][~frozen]) or update.dim() == 1
    assert "SSU-Wanda" in (run / "report.md").read_text()
