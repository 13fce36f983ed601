"""`gradclip.torch.attach` among hooks, threads, wrappers and classes with ways of their own."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import re
import threading
import weakref
from types import MethodType
from typing import Any

import pytest

from conftest import version
from host import run_python

if version("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)
import torch

import gradclip.torch as gtorch


def weights(size: int = 4) -> list[Any]:
    return [torch.nn.Parameter(torch.zeros(size))]


def gradients(optimizer: Any, value: float = 3.0) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, value)


def moved(optimizer: Any, value: float = 3.0) -> float:
    """How far a step takes the weights, of gradients of one value."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    gradients(optimizer, value)
    optimizer.step()
    pairs = zip(parameters, before, strict=True)
    return float(sum((p.detach() - b).double().square().sum() for p, b in pairs)) ** 0.5


def fused_sgd() -> Any:
    return torch.optim.SGD(weights(), lr=1.0, momentum=0.5, fused=True)


# ---- who can be attached to ----


def test_a_step_that_runs_no_hooks_is_refused() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: Any) -> None:
            self._optimizer_step_pre_hooks: Any = {}
            self.optimizer, self.param_groups = inner, inner.param_groups

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step(closure)

    class Bare(Wrapper):
        def __init__(self, inner: Any) -> None:
            super().__init__(inner)
            del self._optimizer_step_pre_hooks, self.optimizer
            self.optim = inner

    for kind in (Wrapper, Bare):
        text = re.escape(
            f"the step of {kind.__name__} runs no hooks, so it would not be clipped: attach to the "
            "optimizer within it, or clip by gradclip.torch.clip_grad_norm_ before step()"
        )
        with pytest.raises(TypeError, match=f"^{text}$"):
            gtorch.attach(kind(fused_sgd()), 1.0)


def test_an_optimizer_that_has_another_one_is_none_of_its_wrappers() -> None:
    class Hybrid(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__(weights(), {})
            self.optimizer = torch.optim.SGD(weights(), lr=1.0)

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # noqa: ARG002
            self.param_groups[0]["params"][0].sub_(self.param_groups[0]["params"][0].grad)

    optimizer = Hybrid()
    gtorch.attach(optimizer, 1.0)
    assert moved(optimizer) == pytest.approx(1.0)


# ---- removing and copying ----


def test_a_clipper_that_was_removed_touches_nothing() -> None:
    optimizer = torch.optim.SGD(weights(), lr=1.0)
    first = gtorch.attach(optimizer, 1.0, on_nonfinite="skip")
    first.remove()
    assert "step" not in vars(optimizer)
    second = gtorch.attach(optimizer, 0.25)
    first.remove()
    assert moved(optimizer) == pytest.approx(0.25)
    for things in ([first, second, optimizer], [second, first, optimizer], [optimizer, first]):
        copied = next(each for each in copy.deepcopy(things) if isinstance(each, torch.optim.SGD))
        assert moved(copied) == pytest.approx(0.25)
    second.remove()
    copied = copy.deepcopy({"clipper": second, "optimizer": optimizer})["optimizer"]
    assert gtorch.clipper_of(copied) is None
    assert moved(copied) == pytest.approx(6.0)


@pytest.mark.parametrize("name", ["__deepcopy__", "__reduce__"])
def test_a_class_that_copies_itself_is_not_copied_unclipped(name: str) -> None:
    def anew(self: Any, *_: Any) -> Any:
        arguments = ([{"params": weights()}], 1.0)
        return type(self)(*arguments) if name == "__deepcopy__" else (type(self), arguments)

    kind = type("Own", (torch.optim.SGD,), {name: anew})
    gtorch.attach(own := kind(weights(), 1.0), 1.0)
    for how in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"^such a copy of Own would not be clipped"):
            how(own)
    gtorch.clipper_of(own).remove()  # type: ignore[union-attr]
    copy.deepcopy(own)


