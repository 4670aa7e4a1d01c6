"""A prepared conversation on the screen: what the loss counts stands out, and special tokens are themselves."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.text import Text

from pipeline.data.chat import ChatTemplate
from pipeline.data.masks import Sample


def shown(sample: Sample, template: ChatTemplate) -> Text:
    """The text of a sample, special tokens included; green: scored, dim: not."""
    text = Text()
    edges = np.flatnonzero(np.diff(sample.scored)) + 1
    for tokens, scored in zip(np.split(sample.tokens, edges), np.split(sample.scored, edges), strict=True):
        text.append(template.decode(tokens.tolist()), style="bold green" if scored[0] else "dim")
    return text


def print_sample(console: Console, where: str, sample: Sample, template: ChatTemplate) -> None:
    """Print it under a line that counts it."""
    cut = f", {sample.cut} cut" if sample.cut else ""
    console.print(
        f"── {where}: {sample.tokens.size} tokens, {int(sample.scored[1:].sum())} scored{cut} ──",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    console.print(shown(sample, template), soft_wrap=True, highlight=False)
