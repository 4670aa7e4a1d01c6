"""A plan as the YAML that starts it: what differs from the defaults, and nothing else."""

from __future__ import annotations

from typing import Any

import yaml

from pipeline.config.run import RunConfig
from pipeline.config.yaml_file import config_dict, defaults

WIDTH = 110


def _changed(values: dict[str, Any], known: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = prefix + name
        if isinstance(value, dict):
            inner = _changed(value, known, f"{key}.")
            if inner:
                found[name] = inner
        elif key not in known or known[key] != value:
            found[name] = value
    return found


def run_yaml(config: RunConfig) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one; a section a line."""
    lines = []
    for name, value in _changed(config_dict(config), defaults()).items():
        lines.append(yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=1 << 16).rstrip())
        if isinstance(value, dict):
            flow = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=WIDTH, default_flow_style=True)
            lines[-1] = f"{name}: " + flow.rstrip().replace("\n", "\n  ")
    return "\n".join(lines) + "\n"
