"""tools/plan.py: memory against published counts, and what a run needs against the stand-in hub."""

import itertools
import json
import os
import re
import shutil
import types
from collections import Counter

import huggingface_hub
import pytest
import torch
from conftest import tiny_model
from hub import HUB, REQUESTS
from paper_hub import MADLAD, put_harness_data, put_madlad, put_tulu
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    OPTConfig,
)

import score
import train
from data import blocks, calibration, rows
from tools import chat_eval, judged, memory, plan
from variants import adalora, adamw8bit, compact, distributed


@pytest.fixture(scope="module")
def olmo2_7b():
    """OLMo-2 7B: its config, {name: number of weights}, and half of each matrix's columns."""
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
        model = AutoModelForCausalLM.from_config(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return config, sizes, memory.trained_fractions(model, 0.5)


def test_state_of_a_7b_model_is_what_counting_gives(olmo2_7b):
    _, sizes, half = olmo2_7b
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    rest = 2 * 100352 * 4096 + (32 * 4 + 1) * 4096
    assert sum(sizes[name] for name in half) == linear
    assert memory.state_bytes(sizes, "bf16") == 16 * (linear + rest)
    assert memory.state_bytes(sizes, "bf16-true") == 12 * (linear + rest)
    assert memory.state_bytes(sizes, "bf16", half) == 10 * linear + 16 * rest
    assert memory.state_bytes(sizes, "bf16-true", half) == 8 * linear + 12 * rest
    assert memory.state_bytes(sizes, "fp32", half) == 12 * linear + 16 * rest
    scales = 2 * 4 / 256
    eight_bit = (2 + 2 + scales / 2) * linear + (6 + scales) * rest
    assert memory.state_bytes(sizes, "bf16-true", half, True) == eight_bit
    assert round(eight_bit / 1e9, 1) == 31.0


def test_the_table_says_what_docs_performance_says(olmo2_7b, capsys):
    """An 80 GB card holds 7B with fp32 weights only in compact training with recomputation."""
    plan.print_table(plan.parse_args(["--model", "some/7b"]), olmo2_7b)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[0] == ("| training | state, GB | 24 GB GPU | 40 GB GPU | 80 GB GPU | 141 GB GPU |")
    cells = {row.split(" | ")[0].strip("| "): row.strip(" |").split(" | ")[1:] for row in rows}
    assert cells["masked, bf16"][:4] == ["116.8", "- / -", "- / -", "- / -"]
    assert cells["compact, bf16"][:4] == ["77.9", "- / -", "- / -", "- / 4"]
    assert cells["masked, bf16-true"][:4] == ["87.6", "- / -", "- / -", "- / -"]
    assert cells["compact, bf16-true"][:4] == ["61.7", "- / -", "- / -", "4 / 16"]
    assert cells["compact, bf16-true, adamw8bit"][:4] == ["31.0", "- / -", "1 / 8", "8 / 32"]


def test_the_bytes_of_a_card_are_more_than_its_name_says():
    held = {name: round(size / 1e9, 1) for name, size in memory.GPUS.items()}
    assert held == {"24 GB": 25.3, "40 GB": 42.4, "80 GB": 85.5, "141 GB": 150.0}


def peak_of(function):
    """The most bytes that PyTorch's allocator held at once for a function, beside those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def measured(config, precision, layout, recompute, tokens):
    """(bytes of weights, gradients, moments; peak of a micro-batch or step), by the real code."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    masks = {}
    for name in memory.trained_fractions(model, 0.5):
        columns = torch.arange(model.get_parameter(name).shape[1])
        masks[name] = (columns % 2).view(1, -1).to(torch.uint8)
    if layout != "masked":
        compact.make_compact(model, masks, precision, in_place=layout == "adamw8bit")
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def micro_batch():
        with torch.autocast("cpu", torch.bfloat16, precision == "bf16", cache_enabled=False):
            loss = train.next_token_loss(model, tokens)
        loss.backward()

    micro_batch()  # the second adds to gradients that are there
    peak = peak_of(micro_batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    if layout == "adamw8bit":
        moments = [tensor for p in trained for tensor in adamw8bit.new_state(p).values()]
    else:
        argv = ["--model", "", "--data", "", "--out", "", "--precision", precision]
        optimizer, _, _ = train.make_optimizer(model, {}, train.parse_args(argv))
        optimizer.step()
        peak = max(peak, peak_of(optimizer.step))
        moments = [tensor for p in trained for tensor in optimizer.state[p].values()]
    tensors = [*model.parameters(), *[p.grad for p in trained], *moments]
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values()), peak


FAST = ("olmo2 bf16 masked recompute", "llama fp32 compact", "olmo2 bf16-true adamw8bit")
CASES = []
for kind, way, more in itertools.product(
    ("olmo2", "llama"),
    ("bf16 masked", "bf16 compact", "bf16-true masked", "bf16-true compact")
    + ("bf16-true adamw8bit", "fp32 masked", "fp32 compact"),
    ("", " recompute"),
):
    case = f"{kind} {way}{more}"
    CASES.append(case if case in FAST else pytest.param(case, marks=pytest.mark.slow))


@pytest.mark.parametrize("case", CASES)
def test_all_bytes_are_counted_within_three_percent(case):
    """Against tensors and PyTorch's allocator, of a small model in large models' proportions."""
    kind, precision, layout, *more = case.split()
    sizes = dict(vocab_size=3136, hidden_size=128, intermediate_size=352, num_hidden_layers=3)
    sizes |= dict(num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if kind == "olmo2":
        config = Olmo2Config(**sizes, tie_word_embeddings=False)
    else:
        config = LlamaConfig(**sizes, tie_word_embeddings=True, num_key_value_heads=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    numbers = {name: p.numel() for name, p in model.named_parameters()}
    way = (config, numbers, memory.trained_fractions(model, 0.5)), precision, layout != "masked"
    tokens = torch.randint(0, 3136, (2, 96), generator=torch.Generator().manual_seed(0))
    state, peak = measured(config, precision, layout, bool(more), tokens)
    eight_bit = layout == "adamw8bit"
    planned, total = memory.bytes_per_gpu(*way, 1, tokens.numel(), bool(more), eight_bit)
    assert planned == pytest.approx(state, rel=0.002)
    assert total - planned - memory.ALLOWANCE == pytest.approx(peak, rel=0.04)
    assert total - memory.ALLOWANCE == pytest.approx(state + peak, rel=0.03)


WAYS = ("fp32 masked", "fp32 compact", "bf16 masked", "bf16 compact")
# What is the most in no model above: the gradients of tied embeddings, and a layer's own
FEW_TOKENS, LARGE_LAYERS = (8192, 128, 4), (384, 1536, 16)  # vocabulary, width of the MLP, tokens
PROPORTIONS = [(FEW_TOKENS, way, recompute) for way in WAYS for recompute in (False, True)]
PROPORTIONS += [(LARGE_LAYERS, way, True) for way in WAYS if way != "bf16 masked"]


@pytest.mark.parametrize("proportions, way, recompute", PROPORTIONS)
def test_embeddings_and_large_layers_are_counted(proportions, way, recompute):
    """Against PyTorch's allocator: the most bytes of a micro-batch, beside weights and moments."""
    vocabulary, width, count = proportions
    sizes = dict(vocab_size=vocabulary, hidden_size=128, intermediate_size=width)
    sizes |= dict(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(**sizes, pad_token_id=0, tie_word_embeddings=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    numbers = {name: p.numel() for name, p in model.named_parameters()}
    counted = config, numbers, memory.trained_fractions(model, 0.5)
    precision, layout = way.split()
    tokens = torch.randint(0, 384, (2, count // 2), generator=torch.Generator().manual_seed(0))
    _, peak = measured(config, precision, layout, recompute, tokens)
    way = counted, precision, layout == "compact", 1, count, recompute
    planned, total = memory.bytes_per_gpu(*way)
    assert total - planned - memory.ALLOWANCE == pytest.approx(peak, rel=0.04)


def test_recomputation_needs_less_and_more_tokens_need_more(olmo2_7b):
    def needed(tokens, recompute):
        return memory.bytes_per_gpu(olmo2_7b, "bf16", False, 1, tokens, recompute)[1]

    assert needed(2048, True) < needed(2048, False)
    assert needed(4096, True) > needed(2048, True)
    # The logits of a whole micro-batch and their gradients exist at once.
    state, total = memory.bytes_per_gpu(olmo2_7b, "bf16", False, 1, 16384, True)
    assert total - state > 12 * 16384 * 100352


@pytest.mark.parametrize("precision", ["bf16", "bf16-true", "fp32"])
@pytest.mark.parametrize("kind", ["masked", "compact"])
def test_several_gpus_hold_what_counting_gives(kind, precision, olmo2_7b):
    """State is shared; two gathered layers, the gradients of one and all else are not."""
    compact = kind == "compact"
    one = memory.bytes_per_gpu(olmo2_7b, precision, compact, 1, 2048, True)
    eight = memory.bytes_per_gpu(olmo2_7b, precision, compact, 8, 2048, True)
    assert eight[0] * 8 == one[0]
    linear = 4 * 4096 * 4096 + 3 * 4096 * 11008  # of one layer
    outside = 2 * 100352 * 4096 + 4096
    trained = linear / 2 if compact else linear
    columns = linear / 2 if compact else 0
    gathered, low, high = {
        "bf16": (2, 2, 4),
        "bf16-true": (2, 2, 2),
        "fp32": (4, 4, 4),
    }[precision]
    norms = 4 * 4096
    expected = 2 * gathered * (linear + columns + norms) + (low + 4) * (trained + norms)
    expected += (high + high + 4) * outside
    config, sizes, half = olmo2_7b
    counted = memory.gathered_bytes(config, sizes, precision, half if compact else None)
    assert counted == pytest.approx(expected, rel=1e-12)
    assert counted < eight[1] - eight[0] < one[1] - one[0] + counted * 1.0001
    assert eight[1] < one[1]


@pytest.mark.parametrize("precision", ["bf16", "bf16-true", "fp32"])
def test_a_layer_is_gathered_in_the_bytes_of_the_formula(precision, olmo2, tmp_path):
    """Count the bytes of the parameters that fully_shard gathers for one layer."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(olmo2, dtype=dtype)
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        distributed.shard(model, precision)
        layer = model.model.layers[0]
        units = [m for m in layer.modules() if isinstance(m, FSDPModule)]
        for unit in units:
            unit.unshard()
        gathered = sum(p.nbytes for p in layer.parameters())
        model.unshard()
        outside = [p for name, p in model.named_parameters() if ".layers." not in name]
        kept = sum(p.nbytes for p in outside)
    finally:
        torch.distributed.destroy_process_group()
    weights = sum(p.numel() for p in layer.parameters())
    count = sum(p.numel() for p in outside)
    counted = memory.gathered_bytes(model.config, sizes, precision)
    low = 4 if precision == "fp32" else 2
    expected = 2 * gathered + (low + 4) * weights + 2 * kept + 4 * count
    assert counted == pytest.approx(expected, rel=0.02)  # norms are gathered in fp32


def test_several_gpus_need_no_copies_and_share_the_step(olmo2_7b):
    """They gather matrices in bf16. The step of bf16-true takes 8 bytes a weight of their part of
    the largest matrix, that of 8-bit moments less.
    """
    config, sizes, half = olmo2_7b
    linear, head = sum(sizes[name] for name in half), 100352 * 4096

    def more(precision, columns, gpus, tokens, eight_bit=False):
        way = olmo2_7b, precision, columns, gpus, tokens, False, eight_bit
        state, total = memory.bytes_per_gpu(*way)
        gathered = memory.gathered_bytes(config, sizes, precision, half if columns else None)
        return total - state - memory.ALLOWANCE - (gathered if gpus > 1 else 0)

    for precision in ("bf16", "bf16-true", "fp32"):
        for columns in (False, True):
            copies = 2 * linear if (precision, columns) == ("bf16", False) else 0
            apart = more(precision, columns, 1, 2048) - more(precision, columns, 8, 2048)
            assert apart == pytest.approx(copies, abs=1e3)
    assert more("bf16-true", True, 1, 1) == pytest.approx(8 * head, abs=1e3)
    assert more("bf16-true", True, 8, 1) < 3 * head
    assert more("bf16-true", True, 1, 1, eight_bit=True) < 3 * head


def test_the_table_of_eight_gpus_has_a_column_more(olmo2_7b, capsys):
    argv = ["--model", "some/7b", "--gpus", "8", "--micro-batch-size", "2"]
    plan.print_table(plan.parse_args(argv), olmo2_7b)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[0].startswith("| training | state, GB | per GPU, 8 GPUs | 24 GB GPU |")
    masked = rows[1].strip("| ").split(" | ")
    _, needed = memory.bytes_per_gpu(olmo2_7b, "bf16", False, 8, 2 * 512, True)
    assert masked[:3] == ["masked, bf16", "116.8", f"{needed / 1e9:.1f}"]
    assert masked[-1] == "4 / 4"  # a GPU has no more than its part of the batch


@pytest.mark.parametrize("more", [["--gpus", "8"], ["--precision", "bf16"]], ids=" ".join)
def test_moments_of_8_bits_need_one_gpu_and_bf16(more, olmo2, refused):
    argv = ["--check", "--model", str(olmo2), "--optimizer", "adamw8bit"]
    assert plan.main(argv) == 0
    assert "needs one GPU and bf16-true" in refused(plan.main, *argv, *more)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--methods", "adalora", "--precision", "fp16"], "adalora: takes neither"),
        (["--methods", "adalora", "--optimizer", "adamw8bit"], "adalora: takes neither"),
        (["--compact", "1", "--precision", "fp16"], "Set COMPACT=0"),
        (["--lr", "-1"], "--lr -1.0: must be a finite number"),
        (["--lr", "nan"], "--lr nan: must be a finite number"),
        (["--methods", "hft", "gmt", "--ratios", "0.5", "1"], "--ratios 1: must lie between"),
        (["--seed", "1000000000000000000"], "must lie between 0 and 10^18"),
        (["--tasks", "mt", "bpb"], "--tasks bpb: the paper profile has no held-out text"),
        (["--model", "m" * 300], "mmm"),  # longer than a file system allows
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_training_would_refuse_is_refused_first(more, message, olmo2, refused):
    assert message in refused(plan.main, "--check", "--model", olmo2, *more)


def test_an_evaluation_of_another_ratio_or_method_does_not_count(olmo2, tmp_path, refused):
    argv = ["--check", "--model", olmo2, "--lang", "ne", "--profile", "embedded", "--tasks", "chat"]
    argv += ["--runs", tmp_path, "--data-dir", tmp_path, "--ratios", "0.5", "0.25"]
    argv += ["--methods", "ssu-wanda"]
    for name in ("source", "ssu-wanda", "ssu-wanda-row"):
        (tmp_path / "ne" / name).mkdir(parents=True)
        (tmp_path / "ne" / name / "eval.json").touch()
    assert "has not evaluated ssu-wanda@0.25." in refused(plan.main, *argv)
    (tmp_path / "ne/ssu-wanda").rename(tmp_path / "ne/ssu-wanda@0.25")
    assert "has not evaluated ssu-wanda." in refused(plan.main, *argv)
    assert plan.main([*map(str, argv), "--ratios", "0.25"]) == 0


def test_a_language_without_sets_of_the_paper_is_refused(olmo2, refused, monkeypatch):
    monkeypatch.setitem(rows.LANGUAGES, "sw", {"name": "Swahili", "flores": "swh_Latn"})
    argv = ["--check", "--model", str(olmo2), "--lang", "sw", "--data-dir", str(olmo2)]
    line = refused(plan.main, *argv)
    assert "has no belebele global_mmlu xlsum for sw. Add them, or use text of your own" in line
    assert plan.main([*argv, "--profile", "embedded", "--tasks", "bpb"]) == 0


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_layer=1, n_embd=32, n_head=2),
        OPTConfig(),
        OlmoeConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_experts=4),
        JambaConfig(num_hidden_layers=2, hidden_size=32, intermediate_size=32),
    ],
)
def test_memory_of_an_unknown_architecture_is_not_counted(config, tmp_path, capsys):
    config.save_pretrained(tmp_path)
    assert plan.main(["--model", str(tmp_path)]) == 0
    assert f"memory: not counted for {config.model_type}" in capsys.readouterr().out


def test_a_plan_is_of_the_largest_training_and_of_the_models_dtype(olmo2_7b, tmp_path, capsys):
    """The lowest ratio trains most, and LoTA has masks of single weights beside what FFT has."""
    olmo2_7b[0].save_pretrained(tmp_path)
    argv = ["--model", tmp_path, "--lang", "ne", "--profile", "embedded", "--tasks", "bpb"]
    argv += ["--data-dir", tmp_path, "--runs", tmp_path, "--calibration", "file", "--compact", "1"]

    def planned(*more):
        plan.main([*map(str, argv), *more])
        (line,) = re.findall("memory of a process of (.*); ", capsys.readouterr().out)
        return line

    count = sum(olmo2_7b[1].values())
    for dtype, size in (("bfloat16", 2), ("float32", 4)):  # two checkpoints and a model
        config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": dtype}
        (tmp_path / "config.json").write_text(json.dumps(config))
        plan.main([*map(str, argv), "--methods", "fft"])
        disk = f"disk: {(20 + size) * count / 1e9:.1f} GB for {tmp_path}\n"
        assert disk in capsys.readouterr().out
    wanda = ["--methods", "ssu-wanda", "--ratios"]
    assert planned(*wanda, "0.75", "0.25") == planned(*wanda, "0.25") != planned(*wanda, "0.75")
    assert planned(*wanda, "0.75").startswith("ssu-wanda: ")
    assert planned("--methods", "fft", "lota-90", "hft").startswith("lota-90: 87.6 GB")


def test_experts_are_refused_before_other_methods_train(tmp_path, capsys):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=4, num_local_experts=2, vocab_size=400)
    MixtralConfig(**sizes).save_pretrained(tmp_path)
    argv = ["--model", tmp_path, "--lang", "ne", "--data-dir", tmp_path, "--runs", tmp_path]
    argv = [*map(str, argv), "--calibration", "file", "--profile", "embedded"]
    argv += ["--tasks", "bpb", "--methods", "fft"]
    assert plan.main(argv) == 0
    with pytest.raises(SystemExit):
        plan.main([*argv, "ssu-wanda"])
    assert "cannot be scored" in capsys.readouterr().err


def put_glotlid_file():
    """Serve a file in the place of GlotLID's model, of which a plan only asks the size."""
    folder = HUB / "models" / plan.GLOTLID[1]
    folder.mkdir(parents=True)
    (folder / "model_v3.bin").write_bytes(b"weights")


def problems_in(out):
    return [line for line in out.splitlines() if line.startswith("problem: ")]


def test_plan_says_what_does_not_fit(paper_sets, tmp_path, monkeypatch, capsys):
    put_harness_data(paper_sets, tmp_path, monkeypatch)
    put_glotlid_file()
    put_tulu(paper_sets)
    put_madlad(paper_sets, "ig", [f"{i}" for i in range(300)])
    argv = ["--lang", "ig", "--model", "someone/tiny", "--steps", "10", "--runs", str(tmp_path)]
    argv += ["--tasks", "mt", "ifeval", "gsm8k", "codemix", "--data-dir", str(tmp_path / "data")]
    assert plan.main(argv) == 0
    out = capsys.readouterr().out
    weights = load_file(HUB / "models/someone/tiny/model.safetensors").values()
    count = sum(tensor.numel() for tensor in weights)
    assert f"someone/tiny: {count:,} parameters" in out
    assert "not to be had" not in out
    sizes = sum(f.stat().st_size for f in (paper_sets / MADLAD / "data/ig").glob("*_clean_*"))
    assert f"{MADLAD:<36} download {sizes / 1e9:8.3f} GB" in out
    fetched = [
        path
        for method, path, _ in REQUESTS
        if method == "GET" and "/resolve/" in path and not path.endswith(".json")
    ]
    assert not fetched
    # Of fft and ssu-wanda, fft takes the most. It is never compact.
    assert plan.main([*argv, "--compact", "1"]) == 0
    (line,) = re.findall("memory of a process .*", out)
    assert line.startswith("memory of a process of fft: ") and line in capsys.readouterr().out

    config = json.loads((HUB / "models/someone/tiny/config.json").read_text())
    large = config | {"hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 2}
    (HUB / "models/someone/large").mkdir()
    (HUB / "models/someone/large/config.json").write_text(json.dumps(large))
    (HUB / "models/someone/large/model.safetensors").write_bytes(b"weights")
    argv[argv.index("someone/tiny")] = "someone/large"
    shutil.rmtree(HUB / "models" / plan.GLOTLID[1])
    assert plan.main(argv) == 2
    problems = problems_in(capsys.readouterr().out)
    assert len(problems) == 3
    assert "glotlid" in problems[0] and "HF_TOKEN" in problems[0]
    assert "disk" in problems[1] and "training by fft takes" in problems[2]
    put_glotlid_file()
    argv[argv.index("someone/large")] = "someone/nothing"
    assert plan.main(argv) == 2
    (problem,) = problems_in(capsys.readouterr().out)
    assert "the hub does not give someone/nothing" in problem


def test_each_method_is_planned_as_it_trains(olmo2):
    """AdaLoRA: against tensors. It runs in one process, and never on weights of bf16."""
    model = AutoModelForCausalLM.from_pretrained(olmo2)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    counted = model.config, sizes, memory.trained_fractions(model, 0.5)
    argv = ["--model", str(olmo2), "--gpus", "2", "--batch-size", "16", "--micro-batch-size", "2"]

    def planned(method, *more):
        return plan.bytes_of(method, plan.parse_args([*argv, *more]), counted)

    gpus, state, _ = planned("adalora")
    expected = 0
    for name, p in adalora.add_adapters(model, steps=100, seed=0).named_parameters():
        if not re.search("lora_|ranknum", name):
            expected += p.nbytes * (4 if p.requires_grad else 1)  # gradient and two moments
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    assert (gpus, state) == (1, expected + 12 * norms)  # of which there are few

    assert planned("fft")[:2] == (2, memory.state_bytes(sizes, "bf16-true") / 2)
    assert planned("fft", "--precision", "fp16")[0] == 1
    assert planned("ssu-wanda", "--compact", "1")[1] < planned("fft", "--compact", "1")[1]
    assert planned("fft", "--gradient-checkpointing")[2] < planned("fft")[2]
    eight_bit = memory.state_bytes(sizes, "bf16-true", None, True)
    assert planned("fft", "--optimizer", "adamw8bit", "--gpus", "1")[1] == eight_bit
    assert planned("lota")[2] == planned("fft")[2] + sum(sizes.values()) / 2
    assert planned("gmt") == planned("fft")  # 16 sequences: four times 2 on each GPU
    assert planned("gmt", "--batch-size", "64")[2] > planned("fft", "--batch-size", "64")[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for processes that share main memory")
def test_processes_on_a_cpu_share_its_memory():
    one, name = plan.device_memory(1)
    assert plan.device_memory(2) == (one / 2, name) and "without a CUDA device" in name


@pytest.mark.parametrize(
    "method, more, remedies",
    [
        ("adalora", [], []),
        ("fft", ["--precision", "bf16"], ["PRECISION=bf16-true", "OPTIMIZER=adamw8bit"]),
        ("fft", ["--gpus", "2"], []),
        ("hft", [], ["OPTIMIZER=adamw8bit", "COMPACT=1"]),
        ("hft", ["--optimizer", "adamw8bit", "--compact", "1"], []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_does_not_fit_is_told_what_may_help(method, more, remedies, olmo2, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(olmo2)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    counted = model.config, sizes, memory.trained_fractions(model, 0.5)
    monkeypatch.setattr(plan, "device_memory", lambda gpus: (1e6, "a card"))
    args = plan.parse_args(["--model", str(olmo2), "--methods", method, *more])
    (problem,) = plan.check_memory(args, counted)
    tried = ", ".join([*remedies, "leave it out of METHODS"])
    assert problem.endswith(f" GB, and a card has 0.0. Try {tried}")


def test_plan_counts_what_comes_to_the_disk(tmp_path, monkeypatch, capsys):
    argv = ["--model", str(tmp_path), "--lang", "ig", "--runs", str(tmp_path / "runs")]
    argv += ["--methods", "gmt", "fft", "--ratios", "0.25", "0.5", "--precision", "bf16"]
    args = plan.parse_args(argv)

    def planned():
        problems = plan.check_disk(args, 10**9, 4, Counter(dataset=3 * 10**9, model=10**9))
        return problems, re.findall(r"disk: (\S+) GB", capsys.readouterr().out)

    # A model does not come to the cache of data sets. Two checkpoints and the three models
    assert planned()[1] == ["4.0", "9.0", "36.0"]
    for done, left in (("ig/gmt@0.25", "31.0"), ("ig/gmt@0.75", "36.0"), ("ne/fft", "36.0")):
        (tmp_path / "runs" / done).mkdir(parents=True)
        with open(tmp_path / "runs" / done / "state.safetensors", "wb") as file:
            file.truncate(5 * 10**9)
        assert planned()[1][2] == left
        shutil.rmtree(tmp_path / "runs")

    args.optimizer = "adamw8bit"  # 4 bytes of weights and moments, and a few of blocks
    assert planned()[1][2] == "21.0"
    args.optimizer = "adamw"
    args.precision = "bf16-true"  # weights of 2 bytes, moments of 8
    assert planned()[1][2] == "32.0"
    args.precision = "bf16"
    gmt_and_fft = args.methods
    for methods, most in (
        (["lota-90"], "38.0"),  # its model and the one before, scores of 4 bytes, two masks of 1
        (["ssu-wanda-element"], "33.0"),
        ([], "0.0"),  # evaluation alone
    ):
        args.methods, args.ratios = methods, [0.5]
        assert planned()[1][2] == most
    args.methods, args.ratios = gmt_and_fft, [0.25, 0.5]

    # All that comes to one disk must fit together.
    for free, fits in ((49.1, True), (48.9, False)):
        space = types.SimpleNamespace(free=int(free * 1e9))
        monkeypatch.setattr(shutil, "disk_usage", lambda place, space=space: space)
        problems, _ = planned()
        assert fits == (problems == []) and all("lacks 0.1 GB" in line for line in problems)


def test_a_cache_that_nothing_comes_to_need_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path / "hub")
    args = plan.parse_args(["--model", str(tmp_path), "--lang", "ne", "--runs", str(tmp_path)])
    assert plan.check_disk(args, 1000, 2, Counter()) == []
    (problem,) = plan.check_disk(args, 1000, 2, Counter(model=1))
    assert f"{tmp_path}/hub cannot be written" in problem


def test_what_is_in_the_cache_is_not_downloaded_again(paper_sets, llama, capsys):
    put_madlad(paper_sets, "ig", [f"{i}" for i in range(300)])
    sizes = sum(f.stat().st_size for f in (paper_sets / MADLAD / "data/ig").glob("*_clean_*"))
    args = plan.parse_args(["--lang", "ig", "--model", str(llama), "--methods", "fft"])
    assert plan.check_downloads(args) == (Counter(dataset=sizes), [])
    blocks.load_documents("--data", "madlad:ig", None, "key")
    assert plan.check_downloads(args) == (Counter(dataset=0), [])


def test_calibration_text_is_fetched_for_the_methods_that_read_it(olmo2):
    read = {f"ssu-{name}" for name in score.CALIBRATED} | {"ssu-wanda-row", "ssu-wanda-element"}
    for method in plan.METHODS:
        argv = ["--model", str(olmo2), "--lang", "ne", "--methods", method]
        sources = plan.wanted_sources(plan.parse_args(argv))
        assert (plan.TULU in sources) == (method in read), method


def test_main_memory_holds_the_source_once_more(capsys):
    args = plan.parse_args(["--model", "someone/model", "--methods", "fft", "ssu-wanda"])
    assert plan.check_main_memory(1_000_000, args) == []
    assert "up to 3.0 GB" in capsys.readouterr().out
    args.methods.append("lota-90")  # two models and the scores, all of fp32
    plan.check_main_memory(10**9, args)
    assert "up to 15.0 GB" in capsys.readouterr().out
    (problem,) = plan.check_main_memory(10**13, args)
    assert "main memory lacks" in problem


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    args = plan.parse_args(["--model", str(tmp_path), "--lang", "ne", "--runs", str(tmp_path)])
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path)
    (problem,) = plan.check_disk(args, 1000, 2, Counter())
    assert f"{tmp_path} cannot be written" in problem


def test_what_codemix_needs_depends_on_the_judge(paper_sets, tmp_path, capsys):
    put_tulu(paper_sets)
    put_madlad(paper_sets, "ig", [f"{i}" for i in range(300)])
    argv = ["--lang", "ig", "--model", "someone/tiny", "--tasks", "mt", "codemix"]
    argv += ["--runs", str(tmp_path), "--data-dir", str(tmp_path / "data")]
    assert plan.main(argv) == 2  # GlotLID is not on this hub
    assert "does not give cis-lmu/glotlid" in capsys.readouterr().out
    assert plan.main([*argv, "--language-id", "script"]) == 0
    assert "glotlid" not in capsys.readouterr().out


def test_the_pins_are_those_of_the_stages():
    assert plan.MADLAD[1:] == (blocks.MADLAD, blocks.MADLAD_REVISION)
    assert plan.GLOTLID[1:3] == (chat_eval.GLOTLID[0], chat_eval.GLOTLID[2])
    for name, (repo, revision, _) in calibration.PRESETS.items():
        assert plan.CALIBRATION[name][1:3] == (repo, None if revision == "main" else revision)
    for task, repo in judged.JUDGES.items():
        assert plan.TASK_SOURCES[task][1] == repo


def test_offline_the_hub_is_not_asked(paper_sets, tmp_path, monkeypatch, capsys):
    model = tiny_model(tmp_path / "model")
    argv = ["--lang", "ig", "--model", str(model), "--runs", str(tmp_path / "runs")]
    assert plan.main(argv) == 2  # this hub has no text in Igbo
    asked = len(REQUESTS)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert plan.main(argv) == 0
    assert len(REQUESTS) == asked and "The cache is not checked" in capsys.readouterr().out
