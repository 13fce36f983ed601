"""What a record of the run adds to a step."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from time import perf_counter

import numpy as np

from gradclip import Record
from gradclip.cli.bench.builders import Bar, Turns

_TENSORS = 148  # as many as GPT-2 has


def in_a_step() -> Turns:
    """`gradclip.Record` after a step of a clipped optimizer, with each tensor's norm."""
    return Turns(f"record of a step, {_TENSORS} tensors", Bar(0.03, "ms"), _steps)


def _steps(shrink: int) -> Iterator[dict[str, float]]:
    """Seconds of a call, the median of a hundred steps."""
    if not find_spec("torch"):
        return
    import torch

    from gradclip.torch import attach

    weights = [torch.nn.Parameter(torch.zeros(100)) for _ in range(_TENSORS)]
    for weight in weights:
        weight.grad = torch.ones(100)
    optimizer = torch.optim.SGD(weights, lr=0.0)
    clipper = attach(optimizer, 1.0, per_tensor=True)
    steps = count()
    with tempfile.TemporaryDirectory() as folder, Record(Path(folder) / "run.db") as record:
        while True:
            taken = []
            for _ in range(100 // shrink or 1):
                optimizer.step()
                started = perf_counter()
                record(next(steps), clipper)
                taken.append(perf_counter() - started)
            yield {"gradclip": float(np.median(taken))}
