"""Train a network of JAX on handwritten digits, clipped by optax and by gradclip.optax.

Both are links of `optax.chain`, in a jitted step. The norm of each step is read from the
optimizer's state. In the middle Orbax saves weights and state; a new process takes the run up from
there, and must come to the same bits as the run that was not interrupted. Prints how the two do;
draws the losses and the norms.

Run it: pip install 'gradclip[cli,optax]' equinox orbax-checkpoint scikit-learn;
python examples/jax_digits.py
"""

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from orbax import checkpoint
from sklearn.datasets import load_digits

import gradclip.optax
from gradclip.cli._console import print_table, progress

WIDTH, DEPTH, BATCH = 64, 2, 128
LEARNING_RATE, MAX_NORM = 2e-3, 0.6
TRAINED_ON = 1400  # of 1797 digits
LAST_STEPS = 50
OPTAX, GRADCLIP = "optax", "gradclip.optax"
CLIPS = {OPTAX: optax.clip_by_global_norm, GRADCLIP: gradclip.optax.clip_by_global_norm}
# Okabe and Ito's, which colour-blind readers can tell apart.
SKY_BLUE, ORANGE, BLUE, VERMILION = "#56B4E9", "#E69F00", "#0072B2", "#D55E00"

Arrays = tuple[np.ndarray, np.ndarray]


