"""tools/report.py: tables over seeds, mask overlap, pictures, and what cannot be compared."""

import json
import math
import re
import shutil
import statistics

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from data.identity import digest_of
from tools import pictures, report, statements
from tools.methods import METHODS, method_and_ratio
from tools.tables import PAPER, TABLE_2

LANGS = ("ne", "ky", "am", "ha", "ig")


@pytest.fixture
def tables_only(monkeypatch):
    """As without matplotlib: pictures take a second each."""
    monkeypatch.setattr(pictures, "Figure", None)


def evaluation(folder, method, chat, target, mt, seed=42, cut=0.0, lang="ne", **settings):
    """Write an eval.json made by hand."""
    settings = {"tasks": ["bpb", "mt"], "seed": seed, "model_sha256": method} | settings
    bpb = {
        "source": {"heldout": {"bpb": chat, "tokens": 9, "documents": 3}},
        "target": {"heldout": {"bpb": target, "tokens": 8, "documents": 2}},
    }
    results = {"bpb": bpb}
    results["mt"] = {"source": {"chrf": mt, "n": 5, "cut": cut}}
    results["mt"]["target"] = {"chrf": 2 * mt, "n": 5, "cut": 0.0}
    results["chat"] = {"stop_rate": 1.0, "repetition": 0.0, "english_share": 0.5, "n": 6}
    content = {"format": "ssu-eval", "version": 1, "lang": lang, "settings": settings}
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
        lines = [bars for bars in axes.containers if bars.get_label()]
        panels.append({bars.get_label(): bars[0].get_xydata().tolist() for bars in lines})
    return panels


def rows(figure):
    """Return, for each panel of a figure, {name: value of its row}."""
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    panels = []
    for axes in figure.axes:
        values = [bars[0].get_xydata()[0][0] for bars in axes.containers]
        panels.append(dict(zip(names, values, strict=True)))
    return panels


# Tables


@pytest.mark.usefixtures("tables_only")
def test_tables_of_one_run(tmp_path, capsys):
    evaluation(tmp_path, "source", 1.0, 2.0, 20.0, cut=0.2)
    evaluation(tmp_path, "ssu-wanda", 1.1, 1.0, 19.0)
    evaluation(tmp_path, "fft", 2.0, 1.25, 10.0, cut=0.8)
    evaluation(tmp_path, "my", 3, 3, 3)
    report.main([str(tmp_path)])
    assert (tmp_path / "report.md").read_text() in capsys.readouterr().out
    english, nepali = tables(tmp_path)
    names = ["Source", "FFT", "SSU-Wanda", "my"]
    head = ["chat bpb ↓", "MT X→en chrF++ ↑", "stop rate ↑", "repetition ↓", "English share ↑"]
    assert english[0] == ["English", *head]
    assert [row[0] for row in english[2:]] == [row[0] for row in nepali[2:]] == names
    assert english[2][1:3] == ["1.000", "20.0"]
    assert english[3][1:3] == ["2.000 (+100.0%)", "10.0 (-50.0%)"]
    assert english[4][1:] == ["1.100 (+10.0%)", "19.0 (-5.0%)", "1.00", "0.00", "0.50"]
    assert nepali[4][1:] == ["1.000 (-50.0%)", "38.0 (-5.0%)"]
    text = (tmp_path / "report.md").read_text()
    assert "chat bpb 3, MT X→en chrF++ 5" in text
    cut = "Answers that --max-new-tokens cut off, at most: MT X→en chrF++ 80%."
    assert text.count("cut off") == 1 and f"\n{cut}\n" in text  # of Nepali, none
    evaluation(tmp_path, "source", 1.0, 2.0, 0.0)  # no change can be told from zero
    report.main([str(tmp_path), "--methods", "fft", "--out", str(tmp_path / "some")])
    assert [row[2] for row in tables(tmp_path / "some")[0][2:]] == ["0.0", "10.0"]
    assert [row[0] for row in tables(tmp_path / "some")[0][2:]] == ["Source", "FFT"]


