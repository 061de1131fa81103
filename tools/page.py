"""Remake the tables of a Markdown page, such as docs/RESULTS.md, from the evaluations in results/.

A table stands between two comments, of which the first says what it is:

    <!-- report: tables results/embedded-ne/* --methods fft hft ssu-wanda -->
    <!-- end -->

    tables      the tables of a report, mean and deviation over these run directories
    languages   a row for each run directory, of one seed and different languages
    statements  what the paper says, and whether these runs agree (tools/statements.py)
    answers     one English prompt, answered by each model of the first run directory
    paper       the changes in Table 2, the mean over its five languages
    figures     the rows of a JSON file of measurements that evaluate.py did not make

Paths are patterns, from the repository's root. Nothing outside of these comments changes.
"""

import json
import re
import statistics
from pathlib import Path

from data.evaluation import LANGUAGES
from evaluate import write_atomically
from tools import statements
from tools.methods import display_name
from tools.tables import COLUMNS, PAPER, TABLE_2, cell, markdown, measure

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("tables", "languages", "statements", "answers", "paper", "figures")
BLOCK = re.compile(r"(<!-- report: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def folders_of(patterns):
    """Return the run directories that match, as paths from the root."""
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return [path for path in found if (path / "source/eval.json").is_file()]


def provenance(folders, evals, chosen):
    """Return a line: n, commits, device, and the command that makes the table again."""
    runs = [run for found in evals.values() for run in found]
    commits = sorted({str(run.get("git_commit"))[:7] for run in runs})
    devices = sorted({str(run.get("device")) for run in runs})
    names = " ".join(str(path.relative_to(ROOT)) for path in folders)
    options = f" --methods {' '.join(chosen)}" if chosen else ""
    options += " --out DIRECTORY" if len(folders) > 1 else ""
    return (
        f"n = {len(folders)}; evaluated on {' and '.join(devices)} at {', '.join(commits)}. "
        f"`python tools/report.py {names}{options}`"
    )


def languages_table(folders, read_runs, chosen):
    """Return bits per byte, with a row for each run directory, which is a language's."""
    keys = (("English", statements.BPB["source"]), ("target", statements.BPB["target"]))
    rows, everything = [], {}
    for folder in folders:
        evals = read_runs([folder], chosen)
        values = measure(evals)
        if not rows:
            rows.append([""])
            for side, _ in keys:
                rows[0] += [f"{side}: {display_name(method)}" for method in evals]
        rows.append([LANGUAGES[evals["source"][0]["settings"]["lang"]]["name"]])
        for _, column in keys:
            for method in evals:
                base = None if method == "source" else values["source", column]
                rows[-1].append(cell(values[method, column], base, column))
        for method, found in evals.items():
            everything[folder.parent.name, method] = found
    return [markdown(rows), provenance(folders, everything, chosen).partition(" `")[0]]


def paper_table(model):
    """Return the paper's changes in percent, of the scores averaged over its languages."""
    languages = PAPER[model].values()
    rows = [[model]]
    for column in TABLE_2:
        side = " target" if "/target" in column else ""
        rows[0].append(COLUMNS[column].split()[0] + side)
    for method in PAPER[model]["ne"]:
        row = [display_name(method)]
        for i in range(len(TABLE_2)):
            base = statistics.fmean(numbers["source"][i] for numbers in languages)
            mean = statistics.fmean(numbers[method][i] for numbers in languages)
            row.append(f"{100 * (mean / base - 1):+.1f}%")
        if method != "source":
            rows.append(row)
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


def block(text, read_runs, tables, answers, fail):
    """Return the lines of one table, "tables results/embedded-ne/42" for instance."""
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
    if kind == "languages":
        return languages_table(folders, read_runs, chosen)
    evals = read_runs(folders[:1] if kind == "answers" else folders, chosen)
    if kind == "answers":
        return answers(evals)
    target = LANGUAGES[evals["source"][0]["settings"]["lang"]]["name"]
    lines = tables(evals) if kind == "tables" else statements.table(evals, target)
    return [*lines, provenance(folders, evals, chosen)]


def remake(path, read_runs, tables, answers, fail):
    """Write the page with all its tables remade."""
    old = path.read_text(encoding="utf-8")
    if old.count("<!-- report: ") != len(BLOCK.findall(old)) or "<!-- report: " not in old:
        fail(f"{path}: needs comments <!-- report: ... --> with an <!-- end --> each. Add them")

    def made(match):
        lines = block(match[2], read_runs, tables, answers, fail)
        return match[1] + "\n" + "\n\n".join(lines) + "\n\n" + match[3]

    write_atomically(str(path), BLOCK.sub(made, old))
    print(f"remade {len(BLOCK.findall(old))} tables of {path}")
