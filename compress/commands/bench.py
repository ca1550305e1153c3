"""`compress bench`: what a model or an artifact costs to keep, load and run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.commands import _environment
from compress.commands._command import Outcome, command
from compress.commands._costs import class_rows, cost_rows, layer_rows, ratio_of
from compress.commands._files import write
from compress.commands._options import DTYPE_HELP, GENERAL, MEASURE, MODEL_OR_ARTIFACT_HELP, Machine
from compress.commands._output import View, columns, facts, number, relative
from compress.commands._speed_picture import check_plot, picture
from compress.errors import UserError

if TYPE_CHECKING:
    from compress.evaluation.costs.record import CostRecord
    from compress.workflows.bench import Bench as Result

WORK = "Work"
PRICES = "Prices"


@dataclass(frozen=True, kw_only=True)
class Bench(Machine):
    """Options of `compress bench`."""

    model: Annotated[
        str | None, typer.Argument(help=MODEL_OR_ARTIFACT_HELP, metavar="MODEL_OR_ARTIFACT", show_default=False)
    ] = None
    baseline: Annotated[
        str | None, typer.Option(help="Model to measure in turns with it; gives the ratio of speeds.", metavar="MODEL")
    ] = None
    baseline_engine: Annotated[
        str,
        typer.Option(help="What runs the baseline: auto, as the model, or transformers.", metavar="NAME"),
    ] = "auto"
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw tokens/s by batch size, of both models, as SVG or PNG.", metavar="FILE"),
    ] = None
    draft: Annotated[
        str | None,
        typer.Option(
            help="Draft for speculative decoding: how much of it is accepted on held-out text, and what that gains.",
            metavar="DIR",
        ),
    ] = None
    draft_tokens: Annotated[int, typer.Option(help="Tokens that it proposes at a time.", metavar="N")] = 4
    batch_sizes: Annotated[
        str, typer.Option(help="Batch sizes of the throughput, with commas.", metavar="N,N", rich_help_panel=WORK)
    ] = "1,2,4,8,16,32"
    max_seconds: Annotated[
        float,
        typer.Option(
            help="For all parts together; repeats, batch sizes and loads that do not fit are left out, and named.",
            rich_help_panel=WORK,
        ),
    ] = 300
    prompt_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of the prompt; 128, or what the context holds.", rich_help_panel=WORK),
    ] = None
    new_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens to generate; 32, or a quarter of a short context.", rich_help_panel=WORK),
    ] = None
    repeats: Annotated[
        int, typer.Option(help="Repeats, or rounds of both models in turns; at least 10.", rich_help_panel=WORK)
    ] = 10
    no_fresh: Annotated[
        bool,
        typer.Option(
            "--no-fresh",
            help="No fresh process: load time and memory are left out.",
            rich_help_panel=WORK,
        ),
    ] = False
    prices: Annotated[
        Path | None,
        typer.Option(
            help="Price table (TOML); the example prices that ship with the package if left out.",
            metavar="FILE",
            rich_help_panel=PRICES,
        ),
    ] = None
    machine: Annotated[
        str | None,
        typer.Option(
            help="Machine in the price table; the first for the device if left out.",
            metavar="NAME",
            rich_help_panel=PRICES,
        ),
    ] = None
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP, metavar="NAME", rich_help_panel=GENERAL)] = "auto"
    kernel: Annotated[
        str, typer.Option(help="auto, cpu, cpu-int8, triton or reference.", metavar="NAME", rich_help_panel=GENERAL)
    ] = "auto"
    kv_cache: Annotated[
        str,
        typer.Option(
            help="How the model, not the baseline, keeps keys and values: auto, float32, bfloat16, fp8, int8, nvfp4, "
            "int4 or int2.",
            metavar="NAME",
            rich_help_panel=GENERAL,
        ),
    ] = "auto"
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="The model, not the baseline, is loaded so that no bit of an answer depends on what else is computed: "
            "as the engine on a CPU always is; with the same model as baseline, what that costs on a GPU.",
            rich_help_panel=GENERAL,
        ),
    ] = False


@command("bench", Bench, panel=MEASURE)
def bench(options: Bench, view: View) -> Outcome:
    """Measure size by tensor class, load time, peak memory, speed, and money and energy per million tokens.

    Speeds are medians over repeats with their intervals; with --baseline the two models take turns and the last column
    is candidate over baseline. A packed model that is computed from decoded weights is marked, DENSE FALLBACK, and the
    exit code is 1. What one answer reads per token is compared with what this machine reads just then.

    Examples:

      $ compress bench
      $ compress bench ./artifact --baseline ./model --plot speed.svg
      $ compress bench ./a --baseline ./model --baseline-engine transformers
      $ compress bench ./model --kv-cache int8 --baseline ./model
      $ compress bench ./artifact --batch-sizes 1,8,32 --prompt-tokens 256
      $ compress bench ./artifact --prices my_prices.toml --json
    """
    batch_sizes = _batch_sizes(options.batch_sizes)
    check_plot(options.plot)
    _environment.prepare(options.threads)
    from compress.evaluation.costs.measure import Settings
    from compress.workflows.bench import bench as run

    settings = Settings(
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        batch_sizes=batch_sizes,
        repeats=options.repeats,
        seconds=options.max_seconds,
        kernel=options.kernel,
        fresh=not options.no_fresh,
        machine=options.machine,
        kv_cache=options.kv_cache,
        deterministic=options.deterministic,
    )
    found = run(
        options.model,
        options.baseline,
        baseline_engine=options.baseline_engine,
        draft=options.draft,
        draft_tokens=options.draft_tokens,
        prices=options.prices,
        settings=settings,
        device=options.device,
        dtype=options.dtype,
        progress=view.progress(),
    )
    if options.plot is not None:
        write(options.plot, picture(found, options.plot.suffix.lower()))
        view.note(f"picture written to {relative(options.plot)}")
    if not view.json_mode:
        _tables(found, view)
    view.result({"schema_version": 1, "kind": "compress.bench", **_document(found)}, _lines(found))
    _remarks(found, view)
    return Outcome.GATE_FAILED if found.cost.dense_fallback else Outcome.OK


def _batch_sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--batch-sizes {text!r} is no list of integers", "give for example --batch-sizes 1,4,8"
        ) from None


def _document(found: Result) -> dict[str, object]:
    return {name: getattr(found, name) for name in found.__dataclass_fields__}


def _tables(found: Result, view: View) -> None:
    cost = found.cost
    view.table(
        f"{found.model.name}: weight files by class",
        ("class", ">tensors", ">weights", ">bytes", ">scales", ">bits per weight"),
        class_rows(cost),
    )
    view.table(
        f"{found.model.name}: layers, {cost.workload.runtime} {cost.workload.dtype} on {cost.workload.device}",
        ("layers", ">number", "class", "kernel", ">stored", ">in memory", ">read per token", "dense fallback"),
        layer_rows(cost),
    )


def _lines(found: Result) -> list[str]:
    cost, other, work = found.cost, found.cost_baseline, found.cost.workload
    done = f"prompt {work.prompt_tokens}, new {work.new_tokens}, {work.repeats} repeats after {work.warm_up}"
    rows = [
        ("model", found.model.name),
        ("computed", _computed(cost)),
        ("work", done),
        *cost_rows(cost),
        *_draft_rows(found),
    ]
    if other is None or found.baseline is None:
        return facts(rows)
    theirs = dict([("model", found.baseline.name), ("computed", _computed(other)), *cost_rows(other)])
    table = [(name, value, theirs.get(name, ""), ratio_of(cost, name)) for name, value in rows]
    return columns([("", "candidate", "baseline", "times as fast"), *table])


def _computed(cost: CostRecord) -> str:
    work = cost.workload
    return f"{work.runtime} {work.dtype} on {work.device}, {work.threads} threads"


def _draft_rows(found: Result) -> list[tuple[str, str]]:
    draft = found.draft
    if draft is None:
        return []
    said = draft.speculation
    speed = f"{number(draft.tokens_per_second)} tokens/s, {number(draft.plain_tokens_per_second)} without"
    return [
        ("draft", f"{draft.draft}, {draft.draft_tokens} tokens at a time, {draft.prompts} held-out prompts, greedy"),
        ("accepted", f"{said.accepted} of {said.proposed} proposed tokens ({number(100 * (draft.acceptance or 0))}%)"),
        ("tokens per step", number(draft.tokens_per_step)),
        ("decoding with it", speed),
        ("same answers", "yes" if draft.equal else "NO: ties that rounding decides"),
    ]


def _remarks(found: Result, view: View) -> None:
    from compress.evaluation.costs.machine import DISTURBED_CORES

    for name, cost in ((found.model.name, found.cost), (found.baseline and found.baseline.name, found.cost_baseline)):
        if cost is not None and cost.dense_fallback_reason is not None:
            view.warn(f"{name}: dense fallback: {cost.dense_fallback_reason}; its speed and memory are a dense model's")
    cost, others = found.cost, found.cost.workload.others_busy_cores
    if others is not None and others > DISTURBED_CORES:
        view.warn(f"other processes kept {others:.1f} cores busy meanwhile: repeat the timing on a quiet machine")
    if cost.prices is not None:
        view.note(
            f"prices: {cost.prices.machine} of {cost.prices.table}, {cost.prices.price_per_hour:g} "
            f"{cost.prices.currency} an hour, {cost.prices.watts:g} W. {cost.prices.formula}"
        )
