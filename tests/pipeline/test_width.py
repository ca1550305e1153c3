"""Width cuts of tiny models: shapes, config, what transformers loads, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress import pipeline
from compress.artifact.verify import verify
from compress.errors import UserError, WorkError
from compress.pipeline import WidthPlan, width_stage
from compress.pipeline.resolve import resolve
from compress.pipeline.width_layout import LAYOUTS
from compress.progress import NullProgress
from compress.recipe import Recipe, parse_recipe
from compress.recipe_prune import PruneSettings, build_prune_recipe
from tests.pipeline import harness
from tests.tiny_models import tiny_tokens

FAMILIES = tuple(LAYOUTS)
WITH_HEADS = tuple(family for family, layout in LAYOUTS.items() if layout.heads_stay is None)
WITH_CHANNELS = tuple(family for family, layout in LAYOUTS.items() if layout.stream_stays is None)


def recipe(text: Path, keep: float = 0.75, samples: int = 8, **method: Any) -> Recipe:
    """A width cut calibrated on windows of 24 tokens."""
    stage = {
        "kind": "prune",
        "method": {"kind": "width", **method},
        "keep": keep,
        "calibration": {"source": str(text), "samples": samples, "seq_len": 24},
    }
    return parse_recipe({"stages": [stage]})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_narrow_model_is_what_transformers_loads(
    family: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, tokens = tiny(family), tiny_tokens(2, 20)
    wanted = recipe(text, heads=0.6 if family in WITH_HEADS else 1.0)
    artifact = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    before, after = harness.tensors(source), harness.tensors(artifact.path)
    config, before_config = artifact.config, json.loads((source / "config.json").read_text())
    assert before.keys() == after.keys()
    if family in WITH_HEADS:
        assert heads_of(config) == ((4, 4, None) if LAYOUTS[family].latent else (4, 2, 16))
    assert config[LAYOUTS[family].size] < before_config[LAYOUTS[family].size]
    counted = sum(tensor.numel() for tensor in after.values())
    assert artifact.manifest.sizes.parameters == counted
    plan = pipeline.plan(wanted, model=source)
    assert isinstance(plan, WidthPlan)
    assert plan.cut.parameters == counted
    assert plan.cut.all_parameters == sum(tensor.numel() for tensor in before.values())
    assert 0.7 < plan.cut.keep <= 0.75
    assert (plan.cut.neurons + 8 - plan.cut.neurons % 8) % 8 == 0
    shapes = {layer["name"]: layer["details"]["shape"] for layer in artifact.layers()}
    turned = -1 if LAYOUTS[family].turned else 1
    assert all(list(after[f"{name}.weight"].shape)[::turned] == shape for name, shape in shapes.items())
    found = harness.loaded_logits(artifact.path, tokens)
    assert found.isfinite().all()
    assert harness.distance(found, harness.source_logits(source, tokens)) > 0.01
    assert verify(artifact.path).ok
    assert f"{counted} of the source's {plan.cut.all_parameters}" in (artifact.path / "README.md").read_text()
    assert artifact.manifest.sizes.bytes < 0.8 * artifact.manifest.parents[0].bytes


def heads_of(config: dict[str, Any]) -> tuple[int, int, int | None]:
    """Query heads, key heads and the width of one, as config.json has them; latent attention has others for that."""
    size = None if "kv_lora_rank" in config else config["head_dim"]
    return config["num_attention_heads"], config["num_key_value_heads"], size


def test_rows_that_stay_are_the_source_s_and_only_consumers_are_repaired(
    tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = tiny("llama")
    plain = pipeline.run(recipe(text, repair=False), model=source, output=tmp_path / "plain").artifact
    mended = pipeline.run(recipe(text), model=source, output=tmp_path / "mended").artifact
    before, cut, repaired = (harness.tensors(path) for path in (source, plain.path, mended.path))
    for name, tensor in cut.items():
        action = mended.manifest.ledger[name].action
        consumer = "down_proj" in name or "o_proj" in name  # their biases take up a mean
        assert (action == "repaired") == consumer, name
        if "block" in name or not consumer:
            assert torch.equal(tensor, repaired[name]), "the cut is the same with and without repair"
        if "gate_proj.weight" in name or "up_proj.weight" in name:
            rows = {tuple(row.tolist()) for row in before[name]}
            assert all(tuple(row.tolist()) in rows for row in tensor)
        if "o_proj" in name or "q_proj" in name:
            assert torch.equal(tensor, before[name]), "all heads stay"
    errors = [
        [layer["output_error"] for layer in artifact.layers() if layer["name"].endswith("down_proj")]
        for artifact in (plain, mended)
    ]
    assert all(after < before for before, after in zip(*errors, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "llama"])
def test_biases_take_up_the_mean_of_what_went(
    family: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, means = tiny(family), {}
    job = resolve(recipe(text), model=source, output=None, device="auto")
    assert job.calibration is not None
    consumer = LAYOUTS[family].down
    for repair in (False, True):
        made = pipeline.run(recipe(text, repair=repair), model=source, output=tmp_path / str(repair)).artifact
        means[repair] = mean_output(made.path, consumer, job.calibration.tokens)
        biases = {entry.action for name, entry in made.manifest.ledger.items() if name.endswith(f"{consumer}.bias")}
        assert biases == ({"repaired"} if repair else {"kept"})
    wanted = mean_output(source, consumer, job.calibration.tokens)
    assert float((means[True] - wanted).norm()) < 1e-3 * float(wanted.norm())
    assert float((means[False] - wanted).norm()) > 0.02 * float(wanted.norm())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_the_stream_has_lost_is_nothing_that_a_repaired_linear_s_inputs_tell(
    family: str, tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.quantization.gptq.SHRINKAGE", 0.0)
    source, wanted = tiny(family), recipe(text, samples=64, damp_frac=0.0)
    made = pipeline.run(wanted, model=source, output=tmp_path / "out").artifact
    job = resolve(wanted, model=source, output=None, device="auto")
    assert job.calibration is not None
    found = []
    for path in (source, made.path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        block, seen = model.model.layers[-1], []
        block.mlp.down_proj.register_forward_hook(lambda _, given, out, seen=seen: seen.append(given[0].detach()))
        block.register_forward_hook(lambda _, given, out, seen=seen: seen.append(out.detach()))
        with torch.inference_mode():
            model(job.calibration.tokens)
        found.append([each.flatten(0, -2) for each in seen])
    (_, original), (inputs, now) = found
    lost = original - now
    told = lost.T @ inputs
    assert float(told.norm()) < 1e-3 * float(lost.norm() * inputs.norm())
    assert float(lost.norm()) > 0.01 * float(original.norm())


def mean_output(path: Path, end: str, tokens: torch.Tensor) -> torch.Tensor:
    """What the first linear of this name gives on average over the tokens, (out,) float32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    linear = next(module for name, module in model.named_modules() if name.endswith(end))
    seen: list[torch.Tensor] = []
    linear.register_forward_hook(lambda _, given, found: seen.append(found.detach()))
    with torch.inference_mode():
        model(tokens)
    return seen[0].reshape(-1, seen[0].shape[-1]).mean(0)


