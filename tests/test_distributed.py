"""Many workers: process groups of PyTorch, DTensors, communicators of MPI."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from conftest import ENGINES, MORE_DTYPES, lacks, version
from gradclip.core import exact, workers
from gradclip.core.workers import Joint
from ranks import run_ranks

needs_torch = pytest.mark.skipif(version("torch") is None, reason="torch is not installed")


@needs_torch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "functions", "printed"),
    [
        (1, ["splits", *MORE_DTYPES], ""),
        (
            2,
            ["splits", *MORE_DTYPES, *ENGINES, "flat"] + ["there"] * (lacks("triton") is None),
            "",
        ),
        (
            4,
            ["splits", *ENGINES, "flat", "stages", "errors", "attached_errors", "failures"],
            "told\n",
        ),
        pytest.param(
            3,
            ["splits", "flat", "errors", "attached_errors", "failures"],
            "told\n",
            marks=pytest.mark.long,
        ),
        pytest.param(3, [*MORE_DTYPES], "", marks=pytest.mark.long),
        pytest.param(4, [*MORE_DTYPES], "", marks=pytest.mark.long),
        pytest.param(8, ["splits"], "", marks=pytest.mark.long),
    ],
)
def test_process_groups_and_dtensors(count: int, functions: list[str], printed: str) -> None:
    """One start of the processes for all there is to do in so many: it takes the most time."""
    found = run_ranks("torch_ranks", functions, count)
    assert found == [printed] * (count - 1) + [""]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_mpi(count: int) -> None:
    if version("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    beside = shutil.which("mpiexec", path=str(Path(sys.executable).parent))
    mpiexec = beside or shutil.which("mpiexec")
    assert mpiexec, "mpi4py without mpiexec"
    ended = subprocess.run(
        [mpiexec, "-n", str(count), sys.executable, str(Path(__file__).parent / "mpi_ranks.py")],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert (ended.stdout, ended.returncode) == ("ok\n", 0), ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_mesh_of_jax_over_processes(count: int) -> None:
    if version("jax") is None:
        pytest.skip("jax is not installed")
    run_ranks("jax_ranks", ["run"], count)


# ---- the sum, without processes ----


class Recorded:
    """A worker who writes down what it hands in, or is told what all have."""

    rank, size = 0, 1

    def __init__(self, told: list[np.ndarray]) -> None:
        self.told = told
        self.handed_in: list[np.ndarray] = []

    def sum(self, vector: np.ndarray) -> np.ndarray:
        self.handed_in.append(vector.copy())
        return sum(self.told, start=np.zeros_like(vector)) if self.told else vector


def total_of(values: np.ndarray) -> np.ndarray:
    import gradclip._clip

    return gradclip._clip.survey([values]).total


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [1, 7, 1000])
def test_totals_of_any_number_of_workers_add_up_without_overflow(dtype: str, count: int) -> None:
    """In any order; the largest numbers of the dtype fill every word."""
    rng = np.random.default_rng(0)
    for scale in (1.0, float(np.finfo(dtype).max) / 4):
        values = (rng.standard_normal(4 * count) * scale).clip(-scale, scale).astype(dtype)
        vectors = []
        for part in np.split(values, count):
            worker = Recorded([])
            Joint(worker).norm(total_of(part), wide=dtype == "float64")
            vectors += worker.handed_in
            assert vectors[-1].nbytes == 1088
            assert 0 <= vectors[-1][:-3].min() <= vectors[-1][:-3].max() < 2**32
        for order in (vectors, vectors[::-1]):
            found, wide = Joint(Recorded(order)).norm(exact.total_of(), wide=False)
            assert wide == (dtype == "float64")
            assert found == exact.norm(total_of(values), exact.FLOAT64 if wide else exact.FLOAT32)


def test_2_to_31_workers_do_not_overflow() -> None:
    """Were each to hand in the largest words there are."""
    worker = Recorded([])
    Joint(worker).norm(total_of(np.full(1 << 12, np.finfo("f8").max)), wide=True)
    (vector,) = worker.handed_in
    assert int(vector[:-2].max()) * (2**31 - 1) < 2**63
    assert int(vector[-2:].max()) * (2**30) < 2**63


class Circle:
    """Workers that are threads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._here = threading.Barrier(size, timeout=20)
        self._vectors: list[Any] = [None] * size

    def run(self, call: Callable[[Joint], Any]) -> list[Any]:
        """What each gets from a call, or the text of its error."""
        with ThreadPoolExecutor(self.size) as threads:
            return list(threads.map(partial(self._one, call), range(self.size)))

    def _one(self, call: Callable[[Joint], Any], rank: int) -> Any:
        with (
            contextlib.suppress(ZeroDivisionError),
            Joint(Thread(self._sum, rank, self.size)) as joint,
        ):
            try:
                return call(joint)
            except RuntimeError as error:
                return str(error)

    def _sum(self, rank: int, vector: np.ndarray) -> np.ndarray:
        self._vectors[rank] = vector
        self._here.wait()
        together = np.sum(self._vectors, axis=0)
        self._here.wait()
        return together


