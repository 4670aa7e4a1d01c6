"""All that one evaluation of a training run measured, and what a run lost: what a user is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from parallel.errors import DataError
from pipeline.config.evaluation import EvalConfig
from pipeline.evaluation.dense_gap import DenseGap
from pipeline.evaluation.kept import same_model
from pipeline.evaluation.perplexity import EvalReport, LengthResult
from pipeline.evaluation.results import Found, RetrievalReport, begun_by_length, by_length, by_task, report_path
from pipeline.evaluation.ruler.results import RulerReport, fell_short, means, ruler_path
from pipeline.evaluation.tasks import RetrievalSettings


@dataclass(frozen=True)
class Assessment:
    """All that one evaluation of a training run measured."""

    report: EvalReport
    """Also where it was there."""
    gap: DenseGap | None = None
    """None: eval.tasks does not ask for it, or it was there."""
    retrieval: RetrievalReport | None = None
    """None: eval.tasks asks for none, or it was there."""
    ruler: RulerReport | None = None
    """None: eval.tasks asks for none, or it was there."""
    base_ruler: RulerReport | None = None
    """Of the base as shipped, which the effective length is judged by; None: by RULER's threshold."""

    @property
    def perplexity(self) -> dict[int, float]:
        """By context length."""
        return self.report.perplexity

    @property
    def lengths(self) -> tuple[LengthResult, ...]:
        """One entry a context length."""
        return self.report.lengths

    @property
    def points(self) -> dict[str, float]:
        """Figures to plot, by name."""
        found = {f"perplexity/{length}": value for length, value in self.perplexity.items()}
        if self.gap is not None:
            found["dense_gap"] = self.gap.mean
        for task, cells in by_task(self.retrieval.cells if self.retrieval else ()).items():
            found |= {f"retrieval/{task}/{length}": score for length, (score, _) in by_length(cells).items()}
        if self.ruler is not None:
            found |= {f"ruler/{cell.task}/{cell.length}": cell.score for cell in self.ruler.cells}
            found |= {f"ruler/mean/{length}": score for length, score in means(self.ruler.cells).items()}
            found["ruler/effective_length"] = float(self.ruler.effective(self.base_ruler).tokens)
        return found

    @property
    def sentences(self) -> list[str]:
        """Lines for the display."""
        label, gap = self.report.label, self.gap
        lines = [f"perplexity, {label}: " + ", ".join(f"{n}: {p:.2f}" for n, p in self.perplexity.items())]
        for task, cells in by_task(self.retrieval.cells if self.retrieval else ()).items():
            scores, given = by_length(cells), begun_by_length(cells)
            shares = (f"{n}: {score:.0%} ({given[n][0]:.0%})" for n, (score, _) in scores.items())
            lines.append(f"{task}, {label}, exact (first token given): " + ", ".join(shares))
        if self.ruler is not None:
            shares = (f"{n}: {score:.0%}" for n, score in means(self.ruler.cells).items())
            lines.append(f"RULER, {label}, mean of {len(by_task(self.ruler.cells))} tasks: " + ", ".join(shares))
            lines.append(f"RULER, {label}: {self.ruler.effective(self.base_ruler).sentence}")
        if gap is not None:
            worse = "worse" if gap.mean > 0 else "better"
            lines.append(
                f"dense gap, {label}: full attention reads windows of {gap.length} tokens {abs(gap.mean):.4f} nats a "
                f"token {worse} than the attention that is trained"
            )
        return lines


def within_context(lengths: Sequence[int], most: int | None) -> tuple[int, ...]:
    """The lengths of no more than `most` tokens; None: all."""
    return tuple(length for length in lengths if most is None or length <= most)


def retrieval_grids(
    asked: EvalConfig,
    tasks: Sequence[str],
    lengths: Sequence[int],
    digits: int = 5,
    seed: int = 0,
    filler: str = "grass",
) -> list[RetrievalSettings]:
    """The grids of retrieval tasks.

    Args:
        asked: says depths and trials.
        tasks: of `TASKS`.
        lengths: of windows, tokens.
        digits, seed, filler: see `RetrievalSettings`; a needle always lies in the held-out text.
    """
    depths = tuple(n / (asked.depths - 1) for n in range(asked.depths)) if asked.depths > 1 else (0.5,)
    return [
        RetrievalSettings(
            tuple(lengths), depths, asked.trials, task, "text" if task == "needle" else filler, digits, seed
        )
        for task in tasks
    ]


def eval_path(output: Path, label: str) -> Path:
    """Where the perplexities of a label lie."""
    return output / f"eval-{label}.json"


def with_further(found: EvalReport, path: Path) -> EvalReport:
    """A report and the further lengths of the one at `path`, if that is of the same model, text and stride."""
    try:
        earlier = EvalReport.read(path)
    except DataError:
        return found
    alike = (earlier.step, earlier.text, earlier.stride) == (found.step, found.text, found.stride)
    if not alike or not same_model(found.model, earlier.model):
        return found
    further = [result for result in earlier.lengths if result.length not in found.perplexity]
    return replace(found, lengths=tuple(sorted([*found.lengths, *further], key=lambda result: result.length)))


def verdict(output: Path, base_context: int) -> list[str]:
    """What a finished run lost at the lengths that its base serves, one sentence each, from its reports.

    The base as shipped is what it is compared with, or else the weights that it began with.

    Args:
        output: the run's folder.
        base_context: tokens the base was made for.
    """
    for label, against in (("shipped", "the base"), ("initial", "what it began with")):
        try:
            base, mine = (EvalReport.read(eval_path(output, name)) for name in (label, "after"))
            retrieval = [report_path(output, name) for name in (label, "after")]
            there = all(path.exists() for path in retrieval)
            before, after = (RetrievalReport.read(path).cells if there else () for path in retrieval)
            said = Found(mine, after).against(Found(base, before), base_context)
            riddles = [ruler_path(output, name) for name in (label, "after")]
            if all(path.exists() for path in riddles):
                theirs, own = map(RulerReport.read, riddles)
                said += fell_short(own, theirs, against)
        except DataError:
            continue
        return said or [f"nothing that {against} can do at its own lengths was lost, of what was measured."]
    return [
        "what was lost at short lengths is not known: eval.lengths has none within the base's own context of "
        f"{base_context} tokens."
    ]
