"""How long something takes. In: a function. Out: what it gives once it is ready, and seconds on the wall clock."""

import time
from collections.abc import Callable
from typing import Any

import jax


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result that is ready, and the seconds it took."""
    began = time.perf_counter()
    result = jax.block_until_ready(work())
    return result, time.perf_counter() - began


def best_of(work: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """A result, and the least of its seconds over `repeats` runs after a first one, which may compile."""
    runs = [timed(work) for _ in range(repeats + 1)]
    return runs[-1][0], min(seconds for _, seconds in runs[1:])
