"""Which back end runs a model, and why: the engine where it computes the architecture, else transformers.

The engine's steps are native code on a CPU and Triton kernels on a GPU. In transformers too, quantised linears stay
packed where a kernel takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.errors import UserError
from compress.kernels.triton import available
from compress.models.checkpoint import Checkpoint
from compress.models.quiet import quiet
from compress.runtime import packed_backend, transformers_backend, triton_backend
from compress.runtime.cache_choice import CACHES
from compress.runtime.memory import guarded
from compress.runtime.native_backend import NativeRuntime
from compress.runtime.native_shape import Shape, Unsupported, shape_of
from compress.runtime.packed_backend import PackedRuntime, Plan
from compress.runtime.protocol import Runtime
from compress.runtime.transformers_loader import load_config

KERNELS = ("auto", "cpu", "cpu-int8", "triton", "reference")
MOST_CACHE_TOKENS = 2**28
KV_CACHES = ("auto", *CACHES)


@dataclass(frozen=True, slots=True)
class Decision:
    """The back end of a model and the reason in words.

    shape: where the engine runs it. packed: where transformers runs it with linears that stay packed on a CPU.
    """

    backend: str
    reason: str
    shape: Shape | None = None
    packed: Plan | None = None


def load(
    path: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    kernel: str = "auto",
    *,
    prefix_cache: bool = False,
    cache_tokens: int | None = None,
    kv_cache: str = "auto",
    kv_skip: str = "none",
    deterministic: bool = False,
) -> Runtime:
    """Loads a Hugging Face model directory or an artifact.

    device: `auto` (a CUDA device where there is one), `cpu`, `cuda` or `cuda:N`. dtype: what the arithmetic is done in;
    the native engine takes `auto` and `float32`. kernel: `cpu`, the native engine with exact products, or transformers
    with packed linears in them where the engine does not define the model; `cpu-int8`, the same with inputs of packed
    integers, and the engine's head, in 8 bits; `triton`, the engine in a GPU's kernels, or transformers with packed
    linears in them; `reference`, dense arithmetic in transformers; `auto`, on a CPU `cpu` where there is one for the
    model, the engine's answers with inputs of integers in 8 bits where that costs little (`input_choice`), on a GPU
    `triton` where that runs, and `reference` elsewhere. prefix_cache: the engine keeps what it computed of prompts for
    later calls that begin the same (never for scores). cache_tokens: room of its key-value cache, 2^28 at most.
    kv_cache: how the engine keeps keys and values: `float32` (on a GPU the model's dtype), `bfloat16`; `int8` and
    `int4` with a grid per token and head; `fp8` with the artifact's calibrated scales, or 1, and then refused where it
    breaks the model; on a CPU `int2` with keys by channel, and `nvfp4`; `auto`, `fp8` where the artifact has scales,
    else what loses nothing. kv_skip: layers that keep bfloat16 instead: `none`, numbers with commas, or `auto`, those
    that lose most, as measured. deterministic: no bit of a result may depend on what else is computed, in chunks or
    from a found prefix; so it is in the native engine anyway, on a GPU it costs time, in transformers it cannot be had.

    Raises:
        UserError: no model there, an unknown architecture, device, dtype, kernel or cache, or a kernel, a cache or
            determinism that this model cannot have.
        IntegrityError: damaged files, or tensors that do not fit the config.
        WorkError: out of memory.
    """
    check_kernel(kernel)
    if kv_cache not in KV_CACHES:
        raise UserError(f"key-value cache {kv_cache!r} is not known", f"choose {', '.join(KV_CACHES)}")
    if cache_tokens is not None and not (isinstance(cache_tokens, int) and 1 <= cache_tokens <= MOST_CACHE_TOKENS):
        raise UserError(
            f"cache_tokens is {cache_tokens!r}; it must be a whole number from 1 to {MOST_CACHE_TOKENS}",
            "leave it out for the model's context",
        )
    if kernel == "reference":
        _refuse_determinism(path, deterministic, "--kernel reference computes in transformers")
        _refuse_cache(path, kv_cache, kv_skip, "--kernel reference computes in transformers")
        return transformers_backend.load(path, device, dtype, "reference")
    checkpoint = Checkpoint.open(path)
    decision = decide(checkpoint, device, dtype, kernel)
    if decision.backend == "gpu" and decision.shape is not None:
        return _on_gpu(
            checkpoint,
            decision.shape,
            device,
            dtype,
            prefix_cache=prefix_cache,
            cache_tokens=cache_tokens,
            kv_cache=kv_cache,
            kv_skip=kv_skip,
            deterministic=deterministic,
        )
    if decision.backend != "native":
        _refuse_determinism(path, deterministic, decision.reason)
    if decision.backend == "transformers+triton":
        _refuse_cache(path, kv_cache, kv_skip, decision.reason)
        return triton_backend.load(path, device, dtype)
    if decision.shape is not None:
        return NativeRuntime(
            checkpoint,
            decision.shape,
            eight_bit=None if kernel == "auto" else kernel == "cpu-int8",
            prefix_cache=prefix_cache,
            cache_tokens=cache_tokens,
            kv_cache=kv_cache,
            kv_skip=kv_skip,
        )
    _refuse_cache(path, kv_cache, kv_skip, decision.reason)
    if decision.packed is not None:
        with guarded("loading the model"):
            return PackedRuntime(checkpoint, decision.packed, eight_bit=kernel == "cpu-int8")
    if kernel != "auto":
        engine = "kernel 'triton'" if kernel == "triton" else "the native engine"
        raise UserError(f"{engine} does not run {path}: {decision.reason}", "use --kernel auto")
    return transformers_backend.load(path, device, dtype)


def check_kernel(kernel: str) -> None:
    """Raises UserError for a kernel that is not known."""
    if kernel not in KERNELS:
        raise UserError(f"kernel {kernel!r} is not available", f"choose {', '.join(KERNELS[:-1])} or {KERNELS[-1]}")


def _refuse_determinism(path: str | Path, deterministic: bool, reason: str) -> None:
    if deterministic:
        raise UserError(
            f"deterministic products need the engine, which does not run {path}: {reason}",
            "leave --deterministic out",
        )


def _refuse_cache(path: str | Path, kv_cache: str, kv_skip: str, reason: str) -> None:
    if kv_cache != "auto" or kv_skip != "none":
        wanted = f"a {kv_cache} key-value cache" if kv_cache != "auto" else "--kv-skip"
        raise UserError(
            f"{wanted} needs the engine, which does not run {path}: {reason}",
            "use --kv-cache auto and no --kv-skip",
        )


def decide(checkpoint: Checkpoint, device: str = "auto", dtype: str = "auto", kernel: str = "auto") -> Decision:
    """Which back end `kernel` takes for a checkpoint, and why; `reference` is not asked for here.

    Raises:
        UserError: an unknown device or dtype, or a config that transformers does not know.
        IntegrityError: a quantised linear that the config does not describe.
    """
    place = transformers_backend.chosen_device(device)
    if kernel == "triton" or (kernel == "auto" and place.type != "cpu"):
        return _with_triton(checkpoint, place)
    if place.type != "cpu":
        return Decision("transformers", f"it is for CPUs, and the device is {place}")
    if dtype not in ("auto", "float32"):
        return Decision("transformers", f"the native engine does not compute in {dtype}")
    try:
        shape = _shape(checkpoint)
    except Unsupported as error:
        plan = packed_backend.plan(checkpoint)
        if plan is None or not plan.slots:
            return Decision("transformers", str(error))
        said = f"{error}; {len(plan.slots)} of its quantised linears stay packed, in native kernels"
        if plan.dense:
            name, reason = next(iter(plan.dense.items()))
            said += f", and {len(plan.dense)} are decoded: {name}: {reason}"
        return Decision("transformers+native", said, packed=plan)
    kind = shape.config.model_type
    return Decision("native", f"{kind} decoders are computed from weights as they are stored", shape)


def obstacle(checkpoint: Checkpoint) -> str | None:
    """Why the engine does not compute a checkpoint, on whatever device; None if it does. Raises as `decide`."""
    try:
        _shape(checkpoint)
    except Unsupported as error:
        return str(error)
    return None


def _with_triton(checkpoint: Checkpoint, device: torch.device) -> Decision:
    if (reason := available.obstacle(device)) is not None:
        return Decision("transformers", f"there are no Triton kernels: {reason}")
    try:
        shape = _shape(checkpoint)
    except Unsupported as error:
        if (reason := triton_backend.obstacle(checkpoint)) is not None:
            return Decision("transformers", f"{error}, and {reason}")
        return Decision("transformers+triton", f"{error}; quantised linears stay packed, in Triton kernels")
    return Decision("gpu", f"{shape.config.model_type} decoders are computed by Triton kernels", shape)


def _shape(checkpoint: Checkpoint) -> Shape:
    with quiet():
        config = load_config(checkpoint)
    return shape_of(checkpoint, config)


def _on_gpu(
    checkpoint: Checkpoint,
    shape: Shape,
    device: str,
    dtype: str,
    cache_tokens: int | None,
    deterministic: bool,
    **settings: Any,
) -> Runtime:
    from compress.runtime.gpu_backend import GpuRuntime  # which imports triton
    from compress.runtime.gpu_model import GpuModel

    place = transformers_backend.chosen_device(device)
    kept = transformers_backend.chosen_dtype(dtype, place, checkpoint)
    with guarded("loading the model"):
        model = GpuModel(checkpoint, shape, place, kept, cache_tokens, deterministic)
    return GpuRuntime(checkpoint, model, **settings)
