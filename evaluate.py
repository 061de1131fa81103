r"""Measure what a model keeps of its source language (English) and gains in the target language.

Stage 4 of SSU. Tasks: four of Section 4.5 (tools/chat_eval.py has the others), bpb and mcq:
    bpb    bits per byte of held-out text; in a chat, of the last answer and its end of turn
    mcq    multiple choice: the option with the highest log-likelihood per byte
    mt     translation: mean chrF++ over sentences, few-shot
    sum    summarization (XL-Sum): mean chrF++ over summaries, zero-shot
    mrc    reading comprehension (Belebele), 3-shot: the letter with the highest log-likelihood
    mmlu   knowledge (MMLU, Global-MMLU), 5-shot with questions of the subject: likewise

Prompts: Table 7 (data/languages.json). Decoding: Table 9, but an answer of mt or sum ends with its
line (`cut`: the share that did not). `source` is English (mt: to English), `target` the other one.

On a CPU, in a few minutes:
    python evaluate.py --model runs/ne/fft/model --lang ne --data-dir data/embedded \
        --out runs/ne/fft/eval.json --num-samples 100 --greedy --max-new-tokens 32
On one GPU, as published; on four, with the same results: torchrun --nproc_per_node=4 evaluate.py
    python evaluate.py --model MODEL --lang ne --data-dir data/paper --out eval.json \
        --tasks mt,sum,mrc,mmlu

Every finished item goes to eval.items.jsonl beside eval.json, with prompt, prediction and scores.
The same command, on any number of GPUs, continues from there to the results of a whole run.
"""

import data.interrupt  # noqa: F401  # isort: skip (Ctrl-C in the imports below)
import argparse
import inspect
import json
import math
import random
import statistics
import sys
from collections import Counter
from itertools import chain, islice

import sacrebleu
import torch
from tqdm import tqdm

from data import evaluation, instruct
from data.evaluation import fail, json_file, key_of, locked, read_rows, sample
from data.identity import git_commit, sha256_of
from data.models import DATE, check_unknown, context_of
from data.rows import LANGUAGES, language_code, to_lines, write_atomically
from variants import distributed

GREEDY = dict(do_sample=False)
SAMPLING = dict(do_sample=True, temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.1)
SHOTS = {"mt": 3, "mrc": 3, "mmlu": 5}  # Section 4.5
WINDOW = 1024  # tokens of a window in bpb
OPTIONS = ["option_a", "option_b", "option_c", "option_d"]
ANSWERS = ["mc_answer1", "mc_answer2", "mc_answer3", "mc_answer4"]
BPB_SETS = [("source", "heldout"), ("source", "prose"), ("source", "news"), ("target", "heldout")]
MMLU = ["sample_id", "subject", "question", *OPTIONS, "answer"]
BELEBELE = ["link", "question_number", "flores_passage", "question", *ANSWERS, "correct_answer_num"]
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
NOT_SETTINGS = ("model", "lang", "data_dir", "out", "timeout")


# ---- Tasks: each yields items, (what to save, prompt ids, [continuation ids to score, ...]) ------


