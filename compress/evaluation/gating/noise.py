"""The noise floor: a model against itself with other batch sizes and another number of threads.

Floating-point sums depend on the order of their terms, and batch shape and threads change that order. What a model
loses against itself so is noise of the environment; a gate that asks for less could fail a model that lost nothing.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UserError
from compress.evaluation import statistics
from compress.evaluation.gating.kinds import (
    AccuracyPaired,
    Gate,
    GenerationIdentical,
    KlMean,
    KlP999,
    PplRatio,
    Top1Agreement,
)
from compress.evaluation.gating.noise_record import NoiseRecord, noise_key, read_noise, write_noise
from compress.evaluation.record_base import IntervalRecord
from compress.evaluation.record_parts import EnvironmentRecord, TextRecord
from compress.evaluation.statistics import Interval

if TYPE_CHECKING:
    import torch

    from compress.progress import Progress
    from compress.runtime.continuations import Batch, Likelihood
    from compress.runtime.protocol import Generation, Runtime, SamplingParams

ROWS = (1, 3)
MARGIN = 2.0
"""The floor is this many times the worst bound seen: another batch size rounds in yet another way."""


class Varied:
    """A runtime that scores `rows` windows at a time, whatever it is given, and does all on `threads` threads."""

    def __init__(self, inner: Runtime, rows: int, threads: int) -> None:
        self._inner, self._rows, self._threads = inner, rows, threads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def score(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The inner runtime's logits, computed in smaller batches."""
        import torch

        with _threads(self._threads):
            return torch.cat([self._inner.score(part) for part in token_ids.split(self._rows)])

    def score_continuations(self, batch: Batch) -> list[Likelihood]:
        """The inner runtime's likelihoods."""
        with _threads(self._threads):
            return self._inner.score_continuations(batch)

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[Generation]:
        """The inner runtime's answers."""
        with _threads(self._threads):
            return self._inner.generate(prompts, params)


