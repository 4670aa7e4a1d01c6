"""Advice on grids that leave ranks waiting, against a count of every query and key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.world.grid import plan_grid
from pipeline.config.yaml_file import load_config
from pipeline.planning.attention_layout import AttentionSpec
from pipeline.planning.balance import EVEN, advise, attention_work, busiest_rank, imbalance
from pipeline.planning.run_plan import plan_model
from pipeline.preflight.survey import check_layout
from tools.support.shapes import llama2

CONFIG = Path(__file__).parents[3] / "launch/configs/llama2_70b_32k.yaml"
ON_GPUS = ["parallel.engine=megatron", "parallel.offload.params=none", "parallel.offload.optimizer=none"]
LLAMA2_70B = llama2("70b")


def _counted(heads: int, kv_heads: int, sequence: int, group: int, rule: str, tp: int, cp: int) -> float:
    """The definition, key by key: what `imbalance` says in closed form."""
    unit = tp * cp
    tokens = -(-sequence // unit) * tp
    work = dict.fromkeys(((t, c) for t in range(tp) for c in range(cp)), 0)
    for head in range(heads):
        shifted = head >= heads // 2 if rule == "upper_half" else (head * kv_heads // heads) % 2 == 1
        for query in range(cp * tokens):
            begin = (query + group // 2) // group * group - group // 2 if shifted else query // group * group
            work[head * tp // heads, query // tokens] += query - max(0, begin) + 1
    counted = [pairs for (_, context), pairs in work.items() if context > 0 or cp == 1]
    return max(counted) * len(counted) / sum(counted)


@given(
    st.sampled_from([(4, 4), (4, 2), (8, 4), (8, 2), (8, 1)]),
    st.integers(16, 70),
    st.integers(1, 12),
    st.sampled_from(["upper_half", "alternate"]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3, 4]),
)
def test_imbalance_is_what_counting_gives(
    sizes: tuple[int, int], sequence: int, half: int, rule: str, tp: int, cp: int
) -> None:
    arch = replace(LLAMA2_70B, heads=sizes[0], kv_heads=sizes[1])
    expected = _counted(*sizes, sequence, 2 * half, rule, tp, cp)
    assert imbalance(arch, sequence, 2 * half, rule, tp, cp) == pytest.approx(expected)


def test_the_busiest_rank_has_the_most_attention() -> None:
    """The first context rank has no past, the last one the longest under full attention; tensor ranks split heads."""
    grid, s2 = plan_grid(8, 1, 8, 1), AttentionSpec("s2", 8192)
    work = attention_work(LLAMA2_70B, 32768, s2, 1, 8)[0]
    assert work[0] == min(work) and work[7] == max(work) and busiest_rank(LLAMA2_70B, 32768, s2, grid) == 7
    assert work[7] == 32 * sum(4096 + t + 1 for t in range(4096)) + 32 * sum(t + 1 for t in range(4096))
    assert busiest_rank(LLAMA2_70B, 32768, AttentionSpec("full", 2, lend_from=None), grid) == 7
    # tp 2 x cp 8: one tensor rank has all shifted heads, whose groups begin at odd shards.
    grid = plan_grid(16, 2, 8, 1)
    rank = busiest_rank(LLAMA2_70B, 32768, s2, grid)
    by_rank = attention_work(LLAMA2_70B, 32768, s2, 2, 8)
    tp, cp = grid.coordinates(rank)[:2]
    assert by_rank[tp][cp] == max(max(row) for row in by_rank) > min(row[cp] for row in by_rank)


@pytest.mark.parametrize(
    ("tp", "cp", "parts"),
    [
        (
            2,
            8,
            (
                "tp 2 x cp 8 ",
                "8192 tokens",
                " 1.50 times ",
                "; attention.shifted_heads: alternate brings that to 1.00.",
            ),
        ),
        # One KV group a rank: no rule can put both kinds of heads on it.
        (8, 8, (" 1.50 times ", "; parallel.cp: 4 brings that to 1.00.")),
        # The other rule changes nothing here, half the ranks do.
        (1, 12, (" 1.18 times ", "; parallel.cp: 6 brings that to 1.07.")),
        # Shards of a quarter group.
        (1, 16, (" 1.27 times ", "; parallel.cp: 8 brings that to 1.00.")),
        (1, 8, ()),
        (1, 2, ()),
        (8, 4, ()),
        (8, 1, ()),
    ],
)
def test_what_is_said_of_llama2_70b_at_32k(tp: int, cp: int, parts: tuple[str, ...]) -> None:
    config = load_config(CONFIG, [*ON_GPUS, f"parallel.tp={tp}", f"parallel.cp={cp}"])
    plan = plan_grid(tp * cp, tp, cp, 1)
    said = advise(config, LLAMA2_70B, plan)
    assert len(said) == (1 if parts else 0)
    assert all(part in said[0] for part in parts)
    layout, planned = check_layout(config, plan_model(config.model, LLAMA2_70B), tp * cp)
    assert planned is not None and layout.advice == planned.balance() == said
    if parts and "alternate" in parts[-1]:
        mended = replace(config, attention=replace(config.attention, shifted_heads="alternate"))
        assert not advise(mended, LLAMA2_70B, plan)


def test_nothing_is_promised_where_nothing_helps() -> None:
    """Two context ranks at most, a group of which three quarters lie in one shard, one KV head."""
    config = load_config(CONFIG, [*ON_GPUS, "parallel.tp=2", "parallel.cp=2", "attention.group_size=21846"])
    arch = replace(LLAMA2_70B, kv_heads=2)
    (said,) = advise(config, arch, plan_grid(4, 2, 2, 1))
    assert said.endswith("the others wait for it.")
    assert imbalance(arch, 32768, 21846, "upper_half", 2, 2) > EVEN


@pytest.mark.parametrize("asked", ["attention.kind=full", "attention.full_last_steps=5"])
def test_full_attention_is_even_unless_that_is_switched_off(asked: str) -> None:
    """Of c shards the last has (2 c - 1) / c times the mean."""
    settings = [*ON_GPUS, asked, "attention.shifted_heads=alternate", "parallel.tp=2", "parallel.cp=8"]
    settings = [word for word in settings if not ("kind" in asked and "shifted" in word)]
    plan = plan_grid(16, 2, 8, 1)
    assert advise(load_config(CONFIG, settings), LLAMA2_70B, plan) == ()
    off = "train.without=[balanced_attention]"
    (said,) = advise(load_config(CONFIG, [*settings, off]), LLAMA2_70B, plan)
    assert said.startswith("train.without: balanced_attention leaves the last of 8 context ranks 1.87 times ")
    assert said.endswith(" which brings it to 1.00.")
    # Where queries see so few keys that nothing would move.
    short = [*settings, off, "data.sequence=4096", "attention.group_size=null"]
    assert not any("balanced" in one for one in advise(load_config(CONFIG, short), LLAMA2_70B, plan))
