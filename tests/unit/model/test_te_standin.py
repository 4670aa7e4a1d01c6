"""The stand-in for Transformer Engine takes what the real one takes, by its sources."""

from __future__ import annotations

import inspect

import pytest

from pipeline.config.sections import FP8_RECIPES
from pipeline.model.layers import transformer_engine
from tests.support import te_standin
from tests.support.signatures import WANTED, known, signature, written

STANDING_IN = {
    (file, name)
    for file, names in WANTED["transformer-engine"].items()
    for name in names
    if not file.endswith(("ops/basic/rmsnorm.py",)) and name.split(".")[0] in vars(te_standin)
}


@pytest.mark.parametrize(("file", "name"), sorted(STANDING_IN))
def test_signatures_are_the_real_ones(file: str, name: str) -> None:
    ours: object = te_standin
    for part in name.split("."):
        ours = getattr(ours, part)
    assert callable(ours)
    found = inspect.signature(ours).parameters.values()
    wanted = known("transformer-engine", file, name).parameters.values()
    assert [(one.name, one.kind, one.default) for one in found] == [(one.name, one.kind, one.default) for one in wanted]


def test_what_is_stood_in_for() -> None:
    assert {name for _, name in STANDING_IN} == {
        *(f"{kind}.{method}" for kind in ("Linear", "LayerNormLinear") for method in ("__init__", "forward")),
        *("RMSNorm.__init__", "fp8_autocast", "fp8_model_init", "is_fp8_available"),
    }


def test_norms_are_given_what_they_are_made_of() -> None:
    """RMSNorm hands its other arguments to an operation, which must know them."""
    file = "transformer_engine/pytorch/ops/basic/rmsnorm.py"
    assert {"device", "dtype"} <= known("transformer-engine", file, "RMSNorm.__init__").parameters.keys()


def test_a_gpu_is_asked_about_every_recipe() -> None:
    file = "transformer_engine/pytorch/quantization.py"
    assert transformer_engine.SUPPORTED_BY.keys() == transformer_engine.FORMATS.keys() == {*FP8_RECIPES} - {"none"}
    for name in transformer_engine.SUPPORTED_BY.values():
        known("transformer-engine", file, name).bind(return_reason=True)


def test_signatures_are_read_from_source() -> None:
    source = "class A:\n def f(self, a: int, b=(1, None), *c, d: str='x', e=g(), **k): ...\n"
    text = written(source, "A.f")
    assert text == "self, a, b=(1, None), *c, d='x', e=g(), **k"
    found = signature(text)
    assert list(found.parameters) == ["self", "a", "b", "c", "d", "e", "k"]
    assert found.parameters["b"].default == (1, None) and found.parameters["e"].default == "g()"
    with pytest.raises(TypeError, match="unexpected|too many|missing"):
        found.bind()
    with pytest.raises(LookupError, match=r"A\.g"):
        written(source, "A.g")
