"""Depth cuts of tiny models: which blocks go, what transformers loads with and without a cache, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress import pipeline
from compress.artifact.verify import verify
from compress.errors import WorkError
from compress.pipeline import CutPlan, depth_choice, depth_stage
from compress.progress import NullProgress
from compress.recipe import Recipe, parse_recipe
from tests.pipeline import harness
from tests.tiny_models import FAMILIES, tiny_tokens

# Four blocks, so that two can go; of what is said of each block, no two halves are alike.
TYPES = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
MORE: dict[str, dict[str, Any]] = {
    "qwen2": {"layer_types": TYPES},
    "gemma2": {"layer_types": TYPES},
    "gemma3_text": {"layer_types": TYPES},
    "qwen3_moe": {"mlp_only_layers": [0, 3]},
}
KEEP = {"qwen3_moe": 0.85}  # its experts are large, and only the two blocks between have any


def recipe(text: Path, keep: float, samples: int = 8, **method: Any) -> Recipe:
    """A depth cut calibrated on windows of 24 tokens."""
    stage = {
        "kind": "prune",
        "method": {"kind": "depth", **method},
        "keep": keep,
        "calibration": {"source": str(text), "samples": samples, "seq_len": 24},
    }
    return parse_recipe({"stages": [stage]})


def without(source: Path, blocks: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the source model in memory with these blocks taken out of its list, computed without a cache."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    (holder, name, kept) = next(
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child) == model.config.num_hidden_layers
    )
    types = getattr(model.config, "layer_types", None)
    setattr(holder, name, torch.nn.ModuleList(block for n, block in enumerate(kept) if n not in blocks))
    model.config.num_hidden_layers -= len(blocks)
    if types:
        model.config.layer_types = [kind for n, kind in enumerate(types) if n not in blocks]
    return harness.logits(model, tokens)


QUICK = ("gemma2", "gpt2", "qwen3_moe")
"""Each in a way of its own; the others are slow tests."""


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_the_shallow_model_is_what_transformers_loads(
    family: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = tiny(family, num_hidden_layers=4, **MORE.get(family, {}))
    wanted = recipe(text, KEEP.get(family, 0.75), choose="influence")
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    gone = [layer["block"] for layer in artifact.layers()]
    assert gone
    assert set(gone) <= {1, 2}, "the first and the last block are protected"
    tokens = tiny_tokens(2, 20)
    found = harness.loaded_logits(artifact.path, tokens)
    assert harness.distance(found, without(source, gone, tokens)) < 1e-5
    before, after = harness.tensors(source), harness.tensors(artifact.path)
    counted = sum(tensor.numel() for tensor in after.values())
    assert artifact.manifest.sizes.parameters == counted
    plan = pipeline.plan(wanted, model=source)
    assert isinstance(plan, CutPlan)
    assert (plan.parameters, plan.kept, plan.units) == (counted, 4 - len(gone), "blocks")
    assert plan.achieved <= KEEP.get(family, 0.75)
    actions = {name: entry.action for name, entry in artifact.manifest.ledger.items()}
    dropped = sum(before[name].numel() for name, action in actions.items() if action == "dropped")
    assert sum(tensor.numel() for tensor in before.values()) - dropped == counted
    assert verify(artifact.path).ok
    assert f"{counted} of the source's" in (artifact.path / "README.md").read_text()


def test_cached_generation_is_that_of_the_whole_sequence(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = tiny("gemma3_text", num_hidden_layers=4, layer_types=TYPES)
    artifact = pipeline.run(recipe(text, 0.8), model=source, output=tmp_path / "out").artifact
    assert len(artifact.config["layer_types"]) == artifact.config["num_hidden_layers"] < 4
    model = AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float32).eval()
    made = model.generate(tiny_tokens(1, 12), max_new_tokens=8, do_sample=False, eos_token_id=None)
    again = harness.logits(model, made)[0, 11:-1].argmax(-1)
    assert torch.equal(made[0, 12:], again)


def test_the_block_whose_removal_costs_least_goes(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    def idle(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Block 2 adds almost nothing to the hidden states."""
        return {
            name: t * 1e-3 if ".2." in name and ("o_proj" in name or "down_proj" in name) else t
            for name, t in tensors.items()
        }

    source = harness.copy_with(tiny("llama", num_hidden_layers=4), tmp_path / "idle", idle)
    for choose in ("loss", "influence"):
        wanted = recipe(text, 0.85, choose=choose)
        artifact = pipeline.run(wanted, model=source, output=tmp_path / choose).artifact
        (layer,) = artifact.layers()
        assert layer["name"] == "model.layers.2"
        assert 0 <= layer["details"][choose] < 1e-3


