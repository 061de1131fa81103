"""score.py against an independent float64 reference, and what it refuses."""

import json
import os
import shutil

import pytest
import torch
from conftest import (
    MODELS,
    SIZES,
    TEXT,
    forked,
    limit_file_size,
    tiny_model,
    tiny_tokenizer,
    write_jsonl,
)
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import make_mask
import score


def run(model, data, out, *extra):
    text = [] if "random" in extra or "magnitude" in extra else ["--data", str(data)]
    score.main(
        [
            "--model",
            str(model),
            "--out",
            str(out),
            "--num-samples",
            "6",
            "--seq-len",
            "64",
            "--batch-size",
            "4",
            *text,
            *extra,
        ]
    )
    return load_file(out)


def reference_rmsnorm(x, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def reference(folder, tokens):
    """Wanda column scores in float64, from the equation, with the inputs of every module captured
    by forward hooks.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda m, args, out, name=name: (
                seen.setdefault(name, []).append(args[0].detach()) if args else None
            )
        )
    with torch.no_grad():
        for row in tokens:
            model(input_ids=row[None], use_cache=False)
    scores = {}
    for name, p in model.named_parameters():
        module_name = name.rsplit(".", 1)[0]
        if "embed_tokens" in name or "lm_head" in name:
            continue
        x = torch.cat([x.flatten(0, -2) for x in seen[module_name]])
        if name.endswith("bias"):
            x = torch.ones(len(x), len(p), dtype=torch.float64)
        elif p.dim() == 1:
            x = reference_rmsnorm(x, model.config.rms_norm_eps)
        s = p.detach().abs() * x.pow(2).sum(0).sqrt()  # [d_out, d_in] or [d]
        scores[name] = s.sum(0) if p.dim() == 2 else s
    return scores


@pytest.mark.parametrize("kind", MODELS)
def test_wanda_equals_float64_reference(kind, chats, tmp_path):
    folder = tiny_model(tmp_path / kind, kind)
    scores = run(folder, chats, tmp_path / "scores.safetensors")
    tokens = score.calibration_tokens(chats, AutoTokenizer.from_pretrained(folder), 6, 64, 42)
    expected = reference(folder, tokens)
    assert set(scores) == set(expected)
    for name, value in expected.items():
        assert scores[name].dtype == torch.float32
        assert ((scores[name] - value).abs() / value).max() < 1e-5, name


def test_calibration_is_packed_shuffled_and_templated(olmo2, chats):
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    tokens = score.calibration_tokens(chats, tokenizer, 5, 50, seed=1)
    assert tokens.shape == (5, 50)
    text = tokenizer.decode(tokens.flatten())
    assert text.startswith("<|im_start|>user\n") and "<|im_end|>\n<|im_start|>assistant\n" in text
    assert torch.equal(tokens, score.calibration_tokens(chats, tokenizer, 5, 50, seed=1))
    assert not torch.equal(tokens, score.calibration_tokens(chats, tokenizer, 5, 50, seed=2))


def test_instruction_rows_become_chats(olmo2):
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    ids = score.row_ids(
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "unused"}, tokenizer
    )
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nAdd.\n\nInput: 1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    )


def test_magnitude_and_random(olmo2, chats, tmp_path):
    magnitude = run(olmo2, chats, tmp_path / "m.safetensors", "--method", "magnitude")
    model = AutoModelForCausalLM.from_pretrained(olmo2, dtype=torch.float32)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(magnitude[name], model.get_parameter(name).abs().sum(0))
    a, b, c = (
        run(olmo2, chats, tmp_path / f"{i}.safetensors", "--method", "random", "--seed", seed)
        for i, seed in enumerate("778")
    )
    assert all(torch.equal(a[n], b[n]) and not torch.equal(a[n], c[n]) for n in a)
    assert not torch.equal(a["model.layers.0.mlp.down_proj.weight"], a[name])


@pytest.mark.parametrize("kind", ["olmo2", "llama"])
def test_sparsegpt_is_the_mean_square_of_the_inputs(kind, chats, tmp_path):
    """E[x_j^2] in float64, from the inputs that forward hooks captured: ||X_j||^2 of |theta| = 1
    over the tokens.
    """
    folder = tiny_model(tmp_path / kind, kind)
    scores = run(folder, chats, tmp_path / "s", "--method", "sparsegpt")
    elements = run(folder, chats, tmp_path / "e", "--method", "sparsegpt", "--axis", "element")
    tokens = score.calibration_tokens(chats, AutoTokenizer.from_pretrained(folder), 6, 64, 42)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, wanda in reference(folder, tokens).items():
        p = model.get_parameter(name).abs()
        x = wanda / (p.sum(0) if p.dim() == 2 else p)  # ||X_j||_2
        expected = x.square() / tokens.numel()
        assert torch.allclose(elements[name].double(), expected.expand(p.shape), rtol=1e-4), name
        assert torch.allclose(
            scores[name].double(), expected * (len(p) if p.dim() == 2 else 1), rtol=1e-4
        ), name


@pytest.mark.parametrize("kind", MODELS)
def test_fim_equals_a_loop_over_samples_in_float64(kind, chats, tmp_path):
    folder = tiny_model(tmp_path / kind, kind)
    tokens = score.calibration_tokens(chats, AutoTokenizer.from_pretrained(folder), 6, 64, 42)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    expected = {}
    for sample in tokens:
        model.zero_grad()
        model(input_ids=sample[None], labels=sample[None]).loss.backward()
        for name, p in model.named_parameters():
            expected[name] = expected.get(name, 0) + p.grad.square() / 6
    del expected["model.embed_tokens.weight"]
    expected.pop("lm_head.weight", None)
    for axis, over in (("column", 0), ("row", 1), ("element", None)):
        scores = run(folder, chats, tmp_path / axis, "--method", "fim", "--axis", axis)
        assert scores.keys() == expected.keys()
        for name, s in expected.items():
            s = s.sum(over) if s.dim() == 2 and over is not None else s
            assert torch.allclose(scores[name].double(), s, rtol=1e-3, atol=1e-6 * s.max()), (
                axis,
                name,
            )


def test_fim_never_holds_two_gradients(olmo2, chats, tmp_path, monkeypatch):
    """Each gradient is gone before the next one is squared."""
    model = AutoModelForCausalLM.from_pretrained(olmo2)
    held, along = [], score.along
    monkeypatch.setattr(
        score,
        "along",
        lambda axis, s: (
            held.append(sum(p.grad is not None for p in model.parameters())),
            along(axis, s),
        )[1],
    )
    owners = score.scored_parameters(model)
    score.fisher_scores(model, owners.keys(), torch.randint(0, 400, (2, 16)), "column")
    assert held == [1] * 2 * len(owners)


def test_rows_and_elements_of_wanda(olmo2, chats, tmp_path):
    column, row, element = (
        run(olmo2, chats, tmp_path / axis, "--axis", axis) for axis in ("column", "row", "element")
    )
    for name, s in element.items():
        assert torch.allclose(s.sum(0) if s.dim() == 2 else s, column[name], rtol=1e-5)
        assert torch.allclose(s.sum(1) if s.dim() == 2 else s, row[name], rtol=1e-5)
    assert row["model.layers.0.mlp.down_proj.weight"].shape == (32,)
    drawn = run(olmo2, chats, tmp_path / "r", "--method", "random", "--axis", "row")
    assert all(drawn[name].shape == row[name].shape for name in row)


def test_lota_updates_the_weights_that_went_furthest(olmo2, tmp_path):
    """The mask of --method delta and --freeze lowest is the top of |theta_adapted - theta_source|
    of each matrix.
    """
    adapted = tmp_path / "adapted"
    model = AutoModelForCausalLM.from_pretrained(olmo2)
    source = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    model.save_pretrained(adapted)
    AutoTokenizer.from_pretrained(olmo2).save_pretrained(adapted)
    score.main(
        [
            "--model",
            str(olmo2),
            "--method",
            "delta",
            "--axis",
            "element",
            "--adapted",
            str(adapted),
            "--out",
            str(tmp_path / "s"),
        ]
    )
    with pytest.raises(SystemExit):  # which end to freeze must be said
        make_mask.main(
            ["--scores", str(tmp_path / "s"), "--ratio", "0.9", "--out", str(tmp_path / "m")]
        )
    make_mask.main(
        [
            "--scores",
            str(tmp_path / "s"),
            "--freeze",
            "lowest",
            "--ratio",
            "0.9",
            "--out",
            str(tmp_path / "m"),
        ]
    )
    masks = load_file(tmp_path / "m")
    assert masks.keys() == source.keys() - {"model.embed_tokens.weight", "lm_head.weight"}
    for name, mask in masks.items():
        delta = (model.get_parameter(name) - source[name]).abs().flatten()
        top = delta.topk(len(delta) - int(0.9 * len(delta))).indices
        assert set(mask.flatten().nonzero()[:, 0].tolist()) == set(top.tolist()), name


def test_metadata_and_batch_size_independence(olmo2, chats, tmp_path):
    one = run(olmo2, chats, tmp_path / "a.safetensors", "--batch-size", "1")
    six = run(olmo2, chats, tmp_path / "b.safetensors", "--batch-size", "6")
    assert all(torch.allclose(one[n], six[n], rtol=1e-5) for n in one)
    metadata = safe_open(tmp_path / "a.safetensors", "pt").metadata()
    assert (
        metadata["format"] == "ssu-scores"
        and metadata["version"] == "1"
        and metadata["axis"] == "column"
    )
    assert (
        metadata["num_samples"] == "6"
        and metadata["num_tokens"] == "384"
        and len(metadata["fingerprint"]) == 64
    )
    assert json.loads(metadata["shapes"])["lm_head.weight"] == [400, 32]


def refused(capsys, *argv):
    """Runs score.py, which must exit with 2, and returns its one line of error."""
    with pytest.raises(SystemExit) as error:
        score.main([str(a) for a in argv])
    assert error.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    "make,message",
    [
        (
            lambda f: GPT2LMHeadModel(
                GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=400)
            ).save_pretrained(f),
            "Conv1D",
        ),
        (
            lambda f: MixtralForCausalLM(
                MixtralConfig(vocab_size=400, num_local_experts=2, **SIZES)
            ).save_pretrained(f),
            "MixtralTopKRouter",
        ),
    ],
)
def test_layouts_that_cannot_be_scored_are_refused_by_name(make, message, chats, tmp_path, capsys):
    make(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    out = tmp_path / "s.safetensors"
    assert message in refused(capsys, "--model", tmp_path / "m", "--data", chats, "--out", out)
    assert not out.exists()


def test_quantised_model_is_refused(olmo2, chats, tmp_path, capsys):
    config = json.loads((olmo2 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "quantised" in refused(
        capsys, "--model", tmp_path, "--data", chats, "--out", tmp_path / "s"
    )


@pytest.mark.parametrize(
    "content,message",
    [
        ("", "do not fill one sequence"),
        ('{"text": "a"}\nnot json\n', "line 2 is not JSON"),
        ('{"body": "a"}\n', "row 1 has neither"),
        ('{"messages": "hello"}\n', "row 1 has neither"),
        ('{"messages": [1]}\n', "row 1 has neither"),
        ('{"instruction": "a"}\n', "row 1 has neither"),
        ('{"text": "short"}\n', "do not fill one sequence"),
    ],
)
def test_bad_calibration_data(content, message, olmo2, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    assert message in refused(
        capsys, "--model", olmo2, "--data", data, "--out", tmp_path / "o/s", "--seq-len", 64
    )
    assert not (tmp_path / "o").exists()


def test_other_bad_input(olmo2, llama, qwen2, chats, tmp_path, capsys):
    out = tmp_path / "s.safetensors"
    assert "no such folder" in refused(
        capsys, "--model", "./nowhere", "--data", chats, "--out", out
    )
    assert "no such file" in refused(
        capsys, "--model", olmo2, "--data", tmp_path / "none.jsonl", "--out", out, "--seq-len", 64
    )
    assert "invalid choice" in refused(
        capsys, "--model", olmo2, "--data", chats, "--out", out, "--method", "best"
    )
    for method in ("wanda", "sparsegpt", "fim"):
        assert "add --data" in refused(capsys, "--model", olmo2, "--out", out, "--method", method)
    assert "belong together" in refused(capsys, "--model", olmo2, "--out", out, "--method", "delta")
    assert "belong together" in refused(
        capsys, "--model", olmo2, "--out", out, "--data", chats, "--adapted", olmo2
    )
    assert "leave out --data" in refused(
        capsys, "--model", olmo2, "--out", out, "--data", chats, "--method", "random"
    )
    assert "at least 2 for fim" in refused(
        capsys, "--model", olmo2, "--out", out, "--data", chats, "--method", "fim", "--seq-len", "1"
    )
    delta = ["--model", olmo2, "--out", out, "--method", "delta", "--adapted"]
    assert "no such folder" in refused(capsys, *delta, "./nowhere")
    assert "are not those of" in refused(capsys, *delta, llama)
    assert "all scores are 0" in refused(capsys, *delta, olmo2)
    assert "has biases" in refused(
        capsys, "--model", qwen2, "--out", out, "--data", chats, "--method", "sparsegpt"
    )
    assert "same score" in refused(
        capsys,
        "--model",
        olmo2,
        "--out",
        out,
        "--data",
        chats,
        "--method",
        "sparsegpt",
        "--axis",
        "row",
    )
    (tmp_path / "file").write_text("")
    argv = ["--model", olmo2, "--out", tmp_path / "file/s", "--method", "magnitude"]
    assert "cannot be written" in refused(capsys, *argv)
    assert "made for 512 tokens" in refused(capsys, "--model", olmo2, "--out", out, "--data", chats)
    for device in ("gpu", "mps", "cuda:99"):
        assert "must be cpu or cuda" in refused(
            capsys, *argv[:3], out, "--method", "magnitude", "--device", device
        )
    assert not out.exists()


def test_nothing_is_overwritten_but_scores_and_masks(olmo2, chats, tmp_path, capsys, monkeypatch):
    """Not the calibration text, the model or the scores, whatever name they are called by."""
    monkeypatch.chdir(tmp_path)
    model, data, scores = tmp_path / "model", tmp_path / "chats.jsonl", tmp_path / "scores"
    shutil.copytree(olmo2, model)
    shutil.copy(chats, data)
    run(olmo2, chats, scores)
    before = {path: path.read_bytes() for path in (model / "model.safetensors", data, scores)}
    for out in ("chats.jsonl", "model/model.safetensors"):
        assert "no file of scores" in refused(
            capsys, "--model", model, "--data", data, "--seq-len", 32, "--out", out
        )
    for out in ("chats.jsonl", "model/model.safetensors", "model/../scores", "."):
        with pytest.raises(SystemExit) as error:
            make_mask.main(["--scores", str(scores), "--out", out])
        assert error.value.code == 2 and "no mask file" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_models_that_do_not_fit_their_tokenizer_or_config_are_refused(
    olmo2, chats, tmp_path, capsys
):
    argv = ["--data", chats, "--seq-len", 32, "--out", tmp_path / "s"]

    def with_config(**change):
        shutil.copytree(olmo2, tmp_path / "m", dirs_exist_ok=True)
        config = json.loads((olmo2 / "config.json").read_text()) | change
        (tmp_path / "m/config.json").write_text(json.dumps(config))
        return ["--model", tmp_path / "m", *argv]

    assert "its embeddings 100 rows" in refused(capsys, *with_config(vocab_size=100))
    assert "T5" in refused(capsys, *with_config(model_type="t5"))
    assert "mismatch" in refused(capsys, *with_config(intermediate_size=40))
    with_config()
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    tokenizer.save_pretrained(tmp_path / "m")
    assert "no such role" in refused(capsys, "--model", tmp_path / "m", *argv)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "m")
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": TEXT[0]}])
    assert "no end-of-text token" in refused(
        capsys, "--model", tmp_path / "m", *argv[2:], "--data", text
    )


def test_full_disk(olmo2, chats, tmp_path):
    """Scores, then a mask, that no longer fit: one line, exit code 2, the files of before
    untouched.
    """
    scores, mask = tmp_path / "scores", tmp_path / "mask"
    run(olmo2, chats, scores)
    make_mask.main(["--scores", str(scores), "--out", str(mask)])
    before = scores.read_bytes(), mask.read_bytes()
    for main, argv in (
        (score.main, ["--model", olmo2, "--method", "magnitude", "--out", scores]),
        (make_mask.main, ["--scores", scores, "--ratio", "0.25", "--out", mask]),
    ):
        pid = forked(main, argv, limit_file_size(1500, tmp_path / "stderr"))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
        (line,) = [
            line for line in (tmp_path / "stderr").read_text().splitlines() if "error" in line
        ]
        assert "cannot be written" in line
    assert (scores.read_bytes(), mask.read_bytes()) == before and not list(tmp_path.glob("*.tmp"))


def test_text_and_parquet_rows(olmo2, tmp_path):
    from datasets import Dataset

    rows = [{"text": f"some text number {i} of the file"} for i in range(30)]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("\n".join(r["text"] for r in rows))
    write_jsonl(tmp_path / "a.jsonl", rows)
    tokens = [
        score.calibration_tokens(
            tmp_path / f"a.{kind}", AutoTokenizer.from_pretrained(olmo2), 3, 20, 0
        )
        for kind in ("parquet", "txt", "jsonl")
    ]
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[1], tokens[2])


def test_norm_probe_finds_what_the_weight_multiplies():
    x = torch.randn(3, 5, 8)
    layer_norm = torch.nn.LayerNorm(8)
    torch.nn.init.normal_(layer_norm.weight)
    torch.nn.init.normal_(layer_norm.bias)
    expected = (x - x.mean(-1, keepdim=True)) / (
        x.var(-1, keepdim=True, unbiased=False) + layer_norm.eps
    ).sqrt()
    assert torch.allclose(score.norm_probe("n", layer_norm)(x), expected, atol=1e-5)
    gemma = Gemma2RMSNorm(8)  # its output is (1 + weight) * normalised input
    torch.nn.init.normal_(gemma.weight)
    assert torch.allclose(
        score.norm_probe("n", gemma)(x), reference_rmsnorm(x, gemma.eps), atol=1e-5
    )
    norm = LlamaRMSNorm(8)
    assert score.norm_probe("n", norm) is None  # its output over its weight will do
    norm.weight.data[3] = 0
    assert torch.allclose(
        score.norm_probe("n", norm)(x), reference_rmsnorm(x, norm.variance_epsilon), atol=1e-5
    )


def test_a_norm_weight_of_zero_changes_no_score_of_its_norm(llama):
    """With it the normalised input is computed, without it read off the output: the same for all
    other weights.
    """
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    tokens = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(0))
    # what it reads, the embeddings, does not depend on it
    name = "model.layers.0.input_layernorm.weight"
    before = score.input_norms(model, score.scored_parameters(model), tokens, 2)[name]
    model.get_parameter(name).data[5] = 0
    assert torch.allclose(
        score.input_norms(model, score.scored_parameters(model), tokens, 2)[name], before, rtol=1e-5
    )


def test_a_vector_that_is_no_norm_weight_is_refused(capsys):
    class Squashed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))

        def forward(self, x):
            return torch.tanh(self.weight * x)

    with pytest.raises(SystemExit):
        score.norm_probe("layer.scale", Squashed())
    assert "layer.scale in Squashed: not a norm" in capsys.readouterr().err
