"""An artifact as a report: what it is, how it was made, where the error went, what it scores, what the gate said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.artifact.cut import stages
from compress.artifact.training import curve_rows
from compress.errors import IntegrityError
from compress.evaluation.records import EvalRecord, TextRecord
from compress.evaluation.reports.cost_section import cost_section
from compress.evaluation.reports.document import Document, Picture, Section, Table
from compress.evaluation.reports.layer_sections import layer_sections
from compress.evaluation.reports.size_section import size_section
from compress.evaluation.reports.values import NONE, of_record, size, value
from compress.evaluation.reports.verbatim import Verbatim

if TYPE_CHECKING:
    from compress.artifact.reader import Artifact
    from compress.evaluation.verdict import Verdict


NOT_SCORED = "not scored yet"


def artifact_document(artifact: Artifact, record: EvalRecord | None, verdict: Verdict | None = None) -> Document:
    """The report of one artifact; `record` are its own scores, `verdict` what a gate said of it.

    Raises:
        IntegrityError: the verdict is about another model.
    """
    if verdict is not None and record is not None and verdict.candidate.digest != record.model.digest:
        raise IntegrityError(
            f"the verdict is about {verdict.candidate.name}, not about {artifact.path}",
            "give the verdict of this artifact, or gate it: `compress gate ARTIFACT --output verdict.json`",
        )
    sections = [_identity(artifact), size_section(artifact.manifest), *_cut(artifact)]
    sections += [*_training(artifact.training()), *_drafting(artifact.draft())]
    sections += [
        *_scores(record),
        *cost_section(record),
        *_generated(record),
        *layer_sections(artifact),
        *_fallbacks(artifact),
    ]
    lead = [f"{artifact.method}, {artifact.scheme}, made from {artifact.manifest.parents[0].name}"]
    if verdict is not None:
        from compress.evaluation.reports.verdict_document import verdict_document

        judged = verdict_document(verdict)
        lead += judged.lead
        sections += judged.sections
    elif record is None:
        lead.append(NOT_SCORED)
    name = record.model.name if record is not None else "/".join(artifact.path.resolve().parts[-2:])
    return Document(name, tuple(lead), tuple(sections), None if verdict is None else verdict.verdict)


def _identity(artifact: Artifact) -> Section:
    manifest = artifact.manifest
    sizes, calibration = manifest.sizes, manifest.calibration
    root = manifest.parents[0]
    facts = [
        ("artifact", Verbatim(manifest.artifact_id)),
        ("version", f"{manifest.version}, made {manifest.created} by {manifest.created_with}"),
        ("lineage", " → ".join(f"{p.stage} of {p.name}" for p in manifest.parents)),
        ("recipe", Verbatim(manifest.recipe_hash[:16])),
        ("weight files", f"{size(sizes.bytes)}, {value(sizes.ratio_to_root, 'share')} of {size(root.bytes)}"),
        ("bits per weight", f"{value(sizes.bits_per_weight)}, whole file {value(sizes.file_bits_per_weight)}"),
    ]
    if calibration is not None:
        text = f"{calibration.samples} x {calibration.seq_len} tokens of {calibration.name}, seed {calibration.seed}"
        facts.append(("calibration", text))
    return Section("What it is", facts=tuple(facts))


def _scores(record: EvalRecord | None) -> list[Section]:
    if record is None:
        return []
    rows: list[tuple[str, ...]] = []
    for text in record.texts:
        rows += [(Verbatim(text.data.name), *row) for row in _text_rows(text)]
    for task in record.tasks:
        shown = "" if task.gates else f"not gated: {task.why_not}"
        scored, before = of_record(task.accuracy, "share"), of_record(task.accuracy_baseline, "share")
        rows.append((Verbatim(task.name), f"{task.metric}, {len(task.item_ids)} items", scored, before, shown))
    if record.generation is not None:
        answers = record.generation
        name = f"{answers.prompts} prompts"
        rows.append((name, "answers identical", value(answers.identical, "share"), "100%", ""))
        rows.append((name, "answers that repeat themselves", value(answers.degenerate, "share"), NONE, ""))
    against = f"against {record.baseline.name}" if record.baseline is not None else "without a baseline"
    machine = record.environment
    lead = f"Scored {against} by {machine.runtime}, {machine.dtype} on {machine.device}; 95% intervals."
    columns = ("on", "what", ">value [95%]", ">baseline", "")
    found = [Section("Scores", (lead,), table=Table(columns, tuple(rows)))]
    from compress.evaluation.reports.plots import PercentileCurve

    curves = [c for text in record.texts if (c := PercentileCurve.of(text.data.name, text)) is not None]
    if curves:

        def draw() -> bytes:
            from compress.evaluation.reports.plots import percentiles, svg

            return svg(percentiles(curves, "KL to the baseline by token percentile"))

        found.append(
            Section("KL by token percentile", picture=Picture(draw, "KL per token from the median to the largest"))
        )
    return found


def _text_rows(text: TextRecord) -> list[tuple[str, ...]]:
    summary = text.summary
    rows: list[tuple[str, ...]] = [
        ("perplexity", of_record(summary.perplexity), of_record(summary.perplexity_baseline), ""),
        ("bits per byte", of_record(summary.bits_per_byte), NONE, ""),
    ]
    if summary.kl_mean is not None:
        rows += [
            ("perplexity ratio", of_record(summary.perplexity_ratio), "1", ""),
            ("mean KL, nats per token", of_record(summary.kl_mean), "0", ""),
            ("top-1 agreement", of_record(summary.top1_agreement, "share"), "100%", ""),
            ("the same, where the baseline is sure", of_record(summary.top1_agreement_confident, "share"), "100%", ""),
        ]
    return rows


def _cut(artifact: Artifact) -> list[Section]:
    """What a cut lost, what repair won back, and then training."""
    rows = tuple((done, value(kl), text) for done, kl, text in stages(artifact.cut()))
    lead = ("KL to the model before, nats per token.",)
    return [Section("What went and what came back", lead, table=Table(("", ">KL", "on"), rows))] if rows else []


def _training(learned: Mapping[str, Any] | None) -> list[Section]:
    """How a student learned: the held-out KL over the steps."""
    if learned is None:
        return []
    start, end = learned["held_out"][0]["kl"], learned["written_kl"]
    facts = (
        ("teacher", Verbatim(learned["teacher"])),
        ("loss", Verbatim(learned["loss"]["kind"])),
        ("trained", f"{learned['trained']}, {learned['parameters']} values"),
        ("steps", f"{learned['done']} of {learned['steps']}, {learned['tokens_per_step']} tokens each"),
        ("held-out KL before", value(start)),
        ("held-out KL as written", f"{value(end)}, weights of step {learned['best_step']}"),
    )
    rows = tuple((str(step), value(kl), value(loss)) for step, kl, loss in curve_rows(learned))

    def draw() -> bytes:
        from compress.evaluation.reports.plots import learning, svg

        points = [(int(point["step"]), float(point["kl"])) for point in learned["held_out"]]
        return svg(learning(points, "KL to the teacher on held-out windows of the training text"))

    columns = (">step", ">held-out KL", ">mean loss before it")
    picture = Picture(draw, "held-out KL to the teacher after so many steps")
    return [Section("How it learned", facts=facts, picture=picture, table=Table(columns, rows))]


def _drafting(found: Mapping[str, Any] | None) -> list[Section]:
    """What a draft was worth on held-out prompts."""
    if found is None:
        return []
    prompts = f"{found['prompts']} held-out, up to {found['new_tokens']} new tokens each, greedy"
    facts = (
        ("target", Verbatim(f"{found['target']} ({found['target_digest'][:16]})")),
        ("prompts", prompts),
        ("accepted", f"{value(found['acceptance'], 'share')} of {found['proposed']} proposed tokens"),
        ("tokens per step of the target", f"{value(found['tokens_per_step'])}, {found['draft_tokens']} at a time"),
        ("answers", "as without it" if found["same_answers"] else "not all as without it: ties that rounding decides"),
    )
    return [Section("As a draft", facts=facts)]


def _generated(record: EvalRecord | None) -> list[Section]:
    """What the model answers before and after, as the record keeps it."""
    answers = None if record is None else record.generation
    if answers is None or answers.samples is None:
        return []
    before = any(each.baseline is not None for each in answers.samples)
    columns = ("prompt", *(("before",) if before else ()), "after")
    rows = tuple((each.prompt, *((each.baseline or "",) if before else ()), each.answer) for each in answers.samples)
    text = (
        f"Greedy answers of at most {answers.max_tokens} tokens to the first {len(rows)} of {answers.prompts} prompts."
    )
    return [Section("Before and after", (text,), table=Table(columns, rows, prose=True))]


def _fallbacks(artifact: Artifact) -> list[Section]:
    rows = tuple((Verbatim(f.name), f.action, f.reason) for f in artifact.manifest.fallbacks)
    return [Section("Fallbacks", table=Table(("name", "done instead", "why"), rows))] if rows else []
