"""Every bit of every output, on lists random and adversarial, against the oracle."""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import cases
import gradclip
import oracle
from cases import DTYPES, NARROW, Case
from compare import assert_norm, assert_same_bits, check, expected_of
from conftest import some_quick
from gradclip._clip import act_, survey, together
from gradclip.core import exact
from gradclip.core.decide import Scale
from gradclip.kernels import cpu
from gradclip.kernels.cpu import leaves as host_leaves
from gradclip.numpy import backend
from machines import KERNELS, THREADS, machine

MACHINES = list(itertools.product(KERNELS, THREADS))
MIXED = ["mixed", *DTYPES]


def seeded(name: str) -> np.random.Generator:
    """Random numbers that depend on the name alone."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def dtypes_of(name: str) -> list[np.dtype[Any]]:
    return list(DTYPES.values()) if name == "mixed" else [DTYPES[name]]


def random_cases(name: str, count: int) -> Iterator[Case]:
    rng = seeded(name)
    return (cases.random_case(rng, dtypes_of(name)) for _ in range(count))


def limits(leaves: list[Any]) -> list[float]:
    """Limits at a norm and beside it, and one well below."""
    norm = float(oracle.norm(leaves)[1])
    near = np.float64 if any(map(oracle.is_wide, leaves)) else np.float32
    neighbours = [float(np.nextafter(near(norm), near(to))) for to in (0, np.inf)]
    return [limit for limit in (norm, *neighbours, norm / 3) if 0 < limit < math.inf]


def check_at_limits(leaves: list[Any]) -> None:
    for limit in limits(leaves):
        check(Case(leaves, ["contiguous"] * len(leaves), limit))


# ---- random lists ----


@pytest.mark.parametrize("name", MIXED)
def test_random_lists_on_kernels_and_threads_in_turn(name: str, lists: int) -> None:
    for case, (kernel, threads) in zip(
        random_cases(name, lists), itertools.cycle(MACHINES), strict=False
    ):
        expected = expected_of(case)
        with machine(kernel, threads):
            check(case, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXED)
def test_random_lists_on_every_kernel(name: str, lists: int) -> None:
    for place, case in enumerate(random_cases(name, lists)):
        expected = expected_of(case)
        for kernel in KERNELS:
            with machine(kernel, THREADS[place % len(THREADS)]):
                check(case, expected)


@functools.cache
def long_case(name: str) -> tuple[Case, oracle.Clipped]:
    """Lists longer than the chunks that threads take, each block of another character."""
    rng, dtype = seeded(name), DTYPES[name]
    runs = [cases.numbers(rng, dtype, 100 + 731 * place) for place in range(15)]
    # The short leaf comes first, so that no chunk ends where a block does.
    values = [cases.numbers(rng, dtype, 3), np.concatenate(runs), np.concatenate(runs[1:])]
    values[1][::5] = 0
    case = Case(values, ["unaligned", "contiguous", "strided"], 0.75)
    return case, expected_of(case)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn", "float32", "float64"])
def test_long_lists(name: str) -> None:
    check(*long_case(name))


@pytest.mark.usefixtures("threads")
@pytest.mark.slow
@pytest.mark.parametrize("name", DTYPES)
def test_long_lists_of_every_dtype(name: str) -> None:
    check(*long_case(name))


@pytest.mark.usefixtures("kernel")
def test_more_threads_than_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADCLIP_NUM_THREADS", "7")
    check(*long_case("float32"))


@pytest.mark.usefixtures("threads")
def test_long_lists_scaled_into_memory_of_any_alignment() -> None:
    check_any_alignment()


def check_any_alignment() -> None:
    """So long a list is written past the caches, in vectors that must be aligned."""
    rng = seeded("streamed")
    sources, targets, wanted = [], [], []
    for place, dtype in enumerate([np.float32, np.float64, np.float16, np.float32]):
        size = (1 << 20) + 1000 * place + 3
        sources.append(rng.standard_normal(size + place).astype(dtype)[place:])
        targets.append(np.zeros(size + place + 2, dtype)[place + 1 : -1])
        work = np.float64 if dtype is np.float64 else np.float32
        wanted.append((sources[-1].astype(work) * work(0.75)).astype(dtype))
    source = cpu.take(sources, None, writable=False)
    target = cpu.take(targets, None, writable=True)
    assert source is not None
    assert target is not None
    cpu.scale(source, target, 0.75, 0, None)
    for found, array in zip(targets, wanted, strict=True):
        assert_same_bits(found, array, nan_payload=False)
        # What lies before and after is not written.
        assert not found.base[: -len(found) - 1].any()
        assert not found.base[-1]


# ---- every value of the small dtypes ----


@pytest.mark.parametrize("name", [name for name in NARROW if DTYPES[name].itemsize < 4])
def test_every_value_is_scaled_to_the_nearest(name: str) -> None:
    every = cases.every_code(DTYPES[name])
    for factor in (0.7, 0.75, 1 / 3, 2.0**-9, 1 - 2.0**-24, 2.0**-130, 1e-310):
        case = Case([every], ["contiguous"], factor, use_norm=1.0)
        expected = expected_of(case)
        for kernel in KERNELS:
            with machine(kernel):
                check(case, expected)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", [name for name in NARROW if DTYPES[name].itemsize < 4])
def test_every_value_is_measured(name: str) -> None:
    every = cases.every_code(DTYPES[name])
    for value in every if every.size == 256 else every[::97]:
        assert_norm(gradclip.global_norm([np.array([value])]), oracle.norm([np.array([value])])[1])
    with np.errstate(invalid="ignore"):
        finite = every[np.isfinite(every)]
    assert_norm(gradclip.global_norm([finite]), oracle.norm([finite])[1])


# ---- lists made to break something ----


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_norms_on_and_beside_a_midpoint_of_two_numbers(name: str) -> None:
    rng = seeded(name)
    for leaves in cases.near_midpoints(rng, DTYPES[name], 20):
        expected = oracle.norm(leaves)[1]
        assert_norm(gradclip.global_norm(leaves), expected)
        assert_norm(gradclip.global_norm([leaf[::-1] for leaf in leaves]), expected)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_norms_that_are_exact_ties_go_to_even(name: str) -> None:
    for leaves in cases.exact_ties(seeded(name), DTYPES[name], 100):
        check_at_limits(leaves)


@pytest.mark.slow
@pytest.mark.parametrize("name", DTYPES)
def test_constants_whose_norm_sits_on_a_boundary(name: str) -> None:
    for leaves in cases.constants_on_boundaries(DTYPES[name]):
        check_at_limits(leaves)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_one_huge_number_among_many_small_ones(name: str) -> None:
    dtype = DTYPES[name]
    info = cases.ml_dtypes.finfo(cases.real_dtype(dtype))
    for small in (info.smallest_subnormal, info.smallest_normal, 1):
        values = np.full(9001, small).astype(dtype)
        values[4097] = info.max
        check(Case([values], ["contiguous"], float(info.max) / 2))


def check_the_exact_sum(leaves: list[Any]) -> None:
    """Every bit of the sum of squares, and of the norm."""
    wanted = oracle.square_sum([x for leaf in leaves for x in oracle.parts(leaf)])
    assert survey(leaves).square == wanted << oracle.UNIT - exact.UNIT
    assert_norm(gradclip.global_norm(leaves), oracle.norm(leaves)[1])


def check_every_spread(name: str) -> None:
    """Blocks whose exponents spread over more and more binades, with all bits of significands."""
    dtype = DTYPES[name]
    info = cases.ml_dtypes.finfo(dtype)
    lowest = round(math.log2(float(info.smallest_subnormal)))
    highest = math.floor(math.log2(float(info.max)))
    rng = seeded(name)
    most = highest - lowest
    for spread in [*range(min(most, 60)), *range(60, most, 97), most]:
        top = int(rng.integers(lowest + spread, highest + 1))
        values = np.ldexp(1.0 + rng.random(12) / 2, top - spread).astype(dtype)
        values[3] = math.ldexp(1.5, top) if top < highest else info.max
        check_the_exact_sum([values])


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_every_spread_of_exponents_in_one_block(name: str) -> None:
    check_every_spread(name)


def test_every_power_of_two_of_float64(kernel: str) -> None:
    mantissa = 1 + np.arange(7) * 0.1234567890123456
    for exponent in range(-1080, 1024, 9 if kernel == "numpy" else 3):
        with np.errstate(under="ignore"):
            values = np.ldexp(mantissa, exponent)
        check_the_exact_sum([values])


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize(
    "name", some_quick(["float32", "complex128"], ["float16", "float64", "complex64"])
)
def test_memory_layouts_longer_than_a_block(name: str, layout: str) -> None:
    values = cases.numbers(seeded(name + layout), DTYPES[name], 5001).reshape(3, 1667)
    if layout == "broadcast":
        values[...] = values[:1]
    check(Case([values, values[:1]], [layout, "contiguous"], 1e-3))


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=0, min_side=0),
    ),
    st.floats(min_value=0, exclude_min=True, allow_nan=False),
)
def test_any_array_and_limit(values: Any, clip_norm: float) -> None:
    check(Case([values], ["contiguous"], clip_norm))


# ---- order, nesting, pieces ----


def short_lists(name: str, count: int) -> Iterator[list[Any]]:
    rng = seeded(f"pieces {name}")
    for _ in range(count):
        yield [cases.numbers(rng, dtype, int(rng.integers(40))) for dtype in 4 * dtypes_of(name)]


@pytest.mark.parametrize("name", ["float16", "float32", "float64", "mixed"])
def test_neither_order_nor_nesting_changes_a_bit(name: str) -> None:
    rng = seeded(name)
    for leaves in short_lists(name, 30):
        norm = oracle.norm(leaves)[1]
        shuffled = [rng.permutation(leaves[i]) for i in rng.permutation(len(leaves))]
        flat = [leaf[i : i + 1] for leaf in leaves for i in range(len(leaf))]
        nested = {"a": (leaves[0], [None, *leaves[2:]]), "b": {"c": leaves[1]}}
        kept = [np.zeros(0, leaf.dtype) for leaf in leaves]
        for nest in (shuffled, nested, [*kept, *flat]):
            assert_norm(gradclip.global_norm(nest), norm)
        clipped, _ = gradclip.clip_by_global_norm(leaves, 1e-3)
        nested_clipped, _ = gradclip.clip_by_global_norm(nested, 1e-3)
        for one, other in zip(clipped[2:], nested_clipped["a"][1][1:], strict=True):
            assert_same_bits(one, other, nan_payload=True)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", ["float16", "float32", "float64", "mixed"])
def test_surveys_of_pieces_add_up_to_that_of_the_whole(name: str) -> None:
    rng = seeded(name)
    for leaves in short_lists(name, 10):
        whole = survey(leaves)
        pieces = [piece for leaf in leaves for piece in np.array_split(leaf, rng.integers(1, 4))]
        merged = together(survey([pieces[i]]) for i in rng.permutation(len(pieces)))
        assert whole[1:] == merged[1:]
        assert merged.norm == backend.hold(leaves, str, writable=False).measure()
        check_the_exact_sum(leaves)


def check_every_length() -> None:
    """Of less than a vector, of a few, and of one and a half of the longest step of a loop."""
    for dtype in (DTYPES[name] for name in ("float16", "bfloat16", "float32", "float64")):
        work = np.float64 if dtype == np.float64 else np.float32
        for length in range(200):
            whole = [(-1) ** place * (place % 13) for place in range(length)]
            values = np.array(whole, dtype)
            squares = sum(each * each for each in whole)
            assert survey([values]).square == squares << 2176
            assert_norm(gradclip.global_norm([values]), work(math.sqrt(squares)))
            found, _ = gradclip.clip_by_global_norm([values], 0.7, use_norm=1.0)
            with np.errstate(under="ignore"):
                wanted = (values.astype(work) * work(0.7)).astype(dtype)
            assert_same_bits(found[0], wanted, nan_payload=True)


@pytest.mark.usefixtures("kernel")
def test_lists_of_every_length() -> None:
    check_every_length()


def check_a_survey_of_what_is_not_finite() -> None:
    found = survey(
        [np.float32([-7, np.inf, 2]), np.complex128([np.nan, 3 + 2j, np.inf]), np.float16([])]
    )
    assert found.largest == 7
    assert found.nonfinite == (1, 2)
    assert found.wide
    # Blocks in a row whose largest differ in the last place, and so in the lower half alone.
    near = np.array([1, np.nextafter(1, 2), 1]).repeat(5000)
    assert survey([near]).largest == np.nextafter(1, 2)


@pytest.mark.usefixtures("kernel")
def test_a_survey_knows_the_largest_number_and_what_is_not_finite() -> None:
    check_a_survey_of_what_is_not_finite()


@pytest.mark.usefixtures("kernel")
def test_a_decision_for_the_whole_is_carried_out_piece_by_piece() -> None:
    leaves = [np.float32([3, 0]), np.float64([4])]
    whole = together(survey([leaf]) for leaf in leaves)
    for leaf in leaves:
        act_([leaf], Scale(exact.Scaled(0.5, whole.norm.exponent - 3)))
    assert [leaf.tolist() for leaf in leaves] == [[1.5, 0], [2]]


def test_totals_of_many_workers_merge_without_a_carry_lost() -> None:
    most = survey([np.full(4096, np.float32(3.4e38))]).total
    assert (exact.merge([most] * 5000) == 5000 * most).all()
    assert exact.square(most * 2**30) == exact.square(most) << 30


def test_views_of_one_memory_count_alike_on_every_kernel() -> None:
    def outcome(kernel: str) -> tuple[float, bytes]:
        base = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
        with machine(kernel):
            norm = gradclip.clip_by_global_norm_([base, base.T, base.reshape(-1)], 1.0)
        return float(norm), base.tobytes()

    assert len({outcome(kernel) for kernel in KERNELS}) == 1


# ---- the certificate ----


class Spy:
    """Record what `certified_norm` returns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.returned: list[Any] = []
        monkeypatch.setattr(host_leaves, "certified_norm", self)

    def __call__(self, parts: Any) -> Any:
        self.returned.append(exact.certified_norm(parts))
        return self.returned[-1]


