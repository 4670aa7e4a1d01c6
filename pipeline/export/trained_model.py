"""A base model and what was trained on it: where every export begins, whichever form the training came in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from parallel.errors import CheckpointError, ConfigError
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.tensors import whole_trained
from pipeline.config.hub import MODEL, local_folder, not_there
from pipeline.config.rope import RopeSettings, used_rope
from pipeline.config.sections import BASES, LoraConfig
from pipeline.data.answer_ends import ChatFormat, format_of
from pipeline.export.adapter_kinds import (
    EMBEDDING_FACTORS,
    FACTORS,
    MAGNITUDE,
    VOCABULARY_MODULES,
    Own,
    add_delta,
    factor_names,
    own_shapes,
)
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.hf.companions import (
    add_pad_token,
    check_vocabulary,
    copy_companions,
    has_tokenizer,
    set_answer_ends,
    set_chat_template,
    tokenizer_size,
    without_code,
)
from pipeline.hf.vocabulary import VOCABULARY_HF, grown_tensor
from pipeline.planning.arch import LlamaArch, read_arch
from pipeline.planning.rope import ROPE_KEYS, RopePlan, hf_rope_fields, original_context, plan_rope
from pipeline.planning.run_plan import check_growth
from pipeline.planning.tensors import adapter_shapes, hf_tensor_shapes
from pipeline.storage.json_file import read_object
from pipeline.storage.safetensors import SafetensorsFile

PAD_TOKEN = "[PAD]"
MERGE_ELEMENTS = 1 << 25
"""Weights merged at a time: bounds the fp32 copies of a large matrix to a few times 128 MiB."""


class ShapedTensors(Mapping[str, torch.Tensor]):
    """Tensors whose shapes are known without making or reading them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of them."""
        raise NotImplementedError


def shape_of(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...]:
    """Shape of one of them, without reading it where it lies in a file."""
    return tensors.shape(name) if isinstance(tensors, ShapedTensors) else tuple(tensors[name].shape)


class LazyTensors(ShapedTensors):
    """Tensors of safetensors files, read when asked for; the files may be deleted meanwhile (a running run does).

    Args:
        files: paths; a tensor stands in one of them.
        rename: name in the file -> name here.

    Raises:
        CheckpointError: a file is missing, damaged, or two hold the same tensor.
    """

    def __init__(self, files: list[Path], rename: Mapping[str, str] | None = None) -> None:
        self._where: dict[str, tuple[SafetensorsFile, str]] = {}
        for path in files:
            file = SafetensorsFile(path)
            for stored in file.facts:
                name = stored if rename is None else rename.get(stored, stored)
                if name in self._where:
                    raise CheckpointError(f"{path}: holds {name}, which another file holds too; export it again.")
                self._where[name] = file, stored

    def __getitem__(self, name: str) -> torch.Tensor:
        file, stored = self._where[name]
        return file.tensor(stored)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        file, stored = self._where[name]
        return file.facts[stored].shape


@dataclass(frozen=True)
class TrainedModel:
    """A base model and what was trained on it, all that an export needs."""

    base: Path
    """Hugging Face folder."""
    base_hash: str
    arch: LlamaArch
    """Of the result: its vocabulary may have more rows than the base's."""
    rope: RopePlan
    context: int
    """Tokens the result declares."""
    lora: LoraConfig
    trained: Mapping[str, torch.Tensor]
    """Canonical names -> tensors, as in a checkpoint."""
    step: int
    source: Path | None = None
    """The checkpoint or adapter folder."""
    tokenizer: Path | None = None
    """A folder, or sentencepiece model, whose tokenizer was trained with; None, or without one: the base's was."""
    names_pad: bool = True
    """One added row that no token names is LongLoRA's `[PAD]`; False: whose it is, is not known."""
    warnings: tuple[str, ...] = ()
    """What was passed over when this was read, one sentence each; for the user's eyes."""
    form: str = "bf16"
    """How the base's matrices were kept in training (model.base). A merge is into those of the checkpoint all the same:
    what was trained is added to them, not to what they were rounded to."""
    strength: float = 1.0
    """How much of the training is left in `trained`; see `part_way`."""
    chat: ChatFormat | None = None
    """Of the conversations it was trained on; None: text alone, or not told."""
    own: Mapping[str, Own] = field(default_factory=dict)
    """Module -> rank and scale of its adapter, where they are not `lora`'s; adapters of others have such."""

    def __post_init__(self) -> None:
        allowed = hf_tensor_shapes(self.arch) | adapter_shapes(self.arch, self.lora)
        allowed |= own_shapes(self.arch, self.own, self.dora)
        for name in self.trained:
            shape = self.shape(name)
            if name not in allowed:
                raise CheckpointError(f"{name}: the checkpoint trained it, but base {self.base} has no place for it.")
            if shape != allowed[name]:
                raise CheckpointError(
                    f"{name}: has shape {shape} in the checkpoint and {allowed[name]} by its config and "
                    f"base {self.base}; give the base it was trained on."
                )
            partner = partner_of(name)
            if partner is not None and partner not in self.trained:
                raise CheckpointError(f"{partner}: is missing beside {name}; the checkpoint is incomplete.")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a trained tensor, without reading it where it lies in a file."""
        return shape_of(self.trained, name)

    @property
    def adapters(self) -> list[str]:
        """Canonical names of the adapters' tensors, sorted."""
        return sorted(name for name in self.trained if partner_of(name) is not None)

    @property
    def dora(self) -> list[str]:
        """Modules whose adapters have magnitudes."""
        return sorted(name.removesuffix(MAGNITUDE) for name in self.trained if name.endswith(MAGNITUDE))

    @property
    def foreign(self) -> str | None:
        """What of the adapters Longspan merges and does not train; None: nothing."""
        if self.dora:
            return "DoRA"
        if self.own:
            module = min(self.own)
            return (
                f"an adapter on {module}" if module in VOCABULARY_MODULES else "ranks or alphas that differ by module"
            )
        return None

    @property
    def grown(self) -> bool:
        """The vocabulary has rows the base lacks."""
        return self.arch.vocab != read_arch(self.base).vocab

    def changes(self, name: str) -> bool:
        """Arithmetic or replacement happens to this base tensor."""
        factor = factor_names(name.removesuffix(".weight"))[0]
        return name in self.trained or factor in self.trained or (name in VOCABULARY_HF and self.grown)

    def base_tensor(self, checkpoint: HfCheckpoint, name: str) -> torch.Tensor:
        """A tensor of the base as training began: with rows for added tokens."""
        return grown_tensor(checkpoint, name, self.arch.vocab)

    def merged(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """A base tensor after training, in the base's dtype; W + scale B A is added up in fp32, some rows at a time."""
        if name in self.trained:
            # PEFT keeps the matrix beside an adapter of it.
            base = self.trained[name].to(base.dtype)
        module = name.removesuffix(".weight")
        factors = factor_names(module)
        if factors[0] not in self.trained:
            return base
        right, left = (self.trained[factor].float() for factor in factors)
        if module == "model.embed_tokens":
            left, right = right.t(), left.t()
        scale = self.own[module].scale if module in self.own else self.lora.scale
        magnitude = self.trained[module + MAGNITUDE].float() if module + MAGNITUDE in self.trained else None
        result = torch.empty_like(base)
        rows = max(1, MERGE_ELEMENTS // base.shape[1])
        for start in range(0, len(base), rows):
            part = slice(start, start + rows)
            lengths = None if magnitude is None else magnitude[part]
            result[part] = add_delta(base[part], left[part], right, scale, lengths).to(base.dtype)
        return result


def partner_of(name: str) -> str | None:
    """The other factor of an adapter; None for other tensors."""
    for pair in (FACTORS, EMBEDDING_FACTORS):
        for one, other in (pair, pair[::-1]):
            if name.endswith(one):
                return name.removesuffix(one) + other
    return None


def find_base(recorded: str, given: Path | None) -> Path:
    """The base model's folder.

    Raises:
        CheckpointError: it is not there.
    """
    # An adapter of others names its base as the Hub does.
    folder = Path(given) if given is not None else Path(local_folder(recorded, MODEL))
    if not folder.is_dir():
        hub = not_there(str(folder), MODEL)
        raise CheckpointError(f"{folder}: the base model is not there; say where it lies with --base{hub}.")
    return folder


def wrong_base(folder: Path, what: Path, found: str, expected: str) -> CheckpointError:
    """The base model is another one than `what` was trained on."""
    return CheckpointError(
        f"{folder}: is not the base {what} was trained on (hash {found[:12]}, expected {expected[:12]}); "
        "give that one with --base."
    )


def load_trained_model(checkpoint: Path, base: Path | None = None, original: int | None = None) -> TrainedModel:
    """Read a checkpoint folder, verified against its checksums, and check that the base is the one it was trained on.

    The run may go on meanwhile: what was opened stays readable when the run deletes old checkpoints.

    Args:
        base: where the base model lies now; None takes the path the run recorded.
        original: original context, tokens, where neither the run's settings nor the base tell it.

    Raises:
        CheckpointError: the checkpoint is damaged, or the base is missing or another model.
        ConfigError: the original context is not given, or given otherwise by the run.
    """
    manifest = read_manifest(checkpoint).raw
    try:
        config = manifest["config"]
        model, lora = config["model"], config["lora"]
        rope = RopeSettings(**used_rope(model["rope"]))
        adapters = LoraConfig(**{**lora, "targets": tuple(lora["targets"])})
        context, recorded, expected = int(model["context"]), str(manifest["base"]), str(manifest["base_hash"])
        vocab, named = model.get("vocab"), config.get("data", {}).get("tokenizer")
        form = known_form(model.get("base", "bf16"))
        chat = format_of(manifest.get("chat"))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}: its manifest lacks what an export needs ({type(error).__name__}: {error}); export another "
            "checkpoint."
        ) from None
    # Opened before the base is hashed, which takes minutes: by then the run may have deleted the checkpoint.
    trained = whole_trained(checkpoint)
    folder = find_base(recorded, base)
    base_weights = HfCheckpoint(folder)
    found = base_weights.base_hash()
    if found != expected:
        raise wrong_base(folder, checkpoint, found, expected)
    arch = grown_arch(folder, vocab, "model.vocab")
    if original is not None:
        known = original_context(arch, rope.original_context)
        if known not in (None, original):
            raise ConfigError(f"model.rope.original_context: {original} is not the {known} of training; leave it out.")
        rope = replace(rope, original_context=original)
    plan = plan_rope(arch, rope, context)
    tokenizer = None if named is None else Path(str(named))
    warnings = base_weights.warnings
    if tokenizer is not None and not has_tokenizer(tokenizer):
        warnings += (f"data.tokenizer: {tokenizer} is gone, so the base's tokenizer is copied instead.",)
    model = TrainedModel(
        folder,
        expected,
        arch,
        plan,
        context,
        adapters,
        trained,
        int(manifest["step"]),
        checkpoint,
        tokenizer,
        # Rows for another tokenizer's tokens are that one's.
        names_pad=tokenizer is None,
        warnings=warnings,
        form=form,
        chat=chat,
    )
    check_tokenizer(model)
    return model


