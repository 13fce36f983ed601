"""``gradclip report``: it names layer, step and kind of each fault, and of nothing else."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cli_files
import gradclip
from cli_files import run_main, run_on_terminal, run_process
from gradclip.cli.report.heat import MOST_TENSORS, NAN, Heat
from gradclip.cli.report.page import MOST_EVENTS
from gradclip.record import History
from gradclip.record.events import LARGEST, Event, find
from recorded import BAD, DRIFTS, EXPLODES, names, planted, quiet, write

STEPS = 6000
NAMES = names(36)


def events(path: Path) -> list[Event]:
    with History.open(path) as history:
        return find(history)


def only(kind: str, found: list[Event]) -> Event:
    (event,) = (event for event in found if event.kind == kind)
    return event


# ---- events ----


@pytest.mark.parametrize("every", [1, 10, 100])
def test_three_planted_faults_are_found_and_nothing_else(tmp_path: Path, every: int) -> None:
    norms = planted(STEPS)
    found = events(write(tmp_path / "run.db", norms, every=every))
    assert sorted(event.kind for event in found) == ["NaN", "drift", "spike"]

    spike = only("spike", found)
    assert (spike.first, spike.last, spike.steps) == (1500, 1503, 4)
    assert spike.jumps[0].name == NAMES[EXPLODES]
    assert spike.jumps[0].within == norms[1500:1504, EXPLODES].max()
    assert spike.jumps[0].before == pytest.approx(np.median(norms[1000:1500, EXPLODES]), rel=1.5)
    assert spike.norm_in == np.linalg.norm(norms[1500:1504], axis=1).max()
    assert spike.norm_before == pytest.approx(np.median(np.linalg.norm(norms[1372:1500], axis=1)))
    assert (spike.clipped, spike.skipped, spike.limit) == (4, 0, 1)
    assert spike.factor == 1 / spike.norm_in
    assert spike.nonfinite == ()

    broken = only("NaN", found)
    assert (broken.first, broken.last, broken.steps, broken.skipped) == (3000, 3000, 1, 1)
    assert broken.nonfinite == tuple(NAMES[place] for place in BAD)
    assert [jump.name for jump in broken.jumps[:2]] == [NAMES[place] for place in BAD]
    assert math.isnan(broken.norm_in)

    drift = only("drift", found)
    assert drift.jumps[0].name == NAMES[DRIFTS]
    assert drift.first == pytest.approx(3600, abs=400)
    assert drift.last == pytest.approx(6000, abs=400)
    assert drift.rate == pytest.approx(0.001, rel=0.3)
    for event in found:
        assert len(event.jumps) == LARGEST


def test_a_record_without_tensors_has_the_events_of_its_norm(tmp_path: Path) -> None:
    found = events(write(tmp_path / "run.db", planted(STEPS), every=0))
    assert [(event.kind, event.first, event.last) for event in found] == [
        ("spike", 1500, 1503),
        ("NaN", 3000, 3000),
    ]
    assert {event.jumps for event in found} == {()}


def test_a_drift_of_the_norm_alone_is_found(tmp_path: Path) -> None:
    norms = quiet(4000, 6)
    norms[1000:] *= (1.001 ** np.arange(3000))[:, None]
    (drift,) = events(write(tmp_path / "run.db", norms, every=0))
    assert drift.kind == "drift"
    assert drift.first == pytest.approx(1000, abs=200)
    assert drift.rate == pytest.approx(0.001, rel=0.2)


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("noise", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("steps", [50, 400, 4000])
def test_a_quiet_run_has_no_events(tmp_path: Path, steps: int, noise: float, every: int) -> None:
    for seed in range(3):
        norms = quiet(steps, 40, seed, noise)
        path = write(tmp_path / f"{seed}.db", norms, every=every, limit=norms.max())
        assert events(path) == []


def test_an_explosion_too_small_for_the_global_norm_is_found(tmp_path: Path) -> None:
    norms = quiet(2000, 36)
    norms[:, 7] *= 0.1
    norms[1200, 7] *= 30
    (spike,) = events(write(tmp_path / "run.db", norms))
    assert (spike.kind, spike.first, spike.last) == ("spike", 1200, 1200)
    assert spike.jumps[0].name == NAMES[7]
    assert spike.norm_in < 3 * spike.norm_before


def test_an_explosion_that_stays_is_one_event_and_no_drift(tmp_path: Path) -> None:
    norms = quiet(6000, 36)
    norms[3000:, 7] *= 1000
    (spike,) = events(write(tmp_path / "run.db", norms, every=100))
    assert (spike.kind, spike.first) == ("spike", 3000)


def test_skipped_steps_and_neighbours(tmp_path: Path) -> None:
    norms = quiet(1000, 6)
    norms[[700, 705, 800], 2] = np.inf
    found = events(write(tmp_path / "run.db", norms, skipped=[300, 301, 310, 500]))
    assert [(each.kind, each.first, each.last, each.steps) for each in found] == [
        ("skip", 300, 310, 3),
        ("skip", 500, 500, 1),
        ("inf", 700, 705, 2),
        ("inf", 800, 800, 1),
    ]
    assert found[2].nonfinite == (names(6)[2],)


def test_a_run_that_is_nan_to_its_end_is_one_event(tmp_path: Path) -> None:
    norms = quiet(1000, 6)
    norms[600:] = np.nan
    (event,) = events(write(tmp_path / "run.db", norms))
    assert (event.kind, event.first, event.last, event.steps) == ("NaN", 600, 999, 400)
    assert event.nonfinite == tuple(names(6))


def test_tensors_that_come_and_go(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    write(path, quiet(500, 4), named=["a", "b", "c", "d"])
    later = quiet(500, 3)[::-1]  # the tensors' norms rise at its end
    write(path, later, named=["b", "e", "a"], first=500, run=2)
    later = quiet(200, 2)
    later[150, 1] *= 1e4
    write(path, later, named=["e", "f"], first=1000, run=3)
    spike = events(path)[-1]
    assert (spike.first, spike.jumps[0].name) == (1150, "f")
    assert {jump.name for jump in spike.jumps} == {"e", "f"}


# ---- whatever is in a record ----


def anything(path: Path, seed: int) -> Path:
    """A record of one to three runs, each of other tensors, some of whose norms are odd."""
    draw = np.random.default_rng(seed)
    first = 0
    for run in range(1, int(draw.integers(1, 4)) + 1):
        tensors, steps = int(draw.integers(1, 12)), int(draw.choice([1, 5, 40, 300, 2500]))
        norms = quiet(steps, tensors, seed)
        norms *= np.exp(np.linspace(0, draw.choice([0, 0, 10, -10]), steps))[:, None]
        norms[: steps // 2, 0] *= draw.choice([0, 1, 1])
        odd = draw.choice([0, np.nan, np.inf, 1e-310, 1e300])
        norms[draw.random(norms.shape) < draw.choice([0, 0.01, 0.6])] = odd
        write(
            path,
            norms,
            limit=draw.choice([None, 1e-3, 1, 100]),
            every=int(draw.choice([0, 1, 7, 100])),
            skipped=draw.integers(0, 5000, 20) if draw.random() < 0.3 else (),
            first=first,
            run=run,
            named=[f"t{place}" for place in draw.permutation(20)[:tensors]],
        )
        first = max(0, first + steps - int(draw.integers(0, steps + 1)))
    return path


@pytest.mark.slow
def test_no_record_is_too_odd(tmp_path: Path, lists: int) -> None:
    for seed in range(lists // 20):
        path = anything(tmp_path / f"{seed}.db", seed)
        shown = [("report", path, "--json"), ("watch", path, "--json"), ("watch", path, "--once")]
        for arguments in [*shown, *([("report", path)] if seed < 5 else [])]:
            status, _, err = run_main(*arguments)
            assert (status, err) == (0, ""), f"seed {seed}"


# ---- the page ----


class Tags(html.parser.HTMLParser):
    """Reads a page: its text, what it refers to, and whether each tag is closed."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.refers: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.refers += [value or "" for name, value in attrs if name in ("src", "href", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def page_of(path: Path, *options: object) -> str:
    status, _, err = run_main("report", path, "-o", path.with_name("page.html"), *options)
    assert (status, err) == (0, "")
    return path.with_name("page.html").read_text()


