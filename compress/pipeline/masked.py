"""One linear with zeros: what is stored, and how its error is measured for layers.json."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compress.artifact.layers import LayerRecord
from compress.artifact.manifest import Fallback
from compress.errors import WorkError
from compress.models.skeleton import LinearSpec
from compress.pipeline.linears import errors
from compress.pipeline.prune_job import PruneJob
from compress.pruning.masks import zero_mask


@dataclass(frozen=True, eq=False, slots=True)
class PrunedLinear:
    """One finished linear. weight: (out, in) in the dtype in which it is stored."""

    spec: LinearSpec
    weight: Tensor
    record: LayerRecord
    fallbacks: tuple[Fallback, ...] = ()

    def as_stored(self) -> Tensor:
        """The tensor as the checkpoint lays it out."""
        return self.weight.T.contiguous() if self.spec.layout == "conv1d" else self.weight


def finished(
    job: PruneJob,
    spec: LinearSpec,
    original: Tensor,
    weight: Tensor,
    sample: Tensor | None = None,
    reference: Tensor | None = None,
    fallback: tuple[str, str] | None = None,
    details: dict[str, float | int | str | bool | None] | None = None,
) -> PrunedLinear:
    """A linear whose weight (out, in) float32 was `original`; rounded to the dtype that it is stored in.

    Zeros of an earlier pruning must still be zero, and are counted in the report: WorkError where one is not.

    sample, reference: inputs as `linears.record` takes them. fallback: (what was done other than asked, why).
    """
    dtype = job.checkpoint.index[spec.weight].dtype
    stored = weight.to(dtype)
    error, sqnr = errors(original, stored.float(), sample, reference)
    zeros = int((stored == 0).sum())
    if (earlier := zero_mask(original, spec.name in job.sparse)) is not None:
        if bool(((stored != 0) & earlier).any()):
            raise WorkError(
                f"{spec.name}: zeros of an earlier pruning did not stay zero", "nothing was published; report this"
            )
        details = {**(details or {}), "zeros_kept": int(earlier.sum())}
    layer = LayerRecord(
        name=spec.name,
        block=spec.block,
        method=job.method_name,
        scheme=job.label,
        bits_per_weight=8.0 * dtype.itemsize,
        output_error=error,
        weight_sqnr_db=sqnr,
        fallback=fallback[0] if fallback else None,
        details={"sparsity": zeros / stored.numel(), "zeros": zeros, "weights": stored.numel(), **(details or {})},
    )
    found = (Fallback(name=spec.name, action=fallback[0], reason=fallback[1]),) if fallback else ()
    return PrunedLinear(spec, stored, layer, found)
