"""Limits that set themselves under PyTorch's words, in attach, and unit-wise clipping."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gradclip  # noqa: E402
import gradclip.torch as gtorch  # noqa: E402
import papers  # noqa: E402
from gradclip import limits  # noqa: E402

KINDS = {
    "z": limits.ZScore(warmup=5),
    "skip": limits.ZScore(z=4.0, warmup=5, log=True, beyond="skip"),
    "percentile": limits.Percentile(50, 20, 2.0),
    "average": limits.Average(1.5, warmup=5),
    "each average": limits.PerTensor(limits.Average(1.05, warmup=5)),
    "each percentile": limits.PerTensor(limits.Percentile(50, 20, 2.0)),
}


def fresh(name: str) -> Any:
    return dataclasses.replace(KINDS[name])


def gradients(step: int, dtype: Any = torch.float32) -> list[Any]:
    """Of three parameters, one of them large enough to be measured in backward."""
    generator = torch.Generator().manual_seed(step)
    size = 1 + 30 * (step % 7 == 6)
    shapes = ((130, 150), (40,), (3, 5))
    return [(torch.randn(s, generator=generator) * size).to(dtype) for s in shapes]


def parameters(dtype: Any = torch.float32) -> list[Any]:
    return [torch.nn.Parameter(torch.zeros_like(x)) for x in gradients(0, dtype)]


def backward(weights: Any, grads: Any) -> None:
    """Have autograd write gradients."""
    torch.autograd.backward(list(weights), list(grads))


# ---- the same everywhere on this machine ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_numpy_and_every_way_of_pytorch_learn_the_same_bits(name: str, dtype: Any) -> None:
    ways = {way: fresh(name) for way in ("numpy", "core", "words", "attach", "fused")}
    weights = {way: parameters(dtype) for way in ways}
    optimizers = {
        "attach": torch.optim.SGD(weights["attach"], lr=1e-3),
        "fused": torch.optim.SGD(weights["fused"], lr=1e-3, fused=True),
    }
    clippers = {way: gtorch.attach(each, ways[way]) for way, each in optimizers.items()}
    for step in range(40):
        for way in ("core", "words", "attach", "fused"):
            for weight in weights[way]:
                weight.grad = None
            backward(weights[way], gradients(step, dtype))
        arrays = [x.double().numpy() if dtype is torch.float64 else x.float().numpy()
                  for x in gradients(step, dtype)]  # fmt: skip
        norm = gradclip.clip_by_global_norm_(arrays, ways["numpy"])
        core = gradclip.clip_by_global_norm_([x.grad for x in weights["core"]], ways["core"])
        words = gtorch.clip_grad_norm_(weights["words"], ways["words"])
        for optimizer in optimizers.values():
            optimizer.step()
        assert norm == core.item() == words.item() == clippers["attach"].norm.item()
        for one, other in zip(weights["core"], weights["words"], strict=True):
            assert torch.equal(one.grad, other.grad)
    state = ways["numpy"].state_dict()
    for way, limit in ways.items():
        if name.startswith("each"):  # whose tensors are told apart by places, or by names
            states = [x for _, x in limit.state_dict()["tensors"]]
            assert states == [x for _, x in state["tensors"]], way
        else:
            assert limit.state_dict() == state, way


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_each_norm_of_a_list_is_that_of_the_tensor_alone(dtype: Any) -> None:
    tensors = [*gradients(3, dtype), torch.zeros(0, dtype=dtype), torch.zeros(3, dtype=dtype)]
    limit = limits.PerTensor(limits.Percentile(50))
    gradclip.clip_by_global_norm(tensors, limit)
    wanted = [float(gradclip.global_norm([x])) for x in tensors]
    assert limit.last_limit.tolist() == [x or math.inf for x in wanted]


def test_sparse_gradients_and_float8_have_norms_of_their_own() -> None:
    rows = torch.sparse_coo_tensor(
        torch.tensor([[1, 1, 0]]), torch.ones(3, 2), (4, 2), check_invariants=False
    )
    codes = torch.tensor([1.0, 2.0, 4.0]).to(torch.float8_e5m2)
    tensors = [rows, codes, torch.ones(4)]
    limit = limits.PerTensor(limits.Percentile(50, factor=0.5))
    clipped, _ = gradclip.clip_by_global_norm(tensors, limit)
    norms = [float(gradclip.global_norm([x])) for x in tensors]
    assert limit.last_limit.tolist() == [0.5 * x for x in norms]
    assert float(gradclip.global_norm([clipped[0]])) == pytest.approx(norms[0] / 2)
    assert clipped[1].float().tolist() == [0.5, 1.0, 2.0]
    assert clipped[2].tolist() == [0.5] * 4


# ---- in attach ----


def step_with(optimizer: Any, weights: Any, grads: Any, scaler: Any = None) -> None:
    optimizer.zero_grad()
    backward(weights, grads if scaler is None else [scaler.scale(x) for x in grads])
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def tensors_of(optimizer: Any) -> list[Any]:
    """Copies of weights, and of all state."""
    found = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    for state in optimizer.state.values():
        found += [x.clone() for x in state.values() if isinstance(x, torch.Tensor)]
    return found


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_stands_out_is_skipped_whole(fused: bool) -> None:
    weights = parameters()
    optimizer = torch.optim.AdamW(weights, lr=1e-2, fused=fused)
    clipper = gtorch.attach(optimizer, limits.ZScore(warmup=5, beyond="skip"))
    for step in range(6):
        step_with(optimizer, weights, gradients(step))
    before, known = tensors_of(optimizer), clipper.state_dict()
    step_with(optimizer, weights, gradients(6))
    assert all(map(torch.equal, tensors_of(optimizer), before))
    assert clipper.limit < clipper.norm
    assert clipper.factor == 1
    changed = {**known, "begun": 7, "skipped_steps": 1}
    assert clipper.state_dict() == changed
    step_with(optimizer, weights, gradients(7))
    assert clipper.steps == 7
    assert not torch.equal(tensors_of(optimizer)[0], before[0])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("fused", [False, True])
def test_with_a_scaler_norms_are_without_its_scale(name: str, fused: bool) -> None:
    """A power of two, by which no bit changes; and what overflows under it teaches nothing."""
    found = []
    for scaled in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20) if scaled else None
        weights = parameters()
        optimizer = torch.optim.SGD(weights, lr=1e-3, fused=fused)
        clipper = gtorch.attach(optimizer, fresh(name))
        for step in range(25):
            if scaled and step == 12:
                known = clipper.state_dict()
                step_with(optimizer, weights, [x * 1e38 for x in gradients(0)], scaler)
                assert clipper.state_dict()["limits"] == known["limits"]
                scaler.update(2.0**20)
            step_with(optimizer, weights, gradients(step), scaler)
        found.append(clipper.state_dict()["limits"])
    assert found[0] == found[1]


def test_accumulated_gradients_are_one_norm() -> None:
    weights = parameters()
    optimizer = torch.optim.SGD(weights, lr=1e-3)
    clipper = gtorch.attach(optimizer, limits.ZScore())
    for _ in range(3):
        optimizer.zero_grad()
        for part in range(4):
            backward(weights, gradients(part))
        optimizer.step()
    assert clipper.state_dict()["limits"][0]["count"] == 3


@pytest.mark.parametrize("nothing", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("policy", ["nan", "zero", "keep", "skip"])
def test_nan_inf_and_0_teach_nothing(nothing: float, policy: Any) -> None:
    weights = parameters()
    optimizer = torch.optim.SGD(weights, lr=0.0)
    for name in KINDS:
        clipper = gtorch.attach(optimizer, fresh(name), on_nonfinite=policy)
        for step in range(6):
            step_with(optimizer, weights, gradients(step))
        known = clipper.state_dict()["limits"]
        step_with(optimizer, weights, [x * nothing for x in gradients(0)])
        assert clipper.state_dict()["limits"] == known
        skipped = policy == "skip" and nothing != 0
        assert (clipper.steps, clipper.skipped_steps) == (7 - skipped, skipped)
        clipper.remove()
        for weight in weights:
            weight.data.zero_()


def test_a_step_that_fails_teaches_nothing() -> None:
    class Failing(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise RuntimeError("out of memory")
            return super().step(closure)

    weights = parameters()
    optimizer = Failing(weights, lr=1e-3)
    clipper = gtorch.attach(optimizer, limits.Average(2.0))
    step_with(optimizer, weights, gradients(0))
    known = clipper.state_dict()
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        step_with(optimizer, weights, gradients(1))
    assert clipper.state_dict() == known


def test_groups_learn_by_objects_of_their_own() -> None:
    weights = parameters()
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}], lr=1e-3)
    limit = limits.ZScore()
    text = "max_norm has ZScore() for several groups; each learns by an object of its own"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        gtorch.attach(optimizer, [limit, limit])
    clipper = gtorch.attach(optimizer, [limits.ZScore(), limits.PerTensor(limits.Percentile(50))])
    first, second = clipper.max_norm
    assert clipper.limit.isnan().all()
    for step in range(5):
        step_with(optimizer, weights, gradients(step))
    assert first.state_dict()["count"] == 5
    assert [key for key, _ in second.state_dict()["tensors"]] == [
        "param_groups[1]['params'][0]",
        "param_groups[1]['params'][1]",
    ]
    assert [x.shape for x in clipper.limit] == [(), (2,)]
    assert [x["kind"] for x in clipper.state_dict()["limits"]] == ["ZScore", "PerTensor"]


def test_parameters_that_come_and_go_keep_or_begin_their_own_state() -> None:
    weights = parameters()
    named = [("a", weights[0]), ("b", weights[1])]
    optimizer = torch.optim.SGD(named, lr=1e-3)
    limit = limits.PerTensor(limits.Average(1.5, warmup=2))
    gtorch.attach(optimizer, limit)

    def counts() -> dict[str, int]:
        return {name: state["count"] for name, state in limit.state_dict()["tensors"]}

    step_with(optimizer, weights[:2], gradients(0)[:2])
    step_with(optimizer, weights[:1], gradients(1)[:1])  # b is not used
    optimizer.add_param_group({"params": [("c", weights[2])]})
    step_with(optimizer, weights, gradients(2))
    assert counts() == {"a": 3, "b": 2, "c": 1}
    weights[0].requires_grad_(False)
    step_with(optimizer, weights[1:], gradients(3)[1:])
    weights[0].requires_grad_(True)
    step_with(optimizer, weights, gradients(4))
    assert counts() == {"a": 4, "b": 4, "c": 3}


@pytest.mark.parametrize("name", KINDS)
def test_copies_and_what_is_saved_go_on_to_the_bit(name: str) -> None:
    weights = parameters()
    optimizer = torch.optim.Adam(weights, lr=1e-3)
    clipper = gtorch.attach(optimizer, fresh(name))
    for step in range(12):
        step_with(optimizer, weights, gradients(step))
    copied = copy.deepcopy(optimizer)
    file = io.BytesIO()
    torch.save(clipper.state_dict(), file)
    file.seek(0)
    loaded = torch.optim.Adam(parameters(), lr=1e-3)
    again = gtorch.attach(loaded, fresh(name))
    again.load_state_dict(torch.load(file, weights_only=True))
    others = [gtorch.clipper_of(copied), again]
    for step in range(12, 30):
        step_with(optimizer, weights, gradients(step))
        for each in (copied, loaded):
            step_with(each, [p for g in each.param_groups for p in g["params"]], gradients(step))
        for other in others:
            assert torch.equal(other.limit, clipper.limit)
            assert other.state_dict() == clipper.state_dict()


@pytest.mark.long
def test_a_new_process_goes_on_to_the_bit(tmp_path: Path) -> None:
    code = """
