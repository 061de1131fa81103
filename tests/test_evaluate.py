"""evaluate.py: every number against an independent one, an interrupted run against a whole one, and bad input."""
import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SIZES, TEXT, tiny_model, write_jsonl
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import evaluate

WORDS = "river mill wheel capital Paris hills children rain house market".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An evaluation folder in miniature: every file, every optional column, text of several bytes a character."""
    folder = tmp_path_factory.mktemp("data")
    question = {"role": "user", "content": "What is it?"}
    write_jsonl(folder / "en/heldout.jsonl", [
        {"messages": [question, {"role": "assistant", "content": text}]} for text in (*TEXT, "Çay — 5 €.")])
    write_jsonl(folder / "en/prose.jsonl", [{"text": " ".join(TEXT)}, {"text": TEXT[0]}])
    write_jsonl(folder / "ne/heldout.jsonl", [{"text": TEXT[2], "domain": "udhr"},
                                               {"text": TEXT[3] * 9, "domain": "cldr"}])
    for lang, question in (("en", "Where do the {} run?"), ("ne", "नेपाल {} —")):
        write_jsonl(folder / f"{lang}/mmlu.test.jsonl", [
            {"sample_id": f"{lang}/{i}", "subject": "ab"[i % 2], "question": question.format(WORDS[i]),
             "answer": "ABCD"[i % 4], "shared_stem": i % 3 == 0}
            | {option: WORDS[(i + j) % 10] * (j + 1) for j, option in enumerate(evaluate.OPTIONS)} for i in range(8)])
    pairs = [{"id": i, "eng_Latn": f"The {word} is {i} years old.", "npi_Deva": f"{TEXT[3][:5 + 3 * i]} {i}",
              "domain": "xy"[i % 2]} for i, word in enumerate(WORDS)]
    write_jsonl(folder / "ne/flores.dev.jsonl", pairs[:4])
    write_jsonl(folder / "ne/flores.devtest.jsonl", pairs[4:])
    return folder


@pytest.fixture(scope="module")
def model(llama):
    found = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    found.generation_config = GenerationConfig()
    return found


def run(model, data, out, *more):
    """eval.json of a tiny evaluation."""
    argv = {"--model": model, "--lang": "ne", "--data-dir": data, "--out": out, "--device": "cpu", "--runs": 2,
            "--max-new-tokens": 8, "--max-length": 128, "--batch-tokens": 800}
    evaluate.main([str(x) for x in (*(x for pair in argv.items() for x in pair), *more)])
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def whole(llama, data, tmp_path_factory):
    """(eval.json, items) of one uninterrupted run of everything."""
    out = tmp_path_factory.mktemp("whole") / "eval.json"
    found = run(llama, data, out)
    return found, [json.loads(line) for line in out.with_name("eval.items.jsonl").read_text().splitlines()[1:]]


def reference_loglik(model, prompt, part):
    """The sum of log p(token | all before) with nothing batched, padded, packed or cut, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + part])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(part))


@pytest.mark.parametrize("kind", ["llama", "olmo2", "qwen2"])
def test_loglik_equals_a_naive_float64_reference(kind, request):
    double = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(kind), dtype=torch.float64).eval()
    single = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(kind), dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(1)

    def ids(n):
        return torch.randint(3, 300, (n,), generator=draw).tolist()
    several = [(ids(n), [ids(k) for k in parts]) for n, parts in ((5, (1, 4, 2, 7)), (17, (3, 3)), (1, (2, 1, 1, 9)))]
    alone = [(ids(n), [ids(k)]) for n, k in ((1, 30), (9, 1), (20, 12))]
    for rows in (several, alone, several + alone):
        for (prompt, parts), found in zip(rows, evaluate.loglik(single, rows), strict=True):
            assert found == pytest.approx([reference_loglik(double, prompt, part) for part in parts], abs=2e-4)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_padded_greedy_generation_equals_one_by_one(model, penalty):
    """Also under a repetition penalty, which must not see the padding."""
    prompts = [[1, 70, 80, 90] + list(range(100, 100 + n)) for n in (9, 1, 30, 14)] + [[1, 70, 80, 90, 33]]
    alone = []
    for prompt in prompts:
        new = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12,
                             eos_token_id=[2, 60], pad_token_id=2, do_sample=False, repetition_penalty=penalty)
        alone.append(new[0, len(prompt):].tolist())
    sampling = {"do_sample": False, "repetition_penalty": penalty}
    assert evaluate.generate(model, prompts, 12, [2, 60], sampling) == alone
    assert evaluate.generate(model, [[5, *p] for p in prompts[:1]] + [[6, 9]], 3, [2], sampling)  # nothing shared
    stop = alone[0][4]
    cut = evaluate.generate(model, prompts, 12, [2, stop], sampling)[0]
    assert cut == alone[0][:alone[0].index(stop) + 1]


