"""Train a small character transformer at too high a learning rate, with limits of each kind.

The model of torch_characters.py, smaller, is trained by SGD with momentum at a rate at which a
fixed limit of 1 spikes: without a limit, with that one, and with each kind that sets itself, from
the same three seeds. The table has the spike score of OLMo 2 (arXiv:2501.00656, section 3): the
share of losses that are at least seven standard deviations away from the mean of those before; of
100 here, as the runs are short, where theirs is of 1,000. AdaGC (arXiv:2502.11034) reports spike
scores, too. A run ends where its loss is not finite; steps that it did not take count as spikes.

Run it: pip install 'gradclip[cli,torch]'; python examples/spikes.py
"""

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from torch.nn import functional
from torch_characters import Transformer, batches

import gradclip.torch
from gradclip import limits
from gradclip.cli._console import print_table, progress
from gradclip.cli.demo.network import documentation
from gradclip.cli.demo.spikes import spikes

WIDTH, TIME, BATCH = 64, 32, 8
LEARNING_RATE, MOMENTUM, WARM_UP_STEPS = 1.7, 0.9, 50
SEEDS = (0, 1, 2)
WINDOW, LAST_STEPS = 100, 50
LOSSES_DRAWN = 2.0, 100.0
# Those that learn know nothing yet: each run has a new one.
LIMITS: dict[str, Callable[[], Any]] = {
    "no limit": lambda: math.inf,
    "fixed: 1": lambda: 1.0,
    "ZScore()": limits.ZScore,
    'ZScore(4, log=True, beyond="skip")': lambda: limits.ZScore(4, log=True, beyond="skip"),
    "Percentile(10)": lambda: limits.Percentile(10),
    "Percentile(50, 100, 2.0)": lambda: limits.Percentile(50, 100, 2.0),
    "Average(2.0)": lambda: limits.Average(2.0),
    "PerTensor(Average(1.05))": lambda: limits.PerTensor(limits.Average(1.05)),
}
# Okabe and Ito's, which colour-blind readers can tell apart.
COLOURS = "#0072B2", "#E69F00", "#009E73"


class Run:
    """One network in training."""

    def __init__(self, vocabulary: int, seed: int, limit: Any, rate: float) -> None:
        torch.manual_seed(seed)
        self.network = Transformer(vocabulary, WIDTH, TIME)
        parameters = self.network.parameters()
        self.optimizer = torch.optim.SGD(parameters, rate, MOMENTUM, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS)
        )
        self.clipper = gradclip.torch.attach(self.optimizer, limit)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, batch: Tensor) -> bool:
        """Train on characters of shape (batch, time + 1); if there is any use in going on."""
        started = perf_counter()
        logits = self.network(batch[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.losses.append(loss.item())
        self.seconds.append(perf_counter() - started)
        return math.isfinite(self.losses[-1])


def train(steps: int, rate: float) -> dict[str, list[Run]]:
    """All limits, each from all seeds."""
    text = documentation()
    alphabet = {character: code for code, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([alphabet[character] for character in text])
    runs: dict[str, list[Run]] = {}
    with progress(f"training {len(LIMITS) * len(SEEDS)} networks", steps * len(LIMITS)) as advance:
        for name, limit in LIMITS.items():
            runs[name] = [Run(len(alphabet), seed, limit(), rate) for seed in SEEDS]
            for seed, run in zip(SEEDS, runs[name], strict=True):
                for batch in batches(codes, steps, seed, TIME, BATCH):
                    if not run.step(batch):
                        break
                advance(steps / len(SEEDS))
    return runs


def figures(runs: list[Run], steps: int) -> list[str]:
    """What the table says of a limit."""
    padded = [run.losses + [math.nan] * (steps - len(run.losses)) for run in runs]
    score = statistics.mean(spikes(losses, WINDOW).mean() for losses in padded)
    taken = sum(len(run.losses) for run in runs)
    clipped = sum(int(run.clipper.clipped_steps) for run in runs) / taken
    seconds = statistics.median(each for run in runs for each in run.seconds)
    return [
        *(f"{statistics.mean(losses[-LAST_STEPS:]):.2f}" for losses in padded),
        f"{score:.2%}",
        f"{clipped:.1%}",
        f"{sum(int(run.clipper.skipped_steps) for run in runs)}",
        f"{1e3 * seconds:.1f}",
    ]


def report(runs: dict[str, list[Run]], steps: int, rate: float) -> None:
    """Print the table."""
    columns = ["limit", *(f"loss, seed {seed}" for seed in SEEDS)]
    columns += ["spike score", "clipped", "skipped", "ms per step"]
    rows = [[name, *figures(each, steps)] for name, each in runs.items()]
    title = f"{steps} steps at a learning rate of {rate:g}"
    print_table(title, columns, rows)
    print(f"losses are means of the last {LAST_STEPS} steps, nan if they are not finite")


def draw(runs: dict[str, list[Run]], steps: int, path: Path) -> None:
    """The losses with each limit, and which of them are spikes."""
    figure = Figure(figsize=(9, 10), dpi=150, layout="constrained")
    title = "Losses of a character transformer at too high a learning rate"
    figure.suptitle(title, weight="bold")
    grid = figure.subplots(len(runs) // 2, 2, sharex=True, sharey=True)
    grid[0, 0].set(xlim=(1, max(2, steps)), yscale="log", ylim=LOSSES_DRAWN)
    for axes, (name, each) in zip(grid.flat, runs.items(), strict=True):
        axes.set_title(name, fontsize="medium", loc="left")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for seed, colour, run in zip(SEEDS, COLOURS, each, strict=True):
            draw_run(axes, run.losses, colour, f"seed {seed}")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    for axes in grid[:, 0]:
        axes.set_ylabel("loss (nats)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    handles += [
        Line2D([], [], color="black", linestyle="", marker="o", markersize=3),
        Line2D([], [], color="black", linestyle="", marker="x", markersize=7),
    ]
    labels += ["a spike", "no longer finite"]
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, format="png")
    print(f"picture: {path}")


def draw_run(axes: Axes, losses: list[float], colour: str, label: str) -> None:
    """One line, with its spikes, and with a cross where it ends early."""
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color=colour, linewidth=0.8, label=label)
    found = zip(losses, spikes(losses, WINDOW), strict=True)
    spiky = [loss if is_one else math.nan for loss, is_one in found]
    axes.plot(steps, spiky, "o", color=colour, markersize=3)
    if not math.isfinite(losses[-1]):
        axes.plot(len(losses), LOSSES_DRAWN[1] * 0.8, "x", color=colour, markersize=7)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="steps of each run (default 500)")
    rate = f"learning rate (default {LEARNING_RATE:g})"
    parser.add_argument("--rate", type=float, default=LEARNING_RATE, help=rate)
    parser.add_argument("--out", type=Path, default=Path("spikes.png"), help="PNG to write")
    parser.add_argument("--quick", action="store_true", help="5 steps, to see that it works")
    args = parser.parse_args()
    steps = 5 if args.quick else args.steps
    if steps < 1 or not args.out.parent.is_dir():
        parser.error("--steps must be 1 or more, and --out in a folder that exists")
    runs = train(steps, args.rate)
    report(runs, steps, args.rate)
    draw(runs, steps, args.out)


if __name__ == "__main__":
    main()
