"""The gate end to end: a model against itself passes, 2-bit rounding fails, what cannot be compared is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.errors import IntegrityError, UserError
from compress.evaluation.evaluate import evaluate
from compress.evaluation.gate import check, compare, gate
from compress.evaluation.gating import scoring
from compress.evaluation.policy import Policy, default_policy, load_policy
from compress.evaluation.records import EvalRecord, write_record
from compress.evaluation.verdict import write_verdict
from tests.evaluation.gate_records import environment, model, task
from tests.evaluation.gate_records import record as made
from tests.evaluation.gate_records import text as made_text

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
    other = saved(made(texts=record.texts, baseline=record.baseline, model=model("elder")), tmp_path / "other.json")
    with pytest.raises(IntegrityError, match="another tokenizer"):
        gate(file, other, loose)
    alone = saved(evaluate(damaged, data=text, device="cpu"), tmp_path / "alone.json")
    with pytest.raises(IntegrityError, match="was scored against no baseline"):
        gate(alone, tiny, loose)


def alone_task(*items: int) -> Any:
    nothing = {"correct_baseline": None, "accuracy_baseline": None, "answers_baseline_sha256": None}
    return task(*items).model_copy(update=nothing)


def base_task(*items: int) -> Any:
    """The same items, other answers."""
    return alone_task(*items).model_copy(update={"answers_sha256": "9" * 64})


def alone(**changed: Any) -> EvalRecord:
    """A model scored by itself on a text and a task."""
    values = {"baseline": None, "texts": [made_text(alone=True)], "tasks": [alone_task(700, 250, 30, 20)]}
    return made(**{**values, **changed})


def base(**changed: Any) -> EvalRecord:
    """The model that it is compared with."""
    values = {
        "model": model("baseline"),
        "texts": [made_text(alone=True, log_ratio=0.0)],
        "tasks": [base_task(700, 250, 30, 20)],
    }
    return alone(**{**values, **changed})


def changed_text(**changed: Any) -> dict[str, Any]:
    text = base().texts[0]
    return {"texts": [text.model_copy(update={"data": text.data.model_copy(update=changed)})]}


def changed_task(**changed: Any) -> dict[str, Any]:
    return {"tasks": [base().tasks[0].model_copy(update=changed)]}


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"model": model("baseline").model_copy(update={"tokenizer_sha256": "a" * 64})}, "tokenizer"),
        (changed_text(sha256="a" * 64), "text under the name text"),
        (changed_text(windows_sha256="a" * 64), "cut of the tokens of text"),
        ({"environment": environment(dtype="bfloat16")}, "dtype"),
        ({"environment": environment(runtime="native")}, "runtime"),
        ({"environment": environment(kernel="cpu")}, "kernel"),
        ({"environment": environment(device="cuda")}, "device"),
        (changed_task(prompts_sha256="a" * 64), "wording of the prompts of task"),
        (changed_task(config_sha256="a" * 64), "configuration of task"),
        (changed_task(data_sha256="a" * 64), "version of the data of task"),
        (changed_task(metric="acc_norm"), "metric of task"),
        (changed_task(item_ids=[str(i + 1) for i in range(1000)]), "choice of items of task"),
        ({"tasks": [base_task(699, 250, 30, 20)]}, "number of items of task"),
    ],
)
def test_records_that_differ_in_more_than_weights_are_refused(changed: dict[str, Any], what: str) -> None:
    assert compare(alone(), base()).baseline.name == "baseline"
    with pytest.raises(IntegrityError, match=f"another {what}"):
        compare(alone(), base(**changed))


@pytest.mark.parametrize(
    ("pair", "where"),
    [
        ((alone(), base(texts=alone().texts)), "the text text"),
        ((alone(), base(tasks=alone().tasks)), "the task task"),
        ((made(texts=[made_text(kl=0.0, noise=0.0)]), None), "the text text"),
        (
            (made(tasks=[task(1, 1, 1, 1).model_copy(update={"answers_baseline_sha256": "6" * 64})]), None),
            "the task task",
        ),
    ],
)
def test_equal_answers_of_different_weights_are_refused(pair: tuple[EvalRecord, Any], where: str) -> None:
    with pytest.raises(IntegrityError, match=f"answers exactly as baseline does on {where}"):
        compare(*pair)
    compare(*pair, allow_identical=True)
    same = pair[0].model_copy(update={"model": (pair[1] or pair[0]).model})
    if pair[1] is not None:
        compare(same, pair[1])


def test_equal_texts_of_different_weights_may_be() -> None:
    generated = task(1, 1, 1, 1).model_copy(update={"answers_baseline_sha256": "6" * 64, "kind": "generate"})
    compare(made(tasks=[generated]))


def test_limits_hold_for_their_text(record: EvalRecord, tmp_path: Path) -> None:
    file = saved(record, tmp_path / "eval.json")
    with pytest.raises(IntegrityError, match=r"tales_heldout.*short"):
        gate(file)


def in_windows(seq_len: int, context: int | None) -> EvalRecord:
    text = made().texts[0]
    data = text.data.model_copy(update={"seq_len": seq_len})
    return made(texts=[text.model_copy(update={"data": data, "context": context})])


@pytest.mark.parametrize(
    ("stated", "seq_len", "context", "serves"),
    [
        (None, 512, 2048, True),
        (None, 512, None, True),
        (None, 64, 64, True),
        (None, 64, 2048, False),
        (None, 64, None, False),
        (64, 64, 2048, True),
        (64, 512, 2048, False),
        (512, 64, 64, False),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_limits_hold_for_their_windows(
    stated: int | None,
    seq_len: int,
    context: int | None,
    serves: bool,
    named: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("compress.evaluation.gating.sources._on", lambda record, data: "text")
    file = saved(in_windows(seq_len, context), tmp_path / "eval.json")
    values = {**LOOSE, "seq_len": stated, "data": "tales_heldout" if named else None}
    if serves or not (named or stated):  # a policy that says neither is about whatever was scored
        assert gate(file, policy=Policy.model_validate(values)).verdict == "PASS"
        return
    with pytest.raises(IntegrityError, match=f"windows of {stated or 512} tokens; .* in windows of {seq_len}") as found:
        gate(file, policy=Policy.model_validate(values))
    assert f"--seq-len {stated or 512}" in found.value.hint


def test_scores_in_other_windows_are_refused_and_scored_again(
    tiny: Path, damaged: Path, text: Path, tmp_path: Path
) -> None:
    file = saved(evaluate(damaged, tiny, data=text, seq_len=8, device="cpu"), tmp_path / "eval.json")
    policy = Policy.model_validate({**LOOSE, "data": str(text)})
    with pytest.raises(IntegrityError, match=r"windows of 64 tokens; .* in windows of 8"):
        gate(file, policy=policy)
    short = policy.model_copy(update={"seq_len": 8})
    assert gate(file, policy=short).verdict == "PASS"
    assert [t.seq_len for t in gate(damaged, tiny, policy, device="cpu").texts] == [64]
    assert [t.seq_len for t in gate(damaged, tiny, short, device="cpu").texts] == [8]


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


def test_a_gate_on_what_nothing_scores_is_refused(tiny: Path, damaged: Path) -> None:
    answers = {"id": "a", "kind": "degenerate", "max": 0.1}
    with pytest.raises(UserError, match="which prompts"):
        gate(damaged, tiny, Policy.model_validate({"version": 1, "gate": [answers]}), device="cpu")
    other = {"id": "a", "kind": "kl_mean", "max": 0.1, "text": "elsewhere"}
    with pytest.raises(UserError, match="'elsewhere'"):
        gate(damaged, tiny, Policy.model_validate({"version": 1, "gate": [other]}), device="cpu")


def test_several_baselines_are_scored_and_named(
    tiny: Path, damaged: Path, rounded: Callable[..., Path], text: Path
) -> None:
    last = rounded(tiny, 8)
    policy = Policy.model_validate(
        {
            "version": 1,
            "data": str(text),
            "gate": [
                {"id": "kl", "kind": "kl_mean", "max": 100.0},
                {"id": "kl-last", "kind": "kl_mean", "max": 100.0, "baseline": "last"},
            ],
        }
    )
    verdict = gate(damaged, {"root": tiny, "last": last}, policy, device="cpu")
    assert list(verdict.baselines) == ["root", "last"]
    assert [g.baseline for g in verdict.gates] == ["root", "last"]
    assert verdict.gates[0].estimate != verdict.gates[1].estimate
    with pytest.raises(UserError, match="'last'; given: root"):
        gate(damaged, {"root": tiny}, policy, device="cpu")


def test_a_verdict_follows_from_its_records(record: EvalRecord, tmp_path: Path, loose: Policy) -> None:
    file = saved(record, tmp_path / "eval.json")
    verdict = gate(file, policy=loose)
    path = tmp_path / "verdict.json"
    write_verdict(verdict, path)
    assert check(path, policy=loose).verdict == check(path, file, policy=loose).verdict == verdict
    strict = Policy.model_validate({**LOOSE, "alpha": 0.01})
    for records in (file, None):
        with pytest.raises(IntegrityError, match="with other contents than"):
            check(path, records, policy=strict)
    failed = [verdict.gates[0].model_copy(update={"estimate": 0.0}), *verdict.gates[1:]]
    write_verdict(verdict.model_copy(update={"gates": failed}).sealed(), path)  # edited, and its hash renewed
    for records in (file, None):
        with pytest.raises(IntegrityError, match="`gates` would be"):
            check(path, records, policy=loose)
    write_verdict(verdict, path)
    other = saved(made(texts=record.texts, model=record.model, baseline=record.baseline), tmp_path / "other.json")
    with pytest.raises(IntegrityError, match="does not follow from the records"):
        check(path, other, policy=loose)


class Counted:
    """`scoring.score`, counted: how many tokens each look had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        score = scoring.score

        def counted(*arguments: Any) -> EvalRecord:
            found = score(*arguments)
            self.tokens.append(found.text().data.tokens)
            return found

        monkeypatch.setattr("compress.evaluation.gating.sources.score", counted)


