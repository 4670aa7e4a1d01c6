"""TrainableAdamW against torch's own AdamW and clipping; it loses no gradient and touches no frozen weight."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from pipeline.training import optimizer as optim
from pipeline.training.optimizer import TrainableAdamW
from tests.numerics.data_parallel_work import load_whole
from tests.support.optimizer_state import flat_gradient, state_bytes

BETAS, EPS = (0.9, 0.95), 1e-8
RATES = {"lora": 1e-2, "other": 3e-3}


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Embedding, norm weight (1-d), an odd-sized matrix and a frozen one."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"embed": nn.Embedding(11, 6), "norm": nn.LayerNorm(6), "frozen": nn.Linear(6, 6), "lora": nn.Linear(6, 3)}
    )
    model["frozen"].requires_grad_(False)
    return model.to(dtype)


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 11, (4, 5), generator=generator)
    hidden = model["frozen"](model["norm"](model["embed"](tokens)))  # type: ignore[index]
    return model["lora"](torch.tanh(hidden)).float().square().mean()  # type: ignore[index]


def group_of(name: str) -> str:
    return "lora" if name.startswith("lora") else "other"


def make_optimizer(model: nn.Module, weight_decay: float = 0.0, clip: float = 0.0) -> TrainableAdamW:
    named = [(name, group_of(name), p) for name, p in model.named_parameters() if p.requires_grad]
    return TrainableAdamW(named, betas=BETAS, eps=EPS, weight_decay=weight_decay, clip=clip)


def torch_optimizer(model: nn.Module, weight_decay: float, fused: bool) -> torch.optim.AdamW:
    """The oracle: torch's class, with the same groups spelled out by hand."""
    groups = [
        {"params": [p], "lr": RATES[group_of(name)], "weight_decay": weight_decay if p.ndim >= 2 else 0.0}
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    return torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=fused, foreach=False)


def train(model: nn.Module, optimizer: TrainableAdamW, seeds: range) -> list[float]:
    losses = []
    for seed in seeds:
        optimizer.zero_grad()
        loss = loss_of(model, seed)
        loss.backward()
        optimizer.step(RATES, float(optimizer.grad_norm()))
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("fused", [True, False])
def test_fp32_equals_torch_adamw(weight_decay: float, fused: bool) -> None:
    ours, theirs = make_model(), make_model()
    optimizer, oracle = make_optimizer(ours, weight_decay), torch_optimizer(theirs, weight_decay, fused)
    losses = train(ours, optimizer, range(20))
    for seed in range(20):
        oracle.zero_grad()
        loss = loss_of(theirs, seed)
        loss.backward()
        oracle.step()
        assert losses[seed] == pytest.approx(loss.item(), abs=0 if fused else 1e-6)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if fused:
            assert torch.equal(a, b), name
        else:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6, msg=name)


def test_bf16_follows_an_fp32_oracle_fed_the_same_gradients() -> None:
    model = make_model(torch.bfloat16)
    optimizer = make_optimizer(model, weight_decay=0.1)
    oracle_params = {n: nn.Parameter(p.detach().float()) for n, p in model.named_parameters() if p.requires_grad}
    oracle = torch.optim.AdamW(
        [
            {"params": [p], "lr": RATES[group_of(n)], "weight_decay": 0.1 if p.ndim >= 2 else 0.0}
            for n, p in oracle_params.items()
        ],
        betas=BETAS,
        eps=EPS,
        fused=True,
    )
    for seed in range(30):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is None
                oracle_params[name].grad = parameter.main_grad.clone()  # type: ignore[attr-defined]
        optimizer.step(RATES, float(optimizer.grad_norm()))
        oracle.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(optimizer.masters()[name], oracle_params[name]), name
            assert torch.equal(parameter, oracle_params[name].to(torch.bfloat16)), name


