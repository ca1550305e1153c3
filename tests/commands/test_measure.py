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
import compress.cli
from compress import content
from compress.artifact.reader import Artifact
from compress.evaluation.samples import read_samples

pytestmark = pytest.mark.usefixtures("one_thread")


def test_show_reports_sizes_scores_and_worst_layers(run: Callable, copy: Path) -> None:
    document = run("show", copy, "--json", "--worst", 3).json
    assert document["method"] == "rtn"
    assert document["sizes"]["bits_per_weight"] == 4.125
    assert document["scores"]["perplexity"]["value"] > 1
    assert [task["name"] for task in document["tasks"]] == ["tales_cloze"]
    assert set(document["further_scores"]["generation"]) == {
        "identical",
        "first_difference_mean",
        "degenerate",
        "empty",
    }
    assert document["layers"]["count"] == 42
    plain = run("show", copy)
    assert "bits per weight" in plain.out
    assert "4.125" in plain.out
    assert "kl mean" in plain.out
    assert "tales_cloze" in plain.err
    assert run("show", copy, "--quiet").err == ""


def test_generate_continues_a_prompt_and_says_what_ran(run: Callable, copy: Path) -> None:
    words = ("generate", copy, "--prompt", "Once upon a time", "--max-tokens", 8)
    document = run(*words, "--json").json
    assert document["new_tokens"] == 8
    assert (document["runtime"], document["kernel"].partition("-")[0]) == ("native", "cpu")
    reference = run(*words, "--kernel", "reference", "--json").json
    assert (reference["runtime"], reference["text"]) == ("transformers", document["text"])
    assert run(*words, "--kernel", "cpu-int8", "--json").json["kernel"].endswith("-int8")
    assert run(*words, "--quiet").out == document["text"] + "\n"
    sampled = [run(*words, "--temperature", 1.0, "--seed", seed, "--json").json["text"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    drawn = run(*words, "--temperature", 1.0, "--n", 2, "--logprobs", 3, "--presence-penalty", 0.5, "--json").json
    first, second = drawn["answers"]
    assert first["text"] == drawn["text"] != second["text"]
    assert [len(token["top"]) for token in second["logprobs"]] == [3] * len(second["token_ids"])
    longer = (*words[:-1], 40)
    assert run(*longer, "--frequency-penalty", 2.0, "--quiet").out != run(*longer, "--quiet").out
    assert "a whole number from 1 to 4096" in run(*words, "--n", 0).refused(2)


def test_eval_writes_the_record_that_gate_reads(run: Callable, copy: Path, tmp_path: Path) -> None:
    record = run(
        "eval", copy, "--baseline", compress.default_model(), "--max-tokens", 2600, "--output", "e.json", "--json"
    )
    assert record.json == json.loads((tmp_path / "e.json").read_text())
    assert record.json["texts"][0]["summary"]["kl_mean"]["estimate"] > 0
    judged = run("gate", "e.json", "--json")
    assert judged.json["candidate"]["digest"] == record.json["model"]["digest"]
    assert judged.code == {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}[judged.json["verdict"]]
    alone = run("eval", "--max-tokens", 2600, "--json")
    assert (alone.json["baseline"], alone.json["model"]["quantized"]) == (None, False)


def test_kernels_of_eval_and_gate(run: Callable, copy: Path, tmp_path: Path) -> None:
    words = ("eval", copy, "--baseline", compress.default_model(), "--max-tokens", 2600, "--json")
    environments = [run(*words, *more).json["environment"] for more in ((), ("--kernel", "reference"))]
    assert [machine["runtime"] for machine in environments] == ["native", "transformers"]
    (tmp_path / "gates.toml").write_text(
        'version = 1\nmax_tokens = 2600\n[[gate]]\nid = "kl"\nkind = "kl_mean"\nmax = 100.0\n'
    )
    gated = ("gate", copy, "--baseline", compress.default_model(), "--policy", "gates.toml", "--json", "--kernel")
    assert run(*gated, "cpu-int8").json["environment"]["kernel"].endswith("-int8")
    assert "kernel 'fast' is not available" in run(*gated, "fast").refused(2)
    assert "does not compute in bfloat16" in run(*words, "--kernel", "cpu", "--dtype", "bfloat16").refused(2)


def test_scored_artifacts_say_how_exact_the_kernels_are(made: Path) -> None:
    (row,) = json.loads((made / "kernels.json").read_text())["products"]
    assert row["error"] < 1e-5
    said = f"`{row['linear']}` | {row['error']:.1e} | {row['eight_bit_error']:.1e} |"
    assert said in (made / "README.md").read_text()


def test_list_shows_kl_agreement_and_perplexity_ratio(run: Callable, made: Path) -> None:
    result = run("list", made.parent)
    header, row = result.out.splitlines()
    assert header.split()[-4:] == ["KL", "TOP-1", "PPL", "RATIO"]
    summary = json.loads((made / "eval.json").read_text())["texts"][0]["summary"]
    kl, agreement, ratio = (summary[name]["estimate"] for name in ("kl_mean", "top1_agreement", "perplexity_ratio"))
    assert row.split()[-3:] == [f"{kl:.4g}", f"{agreement:.1%}", f"{ratio:.4g}"]


def test_scores_against_itself_are_shown_as_such(run: Callable, copy: Path) -> None:
    assert run("eval", copy, "--baseline", copy, "--max-tokens", 2600, "--attach").code == 0
    assert run("list", copy.parent).out.splitlines()[1].endswith("against copy")
    assert run("list", copy.parent, "--json").json["artifacts"][0]["against"] == "copy"
    assert "copy, not the parent tales-6m" in run("show", copy).out
    assert run("show", copy, "--json").json["scored_against"] == "copy"
    assert "scored against copy, which it was not made from" in run("gate", copy).refused(5)


def test_eval_scores_a_suite_and_tasks_item_by_item(run: Callable, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(
        '{"prompt": "The sky is", "choices": [" blue", " made of cheese"], "reference": 0}\n' * 1
        + '{"prompt": "Once upon a", "choices": [" time", " xylophone"], "reference": " time"}\n'
    )
    (tmp_path / "suite.toml").write_text(
        '[[text]]\nname = "tales_heldout"\nmax_tokens = 2600\n[[task]]\nname = "blimp"\nitems = 4\n'
    )
    words = (
        "eval",
        copy,
        "--baseline",
        compress.default_model(),
        "--suite",
        "suite.toml",
        "--tasks",
        "own.jsonl,blimp:3",
    )
    result = run(*words, "--output", "v1.eval.json", "--json")
    record = result.json
    assert [(task["name"], len(task["item_ids"])) for task in record["tasks"]] == [("blimp", 3), ("own", 2)]
    assert record["suite"]["name"] == "suite"
    assert all(task["correct_baseline"] is not None for task in record["tasks"])
    assert "is shown, not gated" in result.err
    answers = read_samples(tmp_path / "v1.samples.jsonl.gz")
    assert {name: len(items) for name, items in answers.items()} == {"blimp": 3, "own": 2}
    plain = run(*words)
    assert "blimp, acc of 3 (shown, not gated)" in plain.out
    assert "bits per byte" in plain.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--suite", "smok"), "there is no suite 'smok', did you mean `smoke`?"),
        (("--tasks", "nosuch"), "there is no task 'nosuch'"),
        (("--tasks", "blimp,,wsc"), "a task's name is empty"),
        (("--tasks", "blimp", "--max-tokens", "5000"), "no text"),
        (("--data", "nosuch"), "neither a known name nor a readable file"),
        (("--suite", "smoke", "--data", "nosuch"), "neither a known name nor a readable file"),
    ],
)
def test_eval_refuses_what_cannot_be_scored(words: tuple[str, ...], said: str, run: Callable) -> None:
    assert said in run("eval", *words).refused(2)


def test_a_killed_eval_goes_on_where_it_was(run: Callable, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.artifact import durable
    from compress.evaluation import metrics, resume

    class Killed(BaseException):
        pass

    def step(label: str) -> None:
        if label == "after rename to 000000.npz":
            raise Killed

    words = ["eval", str(copy), "--data", "tales_heldout", "--max-tokens", "2600", "--tasks", "blimp:3", "--json"]
    with monkeypatch.context() as patched:
        patched.setattr(durable, "step", step)
        with pytest.raises(Killed):
            compress.cli.main(words)
    kept = list((resume.cache_home() / "eval").rglob("000000.npz"))
    assert len(kept) == 1

    def computed(*_: object) -> None:
        raise AssertionError("it was computed again")

    fresh = run(*words, "--seq-len", 512).json["texts"]  # told apart by its options, so it finds nothing
    monkeypatch.setattr(metrics, "_batch", computed)
    resumed = run(*words)
    assert resumed.code == 0, resumed.err
    assert resumed.json["texts"][0]["clusters"] == fresh[0]["clusters"]
    assert not kept[0].parents[2].exists(), "what was kept is removed once the record is made"


def test_a_named_cache_is_kept(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("eval", "--max-tokens", 2600, "--cache-dir", tmp_path / "kept" / "here", "--json")
    first = run(*words).json
    monkeypatch.setattr("compress.evaluation.metrics._batch", None)
    assert run(*words).json == first


@pytest.mark.parametrize("output", ["nowhere/dir/x.json", "directory", "file/x.json"])
def test_eval_refuses_an_output_before_it_scores(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("")

    def scored(*_: object, **__: object) -> None:
        raise AssertionError("it was scored")

    monkeypatch.setattr("compress.evaluation.evaluate.evaluate_with_samples", scored)
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
    assert "is damaged" in run("generate", copy, "--prompt", "a").refused(5)


def test_eval_attach_renews_scores_and_card(run: Callable, copy: Path) -> None:
    before = Artifact.open(copy)
    tokens = before.eval()["texts"][0]["data"]["tokens"]  # type: ignore[index]
    words = ("eval", copy, "--baseline", compress.default_model(), "--max-tokens", 4000, "--attach")
    assert run(*words).code == 0
    after = Artifact.open(copy)
    assert after.artifact_id == before.artifact_id
    assert after.eval()["texts"][0]["data"]["tokens"] > tokens  # type: ignore[index]
    assert "samples.jsonl.gz" in before.manifest.attachments
    assert "samples.jsonl.gz" not in after.manifest.attachments, "those of the earlier scores are dropped"
    assert not (copy / "samples.jsonl.gz").exists()
    assert run("verify", copy).code == 0


POLICY = 'version = 1\n[[gate]]\nid = "kl"\nkind = "kl_mean"\nmax = {limit}\n'


@pytest.mark.parametrize(("factor", "code", "verdict"), [(3.0, 0, "PASS"), (0.1, 1, "FAIL"), (1.0, 3, "INCONCLUSIVE")])
def test_gate_exits_with_its_verdict(
    run: Callable, made: Path, tmp_path: Path, factor: float, code: int, verdict: str
) -> None:
    kl = json.loads((made / "eval.json").read_text())["texts"][0]["summary"]["kl_mean"]["estimate"]
    (tmp_path / "policy.toml").write_text(POLICY.format(limit=factor * kl))
    result = run("gate", made, "--policy", "policy.toml")
    assert result.code == code
    assert result.out.splitlines()[-1] == verdict
    assert run("gate", made, "--policy", "policy.toml", "--json").json["verdict"] == verdict


def test_two_bits_fail_the_default_gate(run: Callable, tmp_path: Path) -> None:
    assert run("quantize", "--method", "rtn", "--bits", 2, "--output", "two").code == 0
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


def test_export_packs_the_same_codes_for_another_engine(run: Callable, made: Path, tmp_path: Path) -> None:
    result = run("export", made, "--to", "gptq", "--output", "gptq", "--json")
    assert (result.code, result.json["format"]) == (0, "gptq")
    assert run("verify", tmp_path / "gptq").code == 0
    assert run("show", tmp_path / "gptq", "--json").json["artifact_id"] == result.json["artifact_id"]
    assert "not for W4A16" in run("export", made, "--to", "modelopt").refused(2)
    assert "unknown export format" in run("export", made, "--to", "gguf").refused(2)
    run("export", made, "--to", "gguf").refused(2)


def test_doctor_finds_this_installation_sound_and_a_broken_one_not(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("doctor", "--json")
    assert (result.code, result.json["ok"]) == (0, True)
    names = {check["name"] for check in result.json["checks"]}
    assert {
        "python",
        "torch",
        "product parity",
        "deterministic",
        "scheme NVFP4 on cpu",
        "its back end",
        "calibration text tales",
        "packaged model",
    } <= names
    texts = Path(shutil.copytree(content.calibration_dir(), tmp_path / "texts"))
    (texts / "tales.txt").write_text("changed")
    monkeypatch.setattr("compress.content.calibration_dir", lambda: texts)
    broken = run("doctor", "--json")
    assert (broken.code, broken.json["ok"]) == (5, False)
    assert "tales.txt is missing or changed" in broken.err
