"""train.py: the loop against torch.optim.AdamW, the shield, exact resume, and what it refuses."""

import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, forked, limit_file_size, tiny_model, write_jsonl
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup
from transformers.models.llama.modeling_llama import LlamaMLP

import make_mask
import score
import train
from data import blocks
from data.blocks import batch_indices, load_sequences
from data.identity import digest_of
from variants import adalora, files, gmt

SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("olmo2", "llama")]
TINY = "--steps 20 --batch-size 4 --micro-batch-size 2 --seq-len 32 --lr 1e-2 --log-every 1".split()
TINY += ["--precision", "fp32", "--device", "cpu"]


@pytest.fixture(scope="module")
def mask(olmo2, chats, tmp_path_factory):
    return make_masks(olmo2, chats, tmp_path_factory.mktemp("mask"))


def make_masks(model, chats, folder):
    argv = ["--model", str(model), "--data", str(chats), "--num-samples", "4", "--seq-len", "64"]
    score.main([*argv, "--out", str(folder / "scores")])
    make_mask.main(["--scores", str(folder / "scores"), "--out", str(folder / "mask.safetensors")])
    return folder / "mask.safetensors"


def arguments(model, data, out, *extra):
    return ["--model", str(model), "--data", str(data), "--out", str(out), *TINY, *map(str, extra)]


def state_of(out):
    """All tensors of the newest checkpoint below a run's directory."""
    state = {}
    for path in files.newest_checkpoint(out).glob("*.safetensors"):
        state |= load_file(path)
    return state


def step_of(out):
    found = files.newest_checkpoint(out)
    return int(found.name.removeprefix("step-")) if found else 0


def weights(folder):
    return load_file(folder / "model/model.safetensors")


def log_of(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "kind,precision",
    [
        ("olmo2", "bf16"),
        pytest.param("llama", "fp32", marks=pytest.mark.slow),
        pytest.param("qwen2", "fp16", marks=pytest.mark.slow),
    ],
)
def test_frozen_weights_stay_and_the_others_move(kind, precision, chats, text, tmp_path):
    model = tiny_model(tmp_path / "source", kind)
    masks = make_masks(model, chats, tmp_path)
    train.main(
        arguments(
            model,
            text,
            tmp_path / "out",
            "--mask",
            masks,
            "--weight-decay",
            "0.1",
            "--precision",
            precision,
        )
    )
    source, trained, masks = (
        load_file(model / "model.safetensors"),
        weights(tmp_path / "out"),
        load_file(masks),
    )
    frozen = 0
    for name, before in source.items():
        keep = (
            masks[name].expand(before.shape) == 0
            if name in masks
            else torch.zeros_like(before, dtype=torch.bool)
        )
        assert torch.equal(before[keep], trained[name][keep]), name
        assert (before[~keep] != trained[name][~keep]).float().mean() > 0.95, name
        frozen += int(keep.sum())
    summary = log_of(tmp_path / "out")[-1]["summary"]
    assert summary["frozen_verified"] == frozen > 0
    assert summary["moved"] == sum((source[name] != trained[name]).sum() for name in source)


def static_mask(method, model, chats, out):
    """The mask file of any static method, by the real scripts."""
    scores = out.with_name("scores")
    if method in make_mask.METHODS:
        ratio = ["--ratio", "0.9"] if method != "hft" else []  # 1.5% of 48 channels would be none
        make_mask.main(["--method", method, "--model", str(model), "--out", str(out), *ratio])
    elif method == "lota":
        adapted = tiny_model(out.with_name("adapted"), model_kind(model), seed=3)
        argv = ["--method", "delta", "--axis", "element", "--adapted", str(adapted)]
        score.main(["--model", str(model), *argv, "--out", str(scores)])
        make_mask.main(
            ["--scores", str(scores), "--freeze", "lowest", "--ratio", "0.9", "--out", str(out)]
        )
    else:
        name, _, axis = method.partition("-")
        argv = ["--method", name, "--axis", axis or "column", "--out", str(scores)]
        argv += ["--data", str(chats), "--num-samples", "4", "--seq-len", "64"]
        score.main(["--model", str(model), *argv])
        make_mask.main(["--scores", str(scores), "--out", str(out), "--freeze-chat-tokens"])
    return out


def model_kind(folder):
    return json.loads((folder / "config.json").read_text())["model_type"]


@pytest.mark.parametrize("kind", ["llama", pytest.param("olmo2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "method",
    [
        pytest.param("wanda-row", marks=pytest.mark.slow),
        "wanda-element",
        "hft",
        "lota",
        pytest.param("sparsegpt", marks=pytest.mark.slow),
        pytest.param("fim", marks=pytest.mark.slow),
        pytest.param("s2ft-down", marks=pytest.mark.slow),
        pytest.param("s2ft-down-output", marks=pytest.mark.slow),
        pytest.param("s2ft-down-embeddings", marks=pytest.mark.slow),
    ],
)
def test_every_static_method_is_a_mask(method, kind, chats, text, tmp_path, request):
    """What it freezes is bit-identical, all else moves, wholly frozen matrices have no gradient
    and no moments.
    """
    model = request.getfixturevalue(kind)
    mask = static_mask(method, model, chats, tmp_path / "mask")
    extra = ["--mask", mask, "--weight-decay", "0.1", "--steps", "6", "--save-every", "4"]
    pid = forked(train.main, arguments(model, text, tmp_path / "out", *extra), stop_after_saving)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    state, masks = state_of(tmp_path / "out"), load_file(mask)
    for name in load_file(model / "model.safetensors"):
        assert (f"exp_avg/{name}" in state) == (name not in masks or bool(masks[name].any())), name
    train.main(arguments(model, text, tmp_path / "out", *extra, "--resume"))
    source, trained, frozen = load_file(model / "model.safetensors"), weights(tmp_path / "out"), 0
    for name, before in source.items():
        keep = masks.get(name, torch.ones(1)).expand(before.shape) == 0
        assert torch.equal(before[keep], trained[name][keep]), name
        if "embed" not in name and "lm_head" not in name:  # absent tokens get no gradient
            assert keep.all() or (before[~keep] != trained[name][~keep]).float().mean() > 0.95, name
        frozen += int(keep.sum())
    assert log_of(tmp_path / "out")[-1]["summary"]["frozen_verified"] == frozen > 0


def stop_after_saving():
    real = files.save_checkpoint
    files.save_checkpoint = lambda *a: (real(*a), os._exit(9))


def test_gmt_keeps_the_largest_gradients_of_each_matrix_in_each_micro_batch(olmo2, text, tmp_path):
    """The first update against torch.topk: with Adam's first step, exactly what was kept in some
    micro-batch moves.
    """
    more = "--gmt-ratio 0.75 --weight-decay 0 --steps 1 --warmup-ratio 0 --max-grad-norm 0".split()
    train.main(arguments(olmo2, text, tmp_path / "out", *more))
    tokens, _ = next_tokens(olmo2, text)
    blocks = torch.tensor(tokens).view(-1, 32)
    batch = blocks[batch_indices(0, 4, len(blocks), 42)]
    model = AutoModelForCausalLM.from_pretrained(olmo2, dtype=torch.float32)
    expected = {}
    for micro_batch in batch.split(2):
        model.zero_grad()
        logits = model(input_ids=micro_batch).logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), micro_batch[:, 1:].flatten(), reduction="sum"
        )
        (loss / (4 * 31)).backward()
        for name, p in model.named_parameters():
            grad = p.grad.clone()
            if p.dim() == 2 and "proj" in name:
                kept = grad.abs().flatten().topk(grad.numel() - int(0.75 * grad.numel())).indices
                grad = (
                    torch.zeros(grad.numel())
                    .index_copy(0, kept, grad.flatten()[kept])
                    .view_as(grad)
                )
            expected[name] = expected.get(name, 0) + grad
    trained = weights(tmp_path / "out")
    for name, p in model.named_parameters():
        moved, g = trained[name] != p, expected[name]
        # The threshold's neighbors may change places.
        assert (moved == (g != 0)).float().mean() > 0.999, name
        close = torch.isclose(trained[name], p - 1e-2 * g / (g.abs() + 1e-8), atol=2e-4)
        assert close.float().mean() > 0.999, name
        if "proj" in name:
            assert 0.25 <= moved.float().mean() + 1e-3 and moved.float().mean() < 0.5 + 1e-3


