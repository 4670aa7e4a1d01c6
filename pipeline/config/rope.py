"""The configuration's settings of rotary positions, and which of them a type of scaling looks at; see `sections`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parallel.errors import ConfigError
from pipeline.config.checks import at_least, one_of

ROPE_TYPES = ("auto", "none", "linear", "ntk", "abf", "yarn", "llama3")


def unused_settings(kind: str, theta: float | None) -> tuple[str, ...]:
    """Names of the settings that scaling of type `kind` (given `theta`, or None) never looks at."""
    if kind == "none":
        return ("factor", "theta", "original_context")
    if kind == "abf" or (kind == "ntk" and theta is not None):
        return ("factor", "original_context")  # the base alone says it all
    if kind == "auto":
        return ("theta", "replace")
    return () if kind == "ntk" else ("theta",)


def used_rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings without those that had no effect: earlier releases took them, `RopeSettings` refuses them.

    Raises:
        KeyError: no `type`.
    """
    unused = unused_settings(settings["type"], settings.get("theta"))
    return {name: value for name, value in settings.items() if name not in unused}


@dataclass(frozen=True)
class RopeSettings:
    """How rotary positions are stretched to the new context."""

    type: str = "auto"
    """auto keeps the checkpoint's own scaling if `context` fits it, and otherwise uses linear interpolation (the
    paper's); none | linear | ntk | abf | yarn | llama3 force one."""
    factor: float | None = None
    """Stretch over the original context (dimensionless); None derives context / original context."""
    theta: float | None = None
    """New RoPE base for `abf` (dimensionless); None derives it for `ntk`, and is an error for `abf`."""
    original_context: int | None = None
    """Context the checkpoint was trained for, tokens; None reads it from the checkpoint."""
    replace: bool = False
    """Replace scaling of the checkpoint's own although it reaches `context`, which is refused otherwise."""

    def __post_init__(self) -> None:
        one_of("model.rope.type", self.type, ROPE_TYPES)
        if self.factor is not None:
            at_least("model.rope.factor", self.factor, 1.0)
        if self.theta is not None:
            at_least("model.rope.theta", self.theta, 1.0)
        if self.original_context is not None:
            at_least("model.rope.original_context", self.original_context, 1)
        if self.type == "abf" and self.theta is None:
            raise ConfigError("model.rope.theta: type abf needs the new base; set e.g. theta: 500000.")
        for name in unused_settings(self.type, self.theta):
            if getattr(self, name) not in (None, False):
                if self.type == "ntk":
                    kind, mend = "ntk with a theta", "remove theta"
                else:
                    kind, mend = self.type, "set type: abf" if name == "theta" else "set type: linear"
                raise ConfigError(f"model.rope.{name}: type {kind} does not use it; {mend}, or remove {name}.")

    def check_stretch(self, context: int) -> None:
        """Refuse an original context that leaves nothing to stretch to `context` tokens.

        Raises:
            ConfigError: the checkpoint would be used as if no scaling had been asked for.
        """
        if self.original_context is not None and self.factor is None and self.original_context >= context:
            raise ConfigError(
                f"model.rope.original_context: {self.original_context} is not less than model.context {context}, so "
                "nothing would be stretched; raise the context, or remove original_context."
            )
