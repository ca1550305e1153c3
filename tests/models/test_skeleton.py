"""What a skeleton says of a checkpoint: linears, names, ties, what belongs to which block, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.errors import CompressError, IntegrityError, UserError
from compress.models.tables import tables
from tests.models.conftest import Rewrite
from tests.models.streaming import open_skeleton, oracle_logits, streamed_logits
from tests.tiny_models import EXPERTS, FAMILIES, tiny_tokens

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_matrix_inside_the_blocks_is_a_linear_or_a_router(model_type: str, tiny: Callable[..., Path]) -> None:
    skeleton = open_skeleton(tiny(model_type))
    index = skeleton.checkpoint.index
    inside = re.compile(r"^(model|transformer|gpt_neox)\.(decoder\.)?(layers|h)\.\d+\.")
    matrices = {name for name, info in index.items() if len(info.shape) == 2 and inside.match(name)}
    routers = {name for name in matrices if name.endswith((".gate.weight",))}
    specs = skeleton.linears()
    assert {spec.weight for spec in specs} == matrices - routers
    assert len(specs) == len({spec.name for spec in specs})
    for spec in specs:
        shape = (spec.out_features, spec.in_features)
        assert index[spec.weight].shape == (shape if spec.layout == "linear" else shape[::-1])
        assert spec.weight == f"{spec.name}.weight"
        assert spec.weight in skeleton.block_tensors(spec.block)
        assert ("experts." in spec.name and ".shared_experts." not in spec.name) == (spec.expert is not None)
    assert {spec.layout for spec in specs} == {"conv1d" if model_type == "gpt2" else "linear"}
    experts = {spec.expert for spec in specs} - {None}
    assert experts == (set(range(EXPERTS)) if routers else set())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_live_linears_hold_the_checkpoint_weights(model_type: str, tiny: Callable[..., Path]) -> None:
    skeleton = open_skeleton(tiny(model_type))
    for block in range(skeleton.num_blocks):
        modules = skeleton.modules(block, skeleton.materialise(block))
        for spec in skeleton.linears(block):
            assert torch.equal(modules[spec.name].weight, skeleton.checkpoint.read(spec.weight))
        for edge in skeleton.edges(block):
            assert {edge.producer, *edge.consumers} <= set(modules)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_tensor_belongs_to_one_block_or_to_none(model_type: str, tiny: Callable[..., Path]) -> None:
    skeleton = open_skeleton(tiny(model_type))
    parts = [*(skeleton.block_tensors(block) for block in range(skeleton.num_blocks)), skeleton.outer_tensors()]
    assert sorted(name for part in parts for name in part) == sorted(skeleton.checkpoint.index)
    assert all(parts)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_max_positions_is_the_trained_context(model_type: str, tiny: Callable[..., Path]) -> None:
    assert open_skeleton(tiny(model_type)).max_positions == 64


@pytest.mark.parametrize(
    ("model_type", "groups"),
    [
        ("llama", ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "mlp.gate_proj mlp.up_proj"]),
        ("opt", ["self_attn.q_proj self_attn.k_proj self_attn.v_proj"]),
        ("phi3", []),
        ("gpt2", []),
        (
            "mixtral",
            [
                "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
                *(f"block_sparse_moe.experts.{n}.w1 block_sparse_moe.experts.{n}.w3" for n in range(EXPERTS)),
            ],
        ),
        (
            "deepseek_v3",
            [
                *(f"mlp.experts.{n}.gate_proj mlp.experts.{n}.up_proj" for n in range(EXPERTS)),
                "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj",
            ],
        ),
    ],
)
def test_fusion_groups(model_type: str, groups: list[str], tiny: Callable[..., Path]) -> None:
    skeleton = open_skeleton(tiny(model_type))
    found = [" ".join(re.sub(r"^.*?\.1\.", "", name) for name in group) for group in skeleton.fusion_groups(1)]
    assert found == groups
    names = {spec.name for spec in skeleton.linears(1)}
    assert all(name in names for group in skeleton.fusion_groups(1) for name in group)


def test_names_without_the_model_prefix(tiny: Callable[..., Path], rewritten: Callable[[Path, Rewrite], Path]) -> None:
    original = tiny("gpt2")

    def older(tensors: Tensors) -> Tensors:
        stripped = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        return {**stripped, "h.0.attn.bias": torch.ones(1, 1, 64, 64).tril()}

    path, tokens = rewritten(original, older), tiny_tokens(1, 9)
    skeleton = open_skeleton(path)
    assert torch.equal(streamed_logits(skeleton, tokens), oracle_logits(original, tokens))
    assert skeleton.tied() == {"lm_head.weight": "wte.weight"}
    assert skeleton.linears(1)[0].name == "h.1.attn.c_attn"
    assert "h.0.attn.bias" in skeleton.block_tensors(0)
    assert skeleton.edges(0)[0].producer == "h.0.ln_1"


def test_opt_without_the_model_prefix(tiny: Callable[..., Path], rewritten: Callable[[Path, Rewrite], Path]) -> None:
    original, tokens = tiny("opt"), tiny_tokens(1, 9)
    path = rewritten(original, lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()})
    skeleton = open_skeleton(path)
    assert torch.equal(streamed_logits(skeleton, tokens), oracle_logits(original, tokens))
    assert skeleton.linears(0)[0].name.startswith("decoder.layers.0.")


def test_gpt_neox_with_the_older_name_of_its_head(
    tiny: Callable[..., Path], rewritten: Callable[[Path, Rewrite], Path]
) -> None:
    original, tokens = tiny("gpt_neox", tie_word_embeddings=False), tiny_tokens(1, 9)
    expected = oracle_logits(original, tokens)

    def older(tensors: Tensors) -> Tensors:
        head = tensors.pop("lm_head.weight") if "lm_head.weight" in tensors else tensors.pop("embed_out.weight")
        masks = {"gpt_neox.layers.1.attention.masked_bias": torch.tensor(-1e9)}
        return {**tensors, "embed_out.weight": head, **masks}

    skeleton = open_skeleton(rewritten(original, older))
    assert torch.equal(streamed_logits(skeleton, tokens), expected)
    assert "embed_out.weight" in skeleton.outer_tensors()
    assert [table.weight for table in tables(skeleton)] == ["gpt_neox.embed_in.weight", "embed_out.weight"]
    assert "gpt_neox.layers.1.attention.masked_bias" in skeleton.block_tensors(1)


def test_extra_layers_behind_the_last_block_are_outer_tensors(
    tiny: Callable[..., Path], rewritten: Callable[[Path, Rewrite], Path]
) -> None:
    extra = {"model.layers.61.eh_proj.weight": torch.ones(3, 5), "model.layers.61.enorm.weight": torch.ones(7)}
    original, tokens = tiny("deepseek_v3"), tiny_tokens(1, 9)
    skeleton = open_skeleton(rewritten(original, lambda tensors: {**tensors, **extra}))
    assert set(extra) <= set(skeleton.outer_tensors())
    assert not any(set(extra) & set(skeleton.block_tensors(block)) for block in range(2))
    assert torch.equal(streamed_logits(skeleton, tokens), oracle_logits(original, tokens))


def test_block_one_does_not_take_the_tensors_of_block_ten(tiny: Callable[..., Path]) -> None:
    skeleton = open_skeleton(tiny("llama", num_hidden_layers=11))
    counts = {len(skeleton.block_tensors(block)) for block in range(11)}
    assert counts == {16}


class TestTies:
    def test_a_stored_alias_with_equal_bytes_is_tied(
        self, tiny: Callable[..., Path], rewritten: Callable[[Path, Rewrite], Path]
    ) -> None:
        path = rewritten(tiny("llama"), lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
        skeleton = open_skeleton(path)
        assert skeleton.tied() == {"lm_head.weight": "model.embed_tokens.weight"}
        assert "lm_head.weight" in skeleton.outer_tensors()

    def test_two_stored_tensors_that_differ_are_not_tied(
        self, tiny: Callable[..., Path], rewritten: Callable[[Path, Rewrite], Path]
    ) -> None:
        path = rewritten(tiny("llama"), lambda t: {**t, "lm_head.weight": -t["model.embed_tokens.weight"]})
        skeleton, tokens = open_skeleton(path), tiny_tokens(1, 9)
        assert skeleton.tied() == {}
        assert torch.equal(streamed_logits(skeleton, tokens), oracle_logits(path, tokens))

    def test_the_head_alone_may_be_stored(
        self, tiny: Callable[..., Path], rewritten: Callable[[Path, Rewrite], Path]
    ) -> None:
        original, tokens = tiny("llama"), tiny_tokens(1, 9)

        def only_head(tensors: Tensors) -> Tensors:
            return {"lm_head.weight": tensors.pop("model.embed_tokens.weight"), **tensors}

        skeleton = open_skeleton(rewritten(original, only_head))
        assert skeleton.tied() == {"model.embed_tokens.weight": "lm_head.weight"}
        assert torch.equal(streamed_logits(skeleton, tokens), oracle_logits(original, tokens))

    def test_an_untied_model_has_no_ties(self, tiny: Callable[..., Path]) -> None:
        assert open_skeleton(tiny("qwen3")).tied() == {}


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"model_type": "mamba"}, UserError, "'mamba' is not supported"),
            ({"model_type": None}, UserError, "is not supported"),
            ({"quantization_config": {"quant_method": "gptq"}}, UserError, "already quantised (gptq)"),
            ({"quantization_config": "int4"}, UserError, "already quantised"),
            ({"vision_config": {}}, UserError, "multimodal"),
            ({"hidden_size": "wide"}, UserError, "config.json"),
            ({"num_attention_heads": 0}, UserError, "config.json"),
            ({"intermediate_size": 161}, IntegrityError, "where config.json asks for"),
            ({"num_hidden_layers": 3}, IntegrityError, "lacks the tensor model.layers.2."),
        ],
    )
    def test_by_configuration(
        self,
        change: dict[str, Any],
        error: type[CompressError],
        words: str,
        tiny: Callable[..., Path],
        tmp_path: Path,
    ) -> None:
        path = shutil.copytree(tiny("llama"), tmp_path / "model")
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(error) as caught:
            open_skeleton(path)
        assert words in caught.value.message
        assert caught.value.hint
        assert "\n" not in caught.value.message

    def test_an_unknown_family_names_the_known_ones(self, tiny: Callable[..., Path], tmp_path: Path) -> None:
        path = shutil.copytree(tiny("llama"), tmp_path / "model")
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "model_type": "bloom"}))
        with pytest.raises(UserError) as caught:
            open_skeleton(path)
        assert all(model_type in caught.value.hint for model_type in FAMILIES)

    def test_an_artifact_only_where_it_is_quantised(self, tiny: Callable[..., Path], tmp_path: Path) -> None:
        path = shutil.copytree(tiny("llama"), tmp_path / "model")
        (path / "compress_manifest.json").write_text("{}")
        assert open_skeleton(path).num_blocks == 2  # a pruned or distilled artifact is a model like any other
        config = json.loads((path / "config.json").read_text())
        quantised = {**config, "quantization_config": {"quant_method": "compressed-tensors"}}
        (path / "config.json").write_text(json.dumps(quantised))
        with pytest.raises(UserError, match="artifact that compress quantised"):
            open_skeleton(path)

    def test_code_beside_a_model_is_not_run(self, tiny: Callable[..., Path], tmp_path: Path) -> None:
        path = shutil.copytree(tiny("llama"), tmp_path / "model")
        (path / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        config = json.loads((path / "config.json").read_text())
        auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
        (path / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
        assert open_skeleton(path).num_blocks == 2
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.bias", "model.norm.weight"])
    def test_a_missing_tensor_is_named(
        self, name: str, tiny: Callable[..., Path], rewritten: Callable[[Path, Rewrite], Path]
    ) -> None:
        path = rewritten(tiny("llama"), lambda tensors: {key: t for key, t in tensors.items() if key != name})
        with pytest.raises(IntegrityError, match=re.escape(name)):
            open_skeleton(path)

    def test_a_missing_embedding_that_is_tied_is_named(
        self, tiny: Callable[..., Path], rewritten: Callable[[Path, Rewrite], Path]
    ) -> None:
        path = rewritten(tiny("llama"), lambda tensors: {k: t for k, t in tensors.items() if "embed" not in k})
        with pytest.raises(IntegrityError, match=r"lm_head\.weight|model\.embed_tokens\.weight"):
            open_skeleton(path)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
    def test_weights_in_eight_bits(
        self, dtype: torch.dtype, tiny: Callable[..., Path], rewritten: Callable[[Path, Rewrite], Path]
    ) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        path = rewritten(tiny("llama"), lambda tensors: {**tensors, name: tensors[name].to(dtype)})
        with pytest.raises(UserError, match="already quantised"):
            open_skeleton(path)

    def test_experts_that_are_stored_fused(self, tiny: Callable[..., Path], tmp_path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(tiny("mixtral"))
        model.save_pretrained(tmp_path / "fused", save_original_format=False)
        with pytest.raises(UserError, match="fused"):
            open_skeleton(tmp_path / "fused")
