"""Training a student: what is learned, kept, recorded, resumed and refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import pipeline
from compress.artifact import durable
from compress.artifact.reader import Artifact
from compress.artifact.verify import verify
from compress.errors import CompressError, IntegrityError, UserError, WorkError
from compress.pipeline import distill_loop, distill_stage
from compress.pipeline.distill_job import DistillJob
from compress.pipeline.distill_student import load_student
from compress.pipeline.resolve import resolve
from compress.recipe import Recipe, load_recipe, parse_recipe
from compress.recipe_distill import DistillSettings, build_distill_recipe
from compress.recipe_prune import PruneSettings, build_prune_recipe
from tests.pipeline import harness
from tests.pipeline.killed import killed_midway

FAMILIES = (
    *(("llama", 0), ("llama", 4), ("qwen3", 4), ("gemma2", 0), ("gpt2", 4), ("opt", 0), ("phi3", 4), ("gpt_neox", 0)),
    *(("mixtral", 0), ("mixtral", 4), ("qwen3_moe", 4), ("deepseek_v3", 0)),
)  # and the rank of adapters


def recipe(teacher: Path, text: Path, **settings: Any) -> Recipe:
    """A short training of a tiny student."""
    usual = {"data": str(text), "seq_len": 24, "samples": 44, "steps": 6, "batch_size": 4}
    return build_distill_recipe(DistillSettings(**{"teacher": str(teacher), **usual, **settings}))


@pytest.fixture(scope="module")
def pair(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher, and a student that is the teacher with noise on its matrices."""
    return disturbed("llama", tiny, tmp_path_factory.mktemp("pair") / "student")


def disturbed(family: str, tiny: Callable[..., Path], target: Path) -> tuple[Path, Path]:
    def noisy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        inside = harness.block_matrices(state)
        noise = {name: torch.randn(t.shape, generator=generator) for name, t in sorted(state.items())}
        return {n: t + 0.3 * t.std() * noise[n] if n in inside else t for n, t in state.items()}

    teacher = tiny(family)
    return teacher, harness.copy_with(teacher, target, noisy)


