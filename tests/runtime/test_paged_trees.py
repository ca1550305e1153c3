"""Prefix trees side by side: as many a step as fit, and each as it is alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.runtime import loading, paged_trees
from compress.runtime.continuations import Row
from compress.runtime.native_backend import NativeRuntime
from compress.runtime.paged_model import Chunk
from tests.tiny_models import tiny_tokens

LONG, SHORT, TREE = tuple(range(40)), (0, 1, 2), (0, 1, 2, 3, 2, 3, 1)
"""Depths of nodes: two plain sequences, and a tree of three branches."""


def row(depths: tuple[int, ...], seed: int) -> Row:
    return Row(tuple(tiny_tokens(len(depths), seed=seed).tolist()), depths, (), ())


@pytest.fixture(scope="module")
def runtime(tiny: Callable[..., Path]) -> NativeRuntime:
    found = loading.load(tiny("llama"), device="cpu", kernel="cpu", cache_tokens=160)
    assert isinstance(found, NativeRuntime)
    return found


def test_trees_share_steps_and_have_the_bits_that_they_have_alone(
    runtime: NativeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, steps = runtime.model, []
    right = model.step

    def step(chunks: list[Chunk]) -> torch.Tensor:
        steps.append([len(chunk.tokens) for chunk in chunks])
        return right(chunks)

    monkeypatch.setattr(model, "step", step)
    rows = [row(depths, seed) for seed, depths in enumerate((LONG, TREE, SHORT))]
    nodes = [[0, 39], [1, 3, 5, 6], [2]]
    assert list(paged_trees.together(model, rows)) == [rows]
    found = paged_trees.tree_logits(model, rows, nodes)
    assert steps == [[40, 4, 3], [2], [1]]
    for one, own, logits in zip(rows, nodes, found, strict=True):
        assert torch.equal(logits, paged_trees.tree_logits(model, [one], [own])[0])
    assert model.pages.free == model.pages.count
    monkeypatch.setattr(model, "step_tokens", 16)  # a row alone may be longer than a step
    assert torch.equal(paged_trees.tree_logits(model, rows[:1], nodes[:1])[0], found[0])


def test_a_group_keeps_to_a_step_and_to_the_pages(runtime: NativeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = runtime.model, [row(LONG, 0), row(LONG, 1), row(SHORT, 2), row(SHORT, 3)]

    def sizes() -> list[int]:
        return [len(group) for group in paged_trees.together(model, rows)]

    pages = model.pages.count  # two of them for a long row, one for a short one
    with model.pages.lend(32 * (pages - 3)):
        assert sizes() == [1, 2, 1]
    monkeypatch.setattr(model, "step_tokens", 45)
    assert sizes() == [1, 2, 1]
    monkeypatch.setattr(type(model), "open_page_bytes", 1)
    monkeypatch.setattr(model, "step_tokens", 512)
    assert sizes() == [1, 1, 1, 1]
