"""score.py against an independent float64 reference, and what it refuses."""

import gzip
import hashlib
import json
import math
import os
import shutil
import signal
from functools import partial

import pyarrow
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
from hub import REQUESTS
from paper_hub import put_tulu, served  # noqa: F401
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    ApertusConfig,
    ApertusForCausalLM,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import make_mask
import score


def run(model, data, out, *extra):
    """Score 6 sequences of 64 tokens. Return the scores."""
    argv = ["--model", model, "--out", out, "--num-samples", 6, "--seq-len", 64, *extra]
    if not {"random", "magnitude", "delta"} & set(extra):
        argv += ["--data", data]
    score.main([str(arg) for arg in argv])
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


def test_alpaca_rows_become_chats(olmo2, tmp_path):
    """As the authors format them, and not as the `text` that the data set has too."""
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3", "text": "unused"}]
    rows += [{"instruction": "Add.", "input": "", "output": ""}]
    data, tokenizer = write_jsonl(tmp_path / "d.jsonl", rows), AutoTokenizer.from_pretrained(olmo2)
    text = tokenizer.decode(score.calibration_tokens(data, tokenizer, 1, 48, 3).flatten())
    first = "<|im_start|>user\nAdd.\n\nInput: 1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    second = "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    assert (first + second).startswith(text) or (second + first).startswith(text)


