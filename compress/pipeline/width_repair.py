"""One linear that loses inputs: which stay, the least-squares weight on them, and what its bias takes up."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from compress.calibration import statistics
from compress.calibration.statistics import LinearStats, Means, collect
from compress.errors import WorkError
from compress.models.skeleton import LinearSpec
from compress.pipeline.block import Workers
from compress.pipeline.linears import errors
from compress.pipeline.mask_moments import of_linear
from compress.pipeline.source import read_finite, read_weight
from compress.pipeline.stream import missed
from compress.pipeline.twin import Pair
from compress.pipeline.width_job import KEPT, WidthJob
from compress.pruning import sparsegpt, width
from compress.pruning.masks import zero_mask
from compress.quantization.gptq import Preconditioner
from compress.quantization.hessian import cholesky, damped

REFIT_STEPS = 100


@dataclass(frozen=True, eq=False, slots=True)
class Affine:
    """A linear as it was or is: weight (out, in), and its bias (out,) if it has one, both float32."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight.T if self.bias is None else torch.addmm(self.bias, inputs, self.weight.T)

    def errors(
        self, after: Affine, rows: Tensor, sample: Tensor | None, reference: Tensor | None
    ) -> tuple[float | None, float | None]:
        """As `linears.errors`, of the outputs `rows`; a bias counts as the weight of an input that is always one."""
        _, sqnr = errors(self.weight[rows], after.weight[rows], None, None)
        if sample is None or self.bias is None or after.bias is None:
            return errors(self.weight[rows], after.weight[rows], sample, reference)[0], sqnr
        wide = [
            torch.cat([each.weight, each.bias[:, None]], 1)[rows] for each in (self, after) if each.bias is not None
        ]
        ones = torch.ones(len(sample), 1)
        known = None if reference is None else torch.cat([reference, ones], 1)
        return errors(wide[0], wide[1], torch.cat([sample, ones], 1), known)[0], sqnr


@dataclass(frozen=True, eq=False, slots=True)
class Lost:
    """What the residual stream has lost of the original's where a linear adds to it: its mean (hidden,), and moments
    (hidden, in), the mean of it times the linear's input, about the means where it has a bias; both float32."""

    moments: Tensor
    mean: Tensor

    @classmethod
    def of(cls, pair: Pair, centred: bool, pool: Executor) -> Lost | None:
        """None of a linear that does not add to the stream, or where the two models are not compared."""
        now, then = pair.before
        if not then:
            return None
        inputs = dict(zip(pair.originals, pair.inputs, strict=True))
        places = sorted(then)
        mean = statistics.mean_of([then[place].float() - now[place].float() for place in places])
        moments = missed(now, then, inputs, pool)
        if centred:
            moments -= torch.outer(mean, statistics.mean_of([inputs[place] for place in places]))
        return cls(moments, mean)