def test_the_page_names_each_fault_and_needs_no_network(tmp_path: Path) -> None:
    page = page_of(write(tmp_path / "run.db", planted(STEPS), every=10))
    read = Tags(page)
    assert read.open == []
    assert read.refers == []
    assert not re.search(r"@import|url\(\s*[\"']?http", page[: page.index("<script>")])
    text = " ".join(read.text.split())
    assert f"spike steps 1,500\u20131,503 {NAMES[EXPLODES]} jumped from" in text
    assert f"NaN step 3,000 NaN in {NAMES[BAD[0]]} and {NAMES[BAD[1]]}" in text
    assert re.search(rf"drift steps [\d,\u2013]+ {re.escape(NAMES[DRIFTS])} grew from", text)
    assert "prefers-color-scheme: dark" in page
    assert len(page) < 2e6


def test_names_are_text_not_tags(tmp_path: Path) -> None:
    norms = quiet(300, 2)
    norms[200, 0] = np.nan
    named = ["<script>alert(1)</script>&\u202e", "b"]
    page = page_of(write(tmp_path / "run.db", norms, named=named))
    assert "<script>alert" not in page
    assert "<script>alert(1)</script>&\\u202e" in Tags(page).text


def test_the_page_shows_the_heaviest_of_many_events(tmp_path: Path) -> None:
    norms = quiet(8000, 4)
    norms[200::100, 1] *= 100
    norms[7950] = np.nan
    page = page_of(write(tmp_path / "run.db", norms))
    assert f"The {MOST_EVENTS} that matter most are shown." in page
    assert page.count("<details") == MOST_EVENTS
    assert "step 7,950" in page


