"""The oracle against NumPy, `decimal` and `fractions`, where those are right too."""

from __future__ import annotations

import decimal
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

import oracle
from cases import DTYPES, every_code, near_midpoints, squares_of

SMALL = [name for name in oracle.FORMATS if name in DTYPES and DTYPES[name].itemsize < 4]


def ascending(name: str) -> list[float]:
    """Every finite number of a dtype from 0 up, in the order of their codes."""
    with np.errstate(invalid="ignore"):
        values = every_code(DTYPES[name]).astype(np.float64)
    half = values[: values.size // 2]
    return half[np.isfinite(half)].tolist()


@pytest.mark.parametrize("name", SMALL)
def test_rounding_keeps_every_number_and_takes_ties_to_the_even_code(name: str) -> None:
    values = ascending(name)
    to = oracle.FORMATS[name]

    def rounded(x: Fraction) -> float:
        shift = 200
        integer = x * 2**shift
        assert integer.denominator == 1
        return oracle.as_float(oracle.round_to((int(integer), -shift), to))

    for code, (low, high) in enumerate(itertools.pairwise(values)):
        middle = (Fraction(low) + Fraction(high)) / 2
        nearly = Fraction(1, 2**190)
        assert rounded(Fraction(low)) == low
        assert rounded(middle - nearly) == low
        assert rounded(middle) == (high if code % 2 else low)
        assert rounded(middle + nearly) == high


def test_rounding_to_float32_and_float64_is_that_of_the_processor() -> None:
    rng = np.random.default_rng(0)
    for exponent in range(-1070, 1000, 7):
        x = math.ldexp(rng.random(), exponent)
        exact = oracle.round_to(oracle.split(x), oracle.FLOAT32)
        if exponent < 127:
            assert oracle.as_float(exact) == float(np.float32(x))
        y = math.ldexp(rng.random(), -max(exponent, 0))
        (m, e), (n, f) = oracle.split(x), oracle.split(y)
        assert oracle.as_float(oracle.round_to((m * n, e + f), oracle.FLOAT64)) == x * y


def test_the_root_is_that_of_decimal() -> None:
    rng = np.random.default_rng(1)
    with decimal.localcontext(prec=1200):
        for leaves in near_midpoints(rng, np.dtype(np.float64), 10):
            numbers = oracle.parts(leaves[0])
            exact = sum(decimal.Decimal(x) ** 2 for x in numbers).sqrt()
            assert oracle.as_float(oracle.norm(leaves)[0]) == float(exact)


def test_the_quotient_is_that_of_fractions() -> None:
    rng = np.random.default_rng(2)
    for _ in range(1000):
        a, b = (math.ldexp(rng.random(), int(rng.integers(-400, 400))) for _ in range(2))
        found = oracle.quotient(oracle.split(a), oracle.split(b), oracle.FLOAT64)
        assert oracle.as_float(found) == float(Fraction(a) / Fraction(b)) == a / b


@pytest.mark.parametrize("bits", [4, 8, 11, 24, 53])
def test_squares_add_up_to_their_target(bits: int) -> None:
    for target in (0, 1, 2, 12345678901234567890, 3**80):
        found = squares_of(target, bits)
        assert sum(x * x for x in found) == target
        for x in found:
            cut = max(0, x.bit_length() - bits)
            assert x >> cut << cut == x


def test_rows_with_one_index_are_added_in_float64_in_their_order() -> None:
    from gradclip import IndexedSlices

    values = np.float64([[1.0], [2.0**-53], [2.0**-53], [5.0]])
    slices = IndexedSlices(values, np.array([1, 1, 1, 0]))
    assert oracle.measured(slices) == [1.0, 5.0]
    slices = IndexedSlices(values[[1, 2, 0, 3]], np.array([1, 1, 1, 0]))
    assert oracle.measured(slices) == [1 + 2.0**-52, 5.0]
