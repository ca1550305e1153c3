"""Norms, rotary and gates against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.kernels.triton.weights import inputs, is_close

pytest.importorskip("triton", reason="triton is not installed")

from compress.kernels.triton.fused import Activation, gated, rms_norm, rotary

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_with_and_without_the_residual(dtype: torch.dtype, offset: float, device: str) -> None:
    x, residual, weight = inputs(3, 200, dtype), inputs(4, 200, dtype)[1:], inputs(1, 200, dtype)[0]

    def wanted(total: torch.Tensor) -> torch.Tensor:
        size = (total.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return total.double() * size * (weight.double() + offset)

    assert is_close(rms_norm(x.to(device), weight.to(device), 1e-5, offset=offset), wanted(x))
    kept = residual.to(device).clone()
    found = rms_norm(x.to(device), weight.to(device), 1e-5, kept, offset)
    assert torch.equal(kept.cpu(), (x.float() + residual.float()).to(dtype))
    assert is_close(found, wanted(kept.cpu()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_turns_halves(dtype: torch.dtype, device: str) -> None:
    x = inputs(12, 48, dtype).reshape(3, 4, 48)
    angles = torch.arange(3).unsqueeze(1) * torch.logspace(0, -3, 24).unsqueeze(0)
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex128).unsqueeze(1)
    pairs = torch.complex(*x.double().chunk(2, -1)) * turn
    wanted = torch.cat([pairs.real, pairs.imag], -1)
    found = rotary(x.to(device), angles.cos().to(device), angles.sin().to(device))
    assert is_close(found, wanted)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_gates(activation: Activation, device: str) -> None:
    for dtype in DTYPES:
        gate, up = 3 * inputs(3, 700, dtype), inputs(4, 700, dtype)[:3]
        wide = gate.double()
        act = functional.silu(wide) if activation == "silu" else None
        act = functional.gelu(wide, approximate="tanh" if "tanh" in activation else "none") if act is None else act
        assert is_close(gated(gate.to(device), up.to(device), activation), act * up.double())