def test_gmt_that_drops_nothing_is_full_fine_tuning(olmo2, text, tmp_path):
    """Over several steps: nothing is left of the gradients of the step before."""
    found = []
    for more in ([], ["--gmt-ratio", "0"]):
        out = tmp_path / str(len(more))
        train.main(arguments(olmo2, text, out, "--steps", "6", *more))
        found.append(weights(out))
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


def test_gmt_drops_exactly_the_share():
    grad = torch.randn(7, 9)
    for ratio, left in ((0, 63), (0.5, 32), (0.9, 7)):
        cut = gmt.drop_smallest(grad, ratio)
        assert (cut != 0).sum() == left and torch.equal(cut[cut != 0], grad[cut != 0])
        assert ratio == 0 or cut[cut != 0].abs().min() >= grad[cut == 0].abs().max()
    assert (gmt.drop_smallest(grad.bfloat16(), 0.5) != 0).sum() <= 32
    tied = torch.tensor([[1.0, -1.0, 2.0], [1.0, 3.0, -4.0]])
    assert gmt.drop_smallest(tied, 0.34).tolist() == [[0, 0, 2], [0, 3, -4]]
    broken = torch.tensor([[1.0, float("nan"), 2.0, float("inf")]])
    assert not torch.isfinite(gmt.drop_smallest(broken, 0.5)).all()


@pytest.mark.slow
def test_gmt_resumes_to_the_same_bits(olmo2, text, tmp_path):
    extra = ["--gmt-ratio", "0.5", "--micro-batch-size", "1", "--save-every", "5", "--steps", "10"]
    train.main(arguments(olmo2, text, tmp_path / "whole", *extra))
    pid = forked(train.main, arguments(olmo2, text, tmp_path / "out", *extra), stop_after_saving)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    train.main(arguments(olmo2, text, tmp_path / "out", *extra, "--resume"))
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.mark.parametrize("kind", ["qwen2", *SLOW_KINDS])
def test_adalora_merged_gives_the_logits_of_the_unmerged_model(
    kind, text, tmp_path, request, monkeypatch
):
    """Embeddings, head and adapted matrices move; norms do not; the ranks are pruned to Table
    8's.
    """
    source, unmerged = request.getfixturevalue(kind), {}
    ids = torch.arange(3, 60)[None]
    real = adalora.merge

    def keep_logits(model, *rest):
        model.eval()
        with torch.no_grad():
            unmerged["logits"] = model(input_ids=ids.to(model.device)).logits.cpu()
        unmerged["ranks"] = [
            int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name
        ]
        return real(model, *rest)

    monkeypatch.setattr(adalora, "merge", keep_logits)
    train.main(arguments(source, text, tmp_path / "out", "--adalora", "--steps", "30"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, unmerged["logits"], atol=1e-4)
    frozen = 0
    for name, before in load_file(source / "model.safetensors").items():
        trained = "embed" in name or "lm_head" in name or name.endswith("proj.weight")
        assert trained == (not torch.equal(merged.get_parameter(name), before)), name
        if not trained:
            frozen += before.numel()
    summary = json.loads((tmp_path / "out/train.jsonl").read_text().splitlines()[-1])["summary"]
    assert frozen > 0 and summary["frozen_verified"] == frozen
    # Pruned from 12 to Table 8's average of 8
    assert sum(unmerged["ranks"]) == 8 * len(unmerged["ranks"])


def test_adalora_refuses_to_save_a_frozen_weight_that_moved(olmo2, capsys):
    source = AutoModelForCausalLM.from_pretrained(olmo2, dtype=torch.float32)
    model = adalora.add_adapters(
        AutoModelForCausalLM.from_pretrained(olmo2, dtype=torch.float32), 6, 42
    )
    model.base_model.model.model.norm.weight.data[3] += 1
    with pytest.raises(SystemExit):
        adalora.merge(model, dict(source.named_parameters()))
    assert "model.norm.weight is frozen" in capsys.readouterr().err


def test_adapters_follow_from_the_seed(olmo2):
    found = []
    for seed in (1, 1, 2):
        model = AutoModelForCausalLM.from_pretrained(olmo2, dtype=torch.float32)
        model = adalora.add_adapters(model, 6, seed)
        found.append([p.detach() for name, p in model.named_parameters() if "lora_A" in name])
    assert all(map(torch.equal, found[0], found[1]))
    assert not any(map(torch.equal, found[0], found[2]))


def test_adalora_penalty_equals_the_one_of_peft(olmo2):
    model = adalora.add_adapters(
        AutoModelForCausalLM.from_pretrained(olmo2, dtype=torch.float32), 100, 42
    ).eval()
    ids = torch.arange(3, 60)[None]
    plain = model.get_base_model()(input_ids=ids, labels=ids).loss
    assert (model(input_ids=ids, labels=ids).loss - plain).item() == pytest.approx(
        adalora.penalty(model).item(), rel=1e-4
    )
    config = model.peft_config["default"]
    assert (config.total_step, config.tinit, config.tfinal, config.deltaT) == (100, 8, 70, 1)
    model = adalora.add_adapters(AutoModelForCausalLM.from_pretrained(olmo2), 12208, 42)
    config = model.peft_config["default"]
    names = "tinit tfinal deltaT init_r target_r lora_alpha lora_dropout beta1 beta2".split()
    assert {key: getattr(config, key) for key in (*names, "orth_reg_weight")} == dict(
        tinit=1000,
        tfinal=8546,
        deltaT=20,
        init_r=12,
        target_r=8,
        lora_alpha=32,
        lora_dropout=0.05,
        beta1=0.85,
        beta2=0.85,
        orth_reg_weight=0.5,
    )


@pytest.mark.slow
def test_adalora_depends_on_the_seed_alone_and_not_on_micro_batches(
    olmo2, text, tmp_path, monkeypatch
):
    real = adalora.add_adapters

    def without_dropout(*rest):
        model = real(*rest)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    monkeypatch.setattr(adalora, "add_adapters", without_dropout)
    found = []
    for size in (2, 2, 4):
        out = tmp_path / str(len(found))
        train.main(
            arguments(olmo2, text, out, "--adalora", "--steps", "6", "--micro-batch-size", size)
        )
        found.append(weights(out))
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name]), name
        assert torch.allclose(weight, found[2][name], atol=1e-3), name


