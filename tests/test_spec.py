"""The rows of SPEC.md, sections 1 to 6, but for those that `test_bits` and `test_process` hold."""

from __future__ import annotations

import collections
import fractions
import inspect
import math
import operator
import re
import signal
import tracemalloc
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import scipy
from scipy import sparse

import cases
import gradclip
import oracle
from cases import DTYPES, WIDE, Case
from compare import (
    assert_leaves,
    assert_norm,
    assert_same_bits,
    assert_untouched,
    check,
    check_in_place,
    codes,
    expected_of,
)
from conftest import Adapter, simple
from gradclip import IndexedSlices, clip_by_global_norm, clip_by_global_norm_, global_norm
from gradclip.kernels import cpu
from host import (
    HAS_MXCSR,
    ROUNDING_MODES,
    flush_to_zero,
    mxcsr,
    rounding,
    rounding_mode,
    run_python,
)
from machines import machine

ACCEPTED = "gradclip clips float16, bfloat16, float8, float32, float64 and complex arrays"


def raises(error: type[Exception], text: str) -> Any:
    """The error with exactly this text."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def three_four() -> list[Any]:
    return [np.float32([3]), np.float32([4])]


# ---- 1. public functions ----


def test_signatures() -> None:
    tail = "*, on_nonfinite: 'OnNonfinite' = 'nan', group: 'Any' = None"
    limits = "t_list: 'Any', clip_norm: 'Any', use_norm: 'Any' = None"
    wanted = {
        clip_by_global_norm: f"({limits}, name: 'str | None' = None, {tail}) -> 'tuple[Any, Any]'",
        clip_by_global_norm_: f"({limits}, {tail}) -> 'Any'",
        global_norm: (
            "(t_list: 'Any', name: 'str | None' = None, *, group: 'Any' = None) -> 'Any'"
        ),
    }
    for function, signature in wanted.items():
        assert str(inspect.signature(function)) == signature
    assert IndexedSlices._fields == ("values", "indices", "dense_shape")
    assert IndexedSlices._field_defaults == {"dense_shape": None}


def test_the_public_names() -> None:
    assert set(gradclip.__all__) == {
        "IndexedSlices",
        "Norms",
        "Record",
        "clip_by_global_norm",
        "clip_by_global_norm_",
        "global_norm",
        "limits",
        "norms",
    }
    assert all(hasattr(gradclip, name) for name in gradclip.__all__)


def test_a_name_changes_nothing() -> None:
    clipped, norm = clip_by_global_norm(three_four(), 2.5, name="clip")
    assert (clipped[0], clipped[1], norm) == (1.5, 2, 5)
    assert global_norm(three_four(), "norm") == 5


@pytest.mark.parametrize("function", [clip_by_global_norm, clip_by_global_norm_])
def test_a_group_is_refused_not_ignored(function: Any) -> None:
    text = "group is 'x'; for these leaves it is a communicator of mpi4py"
    with raises(TypeError, text):
        function(three_four(), 1.0, group="x")
    with raises(TypeError, text):
        global_norm(three_four(), group="x")


def test_the_reference_examples() -> None:
    t_list = [np.array([1, 2, 3, 4.0]), np.array([5, 6, 7, 8.0])]
    clipped, norm = clip_by_global_norm(t_list, clip_norm=0.8, use_norm=1.0)
    assert norm == 1.0
    assert np.round(clipped, 12).tolist() == [[0.8, 1.6, 2.4, 3.2], [4.0, 4.8, 5.6, 6.4]]
    clipped, norm = clip_by_global_norm(t_list, clip_norm=0.8)
    assert norm == 14.2828568570857
    assert np.round(clipped, 8).tolist() == [
        [0.0560112, 0.11202241, 0.16803361, 0.22404481],
        [0.28005602, 0.33606722, 0.39207842, 0.44808963],
    ]


# ---- every backend and variant ----


@pytest.mark.parametrize("clip_norm", [2.5, 5.0, 7.0, math.inf])
def test_the_triangle_in_every_backend(xp: Adapter, clip_norm: float) -> None:
    values = [np.float32([[3, 0], [0, 0]]), np.float32([[0, 0], [0, 4]])]
    wanted = expected_of(Case(values, ["contiguous"] * 2, clip_norm))
    leaves = list(map(xp.make, values))
    clipped, norm = xp.clip(leaves, clip_norm)
    assert_norm(xp.norm(norm), wanted.norm)
    assert_leaves(list(map(xp.read, clipped)), wanted)
    assert [type(new) for new in clipped] == [xp.new_type(old) for old in leaves]
    assert_untouched(list(map(xp.read, leaves)), values)
    if xp.writable:
        assert_norm(xp.norm(clip_by_global_norm_(leaves, clip_norm)), wanted.norm)
        assert_leaves(list(map(xp.read, leaves)), wanted)
    else:
        with pytest.raises((TypeError, ValueError), match="clip_by_global_norm returns new "):
            clip_by_global_norm_(leaves, clip_norm)


@pytest.mark.parametrize("on_nonfinite", ["nan", "zero", "keep"])
def test_policies_in_every_backend(xp: Adapter, on_nonfinite: str) -> None:
    values = [np.float32([[1, np.inf], [2, 3]]), np.float32([[1, 2], [3, 4]])]
    wanted = expected_of(Case(values, ["contiguous"] * 2, 1.0, on_nonfinite=on_nonfinite))
    clipped, norm = xp.clip(list(map(xp.make, values)), 1.0, on_nonfinite=on_nonfinite)
    assert_norm(xp.norm(norm), wanted.norm)
    assert_leaves(list(map(xp.read, clipped)), wanted)


def test_random_lists_in_every_backend(xp: Adapter) -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        values = [rng.standard_normal((3, 4)).astype(np.float32) for _ in range(3)]
        wanted = expected_of(Case(values, ["contiguous"] * 3, 1.0))
        clipped, norm = xp.clip(list(map(xp.make, values)), 1.0)
        assert_norm(xp.norm(norm), wanted.norm)
        assert_leaves(list(map(xp.read, clipped)), wanted)


# ---- 2. the number ----


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", DTYPES)
def test_the_norm_is_float64_with_a_wide_leaf_else_float32(name: str) -> None:
    for count in (0, 2):
        leaves = [np.zeros(1, np.float16), np.zeros(count, DTYPES[name])]
        wanted = np.float64 if name in WIDE else np.float32
        assert type(global_norm(leaves)) is wanted
        assert type(clip_by_global_norm(leaves, 1.0)[1]) is wanted
        assert type(clip_by_global_norm(leaves, 1.0, 3.0)[1]) is wanted
        assert type(clip_by_global_norm_(leaves, 1.0)) is wanted


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("values", "norm"),
    [
        (np.float32([1e30, 1e30]), 1.41421356e30),
        (np.float16([300, 300]), 424.26407),
        (np.float32([1e-30] * 3), 1.7320508e-30),
        (np.float64([1e200, 1e200]), 1.414213562373095e200),
        (np.float64([5e-324] * 4), 1e-323),
        (np.float32([1e-45] * 4), 2.8e-45),
        (np.float32([1e20, 1e20]), 1.41421356e20),
    ],
)
def test_nothing_finite_overflows_or_underflows(values: Any, norm: float) -> None:
    with np.errstate(all="raise"):
        assert global_norm([values]) == type(global_norm([values]))(norm)
        check(simple(values, clip_norm=norm / 3))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_a_norm_too_large_for_its_type_is_inf_but_scales_rightly(dtype: Any) -> None:
    largest = ml_dtypes.finfo(dtype).max
    values = np.array([largest] * 5 + [1], dtype)
    assert np.isinf(global_norm([values]))
    for on_nonfinite in ("nan", "raise", "zero", "keep"):
        for clip_norm in (float(largest), 1.0, 5e-324, math.inf):
            check(simple(values, clip_norm=clip_norm, on_nonfinite=on_nonfinite))
    clipped, norm = clip_by_global_norm([np.array([largest] * 4, dtype)], float(largest))
    assert np.isinf(norm)
    assert (clipped[0] == np.array(float(largest) / 2).astype(dtype)).all()


@pytest.mark.usefixtures("kernel")
def test_a_limit_beyond_float32_is_held_against_the_norm_without_its_limit() -> None:
    values = np.full(4, 3e38, np.float32)
    for clip_norm in (5e38, 7e38, 6e38):
        check(simple(values, clip_norm=clip_norm))
    clipped, norm = clip_by_global_norm([values], 7e38)
    assert np.isinf(norm)
    assert (clipped[0] == values).all()


@pytest.mark.usefixtures("kernel")
def test_a_factor_below_the_float_range_still_scales_rightly() -> None:
    clipped, _ = clip_by_global_norm([np.float32([1e30, 1e30])], 1e-20)
    assert (np.abs(clipped[0] / np.float32(7.0710678e-21) - 1) < 1e-6).all()
    check(simple(np.float32([1e30, 1e30]), clip_norm=1e-20))
    check(simple(np.float64([1e300, 1e-300]), clip_norm=1e-320))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("empty", [[], (), {}, None, [None], {"a": None, "b": [None]}])
def test_no_leaves_have_the_norm_zero(empty: Any) -> None:
    clipped, norm = clip_by_global_norm(empty, 1.0)
    assert clipped == empty
    for found in (norm, global_norm(empty), clip_by_global_norm_(empty, 1.0)):
        assert_norm(found, np.float32(0))


@pytest.mark.usefixtures("kernel")
def test_leaves_without_elements_count_nothing() -> None:
    leaves = [np.zeros((0, 3), np.float32), np.float32([3, 4]), np.zeros((2, 0))]
    clipped, norm = clip_by_global_norm(leaves, 2.5)
    assert_norm(norm, np.float64(5))
    assert [array.shape for array in clipped] == [(0, 3), (2,), (2, 0)]
    assert clipped[1].tolist() == [1.5, 2]


# ---- 3. the factor and the elements ----


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", DTYPES)
def test_with_nothing_to_clip_outputs_are_bit_identical(name: str) -> None:
    dtype = DTYPES[name]
    values = np.random.default_rng(3).integers(0, 256, 64 * dtype.itemsize, np.uint8).view(dtype)
    check(simple(values, clip_norm=math.inf, on_nonfinite="keep"))
    check(simple(values, clip_norm=1.0, use_norm=1.0))


@pytest.mark.usefixtures("kernel")
def test_a_norm_equal_to_the_limit_is_not_clipped_and_one_ulp_above_it_is() -> None:
    values = np.float64([3, 4])
    below = math.nextafter(5, 0)
    assert clip_by_global_norm([values], 5)[0][0].tolist() == [3, 4]
    assert clip_by_global_norm([values], below)[0][0].tolist() == [
        3 * (below / 5),
        4 * (below / 5),
    ]


def test_the_factor_of_narrow_leaves_is_rounded_to_float32_and_of_wide_ones_not() -> None:
    third = 1 / 3
    narrow, wide = clip_by_global_norm([np.float32([1]), np.float64([1])], third, 1.0)[0]
    assert narrow[0] == np.float32(third)
    assert wide[0] == third


def test_a_narrow_element_is_rounded_to_float32_first() -> None:
    """These come out otherwise where the exact product is rounded to half precision at once."""
    pairs = [(1113, 0.94474393), (1083, 0.7901662), (1593, 0.81010675), (1571, 0.9863144)]
    for number, limit in pairs:
        factor = np.float32(limit)
        values = np.float16([number])
        (new,), _ = clip_by_global_norm([values], float(factor), 1.0)
        integer, exponent = oracle.split(float(factor))
        once = oracle.round_to((number * integer, exponent), oracle.FORMATS["float16"])
        assert new[0] == np.float16(np.float32(number) * factor)
        assert new[0] != oracle.as_float(once)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "fortran", "transposed", "strided", "broadcast"])
def test_dtype_shape_and_memory_order_are_kept(name: str, layout: str) -> None:
    leaf = cases.lay_out(np.ones((2, 3, 4), DTYPES[name]), layout)
    for limit, policy in ((0.5, "nan"), (math.inf, "nan"), (1.0, "zero")):
        norm = math.nan if policy == "zero" else None
        (new,), _ = clip_by_global_norm([leaf], limit, norm, on_nonfinite=policy)
        assert (new.dtype, new.shape) == (leaf.dtype, leaf.shape)
        assert np.argsort(new.strides).tolist() == np.argsort(np.empty_like(leaf).strides).tolist()
        assert new.flags.owndata
        assert new.flags.writeable


def test_a_list_is_never_modified() -> None:
    leaves = [np.float32([3, 4]), None, {"a": np.float64([1])}]
    same = list(leaves)
    before = leaves[0].copy()
    clipped, _ = clip_by_global_norm(leaves, 1.0)
    assert clipped is not leaves
    assert all(a is b for a, b in zip(leaves, same, strict=True))
    assert (leaves[0] == before).all()
    assert leaves[2].keys() == {"a"}


def test_outputs_share_no_memory_with_inputs_even_where_nothing_is_clipped() -> None:
    leaves = [np.float32([3, 4]), np.float64(5), np.zeros((0, 2))]
    for limit in (1.0, math.inf):
        clipped, _ = clip_by_global_norm(leaves, limit)
        assert not any(map(np.shares_memory, clipped, leaves))


PROTECTED = """
    import ctypes, mmap
    import numpy as np
    import gradclip

    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * page)
    leaf = np.frombuffer(memory, np.{dtype})
    leaf[:] = 1
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), 3 * page, mmap.PROT_READ) == 0
    assert leaf.flags.writeable
    gradclip.clip_by_global_norm_([leaf], {clip_norm}, {use_norm}, on_nonfinite={policy!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64"])
@pytest.mark.parametrize(
    ("clip_norm", "use_norm", "policy"),
    [(1e6, None, "nan"), ("np.inf", None, "nan"), (1.0, 0.5, "nan"), (1.0, "np.nan", "keep")],
)
def test_with_nothing_to_clip_in_place_no_page_is_written(
    dtype: str, clip_norm: Any, use_norm: Any, policy: str
) -> None:
    code = PROTECTED.format(dtype=dtype, clip_norm=clip_norm, use_norm=use_norm, policy=policy)
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_write_to_the_protected_page_would_have_been_seen() -> None:
    code = PROTECTED.format(dtype="float32", clip_norm=1.0, use_norm=None, policy="nan")
    assert run_python(code).returncode == -signal.SIGSEGV


# ---- the limits ----

REAL_NUMBERS = [
    2.5,
    fractions.Fraction(5, 2),
    np.array(2.5),
    np.float16(2.5),
    np.float32(2.5),
    np.longdouble(2.5),
    ml_dtypes.bfloat16(2.5),
    np.array(2.5, ">f8"),
]


@pytest.mark.parametrize("limit", REAL_NUMBERS, ids=repr)
def test_a_limit_is_any_real_scalar(limit: Any) -> None:
    clipped, norm = clip_by_global_norm(three_four(), limit)
    assert (clipped[0], clipped[1], norm) == (1.5, 2, 5)
    clipped, norm = clip_by_global_norm(three_four(), 1.25, limit)
    assert (clipped[0], clipped[1], norm) == (1.5, 2, 2.5)


@pytest.mark.parametrize("limit", [2, np.int64(2), np.array(2), np.uint8(2)], ids=repr)
def test_a_limit_may_be_an_integer(limit: Any) -> None:
    assert clip_by_global_norm(three_four(), limit)[0] == [np.float32(1.2), np.float32(1.6)]
    assert clip_by_global_norm(three_four(), 1, limit)[0] == [1.5, 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "jax", "tensorflow"])
def test_a_limit_may_be_a_scalar_of_another_framework(
    name: str, framework: Callable[[str], Any]
) -> None:
    module = framework(name)
    path = {"torch": "tensor", "jax": "numpy.asarray", "tensorflow": "constant"}[name]
    make = operator.attrgetter(path)(module)
    assert clip_by_global_norm(three_four(), make(2.5))[0] == [1.5, 2]
    assert clip_by_global_norm(three_four(), 2.5, make(5.0))[0] == [1.5, 2]
    for wrong in (True, 1j):
        with raises(TypeError, f"clip_norm is {make(wrong)!r}; it must be a real number"):
            clip_by_global_norm(three_four(), make(wrong))
    vector = make([1.0])
    with raises(ValueError, f"clip_norm is {vector!r} of shape (1,); it must be a scalar"):
        clip_by_global_norm(three_four(), vector)


@pytest.mark.parametrize("limit", [math.inf, np.float32(np.inf), np.array(np.inf)], ids=repr)
def test_an_infinite_limit_only_measures(limit: Any) -> None:
    clipped, norm = clip_by_global_norm(three_four(), limit)
    assert (clipped[0], clipped[1], norm) == (3, 4, 5)


ABOVE_ZERO = "it must be above 0 (inf: only measure)"
NO_REAL_NUMBER = [
    1j,
    True,
    np.bool_(True),
    "1",
    b"1",
    [1.0],
    (),
    np.complex64(1),
    np.array(True),
    np.array("1"),
    np.array(None),
    np.datetime64(1, "s"),
]
NO_SCALARS = [np.array([1.0]), np.ones((1, 1)), np.array([])]


WRONG_LIMITS = [
    *[(x, TypeError, f"{x!r}; it must be a real number") for x in NO_REAL_NUMBER],
    *[(x, ValueError, f"{x!r} of shape {x.shape}; it must be a scalar") for x in NO_SCALARS],
    (10**400, ValueError, f"{10**400}; it must fit a float64"),
]


@pytest.mark.parametrize("function", [clip_by_global_norm, clip_by_global_norm_])
@pytest.mark.parametrize(
    ("limit", "error", "text"),
    [*WRONG_LIMITS, (None, TypeError, "None; it must be a real number")],
    ids=lambda x: repr(x)[:40],
)
def test_a_wrong_clip_norm(limit: Any, error: Any, text: str, function: Any) -> None:
    leaves = three_four()
    with raises(error, f"clip_norm is {text}"):
        function(leaves, limit)
    assert_untouched(leaves, three_four())


@pytest.mark.parametrize("function", [clip_by_global_norm, clip_by_global_norm_])
@pytest.mark.parametrize(("limit", "error", "text"), WRONG_LIMITS, ids=lambda x: repr(x)[:40])
def test_a_wrong_use_norm(limit: Any, error: Any, text: str, function: Any) -> None:
    leaves = three_four()
    with raises(error, f"use_norm is {text}"):
        function(leaves, 1.0, limit)
    assert_untouched(leaves, three_four())


@pytest.mark.parametrize(
    "limit",
    [0, -1, 0.0, -0.0, -5e-324, math.nan, -math.inf, np.float32(0), np.array(-1.0)],
    ids=repr,
)
@pytest.mark.parametrize("function", [clip_by_global_norm, clip_by_global_norm_])
def test_a_clip_norm_that_is_not_above_zero(limit: Any, function: Any) -> None:
    leaves = three_four()
    with raises(ValueError, f"clip_norm is {limit!r}; {ABOVE_ZERO}"):
        function(leaves, limit)
    assert_untouched(leaves, three_four())


@pytest.mark.parametrize("norm", [-1, -5e-324, -math.inf, np.float32(-2)], ids=repr)
def test_a_use_norm_below_zero(norm: Any) -> None:
    with raises(ValueError, f"use_norm is {norm!r}; a norm is never negative"):
        clip_by_global_norm(three_four(), 1.0, norm)


def test_an_integer_with_thousands_of_digits_is_a_value_error_that_names_the_limit() -> None:
    with pytest.raises(ValueError, match=r"^clip_norm is .*; it must fit a float64$"):
        clip_by_global_norm(three_four(), 10**5000)


@pytest.mark.parametrize(
    "policy", ["NaN", "", None, 1, [], True, np.array(["nan", "zero"])], ids=repr
)
def test_an_unknown_policy(policy: Any) -> None:
    text = f"on_nonfinite is {policy!r}; it must be one of 'nan', 'raise', 'zero', 'keep'"
    for function in (clip_by_global_norm, clip_by_global_norm_):
        with raises(ValueError, text):
            function(three_four(), 1.0, on_nonfinite=policy)


def test_a_use_norm_is_returned_in_the_norms_dtype_and_scaled_by_in_full() -> None:
    norm = 3.1
    narrow, returned = clip_by_global_norm([np.float32([1])], 0.7, norm)
    assert_norm(returned, np.float32(norm))
    assert narrow[0][0] == np.float32(0.7 / norm)
    wide, returned = clip_by_global_norm([np.float64([1])], 0.7, norm)
    assert_norm(returned, np.float64(norm))
    assert wide[0][0] == 0.7 / norm
    huge = clip_by_global_norm([np.float32([1e38])], 1.0, 1e39)
    assert_norm(huge[1], np.float32(np.inf))
    check(simple(np.float32([1e38]), clip_norm=1.0, use_norm=1e39))


def test_with_use_norm_the_leaves_are_not_read_for_it() -> None:
    values = np.float32([np.nan, np.inf, -np.inf, 2])
    check(simple(values, clip_norm=1.0, use_norm=2.0))
    check(simple(values, clip_norm=1.0, use_norm=1.0))
    clipped, norm = clip_by_global_norm([values], 1.0, 2.0)
    assert norm == 2
    assert codes(clipped[0])[1:].tolist() == codes(np.float32([np.inf, -np.inf, 1])).tolist()


# ---- 4. NaN and inf ----

NONFINITE = [name for name in DTYPES if np.isnan(np.array(np.nan).astype(DTYPES[name]))]
HAS_INF = [name for name in NONFINITE if np.isinf(np.array(np.inf).astype(DTYPES[name]))]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("policy", ["nan", "raise", "zero", "keep"])
@pytest.mark.parametrize("name", NONFINITE)
def test_what_becomes_of_nan(name: str, policy: str) -> None:
    values = [np.ones(5).astype(DTYPES[name]), np.arange(4).astype(DTYPES[name])]
    values[0][2] = np.nan
    for clip_norm in (1.0, math.inf):
        check(simple(*values, clip_norm=clip_norm, on_nonfinite=policy))
    assert np.isnan(global_norm(values))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("policy", ["nan", "raise", "zero", "keep"])
@pytest.mark.parametrize("name", HAS_INF)
def test_what_becomes_of_inf(name: str, policy: str) -> None:
    values = [np.arange(4).astype(DTYPES[name]), np.ones(5).astype(DTYPES[name])]
    values[1][4] = -np.inf
    for clip_norm in (1.0, math.inf):
        check(simple(*values, clip_norm=clip_norm, on_nonfinite=policy))
    assert global_norm(values) == math.inf
    values[0][0] = np.nan
    assert np.isnan(global_norm(values))


@pytest.mark.parametrize("policy", ["nan", "raise", "zero", "keep"])
@pytest.mark.parametrize("use_norm", [math.nan, math.inf])
@pytest.mark.parametrize("name", DTYPES)
def test_the_same_policies_for_a_given_norm(name: str, use_norm: float, policy: str) -> None:
    values = np.arange(4).astype(DTYPES[name])
    for clip_norm in (1.0, math.inf):
        check(simple(values, clip_norm=clip_norm, use_norm=use_norm, on_nonfinite=policy))


def test_raise_names_each_offending_leaf_with_its_counts() -> None:
    leaves = {
        "body": [np.float32([1, np.nan, np.inf, np.nan]), np.float32([1])],
        "head": (np.array([1, np.inf], ml_dtypes.bfloat16), None),
        "tail": np.array([np.nan + 1j, complex(np.inf, np.nan)]),
    }
    text = (
        "the global norm is nan: t_list['body'][0] holds 2 NaN and 1 inf; "
        "t_list['head'][0] holds 0 NaN and 1 inf; t_list['tail'] holds 2 NaN and 1 inf"
    )
    for function in (clip_by_global_norm, clip_by_global_norm_):
        with raises(FloatingPointError, text):
            function(leaves, 1.0, on_nonfinite="raise")


def test_raise_for_sparse_leaves_names_them_too() -> None:
    leaves = [
        IndexedSlices(np.float32([[np.inf], [1]]), np.array([0, 1])),
        sparse.csr_array(np.float64([[0, np.nan], [1, 0]])),
    ]
    text = (
        "the global norm is nan: t_list[0] holds 0 NaN and 1 inf; t_list[1] holds 1 NaN and 0 inf"
    )
    with raises(FloatingPointError, text):
        clip_by_global_norm(leaves, 1.0, on_nonfinite="raise")


def test_raise_where_rows_of_one_index_add_up_to_what_is_not_finite() -> None:
    leaves = [IndexedSlices(np.float64([[1.7e308], [1.7e308]]), np.array([0, 0]))]
    clipped, norm = clip_by_global_norm(leaves, 1.0, on_nonfinite="zero")
    assert norm == math.inf
    assert clipped[0].values.tolist() == [[0], [0]]


def test_raise_for_a_given_norm() -> None:
    text = "the global norm is inf: given as use_norm, every leaf is finite"
    with raises(FloatingPointError, text):
        clip_by_global_norm(three_four(), 1.0, math.inf, on_nonfinite="raise")
    text = "the global norm is inf: t_list[0] holds 1 NaN and 0 inf"
    with raises(FloatingPointError, text):
        clip_by_global_norm([np.float32([np.nan])], 1.0, math.inf, on_nonfinite="raise")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_a_signalling_nan_is_a_nan_like_others(name: str) -> None:
    bits = {"float16": 0x7D00, "bfloat16": 0x7FA0, "float32": 0x7FA00000, "float64": 0x7FF4 << 48}
    dtype = DTYPES[name]
    values = np.array([bits[name], 0], f"u{dtype.itemsize}").view(dtype)
    assert np.isnan(global_norm([values]))
    text = "the global norm is nan: t_list[0] holds 1 NaN and 0 inf"
    with raises(FloatingPointError, text):
        clip_by_global_norm([values], 1.0, on_nonfinite="raise")
    check_in_place(
        simple(values, on_nonfinite="keep"), expected_of(simple(values, on_nonfinite="keep"))
    )
    check_in_place(simple(values), expected_of(simple(values)))


# ---- 5. what goes in, what comes out ----


class Pair(NamedTuple):
    first: Any
    second: Any


def doubled_back(nest: Any) -> list[Any]:
    """The leaves of a nest that has been clipped to half its norm, times two."""
    return [float(2 * leaf[0]) for leaf in nest if leaf is not None]


def test_containers_come_back_as_they_went_in() -> None:
    a, b = three_four()
    nests: list[tuple[Any, Callable[[Any], list[Any]]]] = [
        ([a, b], list),
        ((a, b), list),
        (Pair(a, b), list),
        ({"z": a, "y": b}, lambda nest: [nest["z"], nest["y"]]),
        (collections.OrderedDict(z=a, y=b), lambda nest: [nest["z"], nest["y"]]),
        (collections.defaultdict(list, z=a, y=b), lambda nest: [nest["z"], nest["y"]]),
        (collections.deque([a, b], maxlen=5), list),
        ([None, a, b, None], lambda nest: nest[1:3]),
    ]
    for nest, leaves in nests:
        clipped, norm = clip_by_global_norm(nest, 2.5)
        assert norm == 5
        assert type(clipped) is type(nest)
        assert doubled_back(leaves(clipped)) == [3, 4]
        assert len(clipped) == len(nest)
        if isinstance(nest, dict):
            assert list(clipped) == list(nest)
    assert clip_by_global_norm(nests[5][0], 1.0)[0].default_factory is list
    assert clip_by_global_norm(nests[6][0], 1.0)[0].maxlen == 5
    assert clip_by_global_norm(nests[7][0], 1.0)[0][::3] == [None, None]


def test_nests_of_nests() -> None:
    a, b = three_four()
    nest = {"body": [Pair(a, None), ()], "head": ({}, [[b]])}
    clipped, norm = clip_by_global_norm(nest, 2.5)
    assert norm == 5
    assert clipped == {"body": [Pair(1.5, None), ()], "head": ({}, [[2]])}
    assert clip_by_global_norm_(nest, 2.5) == 5
    assert nest == clipped


@pytest.mark.parametrize(
    "make",
    [
        iter,
        lambda leaves: (leaf for leaf in leaves),
        lambda leaves: dict(enumerate(leaves)).values(),
    ],
    ids=["iterator", "generator", "values of a dict"],
)
def test_an_iterator_is_read_once_into_a_list(make: Any) -> None:
    clipped, norm = clip_by_global_norm(make(three_four()), 2.5)
    assert norm == 5
    assert clipped == [1.5, 2]
    assert type(clipped) is list
    assert global_norm(make(three_four())) == 5
    leaves = three_four()
    assert clip_by_global_norm_(make(leaves), 2.5) == 5
    assert leaves == [1.5, 2]


def test_a_bare_array_is_a_nest_of_one_leaf() -> None:
    array = np.float32([3, 4])
    clipped, norm = clip_by_global_norm(array, 2.5)
    assert norm == 5
    assert type(clipped) is np.ndarray
    assert clipped.tolist() == [1.5, 2]
    assert clip_by_global_norm_(array, 2.5) == 5
    assert array.tolist() == [1.5, 2]


@pytest.mark.parametrize("name", DTYPES)
def test_numpy_scalars_are_leaves(name: str) -> None:
    scalar = DTYPES[name].type(4)
    clipped, norm = clip_by_global_norm(scalar, 2.0)
    assert norm == 4
    assert type(clipped) is type(scalar)
    assert clipped == 2
    (clipped,), _ = clip_by_global_norm([scalar], math.inf)
    assert type(clipped) is type(scalar)
    assert clipped == 4
    text = "t_list[0] is a NumPy scalar, which cannot be written in place"
    with raises(ValueError, text):
        clip_by_global_norm_([scalar], 2.0)


NOT_CLIPPED = [
    (np.arange(3), "int64"),
    (np.array([True]), "bool"),
    (np.array(["a"]), "<U1"),
    (np.array([b"a"]), "|S1"),
    (np.array([None]), "object"),
    (np.array([1], ">i4"), ">i4"),
    (np.array([1], "M8[s]"), "datetime64[s]"),
    (np.zeros(2, [("a", "f4")]), "[('a', '<f4')]"),
    (np.longdouble([1]), str(np.dtype(np.longdouble))),
    (np.clongdouble([1]), str(np.dtype(np.clongdouble))),
    *(
        (np.zeros(1, getattr(ml_dtypes, name)), name)
        for name in ("float8_e8m0fnu", "float4_e2m1fn", "int4")
        if hasattr(ml_dtypes, name)  # two of them since 0.5
    ),
    (np.int64(3), "int64"),
    (np.bool_(True), "bool"),
    (sparse.csr_array(np.eye(2, dtype=int)), "int64"),
    (IndexedSlices(np.array([[1]]), np.array([0])), "int64"),
]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("leaf", "dtype"), NOT_CLIPPED, ids=[text for _, text in NOT_CLIPPED])
def test_other_dtypes_are_named_with_their_path(leaf: Any, dtype: str) -> None:
    for function in (clip_by_global_norm, clip_by_global_norm_):
        with raises(TypeError, f"t_list['head'][1] is {dtype}; {ACCEPTED}"):
            function({"head": [np.float32([1]), leaf]}, 1.0)
    with raises(TypeError, f"t_list is {dtype}; {ACCEPTED}"):
        global_norm(leaf)


