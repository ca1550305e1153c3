"""The curvature over the outputs of linears: what it is, that it is measured once, and that runs stay repeatable."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from compress import pipeline
from compress.artifact import durable
from compress.artifact.reader import Artifact
from compress.errors import WorkError
from compress.pipeline import curvature
from compress.pipeline.block import Workers
from compress.pipeline.curvature_plan import curvature_disk, curvature_memory, curvature_operations
from compress.pipeline.job import Job
from compress.pipeline.resolve import resolve
from compress.progress import NullProgress
from compress.recipe import Recipe
from tests.pipeline import harness
from tests.tiny_models import FAMILIES

WINDOWS = 3


def recipe(text: Path, windows: int = WINDOWS, **settings: Any) -> Recipe:
    return harness.with_options(harness.recipe("gptq", text, **settings), curvature_windows=windows)


def measured(source: Path, text: Path, scratch: Path, workers: int = 1, windows: int = WINDOWS) -> Job:
    job = resolve(recipe(text, windows), model=source, output=scratch / "out", device="auto")
    assert isinstance(job, Job)
    with ThreadPoolExecutor(workers) as pool:
        return curvature.measured(job, scratch, Workers(pool, workers), NullProgress())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_second_moment_of_draws_carried_back_through_the_whole_model(
    family: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    job = measured(tiny(family), text, tmp_path)
    assert job.calibration is not None
    expected, written = _by_transformers(tiny(family), job.calibration.tokens[:WINDOWS]), 0
    for block in range(job.skeleton.num_blocks):
        found = curvature.of_block(job, block)
        written += sum(moments.nbytes for moments in found.values())
        assert found.keys() == {spec.name for spec in job.skeleton.linears(block) if spec.expert is None}
        for name, moments in found.items():
            assert torch.equal(moments, moments.T)
            assert (moments - expected[name]).abs().max() < 2e-3 * expected[name].abs().max(), name
    assert curvature_disk(job) == written


def _by_transformers(source: Path, tokens: Tensor) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    outputs: dict[str, Tensor] = {}
    for name, module in linears.items():
        module.register_forward_hook(lambda m, given, output, name=name: outputs.__setitem__(name, output))
    sums: dict[str, Tensor] = {}
    for number, window in enumerate(tokens):
        logits = model(window[None]).logits.float()
        share = logits.softmax(-1).detach()
        generator = torch.Generator().manual_seed(number)
        signs = 2 * torch.empty_like(share).bernoulli_(0.5, generator=generator) - 1
        root = share.sqrt()
        # The covariance of the softmax is (diag(root) - share root^T) (diag(root) - share root^T)^T.
        drawn = root * signs - share * (root * signs).sum(-1, keepdim=True)
        names = list(outputs)
        found = torch.autograd.grad(logits, [outputs[name] for name in names], drawn, allow_unused=True)
        for name, gradient in zip(names, found, strict=True):
            if gradient is not None:
                rows = gradient.flatten(0, -2)
                sums[name] = sums.get(name, 0) + rows.T @ rows / tokens.numel()
    return sums


def test_draws_have_the_covariance_of_the_softmax(
    tiny: Callable[..., Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that half of g^T B g is the KL of a small step: here for logits that are the state itself."""
    share = torch.tensor([0.5, 0.3, 0.15, 0.05])
    job = resolve(recipe(text), model=tiny("llama"), output=None, device="auto")
    assert isinstance(job, Job)
    monkeypatch.setattr(job.skeleton, "differentiable_head", lambda state: state)
    state = share.log().expand(1, 40_000, 4)
    draws = curvature._at_the_end(job, 0, state)[0]
    wanted = torch.diag(share) - torch.outer(share, share)
    assert (draws.T @ draws / len(draws) - wanted).abs().max() < 0.01
    step = 0.01 * torch.tensor([1.0, -2.0, 0.5, 3.0])
    moved = (share.log() + step).log_softmax(-1)
    kl = float((share * (share.log() - moved)).sum())
    assert kl == pytest.approx(float(step @ wanted @ step) / 2, rel=0.05)


