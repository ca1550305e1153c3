"""The quantization_config, read by the compressed-tensors package and by ourselves."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from torch import nn

from compress.errors import IntegrityError
from compress.evaluation.scheme import scheme_of
from compress.formats.compressed_tensors import (
    for_own_reader,
    is_for_own_reader,
    quantization_config,
    schemes_from_config,
)
from compress.formats.names import refusal
from compress.schemes import FIXED_SCHEMES
from compress.types import IntScheme

SCHEMES = [IntScheme(bits, size, sym) for bits in (2, 3, 4, 8) for size in (32, 128, None) for sym in (True, False)]
NAMES = ["model.layers.1.mlp.down_proj", "model.layers.10.mlp.down_proj", "model.layers.1.mlp.up_proj", "lm_head"]


PRESET_FIELDS = (
    "num_bits", "type", "strategy", "symmetric", "dynamic", "group_size", "block_structure", "scale_dtype", "zp_dtype",
)  # fmt: skip
LAYOUTS = {
    "FP8": "float-quantized",
    "W8A8": "int-quantized",
    "NVFP4": "nvfp4-pack-quantized",
    "MXFP4": "mxfp4-pack-quantized",
    "MXFP8": "mxfp8-quantized",
}


class Tiny(nn.Module):
    """Linears under the names of `NAMES`."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            parent: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(leaf, nn.Linear(128, 8))


def applied(config: dict) -> dict[str, IntScheme]:
    """What the package makes of a config: the scheme of every linear that it quantises."""
    model = Tiny()
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    found = {}
    for name in NAMES:
        scheme = getattr(model.get_submodule(name), "quantization_scheme", None)
        if scheme is not None:
            assert scheme.input_activations is None
            args = scheme.weights
            found[name] = IntScheme(args.num_bits, args.group_size, args.symmetric)
    return found


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_one_scheme_for_all(scheme: IntScheme) -> None:
    wanted = dict.fromkeys(NAMES[:3], scheme)
    config = json.loads(json.dumps(quantization_config(wanted, ["lm_head"])))
    assert applied(config) == wanted
    assert schemes_from_config(config, NAMES) == wanted
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]
    assert config["ignore"] == ["lm_head"]
    assert config["quant_method"] == "compressed-tensors"
    # Zero points load packed only where transformers does not keep the weights packed.
    assert config.get("dequantize", False) == (not scheme.symmetric)


@pytest.mark.parametrize("name", [n for n, s in FIXED_SCHEMES.items() if refusal("compressed-tensors", s) is None])
def test_the_package_knows_schemes_of_inputs_as_its_presets(name: str) -> None:
    scheme = FIXED_SCHEMES[name]
    config = json.loads(json.dumps(quantization_config(dict.fromkeys(NAMES[:3], scheme), ["lm_head"])))
    assert schemes_from_config(config, NAMES) == dict.fromkeys(NAMES[:3], scheme)
    (group,) = QuantizationConfig.model_validate(config).config_groups.values()
    preset = PRESET_SCHEMES.get({"FP8_STATIC": "FP8"}.get(name, name))
    if name == "W8A8_STATIC":  # the package has no preset for it
        preset = PRESET_SCHEMES["W8A8"]
        static = {"strategy": "tensor", "dynamic": False}
        preset = {**preset, "input_activations": preset["input_activations"].model_copy(update=static)}
    assert preset is not None
    for part in ("weights", "input_activations"):
        found, expected = getattr(group, part), preset.get(part)
        assert (found is None) == (expected is None)
        for field in PRESET_FIELDS if found is not None else ():
            assert getattr(found, field) == getattr(expected, field), (part, field)
    (layout,) = (layout for start, layout in LAYOUTS.items() if name.startswith(start))
    assert {config["format"], group.format} == {layout}
    assert {scheme_of({"quantization_config": config})} == {scheme.label}


def test_layouts_of_several_kinds_are_a_mixed_checkpoint() -> None:
    wanted = dict(zip(NAMES[:3], [IntScheme(4, 32), FIXED_SCHEMES["W8A8"], FIXED_SCHEMES["FP8_DYNAMIC"]], strict=True))
    config = json.loads(json.dumps(quantization_config(wanted, ["lm_head"])))
    assert config["format"] == "mixed-precision"
    assert schemes_from_config(config, NAMES) == wanted
    formats = {group["targets"][0]: group["format"] for group in config["config_groups"].values()}
    assert sorted(formats.values()) == ["float-quantized", "int-quantized", "pack-quantized"]
    QuantizationConfig.model_validate(config)


