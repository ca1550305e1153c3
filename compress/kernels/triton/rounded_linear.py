"""x, rounded to 8 bits as its scheme says, times 8-bit weights: W8A8 and FP8 of every granularity."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from compress.kernels.triton import available
from compress.kernels.triton.configs import SAME_TOKENS, config
from compress.kernels.triton.rounded import rounded_kernel
from compress.kernels.triton.rounded_packing import RoundedWeight
from compress.kernels.triton.rounding import round_kernel
from compress.kernels.triton.splits import Sums

_CHUNK = 128


def round_inputs(weight: RoundedWeight, x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes (tokens, columns) int8 or uint8, scale (tokens, groups) float32) of x (tokens, columns)."""
    group = weight.inputs.group_size or weight.columns
    fp8 = weight.codes.dtype == torch.uint8
    codes = torch.empty(x.shape, dtype=weight.codes.dtype, device=x.device)
    groups = -(-weight.columns // group)
    scale = torch.empty(x.shape[0], groups, dtype=torch.float32, device=x.device)
    span = triton.next_power_of_2(group)
    round_kernel[(x.shape[0], groups)](
        x, weight.input_scale, codes, scale, weight.columns, group,
        STEPS=weight.inputs.steps, FP8=fp8, SPAN=span, num_warps=min(max(span // 1024, 1), 16),
    )  # fmt: skip
    return codes, scale


def multiply(weight: RoundedWeight, x: Tensor, same: bool = False) -> Tensor:
    """x (..., in) rounded, times the weight, transposed, plus its bias: (..., out) in the dtype of x.

    same: as in `linear.multiply`. ValueError where x does not fit.
    """
    if x.shape[-1] != weight.columns or not x.is_floating_point() or x.device != weight.codes.device:
        raise ValueError(f"inputs {x.dtype} {tuple(x.shape)} on {x.device} do not fit {tuple(weight.codes.shape)}")
    inputs = x.reshape(-1, weight.columns).contiguous()
    tokens, chunks, shape = inputs.shape[0], -(-weight.columns // _CHUNK), (*x.shape[:-1], weight.rows)
    if tokens == 0:
        return x.new_empty(shape)
    codes, scale = round_inputs(weight, inputs)
    kind, stored = "int8", weight.codes
    if stored.dtype == torch.uint8:
        kind = "fp8" if available.multiplies_fp8(x.device) else "bytes"
        if kind == "fp8":
            codes, stored = codes.view(torch.float8_e4m3fn), stored.view(torch.float8_e4m3fn)
    cut = config("rounded", x.device, 8, SAME_TOKENS if same else tokens, weight.rows, chunks, 8)
    sums = Sums(x, tokens, weight.rows, cut.splits, weight.bias)
    tiles = weight.inputs.granularity == "group"
    grid = (triton.cdiv(tokens, cut.block_tokens), triton.cdiv(weight.rows, cut.block_rows), cut.splits)
    rounded_kernel[grid](
        codes, scale, stored, weight.scale, sums.bias, sums.target,
        tokens, weight.rows, weight.columns, chunks, cut.splits,
        CODES=kind, TILES=tiles, ROW_SCALES=not tiles and weight.scale.numel() == weight.rows,
        BLOCK_ROWS=cut.block_rows, BLOCK_TOKENS=cut.block_tokens, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return sums.finished().view(shape)
