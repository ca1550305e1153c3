"""What is written: the tensors of each block and of what stands outside, their ledger entries, and config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from typing import Any

from torch import Tensor

from compress.artifact.layers import LayerRecord
from compress.artifact.ledger import Action, LedgerEntry
from compress.formats.compressed_tensors import for_own_reader, quantization_config
from compress.pipeline.block import BlockResult
from compress.pipeline.job import Job
from compress.pipeline.kinds import Fate
from compress.pipeline.source import read_finite
from compress.pipeline.work import Work
from compress.types import IntScheme


def block_tensors(job: Job, block: int, result: BlockResult, pool: Executor) -> tuple[dict[str, Tensor], Fate]:
    """The output tensors of one block, and the fate of each of its source tensors."""
    tensors: dict[str, Tensor] = {}
    fate: Fate = {}
    packed = pool.map(lambda linear: job.format.pack(linear.quantized, linear.input_scale), result.linears)
    for linear, local_tensors in zip(result.linears, packed, strict=True):
        stored = {f"{linear.spec.name}.{local}": tensor for local, tensor in local_tensors.items()}
        tensors |= stored
        fate[linear.spec.weight] = ("quantized", list(stored))
    for linear_name, added in result.added.items():
        tensors |= added
        fate[f"{linear_name}.weight"][1].extend(added)
    for name, tensor in result.changed.items():
        tensors[name] = tensor
        fate[name] = ("folded", [name])
    rest = [name for name in job.skeleton.block_tensors(block) if name not in fate]
    return keep(job, rest, tensors, fate)


def left_alone(job: Work, block: int) -> list[LayerRecord]:
    """The report of the linears of one block that keep their precision: why they do."""
    return [
        LayerRecord(name=spec.name, block=block, reason=job.reasons[spec.name])
        for spec in job.skeleton.linears(block)
        if spec.name in job.reasons
    ]


def outer_tensors(job: Work) -> tuple[dict[str, Tensor], Fate]:
    """The output tensors outside all blocks; a stored copy of a tied tensor is not written a second time."""
    fate: Fate = {}
    checkpoint, tied = job.checkpoint, job.skeleton.tied()
    rest = []
    later = {spec.weight for spec in job.tables} if isinstance(job, Job) else set()
    for name in job.skeleton.outer_tensors():
        if name in later or tied.get(name) in later:
            continue
        target = tied.get(name)
        if target in checkpoint.index and target != name and checkpoint.sha256(name) == checkpoint.sha256(target):
            fate[name] = ("tied", [target])
        else:
            rest.append(name)
    return keep(job, rest, {}, fate)


def ledger(job: Work, fate: Fate, sha256: Mapping[str, str]) -> dict[str, LedgerEntry]:
    """Ledger entries of source tensors; `sha256` holds the hash of every output tensor of the part."""
    return {
        name: LedgerEntry.of(action, job.checkpoint.sha256(name), {output: sha256[output] for output in into})
        for name, (action, into) in fate.items()
    }


def config(job: Job) -> dict[str, Any]:
    """config.json of the artifact: the source's, plus how its weights are stored."""
    quantization = job.format.config(job.schemes, high_precision(job))
    if job.format.name == "compressed-tensors":
        cached, outside = job.stage.kv_cache is not None, [spec.name for spec in job.tables]
        quantization = quantization_config(job.schemes, high_precision(job), cached, outside, _embedding_is_packed(job))
        if not transformers_can_load(job):
            quantization = for_own_reader(quantization)
    return {**job.checkpoint.config, "quantization_config": quantization}


def transformers_can_load(job: Job) -> bool:
    """Whether compressed-tensors carries this: not Conv1D weights, nor fused experts with zero points or as floats.

    Where transformers decodes weights as it loads them, which it does for zero points and for fused experts, and must
    for embeddings, it takes one scheme for all, so those must not be mixed.
    """
    specs = [spec for spec in job.skeleton.linears() if spec.name in job.schemes]
    conv1d = any(spec.layout == "conv1d" for spec in specs)
    experts = [job.schemes[spec.name] for spec in specs if spec.expert is not None]
    zero_points = any(isinstance(scheme, IntScheme) and not scheme.symmetric for scheme in job.schemes.values())
    decoded = zero_points or _embedding_is_packed(job)
    if conv1d or len(set(experts)) > 1 or (decoded and len(set(job.schemes.values())) > 1):
        return False
    return all(isinstance(scheme, IntScheme) and scheme.symmetric for scheme in experts)


def _embedding_is_packed(job: Job) -> bool:
    return any(spec.weight == job.skeleton.embedding for spec in job.tables)


def high_precision(job: Job) -> Iterable[str]:
    """Names of the linears that keep their precision: ignored ones, routers, the head, projections around blocks."""
    inside = {
        name.removesuffix(".weight")
        for block in range(job.skeleton.num_blocks)
        for name in job.skeleton.block_tensors(block)
        if name.endswith(".weight") and len(job.checkpoint.index[name].shape) == 2
    }
    return (inside | set(job.skeleton.outer_linears())) - set(job.schemes)


def keep(job: Work, names: Iterable[str], tensors: dict[str, Tensor], fate: Fate) -> tuple[dict[str, Tensor], Fate]:
    """Adds tensors that go over as they are. WorkError where one is not finite."""
    for name in names:
        tensors[name] = read_finite(job.checkpoint, name)
        origin = job.checkpoint.origin(name)
        action: Action = "folded" if job.checkpoint.changes(name) else "kept"
        fate[origin] = (action, [*(fate[origin][1] if origin in fate else []), name])
    return tensors, fate