@pytest.mark.parametrize("method", ["hft", "wanda-row", "wanda-element"])
def test_the_plan_names_the_share_that_the_proof_counts(
    method, llama, chats, text, tmp_path, capsys
):
    """Of masks of whole matrices, of rows (and the chat's tokens), of single weights."""
    mask = static_mask(method, llama, chats, tmp_path / "mask")
    train.main(arguments(llama, text, tmp_path / "out", "--mask", mask, "--steps", "1"))
    summary, sizes = log_of(tmp_path / "out")[-1]["summary"], load_file(llama / "model.safetensors")
    total = sum(weight.numel() for weight in sizes.values())
    assert summary["frozen_verified"] + summary["trainable"] == total
    share = summary["frozen_verified"] / total
    plan = f"{llama}: {total:,} parameters, {share:.1%} of them frozen by the masks\n"
    assert 0.05 < share < 0.95 and plan in capsys.readouterr().out


def test_methods_that_exclude_each_other_are_refused(
    olmo2, mask, text, tmp_path, refused, monkeypatch
):
    out = tmp_path / "out"
    for extra in (
        ["--mask", mask, "--gmt-ratio", "0.5"],
        ["--mask", mask, "--adalora"],
        ["--gmt-ratio", "0", "--adalora"],
        ["--mask", mask, "--gmt-ratio", "0.5", "--adalora"],
    ):
        assert "choose one" in refused(train.main, *arguments(olmo2, text, out, *extra))
    monkeypatch.setattr(shutil, "which", lambda name: name)  # a C++ compiler is there
    for extra, message in (
        (["--adalora", "--save-every", "5"], "takes no --save-every"),
        (["--gmt-ratio", "1"], "below 1"),
        (["--adalora", "--precision", "fp16"], "fp16, bf16-true"),
        (["--adalora", "--precision", "bf16-true"], "fp16, bf16-true"),
        (["--adalora", "--compile"], "takes no --save-every, --resume, --compile"),
        (["--adalora", "--resume"], "takes no --save-every"),
        (["--gmt-ratio", "nan"], "below 1"),
    ):
        assert message in refused(train.main, *arguments(olmo2, text, out, *extra))
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install peft" in refused(train.main, *arguments(olmo2, text, out, "--adalora"))
    assert not out.exists()


