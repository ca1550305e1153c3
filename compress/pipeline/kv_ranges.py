"""Scales of an FP8 cache: the largest keys and values of each attention over the calibration text, over 448.

Keys and values are seen as they are; rounding them needs the scale of all tokens, which is known only afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import WorkError
from compress.formats import kv_cache as layout
from compress.formats.inputs import static_scale
from compress.kernels.scales import stored_scale
from compress.models import kv_cache
from compress.pipeline.block import OpenBlock
from compress.pipeline.job import Job
from compress.types import FP8_HIGHEST


class KvRanges:
    """Watches the attentions of a live block where the recipe asks for it; `scales` once tokens have run through."""

    def __init__(self, job: Job, opened: OpenBlock) -> None:
        self._job = job
        self._found: dict[str, tuple[list[float], list[float]]] = {}
        names = {id(module): name for name, module in opened.live.items()}
        watched = kv_cache.attentions(opened.module) if job.stage.kv_cache else {}
        for module in watched.values():
            linear = names[id(getattr(module, str(kv_cache.key_linear(module))))]
            kv_cache.tap(module, self._watch(linear))

    def _watch(self, linear: str) -> kv_cache.Change:
        keys, values = self._found[linear] = ([], [])

        def watch(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            keys.append(float(key.abs().amax()))  # from several threads; their order does not matter to the largest
            values.append(float(value.abs().amax()))
            return key, value

        return watch

    def scales(self) -> dict[str, dict[str, Tensor]]:
        """The stored scales (1,) by name, for each linear that makes keys.

        Raises WorkError where they are no positive numbers.
        """
        return {linear: self._scales(linear, ranges) for linear, ranges in self._found.items()}

    def _scales(self, linear: str, ranges: tuple[list[float], list[float]]) -> dict[str, Tensor]:
        attention, _, _ = linear.rpartition(".")
        found = {}
        for part, seen in zip(layout.PARTS, ranges, strict=True):
            highest = max(seen, default=0.0)
            if not 0 < highest < float("inf"):
                raise WorkError(
                    f"{attention}.{part}: the calibration text gives {highest} as the largest, which makes no scale",
                    "check the source with `compress eval`, or leave kv_cache out",
                )
            wanted = torch.tensor([static_scale(highest, layout.ROUNDING)])
            dtype = self._job.checkpoint.index[f"{linear}.weight"].dtype
            found[f"{attention}.{part}"] = stored_scale(wanted, dtype, round(FP8_HIGHEST))
        return found
