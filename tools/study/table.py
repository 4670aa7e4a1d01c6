"""The comparison of a study's runs, as Markdown: what each won and lost against the base as shipped."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.evaluation.judge import Judgement
from pipeline.evaluation.perplexity import exponential
from pipeline.evaluation.results import (
    CellResult,
    begun_by_length,
    by_length,
    by_task,
    lost_and_won,
    paired_difference,
    relative,
)
from pipeline.evaluation.ruler.results import Effective, RulerReport, fell_short, means
from pipeline.reporting.metrics import json_number
from tools.study.run import Outcome


def _mean(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Mean over seeds; with several, ± their standard deviation."""
    mean = sum(values) / len(values)
    # Of values that are not finite, such as a lost model's perplexity, there is no deviation.
    apart = len(values) > 1 and all(map(math.isfinite, values))
    return f"{show(mean)} ± {show(statistics.stdev(values))}" if apart else show(mean)


def _windows(judgement: Judgement, length: int) -> tuple[float, ...]:
    return next(result.window_nll for result in judgement.perplexity.lengths if result.length == length)


def _cells(run: Outcome, task: str) -> list[CellResult]:
    return [cell for cell in run.judgement.cells if cell.task == task]


def _against(runs: Sequence[Outcome], of: Callable[[Judgement], Sequence[float]], base: Sequence[float]) -> str:
    """Perplexity against the base's on the same windows: ± the standard error over windows, or, with several seeds, the
    standard deviation of their means."""
    if len(runs) == 1:
        return relative(of(runs[0].judgement), base) or "n/a"
    means = [paired_difference(of(run.judgement), base)[0] for run in runs]
    if not all(map(math.isfinite, means)):
        return "n/a"
    return _mean([100 * (exponential(mean) - 1) for mean in means], lambda value: f"{value:.1f}") + "%"


def ruler_of(run: Outcome, base: Outcome | None) -> RulerReport:
    """What a run answers of RULER, as a report.

    Args:
        base: the model as shipped, whose context is the report's.
    """
    own = run.judgement.tail_context
    base_context = own if base is None else base.judgement.tail_context
    return RulerReport(run.recipe.name, int(run.training.get("steps", 0)), own, base_context, run.judgement.ruler)


def effective(run: Outcome, base: Outcome | None) -> Effective:
    """Effective length, judged by what the base answers at its own length, or by RULER's threshold."""
    return ruler_of(run, base).effective(None if base is None else ruler_of(base, base))


def markdown(outcomes: Sequence[Outcome], base: Outcome | None) -> str:
    """A row a recipe, means over its seeds with their standard deviations; retrieval in brackets: where the answer's
    first token was given. RULER's columns are means over all its tasks; its effective length is each seed's. Below it
    stands what the base itself cannot do within its own context, in words.

    Args:
        outcomes: in the order of the rows.
        base: the model as shipped, which the others are compared with.
    """
    if not outcomes:
        return "Nothing was finished.\n"
    rows: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault(outcome.recipe.name, []).append(outcome)
    lengths = list(outcomes[0].judgement.perplexity.perplexity)
    tasks = list(dict.fromkeys(cell.task for cell in outcomes[0].judgement.cells))
    head = ["recipe", "seeds", "steps", "Mtokens", "s/run", "GiB", *(f"ppl {length}" for length in lengths)]
    if base is not None:
        head += [f"{length} vs base" for length in lengths if length <= base.judgement.tail_context]
        if base.judgement.tail_nll:
            head.append(f"tail vs base at {base.judgement.tail_context}")
    for task in tasks:
        found = by_length(cell for cell in outcomes[0].judgement.cells if cell.task == task)
        head += [f"{task} {length}" for length in found] + [f"{task} worst cell"]
    ruler = list(means(outcomes[0].judgement.ruler))
    head += [f"RULER {length}" for length in ruler] + ["effective length"] * bool(ruler)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, runs in rows.items():
        trained = [run for run in runs if run.training]
        cells = [name, str(len(runs))]
        cells.append(", ".join(f"{steps}" for steps in sorted({run.training["steps"] for run in trained})))
        cells.append(", ".join(f"{n / 1e6:.4g}" for n in sorted({run.training["tokens"] for run in trained})))
        cells.append(
            _mean([float(run.training["seconds"]) for run in trained], lambda v: f"{v:.0f}") if trained else ""
        )
        peaks = [run.training["peak_gib"] for run in trained if run.training.get("peak_gib") is not None]
        cells.append(f"{max(peaks):.1f}" if peaks else "")
        for length in lengths:
            cells.append(_mean([run.judgement.perplexity.perplexity[length] for run in runs], lambda v: f"{v:.4g}"))
        if base is not None:
            own = base.judgement
            for length in lengths:
                if length <= own.tail_context:
                    cells.append(_against(runs, functools.partial(_windows, length=length), _windows(own, length)))
            if own.tail_nll:
                cells.append(_against(runs, lambda judged: judged.tail_nll, own.tail_nll))
        for task in tasks:
            every = [cell for run in runs for cell in _cells(run, task)]
            given = begun_by_length(every)
            for length in given:
                scores = [by_length(_cells(run, task))[length][0] for run in runs]
                cells.append(f"{_mean(scores, '{:.0%}'.format)} ({given[length][0]:.0%})")
            cells.append(f"{min(cell.score for cell in every):.0%}")
        for length in ruler:
            cells.append(_mean([means(run.judgement.ruler)[length] for run in runs], "{:.0%}".format))
        if ruler:
            cells.append(", ".join(map(str, sorted({effective(run, base).tokens for run in runs}))))
        lines.append("| " + " | ".join(cells) + " |")
    if ruler:
        asked = effective(outcomes[0], base)
        lines += [
            "",
            f"Effective length: the longest to which all means over {', '.join(asked.tasks)} stay at "
            f"{asked.threshold:.1%} ({asked.criterion}).",
        ]
    if base is not None:
        own = base.judgement
        said = lost_and_won(own.cells, own.cells, own.tail_context)  # of itself: only what it cannot do at all
        if own.ruler:
            said += fell_short(ruler_of(base, base), ruler_of(base, base), "the base")
        lines += ["", *said] if said else []
    return "\n".join(lines) + "\n"


