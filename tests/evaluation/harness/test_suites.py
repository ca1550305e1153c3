"""Suites as files: what ships, what is refused, and what a hash covers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compress.errors import UserError
from compress.evaluation.suites import (
    SEED,
    Suite,
    SuiteGeneration,
    SuiteTask,
    SuiteText,
    load_suite,
    packaged_prompts,
    packaged_suites,
    task_of,
)

GOOD = '[[text]]\nname = "tales_heldout"\nmax_tokens = 100\n[[task]]\nname = "blimp"\nitems = 5\n'


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_packaged_suites_load() -> None:
    for name in packaged_suites():
        suite = load_suite(name)
        assert suite.name == name
        assert suite.texts
        assert suite.tasks
    smoke, pr = load_suite("smoke"), load_suite("pr")
    assert (smoke.cost, smoke.generation) == (False, None)
    assert pr.generation is not None
    assert len(pr.generation.prompts) == 32
    assert all(task.seed == SEED for task in (*smoke.tasks, *pr.tasks))


def test_a_suite_of_one_s_own(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path / "mine.toml", GOOD))
    assert suite == Suite(
        name="mine", texts=[SuiteText(name="tales_heldout", max_tokens=100)], tasks=[SuiteTask(name="blimp", items=5)]
    )
    prompts = load_suite(write(tmp_path / "p.toml", '[generation]\nprompts = ["a", "b"]\nmax_tokens = 3\n'))
    assert prompts.generation == SuiteGeneration(prompts=("a", "b"), max_tokens=3)


def test_files_beside_the_suite_are_found(tmp_path: Path) -> None:
    write(tmp_path / "mine.jsonl", '{"prompt": "a", "reference": "b"}\n')
    suite = load_suite(write(tmp_path / "s.toml", '[[task]]\nname = "mine.jsonl"\n'))
    assert suite.tasks[0].name == str(tmp_path / "mine.jsonl")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version = 2\n" + GOOD, "version"),
        ("", "scores nothing"),
        (GOOD + "limit = 3\n", "unknown key"),
        ("[[taks]]\nname = 'x'\n", "unknown key"),
        ('[[task]]\nname = "blimp"\nitems = 0\n', "items"),
        ('[[task]]\nname = "blimp"\n[[task]]\nname = "blimp"\n', "occurs twice"),
        ('[[text]]\nname = ""\n', "name"),
        ("[generation]\nprompts = 33\n", "33 prompts"),
        ("[generation]\nprompts = 0\n", "0 prompts"),
        ("[generation]\nprompts = []\n", "prompts"),
        ("[[task]\n", "not TOML"),
    ],
)
def test_what_is_wrong_is_told(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_suite(write(tmp_path / "s.toml", text))
    assert words in caught.value.message


def test_a_missing_suite_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_suite("smoek")
    assert "nightly" in caught.value.hint
    with pytest.raises(UserError):
        load_suite(tmp_path)


def test_the_hash_covers_content_and_order_and_the_files(tmp_path: Path) -> None:
    first = load_suite(write(tmp_path / "s.toml", GOOD))
    commented = load_suite(write(tmp_path / "s.toml", "# a comment\n" + GOOD))
    assert first.sha256() == commented.sha256()
    assert first.sha256() != load_suite(write(tmp_path / "s.toml", GOOD.replace("5", "6"))).sha256()
    assert first.sha256() != first.model_copy(update={"tasks": []}).sha256()
    task = write(tmp_path / "mine.jsonl", '{"prompt": "a", "reference": "b"}\n')
    own = Suite(name="s", tasks=[SuiteTask(name=str(task))])
    before = own.sha256()
    write(task, '{"prompt": "a", "reference": "c"}\n')
    assert own.sha256() != before
    moved = task.rename(tmp_path / "sub.jsonl").rename(task)
    assert Suite(name="s", tasks=[SuiteTask(name=str(moved))]).sha256() == own.sha256()


def test_tasks_as_they_are_named_on_the_command_line() -> None:
    assert task_of("blimp") == SuiteTask(name="blimp")
    assert task_of("blimp:500") == SuiteTask(name="blimp", items=500)
    assert task_of("dir/mine.jsonl:10") == SuiteTask(name="dir/mine.jsonl", items=10)
    assert task_of("C:mine.jsonl").items is None
    with pytest.raises(UserError):
        task_of("")


def test_prompts_are_the_first_of_those_that_ship() -> None:
    assert packaged_prompts(3) == packaged_prompts(32)[:3]
    assert len(set(packaged_prompts(32))) == 32


def test_the_harness_is_light_to_import() -> None:
    """Records and reports import scores and suites; lm-eval, datasets and torch wait until tasks are run."""
    code = (
        "import sys, compress.evaluation.suites, compress.evaluation.samples, compress.evaluation.harness\n"
        "print(*sorted({n.split('.')[0] for n in sys.modules} & {'torch', 'transformers', 'lm_eval', 'datasets'}))"
    )
    environment = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert (result.stdout.strip(), result.returncode) == ("", 0), result.stderr