def test_chrf_equals_the_sacrebleu_command(whole, tmp_path):
    found, items = whole
    for side in ("source", "target"):
        mt = found["results"]["mt"][side]
        assert mt["n"] == 6 and len(mt["runs"]) == 2
        for number, result in enumerate(mt["runs"]):
            rows = [r for r in items if (r["task"], r["side"], r["run"]) == ("mt", side, number)]
            (tmp_path / "hyp").write_text("".join(r["prediction"] + "\n" for r in rows))
            (tmp_path / "ref").write_text("".join(r["reference"] + "\n" for r in rows))

            def sacrebleu(*more, files=(tmp_path / "ref", "-i", tmp_path / "hyp")):
                command = [sys.executable, "-m", "sacrebleu", *files, "-m", "chrf", "--chrf-word-order", "2", "-w", "6"]
                return subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout
            corpus = sacrebleu("-b")
            assert result["chrf_corpus"] == pytest.approx(float(corpus), abs=1e-6)
            if (side, number) == ("source", 0):
                each = [float(re.search(r"= ([\d.]+)$", line).group(1)) for line in sacrebleu("-sl").splitlines()]
                assert [r["scores"]["chrf"] for r in rows] == pytest.approx(each, abs=1e-6)
                assert result["chrf"] == pytest.approx(sum(each) / len(each), abs=1e-6)
        means = [result["chrf"] for result in mt["runs"]]
        assert mt["chrf"] == pytest.approx(sum(means) / 2)
        assert mt["sd_over_runs"] == pytest.approx(abs(means[0] - means[1]) / math.sqrt(2))
        assert mt["signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:")
        assert mt["domains"]["x"]["n"] == mt["domains"]["y"]["n"] == 3
        assert any(r["prediction"] for r in items if r["task"] == "mt")


def test_mt_prompts_are_table_7_with_few_shots_and_one_bos(whole):
    rows = [r for r in whole[1] if r["task"] == "mt" and r["id"] == 5]
    source, target = (next(r["prompt"] for r in rows if r["side"] == side) for side in ("source", "target"))
    for prompt, ask in ((source, "Translate Nepali to English: "), (target, "अङ्ग्रेजीलाई नेपालीमा अनुवाद गर्नुहोस्: ")):
        assert prompt.count(f"<|im_start|>user\n{ask}") == 4 and prompt.count("<|im_start|>assistant\n") == 4
    end = " =<|im_end|>\n<|im_start|>assistant\n"
    assert source.endswith(" 5" + end) and target.endswith(f": The {WORDS[5]} is 5 years old." + end)
    assert [r["reference"] for r in rows[:1]] == [f"The {WORDS[5]} is 5 years old."]
    english = [f"The {WORDS[i]} is {i} years old." for i in range(4)]  # dev, which the examples are from
    nepali = [f"{TEXT[3][:5 + 3 * i]} {i}" for i in range(4)]
    for prompt, asked, answers in ((source, nepali, english), (target, english, nepali)):
        turns = [turn.partition("\n")[2] for turn in prompt.split("<|im_end|>\n")][:-2]
        assert all(turn.endswith(" =") for turn in turns[0::2])
        numbers = [asked.index(turn.partition(": ")[2][:-2]) for turn in turns[0::2]]
        assert [answers[i] for i in numbers] == turns[1::2] and len(set(numbers)) == 3


def test_belebele_answers_are_those_of_its_numbers(papers, llama, tmp_path):
    """Of the questions and of the examples, all distinct here."""
    path = tmp_path / "ne/belebele.jsonl"
    rows = [json.loads(line) | {"question": f"Q{i}?"} for i, line in enumerate(
        (papers / "ne/belebele.jsonl").read_text().splitlines())]
    for lang in ("en", "ne"):
        write_jsonl(tmp_path / lang / path.name, rows)
    data, *_ = evaluate.read_data(tmp_path, "ne", ["mrc"])
    settings = {"tasks": ["mrc"], "seed": 1, "num_samples": 9, "num_questions": None, "runs": 1, "few_shots": 3,
                "max_length": 128}
    for record, _, _ in evaluate.plan(data, AutoTokenizer.from_pretrained(llama), "ne", settings):
        *shots, asked = re.findall(r"Q(\d)\?.*?assistant\n(\w?)", record["prompt"], re.S)
        assert record["reference"] == "ABCD"[int(asked[0]) % 4] and record["id"] == f"l {asked[0]}"
        assert len(shots) == 3 and all(answer == "ABCD"[int(i) % 4] for i, answer in shots)