class Plan:
    """A schedule that knows its optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def limit(self, step: int) -> float:
        return 1.0 / (step + 1)


def test_a_schedule_that_holds_its_optimizer_is_pickled_with_it() -> None:
    plan = Plan(torch.optim.SGD(weights(), lr=1.0))
    gtorch.attach(plan.optimizer, plan.limit)
    moved(plan.optimizer)
    copied = pickle.loads(pickle.dumps(plan))
    assert moved(copied.optimizer) == pytest.approx(0.5)
    assert gtorch.clipper_of(copied.optimizer).max_norm.__self__ is copied  # type: ignore[union-attr]


# ---- other hooks ----


@pytest.mark.parametrize("policy", ["nan", "skip"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_later_hook_that_returns_arguments(fused: bool, policy: Any) -> None:
    optimizer = torch.optim.SGD(weights(), lr=1.0, fused=fused)
    clipper = gtorch.attach(optimizer, 1.0, on_nonfinite=policy)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, *args[1:]), kwargs))
    assert moved(optimizer) == pytest.approx(1.0)
    assert next(reversed(optimizer._optimizer_step_pre_hooks)) == "gradclip"  # and may fold again
    assert moved(optimizer) == pytest.approx(1.0)
    if policy == "skip":
        assert moved(optimizer, math.nan) == 0
    assert [*clipper.state_dict().values()][1:] == [2, 2, policy == "skip"]


def test_what_hooks_change_of_an_optimizer_stays_changed() -> None:
    optimizer = fused_sgd()
    optimizer.calls = 0
    before = copy.deepcopy(optimizer.state_dict())
    clipper = gtorch.attach(optimizer, 1.0)

    def count(opt: Any, *_: Any) -> None:
        opt.calls += 1

    optimizer.register_step_pre_hook(count)
    optimizer.register_step_post_hook(lambda opt, *_: opt.load_state_dict(before))
    for _ in range(2):
        moved(optimizer)
    assert optimizer.calls == 2
    assert not optimizer.state
    assert clipper.steps == 2


def test_a_step_that_was_taken_is_counted_whatever_hooks_make_of_it() -> None:
    optimizer = torch.optim.SGD(weights(), lr=1.0)
    failing = optimizer.register_step_post_hook(lambda *_: 1 / 0)
    clipper = gtorch.attach(optimizer, 1.0)
    with pytest.raises(ZeroDivisionError):
        moved(optimizer)
    assert clipper.steps == 1
    failing.remove()


# ---- skipping ----


def test_a_skipped_step_of_another_library_does_nothing_at_all() -> None:
    class Lookahead(torch.optim.Optimizer):
        """Moves weights whether or not there are gradients, and keeps all that it can."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 1.0})
            self.history: list[int] = []
            self.state["k"] = 0

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # noqa: ARG002
            self.state["k"] += 1
            self.history.append(self.state["k"])
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(1.0).sub_(parameter.grad)

    optimizer = Lookahead(weights())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # which replaces step, before
    clipper = gtorch.attach(optimizer, 1.0, on_nonfinite="skip")
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # and after
    moved(optimizer)
    other = copy.deepcopy(optimizer)
    other.history = [1]  # which PyTorch leaves out of copies
    for copied in (optimizer, other):
        assert moved(copied, math.nan) == 0
        assert (copied.state["k"], copied.history) == (1, [1])
        assert copied.param_groups[0]["params"][0].grad.isnan().all()
    assert (clipper.steps, clipper.skipped_steps) == (1, 1)


def test_a_subclass_with_groups_of_its_own_is_skipped() -> None:
    class Groups(torch.optim.SGD):
        @property
        def param_groups(self) -> Any:  # type: ignore[override]
            return vars(self)["param_groups"]

        @param_groups.setter
        def param_groups(self, groups: Any) -> None:
            vars(self)["param_groups"] = groups

    class Slots(torch.optim.SGD):
        __slots__ = ("k",)

        def step(self, closure: Any = None) -> Any:
            self.k += 1
            return super().step(closure)

    for kind in (Groups, Slots):
        optimizer = kind(weights(), lr=1.0, fused=True)
        optimizer.k = 0
        clipper = gtorch.attach(optimizer, 1.0, on_nonfinite="skip")
        assert moved(optimizer) == pytest.approx(1.0)
        assert moved(optimizer, math.nan) == 0
        assert [*clipper.state_dict().values()] == [2, 1, 1, 1]


def test_a_skip_where_step_was_replaced_is_an_error_and_no_step() -> None:
    optimizer = torch.optim.SGD(weights(), lr=1.0)
    before = optimizer.step
    gtorch.attach(optimizer, 1.0, on_nonfinite="skip")
    gradients(optimizer, math.nan)
    with pytest.raises(RuntimeError, match=r"^the global norm is nan, and this step is to be skip"):
        before()
    assert not optimizer.param_groups[0]["params"][0].any()


# ---- failing, and being looked at meanwhile ----


def test_nothing_of_a_failed_step_s_callers_is_kept_alive() -> None:
    class Held:
        """Something large."""

    def fails(optimizer: Any) -> Any:
        held = Held()
        gradients(optimizer, math.nan)
        with pytest.raises(FloatingPointError):
            optimizer.step()
        failing = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
        gradients(optimizer)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        failing.remove()
        return weakref.ref(held)

    optimizer = fused_sgd()
    gtorch.attach(optimizer, 1.0, on_nonfinite="raise")
    alive = fails(optimizer)
    gc.collect()
    assert alive() is None


def test_another_thread_may_look_while_a_step_is_under_way() -> None:
    optimizer = fused_sgd()
    clipper = gtorch.attach(optimizer, 1.0)
    seen: list[str] = []

    def look(*_: Any) -> None:
        thread = threading.Thread(target=lambda: seen.append(repr(clipper)))
        thread.start()
        thread.join()
        seen.append(repr(clipper))

    optimizer.register_step_pre_hook(look)
    for turn in range(2):
        moved(optimizer)
        assert int(clipper.clipped_steps) == turn + 1
    assert len(seen) == 4