@pytest.mark.parametrize(("family", "rank"), FAMILIES)
def test_every_family_learns_and_loads(
    family: str, rank: int, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    teacher, student = disturbed(family, tiny, tmp_path / "student")
    settings = {"full": True} if not rank else {"lora_rank": rank}
    wanted = recipe(teacher, text, learning_rate=1e-2 if rank else 2e-3, steps=8, **settings)
    artifact = pipeline.run(wanted, model=student, output=tmp_path / "out").artifact
    learned = artifact.training()
    assert learned is not None
    assert learned["written_kl"] < 0.95 * learned["held_out"][0]["kl"]
    assert learned["written_kl"] == pytest.approx(min(p["kl"] for p in learned["held_out"]), rel=1e-3)
    before, after = harness.tensors(student), harness.tensors(artifact.path)
    assert before.keys() == after.keys()
    matrices = harness.block_matrices(before)
    for name, tensor in after.items():
        action = artifact.manifest.ledger[name].action
        if name in matrices:
            assert action == ("merged" if rank else "trained")
            assert not torch.equal(tensor, before[name])
        elif rank:
            assert action == "kept"
            assert torch.equal(tensor, before[name])
    assert verify(artifact.path).ok
    harness.loaded_logits(artifact.path, torch.arange(20)[None])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_learn_as_the_model_that_transformers_runs(
    family: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    teacher, student = disturbed(family, tiny, tmp_path / "student")
    job = resolve(recipe(teacher, text), model=student, output=tmp_path / "out", device="cpu")
    assert isinstance(job, DistillJob)
    tokens = job.held_out[0]
    live = load_student(job).eval()
    assert harness.distance(harness.logits(live, tokens), harness.loaded_logits(student, tokens)) < 1e-5
    names = {job.skeleton.stored_name(name) for name, _ in live.named_parameters()}
    assert names <= harness.tensors(student).keys()
    assert sum(".experts." in name for name in names) >= 3 * 8, "each expert has three matrices of its own"


def test_the_artifact_tells_how_it_learned(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    teacher, student = pair
    artifact = pipeline.run(recipe(teacher, text), model=student, output=tmp_path / "out").artifact
    learned, manifest = artifact.training(), artifact.manifest
    assert learned is not None
    assert (learned["done"], learned["steps"], len(learned["losses"])) == (6, 6, 6)
    assert learned["held_out"][0]["step"] == 0
    assert [(p.stage, p.name) for p in manifest.parents] == [("teach", teacher.name), ("distill", "student")]
    card = (artifact.path / "README.md").read_text()
    assert "| step | held-out KL |" in card
    assert artifact.scheme == "lora16"
    again = load_recipe(artifact.path / "recipe.yaml")
    repeated = pipeline.run(again, output=tmp_path / "again").artifact
    assert repeated.artifact_id == artifact.artifact_id
    assert pipeline.run(again, output=tmp_path / "again").complete_already


def test_a_run_by_minutes_records_its_steps_and_its_recipe_makes_the_same_bytes(
    pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    teacher, student = pair
    wanted = recipe(teacher, text, steps=None, minutes=0.02)
    artifact = pipeline.run(wanted, model=student, output=tmp_path / "out").artifact
    again = load_recipe(artifact.path / "recipe.yaml")
    (stage,) = again.stages
    assert stage.steps == artifact.training()["steps"] >= 1  # type: ignore[union-attr, index]
    assert again.hash() == wanted.hash()
    assert pipeline.run(again, output=tmp_path / "again").artifact.artifact_id == artifact.artifact_id
    assert pipeline.run(wanted, model=student, output=tmp_path / "out").complete_already


@pytest.mark.parametrize("rank", [0, 4])
def test_zeros_of_a_pruned_student_stay(rank: int, tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    teacher = tiny("llama")
    sparse = build_prune_recipe(PruneSettings(method="magnitude", pattern="2:4"))[0]
    student = pipeline.run(sparse, model=teacher, output=tmp_path / "sparse").artifact
    settings = {"full": True} if not rank else {"lora_rank": rank}
    artifact = pipeline.run(recipe(teacher, text, **settings), model=student.path, output=tmp_path / "out").artifact
    before, after = harness.tensors(student.path), harness.tensors(artifact.path)
    for name in harness.block_matrices(before):
        assert not after[name][before[name] == 0].any(), name
        assert not torch.equal(after[name], before[name])
    learned = artifact.training()
    assert learned is not None
    assert learned["zeros"] == sum(int((before[n] == 0).sum()) for n in harness.block_matrices(before))
    assert learned["written_kl"] < learned["held_out"][0]["kl"]
    assert all(layer["details"]["zeros"] >= layer["details"]["zeros_before"] for layer in artifact.layers())
    assert [p.stage for p in artifact.manifest.parents] == ["prune", "teach", "distill"]


def test_a_student_in_bfloat16_learns(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    def half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.bfloat16() for name, tensor in state.items()}

    teacher, student = (harness.copy_with(path, tmp_path / f"half-{path.name}", half) for path in pair)
    ways: dict[str, dict[str, Any]] = {
        "full": {"full": True, "learning_rate": 2e-3},
        "adapted": {"lora_rank": 4, "learning_rate": 1e-2},
    }
    for name, settings in ways.items():
        output = tmp_path / name
        artifact = pipeline.run(recipe(teacher, text, steps=8, **settings), model=student, output=output).artifact
        learned = artifact.training()
        assert learned is not None
        assert learned["written_kl"] < 0.95 * learned["held_out"][0]["kl"]
        assert {record.dtype for record in artifact.manifest.tensors.values()} == {"BF16"}


def test_the_bytes_depend_on_seed_and_text_and_not_on_threads(
    pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    teacher, student = pair

    def made(name: str, threads: int = 1, **settings: Any) -> str:
        torch.set_num_threads(threads)
        done = pipeline.run(recipe(teacher, text, steps=3, **settings), model=student, output=tmp_path / name)
        return done.artifact.artifact_id

    first = made("one")
    assert made("two", threads=3) == first
    assert made("seed", seed=1) != first


@pytest.mark.parametrize("settings", [{"full": True}, {"lora_rank": 4}, {"full": True, "loss": "hidden"}])
def test_a_run_that_stops_anywhere_resumes_to_the_same_bytes(
    settings: dict[str, Any], pair: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = pair
    wanted = recipe(teacher, text, **settings)
    whole = pipeline.run(wanted, model=student, output=tmp_path / "whole").artifact
    monkeypatch.setattr(distill_stage, "CHECKPOINT_SECONDS", 0.0)
    stops = (
        "before write step-000002.safetensors",
        "before write weights.safetensors",
        "before write model.safetensors",
    )
    for number, label in enumerate(stops):
        output = tmp_path / str(number)
        monkeypatch.setattr(durable, "step", harness.failing_at(label))
        with pytest.raises(WorkError, match="the disk is full"):
            pipeline.run(wanted, model=student, output=output)
        assert not output.exists()
        monkeypatch.setattr(durable, "step", lambda label: None)
        result = pipeline.run(wanted, model=student, output=output)
        assert result.artifact.artifact_id == whole.artifact_id, label
        assert result.artifact.training() == whole.training(), label
        assert result.resumed_blocks + result.computed_blocks == 6


def test_killed_in_the_middle_it_resumes_to_the_same_bytes(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    teacher, student = pair
    wanted = recipe(teacher, text, steps=30, full=True, student=str(student))
    wanted = wanted.model_copy(update={"stages": [wanted.stages[0].model_copy(update={"patience": 30})]})
    killed_midway(wanted, tmp_path / "out")
    resumed = pipeline.run(wanted, output=tmp_path / "out")
    assert resumed.resumed_blocks >= 3
    whole = pipeline.run(wanted, output=tmp_path / "whole")
    assert resumed.artifact.artifact_id == whole.artifact.artifact_id
    assert resumed.artifact.training() == whole.artifact.training()


def test_a_quantised_model_teaches_without_a_word_on_the_terminal(
    pair: tuple[Path, Path], text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    teacher = pipeline.run(harness.recipe("rtn"), model=pair[0], output=tmp_path / "packed").artifact
    capfd.readouterr()
    made = pipeline.run(recipe(teacher.path, text, full=True), model=pair[1], output=tmp_path / "out").artifact
    assert capfd.readouterr() == ("", "")
    assert [parent.stage for parent in made.manifest.parents if parent.stage == "teach"] == ["teach"]
    learned = made.training()
    assert learned is not None
    assert learned["written_kl"] < learned["held_out"][0]["kl"]


def test_training_stops_once_nothing_gets_better_and_keeps_the_best(
    pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    teacher, student = pair
    wanted = recipe(teacher, text, steps=40, learning_rate=0.5, full=True)
    artifact = pipeline.run(wanted, model=student, output=tmp_path / "out").artifact
    learned = artifact.training()
    assert learned is not None
    assert learned["stopped_early"]
    (fallback,) = artifact.manifest.fallbacks
    assert (fallback.name, fallback.action) == ("training", "left as it was")
    assert (learned["best_step"], learned["done"]) == (0, 10 + 2 * 5), "a quarter of the steps, and five measurements"
    before, after = harness.tensors(student), harness.tensors(artifact.path)
    assert all(torch.equal(before[name], after[name]) for name in before), "the best were the first"


def test_a_loss_that_is_not_finite_ends_the_run_and_nothing_is_published(
    pair: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = pair
    monkeypatch.setattr(distill_stage, "CHECKPOINT_SECONDS", 0.0)
    right = distill_loop.losses.loss
    calls: list[int] = []

    def broken(*given: Any) -> torch.Tensor:
        calls.append(1)
        return right(*given) * (torch.nan if len(calls) > 5 else 1.0)

    monkeypatch.setattr(distill_loop.losses, "loss", broken)
    with pytest.raises(WorkError, match="nan at step 2") as caught:
        pipeline.run(recipe(teacher, text), model=student, output=tmp_path / "out")
    assert "--learning-rate" in caught.value.hint
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(distill_loop.losses, "loss", right)
    resumed = pipeline.run(recipe(teacher, text), model=student, output=tmp_path / "out")
    assert resumed.resumed_blocks == 2
    whole = pipeline.run(recipe(teacher, text), model=student, output=tmp_path / "whole")
    assert resumed.artifact.artifact_id == whole.artifact.artifact_id


def test_a_teacher_that_says_nothing_finite_is_told_apart_from_divergence(
    pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    def broken(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: t * torch.nan if name.endswith("norm.weight") else t for name, t in state.items()}

    teacher = harness.copy_with(pair[0], tmp_path / "broken", broken)
    with pytest.raises(WorkError, match="before the first step"):
        pipeline.run(recipe(teacher, text), model=pair[1], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (teacher / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    with pytest.raises(UserError, match="transformers cannot load"):
        pipeline.run(recipe(teacher, text), model=pair[1], output=tmp_path / "out")


def changed_tokenizer(source: Path, target: Path) -> Path:
    """The model with two tokens of its tokenizer exchanged."""
    shutil.copytree(source, target)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    return target


def test_other_tokenizers_are_refused(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    teacher, student = pair
    other = changed_tokenizer(teacher, tmp_path / "other")
    with pytest.raises(IntegrityError, match=r"different tokenizers: token .* has another id"):
        pipeline.run(recipe(other, text), model=student, output=tmp_path / "out")


def test_a_vocabulary_that_is_only_padded_is_cut(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    teacher, student = pair
    padded = Path(shutil.copytree(teacher, tmp_path / "padded"))
    state = load_file(padded / "model.safetensors")
    name = next(n for n in state if "embed_tokens" in n)
    state[name] = torch.cat([state[name], torch.ones(5, state[name].shape[1])])
    save_file(state, padded / "model.safetensors", {"format": "pt"})
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 5}))
    learned = pipeline.run(recipe(padded, text), model=student, output=tmp_path / "out").artifact.training()
    plain = pipeline.run(recipe(teacher, text), model=student, output=tmp_path / "plain").artifact.training()
    assert learned is not None
    assert plain is not None
    assert learned["losses"] == pytest.approx(plain["losses"], rel=1e-4)


def test_what_cannot_be_trained_is_refused_before_any_work(
    pair: tuple[Path, Path], tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    teacher, student = pair
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")

    def refused(kind: type[CompressError], words: str, wanted: Recipe, model: Path) -> None:
        with pytest.raises(kind, match=words):
            pipeline.run(wanted, model=model, output=tmp_path / "out")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt"]

    refused(UserError, "no model|not a directory|neither", recipe(tmp_path / "nowhere", text), student)
    refused(UserError, "is empty", recipe(teacher, empty), student)
    refused(UserError, "too few", recipe(teacher, text, samples=17), student)
    refused(UserError, "the same model", recipe(teacher, text), teacher)
    for settings in ({"minutes": 1.0}, {"full": True, "lora_rank": 2}, {"temperature": 2.0, "loss": "ce"}):
        with pytest.raises(UserError):
            recipe(teacher, text, **settings)


def test_without_peft_adapters_are_refused_with_a_hint(
    pair: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = pair
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="needs peft") as caught:
        pipeline.run(recipe(teacher, text), model=student, output=tmp_path / "out")
    assert "compress[distill]" in caught.value.hint


@pytest.mark.parametrize("loss", ["jsd", "topk-kl", "sampled-kl", "hidden", "ce"])
def test_every_loss_trains(loss: str, pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    teacher, student = pair
    wanted = recipe(teacher, text, loss=loss, full=True, learning_rate=2e-3, steps=8)
    artifact = pipeline.run(wanted, model=student, output=tmp_path / "out").artifact
    learned = artifact.training()
    assert learned is not None
    assert learned["losses"][-1] < learned["losses"][0]
    assert artifact.method == loss
    assert Artifact.open(artifact.path).manifest.parents[0].stage == "teach"


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_hidden_states_teach_a_student_of_another_width_and_depth(
    distance: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    teacher = tiny("llama")
    student = tiny("llama", hidden_size=48, num_hidden_layers=1)
    wanted = recipe(teacher, text, full=True, learning_rate=5e-3, steps=10)
    method = {"kind": "hidden", "distance": distance}
    stage = {**wanted.stages[0].model_dump(), "method": method}
    artifact = pipeline.run(parse_recipe({"stages": [stage]}), model=student, output=tmp_path / "out").artifact
    learned = artifact.training()
    assert learned is not None
    assert learned["losses"][-1] < 0.98 * learned["losses"][0]
    assert learned["written_kl"] < learned["held_out"][0]["kl"]
    assert harness.tensors(artifact.path).keys() == harness.tensors(student).keys(), "projections are not written"


def test_a_plan_says_what_would_be_trained_and_writes_nothing(
    pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    teacher, student = pair
    before = harness.snapshot(tmp_path)
    plan = pipeline.plan(recipe(teacher, text), model=student, output=tmp_path / "out")
    assert isinstance(plan, pipeline.DistillPlan)
    assert (plan.steps, plan.weights, plan.windows, plan.held_out) == (6, "lora16", 28, 16)
    assert 0 < plan.trained < plan.parameters
    assert min(plan.peak_memory_bytes, plan.seconds_estimate) > 0
    assert harness.snapshot(tmp_path) == before
    same = pipeline.plan(recipe(teacher, text), model=teacher, output=tmp_path / "out")
    assert same.problems == ["teacher and student are the same model"]
