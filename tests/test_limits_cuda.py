"""Limits that learn on a device: Triton's kernels, in its interpreter, against the host's."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import math
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import gradclip
import papers
from cases import DTYPES, near_midpoints
from compare import assert_same_bits
from conftest import _torch_read, _torch_tensor, lacks
from gradclip import limits
from gradclip.core import exact
from gradclip.core.arithmetic import HOST

if reason := lacks("torch", "triton"):
    pytest.skip(reason, allow_module_level=True)
if os.environ["TRITON_INTERPRET"] == "0":
    pytest.skip("the kernels are to run on a device", allow_module_level=True)
import torch
import triton
import triton.language as tl

import gradclip.torch as gtorch
from gradclip.kernels.gpu import each as each_leaf
from gradclip.kernels.gpu import learning
from gradclip.kernels.gpu import runs as gpu_runs
from gradclip.kernels.gpu.device.limits import copy_rule, judge
from gradclip.torch import backend, devices, gpu, pointers
from gradclip.torch.books import There
from host_torch import Counted, HostMemory, mutated, refuse_to_wait, torch_there

taken = pointers.taken  # before a fixture has replaced it


@pytest.fixture
def there() -> Iterator[None]:
    gpu_runs._scratch.clear()
    with torch_there():
        yield


@contextlib.contextmanager
def here() -> Iterator[None]:
    """Within `torch_there`: by the host's kernels all the same."""
    with (
        mock.patch.object(devices, "has_triton", return_value=False),
        mock.patch.object(pointers, "taken", taken),
    ):
        yield


# ---- the rules ----

KINDS: list[Any] = [
    *(limits.ZScore(2.0, 0.9, 5, beyond=beyond) for beyond in ("shrink", "edge", "mean", "skip")),
    limits.ZScore(2.5, 0.97, 0, 5.0, learn_from="raw"),
    limits.ZScore(3.0, 0.9, 4, log=True),
    limits.ZScore(2.0, 0.9, 4, 20.0, beyond="skip", log=True),
    limits.Percentile(97.3, 7),
    limits.Percentile(history=2000),  # of two tiles
    limits.Percentile(0, 1, 2.0),
    limits.Average(2.0, warmup=5),
    limits.Average(0.5, 0.9, 0, math.inf, learn_from="raw"),
]
EACH = [
    *(kind for kind in KINDS if not kind.skips),
    limits.Average(1.05, 0.9, 4, 0.5),
]


