"""What PyTorch's functions are given: names, wrong objects, weights in place of gradients."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from conftest import version

if version("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)
import torch

import gradclip
import gradclip.torch as gtorch


def raises(error: type[Exception], text: str) -> Any:
    """The error with exactly this text."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def trained(bad: bool = False) -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    (model(torch.ones(2, 3)) * 100).sum().backward()
    if bad:
        model[2].bias.grad[1] = math.nan
    return model


# ---- names ----

NAMED: dict[str, Callable[[Any], Any]] = {
    "named_parameters": lambda model: model.named_parameters(),
    "list": lambda model: list(model.named_parameters()),
    "dict": lambda model: dict(model.named_parameters()),
    "items": lambda model: dict(model.named_parameters()).items(),
    "ParameterDict": lambda model: torch.nn.ParameterDict(
        {name.replace(".", "_"): p for name, p in model.named_parameters()}
    ),
}


@pytest.mark.parametrize("how", NAMED)
def test_named_parameters_are_clipped_and_named(how: str) -> None:
    named, plain, bad = trained(), trained(), trained(bad=True)
    plain.load_state_dict(named.state_dict())
    for a, b in zip(named.parameters(), plain.parameters(), strict=True):
        b.grad = None if a.grad is None else a.grad.clone()
    norm = gtorch.clip_grad_norm_(plain.parameters(), 1.0)
    assert torch.equal(gtorch.clip_grad_norm_(NAMED[how](named), 1.0), norm)
    for a, b in zip(named.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)
    gtorch.clip_grads_with_norm_(NAMED[how](named), 0.5, torch.tensor(1.0))
    norm = gtorch.get_total_norm([p.grad for p in named[2].parameters()])
    assert float(norm) == pytest.approx(0.5)
    name = "2_bias" if how == "ParameterDict" else "2.bias"
    text = f"the global norm is nan: {name}.grad holds 1 NaN and 0 inf"
    with raises(FloatingPointError, text):
        gtorch.clip_grad_norm_(NAMED[how](bad), 1.0, on_nonfinite="raise")
    bad[2].bias.grad = None
    bad[2].bias.grad = torch.ones(1).expand(2)
    shares = rf"^{re.escape(name)}\.grad has elements that share memory"
    with pytest.raises(ValueError, match=shares):
        gtorch.clip_grads_with_norm_(NAMED[how](bad), 1.0, torch.tensor(2.0))


def test_tensors_with_names() -> None:
    grads = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert gtorch.get_total_norm(grads) == 5
    assert gtorch.get_total_norm(grads.items()) == 5
    grads["b"] = torch.ones(2, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"^b is int32; gradclip clips "):
        gtorch.get_total_norm(grads)


def test_a_parameter_list_is_one() -> None:
    given = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(2))])
    given[0].grad = torch.tensor([3.0, 4.0])
    assert gtorch.clip_grad_norm_(given, 1.0) == 5

    class Own(torch.nn.Module):
        def __iter__(self) -> Any:
            return iter(given)

    assert float(gtorch.clip_grad_norm_(Own(), 1e9)) == pytest.approx(1)


def test_a_dict_of_tensors_that_have_gradients_though_none_is_required() -> None:
    weight = torch.zeros(2)
    weight.grad = torch.tensor([3.0, 4.0])
    assert gtorch.clip_grad_norm_({"w": weight}, 1.0) == 5


# ---- wrong objects ----


