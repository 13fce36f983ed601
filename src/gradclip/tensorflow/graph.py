"""Tensors that a graph or a gradient tape follows, or that are where the host does not reach.

In a graph on the CPU it is one operation that calls back into this process; under XLA, on other
devices and in what is saved it is made of TensorFlow's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import record
from tensorflow.python.framework.func_graph import FuncGraph
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
from tensorflow.python.saved_model.save_context import in_save_context

from gradclip.core.decide import check_clip_norm, check_use_norm
from gradclip.core.exact import Scaled
from gradclip.core.held import Clip, Held
from gradclip.kernels.cpu.arithmetic import ieee_arithmetic
from gradclip.kernels.traced.clip import clip
from gradclip.tensorflow import eager
from gradclip.tensorflow.derivative import grouped, pulled_back
from gradclip.tensorflow.leaf import checked, is_slices, tensor_of, with_values
from gradclip.tensorflow.operations import Operations


def is_followed(values: Sequence[Any]) -> bool:
    """If a graph or a gradient tape records, or some tensors are elsewhere."""
    plain = tf.executing_eagerly() and not record.could_possibly_record() and _on_host(values)
    return not plain


def _on_host(values: Sequence[Any]) -> bool:
    """If the host's kernels can reach all tensors."""
    if _only_cpus():
        return True
    tensors = filter(tf.is_tensor, map(tensor_of, values))
    return all("CPU" in tensor.device for tensor in tensors)


def _only_cpus() -> bool:
    return all(device.device_type == "CPU" for device in tf.config.list_logical_devices())


class Followed(Held):
    """Leaves that are clipped by operations which a graph and a gradient tape know."""

    __slots__ = ()

    follows = True

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def clipped(self, clip: Clip) -> tuple[list[Any], Any]:
        """New leaves and the norm, by operations named as those of tf.clip_by_global_norm."""
        first = "global_norm" if clip.use_norm is None else "clip_by_global_norm"
        with tf.name_scope(clip.name or first) as scope:
            limit, given = _limits_of(clip)
            call = _Call.of(clip)
            norm, _, *new = _recorded(call, limit, given)
            if given:
                return _named(call, new, scope), norm
            norm = tf.identity(norm, name="global_norm")
        given_name = clip.name.given if isinstance(clip.name, Scope) else clip.name
        with tf.name_scope(given_name or "clip_by_global_norm") as scope:
            return _named(call, new, scope), norm

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def norm(self, clip: Clip) -> Any:
        """The global norm, by an operation named as that of tf.linalg.global_norm."""
        with tf.name_scope(clip.name or "global_norm"):
            norm, *_ = _measured(_Call.of(clip))
            return tf.identity(norm, name="global_norm")


class Scope(str):
    """The name of a name scope that a door has opened, to convert leaves there."""

    given: str | None  # the name that the door was given

    @classmethod
    def opened(cls, scope: str, given: str | None) -> Scope:
        """Of a scope, which it enters again wherever a name is asked for."""
        self = cls(scope)
        self.given = given
        return self


def _named(call: _Call, new: list[Any], scope: str) -> list[Any]:
    """The leaves with new elements, each beside the old ones and named by its place."""
    leaves = []
    clip, old = call.clip, [values for values, *_ in grouped(call.tensors)]
    for place, leaf, values, tensor in zip(clip.places, clip.leaves, old, new, strict=True):
        with _beside(values):
            named = tf.raw_ops.Identity(input=tensor, name=f"{scope}_{place}")
        leaves.append(with_values(leaf, named))
    return leaves


def _beside(tensor: Any) -> contextlib.AbstractContextManager[Any]:
    """Where operations are placed that go with a tensor's own."""
    if tf.executing_eagerly():
        return tf.device(tensor.device)  # type: ignore[no-any-return]
    graph = tf.compat.v1.get_default_graph()
    return graph.colocate_with(tensor.op)  # type: ignore[no-any-return]


# ---- limits ----


def _limits_of(clip: Clip) -> tuple[Any, list[Any]]:
    """The limit, and the norm if it is given, as tensors."""
    limit = _scalar(clip.limit_name, clip.clip_norm, check_clip_norm)
    if clip.use_norm is None:
        return limit, []
    return limit, [_scalar(clip.norm_name, clip.use_norm, check_use_norm)]