class Shared:
    """What stays of one input, and the repair of the linears that read it. kept: (kept,) int64 sorted.

    pair: None of an expert that the live model does not reach. known: what the linears of the block read in the whole
    model before it was cut, where that alone decides. centred: whether these linears have biases, which then take up
    the mean of what they lose. kept: what stays, where that is known.
    """

    def __init__(
        self,
        job: WidthJob,
        spec: LinearSpec,
        pair: Pair | None,
        known: Mapping[str, Tensor] | None,
        centred: bool,
        workers: Workers,
        kept: Tensor | None,
    ) -> None:
        self._job, self._spec, self._pool = job, spec, workers.pool
        self._preconditioner: Preconditioner | None = None
        self._means: Means | None = None
        self.centred = centred
        self.kept = self._chosen(pair, known) if kept is None else kept
        if not job.method.repair or (known is None and pair is None):
            return
        if known is not None:
            stats, mean = of_linear(known, spec)
            if centred:
                stats, self._means = statistics.about(stats, mean)
        else:
            assert pair is not None
            stats = collect(pair.stage.inputs, pair.originals, workers.pool)
            if centred:
                stats, self._means = statistics.centred(stats, pair.stage.inputs, pair.originals)
        self._preconditioner = Preconditioner(stats, job.method, workers.pool)
        if self._preconditioner.factored is None:
            raise _unusable(spec)

    def _chosen(self, pair: Pair | None, known: Mapping[str, Tensor] | None) -> Tensor:
        job, spec = self._job, self._spec
        if not job.consumes(spec):
            assert job.channels is not None
            return job.channels
        by_mean = self.centred and job.method.importance == "repair"
        if known is not None:
            wanted, mean = of_linear(known, spec)
            wanted = statistics.about(wanted, mean)[0] if by_mean else wanted
        else:
            assert pair is not None
            originals = list(pair.originals.values())
            wanted = collect(originals, {}, self._pool)
            wanted = statistics.centred(wanted, originals, {})[0] if by_mean else wanted
        weight = read_weight(job.checkpoint, spec)[job.written(spec)]
        return chosen(job, spec, weight, wanted)

    def narrowed(self, weight: Tensor, lost: Lost | None = None) -> Tensor:
        """The weight (out, kept) float32, from (out, in); lost: what its outputs are to make up for besides."""
        shared = self._preconditioner
        if shared is None:
            return weight[:, self.kept].contiguous()
        wanted = weight
        if shared.correction is not None:
            shared.correction.expand(self._pool)
            wanted = shared.correction.corrected(weight, None if lost is None else lost.moments)
        found = width.repaired(wanted, shared.hessian, self.kept)
        zeros = zero_mask(weight, self._spec.name in self._job.sparse)
        if zeros is None:
            return found
        # Zeros of an earlier pruning stay: the least-squares values of the others make up for them.
        start = weight[:, self.kept]
        return sparsegpt.refit(found, start, shared.hessian[self.kept][:, self.kept], REFIT_STEPS, self._pool)

    def bias(
        self, bias: Tensor | None, weight: Tensor, whole: Tensor, rows: Tensor, lost: Lost | None = None
    ) -> Tensor | None:
        """The bias (out,) float32 for the narrow weight, as it is stored, with zeros for outputs that go; None of None.

        weight, whole: (out, in), as it was and with zeros where inputs and outputs went. lost: as `narrowed` takes it.
        """
        if bias is None:
            return None
        if self._means is not None:
            moved = self._means.wanted - self._means.now
            goal = self._means.now + self._job.method.correction * moved
            wanted = bias + weight @ goal
            if lost is not None:
                wanted = wanted + self._job.method.correction * lost.mean
            bias = (wanted - whole @ self._means.now).to(bias_dtype(self._job, self._spec)).float()
        kept = torch.zeros_like(bias)
        kept[rows] = bias[rows]
        return kept


def chosen(job: WidthJob, spec: LinearSpec, weight: Tensor, wanted: LinearStats) -> Tensor:
    """The inputs that stay of a linear that neurons or heads feed, (kept,) int64 sorted.

    weight: (out, in) float32, the outputs that stay. wanted: of what the original model feeds it.
    """
    sections, keep, size = job.groups(spec)
    if (listed := job.decided.get(KEPT, {}).get(spec.name)) is not None:
        groups = torch.tensor(listed)
    else:
        factored = cholesky(wanted.hessian, job.method.damp_frac)
        if factored is None:
            raise _unusable(spec)
        if job.method.importance in ("activation", "feature"):
            score = width.activation if job.method.importance == "activation" else width.feature
            groups = width.highest(score(weight, wanted.hessian), sections, size, keep)
        else:
            hessian = damped(wanted.hessian, factored.damp_frac)
            groups = width.survivors(weight, hessian, sections, size, keep)
    return (groups.unsqueeze(1) * size + torch.arange(size)).reshape(-1)


def bias_of(job: WidthJob, spec: LinearSpec) -> Tensor | None:
    """The bias (out,) float32 of a linear, None where it has none."""
    name = f"{spec.name}.bias"
    return read_finite(job.checkpoint, name).float() if name in job.checkpoint.index else None


def put_live_bias(live: nn.Module, bias: Tensor) -> None:
    """Gives a live linear this bias (out,)."""
    parameter = cast(nn.Parameter, live.bias)
    parameter.data = bias.to(parameter.dtype)


def bias_dtype(job: WidthJob, spec: LinearSpec) -> torch.dtype:
    return job.checkpoint.index[f"{spec.name}.bias"].dtype


def _unusable(spec: LinearSpec) -> WorkError:
    return WorkError(
        f"no damping makes the second moments of {spec.name}'s inputs positive definite",
        "calibrate on more text, or check the source model with `compress eval`",
    )
