"""Remake the tables of a Markdown page, such as docs/RESULTS.md, from the evaluations in results/.

A table stands between two comments, of which the first says what it is:

    <!-- report: tables results/embedded-ne/* -->
    <!-- end -->

    tables      mean and deviation over these run directories. report.md and the pictures go to
                the folder that they lie in; with --methods after them, only the tables are made
    folders     a row for each folder of run directories: another language, calibration, precision
    statements  what the paper says, and whether these runs agree (tools/statements.py)
    answers     one English prompt, answered by each model of the first run directory
    paper       the changes in Table 2, the mean over its five languages
    figures     the rows of a JSON file of measurements that evaluate.py did not make

Paths are patterns, from the repository's root. Nothing outside of these comments changes.
"""

import json
import os
import re
from pathlib import Path

from data.evaluation import LANGUAGES
from evaluate import write_atomically
from tools import statements
from tools.evaluations import fail, read_runs
from tools.methods import display_name, in_order
from tools.tables import (
    COLUMNS,
    PAPER,
    TABLE_2,
    answers,
    cell,
    markdown,
    measure,
    paper_changes,
    tables,
)

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("tables", "folders", "statements", "answers", "paper", "figures")
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


def evaluated(evals):
    """Return on which devices and at which commits the evaluations were made."""
    runs = [run for found in evals.values() for run in found]
    commits = sorted({str(run.get("git_commit"))[:7] for run in runs})
    devices = sorted({str(run.get("device")) for run in runs})
    return f"evaluated on {' and '.join(devices)} at {', '.join(commits)}"


def provenance(folders, evals, chosen):
    """Return a line: n, devices, commits, and the command that makes the table again."""
    names = " ".join(map(from_root, folders))
    options = f" --methods {' '.join(chosen)}" if chosen else ""
    options += " --out DIRECTORY" if len(folders) > 1 else ""
    command = f"`python tools/report.py {names}{options}`"
    return f"n = {len(folders)}; {evaluated(evals)}. {command}"


def folders_table(folders, chosen):
    """Return bits per byte, with a row for each folder of run directories.

    A row has the name of its language or, where all have one language, of the folder without it.
    """
    groups = {parent: read_runs(runs, chosen) for parent, runs in folders.items()}
    languages = {parent: evals["source"][0]["settings"]["lang"] for parent, evals in groups.items()}
    methods = in_order(set().union(*groups.values()))
    keys = (("English", statements.BPB["source"]), ("target", statements.BPB["target"]))
    head = [""]
    for side, _ in keys:
        head += [f"{side}: {display_name(method)}" for method in methods]
    rows, everything = [], {}
    for parent, evals in groups.items():
        lang, values = languages[parent], measure(evals)
        several = len(set(languages.values())) > 1
        name = LANGUAGES[lang]["name"] if several else parent.name.removesuffix(f"-{lang}")
        row = [f"{name} (n={len(folders[parent])})"]
        for _, column in keys:
            for method in methods:
                base = None if method == "source" else values.get(("source", column))
                row.append(cell(values.get((method, column)), base, column))
        rows.append((list(LANGUAGES).index(lang), row))
        everything |= {(parent, method): runs for method, runs in evals.items()}
    rows.sort(key=lambda pair: pair[0])  # languages as in the paper, folders as they were given
    lines = [markdown([head, *(row for _, row in rows)])]
    return [*lines, f"These were {evaluated(everything)}."]


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
    if kind == "folders":
        return folders_table(folders, chosen)
    if kind == "statements":
        groups = {parent.name: read_runs(runs, chosen) for parent, runs in folders.items()}
        return statements.table(groups)
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

    write_atomically(str(path), BLOCK.sub(made, old))
    print(f"remade {len(BLOCK.findall(old))} tables of {path}")