@pytest.mark.usefixtures("tables_only")
def test_tables_of_several_seeds(tmp_path):
    for seed, chat, target in ((1, 1.1, 1.0), (2, 1.3, 1.2), (3, 1.2, 0.8)):
        evaluation(tmp_path / str(seed), "source", 1.0, 2.0, 20.0, seed=seed)
        evaluation(tmp_path / str(seed), "ssu-wanda", chat, target, 10.0 + seed, seed=seed)
    evaluation(tmp_path / "1", "fft", 2.0, 1.0, 20.0, seed=1)
    report.main([*(str(tmp_path / seed) for seed in "123"), "--out", str(tmp_path)])
    english, nepali = tables(tmp_path)
    assert english[4][:3] == ["SSU-Wanda", "1.200 ± 0.100 (+20.0%)", "12.0 ± 1.0 (-40.0%)"]
    assert nepali[4][1] == "1.000 ± 0.200 (-50.0%)"
    assert english[3][:2] == ["FFT (n=1)", "2.000 (+100.0%)"]


@pytest.mark.usefixtures("tables_only")
def test_chat_results_of_the_same_model_are_merged(tmp_path, capsys):
    for method in ("source", "fft"):
        evaluation(tmp_path, method, 1.0, 2.0, 20.0)
    chat_evaluation(tmp_path, "source", 0.5, "source")
    chat_evaluation(tmp_path, "fft", 0.25, "fft")
    report.main([str(tmp_path)])
    assert tables(tmp_path)[0][3][4] == "0.250 (-50.0%)"
    chat_evaluation(tmp_path, "fft", 0.25, "another")
    report.main([str(tmp_path)])
    assert "fft/chat.json is of another model, and is left out" in capsys.readouterr().out
    assert tables(tmp_path)[0][3][4] == "-"


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
    assert list(report.read_masks(tmp_path, ["fft", "ssu-wanda"])) == ["ssu-wanda"]
    write_mask(tmp_path, "hft", {"a.weight": quarter})
    report.main([str(tmp_path)])
    overlaps = tables(tmp_path)[2]
    assert overlaps[0][1:] == ["HFT", "SSU-Wanda"]
    assert overlaps[2:] == [["HFT", "1.00", "0.50"], ["SSU-Wanda", "0.50", "1.00"]]
    assert "![overlap](overlap.png)" in (tmp_path / "report.md").read_text()
    (axes,) = pictures.draw_overlap(["A", "B"], [[1, None], [None, 1]]).axes
    assert [text.get_text() for text in axes.texts] == ["1.00", "-", "-", "1.00"]


@pytest.mark.usefixtures("tables_only")
def test_masks_that_are_damaged_or_of_another_model(tmp_path, refused):
    masks = {"a.weight": torch.ones(1, 2, dtype=torch.uint8)}
    for method in ("source", "ssu-wanda", "hft"):
        evaluation(tmp_path, method, 1.0, 2.0, 20.0)
        write_mask(tmp_path, method, masks)
    report.main([str(tmp_path)])
    write_mask(tmp_path, "hft", masks, model="other")
    assert "not of the same model" in refused(report.main, tmp_path)
    write_mask(tmp_path, "hft", masks, tensors_sha256="0" * 64)
    assert "hft/mask.safetensors cannot be read (damaged" in refused(report.main, tmp_path)
    (tmp_path / "hft/mask.safetensors").write_bytes(b"cut")
    assert "Make it again with make_mask.py" in refused(report.main, tmp_path)


# Pictures


def test_pictures_exist_where_there_is_data(tmp_path):
    for method in ("source", "fft", "hft", "hft@0.25", "hft@0.75"):
        evaluation(tmp_path, method, 1.0, 2.0, 20.0)
    (tmp_path / "fft/train.jsonl").write_text('{"step": 0, "source_loss": 1}\n')
    report.main([str(tmp_path)])
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["forgetting.png", "kept.png", "ratio.png"]
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))


def drawn(folder):
    """Return the pictures of a run directory, {name: figure}."""
    return report.draw(report.read_runs([folder], None), folder, [], [])


def test_kept_shows_the_improvement_of_bits_per_byte(tmp_path):
    for method, *numbers in (
        ("source", 1, 2, 20),
        ("fft", 1.5, 1.0, 9),
        ("ssu-wanda", 1.1, 1.5, 9),
    ):
        evaluation(tmp_path, method, *numbers)
    english, nepali = rows(drawn(tmp_path)["kept"])
    assert english == pytest.approx({"FFT": -50, "SSU-Wanda": -10})
    assert nepali == pytest.approx({"FFT": 50, "SSU-Wanda": 25})


