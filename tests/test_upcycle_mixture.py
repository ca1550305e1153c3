"""The script that makes a trained mixture: what it starts from, and that a toy run learns, routes and loads."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.pipeline.harness import write_text
from tests.tiny_models import tiny_model, tiny_tokens

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("upcycle_mixture")


@pytest.fixture
def parent(tmp_path: Path) -> Any:
    shape = {"attention_bias": False, "mlp_bias": False, "bos_token_id": 1}
    return AutoModelForCausalLM.from_pretrained(tiny_model("llama", tmp_path / "parent", **shape))


def test_copies_are_the_parent_and_each_expert_begins_neurons_of_its_own_anew(script: ModuleType, parent: Any) -> None:
    ids = tiny_tokens(2, 12)
    copies = script.upcycled(parent, 4, 2, 0.0, 0.01).eval()
    torch.testing.assert_close(copies(input_ids=ids).logits, parent.eval()(input_ids=ids).logits)
    torch.manual_seed(0)
    mixture = script.upcycled(parent, 4, 2, 0.25, 0.01)
    dense, sparse = parent.model.layers[0].mlp, mixture.model.layers[0].mlp.experts
    anew = (sparse.down_proj == 0).all(dim=1)
    assert anew.sum(dim=1).tolist() == [round(0.25 * anew.shape[1])] * 4
    assert anew.sum(dim=0).max() <= 2, "they go round before any goes twice"
    gate = sparse.gate_up_proj[:, : anew.shape[1]]
    assert torch.equal((gate == dense.gate_proj.weight).all(dim=2), ~anew)


def test_a_toy_run_writes_a_mixture_that_loads(
    script: ModuleType, parent: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text.txt", words=2000)
    words = ["--parent", str(tmp_path / "parent"), "--text", str(text), "--output", str(tmp_path / "mixture")]
    words += ["--validation", str(text), "--steps", "6", "--rate", "0.01"]
    script.main(words)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["last_loss"] < report["first_loss"]
    assert report["perplexity"] < report["untrained_perplexity"]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture", output_loading_info=True)
    assert not any(info.values())
    assert model.config.model_type == "mixtral"
    assert model.config.tie_word_embeddings == parent.config.tie_word_embeddings
    with pytest.raises(SystemExit, match="exists"):
        script.main(words)