def beyond_doubt(name: str) -> Iterator[list[Any]]:
    """Lists whose norm lies within 2^-45 of a midpoint, so that no float64 sum can tell."""
    yield from cases.near_midpoints(seeded(name), DTYPES[name], 30, closeness=0)
    if name != "float16":
        yield from cases.near_midpoints(seeded(name), DTYPES[name], 30)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_a_list_that_defeats_the_certificate_gets_the_exact_sum(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    for leaves in beyond_doubt(name):
        assert_norm(gradclip.global_norm(leaves), oracle.norm(leaves)[1])
    assert len(spy.returned) >= 90
    assert set(spy.returned) == {None}


def test_the_certificate_holds_for_most_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    rng = seeded("most")
    for _ in range(500):
        gradclip.global_norm([rng.standard_normal(50).astype(np.float32)])
    assert None not in spy.returned


@settings(max_examples=300, deadline=None)
@given(hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)))
def test_a_certified_norm_is_the_exact_one(values: Any) -> None:
    held = backend.hold([values], str, writable=False)
    certified = exact.certified_norm(cpu.sum_squares(held.memory))
    norm = exact.norm(held.total()[0], exact.FLOAT32)
    assert certified is None or repr(certified) == repr(norm)


def blocks_hard_to_add() -> Iterator[Any]:
    """Squares whose float64 sum loses as much as it can."""
    rng = seeded("blocks")
    half_ulp = np.full(3 * 65536 + 5, 2.0**-27 * (1 - 2.0**-20), np.float32)
    half_ulp[::4096] = 1
    yield half_ulp
    yield half_ulp[::-1].copy()
    yield np.exp2(rng.uniform(-140, 127, 200_000)).astype(np.float32)
    yield np.sort(np.exp2(rng.uniform(-30, 30, 100_000))).astype(np.float32)
    yield np.full(4096 * 20, 1.1, np.float32)
    yield rng.standard_normal(100_000).astype(np.float16)


def many_leaves() -> list[Any]:
    """A block for each number: what each adds to the sum is lost but for its low part."""
    values = np.full(20_001, 2.0**-27, np.float32)
    values[0] = 1
    return np.split(values, values.size)


def check_the_bound(leaves: list[Any]) -> None:
    """The float64 sum of squares errs by at most 4112 * 2^-53 of it."""
    held = backend.hold(leaves, str, writable=False)
    sums = [x for high, low, *_ in cpu.sum_squares(held.memory) for x in (high, low)]
    found = sum(Fraction(x) for x in sums)
    unit = Fraction(2) ** oracle.UNIT
    exact = unit * oracle.square_sum([x for leaf in leaves for x in oracle.parts(leaf)])
    assert abs(found - exact) <= 4112 * exact / 2**53


@pytest.mark.usefixtures("threads")
def test_the_float64_sum_keeps_to_its_bound() -> None:
    for values in blocks_hard_to_add():
        check_the_bound([values])
    check_the_bound(many_leaves())
