"""`eval.json`: one model scored on one text, alone or against a baseline, with the sums that a later gate needs.

Free of torch. A record carries the hashes of everything that decides its numbers, its sums per block (not only means,
so that two records can be compared in pairs) and its own hash, so that a cut or edited file is refused.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compress.artifact import durable
from compress.artifact.canonical import sha256_json
from compress.errors import IntegrityError, UserError
from compress.evaluation import statistics
from compress.evaluation.statistics import Interval

KL_THRESHOLDS: tuple[float, ...] = (
    *(float(f"{digit}e{power}") for power in range(-3, 1) for digit in (1, 1.5, 2, 3, 5, 7)),
    10.0,
)
"""KL values (nats) for which each block counts the tokens above: bounds for percentiles come from these counts."""

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelRecord(_Record):
    """A model as it was scored. `digest` hashes its tensors and its config.

    `weights_bytes` is the size of its weight files, `parameters` the weights it stands for (tied ones once), and
    `bits_per_weight` their quotient in bits.
    """

    name: str
    digest: Digest
    quantized: bool
    weights_bytes: Positive
    parameters: Positive
    bits_per_weight: float
    tokenizer_sha256: Digest


class DataRecord(_Record):
    """The text and how it was cut. `windows_sha256` is over the token ids themselves: equal means same tokens."""

    name: str
    sha256: Digest
    text_tokens: Positive
    tokens: Positive
    seq_len: Positive
    windows: Positive
    blocks: Positive
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


class BlockSums(_Record):
    """Per block of tokens, in order: column lists of equal length. All but `tokens` and `nll` need a baseline.

    Sums: tokens scored, nll and nll_baseline (nats), kl = KL(baseline || candidate) (nats), tokens whose likeliest
    token agrees; the same where the baseline is confident (p > 0.5); tokens with KL above each of `KL_THRESHOLDS`.
    """

    tokens: list[Positive]
    nll: list[float]
    nll_baseline: list[float] | None = None
    kl: list[float] | None = None
    top1_agree: list[Count] | None = None
    confident: list[Count] | None = None
    confident_agree: list[Count] | None = None
    kl_above: list[list[Count]] | None = None

    @model_validator(mode="after")
    def _columns_fit(self) -> BlockSums:
        paired = (self.nll_baseline, self.kl, self.top1_agree, self.confident, self.confident_agree, self.kl_above)
        present = [column for column in paired if column is not None]
        if present and len(present) != len(paired):
            raise ValueError("some of the baseline's columns are missing")
        if any(len(column) != len(self.tokens) for column in (self.nll, *present)):
            raise ValueError("columns of different length")
        if any(len(row) != len(KL_THRESHOLDS) for row in self.kl_above or ()):
            raise ValueError(f"kl_above needs {len(KL_THRESHOLDS)} counts per block")
        return self


class IntervalRecord(_Record):
    """An estimate with its two-sided confidence interval at `level`."""

    estimate: float
    low: float
    high: float
    level: float


class KlPercentiles(_Record):
    """KL per token in nats: median, 90%, 99%, 99.9% and largest."""

    p50: float
    p90: float
    p99: float
    p999: float
    max: float


class Summary(_Record):
    """What the sums say, with 95% intervals over blocks. All but `perplexity` need a baseline."""

    perplexity: IntervalRecord
    perplexity_baseline: IntervalRecord | None = None
    perplexity_ratio: IntervalRecord | None = None
    kl_mean: IntervalRecord | None = None
    top1_agreement: IntervalRecord | None = None
    top1_agreement_confident: IntervalRecord | None = None
    kl_percentiles: KlPercentiles | None = None


class SpeedRecord(_Record):
    """The candidate's forward passes alone, on this machine at this time: information, never gated."""

    score_seconds: float
    score_tokens_per_second: float


