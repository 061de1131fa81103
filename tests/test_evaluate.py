"""evaluate.py: numbers against independent ones, interrupted runs against whole ones, bad input."""

import argparse
import errno
import fcntl
import json
import math
import os
import re
import shutil

import pytest
import torch
from conftest import ROOT, SIZES, TEXT, tiny_model, tiny_tokenizer, write_jsonl
from sacrebleu.metrics import CHRF
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
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import evaluate
from data import evaluation, instruct

LANGUAGES = evaluate.LANGUAGES
WORDS = ["river", "mill", "wheel", "capital", "Paris", "hills", "children", "rain", "house", "sea"]
PAPER = ["mt", "sum", "mrc", "mmlu"]


def write_choices(path, question, n):
    """Write `n` questions with options of different lengths."""
    rows = []
    for i in range(n):
        row = {"sample_id": f"{path.parent.name}/{i}", "subject": "ab"[i % 2]}
        row |= {"question": question.format(WORDS[i]), "answer": "ABCD"[i % 4]}
        for j, option in enumerate(evaluate.OPTIONS):
            row[option] = ["नदी घर ", WORDS[(i + j) % 10]][j % 2] * (j + 1)
        rows.append(row | {"shared_stem": i % 3 == 0})
    write_jsonl(path, rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small evaluation folder with every optional file and column, and wide characters."""
    folder = tmp_path_factory.mktemp("data")
    chats = []
    for text in (*TEXT, "Çay — 5 €."):
        question = {"role": "user", "content": "What is it?"}
        chats.append({"messages": [question, {"role": "assistant", "content": text}]})
    write_jsonl(folder / "en/heldout.jsonl", chats)
    write_jsonl(folder / "en/prose.jsonl", [{"text": " ".join(TEXT)}, {"text": "\ufeff" + TEXT[0]}])
    target = [{"text": TEXT[2], "domain": "udhr"}, {"text": TEXT[3] * 9, "domain": "cldr"}]
    write_jsonl(folder / "ne/heldout.jsonl", target)
    write_choices(folder / "en/mmlu.test.jsonl", "Where do the {} run?", 8)
    write_choices(folder / "ne/mmlu.test.jsonl", "नेपाल {} —", 8)
    pairs = []
    for i, word in enumerate(WORDS):
        pair = {"id": i, "domain": "xy"[i % 2], "eng_Latn": f"The {word} is {i} years old."}
        pairs.append(pair | {"npi_Deva": f"{TEXT[3][: 5 + 3 * i]} {i}"})
    write_jsonl(folder / "ne/flores.dev.jsonl", pairs[:4])
    write_jsonl(folder / "ne/flores.devtest.jsonl", pairs[4:])
    return folder


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    """XL-Sum, Belebele and MMLU in miniature, for English and the five languages."""
    folder = tmp_path_factory.mktemp("papers")
    four = ["ONE", "TWO", "THREE", "FOUR"]
    for lang in LANGUAGES:
        sums = [{"id": f"x{i}", "text": "TEXT", "summary": TEXT[i]} for i in range(3)]
        write_jsonl(folder / f"{lang}/xlsum.jsonl", sums)
        passages = []
        for i in range(9):
            row = {"link": "l", "question_number": i, "flores_passage": "PASSAGE"}
            row |= {"question": "QUESTION", "correct_answer_num": f"{i % 4 + 1}"}
            passages.append(row | dict(zip(evaluate.ANSWERS, four, strict=True)))
        write_jsonl(folder / f"{lang}/belebele.jsonl", passages)
        for part, n in (("dev", 5), ("test", 4)):
            rows = []
            for i in range(2 * n):
                subject = ["high_school_physics", "law"][i // n]
                row = {"sample_id": f"{subject}/{part}/{i}", "subject": subject}
                row |= {"question": "QUESTION", "answer": "ABCD"[i % n % 4]}
                rows.append(row | dict(zip(evaluate.OPTIONS, four, strict=True)))
            write_jsonl(folder / f"{lang}/mmlu.{part}.jsonl", rows)
        pairs = []
        for i in range(4):
            sentences = {found["flores"]: "SENTENCE" for found in LANGUAGES.values()}
            pairs.append({"id": i} | sentences)
        write_jsonl(folder / f"{lang}/flores.dev.jsonl", pairs)
        write_jsonl(folder / f"{lang}/flores.devtest.jsonl", pairs[:1])
    return folder


@pytest.fixture(scope="module")
def model(llama):
    found = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    found.generation_config = GenerationConfig()
    return found


def run(model, data, out, *more):
    """Return eval.json of a tiny evaluation."""
    argv = ["--model", model, "--lang", "ne", "--data-dir", data, "--out", out, "--runs", 2]
    argv += ["--device", "cpu", "--max-new-tokens", 8, "--batch-tokens", 800, *more]
    evaluate.main(list(map(str, argv)))
    return json.loads(out.read_text())


def items_of(out):
    lines = out.with_name(out.stem + ".items.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines[1:-1]]


def make_items(folder, lang, tasks, model, *more, context=2**40):
    """Return the items of an evaluation."""
    argv = ["--model", "m", "--lang", lang, "--data-dir", str(folder), "--out", "o.json"]
    argv += ["--tasks", ",".join(tasks), "--runs", "1", "--seed", "1"]
    args = evaluate.parse_args([*argv, *map(str, more)])
    args.context, args.files = context, []
    return evaluate.make_items(args, AutoTokenizer.from_pretrained(model)).values()


@pytest.fixture(scope="module")
def whole(llama, data, tmp_path_factory):
    """(eval.json, items) of one uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "eval.json"
    return run(llama, data, out), items_of(out)


def reference_loglik(model, prompt, part):
    """The sum of log p(token | all before) with nothing batched, padded or cut, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + part])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(part))


# ---- Log-likelihood, generation, batches ---------------------------------------------------------


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
        some = [(prefix + prompt, part) for prompt, part in rows]
        want = [reference_loglik(double, prompt, part) for prompt, part in some]
        assert evaluate.loglik(single, some, len(prefix)) == pytest.approx(want, abs=2e-4)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_padded_greedy_generation_equals_one_by_one(model, penalty, monkeypatch):
    """Also under a repetition penalty, which must not see the padding."""
    prompts = [[1, 70, 80, 90, *range(100, 100 + n)] for n in (9, 1, 30, 14)]
    prompts.append([1, 70, 80, 90, 33])
    sampling = {"do_sample": False, "repetition_penalty": penalty}
    alone = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 12, "eos_token_id": [2, 60], "pad_token_id": 2} | sampling
        new = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        alone.append(new[0, len(prompt) :].tolist())
    given, real = [], model.generate

    def generate(ids, **options):
        given.extend(ids.tolist())
        return real(ids, **options)

    monkeypatch.setattr(model, "generate", generate)
    assert evaluate.generate(model, prompts, 12, [2, 60], sampling)[0] == alone
    assert [set(row) for row in given] == [set(prompt) for prompt in prompts]
    stop = alone[0][4]
    cut = evaluate.generate(model, prompts, 12, [2, stop], sampling)[0][0]
    assert cut == alone[0][: alone[0].index(stop) + 1]


def random_model(architecture, config):
    """Return a model whose predictions depend clearly on all of its context."""
    torch.manual_seed(0)
    model = architecture(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 else torch.nn.init.normal_(p, 1.0, 0.1)
    model.generation_config = GenerationConfig()
    return model


def batches_work(model, config, context=512):
    return instruct.can_batch(model, config, context, evaluate.loglik, evaluate.generate)


SMALL = SIZES | {"vocab_size": 400, "num_key_value_heads": 2}
BUILT = {
    "full": (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=None)),
    "window": (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=16)),
    "alibi": (BloomForCausalLM, BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4)),
    "recurrent": (
        MambaForCausalLM,
        MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2),
    ),
}


def test_batches_stay_where_rounding_decides_between_two_tokens():
    model = random_model(*BUILT["full"])
    with torch.no_grad():
        model.lm_head.weight[1::2] = model.lm_head.weight[::2]
    torch.manual_seed(0)

    def round_otherwise(module, inputs, logits):
        return logits + len(logits[1:]) * 2**-8 * logits * torch.rand_like(logits)

    model.bfloat16().lm_head.register_forward_hook(round_otherwise)
    assert batches_work(model, model.config)


@pytest.mark.parametrize("kind", BUILT)
def test_every_way_equals_plain_rows_one_by_one(kind, capsys):
    model = random_model(*BUILT[kind])
    args = evaluate.parse_args("--model m --lang ne --data-dir d --out o.json --greedy".split())
    args.max_new_tokens = 6
    if not batches_work(model, model.config):
        args.batch_tokens = 0
        assert kind == "recurrent" and "one by one" in capsys.readouterr().out
    draw = torch.Generator().manual_seed(3)

    def ids(n):
        return torch.randint(3, 300, (n,), generator=draw).tolist()

    prefix, prompts = ids(20), [ids(n) for n in (40, 3, 25)]
    saved = {"task": "mmlu", "side": "source", "run": 0, "domain": None, "shots": 5}
    items = [(saved, prefix + prompt, [[40], [41, 42]]) for prompt in prompts]
    for _, batch in evaluate.make_batches(items, args):
        for found, (_, prompt, parts) in zip(
            evaluate.answer(model, batch, args, [399]), batch, strict=True
        ):
            want = [reference_loglik(model, prompt, part) for part in parts]
            assert found == pytest.approx(want, abs=1e-2, rel=1e-4)
    alone = {}
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        alone[tuple(prompt)] = tokens[len(prompt) :]
    items = [({"task": "mt", "side": "source", "run": 0}, prompt, []) for prompt in prompts]
    for _, batch in evaluate.make_batches(items, args):
        found = evaluate.answer(model, batch, args, [399])
        assert found == [alone[tuple(prompt)] for _, prompt, _ in batch]


def test_what_batches_get_wrong_is_done_one_by_one(capsys):
    """Here positions are counted from the left end of a row, padding included."""
    model = random_model(*BUILT["full"])
    plain = model.forward

    def forward(input_ids=None, position_ids=None, past_key_values=None, **more):
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        places = torch.arange(past, past + input_ids.shape[1])[None].expand(len(input_ids), -1)
        more |= {"position_ids": places // 3, "past_key_values": past_key_values}
        return plain(input_ids=input_ids, **more)

    assert batches_work(model, model.config)
    model.forward = forward
    assert not batches_work(model, model.config)
    assert "mistral: everything is done one by one" in capsys.readouterr().out
    args = evaluate.parse_args("--model m --lang ne --data-dir d --out o.json".split())
    items = [({"task": "mt", "side": "source", "run": 0}, [5] * n, []) for n in (4, 5, 6)]
    assert [len(batch) for _, batch in evaluate.make_batches(items, args)] == [3]
    args.batch_tokens = 0
    assert [len(batch) for _, batch in evaluate.make_batches(items, args)] == [1, 1, 1]


def test_a_window_too_long_to_try_is_done_one_by_one():
    sizes = SMALL | {"max_position_embeddings": 8192}
    model = random_model(MistralForCausalLM, MistralConfig(**sizes, sliding_window=5000))
    assert not batches_work(model, model.config, 8192)
    assert batches_work(model, model.config, 4096)  # no text reaches the window


def test_batches_do_not_exceed_the_budget_nor_lose_an_item():
    args = evaluate.parse_args("--model m --lang ne --data-dir d --out o.json".split())
    args.batch_tokens, args.max_new_tokens = 60, 1
    sizes = [5, 30, 7, 7, 100, 1, 12, 30]
    items = [
        ({"task": "mt", "side": "s", "run": 0, "id": i}, [0] * (n - 1), [])
        for i, n in enumerate(sizes)
    ]
    found = [[item[0]["id"] for item in batch] for _, batch in evaluate.make_batches(items, args)]
    assert sorted(sum(found, [])) == list(range(8)) and found[0] == [4]
    assert all(len(b) == 1 or len(b) * max(sizes[i] for i in b) <= 60 for b in found)


# ---- Prompts -------------------------------------------------------------------------------------


def test_mt_prompts_are_table_7_with_few_shots_and_one_bos(whole):
    rows = [r for r in whole[1] if r["task"] == "mt" and r["id"] == 5]
    source, target = (
        next(r["prompt"] for r in rows if r["side"] == side) for side in ("source", "target")
    )
    for prompt, ask in (
        (source, "Translate Nepali to English: "),
        (target, "अङ्ग्रेजीलाई नेपालीमा अनुवाद गर्नुहोस्: "),
    ):
        assert prompt.count(f"<|im_start|>user\n{ask}") == 4
        assert prompt.count("<|im_start|>assistant\n") == 4
    end = " =<|im_end|>\n<|im_start|>assistant\n"
    assert source.endswith(" 5" + end)
    assert target.endswith(f": The {WORDS[5]} is 5 years old." + end)
    assert rows[0]["reference"] == f"The {WORDS[5]} is 5 years old."
    english = [f"The {WORDS[i]} is {i} years old." for i in range(4)]  # dev, for the examples
    nepali = [f"{TEXT[3][: 5 + 3 * i]} {i}" for i in range(4)]
    for prompt, asked, answers in ((source, nepali, english), (target, english, nepali)):
        turns = [turn.partition("\n")[2] for turn in prompt.split("<|im_end|>\n")][:-2]
        numbers = [asked.index(turn.partition(": ")[2][:-2]) for turn in turns[0::2]]
        assert [answers[i] for i in numbers] == turns[1::2] and len(set(numbers)) == 3


@pytest.mark.parametrize("lang", [lang for lang in LANGUAGES if lang != "en"])
def test_prompts_are_those_of_table_7(lang, papers, llama):
    """prompts.json holds the prompts as the paper prints them, with SENTENCE, TEXT, ... in them."""
    golden = json.loads((ROOT / "tests/prompts.json").read_text())
    seen = set()
    for record, _, _ in make_items(papers, lang, PAPER, llama):
        first, *asked = record["prompt"].split("<|im_start|>user\n")
        task, side = record["task"], record["side"]
        if task == "mt":
            want = golden[lang][f"mt {side}"]
        else:
            want = golden["en" if side == "source" else lang][task]
        if record["domain"] == "law":
            want = want.replace("high school physics", "law")
        assert asked[-1] == want + "<|im_end|>\n<|im_start|>assistant\n"
        assert {turn.split("<|im_end|>")[0] for turn in asked} == {want} and not first
        assert len(asked) - 1 == {"mt": 3, "sum": 0, "mrc": 3, "mmlu": 5}[task]
        seen.add((task, side))
    assert len(seen) == 8


def test_a_letter_takes_the_space_that_a_template_ends_with():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f" {letter}" for letter in "ABCD"])
    tokenizer.chat_template = (
        "{{ messages[-1]['content'] }}{% if add_generation_prompt %}: {% endif %}"
    )
    args = argparse.Namespace(context=512)
    _, prompt, letters = evaluate.lettered(args, tokenizer, {}, "Which?", [])
    assert tokenizer.decode(prompt) == "Which?:"
    assert tokenizer.batch_decode(letters) == [" A", " B", " C", " D"]


def test_a_language_may_have_some_prompts_of_its_own(monkeypatch):
    monkeypatch.setitem(LANGUAGES, "xx", {"name": "X", "prompts": {"sum": "Resume: {text}"}})
    (_, english), (_, language) = evaluation.sides(argparse.Namespace(lang="xx"))
    assert language["prompts"] == english["prompts"] | {"sum": "Resume: {text}"}


def test_a_language_without_prompts_is_asked_for_a_summary_in_it(papers, llama, monkeypatch):
    monkeypatch.setitem(LANGUAGES, "ne", {"name": "Tigrinya"})
    prompts = [record["prompt"] for record, _, _ in make_items(papers, "ne", ["sum"], llama)]
    asked = [re.search("Summarize the following text in (.*?):", prompt)[1] for prompt in prompts]
    assert asked == ["English"] * 3 + ["Tigrinya"] * 3


def test_belebele_answers_are_those_of_its_numbers(papers, llama, tmp_path):
    """Of the questions and of the examples; an item is never its own example."""
    lines = (papers / "ne/belebele.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"question": f"Q{i}?"} for i, line in enumerate(lines)]
    for lang in ("en", "ne"):
        write_jsonl(tmp_path / lang / "belebele.jsonl", rows)
    for record, _, _ in make_items(tmp_path, "ne", ["mrc"], llama):
        turns = re.findall(r"Q(\d)\?.*?assistant\n(\w?)", record["prompt"], re.S)
        *shots, asked = turns
        assert record["reference"] == "ABCD"[int(asked[0]) % 4] and record["id"] == f"l {asked[0]}"
        assert len(shots) == 3 and all(answer == "ABCD"[int(i) % 4] for i, answer in shots)
        assert len({number for number, _ in turns}) == 4


def test_examples_that_do_not_fit_the_context_are_left_out_and_counted(papers, llama):
    whole = {}
    for record, ids, _ in make_items(papers, "ne", ["mmlu"], llama):
        whole[record["side"], record["id"]] = (record, ids)
    longest = max(len(ids) for (side, _), (_, ids) in whole.items() if side == "source")
    assert longest < max(len(ids) for (side, _), (_, ids) in whole.items() if side == "target")
    for record, ids, _ in make_items(papers, "ne", ["mmlu"], llama, context=longest + 1):
        full, all_ids = whole[record["side"], record["id"]]
        assert len(ids) <= longest
        assert record["prompt"].count("<|im_start|>user") == record["shots"] + 1
        assert (record["shots"] == 5) == (len(all_ids) <= longest)
        assert full["prompt"].endswith(record["prompt"]) and full["shots"] == 5


def test_what_exceeds_the_context_is_cut_or_refused(papers, llama, tmp_path, capsys):
    row = {"id": "x", "text": " ".join(TEXT * 9), "summary": TEXT[0]}
    for lang in ("en", "ne"):
        write_jsonl(tmp_path / f"{lang}/xlsum.jsonl", [row])
    for context in (2**40, 512):
        for record, ids, _ in make_items(tmp_path, "ne", ["sum"], llama, context=context):
            assert record["shortened"] == (context == 512) == (len(ids) + 128 <= 512)
            assert record["prompt"].count(TEXT[0]) > 0  # the beginning stays
            if context == 512:
                assert len(ids) + 128 > 490
    for record, ids, _ in make_items(papers, "ne", ["mrc"], llama, context=40):
        assert record["shortened"] and len(ids) == 39 and record["shots"] == 0  # the end stays
    with pytest.raises(SystemExit):
        make_items(papers, "ne", ["sum"], llama, context=100)  # 128 are to be written
    assert "tokens, of 100 at most" in capsys.readouterr().err


def test_options_that_join_the_prompt_in_a_token_share_its_start():
    """`](` is a token: of the two options only one takes the prompt's last character."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["]("])
    before, parts = instruct.split_all(tokenizer, "Q]", ["a", "(a"])
    assert tokenizer.decode(before) == "Q" and tokenizer.batch_decode(parts) == ["]a", "](a"]


def test_another_language_changes_no_evaluation(monkeypatch):
    code = evaluation.code_sha256("ne")
    monkeypatch.setitem(LANGUAGES, "sw", {"name": "Swahili"})
    monkeypatch.setitem(LANGUAGES, "ky", LANGUAGES["ky"] | {"name": "Kirghiz"})
    assert evaluation.code_sha256("ne") == code != evaluation.code_sha256("ky")
    monkeypatch.setitem(LANGUAGES, "ne", LANGUAGES["ne"] | {"name": "Nepalese"})
    assert evaluation.code_sha256("ne") != code


def test_questions_are_drawn_by_the_seed(papers, llama):
    def asked(seed):
        found = {"mrc": [], "mmlu": []}
        more = ["--num-questions", 3, "--seed", seed]
        for item, _, _ in make_items(papers, "ne", list(found), llama, *more):
            if item["side"] == "source":
                found[item["task"]].append(item["id"])
        return found

    first, second = asked(1), asked(2)
    assert {len(names) for names in (*first.values(), *second.values())} == {3}
    assert first == asked(1) and first["mrc"] != second["mrc"] and first["mmlu"] != second["mmlu"]
    subjects = {name.split("/")[0] for name in first["mmlu"] + second["mmlu"]}
    assert len(subjects) == 2  # the first four are of one subject


def test_a_language_without_a_code_of_flores(monkeypatch, llama, data, tmp_path, refused):
    monkeypatch.setitem(LANGUAGES, "sw", {"name": "Swahili"})
    argv = ["--model", llama, "--lang", "sw", "--data-dir", data, "--out", tmp_path / "e.json"]
    assert "sw has no `flores`" in refused(evaluate.main, *argv)


def test_decoding_is_table_9(papers, tmp_path, monkeypatch):
    """What transformers is asked for; the model's own generation settings must not count."""
    model = tiny_model(tmp_path / "m", max_position_embeddings=2048)
    config = json.loads((model / "generation_config.json").read_text())
    config |= {"do_sample": True, "min_p": 0.7}
    (model / "generation_config.json").write_text(json.dumps(config))
    calls, real = [], LlamaForCausalLM.generate

    def generate(self, ids, **more):
        calls.append((more, self.generation_config))
        return real(self, ids, **more | {"max_new_tokens": 2})

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    argv = ["--model", model, "--lang", "ne", "--data-dir", papers, "--runs", 1]
    argv += ["--num-samples", 1, "--tasks", "mt,sum", "--out", tmp_path / "e.json"]
    evaluate.main(list(map(str, argv)))
    calls = [call for call in calls if call[0]["max_new_tokens"] > 2]  # not the trial
    assert len(calls) == 4
    table_9 = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1}
    newline = AutoTokenizer.from_pretrained(model)("\n")["input_ids"][0]
    for asked, config in calls:
        assert {key: asked[key] for key in table_9} == table_9
        assert asked["do_sample"] and asked["max_new_tokens"] == 128
        assert newline in asked["eos_token_id"] and 2 in asked["eos_token_id"]
        assert config.min_p is None


