"""The parts of `eval.json`: which model, which data, where it ran, what each text, task and prompt gave. Free of torch.

Parts hold sums per cluster and columns per item, not only means, so that two records can be compared in pairs.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from compress.errors import IntegrityError
from compress.evaluation.record_base import (
    Count,
    Digest,
    Flag,
    IntervalRecord,
    Positive,
    Seconds,
    Share,
    _Record,
)
from compress.evaluation.summary import ClusterSums, Summary


def _without_unknown(spelled: dict[str, Any], added: str) -> dict[str, Any]:
    """A record without the field `added` where it is None: as such records were written before there was one."""
    return {key: value for key, value in spelled.items() if key != added or value is not None}


_LOCAL = "score the model's own directory or artifact"


class ModelRecord(_Record):
    """A model as it was scored. `digest` hashes its tensors and its config.

    `weights_bytes` is the size of its weight files, `parameters` the weights it stands for (tied ones once), and
    `bits_per_weight` the bits of all its tensors over them, as in an artifact's manifest; `scheme` is the numeric
    layout of its linears (see `scheme_of`). A model behind an address shows neither weights nor tokenizer: they are
    None, and `digest` is over its answers.
    """

    name: str
    digest: Digest
    quantized: bool
    scheme: str = "dense"
    weights_bytes: Positive | None
    parameters: Positive | None
    bits_per_weight: float | None
    tokenizer_sha256: Digest | None

    def size(self) -> tuple[int, float]:
        """Bytes of the weight files and bits per weight. Raises IntegrityError for a model behind an address."""
        if self.weights_bytes is None or self.bits_per_weight is None:
            raise IntegrityError(f"the size of {self.name} is not known: it was scored behind an address", _LOCAL)
        return self.weights_bytes, self.bits_per_weight


class DataRecord(_Record):
    """A text and how it was cut. `windows_sha256` is over the token ids themselves: equal means same tokens.

    `seq_len` is the length of a whole window, begin token included; `tokens` counts the scored tokens. `cluster_kind`
    says what a row of the sums is: a document of the text, or a block of about 2,048 tokens.
    """

    name: str
    sha256: Digest
    text_tokens: Positive
    tokens: Positive
    seq_len: Positive
    windows: Positive
    clusters: Positive
    cluster_kind: Literal["documents", "blocks"]
    prefix_id: int | None
    windows_sha256: Digest


class EnvironmentRecord(_Record):
    """What the numbers were computed with. `dtype` is the compute dtype, `kernel` what multiplied the linears."""

    runtime: str
    kernel: str
    device: str
    dtype: str
    threads: Positive
    machine: str
    versions: dict[str, str]

    def arithmetic(self) -> dict[str, str]:
        """What changes the numbers of a model scored alone beyond their last bits: a native kernel without the
        instruction set that it has on this processor."""
        kernel = self.kernel
        if self.runtime == "native":
            kernel = "cpu-int8" if kernel.endswith("-int8") else "cpu"
        return {"runtime": self.runtime, "kernel": kernel, "device": self.device, "dtype": self.dtype}

    def scoring_kernel(self) -> str | None:
        """What `--kernel` of `eval` and `gate` scores alike; None of what they do not score by, such as an address."""
        named = {"native": self.arithmetic()["kernel"], "gpu": "triton", "transformers": "reference"}
        return named.get(self.runtime)


class TextRecord(_Record):
    """One text scored. `seconds`: the candidate's forward passes alone (information, never gated).

    `context` is what the candidate was trained to read at once, None where its config does not say: from it follows
    whether `data.seq_len` is the standard window. `calibration_overlap`: which share of the scored text's runs of 16
    tokens the candidate's calibration text holds too; None where the candidate was not calibrated, or keeps no record.
    """

    data: DataRecord
    context: Positive | None
    summary: Summary
    clusters: ClusterSums
    seconds: Seconds
    calibration_overlap: Share | None = None

    @model_serializer(mode="wrap")
    def _spelled(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_unknown(handler(self), "calibration_overlap")

    @model_validator(mode="after")
    def _fits(self) -> TextRecord:
        if self.data.clusters != len(self.clusters.tokens) or self.data.tokens != sum(self.clusters.tokens):
            raise ValueError("the data and the sums count different clusters or tokens")
        return self


class TaskRecord(_Record):
    """One task scored item by item; the columns are equally long and follow `item_ids`.

    `metric` says what `correct` holds. `prompts_sha256` is over (item id, prompt text, choices) of all items in order,
    `answers_sha256` over what the model gave (log-likelihoods rounded to 1e-9, or texts): equal answers of different
    weights are an error. `chance` is the expected accuracy of guessing, averaged over the items. `clusters` names per
    item what belongs together (a BLiMP paradigm, an MMLU subject). `gates` is False, with the reason in `why_not`,
    where the baseline (or, alone, the model) is not more than 5 standard errors above chance.
    """

    name: str
    kind: Literal["multiple_choice", "loglikelihood", "generate"]
    metric: Literal["acc", "acc_norm", "exact_match"]
    data_sha256: Digest
    config_sha256: Digest
    prompts_sha256: Digest
    item_ids: list[str]
    correct: list[Flag]
    correct_baseline: list[Flag] | None
    chance: Share
    clusters: list[str] | None
    answers_sha256: Digest
    answers_baseline_sha256: Digest | None
    accuracy: IntervalRecord
    accuracy_baseline: IntervalRecord | None
    metrics: dict[str, float]
    gates: bool
    why_not: str | None

    @model_validator(mode="after")
    def _columns_fit(self) -> TaskRecord:
        if not self.item_ids:
            raise ValueError("a task without items")
        columns = [self.correct, self.correct_baseline, self.clusters]
        if any(column is not None and len(column) != len(self.item_ids) for column in columns):
            raise ValueError("columns of different length")
        if len(set(self.item_ids)) != len(self.item_ids):
            raise ValueError("an item id twice")
        paired = [self.correct_baseline, self.answers_baseline_sha256, self.accuracy_baseline]
        if len({value is None for value in paired}) > 1:
            raise ValueError("some of the baseline's fields are missing")
        if self.gates != (self.why_not is None):
            raise ValueError("why_not belongs to a task that does not gate, and only to it")
        return self


class AnswerSample(_Record):
    """One prompt with the model's answer, and the baseline's where there is one."""

    prompt: str
    answer: str
    baseline: str | None


class GenerationRecord(_Record):
    """Greedy answers to fixed prompts, against the baseline's where there is one.

    `identical` is the share of answers equal to the baseline's, `first_difference_mean` the mean index of the first
    token that differs (equal answers count `max_tokens`); `degenerate` the share of answers that repeat themselves,
    `empty` of those without text. The columns hold the same per prompt, in order. `samples`: the answers to the first
    prompts, for people; None in records made before they were kept.
    """

    prompts: Positive
    max_tokens: Positive
    prompts_sha256: Digest
    identical: Share | None
    first_difference_mean: float | None
    degenerate: Share
    empty: Share
    identical_per_prompt: list[Flag] | None
    first_difference: list[Count] | None
    degenerate_per_prompt: list[Flag]
    samples: list[AnswerSample] | None = None

    @model_serializer(mode="wrap")
    def _spelled(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_unknown(handler(self), "samples")

    @model_validator(mode="after")
    def _columns_fit(self) -> GenerationRecord:
        columns = [self.identical_per_prompt, self.first_difference, self.degenerate_per_prompt]
        if any(column is not None and len(column) != self.prompts for column in columns):
            raise ValueError("columns of different length")
        paired = [self.identical, self.first_difference_mean, self.identical_per_prompt, self.first_difference]
        if len({value is None for value in paired}) > 1:
            raise ValueError("some of the baseline's fields are missing")
        return self


class SuiteRecord(_Record):
    """The suite that said what to score; `sha256` is over its resolved content."""

    name: str
    sha256: Digest