def test_full_fine_tuning_equals_adamw_step_for_step(olmo2, text, tmp_path):
    more = ["--weight-decay", "0.1", "--warmup-ratio", "0.21", "--micro-batch-size", "3"]
    train.main(arguments(olmo2, text, tmp_path / "out", *more))
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    ids = []
    for line in text.read_text().splitlines():
        ids += tokenizer(json.loads(line)["text"])["input_ids"] + [0]
    blocks = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    model = AutoModelForCausalLM.from_pretrained(olmo2, dtype=torch.float32)
    no_decay = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": no_decay, "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, 5, 20)
    lines = [line for line in log_of(tmp_path / "out") if line.get("step", 0) > 0]
    for step in range(20):
        # the whole batch at once here, two uneven micro-batches there
        batch = blocks[batch_indices(step, 4, len(blocks), 42)]
        loss = F.cross_entropy(
            model(input_ids=batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert lines[step]["loss"] == pytest.approx(loss.item(), abs=2e-4)
        assert lines[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert lines[step]["tokens"] == (step + 1) * 4 * 32
        assert lines[step]["lr"] == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for name, value in weights(tmp_path / "out").items():
        assert torch.allclose(value, model.get_parameter(name), atol=2e-4), name


def test_gradient_checkpointing_computes_each_layer_twice_a_step(llama, text, tmp_path):
    calls, seen = {}, []
    for options in ((), ("--gradient-checkpointing",)):
        seen.clear()
        hook = register_module_forward_pre_hook(lambda module, *_: seen.append(type(module)))
        try:
            train.main(arguments(llama, text, tmp_path / f"out{len(options)}", *options))
        finally:
            hook.remove()
        calls[options] = seen.count(LlamaMLP)
    assert calls["--gradient-checkpointing",] == 2 * calls[()] > 0
    saved = weights(tmp_path / "out1")
    for name, weight in weights(tmp_path / "out0").items():
        assert torch.equal(weight, saved[name]), name


def test_bf16_true_decays_weights_once(olmo2, text, tmp_path):
    check_decay(olmo2, text, tmp_path)


def check_decay(model, text, folder, *more):
    """Embeddings of tokens that the text does not have get a zero gradient: decay alone moves them,
    and is rounded to bf16 in each step.
    """
    more = ["--precision", "bf16-true", "--weight-decay", "1", *more]
    train.main(arguments(model, text, folder / "out", *more))
    absent = sorted(set(range(400)) - set(next_tokens(model, text)[0].tolist()))
    name = "model.embed_tokens.weight"
    rows = load_file(model / "model.safetensors")[name][absent].bfloat16()
    for line in log_of(folder / "out"):
        if line.get("step"):
            rows = (rows.float() * (1 - line["lr"])).bfloat16()
    assert absent and torch.equal(weights(folder / "out")[name][absent], rows.float())


def test_dropout_is_of_training_alone_and_follows_from_the_seed(text, tmp_path):
    model = tiny_model(tmp_path / "m", "llama", attention_dropout=0.5)
    more = ["--steps", "3", "--target-eval", text, "--eval-tokens", "32"]
    for name in "ab":
        train.main(arguments(model, text, tmp_path / name, *more))
    assert all(
        torch.equal(w, weights(tmp_path / "b")[n]) for n, w in weights(tmp_path / "a").items()
    )
    tokens = torch.tensor(next_tokens(model, text)[0]).view(-1, 32)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        heldout, first = (
            train.next_token_loss(plain, ids).item() / (len(ids) * 31)
            for ids in (tokens[:1], tokens[batch_indices(0, 4, len(tokens), 42)])
        )
    _, before, step, *_ = log_of(tmp_path / "a")
    assert before["target_loss"] == pytest.approx(heldout, abs=1e-5)
    assert abs(step["loss"] - first) > 1e-3  # the rate of the first step is 0


def test_masked_update_equals_an_independent_masked_adamw(olmo2, mask, text, tmp_path):
    """The shield from its definition: Adam and decay written out, multiplied by b_ij, in
    float64.
    """
    train.main(
        arguments(
            olmo2, text, tmp_path / "out", "--mask", mask, "--weight-decay", "0.1", "--steps", "5"
        )
    )
    tokens, _ = next_tokens(olmo2, text)
    blocks = torch.tensor(tokens).view(-1, 32)
    model = AutoModelForCausalLM.from_pretrained(olmo2, dtype=torch.float64)
    masks = {name: m.double() for name, m in load_file(mask).items()}
    m1, m2 = ({name: torch.zeros_like(p) for name, p in model.named_parameters()} for _ in range(2))
    for step in range(5):
        batch = blocks[batch_indices(step, 4, len(blocks), 42)]
        F.cross_entropy(
            model(input_ids=batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        ).backward()
        grads = {name: p.grad * masks.get(name, 1) for name, p in model.named_parameters()}
        norm = math.sqrt(sum(g.pow(2).sum().item() for g in grads.values()))
        lr = 1e-2 * (0 if step == 0 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 4)))
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = grads[name] * min(1, 1 / (norm + 1e-6))
                m1[name] = 0.9 * m1[name] + 0.1 * g
                m2[name] = 0.999 * m2[name] + 0.001 * g * g
                update = (m1[name] / (1 - 0.9 ** (step + 1))) / (
                    (m2[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                )
                p -= lr * masks.get(name, 1) * (update + (0.1 * p if p.dim() > 1 else 0))
                p.grad = None
    for name, value in weights(tmp_path / "out").items():
        close = torch.isclose(value.double(), model.get_parameter(name), atol=1e-4)
        # Adam amplifies rounding where a gradient is next to 0.
        assert close.float().mean() > 0.999, name


def next_tokens(model, text, flag="--data"):
    """The token ids of a text, [tokens], and its counts, as train.py reads it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    sequences, counts = load_sequences(tokenizer, "x", 32, flag, str(text))
    return sequences[:]["input_ids"].flatten().numpy(), counts


def test_tokens_are_the_documents_each_ended_and_cached(olmo2, text, tmp_path):
    tokens, counts = next_tokens(olmo2, text)
    tokenizer, expected = AutoTokenizer.from_pretrained(olmo2), []
    for line in text.read_text().splitlines():
        expected += tokenizer(json.loads(line)["text"])["input_ids"] + [0]
    assert tokens.tolist() == expected[: len(expected) // 32 * 32]
    assert counts["documents"] == 60 and counts["tokens"] == len(expected)
    assert counts["bytes"] == sum(
        len(json.loads(line)["text"].encode()) for line in text.read_text().splitlines()
    )
    for seq_len in (16, 32):  # one cache for each
        sequences, _ = load_sequences(tokenizer, "x", seq_len, "--data", str(text))
        assert sequences[0]["input_ids"].shape == (seq_len,)
    key = sequences.cache_files[0]["filename"]
    before = os.stat(key).st_mtime_ns
    next_tokens(olmo2, text)
    assert os.stat(key).st_mtime_ns == before


def cache_of(tokenizer, text):
    sequences, _ = load_sequences(tokenizer, "cache", 32, "--data", str(text))
    return sequences.cache_files[0]["filename"], sequences[:]["input_ids"].flatten().tolist()


def test_tokens_are_made_again_after_a_change_of_the_code(olmo2, text, tmp_path, monkeypatch):
    """Of any of the three files that they depend on, wherever these lie."""
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    caches = [cache_of(tokenizer, text)[0]]
    names = ("blocks.py", "models.py", "rows.py")
    for name in names:
        shutil.copy(ROOT / "data" / name, tmp_path)
    monkeypatch.setattr(blocks, "__file__", str(tmp_path / "blocks.py"))
    assert cache_of(tokenizer, text)[0] == caches[0]
    for name in names:
        with open(tmp_path / name, "a") as file:
            file.write("# changed\n")
        caches.append(cache_of(tokenizer, text)[0])
    assert len(set(caches)) == 4


def test_tokens_are_made_again_with_another_end_of_text(olmo2, text, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    first, tokens = cache_of(tokenizer, text)
    tokenizer.save_pretrained(tmp_path)
    for path in tmp_path.glob("tokenizer*.json"):  # <|im_end|>, 2, is the only end
        path.write_text(path.read_text().replace("<|endoftext|>", "<|other|>"))
    second, others = cache_of(AutoTokenizer.from_pretrained(tmp_path), text)
    assert first != second and 0 in tokens and 2 not in tokens
    assert others == [2 if token == 0 else token for token in tokens]


def test_special_tokens_of_the_tokenizer_are_kept_and_the_end_is_not_doubled(olmo2, text):
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>",
        special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)],
    )
    sequences, _ = load_sequences(tokenizer, "special", 32, "--data", str(text))
    tokens = sequences[:]["input_ids"].flatten()
    (ends,) = (tokens[:-1] == 0).nonzero(as_tuple=True)
    assert tokens[0] == 1 and len(ends) > 9 and (tokens[ends + 1] == 1).all()


def test_control_tokens_quoted_in_raw_text_are_spelled_out_and_chats_are_templated(olmo2, tmp_path):
    quoted = write_jsonl(
        tmp_path / "quoted.jsonl", [{"text": "a <|im_end|> b " * 20}, {"text": ""}]
    )
    tokens, _ = next_tokens(olmo2, quoted)
    assert 2 not in tokens and "<|im_end|>" in AutoTokenizer.from_pretrained(olmo2).decode(tokens)
    chat = [{"role": "user", "content": "Why? " * 20}, {"role": "assistant", "content": "So."}]
    rows = write_jsonl(tmp_path / "chat.jsonl", [{"messages": chat}])
    tokens, _ = next_tokens(olmo2, rows, "--source-eval")
    assert tokens[0] == 1


def test_held_out_chats_do_not_depend_on_the_day(olmo2, chats, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }} {{ messages[0]['content'] }} "
    sequences, _ = load_sequences(tokenizer, "y", 32, "--source-eval", str(chats))
    assert tokenizer.decode(sequences[0]["input_ids"]).startswith("2025-01-01 ")


def test_data_order_is_a_shuffle_that_depends_on_seed_and_step_alone():
    drawn = [i for step in range(10) for i in batch_indices(step, 4, 20, 1)]
    assert sorted(drawn[:20]) == sorted(drawn[20:]) == list(range(20))
    assert drawn[:20] != drawn[20:] != sorted(drawn[20:])
    assert batch_indices(7, 4, 20, 1) == drawn[28:32] and batch_indices(0, 4, 20, 2) != drawn[:4]


def test_heldout_bits_per_byte(olmo2, text, chats, tmp_path):
    more = ["--source-eval", chats, "--target-eval", text, "--eval-tokens", 320]
    more += ["--steps", "4", "--eval-every", "2"]
    train.main(arguments(olmo2, text, tmp_path / "out", *more))
    lines = {line["step"]: line for line in log_of(tmp_path / "out") if "step" in line}
    assert all(
        {"source_bpb", "target_bpb", "source_loss"} <= set(lines[step]) for step in (0, 2, 4)
    )
    assert "source_bpb" not in lines[1]
    tokens, facts = next_tokens(olmo2, text)
    blocks = torch.tensor(tokens).view(-1, 32)
    assert len(blocks) > 20
    blocks = blocks[[i * (len(blocks) - 1) // 9 for i in range(10)]]  # 320 tokens, taken evenly
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(olmo2, dtype=torch.float32)(
            input_ids=blocks
        ).logits
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()).item()
    assert lines[0]["target_loss"] == pytest.approx(nats, abs=1e-5)
    assert lines[0]["target_bpb"] == pytest.approx(
        nats / math.log(2) * facts["tokens"] / facts["bytes"], abs=1e-5
    )
    assert lines[4]["target_bpb"] < lines[0]["target_bpb"]


def test_saved_folder_is_ordinary_and_tokenizer_files_are_copied_byte_for_byte(
    olmo2, text, tmp_path, capsys
):
    model = shutil.copytree(olmo2, tmp_path / "model")
    (model / "LICENSE.md").write_text("terms")
    (model / "README.md").write_text("of the source")
    (model / "model-q4.gguf").write_text("the source's weights, which are not these")
    train.main(arguments(model, text, tmp_path / "out", "--steps", "2"))
    assert not (tmp_path / "out/model/model-q4.gguf").exists()
    assert "of the source" != (tmp_path / "out/model/README.md").read_text()
    for name in (
        "LICENSE.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (tmp_path / "out/model" / name).read_bytes() == (model / name).read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert not (tmp_path / "out/checkpoint").exists() and not list(tmp_path.rglob("*.tmp"))
    out = capsys.readouterr().out
    for said in (
        "per byte",
        "first sequence: '",
        " trainable weights",
    ):
        assert said in out


@pytest.mark.parametrize(
    "precision, seq_len, kernel",
    [
        ("bf16", 128, "eager"),
        ("bf16-true", 16, "eager"),
        ("bf16", 129, "sdpa"),
        ("fp32", 16, "sdpa"),
    ],
)
def test_short_sequences_in_bf16_take_attention_written_out_on_a_cpu(
    llama, text, tmp_path, capsys, precision, seq_len, kernel
):
    settings = ("--steps", "1", "--precision", precision, "--seq-len", str(seq_len))
    settings += ("--device", "cpu")
    train.main(arguments(llama, text, tmp_path / "out", *settings))
    assert f"attention: {kernel}\n" in capsys.readouterr().out


def test_a_model_is_the_same_under_another_card_but_not_with_another_template(olmo2, tmp_path):
    model = shutil.copytree(olmo2, tmp_path / "model")
    key = files.model_key(str(model), model)
    (model / "README.md").write_text("results are added here after training")
    assert files.model_key(str(model), model) == key
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert files.model_key(str(model), model) != key


def test_a_buffer_that_bf16_does_not_hold_is_saved_as_it_is(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model.register_buffer("fine", torch.tensor([5.001, 5.002]))
    model.register_buffer("coarse", torch.tensor([5.0, 2.0]))
    source = {name: p.detach() for name, p in model.named_parameters()}
    real, saved_from = model.save_pretrained, {}

    def save(out, state_dict):
        saved_from.update({name: tensor.data_ptr() for name, tensor in state_dict.items()})
        real(out, state_dict=state_dict)

    model.save_pretrained = save
    files.save_model(model, source, torch.bfloat16, llama, tmp_path / "out")
    for name, p in model.named_parameters():  # there is one copy of each weight
        assert name not in source and p.data_ptr() == saved_from[name]
    saved = load_file(tmp_path / "out/model.safetensors")
    assert saved["fine"].tolist() == torch.tensor([5.001, 5.002]).tolist()
    assert saved["coarse"].dtype == torch.bfloat16


def test_bf16_source_is_saved_as_bf16_with_frozen_bits_kept(chats, text, tmp_path):
    model = tiny_model(tmp_path / "source", "olmo2")
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    masks = make_masks(model, chats, tmp_path)
    train.main(arguments(model, text, tmp_path / "out", "--mask", masks, "--steps", "3"))
    source, trained = load_file(model / "model.safetensors"), weights(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    keep = load_file(masks)[name][0] == 0
    assert trained[name].dtype == torch.bfloat16 and torch.equal(
        source[name][:, keep], trained[name][:, keep]
    )


def without_times(lines):
    times = ("ms_per_step", "tokens_per_second", "peak_memory")
    return [{key: value for key, value in line.items() if key not in times} for line in lines[1:-1]]


def test_kills_then_the_same_bits(olmo2, mask, text, tmp_path):
    """kill -9 at random moments, while it saves too; then the bits of a whole run."""
    extra = ["--mask", mask, "--save-every", "1", "--steps", 12, "--weight-decay", "0.1"]
    extra += ["--target-eval", text, "--eval-every", "7"]
    train.main(arguments(olmo2, text, tmp_path / "whole", *extra))
    out, rng, seen = tmp_path / "broken", random.Random(0), []

    # so that all kills fall into the few short steps, many of them while a checkpoint is written
    def slow_disk():
        real = os.replace
        files.os.replace = lambda a, b: (time.sleep(0.05), real(a, b))

    for _ in range(3):
        before = step_of(out)
        pid = forked(
            train.main,
            arguments(olmo2, text, out, *extra, *(["--resume"] if before else [])),
            slow_disk,
        )
        while step_of(out) == before:  # at least one step further
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended before it was killed"
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        seen.append(step_of(out))
    assert seen == sorted(set(seen)) and seen[-1] < 12
    train.main(arguments(olmo2, text, out, *extra, "--resume"))
    whole, broken = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert without_times(log_of(tmp_path / "whole")) == without_times(log_of(out))
    assert not list(tmp_path.rglob("*.tmp"))


def test_killed_between_saving_the_model_and_naming_it(olmo2, text, tmp_path, monkeypatch, refused):
    """With checkpoints of many files."""
    extra = ["--save-every", "8"]
    monkeypatch.setattr(files, "CHECKPOINT_FILE", 30_000)
    train.main(arguments(olmo2, text, tmp_path / "whole", *extra))

    def die_when_the_model_gets_its_name():
        real = os.replace
        files.os.replace = lambda a, b: os._exit(9) if Path(b).name == "model" else real(a, b)

    pid = forked(
        train.main,
        arguments(olmo2, text, tmp_path / "out", *extra),
        die_when_the_model_gets_its_name,
    )
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert (tmp_path / "out/model.tmp").exists() and not (tmp_path / "out/model").exists()
    (newest,) = (tmp_path / "out/checkpoint").iterdir()  # that of step 8 is removed
    assert newest.name == "step-16"
    shards = list(newest.glob("*.safetensors"))
    assert len(shards) > 9 and max(path.stat().st_size for path in shards) < 120_000
    train.main(arguments(olmo2, text, tmp_path / "out", *extra, "--resume"))
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert without_times(log_of(tmp_path / "whole")) == without_times(log_of(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model", "train.jsonl"]
    again = arguments(olmo2, text, tmp_path / "out", *extra, "--resume")
    assert "holds a finished model" in refused(train.main, *again)


@pytest.fixture()
def checkpointed(olmo2, text, tmp_path):
    """A folder with a checkpoint of step 10 of 20, as a killed run leaves it."""
    pid = forked(
        train.main,
        arguments(olmo2, text, tmp_path / "out", "--save-every", "10"),
        stop_after_saving,
    )
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    return tmp_path / "out"


def test_resume_under_other_settings_is_refused(
    olmo2, llama, mask, text, tmp_path, checkpointed, refused
):
    state = state_of(checkpointed)
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "entirely other text " * 40}])
    base = arguments(olmo2, text, checkpointed, "--save-every", "10")
    for extra, message in [
        (["--lr", "0.02"], "lr was 0.01, is 0.02"),
        (["--seed", "1"], "seed was 42, is 1"),
        (["--data", other], "data was"),
        (["--mask", mask], "mask was"),
        (["--model", tiny_model(tmp_path / "m", "olmo2", seed=5)], "model was"),
        (["--steps", "30"], "steps was 20, is 30"),
    ]:
        assert message in refused(train.main, *base, "--resume", *extra)
    assert "Add --resume" in refused(train.main, *base)
    assert all(torch.equal(value, state[name]) for name, value in state_of(checkpointed).items())
    train.main([*base, "--resume"])
    assert "finished model" in refused(train.main, *base)

    # Killed half-way through the removal of its last checkpoint
    (checkpointed / "checkpoint/step-10").mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        train.main([*base, "--resume"])
    assert ended.value.code == 0 and not (checkpointed / "checkpoint").exists()


def test_what_changes_no_weight_may_change_on_resume(olmo2, text, tmp_path, checkpointed):
    base = arguments(olmo2, text, tmp_path / "whole", "--save-every", "10")
    train.main(base)
    more = ["--eval-tokens", "32", "--log-every", "3", "--eval-every", "4", "--save-every", "6"]
    more += ["--timeout", "9", "--target-eval", text, "--resume"]
    train.main(arguments(olmo2, text, checkpointed, *more))
    whole, resumed = weights(tmp_path / "whole"), weights(checkpointed)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_number_of_threads_is_refused_on_resume(olmo2, text, checkpointed, refused):
    """Sums over threads have another order, and so other bits."""
    base = arguments(olmo2, text, checkpointed, "--save-every", "10", "--resume")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        line = refused(train.main, *base)
    finally:
        torch.set_num_threads(threads)
    assert f"threads was {threads}, is {threads + 1}" in line
    train.main(base)


def test_damaged_checkpoint_is_refused(olmo2, text, checkpointed, refused):
    base = arguments(olmo2, text, checkpointed, "--save-every", "10", "--resume")
    folder = files.newest_checkpoint(checkpointed)
    (shard,) = folder.glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    assert "is damaged" in refused(train.main, *base)
    shard.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    assert "is damaged" in refused(train.main, *base)
    shard.write_bytes(whole)
    (folder / "checkpoint.json").write_text("{")
    assert "is damaged" in refused(train.main, *base)


def test_foreign_files_in_out_are_kept(olmo2, text, tmp_path, refused):
    (tmp_path / "out").mkdir()
    data = tmp_path / "out/train.jsonl"
    data.write_bytes(text.read_bytes())
    assert "did not write" in refused(train.main, *arguments(olmo2, data, tmp_path / "out"))
    assert data.read_bytes() == text.read_bytes()
    mine = tmp_path / "third/model.tmp/mine.txt"  # without a log or a checkpoint beside it
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert "did not write" in refused(train.main, *arguments(olmo2, text, tmp_path / "third"))
    assert [path for path in mine.parent.parent.rglob("*") if path.is_file()] == [mine]
    notes = tmp_path / "other/checkpoint/notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    train.main(arguments(olmo2, text, tmp_path / "other", "--steps", "2", "--save-every", "1"))
    assert notes.read_text() == "mine" and not list(notes.parent.glob("step-*"))


def test_a_link_in_the_place_of_the_checkpoint_folder_stays(olmo2, text, tmp_path):
    """To a larger disk, for instance."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/checkpoint").symlink_to(tmp_path / "disk")
    extra = ["--steps", "4", "--save-every", "2"]
    pid = forked(train.main, arguments(olmo2, text, tmp_path / "out", *extra), stop_after_saving)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["step-2"]
    train.main(arguments(olmo2, text, tmp_path / "out", *extra, "--resume"))
    assert (tmp_path / "out/model/model.safetensors").exists()
    assert (tmp_path / "out/checkpoint").is_symlink() and not list((tmp_path / "disk").iterdir())


def test_two_runs_into_one_directory_are_refused(olmo2, text, tmp_path, refused):
    (tmp_path / "out").mkdir()
    with files.locked(tmp_path / "out", False):
        assert "another train.py" in refused(train.main, *arguments(olmo2, text, tmp_path / "out"))


def test_a_log_that_is_gone_does_not_stand_in_the_way(olmo2, text, checkpointed):
    (checkpointed / "train.jsonl").unlink()
    train.main(arguments(olmo2, text, checkpointed, "--save-every", "10", "--resume"))
    assert [line["step"] for line in log_of(checkpointed)[1:-1]] == list(range(11, 21))


def test_speed_is_of_the_steps_since_resume(olmo2, text, checkpointed):
    began = time.perf_counter()
    train.main(arguments(olmo2, text, checkpointed, "--save-every", "10", "--resume"))
    elapsed = time.perf_counter() - began
    line = log_of(checkpointed)[-2]
    assert line["step"] == 20 and 10 * (line["ms_per_step"] - 0.5) <= 1000 * elapsed
    assert line["tokens_per_second"] == pytest.approx(128_000 / line["ms_per_step"], rel=0.3)


def test_a_log_line_that_a_kill_cut_does_not_stand_in_the_way(olmo2, text, checkpointed):
    with open(checkpointed / "train.jsonl", "ab") as file:
        file.write(b'{"step": 11, "lo\xff')
    train.main(arguments(olmo2, text, checkpointed, "--save-every", "10", "--resume"))
    assert [line["step"] for line in log_of(checkpointed)[1:-1]] == list(range(21))


def test_nothing_to_resume(olmo2, text, tmp_path, refused):
    assert "no checkpoint" in refused(
        train.main, *arguments(olmo2, text, tmp_path / "out", "--resume")
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "no such file"),
        ("", "no text"),
        ('{"text": "a"}\n{broken\n', "row 2 is not JSON"),
        ('{"text": "a"}\n{"text": "\udcff"}\n', "row 2 is not JSON, or not UTF-8"),
        ('{"messages": []}\n', "no usable `text`"),
        ("[1]\n", "it begins a JSON array"),
        ('{"text": "\\ud83d"}\n', "no usable `text`"),
        ('{"text": "short"}\n', "do not fill one sequence"),
        ("[" * 100_000 + "\n", "row 1 is not JSON"),
    ],
)
def test_bad_training_text(content, message, olmo2, tmp_path, refused):
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_bytes(content.encode(errors="surrogateescape"))
    assert message in refused(train.main, *arguments(olmo2, data, tmp_path / "run/out"))
    assert [
        path for path in tmp_path.rglob("*") if path.is_file() and path != data
    ] == []  # nothing was written


def test_bad_chats_damaged_archives_and_hyperparameters(olmo2, text, tmp_path, refused):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": "Hello"}])
    archive = tmp_path / "a.jsonl.gz"
    archive.write_bytes(b"no gzip")
    out = tmp_path / "out"
    for extra, message in (
        (["--source-eval", chats], "row 1 has no usable `text`"),
        (["--data", archive], "damaged"),
        (["--lr", "nan"], "--lr"),
        (["--max-grad-norm", "-1"], "--max-grad-norm"),
        (["--seed", "-1"], "--seed"),
        (["--device", "gpu"], "invalid choice"),
        (["--seq-len", "1024"], "takes at most 512 tokens"),
    ):
        assert message in refused(train.main, *arguments(olmo2, text, out, *extra))
    assert not out.exists()


def test_a_sequence_may_be_as_long_as_the_context(olmo2, text, tmp_path):
    assert AutoModelForCausalLM.from_pretrained(olmo2).config.max_position_embeddings == 512
    more = ["--seq-len", "512", "--steps", "2", "--batch-size", "1"]
    train.main(arguments(olmo2, text, tmp_path / "out", *more))
    assert log_of(tmp_path / "out")[-2]["tokens"] == 2 * 512


def test_models_that_do_not_fit_their_config_are_refused(olmo2, text, chats, tmp_path, refused):
    def refused_with(*more, **change):
        shutil.copytree(olmo2, tmp_path / "m", dirs_exist_ok=True)
        config = json.loads((olmo2 / "config.json").read_text()) | change
        (tmp_path / "m/config.json").write_text(json.dumps(config))
        return refused(train.main, *arguments(tmp_path / "m", text, tmp_path / "out", *more))

    assert "mismatch" in refused_with(intermediate_size=40)
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    tokenizer.save_pretrained(tmp_path / "m")
    assert "no such role" in refused(
        train.main, *arguments(tmp_path / "m", text, tmp_path / "out", "--source-eval", chats)
    )
    (tmp_path / "m/chat_template.jinja").unlink()
    assert "no chat template" in refused(
        train.main, *arguments(tmp_path / "m", text, tmp_path / "out", "--source-eval", chats)
    )


def test_incomplete_or_pickled_model_files_are_refused(text, tmp_path, refused):
    """A tensor that the files lack would be random; a pickle is never read."""
    model = tiny_model(tmp_path / "m", "olmo2")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(model / "model.safetensors")
    missing = tensors.pop(name)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    stages = {
        train.main: arguments(model, text, tmp_path / "out"),
        score.main: ["--model", model, "--method", "magnitude", "--out", tmp_path / "scores"],
    }
    for main, argv in stages.items():
        assert f"lack ['{name}']" in refused(main, *argv)
    (model / "model.safetensors").unlink()
    torch.save(tensors | {name: missing}, model / "pytorch_model.bin")
    for main, argv in stages.items():
        assert "safetensors" in refused(main, *argv)
    assert not (tmp_path / "scores").exists()


def test_files_finer_than_the_config_says_keep_their_frozen_bits(chats, text, tmp_path):
    """fp32 weights under a config that says bfloat16: what is saved must not be rounded."""
    model = tiny_model(tmp_path / "source", "olmo2")
    config = json.loads((model / "config.json").read_text()) | {"dtype": "bfloat16"}
    (model / "config.json").write_text(json.dumps(config))
    masks = make_masks(model, chats, tmp_path)
    train.main(arguments(model, text, tmp_path / "out", "--mask", masks, "--steps", "3"))
    source, trained, masks = (
        load_file(model / "model.safetensors"),
        weights(tmp_path / "out"),
        load_file(masks),
    )
    for name, mask in masks.items():
        keep = mask.expand(source[name].shape) == 0
        assert torch.equal(source[name][keep], trained[name][keep]), name


def rewritten(mask, path, change):
    with safe_open(mask, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    change(metadata, tensors)
    metadata["tensors_sha256"] = digest_of(tensors)
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda m, t: t.pop("model.norm.weight"), "no mask for ['model.norm.weight']"),
        (
            lambda m, t: t.update({"other.weight": torch.ones(1, 32, dtype=torch.uint8)}),
            "other.weight [1, 32] does not fit",
        ),
        (
            lambda m, t: t.update({"model.norm.weight": torch.ones(5, dtype=torch.uint8)}),
            "model.norm.weight [5] does not fit",
        ),
        (
            lambda m, t: t.update({"model.norm.weight": torch.full((32,), 2, dtype=torch.uint8)}),
            "does not fit",
        ),
        (lambda m, t: m.update(format="ssu-scores"), "not a mask file"),
        (lambda m, t: m.update(fingerprint="0"), "parameters differ"),
    ],
)
def test_unfit_masks(change, message, olmo2, mask, text, tmp_path, refused):
    bad = rewritten(mask, tmp_path / "bad.safetensors", change)
    assert message in refused(train.main, *arguments(olmo2, text, tmp_path / "out", "--mask", bad))
    assert not (tmp_path / "out").exists()


