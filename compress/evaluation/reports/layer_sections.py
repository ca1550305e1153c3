"""Where the error went: linears as a heat map and one by one, the worst ones' values, and what reached the experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from compress.artifact.card import in_order
from compress.artifact.coverage import coverage, expert_of
from compress.evaluation.reports.document import Picture, Section, Table
from compress.evaluation.reports.plots.layers import kind_of
from compress.evaluation.reports.shades import logarithmic
from compress.evaluation.reports.values import NONE, value
from compress.evaluation.reports.verbatim import Verbatim

if TYPE_CHECKING:
    from compress.artifact.reader import Artifact

WORST = 10
SHOWN_VALUES = 4
MOST_ROWS = 2000
MOST_EXPERTS = 64

Layers = Sequence[Mapping[str, Any]]


def layer_sections(artifact: Artifact) -> list[Section]:
    """The sections that layers.json fills; the values of the worst linears are read from the weight files.

    Raises:
        IntegrityError: the artifact is damaged.
    """
    layers = artifact.layers()
    what, errors = measured_errors(layers)
    if not errors:
        return []
    worst = sorted(errors, key=lambda name: (-errors[name], name))
    sections = [_worst(layers, what, errors, worst[:WORST]), _heat_map(layers, what, errors)]
    quantized = artifact.manifest.sizes.quantized_parameters > 0  # layers that were pruned have bits of their own
    packed = {str(layer["name"]) for layer in layers if quantized and layer.get("bits_per_weight") is not None}
    if shown := [name for name in worst if name in packed][:SHOWN_VALUES]:
        sections.append(_values(artifact, shown))
    return [*sections, *coverage_sections(layers), _every(layers, what, errors, worst)]


def measured_errors(layers: Layers) -> tuple[Literal["output", "weight"], dict[str, float]]:
    """`output` and the error of each linear's output on the calibration tokens; where no text was read, `weight` and
    that of its weight, both as shares of squares."""
    errors = {str(x["name"]): float(x["output_error"]) for x in layers if x.get("output_error") is not None}
    if errors:
        return "output", errors
    known = {str(x["name"]): float(x["weight_sqnr_db"]) for x in layers if x.get("weight_sqnr_db") is not None}
    return "weight", {name: 10 ** (-sqnr / 10) for name, sqnr in known.items()}


def _worst(
    layers: Layers, what: Literal["output", "weight"], errors: Mapping[str, float], worst: Sequence[str]
) -> Section:
    by_name = {str(layer["name"]): layer for layer in layers}
    inside = (layer for layer in layers if layer["name"] in errors and layer["block"] is not None)
    measured = [{**layer, "error": errors[str(layer["name"])]} for layer in inside]

    def draw() -> bytes:
        from compress.evaluation.reports.plots import layer_errors, svg

        return svg(layer_errors(measured, what, f"Relative {what} error of each linear, by decoder block"))

    kept = sum(layer.get("scheme") is None for layer in layers)
    text = f"{len(layers) - kept} linears compressed, {kept} left as they were. The {len(worst)} largest errors:"
    alt = f"relative {what} error of every linear by decoder block"
    rows = tuple(_row(by_name[name], errors.get(name)) for name in worst)
    return Section("Where the error went", (text,), picture=Picture(draw, alt), table=Table(_columns(what), rows))


def _columns(what: str) -> tuple[str, ...]:
    return ("linear", "scheme", ">bits per weight", f">relative {what} error", ">weight SQNR, dB", "fallback")


def _row(layer: Mapping[str, Any], error: float | None) -> tuple[str, ...]:
    return (
        Verbatim(layer["name"]),
        Verbatim(layer.get("scheme") or NONE),
        value(layer.get("bits_per_weight")),
        value(error),
        value(layer.get("weight_sqnr_db")),
        str(layer.get("fallback") or ""),
    )


def _heat_map(layers: Layers, what: str, errors: Mapping[str, float]) -> Section:
    """One row per block, one column per kind of linear; of experts the worst."""
    kinds = list(dict.fromkeys(kind_of(str(layer["name"])) for layer in layers if layer["name"] in errors))
    cells: dict[tuple[int | None, str], float] = {}
    for layer in layers:
        name = str(layer["name"])
        if name in errors:
            place = (layer["block"], kind_of(name))
            cells[place] = max(cells.get(place, 0.0), errors[name])
    blocks = sorted({block for block, _ in cells}, key=in_order)
    rows = [
        ("outside" if block is None else str(block), *(value(cells.get((block, kind))) for kind in kinds))
        for block in blocks
    ]
    shades = logarithmic([[None, *(cells.get((block, kind)) for kind in kinds)] for block in blocks])
    several = any(expert_of(str(layer["name"])) is not None for layer in layers)
    text = f"Relative {what} error by decoder block and linear; the stronger the colour, the larger."
    text += " Of the experts of a block the worst is shown." if several else ""
    return Section(
        "Error by layer", (text,), table=Table(("block", *(f">{kind}" for kind in kinds)), tuple(rows), shades)
    )


def _every(layers: Layers, what: str, errors: Mapping[str, float], worst: Sequence[str]) -> Section:
    shown = layers
    text = "In the order of the model."
    if len(layers) > MOST_ROWS:
        chosen = set(worst[:MOST_ROWS])
        shown = [layer for layer in layers if layer["name"] in chosen]
        text = f"The {MOST_ROWS} with the largest errors of {len(layers)}; layers.json has all."
    rows = tuple(_row(layer, errors.get(str(layer["name"]))) for layer in shown)
    return Section(f"Every linear ({len(layers)})", (text,), table=Table(_columns(what), rows), folded=True)


def _values(artifact: Artifact, names: Sequence[str]) -> Section:
    from compress.evaluation.reports.linear_values import read_values

    found = read_values(artifact, names)

    def draw() -> bytes:
        from compress.evaluation.reports.plots import histograms, svg

        return svg(histograms(found))

    rows = tuple(
        (
            Verbatim(each.name),
            value(each.deviation),
            value(each.largest),
            value(each.largest / each.deviation if each.deviation else None),
            value(each.scale_middle),
            value(each.scale_largest),
        )
        for each in found
    )
    columns = ("linear", ">standard deviation", ">largest |w|", ">in deviations", ">median |scale|", ">largest |scale|")
    text = "As they are stored, decoded. Far outliers and scales of very different size are what rounding suffers from."
    alt = "histograms of the weights and of the scales of " + ", ".join(names)
    return Section(
        "Weights and scales of the worst linears", (text,), picture=Picture(draw, alt), table=Table(columns, rows)
    )


def coverage_sections(layers: Layers) -> list[Section]:
    """Tokens per expert: in figures per block, and one by one where they fit."""
    found = coverage(layers)
    if not found:
        return []
    rows = tuple(
        (
            str(each.block),
            str(len(each.tokens)),
            str(min(each.tokens)),
            value(each.median),
            str(max(each.tokens)),
            str(sum(tokens == 0 for tokens in each.tokens)),
            str(each.fallbacks),
        )
        for each in found
    )
    columns = ("block", ">experts", ">fewest tokens", ">median", ">most tokens", ">without any", ">fell back")
    text = "How many calibration tokens the router sent to each expert."
    sections = [Section("Expert coverage", (text,), table=Table(columns, rows))]
    most = max(len(each.tokens) for each in found)
    if most <= MOST_EXPERTS:
        cells = [[None, *(float(n) for n in each.tokens), *[None] * (most - len(each.tokens))] for each in found]
        one_by_one = tuple(
            (str(each.block), *map(str, each.tokens), *[NONE] * (most - len(each.tokens))) for each in found
        )
        table = Table(
            ("block", *(f">{number}" for number in range(most))), one_by_one, logarithmic(cells, low_is_hot=True)
        )
        sections.append(Section("Tokens by expert", ("The stronger the colour, the fewer.",), table=table))
    return sections
