"""Rounding what enters the linears of a live block, where their scheme rounds inputs, and finding static scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor

import torch
from torch import Tensor, nn

from compress.errors import WorkError
from compress.formats.inputs import round_inputs, static_scale
from compress.kernels.scales import stored_scale
from compress.models.skeleton import LinearSpec
from compress.pipeline.job import Job
from compress.types import InputScheme


class RoundedInputs:
    """Hooks on the linears of one live block; a linear with static inputs must be calibrated before it runs on.

    The hooks come after those of a StagedForward, which therefore sees inputs as they were.
    """

    def __init__(self, job: Job, live: Mapping[str, nn.Module]) -> None:
        self._job = job
        self._scales: dict[str, Tensor] = {}
        self._schemes: dict[str, InputScheme] = {}
        for name, module in live.items():
            scheme = job.schemes.get(name)
            if scheme is not None and scheme.inputs is not None:
                self._schemes[name] = scheme.inputs
                module.register_forward_pre_hook(self._hook(name))

    def calibrate(self, spec: LinearSpec, chunks: Sequence[Tensor]) -> None:
        """Sets what is stored of the inputs, if anything is, to what covers all chunks (tokens, in)."""
        scheme = self._schemes.get(spec.name)
        if scheme is None or scheme.dynamic:
            return
        highest = max((float(chunk.abs().amax()) for chunk in chunks if chunk.numel()), default=0.0)
        wanted = torch.tensor([static_scale(highest, scheme)])
        if scheme.scale_type == "float":
            wanted = stored_scale(wanted, self._job.scale_dtype(spec), round(scheme.steps + 0.5))
        self._scales[spec.name] = wanted

    def scale(self, name: str) -> Tensor | None:
        """What is stored (1,) of a linear's inputs; None where nothing is.

        Raises WorkError where one must be stored and no token told it.
        """
        scheme = self._schemes.get(name)
        if scheme is None or scheme.dynamic:
            return None
        if name not in self._scales:
            raise WorkError(
                f"no calibration token reached {name}, so its inputs have no scale",
                "raise --samples, or use a dynamic scheme",
            )
        return self._scales[name]

    def rounded(self, name: str, x: Tensor) -> Tensor:
        """x (tokens, in) as this linear multiplies it."""
        scheme = self._schemes.get(name)
        return x if scheme is None else round_inputs(x, scheme, self.scale(name))

    def rounded_chunks(self, name: str, chunks: Sequence[Tensor], pool: Executor) -> list[Tensor]:
        """All chunks (tokens, in) as this linear multiplies them; the same tensors where it takes them as they are."""
        if name not in self._schemes:
            return list(chunks)
        return list(pool.map(lambda chunk: self.rounded(name, chunk), chunks))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def replace(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (self.rounded(name, args[0]), *args[1:])

        return replace
