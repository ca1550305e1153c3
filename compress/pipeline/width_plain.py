"""The same cut without repair, followed on the first chunk of calibration text: what repair wins back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.artifact.cut import CutRecord
from compress.models.skeleton import LinearSpec
from compress.pipeline import width_norms
from compress.pipeline.inputs import Activations
from compress.pipeline.linears import put_dense
from compress.pipeline.source import read_weight
from compress.pipeline.width_job import WidthJob
from compress.pipeline.width_repair import bias_of, put_live_bias
from compress.pruning import depth


def through_block(
    job: WidthJob, block: int, entering: Activations, kept: Mapping[str, Tensor], specs: Mapping[str, LinearSpec]
) -> Tensor | None:
    """What leaves the block with columns and rows gone and nothing changed besides: (samples, seq, hidden).

    kept: the inputs that stay of every linear that loses some, by name.
    """
    if entering.plain is None:
        return None
    skeleton = job.skeleton
    module = skeleton.materialise(block)
    live = skeleton.modules(block, module)
    if job.channels is not None:
        width_norms.narrow_norms(job, skeleton.block_tensors(block), live)
    for name, inputs in kept.items():
        spec = specs[name]
        weight, rows = read_weight(job.checkpoint, spec), job.written(spec)
        whole = torch.zeros_like(weight)
        whole[rows[:, None], inputs] = weight[rows[:, None], inputs]
        put_dense(live[name], whole)
        if (bias := bias_of(job, spec)) is not None:
            stays = torch.zeros_like(bias)
            stays[rows] = bias[rows]
            put_live_bias(live[name], stays)
    return skeleton.run_block(module, entering.plain, entering.calls[0][block])


def record(job: WidthJob, leaving: Activations, final_norm: Tensor | None) -> CutRecord | None:
    """What the cut lost without repair and with it; None where none is made.

    leaving: the activations behind the last block. final_norm: the repaired weight (hidden,) of the norm behind it,
    where channels go; the live one must still be the original's, and is so afterwards.
    """
    if leaving.plain is None:
        return None
    assert job.calibration is not None
    plain, repaired, reference = leaving.plain, leaving.quantized[0], leaving.original[0]
    norms = (None, None) if final_norm is None else (width_norms.plain_final_norm(job), final_norm)
    lost = [0.0, 0.0]
    for window in range(len(plain)):  # logits of one at a time
        wanted = job.skeleton.head(reference[window : window + 1])
        for way, (hidden, norm) in enumerate(zip((plain, repaired), norms, strict=True)):
            with width_norms.as_final_norm(job, norm):
                lost[way] += depth.divergence(wanted, job.skeleton.head(hidden[window : window + 1]))
    tokens = plain.shape[0] * plain.shape[1]
    return CutRecord(
        method=job.method_name,
        text=job.calibration.name,
        tokens=tokens,
        plain_kl=lost[0] / tokens,
        repaired_kl=lost[1] / tokens,
    )
