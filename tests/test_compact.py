"""train.py --compact and --master against the reference loop, the chunked loss, and checkpointing to fit a memory."""
import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SIZES, forked, tiny_model
from safetensors.torch import load_file
from test_train import arguments, log_of, make_masks, refused, static_mask, stop_after_saving, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteConfig, GraniteForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import train


@pytest.fixture(scope="module", params=["olmo2", "llama", "qwen2"])
def sources(request, chats, tmp_path_factory):
    """(folder of a model, its column mask), of each kind: q and k norms, tied embeddings, biases."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(folder / "model", request.param)
    return model, make_masks(model, chats, folder)


@pytest.fixture(scope="module")
def shielded(llama, chats, tmp_path_factory):
    """(folder of a llama with tied embeddings, its column mask)."""
    return llama, make_masks(llama, chats, tmp_path_factory.mktemp("mask"))


def trained(source, mask, text, out, *extra, dtype=torch.float32):
    """The parameters after the loop alone, in `dtype`; with float64 all but the norms is double precision."""
    args = train.parse_args(arguments(source, text, out, "--mask", mask, *extra))
    args.out.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).train()
    masks = train.load_masks(mask, model)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in masks or bool(masks[name].any()))
    tokenizer, _ = train.load_tokenizer(str(source))
    tokens, _ = train.token_file("--data", str(text), tokenizer, "", 0, out / "tokens", args.seq_len)
    leaves = train.make_leaves(model, masks, args)
    assert not leaves or args.compact or args.master != "fp32"
    train.train(args, model, masks, leaves, tokens, {}, {}, 0)
    result = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, leaf in leaves.items():
        if leaf.keeps_master:
            result[name] = result[name].to(leaf.master.dtype)
            result[name][:, leaf.columns] = leaf.master.detach()
    return result


def distance(a, b, source):
    """|a - b| relative to how far b is from the source, over all weights."""
    before = load_file(source / "model.safetensors")
    apart = sum(((a[name].double() - b[name].double()) ** 2).sum() for name in before)
    return float((apart / sum(((b[name].double() - x.double()) ** 2).sum() for name, x in before.items())).sqrt())


def test_compact_is_the_masked_loop_in_float64(sources, text, tmp_path):
    """Twenty steps with clipping, accumulation and decay."""
    source, mask = sources
    more = ["--weight-decay", "0.1", "--max-grad-norm", "0.5"]
    masked = trained(source, mask, text, tmp_path / "masked", *more, dtype=torch.float64)
    compact = trained(source, mask, text, tmp_path / "compact", *more, "--compact", dtype=torch.float64)
    assert distance(compact, masked, source) < 1e-12


@pytest.mark.parametrize("more", [["--precision", "fp32"], ["--precision", "bf16"],
                                  ["--precision", "bf16", "--master", "none", "--max-grad-norm", "0.5"]], ids=" ".join)
def test_compact_differs_less_than_another_order_of_the_same_sums(shielded, more, text, tmp_path):
    """In bf16, where a last bit decides how a weight is rounded and micro-batches are added: less than a few."""
    source, mask = shielded
    more = [*more, "--lr", "1e-3"]
    masked = trained(source, mask, text, tmp_path / "masked", *more)
    compact = trained(source, mask, text, tmp_path / "compact", *more, "--compact")
    other = trained(source, mask, text, tmp_path / "other", *more, "--micro-batch-size", "1")
    limit = distance(other, masked, source) * (3 if "bf16" in more else 1)
    assert distance(compact, masked, source) < limit


def test_compact_without_master_is_the_masked_loop_without_master_bit_for_bit(sources, text, tmp_path):
    """Without clipping, whose norm is a sum in another order."""
    source, mask = sources
    more = ["--precision", "bf16", "--master", "none", "--max-grad-norm", "0", "--weight-decay", "0.1"]
    masked = trained(source, mask, text, tmp_path / "masked", *more, dtype=torch.bfloat16)
    compact = trained(source, mask, text, tmp_path / "compact", *more, "--compact", dtype=torch.bfloat16)
    for name, weight in masked.items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, compact[name]), name


@pytest.mark.parametrize("more", [
    ["--precision", "fp32", "--compact"], ["--precision", "bf16", "--compact", "--gradient-checkpointing"],
    ["--precision", "bf16", "--compact", "--master", "none"], ["--precision", "bf16", "--master", "stochastic"],
    pytest.param(["--precision", "fp32", "--compact", "--compile"], marks=pytest.mark.slow)], ids=" ".join)
def test_frozen_weights_stay_and_a_resumed_run_is_the_same(more, shielded, text, tmp_path):
    """By the command line. The source is finer than bf16, so a frozen weight must not come back rounded either."""
    source, mask = shielded
    more = ["--mask", mask, *more, "--weight-decay", "0.1", "--save-every", "10", "--source-eval", text]
    train.main(arguments(source, text, tmp_path / "whole", *more))
    pid = forked(train.main, arguments(source, text, tmp_path / "killed", *more), stop_after_saving)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    train.main(arguments(source, text, tmp_path / "killed", *more, "--resume"))
    before, after, masks = load_file(source / "model.safetensors"), weights(tmp_path / "whole"), load_file(mask)
    again, frozen = weights(tmp_path / "killed"), 0
    for name, weight in before.items():
        assert torch.equal(after[name], again[name]), name
        keep = masks[name].expand(weight.shape) == 0 if name in masks else torch.zeros_like(weight, dtype=torch.bool)
        assert torch.equal(weight[keep], after[name][keep]), name
        if "embed" not in name:  # tokens that do not occur get no gradient, and decay alone is lost in bf16
            moved = (weight[~keep] != after[name][~keep]).float().mean()
            assert moved > (0.5 if "none" in more else 0.9), name  # without a master, rounding undoes small updates
        frozen += int(keep.sum())
    lines = log_of(tmp_path / "whole")
    assert lines[-1]["summary"]["frozen_verified"] == frozen > 0
    assert [line for line in lines if line.get("step") == 20][0]["loss"] < 0.8 * lines[2]["loss"]


@pytest.mark.parametrize("more", [["--compact"], ["--compact", "--master", "none"]], ids=" ".join)
def test_compact_with_frozen_rows_of_chat_tokens(more, olmo2, chats, text, tmp_path):
    """These masks are of rows, of the embeddings and the head, which are never compact."""
    mask = static_mask("wanda", olmo2, chats, tmp_path / "mask")
    train.main(arguments(olmo2, text, tmp_path / "out", "--mask", mask, "--precision", "bf16", *more))
    before, after, masks = load_file(olmo2 / "model.safetensors"), weights(tmp_path / "out"), load_file(mask)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        keep = masks[name][:, 0] == 0
        assert keep.any() and torch.equal(before[name][keep], after[name][keep])
        assert not torch.equal(before[name][~keep], after[name][~keep])


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--compact", "--gradient-checkpointing"]], ids=" ".join)
def test_compiled_layers_make_the_same_updates_by_one_graph(more, shielded, text, tmp_path):
    source, mask = shielded
    found = {}
    for name, extra in (("plain", []), ("other", ["--micro-batch-size", "1"]), ("compiled", ["--compile"])):
        torch._dynamo.utils.counters.clear()
        train.main(arguments(source, text, tmp_path / name, "--mask", mask, "--precision", "fp32", *more, *extra))
        found[name] = weights(tmp_path / name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert distance(found["compiled"], found["plain"], source) < 3 * distance(found["other"], found["plain"], source)


def test_the_masters_are_what_is_saved(shielded, text, tmp_path):
    """Not the bf16 weights that the forward pass reads."""
    source, mask = shielded
    more = ["--compact", "--precision", "bf16"]
    train.main(arguments(source, text, tmp_path / "out", "--mask", mask, *more))
    saved, masters = weights(tmp_path / "out"), trained(source, mask, text, tmp_path / "loop", *more)
    finer = 0
    for name, columns in load_file(mask).items():
        update = columns.expand(saved[name].shape) == 1
        assert torch.equal(saved[name][update], masters[name].float()[update]), name
        finer += int((saved[name][update] != saved[name][update].bfloat16()).sum())
    assert finer > 1000


def test_a_matrix_whose_layer_is_not_called_is_refused(shielded, text, tmp_path, capsys, monkeypatch):
    """Its gradient would go to the whole weight, which is not trained."""
    source, mask = shielded
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(
        F.silu(F.linear(x, self.gate_proj.weight)) * self.up_proj(x)))
    assert "layers.0.mlp.gate_proj.weight got no gradient" in refused(capsys, *arguments(
        source, text, tmp_path / "out", "--mask", mask, "--compact"))


@pytest.mark.parametrize("compact", [False, True])
def test_a_gradient_that_is_not_finite_ends_the_run(compact, shielded, text, tmp_path, capsys, monkeypatch):
    """Though the loss is finite and the gradient a frozen weight's, where inf * 0 is NaN."""
    source, mask = shielded
    real = train.checkpoint_layers

    def with_hook(model, *rest):
        model.get_parameter("model.norm.weight").register_hook(lambda grad: grad.index_fill(
            0, (load_file(mask)["model.norm.weight"] == 0).nonzero()[:1, 0], math.inf))
        return real(model, *rest)
    monkeypatch.setattr(train, "checkpoint_layers", with_hook)
    message = refused(capsys, *arguments(source, text, tmp_path / "out", "--mask", mask, *["--compact"] * compact))
    assert "step 1: loss" in message and "gradient norm nan" in message and not (tmp_path / "out/model").exists()


