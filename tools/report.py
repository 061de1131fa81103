"""Report what each method of a run kept of English and gained in the target language.

    python tools/report.py runs/ne                       # report.md and pictures in runs/ne
    python tools/report.py runs/ne runs-43/ne --out DIR  # mean and standard deviation over seeds

A run directory holds a directory for each method and one named source, each with the eval.json of
evaluate.py and, where it was made, the chat.json of tools/chat_eval.py. The tables are laid out as
the paper's Tables 2 to 6. Pictures need matplotlib, and are drawn where there is data for them:
    kept.png        what each method lost of English and gained in the target language
    ratio.png       both over the fraction of frozen weights (Figure 2)
    forgetting.png  held-out losses during training, from train.jsonl
    overlap.png     how far any two masks freeze the same weights, from mask.safetensors
The last two show the first run directory.
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
from evaluate import write_atomically

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None

MARK = "Made by tools/report.py"  # in each file that this script writes, and may replace
ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = json.loads((ROOT / "data/languages.json").read_text(encoding="utf-8"))
NAMES = {  # in the order of the paper's Tables 2, 4, 3 and 6
    "source": "Source",
    "fft": "FFT",
    "adalora": "AdaLoRA",
    "hft": "HFT",
    "gmt": "GMT",
    "ssu-rand": "SSU-Rand",
    "ssu-mag": "SSU-Mag",
    "ssu-wanda": "SSU-Wanda",
    "ssu-sparsegpt": "SSU-SparseGPT",
    "ssu-fim": "SSU-FIM",
    "ssu-wanda-row": "SSU-Wanda, rows",
    "ssu-wanda-element": "SSU-Wanda, elements",
    "lota": "LoTA",
    "lota-90": "LoTA (90%)",
    "lota-50": "LoTA (50%)",
    "s2ft-down": "S2FT (down)",
    "s2ft-down-output": "S2FT (down, output)",
}
COLUMNS = {  # where in `results` of eval.json and chat.json; the arrow points to better values
    "bpb/source/heldout/bpb": "chat bpb ↓",
    "bpb/source/prose/bpb": "prose bpb ↓",
    "bpb/source/news/bpb": "news bpb ↓",
    "mcq/source/accuracy": "MCQ accuracy ↑",
    "mt/source/chrf": "MT X→en chrF++ ↑",
    "sum/source/chrf": "SUM chrF++ ↑",
    "mrc/source/accuracy": "MRC accuracy ↑",
    "mmlu/source/accuracy": "MMLU accuracy ↑",
    "chat/stop_rate": "stop rate ↑",
    "chat/repetition": "repetition ↓",
    "chat/english_share": "English share ↑",
    "ifeval/source/accuracy": "IFEval ↑",
    "gsm8k/source/accuracy": "GSM8K ↑",
    "codemix/source/share": "code-mixed ↓",
    "bpb/target/heldout/bpb": "bpb ↓",
    "mcq/target/accuracy": "MCQ accuracy ↑",
    "mt/target/chrf": "MT en→X chrF++ ↑",
    "sum/target/chrf": "SUM chrF++ ↑",
    "mrc/target/accuracy": "MRC accuracy ↑",
    "mmlu/target/accuracy": "MMLU accuracy ↑",
}
TWO_DIGITS = re.compile("chrf|chat/")
NO_CHANGE = ("chat/", "codemix/")  # fractions whose change in percent says nothing


def fail(message):
    """Print an error that the user can fix, in one line, and exit with code 2."""
    print(f"report.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def method_and_ratio(run):
    """Return ("ssu-wanda", 0.25) for "ssu-wanda@0.25", ("lota", 0.9) for "lota-90"; else 0.5."""
    found = re.fullmatch(r"(.+)@(\d*\.?\d+)", re.sub(r"^lota-(\d+)$", r"lota@0.\1", run))
    return (found[1], float(found[2])) if found else (run, 0.5)


def display_name(run):
    method, _, ratio = run.partition("@")
    return f"{NAMES.get(method, method)} {ratio}".strip()


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
        if chat["settings"].get("model_sha256") != found["settings"].get("model_sha256"):
            fail(f"{folder}/chat.json is of another model than eval.json. Make it again")
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
        if evals:  # the seed may differ from one run directory to the next
            seed = {"seed": source["settings"].get("seed")}
            check_settings(folder, source["settings"], evals["source"][0]["settings"] | seed)
        for path in sorted(folder.glob("*/eval.json")):
            method = path.parent.name
            if method == "source" or not chosen or method in chosen:
                found = read_eval(path.parent)
                check_settings(path.parent, found["settings"], source["settings"])
                evals.setdefault(method, []).append(found)
    for method in chosen or []:
        if method not in evals:
            fail(f"{folders[0]}/{method}/eval.json is missing. Evaluate it, or correct --methods")

    def place(run):
        method = run.partition("@")[0]
        return [*NAMES, method].index(method), run

    return {run: evals[run] for run in sorted(evals, key=place)}


def measure(evals):
    """Return {(method, column): [its value in each run directory]}, without what is missing."""
    values = {}
    for method, runs in evals.items():
        for column in COLUMNS:
            numbers = [run["results"] for run in runs]
            for key in column.split("/"):
                numbers = [(number or {}).get(key) for number in numbers]
            if None not in numbers:
                values[method, column] = numbers
    return values


def markdown(rows):
    """Return a table, whose head is the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def columns_of(side, values):
    """Return the measured columns of English ("source") or of the target language."""
    found = [column for column in COLUMNS if ("source", column) in values]
    return [column for column in found if ("/target" in column) == (side == "target")]


