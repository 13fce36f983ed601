"""The jobs of gradclip that are timed on arrays of NumPy, and the memory that they are held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from gradclip import clip_by_global_norm_, global_norm
from gradclip._clip import survey
from gradclip.cli.bench import contenders
from gradclip.cli.bench.contenders import Arrays, Call, Limit
from gradclip.core.exact import FLOAT32, Total, merge, norm, normalised
from gradclip.kernels.cpu import threads as team

LARGE = 400_000_000

Shapes = list[tuple[int, ...]]
Make = Callable[[int], Arrays]
# What is timed beside a clip, made for its arrays and for a function that tells the next limit.
Beside = Callable[[Arrays, Limit], dict[str, Call]]


def normal(nbytes: int, dtype: str, shrink: int) -> Arrays:
    """Four arrays, of so many bytes together.

    NumPy asks for huge pages for arrays of 4 MB and more, whatever their dtype, also where they are
    made from others by ``astype``; a test looks.
    """
    size = nbytes // shrink // _named(dtype).itemsize // 4
    return random([(size,)] * 4, dtype)


def random(shapes: Shapes, dtype: str = "float32") -> Arrays:
    """Arrays of these shapes, the same ones each time."""
    generator = np.random.default_rng(0)
    drawn = np.float64 if dtype == "float64" else np.float32
    return [
        generator.standard_normal(shape, drawn).astype(_named(dtype), copy=False)
        for shape in shapes
    ]


def _named(dtype: str) -> np.dtype[Any]:
    if dtype == "bfloat16":
        import ml_dtypes  # noqa: F401  (makes the name known)
    return np.dtype(dtype)


def large(shrink: int) -> Arrays:
    """Four arrays of float32, of 400 MB together."""
    return normal(LARGE, "float32", shrink)


def small(shrink: int) -> Arrays:
    """A thousand arrays of a thousand numbers."""
    return list(np.random.default_rng(0).standard_normal((1000 // shrink, 1000), np.float32))


def measured(measure: Callable[[Arrays], object], make: Make, shrink: int) -> dict[str, Call]:
    """Measuring large arrays, held to what reading them takes."""
    arrays = make(shrink)
    return {"gradclip": partial(measure, arrays), **reading(arrays)}


def norms(dtype: str, nbytes: int, shrink: int) -> dict[str, Call]:
    """The norm of four arrays, beside other libraries'."""
    arrays = normal(nbytes, dtype, shrink)
    return measured(global_norm, lambda _: arrays, shrink) | contenders.norms(arrays)


def clip(make: Make, beside: Sequence[Beside], shrink: int) -> dict[str, Call]:
    """Clipping in place, each time to a little less."""
    arrays = make(shrink)
    limit = float(global_norm(arrays))

    def next_limit() -> float:
        nonlocal limit
        limit *= 0.999
        return limit

    ours: dict[str, Call] = {"gradclip": lambda: clip_by_global_norm_(arrays, next_limit())}
    return ours | _others(beside, arrays, next_limit)


def keep(make: Make, beside: Sequence[Beside], shrink: int) -> dict[str, Call]:
    """A clip in place that finds nothing to clip."""
    arrays = make(shrink)
    ours: dict[str, Call] = {"gradclip": partial(clip_by_global_norm_, arrays, 1e9)}
    return ours | _others(beside, arrays, lambda: 1e9)


def _others(beside: Sequence[Beside], arrays: Arrays, limit: Limit) -> dict[str, Call]:
    return {system: call for make in beside for system, call in make(arrays, limit).items()}


# ---- the memory itself ----


def reading(arrays: Arrays, _: Limit | None = None) -> dict[str, Call]:
    """R: a plain read of large arrays, by NumPy on all threads of its own."""
    return {"R": partial(_read, _words(arrays))}


def writing(arrays: Arrays, _: Limit) -> dict[str, Call]:
    """S: a plain read and write of large arrays, on as many threads."""
    pool = ThreadPoolExecutor(team.number())
    words = _words(arrays)
    shares = zip(*(np.array_split(each, team.number()) for each in words), strict=True)

    def write(share: Arrays) -> None:
        for each in share:
            np.multiply(each, 1.0, out=each)

    return {"S": partial(lambda shares: list(pool.map(write, shares)), list(shares))}


def _words(arrays: Arrays) -> Arrays:
    """The memory of arrays as float64, which OpenBLAS reads on all threads; float32 on one."""
    return [array.view(np.float64) for array in arrays]


def _read(words: Arrays) -> None:
    for each in words:
        np.dot(each, each)


def merging(shrink: int) -> dict[str, Call]:
    """What all_reduce adds up, without the network: random gradients in ever more parts."""
    generator = np.random.default_rng(0)
    size = 1_000_000 // shrink
    values = generator.standard_normal(size, np.float32)
    # Of many magnitudes, so that words carry into each other.
    np.ldexp(values, generator.integers(-50, 50, size, np.int32), out=values)
    alone = survey([values]).norm
    totals: list[Total] = []
    for workers in (10, 1000, 100_000 // shrink):
        totals = [normalised(survey([part]).total) for part in np.array_split(values, workers)]
        assert norm(merge(totals), FLOAT32) == alone
    return {"gradclip": lambda: merge(totals)}
