"""The tensor ledger: what became of every tensor of the source, and where every tensor of the output came from.

Tensors lost on the way (multi-token-prediction heads, biases, rotary buffers) are the commonest silent fault of
compression tools. A run cannot publish until each source tensor has an entry and each output tensor a producer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.artifact.canonical import sha256_json
from compress.errors import IntegrityError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Action = Literal["quantized", "pruned", "trained", "repaired", "merged", "folded", "tied", "cast", "kept", "dropped"]


class LedgerEntry(BaseModel):
    """What became of one source tensor.

    `into` names the output tensors that hold it now (none if dropped). `output_sha256` is that tensor's hash
    where there is one, a hash over all of theirs (`output_digest`) where there are several, null where none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    action: Action
    into: list[str]
    source_sha256: Sha256
    output_sha256: Sha256 | None

    @classmethod
    def of(cls, action: Action, source_sha256: str, outputs: Mapping[str, str]) -> LedgerEntry:
        """An entry for a tensor that went into `outputs` (name -> sha256)."""
        into = sorted(outputs)
        return cls(action=action, into=into, source_sha256=source_sha256, output_sha256=output_digest(into, outputs))


def output_digest(into: Iterable[str], sha256: Mapping[str, str]) -> str | None:
    """The `output_sha256` of an entry whose outputs are `into`, given every output tensor's hash."""
    names = list(into)
    if not names:
        return None
    return sha256[names[0]] if len(names) == 1 else sha256_json([[name, sha256[name]] for name in names])


def ledger_problems(
    ledger: Mapping[str, LedgerEntry], source_names: Iterable[str], outputs: Mapping[str, str]
) -> list[str]:
    """Everything that does not add up, in words. `outputs` maps each output tensor to its sha256."""
    sources = set(source_names)
    problems = [f"source tensor {name} has no ledger entry" for name in sorted(sources - set(ledger))]
    problems += [f"ledger entry {name} is not a tensor of the source" for name in sorted(set(ledger) - sources)]
    produced: set[str] = set()
    for name, entry in sorted(ledger.items()):
        produced.update(entry.into)
        missing = [output for output in entry.into if output not in outputs]
        if missing:
            problems.append(f"source tensor {name} went into {', '.join(missing)}, which the output does not hold")
        elif (entry.action == "dropped") != (not entry.into):
            problems.append(f"source tensor {name} is {entry.action} but went into {entry.into or 'nothing'}")
        elif entry.output_sha256 != output_digest(entry.into, outputs):
            problems.append(f"the ledger's output hash of source tensor {name} is not that of what it went into")
        elif entry.action == "kept" and entry.output_sha256 != entry.source_sha256:
            problems.append(f"source tensor {name} is kept, but its bytes changed")
    problems += [f"output tensor {name} comes from no source tensor" for name in sorted(set(outputs) - produced)]
    return problems


def check_ledger(ledger: Mapping[str, LedgerEntry], source_names: Iterable[str], outputs: Mapping[str, str]) -> None:
    """Raise IntegrityError unless every source tensor is accounted for and every output tensor has a producer."""
    problems = ledger_problems(ledger, source_names, outputs)
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise IntegrityError(
            f"the tensor ledger does not add up: {shown}",
            "nothing was published; please report this with the model's config.json",
        )
