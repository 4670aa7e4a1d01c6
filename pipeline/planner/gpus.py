"""What a GPU can do, as sold and as measured: `gpus.yaml`, or a file that `longspan bench calibrate` wrote."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from parallel.errors import ConfigError
from pipeline.planning.memory import GIB

_MANY = re.compile(r"(\d+)\s*[x*]\s*(.+)")
SHIPPED = Path(__file__).with_name("gpus.yaml")
RATES = ("bf16", "fp8", "hbm", "pcie", "nvlink", "network")
"""FLOP/s of products in two dtypes; bytes a second of its memory, and one way of each link."""
OPTIONAL = ("fp8", "nvlink")
"""What a GPU may lack."""
SHARES = {"bf16": 0.779, "fp8": 0.737, "hbm": 0.80, "pcie": 0.83, "nvlink": 1.0, "network": 1.0}
"""Of what is sold, what is taken where nothing was measured: the H100's measured shares. Links have fitted shares
of their own (`layer_time.FITTED`)."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU and the machines it is sold in."""

    name: str
    memory: int
    """Bytes that PyTorch can allocate."""
    sold: Mapping[str, float | None] = field(hash=False)
    measured: Mapping[str, float] = field(hash=False)
    """Of RATES, those measured on it."""
    gpus_a_node: int
    host: int
    """Host memory a GPU, bytes, where the user says nothing."""
    source: str
    names: tuple[tuple[str, ...], ...] = ()
    """What PyTorch may call it: a name holds all parts of one of these."""
    capability: float | None = None
    """CUDA's compute capability; None: not known, or a CPU."""

    def rate(self, name: str) -> float:
        """FLOP/s or bytes a second to reckon with; 0 where the GPU lacks it."""
        found = self.measured.get(name)
        return found if found is not None else (self.sold[name] or 0.0) * SHARES[name]


def _number(values: Mapping[str, Any], key: str, where: str, optional: bool = False) -> float | None:
    value = values.get(key)
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"{where}: {key} must be a positive number, got {value!r}; see pipeline/planner/gpus.yaml.")
    return float(value)


def _names(values: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], ...]:
    given = values.get("names") or []
    if not isinstance(given, list) or not all(isinstance(parts, list) and parts for parts in given):
        raise ConfigError(
            f"{where}: names must be a list of lists, such as [[H100, 80GB]]; see pipeline/planner/gpus.yaml."
        )
    return tuple(tuple(map(str, parts)) for parts in given)


def _mapping(values: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: named values are expected; see pipeline/planner/gpus.yaml.")
    return values


def _gpu(name: str, content: Any, file: Path) -> Gpu:
    where = f"{file}, {name}"
    values = _mapping(content, where)
    sold = _mapping(values.get("sold"), f"{where}, sold")
    measured = _mapping(values.get("measured") or {}, f"{where}, measured")
    for key in {*sold, *measured} - {*RATES}:
        raise ConfigError(f"{where}: {key} is not one of {', '.join(RATES)}.")
    found = {key: _number(measured, key, f"{where}, measured") for key in measured}
    memory, host = (_number(values, key, where) for key in ("memory_gib", "host_gib_a_gpu"))
    node = _number(values, "gpus_a_node", where)
    assert memory is not None and host is not None and node is not None
    if node != int(node):
        raise ConfigError(f"{where}: gpus_a_node must be a whole number, got {node}; see pipeline/planner/gpus.yaml.")
    return Gpu(
        name=name,
        memory=int(memory * GIB),
        sold={key: _number(sold, key, f"{where}, sold", key in OPTIONAL) for key in RATES},
        measured={key: value for key, value in found.items() if value is not None},
        gpus_a_node=int(node),
        host=int(host * GIB),
        source=str(values.get("source") or ""),
        names=_names(values, where),
        capability=_number(values, "capability", where, optional=True),
    )


@cache
def read_gpus(file: Path = SHIPPED) -> dict[str, Gpu]:
    """Every description in a file, by name.

    Raises:
        ConfigError: it cannot be read, or lacks something (named).
    """
    try:
        listed = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML ({str(error).splitlines()[0]}).") from None
    return {str(name): _gpu(str(name), values, file) for name, values in _mapping(listed, str(file)).items()}


def find_gpu(text: str) -> Gpu:
    """The GPU that `--gpu` names: one of `gpus.yaml`, or a file with one description.

    Args:
        text: spelled in any way; without the memory where there is one size; or as PyTorch names it.

    Raises:
        ConfigError: there is none of that name; the nearest are told.
    """
    listed = read_gpus()
    name = text.strip().lower()
    if name in listed:
        return listed[name]
    path = Path(text).expanduser()
    if path.is_file():
        own = read_gpus(path)
        if len(own) != 1:
            raise ConfigError(f"--gpu: {text} describes {len(own)} GPUs ({', '.join(own)}); give a file with one.")
        return next(iter(own.values()))
    many = _MANY.fullmatch(name)
    if many is not None:
        raise ConfigError(f"--gpu: {text} says how many as well; give --gpus {many[1]} --gpu {many[2]}.")
    plain = _plain(name)
    alike = [known for known in listed if plain in (_plain(known), known.split("-")[0])]
    if len(alike) == 1:  # a100 is sold with 40 GB and with 80
        return listed[alike[0]]
    called = named_by(text) if plain.startswith("nvidia") else None
    if called is not None:
        return called
    starts = [known for known in listed if name and known.startswith(name)]
    near = starts or difflib.get_close_matches(name, listed, n=3, cutoff=0.4) or list(listed)
    raise ConfigError(
        f"--gpu: {text} is not known (nearest: {', '.join(near)}); name one of {', '.join(listed)}, or give a "
        "file that longspan bench calibrate wrote."
    )


def _plain(name: str) -> str:
    """A name's letters and digits."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def named_by(device: str) -> Gpu | None:
    """The description of what PyTorch calls `device`; None: there is none."""
    known = (gpu for gpu in read_gpus().values() if any(all(part in device for part in parts) for parts in gpu.names))
    return next(known, None)
