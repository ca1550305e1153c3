"""A comparison as a report, and as the rows of a terminal's table."""

from __future__ import annotations

from compress.evaluation.reports.compare import Comparison, Model, Paired
from compress.evaluation.reports.document import Document, Picture, Section, Table
from compress.evaluation.reports.values import NONE, interval, of_record, size, value, with_unit
from compress.evaluation.reports.verbatim import Verbatim


def comparison_document(found: Comparison) -> Document:
    """Table, size-quality front, KL percentiles and the paired comparisons."""
    baselines = sorted({model.record.baseline.name for model in found.models if model.record.baseline is not None})
    lead = [f"text: {found.text}"] if found.text else []
    if baselines:
        lead.append(f"baseline: {', '.join(baselines)}")
    sections = [Section("Scores", table=scores_table(found))]
    if pictures := [section for section in (_front(found), _percentiles(found)) if section is not None]:
        sections += pictures
    if found.paired:
        text = f"Against {found.models[0].name}, on the same tokens and items; 95% intervals of pairs."
        sections.append(Section("In pairs", (text,), table=paired_table(found)))
    if found.unpaired:
        rows = tuple((Verbatim(u.second), Verbatim(u.first), u.what, u.why) for u in found.unpaired)
        sections.append(
            Section("What the records do not allow", table=Table(("model", "against", "what", "why"), rows))
        )
    title = " / ".join(model.name for model in found.models[:4]) + (" / …" if len(found.models) > 4 else "")
    return Document(title, tuple(lead), tuple(sections))


def scores_table(found: Comparison) -> Table:
    """One row per model; columns that no record fills are left out."""
    tasks = list(dict.fromkeys(name for model in found.models for name in model.tasks))
    columns = ["model", ">size", ">bits per weight", ">perplexity", ">bits per byte", ">KL, nats", ">top-1 agreement"]
    columns += [f">{name}" for name in tasks] + ["best for its size"]
    rows = [_row(model, tasks) for model in found.models]
    kept = [i for i in range(len(columns)) if i < 3 or any(row[i] != NONE for row in rows)]
    return Table(tuple(columns[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows))


def paired_table(found: Comparison) -> Table:
    """One row per comparison; the last column says what the interval says."""
    rows = tuple(
        (
            Verbatim(pair.second),
            pair.what,
            with_unit(interval(pair.estimate, pair.low, pair.high), pair.unit),
            value(pair.p_value),
            reading(pair),
        )
        for pair in found.paired
    )
    table = Table(("model", "what", ">estimate [95%]", ">McNemar mid-p", "so it is"), rows)
    if all(row[3] == NONE for row in rows):
        return Table(
            tuple(c for i, c in enumerate(table.columns) if i != 3),
            tuple(tuple(c for i, c in enumerate(row) if i != 3) for row in rows),
        )
    return table


def reading(pair: Paired) -> str:
    """`worse`, `better`, or that the data cannot tell."""
    neutral = 1.0 if pair.unit == "ratio" else 0.0
    if pair.low <= neutral <= pair.high:
        return "equal" if pair.low == pair.high else "not told apart"
    return "worse" if (pair.low > neutral) == (pair.worse > 0) else "better"


def front_svg(found: Comparison) -> bytes:
    """The size-quality front of the models that share text and baseline with the most others."""
    from compress.evaluation.reports.plots import FrontPoint, front, svg

    models = comparable(found)
    points = []
    for model in models:
        loss = model.loss
        assert loss is not None
        points.append(
            FrontPoint(
                model.name,
                (model.record.model.weights_bytes or 0) / 1e6,
                loss.estimate,
                loss.low,
                loss.high,
                bool(model.best),
            )
        )
    baseline = models[0].record.baseline
    assert baseline is not None
    name = f"mean KL to {baseline.name[:40]}, nats per token"
    whole = None if baseline.weights_bytes is None else baseline.weights_bytes / 1e6
    return svg(front(points, name, f"size and quality on {found.text}", whole))


def comparable(found: Comparison) -> list[Model]:
    """The models on one front: of known size, with a KL on the common text to one baseline; the largest such group."""
    groups: dict[tuple[str, str], list[Model]] = {}
    for model in found.models:
        if model.best is not None and model.text is not None and model.record.baseline is not None:
            key = (model.record.baseline.digest, model.text.data.windows_sha256)
            groups.setdefault(key, []).append(model)
    return max(groups.values(), key=len, default=[])


def _row(model: Model, tasks: list[str]) -> tuple[str, ...]:
    record, summary = model.record, None if model.text is None else model.text.summary
    cells = [Verbatim(model.name), size(record.model.weights_bytes), value(record.model.bits_per_weight)]
    if summary is None:
        cells += [NONE] * 4
    else:
        cells += [of_record(summary.perplexity), of_record(summary.bits_per_byte), of_record(summary.kl_mean)]
        cells.append(of_record(summary.top1_agreement, "share"))
    cells += [of_record(model.tasks.get(name), "share") for name in tasks]
    cells.append(NONE if model.best is None else "yes" if model.best else "no")
    return tuple(cells)


def _front(found: Comparison) -> Section | None:
    models = comparable(found)
    if not models:
        return None
    left_out = [model.name for model in found.models if model not in models]
    text = (f"Not in the picture, for want of a KL to the same baseline: {', '.join(left_out)}.",) if left_out else ()
    alt = "weight size against mean KL of " + ", ".join(model.name for model in models)
    return Section("Size and quality", text, picture=Picture(lambda: front_svg(found), alt))


def _percentiles(found: Comparison) -> Section | None:
    from compress.evaluation.reports.plots import PercentileCurve

    curves = [
        curve
        for model in comparable(found)
        if model.text is not None and (curve := PercentileCurve.of(model.name, model.text)) is not None
    ]
    if not curves:
        return None

    def draw() -> bytes:
        from compress.evaluation.reports.plots import percentiles, svg

        return svg(percentiles(curves, f"KL by token percentile on {found.text}"))

    return Section("KL by token percentile", picture=Picture(draw, "KL per token from the median to the largest"))
