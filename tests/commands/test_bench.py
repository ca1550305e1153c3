"""`compress bench`: what it says and what it refuses. How fast anything was is not looked at."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

import compress
from compress.evaluation.costs.prices import default_prices
from compress.evaluation.costs.record import CostRecord

pytestmark = pytest.mark.usefixtures("one_thread", "_brief")
SHORT = ("--prompt-tokens", 8, "--new-tokens", 3, "--batch-sizes", "1,2", "--no-fresh")


@pytest.fixture
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """One load and no warm-up: the commands are under test, not the numbers."""
    monkeypatch.setattr("compress.evaluation.costs.fresh.LOADS", 1)
    monkeypatch.setattr("compress.evaluation.costs.bandwidth.BYTES", 2**20)
    monkeypatch.setattr("compress.evaluation.costs.measure.WARM_UP", 0)


def test_bench_of_an_artifact_names_kernel_and_bytes_of_every_layer(run: Callable, copy: Path) -> None:
    document = run("bench", copy, *SHORT, "--json").json
    assert (document["kind"], document["schema_version"]) == ("compress.bench", 1)
    cost = CostRecord.model_validate_json(json.dumps(document["cost"]))
    assert cost.size.file_bytes == (copy / "model.safetensors").stat().st_size
    assert len(cost.layers) == 43
    assert all(layer.kernel.startswith("cpu-") and layer.stored_bytes for layer in cost.layers)
    assert sum(layer.kernel.endswith("int4 x int8") for layer in cost.layers) == 42
    assert not cost.dense_fallback
    dense = CostRecord.model_validate(run("bench", copy, *SHORT, "--kernel", "reference", "--json").json["cost"])
    assert sum(layer.dense_fallback for layer in dense.layers) == 42
    assert dense.read_bytes_per_token > 4 * cost.read_bytes_per_token
    assert (document["baseline"], document["cost_baseline"]) == (None, None)
    assert cost.workload.prompt_tokens == 8
    assert [(each.what, each.batch) for each in cost.throughput] == [
        (what, batch) for what in ("batched forward", "batched decode") for batch in (1, 2)
    ]
    assert cost.prices is not None
    assert cost.prices.table == default_prices().name


def test_bench_marks_a_dense_fallback_for_people(run: Callable, copy: Path) -> None:
    result = run("bench", copy, *SHORT, "--kernel", "reference", "--baseline", compress.default_model())
    assert result.code == 1
    assert "DENSE FALLBACK" in result.out
    assert "warning: copy: dense fallback: 42 packed layers" in result.err
    assert "warning: tales-6m: dense fallback" not in result.err
    assert "model.layers.*.mlp.down_proj" in result.err
    assert "times as fast" in result.out
    lines = {line.split("  ")[0]: line for line in result.out.splitlines()}
    assert lines["decode, batch 1"].count("tokens/s") == 2
    assert "hours * price_per_hour" in result.err


def test_bench_of_a_pair_holds_the_ratios(run: Callable) -> None:
    document = run("bench", *SHORT, "--baseline", compress.default_model(), "--json").json
    cost, other = (CostRecord.model_validate_json(json.dumps(document[k])) for k in ("cost", "cost_baseline"))
    assert {(x.what, x.batch) for x in cost.speed_ratios} == {
        ("prefill", 1),
        ("decode", 1),
        ("batched forward", 1),
        ("batched forward", 2),
        ("batched decode", 1),
        ("batched decode", 2),
    }
    assert all(len(x.ratios) == 10 for x in cost.speed_ratios)
    assert other.speed_ratios == []
    assert not cost.dense_fallback
    assert document["model"]["digest"] == document["baseline"]["digest"]


def test_bench_against_transformers_with_a_small_cache_and_a_picture(run: Callable, copy: Path, tmp_path: Path) -> None:
    words = ("--baseline", compress.default_model(), "--baseline-engine", "transformers", "--kv-cache", "int8")
    document = run("bench", copy, *SHORT, *words, "--plot", "speed.svg", "--json").json
    cost, other = document["cost"], document["cost_baseline"]
    assert (cost["workload"]["runtime"], other["workload"]["runtime"]) == ("native", "transformers")
    assert (cost["workload"]["kv_cache"], other["workload"]["kv_cache"]) == ("int8", None)
    assert (cost["workload"]["deterministic"], other["workload"]["deterministic"]) == (True, False)
    assert (other["kernel"], other["workload"]["dtype"], cost["dense_fallback"]) == ("dense", "bfloat16", False)
    read = cost["read_bytes_per_token"] + cost["cache_read_bytes_per_token"]
    rate = cost["decode_tokens_per_second"]["median"]
    assert cost["bandwidth_share"] == pytest.approx(rate * read / cost["read_bandwidth"])
    assert "batched decode" in {row["what"] for row in cost["throughput"]}
    ElementTree.parse(tmp_path / "speed.svg")


def test_bench_says_what_a_token_reads(run: Callable, tmp_path: Path) -> None:
    result = run("bench", *SHORT, "--plot", "speed.png")
    lines = {line[: len("keys and values read per token")].strip(): line for line in result.out.splitlines()}
    kept = lines["keys and values read per token"].split()[-2:]
    assert kept == ["58.37", "kB"], "9.5 tokens of 6 layers and 2 heads of 64"
    assert "% of" in lines["share of read bandwidth"]
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_bench_measures_loading_in_a_fresh_process(run: Callable) -> None:
    cost = run("bench", *SHORT[:-1], "--json").json["cost"]
    assert cost["load_seconds"]["repeats"] == 1
    if sys.platform == "linux":
        assert cost["memory_kind"] == "host anonymous"
        assert cost["peak_memory_bytes"] > 2 * cost["size"]["weights"]  # bfloat16 stays so


def test_bench_reads_your_prices(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'version = 1\ncurrency = "CHF"\n[[machine]]\nname = "desk"\ndevice = "cpu"\nprice_per_hour = 3600\n'
        'watts = 1000\nsource = "a test"\n'
    )
    result = run("bench", *SHORT, "--prices", "mine.toml", "--machine", "desk", "--json").json["cost"]
    rate = result["decode_tokens_per_second"]["median"]
    row = next(x for x in result["prices"]["tokens"] if x["what"] == "decode")
    assert row["money_per_million"] == pytest.approx(1e6 / rate)
    assert row["kwh_per_million"] == pytest.approx(1e6 / rate / 3600)
    assert (row["energy_money_per_million"], result["prices"]["currency"]) == (None, "CHF")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch-sizes", "1,x"), "batch-sizes"),
        (("--batch-sizes", "0"), "batch sizes"),
        (("--repeats", 5), "repeats is 5"),
        (("--prompt-tokens", 600), "context of 512"),
        (("--prices", "none.toml"), "price table none.toml"),
        (("--machine", "nobody's"), "no machine called"),
        (("--kernel", "warp"), "kernel 'warp'"),
        (("--kv-cache", "int5"), "key-value cache 'int5'"),
        (("--baseline-engine", "transformers"), "without a baseline"),
        (("--baseline-engine", "vllm"), "baseline engine 'vllm'"),
        (("--plot", "speed.pdf"), "SVG or PNG"),
        (("--plot", "no/speed.svg"), "no directory"),
        (("--device", "tpu"), "device 'tpu'"),
        (("nowhere",), "nowhere"),
        (("--max-seconds", "nan"), "max_seconds is nan"),
        (("--max-seconds", "-1"), "max_seconds is -1"),
        (("--batch-sizes", "1,65"), "no 65 rows at once"),
        (("--new-tokens", "999999999999"), "exceed the model's context"),
        (("--threads", "100000"), "--threads"),
    ],
)
def test_bench_refuses(run: Callable, words: tuple[object, ...], said: str) -> None:
    assert said in run("bench", *words).refused(2)


def test_bench_refuses_a_damaged_artifact(run: Callable, copy: Path) -> None:
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    run("bench", copy, *SHORT).refused(5)
