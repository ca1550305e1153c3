"""Causal attention: every instruction set against float64, and inside transformers' models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from compress.kernels import dispatch, reference
from compress.kernels.cpu import _native
from compress.models import attention


def make(
    batch: int, heads: int, kv_heads: int, tokens: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, tokens, dim), (batch, kv_heads, tokens, dim), (batch, kv_heads, tokens, dim))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


@pytest.mark.usefixtures("isa")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 47, 48, 49, 191, 192, 193, 400]),
    dim=st.sampled_from([1, 7, 16, 33, 64, 80, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_equals_float64(
    batch: int, kv_heads: int, group: int, tokens: int, dim: int, dtype: torch.dtype, seed: int
) -> None:
    q, k, v = make(batch, kv_heads * group, kv_heads, tokens, dim, dtype, seed)
    found = dispatch.causal_attention(q, k, v, dim**-0.5)
    wanted = reference.causal_attention(q.double(), k.double(), v.double(), dim**-0.5)
    assert found.shape == (batch, tokens, kv_heads * group, dim)
    assert found.dtype == dtype
    error = (found.double() - wanted).abs() / v.double().abs().max()
    if dtype == torch.bfloat16:
        assert error.max() <= 2**-8
        return
    # Worst case of one output: every product and sum of a score rounds the same way, and so does every sum of weights.
    magnitude = float((q.abs().sum(-1).max() * k.abs().max()) * dim**-0.5)
    assert error.max() <= 2**-24 * (2 * (dim + 4) * magnitude + tokens + 16)
    assert error.square().mean().sqrt() <= 2e-7


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    """The largest score comes last, so that every block rescales what was summed before."""
    q, k, v = make(1, 1, 1, 500, 16, dtype)
    k = (k.float() * torch.linspace(1, 60, 500).reshape(1, 1, 500, 1)).to(dtype)
    found = dispatch.causal_attention(q, k, v, 1.0)
    wanted = reference.causal_attention(q.double(), k.double(), v.double(), 1.0)
    assert torch.isfinite(found).all()
    assert ((found.double() - wanted).abs() <= (2**-7 if dtype == torch.bfloat16 else 2e-5) * 4).all()


@pytest.mark.usefixtures("isa")
def test_later_tokens_have_no_influence() -> None:
    q, k, v = make(1, 2, 1, 300, 32, torch.bfloat16)
    before = dispatch.causal_attention(q, k, v, 0.2)
    for changed in (k, v):
        changed[:, :, 200:] = 5.0
    after = dispatch.causal_attention(q, k, v, 0.2)
    assert torch.equal(before[:, :200], after[:, :200])
    assert not torch.equal(before[:, 200:], after[:, 200:])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_not_a_number_is_not_lost(which: int) -> None:
    inputs = make(1, 1, 1, 300, 32, torch.bfloat16)
    inputs[which][:, :, 100] = torch.nan
    found = dispatch.causal_attention(*inputs, 0.2).isnan()[0, :, 0].all(-1)
    assert found[100]
    assert found[100:].all() or which == 0


@pytest.mark.usefixtures("isa")
def test_threads_do_not_change_a_bit() -> None:
    q, k, v = make(2, 4, 2, 260, 64, torch.bfloat16)
    alone = dispatch.causal_attention(q, k, v, 0.125, threads=1)
    assert torch.equal(alone, dispatch.causal_attention(q, k, v, 0.125, threads=3))


def test_refuses_what_does_not_fit() -> None:
    q, k, v = make(1, 3, 2, 8, 4)
    out = torch.empty(1, 8, 3, 4)
    with pytest.raises(ValueError, match="number of heads"):
        _native.causal_attention(q, k, v, out, 1.0, 1)
    with pytest.raises(ValueError, match="v must be of shape"):
        _native.causal_attention(q[:, :2], k, v[:, :, :4], out, 1.0, 1)
    with pytest.raises(TypeError, match="dtype of q"):
        _native.causal_attention(q[:, :2], k.bfloat16(), v, out, 1.0, 1)


class _Causal(nn.Module):
    is_causal = True


def test_forward_for_transformers_leaves_masks_and_decoding_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make(1, 2, 2, 40, 16)
    calls: list[int] = []
    native = dispatch.causal_attention
    monkeypatch.setattr(dispatch, "causal_attention", lambda *a: calls.append(1) or native(*a))
    plain, _ = attention.attention_forward(_Causal(), q, k, v, None)
    assert calls == [1]
    mask = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    masked, _ = attention.attention_forward(_Causal(), q, k, v, mask)
    last, _ = attention.attention_forward(_Causal(), q[:, :, -1:], k, v, None)
    assert calls == [1]
    torch.testing.assert_close(plain, masked, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain[:, -1:], last, rtol=1e-5, atol=1e-5)
    attention.attention_forward(_Causal(), q, k, v, None, is_causal=False)
    assert calls == [1]
