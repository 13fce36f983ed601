"""The exact sum of squares, as words that add up, and its root."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gradclip.core.exact import FLOAT32, FLOAT64, UNIT
from gradclip.kernels.traced.numbers import (
    Number,
    codes_of,
    float64_of,
    is_inf,
    is_nan,
    normal,
    split,
)
from gradclip.kernels.traced.operations import Operations

_CHUNK = 1 << 14
_CLASSES, _LIMB, _PLACES = 2048, 14, 7
_WORDS, _MASK = 144, 0xFFFFFFFF


def total(ops: Operations, xs: Sequence[Any]) -> Any:
    """The exact sum of squares of real arrays, as words that add up; see `root`."""
    words = _words(ops, _sums(ops, xs))
    counts = [ops.any(ops.stack([ops.any(each(x)) for x in xs])) for each in (is_inf, is_nan)]
    return ops.concat([words, ops.cast(ops.stack(counts), "int64")])


def root(ops: Operations, words: Any, *, wide: bool) -> Number:
    """The norm of a sum of totals, rounded to float64 if it is ``wide``, else to float32."""
    nan = words[_WORDS + 1] > 0
    inf = (words[_WORDS] > 0) & ~nan
    found = _root(ops, _carried(ops, words[:_WORDS]), wide=wide)
    return Number(*normal(ops, *found), inf, nan)


def root_of_squares(ops: Operations, xs: Sequence[Any], *, wide: bool) -> list[Any]:
    """The root of the exact sum, of finite numbers, as significand and exponent."""
    return _root(ops, _words(ops, _sums(ops, xs)), wide=wide)


def roots_of(
    ops: Operations, vector: Any, begins: Any, sizes: Any, some: Any, *, wide: bool
) -> list[Any]:
    """As `root_of_squares`, of ``some`` stretches of a vector, one after the other; 0 of others."""

    def root(sums: Any) -> Any:
        return ops.stack(_root(ops, _words(ops, sums), wide=wide))

    rows = _rows_of(ops, vector, begins, sizes, some, root, 2)
    return [rows[:, 0], rows[:, 1]]


def totals_of(ops: Operations, vector: Any, begins: Any, sizes: Any) -> Any:
    """As `total`, of each of several stretches of a vector, but for the counts: a row for each."""
    return _rows_of(ops, vector, begins, sizes, sizes > 0, lambda sums: _words(ops, sums), _WORDS)


def codes_in(ops: Operations, xs: Sequence[Any]) -> Any:
    """Real arrays, all or none of float64, as one vector of bits."""
    codes = [ops.bitcast(x, "int64") if _is_wide(ops, x) else codes_of(ops, x) for x in xs]
    return ops.concat([ops.reshape(each, (-1,)) for each in codes])


def _is_wide(ops: Operations, x: Any) -> bool:
    return ops.dtype(x) == "float64"


def _rows_of(
    ops: Operations,
    vector: Any,
    begins: Any,
    sizes: Any,
    some: Any,
    finish: Callable[[Any], Any],
    width: int,
) -> Any:
    """A row for each stretch: of some what is made of its sums, of others zeros."""
    places = ops.cumsum(ops.cast(sizes == sizes, "int64")) - 1  # noqa: PLR0124
    inside = ops.constant(np.arange(_CHUNK), "int64")
    to_bits = _bits_of(ops, vector)
    order = ops.cast(ops.argsort(ops.cast(~some, "int64")), "int64")
    vector = ops.concat([vector, ops.zeros(1, ops.dtype(vector))])

    def row(number: Any, rows: Any) -> Any:
        own = ops.take(order, number)
        begin, size = ops.take(begins, own), ops.take(sizes, own)

        def body(chunk: Any, sums: Any) -> Any:
            at = ops.cast(chunk, "int64") * _CHUNK + inside
            found = ops.take(vector, begin + ops.minimum(at, ops.maximum(size - 1, 0)))
            return _with_squares(ops, sums, to_bits(ops.where(at < size, found, 0 * found)))

        sums = ops.loop((size + _CHUNK - 1) // _CHUNK, body, _no_sums(ops))
        return ops.where(ops.reshape(places == own, (-1, 1)), finish(sums), rows)

    blank = ops.reshape(places * 0, (-1, 1)) + ops.zeros(width, "int64")
    return ops.loop(ops.sum(ops.cast(some, "int64"), None), row, blank)


def _sums(ops: Operations, xs: Sequence[Any]) -> Any:
    """Each square's limbs added up, as integers, with those of all numbers of its exponent."""
    sums = _no_sums(ops)
    for group in ([x for x in xs if not _is_wide(ops, x)], [x for x in xs if _is_wide(ops, x)]):
        if group:
            sums = _added(ops, sums, codes_in(ops, group))
    return sums


def _no_sums(ops: Operations) -> Any:
    return ops.reshape(ops.zeros(_CLASSES * _PLACES, "int64"), (_CLASSES, _PLACES))


def _bits_of(ops: Operations, codes: Any) -> Callable[[Any], Any]:
    """What makes bits of float64 of these codes."""
    if ops.dtype(codes) == "int64":
        return lambda codes: codes
    return lambda codes: ops.bitcast(float64_of(ops, codes), "int64")


