# ruff: noqa: E501  (a mutation is a line)
"""The tests of limits see what they are there to see: each mutation of a formula fails a check."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import papers
from gradclip.core import limits as core
from gradclip.core.arithmetic import HOST

SOURCE = Path(core.__file__).read_text()

MUTATIONS = [
    ("the decay of the mean is of n", "self.decay * mean + (1 - self.decay) * m", "(1 - self.decay) * mean + self.decay * m"),
    ("the variance is of the mean before", "(m - later_mean) * (m - later_mean)", "(m - mean) ** 2"),
    ("statistics of n", 'm = x if self.learn_from == "raw" else ops.where', "m = x if True else ops.where"),
    ("the sample's variance", "- var) / seen", "- var) / ops.maximum(seen - 1, 1.0)"),
    ("a warm-up that is one longer", "learnt = count >= max(self.warmup, 1)\n        x = ops", "learnt = count > max(self.warmup, 1)\n        x = ops"),
    ("another epsilon", "(size / 1000, 1e-6)", "(size / 1000, 1e-8)"),
    ("shrunk to the edge", "self.z * std * (self.z / ops.where(outlier, score, self.z))", "self.z * std"),
    ("no cap", "ops.minimum(allowed, self.limit), self.limit)", "allowed, self.limit)"),
    ("no cap where nothing stands out", "self.limit), self.limit)", "self.limit), math.inf)"),
    ("what stands out teaches", "teaches = teaches & (outlier == False)", "teaches = teaches & (outlier == outlier)"),
    ("0 teaches", "teaches = (norm > 0) & (norm < math.inf)", "teaches = (norm >= 0) & (norm < math.inf)"),
    ("inf teaches", "teaches = (norm > 0) & (norm < math.inf)", "teaches = norm > 0"),
    ("outliers of a constant", "& (x > mean + size * 2.0**-52)", ""),
    ("the norm is not among those it is held to", "ops.column(x)))", "-math.inf))"),
    ("the oldest is never left out", "ordered < oldest", "ordered < math.inf"),
    ("no interpolation", "low + (high - low) * (at - ops.cast(below", "low + 0 * (at - ops.cast(below"),
    ("a percentile of one norm more", "ops.minimum(count, self.history - 1)", "ops.minimum(count + 1, self.history - 1)"),
    ("the ring forgets", "ops.put(ring, place, x)", "ring"),
    ("no factor", "ops.maximum(self.factor * percentile", "ops.maximum(percentile"),
    ("an average of n", 'm = x if self.learn_from == "raw" else ops.minimum(x, allowed)', "m = x"),
    ("a decay the other way", "self.decay * average + (1 - self.decay) * m", "(1 - self.decay) * average + self.decay * m"),
    ("a small norm lost in the average", "self.decay * average + (1 - self.decay) * m", "average + (1 - self.decay) * (m - average)"),
    ("the warm-up's last norm", "average + (x - average) / ops.cast", "x + 0 / ops.cast"),
    ("no smallest norm", "ops.minimum(average, clipped), clipped)", "ops.maximum(average, clipped), clipped)"),
    ("the smallest of what is not clipped", "clipped = x * ops.minimum", "clipped = x + 0 * ops.minimum"),
    ("the warm-up's limit afterwards", "ops.where(learnt, allowed, self.limit)", "ops.minimum(allowed, self.limit)"),
    ("others' NaN teaches", "teaches & (whole < math.inf)", "teaches"),
]  # fmt: skip


def module_of(source: str) -> Any:
    """The kinds, as this source has them."""
    name = "mutated_limits"
    module = types.ModuleType(name)
    sys.modules[name] = module  # where a dataclass looks for what its annotations say
    try:
        exec(compile(source, name, "exec"), vars(module))
    finally:
        del sys.modules[name]
    return module


def check(kinds: Any) -> None:
    """Each formula against its paper's, and what teaches nothing."""
    z, average, percentile = kinds.ZScore, kinds.Average, kinds.Percentile
    pairs = [
        (z(), papers.ZClip()),
        (z(3.0, 0.9, 10, 5.0, "edge"), papers.ZClip(0.9, 3.0, 10, "edge", max_grad_norm=5.0)),
        (z(4.0, log=True, beyond="skip"), papers.LogDeviations()),
        (percentile(), papers.AutoClip()),
        (percentile(97.3, 7), papers.AutoClip(97.3, 7)),
        (percentile(50, 100, 2.0), papers.ScaledAdam()),
        (average(2.0), papers.MeanOfNorms(2.0)),
        (average(2.0, 1e-12, 1), papers.MeanOfNorms(2.0, 1e-12, 1)),
    ]
    norms = papers.norms_of(0, 1000)
    for kind, paper in pairs:
        state = kind.begin(HOST)
        for norm in norms:
            ruling = kind.judge(HOST, state, norm)
            assert ruling.limit == pytest.approx(paper(norm), rel=1e-12)
            state = ruling.state
        for nothing in (math.nan, math.inf, 0.0):
            assert kind.judge(HOST, state, nothing).state == state
    check_adagc(average(1.05, warmup=30))
    check_a_constant(z(warmup=3))


def check_adagc(kind: Any) -> None:
    columns = [papers.norms_of(seed, 300) for seed in range(3)]
    state, paper = kind.begin(HOST, (3,)), papers.AdaGC(start=30)
    for row in zip(*columns, strict=True):
        norms, whole = np.array(row), math.sqrt(math.fsum(x * x for x in row))
        ruling = kind.judge(HOST, state, norms, whole)
        against = np.where(ruling.learnt, norms, whole)
        found = np.minimum(ruling.limit / against, 1.0)
        assert found.tolist() == pytest.approx(paper(list(row)), rel=1e-12)
        state = ruling.state
    ruling = kind.judge(HOST, state, np.array([1.0, math.nan, 1.0]), math.nan)
    assert all(np.array_equal(a, b) for a, b in zip(ruling.state, state, strict=True))


def check_a_constant(kind: Any) -> None:
    for constant in (0.1, 0.3, 0.7, 1.1, 1e30):
        state = kind.begin(HOST)
        for norm in (*[constant] * 50, math.nextafter(constant, math.inf)):
            ruling = kind.judge(HOST, state, norm)
            assert ruling.limit == math.inf
            state = ruling.state


def test_the_formulas_pass() -> None:
    check(module_of(SOURCE))


@pytest.mark.parametrize(("old", "new"), [pytest.param(*m[1:], id=m[0]) for m in MUTATIONS])
def test_a_mutated_formula_is_seen(old: str, new: str) -> None:
    assert SOURCE.count(old) == 1
    with np.errstate(all="ignore"), pytest.raises((AssertionError, ArithmeticError)):
        check(module_of(SOURCE.replace(old, new)))
