"""Keras 3 optimizers whose ``global_clipnorm`` clips by the exact norm of the whole gradient.

They are Keras's own classes, on its TensorFlow, JAX and torch backends; their names are Keras's:

>>> import gradclip.keras
>>> optimizer = gradclip.keras.Adam(1e-3, global_clipnorm=1.0)

What differs from ``keras.optimizers``, with ``global_clipnorm`` alone:

- the norm is correctly rounded, and no finite gradient overflows on the way to it;
- under ``tf.distribute`` gradients are summed over the replicas first and clipped then. Keras
  clips the part of each replica, so that its update can be as many times the limit as there are
  replicas;
- ``tf.IndexedSlices`` stay sparse, and rows with the same index count as their sum;
- 0, negative numbers and NaN are errors, ``inf`` only measures;
- the norm is kept: `GlobalNorm` logs it, and ``optimizer.last_global_norm`` is the latest.

``global_clipnorm`` may also be a limit of `gradclip.limits`, which sets itself:

>>> from gradclip import limits
>>> optimizer = gradclip.keras.Adam(1e-3, global_clipnorm=limits.ZScore())

What it learns, one norm for each update, is in a variable of the optimizer, and so in what Keras
saves: a loaded model goes on to the bit. The object that was given only says where to begin. With
``beyond="skip"`` an update that stands out leaves weights, state and ``iterations`` as they were;
torch waits for the device then, and several replicas of TensorFlow cannot. ``last_limit`` and
``skipped_steps`` of the optimizer tell of it. A step that a loss scale leaves out teaches nothing.

With ``global_clipnorm=None`` they are Keras's to the bit, and so they are with a ``clipnorm`` that
has been set beside it, by which Keras clips instead. What they save and copy is what Keras's do,
and the norms; the state that Keras's own optimizer has saved is taken over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from gradclip.core.versions import require

require("keras>=3.10", keras.__version__)

from gradclip.keras.callback import GlobalNorm
from gradclip.keras.optimizer import COMPOSITES, ExactGlobalNorm, exact
from gradclip.keras.optimizer import _restored as _restored

__all__ = ["GlobalNorm", "exact"]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """What a newer Keras has beside these."""

    class Adadelta(ExactGlobalNorm, keras.optimizers.Adadelta): ...

    class Adafactor(ExactGlobalNorm, keras.optimizers.Adafactor): ...

    class Adagrad(ExactGlobalNorm, keras.optimizers.Adagrad): ...

    class Adam(ExactGlobalNorm, keras.optimizers.Adam): ...

    class Adamax(ExactGlobalNorm, keras.optimizers.Adamax): ...

    class AdamW(ExactGlobalNorm, keras.optimizers.AdamW): ...

    class Ftrl(ExactGlobalNorm, keras.optimizers.Ftrl): ...

    class Lamb(ExactGlobalNorm, keras.optimizers.Lamb): ...

    class Lion(ExactGlobalNorm, keras.optimizers.Lion): ...

    class Muon(ExactGlobalNorm, keras.optimizers.Muon): ...

    class Nadam(ExactGlobalNorm, keras.optimizers.Nadam): ...

    class RMSprop(ExactGlobalNorm, keras.optimizers.RMSprop): ...

    class ScheduleFreeAdamW(ExactGlobalNorm, keras.optimizers.ScheduleFreeAdamW): ...

    class SGD(ExactGlobalNorm, keras.optimizers.SGD): ...


for _name, _class in list(vars(keras.optimizers).items()):
    if (
        isinstance(_class, type)
        and issubclass(_class, keras.Optimizer)
        and _class is not keras.Optimizer
        and not issubclass(_class, COMPOSITES)
    ):
        globals()[_name] = exact(_class)
        __all__ += [_name]  # noqa: PLE0604