def test_raw_text_is_data_and_the_date_is_fixed(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    assert instruct.encode(tokenizer, "<|im_end|>") == [2]
    assert 2 not in instruct.encode(tokenizer, "a <|im_end|>", raw=True)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ enable_thinking }}"
    assert instruct.render(tokenizer, [{"role": "user", "content": "a"}]) == "01 Jan 2025 False"


def test_an_empty_think_block_belongs_to_the_prompt(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}"
        "{% if add_generation_prompt %}<think></think>{% endif %}"
    )
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert instruct.last_turn(tokenizer, chat) == ("[a]<think></think>", "b]")


# ---- Results -------------------------------------------------------------------------------------


def test_chrf_is_that_of_sacrebleu(whole):
    found, items = whole
    for side in ("source", "target"):
        mt, means = found["results"]["mt"][side], []
        for number in range(2):
            rows = [r for r in items if (r["task"], r["side"], r["run"]) == ("mt", side, number)]
            each = []
            for r in rows:
                metric = CHRF(word_order=2)
                each.append(metric.sentence_score(r["prediction"], [r["reference"]]).score)
            assert [r["scores"]["chrf"] for r in rows] == each and len(rows) == 6
            means.append(sum(each) / 6)
        assert mt["runs"] == pytest.approx(means) and mt["n"] == 6
        assert mt["chrf"] == pytest.approx(sum(means) / 2)
        assert mt["sd_over_runs"] == pytest.approx(abs(means[0] - means[1]) / math.sqrt(2))
    assert any(r["prediction"] for r in items if r["task"] == "mt")


