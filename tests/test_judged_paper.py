"""MT-Bench and the safety suite in the paper profile of run_all.sh, also after kill -9."""

import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TEXT
from hub import HUB
from paper_hub import (
    put_glotlid,
    put_harness_data,
    put_judges,
    put_madlad,
    put_rows,
    put_safety,
    put_tulu,
)
from test_run_all import run_all

from data import prepare_paper
from tools import ae2, report


@pytest.fixture
def paper_run(paper_sets, tmp_path, monkeypatch):
    """Return settings of run_all.sh for the paper profile on the stand-in hub, with its data."""
    model = HUB / "models/someone/tiny"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2300}))
    ends = {"eos_token_id": list(range(2, 130))}  # most answers are short
    (model / "generation_config.json").write_text(json.dumps(ends))
    for name in ("english", "igbo"):  # a sequence of 512 tokens, to measure along the way
        row = {"url": "u", "title": "t", "text": " ".join(TEXT)}
        rows = [row | {"id": str(i), "summary": TEXT[i]} for i in range(5)]
        put_rows(paper_sets / "csebuetnlp/xlsum", f"{name}/test/0000.parquet", rows)
    put_harness_data(paper_sets, tmp_path, monkeypatch)
    put_glotlid(words=4, target="ibo_Latn")
    put_madlad(paper_sets, "ig", [f"{i}\\n{' '.join(TEXT)}" for i in range(60)])
    put_tulu(paper_sets)
    put_judges(mtb="<score> 3 </score>")
    put_safety(paper_sets, tmp_path / "clone", monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "let-me-in")
    argv = ["ig", "--model", "someone/tiny", "--out", str(tmp_path / "data")]
    prepare_paper.main([*argv, "--safety-eval", str(tmp_path / "clone")])
    return {
        "PROFILE": "paper",
        "MODEL": "someone/tiny",
        "DATA_DIR": str(tmp_path / "data"),
        "RUNS": str(tmp_path / "runs"),
        "STEPS": "1",
        "METHODS": "fft",
        "PRECISION": "fp32",
        "TASKS": "mt sum mrc mmlu ifeval gsm8k ae2 codemix mtb t3",
    }


def items_of(out, task):
    """Return how many items of a task are saved, of what chat_eval.py has written so far."""
    path = out.with_suffix(".items.jsonl")
    return path.read_text().count(f'{{"task": "{task}"') if path.exists() else 0


@pytest.mark.slow
def test_the_paper_profile_fills_all_columns_of_table_2(paper_run, tmp_path):
    done = run_all("ig", **paper_run)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs/ig"
    for method in ("source", "fft"):
        results = json.loads((run / method / "chat.json").read_text())["results"]
        assert set(results) == {"ifeval", "gsm8k", "ae2", "codemix", "mtb", "t3"}
        assert results["mtb"]["source"]["score"] == 3 and results["mtb"]["source"]["n"] == 3
        assert results["t3"]["source"]["macro"] == pytest.approx(0.5)
        # As tools/ae2.py, which asks a paid API, adds it
        results["ae2"]["source"] |= {"win_rate": 20.0, "judge": {"name": ae2.JUDGE}}
        content = json.loads((run / method / "chat.json").read_text()) | {"results": results}
        (run / method / "chat.json").write_text(json.dumps(content))
    report.main([str(run)])
    lines = (run / "report.md").read_text().splitlines()
    source, fft = [next(x for x in lines if x.startswith(f"| {m} ")) for m in ("Source", "FFT")]
    for row in (source, fft):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 14 and "-" not in cells


@pytest.mark.slow
def test_killed_between_the_passes_and_in_the_judging_it_makes_the_same_files(paper_run, tmp_path):
    argv = [sys.executable, str(ROOT / "tools/chat_eval.py"), "--model", "someone/tiny"]
    argv += ["--lang", "ig", "--data-dir", paper_run["DATA_DIR"], "--tasks", "mtb,t3"]
    argv += ["--batch-tokens", "1500", "--out"]
    whole, out = tmp_path / "whole.json", tmp_path / "killed.json"
    subprocess.run([*argv, str(whole)], check=True)
    answers = items_of(whole, "t3")
    for task, count in (("mtb", 2), ("t3", answers), ("mtb-judge", 1), ("t3-judge", 1)):
        process = subprocess.Popen([*argv, str(out)])
        while items_of(out, task) < count and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
    assert 0 < items_of(out, "mtb-judge") == items_of(whole, "mtb-judge")
    subprocess.run([*argv, str(out)], check=True)
    assert out.read_text() == whole.read_text()
    items = [path.with_suffix(".items.jsonl").read_text() for path in (out, whole)]
    assert items[0] == items[1]


@pytest.mark.parametrize("tasks", ["mtb,t3", "t3 mtb"])
def test_the_safety_suite_without_its_prompts_is_refused_before_a_run(tasks, tmp_path):
    done = run_all("ig", PROFILE="paper", TASKS=tasks, DATA_DIR=str(tmp_path))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and f"t3 needs {tmp_path}/en/t3.jsonl" in line
    assert "--safety-eval CLONE" in line
