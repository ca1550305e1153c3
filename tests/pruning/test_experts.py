"""Which experts stay, on rows made by hand."""

from __future__ import annotations

import torch

from compress.pruning import experts


def test_the_most_salient_stay_in_every_group() -> None:
    saliency = torch.tensor([5.0, 1.0, 4.0, 3.0, 0.0, 2.0, 2.0, 0.1])
    assert experts.most_salient(saliency, 4).tolist() == [0, 2, 3, 5]
    assert experts.most_salient(saliency, 4, groups=2).tolist() == [0, 2, 5, 6]


def test_one_of_each_cluster_stays_and_it_is_the_one_in_the_middle() -> None:
    rows = torch.tensor([[0.0, 0.0], [10.0, 0.0], [10.2, 0.0], [10.4, 0.0], [0.0, 9.0], [0.0, 9.1]])
    kept = experts.representatives(rows, 3).tolist()
    assert kept == [0, 2, 4]
    assert experts.representatives(rows, 6).tolist() == list(range(6))
    assert experts.representatives(rows, 2, groups=2).tolist()[0] < 3 <= experts.representatives(rows, 2, groups=2)[1]