def cell(values, method, column):
    """Return "1.046 ± 0.002 (+2.7%)": mean and deviation over runs, and the change from Source."""
    numbers = values.get((method, column))
    if not numbers:  # nothing to measure, e.g. no answer with a letter in it
        return "-"
    digits = 2 if TWO_DIGITS.search(column) else 3
    mean, base = statistics.fmean(numbers), statistics.fmean(values["source", column])
    text = f"{mean:.{digits}f}"
    if len(numbers) > 1:
        text += f" ± {statistics.stdev(numbers):.{digits}f}"
    if base and not column.startswith(NO_CHANGE):
        text += f" ({100 * (mean / base - 1):+.1f}%)"
    return text


def ability_table(title, columns, evals, values):
    rows = [[title, *(COLUMNS[column] for column in columns)]]
    for method, runs in evals.items():
        name = display_name(method)
        if len(runs) < len(evals["source"]):
            name += f" (n={len(runs)})"
        rows.append([name, *(cell(values, method, column) for column in columns)])
    return markdown(rows)


def sizes(evals, columns):
    """Return a line that says how many items or documents each column has."""
    texts = []
    for column in columns:
        found = evals["source"][0]["results"]
        for key in column.split("/")[:-1]:
            found = found[key]
        texts.append(f"{COLUMNS[column][:-2]} {found.get('n') or found.get('documents')}")
    return f"Items or documents: {', '.join(texts)}."


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


def overlap_table(masks):
    rows = [["Jaccard index", *map(display_name, masks)]]
    for method in masks:
        found = [overlap(masks[method], other) for other in masks.values()]
        rows.append([display_name(method), *("-" if x is None else f"{x:.2f}" for x in found)])
    return rows


def improvement(values, methods, side):
    """Return (what is measured, {method: [improvement over Source in percent, of each run]}).

    That of bits per byte or, where they were not measured, the mean over all tasks.
    """
    columns = []
    for column in columns_of(side, values):
        everywhere = all((method, column) in values for method in methods)
        if everywhere and not column.startswith(NO_CHANGE) and any(values["source", column]):
            columns.append(column)
    columns = [column for column in columns if "/heldout/" in column] or columns
    found = {}
    for method in methods if columns else []:
        changes = []
        for column in columns:
            base = statistics.fmean(values["source", column])
            sign = -100 if "↓" in COLUMNS[column] else 100
            changes.append([sign * (value / base - 1) for value in values[method, column]])
        found[method] = [statistics.fmean(run) for run in zip(*changes, strict=True)]
    return ", ".join(COLUMNS[column][:-2] for column in columns), found


def two_panels(target, height=4.0):
    """Return a figure and its axes, {"source": English, "target": the other language}."""
    figure = Figure(figsize=(9, height), layout="constrained")
    english, other = figure.subplots(1, 2)
    english.set_title("English")
    other.set_title(target)
    return figure, {"source": english, "target": other}