import sys, torch, gradclip.torch
from gradclip import limits
path, begin, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
clipper = gradclip.torch.attach(optimizer, limits.PerTensor(limits.ZScore(warmup=5)))
parts = {"model": model, "optimizer": optimizer, "clipper": clipper}
if begin:
    for name, state in torch.load(path, weights_only=True).items():
        parts[name].load_state_dict(state)
for step in range(begin, end):
    batch = torch.randn(8, 30, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    (model(batch) * (1 + 9 * (step % 8 == 7))).square().mean().backward()
    optimizer.step()
torch.save({name: part.state_dict() for name, part in parts.items()}, path)
"""

    def run(path: Path, begin: int, end: int) -> Any:
        subprocess.run([sys.executable, "-c", code, str(path), str(begin), str(end)], check=True)
        return torch.load(path, weights_only=True)

    whole = run(tmp_path / "whole", 0, 30)
    run(tmp_path / "parts", 0, 17)
    parts = run(tmp_path / "parts", 17, 30)
    assert whole["clipper"] == parts["clipper"]
    assert all(map(torch.equal, whole["model"].values(), parts["model"].values()))


def test_states_of_other_limits_are_refused() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=1e-3)
    clipper = gtorch.attach(optimizer, limits.ZScore())
    known = clipper.state_dict()
    for wrong in ([{"kind": "Average"}], [{"kind": "ZScore"}, {"kind": "ZScore"}]):
        with pytest.raises(ValueError, match=r"^the state "):
            clipper.load_state_dict({**known, "steps": 5, "limits": wrong})
        assert clipper.state_dict() == known
    counts = {name: 4 for name in known if name != "limits"}
    clipper.load_state_dict(counts)  # of a run that was clipped by a number
    assert clipper.state_dict() == {**counts, "limits": [{"kind": "ZScore"}]}


def test_a_limit_that_may_skip_cannot_come_later() -> None:
    clipper = gtorch.attach(torch.optim.SGD(parameters(), lr=1e-3), 1.0)
    with pytest.raises(ValueError, match=r"was attached without a way to: attach another$"):
        clipper.max_norm = limits.ZScore(beyond="skip")
    clipper.max_norm = limits.ZScore()
    assert clipper.max_norm == limits.ZScore()


# ---- PyTorch's words ----


def test_patch_puts_a_limit_in_the_place_of_numbers() -> None:
    limit, alone = limits.Percentile(50), limits.Percentile(50)
    weights, others = parameters(), parameters()
    with gtorch.patch(limit=limit):
        for step in range(5):
            for mine, other, grad in zip(weights, others, gradients(step), strict=True):
                mine.grad, other.grad = grad.clone(), grad.clone()
            torch.nn.utils.clip_grad_norm_((x for x in weights), 1e-9)
            gtorch.clip_grad_norm_(others, alone)
            assert all(torch.equal(a.grad, b.grad) for a, b in zip(weights, others, strict=True))
        norm = torch.nn.utils.get_total_norm([x.grad for x in weights])
        torch.nn.utils.clip_grads_with_norm_(weights, 1e-9, norm)
        assert limit.state_dict()["count"] == 6
        text = "learns from the gradients of one list of parameters, and others are clipped now"
        with pytest.raises(ValueError, match=text):
            torch.nn.utils.clip_grad_norm_(others, 1.0)
        with pytest.raises(ValueError, match="is in force with limit Percentile"):
            gtorch.patch()
    assert torch.nn.utils.clip_grad_norm_ is not gtorch.clip_grad_norm_
    with gtorch.patch(limit=2.5):
        weights[0].grad = torch.full_like(weights[0], 4.0)
        torch.nn.utils.clip_grad_norm_(weights[0], 1e-9)
        assert gtorch.get_total_norm([weights[0].grad]).item() == pytest.approx(2.5)
    with pytest.raises(ValueError, match=r"^limit is 0; it must be above 0"):
        gtorch.patch(limit=0)


def test_names_tell_gradients_apart() -> None:
    limit = limits.PerTensor(limits.Percentile(50))
    weights = parameters()
    for weight, grad in zip(weights, gradients(0), strict=True):
        weight.grad = grad
    gtorch.clip_grad_norm_({"w": weights[0], "b": weights[1]}, limit)
    gtorch.clip_grad_norm_([("b", weights[1]), ("v", weights[2])], limit)
    counts = {name: state["count"] for name, state in limit.state_dict()["tensors"]}
    assert counts == {"w": 1, "b": 2, "v": 1}


def test_what_cannot_be_is_refused_before_anything_is_written() -> None:
    weights = parameters()
    for weight, grad in zip(weights, gradients(0), strict=True):
        weight.grad = grad
    before = [x.grad.clone() for x in weights]
    each = limits.PerTensor(limits.Percentile(50, factor=0.1))
    with pytest.raises(ValueError, match=r"tensor by tensor there are norms of order 2$"):
        gtorch.clip_grad_norm_(weights, each, norm_type=1.0)
    with pytest.raises(ValueError, match="clips each tensor by a norm of its own"):
        gtorch.clip_grads_with_norm_(weights, each, torch.tensor(1.0))
    with pytest.raises(NotImplementedError, match="which learns from each norm; where a clip is"):
        gradclip.clip_by_global_norm([torch.ones(2, requires_grad=True)], limits.ZScore())
    assert all(torch.equal(x.grad, y) for x, y in zip(weights, before, strict=True))
    assert each.state_dict() == {"kind": "PerTensor"}
    weights[1].grad = torch.full_like(weights[1], math.nan)
    with pytest.raises(RuntimeError, match="is non-finite"):
        gtorch.clip_grad_norm_(weights, each, error_if_nonfinite=True)
    assert torch.equal(weights[0].grad, before[0])


def test_norms_of_other_orders_are_learnt() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    limit = limits.Percentile(50)
    weight.grad = torch.tensor([3.0, 4.0])
    gtorch.clip_grad_norm_(weight, limit, norm_type=1.0)
    assert limit.last_limit == 7.0


@pytest.mark.long
def test_under_the_compiler_a_limit_learns_where_the_graph_is_broken() -> None:
    limit = limits.Average(2.0, warmup=2)
    weights = parameters()

    def clip() -> Any:
        return gtorch.clip_grad_norm_(weights, limit)

    compiled = torch.compile(clip, backend="eager")
    alone = limits.Average(2.0, warmup=2)
    for step in range(5):
        for weight, grad in zip(weights, gradients(step), strict=True):
            weight.grad = grad
        norm = compiled()
        assert norm == gradclip.clip_by_global_norm_(gradients(step), alone)
    assert limit.state_dict() == alone.state_dict()


# ---- units ----


def of_units(weight: Any, grad: Any, factor: float, eps: float) -> Any:
    """The paper's formula in float64, unit by unit."""
    rows = (weight.double(), grad.double())
    if weight.dim() <= 1:
        rows = (rows[0][None], rows[1][None])
    new = []
    for w, g in zip(*rows, strict=True):
        limit, norm = factor * max(w.norm().item(), eps), g.norm().item()
        new.append(g * (limit / norm) if norm > limit else g)
    return torch.stack(new).reshape(grad.shape) if new else grad.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "by operations"])
