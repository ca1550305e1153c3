"""A candidate beside one baseline: the sums, answers and costs that gates are about, wherever they were recorded.

Two ways lead here. A record made in lock-step holds both models. Two records of the same tokens and items, each made
alone (or against something else, as those of two releases are), give what needs no lock-step: perplexity, accuracy,
size. What a comparison lacks raises IntegrityError, so that a gate can never pass for lack of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from compress.errors import IntegrityError
from compress.evaluation.records import (
    ClusterSums,
    CostRecord,
    DataRecord,
    EvalRecord,
    GenerationRecord,
    KlPercentiles,
    ModelRecord,
    Summary,
    TaskRecord,
)

Needed = TypeVar("Needed")


@dataclass(frozen=True, eq=False, slots=True)
class PairedText:
    """One text: the candidate's sums per cluster, and the baseline's negative log-likelihoods on the same clusters."""

    data: DataRecord
    clusters: ClusterSums
    summary: Summary
    nll_baseline: list[float]
    kl_baseline: list[float] | None
    """KL of the baseline itself, an earlier release, to the model that the candidate was scored against too."""

    @property
    def percentiles(self) -> KlPercentiles | None:
        """KL per token at its percentiles."""
        return self.summary.kl_percentiles


@dataclass(frozen=True, eq=False, slots=True)
class PairedTask:
    """One task: right (1) and wrong (0) per item of both models. `why_not`: why it cannot decide anything."""

    record: TaskRecord
    correct_baseline: list[int]
    why_not: str | None


@dataclass(frozen=True, eq=False, slots=True)
class Comparison:
    """`record` holds the candidate; `alone`, where the two were not scored in lock-step, the baseline.

    `name` is what the policy calls the baseline.
    """

    name: str
    record: EvalRecord
    baseline: ModelRecord
    alone: EvalRecord | None = None

    @property
    def candidate(self) -> ModelRecord:
        """The model under test."""
        return self.record.model

    def text(self, name: str | None = None) -> PairedText:
        """The text of that name, the first without a name. Raises IntegrityError where one side lacks it."""
        ours = self.record.text(name)
        if self.alone is None:
            baseline = self.needed(ours.clusters.nll_baseline, f"the text {ours.data.name}")
            return PairedText(ours.data, ours.clusters, ours.summary, baseline, None)
        theirs = self.alone.text(ours.data.name)
        common = (
            theirs.clusters.kl
            if self.record.baseline is not None
            and self.alone.baseline is not None
            and self.record.baseline.digest == self.alone.baseline.digest
            else None
        )
        lockstep = ("nll_baseline", "dp", "dp2", "top1_agree", "confident", "confident_agree", "kl_above")
        hidden = dict.fromkeys(lockstep) if common is not None else dict.fromkeys((*lockstep, "kl"))
        clusters = ours.clusters.model_copy(update=hidden)
        summary = Summary(perplexity=ours.summary.perplexity, bits_per_byte=ours.summary.bits_per_byte)
        return PairedText(ours.data, clusters, summary, theirs.clusters.nll, common)

    def task(self, name: str) -> PairedTask:
        """The task of that name. Raises IntegrityError where one side lacks it."""
        ours = self.record.task(name)
        if self.alone is None:
            return PairedTask(ours, self.needed(ours.correct_baseline, f"the task {name}"), ours.why_not)
        theirs = self.alone.task(name)
        return PairedTask(ours, theirs.correct, theirs.why_not)

    def generation(self) -> GenerationRecord:
        """The candidate's greedy answers. Raises IntegrityError where there are none."""
        if self.record.generation is None:
            raise IntegrityError(
                f"{self.record.model.name} was not asked to generate", "score it with a suite that generates"
            )
        return self.record.generation

    def cost(self) -> CostRecord:
        """What the candidate costs. Raises IntegrityError where it was not measured."""
        return _measured(self.record.cost, self.record.model)

    def cost_baseline(self) -> CostRecord:
        """What the baseline costs."""
        return _measured(self.record.cost_baseline if self.alone is None else self.alone.cost, self.baseline)

    def needed(self, value: Needed | None, what: str) -> Needed:
        """The value; raises IntegrityError where the record does not hold it."""
        if value is None:
            raise IntegrityError(
                f"{what} needs {self.candidate.name} scored in lock-step with {self.baseline.name}; the record was "
                + ("scored alone" if self.record.baseline is None else f"scored against {self.record.baseline.name}"),
                "run `compress eval CANDIDATE --baseline BASELINE`, or give the gate the two models",
            )
        return value


def _measured(cost: CostRecord | None, model: ModelRecord) -> CostRecord:
    if cost is None:
        raise IntegrityError(f"no cost of {model.name} was measured", "score it with a suite that measures cost")
    return cost
