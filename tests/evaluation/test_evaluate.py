"""`evaluate` end to end, and all that it refuses."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from compress.errors import IntegrityError, UserError, WorkError
from compress.evaluation.costs.measure import Settings
from compress.evaluation.evaluate import evaluate, evaluate_with_samples
from compress.evaluation.records import EvalRecord, parse_record
from compress.evaluation.suites import Suite, SuiteGeneration, SuiteTask, SuiteText
from compress.runtime.transformers_backend import load
from tests.evaluation.harness.server import serving


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def test_damage_shows(record: EvalRecord, tiny: Path, text: Path, rounded: Callable[..., Path]) -> None:
    worse = evaluate(rounded(tiny, 2), tiny, data=text, device="cpu").text().summary
    slight = evaluate(rounded(tiny, 8), tiny, data=text, device="cpu").text().summary
    ours = record.text().summary
    assert worse.kl_mean is not None
    assert ours.kl_mean is not None
    assert slight.kl_mean is not None
    assert worse.kl_mean.low > ours.kl_mean.high
    assert ours.kl_mean.low > slight.kl_mean.high > slight.kl_mean.low > 0
    assert slight.top1_agreement is not None
    assert ours.top1_agreement is not None
    assert slight.top1_agreement.low > ours.top1_agreement.high


def test_alone_equals_in_lock_step(record: EvalRecord, damaged: Path, text: Path) -> None:
    alone = evaluate(damaged, data=text, device="cpu")
    ours, theirs = alone.text(), record.text()
    assert (ours.clusters.nll, ours.clusters.text_bytes) == (theirs.clusters.nll, theirs.clusters.text_bytes)
    assert ours.clusters.kl is None
    assert ours.data == theirs.data
    assert alone.model == record.model


def test_progress_counts_every_batch(tiny: Path, text: Path) -> None:
    events: list[str] = []

    class Recorder:
        def begin(self, what: str, total: int) -> None:
            events.append(f"begin {what} {total}")

        def advance(self, note: str = "") -> None:
            events.append("advance")

        def end(self) -> None:
            events.append("end")

        def warn(self, message: str) -> None:
            events.append("warn")

    evaluate(tiny, data=text, device="cpu", progress=Recorder())
    total = events.count("advance")
    assert events == [f"begin scoring short {total}", *["advance"] * total, "end"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"short", "has 5 tokens"), (b"\xff\xfe" * 9000, "not UTF-8")],
)
def test_bad_texts_are_refused(content: bytes, words: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        evaluate(tiny, data=tmp_path / "bad.txt", device="cpu")


@pytest.mark.parametrize("data", ["no_such_text", "", "."])
def test_missing_texts_are_refused(data: str, tiny: Path) -> None:
    with pytest.raises(UserError, match=r"tales_heldout|readable file"):
        evaluate(tiny, data=data, device="cpu")


def test_windows_beyond_the_context_are_refused(tiny: Path, text: Path) -> None:
    with pytest.raises(UserError, match="exceeds the context of 64"):
        evaluate(tiny, data=text, seq_len=65, device="cpu")


def test_missing_models_are_refused(tiny: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        evaluate(tmp_path / "nothing", data=text, device="cpu")
    with pytest.raises(UserError):
        evaluate(tiny, tmp_path / "nothing", data=text, device="cpu")


@pytest.mark.parametrize("place", ["candidate", "baseline"])
def test_nan_weights_stop_the_work(place: str, tiny: Path, copy: Path, text: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    models = (copy, tiny) if place == "candidate" else (tiny, copy)
    with pytest.raises(WorkError, match="not finite"):
        evaluate(*models, data=text, device="cpu")


def swap_letters(path: Path) -> None:
    """Another vocabulary of the same size: two letters trade their ids."""
    file = path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    a, b = tokenizer.token_to_id("e"), tokenizer.token_to_id("t")
    value = file.read_text().replace(f'"e": {a}', f'"e": {b}').replace(f'"t": {b}', f'"t": {a}')
    assert value != file.read_text()
    file.write_text(value)


def lowercase(path: Path) -> None:
    """The same vocabulary, but capitals are lost: other ids for the same text."""
    file = path / "tokenizer.json"
    value = file.read_text().replace('"normalizer": null', '"normalizer": {"type": "Lowercase"}')
    assert value != file.read_text()
    file.write_text(value)


@pytest.mark.parametrize("change", [swap_letters, lowercase])
def test_another_tokenizer_is_not_comparable(
    change: Callable[[Path], None], tiny: Path, copy: Path, text: Path
) -> None:
    change(copy)
    with pytest.raises(IntegrityError, match="different tokenizers"):
        evaluate(copy, tiny, data=text, device="cpu")


def test_a_tokenizer_that_was_saved_again_is_the_same(tiny: Path, copy: Path, text: Path) -> None:
    runtime = load(copy, device="cpu")
    before = (copy / "tokenizer_config.json").read_bytes()
    runtime.tokenizer.model_max_length = 99
    runtime.tokenizer.save_pretrained(copy)
    assert (copy / "tokenizer_config.json").read_bytes() != before
    assert evaluate(copy, tiny, data=text, device="cpu").text().summary.kl_mean is not None


def test_another_vocabulary_size_is_not_comparable(tiny: Path, copy: Path, text: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["vocab_size"] += 5
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:5]])
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match="vocabularies differ"):
        evaluate(copy, tiny, data=text, device="cpu")


OWN = """{"prompt": "Once upon a", "choices": [" time", " brick"], "reference": 0, "id": "one"}
{"prompt": "The king and the", "choices": [" queen", " toaster"], "reference": 0, "id": "two"}
{"prompt": "She opened the", "choices": [" door", " idea"], "reference": 0, "id": "three"}
"""


@pytest.fixture
def suite(text: Path, tmp_path: Path) -> Suite:
    """One of everything but cost."""
    task = tmp_path / "own.jsonl"
    task.write_text(OWN)
    return Suite(
        name="everything",
        texts=[
            SuiteText(name=str(text), max_tokens=5000),
            SuiteText(name="tales_heldout", max_tokens=6000, seq_len=32),
        ],
        tasks=[SuiteTask(name=str(task))],
        generation=SuiteGeneration(prompts=("Once upon a time", "The king"), max_tokens=8),
    )


def test_a_suite_scores_texts_tasks_and_answers(suite: Suite, tiny: Path, damaged: Path) -> None:
    done = evaluate_with_samples(damaged, tiny, suite=suite, device="cpu")
    record = parse_record(done.record.to_bytes(), "eval.json")
    assert record == done.record
    assert record.suite is not None
    assert (record.suite.name, record.suite.sha256) == ("everything", suite.sha256())
    assert [(t.data.name, t.data.seq_len) for t in record.texts] == [("short", 64), ("tales_heldout", 32)]
    assert record.text("tales_heldout").data.tokens <= 6000
    task = record.task("own")
    assert sorted(task.item_ids) == ["one", "three", "two"]
    assert task.correct_baseline is not None
    assert task.answers_sha256 != task.answers_baseline_sha256
    assert record.generation is not None
    assert (record.generation.prompts, record.generation.max_tokens) == (2, 8)
    assert record.generation.identical is not None
    assert done.samples is not None
    lines = [json.loads(line) for line in gzip.decompress(done.samples).decode().splitlines()]
    assert {line["item_id"]: line["correct"] for line in lines} == dict(zip(task.item_ids, task.correct, strict=True))


def test_alone_a_suite_compares_nothing(suite: Suite, tiny: Path) -> None:
    record = evaluate(tiny, suite=suite, device="cpu")
    assert record.baseline is None
    assert [text.clusters.kl for text in record.texts] == [None, None]
    assert record.task("own").correct_baseline is None
    assert record.generation is not None
    assert record.generation.identical is None


def test_a_model_against_itself_loses_nothing(suite: Suite, tiny: Path) -> None:
    record = evaluate(tiny, tiny, suite=suite, device="cpu")
    task = record.task("own")
    assert task.correct == task.correct_baseline
    assert task.answers_sha256 == task.answers_baseline_sha256
    assert record.generation is not None
    assert record.generation.identical == 1.0
    assert all(sum(text.clusters.kl or [1.0]) == 0.0 for text in record.texts)


def test_tasks_alone_need_no_text(suite: Suite, tiny: Path) -> None:
    record = evaluate(tiny, tasks=[suite.tasks[0].name], device="cpu")
    assert (record.suite, record.texts, record.generation) == (None, [], None)
    with pytest.raises(IntegrityError, match="was not scored on any text"):
        record.text()


def test_tasks_are_refused_before_a_model_is_loaded(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="there is no task 'nosuch'"):
        evaluate(tmp_path / "no model", data=text, tasks=["nosuch"])
    monkeypatch.setattr("compress.evaluation.evaluate.can_run_tasks", lambda: False)
    with pytest.raises(UserError, match="lm-eval, which is not installed") as caught:
        evaluate(tmp_path / "no model", data=text, tasks=["blimp"])
    assert "pip install" in caught.value.hint


def test_cost_is_measured_where_it_is_asked_for(tiny: Path, damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.evaluation.costs import measure as cost

    monkeypatch.setattr(
        cost, "Settings", lambda kernel: Settings(new_tokens=3, batch_sizes=(1,), fresh=False, kernel=kernel)
    )
    alone = evaluate(tiny, cost=True, device="cpu")
    assert (alone.texts, alone.cost_baseline) == ([], None)
    assert alone.cost is not None
    pair = evaluate(damaged, tiny, cost=True, device="cpu")
    assert pair.cost is not None
    assert pair.cost_baseline is not None
    assert pair.cost.speed_ratio("decode").estimate > 0
    assert parse_record(pair.to_bytes(), "eval.json") == pair


def test_a_served_model_is_scored_on_tasks_alone(suite: Suite, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Served:
        name, kernel, path, digest = "endpoint", "remote", "http://host/v1#m", "a" * 64

    monkeypatch.setattr("compress.evaluation.harness.endpoint.open_endpoint", lambda _: Served())
    for options in ({"data": text}, {"suite": suite.model_copy(update={"texts": []})}, {"cost": True}):
        with pytest.raises(UserError, match="is behind an address"):
            evaluate("http://host/v1#m", device="cpu", **options)  # type: ignore[arg-type]


def test_a_served_model_is_compared_with_a_local_one(packaged_model: Path, tmp_path: Path) -> None:
    with serving(load(packaged_model, device="cpu")) as server:
        record = evaluate(server.url, packaged_model, tasks=["blimp:10"], device="cpu", cache_dir=tmp_path)
        asked = len(server.asked)
        again = evaluate(server.url, packaged_model, tasks=["blimp:10"], device="cpu", cache_dir=tmp_path)
        assert len(server.asked) - asked < asked / 2, "only the questions that tell who it is are asked again"
    assert again == record == parse_record(record.to_bytes(), "eval.json")
    assert record.model.name == f"{server.url}#tales"
    assert (record.model.weights_bytes, record.model.tokenizer_sha256, record.artifact_id) == (None, None, None)
    assert (record.environment.runtime, record.environment.device) == ("endpoint", "remote")
    task = record.task("blimp")
    assert task.correct == task.correct_baseline
    with pytest.raises(IntegrityError, match=r"size of .* is not known"):
        record.model.size()
