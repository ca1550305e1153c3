"""Linears with schemes of their own: what the recipe gives each is what the artifact holds and what is computed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compress import pipeline
from compress.errors import UserError
from compress.evaluation.scheme import scheme_of
from compress.formats.compressed_tensors import is_for_own_reader
from compress.recipe import Recipe, load_recipe, parse_recipe
from compress.runtime.transformers_backend import load
from compress.types import IntScheme
from tests.pipeline import harness
from tests.pipeline.harness import METHODS
from tests.tiny_models import tiny_tokens

QKV = "re:.*[qkv]_proj$"
OVERRIDES = [
    {"linears": ["*.mlp.*"], "scheme": {"bits": 3, "group_size": 16}},
    {"linears": ["model.layers.1.mlp.down_proj", QKV], "scheme": {"bits": 8, "group_size": "channel"}},
]


def mixed(method: str, text: Path, overrides: list[dict[str, Any]] | None = None, **stage: Any) -> Recipe:
    """4 bits in groups of 32, some linears otherwise."""
    learns = {} if method == "rtn" else {"calibration": {"source": str(text), "samples": 8, "seq_len": 24}}
    wanted = {"method": method, "scheme": {"bits": 4, "group_size": 32}, **learns, **stage}
    return parse_recipe({"stages": [{**wanted, "overrides": OVERRIDES if overrides is None else overrides}]})


def expected_scheme(name: str) -> IntScheme:
    if name == "model.layers.1.mlp.down_proj" or re.match(QKV[3:], name):
        return IntScheme(8, None)
    return IntScheme(3, 16) if ".mlp." in name else IntScheme(4, 32)


@pytest.mark.parametrize("method", METHODS)
def test_every_linear_has_the_scheme_that_is_its_own(
    method: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, tokens, wanted = tiny("llama"), tiny_tokens(2, 12), mixed(method, text)
    planned = pipeline.plan(wanted, model=source, output=tmp_path / "out")
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    assert {linear.name: linear.scheme for linear in planned.linears} == {
        layer["name"]: expected_scheme(layer["name"]) for layer in artifact.layers()
    }
    assert {layer["name"]: layer["scheme"] for layer in artifact.layers()} == {
        linear.name: expected_scheme(linear.name).label for linear in planned.linears
    }
    assert planned.bits_per_weight == pytest.approx(artifact.manifest.sizes.bits_per_weight, abs=1e-6)
    assert scheme_of(artifact.config) == "w3a16-g16+w4a16-g32+w8a16-channel"
    assert artifact.scheme == "mixed"
    expected = harness.fake_quantized_logits(source, artifact, tokens)
    torch.testing.assert_close(harness.loaded_logits(artifact.path, tokens), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(load(artifact.path, device="cpu").score(tokens), expected, rtol=1e-5, atol=1e-5)
    again = pipeline.run(load_recipe(artifact.path / "recipe.yaml"), model=source, output=tmp_path / "again").artifact
    assert harness.tensor_hashes(again) == harness.tensor_hashes(artifact)


def test_a_mixed_run_without_output_is_named_after_its_bits(
    tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source, wanted = tiny("llama"), mixed("rtn", text)
    planned = pipeline.plan(wanted, model=source)
    assert planned.output.parent.name == f"{source.name}-rtn-mixed-{planned.bits_per_weight:.2f}b"


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        (
            [{"linears": ["*.q_proj"], "scheme": {"bits": 8, "group_size": 32}}],
            "model.layers.0.self_attn.q_proj is w8a16-g32 but model.layers.0.self_attn.k_proj is w4a16-g32",
            "one scheme",
        ),
        ([{"linears": ["*.o_porj"], "scheme": "W8A16"}], "'*.o_porj' matches no linear", "names look like"),
        (
            [{"linears": ["*.o_proj"], "scheme": {"bits": 8, "group_size": 64}}],
            "group size 64 does not divide",
            "--group-size 48",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    overrides: list[dict[str, Any]], message: str, hint: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, wanted = tiny("llama"), mixed("rtn", text, overrides)
    planned = pipeline.plan(wanted, model=source, output=tmp_path / "out")
    assert message in planned.problems[0]
    with pytest.raises(UserError) as refused:
        pipeline.run(wanted, model=source, output=tmp_path / "out")
    assert message in refused.value.message
    assert hint in refused.value.hint
    assert not (tmp_path / "out").exists()


def test_overrides_are_part_of_the_recipe(text: Path) -> None:
    plain, one = mixed("rtn", text, []), mixed("rtn", text)
    assert "overrides" not in plain.canonical()
    assert "overrides" not in plain.to_yaml()
    assert plain.hash() != one.hash() != mixed("rtn", text, OVERRIDES[::-1]).hash()
    assert parse_recipe(yaml.safe_load(one.to_yaml())) == one
    with pytest.raises(UserError, match="gptq rounds to integers"):
        mixed("gptq", text, [{"linears": ["*.mlp.*"], "scheme": "FP8_DYNAMIC"}])
    with pytest.raises(UserError, match=r"overrides\.0\.linears: must be a list with at least one entry"):
        mixed("rtn", text, [{"linears": [], "scheme": "W8A16"}])


ATTENTION = {"linears": ["*.self_attn.*"], "scheme": {"bits": 8, "group_size": 32}}
ZERO_POINTS = {"linears": ["*.mlp.*"], "scheme": {"bits": 4, "group_size": 32, "symmetric": False}}
FIRST_EXPERTS = {"linears": ["*.0.*.experts.*"], "scheme": {"bits": 8, "group_size": 32}}


@pytest.mark.parametrize(
    ("family", "override", "loads"),
    [
        ("mixtral", ATTENTION, True),
        ("mixtral", FIRST_EXPERTS, False),
        ("llama", ZERO_POINTS, False),
    ],
)
def test_transformers_reads_a_mixture_or_is_told_not_to(
    family: str, override: dict[str, Any], loads: bool, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """It decodes zero points and fused experts by one scheme, whatever the config says of each."""
    source, tokens = tiny(family), tiny_tokens(2, 12)
    artifact = pipeline.run(mixed("rtn", text, [override]), model=source, output=tmp_path / "out").artifact
    expected = harness.fake_quantized_logits(source, artifact, tokens)
    torch.testing.assert_close(load(artifact.path, device="cpu").score(tokens), expected, rtol=1e-5, atol=1e-5)
    assert is_for_own_reader(artifact.config["quantization_config"]) == (not loads)
    if loads:
        torch.testing.assert_close(harness.loaded_logits(artifact.path, tokens), expected, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="quant"):
            harness.loaded_logits(artifact.path, tokens)
