"""Trackers against stand-ins of their libraries, which note each call; Prometheus' text against its grammar."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from parallel.errors import ConfigError
from pipeline.config.run import REPORT_TO
from pipeline.config.yaml_file import load_config
from pipeline.reporting.metrics import FIELDS, MetricsWriter
from pipeline.reporting.trackers import LIBRARIES, TRACKERS, Trackers, check_installed, identity

CONFIG = {"model": {"path": "m", "context": 64}, "output": "o"}
ROW = dict.fromkeys(FIELDS, 0.5) | {"step": 3, "skipped": 0}
SAMPLE = re.compile(r'[a-zA-Z_:][a-zA-Z0-9_:]*\{run="[^"\n]*"\} (NaN|[+-]Inf|-?\d+(\.\d+)?(e[+-]?\d+)?)')
"""Of https://prometheus.io/docs/instrumenting/exposition_formats."""


class Recorder(ModuleType):
    """A library whose every function notes its call."""

    def __init__(self, name: str, calls: list[tuple[str, Any, dict[str, Any]]], **results: Any) -> None:
        super().__init__(name)
        self._calls, self._results = calls, results
        self.__spec__ = SimpleNamespace()  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def note(*words: Any, **named: Any) -> Any:
            self._calls.append((name, words, named))
            result = self._results.get(name)
            if isinstance(result, Exception):
                raise result
            return result

        return note


Calls = list[tuple[str, Any, dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    noted: Calls = []
    run = Recorder("run", noted)
    for name, results in (("wandb", {"init": run}), ("trackio", {}), ("mlflow", {"search_runs": []})):
        monkeypatch.setitem(sys.modules, name, Recorder(name, noted, **results))
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(variable, raising=False)
    return noted


def write(folder: Path, *names: str) -> list[str]:
    """A step and an evaluation through the writer of metrics; what was warned of."""
    told: list[str] = []
    trackers = Trackers(names, folder, CONFIG, told.append)
    with MetricsWriter(folder, 0, told.append, trackers) as metrics:
        metrics.write(ROW)
        metrics.write_evaluation(3, {"perplexity/64": 7.5})
    return told


def test_the_names_are_those_of_the_setting() -> None:
    assert tuple(TRACKERS) == REPORT_TO and set(LIBRARIES) <= set(REPORT_TO)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio(name: str, calls: Calls, tmp_path: Path) -> None:
    assert write(tmp_path / "run", name) == []
    (init, _, opened), (log, (figures,), at), (again, (perplexity,), then), (finish, _, _) = calls
    assert (init, log, again, finish) == ("init", "log", "log", "finish")
    assert opened["project"] == "longspan" and opened["resume"] == "allow" and opened["config"] == CONFIG
    # A resumed process goes on in the same chart.
    assert identity(tmp_path / "run") in (opened.get("id", ""), opened["name"].removeprefix("run-"))
    assert figures["train/loss"] == 0.5 and "train/step" not in figures and at == then == {"step": 3}
    assert perplexity == {"perplexity/64": 7.5}


def test_mlflow_goes_on_in_the_run_of_this_output(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert write(tmp_path / "run", "mlflow") == []
    assert [name for name, _, _ in calls] == [
        *("set_experiment", "search_runs", "start_run", "log_params"),
        *("log_metrics", "log_metrics", "end_run"),
    ]
    tag = identity(tmp_path / "run")
    assert calls[1] == (
        "search_runs",
        (),
        {"filter_string": f"tags.`longspan.run` = '{tag}'", "max_results": 1, "output_format": "list"},
    )
    assert calls[2][2] == {"run_name": "run", "tags": {"longspan.run": identity(tmp_path / "run")}}
    assert calls[3][1] == ({"model.path": "m", "model.context": "64", "output": "o"},)
    calls.clear()
    found = [SimpleNamespace(info=SimpleNamespace(run_id="r1"))]
    monkeypatch.setitem(sys.modules, "mlflow", Recorder("mlflow", calls, search_runs=found))
    write(tmp_path / "run", "mlflow")
    assert ("start_run", (), {"run_id": "r1"}) in calls and "log_params" not in [name for name, _, _ in calls]


def test_a_service_that_fails_is_told_once_and_others_go_on(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Recorder("trackio", calls, log=ConnectionError("no route\nand more"))
    monkeypatch.setitem(sys.modules, "trackio", broken)
    told = write(tmp_path / "run", "trackio", "wandb")
    assert told == ["report_to: trackio failed (no route); training goes on without it."]
    assert [name for name, _, _ in calls].count("log") == 3, "one of trackio, two of wandb"
    assert (tmp_path / "run/metrics.jsonl").read_text().count("\n") == 1


def test_prometheus(tmp_path: Path) -> None:
    told: list[str] = []
    trackers = Trackers(["prometheus"], tmp_path / 'a "run"', CONFIG, told.append)
    trackers.log({"train/loss": float("nan"), "train/lr": 1e-5, "name": "text"}, 1)
    trackers.log({"perplexity/64": float("inf")}, 2)
    lines = (tmp_path / 'a "run"' / "metrics.prom").read_text().splitlines()
    samples = [line.replace(r"\"", "") for line in lines if not line.startswith("#")]
    assert all(SAMPLE.fullmatch(line) for line in samples) and told == []
    assert [line.split("{")[0] for line in samples] == [
        *("longspan_train_loss", "longspan_train_lr", "longspan_step", "longspan_perplexity_64")
    ]
    assert [line.split()[-1] for line in samples] == ["NaN", "1e-05", "2.0", "+Inf"]
    assert [line for line in lines if line.startswith("# TYPE")] == [
        f"# TYPE {line.split('{')[0]} gauge" for line in samples
    ]


def test_what_is_not_there_is_told_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^report_to: wandb is not installed; pip install wandb, or leave it out\.$"):
        check_installed(["prometheus", "wandb"])
    check_installed(["prometheus"])
    (tmp_path / "run.yaml").write_text(
        "model: {path: m, context: 64}\ndata: {path: d}\ntrain: {steps: 1, global_batch: 1}\noutput: o\n"
        "report_to: [w]\n"
    )
    with pytest.raises(ConfigError, match="report_to: 'w' is not one of wandb, mlflow, trackio, prometheus"):
        load_config(tmp_path / "run.yaml")
