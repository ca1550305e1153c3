"""The record of the kernels' exactness on an artifact: what it says, that it sees a wrong product, and the card."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

import compress
from compress.content import default_model
from compress.kernels import packed_linear
from compress.kernels.dispatch import native
from compress.models.skeleton import LinearSpec
from compress.types import IntScheme
from compress.workflows.kernel_parity import kernel_record
from tests.runtime.packed import write_packed
from tests.tiny_models import tiny_model


def mixed(spec: LinearSpec) -> IntScheme | None:
    if spec.name.endswith("down_proj"):
        return IntScheme(8, None)
    return IntScheme(4, 32, symmetric=False) if spec.name.endswith(("q_proj", "up_proj")) else IntScheme(3, 64)


def test_every_scheme_is_measured_and_a_wrong_product_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = write_packed(default_model(), tmp_path, mixed)
    record = kernel_record(packed)
    assert (record.backend, record.isa) == ("native", native().isa())
    assert len(record.products) == 3
    assert sum(row.linears for row in record.products) == 7 * 6
    for row in record.products:
        assert row.eight_bit_error is not None
        assert row.error < 1e-5 < row.eight_bit_error < 2e-2
    multiply = packed_linear.multiply

    def wrong(linear: object, x: Tensor, eight_bit: bool) -> Tensor:
        return multiply(linear, x, eight_bit) * 1.01

    monkeypatch.setattr(packed_linear, "multiply", wrong)
    assert all(row.error > 5e-3 for row in kernel_record(packed).products)


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4", "MXFP8A16", "NF4"])
def test_every_kind_of_weights_is_measured(tmp_path: Path, scheme: str) -> None:
    source = tiny_model(
        "llama", tmp_path / "in", hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=4
    )
    artifact = compress.quantize(source, method="rtn", scheme=scheme, output=tmp_path / "out")
    (row,) = kernel_record(artifact.path).products
    assert row.error < 1e-5
    assert row.eight_bit_error is None


def test_models_that_run_elsewhere_say_so(tmp_path: Path) -> None:
    record = kernel_record(tiny_model("gpt2", tmp_path))
    assert (record.backend, record.isa, record.products) == ("transformers", None, [])
    assert "gpt2" in record.reason