def test_kept_shows_the_mean_of_the_tasks_without_bits_per_byte(tmp_path):
    for method, mt, mrc in (("source", 20.0, 0.5), ("hft@0.25", 30.0, 0.4), ("hft", 10.0, 0.25)):
        content = evaluation(tmp_path, method, 1.0, 1.0, mt)
        content["results"].pop("bpb")
        content["results"]["mrc"] = {
            side: {"accuracy": mrc, "n": 9} for side in ("source", "target")
        }
        (tmp_path / method / "eval.json").write_text(json.dumps(content))
    figure = drawn(tmp_path)["kept"]
    english, nepali = rows(figure)
    assert english == pytest.approx({"HFT": -50, "HFT 0.25": -20})  # without MT
    assert nepali == pytest.approx({"HFT": -50, "HFT 0.25": 15})
    assert "mean of 2 tasks" in figure.axes[1].get_xlabel()


def test_ratio_has_a_line_for_each_method_with_three_ratios(tmp_path):
    runs = ["source", "fft", "hft", "lota", "lota-90", "lota@0.125", "ssu-wanda@0.25", "ssu-wanda"]
    for number, method in enumerate(runs):
        evaluation(tmp_path, method, 1.0 + number / 8, 2.0 - number / 8, 20.0)
    figures = drawn(tmp_path)
    english, nepali = curves(figures["ratio"])
    assert english["LoTA"] == [[0.125, -62.5], [0.5, -37.5], [0.9, -50.0]]
    assert english["FFT"] == [[0, -12.5]]  # every method at ratio 0
    assert english.keys() == nepali.keys() == {"FFT", "LoTA"}
    names = [label.get_text() for label in figures["kept"].axes[0].get_yticklabels()]
    assert names == ["FFT", "HFT", "SSU-Wanda", "SSU-Wanda 0.25", "LoTA", "LoTA (90%)"]
    assert method_and_ratio("mine@seed43") == ("mine@seed43", 0.5)


def test_forgetting_shows_both_losses_over_tokens(tmp_path, refused):
    log = [{"settings": {}}, {"step": 0, "source_loss": 3, "target_loss": 4}]
    log += [{"step": 1, "tokens": 64, "loss": 2}]
    log += [{"step": 2, "tokens": 128, "source_loss": 3.5, "target_loss": 2}, {"summary": {}}]
    evaluation(tmp_path, "source", 1.0, 2.0, 20.0)
    evaluation(tmp_path, "fft", 1.0, 2.0, 20.0)
    path = tmp_path / "fft/train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in log))
    english, nepali = curves(drawn(tmp_path)["forgetting"])
    assert english == {"FFT": [[0, 3], [128, 3.5]]} and nepali == {"FFT": [[0, 4], [128, 2]]}
    for damage in ('{"step": ', "[]\n1\n"):
        path.write_text(damage)
        assert "fft/train.jsonl cannot be read" in refused(report.main, tmp_path)


@pytest.mark.slow
def test_labels_do_not_touch_one_another_and_are_not_cut(tmp_path):
    looks = {(color, marker) for _, color, marker in METHODS.values()}
    assert len(looks) == len({marker for _, marker in looks}) == len(METHODS)
    for seed, change in ((42, 1.4), (43, 1.2)):
        run = tmp_path / str(seed)
        evaluation(run, "source", 1.0, 2.0, 20.0, seed=seed)
        for number, method in enumerate(METHODS):
            if method != "source":
                evaluation(run, method, change - number / 30, 1 + number / 30, 20.0, seed=seed)
    folders = [tmp_path / "42", tmp_path / "43"]
    figure = report.draw(report.read_runs(folders, None), folders[0], [], [])["kept"]
    figure.draw_without_rendering()
    whole = figure.get_window_extent()
    for axes in figure.axes:
        texts = [text for text in (*axes.texts, *axes.get_yticklabels()) if text.get_text()]
        boxes = [text.get_window_extent() for text in texts]
        assert len(boxes) >= len(METHODS) - 1
        for number, box in enumerate(boxes):
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1
            assert not any(box.overlaps(other) for other in boxes[:number])


