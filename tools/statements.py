"""What the paper says of its methods, and whether runs over several seeds agree.

A statement is a comparison of two methods on one side: what is kept of English ("source"), or what
is gained in the target language ("target"). Ours is measured in bits per byte. The paper's figure
is the mean change over its eight monolingual English tasks, or over its four target tasks. For
Table 2 it is made from the mean scores of five languages (Tables 10 to 13), elsewhere from those
of Igbo.

The difference is taken run directory by run directory, that is, seed by seed. Of several languages
it is the mean, over the seeds that all of them have. A statement is decided if the 95% interval of
the mean difference (Student's t) leaves out zero. Each statement is tested by itself.
"""

import math
import statistics

from data.rows import LANGUAGES
from tools.evaluations import fail
from tools.methods import display_name
from tools.tables import MT, PAPER, TABLE_2, look_up, markdown, paper_changes

MODEL = "OLMo-2-1124-7B-Instruct"
BPB = {"source": "bpb/source/heldout/bpb", "target": "bpb/target/heldout/bpb"}
# Where it says so, the side, the method that is better, the other. With a margin: the first method
# is as good as the other, within so many points. "calibration-8/ssu-wanda" is ssu-wanda of the run
# directories in calibration-8-ne.
STATEMENTS = (
    ("Table 2", "source", "ssu-wanda", "fft"),
    ("Table 2", "source", "ssu-wanda", "adalora"),
    ("Table 2", "source", "ssu-wanda", "hft"),
    ("Table 2", "source", "ssu-wanda", "gmt"),
    ("Table 2", "source", "ssu-wanda", "ssu-rand"),
    ("Table 2", "source", "ssu-wanda", "ssu-mag"),
    ("Table 2", "source", "adalora", "hft"),
    ("Table 2", "source", "hft", "gmt"),
    ("Table 2", "source", "gmt", "fft"),
    ("Table 2", "source", "ssu-rand", "ssu-mag"),
    ("Table 2", "source", "ssu-mag", "fft"),
    ("Table 2", "source", "ssu-rand", "fft"),
    ("Table 2", "target", "ssu-wanda", "fft"),
    ("Table 2", "target", "ssu-wanda", "hft"),
    ("Table 2", "target", "ssu-wanda", "gmt"),
    ("Table 2", "target", "ssu-wanda", "ssu-rand"),
    ("Table 2", "target", "ssu-wanda", "ssu-mag"),
    ("Table 2", "target", "ssu-wanda", "adalora"),
    ("Table 2", "target", "fft", "adalora"),
    ("Table 3", "source", "ssu-wanda", "ssu-wanda-row"),
    ("Table 3", "source", "ssu-wanda", "ssu-wanda-element"),
    ("Table 3", "source", "ssu-wanda-row", "ssu-wanda-element"),
    ("Table 4", "source", "ssu-sparsegpt", "ssu-rand"),
    ("Table 4", "source", "ssu-fim", "ssu-rand"),
    ("Table 4", "source", "ssu-sparsegpt", "ssu-mag"),
    ("Table 4", "source", "ssu-fim", "ssu-mag"),
    ("Table 4", "source", "ssu-sparsegpt", "ssu-wanda", 1),
    ("Table 4", "source", "ssu-fim", "ssu-wanda", 1),
    ("Table 5", "source", "calibration-short/ssu-wanda", "ssu-wanda", 1),
    ("Table 5", "target", "calibration-short/ssu-wanda", "ssu-wanda", 1),
    ("Table 5", "source", "calibration-8/ssu-wanda", "ssu-wanda", 1),
    ("Table 6", "source", "ssu-wanda", "lota-90"),
    ("Table 6", "source", "lota-90", "lota-50"),
    ("Table 6", "source", "s2ft-down", "ssu-wanda"),
    ("Table 6", "target", "lota-50", "ssu-wanda"),
    ("Table 6", "target", "ssu-wanda", "lota-90"),
    ("Table 6", "target", "ssu-wanda", "s2ft-down"),
    ("Table 14", "source", "s2ft-down", "s2ft-down-output"),
    ("Table 14", "target", "s2ft-down", "s2ft-down-output"),
    ("Figure 2", "source", "ssu-wanda@0.75", "ssu-wanda@0.25"),
    ("Figure 2", "target", "ssu-wanda@0.25", "ssu-wanda@0.75"),
    ("Figure 2", "source", "ssu-wanda@0.875", "ssu-wanda@0.625", 1),
    ("Figure 2", "source", "ssu-wanda@0.25", "gmt@0.25"),
    ("Figure 2", "source", "ssu-wanda@0.75", "gmt@0.75"),
    ("Figure 2", "source", "ssu-wanda@0.25", "hft@0.25"),
    ("Figure 2", "source", "ssu-wanda@0.75", "hft@0.75"),
    ("Figure 2", "source", "ssu-wanda@0.875", "hft@0.875"),
)
# What the paper has in place of our chats and sizes: Alpaca, and a quarter of its examples
IN_PAPER = {
    "calibration-short/ssu-wanda": "ssu-wanda-alpaca",
    "calibration-8/ssu-wanda": "ssu-wanda-128",
}
# of Student's t, two-sided 95%, for n - 1 degrees of freedom
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def in_paper(where, side, method):
    """Return the paper's mean change in percent, or None where it gives no figure."""
    method = IN_PAPER.get(method, method)
    languages = list(PAPER[MODEL].values()) if where == "Table 2" else [PAPER[MODEL]["ig"]]
    if any(method not in numbers for numbers in languages):
        return None
    changes = []
    for column, change in zip(TABLE_2, paper_changes(languages, method), strict=True):
        if f"/{side}/" in column and column != MT[0]:
            changes.append(change)
    return statistics.fmean(changes)


