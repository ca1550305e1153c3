"""Which experts of one mixture stay.

REAP (Lasby et al., arXiv:2510.13999): an expert matters by what it adds, the mean over the tokens routed to it of
router weight times norm of its output. STUN (Lee et al., arXiv:2409.06211) reads no text: experts whose router rows are
near each other do alike, so they are clustered (complete linkage), and of each cluster the member nearest to its mean
stays.
"""

from __future__ import annotations

import torch
from torch import Tensor


def most_salient(saliency: Tensor, keep: int, groups: int = 1) -> Tensor:
    """The experts that stay, sorted int64: the highest of saliency (experts,), as many in each of `groups` runs."""
    rows = saliency.reshape(groups, -1)
    best = torch.argsort(rows, dim=1, descending=True, stable=True)[:, : keep // groups]
    first = torch.arange(groups).unsqueeze(1) * rows.shape[1]
    return (best + first).reshape(-1).sort().values


def representatives(router: Tensor, keep: int, groups: int = 1) -> Tensor:
    """The experts that stay, sorted int64: one for each of `keep` clusters of router rows (experts, hidden) float32."""
    size = router.shape[0] // groups
    found = [group * size + _of_clusters(rows, keep // groups) for group, rows in enumerate(router.split(size))]
    return torch.cat(found)


def _of_clusters(rows: Tensor, keep: int) -> Tensor:
    clusters = [[number] for number in range(rows.shape[0])]
    distance = torch.cdist(rows, rows)
    distance.fill_diagonal_(torch.inf)
    while len(clusters) > keep:
        flat = int(distance.argmin())
        a, b = sorted(divmod(flat, len(clusters)))
        clusters[a] += clusters.pop(b)
        farther = torch.maximum(distance[a], distance[b])
        distance[a], distance[:, a] = farther, farther
        distance[a, a] = torch.inf
        stays = torch.arange(distance.shape[0]) != b
        distance = distance[stays][:, stays]
    nearest = [members[int((rows[members] - rows[members].mean(0)).norm(dim=1).argmin())] for members in clusters]
    return torch.tensor(sorted(nearest))
