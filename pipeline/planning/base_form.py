"""The forms of a frozen base (`model.base`), by their bytes and by what a grid must divide; no torch.

What each form is, and its numbers: `pipeline.model.layers.quantized_weight`. Only the matrices of the layers' linears
are kept in 8 or 4 bits; norms, biases, embedding and output matrix are not.

Shapes: O output width, I input width that a rank has of the checkpoint's W.
"""

from __future__ import annotations

from functools import cache

from parallel.errors import ConfigError
from pipeline.planning.arch import LlamaArch
from pipeline.planning.tensors import PROJECTIONS, ROW_PARALLEL, has_bias, projection_shape

BLOCK = 64
"""Columns that share a largest magnitude in NF4."""
GROUP = 256
"""Blocks that share a scale of their 8-bit magnitudes."""
UNIT = {"nf4": BLOCK, "fp8": 16}
"""What the widths of a rank's matrices must be multiples of: whole blocks; FP8 products want 16."""
SCALE = 4
"""Bytes of a float32."""


def matrix_bytes(form: str, rows: int, columns: int, width: int, element: int) -> int:
    """Bytes of a matrix [rows, columns] that is `columns` of a checkpoint's `width` ones.

    Args:
        element: bytes of an element where the form is the model's dtype.
    """
    if form == "fp8":
        return rows * (columns + SCALE)
    if form == "nf4":
        groups = -(-width // (BLOCK * GROUP))
        return rows * (columns // 2 + columns // BLOCK + SCALE * (1 + groups))
    return rows * columns * element


def local_shape(part: str, arch: LlamaArch, tp: int) -> tuple[int, int, int]:
    """(O, I, W) of a projection on one of `tp` tensor-parallel ranks."""
    rows, width = projection_shape(part, arch)
    return (rows, width // tp, width) if part in ROW_PARALLEL else (rows // tp, width, width)


@cache
def layer_bytes(form: str, arch: LlamaArch, tp: int, element: int) -> int:
    """Bytes of one layer's matrices and biases on a rank; `element` as in `matrix_bytes`."""
    total = 0
    for part in PROJECTIONS:
        rows, columns, width = local_shape(part, arch, tp)
        total += matrix_bytes(form, rows, columns, width, element) + has_bias(part, arch) * rows * element
    return total


def work_bytes(form: str, arch: LlamaArch, tp: int, tokens: int, element: int, tiled: bool) -> int:
    """Bytes that the products of a layer take beside activations, at the most.

    NF4: the matrix, dequantized; of an MLP that goes tile by tile, both. FP8: the matrix of gate and up turned for the
    input's gradient, and the rounded gradients it is multiplied with.

    Args:
        tokens: that one product is made with.
        tiled: some MLP makes gate and up again in tiles (`layers.mlp`).
    """
    wide = 2 * arch.ffn // tp
    if form == "nf4":
        return arch.hidden * (wide + tiled * arch.ffn // tp) * element
    if form == "fp8":
        # The copy that goes where a result is wanted is there beside it.
        return wide * (arch.hidden + tokens) + tiled * arch.hidden * (arch.ffn // tp + tokens * element)
    return 0


def _odd(form: str, arch: LlamaArch, tp: int) -> tuple[str, int, int] | None:
    """A projection with a width that is no multiple of `UNIT`: (projection, a rank's width, the whole one)."""
    if form not in UNIT:
        return None
    unit = UNIT[form]
    for part in PROJECTIONS:
        rows, columns, width = local_shape(part, arch, tp)
        if columns % unit:
            return part, columns, width
        if form == "fp8" and rows % unit:
            return part, rows, projection_shape(part, arch)[0]
    return None


def divides(form: str, arch: LlamaArch, tp: int) -> bool:
    """Whether each of `tp` ranks has what the form can keep of every matrix."""
    return _odd(form, arch, tp) is None


PRODUCTS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""Matrices that are multiplied as one."""
RECIPE_UNIT = {"tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""What widths, and the tokens a product is made with, must be multiples of under model.fp8_recipe."""
BASE_CAPABILITY = 9.0
"""The least compute capability whose products of e4m3 take a scale a row, as model.base: fp8 has them."""
RECIPE_CAPABILITY = {"tensorwise": 8.9, "blockwise": 9.0, "mxfp8": 10.0}
"""The least compute capability on which Transformer Engine has model.fp8_recipe."""
RECIPE_BYTES = 2 + 1 / 16
"""Of an element that Transformer Engine keeps in FP8 beside the matrix, once for either product; scales of blocks of 32
included."""


def recipe_bytes(recipe: str, arch: LlamaArch, tp: int) -> int:
    """Bytes that one layer's matrices take in FP8 on a rank, beside themselves."""
    if recipe == "none":
        return 0
    shapes = (local_shape(part, arch, tp) for part in PROJECTIONS)
    return round(RECIPE_BYTES * sum(rows * columns for rows, columns, _ in shapes))


def check_fp8(form: str, recipe: str, capability: float | None, gpu: str) -> None:
    """Refuse a GPU that lacks the products in 8 bits that are asked for.

    Args:
        form, recipe: model.base and model.fp8_recipe.
        capability: CUDA's compute capability; None: not known, or no GPU, and nothing is refused.
        gpu: its name.

    Raises:
        ConfigError: it does.
    """
    if capability is None:
        return
    if form == "fp8" and capability < BASE_CAPABILITY:
        raise ConfigError(
            f"model.base: fp8 needs products of e4m3 with a scale a row (Hopper and newer), which {gpu} lacks; use nf4 "
            "or bf16."
        )
    least = RECIPE_CAPABILITY.get(recipe, 0.0)
    if capability < least:
        raise ConfigError(
            f"model.fp8_recipe: {recipe} needs a GPU of compute capability {least} or more; {gpu} has {capability}; "
            "set another recipe, or none."
        )


def capability_of(version: tuple[int, int]) -> float:
    """PyTorch's (major, minor) as descriptions of GPUs write it: 8.9."""
    return version[0] + version[1] / 10


def check_recipe(recipe: str, arch: LlamaArch, tp: int, tokens: int) -> None:
    """Refuse what Transformer Engine would refuse in the first step.

    Args:
        tokens: that a rank has of all sequences at work at once, under sequence parallelism its own.

    Raises:
        ConfigError: they or a width are no multiple of `RECIPE_UNIT`.
    """
    if recipe == "none":
        return
    unit = RECIPE_UNIT[recipe]
    mend = "use a smaller parallel.tp, or set another model.fp8_recipe"
    for parts in PRODUCTS:
        shapes = [local_shape(part, arch, tp) for part in parts]
        for width in (sum(rows for rows, _, _ in shapes), shapes[0][1]):
            if width % unit:
                raise ConfigError(
                    f"model.fp8_recipe: {recipe} takes widths that are multiples of {unit}, but a rank has {width} of "
                    f"{', '.join(f'{part}_proj' for part in parts)}; {mend}."
                )
    if tokens % unit:
        raise ConfigError(
            f"model.fp8_recipe: {recipe} takes tokens in multiples of {unit}, but a rank has {tokens} at once "
            "(data.sequence, or a chunk of train.stream, the last one too, over tp and cp, times train.micro_batch); "
            "change one of them."
        )


def check_base(form: str, arch: LlamaArch, tp: int) -> None:
    """Refuse a grid or a model whose matrices a form cannot keep.

    Raises:
        ConfigError: a width is no multiple of `UNIT`.
    """
    odd = _odd(form, arch, tp)
    if odd is not None:
        part, width, whole = odd
        mend = "use a smaller parallel.tp, or " if divides(form, arch, 1) else ""
        raise ConfigError(
            f"model.base: {form} keeps matrices whose widths are multiples of {UNIT[form]}, but a rank has {width} of "
            f"{part}_proj's {whole}; {mend}set another model.base."
        )
