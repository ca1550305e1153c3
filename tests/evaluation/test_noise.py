"""The noise floor: a model against itself stays below it, and a policy may not ask for less."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import IntegrityError, UserError
from compress.evaluation.gate import gate, measure_floor, refuse_policy_below
from compress.evaluation.gating.noise import Varied, find_noise, keep_noise, measure_noise, text_noise
from compress.evaluation.gating.noise_record import NoiseRecord, read_noise
from compress.evaluation.identity import environment_record, model_record
from compress.evaluation.policy import Policy
from compress.evaluation.record_base import IntervalRecord
from compress.evaluation.text_scores import score_text
from compress.runtime.transformers_backend import TransformersRuntime, load
from tests.evaluation.gate_records import environment

TOKENS = 2600


class Shaky:
    """A runtime whose logits depend on how many windows it is given at a time, as real ones' do on some devices."""

    def __init__(self, inner: TransformersRuntime) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def score(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The inner logits, moved a little by the number of rows."""
        logits = self._inner.score(token_ids)
        return logits + 1e-3 / len(token_ids) * torch.sin(torch.arange(logits.shape[-1]))


@pytest.fixture(scope="module")
def runtime(tiny: Path) -> TransformersRuntime:
    return load(tiny, device="cpu")


@pytest.fixture(scope="module")
def shaky(runtime: TransformersRuntime) -> Any:
    return Shaky(runtime)


@pytest.fixture(scope="module")
def floor(shaky: Any, text: Path) -> NoiseRecord:
    return measure_noise(shaky, data=text, max_tokens=TOKENS)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


def policy(text: Path, **limits: float) -> Policy:
    gates = [
        {"id": "kl", "kind": "kl_mean", "max": limits.get("kl", 0.01)},
        {"id": "top1", "kind": "top1_agreement", "min": limits.get("top1", 0.9)},
    ]
    return Policy.model_validate({"version": 1, "data": str(text), "max_tokens": TOKENS, "gate": gates})


def test_what_rounds_in_another_way_shows(floor: NoiseRecord, text: Path) -> None:
    kl, ppl = floor.values["kl_mean"], floor.values["ppl_ratio"]
    assert 0 < kl.estimate < kl.high < 1e-5
    assert 0 < max(abs(ppl.low), abs(ppl.high)) < 1e-3
    assert "1 and 3 windows per batch" in floor.variation
    assert list(floor.data) == [text.stem]


@pytest.mark.parametrize("rows", [2, 5])
def test_another_batch_size_stays_inside(
    rows: int, runtime: TransformersRuntime, shaky: Any, floor: NoiseRecord, text: Path
) -> None:
    loaded = model_record(runtime)
    varied: Any = Varied(shaky, rows, 2)
    scored = score_text(text, (varied, loaded), (shaky, loaded), environment_record(runtime), max_tokens=TOKENS)
    found = text_noise(scored)
    assert found["kl_mean"].estimate != 0.0  # it did compute in another way
    for name, interval in found.items():
        worst = max(abs(floor.values[name].low), abs(floor.values[name].high))
        assert max(abs(interval.low), abs(interval.high)) <= worst, name


def test_the_real_runtime_stays_inside_its_own_floor(runtime: TransformersRuntime, text: Path) -> None:
    noise = measure_noise(runtime, data=text, max_tokens=TOKENS)
    assert noise.values["kl_mean"].high < 1e-8
    loaded = model_record(runtime)
    varied: Any = Varied(runtime, 7, 2)
    scored = score_text(text, (varied, loaded), (runtime, loaded), environment_record(runtime), max_tokens=TOKENS)
    assert text_noise(scored)["kl_mean"].high <= noise.values["kl_mean"].high


def test_the_threads_are_as_they_were(runtime: TransformersRuntime) -> None:
    before = torch.get_num_threads()
    Varied(runtime, 1, before + 1).score(torch.ones(2, 8, dtype=torch.int64))
    assert torch.get_num_threads() == before


def test_a_model_against_itself_passes_and_the_floor_is_reported(tiny: Path, text: Path, floor: NoiseRecord) -> None:
    keep_noise(floor)
    verdict = gate(tiny, tiny, policy(text), device="cpu", kernel="reference")
    assert verdict.verdict == "PASS"
    assert [g.estimate for g in verdict.gates] == [0.0, 1.0]
    assert verdict.noise == floor
    assert gate(tiny, tiny, policy(text), device="cpu", noise=floor, kernel="reference").noise == floor


def test_a_policy_below_the_floor_is_a_mistake(tiny: Path, text: Path, floor: NoiseRecord) -> None:
    keep_noise(floor)
    below = floor.values["kl_mean"].high / 2
    with pytest.raises(UserError, match=r"the gate kl allows .* less than the noise"):
        gate(tiny, tiny, policy(text, kl=below), device="cpu", kernel="reference")
    refuse_policy_below(floor, policy(text))
    tight = {"int8": {"schemes": ["w8*"], "kl": {"max": below}}}
    gates = [{"id": "kl", "kind": "kl_mean", "max": 1.0}]
    loose = Policy.model_validate({"version": 1, "gate": gates, "profile": tight})
    with pytest.raises(UserError, match="the gate kl allows"):
        refuse_policy_below(floor, loose)


FLOOR = NoiseRecord(
    model="model",
    digest="b" * 64,
    environment=environment(),
    data={},
    variation="made up",
    values={
        name: IntervalRecord(estimate=value, low=0.0, high=value, level=0.95)
        for name, value in {
            "kl_mean": 1e-3,
            "kl_p999": 0.1,
            "ppl_ratio": 1e-2,
            "top1_differs": 0.02,
            "flips:task": 0.01,
            "generation_differs": 0.1,
        }.items()
    },
    created=datetime.date(2026, 1, 1),
).sealed()


@pytest.mark.parametrize(
    ("gate_fields", "allowed", "refused"),
    [
        ({"kind": "kl_mean"}, {"max": 2e-3}, {"max": 5e-4}),
        ({"kind": "kl_p999"}, {"max": 0.2}, {"max": 0.05}),
        ({"kind": "ppl_ratio"}, {"max_increase": 0.02}, {"max_increase": 0.005}),
        ({"kind": "top1_agreement"}, {"min": 0.97}, {"min": 0.99}),
        ({"kind": "accuracy_paired", "task": "task"}, {"margin": 2.0}, {"margin": 0.5}),
        ({"kind": "generation_identical"}, {"min": 0.8}, {"min": 0.95}),
    ],
)
def test_every_measured_kind_is_held_against_the_floor(
    gate_fields: dict[str, Any], allowed: dict[str, Any], refused: dict[str, Any]
) -> None:
    def policy(limit: dict[str, Any]) -> Policy:
        return Policy.model_validate({"version": 1, "gate": [{"id": "g", **gate_fields, **limit}]})

    refuse_policy_below(FLOOR, policy(allowed))
    with pytest.raises(UserError, match="less than the noise"):
        refuse_policy_below(FLOOR, policy(refused))


def test_the_larger_end_is_the_floor() -> None:
    lopsided = IntervalRecord(estimate=-2e-3, low=-4e-3, high=1e-3, level=0.95)
    floor = FLOOR.model_copy(update={"values": {"ppl_ratio": lopsided}})
    assert floor.largest() == {"ppl_ratio": 4e-3}
    assert floor.floor() == "ppl_ratio 0.004 (made up)"
    with pytest.raises(UserError, match=r"allows 0\.003, less than the noise of this environment: 0\.004"):
        refuse_policy_below(
            floor,
            Policy.model_validate({"version": 1, "gate": [{"id": "g", "kind": "ppl_ratio", "max_increase": 3e-3}]}),
        )


def test_the_floor_is_kept_per_model_and_environment(tmp_path: Path) -> None:
    path = keep_noise(FLOOR)
    assert path.is_relative_to(tmp_path)
    assert find_noise(FLOOR.digest, FLOOR.environment) == FLOOR
    assert find_noise("c" * 64, FLOOR.environment) is None
    assert find_noise(FLOOR.digest, environment(dtype="bfloat16")) is None
    assert find_noise(FLOOR.digest, environment(threads=8)) == FLOOR  # the floor is about other numbers of threads
    assert find_noise(FLOOR.digest, environment(versions={"torch": "2"})) is None


def test_a_damaged_floor_is_refused(tiny: Path, text: Path) -> None:
    path = keep_noise(FLOOR)
    path.write_text(path.read_text().replace("made up", "invented"))
    with pytest.raises(IntegrityError, match="edited"):
        read_noise(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(IntegrityError, match="not a whole"):
        find_noise(FLOOR.digest, FLOOR.environment)
    with pytest.raises(IntegrityError, match="that of model, not of"):
        gate(tiny, tiny, policy(text), device="cpu", noise=FLOOR)
    with pytest.raises(UserError, match="cannot read"):
        read_noise(path.parent / "nothing.json")


def test_a_floor_includes_tasks_and_answers(runtime: TransformersRuntime) -> None:
    asked = []

    def tasks(model: Any) -> dict[str, list[int]]:
        asked.append(type(model).__name__)
        return {"task": [1, 0, 1, 1] if isinstance(model, Varied) else [1, 1, 1, 1]}

    noise = measure_noise(runtime, data=None, tasks=tasks, prompts=["Once upon a time"], answer_tokens=4)
    assert asked == ["TransformersRuntime", "Varied", "Varied"]
    assert noise.values["flips:task"].estimate == 0.25
    assert noise.values["generation_differs"].high == 0.0


def test_the_floor_is_measured_on_what_the_policy_scores(tiny: Path, text: Path) -> None:
    noise = measure_floor(tiny, policy(text), device="cpu")
    assert list(noise.data) == [text.stem]
    shorter = measure_floor(tiny, policy(text).model_copy(update={"seq_len": 32}), device="cpu")
    assert shorter.data != noise.data
    assert noise.model == tiny.name
