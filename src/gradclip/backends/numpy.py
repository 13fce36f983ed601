"""NumPy arrays and scalars, `gradclip.IndexedSlices` of them, and scipy.sparse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gradclip._exact import (
    FLOAT32,
    FLOAT64,
    Part,
    Scaled,
    Total,
    certified_norm,
    merge,
    norm,
    total_of,
)
from gradclip._sparse import IndexedSlices, check_rows, merged_rows
from gradclip.kernels import cpu

_ACCEPTED = "float16, bfloat16, float8, float32, float64 and complex arrays"
_IN_PLACE_FORMATS = ("bsr", "coo", "csc", "csr", "dia")

Array = npt.NDArray[Any]


class Held(NamedTuple):
    """Leaves that have passed every check, and their memory."""

    leaves: Sequence[Any]
    values: list[Array]  # the elements of each leaf: of a sparse one its stored values
    decode: list[bytes | None] | None
    memory: cpu.Leaves  # of `values`
    writable: bool
    sparse: bool  # if any leaf is


def hold(leaves: Sequence[Any], path: Callable[[int], str], *, writable: bool) -> Held:
    """Check the leaves and take hold of their memory.

    Raises:
        TypeError: a leaf is of another dtype or type than those clipped.
        ValueError: a sparse leaf is malformed; with ``writable``, a leaf is read-only or its
            elements share memory.
    """
    values = list(leaves)
    if not values or type(values[0]) is np.ndarray:
        memory = cpu.take(values, None, writable=writable)
        if memory is not None:
            return Held(leaves, values, None, memory, writable, False)
    for place, leaf in enumerate(leaves):
        values[place] = _values(leaf, partial(path, place), writable=writable)
    coded = [_as_codes(array) for array in values]
    decode = [_decode_table(array.dtype) for array in values]
    memory = cpu.take(coded, decode, writable=writable)
    if memory is None:
        raise ValueError(_in_the_way(values, path))
    return Held(leaves, values, decode, memory, writable, any(map(_is_sparse, leaves)))


def measure(held: Held) -> Scaled:
    """The global norm, correctly rounded."""
    if not held.sparse and not held.memory.has_f64:
        certified = certified_norm([Part(*part) for part in cpu.sum_squares(held.memory)])
        if certified is not None:
            return certified
    return norm(total(held)[0], FLOAT64 if held.memory.has_f64 else FLOAT32)


def total(held: Held) -> tuple[Total, float, bool]:
    """The exact sum, the largest finite |x| (of a complex x, of its parts), if any is wide."""
    exact, largest = total_of(), 0.0
    for memory in _measured(held):
        for narrow, wide, found in cpu.exact_squares(memory):
            exact = merge([exact, total_of(narrow, wide)])
            largest = max(largest, found)
    return exact, largest, held.memory.has_f64


def count_nonfinite(leaf: Any) -> tuple[int, int]:
    """How many elements are NaN, and how many are inf."""
    values = _values(leaf, str, writable=False)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return int(np.isnan(values).sum()), int(np.isinf(values).sum())


def scalar(value: Scaled, held: Held) -> np.floating[Any]:
    """The norm as NumPy scalar."""
    with np.errstate(over="ignore", under="ignore"):
        return np.float64(value) if held.memory.has_f64 else np.float32(float(value))


def copied(held: Held) -> list[Any]:
    """New leaves, bit for bit the old ones."""
    return _rewrapped(held, [values.copy(order="K") for values in held.values])


def filled(held: Held, value: float) -> list[Any]:
    """New leaves, every element ``value``."""
    new = [np.empty_like(values) for values in held.values]
    for array in new:
        _fill(array, value)
    return _rewrapped(held, new)


def scaled(held: Held, factor: Scaled) -> list[Any]:
    """New leaves, every element multiplied."""
    new = [np.empty_like(values) for values in held.values]
    # The kernel walks both in the order of memory: where that is not the same, scale a copy.
    old = list(held.values)
    for place, (source, target) in enumerate(zip(old, new, strict=True)):
        if source.strides != target.strides:
            np.copyto(target, source)
            old[place] = target
    same = all(source is values for source, values in zip(old, held.values, strict=True))
    memory = held.memory if same else _take(old, held.decode)
    _scale(memory, _take(new, held.decode), held, factor)
    return _rewrapped(held, new)


def fill_(held: Held, value: float) -> None:
    """Put ``value`` into every element."""
    for values in held.values:
        _fill(values, value)


def scale_(held: Held, factor: Scaled) -> None:
    """Multiply every element where it lies."""
    _scale(held.memory, held.memory, held, factor)


def _scale(source: cpu.Leaves, target: cpu.Leaves, held: Held, factor: Scaled) -> None:
    recode = None
    if held.decode is not None:
        dtypes = [values.dtype for values in held.values]
        tables = {dtype: _recode_table(dtype, factor) for dtype in set(dtypes)}
        recode = [tables[dtype] for dtype in dtypes]
    cpu.scale(source, target, *factor, recode)


def _fill(array: Array, value: float) -> None:
    array[...] = complex(value, value) if array.dtype.kind == "c" else value


def _take(arrays: list[Array], decode: list[bytes | None] | None) -> cpu.Leaves:
    coded = arrays if decode is None else [_as_codes(array) for array in arrays]
    memory = cpu.take(coded, decode, writable=False)
    assert memory is not None, "arrays that have passed every check"
    return memory


# ---- one leaf ----


def _is_sparse(leaf: Any) -> bool:
    return isinstance(leaf, IndexedSlices) or not isinstance(leaf, np.ndarray | np.generic)


def _values(leaf: Any, path: Callable[[], str], *, writable: bool) -> Array:
    """The elements of a leaf as a plain array of an accepted dtype."""
    if isinstance(leaf, IndexedSlices):
        values = leaf.values
        if not isinstance(values, np.ndarray):
            raise TypeError(f"{path()}.values is {type(values).__name__}; it must be an array")
        check_rows(leaf, path)
    elif _is_sparse(leaf):
        values = _scipy_values(leaf, path, writable=writable)
    else:
        values = leaf
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{path()} is a masked array; fill it first: array.filled(0)")
    if _code_dtype(values.dtype) is None:
        raise TypeError(f"{path()} is {values.dtype}; gradclip clips {_ACCEPTED}")
    if writable and isinstance(values, np.generic):
        raise ValueError(f"{path()} is a NumPy scalar, which cannot be written in place")
    return np.asarray(values)


_code_dtypes: dict[np.dtype[Any], np.dtype[Any] | None] = {}


def _code_dtype(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The dtype to view an array in for its memory to be taken; None if it is not clipped.

    The dtypes of ml_dtypes have no buffer protocol: they are taken as unsigned integers.
    """
    if dtype not in _code_dtypes:
        code = dtype if dtype.char in "efdFD" else None
        if dtype.type.__module__.partition(".")[0] == "ml_dtypes":
            if dtype.name == "bfloat16":
                code = np.dtype(np.uint16)
            # Of the others, float8_e8m0fnu has neither zero nor sign: no gradient is of it.
            elif dtype.name.startswith(("float8_e3", "float8_e4", "float8_e5")):
                code = np.dtype(np.uint8)
        _code_dtypes[dtype] = code
    return _code_dtypes[dtype]


