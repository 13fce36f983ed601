"""What `gradclip` takes and returns of NumPy's arrays, and of nests of any kind."""

from collections import OrderedDict
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from told import assert_type

import gradclip
from gradclip import clip_by_global_norm, clip_by_global_norm_, global_norm, norms

Array = npt.NDArray[np.float32]
Norm = np.float32 | np.float64


class Layer(NamedTuple):
    w: Array
    b: Array | None


a: Array = np.array([3.0, 4.0], np.float32)
limit = gradclip.limits.ZScore()

# A nest comes back as it is, with a norm of NumPy's.
assert_type(clip_by_global_norm(a, 1.0), tuple[Array, Norm])
assert_type(clip_by_global_norm([a, a], 1.0), tuple[list[Array], Norm])
assert_type(clip_by_global_norm([a, None], 1.0), tuple[list[Array | None], Norm])
assert_type(clip_by_global_norm((a, [a]), 1.0), tuple[tuple[Array, list[Array]], Norm])
assert_type(clip_by_global_norm({"w": a}, 1.0), tuple[dict[str, Array], Norm])
assert_type(clip_by_global_norm(Layer(a, None), 1.0), tuple[Layer, Norm])
assert_type(clip_by_global_norm([Layer(a, a)], 1.0), tuple[list[Layer], Norm])
ordered: OrderedDict[str, Array] = OrderedDict(w=a)
assert_type(clip_by_global_norm(ordered, 1.0), tuple[OrderedDict[str, Array], Norm])
assert_type(clip_by_global_norm([np.float32(3)], 1.0), tuple[list[np.float32], Norm])
nest: dict[str, Array | list[Array | None]] = {"w": a, "b": [a, None]}
assert_type(clip_by_global_norm(nest, 1.0)[0], dict[str, Array | list[Array | None]])

# What is read once becomes a list.
assert_type(clip_by_global_norm(iter([a]), 1.0)[0], list[Array])
assert_type(clip_by_global_norm((x for x in [a]), 1.0)[0], list[Array])
assert_type(clip_by_global_norm({"w": a}.values(), 1.0)[0], list[Array])

# Rows with indices may be of CuPy, whose types nobody knows.
slices = gradclip.IndexedSlices(np.ones((1, 2)), np.array([0]))
assert_type(clip_by_global_norm([slices], 1.0), tuple[list[gradclip.IndexedSlices], Any])

# In place, or only measured, there is the norm.
assert_type(clip_by_global_norm_([a], 1.0), Norm)
assert_type(clip_by_global_norm_({"w": a}.values(), 1.0), Norm)
assert_type(global_norm([a, None]), Norm)
assert_type(global_norm(x for x in [a]), Norm)
assert_type(global_norm({"w": a, "b": (a, a)}, "name", group=None), Norm)

found = norms({"w": a})
assert_type(found, gradclip.Norms[npt.NDArray[Norm], Norm])
assert_type(found.values, npt.NDArray[Norm])
assert_type(found.global_norm, Norm)
assert_type(found.paths, tuple[str, ...])
assert_type(found.floats(), npt.NDArray[np.float64])
assert_type(found.as_dict(), dict[str, float])
assert_type(found.largest(3), list[tuple[str, float]])
assert_type(found.nonfinite(), list[str])
plain: gradclip.Norms = found  # without saying of what

# Of nothing, or of what is not known, nothing is said.
unknown: Any = a
assert_type(clip_by_global_norm([], 1.0)[1], Any)
assert_type(clip_by_global_norm([unknown], 1.0), tuple[list[Any], Any])
assert_type(clip_by_global_norm_([unknown], 1.0), Any)
assert_type(global_norm(unknown), Any)
assert_type(global_norm([unknown, None]), Any)

# Limits and norms are numbers, scalars and arrays of shape (); limits also objects that learn.
clip_by_global_norm([a], 1)
clip_by_global_norm([a], np.float16(1))
clip_by_global_norm([a], np.array(1.0), np.float64(2), "name", on_nonfinite="keep")
clip_by_global_norm([a], Fraction(1, 3), use_norm=Fraction(5))
clip_by_global_norm([a], limit)
clip_by_global_norm_([a], gradclip.limits.PerTensor(gradclip.limits.Average(2.0)))

with pytest.raises(TypeError):
    clip_by_global_norm([a], "1")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
with pytest.raises(TypeError):
    clip_by_global_norm([a], None)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
with pytest.raises(TypeError):
    clip_by_global_norm_([a], 1j)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
with pytest.raises(TypeError):
    clip_by_global_norm([a], [1.0])  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
with pytest.raises(TypeError):
    clip_by_global_norm([a], float)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
with pytest.raises(TypeError):
    clip_by_global_norm([a], 1.0, "2")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
with pytest.raises(TypeError):
    clip_by_global_norm([a], 1.0, limit)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
with pytest.raises(ValueError, match="on_nonfinite"):
    clip_by_global_norm([a], 1.0, on_nonfinite="skip")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
with pytest.raises(TypeError):
    clip_by_global_norm([a])  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
with pytest.raises(TypeError):
    global_norm([a], max_norm=1.0)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
with pytest.raises(AttributeError):
    global_norm([a]).numpy()  # type: ignore[union-attr]  # pyright: ignore[reportAttributeAccessIssue]
with pytest.raises(AttributeError):
    print(found.norm)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
