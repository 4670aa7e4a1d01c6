"""Proof of an export: load it as its users will, and compare logits with the trained tensors applied by hand."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from parallel.errors import CheckpointError
from pipeline.export import TrainedModel, extended_config
from pipeline.hf_companions import write_json
from pipeline.hf_files import HfCheckpoint

TOLERANCE = 1e-4
"""Largest allowed difference of fp32 logits. The same sums in the same order should give no difference at all."""
Logits = Callable[[torch.Tensor], torch.Tensor]


def sample_tokens(vocab: int, length: int = 32, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 [2, length]."""
    return torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(seed))


def reference_logits(model: TrainedModel, tokens_BS: torch.Tensor, form: str) -> torch.Tensor:
    """Logits fp32 [B, S, V] of transformers' model with the trained tensors put in by hand.

    Sums are taken in the order the export's reader takes them (`merged`: one rounded weight; `adapter`: W x, then
    scale B A x): a deep model amplifies a last-place difference a thousandfold on random tokens, so another order would
    need a tolerance that hides real faults.
    """
    values = extended_config(model)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    base = HfCheckpoint(model.base)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            weight = base.tensor(name)
            is_plain = form == "adapter" and name not in model.trained
            parameter.copy_(weight if is_plain else model.merged(name, weight if form == "merged" else weight.float()))
        if form == "adapter":
            for name in model.adapters:
                stem = name.removesuffix(".lora_A.weight")
                if stem != name:
                    network.get_submodule(stem).register_forward_hook(_low_rank(model, stem))
        logits: torch.Tensor = network(tokens_BS).logits
    return logits


def _low_rank(model: TrainedModel, stem: str) -> Callable[..., torch.Tensor]:
    """A forward hook that adds the adapter of module `stem`."""
    low, high = (model.trained[f"{stem}.lora_{side}.weight"].float() for side in "AB")

    def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        linear = torch.nn.functional.linear
        return output + linear(linear(inputs[0], low), high) * model.lora.scale

    return add


def exported_logits(model: TrainedModel, folder: Path, form: str, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits fp32 [B, S, V] of an exported folder, loaded by transformers (and PEFT) in fp32."""
    if form == "merged":
        network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        config = AutoConfig.from_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(model.base, config=config, dtype=torch.float32)
        with warnings.catch_warnings():
            # PEFT only warns when the file does not hold what the model wants; here that is a failure.
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            network = PeftModel.from_pretrained(base, folder)
    with torch.no_grad():
        logits: torch.Tensor = network.eval()(tokens_BS).logits
    return logits


def verify(
    model: TrainedModel,
    folder: Path,
    form: str,
    tokens_BS: torch.Tensor | None = None,
    reference: Logits | None = None,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Reload an export, compare logits, and write `verify.json` into it; returns what was written.

    Args:
        tokens_BS: int64 [B, S]; None draws 2 x 32 at random.
        reference: logits [B, S, V] to compare with; None applies the trained tensors to transformers' model by hand.

    Raises:
        CheckpointError: the largest absolute difference exceeds `tolerance` (verify.json is written all the same).
    """
    tokens = sample_tokens(model.arch.vocab) if tokens_BS is None else tokens_BS
    if reference is None:
        wanted = reference_logits(model, tokens, form)
    else:
        wanted = reference(tokens).float()
    gc.collect()
    found = exported_logits(model, folder, form, tokens)
    difference = (found - wanted).abs().max().item()
    # Not `difference > tolerance`: a NaN must fail.
    passed = difference <= tolerance
    report = {
        "format": form,
        "max_abs_logit_difference": difference,
        "max_abs_logit": wanted.abs().max().item(),
        "tolerance": tolerance,
        "tokens": list(tokens.shape),
        "reference": "trained tensors applied to the base by hand" if reference is None else "given by the caller",
        "passed": passed,
    }
    write_json(folder / "verify.json", report)
    if not passed:
        raise CheckpointError(
            f"{folder}: its logits differ from the trained model's by {difference:.3g}, more than {tolerance:g}; do "
            "not use it, and report this with verify.json."
        )
    return report
