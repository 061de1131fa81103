"""variants/model_card.py: the card in OUT/model, and the results that report.py adds to it."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model, write_jsonl
from hub import COMMIT, HUB, REQUESTS
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from test_report import evaluation

import make_mask
import train
from tools import pictures, report
from variants import model_card

SUMMARY = {"frozen_verified": 60, "trainable": 40, "moved": 39, "commit": "abc"}


def arguments(tmp_path, **changes):
    """Return what train.py's arguments are, as far as a card needs them."""
    given = {"model": f"org/{tmp_path.name}", "data": "madlad:ig", "out": tmp_path / "runs/ig/fft"}
    given |= {
        "mask": None,
        "optimizer": "adamw",
        "gmt_ratio": None,
        "adalora": False,
        "steps": 12,
        "batch_size": 32,
    }
    given |= {"seq_len": 512, "lr": 5e-5, "weight_decay": 0.01, "precision": "bf16", "seed": 42}
    return SimpleNamespace(**(given | changes))


@pytest.fixture
def source(tmp_path):
    """A folder of a model on the hub, org/NAME. What is put there goes after the test."""
    folder = HUB / "models/org" / tmp_path.name  # another for each test: files of a commit are kept
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder.parent)


def test_a_model_of_the_hub_and_a_preset(source, tmp_path):
    head = "base_model: org/original\nbase_model_relation: quantized\n"
    head += "language:\n- en\nlicense: other\nlicense_name: its-own\nlicense_link: LICENSE"
    (source / "README.md").write_text(f"---\n{head}\n---\n# Not copied\n")
    card = ModelCard(model_card.make(arguments(tmp_path), source, COMMIT, SUMMARY))
    data = card.data.to_dict()
    assert data["base_model"] == f"org/{source.name}" and data["language"] == ["en", "ig"]
    assert data["license"] == "other" and data["license_name"] == "its-own"
    assert data["license_link"] == "LICENSE" and data["datasets"] == ["allenai/MADLAD-400"]
    assert data["library_name"] == "transformers" and "model-index" not in data
    assert f"# {source.name}-ig-fft\n" in card.text and "Not copied" not in card.text
    for part in (
        f"commit {COMMIT}",
        "Igbo",
        "full fine-tuning",
        "60 of 100",
        "39 of 40",
        "commit abc",
    ):
        assert part in card.text
    asked = [path for _, path, _ in REQUESTS if source.name in path and "README.md" in path]
    assert asked and all(f"/resolve/{COMMIT}/" in path for path in asked)
    methods = {"gmt_ratio": 0.5}, {"adalora": True}
    names = [model_card.describe_method(arguments(tmp_path, **m)) for m in methods]
    assert names == ["GMT, which drops 50.0% of each gradient", "AdaLoRA"]


@pytest.mark.parametrize(
    "content", [None, "no metadata", "---\n- a list\n---\n", "---\na: [\n---\n"]
)
def test_a_source_without_a_readable_card(content, source, tmp_path, capsys):
    if content:
        (source / "README.md").write_text(content)
    card = ModelCard(model_card.make(arguments(tmp_path), source, COMMIT, SUMMARY))
    assert "license" not in card.data.to_dict()
    assert "whose card does not name one" in card.text
    assert ("names no license" in capsys.readouterr().out) == (content != "no metadata")


def test_a_local_copy_in_another_format_has_the_name_of_its_model(tmp_path):
    head = "base_model: org/chat\nbase_model_relation: quantized"
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    args = arguments(tmp_path, model=tmp_path)
    card = ModelCard(model_card.make(args, tmp_path, None, SUMMARY))
    assert card.data.base_model == "org/chat" and "# chat-ig-fft\n" in card.text
    head = "base_model:\n- org/chat\nbase_model_relation: quantized"
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    card = ModelCard(model_card.make(args, tmp_path, None, SUMMARY))
    assert card.data.base_model == "org/chat"