def test_masters_move_where_bf16_weights_could_not() -> None:
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = TrainableAdamW([("w", "lora", weight)], clip=0.0)
    for _ in range(40):  # 40 steps of 1e-4: each below bf16's spacing of 2^-8 under 1, together above half of it
        optimizer.zero_grad()
        weight.sum().backward()
        optimizer.step({"lora": 1e-4}, 4.0)
    torch.testing.assert_close(optimizer.masters()["w"], torch.full((4, 4), 0.996), atol=1e-5, rtol=0)
    assert torch.equal(weight, torch.full_like(weight, 0.99609375))


def test_accumulation_is_an_fp32_sum() -> None:
    weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    TrainableAdamW([("w", "lora", weight)])
    naive = torch.zeros(3, dtype=torch.bfloat16)
    for value in [1.0] + [2.0**-9] * 64:
        (weight * value).sum().backward()
        naive += value
    assert torch.equal(weight.main_grad, torch.full((3,), 1.125))  # type: ignore[attr-defined]
    assert torch.equal(naive, torch.ones(3, dtype=torch.bfloat16)), "bf16 would have lost all 64 terms"


def test_accumulating_micro_batches_equals_one_batch() -> None:
    whole, parts = make_model(), make_model()
    one, many = make_optimizer(whole), make_optimizer(parts)
    torch.stack([loss_of(whole, seed) for seed in range(4)]).mean().backward()
    for seed in range(4):
        (loss_of(parts, seed) / 4).backward()
    torch.testing.assert_close(flat_gradient(one), flat_gradient(many), atol=1e-8, rtol=1e-6)
    assert float(one.grad_norm()) == pytest.approx(float(many.grad_norm()), rel=1e-6)


@pytest.mark.parametrize("clip", [0.01, 1e3])
def test_norm_and_clipping_equal_torch(clip: float) -> None:
    ours, theirs = make_model(), make_model()
    optimizer = make_optimizer(ours, clip=clip)
    loss_of(ours, 0).backward()
    loss_of(theirs, 0).backward()
    expected = torch.nn.utils.clip_grad_norm_([p for p in theirs.parameters() if p.requires_grad], clip)
    norm = optimizer.grad_norm()
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, expected, atol=0, rtol=1e-6)
    optimizer.step(RATES, float(norm))
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.main_grad, b.grad, atol=1e-9, rtol=1e-6, msg=name)  # type: ignore[attr-defined]


def test_clip_zero_leaves_gradients_alone() -> None:
    model = make_model()
    optimizer = make_optimizer(model, clip=0.0)
    (1e4 * loss_of(model, 0)).backward()
    before = flat_gradient(optimizer).clone()
    optimizer.step(RATES, float(optimizer.grad_norm()))
    assert torch.equal(flat_gradient(optimizer), before)


