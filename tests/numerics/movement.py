"""How far tensors of one run are from another's, as a share of how far they moved."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch


def tensor_errors(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor] | None
) -> dict[str, float]:
    """By name: norm of the difference over that of the expected tensor, or of its way from `start`.

    What is missing on one side, or is no number, is infinitely far.
    """
    if found.keys() != expected.keys():
        return {sorted(found.keys() ^ expected.keys())[0]: math.inf}
    errors = {}
    for name, tensor in expected.items():
        size = (tensor if start is None else tensor - start[name]).double().norm()
        errors[name] = number(float((found[name].double() - tensor.double()).norm() / size))
    return errors


def number(error: float) -> float:
    """The error; infinity for NaN."""
    return error if error == error else math.inf
