"""Loading a model to run it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.workflows.api._given import PathLike, model_or_packaged

if TYPE_CHECKING:
    from compress.runtime.protocol import Runtime


def load(
    model: PathLike | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kernel: str = "auto",
    kv_cache: str = "auto",
    kv_skip: str = "none",
    deterministic: bool = False,
) -> Runtime:
    """Load a model directory, hub id or artifact for scoring and generation; the packaged model if None.

    Args:
        model: What to load.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: Compute dtype: `auto`, `float32`, `bfloat16` or `float16`.
        kernel: `auto`, `cpu`, `cpu-int8`, `triton` or `reference`, as `compress.runtime.loading.load` says.
        kv_cache: `auto`, `float32`, `bfloat16`, `fp8`, `int8`, `nvfp4` or `int4`: how the native engine keeps keys and
            values.
        kv_skip: Layers that keep them in bfloat16 instead: `none`, numbers with commas, or `auto`, as measured.
        deterministic: No bit of a result depends on what else is computed, in chunks or from a found prefix.

    Returns:
        A runtime: `.score(token_ids)` gives logits, `.generate(prompts, SamplingParams(...))` texts.

    Raises:
        UserError: no model there, an unknown architecture, device, dtype or kernel, or determinism where transformers
            runs the model.
        IntegrityError: damaged files; an artifact is hashed whole first.
        WorkError: out of memory.
    """
    from compress.runtime.loading import load as load_runtime
    from compress.runtime.sound import check_artifact

    found = model_or_packaged(model)
    check_artifact(found, scores=False)
    return load_runtime(
        found, device, dtype, kernel, kv_cache=kv_cache, kv_skip=kv_skip, deterministic=deterministic
    )  # fmt: skip
