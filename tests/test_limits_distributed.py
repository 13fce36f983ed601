"""Limits that learn, over real process groups and DTensors: every rank learns the same."""

from __future__ import annotations

import pytest

from conftest import ENGINES, version
from ranks import run_ranks


@pytest.mark.skipif(version("torch") is None, reason="torch is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 4))])
def test_every_rank_learns_the_same(count: int) -> None:
    run_ranks("limits_ranks", ["learning", "communication", *ENGINES, "diverged"], count)