def _as_codes(values: Array) -> Array:
    code = _code_dtype(values.dtype)
    assert code is not None, "an array that has passed every check"
    return values if code is values.dtype else values.view(code)


_decode_tables: dict[np.dtype[Any], bytes] = {}


def _decode_table(dtype: np.dtype[Any]) -> bytes | None:
    """For float8, the float32 values of its 256 codes."""
    if dtype.itemsize != 1:
        return None
    if dtype not in _decode_tables:
        codes = np.arange(256, dtype=np.uint8)
        _decode_tables[dtype] = codes.view(dtype).astype(np.float32).tobytes()
    return _decode_tables[dtype]


def _recode_table(dtype: np.dtype[Any], factor: Scaled) -> bytes | None:
    """For float8, the code of each code's value times the factor."""
    if dtype.itemsize != 1:
        return None
    values = np.frombuffer(_decode_table(dtype) or b"", np.float32)
    product = np.empty_like(values)
    cpu.scale(_take([values], None), _take([product], None), *factor, None)
    with np.errstate(invalid="ignore"):
        return product.astype(dtype).tobytes()


def _in_the_way(values: Sequence[Array], path: Callable[[int], str]) -> str:
    """Why one of the arrays cannot be written in place."""
    for place, array in enumerate(values):
        if not array.flags.writeable:
            return f"{path(place)} is read-only; clip_by_global_norm returns new arrays instead"
    for place, array in enumerate(values):
        if cpu.take([_as_codes(array)], [_decode_table(array.dtype)], writable=True) is None:
            return (
                f"{path(place)} has elements that share memory (strides {array.strides}); "
                "clip_by_global_norm returns new arrays instead"
            )
    raise AssertionError("every array can be written")


