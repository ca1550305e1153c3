"""The measuring instruments of benchmarks/ against answers known beforehand: a wrong ruler must not look right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from compress.recipe import parse_recipe
from compress.types import IntScheme

ROOT = Path(__file__).resolve().parent.parent


def _tiny(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(8.0)
    model.save_pretrained(path)
    return path


def test_scores_equal_the_formulas(load, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, other = _tiny(tmp_path / "base", 0), _tiny(tmp_path / "other", 1)
    windows = np.random.default_rng(0).integers(0, 61, (10, 1 + 512))
    sums = load("scoring").score(base, {"other": other, "same": base}, windows)
    assert [len(s.kl) for s in sums.values()] == [2, 2, 2]  # 10 windows fill two blocks of 4
    ids = torch.from_numpy(windows[:8])
    with torch.no_grad():
        p, q = (
            log_softmax(AutoModelForCausalLM.from_pretrained(m)(ids[:, :-1]).logits.double(), -1) for m in (base, other)
        )
    kl = kl_div(q, p, reduction="none", log_target=True).sum(-1)
    nll = -q.gather(2, ids[:, 1:, None])
    assert sums["other"].mean_kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert sums["other"].kl[1] == pytest.approx(kl[4:].sum().item(), rel=1e-4)
    assert sums["other"].perplexity == pytest.approx(nll.mean().exp().item(), rel=1e-4)
    assert sums["other"].agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=1e-3)
    assert sums["same"].mean_kl == pytest.approx(0, abs=1e-6)
    assert sums["same"].agreement == 1.0
    assert sums["other"].mean_kl > 0.1
    sums["other"].save(tmp_path / "sums.json")
    again = load("scoring").BlockSums.load(tmp_path / "sums.json")
    assert again.mean_kl == sums["other"].mean_kl


def test_intervals_cover_and_pair(load) -> None:  # type: ignore[no-untyped-def]
    intervals = load("intervals")
    rng = np.random.default_rng(0)
    hard = rng.uniform(1, 5, 32)  # blocks differ a lot, in the same way for both sides
    theirs, ours = 2.0 * hard, 1.0 * hard * rng.uniform(0.99, 1.01, 32)
    ratio = intervals.ratio(ours, theirs)
    assert ratio.low < ratio.value < ratio.high
    assert ratio.value == pytest.approx(0.5, abs=0.005)
    assert ratio.high - ratio.low < 0.01  # unpaired it would be some 0.2 wide
    mean = intervals.mean_per_token(theirs, np.full(32, 2048.0))
    assert mean.high - mean.low > 0.2 * mean.value
    assert intervals.recovery(ours, theirs).value == pytest.approx(0.5, abs=0.005)
    # RTN 1.0 plain and 3.0 on the twin, the method 1.4 on the twin: it wins back 0.8 of the 2.0 that were added.
    won = intervals.outlier_recovery(1.4 * hard, 3.0 * hard, 1.0 * hard)
    assert won.value == pytest.approx(0.8)


def test_windows_are_drawn_without_overlap(load) -> None:  # type: ignore[no-untyped-def]
    tokens = load("tokens")
    ids = np.arange(100, 100 + 1000)
    drawn = tokens.calibration_windows(ids, bos=1, samples=12, seq_len=33, seed=4)
    assert drawn.shape == (12, 33)
    assert (drawn[:, 0] == 1).all()
    assert len(set(drawn[:, 1:].ravel())) == 12 * 32
    assert (drawn == tokens.calibration_windows(ids, 1, 12, 33, seed=4)).all()
    assert (drawn != tokens.calibration_windows(ids, 1, 12, 33, seed=5)).any()
    held_out = tokens.held_out_windows(ids, bos=1, seq_len=32, tokens=60)
    assert held_out[:, 1:].ravel().tolist() == list(range(100, 164))
    with pytest.raises(ValueError, match="31 windows"):
        tokens.calibration_windows(ids, 1, samples=32, seq_len=33, seed=0)
    with pytest.raises(ValueError, match="992 tokens"):
        tokens.held_out_windows(ids, 1, seq_len=32, tokens=1000)


def test_random_checkpoint_loads_and_repeats(load, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    maker = load("make_random_llama")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 5, "content": "<s>"}]}))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    shape = {"hidden": 32, "layers": 3, "ffn": 48, "heads": 4, "kv_heads": 2, "vocabulary": 70}
    count = maker.make_random_llama(tmp_path / "a", tokenizer, **shape, shard_bytes=9000)
    maker.make_random_llama(tmp_path / "b", tokenizer, **shape, shard_bytes=10**9)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 3
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info.values())
    assert model.num_parameters() == count
    assert model.config.bos_token_id == 5
    assert model.dtype == torch.bfloat16
    sharded = {k: v for part in (tmp_path / "a").glob("*.safetensors") for k, v in load_file(part).items()}
    whole = load_file(tmp_path / "b" / "model.safetensors")
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)
    assert 0.019 < whole["lm_head.weight"].float().std() < 0.021


def test_child_memory_and_time_are_seen(load) -> None:  # type: ignore[no-untyped-def]
    machine = load("machine")
    code = "import time; x = bytearray(b'1') * 300_000_000; print(len(x)); time.sleep(0.1)"
    small = machine.run([sys.executable, "-c", "print(1)"], {}, sample_memory=True)
    large = machine.run([sys.executable, "-c", code], {}, sample_memory=True)
    assert large.returncode == 0
    assert large.stdout.strip() == "300000000"
    assert 295e6 < large.anonymous_peak_bytes - small.anonymous_peak_bytes < 330e6
    assert large.resident_peak_bytes >= large.anonymous_peak_bytes
    assert large.seconds > 0.1
    assert machine.run([sys.executable, "-c", "raise SystemExit(3)"], {}).returncode == 3


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_comparison_with_autoround_runs_the_frozen_recipe_on_the_tokens_of_its_case(load, bits: int) -> None:  # type: ignore[no-untyped-def]
    tool = load("autoround")
    workspace = SimpleNamespace(calibration=lambda model, seed: Path(f"{model}-s{seed}.safetensors"))
    tools = tool.Tools(workspace, None, None, 1)
    recipe = parse_recipe(tools._recipe(tool.Case(bits, 64, 2)))
    (stage,) = recipe.stages
    assert recipe.seed == 2
    assert stage.scheme.to_scheme() == IntScheme(bits, 64)
    assert stage.refine is not None
    assert stage.calibration.source == "tales-6m-s2.safetensors"


def test_what_both_tools_lost_is_compared_block_by_block(load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tool, scoring = load("autoround"), load("scoring")
    tokens, hard = np.full(32, 2048.0), np.linspace(1.0, 9.0, 32)
    sums = {
        name: scoring.BlockSums(tokens, hard, share * hard, tokens)
        for name, share in (("compress", 0.5), ("auto-round", 1.0))
    }
    (tmp_path / "result.json").write_text(json.dumps({"processor_seconds": 10.0}))
    monkeypatch.setattr(tool, "scored", lambda *_: sums)
    monkeypatch.setattr(tool.Tools, "made", lambda *_: tmp_path)
    (row,) = tool.quality(tool.Tools(None, None, None, 1), [tool.Case(4, 128, seed) for seed in (0, 1)], 65_536)
    assert row["ratio"] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})
    assert row["compress"]["value"] == pytest.approx(0.5 * hard.sum() / tokens.sum())
    assert row["seeds"] == [0, 1]
    earlier = [{"bits": 4, "group": 128, "old": True}, {"bits": 2, "group": 64}]
    assert tool.together(earlier, [row]) == [row, {"bits": 2, "group": 64}]


def test_a_record_keeps_the_rows_that_were_not_made_again_and_refuses_other_weights(load, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def row(method: str, kl: float) -> dict[str, object]:
        return {"model": "m", "bits": 4, "group": 128, "method": method, "tool": "compress", "kl": kl}

    tool, record = load("quality"), tmp_path / "quality.json"
    facts = {"machine": {"date": "then"}, "eval_tokens": 8192, "calibration": {"seeds": [0]}}
    record.write_text(json.dumps({**facts, "models": {"m": "a"}, "rows": [row("rtn", 0.3), row("gptq", 0.2)]}))
    later = {**facts, "machine": {"date": "now"}}
    found = tool.recorded(record, later, {"m": "a"}, [row("gptq", 0.1)])
    assert [(r["method"], r["kl"], r["date"]) for r in found["rows"]] == [("rtn", 0.3, "then"), ("gptq", 0.1, "now")]
    for facts_of_another, models in ((later, {"m": "b"}), ({**later, "eval_tokens": 1}, {"m": "a"})):
        with pytest.raises(SystemExit, match="has other"):
            tool.recorded(record, facts_of_another, models, [row("gptq", 0.1)])