EVERY_LEAF = (
    "every leaf must be an array of cupy or jax or numpy or tensorflow or torch or toyarrays"
)


@pytest.mark.parametrize(
    "leaf", [3, 3.0, "abc", object(), range(3), {1, 2}], ids=lambda x: type(x).__name__
)
def test_what_is_no_array_is_named_with_its_path(leaf: Any) -> None:
    text = f"is {type(leaf).__name__}; {EVERY_LEAF}"
    for function in (clip_by_global_norm, clip_by_global_norm_):
        with raises(TypeError, f"t_list[0][1] {text}"):
            function([[np.float32([1]), leaf]], 1.0)
    with raises(TypeError, f"t_list {text}"):
        global_norm(leaf)


def test_a_generator_within_a_nest_is_no_array() -> None:
    with raises(TypeError, f"t_list[1] is generator; {EVERY_LEAF}"):
        global_norm([np.float32([1]), (x for x in three_four())])


def test_a_masked_array_is_refused_with_the_way_out() -> None:
    masked = np.ma.array([1.0, 2.0], mask=[True, False])
    for leaf in (masked, IndexedSlices(masked, np.array([0, 1]))):
        with raises(TypeError, "t_list[0] is a masked array; fill it first: array.filled(0)"):
            global_norm([leaf])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "jax", "tensorflow"])
