"""Products with packed weights against float64 over shapes and number formats."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compress.schemes import FIXED_SCHEMES
from compress.types import BlockFloatScheme, InputScheme, IntScheme, QuantizedTensor, Scheme
from tests.kernels.triton.weights import exact, inputs, is_close, quantized

pytest.importorskip("triton", reason="triton is not installed")

from compress.kernels import gpu_linear
from compress.kernels.dispatch import Choice
from compress.kernels.triton import available, configs, dense, packing
from compress.kernels.triton import experts as by_expert
from compress.kernels.triton.configs import Config, config, table
from compress.kernels.triton.experts import multiply_experts, route
from compress.kernels.triton.linear import multiply
from compress.workflows import doctor

BLOCKS = [FIXED_SCHEMES[name] for name in ("NVFP4A16", "MXFP4A16", "MXFP8A16")]
INTEGERS = [
    IntScheme(4, 128), IntScheme(4, 64, False), IntScheme(4, 32), IntScheme(4, None, False), IntScheme(3, 128, False),
    IntScheme(3, None), IntScheme(3, 32), IntScheme(2, 64, False), IntScheme(2, 128), IntScheme(8, 128, False),
    IntScheme(8, None), IntScheme(8, 32), IntScheme(5, 96, False),
]  # fmt: skip
SCHEMES: list[Scheme] = [*INTEGERS, *BLOCKS]


def columns_of(scheme: Scheme) -> int:
    """A width that no chunk of words divides, unless the groups say otherwise."""
    return 330 if scheme.group_size is None else 3 * scheme.group_size if scheme.group_size > 64 else 192


def on(device: str, weight: QuantizedTensor) -> QuantizedTensor:
    moved = {
        field.name: value.to(device)
        for field in dataclasses.fields(weight)
        if isinstance(value := getattr(weight, field.name), torch.Tensor)
    }
    return dataclasses.replace(weight, **moved)


QUICK = [INTEGERS[0], INTEGERS[1], INTEGERS[3], INTEGERS[5], INTEGERS[7], INTEGERS[10], *BLOCKS]


@pytest.mark.parametrize("scheme", QUICK, ids=lambda scheme: scheme.label)
def test_products_are_those_of_the_format(scheme: Scheme, device: str) -> None:
    weight = quantized(37, columns_of(scheme), scheme)
    packed = packing.pack(on(device, weight))
    for tokens, dtype in ((1, torch.float32), (5, torch.float32), (3, torch.bfloat16)):
        x = inputs(tokens, packed.columns, dtype)
        assert is_close(multiply(packed, x.to(device)), x.double() @ exact(weight).T), (tokens, dtype)


@pytest.mark.parametrize(("scheme", "columns"), [(INTEGERS[1], 1088), (INTEGERS[4], 384), (BLOCKS[0], 192)])
def test_each_row_meets_its_expert(scheme: Scheme, columns: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,088 columns are enough for one pair to have them split; 19 pairs fill more than a block of one expert."""
    weights = [quantized(rows, columns, scheme) for rows in (37, 37, 37)]
    weights = [dataclasses.replace(weight, codes=weight.codes.roll(i, 0)) for i, weight in enumerate(weights)]
    biases = inputs(3, 37, torch.float32)
    each = [packing.pack(on(device, one), bias.to(device)) for one, bias in zip(weights, biases, strict=True)]
    stacked = packing.stack(each)
    assert stacked is not None
    monkeypatch.setattr(by_expert, "MOST_ALONE", 4)
    for chosen, every in ([2], 1), ([2, 0, 1, 2], 2), ([2, 0] * 2 + [2] * 18, 2):
        x = inputs(len(chosen) // every, columns, torch.float32)
        numbers = torch.tensor(chosen, dtype=torch.int32, device=device)
        way = route(numbers, stacked, x.dtype)
        wanted = torch.stack(
            [x[i // every].double() @ exact(weights[e]).T + biases[e].double() for i, e in enumerate(chosen)]
        )
        assert is_close(multiply_experts(stacked, x.to(device), way, every), wanted), every
    own = packing.member(stacked, 1)
    assert own.words.data_ptr() == stacked.words[1].data_ptr()
    assert torch.equal(own.words, each[1].words)
    assert packing.stack([each[0], packing.pack(on(device, quantized(38, columns, scheme)))]) is None
    with pytest.raises(ValueError, match="do not fit 22 pairs"):
        multiply_experts(stacked, x.to(device), way, 1)


@pytest.mark.parametrize("scheme", [INTEGERS[1], INTEGERS[5], BLOCKS[0]], ids=lambda scheme: scheme.label)
def test_products_that_do_not_depend_on_company(scheme: Scheme, device: str) -> None:
    weight = quantized(37, columns_of(scheme), scheme)
    packed = packing.pack(on(device, weight))
    for dtype in (torch.float32, torch.bfloat16):
        x = inputs(40, packed.columns, dtype).to(device)
        whole = multiply(packed, x, same=True)
        assert is_close(whole, x.cpu().double() @ exact(weight).T)
        for first, last in ((0, 1), (17, 20), (39, 40)):
            assert torch.equal(multiply(packed, x[first:last], same=True), whole[first:last])


def test_experts_that_do_not_depend_on_company(device: str) -> None:
    stacked = packing.stack([packing.pack(on(device, quantized(rows, 192, IntScheme(4, 64)))) for rows in (37, 37)])
    assert stacked is not None
    x, chosen = inputs(40, 192, torch.float32).to(device), torch.arange(40, dtype=torch.int32, device=device) % 2
    whole = multiply_experts(stacked, x, route(chosen, stacked, x.dtype, same=True), 1)
    for first, last in ((0, 1), (17, 20)):
        way = route(chosen[first:last], stacked, x.dtype, same=True)
        assert torch.equal(multiply_experts(stacked, x[first:last], way, 1), whole[first:last])


@pytest.mark.parametrize(("rows", "columns"), [(37, 330), (130, 1088)])
def test_dense_products_do_not_depend_on_company(rows: int, columns: int, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = (inputs(size, columns, dtype).to(device) for size in (40, rows, 1))
        bias = bias[0, :rows] if rows <= columns else None
        whole = dense.multiply(weight, x, bias)
        wanted = x.cpu().double() @ weight.cpu().double().T
        assert is_close(whole, wanted if bias is None else wanted + bias.cpu().double())
        for first, last in ((0, 1), (17, 20), (39, 40)):
            assert torch.equal(dense.multiply(weight, x[first:last], bias), whole[first:last])
    with pytest.raises(ValueError, match="do not fit"):
        dense.multiply(weight, x.float())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_many_shapes(scheme: Scheme, device: str) -> None:
    for rows, times in ((1, 1), (33, 2), (129, 3), (256, 4)):
        weight = quantized(rows, times * columns_of(scheme), scheme, torch.float16)
        packed = packing.pack(on(device, weight))
        for tokens in (1, 2, 16, 17, 64, 65, 200):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                x = inputs(tokens, packed.columns, dtype)
                assert is_close(multiply(packed, x.to(device)), x.double() @ exact(weight).T), (rows, tokens, dtype)


@pytest.mark.parametrize("scheme", [IntScheme(4, 128), IntScheme(3, None)], ids=lambda s: s.label)
def test_a_bias_is_added_once(scheme: Scheme, device: str) -> None:
    weight = quantized(40, 2048 if scheme.bits == 3 else 1024, scheme)
    bias = torch.linspace(-9, 9, 40)
    packed = packing.pack(on(device, weight), bias.to(device))
    for tokens in (1, 2):
        x = inputs(tokens, packed.columns, torch.float32)
        expected = x.double() @ exact(weight).T + bias.double()
        assert config("gemm", torch.device(device), scheme.bits, tokens, 40, packed.words.shape[0], 32).splits > 1
        assert is_close(multiply(packed, x.to(device)), expected)


def test_every_fp8_code_and_every_power_of_two(device: str) -> None:
    scheme = BLOCKS[2]
    finite = [code for code in range(256) if code & 127 != 127]
    codes = torch.tensor(finite + [0] * 2, dtype=torch.uint8).reshape(8, 32).view(torch.float8_e4m3fn)
    ones = torch.full((255, 32), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    powers = torch.arange(255, dtype=torch.uint8).unsqueeze(1)
    cases = [(codes, torch.full((8, 1), 127, dtype=torch.uint8)), (ones, powers)]
    for codes, scale in cases:
        weight = QuantizedTensor(codes, scale, None, scheme)
        packed = packing.pack(on(device, weight))
        for tokens in (1, 32):
            found = multiply(packed, torch.eye(32)[:tokens].to(device))
            assert torch.equal(found.cpu().double(), exact(weight).T[:tokens])


def test_every_fp4_code_under_every_fp8_scale(device: str) -> None:
    scheme = BLOCKS[0]
    assert isinstance(scheme, BlockFloatScheme)
    scale = torch.arange(127, dtype=torch.uint8).reshape(-1, 1).view(torch.float8_e4m3fn)
    codes = torch.arange(16, dtype=torch.uint8).expand(127, 16)
    weight = QuantizedTensor(codes, scale, None, scheme, torch.tensor([2.0]))
    packed = packing.pack(on(device, weight))
    found = multiply(packed, torch.eye(16, device=device))
    assert torch.equal(found.cpu().double(), exact(weight).T)


def test_weights_are_rounded_as_a_weight_only_scheme_defines_them(device: str) -> None:
    weight = quantized(48, 96, IntScheme(4, 32, False), torch.bfloat16)
    found = multiply(packing.pack(on(device, weight)), torch.eye(96, dtype=torch.bfloat16, device=device))
    assert torch.equal(found.cpu(), weight.dequantize().T)


def test_a_product_repeats_bit_for_bit_and_keeps_leading_dimensions(device: str) -> None:
    packed = packing.pack(on(device, quantized(64, 1024, IntScheme(4, 128))))
    x = inputs(6, 1024, torch.bfloat16).to(device).reshape(2, 3, 1024)
    first = multiply(packed, x)
    assert first.shape == (2, 3, 64)
    assert torch.equal(first, multiply(packed, x))
    assert multiply(packed, x[:, :0]).shape == (2, 0, 64)


def test_bytes_are_those_of_the_format() -> None:
    for bits in (2, 3, 4, 8):
        packed = packing.pack(quantized(64, 1024, IntScheme(bits, 128)))
        assert packed.nbytes == 64 * 1024 * bits // 8 + 64 * 8 * 2


def test_what_does_not_fit_is_refused(device: str) -> None:
    assert "multiple of 32" in (packing.obstacle(IntScheme(4, 48), 96) or "")
    assert "no Triton product" in (packing.obstacle(FIXED_SCHEMES["FP8_DYNAMIC"], 128) or "")
    assert packing.obstacle(IntScheme(4, 50), 50) is None
    with pytest.raises(ValueError, match="multiple of 32"):
        packing.pack(quantized(8, 96, IntScheme(4, 48)))
    packed = packing.pack(on(device, quantized(8, 64, IntScheme(4, 32))))
    for x in (torch.zeros(1, 63), torch.zeros(1, 64, dtype=torch.float64)):
        with pytest.raises(ValueError, match="do not fit"):
            multiply(packed, x.to(device))


def test_what_multiplies_each_scheme_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "obstacle", lambda _: None)
    found = {name: gpu_linear.choose(scheme, 256, "cpu") for name, scheme in FIXED_SCHEMES.items()}
    found["W4A16"] = gpu_linear.choose(IntScheme(4, 128), 256, "cpu")
    for name in ("W4A16", "NVFP4A16", "MXFP4A16", "MXFP8A16"):
        assert (found[name].name, found[name].reason) == ("triton", "weights decoded inside the product")
    found["W4A8"] = gpu_linear.choose(IntScheme(4, 32, True, InputScheme("int", "token")), 256, "cpu")
    found["W8A8-asym"] = gpu_linear.choose(IntScheme(8, None, False, InputScheme("int", "tensor")), 256, "cpu")
    for name in ("NVFP4", "MXFP4", "MXFP8", "W2A8", "W4A8", "W8A8-asym"):
        assert found[name].reason.endswith("inputs rounded by torch before it")
    assert "as they are" in found["W8A8"].reason
    assert "multiplies no FP8" in found["FP8_BLOCK"].reason
    assert found["NF4"].name == "reference"
    odd = gpu_linear.choose(IntScheme(4, 48), 96, "cpu")
    assert (odd.name, "multiple of 32" in odd.reason) == ("reference", True)
    monkeypatch.setattr(available, "obstacle", lambda _: "triton is not installed")
    assert gpu_linear.choose(IntScheme(4, 128), 256, "cuda") == Choice("reference", "triton is not installed")


def test_other_makers_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in (available.obstacle("cuda") or "")


def test_doctor_says_why_the_kernels_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "find_spec", lambda _: None)
    (check,) = doctor.gpu_products()
    assert (check.name, check.detail, check.broken) == ("triton kernels", "not used: triton is not installed", None)


def test_the_table_answers_for_every_shape() -> None:
    place = torch.device("cpu")
    for operation, inputs_bits in (("gemv", 16), ("gemm", 16), ("gemv", 32), ("gemm", 32), ("rounded", 8)):
        for bits in (2, 3, 4, 8):
            for tokens in (1,) if operation == "gemv" else (2, 16, 17, 4096):
                found = config(operation, place, bits, tokens, 4096, 32, inputs_bits)
                assert isinstance(found, Config)
                assert 1 <= found.splits <= 8
    assert table()["measured_on"] is None or table()["measured_on"]["device"]


def test_columns_are_split_to_fill_the_device_once_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_device", lambda _: ("sm_90", 132))
    config.cache_clear()
    place = torch.device("meta")  # a device of its own in what is remembered
    for tokens, rows in ((1, 4096), (1, 28672), (16, 6144), (64, 4096), (512, 4096), (4096, 28672)):
        cut = config("gemv" if tokens == 1 else "gemm", place, 4, tokens, rows, 112, 16)
        programs = -(-rows // cut.block_rows) * -(-tokens // cut.block_tokens)
        assert cut.splits == 1 or programs * cut.splits <= 4 * 132, (tokens, rows)
        assert programs * cut.splits >= 64
    assert config("gemv", place, 4, 1, 4096, 112, 16).splits == 8
    assert config("gemv", place, 4, 1, 28672, 112, 16).splits == 1  # 448 programs are a turn of all multiprocessors
    assert config("gemm", place, 4, 512, 4096, 112, 16).splits == 1
    config.cache_clear()