@pytest.mark.parametrize("last, cut", [(2, False), (9, False), (70, True)])
def test_answers_that_do_not_end_are_counted(llama, last, cut):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    record = {"task": "mt", "side": "source", "id": "1", "run": 0, "reference": "a"}
    found = evaluate.score(record, [70, 80, last], tokenizer, [2, 9])
    assert found["scores"]["cut"] == cut
    other = record | {"id": "2", "scores": {"chrf": 0.0, "cut": False}}
    assert evaluate.summarize([found, other])["mt"]["source"]["cut"] == cut / 2


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
    size = len((" ".join(TEXT) + TEXT[0]).encode())  # the byte order mark is no text
    assert whole[0]["results"]["bpb"]["source"]["prose"]["bytes"] == size


def test_windows_score_each_token_once_and_fit_the_context(llama, model, data, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    folder = tiny_model(tmp_path / "m", max_position_embeddings=64)
    found = run(folder, data, tmp_path / "eval.json", "--tasks", "bpb")["results"]["bpb"]
    tokens = size = nats = 0
    for text in (TEXT[2], TEXT[3] * 9):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for a in range(0, len(ids), 63):
            nats -= reference_loglik(model, [ids[a - 1]] if a else [2], ids[a : a + 63])
        tokens, size = tokens + len(ids), size + len(text.encode())
    assert tokens > 3 * 64
    found = found["target"]["heldout"]
    assert (found["tokens"], found["bytes"], found["documents"]) == (tokens, size, 2)
    assert found["bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert {r["domain"] for r in items_of(tmp_path / "eval.json")} == {None, "udhr", "cldr"}


def test_a_window_begins_with_the_end_of_a_long_prompt():
    first = next(evaluate.windows([*range(9)], [20, 21, 22, 23, 24], 8))
    assert first == (0, [5, 6, 7, 8], [20, 21, 22, 23])


def test_likelihoods_of_a_bf16_model_are_in_fp32(llama):
    half = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).eval()
    prompt, part = [5, 70, 80], [90, 100, 110, 120]
    with torch.no_grad():
        logits = half(torch.tensor([prompt + part[:-1]])).logits[0, 2:].double().log_softmax(-1)
    exact = float(logits.gather(1, torch.tensor(part)[:, None]).sum())
    assert evaluate.loglik(half, [(prompt, part)]) == pytest.approx([exact], abs=1e-4)


def test_multiple_choice_by_hand(whole, model, llama, data):
    tokenizer, letters = AutoTokenizer.from_pretrained(llama), {}
    for side, lang in (("source", "en"), ("target", "ne")):
        right = []
        for line in (data / f"{lang}/mmlu.test.jsonl").read_text().splitlines():
            row, per_byte = json.loads(line), []
            for option in evaluate.OPTIONS:
                prompt, text = row["question"], " " + row[option]
                if side == "source":
                    prompt = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
                    text = row[option]
                ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, text)]
                if side == "target":
                    ids[0] = [2, *ids[0]]
                per_byte.append(reference_loglik(model, *ids) / len(row[option].encode()))
            letters[row["sample_id"]] = "ABCD"[per_byte.index(max(per_byte))]
            right.append(letters[row["sample_id"]] == row["answer"])
        share = sum(right) / 8
        assert whole[0]["results"]["mcq"][side] == {"accuracy": share, "n": 8, "shortened": 0}
    found = [r for r in whole[1] if r["task"] == "mcq"]
    assert {r["id"]: r["prediction"] for r in found} == letters and len(set(letters.values())) > 1
    assert {r["domain"] for r in found} == {"a", "b"}
    assert {r["shared_stem"] for r in found} == {True, False}