def test_norm_of_an_embedding_of_millions_is_that_of_fp64() -> None:
    """A CPU's sum of so many squares in fp32 is wrong by 8e-4."""
    embedding = torch.nn.Parameter(torch.empty(1 << 14, 1 << 10))
    optimizer = TrainableAdamW([("embed", "other", embedding)], eps=1e-8, weight_decay=0.0, clip=1.0)
    gradient = embedding.main_grad.normal_(generator=torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
    exact = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    assert float(optimizer.grad_norm()) == pytest.approx(float(exact), rel=1e-6)


def test_norm_of_a_sharded_model_equals_the_whole() -> None:
    """Two pretended tensor-parallel ranks hold half a matrix each and the same norm weight."""
    torch.manual_seed(1)
    matrix, vector = torch.randn(8, 4), torch.randn(4)
    ranks = []
    for half in matrix.chunk(2):
        split, alike = nn.Parameter(half.clone()), nn.Parameter(vector.clone())
        split.tensor_model_parallel = True  # type: ignore[attr-defined]
        alike.sequence_parallel = True  # type: ignore[attr-defined]
        optimizer = TrainableAdamW([("m", "lora", split), ("v", "other", alike)])
        (split.square().sum() + alike.square().sum()).backward()
        ranks.append(optimizer)
    seen: list[torch.Tensor] = []
    for optimizer in ranks:
        optimizer.grad_norm(lambda squares: seen.append(squares.clone()) or squares)  # type: ignore[func-returns-value]

    def reduce(squares: torch.Tensor) -> torch.Tensor:
        return torch.stack([squares[0], seen[0][1] + seen[1][1]])

    expected = (4 * (matrix.double().square().sum() + vector.double().square().sum())).sqrt().float()
    for optimizer in ranks:
        torch.testing.assert_close(optimizer.grad_norm(reduce), expected, atol=0, rtol=1e-6)


def test_frozen_weights_get_no_state_and_do_not_move() -> None:
    model = make_model(torch.bfloat16)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = make_optimizer(model)
    train(model, optimizer, range(5))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert state_bytes(optimizer) == 12 * trained
    fp32 = make_model()
    assert state_bytes(make_optimizer(fp32)) == 8 * trained, "an fp32 parameter is its own master"
    assert len(frozen) == 2
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])
            assert parameter.grad is None and not hasattr(parameter, "main_grad")
    assert not any("frozen" in name for name in optimizer.state_dict() | optimizer.masters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_training_is_bit_equal(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    optimizer = make_optimizer(model, weight_decay=0.1, clip=0.5)
    train(model, optimizer, range(7))
    saved = (
        {n: t.clone() for n, t in optimizer.masters().items()},
        {n: t.clone() for n, t in optimizer.state_dict().items()},
    )
    expected = train(model, optimizer, range(7, 15))

    fresh = make_model(dtype)
    resumed = make_optimizer(fresh, weight_decay=0.1, clip=0.5)
    load_whole(resumed, *saved)
    assert int(resumed.state_dict()["step"]) == 7
    assert train(fresh, resumed, range(7, 15)) == expected
    for (name, a), (_, b) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for name, tensor in optimizer.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_the_norm_is_that_of_the_whole_flat_buffer_over_several_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "BUCKET_ELEMENTS", 50)
    model = make_model()
    optimizer = make_optimizer(model)
    loss_of(model, 0).backward()
    norm = float(optimizer.grad_norm())
    flat = flat_gradient(optimizer)
    assert flat.numel() > 2 * 50 and flat.dtype == torch.float32
    assert norm == pytest.approx(float(flat.double().norm()), rel=1e-6)
    flat.mul_(2)
    assert float(optimizer.grad_norm()) == pytest.approx(2 * norm, rel=1e-6)
    optimizer.zero_grad()
    assert float(optimizer.grad_norm()) == 0.0


def test_misuse_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="no parameter"):
        TrainableAdamW([])
    with pytest.raises(ValueError, match="twice"):
        TrainableAdamW([("a", "lora", weight), ("b", "lora", weight)])
    with pytest.raises(ValueError, match="b does not require"):
        TrainableAdamW([("a", "lora", weight), ("b", "lora", nn.Parameter(torch.zeros(1), requires_grad=False))])
    optimizer = TrainableAdamW([("a", "lora", weight)])
    with pytest.raises(KeyError, match="lora"):
        optimizer.step({"other": 1e-3}, 0.0)


@pytest.mark.gpu
def test_cuda_bf16_equals_torch_fused_adamw() -> None:
    model = make_model(torch.bfloat16).cuda()
    optimizer = make_optimizer(model)
    weight = model["lora"].weight  # type: ignore[index]
    oracle_weight = nn.Parameter(weight.detach().float())
    oracle = torch.optim.AdamW([oracle_weight], lr=RATES["lora"], betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)
    for _ in range(10):
        optimizer.zero_grad()
        hidden = torch.randn(8, 6, device="cuda", dtype=torch.bfloat16)
        model["lora"](hidden).float().square().mean().backward()  # type: ignore[index]
        oracle_weight.grad = weight.main_grad.clone()
        optimizer.step(RATES, float(optimizer.grad_norm()))
        oracle.step()
    assert torch.equal(optimizer.masters()["lora.weight"], oracle_weight)


def test_a_model_nobody_uses_any_more_gives_its_memory_back() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    loss_of(model, 0).backward()
    left = [weakref.ref(parameter) for parameter in model.parameters()]
    buffer = weakref.ref(flat_gradient(optimizer))
    del model, optimizer
    gc.collect()
    assert buffer() is None and all(parameter() is None for parameter in left)
