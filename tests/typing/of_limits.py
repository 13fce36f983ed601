"""What `gradclip.limits` has for type checkers."""

from typing import Any

import numpy as np
import pytest
from told import assert_type

import gradclip
from gradclip.limits import Average, Percentile, PerTensor, ZScore

assert_type(gradclip.limits.ZScore(), ZScore)  # without an import of its own
limit = ZScore(4, warmup=2, limit=10.0, beyond="skip", log=True, learn_from="raw")
gradclip.clip_by_global_norm([np.ones(2)], limit)
assert_type(limit.z, float)
assert_type(limit.warmup, int)
assert_type(limit.skips, bool)
assert_type(Percentile(50, 100, 2.0).history, int)
assert_type(Average(1.05).factor, float)
assert_type(PerTensor(Average(1.05)).kind, ZScore | Percentile | Average)
assert_type(limit.state_dict(), dict[str, Any])
limit.load_state_dict(limit.state_dict())

with pytest.raises(ValueError, match="beyond"):
    ZScore(beyond="far")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
with pytest.raises(ValueError, match="learn_from"):
    Average(2.0, learn_from="all")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
with pytest.raises(TypeError):
    ZScore(z="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
with pytest.raises(TypeError):
    Percentile(history=1e4)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
with pytest.raises(TypeError):
    Average()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
with pytest.raises(TypeError):
    PerTensor(PerTensor(ZScore()))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
with pytest.raises(AttributeError):
    limit.z = 1.0  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