def test_the_losses_are_those_of_the_cut_models(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = tiny("qwen3", num_hidden_layers=4)
    artifact = pipeline.run(recipe(text, 0.6), model=source, output=tmp_path / "out").artifact
    losses = {layer["block"]: layer["details"]["loss"] for layer in artifact.layers()}
    first, second = sorted(losses, key=lambda block: losses[block])
    tokens = pipeline.resolve.resolve(recipe(text, 0.6), model=source, output=None, device="cpu").calibration.tokens
    reference = harness.source_logits(source, tokens).log_softmax(-1)
    for gone, said in (([first], losses[first]), ([first, second], losses[second])):
        found = without(source, gone, tokens).log_softmax(-1)
        assert float((reference.exp() * (reference - found)).sum(-1).mean()) == pytest.approx(said, rel=1e-4)
    others = [float(_kl(reference, without(source, [block], tokens))) for block in (1, 2)]
    assert losses[first] == pytest.approx(min(others), rel=1e-4)


def _kl(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1).mean()


class _StopsAt(NullProgress):
    """Stops the run at the given report of progress."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, note: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise WorkError("stopped", "run it again")


@pytest.mark.parametrize("steps", [1, 4])
def test_killed_runs_resume_to_the_same_bytes_and_choose_once(
    steps: int, tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.pipeline.inputs.CHUNK_TOKENS", 64)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    source, wanted = tiny("llama", num_hidden_layers=4), recipe(text, 0.6, samples=12)
    whole = pipeline.run(wanted, model=source, output=tmp_path / "whole").artifact
    with pytest.raises(WorkError, match="stopped"):
        pipeline.run(wanted, model=source, output=tmp_path / "out", progress=_StopsAt(steps))
    chosen: list[int] = []
    choose = depth_choice.decide
    monkeypatch.setattr(depth_choice, "decide", lambda *given: chosen.append(1) or choose(*given))
    torch.set_num_threads(2)
    resumed = pipeline.run(wanted, model=source, output=tmp_path / "out")
    assert len(chosen) == (steps == 1), "what was chosen is journalled"
    assert resumed.resumed_blocks == (0 if steps == 1 else 2)
    assert harness.snapshot(resumed.artifact.path) == harness.snapshot(whole.path)


def test_what_transformers_would_load_as_another_model_is_not_published(
    tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tiny("gemma2", num_hidden_layers=4, layer_types=TYPES), tmp_path / "out"
    right = depth_stage.config_of

    def turned(job: Any) -> dict[str, Any]:
        config = right(job)
        return {**config, "layer_types": config["layer_types"][1:] + config["layer_types"][:1]}

    monkeypatch.setattr(depth_stage, "config_of", turned)
    with pytest.raises(WorkError, match="loads the cut model as another"):
        pipeline.run(recipe(text, 0.85), model=source, output=out)
    assert not out.exists()


def test_what_cannot_be_cut_is_named(tiny: Callable[..., Path], text: Path) -> None:
    source = tiny("llama", num_hidden_layers=4)
    plan = pipeline.plan(recipe(text, 0.2), model=source)
    assert "only 2 are not protected" in plan.problems[0]
    smallest = float(plan.hint.rsplit(" ", 1)[1])
    assert not pipeline.plan(recipe(text, smallest + 0.002), model=source).problems
    assert "all 4 blocks are protected" in pipeline.plan(recipe(text, 0.5, protect_last=3), model=source).problems[0]
    mixed = tiny("qwen3_moe", num_hidden_layers=4)
    assert "block 1 has other tensors" in pipeline.plan(recipe(text, 0.7, protect_first=0), model=mixed).problems[0]
