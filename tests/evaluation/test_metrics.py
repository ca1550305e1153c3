"""Perplexity, KL and agreement against straightforward implementations."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress import content
from compress.errors import IntegrityError, WorkError
from compress.evaluation import metrics
from compress.evaluation.evaluate import evaluate
from compress.evaluation.metrics import score, token_scores
from compress.evaluation.records import KL_THRESHOLDS
from compress.evaluation.windows import Windows, cut
from tests.evaluation.fakes import TableRuntime

TEXT = (Path(content.eval_dir()) / "data" / "tales_heldout.txt").read_text(encoding="utf-8")[:12_000]


@pytest.fixture
def windows() -> Windows:
    return cut(TEXT, TableRuntime())


def test_perplexity_equals_an_independent_implementation(packaged_model: Path) -> None:
    """A loop over the text with cross_entropy, window by window."""
    tokenizer = AutoTokenizer.from_pretrained(packaged_model)
    model = AutoModelForCausalLM.from_pretrained(packaged_model, dtype=torch.float32).eval()
    text = (Path(content.eval_dir()) / "data" / "tales_heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    total, count = 0.0, 0
    whole = [ids[i : i + 127] for i in range(0, len(ids) - 126, 127)]
    chosen = [whole[i * len(whole) // 24] for i in range(24)]
    for part in chosen:
        sequence = torch.tensor([[tokenizer.bos_token_id, *part]])
        with torch.inference_mode():
            logits = model(sequence).logits[0, :-1].double()
        total += float(functional.cross_entropy(logits, sequence[0, 1:], reduction="sum"))
        count += len(part)
    record = evaluate(packaged_model, seq_len=128, max_tokens=24 * 127, device="cpu")
    assert record.data.tokens == count
    assert record.summary.perplexity.estimate == pytest.approx(math.exp(total / count), rel=1e-6)
    assert sum(record.blocks.nll) == pytest.approx(total, rel=1e-6)
    assert record.baseline is None
    assert record.summary.kl_mean is None


def test_sums_equal_kl_div_and_friends(windows: Windows) -> None:
    ours, theirs = TableRuntime(seed=1), TableRuntime(seed=2)
    scores = score(ours, theirs, windows).blocks
    assert scores.kl is not None
    assert scores.nll_baseline is not None
    assert scores.kl_above is not None
    at = 0
    for block, tokens in enumerate(scores.tokens):
        rows = windows.tokens[at : at + windows.per_block]
        at += windows.per_block
        p = ours.table[rows[:, :-1]].double().log_softmax(-1).flatten(0, 1)
        q = theirs.table[rows[:, :-1]].double().log_softmax(-1).flatten(0, 1)
        target = rows[:, 1:].flatten()
        kl = functional.kl_div(p, q, reduction="none", log_target=True).sum(-1)
        assert tokens == len(target)
        assert scores.kl[block] == pytest.approx(float(kl.sum()), rel=1e-6)
        assert scores.nll[block] == pytest.approx(float(functional.nll_loss(p, target, reduction="sum")), rel=1e-6)
        assert scores.nll_baseline[block] == pytest.approx(
            float(functional.nll_loss(q, target, reduction="sum")), rel=1e-6
        )
        agree = p.argmax(-1) == q.argmax(-1)
        sure = q.exp().amax(-1) > 0.5
        assert scores.top1_agree is not None
        assert scores.top1_agree[block] == int(agree.sum())
        assert scores.confident is not None
        assert scores.confident[block] == int(sure.sum())
        assert scores.confident_agree is not None
        assert scores.confident_agree[block] == int((agree & sure).sum())
        assert scores.kl_above[block] == [int((kl > t).sum()) for t in KL_THRESHOLDS]
    assert at >= len(windows.tokens)


def test_percentiles_are_those_of_the_tokens(windows: Windows) -> None:
    ours, theirs = TableRuntime(seed=1), TableRuntime(seed=2)
    found = score(ours, theirs, windows).kl_percentiles
    rows = windows.tokens[:, :-1].flatten()
    p, q = ours.table.double().log_softmax(-1), theirs.table.double().log_softmax(-1)
    kl = (q.exp() * (q - p)).sum(-1)[rows].numpy()
    assert found is not None
    values = (found.p50, found.p90, found.p99, found.p999, found.max)
    np.testing.assert_allclose(values, [*np.percentile(kl, [50, 90, 99, 99.9]), kl.max()], rtol=1e-5)


def test_a_model_against_itself_is_exactly_zero(tiny: Path, text: Path) -> None:
    record = evaluate(tiny, tiny, data=text, device="cpu")
    summary = record.summary
    assert record.blocks.kl == [0.0] * record.data.blocks
    assert record.blocks.nll == record.blocks.nll_baseline
    assert record.blocks.top1_agree == record.blocks.tokens
    assert summary.kl_mean is not None
    assert summary.perplexity_ratio is not None
    assert summary.top1_agreement is not None
    assert (summary.kl_mean.low, summary.kl_mean.estimate, summary.kl_mean.high) == (0.0, 0.0, 0.0)
    assert summary.perplexity_ratio.estimate == summary.top1_agreement.estimate == 1.0


def test_batches_and_chunks_do_not_change_the_sums(windows: Windows, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score(TableRuntime(seed=1), TableRuntime(seed=2), windows)
    monkeypatch.setattr(metrics, "BATCH_ELEMENTS", 3 * 32 * 300)
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 7 * 300)
    ours = TableRuntime(seed=1)
    parts = score(ours, TableRuntime(seed=2), windows)
    assert set(ours.batches[:-1]) == {3}
    assert parts.blocks == whole.blocks
    assert parts.kl_percentiles == whole.kl_percentiles


def test_a_forward_pass_never_exceeds_its_share_of_memory() -> None:
    runtime = TableRuntime(vocab=3000, context=None)
    score(runtime, None, cut(TEXT, runtime, seq_len=700))
    assert len(runtime.batches) > 1
    assert max(runtime.batches) * 700 * 3000 <= metrics.BATCH_ELEMENTS


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["candidate", "baseline"])
def test_logits_that_are_not_finite_stop_the_work(value: float, side: str, windows: Windows) -> None:
    sound, broken = TableRuntime(), TableRuntime()
    broken.table[int(windows.tokens[-1, -3]), 5] = value
    pair = (broken, sound) if side == "candidate" else (sound, broken)
    with pytest.raises(WorkError, match="not finite"):
        score(*pair, windows)


def test_vocabularies_of_different_size_are_not_comparable() -> None:
    rows = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(IntegrityError, match="vocabularies differ"):
        token_scores(rows, torch.zeros(1, 4, 10), torch.zeros(1, 4, 12))


def test_perplexity_of_a_uniform_model_is_the_vocabulary() -> None:
    runtime = TableRuntime()
    runtime.table.zero_()
    scores = score(runtime, None, cut(TEXT, runtime))
    assert math.exp(sum(scores.blocks.nll) / sum(scores.blocks.tokens)) == pytest.approx(300)
