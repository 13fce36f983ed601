"""Gradients clipped within a Keras optimizer, in place of its own `_clip_gradients`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import keras

from gradclip._clip import clipped
from gradclip.core.limits import Limit

T = TypeVar("T")

_BACKENDS = "jax", "tensorflow", "torch"
keras_all_reduce = getattr(keras.Optimizer, "_all_reduce_sum_gradients", None)  # TensorFlow's


def by_global_norm(optimizer: Any) -> bool:
    """If Keras clips by the global norm: ``clipnorm`` comes before it, ``clipvalue`` after."""
    if optimizer.clipnorm and optimizer.clipnorm > 0:
        return False
    limit = optimizer.global_clipnorm
    return isinstance(limit, Limit) or bool(limit and limit > 0)


def clip(
    optimizer: Any, grads: Sequence[Any], *, wants_each: bool = False
) -> tuple[list[Any], Any, Any]:
    """Sum gradients over the replicas, if there are any, and clip the sums."""
    summed = sums(optimizer, grads)
    return clip_sums(summed, optimizer.global_clipnorm, wants_each=wants_each)


def sums(optimizer: Any, grads: Sequence[Any]) -> list[Any]:
    """Gradients summed over the replicas, if there are any, as tensors."""
    backend = keras.backend.backend()
    if backend not in _BACKENDS:
        raise NotImplementedError(f"Keras's backend is {backend}; gradclip has {list(_BACKENDS)}")
    if keras_all_reduce is not None:
        # Keras would warn of None by its variable.
        some = [(grad, None) for grad in grads if grad is not None]
        reduced = iter(keras_all_reduce(optimizer, some))
        grads = [None if grad is None else next(reduced)[0] for grad in grads]
    return [grad if _is_gradient(grad) else keras.ops.convert_to_tensor(grad) for grad in grads]


def clip_sums(grads: Sequence[Any], limit: Any, *, wants_each: bool) -> tuple[list[Any], Any, Any]:
    """Clip gradients that are summed; an error names each by its variable.

    Third comes the norm of each, but for those that are None, if it ``wants_each``.
    """
    called = partial(_called, _variables.get())
    return as_it_is(clipped)(grads, limit, called=called, wants_each=wants_each)


def as_it_is(function: Callable[..., T]) -> Callable[..., T]:
    """A function that no compiler of torch looks into.

    It would retrace what is in Python as torch operations, which round otherwise.
    """
    if keras.backend.backend() != "torch":
        return function
    import torch

    disabled: Any = torch.compiler.disable
    wrapped: Callable[..., T] = disabled(function)
    return wrapped


def replicas() -> int:
    """How many replicas take each step."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    count: int = tf.distribute.get_strategy().num_replicas_in_sync
    return count


def _is_gradient(grad: Any) -> bool:
    """If it is clipped as it is; a NumPy array, which Keras takes too, becomes a tensor."""
    return grad is None or keras.ops.is_tensor(grad) or is_slices(grad)


def is_slices(grad: Any) -> bool:
    """If it is some rows of a tensor of TensorFlow's."""
    return type(grad).__name__ == "IndexedSlices"


# Those whose gradients are being applied: `_clip_gradients` is not told.
_variables: ContextVar[Sequence[Any]] = ContextVar("_variables", default=())


@contextlib.contextmanager
def applying(variables: Sequence[Any]) -> Iterator[None]:
    """Have errors name the gradients by their variables."""
    token = _variables.set(variables)
    try:
        yield
    finally:
        _variables.reset(token)


def rows(optimizer: Any, grads: Sequence[Any]) -> list[int]:
    """The place of each gradient's variable among all that the optimizer was built with."""
    variables = _variables.get()
    if not variables:
        return [place for place, grad in enumerate(grads) if grad is not None]
    pairs = zip(grads, variables, strict=True)
    return [optimizer._get_variable_index(each) for grad, each in pairs if grad is not None]


def _called(variables: Sequence[Any], place: int) -> str:
    """What errors call the gradient at this place."""
    if place >= len(variables):
        return f"grads[{place}]"
    return f"grads[{path_of(variables[place])!r}]"


def path_of(variable: Any) -> str:
    """The name of a variable within its model."""
    return str(getattr(variable, "path", variable.name))
