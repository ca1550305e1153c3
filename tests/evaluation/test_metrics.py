"""Perplexity, KL, agreement and probability changes against straightforward implementations."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

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


def documents() -> list[str]:
    """The text as 40 documents of very different length."""
    at = sorted(random.Random(0).sample(range(1, len(TEXT)), 39))
    return [TEXT[a:b] for a, b in zip([0, *at], [*at, len(TEXT)], strict=True)]


@pytest.fixture(params=["one document", "forty documents"])
def windows(request: pytest.FixtureRequest) -> Windows:
    return cut([TEXT] if request.param == "one document" else documents(), TableRuntime())


def independent_nll(model_dir: Path, articles: list[str], length: int, keep: int | None) -> tuple[float, int, int]:
    """Sum of nll over windows of `length`, one forward pass each in float64 softmax; tokens; bytes of all articles.

    Written without any of the package: transformers, a loop and cross_entropy.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    parts = []
    for article in articles:
        ids = tokenizer.encode(article, add_special_tokens=False, verbose=False)
        parts += [ids[i : i + length - 1] for i in range(0, len(ids), length - 1)]
    if keep is not None:
        parts = [parts[i * len(parts) // keep] for i in range(keep)]
    total, count = 0.0, 0
    for part in parts:
        sequence = torch.tensor([[tokenizer.bos_token_id, *part]])
        with torch.inference_mode():
            logits = model(sequence).logits[0, :-1].double()
        total += float(functional.cross_entropy(logits, sequence[0, 1:], reduction="sum"))
        count += len(part)
    return total, count, sum(len(article.encode()) for article in articles)


def articles_of(path: Path) -> list[str]:
    """The articles of a WikiText file, line by line: a heading has one equals sign on either side."""
    found: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        words = line.split()
        heading = len(words) > 2 and words[0] == words[-1] == "=" and "=" not in (words[1], words[-2])
        if (heading and line.startswith(" = ") and found and found[-1].strip()) or not found:
            found.append("")
        found[-1] += line
    return found


def test_perplexity_on_wikitext_equals_an_independent_implementation(packaged_model: Path, shared: Path) -> None:
    path = shared / "data" / "wikitext-2-raw" / "wiki.test.raw"
    record = evaluate(packaged_model, data=path, seq_len=128, max_tokens=6000, device="cpu")
    data, text = record.text().data, record.text()
    total, count, _ = independent_nll(packaged_model, articles_of(path), 128, data.windows)
    assert (data.tokens, data.cluster_kind) == (count, "documents")
    assert text.summary.perplexity.estimate == pytest.approx(math.exp(total / count), rel=1e-6)
    assert sum(text.clusters.nll) == pytest.approx(total, rel=1e-6)
    assert record.baseline is None
    assert text.summary.kl_mean is None


@pytest.mark.slow
def test_perplexity_on_all_of_wikitext_2_test(shared: Path) -> None:
    model = shared / "models" / "stories260K"
    path = shared / "data" / "wikitext-2-raw" / "wiki.test.raw"
    text = evaluate(model, data=path, device="cpu").text()
    total, count, size = independent_nll(model, articles_of(path), 512, None)
    assert (text.data.tokens, text.data.text_tokens) == (count, count)
    assert (text.data.clusters, text.data.cluster_kind) == (62, "documents")
    assert text.summary.perplexity.estimate == pytest.approx(math.exp(total / count), rel=1e-6)
    assert sum(text.clusters.text_bytes) == size == path.stat().st_size
    assert text.summary.bits_per_byte.estimate == pytest.approx(total / math.log(2) / size, rel=1e-6)


def test_sums_equal_kl_div_and_friends(windows: Windows) -> None:
    ours, theirs = TableRuntime(seed=1), TableRuntime(seed=2)
    scores = score(ours, theirs, windows).clusters
    assert len(scores.tokens) == windows.clusters
    for cluster, tokens in enumerate(scores.tokens):
        rows = [
            row[:n]
            for row, n, member in zip(windows.tokens, windows.lengths, windows.cluster, strict=True)
            if member == cluster
        ]
        context, target = torch.cat([row[:-1] for row in rows]), torch.cat([row[1:] for row in rows])
        p = ours.table[context].double().log_softmax(-1)
        q = theirs.table[context].double().log_softmax(-1)
        kl = functional.kl_div(p, q, reduction="none", log_target=True).sum(-1)
        dp = (p.exp() - q.exp())[torch.arange(len(target)), target]
        agree, sure = p.argmax(-1) == q.argmax(-1), q.exp().amax(-1) > 0.5

        def at(column: list[Any] | None, cluster: int = cluster) -> Any:
            assert column is not None
            return column[cluster]

        assert tokens == len(target)
        assert at(scores.text_bytes) == tokens
        assert at(scores.kl) == pytest.approx(float(kl.sum()), rel=1e-6)
        assert at(scores.nll) == pytest.approx(float(functional.nll_loss(p, target, reduction="sum")), rel=1e-6)
        assert at(scores.nll_baseline) == pytest.approx(
            float(functional.nll_loss(q, target, reduction="sum")), rel=1e-6
        )
        assert at(scores.dp) == pytest.approx(float(dp.sum()), rel=1e-5, abs=1e-6)
        assert at(scores.dp2) == pytest.approx(float((dp * dp).sum()), rel=1e-5, abs=1e-9)
        assert at(scores.top1_agree) == int(agree.sum())
        assert at(scores.confident) == int(sure.sum())
        assert at(scores.confident_agree) == int((agree & sure).sum())
        assert at(scores.kl_above) == [int((kl > t).sum()) for t in KL_THRESHOLDS]
    assert sum(scores.tokens) == windows.scored


def test_percentiles_are_those_of_the_tokens(windows: Windows) -> None:
    ours, theirs = TableRuntime(seed=1), TableRuntime(seed=2)
    scores = score(ours, theirs, windows)
    rows = [row[:n] for row, n in zip(windows.tokens, windows.lengths, strict=True)]
    context, target = torch.cat([row[:-1] for row in rows]), torch.cat([row[1:] for row in rows])
    p, q = ours.table.double().log_softmax(-1), theirs.table.double().log_softmax(-1)
    kl = (q.exp() * (q - p)).sum(-1)[context].numpy()
    dp = (p.exp() - q.exp())[context, target].numpy()
    found, changes = scores.kl_percentiles, scores.dp_percentiles
    assert found is not None
    assert changes is not None
    values = (found.p50, found.p90, found.p99, found.p999, found.max)
    np.testing.assert_allclose(values, [*np.percentile(kl, [50, 90, 99, 99.9]), kl.max()], rtol=1e-5)
    values = (changes.p001, changes.p01, changes.p50, changes.p99, changes.p999)
    np.testing.assert_allclose(values, np.percentile(dp, [0.1, 1, 50, 99, 99.9]), rtol=1e-4, atol=1e-7)


def test_a_model_against_itself_is_exactly_zero(tiny: Path, text: Path) -> None:
    scored = evaluate(tiny, tiny, data=text, device="cpu").text()
    summary, sums = scored.summary, scored.clusters
    assert sums.kl == sums.dp == sums.dp2 == [0.0] * scored.data.clusters
    assert sums.nll == sums.nll_baseline
    assert sums.top1_agree == sums.tokens
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
    assert parts.clusters == whole.clusters
    assert (parts.kl_percentiles, parts.dp_percentiles) == (whole.kl_percentiles, whole.dp_percentiles)
    few = TableRuntime(seed=1)
    assert score(few, TableRuntime(seed=2), windows, batch_tokens=5 * 32).clusters == whole.clusters
    assert max(few.batches) == 5


def test_a_forward_pass_never_exceeds_its_share_of_memory() -> None:
    runtime = TableRuntime(vocab=3000, context=None)
    score(runtime, None, cut([TEXT], runtime, seq_len=700))
    assert len(runtime.batches) > 1
    assert max(runtime.batches) * 700 * 3000 <= metrics.BATCH_ELEMENTS


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["candidate", "baseline"])
def test_logits_that_are_not_finite_stop_the_work(value: float, side: str, windows: Windows) -> None:
    sound, broken = TableRuntime(), TableRuntime()
    broken.table[int(windows.tokens[-1, 1]), 5] = value
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
    scores = score(runtime, None, cut([TEXT], runtime))
    assert math.exp(sum(scores.clusters.nll) / sum(scores.clusters.tokens)) == pytest.approx(300)