def test_decoding_is_table_9(papers, tmp_path, monkeypatch):
    """What transformers is asked for; the model's own generation settings must not count."""
    model, calls, real = tiny_model(tmp_path / "m", max_position_embeddings=2048), [], LlamaForCausalLM.generate
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"do_sample": True, "min_p": 0.7}))
    monkeypatch.setattr(LlamaForCausalLM, "generate", lambda self, ids, **more: calls.append(
        (more, self.generation_config)) or real(self, ids, **more))
    shutil.copytree(papers, tmp_path / "data")
    write_jsonl(tmp_path / "data/en/ae2.jsonl", [{"instruction": "Say a."}])
    for lang in ("en", "ne"):
        write_jsonl(tmp_path / f"data/{lang}/heldout.jsonl", [{"text": text} for text in TEXT])
    argv = ["--model", model, "--lang", "ne", "--data-dir", tmp_path / "data", "--runs", 1, "--num-samples", 1]
    tokenizer = AutoTokenizer.from_pretrained(model)
    for task, top_p, limit in (("mt", 0.9, 128), ("sum", 0.9, 128), ("ae2", 0.8, 512), ("chat", None, 128)):
        calls.clear()
        evaluate.main(list(map(str, [*argv, "--tasks", task, "--out", tmp_path / f"{task}.json"])))
        for asked, config in calls:
            sampling = {key: asked.get(key) for key in ("temperature", "top_k", "top_p", "repetition_penalty")}
            assert sampling == (dict.fromkeys(sampling) if task == "chat" else dict(
                temperature=0.8, top_k=40, top_p=top_p, repetition_penalty=1.1))
            assert asked["do_sample"] == (task != "chat") and asked["max_new_tokens"] == limit
            newline = tokenizer("\n")["input_ids"][0] in asked["eos_token_id"]
            assert newline == (task in ("mt", "sum")) and config.min_p is None
        assert calls


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    """XL-Sum, Belebele and MMLU in miniature, for English and the five languages."""
    folder = tmp_path_factory.mktemp("papers")
    for lang in ("en", *evaluate.LANGUAGES):
        write_jsonl(folder / f"{lang}/xlsum.jsonl",
                    [{"id": f"x{i}", "text": "TEXT", "summary": TEXT[i]} for i in range(3)])
        write_jsonl(folder / f"{lang}/belebele.jsonl", [
            {"link": "l", "question_number": i, "flores_passage": "PASSAGE", "question": "QUESTION",
             "mc_answer1": "ONE", "mc_answer2": "TWO", "mc_answer3": "THREE", "mc_answer4": "FOUR",
             "correct_answer_num": f"{i % 4 + 1}"} for i in range(9)])
        for split, n in (("dev", 5), ("test", 4)):
            write_jsonl(folder / f"{lang}/mmlu.{split}.jsonl", [
                {"sample_id": f"{subject}/{split}/{i}", "subject": subject, "question": "QUESTION",
                 "answer": "ABCD"[i % 4], **dict(zip(evaluate.OPTIONS, ("ONE", "TWO", "THREE", "FOUR"), strict=True))}
                for subject in ("high_school_physics", "law") for i in range(n)])
        pairs = [{"id": i, "eng_Latn": "SENTENCE"} | {code: "SENTENCE" for _, code in evaluate.LANGUAGES.values()}
                 for i in range(4)]
        write_jsonl(folder / f"{lang}/flores.dev.jsonl", pairs)
        write_jsonl(folder / f"{lang}/flores.devtest.jsonl", pairs[:1])
    return folder


PAPER = ["mt", "sum", "mrc", "mmlu"]


@pytest.mark.parametrize("lang", evaluate.LANGUAGES)
def test_prompts_are_those_of_table_7(lang, papers, llama):
    """prompts.json holds the prompts as the paper prints them, with SENTENCE, TEXT, ... filled in."""
    golden = json.loads((ROOT / "tests/prompts.json").read_text())
    data, *_ = evaluate.read_data(papers, lang, PAPER)
    settings = {"tasks": PAPER, "seed": 1, "num_samples": 9, "num_questions": None, "runs": 1, "few_shots": 3,
                "max_length": 128}
    seen = set()
    for record, _, _ in evaluate.plan(data, AutoTokenizer.from_pretrained(llama), lang, settings):
        first, *asked = record["prompt"].split("<|im_start|>user\n")
        task, side = record["task"], record["side"]
        want = golden[lang][f"mt {side}"] if task == "mt" else golden["en" if side == "source" else lang][task]
        if record["domain"] == "law":
            want = want.replace("high school physics", "law")
        assert asked[-1] == want + "<|im_end|>\n<|im_start|>assistant\n"
        assert {turn.split("<|im_end|>")[0] for turn in asked} == {want} and not first
        assert len(asked) - 1 == {"mt": 3, "sum": 0, "mrc": 3, "mmlu": 5}[task]
        seen.add((task, side))
    assert len(seen) == 8


@pytest.mark.parametrize("kind", ["llama", "olmo2", "qwen2"])
def test_packed_questions_equal_one_by_one(kind, request):
    double = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(kind), dtype=torch.float64).eval()
    single = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(kind), dtype=torch.float32).eval()
    draw, letters = torch.Generator().manual_seed(2), [40, 41, 42, 43]
    prefix, *questions = (torch.randint(3, 300, (n,), generator=draw).tolist() for n in (37, 1, 9, 4, 20))
    for some, before in ((questions, prefix), (questions[1:2], prefix), (questions, [])):
        for question, found in zip(some, evaluate.letter_loglik(single, before, some, letters), strict=True):
            want = [reference_loglik(double, before + question, [letter]) for letter in letters]
            assert found == pytest.approx(want, abs=2e-4)