def draw_bars(axes, changes, title, xlabel):
    """Draw {method: [change in percent, of each run]}: means, with their standard deviation."""
    for method, numbers in changes.items():
        if method == "source":  # its change is zero
            continue
        color = "tab:red" if method == "ssu-wanda" else "tab:gray"
        mean = statistics.fmean(numbers)
        spread = statistics.stdev(numbers) if len(numbers) > 1 else None
        bar = axes.barh(display_name(method), mean, xerr=spread, color=color)
        axes.bar_label(bar, fmt="%.1f", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set(title=title, xlabel=xlabel)


def draw_kept(values, methods, target):
    """Draw what each method lost of English and gained in the target language."""
    figure, axes = two_panels(target, 1.2 + 0.28 * len(methods))
    what, changes = improvement(values, methods, "source")
    losses = {method: [-change for change in changes[method]] for method in changes}
    draw_bars(axes["source"], losses, "English lost", f"{what}: worse than Source by %")
    what, changes = improvement(values, methods, "target")
    draw_bars(axes["target"], changes, f"{target} gained", f"{what}: better than Source by %")
    return figure


def draw_lines(curves, target, xlabel, ylabels):
    """Draw curves, {side: {method: [(x, y)]}}. Return None if there are none."""
    figure, panels = two_panels(target)
    for side, axes in panels.items():
        for method, points in curves[side].items():
            axes.plot(*zip(*points, strict=True), ".-", label=display_name(method))
            axes.legend(fontsize=8)
        axes.set(xlabel=xlabel, ylabel=ylabels[side])
    return figure if any(curves.values()) else None


def draw_ratio(values, methods, target):
    """Draw loss and gain over the fraction of frozen weights, where a method has several."""
    curves, labels = {"source": {}, "target": {}}, {}
    for side, found in curves.items():
        what, changes = improvement(values, methods, side)
        labels[side] = f"improvement of {what} over Source (%)"
        for run, numbers in changes.items():
            method, ratio = method_and_ratio(run)
            found.setdefault(method, []).append((ratio, statistics.fmean(numbers)))
        curves[side] = {m: sorted(points) for m, points in found.items() if len(points) > 1}
    return draw_lines(curves, target, "fraction frozen", labels)


def draw_forgetting(folder, methods, target):
    """Draw the held-out losses during training, in the lines of train.jsonl that have them."""
    curves = {"source": {}, "target": {}}
    for path in [folder / method / "train.jsonl" for method in methods]:
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            for row in map(json.loads, lines):
                for side in curves:
                    if f"{side}_loss" in row:
                        point = (row.get("tokens", 0), row[f"{side}_loss"])
                        curves[side].setdefault(path.parent.name, []).append(point)
        except (ValueError, TypeError, AttributeError) as error:
            fail(f"{path} cannot be read ({error}). Delete the damaged line")
    label = "held-out loss (nats per token)"
    return draw_lines(curves, target, "tokens trained on", {"source": label, "target": label})


def draw_overlap(rows):
    """Draw the table of mask overlaps, if there are two."""
    names = rows[0][1:]
    if len(names) < 2:
        return None
    size = 2.5 + 0.5 * len(names)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    shades = []
    for i, row in enumerate(rows[1:]):
        shades.append([float(text.replace("-", "0")) for text in row[1:]])
        for j, text in enumerate(row[1:]):
            axes.text(j, i, text, ha="center", va="center", fontsize=8)
    axes.imshow(shades, vmin=0, vmax=1.5, cmap="Blues")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(rows[0][0])
    return figure


def report(folders, chosen, out):
    evals = read_runs(folders, chosen)
    values, methods = measure(evals), list(evals)
    overlaps = overlap_table(read_masks(folders[0], methods))
    target = LANGUAGES[evals["source"][0]["settings"]["lang"]]["name"]

    # Tables
    lines = [f"# English kept, {target} gained", f"{MARK} from {', '.join(map(str, folders))}."]
    lines.append("In brackets the change from Source. After ± the standard deviation over runs.")
    for side, title in (("source", "English"), ("target", target)):
        columns = columns_of(side, values)
        if columns:
            lines += [ability_table(title, columns, evals, values), sizes(evals, columns)]
    if len(overlaps) > 2:
        lines += ["Of the weights that either mask freezes, both freeze (mean over matrices):"]
        lines += [markdown(overlaps)]
    settings = [f"{key} {value}" for key, value in evals["source"][0]["settings"].items()]
    lines.append(f"Settings of source: {', '.join(settings)}.")

    # Pictures, then the page that shows them
    out.mkdir(parents=True, exist_ok=True)
    figures = {}
    if Figure is None:
        print("no pictures, because matplotlib is missing. Run: pip install matplotlib")
    else:
        figures["kept"] = draw_kept(values, methods, target)
        figures["ratio"] = draw_ratio(values, methods, target)
        figures["forgetting"] = draw_forgetting(folders[0], methods, target)
        figures["overlap"] = draw_overlap(overlaps)
    figures = {name: figure for name, figure in figures.items() if figure}
    for path in [out / "report.md", *(out / f"{name}.png" for name in figures)]:
        if path.exists() and MARK.encode() not in path.read_bytes():
            fail(f"{path} exists and report.py did not write it. Move it, or choose another --out")
    for name, figure in figures.items():
        temporary = out / f"{name}.png.tmp"
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": MARK})
        os.replace(temporary, out / f"{name}.png")
        lines.append(f"![{name}]({name}.png)")
    write_atomically(str(out / "report.md"), "\n\n".join(lines) + "\n")
    print("\n\n".join(lines), f"wrote {out}/report.md", sep="\n\n")


def main(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("report.py", description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="run directories, one for each seed")
    add("--methods", nargs="+", help="methods to show (default: all)")
    add("--out", type=Path, help="directory to write to (default: the first run directory)")
    args = parser.parse_args(argv)
    try:
        report(args.runs, args.methods, args.out or args.runs[0])
    except OSError as error:
        fail(f"{error.filename or ''} {error.strerror or error}")
    except KeyboardInterrupt:
        print("report.py: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
