"""What the callbacks of trainers take."""

import pytest
from told import assert_type

import gradclip.lightning
import gradclip.transformers

recorded = gradclip.lightning.GradientRecord("run.db", per_tensor_every=10, hard=0.5)
assert_type(recorded, gradclip.lightning.GradientRecord)
seen = gradclip.transformers.GradientRecord(
    "run.db", log=lambda numbers, step: print(step, numbers)
)
assert_type(seen, gradclip.transformers.GradientRecord)

with pytest.raises(TypeError):
    gradclip.lightning.GradientRecord("run.db", every=10)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
with pytest.raises(TypeError):
    gradclip.transformers.GradientRecord("run.db", steps=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