@triton.jit
def judged(
    before: tl.int64, after: tl.int64, norms: tl.int64, limits: tl.int64, flags: tl.int64,
    tensors: tl.int64, whole_at: tl.int64, steps: tl.int64,
    KIND: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Judge a block of norms; those of a kind that takes one at a time, one after the other."""
    copy_rule(before, after)
    whole = tl.load(whole_at.to(tl.pointer_type(tl.float64)))
    for first in range(0, tensors, BLOCK):
        if BLOCK == 1:
            place = tl.full([], 0, tl.int64) + first
            inside = place < tensors
        else:
            place = tl.arange(0, BLOCK).to(tl.int64)
            inside = place < tensors
        pointers = (norms + 8 * place).to(tl.pointer_type(tl.float64))
        norm = tl.load(pointers, mask=inside, other=1.0)
        of = whole
        if EACH == 0:
            of = norm
        limit, learnt, skip = judge(
            before, after, tensors, place, inside, norm, of, steps > 0, KIND, EACH
        )
        tl.store((limits + 8 * place).to(tl.pointer_type(tl.float64)), limit, mask=inside)
        told = learnt.to(tl.int64) + 2 * skip.to(tl.int64)
        tl.store((flags + 8 * place).to(tl.pointer_type(tl.int64)), told, mask=inside)


def takes_one(kind: Any) -> bool:
    """If a kind takes one norm at a time, also of tensors."""
    return isinstance(kind, limits.Percentile)


def some_rules(kind: Any) -> Any:
    """Those that take the interpreter long are for `make test-long`."""
    return pytest.param(kind, marks=[pytest.mark.long] if takes_one(kind) else [])


def columns(lanes: int, steps: int) -> list[list[float]]:
    """Of so many trainings as many norms: drawn, and hostile ones."""
    hostile = [
        [1e30, *[1.0] * steps],
        [0.1] * steps,
        [*[0.1] * 9, math.nextafter(0.1, 1), 0.1, 0.2, 0.1] * steps,
        [5e-324, 1e-310, 5e-324] * steps,
        [1.7e308, 1e300, 1.0] * steps,
        [10.0**-k for k in range(max(steps, 300))],
        [10.0**k for k in range(max(steps, 300))],
        [1.0, math.nan, 0.0, math.inf, 2.0] * steps,
        [math.inf, math.nan, 0.0, *[3.0, 4.0] * steps],
        [*(1e-9 * (1 + k % 3 / 10) for k in range(19)), 1e-7, *[1e-9] * steps],
    ]
    drawn = [papers.norms_of(seed, steps) for seed in range(lanes)]
    return [norms[:steps] for norms in [*hostile, *drawn][:lanes]]


def check_rule(kind: Any, *, each: bool = False, steps: int = 40) -> int:
    """Have the rule of the device judge what the host's does; how many norms that were."""
    by_one = takes_one(kind)
    lanes, steps = (12, 26) if by_one else (64, steps)
    every = list(zip(*columns(lanes, steps), strict=True))
    before = learning._packed(kind, kind.begin(HOST, (lanes,)), lanes)
    number, _ = learning._rule(kind)
    states = [kind.begin(HOST) for _ in range(lanes)]
    close = getattr(kind, "log", False)
    for norms in every:
        finite = [x for x in norms if math.isfinite(x)]
        whole = math.sqrt(math.fsum(min(x, 1e150) ** 2 for x in finite))
        after, found, flags = np.zeros_like(before), np.zeros(lanes), np.zeros(lanes, np.int64)
        args = (before, after, np.array(norms), found, flags)
        whole_at = np.array(whole)
        with np.errstate(all="ignore"):
            judged[(1,)](
                *(each.ctypes.data for each in args),
                lanes,
                whole_at.ctypes.data,
                1,
                KIND=number,
                EACH=each,
                BLOCK=1 if by_one else lanes,
            )
        rulings = [
            kind.judge(HOST, state, norm, whole if each else None)
            for state, norm in zip(states, norms, strict=True)
        ]
        states = [ruling.state for ruling in rulings]
        told = [int(bool(r.learnt)) + 2 * int(bool(r.skip)) for r in rulings]
        assert flags.tolist() == told
        wanted = learning._packed(kind, [*map(np.array, zip(*states, strict=True))], lanes)
        wanted[learning.RULE :][:lanes] = np.array([r.limit for r in rulings]).view(np.int64)
        compare(after, wanted, close=close)
        assert (found.view(np.int64) == after[learning.RULE :][:lanes]).all()
        before = after
    return lanes * len(every)


def compare(found: Any, wanted: Any, *, close: bool) -> None:
    """Words that are the same bits; if only ``close``, as numbers, of which counts are tiny."""
    if close:
        np.testing.assert_allclose(found.view(np.float64), wanted.view(np.float64), rtol=1e-12)
    else:
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", [some_rules(kind) for kind in KINDS], ids=repr)
def test_a_rule_is_that_of_the_host(kind: Any) -> None:
    assert check_rule(kind) > 300


@pytest.mark.parametrize("kind", [kind for kind in EACH if not takes_one(kind)], ids=repr)
def test_a_rule_of_tensors_is_that_of_the_host(kind: Any) -> None:
    assert check_rule(kind, each=True, steps=20) > 300


def test_where_there_is_no_step_nothing_changes() -> None:
    for kind in KINDS:
        number, _ = learning._rule(kind)
        before = learning._packed(kind, kind.begin(HOST, (1,)), 1)
        room, after = np.zeros(1), np.zeros_like(before)
        norm = np.array(7.0)
        arrays = (before, after, norm, room, np.zeros(1, np.int64))
        addresses = [each.ctypes.data for each in arrays]
        judged[(1,)](*addresses, 1, norm.ctypes.data, 0, KIND=number, EACH=False, BLOCK=1)
        np.testing.assert_array_equal(before, after)


# ---- the doors ----

SOME: list[Any] = [
    limits.ZScore(2.0, 0.9, 3),
    limits.ZScore(2.0, 0.9, 3, beyond="skip"),
    limits.Percentile(60, 5),
    limits.Average(1.1, 0.9, 2),
]
TENSORS = [limits.PerTensor(kind) for kind in (SOME[0], SOME[2], limits.Average(1.05, 0.9, 3))]
NORMS = [3.0, 4.0, 3.5, 50.0, math.nan, 2.0, 0.0, 60.0, math.inf, 5.0]


def fresh(limit: Any) -> Any:
    """One that has learnt nothing."""
    return dataclasses.replace(limit)


def gradients(norm: float) -> list[Any]:
    """Two, whose norm is about this."""
    return [torch.tensor([0.6 * norm, 0.0, 1e-3 * norm]), torch.tensor([[0.8 * norm]])]


def in_place(leaves: list[Any], limit: Any) -> Any:
    return leaves, gradclip.clip_by_global_norm_(leaves, limit)


def by_pytorch(leaves: list[Any], limit: Any) -> Any:
    parameters = [torch.nn.Parameter(torch.zeros_like(leaf)) for leaf in leaves]
    for parameter, leaf in zip(parameters, leaves, strict=True):
        parameter.grad = leaf
    return leaves, gtorch.clip_grad_norm_(parameters, limit)


DOORS = {"new": gradclip.clip_by_global_norm, "in place": in_place, "PyTorch's": by_pytorch}


def same(ones: Any, others: Any) -> None:
    for one, other in zip(ones, others, strict=True):
        assert_same_bits(_torch_read(one), _torch_read(other), nan_payload=False)


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", SOME, ids=repr)
def test_a_device_learns_and_clips_as_the_host(kind: Any, door: str) -> None:
    clip, one, other = DOORS[door], fresh(kind), fresh(kind)
    for norm in NORMS:
        found = clip(gradients(norm), one)
        with here():
            wanted = clip(gradients(norm), other)
        same([*found[0], found[1]], [*wanted[0], wanted[1]])
        assert isinstance(one.last_limit, torch.Tensor)
        assert float(one.last_limit) == other.last_limit
    assert one.state_dict() == other.state_dict()
    assert one.state_dict()["count"] > 3


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, there: None) -> type[Counted]:  # noqa: ARG001
    monkeypatch.setattr(gpu, "Memory", Counted)
    Counted.launched.clear()
    Counted.sent_rows.clear()
    gpu_runs._tables.clear()
    return Counted


