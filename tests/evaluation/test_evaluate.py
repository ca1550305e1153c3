"""`evaluate` end to end, and all that it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from compress.errors import IntegrityError, UserError, WorkError
from compress.evaluation.evaluate import evaluate
from compress.evaluation.records import EvalRecord
from compress.evaluation.speed import generation_speed
from compress.runtime.transformers_backend import load
from tests.evaluation.fakes import TableRuntime


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def test_damage_shows(record: EvalRecord, tiny: Path, text: Path, rounded: Callable[..., Path]) -> None:
    worse = evaluate(rounded(tiny, 2), tiny, data=text, device="cpu").summary
    slight = evaluate(rounded(tiny, 8), tiny, data=text, device="cpu").summary
    ours = record.summary
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
    assert alone.blocks.nll == record.blocks.nll
    assert alone.data == record.data
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
    assert events == [f"begin scoring {total}", *["advance"] * total, "end"]


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
    assert evaluate(copy, tiny, data=text, device="cpu").summary.kl_mean is not None


def test_another_vocabulary_size_is_not_comparable(tiny: Path, copy: Path, text: Path) -> None:
    import json

    config = json.loads((copy / "config.json").read_text())
    config["vocab_size"] += 5
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:5]])
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match="vocabularies differ"):
        evaluate(copy, tiny, data=text, device="cpu")


def test_generation_speed() -> None:
    speed = generation_speed(TableRuntime(), prompt="abc", max_tokens=11)
    assert (speed.prompt_tokens, speed.new_tokens, speed.first_token_seconds) == (3, 11, 0.5)
    assert speed.decode_tokens_per_second == pytest.approx(10 / 2.0)
    with pytest.raises(UserError, match="at least 2"):
        generation_speed(TableRuntime(), max_tokens=1)


def test_generation_speed_of_a_model(tiny: Path) -> None:
    runtime = load(tiny, device="cpu")
    speed = generation_speed(runtime, prompt="a", max_tokens=8)
    assert speed.new_tokens == 8
    assert speed.decode_tokens_per_second > 0
    with pytest.raises(UserError, match="no room"):
        generation_speed(runtime, prompt="a" * 62, max_tokens=8)
