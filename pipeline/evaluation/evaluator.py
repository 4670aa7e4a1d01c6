"""Perplexity of a run's model: as shipped, with stretched RoPE but untrained, or trained."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from parallel.errors import CheckpointError, ConfigError, DataError
from parallel.health.watch import Watch
from parallel.world.collectives import share_from_main, sum_over
from parallel.world.groups import Groups, destroy_groups
from parallel.world.rank_env import RankEnv
from pipeline.build import build_model, connect, open_base, open_tokens
from pipeline.checkpoint.choose import newest
from pipeline.checkpoint.compatibility import check_resumable, check_settings
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.tensors import whole_trained
from pipeline.config.run import RunConfig
from pipeline.config.sections import LoraConfig
from pipeline.config.yaml_file import config_dict
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline.evaluation.grid import fit_ranks
from pipeline.evaluation.perplexity import EvalReport, Shards, evaluate
from pipeline.evaluation.run_retrieval import RetrievalReport, run_retrieval
from pipeline.evaluation.tasks import Cell, RetrievalSettings, cells
from pipeline.model.rank_model import RankModel
from pipeline.model.weights.load import load_trained, mark_trainable
from pipeline.planning.run_plan import RunPlan, plan_run
from pipeline.reporting.lasting import optional_file
from pipeline.reporting.progress import EvalProgress
from pipeline.training.planned import settled
from pipeline.training.state import check_trained

STATES = ("shipped", "untrained", "trained")

TEXT_TOKENS = 1 << 24
"""Held-out tokens read at most: far more than any number of windows a user waits for."""


class Evaluator:
    """Evaluates a model on the run's held-out text under full attention; windows spread over data-parallel ranks."""

    def __init__(
        self,
        plan: RunPlan,
        model: RankModel,
        groups: Groups,
        tokenizer: TextTokenizer,
        watch: Watch | None = None,
        before_round: Callable[[], None] = lambda: None,
    ) -> None:
        config = plan.config
        if config.eval.path is None:
            raise ConfigError("eval.path: is not set; point it at held-out text.")
        self.config, self.spec = config, plan.full_attention
        self.model, self.groups, self.before_round = model, groups, before_round
        self.tokenizer = tokenizer
        self.shards = open_tokens(config, config.eval.path, tokenizer, groups, watch)
        tokens = torch.from_numpy(self.shards.read(0, min(len(self.shards), TEXT_TOKENS)).astype("int64"))
        self.tokens_T = tokens.to(groups.device)

    def run(self, label: str, step: int, *, shown: bool = True) -> EvalReport:
        """Evaluate and, on rank 0, write `<output>/eval-<label>.json`; collective.

        Args:
            label, step: recorded in the report.
            shown: display progress (not inside the training bar: a terminal holds one).
        """
        settings = self.config.eval
        lengths = settings.lengths or (self.config.model.context,)
        spread = Shards(
            self.groups.data_rank,
            self.groups.plan.dp,
            lambda table: sum_over(self.groups.replicas, table),
            lockstep=self.model.shards is not None,
            before_round=self.before_round,
        )
        mode = self.model.training
        self.model.eval()
        windows = len(range(spread.rank, settings.windows, spread.world)) * len(lengths)
        try:
            with EvalProgress(windows, f"perplexity, {label}", enabled=shown and self.groups.is_main) as progress:
                report = evaluate(
                    lambda tokens_BS: self.model.token_nll(tokens_BS, self.spec),
                    self.tokens_T,
                    lengths,
                    settings.windows,
                    settings.stride,
                    label=label,
                    step=step,
                    shards=spread,
                    on_window=progress.advance,
                    bytes_of=lambda ids: len(self.tokenizer.decode(ids).encode()),
                )
                progress.done = sum(result.windows for result in report.lengths)  # all ranks'
        finally:
            self.model.train(mode)
        if self.groups.is_main:
            with optional_file(self._path(label)):
                report.write(self._path(label))
        return report

    def has(self, label: str, step: int) -> bool:
        """Whether the report of this label and step is there, whole; collective, alike on every rank."""

        def look() -> str:
            try:
                return str(EvalReport.read(self._path(label)).step)
            except DataError:
                return ""

        return share_from_main(self.groups, look) == str(step)

    def _path(self, label: str) -> Path:
        return Path(self.config.output) / f"eval-{label}.json"


def forget_later(output: Path, step: int) -> None:
    """Remove evaluations of a model trained for more than `step` steps: it is gone, and another takes its place."""
    for pattern, kind in (("eval-*.json", EvalReport), ("retrieval-*.json", RetrievalReport)):
        for path in output.glob(pattern):
            with optional_file(path), contextlib.suppress(DataError):
                if kind.read(path).step > step:
                    path.unlink()


