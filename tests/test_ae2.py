"""tools/ae2.py: alpaca_eval itself, with the stand-in hub and a stand-in for the paid API."""

import csv
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT
from paper_hub import served  # noqa: F401

from tools import ae2

RUNS, QUESTIONS = 2, 12


class Judge(BaseHTTPRequestHandler):
    """Find the answer that says OURS better, by the log-probabilities of m and M, or fail."""

    protocol_version = "HTTP/1.1"
    requests, broken = [], False

    def log_message(self, *_):
        pass

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Judge.requests.append(asked)
        text = asked["messages"][-1]["content"]
        better, worse = "mM" if text.index("OURS") < text.index("THEIRS") else "Mm"
        odds = [{"token": better, "logprob": -0.1}, {"token": worse, "logprob": -2.4}]
        choice = {"index": 0, "finish_reason": "length", "logprobs": {"content": [odds[0]]}}
        choice["logprobs"]["content"][0] = odds[0] | {"top_logprobs": odds}
        choice["message"] = {"role": "assistant", "content": better}
        usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"]}
        body = json.dumps(answer | {"choices": [choice], "usage": usage}).encode()
        self.send_response(401 if Judge.broken else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def judge():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Judge.requests.clear()
    Judge.broken = False
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def write_answers(folder, better=True):
    """Write the chat.json and answers of a run. The reference is better where it says OURS."""
    settings = {"runs": RUNS}
    source = {"stop_rate": 1.0, "n": RUNS * QUESTIONS}
    content = {"format": "ssu-chat", "version": 1, "settings": settings}
    content |= {"results": {"ae2": {"source": source}}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chat.json").write_text(json.dumps(content))
    for run in range(RUNS):
        rows = []
        for i in range(QUESTIONS):
            said = "OURS" if better else "THEIRS"
            row = {"instruction": f"Question {i}", "output": f"{said} {run} " + "word " * i}
            rows.append(row | {"dataset": "koala", "generator": "model"})
        (folder / f"chat.ae2-{run}.json").write_text(json.dumps(rows))
    return folder / "chat.json"


def serve_alpaca_eval(served, said):  # noqa: F811
    folder = served / ae2.DATA
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(QUESTIONS):
        row = {"instruction": f"Question {i}", "output": f"{said} " + "word " * (12 - i)}
        rows.append(row | {"dataset": "koala", "generator": "gpt4_1106_preview"})
    (folder / ae2.REFERENCE).write_text(json.dumps(rows))
    columns = ["model", "index", "preference", "std_delta_len"]
    columns += ["instruction_difficulty", "not_gamed_baseline"]
    with open(folder / "df_gamed.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for model, length in (("gamed_concise", -1.5), ("gamed_verbose", 1.5)):
            for i in range(QUESTIONS):
                row = [model, i, 0.3 if length < 0 else 0.6, length + i / 50, i / 10, False]
                writer.writerow(row)


def run(path, judge, **more):  # noqa: F811
    env = {**os.environ, "OPENAI_API_KEY": "k", "OPENAI_BASE_URL": judge, "OPENAI_API_BASE": judge}
    argv = [sys.executable, str(ROOT / "tools/ae2.py"), str(path)]
    return subprocess.run(argv, capture_output=True, text=True, env=env | more)


@pytest.mark.slow
def test_the_paper_s_judge_is_asked_once_per_answer(served, judge, tmp_path):  # noqa: F811
    path = write_answers(tmp_path / "fft")
    serve_alpaca_eval(served, "THEIRS")
    Judge.broken = True
    done = run(path, judge)
    assert done.returncode == 2 and "the judge did not answer" in done.stderr.splitlines()[-1]
    assert "win_rate" not in path.read_text()
    Judge.broken = False
    Judge.requests.clear()
    done = run(path, judge)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(Judge.requests) == RUNS * QUESTIONS
    for asked in Judge.requests:
        text = asked["messages"][-1]["content"]
        assert "OURS" in text and "THEIRS" in text and "Question " in text
        settings = [asked[name] for name in ("model", "max_tokens", "temperature")]
        assert settings == ["gpt-4.1-nano-2025-04-14", 1, 1]
        assert (asked["logprobs"], asked["top_logprobs"]) == (True, 5)
    found = json.loads(path.read_text())["results"]["ae2"]["source"]
    assert found["n"] == RUNS * QUESTIONS and found["judge"] == {"name": ae2.JUDGE}
    assert found["win_rate"] == pytest.approx(sum(found["runs"]) / RUNS) and len(found["runs"]) == 2
    assert 75 < found["win_rate"] < 100

    # Nothing is paid for twice, and the opposite verdicts give the opposite rate.
    Judge.requests.clear()
    assert run(path, judge).returncode == 0 and not Judge.requests
    again = json.loads(path.read_text())["results"]["ae2"]["source"]
    assert again["runs"] == pytest.approx(found["runs"])
    worse = write_answers(tmp_path / "worse", better=False)
    serve_alpaca_eval(served, "OURS")
    (served.parent / "home").rename(served.parent / "old")  # the hub's cache
    done = run(worse, judge)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(worse.read_text())["results"]["ae2"]["source"]["win_rate"] < 25


def test_what_is_missing_is_refused_before_anything_is_paid_for(tmp_path, refused, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    path = write_answers(tmp_path)
    assert "set OPENAI_API_KEY" in refused(ae2.main, path)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setitem(sys.modules, "alpaca_eval", None)
    assert "pip install alpaca-eval==0.6.6" in refused(ae2.main, path)
    (tmp_path / "chat.ae2-1.json").unlink()
    assert "chat.ae2-1.json cannot be read" in refused(ae2.main, path)
    path.write_text('{"format": "ssu-chat", "version": 1, "settings": {"runs": 1}, "results": {}}')
    assert "it has no answers of ae2" in refused(ae2.main, path)
