"""The run configuration as frozen dataclasses: one source of truth, no torch, no YAML (see `yaml_file` for parsing).

Every field's docstring gives its unit; a path has the type `PathText`. A section validates itself in `__post_init__`;
what concerns two sections is checked in `RunConfig.__post_init__`. Errors are `ConfigError`: one sentence saying what
is wrong, where, how to mend.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from parallel.errors import ConfigError
from pipeline.config.checks import at_least, between, not_empty, one_of, within
from pipeline.config.paths import DatasetText, ModelText, PathText
from pipeline.config.rope import RopeSettings
from pipeline.config.sources import SourceConfig, check_sources

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
TRAINABLE_KINDS = ("lora", "embed", "norm", "lm_head")
POLICIES = ("full", "gate_up", "pointwise", "none")
"""Of all layers alike."""
RECOMPUTE = (*POLICIES, "auto")
BASES = ("bf16", "fp8", "nf4")
"""Forms the frozen matrices of the layers may be kept in."""
FAMILIES = ("local", "megatron", "te")
FP8_RECIPES = ("none", "tensorwise", "blockwise", "mxfp8")
FLASH = {
    "flash_attn": ("flash-attn-4", "flash-attn"),
    "flash_attn_2": ("flash-attn",),
    "flash_attn_4": ("flash-attn-4",),
}
"""Value of attention.backend -> packages any of which it may mean, the first where it can run."""
BACKENDS = ("auto", "cudnn", "flash", *FLASH, "math")
GATE_UP = ("gpu", "fp8", "host")
WITHOUT = (
    "joint_adapters",
    "stream_norm",
    "fused_qkv",
    "balanced_attention",
    "early_halos",
    "short_first_pass",
    "scored_tokens",
    "kernels",
)
OF_ANY_FAMILY = ("balanced_attention", "early_halos", "short_first_pass", "scored_tokens")
"""Those of attention, streaming and the loss, which are the same whatever model.family says."""
S2_SETTINGS = ("group_size", "group_fraction", "shifted_heads", "dilation", "legacy_wrap")
"""Settings of `attention` that mean nothing with kind full (whose last steps are full anyway)."""


@dataclass(frozen=True)
class ModelConfig:
    """Which checkpoint, and the context it is extended to."""

    path: ModelText
    """Hugging Face checkpoint folder (config.json, *.safetensors, tokenizer files), or the Hub's name of one that was
    downloaded (org/name, org/name@revision)."""
    context: int
    """Target context, tokens: what rope scaling is set for and the default sequence length of training."""
    dtype: str = "auto"
    """Compute and frozen-weight dtype: bf16 | fp32 | auto (bf16 on a GPU, fp32 on CPU)."""
    base: str = "bf16"
    """How the frozen matrices of the layers are kept: bf16 (as model.dtype says) | fp8 (e4m3, one scale a row; products
    in FP8, Hopper and newer) | nf4 (4 bits, QLoRA's). Quantized while the checkpoint is read; adapters, norms,
    embedding and lm_head are never. docs/BASE.md."""
    family: str = "local"
    """Whose linears and norms the layers are made of: local (ours) | te (Transformer Engine's, on a GPU that has it;
    engine megatron) | megatron (megatron-core's, to compare). Checkpoints and exports are the same. docs/SPEED.md."""
    fp8_recipe: str = "none"
    """In what family te multiplies while it trains: none (model.dtype) | tensorwise (FP8, one scale a tensor) |
    blockwise (FP8, scales of blocks of 128; Hopper) | mxfp8 (FP8, of blocks of 32; Blackwell). Evaluations are in
    model.dtype."""
    rope: RopeSettings = field(default_factory=RopeSettings)
    vocab: int | None = None
    """Embedding rows, more than the checkpoint's where tokens were added (new rows: mean of the old); None: its own."""

    def __post_init__(self) -> None:
        not_empty("model.path", self.path)
        at_least("model.context", self.context, 2)
        self.rope.check_stretch(self.context)
        at_least("model.vocab", 1 if self.vocab is None else self.vocab, 1)
        one_of("model.dtype", self.dtype, ("auto", "bf16", "fp32"))
        one_of("model.base", self.base, BASES)
        one_of("model.family", self.family, FAMILIES)
        one_of("model.fp8_recipe", self.fp8_recipe, FP8_RECIPES)
        if self.base != "bf16" and self.family != "local":
            raise ConfigError(
                f"model.base: {self.base} is kept by our own linears; set model.family: local, or model.base: bf16."
            )
        if self.fp8_recipe != "none" and self.family != "te":
            raise ConfigError(
                f"model.fp8_recipe: {self.fp8_recipe} is Transformer Engine's; set model.family: te, or remove it "
                "(model.base: fp8 is ours)."
            )
        if self.fp8_recipe != "none" and self.dtype == "fp32":
            raise ConfigError(
                f"model.fp8_recipe: {self.fp8_recipe} rounds bf16 to 8 bits, and model.dtype is fp32; set one of them "
                "to its default."
            )

    @property
    def element_bytes(self) -> int:
        """Bytes of a number on a GPU, where auto is bf16."""
        return 4 if self.dtype == "fp32" else 2


@dataclass(frozen=True)
class AttentionConfig:
    """Training attention; evaluation and inference always use full attention."""

    kind: str = "s2"
    """s2 (shifted sparse attention, LongLoRA section 3.2) | full."""
    group_size: int | None = None
    """Group length G in tokens, even; None uses group_fraction."""
    group_fraction: float = 0.25
    """G as a fraction of the training sequence length (the paper: 1/4); used when group_size is None."""
    shifted_heads: str = "upper_half"
    """upper_half (h >= H/2, the paper's) | alternate (odd KV groups) | none, all, odd_layers (all heads of every other
    layer), for studies."""
    dilation: int = 1
    """For studies: above 1, heads that shifted_heads names are not shifted; they see every so many-th token of segments
    that are as many times as long as a group. Sequence over group makes it strided attention."""
    backend: str = "auto"
    """auto | cudnn | flash (torch's) | flash_attn (the package: release 4 where it can run, else 2) | flash_attn_2 |
    flash_attn_4 | math."""
    legacy_wrap: bool = False
    """Reproduce the published roll, which leaks the future; for parity studies only."""
    full_last_steps: int = 0
    """Train the last so many optimizer steps with full attention."""

    def __post_init__(self) -> None:
        one_of("attention.kind", self.kind, ("s2", "full"))
        one_of("attention.shifted_heads", self.shifted_heads, ("upper_half", "alternate", "none", "all", "odd_layers"))
        one_of("attention.backend", self.backend, BACKENDS)
        at_least("attention.full_last_steps", self.full_last_steps, 0)
        at_least("attention.dilation", self.dilation, 1)
        if self.dilation > 1 and self.shifted_heads == "none":
            raise ConfigError(
                "attention.dilation: shifted_heads: none leaves no head to dilate; name some, or remove it."
            )
        if self.dilation > 1 and self.legacy_wrap:
            raise ConfigError("attention.dilation: dilated heads are not rolled; switch attention.legacy_wrap off.")
        if self.group_size is not None:
            at_least("attention.group_size", self.group_size, 2)
            if self.group_size % 2:
                raise ConfigError(
                    f"attention.group_size: {self.group_size} is odd, but heads shift by half a group; "
                    f"use {self.group_size + 1}."
                )
        if not 0.0 < self.group_fraction <= 1.0:
            raise ConfigError(f"attention.group_fraction: must lie in (0, 1], got {self.group_fraction}.")
        if self.kind == "full":
            for item in fields(self):
                if item.name in S2_SETTINGS and getattr(self, item.name) != item.default:
                    raise ConfigError(
                        f"attention.{item.name}: full attention has no shift and no groups; set "
                        "attention.kind: s2, or remove it."
                    )

    @property
    def for_studies(self) -> str:
        """The setting that only whole sequences on a rank are computed with; empty: none is set."""
        if self.dilation > 1:
            return f"attention.dilation: {self.dilation}"
        return "attention.shifted_heads: odd_layers" if self.shifted_heads == "odd_layers" else ""

    def group_tokens(self, sequence: int) -> int:
        """Group length G in tokens (even, >= 2) for a training sequence of `sequence` tokens."""
        if self.group_size is not None:
            return self.group_size
        return max(2, round(sequence * self.group_fraction / 2) * 2)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (rank 0: none)."""

    rank: int = 8
    """r, dimensionless."""
    alpha: float = 16.0
    """Scale numerator: the update is alpha / r times B A x (alpha / sqrt(r) with rslora)."""
    dropout: float = 0.0
    """Probability of dropping an adapter input element."""
    targets: tuple[str, ...] = ("q", "k", "v", "o")
    """Adapted projections: q k v o gate up down."""
    rslora: bool = False
    """Rank-stabilized scale alpha / sqrt(r) (arXiv 2312.03732)."""

    def __post_init__(self) -> None:
        at_least("lora.rank", self.rank, 0)
        if not self.alpha > 0:
            raise ConfigError(f"lora.alpha: must be positive, got {self.alpha}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"lora.dropout: must lie in [0, 1), got {self.dropout}.")
        for target in self.targets:
            one_of("lora.targets", target, LORA_TARGETS)
        if len(set(self.targets)) != len(self.targets):
            raise ConfigError("lora.targets: lists a projection twice; name each once.")

    @property
    def scale(self) -> float:
        """Multiplier of B A x; 0 when there is no adapter."""
        if self.rank == 0:
            return 0.0
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class DataConfig:
    """Training text."""

    path: tuple[SourceConfig, ...] | DatasetText
    """Folder or file of .txt, .md, JSON lines (.jsonl .ndjson .jsonlines .json), CSV, Parquet or Arrow, or a folder
    written by longspan prepare, of text or (--chat) of conversations; or a pattern of files (books/**/*.txt); or the
    Hub's name of such a data set that was downloaded; or a list of several: {path, weight} or {path, epochs} each. See
    docs/DATA.md."""
    sequence: int | None = None
    """Training sequence length, tokens; None uses model.context."""
    tokenizer: ModelText | None = None
    """Folder of a Hugging Face tokenizer, or the Hub's name of one that was downloaded, or a sentencepiece .model file;
    None uses the one in model.path."""
    text_field: str = "text"
    """Key of the text in JSON records, column of tables."""
    cache: PathText | None = None
    """Where tokenized shards of raw text go; None uses <output>/data."""
    bos: bool | str = "auto"
    """Put BOS before every document of text: true | false | auto (no, or as a prepared folder has it)."""
    eos: bool | str = "auto"
    """Put EOS behind every document of text: true | false | auto (yes, or as a prepared folder has it)."""
    mask_documents: bool = False
    """Keep attention inside each packed document; the paper's recipe attends across them."""

    def __post_init__(self) -> None:
        for name in ("tokenizer", "text_field", "cache"):
            not_empty(f"data.{name}", getattr(self, name))
        if isinstance(self.path, str):
            not_empty("data.path", self.path)
        else:
            check_sources(self.path)
        for name, value in (("bos", self.bos), ("eos", self.eos)):
            if not isinstance(value, bool) and value != "auto":
                raise ConfigError(f"data.{name}: {value!r} is not one of auto, true, false (without quotes).")
        if self.sequence is not None:
            at_least("data.sequence", self.sequence, 2)

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """What is trained on: several, or the one of a plain path."""
        return (SourceConfig(self.path),) if isinstance(self.path, str) else self.path

    @property
    def named_sources(self) -> dict[str, str]:
        """Path of every source, by the name of its setting."""
        if isinstance(self.path, str):
            return {"data.path": self.path}
        return {f"data.path[{number}]": one.path for number, one in enumerate(self.path)}

    def holds(self, path: str) -> bool:
        """Whether a path is a source, or lies in one."""
        return any(within(path, one.path) for one in self.sources)


@dataclass(frozen=True)
class TrainConfig:
    """Optimization."""

    steps: int
    """Optimizer steps."""
    global_batch: int = 64
    """Sequences an optimizer step, over all ranks and accumulation steps."""
    micro_batch: int = 1
    """Sequences a forward pass on one rank."""
    lr: float = 2e-5
    """Peak learning rate."""
    lr_embed_norm: float | None = None
    """Peak learning rate of embedding, norms and lm_head; None uses lr."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""
    eps: float = 1e-8
    """AdamW's denominator floor."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, applied to matrices only."""
    schedule: str = "constant"
    """constant (after warm-up) | cosine (to min_lr_ratio of the peak)."""
    warmup_steps: int = 20
    """Linear warm-up: step s of the first `warmup_steps` (1-based) uses s / warmup_steps of the peak."""
    min_lr_ratio: float = 0.1
    """Final learning rate of the cosine over its peak."""
    clip: float = 1.0
    """Global L2 norm gradients are clipped to; 0 switches clipping off."""
    trainable: tuple[str, ...] = ("lora", "embed", "norm")
    """What trains: lora embed norm lm_head."""
    recompute: str = "full"
    """What the backward pass computes again: full (every layer, from its input) | gate_up (gate and up of the MLP, and
    pointwise work) | pointwise (norms' outputs and the like) | none | auto (what fits, layer by layer: the least that
    fills the GPU)."""
    gate_up: str = "gpu"
    """Where gate and up lie that are kept: gpu (as they are) | fp8 (on the GPU in 8 bits, which rounds gradients) |
    host (pinned memory of the host, copied beside the computation). With recompute auto: of layers for which the GPU
    has no room otherwise."""
    gpu_gib: float | None = None
    """GPU memory that recompute auto fills, GiB; None: 95% of the smallest GPU's (of 80 GB where there is none)."""
    without: tuple[str, ...] = ()
    """Optimisations switched off, to compare: joint_adapters (a frozen product and its adapters in one function) |
    stream_norm (a norm and the residual stream beside it in one pass: the sum before it, and both gradients) |
    fused_qkv (q, k, v cut and RoPE in one kernel) | balanced_attention (of full attention under parallel.cp, queries
    moved to ranks with less work) | early_halos (of a streamed chunk, each layer's halo copied to the GPU before the
    weights of layers beyond it) | short_first_pass (of a streamed chunk, no more computed than later chunks read) |
    scored_tokens (where some labels count alone, logits of the others are not made) | kernels (all of Triton's)."""
    stream: int | str | None = None
    """S² streaming: tokens of a sequence at work at once, over all ranks of a replica (the GPU's memory then depends on
    them, not on data.sequence) | auto (what fits); null: whole sequences."""
    seed: int = 1234
    """Seed of everything random."""
    bad_steps: int = 5
    """Consecutive non-finite steps after which training stops (each is skipped and counted)."""
    rerun_spikes: bool = True
    """Compute a step whose loss or gradient norm is not finite, or far beyond the last 64 steps', once more before the
    weights change, and say whether the data or a rank's hardware is the cause."""

    def __post_init__(self) -> None:
        at_least("train.steps", self.steps, 1)
        at_least("train.global_batch", self.global_batch, 1)
        at_least("train.micro_batch", self.micro_batch, 1)
        if not self.lr > 0:
            raise ConfigError(f"train.lr: must be positive, got {self.lr}.")
        if self.lr_embed_norm is not None and not self.lr_embed_norm > 0:
            raise ConfigError(f"train.lr_embed_norm: must be positive, got {self.lr_embed_norm}.")
        for beta in self.betas:
            if not 0.0 <= beta < 1.0:
                raise ConfigError(f"train.betas: each must lie in [0, 1), got {self.betas}.")
        if not self.eps > 0:
            raise ConfigError(f"train.eps: must be positive, got {self.eps}.")
        at_least("train.weight_decay", self.weight_decay, 0)
        at_least("train.clip", self.clip, 0)
        at_least("train.warmup_steps", self.warmup_steps, 0)
        between("train.min_lr_ratio", self.min_lr_ratio, 0, 1)
        one_of("train.schedule", self.schedule, ("constant", "cosine"))
        one_of("train.recompute", self.recompute, RECOMPUTE)
        one_of("train.gate_up", self.gate_up, GATE_UP)
        for word in self.without:
            one_of("train.without", word, WITHOUT)
        if self.gate_up != "gpu" and self.recompute not in ("pointwise", "auto"):
            raise ConfigError(
                f"train.gate_up: {self.gate_up} is for train.recompute pointwise and auto; {self.recompute} keeps gate "
                "and up on the GPU or not at all."
            )
        if self.gate_up != "gpu" and "kernels" in self.without:
            raise ConfigError(
                f"train.without: kernels leaves no way to keep gate and up as train.gate_up: {self.gate_up} says; "
                "remove one of the two."
            )
        if self.gpu_gib is not None:
            at_least("train.gpu_gib", self.gpu_gib, 1)
            if self.recompute != "auto":
                raise ConfigError("train.gpu_gib: only train.recompute auto looks at it; set that, or remove it.")
        at_least("train.bad_steps", self.bad_steps, 1)
        if isinstance(self.stream, str):
            one_of("train.stream", self.stream, ("auto",))
        elif self.stream is not None:
            at_least("train.stream", self.stream, 1)
        for kind in self.trainable:
            one_of("train.trainable", kind, TRAINABLE_KINDS)
        if not self.trainable:
            raise ConfigError("train.trainable: nothing would train; name some of lora, embed, norm, lm_head.")
        if len(set(self.trainable)) != len(self.trainable):
            raise ConfigError("train.trainable: lists a kind twice; name each once.")


@dataclass(frozen=True)
class SaveConfig:
    """Checkpoints."""

    every: int = 100
    """Optimizer steps between checkpoints; the last step is always saved; 0: only the last."""
    keep: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Also keep, for ever, checkpoints whose step is a multiple of this; 0: none."""
    background: bool = True
    """Write beside training, which pauses for a copy to host memory only (12 bytes a trained parameter, over ranks)."""
    signal_exit_code: int = 0
    """Exit code after SIGTERM or SIGUSR1, once the state is saved (a scheduler may requeue on another than 0)."""

    def __post_init__(self) -> None:
        at_least("save.every", self.every, 0)
        at_least("save.keep", self.keep, 1)
        at_least("save.keep_every", self.keep_every, 0)
        between("save.signal_exit_code", self.signal_exit_code, 0, 125)
