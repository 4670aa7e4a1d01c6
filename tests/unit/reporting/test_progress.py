"""Conversions by bytes: a log has a line a minute at most, and short ones have none."""

from __future__ import annotations

import io

from rich.console import Console

from pipeline.reporting.progress import ByteProgress


def test_a_log_has_a_line_a_minute_at_most() -> None:
    out, now = io.StringIO(), [0.0]
    progress = ByteProgress(2**31, "import", console=Console(file=out, width=100), clock=lambda: now[0])
    with progress:
        for file in range(6):  # one every 25 seconds
            now[0] += 25
            progress.advance(2**28)
            progress.say(f"model-{file}.safetensors written")
    lines = [
        "import: model-2.safetensors written (0.75 of 2.00 GiB)",
        "import: model-5.safetensors written (1.50 of 2.00 GiB)",
    ]
    assert out.getvalue().splitlines() == lines


def test_what_an_interrupted_run_left_is_told_at_once() -> None:
    out = io.StringIO()
    with ByteProgress(2**30, "import", console=Console(file=out, width=100)) as progress:
        progress.advance(2**29, "model-1.safetensors kept")
        progress.say("model-2.safetensors written")
    assert out.getvalue() == "import: model-1.safetensors kept (0.50 of 1.00 GiB)\n"


def test_a_terminal_has_a_bar() -> None:
    out = io.StringIO()
    with ByteProgress(2**30, "import", console=Console(file=out, width=100, force_terminal=True)) as progress:
        progress.advance(2**29)
        progress.say("model-1.safetensors written")
    assert "import" in out.getvalue() and "written" not in out.getvalue()
