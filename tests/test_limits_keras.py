"""Limits that learn in `gradclip.keras`: `limits_keras_worker.py` on each backend; processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from test_keras import BACKENDS, HERE, run
from test_keras import pytestmark as of_keras

pytestmark = of_keras


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("which", "how_many"),
    [("not long", r"\d{2,3}"), ("long", r"\d+")],
)
def test_on_each_backend(backend: str, which: str, how_many: str) -> None:
    # A MirroredStrategy never closes its threads.
    quiet = "ignore:unclosed running multiprocessing pool:ResourceWarning"
    worker = str(HERE / "limits_keras_worker.py")
    pytests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which]
    printed = run(backend, "-W", quiet, *pytests, worker)
    passed = rf"^{how_many} passed(, \d+ skipped)?, \d+ deselected in"
    assert re.search(passed, printed, re.MULTILINE), printed


RESUME = """
import sys, numpy as np, keras, gradclip.keras
from gradclip import limits
name, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
x = np.random.default_rng(0).standard_normal((40, 2)).astype("f4")
x[[12, 25]] *= 50
if first:
    model = keras.saving.load_model(name)
else:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, "linear", False, "zeros")])
    limit = limits.ZScore(warmup=5, beyond="skip")
    model.compile(gradclip.keras.Adam(0.1, global_clipnorm=limit), "mae")
y = np.full(len(x), 1e3, "f4")
model.fit(x[first:last], y[first:last], batch_size=1, shuffle=False, verbose=0)
model.save(name)
optimizer = model.optimizer
if last == len(x):
    values = [*model.trainable_variables, *optimizer.variables]
    print(*(keras.ops.convert_to_numpy(value).tobytes().hex() for value in values))
    print(optimizer.last_limit.hex() if hasattr(optimizer.last_limit, "hex") else "")
    print("skipped", optimizer.skipped_steps)
"""


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_goes_on_to_the_bit_in_a_new_process(backend: str, tmp_path: Path) -> None:
    whole = run(backend, "-c", RESUME, "whole.keras", "0", "40", cwd=tmp_path)
    run(backend, "-c", RESUME, "half.keras", "0", "17", cwd=tmp_path)
    rest = run(backend, "-c", RESUME, "half.keras", "17", "40", cwd=tmp_path)
    shown = [printed.splitlines()[-3:] for printed in (whole, rest)]
    assert shown[0] == shown[1], whole + rest
    assert re.match(r"skipped [2-9]$", shown[0][-1]), whole


@pytest.mark.long
def test_a_model_saved_on_one_backend_goes_on_on_another(tmp_path: Path) -> None:
    run("torch", "-c", RESUME, "saved.keras", "0", "17", cwd=tmp_path)
    printed = run("tensorflow", "-c", RESUME, "saved.keras", "17", "40", cwd=tmp_path)
    whole = run("tensorflow", "-c", RESUME, "whole.keras", "0", "40", cwd=tmp_path)
    assert printed.splitlines()[-2:] == whole.splitlines()[-2:]
