"""The gate end to end: a model against itself passes, 2-bit rounding fails, what cannot be compared is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.errors import IntegrityError, UserError
from compress.evaluation.evaluate import evaluate
from compress.evaluation.gate import compare, gate
from compress.evaluation.policy import Policy, default_policy, load_policy
from compress.evaluation.records import EvalRecord, write_record

LOOSE: dict[str, Any] = {
    "version": 1,
    "gate": [
        {"id": "kl", "kind": "kl_mean", "max": 100.0},
        {"id": "ppl", "kind": "ppl_ratio", "max_increase": 100.0},
        {"id": "size", "kind": "size_ratio", "min": 0.5},
    ],
}
PPL_ONLY: dict[str, Any] = {"version": 1, "gate": [{"id": "ppl", "kind": "ppl_ratio", "max_increase": 100.0}]}


@pytest.fixture
def loose() -> Policy:
    return Policy.model_validate(LOOSE)


def saved(record: EvalRecord, path: Path) -> Path:
    write_record(record, path)
    return path


def quick(tokens: int = 6144) -> Policy:
    """The default policy on fewer tokens."""
    return load_policy(default_policy()).model_copy(update={"max_tokens": tokens})


def test_a_model_against_itself_passes_the_default_policy(packaged_model: Path) -> None:
    verdict = gate(packaged_model, packaged_model, quick(), device="cpu")
    assert verdict.verdict == "PASS"
    assert verdict.exit_code == 0
    measured = {g.id: g.estimate for g in verdict.gates}
    assert measured["kl"] == measured["perplexity"] == 0.0
    assert measured["top1"] == measured["size"] == 1.0
    assert not verdict.warnings


def test_two_bit_rounding_fails_the_default_policy(packaged_model: Path, rounded: Callable[..., Path]) -> None:
    verdict = gate(rounded(packaged_model, 2, 128), packaged_model, quick(), device="cpu")
    assert verdict.verdict == "FAIL"
    assert verdict.exit_code == 1
    assert {g.id for g in verdict.gates if g.verdict == "FAIL"} == {"perplexity", "kl", "top1", "tail"}


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "expected"), [(4, "FAIL"), (3, "FAIL"), (2, "FAIL")])
def test_rounding_under_the_default_policy_on_the_whole_text(
    bits: int, expected: str, packaged_model: Path, rounded: Callable[..., Path]
) -> None:
    assert gate(rounded(packaged_model, bits, 128), packaged_model, device="cpu").verdict == expected


def test_files_give_the_verdict_of_the_models(
    record: EvalRecord, tiny: Path, damaged: Path, text: Path, tmp_path: Path, loose: Policy
) -> None:
    file = saved(record, tmp_path / "eval.json")
    verdict = gate(file, policy=loose)
    assert verdict.verdict == "PASS"
    assert verdict.candidate == record.model
    assert verdict.baseline == record.baseline
    assert gate(file, tiny, loose) == verdict
    bound = Policy.model_validate({**LOOSE, "data": str(text)})
    assert gate(damaged, tiny, bound, device="cpu").gates == gate(file, policy=bound).gates == verdict.gates
    alone = saved(evaluate(tiny, data=text, device="cpu"), tmp_path / "base.json")
    assert gate(file, alone, loose) == verdict


def test_two_records_scored_alone_decide_perplexity_and_size_only(
    record: EvalRecord, tiny: Path, damaged: Path, text: Path, tmp_path: Path, loose: Policy
) -> None:
    candidate = saved(evaluate(damaged, data=text, device="cpu"), tmp_path / "candidate.json")
    baseline = saved(evaluate(tiny, data=text, device="cpu"), tmp_path / "baseline.json")
    together = saved(record, tmp_path / "together.json")
    only = Policy.model_validate(PPL_ONLY)
    assert gate(candidate, baseline, only).gates == gate(together, policy=only).gates
    with pytest.raises(IntegrityError, match="scored alone"):
        gate(candidate, baseline, loose)
    with pytest.raises(IntegrityError, match="no baseline"):
        gate(candidate, policy=loose)


def test_a_model_needs_a_baseline(tiny: Path, loose: Policy) -> None:
    with pytest.raises(UserError, match="baseline"):
        gate(tiny, policy=loose)


def test_another_baseline_than_the_recorded_one_is_refused(
    record: EvalRecord, tiny: Path, damaged: Path, text: Path, tmp_path: Path, loose: Policy
) -> None:
    file = saved(record, tmp_path / "eval.json")
    with pytest.raises(IntegrityError, match="was scored against"):
        gate(file, damaged, loose)
    other = saved(evaluate(damaged, data=text, device="cpu"), tmp_path / "other.json")
    with pytest.raises(IntegrityError, match="another baseline"):
        gate(file, other, loose)
    alone = saved(evaluate(damaged, data=text, device="cpu"), tmp_path / "alone.json")
    with pytest.raises(IntegrityError, match="was scored against no baseline"):
        gate(alone, tiny, loose)


@pytest.mark.parametrize(
    ("section", "field", "value", "what"),
    [
        ("model", "tokenizer_sha256", "a" * 64, "tokenizer"),
        ("data", "sha256", "a" * 64, "text"),
        ("data", "windows_sha256", "a" * 64, "tokens"),
        ("environment", "dtype", "bfloat16", "dtype"),
        ("environment", "runtime", "native", "runtime"),
        ("environment", "kernel", "cpu", "kernel"),
        ("environment", "device", "cuda", "device"),
    ],
)
def test_records_that_differ_in_more_than_weights_are_refused(
    section: str, field: str, value: str, what: str, record: EvalRecord
) -> None:
    alone = record.model_copy(update={"baseline": None, "blocks": blocks_alone(record)})
    changed = getattr(alone, section).model_copy(update={field: value})
    assert compare(alone, alone).nll_baseline == record.blocks.nll
    with pytest.raises(IntegrityError, match=f"another {what}"):
        compare(alone, alone.model_copy(update={section: changed}))


def blocks_alone(record: EvalRecord) -> Any:
    names = ("nll_baseline", "kl", "top1_agree", "confident", "confident_agree", "kl_above")
    return record.blocks.model_copy(update=dict.fromkeys(names))


def test_limits_hold_for_their_text(record: EvalRecord, tmp_path: Path) -> None:
    file = saved(record, tmp_path / "eval.json")
    with pytest.raises(IntegrityError, match=r"tales_heldout.*short"):
        gate(file)


def test_a_quantised_model_that_answers_as_its_baseline_is_refused(
    tiny: Path, text: Path, tmp_path: Path, loose: Policy
) -> None:
    same = evaluate(tiny, tiny, data=text, device="cpu")
    assert gate(saved(same, tmp_path / "same.json"), policy=loose).verdict == "PASS"
    posing = same.model.model_copy(update={"quantized": True, "digest": "b" * 64})
    forged = same.model_copy(update={"model": posing}).sealed()
    with pytest.raises(IntegrityError, match="answers exactly as"):
        gate(saved(forged, tmp_path / "forged.json"), policy=loose)


def test_damaged_files_are_refused(record: EvalRecord, tmp_path: Path, loose: Policy) -> None:
    file = saved(record, tmp_path / "eval.json")
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(IntegrityError, match="not a whole eval record"):
        gate(file, policy=loose)


@pytest.mark.parametrize("candidate", ["nothing.json", "nothing"])
def test_missing_candidates_are_refused(candidate: str, tmp_path: Path, loose: Policy) -> None:
    with pytest.raises(UserError):
        gate(tmp_path / candidate, policy=loose)


def test_missing_baselines_and_policies_are_refused(tiny: Path, tmp_path: Path, loose: Policy) -> None:
    with pytest.raises(UserError):
        gate(tiny, tmp_path / "nothing", loose)
    with pytest.raises(UserError, match="policy"):
        gate(tiny, tiny, tmp_path / "nothing.toml")