def known_form(declared: Any) -> str:
    """model.base as a manifest or an adapter's note tells it. ValueError: there is no such form."""
    if declared not in BASES:
        raise ValueError(f"model.base is {declared!r}")
    return str(declared)


def grown_arch(folder: Path, vocab: int | None, where: str) -> LlamaArch:
    """The base's architecture, with `vocab` rows.

    Raises:
        ConfigError: fewer rows than the base has.
    """
    arch = read_arch(folder)
    if vocab is None:
        return arch
    check_growth(arch.vocab, vocab, where)
    return replace(arch, vocab=vocab)


def extended_config(model: TrainedModel) -> dict[str, Any]:
    """config.json of the base with the new RoPE, context and vocabulary, readable by transformers 4 and 5."""
    config = without_code(read_object(model.base / "config.json"))
    kept = {key: value for key, value in config.items() if key not in ROPE_KEYS}
    return {**kept, **hf_rope_fields(model.rope, model.arch, model.context), "vocab_size": model.arch.vocab}


def check_tokenizer(model: TrainedModel) -> None:
    """Refuse a model whose tokenizer, where one comes along, has more tokens than it has rows, as training does.

    Raises:
        CheckpointError: it has, or a tokenizer file is damaged.
    """
    own = model.tokenizer is not None and has_tokenizer(model.tokenizer)
    place = model.tokenizer if own and model.tokenizer is not None else model.base
    mend = "use the tokenizer that was trained with, or give its rows with the adapter (embed_tokens and lm_head)"
    check_vocabulary(place, model.arch.vocab, mend)


def companions(model: TrainedModel, folder: Path) -> None:
    """Put tokenizer and generation files into an export; see `TrainedModel.names_pad`.

    After conversations these are told how the model is asked, and at which tokens it stops.

    Raises:
        CheckpointError: the tokenizer has more tokens than the model rows, or a file is damaged.
    """
    check_tokenizer(model)
    copy_companions(model.base, folder, model.context, model.tokenizer)
    if model.chat is not None:
        set_chat_template(folder, model.chat.template)
        set_answer_ends(folder, model.base, model.chat.ends)
    one_more = model.arch.vocab == read_arch(model.base).vocab + 1
    if model.names_pad and one_more and tokenizer_size(folder) == model.arch.vocab - 1:
        add_pad_token(folder, PAD_TOKEN)
