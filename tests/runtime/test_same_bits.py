"""No bit of the engine depends on company, chunks or found prefixes, whatever its cache keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.kernels.cpu import _native
from compress.runtime import loading
from compress.runtime.cache_choice import CACHES
from compress.runtime.loss import divergence
from compress.runtime.native_backend import NativeRuntime
from compress.runtime.paged_model import Chunk
from compress.runtime.protocol import SamplingParams
from tests.kernels.conftest import ISAS
from tests.runtime.packed import fitting, write_packed
from tests.tiny_models import tiny_tokens


@pytest.fixture(scope="module")
def packed(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tiny("gemma3_text"), tmp_path_factory.mktemp("four"), fitting(4, 32, False))[0]


@pytest.mark.parametrize("kernel", ["cpu", "cpu-int8"])
@pytest.mark.parametrize("kv_cache", CACHES)
def test_no_bit_depends_on_grouping(kv_cache: str, kernel: str, packed: Path) -> None:
    check_grouping(kv_cache, kernel, packed)


def test_no_bit_depends_on_grouping_in_any_instruction_set(isa: str, packed: Path) -> None:
    check_grouping("int8", "cpu-int8", packed)


@pytest.mark.parametrize("kv_cache", CACHES)
def test_every_instruction_set_gives_the_same_scores(isa: str, kv_cache: str, packed: Path) -> None:
    """Up to the order of sums, which may turn a code of the cache that lies on an edge."""
    tokens = tiny_tokens(2, 40)

    def predictions() -> Tensor:
        runtime = loading.load(packed, device="cpu", kernel="cpu", kv_cache=kv_cache)
        return runtime.score(tokens).double().log_softmax(-1)

    found = predictions()
    _native.set_isa(ISAS[0])
    assert divergence(predictions(), found) < (1e-9 if kv_cache == "float32" else 1e-4)


def check_grouping(kv_cache: str, kernel: str, packed: Path) -> None:
    runtime = loading.load(packed, device="cpu", kernel=kernel, kv_cache=kv_cache, prefix_cache=True)
    assert isinstance(runtime, NativeRuntime)
    assert runtime.deterministic
    model, rows = runtime.model, tiny_tokens(3, 45).tolist()
    tables = [model.pages.take(45) for _ in rows]
    chunks = [Chunk(row, 0, pages, range(45)) for row, pages in zip(rows, tables, strict=True)]
    whole = [model.step([chunk]) for chunk in chunks]
    assert torch.equal(model.step(chunks), torch.cat(whole))
    for size in (1, 7, 32):
        parts = [
            model.step([Chunk(rows[0][at : at + size], at, tables[0], range(len(rows[0][at : at + size])))])
            for at in range(0, 45, size)
        ]
        assert torch.equal(torch.cat(parts), whole[0])
    for table in tables:
        model.pages.give_back(table)
    params = SamplingParams(max_tokens=6, ignore_end=True, logprobs=2)
    cold, hit = ([(a.token_ids, a.logprobs) for a in runtime.generate(rows, params)] for _ in range(2))
    assert cold == hit
    assert {answer.cached_tokens for answer in runtime.generate(rows, params)} == {32}
    alone = [runtime.generate([row], params)[0] for row in rows]
    assert [(a.token_ids, a.logprobs) for a in alone] == cold