def test_scores_of_another_model_end_here(llama, chats, olmo2, text, tmp_path, refused):
    foreign = make_masks(llama, chats, tmp_path)
    assert "parameters differ" in refused(
        train.main, *arguments(olmo2, text, tmp_path / "out", "--mask", foreign)
    )
    (tmp_path / "cut").write_bytes(foreign.read_bytes()[:-50])
    assert "cannot be read" in refused(
        train.main, *arguments(olmo2, text, tmp_path / "out", "--mask", tmp_path / "cut")
    )


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path):
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint/step-{step}").mkdir(parents=True)
        (tmp_path / f"checkpoint/step-{step}/checkpoint.json").write_text("{}")
    (tmp_path / "checkpoint/step-11").mkdir()  # of a kill: not complete
    assert files.newest_checkpoint(tmp_path).name == "step-10"


def test_a_copy_of_a_checkpoint_is_not_one(tmp_path):
    for name in ("step-2", "step-2.tmp", "step-9", "step-9-copy", "step-12.bak1"):
        (tmp_path / "checkpoint" / name).mkdir(parents=True)
        (tmp_path / "checkpoint" / name / "checkpoint.json").write_text("{}")
    newest = files.newest_checkpoint(tmp_path)
    assert newest.name == "step-9"
    files.remove_checkpoints(tmp_path, keep=newest)
    left = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert left == {"step-9", "step-9-copy", "step-12.bak1"}


