"""Report what each method of a run kept of English and gained in the target language.

    python tools/report.py runs/ne                       # report.md and pictures in runs/ne
    python tools/report.py runs/ne runs-43/ne --out DIR  # mean and standard deviation over seeds
    python tools/report.py --page docs/RESULTS.md        # remake the tables of a page

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
import re
import statistics
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import broadcast_tensors

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.identity import digest_of
from data.rows import LANGUAGES, write_atomically
from tools import page, pictures
from tools.evaluations import fail, read_runs, training_differences
from tools.methods import display_name
from tools.pictures import MARK
from tools.tables import COLUMNS, answers, improvement, look_up, markdown, measure, tables
from variants import model_card

ROOT = Path(__file__).resolve().parent.parent


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
    rows = []
    for mask in masks.values():
        rows.append([overlap(mask, other) for other in masks.values()])
    return rows


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
            try:
                old = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # its owner has edited it
                old = ""
            new = model_card.with_results(old, lang, table, numbers)
            if new is None:
                print(f"{path} is not of train.py, and stays as it is")
            elif new != old:
                write_atomically(path, new)
                print(f"added the results to {path}")


def from_root(path):
    """Return a path from the repository's root, if it lies there."""
    whole = path.resolve()
    return str(whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else path)


def write_report(folders, chosen, out):
    """Write report.md and its pictures. Return (the lines of report.md, the names of pictures)."""
    evals = read_runs(folders, chosen)
    masks = read_masks(folders[0], list(evals))
    names, overlaps = list(map(display_name, masks)), overlaps_of(masks)
    target = LANGUAGES[evals["source"][0]["settings"]["lang"]]["name"]

    # Text
    lines = [f"# English kept, {target} gained"]
    lines.append(f"{MARK} from {', '.join(map(from_root, folders))}.")
    if model := evals["source"][0].get("model"):
        lines.append(f"Source is {model}.")
    lines.append("In brackets the change from Source. After ± the standard deviation over runs.")
    for folder in folders:
        lines += training_differences(folder, list(evals))
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
        pictures.save(figure, out / f"{name}.png")
        lines.append(f"![{name}]({name}.png)")
    write_atomically(out / "report.md", "\n\n".join(lines) + "\n")
    return lines, list(figures)


def main(argv=None):
    sys.stdout.reconfigure(errors="backslashreplace")  # the locale may not have our arrows
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
            page.remake(args.page, write_report)
        else:
            out = args.out or args.runs[0]
            lines, _ = write_report(args.runs, args.methods, out)
            print("\n\n".join(lines), f"wrote {out}/report.md", sep="\n\n")
            add_to_cards(args.runs, args.methods)
    except OSError as error:
        fail(f"a file cannot be read or written ({error}). Correct its name, or free space")
    except KeyboardInterrupt:
        print("report.py: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
