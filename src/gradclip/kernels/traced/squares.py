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


def _sums(ops: Operations, xs: Sequence[Any]) -> Any:
    """Each square's limbs added up, as integers, with those of all numbers of its exponent."""
    narrow = [x for x in xs if ops.dtype(x) != "float64"]
    rows = [x for x in xs if ops.dtype(x) == "float64"]
    sums = ops.reshape(ops.zeros(_CLASSES * _PLACES, "int64"), (_CLASSES, _PLACES))
    if narrow:
        sums = _added(
            ops,
            sums,
            [codes_of(ops, x) for x in narrow],
            "int32",
            lambda codes: ops.bitcast(float64_of(ops, codes), "int64"),
        )
    if rows:
        bits = [ops.bitcast(x, "int64") for x in rows]
        sums = _added(ops, sums, bits, "int64", lambda x: x)
    return sums


def _added(
    ops: Operations,
    sums: Any,
    xs: Sequence[Any],
    dtype: str,
    to_bits: Callable[[Any], Any],
) -> Any:
    vector = ops.concat([ops.reshape(x, (-1,)) for x in xs])
    size = ops.size(vector)
    padded = ops.concat([vector, ops.zeros((-size) % _CHUNK, dtype)])
    chunks = ops.reshape(padded, (-1, _CHUNK))

    def body(place: Any, sums: Any) -> Any:
        significand, exponent = split(ops, to_bits(ops.take(chunks, place)))
        a, b, c, d = (
            ops.right(significand, _LIMB * place) & ((1 << _LIMB) - 1) for place in range(4)
        )
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

    # Gradients that are all zero are met, and need no such work.
    some = ops.cast(ops.any(2 * vector != 0), "int64")
    return ops.loop((size + _CHUNK - 1) // _CHUNK * some, body, sums)


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
