"""What `gradclip` and `gradclip.tensorflow` take and return of TensorFlow's tensors.

To mypy TensorFlow has no types, and all of this is Any; pyright brings some along.
"""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from told import assert_type

import gradclip
from gradclip import limits
from gradclip.tensorflow import clip_by_global_norm, global_norm, patch, variables_of

f = tf.constant([3.0, 4.0])
variable = tf.Variable(f)
slices = tf.IndexedSlices(tf.constant([[3.0]]), tf.constant([0]))

# The front door.
assert_type(gradclip.clip_by_global_norm([f], 1.0), tuple[list[tf.Tensor], tf.Tensor])
assert_type(gradclip.clip_by_global_norm({"w": f}, f[0]), tuple[dict[str, tf.Tensor], tf.Tensor])
assert_type(gradclip.clip_by_global_norm((x for x in [f]), 1.0)[0], list[tf.Tensor])  # type: ignore[assert-type]
assert_type(gradclip.clip_by_global_norm_([variable], 1.0), tf.Tensor)
assert_type(gradclip.global_norm([f, slices, None]), tf.Tensor)
assert_type(gradclip.norms([f]), gradclip.Norms[tf.Tensor, tf.Tensor])

# TensorFlow's own words: a list comes back.
assert_type(clip_by_global_norm([f, f], 1.0), tuple[list[tf.Tensor], tf.Tensor])
assert_type(clip_by_global_norm((f, None), f[0]), tuple[list[tf.Tensor | None], tf.Tensor])  # type: ignore[assert-type]
assert_type(clip_by_global_norm([slices], 1.0, f[0]), tuple[list[tf.IndexedSlices], tf.Tensor])
assert_type(clip_by_global_norm([np.ones(2)], limits.ZScore(), name="clip")[1], tf.Tensor)
assert_type(clip_by_global_norm([variable, [3.0, 4.0]], 1.0)[1], tf.Tensor)
assert_type(global_norm([f, None]), tf.Tensor)
assert_type(global_norm([[3.0]], "norm"), tf.Tensor)

limit = limits.Percentile(50, 3)
tf.function(lambda x: clip_by_global_norm([x], limit))(f)
assert_type(variables_of(limit), tf.Module)
with patch() as patched:
    assert_type(patched, patch)

unknown: Any = f
assert_type(clip_by_global_norm([unknown], 1.0)[1], tf.Tensor)

with pytest.raises(TypeError):
    clip_by_global_norm([f], "1")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
with pytest.raises(TypeError):
    clip_by_global_norm(f, 1.0)  # pyright: ignore[reportCallIssue, reportArgumentType]
with pytest.raises(TypeError):
    clip_by_global_norm(iter([f]), 1.0)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
with pytest.raises(TypeError):
    clip_by_global_norm([f], 1.0, on_nonfinite="zero")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
with pytest.raises(AttributeError):
    variables_of(1.0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
