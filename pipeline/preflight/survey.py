"""Is everything there that a run needs? Small checks on facts handed in, so that each is testable on any machine.

A check gives one `Finding`: what was found, what is needed and, if something is missing, one sentence saying what and
how to mend it. Here are those of the machine and `survey`, which runs all; `files` has those of the run's
files and settings, `tools.preflight` gathers the facts of a machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from glob import escape
from pathlib import Path

from parallel.errors import ConfigError
from pipeline.checkpoint.manifest import step_of
from pipeline.config.run import RunConfig
from pipeline.config.sections import FLASH
from pipeline.data.chat_settings import check_evaluated, check_source
from pipeline.data.discovery import find_texts
from pipeline.data.prepare import cache_name
from pipeline.data.shards import MANIFEST as SHARDS_MANIFEST
from pipeline.data.shards import is_prepared, token_dtype
from pipeline.planner.auto import Device
from pipeline.planning.memory import MemoryEstimate
from pipeline.preflight.files import (
    Finding,
    check_earlier_run,
    check_model,
    check_settings,
    check_text,
    check_tokenizer,
    check_writable,
    existing,
    gib,
)
from pipeline.preflight.layout import check_layout, faster, settle_layout
from pipeline.reporting.trackers import check_installed
from pipeline.reporting.versions import installed

SHARED_MEMORY = 128 * 2**20
"""/dev/shm bytes a process: NCCL puts its buffers between processes of one machine there."""
BYTES_A_TOKEN = 3
"""Of plain text; English has about four, so this overstates what the tokens take."""
COMPRESSION = 4
"""Plain bytes a byte of a compressed file."""


@dataclass(frozen=True)
class Gpu:
    """One CUDA device; bytes."""

    name: str
    total: int
    free: int
    capability: float
    """CUDA's compute capability."""


@dataclass(frozen=True)
class Machine:
    """What one machine has free; bytes."""

    gpus: tuple[Gpu, ...]
    host: int
    """Memory this job may still take, its control group's limit counted."""
    host_limit: str
    """Who sets that limit: the machine, or a control group (a container's or a batch system's)."""
    shared: int | None
    """Free in /dev/shm; None: there is no such folder."""


@dataclass(frozen=True)
class Launch:
    """How many processes are to start."""

    processes: int
    """On this machine."""
    nodes: int = 1


def check_gpus(gpus: Sequence[Gpu], processes: int) -> Finding:
    """One GPU a process."""
    kinds = sorted({gpu.name for gpu in gpus})
    found = f"{len(gpus)} ({', '.join(kinds)})" if gpus else "none"
    problem = ""
    if not gpus:
        problem = (
            f"GPUs: PyTorch sees none, and {processes} are needed; start on a GPU machine (check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES), or try the same settings on this one: longspan tiny-run (a script: --tiny). A "
            "small model trains without any: longspan train --device cpu."
        )
    elif len(gpus) < processes:
        problem = (
            f"GPUs: {processes} processes need one each and {len(gpus)} are visible; pass --nproc {len(gpus)}, or "
            "check CUDA_VISIBLE_DEVICES."
        )
    return Finding("GPUs", found, str(processes), problem)


def check_gpu_memory(gpus: Sequence[Gpu], processes: int, estimate: MemoryEstimate) -> Finding:
    """The GPU that has least free memory of those used, against the estimate."""
    need = estimate.gpu_total
    used = list(enumerate(gpus))[:processes]
    if not used:
        return Finding("GPU memory", "no GPU", gib(need) + " each")
    index, least = min(used, key=lambda item: item[1].free)
    problem = ""
    if least.total < need:
        largest = max(estimate.gpu, key=lambda part: estimate.gpu[part])
        problem = (
            f"GPU memory: a GPU needs about {gib(need)} (most of it {largest}, {gib(estimate.gpu[largest])}) and GPU "
            f"{index} has {gib(least.total)}; {_smaller(largest)}."
        )
    elif least.free < need:
        problem = (
            f"GPU memory: GPU {index} has {gib(least.free)} free of {gib(least.total)} and needs about {gib(need)}; "
            "end the other processes on it (nvidia-smi lists them)."
        )
    return Finding("GPU memory", f"{gib(least.free)} free of {gib(least.total)}", gib(need) + " each", problem)


