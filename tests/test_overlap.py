"""Leaves that share memory in place, and leaves of more elements than are counted."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from scipy import sparse

import gradclip
from conftest import lacks
from gradclip import IndexedSlices, clip_by_global_norm, clip_by_global_norm_, global_norm
from gradclip.kernels.layout import Layout, check_apart, layout
from machines import KERNELS, machine

Array = np.ndarray[Any, Any]
WAY_OUT = "pass what lies apart, or use clip_by_global_norm, which returns new arrays"


def assert_same_bits(actual: Array, wanted: Array) -> None:
    assert (actual.dtype, actual.tobytes()) == (wanted.dtype, wanted.tobytes())


def in_part(first: str, second: str) -> str:
    return (
        f"{first} and {second} share a part of their memory, which would be scaled twice; {WAY_OUT}"
    )


def refused(text: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(text)}$")


# ---- the ways in which memory is reached ----


def _torch_from(values: Array) -> Any:
    return importlib.import_module("torch").from_numpy(values)


WAYS: dict[str, Callable[[Array], Any]] = {
    **{f"numpy by {name}": np.asarray for name in KERNELS},
    **{f"torch by {name}": _torch_from for name in KERNELS},
    "torch elsewhere": _torch_from,
    "torch by triton": _torch_from,
    "torch by triton, without the C kernel": _torch_from,
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A way in, as what makes a leaf of a view of an array."""
    name = request.param
    for package in ("torch", "triton"):
        if package in name and (reason := lacks(package)):
            pytest.skip(reason)
    with ExitStack() as stack:
        kernel = name.partition(" by ")[2]
        if kernel in KERNELS:
            stack.enter_context(machine(kernel, 2))
        if "without" in name:
            stack.enter_context(machine("numpy"))
        if "triton" in name:
            stack.enter_context(importlib.import_module("host_torch").torch_there())
        if "elsewhere" in name:
            monkeypatch.setattr("gradclip.torch.backend.on_host", lambda _: False)
            monkeypatch.setattr("gradclip.torch.pointers.taken", lambda *_, **__: None)
        yield WAYS[name]


def room() -> Array:
    return np.arange(1, 25, dtype=np.float32)


# Views of the same 24 numbers that lie apart.
APART: dict[str, Callable[[Array], list[Array]]] = {
    "halves": lambda x: [x[12:], x[:12]],
    "alternating": lambda x: [x[::2], x[1::2]],
    "columns": lambda x: [x.reshape(6, 4)[:, i] for i in (2, 0, 3, 1)],
    "parts of rows": lambda x: [x.reshape(4, 6)[:, 3:], x.reshape(4, 6)[:, :3]],
    "a quarter and the rest": lambda x: [
        x.reshape(4, 6)[:2, :3],
        x.reshape(4, 6)[:2, 3:],
        x.reshape(4, 6)[2:],
    ],
    "of three dimensions": lambda x: [
        x.reshape(2, 3, 4)[:, :2, :1],
        x.reshape(2, 3, 4)[:, 2:],
        x.reshape(2, 3, 4)[:, :2, 1:].transpose(2, 0, 1),
    ],
    "of other steps": lambda x: [x[::4], x[2::4], x[1::2]],
}


@pytest.mark.parametrize("name", APART)
def test_views_that_lie_apart_are_scaled_once_each(name: str, way: Any) -> None:
    array = room()
    norm = clip_by_global_norm_(list(map(way, APART[name](array))), 1.0)
    (wanted,), wanted_norm = clip_by_global_norm([room()], 1.0)
    assert float(norm) == float(wanted_norm)
    assert_same_bits(array, wanted)


