"""Logits of an export as its users' libraries compute them: loaded whole, or layer by layer where it is too large.

Tokens stand at positions of the caller's choice: a few of them spread over the whole context meet the long distances of
RoPE without the cost of a long sequence.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipeline.export.adapter_read import TRAINABLE, load_adapter
from pipeline.export.trained_model import TrainedModel
from pipeline.export.verify_config import check_rotary, read_hf_config
from pipeline.export.verify_reference import Weight
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.model.layers.quantized_weight import FORMS, dequantized
from pipeline.planner.host_memory import host_left
from pipeline.planning.tensors import hf_tensor_shapes, to_ours
from pipeline.storage.pickled import read_pickled

ROOM = 0.7
"""Share of the available memory a check may take."""


def whole_bytes(model: TrainedModel) -> int:
    """What loading the model in fp32 takes, with a quarter for the largest tensors' copies."""
    shapes = hf_tensor_shapes(model.arch)
    return 5 * sum(torch.Size(shape).numel() for shape in shapes.values())


def fits(model: TrainedModel) -> bool:
    """Whether the whole model may be loaded in fp32."""
    return whole_bytes(model) <= ROOM * host_left()[0]


def _run(network: Any, tokens_BS: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
    """Logits fp32 [B, S, V]."""
    # With no mask transformers takes a jump of the positions for the start of another document.
    mask = torch.ones_like(tokens_BS)
    positions = positions_S[None].expand_as(tokens_BS)
    with torch.no_grad():
        logits: torch.Tensor = network.eval()(tokens_BS, position_ids=positions, attention_mask=mask).logits
    return logits.float()


def exported_logits(
    model: TrainedModel, folder: Path, form: str, tokens_BS: torch.Tensor, positions: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Logits fp32 [B, S, V], one for each of `positions`, of an exported folder loaded by transformers (and PEFT).

    Raises:
        CheckpointError: the loaded model's RoPE is not the one trained with.
    """
    # Attention with the sums in the reference's order.
    how = {"dtype": torch.float32, "attn_implementation": "eager"}
    if form == "merged":
        network: Any = AutoModelForCausalLM.from_pretrained(folder, **how)
        check_rotary(network.model.rotary_emb, model, f"{folder}, loaded")
    else:
        config = read_hf_config(folder)
        base = AutoModelForCausalLM.from_pretrained(
            model.base, config=config, ignore_mismatched_sizes=model.grown, **how
        )
        check_rotary(base.model.rotary_emb, model, f"{folder}, loaded with {model.base}")
        if form == "longlora":
            if model.grown:
                # LongLoRA's script resizes before it loads: what no file holds is the mean there too.
                _fill_grown(model, base)
            # What LongLoRA's merge script does, but for its trust in pickles.
            base.load_state_dict(read_pickled(folder / f"{TRAINABLE}.bin"), strict=False)
            base.tie_weights()
        with warnings.catch_warnings():
            # Of names that transformers has changed since PEFT's release: nothing that a user could do.
            warnings.simplefilter("ignore", FutureWarning)
            # PEFT only warns when the file does not hold what the model wants; here that is a failure.
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            network = PeftModel.from_pretrained(base, folder)
    return [_run(network, tokens_BS, where) for where in positions]


def _fill_grown(model: TrainedModel, network: Any) -> None:
    source = HfCheckpoint(model.base)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                parameter.copy_(model.base_tensor(source, name))


def layerwise_logits(
    folder: Path, weight: Weight, tokens_BS: torch.Tensor, positions: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Logits fp32 [B, S, V], one for each of `positions`, of transformers' layers as config.json of `folder` describes
    them, holding one layer's weights at a time."""
    config = read_hf_config(folder)
    with torch.device("meta"):
        how = {"dtype": torch.float32, "attn_implementation": "eager"}
        network = AutoModelForCausalLM.from_config(config, **how).eval()
    inner = network.model
    rotary = type(inner.rotary_emb)(config)
    size = tokens_BS.shape[1]
    causal = torch.full((1, 1, size, size), torch.finfo(torch.float32).min).triu(1)
    with torch.no_grad():
        start = torch.nn.functional.embedding(tokens_BS, weight("model.embed_tokens.weight")).float()
        states = [start.clone() for _ in positions]
        wheres = [where[None].expand_as(tokens_BS) for where in positions]
        angles = [rotary(start, where) for where in wheres]
        for number, layer in enumerate(inner.layers):
            _assign(layer, f"model.layers.{number}.", weight)
            for index, state in enumerate(states):
                out = layer(state, attention_mask=causal, position_embeddings=angles[index], position_ids=wheres[index])
                states[index] = out[0] if isinstance(out, tuple) else out
            layer.to("meta")
        _assign(inner.norm, "model.norm.", weight)
        head = weight("model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight").float()
        return [inner.norm(state) @ head.t() for state in states]


def _assign(module: torch.nn.Module, prefix: str, weight: Weight) -> None:
    """Give a module on the meta device its weights, in fp32."""
    state = {name: weight(prefix + name).float() for name, _ in module.named_parameters()}
    module.load_state_dict(state, strict=True, assign=True)


def trained_weights(model: TrainedModel, form: str, apart: bool = False) -> Weight:
    """The base's weights with the trained tensors applied by hand, but for the adapters where `apart`."""
    base = HfCheckpoint(model.base)

    def weight(name: str) -> torch.Tensor:
        stored = model.base_tensor(base, name)
        if form == "merged":
            return model.merged(name, stored)
        if name in model.trained:
            # Adapters keep whole tensors in the base's dtype too.
            return model.trained[name].to(stored.dtype)
        return stored if apart else model.merged(name, stored.float())

    return weight


def training_weights(model: TrainedModel) -> Weight:
    """The base's matrices as training had them (model.base), with whole trained tensors; adapters stay apart."""
    plain = trained_weights(model, "adapter", apart=True)

    def weight(name: str) -> torch.Tensor:
        projection = to_ours(name)[1] is not None and name.endswith(".weight")
        return dequantized(model.form, plain(name)) if projection and model.form in FORMS else plain(name)

    return weight


def exported_weights(model: TrainedModel, folder: Path, form: str) -> Weight:
    """Weights for `layerwise_logits` out of an export."""
    if form == "merged":
        return HfCheckpoint(folder).tensor
    return trained_weights(load_adapter(folder, model.base, base_hash=model.base_hash), form)
