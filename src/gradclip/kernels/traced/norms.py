"""The norm of leaves: of a sum in float64 where its error cannot matter, else of the exact one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gradclip.core.exact import FLOAT32
from gradclip.kernels.traced.numbers import (
    Number,
    codes_of,
    float64_of,
    is_inf,
    is_nan,
    normal,
    split,
    to_places,
)
from gradclip.kernels.traced.operations import Operations, real_parts
from gradclip.kernels.traced.squares import codes_in, root_of_squares, roots_of

_WIDE = ("float64", "complex128")


def is_wide(ops: Operations, leaves: Sequence[tuple[Any, Any]]) -> bool:
    """If the norm of the leaves is float64."""
    return any(ops.dtype(values) in _WIDE for values, _ in leaves)


def measured(ops: Operations, leaves: Sequence[tuple[Any, Any]]) -> Number:
    """The global norm of leaves, of (values, indices or None), correctly rounded."""
    return norm_of(ops, addends(ops, leaves), wide=is_wide(ops, leaves))


def measured_each(ops: Operations, leaves: Sequence[tuple[Any, Any]]) -> Number:
    """The norm of each leaf, rounded as that alone; vectors.

    The leaves of one format are measured together: to compile each by itself takes long.
    """
    alike: dict[tuple[bool, bool], list[int]] = {}
    lists = [addends(ops, [leaf]) for leaf in leaves]
    for place, (leaf, xs) in enumerate(zip(leaves, lists, strict=True)):
        added_up = any(ops.dtype(x) == "float64" for x in xs)  # which rows of one index are
        alike.setdefault((is_wide(ops, [leaf]), added_up), []).append(place)
    found = [
        norms_of_lists(ops, [lists[place] for place in places], wide=wide)
        for (wide, _), places in alike.items()
    ] or [Number(*(ops.zeros(0, dtype) for dtype in ("int64", "int64", "bool", "bool")))]
    order = np.argsort([place for places in alike.values() for place in places])
    order = ops.constant(order, "int64")
    return Number(*(ops.take(ops.concat(list(part)), order) for part in zip(*found, strict=True)))


def addends(ops: Operations, leaves: Sequence[tuple[Any, Any]]) -> list[Any]:
    """Real arrays whose squares add up to those of the tensors that leaves stand for."""
    found = []
    for values, indices in leaves:
        if 0 in (ops.shape(values) or ()):
            continue
        for part in real_parts(ops, values):
            found.append(part if indices is None else _summed_rows(ops, part, indices))
    return found


def norm_of(ops: Operations, xs: Sequence[Any], *, wide: bool) -> Number:
    """The norm of real arrays, rounded to float64 if it is ``wide``, else to float32."""
    zero = ops.constant(0, "int64")
    if not xs:
        return Number(zero, zero, zero > 0, zero > 0)
    every = [ops.cast(x, "float64") for x in xs]
    if wide:
        nan = ops.any(ops.stack([ops.any(is_nan(x)) for x in every]))
        inf = ops.any(ops.stack([ops.any(is_inf(x)) for x in every])) & ~nan
        significand, exponent = root_of_squares(ops, xs, wide=True)
    else:
        total, *certified = _certified(ops, *_sum_of(ops, every))
        # No sum of squares of float32 numbers overflows float64.
        nan, inf = is_nan(total), is_inf(total)
        same = _are_same(certified)

        def exactly() -> list[Any]:
            return root_of_squares(ops, xs, wide=False)

        significand, exponent = ops.cond(same | nan | inf, lambda: certified[:2], exactly)
    return Number(*normal(ops, significand, exponent), inf, nan)


def norms_of_lists(ops: Operations, lists: Sequence[Sequence[Any]], *, wide: bool) -> Number:
    """The norm of each of several lists of real arrays, as `norm_of` has them; vectors.

    All arrays, or none, are float64.
    """
    every = [[ops.cast(x, "float64") for x in xs] for xs in lists]
    if wide:
        nan, inf = (
            ops.stack([any_of(ops, [each(x) for x in xs]) for xs in every])
            for each in (is_nan, is_inf)
        )
        return _exactly(ops, *stretches(ops, lists), nan, inf & ~nan)
    sums = zip(*(_sum_of(ops, xs) for xs in every), strict=True)
    found = _certified(ops, *(ops.stack(list(each)) for each in sums))
    return _narrow(ops, found, lambda: stretches(ops, lists))


def norms_of_rows(ops: Operations, x: Any, *, wide: bool) -> Number:
    """The same of the rows of a real matrix, whose shape is known."""
    count, length = (int(size or 0) for size in ops.shape(x) or ())
    each = ops.constant(np.arange(count), "int64")
    begins, sizes = each * length, each * 0 + length
    if wide:
        nan = ops.sum(ops.cast(is_nan(x), "int64"), 1) > 0
        inf = ops.sum(ops.cast(is_inf(x), "int64"), 1) > 0
        return _exactly(ops, codes_in(ops, [x]), begins, sizes, nan, inf & ~nan)
    numbers = ops.cast(x, "float64")
    longest = ops.cast(sizes, "float64")
    found = _certified(ops, ops.sum(numbers * numbers, 1), longest + 33, longest * _FLUSHED)
    return _narrow(ops, found, lambda: (codes_in(ops, [x]), begins, sizes))


def stretches(ops: Operations, lists: Sequence[Sequence[Any]]) -> tuple[Any, Any, Any]:
    """Lists of real arrays as codes in one vector, where each begins, and its length."""
    xs = [x for xs in lists for x in xs]
    vector = codes_in(ops, xs) if xs else ops.zeros(0, "int32")
    zero = ops.constant(0, "int64")
    sizes = ops.stack([zero + sum(ops.cast(ops.size(x), "int64") for x in xs) for xs in lists])
    return vector, ops.cumsum(sizes) - sizes, sizes


def any_of(ops: Operations, found: Sequence[Any]) -> Any:
    """If an element of any array is true."""
    nothing = ops.constant(0, "int64") > 0
    return ops.any(ops.stack([nothing, *(ops.any(each) for each in found)]))


def _narrow(ops: Operations, found: Any, codes: Callable[[], tuple[Any, Any, Any]]) -> Number:
    """The norms that sums prove, and the others exactly, by ``codes`` as `stretches` has them."""
    total, *certified = found
    nan, inf = is_nan(total), is_inf(total)
    sure = _are_same(certified) | nan | inf

    def exactly() -> list[Any]:
        exact = roots_of(ops, *codes(), ~sure, wide=False)
        return [ops.where(sure, *pair) for pair in zip(certified, exact, strict=False)]

    # Only then: codes are a copy of all leaves, and of those on several devices one on each.
    numbers = ops.cond(ops.any(~sure), exactly, lambda: certified[:2])
    return Number(*normal(ops, *numbers), inf, nan)


def _exactly(ops: Operations, vector: Any, begins: Any, sizes: Any, nan: Any, inf: Any) -> Number:
    found = roots_of(ops, vector, begins, sizes, ~(nan | inf) & (sizes > 0), wide=True)
    return Number(*normal(ops, *found), inf, nan)


# Of a square that may have been flushed, its number being subnormal, at most.
_FLUSHED = 2.0**-252


def _sum_of(ops: Operations, numbers: Sequence[Any]) -> tuple[Any, Any, Any]:
    """The sum of squares in float64, what its error is counted in, and what may be missing.

    A sum of n squares in any order, each rounded once, errs by less than n u, u = 2^-53 (Higham,
    section 4.2): by rows, then across them, n is their lengths' sum.
    """
    sums = []
    zero = longest = flushed = ops.constant(0.0, "float64")
    for x in numbers:
        width, size = _width(ops.shape(x)), ops.cast(ops.size(x), "float64")
        squares = ops.reshape(x * x, (-1, width))
        columns = ops.sum(squares, 0)
        # It adds zero. Without it XLA makes one sum of the two, of any order.
        sums.append(ops.sum(columns + ops.where(columns == -1.0, columns, zero), None))
        longest = ops.maximum(longest, size / width + width)
        flushed = flushed + size * _FLUSHED
    total = ops.sum(ops.stack(sums), None) if sums else zero
    return total, longest + (len(sums) + 32), flushed


def _certified(ops: Operations, total: Any, rounded: Any, flushed: Any) -> list[Any]:
    """A sum of squares in float64, and the float32 norms at both ends of its error."""
    bound = rounded * 2.0**-53
    ends = [total]
    for end in (total * (1 - bound), (total + flushed) * (1 + bound)):
        significand, exponent = split(ops, ops.bitcast(ops.sqrt(end), "int64"))
        ends += to_places(ops, Number(significand, exponent, False, False), *FLOAT32)
    return ends


def _are_same(ends: Sequence[Any]) -> Any:
    return (ends[0] == ends[2]) & (ends[1] == ends[3])


def _width(shape: Sequence[int | None] | None) -> int:
    """How to cut an array into rows: adding rows up is what compilers make vectors of."""
    if not shape:
        return 1
    if None not in shape:
        size = math.prod(shape)  # type: ignore[arg-type]
        width = min(size & -size, 4096)
        if width >= 64:
            return width
    return shape[-1] or 1


def _summed_rows(ops: Operations, values: Any, indices: Any) -> Any:
    """The rows of slices with those of the same index added, in float64; the rest are zeros."""
    rows = values if ops.dtype(values) == "float64" else float64_of(ops, codes_of(ops, values))
    return _grouped(ops, rows, indices)[0]


def merged(ops: Operations, rows: Any, indices: Any) -> Any:
    """Each row replaced by the sum of all rows of its index."""
    sums, group, order = _grouped(ops, rows, indices)
    return ops.take(ops.take(sums, group), ops.argsort(order))


def _grouped(ops: Operations, rows: Any, indices: Any) -> tuple[Any, Any, Any]:
    """The sums of rows of one index; the place of each row's, in the order that follows."""
    order = ops.argsort(indices)
    in_order = ops.cast(ops.take(indices, order), "int64")
    begins = ops.cast(in_order[1:] != in_order[:-1], "int64")
    group = ops.cumsum(ops.concat([in_order[:1] * 0, begins]))
    return ops.segment_sum(ops.take(rows, order), group, ops.size(indices)), group, order