# Two views of the same 24 numbers that share some.
SHARING: dict[str, Callable[[Array], list[Array]]] = {
    "all but one": lambda x: [x[:-1], x[1:]],
    "the beginning": lambda x: [x, x[:3]],
    "the end": lambda x: [x[20:], x],
    "steps that meet": lambda x: [x[::3], x[1::2]],
    "corners": lambda x: [x.reshape(4, 6)[:3, :3], x.reshape(4, 6)[2:, 2:]],
    "a column and a row": lambda x: [x.reshape(4, 6)[:, 1], x.reshape(4, 6)[2]],
}


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("limit", [1.0, np.inf], ids=["to clip", "nothing to clip"])
def test_views_that_share_a_part_are_refused_before_a_write(
    name: str, limit: float, way: Any
) -> None:
    array = room()
    first, second = map(way, SHARING[name](array))
    apart = way(np.float32([3]))
    with refused(in_part("t_list['b']", "t_list['c']")):
        clip_by_global_norm_({"a": apart, "b": first, "c": second}, limit)
    assert_same_bits(array, room())
    assert float(apart[0]) == 3


def test_one_that_reaches_over_another_and_further(way: Any) -> None:
    array = room()
    leaves = [way(array[::2]), way(array[1:2]), way(array[9:11])]
    with refused(in_part("t_list[0]", "t_list[2]")):
        clip_by_global_norm_(leaves, 1.0)
    assert_same_bits(array, room())


# Other views of all 24 numbers.
ALIKE: dict[str, Callable[[Array], Array]] = {
    "itself": lambda x: x,
    "another shape": lambda x: x.reshape(4, 6),
    "another order": lambda x: x.reshape(4, 6).T,
    "a dimension of one": lambda x: x.reshape(24, 1),
}


@pytest.mark.parametrize("name", ALIKE)
def test_the_same_memory_in_another_shape_counts_once(name: str, way: Any) -> None:
    array = room()
    norm = clip_by_global_norm_([way(array), way(ALIKE[name](array)), way(array)], 1.0)
    (wanted,), wanted_norm = clip_by_global_norm([room()], 1.0)
    assert float(norm) == float(wanted_norm)
    assert_same_bits(array, wanted)


# ---- NumPy ----


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", SHARING)
def test_to_be_measured_and_for_new_arrays_views_may_share_what_they_like(name: str) -> None:
    views = SHARING[name](room())
    copies = [view.copy() for view in views]
    assert global_norm(views) == global_norm(copies)
    for new, wanted in zip(*(clip_by_global_norm(x, 1.0)[0] for x in (views, copies)), strict=True):
        assert_same_bits(new, wanted)


@pytest.mark.usefixtures("kernel")
def test_views_of_other_dtypes() -> None:
    array = room()
    assert clip_by_global_norm_([array, array.view(np.complex64)], 7.0) == 70
    assert_same_bits(array, room() * np.float32(0.1))
    for other in (array.view(np.float16), array.view(np.float64), array.view(">f4"), array[::-2]):
        with refused(in_part("t_list[0]", "t_list[1]")):
            clip_by_global_norm_([array, other], 1.0)
    assert_same_bits(array, room() * np.float32(0.1))


@pytest.mark.usefixtures("kernel")
def test_the_values_of_sparse_leaves_that_share_a_part_are_refused() -> None:
    values = room()
    rows = np.arange(12)
    for first, second in (
        (IndexedSlices(values[:12], rows), IndexedSlices(values[6:18], rows)),
        (sparse.coo_array((values[:12], (rows,))), values[6:]),
        (
            sparse.csr_array((values[:12], rows, np.array([0, 12]))),
            sparse.csr_array((values[6:18], rows, np.array([0, 12]))),
        ),
    ):
        with refused(in_part("t_list[0]", "t_list[1]")):
            clip_by_global_norm_([first, second], 1.0)
    assert_same_bits(values, room())


@pytest.mark.usefixtures("kernel")
def test_pairs_of_views_against_all_their_elements() -> None:
    rng = np.random.default_rng(7)
    outcomes = {"apart": 0, "alike": 0, "sharing": 0}
    for _ in range(400):
        array = np.arange(1, 73, dtype=np.float32)
        views = [random_view(array, rng) for _ in range(2)]
        if rng.random() < 0.1:
            views[1] = np.flip(views[0].T)
        first, second = ({int(x) for x in view.ravel()} for view in views)
        kind = "alike" if first == second else "sharing" if first & second else "apart"
        outcomes[kind] += 1
        if kind == "sharing":
            with refused(in_part("t_list[0]", "t_list[1]")):
                clip_by_global_norm_(views, 1.0)
            continue
        clip_by_global_norm_(views, 0.5, use_norm=1.0)
        halved = {int(x) for x in np.flatnonzero(array != np.arange(1, 73))}
        assert halved == {x - 1 for x in first | second}
        assert (array[[*halved]] * 2 == np.arange(1, 73)[[*halved]]).all()
    assert min(outcomes.values()) > 3, outcomes