def test_a_sliding_window_is_kept():
    """Longer than the window, a text is read as the model reads it, shorter ones still share a row."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, vocab_size=400, num_key_value_heads=2, sliding_window=16)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    prefix, *questions = (torch.randint(3, 300, (n,)).tolist() for n in (10, 3, 20, 4))
    for some in (questions, questions[:1] + questions[2:]):
        found = evaluate.letter_loglik(model, prefix, some, [40, 41])
        rows = evaluate.loglik(model, [(prefix + question, [[40], [41, 42]]) for question in some])
        for question, letters, (one, two) in zip(some, found, rows, strict=True):
            want = [reference_loglik(model, prefix + question, [letter]) for letter in (40, 41)]
            assert letters == pytest.approx(want, abs=2e-4) and one == pytest.approx(want[0], abs=2e-4)
            assert two == pytest.approx(reference_loglik(model, prefix + question, [41, 42]), abs=2e-4)


def test_paper_tasks_by_hand(papers, llama, model, tmp_path):
    found = run(llama, papers, tmp_path / "eval.json", "--tasks", "sum,mrc,mmlu", "--batch-tokens", "3000",
                "--num-questions", "7")
    items = [json.loads(line) for line in (tmp_path / "eval.items.jsonl").read_text().splitlines()[1:]]
    tokenizer, count = AutoTokenizer.from_pretrained(llama), {}
    for r in items:
        count[r["task"], r["side"]] = count.get((r["task"], r["side"]), 0) + 1
        if r["task"] == "sum":
            continue
        prompt = evaluate.encode(tokenizer, r["prompt"])
        want = [reference_loglik(model, prompt, evaluate.encode(tokenizer, letter)) for letter in "ABCD"]
        assert r["scores"]["loglik"] == pytest.approx(want, abs=2e-4)
        assert r["prediction"] == "ABCD"[want.index(max(want))] and 0 < r["shared"] < len(prompt)
        assert r["scores"]["correct"] == (r["prediction"] == r["reference"])
        answers = [turn[0] for turn in r["prompt"].split("<|im_start|>assistant\n")[1:-1]]
        if r["task"] == "mmlu":
            assert answers == [*"ABCDA"][5 - r["shots"]:] and r["prompt"].count(r["domain"]) == r["shots"] + 1
    assert count == {(task, side): {"sum": 6, "mrc": 7, "mmlu": 7}[task] for task in ("sum", "mrc", "mmlu")
                     for side in ("source", "target")}
    for task in ("mrc", "mmlu"):
        chosen = [r["scores"]["correct"] for r in items if (r["task"], r["side"]) == (task, "target")]
        assert found["results"][task]["target"]["accuracy"] == pytest.approx(sum(chosen) / len(chosen))
    assert found["results"]["mmlu"]["source"]["subjects"]["law"]["n"] == 3
    assert found["results"]["sum"]["target"]["n"] == 3 and len(found["results"]["sum"]["target"]["runs"]) == 2


def test_examples_that_do_not_fit_the_context_are_left_out_and_counted(papers, llama):
    data, *_ = evaluate.read_data(papers, "ne", ["mmlu"])
    settings = {"tasks": ["mmlu"], "seed": 1, "num_samples": 9, "num_questions": None, "runs": 1, "few_shots": 3,
                "max_length": 128}
    tokenizer = AutoTokenizer.from_pretrained(llama)
    whole = {(r["side"], r["id"]): (r, ids) for r, ids, _ in evaluate.plan(data, tokenizer, "ne", settings)}
    longest = {side: max(len(ids) for (s, _), (_, ids) in whole.items() if s == side) for side in ("source", "target")}
    assert longest["source"] < longest["target"]
    for record, ids, _ in evaluate.plan(data, tokenizer, "ne", settings, context=longest["source"] + 1):
        full, all_ids = whole[record["side"], record["id"]]
        assert len(ids) <= longest["source"] and record["prompt"].count("<|im_start|>user") == record["shots"] + 1
        assert (record["shots"] == 5) == (len(all_ids) <= longest["source"])
        assert full["prompt"].endswith(record["prompt"]) and full["shots"] == 5
        assert ids[:record["shared"]] == all_ids[len(all_ids) - len(ids):][:record["shared"]]


def test_an_item_is_never_its_own_example(papers):
    data, *_ = evaluate.read_data(papers, "ne", ["mrc"])
    for shots, row in evaluate.with_shots("mrc", "target", data, {"seed": 3, "num_questions": None}):
        assert len({shot["id"] for shot in shots} - {row["id"]}) == 3


def test_bits_per_byte_by_hand(whole, model, llama, data):
    tokenizer = AutoTokenizer.from_pretrained(llama)

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    nats, size = 0.0, 0
    for line in (data / "en/heldout.jsonl").read_text().splitlines():
        user, answer = json.loads(line)["messages"]
        prompt = f"<|im_start|>user\n{user['content']}<|im_end|>\n<|im_start|>assistant\n"
        nats -= reference_loglik(model, encode(prompt), encode(answer["content"] + "<|im_end|>"))
        size += len(answer["content"].encode("utf-8"))
    found = whole[0]["results"]["bpb"]["source"]["heldout"]
    assert (found["bytes"], found["documents"]) == (size, 6) and size > sum(map(len, TEXT))
    assert found["bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    # a text is scored from its first token on, in windows that each see one token of what was before
    text = TEXT[3] * 9
    ids, nats = encode(text), 0.0
    assert len(ids) > 130
    for a in range(0, len(ids), 127):
        nats -= reference_loglik(model, [ids[a - 1]] if a else [2], ids[a:a + 127])
    found = whole[0]["results"]["bpb"]["target"]["heldout.cldr"]
    assert (found["tokens"], found["bytes"], found["documents"]) == (len(ids), len(text.encode()), 1)
    assert found["bpb"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert whole[0]["results"]["bpb"]["source"]["prose"]["bytes"] == len((" ".join(TEXT) + TEXT[0]).encode())


def test_multiple_choice_by_hand(whole, model, llama, data):
    tokenizer, letters = AutoTokenizer.from_pretrained(llama), {}
    for side, lang in (("source", "en"), ("target", "ne")):
        right = []
        for line in (data / f"{lang}/mmlu.test.jsonl").read_text().splitlines():
            row, per_byte = json.loads(line), []
            for option in evaluate.OPTIONS:
                prompt, text = row["question"], " " + row[option]
                if side == "source":
                    prompt, text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", row[option]
                prompt_ids, ids = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, text))
                prompt_ids = prompt_ids if side == "source" else [2, *prompt_ids]
                per_byte.append(reference_loglik(model, prompt_ids, ids) / len(row[option]))
            letters[row["sample_id"]] = "ABCD"[max(range(4), key=per_byte.__getitem__)]
            right.append((letters[row["sample_id"]] == row["answer"], row["subject"], row["shared_stem"]))
        found = whole[0]["results"]["mcq"][side]
        assert found["accuracy"] == sum(ok for ok, _, _ in right) / 8 and found["n"] == 8
        assert found["subjects"]["a"]["accuracy"] == sum(ok for ok, subject, _ in right if subject == "a") / 4
        assert (found["without_shared_stem"]["accuracy"], found["without_shared_stem"]["n"]) == (
            sum(ok for ok, _, stem in right if not stem) / 5, 5)
        assert 0 <= found["interval95"][0] < found["accuracy"] + 1e-9 < found["interval95"][1] + 1e-9 <= 1 + 1e-9
    assert {r["id"]: r["prediction"] for r in whole[1] if r["task"] == "mcq"} == letters
    assert len(set(letters.values())) > 1


def test_wilson_interval():
    found = evaluate.accuracy([{"scores": {"correct": i < 7}} for i in range(10)])
    assert found["interval95"] == pytest.approx([0.3968, 0.8922], abs=1e-4)  # 7 of 10, from a textbook


def test_chat_scores():
    chat = {"messages": [{"content": "the cat sat on the mat"}, {"content": "and the dog ran"}]}
    target = [{"text": "बिरालो चटाईमा बस्यो"}, {"text": "kuka da kare"}]
    odds = evaluate.english_odds({"source/heldout": [chat], "target/heldout": target})
    found = evaluate.chat_scores("The cat sat. बिरालो the cat sat बिरालो", odds)
    assert found["english_letters"] == 18 and found["letters"] == 18 + 2 * len("बिरालो")
    assert evaluate.chat_scores("a b c d a b c d e", odds)["repetition"] == pytest.approx(1 / 6)
    assert evaluate.chat_scores("7 !", odds) == {"repetition": 0.0, "letters": 0, "english_letters": 0}


def test_chat_answers_are_saved(whole):
    chat = whole[0]["results"]["chat"]
    assert chat["n"] == len(chat["answers"]) == len(evaluate.CHAT_PROMPTS)
    assert chat["answers"][0]["prompt"] == evaluate.CHAT_PROMPTS[0]
    assert {"answer", "stopped", "repetition", "letters"} <= chat["answers"][0].keys()
    assert chat["stop_rate"] == sum(a["stopped"] for a in chat["answers"]) / chat["n"]


def test_batches_do_not_exceed_the_budget_nor_lose_an_item():
    sizes = [5, 30, 7, 7, 100, 1, 12, 30]
    found = evaluate.batches(sizes, 60)
    assert sorted(sum(found, [])) == list(range(8)) and found[0] == [4]
    assert all(len(b) == 1 or len(b) * max(sizes[i] for i in b) <= 60 for b in found)


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_killed_run_goes_on_to_the_same_results(llama, data, whole, tmp_path, monkeypatch, after):
    out, items, done = tmp_path / "r/eval.json", tmp_path / "r/eval.items.jsonl", []
    right = evaluate.generate

    def killed(*arguments):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(1)
        return right(*arguments)
    monkeypatch.setattr(evaluate, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        run(llama, data, out)
    assert not out.exists()
    lines = items.read_bytes().splitlines(keepends=True)
    assert 1 < len(lines) < len(whole[1]) + 1
    items.write_bytes(b"".join(lines[:-1]) + lines[-1][:-20])  # as kill -9 leaves it: in the middle of a line
    monkeypatch.setattr(evaluate, "generate", right)
    again = run(llama, data, out)
    assert json.dumps(again["results"]) == json.dumps(whole[0]["results"]) and again["settings"] == whole[0]["settings"]
    assert [json.loads(line) for line in items.read_text().splitlines()[1:]] == whole[1]
    # all done: nothing is asked again, not even the model is loaded; with other settings, everything is
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    assert run(llama, data, out)["results"] == whole[0]["results"]
    with pytest.raises(TypeError):
        run(llama, data, out, "--seed", 1)


def test_seeds_and_greedy(llama, data, whole, tmp_path):
    def answers(*more):
        run(llama, data, tmp_path / "eval.json", "--tasks", "mt", *more)
        lines = (tmp_path / "eval.items.jsonl").read_text().splitlines()[1:]
        return {(r["side"], r["run"], r["id"]): r["prediction"] for r in map(json.loads, lines)}
    first = answers()
    assert first == {(r["side"], r["run"], r["id"]): r["prediction"] for r in whole[1] if r["task"] == "mt"}
    assert [first["source", 0, i] for i in range(4, 10)] != [first["source", 1, i] for i in range(4, 10)]
    greedy = answers("--greedy", "--num-samples", 3)
    assert len(greedy) == 6 and {run for _, run, _ in greedy} == {0}


def fails(capsys, *argv):
    """The one line of an error that exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(list(map(str, argv)))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("evaluate.py: error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("change, message", [
    (("--lang", "de"), "argument --lang: invalid choice"), (("--tasks", "bpb,sums"), "argument --tasks"),
    (("--num-samples", 0), "whole number above 0"), (("--max-length", 9), "--max-length is below 16"),
    (("--model", "no/such/model"), "model no/such/model does not exist"),
    (("--model", "no"), "model no does not exist"),
    (("--few-shots", 9), "fewer rows than --few-shots 9"), (("--out", "/dev/null/x/eval.json"), "/dev/null"),
    (("--data-dir", "nowhere"), "nowhere/en/heldout.jsonl does not exist"),
])
def test_bad_arguments(llama, data, tmp_path, capsys, change, message):
    argv = {"--model": llama, "--lang": "ne", "--data-dir": data, "--out": tmp_path / "runs/eval.json"}
    argv[change[0]] = change[1]
    assert message in fails(capsys, *(x for pair in argv.items() for x in pair), "--device", "cpu")
    assert not (tmp_path / "runs").exists()


