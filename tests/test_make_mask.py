"""make_mask.py: exactly int(k * columns) columns, the highest, deterministically; HFT, S2FT; and
what it refuses.
"""

import hashlib
import json
import re
from collections import Counter

import pytest
import torch
from conftest import MODELS, SIZES, tiny_model, tiny_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import make_mask
import score


@pytest.fixture(scope="module")
def scores(olmo2, chats, tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "scores-wanda.safetensors"
    score.main(
        [
            "--model",
            str(olmo2),
            "--data",
            str(chats),
            "--out",
            str(path),
            "--num-samples",
            "4",
            "--seq-len",
            "64",
        ]
    )
    return path


def run(scores, out, ratio):
    make_mask.main(["--scores", str(scores), "--out", str(out), "--ratio", str(ratio)])
    return load_file(out)


@pytest.mark.parametrize("ratio", [0, 0.125, 0.29, 0.5, 1 / 3, 1])
def test_exactly_the_highest_columns_are_frozen(scores, ratio, tmp_path):
    masks, values = run(scores, tmp_path / "mask.safetensors", ratio), load_file(scores)
    assert set(masks) == set(values)
    for name, mask in masks.items():
        assert mask.dtype == torch.uint8
        assert mask.shape == ((1, *values[name].shape) if "proj" in name else values[name].shape)
        flat = mask.flatten()
        assert len(flat) == len(values[name]) and (flat == 0).sum() == int(ratio * len(flat))
        if 0 < (flat == 0).sum() < len(flat):
            assert values[name][flat == 0].min() > values[name][flat == 1].max()


def test_ties_freeze_the_lower_index():
    assert make_mask.top_mask(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 0.4).tolist() == [
        1,
        0,
        0,
        1,
        1,
    ]
    assert make_mask.top_mask(torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0]), 0.4, "lowest").tolist() == [
        1,
        0,
        1,
        0,
        1,
    ]
    many = make_mask.top_mask(
        torch.ones(100_000), 0.3
    )  # enough of them for an unstable sort to show
    assert (many[:30_000] == 0).all() and (many[30_000:] == 1).all()


def test_metadata_and_printed_table(olmo2, scores, tmp_path, capsys):
    masks = run(scores, tmp_path / "mask.safetensors", 0.5)
    metadata = safe_open(tmp_path / "mask.safetensors", "pt").metadata()
    assert (
        metadata["format"] == "ssu-mask"
        and metadata["version"] == "1"
        and metadata["ratio"] == "0.5"
    )
    assert metadata["scores_sha256"] == hashlib.sha256(scores.read_bytes()).hexdigest()
    model = AutoModelForCausalLM.from_pretrained(olmo2)
    zeros = sum(
        int((mask == 0).expand(model.get_parameter(name).shape).sum())
        for name, mask in masks.items()
    )
    assert float(metadata["frozen_fraction"]) == pytest.approx(
        zeros / model.num_parameters(), abs=1e-6
    )
    out = capsys.readouterr().out
    assert "model.layers.*.mlp.down_proj.weight" in out and "50.0%" in out and "50.00%" in out


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as error:
        make_mask.main([str(a) for a in argv])
    assert error.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("ratio", ["-0.1", "1.01", "nan", "half"])
def test_ratio_outside_0_1(ratio, scores, tmp_path, capsys):
    assert "--ratio" in refused(
        capsys, "--scores", scores, "--out", tmp_path / "m", "--ratio", ratio
    )
    assert not (tmp_path / "m").exists()


def damaged(scores, folder, change):
    with safe_open(scores, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    change(metadata, tensors)
    save_file(tensors, folder / "scores.safetensors", metadata=metadata)
    return folder / "scores.safetensors"


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda m, t: m.update(format="ssu-mask"), "not a scores file"),
        (lambda m, t: m.update(version="2"), "not a scores file"),
        (lambda m, t: m.update(axis="diagonal"), "not a scores file"),
        (lambda m, t: m.update(axis="element"), "does not fit"),
        (lambda m, t: m.pop("fingerprint"), "not a scores file"),
        (lambda m, t: m.update(fingerprint="0" * 64), "fingerprint"),
        (lambda m, t: t.update({"extra.weight": torch.ones(3)}), "does not fit"),
        (lambda m, t: t.update({"model.norm.weight": torch.ones(3)}), "does not fit"),
        (
            lambda m, t: t.update({"model.norm.weight": torch.full((32,), float("nan"))}),
            "not finite",
        ),
    ],
)
def test_unfit_scores_files(change, message, scores, tmp_path, capsys):
    assert message in refused(
        capsys, "--scores", damaged(scores, tmp_path, change), "--out", tmp_path / "m"
    )
    assert not (tmp_path / "m").exists()