def extending(text: Path, limit: float, looks: int = 3) -> Policy:
    return Policy.model_validate(
        {
            "version": 1,
            "data": str(text),
            "on_inconclusive": "extend",
            "looks": looks,
            "gate": [{"id": "kl", "kind": "kl_mean", "max": limit}],
        }
    )


def test_open_questions_are_scored_further(
    record: EvalRecord, tiny: Path, damaged: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("compress.evaluation.gating.scoring.FEWEST_BLOCKS", 2)
    counted = Counted(monkeypatch)
    mean = record.text().summary.kl_mean
    assert mean is not None
    clear = gate(damaged, tiny, extending(text, 10 * mean.estimate), device="cpu")
    assert (clear.verdict, clear.look, clear.looks, len(counted.tokens)) == ("PASS", 1, 3, 1)
    assert clear.alpha_per_look < clear.alpha == 0.05
    counted.tokens.clear()
    never = gate(damaged, tiny, extending(text, mean.estimate), device="cpu")
    assert (never.verdict, never.exit_code, never.look) == ("INCONCLUSIVE", 3, 3)
    first, second, third = counted.tokens
    assert first < second < third == record.text().data.tokens
    assert second == pytest.approx(2 * first, rel=0.1)
    assert "all there is" in never.warnings[-1]
    file = saved(record, tmp_path / "eval.json")
    fixed = gate(file, policy=extending(text, mean.estimate))
    assert (fixed.verdict, fixed.look) == ("INCONCLUSIVE", 1)
    assert "cannot be extended" in fixed.warnings[-1]


def test_no_look_is_taken_on_fewer_blocks_than_bounds_hold_for(
    record: EvalRecord, tiny: Path, damaged: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text has fewer blocks than the smallest look: all of it is scored at once, and never looked at twice."""
    counted = Counted(monkeypatch)
    mean = record.text().summary.kl_mean
    assert mean is not None
    found = gate(damaged, tiny, extending(text, mean.estimate, looks=5), device="cpu")
    assert counted.tokens[0] == record.text().data.tokens
    assert (found.verdict, found.look) == ("INCONCLUSIVE", 1)
    assert "all there is" in found.warnings[-1]
