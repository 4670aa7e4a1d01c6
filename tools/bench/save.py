"""How long a save stops training: state of a Llama-2-7B LongLoRA run on one device, saved beside a busy loop.

docs/BENCHES.md says how to read it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from parallel.world.grid import plan_grid
from parallel.world.groups import Groups, destroy_groups, make_groups
from parallel.world.rank_env import RankEnv
from parallel.world.rng import rng_state, seed_everything
from pipeline.checkpoint.manifest import FIELDS
from pipeline.checkpoint.saver import CheckpointSaver, StatePiece
from pipeline.config.paths import user_path
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser

HIDDEN, LAYERS, VOCABULARY, RANK = 4096, 32, 32000, 8


def state_of(scale: float, device: torch.device) -> list[StatePiece]:
    """The trained state's shapes, with hidden size and vocabulary scaled."""
    hidden, vocabulary = max(8, int(HIDDEN * scale)), max(8, int(VOCABULARY * scale))
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{stem}.{norm}.weight"] = (hidden,)
        for part in "qkvo":
            shapes[f"{stem}.self_attn.{part}_proj.lora_A.weight"] = (RANK, hidden)
            shapes[f"{stem}.self_attn.{part}_proj.lora_B.weight"] = (hidden, RANK)
    pieces = []
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        state = {field: torch.rand(count, device=device) for field in FIELDS}
        pieces.append(StatePiece(name, shape, None, 0, count, state))
    return pieces


def measure(
    folder: Path, groups: Groups, pieces: list[StatePiece], background: bool, rounds: int
) -> tuple[list[float], list[float]]:
    """Pauses and whole durations of some saves, seconds."""
    saver = CheckpointSaver(folder, groups, keep=1, background=background)
    saver.prepare(pieces)
    pauses, whole = [], []
    busy = torch.rand(1024, 1024, device=groups.device)
    for step in range(1, rounds + 1):
        if groups.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        saver.start(step, pieces, rng_state(), {"updates": step, "config": {}})
        if not background:
            saver.wait()
        pauses.append(time.perf_counter() - began)
        while saver.progress is not None:
            busy = busy @ busy / 512
            saver.settle()
        saver.wait()
        whole.append(time.perf_counter() - began)
    saver.close()
    return pauses, whole


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    parser = Parser("tools.bench.save", __doc__, "BENCHES.md")
    parser.add_argument("--output", type=user_path, required=True, help="an empty folder on the disk to measure")
    parser.add_argument("--scale", type=float, default=1.0, help="of hidden size and vocabulary (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="saves (default 3)")
    args = parser.parse_args(arguments)
    if args.output.exists() and any(args.output.iterdir()):
        parser.exit(2, f"error: {args.output} is not empty; give a new folder.\n")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pieces = state_of(args.scale, device)
    size = sum(tensor.numel() * 4 for piece in pieces for tensor in piece.state.values())
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {size / 1e9:.3f} GB of state")
    groups = make_groups(plan_grid(1, 1, 1, 1), RankEnv())
    seed_everything(0)
    try:
        for background in (True, False):
            pauses, whole = measure(args.output / f"background-{background}", groups, pieces, background, args.rounds)
            listed = ", ".join(f"{seconds:.3f}" for seconds in pauses)
            print(
                f"{'beside training' if background else 'training waits':>15}: pause {listed} s; whole after "
                + ", ".join(f"{seconds:.2f}" for seconds in whole)
                + " s"
            )
    finally:
        destroy_groups()
    return 0


if __name__ == "__main__":
    sys.exit(main())
