"""Train a small recurrent network with and without clipping, and draw both runs.

A character-level ReLU network (after Le, Jaitly and Hinton, arXiv:1504.00941) reads the Python
documentation that every CPython carries (pydoc_data.topics). Its gradients pass back through 128
time steps and now and then explode, as Pascanu, Mikolov and Bengio (arXiv:1211.5063) describe.
Both runs start from the same weights, see the same batches and take the same learning rates.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

import gradclip
from gradclip.cli._console import CliError, need_extra, print_json, print_table, progress
from gradclip.cli._regular import other
from gradclip.cli._whole import appearing, to_disk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXAMPLE = "gradclip demo --out demo.png"

HIDDEN = 128
TIME_STEPS = 128
BATCH = 16
# Above 1 the gradients of a ReLU network tend to grow on their way back through time.
SPECTRAL_RADIUS = 1.3
LEARNING_RATE = 2.0
WARM_UP_STEPS = 100
CLIP_NORM = 1.0
LAST_STEPS = 50
TEMPERATURE = 0.5
SAMPLE_LENGTH = 240

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
# Okabe and Ito's blue and vermilion, which colour-blind readers can tell apart.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "0.4"

Array = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int64]


class Network(NamedTuple):
    """The weights of the network, or the gradient with respect to them."""

    w_input: Array
    w_hidden: Array
    b_hidden: Array
    w_output: Array
    b_output: Array


@dataclass
class Run:
    """What one training run left behind, one entry per step."""

    network: Network
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    clip_seconds: list[float] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """Whether the loss stayed finite, in words."""
        if math.isfinite(self.losses[-1]):
            return "finite to the end"
        return f"{'NaN' if math.isnan(self.losses[-1]) else 'inf'} from step {len(self.losses)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``gradclip demo``."""
    parser.add_argument("--steps", type=int, default=2000, help="training steps (default 2000)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="picture to write (PNG)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")


def run(args: argparse.Namespace) -> int:
    """Train both runs, draw them and print their figures."""
    if args.steps < 1 or args.seed < 0:
        raise CliError("--steps must be 1 or more and --seed 0 or more")
    figure = _blank_figure()
    text = documentation()
    alphabet = sorted(set(text))
    codes = np.searchsorted(alphabet, list(text))
    entropy = unigram_entropy(text)
    start = initial_network(len(alphabet), np.random.default_rng(args.seed))
    batches = partial(windows, codes, args.steps, args.seed)
    with _replacing(args.out) as picture:
        with (
            progress("training without clipping", args.steps) as advance,
            np.errstate(over="ignore", invalid="ignore"),
        ):
            unclipped = train(start, batches(), math.inf, advance)
        with progress("training with clipping", args.steps) as advance:
            clipped = train(start, batches(), CLIP_NORM, advance)
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


def documentation() -> str:
    """The reference pages behind ``help()``, as one line of ASCII without rulers."""
    from pydoc_data.topics import topics

    pages = " ".join(topics[name] for name in sorted(topics))
    ascii_only = pages.encode("ascii", "ignore").decode()
    return " ".join(re.sub(r"(\W)\1{3,}", " ", ascii_only).split())


def unigram_entropy(text: str) -> float:
    """The loss, in nats, of a model that knows the frequency of each character and no more."""
    shares = [count / len(text) for count in Counter(text).values()]
    return -sum(share * math.log(share) for share in shares)


def initial_network(vocabulary: int, rng: np.random.Generator) -> Network:
    """Draw the weights; the recurrent ones are a scaled random rotation."""
    rotation = np.linalg.qr(rng.standard_normal((HIDDEN, HIDDEN)))[0]
    return Network(
        w_input=(0.5 * rng.standard_normal((vocabulary, HIDDEN))).astype(np.float32),
        w_hidden=(SPECTRAL_RADIUS * rotation).astype(np.float32),
        b_hidden=np.zeros(HIDDEN, np.float32),
        w_output=(rng.standard_normal((HIDDEN, vocabulary)) / HIDDEN**0.5).astype(np.float32),
        b_output=np.zeros(vocabulary, np.float32),
    )


def windows(codes: Codes, count: int, seed: int) -> Iterator[Codes]:
    """Batches of windows from random places of the text, each of shape (time + 1, batch)."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        starts = rng.integers(0, len(codes) - TIME_STEPS, BATCH)
        yield codes[starts + np.arange(TIME_STEPS + 1)[:, None]]


def train(
    start: Network, batches: Iterable[Codes], clip_norm: float, advance: Callable[[float], None]
) -> Run:
    """Train a copy of ``start`` by gradient descent, until a loss is not finite.

    With ``clip_norm`` inf the gradients are only measured.
    """
    result = Run(Network(*(weights.copy() for weights in start)))
    for step, batch in enumerate(batches, start=1):
        started = perf_counter()
        loss, gradients = loss_and_gradients(result.network, batch[:-1], batch[1:])
        clip_started = perf_counter()
        norm = gradclip.clip_by_global_norm_(gradients, clip_norm, on_nonfinite="keep")
        clip_ended = perf_counter()
        learning_rate = LEARNING_RATE * min(1.0, step / WARM_UP_STEPS)
        for weights, gradient in zip(result.network, gradients, strict=True):
            np.subtract(weights, learning_rate * gradient, out=weights)
        result.step_seconds.append(perf_counter() - started)
        result.clip_seconds.append(clip_ended - clip_started)
        result.losses.append(loss)
        result.norms.append(float(norm))
        advance(1)
        if not math.isfinite(loss):
            break
    return result


def loss_and_gradients(network: Network, inputs: Codes, targets: Codes) -> tuple[float, Network]:
    """The mean cross-entropy in nats, and its gradient by backpropagation through time."""
    hidden = hidden_states(network, inputs)
    before, after = hidden[:-1], hidden[1:]
    loss, d_logits = cross_entropy(after @ network.w_output + network.b_output, targets)
    d_inputs = backward(network.w_hidden, after, d_logits @ network.w_output.T.copy())
    one_hot = (inputs[..., None] == np.arange(len(network.w_input))).astype(after.dtype)
    return loss, Network(
        w_input=_sum_over_time(one_hot, d_inputs),
        w_hidden=_sum_over_time(before, d_inputs),
        b_hidden=d_inputs.sum(axis=(0, 1)),
        w_output=_sum_over_time(after, d_logits),
        b_output=d_logits.sum(axis=(0, 1)),
    )


def _sum_over_time(left: Array, right: Array) -> Array:
    # One product of all time steps is large enough for OpenBLAS to start threads, which on a busy
    # machine wait for each other: a step then took four times as long.
    total: Array = left[0].T @ right[0]
    for left_now, right_now in zip(left[1:], right[1:], strict=True):
        total += left_now.T @ right_now
    return total


def hidden_states(network: Network, inputs: Codes) -> Array:
    """The state before the first time step, zero, and after each: (time + 1, batch, hidden)."""
    drive = network.w_input[inputs] + network.b_hidden
    hidden = np.zeros((len(inputs) + 1, *drive.shape[1:]), drive.dtype)
    for time in range(len(inputs)):
        hidden[time + 1] = np.maximum(hidden[time] @ network.w_hidden + drive[time], 0)
    return hidden


def cross_entropy(logits: Array, targets: Codes) -> tuple[float, Array]:
    """The mean loss and its gradient with respect to the logits, of shape (time, batch, code)."""
    right = targets[..., None]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    sums = exponentials.sum(axis=-1, keepdims=True)
    loss = float(np.mean(np.log(sums) - np.take_along_axis(shifted, right, axis=-1)))
    gradient = exponentials / sums
    gradient -= right == np.arange(logits.shape[-1])
    return loss, gradient / targets.size


def backward(w_hidden: Array, hidden: Array, d_hidden: Array) -> Array:
    """Carry the gradient back through time, to what enters each ReLU."""
    d_inputs = np.empty_like(d_hidden)
    d_later = np.zeros_like(d_hidden[0])
    # Laid out anew once: a product with a transposed view takes twice as long, at every step.
    w_back = w_hidden.T.copy()
    for time in reversed(range(len(hidden))):
        d_inputs[time] = (d_hidden[time] + d_later) * (hidden[time] > 0)
        d_later = d_inputs[time] @ w_back
    return d_inputs


def sample(network: Network, alphabet: list[str], rng: np.random.Generator) -> str:
    """Let the network write on from "The "."""
    codes = [alphabet.index(letter) for letter in "The "]
    for _ in range(SAMPLE_LENGTH):
        state = hidden_states(network, np.array(codes)[:, None])[-1, 0]
        logits = (state @ network.w_output + network.b_output) / TEMPERATURE
        # The largest of logits plus Gumbel noise is a draw from their softmax.
        codes.append(int(np.argmax(logits + rng.gumbel(size=len(alphabet)))))
    return "".join(alphabet[code] for code in codes)


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


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Hand out a new file, which takes the place of ``path`` at the end or vanishes."""
    if path.suffix.lower() != ".png":
        raise CliError(f"--out {path}: name a file that ends in .png")
    if what := other(path):
        raise CliError(f"--out {path} is {what}; only regular files are replaced")
    try:
        with appearing(Path(os.path.realpath(path))) as new:
            yield new
            to_disk(new)
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror or error}") from None


def _blank_figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise need_extra("matplotlib") from None
    return Figure(figsize=(9, 7), dpi=150, layout="constrained")


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