def _smaller(part: str) -> str:
    """What shrinks the largest part of the estimate."""
    if part == "frozen weights":
        return "set parallel.engine: zero3, or raise parallel.tp"
    if part == "frozen weights, shard":
        return "set parallel.offload.params: cpu, or use more GPUs"
    if part == "activations":
        return "set train.recompute: auto, or train.recompute: full for the least there is"
    if part == "halos' gradients":
        return "lower attention.group_size or train.micro_batch"
    return "raise parallel.cp (each rank then holds fewer tokens), or lower data.sequence"


def check_host_memory(host: int, limit: str, processes: int, estimate: MemoryEstimate) -> Finding:
    """All of this machine's processes, and what saving gathers."""
    need = estimate.host_total(processes)
    problem = ""
    if host < need:
        each = " + ".join(f"{gib(size)} {part}" for part, size in estimate.host.items())
        mend = "give the job more memory"
        largest = max(estimate.host, key=lambda part: estimate.host[part])
        if largest == "parked halos":
            mend += f" ({gib(need - host)} more), or raise train.stream: fewer chunks park fewer halos"
        elif largest == "evaluation's keys and values":
            mend += f" ({gib(need - host)} more), or lower eval.lengths and eval.ruler_lengths"
        elif len(estimate.host) > 1:  # something is offloaded
            mend += ", spread it over more nodes, or set parallel.offload to none where the GPUs have room"
        problem = (
            f"Host memory: {processes} processes need about {gib(need)} ({each}; each) and {limit} leaves {gib(host)}; "
            f"{mend}."
        )
    return Finding("Host memory", f"{gib(host)} ({limit})", gib(need), problem)


def check_shared_memory(free: int | None, processes: int) -> Finding:
    """/dev/shm, which a container's default of 64 MiB is too small for."""
    need = SHARED_MEMORY * processes if processes > 1 else 0
    found = "none" if free is None else gib(free)
    problem = ""
    if (free or 0) < need:
        problem = (
            f"/dev/shm: NCCL needs about {gib(need)} there for {processes} processes and {found} is free; start the "
            "container with --ipc=host or --shm-size=8g."
        )
    return Finding("/dev/shm", found, gib(need), problem)


@dataclass(frozen=True)
class Space:
    """A folder, what will be written there and what its file system has free; bytes."""

    what: str
    folder: Path
    need: int
    free: int
    device: int
    """Which file system."""


def check_packages(config: RunConfig) -> list[Finding]:
    """Packages that settings ask for and that are not always there."""
    asked: list[tuple[str, tuple[str, ...], str, str]] = []
    if config.model.family == "te":
        asked.append(("Transformer Engine", ("transformer-engine",), "model.family: te", "model.family: local"))
    if (backend := config.attention.backend) in FLASH:
        asked.append(("flash-attn", FLASH[backend], f"attention.backend: {backend}", "attention.backend: auto"))
    findings = []
    for name, packages, setting, instead in asked:
        found, problem = [text for package in packages if (text := installed(package))], ""
        if not found:
            problem = (
                f"{name}: {setting} needs it, and it is not installed; install it beside a GPU (docs/LAUNCH.md), or "
                f"set {instead}."
            )
        findings.append(Finding(name, ", ".join(found) or "none", "any", problem))
    if config.report_to:
        problem = ""
        try:
            check_installed(config.report_to)
        except ConfigError as error:
            problem = str(error)
        findings.append(Finding("Trackers", ", ".join(config.report_to), "installed", problem))
    return findings


def check_disk(spaces: Sequence[Space]) -> list[Finding]:
    """Every file system against all that will be written to it."""
    findings = []
    for device in dict.fromkeys(space.device for space in spaces):
        here = [space for space in spaces if space.device == device]
        need, free = sum(space.need for space in here), here[0].free
        parts = " + ".join(f"{gib(space.need)} {space.what}" for space in here)
        problem = ""
        if free < need:
            problem = (
                f"Disk: {here[0].folder} needs about {gib(need)} ({parts}) and has {gib(free)} free; free space, or "
                "set output and data.cache to another disk."
            )
        findings.append(Finding(f"Disk at {here[0].folder}", f"{gib(free)} free", parts, problem))
    return findings


