"""Leaves in this machine's memory: measure and scale them, whatever framework they are of.

A backend turns its leaves into NumPy arrays of the same memory, and derives a class from `Leaves`
that says how new leaves are made; the rest is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from gradclip.core.exact import (
    FLOAT32,
    FLOAT64,
    Part,
    Scaled,
    ScaledArray,
    Total,
    certified_norm,
    merge,
    norm,
    total_of,
)
from gradclip.core.held import Held
from gradclip.kernels import cpu, layout
from gradclip.kernels.layout import Layout

Array = npt.NDArray[Any]
# The rows of a sparse leaf with those of one index added; None if no two share one, and for a
# dense leaf.
Merged = Callable[[Any, Array], Iterator[Array] | None]


class Float8(NamedTuple):
    """How 256 codes stand for numbers."""

    decode: bytes  # the float32 value of each
    encode: Callable[[Array], bytes]  # the codes nearest to float32 values


class Leaves(Held):
    """Leaves in this machine's memory; a framework defines how to make new ones."""

    __slots__ = ("codes", "leaves", "memory", "merged", "values", "writable")

    def __init__(
        self,
        leaves: Sequence[Any],
        values: list[Array],
        codes: list[Float8 | None] | None,
        memory: cpu.Leaves,
        merged: Merged | None,
        *,
        writable: bool,
    ) -> None:
        self.leaves: Sequence[Any] = leaves
        self.values: list[Array] = values  # the elements of each: of a sparse one its stored values
        self.codes: list[Float8 | None] | None = codes
        self.memory: cpu.Leaves = memory  # of `values`
        self.merged: Merged | None = merged  # None if no leaf is sparse
        self.writable: bool = writable

    @property
    def wide(self) -> bool:
        return self.memory.has_f64

    def measure(self) -> Scaled:
        if self.merged is None and not self.memory.has_f64:
            certified = certified_norm(cpu.sum_squares(self.memory))
            if certified is not None:
                return certified
        return norm(self.total()[0], FLOAT64 if self.wide else FLOAT32)

    def measure_each(self) -> tuple[Scaled, ScaledArray]:
        if self.merged is not None:
            return self._measured_with_care()
        each, totals, parts = norms_of(self.memory)
        whole = None if self.wide else certified_norm(parts)
        if whole is not None:
            return whole, each
        # Where there are others than float64 their exact sum takes another look at them.
        exact = merge(totals) if len(totals) == len(self.leaves) else self.total()[0]
        return norm(exact, FLOAT64 if self.wide else FLOAT32), each

    def _measured_with_care(self) -> tuple[Scaled, ScaledArray]:
        """Where rows of one index are added first: leaf by leaf."""
        totals, each = [], []
        for values, codes, sums in self._addends():
            parts = [_take([values], [codes])] if sums is None else map(_taken, sums)
            totals.append(merge(map(_exact, parts)))
            each.append(norm(totals[-1], FLOAT64 if values.dtype.char in "dD" else FLOAT32))
        return norm(merge(totals), FLOAT64 if self.wide else FLOAT32), ScaledArray.of(each)

    def total(self) -> tuple[Total, float, bool]:
        exact, largest = total_of(), 0.0
        for memory in self._measured():
            for narrow, wide, found in cpu.exact_squares(memory):
                exact = merge([exact, total_of(narrow, wide)])
                largest = max(largest, found)
        return exact, largest, self.wide

    def filled(self, value: float) -> list[Any]:
        return self._written(lambda new: fill(new, value))

    def scaled(self, factor: Scaled) -> list[Any]:
        return self._written(lambda new: self.scale_to(new, factor))

    def fill_(self, value: float) -> None:
        fill(self.values, value)

    def scale_(self, factor: Scaled) -> None:
        self._scale(self.memory, self.memory, factor)

    def scaled_each(self, factors: ScaledArray) -> list[Any]:
        return self._written(lambda new: self.scale_to(new, factors))

    def scale_each_(self, factors: ScaledArray) -> None:
        self._scale(self.memory, self.memory, factors)

    def scale_to(self, targets: Sequence[Array], factor: Scaled | ScaledArray) -> None:
        """Write every element times ``factor`` to arrays of the same shapes and dtypes."""
        # The kernel walks both in the order of memory: where that is not the same, scale a copy.
        old = list(self.values)
        for place, (source, target) in enumerate(zip(old, targets, strict=True)):
            if source.strides != target.strides:
                np.copyto(target, source)
                old[place] = target
        same = all(source is values for source, values in zip(old, self.values, strict=True))
        memory = self.memory if same else _take(old, self.codes)
        self._scale(memory, _take(targets, self.codes), factor)

    def scale_into(self, target: cpu.Leaves, factor: Scaled | ScaledArray) -> None:
        """Write every element times ``factor`` to memory that is laid out alike."""
        self._scale(self.memory, target, factor)

    def _written(self, write: Callable[[list[Array]], None]) -> list[Any]:
        """New leaves, their elements written by ``write``."""
        new = self.empty()
        write(new)
        return self.rewrapped(new)

    def empty(self) -> list[Array]:
        """New arrays like those of the elements, which nobody has written yet."""
        return list(map(np.empty_like, self.values))

    def rewrapped(self, new: list[Array]) -> list[Any]:
        """The leaves again, with new elements."""
        raise NotImplementedError

    def norm_of_numpy(self, value: Scaled, *, wide: bool = False) -> np.floating[Any]:
        """The norm as NumPy scalar: float64 if ``wide`` or a leaf is, else float32."""
        kind = np.float64 if wide or self.wide else np.float32
        if -125 < value.exponent < 128:  # which is most of the time, and then nothing warns
            return kind(float(value))
        with np.errstate(over="ignore", under="ignore"):
            return kind(float(value))

    def vector_of_numpy(self, norms: ScaledArray, *, wide: bool = False) -> Array:
        """Norms as a NumPy vector: float64 if ``wide`` or a leaf is, else float32."""
        return norms.rounded(wide=wide or self.wide)

    def _scale(self, source: cpu.Leaves, target: cpu.Leaves, factor: Scaled | ScaledArray) -> None:
        if isinstance(factor, ScaledArray):
            cpu.scale_each(source, target, factor, self._recode(factor))
        else:
            cpu.scale(source, target, *factor, self._recode(factor))

    def _recode(self, factor: Scaled | ScaledArray) -> list[bytes | None] | None:
        """The new codes of leaves that have codes."""
        if self.codes is None:
            return None
        if isinstance(factor, ScaledArray):
            return list(map(_recode_table, self.codes, factor.singly()))
        tables = {codes: _recode_table(codes, factor) for codes in set(self.codes)}
        return [tables[codes] for codes in self.codes]

    def _measured(self) -> Iterator[cpu.Leaves]:
        """The memory whose squares add up to those of the tensors that the leaves stand for."""
        if self.merged is None:
            yield self.memory
            return
        dense: list[Array] = []
        dense_codes = []
        for values, codes, sums in self._addends():
            if sums is None:
                dense.append(values)
                dense_codes.append(codes)
            else:
                yield from map(_taken, sums)
        yield _take(dense, dense_codes)

    def _addends(self) -> Iterator[tuple[Array, Float8 | None, Iterator[Array] | None]]:
        """Of each leaf its elements and their codes, or what rows of one index add up to."""
        assert self.merged is not None, "sparse leaves"
        assert self.codes is not None, "which are held with care"
        seen = set()
        for leaf, values, codes in zip(self.leaves, self.values, self.codes, strict=True):
            place = (values.__array_interface__["data"], values.shape, values.strides)
            if self.writable and place in seen:
                # One array listed twice is scaled once, so it counts once.
                yield values, codes, iter(())
            else:
                yield values, codes, self.merged(leaf, values)
            seen.add(place)


