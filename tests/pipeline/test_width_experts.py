"""Width cuts of mixtures: neurons of every expert, by the tokens that the router sends it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress import pipeline
from compress.errors import UserError
from compress.pipeline.resolve import resolve
from compress.recipe import Recipe
from tests.pipeline import harness
from tests.pipeline.test_width import recipe
from tests.tiny_models import EXPERTS, tiny_tokens

DAMPING = 0.01


def with_calibration(wanted: Recipe, **settings: Any) -> Recipe:
    (stage,) = wanted.stages
    calibration = stage.calibration.model_copy(update=settings)  # type: ignore[union-attr]
    return wanted.model_copy(update={"stages": [stage.model_copy(update={"calibration": calibration})]})


def routed_inputs(source: Path, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What each expert's down projection reads in the first block, (tokens, neurons), from transformers' own model."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    experts, found = model.model.layers[0].mlp.experts, []

    def read(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        hidden, index, _ = given
        for number in range(EXPERTS):
            gate, up = (hidden[(index == number).any(1)] @ experts.gate_up_proj[number].T).chunk(2, dim=-1)
            found.append(experts.act_fn(gate) * up)

    experts.register_forward_pre_hook(read)
    harness.logits(model, tokens)
    return found


def test_experts_are_repaired_by_the_tokens_that_are_routed_to_them(
    tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, wanted = tiny("mixtral"), recipe(text, samples=32)
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    job = resolve(wanted, model=source, output=None, device="cpu")
    assert job.calibration is not None
    before, after = harness.tensors(source), harness.tensors(artifact.path)
    for number, read in enumerate(routed_inputs(source, job.calibration.tokens)):
        up, down = (
            next(name for name in before if name.endswith(f"layers.0.{kind}.experts.{number}.{part}.weight"))
            for part, kind in (("w3", path_of(before)), ("w2", path_of(before)))
        )
        kept = [int((before[up] == row).all(1).nonzero()) for row in after[up]]
        moments = read.T @ read / len(read)
        moments += DAMPING * moments.diagonal().mean() * torch.eye(len(moments))
        best = torch.linalg.solve(moments[kept][:, kept], (before[down] @ moments)[:, kept].T).T
        torch.testing.assert_close(after[down], best, rtol=1e-3, atol=1e-4)
    plain = pipeline.run(recipe(text, samples=32, repair=False), model=source, output=tmp_path / "plain").artifact
    errors = [
        [layer["output_error"] for layer in each.layers() if ".0." in layer["name"] and "w2" in layer["name"]]
        for each in (plain, artifact)
    ]
    assert len(errors[0]) >= EXPERTS
    assert all(mended < cut for cut, mended in zip(*errors, strict=True))


def path_of(tensors: dict[str, torch.Tensor]) -> str:
    """What the checkpoint calls the module of the experts."""
    return "block_sparse_moe" if any("block_sparse_moe" in name for name in tensors) else "mlp"


def test_starved_experts_learn_from_all_tokens_and_unreached_ones_are_named(
    tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = tiny("qwen3_moe")
    wanted = with_calibration(recipe(text, 0.8), starved_share=0.2)
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "starved").artifact
    starved = {each.name for each in artifact.manifest.fallbacks if each.action == "all tokens"}
    routed = {layer["name"]: layer["details"] for layer in artifact.layers() if "experts" in layer["name"]}
    tokens = 8 * 24
    assert starved == {name for name, details in routed.items() if details["routed_tokens"] < 0.2 * tokens} != set()
    few = with_calibration(recipe(text, 0.8, samples=1, measured="model"), seq_len=3)
    artifact = pipeline.run(few, model=source, output=tmp_path / "few").artifact
    unreached = {each.name for each in artifact.manifest.fallbacks if "no repair" in each.action}
    assert unreached, "of 8 experts, 3 tokens that go to 2 each cannot reach all"
    actions = {name: entry.action for name, entry in artifact.manifest.ledger.items() if ".experts." in name}
    assert {actions[f"{name}.weight"] for name in unreached} == {"pruned"}
    assert harness.loaded_logits(artifact.path, tiny_tokens(1, 12)).isfinite().all()


@pytest.mark.parametrize("importance", ["feature", "taylor"])
def test_every_importance_chooses_neurons_of_experts(
    importance: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = tiny("qwen3_moe")
    paths = [
        pipeline.run(recipe(text, importance=each, repair=False), model=source, output=tmp_path / each).artifact.path
        for each in ("repair", importance)
    ]
    usual, other = (harness.tensors(path) for path in paths)
    experts = [name for name in usual if ".experts." in name]
    assert {name: usual[name].shape for name in experts} == {name: other[name].shape for name in experts}
    assert any(not torch.equal(usual[name], other[name]) for name in experts)


def test_layers_outside_the_blocks_are_refused_by_name(
    tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.DeepseekV3PreTrainedModel._keys_to_ignore_on_load_unexpected", [r"model\.layers\.2.*"]
    )

    def longer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "model.layers.2.mlp.experts.0.up_proj.weight": torch.ones(32, 96)}

    source = harness.copy_with(tiny("deepseek_v3"), tmp_path / "longer", longer)
    plan = pipeline.plan(recipe(text), model=source)
    assert "model.layers.2.mlp.experts.0.up_proj.weight is in no decoder block" in plan.problems[0]
    with pytest.raises(UserError, match="would keep the width"):
        pipeline.run(recipe(text), model=source, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
