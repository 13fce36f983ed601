"""CuPy: against the oracle and NumPy's backend, on the device or, without one, on the host."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cases
import gradclip
import oracle
from cases import DTYPES, Case
from compare import assert_leaves, assert_norm, assert_same_bits, expected_of
from conftest import lacks, some_quick
from gradclip import (
    IndexedSlices,
    clip_by_global_norm,
    clip_by_global_norm_,
    global_norm,
    limits,
)
from gradclip._clip import act_, survey
from gradclip.core.decide import Fill, Scale
from gradclip.core.exact import Scaled
from gradclip.core.held import Clip
from host import run_python

if reason := lacks("cupy", "triton"):
    pytest.skip(reason, allow_module_level=True)

import cupy

import host_cupy
from gradclip.cupy import backend
from gradclip.cupy import gpu as kernels
from gradclip.kernels.gpu.launch import Reserve
from host_cupy import lay_out, make, read

NAMES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]

LEARNING: list[Any] = [
    limits.ZScore(2.0, 0.9, 3, beyond="skip"),
    limits.Percentile(60, 3),
    limits.Average(1.1, 0.9, 2),
    limits.PerTensor(limits.Average(1.1, 0.9, 2)),
]

pytestmark = pytest.mark.usefixtures("on_cupy")

only_without_a_device = pytest.mark.skipif(
    host_cupy.HAS_DEVICE, reason="there is a device: nothing stands in for it"
)


def raises(error: type[Exception], text: str) -> Any:
    """The error with exactly this text."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def some_named(*some: str) -> list[Any]:
    """Every dtype; what takes the interpreter long only for some in `make test`."""
    return [pytest.param(name, marks=[pytest.mark.long] * (name not in some)) for name in NAMES]


def random_cases(names: list[str], count: int) -> list[Case]:
    rng = np.random.default_rng(len(names) + count)
    found = [cases.random_case(rng, [DTYPES[name] for name in names]) for _ in range(count)]
    return [
        case._replace(layouts=[str(rng.choice(_layouts(values))) for values in case.values])
        for case in found
        if case.values
    ]


def _layouts(values: Any) -> list[str]:
    constant = values.ndim and values.size and len({row.tobytes() for row in values}) == 1
    return [each for each in host_cupy.LAYOUTS if each != "broadcast" or constant]


def build(case: Case, *, writable: bool = False) -> list[Any]:
    return [
        lay_out(values, "contiguous" if writable and layout == "broadcast" else layout)
        for values, layout in zip(case.values, case.layouts, strict=True)
    ]


# ---- the numbers ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        NAMES,
        NAMES[:3],
        *(
            pytest.param([name], marks=pytest.mark.long)
            for name in ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
        ),
    ],
    ids="-".join,
)
def test_random_lists(names: list[str]) -> None:
    wide = any(DTYPES[name] in (np.float64, np.complex128) for name in names)
    for case in random_cases(names, 4 if wide else 12):  # of wide ones the sum is always exact
        wanted = expected_of(case)
        options: dict[str, Any] = {"use_norm": case.use_norm, "on_nonfinite": case.on_nonfinite}
        leaves, written = build(case), build(case, writable=True)
        if wanted.leaves is None:
            for function, given in ((clip_by_global_norm, leaves), (clip_by_global_norm_, written)):
                with pytest.raises(FloatingPointError, match="the global norm is"):
                    function(given, case.clip_norm, **options)
            assert_all_as(written, case.values)
        else:
            clipped, norm = clip_by_global_norm(leaves, case.clip_norm, **options)
            assert_norm(read(norm)[()], wanted.norm)
            assert_leaves(list(map(read, clipped)), wanted)
            norm = clip_by_global_norm_(written, case.clip_norm, **options)
            assert_norm(read(norm)[()], wanted.norm)
            assert_leaves(list(map(read, written)), wanted)
        assert_all_as(leaves, case.values)
        if case.use_norm is None:
            assert_norm(read(global_norm(leaves))[()], wanted.norm)


