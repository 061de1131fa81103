"""tools/report.py: tables over seeds, mask overlap, pictures, and what cannot be compared."""

import json
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

sys.path.insert(0, str(ROOT / "tools"))
import report

from data.identity import digest_of


@pytest.fixture
def tables_only(monkeypatch):
    """As without matplotlib: pictures take a second each."""
    monkeypatch.setattr(report, "Figure", None)


def evaluation(folder, method, chat, target, mt, seed=42, **settings):
    """Write an eval.json made by hand."""
    settings = {"tasks": ["bpb", "mt"], "seed": seed, "model_sha256": method} | settings
    bpb = {
        "source": {"heldout": {"bpb": chat, "tokens": 9, "documents": 3}},
        "target": {"heldout": {"bpb": target, "tokens": 8, "documents": 2}},
    }
    results = {"bpb": bpb}
    results["mt"] = {"source": {"chrf": mt, "n": 5}, "target": {"chrf": 2 * mt, "n": 5}}
    results["chat"] = {"stop_rate": 1.0, "repetition": 0.0, "english_share": 0.5, "n": 6}
    content = {"format": "ssu-eval", "version": 1, "lang": "ne", "settings": settings}
    content |= {"results": results}
    path = folder / method / "eval.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return content


def chat_evaluation(folder, method, gsm8k, model_sha256):
    content = {"format": "ssu-chat", "version": 1, "lang": "ne"}
    content |= {"settings": {"model_sha256": model_sha256}}
    content |= {"results": {"gsm8k": {"source": {"accuracy": gsm8k, "n": 4}}}}
    (folder / method / "chat.json").write_text(json.dumps(content))


def write_mask(folder, method, masks, model="m", **changes):
    metadata = {"format": "ssu-mask", "fingerprint": model, "tensors_sha256": digest_of(masks)}
    save_file(masks, folder / method / "mask.safetensors", metadata | changes)


def tables(folder):
    """Return the tables of a report.md: lists of rows, each a list of cells."""
    found, lines = [[]], (folder / "report.md").read_text().splitlines()
    for line in lines:
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.split("|")[1:-1]])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def curves(figure):
    """Return, for each panel of a figure, {label: [[x, y], ...]}."""
    panels = []
    for axes in figure.axes:
        panels.append({line.get_label(): line.get_xydata().tolist() for line in axes.lines})
    return panels


def bars(figure):
    """Return, for each panel of a figure, {name: length of its bar}."""
    panels = []
    for axes in figure.axes:
        names = [label.get_text() for label in axes.get_yticklabels()]
        panels.append(dict(zip(names, [bar.get_width() for bar in axes.patches], strict=True)))
    return panels


