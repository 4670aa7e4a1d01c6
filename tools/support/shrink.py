"""A run's configuration made tiny, with every option and axis kept: what `tools.doctor` and `tools.tiny_run` run on CPU
processes.

Kept: engine, offload, tp, cp, pp, virtual; attention kind, shifted heads, wrap, share of a group in the sequence; RoPE
as it is (the context stays, only the sequences are short); LoRA rank, scale, targets; what trains; recompute; document
masks; schedule; of the model: query heads a KV head, tied or untied, biases. Made awkward on purpose: a sequence that
is no multiple of the shards, groups that cross them, layers that do not divide over the stages, a vocabulary that does
not divide over tp. No torch: a wrong configuration is told at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError
from parallel.world.grid import plan_grid
from pipeline.config.evaluation import EvalConfig
from pipeline.config.parallel import ParallelConfig
from pipeline.config.run import RunConfig
from pipeline.config.sections import DataConfig, SaveConfig
from pipeline.planning.arch import ARCHITECTURES, LlamaArch, read_arch
from pipeline.planning.base_form import UNIT
from pipeline.planning.run_plan import plan_chunks
from tools.support.shapes import llama2

VOCAB = 131
"""Prime: no tp divides it."""
TOKENS = 120
"""Tokens the data uses; the vocabulary's last rows are only ever negatives of the loss."""
STEPS = 3
"""Optimizer steps compared; the gradients of the one after them are too."""
SEQUENCE = 64
"""About so many tokens a sequence, more for many shards."""
WIDTH = 64
HEAD_DIM = 8
DEFAULT_PROCESSES = 8
"""More are started only when asked for."""


@dataclass(frozen=True)
class Shrunk:
    """A tiny run."""

    config: RunConfig
    model: dict[str, Any]
    """Its config.json."""
    processes: int
    notes: tuple[str, ...]
    """What differs from the user's run and why, a sentence each."""


def shrink(config: RunConfig, folder: Path, processes: int | None = None, most: int = DEFAULT_PROCESSES) -> Shrunk:
    """The tiny run of `config`, whose files will lie in `folder`.

    Args:
        processes: to run on; None: tp x cp x pp, twice that (two replicas) if at most `most`.
        most: processes started without being asked for.

    Raises:
        ConfigError: the configuration could not run, or does not fit the processes.
    """
    notes: list[str] = []
    path = Path(config.model.path)
    if path.is_dir():
        arch = read_arch(path)
    else:
        arch = llama2("70b")
        notes.append(f"model.path {path} is not here: the shape of Llama-2-70B stands in for it.")
    asked = config.parallel
    whole = plan_grid(asked.tp * asked.cp * asked.pp, asked.tp, asked.cp, asked.pp)
    plan_chunks(arch, whole, asked.virtual)
    parallel, count = _fit(asked, processes, most)
    for axis in ("tp", "cp", "pp"):
        if getattr(parallel, axis) != getattr(asked, axis):
            notes.append(f"{axis} {getattr(asked, axis)} is run as {axis} {getattr(parallel, axis)} to fit {count}.")
    dp = count // (parallel.tp * parallel.cp * parallel.pp)
    sequence, group = _lengths(config, parallel)
    micro = min(config.train.micro_batch, 2)
    # As many micro-batches as fill a pipeline and drain it, in whole rounds where chunks are interleaved.
    rounds = 2 * parallel.pp if parallel.virtual > 1 else parallel.pp + 1
    if config.lora.dropout:
        notes.append("lora.dropout is 0 here: ranks draw other masks than one process.")
    if config.attention.legacy_wrap:
        notes.append("attention.legacy_wrap leaks the future, as asked: the probe shows it and does not fail.")
    train = config.train
    ratio = 1.0 if train.lr_embed_norm is None else train.lr_embed_norm / train.lr
    tiny = replace(
        config,
        model=replace(config.model, vocab=None, path=str(folder / "base"), dtype="fp32"),
        attention=replace(
            config.attention,
            group_size=group if config.attention.kind == "s2" else None,
            full_last_steps=min(config.attention.full_last_steps, 1),
            backend="auto",
        ),
        lora=replace(config.lora, dropout=0.0),
        data=DataConfig(
            path=str(folder / "tokens"),
            sequence=sequence,
            tokenizer=str(folder / "tokenizer.model"),
            mask_documents=config.data.mask_documents,
        ),
        train=replace(
            train,
            steps=STEPS + 1,
            global_batch=micro * dp * rounds,
            micro_batch=micro,
            # Steps large enough to show in three; the denominator's floor keeps Adam from blowing rounding errors of
            # gradients near zero up to whole steps.
            lr=1e-3,
            lr_embed_norm=1e-3 * ratio,
            eps=1e-4,
            warmup_steps=min(train.warmup_steps, 1),
            stream=None if train.stream is None else _chunk(sequence, group, parallel),
        ),
        eval=EvalConfig(),
        save=SaveConfig(every=0),
        parallel=parallel,
        output=str(folder / "run"),
        # The doctor calls each invariant itself and tells them apart.
        checks=False,
    )
    return Shrunk(tiny, _model(arch, parallel, config.model.base), count, tuple(notes))


