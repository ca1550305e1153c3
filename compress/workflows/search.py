"""Recover, then rank: every candidate of a search is made and taught, and the least KL at equal size goes on.

What loses least right after a cut is not always what training wins most back on. Each candidate's artifacts stay, and
so do its scores: a search that was killed goes on where it was.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress import content
from compress.artifact import durable, store
from compress.artifact.attach import attach
from compress.artifact.canonical import sha256_json
from compress.artifact.output import refuse_occupied
from compress.artifact.scores import Score, headline_scores
from compress.recipe_checks import GateCheck
from compress.recipe_search import Search
from compress.workflows.checks import attached_record, carry_out, refuse_unknown
from compress.workflows.quantize import QuantizeResult, quantize, score
from compress.workflows.stages import make_all, refuse_problems

if TYPE_CHECKING:
    from compress.artifact.reader import Artifact
    from compress.evaluation.suites import Suite
    from compress.evaluation.verdict import Verdict
    from compress.progress import Progress

FOLDER, RESULT = "search", "search.json"


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate: its size, its KL to the source on held-out text, and what its training won back.

    before, after: KL on the windows held out of the training text, of the student before its first step and as it was
    written; None where nothing was trained. competes: whether it is as small as the smallest. verdict: of the search's
    policy, None where it was not asked.
    """

    name: str
    artifact: str
    bytes: int
    parameters: int
    kl: Score
    perplexity_ratio: float | None
    before: float | None
    after: float | None
    competes: bool = True
    verdict: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """The candidates, best first and those that do not compete last. `winner`: None where the gate let none pass."""

    rows: tuple[Row, ...]
    winner: str | None
    verdict: Verdict | None


def find(
    search: Search,
    *,
    model: str | Path | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    restart: bool = False,
    progress: Progress | None = None,
) -> Found:
    """Makes, scores and ranks all candidates, once all of them are planned; what is there already is not made again.

    The candidates lie in `OUTPUT.search/NAME-HASH`, or in a directory of their own under `artifacts/`.

    Raises:
        UserError, WorkError, IntegrityError: as `workflows.quantize.quantize` and `evaluate` do.
    """
    from compress.models.hub import local_directory

    policy = search.stage.policy
    later = [placed.check for placed in search.won(next(iter(search.candidates))).checks]
    refuse_unknown([*later, *([] if policy is None else [GateCheck(policy=policy)])])
    refuse_occupied(output, restart=restart)
    root = local_directory(model or search.model or content.default_model())
    suite = _suite(search)
    for name, recipe in search.candidates.items():
        refuse_problems(recipe, root, device, name)
    made: dict[str, Artifact] = {}
    for name, recipe in search.candidates.items():
        place = candidate_folder(search, name, root, output)
        run = make_all(recipe, root=root, folder=place, device=device, restart=restart, progress=progress)
        made[name] = _scored(run.artifact, root, suite, device, progress)
    smallest = min(artifact.manifest.sizes.bytes for artifact in made.values())
    most = (1.0 + search.stage.tolerance) * smallest
    rows = [_row(name, artifact, artifact.manifest.sizes.bytes <= most) for name, artifact in made.items()]
    rows.sort(key=lambda row: (not row.competes, row.kl.value, row.name))
    if policy is None:
        return Found(tuple(rows), rows[0].name, None)
    verdict: Verdict | None = None
    for at, row in enumerate(rows):
        if not row.competes:
            break
        checked = carry_out([GateCheck(policy=policy)], made[row.name], root, device=device, progress=progress)
        verdict = verdict if verdict is not None and not checked.passed else checked.verdicts[-1]
        rows[at] = replace(row, verdict=checked.verdicts[-1].verdict)
        if checked.passed:
            return Found(tuple(rows), row.name, verdict)
    return Found(tuple(rows), None, verdict)


def run(
    search: Search,
    found: Found,
    *,
    model: str | Path | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    restart: bool = False,
    evaluate: bool = True,
    eval_tokens: int | None = None,
    progress: Progress | None = None,
) -> QuantizeResult:
    """What follows the search, on the winner's artifact; the table of the candidates is attached as `search.json`.

    Raises:
        UserError, WorkError, IntegrityError: as `workflows.quantize.quantize` does.
    """
    from compress.models.hub import local_directory

    assert found.winner is not None
    root = local_directory(model or search.model or content.default_model())
    done = quantize(
        search.won(found.winner),
        model=model,
        output=output,
        device=device,
        restart=restart,
        evaluate=evaluate,
        eval_tokens=eval_tokens,
        progress=progress,
        folder=candidate_folder(search, found.winner, root, output),
    )
    table = {"winner": found.winner, "candidates": [asdict(row) for row in found.rows]}
    data = (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode()
    if done.stopped is not None or done.artifact.attachment(RESULT) == data:
        return done
    return replace(done, artifact=attach(done.artifact.path, {RESULT: data}))


def candidate_folder(search: Search, name: str, root: Path, output: str | Path | None) -> Path:
    """Where the artifacts of one candidate lie; another recipe of the same name has another place."""
    recipe = search.candidates[name]
    if output is not None:
        path = Path(output)
        folder = path.with_name(f"{path.name}.{FOLDER}")
    else:
        every = sha256_json({each: found.hash() for each, found in search.candidates.items()})[:8]
        folder = store.family_directory(root.resolve().name, FOLDER, every)
    durable.make_directory(folder)
    return folder / f"{name}-{recipe.hash()[:8]}"


def _suite(search: Search) -> Suite:
    from compress.evaluation.suites import Suite, SuiteText

    return Suite(name=FOLDER, texts=[SuiteText(name=search.stage.data, max_tokens=search.stage.tokens)])


def _scored(artifact: Artifact, root: Path, suite: Suite, device: str, progress: Progress | None) -> Artifact:
    from compress.evaluation.scope import resolve
    from compress.models.checkpoint import Checkpoint

    record = attached_record(artifact)
    if record is None or record.baseline is None or record.suite != resolve(suite).record:
        return score(artifact, root, suite=suite, device=device, progress=progress)
    if record.baseline.digest == Checkpoint.open(root).digest():
        return artifact
    return score(artifact, root, suite=suite, device=device, progress=progress)


def _row(name: str, artifact: Artifact, competes: bool) -> Row:
    scores, learned = headline_scores(artifact.eval()), artifact.training()
    ratio = scores.get("perplexity_ratio")
    return Row(
        name=name,
        artifact=str(artifact.path),
        bytes=artifact.manifest.sizes.bytes,
        parameters=artifact.manifest.sizes.parameters,
        kl=scores["kl_mean"],
        perplexity_ratio=None if ratio is None else ratio.value,
        before=None if learned is None else learned["held_out"][0]["kl"],
        after=None if learned is None else learned["written_kl"],
        competes=competes,
    )
