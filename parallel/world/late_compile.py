"""megatron-core's import without torch's compiler.

It decorates some thirty functions with `torch.compile`, each of which loads the compiler at once: half of the time that
a rank imports for, for functions of which our layers call none. Decorated while this is in force, a function is
compiled when it is first called.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

_compile = torch.compile


def compile_late(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`torch.compile`, as a call or as a decorator, that does nothing before the first call of its result."""
    if function is None:
        return functools.partial(compile_late, **options)
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not compiled:
            compiled.append(_compile(function, **options))
        return compiled[0](*args, **kwargs)

    return call


@contextlib.contextmanager
def late() -> Iterator[None]:
    """For an import of megatron-core."""
    torch.compile = compile_late  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = _compile