@pytest.mark.usefixtures("tables_only")
def test_without_matplotlib(tmp_path, capsys):
    evaluation(tmp_path, "source", 1.0, 2.0, 20.0)
    report.main([str(tmp_path)])
    assert "pip install matplotlib" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.md"]


# The paper's numbers beside ours


def whole_table_2(folder, method, model, numbers, judge="a judge", seed=42):
    """Write an eval.json and a chat.json with all columns of Table 2."""
    results = {"ifeval": {}, "ae2": {}, "mtb": {}, "gsm8k": {}, "t3": {}}
    for column, number in zip(TABLE_2, numbers, strict=True):
        task, side, metric = column.split("/")
        results.setdefault(task, {})[side] = {metric: number, "n": 7}
    results["mtb"]["source"] |= {"judge": {"name": judge}, "unparsed": 0.02}
    shared = {"version": 1, "model": model, "lang": "ne"}
    settings = {"seed": seed, "model_sha256": method}
    chat = {task: results.pop(task) for task in ("ifeval", "ae2", "mtb", "gsm8k", "t3")}
    (folder / method).mkdir(parents=True, exist_ok=True)
    for name, form, found in (("eval", "ssu-eval", results), ("chat", "ssu-chat", chat)):
        content = shared | {"format": form, "settings": dict(settings), "results": found}
        (folder / method / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.usefixtures("tables_only")
def test_table_2_has_thirteen_columns_and_the_papers_numbers_below_ours(tmp_path, refused):
    base = [0.5, 30, 4, 0.8, 0.8, 30, 20, 0.9, 0.6, 20, 20, 0.3, 0.3]
    ours = [0.4, 15, 3, 0.6, None, 45, 20, 0.9, 0.6, 30, 20, 0.3, 0.3]
    whole_table_2(tmp_path, "source", "allenai/OLMo-2-1124-7B-Instruct", base)
    whole_table_2(tmp_path, "ssu-wanda", "runs/ssu-wanda/model", ours)
    whole_table_2(tmp_path, "mine", "runs/mine/model", ours)
    report.main([str(tmp_path)])
    (table,) = tables(tmp_path)  # nothing is left for a second one
    heads = "IFEval AE2 MTB GSM8K T3 MT_ne→en SUM_en MRC_en MMLU_en MT_en→ne SUM_ne MRC_ne MMLU_ne"
    assert table[0][1:] == [f"{head.replace('_', ' ')} ↑" for head in heads.split()]
    names = ["Source", "Source in the paper", "SSU-Wanda", "SSU-Wanda in the paper", "mine"]
    assert [row[0] for row in table[2:]] == names
    assert table[2][1:6] == ["0.500", "30.0", "4.00", "0.800", "0.800"]
    cells = ["0.400 (-20.0%)", "15.0 (-50.0%)", "3.00 (-25.0%)", "0.600 (-25.0%)", "-"]
    assert table[4][1:6] == cells and table[4][6] == "45.0 (+50.0%)"
    paper = ["0.655 (-3.0%)", "28.1 (-13.8%)", "4.02 (+1.0%)", "0.746 (-6.3%)", "0.842 (-1.1%)"]
    assert table[5][1:6] == paper  # Tables 10 and 11, Nepali
    text = (tmp_path / "report.md").read_text()
    assert "\nSource is allenai/OLMo-2-1124-7B-Instruct.\n" in text
    assert "MTB by a judge, of which at most 2.0%" in text and "MMLU ne 7" in text
    whole_table_2(tmp_path, "mine", "runs/mine/model", ours, judge="another judge")
    assert "judge of mtb is {'name': 'another judge'}" in refused(report.main, tmp_path)


@pytest.mark.usefixtures("tables_only")
def test_a_published_checkpoint_stands_above_its_row_of_the_paper(tmp_path):
    numbers = [0.5, 30, 4, 0.8, 0.8, 30, 20, 0.9, 0.6, 20, 20, 0.3, 0.3]
    whole_table_2(tmp_path, "source", "ssu-project/OLMo-2-1124-13B-Instruct-ne-random", numbers)
    report.main([str(tmp_path)])
    (table,) = tables(tmp_path)
    names = ["Source in the paper", "SSU-Rand (published)", "SSU-Rand in the paper"]
    assert [row[0] for row in table[2:]] == names
    assert table[2][1] == "0.763" and table[3][1] == "0.500" and table[4][1] == "0.672 (-11.9%)"


def test_the_papers_numbers_give_its_own_averages():
    table_2 = {  # SSU-Wanda and full fine-tuning of Table 2: IFEval, T3, MMLU, target MT and MMLU
        "OLMo-2-1124-7B-Instruct": {
            "fft": [0.456, 0.797, 0.580, 30.7, 0.325],
            "ssu-wanda": [0.669, 0.850, 0.606, 31.0, 0.333],
        },
        "OLMo-2-1124-13B-Instruct": {
            "fft": [0.448, 0.737, 0.647, 33.6, 0.361],
            "ssu-wanda": [0.730, 0.805, 0.661, 34.1, 0.359],
        },
    }
    for model, methods in table_2.items():
        assert all(len(row) == 13 for found in PAPER[model].values() for row in found.values())
        for method, expected in methods.items():
            rows = [PAPER[model][lang][method] for lang in LANGS]
            found = [statistics.fmean(x) for x in zip(*rows, strict=True)]
            assert [found[i] for i in (0, 4, 8, 9, 12)] == pytest.approx(expected, rel=0.003)


# The page of results


def test_a_statement_is_decided_by_an_interval_over_seeds():
    # Student's t of three differences: mean 2, deviation 1, 2 ± 4.303 / sqrt(3)
    assert statements.interval([1, 2, 3]) == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-3)
    assert statements.verdict([1, 2, 3]) == "not decided"
    assert statements.verdict([1.9, 2, 2.1]) == "agrees"
    assert statements.verdict([-1.9, -2, -2.1]) == "disagrees"
    assert statements.verdict([5]) == "not decided"
    assert statements.verdict([0.4, 0.5, 0.6], margin=1) == "agrees"
    assert statements.verdict([1.9, 2, 2.1], margin=1) == "disagrees"
    assert statements.verdict([-1.9, -2, -2.1], margin=1) == "disagrees"
    assert statements.verdict([0, 1, 2], margin=1) == "not decided"


