"""What `gradclip.keras` does on one Keras backend; `test_keras.py` runs it once per backend.

A gradient is given by the data: the loss is a dense layer's output, its weights' gradient is x.
"""

from __future__ import annotations

import copy
import csv
import functools
import importlib
import importlib.util
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what frameworks say of each other while they are imported
    import keras

    BACKEND = keras.backend.backend()
    if BACKEND == "tensorflow":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2
        )
    if BACKEND == "torch":
        import torch

import ml_dtypes

import gradclip
import gradclip.keras
from gradclip.keras import clipping
from gradclip.keras.optimizer import COMPOSITES
from gradclip.keras.patch import Installed

pytestmark = [
    # Keras's Variable.numpy() and TensorFlow's and torch's __array__, under NumPy 2.4
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # torch's own
]
on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow")
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="about torch")
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="about JAX")
# What is alike on each: a few steps on torch, which compiles nothing, many where they are compiled;
# on the others in `make test-long`.
first_on_torch = pytest.mark.slow if BACKEND == "torch" else pytest.mark.long
first_on_tensorflow = pytest.mark.slow if BACKEND == "tensorflow" else pytest.mark.long


def some_first(some: list[Any], rest: list[Any]) -> list[Any]:
    """Some parameters on each backend, the rest on torch first."""
    return [*some, *(pytest.param(*_each(value), marks=first_on_torch) for value in rest)]


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


NAMES = sorted(set(gradclip.keras.__all__) - {"GlobalNorm", "exact"})
SOME_NAMES = ["Adam", "Adamax", "Lion", "SGD"]
NAMED = some_first(SOME_NAMES, sorted({*NAMES} - {*SOME_NAMES}))
SGD = getattr(gradclip.keras, "SGD")  # noqa: B009  (of the type checker's fallback)


def tensor(values: Any, dtype: str = "float32") -> Any:
    return keras.ops.convert_to_tensor(np.asarray(values, np.float32), dtype)


def array(value: Any) -> np.ndarray[Any, Any]:
    value = value.value if isinstance(value, keras.Variable) else value
    return np.asarray(value.detach() if hasattr(value, "detach") else value)


def bits(value: Any) -> bytes:
    return array(value).tobytes()


def loss(_: Any, prediction: Any) -> Any:
    return prediction


def linear(size: int, optimizer: Any, dtype: Any = None, jit: Any = "auto") -> Any:
    """A model of two variables from zero, whose gradient is the row of the batch."""
    x = keras.Input((size,))
    left = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", dtype=dtype)
    right = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", dtype=dtype)
    y = keras.layers.Add(dtype="float32")([left(x[:, :2]), right(x[:, 2:])])
    model = keras.Model(x, y)
    model.compile(optimizer, loss, jit_compile=jit)
    return model


def fit(model: Any, x: Any, *callbacks: Any, **options: Any) -> dict[str, list[float]]:
    options = {"batch_size": 1, "shuffle": False, "verbose": 0} | options
    y = np.zeros((len(x), 1))
    return dict(model.fit(np.float32(x), y, callbacks=list(callbacks), **options).history)


def weights(model: Any) -> np.ndarray[Any, Any]:
    return np.concatenate([array(variable).ravel() for variable in model.trainable_variables])


def clipped(x: Any, limit: float) -> tuple[np.ndarray[Any, Any], Any]:
    """The same in NumPy, as two leaves."""
    parts, norm = gradclip.clip_by_global_norm(list(np.split(np.float32(x), [2])), limit)
    return np.concatenate(parts), norm


def rows(count: int, size: int, seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, size)) * np.exp(rng.normal(size=(count, 1)))).astype("f4")


# ---- bits ----


@pytest.mark.parametrize(
    "jit",
    [False, pytest.param(True, marks=[pytest.mark.long] * (BACKEND == "torch"))],
    ids=["eager or graph", "jit"],
)
def test_norm_and_update_are_those_of_numpy(jit: bool) -> None:
    x = rows(4 if jit and BACKEND == "torch" else 20, 1000)  # its compiler takes its time
    model = linear(1000, SGD(1.0, global_clipnorm=40.0), jit=jit)
    weight = np.zeros(1000, np.float32)
    norms = []
    for row in x:
        fit(model, [row])
        update, norm = clipped(row, 40.0)
        norms.append(norm)
        weight -= update
        assert bits(model.optimizer.last_global_norm) == bits(norm)
        assert weights(model).tobytes() == weight.tobytes()
    assert 0 < sum(norm > 40 for norm in norms) < len(norms)


