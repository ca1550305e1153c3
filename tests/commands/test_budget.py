"""`--target-bits`, `--target-size` and `--max-kl`: what they show, what they refuse, and the same from Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import compress
from tests.pipeline.harness import write_text
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 1}
    return tiny_model("llama", tmp_path_factory.mktemp("tiny"), dtype=torch.bfloat16, **shape)


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """The options of a short calibration."""
    return "--calib", write_text(tmp_path_factory.mktemp("text") / "words.txt"), "--samples", 8, "--seq-len", 24


def test_a_budget_from_plan_to_artifact(run: Callable, source: Path, calib: tuple[object, ...], tmp_path: Path) -> None:
    planned = run("plan", "quantize", source, "--target-bits", 3.5, *calib, "--json")
    assert planned.code == 0
    assert planned.json["method"] == "gptq"
    assert (planned.json["measurements"], planned.json["known"], planned.json["runs"]) == (12, 0, 1)
    assert planned.json["lowest_bits_per_weight"] < 3.5 < planned.json["highest_bits_per_weight"]
    assert planned.json["seconds_estimate"] > 0
    assert planned.json["peak_memory_bytes"] > 0
    assert not (tmp_path / "artifacts").exists()
    done = run("quantize", source, "--target-bits", 3.5, *calib, "--no-eval", "--json")
    assert done.code == 0
    bits = done.json["sizes"]["bits_per_weight"]
    assert Path(done.json["artifact"]).parent.name == f"{source.name}-gptq-mixed-{bits:.2f}b"
    assert bits <= 3.5
    assert done.json["budget"]["chosen"]["bits_per_weight"] == pytest.approx(bits, abs=1e-6)
    assert sum(unit["weights"] for unit in done.json["budget"]["units"]) == 4 * 64 * 64 * 3 // 4 + 3 * 64 * 128
    for shown in ("what was chosen", "KL MEASURED", "this artifact", "budget.png"):
        assert shown in done.err
    assert run("plan", "quantize", source, "--target-bits", 4, *calib, "--json").json["known"] == 12
    assert run("verify", done.json["artifact"]).code == 0
    again = run("run", Path(done.json["artifact"]) / "recipe.yaml", "--output", "again", "--no-eval", "--json")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        Path(done.json["artifact"]) / "model.safetensors"
    ).read_bytes(), again.err
    from_python = compress.quantize(
        source, target_bits=3.5, calib=str(calib[1]), samples=8, seq_len=24, output="python", evaluate=False
    )
    assert from_python.artifact_id == run("show", done.json["artifact"], "--json").json["artifact_id"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--target-bits", 4, "--bits", 4), "--target-bits chooses the bits of every linear, which contradicts --bits"),
        (("--max-kl", 0.1, "--scheme", "W4A16"), "contradicts --scheme"),
        (("--max-kl", 0.1, "--target-size", "1GB"), "two budgets"),
        (("--target-size", "1 quire"), "is no size"),
        (("--target-bits", 1.5), "--target-bits 1.5 cannot be met"),
        (("--target-bits", 4, "--recipe", "rtn-fp8-dynamic"), "a budget chooses among integer weights"),
        (("--target-bits", 4, "--recipe", "gptq-mixed"), "schemes of their own already"),
    ],
)
@pytest.mark.parametrize("plan", [True, False])
def test_mistakes_are_refused(
    options: tuple[object, ...], said: str, plan: bool, run: Callable, source: Path, tmp_path: Path
) -> None:
    short = () if "--recipe" in options else ("--samples", 8, "--seq-len", 24)
    verb = ("plan", "quantize") if plan else ("quantize",)
    assert said in run(*verb, source, *options, *short, "--quiet").refused(2)
    assert not (tmp_path / "artifacts").exists()
