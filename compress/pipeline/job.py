"""A recipe made concrete: the opened source, every linear with its scheme, the calibration tokens, the output."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compress import content
from compress.artifact import store
from compress.artifact.canonical import sha256_file
from compress.artifact.output import Identity
from compress.artifact.verify import verify
from compress.calibration.tokens import CalibrationSet, draw, packaged
from compress.errors import IntegrityError, UserError
from compress.models.checkpoint import Checkpoint
from compress.models.hub import local_directory
from compress.models.skeleton import LinearSpec, Skeleton
from compress.quantization.configs import GptqConfig, MethodConfig, SmoothQuantConfig
from compress.recipe import QuantizeStage, Recipe
from compress.types import FP8_TILE, Fp8Scheme, IntScheme, Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NARROWEST_GROUP = 8


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that forbids a run, and what to do about it."""

    message: str
    hint: str


@dataclass(frozen=True)
class Job:
    """Everything a plan or a run needs. Nothing is read from the weights yet."""

    recipe: Recipe
    stage: QuantizeStage
    checkpoint: Checkpoint
    skeleton: Skeleton
    output: Path | None
    """Where the artifact goes; None for the next version under the default directory."""
    schemes: dict[str, Scheme]
    """Scheme of every linear that will be quantised, by checkpoint name."""
    reasons: dict[str, str]
    """Why each of the other linears stays as it is."""
    problems: list[Problem] = field(default_factory=list)
    """What forbids the run; a plan shows them, a run refuses."""

    @property
    def scheme(self) -> Scheme:
        return self.stage.scheme.to_scheme()

    def integers(self, spec: LinearSpec) -> IntScheme:
        """The scheme of a linear under a method that knows integer grids alone; recipes refuse others."""
        scheme = self.schemes[spec.name]
        assert isinstance(scheme, IntScheme)
        return scheme

    @property
    def method_name(self) -> str:
        return self.stage.method.kind

    @property
    def model_name(self) -> str:
        return self.checkpoint.path.resolve().name

    @property
    def family_directory(self) -> Path:
        """Where versions go when no output was named."""
        return store.family_directory(self.model_name, self.method_name, self.scheme.label)

    def identity(self, *, hashed: bool = True) -> Identity:
        """What this run is a run of; reads and hashes the whole source, or leaves it open if not `hashed`."""
        calibration = self.calibration
        return Identity(
            recipe_hash=self.recipe.hash(),
            source=self.checkpoint.digest() if hashed else None,
            calibration=None if calibration is None else calibration.sha256,
            environment=environment(self.skeleton.dtype),
            files={file.name: sha256_file(file) for file in self.checkpoint.aux_files()} if hashed else None,
        )

    def scale_dtype(self, spec: LinearSpec) -> torch.dtype:
        """Scales are stored in the dtype of the weight they replace, which is what engines read."""
        return self.checkpoint.index[spec.weight].dtype

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        try:
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.checkpoint.path, local_files_only=True)
        except Exception as error:  # the loader raises many kinds, all about the files in the directory
            cause = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.checkpoint.path} has no tokenizer that transformers can load: {cause}",
                "calibration needs the model's tokenizer files beside its weights",
            ) from error
        return found

    @cached_property
    def calibration(self) -> CalibrationSet | None:
        """The tokens the method learns from; None for data-free methods."""
        wanted = self.stage.calibration
        if wanted is None:
            return None
        return draw(
            wanted.source,
            self.tokenizer,
            samples=wanted.samples,
            seq_len=wanted.seq_len,
            seed=self.recipe.seed,
            longest=self.skeleton.max_positions,
            vocabulary=self.skeleton.vocabulary,
        )

    def refuse_problems(self) -> None:
        """Raises UserError if anything forbids the run."""
        if self.problems:
            first, *rest = self.problems
            more = f" (and {len(rest)} more: `compress plan` lists them)" if rest else ""
            raise UserError(first.message + more, first.hint)


def resolve(recipe: Recipe, *, model: str | Path | None, output: str | Path | None, device: str) -> Job:
    """Opens the source and lays out the work.

    Raises:
        UserError: no such model, an unsupported or already quantised one, an unusable device.
        IntegrityError: damaged weights, also those of an artifact whose hashes do not match.
    """
    if device not in ("auto", "cpu"):
        raise UserError(
            f"the block loop runs on the CPU; --device {device} cannot be used here", "use --device auto or cpu"
        )
    if len(recipe.stages) != 1:
        raise UserError(
            f"the recipe has {len(recipe.stages)} stages, and a quantised model cannot be quantised again",
            "keep one stage per recipe",
        )
    stage = recipe.stages[0]
    source = model or recipe.model or content.default_model()
    checkpoint = Checkpoint.open(local_directory(source))
    if checkpoint.is_artifact:
        _refuse_damaged(checkpoint)
    skeleton = Skeleton(checkpoint, compute_dtype(checkpoint))
    schemes, reasons, problems = _assign(stage, skeleton)
    where = None if output is None else Path(output)
    recipe = _anchored(recipe, source)
    return Job(recipe, recipe.stages[0], checkpoint, skeleton, where, schemes, reasons, problems)


def _anchored(recipe: Recipe, source: str | Path) -> Recipe:
    """The recipe with the source that is used, and with paths that hold from any working directory.

    The packaged model is what a recipe without a `model` means; hub ids and packaged texts keep their names.
    """
    directory = Path(source).expanduser()
    model: str | None = str(source)
    if directory.is_dir():
        model = None if directory.samefile(content.default_model()) else str(directory.resolve())
    return recipe.model_copy(update={"model": model, "stages": [_stage_anchored(stage) for stage in recipe.stages]})


