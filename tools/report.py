"""Report what each method of a run kept of English and gained in the target language.

    python tools/report.py runs/ne                       # report.md and pictures in runs/ne
    python tools/report.py runs/ne runs-43/ne --out DIR  # mean and standard deviation over seeds
    python tools/report.py --page docs/RESULTS.md        # remake the tables in a page

A run directory holds a directory for each method and one named source, each with the eval.json of
evaluate.py and, where it was made, the chat.json of tools/chat_eval.py. The tables are laid out as
the paper's Tables 2 to 6. Where the paper has the model and the language, its numbers stand below
ours. Pictures need matplotlib, and are drawn where there is data for them:
    kept.png        what each method keeps of English and gains in the target language
    ratio.png       both over the fraction frozen, for methods with three ratios (Figure 2)
    forgetting.png  held-out losses during training, from train.jsonl
    overlap.png     how far any two masks freeze the same weights, from mask.safetensors
The last two show the first run directory. The results also go to the model card of each model that
train.py made, METHOD/model/README.md.
"""

import argparse
import json
import os
import re
import statistics
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import broadcast_tensors

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.identity import digest_of
from evaluate import LANGUAGES, write_atomically
from tools import page, pictures
from tools.methods import display_name, in_order
from tools.tables import (
    COLUMNS,
    TABLE_2,
    ability_table,
    columns_of,
    has_table_2,
    improvement,
    look_up,
    markdown,
    measure,
    notes,
    table_2,
)
from variants import model_card

MARK = "Made by tools/report.py"  # in each file that this script writes, and may replace