# ---- sparse leaves ----


def _measured(held: Held) -> Iterator[cpu.Leaves]:
    """The memory whose squares add up to those of the tensors that the leaves stand for."""
    if not held.sparse:
        yield held.memory
        return
    dense: list[Array] = []
    seen = set()
    for leaf, values in zip(held.leaves, held.values, strict=True):
        place = (values.__array_interface__["data"], values.shape, values.strides)
        if held.writable and place in seen:
            continue  # one array listed twice is scaled once, so it counts once
        seen.add(place)
        sums = _merged(leaf, values) if _is_sparse(leaf) else None
        if sums is None:
            dense.append(values)
        else:
            yield from (_take([part], None) for part in sums)
    yield _take(dense, [_decode_table(values.dtype) for values in dense])


def _merged(leaf: Any, values: Array) -> Iterator[Array] | None:
    """The rows of a sparse leaf, those with one index added; None if each has its own."""
    if isinstance(leaf, IndexedSlices):
        return merged_rows(values, np.asarray(leaf.indices))
    coordinates = leaf.tocoo(copy=False)
    shape = coordinates.shape
    if math.prod(shape) < 2**63:
        index = np.ravel_multi_index(coordinates.coords, shape)
    else:
        index = np.unique(np.stack(coordinates.coords), axis=1, return_inverse=True)[1]
    sums = merged_rows(coordinates.data, index)
    # A dia matrix stores values outside of the matrix too: only those that tocoo keeps count.
    return iter([coordinates.data]) if sums is None and leaf.format == "dia" else sums


def _scipy_values(leaf: Any, path: Callable[[], str], *, writable: bool) -> Array:
    if leaf.format in _IN_PLACE_FORMATS:
        _check_scipy_indices(leaf, path)
        return np.asarray(leaf.data)
    if writable:
        raise TypeError(
            f"{path()} is a {type(leaf).__name__}, which cannot be scaled in place; "
            f"convert it with .tocsr(), or use clip_by_global_norm"
        )
    return np.asarray(leaf.tocoo().data)


def _check_scipy_indices(leaf: Any, path: Callable[[], str]) -> None:
    """Hold the index arrays against the shape; SciPy's own code takes them on trust."""
    if leaf.format == "dia":
        return
    if leaf.format == "coo":
        axes = dict(enumerate(leaf.coords))
    else:
        axes = {0 if leaf.format == "csc" else len(leaf.shape) - 1: leaf.indices}
        begins = leaf.indptr
        stored = min(len(leaf.indices), len(leaf.data))
        if begins[0] != 0 or (np.diff(begins) < 0).any() or begins[-1] > stored:
            raise ValueError(f"{path()}.indptr does not rise from 0 to at most {stored}")
    for axis, index in axes.items():
        length = leaf.shape[axis] // (leaf.blocksize[axis] if leaf.format == "bsr" else 1)
        if index.size and (index.min() < 0 or index.max() >= length):
            raise ValueError(
                f"{path()} has an index out of range on axis {axis} of length {length}"
            )


def _rewrapped(held: Held, new: list[Array]) -> list[Any]:
    """The leaves again, with new elements."""
    return [_rewrap(leaf, values) for leaf, values in zip(held.leaves, new, strict=True)]


def _rewrap(leaf: Any, values: Array) -> Any:
    if isinstance(leaf, np.ndarray):
        return values
    if isinstance(leaf, np.generic):
        return values[()]
    if isinstance(leaf, IndexedSlices):
        return leaf._replace(values=values)
    if leaf.format in _IN_PLACE_FORMATS:
        new = leaf.copy()
        new.data = values
        return new
    coordinates = leaf.tocoo()
    coordinates.data = values
    return coordinates.asformat(leaf.format)
