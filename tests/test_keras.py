"""`gradclip.keras`: the checks in keras_worker.py on each Keras backend, and whole processes."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BACKENDS = ["tensorflow", "jax", "torch"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("keras"), reason="keras is not installed"),
]


def run(backend: str, *arguments: str, cwd: Path | None = None) -> str:
    """What a Python process on a Keras backend prints, the errors too."""
    if not importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is not installed")
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    return done.stdout


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("which", "how_many"),
    [("not long", r"\d{2,3}"), pytest.param("long", r"\d+", marks=pytest.mark.long)],
)
def test_on_each_backend(backend: str, which: str, how_many: str) -> None:
    # A MirroredStrategy never closes its threads.
    quiet = "ignore:unclosed running multiprocessing pool:ResourceWarning"
    worker = str(HERE / "keras_worker.py")
    pytests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which]
    printed = run(backend, "-W", quiet, *pytests, worker)
    passed = rf"^{how_many} passed(, \d+ skipped)?, \d+ deselected in"
    assert re.search(passed, printed, re.MULTILINE), printed


SAVE = """
import keras, gradclip.keras
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, "linear", False, "zeros")])
model.compile(gradclip.keras.SGD(1.0, momentum=0.5, global_clipnorm=2.5), lambda _, y: y)
model.fit(keras.ops.ones((1, 2)) * keras.ops.array([[3.0, 4.0]]), keras.ops.ones(1), verbose=0)
model.compile(model.optimizer, "mse")
model.save("saved.keras")
"""
LOAD = """
import keras
model = keras.saving.load_model("saved.keras")
optimizer = model.optimizer
print(type(optimizer).__module__, float(optimizer.last_global_norm), optimizer.global_clipnorm)
"""
LOAD_UNKNOWN = """
import keras
try:
    keras.saving.load_model("saved.keras")
except TypeError as error:
    print(error)
"""


@pytest.mark.parametrize("backend", ["tensorflow", pytest.param("jax", marks=pytest.mark.long)])
def test_a_model_saved_on_one_backend_loads_on_another(backend: str, tmp_path: Path) -> None:
    run("torch", "-c", SAVE, cwd=tmp_path)
    load = "import gradclip.keras" + LOAD
    printed = run(backend, "-c", LOAD_UNKNOWN + "print('imported')\n" + load, cwd=tmp_path)
    unknown, _, printed = printed.partition("imported\n")  # before the import Keras says so
    assert "Could not locate class 'SGD'" in unknown
    assert "gradclip.keras" in unknown
    assert printed.endswith("gradclip.keras 5.0 2.5\n"), printed


def test_importing_gradclip_imports_no_keras() -> None:
    printed = run("tensorflow", "-c", "import gradclip, sys; print('keras' in sys.modules)")
    assert printed == "False\n"


def test_a_backend_that_gradclip_does_not_have() -> None:
    step = (
        "import keras, numpy as np, gradclip.keras as k\n"
        "k.SGD(1.0, global_clipnorm=1.0).apply([np.ones(2)], [keras.Variable([0.0, 0.0])])"
    )
    printed = run("numpy", "-c", step)
    message = "Keras's backend is numpy; gradclip has ['jax', 'tensorflow', 'torch']"
    assert printed.endswith(f"NotImplementedError: {message}\n"), printed


def test_example() -> None:
    pytest.importorskip("sklearn")
    printed = run("tensorflow", str(HERE.parent / "examples" / "keras_digits.py"))
    epochs = re.findall(
        r"^epoch \d: the gradient's mean norm was (\d\.\d\d); clipped in (\d+)% of steps$",
        printed,
        re.MULTILINE,
    )
    assert len(epochs) == 5, printed
    assert all(float(norm) > 0 and 0 <= int(share) <= 100 for norm, share in epochs)
    (accuracy,) = re.findall(r"^accuracy on digits not trained on: (\d+)%$", printed, re.MULTILINE)
    assert int(accuracy) > 80