def test_truncated_foreign_or_missing_scores_file_and_unwritable_out(scores, tmp_path, capsys):
    (tmp_path / "cut").write_bytes(scores.read_bytes()[:-100])
    (tmp_path / "text").write_text("hello")
    for name in ("cut", "text", "none"):
        assert "cannot be read" in refused(
            capsys, "--scores", tmp_path / name, "--out", tmp_path / "m"
        )
    assert "cannot be written" in refused(capsys, "--scores", scores, "--out", tmp_path / "text/m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("axis,per", [("row", 1), ("element", None)])
def test_rows_and_elements(axis, per, olmo2, chats, tmp_path):
    """Table 3's masks, in their smallest shapes, freeze the highest sums of |theta|."""
    score.main(
        [
            "--model",
            str(olmo2),
            "--method",
            "magnitude",
            "--axis",
            axis,
            "--out",
            str(tmp_path / "s"),
        ]
    )
    masks = run(tmp_path / "s", tmp_path / "m", 0.25)
    model = AutoModelForCausalLM.from_pretrained(olmo2, dtype=torch.float32)
    for name, mask in masks.items():
        s = model.get_parameter(name).detach().abs()
        if s.dim() == 2 and per is not None:
            s = s.sum(per, keepdim=True)
        assert mask.shape == s.shape and (mask == 0).sum() == int(0.25 * s.numel())
        assert s[mask == 0].min() >= s[mask == 1].max()


def masks_of(method, model, out, *extra):
    make_mask.main(["--method", method, "--model", str(model), "--out", str(out), *map(str, extra)])
    return load_file(out)


def hft_counts(masks):
    """Frozen matrices of attention, matrices of the MLP and norms in each layer."""
    counts = [Counter(), Counter(), Counter()]
    for name, mask in masks.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer and name.endswith("weight"):
            kind = 2 if "norm" in name else "self_attn" not in name
            counts[kind][int(layer[1])] += int(mask.item() == 0)
    return [[count[layer] for layer in sorted(count)] for count in counts]


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Ten layers of an OLMo-2 (four norms in each), a Llama (two) and a Qwen-2 (biases), without
    their weights.
    """
    folders = {}
    for kind, (config, _, extra) in MODELS.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        config(vocab_size=400, **SIZES | {"num_hidden_layers": 10}, **extra).save_pretrained(
            folders[kind]
        )
        tiny_tokenizer().save_pretrained(folders[kind])
    return folders


@pytest.mark.parametrize("kind,norms", [("olmo2", 4), ("llama", 2), ("qwen2", 2)])
def test_hft_freezes_two_of_four_two_or_one_of_three_and_half_of_the_norms(
    kind, norms, deep, tmp_path
):
    masks = masks_of("hft", deep[kind], tmp_path / "m")
    attention, mlp, norm = hft_counts(masks)
    assert attention == [2] * 10 and sorted(mlp) == [1] * 5 + [2] * 5 and norm == [norms // 2] * 10
    assert mlp != sorted(mlp) and mlp != sorted(mlp, reverse=True)  # a random half, not the first
    assert all(mask.numel() == 1 for mask in masks.values())
    assert masks["model.norm.weight"].item() == 1 and not any(
        "embed" in n or "lm_head" in n for n in masks
    )
    for name, mask in masks.items():
        assert not name.endswith("bias") or mask.item() == masks[name[:-4] + "weight"].item()
    frozen = {
        layer: {
            n[-13:]
            for n in masks
            if f".{layer}.self_attn" in n and "proj" in n and not masks[n].any()
        }
        for layer in range(10)
    }
    assert len(set(map(frozenset, frozen.values()))) > 1  # drawn anew in each layer
    other = masks_of("hft", deep[kind], tmp_path / "o", "--seed", 43)
    assert any(masks[name].item() != other[name].item() for name in masks)
    again = masks_of("hft", deep[kind], tmp_path / "a")
    assert all(torch.equal(masks[name], again[name]) for name in masks)


@pytest.mark.parametrize("ratio", [0, 0.125, 0.25, 0.75, 0.875, 1])
def test_hft_at_other_ratios(ratio, deep, tmp_path):
    for counts, n in zip(
        hft_counts(masks_of("hft", deep["llama"], tmp_path / "m", "--ratio", ratio)),
        (4, 3, 2),
        strict=True,
    ):
        assert sum(counts) == int(ratio * n * 10) and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("ratio,channels,heads", [(0.9, 5, 1), (0.5, 25, 2)])
@pytest.mark.parametrize("output", [False, True])
def test_s2ft_trains_exactly_the_expected_parameters(output, ratio, channels, heads, tmp_path):
    """1 - 0.9 is less than 0.1, but a tenth of 50 channels is five of them."""
    model = tiny_model(tmp_path / "model", "llama", num_hidden_layers=10, intermediate_size=50)
    masks = masks_of(
        "s2ft-down-output" if output else "s2ft-down", model, tmp_path / "m", "--ratio", ratio
    )
    shapes = json.loads(safe_open(tmp_path / "m", "pt").metadata()["shapes"])
    assert masks.keys() == shapes.keys()  # embeddings and head too
    for name, mask in masks.items():
        if "down_proj" in name:
            assert mask.shape == (1, 50) and mask.sum() == channels
        elif "o_proj" in name and output:  # of four heads, each with 8 columns
            assert (
                mask.shape == (1, 32)
                and sorted(mask.view(4, 8).sum(1).tolist()) == [0] * (4 - heads) + [8] * heads
            )
        else:
            assert mask.numel() == 1 and mask.item() == 0
    chosen = {tuple(mask.flatten().tolist()) for name, mask in masks.items() if "down_proj" in name}
    assert len(chosen) > 5


@pytest.mark.parametrize(
    "kind,names",
    [
        ("olmo2", {"model.embed_tokens.weight", "lm_head.weight"}),
        ("llama", {"model.embed_tokens.weight"}),
    ],
)
def test_chat_tokens_are_frozen_for_any_mask(kind, names, tmp_path):
    model = tiny_model(tmp_path / "model", kind)
    tokenizer = AutoTokenizer.from_pretrained(model)
    said = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    expected = set(tokenizer(said)["input_ids"])
    score.main(["--model", str(model), "--method", "magnitude", "--out", str(tmp_path / "s")])
    make_mask.main(
        ["--scores", str(tmp_path / "s"), "--out", str(tmp_path / "m"), "--freeze-chat-tokens"]
    )
    for masks in (
        load_file(tmp_path / "m"),
        masks_of("hft", model, tmp_path / "h", "--freeze-chat-tokens"),
    ):
        assert {name for name in masks if "embed" in name or "lm_head" in name} == names
        for name in names:
            assert (
                masks[name].shape == (400, 1)
                and set((masks[name] == 0).nonzero()[:, 0].tolist()) == expected
            )
    assert not any("embed" in name for name in run(tmp_path / "s", tmp_path / "off", 0.5))


def test_a_template_without_a_system_turn(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        + tokenizer.chat_template
    )
    assert make_mask.chat_token_ids(tokenizer) == sorted(
        set(tokenizer("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    )
    tokenizer.chat_template += "{% if add_generation_prompt %}<|endoftext|>{% endif %}"
    assert tokenizer("<|endoftext|>")["input_ids"][0] in make_mask.chat_token_ids(tokenizer)


def test_jaccard_of_columns_rows_and_whole_matrices():
    def zeros(mask, shape):
        return {tuple(i) for i in (mask.expand(shape) == 0).nonzero().tolist()}

    generator = torch.Generator().manual_seed(1)
    column, row, element = (
        torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8)
        for shape in ((1, 6), (5, 1), (5, 6))
    )
    whole = torch.zeros(1, 1, dtype=torch.uint8)
    for a in (column, row, element, whole):
        for b in (column, row, element, whole):
            x, y = zeros(a, (5, 6)), zeros(b, (5, 6))
            share = len(x) * len(y) / 900
            assert make_mask.overlap(a, b) == pytest.approx(
                (len(x & y) / len(x | y), share / (len(x) / 30 + len(y) / 30 - share))
            )
    assert make_mask.overlap(1 - whole, 1 - whole) is None


def test_compare_prints_each_layer_and_kind(olmo2, scores, tmp_path, capsys):
    run(scores, tmp_path / "half", 0.5)
    run(scores, tmp_path / "quarter", 0.25)
    capsys.readouterr()
    make_mask.main(["--compare", str(tmp_path / "half"), str(tmp_path / "half")])
    make_mask.main(["--compare", str(tmp_path / "half"), str(tmp_path / "quarter")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    same, nested = lines[:7], lines[7:]
    assert "q_proj" in same[2] and "post_feedforward_layernorm" in same[2]
    assert [line[0] for line in same[3:]] == ["0", "1", "mean", "chance"]
    assert {value for line in same[3:6] for value in line[1:]} == {"1.000"} and set(
        same[6][1:]
    ) == {"0.333"}
    assert {value for line in nested[3:6] for value in line[1:]} == {
        "0.500"
    }  # a quarter of the columns, in the half
    assert set(nested[6][1:]) == {"0.200"}  # .125 / (.5 + .25 - .125)


def test_compare_with_whole_modules_and_nothing_frozen(olmo2, scores, tmp_path, capsys):
    """Half of the columns and a whole matrix share .5, by necessity; and nothing with a matrix
    that HFT leaves.
    """
    run(scores, tmp_path / "half", 0.5)
    masks = masks_of("hft", olmo2, tmp_path / "hft")
    masks_of("hft", olmo2, tmp_path / "none", "--ratio", 0)
    capsys.readouterr()
    make_mask.main(["--compare", str(tmp_path / "half"), str(tmp_path / "hft")])
    make_mask.main(["--compare", str(tmp_path / "none"), str(tmp_path / "none")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[5][1:] == lines[6][1:]  # mean and chance: no randomness is left in it
    q = lines[2].index("q_proj")
    for layer in range(2):
        frozen = masks[f"model.layers.{layer}.self_attn.q_proj.weight"].item() == 0
        assert lines[3 + layer][q] == ("0.500" if frozen else "0.000")
    assert lines[9] == ["layer"]


def test_which_arguments_belong_together(olmo2, llama, scores, tmp_path, capsys):
    out = tmp_path / "m"
    assert "give --scores" in refused(capsys, "--out", out)[-200:]
    assert "give --scores" in refused(
        capsys, "--out", out, "--scores", scores, "--method", "hft", "--model", olmo2
    )
    assert "belong together" in refused(capsys, "--out", out, "--method", "hft")
    assert "--out is missing" in refused(capsys, "--scores", scores)
    s2ft = ["--model", olmo2, "--out", out, "--method"]
    assert "no weight of down_proj" in refused(capsys, *s2ft, "s2ft-down", "--ratio", 1)
    assert "no weight of down_proj" in refused(
        capsys, *s2ft, "s2ft-down-output"
    )  # 1.5% of 48 channels
    assert "has none" in refused(capsys, *s2ft, "hft", "--freeze", "lowest")
    assert "--seed is score.py's" in refused(capsys, "--scores", scores, "--out", out, "--seed", 1)
    assert "nothing else" in refused(capsys, "--compare", out, out, "--out", out)
    assert "nowhere" in refused(capsys, "--method", "hft", "--model", "./nowhere", "--out", out)
    make_mask.main(["--scores", str(scores), "--out", str(out)])
    masks_of("hft", llama, tmp_path / "other")
    capsys.readouterr()
    assert "models that differ" in refused(capsys, "--compare", out, tmp_path / "other")
    damaged(
        out,
        tmp_path,
        lambda m, t: t.update({"model.norm.weight": torch.ones(3, dtype=torch.uint8)}),
    )
    assert "does not fit" in refused(capsys, "--compare", out, tmp_path / "scores.safetensors")
    damaged(out, tmp_path, lambda m, t: m.pop("fingerprint"))
    assert "not a mask file" in refused(capsys, "--compare", out, tmp_path / "scores.safetensors")
    assert "not a mask file" in refused(capsys, "--compare", out, scores)
    assert "cannot be read" in refused(capsys, "--compare", out, tmp_path / "none")
