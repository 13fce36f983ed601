"""Lightning: `GradientRecord` writes the norm of each gradient, in each step, into a record.

::

    from gradclip.lightning import GradientRecord

    trainer = lightning.Trainer(gradient_clip_val=1.0, callbacks=[GradientRecord("run.db")])
    trainer.fit(module)

Then ``gradclip report run.db``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any, Unpack

from gradclip.record import Lent, Options, Record
from gradclip.torch.observing import limit_in_force, measured

__all__ = ["GradientRecord"]

# Two packages have the same classes under two names, and a trainer wants its own.
_PACKAGE = "lightning.pytorch" if importlib.util.find_spec("lightning") else "pytorch_lightning"
_Callback: Any = importlib.import_module(_PACKAGE).Callback


class GradientRecord(_Callback):  # type: ignore[misc]
    """Records the norm of each gradient in each step of a ``Trainer``, as it was before clipping.

    Gradients are measured in one pass when the trainer is about to clip them; the limit is its
    ``gradient_clip_val``, or what `gradclip.torch.patch` has in its place. Steps are counted as
    ``trainer.global_step`` is: the first is 1.

    Under FullyShardedDataParallel in its first version, which has the gradients of many parameters
    in one tensor, there is the global norm alone. Under manual optimization gradients are measured
    when Lightning's optimizer steps: clipped already, if you clip them. PyTorch's own optimizer,
    which `gradclip.torch.attach` takes, steps unseen: record its clipper in ``training_step``.

    Args:
        record: a `gradclip.Record`, or the path of one to open.
        options: of `gradclip.Record`, where it is a path: ``per_tensor_every``, ``log``, ...

    Raises:
        RuntimeError: at the end of a training in which no optimizer stepped in its sight.
    """

    def __init__(self, record: Record | str | os.PathLike[str], **options: Unpack[Options]) -> None:
        self._lent = Lent(record, options)
        self._waiting: list[tuple[int, Any, Any]] = []  # steps, norms, limits
        self._batches = self._steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002, D102
        self._record = self._lent.open()
        self._waiting.clear()
        self._batches = self._steps = 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:  # noqa: D102
        known = {id(each) for group in optimizer.param_groups for each in group["params"]}
        named = {name: x for name, x in pl_module.named_parameters() if id(x) in known}
        by_value = trainer.gradient_clip_algorithm == "value"
        limit = None if by_value else trainer.gradient_clip_val
        self._waiting.append((trainer.global_step + 1, measured(named), limit))

    def on_train_batch_end(self, *_: Any) -> None:  # noqa: D102
        self._tell()
        self._batches += 1

    def _tell(self) -> None:
        """Record what the trainer has clipped by now."""
        for step, norms, limit in self._waiting:
            self._record(step, norms, limit=None if limit is None else limit_in_force(limit))
        self._steps += len(self._waiting)
        self._waiting.clear()

    def on_exception(self, *_: Any) -> None:  # noqa: D102
        self._tell()  # what has failed may be the clip
        self._lent.close()

    def on_train_end(self, *_: Any) -> None:  # noqa: D102
        self._lent.close()
        if self._batches and not self._steps:
            raise RuntimeError(
                "gradclip.lightning.GradientRecord has seen no step in this training: what steps "
                "is not Lightning's optimizer. Record by hand: record(step, clipper)"
            )
