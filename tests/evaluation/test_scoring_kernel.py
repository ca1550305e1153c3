"""Which kernel computes scores: the engine's numbers are the reference's, and no bit of them depends on batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.artifact.attach import attach_eval
from compress.errors import UserError
from compress.evaluation.evaluate import evaluate
from compress.evaluation.gate import gate, measure_floor
from compress.evaluation.gating.scoring import computed_with
from compress.evaluation.policy import Policy
from compress.evaluation.records import EvalRecord
from compress.evaluation.scoring_kernel import chosen_kernel, open_runtime
from compress.evaluation.suites import Suite, SuiteGeneration, SuiteTask, SuiteText
from compress.pipeline import run
from compress.recipe import Recipe
from compress.runtime import transformers_backend
from tests.evaluation.gate_records import environment
from tests.tiny_models import tiny_model

RTN = Recipe.model_validate(
    {"stages": [{"method": "rtn", "scheme": {"bits": 4, "group_size": 32}, "kind": "quantize"}]}
)
ENGINE_FAMILIES = ("llama", "gemma3_text", "mixtral")


def summed(record: EvalRecord) -> dict[str, Any]:
    """All that a record holds of a text, but for the time it took."""
    return record.text().model_dump(exclude={"seconds"})


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("gpt_neox", tmp_path_factory.mktemp("neox"))


def test_the_engine_scores_where_nothing_is_said(artifact: Path, tiny: Path, text: Path) -> None:
    ours = evaluate(artifact, tiny, data=text, device="cpu")
    theirs = evaluate(artifact, tiny, data=text, device="cpu", kernel="reference")
    assert (ours.environment.runtime, theirs.environment.runtime) == ("native", "transformers")
    assert (ours.model, ours.baseline) == (theirs.model, theirs.baseline)
    assert ours.text().data == theirs.text().data
    for name in ("nll", "kl"):
        mine, other = (torch.tensor(getattr(record.text().clusters, name)) for record in (ours, theirs))
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert ours.text().clusters.top1_agree == theirs.text().clusters.top1_agree


@pytest.mark.parametrize("kernel", ["auto", "cpu-int8"])
def test_no_bit_depends_on_batches_or_threads(kernel: str, artifact: Path, tiny: Path, text: Path) -> None:
    options: dict[str, Any] = {"data": text, "device": "cpu", "kernel": kernel}
    many = evaluate(artifact, tiny, batch_tokens=512, **options)
    torch.set_num_threads(2)
    assert summed(evaluate(artifact, tiny, batch_tokens=64, **options)) == summed(many)


def test_the_floor_of_the_engine_is_zero(artifact: Path, text: Path, packaged_model: Path) -> None:
    policy = Policy.model_validate(
        {"version": 1, "data": str(text), "max_tokens": 3000, "gate": [{"id": "kl", "kind": "kl_mean", "max": 0.1}]}
    )
    for model, kernel in ((artifact, "auto"), (artifact, "cpu-int8"), (packaged_model, "cpu")):
        noise = measure_floor(model, policy, device="cpu", kernel=kernel)
        assert noise.environment.runtime == "native"
        assert noise.largest()["kl_mean"] == 0.0
        assert all(value == 0.0 for value in noise.largest().values())


def test_tasks_and_answers_are_those_of_the_reference(artifact: Path, tiny: Path, text: Path) -> None:
    pytest.importorskip("lm_eval")
    suite = Suite(
        name="both",
        texts=[SuiteText(name=str(text), max_tokens=4200)],
        tasks=[SuiteTask(name="blimp", items=4)],
        generation=SuiteGeneration(prompts=("Once upon a time", "The end"), max_tokens=8),
    )
    ours, theirs = (
        evaluate(artifact, tiny, suite=suite, device="cpu", kernel=kernel) for kernel in ("auto", "reference")
    )
    assert ours.tasks[0].item_ids == theirs.tasks[0].item_ids
    assert (ours.tasks[0].correct, ours.tasks[0].correct_baseline) == (
        theirs.tasks[0].correct,
        theirs.tasks[0].correct_baseline,
    )
    assert ours.generation is not None
    assert ours.generation == theirs.generation


def test_what_the_engine_does_not_compute_is_scored_in_transformers(
    neox: Path, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen_kernel(tiny, None, "cpu", "auto", "auto") == "cpu"
    assert chosen_kernel(tiny, neox, "cpu", "auto", "auto") == "reference"  # both alike
    assert chosen_kernel(neox, "http://host/v1#m", "cpu", "auto", "auto") == "reference"
    assert chosen_kernel("http://host/v1#m", tiny, "cpu", "auto", "auto") == "cpu"
    assert chosen_kernel(tiny, None, "cpu", "bfloat16", "auto") == "reference"
    with monkeypatch.context() as patched:
        patched.setattr(transformers_backend, "chosen_device", lambda _: torch.device("cuda"))
        assert chosen_kernel(tiny, None, "cuda", "auto", "auto") == "reference"
        assert chosen_kernel(tiny, None, "cuda", "auto", "triton") == "triton"
    record = evaluate(neox, data=text, device="cpu")
    assert (record.environment.runtime, record.environment.kernel) == ("transformers", "dense")
    with pytest.raises(UserError, match="kernel 'cpu' does not score") as caught:
        evaluate(neox, data=text, device="cpu", kernel="cpu")
    assert caught.value.hint == "use --kernel reference"
    with pytest.raises(UserError, match="does not compute in bfloat16"):
        evaluate(tiny, data=text, device="cpu", dtype="bfloat16", kernel="cpu")
    with pytest.raises(UserError, match="kernel 'fast' is not available"):
        evaluate(tiny, data=text, device="cpu", kernel="fast")


def test_a_packed_model_that_the_engine_leaves_is_told_of(neox: Path, tmp_path: Path) -> None:
    told: list[str] = []

    class Told:
        def warn(self, message: str) -> None:
            told.append(message)

    packed = run(RTN, model=neox, output=tmp_path / "packed").artifact.path
    assert chosen_kernel(packed, neox, "cpu", "auto", "auto", Told()) == "reference"  # type: ignore[arg-type]
    (message,) = told
    assert message.startswith("scored in transformers, on decoded weights: ")
    told.clear()
    assert chosen_kernel(neox, None, "cpu", "auto", "auto", Told()) == "reference"  # type: ignore[arg-type]
    assert told == []


@pytest.mark.parametrize("family", ENGINE_FAMILIES)
def test_models_are_recorded_alike(family: str, tmp_path: Path) -> None:
    from compress.evaluation.identity import model_record

    path = tiny_model(family, tmp_path / "model")
    ours, theirs = (open_runtime(path, "cpu", "auto", kernel) for kernel in ("cpu", "reference"))
    assert (ours.name, ours.deterministic) == ("native", True)
    assert model_record(ours) == model_record(theirs)
    assert (ours.context_length, ours.vocab_size, ours.prefix_id) == (
        theirs.context_length,
        theirs.vocab_size,
        theirs.prefix_id,
    )


def test_a_gate_takes_scores_of_the_kernel_that_is_named(
    artifact: Path, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.model_validate(
        {"version": 1, "data": str(text), "gate": [{"id": "kl", "kind": "kl_mean", "max": 100.0}]}
    )
    attach_eval(artifact, evaluate(artifact, tiny, data=text, device="cpu").model_dump(mode="json"))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr("compress.evaluation.gating.sources.score", refuse)
    for kernel in ("auto", "cpu"):
        assert gate(artifact, tiny, policy, device="cpu", kernel=kernel).verdict == "PASS"
    for kernel in ("cpu-int8", "triton", "reference"):
        with pytest.raises(AssertionError, match="scored again"):
            gate(artifact, tiny, policy, device="cpu", kernel=kernel)


@pytest.mark.parametrize(
    ("runtime", "kernel", "named"),
    [
        ("native", "cpu-avx512vnni", "cpu"),
        ("native", "cpu-avx512vnni-int8", "cpu-int8"),
        ("gpu", "triton", "triton"),
        ("transformers", "dense", "reference"),
    ],
)
def test_a_record_says_what_computed_it(runtime: str, kernel: str, named: str) -> None:
    record = environment(runtime=runtime, kernel=kernel)
    assert [name for name in ("cpu", "cpu-int8", "triton", "reference") if computed_with(record, name)] == [named]
