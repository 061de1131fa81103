"""data/prepare_paper.py against the stand-in hub."""

import json
import shutil

import pandas
import pytest
from conftest import TEXT
from hub import COMMIT, REQUESTS
from paper_hub import put_safety
from transformers import AutoTokenizer

from data import prepare_paper, safety


def read_all(folder):
    """Return {"LANG/name": rows} of all files below a folder."""
    found = {}
    for path in folder.glob("*/*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines()
        found[f"{path.parent.name}/{path.stem}"] = [json.loads(line) for line in lines]
    return found


def test_paper_sets_become_files(paper_sets, tmp_path, monkeypatch, refused):
    argv = ["ig", "--model", "someone/tiny", "--out", str(tmp_path)]
    prepare_paper.main(argv)
    data = read_all(tmp_path)
    assert data["en/ae2"] == [{"instruction": f"Say {text}", "dataset": "koala"} for text in TEXT]
    assert {name: len(rows) for name, rows in data.items()} == {
        "ig/flores.dev": 100,
        "ig/flores.devtest": 500,
        "en/xlsum": 8,
        "ig/xlsum": 8,
        "en/belebele": 6,
        "ig/belebele": 6,
        "en/mmlu.dev": 5,
        "en/mmlu.test": 4,
        "ig/mmlu.dev": 5,
        "ig/mmlu.test": 3,
        "en/ae2": 5,
        "en/mtb": 3,
    }
    drawn = [row["id"] for row in data["ig/flores.devtest"]]
    rows = pandas.DataFrame({"id": range(600)})
    assert drawn == rows.sample(n=500, random_state=42)["id"].tolist()
    assert not set(drawn) & {row["id"] for row in data["ig/flores.dev"]}
    assert all(row["eng_Latn"] == f"eng_Latn {row['id']}" for row in data["ig/flores.devtest"])
    assert [len(row["text"].split()) for row in data["en/xlsum"]] == [1, 3, 5, 6, 7, 8, 9, 10]
    assert [row["answer"] for row in data["en/mmlu.test"]] == [*"ABCD"]
    listed = json.loads((tmp_path / "ig/provenance.json").read_text())
    commit = prepare_paper.FLORES["ungated"][1]
    assert listed["flores.dev.jsonl"]["from"] == f"mteb/FloresBitextMining@{commit}"
    assert listed["xlsum.jsonl"]["from"] == f"csebuetnlp/xlsum@{COMMIT}"

    # A second call leaves it as it is, and asks the hub for nothing.
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    REQUESTS.clear()
    prepare_paper.main(argv)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")} == before
    assert not REQUESTS

    gated = [*argv, "--flores", "gated"]
    with monkeypatch.context() as patch:
        patch.setitem(prepare_paper.LANGUAGES, "ig", {"name": "Igbo", "flores": "ibo_Latn"})
        line = refused(prepare_paper.main, *argv)
        assert "no belebele global_mmlu xlsum for ig" in line
    assert "holds the other FLORES+" in refused(prepare_paper.main, *gated)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")} == before
    shutil.rmtree(tmp_path / "ig")
    line = refused(prepare_paper.main, *gated)
    assert "flores_plus" in line and "HF_TOKEN" in line
    monkeypatch.setenv("HF_TOKEN", "let-me-in")
    prepare_paper.main(gated)
    data = read_all(tmp_path)
    assert data["ig/flores.dev"][7] == {
        "id": 7,
        "eng_Latn": "eng_Latn dev 7",
        "ibo_Latn": "ibo_Latn dev 7",
    }
    assert [row["id"] for row in data["ig/flores.devtest"]] == drawn


def test_the_safety_suite_is_written_whole_or_not_at_all(
    paper_sets, tmp_path, monkeypatch, refused
):
    argv = ["ig", "--model", "someone/tiny", "--out", str(tmp_path / "data")]
    prepare_paper.main(argv)
    clone = tmp_path / "clone"
    put_safety(paper_sets, clone, monkeypatch)
    argv += ["--safety-eval", str(clone)]

    def refused_first():
        REQUESTS.clear()
        line = refused(prepare_paper.main, *argv)
        assert not (tmp_path / "data/en/t3.jsonl").exists()
        assert not any("/resolve/" in path for _, path, _ in REQUESTS)
        return line

    assert "did not give allenai/wildguardmix" in refused_first()
    monkeypatch.setenv("HF_TOKEN", "let-me-in")
    file = clone / "evaluation/tasks/generation/wildjailbreak/benign.jsonl"
    text = file.read_text()
    file.write_text(text + "\n")
    assert "benign.jsonl is not the file this was written for" in refused_first()
    file.unlink()
    assert "must be a clone of" in (line := refused_first()) and "benign.jsonl is missing" in line
    file.write_text(text)
    prepare_paper.main(argv)
    rows = read_all(tmp_path / "data")["en/t3"]
    found = {}
    for row in rows:
        found.setdefault(row["task"], []).append((row["prompt"], row["judged"], row["want"]))
    assert list(found) == list(safety.WANTED) and len({row["id"] for row in rows}) == 14
    assert found["wildguardtest"] == [(f"guard {i}", f"guard {i}", "harmless") for i in (0, 4)]
    assert found["harmbench"][1] == ("harmbench Behavior 1", "harmbench Behavior 1", "harmless")
    part = "do_anything_now"
    assert found[part][0] == (f"{part} adversarial 0", f"{part} vanilla 0", "resisted")
    part = "wildjailbreak:benign"
    assert found[part][0] == (f"{part} adversarial 0", f"{part} adversarial 0", "complied")
    assert [want for _, _, want in found["xstest"]] == ["complied", "refused"]

    # What is there is not made again, and needs neither the clone nor the hub.
    shutil.rmtree(clone)
    REQUESTS.clear()
    prepare_paper.main(argv)
    assert not REQUESTS


def test_of_xlsum_the_500_shortest_with_a_text_and_a_summary(olmo2):
    rows = {
        "test": [
            {"id": i, "text": "word " * (700 - i), "summary": "s" * (i % 7)} for i in range(600)
        ],
        "validation": [{"id": i, "text": "" if i else "word", "summary": "s"} for i in range(3)],
    }
    found = prepare_paper.xlsum_rows(
        lambda repo, config, split, columns: rows[split], "ig", AutoTokenizer.from_pretrained(olmo2)
    )
    kept = [f"test/{i}" for i in reversed(range(600)) if i % 7]
    assert [row["id"] for row in found] == ["validation/0", *kept][:500]


def test_foreign_files_are_not_overwritten(paper_sets, tmp_path, capsys):
    (tmp_path / "ig").mkdir()
    (tmp_path / "ig/xlsum.jsonl").write_text("mine")
    with pytest.raises(SystemExit):
        prepare_paper.main(["ig", "--model", "someone/tiny", "--out", str(tmp_path)])
    assert "not from here" in capsys.readouterr().err
    assert (tmp_path / "ig/xlsum.jsonl").read_text() == "mine"
