"""The norm of each tensor, beside the global one, and beside what PyTorch has for it."""

from __future__ import annotations

from importlib.util import find_spec

from gradclip import global_norm, norms
from gradclip.cli.bench import jobs
from gradclip.cli.bench.builders import Bar, Case
from gradclip.cli.bench.contenders import Call
from gradclip.cli.bench.jobs import Shapes

LOOP, FOREACH = "norm() of each", "_foreach_norm"


def norms_of(what: str, bar: float, of: str, shapes: Shapes) -> Case:
    """`gradclip.norms` of PyTorch's tensors."""

    def systems(shrink: int) -> dict[str, Call]:
        if not find_spec("torch"):
            return {}
        import torch

        arrays = jobs.random(shapes[: max(1, len(shapes) // shrink)])
        tensors = list(map(torch.from_numpy, arrays))
        return {
            "gradclip": lambda: norms(tensors),
            "global_norm": lambda: global_norm(tensors),
            LOOP: lambda: [tensor.norm() for tensor in tensors],
            FOREACH: lambda: torch._foreach_norm(tensors),
        }

    return Case(f"PyTorch, the norm of each, {what}", Bar(bar, of), systems)
