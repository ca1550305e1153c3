"""The CI files: valid by the published schemas, which check-jsonschema ships, and safe to feed with any input."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.evaluation.reports import github, markdown
from tests.evaluation.reports.made import mixed

CI = Path(__file__).resolve().parents[2] / "docs" / "ci"
SCHEMAS = {
    "github-workflow.yml": ["vendor.github-workflows"],
    "github-comment.yml": ["vendor.github-workflows"],
    "action.yml": ["vendor.github-actions"],
    "gitlab.yml": ["vendor.gitlab-ci", "--data-transform", "gitlab-ci"],
}


def valid(text: str, name: str, folder: Path) -> bool:
    """Whether a text fits the schema of its kind; nothing is fetched. GitLab's schema lets hidden jobs hold anything,
    so they are shown to it without their dot."""
    path = folder / name
    path.write_text(text.replace("\n.compress-gate:", "\ncompress-gate:"), encoding="utf-8")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", *SCHEMAS[name], str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 0


def test_every_ci_file_has_a_schema() -> None:
    assert {path.name for path in CI.glob("*.yml")} == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_file_fits_its_schema(name: str, tmp_path: Path) -> None:
    assert valid((CI / name).read_text(encoding="utf-8"), name, tmp_path)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("github-workflow.yml", "type: boolean", "type: maybe"),
        ("github-comment.yml", "runs-on:", "runs_on:"),
        ("action.yml", "using: composite", "using: shell"),
        ("gitlab.yml", "expire_in: 90 days", "expire_in: [90]"),
    ],
)
def test_the_schema_can_refuse(name: str, old: str, new: str, tmp_path: Path) -> None:
    text = (CI / name).read_text(encoding="utf-8")
    assert old in text
    assert not valid(text.replace(old, new), name, tmp_path)


def steps(value: Any) -> Iterator[dict[str, Any]]:
    """Every step of every job, and every job of GitLab's."""
    if isinstance(value, dict):
        if "run" in value or "uses" in value or "script" in value:
            yield value
        for item in value.values():
            yield from steps(item)
    elif isinstance(value, list):
        for item in value:
            yield from steps(item)


def scripts(name: str) -> list[str]:
    """The shell code in a CI file."""
    found = []
    for step in steps(yaml.safe_load((CI / name).read_text(encoding="utf-8"))):
        found += [step["run"]] if isinstance(step.get("run"), str) else []
        found += [line for key in ("script", "before_script") for line in step.get(key, [])]
    return found


@pytest.mark.parametrize("name", SCHEMAS)
def test_no_input_is_pasted_into_shell_code(name: str) -> None:
    """An expression inside `run` would be read as code; inputs go through `env`."""
    found = scripts(name)
    assert found
    assert [line for line in found if "${{" in line] == []


@pytest.mark.parametrize("name", SCHEMAS)
def test_shell_code_parses(name: str) -> None:
    for line in scripts(name):
        subprocess.run(["sh", "-n"], input=line, text=True, check=True, timeout=60)


@pytest.mark.parametrize("name", ["gate.sh", "comment.sh"])
def test_scripts_parse_and_hold_no_bashism(name: str) -> None:
    subprocess.run(["sh", "-n", CI / name], check=True, timeout=60)
    text = (CI / name).read_text(encoding="utf-8")
    assert text.startswith("#!/bin/sh\n")
    assert re.search(r"\[\[|\blocal \b|\bfunction \b|<<<|\$'|\bdeclare\b|&>", text) is None


def test_the_action_offers_outputs_that_the_gate_writes() -> None:
    action = yaml.safe_load((CI / "action.yml").read_text(encoding="utf-8"))
    used = {re.search(r"steps\.gate\.outputs\.([\w-]+)", o["value"])[1] for o in action["outputs"].values()}  # type: ignore[index]
    assert used - {"code"} <= set(github.outputs(mixed()))
    assert "code" in used


def test_the_workflow_gives_the_action_inputs_that_it_has() -> None:
    action = yaml.safe_load((CI / "action.yml").read_text(encoding="utf-8"))
    workflow = yaml.safe_load((CI / "github-workflow.yml").read_text(encoding="utf-8"))
    step = next(s for s in steps(workflow) if s.get("uses") == "./.github/compress")
    assert set(step["with"]) <= set(action["inputs"])
    given = workflow[True]["workflow_call"]["inputs"]  # YAML 1.1 reads `on` as true
    named = set(re.findall(r"inputs\.([\w-]+)", (CI / "github-workflow.yml").read_text(encoding="utf-8")))
    assert named <= set(given)


def test_the_comment_is_found_by_the_marker_that_reports_write() -> None:
    assert f'startswith("{markdown.MARKER}")' in (CI / "comment.sh").read_text(encoding="utf-8")
    assert markdown.render(mixed()).startswith(markdown.MARKER)


GH = """#!/bin/sh
printf '%s\\n' "$*" >> "$CALLS"
case "$*" in *--paginate*) printf '%b' "$COMMENTS" ;; esac
"""


@pytest.mark.parametrize(
    ("comments", "expected"),
    [
        ("", "--method POST repos/o/r/issues/7/comments"),
        ("11\\n12\\n", "--method PATCH repos/o/r/issues/comments/11"),
    ],
)
def test_one_comment_is_made_and_then_renewed(tmp_path: Path, comments: str, expected: str) -> None:
    gh = tmp_path / "gh"
    gh.write_text(GH)
    gh.chmod(0o755)
    (tmp_path / "gate.md").write_text("x")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CALLS": str(tmp_path / "calls"), "COMMENTS": comments}
    command = ["sh", str(CI / "comment.sh"), "o/r", "7", "gate.md"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)
    listed, written = (tmp_path / "calls").read_text().splitlines()
    assert "repos/o/r/issues/7/comments" in listed
    assert expected in written
    assert written.endswith("--field body=@gate.md")


@pytest.mark.parametrize(
    "arguments", [(), ("o/r", "7; rm -rf x", "gate.md"), ("o/r", "7", "missing.md"), ("o/r", "", "gate.md")]
)
def test_the_comment_refuses_bad_arguments(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "gate.md").write_text("x")
    command = ["sh", str(CI / "comment.sh"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


def test_the_action_hands_every_input_to_the_gate(tmp_path: Path) -> None:
    """The step's own shell code, run as the runner would, with the gate replaced by one that writes its arguments."""
    shutil.copy(CI / "action.yml", tmp_path)
    (tmp_path / "gate.sh").write_text('for word in "$@"; do echo "<$word>"; done > "$SEEN"\nexit 3\n')
    step = next(s for s in steps(yaml.safe_load((CI / "action.yml").read_text())) if s.get("id") == "gate")
    environment = {
        "PATH": "/usr/bin:/bin",
        "GITHUB_ACTION_PATH": str(tmp_path),
        "GITHUB_OUTPUT": str(tmp_path / "output"),
        "SEEN": str(tmp_path / "seen"),
        "CANDIDATE": "a b; echo *",
        "POLICY": "$(id).toml",
        "BASELINE": "root=some model\nlast=v1/eval.json\n",
    }
    done = subprocess.run(["sh", "-e", "-c", step["run"]], cwd=tmp_path, env=environment, check=False, timeout=60)
    assert done.returncode == 0
    words = [
        "a b; echo *",
        "--policy",
        "$(id).toml",
        "--baseline",
        "root=some model",
        "--baseline",
        "last=v1/eval.json",
    ]
    assert (tmp_path / "seen").read_text().splitlines() == [f"<{word}>" for word in words]
    assert (tmp_path / "output").read_text() == "code=3\n"
