"""tools/report.py: tables over seeds, pictures, and what cannot be compared."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import report


def fails(capsys, *argv):
    """The one line of error with which report.py ends, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        report.main([str(a) for a in argv])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    return line


def evaluation(folder, method, chat, target, mt, seed=42, **settings):
    """A hand-made eval.json."""
    settings = {
        "tasks": ["bpb", "mt", "chat"],
        "seed": seed,
        "model_sha256": method,
        "data_sha256": "d",
    } | settings
    content = {
        "format": "ssu-eval",
        "version": 1,
        "model": f"{folder}/{method}/model",
        "lang": "ne",
        "versions": {"torch": "2"},
        "settings": settings,
        "device": "cpu",
        "git_commit": "c0ffee",
        "seconds": 1,
        "results": {
            "bpb": {
                "source": {"heldout": {"bpb": chat, "tokens": 9, "documents": 3}},
                "target": {"heldout": {"bpb": target, "tokens": 8, "documents": 2}},
            },
            "mt": {"source": {"chrf": mt, "n": 5}, "target": {"chrf": 2 * mt, "n": 5}},
            "chat": {
                "stop_rate": 1.0,
                "repetition": 0.0,
                "english_share": 0.5,
                "n": 6,
                "answers": [{"prompt": "Why?", "answer": f"Because of {method}."}],
            },
        },
    }
    path = folder / method / "eval.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return content


def test_report_of_one_run(tmp_path, capsys):
    for method, *numbers in (
        ("source", 1.0, 2.0, 20.0),
        ("ssu-wanda", 1.1, 1.0, 19.0),
        ("fft", 2.0, 1.25, 10.0),
        ("my", 3, 3, 3),
    ):
        evaluation(tmp_path, method, *numbers)
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert [row[0] for row in table] == [
        "English",
        "-" * 9,
        "Source",
        "FFT",
        "SSU-Wanda",
        "my",
        "Nepali",
        "-" * 9,
        "Source",
        "FFT",
        "SSU-Wanda",
        "my",
    ]
    assert table[0][1:] == [
        "chat bpb ↓",
        "MT X→en chrF++ ↑",
        "stop rate ↑",
        "repetition ↓",
        "English share ↑",
    ]
    assert table[2][1:3] == ["1.000 (+0.0%)", "20.00 (+0.0%)"]
    assert table[3][1:3] == ["2.000 (+100.0%)", "10.00 (-50.0%)"]
    assert table[4][1:] == ["1.100 (+10.0%)", "19.00 (-5.0%)", "1.00", "0.00", "0.50"]
    assert table[10][1:] == ["1.000 (-50.0%)", "38.00 (-5.0%)"]
    assert "> Why?" in text and "**SSU-Wanda:** Because of ssu-wanda." in text
    assert "3 documents, 9 tokens" in text and "c0ffee" in text


