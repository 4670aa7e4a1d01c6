"""Templates that write a conversation turn by turn: one rendering tells what they make of each of its beginnings.

Where a template is a loop over the messages, each iteration of which sees its own message, the first one and what never
changes, the loop writes of a beginning what it writes of the same messages in the whole. What stands behind it can then
only depend on whether an answer is asked for. That is decided by reading the template's syntax tree: whatever is not
known here to keep to that rule takes part in no such template, and its beginnings are rendered one by one.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes

STUMBLES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""The ways in which a template stumbles over what it is given."""
_PLAIN = (
    *(nodes.Output, nodes.TemplateData, nodes.If, nodes.Assign, nodes.AssignBlock, nodes.NSRef),
    *(nodes.Const, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.Slice, nodes.Concat),
    *(nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.BinExpr, nodes.UnaryExpr, nodes.Test, nodes.Getitem),
)
"""Nodes whose value or output follows from those inside them."""
_FILTERS = frozenset(
    "trim upper lower title capitalize length count string int float tojson replace default d join list items first "
    "last reverse indent safe".split()
)
"""Filters whose value follows from what they are given."""
_FUNCTIONS = frozenset({"raise_exception", "namespace", "range", "dict"})
_KNOWN_OF_LOOP = frozenset({"first", "index", "index0"})
"""What the loop over the messages says of itself that does not depend on the messages to come."""
_MESSAGES, _PROMPT = "messages", "add_generation_prompt"
_ELSEWHERE = frozenset({"self", "caller", "varargs", "kwargs"})
"""Names that jinja fills in."""


@dataclass(frozen=True)
class Turns:
    """A template that writes turn by turn."""

    template: Template
    """With `mark` before each turn and behind the last."""
    mark: str
    prompted: str
    """What stands behind the turns where an answer is asked for."""
    closed: str
    """What stands there else."""

    def answers(self, rendered: str, count: int, places: Iterable[int]) -> tuple[str, list[tuple[int, int]]] | None:
        """The text of a conversation, and from where to where in it its answers stand, as comparing beginnings tells.

        Args:
            rendered: what `template` makes of it, with no answer asked for.
            count: its messages.
            places: which of them are answers; never the first.

        Returns:
            None where that has to be seen from the beginnings: one is not rendered as it stands in the whole.
        """
        parts = rendered.split(self.mark)
        ends = list(accumulate(map(len, parts)))
        skipped = count - (len(parts) - 2)  # messages that the loop leaves out at the beginning
        if skipped not in (0, 1):  # it may run over nothing
            return None
        text = "".join(parts)
        spans = []
        for place in places:
            turn = place - skipped
            before, until = ends[turn], ends[turn + 1]
            if not (text.startswith(self.closed, until) and (parts[turn + 1] + self.closed).startswith(self.prompted)):
                return None
            spans.append((before + len(self.prompted), until + len(self.closed)))
        return text, spans


def turns_of(environment: Environment, source: str, given: dict[str, Any], fixed: frozenset[str]) -> Turns | None:
    """The template as one that writes turn by turn, or None: it is not known to be one.

    Args:
        environment: what compiles it.
        source: the template; it compiles.
        given: variables that are the same for every conversation, with the environment's functions.
        fixed: those of them whose value is text.
    """
    tree = environment.parse(source)
    others = _other_names(tree)
    loops = [place for place, node in enumerate(tree.body) if isinstance(node, nodes.For) and _over(node.iter, others)]
    if len(loops) != 1:
        return None
    place = loops[0]
    loop = tree.body[place]
    assert isinstance(loop, nodes.For)
    assigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    forbidden = ({_MESSAGES, _PROMPT} | others | _ELSEWHERE | set(environment.globals)) - _FUNCTIONS
    if (assigned - others) & (forbidden | {"loop"} | _FUNCTIONS) or loop.test or loop.else_ or loop.recursive:
        return None
    rule = _Rule(forbidden, others)
    if not (rule.keeps(tree.body[:place], "before") and rule.keeps(loop.body, "turn")):
        return None
    behind = tree.body[place + 1 :]
    seen = {node.name for part in behind for node in part.find_all(nodes.Name)}
    if not (seen <= (fixed - assigned) | {_PROMPT} and _Rule(set(), set()).keeps(behind, "behind")):
        return None
    mark = secrets.token_hex(16)  # nobody who writes messages can know it

    def marked() -> nodes.Output:
        return nodes.Output([nodes.TemplateData(mark)], lineno=1)

    def compiled(body: list[nodes.Node]) -> Template:
        whole = nodes.Template(body, lineno=1)
        whole.set_environment(environment)
        return Template.from_code(environment, environment.compile(whole), {})

    alone = compiled(behind)
    try:
        prompted, closed = (alone.render({**given, _PROMPT: asked}) for asked in (True, False))
    except STUMBLES:
        return None
    loop.body.insert(0, marked())
    return Turns(compiled([*tree.body[:place], loop, marked(), *behind]), mark, prompted, closed)


