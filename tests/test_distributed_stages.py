"""score.py and evaluate.py with several ranks on gloo: the files of one process."""

import json
import os
import signal
import subprocess
import time

import pytest
import quick_python
from conftest import ROOT
from test_distributed import finished, start_ranks, torchrun
from test_evaluate import data  # noqa: F401
from test_score import REFUSED, save

import evaluate
import score

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("python")
    server = quick_python.start(folder)
    yield str(folder / "python")
    quick_python.stop(server)


def run_ranks(python, count, script, argv, code=0):
    """Return (stdout, stderr) of each rank."""
    ranks = start_ranks(python, count, *argv, script=script)
    texts = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [code] * count, texts
    return texts


def lines_of(err):
    return [line for line in err.splitlines() if "error" in line]


def refusal(python, script, argv):
    """Return the line of rank 0. Another rank would wait for torchrun, and then say its own."""
    (_, err), *others = run_ranks(python, 2, script, argv, code=2)
    (line,) = lines_of(err)
    message = line.partition("error: ")[2]
    for out, err in others:
        assert out == "" and err in ("", f"{script}: error: rank 1: {message}\n")
    return line


# ---- score.py ------------------------------------------------------------------------------------


def scoring(model, chats, out, *more):
    argv = ["--model", model, "--out", out, "--num-samples", 9, "--seq-len", 32, "--batch-size", 2]
    text = [] if "magnitude" in more else ["--data", chats]
    return [*map(str, (*argv, *text, *more, "--device", "cpu"))]


@pytest.mark.parametrize(
    "ranks,kind,more",
    [
        (4, "olmo2", ["--batch-size", "4"]),  # three batches: one rank has none
        pytest.param(2, "qwen2", ["--method", "fim"], marks=slow),
        pytest.param(2, "olmo2", [], marks=slow),
        pytest.param(3, "qwen2", ["--axis", "element"], marks=slow),
        pytest.param(2, "llama", ["--dtype", "bfloat16"], marks=slow),
        pytest.param(2, "llama", ["--method", "sparsegpt"], marks=slow),
        pytest.param(2, "llama", ["--method", "fim", "--axis", "row"], marks=slow),
        pytest.param(2, "olmo2", ["--method", "magnitude"], marks=slow),
    ],
)
def test_scores_are_the_file_of_one_process(ranks, kind, more, chats, tmp_path, python, request):
    model = request.getfixturevalue(kind)
    texts = run_ranks(python, ranks, "score.py", scoring(model, chats, tmp_path / "many", *more))
    score.main(scoring(model, chats, tmp_path / "one", *more))
    assert (tmp_path / "many").read_bytes() == (tmp_path / "one").read_bytes()
    assert "scores of" in texts[0][0] and not any(out + err for out, err in texts[1:])


OTHER_TEXT = """
import os, sys
sys.path.insert(0, sys.argv[1])
import score

score.main(sys.argv[3:] + (["--data", sys.argv[2]] if os.environ["RANK"] == "1" else []))
"""


def test_a_rank_with_another_text_says_so(olmo2, chats, tmp_path, python):
    """Not only another name: the tokens are compared."""
    for name, cut in (("a", 0), ("b", 9)):
        (tmp_path / name).mkdir()
        lines = chats.read_text(encoding="utf-8").splitlines(True)
        (tmp_path / name / "chats.jsonl").write_text("".join(lines[cut:]))
    script = tmp_path / "score.py"
    script.write_text(OTHER_TEXT)
    argv = [*scoring(olmo2, tmp_path / "a/chats.jsonl", tmp_path / "s"), "--timeout", "0.1"]
    ranks = start_ranks(python, 2, ROOT, tmp_path / "b/chats.jsonl", *argv, script=script)
    texts = [process.communicate(timeout=60) for process in ranks]
    assert "score.py: error: rank 1: data is " in texts[1][1] and not (tmp_path / "s").exists()


SHARED = """
import sys
sys.path.insert(0, sys.argv[1])
import score
from variants import distributed

distributed.FULL = 0  # so that every model is too large
score.main(sys.argv[2:])
"""


@slow
@pytest.mark.parametrize(
    "ranks,kind,more",
    [
        (2, "qwen2", []),
        (3, "llama", ["--axis", "element"]),
        (4, "olmo2", ["--dtype", "bfloat16", "--axis", "row"]),
        (2, "olmo2", ["--method", "sparsegpt"]),
    ],
)
def test_ranks_share_a_model_that_is_too_large(ranks, kind, more, chats, tmp_path, python, request):
    model = request.getfixturevalue(kind)
    script = tmp_path / "score.py"
    script.write_text(SHARED)
    argv = [ROOT, *scoring(model, chats, tmp_path / "many", *more)]
    run_ranks(python, ranks, script, argv)
    score.main(scoring(model, chats, tmp_path / "one", *more))
    assert (tmp_path / "many").read_bytes() == (tmp_path / "one").read_bytes()
    if "row" in more:
        argv = [ROOT, *scoring(model, chats, tmp_path / "fim", "--method", "fim")]
        (_, err), *_ = run_ranks(python, ranks, script, argv, code=2)
        assert "--method fim needs GPUs that hold all of" in err and len(lines_of(err)) == 1


@slow
def test_what_score_refuses_is_one_line(olmo2, chats, tmp_path, python):
    def refused(*argv):
        return refusal(python, "score.py", argv)

    argv = scoring(olmo2, chats, tmp_path / "s")
    assert "runs in one process" in refused(*argv, "--method", "fim", "--axis", "element")
    assert "--data nowhere.jsonl" in refused(*argv, "--data", "nowhere.jsonl")
    assert "512 positions" in refused(*argv, "--seq-len", "1024")
    model = save(REFUSED["Conv1D"](), tmp_path / "gpt2")
    assert "Conv1D" in refused(*argv, "--model", model)
    assert not (tmp_path / "s").exists()