def measured(groups, side, method):
    """Return {seed: improvement over Source in percent} of a method.

    groups: {folder of run directories: their evaluations}. A run directory is named by its seed.
    Of runs that several folders have, those of the first count. Folders whose Source of a seed
    differs are of other data, and are refused.
    """
    folder, _, method = method.rpartition("/")
    changes, bases = {}, {}
    for name, evals in groups.items():
        if folder and not name.startswith(f"{folder}-"):
            continue
        base = {run["run"]: look_up(run["results"], BPB[side]) for run in evals["source"]}
        for seed, number in base.items():
            if number and abs(number / bases.setdefault(seed, number) - 1) > 0.001:
                fail(f"{name}/{seed}: Source differs from that of another folder. Remake one")
        for run in evals.get(method, []):
            number = look_up(run["results"], BPB[side])
            if number and run["run"] not in changes:
                changes[run["run"]] = 100 * (1 - number / base[run["run"]])
    return changes


def by_language(groups):
    """Return {code: groups} of groups, {folder of run directories: their evaluations}."""
    languages = {}
    for name, evals in groups.items():
        languages.setdefault(evals["source"][0]["settings"]["lang"], {})[name] = evals
    return languages


def mean_over_languages(languages, side, method):
    """Return {seed: mean of what `measured` finds}, of the seeds that all languages have.

    languages: {code: groups}.
    """
    found = [measured(groups, side, method) for groups in languages.values()]
    seeds = [seed for seed in found[0] if all(seed in changes for changes in found)]
    return {seed: statistics.fmean(changes[seed] for changes in found) for seed in seeds}


def interval(differences):
    """Return the 95% interval of the mean of two or more differences."""
    mean, n = statistics.fmean(differences), len(differences)
    half = T95[min(n, 10)] * statistics.stdev(differences) / math.sqrt(n)
    return mean - half, mean + half


def verdict(differences, margin=None):
    """Say whether differences, one of each seed, agree with a statement."""
    if len(differences) < 2:
        return "not decided"
    low, high = interval(differences)
    if margin is not None:
        if -margin < low and high < margin:
            return "agrees"
        return "disagrees" if high < -margin or low > margin else "not decided"
    if low > 0:
        return "agrees"
    return "disagrees" if high < 0 else "not decided"


def figure(numbers):
    """Return "-2.7 ± 0.1"."""
    text = f"{statistics.fmean(numbers):+.1f}"
    if len(numbers) > 1:
        text += f" ± {statistics.stdev(numbers):.1f}"
    return text


def sentence(side, a, b, margin, target):
    a, b = (" of ".join(map(display_name, reversed(name.split("/")))) for name in (a, b))
    what = "keeps {} English" if side == "source" else f"gains {{}} {target}"
    if margin is None:
        return f"{a} {what.format('more')} than {b}"
    return f"{a} {what.format('as much')} as {b}, within {margin}"


def table(groups):
    """Return a table with a row for each statement on methods that were measured, and a count.

    groups: {folder of run directories: their evaluations}.
    """
    languages = by_language(groups)
    names = [LANGUAGES[lang]["name"] for lang in languages]
    target = names[0] if len(names) == 1 else "of the target language"
    head = ["Paper", "Statement", "Its figures, %", "Ours, %", "Difference", "n", "Verdict"]
    rows, counts = [head], {"agrees": 0, "disagrees": 0, "not decided": 0}
    for where, side, a, b, *margin in STATEMENTS:
        ours, other = (mean_over_languages(languages, side, method) for method in (a, b))
        runs = sorted(ours.keys() & other.keys())
        if not runs:
            continue
        margin = margin[0] if margin else None
        pair = [in_paper(where, side, a), in_paper(where, side, b)]
        theirs = "its curves" if None in pair else f"{pair[0]:+.1f}, {pair[1]:+.1f}"
        ours, other = [ours[run] for run in runs], [other[run] for run in runs]
        differences = [x - y for x, y in zip(ours, other, strict=True)]
        found = verdict(differences, margin)
        counts[found] += 1
        row = [where, sentence(side, a, b, margin, target), theirs]
        row += [f"{figure(ours)}, {figure(other)}", figure(differences), str(len(runs)), found]
        rows.append(row)
    counts["not measured"] = len(STATEMENTS) - sum(counts.values())
    parts = ", ".join(f"{name}: {count}" for name, count in counts.items())
    summary = f"Of {len(STATEMENTS)} statements, {parts}."
    return [markdown(rows), summary]