def test_ties_count_as_one_of_k():
    record = {"task": "mmlu", "reference": "B"}
    for found, correct in (
        ([-1.0, -1.0, -2.0, -3.0], 0.5),
        ([-1.0] * 4, 0.25),
        ([-1.0, -2.0, -1.0, -9.0], 0),
    ):
        assert evaluate.score(record, found, None, [])["scores"]["correct"] == correct


def test_paper_tasks_by_hand(papers, llama, model, tmp_path):
    argv = ["--tasks", "sum,mrc,mmlu", "--batch-tokens", "3000", "--num-questions", "7"]
    found = run(llama, papers, tmp_path / "eval.json", *argv)["results"]
    tokenizer, right = AutoTokenizer.from_pretrained(llama), {}
    for r in items_of(tmp_path / "eval.json"):
        if r["task"] == "sum":
            continue
        prompt = instruct.encode(tokenizer, r["prompt"])
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
        want = [float(logprobs[instruct.encode(tokenizer, letter)]) for letter in "ABCD"]
        assert r["scores"]["loglik"] == pytest.approx(want, abs=2e-4)
        assert r["prediction"] == "ABCD"[want.index(max(want))]
        right.setdefault((r["task"], r["side"]), []).append(r["prediction"] == r["reference"])
        answers = [turn[0] for turn in r["prompt"].split("<|im_start|>assistant\n")[1:-1]]
        if r["task"] == "mmlu":
            assert answers == [*"ABCDA"][5 - r["shots"] :]
            assert r["prompt"].count(r["domain"]) == r["shots"] + 1
    for (task, side), values in right.items():
        share = pytest.approx(sum(values) / 7)
        assert found[task][side] == {"accuracy": share, "n": 7, "shortened": 0}
    assert found["sum"]["target"]["n"] == 3 and len(found["sum"]["target"]["runs"]) == 2


