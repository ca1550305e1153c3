"""A whole search on a tiny model: what it measures, what it makes, and that the same comes out again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import pipeline
from compress.artifact.lock import FileLock
from compress.artifact.verify import verify
from compress.errors import UserError
from compress.models.checkpoint import Checkpoint
from compress.pipeline.run import deterministic
from compress.progress import NullProgress
from compress.quantization.configs import SmoothQuantConfig
from compress.quantization.grid import quantize, search_grid
from compress.recipe import Recipe, load_recipe
from compress.workflows.budget import search as searching
from compress.workflows.budget import sensitivity
from compress.workflows.budget.divergence import divergence
from compress.workflows.budget.losses import anchors
from compress.workflows.budget.measured import MEASURING_WINDOWS, Search, open_search
from compress.workflows.budget.plan import plan_budget
from compress.workflows.budget.recipes import open_stage
from compress.workflows.budget.room import file_bytes
from compress.workflows.budget.search import BudgetResult, Solver, quantize_to_budget
from compress.workflows.budget.target import Target
from tests.pipeline import harness

BITS = Target("bits", 3.6)


@pytest.fixture
def search(source: Path, recipe: Callable[..., Recipe]) -> Callable[..., BudgetResult]:
    """search(target, output, **stage): without scoring."""

    def make(target: Target, output: Path, **stage: Any) -> BudgetResult:
        return quantize_to_budget(recipe(**stage), target, model=source, output=output, evaluate=False)

    return make


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short front; pictures are drawn by one test alone."""
    monkeypatch.setattr(searching, "FRONT_POINTS", 2)
    if "again" not in request.node.name:
        monkeypatch.setattr(searching, "png", lambda figure: b"no picture")
        monkeypatch.setattr(searching, "picture", lambda report: None)


def linears_of(unit: str) -> list[str]:
    """The names that a unit of several linears joins by `+`."""
    first, *others = unit.split("+")
    return [first, *(f"{first.rpartition('.')[0]}.{other}" for other in others)]


def opened(recipe: Recipe, source: Path) -> Search:
    return open_search(recipe, model=source, output=None, device="cpu", group_sizes=None)


def test_a_search_makes_the_best_mixture_and_the_recipe_makes_it_again(
    search: Callable[..., BudgetResult], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = search(BITS, tmp_path / "out")
    artifact, report = result.made.artifact, result.report
    made = artifact.manifest.sizes.bits_per_weight
    assert made is not None
    assert report.chosen.bits_per_weight == pytest.approx(made, abs=1e-6)
    assert BITS.value * 0.97 < made <= BITS.value
    chosen = {name: unit.scheme for unit in report.units for name in linears_of(unit.name)}
    assert {layer["name"]: layer["scheme"] for layer in artifact.layers()} == chosen
    assert len(set(chosen.values())) > 1
    better = [point for point in report.uniform if point.bits_per_weight <= made]
    assert better
    assert all(report.chosen.predicted_kl < point.predicted_kl for point in better)
    assert report.chosen.measured_kl is not None
    assert json.loads((artifact.path / "budget.json").read_text()) == report.document()
    assert (artifact.path / "budget.png").read_bytes()[:4] == b"\x89PNG"
    assert verify(artifact.path).problems == []
    again = pipeline.run(load_recipe(artifact.path / "recipe.yaml"), output=tmp_path / "again").artifact
    assert harness.tensor_hashes(again) == harness.tensor_hashes(artifact)
    # The same command measures nothing and makes nothing.
    measuring = sensitivity._measure
    monkeypatch.setattr(sensitivity, "_measure", None)
    monkeypatch.setattr(searching, "divergence", None)
    repeated = search(BITS, tmp_path / "out")
    assert repeated.made.complete_already
    assert repeated.report == report
    # Another cache finds the same.
    monkeypatch.setattr(sensitivity, "_measure", measuring)
    monkeypatch.setattr(searching, "divergence", divergence)
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "other"))
    torch.set_num_threads(2)
    elsewhere = search(BITS, tmp_path / "elsewhere")
    assert (elsewhere.made.artifact.path / "budget.json").read_bytes() == (artifact.path / "budget.json").read_bytes()
    assert harness.tensor_hashes(elsewhere.made.artifact) == harness.tensor_hashes(artifact)