def _stage_anchored(stage: QuantizeStage) -> QuantizeStage:
    if stage.calibration is None:
        return stage
    text = Path(stage.calibration.source)
    if packaged(stage.calibration.source) or not text.is_file():  # what is not there is refused when it is read
        return stage
    calibration = stage.calibration.model_copy(update={"source": str(text.resolve())})
    return stage.model_copy(update={"calibration": calibration})


def compute_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What blocks compute in: bfloat16 where the weights are and the processor has the instructions, else float32."""
    weights = {info.dtype for info in checkpoint.index.values() if info.dtype.is_floating_point}
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if weights == {torch.bfloat16} and native else torch.float32


def environment(dtype: torch.dtype) -> dict[str, str]:
    """Everything besides recipe, source and calibration that can change a byte of the result."""
    import transformers

    import compress
    from compress.kernels import dispatch

    return {
        "compress": compress.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": "cpu",
        "compute_dtype": str(dtype).removeprefix("torch."),
        "kernels": dispatch.choose("gptq_quantize", "cpu").name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def needs_original(stage: QuantizeStage) -> bool:
    """Whether the method also follows what the original model computes."""
    method = rounding_of(stage)
    return isinstance(method, GptqConfig) and method.correction > 0


def rounding_of(stage: QuantizeStage) -> MethodConfig:
    """The method that finds the codes in the end."""
    return stage.method.rounding if isinstance(stage.method, SmoothQuantConfig) else stage.method


def needs_blocks(stage: QuantizeStage) -> bool:
    """Whether blocks must be run at all."""
    return stage.calibration is not None


def nearest_group_size(widths: Sequence[int], wanted: int) -> int | None:
    """The divisor of all widths nearest to `wanted`, among those wide enough to be worth their scales."""
    common = math.gcd(*widths) if widths else 0
    divisors = [d for d in range(NARROWEST_GROUP, common + 1) if common % d == 0]
    return min(divisors, key=lambda d: (abs(math.log(d / wanted)), d), default=None)


def _assign(stage: QuantizeStage, skeleton: Skeleton) -> tuple[dict[str, Scheme], dict[str, str], list[Problem]]:
    """The scheme of every linear that gets one, the reason of every other, and what forbids the run."""
    scheme = stage.scheme.to_scheme()
    specs = skeleton.linears()
    if not specs:
        raise UserError("the model has no linear in any decoder block", "check num_hidden_layers in its config.json")
    reasons: dict[str, str] = {}
    problems: list[Problem] = []
    for pattern in stage.ignore:
        hit = [spec.name for spec in specs if matches(pattern, spec.name)]
        if not hit and pattern != "lm_head":
            names = f"names look like {specs[0].name}; give one, a glob, or re: and a regular expression"
            problems.append(Problem(f"ignore pattern {pattern!r} matches no linear", names))
        reasons.update(dict.fromkeys(hit, f"ignored by {pattern!r}"))
    wanted = [spec for spec in specs if spec.name not in reasons]
    problems += _misfits(scheme, wanted)
    for block in range(skeleton.num_blocks):
        for group in skeleton.fusion_groups(block):
            kept = [name for name in group if name in reasons]
            if kept and len(kept) < len(group):
                other = next(name for name in group if name not in reasons)
                said = f"{kept[0]} is ignored but {other} is not: engines load them as one matrix"
                problems.append(Problem(said, f"ignore all of {', '.join(group)}, or none"))
    if not wanted:
        problems.append(Problem("every linear is ignored: nothing is left to quantise", "ignore fewer linears"))
    return {spec.name: scheme for spec in wanted}, reasons, problems


def _misfits(scheme: Scheme, wanted: Sequence[LinearSpec]) -> list[Problem]:
    """One problem for every width that the group size does not divide, and one for experts whose inputs are rounded."""
    problems = []
    experts = [spec for spec in wanted if spec.expert is not None]
    if experts and scheme.inputs is not None:
        said = f"{scheme.name} rounds the inputs of {experts[0].name}, which fused experts have no place for"
        problems.append(Problem(said, "use a weight-only scheme, or leave them out with --ignore '*.experts.*'"))
    nearest = nearest_group_size(sorted({spec.in_features for spec in wanted}), scheme.group_size or 1)
    hint = "use --group-size channel, or leave those linears out with --ignore"
    if nearest is not None:
        hint = f"use --group-size {nearest} (the nearest that divides every width), or --group-size channel"
    shared = f"group size {scheme.group_size}"
    if isinstance(scheme, Fp8Scheme):
        shared = f"the tile of {scheme.name}, {FP8_TILE},"
        hint = "use FP8_DYNAMIC, or leave those linears out with --ignore"
    misfits = [spec for spec in wanted if not scheme.fits(spec.in_features)]
    for width in sorted({spec.in_features for spec in misfits}):
        names = [spec.name for spec in misfits if spec.in_features == width]
        others = f" and {len(names) - 1} others" if len(names) > 1 else ""
        said = f"{shared} does not divide the width {width} of {names[0]}{others}"
        problems.append(Problem(said, hint))
    return problems


def matches(pattern: str, name: str) -> bool:
    """Whether an ignore pattern (exact name, glob, or `re:` and a regular expression) means this linear."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error as error:
            raise UserError(f"ignore pattern {pattern!r} is no regular expression: {error}", "correct it") from None
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def _refuse_damaged(checkpoint: Checkpoint) -> None:
    problems = verify(checkpoint.path).problems
    if problems:
        raise IntegrityError(
            f"{checkpoint.path} is a damaged artifact: {problems[0]}", "run `compress verify` on it, or make it again"
        )