def test_threads_and_what_is_there_already_change_nothing(
    tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = measured(tiny("llama"), text, tmp_path / "one")
    three = measured(tiny("llama"), text, tmp_path / "three", workers=3)
    files = sorted(path.name for path in (tmp_path / "one/curvature").iterdir())
    assert [name for name in files if name.endswith(".safetensors")] == [
        "shard-00000.safetensors", "shard-00001.safetensors",
    ]  # fmt: skip
    for name in files:
        assert (tmp_path / "one/curvature" / name).read_bytes() == (tmp_path / "three/curvature" / name).read_bytes()
    damaged = tmp_path / "three/curvature/shard-00001.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    measured(tiny("llama"), text, tmp_path / "three")
    assert damaged.read_bytes() == whole
    monkeypatch.setattr(curvature, "_walk", lambda job, workers: iter(()))  # nothing is measured where all is there
    again = measured(tiny("llama"), text, tmp_path / "one")
    assert again.curvature == one.curvature
    assert three.curvature != one.curvature


def test_the_artifact_has_other_codes_and_the_same_layout(
    tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    def made(windows: int) -> Artifact:
        return pipeline.run(recipe(text, windows), model=tiny("llama"), output=tmp_path / str(windows)).artifact

    plain, coupled, more = made(0), made(WINDOWS), made(4000)
    before, after = harness.tensors(plain.path), harness.tensors(coupled.path)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert {path.name for path in plain.path.iterdir()} == {path.name for path in coupled.path.iterdir()}
    assert all("coupled" not in layer["details"] for layer in plain.layers())
    assert all(layer["details"]["coupled"] for layer in coupled.layers() if layer["scheme"])
    assert more.manifest.calibration is not None
    assert more.manifest.calibration.samples == 8, "no more windows than there are"


def test_linears_with_too_many_outputs_are_left_alone_and_say_so(
    tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curvature, "WIDEST", 100)  # gate and up have 160
    layers = pipeline.run(recipe(text), model=tiny("llama"), output=tmp_path / "out").artifact.layers()
    left = {layer["name"].rpartition(".")[2] for layer in layers if layer["scheme"] and not layer["details"]["coupled"]}
    assert left == {"gate_proj", "up_proj"}


def test_a_killed_run_goes_on_to_the_same_tensors(
    tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("mixtral")
    whole = pipeline.run(recipe(text), model=source, output=tmp_path / "whole").artifact
    for number, step in enumerate(("before write shard-00001.safetensors", "before write layers.json")):
        output = tmp_path / str(number)
        with monkeypatch.context() as patch:
            patch.setattr(durable, "step", harness.failing_at(step))
            with pytest.raises(WorkError, match="full"):
                pipeline.run(recipe(text), model=source, output=output)
        found = pipeline.run(recipe(text), model=source, output=output).artifact
        assert harness.tensor_hashes(found) == harness.tensor_hashes(whole)


def test_none_leaves_hash_and_file_of_a_recipe_as_they_were(text: Path) -> None:
    plain = harness.recipe("gptq", text)
    assert recipe(text, 0).hash() == plain.hash() != recipe(text).hash()
    assert "curvature" not in plain.to_yaml()
    assert "curvature_windows: 3" in recipe(text).to_yaml()


def test_the_plan_counts_it(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    def cost(windows: int) -> tuple[int, float]:
        wanted = recipe(text, windows, samples=64)
        job = resolve(wanted, model=tiny("llama"), output=None, device="auto")
        assert isinstance(job, Job)
        plan = pipeline.plan(wanted, model=tiny("llama"), output=tmp_path / "out")
        assert isinstance(plan, pipeline.Plan)
        assert plan.peak_memory_bytes >= curvature_memory(job)
        assert (plan.curvature_memory_bytes or 0) == curvature_memory(job)
        assert (plan.curvature_disk_bytes or 0) == curvature_disk(job)
        return curvature_memory(job), curvature_operations(job)

    none, few, many, all_of_them = cost(0), cost(2), cost(64), cost(4000)
    assert none == (0, 0.0)
    assert 0 < few[0] < many[0] == all_of_them[0]
    assert 0 < few[1] < many[1] == all_of_them[1]
