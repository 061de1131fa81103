"""tools/chat_eval.py: its answers, its judges of language, and lm-eval as it is asked."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT, TEXT, tiny_model, write_jsonl
from hub import HUB
from paper_hub import put_glotlid, put_harness_data, served  # noqa: F401
from safetensors.torch import load_file, save_file

import evaluate
from data.identity import sha256_of
from tools import chat_eval


def command(model, data, out, *more):
    """Return the arguments of a short run."""
    argv = ["--model", model, "--lang", "ne", "--data-dir", data, "--out", out, *more]
    return [str(word) for word in argv]


def test_code_mixed_answers_are_counted_and_written_for_the_judge(
    served, llama, tmp_path, refused, monkeypatch
):
    monkeypatch.setitem(chat_eval.NEW_TOKENS, "ae2", 24)
    lid = put_glotlid(words=4)
    english = chat_eval.english_confidence("glotlid", "ne")
    nepali = chat_eval.english_confidence("script", "ne")
    assert english(TEXT[0]) > 0.9 > 0.1 > english(TEXT[2]) and english("— 3 …") is None
    assert nepali("नेपाल abc") == 3 / 6  # its vowel signs are marks, not letters
    assert nepali("12") is None
    write_jsonl(tmp_path / "data/en/ae2.jsonl", [{"instruction": text} for text in TEXT])
    more = ["--tasks", "codemix", "--runs", 2, "--num-questions", 3]
    chat_eval.main(command(llama, tmp_path / "data", tmp_path / "fft/chat.json", *more))
    answers = []
    for run in range(2):
        answers.append(json.loads((tmp_path / f"fft/chat.ae2-{run}.json").read_text()))
    assert answers[0] != answers[1]
    outputs, expected = [], []
    for found in answers:
        assert [row["instruction"] for row in found] == TEXT[:3]
        assert found[0]["generator"] == str(llama)
        for row in found:
            text = " ".join(row["output"].split())
            if any(c.isalpha() for c in text):
                outputs.append(text)
                odds = dict(zip(*lid.predict(text, k=2), strict=True))
                expected.append(odds["__label__eng_Latn"] < 0.9)
    result = json.loads((tmp_path / "fft/chat.json").read_text())["results"]["codemix"]["source"]
    assert result == {"share": sum(expected) / len(expected), "n": len(outputs)}

    def confidence(argv):
        chat_eval.english_confidence(*argv)

    assert "GlotLID does not know kir_Cyrl" in refused(confidence, "glotlid", "ky")
    monkeypatch.setitem(chat_eval.evaluate.LANGUAGES, "sw", {"name": "Swahili"})
    assert "sw has no `flores`" in refused(confidence, "script", "sw")
    monkeypatch.setitem(chat_eval.evaluate.LANGUAGES["sw"], "flores", "swh_Latn")
    assert "sw and English share a script" in refused(confidence, "script", "sw")

    shutil.rmtree(HUB / "models")
    shutil.rmtree(HUB / "home/hub")
    for other, message in (
        ([], "the hub did not give cis-lmu/glotlid"),
        (["--lang", "ha", "--language-id", "script"], "ha and English share a script"),
    ):
        argv = command(llama, tmp_path / "data", tmp_path / "other.json", *more, *other)
        assert message in refused(chat_eval.main, *argv)


def test_out_among_the_files_of_the_model_is_refused(llama, tmp_path, refused):
    """Without a trace: a lock there would change which model it is."""
    before = sorted(llama.iterdir())
    argv = command(llama, tmp_path, llama / "chat.json", "--tasks", "chat")
    assert "among the files of the model" in refused(chat_eval.main, *argv)
    assert sorted(llama.iterdir()) == before


def test_chat_scores():
    chat = {"messages": [{"content": "the cat sat on the mat"}, {"content": "and the dog ran"}]}
    target = [{"text": "बिरालो चटाईमा बस्यो"}, {"text": "kuka da kare"}]
    odds = chat_eval.english_odds([chat], target)
    found = chat_eval.chat_scores("The cat sat. बिरालो the cat sat बिरालो", odds)
    assert found["english_letters"] == 18 and found["letters"] == 18 + 2 * len("बिरालो")
    assert chat_eval.chat_scores("a b c d a b c d e", odds)["repetition"] == pytest.approx(1 / 6)
    nothing = {"repetition": 0.0, "letters": 0, "english_letters": 0}
    assert chat_eval.chat_scores("7 !", odds) == nothing


def test_chat_answers_are_greedy_saved_and_resumed(llama, chats, text, tmp_path, monkeypatch):
    shutil.copytree(chats.parent, tmp_path / "en")
    (tmp_path / "en/chats.jsonl").rename(tmp_path / "en/heldout.jsonl")
    (tmp_path / "ne").mkdir()
    shutil.copy(text, tmp_path / "ne/heldout.jsonl")
    out = tmp_path / "chat.json"
    argv = command(llama, tmp_path, out, "--tasks", "chat", "--device", "cpu")
    monkeypatch.setitem(chat_eval.NEW_TOKENS, "chat", 12)
    chat_eval.main([*argv, "--batch-tokens", "60"])
    files = [tmp_path / "en/heldout.jsonl", tmp_path / "ne/heldout.jsonl"]
    assert json.loads(out.read_text())["settings"]["data_sha256"] == sha256_of(files)
    found = json.loads(out.read_text())["results"]["chat"]
    assert [answer["prompt"] for answer in found["answers"]] == list(chat_eval.CHAT_PROMPTS)
    assert found["n"] == 6
    assert found["stop_rate"] == sum(answer["stopped"] for answer in found["answers"]) / 6

    # One item is left to do, in a batch of its own.
    items = tmp_path / "chat.items.jsonl"
    items.write_text("\n".join(items.read_text().split("\n")[:-2]) + "\n")
    made, real = [], evaluate.generate

    def generate(model, prompts, new_tokens, *more):
        made.append((len(prompts), new_tokens))
        assert new_tokens != 12 or more[-1] == evaluate.GREEDY
        return real(model, prompts, new_tokens, *more)

    monkeypatch.setattr(evaluate, "generate", generate)
    chat_eval.main([*argv, "--batch-tokens", "60"])
    assert [count for count, tokens in made if tokens == 12] == [1]
    assert json.loads(out.read_text())["results"]["chat"] == found

    # After a change of the code, all are made again.
    made.clear()
    header, lines = items.read_text().split("\n", 1)
    header = json.loads(header) | {"code_sha256": "0"}
    items.write_text(json.dumps(header) + "\n" + lines)
    chat_eval.main([*argv, "--batch-tokens", "60"])
    assert sum(count for count, tokens in made if tokens == 12) == 6


def test_without_lm_eval_the_message_names_it(llama, tmp_path, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    argv = command(llama, tmp_path, tmp_path / "chat.json", "--tasks", "gsm8k")
    assert "pip install 'lm-eval[hf,ifeval]==" in refused(chat_eval.main, *argv)


def test_lm_eval_is_asked_as_in_the_paper():
    """Section 4.5's shots, the strict metrics, Table 9's decoding."""
    assert chat_eval.HARNESS == {
        "ifeval": ("leaderboard_ifeval", 0, "prompt_level_strict_acc", "none"),
        "gsm8k": ("gsm8k", 5, "exact_match", "strict-match"),
    }
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.8}
    assert chat_eval.CHAT_SAMPLING == sampling | {"repetition_penalty": 1.1}


@pytest.mark.slow
def test_gsm8k_and_ifeval_are_those_of_lm_eval(served, tmp_path, monkeypatch):
    put_harness_data(served, tmp_path, monkeypatch)
    model = tiny_model(tmp_path / "model", "olmo2", max_position_embeddings=2048)  # IFEval: 1,280
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][2] *= 3  # answers end, each in another place
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    more = ["--tasks", "ifeval,gsm8k", "--runs", 2, "--num-questions", 3]
    argv = [sys.executable, str(ROOT / "tools/chat_eval.py")]
    argv += command(model, tmp_path, tmp_path / "chat.json", *more)
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "chat.json").read_text())["results"]
    lines = (tmp_path / "chat.items.jsonl").read_text().splitlines()[1:]
    items = {}
    for item in map(json.loads, lines):
        assert len(item["samples"]) == 3
        items[item["task"], item["run"]] = item["samples"]
    assert len(items) == 4
    for run in (0, 1):
        right = []
        for sample in items["ifeval", run]:
            words = re.findall(r"\w+", sample["prediction"].lower())
            right.append(float("e" not in words))
            assert sample["prompt"].count("<|im_start|>") == 2 and sample["correct"] == right[-1]
        assert found["ifeval"]["source"]["runs"][run] == sum(right) / 3
    assert items["ifeval", 0] != items["ifeval", 1]
    prompt = items["gsm8k", 0][0]["prompt"]
    assert prompt.count("<|im_start|>assistant\nIt is ") == 5 and "What is 0 + 2?" in prompt

    # Greedy answers do not depend on what else is in a batch: one that has ended stays as it is.
    answers = []
    for size in (2048, 8192):  # of 1 and of 4
        out = tmp_path / f"{size}.json"
        more = ["--tasks", "ifeval", "--greedy", "--batch-tokens", size, "--dtype", "float32"]
        chat_eval.main(command(model, tmp_path, out, *more))
        lines = out.with_suffix(".items.jsonl").read_text().splitlines()
        answers.append([sample["prediction"] for sample in json.loads(lines[1])["samples"]])
    assert answers[0] == answers[1] and len(set(map(len, answers[0]))) > 2

    # What was fetched is there, and what is done is not done again.
    shutil.rmtree(served / "openai")
    before = (tmp_path / "chat.items.jsonl").read_text()
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    again = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (tmp_path / "chat.items.jsonl").read_text() == before


@pytest.mark.slow
def test_smollm2_scores_as_lm_eval_does(tmp_path):
    """Letters and options of the saved prompts, by lm-eval's own scoring."""
    prepare = [sys.executable, ROOT / "data/prepare_embedded.py", "--out", tmp_path, "--lang", "ne"]
    subprocess.run(prepare, check=True)
    for lang in ("en", "ne"):  # each subject's first questions become examples
        shots, seen = [], Counter()
        lines = (tmp_path / lang / "mmlu.test.jsonl").read_text().splitlines()
        for row in map(json.loads, lines):
            seen[row["subject"]] += 1
            if seen[row["subject"]] <= 5:
                shots.append(row)
        write_jsonl(tmp_path / lang / "mmlu.dev.jsonl", shots)
    more = ["--tasks", "mcq,mmlu", "--num-samples", 16, "--num-questions", 16]
    argv = command(tmp_path / "model", tmp_path, tmp_path / "eval.json", *more)
    evaluate.main([*argv, "--dtype", "float32", "--device", "cpu"])
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    lines = (tmp_path / "eval.items.jsonl").read_text().splitlines()[1:]

    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(tmp_path / "model"), dtype="float32", device="cpu", batch_size=1)
    right = Counter()
    for record in map(json.loads, lines):
        if (record["task"], record["side"]) == ("mcq", "target"):
            continue  # raw text: lm-eval would put no token before it
        options = list("ABCD") if record["task"] == "mmlu" else record["options"]
        # lm-eval scores the line break before an answer with the answer.
        prompt = record["prompt"].rstrip("\n")
        line = record["prompt"][len(prompt) :]
        texts = [line, *(line + option for option in options)]
        asked = [Instance("loglikelihood", {}, (prompt, text), 0) for text in texts]
        before, *found = (nats for nats, _ in lm.loglikelihood(asked, disable_tqdm=True))
        found = [nats - before for nats in found]
        assert found == pytest.approx(record["scores"]["loglik"], abs=2e-3)
        if record["task"] == "mcq":
            found = [x / len(option) for x, option in zip(found, options, strict=True)]
        best = "ABCD"[found.index(max(found))]
        right[record["task"], record["side"]] += best == record["reference"]
    for (task, side), count in right.items():
        assert results[task][side]["accuracy"] == count / 16
