"""S² as published, which the peers bench measures against, is the roll our own legacy mode reproduces."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from pipeline.model.attention.local import attend
from pipeline.planning.attention_layout import AttentionSpec, SequenceLayout, head_plan
from tools.bench.peers import add_ratios, published_s2


def test_the_published_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 32, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(1, 2, 32, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    found, _ = published_s2(SimpleNamespace(num_key_value_groups=2), q, k, v, None)  # type: ignore[arg-type]
    ours = attend(
        *(x.permute(2, 0, 1, 3) for x in (q, k, v)),
        SequenceLayout.dense(1, 32),
        AttentionSpec("s2", 8, legacy_wrap=True),
        head_plan(0, 4, 4, 2, "upper_half"),
    )
    torch.testing.assert_close(found, ours.transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_peers_are_compared_wherever_ours_keeps_gate_and_up() -> None:
    """Without `--gate-up gpu` too: hours were measured, and ended in a traceback."""
    names = ("transformers + PEFT, sdpa", "transformers + PEFT, s2", "Longspan, s2, auto, gate and up host")
    rows: list[dict[str, Any]] = [{"what": name, "tokens_per_second": 100.0} for name in names]
    rows += [
        {"what": "Longspan, full, auto, gate and up host", "tokens_per_second": 300.0},
        {"what": "Longspan, full, auto, gate and up fp8", "tokens_per_second": 400.0},
        {"what": "transformers + PEFT, sdpa-liger", "failed": "memory"},
    ]
    add_ratios(rows)
    assert [row.get("ratio") for row in rows] == [3.0, 1.0, 1.0, 1.0, 0.75, None]
