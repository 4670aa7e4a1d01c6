"""docs/SETTINGS.md and the import graph are what the code says; other readers of the code see the same."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml

from pipeline.config.sections import DataConfig
from pipeline.config.yaml_file import config_dict, load_config
from tools.pages import ARCHITECTURE, IMAGES, ROOT, SETTINGS, main, stale
from tools.support.import_graph import ROOMS, import_graph, node_of, reduced
from tools.support.pictures import PICTURES
from tools.support.settings_page import field_docs, settings_page


@dataclass(frozen=True)
class Undocumented:
    path: str


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def rows(page: str) -> dict[str, list[str]]:
    """Setting -> the other cells of its row."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines() if line.startswith("| `")]
    return {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_pages_are_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_a_page_that_says_something_else_is_stale(tmp_path: Path) -> None:
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docs/images").mkdir(parents=True)
    pictures = [IMAGES / name for name in PICTURES]
    for page in (SETTINGS, ARCHITECTURE, *pictures):
        shutil.copyfile(ROOT / page, tmp_path / page)
    assert stale(tmp_path) == []
    with (tmp_path / "pipeline/reporting/versions.py").open("a") as file:
        file.write("from pipeline.storage import durable\n")
    assert stale(tmp_path) == [ARCHITECTURE]
    (tmp_path / SETTINGS).write_text((ROOT / SETTINGS).read_text().replace("0.25", "0.5"))
    assert stale(tmp_path) == [SETTINGS, ARCHITECTURE]
    (tmp_path / pictures[0]).write_text("<svg/>")
    (tmp_path / pictures[1]).unlink()
    assert stale(tmp_path) == [SETTINGS, ARCHITECTURE, *pictures[:2]]


def test_every_setting_with_its_default(tmp_path: Path) -> None:
    """Against the configuration that a YAML of nothing but what is required resolves to."""
    required = {"model.path": "m", "model.context": 8192, "data.path": "d", "train.steps": 7, "output": "o"}
    nested: dict[str, Any] = {"output": "o", "model": {"path": "m", "context": 8192}}
    nested |= {"data": {"path": "d"}, "train": {"steps": 7}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(nested))
    resolved = flat(config_dict(load_config(tmp_path / "run.yaml")))
    page = rows(settings_page())
    assert page.keys() == resolved.keys()
    for name, (kind, default, meaning) in page.items():
        assert kind and meaning
        if name in required:
            assert default == "required"
        else:
            shown, value = yaml.safe_load(default.strip("`")), resolved[name]
            value = list(value) if isinstance(value, (list, tuple)) else value
            assert (float(shown) if isinstance(value, float) else shown) == value, name


def test_a_field_without_a_docstring_is_refused() -> None:
    assert field_docs(DataConfig)["sequence"].startswith("Training sequence length, tokens")
    with pytest.raises(ValueError, match="Undocumented.path: has no docstring"):
        field_docs(Undocumented)


def test_the_graph_is_what_grimp_finds() -> None:
    """grimp is what import-linter reads imports with."""
    modules = grimp.build_graph(*ROOMS, cache_dir=None)
    wanted: dict[str, set[str]] = {}
    for module in modules.modules - {*ROOMS}:
        node = node_of(module)
        assert node is not None
        others = {node_of(other) for other in modules.find_modules_directly_imported_by(module)}
        wanted.setdefault(node, set()).update(other for other in others if other is not None and other != node)
    assert import_graph(ROOT) == wanted


def test_fewer_arrows_lead_to_the_same_packages() -> None:
    graph = import_graph(ROOT)
    fewer = reduced(graph)

    def reaches(arrows: Any, start: str, end: str) -> bool:
        return any(other == end or reaches(arrows, other, end) for other in arrows[start])

    assert sum(map(len, fewer.values())) < sum(map(len, graph.values()))
    for start, end in permutations(graph, 2):
        assert reaches(graph, start, end) == reaches(fewer, start, end), (start, end)
    for start, others in fewer.items():
        for end in others:
            without = fewer | {start: others - {end}}
            assert not reaches(without, start, end), f"{start} -> {end} is one arrow too many"


def test_a_circle_is_refused(tmp_path: Path) -> None:
    for name, line in {"a": "import pipeline.b.x", "b": "def f():\n    from pipeline.a import x"}.items():
        (tmp_path / "pipeline" / name).mkdir(parents=True)
        (tmp_path / "pipeline" / name / "x.py").write_text(line)
    with pytest.raises(ValueError, match=r"in a circle: pipeline\.[ab] <- pipeline\.[ab] <- pipeline"):
        import_graph(tmp_path)
