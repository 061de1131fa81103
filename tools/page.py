"""Remake the tables of a Markdown page, such as docs/RESULTS.md, from the evaluations in results/.

A table stands between two comments, of which the first says what it is:

    <!-- report: tables results/embedded-ne/* -->
    <!-- end -->

    tables      mean and deviation over these run directories. report.md and the pictures go to
                the folder that they lie in; with --methods after them, only the tables are made
    changes     a row for each method: its improvement over Source in bits per byte, over the runs
                of several folders. The picture, changes.png, goes to the last of them
    folders     the same, with a row for each folder: another language, calibration, precision
    moved       the share of trained weights whose value changed, as train.py logs it at its end
    statements  what the paper says, and whether these runs agree (tools/statements.py)
    answers     one English prompt, answered by each model of the first run directory
    paper       the changes of the mean over the paper's five languages (Tables 10 to 13)
    figures     the rows of a JSON file of measurements that evaluate.py did not make

Paths are patterns, from the repository's root. Nothing outside of these comments changes.
"""

import json
import os
import re
from pathlib import Path

from data.rows import LANGUAGES, write_atomically
from tools import pictures, statements
from tools.evaluations import fail, read_runs
from tools.methods import display_name, in_order
from tools.tables import (
    COLUMNS,
    PAPER,
    TABLE_2,
    answers,
    markdown,
    paper_changes,
    tables,
)

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("tables", "changes", "folders", "moved", "statements", "answers", "paper", "figures")
BLOCK = re.compile(r"(<!-- report: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def folders_of(patterns):
    """Return the run directories that match, by the folder that they lie in."""
    found = {}
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            if (path / "source/eval.json").is_file():
                found.setdefault(path.parent, []).append(path)
    return found


def from_root(path):
    return str(path.relative_to(ROOT))


def read_groups(folders, chosen=()):
    """Return {folder of run directories: their evaluations}, of chosen methods at any ratio."""
    groups = {}
    for parent, runs in folders.items():
        evals = read_runs(runs, None)
        for run in list(evals):
            if chosen and run.partition("@")[0] not in ("source", *chosen):
                del evals[run]
        groups[parent.name] = evals
    return groups


def methods_of(groups):
    """Return the methods of all groups, with their ratios."""
    return in_order(set().union(*groups.values()) - {"source"})


def evaluated(groups):
    """Return on which devices and at which commits the evaluations were made."""
    runs = []
    for evals in groups.values():
        for found in evals.values():
            runs += found
    commits = sorted({str(run.get("git_commit"))[:7] for run in runs})
    devices = sorted({str(run.get("device")) for run in runs})
    return f"evaluated on {' and '.join(devices)} at {', '.join(commits)}"


def provenance(folders, evals, chosen):
    """Return a line: n, devices, commits, and the command that makes the table again."""
    names = " ".join(map(from_root, folders))
    options = f" --methods {' '.join(chosen)}" if chosen else ""
    options += " --out DIRECTORY" if len(folders) > 1 else ""
    command = f"`python tools/report.py {names}{options}`"
    return f"n = {len(folders)}; {evaluated({'': evals})}. {command}"


def changes_table(folders, chosen, path, page):
    """Return the improvements of each method, a line on the runs, and a link to the picture.

    The picture is drawn at `path`, in the last folder of the block, if that was measured.
    """
    groups = read_groups(folders, chosen)
    lang = next(iter(groups.values()))["source"][0]["settings"]["lang"]
    target = LANGUAGES[lang]["name"]
    rows, changes = [["", "n", "English kept, %", f"{target} gained, %"]], {}
    for side in statements.BPB:
        changes[side] = {}
        for method in methods_of(groups):
            numbers = statements.measured(groups, side, method)
            if numbers:
                changes[side][method] = list(numbers.values())
    for method, numbers in changes["source"].items():
        row = [display_name(method), str(len(numbers)), statements.figure(numbers)]
        rows.append([*row, statements.figure(changes["target"][method])])
    lines = [markdown(rows), f"These were {evaluated(groups)}."]
    if pictures.Figure and path.parent in folders:
        measures = {side: COLUMNS[column][:-2] for side, column in statements.BPB.items()}
        figure = pictures.draw_ratio(changes, measures, target)
        figure = figure or pictures.draw_kept(changes, measures, list(changes["source"]), target)
        pictures.save(figure, path)
        lines.append(f"![changes]({os.path.relpath(path, page.parent)})")
    return lines


def rows_of(groups):
    """Return {name of a row: its groups}, in the paper's order of languages.

    A row has the name of its language or, where all have one language, of the folder without it.
    A folder that ends in -bpb has more runs of the one without, evaluated in bits per byte alone.
    """
    languages = statements.by_language(groups)
    rows = {}
    for lang in LANGUAGES:
        for name, evals in languages.get(lang, {}).items():
            row = name.removesuffix(f"-{lang}").removesuffix("-bpb")
            row = LANGUAGES[lang]["name"] if len(languages) > 1 else row
            rows.setdefault(row, {})[name] = evals
    return rows


def with_n(numbers):
    return f"{statements.figure(numbers)} (n={len(numbers)})" if numbers else "-"


def folders_table(folders, chosen):
    """Return the improvements of each method, with a row for each folder of run directories."""
    groups = read_groups(folders, chosen)
    methods = methods_of(groups)
    head = [""]
    for title in ("English kept, %", "gained, %"):
        head += [f"{title}: {display_name(method)}" for method in methods]
    lines = [head]
    for row, some in rows_of(groups).items():
        cells = []
        for side in statements.BPB:
            for method in methods:
                cells.append(with_n(list(statements.measured(some, side, method).values())))
        lines.append([row, *cells])
    return [markdown(lines), f"These were {evaluated(groups)}."]


def moved_in(log):
    """Return [percentage of the trained weights that moved], or [] if train.jsonl does not say."""
    rows = map(json.loads, log.read_text(encoding="utf-8").splitlines() if log.exists() else [])
    found = [row["summary"] for row in rows if "summary" in row]
    return [100 * summary["moved"] / summary["trainable"] for summary in found]


def moved_table(folders, chosen):
    """Return a row for each folder of run directories, if its logs say what moved."""
    groups = read_groups(folders, chosen)
    methods = methods_of(groups)
    lines = [["trained weights that moved, %", *map(display_name, methods)]]
    for row, some in rows_of(groups).items():
        runs, cells = [], []
        for parent, found in folders.items():
            runs += found if parent.name in some else []
        for method in methods:
            numbers = []
            for run in runs:
                numbers += moved_in(run / method / "train.jsonl")
            cells.append(with_n(numbers).lstrip("+"))
        if set(cells) != {"-"}:
            lines.append([row, *cells])
    return [markdown(lines)]


def paper_table(model):
    """Return the paper's changes in percent, of the scores averaged over its languages."""
    languages = list(PAPER[model].values())
    rows = [[model]]
    for column in TABLE_2:
        side = " target" if "/target" in column else ""
        rows[0].append(COLUMNS[column].split()[0] + side)
    for method in PAPER[model]["ne"]:
        if method != "source":
            changes = paper_changes(languages, method)
            rows.append([display_name(method), *(f"{change:+.1f}%" for change in changes)])
    return markdown(rows)


def figures_table(path):
    """Return the table of a JSON file: "columns", and "rows" of name and numbers or text.

    A number has the change from the first row in brackets.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    rows, first = [content["columns"]], content["rows"][0]
    for row in content["rows"]:
        cells = [row[0]]
        for value, base in zip(row[1:], first[1:], strict=True):
            if not isinstance(value, float):
                cells.append(str(value))
            elif row is first:
                cells.append(f"{value:.4f}")
            else:
                cells.append(f"{value:.4f} ({100 * (value / base - 1):+.1f}%)")
        rows.append(cells)
    return [markdown(rows), content["about"]]


def report_of(folders, chosen, page, write_report):
    """Return the tables of run directories and links to their pictures, and write a report."""
    ((parent, runs),) = folders.items()
    evals = read_runs(runs, chosen)
    lines = [*tables(evals), provenance(runs, evals, chosen)]
    if not chosen:
        _, names = write_report(runs, None, parent)
        link = os.path.relpath(parent, page.parent)
        lines += [f"![{name}]({link}/{name}.png)" for name in names]
    return lines


def block(text, page, write_report):
    """Return the lines of one table, "tables results/embedded-ne/*" for instance."""
    kind, *words = text.partition(" --methods ")[0].split()
    chosen = text.partition(" --methods ")[2].split()
    if kind not in KINDS or not words:
        fail(f"<!-- report: {text} --> names no table. Correct it in the page")
    if kind == "paper":
        return [paper_table(words[0])]
    if kind == "figures":
        return figures_table(ROOT / words[0])
    folders = folders_of(words)
    if not folders:
        return [f"Not measured: there is no evaluation in {' '.join(words)}."]
    if kind == "changes":
        picture = ROOT / Path(words[-1]).with_name("changes.png")
        return changes_table(folders, chosen, picture, page)
    by_folder = {"folders": folders_table, "moved": moved_table}
    if kind in by_folder:
        return by_folder[kind](folders, chosen)
    if kind == "statements":
        return statements.table(read_groups(folders))
    if len(folders) > 1:
        fail(f"<!-- report: {text} --> names several folders of run directories. Name one")
    if kind == "answers":
        return answers(read_runs(next(iter(folders.values()))[:1], chosen))
    return report_of(folders, chosen, page, write_report)


def remake(path, write_report):
    """Write the page with all its tables remade."""
    old = path.read_text(encoding="utf-8")
    if old.count("<!-- report: ") != len(BLOCK.findall(old)) or "<!-- report: " not in old:
        fail(f"{path}: needs comments <!-- report: ... --> with an <!-- end --> each. Add them")

    def made(match):
        lines = block(match[2], path, write_report)
        return match[1] + "\n" + "\n\n".join(lines) + "\n\n" + match[3]

    write_atomically(path, BLOCK.sub(made, old))
    print(f"remade {len(BLOCK.findall(old))} tables of {path}")