@pytest.mark.parametrize("family", WITH_CHANNELS)
def test_a_narrower_stream_is_what_transformers_loads_and_repair_brings_it_nearer(
    family: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, tokens = tiny(family), tiny_tokens(2, 20)
    before, found = harness.tensors(source), {}
    for repair in (False, True):
        wanted = recipe(text, 0.7, samples=32, hidden=0.8, heads=0.6, repair=repair)
        artifact = pipeline.run(wanted, model=source, output=tmp_path / str(repair)).artifact
        after, config = harness.tensors(artifact.path), artifact.config
        assert (config["hidden_size"], config["num_attention_heads"]) == (72, 4)
        assert before.keys() == after.keys()
        counted = sum(tensor.numel() for tensor in after.values())
        lost = sum(layer["details"]["removed"] for layer in artifact.layers())
        assert artifact.manifest.sizes.parameters == counted == sum(t.numel() for t in before.values()) - lost
        plan = pipeline.plan(wanted, model=source)
        assert isinstance(plan, WidthPlan)
        assert plan.cut.parameters == counted <= 0.7 * plan.cut.all_parameters
        grown = (96 / 72) ** 0.5 if LAYOUTS[family].scaled else 1.0
        embedding = before["model.embed_tokens.weight"] * grown
        assert all(bool((column[:, None] == embedding).all(0).any()) for column in after["model.embed_tokens.weight"].T)
        assert verify(artifact.path).ok
        found[repair] = harness.distance(
            harness.loaded_logits(artifact.path, tokens), harness.source_logits(source, tokens)
        )
    assert 0.01 < found[True] < 0.95 * found[False]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITH_CHANNELS])
