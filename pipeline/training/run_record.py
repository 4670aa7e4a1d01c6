"""A composed run, and the facts of it that a report or a reader needs (`<output>/run.json`)."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from parallel.world.groups import Groups
from pipeline.checkpoint.choose import Choice
from pipeline.config.run import RunConfig
from pipeline.config.yaml_file import dump_config
from pipeline.data.answer_ends import trained_format
from pipeline.data.card import MIXTURE_PAGE, mixture_lines, mixture_page
from pipeline.data.discovery import matches_of
from pipeline.data.document_ends import described
from pipeline.data.mixed import packing_line, shares_of
from pipeline.data.tokenizer import TextTokenizer
from pipeline.planning.balance import few_windows
from pipeline.planning.run_plan import RunPlan
from pipeline.planning.tensors import adapter_shapes, hf_tensor_shapes, to_ours
from pipeline.planning.trainable import kind_of, trained_names
from pipeline.reporting.lasting import optional_file
from pipeline.reporting.versions import versions
from pipeline.training.init_from import Start
from pipeline.training.trainer import Trainer


@dataclass(frozen=True)
class Run:
    """A composed run."""

    plan: RunPlan
    groups: Groups
    trainer: Trainer
    tokenizer: TextTokenizer
    resumed: Choice | None = None
    """The checkpoint it goes on from; None: it starts."""
    warnings: tuple[str, ...] = ()
    """What lies beside the base's weights and the text and is not read, one sentence each; of the main rank."""
    begun: Start | None = None
    """The trained weights it starts with; None: it resumes, or starts with the base's."""

    @property
    def config(self) -> RunConfig:
        """What the user asked for."""
        return self.plan.config

    @property
    def output(self) -> Path:
        """Folder of everything the run writes."""
        return Path(self.config.output)

    @cached_property
    def sources(self) -> list[dict[str, Any]]:
        """What each source of a mixture is; nothing of a single one."""
        config, windows = self.config, self.trainer.parts.loader.dataset
        drawn = config.train.steps * config.train.global_batch
        return [
            {**asdict(share), "times_read": drawn * share.share / share.windows}
            for share in shares_of(config.data.sources, windows)
        ]


