"""The plan of a run: what it holds is what its parts say one by one, and what does not fit is refused in making it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parallel.axes.query_plan import LEND_FROM
from parallel.errors import ConfigError, LongspanError
from pipeline.config.rope import RopeSettings
from pipeline.config.run import RunConfig
from pipeline.config.yaml_file import load_config
from pipeline.planning.arch import read_arch
from pipeline.planning.recompute import RecomputePolicy
from pipeline.planning.run_plan import RunPlan, plan_model, plan_run
from tests.support.tiny_models import make_tiny

YAML = """
model: {{path: {base}, context: 128, vocab: 131}}
attention: {{kind: s2, group_size: 16, full_last_steps: 2}}
data: {{path: {text}, sequence: 64}}
train: {{steps: 4, global_batch: 12, micro_batch: 1, recompute: none}}
parallel: {{pp: 2}}
output: {output}
"""


def make(folder: Path, *settings: str, **base: Any) -> RunConfig:
    """A run of a tiny base with 64 positions and 2 layers."""
    model = make_tiny(folder / "base", "llama2", max_position_embeddings=64, **base)
    (folder / "text").mkdir(exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(YAML.format(base=model, text=folder / "text", output=folder / "run"))
    return load_config(path, list(settings))


def test_a_plan_holds_all_that_follows(tmp_path: Path) -> None:
    plan = plan_run(make(tmp_path), 6)
    assert plan.arch == replace(read_arch(tmp_path / "base"), vocab=131)
    assert (plan.rope.type, plan.rope.factor) == ("linear", 2)
    assert (plan.grid.tp, plan.grid.cp, plan.grid.dp, plan.grid.pp) == (1, 1, 3, 2)
    assert plan.batch.accumulation == 4 and plan.chunks == (range(0, 1), range(1, 2))
    assert (plan.attention.kind, plan.attention.group, plan.full_attention.kind) == ("s2", 16, "full")
    assert plan.recompute == (RecomputePolicy.NONE,) * 2
    assert plan.attention.kernels and not plan_run(make(tmp_path, "train.without=[kernels]"), 6).attention.kernels
    still = plan_run(make(tmp_path, "train.without=[balanced_attention]"), 6)
    assert plan.full_attention.lend_from == plan.attention.lend_from == LEND_FROM
    assert still.full_attention.lend_from is still.attention.lend_from is None
    assert (plan.sequence, plan.group) == (64, 16)
    assert "activations" in plan.memory().gpu and plan.advice() == ()
    kept = make(tmp_path, "train.recompute=full")
    full = plan_run(kept, 6)
    assert full.recompute == (RecomputePolicy.FULL,) * 2 and "layer inputs" in full.memory().gpu
    # The policies count, not the word they came from.
    mixed = replace(full, recompute=(RecomputePolicy.NONE, RecomputePolicy.FULL))
    assert mixed.memory() == plan.memory(), "the first stage has the first layer alone"
    shipped = plan.as_shipped().rope
    assert (shipped.type, shipped.factor) == ("none", 1.0)


def test_its_advice_is_on_ranks_that_wait_and_on_a_replaced_rope(tmp_path: Path) -> None:
    own = {"rope_type": "linear", "factor": 2.0}
    config = make(
        tmp_path,
        "model.rope={type: yarn, replace: true}",
        "parallel={tp: 2, cp: 2}",
        "attention.group_size=42",
        rope_scaling=own,
    )
    plan = plan_run(config, 4)
    waits, replaced = plan.advice()
    assert plan.balance() == (waits,) and "the others wait for it" in waits
    assert "is replaced by yarn" in replaced


def refuse(folder: Path, *settings: str, world: int = 6) -> str:
    with pytest.raises(LongspanError) as refused:
        plan_run(make(folder, *settings), world)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_does_not_fit_is_refused_the_ranks_first(tmp_path: Path) -> None:
    gone = f"model.path={tmp_path / 'gone'}"
    assert refuse(tmp_path, gone, world=5).startswith("parallel: tp 1 x cp 1 x pp 2 = 2 does not divide the 5 launched")
    assert refuse(tmp_path, gone, "train.global_batch=13").startswith("train.global_batch: 13 is not a multiple")
    assert refuse(tmp_path, gone, "parallel.virtual=2", "train.global_batch=9").startswith("parallel.virtual: 2 needs")
    assert refuse(tmp_path, gone, "data.path=nowhere").startswith(f"model.path: {tmp_path / 'gone'} is not a folder")
    assert refuse(tmp_path, "data.path=nowhere", "eval.path=nor-here").startswith("data.path: ")
    assert refuse(tmp_path, "eval.path=nor-here").startswith("eval.path: ")
    assert refuse(tmp_path, "model.vocab=7", "parallel.pp=3").startswith("model.vocab: 7 rows are fewer")
    assert refuse(tmp_path, "parallel={tp: 3}").startswith("parallel.tp: 3 does not divide")
    assert refuse(tmp_path, "parallel.pp=3").startswith("parallel.pp: 3 x parallel.virtual 1 = 3 pipeline chunks need")


def test_a_known_model_needs_no_file(tmp_path: Path) -> None:
    config = make(tmp_path)
    arch, rope = plan_model(config.model, read_arch(tmp_path / "base"))
    away = replace(config, model=replace(config.model, path="gone"), data=replace(config.data, path="gone"))
    assert replace(RunPlan.of(away, arch, rope, 6), config=config) == plan_run(config, 6)
    with pytest.raises(ConfigError, match=r"^parallel\.pp: 3"):
        RunPlan.of(replace(away, parallel=replace(away.parallel, pp=3)), arch, rope, 6)
    assert plan_model(replace(config.model, rope=RopeSettings(type="ntk")), arch)[1].theta > rope.theta


def test_making_a_plan_imports_no_torch(tmp_path: Path) -> None:
    make(tmp_path)
    code = (
        "import sys; from pathlib import Path; from pipeline.config.yaml_file import load_config; "
        "from pipeline.planning.run_plan import plan_run; "
        f"plan_run(load_config(Path({str(tmp_path / 'run.yaml')!r}), []), 6).memory(); "
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


EVALUATED = ["attention.full_last_steps=0", "eval.path=text"]


@pytest.mark.parametrize(
    ("window", "settings", "words"),
    [
        (
            "some",
            ["attention={kind: full}"],
            "attention.kind: full attention over 64 tokens needs .* some of its layers",
        ),
        (
            "all",
            ["attention={kind: full}", "parallel.cp=2"],
            "attention.kind: .* not computed with parallel.cp above 1",
        ),
        ("all", ["attention={kind: full}"], None),
        ("all", ["attention.group_size=18"], "attention.group_size: groups of 18 tokens see further"),
        ("all", ["attention.group_size=16"], None),
        ("some", [], "attention.full_last_steps: full attention over 64 tokens"),
        ("some", [*EVALUATED, "eval.lengths=[8, 17]"], "eval.lengths: .* over 17 tokens"),
        ("some", EVALUATED, "eval.lengths: .* over 128 tokens"),
        ("some", [*EVALUATED, "eval.lengths=[16]"], None),
        ("all", [*EVALUATED, "eval.prefill=64"], "eval.lengths: .* not computed in chunks"),
        ("all", EVALUATED, None),
        ("some", ["attention={kind: full}", "data.sequence=16"], None),
    ],
)
def test_attention_stays_inside_a_sliding_window(
    tmp_path: Path, window: str, settings: list[str], words: str | None
) -> None:
    config = make(tmp_path, "parallel.pp=1", *settings)
    slides = {"max_position_embeddings": 64, "sliding_window": 16}
    if window == "some":
        slides |= {"use_sliding_window": True, "max_window_layers": 1}
    stored = read_arch(make_tiny(tmp_path / "window", "mistral" if window == "all" else "qwen2", **slides))
    assert stored.all_slide is (window == "all")
    ranks = config.parallel.cp
    if words is None:
        RunPlan.shaped(config, stored, ranks)
        return
    with pytest.raises(ConfigError, match=f"^{words}"):
        RunPlan.shaped(config, stored, ranks)
