"""What each rank does in test_data_parallel.py: replicas train beside a twin in the same process that has no group.

The twin sees all replicas' micro-batches. Its own gradients are compared within fp32 rounding; then it is given the
replicas' gradients, so that its update must be equal to the bit, at every step and for bf16 too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from parallel.axes import data
from parallel.axes.data import GradientReducer
from pipeline.training.optimizer import TrainableAdamW
from tests.support.optimizer_state import state_bytes

VOCAB, HIDDEN, MICRO, STEPS = 37, 10, 3, 3
RATES = {"lora": 1e-2, "other": 3e-3}
BUCKET = 160
"""Smaller than the largest parameters and larger than the smallest: buckets of one and of several, chunked gathers."""


class Model(nn.Module):
    """Tied embedding first and last, layers of odd sizes, and a branch that some micro-batches do not use."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        shapes = {"embed": (VOCAB, HIDDEN), "norm": (HIDDEN,), "a": (7, HIDDEN), "b": (HIDDEN, 7), "rare": (3, HIDDEN)}
        shapes |= {"tail": (HIDDEN, HIDDEN), "bias": (HIDDEN,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter((torch.randn(shape, generator=generator) * 0.3).to(dtype)))

    def loss(self, seed: int) -> torch.Tensor:
        """Loss of micro-batch `seed`; every third one uses the rare branch."""
        tokens = torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(seed))
        hidden = functional.embedding(tokens, self.embed) * self.norm
        hidden = hidden + torch.tanh(hidden @ self.a.t()) @ self.b.t()
        hidden = torch.tanh(hidden @ self.tail.t() + self.bias)
        logits = hidden @ self.embed.t()
        extra = (hidden @ self.rare.t()).float().square().mean() if seed % 3 == 0 else 0.0
        return functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()) + extra


def make(dtype: torch.dtype, group: dist.ProcessGroup | None = None) -> tuple[Model, TrainableAdamW]:
    model = Model(dtype)
    named = [(n, "lora" if n in ("a", "b") else "other", p) for n, p in model.named_parameters()]
    optimizer = TrainableAdamW(named, weight_decay=0.1, clip=0.5, group=group, bucket_elements=BUCKET)
    return model, optimizer


def gradients(model: Model) -> torch.Tensor:
    return torch.cat([p.main_grad.flatten() for p in model.parameters()])  # type: ignore[attr-defined]


def seeds(step: int, size: int) -> list[list[int]]:
    """Micro-batches of one step, by replica."""
    return [[1000 * step + rank * MICRO + index for index in range(MICRO)] for rank in range(size)]


def run_step(model: Model, optimizer: TrainableAdamW, mine: list[int], overlap: bool = True) -> None:
    """Gradients of one step, summed over the replicas."""
    optimizer.zero_grad()
    for index, seed in enumerate(mine):
        if overlap and index == len(mine) - 1:
            optimizer.arm_reduce()
        model.loss(seed).backward()
    optimizer.reduce_gradients()


def compare(group: dist.ProcessGroup, dtype: torch.dtype, overlap: bool = True) -> dict[str, Any]:
    """Train replicas beside their twin; what differed, and the replicas' final state."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    (model, optimizer), (twin, oracle) = make(dtype, group), make(dtype)
    worst, equal = 0.0, True
    for step in range(STEPS):
        run_step(model, optimizer, seeds(step, size)[rank], overlap)
        run_step(twin, oracle, [seed for part in seeds(step, size) for seed in part])
        ours, theirs = gradients(model), gradients(twin)
        worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max()).item())
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.main_grad.copy_(p.main_grad)  # type: ignore[attr-defined]
        norm = optimizer.grad_norm()
        equal &= torch.equal(norm, oracle.grad_norm()) and float(norm) > 0.5  # clipping is exercised
        optimizer.step(RATES, float(norm))
        oracle.step(RATES, float(norm))
        equal &= all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    state = optimizer.masters() | optimizer.state_dict()
    whole = oracle.masters() | oracle.state_dict()
    equal &= state.keys() == whole.keys() and all(torch.equal(state[name], whole[name]) for name in whole)
    shapes = all(state[name].shape == whole[name].shape for name in whole)
    return {
        "worst": worst,
        "equal": equal and shapes,
        "gradients": gradients(model),
        "state": state,
        "bytes": (state_bytes(optimizer), state_bytes(oracle)),
        "first only": len(optimizer.masters(False)) + len(optimizer.state_dict(False)),
    }


def free_run(group: dist.ProcessGroup) -> float:
    """Largest difference of fp32 weights after steps on its own, relative to one process's."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    (model, optimizer), (twin, oracle) = make(torch.float32, group), make(torch.float32)
    for step in range(STEPS):
        run_step(model, optimizer, seeds(step, size)[rank])
        run_step(twin, oracle, [seed for part in seeds(step, size) for seed in part])
        for one in (optimizer, oracle):
            one.step(RATES, float(one.grad_norm()))
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return max(((p - q).abs().max() / q.abs().max()).item() for p, q in pairs)


