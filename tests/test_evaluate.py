"""evaluate.py: numbers against independent ones, interrupted runs against whole ones, bad input."""

import errno
import fcntl
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
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import evaluate

LANGUAGES = evaluate.read_languages()
WORDS = "river mill wheel capital Paris hills children rain house market".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small evaluation folder: every file, optional column, and several bytes a character."""
    folder = tmp_path_factory.mktemp("data")
    question = {"role": "user", "content": "What is it?"}
    write_jsonl(
        folder / "en/heldout.jsonl",
        [
            {"messages": [question, {"role": "assistant", "content": text}]}
            for text in (*TEXT, "Çay — 5 €.")
        ],
    )
    write_jsonl(folder / "en/prose.jsonl", [{"text": " ".join(TEXT)}, {"text": TEXT[0]}])
    write_jsonl(
        folder / "ne/heldout.jsonl",
        [{"text": TEXT[2], "domain": "udhr"}, {"text": TEXT[3] * 9, "domain": "cldr"}],
    )
    for lang, question in (("en", "Where do the {} run?"), ("ne", "नेपाल {} —")):
        write_jsonl(
            folder / f"{lang}/mmlu.test.jsonl",
            [
                {
                    "sample_id": f"{lang}/{i}",
                    "subject": "ab"[i % 2],
                    "question": question.format(WORDS[i]),
                    "answer": "ABCD"[i % 4],
                    "shared_stem": i % 3 == 0,
                }
                | {
                    option: WORDS[(i + j) % 10] * (j + 1)
                    for j, option in enumerate(evaluate.OPTIONS)
                }
                for i in range(8)
            ],
        )
    pairs = [
        {
            "id": i,
            "eng_Latn": f"The {word} is {i} years old.",
            "npi_Deva": f"{TEXT[3][: 5 + 3 * i]} {i}",
            "domain": "xy"[i % 2],
        }
        for i, word in enumerate(WORDS)
    ]
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
    argv = {
        "--model": model,
        "--lang": "ne",
        "--data-dir": data,
        "--out": out,
        "--device": "cpu",
        "--runs": 2,
        "--max-new-tokens": 8,
        "--max-length": 128,
        "--batch-tokens": 800,
    }
    evaluate.main([str(x) for x in (*(x for pair in argv.items() for x in pair), *more)])
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def whole(llama, data, tmp_path_factory):
    """(eval.json, items) of one uninterrupted run of everything."""
    out = tmp_path_factory.mktemp("whole") / "eval.json"
    found = run(llama, data, out)
    return found, [
        json.loads(line) for line in out.with_name("eval.items.jsonl").read_text().splitlines()[1:]
    ]


def reference_loglik(model, prompt, part):
    """The sum of log p(token | all before) with nothing batched, padded or cut, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + part])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(part))


