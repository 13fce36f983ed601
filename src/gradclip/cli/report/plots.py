"""The plots of the report, by Bokeh: norm and limit, factor, share of clipped steps, heat map."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from bokeh.models import (
    BasicTicker,
    BoxZoomTool,
    ColorBar,
    ColumnDataSource,
    CrosshairTool,
    CustomJS,
    CustomJSHover,
    CustomJSTickFormatter,
    HoverTool,
    LinearColorMapper,
    LogColorMapper,
    NumeralTickFormatter,
    PanTool,
    Range1d,
    ResetTool,
    SaveTool,
    Span,
    WheelZoomTool,
)
from bokeh.palettes import Viridis256
from bokeh.plotting import figure

from gradclip.cli.report.buckets import SHARES, Buckets, where
from gradclip.cli.report.heat import NAN, Heat
from gradclip.record.events import LARGEST
from gradclip.record.series import Cells

if TYPE_CHECKING:
    from bokeh.plotting import figure as Figure  # noqa: N812

    from gradclip.record.events import Event, Run

NORM, LIMIT, CLIPPED, SKIPPED, BROKEN = "#3b82c4", "#d9822b", "#d9822b", "#8b5cf6", "#e5297e"
BORDER = 170  # of names, left of each plot

_DIGITS = """
if (value === null || Number.isNaN(value)) return "\\u2013";
return Math.abs(value) >= 1000 && Math.abs(value) < 1e6
  ? Math.round(Number(value.toPrecision(3))).toLocaleString("en-US")
  : String(Number(value.toPrecision(3)));
