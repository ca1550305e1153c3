"""What a search chooses from, what it is asked for, and what it makes of its measurements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.errors import UserError
from compress.models.checkpoint import Checkpoint
from compress.models.skeleton import Skeleton
from compress.recipe import Recipe
from compress.types import IntScheme
from compress.workflows.budget.losses import Measured, anchors, losses
from compress.workflows.budget.recipes import chosen_recipe, open_stage
from compress.workflows.budget.target import Target, parse_size, parse_target
from compress.workflows.budget.units import Unit, grid, units
from tests.tiny_models import tiny_model


def laid_out(path: Path, ignored: str = "nothing") -> list[Unit]:
    skeleton = Skeleton(Checkpoint.open(path), torch.float32)
    names = [spec.name for spec in skeleton.linears() if ignored not in spec.name]
    return units(skeleton, names, grid(), dict.fromkeys(names, 16))


def test_linears_that_engines_load_as_one_matrix_are_one_unit(source: Path) -> None:
    found = laid_out(source, ignored="1.self_attn.o_proj")
    assert [unit.name.removeprefix("model.layers.") for unit in found] == [
        "0.self_attn.q_proj+k_proj+v_proj",
        "0.self_attn.o_proj",
        "0.mlp.gate_proj+up_proj",
        "0.mlp.down_proj",
        "1.self_attn.q_proj+k_proj+v_proj",
        "1.mlp.gate_proj+up_proj",
        "1.mlp.down_proj",
    ]
    first = found[0]
    assert first.weights == 64 * (64 + 32 + 32)
    assert {option.group_size for option in first.options} == {32, 64}
    assert {option.group_size for option in found[3].options} == {32, 64, 128}
    assert list(first.bits) == sorted(first.bits)
    by_option = dict(zip(first.options, first.bits, strict=True))
    assert by_option[IntScheme(3, 32)] == first.weights * 3.5
    assert by_option[IntScheme(8, 64)] == first.weights * 8.25


def test_the_experts_of_a_block_are_one_unit_and_odd_widths_get_a_scale_per_channel(tmp_path: Path) -> None:
    found = laid_out(tiny_model("mixtral", tmp_path / "moe", num_hidden_layers=1, intermediate_size=172))
    experts = next(unit for unit in found if unit.name.endswith("experts"))
    assert len(experts.linears) == 3 * 8
    assert {option.group_size for option in experts.options} == {None}
    assert [option.bits for option in experts.options] == [2, 3, 4, 5, 6, 8]


def test_losses_pass_through_the_anchors_and_follow_the_error_beyond_them() -> None:
    options = tuple(IntScheme(bits, size) for bits in (2, 3, 4, 8) for size in (128, 64, 32))
    unit = Unit("u", 0, (), options, tuple(range(len(options))))
    assert [option.label for option in anchors(unit)] == ["w2a16-g64", "w3a16-g64", "w4a16-g64"]
    errors = {option.label: 4.0**-option.bits * (1 + (option.group_size or 0) / 128) for option in options}
    divergences = {each.label: errors[each.label] ** 0.8 for each in anchors(unit)}
    found = dict(zip((option.label for option in options), losses(unit, Measured(errors, divergences)), strict=True))
    for label, value in divergences.items():
        assert found[label] == pytest.approx(value)
    assert found["w3a16-g32"] == pytest.approx(errors["w3a16-g32"] ** 0.8)
    step = divergences["w4a16-g64"] / errors["w4a16-g64"]
    assert found["w8a16-g64"] == pytest.approx(step * errors["w8a16-g64"])
    top = divergences["w2a16-g64"] / errors["w2a16-g64"]
    assert found["w2a16-g128"] == pytest.approx(top * errors["w2a16-g128"])


def test_the_commonest_scheme_is_the_stage_s_and_others_are_named(source: Path, recipe: Callable[..., Recipe]) -> None:
    found = laid_out(source)
    choice = [IntScheme(3, 64)] * len(found)
    plain = open_stage(chosen_recipe(recipe(), found, choice))
    assert (plain.scheme.to_scheme(), plain.overrides) == (IntScheme(3, 64), [])
    choice[0], choice[3] = IntScheme(8, 32), IntScheme(2, 64)
    stage = chosen_recipe(recipe(), found, choice).stages[0]
    assert [(o.scheme.to_scheme(), len(o.linears)) for o in stage.overrides] == [
        (IntScheme(2, 64), 1),
        (IntScheme(8, 32), 3),
    ]
    assert stage.scheme.to_scheme() == IntScheme(3, 64)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"scheme": "W8A8", "method": "gptq"}, "integer weights"),
        ({"overrides": [{"linears": ["*.q_proj"], "scheme": "W8A16"}]}, "schemes of their own already"),
    ],
)
def test_a_recipe_that_leaves_nothing_open_is_refused(
    stage: dict[str, object], said: str, recipe: Callable[..., Recipe]
) -> None:
    with pytest.raises(UserError, match=said):
        open_stage(recipe(**stage))


def test_targets_are_read() -> None:
    assert parse_target(None, None, None) is None
    assert parse_target(4.25, None, None) == Target("bits", 4.25)
    assert parse_target(None, "3.2GiB", None) == Target("bytes", float(int(3.2 * 2**30)))
    assert parse_target(None, None, 0.02) == Target("kl", 0.02)
    sizes = {"12": 12, "1.5 MB": 1_500_000, "2kB": 2000, "2KiB": 2048, "1TiB": 2**40, "7B": 7}
    assert {text: parse_size(text) for text in sizes} == sizes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((4.0, "1GB", None), "--target-bits and --target-size are two budgets"),
        ((0.0, None, None), "--target-bits 0.0 is not a positive number"),
        ((float("nan"), None, None), "--target-bits nan is not a positive number"),
        ((None, None, -1.0), "--max-kl -1.0 is not a positive number"),
        ((None, "3.2 parsecs", None), "'3.2 parsecs' is no size"),
        ((None, "0GB", None), "'0GB' is no size"),
        ((None, "-1GB", None), "'-1GB' is no size"),
    ],
)
def test_what_is_no_target_is_refused(given: tuple[float | None, str | None, float | None], said: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_target(*given)
    assert said in refused.value.message
    assert refused.value.hint
