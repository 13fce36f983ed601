"""Every Keras optimizer made exact, without naming any."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras

from gradclip.core.patch import Patch
from gradclip.keras.clipping import applying, by_global_norm, clip, keras_all_reduce


class Installed(Patch):
    """Makes ``global_clipnorm`` of every Keras optimizer exact.

    A ``tf.function`` that has been traced before keeps what it was traced with.
    """

    def _install(self) -> None:
        self._replace("_clip_gradients", lambda self, grads: clip(self, grads)[0])
        if keras_all_reduce is not None:
            self._replace("_all_reduce_sum_gradients", lambda _, grads_and_vars: grads_and_vars)
        owner, keras_own = _own("_backend_apply_gradients")

        @functools.wraps(keras_own)
        def apply(self: Any, grads: Any, trainable_variables: Any) -> None:
            with applying(trainable_variables):
                keras_own(self, grads, trainable_variables)

        self._put(owner, "_backend_apply_gradients", apply)

    def _replace(self, name: str, ours: Callable[[Any, Any], Any]) -> None:
        """Have Keras's base class call ``ours`` where it clips by the global norm."""
        owner, keras_own = _own(name)

        @functools.wraps(keras_own)
        def method(self: Any, argument: Any) -> Any:
            return (ours if by_global_norm(self) else keras_own)(self, argument)

        self._put(owner, name, method)


def _own(name: str) -> tuple[type, Any]:
    """The method of Keras's base class, and the class that has it."""
    owner = next(base for base in keras.Optimizer.__mro__ if name in vars(base))
    return owner, vars(owner)[name]
