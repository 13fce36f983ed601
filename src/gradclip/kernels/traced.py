"""Exact norms and scaling by a framework's own operations: for what it compiles itself.

Written for operations that flush subnormal numbers to zero, reorder sums and contract products, as
compilers of graphs do: float64 holds float32 numbers, their squares and their products with a
factor, all of normal size, and whatever would be subnormal is made of integers.

A number is kept as ``significand * 2**exponent``, two int64 of which the first is not negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

_WIDE = ("float64", "complex128")
_ONE = 1 << 52  # the hidden bit of a float64
_CHUNK = 1 << 14
_CLASSES, _LIMB, _PLACES = 2048, 14, 7
_UNIT, _WORDS, _MASK = -2176, 144, 0xFFFFFFFF


class Operations(Protocol):
    """What a framework must offer; names and meanings are NumPy's unless described."""

    def dtype(self, x: Any) -> str:
        """The name of the dtype."""

    def shape(self, x: Any) -> Sequence[int | None] | None:
        """The lengths that are known; None if not even their number is."""

    def size(self, x: Any) -> Any:
        """The number of elements."""

    def cast(self, x: Any, dtype: str) -> Any:
        """Convert the values."""

    def bitcast(self, x: Any, dtype: str) -> Any:
        """Take the bits for another dtype of the same width."""

    def constant(self, values: Any, dtype: str) -> Any:
        """An array of known values."""

    def parts(self, x: Any) -> list[Any]:
        """The real and imaginary part of a complex array."""

    def joined(self, parts: list[Any]) -> Any:
        """A complex array from its parts."""

    def where(self, condition: Any, x: Any, y: Any) -> Any: ...

    def sum(self, x: Any, axis: int | None) -> Any: ...

    def any(self, x: Any) -> Any: ...

    def max(self, x: Any) -> Any: ...

    def maximum(self, x: Any, y: Any) -> Any: ...

    def minimum(self, x: Any, y: Any) -> Any: ...

    def sqrt(self, x: Any) -> Any: ...

    def round(self, x: Any) -> Any:
        """To the nearest integer, ties to even."""

    def left(self, x: Any, places: Any) -> Any:
        """Shift bits to the left."""

    def right(self, x: Any, places: Any) -> Any:
        """Shift bits to the right, keeping the sign."""

    def reshape(self, x: Any, shape: Sequence[int]) -> Any: ...

    def concat(self, xs: Sequence[Any]) -> Any:
        """Vectors, one after the other."""

    def stack(self, xs: Sequence[Any]) -> Any:
        """Along a new last axis."""

    def zeros(self, length: Any, dtype: str) -> Any:
        """A vector of zeros; the length may be traced."""

    def take(self, x: Any, indices: Any) -> Any:
        """Rows by their indices."""

    def argsort(self, x: Any) -> Any:
        """Stable."""

    def cumsum(self, x: Any) -> Any: ...

    def segment_sum(self, rows: Any, segments: Any, count: Any) -> Any:
        """Rows of the same segment added up, in their order."""

    def loop(self, count: Any, body: Callable[[Any, Any], Any], start: Any) -> Any:
        """``state = body(i, state)`` for i from 0 up to count."""

    def cond(
        self, condition: Any, yes: Callable[[], list[Any]], no: Callable[[], list[Any]]
    ) -> Any:
        """Only one of the two."""


class Number(NamedTuple):
    """``significand * 2**exponent``, or what is no finite number."""

    significand: Any
    exponent: Any
    inf: Any
    nan: Any