class Run:
    """One network in training."""

    def __init__(self, clip: Callable[[float], optax.GradientTransformation]) -> None:
        network = eqx.nn.MLP(64, 10, WIDTH, DEPTH, key=jax.random.key(0))
        self.weights, self.rest = eqx.partition(network, eqx.is_array)
        self.optimizer = optax.chain(clip(MAX_NORM), optax.adam(LEARNING_RATE))
        self.state = self.optimizer.init(self.weights)
        self.update = jax.jit(self._update)
        self.done = 0
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.seconds: list[float] = []

    def _loss(self, weights: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = jax.vmap(eqx.combine(weights, self.rest))(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def _update(self, weights: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, ...]:
        loss, gradients = jax.value_and_grad(self._loss)(weights, x, y)
        updates, state = self.optimizer.update(gradients, state)
        return optax.apply_updates(weights, updates), state, loss

    def step(self, digits: Arrays) -> None:
        """Train on a batch that depends on the number of the step alone."""
        chosen = np.random.default_rng(self.done).choice(TRAINED_ON, BATCH, replace=False)
        x, y = (part[chosen] for part in digits)
        started = perf_counter()
        self.weights, self.state, loss = self.update(self.weights, self.state, x, y)
        self.losses.append(loss.item())
        self.seconds.append(perf_counter() - started)
        norm = optax.tree.get(self.state, "global_norm")  # of which optax keeps no record
        if norm is not None:
            self.norms.append(norm.item())
        self.done += 1

    def save(self, folder: Path) -> None:
        """Write what a new process needs to go on."""
        with checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, self._kept())

    def restore(self, folder: Path) -> None:
        """Go on where a run has been saved."""
        with checkpoint.StandardCheckpointer() as checkpointer:
            kept = checkpointer.restore(folder, self._kept())
        self.weights, self.state, self.done = kept["weights"], kept["state"], kept["done"]

    def _kept(self) -> dict[str, Any]:
        return {"weights": self.weights, "state": self.state, "done": self.done}

    def results(self, since: int = 0) -> dict[str, np.ndarray]:
        """All that it came to: losses and norms, weights and state."""
        records = {"losses": self.losses[since:], "norms": self.norms[since:]}
        arrays = jax.tree_util.tree_leaves_with_path((self.weights, self.state))
        named = {jax.tree_util.keystr(path): array for path, array in arrays}
        return {name: np.asarray(value) for name, value in (records | named).items()}

    def figures(self, digits: Arrays) -> list[str]:
        """What the table says of it."""
        x, y = (part[TRAINED_ON:] for part in digits)
        right = jax.vmap(eqx.combine(self.weights, self.rest))(x).argmax(-1) == y
        clipped = optax.tree.get(self.state, "clipped_count")
        return [
            f"{1e3 * statistics.median(self.seconds):.2f}",
            "not recorded" if clipped is None else f"{clipped.item() / self.done:.1%}",
            f"{statistics.mean(self.losses[-LAST_STEPS:]):.4f}",
            f"{right.mean().item():.1%}",
        ]


def load() -> Arrays:
    """Pictures of shape (digits, 64) and what they show."""
    x, y = load_digits(return_X_y=True)
    return (x / 16).astype(np.float32), y.astype(np.int32)


def train(steps: int, folder: Path) -> dict[str, Run]:
    """Both, a step of each in turn; gradclip's is saved in the middle."""
    digits = load()
    runs = {name: Run(clip) for name, clip in CLIPS.items()}
    with progress("training in two ways", steps) as advance:
        for done in range(steps):
            if done == steps // 2:
                runs[GRADCLIP].save(folder)
            for run in runs.values():
                run.step(digits)
            advance(1)
    return runs


def resume(folder: Path, steps: int, out: Path) -> None:
    """Take a saved run up to the last step, and write what it came to."""
    digits, run = load(), Run(CLIPS[GRADCLIP])
    run.restore(folder)
    while run.done < steps:
        run.step(digits)
    np.savez(out, **run.results())


def resumed_elsewhere(folder: Path, steps: int) -> dict[str, np.ndarray]:
    """What a new process makes of a saved run."""
    out = folder.with_suffix(".npz")
    options = ["--resume", str(folder), "--steps", str(steps), "--out", str(out)]
    subprocess.run([sys.executable, __file__, *options], check=True)
    with np.load(out) as found:
        return dict(found)


def differing(whole: dict[str, np.ndarray], resumed: dict[str, np.ndarray]) -> list[str]:
    """The results that are not the same bits."""
    return [name for name in whole if whole[name].tobytes() != resumed[name].tobytes()]


def report(runs: dict[str, Run], steps: int) -> None:
    """Print the table, and how far the losses are apart."""
    labels = ["step, ms", "steps clipped", f"final loss (mean of last {min(LAST_STEPS, steps)})"]
    labels.append("right on digits not trained on")
    digits = load()
    rows = zip(labels, *(run.figures(digits) for run in runs.values()), strict=True)
    title = f"{steps} steps, max_norm {MAX_NORM:g}; times are medians"
    print_table(title, ["", *runs], list(map(list, rows)))
    losses = zip(*(run.losses for run in runs.values()), strict=True)
    apart = [max(each) - min(each) for each in losses]
    worst = max(apart)
    print(f"largest difference between the losses: {worst:.1e}, in step {apart.index(worst) + 1}")


def draw(runs: dict[str, Run], resumed: Sequence[float], path: Path) -> None:
    """The losses, one upon the other, and the norms before clipping."""
    figure = Figure(figsize=(9, 7), dpi=150, layout="constrained")
    figure.suptitle("The same network on digits, clipped by optax and gradclip", weight="bold")
    top, bottom = figure.subplots(2, sharex=True)
    norms = runs[GRADCLIP].norms
    steps = range(1, len(norms) + 1)
    since = steps[-len(resumed) :]
    # Each is thinner than the one below it: where they are equal all three are seen.
    top.plot(steps, runs[OPTAX].losses, color=SKY_BLUE, linewidth=4.5, label=OPTAX)
    top.plot(steps, runs[GRADCLIP].losses, color=ORANGE, linewidth=2.2, label=GRADCLIP)
    top.plot(since, resumed, color="black", linewidth=0.7, label="resumed in a new process")
    clipped = [norm if norm > MAX_NORM else math.nan for norm in norms]
    bottom.plot(steps, norms, color=BLUE, linewidth=0.8, label="global_norm in the state")
    bottom.plot(steps, clipped, "o", color=VERMILION, markersize=2.5, label="clipped")
    limit = f"max_norm = {MAX_NORM:g}"
    bottom.axhline(MAX_NORM, color="black", linestyle="--", linewidth=1, label=limit)
    top.set(ylabel="loss (nats per digit)", yscale="log", xlim=(1, len(norms)))
    bottom.set(ylabel="global gradient norm before clipping", xlabel="step", ylim=(0, None))
    for axes in (top, bottom):
        label = "checkpoint" if axes is top else None
        axes.axvline(since[0] - 0.5, color="gray", linestyle=":", linewidth=1.2, label=label)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.legend(frameon=False, loc="upper right")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")
    print(f"picture: {path}")


def compare(steps: int, picture: Path) -> None:
    """Train both, resume gradclip's from the middle, and say how they did."""
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / "checkpoint"
        runs = train(steps, folder)
        resumed = resumed_elsewhere(folder, steps)
    report(runs, steps)
    whole = runs[GRADCLIP].results(since=steps // 2)
    if wrong := differing(whole, resumed):
        raise SystemExit(f"resumed in a new process, these differ: {', '.join(wrong)}")
    print(f"resumed after step {steps // 2} in a new process: {len(whole)} results, the same bits")
    draw(runs, resumed["losses"].tolist(), picture)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps (default 400)")
    parser.add_argument("--out", type=Path, default=Path("jax_digits.png"), help="PNG to write")
    parser.add_argument("--quick", action="store_true", help="60 steps, to see that it works")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    steps = 60 if args.quick else args.steps
    if steps < 3 or not args.out.parent.is_dir():
        parser.error("--steps must be 3 or more, and --out in a folder that exists")
    if args.resume:
        resume(args.resume, steps, args.out)
    else:
        compare(steps, args.out)


if __name__ == "__main__":
    main()
