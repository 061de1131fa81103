"""make_mask.py: exactly int(k * columns) columns, the highest, deterministically; and what it refuses."""
import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import make_mask
import score


@pytest.fixture(scope="module")
def scores(olmo2, chats, tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "scores-wanda.safetensors"
    score.main(["--model", str(olmo2), "--data", str(chats), "--out", str(path), "--num-samples", "4",
                "--seq-len", "64"])
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
    assert make_mask.column_mask(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 0.4).tolist() == [1, 0, 0, 1, 1]
    many = make_mask.column_mask(torch.ones(100_000), 0.3)  # enough of them for an unstable sort to show
    assert (many[:30_000] == 0).all() and (many[30_000:] == 1).all()


def test_metadata_and_printed_table(olmo2, scores, tmp_path, capsys):
    masks = run(scores, tmp_path / "mask.safetensors", 0.5)
    metadata = safe_open(tmp_path / "mask.safetensors", "pt").metadata()
    assert metadata["format"] == "ssu-mask" and metadata["version"] == "1" and metadata["ratio"] == "0.5"
    assert metadata["scores_sha256"] == hashlib.sha256(scores.read_bytes()).hexdigest()
    model = AutoModelForCausalLM.from_pretrained(olmo2)
    zeros = sum(int((mask == 0).expand(model.get_parameter(name).shape).sum()) for name, mask in masks.items())
    assert float(metadata["frozen_fraction"]) == pytest.approx(zeros / model.num_parameters(), abs=1e-6)
    out = capsys.readouterr().out
    assert "model.layers.*.mlp.down_proj.weight" in out and "50.0%" in out and "50.00%" in out


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as error:
        make_mask.main([str(a) for a in argv])
    assert error.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("ratio", ["-0.1", "1.01", "nan", "half"])
def test_ratio_outside_0_1(ratio, scores, tmp_path, capsys):
    assert "--ratio" in refused(capsys, "--scores", scores, "--out", tmp_path / "m", "--ratio", ratio)
    assert not (tmp_path / "m").exists()


def damaged(scores, folder, change):
    with safe_open(scores, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    change(metadata, tensors)
    save_file(tensors, folder / "scores.safetensors", metadata=metadata)
    return folder / "scores.safetensors"


@pytest.mark.parametrize("change,message", [
    (lambda m, t: m.update(format="ssu-mask"), "not column scores"),
    (lambda m, t: m.update(version="2"), "not column scores"),
    (lambda m, t: m.update(axis="row"), "not column scores"),
    (lambda m, t: m.update(fingerprint="0" * 64), "fingerprint"),
    (lambda m, t: t.update({"extra.weight": torch.ones(3)}), "does not fit"),
    (lambda m, t: t.update({"model.norm.weight": torch.ones(3)}), "does not fit"),
    (lambda m, t: t.update({"model.norm.weight": torch.full((32,), float("nan"))}), "not finite")])
def test_unfit_scores_files(change, message, scores, tmp_path, capsys):
    assert message in refused(capsys, "--scores", damaged(scores, tmp_path, change), "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_truncated_foreign_or_missing_scores_file_and_unwritable_out(scores, tmp_path, capsys):
    (tmp_path / "cut").write_bytes(scores.read_bytes()[:-100])
    (tmp_path / "text").write_text("hello")
    for name in ("cut", "text", "none"):
        assert "cannot be read" in refused(capsys, "--scores", tmp_path / name, "--out", tmp_path / "m")
    assert "cannot be written" in refused(capsys, "--scores", scores, "--out", tmp_path / "text/m")
    assert not (tmp_path / "m").exists()
