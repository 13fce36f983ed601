"""One leaf: a tensor, a variable, or slices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from gradclip.core.sparse import IndexedSlices
from gradclip.kernels.cpu.leaves import code_dtype

_ACCEPTED = "float16, bfloat16, float8, float32, float64 and complex tensors"
_Slices = (tf.IndexedSlices, IndexedSlices)


def is_slices(leaf: Any) -> bool:
    """If it is some rows of a tensor, and their indices."""
    return isinstance(leaf, _Slices)


def tensor_of(leaf: Any) -> Any:
    """What holds the elements of a leaf."""
    return leaf.values if is_slices(leaf) else leaf


def checked(leaf: Any, path: Callable[[], str]) -> Any:
    """What holds the elements, of a dtype that is clipped.

    Raises:
        TypeError: the leaf is of another dtype or type.
    """
    tensor = tensor_of(leaf)
    dtype = getattr(tensor, "dtype", None)
    composite = isinstance(tensor, tf.SparseTensor | tf.RaggedTensor)
    if composite or not isinstance(dtype, tf.DType):
        raise TypeError(f"{path()} is {type(tensor).__name__}; gradclip clips {_ACCEPTED}")
    if code_dtype(np.dtype(dtype.as_numpy_dtype)) is None:
        raise TypeError(f"{path()} is {dtype.name}; gradclip clips {_ACCEPTED}")
    return tensor


def with_values(leaf: Any, tensor: Any) -> Any:
    """The leaf with new elements."""
    if isinstance(leaf, tf.IndexedSlices):
        return tf.IndexedSlices(tensor, leaf.indices, leaf.dense_shape)
    return leaf._replace(values=tensor) if isinstance(leaf, IndexedSlices) else tensor
