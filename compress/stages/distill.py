"""The stage that distils: a loss, a teacher, a text, and how long."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StrictInt, StrictStr, model_validator

from compress.distillation.configs import ForwardKlConfig, LossConfig
from compress.quantization.configs import short_form
from compress.recipe_sections import Section
from compress.stages.shared import switch

DEFAULT_MINUTES = 8.0


class AnswersConfig(Section):
    """How the teacher answers prompts: up to so many tokens each, drawn at this temperature (0: the likeliest).

    prompt_tokens: what is left of a longer prompt; left out, prompts are not cut.
    """

    max_tokens: StrictInt = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=100.0)
    prompt_tokens: StrictInt | None = Field(default=None, ge=2)


class DistillText(Section):
    """Which text the student learns on: `samples` windows of `seq_len` tokens of `source`, all it has if left out.

    `held_out` of them are only measured on. `source` is as in CalibrationConfig. With `answers` its lines or rows are
    prompts: the teacher answers them first, and its answers are what the student learns.
    """

    source: StrictStr = Field(default="tales", min_length=1)
    samples: StrictInt | None = Field(default=None, ge=4)
    seq_len: StrictInt = Field(default=256, ge=2)
    held_out: StrictInt = Field(default=16, ge=2)
    answers: Annotated[AnswersConfig | None, BeforeValidator(switch)] = None


class DistillStage(Section):
    """A student learns from a teacher: the source of the stage from the model at `teacher`.

    teacher: left out, the model that a run of several stages begins with, else the packaged model. minutes, or steps:
    how long; a run by minutes measures at its start how many steps they are, and its resolved recipe holds both.
    lora_rank: 0 trains all weights. learning_rate: left out, what suits adapters or all weights. batch_size: windows.
    cache: a directory where what the teacher says is kept, for the losses `topk-kl` and `sampled-kl`.
    """

    kind: Literal["distill"] = "distill"
    method: Annotated[LossConfig, BeforeValidator(short_form)] = Field(
        default_factory=lambda: ForwardKlConfig.model_validate({})
    )
    teacher: StrictStr | None = None
    minutes: float | None = Field(default=None, gt=0.0, le=100_000.0)
    steps: StrictInt | None = Field(default=None, ge=1)
    lora_rank: StrictInt = Field(default=16, ge=0, le=4096)
    learning_rate: float | None = Field(default=None, gt=0.0, le=1.0)
    batch_size: StrictInt = Field(default=8, ge=2, multiple_of=2)
    patience: StrictInt = Field(default=5, ge=1)
    cache: StrictStr | None = Field(default=None, min_length=1)
    calibration: DistillText = DistillText()

    @model_validator(mode="after")
    def _cache_of_a_few_tokens(self) -> DistillStage:
        if self.cache is not None and not self.method.cached:
            raise ValueError(f"a cache holds a few tokens at each place, which {self.method.kind} is not content with")
        return self

    @model_validator(mode="after")
    def _some_time(self) -> DistillStage:
        if self.method.own_text and (self.steps is None or self.minutes is not None):
            raise ValueError(
                f"{self.method.kind} needs `steps`, and no `minutes`: how long one takes is not known before"
            )
        if self.minutes is None and self.steps is None:
            object.__setattr__(self, "minutes", DEFAULT_MINUTES)
        return self
