"""The global norm in the logs of ``fit``."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from typing import Any

import keras
import numpy as np

from gradclip.core.limits import Limit
from gradclip.keras.clipping import by_global_norm
from gradclip.keras.optimizer import DOOR, ExactGlobalNorm
from gradclip.record import Lent, Record


class GlobalNorm(keras.callbacks.Callback):  # type: ignore[misc]
    """Adds the global norm to the logs of each epoch of ``fit``.

    - ``global_norm``: the mean over the epoch's updates of the norm before clipping;
    - ``clipped``: the share of the epoch's updates that were clipped, from 0 to 1. An update counts
      as clipped if its norm was not at most the limit: above it, as inf is above every finite
      limit, or NaN. A limit that learns is the one in force in its step; where each tensor has one,
      an update counts that changed a tensor. Where the backend flushes subnormal numbers, such a
      norm counts as 0.

    With ``per_tensor=True`` also ``grad_norm/<path>`` of each trainable variable: the mean over the
    epoch's updates of the norm of its gradient, from the pass that clips; of one without a gradient
    0. The optimizer's ``last_norms`` has those of the latest update. A model that was fitted
    without it before is compiled once more.

    An update that a loss scale or gradient accumulation leaves out does not count; both are NaN
    in an epoch without any. The place in ``callbacks=`` does not matter: it moves to the front,
    so that CSVLogger, TensorBoard and all others find its numbers.

    Args:
        per_tensor: log the norm of each variable's gradient too.
        record: a `gradclip.Record`, or the path of one to open, which is told of each update: its
            norm, that of each variable with ``per_tensor``, the limit, and if a limit skipped it.
            Steps are the optimizer's ``iterations``, of which the first is 1, and those that a
            limit has skipped; with ``steps_per_execution`` the last of each execution is told. For
            it the host waits after each batch, as Keras does for the loss.

    Raises:
        TypeError: at the start of ``fit``, if the model's optimizer is none of `exact`, has no
            ``global_clipnorm``, or a ``clipnorm`` beside it, by which Keras clips instead.

    >>> import keras, numpy as np
    >>> model = keras.Sequential([keras.layers.Dense(1, "linear", False, "zeros")])
    >>> model.compile(exact(keras.optimizers.SGD)(1.0, global_clipnorm=1.0), "mse")
    >>> x, y = np.array([[3.0, 4.0]]), np.array([[0.5]])
    >>> history = model.fit(x, y, callbacks=[GlobalNorm()], verbose=0).history
    >>> print(history["global_norm"], history["clipped"])
    [5.0] [1.0]
    """

    __module__ = DOOR

    def __init__(
        self, *, per_tensor: bool = False, record: Record | str | os.PathLike[str] | None = None
    ) -> None:
        super().__init__()
        self._per_tensor = per_tensor
        self._lent = None if record is None else Lent(record, {})
        self._record: Record | None = None
        self._told, self._skipped = 0, 0

    def set_model(self, model: Any) -> None:
        """Take the model, and the first place among the callbacks."""
        super().set_model(model)
        # Callbacks share one dict of logs, one after the other, and are not shown their list.
        caller = sys._getframe(1).f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            caller.callbacks.remove(self)
            caller.callbacks.insert(0, self)
        # Keras makes the function for steps next, and takes variables only before.
        if self._per_tensor:
            self._watch(model)

    def _watch(self, model: Any) -> None:
        found = _inner_optimizer(model)
        # One that does not clip is refused where a fit begins; evaluate and predict need none.
        if not isinstance(found, ExactGlobalNorm) or not by_global_norm(found):
            return
        with _scope(model):
            if found.watch_each():
                model.train_function = None

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        """Find the optimizer, and open the record."""
        self._optimizer = _optimizer_of(self.model)
        self._record = None if self._lent is None else self._lent.open()
        self._told = self._skipped = 0  # one that is built by its first step begins
        if self._optimizer.built and self._record is not None:
            self._skipped = self._skips()
            self._told = int(self._optimizer.iterations) + self._skipped

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Tell the record of the update, if there was one."""
        if self._record is None:
            return
        _ = self.model  # at which Keras writes what JAX has computed into the variables
        optimizer = self._optimizer
        before, self._skipped = self._skipped, self._skips()
        step = int(optimizer.iterations) + self._skipped
        if step == self._told:
            return  # left out by a loss scale, or added to others
        self._told = step
        limit = optimizer.global_clipnorm
        if isinstance(limit, Limit):
            limit = optimizer.last_limit
        elif math.isinf(limit):
            limit = None
        source = optimizer.last_norms if self._per_tensor else optimizer.last_global_norm
        self._record(step, source, limit=limit, skipped=self._skipped > before)

    def _skips(self) -> int:
        """How many updates a limit that learns has left out."""
        limit = self._optimizer.global_clipnorm
        return self._optimizer.skipped_steps if isinstance(limit, Limit) else 0

    def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002
        """Have the record written."""
        if self._lent is not None:
            self._lent.close()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Start to count anew."""
        # Where the model's input shape is not known, it is not built before its first step.
        if self._optimizer.built:
            for variable in self._counts():
                self._optimizer.assign(variable, keras.ops.zeros(variable.shape))

    def _counts(self) -> list[Any]:
        each = self._optimizer._each
        return [self._optimizer._norms, *([] if each is None else [each.variable])]

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Write the epoch's mean and share into the logs."""
        _, mean, clipped, count = np.asarray(self._optimizer._norms.value).tolist()
        logs["global_norm"] = mean if count else math.nan
        logs["clipped"] = clipped / count if count else math.nan
        if self._per_tensor:
            for name, mean in self._optimizer._each.means().items():
                logs[f"grad_norm/{name}"] = mean if count else math.nan


def _optimizer_of(model: Any) -> Any:
    """The optimizer of a model, which clips by the global norm.

    Raises:
        TypeError: it does not.
    """
    found = _inner_optimizer(model)
    if not isinstance(found, ExactGlobalNorm) or found.global_clipnorm is None:
        raise TypeError(
            f"GlobalNorm needs an optimizer of gradclip.keras with a global_clipnorm (inf: "
            f"only measure), but the model has {found!r}"
        )
    if not by_global_norm(found):
        raise TypeError(
            f"GlobalNorm finds clipnorm {found.clipnorm!r} beside global_clipnorm "
            f"{found.global_clipnorm!r}: Keras clips by clipnorm then, and measures no global "
            "norm; set clipnorm to None"
        )
    return found


def _inner_optimizer(model: Any) -> Any:
    """The optimizer of a model, or that within its loss scale; None of one not compiled."""
    found = getattr(model, "optimizer", None)
    return getattr(found, "inner_optimizer", found)


def _scope(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Where variables of a model are made: on all replicas of TensorFlow."""
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()
