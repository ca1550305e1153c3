"""docs/ci/gate.sh: its exit code is the gate's, nothing turns a refusal into a pass, and it works on real artifacts.

The fast tests replace the program by one that answers as they wish. The slow test runs the installed program on the
packaged model; `make wheel-smoke` does the same from the built wheel, far from the checkout.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.gate_scenarios import RESULTS, SCENARIOS, prepare

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "ci" / "gate.sh"

STUB = """#!/bin/sh
printf '%s\\n' "$*" >> calls
case "$1 $2" in
    "gate --plan") exit "${PLAN:-0}" ;;
    gate*) [ "${WRITE:-yes}" = no ] || echo '{}' > results/verdict.json; exit "${GATE:-0}" ;;
    verify*) exit "${VERIFY:-0}" ;;
    report*) exit "${REPORT:-0}" ;;
    trend*) exit "${TREND:-0}" ;;
esac
exit 99
"""


@dataclass(frozen=True)
class Ran:
    """How the script ended, and the command lines that it gave to the program."""

    code: int
    calls: list[str]
    err: str


@pytest.fixture
def ran(tmp_path: Path) -> Callable[..., Ran]:
    """`ran("candidate", "--policy", "p.toml", GATE=1)`: the script with a program that answers so."""
    stub = tmp_path / "stub"
    stub.write_text(STUB)
    stub.chmod(0o755)
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "compress_manifest.json").write_text("{}")

    def call(*arguments: str, **answers: object) -> Ran:
        (tmp_path / "calls").unlink(missing_ok=True)
        environment = {"PATH": os.environ["PATH"], "COMPRESS": "./stub", "GATE_OUTPUT": "results"}
        environment |= {name: str(value) for name, value in answers.items()}
        done = subprocess.run(
            ["sh", str(SCRIPT), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
            timeout=60,
        )  # fmt: skip
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return Ran(done.returncode, calls, done.stderr)

    return call


def test_a_pass_verifies_plans_gates_and_reports(ran: Callable[..., Ran]) -> None:
    done = ran("artifact", "--baseline", "base model", "--policy", "p.toml")
    assert done.code == 0
    given = "--baseline base model --policy p.toml"
    assert done.calls == [
        "verify artifact",
        f"gate --plan {given}",
        f"gate artifact {given} --output results/verdict.json --junit results/gate.xml --markdown results/gate.md",
        "report results/verdict.json --html results/gate.html",
    ]


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("step", ["VERIFY", "PLAN", "GATE"])
def test_every_refusal_is_the_answer(ran: Callable[..., Ran], step: str, code: int) -> None:
    done = ran("artifact", **{step: code})
    assert done.code == code
    expected = {"VERIFY": 1, "PLAN": 2, "GATE": 4}[step]
    assert len(done.calls) == expected, "nothing is scored after a refusal; a verdict is reported"


def test_a_report_never_turns_a_refusal_into_a_pass(ran: Callable[..., Ran]) -> None:
    assert ran("artifact", GATE=1, REPORT=0).code == 1
    assert ran("artifact", GATE=1, REPORT=4).code == 1
    assert ran("artifact", GATE=0, REPORT=4).code == 4


def test_a_gate_without_a_verdict_is_no_pass(ran: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "verdict.json").write_text("of an earlier run")
    assert ran("artifact", WRITE="no").code == 4
    assert ran("artifact", WRITE="no", GATE=5).code == 5
    assert not (tmp_path / "results" / "verdict.json").exists()


def test_an_eval_file_is_not_verified_as_an_artifact(ran: Callable[..., Ran]) -> None:
    assert ran("eval.json").calls[0] == "gate --plan"
    assert ran("eval.json", GATE_PLAN="no").calls[0].startswith("gate eval.json --output")


def test_the_history_is_kept_and_drift_may_fail(ran: Callable[..., Ran]) -> None:
    done = ran("artifact", GATE_HISTORY="quality", CI_COMMIT_SHA="abc", GATE_RELEASE="v 1")
    line = "trend quality --add results/verdict.json --commit abc --html results/trend.html --release v 1"
    assert done.calls[-1] == line
    assert ran("artifact", GATE_HISTORY="q", GITHUB_SHA="x", TREND=1).code == 1
    assert ran("artifact", GATE_HISTORY="q", GITHUB_SHA="x", TREND=1, GATE=3).code == 3
    assert ran("artifact", GATE_HISTORY="q", GATE_COMMIT="x", GATE_DRIFT="fail").calls[-1].endswith("--fail-on-drift")


@pytest.mark.parametrize("arguments", [(), ("--policy", "p.toml")])
def test_a_missing_candidate_is_a_mistake(ran: Callable[..., Ran], arguments: tuple[str, ...]) -> None:
    done = ran(*arguments)
    assert (done.code, done.calls) == (2, [])
    assert [line.split(":")[0] for line in done.err.splitlines()] == ["error", "hint"]


@pytest.mark.slow
def test_real_artifacts_get_their_answers(tmp_path: Path, packaged_model: Path) -> None:
    program = Path(sys.executable).with_name("compress")
    environment = {**os.environ, "COMPRESS": str(program), "HF_HUB_OFFLINE": "1"}

    def compress(*arguments: str) -> None:
        subprocess.run([program, *arguments, "--quiet"], cwd=tmp_path, env=environment, check=True, timeout=600)

    prepare(tmp_path, packaged_model, compress)
    results = tmp_path / "gate-results"
    for scenario in SCENARIOS:
        done = subprocess.run(
            ["sh", str(SCRIPT), *scenario.arguments], cwd=tmp_path, env=environment, capture_output=True, text=True,
            check=False, timeout=600,
        )  # fmt: skip
        assert done.returncode == scenario.code, (scenario, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        names = {path.name for path in results.iterdir()}
        assert names == (RESULTS if scenario.verdict else set())