@pytest.mark.parametrize("kind", ["llama", "olmo2", "qwen2"])
def test_loglik_equals_a_naive_float64_reference(kind, request):
    folder = request.getfixturevalue(kind)
    double = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    single = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(1)

    def ids(n):
        return torch.randint(3, 300, (n,), generator=draw).tolist()

    rows = [(ids(n), ids(k)) for n, k in ((5, 1), (17, 3), (1, 9), (1, 30), (9, 1), (20, 12))]
    rows += [(rows[0][0], [40]), (rows[0][0], [41])]  # three options of one token share a row
    for prefix in ([], ids(37)):
        want = [reference_loglik(double, prefix + prompt, part) for prompt, part in rows]
        assert evaluate.loglik(single, rows, prefix) == pytest.approx(want, abs=2e-4)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_padded_greedy_generation_equals_one_by_one(model, penalty):
    """Also under a repetition penalty, which must not see the padding."""
    prompts = [[1, 70, 80, 90] + list(range(100, 100 + n)) for n in (9, 1, 30, 14)] + [
        [1, 70, 80, 90, 33]
    ]
    alone = []
    for prompt in prompts:
        new = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=12,
            eos_token_id=[2, 60],
            pad_token_id=2,
            do_sample=False,
            repetition_penalty=penalty,
        )
        alone.append(new[0, len(prompt) :].tolist())
    sampling = {"do_sample": False, "repetition_penalty": penalty}
    assert evaluate.generate(model, prompts, 12, [2, 60], sampling) == alone
    assert evaluate.generate(
        model, [[5, *p] for p in prompts[:1]] + [[6, 9]], 3, [2], sampling
    )  # nothing shared
    stop = alone[0][4]
    cut = evaluate.generate(model, prompts, 12, [2, stop], sampling)[0]
    assert cut == alone[0][: alone[0].index(stop) + 1]


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
                command = [
                    sys.executable,
                    "-m",
                    "sacrebleu",
                    *files,
                    "-m",
                    "chrf",
                    "--chrf-word-order",
                    "2",
                    "-w",
                    "6",
                ]
                return subprocess.run(
                    [*command, *more], capture_output=True, text=True, check=True
                ).stdout

            corpus = sacrebleu("-b")
            assert result["chrf_corpus"] == pytest.approx(float(corpus), abs=1e-6)
            if (side, number) == ("source", 0):
                each = [
                    float(re.search(r"= ([\d.]+)$", line).group(1))
                    for line in sacrebleu("-sl").splitlines()
                ]
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
    source, target = (
        next(r["prompt"] for r in rows if r["side"] == side) for side in ("source", "target")
    )
    for prompt, ask in (
        (source, "Translate Nepali to English: "),
        (target, "अङ्ग्रेजीलाई नेपालीमा अनुवाद गर्नुहोस्: "),
    ):
        assert (
            prompt.count(f"<|im_start|>user\n{ask}") == 4
            and prompt.count("<|im_start|>assistant\n") == 4
        )
    end = " =<|im_end|>\n<|im_start|>assistant\n"
    assert source.endswith(" 5" + end) and target.endswith(
        f": The {WORDS[5]} is 5 years old." + end
    )
    assert [r["reference"] for r in rows[:1]] == [f"The {WORDS[5]} is 5 years old."]
    english = [
        f"The {WORDS[i]} is {i} years old." for i in range(4)
    ]  # dev, which the examples are from
    nepali = [f"{TEXT[3][: 5 + 3 * i]} {i}" for i in range(4)]
    for prompt, asked, answers in ((source, nepali, english), (target, english, nepali)):
        turns = [turn.partition("\n")[2] for turn in prompt.split("<|im_end|>\n")][:-2]
        assert all(turn.endswith(" =") for turn in turns[0::2])
        numbers = [asked.index(turn.partition(": ")[2][:-2]) for turn in turns[0::2]]
        assert [answers[i] for i in numbers] == turns[1::2] and len(set(numbers)) == 3


def plan(folder, lang, tasks, model, context=math.inf, **changes):
    """The items of an evaluation, with nothing scored."""
    names = ["--model", "m", "--lang", lang, "--data-dir", str(folder), "--out", "o.json"]
    args = evaluate.parse_args([*names, "--tasks", ",".join(tasks), "--runs", "1", "--seed", "1"])
    vars(args).update(changes, context=context)
    data, *_ = evaluate.read_data(folder, lang, tasks)
    return evaluate.plan(data, AutoTokenizer.from_pretrained(model), args)