# ---- Interruptions and settings ------------------------------------------------------------------


@pytest.mark.parametrize("after", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_killed_run_goes_on_to_the_same_results(llama, data, whole, tmp_path, monkeypatch, after):
    out, items, done = tmp_path / "r/eval.json", tmp_path / "r/eval.items.jsonl", []
    right = evaluate.answer

    def killed(*arguments):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(1)
        return right(*arguments)

    monkeypatch.setattr(evaluate, "answer", killed)
    with pytest.raises(SystemExit) as stopped:
        run(llama, data, out)
    assert stopped.value.code == 130 and not out.exists()
    lines = items.read_bytes().splitlines(keepends=True)
    assert 1 < len(lines) < len(whole[1]) + 1
    # As kill -9 leaves it: in the middle of a line.
    items.write_bytes(b"".join(lines[:-1]) + lines[-1][:-20])
    monkeypatch.setattr(evaluate, "answer", right)
    again = run(llama, data, out)
    assert json.dumps(again["results"]) == json.dumps(whole[0]["results"])
    assert again["settings"] == whole[0]["settings"] and items_of(out) == whole[1]


def test_only_the_same_run_is_resumed(llama, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "eval.json"
    first = run(llama, data, out, "--tasks", "mcq")
    monkeypatch.setattr(instruct, "load_model", None)  # all is done: nothing is loaded
    assert run(llama, data, out, "--tasks", "mcq")["results"] == first["results"]
    with pytest.raises(TypeError):
        run(llama, data, out, "--tasks", "mcq", "--seed", 1)
    assert "starting again" in capsys.readouterr().out
    run_first = out.with_name("eval.items.jsonl").read_text().split("\n")[0]
    assert json.loads(run_first)["settings"]["seed"] == 1
    kept = out.with_name("eval.items.jsonl.old").read_text().split("\n")
    assert json.loads(kept[0])["settings"]["seed"] == 42 and len(kept) > 3
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    with pytest.raises(TypeError):
        run(llama, data, out, "--tasks", "mcq", "--seed", 1)
    assert "starting again" in capsys.readouterr().out


def test_seeds_and_greedy(llama, data, whole, tmp_path):
    def answers(*more):
        run(llama, data, tmp_path / "eval.json", "--tasks", "mt", *more)
        found = items_of(tmp_path / "eval.json")
        return {(r["side"], r["run"], r["id"]): r["prediction"] for r in found}

    first = answers()
    for r in whole[1]:
        if r["task"] == "mt":
            assert first[r["side"], r["run"], r["id"]] == r["prediction"]
    runs = [[first["source", run, i] for i in range(4, 10)] for run in (0, 1)]
    assert runs[0] != runs[1]
    other = answers("--seed", 43)  # its first run is the second run of 42
    assert runs[1] == [other["source", 0, i] for i in range(4, 10)]
    greedy = answers("--greedy", "--num-samples", 3)
    assert len(greedy) == 6 and {run for _, run, _ in greedy} == {0}
    found = json.loads((tmp_path / "eval.json").read_text())["results"]["mt"]
    assert {numbers["sd_over_runs"] for numbers in found.values()} == {0}


# ---- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("--lang", "de", "argument --lang: 'de' is not one of am ha ig ky ne"),
        ("--tasks", "bpb,sums", "--tasks bpb,sums"),
        ("--num-samples", 0, "--num-samples 0: must be at least 1"),
        ("--num-questions", 0, "--num-questions 0: must be at least 1"),
        ("--seed", 10**15, "--seed 1000000000000000: must be from 0 to"),
        ("--model", "no/such/model", "model no/such/model: no such directory"),
        ("--model", "no", "model no is no directory"),
        ("--out", "/dev/null/x/eval.json", "/dev/null"),
        ("--out", "ssu-0.5", "--out: ssu-0.5 does not end in .json"),
        ("--data-dir", "nowhere", "No such file or directory: 'nowhere/en/heldout.jsonl'"),
    ],
)
def test_bad_arguments(llama, data, tmp_path, refused, name, value, message):
    argv = {"--model": llama, "--lang": "ne", "--data-dir": data, "--out": tmp_path / "r/eval.json"}
    words = []
    for pair in (argv | {name: value}).items():
        words += pair
    assert message in refused(evaluate.main, *words, "--device", "cpu")
    assert not (tmp_path / "r").exists()


