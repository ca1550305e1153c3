"""What computes scores: the engine, where nothing depends on the batch that a text is scored in, or transformers.

On a CPU the engine's exact products are the first choice: no bit of a score depends on what else is computed, or on the
number of threads, weights stay packed, and it is the faster of the two. Models that are compared are scored alike.
"""

from __future__ import annotations

from pathlib import Path

from compress.errors import UserError
from compress.models.checkpoint import Checkpoint
from compress.progress import Progress
from compress.runtime import loading, transformers_backend
from compress.runtime.protocol import Runtime
from compress.runtime.sound import check_artifact

ENGINES = ("native", "gpu")
REFERENCE = "reference"


def chosen_kernel(
    model: str | Path,
    baseline: str | Path | None,
    device: str,
    dtype: str,
    kernel: str,
    progress: Progress | None = None,
) -> str:
    """The kernel that scores a model and its baseline: the one given, or what `auto` stands for.

    That is `cpu` where the native engine computes both, and else `reference`; so it is on a GPU, whose kernels are
    taken where they are asked for (`triton`). Addresses have their own. progress: is told of a quantised model that
    the engine does not compute.

    Raises:
        UserError: an unknown kernel, device or dtype, no such model, or a config that transformers does not know.
        IntegrityError: a quantised linear that the config does not describe.
    """
    from compress.evaluation.harness.endpoint import is_endpoint

    if kernel not in loading.KERNELS:
        known = f"{', '.join(loading.KERNELS[:-1])} or {loading.KERNELS[-1]}"
        raise UserError(f"kernel {kernel!r} is not available", f"choose {known}")
    if kernel != "auto" or transformers_backend.chosen_device(device).type != "cpu":
        return REFERENCE if kernel == "auto" else kernel
    if dtype not in ("auto", "float32"):
        return REFERENCE
    for path in (model, baseline):
        if path is None or is_endpoint(path):
            continue
        checkpoint = Checkpoint.open(path)
        decision = loading.decide(checkpoint, device, dtype, "cpu")
        if decision.backend not in ENGINES:
            if progress is not None and checkpoint.config.get("quantization_config"):
                progress.warn(f"scored in transformers, on decoded weights: {decision.reason}")
            return REFERENCE
    return "cpu"


def open_runtime(path: str | Path, device: str, dtype: str, kernel: str) -> Runtime:
    """A model or an artifact (checked byte by byte, but for its earlier scores), loaded to be scored.

    kernel: as `chosen_kernel` gives it; all but `reference` are the engine's, which is then deterministic.

    Raises:
        UserError: no such model, device or dtype, or a model that the engine does not compute with this kernel.
        IntegrityError: damaged files, or an artifact that was changed.
        WorkError: out of memory.
    """
    check_artifact(path, scores=False)
    if kernel == REFERENCE:
        return transformers_backend.load(path, device=device, dtype=dtype)
    decision = loading.decide(Checkpoint.open(path), device, dtype, kernel)
    if decision.backend not in ENGINES:
        raise UserError(f"kernel {kernel!r} does not score {path}: {decision.reason}", "use --kernel reference")
    return loading.load(path, device=device, dtype=dtype, kernel=kernel, deterministic=True)