def test_what_holds_no_parameters() -> None:
    model = trained()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    hint = "parameters are tensors, as model.parameters() gives them"
    weights = "tensors that have no gradients, as a state_dict is"
    pairs = (
        "parameters are tensors, or pairs of a name and a tensor, as model.named_parameters() "
        "gives them"
    )
    wrong: list[tuple[Any, str]] = [
        (model, f"parameters is Sequential; {hint}"),
        (
            optimizer,
            f"parameters is SGD; {hint}; gradclip.torch.attach takes an optimizer",
        ),
        (model.state_dict(), f"parameters is OrderedDict of {weights}; {hint}"),
        (dict(model.state_dict()), f"parameters is dict of {weights}; {hint}"),
        (optimizer.state_dict(), f"state is dict; {pairs}"),
        ([(p, p) for p in model.parameters()], f"parameters[0] is tuple; {pairs}"),
        ("parameters", f"parameters is str; {hint}"),
        (None, f"parameters is NoneType; {hint}"),
        (3, f"parameters is int; {hint}"),
        (optimizer.param_groups, f"parameters[0] is dict; {pairs}"),
        ([*model.parameters(), 3], f"parameters[4] is int; {pairs}"),
        ({"w": model[2].weight, "b": "bias"}, f"b is str; {pairs}"),
    ]
    for given, text in wrong:
        with raises(TypeError, text):
            gtorch.clip_grad_norm_(given, 1e-3)
        with raises(TypeError, text):
            gtorch.clip_grads_with_norm_(given, 1e-3, torch.tensor(1.0))
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert gradient is None or torch.equal(parameter.grad, gradient)
    hint = "tensors are [p.grad for p in model.parameters() if p.grad is not None], or others"
    with raises(TypeError, f"tensors is Sequential; {hint}"):
        gtorch.get_total_norm(model)
    with pytest.raises(TypeError, match=r"^tensors\[0\] is tuple; gradclip clips "):
        gtorch.get_total_norm([(torch.ones(1), torch.ones(1))])  # type: ignore[list-item]
    with raises(TypeError, "norm_type is 'two'; it must be a number"):
        gtorch.clip_grad_norm_(model.parameters(), 1.0, norm_type="two")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^tensors\[1\] is NoneType; gradclip clips "):
        gtorch.get_total_norm([torch.ones(1), None])  # type: ignore[list-item]
    assert gtorch.clip_grad_norm_({}, 1.0) == 0


# ---- weights are not gradients ----


def test_weights_are_not_clipped_in_place_of_their_gradients() -> None:
    model = trained()
    before = [p.detach().clone() for p in model.parameters()]
    text = (
        "t_list{} requires a gradient, and autograd would not see that it changes. Weights are no "
        "gradients: those of parameters are clipped by gradclip.torch.clip_grad_norm_. To write to "
        "this tensor itself use torch.no_grad(); clip_by_global_norm returns new ones"
    )
    with raises(TypeError, text.format("[2]")):  # the first two are frozen
        gradclip.clip_by_global_norm_(model.parameters(), 0.1)
    with raises(TypeError, text.format("['w'][0]")):
        gradclip.clip_by_global_norm_({"w": [model[2].weight]}, 0.1)
    assert all(map(torch.equal, before, model.parameters()))
    rows = gradclip.IndexedSlices(torch.ones(2, 3, requires_grad=True), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="clip_grad_norm_"):
        gradclip.clip_by_global_norm_([rows], 0.1)
    hidden = torch.ones(3, requires_grad=True) * 2  # which exp() has yet to read again
    loss = hidden.exp().sum()
    with pytest.raises(TypeError, match="clip_grad_norm_"):
        gradclip.clip_by_global_norm_([hidden], 0.1)
    loss.backward()
    with torch.no_grad():
        norm = gradclip.clip_by_global_norm_(model.parameters(), 0.1)
    assert norm > 0.1
    assert float(gtorch.get_total_norm(model.parameters())) == pytest.approx(0.1)


def test_gradients_that_autograd_records_are_clipped_below_it() -> None:
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    (weight.grad,) = torch.autograd.grad(weight.square().sum() / 2, [weight], create_graph=True)
    assert weight.grad.requires_grad
    assert gtorch.clip_grad_norm_([weight], 2.5) == 5
    assert weight.grad.tolist() == [1.5, 2.0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_norm_that_is_none_is_not_measured(device: str) -> None:
    weight = torch.nn.Parameter(torch.ones(2, device=device))
    weight.grad = torch.ones(2, device=device)
    nothing: Any = None
    with raises(TypeError, "total_norm is None; it must be a real number"):
        gtorch.clip_grads_with_norm_([weight], 1.0, nothing)
    with raises(TypeError, "max_norm is None; it must be a real number"):
        gtorch.clip_grads_with_norm_([weight], nothing, nothing)
    assert weight.grad._version == 0
