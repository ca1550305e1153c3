"""Packed embeddings and heads in the native engine: codes alone are kept, and mean what the format says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.models.skeleton import LinearSpec
from compress.runtime import loading, transformers_backend
from compress.runtime.native_backend import NativeRuntime
from compress.runtime.native_shape import EMBEDDING, HEAD
from compress.types import IntScheme
from tests.runtime.packed import Choose, write_packed
from tests.tiny_models import tiny_model, tiny_tokens


def tables_alone(scheme: IntScheme) -> Choose:
    """This scheme for embedding and head, none for what is in blocks."""

    def choose(spec: LinearSpec) -> IntScheme | None:
        return scheme if spec.block < 0 else None

    return choose


SCHEMES = [
    *((IntScheme(bits, 32), torch.bfloat16) for bits in (2, 3, 4, 6, 8)),
    *((IntScheme(4, None, symmetric), torch.float16) for symmetric in (True, False)),
    (IntScheme(3, 96, False), torch.float32),
]


@pytest.mark.parametrize(("scheme", "dtype"), SCHEMES, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_rows_and_products_are_those_of_the_decoded_table(
    scheme: IntScheme, dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    source = tiny_model("llama", tmp_path / "source", dtype=dtype, tie_word_embeddings=tied, num_hidden_layers=1)
    packed, dense = write_packed(source, tmp_path, tables_alone(scheme), outside=True)
    tokens = tiny_tokens(2, 12)
    ours = loading.load(packed, device="cpu")
    assert isinstance(ours, NativeRuntime)
    plain = loading.load(dense, device="cpu").score(tokens)
    torch.testing.assert_close(ours.score(tokens), plain, rtol=1e-5, atol=1e-5)
    by_transformers = transformers_backend.load(packed, device="cpu", dtype="float32").score(tokens)
    torch.testing.assert_close(by_transformers, plain, rtol=1e-4, atol=1e-4)


def test_no_dense_copy_is_kept(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "source")
    packed, _ = write_packed(source, tmp_path, tables_alone(IntScheme(4, 32)), outside=True)
    ours = loading.load(packed, device="cpu")
    assert isinstance(ours, NativeRuntime)
    assert ours.model._embedding is None
    (head,) = [use for use in ours.layers() if use.name == HEAD]
    assert head.aliases == (EMBEDDING,)
    assert "int4" in head.kernel
    assert head.held_bytes < head.weights  # four bits and scales, rows rounded up to strips of 16
    rounded = loading.load(packed, device="cpu", kernel="cpu-int8")
    exact, found = ours.score(tiny_tokens(1, 12)), rounded.score(tiny_tokens(1, 12))
    assert float((found - exact).norm() / exact.norm()) < 0.05
