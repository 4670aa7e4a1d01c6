"""The one composition root: configuration in, a ready run out. The order of every step reads here."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from parallel.axes.zero3 import FrozenShards, deepspeed_config
from parallel.errors import CheckpointError, ConfigError
from parallel.health.watch import Watch, collective_timeout_s
from parallel.world.collectives import on_main_first, require_same, share_from_main
from parallel.world.grid import check_interleaving, check_model_fits, plan_batch, plan_grid, plan_stages
from parallel.world.groups import Groups, make_groups
from parallel.world.rank_env import RankEnv
from parallel.world.rng import seed_everything, set_rng_state
from pipeline.checkpoint.choose import Choice, candidates, choose
from pipeline.checkpoint.compatibility import DataStart, check_cursor, check_output, check_resumable
from pipeline.checkpoint.manifest import step_of
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.saver import CheckpointSaver
from pipeline.checkpoint.writer import clear_unfinished
from pipeline.config.sections import AttentionConfig, LoraConfig, RunConfig
from pipeline.config.yaml_file import config_dict
from pipeline.data.loader import TrainLoader
from pipeline.data.packing import PackedDataset
from pipeline.data.prepare import left_out, open_text_or_shards
from pipeline.data.readings import told_differences
from pipeline.data.shards import TokenShards, is_prepared
from pipeline.data.tokenizer import TextTokenizer, check_rows, load_tokenizer
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.model.attention.backends import select_backend
from pipeline.model.rank_model import ModelPart
from pipeline.model.weights.load import init_adapters, load_base, mark_trainable, trainable
from pipeline.planning import tensors as names
from pipeline.planning.arch import LlamaArch, read_arch
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.rope import RopePlan
from pipeline.planning.run_plan import plan_model
from pipeline.reporting.progress import TokenProgress
from pipeline.storage.durable import remove, rename
from pipeline.training.init_from import Start, check_fits, check_source, find_source, open_source, other_positions
from pipeline.training.invariants import run_checks
from pipeline.training.non_finite import DivergenceGuard
from pipeline.training.optimizer import TrainableAdamW
from pipeline.training.rank_facts import rank_facts
from pipeline.training.reduction import GradientReduction
from pipeline.training.shared_output import check_shared
from pipeline.training.state import load_state, load_weights, own_pieces
from pipeline.training.trainer import Trainer, TrainerParts


def check_before_spending(config: RunConfig, env: RankEnv) -> tuple[LlamaArch, RopePlan]:
    """Everything that can be refused before torch allocates: grid, batch, files, architecture, RoPE.

    Raises:
        ConfigError, CheckpointError, DataError: one sentence each.
    """
    parallel = config.parallel
    grid = plan_grid(env.world_size, parallel.tp, parallel.cp, parallel.pp)
    batch = plan_batch(config.train.global_batch, config.train.micro_batch, grid.dp)
    check_interleaving(parallel.pp, parallel.virtual, batch.accumulation)
    folder = Path(config.model.path)
    if not folder.is_dir():
        raise ConfigError(
            f"model.path: {folder} is not a folder; point it at a Hugging Face checkpoint (tools.import_hf makes "
            "one from a GGUF file)."
        )
    if not Path(config.data.path).exists():
        raise ConfigError(f"data.path: {config.data.path} does not exist; point it at text or prepared shards.")
    if config.eval.path is not None and not Path(config.eval.path).exists():
        raise ConfigError(f"eval.path: {config.eval.path} does not exist; point it at text or prepared shards.")
    arch, rope = plan_model(config.model, read_arch(folder))
    check_model_fits(grid, arch.heads, arch.kv_heads, arch.ffn)
    plan_stages(arch.layers, parallel.pp, parallel.virtual)
    return arch, rope


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """bf16 or fp32; `auto` is bf16 on a GPU and fp32 on a CPU, whose bf16 arithmetic is emulated."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def attention_spec(attention: AttentionConfig, group: int) -> AttentionSpec:
    """The training attention a configuration asks for."""
    return AttentionSpec(
        kind=attention.kind,
        group=group,
        shifted_heads=attention.shifted_heads,
        legacy_wrap=attention.legacy_wrap,
        backend=attention.backend,
    )


