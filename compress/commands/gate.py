"""`compress gate`: whether a compressed model may be released."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.commands import _environment
from compress.commands._command import Outcome, command
from compress.commands._files import check_writable, write
from compress.commands._gate_views import OUTCOMES, show_noise, show_plan, show_verdict
from compress.commands._options import DTYPE_HELP, GENERAL, MEASURE, OUTPUT, Machine, ScoringKernel
from compress.commands._output import View, relative
from compress.errors import UserError

if TYPE_CHECKING:
    from compress.evaluation.gate import Decision
    from compress.evaluation.gating.check import Checked

WRITTEN = ("output", "junit", "markdown")
INSTEAD = "Instead of gating, or before it"


@dataclass(frozen=True, kw_only=True)
class Gate(Machine):
    """Options of `compress gate`."""

    candidate: Annotated[
        str | None,
        typer.Argument(help="Artifact, model directory or eval.json.", metavar="CANDIDATE", show_default=False),
    ] = None
    baseline: Annotated[
        list[str],
        typer.Option(
            help="Model, artifact or eval.json to compare with; not needed if the scores name one. Several, with the "
            "names that the policy uses: --baseline root=MODEL --baseline last=eval.json.",
            metavar="[NAME=]PATH",
            show_default=False,
        ),
    ] = field(default_factory=list)
    policy: Annotated[
        Path | None,
        typer.Option(help="Policy: a TOML file, or a packaged one by name; `default` if left out.", metavar="FILE"),
    ] = None
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Say what the policy can decide; refuse one that cannot.", rich_help_panel=INSTEAD),
    ] = False
    check: Annotated[
        Path | None,
        typer.Option(
            help="Derive a verdict again from the records that --output kept beside it (or CANDIDATE), as of today.",
            metavar="VERDICT",
            rich_help_panel=INSTEAD,
        ),
    ] = None
    noise_floor: Annotated[
        bool,
        typer.Option(
            "--noise-floor",
            help="Measure the (first) baseline against itself with other batches and threads, and keep that.",
            rich_help_panel=INSTEAD,
        ),
    ] = False
    output: Annotated[
        Path | None, typer.Option(help="Write the verdict to this file.", metavar="FILE", rich_help_panel=OUTPUT)
    ] = None
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML.", metavar="FILE", rich_help_panel=OUTPUT)] = None
    markdown: Annotated[
        Path | None,
        typer.Option(help="Write Markdown for a pull request.", metavar="FILE", rich_help_panel=OUTPUT),
    ] = None
    sign: Annotated[
        Path | None,
        typer.Option(
            help="Sign --output with this ssh key; the signature goes to FILE.sig.",
            metavar="KEY",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    allowed_signers: Annotated[
        Path | None,
        typer.Option(
            help="With --check: one of these must have signed it (see ssh-keygen, ALLOWED SIGNERS); needs no records.",
            metavar="FILE",
            rich_help_panel=INSTEAD,
        ),
    ] = None
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where finished work is kept, so that a killed run goes on.", metavar="DIR", rich_help_panel=GENERAL
        ),
    ] = None
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP, metavar="NAME", rich_help_panel=GENERAL)] = "auto"
    kernel: ScoringKernel = "auto"


@command("gate", Gate, panel=MEASURE)
def gate(options: Gate, view: View) -> Outcome:
    """Decide by a policy whether a candidate lost too much against its baseline: pass, fail or inconclusive.

    Existing scores are used where they fit; otherwise both models are scored. Exit codes: 0 pass, 1 fail,
    3 inconclusive, 2 a mistake in the request, 4 the work failed, 5 damaged or not comparable.

    Examples:

      $ compress gate ./artifact
      $ compress gate ./artifact --baseline ./model --policy my.toml
      $ compress gate eval.json --baseline root=./model --baseline last=v1.json
      $ compress gate eval.json --output verdict.json --junit gate.xml
      $ compress gate --plan --policy release.toml
      $ compress gate --check verdict.json
    """
    baselines = parse_baselines(options.baseline)
    _check_outputs(options)
    _environment.prepare(options.threads)
    if options.check is not None:
        return _check(options, baselines, view)
    if options.plan:
        return _plan(options, baselines, view)
    if options.noise_floor:
        noise = _noise(options, baselines, view)
        if options.candidate is None:
            return noise
    if options.candidate is None:
        raise UserError(
            "missing argument 'CANDIDATE'", "name an artifact, a model or an eval.json; see `compress gate --help`"
        )
    from compress.evaluation.gate import decide_release

    done = decide_release(
        options.candidate,
        baselines or None,
        options.policy,
        device=options.device,
        dtype=options.dtype,
        kernel=options.kernel,
        cache_dir=options.cache_dir,
        progress=view.progress(),
    )
    _publish(options, done, view)
    show_verdict(done.verdict, view)
    return OUTCOMES[done.verdict.verdict]


def parse_baselines(given: list[str]) -> dict[str, str]:
    """`NAME=PATH` and `PATH` as a mapping; a single path without a name is `baseline`.

    Raises:
        UserError: two without a name, or a name twice.
    """
    found: dict[str, str] = {}
    for value in given:
        name, separator, path = value.partition("=")
        if not separator or os.path.exists(value) or not name.replace("-", "_").isidentifier():
            name, path = "baseline", value
        if name in found:
            raise UserError(
                f"two baselines are called {name!r}", "name them: --baseline root=PATH --baseline last=PATH"
            )
        if not path:
            raise UserError(f"--baseline {value}: there is no path", "write --baseline NAME=PATH")
        found[name] = path
    return found


def _check(options: Gate, baselines: dict[str, str], view: View) -> Outcome:
    from compress.evaluation.gate import check

    assert options.check is not None
    done = check(
        options.check, options.candidate, baselines or None, options.policy, allowed_signers=options.allowed_signers
    )
    if done.signer is not None:
        view.note(f"signed by {done.signer}")
    if done.derived:
        which = "" if options.policy else "; its limits are its own: --policy FILE holds it to yours"
        view.note(f"it follows from the records and the policy {done.verdict.policy}{which}")
    else:
        view.note("its hash and its signature hold; it was not derived again, because the records are not here")
    _publish(options, done, view)
    show_verdict(done.verdict, view)
    return OUTCOMES[done.verdict.verdict]


def _plan(options: Gate, baselines: dict[str, str], view: View) -> Outcome:
    from compress.evaluation.gate import plan_gate

    plan = plan_gate(options.policy, options.candidate, baselines or None)
    show_plan(plan, view)
    return Outcome.OK


def _noise(options: Gate, baselines: dict[str, str], view: View) -> Outcome:
    from compress.evaluation.gate import measure_floor, refuse_policy_below
    from compress.evaluation.gating.noise import keep_noise

    if not baselines:
        raise UserError("--noise-floor measures a baseline, and none is given", "add --baseline MODEL")
    noise = measure_floor(
        next(iter(baselines.values())),
        options.policy,
        device=options.device,
        dtype=options.dtype,
        kernel=options.kernel,
        progress=view.progress(),
    )
    view.note(f"noise floor kept in {keep_noise(noise)}")
    show_noise(noise, view)
    refuse_policy_below(noise, options.policy)
    if options.candidate is None:
        view.result(noise.model_dump(mode="json"), [f"{name} {value:.3g}" for name, value in noise.largest().items()])
    return Outcome.OK


def _publish(options: Gate, done: Decision | Checked, view: View) -> None:
    """Writes what was asked for: the verdict after what it rests on, and before all that follows from it."""
    from compress.evaluation.gating.evidence import evidence_path, write_evidence
    from compress.evaluation.reports import github
    from compress.evaluation.verdict import write_verdict

    verdict = done.verdict
    if options.output is not None:
        if done.policy is None:
            evidence_path(options.output).unlink(missing_ok=True)
        else:
            write_evidence(options.output, done.policy, done.records)
        write_verdict(verdict, options.output)
        view.note(f"verdict written to {relative(options.output)}")
        if options.sign is not None:
            from compress.evaluation.gating.signing import sign

            view.note(f"signature written to {relative(sign(options.output, options.sign))}")
    if options.junit is not None:
        from compress.evaluation.reports import junit

        write(options.junit, junit.render(verdict))
    if options.markdown is not None:
        from compress.evaluation.reports import markdown

        write(options.markdown, markdown.render(verdict))
    for line in github.publish(verdict, os.environ):
        view.annotate(line)


def _check_outputs(options: Gate) -> None:
    """Before the work: every file must be one that can be written, and options must fit together."""
    for name in WRITTEN:
        check_writable(f"--{name}", getattr(options, name))
    if options.sign is not None and options.output is None:
        raise UserError("--sign signs the verdict's file, and none is written", "add --output verdict.json")
    if options.sign is not None:
        from compress.evaluation.gating.signing import check_key

        check_key(options.sign)
    if options.allowed_signers is not None and options.check is None:
        raise UserError("--allowed-signers belongs to --check", "add --check verdict.json")
    if sum((options.plan, options.check is not None, options.noise_floor)) > 1:
        raise UserError("--plan, --check and --noise-floor exclude each other", "give one of them at a time")
    alone = options.plan or (options.noise_floor and options.candidate is None)
    if alone and (given := next((name for name in WRITTEN if getattr(options, name) is not None), None)):
        raise UserError(f"--{given} writes a verdict, and none is made here", "leave it out, or gate a candidate")