def test_an_interrupted_measurement_goes_on(
    source: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(NullProgress):
        left = 3

        def advance(self, note: str = "") -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    with deterministic() as workers:
        whole = opened(recipe(), source)
        with pytest.raises(KeyboardInterrupt):
            whole.losses(workers, Stop())
        kept = whole.known()
        assert len(kept) == 3
        plan = plan_budget(whole, BITS)
        assert (plan.measurements, plan.known) == (3 * 8, 3 * 3)
        resumed = whole.losses(workers, NullProgress())
        monkeypatch.setenv("COMPRESS_CACHE", str(whole.directory / "fresh"))
        assert opened(recipe(), source).losses(workers, NullProgress()) == resumed
        other = opened(recipe(method={"kind": "gptq", "damp_frac": 0.02}), source)
        assert other.fingerprint != whole.fingerprint


def test_a_divergence_is_the_kl_of_transformers_with_that_unit_alone_rounded(
    source: Path, recipe: Callable[..., Recipe]
) -> None:
    found = opened(recipe(method="rtn", calibration=None), source)
    with deterministic() as workers:
        found.losses(workers, NullProgress())
    unit = found.units[2]
    assert unit.name == "model.layers.0.mlp.gate_proj+up_proj"
    measured = found.known()[unit.name]
    option = anchors(unit)[0]
    assert option.bits == 2
    state = {name: tensor.float() for name, tensor in harness.tensors(source).items()}
    changed = dict(state)
    errors = {}
    for spec in unit.linears:
        weight = state[spec.weight]
        changed[spec.weight] = quantize(weight, search_grid(weight, option, torch.bfloat16)).dequantize().float()
        errors[spec.name] = weight - changed[spec.weight]
    base = harness.dense_model(source, state, torch.float32)
    inputs: list[torch.Tensor] = []
    base.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda _, x: inputs.append(x[0].flatten(0, 1)))  # type: ignore[union-attr,operator,index]
    wanted = torch.log_softmax(harness.logits(base, found.measuring), -1)
    other = torch.log_softmax(harness.logits(harness.dense_model(source, changed, torch.float32), found.measuring), -1)
    kl = (wanted.exp() * (wanted - other)).sum(-1).double().mean()
    assert measured.divergences[option.label] == pytest.approx(float(kl), rel=1e-3)
    inputs.clear()
    harness.logits(base, found.learning.tokens[:32])
    error = sum((inputs[0] @ difference.T).square().sum(1).double().mean() for difference in errors.values())
    assert measured.errors[option.label] == pytest.approx(float(error), rel=1e-3)


def test_it_measures_on_text_that_the_method_does_not_learn_from(
    source: Path, recipe: Callable[..., Recipe], text: Path
) -> None:
    found = opened(recipe(), source)
    learnt = {tuple(window) for window in found.learning.tokens.tolist()}
    assert found.held_out
    assert found.measuring.shape == (MEASURING_WINDOWS, 24)
    assert not learnt & {tuple(window) for window in found.measuring.tolist()}
    everything = len(text.read_bytes()) // 23  # one token per byte, and one in 24 begins a window
    short = opened(recipe(calibration={"source": str(text), "samples": everything, "seq_len": 24}), source)
    assert not short.held_out


