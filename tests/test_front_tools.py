"""The instruments of the size-quality front against answers known beforehand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent


def _measured(load: Any, tool: str, name: str, bits: float, kl: float, linear_bits: float | None = None) -> Any:
    sums = load("scoring").BlockSums(*(np.full(4, total) for total in (2048.0, 4096.0, 2048.0 * kl, 1024.0)))
    return load("points").Measured(tool, name, bits, bits if linear_bits is None else linear_bits, sums, [kl])


def test_a_point_is_held_by_the_best_of_ours_within_its_bits(load) -> None:  # type: ignore[no-untyped-def]
    points = [
        _measured(load, "compress", "small", 3.0, 0.08),
        _measured(load, "compress", "middle", 4.0, 0.02),
        _measured(load, "compress", "large", 5.0, 0.01),
        _measured(load, "other", "beaten", 4.0, 0.04),
        _measured(load, "other", "missed", 4.9, 0.015),
        _measured(load, "other", "too small", 2.9, 0.5),
        _measured(load, "other", "by linears", 6.0, 0.2, linear_bits=3.1),
    ]
    table = load("front_table")
    rows = {row["name"]: row for row in table.rows(points)}
    assert (rows["beaten"]["file"]["ours"], rows["beaten"]["file"]["held"]) == ("middle", True)
    assert rows["beaten"]["file"]["ratio"]["value"] == pytest.approx(0.5)
    assert (rows["missed"]["file"]["ours"], rows["missed"]["file"]["held"]) == ("middle", False)
    assert (rows["too small"]["file"]["ours"], rows["too small"]["file"]["held"]) == (None, False)
    assert (rows["by linears"]["file"]["ours"], rows["by linears"]["linears"]["ours"]) == ("large", "small")
    assert "file" not in rows["small"]
    lines = table.render(table.rows(points)).splitlines()
    assert [line.count("|") for line in lines] == [lines[0].count("|")] * len(lines)
    assert sum("missed" in line.split("|")[-3] for line in lines[2:]) == 2


def test_the_picture_is_written(load, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    points = [_measured(load, "compress", "a", 3.0, 0.08), _measured(load, "other", "b", 4.0, 0.04)]
    load("front_table").plot("model", points, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_bits_count_all_tensors_over_all_parameters(load, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, folder = tmp_path / "base", tmp_path / "run"
    for place in (base, folder / "artifact"):
        place.mkdir(parents=True)
    linear, table, norm = "model.layers.0.mlp.up_proj", torch.zeros(10, 16, dtype=torch.bfloat16), torch.zeros(16)
    save_file(
        {
            f"{linear}.weight": torch.zeros(32, 16, dtype=torch.bfloat16),
            "model.embed_tokens.weight": table,
            "model.layers.0.input_layernorm.weight": norm,
        },
        base / "model.safetensors",
    )
    save_file(
        {
            f"{linear}.weight_packed": torch.zeros(32, 2, dtype=torch.int32),  # 4 bits
            f"{linear}.weight_scale": torch.zeros(32, 1, dtype=torch.bfloat16),
            "model.embed_tokens.weight": table,
            "model.layers.0.input_layernorm.weight": norm,
        },
        folder / "artifact" / "model.safetensors",
    )
    (folder / "result.json").write_text(json.dumps({"identity": {}, "output": {}}))
    points = load("points")
    whole, linears = points.bits(base, folder)
    assert linears == pytest.approx(4 + 16 / 16)
    assert whole == pytest.approx((512 * 5 + 160 * 16 + 16 * 32) / (512 + 160 + 16))
    printed = {"stored_bytes": 86.0, "linear_bytes": 64.0}
    (folder / "result.json").write_text(json.dumps({"identity": {}, "output": printed}))
    assert points.bits(base, folder) == pytest.approx((1.0, 1.0))


def test_runs_are_kept_by_their_identity(load, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    runs, folder = load("runs"), tmp_path / "run"
    program = "import json; print('noise'); print(json.dumps({'answer': 5}))"
    assert not runs.is_kept(folder, {"a": 1})
    assert runs.run(folder, {"a": 1}, [sys.executable, "-c", program], 1) == {"answer": 5}
    assert runs.output_of(folder) == {"answer": 5}
    assert runs.is_kept(folder, {"a": 1})
    assert not runs.is_kept(folder, {"a": 2})
    assert runs.is_kept(folder, {"a": 2}, ignoring=("a",))
    with pytest.raises(RuntimeError, match="exit code 3"):
        runs.run(folder, {"a": 1}, [sys.executable, "-c", "raise SystemExit(3)"], 1)
    assert not runs.is_kept(folder, {"a": 1})  # a failed run leaves nothing to take up


def test_a_recipe_is_frozen_but_for_its_text_and_seed(load, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from compress.recipe import parse_recipe

    points = load("front_points").ours()
    assert points
    for point in points:
        seeded = json.loads(load("points").seeded(point, tmp_path / "tokens.safetensors", 2))
        stage = parse_recipe(seeded).stages[0]
        assert seeded["seed"] == 2
        assert seeded["stages"][0]["calibration"]["source"] == str(tmp_path / "tokens.safetensors")
        assert stage.method.kind in point.recipe


def test_points_are_those_of_the_model(load) -> None:  # type: ignore[no-untyped-def]
    from compress.recipe import parse_recipe

    points = load("front_points")
    for model, method in (("tales-6m-twin", "awq"), ("stories260K", "gptq")):
        own = points.ours(model)
        assert own
        for point in own:
            stage = parse_recipe(yaml.safe_load(point.recipe)).stages[0]
            assert (stage.method.kind, stage.embeddings is None) == (method, False)
    small = {point.label: point.arguments for point in points.peers("stories260K")}
    assert small["llm-compressor gptq w4 channel"][-4:] == ("--bits", "4", "--group-size", "channel")
    assert not any(label.startswith("AutoRound") for label in small)
    assert "AutoRound w4 g128" in {point.label for point in points.peers("tales-6m")}


def test_a_point_that_cannot_be_made_is_left_out(load, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    points = load("points")

    def absent(*_: object) -> Path:
        raise points.NotAvailable("not here")

    monkeypatch.setattr(points, "make", absent)
    monkeypatch.setattr(points, "scores", lambda *_: {})
    assert points.measure(None, "tales-6m", [points.Point("HQQ", "w4 g64")], [0], 2048) == []


def test_every_name_of_a_llama_has_its_place_in_gguf(load) -> None:  # type: ignore[no-untyped-def]
    import compress

    names = load_file(Path(compress.default_model()) / "model.safetensors")
    found = [load("peer_llamacpp").gguf_name(name) for name in names]
    assert len(set(found)) == len(names)
    assert load("peer_llamacpp").gguf_name("model.layers.3.self_attn.q_proj.weight") == "blk.3.attn_q.weight"
    with pytest.raises(KeyError):
        load("peer_llamacpp").gguf_name("model.layers.3.self_attn.q_norm.weight")
