"""The residual stream beside GPTQ: where it is read, what is kept of it, and what its correction is worth."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import pipeline
from compress.calibration.staged import Stage
from compress.models.checkpoint import Checkpoint
from compress.models.skeleton import Skeleton
from compress.pipeline import gptq_block, stream
from tests.pipeline import harness
from tests.tiny_models import FAMILIES

BEHIND_A_NORM = ("gemma2", "gemma3_text")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_writers_output_is_added_to_what_its_norm_reads(family: str, tiny: Callable[..., Path]) -> None:
    """Their sum is what the next norm reads, or what leaves the block."""
    skeleton = Skeleton(Checkpoint.open(tiny(family)), torch.float32)
    hidden, calls = skeleton.embed(torch.arange(20).reshape(2, 10))
    module = skeleton.materialise(0)
    live, branches = skeleton.modules(0, module), skeleton.branches(0)
    assert bool(branches) == (family not in BEHIND_A_NORM)
    seen: dict[str, Tensor] = {}
    norms = [name for name in live if "norm" in name or ".ln_" in name]
    handles = [live[n].register_forward_pre_hook(_keeping(seen, n)) for n in norms]
    handles += [live[n].register_forward_hook(_keeping_output(seen, n)) for n in branches]
    with torch.inference_mode():
        leaving = skeleton.run_block(module, hidden, calls[0])
    for handle in handles:
        handle.remove()
    places = [place for place in (*(seen[norm] for norm in norms), leaving) if place.numel() == hidden.numel()]
    for writer, norm in branches.items():
        if getattr(skeleton.config, "use_parallel_residual", False):
            continue  # the sum goes on to a third part, and no module reads it before
        both = seen[norm].reshape(-1, 96) + seen[writer].reshape(-1, 96)
        assert any(torch.allclose(both, place.reshape(-1, 96), atol=1e-5) for place in places), writer


def _keeping(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    return lambda module, given: seen.__setitem__(name, given[0])


def _keeping_output(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    return lambda module, given, output: seen.__setitem__(name, output)


def test_it_keeps_the_compared_chunks_until_the_next_norm() -> None:
    chunks = [torch.full((2, 3), float(number)) for number in range(4)]
    found = stream.Stream({"o": "first", "down": "second"}, range(4), {1, 3})
    assert not found.keeps(Stage("q", chunks, False))
    assert found.before("o") == {}
    assert found.keeps(Stage("first", chunks, False))
    assert found.before("o") == {1: chunks[1], 3: chunks[3]}
    assert found.before("down") == found.before("q") == {}
    assert found.keeps(Stage("second", chunks, False))
    assert found.before("o") == {}
    assert list(found.before("down")) == [1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_moment_of_what_was_missed(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def chunks(width: int) -> dict[int, Tensor]:
        return {place: torch.randn(tokens, width, generator=generator).to(dtype) for place, tokens in ((4, 9), (1, 5))}

    now, then, inputs = chunks(300), chunks(300), chunks(7)
    exact = sum((then[p].double() - now[p].double()).T @ inputs[p].double() for p in (1, 4)) / 14
    found = []
    for workers in (1, 3):
        with ThreadPoolExecutor(workers) as pool:
            found.append(stream.missed(now, then, inputs, pool))
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-4, atol=1e-5)
    assert torch.equal(*found)


@pytest.mark.parametrize(("family", "writers"), [("llama", 2), ("gemma2", 0), ("mixtral", 1)])
def test_gptq_makes_up_for_it_in_every_block(
    family: str, writers: int, tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[float] = []

    def watched(*given: Any) -> Tensor:
        found = stream.missed(*given)
        measured.append(float(found.norm()))
        return found

    monkeypatch.setattr(gptq_block, "missed", watched)
    pipeline.run(harness.recipe("gptq", text), model=tiny(family), output=tmp_path / "out")
    assert len(measured) == 2 * writers
    if measured:
        assert measured[0] == 0.0, "nothing is lost in front of the first block"
        assert all(size > 0 for size in measured[1:])
