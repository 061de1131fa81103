"""Tabulate and draw what a run kept and gained, from the eval.json of its methods (Tables 2 to 6).

python tools/report.py runs/ne                      # report.md and report.png in runs/ne
python tools/report.py runs/ne runs-43/ne --out DIR  # mean and standard deviation over seeds
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = {
    code: (language["name"],)
    for code, language in json.loads((ROOT / "data/languages.json").read_text()).items()
}
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
# of the report: side, heading (the arrow points to the better value), where in `results`, digits
COLUMNS = (
    ("source", "chat bpb ↓", "bpb/source/heldout/bpb", 3),
    ("source", "prose bpb ↓", "bpb/source/prose/bpb", 3),
    ("source", "news bpb ↓", "bpb/source/news/bpb", 3),
    ("source", "MCQ accuracy ↑", "mcq/source/accuracy", 3),
    ("source", "MT X→en chrF++ ↑", "mt/source/chrf", 2),
    ("source", "SUM chrF++ ↑", "sum/source/chrf", 2),
    ("source", "MRC accuracy ↑", "mrc/source/accuracy", 3),
    ("source", "MMLU accuracy ↑", "mmlu/source/accuracy", 3),
    ("source", "stop rate ↑", "chat/stop_rate", 2),
    ("source", "repetition ↓", "chat/repetition", 2),
    ("source", "English share ↑", "chat/english_share", 2),
    ("source", "IFEval ↑", "ifeval/source/accuracy", 3),
    ("source", "GSM8K ↑", "gsm8k/source/accuracy", 3),
    ("source", "code-mixed ↓", "codemix/source/share", 3),
    ("target", "bpb ↓", "bpb/target/heldout/bpb", 3),
    ("target", "MCQ accuracy ↑", "mcq/target/accuracy", 3),
    ("target", "MT en→X chrF++ ↑", "mt/target/chrf", 2),
    ("target", "SUM chrF++ ↑", "sum/target/chrf", 2),
    ("target", "MRC accuracy ↑", "mrc/target/accuracy", 3),
    ("target", "MMLU accuracy ↑", "mmlu/target/accuracy", 3),
)


def fail(message):
    print("report.py: error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def write_atomically(path, text):
    """Neither a reader nor a full disk ever meets half a file."""
    try:
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    finally:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")


def look_up(results, path):
    for key in path.split("/"):
        results = (results or {}).get(key)
    return results


def read_evals(folders, chosen):
    """{method: [eval.json of each run folder]}, known methods first; what cannot be compared is
    refused.
    """
    evals, first, seeds = {}, None, {}
    for folder in folders:
        there = os.listdir(folder) if os.path.isdir(folder) else ()
        methods = ["source", *(chosen or [*NAMES, *sorted(set(there) - set(NAMES))])]
        paths = {method: f"{folder}/{method}/eval.json" for method in methods}
        if not os.path.isfile(paths["source"]):
            fail(
                f"{paths['source']} is missing: all is relative to the source model, so "
                f"evaluate that first"
            )
        for method, path in paths.items():
            if not os.path.isfile(path):
                continue
            try:
                with open(path, encoding="utf-8") as file:
                    found = json.load(file)
                settings = found["settings"] | {"lang": found["lang"]}
                if (found["format"], found["version"], type(found["results"])) != (
                    "ssu-eval",
                    1,
                    dict,
                ):
                    raise ValueError("another format or version")
            except (ValueError, KeyError, TypeError) as error:
                fail(
                    f"{path} cannot be read ({error}): remake it with evaluate.py --model "
                    f"... --out {path}"
                )
            chat = os.path.join(os.path.dirname(path), "chat.json")
            if os.path.isfile(chat):
                with open(chat, encoding="utf-8") as file:
                    found["results"] |= json.load(file)["results"]
            first = first or settings
            seed = seeds.setdefault(
                folder, settings["seed"]
            )  # may differ from one run folder to the next
            for key in settings.keys() - {"model_sha256"}:
                expected = seed if key == "seed" else first.get(key)
                if settings[key] != expected:
                    fail(
                        f"{path} cannot be compared with {paths['source']}: {key} is "
                        f"{settings[key]}, not {expected}"
                    )
            evals.setdefault(method, []).append(found)
    order = [*NAMES, *sorted({m.partition("@")[0] for m in evals} - NAMES.keys())]
    return {m: evals[m] for m in sorted(evals, key=lambda m: (order.index(m.partition("@")[0]), m))}


def method_and_ratio(run):
    """("ssu-wanda", 0.25) of "ssu-wanda@0.25", ("lota", 0.9) of "lota-90"; 0.5 where a method has
    a ratio that the name
    of its folder does not say (run_all.sh), None where it has none."""
    run = re.sub(r"^lota-(\d+)$", r"lota@0.\1", run)
    method, ratio = re.fullmatch(r"(.*?)(?:@([\d.]+))?", run).groups()
    freezes = method.startswith("ssu-") or method in ("hft", "gmt", "lota")
    return method, float(ratio) if ratio else 0.5 if freezes else None


def overlap(a, b):
    """(Jaccard index, |frozen by both| / |frozen by either|; what two random masks of these shares
    would have) of two
    masks that broadcast onto the same parameter; None if neither freezes anything."""
    import numpy

    a, b = numpy.broadcast_arrays(a == 0, b == 0)
    both = a.mean() * b.mean()
    return (
        ((a & b).sum() / (a | b).sum(), both / (a.mean() + b.mean() - both))
        if (a | b).any()
        else None
    )


def read_masks(folder, methods):
    """{method: masks} of a run folder, ssu-wanda's first: the others are compared with it; {} if
    there are no two.
    """
    from safetensors import SafetensorError, safe_open

    masks, models = {}, {}
    for m in sorted(methods, key=lambda m: m != "ssu-wanda"):
        path = os.path.join(folder, m, "mask.safetensors")
        if os.path.isfile(path):
            try:
                with safe_open(path, "np") as file:
                    masks[m] = {name: file.get_tensor(name) for name in file.keys()}
                    models[(file.metadata() or {}).get("fingerprint")] = path
            except SafetensorError as error:
                fail(f"{path} cannot be read ({error}): remake it with make_mask.py")
    if len(models) > 1:
        fail(
            f"the masks {' and '.join(models.values())} are of different models: remake "
            f"them, or move one away"
        )
    return masks if len(masks) > 1 else {}


def report(folders, chosen, out):
    """report.md, also printed, in the manner of Table 2; and report.png."""
    evals = read_evals(folders, chosen)
    one, sizes = evals["source"][0], []
    target = LANGUAGES[one["lang"]][0]
    names = {
        m: NAMES.get(m)
        or f"{NAMES.get(m.partition('@')[0], m.partition('@')[0])} {m.partition('@')[2]}".strip()
        for m in evals
    }
    value = {
        (m, c[2]): [look_up(e["results"], c[2]) for e in evals[m]] for m in evals for c in COLUMNS
    }
    value = {key: numbers for key, numbers in value.items() if None not in numbers}
    lines = [
        f"# English kept, {target} gained",
        "",
        "In brackets the change relative to Source, as in Table 2"
        + (
            "."
            if len(folders) == 1
            else f"; mean ± standard deviation over {len(folders)} run folders."
        ),
        "",
    ]
    for side, title in (("source", "English"), ("target", target)):
        columns = [c for c in COLUMNS if c[0] == side and ("source", c[2]) in value]
        table = [[title, *(c[1] for c in columns)]]
        for m in evals if columns else ():
            table.append(
                [names[m] + (f" (n={len(evals[m])})" if len(evals[m]) < len(folders) else "")]
            )
            for _, _, path, digits in columns:
                if (m, path) not in value:  # nothing to measure, e.g. no answer with a letter in it
                    table[-1].append("-")
                    continue
                mean, base = (
                    statistics.fmean(value[m, path]),
                    statistics.fmean(value["source", path]),
                )
                sd = (
                    f" ± {statistics.stdev(value[m, path]):.{digits}f}"
                    if len(value[m, path]) > 1
                    else ""
                )
                relative = (
                    f" ({100 * (mean / base - 1):+.1f}%)"
                    if base and not path.startswith("chat/")
                    else ""
                )
                table[-1].append(f"{mean:.{digits}f}{sd}{relative}")
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        table.insert(1, ["-" * width for width in widths])
        lines += (
            ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table] + [""]
            if columns
            else []
        )
        for _, heading, path, _ in columns:
            found = look_up(one["results"], path.rsplit("/", 1)[0])
            n = (
                f"{found['n']} items"
                if "n" in found
                else f"{found['documents']} documents, {found['tokens']} tokens"
            )
            sizes.append(f"{title} {heading[:-2]}: {n}")
    shown = {
        k: ",".join(v) if k == "tasks" else v
        for k, v in one["settings"].items()
        if k != "model_sha256"
    }
    lines += [
        f"n: {'; '.join(sizes)}.",
        "",
        f"Run folders: {', '.join(folders)}.",
        "",
        f"Settings: {', '.join(f'{k} {v}' for k, v in shown.items())}.",
        "",
        f"Made with {', '.join(map(' '.join, one['versions'].items()))} on {one['device']}, "
        f"commit {one['git_commit']}.",
        "",
    ]
    if one.get("data"):
        lines += [
            f"Data: {', '.join(f'{name} {origin}' for name, origin in one['data'].items())}.",
            "",
        ]
    if "chat" in one["results"]:
        answers = {m: evals[m][0]["results"]["chat"]["answers"][0] for m in evals}
        lines += [
            "## One English prompt, answered by each model",
            "",
            "> " + answers["source"]["prompt"],
            "",
        ]
        lines += [f"**{names[m]}:** {' '.join(answers[m]['answer'].split())}\n" for m in evals]
    os.makedirs(out, exist_ok=True)
    write_atomically(os.path.join(out, "report.md"), "\n".join(lines))
    print("\n".join(lines), f"wrote {out}/report.md", sep="\n")
    plot(value, names, target, read_masks(folders[0], evals), os.path.join(out, "report.png"))


def relative_to_source(value, names, side):
    """(what is compared, {method: [value over Source's, of each run folder]}) of one side: of bits
    per byte, or where
    there are none the mean over all columns that every method has, but chat's and codemix."""
    columns = [
        c
        for c in COLUMNS
        if c[0] == side
        and all((m, c[2]) in value for m in names)
        and not c[2].startswith(("chat/", "codemix/"))
        and statistics.fmean(value["source", c[2]])
    ]
    columns = [c for c in columns if c[2].endswith("heldout/bpb")] or columns
    if not columns:
        return None, {}
    what = (
        columns[0][1][:-2]
        if len(columns) == 1
        else "mean of " + ", ".join(c[1].split()[0] for c in columns)
    )
    base = {path: statistics.fmean(value["source", path]) for _, _, path, _ in columns}
    return what, {
        m: [
            statistics.fmean(found)
            for found in zip(
                *([x / base[path] for x in value[m, path]] for _, _, path, _ in columns),
                strict=True,
            )
        ]
        for m in names
    }


def plot(value, names, target, masks, path):  # noqa: C901
    """report.png: source kept against target gained; both against the freezing ratio (Figure 2),
    where there are
    several; which weights the masks freeze. matplotlib is optional."""
    (kept_what, kept), (gained_what, gained) = (
        relative_to_source(value, names, side) for side in ("source", "target")
    )
    if not kept or not gained:
        print(
            "no report.png: it needs figures of both languages, from bpb, mcq, mt, sum, mrc or mmlu"
        )
        return
    try:
        import matplotlib
    except ImportError:
        print("no report.png: it needs matplotlib (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kept = {
        m: [100 / x if "bpb" in kept_what else 100 * x for x in found] for m, found in kept.items()
    }
    gained = {
        m: [100 * (1 - x if "bpb" in gained_what else x - 1) for x in found]
        for m, found in gained.items()
    }
    labels = (
        f"English kept: {kept_what}, "
        + ("Source / method (%)" if "bpb" in kept_what else "method / Source (%)"),
        f"{target} gained: "
        + ("reduction of bpb (%)" if "bpb" in gained_what else f"{gained_what} (%)"),
    )
    curves = {}  # method -> [(ratio, run name)]
    for m in names:
        method, ratio = method_and_ratio(m)
        if ratio is not None:
            curves.setdefault(method, []).append((ratio, m))
    curves = {method: sorted(points) for method, points in curves.items() if len(points) > 1}
    panels = 1 + 2 * bool(curves) + 2 * bool(masks)
    rows, columns = math.ceil(panels / 3), min(3, panels)
    size = (6 * columns, 5.4 * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[panels:]:
        axes.remove()
    panel = iter(grid.flat)
    axes = next(panel)
    for m, name in names.items():
        x, y = statistics.fmean(gained[m]), statistics.fmean(kept[m])
        point = axes.scatter(x, y, s=60, zorder=3)
        if len(kept[m]) > 1:
            axes.scatter(gained[m], kept[m], s=10, color=point.get_facecolor(), alpha=0.6)
        axes.annotate(name, (x, y), (7, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel=labels[1], ylabel=labels[0])
    axes.margins(0.25)
    for numbers, label in ((kept, labels[0]), (gained, labels[1])) if curves else ():
        axes = next(panel)
        for method, points in curves.items():
            axes.plot(
                [ratio for ratio, _ in points],
                [statistics.fmean(numbers[m]) for _, m in points],
                marker="o",
                label=NAMES.get(method, method),
            )
        axes.axhline(
            statistics.fmean(numbers["source"]), color="red", linestyle="--", label="Source"
        )
        axes.set(xlabel="share frozen", ylabel=label)
        axes.legend(fontsize=8)
    if masks:
        (first, *others), found = masks, {}
        for m in others:
            for name in masks[first].keys() & masks[m].keys():
                if layer := re.search(r"\.(\d+)\..*?([^.]+)\.weight$", name):
                    if both := overlap(masks[first][name], masks[m][name]):
                        found.setdefault(m, []).append((int(layer[1]), layer[2], *both))
        for index, label in ((0, "layer"), (1, "kind of parameter")):
            axes = next(panel)
            for m, rows in found.items():
                keys = sorted({row[index] for row in rows})
                found_by, by_chance = (
                    [statistics.fmean(row[i] for row in rows if row[index] == key) for key in keys]
                    for i in (2, 3)
                )
                (line,) = axes.plot(
                    keys,
                    found_by,
                    marker="o",
                    markersize=4,
                    linestyle="" if index else "-",
                    label=names[m],
                )
                axes.plot(
                    keys,
                    by_chance,
                    marker="_" if index else "",
                    markersize=12,
                    linestyle="" if index else ":",
                    linewidth=0.8,
                    color=line.get_color(),
                )
            axes.plot(
                [],
                [],
                color="grey",
                marker="_" if index else "",
                linestyle="" if index else ":",
                label="random masks that freeze as much",
            )
            axes.set(
                xlabel=label,
                ylabel=f"frozen weights: Jaccard index with {names[first]}",
                ylim=(0, 1.02),
            )
            axes.tick_params("x", rotation=60 * index)
            if index == 0:
                axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.savefig(path + ".tmp", format="png", dpi=150 if panels == 1 else 100)
    pyplot.close(figure)
    os.replace(path + ".tmp", path)
    print("wrote", path)


def main(argv=None):
    parser = argparse.ArgumentParser("report.py", description=__doc__)
    parser.add_argument("runs", nargs="+", help="run directories, one per seed")
    parser.add_argument("--methods", nargs="+", help="methods to show (default: all)")
    parser.add_argument("--out", help="directory to write to (default: the first run)")
    args = parser.parse_args(argv)
    report(args.runs, args.methods, args.out or args.runs[0])


if __name__ == "__main__":
    main()
