"""Which kernel computes scores: the engine's numbers are the reference's, and no bit of them depends on batches."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.artifact.attach import attach_eval
from compress.errors import IntegrityError, UserError
from compress.evaluation.evaluate import evaluate
from compress.evaluation.gate import gate, measure_floor
from compress.evaluation.gating.scoring import Scoring
from compress.evaluation.policy import Policy
from compress.evaluation.records import EvalRecord, write_record
from compress.evaluation.scoring_kernel import chosen_kernel, open_runtime
from compress.evaluation.suites import Suite, SuiteGeneration, SuiteTask, SuiteText
from compress.pipeline import run
from compress.recipe import Recipe
from compress.runtime import transformers_backend
from compress.runtime.continuations import Continuation, Likelihood
from tests.evaluation.gate_records import environment, forbid_scoring
from tests.tiny_models import tiny_model, tiny_tokens

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
    assert chosen_kernel([tiny], "cpu", "auto", "auto") == "cpu"
    assert chosen_kernel([tiny, neox], "cpu", "auto", "auto") == "reference"  # both alike
    assert chosen_kernel([neox, "http://host/v1#m"], "cpu", "auto", "auto") == "reference"
    assert chosen_kernel(["http://host/v1#m", tiny], "cpu", "auto", "auto") == "cpu"
    assert chosen_kernel([tiny], "cpu", "bfloat16", "auto") == "reference"
    with monkeypatch.context() as patched:
        patched.setattr(transformers_backend, "chosen_device", lambda _: torch.device("cuda"))
        assert chosen_kernel([tiny], "cuda", "auto", "auto") == "reference"
        assert chosen_kernel([tiny], "cuda", "auto", "triton") == "triton"
    record = evaluate(neox, data=text, device="cpu")
    assert (record.environment.runtime, record.environment.kernel) == ("transformers", "dense")
    with pytest.raises(UserError, match="kernel 'cpu' does not score") as caught:
        evaluate(neox, data=text, device="cpu", kernel="cpu")
    assert caught.value.hint == "use --kernel reference"
    with pytest.raises(UserError, match="does not compute in bfloat16"):
        evaluate(tiny, data=text, device="cpu", dtype="bfloat16", kernel="cpu")
    with pytest.raises(UserError, match="kernel 'fast' is not available"):
        evaluate(tiny, data=text, device="cpu", kernel="fast")


def test_a_packed_model_that_the_engine_leaves_is_told_of(
    neox: Path, artifact: Path, tiny: Path, rtn: Recipe, tmp_path: Path
) -> None:
    told: list[str] = []

    class Told:
        def warn(self, message: str) -> None:
            told.append(message)

    def chosen(*models: Path, dtype: str = "auto") -> str:
        return chosen_kernel(models, "cpu", dtype, "auto", Told())  # type: ignore[arg-type]

    packed = run(rtn, model=neox, output=tmp_path / "packed").artifact.path
    for models, named in (((packed, neox), packed), ((artifact, neox), neox)):
        assert chosen(*models) == "reference"
        said = told.pop()
        assert said.startswith(f"scored in transformers, on decoded weights: {named.name}: models of type gpt_neox are")
        assert "stay packed" not in said
    assert chosen(artifact, dtype="bfloat16") == "reference"
    assert told.pop().endswith("the engine does not compute in bfloat16")
    assert chosen(neox) == chosen(tiny, neox) == "reference"
    assert told == []  # nothing is decoded


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


def policy_on(text: Path, kind: str = "kl_mean", limit: str = "max", **changed: Any) -> Policy:
    gates = [{"id": "g", "kind": kind, limit: 100.0}]
    return Policy.model_validate({"version": 1, "data": str(text), "gate": gates, **changed})


@pytest.fixture
def record_file(record: EvalRecord, tmp_path: Path) -> Path:
    """Scores of a damaged model, by the engine."""
    write_record(record, tmp_path / "scored.json")
    return tmp_path / "scored.json"


def test_a_gate_takes_scores_of_the_kernel_that_is_named(
    artifact: Path, tiny: Path, text: Path, record_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach_eval(artifact, evaluate(artifact, tiny, data=text, device="cpu").model_dump(mode="json"))
    forbid_scoring(monkeypatch)
    for kernel in ("auto", "cpu"):
        assert gate(artifact, tiny, policy_on(text), device="cpu", kernel=kernel).verdict == "PASS"
        assert gate(record_file, policy=policy_on(text), kernel=kernel).verdict == "PASS"
    for kernel in ("cpu-int8", "triton", "reference"):
        with pytest.raises(AssertionError, match="scored again"):
            gate(artifact, tiny, policy_on(text), device="cpu", kernel=kernel)
        for candidate in (artifact, record_file):
            with pytest.raises(UserError, match=f"are by kernel cpu, not by --kernel {kernel}"):
                gate(candidate, policy=policy_on(text), kernel=kernel)


@pytest.mark.parametrize("kernel", ["cpu", "cpu-int8", "reference"])
def test_a_candidate_is_scored_as_the_file_of_its_baseline_was(
    kernel: str, artifact: Path, tiny: Path, damaged: Path, text: Path, tmp_path: Path
) -> None:
    policy, base = policy_on(text, "ppl_ratio", "max_increase"), tmp_path / "base.json"
    write_record(evaluate(tiny, data=text, device="cpu", kernel=kernel), base)
    verdict = gate(artifact, base, policy, device="cpu")
    assert (verdict.verdict, verdict.environment.scoring_kernel()) == ("PASS", kernel)
    other = "cpu" if kernel == "reference" else "reference"
    attached = evaluate(artifact, damaged, data=text, device="cpu", kernel=other)  # against another model
    attach_eval(artifact, attached.model_dump(mode="json"))
    again = gate(artifact, base, policy, device="cpu")
    assert (again.verdict, again.environment.scoring_kernel()) == ("PASS", kernel)
    with pytest.raises(UserError, match=f"the scores of .*base.json are by kernel {kernel}, not by --kernel {other}"):
        gate(artifact, base, policy, device="cpu", kernel=other)


def test_a_candidate_is_scored_in_the_dtype_of_the_file(artifact: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    policy, base = policy_on(text, "ppl_ratio", "max_increase"), tmp_path / "base.json"
    write_record(evaluate(tiny, data=text, device="cpu", dtype="bfloat16"), base)
    verdict = gate(artifact, base, policy)
    assert (verdict.verdict, verdict.environment.dtype) == ("PASS", "bfloat16")


def test_own_scores_of_two_kernels_are_not_compared(artifact: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(artifact, tmp_path / "other"))
    for path, kernel in ((artifact, "auto"), (other, "reference")):
        attach_eval(path, evaluate(path, tiny, data=text, device="cpu", kernel=kernel).model_dump(mode="json"))
    policy = policy_on(text, "ppl_ratio", "max_increase", allow_identical=True)
    verdict = gate(artifact, other, policy, device="cpu")  # the same weights, scored anew and together
    assert (verdict.verdict, verdict.gates[0].estimate) == ("PASS", 0.0)
    assert verdict.environment.scoring_kernel() == "cpu"


def test_several_baselines_are_scored_with_one_kernel(
    artifact: Path, tiny: Path, neox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Scoring(device="cpu").for_all([artifact, tiny, tiny]).kernel == "cpu"
    assert Scoring(device="cpu").for_all([artifact, tiny, neox]).kernel == "reference"
    assert Scoring(device="cpu", kernel="cpu-int8").for_all([artifact, tiny, neox]).kernel == "cpu-int8"

    def asked(_candidate: Path, baseline: Path | None, _policy: Policy, scoring: Scoring, _share: float) -> None:
        raise AssertionError(f"{baseline == tiny} {scoring.kernel}")

    monkeypatch.setattr("compress.evaluation.gating.sources.score", asked)
    with pytest.raises(AssertionError, match="True reference"):
        gate(artifact, {"root": tiny, "other": neox}, device="cpu")


def test_a_changed_artifact_is_found_before_it_is_looked_at(artifact: Path, tiny: Path, text: Path) -> None:
    config = artifact / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"lama"'))
    for kernel in ("auto", "cpu", "reference"):
        with pytest.raises(IntegrityError):
            evaluate(artifact, tiny, data=text, device="cpu", kernel=kernel)


def test_likelihoods_are_the_same_alone_and_together(artifact: Path) -> None:
    runtime = open_runtime(artifact, "cpu", "auto", "cpu")
    beginning = tiny_tokens(1, 20, seed=1)[0].tolist()
    ends = [tiny_tokens(1, 3 + i, seed=2 + i)[0].tolist() for i in range(6)]
    requests = [Continuation((*beginning, *end), 20) for end in ends] + [Continuation(tuple(ends[-1]), 1)]

    def scored(asked: list[Continuation]) -> dict[int, Likelihood]:
        found: dict[int, Likelihood] = {}
        for batch in runtime.plan_continuations(asked):
            found.update(zip(batch.requests, runtime.score_continuations(batch), strict=True))
        return found

    together = scored(requests)
    assert len(runtime.plan_continuations(requests)) < len(requests)
    assert [scored([request])[0] for request in requests] == [together[i] for i in range(len(requests))]


def test_a_text_of_the_whole_context_is_scored(tmp_path: Path) -> None:
    path = tiny_model("llama", tmp_path / "long", max_position_embeddings=40_000, num_hidden_layers=1)
    runtime = open_runtime(path, "cpu", "auto", "cpu")
    assert runtime.context_length == 40_000
    assert runtime.score(tiny_tokens(1, 33_000)).shape[1] == 33_000


@pytest.mark.parametrize(
    ("runtime", "kernel", "named"),
    [
        ("native", "cpu-avx512bf16", "cpu"),
        ("native", "cpu-avx2", "cpu"),
        ("native", "cpu-avx2-int8", "cpu-int8"),
        ("gpu", "triton", "triton"),
        ("transformers", "dense", "reference"),
        ("endpoint", "remote", None),
    ],
)
def test_a_record_says_what_computed_it(runtime: str, kernel: str, named: str | None) -> None:
    record = environment(runtime=runtime, kernel=kernel)
    assert record.scoring_kernel() == named
    other = environment(runtime=runtime, kernel=kernel.replace("avx2", "avx512bf16"))
    assert other.arithmetic() == record.arithmetic()  # an instruction set changes the last bits alone
    for each in ("cpu", "cpu-int8", "triton", "reference"):
        assert Scoring(kernel=each).takes(record) == (each == named)
    assert Scoring().takes(record)


def test_the_floor_that_is_missing_is_named_with_its_kernel(artifact: Path, tiny: Path, text: Path) -> None:
    verdict = gate(artifact, tiny, policy_on(text), device="cpu", kernel="reference")
    assert verdict.noise_floor().endswith("--baseline MODEL --kernel reference` measures it")
