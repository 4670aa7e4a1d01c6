"""Trains and judges the runs of a study, one after another in this process; what is finished is never done again."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from parallel.errors import ConfigError, DataError
from parallel.health.signals import StopSignals
from parallel.world.grid import GridPlan
from parallel.world.groups import destroy_groups
from parallel.world.rank_env import RankEnv
from pipeline.build import build, build_model, connect, open_base
from pipeline.config.run import RunConfig
from pipeline.config.sections import RULER_TASKS, LoraConfig
from pipeline.config.yaml_file import config_dict
from pipeline.data.prepare import open_text_or_shards
from pipeline.data.tokenizer import check_rows, load_tokenizer
from pipeline.evaluation.evaluator import TEXT_TOKENS
from pipeline.evaluation.judge import Judge, Judgement, JudgeSettings
from pipeline.evaluation.results import ResultFile
from pipeline.evaluation.ruler.cost import ruler_cost
from pipeline.evaluation.ruler.results import RulerFile
from pipeline.evaluation.ruler.tasks import RulerSettings
from pipeline.evaluation.spread import Shards
from pipeline.evaluation.tasks import RetrievalSettings
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.model.rank_model import RankModel
from pipeline.planning.arch import read_arch
from pipeline.planning.attention_layout import full_attention
from pipeline.planning.run_plan import plan_run
from pipeline.reporting.metrics import peak_memory_gib
from pipeline.reporting.progress import TokenProgress, TrainProgress
from pipeline.reporting.versions import versions
from pipeline.storage.durable import replace_text
from pipeline.training.trainer import Stopped
from tools.study.plan import Places, Recipe, Study, configure, train_key
from tools.study.whole_model import as_base, train_whole
from tools.support.mixture import Mixture, write_mixture


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    recipe: Recipe
    seed: int
    judgement: Judgement
    training: Mapping[str, Any]
    """steps, tokens, seconds (of the optimizer steps alone), last loss (mean of the last tenth), peak GiB."""


class OutOfTime(Exception):
    """The time the user gave is over; what was done is kept."""


class _Recorder(TrainProgress):
    """Shows training and keeps what a study records of it."""

    def __init__(self, total: int, start: int) -> None:
        super().__init__(total, start, every=50)
        self.losses: list[float] = []
        self.seconds = 0.0
        self.tokens = 0

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        super().update(step, metrics)
        self.losses.append(metrics["loss"])
        self.seconds += metrics["seconds"]
        self.tokens += metrics["tokens"]


def judge_settings(study: Study, own_context: int) -> JudgeSettings:
    """The study's questions in tokens."""
    asked = study.judge

    def tokens(shares: tuple[float, ...]) -> tuple[int, ...]:
        return tuple(round(share * own_context) for share in shares)

    grids = tuple(
        RetrievalSettings(tokens(asked.retrieval_lengths), asked.depths, asked.trials, task, asked.filler, asked.digits)
        for task in asked.tasks
    )
    tasks = RULER_TASKS if "ruler" in asked.ruler else asked.ruler
    ruler = RulerSettings(tasks, tokens(asked.ruler_lengths), asked.ruler_trials) if tasks else None
    return JudgeSettings(tokens(asked.lengths), asked.windows, round(asked.tail * own_context), grids, ruler)


