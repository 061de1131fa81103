r"""Measure chat abilities in English: benchmarks of Section 4.5 that need more than evaluate.py.

    chat           fixed prompts: does the model stop, repeat itself, answer in English?
    ifeval, gsm8k  by lm-evaluation-harness, with its own prompts, stops and metrics
    ae2            answers to AlpacaEval's instructions, as files that alpaca_eval judges
    codemix        the fraction of these answers that GlotLID does not hold for English (footnote 9)
    mtb            MT-Bench, judged by Flow-Judge
    t3             the Tulu 3 safety suite, judged by WildGuard: gated, so HF_TOKEN must be set

    python tools/chat_eval.py --model runs/ne/ssu-wanda/model --lang ne --data-dir data/paper \
        --tasks ifeval,gsm8k,ae2,codemix,mtb,t3 --out runs/ne/ssu-wanda/chat.json

Decoding is that of Table 9, and greedy in `chat` and `t3`. The model answers everything. Then it is
freed and the judges of mtb and t3 are loaded, one after the other (tools/judged.py). tools/ae2.py
has the answers of ae2 judged, by a paid API.

Every finished item goes to chat.items.jsonl beside chat.json. The same command continues from
there: a model that has nothing left to do is not loaded.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import unicodedata
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
from data import instruct
from data.evaluation import (
    check_out,
    code_sha256,
    fail,
    json_file,
    locked,
    read_rows,
    versions_for,
)
from data.identity import git_commit, sha256_of
from data.models import context_of
from data.rows import LANGUAGES, language_code, write_atomically
from evaluate import GREEDY, SAMPLING
from tools import judged
from tools.answers import ask_all, resume

GLOTLID = ("cis-lmu/glotlid", "model_v3.bin", "e773fb98e530c58837b11c61f94653f6fe7e1465")
# lm-eval's task, examples, metric, filter; IFEval limits its new tokens to 1,280 itself
HARNESS = {
    "ifeval": ("leaderboard_ifeval", 0, "prompt_level_strict_acc", "none"),
    "gsm8k": ("gsm8k", 5, "exact_match", "strict-match"),
}
TASKS = ("chat", "ifeval", "gsm8k", "ae2", "codemix", "mtb", "t3")
CHAT_SAMPLING = SAMPLING | {"top_p": 0.8}  # Table 9: AE2, IFEval, GSM8K
NEW_TOKENS = {"ae2": 512, "chat": 128}  # Table 9 for AE2
CHAT_PROMPTS = (
    "Why do leaves change colour in autumn? Answer in two or three sentences.",
    "What is the capital of France? Answer in one sentence.",
    "How do I make a cup of tea?",
    "Write a short, polite message asking a neighbour to turn the music down.",
    "I could not sleep last night. What can I do this evening?",
    "Name three things to pack for a day in the mountains, and say why.",
)


def parse_args(argv=None):
    def tasks(text):
        asked = text.split(",")
        if set(asked) - set(TASKS):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of some of {','.join(TASKS)}")
        if "codemix" in asked:  # it looks at the answers of ae2
            asked.append("ae2")
        return [task for task in TASKS if task in asked]

    parser = argparse.ArgumentParser(
        "chat_eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="directory of a checkpoint, or hub id")
    add("--lang", required=True, type=language_code, help="target language")
    add("--data-dir", required=True, help="directory with en/ and the target language")
    add("--out", required=True, type=json_file, help="chat.json to write")
    add("--tasks", type=tasks, default=list(TASKS[1:5]), help=f"some of {','.join(TASKS)}")
    questions = "questions of each task, without T3's macro average in t3 (default: all)"
    add("--num-questions", type=int, help=questions)
    add("--runs", type=int, default=3, help="sampled runs, with seeds SEED, SEED + 1, ...")
    add("--greedy", action="store_true", help="one deterministic run instead")
    add("--batch-tokens", type=int, default=8192, help="largest number of tokens in a batch")
    add("--language-id", choices=("glotlid", "script"), default="glotlid", help="judge of codemix")
    add("--mtb-judge", default=judged.JUDGES["mtb"], help="directory or hub id of mtb's judge")
    add("--t3-judge", default=judged.JUDGES["t3"], help="directory or hub id of t3's judge")
    add("--seed", type=int, default=42, help="seed of the first run")
    add("--dtype", choices=evaluate.DTYPES, help="precision (default: bfloat16 on cuda)")
    devices = evaluate.DEVICES
    add("--device", choices=devices, default=devices[-1], help="device (default: cuda, if any)")
    args = parser.parse_args(argv)
    if args.runs < 1 or args.batch_tokens < 1 or (args.num_questions or 1) < 1:
        parser.error("--runs, --batch-tokens and --num-questions must be at least 1")
    if args.greedy:
        args.runs = 1
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args


def english_confidence(how, lang):
    """Return a function from an answer to the confidence in [0, 1] that it is English.

    The function returns None for an answer without letters. `glotlid` is the paper's judge: softmax
    over English and the target language alone. `script` is the fraction of Latin letters, for where
    GlotLID cannot be had.
    """
    code = LANGUAGES[lang].get("flores")
    if code is None:
        fail(f"codemix: {lang} has no `flores` in data/languages.json. Add its code")
    if how == "script":
        if code.endswith("_Latn"):
            fail(f"--language-id script: {lang} and English share a script. Choose glotlid")
        return script_confidence
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        import fasttext

        model = fasttext.load_model(hf_hub_download(*GLOTLID[:2], revision=GLOTLID[2]))
    except ImportError:
        fail("codemix by GlotLID needs fastText: pip install fasttext-numpy2==0.10.4")
    except (OSError, ValueError, HTTPError) as error:
        fail(f"the hub did not give {GLOTLID[0]} ({error}). Choose --language-id script")
    target = f"__label__{code}"
    if target not in model.get_labels():
        fail(f"GlotLID does not know {code}, the `flores` of {lang}. Correct data/languages.json")

    def confidence(text):
        if not any(c.isalpha() for c in text):
            return None
        labels, odds = model.predict(" ".join(text.split()), k=-1)  # one line, all languages
        found = dict(zip(labels, map(float, odds), strict=True))
        floor = 1e-5  # which fastText adds to each: without it, a third language counts as neither
        english, other = (
            max(0.0, found.get(label, 0.0) - floor) for label in ("__label__eng_Latn", target)
        )
        return english / (english + other) if english + other else 0.0

    return confidence


def script_confidence(text):
    letters = [c for c in text if c.isalpha()]
    if not letters:
        return None
    return statistics.fmean(unicodedata.name(c, "").startswith("LATIN") for c in letters)


def harness_tasks(tasks):
    """Return lm-eval's TaskManager, once its data and metrics for `tasks` are there."""
    try:
        from lm_eval.models.huggingface import HFLM  # noqa: F401
        from lm_eval.tasks import TaskManager

        if "ifeval" in tasks:
            import nltk
            from lm_eval.tasks.leaderboard.ifeval import utils  # noqa: F401

            nltk.data.find("tokenizers/punkt_tab")
    except ImportError as error:
        fail(f"ifeval and gsm8k need lm-eval: pip install 'lm-eval[hf,ifeval]==0.4.13' ({error})")
    except LookupError:
        fail("ifeval counts sentences with a file of nltk: python -m nltk.downloader punkt_tab")
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    manager = TaskManager()
    for task in tasks:
        try:
            manager.load([HARNESS[task][0]])
        except (OSError, ValueError, DatasetsError, HTTPError) as error:
            fail(f"lm-eval could not load {HARNESS[task][0]} ({error}). Check the network")
    return manager


