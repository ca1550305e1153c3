"""The 8-bit dynamic code (Dettmers, arXiv:1511.04561, section 3): numbers in [-1, 1] over seven decades.

Decade e, from 10^(e - 7) to 10^(e - 6), has 2^e numbers of each sign, evenly apart; zero and one come besides. What
bitsandbytes stores scales of scales in.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

DECADES = 7


@cache
def dynamic_table() -> Tensor:
    """The 256 numbers float32, ascending. Do not change it in place."""
    found = [0.0, 1.0]
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (10 ** (decade - DECADES + 1) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        found += [*middles, *(-number for number in middles)]
    return torch.tensor(sorted(found), dtype=torch.float32)


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index int64 of the nearest number of an ascending table; beyond its ends, of the end."""
    return torch.bucketize(values, (table[:-1] + table[1:]) / 2)
