"""Train the transformer of torch_characters.py with FSDP2, on one process and on two.

From the same weights and on the same batches, of which each of two processes takes a half; both
runs are clipped by gradclip.torch.clip_grad_norm_. In every tenth step the shards of the gradients
are gathered as well, and clipped as plain tensors: that gives the same bits. Prints how the runs
do, and how far torch.nn.utils is apart from itself; draws the losses and the norms.

Run it: pip install 'gradclip[cli,torch]'; python examples/torch_sharded.py
"""

import argparse
import json
import math
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch_characters import (
    LAST_STEPS,
    LEARNING_RATE,
    MAX_NORM,
    SKY_BLUE,
    VERMILION,
    Transformer,
    batches,
)

import gradclip.torch
from gradclip.cli._console import print_table, progress
from gradclip.cli.demo.network import documentation

CHECK_EVERY = 10
SIZES = {"1 process": 1, "2 processes": 2}


@dataclass
class Run:
    """What one training tells of its steps, and of those in which the shards were gathered."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    equal: list[bool] = field(default_factory=list)
    torch_apart: list[float] = field(default_factory=list)

    def figures(self) -> list[str]:
        """What the table says of it."""
        loss = statistics.mean(self.losses[-LAST_STEPS:])
        clipped = statistics.mean(norm > MAX_NORM for norm in self.norms)
        equal = f"{sum(self.equal)} of {len(self.equal)}"
        return [f"{loss:.4f}", f"{clipped:.1%}", equal, f"{max(self.torch_apart):.1e}"]


def train(rank: int, size: int, steps: int, folder: Path) -> None:
    """Be one process of ``size``; the first writes the Run to the folder."""
    torch.set_num_threads(1)  # the processes share the cores
    # It tells of logits that are a view; nothing is done to them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    store = dist.FileStore(str(folder / f"store of {size}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    text = documentation()
    alphabet = {character: code for code, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([alphabet[character] for character in text])
    torch.manual_seed(0)
    network = Transformer(len(alphabet))
    for part in (*network.layers.layers, network):
        fully_shard(part)
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    run = Run()
    label = f"training, processes: {size}"
    with progress(label, steps) if rank == 0 else nullcontext(lambda _: None) as advance:
        for step, batch in enumerate(batches(codes, steps)):
            mine = batch.chunk(size)[rank]
            logits = network(mine[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten())
            loss.backward()  # which leaves each process its shard of the mean gradient
            clip = clip_and_check if step % CHECK_EVERY == 0 else clip_only
            norm = clip(parameters, run)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            mean = loss.detach() / size
            dist.all_reduce(mean)
            run.losses.append(mean.item())
            run.norms.append(norm.item())
            advance(1)
    if rank == 0:
        (folder / f"{size}.json").write_text(json.dumps(asdict(run)))
    dist.destroy_process_group()


def clip_only(parameters: Sequence[nn.Parameter], _: Run) -> Tensor:
    """The norm."""
    return gradclip.torch.clip_grad_norm_(parameters, MAX_NORM)


def clip_and_check(parameters: Sequence[nn.Parameter], run: Run) -> Tensor:
    """The norm; the run is told what comes of the same gradients in a single process."""
    whole = gathered(parameters)
    of_shards = nn.utils.get_total_norm([each.grad for each in parameters]).full_tensor()
    run.torch_apart.append(abs(of_shards.item() / nn.utils.get_total_norm(whole).item() - 1))
    wanted, wanted_norm = gradclip.clip_by_global_norm(whole, MAX_NORM)
    norm = clip_only(parameters, run)
    pairs = zip([norm, *gathered(parameters)], [wanted_norm, *wanted], strict=True)
    run.equal.append(all(torch.equal(*pair) for pair in pairs))
    return norm


def gathered(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients, whole, on every process."""
    return [each.grad.full_tensor() for each in parameters]


def train_all(steps: int) -> dict[str, Run]:
    """One run after the other."""
    runs = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, size in SIZES.items():
            multiprocessing.spawn(train, (size, steps, folder), nprocs=size)
            runs[label] = Run(**json.loads((folder / f"{size}.json").read_text()))
    return runs


def report(runs: dict[str, Run], steps: int) -> None:
    """Print the table, and how far the runs are apart."""
    labels = [
        f"final loss (mean of last {min(LAST_STEPS, steps)} steps)",
        "steps clipped",
        "gradclip, shards and gathered: equal to the bit",
        "torch.nn.utils, shards and gathered: apart by up to",
    ]
    rows = zip(labels, *(run.figures() for run in runs.values()), strict=True)
    title = f"{steps} steps, max_norm {MAX_NORM:g}; gathered in every {CHECK_EVERY}th"
    print_table(f"{title}; differences are relative", ["", *runs], list(map(list, rows)))
    norms = zip(*(run.norms for run in runs.values()), strict=True)
    apart = [max(each) / min(each) - 1 for each in norms]
    worst = max(apart)
    print(f"1 process and 2: norms apart by up to {worst:.1e}, in step {apart.index(worst) + 1};")
    print("the mean of two halves' gradients is rounded otherwise than the gradient of the batch")


def draw(runs: dict[str, Run], path: Path) -> None:
    """The losses, one upon the other, and so the norms before clipping."""
    figure = Figure(figsize=(9, 7), dpi=150, layout="constrained")
    title = "The same character transformer, sharded by FSDP2 on one process and on two"
    figure.suptitle(title, weight="bold")
    top, bottom = figure.subplots(2, sharex=True)
    # The upper is thinner than the lower: where they are equal both are seen.
    styles = (SKY_BLUE, 5.0), ("black", 0.8)
    for (label, run), (colour, width) in zip(runs.items(), styles, strict=True):
        steps = range(1, len(run.losses) + 1)
        top.plot(steps, run.losses, color=colour, linewidth=width, label=label)
        bottom.plot(steps, run.norms, color=colour, linewidth=width, label=label)
    norms = run.norms[::CHECK_EVERY]
    equal = [norm if same else math.nan for norm, same in zip(norms, run.equal, strict=True)]
    says = f"gathered, too: the same bits in {sum(run.equal)} of {len(norms)} steps"
    # The first is on the frame, which would cut it in half.
    dots = {"color": VERMILION, "markersize": 4, "clip_on": False, "zorder": 3}
    bottom.plot(steps[::CHECK_EVERY], equal, "o", label=says, **dots)
    limit = f"max_norm = {MAX_NORM:g}"
    bottom.axhline(MAX_NORM, color="black", linestyle="--", linewidth=1, label=limit)
    top.set(ylabel="loss (nats per character)", xlim=(1, max(2, len(run.norms))))
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
    parser.add_argument("--steps", type=int, default=400, help="training steps (default 400)")
    parser.add_argument("--out", type=Path, default=Path("torch_sharded.png"), help="PNG to write")
    args = parser.parse_args()
    if args.steps < 3 or not args.out.parent.is_dir():
        parser.error("--steps must be 3 or more, and --out in a folder that exists")
    runs = train_all(args.steps)
    report(runs, args.steps)
    draw(runs, args.out)


if __name__ == "__main__":
    main()
