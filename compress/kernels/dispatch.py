"""Which implementation of an operation runs on a device, and why; and the operations themselves, on torch tensors.

Shapes follow the legend in `types.py`. Every CPU result is the same whatever `threads` is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from compress.errors import UserError, WorkError
from compress.kernels import batched, reference
from compress.kernels.triton.available import obstacle as triton_obstacle

OPERATIONS = (
    "gptq_quantize",
    "coordinate_descent",
    "prune_columns",
    "rounding_loss",
    "search_range",
    "add_moment",
    "causal_attention",
    "packed_linear",
    "decoder_step",
)


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation that `choose` picked, and the reason in words."""

    name: str
    reason: str


def native() -> ModuleType:
    """The native module. WorkError if it was not built, UserError if COMPRESS_ISA names what is not available."""
    try:
        from compress.kernels.cpu import _native
    except ImportError as error:
        raise WorkError(
            f"the native kernels are not built ({error})", "run `pip install -e .` in the checkout, or install a wheel"
        ) from error
    try:
        _native.isa()
    except ValueError as error:
        raise UserError(f"COMPRESS_ISA: {error}", "unset COMPRESS_ISA, or name an available one") from error
    return _native


def choose(operation: str, device: torch.device | str) -> Choice:
    """The implementation of `operation` (one of OPERATIONS) for tensors on `device`."""
    if operation not in OPERATIONS:
        raise ValueError(f"unknown operation {operation!r}; one of {', '.join(OPERATIONS)}")
    kind = torch.device(device).type
    if kind == "cpu":
        module = native()
        available = ", ".join(module.available_isas())
        return Choice(f"native-{module.isa()}", f"C++ kernel; this processor runs {available}")
    if operation in ("rounding_loss", "search_range"):
        return Choice("reference", f"no {kind} kernel: plain torch, one candidate at a time")
    if operation == "packed_linear":
        if (reason := triton_obstacle(device)) is not None:
            return Choice("reference", f"no {kind} kernel, {reason}: transformers runs the model on decoded weights")
        return Choice("triton", "packed weights in Triton kernels")
    if operation == "decoder_step":
        if (reason := triton_obstacle(device)) is not None:
            return Choice("reference", f"no {kind} kernel, {reason}: transformers runs the model, linear by linear")
        return Choice("triton", "the engine's layers in Triton kernels, steps of one token each as one CUDA graph")
    if operation in ("add_moment", "causal_attention"):
        return Choice("reference", f"no {kind} kernel: torch's own product")
    if operation == "prune_columns":
        return Choice("reference", f"no {kind} kernel: all rows at once, one column after the other")
    return Choice("batched", f"batched torch: all rows at once on {kind}, columns in chunks of {batched.COLUMN_CHUNK}")