def test_leaves_of_two_frameworks(name: str, framework: Callable[[str], Any]) -> None:
    module = framework(name)
    path = {"torch": "ones", "jax": "numpy.ones", "tensorflow": "ones"}[name]
    other = operator.attrgetter(path)(module)((2,))
    leaves = [np.float32([3]), other]
    with pytest.raises(TypeError) as caught:
        clip_by_global_norm(leaves, 1.0)
    text = str(caught.value)
    assert text.startswith("t_list[")
    assert "numpy" in text
    assert type(other).__name__ in text or name in text


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_subclasses_of_numpy_arrays_are_read_as_arrays(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "leaf", np.float32, "w+", shape=(2,))
    mapped[:] = 3, 4
    assert global_norm([mapped]) == 5
    assert clip_by_global_norm([mapped], 2.5)[0][0].tolist() == [1.5, 2]
    assert clip_by_global_norm_([mapped], 2.5) == 5
    assert mapped.tolist() == [1.5, 2]
    assert global_norm([np.matrix([[3.0, 4.0]])]) == 5


READ_ONLY = "is read-only; clip_by_global_norm returns new arrays instead"


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", DTYPES)
def test_read_only_arrays_work_but_not_in_place(name: str) -> None:
    leaf = cases.lay_out(np.ones(4, DTYPES[name]), "readonly")
    assert clip_by_global_norm([leaf], 1.0)[1] == 2
    with raises(ValueError, f"t_list['a'] {READ_ONLY}"):
        clip_by_global_norm_({"a": leaf}, 1.0)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", DTYPES)
