"""The report as a reader's browser shows it: no complaint, every picture there, nothing fetched, nothing cut off."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from tests.support.browser import look
from tests.unit.tools.test_report import make_run
from tests.unit.tools.test_report_compare import other_run
from tools.report import write_report


def test_a_browser_shows_the_whole_report(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), other_run(tmp_path / "two")
    page = write_report(one, tmp_path / "out", [two])
    # A file alone: what lies beside it is not needed.
    alone = tmp_path / "alone" / page.name
    alone.parent.mkdir()
    page.rename(alone)
    seen = look(alone)
    assert seen.complaints == [] and seen.fetched == []
    assert len(seen.pictures) == 6 and min(seen.pictures) > 500
    assert seen.overflow <= 0 and look(alone, width=500).overflow <= 0, "wide tables scroll by themselves"
    assert seen.words > 200


@pytest.mark.parametrize(
    ("planted", "seen"),
    [
        ('<script>console.error("planted")</script>', "complaints"),
        ("<script>nowhere()</script>", "complaints"),
        ('<img src="data:image/png;base64,AAAA">', "pictures"),
        ('<img src="https://example.org/x.png">', "fetched"),
        ('<div style="width: 3000px">wide</div>', "overflow"),
    ],
)
def test_what_is_wrong_with_a_page_is_seen(planted: str, seen: str, tmp_path: Path) -> None:
    dot = base64.b64encode(
        base64.b64decode(
            "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
        )
    ).decode()
    page = tmp_path / "page.html"
    page.write_text(f'<html><head></head><body>{planted}<img src="data:image/png;base64,{dot}"></body></html>')
    found = look(page)
    wrong = {
        "complaints": bool(found.complaints),
        "pictures": 0 in found.pictures,
        "fetched": bool(found.fetched),
        "overflow": found.overflow > 0,
    }
    assert wrong[seen] and found.pictures[-1] == 1
