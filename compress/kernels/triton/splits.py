"""Products whose columns several programs share: where their sums go, and the kernel that adds them in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.triton.decode import rounded_to

_BLOCK = 1024


@triton.jit(do_not_specialize=["size", "splits"])
def finish_kernel(partial_ptr, bias_ptr, out_ptr, rows, size, splits, BLOCK: tl.constexpr):
    """out (size,) = sum of partial (splits, size) float32, in order, and the bias of each row; size = tokens * rows."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + split * size.to(tl.int64) + at, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, rounded_to(total, out_ptr.dtype.element_ty), mask=inside)


class Sums:
    """What a product (tokens, rows) in the dtype of x is written into, by `splits` programs for each of its blocks.

    target: the result itself, or (splits, tokens, rows) float32. bias: what the product adds; None where it is added
    at the end.
    """

    def __init__(self, x: Tensor, tokens: int, rows: int, splits: int, bias: Tensor | None) -> None:
        self._out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
        self._splits, self._bias = splits, bias
        self.target, self.bias = self._out, bias
        if splits > 1:
            self.target, self.bias = torch.empty(splits, tokens, rows, dtype=torch.float32, device=x.device), None

    def finished(self) -> Tensor:
        """The result, once the target is written."""
        if self._splits > 1:
            size = self._out.numel()
            finish_kernel[(triton.cdiv(size, _BLOCK),)](
                self.target, self._bias, self._out, self._out.shape[1], size, self._splits, BLOCK=_BLOCK
            )
        return self._out
