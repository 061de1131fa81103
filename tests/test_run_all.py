"""run_all.sh: the real scripts on tiny models, its refusals, and its end on errors and signals."""

import fcntl
import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import quick_python
import torch
from conftest import ROOT, TEXT, tiny_model, write_jsonl
from hub import HUB
from paper_hub import (
    put_glotlid,
    put_harness_data,
    put_judges,
    put_madlad,
    put_rows,
    put_tulu,
)
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

REAL_PYTHON = Path(sys.executable).parent


def command(python, argv, settings):
    """Return the arguments of Popen for run_all.sh, python being the folder of its `python`."""
    path = f"{python}{os.pathsep}{REAL_PYTHON}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": path, **settings}
    return dict(args=["bash", "run_all.sh", *argv], cwd=ROOT, env=environment, text=True)


def run_all(*argv, python=REAL_PYTHON, **settings):
    return subprocess.run(**command(python, argv, settings), capture_output=True)


@pytest.mark.parametrize("argv", [[], ["ne", "--dry"], ["ne", "--dry-run", "more"]])
def test_usage(argv):
    done = run_all(*argv)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "usage: bash run_all.sh LANG [--dry-run]" in line


@pytest.mark.parametrize("lang", ["xx", "english", ""])
def test_an_unknown_language_is_refused_with_the_known_ones(lang):
    done = run_all(lang)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and all(code in line for code in ("ne", "ky", "am", "ha", "ig"))


