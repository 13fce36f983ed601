"""Tensors that a graph or a gradient tape follows, or that are where the host does not reach.

In a graph on the CPU it is one operation that calls back into this process; under XLA, on other
devices and in what is saved it is made of TensorFlow's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import record
from tensorflow.python.framework.func_graph import FuncGraph
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
from tensorflow.python.saved_model.save_context import in_save_context

from gradclip.core.held import Clip, Held
from gradclip.core.limits import Ruling
from gradclip.tensorflow.call import Call, Learning, call_of
from gradclip.tensorflow.derivative import grouped
from gradclip.tensorflow.leaf import tensor_of, with_values
from gradclip.tensorflow.limits import PLACE, home_of
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
            call = call_of(clip)
            norm, _, *new = _clipped(call)
            if clip.wants_each:
                clip.each = _unfollowed(new.pop())
            if clip.use_norm is not None:
                return _named(call, new, scope), norm
            norm = tf.identity(norm, name="global_norm")
        given_name = clip.name.given if isinstance(clip.name, Scope) else clip.name
        with tf.name_scope(given_name or "clip_by_global_norm") as scope:
            return _named(call, new, scope), norm

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def norm(self, clip: Clip) -> Any:
        """The global norm, by an operation named as that of tf.linalg.global_norm."""
        with tf.name_scope(clip.name or "global_norm"):
            norm, *_ = _measured(call_of(clip))
            return tf.identity(norm, name="global_norm")

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def norms(self, clip: Clip) -> tuple[Any, Any]:
        """The norm of each leaf, of which a tape sees nothing, and the global norm."""
        clip.wants_each = True
        with tf.name_scope(clip.name or "norms"):
            norm, *_, each = _measured(call_of(clip))
            return _unfollowed(each), tf.identity(norm, name="global_norm")


class Scope(str):
    """The name of a name scope that a door has opened, to convert leaves there."""

    given: str | None  # the name that the door was given

    @classmethod
    def opened(cls, scope: str, given: str | None) -> Scope:
        """Of a scope, which it enters again wherever a name is asked for."""
        self = cls(scope)
        self.given = given
        return self


def _unfollowed(norms: Any) -> Any:
    return tf.stop_gradient(norms, name="norms")


def _named(call: Call, new: list[Any], scope: str) -> list[Any]:
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


# ---- one call ----


def _clipped(call: Call) -> list[Any]:
    """Norm, norm as float64, and new values, by what a graph and a gradient tape know."""
    if not isinstance(call, Learning) or tf.executing_eagerly():
        return _recorded(call)[: 2 + len(call.clip.leaves) + call.clip.wants_each]
    lesson = call.lesson
    home = None if lesson.passed else home_of(lesson)
    if home is None:
        state = lesson.begin(Operations(), PLACE)
        nothing = tf.zeros_like(state.count, tf.float64)
        known = call.packing.tensor(nothing, nothing, state)
    else:
        known = home.packed.read_value()
    *results, packed = _recorded(replace(call, limits=[known]))
    if home is None:
        limit, skip, after = call.packing.of_tensor(packed)
        lesson.keep(Ruling(limit, skip, None, after))
    else:
        home.packed.assign(packed)
        # Its variable lives as long as what was traced.
        tf.compat.v1.add_to_collection("gradclip limits", home)
    return results


def _recorded(call: Call, *, elsewhere: bool = False) -> list[Any]:
    """What comes out of a call, with its gradient.

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
        return _by_callback(call)
    compute = call.by_operations if elsewhere else call.on_host

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(*inputs: Any) -> tuple[list[Any], Callable[..., list[Any]]]:
        results = compute(*call.parted(inputs))
        return results, _gradient(call, inputs, results, elsewhere=elsewhere)

    if not in_graph:
        return run(*call.inputs)  # type: ignore[no-any-return]
    # In a graph it hides its operations from tf.gradients, but not from an accumulator.
    with record.stop_recording():
        results: list[Any] = run(*call.inputs)
    gradient = _gradient(call, call.inputs, results, elsewhere=elsewhere)
    record.record_operation("GradclipClip", results, call.inputs, gradient)
    return results


def _by_callback(call: Call) -> list[Any]:
    """What comes out of a call in a graph on the CPU."""

    def clip(*inputs: Any) -> list[Any]:
        return call.on_host(*call.parted(inputs))

    # tf.gradients finds the gradient by the label, a tape by what it is told.
    graph = tf.compat.v1.get_default_graph()
    _mark_as_unsaveable(graph)
    dtypes, shapes = zip(*call.outputs, strict=True)
    with graph.gradient_override_map({"EagerPyFunc": call.label}), record.stop_recording():
        results: list[Any] = tf.py_function(clip, call.inputs, dtypes)
    for result, shape in zip(results, shapes, strict=True):
        result.set_shape(shape)

    def gradient(*changes: Any) -> list[Any]:
        return call.pulled_back(call.inputs, results, results[1], changes)

    record.record_operation("GradclipClip", results, call.inputs, gradient)
    return results


def _measured(call: Call, *, elsewhere: bool = False) -> list[Any]:
    """The norm, the norm as float64, and values that are the old ones."""
    unlimited = Call(call.clip, "keep", call.tensors, [tf.constant(np.inf, tf.float64)])
    return _recorded(unlimited, elsewhere=elsewhere)


def _gradient(
    call: Call, inputs: Sequence[Any], results: Sequence[Any], *, elsewhere: bool
) -> Callable[..., list[Any]]:
    """The gradient of a call with respect to these inputs, of which it may be measured again."""

    def gradient(*changes: Any) -> list[Any]:
        tensors, _ = call.parted(inputs)
        wide = _measured(replace(call, tensors=tensors), elsewhere=elsewhere)[1]
        return call.pulled_back(inputs, results, wide, changes)

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


def _register(kind: Any, policy: str, count: int, *more: Any) -> None:
    label = kind(None, policy, [], [None] * count, *more).label

    @tf.RegisterGradient(label)  # type: ignore[untyped-decorator]
    def gradient(operation: Any, *changes: Any) -> list[Any]:
        inputs, results = list(operation.inputs), list(operation.outputs)
        place = len(inputs) - count
        call = kind(None, policy, inputs[:place], inputs[place:], *more)
        new: list[Any] = call.pulled_back(inputs, results, results[1], changes)
        return new


for _policy in ("nan", "zero", "keep"):
    for _count in (1, 2):
        _register(Call, _policy, _count)
    _register(Learning, _policy, 1, None, None)