def assert_all_as(leaves: list[Any], values: list[Any]) -> None:
    for leaf, old in zip(leaves, values, strict=True):
        assert_same_bits(read(leaf), old, nan_payload=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "bfloat16",
        "float64",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("float16", "float32")),
    ],
)
def test_norms_near_the_middle_of_two_numbers(name: str) -> None:
    for leaves in cases.near_midpoints(np.random.default_rng(3), DTYPES[name], 4):
        assert_norm(read(global_norm(list(map(make, leaves))))[()], oracle.norm(leaves)[1])


@pytest.mark.parametrize("name", some_quick(NAMES[:1], NAMES[1:]))
def test_as_numpy_s_backend_to_the_bit(name: str) -> None:
    rng = np.random.default_rng(7)
    dtype = DTYPES[name]
    values = [rng.standard_normal(n).astype(dtype) for n in (1, 5000, 4096, 700, 0, 17)]
    clipped, norm = clip_by_global_norm(list(map(make, values)), 0.3)
    wanted, wanted_norm = clip_by_global_norm(values, 0.3)
    assert_norm(read(norm)[()], wanted_norm)
    for new, old in zip(clipped, wanted, strict=True):
        assert_same_bits(read(new), old, nan_payload=True)


# ---- limits ----


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_limits_on_the_device_are_not_read_by_the_host(
    dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, given = make(np.array(0.7, dtype)), make(np.array(3.1, dtype))
    for place in ("gradclip._clip", "gradclip.core.held"):
        for name in ("check_clip_norm", "check_use_norm"):
            monkeypatch.setattr(f"{place}.{name}", None)
    values = np.float64([3, 4])
    (new,), norm = clip_by_global_norm([make(values)], limit, given)
    wanted = expected_of(Case([values], [""], float(dtype(0.7)), float(dtype(3.1))))
    assert_norm(read(norm)[()], wanted.norm)
    assert_leaves([read(new)], wanted)
    for wrong, value in ((math.nan, math.nan), (-1.0, 0.0)):
        (new,), _ = clip_by_global_norm([make(values)], make(np.array(wrong, dtype)))
        assert_same_bits(read(new), np.full(2, value), nan_payload=False)


def test_a_limit_is_checked_where_it_is_read() -> None:
    leaf = make(np.float32([3, 4]))
    for limit in (2.5, np.float32(2.5), np.array(2.5)):
        assert read(clip_by_global_norm([leaf], limit)[0][0]).tolist() == [1.5, 2]
    with raises(ValueError, "clip_norm is 0; it must be above 0 (inf: only measure)"):
        clip_by_global_norm_([leaf], 0)
    with raises(ValueError, "use_norm is -1; a norm is never negative"):
        clip_by_global_norm_([leaf], 1, -1)
    assert read(leaf).tolist() == [3, 4]


@pytest.mark.parametrize("kind", LEARNING, ids=repr)
def test_a_limit_that_learns_goes_on_where_the_arrays_are(kind: Any) -> None:
    one, other = copy.deepcopy(kind), copy.deepcopy(kind)
    for number, norm in enumerate((3.0, 4.0, 3.5, 50.0, math.nan, 0.0, 2.0, 60.0)):
        values = [np.float32([0.6 * norm, 0]), np.float32([[0.8 * norm]])]
        leaves = list(map(make, values))
        if number % 2:
            found = clip_by_global_norm_(leaves, one)
        else:
            leaves, found = clip_by_global_norm(leaves, one)
        assert_norm(read(found)[()], clip_by_global_norm_(values, other))
        for leaf, value in zip(leaves, values, strict=True):
            assert_same_bits(read(leaf), value, nan_payload=False)
        assert isinstance(one.last_limit, cupy.ndarray)
        assert read(one.last_limit).tolist() == np.asarray(other.last_limit).tolist()
    assert one.state_dict() == other.state_dict()
    assert pickle.loads(pickle.dumps(one)).state_dict() == other.state_dict()


@pytest.mark.slow
def test_each_array_is_clipped_by_itself_wherever_it_is() -> None:
    """With gaps, as rows that are added by the host, of float64; and where the host decides."""
    one, other = (limits.PerTensor(limits.Average(1.1, 0.9, 1)) for _ in range(2))
    rng = np.random.default_rng(0)
    for step in range(6):
        rows = np.array([0, 2, 2 if step % 2 else 1])
        values = [rng.standard_normal((4, 3)).astype(np.float32) * 10.0**step for _ in range(2)]
        slices = rng.standard_normal((3, 2)).astype(np.float32)
        wide = rng.standard_normal(5).astype(np.float64 if step == 3 else np.float32)
        leaves = [lay_out(values[0], "strided"), make(values[1]), make(wide)]
        leaves.append(IndexedSlices(make(slices), make(rows), (4, 2)))
        wanted = [*values, wide, IndexedSlices(slices, rows, (4, 2))]
        policy: Any = "raise" if step > 3 else "nan"
        found = clip_by_global_norm_(leaves, one, on_nonfinite=policy)
        assert_norm(read(found)[()], clip_by_global_norm_(wanted, other))
        for leaf, value in zip(leaves, wanted, strict=True):
            ours, theirs = (getattr(each, "values", each) for each in (leaf, value))
            assert_same_bits(read(ours), theirs, nan_payload=False)
    assert one.state_dict() == other.state_dict()


# ---- NaN and inf ----


@pytest.mark.slow
def test_raise_names_each_offending_leaf_with_its_counts() -> None:
    leaves = {
        "body": [make(np.float32([1, np.nan, np.inf, np.nan])), make(np.float32([1]))],
        "head": (make(np.array([1, np.inf], ml_dtypes.bfloat16)), None),
        "tail": make(np.array([np.nan + 1j, complex(np.inf, np.nan), complex(np.nan, np.nan)])),
    }
    text = (
        "the global norm is nan: t_list['body'][0] holds 2 NaN and 1 inf; "
        "t_list['head'][0] holds 0 NaN and 1 inf; t_list['tail'] holds 3 NaN and 1 inf"
    )
    before = read(leaves["body"][0])
    for function in (clip_by_global_norm, clip_by_global_norm_):
        with raises(FloatingPointError, text):
            function(leaves, 1.0, on_nonfinite="raise")
    assert_same_bits(read(leaves["body"][0]), before, nan_payload=True)


def test_a_norm_too_large_for_float32_is_no_reason_to_raise() -> None:
    values = np.full(4, 3e38, np.float32)
    (new,), norm = clip_by_global_norm([make(values)], 3e38, on_nonfinite="raise")
    assert read(norm) == np.inf
    assert (read(new) == np.float32(1.5e38)).all()


# ---- memory ----


@pytest.mark.slow
@pytest.mark.parametrize("layout", host_cupy.LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_new_array_is_of_the_same_shape_and_order(name: str, layout: str) -> None:
    leaf = lay_out(np.ones((2, 3, 4), DTYPES[name]), layout)
    for limit in (0.5, math.inf):
        (new,), _ = clip_by_global_norm([leaf], limit)
        assert type(new) is cupy.ndarray
        assert (new.dtype, new.shape) == (leaf.dtype, leaf.shape)
        assert new.data.ptr != leaf.data.ptr
        if layout in ("contiguous", "fortran", "transposed"):
            assert new.strides == leaf.strides


@only_without_a_device
def test_what_is_only_measured_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_cupy.Memory, "assign", None)
    leaves = [lay_out(np.float32([[3, 0], [0, 4]]), layout) for layout in ("strided", "reversed")]
    assert read(global_norm(leaves)) == np.float32(math.sqrt(50))
    assert read(clip_by_global_norm(leaves, 1.0)[1]) == np.float32(math.sqrt(50))
    with pytest.raises(FloatingPointError):
        clip_by_global_norm_(leaves, 1.0, math.inf, on_nonfinite="raise")
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        clip_by_global_norm_(leaves, 1.0)


def test_what_lies_between_is_not_written() -> None:
    room = make(np.full((3, 6), 7, np.float32))
    assert read(clip_by_global_norm_([room[:, 1:3], room[::-1, 4]], 1.0)) == 21
    wanted = np.full((3, 6), 7, np.float32)
    wanted[:, [1, 2, 4]] = (
        expected_of(Case([np.full(9, 7, np.float32)], [""], 1.0)).leaves[0].reshape(3, 3)
    )
    assert_same_bits(read(room), wanted, nan_payload=True)


@pytest.mark.parametrize("name", some_quick(NAMES[:1], NAMES[1:]))
def test_an_array_listed_twice_counts_once_and_is_scaled_once_in_place(name: str) -> None:
    room = make(np.array([[3, 9], [4, 9]]).astype(DTYPES[name]))
    row = make(np.array([12, 0]).astype(DTYPES[name]))
    leaves = [row, room[:, 0], {"again": [room[:, 0], row, row.reshape(1, 2), room[:, 0]]}]
    assert read(clip_by_global_norm_(leaves, 6.5)) == 13
    assert read(room).astype(complex).tolist() == [[1.5, 9], [2, 9]]
    assert read(row).astype(complex).tolist() == [6, 0]
    leaf = make(np.float32([3, 4]))
    assert read(clip_by_global_norm([leaf, leaf], math.inf)[1]) > 7


def strided(room: Any, shape: Any, strides: Any) -> Any:
    return cupy.ndarray(shape, room.dtype, memptr=room.data, strides=strides)


def test_arrays_that_overlap_themselves_work_but_not_in_place() -> None:
    room = make(np.arange(1, 9, dtype=np.float32))
    for shape, strides in (((4,), (0,)), ((2, 2), (4, 4)), ((2, 3), (8, 4))):
        leaf = strided(room, shape, strides)
        assert_norm(read(global_norm([leaf]))[()], oracle.norm([read(leaf)])[1])
        text = (
            f"t_list[1] has elements that share memory (strides {strides}); "
            "clip_by_global_norm returns new arrays instead"
        )
        with raises(ValueError, text):
            clip_by_global_norm_([room, leaf], 1.0)
    assert read(room).tolist() == list(range(1, 9))
    one, none = strided(room, (1, 4), (0, 4)), strided(room, (0, 4), (0, 0))
    assert read(clip_by_global_norm_([one, none], math.inf)) == np.float32(math.sqrt(30))


def test_runs_and_overlaps_against_all_addresses() -> None:
    room = make(np.zeros(64, np.float32))[30:]
    for shape in itertools.product((0, 1, 2, 3), repeat=2):
        for strides in itertools.product((-8, -4, 0, 4, 8, 12, 16), repeat=2):
            leaf = strided(room, shape, strides)
            offsets = [i * strides[0] + j * strides[1] for i, j in np.ndindex(*shape)]
            dense = sorted(offsets) == list(range(0, 4 * len(offsets), 4))
            assert kernels.is_run(leaf) == dense or not offsets
            if len(set(offsets)) < len(offsets):
                assert kernels.may_overlap(leaf)
            if dense:
                assert not kernels.may_overlap(leaf)


# ---- what is refused ----

ACCEPTED = (
    "gradclip clips float16, bfloat16, float32, float64 and complex arrays of CuPy, "
    "and IndexedSlices of them"
)


@pytest.mark.parametrize("dtype", [np.int32, np.bool_])
def test_other_dtypes_are_named_with_their_path(dtype: Any) -> None:
    leaf = make(np.ones(3, dtype))
    for wrong in (leaf, IndexedSlices(leaf, np.arange(3))):
        for function in (clip_by_global_norm, clip_by_global_norm_):
            with raises(TypeError, f"t_list['a'][1] is {leaf.dtype}; {ACCEPTED}"):
                function({"a": [make(np.float32([1])), wrong]}, 1.0)


def test_sparse_and_distributed_arrays_of_cupyx_are_named() -> None:
    for bases in ((), (cupy.ndarray,)):
        kind = type("csr_matrix", bases, {"__module__": "cupyx.scipy.sparse._csr"})
        leaf = kind() if not bases else kind((2,))
        with raises(TypeError, f"t_list is cupyx.scipy.sparse._csr.csr_matrix; {ACCEPTED}"):
            global_norm(leaf)


def test_arrays_of_two_frameworks() -> None:
    text = "t_list[0] is of cupy and t_list[1] is of numpy; one call clips leaves of one framework"
    with raises(TypeError, text):
        global_norm([make(np.float32([1])), np.float32([1])])


@only_without_a_device
def test_arrays_on_two_devices() -> None:
    leaves = [host_cupy.array(np.ones(2), device) for device in (0, 0, 1)]
    text = (
        "t_list[0] is on device 0 and t_list[2] is on device 1; one call clips arrays of one device"
    )
    for function in (clip_by_global_norm, clip_by_global_norm_):
        with raises(ValueError, text):
            function(leaves, 1.0)
    limit = host_cupy.array(np.array(0.5), 1, host_cupy.Array)
    held = backend.hold(leaves[:1], str, writable=False)
    assert held.decides(Clip(leaves[:1], str, limit))
    assert not held.knows(limit), "the host reads what is on another device"
    (new,), _ = clip_by_global_norm(leaves[:1], limit)
    assert_leaves([read(new)], expected_of(Case([np.ones(2)], [""], 0.5)))


def test_a_group_is_a_communicator() -> None:
    text = "group is 'x'; for these leaves it is a communicator of mpi4py"
    for function in (clip_by_global_norm, clip_by_global_norm_):
        with raises(TypeError, text):
            function([make(np.float32([1]))], 1.0, group="x")


# ---- slices ----


@pytest.mark.slow
@pytest.mark.parametrize("indices", [[7, 2, 7, 7], [1, 2, 3, 4]], ids=["repeats", "distinct"])
@pytest.mark.parametrize("clip_norm", [0.7, math.inf])
@pytest.mark.parametrize("name", some_named("float16", "complex128"))
def test_slices(name: str, clip_norm: float, indices: list[int]) -> None:
    values = np.array([[1.5, -2], [8, 1], [1.5, 2], [-1, 1e-3]]).astype(DTYPES[name])
    rows = np.array(indices)
    wanted = oracle.clip([IndexedSlices(values, rows, (9, 2))], clip_norm)
    for held in (rows, make(rows)):
        slices = IndexedSlices(make(values), held, (9, 2))
        assert_norm(read(global_norm([slices]))[()], wanted.norm)
        (new,), norm = clip_by_global_norm([slices], clip_norm)
        assert_norm(read(norm)[()], wanted.norm)
        assert_same_bits(read(new.values), wanted.leaves[0], nan_payload=True)
        assert new.indices is held
        assert_same_bits(read(slices.values), values, nan_payload=True)
        norm = clip_by_global_norm_([slices, slices], clip_norm)
        assert_norm(read(norm)[()], wanted.norm)
        assert_same_bits(read(slices.values), wanted.leaves[0], nan_payload=True)


@pytest.mark.parametrize("policy", ["nan", "zero", "keep", "raise"])
def test_slices_beside_an_array_that_is_not_finite(policy: str) -> None:
    slices = IndexedSlices(make(np.float32([[3], [4], [5]])), np.array([0, 1, 0]))
    leaves = [slices, make(np.float64([np.inf, 1]))]
    if policy == "raise":
        with raises(FloatingPointError, "the global norm is inf: t_list[1] holds 0 NaN and 1 inf"):
            clip_by_global_norm(leaves, 1.0, on_nonfinite=policy)
        return
    new, norm = clip_by_global_norm(leaves, 1.0, on_nonfinite=policy)
    assert read(norm) == np.inf
    value = {"nan": math.nan, "zero": 0.0}.get(policy)
    assert_same_bits(
        read(new[0].values),
        np.float32([[3], [4], [5]]) if value is None else np.full((3, 1), value, np.float32),
        nan_payload=False,
    )
    clip_by_global_norm_(leaves, 1.0, on_nonfinite=policy)
    assert_same_bits(read(slices.values), read(new[0].values), nan_payload=False)


def test_slices_that_do_not_fit() -> None:
    values = make(np.ones((2, 3), np.float32))
    with raises(ValueError, "t_list['e'].indices holds -1; no row has a negative index"):
        global_norm({"e": IndexedSlices(values, make(np.array([0, -1])), (5, 3))})
    with raises(ValueError, "t_list.indices holds 5; dense_shape has 5 rows"):
        global_norm(IndexedSlices(values, np.array([5, 0]), (5, 3)))


# ---- what serves groups and surveys ----


def hold(values: list[Any], *, writable: bool = False) -> Any:
    return backend.hold(list(map(make, values)), str, writable=writable)


VALUES = [
    np.float32([[3, 1e-30], [1e30, -4]]),
    np.array([1.5, -2.25, 3e38], ml_dtypes.bfloat16),
    np.float16([6e-8, 65504]),
    np.complex64([1 + 2j, 3e-39]),
]


@pytest.mark.parametrize(
    "more", some_quick([[]], [[np.float64([1e-300, 1e300])]]), ids=["narrow", "wide"]
)
def test_what_is_held_does_as_numpy_s(more: list[Any]) -> None:
    from gradclip.numpy import backend as numpy_backend

    values = [*VALUES, *more]
    held, other = hold(values), numpy_backend.hold(values, str, writable=False)
    assert held.measure() == other.measure()
    assert gradclip._clip.survey(list(map(make, values))).norm == survey(values).norm
    assert held.total()[1:] == other.total()[1:]
    factor = Scaled(0.7, -5)
    for new, old in zip(held.scaled(factor), other.scaled(factor), strict=True):
        assert_same_bits(read(new), old, nan_payload=True)
    for value in (math.nan, 0.0):
        for new, old in zip(held.filled(value), other.filled(value), strict=True):
            assert_same_bits(read(new), old, nan_payload=False)
    assert_all_as(held.copied(), values)
    norm = held.measure()
    assert_norm(read(held.scalar(norm))[()], other.scalar(norm))
    assert_norm(read(held.scalar(norm, wide=True))[()], np.float64(float(norm)))


@pytest.mark.parametrize("layout", host_cupy.LAYOUTS[:-1])
def test_a_decision_is_carried_out_where_leaves_lie(layout: str) -> None:
    values = [np.arange(6).reshape(2, 3).astype(DTYPES[name]) for name in NAMES]
    for action in (Scale(Scaled(0.75, 1)), Fill(0.0), Fill(math.nan)):
        leaves, wanted = [lay_out(array, layout) for array in values], [x.copy() for x in values]
        act_(leaves, action)
        act_(wanted, action)
        for new, old in zip(leaves, wanted, strict=True):
            assert_same_bits(read(new), old, nan_payload=False)


class Twin:
    """A communicator whose other worker has the same."""

    def Get_rank(self) -> int:  # noqa: N802
        return 0

    def Get_size(self) -> int:  # noqa: N802
        return 2

    def Allreduce(self, vector: Any, result: Any) -> None:  # noqa: N802
        result[:] = 2 * vector


Twin.__module__ = "mpi4py.MPI"


@pytest.mark.parametrize("rows", [None, [0, 1], [1, 1]], ids=["dense", "distinct", "repeats"])
def test_a_group_of_mpi4py(rows: list[int] | None) -> None:
    values = [np.float32([[3, 4], [1, 1e-20]]), np.float64([[1, 2], [3, 4]])]
    more = [values[0] if rows is None else IndexedSlices(values[0], np.array(rows))]
    wanted, wanted_norm = clip_by_global_norm([*more, values[1]], 2.5, group=Twin())
    first: Any = make(values[0])
    first = first if rows is None else IndexedSlices(first, np.array(rows))
    leaves = [first, make(values[1])]
    new, norm = clip_by_global_norm(leaves, 2.5, group=Twin())
    assert_norm(read(norm)[()], wanted_norm)
    assert_norm(read(clip_by_global_norm_(leaves, 2.5, group=Twin()))[()], wanted_norm)
    for clipped in (new, leaves):
        for leaf, old in zip(clipped, wanted, strict=True):
            assert_same_bits(
                read(getattr(leaf, "values", leaf)), oracle.stored(old), nan_payload=True
            )


# ---- graphs ----


@only_without_a_device
def test_what_a_graph_uses_is_kept() -> None:
    values = np.float32([3, 4])
    with host_cupy.no_driver(host_cupy.Stream(capturing=True)):
        leaf = make(np.stack([values, values], -1))[:, 0]
        kept = len(kernels._in_graphs)
        norm = clip_by_global_norm_([leaf], 2.5)
        assert read(norm) == 5
        assert read(leaf).tolist() == [1.5, 2]
        # The norm, a copy of the leaf, the table and scratch.
        assert len(kernels._in_graphs) == kept + 4
        assert any(each is norm for each in kernels._in_graphs)
        del kernels._in_graphs[kept:]


def test_parts_of_pinned_memory_for_graphs() -> None:
    reserve = Reserve(lambda count: np.zeros(count, np.int64), words=7)
    words = np.arange(3)
    text = (
        "no pinned memory is left for the 1 chunks of a clip that is being captured; "
        "clip once before capturing, or fewer graphs"
    )
    with raises(RuntimeError, text):
        reserve.keep(words)
    for _ in range(2):
        reserve.take()
    parts = [reserve.keep(words + place) for place in range(2)]
    assert [part.tolist() for part in parts] == [[0, 1, 2], [1, 2, 3]]
    with raises(RuntimeError, text):
        reserve.keep(words)


def test_pinned_memory_is_kept_until_it_has_been_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, **_: Any) -> None:
            self.done = False

        def record(self, stream: Any) -> None:
            assert stream == "stream"

    monkeypatch.setattr(cupy.cuda, "Event", Event)
    kernels._sending.clear()
    for place in range(3):
        kernels._hold_until_sent(place, "stream")
    assert [pinned for _, pinned in kernels._sending] == [0, 1, 2]
    kernels._sending[0][0].done = kernels._sending[2][0].done = True
    kernels._hold_until_sent(3, "stream")
    assert [pinned for _, pinned in kernels._sending] == [1, 2, 3]
    kernels._sending.clear()


