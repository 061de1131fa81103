"""Draw the pictures of tools/report.py, one subject in each.

A method has the same color and marker in all of them (tools/methods.py), and legends list methods
in one order, outside of the axes.
"""

import json
import os
import statistics

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
except ImportError:
    Figure = None

from tools.methods import display_name, method_and_ratio, style

MARK = "Made by tools/report.py"  # in each file that report.py writes, and may replace
WIDTH = 8.6  # inches
DPI = 120
DASHES = ("-", "--", ":", "-.", (0, (1, 3)), (0, (6, 1, 1, 1)), (0, (3, 3)))  # of several ratios
SIZES = {"*": 10, "$9$": 7, "$5$": 7, "1": 10, "2": 10, "4": 10}  # of markers that look small
THIN = ("1", "2", "4")  # markers that are lines


def save(figure, path):
    """Write a picture under a temporary name first. The same figure gives the same bytes."""
    temporary = path.with_name(f"{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": MARK})
    os.replace(temporary, path)


def two_panels(titles, height):
    """Return a figure and its axes, {"source": English, "target": the other language}."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = dict(zip(("source", "target"), figure.subplots(1, 2), strict=True))
    for side, axes in panels.items():
        axes.set_title(titles[side], fontsize=11)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def spread(numbers):
    """Return the standard deviation over runs, or None for one run."""
    return statistics.stdev(numbers) if len(numbers) > 1 else None


def look(run):
    """Return the options with which matplotlib draws a method."""
    color, marker = style(run)
    thin = {"markeredgewidth": 2} if marker in THIN else {}
    return {"color": color, "marker": marker, "markersize": SIZES.get(marker, 6)} | thin


def without_curves(runs):
    """Leave out the ratios of methods that have three or more, whose place is ratio.png."""
    methods = [method_and_ratio(run)[0] for run in runs]
    several = {method for method in methods if methods.count(method) > 2}
    return [run for run in runs if "@" not in run or run.partition("@")[0] not in several]


def draw_rows(axes, changes, runs):
    """Draw a row for each method: a line from zero to its mean, with the figure at its end."""
    ends, room = [0.0], 0.17  # what a figure takes of the width
    for row, run in enumerate(runs):
        if run not in changes:
            axes.text(0, row, " not measured", va="center", fontsize=9)
            continue
        mean, error = statistics.fmean(changes[run]), spread(changes[run])
        axes.hlines(row, 0, mean, color=style(run)[0], linewidth=2)
        axes.errorbar(mean, row, xerr=error, capsize=3, elinewidth=1, **look(run))
        text, outward = f"{mean:+.1f}", 1 if mean >= 0 else -1
        if error is not None:
            text, room = f"{text} ± {error:.1f}", 0.28
        ends.append(mean + outward * (error or 0))
        axes.annotate(
            text,
            (ends[-1], row),
            xytext=(9 * outward, 0),
            textcoords="offset points",
            ha="left" if mean >= 0 else "right",
            va="center",
            fontsize=9,
        )
    low, high = min(ends), max(ends)
    left, right = (room if low < 0 else 0.03), (room if high > 0 else 0.03)
    width = ((high - low) or 1) / (1 - left - right)
    axes.set_xlim(low - left * width, high + right * width)
    axes.axvline(0, color="0.5", linewidth=1)
    axes.set_yticks(range(len(runs)), map(display_name, runs))
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def draw_kept(changes, measures, runs, target):
    """Draw what each method changes in English and in the target language.

    changes: {side: {run: [change of each run directory]}}, in percent, better is more.
    """
    runs = without_curves([run for run in runs if run != "source"])
    if not runs or not any(changes.values()):
        return None
    titles = {"source": "English kept", "target": f"{target} gained"}
    figure, panels = two_panels(titles, 1.3 + 0.3 * len(runs))
    for side, axes in panels.items():
        draw_rows(axes, changes[side], runs)
        axes.set_xlabel(f"improvement over Source, %: {measures[side]}")
    panels["target"].set_yticklabels([])
    return figure


def draw_lines(curves, titles, xlabel, ylabels):
    """Draw {side: {run: [(x, y, deviation or None)]}}, or return None if there is none."""
    runs = list(dict.fromkeys([*curves["source"], *curves["target"]]))
    if not runs:
        return None
    figure, panels = two_panels(titles, max(3.6, 1.2 + 0.22 * len(runs)))
    seen, handles = {}, {}
    for run in runs:
        method = run.partition("@")[0]
        dashes = DASHES[seen.get(method, 0) % len(DASHES)]
        seen[method] = seen.get(method, 0) + 1
        for side, axes in panels.items():
            points = curves[side].get(run)
            if points:
                x, y, errors = zip(*points, strict=True)
                errors = [error or 0 for error in errors] if any(errors) else None
                options = {"linestyle": dashes, "linewidth": 1.5, "capsize": 3} | look(run)
                handles[run] = axes.errorbar(x, y, errors, label=display_name(run), **options)
    for side, axes in panels.items():
        axes.set_xlabel(xlabel)
        if side == "source" or ylabels["target"] != ylabels["source"]:
            axes.set_ylabel(ylabels[side])
    figure.legend(handles=handles.values(), loc="outside right upper", fontsize=9, frameon=False)
    return figure


def draw_ratio(changes, measures, target):
    """Draw both changes over the fraction of frozen weights, for methods with three or more.

    Full fine-tuning is every method at ratio 0 (Figure 2). Source is the line at zero.
    """
    curves = {"source": {}, "target": {}}
    for side, found in curves.items():
        for run, numbers in changes[side].items():
            method, ratio = method_and_ratio(run)
            point = (ratio, statistics.fmean(numbers), spread(numbers))
            found.setdefault(method, []).append(point)
        curves[side] = {m: sorted(points) for m, points in found.items() if len(points) > 2}
        if curves[side] and "fft" in changes[side]:
            numbers = changes[side]["fft"]
            point = (0.0, statistics.fmean(numbers), spread(numbers))
            curves[side] = {"fft": [point]} | curves[side]
    titles = {"source": "English kept", "target": f"{target} gained"}
    labels = {side: f"improvement over Source, %: {what}" for side, what in measures.items()}
    figure = draw_lines(curves, titles, "fraction frozen", labels)
    if figure:
        for axes in figure.axes:
            axes.axhline(0, color="0.5", linewidth=1)
            axes.text(1, 0, "Source", ha="right", va="bottom", fontsize=9, color="0.3")
            axes.set_xlim(-0.05, 1)
    return figure


def read_losses(path):
    """Return {side: [(tokens, held-out loss, None)]} of a train.jsonl."""
    found = {}
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        for side in ("source", "target"):
            if f"{side}_loss" in row:
                point = (row.get("tokens", 0), row[f"{side}_loss"], None)
                found.setdefault(side, []).append(point)
    return found


def draw_forgetting(losses, target):
    """Draw held-out losses over the tokens trained on, {run: {side: [(tokens, loss, None)]}}."""
    curves = {"source": {}, "target": {}}
    for run in without_curves(losses):
        for side, points in losses[run].items():
            curves[side][run] = points
    titles = {"source": "English", "target": target}
    label = "held-out loss, nats per token"
    labels = {"source": label, "target": label}
    figure = draw_lines(curves, titles, "tokens trained on", labels)
    for axes in figure.axes if figure else ():
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def draw_overlap(names, overlaps):
    """Draw a square table of mask overlaps, with the figures in it, if there are two masks."""
    if len(names) < 2:
        return None
    size = 2.6 + 0.5 * len(names)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    shades = []
    for i, row in enumerate(overlaps):
        shades.append([overlap or 0 for overlap in row])
        for j, overlap in enumerate(row):
            text = "-" if overlap is None else f"{overlap:.2f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=9)
    axes.imshow(shades, vmin=0, vmax=1.5, cmap="Blues")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("Frozen by both, of what either freezes", fontsize=11)
    return figure