def test_arrays_that_overlap_themselves_work_but_not_in_place(name: str) -> None:
    room = np.ones(8, DTYPES[name])
    size = room.itemsize
    for shape, strides in (((4,), (0,)), ((2, 2), (size, size)), ((2, 3), (2 * size, size))):
        raw = np.lib.stride_tricks.as_strided(room.view(f"V{size}"), shape, strides)
        leaf = raw.view(room.dtype)
        assert clip_by_global_norm([leaf], 1.0)[1] == oracle.norm([leaf])[1]
        text = (
            f"t_list[1] has elements that share memory (strides {strides}); "
            "clip_by_global_norm returns new arrays instead"
        )
        with raises(ValueError, text):
            clip_by_global_norm_([np.float32([1]), leaf], 1.0)


@pytest.mark.usefixtures("kernel")
def test_strides_that_never_come_to_bear_do_not_overlap() -> None:
    room = np.ones(8, np.float32)
    one = np.lib.stride_tricks.as_strided(room, (1, 4), (0, 4))
    none = np.lib.stride_tricks.as_strided(room, (0, 4), (0, 0))
    assert clip_by_global_norm_([one, none], 1.0) == 2
    assert room.tolist() == [0.5] * 4 + [1] * 4


BAD_LEAVES: list[tuple[Any, type[Exception]]] = [
    (np.arange(3), TypeError),
    (3.0, TypeError),
    (np.ma.array([1.0]), TypeError),
    (cases.lay_out(np.ones(3, np.float32), "readonly"), ValueError),
    (np.broadcast_to(np.float32(1), (3,)), ValueError),
    (np.float32(1), ValueError),
    (IndexedSlices(np.ones((1, 2), np.float32), np.array([-1])), ValueError),
    (sparse.lil_array(np.eye(2)), TypeError),
]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("bad", "error"), BAD_LEAVES, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("use_norm", [None, 2.0])
def test_after_an_error_nothing_has_changed(bad: Any, error: Any, use_norm: float | None) -> None:
    values = [np.full(5, 9, dtype) for dtype in DTYPES.values()]
    leaves = [array.copy() for array in values]
    with pytest.raises(error):
        clip_by_global_norm_([*leaves, bad], 1.0, use_norm)
    assert_untouched(leaves, values)


