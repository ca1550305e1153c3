"""One text scored: cut, run through the model and its baseline in lock-step, summed into a `TextRecord`."""

from __future__ import annotations

from pathlib import Path

from compress.artifact.reader import Artifact, is_artifact
from compress.artifact.scores import MUCH_OVERLAP
from compress.artifact.token_sketch import SKETCH_NAME, TokenSketch
from compress.evaluation.kept_scores import KeptScores
from compress.evaluation.metrics import score
from compress.evaluation.record_parts import DataRecord, EnvironmentRecord, ModelRecord, TextRecord
from compress.evaluation.same_tokenizer import different_tokenizers
from compress.evaluation.summary import summarise
from compress.evaluation.text import Text, read_text
from compress.evaluation.windows import Windows, cut
from compress.progress import Progress
from compress.runtime.protocol import Runtime

Loaded = tuple[Runtime, ModelRecord]


def score_text(
    source: str | Path,
    candidate: Loaded,
    baseline: Loaded | None,
    environment: EnvironmentRecord,
    *,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    batch_tokens: int | None = None,
    keep: Path | None = None,
    progress: Progress | None = None,
) -> TextRecord:
    """Scores a packaged text or a file; candidate and baseline are runtimes with the records of what they loaded.

    keep: a directory for the scores of finished batches; what a killed run left there is used.

    Raises:
        UserError: no such text, text too short, window beyond the context.
        IntegrityError: the baseline has another tokenizer or vocabulary.
        WorkError: logits that are not finite, out of memory, `keep` cannot be written.
    """
    text = read_text(source)
    runtime, model = candidate
    windows = cut(text.documents, runtime, seq_len=seq_len, max_tokens=max_tokens)
    if baseline is not None:
        _check_tokenizers(runtime, baseline[0], text, windows, max_tokens)
    overlap = _calibration_overlap(runtime.path, windows)
    if progress is not None and overlap is not None and overlap > MUCH_OVERLAP:
        progress.warn(
            f"{overlap:.1%} of {text.name} is in the text that {model.name} was calibrated on: its scores flatter it; "
            "score it on other text (--data)"
        )
    kept = None
    if keep is not None:
        other = None if baseline is None else baseline[1].digest
        machine = environment.model_dump(mode="json")
        key = {"model": model.digest, "baseline": other, "windows": windows.sha256(), "batch": batch_tokens, **machine}
        kept = KeptScores(keep, key)
    scores = score(
        runtime,
        None if baseline is None else baseline[0],
        windows,
        progress,
        batch_tokens=batch_tokens,
        kept=kept,
        what=f"scoring {text.name}",
    )
    return TextRecord(
        data=DataRecord(
            name=text.name,
            sha256=text.sha256,
            text_tokens=windows.text_tokens,
            tokens=windows.scored,
            seq_len=windows.seq_len,
            windows=len(windows.tokens),
            clusters=windows.clusters,
            cluster_kind=windows.cluster_kind,
            prefix_id=runtime.prefix_id,
            windows_sha256=windows.sha256(),
        ),
        context=runtime.context_length,
        summary=summarise(scores.clusters, scores.kl_percentiles, scores.dp_percentiles),
        clusters=scores.clusters,
        seconds=round(scores.seconds, 3),
        calibration_overlap=overlap,
    )


def _calibration_overlap(path: Path, windows: Windows) -> float | None:
    """Which share of the windows an artifact was calibrated on; None of any other model, or of one without record."""
    sketch = Artifact.open(path).attachment(SKETCH_NAME) if is_artifact(path) else None
    if sketch is None:
        return None
    return TokenSketch.parse(sketch).share_of(windows.tokens.numpy(), windows.lengths.numpy())


def _check_tokenizers(
    candidate: Runtime, reference: Runtime, text: Text, windows: Windows, max_tokens: int | None
) -> None:
    """Both must read the text into the same ids; equal vocabularies alone do not ensure that."""
    same = candidate.tokenizer_digest() == reference.tokenizer_digest()
    if same:
        theirs = cut(text.documents, reference, seq_len=windows.seq_len, max_tokens=max_tokens)
        same = theirs.sha256() == windows.sha256()
    if not same:
        raise different_tokenizers(candidate.path, reference.path)