class _threads:
    """Another number of torch threads inside the block."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __enter__(self) -> None:
        import torch

        self._before = torch.get_num_threads()
        torch.set_num_threads(self._count)

    def __exit__(self, *_: object) -> None:
        import torch

        torch.set_num_threads(self._before)


def measure_noise(
    runtime: Runtime,
    *,
    data: str | Path | None,
    max_tokens: int | None = None,
    seq_len: int | None = None,
    tasks: Callable[[Runtime], dict[str, list[int]]] | None = None,
    prompts: Sequence[str] = (),
    answer_tokens: int = 32,
    progress: Progress | None = None,
) -> NoiseRecord:
    """Scores a loaded model against itself in other batch sizes and threads, on a text, tasks and prompts.

    data: a packaged text's name or a path; no text if None. tasks: gives, for a runtime, right (1) and wrong (0) per
    item of each task. `values` of the result hold the worst bounds over the variations, twice (`MARGIN`).

    Raises:
        UserError, WorkError: as scoring does.
    """
    import torch

    from compress.evaluation.identity import environment_record, model_record
    from compress.evaluation.text_scores import score_text

    model, environment = model_record(runtime), environment_record(runtime)
    now = torch.get_num_threads()
    other = 1 if now > 1 else 2
    found: dict[str, list[Interval]] = {}
    digests: dict[str, str] = {}
    right = None if tasks is None else tasks(runtime)
    answers = _answers(runtime, prompts, answer_tokens)
    for rows in ROWS:
        varied: Any = Varied(runtime, rows, other)
        if data is not None:
            text = score_text(
                data,
                (varied, model),
                (runtime, model),
                environment,
                max_tokens=max_tokens,
                seq_len=seq_len,
                progress=progress,
            )
            digests[text.data.name] = text.data.windows_sha256
            for name, interval in text_noise(text).items():
                found.setdefault(name, []).append(interval)
        if tasks is not None and right is not None:
            for task, flags in tasks(varied).items():
                found.setdefault(f"flips:{task}", []).append(_flips(right[task], flags))
        if prompts:
            same = [a == b for a, b in zip(answers, _answers(varied, prompts, answer_tokens), strict=True)]
            share = sum(same) / len(same)
            found.setdefault("generation_differs", []).append(Interval(1 - share, 1 - share, 1 - share, 1.0))
    return NoiseRecord(
        model=model.name,
        digest=model.digest,
        environment=environment,
        data=digests,
        variation=f"{' and '.join(map(str, ROWS))} windows per batch on {other} threads against as scored on {now}",
        values={name: _worst(intervals) for name, intervals in found.items()},
        created=datetime.datetime.now(datetime.UTC).date(),
    ).sealed()


def text_noise(text: TextRecord) -> dict[str, Interval]:
    """Losses of a text scored against the same model: KL, p99.9 of KL, rise of perplexity, and disagreement."""
    sums = text.clusters
    assert sums.kl is not None
    assert sums.nll_baseline is not None
    assert sums.top1_agree is not None
    assert text.summary.kl_percentiles is not None
    level = statistics.LEVEL
    kl = statistics.ratio(sums.kl, sums.tokens, level)
    ppl = statistics.perplexity_ratio(sums.nll, sums.nll_baseline, sums.tokens, level)
    agree = statistics.ratio(sums.top1_agree, sums.tokens, level)
    tail = text.summary.kl_percentiles.p999
    return {
        "kl_mean": kl,
        "kl_p999": Interval(tail, tail, tail, level),
        "ppl_ratio": Interval(ppl.estimate - 1, ppl.low - 1, ppl.high - 1, level),
        "top1_differs": Interval(1 - agree.estimate, 1 - agree.high, 1 - agree.low, level),
    }


def floor_of(gate: Gate, noise: NoiseRecord) -> tuple[float, float] | None:
    """(what the gate allows to be lost, what noise alone loses), in one unit; None where noise was not measured."""
    if isinstance(gate, AccuracyPaired):
        return _pair(gate.margin, noise, f"flips:{gate.task}", 100.0)
    if isinstance(gate, GenerationIdentical):
        return _pair(1 - gate.min, noise, "generation_differs")
    if isinstance(gate, Top1Agreement):
        return _pair(1 - gate.min, noise, "top1_differs")
    if isinstance(gate, PplRatio):
        return _pair(gate.max_increase, noise, "ppl_ratio")
    if isinstance(gate, KlMean | KlP999):
        return _pair(gate.max, noise, gate.kind)
    return None


def refuse_below_noise(gates: Sequence[Gate], noise: NoiseRecord) -> None:
    """Raises UserError where a gate allows less than the model loses against itself."""
    for gate in gates:
        found = floor_of(gate, noise)
        if found is not None and found[0] < found[1]:
            raise UserError(
                f"the gate {gate.id} allows {found[0]:.3g}, less than the noise of this environment: {found[1]:.3g} "
                f"({noise.model} against itself, {noise.variation})",
                "widen the gate's limit; `compress gate --noise-floor` measures the noise again",
            )


def noise_path(digest: str, environment: EnvironmentRecord) -> Path:
    """Where the noise floor of a model in an environment is kept: below COMPRESS_CACHE, or the user's cache."""
    root = os.environ.get("COMPRESS_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    directory = Path(root) if root else Path(base) / "compress"
    return directory / "noise" / f"{noise_key(digest, environment)[:32]}.json"


def keep_noise(noise: NoiseRecord, path: Path | None = None) -> Path:
    """Writes a noise floor to `path`, or where `find_noise` looks for it. Raises WorkError where that fails."""
    from compress.artifact import durable

    target = path or noise_path(noise.digest, noise.environment)
    with durable.guarded("create", target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_noise(noise, target)
    return target


def find_noise(digest: str, environment: EnvironmentRecord) -> NoiseRecord | None:
    """The noise floor kept for a model in an environment, None where it was not measured."""
    path = noise_path(digest, environment)
    return read_noise(path) if path.is_file() else None


def _pair(allowed: float, noise: NoiseRecord, name: str, scale: float = 1.0) -> tuple[float, float] | None:
    value = noise.largest().get(name)
    return None if value is None else (allowed, scale * value)


def _flips(first: Sequence[int], second: Sequence[int]) -> Interval:
    share = sum(a != b for a, b in zip(first, second, strict=True)) / len(first)
    return Interval(share, share, share, 1.0)


def _answers(runtime: Any, prompts: Sequence[str], tokens: int) -> list[tuple[int, ...]]:
    from compress.runtime.protocol import SamplingParams

    if not prompts:
        return []
    return [answer.token_ids for answer in runtime.generate(list(prompts), SamplingParams(max_tokens=tokens))]


def _worst(intervals: Sequence[Interval]) -> IntervalRecord:
    """The interval with the largest bound, widened by the margin."""
    worst = max(intervals, key=lambda each: max(abs(each.low), abs(each.high)))
    return IntervalRecord(estimate=worst.estimate, low=MARGIN * worst.low, high=MARGIN * worst.high, level=worst.level)
