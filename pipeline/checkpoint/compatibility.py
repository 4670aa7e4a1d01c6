"""Whether a run may go on from a checkpoint: the same base model, data and mathematics, but for what `resume.allow`
names. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError, ConfigError
from pipeline.checkpoint.choose import candidates
from pipeline.checkpoint.manifest import Manifest, read_manifest
from pipeline.config.resume import MAY_CHANGE
from pipeline.config.rope import RopeSettings, used_rope
from pipeline.config.run import RunConfig
from pipeline.config.sections import S2_SETTINGS, AttentionConfig
from pipeline.config.yaml_file import config_dict, defaults
from pipeline.planning.arch import read_arch
from pipeline.planning.rope import plan_rope
from pipeline.storage.durable import Damaged

FREE_TO_CHANGE = (
    "output",
    "save.",
    "eval.",
    "parallel.",
    "train.steps",
    "train.micro_batch",
    "train.recompute",
    "train.gate_up",
    "train.gpu_gib",
    "train.without",
    "train.stream",
    "train.bad_steps",
    "train.rerun_spikes",
    "checks",
    "report_to",
    "attention.backend",
    "attention.full_last_steps",
    "data.cache",
    "data.path",
    "data.tokenizer",
    "data.bos",
    "data.eos",
    "model.path",
    "model.family",
    "model.rope.replace",
    "resume.",
    "init_from",
)
"""Settings a resumed run may change: where things live and how fast they run, never what is computed. The data and the
base model are compared by content (fingerprint, base hash), so that a folder may move."""
RECORDED = ("train.steps", "attention.full_last_steps")
"""Of these, what has a part in the result: a change is recorded."""
ROPE = "model.rope."
OF_S2 = (*S2_SETTINGS, "full_last_steps")
"""Settings of `attention` that change nothing where all steps have full attention."""
DERIVED = ("attention.group_size", "data.sequence", "train.lr_embed_norm")
"""Settings that None derives from others; compared as what comes of them."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a nested config dict."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


@dataclass(frozen=True)
class Change:
    """A setting that differs between a checkpoint and the run that goes on from it."""

    setting: str
    """Dotted."""
    old: Any
    new: Any

    def at(self, step: int) -> dict[str, Any]:
        """As manifests and reports keep it."""
        return {"step": step, **asdict(self)}

    def sentence(self, step: int) -> str:
        """For the display."""
        after = ""
        if self.setting in DATA:
            after = "; the training data are other ones, and are read from their beginning"
        return f"resume: {self.setting} was {self.old!r} and is {self.new!r} from step {step} on{after}."


DATA = ("data.path", "data.sequence", "data.text_field")
"""Settings whose change makes the training windows other ones."""


@dataclass(frozen=True)
class DataStart:
    """From where on the place in the data is a function of the step alone: see `sequences`."""

    step: int = 0
    read: int = 0
    """Sequences of the present data that had been read at that step."""

    def sequences(self, step: int, global_batch: int) -> int:
        """Sequences of the present data read after `step` optimizer steps."""
        return self.read + (step - self.step) * global_batch

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> DataStart:
        """As a manifest tells; releases that do not began at the beginning. KeyError, TypeError: it is damaged."""
        declared = manifest.get("data_start")
        return cls() if declared is None else cls(int(declared["step"]), int(declared["read"]))

    def after(self, manifest: Mapping[str, Any], step: int, changes: Sequence[Change]) -> DataStart:
        """Where a run goes on that resumes at `step` under changed settings."""
        changed = {change.setting for change in changes}
        if changed & {*DATA}:
            return DataStart(step, 0)
        if "train.global_batch" in changed:
            return DataStart(step, self.sequences(step, int(manifest["config"]["train"]["global_batch"])))
        return self


