"""Train a small character transformer of PyTorch three times, clipping it in three ways.

By torch.nn.utils.clip_grad_norm_, by gradclip.torch.clip_grad_norm_ and by gradclip.torch.attach,
from the same weights and on the same batches of the text that `gradclip demo` reads. Prints where
the time of a step goes, how many steps are clipped and how far the losses are apart; draws the
losses and the norms.

Run it: pip install 'gradclip[cli,torch]'; python examples/torch_characters.py
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

import gradclip.torch
from gradclip.cli._console import print_table, progress
from gradclip.cli.demo.network import documentation

WIDTH, HEADS, LAYERS = 128, 4, 2
TIME, BATCH = 64, 16
LEARNING_RATE, MAX_NORM = 2e-3, 1.25
LAST_STEPS = 50
WAYS: dict[str, Callable[..., Tensor] | None] = {
    "torch.nn.utils": nn.utils.clip_grad_norm_,
    "gradclip.torch": gradclip.torch.clip_grad_norm_,
    "attach": None,
}
PHASES = ("forward", "backward", "clipping", "step")
# Okabe and Ito's, which colour-blind readers can tell apart.
SKY_BLUE, ORANGE, BLUE, VERMILION = "#56B4E9", "#E69F00", "#0072B2", "#D55E00"


class Transformer(nn.Module):
    """Characters to the logits of the next ones."""

    def __init__(self, vocabulary: int, width: int = WIDTH, time: int = TIME) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.characters.weight, std=0.02)
        self.places = nn.Parameter(0.02 * torch.randn(time, width))
        # A bias of the keys changes nothing: its gradient is rounding alone, of which Adam would
        # make whole steps, different ones in each run.
        options = {"activation": "gelu", "batch_first": True, "norm_first": True, "bias": False}
        layer = nn.TransformerEncoderLayer(width, HEADS, 4 * width, dropout=0.0, **options)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.logits = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))
        self.mask = nn.Transformer.generate_square_subsequent_mask(time)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes of shape (batch, time)."""
        x = self.characters(codes) + self.places
        return self.logits(self.layers(x, self.mask, is_causal=True))


class Clock:
    """The seconds that each phase of each step took."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.phase, self.since = "", 0.0

    def start(self) -> None:
        """Begin a step."""
        for times in self.seconds.values():
            times.append(0.0)

    def enter(self, phase: str, *_: object) -> None:
        """What follows is of this phase, or of none if it is empty; hooks call it too."""
        now = perf_counter()
        if self.phase:
            self.seconds[self.phase][-1] += now - self.since
        self.phase, self.since = phase, now


class Run:
    """One network in training; clips by the function, or by ``attach`` if there is none."""

    def __init__(self, vocabulary: int, steps: int, clip: Callable[..., Tensor] | None) -> None:
        torch.manual_seed(0)
        self.network, self.clip, self.clock = Transformer(vocabulary), clip, Clock()
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, LEARNING_RATE, steps)
        self.losses: list[float] = []
        self.norms: list[float] = []
        if clip is None:
            # Hooks run in the order of their registration: the clock's stand around the clipper's.
            self._tell_clock("clipping", "clipping")
            self.clipper = gradclip.torch.attach(self.optimizer, MAX_NORM)
            self._tell_clock("backward", "step")

    def _tell_clock(self, in_backward: str, in_step: str) -> None:
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(partial(self.clock.enter, in_backward))
        self.optimizer.register_step_pre_hook(partial(self.clock.enter, in_step))
        self.optimizer.register_step_post_hook(partial(self.clock.enter, in_step))

    def step(self, batch: Tensor) -> None:
        """Train on characters of shape (batch, time + 1)."""
        self.clock.start()
        self.clock.enter("forward")
        logits = self.network(batch[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.clock.enter("backward")
        loss.backward()
        if self.clip is not None:
            self.clock.enter("clipping")
            norm = self.clip(self.parameters, MAX_NORM)
        self.clock.enter("step")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.clock.enter("")
        self.schedule.step()
        self.losses.append(loss.item())
        self.norms.append((self.clipper.norm if self.clip is None else norm).item())

    def figures(self) -> list[str]:
        """What the table says of it."""
        phases = self.clock.seconds.values()
        columns = [*phases, map(sum, zip(*phases, strict=True))]
        clipped = statistics.mean(norm > MAX_NORM for norm in self.norms)
        loss = statistics.mean(self.losses[-LAST_STEPS:])
        times = [f"{1e3 * statistics.median(column):.2f}" for column in columns]
        return [*times, f"{clipped:.1%}", f"{loss:.4f}"]


def train(steps: int) -> dict[str, Run]:
    """All three, a step of each in turn, so that whatever slows the machine slows all alike."""
    text = documentation()
    alphabet = {character: code for code, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([alphabet[character] for character in text])
    runs = {way: Run(len(alphabet), steps, clip) for way, clip in WAYS.items()}
    with progress("training in three ways", steps) as advance:
        for batch in batches(codes, steps):
            for run in runs.values():
                run.step(batch)
            advance(1)
    return runs


def batches(
    codes: Tensor, count: int, seed: int = 0, time: int = TIME, batch: int = BATCH
) -> Iterator[Tensor]:
    """Characters from random places of the text, each of shape (batch, time + 1)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(codes) - time, (batch, 1), generator=generator)
        yield codes[starts + torch.arange(time + 1)]