def device_name() -> str:
    """The accelerator's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def git_commit() -> str | None:
    """Commit of the source tree this runs from, with a mark when it is modified; None outside a checkout."""
    root = Path(__file__).resolve().parent
    commands = (["git", "rev-parse", "--short=12", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        commit, changes = (
            subprocess.run(c, cwd=root, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
            for c in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + (" (modified)" if changes else "")


def parameter_counts(run: Run) -> dict[str, int]:
    """Parameters of the whole model: total, frozen, and each trainable kind."""
    model = run.trainer.parts.model
    shapes = {**hf_tensor_shapes(model.arch), **adapter_shapes(model.arch, model.lora)}
    counts: dict[str, int] = {}
    for name in trained_names(model.arch, model.lora, run.config.train.trainable):
        kind = kind_of(to_ours(name)[0])
        counts[kind] = counts.get(kind, 0) + math.prod(shapes[name])
    total = sum(math.prod(shape) for shape in shapes.values())
    return {"total": total, "frozen": total - sum(counts.values()), **counts}


def notes(config: RunConfig, step: int, shared: str = "") -> list[str]:
    """What the run's figures show and what they do not, as far as the configuration tells.

    Args:
        shared: what the evaluation text shares with the training text; empty: nothing was found.
    """
    tokens = step * config.train.global_batch * config.sequence
    found = [
        f"Trained on {tokens:,} tokens in sequences of {config.sequence:,} (one seed, {config.attention.kind} "
        "attention); LongLoRA's own recipe uses about 2 billion.",
        "Perplexity is measured with full attention.",
        "Perplexity says that distant text is tolerated and locally useful; it does not say that facts are retrieved "
        "from it.",
    ]
    if config.sequence < config.model.context:
        found.append(
            f"Sequences were shorter than the target context of {config.model.context:,}: what holds beyond "
            f"{config.sequence:,} tokens is carried by the stretched rotary positions, not by having trained there."
        )
    if config.eval.path is not None and shared:
        found[1] += f" It is not measured on held-out text: {shared}"
    elif config.eval.path is not None and not config.data.holds(config.eval.path):
        found[1] += (
            " No file of the evaluation text is among the training text, nor is a passage of it that was looked for; a "
            "pretrained model may still have seen it before."
        )
    return [*found, *config.warnings]


def starting_warnings(run: Run) -> list[str]:
    """What the data make doubtful, one sentence each."""
    windows, batch = run.trainer.parts.loader.windows, run.config.train.global_batch
    _, mixed = trained_format(store.manifest for store in run.trainer.parts.loader.dataset.stores)
    return [*([few_windows(windows, batch)] if windows < batch else []), *mixed]


def starting_line(run: Run) -> str:
    """What is about to be trained, on what, how often; with a line more for each pattern and each source."""
    config, parts = run.config, run.trainer.parts
    train, attention, windows = config.train, config.attention, parts.loader.windows
    rope, plan = parts.model.rope, run.groups.plan
    times = train.steps * train.global_batch / windows
    counts = parameter_counts(run)
    total, trained = counts.pop("total"), {kind: n for kind, n in counts.items() if kind != "frozen"}
    groups = f" in groups of {config.group:,}" if attention.kind == "s2" else ""
    chunks = "" if run.plan.stream is None else f", streamed in chunks of {run.plan.stream:,}"
    stretch = f" x {rope.factor:g}" if rope.factor != 1 else ""
    often = f", each read {times:.2g} times" if len(config.data.sources) == 1 else ""
    texts = [store.manifest.ends for store in parts.loader.dataset.stores if not store.manifest.chat]
    ends = "".join(f"; a document {described(*both, run.tokenizer.prompt_start)}" for both in dict.fromkeys(texts))
    line = (
        f"{train.steps:,} steps of {train.global_batch:,} windows of {config.sequence:,} tokens; the data hold "
        f"{windows:,}{often}{packing_line(parts.loader.dataset)}{ends}; {attention.kind} attention{groups}{chunks}; "
        f"RoPE {rope.type}{stretch}, base {rope.theta:,.0f}; of {total:,} parameters "
        + ", ".join(f"{n:,} {kind}" for kind, n in trained.items())
        + f" train; engine {config.parallel.engine}, tp {plan.tp} cp {plan.cp} pp {plan.pp} dp {plan.dp}"
    )
    named = [*config.data.named_sources.items(), ("eval.path", config.eval.path)]
    matches = [f"{name}: {told}" for name, path in named if path is not None and (told := matches_of(Path(path)))]
    return "\n".join([line, *matches, *mixture_lines(run.sources)])


def record_config(run: Run) -> None:
    """Write `<output>/config.yaml`: every setting, those that were derived too; of a mixture also its data card."""
    path = run.output / "config.yaml"
    with optional_file(path):
        path.write_text(dump_config(run.config))
    if run.sources:
        with optional_file(run.output / MIXTURE_PAGE):
            (run.output / MIXTURE_PAGE).write_text(mixture_page(run.sources), encoding="utf-8")


def record_run(run: Run, seconds: float | None = None, shared: str = "") -> None:
    """Write or extend `<output>/run.json`.

    Args:
        seconds: of this session, now ended: it is added to a list. None: the session begins.
        shared: see `notes`.
    """
    path = run.output / "run.json"
    facts: dict[str, Any] = {}
    if path.is_file():
        try:
            facts = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):  # cut off, by an earlier version or by hand: nothing a run depends on
            path.replace(path.with_name("run.json.damaged"))
    facts |= {
        "device": device_name(),
        "commit": git_commit(),
        "versions": versions(),
        "parameters": parameter_counts(run),
        "world_size": run.groups.plan.world_size,
        "dtype": str(run.trainer.parts.model.dtype).removeprefix("torch."),
        "step": run.trainer.step,
        "original_context": run.trainer.parts.model.rope.original_context,
        "base_context": run.plan.arch.max_positions,
        "notes": notes(run.config, run.trainer.step, shared),
        **({"sources": run.sources} if run.sources else {}),
        "changes": run.trainer.parts.manifest["changes"],
        "init_from": run.trainer.parts.manifest["init_from"],
    }
    if seconds is not None:
        facts.setdefault("sessions", []).append({"to_step": run.trainer.step, "seconds": round(seconds, 2)})
    temporary = path.with_name(".run.json.tmp")
    with optional_file(path):
        temporary.write_text(json.dumps(facts, indent=1))
        temporary.replace(path)