def test_compact_trains_whole_matrices_beside_frozen_ones(olmo2, chats, text, tmp_path):
    mask = static_mask("hft", olmo2, chats, tmp_path / "mask")
    masked = trained(olmo2, mask, text, tmp_path / "masked", dtype=torch.float64)
    compact = trained(olmo2, mask, text, tmp_path / "compact", "--compact", dtype=torch.float64)
    assert distance(compact, masked, olmo2) < 1e-12


def test_a_frozen_weight_that_moved_is_not_saved(shielded, text, tmp_path, capsys, monkeypatch):
    source, mask = shielded
    real = train.step_leaves

    def wrong(leaves, *rest):
        real(leaves, *rest)
        leaf = next(iter(leaves.values()))
        others = sorted(set(range(leaf.weight.shape[1])) - set(leaf.columns.tolist()))
        leaf.weight.data[3, others[0]] *= 1.5
    monkeypatch.setattr(train, "step_leaves", wrong)
    message = refused(capsys, *arguments(source, text, tmp_path / "out", "--mask", mask, "--compact", "--precision",
                                         "bf16", "--steps", "2"))
    assert "1 frozen weights of model.layers.0" in message and not (tmp_path / "out/model").exists()


def test_state_is_counted_as_it_is(shielded, text, tmp_path):
    """What the line before training says against the tensors of a checkpoint and of the model."""
    source, mask = shielded
    more = ["--mask", mask, "--compact", "--precision", "bf16", "--save-every", "4", "--steps", "6"]
    pid = forked(train.main, arguments(source, text, tmp_path / "out", *more), stop_after_saving)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    state = load_file(tmp_path / "out/checkpoint/state.safetensors")
    args = train.parse_args(arguments(source, text, tmp_path / "out", *more))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    said = train.state_bytes(model, train.load_masks(mask, model), args)
    for key, kinds in (("weights", ["weight"]), ("masters", ["master"]), ("moments", ["exp_avg", "exp_avg_sq"])):
        assert said[key] == sum(x.nbytes for name, x in state.items() if name.split("/")[0] in kinds) > 0, key
    assert said["masters"] * 2 + said["weights"] < 1.9 * sum(4 * p.numel() for p in model.parameters())


