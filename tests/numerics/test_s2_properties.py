"""S²-Attn equals its definition for whatever lengths, groups, heads, documents and padding Hypothesis finds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model.attention import local
from pipeline.model.attention.local import attend
from pipeline.planning.attention_layout import AttentionSpec, SequenceLayout, head_plan
from tests.numerics import attention_oracle as oracle

HEADS = [(1, 1), (4, 4), (4, 2), (8, 2), (9, 3), (7, 7), (5, 1), (6, 3), (10, 2), (12, 4)]


@dataclass(frozen=True)
class Case:
    """One micro-batch and how it is attended."""

    batch: int
    sequence: int
    heads: int
    kv_heads: int
    group: int
    rule: str
    kind: str
    padding: np.ndarray | None
    documents: np.ndarray | None
    seed: int
    dilation: int = 1

    def tensors(self) -> list[torch.Tensor]:
        """q, k, v in fp64, requiring gradients."""
        generator = torch.Generator().manual_seed(self.seed)
        return [
            torch.randn(self.sequence, self.batch, heads, 4, generator=generator, dtype=torch.float64).requires_grad_()
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        ]

    def layout(self) -> SequenceLayout:
        return SequenceLayout.build(self.batch, self.sequence, self.padding, self.documents)

    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.kind, self.group, self.rule, dilation=self.dilation)

    def attend(self, tensors: list[torch.Tensor], first: int = 0, local: int | None = None) -> torch.Tensor:
        plan = head_plan(first, local or self.heads, self.heads, self.kv_heads, self.rule)
        return attend(*tensors, self.layout(), self.spec(), plan)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch = draw(st.integers(1, 3))
    sequence = draw(st.one_of(st.integers(1, 24), st.sampled_from([1, 16, 32])))
    heads, kv_heads = draw(st.sampled_from(HEADS))
    padding = documents = None
    if draw(st.booleans()):
        padding = np.zeros((batch, sequence), bool)
        for row in range(batch):
            real = draw(st.integers(0, sequence))
            first = draw(st.sampled_from([0, sequence - real, (sequence - real) // 2]))
            padding[row, first : first + real] = True
    if draw(st.booleans()):
        cuts = draw(st.lists(st.booleans(), min_size=batch * sequence, max_size=batch * sequence))
        # Ids alternate between two values: they are runs, not unique names.
        documents = np.cumsum(np.array(cuts).reshape(batch, sequence), axis=1) % 2
    return Case(
        batch,
        sequence,
        heads,
        kv_heads,
        draw(st.sampled_from([2, 4, 6, 8, 32])),
        draw(st.sampled_from(["upper_half", "alternate", "none", "all"])),
        draw(st.sampled_from(["s2", "s2", "s2", "full"])),
        padding,
        documents,
        draw(st.integers(0, 99)),
        draw(st.sampled_from([1, 1, 2, 3])),
    )


@given(cases())
def test_definition_forward_and_gradients(case: Case) -> None:
    tensors = case.tensors()
    group = case.group if case.kind == "s2" else None
    mask = oracle.masks(
        *(case.batch, case.sequence, case.heads, case.kv_heads, group, case.rule, case.padding, case.documents),
        dilation=case.dilation,
    )
    expected = oracle.attention(*tensors, mask)
    out = case.attend(tensors)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    if case.padding is not None:
        pads = torch.from_numpy(~case.padding).t()
        assert torch.equal(out[pads], torch.zeros_like(out[pads]))
        if not case.padding.any():
            return  # nothing real: no gradient to compare
    weight = torch.randn_like(out)
    for left, right in zip(
        torch.autograd.grad((out * weight).sum(), tensors),
        torch.autograd.grad((expected * weight).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(left, right, atol=1e-12, rtol=0)


@given(cases(), st.data())
def test_any_slice_of_heads_gives_that_slice_of_the_whole(case: Case, data: st.DataObject) -> None:
    """A tensor-parallel rank's heads, cut anywhere: outputs concatenate to the whole."""
    tensors = [tensor.detach() for tensor in case.tensors()]
    whole = case.attend(tensors)
    cut = data.draw(st.integers(0, case.heads))
    ratio = case.heads // case.kv_heads
    parts = []
    for first, stop in ((0, cut), (cut, case.heads)):
        if first == stop:
            continue
        q, (k, v) = (
            tensors[0][:, :, first:stop],
            (t[:, :, first // ratio : (stop - 1) // ratio + 1] for t in tensors[1:]),
        )
        parts.append(case.attend([q, k, v], first, stop - first))
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-14, rtol=0)


@given(cases(), st.data())
def test_later_tokens_change_nothing(case: Case, data: st.DataObject) -> None:
    tensors = [tensor.detach() for tensor in case.tensors()]
    before = case.attend(tensors)
    position = data.draw(st.integers(0, case.sequence - 1))
    moved = [tensor.clone() for tensor in tensors]
    for tensor in moved:
        tensor[position:] += 1.0 + torch.rand_like(tensor[position:])
    assert torch.equal(case.attend(moved)[:position], before[:position])


@given(cases())
def test_rows_do_not_influence_each_other(case: Case) -> None:
    """Row 0 alone gives what row 0 gives in the batch."""
    tensors = [tensor.detach() for tensor in case.tensors()]
    alone = replace(
        case,
        batch=1,
        padding=None if case.padding is None else case.padding[:1],
        documents=None if case.documents is None else case.documents[:1],
    )
    single = alone.attend([tensor[:, :1] for tensor in tensors])
    torch.testing.assert_close(case.attend(tensors)[:, :1], single, atol=1e-14, rtol=0)


@given(
    st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    st.tuples(*(st.integers(1, 5) for _ in range(3)), st.sampled_from([1, 2, 4, 8, 9, 16])),
    st.integers(0, 3),
    st.integers(0, 2**16),
)
def test_a_part_is_put_in_its_place_bit_by_bit(
    dtype: torch.dtype, shape: tuple[int, int, int, int], offset: int, seed: int
) -> None:
    """16 bytes at a time or value by value, NaN's bits included: as indexing does it."""
    generator = torch.Generator().manual_seed(seed)
    tokens, rows, heads, width = shape
    size = dtype.itemsize

    def random(*shape: int) -> torch.Tensor:
        count = offset + int(np.prod(shape))
        return (
            torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=generator)
            .view(dtype)[offset:]
            .view(shape)
        )

    part, whole = random(rows, tokens, heads, width), random(tokens + 1, rows + 1, heads + 1, width)
    expected = whole.clone()
    expected[1:, :rows, 1:] = part.transpose(0, 1)
    with mock.patch.object(local, "_MUCH", 0):
        local._copy(whole[1:, :rows, 1:].transpose(0, 1), part)
    assert torch.equal(whole.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))