def load_whole(optimizer: TrainableAdamW, masters: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """Give every rank its pieces of whole tensors, as a checkpoint does."""

    def read(name: str, field: str, start: int, stop: int) -> torch.Tensor:
        whole = masters[name] if field == "master" else state[f"{name}.{field}"]
        return whole.reshape(-1)[start:stop]

    optimizer.load_pieces(read, int(state["step"]))


def continued(
    state: dict[str, torch.Tensor], dtype: torch.dtype, group: dist.ProcessGroup | None
) -> dict[str, torch.Tensor]:
    """Load a state and apply one update with given gradients; the state after it."""
    model, optimizer = make(dtype, group)
    masters = {name: state[name] for name, _ in model.named_parameters()}
    load_whole(optimizer, masters, state)
    loaded = optimizer.masters() | optimizer.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    size = 1 if group is None else dist.get_world_size(group)
    generator = torch.Generator().manual_seed(3)
    optimizer.zero_grad()
    for parameter in model.parameters():
        # A power of two: the sum over the ranks is exact.
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator) / size)  # type: ignore[attr-defined]
    optimizer.reduce_gradients()
    optimizer.step(RATES, float(optimizer.grad_norm()))
    found = optimizer.masters() | optimizer.state_dict()
    found |= {f"{name}.parameter": p.detach().clone() for name, p in model.named_parameters()}
    return found


def starts(group: dist.ProcessGroup) -> dict[str, Any]:
    """Bucket starts when every rank's hooks fire in another order, and the last rank misses a gradient."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    spans = [(0, 10), (64, 80), (128, 130), (192, 250), (256, 260)]
    flat = torch.arange(260.0) * (rank + 1)
    reducer = GradientReducer(flat, spans, group, 70)
    order: list[int] = []
    seen: list[int] = []
    real = dist.all_reduce

    def logged(tensor: torch.Tensor, **kwargs: Any) -> Any:
        order.append(tensor.storage_offset())
        return real(tensor, **kwargs)

    with mock.patch.object(data.dist, "all_reduce", logged):
        reducer.arm()
        fired = torch.randperm(len(spans), generator=torch.Generator().manual_seed(rank)).tolist()
        for index in fired:
            if not (rank == size - 1 and index == 3):
                reducer.ready(index)
                seen.append(reducer.started)
        reducer.finish()
    expected = torch.arange(260.0) * sum(range(1, size + 1))
    held = torch.cat([torch.arange(start, stop) for start, stop in spans])
    return {"order": order, "fired": fired, "seen": seen, "sums": torch.equal(flat[held], expected[held])}


def overlap_evidence(group: dist.ProcessGroup) -> list[int]:
    """Buckets under way each time a parameter's gradient arrived in the armed backward, and before it."""
    model, optimizer = make(torch.float32, group)
    reducer = optimizer._gradients.reducer
    assert reducer is not None
    found: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: found.append(reducer.started))
    optimizer.zero_grad()
    model.loss(0).backward()
    unarmed = max(found)
    found.clear()
    optimizer.arm_reduce()
    model.loss(3).backward()
    optimizer.reduce_gradients()
    return [unarmed, len(reducer.buckets), *found]


