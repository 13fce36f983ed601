"""The rooms: a folder is a framework, and what a stranger's first one gets by its few lines."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradclip
from conftest import _toy, _toy_read
from gradclip.core import dispatch, rooms
from host import run_python
from toyarrays import Array

ROOM = Path(__file__).parent / "rooms" / "toyarrays"


def raises(error: type[Exception], text: str) -> Any:
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def array(*numbers: float, dtype: str = "float32") -> Array:
    return _toy(np.array(numbers, dtype))


def test_one_file_is_a_room() -> None:
    assert [file.name for file in ROOM.iterdir() if file.is_file()] == ["backend.py"]
    assert "toyarrays" in rooms.backend_names()
    code = """
        import gradclip, toyarrays
        gradclip.global_norm([toyarrays.Array(bytearray(4), "float32", (1,))])
    """
    assert "t_list[0] is Array; every leaf must be an array of cupy or" in run_python(code).stderr


def test_the_arrays_of_a_nest() -> None:
    nest = {"w": (array(3.0), None), "b": array(4.0, dtype="float64")}
    clipped, norm = gradclip.clip_by_global_norm(nest, 2.5)
    assert (_toy_read(norm)[()], norm.dtype) == (5, "float64")
    assert _toy_read(clipped["w"][0]).tolist() == [1.5]
    assert _toy_read(clipped["b"]).tolist() == [2]
    assert clipped["w"][1] is None
    assert _toy_read(gradclip.global_norm(nest))[()] == 5


def test_with_nothing_to_clip_the_memory_is_new() -> None:
    leaf = array(3.0, 4.0)
    (new,), _ = gradclip.clip_by_global_norm([leaf], 5.0)
    assert new == leaf
    assert new.memory is not leaf.memory


def test_an_array_listed_twice_counts_once_in_place() -> None:
    leaf = array(3.0, 4.0)
    assert _toy_read(gradclip.clip_by_global_norm_([leaf, leaf], 2.5))[()] == 5
    assert _toy_read(leaf).tolist() == [1.5, 2]


def test_errors_name_the_leaf() -> None:
    with raises(TypeError, "t_list['w'] is int64; gradclip clips float32 and float64 arrays"):
        gradclip.global_norm({"w": array(1, dtype="int64")})
    with raises(FloatingPointError, "the global norm is nan: t_list[1] holds 1 NaN and 0 inf"):
        gradclip.clip_by_global_norm_([array(1), array(math.nan)], 1.0, on_nonfinite="raise")
    text = "t_list[0] is of toyarrays and t_list[1] is of numpy; one call clips leaves of one"
    with raises(TypeError, f"{text} framework"):
        gradclip.global_norm([array(1), np.ones(1)])


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("cupyx.scipy.sparse", "cupy"),
        ("jaxlib._jax", "jax"),
        ("scipy.sparse", "numpy"),
        ("toyarrays.more", "toyarrays"),
        ("numpyro.distributions", None),
        ("torchvision.tv_tensors", None),
    ],
)
def test_a_type_belongs_to_the_framework_of_its_package(module: str, name: str | None) -> None:
    kind = type("Leaf", (), {"__module__": module})
    assert dispatch._name(kind) == name
    assert dispatch._name(type("Own", (kind,), {})) == name
