"""Limits that set themselves: their formulas, what they learn, and where they keep it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradclip
import papers
from gradclip import limits
from gradclip.core.arithmetic import HOST

RECORDED = [float(x) for x in np.loadtxt(Path(__file__).parent / "recorded_norms.txt")]

# A kind, and its paper's rule.
PAIRS: list[tuple[Any, Callable[[], papers.Rule]]] = [
    (limits.ZScore(), papers.ZClip),
    (
        limits.ZScore(3.0, 0.9, 10, 5.0, "edge"),
        lambda: papers.ZClip(0.9, 3.0, 10, "edge", max_grad_norm=5.0),
    ),
    (limits.ZScore(beyond="mean"), lambda: papers.ZClip(clip_option="mean")),
    (limits.ZScore(4.0, log=True, beyond="skip"), papers.LogDeviations),
    (limits.Percentile(), papers.AutoClip),
    (limits.Percentile(97.3, 7), lambda: papers.AutoClip(97.3, 7)),
    (limits.Percentile(50, 100, 2.0), papers.ScaledAdam),
    (limits.Average(2.0), lambda: papers.MeanOfNorms(2.0)),
    (limits.Average(1.05, 0.9, 3), lambda: papers.MeanOfNorms(1.05, 0.9, 3)),
]
KINDS = [kind for kind, _ in PAIRS]
EACH = [limits.PerTensor(kind) for kind in KINDS if not kind.skips]
# One of each sort; what is left are the same formulas with other numbers.
SOME = [pytest.param(x, marks=[pytest.mark.long] * bool(i % 3)) for i, x in enumerate(EACH)]


def fresh(limit: Any) -> Any:
    """One that has learnt nothing."""
    return dataclasses.replace(limit)


def clipped(limit: Any, norm: float) -> tuple[float, float]:
    """The norm and limit of one number as a gradient, clipped in place."""
    gradient = np.array([norm])
    found = gradclip.clip_by_global_norm_([gradient], limit)
    assert found == norm or math.isnan(norm)
    return abs(float(gradient[0])), limit.last_limit


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2))])
@pytest.mark.parametrize(("kind", "rule"), PAIRS, ids=[f"paper{i}" for i in range(len(PAIRS))])
def test_each_kind_is_its_papers_formula(
    kind: Any, rule: Callable[[], papers.Rule], seed: int
) -> None:
    limit, paper = fresh(kind), rule()
    for step, norm in enumerate(papers.norms_of(seed, 3400)):
        wanted = paper(norm)
        result, found = clipped(limit, norm)
        assert found == pytest.approx(wanted, rel=1e-12), step
        skipped = kind.skips and norm > found
        assert result == pytest.approx(0 if skipped else min(norm, wanted), rel=1e-12), step


@pytest.mark.parametrize(
    ("kind", "rule", "clips"),
    [(limits.ZScore(), papers.ZClip, 20), (limits.Percentile(), papers.AutoClip, 452)],
)
def test_published_defaults_on_a_recorded_training(
    kind: Any, rule: Callable[[], papers.Rule], clips: int
) -> None:
    limit, paper = fresh(kind), rule()
    found = [clipped(limit, norm)[1] for norm in RECORDED]
    wanted = [paper(norm) for norm in RECORDED]
    assert found == pytest.approx(wanted, rel=1e-12)
    assert sum(norm > at for norm, at in zip(RECORDED, wanted, strict=True)) == clips


@pytest.mark.parametrize("warmup", [1, 20, 100])
def test_average_per_tensor_is_adagc(warmup: int) -> None:
    columns = [papers.norms_of(seed, 1200) for seed in range(5)]
    limit = limits.PerTensor(limits.Average(1.05, warmup=warmup))
    paper = papers.AdaGC(start=warmup)
    for step, norms in enumerate(zip(*columns, strict=True)):
        gradients = [np.array([norm]) for norm in norms]
        gradclip.clip_by_global_norm_(gradients, limit)
        wanted = [h * norm for h, norm in zip(paper(list(norms)), norms, strict=True)]
        assert [float(x[0]) for x in gradients] == pytest.approx(wanted, rel=1e-12), step


@pytest.mark.parametrize("each", EACH, ids=repr)
def test_each_tensor_is_judged_as_if_it_were_alone(each: Any) -> None:
    """After the warm-up, in which the global norm counts."""
    kind = dataclasses.replace(each.kind)
    if not isinstance(kind, limits.Percentile):
        kind = dataclasses.replace(kind, warmup=1, limit=math.inf)
    together, alone = limits.PerTensor(kind), [fresh(kind) for _ in range(4)]
    for norms in zip(*(papers.norms_of(seed, 500) for seed in range(4)), strict=True):
        gradients = [np.array([norm]) for norm in norms]
        gradclip.clip_by_global_norm_(gradients, together)
        wanted = [clipped(limit, norm) for limit, norm in zip(alone, norms, strict=True)]
        assert [float(x[0]) for x in gradients] == [result for result, _ in wanted]
        assert together.last_limit.tolist() == [limit for _, limit in wanted]


# ---- what a norm teaches ----


@pytest.mark.parametrize("kind", [*KINDS, *SOME], ids=repr)
@pytest.mark.parametrize("nothing", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("after", [0, 3, 130])
def test_nan_inf_and_0_teach_nothing(kind: Any, nothing: float, after: int) -> None:
    limit = fresh(kind)
    for norm in papers.norms_of(0, after):
        clipped(limit, norm)
    known = limit.state_dict()
    for policy in ("nan", "zero", "keep"):
        gradients = [np.array([nothing])]
        gradclip.clip_by_global_norm_(gradients, limit, on_nonfinite=policy)
        if nothing == 0 or policy == "keep":
            assert gradients[0] == nothing or math.isnan(nothing)
        else:
            assert gradients[0] == 0 if policy == "zero" else math.isnan(gradients[0][0])
        assert limit.last_limit > 0
    if nothing:
        with pytest.raises(FloatingPointError):
            gradclip.clip_by_global_norm_([np.array([nothing])], limit, on_nonfinite="raise")
    if after:
        assert limit.state_dict() == known
    else:
        learnt = limit.state_dict()
        assert learnt == known or not any(_counts(learnt))


def _counts(state: dict[str, Any]) -> list[int]:
    return [each["count"] for each in ([x for _, x in state.get("tensors", [])] or [state])]


HOSTILE = {
    "first huge": [1e30, *[1.0] * 200],
    "constant": [0.1] * 300,
    "constant, and its neighbours": [*[0.1] * 150, math.nextafter(0.1, 1), 0.1, 0.2, 0.1] * 3,
    "subnormal": [5e-324, 1e-310, 5e-324] * 60,
    "largest": [1.7e308, 1e300, 1.0] * 60,
    "falling": [10.0**-k for k in range(300)],
    "rising": [10.0**k for k in range(300)],
    "to and fro": [1e-300, 1e300] * 100,
    "with nothing in between": [1.0, math.nan, 0.0, math.inf, 2.0] * 60,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", [*KINDS, *SOME], ids=repr)
@pytest.mark.parametrize("warmup", [0, 2, None])
def test_hostile_norms_make_no_nan_and_no_limit_of_0(name: str, kind: Any, warmup: Any) -> None:
    of: Any = kind.kind if isinstance(kind, limits.PerTensor) else kind
    if isinstance(of, limits.Percentile):
        if warmup is not None:
            pytest.skip("there is no warm-up")
        of = dataclasses.replace(of, history=min(of.history, 50))
    elif warmup is not None:
        of = dataclasses.replace(of, warmup=warmup)
    limit = limits.PerTensor(of) if isinstance(kind, limits.PerTensor) else fresh(of)
    for norm in HOSTILE[name]:
        before = np.array([norm])
        with np.errstate(all="raise"):
            found, _ = gradclip.clip_by_global_norm([before], limit)
        (result,) = found[0]
        assert np.all(np.asarray(limit.last_limit) > 0)
        if math.isfinite(norm):
            least = 0 if kind.skips or norm < 1e-290 else math.ulp(0.0)
            assert least <= result <= norm
        for saved in [x for _, x in limit.state_dict().get("tensors", [])] or [limit.state_dict()]:
            values = [np.asarray(x) for key, x in saved.items() if key != "kind"]
            assert not any(np.isnan(x).any() for x in values)


@pytest.mark.parametrize("constant", [1e-30, 0.1, 1e30])
def test_a_constant_sequence_has_no_outliers(constant: float) -> None:
    limit = limits.ZScore(warmup=3)
    for _ in range(500):
        assert clipped(limit, constant) == (constant, math.inf)
    above = math.nextafter(constant, math.inf)
    assert clipped(limit, above) == (above, math.inf)
    assert clipped(limit, 2 * constant)[0] == pytest.approx(constant, rel=1e-3)


def test_small_norms_stand_out_too() -> None:
    """By an epsilon of 1e-6, as ZClip has it, none below that ever would."""
    limit = limits.ZScore()
    for k in range(60):
        clipped(limit, 1e-9 * (1 + k % 3 / 10))
    assert clipped(limit, 1e-7)[0] < 1.3e-9


def test_the_constant_does_not_change_what_is_learnt() -> None:
    free, capped = limits.ZScore(), limits.ZScore(limit=1.0)
    for norm in RECORDED[:200]:
        clipped(free, 5 + norm)
        assert clipped(capped, 5 + norm)[0] <= 1.0
    assert free.state_dict() == capped.state_dict()
    assert free.state_dict()["mean"] > 5


def test_raw_norms_are_learnt_if_asked_for() -> None:
    for make in (limits.ZScore, lambda **more: limits.Average(1.5, **more)):
        raw, usual = make(warmup=3, learn_from="raw"), make(warmup=3)
        for norm in (1.0, 2.0, 3.0, 1000.0):
            clipped(raw, norm), clipped(usual, norm)
        mean = next(x for name, x in raw.state_dict().items() if name in ("mean", "average"))
        assert mean > 5 * next(
            x for name, x in usual.state_dict().items() if name in ("mean", "average")
        )


def test_a_norm_above_float64_is_clipped_and_teaches_nothing() -> None:
    limit = limits.ZScore(warmup=3)
    for norm in (1.0, 2.0, 3.0):
        clipped(limit, norm)
    known = limit.state_dict()
    leaves, norm = gradclip.clip_by_global_norm([np.full(4, 1.7e308)], limit)
    assert math.isinf(norm)
    assert np.linalg.norm(leaves[0]) == pytest.approx(limit.last_limit)
    assert limit.state_dict() == known
    each = limits.PerTensor(limits.ZScore(warmup=1))
    for _ in range(3):
        gradclip.clip_by_global_norm([np.ones(4), np.ones(4)], each)
    leaves, _ = gradclip.clip_by_global_norm([np.full(4, 1.7e308), np.ones(4)], each)
    assert np.linalg.norm(leaves[0]) == pytest.approx(2.0)
    assert leaves[1].tolist() == [1, 1, 1, 1]


def test_given_norms_are_learnt() -> None:
    limit = limits.Percentile(50)
    gradclip.clip_by_global_norm([np.ones(3)], limit, use_norm=7.0)
    assert limit.last_limit == 7.0


# ---- tensors that come and go ----


def test_tensors_keep_their_state_by_place_while_others_come_and_go() -> None:
    limit = limits.PerTensor(limits.Percentile(100, factor=0.5))
    kept: dict[int, Any] = {place: limits.Percentile(100, factor=0.5) for place in range(4)}
    rng = np.random.default_rng(0)
    for step in range(40):
        norms = rng.lognormal(size=4).tolist()
        there = [place for place in range(4) if place < 3 - (step % 3 == 1) or step > 20]
        gradients: list[Any] = [np.array([x]) if i in there else None for i, x in enumerate(norms)]
        gradclip.clip_by_global_norm_(gradients, limit)
        for place in there:
            assert float(gradients[place][0]) == clipped(kept[place], norms[place])[0]
    saved = dict(limit.state_dict()["tensors"])
    for place, alone in kept.items():
        assert saved[place] == {k: v for k, v in alone.state_dict().items() if k != "kind"}


# ---- saved and found again ----


@pytest.mark.parametrize("kind", [*KINDS, *EACH], ids=repr)
@pytest.mark.parametrize("way", ["json", "pickle", "deepcopy", "copy"])
def test_what_is_saved_goes_on_to_the_bit(kind: Any, way: str) -> None:
    one = fresh(kind)
    for norm in RECORDED[:150]:
        clipped(one, norm)
    if way == "json":
        other = fresh(kind)
        other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    else:
        ways: dict[str, Any] = {
            "pickle": lambda limit: pickle.loads(pickle.dumps(limit)),
            "deepcopy": copy.deepcopy,
            "copy": copy.copy,
        }
        other = ways[way](one)
    assert other == one
    for norm in RECORDED[150:300]:
        assert clipped(one, norm) == clipped(other, norm)
    assert one.state_dict() == other.state_dict()


def test_a_new_process_goes_on_to_the_bit(tmp_path: Path) -> None:
    code = """
