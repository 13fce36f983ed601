"""Leaves in this machine's memory: measure and scale them, whatever framework they are of.

A backend turns its leaves into NumPy arrays of the same memory; the rest is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gradclip.core.exact import (
    FLOAT32,
    FLOAT64,
    Scaled,
    Total,
    certified_norm,
    merge,
    norm,
    total_of,
)
from gradclip.core.workers import Joint
from gradclip.kernels import cpu, layout
from gradclip.kernels.layout import Layout

Array = npt.NDArray[Any]


class Float8(NamedTuple):
    """How 256 codes stand for numbers."""

    decode: bytes  # the float32 value of each
    encode: Callable[[Array], bytes]  # the codes nearest to float32 values


class Held(NamedTuple):
    """Leaves that have passed every check, and their memory."""

    leaves: Sequence[Any]
    values: list[Array]  # the elements of each leaf: of a sparse one its stored values
    codes: list[Float8 | None] | None
    memory: cpu.Leaves  # of `values`
    writable: bool
    # The rows of a sparse leaf with those of one index added; None if no two share one, and for a
    # dense leaf. None in place of the function if no leaf is sparse.
    merged: Callable[[Any, Array], Iterator[Array] | None] | None


def hold_plain(leaves: Sequence[Any], values: list[Array], *, writable: bool) -> Held | None:
    """Hold arrays of native NumPy dtypes; None where one of them needs care first."""
    memory = cpu.take(values, None, writable=writable)
    return None if memory is None else Held(leaves, values, None, memory, writable, None)


def hold(
    leaves: Sequence[Any],
    values: list[Array],
    merged: Callable[[Any, Array], Iterator[Array] | None] | None,
    path: Callable[[int], str],
    *,
    writable: bool,
) -> Held:
    """Hold arrays of accepted dtypes.

    Raises:
        ValueError: there are more elements than an int64 counts; with ``writable``, one is
            read-only, its elements share memory, or it shares a part of its memory with another.
    """
    codes = [_float8(array.dtype) for array in values]
    return hold_codes(
        leaves, list(map(_as_codes, values)), codes, merged, path, writable=writable
    )._replace(values=values)


def hold_codes(
    leaves: Sequence[Any],
    values: list[Array],
    codes: list[Float8 | None],
    merged: Callable[[Any, Array], Iterator[Array] | None] | None,
    path: Callable[[int], str],
    *,
    writable: bool,
) -> Held:
    """Hold arrays of native dtypes, of which uint16 is bfloat16 and uint8 is of ``codes``.

    Raises:
        ValueError: as `hold`.
    """
    check_countable((array.size * (1 + (array.dtype.kind == "c")) for array in values), path)
    memory = cpu.take(values, _decode(codes), writable=writable)
    if memory is None:
        raise ValueError(_in_the_way(values, codes, path))
    check_apart(memory, path)
    return Held(leaves, values, codes, memory, writable, merged)


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


def measure(held: Held) -> Scaled:
    """The global norm, correctly rounded."""
    if held.merged is None and not held.memory.has_f64:
        certified = certified_norm(cpu.sum_squares(held.memory))
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


def share(held: Held, joint: Joint) -> tuple[Total, bool]:
    """What this worker adds to the sum of squares of all, and if a leaf is float64."""
    del joint  # all of it, whoever they are
    exact, _, wide = total(held)
    return exact, wide


def queue(held: Held) -> None:
    """Nobody: the host decides about what is in its own memory."""
    del held


def check_there(held: Held) -> None:
    """Nothing: what is held is in memory."""
    del held


def everyone(leaves: Sequence[Any]) -> None:
    """Nobody: no array says who has other parts of the same gradient."""


def written(leaves: Sequence[Any]) -> None:
    """Nothing: no queue writes to the host's memory."""


def nonfinite(values: Array) -> tuple[int, int]:
    """How many elements are NaN, and how many are inf."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return int(np.isnan(values).sum()), int(np.isinf(values).sum())


def scalar(value: Scaled, held: Held, *, wide: bool = False) -> np.floating[Any]:
    """The norm as NumPy scalar: float64 if ``wide`` or a leaf is, else float32."""
    with np.errstate(over="ignore", under="ignore"):
        return np.float64(value) if wide or held.memory.has_f64 else np.float32(float(value))


def fill(targets: Sequence[Array], value: float) -> None:
    """Put ``value`` into every element."""
    for array in targets:
        array[...] = complex(value, value) if array.dtype.kind == "c" else value


def scale(held: Held, targets: Sequence[Array], factor: Scaled) -> None:
    """Write every element times ``factor`` to arrays of the same shapes and dtypes."""
    # The kernel walks both in the order of memory: where that is not the same, scale a copy.
    old = list(held.values)
    for place, (source, target) in enumerate(zip(old, targets, strict=True)):
        if source.strides != target.strides:
            np.copyto(target, source)
            old[place] = target
    same = all(source is values for source, values in zip(old, held.values, strict=True))
    memory = held.memory if same else _take(old, held.codes)
    _scale(memory, _take(targets, held.codes), held, factor)


def scale_to(source: Held, target: Held, factor: Scaled) -> None:
    """Write every element times ``factor`` to memory that is laid out alike."""
    _scale(source.memory, target.memory, source, factor)


def scale_(held: Held, factor: Scaled) -> None:
    """Multiply every element where it lies."""
    _scale(held.memory, held.memory, held, factor)


def _scale(source: cpu.Leaves, target: cpu.Leaves, held: Held, factor: Scaled) -> None:
    recode = None
    if held.codes is not None:
        tables = {codes: _recode_table(codes, factor) for codes in set(held.codes)}
        recode = [tables[codes] for codes in held.codes]
    cpu.scale(source, target, *factor, recode)


def _take(arrays: Sequence[Array], codes: list[Float8 | None] | None) -> cpu.Leaves:
    coded = list(arrays) if codes is None else [_as_codes(array) for array in arrays]
    memory = cpu.take(coded, None if codes is None else _decode(codes), writable=False)
    assert memory is not None, "arrays that have passed every check"
    return memory


def _decode(codes: list[Float8 | None]) -> list[bytes | None]:
    return [None if each is None else each.decode for each in codes]


def _measured(held: Held) -> Iterator[cpu.Leaves]:
    """The memory whose squares add up to those of the tensors that the leaves stand for."""
    if held.merged is None:
        yield held.memory
        return
    assert held.codes is not None, "sparse leaves, which are held with care"
    dense: list[Array] = []
    dense_codes = []
    seen = set()
    for leaf, values, codes in zip(held.leaves, held.values, held.codes, strict=True):
        place = (values.__array_interface__["data"], values.shape, values.strides)
        if held.writable and place in seen:
            continue  # one array listed twice is scaled once, so it counts once
        seen.add(place)
        sums = held.merged(leaf, values)
        if sums is None:
            dense.append(values)
            dense_codes.append(codes)
        else:
            yield from (_take([part], None) for part in sums)
    yield _take(dense, dense_codes)


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