def check_cursor(manifest: Manifest) -> None:
    """Refuse a checkpoint whose place in the data is not that of its step: the order is a function of seed and step.

    Raises:
        CheckpointError: the two disagree.
    """
    cursor = manifest.raw.get("cursor")
    if manifest.format > 1 and cursor != data_cursor(manifest.step, manifest.raw["config"], _start(manifest)):
        raise CheckpointError(
            f"{manifest.folder}: its data cursor {cursor} is not that of step {manifest.step}; resume from another one."
        )


def _start(manifest: Manifest) -> DataStart:
    try:
        return DataStart.of(manifest.raw)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{manifest.folder}: data_start is {manifest.raw['data_start']!r}, which is no place in the data; resume "
            "from another one."
        ) from None


def data_cursor(step: int, config: Mapping[str, Any], start: DataStart) -> dict[str, int]:
    """What is read of the data after `step` steps: sequences in all."""
    return {"step": step, "sequences": start.sequences(step, int(config["train"]["global_batch"]))}


def resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys of a nested config dict as they take effect: what None derives derived, what has no effect None.

    A setting the checkpoint's release did not know yet had the effect of its default.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, ConfigError: this is no run's configuration.
    """
    flat = defaults() | flatten(config)
    flat["data.sequence"] = flat["data.sequence"] or flat["model.context"]
    if flat["attention.kind"] == "full":
        flat |= {f"attention.{name}": None for name in OF_S2}
    else:
        whole = AttentionConfig(group_fraction=flat["attention.group_fraction"])
        flat["attention.group_size"] = flat["attention.group_size"] or whole.group_tokens(flat["data.sequence"])
        flat["attention.group_fraction"] = None
    flat["train.lr_embed_norm"] = flat["train.lr_embed_norm"] or flat["train.lr"]
    rope = _rope(flat)
    used = used_rope(rope)
    return flat | {f"{ROPE}{name}": used.get(name) for name in rope}


def _forget_spelling(old: Mapping[str, Any], new: dict[str, Any], current: Mapping[str, Any]) -> None:
    """Where a base makes the same of both runs' model settings, write the new ones as the old ones were written.

    Both are of the same base, or its hash tells. Where it is not there to be read they stay as they are.
    """
    try:
        stored = read_arch(Path(current["model"]["path"]))
        plans = [plan_rope(stored, RopeSettings(**_rope(side)), side["model.context"]) for side in (old, new)]
    except (KeyError, TypeError, ConfigError):
        return
    if plans[0] == plans[1]:
        new |= {key: value for key, value in old.items() if key.startswith(ROPE)}
    if (old["model.vocab"] or stored.vocab) == (new["model.vocab"] or stored.vocab):
        new["model.vocab"] = old["model.vocab"]


def _rope(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `model.rope` by their names there."""
    return {key.removeprefix(ROPE): value for key, value in flat.items() if key.startswith(ROPE)}


