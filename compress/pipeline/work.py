"""What every kind of stage works from: the recipe made concrete, the opened source, the calibration tokens, the output.

Each kind adds what it decides beforehand: job.py quantising, prune_job.py removing weights.
"""

from __future__ import annotations

import fnmatch
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.artifact import store
from compress.artifact.canonical import sha256_file
from compress.artifact.output import Identity
from compress.artifact.summary import recipe_summary
from compress.artifact.token_sketch import TokenSketch
from compress.calibration.tokens import CalibrationSet, draw
from compress.errors import UserError
from compress.models.checkpoint import Checkpoint
from compress.models.skeleton import LinearSpec, Skeleton
from compress.pipeline.inputs import compared_tokens
from compress.pipeline.zeros import recorded_as_pruned
from compress.recipe import Recipe
from compress.stages import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that forbids a run, and what to do about it."""

    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class Whole:
    """The run of several stages whose last one a work is: its recipe, and the name of the model that it begins with."""

    recipe: Recipe
    model_name: str


@dataclass(frozen=True, kw_only=True)
class Work(ABC):
    """Everything that any plan or run needs. Nothing is read from the weights yet."""

    recipe: Recipe
    stage: Stage
    checkpoint: Checkpoint
    skeleton: Skeleton
    output: Path | None
    """Where the artifact goes; None for the next version under the default directory."""
    reasons: dict[str, str]
    """Why linears stay as they are, by checkpoint name."""
    problems: list[Problem]
    """What forbids the run; a plan shows them, a run refuses."""
    decided: dict[str, Any] = field(default_factory=dict)
    """What the run settled from the whole model before the loop, as its kind of stage has it; empty until then."""
    whole: Whole | None = None
    """Of the last of several stages: what its artifact tells of and is known by."""
    learnt_from: CalibrationSet | None = None
    """What a run learns from where that is more than the recipe's text; None: that text."""

    @cached_property
    def sparse(self) -> frozenset[str]:
        """The linears that the source, one of our artifacts, records as pruned, however few zeros they have."""
        return recorded_as_pruned(self.checkpoint)

    @property
    @abstractmethod
    def label(self) -> str:
        """What is made of the weights in one word, such as `w4a16-g128`; part of the default directory's name."""

    @property
    @abstractmethod
    def needs_blocks(self) -> bool:
        """Whether blocks must be run at all."""

    @property
    @abstractmethod
    def needs_original(self) -> bool:
        """Whether the method also follows what the original model computes."""

    @property
    def follows_all(self) -> bool:
        """Whether it does so for all tokens, and not for a part that tells how far the two models drift apart."""
        return False

    @property
    def walked(self) -> Tensor | None:
        """The calibration tokens (samples, seq) that go through the blocks, one after the other; None where none do."""
        return None if self.calibration is None else self.calibration.tokens

    @property
    def follows_plain(self) -> bool:
        """Whether the first chunk is also followed through the model as changed but not repaired."""
        return False

    def followed(self, tokens: int) -> int:
        """How many of so many calibration tokens run through the original model too."""
        if not self.needs_original:
            return 0
        return tokens if self.follows_all else compared_tokens(tokens)

    @property
    def method_name(self) -> str:
        return self.stage.method.kind

    @property
    def model_name(self) -> str:
        return self.checkpoint.path.resolve().name

    @property
    def family_directory(self) -> Path:
        """Where versions go when no output was named."""
        if self.whole is None:
            return store.family_directory(self.model_name, self.method_name, self.label)
        method = recipe_summary(self.whole.recipe.placeless()).method
        return store.family_directory(self.whole.model_name, method, self.label)

    @property
    def told(self) -> Recipe:
        """The recipe that the artifact carries: of the whole run where this is the last of several stages."""
        return self.recipe if self.whole is None else self.whole.recipe

    def identity(self, *, hashed: bool = True) -> Identity:
        """What this run is a run of; reads and hashes the whole source, or leaves it open if not `hashed`."""
        calibration = self.calibration
        return Identity(
            recipe_hash=self.told.hash(),
            source=self.checkpoint.digest() if hashed else None,
            calibration=None if calibration is None else calibration.sha256,
            environment=environment(self.skeleton.dtype),
            files={file.name: sha256_file(file) for file in self.checkpoint.aux_files()} if hashed else None,
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.checkpoint)

    @cached_property
    def calibration(self) -> CalibrationSet | None:
        """The tokens the method learns from; None for data-free methods."""
        wanted = self.stage.calibration
        if wanted is None or self.learnt_from is not None:
            return self.learnt_from
        return draw(
            wanted.source,
            self.tokenizer,
            samples=wanted.samples,
            seq_len=wanted.seq_len,
            seed=self.recipe.seed,
            longest=self.skeleton.max_positions,
            vocabulary=self.skeleton.vocabulary,
        )

    @property
    def calibration_sketch(self) -> TokenSketch | None:
        """By which later scores find out whether their text was calibrated on."""
        return None if self.calibration is None else TokenSketch.of(self.calibration.tokens.numpy())

    def refuse_problems(self) -> None:
        """Raises UserError if anything forbids the run."""
        if self.problems:
            first, *rest = self.problems
            more = f" (and {len(rest)} more: `compress plan` lists them)" if rest else ""
            raise UserError(first.message + more, first.hint)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer in a model directory. UserError where there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)
    except Exception as error:  # the loader raises many kinds, all about the files in the directory
        cause = " ".join(str(error).split())[:200]
        raise UserError(
            f"{checkpoint.path} has no tokenizer that transformers can load: {cause}",
            "calibration needs the model's tokenizer files beside its weights",
        ) from error
    return found


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


def ignored(patterns: Sequence[str], specs: Sequence[LinearSpec]) -> tuple[dict[str, str], list[Problem]]:
    """Why the linears stay that one of the patterns means, and a problem for every pattern that means none."""
    reasons: dict[str, str] = {}
    problems: list[Problem] = []
    for pattern in patterns:
        hit = [spec.name for spec in specs if matches(pattern, spec.name)]
        if not hit and pattern != "lm_head":
            names = f"names look like {specs[0].name}; give one, a glob, or re: and a regular expression"
            problems.append(Problem(f"ignore pattern {pattern!r} matches no linear", names))
        reasons.update(dict.fromkeys(hit, f"ignored by {pattern!r}"))
    return reasons, problems


def matches(pattern: str, name: str) -> bool:
    """Whether an ignore pattern (exact name, glob, or `re:` and a regular expression) means this linear."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error as error:
            raise UserError(f"ignore pattern {pattern!r} is no regular expression: {error}", "correct it") from None
    return name == pattern or fnmatch.fnmatchcase(name, pattern)