def test_after_a_wrong_number_of_threads_nothing_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for wrong in ("0", "-1", "two", "1.5", ""):
        monkeypatch.setenv("GRADCLIP_NUM_THREADS", wrong)
        leaves = three_four()
        text = f"GRADCLIP_NUM_THREADS is {wrong!r}; it must be a number above 0"
        with raises(ValueError, text):
            clip_by_global_norm_(leaves, 1.0, 5.0)
        assert leaves == three_four()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", DTYPES)
def test_an_array_listed_twice_counts_once_and_is_scaled_once_in_place(name: str) -> None:
    leaf = np.array([3, 4]).astype(DTYPES[name])
    other = leaf.copy()
    assert clip_by_global_norm_([leaf, leaf, {"again": leaf}], 2.5) == 5
    assert leaf.astype(np.complex128).tolist() == [1.5, 2]
    assert clip_by_global_norm([other, other], math.inf)[1] > 7


@pytest.mark.parametrize(
    "make",
    [
        lambda values: IndexedSlices(values.reshape(-1, 1), np.array([0, 1])),
        lambda values: IndexedSlices(values.reshape(-1, 1), np.array([1, 1])),
        sparse.coo_array,
        sparse.csr_matrix,
        lambda values: sparse.dia_array(values.reshape(1, -1)),
    ],
    ids=["slices", "slices with one index twice", "coo", "csr", "dia"],
)
def test_a_sparse_leaf_listed_twice_counts_once_in_place(make: Any) -> None:
    leaf = make(np.float32([3, 4]))
    alone = global_norm([leaf])
    assert_norm(clip_by_global_norm_([leaf, leaf], 1.0), alone)
    once = make(np.float32([3, 4]))
    clip_by_global_norm_([once], 1.0)
    assert_same_bits(oracle.stored(leaf), oracle.stored(once), nan_payload=True)


