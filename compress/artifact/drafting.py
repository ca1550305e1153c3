"""draft.json: what an artifact is worth as a draft for another model, as it carries it."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict

DRAFT_NAME = "draft.json"


class DraftRecord(BaseModel):
    """Greedy decoding of `target` with this draft, on `prompts` held-out prompts of `new_tokens` new tokens each.

    target_digest: of the target's weights. draft_tokens: proposed at a time. accepted_at: how many proposals were
    accepted at each place. tokens_per_step: that a step of the target gave. same_answers: whether all answers were
    those of the target alone, token for token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    target_digest: str
    draft_tokens: int
    prompts: int
    new_tokens: int
    steps: int
    proposed: int
    accepted: int
    accepted_at: list[int]
    acceptance: float
    tokens_per_step: float
    same_answers: bool

    def to_bytes(self) -> bytes:
        """The file."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n").encode()
