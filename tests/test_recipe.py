"""Recipes: parsing, defaults, overrides, canonical form, and what is said about mistakes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from compress.artifact.summary import recipe_summary
from compress.distillation.configs import LOSS_NAMES
from compress.errors import UserError
from compress.pruning.configs import PRUNING_NAMES
from compress.quantization.configs import METHOD_NAMES, GptqConfig
from compress.recipe import Recipe, load_recipe, parse_recipe
from compress.recipe_build import Settings, build_recipe
from compress.recipe_prune import PruneSettings, build_prune_recipe
from compress.recipe_sections import CalibrationConfig
from compress.schemes import FIXED_SCHEMES
from compress.stages import DistillStage, PruneStage, QuantizeStage
from compress.types import IntScheme, Sparsity, ternary_scheme

SEARCHES = sorted((Path(__file__).parent.parent / "recipes").glob("search-*.yaml"))
RECIPES = [path for path in sorted(SEARCHES[0].parent.glob("*.yaml")) if path not in SEARCHES]
AWQ = {"version": 1, "stages": [{"method": "awq"}]}


def problem(data: dict) -> str:
    with pytest.raises(UserError) as caught:
        parse_recipe(data)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value.message


def test_defaults_are_written_out() -> None:
    stage = parse_recipe(AWQ).stages[0]
    assert stage.method.kind == "awq"
    assert stage.scheme.to_scheme() == IntScheme(4, 128, True)
    assert stage.calibration == CalibrationConfig(source="tales", samples=128, seq_len=512)


def test_channel_is_one_scale_per_output() -> None:
    stage = {"method": "rtn", "scheme": {"bits": 8, "group_size": "channel", "symmetric": False}}
    assert parse_recipe({"stages": [stage]}).stages[0].scheme.to_scheme() == IntScheme(8, None, False)


def test_a_method_without_calibration_has_none_and_refuses_one() -> None:
    assert parse_recipe({"stages": [{"method": "rtn"}]}).stages[0].calibration is None
    assert "rtn reads no calibration text" in problem({"stages": [{"method": "rtn", "calibration": {"samples": 4}}]})


def test_canonical_form_is_sorted_complete_json_and_its_hash_is_sha256() -> None:
    recipe = parse_recipe(AWQ)
    data = json.loads(recipe.canonical())
    assert recipe.canonical() == json.dumps(data, sort_keys=True, separators=(",", ":"))
    assert data["stages"][0]["scheme"] == {"bits": 4, "group_size": 128, "symmetric": True}
    assert recipe.hash() == hashlib.sha256(recipe.canonical().encode()).hexdigest()


def test_hash_ignores_spelling_and_place_of_the_model_but_nothing_else() -> None:
    base = parse_recipe(AWQ).hash()
    spelled_out = {"stages": [{"kind": "quantize", "method": {"grid": 20, "kind": "awq"}, "scheme": {"bits": 4}}]}
    assert parse_recipe(spelled_out).hash() == base
    assert parse_recipe({**AWQ, "model": "./somewhere"}).hash() == base
    for changed in (
        {**AWQ, "seed": 1},
        {"stages": [{"method": {"kind": "awq", "clip": False}}]},
        {"stages": [{"method": "awq", "scheme": {"bits": 3}}]},
        {"stages": [{"method": "awq", "ignore": ["lm_head"]}]},
        {"stages": [{"method": "awq", "calibration": {"samples": 127}}]},
    ):
        assert parse_recipe(changed).hash() != base, changed


def test_yaml_round_trip_keeps_everything_and_its_order() -> None:
    data = {**AWQ, "model": "m", "seed": 7, "stages": [{"method": "gptq", "ignore": ["a", "b"]}, {"method": "rtn"}]}
    recipe = parse_recipe(data)
    text = recipe.to_yaml()
    assert parse_recipe(yaml.safe_load(text)) == recipe
    assert list(yaml.safe_load(text)) == ["version", "model", "seed", "stages"]
    assert text == parse_recipe(yaml.safe_load(text)).to_yaml()


def test_all_problems_are_reported_at_once_with_path_and_nearest_name() -> None:
    message = problem(
        {
            "vershun": 1,
            "seed": -1,
            "stages": [
                {"method": {"kind": "gptq", "damp_fra": 0.1}, "scheme": {"bits": 9, "group_sise": 64}},
                {"method": "awk", "calibration": {"samples": 0}},
                {"methd": "rtn"},
            ],
        }
    )
    for expected in (
        "9 problems",
        "vershun: unknown key, did you mean `version`?",
        "seed: -1 ",
        "stages.0.method.damp_fra: unknown key, did you mean `damp_frac`?",
        "stages.0.scheme.bits: 9 ",
        "stages.0.scheme.group_sise: unknown key, did you mean `group_size`?",
        "stages.1.method: 'awk' is not known, did you mean `awq`?",
        "stages.1.calibration.samples: 0 ",
        "stages.2.methd: unknown key, did you mean `method`?",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"stages": []}, "stages: must be a list with at least one entry"),
        ({"stages": 3}, "stages: must be a list, not 3"),
        ({"stages": [3]}, "stages.0: must be a mapping, not 3"),
        ({}, "stages: missing"),
        ({**AWQ, "version": 2}, "version: 2 is not known"),
        ({**AWQ, "seed": "0"}, "seed: must be an integer"),
        ({"stages": [{"method": {"grid": 4}}]}, "stages.0.method: lacks 'kind'"),
        ({"stages": [{"method": "awq", "kind": "quantise"}]}, "did you mean `quantize`?"),
        ({"stages": [{"method": "awq", "scheme": {"group_size": 0}}]}, "0 must be a positive integer or `channel`"),
        ({"stages": [{"method": "awq", "scheme": {"group_size": True}}]}, "must be a positive integer or `channel`"),
        ({"stages": [{"method": "awq", "scheme": {"group_size": "chanel"}}]}, "must be a positive integer"),
        ({"stages": [{"method": "awq", "scheme": {"bits": 1}}]}, "stages.0.scheme.bits: 1 "),
        ({"stages": [{"method": "awq", "ignore": "lm_head"}]}, "stages.0.ignore: must be a list, not 'lm_head'"),
    ],
)
def test_each_problem_has_its_sentence(data: dict, expected: str) -> None:
    assert expected in problem(data)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    cases = {
        "missing": None,
        "binary": b"\xff\xfe\x00\x01",
        "not YAML": b"stages: [",
        "a list": b"- 1\n",
        "empty": b"",
        "twice": b"seed: 1\nseed: 2\nstages:\n- method: awq\n",
        "object": b"stages: !!python/object/apply:os.getcwd []\n",
        "deep": b"[" * 20000,
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.yaml"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            load_recipe(path)
        assert str(path) in caught.value.message, name
    with pytest.raises(UserError):
        load_recipe(tmp_path)


def test_overrides_reach_every_level_with_yaml_types(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("stages:\n- method: awq\n")
    sets = ["stages.0.scheme.bits=3", "stages.0.method.clip=false", "seed=5", "stages.0.scheme.group_size=channel"]
    recipe = load_recipe(path, [*sets, "stages.0.ignore=[a, b]"])
    stage = recipe.stages[0]
    assert (stage.scheme.to_scheme(), recipe.seed, stage.ignore) == (IntScheme(3, None, True), 5, ["a", "b"])
    assert stage.method.kind == "awq"
    assert stage.method.clip is False


@pytest.mark.parametrize(
    "override",
    ["seed", "=3", "stages..bits=3", "stages.1.method=awq", "stages.x.method=awq", "seed.bits=3", "seed=[", "sede=1"],
)
def test_overrides_that_do_not_fit_are_refused(tmp_path: Path, override: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("seed: 1\nstages:\n- method: awq\n")
    with pytest.raises(UserError):
        load_recipe(path, [override])


def test_settings_without_a_base_give_the_default_method() -> None:
    recipe, notes = build_recipe(Settings())
    assert recipe == parse_recipe(AWQ)
    assert notes == []


def test_settings_override_a_base_recipe_and_only_what_was_given(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("seed: 3\nstages:\n- {method: {kind: gptq, damp_frac: 0.05}, scheme: {bits: 3, group_size: 64}}\n")
    recipe, _ = build_recipe(Settings(bits=4, ignore=["x"], samples=8), base=path)
    stage = recipe.stages[0]
    assert stage.method.model_dump()["damp_frac"] == 0.05
    assert stage.scheme.to_scheme() == IntScheme(4, 64, True)
    assert (recipe.seed, stage.ignore, stage.calibration) == (3, ["x"], CalibrationConfig(samples=8))
    switched, _ = build_recipe(Settings(method="awq"), base=path)
    assert switched.stages[0].method.kind == "awq"


def test_calibration_settings_of_a_method_that_reads_none_are_noted(tmp_path: Path) -> None:
    recipe, notes = build_recipe(Settings(method="rtn", samples=8))
    assert recipe.stages[0].calibration is None
    assert len(notes) == 1
    assert "rtn" in notes[0]
    path = tmp_path / "r.yaml"
    path.write_text("stages:\n- {method: awq, calibration: {samples: 4}}\n")
    assert build_recipe(Settings(method="rtn"), base=path)[1] == notes


def test_the_container_of_ternary_weights_means_the_method_that_makes_them() -> None:
    stage = build_recipe(Settings(format="bitnet"))[0].stages[0]
    assert isinstance(stage, QuantizeStage)
    assert (stage.method.kind, stage.scheme.to_scheme()) == ("ternary", ternary_scheme())


def test_stage_settings_over_several_stages_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("stages:\n- method: awq\n- method: rtn\n")
    assert len(build_recipe(Settings(seed=1), base=path)[0].stages) == 2
    with pytest.raises(UserError, match="no single stage"):
        build_recipe(Settings(bits=3), base=path)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Settings(scheme="W8A16"), IntScheme(8, 128, True)),
        (Settings(scheme="w3a16_asym", group_size=64), IntScheme(3, 64, False)),
        (Settings(scheme="w3a16-g64-asym"), IntScheme(3, 64, False)),
        (Settings(scheme="W8A16-channel"), IntScheme(8, None, True)),
        (Settings(scheme="W4A16", bits=4, symmetric=False), IntScheme(4, 128, False)),
        (Settings(bits=2, group_size="channel", symmetric=False), IntScheme(2, None, False)),
    ],
)
def test_scheme_names_and_flags_build_the_same_layouts(settings: Settings, expected: IntScheme) -> None:
    assert build_recipe(settings)[0].stages[0].scheme.to_scheme() == expected


@pytest.mark.parametrize(
    "settings",
    [
        Settings(scheme="W8A16", bits=4),
        Settings(scheme="W4A16_ASYM", symmetric=True),
        Settings(scheme="W9A16"),
        Settings(scheme="NVFP5"),
        Settings(scheme="W8A8", bits=4),
        Settings(scheme="W8A8", group_size=128),
        Settings(scheme="NVFP4", bits=8),
        Settings(scheme="MXFP4", group_size=32),
        Settings(scheme="FP8_DYNAMIC", symmetric=False, method="rtn"),
        Settings(scheme="FP8_E5M2", method="rtn"),
        Settings(scheme="W8A8", method="awq"),
        Settings(scheme="FP8_DYNAMIC", method="gptq"),
        Settings(scheme="W4A16", method="smoothquant"),
        Settings(method="awk"),
        Settings(bits=1),
        Settings(group_size=0),
        Settings(samples=0),
        Settings(seed=-1),
    ],
)
def test_contradictions_and_bad_values_are_refused(settings: Settings) -> None:
    with pytest.raises(UserError):
        build_recipe(settings)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_parse_explain_themselves_and_are_named_for_what_they_do(path: Path) -> None:
    recipe = load_recipe(path)
    method, _, made = path.stem.partition("-")
    stage = recipe.stages[0]
    assert sum(line.lstrip().startswith("#") for line in path.read_text().splitlines()) >= 4
    assert recipe.model is None
    if len(recipe.stages) > 1:
        kinds = "-".join(stage["kind"] for stage in yaml.safe_load(recipe.to_yaml())["stages"])
        assert path.stem in (kinds, "-".join(stage.method.kind for stage in recipe.stages))
        return
    if isinstance(stage, DistillStage):
        scheme = recipe_summary(recipe.placeless()).scheme if stage.calibration.answers is None else "answers"
        assert (method, scheme) == ("distill", made)
        return
    assert stage.method.kind == method
    if (rounding := getattr(stage.method, "rounding", None)) is not None:  # said where it is not the usual one
        made = made.removeprefix(f"{rounding.kind}-")
    if isinstance(stage, PruneStage):
        assert recipe_summary(recipe.placeless()).scheme.removeprefix("sparse") == made
    elif stage.overrides:
        assert recipe_summary(recipe.placeless()).scheme == made
    else:
        refined = "-refined" if stage.refine else ""
        sparsity = stage.method.to_sparsity() if isinstance(stage.method, GptqConfig) else None
        sparse = "" if sparsity is None else f"-{sparsity.label}"
        assert stage.scheme.to_scheme().label.replace("a16", "") + refined + sparse == made
    assert sum(line.lstrip().startswith("#") for line in path.read_text().splitlines()) >= 4
    assert recipe.model is None


def test_there_is_a_recipe_for_every_method() -> None:
    kinds = {load_recipe(path).stages[0].method.kind for path in RECIPES}
    assert kinds - {*LOSS_NAMES} == {*METHOD_NAMES, *PRUNING_NAMES}
    assert "forward-kl" in kinds


def test_a_pruning_stage_has_one_amount_and_its_method_s_calibration() -> None:
    stage = {"kind": "prune", "method": "wanda", "pattern": "2:4"}
    recipe = parse_recipe({"stages": [stage]})
    assert recipe.stages[0].calibration == CalibrationConfig()
    assert recipe.stages[0].to_sparsity() == Sparsity(0.5, 2, 4)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    assert parse_recipe({"stages": [{**stage, "method": "magnitude"}]}).stages[0].calibration is None
    assert "either `sparsity`" in problem({"stages": [{**stage, "sparsity": 0.5}]})
    assert "either `sparsity`" in problem({"stages": [{"kind": "prune", "method": "wanda"}]})
    assert "'4:2' is not a pattern n:m" in problem({"stages": [{**stage, "pattern": "4:2"}]})
    assert "did you mean `prune`" in problem({"stages": [{**stage, "kind": "prun"}]})
    assert "did you mean `pattern`" in problem({"stages": [{**stage, "patern": "2:4"}]})
    assert "magnitude reads no" in problem({"stages": [{**stage, "method": "magnitude", "calibration": {}}]})
    assert "did you mean `wanda`" in problem({"stages": [{**stage, "method": "wamda"}]})


def test_prune_settings_over_a_recipe_and_over_nothing(tmp_path: Path) -> None:
    plain = build_prune_recipe(PruneSettings())[0].stages[0]
    assert (plain.method.kind, plain.sparsity, plain.pattern) == ("sparsegpt", 0.5, None)
    changed = build_prune_recipe(PruneSettings(sparsity=0.3, ignore=["a"], seed=3), base="wanda-2of4")[0]
    stage = changed.stages[0]
    assert (stage.method.kind, stage.sparsity, stage.pattern, stage.ignore) == ("wanda", 0.3, None, ["a"])
    assert changed.seed == 3
    switched, notes = build_prune_recipe(PruneSettings(method="magnitude"), base="wanda-2of4")
    assert switched.stages[0].calibration is None
    assert notes == ["magnitude reads no calibration text: those settings have no effect"]
    for wrong in (PruneSettings(sparsity=0.5, pattern="2:4"), PruneSettings(sparsity=1.5), PruneSettings(method="rtn")):
        with pytest.raises(UserError):
            build_prune_recipe(wrong)
    with pytest.raises(UserError, match="does not prune"):
        build_prune_recipe(PruneSettings(), base="awq-w4-g128")


def test_a_recipe_is_a_value() -> None:
    recipe = Recipe.model_validate(AWQ)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", FIXED_SCHEMES)
def test_a_scheme_may_be_named_in_a_recipe_or_by_a_flag(name: str) -> None:
    method = "ternary" if name == "W2A8" else "rtn"
    by_flag = build_recipe(Settings(scheme=name.lower().replace("_", "-"), method=method))[0]
    by_name = parse_recipe({"stages": [{"method": method, "scheme": name}]})
    spelled_out = parse_recipe({"stages": [{"method": method, "scheme": {"name": name}}]})
    assert by_flag.hash() == by_name.hash() == spelled_out.hash()
    stage = by_flag.stages[0]
    assert stage.scheme.to_scheme() == FIXED_SCHEMES[name]
    assert (stage.calibration is not None) == name.endswith(("_STATIC", "NVFP4"))
    assert yaml.safe_load(by_flag.to_yaml())["stages"][0]["scheme"] == {"name": name}
    assert parse_recipe(yaml.safe_load(by_flag.to_yaml())) == by_flag


def test_a_name_of_weights_alone_stands_for_its_settings() -> None:
    short = parse_recipe({"stages": [{"method": "rtn", "scheme": "W3A16_ASYM"}]})
    assert short.stages[0].scheme.to_scheme() == IntScheme(3, 128, False)


def test_smoothquant_means_w8a8_unless_told_otherwise() -> None:
    for recipe in (
        build_recipe(Settings(method="smoothquant"))[0],
        parse_recipe({"stages": [{"method": "smoothquant"}]}),
    ):
        assert recipe.stages[0].scheme.to_scheme() == FIXED_SCHEMES["W8A8"]
    assert build_recipe(Settings(scheme="W8A8"))[0].stages[0].method.kind == "smoothquant"
    assert build_recipe(Settings(scheme="FP8_BLOCK"))[0].stages[0].method.kind == "rtn"
    assert build_recipe(Settings(scheme="NVFP4"))[0].stages[0].method.kind == "gptq"
    assert build_recipe(Settings(scheme="mxfp8"))[0].stages[0].method.kind == "rtn"
    named = build_recipe(Settings(method="smoothquant", scheme="W8A8_STATIC"))[0]
    assert named.stages[0].scheme.to_scheme() == FIXED_SCHEMES["W8A8_STATIC"]


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC"])
def test_gptq_undoes_no_earlier_error_with_8_bits_on_both_sides_unless_told_to(scheme: str) -> None:
    def correction(method: object, scheme: object) -> float:
        recipe = parse_recipe({"stages": [{"method": method, "scheme": scheme}]})
        assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
        found = recipe.stages[0].method  # type: ignore[union-attr]
        return (found if found.kind == "gptq" else found.rounding).correction  # type: ignore[union-attr, no-any-return]

    assert correction("gptq", scheme) == 0
    assert correction({"kind": "gptq", "correction": 0.5}, scheme) == 0.5
    assert correction({"kind": "smoothquant", "rounding": "gptq"}, scheme) == 0
    for other in ("NVFP4", "W8A16", "W4A16"):
        assert correction("gptq", other) == 1


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"method": "rtn", "scheme": {"name": "FP9"}}, "stages.0.scheme.name: 'FP9' must be one of W8A8, "),
        ({"method": "rtn", "scheme": "FP9"}, "stages.0.scheme: 'FP9' is no scheme"),
        ({"method": "rtn", "scheme": "FP8_E5M2"}, "E5M2 is not for weights"),
        ({"method": "rtn", "scheme": {"name": "W8A8", "bits": 8}}, "stages.0.scheme.bits: unknown key"),
        ({"method": "awq", "scheme": "W8A8"}, "awq is for weights alone"),
        ({"method": "gptq", "scheme": "FP8_BLOCK"}, "gptq rounds to integers"),
        ({"method": {"kind": "rtn", "scale_search": True}, "scheme": "FP8_BLOCK"}, "scale_search is for integers"),
        ({"method": "awq", "scheme": "NVFP4A16"}, "awq is for integers"),
        ({"method": "sweep", "scheme": "FP8_DYNAMIC"}, "sweep is for scales of groups"),
        ({"method": "smoothquant", "scheme": "W4A16"}, "smoothquant is for schemes that round inputs"),
        ({"method": {"kind": "smoothquant", "rounding": "gptq"}, "scheme": "FP8_STATIC"}, "gptq rounds to integers"),
        ({"method": "rtn", "scheme": "W8A8", "calibration": {}}, "rtn reads no calibration text"),
        ({"method": "rtn", "scheme": "FP8_DYNAMIC", "refine": True}, "refine tunes integer schemes, not FP8_DYNAMIC"),
        ({"method": "gptq", "refine": {"steps": 0}}, "stages.0.refine.steps"),
        ({"method": "gptq", "refine": {"step": 3}}, "stages.0.refine.step: unknown key, did you mean `steps`?"),
    ],
)
def test_what_does_not_go_together_is_said(stage: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe({"stages": [stage]})
    assert said in caught.value.message


def test_a_flag_replaces_the_scheme_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("stages:\n- {method: rtn, scheme: FP8_STATIC, calibration: {samples: 4}}\n")
    assert build_recipe(Settings(seed=1), base=path)[0].stages[0].scheme.to_scheme() == FIXED_SCHEMES["FP8_STATIC"]
    assert build_recipe(Settings(samples=8), base=path)[0].stages[0].calibration.samples == 8  # type: ignore[union-attr]
    static = build_recipe(Settings(scheme="W8A8_STATIC"), base=path)[0].stages[0]
    assert (static.scheme.to_scheme(), static.calibration.samples) == (FIXED_SCHEMES["W8A8_STATIC"], 4)  # type: ignore[union-attr]


def test_refining_is_a_switch_that_leaves_other_recipes_as_they_were() -> None:
    plain, refined = (parse_recipe({"stages": [{"method": "gptq", "refine": value}]}) for value in (False, True))
    assert "refine" not in plain.placeless()["stages"][0]
    assert plain.hash() == parse_recipe({"stages": [{"method": "gptq"}]}).hash()
    assert refined.hash() != plain.hash()
    assert parse_recipe(yaml.safe_load(refined.to_yaml())) == refined
    assert [recipe_summary(recipe.placeless()).method for recipe in (plain, refined)] == ["gptq", "gptq+refine"]
    data_free = build_recipe(Settings(method="rtn", refine=True, samples=8))[0].stages[0]
    assert data_free.calibration is not None
    assert data_free.calibration.samples == 8


def test_the_flag_turns_a_recipes_refining_on_and_off(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("stages:\n- {method: gptq, refine: {steps: 7}}\n")

    def steps(refine: bool | None) -> int | None:
        found = build_recipe(Settings(refine=refine), base=path)[0].stages[0].refine  # type: ignore[union-attr]
        return None if found is None else found.steps

    assert (steps(None), steps(True), steps(False)) == (7, 7, None)
