"""What a GPU has left beside the weights: how much of it steps take, and what stays for keys and values."""

from __future__ import annotations

import torch

from compress.errors import WorkError
from compress.kernels.triton.cache import PAGE
from compress.kernels.triton.configs import units
from compress.kernels.triton.paged import PER_UNIT
from compress.runtime.gpu_graphs import BATCHES
from compress.runtime.native_shape import Shape

_OTHER = 256 << 20
"""Bytes for what is not counted: the allocator's rounding, compiled kernels, graphs themselves."""
_ROUNDING_COPIES = 4
"""Float32 tensors of a linear's inputs that `formats.inputs.round_inputs` has at a time."""


def working_bytes(shape: Shape, dtype: torch.dtype, device: torch.device, step_tokens: int) -> int:
    """Bytes that a step takes at most, and those that recorded steps keep: the memory between their kernels.

    A step holds a few vectors of each token, of a mixture those of each chosen expert, and what torch rounds in float32
    some times over; the logits of all its tokens, in dtype and in float32, where scores are asked for. Recorded ones
    share their memory and the buffer of their logits, so that the largest counts. Beside that there is the attention of
    all splits of all sequences, in float32.
    """
    ffn = max(shape.ffn, shape.chosen * shape.expert_ffn)
    wide = (4 + 5 * shape.chosen) * shape.hidden + 2 * (shape.heads + shape.kv_heads) * shape.head_dim + 3 * ffn
    rounded = any(scheme.inputs is not None for scheme in shape.schemes.values())
    rounding = 4 * _ROUNDING_COPIES * max(shape.hidden, shape.heads * shape.head_dim, ffn) if rounded else 0
    token = dtype.itemsize * (wide + shape.vocabulary) + 4 * 3 * shape.vocabulary + rounding
    attention = 4 * (PER_UNIT * units(device) // shape.kv_heads) * shape.heads * (shape.head_dim + 2)
    kept = BATCHES[-1] * (token + 4 * shape.vocabulary)
    return step_tokens * token + kept + attention + _OTHER


def affordable_pages(
    shape: Shape, dtype: torch.dtype, device: torch.device, wanted: int, step_tokens: int, *, least: bool
) -> int:
    """Pages of a cache of `wanted` tokens, one more for a last token, or what fits into the device's free memory.

    least: fewer are refused. On a CPU, where kernels are interpreted, as many as wanted.

    Raises:
        WorkError: that is less than wanted and `least`, or not even one step's.
    """
    pages = -(-wanted // PAGE) + 1
    if device.type != "cuda":
        return pages
    torch.cuda.empty_cache()  # what loading left, else it counts as taken
    free, _ = torch.cuda.mem_get_info(device)
    page_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * PAGE * dtype.itemsize
    return fitting_pages(pages, free - working_bytes(shape, dtype, device, step_tokens), page_bytes, step_tokens, least)


def fitting_pages(pages: int, free: int, page_bytes: int, step_tokens: int, least: bool) -> int:
    """`pages`, or what `free` bytes hold of them; WorkError as in `affordable_pages`."""
    found = min(pages, max(free, 0) // page_bytes)
    needed = pages if least else min(pages, -(-step_tokens // PAGE) + 1)
    if found < needed:
        raise WorkError(
            f"beside weights and steps the GPU has room for the keys and values of {found * PAGE} tokens, and "
            f"{needed * PAGE} are needed",
            "ask for fewer cache_tokens, compress the weights further, or use a GPU with more memory",
        )
    return found
