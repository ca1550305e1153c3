"""A plan writes nothing and says beforehand what the run then makes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress import pipeline
from compress.artifact import durable
from compress.artifact.output import staging_path
from compress.artifact.verify import verify
from compress.errors import UserError, WorkError
from compress.models.checkpoint import Checkpoint
from tests.pipeline import harness
from tests.pipeline.harness import METHODS, recipe
from tests.tiny_models import FAMILIES


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_what_the_run_makes(
    family: str, symmetric: bool, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source, wanted = tiny(family), recipe("rtn", symmetric=symmetric, bits=3)
    before = harness.snapshot(source)
    planned = pipeline.plan(wanted, model=source, output="out")
    assert harness.snapshot(tmp_path) == {}
    assert harness.snapshot(source) == before
    assert planned.problems == []
    assert planned.output == Path("out")
    assert (planned.method, planned.model) == ("rtn", source.name)
    stored = harness.tensors(source)
    assert planned.source_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert {f"{linear.name}.weight" for linear in planned.linears} == harness.block_matrices(stored)
    for linear in planned.linears:
        shape = stored[f"{linear.name}.weight"].shape
        assert (linear.out_features, linear.in_features) == tuple(reversed(shape) if family == "gpt2" else shape)
        assert f".{linear.block}." in linear.name
        assert linear.scheme == wanted.stages[0].scheme.to_scheme()
        assert linear.reason is None
        zero = 0 if symmetric else 32 * math.ceil(3 * linear.out_features / 32) / linear.out_features
        assert linear.bits_per_weight == pytest.approx(3 + (32 + zero) / 32)
    artifact = pipeline.run(wanted, model=source, output="out").artifact
    made = sum(tensor.nbytes for tensor in harness.tensors(artifact.path).values())
    assert planned.output_bytes == pytest.approx(made, rel=0.02)
    assert planned.bits_per_weight == pytest.approx(artifact.manifest.sizes.bits_per_weight, abs=1e-6)
    assert planned.file_bits_per_weight == pytest.approx(artifact.manifest.sizes.file_bits_per_weight, rel=0.02)
    assert planned.peak_memory_bytes > 0
    assert planned.seconds_estimate > 0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rows_that_do_not_fill_their_words(bits: int, tiny: Callable[..., Path], tmp_path: Path) -> None:
    source, wanted = tiny("llama", intermediate_size=172), recipe("rtn", bits=bits, group_size="channel")
    planned = pipeline.plan(wanted, model=source, output=tmp_path / "out")
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    assert planned.bits_per_weight == pytest.approx(artifact.manifest.sizes.bits_per_weight, rel=1e-6)
    told = {linear.name: linear.bits_per_weight for linear in planned.linears}
    assert {layer["name"]: layer["bits_per_weight"] for layer in artifact.layers()} == pytest.approx(told)


@pytest.mark.parametrize("method", METHODS)
def test_the_packaged_model(method: str, packaged_model: Path, tmp_path: Path) -> None:
    wanted = recipe(method, "tales", group_size=128, samples=4, seq_len=64)
    planned = pipeline.plan(wanted, model=packaged_model, output=tmp_path / "out")
    assert harness.snapshot(tmp_path) == {}
    artifact = pipeline.run(wanted, model=packaged_model, output=tmp_path / "out").artifact
    assert planned.output_bytes == pytest.approx(artifact.manifest.sizes.bytes, rel=0.02), "the whole file"
    assert planned.bits_per_weight == pytest.approx(artifact.manifest.sizes.bits_per_weight, rel=1e-6)
    assert verify(artifact.path).ok


def test_misfits_and_ignored_linears_are_told_by_name(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny("qwen3", intermediate_size=160)
    wanted = recipe("rtn", group_size=96, ignore=["*.layers.1.*"])
    planned = pipeline.plan(wanted, model=source, output=tmp_path / "out")
    assert planned.problems == ["group size 96 does not divide the width 160 of model.layers.0.mlp.down_proj"]
    for linear in planned.linears:
        if linear.block == 1:
            assert (linear.scheme, linear.reason) == (None, "ignored by '*.layers.1.*'")
        elif linear.in_features == 160:
            assert (linear.scheme, linear.reason) == (None, "group size 96 does not divide 160")
        else:
            assert linear.reason is None
            assert linear.scheme is not None
        assert linear.bits_per_weight == pytest.approx(32 if linear.scheme is None else 4 + 32 / 96)
    assert harness.snapshot(tmp_path) == {}


def test_without_an_output_the_next_version_is_named(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source, wanted = tiny("llama"), recipe("rtn")
    family = Path("artifacts") / f"{source.name}-rtn-w4a16-g32"
    for version in (1, 2):
        assert pipeline.plan(wanted, model=source).output == family / f"v{version}"
        assert pipeline.run(wanted, model=source).artifact.path.resolve() == (tmp_path / family / f"v{version}")
        assert (family / "latest").resolve() == tmp_path / family / f"v{version}"
    with monkeypatch.context() as patched:
        patched.setattr(durable, "step", harness.failing_at("before write block-00001.safetensors"))
        with pytest.raises(WorkError, match="the disk is full"):
            pipeline.run(wanted, model=source)
    assert staging_path((family / "v3").resolve()).is_dir()
    assert pipeline.plan(wanted, model=source).output == family / "v3", "the unfinished version is gone on with"
    result = pipeline.run(wanted, model=source)
    assert (result.artifact.path.name, result.resumed_blocks, result.computed_blocks) == ("v3", 1, 1)


def test_memory_does_not_grow_with_the_blocks(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    def peak(blocks: int, method: str, samples: int = 8) -> int:
        source = tiny("llama", num_hidden_layers=blocks)
        return pipeline.plan(
            recipe(method, text, samples=samples), model=source, output=tmp_path / "out"
        ).peak_memory_bytes

    for method in METHODS:
        assert peak(2, method) == peak(5, method)
    assert peak(2, "rtn") < peak(2, "awq") < peak(2, "awq", samples=64)
    assert peak(2, "gptq") < peak(2, "gptq", samples=64)


def test_a_mixture_is_planned_by_its_largest_block(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """The first block of this model is a dense one and much smaller than the second."""

    def peak(**overrides: int) -> int:
        source = tiny("deepseek_v3", **overrides)
        return pipeline.plan(recipe("gptq", text), model=source, output=tmp_path / "out").peak_memory_bytes

    experts = 24 - 8
    assert peak(n_routed_experts=24) - peak() >= experts * 3 * 96 * 32 * torch.float32.itemsize


def test_an_output_that_a_run_would_refuse_is_a_problem(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source, wanted = tiny("llama"), recipe("rtn")
    file, other, mine = tmp_path / "file", tmp_path / "other", tmp_path / "mine"
    file.write_text("x")
    other.mkdir()
    (other / "notes.txt").write_text("x")
    pipeline.run(recipe("rtn", bits=3), model=source, output=mine)
    before = harness.snapshot(tmp_path)
    for output, match in ((file, "is a file"), (other, "holds something else"), (mine, "another recipe")):
        planned = pipeline.plan(wanted, model=source, output=output)
        with pytest.raises(UserError, match=match) as caught:
            pipeline.run(wanted, model=source, output=output)
        assert (planned.problems, planned.hint) == ([caught.value.message], caught.value.hint)
    assert harness.snapshot(tmp_path) == before
    assert pipeline.plan(wanted, model=source, output=other, restart=True).problems == []
    assert pipeline.plan(recipe("rtn", bits=3), model=source, output=mine).problems == [], "it is done already"
    # What forbids the run for another reason is told first.
    assert "does not divide" in pipeline.plan(recipe("rtn", group_size=96 * 5), model=source, output=file).problems[0]


def test_the_source_is_not_hashed(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source, wanted = tiny("llama"), recipe("rtn")
    pipeline.run(wanted, model=source)

    def refuse(*args: object) -> str:
        raise AssertionError("a plan must answer at once, whatever the size of the model")

    monkeypatch.setattr(Checkpoint, "digest", refuse)
    monkeypatch.setattr(Checkpoint, "sha256", refuse)
    assert pipeline.plan(wanted, model=source).output.name == "v2"
    assert pipeline.plan(wanted, model=source, output="out").problems == []


def test_a_stored_copy_is_not_counted_as_parameters(tiny: Callable[..., Path], tmp_path: Path) -> None:
    def with_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    source = harness.copy_with(tiny("llama"), tmp_path / "copied", with_head)
    planned = pipeline.plan(recipe("rtn"), model=source, output=tmp_path / "out")
    artifact = pipeline.run(recipe("rtn"), model=source, output=tmp_path / "out").artifact
    assert planned.file_bits_per_weight == pytest.approx(artifact.manifest.sizes.file_bits_per_weight, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_the_time_is_measured_and_grows_with_the_work(
    method: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    def seconds(**overrides: int) -> float:
        source = tiny("llama", **overrides)
        return pipeline.plan(recipe(method, text), model=source, output=tmp_path / "out").seconds_estimate

    assert 0 < seconds() < 60
    assert seconds(num_hidden_layers=60) > seconds(), "thirty times the blocks"


def test_a_model_without_blocks_is_a_user_error(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny("llama", num_hidden_layers=0)
    with pytest.raises(UserError, match="no linear in any decoder block"):
        pipeline.plan(recipe("rtn"), model=source, output=tmp_path / "out")
