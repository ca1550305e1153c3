"""Folding a scale into a live float block, with proof that the block still computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compress.models.families import Edge
from compress.models.folding import fold_scale
from compress.pipeline.inputs import Activations
from compress.pipeline.job import Job

# A fold is undone when the float block's output moves by more than this share of its norm.
FOLD_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Fold:
    """What became of a fold: the scale in effect (None: undone or not tried), how far the float output moved."""

    scale: Tensor | None
    change: float


class Probe:
    """One calibration window through the float block, to see that a fold changes nothing."""

    def __init__(self, job: Job, module: nn.Module, entering: Activations) -> None:
        self._job, self._module = job, module
        self._hidden = entering.quantized[0][:1].float()
        call = entering.single[entering.block]
        self._call = tree_map_only(torch.Tensor, lambda t: t.float() if t.is_floating_point() else t, call)
        self._expected = self.output()

    def output(self) -> Tensor:
        with torch.inference_mode():
            return self._job.skeleton.run_block(self._module, self._hidden, self._call)

    def change(self) -> float:
        """Norm of the output's change since the start, as a share of its norm."""
        return float((self.output() - self._expected).norm() / self._expected.norm())


def fold(job: Job, edge: Edge, live: dict[str, nn.Module], wanted: Tensor, probe: Probe) -> Fold:
    """Folds the nearest scale that a norm's stored dtype can express; undoes it if the block's output moves.

    What is stored as a float (norms, biases, routers) is rounded to its stored dtype before the output is looked at.
    """
    names = (edge.producer, *edge.consumers)
    before = {name: {key: value.clone() for key, value in live[name].state_dict().items()} for name in names}
    scale = _expressible(job, edge, live[edge.producer], wanted) if edge.kind == "norm" else wanted
    fold_scale(edge, live, scale)
    for name in names:
        _round_as_stored(job, name, live[name])
    tolerance = FOLD_TOLERANCE
    if edge.has_bias:  # a bias has no counterpart that could take up what its rounding loses
        tolerance += 4 * torch.finfo(job.checkpoint.index[f"{edge.producer}.bias"].dtype).eps
    change = probe.change()
    if change <= tolerance:
        return Fold(scale, change)
    for name, state in before.items():
        live[name].load_state_dict(state)
    return Fold(None, change)


def free_edges(job: Job, block: int) -> list[Edge]:
    """The edges of a block along which a scale may move: those that change no linear that is to stay as it is."""

    def touched(edge: Edge) -> tuple[str, ...]:
        return edge.consumers if edge.kind == "norm" else (edge.producer, *edge.consumers)

    return [edge for edge in job.skeleton.edges(block) if not any(name in job.reasons for name in touched(edge))]


def _round_as_stored(job: Job, name: str, module: nn.Module) -> None:
    """Rounds the parameters that will be stored as floats to the dtype in which they will be."""
    for key, parameter in module.named_parameters(recurse=False):
        stored = job.checkpoint.index.get(f"{name}.{key}")
        if stored is not None and not (name in job.schemes and key == "weight"):
            parameter.data = parameter.data.to(stored.dtype).float()


def _expressible(job: Job, edge: Edge, norm: nn.Module, wanted: Tensor) -> Tensor:
    """The scale that dividing the norm's weight has after that weight is rounded to its stored dtype."""
    dtype = job.checkpoint.index[f"{edge.producer}.weight"].dtype
    offset = 1.0 if edge.offset else 0.0
    gain = cast(Tensor, norm.weight).data + offset
    stored = (gain / wanted - offset).to(dtype).float() + offset
    scale = gain / stored
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)


def changed_floats(
    job: Job, live: dict[str, nn.Module], quantized: set[str], edges: Sequence[Edge]
) -> dict[str, Tensor]:
    """Float tensors that folding touched and that are stored as floats: norms, biases, routers."""
    changed = {}
    for name in sorted({name for edge in edges for name in (edge.producer, *edge.consumers)}):
        for key, value in live[name].state_dict().items():
            tensor = f"{name}.{key}"
            if tensor not in job.checkpoint.index or (name in quantized and key == "weight"):
                continue
            source = job.checkpoint.read(tensor)
            now = value.to(source.dtype)
            if not torch.equal(now, source):
                changed[tensor] = now.contiguous()
    return changed