def windows(prompt, tokens, size):
    """Yield (position, ids before, ids to score), `size` ids at most, so that each is scored once.

    The first window begins with the end of the prompt, any other with the last token before it.
    """
    before = prompt[-(size // 2) :]
    start, end = 0, size - len(before)
    while start < len(tokens):
        yield start, before, tokens[start:end]
        before = tokens[end - 1 : end]
        start, end = end, end + size - 1


def items_bpb(args, tokenizer):
    """Yield held-out text, or the last answer of a chat."""
    for side, base in BPB_SETS:
        rows = read_rows(args, side, base, ["text"], optional=base != "heldout")
        for number, row in sample(list(enumerate(rows, 1)), args):
            if row.get("messages"):
                text = row["messages"][-1]["content"]
                prompt, answer = instruct.last_turn(tokenizer, row["messages"])
                ids, tokens = instruct.split(tokenizer, prompt, answer)
            else:
                prompt, text = "", row["text"].removeprefix("\ufeff")
                ids, tokens = instruct.split(tokenizer, prompt, text, raw=True)
            for start, before, part in windows(ids, tokens, min(WINDOW, args.context)):
                saved = dict(side=side, id=f"{base}:{number}:{start}", domain=row.get("domain"))
                saved |= dict(prompt=prompt, reference=text, set=base)
                saved |= dict(tokens=len(part), bytes=len(text.encode()))
                yield saved, before, [part]
                prompt = text = ""  # the first window has the text and all its bytes


def items_mcq(args, tokenizer):
    """Yield chats with an option as answer for English, and raw text for the other language."""
    for side, _ in evaluation.sides(args):
        raw = side == "target"
        for row in sample(read_rows(args, side, "mmlu.test", MMLU), args):
            prompt = row["question"] if raw else instruct.ask(tokenizer, row["question"])
            options = [str(row[option]) for option in OPTIONS]
            texts = [f" {option}" for option in options] if raw else options
            before, parts = instruct.split_all(tokenizer, prompt, texts, raw)
            saved = dict(side=side, id=row["sample_id"], domain=row["subject"], prompt=prompt)
            saved |= dict(reference=row["answer"], options=options)
            saved |= dict(shared_stem=row.get("shared_stem"))
            yield saved, before, parts


def items_mt(args, tokenizer):
    """Yield items with the same examples, if they fit. X-to-English is asked in English."""
    room = args.context - args.max_new_tokens
    (_, english), (_, target) = evaluation.sides(args)
    columns = ["id", english["flores"], target["flores"]]
    dev = read_rows(args, "target", "flores.dev", columns)
    drawn = random.Random(args.seed).sample(dev, min(SHOTS["mt"], len(dev)))
    test = sample(read_rows(args, "target", "flores.devtest", columns), args)
    to_english = (english["prompts"]["mt_to_english"], target["flores"], english["flores"])
    from_english = (target["prompts"]["mt_from_english"], english["flores"], target["flores"])
    for side, (template, origin, goal) in (("source", to_english), ("target", from_english)):
        texts = [template.format(X=target["name"], sentence=row[origin]) for row in drawn + test]
        shots = [(text, row[goal]) for text, row in zip(texts[: len(drawn)], drawn, strict=True)]
        for text, row in zip(texts[len(drawn) :], test, strict=True):
            prompt, ids, fit = instruct.ask_within(tokenizer, text, shots, room)
            saved = dict(side=side, id=row["id"], domain=row.get("domain"), prompt=prompt)
            yield saved | dict(reference=row[goal], shots=fit), ids, []


def items_sum(args, tokenizer):
    """Yield texts to sum up in their language. The end of a text that does not fit is cut off."""
    for side, language in evaluation.sides(args):
        template = language["prompts"]["sum"].replace("{X}", language["name"])
        empty = instruct.encode(tokenizer, instruct.ask(tokenizer, template.format(text="")))
        room = args.context - args.max_new_tokens - len(empty) - 8  # 8 to spare
        for row in sample(read_rows(args, side, "xlsum", ["id", "text", "summary"]), args):
            text = instruct.shorten(tokenizer, row["text"], room)
            prompt = instruct.ask(tokenizer, template.format(text=text))
            saved = dict(side=side, id=row["id"], domain=None, prompt=prompt)
            saved |= dict(reference=row["summary"], shortened=text != row["text"])
            yield saved, instruct.encode(tokenizer, prompt), []


def lettered(args, tokenizer, saved, text, shots):
    """Return the item of a question with options A to D, given (question, letter) examples.

    There are fewer where all do not fit the model's context. A question that alone does not fit
    loses its beginning.
    """
    room = args.context - 1
    prompt, ids, fit = instruct.ask_within(tokenizer, text, shots, room)
    tail = prompt[-16:]  # enough characters to see how a letter joins the prompt
    before, letters = instruct.split_all(tokenizer, tail, "ABCD")
    joined = len(instruct.encode(tokenizer, tail)) - len(before)  # ids that a letter absorbs
    saved |= dict(prompt=prompt, shots=fit, shortened=len(ids) > room)
    return saved, ids[-room : len(ids) - joined], letters


def items_mrc(args, tokenizer):
    """Yield Belebele's questions. It has one split, so an item is never its own example."""
    for side, language in evaluation.sides(args):
        rows = []
        for row in read_rows(args, side, "belebele", BELEBELE):
            text = evaluation.in_words(language, row, ANSWERS, row["flores_passage"])
            letter = "ABCD"[int(row["correct_answer_num"]) - 1]
            rows.append((f"{row['link']} {row['question_number']}", text, letter))
        drawn = random.Random(args.seed).sample(rows, min(SHOTS["mrc"] + 1, len(rows)))
        for name, text, letter in sample(rows, args, args.num_questions or len(rows)):
            shots = [shot[1:] for shot in drawn if shot[0] != name][: SHOTS["mrc"]]
            saved = dict(side=side, id=name, domain=None, reference=letter)
            yield lettered(args, tokenizer, saved, text, shots)


def items_mmlu(args, tokenizer):
    """Yield questions, whose examples are the first of the subject in the dev split."""
    for side, language in evaluation.sides(args):
        dev, test = (read_rows(args, side, f"mmlu.{name}", MMLU) for name in ("dev", "test"))
        examples = {}  # {subject: [(question, letter), ...]}
        for number, row in enumerate(dev + sample(test, args, args.num_questions or len(test))):
            subject = row["subject"].replace("_", " ")
            text = language["prompts"]["mmlu"].format(subject=subject)
            text += evaluation.in_words(language, row, OPTIONS)
            shots = examples.setdefault(subject, [])
            if number < len(dev):
                shots.append((text, row["answer"]))
                continue
            if not shots:
                fail(f"{side}: mmlu.dev.jsonl has no question about {subject}. Add one")
            saved = dict(side=side, id=row["sample_id"], domain=subject, reference=row["answer"])
            yield lettered(args, tokenizer, saved, text, shots[: SHOTS["mmlu"]])


TASKS = {"bpb": items_bpb, "mcq": items_mcq, "mt": items_mt, "sum": items_sum}
TASKS |= {"mrc": items_mrc, "mmlu": items_mmlu}


def make_items(args, tokenizer):
    """Return {key: item} of all tasks, in a fixed order. Batches and seeds follow from it alone."""
    items, count = {}, Counter()
    for task in args.tasks:
        for saved, prompt, parts in TASKS[task](args, tokenizer):
            for run in range(1 if parts else args.runs):
                item = dict(task=task, run=run) | saved
                if key_of(item) in items:
                    fail(f"{key_of(item)}: two items have this id. Remove one")
                items[key_of(item)] = (item, prompt, parts)
            if len(parts) > 1 and not all(parts):
                fail(f"{key_of(item)}: an option has no token of its own. Repair it")
            length = len(prompt) + max(map(len, parts), default=args.max_new_tokens + 1) - 1
            if length > args.context:
                what = f"{key_of(item)}: {length} tokens, of {args.context} at most"
                fail(f"{what}. Remove it or, in mt and sum, lower --max-new-tokens")
            count.update(chain(prompt, *parts))

    check_unknown(tokenizer, count[tokenizer.unk_token_id], count.total(), args.data_dir, fail)
    return items


# ---- Log-likelihood and generation ---------------------------------------------------------------


def loglik(model, rows, shared=0):
    """Return the summed log-likelihood, in nats, of the last part of each row.

    rows: [(prompt ids, continuation ids), ...]. The first `shared` ids of all prompts are alike and
    are computed once. Rows are padded on the right, which a causal model does not see. The last
    token predicts nothing, so continuations of one token share the row of their prompt. Logits are
    kept from the first place that predicts a continuation.
    """
    inputs = list(dict.fromkeys(tuple(prompt + part[:-1])[shared:] for prompt, part in rows))
    width = max(map(len, inputs))
    ids = torch.tensor([row + row[-1:] * (width - len(row)) for row in inputs])  # [rows, width]
    options = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = shared + width + 1 - min(len(prompt) for prompt, _ in rows)
    with torch.inference_mode():
        if shared:
            options["past_key_values"] = instruct.cache_of(model, rows[0][0][:shared], len(inputs))
        logits = model(ids.to(model.device), use_cache=shared > 0, **options).logits

    sums = []
    left_out = shared + width - logits.shape[1]  # logits: [rows, places kept, vocabulary]
    for prompt, part in rows:
        row = inputs.index(tuple(prompt + part[:-1])[shared:])
        first = len(prompt) - 1 - left_out  # these logits predict part[0]
        logprobs = logits[row, first : first + len(part)].float().log_softmax(-1)
        sums.append(float(logprobs[range(len(part)), part].double().sum()))
    if not all(map(math.isfinite, sums)):
        fail("logits are not finite: the model's weights are damaged. Train or copy it again")
    return sums


def generate(model, prompts, max_new_tokens, stop_ids, options):
    """Return new ids after each prompt, up to the first of `stop_ids`, and their logits if asked.

    What all prompts begin with, such as examples, is computed once. Padding stands after it, and
    repeats the prompt's first token, so that a repetition penalty counts no other token.
    """
    shared = instruct.shared_start(model, prompts)
    width = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        padding = width - len(prompt)
        ids.append(prompt[:shared] + prompt[:1] * padding + prompt[shared:])
        mask.append([1] * shared + [0] * padding + [1] * (len(prompt) - shared))
    options = dict(max_new_tokens=max_new_tokens, eos_token_id=stop_ids) | options
    with torch.inference_mode():
        if shared:
            options["past_key_values"] = instruct.cache_of(model, prompts[0][:shared], len(prompts))
        found = model.generate(
            torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            pad_token_id=min(stop_ids or [0]),
            return_dict_in_generate=True,
            **options,
        )
    answers = []
    for tokens in found.sequences[:, width:].tolist():
        ends = [i + 1 for i, token in enumerate(tokens) if token in (stop_ids or [])]
        answers.append(tokens[: min(ends, default=len(tokens))])
    return answers, found.logits


def make_batches(items, args):
    """Return [(number, items), ...] with at most --batch-tokens tokens each, padding included.

    A batch, longest item first, has one task, side and run, in mrc and mmlu one subject and shots.
    """

    def tokens(item):
        saved, prompt, parts = item
        rows = len(parts) if saved["task"] == "mcq" else 1  # letters share a row
        return rows * (len(prompt) + max(map(len, parts), default=args.max_new_tokens))

    batches = {}
    for item in sorted(items, key=tokens, reverse=True):
        saved, budget = item[0], args.batch_tokens
        kind = (saved["task"], saved["side"], saved["run"])
        if saved["task"] in ("mrc", "mmlu"):
            kind = (*kind, saved["domain"], saved["shots"])
        elif saved["task"] in ("bpb", "mcq"):  # logits are kept at many places
            budget = budget // 8
        made = batches.setdefault(kind, [])
        if made and (len(made[-1]) + 1) * tokens(made[-1][0]) <= budget:
            made[-1].append(item)
        else:
            made.append([item])
    numbered = []
    for made in batches.values():
        numbered += enumerate(made)
    return numbered


def answer(model, batch, args, stop_ids):
    """Return new token ids, or the log-likelihoods of its continuations, for each item.

    With args.batch_tokens at 0, each continuation is computed by itself: see answer_all.
    """
    prompts = [prompt for _, prompt, _ in batch]
    rows = []
    for _, prompt, parts in batch:
        rows += [(prompt, part) for part in parts]
    if not rows:
        options = GREEDY if args.greedy else SAMPLING
        return generate(model, prompts, args.max_new_tokens, stop_ids, options)[0]
    if args.batch_tokens == 0:
        sums = iter([loglik(model, [row])[0] for row in rows])
    else:
        sums = iter(loglik(model, rows, instruct.common_start(prompts)))
    return [list(islice(sums, len(parts))) for _, _, parts in batch]


# ---- Metrics -------------------------------------------------------------------------------------


def score(saved, found, tokenizer, stop_ids):
    """Return the record with `prediction` and `scores`, given log-likelihoods or new ids."""
    if saved["task"] == "bpb":
        return saved | dict(prediction=None, scores=dict(nats=-found[0]))
    if saved["task"] in ("mt", "sum"):
        text = tokenizer.decode(found, skip_special_tokens=True).split("\n")[0].strip()
        chrf = sacrebleu.sentence_chrf(text, [saved["reference"]], word_order=2).score
        return saved | dict(prediction=text, scores=dict(chrf=chrf, cut=found[-1] not in stop_ids))
    values = found
    if saved["task"] == "mcq":
        sizes = [len(option.encode()) for option in saved["options"]]
        values = [nats / size for nats, size in zip(found, sizes, strict=True)]
    best = [letter for letter, x in zip("ABCD", values, strict=True) if x == max(values)]
    correct = (saved["reference"] in best) / len(best)  # a tie counts 1/k
    return saved | dict(prediction=best[0], scores=dict(correct=correct, loglik=found))


def summarize(records):
    """Return {task: {side: numbers}}, in bpb {task: {side: {set: numbers}}}."""
    groups, results = {}, {}
    for saved in records:
        groups.setdefault((saved["task"], saved["side"], saved.get("set")), []).append(saved)
    for (task, side, base), rows in groups.items():
        sides, scores = results.setdefault(task, {}), [row["scores"] for row in rows]
        shortened = {row["id"] for row in rows if row.get("shortened")}
        if task == "bpb":
            bits = math.fsum(found["nats"] for found in scores) / math.log(2)
            size, tokens = sum(row["bytes"] for row in rows), sum(row["tokens"] for row in rows)
            documents = sum(row["bytes"] > 0 for row in rows)
            numbers = dict(bpb=bits / size, bytes=size, tokens=tokens, documents=documents)
            sides.setdefault(side, {})[base] = numbers
        elif task in ("mt", "sum"):
            runs = {}
            for row in rows:
                runs.setdefault(row["run"], []).append(row["scores"]["chrf"])
            means = [statistics.fmean(runs[run]) for run in sorted(runs)]
            spread = statistics.stdev(means) if len(means) > 1 else 0.0
            numbers = dict(chrf=statistics.fmean(means), sd_over_runs=spread, runs=means)
            numbers |= dict(cut=statistics.fmean(found["cut"] for found in scores))
            sides[side] = numbers | dict(n=len(runs[0]), shortened=len(shortened))
        else:
            correct = statistics.fmean(found["correct"] for found in scores)
            sides[side] = dict(accuracy=correct, n=len(rows), shortened=len(shortened))
    return results


# ---- Command line, resume, main ------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser("evaluate.py", usage=argparse.SUPPRESS, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, names = parser.add_argument, ",".join(TASKS)
    add("--model", required=True, help="directory or hub id of an instruct model")
    add("--lang", required=True, type=language_code, help="code of the target language")
    add("--data-dir", required=True, help="directory with en/ and one for each target language")
    add("--out", required=True, type=json_file, help="file to write, eval.json")
    add("--tasks", default="bpb,mcq,mt", help=f"some of {names} (default: bpb,mcq,mt)")
    add("--num-samples", type=int, default=500, help="items of bpb, mcq, mt, sum (default: 500)")
    add("--num-questions", type=int, help="random items of mrc and mmlu (default: all)")
    add("--runs", type=int, default=3, help="sampled runs of mt and sum (default: 3)")
    add("--greedy", action="store_true", help="one run without sampling and repetition penalty")
    add("--max-new-tokens", type=int, default=128, help="tokens of an answer (default: 128)")
    add("--batch-tokens", type=int, default=8192, help="tokens of a batch (default: 8192)")
    add("--seed", type=int, default=42, help="seed of items, examples and samples (default: 42)")
    add("--dtype", choices=DTYPES, help="precision (default: bfloat16 on cuda, float32 on cpu)")
    add("--device", choices=DEVICES, default=DEVICES[-1], help="device (default: cuda, if any)")
    add("--timeout", type=float, default=10, help="minutes to wait for a rank (default: 10)")
    args = parser.parse_args(argv)
    for name in ("num_samples", "num_questions", "runs", "max_new_tokens", "batch_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if not 0 <= args.seed < 2**32:
        fail(f"--seed {args.seed}: must be from 0 to 2^32 - 1")
    asked = args.tasks.split(",")
    if set(asked) - set(TASKS):
        fail(f"--tasks {args.tasks}: there is no such task. Give some of {names}")
    args.tasks = [task for task in TASKS if task in asked]
    if "mt" in asked and "flores" not in LANGUAGES[args.lang]:
        fail(f"--tasks mt: {args.lang} has no `flores` in data/languages.json. Add its code")
    args.runs = 1 if args.greedy else args.runs
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args


def answer_all(args, folder, config, tokenizer, items, done, path):
    """Add what is not done yet to `done`, {key: record}, and to the items file."""
    model, ends, newlines = instruct.load_model(folder, tokenizer, args.dtype, args.device)
    batched = instruct.can_batch(model, config, args.context, loglik, generate)
    if not distributed.from_rank_zero(batched):
        args.batch_tokens = 0  # one by one
    left = []
    for number, batch in make_batches(items.values(), args):
        if not {key_of(saved) for saved, _, _ in batch} <= done.keys():
            left.append((number, batch))
    with tqdm(total=sum(len(batch) for _, batch in left), unit="item") as bar:
        for mine in distributed.rounds(left):
            records = []
            for number, batch in mine:
                # The seed follows from run and number: a resumed run samples what a whole one does.
                torch.manual_seed((args.seed + batch[0][0]["run"]) * 1_000_003 + number)
                found = answer(model, batch, args, ends + newlines)
                for (saved, _, _), values in zip(batch, found, strict=True):
                    records.append(score(saved, values, tokenizer, ends + newlines))
            for some in distributed.gather(records):
                done |= {key_of(saved): saved for saved in some}
                evaluation.append(path, some)
                bar.update(len(some))


def evaluate(args):
    # Read the data and build all prompts before the model is loaded.
    items_path = args.out.with_suffix(".items.jsonl")
    evaluation.check_out(args.out, "ssu-eval")
    evaluation.check_out(items_path, "ssu-eval-items")
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    folder, model_sha256 = instruct.find_model(args.model, args.out)
    config, tokenizer = instruct.load_tokenizer(folder)
    args.context, args.files = context_of(config), []
    items = make_items(args, tokenizer)
    print(f"{args.model} on {args.device} in {args.dtype}: {len(items)} items")

    # An interrupted run continues only with the same of all this.
    settings |= dict(model_sha256=model_sha256, data_sha256=sha256_of(args.files))
    settings |= dict(date=str(DATE.date()), enable_thinking=False)
    versions = evaluation.versions_for(args.device)
    header = dict(format="ssu-eval-items", version=3, lang=args.lang, settings=settings)
    header |= dict(versions=versions, code_sha256=evaluation.code_sha256(args.lang, "evaluate.py"))

    with locked(args.out):
        done = evaluation.resume(items_path, header)
        distributed.join(args.device, args.timeout)
        distributed.check_alike(settings | versions)
        done = distributed.from_rank_zero(done)
        if items.keys() - done.keys():
            answer_all(args, folder, config, tokenizer, items, done, items_path)
        if distributed.RANK > 0:
            return
        records = [done[key] for key in items]
        write_atomically(items_path, to_lines([header, *records]))

        content = dict(format="ssu-eval", version=1, model=args.model, lang=args.lang)
        content |= dict(settings=settings, versions=versions, device=args.device)
        content |= dict(git_commit=git_commit(), results=summarize(records))
        write_atomically(args.out, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    print(f"wrote {args.out}; every item is in {items_path}")
    print("next: python tools/report.py RUN, where RUN/source/eval.json is of the source model")


def main(argv=None):
    distributed.quiet()
    try:
        evaluate(parse_args(argv))
    except torch.OutOfMemoryError as error:
        fail(f"{error}. Lower --batch-tokens")
    except OSError as error:  # a missing file, a full disk
        fail(f"a file cannot be read or written ({error}). Check --data-dir and free space")
    except KeyboardInterrupt:
        print("evaluate.py: interrupted. The same command continues", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