CHOICE = {"sample_id": 1, "subject": "a", "question": "q", "answer": "A"}
CHOICE |= dict.fromkeys(evaluate.OPTIONS, "x")
PAIR = json.dumps({"id": 1, "eng_Latn": "a", "npi_Deva": "b"})
USER, NOTHING = {"role": "user", "content": "a"}, {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("en/heldout", "", "heldout.jsonl is empty"),
        ("en/heldout", '{"text": "a"}\n{"text"\n', "line 2 is not one JSON object"),
        ("ne/heldout", b'{"text": "\xff"}\n', "line 1 is not one JSON object in UTF-8"),
        ("ne/heldout", '{"a": "a"}\n', "line 1 is not one JSON object in UTF-8 with text ('text')"),
        ("ne/heldout", '{"text": ' + "[" * 200000, "line 1 is not"),
        ("ne/heldout", '\n\n{"text": "\\ud83d"}', "line 3 is not"),
        ("ne/heldout", '{"text": " "}', "a text is empty"),
        ("en/heldout", json.dumps({"messages": [USER]}), "messages do not end"),
        ("en/heldout", json.dumps({"messages": [USER, NOTHING]}), "a text is empty"),
        ("en/heldout", '{"messages": ["a"]}', "line 1 is not"),
        ("en/heldout", '{"messages": [{"role": "user", "content": ["a"]}]}', "line 1 is not"),
        ("ne/flores.devtest", PAIR + "\n" + PAIR.replace("b", ""), "line 2 is not"),
        ("ne/flores.devtest", PAIR + "\n" + PAIR, "two items have this id"),
        ("ne/mmlu.test", json.dumps(CHOICE | {"option_c": None}), "line 1 is not"),
        ("en/mmlu.test", json.dumps(CHOICE | {"answer": "E"}), "answer is none of A, B, C, D"),
    ],
)
def test_bad_data(llama, data, tmp_path, refused, file, content, message):
    shutil.copytree(data, tmp_path / "data")
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / f"data/{file}.jsonl").write_bytes(raw)
    argv = ["--model", llama, "--lang", "ne", "--data-dir", tmp_path / "data"]
    assert message in refused(evaluate.main, *argv, "--out", tmp_path / "r/eval.json")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "task, file, wrong",
    [
        ("mrc", "ne/belebele", {"correct_answer_num": 5}),
        ("mmlu", "en/mmlu.dev", {"answer": 1}),  # as in the original MMLU
    ],
)
def test_an_answer_that_is_no_letter_is_refused_in_examples_too(
    task, file, wrong, llama, papers, tmp_path, refused
):
    path = shutil.copytree(papers, tmp_path / "data") / f"{file}.jsonl"
    first, *rows = map(json.loads, path.read_text().splitlines())
    write_jsonl(path, [first | wrong, *rows])
    argv = ["--model", llama, "--lang", "ne", "--data-dir", tmp_path / "data", "--tasks", task]
    line = refused(evaluate.main, *argv, "--out", tmp_path / "r/eval.json")
    assert f"{file}.jsonl: line 1 is not" in line and f"({next(iter(wrong))} is none of " in line