def test_a_size_is_kept_to_the_byte(
    search: Callable[..., BudgetResult], source: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    found = opened(recipe(), source)
    plan = plan_budget(found, Target("bits", 4.0))
    limit = (plan.lowest_bytes + plan.highest_bytes) // 2
    result = search(Target("bytes", float(limit)), tmp_path / "out")
    made = result.made.artifact.manifest.sizes.bytes
    promised = result.report.signal["file_bytes_at_most"]
    assert 0.95 * limit < made <= promised <= limit
    assert promised - made < 300
    bits = round(result.report.chosen.bits_per_weight * sum(unit.weights for unit in found.units))
    assert file_bytes(found.job, found.units, bits) == promised
    assert made == sum(file.stat().st_size for file in result.made.artifact.path.glob("*.safetensors"))


def test_the_fewest_bits_that_keep_a_kl(search: Callable[..., BudgetResult], tmp_path: Path) -> None:
    loose = search(Target("bits", 3.0), tmp_path / "loose").report.chosen
    tight = search(Target("bits", 5.0), tmp_path / "tight").report.chosen
    assert loose.measured_kl is not None
    assert tight.measured_kl is not None
    limit = (loose.measured_kl * tight.measured_kl) ** 0.5
    result = search(Target("kl", limit), tmp_path / "out")
    chosen = result.report.chosen
    assert chosen.measured_kl is not None
    assert chosen.measured_kl <= limit
    assert 3.0 < chosen.bits_per_weight < 5.0
    assert result.report.tried
    kept = [p for p in result.report.tried if p.measured_kl is not None and p.measured_kl <= limit]
    assert min(p.bits_per_weight for p in kept) == chosen.bits_per_weight


@pytest.mark.parametrize("target", [Target("bits", 2.1), Target("bytes", 1000.0), Target("kl", 1e-9)])
def test_what_cannot_be_met_is_refused_with_the_nearest_that_can(
    target: Target, search: Callable[..., BudgetResult], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        search(target, tmp_path / "out")
    assert target.option in refused.value.message
    assert not (tmp_path / "out").exists()
    nearest = refused.value.hint.partition(f"{target.option} ")[2].split(";")[0]
    assert float(nearest) > target.value
    result = search(Target(target.kind, float(nearest)), tmp_path / "out")
    assert result.made.artifact.path == tmp_path / "out"


def test_a_budget_for_more_than_the_most_gives_the_most(search: Callable[..., BudgetResult], tmp_path: Path) -> None:
    result = search(Target("bits", 12.0), tmp_path / "out", method="rtn", calibration=None)
    assert result.report.chosen.bits_per_weight == pytest.approx(8.5)
    assert {unit.scheme for unit in result.report.units} == {"w8a16-g32"}
    assert result.made.artifact.scheme == "w8a16-g32"


def test_group_sizes_and_symmetry_limit_the_choice(source: Path, recipe: Callable[..., Recipe]) -> None:
    wanted = recipe(scheme={"symmetric": False})
    found = open_search(wanted, model=source, output=None, device="cpu", group_sizes=[64])
    options = {option for unit in found.units for option in unit.options}
    assert {(option.group_size, option.symmetric) for option in options} == {(64, False)}
    assert Checkpoint.open(source).digest() == found.fingerprint["source"]
    assert Solver(found, BITS).losses == []


def test_a_method_that_rounds_no_plain_weights_is_refused(source: Path, recipe: Callable[..., Recipe]) -> None:
    stage = open_stage(recipe())
    smoothing = SmoothQuantConfig.model_validate({})
    unchecked = stage.model_copy(update={"method": smoothing})
    wanted = recipe().model_copy(update={"stages": [unchecked]})
    with pytest.raises(UserError, match="smoothquant is for schemes that round inputs"):
        opened(wanted, source)


def test_only_schemes_that_the_format_carries_are_chosen_from(source: Path, recipe: Callable[..., Recipe]) -> None:
    opened = {"output": None, "device": "cpu", "group_sizes": (16, 32), "model": source}
    search = open_search(recipe(format="gptq"), **opened)
    assert {option.bits for unit in search.units for option in unit.options} == {2, 3, 4, 8}
    with pytest.raises(UserError, match=r"mixes schemes: awq has one group size.*") as refused:
        open_search(recipe(format="awq"), **opened)
    assert refused.value.hint == "leave --format out"


def test_two_searches_do_not_measure_the_same_at_once(source: Path, recipe: Callable[..., Recipe]) -> None:
    found = opened(recipe(), source)
    found.directory.parent.mkdir(parents=True)
    lock = FileLock(found.directory.with_suffix(".lock"), found.directory)
    try:
        with deterministic() as workers, pytest.raises(UserError, match="is being written by pid"):
            found.losses(workers, NullProgress())
    finally:
        lock.release()
