"""A page in headless Chromium: what it complains of, whether its pictures are there, what it looks like."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest

from tests.conftest import NO_BROWSER

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

_PROBE = """<script>
addEventListener("load", () => {
  const all = [...document.images];
  document.documentElement.dataset.probe = JSON.stringify({
    pictures: all.map(image => image.complete ? image.naturalWidth : 0),
    svgs: [...document.querySelectorAll("svg")].map(svg => Math.round(svg.getBoundingClientRect().width)),
    fetched: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !/^data:/.test(name)),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    words: document.body.innerText.split(/\\s+/).length,
  });
});
</script>"""
_COMPLAINT = re.compile(r":CONSOLE[^\]]*\] (.*)")


@dataclass(frozen=True)
class Seen:
    """What a browser saw of a page."""

    complaints: list[str]
    """Lines of its console."""
    pictures: list[int]
    """Pixels each <img> is wide; 0: it is not there, or is none."""
    svgs: list[int]
    """Pixels each <svg> takes."""
    fetched: list[str]
    """Addresses outside the page that it asked for."""
    overflow: int
    """Pixels by which the page is wider than the window."""
    words: int
    """That are shown."""


def chromium() -> str:
    """The browser's program; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), "")
    if not found:
        pytest.skip(NO_BROWSER)
    return found


def look(page: Path, width: int = 1100, screenshot: Path | None = None) -> Seen:
    """Open a page, in a window of so many pixels, without any network.

    Args:
        screenshot: a PNG of it is written there.
    """
    program = chromium()
    with tempfile.TemporaryDirectory(prefix="longspan-browser-") as folder:
        copy = page.with_name(f".{page.name}.probed.html")
        copy.write_text(page.read_text(encoding="utf-8").replace("<head>", f"<head>{_PROBE}", 1), encoding="utf-8")
        words = [
            program,
            "--headless",
            "--no-sandbox",  # root has none
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder}",
            f"--window-size={width},900",
            "--virtual-time-budget=5000",
        ]
        try:
            asked = [*words, "--dump-dom", copy.resolve().as_uri()]
            done = subprocess.run(asked, capture_output=True, text=True, timeout=90)
            if screenshot is not None:
                asked = [*words, f"--screenshot={screenshot}", page.resolve().as_uri()]
                subprocess.run(asked, capture_output=True, timeout=90, check=True)
        finally:
            copy.unlink()
    told = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert told is not None, f"the browser showed no page: {done.stderr[-2000:]}"
    return Seen(_COMPLAINT.findall(done.stderr), **json.loads(unescape(told[1])))