@dataclass(frozen=True)
class LoadedState:
    """A model in one of STATES, on this rank."""

    label: str
    """As in `EvalReport`."""
    step: int
    """Optimizer steps it was trained for."""
    context: int
    """Tokens it is made for."""
    base_context: int
    """Tokens the base was made for, as its config.json says."""
    model: RankModel
    groups: Groups
    tokenizer: TextTokenizer
    identity: Mapping[str, Any]
    """What tells it from other models: base, positions, checkpoint, dtype."""
    plan: RunPlan
    """As its ranks run it."""


@contextlib.contextmanager
def load_state_of(config: RunConfig, env: RankEnv, state: str, checkpoint: Path | None = None) -> Iterator[LoadedState]:
    """A model in one of STATES, ready to be evaluated; collective.

    `shipped` ignores model.rope; `trained` reads `checkpoint`, or the run's newest. Whatever grid the run trains on,
    the ranks that are there do.

    Raises:
        ConfigError, CheckpointError, DataError: one sentence each.
    """
    config, _ = settled(config, env)
    trained_with, config = config, fit_ranks(config, env.world_size)
    plan = plan_run(config, env.world_size)
    if state == "shipped":
        plan = plan.as_shipped()
    base = open_base(config, plan.arch)
    try:
        groups = connect(plan, env, base)
        if state == "trained":
            folder = Path(share_from_main(groups, lambda: str(checkpoint or _newest(config))))
            # Told before the model is loaded; the base's hash is looked at after it.
            check_settings(read_manifest(folder).raw.get("config", {}), config_dict(trained_with))
        tokenizer = load_tokenizer(Path(config.data.tokenizer or config.model.path))
        lora = config.lora if state == "trained" and "lora" in config.train.trainable else LoraConfig(rank=0)
        model = build_model(plan, lora, groups, base)
        base_hash = share_from_main(groups, base.base_hash)
        identity = {"base": base_hash, "rope": asdict(plan.rope), "vocab": plan.arch.vocab, "dtype": str(model.dtype)}
        step = 0
        if state == "trained":
            own = {"base_hash": base_hash, "config": config_dict(trained_with)}
            with CheckpointReader(folder) as reader:
                saved = reader.manifest
                check_resumable(saved.raw, {**own, "data_fingerprint": saved.raw["data_fingerprint"]})
                mark_trainable(model, config.train.trainable)
                check_trained(model, config.train.trainable, reader)
            load_trained(model, whole_trained(folder))
            step = saved.step
            identity["trained"] = hashlib.sha256(json.dumps(saved.raw, sort_keys=True).encode()).hexdigest()
        model.requires_grad_(False)
        label = "after" if state == "trained" else state
        own_context = plan.arch.max_positions
        context = own_context if state == "shipped" else config.model.context
        yield LoadedState(label, step, context, own_context, model, groups, tokenizer, identity, plan)
    finally:
        destroy_groups()


def evaluate_state(
    config: RunConfig,
    env: RankEnv,
    state: str,
    checkpoint: Path | None = None,
    perplexity: bool = True,
    retrieval: Sequence[RetrievalSettings] = (),
) -> LoadedState:
    """Load the model in one of STATES, evaluate, write the reports; see `load_state_of`.

    Args:
        perplexity: measure perplexity, as `config.eval` says.
        retrieval: grids to measure.

    Raises:
        ConfigError, CheckpointError, DataError: one sentence each.
    """
    with load_state_of(config, env, state, checkpoint) as loaded:
        evaluator = Evaluator(loaded.plan, loaded.model, loaded.groups, loaded.tokenizer)
        asked: list[Cell] = []
        if retrieval:
            text_T = evaluator.tokens_T.cpu().numpy()
            # Before perplexity: what is wrong with them is told at once.
            asked = [cell for settings in retrieval for cell in cells(settings, loaded.tokenizer, text_T)]
        if perplexity:
            evaluator.run(loaded.label, loaded.step)
        if asked:
            run_retrieval(
                loaded.model,
                loaded.groups,
                loaded.plan.full_attention,
                asked,
                loaded.identity,
                Path(config.output),
                label=loaded.label,
                step=loaded.step,
                context=loaded.context,
                base_context=loaded.base_context,
            )
    return loaded


def _newest(config: RunConfig) -> str:
    """The run's newest whole checkpoint."""
    folder = newest(Path(config.output) / "checkpoints")
    if folder is None:
        raise CheckpointError(f"{config.output}: has no checkpoint yet; train first, or evaluate another state.")
    return str(folder)