def test_streams_share_nothing() -> None:
    streams = [host_cupy.Stream(ptr) for ptr in (0, 8, 0)]
    keys = [kernels.Memory(device, stream).key for device in (0, 1) for stream in streams]
    assert keys[0] == keys[2]
    assert len(set(keys)) == 4


def test_the_default_stream_of_each_thread_is_its_own() -> None:
    import threading

    stream = host_cupy.Stream(cupy.cuda.Stream.ptds.ptr)
    keys = [kernels.Memory(0, stream).key]
    thread = threading.Thread(target=lambda: keys.append(kernels.Memory(0, stream).key))
    thread.start()
    thread.join()
    assert keys[0] != keys[1]


# ---- without what it needs ----


def test_amd_s_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy.cuda.runtime, "is_hip", True)
    with pytest.raises(NotImplementedError, match="this CuPy is built for ROCm"):
        kernels.Memory.now(0)


@pytest.mark.slow
def test_without_triton_the_error_says_what_to_install() -> None:
    code = """
        import gradclip, numpy, cupy
        rooms = [name for name in sys.modules if name.startswith("gradclip.cupy")]
        assert not rooms, rooms
        sys.modules["triton"] = None
        try:
            gradclip.core.dispatch.backend_of([], {cupy.ndarray}, str)
        except ModuleNotFoundError as error:
            assert "install triton" in str(error), error
        else:
            raise AssertionError
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr


# ---- the launch ----

LAUNCHED = """
    class NoTorch:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "torch":
                raise ImportError("Triton is to compile without PyTorch")

    sys.meta_path.insert(0, NoTorch())

    import contextlib
    from types import SimpleNamespace
    import cupy
    from gradclip.cupy import gpu as kernels
    from gradclip.kernels.gpu import each
    from gradclip.kernels.gpu import triton as cuda

    calls = []

    class Device(contextlib.nullcontext):
        compute_capability = sys.argv[1]

    class Module:
        def load(self, cubin):
            assert cubin[:4] == b"\\x7fELF"
        def get_function(self, name):
            calls.append(name)
            return lambda *args, **options: calls.append((args, options))

    cupy.cuda.Device, cupy.cuda.Module = Device, Module
    stream = SimpleNamespace(ptr=0)
    memory = kernels.Memory(0, stream)
    tiles = {"TILE": cuda.TILE, "SMALL": cuda.SMALL}
    sizes = {"PROGRAMS": cuda.MOST_PROGRAMS, **tiles}
    launches = [
        (cuda.measure, 18, {"WIDE": False, "KIND": 0, **sizes}),
        (cuda.measure, 18, {"WIDE": True, "KIND": 3, **sizes}),
        (cuda.rewrite, 6, tiles),
        (each.measure_each, 4, {"WIDE": False, **tiles}),
        (each.decide_each, 15, {"WIDE": False, "KIND": 3, "SMALL": 512, "BLOCK": each.BLOCK}),
        (each.rewrite_each, 6, tiles),
        (cuda.share, 4, {cuda.share.arg_names[-1]: cuda.SMALL}),
    ]
    for kernel, count, constants in launches:
        for _ in range(2):  # the second finds it loaded
            memory.launch(kernel, 5, tuple(range(count)), **constants)
        name, *both = calls
        assert name == kernel.__name__
        for args, options in both:
            grid, block, given = args
            assert grid == (5,) and block == (256,), (grid, block)
            assert given[:count] == tuple(range(count)) and not any(given[count:]), given
            assert len(given) == count + 2, "Triton's pointers to scratch"
            assert 0 <= options["shared_mem"] <= 48 << 10
            assert options["stream"] is stream
        calls.clear()
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["90", pytest.param("80", marks=pytest.mark.long)])
def test_kernels_are_compiled_and_launched_without_pytorch(capability: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = run_python(LAUNCHED, capability, env=env)
    assert done.returncode == 0, done.stderr


def test_a_kernel_that_wants_scratch_is_refused() -> None:
    def compiled(parameters: str, **scratch: int) -> Any:
        from types import SimpleNamespace as Some

        return Some(
            asm={"ptx": f".visible .entry f(\n\t{parameters}\n)\n.reqntid 256\n"},
            metadata=Some(name="f", **scratch),
            src=Some(constants={(2,): 4}),
        )

    class Kernel:
        arg_names = ("a", "b", "TILE")

    own = ".param .u64 f_param_0,\n\t.param .u64 f_param_1"
    pointer = ",\n\t.param .u64 .ptr .global .align 1 f_param_2"
    more: Callable[..., Any] = kernels._more
    assert more(Kernel, compiled(own)) == ()
    assert more(Kernel, compiled(own + 2 * pointer, global_scratch_size=0)) == (0, 0)
    for wrong in (
        compiled(own + pointer, global_scratch_size=8),
        compiled(own + pointer, profile_scratch_size=8),
        compiled(own + ",\n\t.param .u32 f_param_2"),
        compiled(".param .u64 f_param_0"),
    ):
        with pytest.raises(RuntimeError, match="cannot launch"):
            more(Kernel, wrong)
