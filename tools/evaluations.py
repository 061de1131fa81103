"""Read the evaluations of run directories for tools/report.py. Refuse what cannot be compared."""

import functools
import json

from data import errors
from tools.methods import display_name, in_order
from tools.tables import look_up

fail = functools.partial(errors.fail, "report.py")

# What no method decides. Others of train.jsonl's settings belong to one, or change only rounding.
TRAINING = ("steps", "batch_size", "seq_len", "lr", "warmup_ratio", "weight_decay", "max_grad_norm")
TRAINING += ("seed", "precision", "optimizer", "data")


def read_json(path, form, script):
    """Return the content of an eval.json or chat.json."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content["format"], content["version"], type(content["results"])) != (form, 1, dict):
            raise ValueError("another format or version")
        content["settings"] |= {"lang": content["lang"]}
    except (ValueError, LookupError, TypeError) as error:
        fail(f"{path} cannot be read ({error}). Make it again with {script}")
    return content


def read_eval(folder):
    """Return eval.json, with the results of chat.json if there is one of the same model."""
    found = read_json(folder / "eval.json", "ssu-eval", "evaluate.py")
    if (folder / "chat.json").exists():
        chat = read_json(folder / "chat.json", "ssu-chat", "tools/chat_eval.py")
        if chat["settings"].pop("model_sha256", None) != found["settings"].get("model_sha256"):
            print(f"{folder}/chat.json is of another model, and is left out. Make it again")
            return found
        del chat["settings"]["lang"]  # that of eval.json
        found["settings"] |= {f"chat {key}": value for key, value in chat["settings"].items()}
        for task, numbers in chat["results"].items():
            if judge := look_up(numbers, "source/judge"):
                found["settings"][f"judge of {task}"] = judge
        found["results"] |= chat["results"]
    return found


def check_settings(folder, settings, expected):
    """Fail if two evaluations differ in more than the model: they cannot be compared."""
    for key in sorted(settings.keys() - {"model_sha256"}):
        if settings[key] != expected.get(key):
            pair = f"{settings[key]}, and {expected.get(key)} of the source model"
            fail(f"{folder} cannot be compared: {key} is {pair}. Evaluate one of them again")


def training_differences(folder, methods):
    """Return a sentence for each method of a run directory that was trained with other settings.

    They are told by its train.jsonl, and compared with those of the first method that has one.
    """
    found, sentences = {}, []
    for method in methods:
        log = folder / method / "train.jsonl"
        try:
            first = log.read_text(encoding="utf-8").partition("\n")[0] if log.exists() else "{}"
            if "settings" in (line := json.loads(first)):
                found[method] = {key: line["settings"].get(key) for key in TRAINING}
        except (ValueError, TypeError, AttributeError) as error:
            fail(f"{log} cannot be read ({error}). Delete the damaged line")
    base, expected = next(iter(found.items()), (None, {}))
    for method, settings in found.items():
        differences = [key for key in TRAINING if settings[key] != expected[key]]
        if differences:
            ours = ", ".join(f"{key} {settings[key]}" for key in differences)
            theirs = ", ".join(f"{expected[key]}" for key in differences)
            names = display_name(method), display_name(base)
            sentences.append(f"{names[0]} was trained with {ours} ({names[1]}: {theirs}).")
    return sentences


def read_runs(folders, chosen):
    """Return {method: [eval.json of each run directory]}, in the order of the paper's tables."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        fail("a run directory is given twice, and would count as two seeds. Name each once")
    evals = {}
    for folder in folders:
        if not (folder / "source/eval.json").is_file():
            fail(f"{folder}/source/eval.json is missing. Evaluate the source model first")
        source = read_eval(folder / "source")
        if evals:  # seeds may differ from one run directory to the next
            seeds = {key: source["settings"].get(key) for key in ("seed", "chat seed")}
            check_settings(folder, source["settings"], evals["source"][0]["settings"] | seeds)
        for path in sorted(folder.glob("*/eval.json")):
            method = path.parent.name
            if method == "source" or not chosen or method in chosen:
                found = read_eval(path.parent) | {"run": folder.name}
                check_settings(path.parent, found["settings"], source["settings"])
                evals.setdefault(method, []).append(found)
    for method in chosen or []:
        if method not in evals:
            fail(f"{folders[0]}/{method}/eval.json is missing. Evaluate it, or correct --methods")
    return {run: evals[run] for run in in_order(evals)}
