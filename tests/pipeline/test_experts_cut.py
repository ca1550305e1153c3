"""Cuts in experts of tiny mixtures: which stay, what transformers loads, and zeros inside what stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress import pipeline
from compress.artifact.verify import verify
from compress.errors import UserError, WorkError
from compress.pipeline import CutPlan, experts_stage
from compress.pipeline.experts_job import COUNTS
from compress.pruning.configs import ExpertsConfig
from compress.recipe import Recipe, parse_recipe
from compress.recipe_prune import PruneSettings, build_prune_recipe
from compress.stages import PruneStage
from tests.pipeline import harness
from tests.tiny_models import EXPERTS, tiny_tokens

MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3")


def recipe(text: Path, keep: float = 0.75, **method: Any) -> Recipe:
    """A cut in experts calibrated on windows of 24 tokens."""
    stage = {
        "kind": "prune",
        "method": {"kind": "experts", **method},
        "keep": keep,
        "calibration": {"source": str(text), "samples": 16, "seq_len": 24},
    }
    return parse_recipe({"stages": [stage]})


def without(source: Path, kept: dict[int, list[int]], tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the source model in memory with its fused experts and its router rows cut."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for block, numbers in kept.items():
        mixture = model.model.layers[block].mlp
        for module in (mixture.experts, mixture.gate):
            module.num_experts = len(numbers)
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                tensor.data = tensor.data[numbers]
                assert name
    return harness.logits(model, tokens)


@pytest.mark.parametrize(
    ("family", "choose"),
    [*((family, choose) for family in MIXTURES for choose in ("saliency", "error")), ("deepseek_v3", "clusters")],
)
def test_the_smaller_mixture_is_what_transformers_loads(
    family: str, choose: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, tokens = tiny(family), tiny_tokens(2, 20)
    keep = 0.9 if family == "deepseek_v3" else 0.75  # most of its weights are elsewhere
    wanted = recipe(text, keep, choose=choose)
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    kept = {layer["block"]: layer["details"]["kept"] for layer in artifact.layers()}
    counts = {artifact.config[name] for name in COUNTS if name in artifact.config}
    assert counts == {len(numbers) for numbers in kept.values()} != {EXPERTS}
    assert artifact.config["num_experts_per_tok"] == 2
    assert harness.distance(harness.loaded_logits(artifact.path, tokens), without(source, kept, tokens)) < 1e-5
    stored = harness.tensors(artifact.path)
    counted = sum(tensor.numel() for tensor in stored.values())
    plan = pipeline.plan(wanted, model=source)
    assert isinstance(plan, CutPlan)
    assert plan.parameters == counted == artifact.manifest.sizes.parameters
    assert plan.achieved <= keep
    assert sum(tensor.numel() for tensor in harness.tensors(source).values()) == plan.all_parameters
    assert verify(artifact.path).ok
    if family == "deepseek_v3":  # two groups of experts: as many of each
        assert all(sum(number < EXPERTS // 2 for number in numbers) * 2 == len(numbers) for numbers in kept.values())


def test_what_adds_least_goes_and_the_saliency_is_what_it_says(
    tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    def quiet(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Experts 1 and 6 of every mixture add little."""
        return {n: t * 1e-3 if ".1.w2" in n or ".6.w2" in n else t for n, t in tensors.items()}

    source = harness.copy_with(tiny("mixtral"), tmp_path / "quiet", quiet)
    wanted = recipe(text, 0.85, choose="saliency")
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    for layer in artifact.layers():
        gone = set(range(EXPERTS)) - set(layer["details"]["kept"])
        assert gone <= {1, 6}
    assert gone
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    mixture, sums, counts = model.model.layers[0].mlp, torch.zeros(EXPERTS), torch.zeros(EXPERTS)

    def measure(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        hidden, index, weights = given
        for number in range(EXPERTS):
            gate, up = (hidden @ mixture.experts.gate_up_proj[number].T).chunk(2, dim=-1)
            out = (mixture.experts.act_fn(gate) * up) @ mixture.experts.down_proj[number].T
            chosen = index == number
            counts[number] += chosen.sum()
            sums[number] += (out.norm(dim=1, keepdim=True) * weights * chosen).sum()

    mixture.experts.register_forward_pre_hook(measure)
    work = pipeline.resolve.resolve(wanted, model=source, output=None, device="cpu")
    assert work.calibration is not None
    harness.logits(model, work.calibration.tokens)
    said = torch.tensor(artifact.layers()[0]["details"]["saliency"])
    torch.testing.assert_close(said, sums / counts, rtol=1e-4, atol=1e-6)


def test_the_error_is_that_of_the_output_without_each_expert(
    tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, wanted = tiny("mixtral"), recipe(text, 0.85, choose="error")
    layer = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact.layers()[0]
    work = pipeline.resolve.resolve(wanted, model=source, output=None, device="cpu")
    assert work.calibration is not None
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    mixture, seen = model.model.layers[0].mlp, list[torch.Tensor]()
    mixture.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    harness.logits(model, work.calibration.tokens)
    mixture._forward_pre_hooks.clear()
    with torch.no_grad():
        exact = mixture(seen[0])
        costs = []
        for number in range(EXPERTS):
            fewer, rest = copy.deepcopy(mixture), [each for each in range(EXPERTS) if each != number]
            for part in (fewer.experts, fewer.gate):
                part.num_experts = len(rest)
                for _, parameter in part.named_parameters(recurse=False):
                    parameter.data = parameter.data[rest]
            costs.append((fewer(seen[0]) - exact).square().sum() / exact.square().sum())
    said = torch.tensor(layer["details"]["cost_alone"])
    torch.testing.assert_close(said, torch.stack(costs), rtol=1e-3, atol=1e-6)
    assert int(said.argmin()) not in layer["details"]["kept"]
    assert int(said.argmax()) in layer["details"]["kept"]


def test_experts_first_then_zeros_inside(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    fewer = pipeline.run(recipe(text), model=tiny("qwen3_moe"), output=tmp_path / "fewer").artifact
    inside = build_prune_recipe(PruneSettings(method="wanda", sparsity=0.4, calib=str(text), samples=8, seq_len=24))[0]
    artifact = pipeline.run(inside, model=fewer.path, output=tmp_path / "both").artifact
    stored = harness.tensors(artifact.path)
    for layer in artifact.layers():
        weight = stored[f"{layer['name']}.weight"]
        assert float((weight == 0).float().mean()) == pytest.approx(0.4, abs=0.02)
    assert harness.loaded_logits(artifact.path, tiny_tokens(1, 12)).isfinite().all()


def test_killed_runs_resume_to_the_same_bytes_and_threads_change_none(
    tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.pipeline.inputs.CHUNK_TOKENS", 64)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    source, wanted = tiny("mixtral"), recipe(text)
    whole = pipeline.run(wanted, model=source, output=tmp_path / "whole").artifact
    with monkeypatch.context() as patched:
        report = experts_stage._report
        patched.setattr(experts_stage, "_report", lambda *given: _fails_at(1, report, *given))
        with pytest.raises(WorkError, match="stopped"):
            pipeline.run(wanted, model=source, output=tmp_path / "out")
    torch.set_num_threads(2)
    resumed = pipeline.run(wanted, model=source, output=tmp_path / "out")
    assert (resumed.resumed_blocks, resumed.computed_blocks) == (1, 1)
    assert harness.snapshot(resumed.artifact.path) == harness.snapshot(whole.path)


def _fails_at(block: int, report: Callable[..., Any], job: Any, specs: list[Any], *rest: Any) -> Any:
    if specs[0].block == block:
        raise WorkError("stopped", "run it again")
    return report(job, specs, *rest)


def test_what_cannot_be_cut_is_named(tiny: Callable[..., Path], text: Path) -> None:
    with pytest.raises(UserError, match="no experts that could go"):
        pipeline.plan(recipe(text), model=tiny("llama"))
    plan = pipeline.plan(recipe(text, 0.2), model=tiny("mixtral"))
    assert "every token is routed to 2" in plan.problems[0]
    smallest = float(plan.hint.rsplit(" ", 1)[1])
    assert not pipeline.plan(recipe(text, smallest + 0.001), model=tiny("mixtral")).problems


def test_statistics_that_are_kept_are_those_of_what_experts_add() -> None:
    """Whatever a recipe says, and a recipe that names the whole model alone still means saliency."""
    wanted, notes = build_prune_recipe(PruneSettings(stats="somewhere"), base="experts-keep75")
    stage = wanted.stages[0]
    assert isinstance(stage, PruneStage)
    method = stage.method
    assert isinstance(method, ExpertsConfig)
    assert (method.measured, method.choose) == ("model", "saliency")
    assert any("choose: saliency" in note for note in notes)
    assert ExpertsConfig(measured="model").choose == "saliency"
    with pytest.raises(ValueError, match="goes by what is lost"):
        ExpertsConfig(measured="model", choose="error")
