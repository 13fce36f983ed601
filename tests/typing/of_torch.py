"""What `gradclip` and `gradclip.torch` take and return of PyTorch's tensors."""

from typing import Any

import pytest
import torch
from told import assert_type
from torch import Tensor

import gradclip
import gradclip.torch
from gradclip import limits
from gradclip.torch import (
    Clipper,
    adaptive_clip_grad_,
    attach,
    clip_grad_norm_,
    clip_grads_with_norm_,
    clipper_of,
    get_total_norm,
    patch,
)

t = torch.tensor([3.0, 4.0])

# The front door.
assert_type(gradclip.clip_by_global_norm(t, 1.0), tuple[Tensor, Tensor])
assert_type(gradclip.clip_by_global_norm([t, None], 1.0), tuple[list[Tensor | None], Tensor])
assert_type(gradclip.clip_by_global_norm((t, t), t.sum()), tuple[tuple[Tensor, Tensor], Tensor])
assert_type(gradclip.clip_by_global_norm({"w": t}, 1.0), tuple[dict[str, Tensor], Tensor])
assert_type(gradclip.clip_by_global_norm(iter([t]), 1.0)[0], list[Tensor])
assert_type(gradclip.clip_by_global_norm_([t.clone()], limits.ZScore()), Tensor)
assert_type(gradclip.global_norm({"w": t}), Tensor)
assert_type(gradclip.global_norm(x for x in [t]), Tensor)
assert_type(gradclip.norms([t]), gradclip.Norms[Tensor, Tensor])
assert_type(gradclip.norms([t]).values, Tensor)

# PyTorch's own words.
model = torch.nn.Linear(2, 1)
model(t).sum().backward()
assert_type(clip_grad_norm_(model.parameters(), 1.0), Tensor)
assert_type(clip_grad_norm_(list(model.parameters()), torch.tensor(1.0), norms=False), Tensor)
assert_type(clip_grad_norm_(model.weight, 1, 2, True, None, on_nonfinite="raise"), Tensor)
named = clip_grad_norm_(model.named_parameters(), 1.0, norms=True)
assert_type(named, gradclip.Norms[Tensor, Tensor])
assert_type(named.global_norm, Tensor)
assert_type(
    clip_grad_norm_(dict(model.named_parameters()), limits.Percentile(), float("inf")), Tensor
)
wanted = bool(named)
assert_type(
    clip_grad_norm_(model.parameters(), 1.0, norms=wanted), Tensor | gradclip.Norms[Tensor, Tensor]
)
assert_type(get_total_norm([t, t]), Tensor)
assert_type(get_total_norm({"w": t}, 1, True), Tensor)
clip_grads_with_norm_(model.parameters(), 1.0, torch.tensor(2.0))
clip_grads_with_norm_(model.parameters(), limits.ZScore(), 2.0)
adaptive_clip_grad_(model.named_parameters(), clip_factor=0.02)

with patch(limit=limits.ZScore()) as patched:
    assert_type(patched, patch)
    patched.undo()

# What clips inside of a step.
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
clipper = attach(optimizer, 1.0, on_nonfinite="skip", per_tensor=True)
assert_type(clipper, Clipper)
assert_type(clipper_of(optimizer), Clipper | None)
optimizer.step()
assert_type(clipper.norm, Tensor)
assert_type(clipper.factor, Tensor)
assert_type(clipper.steps, Tensor)
assert_type(clipper.clipped_steps, Tensor)
assert_type(clipper.skipped_steps, Tensor)
assert_type(clipper.limit, Tensor | Any)
assert_type(clipper.norms.as_dict(), dict[str, float] | Any)
assert_type(clipper.state_dict(), dict[str, Any])
clipper.max_norm *= 0.5
clipper.max_norm = limits.ZScore()
clipper.max_norm = lambda step: 1.0 + step
clipper.remove()


def warming_up(step: int) -> float:
    return min(1.0, 0.01 * (step + 1))


for limit in (limits.PerTensor(limits.Average(1.05)), warming_up, torch.tensor(1.0), 1, [1.0]):
    attach(optimizer, limit).remove()
attach(optimizer, [warming_up]).remove()
attach(optimizer, (limits.ZScore(),)).remove()

# What neither takes.
with pytest.raises(TypeError):
    clip_grad_norm_(model.parameters(), "1")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
with pytest.raises(TypeError):
    clip_grad_norm_(model, 1.0)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
with pytest.raises(TypeError):
    clip_grad_norm_(model.parameters(), warming_up)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
with pytest.raises(ValueError, match="on_nonfinite"):
    clip_grad_norm_(model.parameters(), 1.0, on_nonfinite="skip")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
with pytest.raises(TypeError):
    attach(model.parameters(), 1.0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
with pytest.raises(TypeError):
    attach(optimizer, None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
with pytest.raises(ValueError, match="on_nonfinite"):
    attach(optimizer, 1.0, on_nonfinite="stop")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
with pytest.raises(TypeError):
    attach(optimizer, 1.0, "skip")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
with pytest.raises(AttributeError):
    clipper.norm = t  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
with pytest.raises(TypeError):
    patch(1.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
with pytest.raises(TypeError):
    limits.PerTensor(1.0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