@pytest.mark.parametrize(
    "line", ["language: [[en, ne]]", "language: 5", "base_model: {a: b}", 'license: "\\ud83d"']
)
def test_what_is_no_metadata_is_left_out(line, tmp_path):
    head = f"base_model_relation: quantized\n{line}"
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    args = arguments(tmp_path, model=tmp_path)
    card = ModelCard(model_card.make(args, tmp_path, None, SUMMARY))
    assert card.data.language == ["en", "ig"] and card.data.base_model is None
    assert "license" not in card.data.to_dict()


def test_a_mask_that_was_deleted_during_training(tmp_path):
    name = model_card.describe_method(arguments(tmp_path, mask=tmp_path / "deleted"))
    assert name == "a mask, ratio unknown"


@pytest.mark.parametrize(
    "about,name",
    [
        (("wanda", "column"), "SSU-Wanda"),
        (("wanda", "row"), "SSU-Wanda by rows"),
        (("wanda", "element"), "SSU-Wanda by elements"),
        (("random", "column"), "SSU-Rand"),
        (("magnitude", "column"), "SSU-Mag"),
        (("sparsegpt", "column"), "SSU-SparseGPT"),
        (("fim", "column"), "SSU-FIM"),
        (("delta", "element"), "LoTA by elements"),
        (("hft", "module"), "HFT"),
        (("s2ft-down", "column"), "S2FT (down)"),
        (("s2ft-down-output", "column"), "S2FT (down, output)"),
        (("s2ft-down-embeddings", "column"), "S2FT (down, embeddings)"),
        (("mine", "column"), "mine"),
    ],
    ids="-".join,
)
def test_the_method_is_that_of_the_mask(about, name, tmp_path):
    metadata = dict(zip(("method", "axis"), about, strict=True)) | {"ratio": "0.25"}
    save_file({"a": torch.ones(1)}, tmp_path / "mask", metadata)
    args = arguments(tmp_path, mask=tmp_path / "mask")
    assert model_card.describe_method(args) == f"{name}, ratio 0.25"


def test_the_table_of_a_card_is_that_of_the_run(tmp_path):
    (tmp_path / "README.md").write_text("---\nlanguage: en\n---\n")  # not a list
    (tmp_path / "corpus").mkdir()
    data = str(tmp_path / "corpus/train.jsonl")
    args = arguments(tmp_path, model=tmp_path, data=data, optimizer="adamw8bit-nearest")
    card = ModelCard(model_card.make(args, tmp_path, None, SUMMARY))
    assert card.data.language == ["en"] and "adapted to another language" in card.text
    rows = [line.strip("| ").split(" | ") for line in card.text.splitlines() if "|" in line]
    table = {row[0]: row[1] for row in rows if len(row) == 2}
    assert table["text"] == "train.jsonl, a local file"
    assert table["training"] == "12 steps of 32 sequences of 512 tokens" and table["seed"] == "42"
    optimizer = "AdamW with moments of 8 bits, learning rate 5e-05, weight decay 0.01"
    assert table["optimizer"] == f"{optimizer}, precision bf16"
    args.optimizer = "adamw8bit"
    assert "8 bits, updates rounded at random, " in model_card.make(args, tmp_path, None, SUMMARY)