def full_attention(attention: AttentionConfig) -> AttentionSpec:
    """Dense causal attention with the configured backend: what evaluation and inference always use."""
    return AttentionSpec("full", 2, attention.shifted_heads, False, attention.backend)


def open_base(config: RunConfig, arch: LlamaArch) -> HfCheckpoint:
    """The base checkpoint, its tensors those config.json describes: checked before a model is allocated.

    Raises:
        CheckpointError: a file is damaged, or a tensor missing, misshaped or unknown (named).
    """
    base = HfCheckpoint(Path(config.model.path))
    # Added tokens have no rows there yet.
    base.check(names.hf_tensor_shapes(replace(arch, vocab=read_arch(base.folder).vocab)), names.is_derived)
    return base


def check_backend(config: RunConfig, arch: LlamaArch, device: torch.device) -> torch.dtype:
    """The dtype the model has on this device, in which attention.backend can run there.

    Raises:
        ConfigError: it cannot. Asked before anything is tokenized or loaded, not at the first forward.
    """
    dtype = compute_dtype(config.model.dtype, device)
    select_backend(config.attention.backend, device, dtype, arch.head_dim)
    return dtype


def build_model(
    config: RunConfig, arch: LlamaArch, rope: RopePlan, lora: LoraConfig, groups: Groups, base: HfCheckpoint
) -> ModelPart:
    """Allocate this rank's part of the model on its device and fill it; nothing is marked trainable.

    Raises:
        ConfigError: attention.backend cannot run here.
        CheckpointError: a tensor is missing or misshaped.
    """
    dtype = check_backend(config, arch, groups.device)
    parallel, train = config.parallel, config.train
    shards = None
    if parallel.engine == "zero3":
        offload, plan = parallel.offload.params == "cpu", groups.plan
        batch = plan_batch(train.global_batch, train.micro_batch, plan.dp)
        described = deepspeed_config(dtype, train.micro_batch, batch.accumulation, plan.dp * plan.cp)
        shards = FrozenShards(groups, dtype, offload, described)
    model = ModelPart(
        arch, rope, lora, groups, dtype, train.recompute, parallel.virtual, shards=shards, kinds=train.trainable
    )
    load_base(model, base)
    init_adapters(model, config.train.seed)
    return model


@dataclass(frozen=True)
class Run:
    """A composed run."""

    config: RunConfig
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
    def output(self) -> Path:
        """Folder of everything the run writes."""
        return Path(self.config.output)


