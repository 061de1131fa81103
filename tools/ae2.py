"""Judge the answers of ae2 as in the paper: AlpacaEval 2, by GPT-4.1 nano, a paid API.

    pip install alpaca-eval==0.6.6 "scikit-learn<1.10" "setuptools<81"
    OPENAI_API_KEY=... python tools/ae2.py runs/ne/*/chat.json

chat_eval.py writes the answers of each run beside chat.json. For each answer, alpaca_eval asks the
judge whether it is better than that of GPT-4 (1106-preview), with AlpacaEval 2's own prompt and
settings. The mean length-controlled win rate over the runs, in percent, goes into chat.json.
Judgments are kept in chat.ae2-judge beside it, so none is paid for twice.
"""

import argparse
import functools
import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import errors
from data.rows import write_atomically

fail = functools.partial(errors.fail, "ae2.py")

JUDGE = "gpt-4.1-nano-2025-04-14"
DATA, REFERENCE = "tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json"
PROMPT = "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"  # in the package alpaca_eval


def judge_config(prompt):
    """Return AlpacaEval 2's settings for the paper's judge. prompt: absolute path of its prompt.

    A relative path would be looked for beside the folder of the settings.
    """
    completion = {"model_name": JUDGE, "max_tokens": 1, "temperature": 1}
    completion |= {"logprobs": True, "top_logprobs": 5}
    parser = {"numerator_token": "m", "denominator_tokens": ["m", "M"], "is_binarize": False}
    return {
        "prompt_template": str(prompt),
        "fn_completions": "openai_completions",
        "completions_kwargs": completion,
        "fn_completion_parser": "logprob_parser",
        "completion_parser_kwargs": parser,
        "completion_key": "completions_all",
        "batch_size": 1,
    }


def read_chat(path):
    """Return a chat.json, and the answers of each of its runs."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content["format"], content["version"]) != ("ssu-chat", 1):
            raise ValueError("another format or version")
        runs = content["settings"]["runs"]
        if "ae2" not in content["results"]:
            raise ValueError("it has no answers of ae2")
    except (OSError, ValueError, LookupError, TypeError) as error:
        fail(f"{path} cannot be read ({error}). Make it with tools/chat_eval.py --tasks ae2")
    answers = []
    for run in range(runs):
        file = path.with_name(f"{path.stem}.ae2-{run}.json")
        try:
            answers.append(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            fail(f"{file} cannot be read ({error}). Make it with tools/chat_eval.py --tasks ae2")
    return content, answers


def reference_answers():
    """Return the answers of GPT-4 (1106-preview), which alpaca_eval itself cannot load any more."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        file = hf_hub_download(DATA, REFERENCE, repo_type="dataset")
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, HTTPError) as error:
        fail(f"the hub did not give {DATA}, {REFERENCE} ({error}). Check the network")


def win_rate(answers, reference, folder, name):
    """Return the length-controlled win rate, in percent, of the answers of one run."""
    from alpaca_eval import evaluate
    from openai import OpenAIError

    try:
        table, _ = evaluate(
            model_outputs=answers,
            reference_outputs=reference,
            annotators_config=str(folder.absolute()),
            name=name,
            output_path=None,
            precomputed_leaderboard=None,
            is_return_instead_of_print=True,
            metric_kwargs={"save_weights_dir": None},
        )
    except OpenAIError as error:
        fail(f"the judge did not answer ({error}). The same command continues")
    row = table.loc[name]
    if row["n_total"] < len(answers):
        missing = len(answers) - int(row["n_total"])
        fail(f"{name}: {missing} answers have no judgment. Run it again to ask for them")
    return float(row["length_controlled_winrate"])


def judge(path, reference, prompt):
    """Judge the answers of a chat.json and write the win rate into it."""
    content, answers = read_chat(path)
    folder = path.with_name(f"{path.stem}.ae2-judge")
    folder.mkdir(exist_ok=True)
    config = json.dumps({"paper": judge_config(prompt)}, indent=1)  # JSON is YAML, too
    write_atomically(folder / "configs.yaml", config + "\n")
    rates = []
    for run, some in enumerate(answers):
        print(f"{path}: run {run}, {len(some)} answers, judged by {JUDGE}")
        rates.append(win_rate(some, reference, folder, f"run {run}"))
    spread = statistics.stdev(rates) if len(rates) > 1 else 0.0
    found = {"win_rate": statistics.fmean(rates), "sd_over_runs": spread, "runs": rates}
    content["results"]["ae2"]["source"] |= found | {"judge": {"name": JUDGE}}
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    print(f"wrote {path}: {found['win_rate']:.1f}% +- {spread:.1f}")


def run(args):
    # Check what is needed before anything is paid for.
    for path in args.chat:
        read_chat(path)
    if not os.environ.get("OPENAI_API_KEY"):
        fail("the judge is a paid API: set OPENAI_API_KEY")
    try:
        import alpaca_eval
    except ImportError as error:
        package = "alpaca-eval==0.6.6 'scikit-learn<1.10' 'setuptools<81'"
        fail(f"ae2 is judged by alpaca_eval: pip install {package} ({error})")
    reference = reference_answers()
    prompt = Path(alpaca_eval.__file__).parent / "evaluators_configs" / PROMPT
    for path in args.chat:
        judge(path, reference, prompt)
    print("next: python tools/report.py DIRECTORY")


def main(argv=None):
    parser = argparse.ArgumentParser(
        "ae2.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chat", nargs="+", type=Path, help="chat.json of tools/chat_eval.py")
    try:
        run(parser.parse_args(argv))
    except OSError as error:
        fail(f"a file cannot be read or written ({error}). Correct its name, or free space")
    except KeyboardInterrupt:
        print("ae2.py: interrupted. The same command continues", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
