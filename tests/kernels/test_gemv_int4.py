"""The 4-bit matrix-vector product against float64."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.kernels import dispatch, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(
    out_features: int,
    in_features: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    tokens: int = 1,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(packed, scale, zero_point, x)."""
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // group_size
    words = (in_features + 7) // 8
    packed = torch.randint(-(2**31), 2**31, (out_features, words), generator=generator, dtype=torch.int64).int()
    scale = (torch.rand(out_features, groups, generator=generator) * 0.02 + 0.001).to(dtype)
    zero_point = torch.randint(-8, 8, (out_features, groups), generator=generator, dtype=torch.int8)
    return packed, scale, None if symmetric else zero_point, torch.randn(tokens, in_features, generator=generator)


def assert_exact(problem: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], group: int) -> None:
    """Within float32's rounding of the sums of absolute values, which bound what can cancel."""
    packed, scale, zero_point, x = problem
    found = dispatch.gemv_int4(packed, scale, zero_point, x, group)
    wanted = reference.gemv_int4(packed, scale, zero_point, x, group)
    size = scale.double().repeat_interleave(group, dim=1) * 16 @ x.double().abs().T
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= 1e-6 * size.T).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size"),
    [
        (1, 8, 8),
        (33, 128, 128),
        (37, 512, 128),
        (5, 256, 32),
        (3, 640, 64),
        (6, 120, 40),  # groups that straddle vectors
        (4, 96, 24),
        (7, 172, 172),  # a last word that is half empty
        (2, 13, 13),
        (9, 1048, 8),
    ],
)
def test_matches_the_oracle(
    isa: str, out_features: int, in_features: int, group_size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    assert_exact(make(out_features, in_features, group_size, symmetric, dtype), group_size)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    out_features=st.integers(1, 40),
    words_per_group=st.integers(1, 40),
    groups=st.integers(1, 7),
    tokens=st.integers(1, 3),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_random_shapes(
    isa: str,
    out_features: int,
    words_per_group: int,
    groups: int,
    tokens: int,
    symmetric: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    group = words_per_group * 8
    assert_exact(make(out_features, group * groups, group, symmetric, dtype, tokens, seed), group)


def test_each_nibble_has_its_place(isa: str) -> None:
    in_features = 300
    codes = torch.randint(-8, 8, (3, in_features), dtype=torch.int8)
    packed = pack_to_int32(codes, 4)
    found = dispatch.gemv_int4(packed, torch.ones(3, 1), None, torch.eye(in_features), in_features)
    assert torch.equal(found, codes.T.float())
    assert torch.equal(reference.unpack_int4(packed, in_features), codes)


def test_every_half_precision_scale(isa: str) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    packed = torch.full((1, 1), 0x9, dtype=torch.int32)  # code 1, then codes -8 that meet zeros
    x = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]])
    for dtype in (torch.float16, torch.bfloat16):
        scale = bits.view(dtype)
        scale = scale[scale.isfinite()].reshape(-1, 1)
        found = dispatch.gemv_int4(packed.expand(len(scale), 1), scale, None, x, 8)
        assert torch.equal(found[0], scale[:, 0].float())


def test_a_vector_gives_a_vector(isa: str) -> None:
    packed, scale, zero_point, x = make(12, 64, 32, False, torch.float32)
    one = dispatch.gemv_int4(packed, scale, zero_point, x[0], 32)
    assert torch.equal(one, dispatch.gemv_int4(packed, scale, zero_point, x, 32)[0])


def test_threads_change_no_bit(isa: str) -> None:
    # Large enough that several threads are used: 3 x 2^20 codes.
    packed, scale, zero_point, x = make(3072, 1024, 128, False, torch.bfloat16)
    one = dispatch.gemv_int4(packed, scale, zero_point, x, 128, threads=1)
    assert torch.equal(one, dispatch.gemv_int4(packed, scale, zero_point, x, 128, threads=3))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    packed, scale, zero_point, x = make(33, 256, 64, False, torch.bfloat16, tokens=2)
    assert zero_point is not None
    found = dispatch.gemv_int4(packed.cuda(), scale.cuda(), zero_point.cuda(), x.cuda(), 64)
    torch.testing.assert_close(found.cpu().double(), reference.gemv_int4(packed, scale, zero_point, x, 64))