def clip(
    ops: Operations,
    leaves: Sequence[tuple[Any, Any]],
    clip_norm: Any,
    use_norm: Any,
    policy: str,
) -> list[Any]:
    """Clip leaves, of (values, indices or None), as `gradclip.clip_by_global_norm` does.

    Returns:
        The norm in its dtype, the norm as float64, then the new values.
    """
    wide = is_wide(ops, leaves)
    norm = measured(ops, leaves) if use_norm is None else number_of(ops, use_norm)
    above, factor = compared(ops, norm, number_of(ops, clip_norm))
    failed = norm.inf | norm.nan

    def clipped(values: Any) -> Any:
        if ops.dtype(values).startswith("complex"):
            return ops.joined([clipped(part) for part in ops.parts(values)])
        kept = ops.where(above, scaled(ops, values, factor), values)
        if policy == "keep":
            return kept
        filling = ops.cast(
            ops.constant({"nan": math.nan, "zero": 0.0}[policy], "float32"), ops.dtype(values)
        )
        return ops.where(failed, filling, kept)

    new = [clipped(values) for values, _ in leaves]
    return [rounded(ops, norm, wide=wide), rounded(ops, norm, wide=True), *new]


def compared(ops: Operations, norm: Number, limit: Number) -> tuple[Any, Number]:
    """If leaves of this norm are to be scaled down, and by what factor."""
    return _is_above(norm, limit), _factor(ops, norm, limit)


# ---- numbers ----


def number_of(ops: Operations, x: Any) -> Number:
    """A scalar, its significand of 53 bits unless it is 0.

    What is traced cannot be refused: below 0 it acts as 0.
    """
    wide = x if ops.dtype(x) == "float64" else _signed(ops, _codes(ops, x))
    bits = ops.bitcast(wide, "int64")  # a comparison would take a subnormal number for 0
    significand, exponent = _normal(ops, *_split(ops, ops.where(bits < 0, 0, bits)))
    return Number(significand, exponent, x == math.inf, _is_nan(x))


def _is_nan(x: Any) -> Any:
    return x != x  # noqa: PLR0124


def _is_inf(x: Any) -> Any:
    return (x == math.inf) | (x == -math.inf)


def _split(ops: Operations, bits: Any) -> tuple[Any, Any]:
    """The significand and exponent of float64 bits without their sign; 0 of NaN and inf."""
    field = ops.right(bits, 52) & 0x7FF
    finite = ops.where(field < 0x7FF, bits & (_ONE - 1), 0)
    hidden = ops.where((field > 0) & (field < 0x7FF), _ONE, 0 * field)
    return finite | hidden, ops.maximum(field, 1) - 1075


def _normal(ops: Operations, significand: Any, exponent: Any) -> tuple[Any, Any]:
    """With a significand of 53 bits; 0 stays."""
    bits = ops.bitcast(ops.cast(significand, "float64"), "int64")
    normal, shift = _split(ops, bits)
    return normal, ops.where(significand > 0, exponent + shift, -(1 << 20))


def _is_above(norm: Number, limit: Number) -> Any:
    """If a finite norm is to be scaled down."""
    larger = (norm.exponent > limit.exponent) | (
        (norm.exponent == limit.exponent) & (norm.significand > limit.significand)
    )
    finite = ~(norm.inf | norm.nan)
    return finite & (((norm.significand > 0) & larger & ~limit.inf) | limit.nan)


def _factor(ops: Operations, norm: Number, limit: Number) -> Number:
    """``limit / norm`` to 53 bits, for a norm that is above."""
    divisor = ops.cast(ops.where(norm.significand > 0, norm.significand, 1), "float64")
    quotient = ops.cast(limit.significand, "float64") / divisor
    significand, exponent = _split(ops, ops.bitcast(quotient, "int64"))
    exponent = ops.where(
        limit.significand > 0, exponent + limit.exponent - norm.exponent, -(1 << 20)
    )
    return Number(significand, exponent, limit.inf, limit.nan)