def norms_of(memory: cpu.Leaves) -> tuple[ScaledArray, list[Total], list[Part]]:
    """The norm of each leaf; the exact totals of those that took one; the sum of all in float64."""
    each, unsure, parts = cpu.norms(memory)
    totals = []
    for number in unsure:
        only = memory.only(number)
        totals.append(_exact(only))
        found = norm(totals[-1], FLOAT64 if only.has_f64 else FLOAT32)
        each.significand[number], each.exponent[number] = found
    return each, totals, parts


L = TypeVar("L", bound=Leaves)


def hold_plain(
    kind: type[L],
    leaves: Sequence[Any],
    values: list[Array],
    path: Callable[[int], str],
    *,
    writable: bool,
) -> L | None:
    """Hold arrays of native NumPy dtypes; None where one of them needs care first.

    Raises:
        ValueError: with ``writable``, two share a part of their memory.
    """
    memory = cpu.take(values, None, writable=writable)
    if memory is None:
        return None
    check_apart(memory, path)
    return kind(leaves, values, None, memory, None, writable=writable)


def hold(
    kind: type[L],
    leaves: Sequence[Any],
    values: list[Array],
    merged: Merged | None,
    path: Callable[[int], str],
    *,
    writable: bool,
) -> L:
    """Hold arrays of accepted dtypes.

    Raises:
        ValueError: there are more elements than an int64 counts; with ``writable``, one is
            read-only, its elements share memory, or it shares a part of its memory with another.
    """
    codes = [_float8(array.dtype) for array in values]
    held = hold_codes(
        kind, leaves, list(map(_as_codes, values)), codes, merged, path, writable=writable
    )
    held.values = values
    return held


