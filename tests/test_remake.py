"""results/remake.sh: what each target runs."""

import subprocess

import pytest
from conftest import ROOT

from tools import plan

RUNS = {
    "figure2": 2 * (3 * 6 + 2 * 3 * 2),  # texts x (methods x ratios, and two seeds of two ratios)
    "table5": 5 * 3,
    "tables346": 16 * 2 * 3,
    "languages": 4 * 5 * 3,
    "precision": 3 * 3 + 2 * 2 * 3,
    "eight-bit": 3 * 3,
}


def remake(*argv):
    command = ["bash", "results/remake.sh", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_list_names_all_targets_with_runs_and_hours():
    rows = [line.split() for line in remake("--list").stdout.splitlines()]
    assert {name: int(count) for name, count, *_ in rows} == RUNS
    assert [float(hours) for *_, hours, _ in rows] == pytest.approx(
        [count * 4 / 60 for count in RUNS.values()], abs=0.06
    )


def test_every_method_is_run():
    text = (ROOT / "results/remake.sh").read_text()
    named = set()
    for name in ("single", "columns"):
        named |= set(text.split(f'\n{name}="')[1].split('"')[0].split())
    assert named | {"ssu-wanda-row", "ssu-wanda-element"} == set(plan.METHODS) - {"lota"}


def test_an_unknown_target_is_refused_before_anything_runs():
    done = remake("figure2", "figure9")
    assert done.returncode == 2 and "no target figure9" in done.stderr and not done.stdout
