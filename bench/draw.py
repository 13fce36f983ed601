"""Draw the last run of each case in a file that ``gradclip bench --csv FILE`` has written.

python bench/draw.py [bench/results.csv [docs/bench.png]]
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from gradclip.cli.bench.cases import CASES

ROOT = Path(__file__).parent.parent
OURS, OTHERS, BAR, NOTE = "#1668a8", "#c3c8ce", "#c2410c", "#4b5563"
BLANK = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
HEADING_HEIGHT = 1.4
UNITS = {
    "R": "1 = R, reading once",
    "R + S": "1 = R + S, reading and writing",
    "allowed": "1 = 1.2 all-reduces + 0.1 ms + 1 us a tensor",
}
YARDSTICKS = ("R", "S", "one thread", "allowed")
Row = dict[str, str]


def last_runs(path: Path) -> list[Row]:
    """The last run of each case on the processor that was measured last: what compares times.

    Without the rows of the yardsticks.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    newest = max(rows, key=lambda row: row["date"], default={"processor": ""})
    here = [row for row in rows if row["processor"] == newest["processor"]]
    latest = {row["case"]: row["date"] for row in sorted(here, key=lambda row: row["date"])}
    return [
        row
        for row in here
        if row["date"] == latest[row["case"]]
        and row["median_s"]
        and row["unit"] != "ms"
        and row["system"] not in YARDSTICKS
    ]


def groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows of each case, in the order of the cases."""
    for case in CASES:
        mine = [row for row in rows if row["case"] == case]
        if mine:
            yield mine


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a group of bars per case."""
    count = len(rows) + HEADING_HEIGHT * len(list(groups(rows)))
    figure, axes = plt.subplots(figsize=(8.4, 0.19 * count + 0.9), layout="constrained")
    values = [float(row["value"]) for row in rows]
    left, right = min(*values, 0.1) / 1.6, max(*values, 10.0) * 1.6
    axes.set(xscale="log", xlim=(left, right), ylim=(count, 0))
    axes.axvline(1, color=NOTE, lw=0.8, zorder=0)
    place, names = 0.0, {}
    for group in groups(rows):
        what, unit = CASES[group[0]["case"]].what, group[0]["unit"]
        heading = f"{what}  ({UNITS.get(unit, f'1 = {unit}')})"
        axes.text(left, place + 0.85, heading, va="center", size=8, weight="bold", bbox=BLANK)
        place += HEADING_HEIGHT
        for row in group:
            _draw_bar(axes, place + 0.5, left, row)
            names[place + 0.5] = row["system"]
            place += 1
    axes.set_yticks(list(names), list(names.values()), size=7.5)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.spines[["left", "right", "top"]].set_visible(False)
    about = rows[0]
    axes.set_xlabel(
        "time, log scale: shorter is faster. Red: what gradclip is held to.\n"
        f"{about['processor']}, {about['threads']} threads, {about['kernel']} kernel, "
        f"{about['date'][:10]}.\n{about['versions']}",
        size=7,
        color=NOTE,
    )
    figure.savefig(path, dpi=150)


def _draw_bar(axes: Axes, middle: float, left: float, row: Row) -> None:
    value = float(row["value"])
    limit = float(row["bar"] or 0)
    ours = row["system"] == "gradclip"
    axes.barh(middle, value - left, 0.82, left, color=OURS if ours else OTHERS)
    if limit:
        axes.plot([limit, limit], [middle - 0.46, middle + 0.46], color=BAR, lw=2)
    label = f"{value:.2f}" if value < 10 else f"{value:.0f}"
    weight = "bold" if ours else "normal"
    end = max(value, limit) * 1.03
    axes.text(end, middle, label, va="center", size=7.5, weight=weight, bbox=BLANK)


def main() -> None:
    """Read and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, default=ROOT / "bench" / "results.csv")
    parser.add_argument("picture", nargs="?", type=Path, default=ROOT / "docs" / "bench.png")
    args = parser.parse_args()
    rows = last_runs(args.results)
    if not rows:
        parser.error(f"{args.results} holds no run that compares times")
    draw(rows, args.picture)


if __name__ == "__main__":
    main()
