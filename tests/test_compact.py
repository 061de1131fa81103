"""train.py --compact and --precision bf16-true against the reference loop."""

import copy
import math
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import forked, tiny_model
from safetensors.torch import load_file
from test_train import (
    SLOW_KINDS,
    arguments,
    log_of,
    make_masks,
    state_of,
    static_mask,
    stop_after_saving,
    weights,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP

import train
from data.blocks import load_sequences
from variants import compact, files
from variants.fused_adam import FusedAdam


@pytest.fixture(scope="module", params=["qwen2", *SLOW_KINDS])
def sources(request, chats, tmp_path_factory):
    """(folder of a model, its column mask), of each kind: q and k norms, tied embeddings,
    biases.
    """
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(folder / "model", request.param)
    return model, make_masks(model, chats, folder)


@pytest.fixture(scope="module")
def shielded(llama, chats, tmp_path_factory):
    """(folder of a llama with tied embeddings, its column mask)."""
    return llama, make_masks(llama, chats, tmp_path_factory.mktemp("mask"))


def trained(source, mask, text, out, *extra, dtype=torch.float32):
    """The parameters after the loop alone, in `dtype`; with float64 all but the norms is double
    precision.
    """
    args = train.parse_args(arguments(source, text, out, "--mask", mask, *extra))
    args.out.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).train()
    if attention := files.fastest_attention(args, model):
        model.set_attn_implementation(attention)
    masks = files.load_masks(mask, model)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in masks or bool(masks[name].any()))
    tokenizer = AutoTokenizer.from_pretrained(source)
    sequences, _ = load_sequences(tokenizer, "", args.seq_len, "--data", str(text))
    if args.compact:
        compact.make_compact(model, masks, args.precision)
    wide = torch.promote_types(dtype, torch.float32)
    torch.set_default_dtype(wide)  # of the factor by which masked weights decay
    try:
        train.train(args, model, masks, sequences, {}, {})
    finally:
        torch.set_default_dtype(torch.float32)
    result = {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if not name.endswith(".columns")
    }
    for name, module in model.named_modules():
        if isinstance(module, compact.CompactLinear):
            full = result[f"{name}.weight"].to(module.columns.dtype)
            full[:, module.index] = module.columns.detach()
            result[f"{name}.weight"] = full
    return result


def distance(a, b, source):
    """|a - b| relative to how far b is from the source, over all weights."""
    before = load_file(source / "model.safetensors")
    apart = sum(((a[name].double() - b[name].double()) ** 2).sum() for name in before)
    return float(
        (
            apart / sum(((b[name].double() - x.double()) ** 2).sum() for name, x in before.items())
        ).sqrt()
    )


def test_compact_is_the_masked_loop_in_float64(sources, text, tmp_path):
    """Twenty steps with clipping, accumulation and decay."""
    source, mask = sources
    more = ["--weight-decay", "0.1", "--max-grad-norm", "0.5"]
    masked = trained(source, mask, text, tmp_path / "masked", *more, dtype=torch.float64)
    compact = trained(
        source, mask, text, tmp_path / "compact", *more, "--compact", dtype=torch.float64
    )
    assert distance(compact, masked, source) < 1e-12


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["--precision", "fp32"], marks=pytest.mark.slow),
        pytest.param(["--precision", "bf16"], marks=pytest.mark.slow),
        pytest.param(
            ["--precision", "bf16-true", "--max-grad-norm", "0.5"], marks=pytest.mark.slow
        ),
    ],
    ids=" ".join,
)
def test_compact_differs_less_than_another_order_of_the_same_sums(shielded, more, text, tmp_path):
    """In bf16, where a last bit decides how a weight is rounded and micro-batches are added: less
    than a few.
    """
    source, mask = shielded
    more = [*more, "--lr", "1e-3"]
    masked = trained(source, mask, text, tmp_path / "masked", *more)
    compact = trained(source, mask, text, tmp_path / "compact", *more, "--compact")
    other = trained(source, mask, text, tmp_path / "other", *more, "--micro-batch-size", "1")
    limit = distance(other, masked, source) * (1 if "fp32" in more else 3)
    assert distance(compact, masked, source) < limit


