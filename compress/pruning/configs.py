"""Settings of every pruning method, free of torch so that recipes parse and help answers at once.

`PruningConfig` is the registry: the tagged union parses recipes, lists choices in errors and types the dispatch.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    summary: ClassVar[str]
    paper: ClassVar[str]
    calibrated: ClassVar[bool]
    structured: ClassVar[bool] = False
    """Whether whole neurons and heads go (an amount `keep`), not single weights (`sparsity` or `pattern`)."""


class MagnitudeConfig(_Config):
    """The smallest weights of each matrix go: data-free, the baseline every other method must beat."""

    kind: Literal["magnitude"] = "magnitude"

    summary: ClassVar[str] = "smallest weights go; data-free, seconds"
    paper: ClassVar[str] = "arXiv:1506.02626"
    calibrated: ClassVar[bool] = False


Norms = Literal["block", "linear", "model"]
_NORMS: Norms = Field(
    default="block",
    description="input norms of all linears of a block before any of it is pruned (block), of each behind the "
    "pruned ones before it (linear), or in the model before any of it is pruned (model), which `--stats` can keep",
)


class WandaConfig(_Config):
    """Weights times the norm of their inputs, compared within each output row; no weight is updated."""

    kind: Literal["wanda"] = "wanda"
    scope: Literal["row", "matrix"] = Field(
        default="row", description="among which weights scores are compared where there is no pattern"
    )
    norms: Norms = _NORMS
    exponent: float = Field(
        default=1.0, ge=0.0, le=2.0, description="power of the input norm (0: magnitude, compared as `scope` says)"
    )

    summary: ClassVar[str] = "smallest weight times input norm goes, row by row; no update of what stays"
    paper: ClassVar[str] = "arXiv:2306.11695"
    calibrated: ClassVar[bool] = True


class RiaConfig(_Config):
    """Relative importance of a weight in its row and column, times a power of the norm of its inputs."""

    kind: Literal["ria"] = "ria"
    exponent: float = Field(0.5, ge=0.0, le=2.0, description="power of the input norm")
    norms: Norms = _NORMS

    summary: ClassVar[str] = "weights relative to their row and column, times input norm; no update of what stays"
    paper: ClassVar[str] = "arXiv:2310.06694"
    calibrated: ClassVar[bool] = True


class SparseGptConfig(_Config):
    """SparseGPT with correction of earlier layers' error and an exact refit of the weights that stay."""

    kind: Literal["sparsegpt"] = "sparsegpt"
    damp_frac: float = Field(0.01, ge=0.0, lt=1.0, description="damping as a share of the mean Hessian diagonal")
    act_order: bool = Field(
        False, description="visit columns by falling Hessian diagonal (unstructured only; patterns keep their order)"
    )
    refit_steps: int = Field(
        30, ge=0, le=1000, description="steps of the least-squares refit of what stays (0: plain SparseGPT)"
    )
    correction: float = Field(
        1.0, ge=0.0, le=1.0, description="share of the error of earlier layers that each layer is asked to undo"
    )

    moments: Literal["linear", "model"] = Field(
        default="linear",
        description="of each linear's inputs behind the pruned ones before it (linear), or in the model before any of "
        "it is pruned (model), which `--stats` can keep; then no error of earlier layers is undone",
    )

    summary: ClassVar[str] = "removes by the inverse Hessian and refits what stays; best quality at equal sparsity"
    paper: ClassVar[str] = "arXiv:2301.00774"
    calibrated: ClassVar[bool] = True