@pytest.mark.parametrize(
    "setting,value",
    [
        ("METHODS", "fft ssu-best"),
        ("PROFILE", "large"),
        ("STEPS", "many"),
        ("STEPS", "0"),
        ("SEED", "-1"),
        ("RATIOS", "0.5 2"),
        ("RATIOS", "0.5 .5 0.5"),
        ("RATIOS", "half"),
        ("PRECISION", "int8"),
        ("CALIBRATION", "nowhere"),
        ("NUM_SAMPLES", "0"),
        ("TASKS", "bpb,mtt"),
        ("TASKS", "ifeval,chat"),
        ("MODEL", "./nowhere"),
        ("DATA_DIR", "nowhere"),
        ("COMPACT", "2"),
        ("LANGUAGE_ID", "nonsense"),
        ("NPROC", "many"),
        ("NPROC", "3"),
        ("FLASH_ATTN", "yes"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_deleted(
    setting, value, folder, tmp_path, quick
):
    kept = tmp_path / "ne/source/eval.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("of an earlier run")
    settings = tiny_settings(folder, tmp_path, METHODS="ssu-wanda") | {setting: value}
    done = run_all("ne", python=quick, **settings)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and re.split("[ ,]", value)[-1] in line
    assert kept.read_text() == "of an earlier run"


def test_help_lists_the_variables():
    done = run_all("--help")
    assert done.returncode == 0 and not done.stderr
    assert "NPROC " in done.stdout and "torchrun --nnodes=" in done.stdout
    source = Path(ROOT / "run_all.sh").read_text() + Path(ROOT / "data/paper.sh").read_text()
    names = set(re.findall(r"\$\{([A-Z_]{4,}):=", source))
    assert {"SEED", "MODEL", "TASKS"} <= names
    for name in names:
        assert name in done.stdout


def test_a_dry_run_plans_and_writes_nothing(folder, tmp_path, quick):
    settings = tiny_settings(folder, tmp_path / "runs")
    done = run_all("ne", "--dry-run", python=quick, **settings)
    assert done.returncode == 0 and not (tmp_path / "runs").exists()
    assert done.stdout.startswith("embedded profile (MODEL or DATA_DIR is given): ")
    assert "\nmemory of a process of fft: " in done.stdout and "\ndisk: " in done.stdout
    done = run_all("ne", "--dry-run", python=quick, **settings | {"RATIOS": ".50 .25"})
    assert done.returncode == 0 and " --ratios 0.5 0.25 " in done.stdout
    done = run_all("ne", "--dry-run", python=quick, **settings | {"METHODS": ""})
    assert done.returncode == 0 and " --methods --ratios " in done.stdout  # evaluation alone


@pytest.mark.parametrize(
    "cards, visible, nproc",
    [
        (2, None, 2),
        (4, None, 2),  # the smallest batch, of gmt, has two sequences
        (4, "3", 1),
        (4, "1,3", 2),
        (4, "", 1),
        (0, None, 1),
    ],
)
def test_all_visible_gpus_are_used(cards, visible, nproc, folder, tmp_path, quick):
    """With an nvidia-smi that answers as the real one does."""
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/bash\n"
        f"count={cards}\n"
        'if [[ "$*" = *" -i "* ]]; then ids=${*: -1} && count=$(wc -w <<< "${ids//,/ }"); fi\n'
        "[ $count -gt 0 ] || exit 6\n"
        "for ((i = 0; i < count; i++)); do echo 81559; done\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    settings = tiny_settings(folder, tmp_path / "runs")
    settings["PATH"] = f"{quick}:{tmp_path}:{REAL_PYTHON}:{os.environ['PATH']}"
    if visible is not None:
        settings["CUDA_VISIBLE_DEVICES"] = visible
    done = run_all("ne", "--dry-run", **settings)
    assert done.returncode == 0, done.stderr
    assert f", processes: {nproc}\n" in done.stdout and f" --gpus {nproc} " in done.stdout
    if cards and visible == "" and not torch.cuda.is_available():
        done = run_all("ne", **settings | {"CUDA_VISIBLE_DEVICES": "3"})
        assert done.returncode == 2 and "torch cannot use the GPUs" in done.stderr
    if (cards, visible) == (2, None):  # together they hold the training of a 7B model
        del settings["MODEL"], settings["DATA_DIR"]
        done = run_all("ne", "--dry-run", **settings)
        assert done.stdout.startswith("embedded profile (the hub does not answer): ")


@pytest.mark.parametrize(
    "cards, expected",
    [
        ("81559", "no GPUs have the 100 GB"),
        ("143771", "paper GPUs with 143771 MiB"),
        ("81559 81559", "paper GPUs with 163118 MiB"),
        ("40960 40960 40960", "no GPUs have the 100 GB"),  # two of them share a batch
        ("40960 24576 40960 40960 40960", "paper GPUs with 163840 MiB"),
        ("24564 " * 8, "no GPUs have the 100 GB"),
        ("40960 " * 16, "paper GPUs with 327680 MiB"),  # no more than 8 share a batch
    ],
)
def test_the_paper_profile_is_for_gpus_that_hold_it(cards, expected, tmp_path):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/bash\nprintf '%s\\n' {cards}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    script = f'. "{ROOT}/tools/driver.sh"; unset PROFILE CUDA_VISIBLE_DEVICES\n'
    script += f'HF_ENDPOINT=file://{tmp_path}/nvidia-smi choose_profile; echo "$PROFILE $why"'
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    run = dict(cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert expected in subprocess.run(["bash", "-euc", script], **run).stdout


def test_gmt_needs_processes_that_share_its_micro_batches(folder, tmp_path, quick):
    settings = tiny_settings(folder, tmp_path, METHODS="fft\ngmt", NPROC="4")
    done = run_all("ne", "--dry-run", python=quick, **settings)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "NPROC=4: gmt needs a divisor of its 2 sequences" in line


@pytest.mark.parametrize(
    "argv, launched",
    [
        (
            "train.py --lr 1",
            "torchrun --standalone --nproc_per_node=4 train.py --lr 1 --timeout 120",
        ),
        ("evaluate.py", "torchrun --standalone --nproc_per_node=4 evaluate.py --timeout 120"),
        ("score.py", "torchrun --standalone --nproc_per_node=4 score.py --timeout 120"),
        ("make_mask.py --method hft", "python make_mask.py --method hft"),
        ("tools/chat_eval.py", "python tools/chat_eval.py"),
        ("train.py --adalora --steps 2", "python train.py --adalora --steps 2"),
        ("train.py --precision fp16 --seed 1", "python train.py --precision fp16 --seed 1"),
        (  # four processes share the 8 sequences
            "train.py --gmt-ratio 0.5",
            "torchrun --standalone --nproc_per_node=4 train.py --gmt-ratio 0.5 "
            "--micro-batch-size 2 --timeout 120",
        ),
    ],
)
def test_a_stage_is_started_by_as_many_processes_as_can_run_it(argv, launched, tmp_path):
    """With commands that print how they are called."""
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(f'#!/bin/bash\necho "= {name} $*"\n')
        (tmp_path / name).chmod(0o755)
    script = f'. "{ROOT}/tools/driver.sh"; NPROC=4 accumulated=8; launch python {argv}'
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    run = dict(env=environment, capture_output=True, text=True, check=True)
    done = subprocess.run(["bash", "-eEuo", "pipefail", "-c", script], **run)
    assert f"= {launched}\n" in done.stdout


def test_an_empty_file_is_as_good_as_none(tmp_path):
    (tmp_path / "full").write_text("x")
    (tmp_path / "empty").touch()
    script = f'. "{ROOT}/tools/driver.sh"; require full; echo on; require full empty; echo no'
    run = dict(cwd=tmp_path, capture_output=True, text=True)
    done = subprocess.run(["bash", "-c", script], **run)
    assert done.returncode == 2 and done.stdout == "on\n"
    assert "empty is missing or empty" in done.stderr


def test_the_embedded_profile_is_made_again_after_a_change_of_what_it_is_made_from(tmp_path):
    """Of the script, of the text that it reads, and of the packages."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/prepare_embedded.py").write_text(
        "from pathlib import Path\n"
        "Path('data/embedded/model').mkdir(parents=True, exist_ok=True)\n"
        "for name in ('provenance.json', 'model/model.safetensors'):\n"
        "    Path('data/embedded', name).write_text('made')\n"
    )
    made_from = ("data/prepare_embedded.py", "data/udhr.jsonl", "requirements.txt")
    for name in (*made_from, "data/requirements.txt"):
        (tmp_path / name).touch()

    def made():
        script = f'. "{ROOT}/tools/driver.sh"; prepare_embedded'
        run = dict(cwd=tmp_path, capture_output=True, text=True, check=True)
        return "prepare_embedded.py" in subprocess.run(["bash", "-euc", script], **run).stdout

    assert made() and not made()
    for name in (*made_from, "data/requirements.txt"):
        with open(tmp_path / name, "a") as file:
            file.write("# changed\n")
        assert made() and not made()
    for name in ("provenance.json", "model/model.safetensors"):
        (tmp_path / "data/embedded" / name).unlink()
        assert made() and not made()


@pytest.mark.slow
def test_two_processes_train_what_one_trains(folder, tmp_path, quick):
    methods = "gmt ssu-wanda"
    for nproc in ("1", "2"):
        settings = tiny_settings(folder, tmp_path / nproc, METHODS=methods, NPROC=nproc)
        done = run_all("ne", python=quick, **settings)
        assert done.returncode == 0, done.stderr[-3000:]
    started = re.findall(r"^\+ torchrun .*--nproc_per_node=2 (\w+.py)", done.stdout, re.MULTILINE)
    assert sorted(started) == ["evaluate.py"] * 3 + ["score.py"] + ["train.py"] * 2
    for method in methods.split():
        log = f"ne/{method}/train.jsonl"
        one, two = (json.loads((tmp_path / n / log).read_text().splitlines()[-2]) for n in "12")
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["target_bpb"] == pytest.approx(one["target_bpb"], abs=1e-5)
    # What two processes made needs not be made again by one.
    again = run_all("ne", python=quick, **settings | {"NPROC": "1"})
    assert again.returncode == 0 and again.stdout.count("done before:") == 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a data folder in the layout of data/embedded, all tiny."""
    root = tmp_path_factory.mktemp("all")
    tiny_model(root / "model", "llama", intermediate_size=96)  # 1.5% of its channels is one
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"{TEXT[i % 5]} {i}?"},
                {"role": "assistant", "content": TEXT[(i + 1) % 5]},
            ]
        }
        for i in range(30)
    ]
    items = [
        {
            "sample_id": f"{i}",
            "subject": "s",
            "question": f"{i}?",
            "option_a": "a",
            "option_b": "bb",
            "option_c": "c",
            "option_d": "dd",
            "answer": "ABCD"[i % 4],
        }
        for i in range(8)
    ]
    pairs = [{"id": f"{i}", "eng_Latn": TEXT[0], "npi_Deva": TEXT[2]} for i in range(4)]
    for name, rows in {
        "en/calibration": chats,
        "en/heldout": chats[:6],
        "en/mmlu.test": items,
        "ne/mmlu.test": items,
        "ne/train": [{"text": f"{TEXT[i % 5]} {i}"} for i in range(60)],
        "ne/flores.dev": pairs,
        "ne/heldout": [{"text": text} for text in TEXT] * 2,
        "ne/flores.devtest": pairs,
    }.items():
        write_jsonl(root / "data" / f"{name}.jsonl", rows)
    return root


