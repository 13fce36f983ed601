"""TensorFlow: eager tensors, variables, tensors of a graph, and tf.IndexedSlices of them.

Eager tensors on the CPU go through the host's kernels, without a copy. So does a graph on the CPU,
by a callback. Under XLA and on other devices the same bits come from TensorFlow's own operations.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import record
from tensorflow.python.framework.func_graph import FuncGraph
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
from tensorflow.python.saved_model.save_context import in_save_context

from gradclip.core.decide import check_clip_norm, check_no_group, check_use_norm
from gradclip.core.exact import Scaled
from gradclip.core.protocol import Plain
from gradclip.core.sparse import IndexedSlices, check_rows, merged_rows
from gradclip.core.tree import Tree
from gradclip.kernels.cpu import ieee_arithmetic
from gradclip.kernels.cpu import leaves as host_leaves
from gradclip.kernels.cpu.leaves import Array, Held
from gradclip.kernels.traced.clip import clip
from gradclip.tensorflow.derivative import grouped, pulled_back
from gradclip.tensorflow.operations import Operations

measure, total, share = host_leaves.measure, host_leaves.total, host_leaves.share
queue, written = host_leaves.queue, host_leaves.written
check_there, everyone = host_leaves.check_there, host_leaves.everyone

_ACCEPTED = "float16, bfloat16, float8, float32, float64 and complex tensors"
_Slices = (tf.IndexedSlices, IndexedSlices)
_HOST = "/job:localhost/replica:0/task:0/device:CPU:0"


# ---- eager ----


def hold(leaves: Sequence[Any], path: Callable[[int], str], *, writable: bool) -> Held:
    """Check the leaves and take hold of their memory.

    Raises:
        TypeError: a leaf is of another dtype or type than those clipped; with ``writable``, it is
            no variable, or this is a graph.
        ValueError: slices are malformed.
    """
    if writable:
        if not tf.executing_eagerly():
            raise TypeError(
                "in a graph nothing is written in place; clip_by_global_norm returns new tensors"
            )
        leaves = _distinct_variables(leaves, path)
    if all(type(leaf) is tf.__internal__.EagerTensor and leaf.dtype in _NATIVE for leaf in leaves):
        held = host_leaves.hold_plain(leaves, list(map(_memory, leaves)), writable=False)
        if held is not None:
            return held
    values = [_values(leaf, partial(path, place)) for place, leaf in enumerate(leaves)]
    merged = _merged if any(isinstance(leaf, _Slices) for leaf in leaves) else None
    return host_leaves.hold(leaves, values, merged, path, writable=False)


def count_nonfinite(leaf: Any) -> tuple[int, int]:
    """How many elements are NaN, and how many are inf."""
    return host_leaves.nonfinite(_values(leaf, str))


def scalar(value: Scaled, held: Held, *, wide: bool = False) -> Any:
    """The norm as a tensor, where the first leaf is."""
    with tf.device(_tensor(held.leaves[0]).device if held.leaves else None):
        return tf.constant(host_leaves.scalar(value, held, wide=wide))


def copied(held: Held) -> list[Any]:
    """The leaves themselves: no tensor can be changed."""
    return [
        tf.convert_to_tensor(leaf) if isinstance(leaf, tf.Variable) else leaf
        for leaf in held.leaves
    ]


def filled(held: Held, value: float) -> list[Any]:
    """New leaves, every element ``value``."""
    return _written(held, lambda new: host_leaves.fill(new, value))


def scaled(held: Held, factor: Scaled) -> list[Any]:
    """New leaves, every element multiplied."""
    return _written(held, lambda new: host_leaves.scale(held, new, factor))


def fill_(held: Held, value: float) -> None:
    """Put ``value`` into every element of variables."""
    _assign(held, filled(held, value))


def scale_(held: Held, factor: Scaled) -> None:
    """Multiply every element of variables."""
    _assign(held, scaled(held, factor))


def _assign(held: Held, new: list[Any]) -> None:
    for variable, value in zip(held.leaves, new, strict=True):
        variable.assign(value)


_NATIVE = {tf.float16, tf.float32, tf.float64, tf.complex64, tf.complex128}


def _distinct_variables(leaves: Sequence[Any], path: Callable[[int], str]) -> list[Any]:
    """The leaves, each once.

    Raises:
        TypeError: one is no variable.
    """
    for place, leaf in enumerate(leaves):
        if not isinstance(leaf, tf.Variable):
            raise TypeError(
                f"{path(place)} is {type(leaf).__name__}, which cannot be written in place, as a "
                "tf.Variable can; clip_by_global_norm returns new tensors"
            )
    return list({id(leaf): leaf for leaf in leaves}.values())


def _tensor(leaf: Any) -> Any:
    """What holds the elements of a leaf."""
    return leaf.values if isinstance(leaf, _Slices) else leaf


def _values(leaf: Any, path: Callable[[], str]) -> Array:
    """The elements of a leaf as an array of the same memory."""
    tensor = _checked(leaf, path)
    values = _memory(tf.convert_to_tensor(tensor))
    if isinstance(leaf, _Slices):
        shape = None if leaf.dense_shape is None else tuple(np.asarray(leaf.dense_shape).tolist())
        check_rows(IndexedSlices(values, np.asarray(leaf.indices), shape), path)
    return values


def _checked(leaf: Any, path: Callable[[], str]) -> Any:
    """What holds the elements, of a dtype that is clipped."""
    tensor = _tensor(leaf)
    dtype = getattr(tensor, "dtype", None)
    composite = isinstance(tensor, tf.SparseTensor | tf.RaggedTensor)
    if composite or not isinstance(dtype, tf.DType):
        raise TypeError(f"{path()} is {type(tensor).__name__}; gradclip clips {_ACCEPTED}")
    if host_leaves.code_dtype(np.dtype(dtype.as_numpy_dtype)) is None:
        raise TypeError(f"{path()} is {dtype.name}; gradclip clips {_ACCEPTED}")
    return tensor


def _memory(tensor: Any) -> Array:
    """The memory of an eager tensor as an array; of float8, which has no such view, a copy."""
    if tensor.dtype in _NATIVE:
        return np.asarray(memoryview(tensor))
    if tensor.dtype == tf.bfloat16:
        codes: Array = np.asarray(memoryview(tf.bitcast(tensor, tf.uint16)))
        return codes.view(tf.bfloat16.as_numpy_dtype)
    copy: Array = np.asarray(tensor.numpy())
    return copy


def _merged(leaf: Any, values: Array) -> Iterator[Array] | None:
    if not isinstance(leaf, _Slices):
        return None
    return merged_rows(values, np.asarray(leaf.indices))


class _Writable:
    """Memory of a tensor that nobody else has seen yet."""

    def __init__(self, array: Array) -> None:
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}
        self.owner = array


def _written(held: Held, write: Callable[[list[Array]], None]) -> list[Any]:
    """New leaves, their elements written by ``write``."""
    shapes = _Shapes()
    with tf.device(_HOST):
        pairs = [_new(values, shapes) for values in held.values]
        write([array for _, array in pairs])
        new = [_finished(tensor, array) for tensor, array in pairs]
    return [_rewrap(leaf, tensor) for leaf, tensor in zip(held.leaves, new, strict=True)]


# Bytes from which on the allocator matters.
_LARGE = 1 << 18


class _Shapes(dict[tuple[int, ...], Any]):
    """Shapes as tensors, of which each costs more than an allocation."""

    def __missing__(self, shape: tuple[int, ...]) -> Any:
        self[shape] = tf.constant(shape, tf.int32)
        return self[shape]


def _new(values: Array, shapes: _Shapes) -> tuple[Any, Array]:
    """A tensor like an array, and its memory; no tensor yet if it is to be made of that."""
    if values.nbytes < _LARGE or values.itemsize == 1 or not _buffers_are_memory():
        return None, np.empty(values.shape, values.dtype)
    # TensorFlow's allocator, unlike NumPy's, hands out memory that has been in use before: none of
    # its pages has to be mapped and cleared first.
    code = tf.as_dtype(host_leaves.code_dtype(values.dtype))
    tensor = tf.raw_ops.Empty(shape=shapes[values.shape], dtype=code)
    memory: Array = np.asarray(_Writable(np.asarray(memoryview(tensor))))
    return tensor, memory.view(values.dtype)


@functools.cache
def _buffers_are_memory() -> bool:
    """If the buffer of a tensor is its memory: no TensorFlow promises that it is no copy."""
    tensor = tf.constant(np.zeros(_LARGE, np.uint8))
    views = [np.asarray(memoryview(tensor)) for _ in range(2)]
    return len({view.__array_interface__["data"] for view in views}) == 1


def _finished(tensor: Any, array: Array) -> Any:
    """The tensor of an array that has been written."""
    if tensor is None:  # it takes over the array's memory, or copies it
        return tf.__internal__.EagerTensor(array, _HOST, None)
    return tf.bitcast(tensor, tf.bfloat16) if tensor.dtype == tf.uint16 else tensor


def _rewrap(leaf: Any, tensor: Any) -> Any:
    """A leaf with new elements, where the old ones were."""
    device = _tensor(leaf).device
    if device not in (_HOST, ""):
        with tf.device(device):
            tensor = tf.identity(tensor)
    return _with_values(leaf, tensor)


def _with_values(leaf: Any, tensor: Any) -> Any:
    if isinstance(leaf, tf.IndexedSlices):
        return tf.IndexedSlices(tensor, leaf.indices, leaf.dense_shape)
    return leaf._replace(values=tensor) if isinstance(leaf, IndexedSlices) else tensor


# ---- recorded: in a graph, under a gradient tape, on another device ----


def workers(leaves: Sequence[Any], group: Any) -> None:
    """Nobody: there is no group for tensors of TensorFlow."""


def recorder(values: Sequence[Any], group: Any) -> _Recorder | None:
    """Who clips where a graph or a gradient tape records, or the tensors are elsewhere."""
    check_no_group(group)
    if tf.executing_eagerly() and not record.could_possibly_record() and _on_host(values):
        return None
    return _Recorder()


def _on_host(values: Sequence[Any]) -> bool:
    """If the host's kernels can reach all tensors."""
    if _only_cpus():
        return True
    tensors = filter(tf.is_tensor, map(_tensor, values))
    return all("CPU" in tensor.device for tensor in tensors)


