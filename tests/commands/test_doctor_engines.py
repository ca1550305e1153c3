"""`compress doctor ARTIFACT --engine`: the rules against artifacts of every format, and the rules themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from compress.formats.registry import FORMATS
from compress.models.checkpoint import Checkpoint
from compress.quantization import rtn, ternary
from compress.quantization.configs import RtnConfig
from compress.schemes import FIXED_SCHEMES
from compress.types import IntScheme, QuantizedTensor, Scheme
from compress.workflows import engines
from compress.workflows.engines import diagnose

LINEAR = "model.layers.0.mlp.down_proj"
RULES: dict[str, Any] = yaml.safe_load(Path(engines.__file__).with_name("engines.yaml").read_text())
FACTS = {"format", "model_type", "schemes", "kv_cache", "act_order", "tied", "experts"}
FACTS |= {"kind", "bits", "group_size", "symmetric", "inputs", "granularity", "in_features", "out_features", "expert"}
FACTS |= {"place", "packed_embedding", "shared_scale", "whole_heads", "whole", "whole_groups"}


def directory(place: Path, format: str, scheme: IntScheme, out: int = 128, width: int = 256) -> Checkpoint:
    """A model directory of one packed linear."""
    groups = scheme.groups(width)
    zero = None if scheme.symmetric else torch.ones(out, groups, dtype=torch.int8)
    weight = QuantizedTensor(
        torch.zeros(out, width, dtype=torch.int8), torch.ones(out, groups, dtype=torch.float16), zero, scheme
    )
    return written(place, format, weight)


def written(place: Path, format: str, weight: QuantizedTensor) -> Checkpoint:
    """A model directory of one packed linear, with a number for its inputs where the scheme stores one."""
    return model_of(place, format, {LINEAR: weight})


def model_of(place: Path, format: str, weights: dict[str, QuantizedTensor]) -> Checkpoint:
    """A model directory of packed linears, of 8 heads of queries and 2 of keys."""
    chosen = FORMATS[format]  # type: ignore[index]
    place.mkdir()
    schemes: dict[str, Scheme] = {name: weight.scheme for name, weight in weights.items()}
    tensors = {}
    for linear, weight in weights.items():
        static = weight.scheme.inputs is not None and not weight.scheme.inputs.dynamic
        stored = chosen.pack(weight, torch.ones(1) if static else None)
        tensors |= {f"{linear}.{name}": tensor.clone() for name, tensor in stored.items()}
    config = {"model_type": "llama", "quantization_config": chosen.config(schemes, ["lm_head"])}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    (place / "config.json").write_text(json.dumps(config))
    save_file(tensors, place / "model.safetensors")
    return Checkpoint.open(place)


CASES = [
    ("gptq", IntScheme(4, 128), "vllm", "loads", []),
    ("gptq", IntScheme(3, 128), "vllm", "does not load", ["gptq-bits"]),
    ("gptq", IntScheme(4, 16), "vllm", "does not load", ["gptq-group"]),
    ("gptq-v2", IntScheme(4, 128, False), "vllm", "does not load", ["gptq-asymmetric"]),
    ("awq", IntScheme(4, 16), "vllm", "loads with warnings", ["awq-group"]),
    ("awq", IntScheme(4, 128), "vllm", "loads", []),
    ("compressed-tensors", IntScheme(4, 128), "vllm", "loads", []),
    ("compressed-tensors", IntScheme(3, 16), "vllm", "loads with warnings", ["packed-group", "packed-bits"]),
    (
        "compressed-tensors",
        IntScheme(3, 128, False),
        "vllm",
        "does not load",
        ["packed-asymmetric", "packed-bits"],
    ),
    ("compressed-tensors", IntScheme(3, 128), "sglang", "does not load", ["packed-bits"]),
    ("compressed-tensors", IntScheme(4, 128, False), "sglang", "loads with warnings", ["packed-asymmetric"]),
    ("compressed-tensors", IntScheme(4, 128), "trtllm", "does not load", ["packed"]),
    ("awq", IntScheme(4, 128), "trtllm", "does not load", ["awq-gptq"]),
    ("gptq", IntScheme(4, 128), "transformers", "loads with warnings", ["gptq"]),
    ("compressed-tensors", IntScheme(4, 128), "transformers", "loads", []),
    ("gptq", IntScheme(4, 128), "llamacpp", "loads with warnings", ["gguf"]),
    ("gptq", IntScheme(3, 128), "llamacpp", "does not load", ["gptq-bits", "gguf"]),
    ("awq", IntScheme(4, 128), "llamacpp", "does not load", ["others", "gguf"]),
    ("compressed-tensors", IntScheme(4, 128), "llamacpp", "loads with warnings", ["gguf"]),
    ("compressed-tensors", IntScheme(3, 128), "llamacpp", "does not load", ["packed-bits", "gguf"]),
    ("compressed-tensors", IntScheme(4, None), "llamacpp", "does not load", ["packed-channel", "gguf"]),
    ("gptq", IntScheme(4, 128), "tgi", "loads", []),
    ("compressed-tensors", IntScheme(4, 128), "tgi", "loads with warnings", ["pinned"]),
    ("compressed-tensors", IntScheme(8, None), "tgi", "loads with warnings", ["pinned"]),
    ("compressed-tensors", IntScheme(3, 16), "tgi", "does not load", ["packed-bits", "packed-group", "pinned"]),
    ("compressed-tensors", IntScheme(4, 64, False), "tgi", "does not load", ["packed-asymmetric", "pinned"]),
]


@pytest.mark.parametrize(("format", "scheme", "engine", "answer", "rules"), CASES)
def test_what_an_engine_does(
    format: str, scheme: IntScheme, engine: str, answer: str, rules: list[str], tmp_path: Path
) -> None:
    found = diagnose(directory(tmp_path / "model", format, scheme), engine)
    assert (found.answer, [finding.rule for finding in found.findings]) == (answer, rules)
    assert found.format == format


@pytest.mark.parametrize(
    ("format", "out", "width", "rules"),
    [
        ("gptq", 96, 256, ["marlin-outputs"]),
        ("awq", 128, 64, ["marlin-inputs"]),
        ("compressed-tensors", 96, 64, ["marlin-inputs", "marlin-outputs"]),
    ],
)
def test_shapes_come_from_what_is_stored(format: str, out: int, width: int, rules: list[str], tmp_path: Path) -> None:
    found = diagnose(directory(tmp_path / "model", format, IntScheme(4, 32), out, width), "vllm")
    assert [finding.rule for finding in found.findings] == rules
    assert {(finding.linear, finding.linears) for finding in found.findings} == {(LINEAR, 1)}


def test_what_no_rule_covers_is_not_called_loading(run: Callable, tmp_path: Path) -> None:
    path = tmp_path / "mxfp8"
    made = run("quantize", "--method", "rtn", "--scheme", "MXFP8A16", "--output", path, "--no-eval")
    assert made.code == 0
    for engine in ("vllm", "sglang"):
        found = diagnose(Checkpoint.open(path), engine)
        assert (found.answer, found.findings[0].rule) == ("not known", "uncovered-weights")
        assert found.findings[0].linears == 42
    shown = run("doctor", path, "--engine", "vllm")
    assert shown.code == 3
    assert "no rule here says whether vllm reads mxfp8 weights in compressed-tensors" in shown.out
    assert run("doctor", path, "--engine", "transformers").code == 0


def test_an_architecture_that_no_rule_names_is_not_called_loading(tmp_path: Path) -> None:
    checkpoint = directory(tmp_path / "model", "compressed-tensors", IntScheme(4, 128))
    checkpoint.config["model_type"] = "newest"
    for engine in set(RULES["engines"]) - {"trtllm"}:  # which do not load these weights at all
        found = diagnose(checkpoint, engine)
        assert found.answer == "not known"
        assert "uncovered-architecture" in [finding.rule for finding in found.findings]
    checkpoint.config["model_type"] = "opt"
    del checkpoint.config["quantization_config"]
    assert diagnose(checkpoint, "trtllm").answer == diagnose(checkpoint, "llamacpp").answer == "not known"
    assert diagnose(checkpoint, "vllm").answer == "loads"


@pytest.mark.parametrize(
    ("scheme", "format", "engine", "answer", "rules"),
    [
        ("NVFP4", "compressed-tensors", "vllm", "loads with warnings", ["fp4-hardware"]),
        ("NVFP4", "modelopt", "trtllm", "loads with warnings", ["fp4-hardware"]),
        ("NVFP4A16", "modelopt", "trtllm", "not known", ["uncovered-weights", "fp4-hardware"]),
        ("NVFP4A16", "compressed-tensors", "trtllm", "does not load", ["nvfp4-weights", "fp4-hardware"]),
        ("MXFP4", "compressed-tensors", "trtllm", "loads with warnings", ["mxfp4-inputs", "fp4-hardware"]),
        ("MXFP8", "compressed-tensors", "trtllm", "does not load", ["mxfp8"]),
        ("NVFP4", "modelopt", "llamacpp", "loads with warnings", ["gguf"]),
        ("MXFP4", "compressed-tensors", "llamacpp", "does not load", ["mx", "gguf"]),
        ("W2A8", "bitnet", "llamacpp", "does not load", ["bitnet", "gguf", "inputs"]),
        ("W2A8", "bitnet", "transformers", "loads", []),
        ("NVFP4A16", "modelopt", "transformers", "does not load", ["modelopt"]),
        ("MXFP4A16", "compressed-tensors", "vllm", "loads with warnings", ["mxfp4-weights"]),
        ("MXFP4", "compressed-tensors", "sglang", "not known", ["uncovered-weights"]),
        ("NF4", "bitsandbytes", "transformers", "loads with warnings", ["bitsandbytes-package"]),
        ("NF4", "bitsandbytes", "trtllm", "does not load", ["bitsandbytes"]),
        ("NF4", "bitsandbytes", "tgi", "not known", ["uncovered-weights"]),
        ("W8A8", "compressed-tensors", "tgi", "loads with warnings", ["pinned"]),
        ("W8A8_STATIC", "compressed-tensors", "tgi", "loads with warnings", ["pinned", "int8-static"]),
        ("FP8_DYNAMIC", "compressed-tensors", "tgi", "loads with warnings", ["pinned"]),
        ("FP8_BLOCK", "compressed-tensors", "tgi", "does not load", ["fp8-tiles", "pinned"]),
        ("NVFP4", "compressed-tensors", "tgi", "does not load", ["fp4", "pinned"]),
        ("MXFP8", "compressed-tensors", "tgi", "does not load", ["fp4", "pinned"]),
    ],
)
def test_floats(scheme: str, format: str, engine: str, answer: str, rules: list[str], tmp_path: Path) -> None:
    named = FIXED_SCHEMES[scheme]
    weight = torch.randn(128, 256)
    rounded = (
        ternary.transform(weight, named, torch.bfloat16)
        if scheme == "W2A8"
        else rtn.transform(weight, named, RtnConfig(scale_search=False), torch.bfloat16)
    )
    found = diagnose(written(tmp_path / "model", format, rounded), engine)
    assert (found.answer, [finding.rule for finding in found.findings]) == (answer, rules)


@pytest.mark.parametrize("format", ["compressed-tensors", "modelopt"])
def test_one_global_scale_for_what_engines_load_as_one(format: str, tmp_path: Path) -> None:
    names = {last: f"model.layers.0.mlp.{last}" for last in ("gate_proj", "up_proj", "down_proj")}
    scheme, config = FIXED_SCHEMES["NVFP4"], RtnConfig(scale_search=False)
    alike, larger = (
        rtn.transform(torch.randn(128, 256) * size, scheme, config, torch.bfloat16) for size in (1.0, 64.0)
    )
    shared = {names["gate_proj"]: alike, names["up_proj"]: alike, names["down_proj"]: larger}
    assert "nvfp4-shared" not in [f.rule for f in diagnose(model_of(tmp_path / "one", format, shared), "vllm").findings]
    found = diagnose(model_of(tmp_path / "two", format, {**shared, names["up_proj"]: larger}), "vllm")
    assert (found.answer, found.findings[0].rule, found.findings[0].linears) == ("does not load", "nvfp4-shared", 2)


@pytest.mark.parametrize(
    ("linear", "scheme", "gpus", "rules"),
    [
        ("mlp.down_proj", IntScheme(4, 128), 2, []),
        ("mlp.down_proj", IntScheme(4, 128), 4, ["split-groups", "marlin-inputs"]),
        ("mlp.down_proj", IntScheme(4, None), 4, ["marlin-inputs"]),
        ("mlp.gate_proj", IntScheme(4, 128), 2, []),
        ("mlp.gate_proj", IntScheme(4, 128), 4, ["marlin-outputs"]),
        ("self_attn.k_proj", IntScheme(4, 128), 8, []),
        ("mlp.gate_proj", IntScheme(4, 128), 3, ["split-heads", "split-outputs", "marlin-outputs"]),
        ("mlp.gate_proj", FIXED_SCHEMES["FP8_BLOCK"], 2, ["split-groups"]),
    ],
)
def test_what_several_gpus_get(linear: str, scheme: Scheme, gpus: int, rules: list[str], tmp_path: Path) -> None:
    weight = rtn.transform(torch.randn(128, 256), scheme, RtnConfig(scale_search=False), torch.bfloat16)
    checkpoint = model_of(tmp_path / "model", "compressed-tensors", {f"model.layers.0.{linear}": weight})
    assert [finding.rule for finding in diagnose(checkpoint, "vllm", gpus).findings] == rules
    assert diagnose(checkpoint, "vllm").answer == "loads"


def test_dense_models_and_layouts_without_a_name(tmp_path: Path) -> None:
    checkpoint = directory(tmp_path / "model", "compressed-tensors", IntScheme(4, 32))
    quantization = checkpoint.config.pop("quantization_config")
    assert diagnose(checkpoint, "vllm").answer == "loads"
    assert diagnose(checkpoint, "llamacpp").answer == "loads with warnings"
    checkpoint.config["quantization_config"] = {"reader": "compress", **quantization, "quant_method": None}
    assert [finding.rule for finding in diagnose(checkpoint, "vllm").findings] == ["own-reader"]
    checkpoint.config["quantization_config"] = {"quant_method": "exl2"}
    assert [finding.rule for finding in diagnose(checkpoint, "vllm").findings] == ["unknown"]


def test_every_rule_is_whole_and_names_facts_that_there_are() -> None:
    assert set(RULES["engines"]) == {"vllm", "sglang", "trtllm", "transformers", "llamacpp", "tgi"}
    for rules in (RULES["common"], *RULES["engines"].values()):
        assert len({rule["id"] for rule in rules}) == len(rules)
        for rule in rules:
            assert set(rule) == {"id", "when", "verdict", "why", "hint", "source", "date"}, rule["id"]
            assert rule["verdict"] in ("loads", "fails", "warns")
            assert rule["when"].keys() <= FACTS, rule["id"]
            assert all(rule[key] for key in ("why", "hint", "source"))
            for wanted in rule["when"].values():
                assert isinstance(wanted, list) or set(wanted) <= {"not", "not_multiple_of", "over"}


def test_the_command_answers_by_its_exit_code(run: Callable, tmp_path: Path) -> None:
    directory(tmp_path / "good", "gptq", IntScheme(4, 128))
    directory(tmp_path / "bad", "gptq", IntScheme(3, 128))
    good = run("doctor", tmp_path / "good", "--engine", "vllm")
    assert (good.code, good.out) == (0, "vllm: loads\n")
    bad = run("doctor", tmp_path / "bad", "--engine", "vllm", "--json")
    assert bad.code == 1
    assert (bad.json["answer"], bad.json["format"]) == ("does not load", "gptq")
    (finding,) = bad.json["findings"]
    assert (finding["rule"], finding["linear"], finding["verdict"]) == ("gptq-bits", LINEAR, "fails")
    assert "auto_gptq.py" in finding["source"]
    text = run("doctor", tmp_path / "bad", "--engine", "vllm").out
    assert "fails: vLLM's GPTQ reads 4 and 8 bits" in text
    assert "quantise with --format compressed-tensors" in text


def test_mistakes_are_named(run: Callable, tmp_path: Path) -> None:
    directory(tmp_path / "model", "gptq", IntScheme(4, 128))
    assert "unknown engine 'ollama'" in run("doctor", tmp_path / "model", "--engine", "ollama").refused(2)
    assert "go together" in run("doctor", tmp_path / "model").refused(2)
    assert "go together" in run("doctor", "--engine", "vllm").refused(2)
    run("doctor", tmp_path / "nothing", "--engine", "vllm").refused(2)
    split = run("doctor", tmp_path / "model", "--engine", "tgi", "--tensor-parallel", 2)
    assert "what tgi does on several GPUs" in split.refused(2)
    assert "goes with an engine" in run("doctor", "--tensor-parallel", 2).refused(2)
    shown = run("doctor", tmp_path / "model", "--engine", "vllm", "--tensor-parallel", 4)
    assert (shown.code, shown.out.splitlines()[0]) == (1, "vllm, 4 GPUs: does not load")