def comparisons(outcomes: Sequence[Outcome], base: Outcome | None) -> str:
    """The tables of a study: recipes of as many steps as their settings say, then those of each budget in seconds.

    Args:
        outcomes, base: see `markdown`.
    """
    budgeted = [run for run in outcomes if run.recipe.budgeted]
    plain = [run for run in outcomes if not run.recipe.budgeted]
    if not budgeted:
        return markdown(outcomes, base)
    parts = ["## Equal tokens\n\nSteps as the settings say.\n\n", markdown(plain, base)]
    for of, seconds in dict.fromkeys((run.recipe.seconds_of, run.recipe.seconds) for run in budgeted):
        alike = [run for run in budgeted if (run.recipe.seconds_of, run.recipe.seconds) == (of, seconds)]
        budget = alike[0].training["budget"]["seconds"]
        devices = ", ".join(sorted({str(run.training["budget"]["device"]) for run in alike}))
        whose = f"those of {of}, " if of else ""
        parts.append(
            f"\n## Equal seconds: {whose}{budget:.1f} of optimizer steps\n\nSteps follow from timing a few of each "
            f"recipe ({devices}), and are kept with it.\n\n"
        )
        beside = [run for run in plain if run is base or run.recipe.name == of]
        parts.append(markdown([*beside, *alike], base))
    return "".join(parts)


def figures(outcomes: Sequence[Outcome], base: Outcome | None) -> dict[str, Any]:
    """What the table is made of, JSON-ready: under `runs` an entry a run.

    Args:
        base: see `markdown`.
    """
    found = []
    for run in outcomes:
        judged = run.judgement
        entry: dict[str, Any] = {"recipe": run.recipe.name, "seed": run.seed, "training": dict(run.training)}
        entry["perplexity"] = {str(n): json_number(value) for n, value in judged.perplexity.perplexity.items()}
        entry["tail_nll"] = [json_number(value) for value in judged.tail_nll]
        entry["retrieval"] = {
            task: {
                str(n): {"exact": score, "first token given": begun_by_length(cells)[n][0]}
                for n, (score, _) in by_length(cells).items()
            }
            for task, cells in by_task(judged.cells).items()
        }
        entry["depths"] = {
            task: [{"tokens": cell.length, "depth": cell.depth, "exact": cell.score} for cell in cells]
            for task, cells in by_task(judged.cells).items()
        }
        if judged.ruler:
            entry["ruler"] = {str(n): score for n, score in means(judged.ruler).items()}
            entry["effective_length"] = effective(run, base).to_json()
        found.append(entry)
    return {"base": None if base is None else base.recipe.name, "runs": found}
