"""train.py --optimizer adamw8bit: refusals, torchao's update, the shield and exact resume.

The slow tests need torchao, which tests/slow-requirements.txt installs.
"""

import os
import shutil
import sysconfig
from types import SimpleNamespace

import pytest
import torch
from conftest import forked, tiny_model
from safetensors.torch import load_file
from test_train import (
    arguments,
    check_decay,
    log_of,
    make_masks,
    state_of,
    static_mask,
    stop_after_saving,
    weights,
)

import train
from variants import adamw8bit

BITS8 = ["--precision", "bf16-true", "--optimizer", "adamw8bit"]
LARGE = dict(hidden_size=128, intermediate_size=256)  # blocks of 256 fit most matrices


@pytest.mark.parametrize(
    "more, message",
    [
        (["--optimizer", "adamw8bit"], "needs --precision bf16-true"),
        (BITS8, "pip install torchao==0.0.0"),
    ],
    ids=" ".join,
)
def test_what_does_not_fit_is_refused(more, message, olmo2, text, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(adamw8bit, "VERSION", "0.0.0")  # of which there is none
    assert message in refused(train.main, *arguments(olmo2, text, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_several_ranks_are_refused_by_name(olmo2, text, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(adamw8bit, "WORLD", 2)
    message = refused(train.main, *arguments(olmo2, text, tmp_path / "out", *BITS8))
    assert "--optimizer adamw8bit runs in one process" in message


@pytest.mark.parametrize("present", [[], ["Python.h"], ["gcc"]], ids=" ".join)
def test_what_triton_needs_on_a_gpu_is_asked_for(present, tmp_path, monkeypatch):
    """A compiler, and the header of Python."""
    for name in present:
        (tmp_path / name).touch()
    monkeypatch.setattr(shutil, "which", lambda name: name if name in present else None)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    asked = SimpleNamespace(optimizer="adamw8bit", precision="bf16-true", device="cuda")
    said = []
    adamw8bit.check(asked, said.append)
    assert "--optimizer adamw8bit needs gcc and python3-dev on a GPU. Install both" in said
    for name in ("gcc", "Python.h"):
        (tmp_path / name).touch()
        present.append(name)
    said.clear()
    adamw8bit.check(asked, said.append)
    assert not any("gcc" in line for line in said)


def test_the_state_takes_two_bytes_a_weight():
    large = torch.zeros(64, 1024).bfloat16()
    nbytes = sum(t.nbytes for t in adamw8bit.new_state(large).values()) - 4  # the step
    assert nbytes == large.numel() * 2 + 2 * 4 * large.numel() // 256
    for size in (2048, 4095, 4097, 4096 + 128):  # too small, or not whole blocks
        assert (
            adamw8bit.new_state(torch.zeros(size).bfloat16())["exp_avg_sq"].dtype == torch.float32
        )
    assert "exp_avg_codes" in adamw8bit.new_state(torch.zeros(4096).bfloat16())


def made(weight, mask=None, stochastic=False, lr=0.01, decay=0.1):
    options = dict(lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    masked = [] if mask is None else [(weight, mask)]
    decayed = [(weight, 1 if mask is None else mask)]
    return adamw8bit.AdamW8bit([weight], decayed, masked, stochastic=stochastic, **options)


def moment(optimizer, weight, name):
    """A moment out of its codes: each is a level of the map, times the scale of its block."""
    levels = optimizer.signed if name == "exp_avg" else optimizer.unsigned
    state = optimizer.state[weight]
    blocks = levels[state[f"{name}_codes"].long()].view(-1, 256)
    return (blocks * state[f"{name}_scale"][:, None]).view(weight.shape).double()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["contiguous", "a view"])
def test_an_update_is_adamw_with_moments_rounded_to_levels(way):
    """Against AdamW written out in float64, from the moments that the step before has left."""
    torch.manual_seed(0)
    whole = torch.randn(64, 256).bfloat16()
    weight = torch.nn.Parameter(whole if way == "contiguous" else whole[:, :128])
    mask = (torch.arange(weight.shape[1]) % 2).view(1, -1).to(torch.uint8)
    optimizer = made(weight, mask, decay=2.0)  # 2% a step, which rounding to bf16 does not hide
    levels = {"exp_avg": optimizer.signed, "exp_avg_sq": optimizer.unsigned}
    rest = whole[:, 128:].clone()
    for step in range(1, 6):
        weight.grad = torch.randn(weight.shape).bfloat16().mul_(mask)
        before, g = weight.detach().double(), weight.grad.double()
        exact = {
            "exp_avg": 0.9 * moment(optimizer, weight, "exp_avg") + 0.1 * g,
            "exp_avg_sq": 0.999 * moment(optimizer, weight, "exp_avg_sq") + 0.001 * g * g,
        }
        m, v = exact["exp_avg"] / (1 - 0.9**step), exact["exp_avg_sq"] / (1 - 0.999**step)
        expected = before * (1 - 0.02) - 0.01 * m / (v.sqrt() + 1e-8)
        optimizer.step()
        trained = mask.bool().expand(weight.shape)
        same = weight.double() == expected.bfloat16().double()
        assert same[trained].float().mean() > 0.98
        assert torch.equal(weight.double()[~trained], before[~trained])
        for name, value in exact.items():
            scale = value.view(-1, 256).abs().amax(1, keepdim=True)
            gap = (value.view(-1, 256, 1) / scale[..., None] - levels[name]).abs().amin(-1)
            error = (moment(optimizer, weight, name) - value).view(-1, 256).abs() / scale
            assert torch.allclose(error, gap, atol=1e-5)  # the nearest level
    assert way == "contiguous" or torch.equal(whole[:, 128:], rest)


@pytest.mark.slow
def test_the_update_that_a_gpu_compiles_is_the_same():
    found = {}
    for way in ("eager", "compiled"):
        torch.manual_seed(0)
        whole = torch.randn(64, 256).bfloat16()
        weight = torch.nn.Parameter(whole[:, :128])
        optimizer = made(weight, stochastic=False)
        if way == "compiled":
            optimizer.adam = torch.compile(optimizer.adam, fullgraph=True, dynamic=False)
        for _ in range(3):
            weight.grad = torch.randn(weight.shape).bfloat16()
            optimizer.step()
        found[way] = whole, moment(optimizer, weight, "exp_avg_sq")
    (eager, v), (compiled, other) = found.values()
    assert (eager == compiled).float().mean() > 0.99
    assert torch.allclose(v, other, rtol=0.1, atol=1e-6)


@pytest.mark.slow
def test_random_rounding_loses_no_update_on_average():
    moved = {}
    for stochastic in (False, True):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.ones(256, 256).bfloat16())
        optimizer = made(weight, stochastic=stochastic, lr=1e-4, decay=0.0)
        for _ in range(10):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[stochastic] = 1 - weight.double().mean().item()
    assert moved[False] == 0  # 1 - 1e-4 is 1 in bf16
    assert moved[True] == pytest.approx(10 * 1e-4, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, method, more",
    [
        ("olmo2", "wanda", ["--compact", "--gradient-checkpointing"]),
        ("qwen2", "wanda", ["--compact", "--optimizer", "adamw8bit-nearest"]),
        ("llama", "wanda-element", []),
        ("llama", "hft", ["--compact"]),
    ],
)
def test_frozen_weights_stay_and_a_resumed_run_is_the_same(
    kind, method, more, chats, text, tmp_path
):
    source = tiny_model(tmp_path / "source", kind, **LARGE)
    mask = static_mask(method, source, chats, tmp_path / "mask")  # and rows of chat tokens
    more = [*BITS8, *more, "--mask", mask, "--weight-decay", "0.5", "--save-every", "10"]
    train.main(arguments(source, text, tmp_path / "whole", *more))
    pid = forked(train.main, arguments(source, text, tmp_path / "killed", *more), stop_after_saving)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    saved = state_of(tmp_path / "killed")
    assert any(name.startswith("exp_avg_sq_codes/") for name in saved)
    train.main(arguments(source, text, tmp_path / "killed", *more, "--resume"))
    before, after = load_file(source / "model.safetensors"), weights(tmp_path / "whole")
    again, masks = weights(tmp_path / "killed"), load_file(mask)
    for name, weight in before.items():
        assert torch.equal(after[name], again[name]), name
        keep = torch.zeros_like(weight, dtype=torch.bool)
        if name in masks:
            keep = masks[name].expand(weight.shape) == 0
        assert torch.equal(weight[keep], after[name][keep]), name
        if "embed" not in name and not keep.all():
            assert (weight != after[name])[~keep].float().mean() > 0.4, name
    lines = log_of(tmp_path / "whole")
    assert [line for line in lines if line.get("step") == 20][0]["loss"] < 0.8 * lines[2]["loss"]


@pytest.mark.slow
def test_what_is_not_listed_does_not_decay():
    """Norms and biases."""
    weight = torch.nn.Parameter(torch.randn(64, 128).bfloat16())
    before = weight.detach().clone()
    options = dict(lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=2.0)
    optimizer = adamw8bit.AdamW8bit([weight], [], [], stochastic=False, **options)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)


@pytest.mark.slow
def test_train_passes_its_weight_decay_and_its_rounding(text, tmp_path):
    source = tiny_model(tmp_path / "source", "olmo2", **LARGE)
    nearest = [*BITS8, "--optimizer", "adamw8bit-nearest"]
    check_decay(source, text, tmp_path, *nearest)
    moved = []
    for name, more in (("random", BITS8), ("nearest", nearest)):
        train.main(arguments(source, text, tmp_path / name, *more, "--lr", "1e-5"))
        moved.append(log_of(tmp_path / name)[-1]["summary"]["moved"])
    assert moved[0] > 1.2 * moved[1]


@pytest.mark.slow
def test_in_place_columns_learn_like_whole_matrices(chats, text, tmp_path):
    source = tiny_model(tmp_path / "source", "qwen2", **LARGE)
    mask = make_masks(source, chats, tmp_path)
    last = {}
    for name, more in {"masked": [], "compact": ["--compact"]}.items():
        more = [*BITS8, "--optimizer", "adamw8bit-nearest", "--mask", mask, *more]
        train.main(arguments(source, text, tmp_path / name, *more))
        last[name] = log_of(tmp_path / name)[-2]["loss"]
    assert last["compact"] == pytest.approx(last["masked"], rel=0.03)
