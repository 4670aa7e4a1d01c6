"""Writes skypilot_golden.json: what SkyPilot itself makes of launch/skypilot.yaml, and which fields it knows there.

SkyPilot is not installed with Longspan; in an environment of its own:

    pip install 'skypilot==0.14.1' && python tests/integration/skypilot_golden.py

A file that SkyPilot refuses ends this with its words.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import yaml

PLACE = Path(__file__).parent
SOURCE = PLACE.parents[1] / "launch/skypilot.yaml"


def fields(schema: dict[str, Any]) -> list[str]:
    """Names that a section may have."""
    assert schema.get("additionalProperties") is False, "others are refused"
    return sorted(schema["properties"])


def main() -> None:
    """Validate as `sky jobs launch` does, and write."""
    import sky
    from sky.utils import common_utils, schemas

    tree = yaml.safe_load(SOURCE.read_text())
    sections = {"task": schemas.get_task_schema(), "resources": schemas.get_resources_schema()}
    sections["file_mounts"] = schemas.get_storage_schema()
    common_utils.validate_schema(tree, sections["task"], "task: ")
    common_utils.validate_schema(tree["resources"], sections["resources"], "resources: ")
    for mount in tree["file_mounts"].values():
        common_utils.validate_schema(mount, sections["file_mounts"], "file_mounts: ")
    task = sky.Task.from_yaml_config(copy.deepcopy(tree))  # which it empties
    (resources,) = task.resources
    (storage,) = task.storage_mounts.values()
    golden = {
        "skypilot": sky.__version__,
        "source": "sky/utils/schemas.py of SkyPilot, Apache-2.0",
        "yaml": tree,
        "read": {
            "accelerators": resources.accelerators,
            "use_spot": resources.use_spot,
            "nodes": task.num_nodes,
            "store": f"{storage.name} {storage.mode.value}",
        },
        "fields": {name: fields(schema) for name, schema in sections.items()},
    }
    (PLACE / "skypilot_golden.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
