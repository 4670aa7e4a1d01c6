"""How functions of packages that need a GPU are called, read from their sources: no test may invent a signature.

`signatures.json` holds them for the releases named there, written by

    python -m tests.support.signatures FOLDER        # site-packages, or unpacked wheels and sdists

Where a package is installed its own source is read instead, in whatever release it is.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path

GOLDEN = Path(__file__).with_suffix(".json")
WANTED = {
    "flash-attn": {
        "flash_attn/flash_attn_interface.py": (
            "flash_attn_func",
            "flash_attn_varlen_func",
            "_flash_attn_forward",
            "_flash_attn_backward",
        ),
    },
    "flash-attn-4": {
        "flash_attn/cute/interface.py": (
            "flash_attn_func",
            "flash_attn_varlen_func",
            "_flash_attn_fwd",
            "_flash_attn_bwd",
        ),
    },
    "transformer-engine": {
        "transformer_engine/pytorch/module/linear.py": ("Linear.__init__", "Linear.forward"),
        "transformer_engine/pytorch/module/layernorm_linear.py": (
            "LayerNormLinear.__init__",
            "LayerNormLinear.forward",
        ),
        "transformer_engine/pytorch/module/rmsnorm.py": ("RMSNorm.__init__",),
        "transformer_engine/pytorch/ops/basic/rmsnorm.py": ("RMSNorm.__init__",),
        "transformer_engine/pytorch/quantization.py": (
            "fp8_autocast",
            "fp8_model_init",
            "is_fp8_available",
            "is_fp8_block_scaling_available",
            "is_mxfp8_available",
        ),
    },
}
"""Functions by distribution and file: what the product calls, or megatron-core for it."""


def written(source: str, name: str) -> str:
    """The parameters of a function or method as its source has them, without annotations.

    Raises:
        LookupError: there is none of that name.
    """
    found: list[ast.stmt] = ast.parse(source).body
    for part in name.split("."):
        nodes = [node for node in found if getattr(node, "name", None) == part]
        if not nodes:
            raise LookupError(f"{name} is not in this source")
        node = nodes[-1]
        assert isinstance(node, ast.ClassDef | ast.FunctionDef)
        found = node.body
    assert isinstance(node, ast.FunctionDef)
    for parameter in ast.walk(node.args):
        if isinstance(parameter, ast.arg):
            parameter.annotation = None
    return ast.unparse(node.args)


def signature(parameters: str) -> inspect.Signature:
    """The signature that `written` gave; a default that is no literal is its text."""
    arguments = ast.parse(f"def function({parameters}): ...").body[0].args  # type: ignore[attr-defined]

    def default(node: ast.expr | None) -> object:
        if node is None:
            return inspect.Parameter.empty
        try:
            return ast.literal_eval(node)
        except ValueError:
            return ast.unparse(node)

    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    kind = inspect.Parameter
    found = [
        kind(arg.arg, kind.POSITIONAL_OR_KEYWORD, default=default(value))
        for arg, value in zip(positional, defaults, strict=True)
    ]
    if arguments.vararg is not None:
        found.append(kind(arguments.vararg.arg, kind.VAR_POSITIONAL))
    found += [
        kind(arg.arg, kind.KEYWORD_ONLY, default=default(value))
        for arg, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg is not None:
        found.append(kind(arguments.kwarg.arg, kind.VAR_KEYWORD))
    return inspect.Signature(found)


def known(distribution: str, file: str, name: str) -> inspect.Signature:
    """How a function is called: by the installed release, or else by the golden one."""
    try:
        path = importlib.metadata.distribution(distribution).locate_file(file)
    except importlib.metadata.PackageNotFoundError:
        return signature(golden(distribution)[1][file][name])
    return signature(written(Path(str(path)).read_text(encoding="utf-8"), name))


def golden(distribution: str) -> tuple[str, dict[str, dict[str, str]]]:
    """(release, parameters by file and function) of a package's golden."""
    entry = json.loads(GOLDEN.read_text(encoding="utf-8"))[distribution]
    return entry["version"], entry["files"]


def read_all(folder: Path, distribution: str) -> dict[str, dict[str, str]]:
    """The parameters of every wanted function of a distribution that lies in `folder`."""
    return {
        file: {name: written((folder / file).read_text(encoding="utf-8"), name) for name in names}
        for file, names in WANTED[distribution].items()
    }


def _releases(folder: Path) -> Iterator[tuple[str, str]]:
    for found in importlib.metadata.distributions(path=[str(folder)]):
        name = found.metadata["Name"].replace("_", "-").lower()
        if name in WANTED:
            yield name, found.version


def main(folders: list[str]) -> None:
    """Write the golden file anew for what lies in the folders."""
    entries = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    for folder in map(Path, folders):
        for name, version in _releases(folder):
            entries[name] = {"version": version, "files": read_all(folder, name)}
    GOLDEN.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
