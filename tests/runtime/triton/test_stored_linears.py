"""Which linears are computed as one weight, and that each row then meets its own scales."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress.errors import WorkError
from compress.formats.inputs import round_inputs
from compress.schemes import FIXED_SCHEMES
from compress.types import Fp8Scheme, InputScheme, IntScheme, QuantizedTensor
from tests.kernels.triton.weights import quantized

pytest.importorskip("triton", reason="triton is not installed")

from compress.kernels.triton import available
from compress.runtime import triton_linears
from compress.runtime.stored_linears import Stored, alike
from compress.runtime.triton_linears import Packer


def tiled(rows: int, scale: float) -> Stored:
    """A linear of FP8 tiles that all have one scale."""
    scheme = FIXED_SCHEMES["FP8_BLOCK"]
    assert isinstance(scheme, Fp8Scheme)
    codes = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows)).mul_(30).to(torch.float8_e4m3fn)
    tiles = torch.full(scheme.scale_shape(rows, 128), scale)
    return Stored(f"of {rows} rows", QuantizedTensor(codes, tiles, None, scheme), None, None)


def decoded(stored: list[Stored]) -> torch.Tensor:
    return torch.cat([one.weight.dequantize() for one in stored if isinstance(one.weight, QuantizedTensor)])


@pytest.mark.parametrize(("rows", "joined"), [((128, 172), True), ((256, 100), True), ((172, 128), False)])
def test_tiles_are_joined_where_none_spans_two_linears(
    rows: tuple[int, int], joined: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "multiplies_fp8", lambda _: False)
    stored = [tiled(count, scale) for count, scale in zip(rows, (0.01, 0.1), strict=True)]
    assert alike(stored) is joined
    packer, scheme = Packer(torch.device(device)), FIXED_SCHEMES["FP8_BLOCK"]
    if not joined:  # and were they taken for alike, the probe of the joined weight would say so
        with pytest.raises(WorkError, match="differs from that of the decoded"):
            packer(stored, torch.float32)
        return
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    assert scheme.inputs is not None
    wanted = round_inputs(x, scheme.inputs) @ decoded(stored).T
    torch.testing.assert_close(packer(stored, torch.float32)(x.to(device)).cpu(), wanted, rtol=1e-4, atol=1e-3)


def test_what_is_joined_has_one_scheme_and_one_input_scale() -> None:
    one = tiled(128, 0.1)
    assert alike([one, one])
    assert not alike([one, replace(one, input_scale=torch.ones(1))])
    assert isinstance(one.weight, QuantizedTensor)
    other = replace(one.weight, scheme=FIXED_SCHEMES["FP8_DYNAMIC"], scale=torch.ones(128, 1))
    assert not alike([one, replace(one, weight=other)])
    assert not alike([one, replace(one, weight=decoded([one]))])
    assert not alike([replace(one, weight=replace(other, scale=torch.ones(1, 1)))] * 2)  # whose rows it is not said


@pytest.mark.parametrize(
    "scheme",
    [FIXED_SCHEMES["W2A8"], IntScheme(4, 32, inputs=InputScheme("int", "token")),
     IntScheme(8, None, False, InputScheme("int", "tensor"))],
    ids=lambda scheme: scheme.label,
)  # fmt: skip
def test_torch_rounds_the_inputs_of_integers_that_no_kernel_multiplies_by_integers(
    scheme: IntScheme, device: str
) -> None:
    static = torch.tensor([0.02]) if scheme.inputs is not None and not scheme.inputs.dynamic else None
    stored = Stored("", quantized(40, 64, scheme, torch.float32), static, None)
    linear = Packer(torch.device(device))([stored], torch.float32)
    assert linear.rounds_before
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    assert scheme.inputs is not None
    wanted = round_inputs(x, scheme.inputs, static) @ decoded([stored]).T
    torch.testing.assert_close(linear(x.to(device)).cpu(), wanted, rtol=1e-4, atol=1e-3)


def test_a_scheme_is_probed_alone_and_joined(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[int] = []
    monkeypatch.setattr(Packer, "_probe", lambda self, linear, stored, *_: probed.append(len(stored)))
    packer = triton_linears.Packer(torch.device(device))
    for count in (1, 2, 1, 2):
        packer([tiled(128, 0.1)] * count, torch.float32)
    assert probed == [1, 2]
