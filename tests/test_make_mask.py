"""make_mask.py: which weights each method freezes, what the file says, and what is refused."""

import hashlib
import io
import json
import os
import re
import shutil

import pytest
import torch
from conftest import (
    MODELS,
    SIZES,
    forked,
    limit_file_size,
    tiny_model,
    tiny_tokenizer,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    MixtralConfig,
    OPTConfig,
)

import make_mask


def digest(tensors):
    text = b""
    for name, tensor in sorted(tensors.items()):
        text += name.encode() + bytes(tensor.untyped_storage())
    return hashlib.sha256(text).hexdigest()


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def write_scores(path, model, axis="column", changes=()):
    """Write random scores of a model's parameters, apart from its embeddings and LM head."""
    shapes = {}
    scores = {}
    generator = torch.Generator().manual_seed(1)
    for name, p in AutoModelForCausalLM.from_pretrained(model).named_parameters():
        shapes[name] = list(p.shape)
        if "embed" not in name and "lm_head" not in name:
            shape = {"column": p.shape[-1:], "row": p.shape[:1], "element": p.shape}[axis]
            scores[name] = torch.rand(shape, generator=generator)
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    metadata = {"format": "ssu-scores", "version": "1", "method": "wanda", "axis": axis}
    metadata |= {"model": str(model), "seed": "42", "shapes": json.dumps(shapes)}
    metadata |= {"fingerprint": hashlib.sha256("\n".join(lines).encode()).hexdigest()}
    metadata |= {"tensors_sha256": digest(scores)} | dict(changes)
    save_file(scores, path, metadata)
    return path


@pytest.fixture(scope="module")
def scores(olmo2, tmp_path_factory):
    return write_scores(tmp_path_factory.mktemp("scores") / "scores.safetensors", olmo2)


def masks_of(out, *argv):
    make_mask.main(["--out", str(out), *map(str, argv)])
    return load_file(out)


# Masks of scores


@pytest.mark.parametrize(
    "axis,ratio,freeze",
    [
        ("column", 0, "highest"),
        ("column", 0.29, "highest"),
        ("column", 1 / 3, "lowest"),
        ("column", 1, "highest"),
        ("row", 0.5, "highest"),
        ("element", 0.29, "highest"),
        ("element", 0.9, "lowest"),
    ],
)
def test_exactly_the_highest_or_lowest_are_frozen(axis, ratio, freeze, olmo2, tmp_path):
    path = write_scores(tmp_path / "scores", olmo2, axis)
    values = load_file(path)
    masks = masks_of(tmp_path / "m", "--scores", path, "--ratio", ratio, "--freeze", freeze)
    assert masks.keys() == values.keys()
    for name, mask in masks.items():
        expected = list(values[name].shape)
        if "proj" in name and axis == "column":
            expected = [1, *expected]
        elif "proj" in name and axis == "row":
            expected = [*expected, 1]
        assert mask.dtype == torch.uint8 and list(mask.shape) == expected
        value = values[name].flatten().tolist()
        ranked = sorted(range(len(value)), key=value.__getitem__, reverse=freeze == "highest")
        frozen = (mask.flatten() == 0).nonzero().flatten().tolist()
        assert frozen == sorted(ranked[: int(ratio * len(value))])


def test_ties_freeze_the_lower_index():
    tied = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    assert make_mask.top_mask(tied, 0.4).tolist() == [1, 0, 0, 1, 1]
    tied = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0])
    assert make_mask.top_mask(tied, 0.4, "lowest").tolist() == [1, 0, 1, 0, 1]
    many = make_mask.top_mask(torch.ones(100_000), 0.3)  # an unstable sort would show
    assert not many[:30_000].any() and many[30_000:].all()