class WidthConfig(_Config):
    """Whole neurons and query heads go, as many in every block, and closed-form least squares repairs what they fed."""

    kind: Literal["width"] = "width"
    importance: Literal["repair", "activation", "feature", "taylor", "logits"] = Field(
        "repair",
        description="by what neurons and heads stay: what their loss costs after repair; the norm of what they put out "
        "(activation, Minitron); that in the directions in which outputs vary most (feature, SlimLLM); first order in "
        "the loss of the next token (taylor) or in the highest logit (logits, NIRVANA)",
    )
    repair: bool = Field(True, description="least-squares repair of the linears that lose inputs")
    heads: float = Field(
        1.0, gt=0.0, le=1.0, description="share of the query heads of every KV group that stays; neurons give the rest"
    )
    hidden: float = Field(
        1.0, gt=0.0, le=1.0, description="share of the channels of the stream between the blocks that stays"
    )
    multiple: int = Field(8, ge=1, le=1024, description="the neurons and channels that stay are a multiple of it")
    damp_frac: float = Field(0.01, ge=0.0, lt=1.0, description="ridge as a share of the mean Hessian diagonal")
    correction: float = Field(
        1.0,
        ge=0.0,
        le=1.0,
        description="share of the error of earlier layers that a repair is asked to undo: of what a linear reads, and "
        "of the stream that it adds to",
    )
    measured: Literal["block", "model"] = Field(
        default="block",
        description="what linears read that lose inputs: behind the blocks as cut so far (block), or in the model "
        "before any of it is cut (model), which `--stats` can keep; then no error of earlier layers is undone",
    )

    summary: ClassVar[str] = "neurons and heads go, the same in every block, repaired in closed form; really smaller"
    paper: ClassVar[str] = "arXiv:2407.14679, arXiv:2312.11983"
    calibrated: ClassVar[bool] = True
    structured: ClassVar[bool] = True

    @model_validator(mode="after")
    def _channels_go_behind_what_is_cut(self) -> WidthConfig:
        if self.measured == "model" and self.hidden < 1:
            raise ValueError(
                "measured: model is for neurons and heads: where channels go, norms are mended behind the blocks as cut"
            )
        return self

    @property
    def first_order(self) -> bool:
        """Whether gradients say what stays."""
        return self.importance in ("taylor", "logits")

    @property
    def act_order(self) -> bool:
        """Nothing is visited in an order here."""
        return False


class DepthConfig(_Config):
    """Whole decoder blocks go: those that change the hidden states least, or greedily those that cost least."""

    kind: Literal["depth"] = "depth"
    choose: Literal["loss", "influence"] = Field(
        "loss",
        description="loss: one block at a time, that whose removal moves the output distribution least; "
        "influence: at once, those whose outputs are nearest to their inputs in angle",
    )
    protect_first: int = Field(1, ge=0, description="blocks at the beginning that always stay")
    protect_last: int = Field(1, ge=0, description="blocks at the end that always stay")

    summary: ClassVar[str] = "whole decoder blocks go, by what their removal costs; really smaller and faster"
    paper: ClassVar[str] = "arXiv:2403.03853, arXiv:2402.09025"
    calibrated: ClassVar[bool] = True
    structured: ClassVar[bool] = True


class ExpertsConfig(_Config):
    """Whole experts go, as many from every mixture: those that add least, or those that others can stand in for."""

    kind: Literal["experts"] = "experts"
    choose: Literal["error", "saliency", "clusters"] = Field(
        "error",
        description="error: those go without which the output changes least, their tokens sent to the others; "
        "saliency: those whose outputs, times router weight, are smallest on their tokens (REAP); "
        "clusters: experts with near router rows are clustered, and one of each cluster stays (STUN)",
    )

    measured: Literal["block", "model"] = Field(
        default="block",
        description="what experts add, in the model as cut so far (block) or before any of it is cut (model), which "
        "`--stats` can keep",
    )

    summary: ClassVar[str] = "whole experts go, the same number from every mixture; really smaller"
    paper: ClassVar[str] = "arXiv:2510.13999, arXiv:2409.06211"
    calibrated: ClassVar[bool] = True
    structured: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _what_is_kept_is_saliency(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("measured") == "model":
            return {"choose": "saliency", **given}
        return given

    @model_validator(mode="after")
    def _errors_are_of_what_is_cut(self) -> ExpertsConfig:
        if self.measured == "model" and self.choose == "error":
            raise ValueError(
                "measured: model keeps what experts add, and choose: error goes by what is lost without them"
            )
        return self


def from_model(method: _Config) -> bool:
    """Whether a method that makes zeros reads statistics of the model before any of it is pruned."""
    if isinstance(method, SparseGptConfig):
        return method.moments == "model"
    return isinstance(method, WandaConfig | RiaConfig) and method.norms == "model"


MaskConfig = MagnitudeConfig | WandaConfig | RiaConfig | SparseGptConfig
PruningConfig = Annotated[MaskConfig | WidthConfig | DepthConfig | ExpertsConfig, Field(discriminator="kind")]

PRUNING: dict[str, type[_Config]] = {c.model_fields["kind"].default: c for c in get_args(get_args(PruningConfig)[0])}
PRUNING_NAMES: tuple[str, ...] = tuple(PRUNING)


def keeps_statistics(method: _Config) -> bool:
    """Whether what a method measures is of the whole model, so that `stats` can keep it for other amounts."""
    if isinstance(method, WidthConfig):
        return method.first_order or method.hidden < 1 or method.measured == "model"
    if isinstance(method, ExpertsConfig):
        return method.measured == "model"
    return isinstance(method, DepthConfig) or from_model(method)
