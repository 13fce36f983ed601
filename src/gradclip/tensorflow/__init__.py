"""TensorFlow's own words: change the import, and clip by the right norm.

``clip_by_global_norm`` and ``global_norm`` take, return and name what TensorFlow's do. They differ
in this, on purpose:

- The norm is correctly rounded, in float32, or float64 if a tensor is float64 or complex128.
  TensorFlow sums in the dtype of the tensors and returns the norm in it.
- Finite tensors whose squares overflow are clipped rightly; TensorFlow makes them NaN. Subnormal
  numbers count and are kept; TensorFlow takes them for 0.
- Where the norm is at most ``clip_norm`` each output is bit for bit its input, and in eager mode
  the very tensor. TensorFlow multiplies by a number that is about 1.
- The tensors may be of several dtypes, complex too. TensorFlow wants one dtype.
- Slices with the same index are added, then squared; TensorFlow squares each.
- ``clip_norm`` that is zero, negative, NaN or no scalar: ValueError. TensorFlow returns zeros, the
  inputs, NaN, or broadcasts. ``inf`` clips nothing; TensorFlow returns NaN. In a graph, where a
  value cannot be refused, NaN gives NaN and what is below 0 acts as 0.
- ``use_norm`` may be a Python number. Below 0 it is a ValueError, in a graph it clips nothing.
- At a norm of 0 the gradient is that of the identity; TensorFlow's is NaN.

In a graph on the CPU it is one operation that calls back into this process. Under XLA and on other
devices it is made of TensorFlow's own, which cannot refuse slices with an index out of range. A
``tf.function`` that has been traced outside of XLA and is then called from one with
``jit_compile=True`` needs ``jit_compile=True`` too.

What ``tf.saved_model.save`` and Keras's ``export`` save of a ``tf.function`` is also made of
TensorFlow's own operations: it gives the same bits where it is loaded, without gradclip. A concrete
function that was traced before is refused. What else writes graphs, as ``as_graph_def``, the savers
of ``tf.compat.v1`` and the service of ``tf.data`` do, fails in another process, as with every
``tf.py_function``; with ``jit_compile=True`` there is none.

A limit of `gradclip.limits` learns in eager mode and in a ``tf.function``, compiled or not; there
its state is in variables, which `variables_of` shows to ``tf.train.Checkpoint``. It is refused in
graphs of ``tf.compat.v1``, and where each of several replicas has a norm of its own.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, overload

import tensorflow as tf
from tensorflow.python.ops import clip_ops

from gradclip.core.versions import require

require("tensorflow>=2.17", tf.__version__)

from gradclip import _clip
from gradclip.core.limits import Limit
from gradclip.core.patch import Patch
from gradclip.tensorflow.graph import Scope

if TYPE_CHECKING:
    from gradclip._types import ClipNorm, Scalar, TensorFlowLeaf

__all__ = ["clip_by_global_norm", "global_norm", "patch", "variables_of"]


@overload
def clip_by_global_norm(
    t_list: Sequence[TensorFlowLeaf],
    clip_norm: ClipNorm,
    use_norm: Scalar | None = None,
    name: str | None = None,
) -> tuple[list[TensorFlowLeaf], tf.Tensor]: ...
@overload
def clip_by_global_norm(
    t_list: Sequence[Any],
    clip_norm: ClipNorm,
    use_norm: Scalar | None = None,
    name: str | None = None,
) -> tuple[list[Any], tf.Tensor]: ...
def clip_by_global_norm(
    t_list: Sequence[Any], clip_norm: Any, use_norm: Any = None, name: str | None = None
) -> tuple[list[Any], tf.Tensor]:
    """Scale tensors down together so that their global norm is at most ``clip_norm``.

    ::

        global_norm = sqrt(sum of |x|^2 over every element x of every tensor)
        t_clipped   = t                              if global_norm <= clip_norm
        t_clipped   = t * (clip_norm / global_norm)  otherwise

    Differentiable, twice too, in the tensors, ``clip_norm`` and ``use_norm``.

    Args:
        t_list: a sequence of tensors, tf.IndexedSlices, variables, what converts to a tensor, and
            None. float16, bfloat16, float8, float32, float64, complex64, complex128, any shapes.
        clip_norm: a scalar above 0; ``inf`` clips nothing. Or a limit of `gradclip.limits`, which
            learns once from each norm of a step that is executed; for a gradient it is a constant.
        use_norm: the norm to scale by, a scalar, if it is known already.
        name: names the operations; ``global_norm`` and ``clip_by_global_norm`` by default.

    Returns:
        ``(list_clipped, global_norm)``: a list of tensors, slices and None of the same dtypes and
        shapes; and ``use_norm``, or else a scalar, float64 if a tensor is float64 or complex128,
        else float32. If an element is NaN or inf, so is the norm, and every element is NaN.

    Raises:
        TypeError: ``t_list`` is no sequence, a tensor is not of these dtypes, a limit is no real
            number.
        ValueError: a limit is out of range, or slices are malformed.

    Follows ``tf.clip_by_global_norm``, with the differences that `gradclip.tensorflow` lists.

    >>> clipped, norm = clip_by_global_norm([tf.constant([3.0]), tf.constant([4.0])], 2.5)
    >>> print(clipped[0].numpy(), clipped[1].numpy(), norm.numpy())
    [1.5] [2.] 5.0
    """
    first = "global_norm" if use_norm is None else "clip_by_global_norm"
    tensors, scope = _tensors(t_list, name, first)
    leaves, norm = _clip.clip_by_global_norm(tensors, clip_norm, use_norm, scope)
    return leaves, use_norm if tf.is_tensor(use_norm) else _tensor(norm, name or first)


def global_norm(t_list: Sequence[Any], name: str | None = None) -> tf.Tensor:
    """The square root of the sum of ``|x|^2`` over every element of every tensor.

    Args:
        t_list: as in `clip_by_global_norm`.
        name: names the operations; ``global_norm`` by default.

    Returns:
        A scalar, float64 if a tensor is float64 or complex128, else float32.

    Raises:
        TypeError: ``t_list`` is no sequence, or a tensor is not of the dtypes that are clipped.
        ValueError: slices are malformed.

    Follows ``tf.linalg.global_norm``, with the differences that `gradclip.tensorflow` lists.

    >>> print(global_norm([tf.constant([3.0, 0.0]), None, tf.constant(4.0)]).numpy())
    5.0
    """
    norm = _clip.global_norm(*_tensors(t_list, name, "global_norm"))
    return _tensor(norm, name or "global_norm")


for _function in (clip_by_global_norm, global_norm):
    vars(_function)["autograph_info__"] = {}  # see `_clip`


def variables_of(limit: Limit) -> tf.Module:
    """What a limit has learnt in a ``tf.function``, as variables to be saved.

    All functions and eager calls that clip by it share them.

    Args:
        limit: a limit of `gradclip.limits`, once a ``tf.function`` that clips by it is traced.

    Returns:
        For ``tf.train.Checkpoint(limit=...)``, and whatever else looks for variables in an object.

    Raises:
        ValueError: no function has been traced, so that there are none.

    >>> from gradclip import limits
    >>> limit = limits.Percentile(50, 3)
    >>> clip = tf.function(lambda x: clip_by_global_norm([x], limit))
    >>> clipped, norm = clip(tf.constant([3.0, 4.0]))
    >>> [variable.name for variable in variables_of(limit).variables]
    ['learnt:0']
    """
    home = limit._memory.home
    if home is None:
        raise ValueError(f"{limit!r} has no variables before a tf.function with it is traced")
    return home


def _tensors(t_list: Any, name: str | None, default: str) -> tuple[list[Any], str | None]:
    """The leaves as tensors, and the name for what is still to come.

    What is no tensor becomes one in the scope of that name, as in TensorFlow's own functions.
    """
    if isinstance(t_list, str) or not isinstance(t_list, Sequence):
        raise TypeError(f"t_list is {type(t_list).__name__}; it must be a sequence of tensors")
    if all(map(_is_leaf, t_list)):
        return list(t_list), name
    with tf.name_scope(name or default) as scope:
        tensors = [
            leaf if _is_leaf(leaf) else tf.convert_to_tensor(leaf, name=f"t_{place}")
            for place, leaf in enumerate(t_list)
        ]
    return tensors, Scope.opened(scope, name)


def _tensor(norm: Any, scope: str) -> Any:
    """The norm as a tensor; that of no tensors at all is none yet."""
    if tf.is_tensor(norm):
        return norm
    with tf.name_scope(scope):
        return tf.constant(norm, name="global_norm")


def _is_leaf(leaf: Any) -> bool:
    return leaf is None or tf.is_tensor(leaf) or isinstance(leaf, tf.IndexedSlices)


class patch(Patch):  # noqa: N801  (used as a function)
    """Put `gradclip` in place of TensorFlow's functions, and of Keras's own use of them.

    From the call on, or within the ``with`` statement, ``tf.clip_by_global_norm`` and
    ``tf.linalg.global_norm``, in all modules of TensorFlow's that have them, and every Keras
    optimizer with a ``global_clipnorm`` clip by the exact norm. Functions traced before keep what
    they were traced with, and code that has imported them by name keeps TensorFlow's. ``undo()``
    puts back what was there before.

    >>> with patch():
    ...     tf.clip_by_global_norm is clip_by_global_norm
    True
    >>> tf.clip_by_global_norm is clip_by_global_norm
    False
    """

    def _install(self) -> None:
        # What is imported as tensorflow.compat.v2 is not the module that is tf.compat.v2.
        for version in ("v1", "v2"):
            importlib.import_module(f"tensorflow.compat.{version}")
        of_tensorflow = [
            module
            for name, module in sys.modules.items()
            if name.partition(".")[0] == "tensorflow" and isinstance(module, ModuleType)
        ]
        for function in (clip_by_global_norm, global_norm):
            name = function.__name__
            theirs = getattr(clip_ops, name)
            for module in of_tensorflow:
                if vars(module).get(name) is theirs:
                    self._put(module, name, function)
        if importlib.util.find_spec("keras"):
            from gradclip.keras.patch import Installed

            self._undo.append(Installed().undo)