def test_an_option_without_tokens_and_a_foreign_script_are_refused(
    llama, data, monkeypatch, refused
):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    argv = ["--model", llama, "--lang", "ne", "--data-dir", data, "--out", "/nowhere/e.json"]
    plain = instruct.split

    def nothing(tokenizer, prompt, text, raw=False):
        return plain(tokenizer, prompt, text, raw)[0], []

    with monkeypatch.context() as patch:
        patch.setattr(instruct, "split", nothing)
        assert "an option has no token" in refused(evaluate.main, *argv, "--tasks", "mcq")
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(plain(tokenizer, "", TEXT[3])[1][0])
    monkeypatch.setattr(
        instruct, "load_tokenizer", lambda _: (AutoConfig.from_pretrained(llama), tokenizer)
    )
    assert "of the tokens are <unk>" in refused(evaluate.main, *argv, "--tasks", "bpb")


def test_models_that_are_not_causal_or_damaged_are_refused(capsys, refused, llama, data, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = BertConfig(vocab_size=400, intermediate_size=48, **sizes)
    with pytest.raises(SystemExit):
        batches_work(random_model(BertLMHeadModel, bert), bert)
    assert "bert is not a causal language model" in capsys.readouterr().err
    argv = ["--lang", "ne", "--data-dir", data, "--out", tmp_path / "e.json", "--tasks", "mcq"]
    shutil.copytree(llama, tmp_path / "nan")
    broken = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    broken.save_pretrained(tmp_path / "nan")
    assert "not finite" in refused(
        evaluate.main, *argv, "--model", tmp_path / "nan", "--device", "cpu"
    )
    shutil.copytree(llama, tmp_path / "misfit")
    config = (llama / "config.json").read_text()
    smaller = config.replace('"intermediate_size": 48', '"intermediate_size": 40')
    (tmp_path / "misfit/config.json").write_text(smaller)
    assert "mismatch" in refused(evaluate.main, *argv, "--model", tmp_path / "misfit")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    tokenizer.save_pretrained(tmp_path / "misfit")
    assert "no such role" in refused(evaluate.main, *argv, "--model", tmp_path / "misfit")


def test_a_foreign_out_is_kept_and_one_process_writes_it(llama, data, tmp_path, refused):
    argv = ["--model", llama, "--lang", "ne", "--data-dir", data, "--tasks", "mcq", "--out"]
    (tmp_path / "mine.json").write_text("{}")
    assert "no earlier run wrote it" in refused(evaluate.main, *argv, tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text() == "{}"
    (tmp_path / "folder.json").mkdir()
    assert "Is a directory" in refused(evaluate.main, *argv, tmp_path / "folder.json")
    assert "among the files of the model" in refused(evaluate.main, *argv, llama / "eval.json")
    with open(tmp_path / "e.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process writes" in refused(evaluate.main, *argv, tmp_path / "e.json")


def test_damaged_items_and_a_full_disk_are_one_line(llama, data, tmp_path, refused, monkeypatch):
    out, items = tmp_path / "eval.json", tmp_path / "eval.items.jsonl"
    argv = ["--model", llama, "--lang", "ne", "--data-dir", data, "--tasks", "mcq", "--out", out]
    evaluate.main(list(map(str, argv)))
    before = out.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left on device" in refused(evaluate.main, *argv)
    assert out.read_bytes() == before
    items.write_text(items.read_text().replace('"task": "mcq"', '"task": mcq', 1))
    assert "eval.items.jsonl is damaged" in refused(evaluate.main, *argv)
