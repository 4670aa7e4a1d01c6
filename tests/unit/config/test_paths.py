"""Paths as users write them, in YAML, in --set and as arguments of every command."""

from __future__ import annotations

import argparse
import typing
from pathlib import Path

import pytest
import yaml

from parallel.errors import ConfigError
from pipeline.config.paths import EXPANDED, expand, user_path
from pipeline.config.run import RunConfig
from pipeline.config.yaml_file import config_dict, dump_config, load_config

PATHS = ("model.path", "data.path", "data.tokenizer", "data.cache", "eval.path", "output")


def path_settings(kind: type, prefix: str = "") -> list[str]:
    """Dotted names of the settings of type PathText."""
    found = []
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if hasattr(hint, "__dataclass_fields__"):
            found += path_settings(hint, f"{prefix}{name}.")
        elif any(EXPANDED in typing.get_args(each) for each in (hint, *typing.get_args(hint))):
            found.append(prefix + name)
    return found


def test_every_path_of_the_yaml_is_expanded_and_recorded_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/job 7")
    assert set(path_settings(RunConfig)) >= set(PATHS)
    tree: dict[str, typing.Any] = {"model": {"context": 64}, "data": {}, "eval": {}, "train": {"steps": 1}}
    for name in PATHS:
        *section, last = name.split(".")
        (tree[section[0]] if section else tree)[last] = f"~/a/${{SCRATCH}}/{name}"
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    for config in (load_config(path), load_config(path, [f"{name}=~/a/$SCRATCH/{name}" for name in PATHS])):
        recorded = yaml.safe_load(dump_config(config))
        assert recorded == config_dict(config)
        for name in PATHS:
            *section, last = name.split(".")
            assert (recorded[section[0]] if section else recorded)[last] == f"/home/me/a//scratch/job 7/{name}"
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(ConfigError, match=r"^data\.cache: ~/a/.* variable 'SCRATCH' is not set; .* \(in .*run\.yaml\)"):
        load_config(path)


def test_what_is_expanded_and_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("A", "~/$B")
    monkeypatch.setenv("EMPTY", "")
    cases = {"~": "/home/me", "~/x": "/home/me/x", "~root/x": "/root/x", "x/~": "x/~", "a$A.b": "a~/$B.b", "5$": "5$"}
    assert {text: expand(text) for text in cases} == cases, "once: what a variable holds is not looked at"
    assert user_path("${A}x") == Path("~/$Bx") and user_path("rel/x") == Path("rel/x")
    for text, said in {
        "$UNSET_/x": "'UNSET_' is not set",
        "${EMPTY}/x": "'EMPTY' is empty",
        "${}": "variable '' is not set",
        "~nobody-of-this-name/x": "no home folder is known for ~nobody-of-this-name",
    }.items():
        with pytest.raises(ConfigError, match=said):
            expand(text)
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            user_path(text)
    monkeypatch.setenv("HOME", "")
    with pytest.raises(ConfigError, match="no home folder is known for ~;"):
        expand("~/x")