def test_model_and_out_that_do_not_exist(olmo2, text, tmp_path, refused):
    assert "no such directory" in refused(
        train.main, *arguments("./nowhere", text, tmp_path / "out")
    )
    same = olmo2 / ".." / olmo2.name
    assert "is the folder of the source" in refused(train.main, *arguments(olmo2, text, same))
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(train.main, *arguments(olmo2, text, tmp_path / "file/out"))


def test_non_finite_loss_stops_at_its_step_with_the_checkpoint_intact(
    olmo2, text, tmp_path, refused
):
    """A model whose final norm overflows from the first step on; before it, the checkpoint of a
    healthy run.
    """
    message = refused(
        train.main,
        *arguments(
            olmo2,
            text,
            tmp_path / "out",
            "--lr",
            "1e38",
            "--save-every",
            "1",
            "--max-grad-norm",
            "0",
        ),
    )
    step = int(re.search(r"step (\d+):", message).group(1))
    assert step in (2, 3)  # step 1 has a learning rate of 0, step 2 overflows
    assert step_of(tmp_path / "out") == step - 1
    assert all(torch.isfinite(t).all() for t in state_of(tmp_path / "out").values())
    assert not (tmp_path / "out/model").exists()


@pytest.mark.parametrize("limit,every,name", [(60_000, 5, "checkpoint"), (170_000, 0, "model.tmp")])
def test_full_disk_is_one_line_and_loses_nothing(
    limit, every, name, olmo2, text, checkpointed, tmp_path
):
    """A limit on the size of a file stands for a full disk: a write fails half-way."""
    before = {path: path.read_bytes() for path in checkpointed.rglob("*.safetensors")}
    errors = tmp_path / "stderr"
    out = checkpointed
    argv = arguments(olmo2, text, out, "--save-every", every, "--resume")
    pid = forked(train.main, argv, limit_file_size(limit, errors))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    (line,) = [line for line in errors.read_text().splitlines() if "train.py: error" in line]
    assert "intact" in line
    assert {path: path.read_bytes() for path in before} == before
    assert not (out / "model").exists()
    assert (out / "model.tmp").exists() == (name == "model.tmp")


