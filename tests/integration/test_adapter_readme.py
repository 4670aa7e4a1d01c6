"""An exported adapter is loaded by the lines of its own README, and verified without news that a user cannot use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.export.formats import export
from pipeline.export.verify import sample_tokens, verify
from tests.integration.test_import_export import by_hand, trained_model
from tests.support.tiny_models import make_tiny


def test_the_readme_loads_an_adapter_from_a_folder_of_any_name(tmp_path: Path) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "smollm2"))
    folder = tmp_path / 'an "adapter" of ours'
    export(model, folder, "adapter")
    found: dict[str, Any] = {}
    exec((folder / "README.md").read_text().split("```python\n")[1].split("```")[0], found)
    tokens = sample_tokens(model.arch.vocab, 48)
    with torch.no_grad():
        got = found["model"].eval()(tokens).logits
    assert (got - by_hand(model, 2.0, tokens)).abs().max() < 1e-4


@pytest.mark.filterwarnings("error::FutureWarning")
def test_others_renamings_are_no_news_of_a_verified_adapter(tmp_path: Path) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "smollm2"))
    export(model, tmp_path / "out", "adapter")
    assert verify(model, tmp_path / "out", "adapter")["passed"]
