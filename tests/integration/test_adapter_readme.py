"""An exported adapter is loaded by the lines of its own README, and verified without news that a user cannot use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.answer_ends import ChatFormat
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


def test_a_readme_tells_where_answers_end_after_conversations_alone(tmp_path: Path) -> None:
    """Of a run on text it spoke of answers as soon as the base had a generation_config.json."""
    model = trained_model(make_tiny(tmp_path / "base", "smollm2"))
    (tmp_path / "base/generation_config.json").write_text('{"eos_token_id": 2}')
    export(model, tmp_path / "text", "adapter")
    assert "GenerationConfig" not in (tmp_path / "text/README.md").read_text()
    export(replace(model, chat=ChatFormat("", (1,))), tmp_path / "chat", "adapter")
    assert "GenerationConfig" in (tmp_path / "chat/README.md").read_text()


@pytest.mark.filterwarnings("error::FutureWarning")
def test_others_renamings_are_no_news_of_a_verified_adapter(tmp_path: Path) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "smollm2"))
    export(model, tmp_path / "out", "adapter")
    assert verify(model, tmp_path / "out", "adapter")["passed"]
