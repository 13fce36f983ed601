"""What ``gradclip bench`` measures: the cases, and what gradclip is held to in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from gradclip import global_norm
from gradclip.cli.bench import contenders, fresh, jobs, ranks, training
from gradclip.cli.bench.contenders import Arrays, Call
from gradclip.cli.bench.jobs import Shapes

LARGE, HALF = 400_000_000, 200_000_000


class Bar(NamedTuple):
    """What gradclip is held to: a multiple of the time of others, or a number of units.

    Without a limit the figure is only told.
    """

    limit: float | None
    of: str


class Case(NamedTuple):
    """Systems that take turns at one job. ``systems`` is told by how much to shrink it."""

    what: str
    bars: tuple[Bar, ...]
    systems: Callable[[int], dict[str, Call]]
    threads: int | None = None


class Turns(NamedTuple):
    """Systems that take turns within something larger, and tell their own time."""

    what: str
    bars: tuple[Bar, ...]
    turns: Callable[[int], Iterator[dict[str, float]]]
    threads: None = None


class Fresh(NamedTuple):
    """A figure that takes new processes: ``code`` prints it, in the unit of the bar.

    The code that measures memory reads /proc.
    """

    what: str
    bar: Bar
    code: str
    processes: int = 1


_LARGE_SHAPES: Shapes = [(5_000_000,)] * 10
_SMALL_SHAPES: Shapes = [(1000,)] * 1000
_BF16_SHAPES: Shapes = [(256,)] * 500
_NORM, _WIDE = (768,), 4 * 768
_ATTENTION: Shapes = [(768, 3 * 768), (3 * 768,), (768, 768), _NORM]
_PERCEPTRON: Shapes = [(768, _WIDE), (_WIDE,), (_WIDE, 768), _NORM]
_BLOCK: Shapes = [_NORM, _NORM, *_ATTENTION, _NORM, _NORM, *_PERCEPTRON]
_GPT2_SHAPES: Shapes = [(50257, 768), (1024, 768), *(_BLOCK * 12), _NORM, _NORM]


def _fewer(shapes: Shapes, shrink: int) -> Shapes:
    return shapes[: max(1, len(shapes) // shrink)]


def _limit(arrays: Arrays, *, clipping: bool) -> float:
    return float(global_norm(arrays)) * (0.5 if clipping else 2)


def _beside_tensorflow(
    what: str, limit: float, shapes: Shapes, *, graph: bool = False, clipping: bool = False
) -> Case:
    def systems(shrink: int) -> dict[str, Call]:
        arrays = jobs.random(_fewer(shapes, shrink))
        return contenders.tensorflow_clips(arrays, _limit(arrays, clipping=clipping), graph=graph)

    return Case(what, (Bar(limit, "TensorFlow"),), systems)


def _beside_torch(
    what: str,
    limit: float,
    shapes: Shapes,
    *,
    dtype: str = "float32",
    clipping: bool = False,
) -> Case:
    def systems(shrink: int) -> dict[str, Call]:
        return contenders.torch_clips(_fewer(shapes, shrink), dtype, clipping=clipping)

    return Case(what, (Bar(limit, "PyTorch"),), systems)


def _in_training(what: str, limit: float, turns: Callable[..., Any], *, clipping: bool) -> Turns:
    return Turns(what, (Bar(limit, "PyTorch"),), partial(turns, clipping=clipping))


def _of_dtensors(what: str, limit: float, count: int) -> Turns:
    def turns(shrink: int) -> Iterator[dict[str, float]]:
        return ranks.clips_of_dtensors(count // shrink)

    return Turns(what, (Bar(limit, "PyTorch"),), turns)


def _tensorflow_trace(shrink: int) -> dict[str, Call]:
    return contenders.tensorflow_traces(3000 // shrink)


def _beside_optax(
    what: str,
    limit: float,
    shapes: Shapes,
    *,
    dtype: str = "float32",
    jit: bool = False,
    clipping: bool = False,
) -> Case:
    def systems(shrink: int) -> dict[str, Call]:
        arrays = jobs.random(_fewer(shapes, shrink), dtype)
        return contenders.optax_updates(arrays, _limit(arrays, clipping=clipping), jit=jit)

    return Case(what, (Bar(limit, "optax"),), systems)


def _donated_to_optax(what: str, limit: float, *, clipping: bool) -> Turns:
    def turns(shrink: int) -> Iterator[dict[str, float]]:
        arrays = jobs.large(shrink)
        return contenders.optax_donations(arrays, _limit(arrays, clipping=clipping))

    return Turns(what, (Bar(limit, "optax"),), turns)


def _optax_compilation(shrink: int) -> Iterator[dict[str, float]]:
    # The first turn warms up. One more is all there is time for: optax takes a minute.
    return contenders.optax_compilations((2, 3000 // shrink))


_LOOP = (Bar(1 / 8, "NumPy loop"), Bar(0.25, "ms"))

_10000_SHAPES: Shapes = [(16,)] * 10000
_STEP, _INSIDE = training.steps_that_clip, training.steps_that_clip_inside

CASES: dict[str, Case | Turns | Fresh] = {
    "norm-fp32": Case(
        "norm, 400 MB fp32", (Bar(1.05, "R"),), partial(jobs.norms, "float32", LARGE)
    ),
    "norm-fp64": Case(
        "norm, 400 MB fp64", (Bar(1.05, "R"),), partial(jobs.norms, "float64", LARGE)
    ),
    "norm-bf16": Case("norm, 200 MB bf16", (Bar(1.2, "R"),), partial(jobs.norms, "bfloat16", HALF)),
    "norm-fp16": Case("norm, 200 MB fp16", (Bar(1.3, "R"),), partial(jobs.norms, "float16", HALF)),
    "keep": Case(
        "in place, nothing to clip, 400 MB fp32", (Bar(1.1, "R"),), partial(jobs.keep, jobs.large)
    ),
    "clip": Case(
        "in place, clipping, 400 MB fp32", (Bar(1.1, "R + S"),), partial(jobs.clip, jobs.large)
    ),
    "exact": Case("exact accumulator, 400 MB fp32", (Bar(1.1, "R"),), jobs.exact),
    "exact-1-thread": Case(
        "exact accumulator, 1 thread, 400 MB fp32", (Bar(1.35, "R"),), jobs.exact, threads=1
    ),
    "small-keep": Case(
        "in place, nothing to clip, 1000 x 1000", _LOOP, partial(jobs.keep, jobs.small)
    ),
    "small-clip": Case("in place, clipping, 1000 x 1000", _LOOP, partial(jobs.clip, jobs.small)),
    "tf-eager-keep": _beside_tensorflow(
        "TensorFlow eager, nothing to clip, 200 MB", 0.35, _LARGE_SHAPES
    ),
    "tf-eager-clip": _beside_tensorflow(
        "TensorFlow eager, clipping, 200 MB", 0.9, _LARGE_SHAPES, clipping=True
    ),
    "tf-small-keep": _beside_tensorflow(
        "TensorFlow eager, nothing to clip, 1000 x 1000", 0.1, _SMALL_SHAPES
    ),
    "tf-small-clip": _beside_tensorflow(
        "TensorFlow eager, clipping, 1000 x 1000", 0.35, _SMALL_SHAPES, clipping=True
    ),
    "tf-graph-keep": _beside_tensorflow(
        "tf.function, nothing to clip, 200 MB", 1.1, _LARGE_SHAPES, graph=True
    ),
    "tf-graph-clip": _beside_tensorflow(
        "tf.function, clipping, 200 MB", 1.1, _LARGE_SHAPES, graph=True, clipping=True
    ),
    "tf-gpt2-keep": _beside_tensorflow(
        "tf.function, nothing to clip, GPT-2: 148 tensors", 1.1, _GPT2_SHAPES, graph=True
    ),
    "tf-gpt2-clip": _beside_tensorflow(
        "tf.function, clipping, GPT-2: 148 tensors", 1.1, _GPT2_SHAPES, graph=True, clipping=True
    ),
    "tf-trace": Case(
        "tf.function, tracing 3000 tensors", (Bar(0.5, "TensorFlow"),), _tensorflow_trace
    ),
    "torch-keep": _beside_torch("PyTorch, nothing to clip, 400 MB fp32", 0.5, [(10_000_000,)] * 10),
    "torch-clip": _beside_torch(
        "PyTorch, clipping, 400 MB fp32", 1.0, [(10_000_000,)] * 10, clipping=True
    ),
    "torch-bf16": _beside_torch(
        "PyTorch, nothing to clip, 160 MB bf16", 0.4, [(8_000_000,)] * 10, dtype="bfloat16"
    ),
    "torch-fp16": _beside_torch(
        "PyTorch, nothing to clip, 160 MB fp16", 0.2, [(8_000_000,)] * 10, dtype="float16"
    ),
    "torch-gpt2": _beside_torch("PyTorch, nothing to clip, GPT-2: 148 tensors", 0.5, _GPT2_SHAPES),
    "torch-small-keep": _beside_torch("PyTorch, nothing to clip, 1000 x 1000", 0.12, _SMALL_SHAPES),
    "torch-small-clip": _beside_torch(
        "PyTorch, clipping, 1000 x 1000", 0.12, _SMALL_SHAPES, clipping=True
    ),
    "torch-many-keep": _beside_torch("PyTorch, nothing to clip, 10000 x 16", 0.15, _10000_SHAPES),
    "torch-many-clip": _beside_torch(
        "PyTorch, clipping, 10000 x 16", 0.15, _10000_SHAPES, clipping=True
    ),
    "torch-step-keep": _in_training(
        "clip_grad_norm_ in training, nothing to clip", 0.5, _STEP, clipping=False
    ),
    "torch-step-clip": _in_training("clip_grad_norm_ in training", 0.5, _STEP, clipping=True),
    "torch-attach-keep": _in_training(
        "attach in training, nothing to clip", 0.25, _INSIDE, clipping=False
    ),
    "torch-attach-clip": _in_training("attach in training", 0.25, _INSIDE, clipping=True),
    "dtensor-100": _of_dtensors("clip_grad_norm_, clipping, 100 DTensors on 2 ranks", 0.2, 100),
    "dtensor-1000": _of_dtensors("clip_grad_norm_, clipping, 1000 DTensors on 2 ranks", 0.2, 1000),
    "optax-donated-keep": _donated_to_optax(
        "optax under jit, donated, nothing to clip, 400 MB fp32", 1.0, clipping=False
    ),
    "optax-donated-clip": _donated_to_optax(
        "optax under jit, donated, clipping, 400 MB fp32", 1.3, clipping=True
    ),
    "optax-small-keep": _beside_optax("optax, nothing to clip, 1000 x 1000", 0.2, _SMALL_SHAPES),
    "optax-small-clip": _beside_optax(
        "optax, clipping, 1000 x 1000", 0.2, _SMALL_SHAPES, clipping=True
    ),
    "optax-bf16-keep": _beside_optax(
        "optax under jit, nothing to clip, bf16, 500 x 256",
        1.5,
        _BF16_SHAPES,
        dtype="bfloat16",
        jit=True,
    ),
    "optax-bf16-clip": _beside_optax(
        "optax under jit, clipping, bf16, 500 x 256",
        1.5,
        _BF16_SHAPES,
        dtype="bfloat16",
        jit=True,
        clipping=True,
    ),
    "optax-compile": Turns(
        "optax under jit, compiling 3000 leaves", (Bar(0.2, "optax"),), _optax_compilation
    ),
    "merge": Case("adding the totals of 100,000 workers", (Bar(None, "ms"),), jobs.merging),
    "import": Fresh("import, beyond NumPy's own", Bar(50, "ms"), fresh.IMPORT, 21),
    "first-call": Fresh("first call", Bar(10, "ms"), fresh.FIRST_CALL, 21),
    "memory-in-place": Fresh(
        "memory, in place, 400 MB fp32",
        Bar(1, "MB"),
        fresh.memory("clip_by_global_norm_", LARGE, 0),
    ),
    "memory-new": Fresh(
        "memory beyond the outputs, 400 MB fp32",
        Bar(1, "MB"),
        fresh.memory("clip_by_global_norm", LARGE, LARGE),
    ),
    "pages-written": Fresh(
        "written in place, nothing to clip", Bar(0, "kB"), fresh.written(LARGE, limit=1e9)
    ),
}
