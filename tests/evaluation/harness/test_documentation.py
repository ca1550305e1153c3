"""What docs/evaluation.md shows is accepted as it stands there, and what it lists is what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compress.evaluation.harness.definitions import packaged_tasks
from compress.evaluation.harness.run import resolve
from compress.evaluation.suites import SuiteTask, load_suite, packaged_suites

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "jsonl"])
def test_task_files_resolve(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(text)
    items = [line for line in text.splitlines() if '"settings"' not in line]
    assert len(resolve(SuiteTask(name=str(file))).rows or {}) == len(items) >= 2


def test_the_suite_loads(tmp_path: Path) -> None:
    (text,) = [text for kind, text in BLOCKS if kind == "toml"]
    (tmp_path / "mine.toml").write_text(text)
    suite = load_suite(tmp_path / "mine.toml")
    assert (suite.texts[0].max_tokens, suite.tasks[0].items, suite.cost) == (8192, 500, False)
    assert suite.generation is not None
    assert len(suite.generation.prompts) == 8


def test_every_task_and_suite_is_named_with_its_counts() -> None:
    (listed,) = re.findall(r"Packaged tasks: (.*?)\.\n", PAGE, re.DOTALL)
    assert re.findall(r"`(\w+)`", listed) == list(packaged_tasks())
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == set(packaged_suites())
    tasks = {name: load_suite(name).tasks for name in packaged_suites()}
    assert sum(task.items or 0 for task in tasks["smoke"]) == 301
    assert sum(task.items or 560 for task in tasks["pr"]) == 3743
    assert [len(tasks[name]) for name in ("pr", "nightly", "release")] == [7, 14, 15]