@pytest.mark.parametrize("kind", SOME, ids=repr)
def test_the_host_never_waits(
    kind: Any, counted: type[Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, leaves = fresh(kind), gradients(3.0)
    parameters = [torch.nn.Parameter(torch.zeros_like(leaf)) for leaf in leaves]
    for parameter, leaf in zip(parameters, leaves, strict=True):
        parameter.grad = leaf
    optimizer = torch.optim.SGD(parameters, lr=0.1, fused=True)
    clipper = gtorch.attach(optimizer, fresh(kind))
    with monkeypatch.context() as patched:
        refuse_to_wait(patched)
        for _ in range(3):
            counted.launched.clear()
            gradclip.clip_by_global_norm_(leaves, limit)
            assert counted.launched == ["measure", "rewrite"]
            gtorch.clip_grad_norm_(parameters, limit)
            optimizer.step()
            assert counted.launched == ["measure", "rewrite"] * 3
            _ = limit.last_limit, clipper.limit, clipper.norm
        with pytest.raises(AssertionError, match="waits"):
            limit.state_dict()
    assert limit.state_dict()["count"] == 6
    assert len(counted.sent_rows) == 1 + 2, "one table, and two states to begin with"


@pytest.mark.long
@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("way", ["dict", "pickle", "deepcopy", "here", "there"])
@pytest.mark.parametrize("kind", SOME, ids=repr)
def test_what_is_saved_or_moved_goes_on_to_the_bit(kind: Any, way: str) -> None:
    one, other = fresh(kind), fresh(kind)
    for norm in NORMS[:6]:
        gradclip.clip_by_global_norm_(gradients(norm), one)
        gradclip.clip_by_global_norm_(gradients(norm), other)
    moved: Any = contextlib.nullcontext
    if way == "dict":
        other = fresh(kind)
        other.load_state_dict(one.state_dict())
    elif way in ("pickle", "deepcopy"):
        other = pickle.loads(pickle.dumps(one)) if way == "pickle" else copy.deepcopy(one)
        assert other.last_limit == float(one.last_limit)
    else:
        moved = here
    for number, norm in enumerate(NORMS[5:]):
        gradclip.clip_by_global_norm_(gradients(norm), one)
        with moved() if number % 2 == (way == "here") else contextlib.nullcontext():
            gradclip.clip_by_global_norm_(gradients(norm), other)
    assert one.state_dict() == other.state_dict()


@pytest.mark.usefixtures("there")
def test_an_error_teaches_nothing() -> None:
    limit = limits.Average(1.1, warmup=1)
    for norm in (3.0, 4.0):
        gradclip.clip_by_global_norm_(gradients(norm), limit)
    known, told = limit.state_dict(), float(limit.last_limit)
    leaves = [torch.tensor([math.nan])]
    with pytest.raises(FloatingPointError, match="holds 1 NaN"):
        gradclip.clip_by_global_norm_(leaves, limit, on_nonfinite="raise")
    assert limit.state_dict() == known
    assert float(limit.last_limit) == told
    gradclip.clip_by_global_norm_(gradients(5.0), limit, on_nonfinite="raise")
    assert limit.state_dict()["count"] == 3


@pytest.mark.usefixtures("there")
def test_a_given_norm_is_learnt() -> None:
    limit = limits.Percentile(50)
    for given in (7.0, torch.tensor(7.0), torch.tensor(7.0, dtype=torch.float64)):
        gradclip.clip_by_global_norm_([torch.ones(3)], limit, given)
        assert limit.last_limit == 7


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("kind", [SOME[3], limits.PerTensor(SOME[3])], ids=repr)
def test_a_replay_goes_on_from_what_the_one_before_has_learnt(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph: list[Callable[[], Any]] = []
    kept: list[Any] = []  # the memory of a graph is its own

    class Capturing(HostMemory):
        is_capturing = property(lambda _: True)  # type: ignore[assignment]

        def zeros(self, words: int) -> Any:
            new = super().zeros(words)
            graph.append(new.zero_)
            return new

        def empty(self, words: int) -> Any:
            kept.append(super().empty(words))
            return kept[-1]

        def sent(self, words: Any, *, again: bool) -> Any:
            kept.append(super().sent(words, again=again))
            return kept[-1]

        def assign(self, target: Any, source: Any) -> None:
            graph.append(lambda: target.copy_(source))

        def launch(self, kernel: Any, programs: int, args: Any, **constants: int) -> None:
            launch = super().launch
            graph.append(lambda: launch(kernel, programs, args, **constants))

    leaf = torch.tensor([3.0, 4.0])
    one, other = fresh(kind), fresh(kind)
    with monkeypatch.context() as patched:
        patched.setattr(gpu, "Memory", Capturing)
        text = (
            f"{kind!r} has learnt nothing on this device, and a graph that is captured would begin "
            "anew at each replay: clip once before capturing"
        )
        with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
            gradclip.clip_by_global_norm_([leaf], one)
    gradclip.clip_by_global_norm_([torch.tensor([3.0, 4.0])], one)
    gradclip.clip_by_global_norm_([torch.tensor([3.0, 4.0])], other)
    graph.clear()
    with monkeypatch.context() as patched:
        patched.setattr(gpu, "Memory", Capturing)
        of_replay = gradclip.clip_by_global_norm_([leaf], one)
    for norm in (6.0, 1.0, 20.0, 3.0):
        leaf.copy_(torch.tensor([0.6, 0.8]) * norm)
        fresh_leaf = leaf.clone()
        for each in graph:
            each()
        gradclip.clip_by_global_norm_([fresh_leaf], other)
        same([leaf], [fresh_leaf])
        assert of_replay == np.float32(norm)
        assert one.last_limit == other.last_limit
        assert one.state_dict() == other.state_dict()


# ---- attach ----


def trained(kind: Any, *, fused: bool, scaler: bool, policy: str) -> Any:
    """All that a clipper tells after each of some steps, and what its limits have learnt."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    groups: Any = model.parameters()
    if isinstance(kind, list):
        groups = [{"params": part.parameters()} for part in (model[0], model[2])]
    limit = [fresh(each) for each in kind] if isinstance(kind, list) else fresh(kind)
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=fused)
    clipper = gtorch.attach(optimizer, limit, on_nonfinite=policy)
    amp = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) if scaler else None
    told = []
    for step in range(8):
        inputs = torch.randn(16, 5) * (30 if step in (5, 7) else 1)
        loss = (model(inputs) ** 2).mean()
        if amp is None:
            loss.backward()
            if step in (1, 4, 6):
                model[0].weight.grad[0, 0] = math.nan if step == 4 else math.inf
            optimizer.step()
        else:
            amp.scale(loss * (math.inf if step == 3 else 1)).backward()
            amp.step(optimizer)
            amp.update()
        optimizer.zero_grad()
        state = clipper.state_dict()
        learnt = [list(each.values()) for each in state.pop("limits")]
        told.append((clipper.norm, clipper.limit, clipper.factor, state, learnt))
    return clipper, told, [parameter.detach() for parameter in model.parameters()]


def check_learnt(found: Any, wanted: Any, rtol: float) -> None:
    """The same counts, and the same numbers, or nearly so."""
    if isinstance(wanted, dict):
        found, wanted = list(found.items()), list(wanted.items())
    if isinstance(wanted, list | tuple):
        for one, other in zip(found, wanted, strict=True):
            check_learnt(one, other, rtol)
    elif isinstance(wanted, float):
        np.testing.assert_allclose(found, wanted, rtol=10 * rtol, atol=rtol**2)
    else:
        assert found == wanted


def check_attach(kind: Any, *, on_a_device: bool = True, **how: Any) -> Any:
    """The same books, limits and weights as on the host."""
    clipper, found, weights = trained(kind, **how)
    assert isinstance(clipper._books, There) == on_a_device
    with here():
        _, wanted, others = trained(kind, **how)
    rtol = 1e-5 if how["fused"] else 0  # where the host folds the factor into the step
    for one, other in zip(found, wanted, strict=True):
        for ours, theirs in zip(one[:3], other[:3], strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=rtol)
        assert one[3] == other[3]
        check_learnt(one[4], other[4], rtol)
    for one, other in zip(weights, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol)
    return clipper


@pytest.mark.long
@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [SOME[0], SOME[3], [SOME[2], limits.ZScore(warmup=2)]], ids=repr)
def test_attach_learns_as_on_the_host(kind: Any, fused: bool, scaler: bool) -> None:
    check_attach(kind, fused=fused, scaler=scaler, policy="zero")


@pytest.mark.long
@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("scaler", [False, True])
def test_a_fused_step_that_stands_out_is_skipped_there(scaler: bool) -> None:
    clipper = check_attach(SOME[1], fused=True, scaler=scaler, policy="zero")
    assert clipper.skipped_steps > 0


@pytest.mark.usefixtures("there")
def test_the_host_waits_where_an_optimizer_cannot_be_told_to_skip() -> None:
    clipper = check_attach(SOME[1], fused=False, scaler=False, policy="zero", on_a_device=False)
    assert clipper.skipped_steps > 0


@pytest.mark.usefixtures("there")
def test_a_step_that_fails_teaches_nothing() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    limit = limits.Average(1.1, warmup=1)
    clipper = gtorch.attach(optimizer, limit)
    for size in (1.0, 2.0):
        parameter.grad = size * torch.tensor([3.0, 4.0])
        optimizer.step()
    known = limit.state_dict()
    failing = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    parameter.grad = torch.tensor([3.0, 4.0])
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    failing.remove()
    assert isinstance(clipper._books, There)
    assert limit.state_dict() == known
    assert clipper.state_dict()["limits"] == [known]
    assert clipper.steps == 2


@pytest.mark.long
@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("kind", [*SOME, *TENSORS], ids=repr)
def test_a_step_that_the_scaler_skips_teaches_nothing(kind: Any) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD(parameters, lr=1.0, fused=True)
    optimizer.grad_scale = torch.tensor(4.0)
    limit = fresh(kind)
    clipper = gtorch.attach(optimizer, limit)
    for size, found_inf in ((1.0, 0.0), (2.0, 0.0), (1.5, 0.0), (9.0, 1.0), (1.25, 0.0)):
        optimizer.found_inf = torch.tensor(found_inf)
        for parameter in parameters:
            parameter.grad = size * torch.tensor([3.0, 4.0])
        told = limit.state_dict(), clipper.limit.tolist(), clipper.norm.tolist()
        weights = [parameter.tolist() for parameter in parameters]
        optimizer.step()
        assert isinstance(clipper._books, There)
        after = limit.state_dict(), clipper.limit.tolist(), clipper.norm.tolist()
        assert (str(told) == str(after)) == bool(found_inf)
        assert ([parameter.tolist() for parameter in parameters] == weights) == bool(found_inf)
    assert clipper.steps == 4
    assert clipper.norm == torch.tensor([3.0, 4.0] * 2).norm() * 1.25 / 4  # without the scale


@pytest.mark.usefixtures("there")
def test_books_and_limits_move_between_host_and_device() -> None:
    def run(places: list[bool]) -> Any:
        parameter = torch.nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        clipper = gtorch.attach(optimizer, fresh(SOME[0]))
        told = []
        for size, on_a_device in zip((1.0, 1.1, 0.9, 9.0, 1.0, 8.0), places, strict=True):
            parameter.grad = size * torch.tensor([3.0, 4.0])
            with contextlib.nullcontext() if on_a_device else here():
                optimizer.step()
            told.append([float(clipper.limit), float(clipper.norm), clipper.state_dict()])
        return told, parameter.tolist()

    wanted = run([False] * 6)
    assert run([True] * 6) == wanted
    assert run([True, False] * 3) == wanted
    assert run([False, False, True, True, False, True]) == wanted


@pytest.mark.usefixtures("there")
def test_the_limit_of_a_number_is_told_too() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    clipper = gtorch.attach(optimizer, lambda step: 1.0 / (step + 1))
    for step in range(2):
        parameter.grad = torch.tensor([3.0, 4.0])
        optimizer.step()
        assert isinstance(clipper._books, There)
        assert clipper.limit == 1.0 / (step + 1)
    clipper.max_norm = limits.Average(2.0, limit=7.0)
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert clipper.limit == 7
    clipper.max_norm = 3.0
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert clipper.limit == 3


# ---- each tensor by itself ----


def several(seed: int, names: str = "float32") -> list[Any]:
    """Gradients of several sizes and kinds, one of them empty and one of zeros."""
    rng = np.random.default_rng(seed)
    sizes = [7, 0, 5000, 3, 2, 1]
    kinds = [torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float32]
    kinds.append(torch.float16 if names == "float32" else torch.float64)
    found = []
    for size, kind in zip(sizes, kinds, strict=True):
        values = rng.standard_normal(size) * rng.lognormal(0, 1.5)
        found.append(torch.tensor(values).to(kind))
    found[4].zero_()
    return found


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("names", ["float32", pytest.param("float64", marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", TENSORS, ids=repr)
def test_tensors_are_clipped_as_by_the_host(kind: Any, names: str) -> None:
    one, other = fresh(kind), fresh(kind)
    for step in range(8):
        ones = several(step, names)
        if step == 5:
            ones[0][0] = math.nan
        if step == 6:
            ones[2] *= 1e-30
        others = [each.clone() for each in ones]
        if step % 2:
            norm = gradclip.clip_by_global_norm_(ones, one)
        else:
            ones, norm = gradclip.clip_by_global_norm(ones, one)
        with here():
            wanted = gradclip.clip_by_global_norm_(others, other)
        same([*ones, norm], [*others, wanted])
        assert isinstance(one.last_limit, torch.Tensor)
        assert one.last_limit.tolist() == other.last_limit.tolist()
    assert one.state_dict() == other.state_dict()
    assert max(each["count"] for _, each in one.state_dict()["tensors"]) == 7


@pytest.mark.usefixtures("there")
def test_tensors_of_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(each_leaf, "BLOCK", 4)
    for kind in TENSORS:
        one, other = fresh(kind), fresh(kind)
        for step in range(5):
            ones, others = several(step), several(step)
            gradclip.clip_by_global_norm_(ones, one)
            with here():
                gradclip.clip_by_global_norm_(others, other)
            same(ones, others)
        assert one.state_dict() == other.state_dict()


@pytest.mark.long
@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("policy", ["nan", "zero", "keep", None])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_where_one_tensor_is_not_finite_all_go_its_way(value: float, policy: Any) -> None:
    limit = limits.PerTensor(limits.Average(1.05, warmup=1))
    for step in range(2):
        gradclip.clip_by_global_norm_(several(step), limit)
    known = limit.state_dict()
    found = []
    for place in (contextlib.nullcontext, here):
        parameters = [torch.nn.Parameter(torch.zeros_like(each)) for each in several(2)]
        for parameter, each in zip(parameters, several(2), strict=True):
            parameter.grad = each
        parameters[3].grad[1] = value
        other = fresh(limit)
        other.load_state_dict(known)
        with place():
            gtorch.clip_grad_norm_(parameters, other, on_nonfinite=policy)
        assert other.state_dict() == known
        found.append([parameter.grad for parameter in parameters])
    same(*found)


def test_three_launches_and_no_wait(
    counted: type[Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, leaves = fresh(TENSORS[2]), several(0)
    parameters = [torch.nn.Parameter(torch.zeros_like(leaf)) for leaf in leaves]
    for parameter, leaf in zip(parameters, leaves, strict=True):
        parameter.grad = leaf
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    clipper = gtorch.attach(optimizer, fresh(limit))
    with monkeypatch.context() as patched:
        refuse_to_wait(patched)
        for _ in range(3):
            counted.launched.clear()
            gradclip.clip_by_global_norm(leaves, limit)
            gradclip.clip_by_global_norm_(leaves, limit)
            optimizer.step()
            assert counted.launched == ["measure_each", "decide_each", "rewrite_each"] * 3
            _ = limit.last_limit, clipper.limit, clipper.norm, clipper.factor
    assert dict(limit.state_dict()["tensors"])[0]["count"] == 6


@pytest.mark.long
@pytest.mark.usefixtures("there")
def test_norms_of_tensors_between_two_numbers_are_added_exactly() -> None:
    """The certificate fails: of one leaf, or of all together."""
    rng = np.random.default_rng(3)
    for leaves in near_midpoints(rng, DTYPES["float32"], 4):
        ones = [_torch_tensor(each) for each in leaves]
        for tensors in (ones, [torch.cat([x.ravel() for x in ones])]):
            whole, each = backend.hold(tensors, str, writable=False).measure_each()
            with here():
                wanted = backend.hold(tensors, str, writable=False).measure_each()
            assert whole == wanted[0]
            for found, right in zip(each, wanted[1], strict=True):
                np.testing.assert_array_equal(found, right)


@pytest.mark.long
@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize(
    "kind", [TENSORS[0], TENSORS[2], [TENSORS[1], limits.ZScore(warmup=2)]], ids=repr
)
def test_attach_clips_tensors_as_on_the_host(kind: Any, scaler: bool) -> None:
    clipper, found, weights = trained(kind, fused=scaler, scaler=scaler, policy="zero")
    assert isinstance(clipper._books, There)
    with here():
        _, wanted, others = trained(kind, fused=scaler, scaler=scaler, policy="zero")
    rtol = 1e-5 if scaler else 0  # a global factor is folded into the step by the host
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one[0], other[0], rtol=rtol)
        for ours, theirs in zip(flat(one[1]), flat(other[1]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=rtol)
        np.testing.assert_allclose(one[2], other[2], rtol=rtol)
        assert one[3] == other[3]
        check_learnt(one[4], other[4], rtol)
    for one, other in zip(weights, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol)
    assert clipper.clipped_steps > 0


@pytest.mark.long
@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("kind", TENSORS, ids=repr)
def test_a_scale_that_is_no_power_of_two_is_taken_out_of_each_norm(kind: Any) -> None:
    found = []
    for place in (contextlib.nullcontext, here):
        parameters = [torch.nn.Parameter(torch.zeros_like(each)) for each in several(0)]
        optimizer = torch.optim.SGD(parameters, lr=1.0, fused=True)
        limit = fresh(kind)
        clipper = gtorch.attach(optimizer, limit)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.7), torch.tensor(0.0)
        told = []
        for step in range(5):
            for parameter, each in zip(parameters, several(step), strict=True):
                parameter.grad = each
            with place():
                optimizer.step()
            told += [*(parameter.grad for parameter in parameters), clipper.norm, clipper.limit]
        found.append((told, limit.state_dict()))
    same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def flat(told: Any) -> list[Any]:
    """Limits of each list, or of the one that there is."""
    return list(told) if isinstance(told, tuple) else [told]


@pytest.mark.usefixtures("there")
def test_a_fused_step_with_a_nan_is_skipped_and_no_tensor_learns() -> None:
    clipper, found, _ = trained(TENSORS[2], fused=True, scaler=False, policy="skip")
    assert isinstance(clipper._books, There)
    with here():
        _, wanted, _ = trained(TENSORS[2], fused=True, scaler=False, policy="skip")
    for one, other in zip(found, wanted, strict=True):
        assert one[3] == other[3]
    assert clipper.skipped_steps == 3


@pytest.mark.usefixtures("there")
def test_tensors_that_come_and_go_keep_what_they_have_learnt() -> None:
    def run(place: Any) -> Any:
        limit = limits.PerTensor(limits.Average(1.05, warmup=1))
        for step in range(6):
            leaves: list[Any] = several(step)
            if step % 3 == 1:
                leaves[2] = None
            with place():
                gradclip.clip_by_global_norm_(leaves, limit)
        return limit.state_dict()

    assert run(contextlib.nullcontext) == run(here)


@pytest.mark.usefixtures("there")
def test_a_gradient_listed_twice_counts_once_or_is_refused_before_one_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for place in (contextlib.nullcontext, here):
        leaf, limit = torch.tensor([3.0, 4.0]), limits.PerTensor(limits.Average(1.1, limit=2.5))
        with place():
            norm = gradclip.clip_by_global_norm_([leaf, leaf], limit)
        found.append((leaf.tolist(), float(norm), limit.state_dict()))
    assert found[0] == found[1]
    assert found[0][:2] == ([1.5, 2.0], 5.0)

    monkeypatch.setattr(pointers.cpu, "kernel", lambda: "numpy")
    text = "a leaf is listed twice, and limits.PerTensor would clip it twice"
    leaf = torch.tensor([3.0, 4.0])
    with pytest.raises(ValueError, match=f"^{text}$"):
        gradclip.clip_by_global_norm_([leaf, leaf], limits.PerTensor(SOME[3]))
    assert leaf.tolist() == [3.0, 4.0]
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    gtorch.attach(
        optimizer := torch.optim.SGD(groups, lr=1.0), [1.0, limits.PerTensor(limits.Percentile())]
    )
    parameters[0].grad = torch.tensor([3.0, 4.0])
    parameters[1].grad = parameters[2].grad = leaf
    with pytest.raises(ValueError, match=f"^{text}$"):
        optimizer.step()
    assert parameters[0].grad.tolist() == [3.0, 4.0]


@pytest.mark.usefixtures("there")
def test_tensors_where_the_host_decides() -> None:
    """To raise it has to see the norms; and factors come from it."""
    parameters = [torch.nn.Parameter(torch.zeros_like(each)) for each in several(0)]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    clipper = gtorch.attach(
        optimizer, limits.PerTensor(limits.Average(1.05, warmup=1)), on_nonfinite="raise"
    )
    other = limits.PerTensor(limits.Average(1.05, warmup=1))
    for step in range(3):
        for parameter, each in zip(parameters, several(step), strict=True):
            parameter.grad = each
        wanted = several(step)
        optimizer.step()
        with here():
            gradclip.clip_by_global_norm_(wanted, other)
        same([parameter.grad for parameter in parameters], wanted)
        assert clipper.limit.tolist() == other.last_limit.tolist()
    held = backend.hold(several(1), str, writable=False)
    factors = exact.ScaledArray.of(map(exact.Scaled.of, (0.5, 1.0, 0.25, 1.0, 1.0, 2.0)))
    wanted = [each * factor for each, factor in zip(several(1), factors.floats(), strict=True)]
    same(held.scaled_each(factors), wanted)


def test_an_error_between_two_launches_leaves_no_sums(
    counted: type[Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, leaves = (
        limits.PerTensor(limits.Percentile()),
        [torch.tensor([3.0]), torch.tensor([4.0])],
    )

    def fail(self: Any, kernel: Any, *args: Any, **constants: int) -> None:
        if kernel.fn.__name__ == "decide_each":
            raise KeyboardInterrupt
        HostMemory.launch(self, kernel, *args, **constants)

    with monkeypatch.context() as patched:
        patched.setattr(counted, "launch", fail)
        with pytest.raises(KeyboardInterrupt):
            gradclip.clip_by_global_norm_(leaves, limit)
    assert gradclip.clip_by_global_norm_(leaves, limit) == 5
    assert limit.last_limit.tolist() == [3.0, 4.0]


# ---- mutations ----

Z, Z_MEAN, Z_SKIP, Z_RAW, Z_LOG = (KINDS[place] for place in (0, 2, 3, 4, 5))
LATEST, MEAN, ADAGC = KINDS[7], KINDS[10], EACH[-1]

RULES: dict[str, tuple[str, str, Any]] = {
    "not shrunk": ("(z / tl.where(outlier, score, z))", "1.0", Z),
    "never the mean": ("tl.where(beyond == _MEAN, mean, ", "tl.where(beyond == 9, mean, ", Z_MEAN),
    "small norms do not stand out": ("tl.minimum(size / 1000, micro)", "micro", Z),
    "a step that is skipped teaches": ("teaches & (skip == 0)", "teaches", Z_SKIP),
    "no step is skipped": (
        "tl.where(beyond == _SKIP, z, float",
        "tl.where(beyond == 9, z, float",
        Z_SKIP,
    ),
    "another variance": ("later_var = decay * var +", "later_var = var +", Z),
    "another variance in the warm-up": ("* (x - early_mean) - var", "* (x - mean) - var", Z),
    "the constant is passed over": ("tl.minimum(allowed, constant)", "allowed", Z_RAW),
    "raw norms are not learnt": ("tl.where(raw == 0, bound, x)", "bound", Z_RAW),
    "a limit of logarithms": ("allowed = tl.exp(bound)", "allowed = bound", Z_LOG),
    "an average of what is not clipped": ("tl.minimum(x, allowed), x)", "x, x)", MEAN),
    "another average in the warm-up": (
        "average + (x - average) / (count + 1)",
        "x / (count + 1)",
        MEAN,
    ),
    "the latest of the warm-up": (
        "tl.minimum(average, clipped), clipped",
        "clipped, clipped",
        ADAGC,
    ),
    "another leaves": ("tl.where(here < oldest, here", "tl.where(here <= oldest, here", LATEST),
    "no interpolation": ("tl.minimum(below + 1, last)", "below", LATEST),
    "what teaches nothing is put down": ("tl.where(teaches, x, ring)", "x", LATEST),
    "a step that is not taken teaches": ("steps & (whole < float", "(whole < float", None),
    "a step that is not taken has a limit": ("tl.where(steps, limit, old)", "limit", None),
    "inf teaches": ("(norm > 0) & (norm < below)", "norm > 0", MEAN),
}


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=[pytest.mark.long] * takes_one(kind))
        for x, (*_, kind) in RULES.items()
    ],
)
def test_a_mutation_of_a_rule_is_seen(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, kind = RULES[name]
    mutated(tmp_path, old, new, monkeypatch)
    rules = importlib.import_module(f"mutated_{tmp_path.name}.device.limits")
    noticing = partial(check_rule, kind, each=kind is ADAGC)
    if kind is None:
        noticing = test_where_there_is_no_step_nothing_changes
    with (
        mock.patch.object(sys.modules[__name__], "judge", rules.judge),
        pytest.raises(AssertionError),
    ):
        noticing()


def check_tensors() -> None:
    limit, other = fresh(TENSORS[2]), fresh(TENSORS[2])
    for step in range(6):
        ones, others = several(step), several(step)
        if step == 4:
            ones[0][0] = others[0][0] = math.inf
        found = gradclip.clip_by_global_norm_(ones, limit)
        with here():
            wanted = gradclip.clip_by_global_norm_(others, other)
        same([*ones, found], [*others, wanted])
    assert limit.state_dict() == other.state_dict()


def check_twice() -> None:
    """The second call finds what the first has left."""
    leaves, limit = (
        [torch.tensor([3.0]), torch.tensor([4.0])],
        limits.PerTensor(limits.Percentile(100)),
    )
    for _ in range(2):
        assert gradclip.clip_by_global_norm_(leaves, limit) == 5


OF_EACH: dict[str, tuple[str, str, Callable[[], None]]] = {
    "no certificate": (
        "(low < high).to(tl.int64)",
        "(low > high).to(tl.int64)",
        test_norms_of_tensors_between_two_numbers_are_added_exactly,
    ),
    "no certificate of all": (
        "    if high > low:",
        "    if high < low:",
        test_norms_of_tensors_between_two_numbers_are_added_exactly,
    ),
    "no bound": (
        "ends(sums, depth + end - first)",
        "ends(sums, (end - first) * 0 - 32)",
        test_norms_of_tensors_between_two_numbers_are_added_exactly,
    ),
    "the sums not cleared": (
        "        tl.store(float64_at(sums_at, leaf), tl.zeros([BLOCK], tl.float64), mask=inside)\n",
        "",
        check_twice,
    ),
    "each by its own norm in the warm-up": (
        "            own = tl.where(learnt, own, significand)\n",
        "",
        check_tensors,
    ),
    "inf in one leaf is of that leaf": ("tl.where(finite, todo, action)", "todo", check_tensors),
    "what is not finite is skipped": (
        "        skip = skip & (significand < 1)  # what is not finite goes by the policy\n",
        "",
        partial(check_attach, SOME[1], fused=True, scaler=False, policy="zero"),
    ),
    "what stands out is not skipped": (
        "skips = skip | (",
        "skips = (",
        partial(check_attach, SOME[1], fused=True, scaler=False, policy="zero"),
    ),
    "the scale is left in the norms of tensors": (
        "    return unscaled(significand, exponent, scale, WIDE)\n",
        "    return significand, exponent\n",
        partial(test_attach_clips_tensors_as_on_the_host, TENSORS[2], True),
    ),
    "every leaf by the factor of the first": (
        "by = tl.load(float64_at(room, leaf))",
        "by = tl.load(float64_at(room, 0))",
        check_tensors,
    ),
}


@pytest.mark.long
@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("name", OF_EACH)
def test_a_mutation_of_what_is_done_to_each_is_seen(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, noticing = OF_EACH[name]
    noticing()
    mutated(tmp_path, old, new, monkeypatch)
    kernels = importlib.import_module(f"mutated_{tmp_path.name}.triton")
    of_each = importlib.import_module(f"mutated_{tmp_path.name}.each")
    with (
        mock.patch.multiple(gpu_runs, cuda=kernels, each=of_each),
        pytest.raises(AssertionError),
    ):
        noticing()
    gpu_runs._tables.clear()
    gpu_runs._scratch.clear()