@pytest.mark.parametrize("steps", [1, 2, 17])
def test_short_runs(tmp_path: Path, steps: int) -> None:
    Tags(page_of(write(tmp_path / "run.db", quiet(steps, 3))))


def test_runs_without_a_finite_norm_or_a_limit(tmp_path: Path) -> None:
    Tags(page_of(write(tmp_path / "nan.db", np.full((50, 3), np.nan), limit=None)))
    Tags(page_of(write(tmp_path / "zero.db", np.zeros((50, 3)), limit=None)))
    Tags(page_of(write(tmp_path / "none.db", quiet(50, 3), limit=None, every=0)))


def test_what_no_step_tells_is_left_open(tmp_path: Path) -> None:
    path = write(tmp_path / "nan.db", np.full((1, 1), np.nan), limit=None)
    page = page_of(path)
    assert page.count("<dd>\u2013</dd>") == 2  # median and largest
    assert "1 tensor, written in 1 step." in page
    _, out, _ = run_main("report", path, "--json")
    assert (json.loads(out)["median"], json.loads(out)["largest"]) == (None, None)
    assert run_main("report", path)[1].splitlines()[-2].startswith("1 step, 0 % clipped")


def test_the_axis_of_a_short_run_has_whole_steps(tmp_path: Path) -> None:
    page = page_of(write(tmp_path / "run.db", quiet(3, 2)))
    assert page.count('"min_interval":1') >= 4


def test_a_real_record(tmp_path: Path) -> None:
    with gradclip.Record(tmp_path / "run.db", per_tensor_every=1) as record:
        for step in range(60):
            norms = gradclip.norms({"a": np.full(4, 1e6 if step == 50 else 1.0), "b": np.ones(9)})
            record(step, norms, limit=2.0)
    found = json.loads(run_main("report", tmp_path / "run.db", "--json")[1])
    (event,) = found["events"]
    assert (event["kind"], event["first"], event["tensors"][0]["name"]) == ("spike", 50, "a")
    assert event["tensors"][0] == {"name": "a", "before": 2.0, "in": 2e6, "ratio": 1e6}


# ---- the heat map ----