import json, pathlib, sys
import numpy as np, gradclip
from gradclip import limits
path = pathlib.Path(sys.argv[1])
found = []
for kind in (limits.ZScore(), limits.Percentile(), limits.Average(1.5)):
    for limit in (kind, limits.PerTensor(kind)):
        known = json.loads(path.read_text()) if path.exists() else {}
        name = repr(limit)
        if name in known:
            limit.load_state_dict(known[name])
        for norm in map(float, sys.argv[2].split(",")):
            gradclip.clip_by_global_norm([np.array([norm, 1.0]), np.array([norm])], limit)
        path.write_text(json.dumps({**known, name: limit.state_dict()}))
"""

    def run(path: Path, norms: list[float]) -> None:
        text = ",".join(map(repr, norms))
        subprocess.run([sys.executable, "-c", code, str(path), text], check=True)

    run(tmp_path / "whole", RECORDED[:120])
    run(tmp_path / "parts", RECORDED[:70])
    run(tmp_path / "parts", RECORDED[70:120])
    assert (tmp_path / "whole").read_text() == (tmp_path / "parts").read_text()


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({}, "the state is {}; it must be of ZScore.state_dict()"),
        (
            {"kind": "Average"},
            "the state is {'kind': 'Average'}; it must be of ZScore.state_dict()",
        ),
        (
            {"kind": "ZScore", "mean": 1.0},
            "the state has {'mean': 1.0}; it must have mean, var, count",
        ),
        (
            {"kind": "ZScore", "mean": math.nan, "var": 0.0, "count": 1},
            ("the state has {'mean': nan, 'var': 0.0, 'count': 1}, which no ZScore has learnt"),
        ),
        (
            {"kind": "ZScore", "mean": [1.0], "var": 0.0, "count": 1},
            "the state has {'mean': [1.0], 'var': 0.0, 'count': 1}, which no ZScore has learnt",
        ),
    ],
)
def test_a_state_that_is_none_is_refused_and_changes_nothing(state: Any, text: str) -> None:
    limit = limits.ZScore()
    clipped(limit, 3.0), clipped(limit, 4.0)
    known = limit.state_dict()
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        limit.load_state_dict(state)
    assert limit.state_dict() == known


# ---- the objects ----


@pytest.mark.parametrize("kind", [*KINDS, *EACH], ids=repr)
def test_what_is_shown_can_be_pasted(kind: Any) -> None:
    found = eval(repr(kind), vars(limits).copy())
    assert found == kind
    assert (hash(found), repr(found)) == (hash(kind), repr(kind))
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind._memory = None


def test_inf_can_be_pasted_too() -> None:
    assert repr(limits.Average(2.0, limit=math.inf)) == "Average(factor=2.0, limit=float('inf'))"


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: limits.ZScore(0.0), ValueError, "z is 0.0; it must be above 0, and finite"),
        (lambda: limits.ZScore("3"), TypeError, "z is '3'; it must be a real number"),
        (
            lambda: limits.ZScore(decay=1.0),
            ValueError,
            "decay is 1.0; it must be from 0 to below 1",
        ),
        (lambda: limits.ZScore(warmup=-1), ValueError, "warmup is -1; it must be 0 or more"),
        (lambda: limits.ZScore(warmup=2.0), TypeError, "warmup is 2.0; it must be an integer"),
        (
            lambda: limits.ZScore(limit=0),
            ValueError,
            "limit is 0; it must be above 0 (inf: only measure)",
        ),
        (
            lambda: limits.ZScore(beyond="clip"),  # type: ignore[arg-type]
            ValueError,
            "beyond is 'clip'; it must be one of 'shrink', 'edge', 'mean', 'skip'",
        ),
        (
            lambda: limits.Average(2.0, learn_from="m"),  # type: ignore[arg-type]
            ValueError,
            "learn_from is 'm'; it must be one of 'clipped', 'raw'",
        ),
        (
            lambda: limits.Average(1.0),
            ValueError,
            (
                "factor is 1.0; an average of norms that are clipped to no more than itself only "
                'ever falls: it must be above 1, or learn_from="raw"'
            ),
        ),
        (lambda: limits.Percentile(101), ValueError, "p is 101.0; it must be from 0 to 100"),
        (lambda: limits.Percentile(5, 0), ValueError, "history is 0; it must be 1 or more"),
        (
            lambda: limits.PerTensor(1.0),
            TypeError,
            "kind is 1.0; it must be a ZScore, a Percentile or an Average",
        ),
        (
            lambda: limits.PerTensor(limits.ZScore(beyond="skip")),
            ValueError,
            (
                "kind is ZScore(beyond='skip'); one tensor that stands out cannot have a step of "
                'all skipped: beyond is "shrink", "edge" or "mean"'
            ),
        ),
    ],
)
def test_arguments_are_checked(make: Callable[[], Any], kind: type, text: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(text)}$"):
        make()


def test_a_limit_that_is_made_anew_in_every_step_is_told() -> None:
    def train(steps: int, limit: Any = None) -> None:
        for _ in range(steps):
            gradclip.clip_by_global_norm([np.ones(3)], limit or limits.ZScore(z=2.0))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(2)
        train(10, limits.ZScore(z=2.0))
        train(2)
    with pytest.warns(RuntimeWarning, match="was made anew for each of the last 4 steps") as told:
        train(5)
    assert [each.filename for each in told] == [__file__]


def test_a_skipped_step_is_zeros_where_there_is_none_to_skip() -> None:
    limit = limits.ZScore(warmup=5, beyond="skip")
    for norm in (1.0, 1.1, 0.9, 1.0, 1.05):
        clipped(limit, norm)
    known = limit.state_dict()
    assert clipped(limit, 50.0)[0] == 0
    assert limit.state_dict() == known


def test_the_formula_of_one_norm_is_that_of_many() -> None:
    """Judged alone by Python's numbers and in a vector by NumPy's: the same bits."""
    for kind in KINDS:
        if kind.log if isinstance(kind, limits.ZScore) else False:
            continue  # NumPy's logarithm is another
        columns = [papers.norms_of(seed, 300) for seed in range(3)]
        alone = [kind.begin(HOST) for _ in columns]
        together = kind.begin(HOST, (3,))
        for norms in zip(*columns, strict=True):
            rulings = [kind.judge(HOST, s, n) for s, n in zip(alone, norms, strict=True)]
            whole = kind.judge(HOST, together, np.array(norms))
            alone, together = [each.state for each in rulings], whole.state
            assert whole.limit.tolist() == [each.limit for each in rulings]


# ---- what was found by trying it hard ----


@pytest.mark.parametrize(
    "kind",
    [
        limits.Average(2.0, decay=0, warmup=1),
        limits.ZScore(decay=0, warmup=1, beyond="mean"),
        limits.Percentile(0, 1, 1e-300),
        limits.Average(1e-300, learn_from="raw"),
    ],
    ids=repr,
)
def test_a_small_norm_after_a_large_one_is_not_lost(kind: Any) -> None:
    for each in (fresh(kind), limits.PerTensor(fresh(kind))):
        for norm in (1.0, 1e-17, 1.0, 1.0, 1e8, 1e-3, 1.0):
            clipped(each, norm)
            assert np.all(np.asarray(each.last_limit) > 0)
    paper, limit = papers.MeanOfNorms(2.0, 1e-9, 1), limits.Average(2.0, 1e-9, 1)
    for norm in (1e8, 1e-3, 1.0, 1e-5, 1e-5):
        assert clipped(limit, norm)[1] == pytest.approx(paper(norm), rel=1e-12)


def test_no_tensors_at_all_leave_a_state_that_loads() -> None:
    limit = limits.PerTensor(limits.Average(1.05))
    for nothing in ([], [None, None], {}):
        gradclip.clip_by_global_norm(nothing, limit)
    assert limit.state_dict() == {"kind": "PerTensor"}
    limit.load_state_dict({"kind": "PerTensor", "tensors": []})
    clipped(limit, 2.0)
    assert limit.state_dict()["tensors"][0][1]["count"] == 1


def test_a_loaded_state_is_found_as_fast_as_one_that_was_learnt() -> None:
    """Or each step would put the states of the tensors together anew."""
    limit = limits.PerTensor(limits.Average(1.05))
    gradclip.clip_by_global_norm([np.ones(2), np.ones(3)], limit)
    limit.load_state_dict(json.loads(json.dumps(limit.state_dict())))
    assert limit._memory.keys == range(2)


@pytest.mark.parametrize(
    "changed",
    [
        {"mean": 0.0},
        {"mean": math.inf},
        {"mean": "1"},
        {"mean": True},
        {"var": -1.0},
        {"count": -1},
        {"count": 30.7},
        {"count": 2**70},
    ],
    ids=repr,
)
def test_a_state_that_no_limit_has_learnt_is_refused(changed: dict[str, Any]) -> None:
    limit = limits.ZScore()
    known = {"kind": "ZScore", "mean": 1.0, "var": 0.5, "count": 100}
    limit.load_state_dict(known)
    with pytest.raises(ValueError, match=r"which no ZScore has learnt$"):
        limit.load_state_dict({**known, **changed})
    assert limit.state_dict() == known


@pytest.mark.parametrize(
    ("ring", "count"), [([1.0, 2.0], 5), ([1.0, math.inf, math.inf], 2), ([1.0, 0.0, 2.0], 3)]
)
def test_a_ring_that_no_limit_has_learnt_is_refused(ring: list[float], count: int) -> None:
    with pytest.raises(ValueError, match=r"which no Percentile has learnt$"):
        limits.Percentile(50, 3).load_state_dict(
            {"kind": "Percentile", "ring": ring, "count": count}
        )
    with pytest.raises(ValueError, match=r"which no Average has learnt$"):
        limits.Average(2.0).load_state_dict({"kind": "Average", "average": 0.0, "count": 3})


def test_what_is_told_is_a_copy() -> None:
    limit = limits.PerTensor(limits.Percentile(50))
    clipped(limit, 2.0)
    limit.last_limit[:] = 0
    assert limit.last_limit.tolist() == [2.0]