def _follows(key: str, old: Mapping[str, Any], new: Mapping[str, Any], spelled: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a difference only follows from that of another setting, which is judged by itself."""
    if (
        key == "attention.group_size"
        and spelled[0]["attention.group_fraction"] != spelled[1]["attention.group_fraction"]
    ):
        return False
    if key in DERIVED and spelled[0][key] is None and spelled[1][key] is None:
        return True
    of_s2 = key.removeprefix("attention.") in OF_S2 and key.startswith("attention.")
    return of_s2 and old["attention.kind"] != new["attention.kind"]


class OtherSetting(ConfigError):
    """A setting is not the checkpoint's, and changes what is computed.

    Args:
        sentence: for whoever would go on with the run.
        found: which setting, and both values, for others; without a period.
    """

    def __init__(self, sentence: str, found: str) -> None:
        super().__init__(sentence)
        self.found = found


def check_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[Change]:
    """Refuse to continue a run under settings that change what is computed, but for those `resume.allow` names.

    Args:
        saved: nested configuration of the checkpoint.
        current: of this run.

    Returns:
        The changes that are allowed and have a part in the result.

    Raises:
        OtherSetting: names the first setting that differs, both values, and the way out.
        CheckpointError: `saved` is no run's configuration.
    """
    try:
        old = resolved(saved)
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"Resume: the checkpoint's manifest does not hold a run's configuration ({type(error).__name__}: {error}); "
            "resume from another one, or choose another output folder."
        ) from None
    new = resolved(current)
    _forget_spelling(old, new, current)
    spelled = [defaults() | flatten(side) for side in (saved, current)]
    allowed, changes = {*new["resume.allow"]}, []
    if "attention.group_fraction" in allowed:  # compared as the tokens it makes
        allowed.add("attention.group_size")
    # What is derived comes after what it is derived from, so that the setting that was changed is named.
    for key in sorted(old.keys() | new.keys(), key=lambda key: (key in DERIVED, key)):
        if old.get(key) == new.get(key):
            continue
        bends = key == "train.steps" and "cosine" in (old.get("train.schedule"), new.get("train.schedule"))
        free = key.startswith(FREE_TO_CHANGE) and not bends
        if not free and key not in allowed and not _follows(key, old, new, spelled):
            why = "bends a cosine schedule half-way" if bends else "changes what is computed"
            mend, begin = "", ""
            if key in MAY_CHANGE:
                mend = f"set resume.allow: [{key}], "
                begin = f" (a new run begins with these weights by init_from: {current.get('output')})"
            raise OtherSetting(
                f"Resume: {key} was {old.get(key)!r} in the checkpoint and is {new.get(key)!r} now, which {why}; "
                f"restore it, {mend}or choose another output folder{begin}.",
                f"{key}: was {old.get(key)!r} in the checkpoint and is {new.get(key)!r} here",
            )
        if not free or key in RECORDED:
            changes.append(Change(key, old.get(key), new.get(key)))
    return changes


def check_resumable(manifest: Mapping[str, Any], current: Mapping[str, Any]) -> list[Change]:
    """Refuse to continue a run on another base or other data, or under settings that change what is computed.

    Args:
        manifest: of the checkpoint; holds `config` (nested), `base_hash`, `data_fingerprint`.
        current: the same three keys for this run.

    Returns:
        What changed, where that is allowed; see `check_settings`.

    Raises:
        ConfigError, CheckpointError: see `check_settings`.
    """
    if manifest.get("base_hash") != current["base_hash"]:
        raise ConfigError(
            "Resume: the base model is not the one the checkpoint was trained on (base_hash differs); restore it, or "
            "choose another output folder."
        )
    changes = check_settings(manifest.get("config", {}), current["config"])
    if manifest.get("data_fingerprint") != current["data_fingerprint"]:
        if not {change.setting for change in changes} & {*DATA}:
            sides = (manifest.get("config", {}), current["config"])
            paths = [flatten(side).get("data.path") for side in sides]
            if "data.path" not in resolved(current["config"])["resume.allow"]:
                raise ConfigError(
                    "Resume: the training data is not the one the checkpoint was trained on (data_fingerprint "
                    "differs); restore it, set resume.allow: [data.path], or choose another output folder (a new run "
                    f"begins with these weights by init_from: {current['config'].get('output')})."
                )
            changes.append(Change("data.path", *paths))
    return changes


def check_output(config: RunConfig) -> Path | None:
    """Hold the settings against those of the newest checkpoint in `output`; nothing but its manifest is read.

    What takes long, the checksums and the base's hash, is left to the run. A checkpoint whose manifest is damaged is
    passed over, as the run will.

    Returns:
        The checkpoint's folder, None where there is none.

    Raises:
        ConfigError, CheckpointError: see `check_settings`; the run went beyond `train.steps` already; or the checkpoint
            is of another release's format.
    """
    for folder in candidates(Path(config.output) / "checkpoints"):
        try:
            manifest = read_manifest(folder)
        except Damaged:
            continue
        check_settings(manifest.raw.get("config", {}), config_dict(config))
        if manifest.step > config.train.steps:
            raise ConfigError(
                f"train.steps: {config.train.steps} is less than the {manifest.step} steps done in {config.output}; "
                "raise it, or choose another output."
            )
        return folder
    return None
