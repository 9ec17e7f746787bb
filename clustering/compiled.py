"""How loops are compiled: without the GIL, and once for a machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

from numba import njit

P = ParamSpec("P")
T = TypeVar("T")


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Compile a loop over arrays when it is first called, or find it compiled.

    It divides as NumPy does: a check for 0 would keep loops from being made vectors.
    """
    return cast("Callable[P, T]", njit(nogil=True, cache=True, error_model="numpy")(function))
