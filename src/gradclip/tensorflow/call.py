"""One call: what is asked, and what it is made of on the host and by TensorFlow's operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import tensorflow as tf

from gradclip.core.decide import check_clip_norm, check_use_norm
from gradclip.core.exact import Scaled
from gradclip.core.held import Clip
from gradclip.core.memory import Lesson, Memory
from gradclip.kernels.cpu.arithmetic import ieee_arithmetic
from gradclip.kernels.traced.clip import clip, clip_learning, norms_of_each
from gradclip.tensorflow import eager
from gradclip.tensorflow.derivative import grouped, pulled_back
from gradclip.tensorflow.leaf import checked, is_slices, tensor_of
from gradclip.tensorflow.limits import LIMIT, PLACE, SKIP, Packing
from gradclip.tensorflow.operations import Operations


@dataclass(frozen=True)
class Call:
    """A clip of tensors in a row by limits that are tensors.

    Args:
        clip: what was asked.
        policy: for a norm that is NaN or inf.
        tensors: of each leaf its values, of slices then the indices and the dense shape.
        limits: the limit, and the norm if it is given.
    """

    clip: Clip
    policy: Any
    tensors: list[Any]
    limits: list[Any]

    @property
    def inputs(self) -> list[Any]:
        """All that goes in."""
        return [*self.tensors, *self.limits]

    def parted(self, inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Tensors and limits."""
        count = len(self.tensors)
        return list(inputs[:count]), list(inputs[count:])

    @property
    def outputs(self) -> list[tuple[Any, Any]]:
        """Dtype and shape of what comes out: norm, norm as float64, and new values.

        Then, where they are wanted, the norms of each.
        """
        values = [parts[0] for parts in grouped(self.tensors)]
        wide = any(each.dtype in (tf.float64, tf.complex128) for each in values)
        dtype = tf.float64 if wide else tf.float32
        found = [(dtype, ()), (tf.float64, ()), *((each.dtype, each.shape) for each in values)]
        return [*found, (dtype, (len(values),))] if self.clip.wants_each else found

    @property
    def label(self) -> str:
        """By which a graph finds the gradient of a callback."""
        return f"GradclipClip_{self.policy}_{len(self.limits)}"

    def on_host(self, tensors: Sequence[Any], limits: Sequence[Any]) -> list[Any]:
        """What comes out, of eager tensors."""
        limit, *given = limits
        return self._by_host(tensors, _Run, limit, given[0] if given else None)

    def _by_host(
        self, tensors: Sequence[Any], kind: type[Clip], limit: Any, given: Any = None
    ) -> list[Any]:
        leaves = [_leaf(parts) for parts in grouped(tensors)]
        wants_each = self.clip.wants_each
        run = kind(leaves, self.clip.path, limit, given, self.policy, wants_each=wants_each)
        with ieee_arithmetic():  # TensorFlow's own threads flush subnormal numbers
            new, norm, exact = eager.hold(leaves, run.path).clipped_by_host(run)
            wide = float(exact)
        found = [norm, tf.constant(wide, tf.float64), *map(tensor_of, new)]
        return [*found, run.each] if wants_each else found

    def by_operations(self, tensors: Sequence[Any], limits: Sequence[Any]) -> list[Any]:
        """The same by TensorFlow's own operations."""
        (limit, *given), pairs = limits, _pairs(tensors)
        found = clip(Operations(), pairs, limit, given[0] if given else None, self.policy)
        return found + self._each_by_operations(pairs)

    def _each_by_operations(self, pairs: Sequence[tuple[Any, Any]]) -> list[Any]:
        return [norms_of_each(Operations(), pairs)] if self.clip.wants_each else []

    def pulled_back(
        self,
        inputs: Sequence[Any],
        results: Sequence[Any],  # noqa: ARG002  (where a limit is learnt it is among them)
        wide: Any,
        changes: Sequence[Any],
    ) -> list[Any]:
        """The gradient with respect to the inputs; ``wide`` is the norm that they have."""
        tensors, (limit, *given) = self.parted(inputs)
        return pulled_back(tensors, limit, given, self.policy, wide, _followed(tensors, changes))