GOOD = {"id": 1, "eng_Latn": "a", "npi_Deva": "b"}
CHOICE = {"sample_id": 1, "subject": "a", "question": "q", "answer": "A"} | dict.fromkeys(evaluate.OPTIONS, "x")


@pytest.mark.parametrize("file, content, message", [
    ("en/heldout", "", "heldout.jsonl is empty"), ("en/heldout", '{"text": "a"}\n{"text"\n', "line 2 is not JSON"),
    ("ne/heldout", b'{"text": "\xff"}\n', "line 1 is not JSON"), ("ne/heldout", '{"a": "a"}\n', "line 1 has no `text`"),
    ("en/heldout", '{"messages": [{"role": "user", "content": "a"}]}', "must end with a user's turn"),
    ("en/heldout", '{"messages": ["a"]}', "line 1 is not an object"), ("ne/heldout", "[1]\n", "line 1 is not an obj"),
    ("ne/flores.devtest", json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"npi_Deva": ""}), "line 2 has no `npi_Deva`"),
    ("ne/flores.devtest", (json.dumps(GOOD) + "\n") * 2, "two items have the same id"),
    ("ne/mmlu.test", json.dumps({k: v for k, v in CHOICE.items() if k != "option_c"}), "line 1 has no `option_c`"),
    ("en/mmlu.test", json.dumps(CHOICE | {"answer": "E"}), "line 1: `answer` must be A, B, C or D, not 'E'"),
])
def test_bad_data(llama, data, tmp_path, capsys, file, content, message):
    for path in data.rglob("*.jsonl"):
        copy = tmp_path / "data" / path.relative_to(data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / f"data/{file}.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    argv = ("--model", llama, "--lang", "ne", "--data-dir", tmp_path / "data", "--out", tmp_path / "runs/eval.json")
    assert message in fails(capsys, *argv)
    assert not (tmp_path / "runs").exists()


def test_full_disk(llama, data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "eval.json"
    run(llama, data, out, "--tasks", "chat")
    before = out.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", full)
    argv = ("--model", llama, "--lang", "ne", "--data-dir", data, "--out", out, "--tasks", "chat")
    assert "No space left on device" in fails(capsys, *argv)
    assert out.read_bytes() == before


def evaluation(folder, method, chat, target, mt, seed=42, **settings):
    """A hand-made eval.json."""
    settings = {"tasks": ["bpb", "mt", "chat"], "seed": seed, "model_sha256": method, "data_sha256": "d"} | settings
    content = {"format": "ssu-eval", "version": 1, "model": f"{folder}/{method}/model", "lang": "ne",
               "versions": {"torch": "2"}, "settings": settings,
               "device": "cpu", "git_commit": "c0ffee", "seconds": 1, "results": {
                   "bpb": {"source": {"heldout": {"bpb": chat, "tokens": 9, "documents": 3}},
                           "target": {"heldout": {"bpb": target, "tokens": 8, "documents": 2}}},
                   "mt": {"source": {"chrf": mt, "n": 5}, "target": {"chrf": 2 * mt, "n": 5}},
                   "chat": {"stop_rate": 1.0, "repetition": 0.0, "english_share": 0.5, "n": 6,
                            "answers": [{"prompt": "Why?", "answer": f"Because of {method}."}]}}}
    path = folder / method / "eval.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return content


def test_report_of_one_run(tmp_path, capsys):
    for method, *numbers in (("source", 1.0, 2.0, 20.0), ("ssu-wanda", 1.1, 1.0, 19.0), ("fft", 2.0, 1.25, 10.0),
                             ("my", 3, 3, 3)):
        evaluation(tmp_path, method, *numbers)
    evaluate.main(["--report", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert [row[0] for row in table] == ["English", "-" * 9, "Source", "FFT", "SSU-Wanda", "my",
                                         "Nepali", "-" * 9, "Source", "FFT", "SSU-Wanda", "my"]
    assert table[0][1:] == ["chat bpb ↓", "MT X→en chrF++ ↑", "stop rate ↑", "repetition ↓", "English share ↑"]
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
    evaluate.main(["--report", *(str(tmp_path / s) for s in "123"), "--out", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "1.200 ± 0.100 (+20.0%)" in text and "1.000 ± 0.200 (-50.0%)" in text and "12.00 ± 1.00 (-40.0%)" in text
    assert f"Run folders: {tmp_path}/1, {tmp_path}/2, {tmp_path}/3." in text and "standard deviation" in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_report_draws_ratios_and_overlaps(tmp_path, monkeypatch):
    """Figure 2's curves, a point for each ratio, and the Jaccard indices of the masks beside the evaluations."""
    import numpy
    from matplotlib import pyplot
    from safetensors.numpy import save_file
    for number, method in enumerate(("source", "fft", "hft", "lota", "lota-90", "lota@0.125", "ssu-wanda",
                                     "ssu-wanda@0.25", "ssu-wanda@0.875")):
        evaluation(tmp_path, method, 1.0 + number / 8, 2.0 / (1 + number), 20.0)
    rng = numpy.random.default_rng(0)
    masks = {}
    for method, shape in (("ssu-wanda", (1, 6)), ("ssu-wanda@0.25", (1, 6)), ("lota-90", (4, 6)), ("hft", (1, 1))):
        masks[method] = {f"model.layers.{i}.mlp.up_proj.weight": rng.integers(0, 2, shape, dtype=numpy.uint8)
                         for i in range(3)}
        save_file(masks[method], tmp_path / method / "mask.safetensors")
    figures, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    evaluate.main(["--report", str(tmp_path)])
    panels = [{line.get_label(): line.get_xydata() for line in axes.lines} for axes in figures[0].axes]
    close(figures[0])
    assert len(panels) == 5
    assert panels[1]["SSU-Wanda"] == pytest.approx(
        numpy.array([[0.25, 100 / 1.875], [0.5, 100 / 1.75], [0.875, 100 / 2]]))
    assert panels[2]["LoTA"] == pytest.approx(
        numpy.array([[0.125, 100 * (1 - 1 / 6)], [0.5, 100 * (1 - 1 / 4)], [0.9, 100 * (1 - 1 / 5)]]))
    assert "HFT" not in panels[1] and "Source" in panels[1]  # one ratio makes no curve
    for layer in range(3):
        a, b = (numpy.broadcast_to(masks[m][f"model.layers.{layer}.mlp.up_proj.weight"], (4, 6)) == 0
                for m in ("ssu-wanda", "lota-90"))
        assert tuple(panels[3]["LoTA (90%)"][layer]) == pytest.approx((layer, (a & b).sum() / (a | b).sum()))
    text = (tmp_path / "report.md").read_text()
    for name, expected in {"ssu-wanda@0.25": ("ssu-wanda", 0.25), "lota-90": ("lota", 0.9), "lota": ("lota", 0.5),
                           "fft": ("fft", None), "my-lota-run": ("my-lota-run", None), "gmt": ("gmt", 0.5),
                           "mine@seed43": ("mine@seed43", None)}.items():
        assert evaluate.method_and_ratio(name) == expected
    assert "| SSU-Wanda 0.25 " in text and text.index("| SSU-Wanda 0.875") < text.index("| LoTA 0.125 ")


def test_report_draws_the_papers_tasks_where_there_are_no_bits_per_byte(tmp_path, monkeypatch, capsys):
    """Each column relative to Source, and of them the mean."""
    from matplotlib import pyplot
    for method, mt, mrc in (("source", 20.0, 0.5), ("hft@0.25", 30.0, 0.4), ("hft", 10.0, 0.25)):
        content = evaluation(tmp_path, method, 1.0, 1.0, mt, tasks=["mt", "mrc"])
        content["results"] = {"mt": content["results"]["mt"], "mrc": {
            "source": {"accuracy": mrc, "n": 9}, "target": {"accuracy": mrc / 2, "n": 9}}}
        (tmp_path / method / "eval.json").write_text(json.dumps(content))
    figures, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    evaluate.main(["--report", str(tmp_path)])
    panels = [{line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figures[0].axes]
    assert panels[1]["HFT"] == [[0.25, pytest.approx(115)], [0.5, pytest.approx(50)]]
    assert panels[2]["HFT"] == [[0.25, pytest.approx(15)], [0.5, pytest.approx(-50)]]
    assert "mean of MT, MRC" in figures[0].axes[0].get_xlabel()
    close(figures[0])
    for method in ("source", "hft@0.25", "hft"):
        content = json.loads((tmp_path / method / "eval.json").read_text())
        content["results"] = {"gsm8k": {"source": {"accuracy": 0.5, "n": 3}}}
        (tmp_path / method / "eval.json").write_text(json.dumps(content))
    capsys.readouterr()
    evaluate.main(["--report", str(tmp_path)])
    assert "no report.png: it needs figures of both languages" in capsys.readouterr().out


def test_where_the_data_are_from_stands_in_the_results(llama, papers, tmp_path, capsys):
    shutil.copytree(papers, tmp_path / "data")
    for lang in ("en", "ne"):
        (tmp_path / f"data/{lang}/provenance.json").write_text(json.dumps({"xlsum.jsonl": {"from": f"set@{lang}"}}))
    found = run(llama, tmp_path / "data", tmp_path / "source/eval.json", "--tasks", "sum", "--num-samples", 1)
    assert found["data"] == {"source/xlsum": "set@en", "target/xlsum": "set@ne"}
    evaluate.main(["--report", str(tmp_path)])
    assert "Data: source/xlsum set@en, target/xlsum set@ne." in (tmp_path / "report.md").read_text()
    (tmp_path / "data/ne/provenance.json").write_text("{}")
    assert "does not say where xlsum.jsonl is from" in fails(
        capsys, "--model", llama, "--lang", "ne", "--data-dir", tmp_path / "data", "--tasks", "sum", "--out",
        tmp_path / "e.json")


def test_misfit_models_and_damaged_items_are_one_line(data, tmp_path, capsys):
    model = tiny_model(tmp_path / "m")
    argv = ["--model", model, "--lang", "ne", "--data-dir", data, "--tasks", "mcq", "--out", tmp_path / "e.json"]
    assert "is a folder" in fails(capsys, *argv[:-1], tmp_path)
    run(model, data, tmp_path / "e.json", "--tasks", "mcq")
    items = tmp_path / "e.items.jsonl"
    items.write_text(items.read_text().replace('"task": "mcq"', '"task": mcq', 1))
    more = ["--device", "cpu", "--runs", 2, "--max-new-tokens", 8, "--max-length", 128, "--batch-tokens", 800]
    assert "e.items.jsonl is damaged" in fails(capsys, *argv, *more)
    items.unlink()
    (tmp_path / "m/config.json").write_text((tmp_path / "m/config.json").read_text().replace(
        '"intermediate_size": 48', '"intermediate_size": 40'))
    assert "mismatch" in fails(capsys, *argv)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    tokenizer.save_pretrained(model)
    assert "no such role" in fails(capsys, *argv)


def test_report_refuses_masks_that_are_damaged_or_of_other_models(tmp_path, capsys):
    import numpy
    from safetensors.numpy import save_file
    for method in ("source", "ssu-wanda", "hft"):
        evaluation(tmp_path, method, 1.0, 2.0, 20.0)
    for method in ("ssu-wanda", "hft"):
        save_file({"a": numpy.ones(2)}, tmp_path / method / "mask.safetensors", {"fingerprint": method})
    assert "different models" in fails(capsys, "--report", tmp_path)
    (tmp_path / "hft/mask.safetensors").write_bytes(b"cut")
    assert "hft/mask.safetensors cannot be read" in fails(capsys, "--report", tmp_path)


def test_report_refuses_what_cannot_be_compared(tmp_path, capsys):
    assert "source/eval.json is missing" in fails(capsys, "--report", tmp_path)
    evaluation(tmp_path, "fft", 1.0, 1.0, 1.0)
    assert "source/eval.json is missing" in fails(capsys, "--report", tmp_path)
    evaluation(tmp_path, "source", 1.0, 1.0, 1.0)
    evaluation(tmp_path, "ssu-mag", 1.0, 1.0, 1.0, num_samples=3)
    assert "num_samples is 3, not None" in fails(capsys, "--report", tmp_path)
    evaluation(tmp_path, "ssu-mag", 1.0, 1.0, 1.0, seed=3)
    assert "seed is 3, not 42" in fails(capsys, "--report", tmp_path)
    for lacking in ({}, {"results": None}):
        content = evaluation(tmp_path, "ssu-mag", 1.0, 1.0, 1.0) | lacking if lacking else {}
        (tmp_path / "ssu-mag/eval.json").write_text(json.dumps(content))
        assert "ssu-mag/eval.json cannot be read" in fails(capsys, "--report", tmp_path)
    assert not (tmp_path / "report.md").exists()


def test_report_does_not_import_torch(tmp_path):
    evaluation(tmp_path, "source", 1.0, 2.0, 20.0)
    code = ("import sys, evaluate; sys.modules['matplotlib'] = None; evaluate.main(sys.argv[1:]); "
            "assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code, "--report", tmp_path], capture_output=True, text=True, cwd=ROOT,
                          check=True)
    assert "pip install matplotlib" in done.stdout and not (tmp_path / "report.png").exists()