def fails(capsys, *argv):
    """Return the one line of the error with which report.py ends, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        report.main([str(a) for a in argv])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    return line


# Tables


@pytest.mark.usefixtures("tables_only")
def test_tables_of_one_run(tmp_path, capsys):
    evaluation(tmp_path, "source", 1.0, 2.0, 20.0)
    evaluation(tmp_path, "ssu-wanda", 1.1, 1.0, 19.0)
    evaluation(tmp_path, "fft", 2.0, 1.25, 10.0)
    evaluation(tmp_path, "my", 3, 3, 3)
    report.main([str(tmp_path)])
    assert (tmp_path / "report.md").read_text() in capsys.readouterr().out
    english, nepali = tables(tmp_path)
    names = ["Source", "FFT", "SSU-Wanda", "my"]
    head = ["chat bpb ↓", "MT X→en chrF++ ↑", "stop rate ↑", "repetition ↓", "English share ↑"]
    assert english[0] == ["English", *head]
    assert [row[0] for row in english[2:]] == [row[0] for row in nepali[2:]] == names
    assert english[2][1:3] == ["1.000 (+0.0%)", "20.00 (+0.0%)"]
    assert english[3][1:3] == ["2.000 (+100.0%)", "10.00 (-50.0%)"]
    assert english[4][1:] == ["1.100 (+10.0%)", "19.00 (-5.0%)", "1.00", "0.00", "0.50"]
    assert nepali[4][1:] == ["1.000 (-50.0%)", "38.00 (-5.0%)"]
    assert "chat bpb 3, MT X→en chrF++ 5" in (tmp_path / "report.md").read_text()
    report.main([str(tmp_path), "--methods", "fft", "--out", str(tmp_path / "some")])
    assert [row[0] for row in tables(tmp_path / "some")[0][2:]] == ["Source", "FFT"]


@pytest.mark.usefixtures("tables_only")
def test_tables_of_several_seeds(tmp_path):
    for seed, chat, target in ((1, 1.1, 1.0), (2, 1.3, 1.2), (3, 1.2, 0.8)):
        evaluation(tmp_path / str(seed), "source", 1.0, 2.0, 20.0, seed=seed)
        evaluation(tmp_path / str(seed), "ssu-wanda", chat, target, 10.0 + seed, seed=seed)
    evaluation(tmp_path / "1", "fft", 2.0, 1.0, 20.0, seed=1)
    report.main([*(str(tmp_path / seed) for seed in "123"), "--out", str(tmp_path)])
    english, nepali = tables(tmp_path)
    assert english[4][:3] == ["SSU-Wanda", "1.200 ± 0.100 (+20.0%)", "12.00 ± 1.00 (-40.0%)"]
    assert nepali[4][1] == "1.000 ± 0.200 (-50.0%)"
    assert english[3][:2] == ["FFT (n=1)", "2.000 (+100.0%)"]


@pytest.mark.usefixtures("tables_only")
def test_chat_results_of_the_same_model_are_merged(tmp_path, capsys):
    for method in ("source", "fft"):
        evaluation(tmp_path, method, 1.0, 2.0, 20.0)
    chat_evaluation(tmp_path, "source", 0.5, "source")
    chat_evaluation(tmp_path, "fft", 0.25, "fft")
    report.main([str(tmp_path)])
    assert tables(tmp_path)[0][3][-1] == "0.250 (-50.0%)"
    chat_evaluation(tmp_path, "fft", 0.25, "another")
    assert "fft/chat.json is of another model" in fails(capsys, tmp_path)


# Masks


def test_overlap_of_columns_rows_elements_and_whole_matrices():
    """Against sets of frozen weights."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, 6), (5, 1), (5, 6))
    masks = [torch.randint(0, 2, s, generator=generator, dtype=torch.uint8) for s in shapes]
    masks.append(torch.zeros(1, 1, dtype=torch.uint8))
    for a in masks:
        for b in masks:
            x, y = ({tuple(i) for i in (m.expand(5, 6) == 0).nonzero().tolist()} for m in (a, b))
            norm = {"norm.weight": torch.ones(6), "embed.weight": torch.zeros(9, 1)}  # left out
            found = report.overlap({"proj.weight": a} | norm, {"proj.weight": b} | norm)
            assert found == pytest.approx(len(x & y) / len(x | y))
    nothing = {"proj.weight": torch.ones(1, 1)}
    assert report.overlap(nothing, nothing) is None
    half, quarter = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 1]])
    pair = report.overlap({"a": half, "b": half}, {"a": half, "b": quarter})
    assert pair == pytest.approx((1 + 1 / 2) / 2)  # the mean over matrices


def test_masks_are_compared_in_the_report(tmp_path):
    half, quarter = (torch.tensor([x], dtype=torch.uint8) for x in ([0, 0, 1, 1], [0, 1, 1, 1]))
    for method in ("source", "fft", "ssu-wanda", "hft"):
        evaluation(tmp_path, method, 1.0, 2.0, 20.0)
    write_mask(tmp_path, "ssu-wanda", {"a.weight": half})
    assert len(report.overlap_table(report.read_masks(tmp_path, ["fft", "ssu-wanda"]))) == 2
    write_mask(tmp_path, "hft", {"a.weight": quarter})
    report.main([str(tmp_path)])
    rows = tables(tmp_path)[2]
    assert rows[0][1:] == ["HFT", "SSU-Wanda"]
    assert rows[2:] == [["HFT", "1.00", "0.50"], ["SSU-Wanda", "0.50", "1.00"]]
    assert "![overlap](overlap.png)" in (tmp_path / "report.md").read_text()
    (axes,) = report.draw_overlap([["Jaccard index", "A", "B"], ["A", "1.00", "-"]]).axes
    assert [text.get_text() for text in axes.texts] == ["1.00", "-"]