def test_units_are_clipped_by_the_formula(dtype: Any, device: str, monkeypatch: Any) -> None:
    if device != "cpu":  # as on a device that the host's kernels do not reach
        from gradclip.torch import units

        def there(weights: Any, grads: Any, *args: Any) -> None:
            for pair in zip(weights, grads, strict=True):
                units._clip_there_(*pair, *args)

        monkeypatch.setattr(units, "_clip_here_", there)
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(7, 5), (6,), (), (4, 3, 2, 2), (3, 0), (0, 3), (1, 9)]
    weights = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for weight in weights:
        weight.grad = (torch.randn(weight.shape) * 0.02).to(dtype)
    layout = torch.channels_last
    weights[3].grad = weights[3].grad.contiguous(memory_format=layout)
    wanted = [of_units(w.detach(), w.grad, 0.01, 1e-3) for w in weights]
    before = [w.grad.clone() for w in weights]
    gtorch.adaptive_clip_grad_(weights)
    rel = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3}[dtype]
    clipped = 0
    for weight, new, old in zip(weights, wanted, before, strict=True):
        torch.testing.assert_close(weight.grad.double(), new, rtol=rel, atol=0)
        same = weight.grad == old
        assert torch.equal(same, new == old.double())
        clipped += int((~same).sum())
    assert clipped > 20
    if dtype is torch.float32:
        assert weights[3].grad.is_contiguous(memory_format=layout)