def _fit(asked: ParallelConfig, processes: int | None, most: int) -> tuple[ParallelConfig, int]:
    """Axes halved, the longest first and none to below 2, until a replica fits; and the processes to use."""
    limit = most if processes is None else processes
    sizes = {axis: getattr(asked, axis) for axis in ("tp", "cp", "pp")}

    def model() -> int:
        return sizes["tp"] * sizes["cp"] * sizes["pp"]

    while model() > limit:
        longest = max(sizes, key=lambda axis: sizes[axis])
        if sizes[longest] <= 2:
            raise ConfigError(
                f"--processes: {limit} cannot hold tp x cp x pp with every axis in use at least 2; give {model()}."
            )
        sizes[longest] = max(2, sizes[longest] // 2)
    count = processes or (2 * model() if 2 * model() <= most else model())
    if count % model():
        raise ConfigError(f"--processes: {count} is not a multiple of tp x cp x pp = {model()}; use {model()}.")
    return replace(asked, **sizes, virtual=min(asked.virtual, 4)), count


def _lengths(config: RunConfig, parallel: ParallelConfig) -> tuple[int, int]:
    """(sequence, group), tokens: their ratio about the run's, neither fitting the shards."""
    shards = parallel.cp * parallel.tp
    share = min(1.0, config.group / config.sequence)  # of an odd sequence the whole, made even, is more
    sequence = max(SEQUENCE, 8 * parallel.cp * parallel.tp)
    if config.attention.legacy_wrap:
        # The roll needs whole groups and no padding; context parallelism is refused with it.
        unit = 2 * parallel.tp
        group = max(1, round(sequence * share / unit)) * unit
        return max(1, round(config.sequence / config.group)) * group, group
    sequence -= 3
    while shards > 1 and not sequence % shards:
        sequence -= 1
    group = max(4, round(sequence * share / 2) * 2)
    shard = -(-sequence // shards) * parallel.tp
    # Neither kind of heads' groups may begin at a shard's first token, or no halo would be sent for it.
    while parallel.cp > 1 and not shard % (group // 2):
        group += 2
    return sequence, group


def _chunk(sequence: int, group: int, parallel: ParallelConfig) -> int:
    """Tokens of a streamed chunk: four or so a sequence, at least half a group, and not a group's multiple."""
    unit = parallel.tp * parallel.cp
    chunk = -(-max(sequence // 4, group // 2) // unit) * unit
    return chunk if chunk % group else chunk + unit


def _model(arch: LlamaArch, parallel: ParallelConfig, base: str) -> dict[str, Any]:
    """config.json of the tiny model; its widths are such as model.base can keep."""
    kv_heads = parallel.tp
    # A few heads a rank, an odd number where the model's is: then the split of the heads falls inside a KV group.
    while kv_heads < min(arch.kv_heads, 3) or (arch.kv_heads % 2 == 0 and kv_heads % 2):
        kv_heads += parallel.tp
    heads = kv_heads * arch.heads // arch.kv_heads
    unit = UNIT.get(base, 1)
    head_dim = HEAD_DIM
    while heads * head_dim % (unit * parallel.tp) or (base == "fp8" and kv_heads * head_dim % (unit * parallel.tp)):
        head_dim += HEAD_DIM
    chunks = parallel.pp * parallel.virtual
    scaling = dict(arch.rope_scaling) if arch.rope_scaling else None
    return {
        "architectures": [name for name, kind in ARCHITECTURES.items() if kind == arch.model_type],
        "model_type": arch.model_type,
        "hidden_size": WIDTH,
        "intermediate_size": -(-24 // unit) * unit * max(2, parallel.tp),
        "num_hidden_layers": max(2, chunks + 1),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": VOCAB,
        "hidden_act": "silu",
        "rms_norm_eps": arch.norm_eps,
        "max_position_embeddings": arch.max_positions,
        "tie_word_embeddings": arch.tied,
        "attention_bias": arch.attention_bias,
        "mlp_bias": arch.mlp_bias,
        "sliding_window": arch.sliding_window,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_theta": arch.rope_theta,
        "rope_scaling": scaling,
    }