@pytest.mark.parametrize("method,lowest", [("wanda", False), ("delta", True)])
def test_delta_scores_freeze_what_moved_least(method, lowest, olmo2, tmp_path):
    path = write_scores(tmp_path / "scores", olmo2, changes={"method": method})
    masks = masks_of(tmp_path / "default", "--scores", path)
    frozen = load_file(path)["model.norm.weight"][masks["model.norm.weight"] == 0]
    trained = load_file(path)["model.norm.weight"][masks["model.norm.weight"] == 1]
    assert (frozen.max() < trained.min()) == lowest
    assert (frozen.min() > trained.max()) != lowest


def test_the_file_says_what_it_is_and_repeats_byte_by_byte(olmo2, scores, tmp_path, capsys):
    masks = masks_of(tmp_path / "a", "--scores", scores)
    metadata = metadata_of(tmp_path / "a")
    expected = {"format": "ssu-mask", "version": "1", "method": "wanda", "axis": "column"}
    expected |= {"ratio": "0.5", "freeze": "highest", "seed": "42", "model": str(olmo2)}
    expected |= {"fingerprint": metadata_of(scores)["fingerprint"]}
    expected |= {"scores_sha256": digest(load_file(scores)), "tensors_sha256": digest(masks)}
    zeros = 0
    model = AutoModelForCausalLM.from_pretrained(olmo2)
    for name, mask in masks.items():
        zeros += int((mask == 0).expand(model.get_parameter(name).shape).sum())
    expected["frozen_fraction"] = f"{zeros / model.num_parameters():.6f}"
    assert metadata == expected
    row = next(x for x in capsys.readouterr().out.splitlines() if "*.mlp.down_proj.weight" in x)
    assert "50.00% of 3,072 frozen" in row

    header = json.loads((tmp_path / "a").read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert list(header["__metadata__"]) == sorted(expected)
    masks_of(tmp_path / "b", "--scores", scores)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# HFT, S2FT and chat tokens


def hft_counts(masks):
    """Return the numbers of frozen attention matrices, MLP matrices and norms in each layer."""
    counts = {"self_attn": {}, "mlp": {}, "norm": {}}
    for name, mask in masks.items():
        layer = re.search(r"layers\.(\d+)\.(\w+)", name)
        if layer and name.endswith("weight"):
            kind = "norm" if "norm" in name else layer[2]
            frozen = counts[kind].setdefault(int(layer[1]), 0)
            counts[kind][int(layer[1])] = frozen + int(mask.item() == 0)
    return [[found[layer] for layer in sorted(found)] for found in counts.values()]


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Twelve layers of an OLMo-2 (four norms each), a Llama (two) and a Qwen-2 (biases)."""
    folders = {}
    for kind, (config, _, extra) in MODELS.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        sizes = SIZES | {"num_hidden_layers": 12}
        config(vocab_size=400, **sizes, **extra).save_pretrained(folders[kind])
        tiny_tokenizer().save_pretrained(folders[kind])
    return folders


@pytest.mark.parametrize("kind,norms", [("olmo2", 4), ("llama", 2), ("qwen2", 2)])
def test_hft_freezes_two_of_four_two_or_one_of_three_and_half_of_the_norms(
    kind, norms, deep, tmp_path
):
    hft = ["--method", "hft", "--model", deep[kind]]
    masks = masks_of(tmp_path / "m", *hft)
    attention, mlp, norm = hft_counts(masks)
    assert attention == [2] * 12 and sorted(mlp) == [1] * 6 + [2] * 6 and norm == [norms // 2] * 12
    assert mlp != sorted(mlp) and mlp != sorted(mlp, reverse=True)  # a random half, not the first
    assert all(mask.numel() == 1 for mask in masks.values())
    assert masks["model.norm.weight"].item() == 1
    assert not any("embed" in name or "lm_head" in name for name in masks)
    choices = set()
    for layer in range(12):
        own = [n for n in masks if f".{layer}.self_attn" in n and n.endswith("proj.weight")]
        choices.add(tuple(n[-13:] for n in own if not masks[n].any()))
    assert len(choices) > 1  # drawn again in each layer
    for name, mask in masks.items():
        if name.endswith("bias"):
            assert mask.item() == masks[name[:-4] + "weight"].item()
    other = masks_of(tmp_path / "other", *hft, "--seed", 43)
    assert any(masks[name].item() != other[name].item() for name in masks)


@pytest.mark.parametrize("ratio", [0, 0.125, 0.75, 1])
def test_hft_at_other_ratios(ratio, deep, tmp_path):
    masks = masks_of(tmp_path / "m", "--method", "hft", "--model", deep["llama"], "--ratio", ratio)
    for counts, number in zip(hft_counts(masks), (4, 3, 2), strict=True):
        assert sum(counts) == int(ratio * number * 12) and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("ratio,channels,heads", [(0.9, 5, 1), (0.5, 25, 2)])
@pytest.mark.parametrize("method", ["s2ft-down", "s2ft-down-output"])
def test_s2ft_trains_exactly_the_expected_columns(method, ratio, channels, heads, tmp_path):
    """1 - 0.9 is less than 0.1, but a tenth of 50 channels is five of them."""
    model = tiny_model(tmp_path / "model", "llama", num_hidden_layers=10, intermediate_size=50)
    s2ft = ["--method", method, "--model", model, "--ratio", ratio]
    masks = masks_of(tmp_path / "m", *s2ft)
    names = {name for name, _ in AutoModelForCausalLM.from_pretrained(model).named_parameters()}
    assert masks.keys() == names  # embeddings and LM head too
    chosen = set()
    for name, mask in masks.items():
        if "down_proj" in name:
            chosen.add(tuple(mask.flatten().tolist()))
            assert mask.shape == (1, 50) and mask.sum() == channels
        elif "o_proj" in name and method == "s2ft-down-output":
            assert mask.shape == (1, 32)  # four heads of 8 columns
            assert sorted(mask.view(4, 8).sum(1).tolist()) == [0] * (4 - heads) + [8] * heads
        else:
            assert mask.numel() == 1 and mask.item() == 0
    assert len(chosen) > 5
    other = masks_of(tmp_path / "other", *s2ft, "--seed", 43)
    assert any(not torch.equal(masks[name], other[name]) for name in masks)


@pytest.mark.parametrize("kind", ["olmo2", "llama"])
def test_s2ft_of_the_authors_leaves_embeddings_and_head_to_be_trained(kind, request, tmp_path):
    model = request.getfixturevalue(kind)  # llama's are tied
    s2ft = ["--model", model, "--ratio", "0.9", "--method"]
    ours = masks_of(tmp_path / "ours", *s2ft, "s2ft-down")
    theirs = masks_of(tmp_path / "theirs", *s2ft, "s2ft-down-embeddings")
    whole = {"model.embed_tokens.weight", "lm_head.weight"} & ours.keys()
    assert whole and theirs.keys() == ours.keys() - whole
    assert all(torch.equal(mask, ours[name]) for name, mask in theirs.items())
    assert metadata_of(tmp_path / "theirs")["method"] == "s2ft-down-embeddings"


def test_chat_tokens_are_frozen_for_any_mask(olmo2, llama, tmp_path):
    said = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    expected = set(AutoTokenizer.from_pretrained(olmo2)(said)["input_ids"])
    embeddings = "model.embed_tokens.weight"
    tables = {olmo2: {embeddings, "lm_head.weight"}, llama: {embeddings}}  # tied in llama
    for model, names in tables.items():
        path = write_scores(tmp_path / "scores", model)
        plain = masks_of(tmp_path / "plain", "--scores", path)
        for source in (["--scores", path], ["--method", "hft", "--model", model]):
            masks = masks_of(tmp_path / "m", *source, "--freeze-chat-tokens")
            assert masks.keys() - plain.keys() == names
            for name in names:
                frozen = (masks[name] == 0).nonzero()[:, 0].tolist()
                assert masks[name].shape == (400, 1) and set(frozen) == expected
        assert json.loads(metadata_of(tmp_path / "m")["chat_tokens"]) == sorted(expected)


def test_a_template_without_a_system_turn():
    tokenizer = tiny_tokenizer()
    refusal = "{% if messages[0]['role'] == 'system' %}{{ 1 / 0 }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    said = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    expected = sorted(set(tokenizer(said)["input_ids"]))
    assert make_mask.chat_token_ids(tokenizer) == expected
    plain = tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert make_mask.chat_token_ids(tokenizer) == expected  # the template does not write it
    tokenizer.backend_tokenizer.post_processor = plain
    tokenizer.chat_template += "{% if add_generation_prompt %}<|endoftext|>{% endif %}"
    assert make_mask.chat_token_ids(tokenizer) == sorted([0, *expected])  # 0 is <|endoftext|>
    tokenizer.chat_template += "{{ strftime_now('%Y') }}"
    assert make_mask.chat_token_ids(tokenizer) == sorted(
        {0, *expected, *tokenizer("2025").input_ids}
    )


def test_tokens_are_printed_in_any_locale(olmo2, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    hft = ["--method", "hft", "--model", olmo2, "--freeze-chat-tokens"]
    assert masks_of(tmp_path / "m", *hft)  # of a template with line breaks


# What is refused


def test_chat_tokens_of_another_model_than_that_of_the_scores(tmp_path, refused):
    model = tiny_model(tmp_path / "model", "olmo2")
    write_scores(tmp_path / "s", model)
    shutil.rmtree(model)
    tiny_model(model, "llama")
    argv = ["--scores", tmp_path / "s", "--freeze-chat-tokens", "--out", tmp_path / "m"]
    assert "its parameters differ from those of --scores" in refused(make_mask.main, *argv)


def test_which_arguments_belong_together(olmo2, scores, tmp_path, refused):
    out = ["--out", tmp_path / "m"]
    hft = ["--method", "hft", "--model", olmo2]
    s2ft = ["--method", "s2ft-down-output", "--model", olmo2]
    assert "what to mask" in refused(make_mask.main, *out)
    assert "what to mask" in refused(make_mask.main, *out, "--scores", scores, *hft)
    assert "what to mask" in refused(make_mask.main, *out, "--method", "hft")
    assert "Remove --freeze" in refused(make_mask.main, *out, *hft, "--freeze", "lowest")
    # 1.5% of 48 channels
    assert "no column of any down_proj" in refused(make_mask.main, *out, *s2ft)
    hft = ["--method", "hft", "--model", "./nowhere"]
    assert "no such directory" in refused(make_mask.main, *out, *hft)
    for ratio in ("-0.1", "1.01", "nan"):
        assert "--ratio" in refused(make_mask.main, *out, "--scores", scores, "--ratio", ratio)
    assert not (tmp_path / "m").exists()


def test_s2ft_of_a_model_without_down_proj(tmp_path, refused):
    GPTNeoXConfig(**SIZES, vocab_size=400).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    argv = ["--method", "s2ft-down", "--model", tmp_path / "model", "--out", tmp_path / "m"]
    assert "trains down_proj, which gpt_neox lacks" in refused(make_mask.main, *argv)


def test_hft_of_layers_that_it_cannot_halve(olmo2, tmp_path, refused, capsys):
    """Fused experts are no nn.Linear. Half of layers that differ is not defined."""
    sizes = SIZES | {"num_local_experts": 2, "num_key_value_heads": 4}
    MixtralConfig(vocab_size=400, **sizes).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    argv = ["--method", "hft", "--out", tmp_path / "m", "--model", tmp_path / "model"]
    assert "Choose a model without fused experts" in refused(make_mask.main, *argv)
    model = AutoModelForCausalLM.from_pretrained(olmo2)
    del model.model.layers[1].mlp.gate_proj
    with pytest.raises(SystemExit):
        make_mask.hft_masks(model, 0.5, 42)
    assert "the layers differ in mlp" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_positions_are_no_tokens_of_a_chat(tmp_path):
    """OPT has a table of embeddings for positions too, which has other rows."""
    sizes = dict(hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4)
    sizes |= {"word_embed_proj_dim": 32, "max_position_embeddings": 64, "pad_token_id": 0}
    OPTConfig(vocab_size=400, **sizes).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    hft = ["--method", "hft", "--model", tmp_path / "model", "--freeze-chat-tokens"]
    masks = masks_of(tmp_path / "m", *hft)
    assert (masks["model.decoder.embed_tokens.weight"] == 0).any()
    assert not any("embed_positions" in name for name in masks)


def test_chat_tokens_of_a_model_without_a_template(olmo2, tmp_path, refused):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    AutoModelForCausalLM.from_pretrained(olmo2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    argv = ["--method", "hft", "--model", tmp_path / "model", "--out", tmp_path / "m"]
    assert "chat template is missing" in refused(make_mask.main, *argv, "--freeze-chat-tokens")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"format": "ssu-mask"}, "not a scores file"),
        ({"version": "2"}, "not a scores file"),
        ({"axis": "diagonal"}, "diagonal"),
        ({"axis": "element"}, "invalid for input of size"),
        ({"fingerprint": "0" * 64}, "digest does not match"),
        ({"tensors_sha256": "0" * 64}, "digest does not match"),
        ({"shapes": "{"}, "cannot be read"),
    ],
)
def test_scores_with_a_wrong_header(changes, message, olmo2, tmp_path, refused):
    path = write_scores(tmp_path / "scores", olmo2, changes=changes)
    line = refused(make_mask.main, "--scores", path, "--out", tmp_path / "m")
    assert message in line and "again with score.py" in line and not (tmp_path / "m").exists()


def test_scores_that_are_damaged_or_lack_their_digest(scores, tmp_path, refused):
    whole = scores.read_bytes()
    flipped = whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
    for content in (whole[:-100], b"hello", flipped, None):
        path = tmp_path / "scores"
        path.unlink(missing_ok=True)
        if content:
            path.write_bytes(content)
        argv = ["--scores", path, "--out", tmp_path / "m"]
        assert "cannot be read" in refused(make_mask.main, *argv)
    metadata = metadata_of(scores)
    metadata.pop("tensors_sha256")
    save_file(load_file(scores), tmp_path / "old", metadata)
    argv = ["--scores", tmp_path / "old", "--out", tmp_path / "m"]
    assert "tensors_sha256" in refused(make_mask.main, *argv)
    assert not (tmp_path / "m").exists()


def test_only_masks_are_overwritten(scores, tmp_path, refused):
    (tmp_path / "text").write_text("hello")
    for out in (scores, tmp_path / "text", tmp_path):
        assert "is not a mask" in refused(make_mask.main, "--scores", scores, "--out", out)
    argv = ["--scores", scores, "--out", "m" * 300]  # longer than a file system allows
    assert "cannot be read or written" in refused(make_mask.main, *argv)
    argv = ["--scores", scores, "--out", tmp_path / "text/m"]
    assert "cannot be read or written" in refused(make_mask.main, *argv)
    assert (tmp_path / "text").read_text() == "hello"
    first = masks_of(tmp_path / "m", "--scores", scores, "--ratio", 0)
    second = masks_of(tmp_path / "m", "--scores", scores, "--ratio", 1)
    for name in first:
        assert first[name].all() and not second[name].any()


def test_a_full_disk_leaves_the_old_mask(scores, tmp_path):
    masks_of(tmp_path / "m", "--scores", scores)
    before = (tmp_path / "m").read_bytes()
    full = limit_file_size(1000, tmp_path / "errors")
    argv = ["--scores", scores, "--out", tmp_path / "m", "--ratio", "0.25"]
    _, status = os.waitpid(forked(make_mask.main, argv, full), 0)
    assert os.waitstatus_to_exitcode(status) == 2
    assert "cannot be read or written" in (tmp_path / "errors").read_text().splitlines()[-1]
    assert (tmp_path / "m").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"m", "errors"}


def test_interrupted(scores, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "sort", interrupt)
    with pytest.raises(SystemExit) as stopped:
        make_mask.main(["--scores", str(scores), "--out", str(tmp_path / "m")])
    assert stopped.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "make_mask.py: interrupted"