def test_units_do_not_overflow_and_those_that_are_not_finite_are_nan() -> None:
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]] * 5))
    huge, tiny = 3e38, 1e-40
    rows = [[huge, huge], [tiny, 0.0], [math.nan, 1.0], [math.inf, 1.0], [3e-3, 4e-3]]
    weight.grad = torch.tensor(rows)
    version = weight.grad._version
    gtorch.adaptive_clip_grad_([weight], 0.01)
    found = weight.grad
    assert found._version == version + 1
    assert found[0].double().norm().item() == pytest.approx(0.05, rel=1e-6)
    assert found[1].tolist() == torch.tensor(rows[1]).tolist()
    assert found[2:4].isnan().all()
    assert found[4].tolist() == torch.tensor(rows[4]).tolist()


def test_where_no_unit_is_clipped_none_is_written() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.full((3, 4), 1e-3)
    version = weight.grad._version
    gtorch.adaptive_clip_grad_(weight)
    assert weight.grad._version == version


def test_units_refuse_what_they_cannot_clip() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 2))
    weight.grad = torch.sparse_coo_tensor(
        torch.tensor([[1]]), torch.ones(1, 2), (4, 2), check_invariants=False
    )
    with pytest.raises(NotImplementedError, match=r"^parameters\[0\].grad, or its parameter, is"):
        gtorch.adaptive_clip_grad_([weight])
    with pytest.raises(NotImplementedError, match=r"^w.grad, or its parameter, is sparse"):
        gtorch.adaptive_clip_grad_({"w": weight})
    with pytest.raises(ValueError, match=r"^clip_factor is 0; it must be above 0"):
        gtorch.adaptive_clip_grad_([weight], 0)
    with pytest.raises(ValueError, match=r"^eps is -1; it must be above 0"):
        gtorch.adaptive_clip_grad_([weight], eps=-1)


