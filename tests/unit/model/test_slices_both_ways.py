"""Every architecture, grid and dtype: ranks load their slices of a sharded checkpoint, and give the same bits back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from parallel.world.grid import plan_stages
from pipeline.config.sections import LoraConfig
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.hf.writer import write_safetensors_sharded
from pipeline.model.layers.frozen_weight import DenseWeight, FrozenWeight
from pipeline.model.weights.load import VOCABULARY, load_base
from pipeline.planning.arch import LlamaArch, read_arch
from pipeline.planning.tensors import hf_tensor_shapes, padded_vocab, to_hf, to_ours, tp_slice
from pipeline.storage.safetensors import TensorFact
from tests.support.tiny_models import KINDS, make_tiny

GRIDS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2), (4, 2)]


def apart(fused: torch.Tensor, arch: LlamaArch) -> tuple[torch.Tensor, ...]:
    """q, k and v of a fused projection: of each KV group its query heads, then its key and its value head."""
    groups = fused.unflatten(0, (-1, arch.heads // arch.kv_heads + 2, arch.head_dim))
    return tuple(part.flatten(0, 2) for part in groups.split((arch.heads // arch.kv_heads, 1, 1), dim=1))


class RankPart:
    """What rank (tp, pp) holds of a model, without megatron: parameters under our names, filled with rubbish."""

    def __init__(
        self, arch: LlamaArch, tp_rank: int, tp_size: int, layers: range, ends: tuple[bool, bool], dtype
    ) -> None:
        self.arch, self.lora, self.tp_rank, self.tp_size = arch, LoraConfig(rank=0), tp_rank, tp_size
        self.shards = None
        rows: dict[str, list[tuple[int, ...]]] = {}
        for name, shape in hf_tensor_shapes(arch).items():
            layer = name.split(".")[2] if name.startswith("model.layers.") else None
            first = name == "model.embed_tokens.weight" and (ends[0] or (ends[1] and arch.tied))
            last = name in ("model.norm.weight", "lm_head.weight") and ends[1]
            if (int(layer) in layers) if layer is not None else (first or last):
                rows.setdefault(to_ours(name)[0], []).append(self._local(name, shape))
        self.parameters = {
            name: torch.nn.Parameter(torch.full((sum(s[0] for s in shapes), *shapes[0][1:]), 77.0, dtype=dtype))
            for name, shapes in rows.items()
        }

    def _local(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if "embed_tokens" in name or "lm_head" in name:
            return padded_vocab(self.arch, self.tp_size) // self.tp_size, shape[1]
        cut = tp_slice(name, self.arch, self.tp_rank, self.tp_size)
        return shape if cut is None else (*shape[: cut[0]], cut[2] - cut[1], *shape[cut[0] + 1 :])

    def canonical_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from self.parameters.items()

    def frozen_matrices(self) -> Iterator[tuple[str, FrozenWeight]]:
        yield from ((name, DenseWeight(p)) for name, p in self.parameters.items() if ".linear_" in name and p.ndim == 2)

    def give_back(self) -> Iterator[tuple[str, tuple[int, int, int] | None, torch.Tensor]]:
        """(Hugging Face name, slice, tensor) of everything held, padding rows trimmed."""
        for name, parameter in self.parameters.items():
            sources = [hf_name for hf_name, _ in to_hf(name)]
            pieces: tuple[torch.Tensor, ...] = (parameter.data,)
            if "linear_qkv" in name:
                pieces = apart(parameter.data, self.arch)
            elif "linear_fc1" in name:
                pieces = parameter.data.chunk(2)
            for source, piece in zip(sources, pieces, strict=True):
                cut = tp_slice(source, self.arch, self.tp_rank, self.tp_size)
                if name in VOCABULARY:
                    assert cut is not None
                    assert not piece[cut[2] - cut[1] :].any(), "padding rows are zero"
                    piece = piece[: cut[2] - cut[1]]
                yield source, cut, piece


def parts_of(arch: LlamaArch, tp: int, pp: int, dtype: torch.dtype) -> Iterator[RankPart]:
    stages = plan_stages(arch.layers, pp, 1)
    for stage, layers in enumerate(stages):
        for rank in range(tp):
            yield RankPart(arch, rank, tp, layers, (stage == 0, stage == len(stages) - 1), dtype)


def divides(arch: LlamaArch, tp: int) -> bool:
    return not (arch.heads % tp or arch.kv_heads % tp or arch.ffn % tp)


def sharded(folder: Path, kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A tiny checkpoint in several shards; its tensors."""
    tensors = load_file(make_tiny(folder, kind, dtype=dtype, vocab_size=131, num_hidden_layers=3) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    facts = {name: TensorFact(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors_sharded(folder, facts, tensors.__getitem__, 50_000)
    return tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_slices_come_back_bit_for_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    tensors, arch = sharded(tmp_path, kind, dtype), read_arch(tmp_path)
    grids = [(tp, pp) for tp, pp in GRIDS if divides(arch, tp)]
    assert len(grids) >= 4 and any(tp > 1 and pp > 1 for tp, pp in grids)
    for tp, pp in grids:
        whole = {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}
        for part in parts_of(arch, tp, pp, dtype):
            checkpoint = HfCheckpoint(tmp_path)
            load_base(part, checkpoint)
            given = list(part.give_back())
            # Each rank reads its slices and not a byte more.
            assert checkpoint.bytes_read == sum(piece.nbytes for _, _, piece in given)
            for name, cut, piece in given:
                (whole[name] if cut is None else whole[name].narrow(cut[0], cut[1], cut[2] - cut[1])).copy_(piece)
        assert all(torch.equal(whole[name], tensors[name]) for name in tensors), (tp, pp)


@pytest.mark.parametrize("kind", ["llama2", "llama32"])
@pytest.mark.parametrize("tp", [1, 2])
def test_added_rows_are_the_mean_of_all_old_rows_on_every_rank(tmp_path: Path, kind: str, tp: int) -> None:
    tensors, stored = sharded(tmp_path, kind, torch.bfloat16), read_arch(tmp_path)
    arch = replace(stored, vocab=stored.vocab + 6)
    found: dict[str, dict[int, torch.Tensor]] = {}
    for part in parts_of(arch, tp, 2, torch.bfloat16):
        load_base(part, HfCheckpoint(tmp_path))
        for name, cut, piece in part.give_back():
            if cut is not None and ("embed" in name or "lm_head" in name):
                for row, value in enumerate(piece, cut[1]):
                    found.setdefault(name, {})[row] = value
    assert len(found) == (1 if arch.tied else 2)
    for name, rows in found.items():
        assert sorted(rows) == list(range(arch.vocab))
        assert all(torch.equal(rows[row], tensors[name][row]) for row in range(stored.vocab))
        mean = tensors[name].double().mean(0).bfloat16()
        assert all(torch.equal(rows[row], mean) for row in range(stored.vocab, arch.vocab))
