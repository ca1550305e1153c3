"""Calibration windows that the original model draws anew: what they are, who learns from them, and that runs stay as
repeatable as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import pipeline
from compress.artifact import durable
from compress.artifact.reader import Artifact
from compress.errors import UserError, WorkError
from compress.pipeline import inputs, redrawn, refine
from compress.recipe import Recipe, parse_recipe
from compress.recipe_build import Settings, build_recipe
from tests.pipeline import harness

SAMPLES, LENGTH, COPIES = 8, 24, 2


class Successors:
    """Stands for a skeleton: behind a token t comes t + 1 with probability 3/4, else t + 2."""

    vocabulary = 64

    def head(self, hidden: Tensor) -> Tensor:
        tokens = hidden[..., 0].long()
        logits = torch.full((*tokens.shape, self.vocabulary), -torch.inf)
        for step, share in ((1, 0.75), (2, 0.25)):
            logits.scatter_(-1, (tokens + step).unsqueeze(-1), torch.tensor(share).log().expand(*tokens.shape, 1))
        return logits


def drawn(tokens: Tensor, count: int, share: float, seed: int = 0) -> Tensor:
    leaving = [window[None, :, None].float() for window in tokens]
    return redrawn.redraw(Successors(), tokens, leaving, count, share, seed)  # type: ignore[arg-type]


def test_tokens_are_drawn_from_what_the_model_says_behind_the_window_as_it_was() -> None:
    tokens = torch.randint(0, 40, (3, 2001), generator=torch.Generator().manual_seed(1))
    copies = drawn(tokens, 4, 0.3).view(3, 4, 2001)
    assert torch.equal(copies[:, :, 0], tokens[:, None, 0].expand(3, 4)), "the first token has nothing before it"
    step = copies[:, :, 1:] - tokens[:, None, :-1]
    stayed = copies[:, :, 1:] == tokens[:, None, 1:]
    assert (stayed | (step == 1) | (step == 2)).all()
    assert abs(float((~stayed).float().mean()) - 0.3) < 0.03
    anew = step[~stayed]
    assert abs(float((anew == 1).float().mean()) - 0.75) < 0.03
    assert not torch.equal(copies[:, 0], copies[:, 1])
    assert torch.equal(drawn(tokens, 4, 0.3), copies.flatten(0, 1))
    assert not torch.equal(drawn(tokens, 4, 0.3, seed=1), copies.flatten(0, 1))


def test_who_learns_learns_from_the_copies_of_its_own_windows_alone() -> None:
    tokens = torch.arange(4)[:, None].expand(4, 10).contiguous()
    everything = torch.cat([tokens, drawn(tokens, COPIES, 0.5)])
    places = redrawn.learning([0, 2], 4, len(everything))
    assert len(places) == len(set(places)) == 2 * (1 + COPIES)
    assert set(everything[places][:, 0].tolist()) == {0, 2}
    assert redrawn.learning([0, 2], 4, 4) == [0, 2]


def recipe(text: Path, copies: int = COPIES, method: str = "gptq", **stage: Any) -> Recipe:
    data = harness.recipe(method, text).model_dump(mode="json")
    calibration = {"source": str(text), "samples": SAMPLES, "seq_len": LENGTH, "redrawn": copies}
    data["stages"][0] |= {"calibration": calibration, **stage}
    return parse_recipe(data)


@pytest.fixture
def make(
    tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Artifact]:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr(inputs, "CHUNK_TOKENS", 48)
    count = 0

    def made(copies: int = COPIES, family: str = "llama", **stage: Any) -> Artifact:
        nonlocal count
        count += 1
        return pipeline.run(
            recipe(text, copies, **stage), model=tiny(family), output=tmp_path / str(count) / "out"
        ).artifact

    return made


def test_the_method_learns_from_them_and_the_artifact_says_so(make: Callable[..., Artifact]) -> None:
    plain, more = make(0), make()
    before, after = harness.tensors(plain.path), harness.tensors(more.path)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    seen = {layer["details"]["tokens"] for layer in more.layers() if layer["scheme"]}
    assert seen == {SAMPLES * (1 + COPIES) * LENGTH}
    assert more.manifest.calibration is not None
    assert plain.manifest.calibration is not None
    assert more.manifest.calibration == plain.manifest.calibration, "the text is the same"
    (stage,) = more.manifest.recipe["stages"]
    assert (stage["calibration"]["redrawn"], stage["calibration"]["redrawn_share"]) == (COPIES, 0.3)


def test_threads_and_repetition_change_no_byte(make: Callable[..., Artifact]) -> None:
    settings: dict[str, Any] = {"refine": {"steps": 4, "windows": 4, "checks": 2}}
    first = make(**settings)
    torch.set_num_threads(3)
    again = make(**settings)
    torch.set_num_threads(1)
    assert harness.snapshot(again.path) == harness.snapshot(first.path)


def test_a_killed_run_goes_on_to_the_same_tensors(
    make: Callable[..., Artifact], tiny: Callable[..., Path], text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected, output = make(), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(durable, "step", harness.failing_at("before write layers.json"))
        with pytest.raises(WorkError, match="full"):
            pipeline.run(recipe(text), model=tiny("llama"), output=output)
    result = pipeline.run(recipe(text), model=tiny("llama"), output=output)
    assert result.resumed_blocks
    assert harness.tensor_hashes(result.artifact) == harness.tensor_hashes(expected)


def test_refining_chooses_by_windows_that_it_has_no_copies_of(
    make: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Sequence[int]] = []
    tune = refine._tune

    def watched(model: Any, settings: Any, learning: Any, held: Any, *rest: Any) -> float:
        given.extend((learning, held))
        return tune(model, settings, learning, held, *rest)

    monkeypatch.setattr(refine, "_tune", watched)
    make(refine={"steps": 2, "windows": 4, "checks": 1, "held_out": 0.25})
    learning, held = given
    assert held == [6, 7]
    assert sorted(learning) == [*range(6), *range(SAMPLES, SAMPLES + 6 * COPIES)]


def test_the_plan_counts_them(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    few, many = (
        pipeline.plan(recipe(text, copies, refine={"steps": 2}), model=tiny("llama"), output=tmp_path / "out")
        for copies in (0, 64)
    )
    assert isinstance(few, pipeline.Plan)
    assert isinstance(many, pipeline.Plan)
    assert many.refine_memory_bytes > few.refine_memory_bytes  # type: ignore[operator]


@pytest.mark.parametrize(
    "stage",
    [
        {"kind": "quantize", "method": "autoround", "calibration": {"redrawn": 1}},
        {"kind": "prune", "method": "wanda", "sparsity": 0.5, "calibration": {"redrawn": 1}},
    ],
)
def test_who_cannot_use_them_is_refused(stage: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"remove `calibration\.redrawn`"):
        parse_recipe({"version": 1, "stages": [stage]})


def test_none_leaves_hash_and_file_of_a_recipe_as_they_were(text: Path) -> None:
    plain, none = harness.recipe("gptq", text), recipe(text, 0)
    assert none.hash() == plain.hash() != recipe(text, 1).hash()
    assert "redrawn" not in none.to_yaml()
    assert "redrawn: 1" in recipe(text, 1).to_yaml()


def test_the_command_line_asks_for_them(text: Path) -> None:
    built, _ = build_recipe(Settings(method="gptq", calib=str(text), redrawn=3))
    assert built.stages[0].calibration.redrawn == 3  # type: ignore[union-attr]
