"""Lists of arrays to clip: random ones, and ones made to break something."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

NARROW = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "complex64": np.dtype(np.complex64),
    **{
        name: np.dtype(getattr(ml_dtypes, name))
        for name in (
            "float8_e3m4",
            "float8_e4m3",
            "float8_e4m3b11fnuz",
            "float8_e4m3fn",
            "float8_e4m3fnuz",
            "float8_e5m2",
            "float8_e5m2fnuz",
        )
        if hasattr(ml_dtypes, name)  # two of them since 0.5
    },
}
WIDE = {"float64": np.dtype(np.float64), "complex128": np.dtype(np.complex128)}
DTYPES = NARROW | WIDE


class Case(NamedTuple):
    """The arguments of one call. ``layouts`` has the memory layout of each leaf."""

    values: list[Array]
    layouts: list[str]
    clip_norm: float
    use_norm: float | None = None
    on_nonfinite: str = "nan"


def real_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of the real and imaginary parts."""
    return np.empty(0, dtype).real.dtype


# ---- memory layouts ----

READ_ONLY_LAYOUTS = ("readonly", "broadcast")
LAYOUTS = (
    "contiguous",
    "strided",
    "reversed",
    "fortran",
    "transposed",
    "bigendian",
    "unaligned",
    *READ_ONLY_LAYOUTS,
)


def lay_out(values: Array, layout: str) -> Array:
    """A new array with these elements, laid out in memory in a certain way.

    To be laid out as ``broadcast`` they must be the same all along the first dimension.
    """
    if layout == "strided":
        room = np.zeros((*values.shape[:-1], 3 * values.shape[-1]), values.dtype)
        new = room[..., 1::3]
    elif layout == "reversed":
        new = np.empty(values.shape, values.dtype)[(slice(None, None, -1),) * values.ndim + (...,)]
    elif layout == "fortran":
        new = np.empty(values.shape, values.dtype, order="F")
    elif layout == "transposed":
        new = np.empty(values.shape[1:] + values.shape[:1], values.dtype)
        new = np.moveaxis(new, -1, 0)
    elif layout == "bigendian":
        new = np.empty(values.shape, values.dtype.newbyteorder(">"))
    elif layout == "unaligned":
        raw = np.empty(values.nbytes + 1, np.uint8)[1:]
        new = raw.view(values.dtype).reshape(values.shape)
    elif layout == "broadcast":
        return np.broadcast_to(values[:1] if values.ndim else values, values.shape)
    else:
        new = np.empty(values.shape, values.dtype)
    new[...] = values
    if layout == "readonly":
        new.flags.writeable = False
    return new


def layouts_for(values: Array) -> list[str]:
    """The layouts that this array can have."""
    left_out = set()
    if values.ndim == 0:
        left_out |= {"strided", "transposed"}
    if values.dtype.name in DTYPES and values.dtype.type.__module__ != "numpy":
        left_out |= {"bigendian"}
    return [layout for layout in LAYOUTS if layout not in left_out]


# ---- numbers ----


def every_code(dtype: np.dtype[Any]) -> Array:
    """Every value of a dtype of 8 or 16 bits."""
    return np.arange(256**dtype.itemsize, dtype=f"u{dtype.itemsize}").view(dtype)


def _random_bits(rng: np.random.Generator, dtype: np.dtype[Any], count: int) -> Array:
    raw = rng.integers(0, 256, count * dtype.itemsize, dtype=np.uint8).view(dtype)
    return np.where(np.isfinite(raw), raw, np.zeros((), dtype))


def _subnormals(rng: np.random.Generator, dtype: np.dtype[Any], count: int) -> Array:
    smallest = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    return (rng.integers(-9, 10, count) * smallest).astype(dtype)


def _numbers(rng: np.random.Generator, dtype: np.dtype[Any], count: int) -> Array:
    """Real numbers of one character each."""
    info = ml_dtypes.finfo(dtype)
    largest, smallest = float(info.max), float(info.smallest_normal)
    log_range = math.log2(largest) - 1, math.log2(smallest)
    with np.errstate(all="ignore"):
        match rng.integers(9):
            case 0:
                return rng.standard_normal(count).astype(dtype)
            case 1:
                return _random_bits(rng, dtype, count)
            case 2:
                return _subnormals(rng, dtype, count)
            case 3:
                return np.zeros(count, dtype) * rng.choice([-1, 1], count).astype(dtype)
            case 4:
                return np.full(count, rng.standard_normal()).astype(dtype)
            case 5:
                powers = np.exp2(np.floor(rng.uniform(log_range[1], log_range[0], count)))
                return powers.astype(dtype)
            case 6:
                scale = 2.0 ** rng.uniform(log_range[1], log_range[0] - 3)
                new = rng.standard_normal(count) * scale
                return np.clip(new, -largest, largest).astype(dtype)
            case 7:
                new = np.full(count, smallest * 8)
                new[: min(1, count)] = largest
                return new.astype(dtype)
            case _:
                new = np.full(count, largest)
                return (new * rng.choice([-1, 1], count)).astype(dtype)


def numbers(rng: np.random.Generator, dtype: np.dtype[Any], count: int) -> Array:
    """Elements of one character each, of real and complex dtypes."""
    if dtype.kind != "c":
        return _numbers(rng, dtype, count)
    return _numbers(rng, real_dtype(dtype), 2 * count).view(dtype)