"""


def plots(run: Run, heat: Heat, events: Sequence[Event]) -> dict[str, Figure]:
    """The plots by name, their steps moving together; without tensors there is no ``"heat"``."""
    first, last = int(run.steps[0]), int(run.steps[-1])
    room = max(1.0, 0.01 * (last - first))
    steps = Range1d(first - room, last + room)
    buckets = Buckets(run)
    source = ColumnDataSource(_columns(run, buckets))
    drawn = {
        "norm": _norm(source, steps, run, buckets),
        "factor": _factor(source, steps),
        "share": _share(run, steps),
    }
    if heat.names and len(run.tensor_steps):
        drawn["heat"] = _heat(heat, steps, events)
    return drawn


def _columns(run: Run, buckets: Buckets) -> dict[str, Any]:
    norm = where(run.norm, np.isfinite(run.norm) & (run.norm > 0))
    clipped = (run.factor < 1) & ~run.skipped
    broken = run.nonfinite > 0
    top = 2 * np.fmax.reduce(norm, initial=0.5)
    return {
        "first": buckets.first,
        "last": buckets.last,
        "step": (buckets.first + buckets.last) / 2,
        "norm": buckets.largest(norm),
        "least": buckets.smallest(norm),
        "limit": buckets.smallest(run.limit),
        "factor": buckets.smallest(where(run.factor, run.factor > 0)),
        "clipped": buckets.largest(where(norm, clipped)),
        "skipped": buckets.largest(where(norm, run.skipped & ~broken)),
        "broken": buckets.largest(where(np.full(len(norm), top), broken)),
    }


def _empty(steps: Range1d, height: int, **options: Any) -> Figure:
    """A plot with nothing in it; a finger on it moves the page, a mouse zooms."""
    drag = BoxZoomTool(dimensions=options.pop("zooms", "width"))
    tools = [drag, PanTool(dimensions="width"), WheelZoomTool(dimensions="width")]
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        x_range=steps,
        tools=[*tools, ResetTool(), SaveTool()],
        toolbar_location=options.pop("toolbar", None),
        active_drag=drag,
        active_scroll=None,
        min_border_left=BORDER,
        min_border_right=16,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        output_backend="canvas",
        **options,
    )
    plot.toolbar.logo = None
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    plot.xaxis.ticker = plot.xgrid.ticker = BasicTicker(min_interval=1)  # steps are whole
    plot.grid.grid_line_alpha = 1
    plot.xaxis.minor_tick_line_color = plot.yaxis.minor_tick_line_color = None
    return plot


def _norm(source: ColumnDataSource, steps: Range1d, run: Run, buckets: Buckets) -> Figure:
    plot = _empty(steps, 320, y_axis_type="log", toolbar="above")
    if buckets.size > 1:
        plot.varea(x="step", y1="least", y2="norm", source=source, color=NORM, alpha=0.3)
    _mark(plot, source, "clipped", "clipped", marker="circle", size=4, color=CLIPPED, alpha=0.6)
    line = plot.line("step", "norm", source=source, color=NORM, legend_label="norm")
    if np.isfinite(run.limit).any():
        look = {"color": LIMIT, "line_width": 1.5, "line_dash": "6 3"}
        plot.line("step", "limit", source=source, legend_label="limit", **look)
    _mark(plot, source, "skipped", "skipped", marker="inverted_triangle", size=10, color=SKIPPED)
    _mark(plot, source, "broken", "NaN or inf", marker="x", size=12, color=BROKEN, line_width=3)
    _legend(plot)
    _hover(plot, line, [("norm", "@norm"), ("limit", "@limit"), ("factor", "@factor")])
    return plot


def _mark(plot: Figure, source: ColumnDataSource, column: str, label: str, **look: Any) -> None:
    if np.isfinite(source.data[column]).any():
        plot.scatter("step", column, source=source, legend_label=label, **look)


def _legend(plot: Figure) -> None:
    legend = plot.legend[0]
    first = {"norm": 0, "limit": 1}  # though drawn above the marks
    legend.items = sorted(legend.items, key=lambda item: first.get(item.label.value, 2))
    legend.click_policy = "hide"
    legend.orientation = "horizontal"
    legend.background_fill_alpha = 0
    legend.border_line_color = None
    legend.padding = legend.margin = 0
    legend.label_text_font_size = "12px"
    plot.add_layout(legend, "above")


def _factor(source: ColumnDataSource, steps: Range1d) -> Figure:
    least = np.fmin.reduce(source.data["factor"], initial=0.5)
    plot = _empty(steps, 150, y_axis_type="log", y_range=Range1d(least / 1.5, 1.5))
    line = plot.line("step", "factor", source=source, color=NORM)
    plot.add_layout(Span(location=1, dimension="width", line_color=LIMIT, line_dash="6 3"))
    _hover(plot, line, [("factor", "@factor")])
    return plot


def _share(run: Run, steps: Range1d) -> Figure:
    buckets = Buckets(run, SHARES)
    kept = ~run.skipped
    data = {
        "first": buckets.first,
        "last": buckets.last,
        "edge": buckets.last + 1,
        "clipped": buckets.share((run.factor < 1) & kept),
        "whole": buckets.share((run.factor < 1) | run.skipped),
        "skipped": buckets.share(run.skipped),
    }
    source = ColumnDataSource(data)
    plot = _empty(steps, 130, y_range=Range1d(0, 1.02))
    plot.yaxis.formatter = NumeralTickFormatter(format="0%")
    plot.yaxis.ticker = BasicTicker(desired_num_ticks=3)
    sides = {"left": "first", "right": "edge", "source": source}
    bars = plot.quad(top="clipped", bottom=0, color=CLIPPED, alpha=0.8, **sides)
    plot.quad(top="whole", bottom="clipped", color=SKIPPED, **(sides | {"line_color": None}))
    shares = [("clipped", "@clipped{0.0%}"), ("skipped", "@skipped{0.0%}")]
    plot.add_tools(HoverTool(renderers=[bars], tooltips=[_STEPS, *shares], mode="vline"))
    return plot


_STEPS = ("step", "@first{0,0} \u2013 @last{0,0}")


def _hover(plot: Figure, line: Any, shown: list[tuple[str, str]]) -> None:
    digits = CustomJSHover(code=_DIGITS)
    plot.add_tools(
        CrosshairTool(dimensions="height", line_color="gray", line_alpha=0.5),
        HoverTool(
            renderers=[line],
            mode="vline",
            tooltips=[_STEPS, *((label, f"{field}{{custom}}") for label, field in shown)],
            formatters={field: digits for _, field in shown},
        ),
    )


# ---- the heat map ----

# What lies at a place of the heat map.
_CELL = """
const row = Math.round(y), column = Math.floor((x - first) / width);
const name = row >= 0 && row < names.length ? names[row] : undefined;
const from = first + column * width, to = from + width - 1;
const grouped = (step) => step.toLocaleString("en-US");
const steps = width === 1 ? grouped(from) : `${grouped(from)} \\u2013 ${grouped(to)}`;
const digits = (norm) => norm === undefined || Number.isNaN(norm) ? "no norm"
  : norm === Infinity ? "inf" : norm >= nan ? "NaN" : String(Number(norm.toPrecision(3)));
