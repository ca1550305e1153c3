"""How many answers a runtime gives in one call: several where none of them depends on the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from compress.runtime.protocol import Runtime

TOGETHER = 16

T = TypeVar("T")


def in_groups(requests: Sequence[T], runtime: Runtime) -> Iterator[Sequence[T]]:
    """The requests in order, as many at once as do not change each other's answers: one, unless it is deterministic."""
    most = TOGETHER if runtime.batched_generate and runtime.deterministic else 1
    for first in range(0, len(requests), most):
        yield requests[first : first + most]
