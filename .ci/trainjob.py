"""Holds launch/kubernetes_trainjob.yaml against Kubeflow Trainer's own models, which .ci/manifests installs.

They take fields that they do not know and drop them, so what they make of the file must be the file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from kubeflow_trainer_api import models

KINDS = {"TrainingRuntime": models.TrainerV1alpha1TrainingRuntime, "TrainJob": models.TrainerV1alpha1TrainJob}


def dropped(given: Any, taken: Any, where: str) -> list[str]:
    """What is in a document and not in what was made of it."""
    if isinstance(given, dict) and isinstance(taken, dict):
        return [name for key in given for name in dropped(given[key], taken.get(key), f"{where}.{key}")]
    if isinstance(given, list) and isinstance(taken, list) and len(given) == len(taken):
        pairs = enumerate(zip(given, taken, strict=True))
        return [name for i, (one, other) in pairs for name in dropped(one, other, f"{where}[{i}]")]
    return [] if given == taken else [f"{where}: {given!r}, taken as {taken!r}"]


def main(path: Path) -> int:
    """Exit code 0: both documents are valid."""
    wrong = []
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        made = KINDS[document["kind"]].from_dict(document)
        assert made is not None
        wrong += dropped(document, made.to_dict(), document["kind"])
    print(*wrong, sep="\n", end="\n" * bool(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