# ---- groups, limits, arguments ----


def test_parameters_that_move_between_groups() -> None:
    a, b, d = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups: Any = [{"params": {"a": a, "b": b}.items()}, {"params": {"d": d}.items()}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    clipper = gtorch.attach(optimizer, [1e9, 0.25], on_nonfinite="raise")
    moved(optimizer)
    one, other = optimizer.param_groups
    one["params"], other["params"] = [a], [b, d]
    one["param_names"], other["param_names"] = ["x"], ["y"]
    moved(optimizer)
    assert clipper.norm.tolist() == pytest.approx([3.0, 18**0.5])
    gradients(optimizer)
    b.grad, d.grad = torch.tensor([math.nan]), torch.tensor([math.inf])
    text = r"^the global norm is nan: y\.grad .*; param_groups\[1\]\['params'\]\[1\]\.grad holds"
    with pytest.raises(FloatingPointError, match=text):
        optimizer.step()


def test_the_limits_of_groups_are_set_all_at_once() -> None:
    groups = [{"params": weights()}, {"params": weights()}]
    clipper = gtorch.attach(torch.optim.SGD(groups), [1.0, 2.0])
    assert clipper.max_norm == (1.0, 2.0)
    with pytest.raises(TypeError):
        clipper.max_norm[0] = 0.5


def test_a_closure_among_any_arguments() -> None:
    class Loose(torch.optim.SGD):
        def step(self, *args: Any) -> Any:  # type: ignore[override]
            return super().step(*args[1:])

    optimizer = Loose(weights(), lr=1.0)
    gtorch.attach(optimizer, 1.0)
    with pytest.raises(RuntimeError, match=r"^optimizer\.step\(\*args=\.\.\.\) under"):
        optimizer.step(None, lambda: 1.0)


def test_a_step_to_be_differentiated_is_refused() -> None:
    start = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = start.clone()
    weight.retain_grad()
    optimizer = torch.optim.SGD([weight], lr=1.0, differentiable=True)
    gtorch.attach(optimizer, 1.0)
    (weight.grad,) = torch.autograd.grad((weight**2).sum() / 2, [weight], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^a differentiable step under gradclip\.torch\.attach"):
        optimizer.step()


def test_gradients_without_memory_are_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, device="meta"))], lr=1.0)
    clipper = gtorch.attach(optimizer, 1.0)
    gradients(optimizer)
    text = re.escape(
        "param_groups[0]['params'][0].grad is meta, fake or traced, of which an attached clipper "
        "can know no norm; gradclip.torch.clip_grad_norm_ before step() takes it"
    )
    with pytest.raises(NotImplementedError, match=f"^{text}$"):
        optimizer.step()
    assert clipper.steps == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_dtensors_without_memory_are_refused(kind: str) -> None:
    done = run_python(f"""
        import contextlib, warnings
        import torch, torch.distributed as dist, gradclip.torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard
        from torch.testing._internal.distributed.fake_pg import FakeStore

        warnings.simplefilter("error", UserWarning)
        dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
        mesh = init_device_mesh("cpu", (4,))
        with FakeTensorMode() if {kind!r} == "fake" else contextlib.nullcontext():
            here = torch.zeros(2, device="meta" if {kind!r} == "meta" else "cpu")
            weight = torch.nn.Parameter(DTensor.from_local(here, mesh, [Shard(0)]))
            weight.grad = DTensor.from_local(here.clone(), mesh, [Shard(0)])
            print(gradclip.torch.get_total_norm([weight.grad, weight.grad]).shape)
            optimizer = torch.optim.SGD([weight], lr=1.0)
            gradclip.torch.attach(optimizer, 1.0)
            try:
                optimizer.step()
            except NotImplementedError as error:
                print(error)
    """)
    shape, refusal = done.stdout.splitlines()
    assert shape == "torch.Size([])"
    assert refusal.startswith("param_groups[0]['params'][0].grad is meta, fake or traced, of which")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_to_be_refused_need_not_be_writable(value: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([value]).expand(3)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    gtorch.attach(optimizer, 1.0, on_nonfinite="raise")
    with pytest.raises(FloatingPointError, match=r"^the global norm is .*\.grad holds"):
        optimizer.step()


def test_a_step_of_the_instance_s_own_that_calls_the_class_s() -> None:
    optimizer = fused_sgd()

    def step(self: Any, closure: Any = None) -> Any:
        return type(self).step(self, closure)

    optimizer.step = MethodType(step, optimizer)
    gtorch.attach(optimizer, 1.0, on_nonfinite="skip")
    assert moved(optimizer) == pytest.approx(1.0)
    assert moved(optimizer, math.inf) == 0
    gtorch.clipper_of(optimizer).remove()  # type: ignore[union-attr]
    assert optimizer.step.__func__ is step
