"""The import graph of the packages, read from the syntax trees: a Mermaid drawing and the same as a table."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOMS = ("parallel", "pipeline", "tools")
"""Top-level packages, in the order in which none imports a later one."""

Graph = Mapping[str, set[str]]
"""Node -> the nodes it imports. A node is a package of `parallel` or `pipeline`, a loose module there, or `tools`."""


def node_of(module: str) -> str | None:
    """The node that a dotted module belongs to; None for libraries and for a top-level package itself."""
    parts = module.split(".")
    if parts[0] == "tools":
        return "tools"
    return ".".join(parts[:2]) if parts[0] in ROOMS and len(parts) > 1 else None


def imported(tree: ast.AST) -> Iterable[str]:
    """Every module a file names in an import, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from pipeline import planning` names a package, `from pipeline.planning import arch` a module of it.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph(root: Path) -> Graph:
    """The graph of the sources below `root`.

    Raises:
        ValueError: packages import each other in a circle.
    """
    graph: dict[str, set[str]] = {}
    for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        node = None if parts[1:] == ("__init__",) else node_of(".".join(parts))
        if node is None:
            continue  # what `python -m` runs before a command
        found = {node_of(module) for module in imported(ast.parse(path.read_text(encoding="utf-8")))}
        graph.setdefault(node, set()).update(other for other in found if other is not None and other != node)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise ValueError(f"packages import each other in a circle: {' <- '.join(error.args[1])}") from None
    return graph


def reduced(graph: Graph) -> Graph:
    """Without the arrows that a longer way implies."""

    @cache
    def reached(node: str) -> set[str]:
        return graph[node].union(*(reached(other) for other in graph[node]))

    return {
        node: {other for other in others if all(other not in reached(way) for way in others)}
        for node, others in graph.items()
    }


def drawing(graph: Graph) -> str:
    """Mermaid text: one box a top-level package, an arrow for every import that no longer way implies."""
    lines = ["```mermaid", "flowchart TD"]
    for room in ("pipeline", "parallel"):
        inside = sorted(node for node in graph if node.startswith(f"{room}."))
        lines += [f"  subgraph {room}"]
        lines += [f'    {_box(node)}["{node.removeprefix(f"{room}.")}"]' for node in inside]
        lines += ["  end"]
    fewer = reduced(graph)
    lines += [f"  {_box(node)} --> {_box(other)}" for node in sorted(fewer) for other in sorted(fewer[node])]
    return "\n".join([*lines, "```"])


def _box(node: str) -> str:
    return node.replace(".", "_")


def table(graph: Graph) -> str:
    """Markdown: what every node imports, directly, those that nothing imports first."""
    order = list(TopologicalSorter(graph).static_order())[::-1]
    rows = ["| package | imports |", "|---|---|"]
    for node in order:
        rows.append(f"| `{node}` | {', '.join(f'`{other}`' for other in sorted(graph[node])) or 'nothing'} |")
    return "\n".join(rows)


def graph_section(root: Path) -> str:
    """What docs/ARCHITECTURE.md shows."""
    graph = import_graph(root)
    count = f"{len(graph)} packages, {sum(map(len, graph.values()))} arrows, no circle."
    return "\n\n".join([count, drawing(graph), table(graph)])
