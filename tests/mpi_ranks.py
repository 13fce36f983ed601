"""What `test_distributed.py` has mpiexec run: NumPy arrays in parts, and mpi4py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import gradclip
from gradclip import limits

SHAPES = [(10, 3), (7,), (1,), (4, 0)]


def run() -> None:
    """The bits of one process; errors on all."""
    world = MPI.COMM_WORLD
    rank, size = world.rank, world.size
    for dtype in ("float16", "float32", "float64"):
        rng = np.random.default_rng(0)
        whole = [rng.standard_normal(shape).astype(dtype) for shape in SHAPES]
        wanted, norm = gradclip.clip_by_global_norm(whole, 1.0)
        parts = [np.array_split(x.ravel(), size)[rank].copy() for x in whole]
        mine = parts if rank else [*parts, None]
        clipped, found = gradclip.clip_by_global_norm(mine, 1.0, group=world)
        assert (type(found), found) == (type(norm), norm)
        for new, expected in zip(clipped, wanted, strict=False):
            assert new.tobytes() == np.array_split(expected.ravel(), size)[rank].tobytes()
        assert gradclip.global_norm(whole if rank == size - 1 else [], group=world) == norm
        assert gradclip.clip_by_global_norm_(parts, 1.0, group=world) == norm
        assert parts[0].tobytes() == clipped[0].tobytes()
    told = RuntimeError
    bad = np.ones(3, "f4") if rank else np.array([1, np.nan, np.inf], "f4")
    with pytest.raises(FloatingPointError, match=f"on rank {rank} of {size} "):
        gradclip.clip_by_global_norm([bad], 1.0, group=world, on_nonfinite="raise")
    with pytest.raises(RuntimeError if rank else TypeError):
        gradclip.global_norm([bad if rank else "x"], group=world)
    wrong: list[dict[str, Any]] = [
        {"clip_norm": -1.0},
        {"use_norm": "x"},
        {"on_nonfinite": "x"},
        {"t_list": map(int, "xxxx")},
        {"t_list": ["x"]},
    ]
    mine = np.ones(3, "f4")
    for given in (None, 2.0):
        good = {"t_list": [mine], "clip_norm": 1e9, "use_norm": given, "group": world}
        for change in wrong:
            for call in (gradclip.clip_by_global_norm, gradclip.clip_by_global_norm_):
                last = rank == size - 1
                with pytest.raises((ValueError, TypeError) if last else told):
                    call(**{**good, **(change if last else {})})
                call(**good)
        if size > 1:
            other = {"clip_norm": 1.0 if rank else 2.0}
            with pytest.raises(told, match=r"^the workers were not asked for the same"):
                gradclip.clip_by_global_norm_(**{**good, **other})
    assert mine.tolist() == [1, 1, 1]
    learn(world)


def learn(world: Any) -> None:
    """All learn the same of the global norm; tensor by tensor each of its own."""
    rng = np.random.default_rng(0)
    limit, each = limits.ZScore(warmup=3), limits.PerTensor(limits.Percentile(50))
    alone = limits.ZScore(warmup=3)
    for _ in range(12):
        whole = [rng.lognormal(size=5) for _ in range(world.size)]
        gradclip.clip_by_global_norm(whole, alone)
        mine = whole[world.rank]
        gradclip.clip_by_global_norm([mine], limit, group=world)
        norm = gradclip.clip_by_global_norm([mine], each, group=world)[1]
        assert norm == gradclip.global_norm(whole)
    assert limit.state_dict() == alone.state_dict()
    assert each.state_dict()["tensors"][0][1]["ring"][11] == gradclip.global_norm([mine])


run()
if MPI.COMM_WORLD.rank == 0:
    print("ok")
