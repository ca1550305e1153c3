"""Every family by every method: the artifact behaves like the fake-quantised model, and accounts for every tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from compress import pipeline
from compress.artifact.reader import Artifact
from compress.artifact.verify import verify
from compress.runtime.transformers_backend import load
from tests.pipeline import harness
from tests.pipeline.harness import METHODS, recipe, source_logits
from tests.tiny_models import FAMILIES

OURS_ONLY = ("gpt2",)  # Conv1D weights, which compressed-tensors does not know
ROUTES = {"default": {}, "dequantised": {"quantization_config": CompressedTensorsConfig(dequantize=True)}}
ALL = [pytest.param(family, method, id=f"{family}-{method}") for family in FAMILIES for method in METHODS]

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


@dataclass(frozen=True)
class Made:
    """An artifact, its source, the logits of both (by the oracle) on tokens like the calibration text's."""

    source: Path
    artifact: Artifact
    tokens: Tensor
    original: Tensor
    expected: Tensor

    def lost(self) -> float:
        """Median over tokens of the logits' relative change; few tokens take another expert and change altogether."""
        change = (self.expected - self.original).norm(dim=-1) / self.original.norm(dim=-1)
        return float(change.median())


Make = Callable[[str, str], Made]


@pytest.fixture(scope="module")
def make(tiny: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make(family, method): made once, by the default recipe of the tests."""
    cache: dict[tuple[str, str], Made] = {}

    def made(family: str, method: str) -> Made:
        if (family, method) not in cache:
            source = tiny(family)
            output = tmp_path_factory.mktemp("made") / "out"
            artifact = pipeline.run(recipe(method, text), model=source, output=output).artifact
            tokens = fresh_tokens(source, text)
            expected = harness.fake_quantized_logits(source, artifact, tokens)
            cache[family, method] = Made(source, artifact, tokens, source_logits(source, tokens), expected)
        return cache[family, method]

    return made


def fresh_tokens(source: Path, text: Path) -> Tensor:
    """Words of the same kind that the calibration did not see."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    other = harness.write_text(text.with_name("fresh.txt"), words=80, seed=1).read_text()
    ids = torch.tensor(tokenizer(other)["input_ids"][: 8 * 23]).reshape(8, 23)
    return torch.cat([torch.full((8, 1), tokenizer.bos_token_id), ids], 1)


@pytest.mark.parametrize(("family", "method"), ALL)
def test_it_is_the_fake_quantised_model(family: str, method: str, make: Make) -> None:
    made = make(family, method)
    path = made.artifact.path
    torch.testing.assert_close(load(path, device="cpu").score(made.tokens), made.expected, rtol=1e-5, atol=1e-5)
    for options in {} if family in OURS_ONLY else ROUTES.values():
        found = harness.loaded_logits(path, made.tokens, **options)
        torch.testing.assert_close(found, made.expected, rtol=1e-5, atol=1e-5)
    assert made.lost() > 0.02, "the logits must not be the unquantised ones"


@pytest.mark.parametrize("family", FAMILIES)
def test_calibrated_methods_lose_less_than_rounding(family: str, make: Make) -> None:
    rounding = make(family, "rtn").lost()
    assert rounding < 0.6, "four bits keep most of the model"
    assert make(family, "gptq").lost() < 0.95 * rounding
    assert make(family, "awq").lost() < 0.95 * rounding


@pytest.mark.parametrize(("family", "method"), ALL)
def test_every_tensor_is_accounted_for(family: str, method: str, make: Make) -> None:
    made = make(family, method)
    ledger, before, after = (
        made.artifact.manifest.ledger,
        harness.tensors(made.source),
        harness.tensors(made.artifact.path),
    )
    assert set(ledger) == set(before)
    quantized = {name for name, entry in ledger.items() if entry.action == "quantized"}
    assert quantized == harness.block_matrices(before)
    assert sorted(name for entry in ledger.values() for name in entry.into) == sorted(after)
    folded = {name for name, entry in ledger.items() if entry.action == "folded"}
    for name in set(before) - quantized:
        assert ledger[name].into == [name]
        assert torch.equal(before[name], after[name]) == (name not in folded)
    assert bool(folded) == (method == "awq"), "AWQ must have found a scale, or this tests no folding"
    assert verify(made.artifact.path).problems == []
    layers = {layer["name"]: layer for layer in made.artifact.layers()}
    assert {f"{name}.weight" for name in layers} == quantized
    fallen = {fallback.name for fallback in made.artifact.manifest.fallbacks}
    assert {name for name, layer in layers.items() if layer["fallback"]} == fallen
    assert all(".experts." in name for name in fallen), "only experts may miss tokens"
    measured = (layer["output_error"] for name, layer in layers.items() if name not in fallen)
    assert all((error is None) == (method == "rtn") for error in measured)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_is_the_sources(family: str, make: Make) -> None:
    made = make(family, "awq")
    config = dict(made.artifact.config)
    quantization = config.pop("quantization_config")
    assert config == harness.read_json(made.source / "config.json")
    assert ("quant_method" in quantization) == (family not in OURS_ONLY)
    copied = {file.name for file in made.source.iterdir()} - {"model.safetensors", "config.json"}
    assert {"tokenizer.json", "tokenizer_config.json"} <= copied
    for name in copied:
        assert (made.artifact.path / name).read_bytes() == (made.source / name).read_bytes()


@pytest.mark.parametrize("route", ROUTES)
def test_transformers_refuses_what_it_cannot_read(route: str, make: Make) -> None:
    path = make("gpt2", "rtn").artifact.path
    with pytest.raises(ValueError, match="quant"):
        AutoModelForCausalLM.from_pretrained(path, **ROUTES[route])


@pytest.mark.parametrize("method", METHODS)
def test_a_source_of_several_shards_gives_the_same(method: str, make: Make, text: Path, tmp_path: Path) -> None:
    made = make("llama", method)
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(made.source).save_pretrained(sharded, max_shard_size="150KB")
    AutoTokenizer.from_pretrained(made.source).save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    artifact = pipeline.run(recipe(method, text), model=sharded, output=tmp_path / "out").artifact
    assert harness.tensor_hashes(artifact) == harness.tensor_hashes(made.artifact)
    assert artifact.manifest.ledger == made.artifact.manifest.ledger
    torch.testing.assert_close(harness.loaded_logits(artifact.path, made.tokens), made.expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_packaged_model(method: str, packaged_model: Path, tmp_path: Path) -> None:
    wanted = recipe(method, "tales", group_size=128, samples=4, seq_len=128)
    artifact = pipeline.run(wanted, model=packaged_model, output=tmp_path / "out").artifact
    tokens = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = harness.fake_quantized_logits(packaged_model, artifact, tokens, torch.bfloat16)
    torch.testing.assert_close(harness.loaded_logits(artifact.path, tokens, dtype="auto"), expected)
    expected = harness.fake_quantized_logits(packaged_model, artifact, tokens)
    torch.testing.assert_close(load(artifact.path, device="cpu").score(tokens), expected, rtol=1e-4, atol=1e-4)
    assert 0.02 < harness.distance(expected, source_logits(packaged_model, tokens)) < 0.5
    # So few tokens span fewer directions than the widest inputs have, so damping may have to be raised.
    assert {fallback.action for fallback in artifact.manifest.fallbacks} <= {"damping raised"}
    assert verify(artifact.path).ok
