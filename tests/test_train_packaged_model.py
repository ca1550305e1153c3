"""The training script: a toy run learns, resumes to the same weights, and writes a model that transformers loads."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("train_packaged_model")


@pytest.fixture
def muon(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("muon")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text of few words in a learnable order, and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    names = ["the fox", "a hen", "the old king", "a frog"]
    lines = [f"{rng.choice(names)} saw {rng.choice(names)} near the well." for _ in range(1500)]
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "other.txt").write_text("\n".join(reversed(lines)), encoding="utf-8")
    letters = {letter: number + 1 for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={"<|end|>": 0, **letters}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|end|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _options(corpus: Path, output: Path, *more: str) -> list[str]:
    files = ["--text", str(corpus / "text.txt"), "--tokenizer", str(corpus), "--output", str(output)]
    return ["--smoke", "--device", "cpu", *files, *more]


def _report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_toy_run_learns_and_loads(
    family: str, script: ModuleType, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(_options(corpus, tmp_path / "model", "--family", family, "--held-out", str(corpus / "other.txt")))
    report = _report(capsys)
    assert report["first_loss"] > 5
    assert report["last_loss"] < 0.6 * report["first_loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.model_type == family
    assert model.config.tie_word_embeddings
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    # The reported held-out loss is that of the saved weights under plain transformers.
    ids = tokenizer((corpus / "other.txt").read_text(), add_special_tokens=False)["input_ids"][: 64 * 512]
    body = torch.tensor(ids).view(-1, 64)
    windows = torch.cat([torch.full((len(body), 1), tokenizer.bos_token_id), body], 1)
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
    loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert loss == pytest.approx(report["held_out_loss"], abs=2e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_resumed_run_ends_with_the_same_weights(
    script: ModuleType,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script.main(_options(corpus, tmp_path / "whole"))
    whole = _report(capsys)

    advance = script.Training.advance

    def dies_at_step_12(training: Any) -> torch.Tensor:
        if training.step == 12:
            raise KeyboardInterrupt
        return advance(training)

    options = _options(corpus, tmp_path / "parts", "--save-every", "0")
    with monkeypatch.context() as patch:
        patch.setattr(script.Training, "advance", dies_at_step_12)
        with pytest.raises(KeyboardInterrupt):
            script.main(options)
    assert not (tmp_path / "parts").exists()
    with pytest.raises(SystemExit, match="other settings"):
        script.main([*options, "--seed", "1"])
    script.main(options)
    parts = _report(capsys)
    assert parts["resumed_at_step"] == 12
    assert parts["sha256"] == whole["sha256"]


def test_each_pass_covers_the_text_in_another_order(script: ModuleType) -> None:
    windows = script.Windows(torch.arange(1000), bos=7, context=50, seed=0)
    assert windows.count == 19
    first, second = windows.batch(0, 19), windows.batch(19, 19)
    for batch in (first, second):
        assert (batch[:, 0] == 7).all()
        starts = batch[:, 1].sort().values
        assert (starts.diff() == 50).all()
        assert (batch[:, 1:].diff(dim=1) == 1).all()
    assert not torch.equal(first, second)
    again = script.Windows(torch.arange(1000), bos=7, context=50, seed=0)
    assert torch.equal(again.batch(15, 8), torch.cat([first[15:], second[:4]]))


def test_muon_orthogonalises(muon: ModuleType) -> None:
    for shape in ((3, 24, 40), (2, 40, 24)):
        update = muon.orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        assert update.shape == shape
        sizes = torch.linalg.svdvals(update)
        assert sizes.min() > 0.5
        assert sizes.max() < 1.3
    with pytest.raises(ValueError, match="matrices"):
        muon.Muon([torch.nn.Parameter(torch.zeros(3))])


def test_muon_steps_equal_shapes_as_it_steps_one(muon: ModuleType) -> None:
    """Batching by shape changes nothing: two equal matrices trained together end where each ends alone."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(8, 6, generator=generator) for _ in range(2)]
    target = torch.randn(8, 6, generator=generator)

    def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        parameters = [torch.nn.Parameter(t.clone()) for t in tensors]
        optimiser = muon.Muon(parameters, lr=0.05, weight_decay=0.01)
        for _ in range(60):
            optimiser.zero_grad()
            torch.stack([(p - target).square().sum() for p in parameters]).sum().backward()
            optimiser.step()
        return [p.detach() for p in parameters]

    for start, end in zip(starts, run(starts), strict=True):
        torch.testing.assert_close(run([start])[0], end, rtol=1e-5, atol=1e-6)
        assert (end - target).norm() < 0.5 * (start - target).norm()
