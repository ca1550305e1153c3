"""Every edge is a place where a scale moves without changing the block, and no such place of a known kind is missed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compress.models.families import Edge
from compress.models.folding import fold_scale
from compress.models.graph import features
from compress.models.skeleton import Skeleton
from tests.models.streaming import open_skeleton
from tests.tiny_models import EXPERTS, FAMILIES, tiny_tokens

# (model type, changes of its configuration) -> edges of the last block: (from norms, from linears)
EXPECTED: dict[str, tuple[str, dict, int, int]] = {
    "llama": ("llama", {}, 2, 1),
    "llama without grouping": ("llama", {"num_key_value_heads": 6}, 2, 2),
    "mistral": ("mistral", {}, 2, 1),
    "qwen2": ("qwen2", {}, 2, 1),
    "qwen3": ("qwen3", {}, 2, 1),
    "gemma2": ("gemma2", {}, 2, 1),
    "gemma2 without grouping": ("gemma2", {"num_key_value_heads": 6}, 2, 2),
    "gemma3_text": ("gemma3_text", {}, 2, 1),
    "phi3": ("phi3", {}, 2, 1),
    "phi3 without grouping": ("phi3", {"num_key_value_heads": 6}, 2, 2),
    "gpt2": ("gpt2", {}, 2, 1),
    "gpt2 with relu": ("gpt2", {"activation_function": "relu"}, 2, 2),
    "opt": ("opt", {}, 2, 2),
    "opt with gelu": ("opt", {"activation_function": "gelu"}, 2, 1),
    "opt norm after": ("opt", {"do_layer_norm_before": False}, 0, 2),
    "opt plain norms": ("opt", {"layer_norm_elementwise_affine": False, "enable_bias": False}, 0, 2),
    "gpt_neox": ("gpt_neox", {}, 2, 0),
    "gpt_neox sequential": ("gpt_neox", {"use_parallel_residual": False}, 2, 0),
    "mixtral": ("mixtral", {}, 2, EXPERTS),
    "qwen3_moe": ("qwen3_moe", {}, 2, EXPERTS),
    "deepseek_v3": ("deepseek_v3", {}, 4, EXPERTS + 1),
    "deepseek_v3 dense query": ("deepseek_v3", {"q_lora_rank": None}, 3, EXPERTS + 1),
}


def test_every_family_is_listed() -> None:
    assert {model_type for model_type, *_ in EXPECTED.values()} == set(FAMILIES)


@pytest.mark.parametrize("case", EXPECTED)
def test_folding_any_scale_along_any_edge_changes_nothing(case: str, tiny: Callable[..., Path]) -> None:
    model_type, overrides, _, _ = EXPECTED[case]
    skeleton = open_skeleton(tiny(model_type, **overrides), torch.float64)
    hidden, calls = skeleton.embed(tiny_tokens(2, 19))
    for block in range(skeleton.num_blocks):
        module = skeleton.materialise(block)
        expected = skeleton.run_block(module, hidden, calls[block])
        for edge in skeleton.edges(block):
            output = _output_after(skeleton, block, edge, hidden, calls[block])
            # norms and routers compute in float32 whatever the block's dtype
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5, msg=lambda m, e=edge: f"{e}: {m}")
        hidden = expected


@pytest.mark.parametrize("case", EXPECTED)
def test_leaving_out_any_consumer_of_an_edge_shows(case: str, tiny: Callable[..., Path]) -> None:
    model_type, overrides, _, _ = EXPECTED[case]
    skeleton = open_skeleton(tiny(model_type, **overrides), torch.float64)
    hidden, calls = skeleton.embed(tiny_tokens(8, 40))  # enough for every expert to get some
    block = skeleton.num_blocks - 1
    expected = skeleton.run_block(skeleton.materialise(block), hidden, calls[block])
    for edge in skeleton.edges(block):
        for left_out in edge.consumers:
            partial = replace(edge, consumers=tuple(name for name in edge.consumers if name != left_out))
            change = (_output_after(skeleton, block, partial, hidden, calls[block]) - expected).abs().max()
            assert change > 1e-3, f"{edge.producer} does not feed {left_out}"


@pytest.mark.parametrize("case", EXPECTED)
def test_no_edge_is_missed(case: str, tiny: Callable[..., Path]) -> None:
    model_type, overrides, norms, linears = EXPECTED[case]
    skeleton = open_skeleton(tiny(model_type, **overrides))
    kinds = [edge.kind for edge in skeleton.edges(skeleton.num_blocks - 1)]
    assert (kinds.count("norm"), kinds.count("linear")) == (norms, linears)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_the_dense_block_of_a_mixture_has_the_edges_of_a_dense_model(
    model_type: str, tiny: Callable[..., Path]
) -> None:
    skeleton = open_skeleton(tiny(model_type))
    mlp = [edge for edge in skeleton.edges(0) if ".mlp." in edge.consumers[0]]
    prefix = "model.layers.0"
    assert [(edge.producer, edge.consumers) for edge in mlp] == [
        (f"{prefix}.post_attention_layernorm", (f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj")),
        (f"{prefix}.mlp.up_proj", (f"{prefix}.mlp.down_proj",)),
    ]


def test_the_norm_before_a_mixture_feeds_its_router_and_every_expert(tiny: Callable[..., Path]) -> None:
    skeleton = open_skeleton(tiny("deepseek_v3"))
    (edge,) = [edge for edge in skeleton.edges(1) if edge.producer.endswith("post_attention_layernorm")]
    mlp = "model.layers.1.mlp"
    experts = {f"{mlp}.experts.{n}.{part}" for n in range(EXPERTS) for part in ("gate_proj", "up_proj")}
    shared = {f"{mlp}.shared_experts.{part}" for part in ("gate_proj", "up_proj")}
    assert set(edge.consumers) == {f"{mlp}.gate"} | experts | shared


@pytest.mark.parametrize(("model_type", "offset", "has_bias"), [("gemma2", True, False), ("gpt2", False, True)])
def test_an_edge_says_how_its_norm_computes(
    model_type: str, offset: bool, has_bias: bool, tiny: Callable[..., Path]
) -> None:
    norms = [edge for edge in open_skeleton(tiny(model_type)).edges(0) if edge.kind == "norm"]
    assert {(edge.offset, edge.has_bias) for edge in norms} == {(offset, has_bias)}


def _output_after(skeleton: Skeleton, block: int, edge: Edge, hidden: torch.Tensor, call: dict) -> torch.Tensor:
    """The block's output with a random scale between 1/2 and 2 folded along the edge into a fresh copy."""
    module = skeleton.materialise(block)
    modules = skeleton.modules(block, module)
    channels = modules[edge.producer].weight.shape[0]
    if edge.rows is not None:
        channels = edge.rows[1] - edge.rows[0]
    elif edge.consumers and edge.kind == "linear":
        channels = features(modules[edge.consumers[0]])[0]
    elif edge.kind == "linear":
        channels = features(modules[edge.producer])[1]
    generator = torch.Generator().manual_seed(channels)
    fold_scale(edge, modules, torch.exp2(2 * torch.rand(channels, generator=generator) - 1))
    return skeleton.run_block(module, hidden, call)
