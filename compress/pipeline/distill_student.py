"""The student while it learns: what it computes with, the float32 masters behind that, and what is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.distillation import adapters
from compress.errors import IntegrityError, UserError
from compress.models.meta import split_experts
from compress.models.quiet import quiet
from compress.pipeline.distill_job import DistillJob
from compress.pipeline.packed_student import Packed, Recorded
from compress.pipeline.source import read_finite
from compress.pruning.masks import zero_mask


@dataclass
class Student:
    """model: in the compute dtype. parameters, masters: what is trained, by a name; masters are float32.

    kept: where a trained weight may change, for those that were pruned. linears: of adapters, by checkpoint name.
    rounded: of a quantised student that learns whole, the grids on which its weights are computed with, by name.
    """

    model: Any
    parameters: dict[str, nn.Parameter]
    masters: dict[str, Tensor]
    kept: dict[str, Tensor] = field(default_factory=dict)
    linears: dict[str, Any] = field(default_factory=dict)
    rounded: dict[str, Recorded] = field(default_factory=dict)

    def use_masters(self) -> None:
        """Lets the model compute with the masters as they are now."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if name in self.rounded:
                    parameter.copy_(self.rounded[name].dense(self.masters[name]))
                elif parameter.data_ptr() != self.masters[name].data_ptr():
                    parameter.copy_(self.masters[name])


def load_plain(path: Path, dtype: torch.dtype) -> Any:
    """A model directory as transformers loads it, every key accounted for.

    Raises:
        UserError: transformers cannot load it; IntegrityError: it lacks tensors, or has others.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, output_loading_info=True, local_files_only=True, trust_remote_code=False
            )
            if hasattr(loaded[0].config, "quantization_config"):  # packed weights are decoded by the first call
                with torch.no_grad():
                    loaded[0](input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    except MemoryError:
        raise
    except Exception as error:  # transformers and what it calls raise many kinds, all about the directory
        raise UserError(
            f"transformers cannot load {path}: {' '.join(str(error).split())[:200]}",
            "give a model directory that AutoModelForCausalLM.from_pretrained loads",
        ) from error
    model, info = loaded
    strays = sorted(str(name) for names in info.values() for name in names)
    if strays:
        raise IntegrityError(
            f"{path} does not fit its config.json: {strays[0]} is missing, left over, or of another shape",
            "its weights and its config.json do not belong together: fetch or make it again",
        )
    return model


def open_student(job: DistillJob) -> Student:
    """The student before its first step. UserError where adapters are wanted and peft is missing."""
    for name in job.checkpoint.index:
        read_finite(job.checkpoint, name)
    model = load_student(job)
    model.eval()  # gradients flow all the same, and no dropout makes a step depend on what ran before it
    return _adapted(job, model) if job.stage.lora_rank else _whole(job, model)


def load_student(job: DistillJob) -> Any:
    """The student as transformers runs it; a quantised one on the dense weights that its codes stand for.

    Fused experts become one linear each, as the checkpoint has them: adapters, masks and grids are of linears.
    """
    if not job.recorded:
        model = load_plain(job.checkpoint.path, job.compute_dtype)
        _fill(job, model, tuple(f"{path}." for path in split_experts(model, job.skeleton.family)))
        return model
    from transformers import AutoModelForCausalLM

    with quiet(), torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(job.skeleton.config, dtype=job.skeleton.dtype)
    split_experts(model, job.skeleton.family)
    _fill(job, model, ("",))
    return model


@torch.no_grad()
def _fill(job: DistillJob, model: Any, prefixes: tuple[str, ...]) -> None:
    """Gives the parameters under these prefixes the checkpoint's values."""
    for live, parameter in model.named_parameters():
        if live.startswith(prefixes):
            parameter.copy_(job.checkpoint.read(job.skeleton.stored_name(live)))