def _scalar(name: str, value: Any, check: Callable[[Any], Any]) -> Any:
    """A limit as a tensor; checked, where its value is known."""
    if not tf.is_tensor(value) or (tf.executing_eagerly() and not tf.is_symbolic_tensor(value)):
        check(value)
        return value if tf.is_tensor(value) else tf.constant(float(value), tf.float64)
    if not (value.dtype.is_floating or value.dtype.is_integer):
        raise TypeError(f"{name} is a tensor of {value.dtype.name}; it must be a real number")
    if not value.shape.is_compatible_with(()):
        raise ValueError(f"{name} is a tensor of shape {value.shape}; it must be a scalar")
    # Few operations take float8, and an integer would be taken for the indices of slices.
    few = value.dtype.is_integer or value.dtype.size == 1
    return tf.cast(value, tf.float64) if few else tf.convert_to_tensor(value)


class _Run(Clip):
    """A clip by limits that nobody could refuse: NaN gives NaN, and below 0 acts as 0."""

    __slots__ = ()

    def read(self) -> tuple[float, Scaled | None]:
        """The limit, and the norm if it is given."""
        given = None if self.use_norm is None else Scaled.of(max(float(self.use_norm), 0.0))
        return max(float(self.clip_norm), 0.0), given


# ---- one call ----


class _Call(NamedTuple):
    """One call: what was asked, and its leaves, as tensors in a row."""

    clip: Clip
    policy: Any
    tensors: list[Any]  # of each leaf its values, of slices then the indices and the dense shape

    @classmethod
    def of(cls, clip: Clip) -> _Call:
        """A call on the leaves of a clip."""
        tensors = []
        for place, leaf in enumerate(clip.leaves):
            tensors.append(tf.convert_to_tensor(checked(leaf, partial(clip.path, place))))
            if is_slices(leaf):
                shape = () if leaf.dense_shape is None else (leaf.dense_shape,)
                integers = [tf.convert_to_tensor(part) for part in (leaf.indices, *shape)]
                for part, field in zip(integers, ("indices", "dense_shape"), strict=False):
                    if not part.dtype.is_integer:
                        raise ValueError(
                            f"{clip.path(place)}.{field} is {part.dtype.name}; it holds integers"
                        )
                tensors += integers
        return cls(clip, clip.on_nonfinite, tensors)

    @property
    def dtype(self) -> Any:
        """That of the norm."""
        wide = any(tensor.dtype in (tf.float64, tf.complex128) for tensor in self.tensors)
        return tf.float64 if wide else tf.float32

    def on_host(self, tensors: Sequence[Any], limit: Any, given: Sequence[Any]) -> list[Any]:
        """Norm, norm as float64, and new values, of eager tensors."""
        leaves = [_leaf(parts) for parts in grouped(tensors)]
        path = self.clip.path
        run = _Run(leaves, path, limit, given[0] if given else None, self.policy)
        with ieee_arithmetic():  # TensorFlow's own threads flush subnormal numbers
            new, norm, exact = eager.hold(leaves, path).clipped_by_host(run)
            wide = float(exact)
        return [norm, tf.constant(wide, tf.float64), *map(tensor_of, new)]

    def by_callback(self, limit: Any, given: Sequence[Any]) -> list[Any]:
        """The same in a graph on the CPU."""
        parts, count = grouped(self.tensors), len(self.tensors)
        dtypes = [self.dtype, tf.float64, *(values.dtype for values, *_ in parts)]

        def clip(*inputs: Any) -> list[Any]:
            return self.on_host(inputs[:count], *_limits(inputs[count:]))

        inputs = [*self.tensors, limit, *given]
        # tf.gradients finds the gradient by the label, a tape by what it is told.
        label = {"EagerPyFunc": _label(self.policy, given)}
        graph = tf.compat.v1.get_default_graph()
        _mark_as_unsaveable(graph)
        with graph.gradient_override_map(label), record.stop_recording():
            results = tf.py_function(clip, inputs, dtypes)
        for result, shape in zip(results, [(), (), *(p[0].shape for p in parts)], strict=True):
            result.set_shape(shape)
        pull_back = partial(pulled_back, self.tensors, limit, given, self.policy, results[1])
        record.record_operation("GradclipClip", results, inputs, lambda *d: pull_back(d))
        return results  # type: ignore[no-any-return]

    def by_operations(self, tensors: Sequence[Any], limit: Any, given: Sequence[Any]) -> list[Any]:
        """The same by TensorFlow's own operations."""
        return clip(
            Operations(),
            [(parts[0], parts[1] if len(parts) > 1 else None) for parts in grouped(tensors)],
            limit,
            given[0] if given else None,
            self.policy,
        )