def test_control_tokens_in_raw_text_are_text(olmo2, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": "a <|im_end|> b " * 9}])
    tokens = score.calibration_tokens(data, tokenizer, 1, 32, 0)
    assert tokenizer.eos_token_id not in tokens
    assert tokenizer.decode(tokens[0]).startswith("a <|im_end|> b a")


def test_sums_are_in_fp32(olmo2):
    model = AutoModelForCausalLM.from_pretrained(olmo2, dtype=torch.bfloat16)
    owners = score.scored_parameters(model)
    seen = {}
    for name, module in owners.items():
        if "proj" in name:  # its inputs are of bf16, their squares are not rounded to it
            hook = partial(lambda name, module, args: seen.update({name: args[0]}), name)
            module.register_forward_pre_hook(hook)
    norms = score.input_norms(model, owners, torch.arange(64).view(2, 32), 2)
    assert norms and all(norm.dtype == torch.float32 for norm in norms.values())
    for name, x in seen.items():
        assert x.dtype == torch.bfloat16
        expected = x.flatten(0, 1).double().square().sum(0).sqrt()
        assert torch.allclose(norms[name].double(), expected, rtol=1e-5), name


def test_raw_text_ends_as_in_training(olmo2, tmp_path):
    """With <|endoftext|>, 0, and not with <|im_end|>, the end of a turn."""
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": "a b"}] * 20)
    document = [*tokenizer("a b")["input_ids"], 0]
    tokens = score.calibration_tokens(data, tokenizer, 1, 2 * len(document), 0)
    assert tokens.tolist() == [2 * document]


def test_raw_text_ends_once_where_the_tokenizer_ends_it(olmo2, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": "a b"}] * 20)
    document = tokenizer("a b")["input_ids"]
    tokens = score.calibration_tokens(data, tokenizer, 1, 2 * len(document), 0)
    assert document[-1] == 0 and tokens.tolist() == [2 * document]


def test_only_raw_text_gets_the_tokenizers_own_bos(olmo2, chats, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert 0 not in score.calibration_tokens(chats, tokenizer, 5, 50, 0)
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": TEXT[0]}])
    assert score.calibration_tokens(data, tokenizer, 1, 8, 0)[0, 0] == 0


def test_the_clock_of_chat_templates_stands_still(olmo2, chats):
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}"
    tokens = score.calibration_tokens(chats, tokenizer, 1, 16, 0)
    assert tokenizer.decode(tokens[0]).startswith("01 Jan 2025")


def test_tulu_is_drawn_at_random_and_downloaded_once(served, olmo2, tmp_path, capsys):
    chats = put_tulu(served, rows=90)
    tokenizer = AutoTokenizer.from_pretrained(olmo2)

    def draw(seed):
        text = tokenizer.decode(score.calibration_tokens("tulu", tokenizer, 40, 64, seed).flatten())
        turns = text.split("<|im_start|>user\n")[1:-1]
        return [int(turn.split()[0]) for turn in turns], [turn.split("<")[0] for turn in turns]

    drawn, questions = draw(seed=7)
    assert "1.4 GB" in capsys.readouterr().out
    assert questions == [chats[i]["messages"][0]["content"] for i in drawn]
    assert len(set(drawn)) == len(drawn) > 20 and {i // 30 for i in drawn} == {0, 1, 2}
    assert draw(seed=7)[0] == drawn != draw(seed=8)[0] and drawn != sorted(drawn)
    files = [path for verb, path, _ in REQUESTS if verb == "GET" and path.endswith(".parquet")]
    assert len(files) == len(set(files)) == 3
    scores = run(olmo2, "tulu", tmp_path / "s", "--seed", "7")
    assert scores and safe_open(tmp_path / "s", "pt").metadata()["data"] == "tulu"


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


def test_the_file_says_what_was_read_and_drawn(olmo2, chats, tmp_path):
    run(olmo2, chats, tmp_path / "s", "--num-samples", 100_000, "--seed", 7)
    about = safe_open(tmp_path / "s", "pt").metadata()
    assert about["seed"] == "7" and about["data"] == str(chats)
    assert 6 < int(about["num_samples"]) < 100_000  # all that the text has
    assert int(about["num_tokens"]) == int(about["num_samples"]) * int(about["seq_len"])


def test_methods_without_text_are_computed_in_fp32_where_there_is_a_gpu(olmo2, monkeypatch):
    monkeypatch.setattr(score, "DEVICES", ["cpu", "cuda"])
    for more, expected in (
        (["--method", "magnitude"], ("cpu", "float32")),
        (["--method", "delta", "--adapted", "m", "--device", "cuda"], ("cpu", "float32")),
        (["--data", "tulu", "--device", "cuda"], ("cuda", "bfloat16")),
        (["--data", "tulu", "--device", "cpu"], ("cpu", "float32")),
    ):
        args = score.parse_args(["--model", str(olmo2), "--out", "none", *more])
        assert (args.device, args.dtype) == expected


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


@pytest.mark.parametrize(
    "kind,axis,over", [("olmo2", "column", 0), ("llama", "row", 1), ("qwen2", "element", None)]
)
def test_fim_equals_a_loop_over_samples_in_float64(kind, axis, over, chats, tmp_path):
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
    scores = run(folder, chats, tmp_path / axis, "--method", "fim", "--axis", axis)
    assert scores.keys() == expected.keys()
    for name, s in expected.items():
        s = s.sum(over) if s.dim() == 2 and over is not None else s
        assert torch.allclose(scores[name].double(), s, rtol=1e-3, atol=1e-6 * s.max()), name


def test_fim_never_holds_two_gradients(olmo2, monkeypatch):
    """Each gradient is gone before the next one is squared."""
    model = AutoModelForCausalLM.from_pretrained(olmo2)
    held, sum_along = [], score.sum_along

    def counted(axis, s):
        held.append(sum(p.grad is not None for p in model.parameters()))
        return sum_along(axis, s)

    monkeypatch.setattr(score, "sum_along", counted)
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
    """The mask is the top of |theta_adapted - theta_source| of each matrix."""
    adapted, model = tmp_path / "adapted", AutoModelForCausalLM.from_pretrained(olmo2)
    source = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    model.save_pretrained(adapted)
    AutoTokenizer.from_pretrained(olmo2).save_pretrained(adapted)
    options = ["--method", "delta", "--axis", "element", "--adapted", adapted]
    run(olmo2, None, tmp_path / "s", *options)
    argv = ["--scores", tmp_path / "s", "--freeze", "lowest", "--ratio", 0.9]
    make_mask.main([str(arg) for arg in (*argv, "--out", tmp_path / "m")])
    masks = load_file(tmp_path / "m")
    assert masks.keys() == source.keys() - {"model.embed_tokens.weight", "lm_head.weight"}
    for name, mask in masks.items():
        delta = (model.get_parameter(name) - source[name]).abs().flatten()
        top = delta.topk(len(delta) - int(0.9 * len(delta))).indices
        assert set(mask.flatten().nonzero()[:, 0].tolist()) == set(top.tolist()), name


def test_equal_runs_give_equal_bytes_with_a_digest(olmo2, chats, tmp_path):
    one = run(olmo2, chats, tmp_path / "a", "--batch-size", "1")
    run(olmo2, chats, tmp_path / "b", "--batch-size", "1")
    six = run(olmo2, chats, tmp_path / "c", "--batch-size", "6")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert all(torch.allclose(one[n], six[n], rtol=1e-5) for n in one)
    metadata = safe_open(tmp_path / "a", "pt").metadata()
    digest = hashlib.sha256()
    for name in sorted(one):
        digest.update(name.encode() + one[name].numpy().tobytes())
    assert metadata["tensors_sha256"] == digest.hexdigest()
    about = [metadata[key] for key in ("format", "version", "axis", "num_samples", "num_tokens")]
    assert about == ["ssu-scores", "1", "column", "6", "384"]
    assert len(metadata["fingerprint"]) == 64
    assert json.loads(metadata["shapes"])["lm_head.weight"] == [400, 32]


def save(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


SMALL = dict(vocab_size=400, n_embd=32, n_layer=1, n_head=2, n_positions=512)
REFUSED = {
    "Conv1D": lambda: GPT2LMHeadModel(GPT2Config(**SMALL)),
    "MixtralTopKRouter": lambda: MixtralForCausalLM(
        MixtralConfig(vocab_size=400, num_local_experts=2, **SIZES)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_layouts_that_cannot_be_scored_are_refused_by_name(message, chats, tmp_path, refused):
    folder, out = save(REFUSED[message](), tmp_path / "m"), tmp_path / "s"
    argv = ["--model", folder, "--data", chats, "--seq-len", 64, "--out", out]
    assert message in refused(score.main, *argv) and not out.exists()


def test_other_vectors_are_ranked_by_their_size(chats, tmp_path):
    """Apertus has parameters of an activation function, [1], which multiply no input feature."""
    model = ApertusForCausalLM(ApertusConfig(vocab_size=400, num_key_value_heads=2, **SIZES))
    scores = run(save(model, tmp_path / "m"), chats, tmp_path / "s")
    others = [name for name in scores if not name.endswith(".weight")]
    assert len(others) == 4
    for name in others:
        expected = model.get_parameter(name).detach().float().abs() * (6 * 64) ** 0.5
        assert torch.allclose(scores[name], expected, rtol=1e-2), name


def test_a_model_without_sdpa_is_scored(chats, tmp_path):
    model = GPTJForCausalLM(GPTJConfig(rotary_dim=4, **SMALL))
    scores = run(save(model, tmp_path / "m"), chats, tmp_path / "s")
    never = {"transformer.wte.weight", "lm_head.weight", "lm_head.bias"}
    assert scores.keys() == dict(model.named_parameters()).keys() - never


GOOD = b'{"text": "a"}\n'
BAD_TEXT = {
    "empty": (b"", "do not fill one sequence"),
    "short": (b'{"text": "short"}\n', "do not fill one sequence"),
    "not JSON": (GOOD + b"\nnot json\n", "row 2"),
    "other columns": (GOOD + b'{"body": "a"}\n', "row 2"),
    "no text": (b'{"text": 5}\n', "row 1"),
    "chat as text": (b'{"messages": "hello"}\n', "row 1"),
    "chat of numbers": (b'{"messages": [1]}\n', "row 1"),
    "chat of parts": (b'{"messages": [{"role": "user", "content": [{"text": "a"}]}]}\n', "row 1"),
    "no answer": (b'{"instruction": "a"}\n', "row 1"),
    "surrogate escape": (GOOD + b'{"text": "\\ud83d"}\n', "row 2"),
    "CESU-8": (GOOD + b'{"text": "\xed\xa0\xbd"}\n', "row 2"),
    "nested": (GOOD + b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "row 2"),
}


@pytest.mark.parametrize("kind", BAD_TEXT)
def test_bad_calibration_data(kind, olmo2, tmp_path, refused):
    content, message = BAD_TEXT[kind]
    (tmp_path / "data.jsonl").write_bytes(content)
    argv = ["--model", olmo2, "--data", tmp_path / "data.jsonl", "--seq-len", 64]
    line = refused(score.main, *argv, "--out", tmp_path / "o/s")
    assert message in line and "data.jsonl" in line and not (tmp_path / "o").exists()


@pytest.mark.parametrize("damage", ["cut off", "flipped", "not gzip"])
def test_damaged_gzip_is_one_line(damage, olmo2, tmp_path, refused):
    content = gzip.compress("".join(f'{{"text": "{i}"}}\n' for i in range(3000)).encode())
    middle = len(content) // 2
    (tmp_path / "d.jsonl.gz").write_bytes(
        {
            "cut off": content[:-20],
            "flipped": content[:middle] + b"\xff" * 8 + content[middle + 8 :],
            "not gzip": GOOD,
        }[damage]
    )
    argv = ["--model", olmo2, "--data", tmp_path / "d.jsonl.gz", "--seq-len", 64]
    assert "d.jsonl.gz: cannot read row" in refused(score.main, *argv, "--out", tmp_path / "s")


def test_other_bad_input(olmo2, llama, qwen2, chats, tmp_path, refused):
    out = tmp_path / "s"
    argv = ["--model", olmo2, "--out", out]
    calibrated = [*argv, "--data", chats]
    no_model = ["--model", "./nowhere", "--data", chats, "--out", out]
    assert "./nowhere" in refused(score.main, *no_model)
    no_file = [*argv, "--data", tmp_path / "none.jsonl", "--seq-len", 64]
    assert "none.jsonl" in refused(score.main, *no_file)
    assert "invalid choice" in refused(score.main, *calibrated, "--method", "best")
    for method in ("wanda", "sparsegpt", "fim"):
        assert "needs calibration text" in refused(score.main, *argv, "--method", method)
    assert "reads no text" in refused(score.main, *calibrated, "--method", "random")
    assert "--adapted belongs to" in refused(score.main, *argv, "--method", "delta")
    assert "--adapted belongs to" in refused(score.main, *calibrated, "--adapted", olmo2)
    for option, value in (("--seq-len", 1), ("--num-samples", 0), ("--batch-size", -1)):
        assert "must be at least 1" in refused(score.main, *calibrated, option, value)
    delta = [*argv, "--method", "delta", "--adapted"]
    assert "./nowhere" in refused(score.main, *delta, "./nowhere")
    assert "differ in their parameters" in refused(score.main, *delta, llama)
    assert "scores are all 0" in refused(score.main, *delta, olmo2)
    sparsegpt = ["--out", out, "--data", chats, "--method", "sparsegpt"]
    assert "ranks neither rows nor biases" in refused(score.main, "--model", qwen2, *sparsegpt)
    assert "ranks neither rows nor biases" in refused(
        score.main, *sparsegpt, "--model", olmo2, "--axis", "row"
    )
    assert "model's 512 positions" in refused(score.main, *calibrated)
    for device in ("gpu", "mps", "cuda:99"):
        line = refused(score.main, *argv, "--method", "magnitude", "--device", device)
        assert "--device: invalid choice" in line
    (tmp_path / "file").write_text("")
    magnitude = ["--model", olmo2, "--method", "magnitude", "--out"]
    assert "cannot be read or written" in refused(score.main, *magnitude, tmp_path / "file/s")
    assert not out.exists()


def test_only_scores_are_overwritten(olmo2, chats, tmp_path, refused, monkeypatch):
    """Not the calibration text or the model, whatever name they are called by."""
    monkeypatch.chdir(tmp_path)
    model, data = tmp_path / "model", tmp_path / "chats.jsonl"
    shutil.copytree(olmo2, model)
    shutil.copy(chats, data)
    before = {path: path.read_bytes() for path in (model / "model.safetensors", data)}
    argv = ["--model", model, "--data", data, "--seq-len", 32, "--out"]
    for out in ("chats.jsonl", "model/../chats.jsonl", "model/model.safetensors", ".", "model"):
        assert "is not a score file" in refused(score.main, *argv, out)
    assert {path: path.read_bytes() for path in before} == before
    first = run(olmo2, chats, tmp_path / "s", "--method", "random")
    second = run(olmo2, chats, tmp_path / "s", "--method", "magnitude")
    assert not torch.equal(first["model.norm.weight"], second["model.norm.weight"])


def test_models_that_do_not_fit_their_tokenizer_or_config_are_refused(
    olmo2, chats, tmp_path, refused
):
    argv = ["--data", chats, "--seq-len", 32, "--out", tmp_path / "s"]

    def with_config(**change):
        shutil.copytree(olmo2, tmp_path / "m", dirs_exist_ok=True)
        config = json.loads((olmo2 / "config.json").read_text()) | change
        (tmp_path / "m/config.json").write_text(json.dumps(config))
        return ["--model", tmp_path / "m", *argv]

    assert "mismatch" in refused(score.main, *with_config(intermediate_size=40))
    with_config()
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    tokenizer.save_pretrained(tmp_path / "m")
    assert "no such role" in refused(score.main, "--model", tmp_path / "m", *argv)


def test_full_disk(olmo2, chats, tmp_path):
    """Scores that do not fit: one line, exit code 2, and the old file is untouched."""
    run(olmo2, chats, tmp_path / "scores")
    before = (tmp_path / "scores").read_bytes()
    argv = ["--model", olmo2, "--method", "magnitude", "--out", tmp_path / "scores"]
    pid = forked(score.main, argv, limit_file_size(1500, tmp_path / "stderr"))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    lines = (tmp_path / "stderr").read_text().splitlines()
    (line,) = [line for line in lines if "error" in line]
    assert "cannot be read or written" in line
    assert (tmp_path / "scores").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_interrupt_is_one_line(olmo2, tmp_path):
    """Ctrl-C while score.py waits for text."""
    os.mkfifo(tmp_path / "text.jsonl")
    argv = ["--model", olmo2, "--data", tmp_path / "text.jsonl", "--out", tmp_path / "s"]
    pid = forked(score.main, [*argv, "--seq-len", 64], limit_file_size(2**30, tmp_path / "stderr"))
    with open(tmp_path / "text.jsonl", "w"):  # waits until score.py reads
        os.kill(pid, signal.SIGINT)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    lines = (tmp_path / "stderr").read_text().splitlines()
    assert lines == ["score.py: interrupted"]


def test_text_and_parquet_rows(olmo2, tmp_path):
    """The same tokens from every format, with blank lines, a byte order mark and another column."""
    rows = [{"text": f"some text number {i} of the file"} for i in range(30)]
    columns = {"text": [row["text"] for row in rows]}
    columns["born"] = pyarrow.array([10**14] * 30, pyarrow.timestamp("s"))  # no date of Python's
    parquet.write_table(pyarrow.table(columns), tmp_path / "raw[ne].parquet")
    (tmp_path / "a.txt").write_text("\n\n".join(r["text"] for r in rows), encoding="utf-8-sig")
    write_jsonl(tmp_path / "a.jsonl", rows)
    lines = (tmp_path / "a.jsonl").read_bytes().replace(b"\n", b"\n \n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    tokens = [
        score.calibration_tokens(tmp_path / name, tokenizer, 3, 20, 0)
        for name in ("raw[ne].parquet", "a.txt", "a.jsonl", "a.jsonl.gz")
    ]
    assert all(torch.equal(tokens[0], other) for other in tokens[1:])


def test_empty_documents_are_left_out(olmo2, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    rows = [{"text": "some text of the file"}, {"text": ""}] * 20
    write_jsonl(tmp_path / "all.jsonl", rows)
    write_jsonl(tmp_path / "some.jsonl", rows[::2])
    found, expected = (
        score.calibration_tokens(tmp_path / name, tokenizer, 3, 20, 0)
        for name in ("all.jsonl", "some.jsonl")
    )
    assert torch.equal(found, expected)


def test_text_in_utf_16_is_refused(olmo2, tmp_path, refused):
    (tmp_path / "a.txt").write_bytes(("नेपाल दक्षिण एसियामा छ।\n" * 200).encode("utf-16-le"))
    argv = ["--model", olmo2, "--data", tmp_path / "a.txt", "--seq-len", 32]
    assert "convert the file to UTF-8" in refused(score.main, *argv, "--out", tmp_path / "s")


def test_a_model_of_nan_is_refused_for_that(olmo2, chats, tmp_path, refused):
    folder = shutil.copytree(olmo2, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"].fill_(math.nan)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    argv = ["--model", folder, "--data", chats, "--seq-len", 32, "--out", tmp_path / "s"]
    assert "weights are damaged" in refused(score.main, *argv)


def read_norm(norm, x):
    """Return the sizes of what score.py says that the weight of a norm multiplies."""
    read, divisor = score.input_reader("n", norm, x)
    return (read(x, norm(x)) / divisor).abs()


def test_what_the_weight_of_a_norm_multiplies():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    layer_norm = torch.nn.LayerNorm(8)
    torch.nn.init.normal_(layer_norm.weight)
    torch.nn.init.normal_(layer_norm.bias)
    variance = x.var(-1, keepdim=True, unbiased=False)
    expected = (x - x.mean(-1, keepdim=True)).abs() / (variance + layer_norm.eps).sqrt()
    assert torch.allclose(read_norm(layer_norm, x), expected, atol=1e-5)
    gemma = Gemma2RMSNorm(8)  # its output is (1 + weight) * normalized input
    torch.nn.init.normal_(gemma.weight)
    expected = reference_rmsnorm(x, gemma.eps).abs()
    assert torch.allclose(read_norm(gemma, x), expected, atol=1e-5)
    norm = LlamaRMSNorm(8)
    torch.nn.init.normal_(norm.weight)
    expected = reference_rmsnorm(x, norm.variance_epsilon).abs()
    assert torch.allclose(read_norm(norm, x), expected, atol=1e-5)
    norm.weight.data[3] = 0
    assert torch.allclose(read_norm(norm, x), expected, atol=1e-5)


def test_a_vector_that_is_no_norm_weight_is_refused(capsys):
    class Squashed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))

        def forward(self, x):
            return torch.tanh(self.weight * x)

    with pytest.raises(SystemExit):
        score.input_reader("layer.weight", Squashed(), torch.randn(2, 8))
    assert "layer.weight of Squashed cannot be scored" in capsys.readouterr().err


def test_layers_that_see_no_token_are_refused(chats, tmp_path, refused):
    """The head of ModernBERT's decoder has a matrix of its own, outside the base model."""
    sizes = SIZES | {"bos_token_id": 1}
    model = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(vocab_size=400, **sizes))
    argv = ["--model", save(model, tmp_path / "m"), "--data", chats, "--seq-len", 64]
    line = refused(score.main, *argv, "--out", tmp_path / "s")
    assert "lm_head.dense.weight" in line and "does not call" in line