def test_compact_without_master_is_the_masked_loop_without_master_bit_for_bit(
    sources, text, tmp_path
):
    """Without clipping, whose norm is a sum in another order."""
    source, mask = sources
    more = ["--precision", "bf16-true", "--max-grad-norm", "0", "--weight-decay", "0.1"]
    masked = trained(source, mask, text, tmp_path / "masked", *more, dtype=torch.bfloat16)
    compact = trained(
        source, mask, text, tmp_path / "compact", *more, "--compact", dtype=torch.bfloat16
    )
    for name, weight in masked.items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, compact[name]), name


def test_compact_without_master_saves_what_the_masked_loop_saves(shielded, text, tmp_path):
    """A weight that did not move keeps the source's value, which bf16 does not hold."""
    source, mask = shielded
    more = ["--mask", mask, "--precision", "bf16-true", "--max-grad-norm", "0", "--lr", "1e-5"]
    saved, moved = [], []
    for options in ([], ["--compact"]):
        out = tmp_path / f"out{len(options)}"
        train.main(arguments(source, text, out, *more, *options))
        saved.append(weights(out))
        moved.append(log_of(out)[-1]["summary"]["moved"])
    assert 0 < moved[0] == moved[1] < 0.95 * log_of(out)[-1]["summary"]["trainable"]
    for name, weight in saved[0].items():
        assert torch.equal(weight, saved[1][name]), name


