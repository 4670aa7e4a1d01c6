"""A run, planned and composed in one call."""

from __future__ import annotations

from typing import Any

from parallel.world.rank_env import RankEnv
from pipeline.build import build
from pipeline.config.run import RunConfig
from pipeline.planning.run_plan import plan_run
from pipeline.training.run_record import Run


def build_run(config: RunConfig, env: RankEnv, **more: Any) -> Run:
    """`pipeline.build.build` of the configuration's plan for the ranks of `env`; `more` is handed on."""
    return build(plan_run(config, env.world_size), env, **more)