def fail(message):
    """Print an error that the user can fix, in one line, and exit with code 2."""
    print(f"report.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


# --------------------------------------------------------------------------------------------------
# Evaluations


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
            fail(f"{folder}/chat.json is of another model than eval.json. Make it again")
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


def read_runs(folders, chosen):
    """Return {method: [eval.json of each run directory]}, in the order of the paper's tables."""
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
                found = read_eval(path.parent) | {"run": str(folder)}
                check_settings(path.parent, found["settings"], source["settings"])
                evals.setdefault(method, []).append(found)
    for method in chosen or []:
        if method not in evals:
            fail(f"{folders[0]}/{method}/eval.json is missing. Evaluate it, or correct --methods")
    return {run: evals[run] for run in in_order(evals)}


def tables(evals):
    """Return the parts of a report that are text: tables, and a line on what is in them."""
    source = evals["source"][0]
    values, lang = measure(evals), source["settings"]["lang"]
    target = LANGUAGES[lang]["name"]
    lines = []
    shown = TABLE_2 if has_table_2(values) else []
    if shown:
        lines.append(table_2(evals, values, lang, target))
        lines += notes(evals, [column for column in shown if ("source", column) in values])
    for side, title in (("source", "English"), ("target", target)):
        columns = [column for column in columns_of(side, values) if column not in shown]
        if columns:
            lines.append(ability_table(title, columns, evals, values))
            lines += notes(evals, columns)
    return lines


# --------------------------------------------------------------------------------------------------
# Masks


def read_masks(folder, methods):
    """Return {method: masks} of a run directory, all of the same model and undamaged."""
    masks, models = {}, set()
    for method in methods:
        path = folder / method / "mask.safetensors"
        if not path.is_file():
            continue
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                masks[method] = {name: file.get_tensor(name) for name in file.keys()}
            if metadata.get("tensors_sha256") != digest_of(masks[method]):
                raise ValueError("damaged, its digest does not match")
            models.add(metadata.get("fingerprint"))
            if len(models) > 1:
                raise ValueError("not of the same model as the masks beside it")
        except (OSError, SafetensorError, ValueError) as error:
            fail(f"{path} cannot be read ({error}). Make it again with make_mask.py")
    return masks


def overlap(a, b):
    """Return the Jaccard index of what two {name: mask} freeze, its mean over matrices, or None.

    Shapes may differ, such as [1, d_in] and [d_out, d_in]. What neither freezes does not count.
    """
    found = []
    for name in a.keys() & b.keys():
        if a[name].dim() > 1 and not re.search("embed|head", name):
            x, y = broadcast_tensors(a[name] == 0, b[name] == 0)
            if (x | y).any():
                found.append(((x & y).sum() / (x | y).sum()).item())
    return statistics.fmean(found) if found else None


def overlaps_of(masks):
    """Return the square table of overlaps, a list of rows of numbers."""
    return [[overlap(a, b) for b in masks.values()] for a in masks.values()]


def overlap_table(names, overlaps):
    rows = [["Jaccard index", *names]]
    for name, row in zip(names, overlaps, strict=True):
        rows.append([name, *("-" if number is None else f"{number:.2f}" for number in row)])
    return markdown(rows)


# --------------------------------------------------------------------------------------------------
# The report


def read_losses(folder, methods):
    """Return the held-out losses in the train.jsonl of each method that has one."""
    losses = {}
    for path in [folder / method / "train.jsonl" for method in methods]:
        try:
            if path.exists():
                losses[path.parent.name] = pictures.read_losses(path)
        except (ValueError, TypeError, AttributeError) as error:
            fail(f"{path} cannot be read ({error}). Delete the damaged line")
    return losses


def draw(evals, folder, names, overlaps):
    """Return {name: figure} of the pictures for which there is data."""
    if pictures.Figure is None:
        print("no pictures, because matplotlib is missing. Run: pip install matplotlib")
        return {}
    values, methods = measure(evals), list(evals)
    target = LANGUAGES[evals["source"][0]["settings"]["lang"]]["name"]
    changes, measures = {}, {}
    for side in ("source", "target"):
        measures[side], changes[side] = improvement(values, methods, side)
    figures = {
        "kept": pictures.draw_kept(changes, measures, methods, target),
        "ratio": pictures.draw_ratio(changes, measures, target),
        "forgetting": pictures.draw_forgetting(read_losses(folder, methods), target),
        "overlap": pictures.draw_overlap(names, overlaps),
    }
    return {name: figure for name, figure in figures.items() if figure}


def answers(evals):
    """Return the answers of all models to the first prompt of `chat`, as lines."""
    lines = []
    for method, runs in evals.items():
        found = look_up(runs[0]["results"], "chat/answers")
        if found:
            lines = lines or [f"> {found[0]['prompt']}"]
            lines.append(f"**{display_name(method)}:** {' '.join(found[0]['answer'].split())}")
    return lines


def add_to_cards(folders, chosen):
    """Write the results into the model cards that train.py made."""
    for folder in folders:
        evals = read_runs([folder], chosen)
        source = evals["source"][0]
        for method, (found,) in evals.items():
            path = folder / method / "model/README.md"
            if method == "source" or not path.is_file():
                continue
            values = measure({"source": [source], method: [found]})
            columns = [c for c in COLUMNS if (method, c) in values and ("source", c) in values]
            numbers = []
            for column in columns:
                about = look_up(found["results"], column.rpartition("/")[0])
                size = about.get("n") or about.get("documents")
                numbers.append((column, COLUMNS[column][:-2], values[method, column][0], size))
            lang = found["settings"]["lang"]
            table = "\n\n".join(tables({"source": [source], method: [found]}))
            old = path.read_text(encoding="utf-8")
            new = model_card.with_results(old, lang, table, numbers)
            if new is None:
                print(f"{path} is not of train.py, and stays as it is")
            elif new != old:
                write_atomically(str(path), new)
                print(f"added the results to {path}")


def report(folders, chosen, out):
    evals = read_runs(folders, chosen)
    masks = read_masks(folders[0], list(evals))
    names, overlaps = list(map(display_name, masks)), overlaps_of(masks)
    target = LANGUAGES[evals["source"][0]["settings"]["lang"]]["name"]

    # Text
    lines = [f"# English kept, {target} gained", f"{MARK} from {', '.join(map(str, folders))}."]
    lines.append("In brackets the change from Source. After ± the standard deviation over runs.")
    lines += tables(evals)
    if len(names) > 1:
        lines += ["Of the weights that either mask freezes, both freeze (mean over matrices):"]
        lines += [overlap_table(names, overlaps)]
    settings = [f"{key} {value}" for key, value in evals["source"][0]["settings"].items()]
    lines.append(f"Settings of source: {', '.join(settings)}.")
    lines += answers(evals)

    # Pictures, then the page that shows them
    out.mkdir(parents=True, exist_ok=True)
    figures = draw(evals, folders[0], names, overlaps)
    for path in [out / "report.md", *(out / f"{name}.png" for name in figures)]:
        if path.exists() and MARK.encode() not in path.read_bytes():
            fail(f"{path} exists and report.py did not write it. Move it, or choose another --out")
    for name, figure in figures.items():
        temporary = out / f"{name}.png.tmp"
        figure.savefig(temporary, format="png", dpi=pictures.DPI, metadata={"Software": MARK})
        os.replace(temporary, out / f"{name}.png")
        lines.append(f"![{name}]({name}.png)")
    write_atomically(str(out / "report.md"), "\n\n".join(lines) + "\n")
    print("\n\n".join(lines), f"wrote {out}/report.md", sep="\n\n")
    add_to_cards(folders, chosen)


def main(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("report.py", description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("runs", type=Path, nargs="*", help="run directories, one for each seed")
    add("--methods", nargs="+", help="methods to show (default: all)")
    add("--out", type=Path, help="directory to write to (default: the first run directory)")
    add("--page", type=Path, help="Markdown page whose tables to remake, instead of a report")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.page):
        parser.error("give run directories, or --page alone")
    try:
        if args.page:
            page.remake(args.page, read_runs, tables, answers, fail)
        else:
            report(args.runs, args.methods, args.out or args.runs[0])
    except OSError as error:
        fail(f"{error.filename or ''} {error.strerror or error}")
    except KeyboardInterrupt:
        print("report.py: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