def test_the_heat_map_has_the_largest_of_each_cell(tmp_path: Path) -> None:
    norms = quiet(3000, 5)
    norms[1234, 2], norms[777, 3], norms[778, 3] = np.nan, np.inf, 1e300
    with History.open(write(tmp_path / "run.db", norms)) as history:
        heat = Heat(history.tensor_steps, history.names)
        find(history, heat.add)
    named, image = heat.image()
    assert named == names(5)
    assert image.shape == (5, 600)
    cells = norms.reshape(600, 5, 5).max(1).T
    assert image[2, 1234 // 5] == NAN
    assert image[3, 777 // 5] == np.inf
    finite = np.isfinite(cells)
    assert finite.sum() == cells.size - 2
    np.testing.assert_array_equal(image[finite], cells[finite].astype(np.float32))


def test_of_many_tensors_the_heat_map_keeps_those_that_moved(tmp_path: Path) -> None:
    norms = np.ones((120, MOST_TENSORS + 500))
    norms[60, -7] = 30
    with History.open(write(tmp_path / "run.db", norms)) as history:
        heat = Heat(history.tensor_steps, history.names)
        find(history, heat.add)
    named, image = heat.image()
    assert len(named) == len(image) == MOST_TENSORS
    assert names(MOST_TENSORS + 500)[-7] in named


# ---- JSON, terminal, errors ----


def test_json(tmp_path: Path) -> None:
    path = write(tmp_path / "run.db", planted(STEPS), every=10, limit=4.0)
    status, out, err = run_main("report", path, "--json")
    assert (status, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    shown = found.pop("events")
    with History.open(path) as history:
        clipped = int(((history.factor < 1) & ~history.skipped).sum())
        assert found == {
            "version": 1,
            "name": "run.db",
            "first": 0,
            "last": STEPS - 1,
            "steps": STEPS,
            "begun": 1.7e9,
            "ended": 1.7e9 + 0.25 * (STEPS - 1),
            "tensors": 36,
            "tensor_steps": len(history.tensor_steps),
            "median": float(np.nanmedian(history.norm)),
            "largest": float(np.nanmax(history.norm)),
            "clipped": clipped,
            "share_clipped": clipped / STEPS,
            "skipped": 1,
            "nonfinite": 1,
        }
    spike, broken, drift = shown
    assert [event["kind"] for event in shown] == ["spike", "NaN", "drift"]
    assert (spike["rate"], broken["norm_in"], broken["limit"]) == (None, "nan", 4.0)
    assert broken["nonfinite"] == [NAMES[place] for place in BAD]
    assert broken["tensors"][0]["in"] == "nan"
    assert broken["tensors"][0]["ratio"] is None
    assert drift["rate"] > 0
    assert list(tmp_path.glob("*.html")) == []


def test_the_page_is_beside_the_record_unless_named(tmp_path: Path) -> None:
    path = write(tmp_path / "run.db", planted(2000), every=10)
    status, out, err = run_main("report", path)
    assert (status, err) == (0, "")
    assert (tmp_path / "run.html").exists()
    assert f"spike  steps 500\u2013503  {NAMES[EXPLODES]} jumped from" in out
    assert "2,000 steps, over 99.9 % clipped, 1 skipped, 2 events\n" in out
    assert [each.name for each in tmp_path.iterdir() if "html" in each.name] == ["run.html"]


def test_what_is_no_record(tmp_path: Path) -> None:
    text, empty = tmp_path / "a.db", tmp_path / "b.db"
    text.write_text("no record, but longer than the header of a file of SQLite " * 9)
    empty.touch()
    write(tmp_path / "c.db", np.ones((0, 3)))
    for path, words in (
        (tmp_path / "none.db", f"there is no record {tmp_path / 'none.db'}"),
        (tmp_path, f"{tmp_path} is a folder; a record is one file"),
        (text, f"{text} is no record of gradclip: file is not a database"),
        (empty, f"{empty} is no record of gradclip: it is empty"),
        (tmp_path / "c.db", f"{tmp_path / 'c.db'} has no steps yet; nothing was recorded"),
    ):
        output = tmp_path / "page.html"
        assert run_main("report", path, "-o", output) == (2, "", f"gradclip: {words}\n")
        assert not output.exists()


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    path = write(tmp_path / "run.html", quiet(50, 3))
    before = path.read_bytes()
    for output, words in (
        (path, f"{path} is the record itself; name another file with -o"),
        (tmp_path, f"{tmp_path} is a folder; name a file with -o"),
        (tmp_path / "no/a", f"{tmp_path / 'no/a'} is in a folder that is not there; name a file"),
    ):
        status, out, err = run_main("report", path, "-o", output)
        assert (status, out) == (2, "")
        assert err.startswith(f"gradclip: {words}")
    assert run_main("report", path)[0] == 2  # its page would have its name
    assert path.read_bytes() == before
    assert run_main("report", ".") == (2, "", "gradclip: . is a folder; a record is one file\n")


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "run.db", quiet(50, 3))
    with closing(sqlite3.connect(path)) as file:
        file.execute("PRAGMA user_version = 999")
    status, _, err = run_main("report", path)
    assert status == 2
    assert "999" in err


@pytest.mark.slow
def test_on_a_terminal_it_is_the_same_and_shows_how_far_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "run.db", quiet(3000, 40))
    status, out = run_on_terminal("report", path, columns=120)
    assert status == 0
    assert "3,000 steps" in out


@pytest.mark.slow
def test_without_bokeh_json_works_and_a_page_says_what_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "run.db", planted(2000), every=10)
    code = (
        "import sys\n"
        "for name in ('bokeh', 'rich'): sys.modules[name] = None\n"
        "from gradclip.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = cli_files.run([sys.executable, "-c", code, "report", path])
    message = "gradclip: bokeh is not installed: pip install bokeh (all: gradclip[cli])\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    done = cli_files.run([sys.executable, "-c", code, "report", path, "--json"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run_process("report", path, "--json").stdout


# ---- in a browser ----

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [390, 1300])
def test_the_page_opens_in_a_browser_without_a_word(tmp_path: Path, width: int) -> None:
    page_of(write(tmp_path / "run.db", planted(2000), every=10))
    # The page says itself what its plots came to, where the browser's dump shows it.
    probe = """<script>setTimeout(() => { document.title = JSON.stringify({
      plots: Bokeh.documents[0].roots().length, idle: Bokeh.documents[0].is_idle,
      wide: document.documentElement.scrollWidth, window: innerWidth }); }, 1500);</script>"""
    probed = tmp_path / "probed.html"
    probed.write_text((tmp_path / "page.html").read_text().replace("</body>", f"{probe}</body>"))
    done = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
            "--virtual-time-budget=4000", probed.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert [line for line in said if "[bokeh " not in line] == []
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title is not None
    found = json.loads(title[1])
    assert (found["plots"], found["idle"]) == (4, True)
    assert found["wide"] <= found["window"]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_pointer_finger_buttons_and_the_dark(tmp_path: Path) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    norms = planted(2000)
    named = [*NAMES[:EXPLODES], "x" * 200, *NAMES[EXPLODES + 1 :]]
    page_of(write(tmp_path / "run.db", norms, named=named))
    errors: list[Any] = []
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1300, "height": 900}, has_touch=True)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(error))  # noqa: PLW0108
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_function("Bokeh.documents.length && Bokeh.documents[0].is_idle")
        first = "Bokeh.documents[0].roots()[0]"

        heat = page.locator("figure").last
        heat.scroll_into_view_if_needed()
        box = heat.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 700, box["y"] + 100)
        page.wait_for_function(f"({TOOLTIP})().includes('tensor')")
        shown = page.evaluate(f"({TOOLTIP})()")
        found = re.search(r"tensor: (\S+) step: ([\d,]+) \u2013 ([\d,]+) norm: (\S+)", shown)
        assert found, shown
        row = named.index(found[1])
        start, stop = (int(found[place].replace(",", "")) for place in (2, 3))
        assert float(found[4]) == pytest.approx(norms[start : stop + 1, row].max(), rel=0.01)

        page.touchscreen.tap(box["x"] + 700, box["y"] + 100)
        page.wait_for_function("document.getElementById('told').textContent")
        told = f"{found[1]}, step {found[2]} \u2013 {found[3]}: {found[4]}"
        assert page.locator("#told").inner_text() == told

        page.locator("button[data-first='500']").click()
        assert page.evaluate(f"[{first}.x_range.start, {first}.x_range.end]") == [436, 567]
        for scheme, color in (("light", "#5c6775"), ("dark", "#9aa5b3")):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function(f"{first}.left[0].major_label_text_color === '{color}'")
        page.set_viewport_size({"width": 390, "height": 844})
        page.wait_for_function(f"{first}.min_border_left < 100")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        browser.close()
    assert errors == []


# The text of what Bokeh shows beside the pointer, which lies in a tree of its own.
TOOLTIP = """() => {
  const within = (root) => [...root.querySelectorAll("*")].map((each) => each.shadowRoot
    ? (each.classList.contains("bk-Tooltip") ? each.shadowRoot.textContent : "")
      + within(each.shadowRoot) : "").join("");
  return within(document);
}"""