def _to_places(ops: Operations, number: Number, precision: int, lowest: int) -> tuple[Any, Any]:
    """A significand of 53 bits rounded to so many, its last place not below ``lowest``."""
    drop = ops.minimum(ops.maximum(53 - precision, lowest - number.exponent), 55)
    odd = ops.right(number.significand, drop) & 1
    half = ops.right(ops.left(ops.cast(odd * 0 + 1, "int64"), drop), 1)
    # Ties go to even; with nothing to drop, half is 0 and nothing is added.
    more = ops.where(drop > 0, half - 1 + odd, 0)
    return ops.right(number.significand + more, drop), number.exponent + drop


def rounded(ops: Operations, number: Number, *, wide: bool) -> Any:
    """As a scalar: float64, or else float32."""
    precision, lowest, bits, top = (53, -1074, "int64", 2047) if wide else (24, -149, "int32", 255)
    hidden = 1 << (precision - 1)
    places, last = _to_places(ops, number, precision, lowest)
    field = last - lowest + 1
    # A carry out of the significand goes to the exponent by itself.
    code = ops.left(field, precision - 1) + places - hidden
    code = ops.where(places < hidden, places, code)
    largest = top << (precision - 1)
    code = ops.where((field >= top) | (code > largest) | number.inf, largest, code)
    code = ops.where(number.nan, largest | (hidden >> 1), code)
    return ops.bitcast(ops.cast(code, bits), "float64" if wide else "float32")


# ---- measuring ----


def is_wide(ops: Operations, leaves: Sequence[tuple[Any, Any]]) -> bool:
    """If the norm of the leaves is float64."""
    return any(ops.dtype(values) in _WIDE for values, _ in leaves)


def measured(ops: Operations, leaves: Sequence[tuple[Any, Any]]) -> Number:
    """The global norm of leaves, of (values, indices or None), correctly rounded."""
    return norm_of(ops, addends(ops, leaves), wide=is_wide(ops, leaves))


def addends(ops: Operations, leaves: Sequence[tuple[Any, Any]]) -> list[Any]:
    """Real arrays whose squares add up to those of the tensors that leaves stand for."""
    found = []
    for values, indices in leaves:
        if 0 in (ops.shape(values) or ()):
            continue
        for part in ops.parts(values) if ops.dtype(values).startswith("complex") else [values]:
            found.append(part if indices is None else _summed_rows(ops, part, indices))
    return found


def norm_of(ops: Operations, xs: Sequence[Any], *, wide: bool) -> Number:
    """The norm of real arrays, rounded to float64 if it is ``wide``, else to float32."""
    zero = ops.constant(0, "int64")
    if not xs:
        return Number(zero, zero, zero > 0, zero > 0)
    every = [ops.cast(x, "float64") for x in xs]
    if wide:
        nan = ops.any(ops.stack([ops.any(_is_nan(x)) for x in every]))
        inf = ops.any(ops.stack([ops.any(_is_inf(x)) for x in every])) & ~nan
        significand, exponent = _root(ops, _words(ops, _sums(ops, xs)), 53, -1074)
    else:
        total, *certified = _certified(ops, every)
        # No sum of squares of float32 numbers overflows float64.
        nan, inf = _is_nan(total), _is_inf(total)
        same = (certified[0] == certified[2]) & (certified[1] == certified[3])

        def exactly() -> list[Any]:
            return _root(ops, _words(ops, _sums(ops, xs)), 24, -149)

        significand, exponent = ops.cond(same | nan | inf, lambda: certified[:2], exactly)
    return Number(*_normal(ops, significand, exponent), inf, nan)