def _added(ops: Operations, sums: Any, vector: Any) -> Any:
    size, to_bits = ops.size(vector), _bits_of(ops, vector)
    padded = ops.concat([vector, ops.zeros((-size) % _CHUNK, ops.dtype(vector))])
    chunks = ops.reshape(padded, (-1, _CHUNK))

    def body(place: Any, sums: Any) -> Any:
        return _with_squares(ops, sums, to_bits(ops.take(chunks, place)))

    # Gradients that are all zero are met, and need no such work.
    some = ops.cast(ops.any(2 * vector != 0), "int64")
    return ops.loop((size + _CHUNK - 1) // _CHUNK * some, body, sums)


def _with_squares(ops: Operations, sums: Any, bits: Any) -> Any:
    """The sums, with the squares of float64 numbers."""
    significand, exponent = split(ops, bits)
    a, b, c, d = (ops.right(significand, _LIMB * place) & ((1 << _LIMB) - 1) for place in range(4))
    products = [
        a * a,
        2 * a * b,
        2 * a * c + b * b,
        2 * (a * d + b * c),
        2 * b * d + c * c,
        2 * c * d,
        d * d,
    ]
    return sums + ops.segment_sum(ops.stack(products), exponent + 1075, _CLASSES)


def _words(ops: Operations, sums: Any) -> Any:
    """The sum as words of 32 bits, from 2^UNIT up."""
    shift = 2 * np.arange(_CLASSES)[:, None] + _LIMB * np.arange(_PLACES) + 26
    word, offset = shift.ravel() >> 5, ops.constant(shift.ravel() & 31, "int64")
    flat = ops.reshape(sums, (-1,))
    low, high = ops.left(flat & _MASK, offset), ops.left(ops.right(flat, 32), offset)
    terms = ops.concat([low & _MASK, ops.right(low, 32) + (high & _MASK), ops.right(high, 32)])
    places = ops.constant(np.concatenate([word, word + 1, word + 2]), "int64")
    return _carried(ops, ops.segment_sum(terms, places, _WORDS))


def _carried(ops: Operations, words: Any) -> Any:
    """The same number, each word in [0, 2^32)."""
    for _ in range(2):  # then every word is at most 2^32
        words = (words & _MASK) + _up(ops, ops.right(words, 32), 1)
    # Carries run on through words that are all ones: by a parallel prefix.
    carry, runs = ops.right(words, 32), ops.cast((words & _MASK) == _MASK, "int64")
    for step in (1, 2, 4, 8, 16, 32, 64, 128):
        carry = carry | (runs & _up(ops, carry, step))
        runs = runs & _up(ops, runs, step)
    return (words + _up(ops, carry, 1)) & _MASK


def _up(ops: Operations, words: Any, places: int) -> Any:
    return ops.concat([ops.zeros(places, "int64"), words[:-places]])


def _root(ops: Operations, words: Any, *, wide: bool) -> list[Any]:
    """The root of the words' number, rounded once, ties to even."""
    precision, lowest = FLOAT64 if wide else FLOAT32
    place = ops.constant(np.arange(_WORDS), "int64")
    top = ops.maximum(ops.max(ops.where(words > 0, place, -1)), 0)
    _, length = normal(ops, ops.take(words, top), ops.constant(53, "int64"))
    exponent = ops.right(32 * top + length + 1, 1) + UNIT // 2
    last = ops.maximum(exponent - precision, lowest)
    # The square in quarters of the square of the last place, cut off; two limbs of 54 bits.
    shift = ops.minimum(2 * last - 2 - UNIT, 32 * (_WORDS - 5))
    first, offset = ops.right(shift, 5), shift & 31
    cut = ops.any((place < first) & (words > 0)) | (
        (ops.take(words, first) & (ops.left(ops.constant(1, "int64"), offset) - 1)) > 0
    )
    pieces = [_piece(ops, words, shift + 27 * place) for place in range(4)]
    high, low = ops.left(pieces[3], 27) | pieces[2], ops.left(pieces[1], 27) | pieces[0]
    square = ops.cast(high, "float64") * 2.0**54 + ops.cast(low, "float64")
    root = ops.maximum(ops.cast(ops.sqrt(square) * 0.5, "int64") - 2, 0)
    for _ in range(5):
        # Up while the square is above that of the midpoint, (2 root + 1)^2 in quarters.
        a, b = ops.right(2 * root + 1, 27), (2 * root + 1) & ((1 << 27) - 1)
        mixed = 2 * a * b
        below = ops.left(mixed & ((1 << 27) - 1), 27) + b * b
        above = a * a + ops.right(mixed, 27) + ops.right(below, 54)
        below = below & ((1 << 54) - 1)
        tie = (high == above) & (low == below)
        larger = (high > above) | ((high == above) & (low > below))
        up = larger | (tie & (cut | ((root & 1) > 0)))
        root = root + ops.cast(up, "int64")
    return [root, last]


def _piece(ops: Operations, words: Any, bit: Any) -> Any:
    """27 bits of the words' number."""
    word, offset = ops.right(bit, 5), bit & 31
    low = ops.right(ops.take(words, word), offset)
    return (low | ops.left(ops.take(words, word + 1), 32 - offset)) & ((1 << 27) - 1)
