"""From scores per token to the sums per cluster that a record keeps, and the percentiles that no sums give."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.evaluation.summary import KL_THRESHOLDS, ClusterSums, DpPercentiles, KlPercentiles
from compress.evaluation.windows import Windows


@dataclass(frozen=True, eq=False, slots=True)
class TokenScores:
    """Per scored token, on the CPU: nll float64 (nats), and where there is a baseline the rest.

    nll_baseline and kl float64 (nats), dp float64 = p_candidate - p_baseline of the correct token, agree and confident
    bool.
    """

    nll: Tensor
    nll_baseline: Tensor | None = None
    kl: Tensor | None = None
    dp: Tensor | None = None
    agree: Tensor | None = None
    confident: Tensor | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Scores:
    """What scoring gives. `seconds`: the candidate's forward passes. The percentiles are None without a baseline."""

    clusters: ClusterSums
    kl_percentiles: KlPercentiles | None
    dp_percentiles: DpPercentiles | None
    seconds: float


def concatenate(parts: list[TokenScores]) -> TokenScores:
    """The scores of several batches, one after the other."""

    def joined(field: str) -> Tensor | None:
        values = [getattr(part, field) for part in parts]
        return None if values[0] is None else torch.cat(values)

    optional = [field.name for field in fields(TokenScores) if field.name != "nll"]
    return TokenScores(torch.cat([part.nll for part in parts]), **{name: joined(name) for name in optional})


def aggregate(scores: TokenScores, windows: Windows, order: Tensor, seconds: float) -> Scores:
    """Sums per cluster. scores: the tokens of the windows in the order `order` (count,), a permutation of them."""
    counts = (windows.lengths - 1).numpy()
    starts = np.concatenate([[0], np.cumsum(counts[order.numpy()])])
    position = np.empty(len(counts), dtype=np.int64)
    position[order.numpy()] = starts[:-1]
    places = np.concatenate([np.arange(a, a + n) for a, n in zip(position, counts, strict=True)])
    members = np.repeat(windows.cluster.numpy(), counts)
    edges = np.searchsorted(members, np.arange(windows.clusters + 1))

    def column(values: Tensor | None) -> NDArray[np.float64] | None:
        """One value per token in the text's order."""
        return None if values is None else values.numpy().astype(np.float64)[places]

    def sums(values: NDArray[np.float64]) -> list[float]:
        return [float(values[a:b].sum()) for a, b in pairwise(edges)]

    def tally(values: NDArray[np.float64]) -> list[int]:
        return [int(total) for total in sums(values)]

    nll, nll_baseline, kl, dp = (column(v) for v in (scores.nll, scores.nll_baseline, scores.kl, scores.dp))
    agree, confident = column(scores.agree), column(scores.confident)
    assert nll is not None
    own = {
        "tokens": [int(n) for n in np.diff(edges)],
        "text_bytes": [int(n) for n in np.bincount(windows.cluster.numpy(), windows.text_bytes.numpy())],
        "nll": sums(nll),
    }
    if nll_baseline is None or kl is None or dp is None or agree is None or confident is None:
        return Scores(ClusterSums.model_validate(own), None, None, seconds)
    above = np.array([tally((kl > threshold).astype(np.float64)) for threshold in KL_THRESHOLDS]).T
    clusters = ClusterSums.model_validate(
        {
            **own,
            "nll_baseline": sums(nll_baseline),
            "kl": sums(kl),
            "dp": sums(dp),
            "dp2": sums(dp * dp),
            "top1_agree": tally(agree),
            "confident": tally(confident),
            "confident_agree": tally(agree * confident),
            "kl_above": above.tolist(),
        }
    )
    return Scores(clusters, kl_percentiles(kl), dp_percentiles(dp), seconds)


def kl_percentiles(kl: NDArray[np.float64]) -> KlPercentiles:
    """Percentiles of KL per token, rounding errors below zero shown as zero."""
    p50, p90, p99, p999 = (float(max(v, 0.0)) for v in np.percentile(kl, [50.0, 90.0, 99.0, 99.9]))
    return KlPercentiles(p50=p50, p90=p90, p99=p99, p999=p999, max=float(max(kl.max(), 0.0)))


def dp_percentiles(dp: NDArray[np.float64]) -> DpPercentiles:
    """Percentiles of the change of the correct token's probability."""
    p001, p01, p50, p99, p999 = (float(v) for v in np.percentile(dp, [0.1, 1.0, 50.0, 99.0, 99.9]))
    return DpPercentiles(p001=p001, p01=p01, p50=p50, p99=p99, p999=p999)