def test_belebele_answers_are_those_of_its_numbers(papers, llama, tmp_path):
    """Of the questions and of the examples; an item is never its own example."""
    path = tmp_path / "ne/belebele.jsonl"
    lines = (papers / "ne/belebele.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"question": f"Q{i}?"} for i, line in enumerate(lines)]
    for lang in ("en", "ne"):
        write_jsonl(tmp_path / lang / path.name, rows)
    for record, _, _ in plan(tmp_path, "ne", ["mrc"], llama):
        turns = re.findall(r"Q(\d)\?.*?assistant\n(\w?)", record["prompt"], re.S)
        *shots, asked = turns
        assert record["reference"] == "ABCD"[int(asked[0]) % 4] and record["id"] == f"l {asked[0]}"
        assert len(shots) == 3 and all(answer == "ABCD"[int(i) % 4] for i, answer in shots)
        assert len({number for number, _ in turns}) == 4


def test_decoding_is_table_9(papers, tmp_path, monkeypatch):
    """What transformers is asked for; the model's own generation settings must not count."""
    model, calls, real = (
        tiny_model(tmp_path / "m", max_position_embeddings=2048),
        [],
        LlamaForCausalLM.generate,
    )
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(
        json.dumps(config | {"do_sample": True, "min_p": 0.7})
    )
    monkeypatch.setattr(
        LlamaForCausalLM,
        "generate",
        lambda self, ids, **more: (
            calls.append((more, self.generation_config)) or real(self, ids, **more)
        ),
    )
    shutil.copytree(papers, tmp_path / "data")
    for lang in ("en", "ne"):
        write_jsonl(tmp_path / f"data/{lang}/heldout.jsonl", [{"text": text} for text in TEXT])
    argv = [
        "--model",
        model,
        "--lang",
        "ne",
        "--data-dir",
        tmp_path / "data",
        "--runs",
        1,
        "--num-samples",
        1,
    ]
    tokenizer = AutoTokenizer.from_pretrained(model)
    for task, top_p, limit in (("mt", 0.9, 128), ("sum", 0.9, 128), ("chat", None, 128)):
        calls.clear()
        evaluate.main(list(map(str, [*argv, "--tasks", task, "--out", tmp_path / f"{task}.json"])))
        calls = [call for call in calls if call[0]["max_new_tokens"] > 2]  # not the trial
        for asked, config in calls:
            sampling = {
                key: asked.get(key)
                for key in ("temperature", "top_k", "top_p", "repetition_penalty")
            }
            assert sampling == (
                dict.fromkeys(sampling)
                if task == "chat"
                else dict(temperature=0.8, top_k=40, top_p=top_p, repetition_penalty=1.1)
            )
            assert asked["do_sample"] == (task != "chat") and asked["max_new_tokens"] == limit
            newline = tokenizer("\n")["input_ids"][0] in asked["eos_token_id"]
            assert newline == (task in ("mt", "sum")) and config.min_p is None
        assert calls


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    """XL-Sum, Belebele and MMLU in miniature, for English and the five languages."""
    folder = tmp_path_factory.mktemp("papers")
    for lang in LANGUAGES:
        write_jsonl(
            folder / f"{lang}/xlsum.jsonl",
            [{"id": f"x{i}", "text": "TEXT", "summary": TEXT[i]} for i in range(3)],
        )
        write_jsonl(
            folder / f"{lang}/belebele.jsonl",
            [
                {
                    "link": "l",
                    "question_number": i,
                    "flores_passage": "PASSAGE",
                    "question": "QUESTION",
                    "mc_answer1": "ONE",
                    "mc_answer2": "TWO",
                    "mc_answer3": "THREE",
                    "mc_answer4": "FOUR",
                    "correct_answer_num": f"{i % 4 + 1}",
                }
                for i in range(9)
            ],
        )
        for split, n in (("dev", 5), ("test", 4)):
            write_jsonl(
                folder / f"{lang}/mmlu.{split}.jsonl",
                [
                    {
                        "sample_id": f"{subject}/{split}/{i}",
                        "subject": subject,
                        "question": "QUESTION",
                        "answer": "ABCD"[i % 4],
                        **dict(zip(evaluate.OPTIONS, ("ONE", "TWO", "THREE", "FOUR"), strict=True)),
                    }
                    for subject in ("high_school_physics", "law")
                    for i in range(n)
                ],
            )
        pairs = [
            {"id": i, "eng_Latn": "SENTENCE"}
            | {found["flores"]: "SENTENCE" for found in LANGUAGES.values()}
            for i in range(4)
        ]
        write_jsonl(folder / f"{lang}/flores.dev.jsonl", pairs)
        write_jsonl(folder / f"{lang}/flores.devtest.jsonl", pairs[:1])
    return folder


PAPER = ["mt", "sum", "mrc", "mmlu"]


@pytest.mark.parametrize("lang", [lang for lang in LANGUAGES if lang != "en"])
def test_prompts_are_those_of_table_7(lang, papers, llama):
    """prompts.json holds the prompts as the paper prints them, with SENTENCE, TEXT, ... in them."""
    golden = json.loads((ROOT / "tests/prompts.json").read_text())
    seen = set()
    for record, _, _ in plan(papers, lang, PAPER, llama):
        first, *asked = record["prompt"].split("<|im_start|>user\n")
        task, side = record["task"], record["side"]
        want = (
            golden[lang][f"mt {side}"]
            if task == "mt"
            else golden["en" if side == "source" else lang][task]
        )
        if record["domain"] == "law":
            want = want.replace("high school physics", "law")
        assert asked[-1] == want + "<|im_end|>\n<|im_start|>assistant\n"
        assert {turn.split("<|im_end|>")[0] for turn in asked} == {want} and not first
        assert len(asked) - 1 == {"mt": 3, "sum": 0, "mrc": 3, "mmlu": 5}[task]
        seen.add((task, side))
    assert len(seen) == 8


def random_model(architecture, config):
    """Return a model whose predictions depend clearly on all of its context."""
    torch.manual_seed(0)
    model = architecture(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 else torch.nn.init.normal_(p, 1.0, 0.1)
    model.generation_config = GenerationConfig()
    return model


WINDOW = {"num_key_value_heads": 2, "sliding_window": 16}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
BUILT = {
    "full": (
        MistralForCausalLM,
        MistralConfig(**SIZES | WINDOW | {"sliding_window": None}, vocab_size=400),
    ),
    "window": (MistralForCausalLM, MistralConfig(**SIZES | WINDOW, vocab_size=400)),
    "alibi": (BloomForCausalLM, BloomConfig(vocab_size=400, **BLOOM)),
}


@pytest.mark.parametrize("kind", BUILT)
def test_every_way_equals_plain_rows_one_by_one(kind):
    model = random_model(*BUILT[kind])
    ways, draw = evaluate.try_batches(model, model.config, 512), torch.Generator().manual_seed(3)

    def ids(n):
        return torch.randint(3, 300, (n,), generator=draw).tolist()

    prefix, prompts = ids(20), [ids(n) for n in (40, 3, 25)]
    items = [({"task": "mmlu"}, prefix + prompt, [[40], [41, 42]]) for prompt in prompts]
    for found, (_, prompt, parts) in zip(
        evaluate.score_rows(model, items, ways), items, strict=True
    ):
        assert found == pytest.approx(
            [reference_loglik(model, prompt, p) for p in parts], abs=1e-2, rel=1e-4
        )
    assert ways["batched_scoring"] and ways["shared_examples"] and ways["batched_generation"]
    alone = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        alone.append(tokens[len(prompt) :])
    assert evaluate.generate(model, prompts, 6, [399], evaluate.GREEDY) == alone


def test_what_batches_get_wrong_is_done_one_by_one(capsys):
    """Here positions are counted from the left end of a row, padding included."""
    model = random_model(*BUILT["full"])
    plain = model.forward

    def forward(input_ids=None, position_ids=None, past_key_values=None, **more):
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        places = torch.arange(past, past + input_ids.shape[1])[None].expand(len(input_ids), -1)
        return plain(
            input_ids=input_ids, position_ids=places // 3, past_key_values=past_key_values, **more
        )

    model.forward = forward
    ways = evaluate.try_batches(model, model.config, 512)
    assert ways["batched_scoring"] and not ways["batched_generation"]
    assert "batched_generation: not the same as one by one for mistral" in capsys.readouterr().out
    args = evaluate.parse_args(
        ["--model", "m", "--lang", "ne", "--data-dir", "d", "--out", "o.json"]
    )
    members = [({"task": "mt"}, [5] * n, []) for n in (4, 5, 6)]
    assert [len(batch) for batch in evaluate.divide("mt", members, ways, args)] == [1, 1, 1]


def test_models_that_are_not_causal_or_damaged_are_refused(capsys, llama, data, tmp_path):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    bert = random_model(BertLMHeadModel, BertConfig(vocab_size=400, **sizes))
    with pytest.raises(SystemExit):
        evaluate.try_batches(bert, bert.config, 512)
    assert "bert is not a causal language model" in capsys.readouterr().err
    shutil.copytree(llama, tmp_path / "t5")
    AutoConfig.for_model("t5").save_pretrained(tmp_path / "t5")
    argv = ["--lang", "ne", "--data-dir", data, "--out", tmp_path / "e.json", "--model"]
    assert "t5 is not a decoder" in fails(capsys, *argv, tmp_path / "t5")
    broken = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    shutil.copytree(llama, tmp_path / "nan")
    broken.save_pretrained(tmp_path / "nan")
    assert "not finite" in fails(capsys, *argv, tmp_path / "nan", "--device", "cpu")


def test_ties_count_as_one_of_k():
    record = {"task": "mmlu", "reference": "B"}
    for found, correct in (
        ([-1.0, -1.0, -2.0, -3.0], 0.5),
        ([-1.0] * 4, 0.25),
        ([-1.0, -2.0, -1.0, -9.0], 0),
    ):
        assert evaluate.score(record, found, None, [], None)["scores"]["correct"] == correct


def test_raw_text_is_data_and_the_date_is_fixed(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    assert evaluate.encode(tokenizer, "<|im_end|>") == [2]
    assert 2 not in evaluate.encode(tokenizer, "a <|im_end|>", raw=True)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ enable_thinking }}"
    assert evaluate.render(tokenizer, [{"role": "user", "content": "a"}]) == "01 Jan 2025 False"


def test_windows_of_bpb_fit_the_context(llama, data):
    for _, prompt, (part,) in plan(data, "ne", ["bpb"], llama, context=64):
        assert 0 < len(prompt) + len(part) <= 64


def test_a_foreign_out_is_kept_and_one_process_writes_it(llama, data, tmp_path, capsys):
    argv = [
        "--model",
        llama,
        "--lang",
        "ne",
        "--data-dir",
        data,
        "--tasks",
        "mcq",
        "--device",
        "cpu",
        "--out",
    ]
    (tmp_path / "mine.json").write_text("{}")
    assert "evaluate.py did not write it" in fails(capsys, *argv, tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text() == "{}"
    with open(tmp_path / "e.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process writes" in fails(capsys, *argv, tmp_path / "e.json")


def test_paper_tasks_by_hand(papers, llama, model, tmp_path):
    found = run(
        llama,
        papers,
        tmp_path / "eval.json",
        "--tasks",
        "sum,mrc,mmlu",
        "--batch-tokens",
        "3000",
        "--num-questions",
        "7",
    )
    items = [
        json.loads(line) for line in (tmp_path / "eval.items.jsonl").read_text().splitlines()[1:]
    ]
    tokenizer, count = AutoTokenizer.from_pretrained(llama), {}
    for r in items:
        count[r["task"], r["side"]] = count.get((r["task"], r["side"]), 0) + 1
        if r["task"] == "sum":
            continue
        prompt = evaluate.encode(tokenizer, r["prompt"])
        want = [
            reference_loglik(model, prompt, evaluate.encode(tokenizer, letter)) for letter in "ABCD"
        ]
        assert r["scores"]["loglik"] == pytest.approx(want, abs=2e-4)
        assert r["prediction"] == "ABCD"[want.index(max(want))]
        assert r["scores"]["correct"] == (r["prediction"] == r["reference"])
        answers = [turn[0] for turn in r["prompt"].split("<|im_start|>assistant\n")[1:-1]]
        if r["task"] == "mmlu":
            assert (
                answers == [*"ABCDA"][5 - r["shots"] :]
                and r["prompt"].count(r["domain"]) == r["shots"] + 1
            )
    assert count == {
        (task, side): {"sum": 6, "mrc": 7, "mmlu": 7}[task]
        for task in ("sum", "mrc", "mmlu")
        for side in ("source", "target")
    }
    for task in ("mrc", "mmlu"):
        chosen = [
            r["scores"]["correct"] for r in items if (r["task"], r["side"]) == (task, "target")
        ]
        assert found["results"][task]["target"]["accuracy"] == pytest.approx(
            sum(chosen) / len(chosen)
        )
    assert found["results"]["mmlu"]["source"]["subjects"]["law"]["n"] == 3
    assert (
        found["results"]["sum"]["target"]["n"] == 3
        and len(found["results"]["sum"]["target"]["runs"]) == 2
    )


def test_examples_that_do_not_fit_the_context_are_left_out_and_counted(papers, llama):
    whole = {(r["side"], r["id"]): (r, ids) for r, ids, _ in plan(papers, "ne", ["mmlu"], llama)}
    longest = max(len(ids) for (side, _), (_, ids) in whole.items() if side == "source")
    assert longest < max(len(ids) for (side, _), (_, ids) in whole.items() if side == "target")
    for record, ids, _ in plan(papers, "ne", ["mmlu"], llama, context=longest + 1):
        full, all_ids = whole[record["side"], record["id"]]
        assert len(ids) <= longest
        assert record["prompt"].count("<|im_start|>user") == record["shots"] + 1
        assert (record["shots"] == 5) == (len(all_ids) <= longest)
        assert full["prompt"].endswith(record["prompt"]) and full["shots"] == 5


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
    # a text is scored from its first token on, in windows that each see one token before them
    text = TEXT[3] * 9
    ids, nats = encode(text), 0.0
    assert len(ids) > 130
    for a in range(0, len(ids), 127):
        nats -= reference_loglik(model, [ids[a - 1]] if a else [2], ids[a : a + 127])
    found = whole[0]["results"]["bpb"]["target"]["heldout.cldr"]
    assert (found["tokens"], found["bytes"], found["documents"]) == (
        len(ids),
        len(text.encode()),
        1,
    )
    assert found["bpb"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert whole[0]["results"]["bpb"]["source"]["prose"]["bytes"] == len(
        (" ".join(TEXT) + TEXT[0]).encode()
    )


def test_multiple_choice_by_hand(whole, model, llama, data):
    tokenizer, letters = AutoTokenizer.from_pretrained(llama), {}
    for side, lang in (("source", "en"), ("target", "ne")):
        right = []
        for line in (data / f"{lang}/mmlu.test.jsonl").read_text().splitlines():
            row, per_byte = json.loads(line), []
            for option in evaluate.OPTIONS:
                prompt, text = row["question"], " " + row[option]
                if side == "source":
                    prompt, text = (
                        f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
                        row[option],
                    )
                prompt_ids, ids = (
                    tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, text)
                )
                prompt_ids = prompt_ids if side == "source" else [2, *prompt_ids]
                per_byte.append(reference_loglik(model, prompt_ids, ids) / len(row[option]))
            letters[row["sample_id"]] = "ABCD"[max(range(4), key=per_byte.__getitem__)]
            right.append(
                (letters[row["sample_id"]] == row["answer"], row["subject"], row["shared_stem"])
            )
        found = whole[0]["results"]["mcq"][side]
        assert found["accuracy"] == sum(ok for ok, _, _ in right) / 8 and found["n"] == 8
        assert (
            found["subjects"]["a"]["accuracy"]
            == sum(ok for ok, subject, _ in right if subject == "a") / 4
        )
        assert (found["without_shared_stem"]["accuracy"], found["without_shared_stem"]["n"]) == (
            sum(ok for ok, _, stem in right if not stem) / 5,
            5,
        )
        assert (
            0
            <= found["interval95"][0]
            < found["accuracy"] + 1e-9
            < found["interval95"][1] + 1e-9
            <= 1 + 1e-9
        )
    assert {r["id"]: r["prediction"] for r in whole[1] if r["task"] == "mcq"} == letters
    assert len(set(letters.values())) > 1


def test_wilson_interval():
    found = evaluate.accuracy([{"scores": {"correct": i < 7}} for i in range(10)])
    assert found["interval95"] == pytest.approx(
        [0.3968, 0.8922], abs=1e-4
    )  # 7 of 10, from a textbook


def test_chat_scores():
    chat = {"messages": [{"content": "the cat sat on the mat"}, {"content": "and the dog ran"}]}
    target = [{"text": "बिरालो चटाईमा बस्यो"}, {"text": "kuka da kare"}]
    odds = evaluate.english_odds({"source/heldout": [chat], "target/heldout": target})
    found = evaluate.chat_scores("The cat sat. बिरालो the cat sat बिरालो", odds)
    assert found["english_letters"] == 18 and found["letters"] == 18 + 2 * len("बिरालो")
    assert evaluate.chat_scores("a b c d a b c d e", odds)["repetition"] == pytest.approx(1 / 6)
    assert evaluate.chat_scores("7 !", odds) == {
        "repetition": 0.0,
        "letters": 0,
        "english_letters": 0,
    }


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
    with pytest.raises(SystemExit) as stopped:
        run(llama, data, out)
    assert stopped.value.code == 130
    assert not out.exists()
    lines = items.read_bytes().splitlines(keepends=True)
    assert 1 < len(lines) < len(whole[1]) + 1
    items.write_bytes(
        b"".join(lines[:-1]) + lines[-1][:-20]
    )  # as kill -9 leaves it: in the middle of a line
    monkeypatch.setattr(evaluate, "generate", right)
    again = run(llama, data, out)
    assert (
        json.dumps(again["results"]) == json.dumps(whole[0]["results"])
        and again["settings"] == whole[0]["settings"]
    )
    assert [json.loads(line) for line in items.read_text().splitlines()[1:]] == whole[1]
    # all done: not even the model is loaded; with other settings, everything is asked again
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
    assert first == {
        (r["side"], r["run"], r["id"]): r["prediction"] for r in whole[1] if r["task"] == "mt"
    }
    assert [first["source", 0, i] for i in range(4, 10)] != [
        first["source", 1, i] for i in range(4, 10)
    ]
    greedy = answers("--greedy", "--num-samples", 3)
    assert len(greedy) == 6 and {run for _, run, _ in greedy} == {0}


def fails(capsys, *argv):
    """The one line of an error that exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(list(map(str, argv)))
    error = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and error.startswith("evaluate.py: error: ")
        and error.count("\n") == 1
    ), error
    return error


@pytest.mark.parametrize(
    "change, message",
    [
        (("--lang", "de"), "argument --lang: invalid choice"),
        (("--tasks", "bpb,sums"), "argument --tasks"),
        (("--num-samples", 0), "whole number above 0"),
        (("--seed", 10**15), "--seed must be"),
        (("--max-length", 9), "--max-length is below 16"),
        (("--model", "no/such/model"), "model no/such/model does not exist"),
        (("--model", "no"), "model no does not exist"),
        (("--few-shots", 9), "fewer rows than --few-shots 9"),
        (("--out", "/dev/null/x/eval.json"), "/dev/null"),
        (("--data-dir", "nowhere"), "nowhere/en/heldout.jsonl does not exist"),
    ],
)
def test_bad_arguments(llama, data, tmp_path, capsys, change, message):
    argv = {
        "--model": llama,
        "--lang": "ne",
        "--data-dir": data,
        "--out": tmp_path / "runs/eval.json",
    }
    argv[change[0]] = change[1]
    assert message in fails(capsys, *(x for pair in argv.items() for x in pair), "--device", "cpu")
    assert not (tmp_path / "runs").exists()


GOOD = {"id": 1, "eng_Latn": "a", "npi_Deva": "b"}
CHOICE = {"sample_id": 1, "subject": "a", "question": "q", "answer": "A"} | dict.fromkeys(
    evaluate.OPTIONS, "x"
)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("en/heldout", "", "heldout.jsonl is empty"),
        ("en/heldout", '{"text": "a"}\n{"text"\n', "line 2 is not JSON"),
        ("ne/heldout", b'{"text": "\xff"}\n', "line 1 is not JSON"),
        ("ne/heldout", '{"a": "a"}\n', "line 1 has no `text`"),
        (
            "en/heldout",
            '{"messages": [{"role": "user", "content": "a"}]}',
            "must end with a user's turn",
        ),
        ("en/heldout", '{"messages": ["a"]}', "whose content is text"),
        ("ne/heldout", "[1]\n", "line 1 is not an obj"),
        (
            "en/heldout",
            '{"messages": [{"role": "user", "content": ["a"]}]}',
            "whose content is text",
        ),
        ("ne/heldout", '\n\n{"text": "\\ud83d"}', "line 3 has half of a surrogate"),
        ("ne/heldout", "[" * 1 + '{"text": "a"}]', "JSON array"),
        ("ne/heldout", '{\n"text": "a"}', "over several lines"),
        ("ne/heldout", '{"text": ' + "[" * 200000, "nested too deeply"),
        ("ne/heldout", '{"text": "a"}'.encode("utf-16"), "is UTF-16"),
        ("ne/heldout", '{"text": "a", "domain": ["b"]}', "`domain` must be text"),
        (
            "en/heldout",
            '{"messages": [{"role": "user", "content": "a"}, '
            '{"role": "assistant", "content": ""}]}',
            "is empty",
        ),
        (
            "ne/flores.devtest",
            json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"npi_Deva": ""}),
            "line 2 has no `npi_Deva`",
        ),
        ("ne/flores.devtest", (json.dumps(GOOD) + "\n") * 2, "two items have the same id"),
        (
            "ne/mmlu.test",
            json.dumps({k: v for k, v in CHOICE.items() if k != "option_c"}),
            "line 1 has no `option_c`",
        ),
        ("en/mmlu.test", json.dumps(CHOICE | {"answer": "E"}), "line 1: `answer` must be one of"),
    ],
)
def test_bad_data(llama, data, tmp_path, capsys, file, content, message):
    for path in data.rglob("*.jsonl"):
        copy = tmp_path / "data" / path.relative_to(data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / f"data/{file}.jsonl").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    argv = (
        "--model",
        llama,
        "--lang",
        "ne",
        "--data-dir",
        tmp_path / "data",
        "--out",
        tmp_path / "runs/eval.json",
    )
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


def test_where_the_data_are_from_stands_in_the_results(llama, papers, tmp_path, capsys):
    shutil.copytree(papers, tmp_path / "data")
    for lang in ("en", "ne"):
        (tmp_path / f"data/{lang}/provenance.json").write_text(
            json.dumps({"xlsum.jsonl": {"from": f"set@{lang}"}})
        )
    found = run(
        llama,
        tmp_path / "data",
        tmp_path / "source/eval.json",
        "--tasks",
        "sum",
        "--num-samples",
        1,
    )
    assert found["data"] == {"source/xlsum": "set@en", "target/xlsum": "set@ne"}
    (tmp_path / "data/ne/provenance.json").write_text("{}")
    assert "does not say where xlsum.jsonl is from" in fails(
        capsys,
        "--model",
        llama,
        "--lang",
        "ne",
        "--data-dir",
        tmp_path / "data",
        "--tasks",
        "sum",
        "--out",
        tmp_path / "e.json",
    )


def test_misfit_models_and_damaged_items_are_one_line(data, tmp_path, capsys):
    model = tiny_model(tmp_path / "m")
    argv = [
        "--model",
        model,
        "--lang",
        "ne",
        "--data-dir",
        data,
        "--tasks",
        "mcq",
        "--out",
        tmp_path / "e.json",
    ]
    assert "is a directory" in fails(capsys, *argv[:-1], tmp_path)
    run(model, data, tmp_path / "e.json", "--tasks", "mcq")
    items = tmp_path / "e.items.jsonl"
    items.write_text(items.read_text().replace('"task": "mcq"', '"task": mcq', 1))
    more = [
        "--device",
        "cpu",
        "--runs",
        2,
        "--max-new-tokens",
        8,
        "--max-length",
        128,
        "--batch-tokens",
        800,
    ]
    assert "e.items.jsonl is damaged" in fails(capsys, *argv, *more)
    items.unlink()
    (tmp_path / "m/config.json").write_text(
        (tmp_path / "m/config.json")
        .read_text()
        .replace('"intermediate_size": 48', '"intermediate_size": 40')
    )
    assert "mismatch" in fails(capsys, *argv)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    tokenizer.save_pretrained(model)
    assert "no such role" in fails(capsys, *argv)
