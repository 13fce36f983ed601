"""How the cases of ``gradclip bench`` are put together: one function for each kind of case."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from gradclip import global_norm
from gradclip.cli.bench import busy, contenders, jobs, ranks
from gradclip.cli.bench.contenders import Arrays, Call
from gradclip.cli.bench.jobs import Beside, Shapes


class Bar(NamedTuple):
    """What gradclip is held to: a multiple of the time of others, or a number of units.

    Without a limit the figure is only told.
    """

    limit: float | None
    of: str


class Case(NamedTuple):
    """Systems that take turns at one job. ``systems`` is told by how much to shrink it."""

    what: str
    bar: Bar
    systems: Callable[[int], dict[str, Call]]
    threads: int | None = None
    repeats: int = 21
    busy: bool = False  # if other processes spin meanwhile


class Turns(NamedTuple):
    """Systems that take turns within something larger, and tell their own time."""

    what: str
    bar: Bar
    turns: Callable[[int], Iterator[dict[str, float]]]
    repeats: int = 21


class Fresh(NamedTuple):
    """A figure that takes new processes: ``code`` prints it, in the unit of the bar.

    The code that measures memory reads /proc.
    """

    what: str
    bar: Bar
    code: str
    processes: int = 1


Cases = Mapping[str, Case | Turns | Fresh]

_SHORT = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}


_SPIN, _ONE_THREAD = "while other processes spin: ", Bar(1.2, "one thread")


def _fewer(shapes: Shapes, shrink: int) -> Shapes:
    return shapes[: max(1, len(shapes) // shrink)]


def _limit(arrays: Arrays, *, clipping: bool) -> float:
    return float(global_norm(arrays)) * (0.5 if clipping else 2)


def norm(dtype: str, nbytes: int, limit: float) -> Case:
    """The norm of large arrays, held to reading them."""
    what = f"norm, {nbytes // 1_000_000} MB {_SHORT[dtype]}"
    return Case(what, Bar(limit, "R"), partial(jobs.norms, dtype, nbytes))


def in_place(dtype: str, nbytes: int, limit: float, *beside: Beside) -> Case:
    """Clipping large arrays in place, held to reading them, and to reading and writing them."""
    make = partial(jobs.normal, nbytes, dtype)
    systems = partial(jobs.clip, make, [jobs.reading, jobs.writing, *beside])
    what = f"in place, clipping, {nbytes // 1_000_000} MB {_SHORT[dtype]}"
    return Case(what, Bar(limit, "R + S"), systems)


def on_busy_machine(what: str, shapes: Shapes, *, torch: bool = False) -> Case:
    """Clipping while other processes spin, held to the same call on one thread."""

    def systems(shrink: int) -> dict[str, Call]:
        few = _fewer(shapes, shrink)
        if torch:
            found = contenders.torch_steps(few, "float32", clipping=True)
        else:
            found = jobs.clip(lambda _: jobs.random(few), [], shrink)
        return found | busy.beside_one_thread(found["gradclip"]) if found else {}

    return Case(_SPIN + what, _ONE_THREAD, systems, repeats=51, busy=True)


def on_busy_machine_under_xla(what: str, shapes: Shapes) -> Turns:
    """The same under jit."""

    def turns(shrink: int) -> Iterator[dict[str, float]]:
        return busy.clips_under_xla(_fewer(shapes, shrink))

    return Turns(_SPIN + what, _ONE_THREAD, turns, repeats=51)


def beside_tensorflow(
    what: str, limit: float, shapes: Shapes, *, graph: bool = False, clipping: bool = False
) -> Case:
    """Clipping tensors, held to TensorFlow's own function."""

    def systems(shrink: int) -> dict[str, Call]:
        arrays = jobs.random(_fewer(shapes, shrink))
        return contenders.tensorflow_clips(arrays, _limit(arrays, clipping=clipping), graph=graph)

    return Case(what, Bar(limit, "TensorFlow"), systems)


def beside_torch(
    what: str,
    limit: float,
    shapes: Shapes,
    *,
    dtype: str = "float32",
    clipping: bool = False,
) -> Case:
    """Clipping gradients, held to PyTorch's own function."""

    def systems(shrink: int) -> dict[str, Call]:
        return contenders.torch_steps(_fewer(shapes, shrink), dtype, clipping=clipping)

    return Case(what, Bar(limit, "PyTorch"), systems)


def in_training(what: str, limit: float, turns: Callable[..., Any], *, clipping: bool) -> Turns:
    """Clipping within steps that train, held to PyTorch's own function."""
    return Turns(what, Bar(limit, "PyTorch"), partial(turns, clipping=clipping))


def of_dtensors(count: int) -> Turns:
    """Clipping what is spread over two ranks, held to what they tell each other."""

    def turns(shrink: int) -> Iterator[dict[str, float]]:
        return ranks.clips_of_dtensors(count // shrink)

    what = f"clip_grad_norm_, clipping, {count} DTensors on 2 ranks"
    return Turns(what, Bar(1.0, "allowed"), turns)


def tensorflow_trace(shrink: int) -> dict[str, Call]:
    """Tracing thousands of tensors."""
    return contenders.tensorflow_traces(3000 // shrink)


def beside_optax(
    what: str,
    limit: float,
    shapes: Shapes,
    *,
    dtype: str = "float32",
    jit: bool = False,
    clipping: bool = False,
) -> Case:
    """Clipping arrays of JAX, held to optax."""

    def systems(shrink: int) -> dict[str, Call]:
        arrays = jobs.random(_fewer(shapes, shrink), dtype)
        return contenders.optax_updates(arrays, _limit(arrays, clipping=clipping), jit=jit)

    return Case(what, Bar(limit, "optax"), systems)


def donated_to_optax(what: str, limit: float, *, clipping: bool) -> Turns:
    """Clipping arrays of JAX whose memory may be written, held to optax."""

    def turns(shrink: int) -> Iterator[dict[str, float]]:
        arrays = jobs.large(shrink)
        return contenders.optax_donations(arrays, _limit(arrays, clipping=clipping))

    return Turns(what, Bar(limit, "optax"), turns)


def of_examples(what: str, sizes: Sequence[int]) -> Case:
    """Clipping each of 256 examples and adding them up, held to optax."""

    def systems(shrink: int) -> dict[str, Call]:
        arrays = jobs.random([(256, size // shrink) for size in sizes])
        limit = 0.5 * math.sqrt(sum(sizes) / shrink)  # each norm is about twice as much
        return contenders.optax_examples(arrays, limit)

    return Case(what, Bar(1.0, "optax"), systems)


def optax_compilation(shrink: int) -> Iterator[dict[str, float]]:
    """Compiling thousands of arrays."""
    # The first turn warms up. One more is all there is time for: optax takes a minute.
    return contenders.optax_compilations((2, 3000 // shrink))
