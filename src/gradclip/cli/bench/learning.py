"""What limits that learn add to a clip, at each door; and clipping tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import count
from time import perf_counter
from typing import Any

import numpy as np

from gradclip import clip_by_global_norm_, limits
from gradclip.cli._tensorflow import import_tensorflow
from gradclip.cli.bench import jobs
from gradclip.cli.bench.builders import Bar, Case, Cases, Turns
from gradclip.cli.bench.contenders import Call
from gradclip.cli.bench.jobs import Shapes

_FEW: Shapes = [(1000,)] * 10

_KINDS: dict[str, tuple[Callable[[], Any], int]] = {
    "zscore": (limits.ZScore, 20),
    "average": (partial(limits.Average, 2.0), 20),
    "percentile": (limits.Percentile, 100),
}

# A clip by a limit, once for each call; None where the framework is not installed.
Door = Callable[[Any, list[Any]], "Call | None"]


def numpy(limit: Any, arrays: list[Any]) -> Call:
    """`gradclip.clip_by_global_norm_`."""
    return lambda: clip_by_global_norm_(arrays, limit)


def torch(limit: Any, arrays: list[Any]) -> Call | None:
    """`gradclip.torch.clip_grad_norm_`."""
    if not find_spec("torch"):
        return None
    from gradclip.torch import clip_grad_norm_

    parameters = _parameters(arrays)
    return lambda: clip_grad_norm_(parameters, limit)


def attach(limit: Any, arrays: list[Any]) -> Call | None:
    """The step of an optimizer that `gradclip.torch.attach` clips."""
    if not find_spec("torch"):
        return None
    from torch.optim import SGD

    import gradclip.torch

    optimizer = SGD(_parameters(arrays), lr=0.0)
    gradclip.torch.attach(optimizer, limit)
    return optimizer.step


def optax(limit: Any, arrays: list[Any]) -> Call | None:
    """`gradclip.optax.clip_by_global_norm` under jit."""
    if not find_spec("optax"):
        return None
    import jax

    import gradclip.optax

    clip = gradclip.optax.clip_by_global_norm(limit)
    updates = [jax.numpy.array(array) for array in arrays]
    update, state = jax.jit(clip.update), clip.init(updates)

    wait: Callable[[Any], Any] = jax.block_until_ready

    def call() -> None:
        nonlocal state
        _, state = wait(update(updates, state))

    return call


def tensorflow(limit: Any, arrays: list[Any]) -> Call | None:
    """`gradclip.tensorflow.clip_by_global_norm` in a ``tf.function``."""
    if not find_spec("tensorflow"):
        return None
    tf = import_tensorflow()
    from gradclip.tensorflow import clip_by_global_norm

    tensors = [tf.constant(array) for array in arrays]
    clip = tf.function(lambda: clip_by_global_norm(tensors, limit), autograph=False)
    return lambda: float(clip()[1])


def _parameters(arrays: list[Any]) -> list[Any]:
    import torch

    parameters = []
    for array in arrays:
        gradient = torch.from_numpy(array)
        parameters.append(torch.nn.Parameter(torch.empty_like(gradient)))
        parameters[-1].grad = gradient
    return parameters


_DOORS: dict[str, tuple[str, Door]] = {
    "numpy": ("clip_by_global_norm_", numpy),
    "torch": ("clip_grad_norm_", torch),
    "attach": ("attach, optimizer.step()", attach),
    "optax": ("optax under jit", optax),
    "tf": ("tf.function", tensorflow),
}


def _beside_a_number(door: Door, kind: str, shrink: int) -> Iterator[dict[str, float]]:
    """Seconds of a clip by a limit that learns, and by a number, of the same ten tensors."""
    make, more = _KINDS[kind]
    few = _FEW[: max(1, len(_FEW) // shrink)]
    ours, plain = (door(limit, jobs.random(few)) for limit in (make(), 1e9))
    if ours is None or plain is None:
        return
    fill = limits.Percentile().history if kind == "percentile" and shrink == 1 else 0
    for _ in range(fill):  # so that every place of its history is taken
        ours()
    while True:
        turn = {"gradclip": _seconds(ours), "a number": _seconds(plain)}
        yield {**turn, f"a number + {more} us": turn["a number"] + 1e-6 * more}


def _seconds(call: Call, times: int = 20) -> float:
    """Of one of several calls: the median of one alone would be that of a clock of microseconds."""
    taken = []
    for _ in range(times):
        started = perf_counter()
        call()
        taken.append(perf_counter() - started)
    return float(np.median(taken))


def at_every_door() -> Cases:
    """A case for each kind at each door."""
    return {
        f"limit-{door}-{kind}": Turns(
            f"{what}, by {make()!r}, 10 x 1000",
            Bar(1.0, f"a number + {more} us"),
            partial(_beside_a_number, function, kind),
        )
        for door, (what, function) in _DOORS.items()
        for kind, (make, more) in _KINDS.items()
    }


# ---- tensor by tensor ----


def tensor_by_tensor(what: str, bar: float, of: str, shapes: Shapes, *, clipping: bool) -> Case:
    """`limits.PerTensor` in clip_grad_norm_, beside a clip of all and a loop of PyTorch's."""

    def systems(shrink: int) -> dict[str, Call]:
        if not find_spec("torch"):
            return {}
        return _each_and_all(shapes[: max(1, len(shapes) // shrink)], clipping=clipping)

    verb = "clipping" if clipping else "nothing to clip"
    return Case(f"PyTorch, tensor by tensor, {verb}, {what}", Bar(bar, of), systems)


def _each_and_all(shapes: Shapes, *, clipping: bool) -> dict[str, Call]:
    from torch.nn.utils import clip_grad_norm_ as theirs

    from gradclip.torch import clip_grad_norm_, get_total_norm

    sets = [_parameters(jobs.random(shapes)) for _ in range(3)]
    # By which each norm is above what it may be by a little, or far below, time and again.
    factor = 0.99 if clipping else 1e6
    limit = limits.PerTensor(limits.Average(factor, 0.0, 1, learn_from="raw", limit=1e30))
    first = float(get_total_norm([each.grad for each in sets[1]]))
    own = [float(get_total_norm([each.grad])) for each in sets[2]]
    shrinking = (first * 0.99**step if clipping else 1e9 for step in count())
    steps = (0.99**step if clipping else 1e9 for step in count())

    def loop() -> None:
        share = next(steps)
        for parameter, norm in zip(sets[2], own, strict=True):
            theirs(parameter, norm * share)

    return {
        "gradclip": lambda: clip_grad_norm_(sets[0], limit),
        "the global clip": lambda: clip_grad_norm_(sets[1], next(shrinking)),
        "PyTorch, each": loop,
    }
