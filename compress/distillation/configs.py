"""Settings of every loss that a student can learn by, free of torch so that recipes parse and help answers at once.

`LossConfig` is the registry: the tagged union parses recipes, lists choices in errors and types the dispatch.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    summary: ClassVar[str]
    paper: ClassVar[str]
    calibrated: ClassVar[bool] = True
    taught: ClassVar[bool] = True
    """Whether the loss looks at the teacher's logits at all."""
    cached: ClassVar[bool] = False
    """Whether a few tokens of the teacher at every place are all that the loss looks at, so that a cache holds them."""
    own_text: ClassVar[bool] = False
    """Whether the student writes the text that it learns on, so that the loss is not one of a given text."""


class _Tempered(_Config):
    temperature: float = Field(
        1.0,
        gt=0.0,
        le=100.0,
        description="both distributions are flattened by it; the loss is multiplied by its square",
    )


class ForwardKlConfig(_Tempered):
    """KL(teacher || student): the student covers all that the teacher finds likely."""

    kind: Literal["forward-kl"] = "forward-kl"

    summary: ClassVar[str] = "KL(teacher || student); what evaluation measures, the default"
    paper: ClassVar[str] = "arXiv:1503.02531"


class ReverseKlConfig(_Tempered):
    """KL(student || teacher): the student keeps to what the teacher finds likely."""

    kind: Literal["reverse-kl"] = "reverse-kl"

    summary: ClassVar[str] = "KL(student || teacher); keeps to the teacher's modes"
    paper: ClassVar[str] = "arXiv:2306.08543"


class JsdConfig(_Tempered):
    """Generalised Jensen-Shannon divergence: from forward KL (beta near 0) to reverse KL (near 1)."""

    kind: Literal["jsd"] = "jsd"
    beta: float = Field(0.5, gt=0.0, lt=1.0, description="share of the teacher in the mixture that both are held to")

    summary: ClassVar[str] = "generalised Jensen-Shannon divergence; bounded, between the two KLs"
    paper: ClassVar[str] = "arXiv:2306.13649"


class SkewKlConfig(_Tempered):
    """KL(teacher || alpha teacher + (1 - alpha) student): bounded gradients where the student gives almost nothing."""

    kind: Literal["skew-kl"] = "skew-kl"
    alpha: float = Field(0.1, ge=0.0, lt=1.0, description="share of the teacher mixed into the student")

    summary: ClassVar[str] = "KL to the student with some teacher mixed in; steadier far from the teacher"
    paper: ClassVar[str] = "arXiv:2402.03898"


class TopKConfig(_Config):
    """Forward KL over the teacher's `k` most likely tokens and one bucket that holds all others."""

    kind: Literal["topk-kl"] = "topk-kl"
    k: int = Field(64, ge=1, le=100_000, description="tokens that are looked at one by one")

    cached: ClassVar[bool] = True
    summary: ClassVar[str] = "forward KL over the teacher's top tokens and one bucket for the rest"
    paper: ClassVar[str] = "arXiv:2503.16870"


class SampledKlConfig(_Config):
    """Forward KL estimated from `draws` tokens that are drawn from the teacher at every place, once and for all."""

    kind: Literal["sampled-kl"] = "sampled-kl"
    draws: int = Field(10, ge=1, le=10_000, description="tokens drawn at every place, with replacement")

    cached: ClassVar[bool] = True
    summary: ClassVar[str] = "forward KL from tokens drawn from the teacher: unbiased, in as few bytes as topk-kl"
    paper: ClassVar[str] = "arXiv:2503.16870"


class HiddenConfig(_Tempered):
    """Forward KL, and how far the student's hidden states, through a learned projection, are from the teacher's.

    A student block answers to the teacher's at the same share of the depth. mse is relative to the teacher's states.
    """

    kind: Literal["hidden"] = "hidden"
    distance: Literal["cosine", "mse"] = Field("cosine", description="how far two states are apart")
    weight: float = Field(1.0, gt=0.0, le=1e6, description="of the mean distance beside the KL")
    layers: Literal["last", "all"] = Field(
        "all", description="behind which of the student's blocks states are compared"
    )

    summary: ClassVar[str] = "forward KL and the distance of hidden states through a learned projection"
    paper: ClassVar[str] = "arXiv:1910.01108, arXiv:1909.10351"


class OnPolicyConfig(_Config):
    """Generalised JSD on what the student writes itself: it continues how windows of the text begin (trl does it)."""

    kind: Literal["on-policy"] = "on-policy"
    beta: float = Field(1.0, ge=0.0, le=1.0, description="0 is the forward KL, 1 the reverse KL")
    temperature: float = Field(1.0, gt=0.0, le=100.0, description="of what the student writes, and of the loss")
    prompt_tokens: int = Field(16, ge=1, le=100_000, description="tokens of a window that the student continues")
    max_tokens: int = Field(32, ge=1, le=100_000, description="tokens that it writes at most")

    own_text: ClassVar[bool] = True
    summary: ClassVar[str] = "divergence on text that the student writes itself, by trl; needs --steps"
    paper: ClassVar[str] = "arXiv:2306.13649"


class CrossEntropyConfig(_Config):
    """The text's own next token, as in ordinary fine-tuning; the teacher only says how far away the student is."""

    kind: Literal["ce"] = "ce"

    summary: ClassVar[str] = "the text's own next token (plain fine-tuning); the baseline for the others"
    paper: ClassVar[str] = "-"
    taught: ClassVar[bool] = False


LossConfig = Annotated[
    ForwardKlConfig
    | ReverseKlConfig
    | JsdConfig
    | SkewKlConfig
    | TopKConfig
    | SampledKlConfig
    | HiddenConfig
    | OnPolicyConfig
    | CrossEntropyConfig,
    Field(discriminator="kind"),
]

LOSSES: dict[str, type[_Config]] = {c.model_fields["kind"].default: c for c in get_args(get_args(LossConfig)[0])}
LOSS_NAMES: tuple[str, ...] = tuple(LOSSES)
