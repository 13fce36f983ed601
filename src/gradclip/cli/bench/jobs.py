"""The jobs of gradclip that are timed on arrays of NumPy, and the memory that they are held to."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from gradclip import clip_by_global_norm_, global_norm
from gradclip._clip import survey
from gradclip.cli.bench import contenders
from gradclip.cli.bench.contenders import Arrays, Call
from gradclip.core.exact import FLOAT32, Total, merge, norm, normalised
from gradclip.kernels.cpu import threads as team

Shapes = list[tuple[int, ...]]


def _normal(nbytes: int, dtype: str = "float32") -> Arrays:
    size = nbytes // _named(dtype).itemsize // 4
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
    """Four arrays, of 400 MB together."""
    return _normal(400_000_000 // shrink)


def small(shrink: int) -> Arrays:
    """A thousand arrays of a thousand numbers."""
    return list(np.random.default_rng(0).standard_normal((1000 // shrink, 1000), np.float32))


def norms(dtype: str, nbytes: int, shrink: int) -> dict[str, Call]:
    """The norm of four arrays, held to what reading them takes."""
    arrays = _normal(nbytes // shrink, dtype)
    readable = arrays if dtype in ("float32", "float64") else _normal(nbytes // shrink)
    return {
        "gradclip": partial(global_norm, arrays),
        "R": partial(_read, readable),
        **contenders.norms(arrays),
    }


def exact(shrink: int) -> dict[str, Call]:
    """The exact accumulator, held to what reading takes."""
    arrays = large(shrink)
    return {"gradclip": partial(survey, arrays), "R": partial(_read, arrays)}


def clip(make: Callable[[int], Arrays], shrink: int) -> dict[str, Call]:
    """Clipping in place, each time to a little less."""
    arrays = make(shrink)
    limit = float(global_norm(arrays))

    def next_limit() -> float:
        nonlocal limit
        limit *= 0.999
        return limit

    return {
        "gradclip": lambda: clip_by_global_norm_(arrays, next_limit()),
        "R": partial(_read, arrays),
        "S": _writer(arrays),
        **contenders.clips(arrays, next_limit),
    }


def keep(make: Callable[[int], Arrays], shrink: int) -> dict[str, Call]:
    """A clip in place that finds nothing to clip."""
    arrays = make(shrink)
    return {
        "gradclip": partial(clip_by_global_norm_, arrays, 1e9),
        "R": partial(_read, arrays),
        **contenders.clips(arrays, lambda: 1e9),
    }


def _read(arrays: Arrays) -> None:
    for array in arrays:
        np.dot(array, array)


def _writer(arrays: Arrays) -> Call:
    pool = ThreadPoolExecutor(team.number())
    shares = zip(*(np.array_split(array, team.number()) for array in arrays), strict=True)

    def write(share: Arrays) -> None:
        for array in share:
            np.multiply(array, array.dtype.type(1), out=array)

    return partial(lambda shares: list(pool.map(write, shares)), list(shares))


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