@pytest.mark.usefixtures("tables_only")
def test_masks_that_are_damaged_or_of_another_model(tmp_path, capsys):
    masks = {"a.weight": torch.ones(1, 2, dtype=torch.uint8)}
    for method in ("source", "ssu-wanda", "hft"):
        evaluation(tmp_path, method, 1.0, 2.0, 20.0)
        write_mask(tmp_path, method, masks)
    report.main([str(tmp_path)])
    write_mask(tmp_path, "hft", masks, model="other")
    assert "not of the same model" in fails(capsys, tmp_path)
    write_mask(tmp_path, "hft", masks, tensors_sha256="0" * 64)
    assert "hft/mask.safetensors cannot be read (damaged" in fails(capsys, tmp_path)
    (tmp_path / "hft/mask.safetensors").write_bytes(b"cut")
    assert "Make it again with make_mask.py" in fails(capsys, tmp_path)


# Pictures


def test_pictures_exist_where_there_is_data(tmp_path):
    for method in ("source", "fft", "hft", "hft@0.25"):
        evaluation(tmp_path, method, 1.0, 2.0, 20.0)
    (tmp_path / "fft/train.jsonl").write_text('{"step": 0, "source_loss": 1}\n')
    report.main([str(tmp_path)])
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["forgetting.png", "kept.png", "ratio.png"]
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))


def measured(folder):
    evals = report.read_runs([folder], None)
    return report.measure(evals), list(evals), "Nepali"


def test_kept_shows_the_change_of_bits_per_byte(tmp_path):
    for method, *numbers in (
        ("source", 1, 2, 20),
        ("fft", 1.5, 1.0, 9),
        ("ssu-wanda", 1.1, 1.5, 9),
    ):
        evaluation(tmp_path, method, *numbers)
    english, nepali = bars(report.draw_kept(*measured(tmp_path)))
    assert english == pytest.approx({"FFT": 50, "SSU-Wanda": 10})
    assert nepali == pytest.approx({"FFT": 50, "SSU-Wanda": 25})


def test_kept_shows_the_mean_of_the_tasks_without_bits_per_byte(tmp_path):
    for method, mt, mrc in (("source", 20.0, 0.5), ("hft@0.25", 30.0, 0.4), ("hft", 10.0, 0.25)):
        content = evaluation(tmp_path, method, 1.0, 1.0, mt)
        content["results"].pop("bpb")
        content["results"]["mrc"] = {"source": {"accuracy": mrc, "n": 9}}
        (tmp_path / method / "eval.json").write_text(json.dumps(content))
    figure = report.draw_kept(*measured(tmp_path))
    english, nepali = bars(figure)
    assert english == pytest.approx({"HFT": 50, "HFT 0.25": -15})
    assert nepali == pytest.approx({"HFT": -50, "HFT 0.25": 50})
    assert "MT X→en chrF++, MRC accuracy" in figure.axes[0].get_xlabel()


def test_ratio_has_a_line_for_each_method_with_several_ratios(tmp_path):
    runs = ["source", "fft", "hft", "lota", "lota-90", "lota@0.125", "ssu-wanda@0.25", "ssu-wanda"]
    for number, method in enumerate(runs):
        evaluation(tmp_path, method, 1.0 + number / 8, 2.0 - number / 8, 20.0)
    english, nepali = curves(report.draw_ratio(*measured(tmp_path)))
    assert english["SSU-Wanda"] == [[0.25, -75.0], [0.5, -87.5]]
    assert english["LoTA"] == [[0.125, -62.5], [0.5, -37.5], [0.9, -50.0]]
    assert nepali["SSU-Wanda"] == [[0.25, 37.5], [0.5, 43.75]]
    assert english.keys() == nepali.keys() == {"SSU-Wanda", "LoTA"}
    assert report.method_and_ratio("mine@seed43") == ("mine@seed43", 0.5)


