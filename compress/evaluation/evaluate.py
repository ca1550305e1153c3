"""`evaluate`: score a model, against a baseline or alone, and give the record that `eval.json` holds."""

from __future__ import annotations

from pathlib import Path

from compress.errors import IntegrityError
from compress.evaluation.identity import artifact_id, check_artifact, environment_record, model_record
from compress.evaluation.metrics import score
from compress.evaluation.records import DataRecord, EvalRecord, SpeedRecord, summarise
from compress.evaluation.text import DEFAULT, Text, read_text
from compress.evaluation.windows import Windows, cut
from compress.progress import Progress
from compress.runtime.protocol import Runtime
from compress.runtime.transformers_backend import load


def evaluate(
    model: str | Path,
    baseline: str | Path | None = None,
    *,
    data: str | Path = DEFAULT,
    max_tokens: int | None = None,
    seq_len: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> EvalRecord:
    """Scores a model directory or artifact on a text; with a `baseline` also KL, agreement and the perplexity ratio.

    data: the name of a packaged text or the path of a UTF-8 file. seq_len: tokens per window, begin token included
    (default 512, or the context where that is shorter). max_tokens: at most so many tokens, spread evenly over the text
    (default: all). dtype: compute dtype of both models; `auto` is float32 on the CPU.

    Raises:
        UserError: no such model or text, text too short, window beyond the context.
        IntegrityError: damaged files, an artifact that was changed, a baseline with another tokenizer or vocabulary.
        WorkError: logits that are not finite, out of memory.
    """
    text = read_text(data)
    check_artifact(model, scores=False)
    candidate = load(model, device=device, dtype=dtype)
    windows = cut(text.text, candidate, seq_len=seq_len, max_tokens=max_tokens)
    reference = None
    if baseline is not None:
        check_artifact(baseline, scores=False)
        reference = load(baseline, device=device, dtype=dtype)
        _check_tokenizers(candidate, reference, text, windows, seq_len, max_tokens)
    scores = score(candidate, reference, windows, progress)
    return EvalRecord(
        artifact_id=artifact_id(candidate.path),
        model=model_record(candidate),
        baseline=None if reference is None else model_record(reference),
        data=DataRecord(
            name=text.name,
            sha256=text.sha256,
            text_tokens=windows.text_tokens,
            tokens=windows.scored,
            seq_len=windows.seq_len,
            windows=len(windows.tokens),
            blocks=windows.blocks,
            prefix_id=candidate.prefix_id,
            windows_sha256=windows.sha256(),
        ),
        environment=environment_record(candidate),
        summary=summarise(scores.blocks, scores.kl_percentiles),
        speed=SpeedRecord(
            score_seconds=round(scores.seconds, 3),
            score_tokens_per_second=round(windows.tokens.numel() / scores.seconds, 1),
        ),
        blocks=scores.blocks,
    ).sealed()


def _check_tokenizers(
    candidate: Runtime, reference: Runtime, text: Text, windows: Windows, seq_len: int | None, max_tokens: int | None
) -> None:
    """Both must read the text into the same ids; equal vocabularies alone do not ensure that."""
    same = candidate.tokenizer_digest() == reference.tokenizer_digest()
    if same:
        theirs = cut(text.text, reference, seq_len=seq_len or windows.seq_len, max_tokens=max_tokens)
        same = theirs.sha256() == windows.sha256()
    if not same:
        raise IntegrityError(
            f"{candidate.path} and {reference.path} have different tokenizers",
            "scores are comparable only between models that read a text into the same tokens: give the model that "
            "this one was made from",
        )
