"""What all ranks must have alike: the comparison, what is compared, and that a refusal names it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
import threading
import typing
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from parallel.errors import ConfigError
from parallel.world.agreement import difference, require_alike
from pipeline.config.yaml_file import defaults, load_config
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.training import rank_facts as facts_of
from pipeline.training.rank_facts import OWN_PATHS, rank_facts
from tests.numerics.test_training import write_run

PATIENCE = datetime.timedelta(seconds=20)


def meet(*brought: dict[str, str]) -> list[str]:
    """What every rank is told; empty: it went on."""
    store, told = dist.HashStore(), ["?"] * len(brought)

    def rank(number: int) -> None:
        try:
            require_alike(store, number, len(brought), "test", brought[number], PATIENCE)
            told[number] = ""
        except ConfigError as error:
            told[number] = str(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(brought))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return told


def test_every_rank_is_told_the_same() -> None:
    assert meet({"a": "1", "b": "2"}, {"b": "2", "a": "1"}, {"a": "1", "b": "2"}) == ["", "", ""]
    told = meet({"train.lr": "0.1", "a": "1"}, {"train.lr": "0.1", "a": "1"}, {"train.lr": "0.2", "a": "1"})
    assert len(set(told)) == 1 and "train.lr is 0.1 on ranks 0-1, 0.2 on rank 2" in told[0] and "a is" not in told[0]
    assert all(told) and told[0].endswith("program and model.")


def test_the_sentence_stays_short() -> None:
    many = difference([{"x": str(rank // 2), "y": "1" * 500} for rank in range(40)])
    assert "x is 0 on ranks 0-1, 1 on ranks 2-3, 2 on ranks 4-5, 3 on ranks 6-7 and 16 other values" in many
    assert "y is" not in many
    wide = difference([{f"n{n}": "a" * 500 for n in range(9)}, {f"n{n}": "b" for n in range(8)}])
    assert "; and 5 more;" in wide and len(wide) < 700
    assert "n8 is a... on rank 0, missing on rank 1" in difference([{"n8": "a..."}, {}])
    odd = difference([{"x": str(rank % 2)} for rank in range(12)])
    assert "x is 0 on ranks 0, 2, 4, 6 and 2 more, 1 on" in odd


def other_value(value: object) -> object:
    """Another setting of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 + 1
    return "elsewhere" if value is None or isinstance(value, str) else [*value, *value][: len(value) + 1]


def test_every_setting_is_compared_and_places_are_not(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path, "run"))
    base = HfCheckpoint(Path(config.model.path))
    facts = rank_facts(config, base)
    missing = [name for name in defaults() if name not in (*facts, *OWN_PATHS)]
    assert not missing and {"train.steps", "model.context", "output"} <= facts.keys()
    for name in ("lora.alpha", "train.seed", "output", "checks"):
        *sections, last = name.split(".")
        owner = config
        for section in sections:
            owner = getattr(owner, section)
        changed = dataclasses.replace(owner, **{last: other_value(getattr(owner, last))})
        other = dataclasses.replace(config, **{sections[0]: changed}) if sections else changed
        found = rank_facts(typing.cast(typing.Any, other), base)
        assert {key for key in facts if facts[key] != found[key]} == {name}
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, path="/local/copy"))
    assert rank_facts(moved, base) == facts and "data.path" in OWN_PATHS
    held_out = dataclasses.replace(config, eval=dataclasses.replace(config.eval, path="/x"))
    assert rank_facts(held_out, base)["eval.path"] == "set" != facts["eval.path"], "one rank alone would evaluate"


def test_a_copy_of_the_base_is_the_same_base_and_a_tuned_one_is_not(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path, "run"))
    base, copy = Path(config.model.path), tmp_path / "copy"
    shutil.copytree(base, copy)
    facts = rank_facts(config, HfCheckpoint(base))
    assert rank_facts(config, HfCheckpoint(copy)) == facts
    (weights,) = copy.glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name in tensors if "down_proj" in name)
    save_file({**tensors, name: tensors[name] * 1.001}, weights, {"format": "pt"})
    found = rank_facts(config, HfCheckpoint(copy))
    assert [key for key in facts if facts[key] != found[key]] == ["the base's weights (sha256 of a row of each)"]
    described = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(described | {"rms_norm_eps": 1e-3}))
    assert "the base's config.json (sha256)" in [
        key for key in facts if facts[key] != rank_facts(config, HfCheckpoint(copy))[key]
    ]


def test_the_programs_source_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = facts_of.source_digest()
    facts_of.source_digest.cache_clear()
    copy = tmp_path / "parallel"
    shutil.copytree(Path(facts_of.parallel.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(facts_of.parallel, "__path__", [str(copy)])
    try:
        assert facts_of.source_digest() == before, "another place, the same program"
        with (copy / "world/rng.py").open("a") as file:
            file.write("\nSALT = 1\n")
        facts_of.source_digest.cache_clear()
        assert facts_of.source_digest() != before
    finally:
        facts_of.source_digest.cache_clear()