def _whole(job: DistillJob, model: Any) -> Student:
    student = Student(model, {}, {})
    sparse = {f"{name}.weight" for name in job.may_be_sparse}
    student.rounded = {f"{name}.weight": recorded for name, recorded in job.recorded.items()}
    for live, parameter in model.named_parameters():
        name = job.skeleton.stored_name(live)
        stored = job.checkpoint.read(name)
        master = stored.float().clone()
        if parameter.dtype == torch.float32 and name not in student.rounded:
            parameter.data = master
        parameter.requires_grad_(True)
        student.parameters[name], student.masters[name] = parameter, master
        if name in sparse and (kept := _kept(job, name, stored)) is not None:
            student.kept[name] = kept
    return student


def _adapted(job: DistillJob, model: Any) -> Student:
    rank = job.stage.lora_rank
    wanted = {spec.name: spec for spec in job.skeleton.linears()}
    live = {
        name: job.skeleton.stored_name(f"{name}.weight").removesuffix(".weight") for name, _ in model.named_modules()
    }
    targets = [name for name, disk in live.items() if disk in wanted]
    adapters.add(model, rank, 2 * rank, targets, job.recipe.seed)
    student = Student(model, {}, {})
    for name, layer in adapters.layers(model).items():
        disk = live[name]
        student.linears[disk] = layer
        weight = wanted[disk].weight
        kept = _kept(job, weight, job.checkpoint.read(weight)) if disk in job.may_be_sparse else None
        if kept is not None:
            student.kept[f"{disk}.weight"] = kept
            adapters.mask(layer, kept)
        if disk in job.recorded:
            adapters.rounded(layer, job.recorded[disk].dense)
        for part, factors in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            parameter = factors[adapters.ADAPTER].weight
            master = parameter.detach().float().clone()
            if parameter.dtype == torch.float32:
                parameter.data = master
            student.parameters[f"{disk}.{part}"], student.masters[f"{disk}.{part}"] = parameter, master
    return student


def _kept(job: DistillJob, name: str, weight: Tensor) -> Tensor | None:
    """Where a pruned weight is not zero; None where it was not pruned."""
    zeros = zero_mask(weight, name.removesuffix(".weight") in job.sparse)
    return None if zeros is None else ~zeros


@dataclass(frozen=True)
class Written:
    """What training made. dense: the trained weights by name, as they will be read; stored: as they lie on disk.

    into: of each packed weight, the names of all that stores it.
    """

    dense: dict[str, Tensor]
    stored: dict[str, Tensor]
    into: dict[str, list[str]]


def written(job: DistillJob, student: Student, masters: dict[str, Tensor]) -> Written:
    """The trained tensors: merged in float32, cast once, or to codes. IntegrityError where a zero was lost."""
    if student.linears:
        sources = {name: job.checkpoint.read(f"{name}.weight") for name in student.linears}
        factors = {name: (masters[f"{name}.lora_A"], masters[f"{name}.lora_B"]) for name in student.linears}
        merged = adapters.merged(student.linears, sources, factors)
        tensors = {f"{name}.weight": weight for name, weight in merged.items()}
    else:
        tensors = masters
    dense: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}
    into: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        linear = name.removesuffix(".weight")
        dtype = job.checkpoint.index[name].dtype
        if (recorded := job.recorded.get(linear)) is None:
            dense[name] = stored[name] = tensor.to(dtype).contiguous()
            continue
        dense[name] = recorded.dense(tensor).to(dtype)
        parts = {f"{linear}.{part}": value for part, value in recorded.packed(tensor).items()}
        stored |= parts
        into[name] = list(parts)
    if isinstance(job.checkpoint, Packed):
        for linear in sorted(job.recorded.keys() - {name.removesuffix(".weight") for name in tensors}):
            parts = job.checkpoint.stored(linear)  # what learned nothing, such as a packed embedding under adapters
            stored |= parts
            into[f"{linear}.weight"] = list(parts)
    for name, kept in student.kept.items():
        if dense[name][~kept].any():
            raise IntegrityError(f"training filled zeros of {name}", "nothing was published; please report this")
    return Written(dense, stored, into)