def test_forgetting_shows_both_losses_over_tokens(tmp_path, capsys):
    log = [{"settings": {}}, {"step": 0, "source_loss": 3, "target_loss": 4}]
    log += [{"step": 1, "tokens": 64, "loss": 2}]
    log += [{"step": 2, "tokens": 128, "source_loss": 3.5, "target_loss": 2}, {"summary": {}}]
    evaluation(tmp_path, "source", 1.0, 2.0, 20.0)
    evaluation(tmp_path, "fft", 1.0, 2.0, 20.0)
    path = tmp_path / "fft/train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in log))
    english, nepali = curves(report.draw_forgetting(tmp_path, ["source", "fft"], "Nepali"))
    assert english == {"FFT": [[0, 3], [128, 3.5]]} and nepali == {"FFT": [[0, 4], [128, 2]]}
    for damage in ('{"step": ', "[]\n1\n"):
        path.write_text(damage)
        assert "fft/train.jsonl cannot be read" in fails(capsys, tmp_path)


@pytest.mark.usefixtures("tables_only")
def test_without_matplotlib(tmp_path, capsys):
    evaluation(tmp_path, "source", 1.0, 2.0, 20.0)
    report.main([str(tmp_path)])
    assert "pip install matplotlib" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.md"]


# What is refused


@pytest.mark.usefixtures("tables_only")
def test_what_cannot_be_compared(tmp_path, capsys):
    assert "source/eval.json is missing" in fails(capsys, tmp_path)
    evaluation(tmp_path, "source", 1.0, 1.0, 1.0)
    assert "ftt/eval.json is missing" in fails(capsys, tmp_path, "--methods", "ftt")
    evaluation(tmp_path, "ssu-mag", 1.0, 1.0, 1.0, num_samples=3)
    assert "num_samples is 3, and None" in fails(capsys, tmp_path)
    evaluation(tmp_path, "ssu-mag", 1.0, 1.0, 1.0, seed=3)
    assert "seed is 3, and 42" in fails(capsys, tmp_path)
    evaluation(tmp_path, "ssu-mag", 1.0, 1.0, 1.0)
    evaluation(tmp_path / "other", "source", 1.0, 1.0, 1.0, tasks=["bpb"])
    assert "tasks is ['bpb']" in fails(capsys, tmp_path, tmp_path / "other")
    content = evaluation(tmp_path, "ssu-mag", 1.0, 1.0, 1.0)
    for damaged in ({}, [], content | {"results": None}, content | {"version": 9}):
        (tmp_path / "ssu-mag/eval.json").write_text(json.dumps(damaged))
        assert "ssu-mag/eval.json cannot be read" in fails(capsys, tmp_path)
    assert not (tmp_path / "report.md").exists()


def test_only_its_own_files_are_overwritten(tmp_path, capsys):
    evaluation(tmp_path, "source", 1.0, 2.0, 20.0)
    for name in ("kept.png", "report.md"):
        (tmp_path / name).write_text("mine")
        assert f"{name} exists" in fails(capsys, tmp_path)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    for _ in range(2):
        report.main([str(tmp_path)])
    assert "report.py: error:" in fails(capsys, tmp_path, "--out", tmp_path / "source/eval.json")


def test_interrupted(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    evaluation(tmp_path, "source", 1.0, 2.0, 20.0)
    monkeypatch.setattr(json, "loads", interrupt)
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path)])
    assert stopped.value.code == 130
    assert capsys.readouterr().err.splitlines() == ["report.py: interrupted"]