def checkpoint_bytes(config: RunConfig, estimate: MemoryEstimate) -> int:
    """Bytes that checkpoints will still take: those kept and the one being written, less what is there."""
    folder = Path(config.output) / "checkpoints"
    there = sum(step_of(path.name) is not None for path in folder.iterdir()) if folder.is_dir() else 0
    return max(1, config.save.keep + 1 - there) * estimate.checkpoint


def token_bytes(sources: Sequence[Path], cache: Path, vocab: int, text_field: str = "text") -> int:
    """Bytes of tokens that raw text will be prepared into; text that has a folder in the cache takes none."""
    need = 0
    for source in sources:
        # The cache's names also hold a hash of the tokenizer, which is not opened here.
        if is_prepared(source) or any(cache.glob(f"{escape(cache_name(source))}-*/{SHARDS_MANIFEST}")):
            continue
        for file in find_texts(source, text_field).files:
            plain = COMPRESSION if file.compressed else 1
            need += file.path.stat().st_size * plain // BYTES_A_TOKEN * (2 if token_dtype(vocab) == "uint16" else 4)
    return need


def _space(what: str, folder: Path, need: int) -> Space:
    place = existing(folder)
    return Space(what, place, need, shutil.disk_usage(place).free, place.stat().st_dev)


def survey(config: RunConfig, launch: Launch, machine: Machine, verify: Callable[[Path], int]) -> list[Finding]:
    """Every check that the facts allow, in the order of the table; memory waits for a readable model.

    Args:
        verify: see `check_model`.
    """
    world = launch.processes * launch.nodes
    finding, stored = check_model(Path(config.model.path), verify)
    files, model = [finding], None
    device = None
    if machine.gpus:
        least = min(machine.gpus, key=lambda gpu: gpu.total)
        device = Device(least.name, least.total, launch.processes, machine.host, least.capability)
    config, chosen = settle_layout(config, stored, device, world)
    if stored is not None:
        settings, model = check_settings(config.model, stored)
        files.append(settings)
    layout, plan = (chosen, None) if chosen and chosen.problem else check_layout(config, model, world, device)
    if plan is not None and stored is not None and device is not None and not any(f.problem for f in files):
        layout = replace(layout, advice=(*layout.advice, *faster(plan, stored, device, chosen)))
    field = config.data.text_field
    batch = config.train.global_batch
    sources = config.data.named_sources
    # How many windows a step draws from one of several depends on their sizes.
    drawn = batch if len(sources) == 1 else 0
    texts = [
        check_text(name, Path(path), config.sequence, field, drawn, partial(check_source, config))
        for name, path in sources.items()
    ]
    if config.eval.path is not None:
        longest = max(config.eval_lengths)
        held_out = partial(check_evaluated, config, tasks=config.eval.tasks)
        texts.append(check_text("eval.path", Path(config.eval.path), longest, field, fits=held_out))
    findings = [check_gpus(machine.gpus, launch.processes), *check_packages(config), layout]
    if plan is not None:
        estimate = plan.memory()
        findings.append(check_gpu_memory(machine.gpus, launch.processes, estimate))
        findings.append(check_host_memory(machine.host, machine.host_limit, launch.processes, estimate))
    findings += [check_shared_memory(machine.shared, launch.processes), *files]
    if config.data.tokenizer is not None or Path(config.model.path).is_dir():
        rows = None if model is None else model[0].vocab
        findings.append(check_tokenizer(Path(config.data.tokenizer or config.model.path), rows))
    findings += [*texts, check_writable(Path(config.output)), check_earlier_run(config)]
    if plan is not None:
        cache = Path(config.data.cache or Path(config.output) / "data")
        named = [Path(path) for path in (*sources.values(), config.eval.path) if path is not None]
        good = [path for path, finding in zip(named, texts, strict=True) if not finding.problem]
        findings += check_disk(
            [
                _space("checkpoints", Path(config.output), checkpoint_bytes(config, estimate)),
                _space("tokens", cache, token_bytes(good, cache, plan.arch.vocab, field)),
            ]
        )
    return findings