def _limits(inputs: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    return inputs[0], inputs[1:]


def _leaf(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else tf.IndexedSlices(*parts)


def _recorded(call: _Call, limit: Any, given: list[Any], *, elsewhere: bool = False) -> list[Any]:
    """Norm, norm as float64, and new values, with their gradient.

    ``elsewhere``: not on the host, whatever the graph says.
    """
    in_graph = not tf.executing_eagerly()
    elsewhere = elsewhere or not _on_host(call.tensors) or (in_graph and _leaves_the_host())
    if call.policy == "raise" and (in_graph or elsewhere):
        raise ValueError(
            'on_nonfinite is "raise"; what is traced, or on another device, cannot raise: '
            'choose "nan", "zero" or "keep"'
        )
    if in_graph and not elsewhere:
        return call.by_callback(limit, given)
    compute = call.by_operations if elsewhere else call.on_host
    inputs = [*call.tensors, limit, *given]

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(*inputs: Any) -> tuple[list[Any], Callable[..., list[Any]]]:
        tensors, limits = inputs[: len(call.tensors)], _limits(inputs[len(call.tensors) :])
        return compute(tensors, *limits), _gradient(call, tensors, *limits, elsewhere=elsewhere)

    if not in_graph:
        return run(*inputs)  # type: ignore[no-any-return]
    # In a graph it hides its operations from tf.gradients, but not from an accumulator.
    with record.stop_recording():
        results: list[Any] = run(*inputs)
    gradient = _gradient(call, call.tensors, limit, given, elsewhere=elsewhere)
    record.record_operation("GradclipClip", results, inputs, gradient)
    return results


def _measured(call: _Call, *, elsewhere: bool = False) -> list[Any]:
    """The norm, the norm as float64, and values that are the old ones."""
    kept = call._replace(policy="keep")
    return _recorded(kept, tf.constant(np.inf, tf.float64), [], elsewhere=elsewhere)


def _gradient(
    call: _Call, tensors: Sequence[Any], limit: Any, given: Sequence[Any], *, elsewhere: bool
) -> Callable[..., list[Any]]:
    """The gradient of a call with respect to these inputs, of which it may be measured again."""

    def gradient(*changes: Any) -> list[Any]:
        wide = _measured(call._replace(tensors=list(tensors)), elsewhere=elsewhere)[1]
        return pulled_back(tensors, limit, given, call.policy, wide, changes)

    return gradient


def _leaves_the_host() -> bool:
    """If the graph is one that XLA compiles, is placed on devices that are no CPU, or is saved.

    Of a ``tf.function`` that is saved TensorFlow saves another trace, made while it saves.
    """
    graph = tf.compat.v1.get_default_graph()
    return bool(GraphOrParentsInXlaContext(graph)) or not _only_cpus() or in_save_context()


# ---- what a graph knows of a callback ----

_WHY_NOT_SAVED = (
    "it calls gradclip and was traced before it is saved: on the CPU it calls back into this "
    "process, which no other can. Save the tf.function itself and no concrete function of it, or "
    "give it jit_compile=True; then it is made of TensorFlow's own operations"
)


def _mark_as_unsaveable(graph: Any) -> None:
    """Have TensorFlow refuse to save a function, and those that it is a branch or loop of."""
    while isinstance(graph, FuncGraph):
        graph.mark_as_unsaveable(_WHY_NOT_SAVED)
        graph = graph.outer_graph


def _label(policy: Any, given: Sequence[Any]) -> str:
    return f"GradclipClip_{policy}_{'given' if given else 'measured'}"


def _register(policy: str, given: int) -> None:
    @tf.RegisterGradient(_label(policy, [None] * given))  # type: ignore[untyped-decorator]
    def gradient(operation: Any, *changes: Any) -> list[Any]:
        inputs = list(operation.inputs)
        count = len(inputs) - 1 - given
        limits = _limits(inputs[count:])
        return pulled_back(inputs[:count], *limits, policy, operation.outputs[1], changes)


for _policy in ("nan", "zero", "keep"):
    for _given in (0, 1):
        _register(_policy, _given)
