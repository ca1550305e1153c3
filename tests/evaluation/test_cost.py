"""`measure` and `measure_pair`: exact on a runtime with a scripted clock, whole on a real one. No time is asserted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.errors import IntegrityError, UserError
from compress.evaluation.costs import measure as cost_module
from compress.evaluation.costs.machine import Busy
from compress.evaluation.costs.measure import Settings, measure, measure_pair
from compress.evaluation.costs.prices import load_prices
from compress.evaluation.costs.record import CostRecord, Measured
from compress.evaluation.costs.workload import cache_tokens, plan
from compress.progress import NullProgress
from compress.runtime import loading
from compress.runtime.protocol import Generation, LayerUse, SamplingParams
from compress.runtime.transformers_backend import TransformersRuntime, load

FAST = Settings(prompt_tokens=20, new_tokens=5, batch_sizes=(1, 3), fresh=False)


class Clock:
    """Stands in for `time` where forward passes are timed: it moves only when a scripted runtime works."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Scripted:
    """A real model whose work takes as long as is said: `speed` divides all times."""

    name = "scripted"
    kernel = "scripted"
    device = "cpu"
    dtype = "float32"

    def __init__(self, real: TransformersRuntime, clock: Clock, speed: float = 1.0, together: bool = False) -> None:
        self.path, self.context_length, self.vocab_size = real.path, real.context_length, real.vocab_size
        self.prefix_id, self.batched_generate = real.prefix_id, together
        self.deterministic = real.deterministic
        self.encode, self.decode, self.parameters = real.encode, real.decode, real.parameters
        self.tokenizer_digest = real.tokenizer_digest
        self.layers = real.layers
        self.clock, self.speed = clock, speed
        self.calls: list[str] = []

    def score(self, token_ids: Tensor) -> Tensor:
        self.calls.append(f"score {tuple(token_ids.shape)}")
        self.clock.now += (0.5 + 0.1 * len(token_ids)) / self.speed
        return torch.zeros(0)

    def generate(self, prompts: Sequence[str | list[int]], params: SamplingParams) -> list[Generation]:
        self.calls.append(f"generate {len(prompts)}")
        assert params.ignore_end
        steps = tuple((0.1 + 0.01 * i) / self.speed for i in range(params.max_tokens - 1))
        first = prompts[0]
        prompt_tokens = 1 + len(self.encode(first)) if isinstance(first, str) else len(first)
        tokens = (7,) * params.max_tokens
        return [Generation("x", tokens, "length", prompt_tokens, 2.0 / self.speed, sum(steps), steps) for _ in prompts]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(cost_module, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    monkeypatch.setattr(cost_module, "read_bandwidth", lambda _device: 1e6)
    return clock


@pytest.fixture(scope="module")
def real(tiny: Path) -> TransformersRuntime:
    return load(tiny, device="cpu")


def exactly(value: float, repeats: int) -> dict[str, object]:
    return {"median": pytest.approx(value), "low": pytest.approx(value), "high": pytest.approx(value), "n": repeats}


def shown(found: Measured) -> dict[str, object]:
    return {"median": found.median, "low": found.low, "high": found.high, "n": found.repeats}


class Notes(NullProgress):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.steps: list[int] = []  # of each stage, those announced and not taken

    def begin(self, what: str, total: int) -> None:
        self.steps.append(total)

    def advance(self, note: str = "") -> None:
        self.steps[-1] -= 1

    def warn(self, message: str) -> None:
        self.said.append(message)


@pytest.mark.parametrize(("seconds", "batches"), [(12.0, [1]), (1000.0, [1, 3]), (None, [1, 3])])
def test_batch_sizes_beyond_the_time_are_left_out_and_named(
    seconds: float | None, batches: list[int], real: TransformersRuntime, clock: Clock
) -> None:
    progress = Notes()
    found = measure(Scripted(real, clock), None, replace(FAST, seconds=seconds), progress=progress)
    assert [x.batch for x in found.throughput] == found.workload.batch_sizes == batches
    assert [("batch sizes 3 left out" in said) for said in progress.said] == ([True] if batches == [1] else [])
    assert shown(found.throughput[0].tokens_per_second) == exactly(20 / 0.6, 10)
    assert progress.steps == [0] * (1 + len(batches)), "every stage took the steps that it announced"


def test_the_time_bounds_repeats_and_the_fresh_process_too(
    real: TransformersRuntime, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Notes()
    found = measure(Scripted(real, clock), None, replace(FAST, seconds=0.0, fresh=True), progress=progress)
    assert (found.workload.repeats, found.decode_tokens_per_second.repeats) == (1, 1)
    assert (found.decode_tokens_per_second.level, found.workload.batch_sizes) == (0.0, [1])
    assert (found.load_seconds, found.peak_memory_bytes) == (None, None)
    assert len(progress.said) == 4
    assert "1 of 10 repeats" in progress.said[0]
    assert "load time and memory are left out" in progress.said[3]
    runtime = Scripted(real, clock, speed=0.5)
    answer = runtime.generate

    def slow(prompts: Sequence[str | list[int]], params: SamplingParams) -> list[Generation]:
        clock.now += 2.0
        return answer(prompts, params)

    monkeypatch.setattr(runtime, "generate", slow)
    before = clock.now
    found = measure(runtime, None, replace(FAST, seconds=25.0))
    # Two of warm-up and two repeats are 8 s, one more is the end of 40%; 1.2 s a prompt go until 17.5 s, two warm up.
    assert (found.workload.repeats, found.workload.batch_sizes) == (2, [1])
    assert found.throughput[0].tokens_per_second.repeats == 5
    assert clock.now - before == pytest.approx(8.0 + 7 * 1.2 + 1.6), "with a look at batch 3"


def test_only_one_of_a_pair_decodes_rows_together(real: TransformersRuntime, clock: Clock) -> None:
    mine, theirs = measure_pair(Scripted(real, clock, together=True), Scripted(real, clock), None, FAST)
    assert {x.batch for x in mine.throughput if x.what == "batched decode"} == {1, 3}
    assert {x.what for x in theirs.throughput} == {"batched forward"}
    assert {x.what for x in mine.speed_ratios} == {"prefill", "decode", "batched forward"}


def test_a_pairs_steps_are_as_announced(real: TransformersRuntime, clock: Clock) -> None:
    progress = Notes()
    measure_pair(Scripted(real, clock, together=True), Scripted(real, clock), None, FAST, progress=progress)
    assert progress.steps == [0] * 5


def test_every_number_by_hand(real: TransformersRuntime, clock: Clock) -> None:
    runtime = Scripted(real, clock)
    found = measure(runtime, load_prices(), FAST)
    assert shown(found.first_token_seconds) == exactly(2.0, 10)
    assert shown(found.prefill_tokens_per_second) == exactly(20 / 2.0, 10)
    decode = 4 / (0.10 + 0.11 + 0.12 + 0.13)
    assert shown(found.decode_tokens_per_second) == exactly(decode, 10)
    assert (found.read_bandwidth, found.cache_read_bytes_per_token) == (1e6, None)
    assert found.bandwidth_share == pytest.approx(decode * found.read_bytes_per_token / 1e6)
    assert [(x.what, x.batch) for x in found.throughput] == [("batched forward", 1), ("batched forward", 3)]
    assert shown(found.throughput[0].tokens_per_second) == exactly(20 / 0.6, 10)
    assert shown(found.throughput[1].tokens_per_second) == exactly(60 / 0.8, 10)
    latency = found.token_latency_seconds
    assert latency is not None
    assert (latency.p50, latency.p95, latency.p99, latency.steps) == pytest.approx((0.115, 0.13, 0.13, 40))
    assert found.prices is not None
    best = [(row.what, row.batch) for row in found.prices.tokens]
    assert best == [("prefill", 1), ("decode", 1), ("batched forward", 3)]
    assert [row.tokens_per_second for row in found.prices.tokens] == pytest.approx([10.0, decode, 75.0])
    work = found.workload
    assert (work.prompt_tokens, work.new_tokens, work.repeats, work.warm_up) == (20, 5, 10, 2)
    assert runtime.calls == ["generate 1"] * 12 + ["score (1, 20)"] * 12 + ["score (3, 20)"] * 12
    assert found.speed_ratios == []
    assert (found.load_seconds, found.peak_memory_bytes, found.memory_kind) == (None, None, None)


def test_percentiles_are_numpys(real: TransformersRuntime, clock: Clock) -> None:
    found = measure(
        Scripted(real, clock), None, Settings(prompt_tokens=20, new_tokens=30, batch_sizes=(1,), fresh=False)
    )
    steps = [0.1 + 0.01 * i for i in range(29)] * 10
    latency = found.token_latency_seconds
    assert latency is not None
    assert (latency.p50, latency.p95, latency.p99) == pytest.approx(tuple(np.percentile(steps, [50, 95, 99])))
    assert found.prices is None


def test_a_runtime_that_decodes_together_is_measured_so(real: TransformersRuntime, clock: Clock) -> None:
    runtime = Scripted(real, clock, together=True)
    found = measure(runtime, load_prices(), FAST)
    rates = {(x.what, x.batch): x.tokens_per_second.median for x in found.throughput}
    assert rates["batched decode", 3] == pytest.approx(3 * 4 / 0.46)
    assert runtime.calls.count("generate 3") == 36, "to the first tokens; and to them and to the end"
    assert rates["batched forward", 3] == pytest.approx(3 * 20 / 2.0)
    assert not any(call.startswith("score") for call in runtime.calls), "scores have kernels of their own"
    assert found.prices is not None
    assert [row.what for row in found.prices.tokens][-1] == "batched decode"


def test_a_pair_takes_turns_and_gives_the_ratio(real: TransformersRuntime, clock: Clock) -> None:
    slow, fast = Scripted(real, clock), Scripted(real, clock, speed=2.5)
    order: list[str] = []
    for runtime, name in ((fast, "c"), (slow, "b")):
        runtime.calls = order  # type: ignore[assignment]
        generate = runtime.generate

        def noted(*given: object, generate: object = generate, name: str = name) -> list[Generation]:
            order.append(name)
            return generate(*given)  # type: ignore[operator,no-any-return]

        runtime.generate = noted  # type: ignore[method-assign]
    mine, theirs = measure_pair(fast, slow, None, FAST)
    turns = "".join(x for x in order if x in "bc")
    assert turns == "cc" + "bb" + "cbbc" * 10
    for what, batch in (("prefill", 1), ("decode", 1), ("batched forward", 1), ("batched forward", 3)):
        ratio = mine.speed_ratio(what, batch)  # type: ignore[arg-type]
        assert (ratio.estimate, ratio.low, ratio.high) == pytest.approx((2.5, 2.5, 2.5))
        assert ratio.ratios == pytest.approx([2.5] * 10)
    assert mine.workload.repeats == 20
    assert theirs.speed_ratios == []
    with pytest.raises(IntegrityError, match="no speed ratio for decode"):
        theirs.speed_ratio("decode")


def test_other_tokenizers_are_not_compared(real: TransformersRuntime, clock: Clock) -> None:
    other = Scripted(real, clock)
    other.tokenizer_digest = lambda: "1" * 64  # type: ignore[method-assign]
    with pytest.raises(IntegrityError, match="different tokens"):
        measure_pair(Scripted(real, clock), other, None, FAST)
    shorter = Scripted(real, clock)
    shorter.context_length = 32
    with pytest.raises(IntegrityError, match="contexts of different length"):
        measure_pair(Scripted(real, clock), shorter, None, Settings(fresh=False))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(new_tokens=1), "new_tokens is 1"),
        (Settings(prompt_tokens=1), "prompt_tokens is 1"),
        (Settings(prompt_tokens=60, new_tokens=5), "context of 64"),
        (Settings(new_tokens=10**12), "context of 64"),
        (Settings(batch_sizes=()), "batch sizes"),
        (Settings(batch_sizes=(1, 10**10)), "no 10000000000 rows at once"),
        (Settings(batch_sizes=(4, 0)), "batch sizes"),
        (Settings(repeats=9), "repeats is 9"),
        (Settings(machine="nobody's"), "no machine called"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_work(
    real: TransformersRuntime, clock: Clock, settings: Settings, said: str
) -> None:
    runtime = Scripted(real, clock)
    with pytest.raises(UserError, match=said):
        measure(runtime, load_prices(), settings)
    assert runtime.calls == []


def test_batches_whose_answers_would_wait_are_refused(packaged_model: Path) -> None:
    small = loading.load(packaged_model, device="cpu", cache_tokens=256)
    work = plan(small, prompt_tokens=40, new_tokens=20, batch_sizes=(1, 4))
    small.generate(work.rows.tolist(), work.sampling)
    for batch, said in ((5, "5 answers of 60 tokens .* do not fit"), (65, "no 65 rows at once")):
        with pytest.raises(UserError, match=said):
            plan(small, prompt_tokens=40, new_tokens=20, batch_sizes=(1, batch))


def test_a_cache_is_as_large_as_the_largest_batch() -> None:
    assert cache_tokens(None, None, (1, 64)) is None, "as it is"
    assert cache_tokens(1000, 24, (1, 32)) == 32 * 1056
    assert cache_tokens(1000, 24, (1, 32, 10**10)) == 64 * 1056, "such a batch is refused"
    assert cache_tokens(10**12, 24, (1,)) is None, "so is such a prompt"


def test_lengths_left_out_fit_the_context(real: TransformersRuntime, packaged_model: Path) -> None:
    assert real.context_length == 64
    work = plan(real)
    assert (work.rows.shape, work.new_tokens) == ((8, 48), 16)
    roomy = plan(load(packaged_model, device="cpu"), batch_sizes=(2,))
    assert (roomy.rows.shape, roomy.new_tokens) == ((2, 128), 32)
    assert len({tuple(row) for row in roomy.rows.tolist()}) == 2


def test_the_prompt_is_its_own_tokens(real: TransformersRuntime) -> None:
    work = plan(real, prompt_tokens=33, new_tokens=4)
    assert work.rows[0].tolist() == [real.prefix_id, *real.encode(work.prompt)]
    assert len(work.rows[0]) == 33
    answer = real.generate([work.prompt], work.sampling)[0]
    assert answer.prompt_tokens == 33
    assert len(answer.step_seconds) == len(answer.token_ids) - 1 == 3
    assert sum(answer.step_seconds) == pytest.approx(answer.decode_seconds)


def test_a_real_artifact_whole(artifact: Path) -> None:
    found = measure(load(artifact, device="cpu"), load_prices(), Settings(batch_sizes=(2,)))
    assert found.dense_fallback
    assert found.kernel == "dense"
    assert found.load_seconds is not None
    assert found.load_seconds.level > 0.95
    assert found.read_bytes_per_token == sum(layer.read_bytes for layer in found.layers)
    assert CostRecord.model_validate_json(found.model_dump_json()) == found
    if sys.platform == "linux":
        assert found.memory_kind == "host anonymous"
        assert found.peak_memory_bytes is not None
        assert found.held_memory_bytes is not None
        assert found.peak_memory_bytes >= found.held_memory_bytes > 0


def test_busy_cores_of_others_by_hand() -> None:
    before, after = Busy(100.0, 10.0, 50.0), Busy(107.0, 12.0, 54.0)
    assert after.others_since(before) == pytest.approx((7 - 2) / 4)
    assert Busy(101.0, 12.0, 54.0).others_since(before) == 0.0


def test_records_that_contradict_themselves_are_refused(real: TransformersRuntime, clock: Clock) -> None:
    whole = measure(Scripted(real, clock), None, FAST).model_dump()
    wrong = [
        {"dense_fallback": True},
        {"dense_fallback_reason": "why"},
        {"peak_memory_bytes": 5},
        {"layers": [{**whole["layers"][0], "dense_fallback": True}]},
        {"first_token_seconds": {**whole["first_token_seconds"], "low": 3.0}},
        {"token_latency_seconds": {**whole["token_latency_seconds"], "p50": 1.0}},
        {"decode_tokens_per_second": {**whole["decode_tokens_per_second"], "median": float("nan")}},
    ]
    for change in wrong:
        with pytest.raises(ValueError, match="validation error"):
            CostRecord.model_validate({**whole, **change})
    assert CostRecord.model_validate(whole).model_dump() == whole


def test_the_records_are_free_of_torch() -> None:
    code = (
        "import sys; from compress.evaluation.costs import prices, process, record, timing; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_layer_use_is_what_the_module_holds(real: TransformersRuntime) -> None:
    layers = {layer.name: layer for layer in real.layers()}
    head = layers["lm_head"]
    assert head.aliases == ("model.embed_tokens",)
    weight = real.model.lm_head.weight
    assert (head.weights, head.held_bytes) == (weight.numel(), weight.numel() * 4)
    linears = [n for n, m in real.model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert list(layers) == linears
    assert isinstance(head, LayerUse)