@pytest.fixture(scope="module")
def quick(folder, tmp_path_factory):
    """The folder of a `python` that starts at once."""
    AutoModelForCausalLM.from_pretrained(folder / "model")  # the first one takes a second
    for name in ("evaluate", "train", "sacrebleu", "matplotlib.pyplot"):
        importlib.import_module(name)
    place = tmp_path_factory.mktemp("python")
    server = quick_python.start(place)
    yield place
    quick_python.stop(server)


def tiny_settings(folder, runs, **more):
    """Return the environment of a run that only trains and reports bits per byte."""
    settings = dict(MODEL=str(folder / "model"), DATA_DIR=str(folder / "data"), RUNS=str(runs))
    return settings | dict(TASKS="bpb", STEPS="2", METHODS="fft", PRECISION="fp32") | more


def test_end_to_end_then_nothing_left_to_do_then_only_what_changed(folder, quick):
    """In folders whose names are patterns or two words, without a file of the template."""
    for name in ("d1", "m1"):
        (folder / name).mkdir()
    data = shutil.copytree(folder / "data", folder / "d[1]")
    model = shutil.copytree(folder / "model", folder / "m[1]")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = (model / "chat_template.jinja").read_text()
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "chat_template.jinja").unlink()
    settings = tiny_settings(folder, folder / "my runs", MODEL=str(model), DATA_DIR=str(data))
    settings |= {"METHODS": "ssu-wanda", "TASKS": "bpb,mcq,chat"}
    done = run_all("ne", python=quick, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    run = folder / "my runs/ne"
    for name in (
        "scores-wanda.safetensors",
        "ssu-wanda/mask.safetensors",
        "ssu-wanda/model/model.safetensors",
        "ssu-wanda/train.jsonl",
        "ssu-wanda/eval.json",
        "source/eval.json",
        "source/chat.json",
    ):
        assert (run / name).is_file(), name
    assert re.search(r"^\+ python score.py .* --dtype float32$", done.stdout, re.MULTILINE)
    assert "SSU-Wanda" in done.stdout and "SSU-Wanda" in (run / "report.md").read_text()
    assert json.loads((run / "ssu-wanda/eval.json").read_text())["format"] == "ssu-eval"

    (data / "en/t3.jsonl").write_text("{}\n")  # of a task that is not among these
    again = run_all("ne", python=quick, **settings)
    assert again.returncode == 0 and again.stdout.count("done before:") == 7
    started = re.findall(r"^\+ python (\S+)", again.stdout, re.MULTILINE)
    assert started == ["tools/plan.py", "tools/report.py"]

    # New training text: the model is not deleted. When it is, the scores and the mask stay, and
    # training and evaluations are made again.
    with open(data / "ne/train.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    (data / "ne/mmlu.test.jsonl").unlink()
    settings |= {"TASKS": "bpb", "COMPACT": "1"}
    refused = run_all("ne", python=quick, **settings)
    assert refused.returncode == 2 and "model was made with other settings" in refused.stderr
    shutil.rmtree(run / "ssu-wanda/model")
    changed = run_all("ne", python=quick, **settings)
    assert changed.returncode == 0, changed.stderr[-3000:]
    assert json.loads((run / "source/eval.json").read_text())["results"].keys() == {"bpb"}
    log = [json.loads(line) for line in (run / "ssu-wanda/train.jsonl").read_text().splitlines()]
    assert log[0]["settings"]["compact"] and log[-1]["summary"]["frozen_verified"] > 0
    assert changed.stdout.count("done before:") == 3  # the evaluation of the source, just before


def test_what_is_made_from_an_output_is_made_again_only_if_that_changed(tmp_path):
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "copy.sh").write_text('cp "$1" "$2"; echo "made $2"\n')
    script = (
        f'. "{ROOT}/tools/driver.sh"; PROFILE=embedded DATA_DIR= MODEL= several=()\n'
        "stage a -- bash copy.sh text a; stage b a.made-by -- bash copy.sh a b\n"
    )

    def made():
        run = dict(cwd=tmp_path, capture_output=True, text=True, check=True)
        done = subprocess.run(["bash", "-eEuo", "pipefail", "-c", script], **run)
        return re.findall("made (.)", done.stdout)

    (tmp_path / "text").write_text("old")
    assert made() == ["a", "b"] and made() == []
    (tmp_path / "a").unlink()
    assert made() == ["a"]
    (tmp_path / "a").unlink()
    (tmp_path / "text").write_text("new")
    assert made() == ["a", "b"] and (tmp_path / "b").read_text() == "new"
    with open(tmp_path / "copy.sh", "a") as file:
        file.write("# another script\n")
    assert made() == ["a", "b"] and made() == []
    (tmp_path / "requirements.txt").write_text("another version")
    assert made() == ["a", "b"] and made() == []
    script = f"model_sha256=of-another-model\n{script}"
    assert made() == ["a", "b"]


@pytest.mark.parametrize(
    "profile, data, model, deleted",
    [
        ("embedded", "data/embedded", "data/embedded/model", True),
        ("embedded", "/mine/data/embedded", "data/embedded/model", False),
        ("embedded", "data/embedded", "someone/model", False),
        ("paper", "data/paper", "someone/model", False),
    ],
)
def test_models_of_own_text_are_not_deleted(profile, data, model, deleted, tmp_path):
    """By a run of the embedded profile in the same folder."""
    first = f"PROFILE={profile} DATA_DIR={data} MODEL={model}\n"
    second = "PROFILE=embedded DATA_DIR=data/embedded MODEL=data/embedded/model\n"
    stage = f'. "{ROOT}/tools/driver.sh"; several=(); stage fft/model -- bash make.sh fft/model'
    run = dict(cwd=tmp_path, capture_output=True, text=True)
    for made, script in (("first", first + stage), ("second", second + stage)):
        (tmp_path / "make.sh").write_text(f'echo {made} > "$1"\n')
        (tmp_path / "requirements.txt").write_text(made)
        done = subprocess.run(["bash", "-eEuo", "pipefail", "-c", script], **run)
    assert (tmp_path / "fft/model").read_text() == ("second\n" if deleted else "first\n")
    assert ("Set RUNS, or delete it" in done.stderr) == (not deleted)


@pytest.mark.parametrize("output", ["ne/scores", "ne/fft/eval.json"])
@pytest.mark.parametrize("profile", ["embedded", "paper"])
def test_what_may_have_taken_days_is_not_deleted(profile, output, tmp_path):
    """In the paper profile, scores and evaluations too."""
    stage = f'. "{ROOT}/tools/driver.sh"; several=() PROFILE={profile} DATA_DIR=data MODEL=model\n'
    stage += f"stage {output} -- bash make.sh {output}"
    run = dict(cwd=tmp_path, capture_output=True, text=True)
    for made in ("first", "second"):
        (tmp_path / "make.sh").write_text(f'echo {made} > "$1"\n')
        (tmp_path / "requirements.txt").write_text(made)
        done = subprocess.run(["bash", "-eEuo", "pipefail", "-c", stage], **run)
    assert (tmp_path / output).read_text() == ("second\n" if profile == "embedded" else "first\n")
    assert ("Set RUNS, or delete it" in done.stderr) == (profile == "paper")


def test_what_was_trained_so_far_is_resumed_kept_or_made_anew(tmp_path):
    """By a stage that ends before its model is there, with and without a complete checkpoint."""
    (tmp_path / "make.sh").write_text(
        'echo "options: $*"; mkdir -p fft/checkpoint/$1; touch fft/checkpoint/$1/checkpoint.json\n'
    )
    saved, run = tmp_path / "fft/checkpoint", dict(cwd=tmp_path, capture_output=True, text=True)

    def stage(model, version, name="step-5"):
        """Return the options of the command, or the error."""
        (tmp_path / "requirements.txt").write_text(version)
        script = f'. "{ROOT}/tools/driver.sh"; several=() PROFILE=embedded DATA_DIR=data/embedded '
        script += f"MODEL={model}; stage fft/model -- bash make.sh {name}"
        done = subprocess.run(["bash", "-eEuo", "pipefail", "-c", script], **run)
        assert done.returncode == 2
        return done.stdout.partition("options: ")[2].strip() or done.stderr

    assert stage("mine", "1", "step-5.tmp") == stage("mine", "1", "step-5.tmp") == "step-5.tmp"
    shutil.rmtree(saved)  # the name is one of the options, which must not change
    (tmp_path / "fft/model.made-by").unlink()
    assert stage("mine", "1") == "step-5" and stage("mine", "1") == "step-5 --resume"
    (saved / "step-4").mkdir()
    assert "was made with other settings" in stage("mine", "2")
    assert {path.name for path in saved.iterdir()} == {"step-4", "step-5"}
    shutil.rmtree(tmp_path / "fft")
    assert stage("data/embedded/model", "1") == "step-5"
    (saved / "step-4").mkdir()
    assert stage("data/embedded/model", "2") == "step-5"
    assert [path.name for path in saved.iterdir()] == ["step-5"]


def test_the_results_of_a_model_in_a_folder_have_its_name():
    script = ". data/paper.sh; echo $RUNS"
    settings = dict(lang="ne", MODEL="/models/OLMo/", TASKS="mt")
    run = dict(cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=True)
    assert subprocess.run(["bash", "-euc", script], **run).stdout == "runs/OLMo\n"


@pytest.mark.parametrize(
    "methods, read", [("fft hft ssu-rand ssu-mag", ""), ("hft\n  ssu-wanda-row", "chats.jsonl")]
)
def test_only_some_methods_need_calibration_text(methods, read, tmp_path):
    script = f'. "{ROOT}/tools/driver.sh"; gpus=0 accumulated=2 en=en; read_lists; '
    script += 'echo "${score_inputs[@]}"'
    settings = dict(METHODS=methods, TASKS="bpb", PRECISION="fp32", CALIBRATION="chats.jsonl")
    run = dict(env=os.environ | settings, capture_output=True, text=True, check=True)
    assert subprocess.run(["bash", "-euc", script], **run).stdout == f"{read}\n"


@pytest.mark.parametrize(
    "precision, dtype", [("fp32", "float32"), ("bf16", "bfloat16"), ("bf16-true", "bfloat16")]
)
def test_scores_and_evaluations_are_computed_in_the_precision_of_training(precision, dtype):
    script = f'. "{ROOT}/tools/driver.sh"; gpus=0 accumulated=2 en=en; read_lists; '
    script += 'echo "${calibration[@]}" "$dtype"'
    settings = dict(METHODS="fft", TASKS="bpb", PRECISION=precision, CALIBRATION="tulu")
    run = dict(env=os.environ | settings, capture_output=True, text=True, check=True)
    found = subprocess.run(["bash", "-euc", script], **run).stdout
    assert found == f"--dtype {dtype} {dtype}\n"


def test_answers_are_asked_again_after_a_change_of_what_asks_them():
    script = f'. "{ROOT}/tools/driver.sh"; gpus=0 accumulated=2 en=en; read_lists; '
    script += 'echo "${chat_inputs[@]}"'
    settings = dict(TASKS="chat,t3", PRECISION="fp32", CALIBRATION="chats.jsonl")
    run = dict(env=os.environ | settings, capture_output=True, text=True, check=True)
    found = subprocess.run(["bash", "-euc", script], **run).stdout.split()
    assert found == ["evaluate.py", "tools/answers.py", "tools/judged.py", "en/t3.jsonl"]


def test_only_the_prompts_of_the_language_are_an_input(tmp_path):
    """A third language in languages.json makes no evaluation old."""
    (tmp_path / "data").mkdir()
    script = (
        f'. "{ROOT}/tools/driver.sh"; dir=. lang=ne; save_prompts; cat "${{prompt_files[@]: -1}}"'
    )
    found = []
    for languages in ({}, {"sw": {"name": "Swahili"}}, {"ne": {"name": "Nepalese"}}):
        languages = {"en": {"name": "English"}, "ne": {"name": "Nepali"}} | languages
        (tmp_path / "data/languages.json").write_text(json.dumps(languages))
        run = dict(cwd=tmp_path, capture_output=True, text=True, check=True)
        found.append(subprocess.run(["bash", "-euc", script], **run).stdout)
    assert found[0] == found[1] != found[2]


def test_another_model_has_results_of_its_own(folder, quick):
    settings = tiny_settings(folder, "") | {"RUNS": ""}
    settings["MODEL"] += "/"
    done = run_all("ne", "--dry-run", python=quick, **settings)
    name = settings["MODEL"].rstrip("/").replace("/", "-")
    assert done.returncode == 0 and f" --runs runs/embedded-{name} " in done.stdout
    assert "2 steps at rate 5e-4" in done.stdout


def test_a_link_to_a_model_has_the_digest_of_its_files(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_text("1")
    (tmp_path / "link").symlink_to("model")
    script = f'. "{ROOT}/tools/driver.sh"; sha256_of link; sha256_of model; sha256_of model/weights'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    link, model, weights = done.stdout.split("\n")[:3]
    assert link == model == weights and "e3b0c442" not in link  # of nothing
    (tmp_path / "model/README.md").write_text("results, which report.py adds after training")
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == [model, model]
    (tmp_path / "model/config.json").write_text("{}")
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split("\n")[1] != model


@pytest.mark.parametrize("name", ["source/eval.json", "fft/model/weights"])
def test_what_the_driver_did_not_make_is_kept(name, folder, tmp_path, quick):
    foreign = tmp_path / "ne" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    done = run_all("ne", python=quick, **tiny_settings(folder, tmp_path))
    output = tmp_path / "ne" / name.removesuffix("/weights")
    assert done.returncode == 2 and f"did not make {output}." in done.stderr
    assert foreign.read_text() == "mine"


def test_two_runs_in_one_folder_are_refused(folder, tmp_path, quick):
    (tmp_path / "ne").mkdir()
    with open(tmp_path / "ne/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run_all("ne", python=quick, **tiny_settings(folder, tmp_path))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "another run works in" in line
    assert not (tmp_path / "ne/source").exists()


def processes(driver):
    """Return the process ids of the command that run_all.sh runs, which is a group of its own."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        group = int(fields[2])
        if group != os.getpgrp() and Path(f"/proc/{group}/stat").exists():
            parent = Path(f"/proc/{group}/stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == driver.pid:
                found.append(int(entry.name))
    return found


def wait_until(condition, driver):
    deadline = time.monotonic() + 300  # far more than it takes on a busy machine
    while not condition():
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, code, reached",
    [
        (signal.SIGTERM, 143, "step-16"),
        pytest.param(signal.SIGINT, 130, "step-16"),
        pytest.param(signal.SIGHUP, 129, ""),  # a first, incomplete one
    ],
)
def test_a_signal_ends_the_stage_and_the_same_command_resumes(
    number, code, reached, folder, tmp_path, quick
):
    settings = tiny_settings(folder, tmp_path, STEPS="40")
    pipe = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    default = functools.partial(signal.signal, number, signal.SIG_DFL)  # nohup and "&" ignore some
    driver = subprocess.Popen(**command(quick, ["ne"], settings), **pipe, preexec_fn=default)
    wait_until((tmp_path / f"ne/fft/checkpoint/{reached}").exists, driver)
    driver.send_signal(number)
    _, errors = driver.communicate()
    assert driver.returncode == code
    assert errors.splitlines()[-1].startswith(f"run_all.sh: stopped by {number.name}")
    assert not (tmp_path / "ne/fft/model").exists()

    again = run_all("ne", python=quick, **settings)
    assert again.returncode == 0, again.stderr[-3000:]
    resumed = re.search(r"^\+ python train.py .* --resume$", again.stdout, re.MULTILINE)
    if reached:
        assert resumed
    assert (tmp_path / "ne/fft/model").exists()


def test_a_signal_ends_a_process_of_its_own(folder, tmp_path):
    """The same with the real python, at its first stage."""
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    settings = tiny_settings(folder, tmp_path)
    driver = subprocess.Popen(**command(REAL_PYTHON, ["ne"], settings), **pipe)
    wait_until(lambda: processes(driver), driver)
    below = processes(driver)
    driver.terminate()
    driver.communicate()
    assert driver.returncode == 143
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]


def test_a_failing_stage_ends_with_a_line(folder, tmp_path, quick):
    data = shutil.copytree(folder / "data", tmp_path / "data")
    (data / "ne/heldout.jsonl").write_text("damaged")
    settings = tiny_settings(folder, tmp_path / "runs") | {"DATA_DIR": str(data)}
    done = run_all("ne", python=quick, **settings)
    assert done.returncode == 2
    assert re.search(r"\nrun_all.sh: error: python \w+.py ended with 2$", done.stderr.rstrip())


def test_any_other_failure_names_its_line(folder, tmp_path, quick):
    (tmp_path / "file").touch()
    done = run_all("ne", python=quick, **tiny_settings(folder, tmp_path / "file/runs"))
    (number,) = re.findall(r"^run_all.sh: error: line (\d+) of run_all.sh ended", done.stderr, re.M)
    assert done.returncode == 1
    assert "mkdir" in (ROOT / "run_all.sh").read_text().splitlines()[int(number) - 1]


@pytest.mark.slow
def test_only_results_that_are_missing_are_remade(folder, tmp_path, quick):
    out, data = tmp_path / "results", shutil.copytree(folder / "data", tmp_path / "data")
    shutil.copy(data / "en/calibration.jsonl", data / "en/prose.jsonl")
    wanted = out / "calibration-prose-ne/43/ssu-wanda"
    for name in ("short", "long", "prose", "8", "128"):
        for seed in (42, 43, 44):
            there = out / f"calibration-{name}-ne/{seed}/ssu-wanda"
            if there != wanted:
                there.mkdir(parents=True)
                (there / "eval.json").write_text("{}")
    settings = tiny_settings(folder, tmp_path, DATA_DIR=str(data), OUT=str(out))
    settings |= {"WORK": str(tmp_path / "work"), "NUM_SAMPLES": "4"}
    run = command(quick, ["table5"], settings) | {"capture_output": True}
    run["args"][1] = "results/remake.sh"
    done = subprocess.run(**run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done: ") == 1 and f"done: {wanted}" in done.stdout
    evaluation = json.loads((wanted / "eval.json").read_text())
    assert evaluation["format"] == "ssu-eval" and (wanted / "train.jsonl").is_file()
    assert (wanted.parent / "source/eval.json").is_file()
    again = subprocess.run(**run)
    assert again.returncode == 0 and "done: " not in again.stdout
    (wanted / "eval.json").unlink()
    again = subprocess.run(**run)
    assert again.returncode == 0 and again.stdout.count("done: ") == 1
    assert json.loads((wanted / "eval.json").read_text())["results"] == evaluation["results"]


@pytest.mark.slow
def test_every_method_by_name_and_two_ratios(folder, quick):
    settings = dict(
        MODEL=str(folder / "model"),
        DATA_DIR=str(folder / "data"),
        RUNS=str(folder / "every"),
        STEPS="4",
    )
    everything = (
        "fft adalora hft gmt ssu-rand ssu-mag ssu-wanda ssu-sparsegpt ssu-fim ssu-wanda-row "
        "ssu-wanda-element lota-90 lota-50 s2ft-down s2ft-down-output s2ft-down-embeddings"
    )
    done = run_all("ne", python=quick, METHODS=everything, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    run = folder / "every/ne"
    for method in everything.split():
        assert json.loads((run / method / "eval.json").read_text())["format"] == "ssu-eval"
    masks = {
        path.parent.name: safe_open(path, "np").metadata()
        for path in run.glob("*/mask.safetensors")
    }
    assert set(everything.split()) - masks.keys() == {"fft", "adalora", "gmt"}
    assert {
        m: masks[m]["ratio"] for m in ("lota-90", "lota-50", "s2ft-down", "hft", "ssu-fim")
    } == {"lota-90": "0.9", "lota-50": "0.5", "s2ft-down": "0.985", "hft": "0.5", "ssu-fim": "0.5"}
    assert masks["lota-90"]["freeze"] == "lowest"
    assert {m: (masks[m]["method"], masks[m]["axis"]) for m in masks} == {
        "hft": ("hft", "module"),
        "ssu-rand": ("random", "column"),
        "ssu-mag": ("magnitude", "column"),
        "ssu-wanda": ("wanda", "column"),
        "ssu-sparsegpt": ("sparsegpt", "column"),
        "ssu-fim": ("fim", "column"),
        "ssu-wanda-row": ("wanda", "row"),
        "ssu-wanda-element": ("wanda", "element"),
        "lota-90": ("delta", "element"),
        "lota-50": ("delta", "element"),
        "s2ft-down": ("s2ft-down", "column"),
        "s2ft-down-output": ("s2ft-down-output", "column"),
        "s2ft-down-embeddings": ("s2ft-down-embeddings", "column"),
    }
    methods = {
        m: json.loads((run / m / "train.jsonl").read_text().splitlines()[0])["settings"]
        for m in ("fft", "gmt", "adalora")
    }
    assert {m: (s["adalora"], s["gmt_ratio"]) for m, s in methods.items()} == {
        "fft": (False, None),
        "gmt": (False, 0.5),
        "adalora": (True, None),
    }
    log = [
        json.loads(line) for line in (run / "lota-calibration/train.jsonl").read_text().splitlines()
    ]
    assert log[0]["settings"]["steps"] == 100

    ratios = run_all(
        "ne", python=quick, METHODS="gmt lota ssu-wanda", RATIOS="0.25 0.5", **settings
    )
    assert ratios.returncode == 0, ratios.stderr[-3000:]
    assert safe_open(run / "ssu-wanda@0.25/mask.safetensors", "np").metadata()["ratio"] == "0.25"
    assert safe_open(run / "lota@0.25/mask.safetensors", "np").metadata()["ratio"] == "0.25"
    gmt = json.loads((run / "gmt@0.25/train.jsonl").read_text().splitlines()[0])["settings"]
    assert gmt["gmt_ratio"] == 0.25 and gmt["batch_size"] == 4 * gmt["micro_batch_size"]
    assert "done before: " + str(run / "ssu-wanda/model") in ratios.stdout
    assert "| GMT 0.25 " in (run / "report.md").read_text()


@pytest.mark.slow
def test_paper_profile_end_to_end(paper_sets, tmp_path, monkeypatch):
    """The paper's data, prompts and decoding, on a tiny OLMo-2 with its chat format."""
    tokenizer = AutoTokenizer.from_pretrained(HUB / "models/someone/tiny")
    tokenizer.chat_template = (
        "<|endoftext|>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<|endoftext|>{% endif %}"
        "{% if not loop.last %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}"
    )
    tokenizer.save_pretrained(HUB / "models/someone/tiny")
    config = json.loads((HUB / "models/someone/tiny/config.json").read_text())
    (HUB / "models/someone/tiny/config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 2300})
    )
    for code in ("eng_Latn", "ibo_Latn"):
        for split in ("dev", "devtest"):
            put_rows(
                paper_sets / "openlanguagedata/flores_plus",
                f"{split}/{code}.parquet",
                [{"id": i, "text": f"{code} {split} {i}"} for i in range(12)],
            )
    for name in ("english", "igbo"):  # enough for a block of 512 tokens to measure along the way
        put_rows(
            paper_sets / "csebuetnlp/xlsum",
            f"{name}/test/0000.parquet",
            [
                {"id": f"{i}", "url": "u", "title": "t", "summary": TEXT[i], "text": " ".join(TEXT)}
                for i in range(5)
            ],
        )
    put_harness_data(paper_sets, tmp_path, monkeypatch)
    put_glotlid(words=4, target="ibo_Latn")
    put_tulu(paper_sets)
    put_judges()
    put_madlad(paper_sets, "ig", [f"{i}\\n{' '.join(TEXT)}" for i in range(300)])
    settings = dict(
        PROFILE="paper",
        MODEL="someone/tiny",
        DATA_DIR=str(tmp_path / "data"),
        RUNS=str(tmp_path / "runs"),
        STEPS="2",
        NUM_SAMPLES="4",
        METHODS="ssu-wanda",
        PRECISION="fp32",
        FLORES="gated",
        HF_TOKEN="let-me-in",
    )
    done = run_all("ig", **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    start = "paper profile (as asked): someone/tiny, 2 steps at rate 5e-5 on MADLAD-400"
    assert done.stdout.startswith(start)
    run = tmp_path / "runs/ig"
    found = json.loads((run / "ssu-wanda/eval.json").read_text())
    assert {(task, side) for task, sides in found["results"].items() for side in sides} == {
        (task, side) for task in ("mt", "sum", "mrc", "mmlu") for side in ("source", "target")
    }
    chat = json.loads((run / "ssu-wanda/chat.json").read_text())
    assert set(chat["results"]) == {"ifeval", "gsm8k", "ae2", "codemix", "mtb"}
    assert found["results"]["mt"]["source"]["n"] == 12
    assert len(found["results"]["sum"]["target"]["runs"]) == 3
    log = [json.loads(line) for line in (run / "ssu-wanda/train.jsonl").read_text().splitlines()]
    trained = log[0]["settings"]
    assert {"source_bpb", "target_bpb"} <= set().union(*log)
    assert (trained["batch_size"], trained["seq_len"]) == (32, 512)
    assert (trained["lr"], trained["steps"]) == (5e-5, 2)
    assert log[-1]["summary"]["frozen_verified"] > 0
    assert "| SSU-Wanda |" in (run / "report.md").read_text()

    before = (run / "ssu-wanda/model/model.safetensors").read_bytes()
    refused = run_all("ig", **settings | {"STEPS": "3"})  # a finished model is not replaced
    assert refused.returncode == 2 and "was made with other settings" in refused.stderr
    assert (run / "ssu-wanda/model/model.safetensors").read_bytes() == before
    other = run_all("ig", **settings | {"FLORES": "ungated"})
    assert other.returncode == 2 and "holds the other FLORES+" in other.stderr
    again = run_all("ig", HF_HUB_OFFLINE="1", **settings)
    assert again.returncode == 0 and again.stdout.count("done before:") == 7, again.stderr[-3000:]
