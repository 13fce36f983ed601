"""The report as one HTML page, with Bokeh's own script in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import gradclip
from gradclip.cli._console import need_extra, printable
from gradclip.cli.report.facts import Facts
from gradclip.cli.report.heat import MOST_TENSORS, Heat
from gradclip.cli.report.style import SCRIPT, STYLE
from gradclip.cli.report.words import counted, deed, figure, percent, span, summary, times
from gradclip.record.events import Event, Jump, Run

if TYPE_CHECKING:
    from bokeh.plotting import figure as Figure  # noqa: N812

OPEN = 5  # events whose tables are open at first
MOST_EVENTS = 50


def page(facts: Facts, run: Run, events: Sequence[Event], heat: Heat) -> str:
    """Write the page.

    Raises:
        CliError: there is no Bokeh.
    """
    try:
        from bokeh.embed import components
        from bokeh.resources import Resources

        from gradclip.cli.report.plots import BORDER, plots
    except ModuleNotFoundError as error:
        raise need_extra(str(error.name).partition(".")[0]) from None
    drawn = plots(run, heat, _heaviest(events))
    script, places = components(drawn)
    bokeh = "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)
    figures = dict(_figures(drawn, places, facts, heat))
    parts = (_head(facts), figures.pop("norm"), *_events(events, facts), *figures.values())
    scripts = (bokeh, script.strip(), SCRIPT.replace("BORDER", str(BORDER)))
    return _document(facts, "".join(parts), *scripts)


def _document(facts: Facts, body: str, bokeh: str, plots: str, script: str) -> str:
    title = escape(f"Gradients of {printable(facts.name)}")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
<script>{bokeh}</script>
{plots}
</head>
<body>
<main>
<h1>{title}</h1>
{body}
<footer class="quiet">Written by gradclip {escape(gradclip.__version__)}. All norms are those
before clipping.</footer>
</main>
<script>{script}</script>
</body>
</html>
"""


def _head(facts: Facts) -> str:
    tiles = "".join(
        f"<div><dt>{label}</dt><dd{_alarming(alarm)}>{value}</dd></div>"
        for label, value, alarm in (
            ("steps", f"{facts.steps:,}", False),
            ("median norm", _known(facts.median), False),
            ("largest norm", _known(facts.largest), False),
            ("clipped", percent(facts.clipped, facts.steps), False),
            ("skipped", f"{facts.skipped:,}", False),
            ("NaN or inf", f"{facts.nonfinite:,}", facts.nonfinite > 0),
        )
    )
    return f'<p class="quiet">{escape(facts.when)}</p>\n<dl class="tiles">{tiles}</dl>\n'


def _alarming(alarm: bool) -> str:
    return ' class="alarm"' if alarm else ""


# ---- events ----


def _events(events: Sequence[Event], facts: Facts) -> Iterator[str]:
    yield f"<h2>What happened: {counted(len(events), 'event')}</h2>\n"
    if not events:
        yield '<p class="quiet">No spike, no NaN or inf, no skipped step, no slow drift.</p>\n'
    shown = _heaviest(events)
    if len(shown) < len(events):
        yield f'<p class="quiet">The {MOST_EVENTS} that matter most are shown.</p>\n'
    yield '<div class="events">\n'
    weighty = [event for event in sorted(shown, key=_weight) if event.kind != "skip"]
    for event in shown:
        yield _card(event, opened=event in weighty[:OPEN], tensors=facts.tensors)
    yield "</div>\n"


def _heaviest(events: Sequence[Event]) -> list[Event]:
    """As many of those that matter most as are shown, in the order of their steps."""
    return sorted(sorted(events, key=_weight)[:MOST_EVENTS], key=lambda event: event.first)


def _weight(event: Event) -> tuple[int, float]:
    """What matters most first: NaN and inf, drifts, spikes by their size, skipped steps."""
    order = {"NaN": 0, "inf": 0, "drift": 1, "spike": 2, "skip": 3}
    return order[event.kind], 0 if math.isnan(event.ratio) else -event.ratio


def _card(event: Event, *, opened: bool, tensors: int) -> str:
    facts = {
        "global norm": f"{_known(event.norm_before)} before, {figure(event.norm_in)} in it",
        "the limit": deed(event),
        "steps": f"{event.steps:,} from {event.first:,} to {event.last:,}",
    }
    if event.first == event.last:
        del facts["steps"]
    place = f'data-first="{event.first}" data-last="{event.last}"'
    listed = "".join(f"<dt>{label}</dt><dd>{escape(text)}</dd>" for label, text in facts.items())
    return f"""<details class="event {event.kind}"{" open" if opened else ""}>
<summary><span class="kind">{event.kind}</span> <b>{span(event)}</b>
<span class="told">{escape(printable(summary(event)))}</span></summary>
<dl class="facts">{listed}</dl>
{_jumps(event.jumps, tensors)}
<p class="show"><button {place}>show in the plots</button></p>
</details>
"""


def _jumps(jumps: Sequence[Jump], tensors: int) -> str:
    if not jumps:
        lack = "No tensors are in this record." if not tensors else ""
        lack = lack or "The norms of tensors were not written in these steps."
        return f'<p class="quiet show">{lack}</p>\n'
    rows = "".join(
        f"<tr><td>{escape(printable(jump.name))}</td><td>{_known(jump.before)}</td>"
        f"<td{_alarming(not math.isfinite(jump.within))}>{figure(jump.within)}</td>"
        f"<td>{times(jump.ratio)}</td></tr>\n"
        for jump in jumps
    )
    return f"""<table><thead><tr><th>largest jumps</th><th>before</th><th>in it</th>
<th>change</th></tr></thead><tbody>
{rows}</tbody></table>
"""


def _known(norm: float) -> str:
    """A norm of which NaN says that there is none."""
    return "\u2013" if math.isnan(norm) else figure(norm)


# ---- plots ----


def _figures(
    drawn: Mapping[str, Figure], places: Mapping[str, str], facts: Facts, heat: Heat
) -> Iterator[tuple[str, str]]:
    parts = f"In parts of {facts.bucket:,} steps, from the smallest to the largest. "
    parts = parts if facts.bucket > 1 else ""
    texts = {
        "norm": ("Norm and limit", f"{parts}Drag to zoom; a word above hides what it names."),
        "factor": ("Factor", "What gradients were multiplied by; 1 is no clipping."),
        "share": ("Clipped steps", "The share of steps that were clipped; above it the skipped."),
        "heat": ("Norm of each tensor", _heat_text(heat)),
    }
    for name in drawn:
        heading, text = texts[name]
        told = '<p id="told"></p>\n' if name == "heat" else ""
        yield (
            name,
            f"""<h2>{heading}</h2>
<figure>{places[name].strip()}
{told}<figcaption>{escape(text)}</figcaption></figure>
""",
        )


def _heat_text(heat: Heat) -> str:
    width = heat.cells.width
    text = "Each cell is the largest norm in " + (f"{width:,} steps" if width > 1 else "a step")
    if len(heat.names) > MOST_TENSORS:
        text += f"; of {len(heat.names):,} tensors the {MOST_TENSORS:,} that moved most"
    return f"{text}. Pink is NaN or inf, a ring or a frame an event. Tap a cell to read it."