class EvalRecord(_Record):
    """The whole of eval.json. Make one with `sealed`; read one with `read_record`.

    `artifact_id` is the artifact whose scores these are, None if the model is no artifact.
    """

    schema_version: Literal[1] = 1
    kind: Literal["compress.eval"] = "compress.eval"
    artifact_id: Digest | None
    model: ModelRecord
    baseline: ModelRecord | None
    data: DataRecord
    environment: EnvironmentRecord
    summary: Summary
    speed: SpeedRecord
    blocks: BlockSums
    sha256: Digest = "0" * 64

    def sealed(self) -> EvalRecord:
        """The same record with `sha256` set to the hash of all its other fields."""
        return self.model_copy(update={"sha256": self.expected_sha256()})

    def expected_sha256(self) -> str:
        return sha256_json(self.model_dump(mode="json", exclude={"sha256"}))

    def to_bytes(self) -> bytes:
        """The file's bytes: JSON with one line per field, and one per column of the block sums."""
        data = self.model_dump(mode="json")
        lines = [f' "{key}": {_json(value)}' for key, value in data.items() if key != "blocks"]
        columns = ",\n".join(f'  "{key}": {_json(value)}' for key, value in data["blocks"].items())
        lines.insert(-1, f' "blocks": {{\n{columns}\n }}')
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def summarise(blocks: BlockSums, percentiles: KlPercentiles | None) -> Summary:
    """The summary of block sums."""
    tokens = blocks.tokens
    perplexity = _interval(statistics.perplexity(blocks.nll, tokens))
    if blocks.nll_baseline is None or blocks.kl is None or blocks.top1_agree is None:
        return Summary(perplexity=perplexity)
    confident = None
    if blocks.confident is not None and blocks.confident_agree is not None and sum(blocks.confident) > 0:
        confident = _interval(statistics.ratio(blocks.confident_agree, blocks.confident))
    return Summary(
        perplexity=perplexity,
        perplexity_baseline=_interval(statistics.perplexity(blocks.nll_baseline, tokens)),
        perplexity_ratio=_interval(statistics.perplexity_ratio(blocks.nll, blocks.nll_baseline, tokens)),
        kl_mean=_interval(statistics.ratio(blocks.kl, tokens)),
        top1_agreement=_interval(statistics.ratio(blocks.top1_agree, tokens)),
        top1_agreement_confident=confident,
        kl_percentiles=percentiles,
    )


def write_record(record: EvalRecord, path: str | Path) -> None:
    """Writes eval.json so that a reader sees the old file or the whole new one; raises WorkError where it cannot."""
    durable.write_atomic(Path(path), record.to_bytes())


def read_record(path: str | Path) -> EvalRecord:
    """The record in a file.

    Raises:
        UserError: there is no such file.
        IntegrityError: the file is truncated, was edited, or is no eval record of this version.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}", "give the eval.json that `compress eval` wrote"
        ) from error
    return parse_record(data, str(path))


def parse_record(data: bytes, origin: str) -> EvalRecord:
    """The record in the bytes of an eval.json; `origin` names it in errors. Raises IntegrityError as `read_record`."""
    hint = "score the model again with `compress eval`"
    try:
        record = EvalRecord.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise IntegrityError(f"{origin} is not a whole eval record (schema 1): {where}: {first['msg']}", hint) from None
    if record.sha256 != record.expected_sha256():
        raise IntegrityError(f"{origin} was edited: its sha256 is not that of its contents", hint)
    if not _same(record.summary, summarise(record.blocks, record.summary.kl_percentiles)):
        raise IntegrityError(f"{origin} contradicts itself: its summary does not follow from its block sums", hint)
    return record


def _interval(value: Interval) -> IntervalRecord:
    return IntervalRecord(estimate=value.estimate, low=value.low, high=value.high, level=value.level)


def _same(stated: Summary, derived: Summary) -> bool:
    """Equal but for the last digits, which may differ from one machine's arithmetic to another's."""
    for name in Summary.model_fields:
        left, right = getattr(stated, name), getattr(derived, name)
        if (left is None) != (right is None):
            return False
        if isinstance(left, IntervalRecord) and not all(
            math.isclose(getattr(left, field), getattr(right, field), rel_tol=1e-9, abs_tol=1e-12)
            for field in IntervalRecord.model_fields
        ):
            return False
    return True


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
