"""How the report looks, and the little that it does: colours of light and dark, room on phones."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1c2430;
  --quiet: #5c6775; --rule: #dfe3e8; --grid: #eceff2; --alarm: #b8155c; --warm: #a85b0c;
  --cool: #6d3fd4; --link: #1f66a8; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1a2029; --ink: #e4e8ee;
  --quiet: #9aa5b3; --rule: #303945; --grid: #252d38; --alarm: #ff6fae; --warm: #f0a55a;
  --cool: #b79cff; --link: #7db9f0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 32px 0 4px; }
p, figure { margin: 0; } a { color: var(--link); }
.quiet, figcaption { color: var(--quiet); font-size: 13.5px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 10px;
  margin: 18px 0 0; }
.tiles div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 8px 12px; }
.tiles dt { color: var(--quiet); font-size: 13px; }
.tiles dd { margin: 0; font-size: 20px; font-variant-numeric: tabular-nums; }
.events { columns: 500px; column-gap: 10px; margin: 8px 0 0; }
button { font: inherit; font-size: 13px; color: var(--link); background: none; border: 0;
  padding: 4px 0 0; cursor: pointer; text-align: left; }
.event { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  break-inside: avoid; margin: 0 0 10px; border-left: 4px solid var(--quiet); }
.event.NaN, .event.inf { border-left-color: var(--alarm); }
.event.spike { border-left-color: var(--warm); } .event.skip { border-left-color: var(--cool); }
.event.drift { border-left-color: var(--link); }
summary { padding: 10px 14px; cursor: pointer; overflow-wrap: anywhere; }
summary b { font-variant-numeric: tabular-nums; }
.kind { display: inline-block; min-width: 48px; font-size: 12.5px; font-weight: 650;
  text-transform: none; margin-right: 6px; }
.NaN .kind, .inf .kind { color: var(--alarm); } .spike .kind { color: var(--warm); }
.skip .kind { color: var(--cool); } .drift .kind { color: var(--link); }
.told { display: block; } .show { padding: 0 14px 8px; }
.facts { padding: 0 14px 8px; display: grid; grid-template-columns: max-content 1fr; gap: 0 14px;
  margin: 0; } .facts dt { color: var(--quiet); } .facts dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 14px; text-align: right; white-space: nowrap;
  border-top: 1px solid var(--rule); }
th { color: var(--quiet); font-weight: 500; font-size: 13px; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; }
td:first-child { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px; }
.alarm { color: var(--alarm); font-weight: 650; }
figure { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 8px 8px 4px; margin: 8px 0 0; min-width: 0; }
figcaption { padding: 2px 6px 6px; }
#told { min-height: 1.5em; overflow-wrap: anywhere; font-weight: 600; padding: 0 6px 4px; }
footer { margin-top: 28px; }
@media (max-width: 640px) { main { padding: 16px 10px 32px; } th, td { padding: 3px 6px; }
  table { font-size: 13px; } td:first-child { font-size: 11.5px; }
  .facts, .show, summary { padding-left: 10px; padding-right: 10px; }
  .tiles { grid-template-columns: repeat(2, 1fr); } }
"""

# Bokeh draws on a canvas, which knows no CSS: what is of the page's colours is set again where the
# page turns dark, and what is of its width where that changes.
SCRIPT = """
(() => {
  const paint = {
    axis_label_text_color: "--quiet", major_label_text_color: "--quiet",
    label_text_color: "--ink", axis_line_color: "--rule", major_tick_line_color: "--rule",
    grid_line_color: "--grid", title_text_color: "--quiet", bar_line_color: "--rule",
  };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");
  const finger = matchMedia("(pointer: coarse)");
  const dress = (models) => {
    const page = getComputedStyle(document.documentElement);
    for (const model of models)
      for (const [property, color] of Object.entries(paint))
        if (property in model.properties) model[property] = page.getPropertyValue(color).trim();
  };
  const fit = (plots) => {
    for (const plot of plots) {
      plot.min_border_left = narrow.matches ? 56 : BORDER;
      if (finger.matches) plot.toolbar.active_drag = null;
      if (plot.name !== "heat") continue;
      plot.left[0].major_label_text_font_size = narrow.matches ? "0px" : "10px";
    }
  };
  const show = (plots, {first, last}) => {
    const room = Math.max(64, (last - first) / 4);
    plots[0].x_range.setv({start: Number(first) - room, end: Number(last) + room});
    document.querySelector("figure").scrollIntoView({behavior: "smooth", block: "center"});
  };
  const ready = () => {
    const of = Bokeh.documents[0];
    if (!of || !of.is_idle) return requestAnimationFrame(ready);
    const models = [...of._all_models.values()], plots = of.roots();
    const again = () => { dress(models); fit(plots); };
    again();
    dark.addEventListener("change", again);
    narrow.addEventListener("change", again);
    for (const button of document.querySelectorAll("button[data-first]"))
      button.addEventListener("click", () => show(plots, button.dataset));
  };
  ready();
})();
"""