def test_the_first_use_of_the_fallback_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_cpu", None)
    monkeypatch.setattr(cpu, "_why_numpy", "was not built")
    monkeypatch.setattr(cpu, "_warned", False)
    text = (
        "gradclip's C kernel was not built, so NumPy or XLA does its work: the same bits, slower. "
        "Install gradclip again where a C compiler is found, without CFLAGS: "
        "`pip install --force-reinstall --no-cache-dir -v .` in its checkout shows what it says."
    )
    with pytest.warns(RuntimeWarning, match=f"^{re.escape(text)}$") as warned:
        assert global_norm(three_four()) == 5
    assert len(warned) == 1
    assert global_norm(three_four()) == 5
    assert cpu.kernel() == "numpy"


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", DTYPES)
def test_numpys_own_error_settings_change_nothing(name: str) -> None:
    rng = np.random.default_rng(7)
    drawn = [cases.random_case(rng, [DTYPES[name]]) for _ in range(30)]
    expected = [expected_of(case) for case in drawn]
    for case, wanted in zip(drawn, expected, strict=True):
        leaves = [cases.lay_out(values, "contiguous") for values in case.values]
        options = {"on_nonfinite": "zero" if case.on_nonfinite == "raise" else case.on_nonfinite}
        with np.errstate(all="raise"):
            clipped, norm = clip_by_global_norm(leaves, case.clip_norm, case.use_norm, **options)
            clip_by_global_norm_(leaves, case.clip_norm, case.use_norm, **options)
        assert_norm(norm, wanted.norm)
        if wanted.leaves is not None:
            assert_leaves(clipped, wanted)
            assert_leaves(leaves, wanted)


# ---- the host's floating-point settings ----


def delicate() -> list[tuple[Case, Any]]:
    """Cases full of subnormals and of roundings, with what the oracle says in a sane host."""
    rng = np.random.default_rng(11)
    drawn = []
    for dtype in DTYPES.values():
        tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
        subnormal = (rng.integers(-9, 9, 40) * tiny).astype(dtype)
        normal = rng.standard_normal(50).astype(dtype)
        drawn.append(simple(subnormal, normal, clip_norm=0.7))
        drawn.append(simple(subnormal, clip_norm=5 * tiny))
        drawn.append(simple(normal, clip_norm=4 * tiny))
        drawn.append(simple(subnormal, clip_norm=0.3, use_norm=1.0))
    return [(case, expected_of(case)) for case in drawn]


def outcomes(case: Case) -> tuple[Any, list[Any], Any, list[Any], Any]:
    """All that one case gives, with as little arithmetic of our own as can be."""
    leaves = [values.copy() for values in case.values]
    options = (case.clip_norm, case.use_norm)
    clipped, norm = clip_by_global_norm(case.values, *options)
    in_place = clip_by_global_norm_(leaves, *options)
    return norm, clipped, in_place, leaves, global_norm(case.values)


def assert_outcomes(found: Any, case: Case, wanted: Any) -> None:
    norm, clipped, in_place, leaves, measured = found
    for value in (norm, in_place, *([measured] if case.use_norm is None else [])):
        assert_norm(value, wanted.norm)
    assert_leaves(clipped, wanted)
    assert_leaves(leaves, wanted)


@pytest.mark.skipif(not HAS_MXCSR, reason="only x86-64 Linux: the layout of fenv_t is known")
def test_a_host_that_flushes_subnormals_changes_nothing_and_is_left_so(kernel: str) -> None:
    tiny = np.float64([5e-324, 5e-324])
    prepared = delicate()
    for number_of_threads in (1, 2):
        with machine(kernel, number_of_threads):
            for case, wanted in prepared:
                with flush_to_zero():
                    flushed = tiny[0] + tiny[1] == 0
                    before = mxcsr()
                    found = outcomes(case)
                    after = mxcsr()
                assert flushed
                assert after == before
                assert_outcomes(found, case, wanted)


@pytest.mark.skipif(not HAS_MXCSR, reason="only x86-64 Linux: the layout of fenv_t is known")
def test_threads_started_by_a_host_that_flushes_subnormals_keep_them() -> None:
    """In a process that has none yet: to forget those of this one is for a forked child alone."""
    done = run_python("import test_spec; test_spec.check_started_threads()")
    assert not done.returncode, done.stderr


def check_started_threads() -> None:
    values = np.full(4 * 65536 + 3, 1e-45, np.float32)
    case = simple(values, clip_norm=1e-44)
    wanted = expected_of(case)
    for more_threads_than_before in range(2, 6):
        before = len(cpu._cpu.helpers())
        with machine(cpu.kernel(), more_threads_than_before):
            with flush_to_zero():
                found = outcomes(case)
            assert_outcomes(found, case, wanted)
        assert len(cpu._cpu.helpers()) > before


@pytest.mark.slow
def test_torchs_flush_denormal_changes_nothing(framework: Callable[[str], Any]) -> None:
    torch = framework("torch")
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot flush denormals on this processor")
    torch.set_flush_denormal(False)
    for case, wanted in delicate():
        torch.set_flush_denormal(True)
        try:
            before = mxcsr()
            found = outcomes(case)
            after = mxcsr()
        finally:
            torch.set_flush_denormal(False)
        assert after == before
        assert_outcomes(found, case, wanted)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("mode", ROUNDING_MODES)
def test_a_host_that_rounds_another_way_changes_nothing_and_is_left_so(mode: str) -> None:
    for case, wanted in delicate():
        with rounding_mode(ROUNDING_MODES[mode]):
            found = outcomes(case)
            after = rounding()
        assert after == ROUNDING_MODES[mode]
        assert_outcomes(found, case, wanted)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_MXCSR, reason="only x86-64 Linux: the layout of fenv_t is known")
