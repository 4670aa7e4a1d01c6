"""S² as published, which the peers bench measures against, is the roll our own legacy mode reproduces."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from pipeline.model.attention.local import attend
from pipeline.planning.attention_layout import AttentionSpec, SequenceLayout, head_plan
from tools.bench.peers import published_s2


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
