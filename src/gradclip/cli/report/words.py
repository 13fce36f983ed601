"""Figures and sentences of a run's record, for the page, the terminal and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gradclip.record.events import Event


def figure(value: float) -> str:
    """A number to three digits, as people write it.

    >>> [figure(value) for value in (0.0, 0.29512, 2078.3, 1.5e-7, 3e12, float("nan"))]
    ['0', '0.295', '2,080', '1.5e-7', '3e12', 'NaN']
    """
    if math.isnan(value):
        return "NaN"
    if value and math.isfinite(value) and not 1e-3 <= abs(value) < 1e6:
        digits, _, power = f"{value:.3g}".partition("e")
        return f"{digits}e{int(power)}" if power else digits
    if abs(value) >= 1000 and math.isfinite(value):
        rounded = float(f"{value:.3g}")
        return f"{rounded:,.0f}"
    return f"{value:.3g}"


def percent(part: int, whole: int) -> str:
    """A share in percent.

    >>> percent(1, 8), percent(0, 0), percent(9999, 10_000)
    ('12.5 %', '0 %', 'over 99.9 %')
    """
    share = f"{100 * part / whole if whole else 0:.3g} %"
    return "over 99.9 %" if share == "100 %" and part < whole else share


def counted(number: int, thing: str) -> str:
    """So many things.

    >>> counted(1, "step"), counted(1200, "step")
    ('1 step', '1,200 steps')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def span(event: Event) -> str:
    """Its step, or the first and the last."""
    if event.first == event.last:
        return f"step {event.first:,}"
    return f"steps {event.first:,}\u2013{event.last:,}"


def summary(event: Event) -> str:
    """What happened, in a sentence without its end."""
    if event.kind in ("NaN", "inf"):
        return f"{event.kind} in {_names(event.nonfinite)}"
    if event.kind == "skip":
        steps = "a step" if event.steps == 1 else f"{event.steps:,} steps"
        return f"{steps} skipped, with a norm as before"
    if not event.jumps:
        verb = "grew" if event.kind == "drift" else "jumped"
        moved = f"the global norm {verb} from {figure(event.norm_before)}"
        return f"{moved} to {figure(event.norm_in)}{_pace(event)}"
    lead = event.jumps[0]
    verb = "grew" if event.kind == "drift" else "jumped"
    moved = f"{lead.name} {verb} from {figure(lead.before)} to {figure(lead.within)}"
    return f"{moved}{_pace(event) or f', {times(lead.ratio)}'}"


def times(ratio: float) -> str:
    """How many times a norm before: ``"x 12"``; nothing where that is not known."""
    return "" if math.isnan(ratio) else f"\u00d7 {figure(ratio)}"


def _pace(event: Event) -> str:
    if event.kind != "drift":
        return ""
    return f", by {figure(100 * event.rate)} % a step"


def _names(names: Sequence[str]) -> str:
    if not names:
        return "the global norm"
    if len(names) <= 3:
        return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    return f"{len(names):,} tensors, {names[0]} the first of them in the model"


def deed(event: Event) -> str:
    """What the limit did."""
    limit = "" if math.isnan(event.limit) else f" at a limit of {figure(event.limit)}"
    done = []
    if event.skipped:
        done.append("skipped" + _of(event.skipped, event))
    if event.clipped:
        by = f", factor down to {figure(event.factor)}" if event.factor > 0 else ""
        done.append(f"clipped{_of(event.clipped, event)}{limit}{by}")
    if not done:
        return f"clipped nothing{limit}" if limit else "no limit is known"
    return "; ".join(done)


def _of(count: int, event: Event) -> str:
    return "" if event.first == event.last else f" {count:,} of its steps"


def described(event: Event) -> dict[str, Any]:
    """All about an event, for JSON; null is what is not known."""
    return {
        "kind": event.kind,
        "first": event.first,
        "last": event.last,
        "steps": event.steps,
        "norm_before": known(event.norm_before),
        "norm_in": event.norm_in,
        "limit": known(event.limit),
        "factor": known(event.factor),
        "clipped": event.clipped,
        "skipped": event.skipped,
        "rate": known(event.rate),
        "nonfinite": list(event.nonfinite),
        "tensors": [
            {
                "name": jump.name,
                "before": known(jump.before),
                "in": jump.within,
                "ratio": known(jump.ratio),
            }
            for jump in event.jumps
        ],
    }


def known(value: float) -> float | None:
    """The value; None, which JSON has as null, for what is not known."""
    return None if math.isnan(value) else value
