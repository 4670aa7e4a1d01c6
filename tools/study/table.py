"""The comparison of a study's runs, as Markdown: what each won and lost against the base as shipped."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from pipeline.evaluation.judge import Judgement
from pipeline.evaluation.results import by_length, relative
from tools.study.run import Outcome


def _mean(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Mean over seeds; with several, ± their standard deviation."""
    mean = sum(values) / len(values)
    return show(mean) if len(values) == 1 else f"{show(mean)} ± {show(statistics.stdev(values))}"


def _windows(judgement: Judgement, length: int) -> tuple[float, ...]:
    return next(result.window_nll for result in judgement.perplexity.lengths if result.length == length)


def _over_seeds(runs: Sequence[Outcome], of: Callable[[Judgement], Sequence[float]]) -> list[float]:
    """Each window's loss, the mean over seeds."""
    columns = [of(run.judgement) for run in runs]
    return [sum(values) / len(values) for values in zip(*columns, strict=True)]


def markdown(outcomes: Sequence[Outcome], base: Outcome | None) -> str:
    """A row a recipe, means over its seeds; retrieval in brackets: where the answer's first token was given.

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
    head = ["recipe", "seeds", "s/run", "GiB", *(f"ppl {length}" for length in lengths)]
    if base is not None:
        head += [f"{length} vs base" for length in lengths if length <= base.judgement.tail_context]
        if base.judgement.tail_nll:
            head.append(f"tail vs base at {base.judgement.tail_context}")
    for task in tasks:
        found = by_length(cell for cell in outcomes[0].judgement.cells if cell.task == task)
        head += [f"{task} {length}" for length in found] + [f"{task} worst cell"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, runs in rows.items():
        trained = [run for run in runs if run.training]
        cells = [name, str(len(runs))]
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
                    mine = _over_seeds(runs, lambda judged, length=length: _windows(judged, length))  # type: ignore[misc]
                    cells.append(relative(mine, _windows(own, length)) or "n/a")
            if own.tail_nll:
                cells.append(relative(_over_seeds(runs, lambda judged: judged.tail_nll), own.tail_nll) or "n/a")
        for task in tasks:
            every = [cell for run in runs for cell in run.judgement.cells if cell.task == task]
            given = by_length(every, begun=True)
            cells += [f"{score:.0%} ({given[length][0]:.0%})" for length, (score, _) in by_length(every).items()]
            cells.append(f"{min(cell.score for cell in every):.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