def report(runs: dict[str, Run], steps: int) -> None:
    """Print the table, and how far the losses are apart."""
    labels = [*(f"{phase}, ms" for phase in (*PHASES, "all of these")), "steps clipped"]
    labels.append(f"final loss (mean of last {min(LAST_STEPS, steps)} steps)")
    rows = zip(labels, *(run.figures() for run in runs.values()), strict=True)
    title = f"{steps} steps, max_norm {MAX_NORM:g}; times are medians"
    print_table(title, ["", *runs], list(map(list, rows)))
    print(
        "attach's clipping is what its hooks take in backward and step, the clock's calls included"
    )
    losses = zip(*(run.losses for run in runs.values()), strict=True)
    apart = [max(each) - min(each) for each in losses]
    worst = max(apart)
    print(f"largest difference between the losses: {worst:.1e}, in step {apart.index(worst) + 1}")


def draw(runs: dict[str, Run], path: Path) -> None:
    """The losses, one upon the other, and the norms before clipping."""
    figure = Figure(figsize=(9, 7), dpi=150, layout="constrained")
    figure.suptitle("The same character transformer, clipped in three ways", weight="bold")
    top, bottom = figure.subplots(2, sharex=True)
    # Each is thinner than the one below it: where they are equal all three are seen.
    styles = (SKY_BLUE, 6.0), (ORANGE, 3.0), ("black", 0.7)
    for (way, run), (colour, width) in zip(runs.items(), styles, strict=True):
        steps = range(1, len(run.losses) + 1)
        top.plot(steps, run.losses, color=colour, linewidth=width, label=way)
    norms = runs["attach"].norms
    clipped = [norm if norm > MAX_NORM else math.nan for norm in norms]
    bottom.plot(steps, norms, color=BLUE, linewidth=0.8, label="global norm (attach)")
    bottom.plot(steps, clipped, "o", color=VERMILION, markersize=2.5, label="clipped in this step")
    limit = f"max_norm = {MAX_NORM:g}"
    bottom.axhline(MAX_NORM, color="black", linestyle="--", linewidth=1, label=limit)
    top.set(ylabel="loss (nats per character)", xlim=(1, max(2, len(norms))))
    bottom.set(ylabel="global gradient norm before clipping", xlabel="step", yscale="log")
    bottom.yaxis.set_major_formatter("{x:g}")
    bottom.yaxis.set_minor_formatter("{x:g}")
    for axes in (top, bottom):
        axes.legend(frameon=False, loc="upper right")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")
    print(f"picture: {path}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=700, help="training steps (default 700)")
    parser.add_argument(
        "--out", type=Path, default=Path("torch_characters.png"), help="PNG to write"
    )
    parser.add_argument("--quick", action="store_true", help="20 steps, to see that it works")
    args = parser.parse_args()
    steps = 20 if args.quick else args.steps
    if steps < 3 or not args.out.parent.is_dir():
        parser.error("--steps must be 3 or more, and --out in a folder that exists")
    runs = train(steps)
    report(runs, steps)
    draw(runs, args.out)


if __name__ == "__main__":
    main()
