"""What a model costs to keep, load and run, as it stands in `eval.json` and as `compress bench --json` gives it.

Free of torch. Sizes are exact; times hold for one machine at one time, so each says how many repeats it comes from and
between which values its median lies. A quantity that could not be measured is None, never zero.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from compress.errors import IntegrityError
from compress.evaluation.record_base import Count, Digest, Positive, _Record

TensorClass = Literal["embedding", "head", "attention", "mlp", "experts", "router", "norms", "scales", "other"]
"""`attention` and `mlp` are the linears of a block, biases with them; `scales` are scales, zero points and shapes."""

Timed = Literal["prefill", "decode", "batched forward", "batched decode"]
MemoryKind = Literal["host anonymous", "device"]

Amount = Annotated[float, Field(ge=0.0)]
Rate = Annotated[float, Field(gt=0.0)]


class Measured(_Record):
    """The median of `repeats` measurements. It lies between `low` and `high` with at least the confidence `level`.

    The bounds are order statistics, so they hold for any distribution (Conover, Practical Nonparametric Statistics,
    3.2). Few repeats cannot give 95%: `level` says what they do give.
    """

    median: Amount
    low: Amount
    high: Amount
    level: Annotated[float, Field(ge=0.0, le=1.0)]
    repeats: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Measured:
        if not self.low <= self.median <= self.high:
            raise ValueError("the median lies outside its interval")
        return self


class ClassSize(_Record):
    """The tensors of one class in the weight files.

    tensors: how many, not counting scales (in the class `scales`: modules that have some). bytes: what they take, their
    scales not counted. scale_bytes: their scales, zero points and shapes, which the class `scales` counts as its own
    bytes. weights: the dense weights they stand for. bits_per_weight: both over the weights, None where there are none.
    """

    name: TensorClass
    tensors: Positive
    weights: Count
    bytes: Count
    scale_bytes: Count
    bits_per_weight: Amount | None


class SizeRecord(_Record):
    """The weight files. file_bytes = the classes' bytes + header_bytes; bits_per_weight counts all tensors, no headers.

    `weights` counts tied ones once. The classes' may add up to more: where the files hold tied tensors twice, or
    buffers that are no parameters.
    """

    file_bytes: Positive
    header_bytes: Count
    weights: Positive
    bits_per_weight: Rate
    classes: list[ClassSize]

    @model_validator(mode="after")
    def _adds_up(self) -> SizeRecord:
        if sum(each.bytes for each in self.classes) + self.header_bytes != self.file_bytes:
            raise ValueError("the classes' bytes and the headers do not add up to the file's")
        return self


class LayerCost(_Record):
    """One linear, or the experts of one block together.

    stored_bytes: in the files, scales counted; None where the files hold nothing under a name that matches.
    held_bytes: in memory. read_bytes: weights read for one token alone (of a block's experts, those chosen).
    dense_fallback: stored packed, yet held or read at more than its stored size, because it was decoded.
    """

    name: str
    tensor_class: TensorClass
    kernel: str
    weights: Positive
    packed: bool
    stored_bytes: Positive | None
    held_bytes: Positive
    read_bytes: Positive
    dense_fallback: bool


class Latency(_Record):
    """Percentiles in seconds over the decoding steps of all repeats, batch 1."""

    p50: Rate
    p95: Rate
    p99: Rate
    steps: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Latency:
        if not self.p50 <= self.p95 <= self.p99:
            raise ValueError("the percentiles are not in order")
        return self


class Throughput(_Record):
    """Tokens per second of all rows together.

    `batched forward`: whole prompts, by the engine's kernels for answers until each has its first token; where the
    runtime answers one by one, in one forward pass with logits of every position. `batched decode`: one new token for
    every row in one step; only where the runtime decodes rows together.
    """

    what: Literal["batched forward", "batched decode"]
    batch: Positive
    tokens_per_second: Measured


class SpeedRatio(_Record):
    """How many times as fast as the baseline: baseline seconds over candidate seconds, above 1 is faster.

    ratios: one per ABBA round (candidate, baseline, baseline, candidate), so that a steady drift cancels out. estimate
    is their median, low and high bound it at `level` (order statistics, as in `Measured`).
    """

    what: Timed
    batch: Positive
    estimate: Rate
    low: Rate
    high: Rate
    level: Rate
    ratios: list[Rate]


class TokenPrice(_Record):
    """What a million tokens cost at a measured speed. energy_money is None where the table has no price per kWh."""

    what: Timed
    batch: Positive
    tokens_per_second: Rate
    money_per_million: Amount
    kwh_per_million: Amount
    energy_money_per_million: Amount | None


class PriceRecord(_Record):
    """Money and energy from the price table with hash `table_sha256`, by the formula that is given as text."""

    table: str
    table_sha256: Digest
    machine: str
    currency: str
    price_per_hour: Amount
    watts: Amount
    price_per_kwh: Amount | None
    formula: str
    tokens: list[TokenPrice]


class Workload(_Record):
    """What was run: prompt and new tokens (begin token counted), repeats per model, and on what.

    others_busy_cores: cores that other processes kept busy meanwhile, on average; None where the system does not say.
    kv_cache: how keys and values are kept; None where the runtime does not say. deterministic: whether no bit of a
    result depends on what else is computed; None in records that did not ask.
    """

    prompt_tokens: Positive
    new_tokens: Positive
    batch_sizes: list[Positive]
    repeats: Positive
    warm_up: Count
    runtime: str
    device: str
    dtype: str
    threads: Positive
    others_busy_cores: Amount | None
    kv_cache: str | None = None
    deterministic: bool | None = None


class CostRecord(_Record):
    """All that was measured of one model.

    load_seconds: files in the page cache, in a fresh process. peak_memory_bytes: most memory of the kind `memory_kind`
    that loading, scores of every batch size and decoding took, the interpreter and its libraries not counted;
    held_memory_bytes: what was held once loaded. mapped_memory_bytes: pages of files that loading and running mapped,
    weights above all: page cache, which the system may take back. first_token_seconds: prompt in, first token out.
    prefill_tokens_per_second: prompt tokens over that time. decode_tokens_per_second: tokens after the first. Both at
    batch 1. read_bytes_per_token: of weights, in one decoding step at batch 1; cache_read_bytes_per_token: of keys and
    values, on average over an answer's steps (sliding windows not counted), None where the runtime does not say.
    read_bandwidth: bytes per second at which this machine read memory just then. bandwidth_share: bytes read in
    decoding per second, over it; above 1 where a cache holds the weights. dense_fallback: packed weights were decoded,
    by the layers' reads or by the memory held; the reason says.
    """

    size: SizeRecord
    workload: Workload
    load_seconds: Measured | None
    memory_kind: MemoryKind | None
    peak_memory_bytes: Count | None
    held_memory_bytes: Count | None
    mapped_memory_bytes: Count | None
    first_token_seconds: Measured
    prefill_tokens_per_second: Measured
    decode_tokens_per_second: Measured
    token_latency_seconds: Latency | None
    throughput: list[Throughput]
    kernel: str
    layers: list[LayerCost]
    read_bytes_per_token: Count
    cache_read_bytes_per_token: Count | None = None
    read_bandwidth: Rate | None = None
    bandwidth_share: Amount | None = None
    dense_fallback: bool
    dense_fallback_reason: str | None
    prices: PriceRecord | None
    speed_ratios: list[SpeedRatio] = Field(default_factory=list)

    @model_validator(mode="after")
    def _consistent(self) -> CostRecord:
        if (self.memory_kind is None) != (self.peak_memory_bytes is None):
            raise ValueError("a peak of memory needs its kind, and a kind its peak")
        if self.dense_fallback != (self.dense_fallback_reason is not None):
            raise ValueError("a dense fallback needs its reason, and only it has one")
        if any(layer.dense_fallback for layer in self.layers) and not self.dense_fallback:
            raise ValueError("a layer fell back to dense weights, but the record says that none did")
        return self

    def speed_ratio(self, what: Timed, batch: int = 1) -> SpeedRatio:
        """The ratio to the baseline in one kind of work.

        Raises:
            IntegrityError: it was not measured against a baseline.
        """
        for ratio in self.speed_ratios:
            if (ratio.what, ratio.batch) == (what, batch):
                return ratio
        raise IntegrityError(
            f"the record holds no speed ratio for {what} at batch {batch}",
            "measure both models together: `compress bench CANDIDATE --baseline BASELINE`",
        )