def _only_cpus() -> bool:
    return all(device.device_type == "CPU" for device in tf.config.list_logical_devices())


class _Recorder:
    """Clips by operations that a graph and a gradient tape know."""

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def clip(
        self,
        tree: Tree,
        plain: Plain,
        clip_norm: Any,
        use_norm: Any,
        on_nonfinite: Any,
        name: str | None,
    ) -> tuple[list[Any], Any]:
        """New leaves and the norm, by operations named as those of tf.clip_by_global_norm."""
        first = "global_norm" if use_norm is None else "clip_by_global_norm"
        with tf.name_scope(name or first) as scope:
            limit = _scalar("clip_norm", clip_norm, check_clip_norm)
            given = [] if use_norm is None else [_scalar("use_norm", use_norm, check_use_norm)]
            call = _Call.of(tree, plain, on_nonfinite)
            norm, _, *new = _recorded(call, limit, given)
            if given:
                return _named(call, new, scope), norm
            norm = tf.identity(norm, name="global_norm")
        given_name = name.given if isinstance(name, Scope) else name
        with tf.name_scope(given_name or "clip_by_global_norm") as scope:
            return _named(call, new, scope), norm

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def norm(self, tree: Tree, plain: Plain, name: str | None) -> Any:
        """The global norm, by an operation named as that of tf.linalg.global_norm."""
        with tf.name_scope(name or "global_norm"):
            call = _Call.of(tree, plain, "keep")
            norm, *_ = _recorded(call, tf.constant(np.inf, tf.float64), [])
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
    tree, old = call.tree, [values for values, *_ in grouped(call.tensors)]
    for place, leaf, values, tensor in zip(tree.places, tree.leaves, old, new, strict=True):
        with _beside(values):
            named = tf.raw_ops.Identity(input=tensor, name=f"{scope}_{place}")
        leaves.append(_with_values(leaf, named))
    return leaves


