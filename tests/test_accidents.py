"""Kills at random moments, signals, two runs at once and full disks: nothing is lost or changed.

A result after an accident is compared with that of a run that nothing happened to, bit by bit. A
limit on the size of a file stands for a full disk: a write fails half-way.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import forked, limit_file_size, write_jsonl
from test_evaluate import data  # noqa: F401
from test_run_all import command, folder, processes, quick, run_all, tiny_settings  # noqa: F401

import evaluate
import make_mask
import score
import train
from variants import files

pytestmark = pytest.mark.slow


def score_argv(model, chats, out):
    argv = ["--model", model, "--data", chats, "--out", out / "scores"]
    return [*argv, "--num-samples", 8, "--seq-len", 64]


def mask_argv(scores, out):
    return ["--scores", scores, "--out", out / "mask"]


def train_argv(model, text, mask, out):
    argv = ["--model", model, "--data", text, "--mask", mask, "--out", out, "--steps", 20]
    argv += ["--batch-size", 4, "--micro-batch-size", 2, "--seq-len", 32, "--lr", 1e-2]
    argv += ["--precision", "fp32", "--device", "cpu", "--save-every", 2, "--log-every", 1]
    if files.newest_checkpoint(out):
        argv.append("--resume")
    return argv


def evaluate_argv(model, data, out):  # noqa: F811
    argv = ["--model", model, "--lang", "ne", "--data-dir", data, "--out", out / "eval.json"]
    return [*argv, "--runs", 2, "--device", "cpu", "--max-new-tokens", 24, "--batch-tokens", 400]


@pytest.fixture(scope="module")
def whole(olmo2, chats, text, data, tmp_path_factory):  # noqa: F811
    """The folder of a run that nothing happens to: scores, mask, model and eval.json."""
    out = tmp_path_factory.mktemp("whole")
    for main, argv in (
        (score.main, score_argv(olmo2, chats, out)),
        (make_mask.main, mask_argv(out / "scores", out)),
        (train.main, train_argv(olmo2, text, out / "mask", out)),
        (evaluate.main, evaluate_argv(olmo2, data, out)),
    ):
        assert code_of(forked(main, argv)) == 0
    return out


@pytest.fixture
def stages(olmo2, chats, text, data, whole):  # noqa: F811
    """{name: (main, arguments for a folder, the files that it makes)}."""
    return {
        "score": (score.main, lambda out: score_argv(olmo2, chats, out), ["scores"]),
        "make_mask": (make_mask.main, lambda out: mask_argv(whole / "scores", out), ["mask"]),
        "train": (
            train.main,
            lambda out: train_argv(olmo2, text, whole / "mask", out),
            ["model/model.safetensors"],
        ),
        "evaluate": (
            evaluate.main,
            lambda out: evaluate_argv(olmo2, data, out),
            ["eval.json", "eval.items.jsonl"],
        ),
    }


def code_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check_same(names, out, whole):
    for name in names:
        assert content_of(out / name) == content_of(whole / name), name


def content_of(path):
    """Return the bytes of a file, of eval.json all but the commit, which may change meanwhile."""
    if path.name == "eval.json":
        return json.loads(path.read_text()) | {"git_commit": None}
    return path.read_bytes()


def log_of(out):
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines[2:-1]]


@pytest.mark.parametrize("name,kills", [("train", 20), ("evaluate", 18), ("score", 4)])
def test_kills_at_random_moments(name, kills, stages, whole, tmp_path):
    main, argv, made = stages[name]
    rng, out, done, ended = random.Random(1), tmp_path / "out", 0, 0
    began = time.monotonic()
    assert code_of(forked(main, argv(tmp_path / "timed"))) == 0
    longest = time.monotonic() - began
    while done < kills:
        pid = forked(main, argv(out))
        time.sleep(rng.uniform(0, longest))
        if os.waitpid(pid, os.WNOHANG) == (0, 0):
            os.kill(pid, signal.SIGKILL)
            done += code_of(pid) == -signal.SIGKILL  # it may just have ended
        if all((out / name).exists() for name in made):  # it came to its end
            check_same(made, out, whole)
            shutil.rmtree(out)
            ended += 1
    if not (out / made[0]).exists():
        assert code_of(forked(main, argv(out))) == 0
    check_same(made, out, whole)
    if name == "train":
        assert log_of(out) == log_of(whole)
    print(f"{name}: {done} kills, {ended} ends in between")


def weights(run):
    return [(run / f"ne/{name}").read_bytes() for name in ("fft/model/model.safetensors",)]


def results(run):
    return [
        json.loads((run / f"ne/{name}/eval.json").read_text())["results"]
        for name in ("source", "fft")
    ]


def test_the_driver_is_killed_and_stopped(folder, quick, tmp_path):  # noqa: F811
    """Ten times with all that it runs, three times each by Ctrl-C and by TERM."""
    rng, pipe = random.Random(2), dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    settings = tiny_settings(folder, tmp_path / "whole", STEPS="40")
    began = time.monotonic()
    assert run_all("ne", python=quick, **settings).returncode == 0
    longest = time.monotonic() - began
    settings = tiny_settings(folder, tmp_path / "broken", STEPS="40")
    kinds = [signal.SIGKILL] * 10 + [signal.SIGINT] * 3 + [signal.SIGTERM] * 3
    rng.shuffle(kinds)
    while kinds:
        driver = subprocess.Popen(**command(quick, ["ne"], settings), **pipe)
        time.sleep(rng.uniform(0.2, longest))
        below = processes(driver)
        if driver.poll() is None:
            kind = kinds.pop()
            driver.send_signal(kind)
            for pid in below if kind == signal.SIGKILL else []:
                kill(pid)
            _, errors = driver.communicate()
            expected = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[kind]
            if driver.returncode:  # otherwise it was ending by itself
                assert driver.returncode == expected, errors
                assert "Traceback" not in errors
            wait_for_end(below)
        else:
            driver.communicate()
            assert driver.returncode == 0
            assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
            shutil.rmtree(tmp_path / "broken")
    assert run_all("ne", python=quick, **settings).returncode == 0
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert results(tmp_path / "broken") == results(tmp_path / "whole")


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def wait_for_end(pids):
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a stage outlived its driver"
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_two_at_once(name, stages, whole, tmp_path):
    """The second is refused with a line, and the first ends as if it were alone."""
    main, argv, made = stages[name]
    for number in range(3):
        out = tmp_path / f"{number}"
        arguments, codes, lines = argv(out), [], []
        pids = []
        for one in "ab":
            errors = tmp_path / f"{number}{one}"
            pids.append(forked(main, arguments, limit_file_size(10**9, errors)))
        codes = [code_of(pid) for pid in pids]
        for one in "ab":
            text = (tmp_path / f"{number}{one}").read_text()
            lines += [line for line in text.splitlines() if "error: " in line]
        assert sorted(codes) == [0, 2] and len(lines) == 1
        assert "another" in lines[0] or "finished model" in lines[0]
        check_same(made, out, whole)


@pytest.mark.parametrize("name", ["score", "make_mask", "train", "evaluate"])
def test_five_full_disks(name, stages, whole, tmp_path):
    """Each time one line, exit code 2 and what there was; then the same bits."""
    main, argv, made = stages[name]
    out = tmp_path / "out"
    largest = max(path.stat().st_size for path in whole.rglob(made[0]))
    for share in (0.05, 0.3, 0.6, 0.9, 0.99):
        errors = tmp_path / f"{share}.err"
        limit = max(2000, int(share * largest))
        assert code_of(forked(main, argv(out), limit_file_size(limit, errors))) == 2
        text = errors.read_text()
        assert text.count(".py: error: ") == 1 and "Traceback" not in text, text
        assert not (out / made[0]).exists()
    assert code_of(forked(main, argv(out))) == 0
    check_same(made, out, whole)
    assert not list(out.rglob("*.tmp"))


def test_training_text_that_is_new_meets_a_full_disk(olmo2, whole, tmp_path):
    """The tokens, too, are written completely or not at all."""
    rows = [
        {"text": f"sentence {i * 7919} of a text that nobody has tokenized"} for i in range(999)
    ]
    text = write_jsonl(tmp_path / "new.jsonl", rows)
    out, errors = tmp_path / "out", tmp_path / "err"
    argv = train_argv(olmo2, text, whole / "mask", out)
    for limit in (2_000, 20_000, 100_000):
        assert code_of(forked(train.main, argv, limit_file_size(limit, errors))) == 2
        content = errors.read_text()
        assert content.count(".py: error: ") == 1 and "Traceback" not in content, content
    assert code_of(forked(train.main, argv)) == 0
