"""The commands that look at artifacts: show, generate, eval, gate, verify, export, doctor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress import content
from compress.artifact.reader import Artifact

pytestmark = pytest.mark.usefixtures("one_thread")


def test_show_reports_sizes_scores_and_worst_layers(run: Callable, copy: Path) -> None:
    document = run("show", copy, "--json", "--worst", 3).json
    assert document["method"] == "rtn"
    assert document["sizes"]["bits_per_weight"] == 4.125
    assert document["scores"]["perplexity"]["value"] > 1
    assert document["layers"]["count"] == 42
    plain = run("show", copy)
    assert "bits per weight" in plain.out
    assert "4.125" in plain.out
    assert run("show", copy, "--quiet").err == ""


def test_generate_continues_a_prompt_and_says_what_ran(run: Callable, copy: Path) -> None:
    words = ("generate", copy, "--prompt", "Once upon a time", "--max-tokens", 8)
    document = run(*words, "--json").json
    assert document["new_tokens"] == 8
    assert document["kernel"]
    assert run(*words, "--quiet").out == document["text"] + "\n"
    sampled = [run(*words, "--temperature", 1.0, "--seed", seed, "--json").json["text"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_eval_writes_the_record_that_gate_reads(run: Callable, copy: Path, tmp_path: Path) -> None:
    record = run(
        "eval", copy, "--baseline", compress.default_model(), "--max-tokens", 2600, "--output", "e.json", "--json"
    )
    assert record.json == json.loads((tmp_path / "e.json").read_text())
    assert record.json["summary"]["kl_mean"]["estimate"] > 0
    judged = run("gate", "e.json", "--json")
    assert judged.json["candidate"]["digest"] == record.json["model"]["digest"]
    assert judged.code == {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}[judged.json["verdict"]]
    alone = run("eval", "--max-tokens", 2600, "--json")
    assert (alone.json["baseline"], alone.json["model"]["quantized"]) == (None, False)


@pytest.mark.parametrize("output", ["nowhere/dir/x.json", "directory", "file/x.json"])
def test_eval_refuses_an_output_before_it_scores(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("")

    def scored(*_: object, **__: object) -> None:
        raise AssertionError("it was scored")

    monkeypatch.setattr("compress.workflows.api.evaluate", scored)
    assert f"--output {output}" in run("eval", "--output", output).refused(2)


def test_a_damaged_config_of_an_artifact_is_no_usage_error(run: Callable, copy: Path) -> None:
    data = bytearray((copy / "config.json").read_bytes())
    data[0] ^= 1
    (copy / "config.json").write_bytes(data)
    for words in (("quantize", copy, "--method", "rtn"), ("eval", copy), ("generate", copy, "--prompt", "a")):
        assert "config.json" in run(*words).refused(5)
    (copy / "config.json").unlink()
    assert "config.json" in run("eval", copy).refused(5)


def test_a_damaged_weight_is_not_scored(run: Callable, copy: Path) -> None:
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert "is damaged" in run("eval", copy, "--attach").refused(5)


def test_eval_attach_renews_scores_and_card(run: Callable, copy: Path) -> None:
    before = Artifact.open(copy)
    tokens = before.eval()["data"]["tokens"]  # type: ignore[index]
    words = ("eval", copy, "--baseline", compress.default_model(), "--max-tokens", 4000, "--attach")
    assert run(*words).code == 0
    after = Artifact.open(copy)
    assert after.artifact_id == before.artifact_id
    assert after.eval()["data"]["tokens"] > tokens  # type: ignore[index]
    assert run("verify", copy).code == 0


POLICY = 'version = 1\n[[gate]]\nid = "kl"\nkind = "kl_mean"\nmax = {limit}\n'


@pytest.mark.parametrize(("factor", "code", "verdict"), [(3.0, 0, "PASS"), (0.3, 1, "FAIL"), (1.0, 3, "INCONCLUSIVE")])
def test_gate_exits_with_its_verdict(
    run: Callable, made: Path, tmp_path: Path, factor: float, code: int, verdict: str
) -> None:
    kl = json.loads((made / "eval.json").read_text())["summary"]["kl_mean"]["estimate"]
    (tmp_path / "policy.toml").write_text(POLICY.format(limit=factor * kl))
    result = run("gate", made, "--policy", "policy.toml")
    assert result.code == code
    assert result.out.splitlines()[-1] == verdict
    assert run("gate", made, "--policy", "policy.toml", "--json").json["verdict"] == verdict


def test_two_bits_fail_the_default_gate(run: Callable, tmp_path: Path) -> None:
    assert run("quantize", "--method", "rtn", "--bits", 2, "--output", "two", "--eval-tokens", 2600).code == 0
    assert run("gate", "two").code == 1


def test_verify_and_gate_find_a_flipped_byte(run: Callable, copy: Path) -> None:
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    result = run("verify", copy, "--json")
    assert (result.code, result.json["ok"]) == (5, False)
    assert "model.safetensors" in result.json["problems"][0]["file"]
    assert result.err.startswith("error: copy is not as it was published: 1 problem")
    run("gate", copy).refused(5)
    run("eval", copy).refused(5)
    run("export", copy, "--to", "dense").refused(5)


def test_an_edited_record_is_refused(run: Callable, made: Path, tmp_path: Path) -> None:
    text = (made / "eval.json").read_text()
    (tmp_path / "edited.json").write_text(text.replace('"tokens":', '"tokens" :').replace("0.0", "0.00001", 1))
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    for name in ("edited.json", "cut.json"):
        run("gate", name).refused(5)


def test_export_writes_a_dense_model_of_the_same_values(run: Callable, made: Path, tmp_path: Path) -> None:
    result = run("export", made, "--to", "dense", "--output", "dense", "--json")
    assert result.code == 0
    tokens = torch.arange(40).reshape(1, 40) + 100
    packed, dense = (compress.load(path).score(tokens) for path in (made, tmp_path / "dense"))
    assert torch.equal(packed, dense)
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert json.loads((tmp_path / "dense/compress_export.json").read_text())["artifact_id"]
    stored = load_file(tmp_path / "dense/model.safetensors")
    source = load_file(compress.default_model() / "model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in stored.items()} == {
        name: (t.dtype, t.shape) for name, t in source.items()
    }
    run("export", made, "--to", "dense", "--output", "dense").refused(2)
    run("export", made, "--to", "gguf").refused(2)


def test_doctor_finds_this_installation_sound_and_a_broken_one_not(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("doctor", "--json")
    assert (result.code, result.json["ok"]) == (0, True)
    names = {check["name"] for check in result.json["checks"]}
    assert {"python", "torch", "kernel parity", "calibration text tales", "packaged model"} <= names
    texts = Path(shutil.copytree(content.calibration_dir(), tmp_path / "texts"))
    (texts / "tales.txt").write_text("changed")
    monkeypatch.setattr("compress.content.calibration_dir", lambda: texts)
    broken = run("doctor", "--json")
    assert (broken.code, broken.json["ok"]) == (5, False)
    assert "tales.txt is missing or changed" in broken.err