@pytest.mark.parametrize("n", statements.T95)
def test_t_holds_95_percent(n):
    """Its density, summed up at midpoints."""
    freedom, end, steps = n - 1, statements.T95[n], 2000
    total = 0.0
    for i in range(steps):
        t = end * (i + 0.5) / steps
        total += (1 + t * t / freedom) ** (-(freedom + 1) / 2) * 2 * end / steps
    factor = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
    assert total * factor / math.sqrt(freedom * math.pi) == pytest.approx(0.95, abs=1e-4)


def test_statements_are_paired_by_seed(tmp_path):
    folders = [tmp_path / str(seed) for seed in (1, 2, 3)]
    for seed, base in ((1, 1.0), (2, 2.0), (3, 4.0)):
        run = tmp_path / str(seed)
        evaluation(run, "source", base, 2.0, 20.0, seed=seed)
        evaluation(run, "fft", base * 1.30, 1.0, 20.0, seed=seed)
        if seed > 1:
            evaluation(run, "ssu-wanda", base * (1 + seed / 100), 1.0, 20.0, seed=seed)
    found = statements.table({"embedded-ne": report.read_runs(folders, None)})
    row = [cell.strip() for cell in found[0].splitlines()[2].split("|")[1:-1]]
    assert row[:3] == ["Table 2", "SSU-Wanda keeps more English than FFT", "-3.4, -20.3"]
    ours = ["-2.5 ± 0.7, -30.0 ± 0.0", "+27.5 ± 0.7", "2", "agrees"]
    assert row[3:] == ours
    assert "statements, agrees: 1, disagrees: 0, not decided: 1, " in found[1]


def test_statements_reach_over_folders_of_run_directories(tmp_path):
    groups = {}
    for folder, chat in (("embedded-ne", 1.02), ("calibration-8-ne", 1.025), ("ratio-ne", 1.9)):
        for seed in (1, 2):
            run = tmp_path / folder / str(seed)
            evaluation(run, "source", 1.0, 2.0, 20.0)
            evaluation(run, "ssu-wanda", chat, 1.0, 20.0)
        runs = [tmp_path / folder / str(seed) for seed in (1, 2)]
        groups[folder] = report.read_runs(runs, None)
    assert statements.measured(groups, "source", "ssu-wanda") == pytest.approx({"1": -2, "2": -2})
    assert statements.measured(groups, "source", "gmt") == {}
    (row,) = [line for line in statements.table(groups)[0].splitlines() if "Table 5" in line]
    assert "SSU-Wanda of calibration-8 keeps as much English as SSU-Wanda, within 1 " in row
    assert "| -4.2, -4.0 " in row and "agrees" in row  # the paper's 128 examples, and its 500


