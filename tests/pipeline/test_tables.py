"""Quantised embeddings and heads: what the artifact holds is what is computed, tied or not, by every reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import pipeline
from compress.artifact.staging import Staging
from compress.artifact.verify import verify
from compress.errors import UserError, WorkError
from compress.evaluation.reports.layer_sections import layer_sections
from compress.exporters.dense import export_dense
from compress.exporters.packed import export_packed
from compress.formats.compressed_tensors import is_for_own_reader
from compress.models.checkpoint import Checkpoint
from compress.pipeline.job import Job
from compress.pipeline.resolve import resolve
from compress.pipeline.run import deterministic
from compress.pipeline.tuned_model import TunedModel
from compress.recipe import Recipe, parse_recipe
from compress.runtime import loading
from compress.types import IntScheme
from compress.workflows.engines import diagnose
from tests.pipeline import harness
from tests.tiny_models import tiny_tokens

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def asking(method: str, text: Path, **stage: Any) -> Recipe:
    """4 bits in groups of 32, and what is asked of the tables."""
    learns = {} if method in ("rtn", "hqq") else {"calibration": {"source": str(text), "samples": 8, "seq_len": 24}}
    return parse_recipe({"stages": [{"method": method, "scheme": {"bits": 4, "group_size": 32}, **learns, **stage}]})


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("asked", ["w6a16-g32", "w8a16-channel", "w3a16-g96-asym"])
def test_a_tied_table_is_stored_once_and_read_for_both_uses(
    method: str, asked: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    if method == "awq" and asked != "w6a16-g32":
        pytest.skip("one scheme shows it")
    source, tokens, wanted = tiny("llama"), tiny_tokens(2, 12), asking(method, text, embeddings=asked)
    planned = pipeline.plan(wanted, model=source, output=tmp_path / "out")
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    assert not verify(artifact.path).problems
    assert planned.bits_per_weight == pytest.approx(artifact.manifest.sizes.bits_per_weight, abs=1e-6)
    stored = artifact.manifest.sizes.file_bits_per_weight
    assert planned.file_bits_per_weight == pytest.approx(stored, rel=0.01)  # it leaves the packed shapes out
    names = set(artifact.manifest.tensors)
    assert {f"{EMBEDDING}.weight_packed", f"{EMBEDDING}.weight_scale", f"{EMBEDDING}.weight_shape"} <= names
    assert f"{EMBEDDING}.weight" not in names
    assert not any(name.startswith(HEAD) for name in names)
    (row,) = [layer for layer in artifact.layers() if layer["name"] == EMBEDDING]
    assert row["block"] is None
    assert row["scheme"] == asked
    assert row["method"] == ("rtn" if method == "rtn" else "gptq")
    if method != "rtn":
        assert 0 < row["output_error"] < 0.2
        assert 0 < row["details"]["lookup_error"] < 0.2
    expected = harness.fake_quantized_logits(source, artifact, tokens)
    assert harness.distance(expected, harness.source_logits(source, tokens)) > 1e-3
    for kernel in ("auto", "reference"):
        found = loading.load(artifact.path, device="cpu", kernel=kernel)
        assert found.name == ("native" if kernel == "auto" else "transformers")
        torch.testing.assert_close(found.score(tokens), expected, rtol=1e-4, atol=1e-4)
    assert is_for_own_reader(artifact.config["quantization_config"])
    exported = export_dense(artifact.path, tmp_path / "dense").path
    torch.testing.assert_close(harness.loaded_logits(exported, tokens), expected, rtol=1e-4, atol=1e-4)


def test_a_tied_model_takes_the_head_for_the_same_table(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = tiny("llama")
    one, other = (
        pipeline.run(asking("gptq", text, **{name: "w5a16-g32"}), model=source, output=tmp_path / name).artifact
        for name in ("embeddings", "head")
    )
    assert harness.tensor_hashes(one) == harness.tensor_hashes(other)
    assert "| outside | 1 |" in (one.path / "README.md").read_text()
    shown = next(section for section in layer_sections(one) if section.heading == "Error by layer")
    assert shown.table is not None
    assert shown.table.rows[-1][0] == "outside"
    assert [finding.rule for finding in diagnose(Checkpoint.open(one.path), "vllm").findings][:2] == [
        "own-reader",
        "packed-embedding",
    ]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_an_embedding_and_a_head_of_their_own(
    method: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, tokens = tiny("llama", tie_word_embeddings=False), tiny_tokens(2, 12)
    wanted = asking(method, text, embeddings="w8a16-channel", head="w4a16-g32")
    planned = pipeline.plan(wanted, model=source, output=tmp_path / "out")
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    assert {linear.name: linear.scheme for linear in planned.linears if linear.block < 0} == {
        EMBEDDING: IntScheme(8, None),
        HEAD: IntScheme(4, 32),
    }
    assert planned.bits_per_weight == pytest.approx(artifact.manifest.sizes.bits_per_weight, abs=1e-6)
    rows = {layer["name"]: layer for layer in artifact.layers()}
    assert (rows[EMBEDDING]["method"], rows[HEAD]["method"]) == ("rtn", method)
    if method == "gptq":
        assert rows[HEAD]["details"]["corrected"]
    expected = harness.fake_quantized_logits(source, artifact, tokens)
    for kernel in ("auto", "reference"):
        found = loading.load(artifact.path, device="cpu", kernel=kernel)
        torch.testing.assert_close(found.score(tokens), expected, rtol=1e-4, atol=1e-4)
    assert is_for_own_reader(artifact.config["quantization_config"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stage", [{"embeddings": "w4a16-g32"}, {"head": "w8a16-channel"}])
def test_what_transformers_loads(
    tied: bool, stage: dict[str, Any], tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """One scheme for all, which it decodes, or a head of another one."""
    source, tokens = tiny("llama", tie_word_embeddings=tied), tiny_tokens(2, 12)
    artifact = pipeline.run(asking("rtn", text, **stage), model=source, output=tmp_path / "out").artifact
    loads = "embeddings" in stage or not tied
    assert is_for_own_reader(artifact.config["quantization_config"]) == (not loads)
    expected = harness.fake_quantized_logits(source, artifact, tokens)
    torch.testing.assert_close(loading.load(artifact.path, device="cpu").score(tokens), expected, rtol=1e-4, atol=1e-4)
    if loads and "embeddings" in stage:
        with pytest.raises(UserError, match=r"no place for model\.embed_tokens"):
            export_packed(artifact.path, tmp_path / "awq", "awq")
    if loads:
        torch.testing.assert_close(harness.loaded_logits(artifact.path, tokens), expected, rtol=1e-4, atol=1e-4)


def test_a_run_cut_short_at_any_entry_goes_on_and_ends_in_the_same_bytes(
    tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("llama", tie_word_embeddings=False)
    wanted = asking("gptq", text, embeddings="w6a16-g32", head="w4a16-g32")
    whole = pipeline.run(wanted, model=source, output=tmp_path / "whole").artifact
    kept = Staging.commit
    for allowed in range(1, 5):  # what is outside, the embedding, two blocks; the head is never reached
        made = 0

        def commit(staging: Staging, entry: dict[str, Any], allowed: int = allowed) -> None:
            nonlocal made
            if made == allowed:
                raise WorkError("the disk is full", "free some space")
            made += 1
            kept(staging, entry)

        with monkeypatch.context() as patched:
            patched.setattr(Staging, "commit", commit)
            with pytest.raises(WorkError):
                pipeline.run(wanted, model=source, output=tmp_path / str(allowed))
        again = pipeline.run(wanted, model=source, output=tmp_path / str(allowed))
        assert again.resumed_blocks == max(0, allowed - 2)
        assert harness.tensor_hashes(again.artifact) == harness.tensor_hashes(whole)
        assert again.artifact.layers() == whole.layers()


def test_blocks_make_up_for_the_embedding(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """They learn behind the quantised table: with another one their codes are others."""
    source = tiny("llama")
    hashes = [
        harness.tensor_hashes(pipeline.run(wanted, model=source, output=tmp_path / str(number)).artifact)
        for number, wanted in enumerate([asking("gptq", text), asking("gptq", text, embeddings="w3a16-g32")])
    ]
    first = "model.layers.0.mlp.down_proj.weight_packed"
    assert hashes[0][first] != hashes[1][first]


def test_refining_measures_against_the_original_tables(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, wanted = tiny("llama"), asking("gptq", text, embeddings="w4a16-g32")
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    job = resolve(wanted, model=source, output=tmp_path / "other", device="cpu")
    assert isinstance(job, Job)
    assert job.calibration is not None
    with deterministic() as workers:
        model = TunedModel(job, harness.tensors(artifact.path), job.calibration.tokens, workers)
        found = model.divergence([7])
    tokens = job.calibration.tokens[7:8]
    before = harness.source_logits(source, tokens).log_softmax(-1)
    after = harness.fake_quantized_logits(source, artifact, tokens).log_softmax(-1)
    assert found == pytest.approx(float((before.exp() * (before - after)).sum() / tokens.numel()), rel=1e-3)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"embeddings": "w4a16-g64"}, "group size 64 does not divide the width 96 of model.embed_tokens"),
        ({"embeddings": "w4a16-g32", "head": "w8a16-g32"}, "are one table"),
        ({"method": "hadamard", "embeddings": "w4a16-g32"}, "makes two tables of the tied embedding"),
    ],
)
def test_what_cannot_be_is_refused(
    stage: dict[str, Any], message: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    wanted = asking(stage.pop("method", "gptq"), text, **stage)
    assert message in pipeline.plan(wanted, model=tiny("llama"), output=tmp_path / "out").problems[0]
    with pytest.raises(UserError, match=message):
        pipeline.run(wanted, model=tiny("llama"), output=tmp_path / "out")


def test_words_that_are_no_layout(text: Path) -> None:
    for word in ("W8A8", "w9a16", "nf4", "w4a16-g0x"):
        with pytest.raises(UserError, match="embeddings"):
            asking("gptq", text, embeddings=word)
    with pytest.raises(UserError, match="has no place for it"):
        asking("gptq", text, embeddings="w4a16-g32", format="awq")
    plain, one = asking("gptq", text), asking("gptq", text, embeddings="W4 g32")
    assert "embeddings" not in plain.canonical()
    assert one.hash() == asking("gptq", text, embeddings={"bits": 4, "group_size": 32}).hash() != plain.hash()


def test_embeddings_that_hold_no_numbers(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    def broken(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.embed_tokens.weight"][3, 3] = float("nan")
        return tensors

    source = harness.copy_with(tiny("llama"), tmp_path / "source", broken)
    with pytest.raises(WorkError, match="embed_tokens"):
        pipeline.run(asking("rtn", text, embeddings="w4a16-g32"), model=source, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
