"""The layout of a run: does it divide, what would the planner choose, is another one much faster?"""

from __future__ import annotations

from parallel.errors import ConfigError
from pipeline.config.run import RunConfig
from pipeline.planner.auto import Device, settle
from pipeline.planner.clock import step_time
from pipeline.planner.doomed import instead, setting_of
from pipeline.planning.arch import LlamaArch
from pipeline.planning.base_form import check_fp8
from pipeline.planning.rope import RopePlan
from pipeline.planning.run_plan import RunPlan, plan_ranks
from pipeline.preflight.files import Finding

WORTH = 0.1
"""Share of a step's time that another layout must save to be told."""


def check_layout(
    config: RunConfig, model: tuple[LlamaArch, RopePlan] | None, world: int, device: Device | None = None
) -> tuple[Finding, RunPlan | None]:
    """Grid, batch and model fit each other, the number of processes and the GPU; and the plan they give.

    Args:
        model: what trains; None: nothing is known of it, and there is no plan.
        world: processes.
        device: the smallest GPU; None: there is none.
    """
    parallel = config.parallel
    axes = f"tp {parallel.tp} x cp {parallel.cp} x pp {parallel.pp}"
    needed = f"{world} processes"
    try:
        if device is not None:
            check_fp8(config.model.base, config.model.fp8_recipe, device.capability, device.name)
        grid, batch = plan_ranks(config, world)
        memory = None if device is None else device.memory
        plan = None if model is None else RunPlan.of(config, *model, world, memory)
    except ConfigError as error:
        return Finding("Layout", axes, needed, str(error)), None
    found = f"{axes} x dp {grid.dp}, {batch.accumulation} micro-batches a step"
    return Finding("Layout", found, needed, advice=() if plan is None else plan.balance()), plan


def settle_layout(
    config: RunConfig, stored: LlamaArch | None, device: Device | None, world: int
) -> tuple[RunConfig, Finding | None]:
    """The configuration with the layout that the run will choose, and the choice; None: the user chose."""
    if not config.parallel.auto:
        return config, None
    needed = f"{world} processes"
    if stored is None or device is None:
        lacking = "a readable model" if stored is None else "GPUs"
        return config, Finding("Layout", "auto", needed, f"parallel.auto: nothing can be chosen without {lacking}.")
    try:
        found = settle(config, stored, device, world)
    except ConfigError as error:
        return config, Finding("Layout", "auto", needed, str(error))
    return found.config, Finding("Layout", found.chosen, needed)


def faster(plan: RunPlan, stored: LlamaArch, device: Device, chosen: Finding | None) -> tuple[str, ...]:
    """What the planner chose; or that it knows a layout which is much faster than the user's."""
    if chosen is not None:
        return (chosen.found,)
    site = device.site(plan.grid.world_size)
    best = instead(plan, stored, site, capped=True)
    if best is None:
        return ()
    saved = 1 - best.time.total / step_time(plan, site.gpu).total
    if saved < WORTH:
        return ()
    setting = setting_of(best, plan.config)
    return (f"parallel: by the planner {setting} takes {saved:.0%} less time a step; longspan plan says why.",)
