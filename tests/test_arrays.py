"""NumPy's arrays are read by their C structure where that is so, and by buffers where it is not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gradclip
from gradclip.kernels import cpu

kernel: Any = cpu._cpu
pytestmark = pytest.mark.skipif(kernel is None, reason="the C kernel is not in use")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    assert kernel.use_arrays(*cpu._samples())


def lists() -> dict[str, list[Any]]:
    base = np.arange(48, dtype=np.float32).reshape(4, 12)
    read_only = base.copy()
    read_only.flags.writeable = False
    aligned = np.zeros(41, np.uint8)
    shared = np.broadcast_arrays(np.zeros(3), np.zeros(3))
    return {
        "none": [],
        "every dtype": [np.ones((2, 3), char) for char in "efdFD"],
        "of integers": [base, np.ones(3, np.int32)],
        "of another order": [base.T, base[::-1, ::2], base[:, ::-1], base.reshape(2, 2, 12)[:, 1]],
        "without elements": [base[:0], base[:, :0].T, np.zeros((0, 3))],
        "of no dimension": [np.array(2.0), np.array(3j)],
        "twice": [base, base, base.T],
        "crowded": [base[:3], base[1:]],
        "swapped": [np.ones(3, ">f4"), np.ones(3, "<f4")],
        "misaligned": [aligned[1:41].view(np.float32)],
        "of shared elements": [np.broadcast_to(np.float32(1), (3,))],
        "written with a warning": [np.asarray(each) for each in shared],
        "read-only": [base, read_only],
        "more than can be counted": [np.lib.stride_tricks.as_strided(base, (2**60,), (0,))] * 8,
        "of a subclass": [base.view(np.recarray)],
        "of two types": [base, np.ma.masked_array(base)],
        "no array": [base, 3.0],
    }


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("name", lists())
def test_both_ways_take_the_same(name: str, writable: bool) -> None:
    arrays = lists()[name]
    assert kernel.use_arrays(*cpu._samples())
    by_structure = found(arrays, writable)
    assert not kernel.use_arrays(1, 2, 3, 4, 5)
    assert by_structure == found(arrays, writable)


def found(arrays: list[Any], writable: bool) -> Any:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        memory = kernel.take(arrays, writable, None)
    said = [str(each.message) for each in warned]
    if memory is None:
        return said
    sums = (memory.nbytes, memory.has_f64, memory.sum_squares(1)) if memory.nbytes < 2**40 else ()
    return said, memory.spans(), memory.crowded(), sums


def test_arrays_that_are_otherwise_are_found_out() -> None:
    samples = list(cpu._samples())
    assert not kernel.use_arrays(*samples[:4], np.ma.masked_array(samples[4]).astype(">D"))
    assert not kernel.use_arrays(*samples[:4], memoryview(bytes(8)))
    assert not kernel.use_arrays(*samples[:4], np.ones(3, np.int64))


def test_the_memory_is_held_while_it_is_taken() -> None:
    array = np.ones(1000, np.float32)
    memory = kernel.take([array], False, None)
    with pytest.raises(ValueError, match="resize"):
        array.resize(2000)
    del array
    assert memory.sum_squares(1) == [(1000.0, 0.0, False, False)]


def test_the_kinds_of_a_list() -> None:
    items = [1, 2, "a", None, 3.0, "b", 4]
    assert cpu.kinds(items) == cpu.kinds(tuple(items)) == {int, str, float, type(None)}
    assert cpu.kinds([]) == set()
    with pytest.raises(SystemError):
        kernel.kinds((1, 2))


def test_the_objects_in_a_list() -> None:
    one, other = [1], [1]
    found = cpu.distinct([one, one, other, one, other])
    assert [id(each) for each in found] == [id(one), id(other)]
    assert cpu.distinct([]) == []


def test_what_is_shorter_than_an_array_is_not_read_as_one() -> None:
    assert gradclip.global_norm([np.float32([3]), np.float32(4)]) == 5
    with pytest.raises(TypeError, match=r"t_list\[1\] is"):
        gradclip.global_norm([np.float32([3]), object()])


def test_a_list_that_the_hash_of_a_type_shortens() -> None:
    class Shortens(type):
        def __hash__(cls) -> int:
            del leaves[2:]
            return 5

    class Leaf(metaclass=Shortens):
        pass

    leaves: list[Any] = [np.ones(3), Leaf(), *[np.ones(3)] * 4]
    with pytest.raises(TypeError, match=r"t_list\[1\] is"):
        gradclip.global_norm(leaves)
