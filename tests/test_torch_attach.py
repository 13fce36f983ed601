"""`gradclip.torch.attach`: every hazard between a backward pass and a step."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import re
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from conftest import version
from host import run_python

if version("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)
import torch

import gradclip.torch as gtorch
from gradclip.kernels import cpu
from gradclip.torch import gradients, host, pointers

WIDTH = 160  # 25600 elements: a gradient that is measured while it is warm
FUSED: list[Callable[..., Any]] = [
    lambda params: torch.optim.Adam(params, lr=1e-3, fused=True),
    lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    lambda params: torch.optim.SGD(params, lr=1e-6, momentum=0.9, fused=True),
    lambda params: torch.optim.Adagrad(params, lr=1e-3, fused=True),
]
OTHERS: list[Callable[..., Any]] = [
    lambda params: torch.optim.SGD(params, lr=1e-6),
    lambda params: torch.optim.AdamW(params, lr=1e-3),
    lambda params: torch.optim.RMSprop(params, lr=1e-3),
]


def raises(error: type[Exception], text: str) -> Any:
    """The error with exactly this text."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


class Model(torch.nn.Module):
    """A layer that is large, one that is used twice, one that is not, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large = torch.nn.Linear(WIDTH, WIDTH)
        self.shared = torch.nn.Linear(WIDTH, WIDTH)
        self.unused = torch.nn.Linear(WIDTH, WIDTH)
        self.frozen = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.small = torch.nn.Linear(WIDTH, 1)

    def forward(self, x: Any) -> Any:
        x = torch.tanh(self.shared(torch.tanh(self.shared(torch.tanh(self.large(x))))))
        return self.small(self.frozen(x))


def batch(seed: int) -> Any:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(seed))


def loss_of(model: Any, seed: int = 0, scale: float = 100.0) -> Any:
    return (model(batch(seed)) ** 2).sum() * scale


def norm_of(model: Any) -> Any:
    """As `clip_grad_norm_` measures it: cold."""
    return gtorch.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def warm(clipper: Any) -> int:
    """How many gradients are known from when they were written."""
    return sum(
        place.watching is not None
        and place.parameter.grad is not None
        and place.watching.sums(place.parameter.grad) is not None
        for place in clipper._places.every
    )


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def assert_near(one: Any, other: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def step_by_hand(model: Any, optimizer: Any, limit: float) -> Any:
    norm = gtorch.clip_grad_norm_(model.parameters(), limit, on_nonfinite="nan")
    optimizer.step()
    return norm


def edited(change: Callable[[Any, Any], None], limit: float = 1.0) -> None:
    """A change between backward and step: the norm and the step are those of what is there."""
    ours, theirs = Model(), Model()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs)]
    clipper = gtorch.attach(optimizers[0], limit)
    for turn in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, turn).backward()
            change(model, turn)
        expected = norm_of(ours)
        optimizers[0].step()
        assert torch.equal(clipper.norm, expected)
        step_by_hand(theirs, optimizers[1], limit)
        assert_same(ours, theirs)


# ---- the plain course ----


@pytest.mark.parametrize("limit", [0.5, 1e9, math.inf])
@pytest.mark.parametrize("make", OTHERS)
def test_as_clipping_by_hand(make: Callable[..., Any], limit: float) -> None:
    ours, theirs = Model(), Model()
    one, other = make(ours.parameters()), make(theirs.parameters())
    clipper = gtorch.attach(one, limit)
    for turn in range(4):
        for model, optimizer in ((ours, one), (theirs, other)):
            optimizer.zero_grad()
            loss_of(model, turn).backward()
        assert warm(clipper) == 2
        one.step()
        norm = step_by_hand(theirs, other, limit)
        assert torch.equal(clipper.norm, norm)
        assert_same(ours, theirs)
        clips = float(norm) > limit
        assert float(clipper.factor) == (pytest.approx(limit / float(norm)) if clips else 1)
        assert int(clipper.steps) == turn + 1
        assert int(clipper.clipped_steps) == (turn + 1) * clips


@pytest.mark.parametrize("limit", [0.5, 1e9])
@pytest.mark.parametrize("make", FUSED)
def test_folded_into_a_fused_step(make: Callable[..., Any], limit: float) -> None:
    ours, theirs = Model(), Model()
    one, other = make(ours.parameters()), make(theirs.parameters())
    clipper = gtorch.attach(one, limit)
    for turn in range(4):
        for model, optimizer in ((ours, one), (theirs, other)):
            optimizer.zero_grad()
            loss_of(model, turn).backward()
        norm = norm_of(ours)
        one.step()
        assert torch.equal(clipper.norm, norm)
        assert not hasattr(one, "grad_scale")
        step_by_hand(theirs, other, limit)
        if limit == 1e9:
            assert_same(ours, theirs)
        assert_near(ours, theirs, atol=1e-5)


def test_a_fused_step_takes_no_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    gtorch.attach(optimizer, 0.1)
    loss_of(model).backward()
    for name in ("measure", "scale_", "fill_"):
        monkeypatch.setattr(host.Leaves, name, None)
    optimizer.step()


def test_nothing_to_clip_writes_nothing() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gtorch.attach(optimizer, 1e9)
    loss_of(model).backward()
    before = [(p.grad._version, p.grad.clone()) for p in model.small.parameters()]
    optimizer.step()
    for (count, grad), parameter in zip(before, model.small.parameters(), strict=True):
        assert parameter.grad._version == count
        assert torch.equal(parameter.grad, grad)


def test_gradients_are_measured_once_and_only_the_small_ones_in_the_step() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = gtorch.attach(optimizer, 1.0)
    sizes = []
    seen = host.sums

    def sums(tensors: Any) -> Any:
        sizes.append(sum(t.numel() for t in tensors))
        return seen(tensors)

    host.sums = sums  # type: ignore[assignment]
    try:
        loss_of(model).backward()
        optimizer.step()
    finally:
        host.sums = seen
    assert sizes == [WIDTH + WIDTH + WIDTH + 1]
    assert int(clipper.steps) == 1


def test_an_exact_sum_where_the_certificate_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = gtorch.attach(optimizer, 1e9)
    monkeypatch.setattr(gradients, "certified_norm", lambda _: None)
    loss_of(model).backward()
    optimizer.step()
    assert torch.equal(clipper.norm, norm_of(model))


def test_without_the_c_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_cpu", None)
    monkeypatch.setattr(cpu, "_warned", True)
    edited(lambda *_: None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_other_dtypes(dtype: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(40_000, dtype=dtype))
    mixed = torch.nn.Parameter(torch.ones(40_000))
    optimizer = torch.optim.SGD([weight, mixed], lr=0.5)
    clipper = gtorch.attach(optimizer, 1.0)
    for _ in range(2):
        optimizer.zero_grad()
        (weight * 3).abs().sum().backward()
        (mixed * 2).sum().backward()
        expected = gtorch.get_total_norm([weight.grad, mixed.grad])
        optimizer.step()
        assert torch.equal(clipper.norm, expected)
        assert clipper.norm.dtype is expected.dtype


# ---- hazards ----


def test_gradient_accumulation() -> None:
    def change(model: Any, turn: int) -> None:
        for micro in range(3):
            loss_of(model, turn * 10 + micro).backward()

    edited(change)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    def change(model: Any, turn: int) -> None:
        model.zero_grad(set_to_none=set_to_none)
        loss_of(model, turn + 5).backward()

    edited(change)
    edited(lambda model, _: model.zero_grad(set_to_none=set_to_none))


def test_several_backward_calls_on_one_graph() -> None:
    def change(model: Any, turn: int) -> None:
        loss = loss_of(model, turn)
        loss.backward(retain_graph=True)
        loss.backward()

    edited(change)


def test_a_gradient_of_a_gradient() -> None:
    def change(model: Any, turn: int) -> None:
        model.zero_grad()
        loss = loss_of(model, turn, 1.0)
        first = torch.autograd.grad(loss, list(model.large.parameters()), create_graph=True)
        sum((g**2).sum() for g in first).backward()

    edited(change)


IN_PLACE: list[Callable[[Any], Any]] = [
    lambda p: p.grad.mul_(7),
    lambda p: p.grad.view(-1)[:100].zero_(),
    lambda p: p.grad.t()[0].fill_(5.0),
    lambda p: p.grad.view(-1)[100:3000].mul_(7),  # where no number is looked at
    lambda p: torch._foreach_mul_([p.grad], 3.0),
    lambda p: p.grad.copy_(torch.ones_like(p.grad)),
    lambda p: p.grad.clamp_(-1e-3, 1e-3),
]


@pytest.mark.parametrize("change", IN_PLACE)
def test_a_gradient_edited_in_place(change: Callable[[Any], Any]) -> None:
    edited(lambda model, _: change(model.large.weight))


def replaced_where_it_lay(parameter: Any) -> None:
    """Another tensor, likely at the place of the old one, alike where numbers are looked at."""
    values = parameter.grad.clone()
    values.view(-1)[100:3000] *= 3
    parameter.grad = None
    parameter.grad = values.clone()


REPLACED: list[Callable[[Any], Any]] = [
    lambda p: setattr(p, "grad", p.grad * 3),
    lambda p: setattr(p, "grad", torch.ones_like(p.grad)),
    lambda p: setattr(p, "grad", None),
    lambda p: p.grad.set_(torch.full_like(p.grad, 2.0)),
    lambda p: setattr(p.grad, "data", torch.full_like(p.grad, 2.0)),
    replaced_where_it_lay,
]


@pytest.mark.parametrize("change", REPLACED)
def test_a_gradient_that_is_replaced(change: Callable[[Any], Any]) -> None:
    edited(lambda model, _: change(model.large.weight))


def test_a_change_that_no_counter_counts_but_shows() -> None:
    def change(model: Any, _: int) -> None:
        before = model.large.weight.grad._version
        model.large.weight.grad.data.mul_(3)
        assert model.large.weight.grad._version == before

    edited(change)


def test_a_gradient_of_zeros_where_it_is_looked_at() -> None:
    def change(model: Any, turn: int) -> None:
        grad = torch.zeros(WIDTH, WIDTH)
        grad[7, 7] = 3.0
        model.large.weight.grad = None
        (model.large.weight * grad).sum().backward()
        model.large.weight.grad.data.mul_(turn + 2)

    edited(change)


def test_a_gradient_hook_changes_what_is_measured() -> None:
    ours, theirs = Model(), Model()
    for model in (ours, theirs):
        model.large.weight.register_hook(lambda grad: grad * 11)
    one, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs))
    clipper = gtorch.attach(one, 1.0)

    def double(parameter: Any) -> None:
        parameter.grad.mul_(2)

    for model in (ours, theirs):
        model.large.weight.register_post_accumulate_grad_hook(double)  # after ours
        loss_of(model).backward()
    expected = norm_of(ours)
    one.step()
    assert torch.equal(clipper.norm, expected)
    step_by_hand(theirs, other, 1.0)
    assert_same(ours, theirs)


def test_frozen_and_unfrozen_parameters() -> None:
    ours, theirs = Model(), Model()
    one, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs))
    clipper = gtorch.attach(one, 1.0)
    for turn in range(4):
        for model, optimizer in ((ours, one), (theirs, other)):
            model.frozen.requires_grad_(turn > 0)
            model.large.requires_grad_(turn < 3)
            optimizer.zero_grad()
            loss_of(model, turn).backward()
        one.step()
        assert torch.equal(clipper.norm, step_by_hand(theirs, other, 1.0))
        assert_same(ours, theirs)
    loss_of(ours).backward()
    assert warm(clipper) == 2  # the frozen one is watched since it is trained


def test_gradients_left_from_an_earlier_step_count() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = gtorch.attach(optimizer, 1.0)
    loss_of(model).backward()
    optimizer.step()
    left = norm_of(model)
    optimizer.step()
    assert torch.equal(clipper.norm, left)


def test_parameters_added_later() -> None:
    ours, theirs = Model(), Model()
    extras = [torch.nn.Parameter(torch.ones(WIDTH, WIDTH)) for _ in range(2)]
    one, other = (torch.optim.SGD(m.large.parameters(), lr=0.1) for m in (ours, theirs))
    clipper = gtorch.attach(one, 1.0)
    for optimizer, model, extra in ((one, ours, extras[0]), (other, theirs, extras[1])):
        optimizer.add_param_group({"params": [extra, *model.shared.parameters()]})
    for _ in range(2):
        for optimizer, model, extra in ((one, ours, extras[0]), (other, theirs, extras[1])):
            model.zero_grad()
            extra.grad = None
            (loss_of(model) + (extra**2).sum()).backward()
            params = [p for group in optimizer.param_groups for p in group["params"]]
            if optimizer is other:
                norm = gtorch.clip_grad_norm_(params, 1.0)
            optimizer.step()
        assert torch.equal(clipper.norm, norm)
        assert torch.equal(*extras)
    assert len(clipper._places.every) == 5


def test_one_tensor_as_the_gradient_of_two_parameters() -> None:
    params = [torch.nn.Parameter(torch.zeros(20_000)) for _ in range(2)]
    optimizer = torch.optim.SGD(params, lr=1.0)
    clipper = gtorch.attach(optimizer, 1e9)
    params[0].grad = params[1].grad = torch.ones(20_000)
    optimizer.step()
    assert torch.equal(clipper.norm, gtorch.clip_grad_norm_(params, 1e9))


def test_two_optimizers_share_a_parameter() -> None:
    model = Model()
    one = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD(model.large.parameters(), lr=0.1)
    clippers = [gtorch.attach(one, 1e9), gtorch.attach(other, 1e-3)]
    loss_of(model).backward()
    whole = norm_of(model)
    part = gtorch.get_total_norm([p.grad for p in model.large.parameters()])
    other.step()  # it scales what the first has measured
    assert torch.equal(clippers[1].norm, part)
    after = norm_of(model)
    one.step()
    assert torch.equal(clippers[0].norm, after)
    assert after < whole


def test_sparse_gradients() -> None:
    table = torch.nn.Embedding(5000, 32, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    clipper = gtorch.attach(optimizer, 1.0)
    for _ in range(2):
        optimizer.zero_grad()
        (table(torch.randint(0, 50, (500,))) * 3).sum().backward()
        expected = norm_of(table)
        optimizer.step()
        assert torch.equal(clipper.norm, expected)


@pytest.mark.slow
def test_where_other_processes_reduce_gradients_they_are_measured_in_the_step() -> None:
    code = """
        import torch, gradclip.torch as gtorch
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        net = torch.nn.Linear(200, 200)
        model = DistributedDataParallel(net, gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clipper = gtorch.attach(optimizer, 1.0)
        def triple(state, bucket):  # what a reduction does, below autograd
            bucket.buffer().numpy()[300:3000] *= 3
            done = torch.futures.Future(); done.set_result(bucket.buffer()); return done
        model.register_comm_hook(None, triple)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=False)  # gradients stay in the bucket
            model(torch.ones(4, 200)).sum().backward()
            wanted = gtorch.get_total_norm([p.grad for p in net.parameters()])
            optimizer.step()
            assert torch.equal(clipper.norm, wanted), (clipper.norm, wanted)
        dist.destroy_process_group()
        print("equal")
    """
    done = run_python(code)
    assert (done.returncode, done.stdout.strip()) == (0, "equal"), done.stderr


# ---- GradScaler ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("unscale", [True, False])
def test_with_gradscaler_the_limit_is_on_unscaled_gradients(
    dtype: Any, fused: bool, unscale: bool
) -> None:
    ours, theirs = Model(), Model()
    make = torch.optim.AdamW
    one = make(ours.parameters(), lr=1e-3, fused=fused)
    other = make(theirs.parameters(), lr=1e-3)
    clipper = gtorch.attach(one, 0.5)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    for turn in range(3):
        for model, optimizer, scaler in zip((ours, theirs), (one, other), scalers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = (model(batch(turn)) ** 2).sum()
            scaler.scale(loss).backward()
            if unscale or optimizer is other:
                scaler.unscale_(optimizer)
            if optimizer is other:
                norm = gtorch.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        torch.testing.assert_close(clipper.norm, norm, rtol=1e-5 * (turn > 0), atol=0.0)
        assert float(norm) > 0.5
        assert float(clipper.factor) == pytest.approx(0.5 / float(clipper.norm))
        assert not hasattr(one, "grad_scale")
        assert_near(ours, theirs, rtol=1e-4, atol=5e-5)  # Adam's steps are 1e-3
    assert int(clipper.clipped_steps) == 3


def test_a_scale_that_is_no_power_of_two() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    clipper = gtorch.attach(optimizer, 1e9)
    scaler = torch.amp.GradScaler("cpu", init_scale=3.0)
    scaler.scale(loss_of(model)).backward()
    scaled = norm_of(model)
    scaler.step(optimizer)
    assert float(clipper.norm) == float(np.float32(float(scaled) / 3.0))


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_gradscaler_skips_is_not_counted(fused: bool) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    clipper = gtorch.attach(optimizer, 1.0, on_nonfinite="raise")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(model)
    scaler.scale(loss_of(model)).backward()
    model.large.weight.grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert_same(model, before)
    assert int(clipper.steps) == 0
    assert scaler.get_scale() == 2.0**9


# ---- NaN and inf ----


@pytest.mark.parametrize("make", [FUSED[1], OTHERS[0]])
def test_policies(make: Callable[..., Any]) -> None:
    for policy, wanted in (("nan", math.nan), ("zero", 0.0), ("keep", 1.0)):
        model = Model()
        optimizer = make(model.parameters())
        clipper = gtorch.attach(optimizer, 1.0, on_nonfinite=policy)
        loss_of(model).backward()
        model.large.weight.grad[0, 0] = math.inf
        before = model.large.weight.grad.clone()
        optimizer.step()
        assert clipper.norm == math.inf
        np.testing.assert_equal(float(clipper.factor), wanted)
        assert int(clipper.clipped_steps) == 1  # not at most the limit
        expected = before if policy == "keep" else torch.full_like(before, wanted)
        np.testing.assert_array_equal(model.large.weight.grad.numpy(), expected.numpy())


def test_raise_names_the_gradient_and_writes_nothing() -> None:
    model = Model()
    groups = [{"params": model.small.parameters()}, {"params": model.large.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    clipper = gtorch.attach(optimizer, 1e-3, on_nonfinite="raise")
    loss_of(model).backward()
    model.large.bias.grad[3] = math.nan
    before = copy.deepcopy(model)
    grads = [p.grad.clone() for p in model.small.parameters()]
    text = "the global norm is nan: param_groups[1]['params'][1].grad holds 1 NaN and 0 inf"
    with raises(FloatingPointError, text):
        optimizer.step()
    assert_same(model, before)
    assert all(map(torch.equal, grads, [p.grad for p in model.small.parameters()]))
    assert int(clipper.steps) == 0
    model.large.bias.grad[3] = 1.0
    optimizer.step()
    assert int(clipper.steps) == 1


# ---- groups, closures, the optimizer itself ----


@pytest.mark.parametrize("make", [FUSED[1], OTHERS[0]])
def test_one_norm_over_all_groups(make: Callable[..., Any]) -> None:
    ours, theirs = Model(), Model()
    one, other = (
        make([{"params": m.large.parameters(), "lr": 0.5}, {"params": m.shared.parameters()}])
        for m in (ours, theirs)
    )
    clipper = gtorch.attach(one, 1.0)
    for model in (ours, theirs):
        loss_of(model).backward()
    params = [*theirs.large.parameters(), *theirs.shared.parameters()]
    norm = gtorch.clip_grad_norm_(params, 1.0)
    one.step()
    other.step()
    assert torch.equal(clipper.norm, norm)
    assert_near(ours, theirs)


@pytest.mark.parametrize("make", [FUSED[1], OTHERS[0]])
def test_a_limit_per_group(make: Callable[..., Any]) -> None:
    ours, theirs = Model(), Model()
    one, other = (
        make([{"params": m.large.parameters()}, {"params": m.shared.parameters()}])
        for m in (ours, theirs)
    )
    clipper = gtorch.attach(one, [0.5, 1e9])
    for model in (ours, theirs):
        loss_of(model).backward()
    norms = [
        gtorch.clip_grad_norm_(theirs.large.parameters(), 0.5),
        gtorch.clip_grad_norm_(theirs.shared.parameters(), 1e9),
    ]
    one.step()
    other.step()
    assert torch.equal(clipper.norm, torch.stack(norms))
    assert clipper.factor.tolist() == [pytest.approx(0.5 / float(norms[0])), 1]
    assert int(clipper.clipped_steps) == 1
    assert_same(ours, theirs)
    one.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    with raises(ValueError, "max_norm has 2 limits, and the optimizer 3 parameter groups"):
        one.step()


def test_what_attach_refuses() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with raises(ValueError, "max_norm is 0; it must be above 0 (inf: only measure)"):
        gtorch.attach(optimizer, 0)
    with raises(ValueError, "max_norm has 2 limits, and the optimizer 1 parameter groups"):
        gtorch.attach(optimizer, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"^on_nonfinite is 'never'"):
        gtorch.attach(optimizer, 1.0, on_nonfinite="never")  # type: ignore[arg-type]
    gtorch.attach(optimizer, 1.0)
    text = (
        "the optimizer has a clipper already, as a copy of an attached one has; "
        "gradclip.torch.clipper_of(optimizer).remove() takes it off"
    )
    with raises(ValueError, text):
        gtorch.attach(optimizer, 1.0)


def test_closures_are_refused_before_anything_is_done() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = gtorch.attach(optimizer, 1.0)
    before = copy.deepcopy(model)
    calls: list[int] = []

    def closure() -> Any:
        calls.append(1)
        return torch.zeros(())

    text = r"^optimizer\.step\(closure=\.\.\.\) under gradclip\.torch"
    for step in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        with pytest.raises(RuntimeError, match=text):
            step()
    assert not calls
    assert_same(model, before)
    optimizer.step(None)
    optimizer.step(closure=None)
    assert int(clipper.steps) == 2


def test_state_dict_and_pickles_are_untouched() -> None:
    model, other = Model(), Model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    plain = torch.optim.AdamW(other.parameters(), fused=True)
    gtorch.attach(optimizer, 1e9)
    for each, opt in ((model, optimizer), (other, plain)):
        loss_of(each).backward()
        opt.step()
    ours, theirs = optimizer.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert ours["param_groups"] == theirs["param_groups"]
    optimizer.load_state_dict(theirs)
    loss_of(model).backward()
    optimizer.step()
    pickle.loads(pickle.dumps(optimizer)).step()
    copy.deepcopy(optimizer).step()
    copied = copy.deepcopy(model)
    loss_of(copied).backward()


def test_schedulers() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = gtorch.attach(optimizer, 1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
        scheduler.step()
    assert int(clipper.steps) == 3


def test_remove() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = gtorch.attach(optimizer, 1e-3)
    loss_of(model).backward()
    optimizer.step()
    clipper.remove()
    clipper.remove()
    before = norm_of(model)
    loss_of(model).backward()
    assert norm_of(model) != before
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.equal(parameter.grad, grad)
    assert int(clipper.steps) == 1
    gtorch.attach(optimizer, 1.0)


def test_a_step_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    gtorch.attach(optimizer, 1e-3)
    loss_of(model).backward()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "_fused_adamw_", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = gtorch.get_total_norm(grads)
    optimizer.step()
    assert not hasattr(optimizer, "grad_scale")
    assert float(gtorch.get_total_norm(grads)) == pytest.approx(1e-3, rel=1e-5)
    assert norm > 1


def test_nothing_is_kept_alive() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = gtorch.attach(optimizer, 1.0)
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
        grad = weakref.ref(model.large.weight.grad)
        model.zero_grad()
        gc.collect()
        assert grad() is None
    alive = [weakref.ref(x) for x in (optimizer, model.large.weight)]
    del model, optimizer, clipper
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=pytest.mark.long)])
def test_backward_passes_in_several_threads(rounds: int) -> None:
    weight = torch.nn.Parameter(torch.zeros(360_000))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    clipper = gtorch.attach(optimizer, 1e9)
    factors = torch.randn(4, 360_000)

    def work(factor: Any) -> None:
        for _ in range(3):
            (weight * factor).sum().backward()

    for _ in range(rounds):
        optimizer.zero_grad()
        threads = [threading.Thread(target=work, args=(factor,)) for factor in factors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = gtorch.get_total_norm([weight.grad])
        optimizer.step()
        assert torch.equal(clipper.norm, expected)
        alive = weakref.ref(weight.grad)
        weight.grad = None
        gc.collect()
        assert alive() is None


def test_a_fold_does_not_outlive_the_clipper() -> None:
    weight = torch.nn.Parameter(torch.zeros(100_000))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    clipper = gtorch.attach(optimizer, 1.0)
    failing = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    weight.sum().backward()
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    failing.remove()
    clipper.remove()
    weight.grad = torch.ones(100_000)
    optimizer.step()
    assert weight[0] == -1


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_one_memory_count_and_are_scaled_once(fused: bool) -> None:
    memory = torch.ones(40_000)
    params = [torch.nn.Parameter(torch.zeros(40_000)) for _ in range(3)]
    optimizer = torch.optim.SGD(params, lr=1.0, fused=fused)
    clipper = gtorch.attach(optimizer, 1.0)
    params[0].grad, params[1].grad, params[2].grad = memory, memory, memory.view(-1)
    optimizer.step()
    assert clipper.norm == 200
    for parameter in params:
        assert float(parameter.detach().double().norm()) == pytest.approx(1, rel=1e-5)


def test_hooks_go_with_the_optimizer() -> None:
    weight = torch.nn.Parameter(torch.zeros(40_000))
    for _ in range(3):
        optimizer = torch.optim.SGD([weight], lr=1.0)
        gtorch.attach(optimizer, 1.0)
    del optimizer
    gc.collect()
    assert not weight._post_accumulate_grad_hooks


def test_a_step_that_calls_its_base_class_s_clips_once() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    for fused in (False, True):
        torch.optim.SGD([torch.zeros(1)], lr=1.0)  # whose step has hooks too now
        weight = torch.nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor([3.0, 4.0])
        optimizer = Twice([weight], lr=1.0, fused=fused)
        clipper = gtorch.attach(optimizer, 2.5)
        optimizer.step()
        assert (float(clipper.norm), float(clipper.factor)) == (5, 0.5)
        assert (int(clipper.steps), int(clipper.clipped_steps)) == (1, 1)
        torch.testing.assert_close(weight.detach(), torch.tensor([-1.5, -2.0]))


def test_a_parameter_that_is_no_leaf_or_has_no_shape_yet() -> None:
    leaf = torch.ones(40_000, requires_grad=True)
    inner = leaf * 2
    inner.retain_grad()
    optimizer = torch.optim.SGD([inner], lr=1e-3, differentiable=True)
    clipper = gtorch.attach(optimizer, 1e9)
    inner.sum().backward()
    with torch.no_grad():
        optimizer.step()
    assert clipper.norm == 200
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = torch.nn.LazyLinear(200)
    clipper = gtorch.attach(torch.optim.SGD(lazy.parameters(), lr=0.1), 1.0)
    lazy(torch.ones(3, 200)).sum().backward()
    clipper._optimizer.step()
    lazy(torch.ones(3, 200)).sum().backward()
    assert warm(clipper) == 1


def test_a_default_device_of_the_user_s() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    # As torch.set_default_device, which PyTorch 2.6 does not get over once it is undone.
    with torch.device("meta"):
        clipper = gtorch.attach(optimizer, 2.5)
        optimizer.step()
        assert {clipper.norm.device.type, clipper.steps.device.type} == {"cpu"}
        assert gtorch.clip_grad_norm_([weight], 1.0).device.type == "cpu"
    torch.testing.assert_close(weight.detach(), torch.tensor([-1.5, -2.0]))


def test_a_norm_that_is_subnormal_where_the_host_flushes_those() -> None:
    weight = torch.nn.Parameter(torch.zeros(40_000))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper = gtorch.attach(optimizer, 1.0)
    weight.grad = torch.full((40_000,), 1e-41)
    torch.set_flush_denormal(True)
    try:
        optimizer.step()
        norm = clipper.norm
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(norm, gtorch.get_total_norm([weight.grad]))
    assert norm > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore:Dynamo:UserWarning")
def test_a_compiled_step() -> None:
    import gradclip

    torch._dynamo.reset()
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper = gtorch.attach(optimizer, 2.5)
    weight.grad = torch.tensor([3.0, 4.0])
    torch.compile(optimizer.step, backend="eager")()
    assert (weight.tolist(), float(clipper.norm)) == ([-1.5, -2.0], 5)
    fused = torch.optim.SGD([weight], lr=1.0, fused=True)
    clipper.remove()
    clipper = gtorch.attach(fused, 1.0)
    torch.compile(fused.step, backend="eager")()
    assert float(clipper.factor) < 1
    assert not hasattr(fused, "grad_scale")
    clip = torch.compile(lambda x: gradclip.clip_by_global_norm([x], 1.0)[0][0], backend="eager")
    assert torch.equal(clip(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 4.0]) / 5)


@pytest.mark.slow
@pytest.mark.parametrize("calls", [10_000, pytest.param(50_000, marks=pytest.mark.long)])
def test_hooks_leak_nothing(calls: int) -> None:
    weight = torch.nn.Parameter(torch.ones(1 << 14))
    watch = cpu.watch()
    weight.grad = torch.ones(1 << 14)

    def blocks(calls: int) -> int:
        import sys

        for _ in range(calls):
            watch(weight)
            watch.sums(weight.grad)
        gc.collect()
        return sys.getallocatedblocks()

    pointers._c_interface()
    blocks(1000)
    first = blocks(1000)
    assert blocks(calls) - first < 500