def test_report_of_several_seeds(tmp_path):
    for seed, chat, target in ((1, 1.1, 1.0), (2, 1.3, 1.2), (3, 1.2, 0.8)):
        evaluation(tmp_path / str(seed), "source", 1.0, 2.0, 20.0, seed=seed)
        evaluation(tmp_path / str(seed), "ssu-wanda", chat, target, 10.0 + seed, seed=seed)
    report.main([*(str(tmp_path / s) for s in "123"), "--out", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert (
        "1.200 ± 0.100 (+20.0%)" in text
        and "1.000 ± 0.200 (-50.0%)" in text
        and "12.00 ± 1.00 (-40.0%)" in text
    )
    assert (
        f"Run folders: {tmp_path}/1, {tmp_path}/2, {tmp_path}/3." in text
        and "standard deviation" in text
    )
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_report_draws_ratios_and_overlaps(tmp_path, monkeypatch):
    """Figure 2's curves, a point for each ratio, and the Jaccard indices of the masks beside the
    evaluations.
    """
    import numpy
    from matplotlib import pyplot
    from safetensors.numpy import save_file

    for number, method in enumerate(
        (
            "source",
            "fft",
            "hft",
            "lota",
            "lota-90",
            "lota@0.125",
            "ssu-wanda",
            "ssu-wanda@0.25",
            "ssu-wanda@0.875",
        )
    ):
        evaluation(tmp_path, method, 1.0 + number / 8, 2.0 / (1 + number), 20.0)
    rng = numpy.random.default_rng(0)
    masks = {}
    for method, shape in (
        ("ssu-wanda", (1, 6)),
        ("ssu-wanda@0.25", (1, 6)),
        ("lota-90", (4, 6)),
        ("hft", (1, 1)),
    ):
        masks[method] = {
            f"model.layers.{i}.mlp.up_proj.weight": rng.integers(0, 2, shape, dtype=numpy.uint8)
            for i in range(3)
        }
        save_file(masks[method], tmp_path / method / "mask.safetensors")
    figures, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    report.main([str(tmp_path)])
    panels = [
        {line.get_label(): line.get_xydata() for line in axes.lines} for axes in figures[0].axes
    ]
    close(figures[0])
    assert len(panels) == 5
    assert panels[1]["SSU-Wanda"] == pytest.approx(
        numpy.array([[0.25, 100 / 1.875], [0.5, 100 / 1.75], [0.875, 100 / 2]])
    )
    assert panels[2]["LoTA"] == pytest.approx(
        numpy.array(
            [[0.125, 100 * (1 - 1 / 6)], [0.5, 100 * (1 - 1 / 4)], [0.9, 100 * (1 - 1 / 5)]]
        )
    )
    assert "HFT" not in panels[1] and "Source" in panels[1]  # one ratio makes no curve
    for layer in range(3):
        a, b = (
            numpy.broadcast_to(masks[m][f"model.layers.{layer}.mlp.up_proj.weight"], (4, 6)) == 0
            for m in ("ssu-wanda", "lota-90")
        )
        assert tuple(panels[3]["LoTA (90%)"][layer]) == pytest.approx(
            (layer, (a & b).sum() / (a | b).sum())
        )
    text = (tmp_path / "report.md").read_text()
    for name, expected in {
        "ssu-wanda@0.25": ("ssu-wanda", 0.25),
        "lota-90": ("lota", 0.9),
        "lota": ("lota", 0.5),
        "fft": ("fft", None),
        "my-lota-run": ("my-lota-run", None),
        "gmt": ("gmt", 0.5),
        "mine@seed43": ("mine@seed43", None),
    }.items():
        assert report.method_and_ratio(name) == expected
    assert "| SSU-Wanda 0.25 " in text and text.index("| SSU-Wanda 0.875") < text.index(
        "| LoTA 0.125 "
    )


def test_report_draws_the_papers_tasks_where_there_are_no_bits_per_byte(
    tmp_path, monkeypatch, capsys
):
    """Each column relative to Source, and of them the mean."""
    from matplotlib import pyplot

    for method, mt, mrc in (("source", 20.0, 0.5), ("hft@0.25", 30.0, 0.4), ("hft", 10.0, 0.25)):
        content = evaluation(tmp_path, method, 1.0, 1.0, mt, tasks=["mt", "mrc"])
        content["results"] = {
            "mt": content["results"]["mt"],
            "mrc": {"source": {"accuracy": mrc, "n": 9}, "target": {"accuracy": mrc / 2, "n": 9}},
        }
        (tmp_path / method / "eval.json").write_text(json.dumps(content))
    figures, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    report.main([str(tmp_path)])
    panels = [
        {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        for axes in figures[0].axes
    ]
    assert panels[1]["HFT"] == [[0.25, pytest.approx(115)], [0.5, pytest.approx(50)]]
    assert panels[2]["HFT"] == [[0.25, pytest.approx(15)], [0.5, pytest.approx(-50)]]
    assert "mean of MT, MRC" in figures[0].axes[0].get_xlabel()
    close(figures[0])
    for method in ("source", "hft@0.25", "hft"):
        content = json.loads((tmp_path / method / "eval.json").read_text())
        content["results"] = {"gsm8k": {"source": {"accuracy": 0.5, "n": 3}}}
        (tmp_path / method / "eval.json").write_text(json.dumps(content))
    capsys.readouterr()
    report.main([str(tmp_path)])
    assert "no report.png: it needs figures of both languages" in capsys.readouterr().out


def test_report_refuses_masks_that_are_damaged_or_of_other_models(tmp_path, capsys):
    import numpy
    from safetensors.numpy import save_file

    for method in ("source", "ssu-wanda", "hft"):
        evaluation(tmp_path, method, 1.0, 2.0, 20.0)
    for method in ("ssu-wanda", "hft"):
        save_file(
            {"a": numpy.ones(2)}, tmp_path / method / "mask.safetensors", {"fingerprint": method}
        )
    assert "different models" in fails(capsys, tmp_path)
    (tmp_path / "hft/mask.safetensors").write_bytes(b"cut")
    assert "hft/mask.safetensors cannot be read" in fails(capsys, tmp_path)


def test_report_refuses_what_cannot_be_compared(tmp_path, capsys):
    assert "source/eval.json is missing" in fails(capsys, tmp_path)
    evaluation(tmp_path, "fft", 1.0, 1.0, 1.0)
    assert "source/eval.json is missing" in fails(capsys, tmp_path)
    evaluation(tmp_path, "source", 1.0, 1.0, 1.0)
    evaluation(tmp_path, "ssu-mag", 1.0, 1.0, 1.0, num_samples=3)
    assert "num_samples is 3, not None" in fails(capsys, tmp_path)
    evaluation(tmp_path, "ssu-mag", 1.0, 1.0, 1.0, seed=3)
    assert "seed is 3, not 42" in fails(capsys, tmp_path)
    for lacking in ({}, {"results": None}):
        content = evaluation(tmp_path, "ssu-mag", 1.0, 1.0, 1.0) | lacking if lacking else {}
        (tmp_path / "ssu-mag/eval.json").write_text(json.dumps(content))
        assert "ssu-mag/eval.json cannot be read" in fails(capsys, tmp_path)
    assert not (tmp_path / "report.md").exists()


def test_report_does_not_import_torch(tmp_path):
    evaluation(tmp_path, "source", 1.0, 2.0, 20.0)
    code = (
        "import sys; sys.path.insert(0, 'tools'); import report; "
        "sys.modules['matplotlib'] = None; report.main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "pip install matplotlib" in done.stdout and not (tmp_path / "report.png").exists()
