"""A new run that begins with trained weights (`init_from`): of a run, of one of its checkpoints, or of an adapter.

Only the weights are taken: step, moments, data and random state are a new run's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from parallel.errors import CheckpointError, ConfigError
from pipeline.checkpoint.choose import choose
from pipeline.checkpoint.manifest import MANIFEST, MASTER, Cut, cut_shape
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.config.hub import MODEL, not_there
from pipeline.config.rope import RopeSettings, used_rope
from pipeline.config.run import RunConfig
from pipeline.config.sections import LoraConfig
from pipeline.data.answer_ends import ChatFormat, format_of
from pipeline.export.adapter_notes import CONFIG, read_note
from pipeline.export.adapter_read import load_adapter_of
from pipeline.export.trained_model import known_form
from pipeline.hf.vocabulary import VOCABULARY_HF, grown_tensor
from pipeline.hf.weight_source import WeightSource
from pipeline.planning.arch import LlamaArch, read_arch
from pipeline.planning.rope import RopePlan, plan_rope
from pipeline.planning.tensors import adapter_shapes, hf_tensor_shapes
from pipeline.planning.trainable import trained_names

KINDS = f"a run's output, a checkpoint or an adapter ({CONFIG})"


@dataclass(frozen=True)
class Start:
    """What a run began with."""

    folder: Path
    """Checkpoint or adapter."""
    step: int
    """Optimizer steps it had been trained for."""
    warnings: tuple[str, ...]

    def recorded(self) -> dict[str, Any]:
        """As manifests and reports keep it."""
        return {"path": str(self.folder.resolve()), "step": self.step}


class Weights(Protocol):
    """Trained tensors by canonical name, in pieces."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the whole tensors."""

    def read(self, name: str, cut: Cut, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened cut of a tensor: fp32, 1-D."""


class CheckpointWeights:
    """The masters of a checkpoint."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Weights`."""
        return {name: entry.shape for name, entry in self._reader.manifest.tensors.items()}

    def read(self, name: str, cut: Cut, start: int, stop: int) -> torch.Tensor:
        """See `Weights`."""
        return torch.from_numpy(self._reader.read(name, MASTER, cut, start, stop))


class AdapterWeights:
    """The tensors of an adapter."""

    def __init__(self, tensors: Any) -> None:
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Weights`."""
        return {name: tuple(self._tensors[name].shape) for name in self._tensors}

    def read(self, name: str, cut: Cut, start: int, stop: int) -> torch.Tensor:
        """See `Weights`."""
        whole = self._tensors[name]
        if cut is not None:
            whole = whole.narrow(cut[0], cut[1], cut[2] - cut[1])
        assert tuple(whole.shape) == cut_shape(tuple(self._tensors[name].shape), cut)
        return whole.reshape(-1)[start:stop].float()


@dataclass(frozen=True)
class Source:
    """Trained weights and what they mean."""

    start: Start
    weights: Weights
    lora: LoraConfig
    rope: RopePlan
    context: int
    form: str = "bf16"
    """model.base in that training."""
    chat: ChatFormat | None = None
    """Of the conversations in that training."""


def check_source(path: str) -> None:
    """Refuse what is none of KINDS; opens nothing.

    Raises:
        ConfigError: names it.
    """
    folder = Path(path)
    if not any((folder / name).exists() for name in ("checkpoints", MANIFEST, CONFIG)):
        what, hub = (f"is not {KINDS}", "") if folder.exists() else ("does not exist", not_there(path, MODEL))
        raise ConfigError(f"init_from: {path} {what}; name one, or remove init_from to begin with the base{hub}.")


def find_source(path: str) -> str:
    """The checkpoint or adapter folder that `init_from` means; a checkpoint is proven by its checksums.

    Raises:
        ConfigError, CheckpointError: there is none, or it is damaged.
    """
    check_source(path)
    folder = Path(path)
    if (folder / CONFIG).exists():
        return str(folder)
    if (folder / MANIFEST).exists():
        with CheckpointReader(folder) as reader:
            reader.verify()
        return str(folder)
    choice = choose(folder / "checkpoints")
    if choice is None:
        raise ConfigError(f"init_from: {path} has no checkpoint yet; let that run save one, or name another.")
    return str(choice.folder)


@contextmanager
def open_source(folder: Path, config: RunConfig, base_hash: str) -> Iterator[Source]:
    """Open what `find_source` found.

    Args:
        base_hash: of this run's base.

    Raises:
        ConfigError: it was trained on another base.
        CheckpointError: it is damaged.
    """
    if (folder / CONFIG).exists():
        _same_base(folder, read_note(folder).base_hash, base_hash)
        model = load_adapter_of(folder, config.model, base_hash)
        if model.foreign is not None:
            raise ConfigError(
                f"init_from: {folder} has {model.foreign}, which is not trained here; merge it with longspan "
                "merge and begin with that as model.path."
            )
        start = Start(folder, model.step, ())
        weights = AdapterWeights(model.trained)
        yield Source(start, weights, model.lora, model.rope, model.context, model.form, model.chat)
        return
    with CheckpointReader(folder) as reader:
        raw = reader.manifest.raw
        _same_base(folder, raw.get("base_hash"), base_hash)
        try:
            declared = raw["config"]
            lora = LoraConfig(**{**declared["lora"], "targets": tuple(declared["lora"]["targets"])})
            context = int(declared["model"]["context"])
            settings = RopeSettings(**used_rope(declared["model"]["rope"]))
            form = known_form(declared["model"].get("base", "bf16"))
            chat = format_of(raw.get("chat"))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: its manifest lacks what a run needs ({type(error).__name__}: {error}); name another."
            ) from None
        rope = plan_rope(read_arch(Path(config.model.path)), settings, context)
        start = Start(folder, reader.manifest.step, ())
        yield Source(start, CheckpointWeights(reader), lora, rope, context, form, chat)


def _same_base(folder: Path, found: Any, own: str) -> None:
    if found is not None and found != own:
        raise ConfigError(
            f"init_from: {folder} was trained on another base than model.path (hash {str(found)[:12]} there, "
            f"{own[:12]} here); point model.path at that one."
        )


def check_fits(source: Source, config: RunConfig, arch: LlamaArch, lora: LoraConfig, base: WeightSource) -> set[str]:
    """Refuse weights for which the run has no place; returns the names of those it takes.

    Raises:
        ConfigError: one sentence naming the setting to change.
    """
    folder, shapes = source.start.folder, source.weights.shapes()
    there, here = source.lora, lora
    if any(".lora_A." in name for name in shapes):
        if there.rank != here.rank:
            raise ConfigError(
                f"init_from: {folder} has adapters of rank {there.rank} and this run of rank {here.rank}; set "
                f"lora.rank: {there.rank}, or export it merged and begin with that as model.path."
            )
        if there.scale != here.scale:
            raise ConfigError(
                f"init_from: {folder} scales its adapters by {there.scale:g} and this run by {here.scale:g}; set "
                f"lora.alpha: {there.alpha:g} and lora.rslora: {str(there.rslora).lower()}."
            )
    own = {**hf_tensor_shapes(arch), **adapter_shapes(arch, lora)}
    kept = trained_names(arch, lora, config.train.trainable)
    taken = set()
    for name, shape in shapes.items():
        if name in VOCABULARY_HF and own.get(name, shape) != shape:
            raise ConfigError(
                f"init_from: {folder} has {shape[0]} vocabulary rows and this run {own[name][0]}; set model.vocab: "
                f"{shape[0]}."
            )
        if name in kept:
            if own[name] != shape:
                raise ConfigError(
                    f"init_from: {folder} has {name} of shape {shape} where this run has {own[name]}; the two are of "
                    "different models."
                )
            taken.add(name)
        elif not _is_base(source, name, shape, base, arch):
            setting = "lora.targets" if ".lora_" in name else "train.trainable"
            raise ConfigError(
                f"init_from: {folder} trained {name}, which this run would drop; add its kind to {setting}, or export "
                "it merged and begin with that as model.path."
            )
    return taken


def _is_base(source: Source, name: str, shape: tuple[int, ...], base: WeightSource, arch: LlamaArch) -> bool:
    """Whether a tensor that is not to train is the base's: PEFT keeps the output weights beside a grown embedding."""
    if name not in VOCABULARY_HF or name not in base.facts:
        return False
    own = grown_tensor(base, name, arch.vocab)
    return torch.equal(source.weights.read(name, None, 0, own.numel()), own.reshape(-1).float())


def other_form(source: Source, form: str) -> tuple[str, ...]:
    """A warning where the weights were trained beside a base kept otherwise than the run's."""
    if source.form == form:
        return ()
    return (
        f"init_from: {source.start.folder} was trained on model.base {source.form} and this run has {form}: its "
        "weights have yet to get used to how that one is rounded.",
    )


def other_positions(source: Source, rope: RopePlan) -> tuple[str, ...]:
    """A warning where the weights were trained with other rotary positions than the run's."""
    if source.rope == rope:
        return ()
    there = source.rope
    return (
        f"init_from: {source.start.folder} was trained with RoPE {there.type} x {there.factor:g} (context "
        f"{source.context}) and this run has {rope.type} x {rope.factor:g}: its weights have yet to get used to that.",
    )
