"""Trains and judges the runs of a study, one after another in this process; what is finished is never done again."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from parallel.errors import ConfigError, DataError
from parallel.health.signals import StopSignals
from parallel.world.grid import GridPlan
from parallel.world.groups import destroy_groups
from parallel.world.rank_env import RankEnv
from pipeline.build import compute_dtype
from pipeline.config.evaluation import RULER_TASKS
from pipeline.config.run import RunConfig
from pipeline.config.yaml_file import config_dict
from pipeline.data.document_ends import Ends
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
from pipeline.planning.arch import read_arch
from pipeline.planning.attention_layout import full_attention
from pipeline.planning.run_plan import plan_run
from pipeline.reporting.progress import TokenProgress
from pipeline.reporting.versions import versions
from pipeline.storage.durable import replace_text
from pipeline.training.non_finite import TrainingDiverged
from pipeline.training.trainer import Stopped
from tools.study.pace import Pace, pace_of, timing_run, with_steps
from tools.study.plan import Places, Recipe, Study, configure, train_key
from tools.study.training import OutOfTime, Training
from tools.study.whole_model import as_base
from tools.support.mixture import Mixture, write_mixture


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    recipe: Recipe
    seed: int
    judgement: Judgement
    training: Mapping[str, Any]
    """steps, tokens, seconds (of the optimizer steps alone), last loss (mean of the last tenth), peak GiB; of a budget
    in seconds also `budget`: its seconds, seconds a step, and where they were timed."""


def _let_go() -> None:
    """Give back what a model held."""
    destroy_groups()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
        self.diverged: list[str] = []
        """Runs that ended so, a sentence each."""
        self.training = Training(self.env, self.signals, self.left)
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
            ends = Ends(config.data.bos, config.data.eos)
            plain = open_text_or_shards(places.train, cache, self.tokenizer, field, progress, ends)
            held_out = open_text_or_shards(places.held_out, cache, self.tokenizer, field, progress, ends)
            self.texts = {Mixture(): plain}
            for mixture in dict.fromkeys(recipe.mix for recipe in study.recipes):
                if mixture not in self.texts:
                    folder = self._mixed(mixture, plain.fingerprint)
                    self.texts[mixture] = open_text_or_shards(folder, cache, self.tokenizer, "text", progress, ends)
        self.judge_settings = judge_settings(study, self.own_context)
        text = held_out.read(0, min(len(held_out), TEXT_TOKENS)).astype("int64")
        if len(text) < (longest := max(self.judge_settings.lengths)):
            raise DataError(
                f"{places.held_out}: has {len(text)} tokens, fewer than one window of {longest}; give more text there, "
                "or lower judge.lengths."
            )
        self.judge = Judge(self.judge_settings, self.tokenizer, text)
        if self.judge.riddles:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            width = compute_dtype(config.model.dtype, device).itemsize
            cost = ruler_cost(self.judge.riddles, stored, GridPlan(1, 1, 1, 1), width)
            self.say(f"RULER, of every run: {cost.sentence(config.train.global_batch * config.sequence)}")
        asked = json.dumps([self.judge_settings.to_json(), held_out.fingerprint], sort_keys=True)
        self.asked = hashlib.sha256(asked.encode()).hexdigest()
        self._pace: dict[tuple[bool, bool], float] = {}
        """Seconds a run of a kind (untrained, whole) took last."""

    def config(self, recipe: Recipe, seed: int) -> RunConfig | None:
        """Of the run; None: its steps follow from a time, and it was not timed yet."""
        config = self.configs[recipe, seed]
        if not recipe.budgeted:
            return config
        budget, pace = self._budget(recipe), Pace.read(self._pace_file(recipe))
        return None if budget is None or pace is None else with_steps(config, pace.steps_in(budget))

    def key(self, recipe: Recipe, config: RunConfig) -> str:
        """Of the run's weights."""
        return train_key(recipe, config, self.base_hash, self.texts[recipe.mix].fingerprint)

    def _trained(self, recipe: Recipe) -> Recipe:
        """The recipe whose training it is."""
        return recipe if recipe.of is None else next(one for one in self.study.every if one.name == recipe.of)

    def _pacer(self, recipe: Recipe) -> Recipe:
        """The recipe whose seconds this one may take."""
        return next(other for other in self.study.every if other.name == recipe.seconds_of)

    def _budget(self, recipe: Recipe) -> float | None:
        """Seconds a budgeted recipe may train; None: not known yet."""
        if recipe.seconds is not None:
            return recipe.seconds
        other = self._pacer(recipe)
        pace = Pace.read(self._pace_file(other))
        return None if pace is None else pace.step_seconds * self._plain(other).train.steps

    def _plain(self, recipe: Recipe) -> RunConfig:
        """A recipe's configuration with its own steps, of the first seed: all are timed by it."""
        return configure(self.study, recipe, self.study.seeds[0], self.places, self.own_context)

    def _pace_file(self, recipe: Recipe) -> Path:
        """Where a recipe's pace lies: of what it trains, whatever it is called and however long."""
        # Nothing of a step's time follows from these.
        config = replace(self._plain(recipe), train=replace(self._plain(recipe).train, seed=0))
        return self.results / "paces" / f"{self.key(self._trained(recipe), config)[:12]}.json"

    def _timed(self, recipe: Recipe) -> None:
        """Time a recipe, unless that was done."""
        path, plain = self._pace_file(recipe), self._plain(recipe)
        if path.exists():
            return
        self.say(f"timing {recipe.name}")
        folder = self.places.runs / f"timing-{path.stem}"
        shutil.rmtree(folder, ignore_errors=True)
        config = timing_run(plain, folder)
        try:
            if recipe.whole:
                _, progress = self.training.whole(config, self.texts[recipe.mix], folder)
            else:
                with self.training.trained(config) as (_, _, progress):
                    pass
        finally:
            _let_go()
            shutil.rmtree(folder, ignore_errors=True)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        pace_of(plain, progress.seconds, device).write(path)

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

    def stem(self, recipe: Recipe, seed: int, config: RunConfig) -> str:
        """Names a run by all that decides its weights."""
        slug = re.sub(r"[^a-z0-9]+", "-", recipe.name.lower()).strip("-")[:150]
        return f"{slug}-{seed}-{self.key(recipe, config)[:12]}"

    def file(self, recipe: Recipe, seed: int, config: RunConfig) -> Path:
        """Where a run's result lies: by its weights, and by what they were asked."""
        return self.results / f"{self.stem(recipe, seed, config)}-{self.asked[:8]}.json"

    def finished(self, recipe: Recipe, seed: int) -> Outcome | None:
        """The result, if this very run was judged by these very questions."""
        config = self.config(recipe, seed)
        if config is None:
            return None
        # An earlier release's names did not say what was asked.
        older = self.results / f"{self.stem(recipe, seed, config)}.json"
        for path in (self.file(recipe, seed, config), older):
            try:
                data = json.loads(path.read_text())
                if data["key"] == self.key(recipe, config) and data["asked"] == self.asked:
                    return Outcome(recipe, seed, Judgement.from_json(data["judgement"]), data["training"])
                self.say(f"{path.name} stays, and answers other questions than these: {recipe.name} is judged again")
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError, DataError) as error:
                raise DataError(f"{path}: is no result of a study ({error}); move it away, and rerun.") from None
        return None

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
                if self._has_diverged(recipe, seed):
                    continue
                kind = recipe.untrained, recipe.whole
                needed = self._pace.get(kind, 0.0)
                try:
                    if self.left() < needed:
                        raise OutOfTime(f"the next run takes about {needed:.0f} s and {self.left():.0f} s are left")
                    self.say(f"[{number}/{len(order)}] {recipe.name}, seed {seed}")
                    began = time.monotonic()
                    outcomes[run] = self._one(recipe, seed)
                    self._pace[kind] = time.monotonic() - began
                except TrainingDiverged as end:
                    self._note_divergence(recipe, seed, end)
                    continue
                except OutOfTime as end:
                    reason = str(end)
                    break
                except Stopped as stop:
                    reason = f"{signal.Signals(stop.number).name} came"
                    break
                on_outcome([outcomes[run] for run in order if run in outcomes])
        return [outcomes[run] for run in order if run in outcomes], reason

    def _divergence(self, recipe: Recipe, seed: int) -> Path | None:
        """Where it is noted that a run diverged; None: its steps are not known yet."""
        config = self.config(recipe, seed)
        return None if config is None else self.results / f"{self.stem(recipe, seed, config)}.diverged.txt"

    def _has_diverged(self, recipe: Recipe, seed: int) -> bool:
        path = self._divergence(recipe, seed)
        if path is None or not path.exists():
            return False
        self.diverged.append(f"{recipe.name}, seed {seed}: {path.read_text().strip()}")
        return True

    def _note_divergence(self, recipe: Recipe, seed: int, error: TrainingDiverged) -> None:
        """The others go on; the same command does not train it again."""
        path = self._divergence(recipe, seed)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, f"{error}\n")
        self.diverged.append(f"{recipe.name}, seed {seed}: {error}")
        self.say(self.diverged[-1])

    def _one(self, recipe: Recipe, seed: int) -> Outcome:
        if recipe.budgeted:
            for one in (recipe, *([] if recipe.seconds_of is None else [self._pacer(recipe)])):
                self._timed(one)
        config = self.config(recipe, seed)
        assert config is not None, "it was timed"
        key, stem = self.key(recipe, config), self.stem(recipe, seed, config)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            with contextlib.ExitStack() as cleanup:
                training: dict[str, Any] = {}
                folder = self.places.runs / self.stem(self._trained(recipe), seed, config)
                if recipe.untrained:
                    model = cleanup.enter_context(self.training.untrained(config))
                elif recipe.whole:
                    training, _ = self.training.whole(config, self.texts[recipe.mix], folder)
                    model = cleanup.enter_context(self.training.untrained(as_base(config, folder)))
                else:
                    ready = self.training.trained(replace(config, output=str(folder)), recipe.strength)
                    model, training, _ = cleanup.enter_context(ready)
                if recipe.budgeted:
                    pace = Pace.read(self._pace_file(recipe))
                    assert pace is not None
                    training["budget"] = {"seconds": self._budget(recipe), **asdict(pace)}
                judgement = self.judge(
                    model,
                    full_attention(config.attention),
                    config.model.context,
                    {"weights": key, "dtype": str(model.dtype)},
                    ResultFile(self.results / "cells" / f"{stem}.json"),
                    RulerFile(self.results / "ruler" / f"{stem}.json"),
                    label=recipe.name,
                    step=training.get("steps", 0),
                    shards=Shards(before_round=self.training.heed),
                )
        finally:
            _let_go()
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
        path = self.file(outcome.recipe, outcome.seed, config)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(data, indent=1) + "\n")