def test_what_a_family_cannot_lose_is_named_with_the_reason(family: str, tiny: Callable[..., Path], text: Path) -> None:
    with pytest.raises(UserError, match=f"the stream of {family} models cannot lose channels: their layer norms"):
        pipeline.plan(recipe(text, hidden=0.5), model=tiny(family))
    with pytest.raises(UserError, match=f"query heads of {family} models cannot go: their config"):
        pipeline.plan(recipe(text, heads=0.5), model=tiny(family))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_heads_with_keys_of_their_own_take_these_along(
    family: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = tiny(family, num_key_value_heads=6)
    artifact = pipeline.run(recipe(text, heads=0.6), model=source, output=tmp_path / "out").artifact
    config, before, after = artifact.config, harness.tensors(source), harness.tensors(artifact.path)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 4, 16)
    assert artifact.manifest.sizes.parameters == sum(tensor.numel() for tensor in after.values())
    fused = "model.layers.0.self_attn.qkv_proj.weight"
    if fused in before:
        keys = [tensors[fused].split(len(tensors[fused]) // 3) for tensors in (before, after)]
    else:
        names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
        keys = [tuple(tensors[name] for name in names) for tensors in (before, after)]
    heads = [part.reshape(-1, 16, 96) for part in keys[0]]
    narrow = [part.reshape(-1, 16, 96) for part in keys[1]]
    kept = [[bool((head == one).all()) for head in heads[0]].index(True) for one in narrow[0]]
    assert len(kept) == 4
    assert all(torch.equal(part[kept], cut) for part, cut in zip(heads, narrow, strict=True)), "q, k and v of one head"


def test_zeros_of_an_earlier_pruning_stay(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    first = build_prune_recipe(PruneSettings(method="magnitude", pattern="2:4"))[0]
    sparse = pipeline.run(first, model=tiny("llama"), output=tmp_path / "sparse").artifact
    dense = {name: count_zeros(tensor) for name, tensor in harness.tensors(sparse.path).items()}
    narrow = pipeline.run(recipe(text), model=sparse.path, output=tmp_path / "narrow").artifact
    for name, tensor in harness.tensors(narrow.path).items():
        if name.endswith(("down_proj.weight", "o_proj.weight")):
            share = count_zeros(tensor) / tensor.numel()
            assert share == pytest.approx(0.5, abs=0.1)
            assert dense[name] > 0
            record = next(layer for layer in narrow.layers() if f"{layer['name']}.weight" == name)
            assert record["details"]["zeros"] == count_zeros(tensor)


def count_zeros(tensor: torch.Tensor) -> int:
    return int((tensor == 0).sum())


@pytest.mark.parametrize("importance", ["activation", "feature", "taylor", "logits"])
def test_every_importance_cuts_as_much_and_chooses_by_its_own_measure(
    importance: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = tiny("llama")
    paths = [
        pipeline.run(recipe(text, heads=0.6, importance=each, repair=False), model=source, output=tmp_path / each)
        for each in ("repair", importance)
    ]
    usual, other = (harness.tensors(each.artifact.path) for each in paths)
    assert {n: t.shape for n, t in usual.items()} == {n: t.shape for n, t in other.items()}
    assert any(not torch.equal(usual[name], other[name]) for name in usual)


@pytest.mark.parametrize("importance", ["taylor", "logits"])
def test_gradients_are_those_of_the_whole_model(
    importance: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = tiny("qwen3")
    made = pipeline.run(
        recipe(text, samples=2, importance=importance, repair=False), model=source, output=tmp_path / "o"
    )
    job = resolve(recipe(text, samples=2, importance=importance), model=source, output=None, device="auto")
    assert job.calibration is not None
    tokens = job.calibration.tokens
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        given[0].retain_grad()
        seen.append(given[0])

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(keep)
    logits = model(tokens, use_cache=False).logits
    if importance == "taylor":
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
        ).backward()
    else:
        logits.amax(-1).sum().backward()
    before, after = harness.tensors(source), harness.tensors(made.artifact.path)
    for block, inputs in enumerate(seen):
        assert inputs.grad is not None
        score = (inputs * inputs.grad).abs().sum((0, 1))
        name = f"model.layers.{block}.mlp.up_proj.weight"
        best = score.argsort(descending=True)[: len(after[name])].sort().values
        assert torch.equal(after[name], before[name][best])


class _StopsAfterOneBlock(NullProgress):
    def advance(self, note: str = "") -> None:
        if note == "block 0":
            raise WorkError("stopped", "run it again")


@pytest.mark.parametrize("hidden", [1.0, 0.75])
def test_killed_runs_resume_to_the_same_bytes_and_threads_change_none(
    hidden: float, tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.pipeline.inputs.CHUNK_TOKENS", 64)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    source, wanted = tiny("llama"), recipe(text, samples=12, hidden=hidden)
    whole = pipeline.run(wanted, model=source, output=tmp_path / "whole").artifact
    with pytest.raises(WorkError, match="stopped"):
        pipeline.run(wanted, model=source, output=tmp_path / "out", progress=_StopsAfterOneBlock())
    torch.set_num_threads(2)
    resumed = pipeline.run(wanted, model=source, output=tmp_path / "out")
    assert (resumed.resumed_blocks, resumed.computed_blocks) == (1, 1)
    assert harness.snapshot(resumed.artifact.path) == harness.snapshot(whole.path)


def test_what_transformers_would_load_as_another_model_is_not_published(
    tiny: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tiny("llama"), tmp_path / "out"
    right = width_stage.config_of
    with monkeypatch.context() as patched:
        patched.setattr(width_stage, "config_of", lambda job: {**right(job), "rms_norm_eps": 10.0})
        with pytest.raises(WorkError, match="loads the cut model as another"):
            pipeline.run(recipe(text), model=source, output=out)
    assert not out.exists()
    again = pipeline.run(recipe(text), model=source, output=out)
    assert again.resumed_blocks == 2, "only the check failed: the blocks are still there"


def test_inputs_without_usable_moments_are_named(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    def silent(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: t * 0 if "up_proj" in name else t for name, t in tensors.items()}

    source = harness.copy_with(tiny("mistral"), tmp_path / "silent", silent)
    with pytest.raises(WorkError, match=r"second moments of .*down_proj"):
        pipeline.run(recipe(text), model=source, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cut_that_leaves_nothing_is_refused_with_the_smallest_possible(tiny: Callable[..., Path], text: Path) -> None:
    plan = pipeline.plan(recipe(text, keep=0.1), model=tiny("llama"))
    assert "would leave no neuron" in plan.problems[0]
    smallest = float(plan.hint.rsplit(" ", 1)[1])
    assert not pipeline.plan(recipe(text, keep=smallest + 0.002), model=tiny("llama")).problems
    with pytest.raises(UserError, match="would leave no neuron"):
        pipeline.run(recipe(text, keep=0.1), model=tiny("llama"))


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"method": "width"}, "needs `keep`"),
        ({"method": "width", "keep": 0.7, "sparsity": 0.5}, "no other amount"),
        ({"method": "width", "keep": 1.0}, "less than 1"),
        ({"method": "width", "keep": 0.7, "ignore": ["a"]}, "cuts all blocks alike"),
        ({"method": "wanda", "keep": 0.7}, "single weights"),
    ],
    ids=str,
)
def test_amounts_that_do_not_fit_the_method(stage: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_recipe({"stages": [{"kind": "prune", **stage}]})
