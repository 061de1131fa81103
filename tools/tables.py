"""The measures of evaluate.py and tools/chat_eval.py, and the tables that tools/report.py makes.

The paper's own numbers are in tools/paper_numbers.json, by model, language and method.
"""

import json
import re
import statistics
from pathlib import Path

from data.rows import LANGUAGES
from tools.methods import display_name

PAPER = json.loads(Path(__file__).with_name("paper_numbers.json").read_text(encoding="utf-8"))
# Where in `results` of eval.json and chat.json, and the heading. Arrows point to better values.
COLUMNS = {
    "bpb/source/heldout/bpb": "chat bpb ↓",
    "bpb/source/prose/bpb": "prose bpb ↓",
    "bpb/source/news/bpb": "news bpb ↓",
    "mcq/source/accuracy": "MCQ accuracy ↑",
    "bpb/target/heldout/bpb": "bpb ↓",
    "mcq/target/accuracy": "MCQ accuracy ↑",
    # The thirteen columns of Table 2, in its order
    "ifeval/source/accuracy": "IFEval ↑",
    "ae2/source/win_rate": "AE2 ↑",
    "mtb/source/score": "MTB ↑",
    "gsm8k/source/accuracy": "GSM8K ↑",
    "t3/source/macro": "T3 ↑",
    "mt/source/chrf": "MT X→en chrF++ ↑",
    "sum/source/chrf": "SUM chrF++ ↑",
    "mrc/source/accuracy": "MRC ↑",
    "mmlu/source/accuracy": "MMLU ↑",
    "mt/target/chrf": "MT en→X chrF++ ↑",
    "sum/target/chrf": "SUM chrF++ ↑",
    "mrc/target/accuracy": "MRC ↑",
    "mmlu/target/accuracy": "MMLU ↑",
    # Answers to a few English prompts
    "chat/stop_rate": "stop rate ↑",
    "chat/repetition": "repetition ↓",
    "chat/english_share": "English share ↑",
    "codemix/source/share": "code-mixed ↓",
}
TABLE_2 = PAPER["columns"]
MT = ("mt/source/chrf", "mt/target/chrf")
DIGITS = {"chrf": 1, "win_rate": 1, "score": 2, "stop_rate": 2, "repetition": 2, "english_share": 2}
NO_CHANGE = ("chat/", "codemix/")  # fractions whose change in percent says nothing
PUBLISHED = {  # the endings of the authors' checkpoints, as in ssu-project/<model>-<language>-ssu
    "fft": "fft",
    "adalora": "adalora",
    "hft": "hft",
    "gmt": "gmt",
    "random": "ssu-rand",
    "magnitude": "ssu-mag",
    "ssu": "ssu-wanda",
    "ssu_sgpt": "ssu-sparsegpt",
    "ssu_fisher": "ssu-fim",
    "ssu_rw": "ssu-wanda-row",
    "ssu_ew": "ssu-wanda-element",
    "lota": "lota-90",
    "lota_0.5": "lota-50",
    "s2ft_d": "s2ft-down",
    "s2ft_do": "s2ft-down-output",
}


def look_up(results, column):
    """Return the number of a column, or None if it was not measured."""
    number = results
    for key in column.split("/"):
        number = (number or {}).get(key)
    return number


def measure(evals):
    """Return {(method, column): [its value in each run directory]}, without what is missing."""
    values = {}
    for method, runs in evals.items():
        for column in COLUMNS:
            numbers = [look_up(run["results"], column) for run in runs]
            if None not in numbers:
                values[method, column] = numbers
    return values


def has_table_2(values):
    """Return whether anything of Table 2 was measured, beside MT, which embedded data has too."""
    return any(column in TABLE_2 and column not in MT for _, column in values)


def columns_of(side, values):
    """Return the measured columns of English ("source") or of the target language."""
    found = [column for column in COLUMNS if ("source", column) in values]
    return [column for column in found if ("/target" in column) == (side == "target")]


