"""The list of commands, in the order of the help. Importing it imports every command module, all of them light."""

from __future__ import annotations

import typer

from compress.commands._command import Command, help_text
from compress.commands._options import MAKE
from compress.commands._usage import Group
from compress.commands.bench import bench
from compress.commands.compare import compare
from compress.commands.diff import diff
from compress.commands.distill import distill
from compress.commands.doctor import doctor
from compress.commands.eval import eval_
from compress.commands.export import export
from compress.commands.gate import gate
from compress.commands.generate import generate
from compress.commands.list import list_
from compress.commands.methods import methods
from compress.commands.plan import plan_distill, plan_prune, plan_quantize, plan_run
from compress.commands.prune import prune
from compress.commands.quantize import quantize
from compress.commands.report import report
from compress.commands.run import run
from compress.commands.show import show
from compress.commands.trend import trend
from compress.commands.verify import verify

PLAN_HELP = """Say size, memory and time of a run beforehand; write nothing.

Examples:

  $ compress plan quantize --method awq --bits 4
  $ compress plan run recipes/gptq-w3-g128.yaml
"""
PLANS: tuple[Command, ...] = (plan_quantize, plan_prune, plan_distill, plan_run)
COMMANDS: tuple[Command, ...] = (
    *(quantize, prune, distill, run, export, generate, eval_, gate, compare, trend, bench),
    *(show, report, list_, verify, diff, methods, doctor),
)


def register_all(app: typer.Typer) -> None:
    """Adds every command to the app."""
    plan = typer.Typer(cls=Group, help=help_text(PLAN_HELP))
    for subcommand in PLANS:
        subcommand.add_to(plan)
    for each in COMMANDS:
        each.add_to(app)
        if each is run:
            app.add_typer(plan, name="plan", rich_help_panel=MAKE)