def gptq_quantize(
    weight: Tensor,
    upper: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_of_column: Tensor,
    qmin: int,
    qmax: int,
    threads: int | None = None,
    pruned: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GPTQ's column loop: (codes (out, in) int8, loss per row (out) float32).

    weight (out, in) float32 with its columns in the order in which they are to be quantised, not modified; upper
    (in, in) float32, the upper Cholesky factor U of the inverse Hessian in that order (H^-1 = U^T U); scale and
    zero_point (out, groups), None when symmetric; group_of_column (in) integers. What is `pruned` (out, in) int8, where
    that is given and not 0, gets the code of zero.
    """
    scale, zero_point = _grid(scale, zero_point)
    if choose("gptq_quantize", weight.device).name == "batched":
        return batched.gptq_quantize(
            weight.float(), upper.float(), scale, zero_point, group_of_column, qmin, qmax, pruned
        )
    codes = torch.empty(weight.shape, dtype=torch.int8)
    loss = torch.empty(weight.shape[0])
    native().gptq_quantize(
        weight.float().contiguous(),
        upper.float().contiguous(),
        scale,
        zero_point,
        group_of_column.to(torch.int32).contiguous(),
        qmin,
        qmax,
        codes,
        loss,
        _threads(threads),
        _marks(pruned),
    )
    return codes, loss


def coordinate_descent(
    gradient: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_of_column: Tensor,
    qmin: int,
    qmax: int,
    codes: Tensor,
    sweeps: int,
    threads: int | None = None,
    pruned: Tensor | None = None,
) -> int:
    """Improve codes one at a time; returns the number of changes. Updates `gradient` and `codes` in place.

    gradient (out, in) float32 contiguous, holds B - dequantised(codes) @ hessian on entry, where B = weight @ hessian
    or whatever right-hand side the caller minimises against; hessian (in, in) symmetric float32; codes (out, in) int8
    contiguous; scale, zero_point (out, groups), None when symmetric; group_of_column (in) integers. A row stops once
    a sweep changes none of its codes. Columns whose diagonal is not positive are left alone. What is `pruned` (out, in)
    int8, where that is given and not 0, gets the code of zero.
    """
    scale, zero_point = _grid(scale, zero_point)
    if choose("coordinate_descent", gradient.device).name == "batched":
        return batched.coordinate_descent(
            gradient, hessian, scale, zero_point, group_of_column, qmin, qmax, codes, sweeps, pruned
        )
    groups = group_of_column.to(torch.int32).contiguous()
    changes: int = native().coordinate_descent(
        gradient, hessian.float().contiguous(), scale, zero_point, groups, qmin, qmax, codes, sweeps, _threads(threads),
        _marks(pruned),
    )  # fmt: skip
    return changes


def prune_columns(
    weight: Tensor, upper: Tensor, pruned: Tensor, group: int = 0, drop: int = 0, threads: int | None = None
) -> Tensor:
    """SparseGPT's column loop within one block; updates `weight`, and `pruned` where there is a `group`.

    weight (out, in) float32 contiguous, zero where pruned afterwards; upper (in, in) float32, the block's part of U
    where H^-1 = U^T U; pruned (out, in) int8 contiguous, 1 where a weight goes. With a `group`, of every `group`
    columns the `drop` with the least w^2 / U_ii^2 go. Returns errors (out, in) float32: later columns are to be
    corrected by -errors @ (their part of U).
    """
    if choose("prune_columns", weight.device).name == "reference":
        return reference.prune_columns(weight, upper, pruned, group, drop)
    errors = torch.empty_like(weight)
    native().prune_columns(weight, upper.contiguous(), pruned, errors, group, drop, _threads(threads))
    return errors


def rounding_loss(
    weight: Tensor,
    scales: Tensor,
    importance: Tensor,
    shares: Sequence[float],
    group_size: int,
    bits: int,
    symmetric: bool,
    threads: int | None = None,
) -> Tensor:
    """What rounding to nearest costs under candidate column scales: (candidates) float32.

    weight (out, in) float32; scales (candidates, in), what the columns are multiplied with; importance (candidates,
    in), what a squared error of a scaled column counts. Each group of `group_size` columns takes the best of the grids
    that cover `shares` of its range.
    """
    if choose("rounding_loss", weight.device).name == "reference":
        return reference.rounding_loss(weight, scales, importance, shares, group_size, bits, symmetric)
    loss = torch.empty(scales.shape[0])
    native().rounding_loss(
        weight.contiguous(),
        scales.contiguous(),
        importance.contiguous(),
        torch.tensor(shares, dtype=torch.float32),
        group_size,
        bits,
        symmetric,
        loss,
        _threads(threads),
    )
    return loss


def search_range(
    weight: Tensor,
    importance: Tensor | None,
    shares: Sequence[float],
    offsets: Sequence[float],
    group_size: int,
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Of each group's range, the share that its grid should cover, and the sign of the scale: (out, groups) float32.

    weight (out, in) float32; importance (groups, group_size, group_size) float32, symmetric, by which a group's
    rounding error e counts as e B e^T; None counts squared errors. First every one of `shares` is tried, symmetric
    grids with both signs, then the best share plus each of `offsets`. Scales are rounded to `scale_dtype`.
    """
    if choose("search_range", weight.device).name == "reference":
        return reference.search_range(
            weight, importance, shares, offsets, group_size, bits, symmetric, scale_dtype
        )  # fmt: skip
    share, sign = torch.empty(2, weight.shape[0], weight.shape[1] // group_size).unbind(0)
    native().search_range(
        weight.contiguous(),
        None if importance is None else importance.contiguous(),
        torch.tensor(shares, dtype=torch.float32),
        torch.tensor(offsets, dtype=torch.float32),
        group_size,
        bits,
        symmetric,
        str(scale_dtype).removeprefix("torch."),
        share,
        sign,
        _threads(threads),
    )
    return share, sign


def add_moment(total: Tensor, left: Tensor, right: Tensor, rows: range, upper: bool) -> None:
    """total[rows] += (left^T right)[rows], single-threaded; with `upper` not all of it below the diagonal.

    total (in, in) float32, updated; left and right (tokens, in), both float32 or both bfloat16, contiguous.
    """
    if choose("add_moment", total.device).name == "reference":
        reference.add_moment(total, left, right, rows, upper)
    else:
        native().add_moment(total, left, right, rows.start, rows.stop, upper)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, threads: int | None = None) -> Tensor:
    """softmax(scale * q k^T) v of every token over itself and those before it: (batch, tokens, heads, dim).

    query (batch, heads, tokens, dim); key and value (batch, kv_heads, tokens, dim) with kv_heads a divisor of heads;
    all float32 or all bfloat16. Sums are float32; bfloat16 attention weights are rounded before they meet the values.
    """
    if choose("causal_attention", query.device).name == "reference":
        return reference.causal_attention(query, key, value, scale)
    batch, heads, tokens, dim = query.shape
    out = torch.empty(batch, tokens, heads, dim, dtype=query.dtype)
    native().causal_attention(
        query.contiguous(), key.contiguous(), value.contiguous(), out, scale, _threads(threads)
    )  # fmt: skip
    return out


def _grid(scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
    scale = scale.float().contiguous()
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point.float().contiguous()
    return scale, zero_point


def _marks(pruned: Tensor | None) -> Tensor | None:
    return None if pruned is None else pruned.to(torch.int8).contiguous()


def _threads(threads: int | None) -> int:
    return torch.get_num_threads() if threads is None else threads
