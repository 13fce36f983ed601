"""Hugging Face's Trainer: `GradientRecord` writes what it clips, tensor by tensor, into a record.

::

    from gradclip.transformers import GradientRecord

    trainer = transformers.Trainer(..., callbacks=[GradientRecord("run.db")])
    trainer.train()

Then ``gradclip report run.db``. A loop of one's own over accelerate needs none of it:
``record(step, gradclip.torch.clip_grad_norm_(model.named_parameters(), 1.0, norms=True))``.
"""

from __future__ import annotations

import os
from typing import Any, Unpack

from torch import Tensor
from transformers import TrainerCallback

from gradclip.record import Lent, Options, Record
from gradclip.torch.observing import Observed, Seen

__all__ = ["GradientRecord"]


class GradientRecord(TrainerCallback):
    """Records the norm of each gradient in each step of a ``Trainer``, as it was before clipping.

    While the trainer trains, ``torch.nn.utils.clip_grad_norm_``, by which it and accelerate clip,
    tells this callback of what it clips; who clips, and how, stays as it is. Under
    `gradclip.torch.patch` the norms come from the pass that clips, else from one pass more. Steps
    have the trainer's numbers: the first is 1.

    Under FullyShardedDataParallel in its first version, which has the gradients of many parameters
    in one tensor, there is the global norm alone. DeepSpeed clips by itself, and nothing is seen.

    Args:
        record: a `gradclip.Record`, or the path of one to open.
        options: of `gradclip.Record`, where it is a path: ``per_tensor_every``, ``log``, ...

    Raises:
        RuntimeError: at the end of a training in which nothing was clipped by that function.
    """

    def __init__(self, record: Record | str | os.PathLike[str], **options: Unpack[Options]) -> None:
        self._lent = Lent(record, options)
        self._observed: Observed | None = None
        self._names: dict[int, str] = {}
        self._seen: Seen | None = None
        self._steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002, D102
        self._record = self._lent.open()
        self._model = given["model"]
        self._names, self._seen, self._steps = {}, None, 0
        self._look_away()  # the training before may have ended by an exception
        self._observed = Observed(self._keep, self._names_of)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002, D102
        seen, self._seen = self._seen, None
        if seen is not None:
            self._record(state.global_step, seen.norms, limit=seen.limit)
            self._steps += 1

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002, D102
        self._look_away()
        self._lent.close()
        if state.global_step and not self._steps:
            raise RuntimeError(
                "gradclip.transformers.GradientRecord has seen no clip in this training: gradients "
                "were not clipped by torch.nn.utils.clip_grad_norm_, as under DeepSpeed"
            )

    def _look_away(self) -> None:
        if self._observed is not None:
            self._observed.undo()
            self._observed = None

    def _keep(self, seen: Seen) -> None:
        self._seen = seen

    def _names_of(self, parameters: list[Tensor]) -> list[str]:
        if not all(id(each) in self._names for each in parameters):
            named = self._model.named_parameters()  # of tied weights the first name
            self._names = {id(parameter): name for name, parameter in named}
        return [self._names.get(id(x), str(place)) for place, x in enumerate(parameters)]