"""


def _heat(heat: Heat, steps: Range1d, events: Sequence[Event]) -> Figure:
    names, image = heat.image()
    names, image = names[::-1], image[::-1]  # Bokeh's first row is at the bottom
    height = int(np.clip(18 * len(names), 160, 640))
    zoomed = Range1d(-0.5, len(names) - 0.5, bounds=(-0.5, len(names) - 0.5))
    plot = _empty(steps, height + 90, y_range=zoomed, zooms="both")
    plot.name = "heat"
    parts = heat.cells
    place = {
        "x": parts.first, "y": -0.5, "dw": parts.number * parts.width, "dh": len(names),
    }  # fmt: skip
    colors = _colors(image)
    drawn = plot.image(image=[image], color_mapper=colors, **place)
    broken = image >= NAN
    if broken.any():
        pink = LinearColorMapper(palette=["rgba(0, 0, 0, 0)", BROKEN], low=0, high=1)
        plot.image(image=[broken.astype(np.uint8)], color_mapper=pink, **place)
    _ring(plot, names, parts, events)
    _name_axis(plot, names)
    _tell_cells(plot, drawn, {
        "names": names, "first": parts.first, "width": parts.width, "nan": NAN,
    })  # fmt: skip
    bar = ColorBar(color_mapper=colors, height=10, padding=4, background_fill_alpha=0)
    plot.add_layout(bar, "below")
    return plot


def _colors(image: npt.NDArray[np.float32]) -> LogColorMapper:
    """Colours for nearly all norms; an explosion would leave the others a few shades."""
    finite = image[(image > 0) & (image < NAN)]
    low, high = np.quantile(finite, (0.005, 0.995)) if len(finite) else (0.1, 1)
    return LogColorMapper(
        palette=Viridis256,
        low=float(low),
        high=float(max(high, low * 1.01)),
        low_color=Viridis256[0],
        high_color=Viridis256[-1],
        nan_color="rgba(0, 0, 0, 0)",
    )


def _ring(plot: Figure, names: list[str], parts: Cells, events: Sequence[Event]) -> None:
    """Draw a ring around the tensors of each event, a frame around those of a drift."""
    row_of = {name: row for row, name in enumerate(names)}
    found = [
        (event, row_of[name])
        for event in events
        for name in event.nonfinite[:LARGEST] or [jump.name for jump in event.jumps[:1]]
        if name in row_of and event.kind != "skip"
    ]
    half = max(0.5, len(names) / 120)  # of a row, or as much as can be seen
    frames = [(each.first, each.last, row) for each, row in found if each.kind == "drift"]
    if frames:
        left, right, row = map(np.array, zip(*frames, strict=True))
        for look in _outlines("#ffffff"):
            plot.quad(left, right, row + half, row - half, **look)
    ends = parts.first, parts.first + parts.number * parts.width - 1
    for broken in (False, True):
        rings = [
            (float(parts.middles[parts.of(np.clip([each.first, each.last], *ends))].mean()), row)
            for each, row in found
            if each.kind != "drift" and bool(each.nonfinite) is broken
        ]
        for look in _outlines(BROKEN if broken else "#ffffff") if rings else ():
            plot.scatter(*zip(*rings, strict=True), size=16, **look)


def _outlines(color: str) -> Iterator[dict[str, Any]]:
    """A dark line and a bright one on it, which is seen on every colour."""
    yield {"fill_color": None, "line_color": "#000000", "line_width": 5, "line_alpha": 0.7}
    yield {"fill_color": None, "line_color": color, "line_width": 2}


def _name_axis(plot: Figure, names: list[str]) -> None:
    plot.ygrid.visible = False
    plot.yaxis.ticker = BasicTicker(desired_num_ticks=min(30, max(4, len(names))), min_interval=1)
    plot.yaxis.major_label_text_font_size = "10px"
    plot.yaxis.formatter = CustomJSTickFormatter(
        args={"names": _short(names)},
        code="""
        const name = names[Math.round(tick)] ?? "";
        return name.length > 24 ? name.slice(0, 9) + "\\u2026" + name.slice(-14) : name;
        """,
    )


def _short(names: list[str]) -> list[str]:
    """The names without the parts that all begin or end with."""
    parts = [name.split(".") for name in names]
    room = min(map(len, parts)) - 1
    begin = _shared(parts, room)
    end = _shared([each[::-1] for each in parts], room - begin)
    return [".".join(each[begin : len(each) - end]) for each in parts]


def _shared(parts: list[list[str]], most: int) -> int:
    """How many of their first parts are the same in all of them."""
    columns = zip(*(each[:most] for each in parts), strict=True)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _tell_cells(plot: Figure, drawn: Any, of: dict[str, Any]) -> None:
    """Tell tensor, steps and norm under the pointer, and below the plot where it is tapped."""
    seen = f"const x = special_vars.x, y = special_vars.y; {_CELL}"
    told = {"$y": "name", "$x": "steps", "@image": "digits(value)"}
    formats = {
        field: CustomJSHover(args=of, code=f"{seen} return {what};") for field, what in told.items()
    }
    tips = [("tensor", "$y{custom}"), ("step", "$x{custom}"), ("norm", "@image{custom}")]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=tips, formatters=formats))
    plot.js_on_event(
        "tap",
        CustomJS(
            args={**of, "source": drawn.data_source},
            code=f"""
            const x = cb_obj.x, y = cb_obj.y;
            {_CELL}
            const image = source.data.image[0], columns = image.shape[1];
            if (name === undefined || column < 0 || column >= columns) return;
            document.getElementById("told").textContent =
              `${{name}}, step ${{steps}}: ${{digits(image[row * columns + column])}}`;
            """,
        ),
    )