def test_no_finite_gradient_overflows() -> None:
    model = linear(4, SGD(1.0, global_clipnorm=1.0))
    fit(model, [[1e30, 0, 0, 1e30]])
    update, norm = clipped([1e30, 0, 0, 1e30], 1.0)
    assert bits(model.optimizer.last_global_norm) == bits(norm)
    assert (0 - weights(model)).tobytes() == update.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes(dtype: str) -> None:
    if BACKEND == "jax" and dtype == "float64":
        pytest.skip("JAX has float64 only where it is asked for at the start")
    values = np.asarray(rows(1, 300)[0], ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    variable = keras.Variable(np.zeros(300), dtype=dtype)
    optimizer = SGD(1.0, global_clipnorm=2.5)
    gradient = keras.ops.convert_to_tensor(values.astype(np.float64), dtype)
    optimizer.apply([gradient], [variable])
    (update,), norm = gradclip.clip_by_global_norm([values], 2.5)
    assert bits(optimizer.last_global_norm) == bits(np.float32(norm))
    after = array(keras.ops.cast(variable, "float32"))
    assert (0 - after).tobytes() == update.astype(np.float32).tobytes()
    assert keras.ops.convert_to_numpy(keras.ops.cast(gradient, "float32")).tolist() == (
        values.astype(np.float32).tolist()
    )


# ---- the classes ----


def test_every_optimizer_of_keras_is_there() -> None:
    composites = {"LossScaleOptimizer", "MultiOptimizer"}
    wanted = {
        name
        for name, value in vars(keras.optimizers).items()
        if isinstance(value, type) and issubclass(value, keras.Optimizer)
    }
    assert {"Adam", "AdamW", "Lion", "SGD"} < wanted
    assert set(NAMES) == wanted - composites - {"Optimizer"}


def zeros(*shape: int) -> Any:
    return keras.Variable(np.zeros(shape, np.float32))


def ones(*shape: int) -> Any:
    return keras.Variable(np.ones(shape, np.float32))


def steps(optimizer: Any, gradients: list[Any]) -> list[bytes]:
    """The weights after each step, of a matrix and a vector."""
    variables = [ones(2, 2), ones(3)]
    seen = []
    for gradient in gradients:
        optimizer.apply([tensor(part) for part in gradient], variables)
        seen += [bits(variable) for variable in variables]
    return seen


def gradients_of(limit: float | None) -> list[Any]:
    """Three steps of norms 5, 10 and 0.5, clipped if asked to."""
    matrix, vector = np.float32([[3, 0], [0, 0]]), np.float32([0, 4, 0])
    gradients = [[matrix * scale, vector * scale] for scale in np.float32([1, 2, 0.1])]
    if limit is None:
        return gradients
    return [gradclip.clip_by_global_norm(gradient, limit)[0] for gradient in gradients]


@pytest.mark.parametrize("name", NAMED)
def test_each_optimizer_gets_the_clipped_gradient(name: str) -> None:
    ours = getattr(gradclip.keras, name)(0.5, global_clipnorm=2.5)
    theirs = getattr(keras.optimizers, name)(0.5)
    assert steps(ours, gradients_of(None)) == steps(theirs, gradients_of(2.5))
    unclipped = steps(getattr(keras.optimizers, name)(0.5), gradients_of(None))
    assert name in ("Lamb", "Lion") or unclipped != steps(  # they see the signs only
        getattr(keras.optimizers, name)(0.5), gradients_of(2.5)
    )
    assert type(ours).__name__ == name
    assert isinstance(ours, getattr(keras.optimizers, name))


@pytest.mark.parametrize("options", [{}, {"clipnorm": 0.7}, {"clipvalue": 0.7}])
@pytest.mark.parametrize("name", NAMED)
def test_without_global_clipnorm_it_is_keras_own(name: str, options: dict[str, float]) -> None:
    ours = getattr(gradclip.keras, name)(0.5, **options)
    theirs = getattr(keras.optimizers, name)(0.5, **options)
    assert steps(ours, gradients_of(None)) == steps(theirs, gradients_of(None))
    assert [v.shape for v in ours.variables] == [v.shape for v in theirs.variables]


def test_exact_returns_one_class_and_knows_its_own() -> None:
    assert gradclip.keras.exact(keras.optimizers.Adam) is gradclip.keras.Adam
    assert gradclip.keras.exact(gradclip.keras.Adam) is gradclip.keras.Adam
    assert gradclip.keras.Adam.__name__ == "Adam"


@gradclip.keras.exact
class Signs(keras.Optimizer):
    """An optimizer of a user."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.assign_sub(variable, gradient * keras.ops.cast(learning_rate, variable.dtype))


def test_an_optimizer_of_a_user() -> None:
    model = linear(4, Signs(1.0, global_clipnorm=1.0))
    fit(model, [[3, 0, 0, 4]])
    assert weights(model).tolist() == [-0.6000000238418579, 0, 0, -0.800000011920929]
    again = keras.optimizers.deserialize(keras.optimizers.serialize(model.optimizer))
    assert type(again) is Signs
    assert again.get_config() == model.optimizer.get_config()


def test_a_users_class_of_a_name_that_keras_has() -> None:
    class Adam(keras.optimizers.Adam):
        pass

    theirs = gradclip.keras.exact(Adam)(global_clipnorm=1.0)
    ours = gradclip.keras.Adam(global_clipnorm=1.0)
    for optimizer in (theirs, ours):
        again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
        assert type(again) is type(optimizer)


@pytest.mark.parametrize("wrong", [3, int, keras.optimizers.SGD(1.0)], ids=repr)
def test_exact_of_no_optimizer_class(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"is no subclass of keras.optimizers.Optimizer$"):
        gradclip.keras.exact(wrong)


@pytest.mark.parametrize("name", [each.__name__ for each in COMPOSITES])
def test_exact_of_an_optimizer_of_optimizers(name: str) -> None:
    message = f"{name} hands its gradients to other optimizers; make those exact instead"
    with pytest.raises(TypeError, match=f"^{message}$"):
        gradclip.keras.exact(getattr(keras.optimizers, name))


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (0, ValueError, "global_clipnorm is 0; it must be above 0 (inf: only measure)"),
        (-1.5, ValueError, "global_clipnorm is -1.5; it must be above 0 (inf: only measure)"),
        (
            float("nan"),
            ValueError,
            "global_clipnorm is nan; it must be above 0 (inf: only measure)",
        ),
        (True, TypeError, "global_clipnorm is True; it must be a real number"),
        (1j, TypeError, "global_clipnorm is 1j; it must be a real number"),
        ("1", TypeError, "global_clipnorm is '1'; it must be a real number"),
    ],
)
def test_bad_limits(limit: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        gradclip.keras.Adam(global_clipnorm=limit)
    assert str(caught.value) == message
    optimizer = gradclip.keras.Adam(global_clipnorm=1.0)
    with pytest.raises(error):
        optimizer.global_clipnorm = limit
    assert optimizer.global_clipnorm == 1.0


def test_no_norm_to_show() -> None:
    for optimizer in (SGD(1.0), SGD(1.0, global_clipnorm=1.0)):
        with pytest.raises(AttributeError, match=r"^last_global_norm needs a global_clipnorm, and"):
            _ = optimizer.last_global_norm


def test_two_limits_are_keras_error() -> None:
    with pytest.raises(ValueError, match=r"Only one of `clipnorm`"):
        gradclip.keras.Adam(global_clipnorm=1.0, clipnorm=1.0)


def test_a_limit_after_build() -> None:
    optimizer = SGD(1.0)
    optimizer.build([zeros(2)])
    with pytest.raises(
        ValueError, match=r"^global_clipnorm is set to 2.0 on an optimizer that was"
    ):
        optimizer.global_clipnorm = 2
    optimizer = SGD(1.0, global_clipnorm=float("inf"))
    variable = zeros(2)
    optimizer.apply([tensor([3, 4])], [variable])
    assert array(variable).tolist() == [-3, -4]
    optimizer.global_clipnorm = 2.5
    optimizer.apply([tensor([3, 4])], [variable])
    assert array(variable).tolist() == [-4.5, -6]


def test_gradients_are_clipped_before_the_optimizer_is_built() -> None:
    gradient = tensor([[100.0, 100.0]])
    for module in (gradclip.keras, keras.optimizers):
        (found,) = module.SGD(global_clipnorm=1)._clip_gradients([gradient])
        assert array(found).ravel().tolist() == pytest.approx([0.5**0.5] * 2, rel=1e-6)


def test_none_keeps_its_place_among_gradients() -> None:
    for optimizer in (SGD(global_clipnorm=2.5), keras.optimizers.SGD(global_clipnorm=2.5)):
        nothing, some, last = optimizer._clip_gradients([None, tensor([3, 4]), None])
        assert nothing is last is None
        assert array(some).tolist() == pytest.approx([1.5, 2], rel=1e-6)


LIMITS = [
    ("clipnorm", 0.25),
    ("clipnorm", 0.0),
    ("clipvalue", 0.25),
    ("clipnorm", None),
]


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize(("name", "value"), LIMITS)
def test_a_limit_set_beside_it_is_taken_as_keras_takes_it(
    name: str, value: Any, installed: bool
) -> None:
    def stepped(module: Any, gradients: list[Any], limit: float | None) -> list[bytes]:
        optimizer = module.SGD(1.0, global_clipnorm=limit)
        setattr(optimizer, name, value)
        return steps(optimizer, gradients)

    if name == "clipnorm" and value:  # Keras clips each by its own norm, and so do we
        wanted = stepped(keras.optimizers, gradients_of(None), 1.0)
        assert wanted == stepped(keras.optimizers, gradients_of(None), None)
    else:  # Keras clips by the global norm, and we by the exact one
        wanted = steps(keras.optimizers.SGD(1.0), gradients_of(1.0))
    if installed:
        with Installed():
            assert stepped(keras.optimizers, gradients_of(None), 1.0) == wanted
    assert stepped(gradclip.keras, gradients_of(None), 1.0) == wanted


def test_what_a_step_keeps_is_written_by_assign() -> None:
    written = []

    class Watched(SGD):  # type: ignore[misc,valid-type]
        def assign(self, variable: Any, value: Any) -> None:
            written.append(variable)
            super().assign(variable, value)

    optimizer = Watched(1.0, global_clipnorm=1.0)
    variable = zeros(2)
    optimizer.apply([tensor([3, 4])], [variable])
    assert [each for each in written if each is optimizer._norms] == [optimizer._norms]
    assert array(optimizer._norms).tolist() == [5, 5, 1, 1]


class Silent(SGD):  # type: ignore[misc,valid-type]
    """It writes nothing."""

    def assign(self, variable: Any, value: Any) -> None:
        pass


def test_whoever_replaces_assign_has_all_that_a_step_keeps() -> None:
    optimizer = Silent(1.0, global_clipnorm=1.0)
    optimizer.apply([tensor([3, 4])], [zeros(2)])
    assert array(optimizer._norms).tolist() == [0, 0, 0, 0]


def test_errors_name_the_variable() -> None:
    left, right = zeros(2), keras.Variable(np.zeros(2, np.float32), name="right")
    accepted = {
        "tensorflow": "float16, bfloat16, float8, float32, float64 and complex tensors",
        "jax": "float16, bfloat16, float8, float32, float64 and complex arrays",
        "torch": "float16, bfloat16, float8, float32, float64 and complex tensors",
    }[BACKEND]
    integers = keras.ops.convert_to_tensor(np.arange(2, dtype=np.int32))
    optimizer = SGD(1.0, global_clipnorm=1.0)
    for grads, name in (
        ([tensor([3, 4]), integers], "grads['right']"),
        ([integers, tensor([3, 4])], f"grads['{left.path}']"),
    ):
        with pytest.raises(TypeError) as caught:
            optimizer.apply(grads, [left, right])
        assert str(caught.value).startswith(f"{name} is ")
        assert str(caught.value).endswith(f"int32; gradclip clips {accepted}")
        with (
            Installed(),
            pytest.raises(TypeError, match=re.escape(name)),
        ):
            keras.optimizers.SGD(1.0, global_clipnorm=1.0).apply(grads, [left, right])
    with pytest.raises(TypeError, match=r"^grads\[1\] is "):
        optimizer._clip_gradients([None, integers])


def test_numpy_gradients_are_taken_as_keras_takes_them() -> None:
    for optimizer in (SGD(1.0, global_clipnorm=2.5), SGD(1.0, global_clipnorm=5.0)):
        variables = [zeros(2), zeros(1)]
        optimizer.apply([np.float32([3, 0]), tensor([4])], variables)
        half = optimizer.global_clipnorm / 5
        assert [array(each).tolist() for each in variables] == [[-3 * half, 0], [-4 * half]]


# ---- what Keras puts around it ----


def test_accumulation_clips_the_mean() -> None:
    x = np.float32([[6, 0, 0, 0], [0, 0, 0, 8], [60, 0, 0, 0], [0, 0, 0, 80], [1, 1, 1, 1]])
    model = linear(4, SGD(1.0, global_clipnorm=2.5, gradient_accumulation_steps=2))
    history = fit(model, x, gradclip.keras.GlobalNorm())
    assert weights(model).tolist() == [-3, 0, 0, -4]
    assert history["global_norm"] == [27.5]
    assert history["clipped"] == [1]
    assert float(model.optimizer.last_global_norm) == 50


@first_on_torch
def test_an_epoch_without_an_update() -> None:
    model = linear(4, SGD(1.0, global_clipnorm=2.5, gradient_accumulation_steps=3))
    history = fit(model, np.ones((2, 4)), gradclip.keras.GlobalNorm(), epochs=2)
    assert np.isnan(history["global_norm"][0])
    assert np.isnan(history["clipped"][0])
    assert history["global_norm"][1] == 2


def test_loss_scale() -> None:
    optimizer = keras.optimizers.LossScaleOptimizer(SGD(1.0, global_clipnorm=2.5), 2.0**10)
    model = linear(4, optimizer)
    x = np.float32([[3, 0, 0, 4], [3e38, 0, 0, 0], [0.3, 0, 0, 0.4]])  # 3e38 times the scale is inf
    history = fit(model, x, gradclip.keras.GlobalNorm())
    assert history["clipped"] == [0.5]
    assert history["global_norm"] == pytest.approx([2.75])
    small, _ = clipped([np.float32(0.3) / 2, 0, 0, 0.4], 2.5)
    assert weights(model)[0] == np.float32(-1.5) - np.float32(0.3)
    assert small.size == 4
    assert float(array(optimizer.dynamic_scale)) == 2.0**9


def test_mixed_float16() -> None:
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = linear(4, SGD(1.0, global_clipnorm=2.5))
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        history = fit(model, np.float32([[3, 0, 0, 4]] * 30), gradclip.keras.GlobalNorm(), epochs=2)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert history["clipped"] == [1, 1]
    assert history["global_norm"] == [5, 5]
    applied = int(array(model.optimizer.iterations))
    assert 30 < applied < 60  # the first scales overflow float16, and their steps are skipped
    assert weights(model).tolist() == [-1.5 * applied, 0, 0, -2 * applied]


@first_on_torch
def test_averages() -> None:
    x = np.float32([[3, 0, 0, 4], [0, 6, 8, 0], [0.1, 0, 0, 0]])
    options = {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}
    ours = linear(4, SGD(1.0, global_clipnorm=2.5, **options))
    theirs = linear(4, keras.optimizers.SGD(1.0, **options))
    fit(ours, x)
    fit(theirs, [clipped(row, 2.5)[0] for row in x])
    assert weights(ours).tobytes() == weights(theirs).tobytes()


def test_weight_decay_and_constraint_follow_the_clip() -> None:
    ours = SGD(0.5, global_clipnorm=2.5, weight_decay=0.25, momentum=0.5)
    theirs = keras.optimizers.SGD(0.5, weight_decay=0.25, momentum=0.5)
    assert steps(ours, gradients_of(None)) == steps(theirs, gradients_of(2.5))


def test_a_variable_without_a_gradient() -> None:
    optimizer = SGD(1.0, global_clipnorm=2.5)
    used, unused = zeros(2), zeros(2)
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        optimizer.apply([None, tensor([3, 4])], [unused, used])
    assert array(used).tolist() == [-1.5, -2]
    assert array(unused).tolist() == [0, 0]


@pytest.mark.parametrize("bad", some_first([np.nan], [np.inf, -np.inf]))
def test_one_bad_element_makes_all_nan(bad: float) -> None:
    model = linear(4, SGD(1.0, global_clipnorm=1.0))
    history = fit(model, [[1, 2, bad, 4]], gradclip.keras.GlobalNorm())
    assert np.isnan(weights(model)).all()
    assert str(history["global_norm"][0]) == str(abs(bad))
    assert history["clipped"] == [1]


def test_several_steps_in_one_execution() -> None:
    if BACKEND == "torch":
        pytest.skip("Keras's torch backend has no steps_per_execution")
    x = np.float32([[3, 0, 0, 4], [0.3, 0, 0, 0.4]] * 4)
    model = linear(4, SGD(1.0, global_clipnorm=2.5))
    model.compile(model.optimizer, loss, steps_per_execution=4)
    history = fit(model, x, gradclip.keras.GlobalNorm())
    assert history["global_norm"] == pytest.approx([2.75])
    assert history["clipped"] == [0.5]


@on_jax
def test_stateless_apply() -> None:
    import jax

    optimizer = SGD(1.0, global_clipnorm=2.5)
    variable = zeros(2)
    optimizer.build([variable])
    state = [v.value for v in optimizer.variables]
    step = jax.jit(optimizer.stateless_apply)
    (after,), state = step(state, [tensor([3, 4])], [variable.value])
    assert after.tolist() == [-1.5, -2]
    for ours, value in zip(optimizer.variables, state, strict=True):
        ours.assign(value)
    assert float(optimizer.last_global_norm) == 5


# ---- the log ----


@first_on_torch
def test_the_log_has_each_epoch_by_itself(tmp_path: Path) -> None:
    x = np.float32([[3, 0, 0, 4], [0.3, 0, 0, 0.4], [0.6, 0, 0, 0.8], [6, 0, 0, 8]])
    model = linear(4, SGD(0.0, global_clipnorm=2.5))
    csv_logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    log = gradclip.keras.GlobalNorm()
    history = fit(model, x, csv_logger, log, epochs=2, validation_data=(x, np.zeros((4, 1))))
    assert history["global_norm"] == pytest.approx([4.125, 4.125], rel=1e-6)
    assert history["clipped"] == [0.5, 0.5]
    written = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [float(row["global_norm"]) for row in written] == history["global_norm"]
    assert [float(row["clipped"]) for row in written] == history["clipped"]
    history = fit(model, x[:2], log)  # the same callback and model again
    assert history["clipped"] == [0.5]
    assert history["global_norm"] == pytest.approx([2.75])


@first_on_torch
def test_the_log_of_a_model_that_is_built_by_its_first_step() -> None:
    model = keras.Sequential([keras.layers.Dense(1, use_bias=False)])
    model.compile(SGD(1.0, global_clipnorm=2.5), loss)
    history = fit(model, [[3, 0, 0, 4]], gradclip.keras.GlobalNorm(), epochs=2)
    assert history["global_norm"] == [5, 5]


@first_on_torch
def test_a_limit_between_two_float32_is_compared_exactly() -> None:
    model = linear(4, SGD(1.0, global_clipnorm=0.1))  # below float32's 0.1
    history = fit(model, [[0.1, 0, 0, 0]], gradclip.keras.GlobalNorm())
    assert history["global_norm"] == [float(np.float32(0.1))]
    assert history["clipped"] == [1]
    for limit in (1e-50, 1e50):
        model = linear(4, SGD(1.0, global_clipnorm=limit))
        history = fit(model, [[0.1, 0, 0, 0]], gradclip.keras.GlobalNorm())
        assert history["clipped"] == [limit < 1]


@pytest.mark.parametrize(
    ("limit", "x", "share"),
    some_first(
        [(2.5, [3, 0, 0, 4], 1), (np.inf, [np.inf, 0, 0, 4], 0)],
        [
            (5.0, [3, 0, 0, 4], 0),
            (2.5, [np.inf, 0, 0, 4], 1),
            (2.5, [np.nan, 0, 0, 4], 1),
            (np.inf, [np.nan, 0, 0, 4], 1),
            (np.inf, [3, 0, 0, 4], 0),
        ],
    ),
)
def test_a_step_counts_as_clipped_if_its_norm_was_not_at_most_the_limit(
    limit: float, x: list[float], share: int
) -> None:
    model = linear(4, SGD(1.0, global_clipnorm=limit))
    assert fit(model, [x], gradclip.keras.GlobalNorm())["clipped"] == [share]
    if importlib.util.find_spec("optax"):
        optax = importlib.import_module("gradclip.optax")
        _, state = optax.clip_by_global_norm(limit).update(np.float32(x), None)
        assert int(state.clipped_count) == share


def test_there_is_no_norm_to_log_where_keras_clips_by_clipnorm() -> None:
    optimizer = SGD(1.0, global_clipnorm=1.0)
    optimizer.clipnorm = 0.5
    text = (
        "GlobalNorm finds clipnorm 0.5 beside global_clipnorm 1.0: Keras clips by clipnorm then, "
        "and measures no global norm; set clipnorm to None"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        fit(linear(4, optimizer), [[3, 0, 0, 4]], gradclip.keras.GlobalNorm())


@pytest.mark.parametrize("optimizer", [keras.optimizers.SGD(1.0), SGD(1.0)], ids=["Keras", "ours"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_log_of_another_optimizer(optimizer: Any, scaled: bool) -> None:
    optimizer = type(optimizer).from_config(optimizer.get_config())
    model = linear(4, keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer)
    with pytest.raises(
        TypeError, match=r"^GlobalNorm needs an optimizer of gradclip.keras with a "
    ):
        fit(model, [[3, 0, 0, 4]], gradclip.keras.GlobalNorm())


@on_tensorflow
def test_tensorboard(tmp_path: Path) -> None:
    from tensorflow.core.util import event_pb2

    model = linear(4, SGD(1.0, global_clipnorm=2.5))
    board = keras.callbacks.TensorBoard(tmp_path)
    fit(model, [[3, 0, 0, 4]], board, gradclip.keras.GlobalNorm())
    seen = {}
    for file in (tmp_path / "train").glob("*tfevents*"):
        for record in tf.data.TFRecordDataset([str(file)]):
            for value in event_pb2.Event.FromString(record.numpy()).summary.value:
                seen[value.tag] = tf.make_ndarray(value.tensor)
    assert seen["epoch_global_norm"] == 5
    assert seen["epoch_clipped"] == 1


# ---- saving ----


def test_a_config_makes_the_same_optimizer() -> None:
    optimizer = gradclip.keras.AdamW(0.25, global_clipnorm=np.float32(2.5))
    config = optimizer.get_config()
    assert config["global_clipnorm"] == 2.5
    assert type(config["global_clipnorm"]) is float
    assert gradclip.keras.AdamW.from_config(dict(config)).get_config() == config
    for inner in (optimizer, keras.optimizers.LossScaleOptimizer(optimizer)):
        again = keras.optimizers.deserialize(keras.optimizers.serialize(inner))
        again = getattr(again, "inner_optimizer", again)
        assert type(again) is gradclip.keras.AdamW
        assert again.get_config() == config


class Momentum(keras.optimizers.SGD):  # type: ignore[misc]
    """An optimizer of a user."""


ExactMomentum = gradclip.keras.exact(Momentum)  # its name is that of another class

COPIES = {
    "pickle": lambda it: pickle.loads(pickle.dumps(it)),
    "deepcopy": copy.deepcopy,
}
if importlib.util.find_spec("cloudpickle"):
    import cloudpickle

    COPIES["cloudpickle"] = lambda it: pickle.loads(cloudpickle.dumps(it))


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", [SGD, Signs, ExactMomentum], ids=["ours", "decorated", "called"])
def test_a_copy_of_a_built_optimizer_clips_and_counts_on(kind: Any, how: str) -> None:
    def copied(optimizer_class: Any) -> Any:
        optimizer = optimizer_class(1.0, global_clipnorm=2.5)
        optimizer.apply([tensor([3, 4])], [zeros(2)])
        optimizer.learning_rate = 0.5
        return COPIES[how](optimizer)

    ours, theirs = copied(kind), copied(keras.optimizers.SGD)
    assert type(ours) is kind
    assert ours.built is theirs.built is False  # as Keras has it: it knows no variables
    for one, other in zip(ours.variables, theirs.variables, strict=True):
        assert bits(one) == bits(other)
    assert ours.get_config()["global_clipnorm"] == theirs.get_config()["global_clipnorm"] == 2.5
    variable = zeros(2)
    ours.apply([tensor([3, 4])], [variable])
    assert array(variable).tolist() == [-0.75, -1]
    assert array(ours._norms).tolist() == [5, 5, 2, 2]


@pytest.mark.parametrize("module", [gradclip.keras, keras.optimizers], ids=["ours", "Keras"])
def test_a_copy_of_a_built_optimizer_with_a_state_of_each_variable(module: Any) -> None:
    """Keras leaves the state out, and says so; in a model it is all there."""
    optimizer = module.SGD(1.0, momentum=0.5, global_clipnorm=2.5)
    optimizer.apply([tensor([3, 4])], [zeros(2)])
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        again = copy.deepcopy(optimizer)
    assert [array(each).tolist() for each in again.variables] == [0, 1]
    variable = zeros(2)
    again.apply([tensor([3, 4])], [variable])
    assert array(variable) == pytest.approx([-1.5, -2], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        pytest.param(SGD, "pickle", id="ours, pickle", marks=first_on_torch),
        pytest.param(SGD, "deepcopy", id="ours, deepcopy", marks=pytest.mark.long),
        pytest.param(Signs, "pickle", id="decorated, pickle", marks=pytest.mark.long),
        pytest.param(Signs, "deepcopy", id="decorated, deepcopy"),
        pytest.param(ExactMomentum, "pickle", id="called, pickle", marks=first_on_torch),
        pytest.param(ExactMomentum, "deepcopy", id="called, deepcopy", marks=pytest.mark.long),
    ],
)
def test_a_copy_of_a_model_has_its_optimizer_and_counts(kind: Any, how: str) -> None:
    model = linear(4, kind(1.0, global_clipnorm=2.5))
    model.compile(model.optimizer, "mse")
    x = np.float32([[3, 0, 0, 4], [0.3, 0, 0, 0.4]])
    y = np.full((2, 1), -0.5, np.float32)
    model.fit(x[:1], y[:1], batch_size=1, verbose=0)
    again = COPIES[how](model)
    assert type(again.optimizer) is kind
    assert again.optimizer.global_clipnorm == 2.5
    assert bits(again.optimizer._norms) == bits(model.optimizer._norms) != bytes(16)
    for each in (model, again):
        each.fit(x, y, batch_size=1, shuffle=False, verbose=0)
    assert weights(again).tobytes() == weights(model).tobytes()
    assert bits(again.optimizer._norms) == bits(model.optimizer._norms)
    assert array(again.optimizer._norms)[3] == 3


@first_on_torch
def test_the_state_of_keras_own_optimizer_is_taken_over(tmp_path: Path) -> None:
    options = {"momentum": 0.5, "global_clipnorm": 2.5}
    theirs = linear(4, keras.optimizers.SGD(1.0, **options))
    fit(theirs, [[3, 0, 0, 4]])
    theirs.save_weights(tmp_path / "their.weights.h5")
    ours = linear(4, SGD(1.0, **options))
    ours.optimizer.build(ours.trainable_variables)
    ours.load_weights(tmp_path / "their.weights.h5")
    pairs = zip(ours.optimizer.variables, theirs.optimizer.variables, strict=False)
    assert all(bits(one) == bits(other) for one, other in pairs)
    assert array(ours.optimizer._norms).tolist() == [0, 0, 0, 0]
    for model in (ours, theirs):
        fit(model, [[0.3, 0, 0, 0.4]])
    assert weights(ours).tobytes() == weights(theirs).tobytes()
    assert float(ours.optimizer.last_global_norm) == 0.5
    other = linear(4, SGD(1.0, global_clipnorm=2.5))
    other.optimizer.build(other.trainable_variables)
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        other.load_weights(tmp_path / "their.weights.h5")


def digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    return (x / 16).astype(np.float32), y


def network(optimizer: Any) -> Any:
    layers = [keras.layers.Dense(32, "relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, crossentropy, metrics=["accuracy"])
    return model


@first_on_tensorflow
def test_digits_saved_and_continued(tmp_path: Path) -> None:
    """The whole model saved, and its weights alone."""
    x, y = digits()
    options = {"batch_size": 64, "shuffle": False, "verbose": 0}

    def adam() -> Any:
        return gradclip.keras.Adam(1e-2, global_clipnorm=1.0)

    def train(model: Any, epochs: int) -> dict[str, list[float]]:
        log = gradclip.keras.GlobalNorm()
        return dict(model.fit(x, y, epochs=epochs, callbacks=[log], **options).history)

    keras.utils.set_random_seed(1)
    whole = network(adam())
    start = whole.get_weights()
    expected = train(whole, 4)
    half = network(adam())
    half.set_weights(start)
    first = train(half, 2)
    half.save(tmp_path / "half.keras")
    loaded = keras.saving.load_model(tmp_path / "half.keras")
    assert type(loaded.optimizer) is gradclip.keras.Adam
    half.save_weights(tmp_path / "half.weights.h5")
    filled = network(adam())
    filled.optimizer.build(filled.trainable_variables)
    filled.load_weights(tmp_path / "half.weights.h5")
    last = float(half.optimizer.last_global_norm)
    for rest in (loaded, filled):
        assert float(rest.optimizer.last_global_norm) == last > 0
        second = train(rest, 2)
        assert {name: first[name] + second[name] for name in first} == expected
        for one, other in zip(rest.get_weights(), whole.get_weights(), strict=True):
            assert one.tobytes() == other.tobytes()
    assert expected["accuracy"][-1] > 0.9
    assert 0 < sum(expected["clipped"]) / 4 < 1


# ---- sparse gradients ----


def word_ids() -> np.ndarray[Any, Any]:
    return np.minimum(np.random.default_rng(0).zipf(1.3, 500), 100).astype(np.int32) - 1


def word_weights() -> np.ndarray[Any, Any]:
    return abs(rows(2000, 1))


def embedding(optimizer: Any) -> tuple[Any, Any]:
    table = keras.layers.Embedding(100, 4, embeddings_initializer="zeros")
    model = keras.Sequential([table, keras.layers.Flatten(), keras.layers.Dense(1)])
    model.compile(optimizer, loss)
    model.build((1, 500))
    model.layers[-1].set_weights([word_weights(), np.zeros(1)])
    return model, table


def embedding_gradient() -> np.ndarray[Any, Any]:
    dense = np.zeros((100, 4))
    np.add.at(dense, word_ids(), word_weights().reshape(500, 4).astype(np.float64))
    return dense


@(pytest.mark.long if BACKEND == "jax" else pytest.mark.slow)
def test_the_norm_of_an_embedding_is_that_of_its_dense_gradient() -> None:
    model, table = embedding(SGD(1.0, global_clipnorm=1.0))
    model.layers[-1].trainable = False
    model.compile(model.optimizer, loss)
    model.fit(word_ids()[None], np.zeros((1, 1)), verbose=0)
    dense = embedding_gradient()
    norm = float(model.optimizer.last_global_norm)
    assert norm == pytest.approx(np.linalg.norm(dense), rel=1e-6)
    assert norm > 1.5 * np.linalg.norm(word_weights())  # rows squared one by one, as by TensorFlow
    np.testing.assert_allclose(-array(table.embeddings), dense / norm, rtol=1e-4, atol=1e-6)


@on_tensorflow
def test_indexed_slices_stay_sparse_up_to_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: dict[str, set[Any]] = {"embeddings": set(), "kernel": set(), "bias": set()}
    update_step = keras.optimizers.SGD.update_step

    def watched(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
        kinds[variable.name.partition(":")[0].rpartition("/")[2]].add(type(gradient))
        update_step(self, gradient, variable, learning_rate)

    monkeypatch.setattr(keras.optimizers.SGD, "update_step", watched)
    model, _ = embedding(SGD(1.0, global_clipnorm=1.0))
    model.fit(word_ids()[None], np.zeros((1, 1)), verbose=0)
    assert kinds["embeddings"] == {tf.IndexedSlices}
    assert tf.IndexedSlices not in kinds["kernel"] | kinds["bias"]
    assert kinds["kernel"]


# ---- tf.distribute ----


@functools.cache
def strategy(replicas: int) -> Any:
    """One each: the collectives of two strategies in one process take each other's keys."""
    return tf.distribute.MirroredStrategy([f"CPU:{place}" for place in range(replicas)])


def one_step(
    optimizer_class: Any,
    replicas: int,
    sparse: bool = False,
    traced: bool = True,
    apart: bool = False,
) -> tuple[Any, Any]:
    """The length of an update with limit 1: [3, 4] on each replica, or [3, 0] and [0, 4]."""
    mirrored = strategy(replicas)
    with mirrored.scope():
        variable = zeros(2, 1)
        optimizer = optimizer_class(1.0, global_clipnorm=1.0)
        optimizer.build([variable])

    def step() -> None:
        gradient = tf.constant([[3.0], [4.0]])
        if sparse:
            values = tf.constant([[4.0], [1.0], [2.0]])
            gradient = tf.IndexedSlices(values, tf.constant([1, 0, 0]), tf.constant([2, 1]))
        if apart:
            place = tf.distribute.get_replica_context().replica_id_in_sync_group
            gradient *= tf.one_hot(place, 2)[:, None]
        optimizer.apply([gradient], [variable])

    mirrored.run(tf.function(step) if traced else step)
    copies = [array(v) for v in mirrored.experimental_local_results(variable.value)]
    assert len(copies) == replicas
    assert all(copy.tobytes() == copies[0].tobytes() for copy in copies)
    return np.linalg.norm(copies[0]), optimizer


@on_tensorflow
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "tf.function"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "IndexedSlices"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_replicas_are_summed_then_clipped(replicas: int, sparse: bool, traced: bool) -> None:
    length, optimizer = one_step(SGD, replicas, sparse, traced)
    assert length == pytest.approx(1, rel=1e-6)
    assert float(optimizer.last_global_norm) == 5 * replicas
    assert array(optimizer._norms).tolist() == [5 * replicas, 5 * replicas, 1, 1]


@on_tensorflow
def test_replicas_with_different_gradients() -> None:
    length, optimizer = one_step(SGD, 2, apart=True)
    assert length == pytest.approx(1, rel=1e-6)
    assert float(optimizer.last_global_norm) == 5
    length, _ = one_step(keras.optimizers.SGD, 2, apart=True)
    assert length == pytest.approx(np.sqrt(2), rel=1e-6)


@on_tensorflow
@pytest.mark.parametrize("replicas", [1, 2])
def test_keras_own_clips_then_sums(replicas: int) -> None:
    length, _ = one_step(keras.optimizers.SGD, replicas)
    assert length == pytest.approx(replicas, rel=1e-6)


@on_tensorflow
def test_fit_on_replicas_is_fit_on_one() -> None:
    x = rows(16, 4)
    logs, results = [], []
    for replicas in (1, 2):
        with strategy(replicas).scope():
            model = linear(4, SGD(1.0, global_clipnorm=0.5))
        logs.append(fit(model, x, gradclip.keras.GlobalNorm(), batch_size=4))
        results.append(weights(model))
    np.testing.assert_allclose(*results, rtol=1e-5)
    assert logs[0]["global_norm"] == pytest.approx(logs[1]["global_norm"], rel=1e-6)
    assert logs[0]["clipped"] == logs[1]["clipped"]
    assert 0 < logs[0]["clipped"][0] <= 1


@on_tensorflow
def test_loss_scale_on_replicas() -> None:
    with strategy(2).scope():
        inner = SGD(1.0, global_clipnorm=2.5)
        model = linear(4, keras.optimizers.LossScaleOptimizer(inner, 2.0**10))
    history = fit(model, [[3, 0, 0, 4]] * 2, gradclip.keras.GlobalNorm(), batch_size=2)
    assert history["global_norm"] == [5]
    assert weights(model).tolist() == [-1.5, 0, 0, -2]


@on_tensorflow
def test_accumulation_on_replicas() -> None:
    mirrored = strategy(2)
    with mirrored.scope():
        variable = zeros(2)
        optimizer = SGD(1.0, global_clipnorm=1.25, gradient_accumulation_steps=2)
        optimizer.build([variable])
    for values in ([6.0, 0.0], [0.0, 8.0]):
        gradient = tf.constant(values)
        mirrored.run(lambda gradient=gradient: optimizer.apply([gradient], [variable]))
    assert array(variable).tolist() == [-0.75, -1]
    assert array(optimizer._norms).tolist() == [10, 10, 1, 1]


@on_tensorflow
def test_cross_replica_context_takes_gradients_as_they_are() -> None:
    """There `_clip_gradients` alone can be called; Keras's update needs one replica's context."""
    with strategy(2).scope():
        optimizer = SGD(1.0, global_clipnorm=2.5)
        optimizer.build([zeros(2)])
        assert array(optimizer._clip_gradients([tensor([3, 4])])[0]).tolist() == [1.5, 2]
    assert float(optimizer.last_global_norm) == 5


# ---- torch ----


@on_torch
def test_the_fast_classes_of_torch_stay_in_use() -> None:
    for name in NAMES:
        fast = type(getattr(keras.optimizers, name)(0.5))
        assert issubclass(getattr(gradclip.keras, name), fast)


@on_torch
def test_gradients_are_not_modified() -> None:
    gradient = torch.tensor([[3.0, 0.0], [0.0, 4.0]]).T
    (result,), norm, _ = clipping.clip(SGD(global_clipnorm=2.5), [gradient])
    assert gradient.tolist() == [[3, 0], [0, 4]]
    assert result.tolist() == [[1.5, 0], [0, 2]]
    assert result.stride() == gradient.stride()
    assert norm.shape == ()
    assert norm.dtype == torch.float32


@on_torch
def test_a_tensor_without_memory_beside_others_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^grads\[1\] has no memory \(device meta\)$"):
        SGD(global_clipnorm=1.0)._clip_gradients([torch.ones(2), torch.ones(2, device="meta")])


# ---- every optimizer at once ----


def test_install_and_undo() -> None:
    def own() -> list[Any]:
        return [
            vars(base).get(name)
            for base in keras.Optimizer.__mro__
            for name in (
                "_clip_gradients",
                "_all_reduce_sum_gradients",
                "_backend_apply_gradients",
            )
        ]

    before = own()
    huge = [[1e30, 0, 0, 1e30]]
    undo = Installed().undo
    try:
        for optimizer in (
            keras.optimizers.SGD(1.0, global_clipnorm=1.0),
            SGD(1.0, global_clipnorm=1.0),
        ):
            model = linear(4, optimizer)
            fit(model, [[3, 0, 0, 4]])
            np.testing.assert_allclose(weights(model), [-0.6, 0, 0, -0.8], rtol=1e-6)
            model = linear(4, type(optimizer)(1.0, global_clipnorm=1.0))
            fit(model, huge)
            update, _ = clipped(huge[0], 1.0)
            assert (0 - weights(model)).tobytes() == update.tobytes()
        for options in ({}, {"clipnorm": 0.7}, {"clipvalue": 0.7}, {"global_clipnorm": 0}):
            during = steps(keras.optimizers.SGD(0.5, **options), gradients_of(None))
            undo()
            after = steps(keras.optimizers.SGD(0.5, **options), gradients_of(None))
            undo = Installed().undo
            assert during == after
    finally:
        undo()
    assert own() == before
    model = linear(4, keras.optimizers.SGD(1.0, global_clipnorm=1.0))
    fit(model, huge)
    assert not weights(model).any() or np.isnan(weights(model)).all()  # Keras's own overflows


@on_tensorflow
def test_installed_on_replicas() -> None:
    undo = Installed().undo
    try:
        for optimizer_class in (keras.optimizers.SGD, SGD):
            for apart in (False, True):
                length, _ = one_step(optimizer_class, 2, apart=apart)
                assert length == pytest.approx(1, rel=1e-6)
    finally:
        undo()
    length, _ = one_step(keras.optimizers.SGD, 2)
    assert length == pytest.approx(2, rel=1e-6)
