"""The norm of each leaf and a factor for each, in one walk: every bit against integers."""

from __future__ import annotations

import math

import numpy as np
import pytest

import cases
import oracle
import test_bits
from cases import DTYPES, Case
from compare import assert_same_bits, build
from gradclip.core.exact import Scaled, ScaledArray
from gradclip.kernels.cpu import leaves as host
from gradclip.numpy import backend
from machines import machine
from oracle import FLOAT32, FLOAT64

FACTORS = (1.0, 1 - 2.0**-40, 0.5, 0.75, 1e-3, 0.1, 3e-40, 1e-300, 0.0)


def assert_number(found: Scaled, numbers: list[float], *, wide: bool) -> None:
    """The root of a sum of squares, as the oracle has it."""
    if any(map(math.isnan, numbers)):
        assert math.isnan(found.significand)
    elif any(map(math.isinf, numbers)):
        assert found.significand == math.inf
    else:
        integer, exponent = oracle.root(oracle.square_sum(numbers), FLOAT64 if wide else FLOAT32)
        significand, more = math.frexp(integer)
        assert found == Scaled(significand, exponent + more if integer else 0)


def check(case: Case, seed: int = 0) -> None:
    """Each norm, and each leaf times a factor of its own, where it lies and as a new one."""
    held = backend.hold(build(case, writable=False), str, writable=False)
    whole, each = held.measure_each()
    numbers = [oracle.measured(leaf) for leaf in case.values]
    wide = [oracle.is_wide(leaf) for leaf in case.values]
    for found, mine, is_wide in zip(zip(*each, strict=True), numbers, wide, strict=True):
        assert_number(Scaled(float(found[0]), int(found[1])), mine, wide=is_wide)
    assert_number(whole, [x for every in numbers for x in every], wide=any(wide))

    factors = np.random.default_rng(seed).choice(FACTORS, len(case.values))
    scaled = ScaledArray(*(x.astype(t) for x, t in zip(np.frexp(factors), "dq", strict=True)))
    wanted = [
        oracle.scaled(leaf, oracle.split(factor)) if factor < 1 else leaf
        for leaf, factor in zip(case.values, factors.tolist(), strict=True)
    ]
    written = build(case, writable=True)
    backend.hold(written, str, writable=True).scale_each_(scaled)
    for new in (held.scaled_each(scaled), written):
        for found, expected, factor in zip(new, wanted, factors, strict=True):
            assert_same_bits(found, expected, nan_payload=new is written and factor == 1)


def check_some() -> None:
    """What the mutations of the C code are to be seen by."""
    for name in ("float16", "bfloat16", "float32", "float64", "mixed"):
        for seed, case in enumerate(test_bits.random_cases(name, 40)):
            check(case, seed)
    for leaves in cases.near_midpoints(np.random.default_rng(2), DTYPES["float32"], 5):
        check(Case(leaves, ["contiguous"] * len(leaves), math.inf))
    rng = np.random.default_rng(3)
    many = [rng.standard_normal(int(n)).astype(np.float32) for n in rng.integers(0, 9000, 300)]
    check(Case(many, ["contiguous"] * len(many), math.inf))
    check_two_threads()


def check_two_threads() -> None:
    """Over and over, as a busy machine may keep one of them from taking part."""
    leaves = [np.ones(200_000, np.float32)] * 20
    held = backend.hold(leaves, str, writable=False)
    with machine(host.cpu.kernel(), 2):
        for _ in range(50):
            whole, each = held.measure_each()
            assert float(whole) == 2000
            assert (each.floats() == np.float32(200_000**0.5)).all()


@pytest.mark.parametrize(
    "name", ["float16", "bfloat16", "float8_e5m2", "float32", "float64", "mixed"]
)
@pytest.mark.usefixtures("threads")
def test_every_norm_and_every_factor(name: str) -> None:
    for seed, case in enumerate(test_bits.random_cases(name, 30)):
        check(case, seed)


def test_norms_that_sums_in_float64_leave_open() -> None:
    """Their exact sums decide, leaf by leaf."""
    for leaves in cases.near_midpoints(np.random.default_rng(2), DTYPES["float32"], 20):
        memory = backend.hold(leaves, str, writable=False).memory
        assert host.norms_of(memory)[1]
        check(Case(leaves, ["contiguous"] * len(leaves), math.inf))


def test_two_threads_add_up_each_norm() -> None:
    check_two_threads()


def test_a_leaf_longer_than_one_share_of_a_walk() -> None:
    rng = np.random.default_rng(0)
    leaves = [rng.standard_normal(n).astype(np.float32) for n in (70000, 3, 200_001, 65536)]
    for threads in (1, 2):
        with machine("numpy" if host.cpu.kernel() == "numpy" else host.cpu.kernel(), threads):
            check(Case(leaves, ["contiguous"] * 4, math.inf))


def test_one_listed_twice_counts_once_and_is_scaled_once() -> None:
    array = np.float32([3, 4])
    held = backend.hold([array, array, np.float32([12])], str, writable=True)
    whole, each = held.measure_each()
    assert float(whole) == 13
    assert each.floats().tolist() == [5, 0, 12]
    held.scale_each_(ScaledArray(np.full(3, 0.5), np.zeros(3, np.int64)))
    assert array.tolist() == [1.5, 2]
