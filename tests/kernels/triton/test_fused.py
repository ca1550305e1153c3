"""Norms, rotary and gates against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.kernels.triton.weights import inputs, is_close

pytest.importorskip("triton", reason="triton is not installed")

from compress.kernels.triton.fused import Activation, gated, rms_norm, turn_heads

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
@pytest.mark.parametrize(("half", "normed"), [(24, False), (16, False), (24, True)])
def test_heads_are_normed_and_their_halves_turned(dtype: torch.dtype, half: int, normed: bool, device: str) -> None:
    heads, kv_heads = 2, 1
    mixed = inputs(12, 48, dtype).reshape(3, 4, 48)
    norms = inputs(2, 48, dtype) if normed else None
    angles = torch.arange(3).unsqueeze(1) * torch.logspace(0, -3, half).unsqueeze(0)
    wanted = mixed.double().clone()
    if norms is not None:
        size = (wanted[:, :3].square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        weight = 1 + norms.double()[[0, 0, 1]]
        wanted[:, :3] = (wanted[:, :3] * size * weight).to(dtype)
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex128).unsqueeze(1)
    pairs = torch.complex(wanted[:, :3, :half], wanted[:, :3, half : 2 * half]) * turn
    wanted[:, :3, : 2 * half] = torch.cat([pairs.real, pairs.imag], -1)
    found = mixed.to(device).clone()
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    turn_heads(found, heads, kv_heads, cos, sin, None if norms is None else norms.to(device), 1e-5, 1.0)
    assert is_close(found, wanted)
    assert torch.equal(found[:, 3].cpu(), mixed[:, 3])  # values


def test_angles_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        turn_heads(torch.zeros(1, 3, 16), 1, 1, torch.zeros(1, 4), torch.zeros(1, 4), torch.ones(2, 16))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_gates(activation: Activation, device: str) -> None:
    for dtype in DTYPES:
        gate, up = 3 * inputs(3, 700, dtype), inputs(4, 700, dtype)[:3]
        wide = gate.double()
        act = functional.silu(wide) if activation == "silu" else None
        act = functional.gelu(wide, approximate="tanh" if "tanh" in activation else "none") if act is None else act
        beside = torch.cat([gate, up], 1).to(device)  # as a joined product leaves them
        assert is_close(gated(*beside.chunk(2, 1), activation), act * up.double())