def random_view(array: Array, rng: np.random.Generator) -> Array:
    """A view with elements, of any steps and order of dimensions."""
    shape = [(72,), (6, 12), (12, 6), (2, 6, 6), (3, 4, 6)][rng.integers(5)]
    view = array.reshape(shape)
    parts = []
    for length in shape:
        begin = int(rng.integers(0, length)) if rng.random() < 0.6 else 0
        end = int(rng.integers(begin + 1, length + 1)) if rng.random() < 0.6 else length
        parts.append(slice(begin, end, int(rng.integers(1, 4)) if rng.random() < 0.4 else 1))
    view = view[tuple(parts)].transpose(rng.permutation(len(shape)))
    return np.flip(view) if rng.random() < 0.3 else view


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("count", [3, 600, 3000])
@pytest.mark.parametrize("again", [False, True], ids=["apart", "some again"])
def test_many_leaves_in_any_order(count: int, again: bool) -> None:
    """Nearly in order of their addresses, backwards, and not at all."""
    rng = np.random.default_rng(count)
    for order in (np.arange(count), np.arange(count)[::-1], rng.permutation(count)):
        array = np.ones((count, 4), np.float32)
        leaves = [array[i] for i in order]
        if again:
            leaves += [array[i] for i in rng.permutation(count)[: count // 2]]
        assert clip_by_global_norm_(leaves, 0.5, use_norm=1.0) == 1
        assert (array == 0.5).all()
        worst = int(order[-1])
        flat = array.reshape(-1)
        neighbour = flat[4 * worst + 1 : 4 * worst + 3]
        with refused(in_part(f"t_list[{count - 1}]", f"t_list[{len(leaves)}]")):
            clip_by_global_norm_([*leaves, neighbour], 0.5, use_norm=1.0)
        assert (array == 0.5).all()


def test_what_cannot_be_found_out_in_time_is_refused() -> None:
    """The hard case of NumPy's documentation, where `numpy.shares_memory` takes minutes."""
    places = {
        0: Layout(1000, 1, ((85569, 1049), (61119, 1049), (36674, 1049))),
        1: Layout(1000 + 64023025, 1, ((12224, 1049), (12223, 1049))),
    }
    text = f"x[0] and x[1] may share memory, and to find out would take too long; {WAY_OUT}"
    with refused(text):
        check_apart(places, "x[{}]".format)


def test_a_layout_has_as_few_dimensions_as_can_be() -> None:
    assert layout(100, 4, (2, 3), (12, 4)) == Layout(100, 4, ((4, 6),))
    assert layout(100, 4, (2, 3), (-12, -4)) == Layout(80, 4, ((4, 6),))
    assert layout(100, 4, (2, 3), (24, 8), parts=2) == Layout(100, 4, ((4, 12),))
    assert layout(100, 4, (3, 2), (4, 40)) == Layout(100, 4, ((40, 2), (4, 3)))
    assert layout(100, 4, (1, 1), (7, 9)) == Layout(100, 4, ((4, 1),))


# ---- PyTorch ----


def test_gradients_that_are_views_of_one_bucket_are_clipped(
    framework: Callable[[str], Any],
) -> None:
    """As `DistributedDataParallel(gradient_as_bucket_view=True)` has them; and tied weights."""
    torch = framework("torch")
    bucket = torch.ones(40)
    bounds = [(0, 7), (7, 20), (20, 36), (36, 40)]
    parameters = [torch.nn.Parameter(torch.zeros(end - begin)) for begin, end in bounds]
    for parameter, (begin, end) in zip(parameters, bounds, strict=True):
        parameter.grad = bucket[begin:end]
    tied = [*parameters[::-1], parameters[1]]
    norm = importlib.import_module("gradclip.torch").clip_grad_norm_(tied, 1e-3)
    assert float(norm) == np.float32(40**0.5)
    assert len(set(bucket.tolist())) == 1


def test_gradients_that_share_a_part_are_refused_by_name(framework: Callable[[str], Any]) -> None:
    torch = framework("torch")
    room = torch.ones(40)
    parameters = [torch.nn.Parameter(torch.zeros(30)) for _ in range(2)]
    parameters[0].grad, parameters[1].grad = room[:30], room[10:]
    with pytest.raises(ValueError, match=r"^\S+0\S* and \S+1\S* share a part of their memory"):
        importlib.import_module("gradclip.torch").clip_grad_norm_(parameters, 1.0)
    assert room.tolist() == [1] * 40


# ---- CuPy ----


def test_views_of_cupy(on_cupy: Any) -> None:
    make, read = on_cupy.make, on_cupy.read
    for views in APART.values():
        array = make(room())
        norm = clip_by_global_norm_(views(array), 1.0)
        (wanted,), wanted_norm = clip_by_global_norm([room()], 1.0)
        assert float(norm) == wanted_norm
        assert_same_bits(read(array), wanted)
    for views in SHARING.values():
        array = make(room())
        with refused(in_part("t_list[0]", "t_list[1]")):
            clip_by_global_norm_(views(array), 1.0)
        assert_same_bits(read(array), room())
    for view in ALIKE.values():
        array = make(room())
        assert float(clip_by_global_norm_([array, view(array)], 7.0)) == 70


# ---- more elements than are counted ----


def too_many(path: str, size: int, total: int) -> str:
    return (
        f"{path} has {size} elements, and the leaves up to it {total} (a complex one counts as "
        "two); gradclip counts up to 2**63 - 1"
    )


def broadcast(count: int, dtype: Any = np.float32) -> Array:
    return np.lib.stride_tricks.as_strided(np.ones(1, dtype), (count,), (0,))


CALLS: list[Callable[[Any], Any]] = [
    global_norm,
    lambda leaves: clip_by_global_norm(leaves, 1.0),
    lambda leaves: clip_by_global_norm(leaves, 1.0, use_norm=2.0),
    lambda leaves: clip_by_global_norm_(leaves, 1.0),
]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("call", CALLS, ids=["norm", "clip", "norm given", "in place"])
def test_more_elements_than_an_int64_counts(call: Callable[[Any], Any]) -> None:
    real = [broadcast(2**60) for _ in range(8)]
    with refused(too_many("t_list[7]", 2**60, 2**63)):
        call(real)
    parts = {"w": [broadcast(2**59, np.complex64)] * 7, "b": [broadcast(2**60), np.ones(3)]}
    with refused(too_many("t_list['w'][6]", 2**60, 2**63 + 3)):
        call(parts)


@pytest.mark.parametrize("kernel_name", KERNELS)
def test_tensors_of_more_elements_than_an_int64_counts(
    framework: Callable[[str], Any], kernel_name: str
) -> None:
    torch = framework("torch")
    one = torch.ones(1)
    leaf = torch.ones(1, dtype=torch.complex64).expand(2**62)
    with machine(kernel_name):
        for call in CALLS:
            with refused(too_many("t_list[3]", 2**61, 2**63)):
                call([one.expand(2**61)] * 4)
            with refused(too_many("t_list['w']", 2**63, 2**63 + 1)):
                call({"b": one, "w": leaf})


def test_the_last_count_that_fits_is_held_and_a_length_of_zero_counts_nothing(
    framework: Callable[[str], Any],
) -> None:
    torch = framework("torch")
    backend = importlib.import_module("gradclip.torch.backend")
    one = torch.ones(1)
    fits = [one.expand(2**62), one.expand(2**62 - 1)]
    assert backend.hold(fits, str, writable=False).memory.nbytes == 4 * (2**63 - 1) % 2**64
    with refused(too_many("2", 1, 2**63)):
        backend.hold([*fits, one], str, writable=False)
    none = torch.empty(0, 1, 1).expand(0, 2**40, 2**40)
    assert float(gradclip.global_norm([none, torch.ones(4), none])) == 2
