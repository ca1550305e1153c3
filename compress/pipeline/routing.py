"""Which calibration tokens the experts of a block learn from: those that the router sends them, or all.

The forward pauses where the router has decided for every token, so that starved experts are known before the first of
them is reached. What a starved expert learns from all tokens is less its own, but well conditioned; it is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from compress.artifact.layers import LayerRecord
from compress.artifact.manifest import Fallback
from compress.models.experts import Entry, Experts
from compress.models.skeleton import LinearSpec
from compress.pipeline.linears import QuantizedLinear
from compress.pipeline.work import Work
from compress.recipe_sections import CalibrationConfig

ENTRY = "experts: routed"
"""Name of the pause; no linear is called so."""

FALLBACK = "all tokens"


def experts_per_token(job: Work) -> tuple[int, int] | None:
    """How many experts of a mixture a calibration token goes through, of how many; None for a model without.

    Starved experts, which see all tokens, are not counted: which they are is not known beforehand.
    """
    count = len({spec.expert for spec in job.skeleton.linears() if spec.expert is not None})
    if not count:
        return None
    wanted = job.stage.calibration
    everywhere = isinstance(wanted, CalibrationConfig) and wanted.experts == "all"
    return (count if everywhere else int(job.skeleton.config.num_experts_per_tok)), count


@dataclass
class Routing:
    """The experts of one block in a staged forward; a block without experts has nothing to settle.

    tokens: how many calibration tokens the router sent to each, once settled. starved: those with too few.
    """

    wanted: CalibrationConfig
    experts: Experts | None
    tokens: tuple[int, ...] = ()
    total: int = 0
    starved: frozenset[int] = field(default_factory=frozenset)

    @classmethod
    def of(cls, wanted: CalibrationConfig | None, module: nn.Module) -> Routing:
        """The routing of a block's module."""
        found = [part for part in module.modules() if isinstance(part, Experts)]
        return cls(wanted or CalibrationConfig(), found[0] if found else None)

    @property
    def watched(self) -> dict[str, nn.Module]:
        """What a staged forward has to pause at besides linears."""
        return {} if self.experts is None else {ENTRY: self._entry}

    def settle(self, chosen: Sequence[Tensor]) -> None:
        """Decides which experts see all tokens, from the experts chosen (tokens, k) in every chunk."""
        assert self.experts is not None
        count = len(self.experts)
        sums = sum((torch.bincount(chunk.flatten(), minlength=count) for chunk in chosen), torch.zeros(count).long())
        self.tokens, self.total = tuple(int(number) for number in sums), sum(chunk.shape[0] for chunk in chosen)
        least = self.wanted.starved_share * self.total
        self.starved = frozenset(number for number, tokens in enumerate(self.tokens) if tokens < least)
        self._entry.everywhere = frozenset(range(count)) if self.wanted.experts == "all" else self.starved

    def close(self) -> None:
        """Every expert sees its own tokens again."""
        if self.experts is not None:
            self._entry.everywhere = frozenset()

    def noted(self, linear: QuantizedLinear) -> QuantizedLinear:
        """The linear with what the router sent its expert in its report; of a starved one with a fallback."""
        record, fallbacks = self.told(linear.spec, linear.record)
        return replace(linear, record=record, fallbacks=(*fallbacks, *linear.fallbacks))

    def told(self, spec: LinearSpec, record: LayerRecord) -> tuple[LayerRecord, tuple[Fallback, ...]]:
        """As `noted`, of a report alone: with the fallback, if there is one."""
        expert = spec.expert
        if expert is None or not self.tokens:
            return record, ()
        details = {**record.details, "routed_tokens": self.tokens[expert]}
        record = record.model_copy(update={"details": details})
        if expert not in self.starved or self.wanted.experts != "routed":
            return record, ()
        share = f"{100 * self.wanted.starved_share:g}%"
        reason = f"the router sent it {self.tokens[expert]} of {self.total} calibration tokens, fewer than {share}"
        record = record.model_copy(update={"fallback": record.fallback or FALLBACK})
        return record, (Fallback(name=spec.name, action=FALLBACK, reason=reason),)

    @property
    def _entry(self) -> Entry:
        assert self.experts is not None
        return self.experts.entry