# ---- evaluate.py ---------------------------------------------------------------------------------


def evaluating(model, data, out, *more):  # noqa: F811
    argv = ["--model", model, "--lang", "ne", "--data-dir", data, "--out", out, "--runs", 2]
    argv += ["--device", "cpu", "--max-new-tokens", 8, "--batch-tokens", 800]
    return [*map(str, (*argv, *more))]


@pytest.fixture(scope="module")
def whole(llama, data, tmp_path_factory):  # noqa: F811
    """What one process writes: (eval.json, eval.items.jsonl)."""
    out = tmp_path_factory.mktemp("whole") / "eval.json"
    evaluate.main(evaluating(llama, data, out))
    return files_of(out)


def files_of(out):
    """Return eval.json without the commit, which may change meanwhile, and the items as text."""
    found = json.loads(out.read_text())
    del found["git_commit"]
    return found, out.with_suffix(".items.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("ranks", [3, pytest.param(2, marks=slow)])
def test_an_evaluation_is_that_of_one_process(ranks, llama, data, whole, tmp_path, python):  # noqa: F811
    out = tmp_path / "eval.json"
    texts = run_ranks(python, ranks, "evaluate.py", evaluating(llama, data, out))
    assert files_of(out) == whole
    assert "wrote" in texts[0][0] and not any(out + err for out, err in texts[1:])


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=slow)])
def test_an_evaluation_goes_on_with_any_number_of_ranks(
    ranks,
    llama,
    data,  # noqa: F811
    whole,
    tmp_path,
    python,
):
    """What is done is not done again: a mark in it is still there."""
    header, *items = whole[1].splitlines(keepends=True)
    done = [line for line in items if '"task": "mt"' not in line]
    assert 0 < len(done) < len(items)
    marked = [line.replace('"task"', '"mark": 1, "task"', 1) for line in done]
    out, path = tmp_path / "eval.json", tmp_path / "eval.items.jsonl"
    path.write_text(header + "".join(marked), encoding="utf-8")
    run_ranks(python, ranks, "evaluate.py", evaluating(llama, data, out))
    found, items = files_of(out)
    assert items.count('"mark": 1, ') == len(done)
    assert (found, items.replace('"mark": 1, ', "")) == whole


@slow
def test_what_evaluate_refuses_is_one_line(llama, data, tmp_path, python):  # noqa: F811
    def refused(*more):
        return refusal(python, "evaluate.py", evaluating(llama, data, tmp_path / "e.json", *more))

    assert "--tasks bpb,sums" in refused("--tasks", "bpb,sums")
    assert "Add it to data/languages.json" in refused("--lang", "de")
    assert "nowhere/en/heldout.jsonl" in refused("--data-dir", "nowhere")
    (tmp_path / "e.json").write_text("{}")
    assert "no earlier run wrote it" in refused()


def test_a_rank_alone_says_what_it_met(llama, data, tmp_path, python):  # noqa: F811
    """As on a machine that lacks the file."""
    argv = [*evaluating(llama, data, tmp_path / "e.json"), "--data-dir", "nowhere"]
    _, other = start_ranks(python, 2, *argv, script="evaluate.py")
    assert "error: rank 1: a file cannot be read" in other.communicate(timeout=60)[1]


# ---- torchrun itself -----------------------------------------------------------------------------


@slow
@pytest.mark.parametrize(
    "how,first,second", [(signal.SIGKILL, 2, 3), (signal.SIGKILL, 3, 2), (signal.SIGSTOP, 2, 1)]
)
def test_a_rank_that_dies_or_hangs_ends_the_evaluation_and_the_next_goes_on(
    how,
    first,
    second,
    llama,
    data,
    tmp_path,  # noqa: F811
):
    more = ["--timeout", "0.2", "--max-new-tokens", "100", "--runs", "3"]
    out, items = tmp_path / "eval.json", tmp_path / "eval.items.jsonl"
    argv = evaluating(llama, data, out, *more)
    process = torchrun(first, *argv, script="evaluate.py")
    while not items.exists() or len(items.read_bytes().splitlines()) < 8:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.01)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[-1]), how)
    finished(process, code=1)
    assert not out.exists()
    finished(torchrun(second, *argv, script="evaluate.py"))
    evaluate.main(evaluating(llama, data, tmp_path / "whole/eval.json", *more))
    assert files_of(out) == files_of(tmp_path / "whole/eval.json")


@slow
def test_torchrun(llama, chats, data, tmp_path):  # noqa: F811
    finished(torchrun(2, *scoring(llama, chats, tmp_path / "many"), script="score.py"))
    score.main(scoring(llama, chats, tmp_path / "one"))
    assert (tmp_path / "many").read_bytes() == (tmp_path / "one").read_bytes()
    argv = scoring(llama, chats, tmp_path / "s", "--data", "nowhere.jsonl")
    _, err = finished(torchrun(2, *argv, script="score.py"), code=1)
    assert err.count("score.py: error:") == 1


@slow
def test_one_job_writes_an_evaluation(llama, data, tmp_path):  # noqa: F811
    """Rank 0 alone sees that another process writes. The others wait for it and are ended."""
    with evaluate.locked(tmp_path / "eval.json"):
        argv = evaluating(llama, data, tmp_path / "eval.json")
        _, err = finished(torchrun(2, *argv, script="evaluate.py"), code=1)
    assert err.count("evaluate.py: error: another process writes") == 1
    assert "DistBackendError" not in err and "RuntimeError" not in err