def connect(config: RunConfig, env: RankEnv, base: HfCheckpoint | None = None, fake: bool = False) -> Groups:
    """Join the other ranks (or, `fake`, pretend to: see `make_groups`) and seed.

    Args:
        base: the weights this rank would start from; with them the ranks compare what they have before anything else.

    Raises:
        ConfigError: this rank lacks its GPU, or the ranks have not the same settings, program or base.
    """
    parallel = config.parallel
    plan = plan_grid(env.world_size, parallel.tp, parallel.cp, parallel.pp)
    facts = rank_facts(config, base) if base is not None and env.world_size > 1 and not fake else None
    timeout_s = collective_timeout_s(parallel.timeout_s)
    groups = make_groups(plan, env, timeout_s, virtual=parallel.virtual, fake=fake, facts=facts)
    if groups.device.type == "cpu":
        # Bit-equal resumes and replicas; on a GPU the deterministic kernels would cost speed.
        torch.use_deterministic_algorithms(True)
    # Ranks with other tokens or other layers draw other dropout masks. Tensor-parallel ranks, neighbours on the fastest
    # axis, share a stream: megatron's tracker tells them apart where they must differ.
    seed_everything(config.train.seed, env.rank // plan.tp)
    return groups


def open_tokens(
    config: RunConfig, source: str, tokenizer: TextTokenizer, groups: Groups, watch: Watch | None = None
) -> TokenShards:
    """Open prepared shards, or tokenize raw text once (rank 0, which shows it) and share it through the cache folder.

    Args:
        watch: learns that a tokenization of hours gets on.
    """
    cache = Path(config.data.cache or Path(config.output) / "data")
    touch = (watch or Watch()).touch
    require_same(groups, {"the tokenizer": tokenizer.fingerprint})
    with TokenProgress(enabled=groups.is_main, touch=touch) as progress:
        shards = on_main_first(
            groups, lambda: open_text_or_shards(Path(source), cache, tokenizer, config.data.text_field, progress)
        )
    # A machine may have a copy of its own, and an older one.
    setting = "data.path" if source == config.data.path else "eval.path"
    require_same(groups, {f"what {setting} holds (sha256 of its tokens)": shards.fingerprint})
    return shards


def build(
    config: RunConfig,
    env: RankEnv,
    base: HfCheckpoint | None = None,
    fake: bool = False,
    watch: Watch | None = None,
) -> Run:
    """Compose a training run, resumed from its newest checkpoint when there is one.

    Args:
        config: of the run.
        env: this process among its peers.
        base: weights to start from; None: those of `model.path`.
        fake: be one rank of a world that is not there, for measuring.
        watch: learns that long work, as tokenizing, gets on.

    Raises:
        ConfigError, CheckpointError, DataError: one sentence each, before anything is trained.
    """
    arch, rope = check_before_spending(config, env)
    # `resume` looks again, at the base's hash and the data too
    if check_output(config) is None and config.init_from is not None:
        check_source(config.init_from)
    base = base or open_base(config, arch)
    groups = connect(config, env, base, fake)
    check_shared(groups, Path(config.output))
    check_backend(config, arch, groups.device)
    tokenizer = load_tokenizer(Path(config.data.tokenizer or config.model.path))
    check_rows(tokenizer, arch.vocab)
    if groups.is_main and not is_prepared(Path(config.data.path)):
        for warning in told_differences(tokenizer):
            print(f"warning: {warning}", file=sys.stderr)
    dataset = PackedDataset(open_tokens(config, config.data.path, tokenizer, groups, watch), config.sequence)
    loader = TrainLoader(
        dataset,
        seed=config.train.seed,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=groups.data_rank,
        world=groups.plan.dp,
        mask_documents=config.data.mask_documents,
    )
    trains_lora = "lora" in config.train.trainable
    lora = config.lora if trains_lora else replace(config.lora, rank=0)
    model = build_model(config, arch, rope, lora, groups, base)
    mark_trainable(model, config.train.trainable)
    optimizer = TrainableAdamW(
        ((name, "lora" if kind == "lora" else "other", parameter) for name, kind, parameter in trainable(model)),
        betas=config.train.betas,
        eps=config.train.eps,
        weight_decay=config.train.weight_decay,
        clip=config.train.clip,
        group=groups.data,
        offload=config.parallel.offload.optimizer == "cpu",
    )
    parts = TrainerParts(
        config=config,
        groups=groups,
        model=model,
        optimizer=optimizer,
        reduction=GradientReduction(groups, model),
        loader=loader,
        guard=DivergenceGuard(config.train.bad_steps, arch.vocab),
        saver=CheckpointSaver(
            Path(config.output) / "checkpoints",
            groups,
            config.save.keep,
            config.save.keep_every,
            config.save.background,
        ),
        spec=attention_spec(config.attention, config.group),
        full_spec=full_attention(config.attention),
        manifest={
            "config": config_dict(config),
            "layout": layout_of(config, groups),
            "base": str(Path(config.model.path).resolve()),
            "base_hash": share_from_main(groups, base.base_hash),
            "data_fingerprint": dataset.fingerprint,
            "data_start": asdict(DataStart()),
            "changes": [],
            "init_from": None,
        },
        checks=run_checks(groups, model, optimizer) if config.checks else None,
    )
    choice = resume(parts)
    start = 0 if choice is None else choice.step
    begun = begin_from(parts, base) if choice is None and config.init_from is not None else None
    if parts.checks is not None:
        if begun is None:
            parts.checks.at_start(start)
        else:
            parts.checks.check_replicas(start, everything=True)
    parts.saver.prepare(own_pieces(model, config.train.trainable, optimizer))
    return Run(config, groups, Trainer(parts, start), tokenizer, choice, _passed_over(config, base, groups), begun)


def _passed_over(config: RunConfig, base: HfCheckpoint, groups: Groups) -> tuple[str, ...]:
    """See `Run.warnings`."""
    if not groups.is_main:
        return ()
    texts = [Path(path) for path in (config.data.path, config.eval.path) if path is not None]
    return (*base.warnings, *(line for path in texts for line in left_out(path, config.data.text_field)))


def layout_of(config: RunConfig, groups: Groups) -> dict[str, int | str]:
    """What a checkpoint records of who wrote it; random state means something on the same layout only."""
    plan, parallel = groups.plan, config.parallel
    axes = {"tp": plan.tp, "cp": plan.cp, "pp": plan.pp, "dp": plan.dp, "virtual": parallel.virtual}
    return {"engine": parallel.engine, **axes, "device": groups.device.type}


def begin_from(parts: TrainerParts, base: HfCheckpoint) -> Start:
    """Take the trained weights that `init_from` names; collective.

    Raises:
        ConfigError: there are none, or they do not fit this run.
        CheckpointError: they are damaged.
    """
    config, model = parts.config, parts.model
    assert config.init_from is not None
    path = config.init_from
    folder = Path(share_from_main(parts.groups, lambda: find_source(path)))
    with open_source(folder, config, parts.manifest["base_hash"]) as source:
        taken = check_fits(source, config, model.arch, model.lora, base)
        load_weights(model, parts.optimizer, taken, source.weights.read)
        begun = replace(source.start, warnings=other_positions(source, model.rope))
    parts.manifest["init_from"] = begun.recorded()
    return begun


def resume(parts: TrainerParts) -> Choice | None:
    """Restore the newest whole checkpoint, if any; collective. Damaged newer ones are set aside, under another name.

    Raises:
        CheckpointError: none is whole, or it holds something else.
        ConfigError: it was made under settings that compute something else.
    """
    groups, folder = parts.groups, parts.saver.folder

    def pick() -> str:
        choice = choose(folder)
        kept = clear_unfinished(folder)
        if choice is None:
            return ""
        for path in candidates(folder):
            if (step_of(path.name) or 0) > choice.step:
                aside = path.with_name(f"damaged-{path.name}")
                try:
                    remove(aside)
                    rename(path, aside)
                except OSError as error:
                    raise CheckpointError(
                        f"{path}: is damaged and could not be renamed to {aside.name} ({error.strerror or error}); "
                        "move it away, and rerun."
                    ) from None
        return json.dumps([choice.folder.name, choice.step, choice.reason, [*choice.warnings, *kept]])

    picked = share_from_main(groups, pick)
    if not picked:
        return None
    name, step, reason, warnings = json.loads(picked)
    with CheckpointReader(folder / name) as reader:
        manifest = reader.manifest
        changes = check_resumable(manifest.raw, parts.manifest)
        check_cursor(manifest)
        where = DataStart.of(manifest.raw).after(manifest.raw, step, changes)
        parts.loader.begin_at(where.step, where.read)
        parts.manifest["data_start"] = asdict(where)
        parts.manifest["changes"] = [*manifest.raw.get("changes", ()), *(change.at(step) for change in changes)]
        parts.manifest["init_from"] = manifest.raw.get("init_from")
        warnings += [change.sentence(step) for change in changes]
        load_state(parts.model, parts.config.train.trainable, parts.optimizer, reader)
        parts.guard.load_state_dict(manifest.raw["guard"])
        layout, here = manifest.layout, parts.manifest["layout"]
        same = layout is not None and {"device": here["device"], **layout} == here
        same = same and "train.seed" not in {change.setting for change in changes}
        rng = reader.rng(groups.env.rank) if same else None
        if rng is not None and ("cuda" in rng) != (here["device"] == "cuda"):
            rng = None  # written before the device was recorded, on another one
    if rng is not None:
        set_rng_state({key: torch.from_numpy(value) for key, value in rng.items()})
    else:
        # Another layout draws other dropout masks anyhow; they must not be those of the first steps once more.
        seed_everything((parts.config.train.seed + 1_000_003 * step) % 2**31, groups.env.rank // groups.plan.tp)
    parts.saver.saved_step = step
    return Choice(folder / name, step, reason, tuple(warnings))