def hold_codes(
    kind: type[L],
    leaves: Sequence[Any],
    values: list[Array],
    codes: list[Float8 | None],
    merged: Merged | None,
    path: Callable[[int], str],
    *,
    writable: bool,
) -> L:
    """Hold arrays of native dtypes, of which uint16 is bfloat16 and uint8 is of ``codes``.

    Raises:
        ValueError: as `hold`.
    """
    check_countable((array.size * (1 + (array.dtype.kind == "c")) for array in values), path)
    memory = cpu.take(values, _decode(codes), writable=writable)
    if memory is None:
        raise ValueError(_in_the_way(values, codes, path))
    check_apart(memory, path)
    return kind(leaves, values, codes, memory, merged, writable=writable)


_MOST = 2**63 - 1


def check_countable(sizes: Iterable[int], path: Callable[[int], str]) -> None:
    """Refuse leaves of more real numbers than the kernels count.

    Raises:
        ValueError: there are; the text names the leaf that is too much.
    """
    total = 0
    for place, size in enumerate(sizes):
        total += size
        if total > _MOST:
            raise ValueError(
                f"{path(place)} has {size} elements, and the leaves up to it {total} (a complex "
                "one counts as two); gradclip counts up to 2**63 - 1"
            )


def check_apart(memory: cpu.Leaves, path: Callable[[int], str]) -> None:
    """Refuse to write to leaves that share a part of their memory.

    Raises:
        ValueError: two do; the text names both.
    """
    crowd = memory.crowded()
    if crowd is not None:
        layout.check_apart(
            {place: Layout(address, item, steps) for place, address, item, steps in crowd}, path
        )


def nonfinite(values: Array) -> tuple[int, int]:
    """How many elements are NaN, and how many are inf."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return int(np.isnan(values).sum()), int(np.isinf(values).sum())


def fill(targets: Sequence[Array], value: float) -> None:
    """Put ``value`` into every element."""
    for array in targets:
        array[...] = complex(value, value) if array.dtype.kind == "c" else value


def _take(arrays: Sequence[Array], codes: list[Float8 | None] | None) -> cpu.Leaves:
    coded = list(arrays) if codes is None else [_as_codes(array) for array in arrays]
    memory = cpu.take(coded, None if codes is None else _decode(codes), writable=False)
    assert memory is not None, "arrays that have passed every check"
    return memory


def _taken(part: Array) -> cpu.Leaves:
    """Sums of rows, most in float64; where rows are only left out, they are as they were."""
    return _take([part], [_float8(part.dtype)])


def _exact(memory: cpu.Leaves) -> Total:
    return merge(total_of(narrow, wide) for narrow, wide, _ in cpu.exact_squares(memory))


def _decode(codes: list[Float8 | None]) -> list[bytes | None]:
    return [None if each is None else each.decode for each in codes]


def _in_the_way(
    values: Sequence[Array], codes: list[Float8 | None], path: Callable[[int], str]
) -> str:
    """Why one of the arrays cannot be written in place."""
    for place, array in enumerate(values):
        if not array.flags.writeable:
            return f"{path(place)} is read-only; clip_by_global_norm returns new arrays instead"
    for place, array in enumerate(values):
        if cpu.take([array], _decode([codes[place]]), writable=True) is None:
            return (
                f"{path(place)} has elements that share memory (strides {array.strides}); "
                "clip_by_global_norm returns new arrays instead"
            )
    raise AssertionError("every array can be written")


# ---- dtypes ----

_code_dtypes: dict[np.dtype[Any], np.dtype[Any] | None] = {}


def code_dtype(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
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
    code = code_dtype(values.dtype) or values.dtype
    return values if code is values.dtype else values.view(code)


_float8s: dict[np.dtype[Any], Float8] = {}


def _float8(dtype: np.dtype[Any]) -> Float8 | None:
    if dtype.itemsize != 1:
        return None
    if dtype not in _float8s:

        def encode(values: Array) -> bytes:
            with np.errstate(invalid="ignore"):
                return values.astype(dtype).tobytes()

        codes = np.arange(256, dtype=np.uint8)
        _float8s[dtype] = Float8(codes.view(dtype).astype(np.float32).tobytes(), encode)
    return _float8s[dtype]


def _recode_table(codes: Float8 | None, factor: Scaled) -> bytes | None:
    """The code of each code's value times the factor."""
    if codes is None:
        return None
    values = np.frombuffer(codes.decode, np.float32)
    product = np.empty_like(values)
    cpu.scale(_take([values], None), _take([product], None), *factor, None)
    return codes.encode(product)
