"""tools/plan.py: memory against published counts, and what a run needs against the stand-in hub."""

import json
import os
import re
import shutil
import subprocess
import sys
import types

import huggingface_hub
import pytest
import torch
from conftest import ROOT, tiny_model
from hub import HUB, REQUESTS
from paper_hub import (  # noqa: F401
    MADLAD,
    paper_sets,
    put_glotlid,
    put_harness_data,
    put_madlad,
    put_tulu,
    served,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Olmo2Config

from data import prepare_paper
from tools import plan


@pytest.fixture(scope="module")
def olmo2_7b():
    """OLMo-2 7B's shapes, on the meta device."""
    config = Olmo2Config(
        vocab_size=100352,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_state_of_a_7b_model_is_what_counting_gives(olmo2_7b):
    half = plan.trainable_fractions(olmo2_7b, None, 0.5)
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    rest = 2 * 100352 * 4096 + (32 * 4 + 1) * 4096
    assert sum(dict(olmo2_7b.named_parameters())[name].numel() for name in half) == linear
    assert plan.state_bytes(olmo2_7b, "bf16") == 16 * (linear + rest)
    assert plan.state_bytes(olmo2_7b, "bf16-true") == 12 * (linear + rest)
    assert plan.state_bytes(olmo2_7b, "bf16", half) == 10 * linear + 16 * rest
    assert plan.state_bytes(olmo2_7b, "bf16-true", half) == 8 * linear + 12 * rest
    assert plan.state_bytes(olmo2_7b, "fp32", half) == 12 * linear + 16 * rest
    assert plan.state_bytes(olmo2_7b, "bf16") / 1e9 == pytest.approx(116.8, abs=0.05)
    assert plan.state_bytes(olmo2_7b, "bf16", half) / 1e9 == pytest.approx(77.9, abs=0.05)


def test_a_7b_model_fits_80_gb_compact_in_bf16_and_141_gb_masked(olmo2_7b):
    half = plan.trainable_fractions(olmo2_7b, None, 0.5)

    def size(gpu, precision, fractions):
        free = gpu * 1e9 - plan.state_bytes(olmo2_7b, precision, fractions)
        return plan.largest_micro_batch(olmo2_7b, precision, bool(fractions), free, True)

    assert size(80, "bf16-true", half) >= 4
    assert size(80, "bf16-true", None) == 0
    assert size(141, "bf16-true", None) >= 4
    assert size(80, "bf16", half) == 0
    assert size(141, "bf16", half) >= 4


@pytest.mark.parametrize("precision", ["bf16", "bf16-true"])
@pytest.mark.parametrize("kind, most", [("olmo2", 1.15), ("llama", 2.2)])
def test_a_layer_keeps_what_the_formula_says(kind, most, precision, tmp_path):
    """Count what autograd saves for one more layer and 128 more tokens."""
    saved = {}
    hidden = 128
    for layers in (1, 2):
        tiny_model(
            tmp_path / f"{layers}",
            kind,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
        )
        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{layers}", dtype=dtype)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for tokens in (128, 256):
            kept = {}

            def pack(tensor, kept=kept, weights=weights):
                if tensor.untyped_storage().data_ptr() not in weights:
                    kept[tensor.untyped_storage().data_ptr()] = tensor
                return tensor

            autocast = torch.autocast(
                "cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
            )
            with torch.autograd.graph.saved_tensors_hooks(pack, torch.Tensor.clone), autocast:
                ids = torch.zeros(1, tokens, dtype=torch.long)
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
            saved[layers, tokens] = sum(t.untyped_storage().nbytes() for t in kept.values())
    layer = (saved[2, 256] - saved[1, 256]) - (saved[2, 128] - saved[1, 128])
    formula = 128 * (50 * hidden + 8 * 3 * hidden)
    assert layer <= formula * 1.05
    assert formula <= layer * most


def test_recomputation_needs_less_and_more_tokens_need_more(olmo2_7b):
    def needed(tokens, recompute):
        return plan.activation_bytes(olmo2_7b, "bf16", False, tokens, recompute)

    assert needed(2048, True) < needed(2048, False)
    assert needed(4096, True) > needed(2048, True)
    # The logits of a whole micro-batch and their gradients exist at once.
    assert needed(16384, True) > 12 * 16384 * 100352


def test_a_mask_decides_which_matrices_are_compact(olmo2, tmp_path, capsys):
    model = plan.load_skeleton(olmo2)
    name = "model.layers.0.self_attn.q_proj.weight"
    mask = torch.zeros(1, 32, dtype=torch.uint8)
    mask[0, :8] = 1
    path = tmp_path / "mask.safetensors"
    save_file({name: mask}, path, {"format": "ssu-mask"})
    assert plan.trainable_fractions(model, path, 0.5) == {name: 0.25}
    assert plan.main(["--model", str(olmo2), "--mask", str(path)]) == 0
    assert "| compact, bf16-true | 0.0 | 32 / 32 |" in capsys.readouterr().out
    save_file({"other": mask}, path, {"format": "ssu-mask"})
    with pytest.raises(SystemExit) as stopped:
        plan.main(["--model", str(olmo2), "--mask", str(path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "made for another model" in line


def test_plan_says_what_does_not_fit(paper_sets, tmp_path, monkeypatch, capsys):
    put_harness_data(paper_sets, tmp_path, monkeypatch)
    put_glotlid(words=4)
    put_tulu(paper_sets)
    put_madlad(paper_sets, "ig", [f"{i}" for i in range(300)])
    argv = ["--lang", "ig", "--model", "someone/tiny", "--steps", "10", "--runs", str(tmp_path)]
    argv += ["--tasks", "mt", "ifeval", "gsm8k", "codemix", "--data-dir", str(tmp_path / "data")]
    assert plan.main(argv) == 0
    out = capsys.readouterr().out
    count = sum(
        tensor.numel()
        for tensor in load_file(HUB / "models/someone/tiny/model.safetensors").values()
    )
    assert (
        f"2 models of {count:,} parameters, 163,840 tokens each" in out
        and "not to be had" not in out
    )
    assert (
        plan.main([*argv, "--compact", "1"]) == 0
        and "fft cannot be compact" in capsys.readouterr().out
    )
    sizes = sum(f.stat().st_size for f in (paper_sets / MADLAD / "data/ig").glob("*_clean_*"))
    assert f"{MADLAD:<36} {sizes / 1e9:8.3f} GB" in out
    assert not [
        path for _, path, _ in REQUESTS if "/resolve/" in path and not path.endswith(".json")
    ]

    config = json.loads((HUB / "models/someone/tiny/config.json").read_text())
    large = config | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 2000}
    (HUB / "models/someone/large").mkdir()
    (HUB / "models/someone/large/config.json").write_text(json.dumps(large))
    (HUB / "models/someone/large/model.safetensors").write_bytes(b"weights")
    argv[argv.index("someone/tiny")] = "someone/large"
    assert plan.main([*argv, "--flores", "gated"]) == 2
    problems = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("does not fit: ")
    ]
    assert len(problems) == 3
    assert all(
        word in line
        for word, line in zip(("flores_plus", "disk", "training takes"), problems, strict=True)
    )
    argv[argv.index("someone/large")] = "someone/nothing"
    assert plan.main(argv) == 2
    (problem,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("does not fit: ")
    ]
    assert "someone/nothing: is there" in problem and "HF_TOKEN" in problem


def test_plan_counts_one_disk_once_and_what_is_there_not_at_all(
    paper_sets, tmp_path, monkeypatch, capsys
):
    put_tulu(paper_sets)
    put_madlad(paper_sets, "ig", [f"{i}" for i in range(300)])
    argv = ["--lang", "ig", "--model", "someone/tiny", "--steps", "10"]
    argv += ["--runs", str(tmp_path / "runs"), "--data-dir", str(tmp_path / "data")]
    argv += ["--tasks", "mt", "ae2", "codemix"]

    def planned(*more):
        code, out = plan.main([*argv, *more]), capsys.readouterr().out
        (said,) = re.findall(r"disk: ([\d.]+) GB", out)
        return code, out, float(said)

    assert planned()[0] == 2  # GlotLID cannot be had, and --language-id script needs none
    argv += ["--language-id", "script", "--methods", *["fft"] * 100_000]
    with open(paper_sets / MADLAD / "data/ig/ig_clean_0009.jsonl.gz", "wb") as file:
        file.truncate(3 * 10**9)
    code, out, said = planned()
    assert code == 0 and "glotlid" not in out
    count = sum(
        tensor.numel()
        for tensor in load_file(HUB / "models/someone/tiny/model.safetensors").values()
    )
    assert said == pytest.approx((4 * 3e9 + 4 * count * 100_000) / 1e9, abs=0.2) and said > 20
    (tmp_path / "runs").mkdir()
    with open(tmp_path / "runs/state.safetensors", "wb") as file:
        file.truncate(5 * 10**9)
    assert planned()[2] == pytest.approx(said - 5, abs=0.11)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: types.SimpleNamespace(free=15 * 10**9))
    code, out, _ = planned()  # downloads alone would fit, and so would the models
    assert code == 2 and out.count("does not fit: the disk at") == out.count("does not fit:") == 1


def test_offline_the_plan_asks_the_caches(paper_sets, tmp_path):
    put_madlad(paper_sets, "ig", [f"{i}" for i in range(30)])
    planning = [sys.executable, ROOT / "tools/plan.py", "--lang", "ig", "--model", "someone/tiny"]
    planning += ["--data-dir", tmp_path / "data", "--steps", "10", "--runs", tmp_path / "runs"]
    planning += ["--tasks", "mt", "--calibration", "x"]
    offline = dict(capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "true"})
    done = subprocess.run(planning, **offline)
    problems = [line for line in done.stdout.splitlines() if line.startswith("does not fit: ")]
    assert (
        done.returncode == 2
        and len(problems) == 8
        and all("not in the caches" in line for line in problems)
    )
    prepare_paper.main(["ig", "--model", "someone/tiny", "--out", str(tmp_path / "data")])
    huggingface_hub.snapshot_download(
        MADLAD, repo_type="dataset", revision=plan.MADLAD_COMMIT, allow_patterns="*_clean_*"
    )
    huggingface_hub.snapshot_download("someone/tiny")
    done = subprocess.run(planning, **offline)
    assert done.returncode == 0 and done.stdout.count(" in the cache\n") == 2, done.stdout