@pytest.mark.parametrize(
    "more",
    [
        ["--precision", "bf16-true", "--compact", "--gradient-checkpointing"],
        pytest.param(["--precision", "bf16", "--compact"], marks=pytest.mark.slow),
        pytest.param(["--precision", "bf16-true"], marks=pytest.mark.slow),
        pytest.param(["--precision", "fp32", "--compact"], marks=pytest.mark.slow),
        pytest.param(["--precision", "fp32", "--compact", "--compile"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_frozen_weights_stay_and_a_resumed_run_is_the_same(more, shielded, text, tmp_path):
    """By the command line. The source is finer than bf16, so a frozen weight must not come back
    rounded either.
    """
    source, mask = shielded
    more = [
        "--mask",
        mask,
        *more,
        "--weight-decay",
        "0.1",
        "--save-every",
        "10",
        "--source-eval",
        text,
    ]
    train.main(arguments(source, text, tmp_path / "whole", *more))
    pid = forked(train.main, arguments(source, text, tmp_path / "killed", *more), stop_after_saving)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    train.main(arguments(source, text, tmp_path / "killed", *more, "--resume"))
    masks, frozen = load_file(mask), 0
    after, again = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    least = 0.5 if "bf16-true" in more else 0.9  # without a master, rounding undoes small updates
    for name, weight in load_file(source / "model.safetensors").items():
        assert torch.equal(after[name], again[name]), name
        keep = masks.get(name, torch.ones(1)).expand(weight.shape) == 0
        assert torch.equal(weight[keep], after[name][keep]), name
        # Tokens that do not occur get no gradient, and decay alone is lost in bf16.
        if "embed" not in name:
            assert (weight[~keep] != after[name][~keep]).float().mean() > least, name
        frozen += int(keep.sum())
    lines = log_of(tmp_path / "whole")
    assert lines[-1]["summary"]["frozen_verified"] == frozen > 0
    assert [line for line in lines if line.get("step") == 20][0]["loss"] < 0.8 * lines[2]["loss"]


@pytest.mark.parametrize(
    "more",
    [
        ["--compact"],
        pytest.param(["--compact", "--precision", "bf16-true"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_compact_with_frozen_rows_of_chat_tokens(more, olmo2, chats, text, tmp_path):
    """These masks are of rows, of the embeddings and the head, which are never compact."""
    mask = static_mask("wanda", olmo2, chats, tmp_path / "mask")
    train.main(arguments(olmo2, text, tmp_path / "out", "--mask", mask, *more))
    before, after, masks = (
        load_file(olmo2 / "model.safetensors"),
        weights(tmp_path / "out"),
        load_file(mask),
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        keep = masks[name][:, 0] == 0
        assert keep.any() and torch.equal(before[name][keep], after[name][keep])
        assert not torch.equal(before[name][~keep], after[name][~keep])


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--compact", "--gradient-checkpointing"]], ids=" ".join)
def test_compiled_layers_make_the_same_updates_by_one_graph(more, shielded, text, tmp_path):
    source, mask = shielded
    found = {}
    for name, extra in (
        ("plain", []),
        ("other", ["--micro-batch-size", "1"]),
        ("compiled", ["--compile"]),
    ):
        torch._dynamo.utils.counters.clear()
        train.main(
            arguments(
                source, text, tmp_path / name, "--mask", mask, "--precision", "fp32", *more, *extra
            )
        )
        found[name] = weights(tmp_path / name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert distance(found["compiled"], found["plain"], source) < 3 * distance(
        found["other"], found["plain"], source
    )


@pytest.mark.slow
def test_the_masters_are_what_is_saved(shielded, text, tmp_path):
    """Not the bf16 weights that the forward pass reads."""
    source, mask = shielded
    more = ["--compact", "--precision", "bf16"]
    train.main(arguments(source, text, tmp_path / "out", "--mask", mask, *more))
    saved, masters = (
        weights(tmp_path / "out"),
        trained(source, mask, text, tmp_path / "loop", *more),
    )
    finer = 0
    for name, columns in load_file(mask).items():
        update = columns.expand(saved[name].shape) == 1
        assert torch.equal(saved[name][update], masters[name].float()[update]), name
        finer += int((saved[name][update] != saved[name][update].bfloat16()).sum())
    assert finer > 1000


def test_a_matrix_whose_layer_is_not_called_is_refused(
    shielded, text, tmp_path, refused, monkeypatch
):
    """Its gradient would go to the whole weight, which is not trained."""
    source, mask = shielded
    monkeypatch.setattr(
        LlamaMLP,
        "forward",
        lambda self, x: self.down_proj(
            F.silu(F.linear(x, self.gate_proj.weight)) * self.up_proj(x)
        ),
    )
    assert "layers.0.mlp.gate_proj got no gradient" in refused(
        train.main, *arguments(source, text, tmp_path / "out", "--mask", mask, "--compact")
    )


@pytest.mark.parametrize("more", [[], ["--compact"]])
def test_a_gradient_that_is_not_finite_ends_the_run(
    more, shielded, text, tmp_path, refused, monkeypatch
):
    """Though the loss is finite and the gradient a frozen weight's, where inf * 0 is NaN."""
    source, mask = shielded
    real = train.make_optimizer

    def with_hook(model, *rest):
        model.get_parameter("model.norm.weight").register_hook(
            lambda grad: grad.index_fill(
                0, (load_file(mask)["model.norm.weight"] == 0).nonzero()[:1, 0], math.inf
            )
        )
        return real(model, *rest)

    monkeypatch.setattr(train, "make_optimizer", with_hook)
    message = refused(train.main, *arguments(source, text, tmp_path / "out", "--mask", mask, *more))
    assert "step 1: loss" in message and "gradient norm nan" in message
    assert not (tmp_path / "out/model").exists()


def test_compact_trains_whole_matrices_beside_frozen_ones(olmo2, chats, text, tmp_path):
    mask = static_mask("hft", olmo2, chats, tmp_path / "mask")
    masked = trained(olmo2, mask, text, tmp_path / "masked", dtype=torch.float64)
    compact = trained(olmo2, mask, text, tmp_path / "compact", "--compact", dtype=torch.float64)
    assert distance(compact, masked, olmo2) < 1e-12


def test_compact_training_holds_the_bytes_of_the_table(olmo2, chats, tmp_path):
    """By docs/PERFORMANCE.md: a matrix that is frozen as a whole has 2 bytes a weight in bf16, one
    that is trained as a whole has no copy.
    """
    for method in ("hft", "wanda"):
        mask = static_mask(method, olmo2, chats, tmp_path / method)
        model = AutoModelForCausalLM.from_pretrained(olmo2, dtype=torch.float32)
        masks = files.load_masks(mask, model)
        compact.make_compact(model, masks, "bf16")
        expected = 0
        for name, weight in load_file(olmo2 / "model.safetensors").items():
            share = masks.get(name, torch.ones(1)).float().mean().item()
            if "proj" not in name:
                share = 1  # masked, not compact
            expected += weight.numel() * (4 if share == 1 else 2 + 4 * share)
        assert sum(p.nbytes for p in model.parameters()) == expected


@pytest.mark.parametrize(
    "precision",
    ["bf16", *[pytest.param(name, marks=pytest.mark.slow) for name in ("fp32", "bf16-true")]],
)
def test_a_frozen_weight_that_moved_is_not_saved(
    precision, shielded, text, tmp_path, refused, monkeypatch
):
    source, mask = shielded
    real = compact.write_columns

    def wrong(model, **more):
        real(model, **more)
        module = model.model.layers[0].mlp.up_proj
        others = sorted(set(range(module.weight.shape[1])) - set(module.index.tolist()))
        module.weight.data[3, others[0]] *= 1.5

    monkeypatch.setattr(compact, "write_columns", wrong)
    more = ["--mask", mask, "--compact", "--precision", precision, "--steps", "2"]
    message = refused(train.main, *arguments(source, text, tmp_path / "out", *more))
    assert "frozen weights of model.layers.0.mlp.up_proj" in message
    assert not (tmp_path / "out/model").exists()


def test_the_checkpoint_holds_the_trained_columns_alone(shielded, text, tmp_path):
    source, mask = shielded
    more = ["--mask", mask, "--compact", "--precision", "bf16", "--save-every", "4", "--steps", "6"]
    pid = forked(train.main, arguments(source, text, tmp_path / "out", *more), stop_after_saving)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    state, masks = state_of(tmp_path / "out"), load_file(mask)
    for name, weight in load_file(source / "model.safetensors").items():
        if name in masks and weight.dim() == 2:
            columns = f"{name.removesuffix('weight')}columns"
            size = weight.shape[0], int(masks[name].sum())
            assert f"weight/{name}" not in state and state[f"exp_avg/{columns}"].shape == size


def test_fused_adam_is_adamw_in_fp32_rounded_once():
    """Against float64 AdamW written out, on fp32 copies of the bf16 weights, with a masked
    decay.
    """
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(16, 8).bfloat16())
    mask = (torch.arange(8) % 2).view(1, 8).to(torch.uint8)
    norm = torch.nn.Parameter(torch.randn(8))  # does not decay
    still = norm.detach().clone()
    options = dict(lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    optimizer = FusedAdam([weight, norm], decayed={weight: mask}, **options)
    m = v = torch.zeros(16, 8, dtype=torch.float64)
    for step in range(1, 11):
        weight.grad = torch.randn(16, 8).bfloat16().mul_(mask)
        weight.grad[:, 3] *= 1e-7  # of which eps is a part
        norm.grad = torch.zeros_like(norm)
        before, g = weight.detach().double(), weight.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        expected = before * (1 - 0.001 * mask) - 0.01 * (m / (1 - 0.9**step)) / (
            (v / (1 - 0.999**step)).sqrt() + 1e-8
        )
        optimizer.step()
        assert (weight.double() == expected.bfloat16().double()).float().mean() > 0.98
        assert torch.equal(weight.double()[:, ::2], before[:, ::2])
        assert torch.equal(norm, still)
    assert optimizer.state[weight]["exp_avg_sq"].dtype == torch.float32


def test_columns_in_place_are_a_view_of_the_matrix_with_the_gradients_of_a_linear():
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 7).double()
    before = linear.weight.detach().clone()
    index = torch.tensor([1, 4, 5, 11])
    x, grad_y = torch.randn(2, 3, 12).double(), torch.randn(2, 3, 7).double()
    found = {}
    module = compact.InPlaceLinear(copy.deepcopy(linear), index)
    for name, layer in {"linear": linear, "in place": module}.items():
        x = x.detach().requires_grad_()
        layer(x).backward(grad_y)
        found[name] = [layer(x), x.grad, layer.bias.grad]
    found["linear"].append(linear.weight.grad[:, index])
    found["in place"].append(module.columns.grad)
    for ours, theirs in zip(found["in place"], found["linear"], strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)

    for dtype in (torch.float64, torch.float32):
        module.to(dtype)  # which keeps the columns in the matrix
        with torch.no_grad():
            module.columns += 1
            before[:, index] += 1
            now = compact.as_in_source(torch.nn.Sequential(module), "0.weight")
        assert torch.allclose(now.double(), before, rtol=0, atol=1e-6)
        expected = F.linear(x, before, linear.bias)
        assert torch.allclose(module(x.to(dtype)).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--compact"], "needs --mask"),
        (["--compact", "--mask", "MASK", "--precision", "fp16"], "needs --mask and"),
    ],
)
def test_what_excludes_each_other_is_refused(more, message, olmo2, text, tmp_path, refused):
    assert message in refused(train.main, *arguments(olmo2, text, tmp_path / "out", *more))


@pytest.mark.parametrize("method", ["wanda-row", "wanda-element"])
def test_only_columns_can_be_compact(method, olmo2, chats, text, tmp_path, refused):
    mask = static_mask(method, olmo2, chats, tmp_path / "mask")
    assert "not columns" in refused(
        train.main, *arguments(olmo2, text, tmp_path / "out", "--mask", mask, "--compact")
    )