def test_the_proof_refuses_what_moved_and_what_is_not_finite(capsys):
    """The first of two columns is frozen."""
    for column, value, message in (
        (0, 9.0, "frozen weights of 0.weight moved"),
        (1, math.nan, "finite"),
        (1, 70_000.0, "finite"),  # above the largest number of fp16
    ):
        model = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False))
        source = {"0.weight": model[0].weight.detach().clone()}
        masks = {"0.weight": torch.tensor([[0, 1]], dtype=torch.uint8)}
        assert train.verify_and_copy(model, source, masks, torch.float16) == [3, 3, 0]
        model[0].weight.data[1, column] = value
        with pytest.raises(SystemExit):
            train.verify_and_copy(model, source, masks, torch.float16)
        assert message in capsys.readouterr().err


def test_the_loss_is_in_fp32(olmo2):
    model = AutoModelForCausalLM.from_pretrained(olmo2, dtype=torch.bfloat16)
    tokens = torch.arange(64).view(2, 32)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1].double()
    exact = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    loss = train.next_token_loss(model, tokens)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_fp16_leaves_out_a_step_that_overflows(olmo2, mask, text, tmp_path):
    """The loss scale starts at 65,536: gradients overflow, the step is left out, decay included."""
    train.main(
        arguments(
            olmo2,
            text,
            tmp_path / "out",
            "--mask",
            mask,
            "--precision",
            "fp16",
            "--weight-decay",
            "0.1",
        )
    )
    norms = [line["grad_norm"] for line in log_of(tmp_path / "out") if line.get("step")]
    assert norms[0] is None and norms[-1] is not None
    assert sum(norm is not None for norm in norms) > 10