def test_the_language_is_that_of_the_folder_also_of_a_link(tmp_path):
    (tmp_path / "am").mkdir()
    (tmp_path / "ne").mkdir()
    (tmp_path / "am/corpus.jsonl").touch()
    (tmp_path / "ne/train.jsonl").symlink_to(tmp_path / "am/corpus.jsonl")
    assert model_card.describe_text(str(tmp_path / "ne/train.jsonl"))[0] == "ne"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory whose hft@0.25 was trained by train.py from a model with a card."""
    folder = tmp_path_factory.mktemp("card")
    model = tiny_model(folder / "tiny-chat", "llama")
    (model / "README.md").write_text(
        "---\nlicense: apache-2.0\nbase_model: org/base\n---\nOld text\n"
    )  # as of an instruct model, which was made from org/base
    write_jsonl(folder / "ne/train.jsonl", [{"text": "The old mill stands by the river. " * 40}])
    out = folder / "runs/hft@0.25"
    mask = str(out / "mask.safetensors")
    make_mask.main(
        ["--method", "hft", "--model", str(model), "--ratio", "0.25", "--out", mask],
    )
    small = "--steps 1 --batch-size 1 --micro-batch-size 1 --seq-len 16 --precision fp32".split()
    files = ["--model", str(model), "--data", str(folder / "ne/train.jsonl"), "--out", str(out)]
    train.main([*files, "--mask", mask, "--device", "cpu", *small])
    return folder / "runs"


def test_train_saves_a_card_with_the_model(trained):
    card = ModelCard.load(trained / "hft@0.25/model/README.md")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and "base_model" not in data
    assert data["language"] == ["en", "ne"] and "datasets" not in data
    summary = json.loads((trained / "hft@0.25/train.jsonl").read_text().splitlines()[-1])["summary"]
    assert "# tiny-chat-ne-hft-0.25\n" in card.text and "| HFT, ratio 0.25 |" in card.text
    total = summary["frozen_verified"] + summary["trainable"]
    assert f"{summary['frozen_verified']:,} of {total:,}" in card.text
    assert str(trained.parent) not in card.content  # no path of this machine
    assert "| tiny-chat, in a local directory named tiny-chat |" in card.text
    assert "Old text" not in card.text and "Not evaluated yet." in card.text


def test_report_adds_the_results(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "Figure", None)
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    path = run / "hft@0.25/model/README.md"
    path.write_text(path.read_text().replace("## Use", "A remark of its owner.\n\n## Use"))
    evaluation(run, "source", 1.0, 2.0, 20.0)
    evaluation(run, "hft@0.25", 1.1, 1.0, 19.0)
    report.main([str(run)])
    card = ModelCard.load(path)
    assert "| HFT 0.25 | 1.100 (+10.0%)" in card.text and "Not evaluated" not in card.text
    assert "A remark of its owner." in card.text and card.data.model_name == "tiny-chat-ne-hft-0.25"
    results = {result.metric_name: result for result in card.data.eval_results}
    chat = results["chat bpb"]
    assert (chat.metric_type, chat.metric_value, chat.dataset_config) == ("bpb", 1.1, "ne")
    assert results["bpb"].metric_value == 1.0
    assert (chat.dataset_split, chat.dataset_type) == ("source heldout", "bpb")
    assert results["bpb"].dataset_split == "target heldout"
    assert chat.dataset_args == {"n": 3} and results["bpb"].dataset_args == {"n": 2}
    assert results["MT en→X chrF++"].dataset_args == {"n": 5}
    assert card.data.license == "apache-2.0" and card.data.language == ["en", "ne"]

    # The same again changes nothing, a new evaluation the results alone
    old = path.read_text()
    report.main([str(run)])
    assert path.read_text() == old
    evaluation(run, "hft@0.25", 1.2, 1.0, 19.0)
    report.main([str(run)])
    assert "1.200 (+20.0%)" in path.read_text() and "1.100" not in path.read_text()

    # The model of a second run directory has its own
    second = tmp_path / "second"
    shutil.copytree(trained, second)
    for method, chat in (("source", 1.0), ("hft@0.25", 1.5)):
        evaluation(second, method, chat, 1.0, 19.0)
    report.main([str(run), str(second), "--out", str(tmp_path / "both")])
    assert "1.500 (+50.0%)" in (second / "hft@0.25/model/README.md").read_text()
    assert "1.200 (+20.0%)" in path.read_text()

    # A card of its owner stays as it is
    whole = path.read_text()
    without_title = whole.replace("# tiny-chat-ne-hft-0.25\n", "")
    for mine in ("# Mine\n", without_title, whole.replace("license:", "license: [", 1)):
        path.write_text(mine)
        report.main([str(run)])
        assert path.read_text() == mine
        assert "is not of train.py" in capsys.readouterr().out
    path.write_bytes(b"\xff" + whole.encode())  # no UTF-8
    report.main([str(run)])
    assert path.read_bytes()[:1] == b"\xff" and "is not of train.py" in capsys.readouterr().out