@dataclass(frozen=True)
class Learning(Call):
    """A clip by a limit that learns.

    In a graph its ``limits`` are what is packed of it, and so is what comes out behind the values.
    In eager mode nothing goes in: the lesson knows.
    """

    lesson: Lesson
    packing: Packing

    @property
    def outputs(self) -> list[tuple[Any, Any]]:
        """Dtype and shape of what comes out."""
        return [*super().outputs, *((each.dtype, each.shape) for each in self.limits)]

    @property
    def label(self) -> str:
        """By which a graph finds the gradient of a callback."""
        return f"GradclipLearning_{self.policy}"

    def on_host(self, tensors: Sequence[Any], limits: Sequence[Any]) -> list[Any]:
        """What comes out, of eager tensors."""
        known = [self.packing.of_array(each.numpy()) for each in limits]
        lesson = self._lesson(known, None)
        new = self._by_host(tensors, Clip, lesson)
        return [*new, tf.constant(self.packing.array(*_found(lesson)))]

    def by_operations(self, tensors: Sequence[Any], limits: Sequence[Any]) -> list[Any]:
        """The same by TensorFlow's own operations."""
        known = [self.packing.of_tensor(each).state for each in limits]
        lesson, pairs = self._lesson(known, PLACE), _pairs(tensors)
        new = clip_learning(Operations(), pairs, lesson, self.policy, PLACE)
        new += self._each_by_operations(pairs)
        return [*new, self.packing.tensor(*_found(lesson))]

    def _lesson(self, known: Sequence[Any], place: Any) -> Lesson:
        """The lesson, or the same one from a state that was read before."""
        if not known:
            return self.lesson
        lesson, memory = self.lesson, Memory()
        memory.state, memory.keys, memory.place = known[0], lesson.keys, place
        return Lesson(lesson.kind, lesson.keys, memory)

    def pulled_back(
        self, inputs: Sequence[Any], results: Sequence[Any], wide: Any, changes: Sequence[Any]
    ) -> list[Any]:
        """The gradient with respect to the inputs, as if the limit were a number."""
        tensors, state = self.parted(inputs)
        packed = results[-1]
        if packed.shape.rank > 1:
            raise NotImplementedError(
                "a clip of each tensor by a limit of its own has no gradient: clip outside of the "
                "tape, or by one limit for all tensors"
            )
        limit = tf.where(packed[SKIP] > 0, tf.zeros_like(packed[LIMIT]), packed[LIMIT])
        new = pulled_back(tensors, limit, [], self.policy, wide, _followed(tensors, changes))
        return [*new[:-1], *(None for _ in state)]


def _found(lesson: Lesson) -> tuple[Any, Any, Any]:
    return lesson.in_force, lesson.skip, lesson.after


def call_of(clip: Clip) -> Call:
    """The call that a clip asks for, by limits as tensors; a limit that learns has no state yet."""
    tensors = _tensors_of(clip)
    if isinstance(clip.clip_norm, Lesson):
        if clip.use_norm is not None:
            raise ValueError(
                f"use_norm is given, and clip_norm is {clip.clip_norm!r}: in a graph or under a "
                "tape it learns from the norm that it measures"
            )
        packing = Packing.of(clip.clip_norm)
        return Learning(clip, clip.on_nonfinite, tensors, [], clip.clip_norm, packing)
    return Call(clip, clip.on_nonfinite, tensors, _limits_of(clip))


def _tensors_of(clip: Clip) -> list[Any]:
    tensors: list[Any] = []
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
    return tensors


def _limits_of(clip: Clip) -> list[Any]:
    """The limit, and the norm if it is given, as tensors."""
    limit = _scalar(clip.limit_name, clip.clip_norm, check_clip_norm)
    if clip.use_norm is None:
        return [limit]
    return [limit, _scalar(clip.norm_name, clip.use_norm, check_use_norm)]


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


def _followed(tensors: Sequence[Any], changes: Sequence[Any]) -> Sequence[Any]:
    """The changes of the norm, twice, and of new values: of what comes behind none is followed."""
    return changes[: 2 + len(grouped(tensors))]


def _pairs(tensors: Sequence[Any]) -> list[tuple[Any, Any]]:
    return [(values, *(slices[:1] or [None])) for values, *slices in grouped(tensors)]


def _leaf(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else tf.IndexedSlices(*parts)