def test_no_kernel_leaves_the_x87_registers_in_use() -> None:
    """GCC may spill into MMX registers, after which the host's long doubles are NaN."""
    code = """
        import test_spec
        from host import x87_tags
        from machines import KERNELS, machine
        import numpy as np
        for kernel in KERNELS:
            for case, _ in test_spec.delicate():
                for threads in (1, 2):
                    with machine(kernel, threads):
                        test_spec.outcomes(case)
                assert x87_tags() == 0xFFFF, (kernel, [values.dtype for values in case.values])
        assert np.longdouble(1) / 4 == 0.25
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not HAS_MXCSR, reason="only x86-64 Linux: the layout of fenv_t is known")
def test_an_error_leaves_the_hosts_settings_as_they_were() -> None:
    for function in (
        clip_by_global_norm,
        clip_by_global_norm_,
        lambda leaves, _: global_norm(leaves),
    ):
        with flush_to_zero():
            before = mxcsr()
            with pytest.raises(TypeError):
                function([np.arange(3)], 1.0)
            after = mxcsr()
        assert after == before


# ---- 6. sparse leaves ----


def with_duplicates(dtype: Any) -> IndexedSlices:
    """Rows three of which share an index, and cancel in part."""
    values = np.array([[1.5, -2], [8, 1], [1.5, 2], [-1, 1e-3]]).astype(dtype)
    return IndexedSlices(values, np.array([7, 2, 7, 7]), (9, 2))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", DTYPES)
def test_rows_with_one_index_are_added_first(name: str) -> None:
    slices = with_duplicates(DTYPES[name])
    dense = np.zeros((9, 2), np.complex128)
    np.add.at(dense, slices.indices, slices.values.astype(np.complex128))
    wide = np.float64 if name in WIDE else np.float32
    found = global_norm([slices])
    assert_norm(found, oracle.norm([slices])[1])
    assert abs(found - np.linalg.norm(dense)) <= np.finfo(wide).eps * found
    assert found != oracle.norm([slices.values])[1]


def check_sparse(leaf: Any, clip_norm: float, **options: Any) -> None:
    """A sparse leaf beside a dense one, both ways, against the oracle."""
    wanted = oracle.clip([leaf], clip_norm, **options)
    before = oracle.stored(leaf).copy()
    (new,), norm = clip_by_global_norm([leaf], clip_norm, **options)
    assert_norm(norm, wanted.norm)
    assert_same_bits(oracle.stored(new), wanted.leaves[0], nan_payload=wanted.kept)
    assert_same_bits(oracle.stored(leaf), before, nan_payload=True)
    assert_alike(new, leaf)
    if getattr(leaf, "format", "slices") not in ("lil", "dok"):
        written = leaf._replace(values=before) if isinstance(leaf, IndexedSlices) else leaf.copy()
        assert_norm(clip_by_global_norm_([written], clip_norm, **options), wanted.norm)
        assert_same_bits(oracle.stored(written), wanted.leaves[0], nan_payload=wanted.kept)
        assert_alike(written, leaf)


def assert_alike(new: Any, old: Any) -> None:
    """Everything but the values."""
    assert type(new) is type(old)
    if isinstance(old, IndexedSlices):
        assert new.indices is old.indices
        assert new.dense_shape is old.dense_shape
        return
    assert (new.shape, new.dtype, new.format) == (old.shape, old.dtype, old.format)
    for name in ("indices", "indptr", "row", "col", "offsets", "blocksize"):
        if hasattr(old, name):
            a, b = np.asarray(getattr(new, name)), np.asarray(getattr(old, name))
            assert a.dtype == b.dtype
            assert (a == b).all()


@pytest.mark.parametrize("name", DTYPES)
def test_slices_with_an_index_twice_are_scaled_row_by_row(name: str) -> None:
    for clip_norm in (0.7, 1e-3, math.inf):
        check_sparse(with_duplicates(DTYPES[name]), clip_norm)
        check_sparse(with_duplicates(DTYPES[name]), clip_norm, use_norm=3.0)


def test_random_slices() -> None:
    rng = np.random.default_rng(13)
    for i in range(300):
        dtype = list(DTYPES.values())[i % len(DTYPES)]
        count, width = int(rng.integers(0, 12)), int(rng.integers(0, 4))
        values = cases.numbers(rng, dtype, count * width).reshape(count, width)
        index_dtype = rng.choice(["i8", "i4", "u8", "u1", ">i2"])
        indices = rng.integers(0, rng.integers(1, 20), count).astype(index_dtype)
        check_sparse(IndexedSlices(values, indices), float(rng.random()) + 1e-3)


def test_sums_of_rows_are_rounded_to_float64_in_their_order() -> None:
    column = np.float64([1, 2.0**-53, 2.0**-53, 2.0**-53])
    for order in ([0, 1, 2, 3], [1, 2, 3, 0], [3, 0, 1, 2]):
        slices = IndexedSlices(column[order], np.zeros(4, int))
        assert_norm(global_norm([slices]), oracle.norm([slices])[1])


def test_rows_that_cancel_leave_a_norm_of_zero_and_come_back_as_they_were() -> None:
    slices = IndexedSlices(np.float32([1e30, -1e30]), np.array([4, 4]))
    (new,), norm = clip_by_global_norm([slices], 1e-6)
    assert_norm(norm, np.float32(0))
    assert (new.values == slices.values).all()


def test_slices_as_tensorflow_measures_them_would_be_too_small() -> None:
    rng = np.random.default_rng(0)
    words = np.minimum(rng.zipf(1.3, 20_000), 1000)
    slices = IndexedSlices(np.ones((words.size, 2), np.float32), words)
    counts = np.bincount(words).astype(float)
    assert_norm(global_norm([slices]), np.float32(math.sqrt(2 * (counts**2).sum())))
    assert global_norm([slices]) > 20 * global_norm([slices.values])


FORMATS = ["bsr", "coo", "csc", "csr", "dia", "dok", "lil"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
@pytest.mark.parametrize("kind", ["array", "matrix"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_scipy(name: str, kind: str, dtype: Any) -> None:
    make = getattr(sparse, f"{name}_{kind}")
    dense = (np.arange(24).reshape(4, 6) % 5 - 2).astype(dtype)
    for clip_norm in (1.25, math.inf):
        check_sparse(make(dense), clip_norm)
    (new,), norm = clip_by_global_norm([make(dense)], 1.25)
    assert_norm(norm, oracle.norm([dense])[1])
    assert_same_bits(
        np.asarray(new.toarray()),
        expected_of(simple(dense, clip_norm=1.25)).leaves[0],
        nan_payload=True,
    )


@pytest.mark.parametrize("policy", ["nan", "zero", "keep"])
@pytest.mark.parametrize("name", FORMATS)
def test_policies_for_every_format_of_scipy(name: str, policy: str) -> None:
    leaf = getattr(sparse, f"{name}_array")(np.float32([[1, 0, np.inf], [0, 2, 0]]))
    check_sparse(leaf, 1.0, on_nonfinite=policy)


@pytest.mark.parametrize("name", ["lil", "dok"])
@pytest.mark.parametrize("kind", ["array", "matrix"])
def test_formats_without_an_array_of_values_are_refused_in_place(name: str, kind: str) -> None:
    leaf = getattr(sparse, f"{name}_{kind}")(np.eye(2))
    text = (
        f"t_list[0] is a {name}_{kind}, which cannot be scaled in place; "
        "convert it with .tocsr(), or use clip_by_global_norm"
    )
    with raises(TypeError, text):
        clip_by_global_norm_([leaf], 1.0)


def duplicated(name: str) -> Any:
    """A sparse array that stores some places more than once."""
    values, rows, cols = np.float32([1, 2, 4, 8, -3]), [0, 2, 0, 1, 0], [1, 1, 1, 0, 1]
    if name == "coo":
        return sparse.coo_array((values, (rows, cols)), (3, 2))
    compressed = {"csr": sparse.csr_array, "csc": sparse.csc_array}[name]
    return compressed((values, [1, 1, 1, 0, 1], [0, 3, 4, 5]), (3, 2) if name == "csr" else (2, 3))


@pytest.mark.parametrize("name", ["coo", "csr", "csc"])
def test_places_stored_twice_are_added_first(name: str) -> None:
    leaf = duplicated(name)
    assert leaf.nnz == 5
    assert_norm(global_norm([leaf]), np.float32(np.sqrt((leaf.toarray() ** 2).sum())))
    check_sparse(leaf, 1.0)
    assert not leaf.has_canonical_format


def test_bsr_blocks_stored_twice_are_added_first() -> None:
    blocks = np.float64([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    leaf = sparse.bsr_array((blocks, [0, 0], [0, 2]), (2, 4))
    assert_norm(global_norm([leaf]), np.float64(math.sqrt(36 + 64 + 100 + 144)))
    check_sparse(leaf, 1.0)


def test_what_dia_stores_outside_of_the_matrix_does_not_count() -> None:
    leaf = sparse.dia_array((np.float64([[100, 3, 0], [4, 100, 100]]), [1, -2]), (3, 3))
    assert global_norm([leaf]) == 5
    check_sparse(leaf, 2.5)
    leaf.data[0, 0] = np.nan
    assert global_norm([leaf]) == 5


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (name, shape)
        for name in FORMATS
        for shape in [(0, 5), (5, 0), (0, 0), (3, 4)]
        if name != "bsr" or shape == (3, 4)  # scipy makes no other
    ],
)
def test_sparse_leaves_that_store_nothing(name: str, shape: tuple[int, int]) -> None:
    leaf = getattr(sparse, f"{name}_array")(shape, dtype=np.float32)
    (new,), norm = clip_by_global_norm([leaf], 1.0)
    assert_norm(norm, np.float32(0))
    assert_alike(new, leaf)


def test_sparse_arrays_of_one_dimension() -> None:
    line = sparse.coo_array((np.float32([3, 2, 2]), ([5, 1, 1],)), (9,))
    assert global_norm([line]) == 5
    check_sparse(line, 2.5)


SINCE_1_15 = pytest.mark.skipif(
    np.lib.NumpyVersion(scipy.__version__) < "1.15.0",
    reason="SciPy has them since 1.15: rows of one dimension, and arrays of three",
)


@SINCE_1_15
def test_sparse_arrays_of_three_dimensions_and_rows_of_one() -> None:
    cube = sparse.coo_array((np.float64([3, 2, 2]), ([0, 1, 1], [1, 2, 2], [3, 0, 0])), (2, 3, 4))
    assert global_norm([cube]) == 5
    check_sparse(cube, 2.5)
    check_sparse(sparse.csr_array(np.float32([3, 0, 4])), 2.5)


def test_a_shape_beyond_64_bits_is_no_trouble() -> None:
    rows = np.array([2**40, 5, 2**40])
    leaf = sparse.coo_array((np.float64([1, 4, 2]), (rows, rows)), (2**41, 2**41))
    assert global_norm([leaf]) == 5
    check_sparse(leaf, 2.5)


@pytest.mark.parametrize("function", [clip_by_global_norm, clip_by_global_norm_, global_norm])
def test_sparse_leaves_are_never_made_dense(function: Any) -> None:
    size = 10**6
    rows = np.arange(0, size, 1000)
    leaf: Any = sparse.coo_array((np.ones(1000, np.float32), (rows, rows)), (size, size))
    slices = IndexedSlices(np.ones((1000, 4), np.float32), rows, (10**12, 4))
    limits = () if function is global_norm else (1.0,)
    for leaves, most in (([leaf], 2e6), ([slices], 2e6), ([leaf.tocsr()], 4e7)):
        function(leaves, *limits)
        tracemalloc.start()
        try:
            function(leaves, *limits)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < most


VALUES = np.ones((2, 3), np.float32)
WRONG_SLICES = [
    (
        IndexedSlices(VALUES, np.array([0, -1]), (5, 3)),
        "t_list['e'].indices holds -1; no row has a negative index",
    ),
    (
        IndexedSlices(VALUES, np.array([5, 0]), (5, 3)),
        "t_list['e'].indices holds 5; dense_shape has 5 rows",
    ),
    (
        IndexedSlices(VALUES, np.array([0, 1.0])),
        "t_list['e'].indices is float64; indices are integers",
    ),
    (
        IndexedSlices(VALUES, np.array([True, False])),
        "t_list['e'].indices is bool; indices are integers",
    ),
    (
        IndexedSlices(VALUES, np.array([0, 1, 2])),
        (
            "t_list['e'] has indices of shape (3,) and values of shape (2, 3); "
            "each row of values needs one index"
        ),
    ),
    (
        IndexedSlices(VALUES, np.array([[0, 1]])),
        (
            "t_list['e'] has indices of shape (1, 2) and values of shape (2, 3); "
            "each row of values needs one index"
        ),
    ),
    (
        IndexedSlices(np.array(1.0), np.array([0])),
        (
            "t_list['e'] has indices of shape (1,) and values of shape (); "
            "each row of values needs one index"
        ),
    ),
    (
        IndexedSlices(VALUES, np.array([0, 1]), (5, 4)),
        (
            "t_list['e'] has dense_shape (5, 4) and values of shape (2, 3); "
            "they must agree after the first dimension"
        ),
    ),
    (
        IndexedSlices(VALUES, np.array([0, 1]), ()),
        "t_list['e'].dense_shape is (); it must be None or a tuple of lengths",
    ),
]


@pytest.mark.parametrize(("slices", "text"), WRONG_SLICES, ids=[text for _, text in WRONG_SLICES])
def test_slices_that_do_not_fit(slices: IndexedSlices, text: str) -> None:
    for function in (clip_by_global_norm, clip_by_global_norm_):
        with raises(ValueError, text):
            function({"e": slices}, 1.0)


def test_a_negative_index_is_out_of_range_of_an_unknown_shape_too() -> None:
    slices = IndexedSlices(VALUES, np.array([0, -1]))
    with raises(ValueError, "t_list[0].indices holds -1; no row has a negative index"):
        global_norm([slices])


@pytest.mark.parametrize("dense_shape", [5, (None, 3), "ab", (5.5, 3)], ids=repr)
def test_a_dense_shape_that_is_no_shape(dense_shape: Any) -> None:
    text = f"t_list[0].dense_shape is {dense_shape!r}; it must be None or a tuple of lengths"
    with raises(ValueError, text):
        global_norm([IndexedSlices(VALUES, np.array([0, 1]), dense_shape)])


@pytest.mark.parametrize("values", [sparse.csr_array(VALUES), np.float32(1)], ids=type)
def test_slices_of_other_than_arrays(values: Any) -> None:
    text = f"t_list[0].values is {type(values).__name__}; it must be an array"
    with raises(TypeError, text):
        global_norm([IndexedSlices(values, np.array([0]))])


@pytest.mark.parametrize("values", [[[1.0]], None, with_duplicates(np.float32)])
def test_slices_of_what_is_no_array(values: Any) -> None:
    text = f"t_list[0] is {type(values).__name__}; {EVERY_LEAF}"
    with raises(TypeError, text):
        global_norm([IndexedSlices(values, np.array([0]))])


@pytest.mark.parametrize("name", ["coo", "csr", "csc", "bsr"])
def test_an_index_out_of_range_of_a_scipy_array(name: str) -> None:
    leaf = getattr(sparse, f"{name}_array")(np.eye(4, dtype=np.float32))
    if name == "coo":
        leaf.coords[1][2] = 9
    else:
        leaf.indices[2] = 9
    axis = 0 if name == "csc" else 1
    text = f"t_list[1] has an index out of range on axis {axis} of length 4"
    for function in (clip_by_global_norm, clip_by_global_norm_):
        with raises(ValueError, text):
            function([np.float32([1]), leaf], 1.0)


def test_what_is_of_scipy_and_no_array() -> None:
    operator = sparse.linalg.aslinearoperator(np.eye(2))
    for function in (clip_by_global_norm, clip_by_global_norm_):
        with raises(TypeError, f"t_list[0] is {type(operator).__name__}; {ACCEPTED}"):
            function([operator], 1.0)


@pytest.mark.usefixtures("kernel")
def test_sparse_and_dense_leaves_in_one_list() -> None:
    dense = np.full(16, 1.0, np.float32)
    leaves = [dense, duplicated("csr"), with_duplicates(np.float16), None]
    wanted = oracle.clip(leaves[:3], 1.0)
    clipped, norm = clip_by_global_norm(leaves, 1.0)
    assert_norm(norm, wanted.norm)
    assert_leaves(list(map(oracle.stored, clipped[:3])), wanted)
    assert clipped[3] is None
