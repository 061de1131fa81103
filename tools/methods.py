"""What the methods are called, in which order they stand, and how pictures draw them.

A run directory has a folder for each method, or for a method and a ratio: "ssu-wanda@0.25".
"""

import re

# name: (its name in the paper, color, marker), in the order of the paper's Tables 2, 4, 3 and 6.
# No two markers are alike, so that a picture is readable without color.
METHODS = {
    "source": ("Source", "0.5", ""),
    "fft": ("FFT", "black", "s"),
    "adalora": ("AdaLoRA", "#b8860b", "P"),
    "hft": ("HFT", "#1b9e77", "D"),
    "gmt": ("GMT", "#1f78b4", "v"),
    "ssu-rand": ("SSU-Rand", "#6baed6", "o"),
    "ssu-mag": ("SSU-Mag", "#e7298a", "^"),
    "ssu-wanda": ("SSU-Wanda", "#d62728", "*"),
    "ssu-sparsegpt": ("SSU-SparseGPT", "#ff7f0e", "X"),
    "ssu-fim": ("SSU-FIM", "#8c510a", "p"),
    "ssu-wanda-row": ("SSU-Wanda, rows", "#756bb1", "<"),
    "ssu-wanda-element": ("SSU-Wanda, elements", "#bc80bd", ">"),
    "lota": ("LoTA", "#17becf", "h"),
    "lota-90": ("LoTA (90%)", "#01665e", "$9$"),
    "lota-50": ("LoTA (50%)", "#35978f", "$5$"),
    "s2ft-down": ("S2FT (down)", "#636363", "1"),
    "s2ft-down-output": ("S2FT (down, output)", "#969696", "2"),
    "s2ft-down-embeddings": ("S2FT (down, embeddings)", "#252525", "4"),
}
OTHER = ("#a6761d", "d")  # color and marker of a folder with any other name


def method_and_ratio(run):
    """Return ("ssu-wanda", 0.25) for "ssu-wanda@0.25", ("lota", 0.9) for "lota-90"; else 0.5."""
    found = re.fullmatch(r"(.+)@(\d*\.?\d+)", re.sub(r"^lota-(\d+)$", r"lota@0.\1", run))
    return (found[1], float(found[2])) if found else (run, 0.5)


def display_name(run):
    """Return "SSU-Wanda 0.25" for "ssu-wanda@0.25"."""
    method, _, ratio = run.partition("@")
    name = METHODS[method][0] if method in METHODS else method
    return f"{name} {ratio}".strip()


def style(run):
    """Return the color and marker of a method, which are the same in all pictures."""
    method = run.partition("@")[0]
    return METHODS[method][1:] if method in METHODS else OTHER


def in_order(runs):
    """Sort the folders of a run directory: methods in the order above, then any others."""

    def place(run):
        method = run.partition("@")[0]
        return [*METHODS, method].index(method), run

    return sorted(runs, key=place)
