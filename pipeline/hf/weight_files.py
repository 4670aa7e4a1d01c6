"""Which weight files of a Hugging Face folder are the model. No torch: files are chosen by name and index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import CheckpointError
from pipeline.config.hub import MODEL, not_there
from pipeline.storage.json_file import read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
"""The same of torch.save, before safetensors."""


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder, chosen from their names and the index."""

    tensors: Mapping[str, set[str] | None]
    """File name -> tensors the index puts there (None: no index)."""
    warnings: tuple[str, ...] = ()
    """What lies beside them and is not read, one sentence each."""


def _weight_map(index: Path) -> dict[str, set[str]]:
    """File name -> tensors, as an index tells them."""
    wanted: dict[str, set[str]] = {}
    try:
        weight_map = dict(read_object(index)["weight_map"])
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise ValueError(f"{name} lies outside the folder, in {file!r}")
            wanted.setdefault(file, set()).add(name)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: is not a usable index ({error}); download it again.") from None
    return wanted


def only_pickled(folder: Path) -> bool:
    """Whether a folder holds the model in files of torch.save alone."""
    return not list(folder.glob("*.safetensors*")) and any(
        (folder / name).is_file() for name in (PICKLED, PICKLED_INDEX)
    )


def choose_weights(folder: Path, pickled: bool = False) -> WeightFiles:
    """Which files hold the model.

    Args:
        pickled: files of torch.save are looked for, instead of safetensors.

    Raises:
        CheckpointError: the folder or a file is missing, or two sets of weights lie there, of which either could be the
            model (transformers prefers the single file, whatever the index says).
    """
    if not folder.is_dir():
        hub = not_there(str(folder), MODEL)
        raise CheckpointError(f"{folder}: is not a folder; give a Hugging Face checkpoint folder{hub}.")
    if pickled:
        return _choose_pickled(folder)
    index, single = folder / INDEX, (folder / SINGLE).is_file()
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if index.is_file():
        wanted = _weight_map(index)
        missing = sorted(file for file in wanted if not (folder / file).is_file())
        if single and SINGLE not in wanted:
            if len(missing) < len(wanted):
                raise CheckpointError(
                    f"{folder}: holds both {SINGLE} and shards that {INDEX} names ({min(wanted.keys() - {*missing})}), "
                    "so it is unclear which are the model's weights; move the older ones away."
                )
            stale = f"{index}: is stale, its {len(wanted)} shards are gone; {SINGLE} is read instead."
            return WeightFiles({SINGLE: None}, (stale, *_unread(folder, files, {SINGLE})))
        if missing:
            raise CheckpointError(
                f"{folder / missing[0]}: is missing ({len(missing)} of {len(wanted)} shards are); download it again."
            )
        return WeightFiles(wanted, _unread(folder, files, {*wanted}))
    if single:
        return WeightFiles({SINGLE: None}, _unread(folder, files, {SINGLE}))
    if "adapter_model.safetensors" in files:
        raise CheckpointError(f"{folder}: is a PEFT adapter, not a model; give the folder of its base model.")
    shards = [file for file in files if not _own_format(file)]
    if shards:
        raise CheckpointError(f"{index}: is missing, though {shards[0]} is there; download the index too.")
    if files:
        raise CheckpointError(
            f"{folder}: holds {files[0]}, the publisher's own format, which is not read; download {SINGLE} or the "
            f"shards with {INDEX} too."
        )
    if list(folder.glob("*.gguf")):
        raise CheckpointError(f"{folder}: holds a GGUF file only; convert it first with longspan import.")
    if list(folder.glob("*.bin")) + list(folder.glob("*.pth")) + list(folder.glob("*.pt")):
        raise CheckpointError(
            f"{folder}: holds pickled weights only, which can run code when read; make safetensors of them with "
            "longspan import, which reads plain tensors and nothing else, or download the safetensors release."
        )
    raise CheckpointError(f"{folder}: holds no *.safetensors file; give a Hugging Face checkpoint folder.")


def _choose_pickled(folder: Path) -> WeightFiles:
    index = folder / PICKLED_INDEX
    if (folder / PICKLED).is_file():
        return WeightFiles({PICKLED: None})
    wanted = _weight_map(index)
    missing = sorted(file for file in wanted if not (folder / file).is_file())
    if missing:
        raise CheckpointError(
            f"{folder / missing[0]}: is missing ({len(missing)} of {len(wanted)} shards are); download it again."
        )
    return WeightFiles(wanted)


def _own_format(file: str) -> bool:
    """Mistral publishes its weights twice, once in a format of its own."""
    return file.startswith("consolidated")


def _unread(folder: Path, files: list[str], read: set[str]) -> tuple[str, ...]:
    left = [file for file in files if file not in read and not _own_format(file)]
    if not left:
        return ()
    more = f" and {len(left) - 1} other files" if len(left) > 1 else ""
    return (f"{folder / left[0]}{more}: not read, as {min(read)} is the model; move away what is stale.",)