class Workshop:
    """Runs a study.

    Args:
        study, places: what and where.
        results: folder of the results, a file a run.
        seconds: time to keep within; None: as long as it takes.
        say: prints a line.

    Raises:
        ConfigError, CheckpointError, DataError: one sentence each, of any recipe, before anything is trained.
    """

    def __init__(
        self, study: Study, places: Places, results: Path, seconds: float | None, say: Callable[[str], None]
    ) -> None:
        self.study, self.places, self.results, self.seconds, self.say = study, places, results, seconds, say
        self.began, self.env = time.monotonic(), RankEnv.read()
        if self.env.world_size > 1:
            raise ConfigError("Environment: a study is one process; start it without torchrun.")
        self.signals = StopSignals()
        stored = read_arch(places.model)
        self.own_context = stored.max_positions
        # Every recipe's mistakes are told before the first one is trained.
        self.configs = {
            (recipe, seed): configure(study, recipe, seed, places, self.own_context) for recipe, seed in study.order()
        }
        for config in self.configs.values():
            # Text that is mixed is written only once all recipes are good.
            plan_run(replace(config, data=replace(config.data, path=str(places.train))), self.env.world_size)
        checkpoint = HfCheckpoint(places.model)
        self.base_hash = checkpoint.base_hash()
        config = next(iter(self.configs.values()))
        self.tokenizer = load_tokenizer(Path(config.data.tokenizer or config.model.path))
        check_rows(self.tokenizer, stored.vocab)
        with TokenProgress() as progress:
            cache, field = places.runs / "tokens", config.data.text_field
            plain = open_text_or_shards(places.train, cache, self.tokenizer, field, progress)
            held_out = open_text_or_shards(places.held_out, cache, self.tokenizer, field, progress)
            self.texts = {Mixture(): plain}
            for mixture in dict.fromkeys(recipe.mix for recipe in study.recipes):
                if mixture not in self.texts:
                    folder = self._mixed(mixture, plain.fingerprint)
                    self.texts[mixture] = open_text_or_shards(folder, cache, self.tokenizer, "text", progress)
        self.judge_settings = judge_settings(study, self.own_context)
        text = held_out.read(0, min(len(held_out), TEXT_TOKENS)).astype("int64")
        self.judge = Judge(self.judge_settings, self.tokenizer, text)
        if self.judge.riddles:
            cost = ruler_cost(self.judge.riddles, stored, GridPlan(1, 1, 1, 1))
            self.say(f"RULER, of every run: {cost.sentence(config.train.global_batch * config.sequence)}")
        asked = json.dumps([self.judge_settings.to_json(), held_out.fingerprint], sort_keys=True)
        self.asked = hashlib.sha256(asked.encode()).hexdigest()
        self._pace: dict[tuple[bool, bool], float] = {}
        """Seconds a run of a kind (untrained, whole) took last."""

    def key(self, recipe: Recipe, seed: int) -> str:
        """Of the run's weights."""
        data = self.texts[recipe.mix].fingerprint
        paced_by = "" if recipe.seconds_of is None else self.key(*self._pacer(recipe, seed))
        return train_key(recipe, self.configs[recipe, seed], self.base_hash, data, paced_by)

    def _pacer(self, recipe: Recipe, seed: int) -> tuple[Recipe, int]:
        """The run after whose seconds this one ends."""
        return next(other for other in self.configs if other[0].name == recipe.seconds_of and other[1] == seed)

    def _mixed(self, mixture: Mixture, fingerprint: str) -> Path:
        """The folder of a mixture of the training text, written if it is not there."""
        folder = self.places.text_of(mixture)
        made_from = json.dumps({"text": fingerprint, "code from": str(self.places.code or ""), **asdict(mixture)})
        mark = folder.with_name(f"{folder.name}.json")
        if not mark.exists() or mark.read_text() != made_from:
            counts = write_mixture(self.places.train, folder, mixture, self.places.code)
            self.say(f"{folder}: {counts['text']:,} characters of text and notes, {counts['code']:,} of code")
            replace_text(mark, made_from)
        return folder

    def file(self, recipe: Recipe, seed: int) -> Path:
        """Where a run's result lies."""
        slug = re.sub(r"[^a-z0-9]+", "-", recipe.name.lower()).strip("-")
        return self.results / f"{slug}-{seed}-{self.key(recipe, seed)[:12]}.json"

    def finished(self, recipe: Recipe, seed: int) -> Outcome | None:
        """The result, if this very run was judged by these very questions."""
        path = self.file(recipe, seed)
        try:
            data = json.loads(path.read_text())
            if data["key"] != self.key(recipe, seed) or data["asked"] != self.asked:
                return None
            return Outcome(recipe, seed, Judgement.from_json(data["judgement"]), data["training"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, DataError) as error:
            raise DataError(f"{path}: is no result of a study ({error}); move it away, and rerun.") from None

    def left(self) -> float:
        """Seconds left."""
        return float("inf") if self.seconds is None else self.seconds - (time.monotonic() - self.began)

    def run(self, on_outcome: Callable[[list[Outcome]], None]) -> tuple[list[Outcome], str]:
        """Do what is not done yet, as far as time allows.

        Args:
            on_outcome: called with all that is there after every run.

        Returns:
            All outcomes in the study's order, and why it ended early (empty: it did not).
        """
        order = list(self.study.order())
        outcomes = {run: found for run in order if (found := self.finished(*run)) is not None}
        reason = ""
        if outcomes:
            self.say(f"{len(outcomes)} of {len(order)} runs are there already")
            on_outcome([outcomes[run] for run in order if run in outcomes])
        with self.signals:
            for number, run in enumerate(order, start=1):
                if run in outcomes:
                    continue
                recipe, seed = run
                kind = recipe.untrained, recipe.whole
                needed = self._pace.get(kind, 0.0)
                try:
                    if self.left() < needed:
                        raise OutOfTime(f"the next run takes about {needed:.0f} s and {self.left():.0f} s are left")
                    self.say(f"[{number}/{len(order)}] {recipe.name}, seed {seed}")
                    began = time.monotonic()
                    outcomes[run] = self._one(recipe, seed)
                    self._pace[kind] = time.monotonic() - began
                except OutOfTime as end:
                    reason = str(end)
                    break
                except Stopped as stop:
                    reason = f"{signal.Signals(stop.number).name} came"
                    break
                on_outcome([outcomes[run] for run in order if run in outcomes])
        return [outcomes[run] for run in order if run in outcomes], reason

    def _heed(self) -> None:
        """Between windows and steps.

        Raises:
            Stopped, OutOfTime: it is time to leave.
        """
        if self.signals.number:
            raise Stopped(self.signals.number)
        if self.left() <= 0:
            raise OutOfTime("the time given is over")

    def _one(self, recipe: Recipe, seed: int) -> Outcome:
        config, key = self.configs[recipe, seed], self.key(recipe, seed)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            with contextlib.ExitStack() as cleanup:
                training: dict[str, Any] = {}
                if recipe.untrained:
                    model = cleanup.enter_context(self._untrained(config))
                elif recipe.whole:
                    folder = self.places.runs / self.file(recipe, seed).stem
                    training = self._whole(recipe, seed, config, folder)
                    model = cleanup.enter_context(self._untrained(as_base(config, folder)))
                else:
                    folder = self.places.runs / self.file(recipe, seed).stem
                    model, training = cleanup.enter_context(self._trained(replace(config, output=str(folder))))
                judgement = self.judge(
                    model,
                    full_attention(config.attention),
                    config.model.context,
                    {"weights": key, "dtype": str(model.dtype)},
                    ResultFile(self.results / "cells" / self.file(recipe, seed).name),
                    RulerFile(self.results / "ruler" / self.file(recipe, seed).name),
                    label=recipe.name,
                    step=training.get("steps", 0),
                    shards=Shards(before_round=self._heed),
                )
        finally:
            destroy_groups()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        outcome = Outcome(recipe, seed, judgement, training)
        self._write(outcome, config, key)
        return outcome

    def _write(self, outcome: Outcome, config: RunConfig, key: str) -> None:
        data = {
            "key": key,
            "asked": self.asked,
            "recipe": outcome.recipe.name,
            "seed": outcome.seed,
            "config": config_dict(config),
            "base_hash": self.base_hash,
            "versions": versions(),
            "training": dict(outcome.training),
            "judge": self.judge_settings.to_json(),
            "judgement": outcome.judgement.to_json(),
        }
        path = self.file(outcome.recipe, outcome.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(data, indent=1) + "\n")

    @contextlib.contextmanager
    def _untrained(self, config: RunConfig) -> Iterator[RankModel]:
        plan = plan_run(config, self.env.world_size)
        base = open_base(config, plan.arch)
        groups = connect(plan, self.env)
        model = build_model(plan, LoraConfig(rank=0), groups, base)
        model.requires_grad_(False)
        try:
            yield model
        finally:
            model.close()

    def _whole(self, recipe: Recipe, seed: int, config: RunConfig, folder: Path) -> dict[str, Any]:
        """Train every weight; a run that is left begins anew."""
        device, seconds = torch.device("cuda" if torch.cuda.is_available() else "cpu"), None
        if recipe.seconds_of is not None:
            other = self._pacer(recipe, seed)
            found = self.finished(*other)
            if found is None:
                raise ConfigError(
                    f"Recipe {recipe.name!r}: {recipe.seconds_of!r}, seed {seed}, is to be run before it."
                )
            seconds = float(found.training["seconds"])
        with _Recorder(config.train.steps, 0) as progress:

            def on_step(step: int, loss: float, took: float, tokens: int) -> None:
                row = {"loss": loss, "seconds": took, "tokens": tokens, "tokens_per_second": tokens / took}
                progress.update(step, {**row, "memory_gib": peak_memory_gib(), "skipped": 0})
                self._heed()

            train_whole(plan_run(config, self.env.world_size), self.texts[recipe.mix], folder, seconds, device, on_step)
        return self._facts(len(progress.losses), progress, 0, folder)

    @contextlib.contextmanager
    def _trained(self, config: RunConfig) -> Iterator[tuple[RankModel, dict[str, Any]]]:
        """The model after training, which goes on from what an earlier process saved."""
        run = build(plan_run(config, self.env.world_size), self.env)
        parts, trainer = run.trainer.parts, run.trainer
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(parts.model.close)
            cleanup.callback(parts.loader.close)
            cleanup.callback(parts.saver.close)
            progress = _Recorder(config.train.steps, trainer.step)
            start = trainer.step

            def on_step(step: int) -> None:
                if self.left() <= 0 and step < config.train.steps:
                    raise Stopped(signal.SIGALRM)

            with progress, trainer.listening(self.signals):
                stopped = trainer.run(None, progress, on_step)
            training = self._facts(config.train.steps, progress, start, Path(config.output))
            if stopped == signal.SIGALRM:
                raise OutOfTime(f"the time given is over; step {trainer.step} of {config.train.steps} is saved")
            if stopped:
                raise Stopped(stopped)
            yield parts.model, training

    def _facts(self, steps: int, progress: _Recorder, start: int, folder: Path) -> dict[str, Any]:
        """What training was, across the processes that took part."""
        path = folder / "training.json"
        parts: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        if progress.losses:
            tail = progress.losses[-max(1, len(progress.losses) // 10) :]
            parts = [part for part in parts if part["start"] < start]
            parts.append(
                {
                    "start": start,
                    "seconds": progress.seconds,
                    "tokens": progress.tokens,
                    "loss": sum(tail) / len(tail),
                }
            )
            replace_text(path, json.dumps(parts) + "\n")
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        return {
            "steps": steps,
            "seconds": sum(part["seconds"] for part in parts),
            "tokens": sum(part["tokens"] for part in parts),
            "loss": parts[-1]["loss"] if parts else None,
            "peak_gib": peak,
        }
