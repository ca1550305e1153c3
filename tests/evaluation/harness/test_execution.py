"""Executing what a model wrote: right, wrong, endless, greedy and hostile programs; HumanEval through lm-eval."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from compress.evaluation.harness import execution
from compress.evaluation.harness.execution import passes_tests, runs


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "SECONDS", 5)


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("raise SystemExit(1)", False),
        ("exit()\nassert 1 + 1 == 3", False),
        ("import os; os._exit(0)\nassert 1 + 1 == 3", False),
        ("def f(:", False),
        ("x = bytearray(8 << 30)", False),
        ("open('big', 'wb').write(b'0' * (32 << 20))", False),
        ("open('small', 'w').write('x'); import os; assert os.listdir() == ['small']", True),
        ("import sys; sys.stdout.write('x' * 10**6)", True),
    ],
)
def test_programs(program: str, passes: bool) -> None:
    assert runs(program) is passes


def test_an_endless_program_is_ended_with_its_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(execution, "SECONDS", 1)
    mark = tmp_path / "pid"
    program = (
        "import os, time\n"
        f"if os.fork() == 0:\n    open({str(mark)!r}, 'w').write(str(os.getpid()))\n"
        "    while True: time.sleep(0.05)\n"
        "time.sleep(60)\n"
    )
    assert runs(program) is False
    child = int(mark.read_text())
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _alive(child):
        time.sleep(0.05)
    assert not _alive(child)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_environment_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_API_KEY", "secret")
    assert os.environ["COMPRESS_API_KEY"] == "secret"
    assert runs("import os; assert 'COMPRESS_API_KEY' not in os.environ")


def test_reference_solutions_pass_and_others_do_not(shared: Path) -> None:
    lines = (shared / "data" / "humaneval" / "HumanEval.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[:3]:
        problem = json.loads(line)
        assert passes_tests(problem, [problem["canonical_solution"]]) == {"acc": 1}
        assert passes_tests(problem, ["    return None\n"]) == {"acc": 0}