def markdown(rows):
    """Return a table, whose head is the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def number_text(number, column):
    return f"{number:.{DIGITS.get(column.rpartition('/')[2], 3)}f}"


def cell(numbers, base, column):
    """Return "1.046 ± 0.002 (+2.7%)": mean, deviation over run directories, change from `base`.

    Without a base, or from zero, there is no change. Without numbers, as where no answer had a
    letter to judge, the cell is "-".
    """
    if not numbers:
        return "-"
    mean = statistics.fmean(numbers)
    text = number_text(mean, column)
    if len(numbers) > 1:
        text += f" ± {number_text(statistics.stdev(numbers), column)}"
    if base and any(base) and not column.startswith(NO_CHANGE):
        change = round(100 * (mean / statistics.fmean(base) - 1), 1) + 0.0  # not -0.0
        text += f" ({change:+.1f}%)"
    return text


def row_of(method, columns, values):
    """Return the cells of a method. Source has no change from itself."""
    cells = []
    for column in columns:
        base = None if method == "source" else values.get(("source", column))
        cells.append(cell(values.get((method, column)), base, column))
    return cells


def ability_table(title, columns, evals, values):
    rows = [[title, *(COLUMNS[column] for column in columns)]]
    for method, runs in evals.items():
        name = display_name(method)
        if len(runs) < len(evals["source"]):
            name += f" (n={len(runs)})"
        rows.append([name, *row_of(method, columns, values)])
    return markdown(rows)


def of_paper(model, lang):
    """Return (model, method) whose numbers the paper has, or (None, None).

    A source model is in the paper as "source"; a checkpoint that its authors published is in it as
    the method that made it.
    """
    name = str(model).rstrip("/").rpartition("/")[2]
    if lang in PAPER.get(name, {}):
        return name, "source"
    found = re.fullmatch(rf"(.+)-{lang}-(.+)", name)
    if found and lang in PAPER.get(found[1], {}):
        return found[1], PUBLISHED.get(found[2])
    return None, None


def paper_changes(languages, method):
    """Return the paper's change of each column of Table 2, in percent, from means over languages.

    languages: [{method: numbers}].
    """
    changes = []
    for i in range(len(TABLE_2)):
        base = statistics.fmean(numbers["source"][i] for numbers in languages)
        mean = statistics.fmean(numbers[method][i] for numbers in languages)
        changes.append(100 * (mean / base - 1))
    return changes


def paper_row(model, lang, method):
    """Return the cells of a method in the paper, or None if it has none in this language."""
    numbers = PAPER.get(model, {}).get(lang, {})
    if method not in numbers:
        return None
    cells = []
    for column, number, base in zip(TABLE_2, numbers[method], numbers["source"], strict=True):
        cells.append(cell([number], None if method == "source" else [base], column))
    return cells


def heads_of_table_2(lang):
    """Return {column: heading} with the language in it, "MT en→ne ↑" for instance."""
    heads = {}
    for column in TABLE_2:
        head = COLUMNS[column].replace(" chrF++", "").replace("X", lang)
        if column.startswith(("sum", "mrc", "mmlu")):
            task, arrow = head.split()
            code = lang if "/target" in column else "en"
            head = f"{task} {code} {arrow}"
        heads[column] = head
    return heads


def table_2(evals, values, lang, target):
    """Return the paper's Table 2 for these runs, the paper's own numbers below ours."""
    model, source = of_paper(evals["source"][0].get("model"), lang)
    rows = [[f"Table 2, {target}", *heads_of_table_2(lang).values()]]
    if source not in (None, "source"):
        rows.append(["Source in the paper", *paper_row(model, lang, "source")])
    for run in evals:
        method = source if run == "source" and source else run
        published = " (published)" if run == "source" and method != "source" else ""
        rows.append([display_name(method) + published, *row_of(run, TABLE_2, values)])
        if cells := paper_row(model, lang, method):
            rows.append([f"{display_name(method)} in the paper", *cells])
    return markdown(rows)


def most(evals, path):
    """Return the largest of the numbers that all evaluations have at a path."""
    return max(look_up(run["results"], path) or 0 for run in sum(evals.values(), []))


def notes(evals, heads):
    """Return lines on the numbers of items, on answers that were cut off, and on judges.

    heads: {column: heading}.
    """
    source = evals["source"][0]["results"]
    sizes, judges, cut = [], [], []
    for column, head in heads.items():
        found = look_up(source, column.rpartition("/")[0]) or {}
        size = found.get("n") or found.get("documents")
        if size:
            sizes.append(f"{head[:-2]} {size}")
        if "cut" in found:
            highest = most(evals, column.rpartition("/")[0] + "/cut")
            if highest > 0:
                cut.append(f"{head[:-2]} {highest:.0%}")
        if "judge" in found:
            judges.append(f"{head[:-2]} by {found['judge']['name']}")
        if "unparsed" in found:
            unparsed = most(evals, column.rpartition("/")[0] + "/unparsed")
            judges.append(f"of which at most {unparsed:.1%} could not be read")
    lines = [f"Items or documents: {', '.join(sizes)}."]
    if cut:
        lines.append(f"Answers that --max-new-tokens cut off, at most: {', '.join(cut)}.")
    if judges:
        lines.append(f"Judged: {', '.join(judges)}.")
    return lines


def improvement(values, methods, side):
    """Return (what is measured, {method: [improvement over Source in percent, of each run]}).

    That of bits per byte or, where they were not measured, the mean over all tasks. Translation
    into English is left out of it, as in the paper: it gains from the target language.
    """
    columns = []
    for column in columns_of(side, values):
        everywhere = all((method, column) in values for method in methods)
        if everywhere and not column.startswith(NO_CHANGE) and any(values["source", column]):
            columns.append(column)
    columns = [column for column in columns if column != MT[0]] or columns
    columns = [column for column in columns if "/heldout/" in column] or columns
    found = {}
    for method in methods if columns else []:
        changes = []
        for column in columns:
            base = statistics.fmean(values["source", column])
            sign = -100 if "↓" in COLUMNS[column] else 100
            changes.append([sign * (value / base - 1) for value in values[method, column]])
        found[method] = [statistics.fmean(run) for run in zip(*changes, strict=True)]
    names = [COLUMNS[column][:-2] for column in columns]
    return names[0] if len(names) == 1 else f"mean of {len(names)} tasks", found


def tables(evals):
    """Return the parts of a report that are text: tables, and a line on what is in them."""
    source = evals["source"][0]
    values, lang = measure(evals), source["settings"]["lang"]
    target = LANGUAGES[lang]["name"]
    lines = []
    shown = heads_of_table_2(lang) if has_table_2(values) else {}
    if shown:
        lines.append(table_2(evals, values, lang, target))
        lines += notes(evals, {c: head for c, head in shown.items() if ("source", c) in values})
    for side, title in (("source", "English"), ("target", target)):
        columns = [column for column in columns_of(side, values) if column not in shown]
        if columns:
            lines.append(ability_table(title, columns, evals, values))
            lines += notes(evals, {column: COLUMNS[column] for column in columns})
    return lines


def answers(evals):
    """Return the answers of all models to the first prompt of `chat`, as lines."""
    lines = []
    for method, runs in evals.items():
        found = look_up(runs[0]["results"], "chat/answers")
        if found:
            lines = lines or [f"> {found[0]['prompt']}"]
            lines.append(f"**{display_name(method)}:** {' '.join(found[0]['answer'].split())}")
    return lines