def test_statements_on_several_languages_compare_the_means_over_them(tmp_path):
    groups = {}
    for lang, seeds, loss in (("ne", (1, 2, 3), 0.3), ("ky", (1, 2), 0.4)):
        runs = [tmp_path / lang / str(seed) for seed in seeds]
        for seed, run in zip(seeds, runs, strict=True):
            evaluation(run, "source", 1.0, 2.0, 20.0, lang=lang)
            evaluation(run, "fft", 1.0 + loss + seed / 100, 1.0, 20.0, lang=lang)
            evaluation(run, "ssu-wanda", 1.02, 1.0, 20.0, lang=lang)
            if lang == "ne":  # HFT was not measured in all languages
                evaluation(run, "hft", 1.1, 1.0, 20.0, lang=lang)
        groups[f"embedded-{lang}"] = report.read_runs(runs, None)
    found = statements.table(groups)[0].splitlines()
    assert len(found) == 2 + 2  # one statement on English, one on the target languages
    row = [cell.strip() for cell in found[2].split("|")[4:-1]]
    assert row == ["-2.0 ± 0.0, -36.5 ± 0.7", "+34.5 ± 0.7", "2", "agrees"]
    assert "SSU-Wanda gains more of the target language than FFT" in found[3]


def test_the_page_is_remade_in_place_and_twice_the_same(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(report.page, "ROOT", tmp_path)
    for seed in (1, 2):
        run = tmp_path / f"results/embedded-ne/{seed}"
        evaluation(run, "source", 1.0, 2.0, 20.0, seed=seed)
        evaluation(run, "fft", 1.2 + seed / 10, 1.0, 20.0, seed=seed)
    (tmp_path / "more.json").write_text(
        '{"about": "n = 1", "columns": ["", "x"], "rows": [["a", 2.0], ["b", 3.0], ["c", "-"]]}'
    )
    more = tmp_path / "results/embedded-bpb-ne/3"  # of another evaluation, with other settings
    evaluation(more, "source", 1.0001, 2.0, 20.0, tasks=["bpb"])
    evaluation(more, "fft", 1.40014, 1.0, 20.0, tasks=["bpb"])
    for ratio, chat in ((0.25, 1.30013), (0.75, 1.10011)):
        evaluation(more, f"ssu-wanda@{ratio}", chat, 1.0, 20.0, tasks=["bpb"])
    both = "results/embedded-ne/* results/embedded-bpb-ne/*"
    for seed, moved in ((1, 30), (2, 50)):
        log = tmp_path / f"results/embedded-ne/{seed}/fft/train.jsonl"
        summary = {"moved": moved, "trainable": 200}
        log.write_text('{"step": 1}\n' + json.dumps({"summary": summary}) + "\n")
    evaluation(tmp_path / "results/embedded-ne/3", "fft", 9.0, 9.0, 9.0)  # without Source
    blocks = ["tables results/embedded-ne/*", f"folders {both}", f"moved {both}"]
    blocks += [f"folders {both} --methods ssu-wanda"]
    blocks += [f"changes {both}", f"changes {both} results/none/* --methods fft"]
    blocks += ["statements results/embedded-ne/*", "paper OLMo-2-1124-7B-Instruct"]
    blocks += ["figures more.json", "tables results/none/*"]
    path = tmp_path / "page.md"
    text = "# Mine\n\n" + "".join(
        f"<!-- report: {b} -->\nold\n<!-- end -->\n\nKept.\n" for b in blocks
    )
    path.write_text(text)
    report.main(["--page", str(path)])
    made = path.read_text()
    assert made.count("Kept.") == len(blocks) and "\nold\n" not in made
    for part in (
        "| FFT     | 1.350 ± 0.071 (+35.0%)",
        "n = 2; evaluated on",
        "| embedded | -36.7 ± 5.8 (n=3)    | -30.0 (n=1) ",
        "| embedded | -30.0 (n=1)                     | -10.0 (n=1) ",
        "| FFT            | 3 | -36.7 ± 5.8     | +50.0 ± 0.0      |\n| SSU-Wanda 0.25 | 1 ",
        "| embedded                      | 20.0 ± 7.1 (n=2) | -              | -              |",
        "![changes](results/embedded-bpb-ne/changes.png)",
        "| -32.4% ",
        "| a | 2.0000          |",
        "| b | 3.0000 (+50.0%) |\n| c | - ",
        "| FFT | 3 | -36.7 ± 5.8     | +50.0 ± 0.0 ",
        "| SSU-Wanda 0.25 | 1 | -30.0           | +50.0 ",
        " MT target | ",
        "n = 2; evaluated on None at None. `python tools/report.py results/embedded-ne/1 "
        "results/embedded-ne/2 --out DIRECTORY`",
        "![kept](results/embedded-ne/kept.png)",
        "Not measured: there is no evaluation in results/none/*.",
    ):
        assert part in made
    assert made.count("| FFT            | 3 ") == 1 and made.count("| FFT | 3 | -36.7") == 1
    assert made.count("changes.png") == 1  # results/none was not measured
    picture = (tmp_path / "results/embedded-ne/kept.png").read_bytes()
    report.main(["--page", str(path)])
    assert path.read_text() == made
    assert (tmp_path / "results/embedded-ne/kept.png").read_bytes() == picture
    evaluation(more.with_name("2"), "source", 1.01, 2.0, 20.0, tasks=["bpb"], seed=2)
    assert "embedded-bpb-ne/2: Source differs" in refused(report.main, "--page", path)
    shutil.rmtree(more.with_name("2"))
    path.write_text(f"<!-- report: tables {both} -->\n<!-- end -->\n")
    assert "names several folders" in refused(report.main, "--page", path)
    path.write_text("<!-- report: tables -->\n<!-- end -->\n")
    assert "names no table" in refused(report.main, "--page", path)
    path.write_text("<!-- report: tables x -->\n")
    assert "needs comments" in refused(report.main, "--page", path)
    path.write_text("<!-- report: tabels results/embedded-ne/1 -->\n<!-- end -->\n")
    assert "names no table" in refused(report.main, "--page", path)


def test_a_page_of_several_languages_names_them_and_what_made_the_table(tmp_path, monkeypatch):
    """A row for each language, in the paper's order; answers of the first run directory."""
    monkeypatch.setattr(report.page, "ROOT", tmp_path)
    for lang, folder in (("ky", "embedded-ky"), ("ne", "embedded-ne")):
        for seed in (1, 2):
            run = tmp_path / "results" / folder / str(seed)
            for method, chat in (("source", 1.0), ("fft", 1.5)):
                content = evaluation(run, method, chat, 2.0, 20.0, lang=lang, seed=seed)
                answer = {"prompt": "Why?", "answer": f"{lang} {seed}"}
                content["results"]["chat"]["answers"] = [answer]
                content |= {"git_commit": f"{seed}23456789", "device": "cpu"}
                (run / method / "eval.json").write_text(json.dumps(content))
    path = tmp_path / "page.md"
    blocks = ["folders results/embedded-*/*", "answers results/embedded-ne/*"]
    text = "".join(f"<!-- report: {block} -->\n<!-- end -->\n" for block in blocks)
    path.write_text(text)
    report.main(["--page", str(path)])
    made = path.read_text()
    rows = [line.split("|")[1].strip() for line in made.splitlines() if line.startswith("|")]
    assert rows[2:] == ["Nepali", "Kyrgyz"]
    assert "\nThese were evaluated on cpu at 1234567, 2234567.\n" in made
    assert "**FFT:** ne 1" in made and "ne 2" not in made


@pytest.mark.slow
def test_the_results_of_this_repository_are_made_from_its_evaluations(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for module in (report, report.page):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    report.main(["--page", str(tmp_path / "docs/RESULTS.md")])
    for path in (tmp_path / "docs/RESULTS.md", *tmp_path.glob("results/*/report.md")):
        assert path.read_text() == (ROOT / path.relative_to(tmp_path)).read_text(), path
    prose = report.page.BLOCK.sub("", (ROOT / "docs/RESULTS.md").read_text())
    assert not re.findall(r"[\d.]+ ?%(?! interval)|\d ± ", prose)  # no figure typed by hand


# What is refused


@pytest.mark.usefixtures("tables_only")
def test_what_cannot_be_compared(tmp_path, refused):
    assert "source/eval.json is missing" in refused(report.main, tmp_path)
    assert "given twice" in refused(report.main, tmp_path, tmp_path / ".")
    evaluation(tmp_path, "source", 1.0, 1.0, 1.0)
    assert "ftt/eval.json is missing" in refused(report.main, tmp_path, "--methods", "ftt")
    evaluation(tmp_path, "ssu-mag", 1.0, 1.0, 1.0, num_samples=3)
    assert "num_samples is 3, and None" in refused(report.main, tmp_path)
    evaluation(tmp_path, "ssu-mag", 1.0, 1.0, 1.0, seed=3)
    assert "seed is 3, and 42" in refused(report.main, tmp_path)
    evaluation(tmp_path, "ssu-mag", 1.0, 1.0, 1.0)
    evaluation(tmp_path / "other", "source", 1.0, 1.0, 1.0, tasks=["bpb"])
    assert "tasks is ['bpb']" in refused(report.main, tmp_path, tmp_path / "other")
    content = evaluation(tmp_path, "ssu-mag", 1.0, 1.0, 1.0)
    for damaged in ({}, [], content | {"results": None}, content | {"version": 9}):
        (tmp_path / "ssu-mag/eval.json").write_text(json.dumps(damaged))
        assert "ssu-mag/eval.json cannot be read" in refused(report.main, tmp_path)
    assert not (tmp_path / "report.md").exists()


def test_methods_trained_with_other_settings_are_named(tmp_path, tables_only):
    base = {"lr": 5e-4, "steps": 32, "seed": 42, "micro_batch_size": 8, "optimizer": "adamw"}
    runs = {"fft": base, "gmt": base | {"micro_batch_size": 2, "gmt_ratio": 0.5}}
    runs["ssu-wanda"] = base | {"lr": 1e-4, "steps": 64, "optimizer": "adamw8bit"}
    evaluation(tmp_path, "source", 1.0, 2.0, 10.0)
    for method, settings in runs.items():
        evaluation(tmp_path, method, 1.1, 1.5, 12.0)
        log = json.dumps({"settings": settings}) + "\n" + json.dumps({"step": 0})
        (tmp_path / method / "train.jsonl").write_text(log)
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    differences = "steps 64, lr 0.0001, optimizer adamw8bit (FFT: 32, 0.0005, adamw)"
    assert f"\nSSU-Wanda was trained with {differences}.\n" in text
    assert text.count("was trained with") == 1
    report.main([str(tmp_path), "--methods", "fft", "gmt"])
    assert "was trained with" not in (tmp_path / "report.md").read_text()

    # In a second run directory alone
    for method in ("source", "fft", "gmt"):
        shutil.copytree(tmp_path / method, tmp_path / "second" / method)
    log = json.dumps({"settings": runs["gmt"] | {"seq_len": 64}})
    (tmp_path / "second/gmt/train.jsonl").write_text(log)
    both = [str(tmp_path), str(tmp_path / "second")]
    report.main([*both, "--methods", "fft", "gmt"])
    assert not (tmp_path / "second/report.md").exists()  # it goes to the first one
    text = (tmp_path / "report.md").read_text()
    assert "\nGMT was trained with seq_len 64 (FFT: None).\n" in text


def test_only_its_own_files_are_overwritten(tmp_path, refused):
    for method in ("source", "fft"):
        evaluation(tmp_path, method, 1.0, 2.0, 20.0)
    for name in ("kept.png", "report.md"):
        (tmp_path / name).write_text("mine")
        assert f"{name} exists" in refused(report.main, tmp_path)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    for _ in range(2):
        report.main([str(tmp_path)])
    assert "report.py: error:" in refused(
        report.main, tmp_path, "--out", tmp_path / "source/eval.json"
    )


def test_interrupted(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    evaluation(tmp_path, "source", 1.0, 2.0, 20.0)
    monkeypatch.setattr(json, "loads", interrupt)
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path)])
    assert stopped.value.code == 130
    assert capsys.readouterr().err.splitlines() == ["report.py: interrupted"]
