"""What clipping takes of the steps that train a transformer in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from time import perf_counter
from typing import Any

WIDTH, LAYERS, BATCH = 512, 6, (8, 64)

Turn = dict[str, float]


def steps_that_clip(shrink: int, *, clipping: bool) -> Iterator[Turn]:
    """Seconds in each system's clip_grad_norm_, between the backward pass and the step."""
    if not find_spec("torch"):
        return
    import torch

    from gradclip.torch import clip_grad_norm_

    model = _model(shrink)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    clips: dict[str, Any] = {"gradclip": clip_grad_norm_, "PyTorch": torch.nn.utils.clip_grad_norm_}
    while True:
        turn = {}
        for system, clip in clips.items():
            _backward(model, optimizer)
            turn[system] = _seconds(partial(clip, list(model.parameters()), _limit(clipping)))
            optimizer.step()
        yield turn


def steps_that_clip_inside(shrink: int, *, clipping: bool) -> Iterator[Turn]:
    """Seconds in all that `attach` adds: in its hooks, and to the step of the optimizer itself."""
    if not find_spec("torch"):
        return
    import torch

    from gradclip.torch import attach

    models = [_model(shrink), _model(shrink)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True) for m in models]
    watch = _Stopwatch()
    watch.around(models[1], optimizers[1], lambda: attach(optimizers[1], _limit(clipping)))
    while True:
        _backward(models[0], optimizers[0])
        parameters = list(models[0].parameters())
        theirs = _seconds(partial(torch.nn.utils.clip_grad_norm_, parameters, _limit(clipping)))
        plain = _seconds(optimizers[0].step)
        watch.total = 0.0
        _backward(models[1], optimizers[1])
        in_backward = watch.total
        whole = _seconds(optimizers[1].step)
        in_hooks = watch.total - in_backward
        # With nothing to clip both step alike, and what differs is noise.
        longer = whole - in_hooks - plain if clipping else 0.0
        yield {"gradclip": watch.total + longer, "PyTorch": theirs}


class _Stopwatch:
    """Adds up the time between two hooks: those of ``attach`` run in between."""

    def __init__(self) -> None:
        self.total = 0.0
        self._started = 0.0

    def _start(self, *_: Any) -> None:
        self._started = perf_counter()

    def _stop(self, *_: Any) -> None:
        self.total += perf_counter() - self._started

    def around(self, model: Any, optimizer: Any, attach: Callable[[], object]) -> None:
        """Put a hook before each that attach registers, and one after it."""
        starts = [
            (parameter, parameter.register_post_accumulate_grad_hook(self._start))
            for parameter in model.parameters()
        ]
        optimizer.register_step_pre_hook(self._start)
        optimizer.register_step_post_hook(self._start)
        attach()
        for parameter, handle in starts:
            if len(parameter._post_accumulate_grad_hooks) > 1:
                parameter.register_post_accumulate_grad_hook(self._stop)
            else:
                handle.remove()
        optimizer.register_step_pre_hook(self._stop)
        optimizer.register_step_post_hook(self._stop)


def _limit(clipping: bool) -> float:
    return 1e-6 if clipping else 1e9


def _model(shrink: int) -> Any:
    """18.9 million parameters in 72 tensors."""
    import torch

    torch.manual_seed(0)
    width = WIDTH if shrink == 1 else WIDTH // 4
    layer = torch.nn.TransformerEncoderLayer(
        width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True
    )
    return torch.nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)


def _backward(model: Any, optimizer: Any) -> None:
    import torch

    optimizer.zero_grad()
    width = next(model.parameters()).shape[-1]
    model(torch.ones((*BATCH, width))).square().mean().backward()


def _seconds(call: Callable[[], object]) -> float:
    started = perf_counter()
    call()
    return perf_counter() - started