def harness(loaded, manager, task, seed, limit, sampling, batch_size):
    """Run GSM8K or IFEval once, as a chat. Return [{id, prompt, prediction, correct}, ...].

    loaded: model, tokenizer, the ids that end an answer.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, ends = loaded
    model.generation_config.eos_token_id = ends  # lm-eval itself stops a batch as a whole
    options = {"batch_size": batch_size, "enable_thinking": False}
    name, shots, metric, chosen = HARNESS[task]
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, **options),
        tasks=[name],
        num_fewshot=shots,
        limit=limit,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        gen_kwargs=dict(sampling),
        torch_random_seed=seed,
        bootstrap_iters=0,
        task_manager=manager,
    )
    samples = []
    for sample in found["samples"][name]:
        if sample["filter"] == chosen:
            samples.append(
                {
                    "id": sample["doc_id"],
                    "prompt": sample["arguments"][0][0],
                    "prediction": sample["resps"][0][0],
                    "correct": float(sample[metric]),
                }
            )
    return samples


def trigrams(text):
    """Return [(word, its character trigrams), ...]; a word is lower-case letters and marks."""
    words = []
    for word in text.lower().split():
        word = "".join(c for c in word if unicodedata.category(c)[0] in "LM")
        if word:
            words.append((word, [f" {word} "[i : i + 3] for i in range(len(word))]))
    return words


def english_odds(english_rows, target_rows):
    """Return {trigram: log-odds of English against the target}: add-one smoothed naive Bayes."""
    counts = []
    for rows in (english_rows, target_rows):
        count = Counter()
        for row in rows:
            for turn in row.get("messages") or [{"content": row.get("text")}]:
                for _, grams in trigrams(turn["content"]):
                    count.update(grams)
        counts.append(count)
    english, target = counts
    both = english | target
    prior = math.log((target.total() + len(both)) / (english.total() + len(both)))
    return {gram: math.log((english[gram] + 1) / (target[gram] + 1)) + prior for gram in both}


def chat_scores(text, odds):
    """Return the fraction of repeated word 4-grams, and letters in words more likely English."""
    words = text.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    english = letters = 0
    for word, found in trigrams(text):
        letters += len(word)
        if sum(odds.get(gram, 0.0) for gram in found) > 0:
            english += len(word)
    repetition = 1 - len(set(grams)) / len(grams) if grams else 0.0
    return {"repetition": repetition, "letters": letters, "english_letters": english}


def instructions(tokenizer, rows):
    """Return the prompts of `ae2` or `chat` for ask_all."""
    asked = {}
    for i, row in enumerate(rows):
        prompt = instruct.encode(tokenizer, instruct.ask(tokenizer, row["instruction"]))
        asked[i] = prompt, {"instruction": row["instruction"], "dataset": row.get("dataset")}
    return asked


def summarize_chat(answers, odds):
    """Return the rates over all answers of `chat`, and the answers."""
    found = []
    for item in answers:
        said = {"prompt": item["instruction"], "answer": item["output"]}
        found.append(said | {"stopped": item["stopped"]} | chat_scores(item["output"], odds))
    letters = max(1, sum(answer["letters"] for answer in found))
    return {
        "stop_rate": statistics.fmean(answer["stopped"] for answer in found),
        "repetition": statistics.fmean(answer["repetition"] for answer in found),
        "english_share": sum(answer["english_letters"] for answer in found) / letters,
        "n": len(found),
        "answers": found,
    }


def share_correct(samples):
    return statistics.fmean(sample["correct"] for sample in samples)


def summarize(done, args, english, odds):
    """Return `results` of chat.json from all finished items."""
    results = {}
    for task in HARNESS:
        runs = [done[task, run, 0]["samples"] for run in range(args.runs) if task in args.tasks]
        if runs:
            means = [share_correct(run) for run in runs]
            spread = statistics.stdev(means) if len(means) > 1 else 0.0
            found = {"accuracy": statistics.fmean(means), "sd_over_runs": spread}
            results[task] = {"source": found | {"runs": means, "n": len(runs[0])}}
    if "chat" in args.tasks:
        answers = [done["chat", 0, i] for i in range(len(CHAT_PROMPTS))]
        results["chat"] = summarize_chat(answers, odds)
    answers = [item for key, item in done.items() if key[0] == "ae2"]
    if answers:
        stopped = statistics.fmean(item["stopped"] for item in answers)
        results["ae2"] = {"source": {"stop_rate": stopped, "n": len(answers) // args.runs}}
    if "codemix" in args.tasks:  # below 0.9 an answer is code-mixed (footnote 9)
        confidences = [english(item["output"]) for item in answers]
        found = [c for c in confidences if c is not None]
        share = statistics.fmean(c < 0.9 for c in found) if found else None
        results["codemix"] = {"source": {"share": share, "n": len(found)}}
    return results


def read_texts(args):
    """Return the instructions of ae2 and the trigram odds of chat, where they are asked for."""
    rows, odds = [], None
    if "ae2" in args.tasks:
        rows = read_rows(args, "source", "ae2", ["instruction"])[: args.num_questions]
    if "chat" in args.tasks:
        english = read_rows(args, "source", "heldout", ["text"])
        odds = english_odds(english, read_rows(args, "target", "heldout", ["text"]))
    return rows, odds


def write_for_judge(path, rows, run, done, generator):
    """Write the answers of one run as alpaca_eval reads them."""
    answers = []
    for i in range(len(rows)):
        item = done["ae2", run, i]
        answer = {name: item[name] for name in ("instruction", "output", "dataset")}
        answers.append(answer | {"generator": generator})
    write_atomically(path, json.dumps(answers, ensure_ascii=False, indent=1) + "\n")


def expected(args, rows, texts):
    """Return the keys of all items that the evaluated model makes."""
    keys = {("chat", 0, i) for i in range(len(CHAT_PROMPTS)) if "chat" in args.tasks}
    for run in range(args.runs):
        keys |= {(task, run, 0) for task in HARNESS if task in args.tasks}
        keys |= {("ae2", run, i) for i in range(len(rows))}
    for task, some in texts.items():
        keys |= {(task, *name) for name in judged.names_of(task, some, args)}
    return keys


def answer_everything(args, found, manager, rows, texts, items):
    """Load the evaluated model and save all its answers. found: its folder, config, tokenizer.

    manager: lm-eval's; rows: instructions of ae2; texts: what judged.read returned.
    """
    folder, config, tokenizer = found
    done, save = items
    model, ends, _ = instruct.load_model(folder, tokenizer, args.dtype, args.device)
    context = context_of(config)
    batched = instruct.can_batch(model, config, context, evaluate.loglik, evaluate.generate)
    loaded = model, tokenizer, ends, batched, context
    if "chat" in args.tasks:
        asked = instructions(tokenizer, [{"instruction": prompt} for prompt in CHAT_PROMPTS])
        ask_all(loaded, "chat", 0, asked, NEW_TOKENS["chat"], GREEDY, args, items)
    sampling = GREEDY if args.greedy else CHAT_SAMPLING
    size = max(1, args.batch_tokens // 2048) if batched else 1
    for number in range(args.runs):
        for task in HARNESS:
            if task in args.tasks and (task, number, 0) not in done:
                seed, limit = args.seed + number, args.num_questions
                samples = harness(loaded[:3], manager, task, seed, limit, sampling, size)
                save({"task": task, "run": number, "id": 0, "samples": samples})
        if rows:
            asked = instructions(tokenizer, rows)
            ask_all(loaded, "ae2", number, asked, NEW_TOKENS["ae2"], sampling, args, items)
    for task, some in texts.items():
        judged.answer_all(loaded, task, some, args, items)


def run(args):
    # Check what is needed before any model is loaded
    items_path = args.out.with_suffix(".items.jsonl")
    check_out(args.out, "ssu-chat")
    check_out(items_path, "ssu-chat-items")
    args.files = []
    rows, odds = read_texts(args)
    texts = judged.read(args)
    judged.check_access(args)
    folder, model_sha256 = instruct.find_model(args.model, args.out)
    config, tokenizer = instruct.load_tokenizer(folder)
    english = None
    if "codemix" in args.tasks:
        english = english_confidence(args.language_id, args.lang)
    asked = [task for task in HARNESS if task in args.tasks]
    manager = harness_tasks(asked) if asked else None
    context = context_of(config)
    if "ifeval" in asked and context <= 1280:
        what = f"ifeval generates up to 1,280 tokens, and {args.model} takes {context}"
        fail(f"{what}. Leave it out of --tasks")
    judges = {task: judged.find_judge(task, args) for task in texts}
    for task, judge in judges.items():
        judged.check_contexts(task, texts[task], tokenizer, context, judge, args)

    # An interrupted run continues only with the same of all this
    names = "tasks num_questions runs greedy batch_tokens language_id seed dtype device lang"
    settings = {name: getattr(args, name) for name in names.split()}
    header = {"format": "ssu-chat-items", "version": 1, "settings": settings}
    header["model_sha256"] = model_sha256
    header["data_sha256"] = sha256_of(args.files)
    scripts = [f"tools/{name}.py" for name in ("chat_eval", "answers", "judged")]
    header["code_sha256"] = code_sha256(args.lang, "evaluate.py", *scripts)
    header["versions"] = versions_for(args.device)
    if asked:
        header["versions"]["lm-eval"] = version("lm-eval")
    header["judges"] = {task: sha256 for task, (*_, sha256) in judges.items()}
    items = resume(items_path, header)
    done, _ = items

    # Answer and judge, and save each item
    left = expected(args, rows, texts) - done.keys()
    print(f"{args.model} on {args.device} in {args.dtype}: {len(left)} items to make")
    if left:
        answer_everything(args, (folder, config, tokenizer), manager, rows, texts, items)
    if rows:
        for number in range(args.runs):
            path = args.out.with_suffix(f".ae2-{number}.json")
            write_for_judge(path, rows, number, done, args.model)
    for task, judge in judges.items():
        free_models()
        judged.judge_all(judge, task, texts[task], args, items)

    results = summarize(done, args, english, odds)
    for task, (*_, sha256) in judges.items():
        found = judged.summarize(task, texts[task], args, done)
        found["judge"] = {"name": getattr(args, f"{task}_judge"), "sha256": sha256}
        results[task] = {"source": found}
    content = {"format": "ssu-chat", "version": 1, "model": args.model, "lang": args.lang}
    about = {"model_sha256": model_sha256, "data_sha256": header["data_sha256"]}
    content |= {"settings": settings | about}
    content |= {"versions": header["versions"]}
    content |= {"device": args.device, "git_commit": git_commit(), "results": results}
    write_atomically(args.out, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    print(f"wrote {args.out}; every item is in {items_path}")
    print("next: python tools/report.py DIRECTORY")


def free_models():
    """Give the memory of models back that are not referred to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(argv=None):
    args = parse_args(argv)
    instruct.check_outside(args.out, args.model)  # a lock would change which model it is
    try:
        with locked(args.out):
            run(args)
    except torch.OutOfMemoryError as error:
        fail(f"{error}. Lower --batch-tokens")
    except OSError as error:
        what = f"a file cannot be read or written ({error})"
        fail(f"{what}. Check --data-dir, --out and free space")
    except KeyboardInterrupt:
        print("chat_eval.py: interrupted; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
