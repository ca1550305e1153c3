"""Ternary weights: BitNet's quantiser, from its equations, and what is ternary already."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.errors import UserError
from compress.quantization import ternary
from compress.recipe_build import Settings, build_recipe
from compress.types import IntScheme
from tests.quantization.data import normal

SCHEME = IntScheme(2, None)


def bitnet(weight: Tensor) -> Tensor:
    """Equations 1 to 3 of the paper."""
    scale = weight.abs().mean()
    return (weight / scale).round().clamp(-1, 1) * scale


def test_it_is_bitnet_s_quantiser() -> None:
    weight = 0.03 * normal(48, 40)
    found = ternary.transform(weight, SCHEME, torch.float32)
    assert set(found.codes.unique().tolist()) == {-1, 0, 1}
    assert (found.scale.shape, found.scale.unique().numel()) == ((48, 1), 1)
    torch.testing.assert_close(found.dequantize(), bitnet(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_ternary_already_stays(dtype: torch.dtype) -> None:
    exact = normal(32, 24).sign() * (normal(32, 24, seed=1) > 0) * torch.tensor(0.0371).to(dtype).float()
    found = ternary.transform(exact, SCHEME, dtype)
    assert torch.equal(found.dequantize().float(), exact)
    zeros = ternary.transform(torch.zeros(4, 8), SCHEME, dtype).dequantize()
    assert torch.equal(zeros.float(), torch.zeros(4, 8))


@pytest.mark.parametrize("wrong", [{"bits": 4}, {"bits": 2, "group_size": 128}, {"scheme": "FP8_DYNAMIC"}])
def test_it_brings_its_scheme_and_refuses_others(wrong: dict[str, Any]) -> None:
    assert build_recipe(Settings(method="ternary"))[0].stages[0].scheme.to_scheme() == SCHEME
    with pytest.raises(UserError, match="--bits 2 --group-size channel"):
        build_recipe(Settings(method="ternary", **wrong))