class Thread(NamedTuple):
    """One of them."""

    add: Callable[[int, np.ndarray], np.ndarray]
    rank: int
    size: int

    def sum(self, vector: np.ndarray) -> np.ndarray:
        return self.add(self.rank, vector)


@pytest.mark.parametrize("size", [1, 2, 66, 67, 200])
def test_what_is_gathered_of_more_workers_than_fit_beside_the_flags(size: int) -> None:
    def call(joint: Joint) -> Any:
        joint.asked(norm_type=3.0)
        rank = joint.workers.rank
        return joint.gathered([-float(rank), 1 / (rank + 1)], wide=rank == size - 1)

    for every, wide in Circle(size).run(call):
        assert wide
        assert every.tolist() == [[-float(rank), 1 / (rank + 1)] for rank in range(size)]


def test_the_digest_of_what_was_asked_for_leaves_the_norm_as_it_is() -> None:
    """Of the least numbers there are, whose squares begin right above it."""
    values = [np.full(3, 5e-324), np.full(1, 2**-1022 * 1.5), np.zeros(0)]
    assert all(int(total_of(each)[0]) & workers._FREE == 0 for each in values)

    def call(joint: Joint) -> Any:
        joint.asked(clip_norm=1.0)
        return joint.norm(total_of(values[joint.workers.rank]), wide=True)

    whole = total_of(np.concatenate(values))
    assert Circle(3).run(call) == [(exact.norm(whole, exact.FLOAT64), True)] * 3


def test_workers_that_are_asked_for_different_things_are_told() -> None:
    """Each says what it was asked for; also those that are asked for what most are."""
    limits = [1.0, 1.0, math.nextafter(1.0, 2)]

    def call(joint: Joint) -> Any:
        joint.asked(clip_norm=limits[joint.workers.rank], on_nonfinite="nan")
        return joint.norm(total_of(np.ones(3)), wide=False)

    assert Circle(3).run(call) == [
        "the workers were not asked for the same, and all have to clip alike; rank "
        f"{rank} of 3 has clip_norm={limit!r}, on_nonfinite='nan'. Nothing has been written"
        for rank, limit in enumerate(limits)
    ]


def test_one_that_is_to_add_up_terms_is_no_good_to_one_that_has_none() -> None:
    def call(joint: Joint) -> Any:
        joint.asked(clip_norm=1.0)
        if joint.workers.rank == 0:
            joint.agree()
        return joint.norm(total_of(np.ones(3)), wide=False)

    assert all("not asked for the same" in each for each in Circle(2).run(call))


@pytest.mark.parametrize("way", ["norm", "gathered", "meet", "agree"])
def test_one_that_fails_need_not_know_for_what_the_others_wait(way: str) -> None:
    def call(joint: Joint) -> Any:
        if joint.workers.rank == 2:
            raise ZeroDivisionError
        joint.asked(norm_type=3.0)
        arguments = {"norm": [total_of(np.ones(3))], "gathered": [[1.0, 1.0]]}.get(way, [])
        options = {} if way in ("meet", "agree") else {"wide": False}
        return getattr(joint, way)(*arguments, **options)

    text = (
        "1 of 70 workers failed before their norms were added up; the reason is in the error of "
        "each. Nothing has been written"
    )
    assert Circle(70).run(call) == [None if rank == 2 else text for rank in range(70)]


def test_one_that_fails_hands_in_that_it_has() -> None:
    worker = Recorded([])
    with pytest.raises(ZeroDivisionError), Joint(worker):
        raise ZeroDivisionError
    assert [int(each[-1]) for each in worker.handed_in] == [workers._FLAG]
    text = (
        "1 of 1 workers failed before their norms were added up; the reason is in the error of "
        "each. Nothing has been written"
    )
    other = Recorded(worker.handed_in)
    with pytest.raises(RuntimeError, match=f"^{text}$"), Joint(other) as joint:
        joint.norm(exact.total_of(), wide=False)
    assert len(other.handed_in) == 1