def _nonfinite(rng: np.random.Generator, values: Array) -> None:
    """Put NaN or inf somewhere."""
    if values.size:
        with np.errstate(all="ignore"):
            values.flat[rng.integers(values.size)] = rng.choice([np.nan, np.inf, -np.inf])


_SHAPES = ((), (0,), (1,), (2,), (3,), (7,), (16,), (2, 3), (4, 1, 2), (3, 0, 2), (33,), (5, 7))


def random_case(rng: np.random.Generator, dtypes: list[np.dtype[Any]]) -> Case:
    """A short list of small arrays and limits for it."""
    values, layouts = [], []
    for _ in range(rng.integers(0, 5)):
        dtype = dtypes[rng.integers(len(dtypes))]
        shape = _SHAPES[rng.integers(len(_SHAPES))]
        array = numbers(rng, dtype, math.prod(shape)).reshape(shape)
        if rng.random() < 0.01:
            _nonfinite(rng, array)
        possible = layouts_for(array)
        layouts.append(possible[rng.integers(len(possible))])
        if layouts[-1] == "broadcast" and array.ndim:
            array[...] = array[:1]
        values.append(array)
    return _with_limits(rng, values, layouts)


def random_case_of_shapes(
    rng: np.random.Generator, dtypes: list[np.dtype[Any]], shapes: list[tuple[int, ...]]
) -> Case:
    """The same where each shape costs a compilation: the dtypes in turn, contiguous."""
    values = []
    for place, shape in enumerate(shapes):
        values.append(numbers(rng, dtypes[place % len(dtypes)], math.prod(shape)).reshape(shape))
        if rng.random() < 0.01:
            _nonfinite(rng, values[-1])
    return _with_limits(rng, values, ["contiguous"] * len(values))


def _with_limits(rng: np.random.Generator, values: list[Array], layouts: list[str]) -> Case:
    use_norm = None
    if rng.random() < 0.1:
        use_norm = float(2.0 ** rng.uniform(-1100, 1000) if rng.random() < 0.5 else rng.random())
    policy = str(rng.choice(["nan", "raise", "zero", "keep"]))
    return Case(values, layouts, _clip_norm(rng, values, use_norm), use_norm, policy)


def _clip_norm(rng: np.random.Generator, values: list[Array], use_norm: float | None) -> float:
    """A limit near the norm, most of the time."""
    largest = use_norm or max(
        (float(np.abs(array[np.isfinite(array)].astype(np.complex128)).max(initial=0)))
        for array in [np.ones(()), *values]
    )
    match rng.integers(8):
        case 0:
            limit = math.inf
        case 1:
            limit = 2.0 ** rng.uniform(-1074, 1000)
        case 2:
            limit = 5e-324
        case 3:
            limit = 2.0 ** rng.integers(-140, 100)
        case 4:
            limit = largest * 2.0 ** -rng.integers(1, 30)
        case _:
            limit = largest * rng.random()
    return float(limit) or 1.0


# ---- norms on the boundary between two numbers ----


def squares_of(target: int, bits: int) -> list[int]:
    """Integers of so many bits whose squares add up to ``target``."""
    found = []
    while target:
        root = math.isqrt(target)
        cut = max(0, root.bit_length() - bits)
        found.append(root >> cut << cut)
        target -= found[-1] ** 2
    return found


def near_midpoints(
    rng: np.random.Generator, dtype: np.dtype[Any], count: int, *, closeness: int = 10
) -> Iterator[list[Array]]:
    """Lists whose norm lies on the midpoint of two neighbours, or one unit above or below it.

    The unit is 2^-(2 * closeness) of that of the midpoint's own square.
    """
    precision, target_bits = (53, 54) if dtype == np.float64 else (24, 25)
    bits = {"float16": 11, "bfloat16": 8}.get(dtype.name, precision)
    scales = {"float16": (-24, -22), "bfloat16": (-60, 60), "float32": (-90, 60)}
    low, high = scales.get(dtype.name, (-900, 900))
    for _ in range(count):
        midpoint = int(rng.integers(1 << target_bits - 2, 1 << target_bits - 1)) * 2 + 1
        near = 0 if dtype.name == "float16" else closeness
        scale = int(rng.integers(low, high))
        for off in (-1, 0, 1):
            square = (midpoint << near) ** 2 + off
            found = [math.ldexp(x, scale) for x in squares_of(square, bits)]
            yield [np.array(rng.permutation(found)).astype(dtype)]


def exact_ties(rng: np.random.Generator, dtype: np.dtype[Any], count: int) -> Iterator[list[Array]]:
    """Lists of two numbers, 3k and 4k, whose norm 5k lies exactly between two neighbours."""
    bits = 53 if dtype == np.float64 else 24
    for _ in range(count):
        k = int(rng.integers((1 << bits) // 10 + 2, (1 << bits) // 6)) * 2 + 1
        yield [np.array([3 * k]).astype(dtype), np.array([4 * k]).astype(dtype)]


def constants_on_boundaries(dtype: np.dtype[Any]) -> Iterator[list[Array]]:
    """A constant n times, whose norm is (nearly) the constant times an integer or half of one."""
    step = float(ml_dtypes.finfo(real_dtype(dtype)).eps)
    for side in (3, 5, 17, 63, 129):
        for constant in (1, 1 + step, 2 - step):
            for more in (-1, 0, 1):
                yield [np.full(side * side + more, constant, dtype)]
