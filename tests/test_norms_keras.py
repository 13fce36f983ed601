"""Norms tensor by tensor in `gradclip.keras`: `norms_keras_worker.py` on each backend."""

from __future__ import annotations

import re

import pytest

from test_keras import BACKENDS, HERE, run
from test_keras import pytestmark as of_keras

pytestmark = of_keras


@pytest.mark.parametrize(
    ("backend", "which", "how_many"),
    [
        ("tensorflow", "not long", r"\d{2,3}"),
        *(
            pytest.param(each, "not long", r"\d{2,3}", marks=pytest.mark.long)
            for each in BACKENDS[1:]
        ),
        *(pytest.param(each, "long", r"\d+", marks=pytest.mark.long) for each in BACKENDS),
    ],
)
def test_on_each_backend(backend: str, which: str, how_many: str) -> None:
    # A MirroredStrategy never closes its threads.
    quiet = "ignore:unclosed running multiprocessing pool:ResourceWarning"
    worker = str(HERE / "norms_keras_worker.py")
    pytests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which]
    printed = run(backend, "-W", quiet, *pytests, worker)
    passed = rf"^{how_many} passed(, \d+ skipped)?, \d+ deselected in"
    assert re.search(passed, printed, re.MULTILINE), printed
