"""What a rank brings for `parallel.world.agreement` to compare: settings, program, libraries, base model."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import parallel
import pipeline
from parallel.errors import CheckpointError
from pipeline.config.run import RunConfig
from pipeline.config.yaml_file import config_dict
from pipeline.hf.weight_source import WeightSource
from pipeline.reporting.versions import versions

OWN_PATHS = ("model.path", "data.path", "data.tokenizer", "data.cache", "eval.path")
"""Settings that may name another place on every machine, as a copy on its own disk: what lies there is compared."""
LIBRARIES = ("torch", "megatron-core", "deepspeed", "transformers", "numpy")
"""Those whose version changes what a step computes or which tokens it sees."""
DIGEST_LETTERS = 12


def rank_facts(config: RunConfig, base: WeightSource) -> dict[str, str]:
    """Name -> value, in the order a refusal names them.

    Args:
        config: this rank's, resolved.
        base: the weights it would start from.
    """
    installed = versions()
    return {
        **dict(_settings(config_dict(config))),
        "the program (sha256 of its source)": source_digest(),
        **{library: installed[library] for library in LIBRARIES if library in installed},
        **_base_facts(base),
    }


def _settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name -> value."""
    for name, value in tree.items():
        dotted = prefix + name
        if isinstance(value, dict):
            yield from _settings(value, f"{dotted}.")
        elif dotted == "eval.path":
            yield dotted, "not set" if value is None else "set"
        elif dotted not in OWN_PATHS:
            yield dotted, json.dumps(value)


@functools.cache
def source_digest() -> str:
    """Of the files this process runs: a version number says nothing of a checkout."""
    digest = hashlib.sha256()
    for package in (parallel, pipeline):
        root = Path(*package.__path__)
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root.parent)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:DIGEST_LETTERS]


def _base_facts(base: WeightSource) -> dict[str, str]:
    """What tells one base from another in a moment: shapes, dtypes, and the middle row of every tensor.

    Raises:
        CheckpointError: config.json cannot be read.
    """
    if not base.files:
        return {}  # the dry run's random weights
    path = base.folder / "config.json"
    try:
        described = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); download it again.") from None
    digest = hashlib.sha256()
    for name in base.names:
        fact = base.facts[name]
        digest.update(f"{name} {fact.dtype} {fact.shape}\0".encode())
        rows = fact.shape[0] if fact.shape else 0
        if rows:
            middle = base.slice(name, 0, rows // 2, rows // 2 + 1)
            digest.update(middle.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {
        "the base's config.json (sha256)": described[:DIGEST_LETTERS],
        "the base's weights (sha256 of a row of each)": digest.hexdigest()[:DIGEST_LETTERS],
    }
