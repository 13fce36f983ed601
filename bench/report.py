"""How long ``gradclip report`` takes for a long run, how large its page is, when a browser has it.

python bench/report.py [STEPS [TENSORS]]    100,000 and 500, which take 0.4 GB for a while

The browser is Chromium, if there is one: until the page says that all plots are drawn.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import gradclip
from gradclip.core.norms import Norms

TURNS = 3
BARS = {"report": "10 s", "page": "5 MB", "browser": "2 s"}
# Milliseconds since the page began to load, told in its title.
PROBE = """<script>(function told() {
  const drawn = window.Bokeh && Bokeh.documents.length && Bokeh.documents[0].is_idle;
  if (!drawn) return setTimeout(told, 5);
  document.title = "drawn after " + performance.now() + " ms";
})();</script></body>"""


def record(path: Path, steps: int, tensors: int) -> None:
    """Record a run whose norms are noise, but for a spike, a NaN and a tensor that grows."""
    draw = np.random.default_rng(0)
    names = tuple(f"h.{place // 4}.{place % 4}.weight" for place in range(tensors))
    scale = np.exp(draw.normal(-1, 1, tensors))
    with gradclip.Record(path, per_tensor_every=1) as run:
        for step in range(steps):
            values = scale * np.exp(draw.normal(0, 0.25, tensors))
            values[3] *= 1.0001 ** max(0, step - steps // 2)
            if step == steps // 4:
                values[5] *= 1e4
            if step == steps // 3:
                values[7] = np.nan
            run(step, Norms(values, np.linalg.norm(values), names), limit=30.0)
            if step % 1000 == 0:
                run.flush()


def opened(page: Path, browser: str) -> float:
    """Seconds until a browser has drawn the page."""
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("</body>", PROBE))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--timeout=10000"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run(
        [browser, *options, profile, probed.as_uri()], capture_output=True, text=True, check=True
    )
    found = re.search(r"<title>drawn after ([\d.]+) ms</title>", done.stdout)
    if not found:
        raise RuntimeError("the browser ended before the plots were drawn")
    return float(found[1]) / 1000


def main() -> None:
    steps, tensors = (int(text) for text in (sys.argv[1:] + ["100000", "500"][len(sys.argv) - 1 :]))
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder:
        path, page = Path(folder, "run.db"), Path(folder, "page.html")
        record(path, steps, tensors)
        print(f"{steps:,} steps x {tensors:,} tensors, record {path.stat().st_size / 1e6:.0f} MB")
        took = []
        for _ in range(TURNS):
            begun = time.perf_counter()
            command = [sys.executable, "-m", "gradclip", "report", path, "-o", page]
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
            took.append(time.perf_counter() - begun)
        print(f"report   {sorted(took)[TURNS // 2]:.2f} s, bar {BARS['report']}")
        print(f"page     {page.stat().st_size / 1e6:.2f} MB, bar {BARS['page']}")
        if browser is not None:
            seconds = sorted(opened(page, browser) for _ in range(TURNS))[TURNS // 2]
            print(f"browser  {seconds:.2f} s, bar {BARS['browser']}")


if __name__ == "__main__":
    main()