def test_stochastic_rounding_is_right_on_average_and_exact_for_bf16():
    torch.manual_seed(0)
    value = torch.tensor([[1.0, 1.0 + 2**-9, -3.0 - 2**-8, 2.0**-20]]).repeat(4000, 1)
    weight = torch.nn.Parameter(value.bfloat16(), requires_grad=False)
    leaf = train.make_leaf(weight, None, torch.zeros_like(weight).requires_grad_(), torch.ones(1, 1), kept=value)
    total = torch.zeros(4)
    for _ in range(20):
        leaf.updated.grad, leaf.master.data = torch.zeros_like(weight), value.clone()
        train.step_leaves({"w": leaf}, 0.0, 0.0, 1.0, stochastic=True)
        total += weight.float().mean(0)
    assert weight[:, 0].float().eq(1).all() and weight[:, 3].float().eq(2**-20).all()
    assert (total / 20 - value[0]).abs().max() < 2e-4 and weight[:, 1].unique().numel() == 2


@pytest.mark.parametrize("kind", ["olmo2", "llama"])
def test_the_loss_in_parts_is_the_whole_loss(kind, request, text, tmp_path, monkeypatch):
    """And so are its gradients, with and without autocast; logits never exist whole."""
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(kind), dtype=torch.float32)
    tokens, widths, found = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(0)), [], []
    model.get_output_embeddings().register_forward_hook(lambda _, x, y: widths.append(y.numel() // y.shape[-1]))
    in_parts = 7 * model.config.vocab_size
    for limit, precision in ((2**26, "fp32"), (in_parts, "fp32"), (in_parts, "bf16")):
        monkeypatch.setattr(train, "LOGITS", limit)
        model.zero_grad()
        args = train.parse_args(arguments(request.getfixturevalue(kind), text, tmp_path, "--precision", precision))
        with train.autocast_of(args)():
            loss = train.next_token_loss(model, tokens)
        loss.backward()
        found.append((loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    assert widths[0] == 117 and max(widths[1:]) == 7
    head = found[2][1][next(name for name, p in model.named_parameters() if p is model.get_output_embeddings().weight)]
    assert not torch.equal(head, head.bfloat16().float())  # the parts' gradients are added in fp32
    logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    assert found[0][0] == pytest.approx(F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").item())
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6) and found[2][0] == pytest.approx(found[0][0], rel=1e-2)
    for name, grad in found[0][1].items():
        assert torch.allclose(found[1][1][name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max())), name


def test_a_model_that_changes_its_logits_computes_them_itself(olmo2, text, tmp_path, monkeypatch):
    """Granite divides them by a setting. Neither loss nor gradients change when parts are asked for."""
    args = train.parse_args(arguments(olmo2, text, tmp_path))
    granite = GraniteForCausalLM(GraniteConfig(**SIZES, vocab_size=400, logits_scaling=8.0))
    assert not train.logits_are_the_heads(granite, args)
    assert train.logits_are_the_heads(AutoModelForCausalLM.from_pretrained(olmo2, dtype=torch.float32), args)
    granite.save_pretrained(tmp_path / "granite")
    AutoTokenizer.from_pretrained(olmo2).save_pretrained(tmp_path / "granite")
    losses = []
    for limit in (2**26, 1000):
        monkeypatch.setattr(train, "LOGITS", limit)
        train.main(arguments(tmp_path / "granite", text, tmp_path / str(limit), "--steps", "3"))
        losses.append([line.get("loss") for line in log_of(tmp_path / str(limit))])
    assert losses[0] == losses[1]


def test_layers_are_checkpointed_as_memory_demands(shielded, text, tmp_path, capsys, monkeypatch):
    source, mask = shielded
    args = train.parse_args(arguments(source, text, tmp_path, "--gradient-checkpointing", "auto"))
    needed = [train.checkpointed_layers(8, free, (10, 100, 5), 77, 2) for free in (10**6, 1300, 900, 700, 300)]
    assert needed[0] == (0, 8 * 210 + 77) and [n for n, _ in needed] == sorted(n for n, _ in needed)
    n, size = needed[1]
    assert 0 < n < 8 and size == (8 - n) * 210 + n * 10 + 77 <= 1300 < (9 - n) * 210 + (n - 1) * 10 + 77
    assert needed[-1] == (8, 80 + 210)  # what is computed again, when head and logits are gone
    assert train.checkpointed_layers(8, 289, (10, 100, 5), 77, 2)[0] == 9

    plain = trained(source, mask, text, tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()
    constant, each, kept = train.layer_bytes(model, args)
    assert each > kept == 32 * 32 * 4 and constant >= 0
    calls, real, seen = Counter(), LlamaMLP.forward, []

    def forward(self, x):
        calls[torch.is_grad_enabled() and self.training] += 1
        return real(self, x)
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    monkeypatch.setattr(train, "checkpointed_layers", lambda layers, free, *rest: (seen.append(free), (1, 0))[1])
    read_text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *rest, **more: read_text(self, *rest, **more) if str(
        self) != "/proc/meminfo" else "MemTotal:  1000000 kB\nMemFree:  1 kB\nMemAvailable:  900000 kB\n")
    for how, times in (("none", 2), ("auto", 3), ("all", 4)):  # layers computed in a micro-batch
        calls.clear()
        train.main(arguments(source, text, tmp_path / how, "--mask", mask, "--gradient-checkpointing", how))
        assert calls[True] - 2 * 2 * (how == "auto") == times * 2 * 20  # auto's two passes to measure keep nothing
    assert "gradient checkpointing: 1 of 2 layers" in capsys.readouterr().out
    state = train.state_bytes(model, train.load_masks(mask, model), args)
    assert seen[0] + state["gradients"] + state["moments"] + state["copies"] == pytest.approx(1024 * 850_000)
    for name, weight in weights(tmp_path / "auto").items():
        assert torch.equal(weight, plain[name]), name
    monkeypatch.setattr(train, "checkpointed_layers", lambda layers, free, *rest: (layers + 1, 10**12))
    assert "lower --micro-batch-size" in refused(capsys, *arguments(
        source, text, tmp_path / "large", "--mask", mask, "--gradient-checkpointing", "auto"))


def test_plan_needs_only_a_config(olmo2, tmp_path, capsys):
    config = json.loads((olmo2 / "config.json").read_text())
    large = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=60, vocab_size=9000, pad_token_id=8999,
                 max_position_embeddings=4096)
    (tmp_path / "config.json").write_text(json.dumps(config | large))
    train.main(["--plan", "--model", str(tmp_path), "--seq-len", "4096"])
    out = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in out.splitlines() if line.startswith("| ")}
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(
            train.AutoConfig.from_pretrained(tmp_path)).parameters())
    state = [float(rows[name][0]) for name in ("masked", "compact", "compact, no master")]
    assert state[0] == pytest.approx(16 * count / 1e9, abs=0.06) and state[0] > state[1] > state[2]
    assert len(rows["masked"]) == 5
    again = [int(re.search(r"4, (\d+) of 60", rows[name][1])[1]) for name in rows if name]
    hidden = 4 * 4096 * 512 * 4  # bytes of a layer's input; attention and MLP keep between 10 and 30 times as much
    left = [0.95 * 23 * 2**30 - 1e9 * size - 12 * 4 * 4096 * 9000 for size in state]
    for n, free in zip(again, left, strict=True):
        assert 60 - free / (10 * hidden) < n < 61 - free / (31 * hidden)
    assert again[0] > again[1] > again[2] and "4, 0 of 60" in rows["masked"][4]


def test_logits_and_head_are_counted_by_their_parts(olmo2, monkeypatch):
    config = AutoModelForCausalLM.from_pretrained(olmo2).config
    assert train.head_bytes(config, 100, True) == 12 * 100 * 400 + 8 * 400 * 32
    monkeypatch.setattr(train, "LOGITS", 7 * 400)
    assert train.loss_parts(config, 100) == 15
    assert train.head_bytes(config, 100, True) == pytest.approx(12 * 100 * 400 / 15 + 12 * 400 * 32)
    assert train.head_bytes(config, 100, False) == 12 * 100 * 400 + 8 * 400 * 32


@pytest.mark.parametrize("more, message", [
    (["--compact"], "give one"), (["--master", "none"], "for --precision bf16"),
    (["--compact", "--mask", "MASK", "--precision", "fp16"], "no loss scaling"),
    (["--gmt-ratio", "0.5", "--master", "none", "--precision", "bf16"], "not for AdaLoRA and GMT")])
def test_what_excludes_each_other_is_refused(more, message, olmo2, text, tmp_path, capsys):
    assert message in refused(capsys, *arguments(olmo2, text, tmp_path / "out", *more))


@pytest.mark.parametrize("method", ["wanda-row", "wanda-element"])
def test_only_columns_can_be_compact(method, olmo2, chats, text, tmp_path, capsys):
    mask = static_mask(method, olmo2, chats, tmp_path / "mask")
    assert "is no column mask" in refused(capsys, *arguments(
        olmo2, text, tmp_path / "out", "--mask", mask, "--compact"))
