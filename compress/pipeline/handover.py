"""From a method that folds scales into a block to the method that then rounds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.artifact.manifest import Fallback
from compress.models.skeleton import LinearSpec
from compress.pipeline import gptq_block, rtn_block
from compress.pipeline.block import BlockResult, OpenBlock, Workers
from compress.pipeline.inputs import Activations
from compress.pipeline.job import Job
from compress.pipeline.linears import QuantizedLinear
from compress.quantization.configs import GptqConfig, RtnConfig

Details = dict[str, dict[str, Any]]


@dataclass
class Folded:
    """What folding made of a block.

    opened: the block with its scales folded in. changed: other float tensors that differ from the source, by
    checkpoint name. fallbacks: what was undone. details: the report by linear.
    """

    opened: OpenBlock
    changed: dict[str, Tensor] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)
    details: Details = field(default_factory=dict)


def rounded(
    job: Job,
    rounding: RtnConfig | GptqConfig,
    specs: Sequence[LinearSpec],
    block: int,
    entering: Activations,
    workers: Workers,
    folded: Folded,
) -> BlockResult:
    """One pass through the folded block by the method of `rounding`; the result tells of both."""
    if isinstance(rounding, GptqConfig):
        result = gptq_block.through_block(job, rounding, specs, block, entering, workers, folded.opened)
    else:
        result = rtn_block.through_block(job, rounding, specs, block, entering, workers, folded.opened)
    result.changed |= folded.changed
    result.fallbacks += folded.fallbacks
    result.linears = [_with(linear, folded.details) for linear in result.linears]
    return result


def recast(module: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Puts a block that was made float32 for folding back into the dtypes it had, by name of its state."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))


def _with(linear: QuantizedLinear, details: Details) -> QuantizedLinear:
    more = details.get(linear.spec.name, {})
    record = linear.record.model_copy(update={"details": {**more, **linear.record.details}})
    return QuantizedLinear(linear.spec, linear.quantized, record, linear.fallbacks, linear.input_scale)