def test_a_recorded_training_through_attach_is_zclip() -> None:
    paper = papers.ZClip()
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    clipper = gtorch.attach(optimizer, limits.ZScore())
    recorded = np.loadtxt(Path(__file__).parent / "recorded_norms.txt").tolist()
    for norm in recorded:
        step_with(optimizer, [weight], [torch.tensor([norm], dtype=torch.float64)])
        assert clipper.limit.item() == pytest.approx(paper(norm), rel=1e-12)
    assert clipper.clipped_steps == 20


# ---- what was found by trying it hard ----


def test_units_are_rows_whatever_the_order_of_memory() -> None:
    for weight, grad in (
        (torch.ones(3, 2), torch.tensor([[10.0, 20.0, 30.0], [1.0, 2.0, 3.0]]).t()),
        (torch.tensor([[1.0, 5.0, 9.0], [1.0, 2.0, 3.0]]).t(), torch.randn(3, 2) * 100),
        (torch.ones(4, 3, 2), torch.randn(3, 4, 2).transpose(0, 1)),
    ):
        parameter = torch.nn.Parameter(weight)
        parameter.grad = grad
        wanted = of_units(weight, grad, 0.1, 1e-3)
        gtorch.adaptive_clip_grad_([parameter], 0.1)
        torch.testing.assert_close(parameter.grad.double(), wanted, rtol=1e-6, atol=0)


