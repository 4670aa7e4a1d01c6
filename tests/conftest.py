"""Shared test set-up: one thread a process, deterministic Hypothesis, and gpu tests that say when they did not run."""

from __future__ import annotations

import os
import signal

# A shell's background job inherits that Ctrl-C is ignored, and so would every command that a test interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before torch is imported: two xdist workers share two cores, and gloo children inherit this.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# A test that wants the network is a bug; fail it at once instead of after retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import functools  # noqa: E402
import gc  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

NO_CUDA = "needs a CUDA device"
NO_BROWSER = "needs Chromium on PATH"
LONGEST = (
    "test_run_oracle",
    "test_faults",
    "test_preemption",
    "test_launchers",
    "test_kill_savers",
    "test_doctor",
    "test_checkpoint_faults",
    "test_survive",
    "test_resume_layouts",
    "test_spikes",
    "test_model_on_kernels",
    "test_streaming",
)
"""Files of tests that take half a minute or more, the longest first (pytest --durations)."""

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _own_groups() -> Iterator[None]:
    """Process groups end with the test that made them: megatron's are global, and refuse to be made twice."""
    yield
    groups = sys.modules.get("parallel.world.groups")  # not imported for tests that need no torch
    if groups is not None:
        groups.destroy_groups()


@pytest.fixture
def forked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of Python that the test starts are forks of a process that has imported everything, unless `started`."""
    from tests.support.commands import ForkedPopen

    if request.node.get_closest_marker("started") is None:
        monkeypatch.setattr(subprocess, "Popen", ForkedPopen)


@functools.cache
def cuda_present() -> bool:
    """Whether torch sees a CUDA device (torch is imported only if a gpu test was collected)."""
    import torch

    return torch.cuda.is_available()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m crowd` asks for tests of a few files; to import the other two hundred takes longer than some of them."""
    if config.option.markexpr == "crowd" and collection_path.suffix == ".py" and collection_path.name != "__init__.py":
        return True if "crowd" not in collection_path.read_text() else None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip gpu tests, with a reason, where there is no CUDA device; files that take minutes come first.

    Workers take whole files in order: one of minutes must not be left for last.
    """
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not cuda_present():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=NO_CUDA))


def pytest_collection_finish() -> None:
    """What was imported stays: the collector of garbage need not walk over it again and again."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests did not run, and for want of what, so that a green run is not mistaken for more."""
    reasons = [str(getattr(report, "longrepr", "")) for report in terminalreporter.stats.get("skipped", [])]
    for reason, told in ((NO_CUDA, "gpu tests skipped (no CUDA device)"), (NO_BROWSER, "skipped without Chromium")):
        if skipped := sum(reason in one for one in reasons):
            terminalreporter.write_line(f"{told}: {skipped}")
