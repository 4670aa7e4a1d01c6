"""The whole configuration of a run: its sections, and what concerns two of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from parallel.errors import ConfigError
from pipeline.config.checks import not_empty, one_of
from pipeline.config.evaluation import RULER_TASKS, EvalConfig
from pipeline.config.parallel import ParallelConfig
from pipeline.config.paths import ModelText, PathText
from pipeline.config.resume import ResumeConfig
from pipeline.config.sections import (
    OF_ANY_FAMILY,
    AttentionConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    SaveConfig,
    TrainConfig,
)

REPORT_TO = ("wandb", "mlflow", "trackio", "prometheus")
"""What `pipeline.reporting.trackers` knows."""


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    output: PathText
    """Folder of checkpoints, metrics, the resolved config and exports."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    init_from: ModelText | None = None
    """A run's output, a checkpoint or an adapter folder whose trained weights a new run begins with, at step 0; None:
    the base's. Not looked at once the run has a checkpoint of its own."""
    report_to: tuple[str, ...] = ()
    """Where metrics go beside metrics.jsonl and TensorBoard: wandb | mlflow | trackio (each by its own library and its
    environment variables) | prometheus (a text file in the output)."""
    checks: bool = False
    """Run-time invariants: replicas in sync, frozen weights unchanged, LoRA-B zero at step 0; costs a little a step."""

    def __post_init__(self) -> None:
        not_empty("output", self.output)
        not_empty("init_from", self.init_from)
        for name in self.report_to:
            one_of("report_to", name, REPORT_TO)
        self._check_lengths()
        self._check_training()
        self._check_stream()
        self._check_family()
        unit = self.parallel.tp * self.parallel.cp
        if self.eval.prefill is not None and self.eval.prefill % unit:
            raise ConfigError(
                f"eval.prefill: {self.eval.prefill} tokens do not divide over tp {self.parallel.tp} x cp "
                f"{self.parallel.cp}; use {-(-self.eval.prefill // unit) * unit}."
            )

    def _check_lengths(self) -> None:
        """Sequence against context, group and evaluation."""
        if self.sequence > self.model.context:
            raise ConfigError(
                f"data.sequence: {self.sequence} exceeds model.context {self.model.context}; raise the context, or "
                "lower the sequence."
            )
        # Up to the next even number: group_fraction 1 of an odd sequence is rounded up to it.
        if self.group > self.sequence + self.sequence % 2:
            raise ConfigError(
                f"attention.group_size: {self.group} exceeds the training sequence of {self.sequence} tokens, which "
                f"cuts it into no groups; use less (the paper's is {AttentionConfig().group_tokens(self.sequence)}), "
                "or set attention.kind: full."
            )
        # The roll moves the last half group to the front: with a part group at the end nothing lines up.
        if self.attention.legacy_wrap and self.sequence % self.group:
            raise ConfigError(
                f"attention.legacy_wrap: the group of {self.group} tokens must divide the sequence of {self.sequence}; "
                "change attention.group_size or data.sequence."
            )
        if self.attention.legacy_wrap and self.data.mask_documents:
            raise ConfigError(
                "attention.legacy_wrap: the published roll knows no document borders; set data.mask_documents to false."
            )
        if self.attention.legacy_wrap and self.parallel.cp > 1:
            raise ConfigError(
                "attention.legacy_wrap: wraps around the whole sequence, which context parallelism cuts; set "
                "parallel.cp to 1."
            )
        if self.attention.for_studies and self.parallel.cp > 1:
            raise ConfigError(
                f"{self.attention.for_studies} is for studies and not computed over context shards; set parallel.cp to "
                "1."
            )
        if (self.attention.dilation - 1) * self.group >= self.sequence:
            raise ConfigError(
                f"attention.dilation: {self.attention.dilation} groups of {self.group} tokens are more than the "
                f"training sequence of {self.sequence}; use at most {max(1, self.sequence // self.group)}."
            )
        for length in self.eval_lengths:
            if self.eval.stride is not None and self.eval.stride > length:
                raise ConfigError(f"eval.stride: {self.eval.stride} exceeds the evaluation length {length}.")

    def _check_training(self) -> None:
        """What trains, and how an optimizer step is cut up."""
        trains_lora = "lora" in self.train.trainable
        if self.lora.rank == 0 and self.train.trainable == ("lora",):
            raise ConfigError("lora.rank: 0 leaves nothing to train; raise it or add embed, norm to train.trainable.")
        if self.lora.rank and not self.lora.targets:
            raise ConfigError("lora.targets: empty with lora.rank > 0; name projections such as [q, k, v, o].")
        if self.lora.rank and not trains_lora:
            raise ConfigError(
                f"train.trainable: adapters of lora.rank {self.lora.rank} would never train; add lora, or set "
                "lora.rank: 0."
            )
        if self.train.global_batch % self.train.micro_batch:
            raise ConfigError(
                f"train.global_batch: {self.train.global_batch} is not a multiple of train.micro_batch "
                f"{self.train.micro_batch}."
            )
        if self.attention.full_last_steps > self.train.steps:
            raise ConfigError(
                f"attention.full_last_steps: {self.attention.full_last_steps} exceeds train.steps {self.train.steps}."
            )

    def _check_stream(self) -> None:
        """What streaming needs of attention and grid."""
        stream, attention = self.train.stream, self.attention
        if stream is None:
            return
        if attention.kind != "s2":
            raise ConfigError(
                "train.stream: full attention needs the whole past and cannot stream; set attention.kind: s2, or "
                "remove train.stream."
            )
        if attention.group_size is None:
            raise ConfigError(
                "train.stream: a group that is a fraction of the sequence grows with it; set attention.group_size, in "
                f"tokens ({self.group} is what attention.group_fraction gives here)."
            )
        if attention.full_last_steps:
            raise ConfigError(
                "attention.full_last_steps: full attention needs the whole past and cannot stream; set it to 0, and "
                "train the last steps in a run without train.stream that begins with this one's weights (init_from)."
            )
        if attention.legacy_wrap:
            raise ConfigError(
                "attention.legacy_wrap: wraps around the whole sequence, which train.stream cuts; switch one off."
            )
        if attention.for_studies:
            raise ConfigError(
                f"{attention.for_studies} is for studies and computed on whole sequences; remove it, or train.stream."
            )
        if self.parallel.pp > 1:
            raise ConfigError(
                f"parallel.pp: {self.parallel.pp} pipeline stages and train.stream are two ways to cut the work in "
                "time that do not combine; set parallel.pp to 1 and give the ranks to parallel.cp or parallel.tp."
            )
        if isinstance(stream, int):
            if 2 * stream < attention.group_size:
                raise ConfigError(
                    f"train.stream: chunks of {stream} tokens are shorter than half a group of {attention.group_size}; "
                    f"use at least {attention.group_size // 2}, better a multiple of {attention.group_size}."
                )
            if stream % (unit := self.parallel.tp * self.parallel.cp):
                raise ConfigError(
                    f"train.stream: {stream} tokens do not divide over tp {self.parallel.tp} x cp {self.parallel.cp}; "
                    f"use {-(-stream // unit) * unit}."
                )

    def _check_family(self) -> None:
        """What Transformer Engine's layers do without."""
        if self.model.family != "te":
            return
        if self.parallel.engine == "zero3":
            raise ConfigError(
                "parallel.engine: zero3 shards the matrices of our own linears; set model.family: local, or "
                "parallel.engine: megatron."
            )
        ours = [word for word in self.train.without if word not in OF_ANY_FAMILY]
        if ours:
            raise ConfigError(
                f"train.without: {', '.join(ours)} switches off what our own layers do; remove it, or "
                "set model.family: local."
            )

    @property
    def sequence(self) -> int:
        """Training sequence length, tokens."""
        return self.data.sequence or self.model.context

    @property
    def group(self) -> int:
        """S² group length G, tokens."""
        return self.attention.group_tokens(self.sequence)

    def in_full(self, step: int) -> bool:
        """Whether optimizer step `step`, from 0, is one of the last, which train in full attention."""
        return step >= self.train.steps - self.attention.full_last_steps

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Context lengths of perplexity, tokens."""
        return self.eval.lengths or (self.model.context,)

    @property
    def retrieval_lengths(self) -> tuple[int, ...]:
        """Windows of passkey and needle, tokens."""
        return self.eval.retrieval_lengths or self.eval_lengths

    @property
    def ruler_tasks(self) -> tuple[str, ...]:
        """RULER's tasks that are measured during training, in its order."""
        asked = self.eval.tasks
        return tuple(task for task in RULER_TASKS if "ruler" in asked or task in asked)

    @property
    def ruler_lengths(self) -> tuple[int, ...]:
        """Windows of RULER, tokens."""
        return self.eval.ruler_lengths or self.retrieval_lengths

    @property
    def ruler_prompts(self) -> int:
        """Prompts of RULER a task and length."""
        return self.eval.ruler_trials or self.eval.depths * self.eval.trials

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed and may not be meant, one sentence each."""
        found = []
        asked = sorted({*self.eval.lengths, *self.eval.retrieval_lengths, *self.eval.ruler_lengths})
        beyond = [length for length in asked if length > self.model.context]
        if self.eval.path is not None and beyond:
            found.append(
                f"eval.lengths: {', '.join(map(str, beyond))} exceed model.context {self.model.context}, which the "
                "rotary positions are stretched to; perplexity there shows how the model fares beyond its context."
            )
        train = self.train
        if train.warmup_steps > train.steps:
            found.append(
                f"train.warmup_steps: {train.warmup_steps} is more than train.steps {train.steps}, so the run ends at "
                f"{train.steps / train.warmup_steps:.0%} of train.lr; lower one or raise the other."
            )
        if self.eval.path is not None and self.data.holds(self.eval.path):
            found.append(
                f"eval.path: {self.eval.path} is training text (data.path), so perplexity will show what was "
                "memorized; give text that is held out."
            )
        return tuple(found)