def test_units_listed_twice_are_clipped_once() -> None:
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    other = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    for several in ([weight, weight], [weight, other]):
        weight.grad = other.grad = torch.tensor([[30.0, 40.0], [0.0, 0.001]])
        gtorch.adaptive_clip_grad_(several, 0.1)
        torch.testing.assert_close(weight.grad, torch.tensor([[0.3, 0.4], [0.0, 0.001]]))


def test_tensors_of_one_name_are_refused() -> None:
    weights = parameters()
    for weight, grad in zip(weights, gradients(0), strict=True):
        weight.grad = grad.clone()
    limit = limits.PerTensor(limits.Percentile(50))
    text = f"two tensors are called 'w', by which {limit!r} tells them apart"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        gtorch.clip_grad_norm_([("w", weights[0]), ("b", weights[1]), ("w", weights[2])], limit)
    assert all(torch.equal(w.grad, g) for w, g in zip(weights, gradients(0), strict=True))
    assert limit.state_dict() == {"kind": "PerTensor"}


@pytest.mark.parametrize("nothing", [math.nan, math.inf])
def test_what_becomes_of_nan_and_inf_depends_on_no_limit(nothing: float) -> None:
    """By PyTorch's own policy: as beside a number."""
    found = []
    for limit in (1.0, *(fresh(name) for name in KINDS), limits.ZScore()):
        weight = torch.nn.Parameter(torch.zeros(3))
        weight.grad = torch.tensor([nothing, 1.0, 1.0])
        gtorch.clip_grad_norm_([weight], limit)
        found.append(str(weight.grad.tolist()))
    assert len(set(found)) == 1


def test_one_object_is_for_one_optimizer() -> None:
    limit = limits.ZScore()
    one, other = (torch.optim.SGD(parameters(), lr=1e-3) for _ in range(2))
    clipper = gtorch.attach(one, limit)
    text = "max_norm has ZScore(), which learns from the gradients of another optimizer already"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        gtorch.attach(other, limit)
    assert gtorch.clipper_of(other) is None
    later = gtorch.attach(other, 1.0)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        later.max_norm = limit
    copied = gtorch.clipper_of(copy.deepcopy(one))
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        later.max_norm = copied.max_norm
    assert later.max_norm == 1.0
    later.remove()
    clipper.remove()
    gtorch.attach(other, limit)


def test_the_object_tells_the_limit_of_a_skipped_step_too() -> None:
    limit = limits.ZScore(warmup=5, beyond="skip")
    weights = parameters()
    optimizer = torch.optim.SGD(weights, lr=1e-3)
    clipper = gtorch.attach(optimizer, limit)
    for step in range(7):
        step_with(optimizer, weights, gradients(step))
    assert clipper.skipped_steps == 1
    assert limit.last_limit == clipper.limit.item() < math.inf