def chunked(group: dist.ProcessGroup) -> bool:
    """Arming two model chunks one after the other sums as arming all does."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    (model, optimizer), (twin, oracle) = make(torch.float32, group), make(torch.float32, group)
    mine = seeds(0, size)[rank]
    run_step(twin, oracle, mine)
    optimizer.zero_grad()
    late = [model.tail, model.bias, model.rare]
    for index, seed in enumerate(mine):
        if index == 1:
            optimizer.arm_reduce([model.embed])
        if index == 2:
            optimizer.arm_reduce([model.norm, *late])
        # `a` and `b` are never armed; the embedding's bucket comes after theirs, so it may not start early.
        model.loss(seed).backward()
    optimizer.reduce_gradients()
    return torch.equal(gradients(model), gradients(twin))


def other_groups(group: dist.ProcessGroup) -> dict[str, Any]:
    """`sum_marked` over a group of two without replicas, and the norm of a model that shares a parameter."""
    rank = dist.get_rank(group)
    model, optimizer = make(torch.float32)
    for name in ("norm", "b", "bias"):
        getattr(model, name).sequence_parallel = True
    model.embed.embedding_group = True  # type: ignore[attr-defined]
    optimizer.zero_grad()
    for index, parameter in enumerate(model.parameters()):
        parameter.main_grad.fill_((rank + 1) * (index + 1))  # type: ignore[attr-defined]
    counts = (optimizer.sum_marked("sequence_parallel", group), optimizer.sum_marked("embedding_group", group))
    values = {name: p.main_grad.unique().tolist() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    twice = message(lambda: optimizer.sum_marked("sequence_parallel", group))
    norm = optimizer.grad_norm()
    if rank == 1:
        model.embed.shared_copy = True  # type: ignore[attr-defined]

    def reduce(squares: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(squares, group=group)
        return squares

    return {
        "counts": counts,
        "values": values,
        "twice": twice,
        "norms": (float(norm), float(optimizer.grad_norm(reduce))),
    }


def message(call: Callable[[], Any]) -> str:
    """Text of the RuntimeError that a call raises; empty if it raises none."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def misuse(group: dist.ProcessGroup) -> list[str]:
    """Errors of wrong calls, in the order of the test's list; all ranks make the same."""
    model, optimizer = make(torch.float32, group)
    optimizer.zero_grad()
    found = [message(lambda: optimizer.step(RATES, 1.0)), message(optimizer.grad_norm)]
    found.append(message(lambda: optimizer.sum_marked("x", group)))
    found.append(message(lambda: optimizer.arm_reduce([nn.Parameter(torch.zeros(1))])))
    optimizer.arm_reduce()
    found.append(message(optimizer.arm_reduce))
    model.loss(0).backward()
    found.append(message(optimizer.zero_grad))
    found.append(message(lambda: model.loss(0).backward()))
    optimizer.reduce_gradients()
    found += [message(optimizer.reduce_gradients), message(optimizer.arm_reduce)]
    found.append(message(lambda: model.loss(0).backward()))
    return found


@contextlib.contextmanager
def twice_reduced() -> Iterator[None]:
    """The fault: the second bucket is summed twice."""
    start = GradientReducer._start

    def faulty(self: GradientReducer) -> None:
        if self.started == 1:
            dist.all_reduce(self._views[1], group=self.group)
        start(self)

    with mock.patch.object(GradientReducer, "_start", faulty):
        yield


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """The fault: the last parameter of a bucket of several is not summed."""
    init = GradientReducer.__init__

    def faulty(self: GradientReducer, flat: torch.Tensor, spans: Any, *args: Any) -> None:
        init(self, flat, spans, *args)
        number = next(number for number, bucket in enumerate(self.buckets) if len(bucket) > 1)
        view = self._views[number]
        self._views[number] = view[: spans[self.buckets[number][0]][0] - spans[self.buckets[number][-1]][0]]
        assert 0 < self._views[number].numel() < view.numel()

    with mock.patch.object(GradientReducer, "__init__", faulty):
        yield


def tiny(group: dist.ProcessGroup) -> bool:
    """A model so small that most ranks' slices are padding still trains alike."""
    found = []
    for one in (group, None):
        weight = nn.Parameter(torch.linspace(-1, 1, 10))
        optimizer = TrainableAdamW([("w", "lora", weight)], clip=0.0, group=one)
        optimizer.zero_grad()
        (weight.square().sum() / (1 if one is None else dist.get_world_size(group))).backward()
        optimizer.reduce_gradients()
        optimizer.step(RATES, 1.0)
        found.append((weight.detach(), optimizer.masters()["w"], optimizer.state_dict()["step"]))
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def work(rank: int, world: int) -> dict[Any, Any]:
    dist.init_process_group("gloo")
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    groups = {4: dist.group.WORLD, 2: pairs[rank // 2]}
    found: dict[Any, Any] = {}
    for size, group in groups.items():
        assert group is not None
        for dtype in (torch.float32, torch.bfloat16):
            one = found[size, dtype] = compare(group, dtype)
            plain = compare(group, dtype, overlap=False)
            one["overlap changes nothing"] = torch.equal(one["gradients"], plain["gradients"]) and all(
                torch.equal(one["state"][name], plain["state"][name]) for name in plain["state"]
            )
            resumed = [continued(one["state"], dtype, other) for other in (None, groups[2], groups[4])]
            one["resumes"] = all(torch.equal(a[name], resumed[0][name]) for a in resumed for name in resumed[0])
            one.pop("state"), one.pop("gradients")
        found[size, "free"] = free_run(group)
        found[size, "starts"] = starts(group)
        found[size, "overlap"] = overlap_evidence(group)
        found[size, "chunked"] = chunked(group)
        found[size, "tiny"] = tiny(group)
        for fault in (twice_reduced, left_out):
            with fault():
                found[size, fault.__name__] = compare(group, torch.float32)["worst"]
    found["other"] = other_groups(groups[2])  # type: ignore[arg-type]
    found["misuse"] = misuse(groups[2])  # type: ignore[arg-type]
    return found
