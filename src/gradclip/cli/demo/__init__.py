"""Train a small recurrent network with and without clipping, and draw both runs.

A character-level ReLU network (after Le, Jaitly and Hinton, arXiv:1504.00941) reads the Python
documentation that every CPython carries (pydoc_data.topics). Its gradients pass back through 128
time steps and now and then explode, as Pascanu, Mikolov and Bengio (arXiv:1211.5063) describe.
Both runs start from the same weights, see the same batches and take the same learning rates.

With --limits some batches are bad on purpose, and the network, begun more gently, is trained
without clipping, with a fixed limit and with limits of each kind that sets itself.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradclip.cli._console import CliError, print_json, print_table, progress
from gradclip.cli.demo import kinds
from gradclip.cli.demo.network import (
    LAST_STEPS,
    Run,
    documentation,
    initial_network,
    sample,
    train,
    unigram_entropy,
    windows,
)
from gradclip.cli.demo.picture import BLUE, GREY, VERMILION, blank_figure, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXAMPLE = "gradclip demo --out demo.png"

STEPS = 2000
# Above 1 the gradients of a ReLU network tend to grow on their way back through time.
SPECTRAL_RADIUS = 1.3
LEARNING_RATE = 2.0
CLIP_NORM = 1.0
ROWS = (
    ("steps", "steps", "d"),
    ("outcome", "outcome", ""),
    ("first_loss", "first loss", ".3f"),
    ("final_loss", f"final loss (mean of last {LAST_STEPS} steps)", ".3f"),
    ("largest_norm", "largest norm", ".3g"),
    ("final_norm", "final norm", ".3g"),
    ("steps_clipped", "steps clipped", ".1%"),
    ("ms_per_step", "ms per step (median)", ".2f"),
    ("time_clipping", "time measuring and clipping", ".1%"),
)
HIGHEST_NORM_DRAWN = 1e8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``gradclip demo``."""
    parser.add_argument(
        "--limits", action="store_true", help="compare limits that set themselves with a fixed one"
    )
    steps = f"training steps (default {STEPS}, with --limits {kinds.STEPS} in each run)"
    parser.add_argument("--steps", type=int, help=steps)
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="picture to write (PNG)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")


def run(args: argparse.Namespace) -> int:
    """Train the runs, draw them and print their figures."""
    if args.steps is None:
        args.steps = kinds.STEPS if args.limits else STEPS
    if args.steps < 1 or args.seed < 0:
        raise CliError("--steps must be 1 or more and --seed 0 or more")
    return kinds.run(args) if args.limits else _run_two(args)


def _run_two(args: argparse.Namespace) -> int:
    figure = blank_figure(7)
    text = documentation()
    alphabet = sorted(set(text))
    codes = np.searchsorted(alphabet, list(text))
    entropy = unigram_entropy(text)
    start = initial_network(len(alphabet), np.random.default_rng(args.seed), SPECTRAL_RADIUS)
    batches = partial(windows, codes, args.steps, args.seed)
    with replacing(args.out) as picture:
        with (
            progress("training without clipping", args.steps) as advance,
            np.errstate(over="ignore", invalid="ignore"),
        ):
            unclipped = train(start, batches(), LEARNING_RATE, math.inf, advance)
        with progress("training with clipping", args.steps) as advance:
            clipped = train(start, batches(), LEARNING_RATE, CLIP_NORM, advance)
        _draw(figure, unclipped, clipped, len(alphabet), entropy)
        figure.savefig(picture, format="png")
    report = {
        "steps": args.steps,
        "seed": args.seed,
        "learning_rate": LEARNING_RATE,
        "clip_norm": CLIP_NORM,
        "unigram_entropy": entropy,
        "unclipped": figures(unclipped, math.inf),
        "clipped": figures(clipped, CLIP_NORM),
        "sample": sample(clipped.network, alphabet, np.random.default_rng(args.seed)),
        "picture": str(args.out),
    }
    if args.json:
        print_json(report)
    else:
        _print_report(report)
    return 0


def figures(result: Run, clip_norm: float) -> dict[str, Any]:
    """The closing figures of one run."""
    step, clip = np.median(result.step_seconds), np.median(result.clip_seconds)
    return {
        "steps": len(result.losses),
        "outcome": result.outcome,
        "first_loss": result.losses[0],
        "final_loss": float(np.mean(result.losses[-LAST_STEPS:])),
        "largest_norm": float(np.nanmax(result.norms)),
        "final_norm": result.norms[-1],
        "steps_clipped": float(np.mean(np.array(result.norms) > clip_norm)),
        "ms_per_step": float(1e3 * step),
        "time_clipping": float(clip / step),
    }


def _draw(figure: Figure, unclipped: Run, clipped: Run, vocabulary: int, entropy: float) -> None:
    figure.suptitle("The same recurrent network, with and without gradient clipping", weight="bold")
    top, bottom = figure.subplots(2, sharex=True)
    top.set(ylabel="loss (nats per character)", ylim=(0, 1.6 * math.log(vocabulary)))
    _draw_level(top, math.log(vocabulary), "all characters equally likely", ":")
    _draw_level(top, entropy, "character frequencies alone", ":")
    _draw_runs(top, unclipped.losses, clipped.losses, unclipped.outcome)
    bottom.set(xscale="log", xlabel="step", xlim=(1, max(2, len(clipped.losses))))
    bottom.set(yscale="log", ylabel="global gradient norm before clipping")
    bottom.xaxis.set_major_formatter("{x:g}")
    _draw_level(bottom, CLIP_NORM, f"clip_norm = {CLIP_NORM:g}", "--")
    _draw_runs(bottom, unclipped.norms, clipped.norms, unclipped.outcome)
    bottom.set_ylim(CLIP_NORM / 10, min(bottom.get_ylim()[1], HIGHEST_NORM_DRAWN))


def _draw_level(axes: Axes, level: float, label: str, style: str) -> None:
    axes.axhline(level, color=GREY, linestyle=style, linewidth=1, zorder=1)
    right = axes.get_yaxis_transform()
    axes.text(1, level, label, color=GREY, ha="right", va="bottom", transform=right)


def _draw_runs(axes: Axes, unclipped: list[float], clipped: list[float], outcome: str) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.plot(range(1, len(clipped) + 1), clipped, color=BLUE)
    axes.plot(range(1, len(unclipped) + 1), unclipped, color=VERMILION)
    axes.axvline(len(unclipped), color=VERMILION, linestyle="--", linewidth=1)
    right, top = axes.get_yaxis_transform(), axes.get_xaxis_transform()
    below = 0.9 * float(np.nanmin(clipped[-LAST_STEPS:]))
    axes.text(1, below, "clipped run", color=BLUE, ha="right", va="top", transform=right)
    label = f"unclipped run: {outcome}"
    axes.text(len(unclipped), 1, label, color=VERMILION, va="bottom", transform=top)


def _print_report(report: dict[str, Any]) -> None:
    runs = report["unclipped"], report["clipped"]
    rows = [[label, *(format(run[key], style) for run in runs)] for key, label, style in ROWS]
    title = f"{report['steps']} steps, seed {report['seed']}, clip_norm {CLIP_NORM:g}"
    print_table(title, ["", "unclipped", "clipped"], rows)
    print("the clipped network writes:")
    print(textwrap.fill(report["sample"], initial_indent="  ", subsequent_indent="  "))
    print(f"picture: {report['picture']}")