def _certified(ops: Operations, numbers: Sequence[Any]) -> list[Any]:
    """The sum of squares in float64, and the float32 norms at both ends of its error.

    A sum of n squares in any order, each rounded once, errs by less than n u, u = 2^-53 (Higham,
    section 4.2): by rows, then across them, n is their lengths' sum. Subnormal numbers, each of a
    square below 2^-252, may have been flushed.
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
        flushed = flushed + size * 2.0**-252
    total = ops.sum(ops.stack(sums), None)
    bound = (longest + (len(sums) + 32)) * 2.0**-53
    ends = [total]
    for end in (total * (1 - bound), (total + flushed) * (1 + bound)):
        significand, exponent = _split(ops, ops.bitcast(ops.sqrt(end), "int64"))
        ends += _to_places(ops, Number(significand, exponent, False, False), 24, -149)
    return ends


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
    rows = values if ops.dtype(values) == "float64" else _signed(ops, _codes(ops, values))
    count = ops.size(indices)
    order = ops.argsort(indices)
    in_order = ops.cast(ops.take(indices, order), "int64")
    begins = ops.cast(in_order[1:] != in_order[:-1], "int64")
    group = ops.cumsum(ops.concat([in_order[:1] * 0, begins]))
    return ops.segment_sum(ops.take(rows, order), group, count)


def _codes(ops: Operations, x: Any) -> Any:
    """The bits of x as float32."""
    if ops.dtype(x) == "bfloat16":
        return ops.left(ops.cast(ops.bitcast(x, "uint16"), "int32"), 16)
    return ops.bitcast(x if ops.dtype(x) == "float32" else ops.cast(x, "float32"), "int32")


def _signed(ops: Operations, codes: Any) -> Any:
    """The number of float32 bits as float64."""
    magnitude = codes & 0x7FFFFFFF
    subnormal = ops.cast(ops.where(codes < 0, -magnitude, magnitude), "float64") * 2.0**-149
    normal = ops.cast(ops.bitcast(codes, "float32"), "float64")
    return ops.where(magnitude < 0x00800000, subnormal, normal)


# ---- the exact sum ----


def total(ops: Operations, xs: Sequence[Any]) -> Any:
    """The exact sum of squares of real arrays, as words that add up; see `root`."""
    words = _words(ops, _sums(ops, xs))
    counts = [ops.any(ops.stack([ops.any(each(x)) for x in xs])) for each in (_is_inf, _is_nan)]
    return ops.concat([words, ops.cast(ops.stack(counts), "int64")])


def root(ops: Operations, words: Any, *, wide: bool) -> Number:
    """The norm of a sum of totals, rounded to float64 if it is ``wide``, else to float32."""
    nan = words[_WORDS + 1] > 0
    inf = (words[_WORDS] > 0) & ~nan
    to = (53, -1074) if wide else (24, -149)
    return Number(*_normal(ops, *_root(ops, _carried(ops, words[:_WORDS]), *to)), inf, nan)


def _sums(ops: Operations, xs: Sequence[Any]) -> Any:
    """Each square's limbs added up, as integers, with those of all numbers of its exponent."""
    narrow = [x for x in xs if ops.dtype(x) != "float64"]
    rows = [x for x in xs if ops.dtype(x) == "float64"]
    sums = ops.reshape(ops.zeros(_CLASSES * _PLACES, "int64"), (_CLASSES, _PLACES))
    if narrow:
        sums = _added(
            ops,
            sums,
            [_codes(ops, x) for x in narrow],
            "int32",
            lambda codes: ops.bitcast(_signed(ops, codes), "int64"),
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
        significand, exponent = _split(ops, to_bits(ops.take(chunks, place)))
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
    """The sum as words of 32 bits, from 2^-2176 up."""
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


def _root(ops: Operations, words: Any, precision: int, lowest: int) -> list[Any]:
    """The root of the words' number, rounded once, ties to even."""
    place = ops.constant(np.arange(_WORDS), "int64")
    top = ops.maximum(ops.max(ops.where(words > 0, place, -1)), 0)
    _, length = _normal(ops, ops.take(words, top), ops.constant(53, "int64"))
    exponent = ops.right(32 * top + length + 1, 1) + _UNIT // 2
    last = ops.maximum(exponent - precision, lowest)
    # The square in quarters of the square of the last place, cut off; two limbs of 54 bits.
    shift = ops.minimum(2 * last - 2 - _UNIT, 32 * (_WORDS - 5))
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


# ---- scaling ----


def scaled(ops: Operations, x: Any, factor: Number) -> Any:
    """An array times a factor of 53 bits, or 24 for leaves of 32 bits or fewer."""
    if ops.dtype(x).startswith("complex"):
        return ops.joined([scaled(ops, part, factor) for part in ops.parts(x)])
    return (_scaled_wide if ops.dtype(x) == "float64" else _scaled_narrow)(ops, x, factor)


def _scaled_narrow(ops: Operations, x: Any, factor: Number) -> Any:
    """X of 32 bits or fewer times the factor in float32: the product is exact in float64."""
    places, last = _to_places(ops, factor, 24, -(1 << 21))
    # A factor below 2^-1000 takes every float32 to zero; it stays above zero, as inf does times it.
    scaled = ops.cast(places, "float64") * _power(ops, ops.maximum(last, -1000))
    scaled = ops.where(factor.nan, math.nan, ops.maximum(scaled, 2.0**-1000))
    codes = _codes(ops, x)
    sign = codes & -(1 << 31)
    product = _signed(ops, codes) * scaled
    subnormal = ops.cast(ops.round(abs(product) * 2.0**149), "int32") | sign
    rounded = ops.cast(product, "float32")
    result = ops.where(abs(product) < 2.0**-126, ops.bitcast(subnormal, "float32"), rounded)
    if ops.dtype(x) == "float32":
        return result
    if ops.dtype(x) != "bfloat16":
        return ops.cast(result, ops.dtype(x))
    magnitude = ops.bitcast(result, "int32") & 0x7FFFFFFF
    nearest = ops.right(magnitude + 0x7FFF + (ops.right(magnitude, 16) & 1), 16)
    nearest = ops.where(magnitude > 0x7F800000, ops.right(magnitude, 16) | 0x40, nearest)
    return ops.bitcast(ops.cast(nearest | (ops.right(sign, 16) & 0x8000), "uint16"), "bfloat16")


def _power(ops: Operations, exponent: Any) -> Any:
    """2^exponent as float64, of normal size."""
    return ops.bitcast(ops.left(exponent + 1023, 52), "float64")


def _scaled_wide(ops: Operations, x: Any, factor: Number) -> Any:
    """float64 x times the factor, in integers."""
    bits = ops.bitcast(x, "int64")
    significand, exponent = _normal(ops, *_split(ops, bits))
    a, b = ops.right(significand, 26), significand & ((1 << 26) - 1)
    c, d = ops.right(factor.significand, 26), factor.significand & ((1 << 26) - 1)
    mixed = a * d + b * c
    low = ops.left(mixed & ((1 << 26) - 1), 26) + b * d
    high = a * c + ops.right(mixed, 26) + ops.right(low, 52)
    low = low & (_ONE - 1)
    # The product is (high + low 2^-52) 2^unit; high has 53 or 54 bits.
    unit = exponent + factor.exponent + 52
    drop = ops.maximum(ops.where(high < 2 * _ONE, 0 * high, 1), -1074 - unit)
    drop = ops.minimum(drop, 60)
    kept = ops.right(high, drop)
    # Twice the rest, so that its half is an integer: against 2^drop.
    rest = 2 * (high - ops.left(kept, drop)) + ops.right(low, 51)
    more = (low & ((1 << 51) - 1)) > 0
    whole = ops.left(0 * drop + 1, drop)
    up = (rest > whole) | ((rest == whole) & (more | ((kept & 1) > 0)))
    kept = kept + ops.cast(up, "int64")
    last = unit + drop
    code = ops.where(kept < _ONE, kept, ops.left(last + 1075, 52) + kept - _ONE)
    result = ops.bitcast(code | (bits & -(1 << 63)), "float64")
    result = ops.where(_is_nan(x) | _is_inf(x), x, result)
    return ops.where(factor.nan, math.nan, result)
