"""Train the network on some bad batches, with limits of each kind, and draw what each does."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gradclip import limits
from gradclip.cli._console import print_json, print_table, progress
from gradclip.cli.demo.network import (
    LAST_STEPS,
    Batch,
    Codes,
    Run,
    documentation,
    initial_network,
    train,
    windows,
)
from gradclip.cli.demo.picture import BLUE, VERMILION, blank_figure, replacing
from gradclip.cli.demo.spikes import spikes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEPS = 1000
# At this radius and rate good batches alone seldom do harm: what there is to see comes of the bad.
SPECTRAL_RADIUS = 0.9
LEARNING_RATE = 0.3
FIXED = 1.0
SHARE_OF_BAD = 0.05
FIRST_BAD = 150  # so many batches are good, for every limit's warm-up
SCALE = 10.0
SPIKE_WINDOW = 100

COLUMNS = (
    ("final_loss", "final loss", ".3f"),
    ("highest_loss", "highest loss", ".2f"),
    ("spikes", "spikes", "d"),
    ("steps_clipped", "clipped", ".1%"),
    ("steps_skipped", "skipped", "d"),
    ("ms_per_step", "ms per step", ".2f"),
    ("ms_clipping", "ms clipping", ".3f"),
)
NORMS_DRAWN = 0.1, 100.0
GREEN, PURPLE = "#009E73", "#CC79A7"  # of Okabe and Ito, too

Bad = npt.NDArray[np.bool_]


def every_limit() -> dict[str, Any]:
    """The limits that are compared; those that learn know nothing yet."""
    return {
        "no limit": math.inf,
        f"fixed: {FIXED:g}": FIXED,
        "ZScore()": limits.ZScore(),
        'ZScore(4, warmup=100, log=True, beyond="skip")': limits.ZScore(
            4, warmup=100, log=True, beyond="skip"
        ),
        "Percentile(10)": limits.Percentile(10),
        "Percentile(50, 100, 2.0)": limits.Percentile(50, 100, 2.0),
        "Average(2.0)": limits.Average(2.0),
        "PerTensor(Average(1.05))": limits.PerTensor(limits.Average(1.05)),
    }


def run(args: argparse.Namespace) -> int:
    """Train all runs, draw them and print their figures."""
    figure = blank_figure(11)
    text = documentation()
    alphabet = sorted(set(text))
    codes = np.searchsorted(alphabet, list(text))
    start = initial_network(len(alphabet), np.random.default_rng(args.seed), SPECTRAL_RADIUS)
    shuffled, scaled = bad_batches(args.steps, args.seed)
    runs = {}
    with replacing(args.out) as picture:
        for name, limit in every_limit().items():
            batches = spoilt(codes, args.seed, shuffled, scaled, len(alphabet))
            with (
                progress(f"training: {name}", args.steps) as advance,
                np.errstate(over="ignore", invalid="ignore"),
            ):
                runs[name] = train(start, batches, LEARNING_RATE, limit, advance)
        _draw(figure, runs, shuffled, scaled)
        figure.savefig(picture, format="png")
    report = {
        "steps": args.steps,
        "seed": args.seed,
        "learning_rate": LEARNING_RATE,
        "batches_with_shuffled_labels": int(shuffled.sum()),
        "batches_with_scaled_inputs": int(scaled.sum()),
        "runs": {name: figures(each, shuffled | scaled) for name, each in runs.items()},
        "picture": str(args.out),
    }
    if args.json:
        print_json(report)
    else:
        _print_report(report)
    return 0


def bad_batches(count: int, seed: int) -> tuple[Bad, Bad]:
    """Of so many batches, which have shuffled labels and which scaled inputs."""
    drawn = np.random.default_rng([seed, 1]).random(count)
    drawn[:FIRST_BAD] = 1.0
    return drawn < SHARE_OF_BAD / 2, (drawn >= SHARE_OF_BAD / 2) & (drawn < SHARE_OF_BAD)


def spoilt(codes: Codes, seed: int, shuffled: Bad, scaled: Bad, vocabulary: int) -> Iterator[Batch]:
    """The batches of `windows`, of which some are bad: the same ones for the same seed."""
    rng = np.random.default_rng([seed, 2])
    every = windows(codes, len(shuffled), seed)
    for batch, wrong, large in zip(every, shuffled, scaled, strict=True):
        if wrong:  # all letters stand for others
            yield batch._replace(targets=rng.permutation(vocabulary)[batch.targets])
        else:
            yield batch._replace(scale=SCALE if large else 1.0)


def figures(result: Run, bad: Bad) -> dict[str, Any]:
    """What the table says of a run; the losses are those of good batches."""
    steps = len(result.losses)
    losses = np.array(result.losses)
    good = losses[~bad[:steps]]
    later = losses[FIRST_BAD:][~bad[FIRST_BAD:steps]]
    norms, left = np.array(result.norms), np.array(result.left)
    return {
        "steps": steps,
        "outcome": result.outcome,
        "final_loss": float(np.mean(good[-LAST_STEPS:])),
        "highest_loss": float(np.max(later, initial=-math.inf)) if len(later) else good[-1],
        "spikes": int(spikes(good, SPIKE_WINDOW).sum()),
        "steps_clipped": float(np.mean(left < norms)),
        "steps_skipped": int(np.sum((left == 0) & (norms > 0))),
        "ms_per_step": float(1e3 * np.median(result.step_seconds)),
        "ms_clipping": float(1e3 * np.median(result.clip_seconds)),
    }


def _draw(figure: Figure, runs: dict[str, Run], shuffled: Bad, scaled: Bad) -> None:
    figure.suptitle("Norms and limits of the same network, with some bad batches", weight="bold")
    grid = figure.subplots(len(runs) // 2, 2, sharex=True, sharey=True)
    grid[0, 0].set(xlim=(1, max(2, len(shuffled))), yscale="log", ylim=NORMS_DRAWN)
    for axes, (name, result) in zip(grid.flat, runs.items(), strict=True):
        axes.set_title(name, fontsize="medium", loc="left")
        _draw_run(axes, result)
        loss = figures(result, shuffled | scaled)["final_loss"]
        if math.isfinite(loss):
            text = f"final loss {loss:.3f}"
            axes.text(1, 0.97, text, ha="right", va="top", transform=axes.transAxes)
        _mark(axes, shuffled, NORMS_DRAWN[0] * 1.6, GREEN, "^", "labels shuffled")
        _mark(axes, scaled, NORMS_DRAWN[0] * 1.2, PURPLE, "s", "inputs scaled")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    for axes in grid[:, 0]:
        axes.set_ylabel("global norm")
    handles, labels = grid[1, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


def _draw_run(axes: Axes, result: Run) -> None:
    norms, left = np.array(result.norms), np.array(result.left)
    steps = np.arange(1, len(norms) + 1)
    skipped = (left == 0) & (norms > 0)
    clipped = (left < norms) & ~skipped
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.plot(steps, norms, color="0.55", linewidth=0.6, label="norm before clipping")
    axes.plot(
        steps[clipped],
        left[clipped],
        "o",
        color=VERMILION,
        markersize=2.2,
        label="after, where clipped",
    )
    axes.plot(steps[skipped], norms[skipped], "x", color="black", markersize=5, label="skipped")
    axes.plot(steps, result.limits, color=BLUE, linewidth=1, label="limit")
    if not math.isfinite(result.losses[-1]):
        axes.axvline(steps[-1], color="black", linestyle="--", linewidth=1)
        axes.text(steps[-1] + 10, 10, result.outcome)


def _mark(axes: Axes, bad: Bad, height: float, colour: str, marker: str, label: str) -> None:
    at = 1 + np.flatnonzero(bad)
    heights = np.full(len(at), height)
    axes.plot(at, heights, marker, color=colour, markersize=3, label=label)


def _print_report(report: dict[str, Any]) -> None:
    rows = [
        [name, *(format(run[key], style) for key, _, style in COLUMNS), run["outcome"]]
        for name, run in report["runs"].items()
    ]
    wrong, large = report["batches_with_shuffled_labels"], report["batches_with_scaled_inputs"]
    title = (
        f"{report['steps']} steps, seed {report['seed']}; {wrong} batches with shuffled labels, "
        f"{large} with inputs times {SCALE:g}"
    )
    print_table(title, ["limit", *(label for _, label, _ in COLUMNS), "outcome"], rows)
    print(
        f"losses are of good batches: the final one is the mean of the last {LAST_STEPS}, the "
        f"highest from step {FIRST_BAD + 1} on;\n"
        f"spikes are seven standard deviations from the mean of the {SPIKE_WINDOW} before; "
        "times are medians"
    )
    print(f"picture: {report['picture']}")