@pytest.mark.parametrize(
    "change",
    [
        {"symmetric": False},
        {"type": "float"},
        {"num_bits": 4},
        {"strategy": "channel"},
        {"dynamic": "local"},
        {"strategy": "token", "dynamic": False},
    ],
)
def test_other_inputs_are_refused(change: dict) -> None:
    config = quantization_config({NAMES[0]: FIXED_SCHEMES["W8A8"]}, [])
    config["config_groups"]["group_0"]["input_activations"].update(change)
    with pytest.raises(IntegrityError, match="cannot be read here"):
        schemes_from_config(config, NAMES)
    assert scheme_of({"quantization_config": config}).startswith("w8a"), "it still has a name"


def test_several_schemes_and_names_that_contain_each_other() -> None:
    wanted = {NAMES[0]: IntScheme(4, 32), NAMES[1]: IntScheme(8, None, False), NAMES[2]: IntScheme(2, 64)}
    config = json.loads(json.dumps(quantization_config(wanted, ["lm_head"])))
    assert applied(config) == wanted
    assert schemes_from_config(config, NAMES) == wanted
    reordered = dict(reversed(wanted.items()))
    assert quantization_config(reordered, ["lm_head"]) == config


def test_ignored_linears_stay() -> None:
    wanted = {NAMES[1]: IntScheme(4, 32)}
    config = quantization_config(wanted, [NAMES[0], NAMES[2], "lm_head"])
    assert applied(config) == wanted
    assert schemes_from_config(config, NAMES) == wanted


def test_names_are_taken_literally() -> None:
    wanted = {"model.layers.1.mlp": IntScheme(4, 32), "model.layers.1.mlp.up": IntScheme(8, 32)}
    config = quantization_config(wanted, [])
    assert schemes_from_config(config, ["modelxlayers.1.mlp", "model.layers.1.mlp.up.more", *wanted]) == wanted


def test_what_is_for_our_own_reader_names_no_method() -> None:
    config = quantization_config({NAMES[0]: IntScheme(4, 32)}, [])
    ours = for_own_reader(config)
    assert is_for_own_reader(ours)
    assert not is_for_own_reader(config)
    assert not is_for_own_reader(None)
    assert "quant_method" not in ours, "transformers loads random weights under a method it does not know"
    assert schemes_from_config(ours, NAMES[:1]) == {NAMES[0]: IntScheme(4, 32)}


@pytest.mark.parametrize(
    "args",
    [
        {"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": True},
        {"type": "int", "num_bits": 8, "strategy": "tensor", "symmetric": True},
        {"type": "int", "num_bits": 8, "strategy": "block", "symmetric": True},
    ],
)
def test_other_weights_are_refused(args: dict) -> None:
    config = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": args}}}
    with pytest.raises(IntegrityError, match="cannot be read here"):
        schemes_from_config(config, NAMES)


def test_bits_per_weight_counts_what_is_stored() -> None:
    # 4 bits, and per group of 32 a 16-bit scale and a 4-bit zero point.
    assert IntScheme(4, 32).bits_per_weight(128) == 4.5
    assert IntScheme(4, 32, False).bits_per_weight(128) == 4.625
    assert IntScheme(3, None).bits_per_weight(64, scale_bits=32) == 3.5
    assert not IntScheme(4, 128).fits(172)
    assert IntScheme(4, None).fits(172)
    assert torch.tensor([IntScheme(3, None).qmin, IntScheme(3, None).qmax]).tolist() == [-4, 3]


@pytest.mark.parametrize(("key", "value"), [("num_bits", 0), ("num_bits", 2**40), ("num_bits", "4"), ("group_size", 0)])
def test_counts_that_cannot_be_are_refused(key: str, value: object) -> None:
    config = quantization_config({NAMES[0]: IntScheme(4, 32)}, NAMES[1:])
    config["config_groups"]["group_0"]["weights"][key] = value
    with pytest.raises(IntegrityError, match="cannot be read here"):
        schemes_from_config(config, NAMES[:1])
