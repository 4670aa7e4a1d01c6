"""Proof of an export: config.json against the trained model, every tensor by its bytes, then logits of what its users
will load against the product's own.

The report (`verify.json` in the output folder) says what was checked and what was not.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from parallel.errors import CheckpointError
from pipeline.export import verify_logits
from pipeline.export.adapter_read import load_adapter
from pipeline.export.trained_model import TrainedModel, extended_config, partner_of
from pipeline.export.verify_config import check_config
from pipeline.export.verify_reference import own_logits
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.hf.writer import REPORT
from pipeline.planning.tensors import hf_tensor_shapes
from pipeline.storage.json_file import write_json
from pipeline.storage.safetensors import tensor_digest

TOLERANCE = 1e-4
"""Largest allowed difference of fp32 logits. The same sums in the same order should give no difference at all."""
Logits = Callable[[torch.Tensor], torch.Tensor]


def sample_tokens(vocab: int, length: int = 32, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 [2, length]."""
    return torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(seed))


def sample_positions(length: int, context: int) -> dict[str, torch.Tensor]:
    """Positions of `length` tokens, int64 [length]: `short` at the start, `long` spread over the whole context."""
    short = torch.arange(length)
    if context <= length:
        return {"short": short}
    return {"short": short, "long": (short * (context - 1)) // (length - 1)}


def compare_tensors(model: TrainedModel, folder: Path, form: str) -> dict[str, Any]:
    """Compare every tensor of an export, one at a time, by its bytes.

    `merged`: untouched tensors with the base's, the others with the sum computed again. Adapters: read back by
    `load_adapter` and compared with the trained tensors.

    Returns:
        `bit_equal` (nothing was computed), `recomputed` (W + scale B A, whole or mean rows), `file_hashes`; numbers.

    Raises:
        CheckpointError: one differs, is missing, or a setting does not come back; named.
    """
    counts = {"bit_equal": 0, "recomputed": 0, "file_hashes": 0}
    if form == "merged":
        out, base = HfCheckpoint(folder), HfCheckpoint(model.base)
        out.check(hf_tensor_shapes(model.arch), one_dtype=False)
        # The bytes on the disk, against what was written.
        counts["file_hashes"] = len(out.digests())
        written = out.recorded().tensors
        for name in hf_tensor_shapes(model.arch):
            touched = model.changes(name)
            if touched:
                want = tensor_digest(model.merged(name, model.base_tensor(base, name)))
            else:
                want = base.digest(name)
            if written[name] != want:
                raise CheckpointError(f"{folder / out.file_of(name)}: {name} is not what training made of it.")
            counts["recomputed" if touched else "bit_equal"] += 1
        if json.loads((folder / "config.json").read_text(encoding="utf-8")) != extended_config(model):
            raise CheckpointError(f"{folder / 'config.json'}: is not what the export wrote.")
        return counts
    back = load_adapter(folder, model.base, base_hash=model.base_hash)
    wanted = set(model.trained) | ({"model.embed_tokens.weight"} if model.grown else set())
    odd = sorted(wanted - set(back.trained))
    if odd:
        raise CheckpointError(f"{folder}: lacks {odd[0]}, which was trained.")
    same = (back.rope, back.context, back.lora.scale) == (model.rope, model.context, model.lora.scale)
    if not same or back.arch.vocab != model.arch.vocab:
        raise CheckpointError(f"{folder}: its RoPE, context, scale or vocabulary is not the trained model's.")
    base = HfCheckpoint(model.base)
    for name in sorted(wanted):
        tensor = model.trained[name] if name in model.trained else model.base_tensor(base, name)
        kept = tensor.to(torch.float32 if partner_of(name) else base.facts[name].dtype)
        if tensor_digest(back.trained[name]) != tensor_digest(kept):
            raise CheckpointError(f"{folder}: {name} is not the trained one.")
        counts["bit_equal" if name in model.trained else "recomputed"] += 1
    return counts


def _logits(model: TrainedModel, folder: Path, form: str, tokens: torch.Tensor, layerwise: bool) -> dict[str, Any]:
    """Largest difference and largest logit at every set of positions."""
    sets = sample_positions(tokens.shape[1], model.context)
    positions = list(sets.values())
    # PEFT adds adapters to the products' outputs; layer by layer they are in the weights.
    apart = form != "merged" and not layerwise
    wanted = own_logits(model, verify_logits.trained_weights(model, form, apart), tokens, positions, apart)
    gc.collect()
    if layerwise:
        weight = verify_logits.exported_weights(model, folder, form)
        found = verify_logits.layerwise_logits(folder, weight, tokens, positions)
    else:
        found = verify_logits.exported_logits(model, folder, form, tokens, positions)
    return {
        name: {
            "max_abs_difference": (found[i] - wanted[i]).abs().max().item(),
            "max_abs_logit": wanted[i].abs().max().item(),
            "positions": [int(positions[i][0]), int(positions[i][-1])],
        }
        for i, name in enumerate(sets)
    }


def rounding_effect(model: TrainedModel, tokens_BS: torch.Tensor, length: int) -> dict[str, Any]:
    """How far the merged model's logits are from those that training saw, whose base was rounded; with a sentence.

    Both by the product's own mathematics, adapters apart, in fp32: what remains is the base's rounding alone. Of FP8
    the rounding of activations is not in it.

    Args:
        length: tokens the result declares, over which positions are spread.
    """
    positions = list(sample_positions(tokens_BS.shape[1], length).values())[-1:]
    rounded, stored = verify_logits.training_weights(model), verify_logits.trained_weights(model, "adapter", apart=True)
    (seen,) = own_logits(model, rounded, tokens_BS, positions, True)
    (plain,) = own_logits(model, stored, tokens_BS, positions, True)
    difference = plain - seen
    apart = (difference.norm() / seen.norm()).item()
    same = (plain.argmax(-1) == seen.argmax(-1)).float().mean().item()
    most = difference.abs().max().item()
    sentence = (
        f"Trained on the base in {model.form} and exported for the matrices as stored: fp32 logits are {apart:.2%} "
        f"(root mean square) and at most {most:.3g} from those that training saw, and the likeliest token is the same "
        f"at {same:.1%} of {tokens_BS.numel()} random tokens."
    )
    return {
        "base_form": model.form,
        "relative_rms": apart,
        "max_abs_difference": most,
        "same_likeliest_token": same,
        "sentence": sentence,
    }


def _statements(model: TrainedModel, form: str, layerwise: bool) -> tuple[list[str], list[str]]:
    """What was checked, what was not; sentences."""
    reader = "transformers" if form == "merged" else "transformers and PEFT"
    checked = ["Every tensor of the export, by its bytes.", "The weight files' SHA-256 as they lie on the disk."]
    if form != "merged":
        checked[1] = "RoPE, context, LoRA scale and vocabulary as read back from the folder."
    checked.append("config.json as transformers reads it: sizes, constants and RoPE are those of the trained model.")
    missing = ["Logits of long sequences: few tokens were placed at long positions instead."]
    if model.form == "fp8":
        missing.append("The rounding of activations in training: the logits that it saw are made without it.")
    if layerwise:
        size = verify_logits.whole_bytes(model) / 2**30
        checked.append("fp32 logits, one layer in memory at a time, transformers' layers with the export's files.")
        missing.append(
            f"Loading by {reader} as a whole: that takes about {size:.1f} GiB, more than is free here; run verify on a "
            "larger machine for that."
        )
    else:
        checked.append(f"fp32 logits of the folder as {reader} load it.")
    return checked, missing


def verify(
    model: TrainedModel,
    folder: Path,
    form: str,
    tokens_BS: torch.Tensor | None = None,
    reference: Logits | None = None,
    tolerance: float = TOLERANCE,
    layerwise: bool | None = None,
) -> dict[str, Any]:
    """Check an export, and write `verify.json` into it; returns what was written.

    Args:
        tokens_BS: int64 [B, S]; None draws 2 x 32 at random.
        reference: logits [B, S, V] to compare with, at short positions; None computes them by the product's own
            mathematics (`own_logits`), at short and at long positions.
        layerwise: hold one layer at a time; None does so when the model does not fit into memory.

    Raises:
        CheckpointError: a setting of config.json or a tensor differs, or logits by more than `tolerance` (verify.json
            is written all the same).
    """
    tokens = sample_tokens(model.arch.vocab) if tokens_BS is None else tokens_BS
    # Both sides compute in full attention, which is the model's own up to its window.
    tokens = tokens[:, : model.arch.sliding_window]
    layerwise = not verify_logits.fits(model) if layerwise is None else layerwise
    checked, missing = _statements(model, form, layerwise)
    report: dict[str, Any] = {
        "format": form,
        "mode": "layer by layer" if layerwise else "whole model",
        "base_hash": model.base_hash,
        "tolerance": tolerance,
        "tokens": list(tokens.shape),
        "reference": "the product's own mathematics" if reference is None else "given by the caller",
        "checked": checked,
        "not_checked": missing,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "passed": False,
    }
    try:
        check_config(model, folder)
        report["tensors"] = compare_tensors(model, folder, form)
        if reference is None:
            logits = _logits(model, folder, form, tokens, layerwise)
        else:
            wanted = reference(tokens).float()
            (found,) = verify_logits.exported_logits(model, folder, form, tokens, [torch.arange(tokens.shape[1])])
            difference = (found - wanted).abs().max().item()
            logits = {"short": {"max_abs_difference": difference, "max_abs_logit": wanted.abs().max().item()}}
    except CheckpointError as error:
        write_json(folder / REPORT, {**report, "error": str(error)})
        raise CheckpointError(f"{error} Do not use this export; report it with {folder / REPORT}.") from None
    differences = [facts["max_abs_difference"] for facts in logits.values()]
    # Not `difference > tolerance`: a NaN must fail.
    passed = all(difference <= tolerance for difference in differences)
    worst = next((d for d in differences if d != d), max(differences))
    if model.form != "bf16":
        report["rounding"] = rounding_effect(model, tokens, model.context)
    report |= {"logits": logits, "max_abs_logit_difference": worst, "passed": passed}
    write_json(folder / REPORT, report)
    if not passed:
        raise CheckpointError(
            f"{folder}: its logits differ from the trained model's by {worst:.3g}, more than {tolerance:g}; do "
            "not use it, and report this with verify.json."
        )
    return report