def _beside(tensor: Any) -> contextlib.AbstractContextManager[Any]:
    """Where operations are placed that go with a tensor's own."""
    if tf.executing_eagerly():
        return tf.device(tensor.device)  # type: ignore[no-any-return]
    graph = tf.compat.v1.get_default_graph()
    return graph.colocate_with(tensor.op)  # type: ignore[no-any-return]


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


class _Call(NamedTuple):
    """One call: its leaves, as tensors in a row, and how to clip such leaves."""

    tree: Tree
    plain: Plain
    policy: Any
    tensors: list[Any]  # of each leaf its values, of slices then the indices and the dense shape

    @classmethod
    def of(cls, tree: Tree, plain: Plain, policy: Any) -> _Call:
        """A call on the leaves of a tree."""
        tensors = []
        for place, leaf in enumerate(tree.leaves):
            tensors.append(tf.convert_to_tensor(_checked(leaf, partial(tree.path, place))))
            if isinstance(leaf, _Slices):
                shape = () if leaf.dense_shape is None else (leaf.dense_shape,)
                integers = [tf.convert_to_tensor(part) for part in (leaf.indices, *shape)]
                for part, field in zip(integers, ("indices", "dense_shape"), strict=False):
                    if not part.dtype.is_integer:
                        raise ValueError(
                            f"{tree.path(place)}.{field} is {part.dtype.name}; it holds integers"
                        )
                tensors += integers
        return cls(tree, plain, policy, tensors)

    @property
    def dtype(self) -> Any:
        """That of the norm."""
        wide = any(tensor.dtype in (tf.float64, tf.complex128) for tensor in self.tensors)
        return tf.float64 if wide else tf.float32

    def on_host(self, tensors: Sequence[Any], limit: Any, given: Sequence[Any]) -> list[Any]:
        """Norm, norm as float64, and new values, of eager tensors."""
        with ieee_arithmetic():  # TensorFlow's own threads flush subnormal numbers
            use_norm = max(float(given[0]), 0.0) if given else None
            leaves, norm, wide = self.plain(
                [_leaf(parts) for parts in grouped(tensors)],
                max(float(limit), 0.0),
                use_norm,
                self.policy,
            )
        return [norm, tf.constant(wide, tf.float64), *map(_tensor, leaves)]

    def by_callback(self, tensors: Sequence[Any], limit: Any, given: Sequence[Any]) -> list[Any]:
        """The same in a graph on the CPU."""
        parts = grouped(tensors)
        dtypes = [self.dtype, tf.float64, *(values.dtype for values, *_ in parts)]

        def clip(*inputs: Any) -> list[Any]:
            return self.on_host(inputs[: len(tensors)], *_limits(inputs[len(tensors) :]))

        inputs = [*tensors, limit, *given]
        # tf.gradients finds the gradient by the label, a tape by what it is told.
        label = {"EagerPyFunc": _label(self.policy, given)}
        graph = tf.compat.v1.get_default_graph()
        _mark_as_unsaveable(graph)
        with graph.gradient_override_map(label), record.stop_recording():
            results = tf.py_function(clip, inputs, dtypes)
        for result, shape in zip(results, [(), (), *(p[0].shape for p in parts)], strict=True):
            result.set_shape(shape)
        pull_back = partial(pulled_back, tensors, limit, given, self.policy, results[1])
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
        return call.by_callback(call.tensors, limit, given)
    compute = call.by_operations if elsewhere else call.on_host
    inputs = [*call.tensors, limit, *given]

    def gradient_of(
        tensors: Sequence[Any], limit: Any, given: Sequence[Any]
    ) -> Callable[..., list[Any]]:
        def gradient(*changes: Any) -> list[Any]:
            again = call._replace(tensors=list(tensors), policy="keep")
            wide = _recorded(again, tf.constant(np.inf, tf.float64), [], elsewhere=elsewhere)[1]
            return pulled_back(tensors, limit, given, call.policy, wide, changes)

        return gradient

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(*inputs: Any) -> tuple[list[Any], Callable[..., list[Any]]]:
        tensors, limits = inputs[: len(call.tensors)], _limits(inputs[len(call.tensors) :])
        return compute(tensors, *limits), gradient_of(tensors, *limits)

    if not in_graph:
        return run(*inputs)  # type: ignore[no-any-return]
    # In a graph it hides its operations from tf.gradients, but not from an accumulator.
    with record.stop_recording():
        results: list[Any] = run(*inputs)
    gradient = gradient_of(call.tensors, limit, given)
    record.record_operation("GradclipClip", results, inputs, gradient)
    return results


def _leaves_the_host() -> bool:
    """If the graph is one that XLA compiles, is placed on devices that are no CPU, or is saved.

    Of a ``tf.function`` that is saved TensorFlow saves another trace, made while it saves.
    """
    graph = tf.compat.v1.get_default_graph()
    return bool(GraphOrParentsInXlaContext(graph)) or not _only_cpus() or in_save_context()


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
