"""`gradclip.torch.attach`: copies, limits that change, steps skipped or failed, arguments."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import math
import pickle
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

from conftest import version

if version("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)
import torch

import gradclip.torch as gtorch

SIZES = [2, 40_000]  # measured in the step; and as it is written


def raises(error: type[Exception], text: str) -> Any:
    """The error with exactly this text."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def weights(*sizes: int) -> list[Any]:
    return [torch.nn.Parameter(torch.zeros(size)) for size in sizes]


def backward(parameters: Any, factor: float = 3.0) -> None:
    sum(p.sum() for p in parameters).mul(factor).backward()


def moved(optimizer: Any) -> float:
    """How far one step of gradients of 3 takes weights that begin at 0 and a rate of 1."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    optimizer.zero_grad()
    backward(parameters)
    optimizer.step()
    return distance(parameters, before)


def distance(ones: Any, others: Any) -> float:
    pairs = zip(ones, others, strict=True)
    return float(sum((a.detach() - b).double().square().sum() for a, b in pairs)) ** 0.5


def saved(thing: Any) -> Any:
    stream = io.BytesIO()
    torch.save(thing, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": saved,
}


# ---- copies ----


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_clips_too(how: str, size: int, fused: bool) -> None:
    optimizer = torch.optim.SGD(weights(size), lr=1.0, fused=fused)
    clipper = gtorch.attach(optimizer, 0.25)
    assert moved(optimizer) == pytest.approx(0.25, rel=1e-5)
    copied = COPIES[how](optimizer)
    for _ in range(2):
        assert moved(copied) == pytest.approx(0.25, rel=1e-5)
    assert not hasattr(copied, "grad_scale")
    of_copy = gtorch.clipper_of(copied)
    assert of_copy is not None
    assert of_copy is not clipper
    assert (of_copy.steps, of_copy.clipped_steps, of_copy.max_norm) == (3, 3, 0.25)
    assert moved(COPIES[how](copied)) == pytest.approx(0.25, rel=1e-5)  # of a copy, too
    assert int(clipper.steps) == 1
    of_copy.remove()
    assert gtorch.clipper_of(copied) is None
    assert moved(copied) == pytest.approx(3 * size**0.5)
    assert moved(optimizer) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_within_another_object(how: str) -> None:
    model = torch.nn.Linear(200, 200)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    clipper = gtorch.attach(optimizer, [0.25])
    backward(model.parameters())
    optimizer.step()
    things = {"m": model, "o": optimizer, "c": clipper}
    for bag in (things, dict(reversed(things.items()))):
        copied = COPIES[how](bag)
        before = [p.detach().clone() for p in copied["m"].parameters()]
        copied["o"].zero_grad()
        backward(copied["m"].parameters())
        copied["o"].step()
        assert distance(copied["m"].parameters(), before) == pytest.approx(0.25, rel=1e-4)
        assert copied["c"].steps == 2
        assert torch.equal(copied["c"].norm, clipper.norm)
        assert torch.equal(copied["c"].factor, clipper.factor)
    assert clipper.steps == 1


def test_what_a_copy_is_told_before_its_first_step() -> None:
    optimizer = torch.optim.SGD(weights(2), lr=1.0)
    clipper = gtorch.attach(optimizer, 0.25, on_nonfinite="skip")
    moved(optimizer)
    copied = copy.deepcopy(clipper)
    assert repr(copied) == repr(clipper)
    assert copied._optimizer is not optimizer
    with pytest.raises(ValueError, match=r"^the optimizer has a clipper already, as a copy of"):
        gtorch.attach(copied._optimizer, 1.0)


def test_a_copy_that_cannot_be_clipped_is_not_made() -> None:
    optimizer = torch.optim.SGD(weights(2), lr=1.0)
    clipper = gtorch.attach(optimizer, lambda step: 1.0 / (step + 1))
    again = "remove() the clipper before, and attach again"
    text = (
        "the schedule of a clipper is a function within another, or a lambda, and cannot be "
        f"pickled: {again}"
    )
    with raises(TypeError, text):
        pickle.dumps(optimizer)
    assert moved(copy.deepcopy(optimizer)) == pytest.approx(1.0)
    clipper.remove()
    assert moved(COPIES["pickle"](optimizer)) == pytest.approx(3 * 2**0.5)

    class Own(torch.optim.SGD):
        def __getstate__(self) -> Any:
            return [self.param_groups]

    gtorch.attach(own := Own(weights(2)), 1.0)
    text = (
        "such a copy of {} would not be clipped: use copy.deepcopy where the class has no copying "
        f"of its own, or {again}"
    )
    with raises(TypeError, text.format("Own")):
        copy.deepcopy(own)
    gtorch.attach(optimizer, 1.0)
    with raises(TypeError, text.format("SGD")):
        copy.copy(optimizer)
    with raises(TypeError, "a clipper is copied with its optimizer, by copy.deepcopy"):
        copy.copy(gtorch.clipper_of(optimizer))
    assert moved(optimizer) == pytest.approx(1.0)


def test_hooks_of_others_do_not_take_the_clipper_s_place_in_a_copy() -> None:
    optimizer = torch.optim.SGD(weights(2), lr=1.0)
    gtorch.attach(optimizer, 0.25)
    calls: list[int] = []
    copied = COPIES["pickle"](optimizer)
    handles = [copied.register_step_pre_hook(lambda *_: calls.append(1)) for _ in range(3)]
    assert moved(copied) == pytest.approx(0.25)
    assert calls == [1, 1, 1]
    for handle in handles:
        handle.remove()
    assert moved(copied) == pytest.approx(0.25)


# ---- which steps divide ----


def test_a_fused_optimizer_with_a_step_of_its_own_gets_clipped_gradients() -> None:
    class Descent(torch.optim.AdamW):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # noqa: ARG002
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(parameter.grad, alpha=-group["lr"])

    for size in SIZES:
        optimizer = Descent(weights(size), lr=1.0, fused=True)
        gtorch.attach(optimizer, 0.25)
        assert moved(optimizer) == pytest.approx(0.25, rel=1e-5)


def test_a_step_that_was_replaced_gets_clipped_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Any, closure: Any = None) -> None:  # noqa: ARG001
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(parameter.grad)

    optimizer = torch.optim.SGD(weights(40_000), lr=1.0, fused=True)
    for disguise in (lambda f: f, functools.wraps(torch.optim.SGD.step)):
        replaced = torch.optim.SGD.profile_hook_step(disguise(step))
        replaced.hooked = True
        monkeypatch.setattr(torch.optim.SGD, "step", replaced)
        gtorch.attach(optimizer, 0.25)
        assert moved(optimizer) == pytest.approx(0.25, rel=1e-5)
        gtorch.clipper_of(optimizer).remove()
    gtorch.attach(optimizer, 0.25)
    assert moved(optimizer) == pytest.approx(0.25, rel=1e-5)


def test_a_fused_step_sees_and_leaves_its_optimizer_as_it_is() -> None:
    optimizer = torch.optim.SGD(weights(2), lr=1.0, momentum=0.5, fused=True)
    gtorch.attach(optimizer, 0.25)
    names = set(vars(optimizer))
    assert optimizer._need_device_dtype_check_for_fused
    moved(optimizer)
    assert set(vars(optimizer)) == names
    assert not optimizer._need_device_dtype_check_for_fused  # as the step has set it
    assert len(optimizer.state) == 1


# ---- a step that fails ----


@pytest.mark.parametrize("where", ["hook", "step"])
@pytest.mark.parametrize("fused", [False, True])
def test_after_a_step_that_raised_nothing_is_left(
    fused: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = torch.optim.SGD(weights(4), lr=1.0, fused=fused)
    clipper = gtorch.attach(optimizer, 1.0)
    moved(optimizer)
    names = set(vars(optimizer))
    backward(optimizer.param_groups[0]["params"], 500.0)
    failing = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with monkeypatch.context() as patched:
        if where == "step":
            failing.remove()
            patched.setattr(sys.modules["torch.optim.sgd"], "sgd", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError) as held:
            optimizer.step()
    assert held.traceback  # which keeps the failed step's frames alive
    assert set(vars(optimizer)) == names
    assert (clipper.steps, clipper.clipped_steps) == (1, 1)
    failing.remove()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer.zero_grad()
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    scaler.scale(optimizer.param_groups[0]["params"][0].sum() * 0.1).backward()
    scaler.step(optimizer)
    gone = before - optimizer.param_groups[0]["params"][0].detach()
    torch.testing.assert_close(gone, torch.full((4,), 0.1))
    assert (clipper.steps, clipper.clipped_steps) == (2, 1)


def test_a_step_in_the_handler_of_one_that_failed_is_clipped() -> None:
    optimizer = torch.optim.SGD(weights(2), lr=1.0)
    gtorch.attach(optimizer, 0.25)
    failing = optimizer.register_step_post_hook(lambda *_: 1 / 0)
    try:
        moved(optimizer)
    except ZeroDivisionError:
        failing.remove()
        assert moved(optimizer) == pytest.approx(0.25)


# ---- the limit ----


def test_the_limit_can_be_read_and_set() -> None:
    optimizer = torch.optim.SGD(weights(2), lr=1.0)
    clipper = gtorch.attach(optimizer, 1)
    assert clipper.max_norm == 1.0
    clipper.max_norm = torch.tensor(0.25)
    assert clipper.max_norm == 0.25
    assert moved(optimizer) == pytest.approx(0.25)
    with raises(ValueError, "max_norm is -1; it must be above 0 (inf: only measure)"):
        clipper.max_norm = -1
    with raises(TypeError, "max_norm is 'small'; it must be a real number"):
        clipper.max_norm = "small"
    text = "max_norm is [1.0, 2.0]; this clipper has one limit for all groups: attach another"
    with raises(ValueError, text):
        clipper.max_norm = [1.0, 2.0]
    assert clipper.max_norm == 0.25
    clipper.remove()
    groups = [{"params": weights(2)}, {"params": weights(2)}]
    clipper = gtorch.attach(torch.optim.SGD(groups), [1.0, 2.0])
    clipper.max_norm = [1.0, lambda _: 3.0]
    assert clipper.max_norm[0] == 1.0
    with raises(ValueError, "max_norm is 3; this clipper has 2 limits: attach another"):
        clipper.max_norm = 3
    with pytest.raises(AttributeError):
        clipper.max_nrom = 0.5
    with pytest.raises(AttributeError):
        clipper.steps = 0  # type: ignore[misc]


def test_a_schedule() -> None:
    optimizer = torch.optim.SGD(weights(2), lr=1.0)
    seen: list[int] = []

    def limit(step: int) -> float:
        seen.append(step)
        return 1.0 / (step + 1)

    clipper = gtorch.attach(optimizer, limit)
    assert clipper.max_norm is limit
    assert [moved(optimizer) for _ in range(3)] == pytest.approx([1, 1 / 2, 1 / 3])
    assert seen == [0, 1, 2]
    clipper.max_norm = lambda step: 0.0 if step == 3 else 1.0
    with raises(ValueError, "max_norm(3) is 0.0; it must be above 0 (inf: only measure)"):
        moved(optimizer)
    clipper.max_norm = 0.5
    assert moved(optimizer) == pytest.approx(0.5)
    assert int(clipper.steps) == 4


def test_what_a_clipper_shows() -> None:
    optimizer = torch.optim.SGD(weights(1), lr=1.0)
    clipper = gtorch.attach(optimizer, 1.5)
    moved(optimizer)
    assert repr(clipper) == (
        "Clipper(max_norm=1.5, norm=3.0, factor=0.5, steps=1, clipped_steps=1, skipped_steps=0)"
    )


def test_counts_go_on_after_a_resume() -> None:
    def new() -> tuple[Any, Any]:
        optimizer = torch.optim.SGD(weights(1), lr=1.0)
        schedule = lambda step: 1.0 / (step + 1)  # noqa: E731
        return optimizer, gtorch.attach(optimizer, schedule, on_nonfinite="skip")

    optimizer, clipper = new()
    moved(optimizer)
    optimizer.param_groups[0]["params"][0].grad = torch.full((1,), math.nan)
    optimizer.step()
    state = saved(clipper.state_dict())
    assert state == {"begun": 2, "steps": 1, "clipped_steps": 1, "skipped_steps": 1}
    optimizer, clipper = new()
    clipper.load_state_dict(state)
    assert moved(optimizer) == pytest.approx(1 / 3)
    assert clipper.state_dict() == {"begun": 3, "steps": 2, "clipped_steps": 2, "skipped_steps": 1}
    for wrong in ({"steps": 3}, {**state, "steps": -1}, {**state, "skipped_steps": True}):
        with raises(ValueError, f"the state is {wrong!r}; it must be of Clipper.state_dict()"):
            clipper.load_state_dict(wrong)
    assert clipper.state_dict() == {"begun": 3, "steps": 2, "clipped_steps": 2, "skipped_steps": 1}


# ---- steps that are skipped ----


def optimizers() -> list[Any]:
    """Every optimizer of PyTorch whose step can be clipped, and one that is none of its own."""

    class Foreign(torch.optim.Optimizer):
        """Keeps what it knows in all places where an optimizer may."""

        def __init__(self, params: Any) -> None:
            self.turns = 0
            super().__init__(params, {"turns": 0})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # noqa: ARG002
            self.turns += 1
            for group in self.param_groups:
                group["turns"] += 1
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        state = self.state[parameter]
                        state["sum"] = state.get("sum", 0) + parameter.grad
                        parameter.sub_(state["sum"])

    found: list[Any] = [Foreign]
    for kind in vars(torch.optim).values():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            options = inspect.signature(kind).parameters
            if kind not in (torch.optim.Optimizer, torch.optim.LBFGS):
                found.append(kind)
                if "fused" in options:
                    found.append(lambda p, kind=kind: kind(p, fused=True))
    return found


def everything(optimizer: Any) -> bytes:
    """All that an optimizer has and has made, to the bit."""
    turns = vars(optimizer).get("turns")
    return pickle.dumps((optimizer.state_dict(), optimizer.param_groups, turns))


@pytest.mark.slow
@pytest.mark.parametrize("make", optimizers())
def test_a_step_that_is_skipped_changes_nothing(make: Any) -> None:
    parameters = [torch.nn.Parameter(torch.ones(200, 200)), torch.nn.Parameter(torch.ones(3, 3))]
    optimizer = make(parameters)
    clipper = gtorch.attach(optimizer, 1.0, on_nonfinite="skip")

    def step(bad: float | None) -> bool:
        optimizer.zero_grad()
        sum((p**2).sum() for p in parameters).backward()
        if getattr(optimizer, "defaults", {}).get("sparse"):
            return False
        if bad is not None:
            parameters[0].grad[0, 0] = bad
        if type(optimizer) is torch.optim.SparseAdam:
            for parameter in parameters:
                parameter.grad = parameter.grad.to_sparse()
        before, grads = everything(optimizer), [p.grad for p in parameters]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(parameters, grads, strict=True))
        return everything(optimizer) == before

    changed = [step(bad) for bad in (math.nan, None, math.inf, None, math.nan)]
    assert changed == [True, False, True, False, True]
    assert (clipper.steps, clipper.skipped_steps) == (2, 3)
    assert (clipper.factor, bool(clipper.norm.isnan())) == (1, True)


def test_skipping_with_a_limit_per_group_and_a_scheduler() -> None:
    groups = [{"params": weights(2)}, {"params": weights(2)}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    clipper = gtorch.attach(optimizer, [1.0, 1.0], on_nonfinite="skip")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    backward([p for group in groups for p in group["params"]])
    groups[1]["params"][0].grad[0] = math.inf
    optimizer.step()
    scheduler.step()
    assert not any(p.any() for group in groups for p in group["params"])
    assert clipper.skipped_steps == 1
    assert clipper.norm.tolist() == [pytest.approx(18**0.5), math.inf]
    assert groups[0]["params"][0].grad.tolist() == [3, 3]  # not clipped, either


@pytest.mark.parametrize("fused", [False, True])
def test_skipping_with_gradscaler(fused: bool) -> None:
    (weight,) = parameters = weights(2)
    optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=0.9, fused=fused)
    clipper = gtorch.attach(optimizer, 0.5, on_nonfinite="skip")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for bad in (None, math.inf, None):
        optimizer.zero_grad()
        scaler.scale(weight.sum() * 3).backward()
        if bad is not None:
            weight.grad[0] = bad
        before = weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, weight.detach()) == (bad is not None)
    assert (clipper.steps, clipper.clipped_steps, clipper.skipped_steps) == (2, 2, 0)


def test_only_a_step_can_be_skipped() -> None:
    text = (
        "on_nonfinite is 'skip'; it must be one of 'nan', 'raise', 'zero', 'keep'. "
        "There is no step to skip: gradclip.torch.attach has one"
    )
    with raises(ValueError, text):
        gtorch.clip_grad_norm_([], 1.0, on_nonfinite="skip")  # type: ignore[arg-type]


def test_what_zero_does_to_weights_that_have_momentum() -> None:
    (weight,) = parameters = weights(2)
    optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=0.9)
    gtorch.attach(optimizer, 1e9, on_nonfinite="zero")
    moved(optimizer)
    weight.grad[0] = math.nan
    before = weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(weight.detach() - before, torch.full((2,), -0.9 * 3))


# ---- objects and arguments ----


def test_what_is_no_optimizer() -> None:
    model = torch.nn.Linear(2, 2)
    for given in (model, model.parameters(), "sgd", None, torch.optim.SGD):
        text = (
            "attach takes an optimizer, as torch.optim.AdamW(model.parameters()) is; this is "
            f"{type(given).__name__}"
        )
        with raises(TypeError, text):
            gtorch.attach(given, 1.0)
    with pytest.raises(TypeError, match=r"^the step of LBFGS needs a closure, .*clip_grad_norm_$"):
        gtorch.attach(torch.optim.LBFGS(model.parameters()), 1.0)


def test_an_argument_of_step_is_named() -> None:
    class Odd(torch.optim.SGD):
        def step(self, loss: Any = None, *, grads: Any = None, rate: float = 1.0) -> Any:  # noqa: ARG002
            return super().step()

    optimizer = Odd(weights(2), lr=1.0)
    clipper = gtorch.attach(optimizer, 0.25)
    backward(optimizer.param_groups[0]["params"])
    optimizer.step(torch.ones(()), rate=0.5)  # no closure, whatever it is
    assert clipper.steps == 1
    text = r"^optimizer\.step\({}=\.\.\.\) under gradclip\.torch\.attach.* {}"
    with pytest.raises(RuntimeError, match=text.format("loss", "a closure would make")):
        optimizer.step(lambda: 1.0)
    with pytest.raises(RuntimeError, match=text.format("grads", "what the parameters have")):
        optimizer.step(grads=[torch.ones(2)])
    with pytest.raises(TypeError, match="unexpected keyword argument 'rte'"):
        optimizer.step(rte=0.5)
    assert clipper.steps == 1


def test_errors_name_parameters_as_the_optimizer_does() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 3))
    groups = [
        {"params": model[0].named_parameters(prefix="0")},
        {"params": model[2].named_parameters(prefix="2")},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    gtorch.attach(optimizer, 1.0, on_nonfinite="raise")
    model(torch.ones(2, 3)).sum().backward()
    model[2].weight.grad[0, 0] = math.nan
    with raises(FloatingPointError, "the global norm is nan: 2.weight.grad holds 1 NaN and 0 inf"):
        optimizer.step()
    model[2].weight.grad = None
    model[0].bias.grad = torch.ones(1).expand(3)
    model[0].bias.grad.requires_grad_(True)  # as of a second derivative: clipped all the same
    with pytest.raises(ValueError, match=r"^0\.bias\.grad has elements that share memory"):
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_fused_step_writes_to_no_gradient_whose_elements_share_memory(kind: Any) -> None:
    """PyTorch's own would write behind its end."""
    parameter = torch.nn.Parameter(torch.zeros(64))
    optimizer = kind([parameter], lr=1.0, fused=True)
    gtorch.attach(optimizer, 1.0)
    parameter.grad = torch.tensor([3.0]).expand(64)
    with pytest.raises(ValueError, match="has elements that share memory"):
        optimizer.step()
    assert not parameter.any()
