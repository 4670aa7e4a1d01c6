"""The metrics of a run in W&B, MLflow, trackio and Prometheus, each by the library's own calls; rank 0 only.

What a service or its library does wrong never ends a run: it is told once, and that tracker gets no more.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from parallel.errors import ConfigError
from pipeline.reporting.lasting import Warn

PROJECT = "longspan"
"""Of W&B and trackio, and MLflow's experiment, unless the library's own variable (WANDB_PROJECT, ...) names another."""
PROMETHEUS_FILE = "metrics.prom"
Values = Mapping[str, float]


class Tracker(Protocol):
    """What takes a run's figures."""

    def log(self, values: Values, step: int) -> None:
        """Take figures of an optimizer step; names as in TensorBoard (`train/loss`)."""
        ...

    def close(self) -> None:
        """The process leaves."""
        ...


def identity(output: Path) -> str:
    """The same for every process of a run: a resume goes on in the same chart."""
    return hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:12]


class Wandb:
    """`wandb`, as its own environment variables say (WANDB_MODE=offline, WANDB_PROJECT, ...)."""

    def __init__(self, output: Path, config: Mapping[str, Any]) -> None:
        output.mkdir(parents=True, exist_ok=True)
        wandb: Any = importlib.import_module("wandb")
        own = {} if "WANDB_PROJECT" in os.environ else {"project": PROJECT}
        self._run = wandb.init(
            **own, name=output.name, id=identity(output), resume="allow", dir=str(output), config=dict(config)
        )

    def log(self, values: Values, step: int) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class Trackio:
    """`trackio`, whose calls are wandb's."""

    def __init__(self, output: Path, config: Mapping[str, Any]) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        name = f"{output.name}-{identity(output)}"
        self._trackio.init(project=PROJECT, name=name, resume="allow", config=dict(config))

    def log(self, values: Values, step: int) -> None:
        """See `Tracker`."""
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._trackio.finish()


class Mlflow:
    """`mlflow`, as its own environment variables say (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME)."""

    def __init__(self, output: Path, config: Mapping[str, Any]) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            self._mlflow.set_experiment(PROJECT)
        tag = {"longspan.run": identity(output)}
        found = self._mlflow.search_runs(
            filter_string=f"tags.`longspan.run` = '{identity(output)}'", output_format="list", max_results=1
        )
        if found:
            self._mlflow.start_run(run_id=found[0].info.run_id)
        else:
            self._mlflow.start_run(run_name=output.name, tags=tag)
            # Once: a parameter cannot change, and a resumed run's learning rate may.
            self._mlflow.log_params({name: str(value)[:500] for name, value in _flat(config)})

    def log(self, values: Values, step: int) -> None:
        """See `Tracker`."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._mlflow.end_run()


class Prometheus:
    """`<output>/metrics.prom`, the newest figures as text, which node_exporter's textfile collector serves.

    Source: https://prometheus.io/docs/instrumenting/exposition_formats, text format 0.0.4.
    """

    def __init__(self, output: Path, config: Mapping[str, Any]) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self._path = output / PROMETHEUS_FILE
        run = str(output).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        self._label = f'{{run="{run}"}}'
        self._newest: dict[str, float] = {}

    def log(self, values: Values, step: int) -> None:
        """See `Tracker`."""
        # Of one step alone, and only there where it happened.
        self._newest.pop("train/rerun", None)
        self._newest |= {**values, "step": step}
        lines = []
        for name, value in self._newest.items():
            metric = "longspan_" + "".join(letter if letter.isalnum() else "_" for letter in name)
            lines += [f"# TYPE {metric} gauge", f"{metric}{self._label} {_prometheus_number(value)}"]
        # Whole at every moment, for the collector; not on the disk at once, for nobody resumes from it.
        temporary = self._path.with_name(f".{PROMETHEUS_FILE}.tmp")
        temporary.write_text("\n".join(lines) + "\n")
        temporary.replace(self._path)

    def close(self) -> None:
        """See `Tracker`; the file stays."""


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
    "prometheus": Prometheus,
}
LIBRARIES = {"wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
"""What each imports."""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in tree.items():
        pairs += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return pairs


def _prometheus_number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(float(value)) if math.isfinite(value) else ("+Inf" if value > 0 else "-Inf")


def check_installed(names: Sequence[str]) -> None:
    """Refuse a tracker whose library is not there, before GPU time is spent.

    Raises:
        ConfigError: it is not.
    """
    for name in names:
        library = LIBRARIES.get(name)
        if library is not None and importlib.util.find_spec(library) is None:
            raise ConfigError(f"report_to: {name} is not installed; pip install {library}, or leave it out.")


class Trackers:
    """All of a run's trackers.

    Args:
        names: of TRACKERS.
        output: the run's folder.
        config: the resolved settings, plain.
        warn: shows a sentence.
    """

    def __init__(self, names: Sequence[str], output: Path, config: Mapping[str, Any], warn: Warn) -> None:
        self._warn, self._open = warn, dict[str, Tracker]()
        for name in names:
            try:
                self._open[name] = TRACKERS[name](output, config)
            except Exception as error:  # another program's: whatever it raises, training goes on
                self._lost(name, error)

    def _lost(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        self._warn(f"report_to: {name} failed ({why}); training goes on without it.")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Give the numbers among `values` to each."""
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        self._each(lambda tracker: tracker.log(numbers, step))

    def close(self) -> None:
        """Close each; safe to call twice."""
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in [*self._open.items()]:
            try:
                act(tracker)
            except Exception as error:  # as above
                self._lost(name, error)
