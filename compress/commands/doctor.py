"""`compress doctor`: whether this installation is whole, and what it will use on this machine."""

from __future__ import annotations

from compress.commands import _environment
from compress.commands._command import command
from compress.commands._options import LOOK, Common
from compress.commands._output import View, facts
from compress.errors import IntegrityError, WorkError


@command("doctor", Common, panel=LOOK)
def doctor(options: Common, view: View) -> None:
    """Check the installation: versions, processor, kernels and why each was chosen, kernel parity, packaged content.

    Exit code 4 if something does not work, 5 if packaged content is damaged.

    Examples:

      $ compress doctor
      $ compress doctor --json
    """
    _environment.prepare()
    from compress.workflows.doctor import examine

    checks = examine()
    broken = [check for check in checks if check.broken is not None]
    view.result(
        {"ok": not broken, "checks": checks},
        facts((check.name, check.detail if check.broken is None else f"BROKEN: {check.detail}") for check in checks),
    )
    if broken:
        first = broken[0]
        kind = IntegrityError if first.broken == "integrity" else WorkError
        raise kind(f"{len(broken)} of {len(checks)} checks failed, the first: {first.name}: {first.detail}", first.hint)
