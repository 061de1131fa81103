"""results/remake.sh: what each target runs."""

import inspect
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file

from tools import plan

RUNS = {
    "figure2": 2 * (3 * 6 + 2 * 3 * 2),  # texts x (methods x ratios, and two seeds of two ratios)
    "table5": 5 * 3,
    "tables346": 16 * 2 * 3,
    "languages": 4 * 5 * 3,
    "precision": 3 * (3 + 2) + 2 * 2 * 3,
    "eight-bit": 3 * 3,
}


def remake(*argv):
    command = ["bash", "results/remake.sh", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_list_names_all_targets_with_runs_and_hours():
    rows = [line.split() for line in remake("--list").stdout.splitlines()]
    assert {name: int(count) for name, count, *_ in rows} == RUNS
    assert [float(hours) for *_, hours, _ in rows] == pytest.approx(
        [count * 4 / 60 for count in RUNS.values()], abs=0.06
    )


def test_every_method_is_run():
    text = (ROOT / "results/remake.sh").read_text()
    named = set()
    for name in ("single", "columns"):
        named |= set(text.split(f'\n{name}="')[1].split('"')[0].split())
    assert named | {"ssu-wanda-row", "ssu-wanda-element"} == set(plan.METHODS) - {"lota"}


def test_an_unknown_target_is_refused_before_anything_runs():
    done = remake("figure2", "figure9")
    assert done.returncode == 2 and "no target figure9" in done.stderr and not done.stdout


def products(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 16, 8).to(dtype).requires_grad_()  # [batch, heads, positions, width]
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    y = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
    y = F.scaled_dot_product_attention(y, x, x, is_causal=True) @ x.mT
    z = F.linear(y[0, 0], y[0, 1], y[0, 0, 0])
    z.sum().backward()
    return [y.detach(), z.detach(), x.grad]


@pytest.mark.slow
def test_bf16_products_in_fp32_are_those_of_bf16(tmp_path):
    script, out = tmp_path / "train.py", tmp_path / "out.safetensors"
    script.write_text(f"""
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

{inspect.getsource(products)}
found = products(torch.bfloat16) + products(torch.float32)
save_file({{str(i): tensor.contiguous() for i, tensor in enumerate(found)}}, "{out}")
""")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "results/fp32-products")}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Overriding a previously registered kernel" in done.stderr
    saved = load_file(out)
    found = [saved[str(i)] for i in range(6)]
    in_bf16, in_fp32 = found[:3], found[3:]
    for a, b in zip(in_bf16, products(torch.bfloat16), strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        assert (a - b).abs().max() <= 0.02 * b.abs().max()
    for a, b in zip(in_fp32, products(torch.float32), strict=True):
        assert torch.equal(a, b)
