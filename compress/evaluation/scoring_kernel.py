"""What computes scores: the engine, where nothing depends on the batch that a text is scored in, or transformers.

On a CPU the engine's exact products are the first choice: no bit of a score depends on what else is computed, or on the
number of threads, weights stay packed, and it is the faster of the two. Models that are compared are scored alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compress.errors import UserError
from compress.models.checkpoint import Checkpoint
from compress.progress import Progress
from compress.runtime import loading, transformers_backend
from compress.runtime.paged_model import default_cache_tokens
from compress.runtime.protocol import Runtime
from compress.runtime.sound import check_artifact

ENGINES = ("native", "gpu")
REFERENCE = "reference"


def chosen_kernel(
    models: Sequence[str | Path], device: str, dtype: str, kernel: str, progress: Progress | None = None
) -> str:
    """The kernel that scores all of `models` (artifacts are checked byte by byte first, but for their earlier scores).

    It is the one given, or what `auto` stands for: `cpu` where the native engine computes them all, and else
    `reference`; so it is on a GPU, whose kernels are taken where they are asked for (`triton`). Addresses have their
    own. progress: is told where quantised weights are decoded because of that.

    Raises:
        UserError: an unknown kernel, device or dtype, no such model, or a config that transformers does not know.
        IntegrityError: damaged files, an artifact that was changed, or a quantised linear that the config does not
            describe.
    """
    from compress.evaluation.harness.endpoint import is_endpoint

    loading.check_kernel(kernel)
    local = [path for path in models if not is_endpoint(path)]
    for path in local:
        check_artifact(path, scores=False)
    if kernel != "auto":
        return kernel
    checkpoints = [Checkpoint.open(path) for path in local]
    reason = _obstacle(checkpoints, device, dtype)
    if reason is None:
        return "cpu"
    if progress is not None and any(checkpoint.config.get("quantization_config") for checkpoint in checkpoints):
        progress.warn(f"scored in transformers, on decoded weights: {reason}")
    return REFERENCE


def open_runtime(path: str | Path, device: str, dtype: str, kernel: str) -> Runtime:
    """A model or an artifact, loaded to be scored.

    kernel: as `chosen_kernel` gives it; all but `reference` are the engine's, which is then deterministic, and on a CPU
    has room for a text of the whole context.

    Raises:
        UserError: no such model, device or dtype, or a model that the engine does not compute with this kernel.
        IntegrityError: damaged files.
        WorkError: out of memory.
    """
    if kernel == REFERENCE:
        return transformers_backend.load(path, device=device, dtype=dtype)
    checkpoint, place = Checkpoint.open(path), transformers_backend.chosen_device(device)
    transformers_backend.chosen_dtype(dtype, place, checkpoint)
    if kernel != "triton" and place.type != "cpu":
        raise UserError(f"kernel {kernel!r} is for CPUs, and the device is {place}", "add --device cpu")
    decision = loading.decide(checkpoint, device, dtype, kernel)
    if decision.backend not in ENGINES or decision.shape is None:
        raise UserError(f"kernel {kernel!r} does not score {path}: {decision.reason}", "use --kernel reference")
    room = None
    if kernel != "triton":  # on a CPU memory is taken as it is needed
        context = decision.shape.config.max_position_embeddings
        room = min(max(context, default_cache_tokens(context)), loading.MOST_CACHE_TOKENS)
    return loading.load(path, device=device, dtype=dtype, kernel=kernel, cache_tokens=room, deterministic=True)


def _obstacle(checkpoints: Sequence[Checkpoint], device: str, dtype: str) -> str | None:
    """Why `auto` does not score all of these in the engine; None if it does."""
    place = transformers_backend.chosen_device(device)
    if place.type != "cpu":
        return f"the device is {place} (--kernel triton takes the engine's kernels there)"
    if dtype not in ("auto", "float32"):
        return f"the engine does not compute in {dtype}"
    for checkpoint in checkpoints:
        if (reason := loading.obstacle(checkpoint)) is not None:
            return f"{checkpoint.path.name}: {reason}"
    return None