def _other_names(tree: nodes.Template) -> set[str]:
    """Names that only ever stand for the messages, all of them or those from the second on."""
    values: dict[str, list[nodes.Node]] = {}
    for node in tree.find_all(nodes.Assign):
        if isinstance(node.target, nodes.Name):
            values.setdefault(node.target.name, []).append(node.node)
    found = {name for name, all_values in values.items() if all(_over(value, set()) for value in all_values)}
    stored = [node.name for node in tree.find_all(nodes.Name) if node.ctx != "load"]
    # Not those that something else stores too, such as a loop.
    return {name for name in found if stored.count(name) == len(values[name])} - {_MESSAGES}


def _over(node: nodes.Node, others: set[str]) -> bool:
    """Whether an expression is the list of messages, or all but the first."""
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        part = node.arg
        from_second = part.stop is None and part.step is None and part.start == nodes.Const(1)
        return from_second and isinstance(node.node, nodes.Name) and node.node.name == _MESSAGES
    return isinstance(node, nodes.Name) and node.name in {_MESSAGES, *others}


@dataclass(frozen=True)
class _Rule:
    """What a part of such a template may hold.

    Attributes:
        forbidden: names that it may not read.
        others: see `_other_names`.
    """

    forbidden: set[str]
    others: set[str]

    def keeps(self, parts: Iterable[nodes.Node], where: str) -> bool:
        """Whether all of them keep to it.

        Args:
            where: "before" the loop over the messages, in a "turn", in a loop "inside" of either, or "behind" it.
        """
        return all(self._keeps(part, where) for part in parts)

    def _keeps(self, node: nodes.Node, where: str) -> bool:
        if isinstance(node, nodes.Getitem) and isinstance(node.node, nodes.Name) and node.node.name == _MESSAGES:
            # The first message is there in every beginning.
            return where != "behind" and node.arg == nodes.Const(0) and node.ctx == "load"
        if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name) and node.target.name in self.others:
            return where == "before"
        if isinstance(node, nodes.Name):
            return node.ctx != "load" or (node.name not in self.forbidden | _FUNCTIONS and node.name != "loop")
        if isinstance(node, nodes.Getattr):
            if isinstance(node.node, nodes.Name) and node.node.name == "loop":
                return where == "inside" or (where == "turn" and node.attr in _KNOWN_OF_LOOP)
        elif isinstance(node, nodes.For):
            return (
                where != "behind"
                and not (node.recursive or node.test)
                and self.keeps([node.target, node.iter, *node.else_], where)
                and self.keeps(node.body, "inside")
            )
        elif isinstance(node, nodes.Call):
            if where == "behind" or node.dyn_args is not None or node.dyn_kwargs is not None:
                return False
            if isinstance(node.node, nodes.Name) and node.node.name in _FUNCTIONS:
                return self.keeps([*node.args, *node.kwargs], where)
            # Methods of text, numbers, lists and objects; the sandbox has none that change them.
            if not isinstance(node.node, nodes.Getattr):
                return False
        elif isinstance(node, nodes.Filter):
            if node.name not in _FILTERS or node.dyn_args is not None or node.dyn_kwargs is not None:
                return False
        elif not isinstance(node, _PLAIN):
            return False
        return self.keeps(node.iter_child_nodes(), where)
