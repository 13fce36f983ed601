"""What `gradclip.keras` has for type checkers: Keras's own classes, and what ours add.

To mypy Keras has no types, and what is its own is Any; pyright reads its source.
"""

from pathlib import Path

import keras
import pytest
from told import assert_type

import gradclip
import gradclip.keras
from gradclip import limits
from gradclip.keras import SGD, Adam, GlobalNorm, exact

optimizer = Adam(1e-3, beta_1=0.8, global_clipnorm=1.0)
assert_type(optimizer, Adam)
learns = SGD(0.1, momentum=0.9, global_clipnorm=limits.ZScore())
for each in (optimizer, learns):
    weights = keras.Variable([0.0, 0.0])
    each.build([weights])
    each.apply([keras.ops.convert_to_tensor([3.0, 4.0])], [weights])
assert_type(float(optimizer.last_global_norm), float)
assert_type(learns.skipped_steps, int)
optimizer.watch_each()
assert_type(optimizer.last_norms, gradclip.Norms)
optimizer.global_clipnorm = 2.0

its_own = exact(keras.optimizers.SGD)(0.1, global_clipnorm=1.0)
callback = GlobalNorm(per_tensor=True, record=None)
assert_type(callback, GlobalNorm)

# Every optimizer that the installed Keras has is a class to a type checker, too.
named = Path(gradclip.keras.__file__).read_text()
for name in gradclip.keras.__all__:
    assert name in ("GlobalNorm", "exact") or f"class {name}(ExactGlobalNorm" in named, name

with pytest.raises(TypeError):
    GlobalNorm(True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
with pytest.raises(TypeError):
    optimizer.global_clipnorm = "1"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
