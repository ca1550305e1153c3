"""What an evaluation scores: a suite, changed by what the caller asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import UserError
from compress.evaluation.scope import resolve
from compress.evaluation.suites import Suite, SuiteGeneration, SuiteTask, SuiteText, load_suite

SUITE = Suite(
    name="mine",
    texts=[SuiteText(name="tales_heldout", max_tokens=5000), SuiteText(name="wikitext-2")],
    tasks=[SuiteTask(name="blimp", items=10), SuiteTask(name="wsc")],
    generation=SuiteGeneration(prompts=("Once",)),
)


def test_without_anything_the_packaged_text_is_scored() -> None:
    suite, record = resolve()
    assert record is None
    assert (suite.texts, suite.tasks, suite.generation, suite.cost) == (
        [SuiteText(name="tales_heldout")],
        [],
        None,
        False,
    )


def test_a_suite_is_named_and_hashed_as_it_is() -> None:
    suite, record = resolve(SUITE)
    assert suite == SUITE
    assert record is not None
    assert (record.name, record.sha256) == ("mine", SUITE.sha256())
    shipped = resolve("smoke")
    assert shipped.record is not None
    assert (shipped.record.name, shipped.record.sha256) == ("smoke", load_suite("smoke").sha256())


def test_changes_show_in_the_hash() -> None:
    changed = [
        resolve(SUITE, data="tales_heldout"),
        resolve(SUITE, tasks=["blimp:20"]),
        resolve(SUITE, tasks=["piqa"]),
        resolve(SUITE, max_tokens=3000),
        resolve(SUITE, seq_len=64),
        resolve(SUITE, cost=True),
    ]
    hashes = {scope.record.sha256 for scope in changed if scope.record is not None}
    assert len(hashes | {SUITE.sha256()}) == 7


def test_data_takes_the_texts_place_and_limits_hold_for_all() -> None:
    assert resolve(SUITE, data="notes.txt").suite.texts == [SuiteText(name="notes.txt")]
    limited = resolve(SUITE, max_tokens=3000, seq_len=64).suite.texts
    assert [(t.name, t.max_tokens, t.seq_len) for t in limited] == [
        ("tales_heldout", 3000, 64),
        ("wikitext-2", 3000, 64),
    ]


def test_tasks_are_added_or_replace_their_namesake() -> None:
    tasks = resolve(SUITE, tasks=["piqa", "blimp:20", SuiteTask(name="wsc", items=3)]).suite.tasks
    assert [(t.name, t.items) for t in tasks] == [("blimp", 20), ("wsc", 3), ("piqa", None)]


def test_tasks_or_cost_alone_score_no_text() -> None:
    assert resolve(tasks=["blimp"]).suite.texts == []
    assert resolve(cost=True).suite.texts == []
    assert resolve(tasks=["blimp"], data="tales_heldout").suite.texts == [SuiteText(name="tales_heldout")]


@pytest.mark.parametrize("limit", [{"max_tokens": 100}, {"seq_len": 64}])
def test_limits_without_a_text_are_refused(limit: dict[str, int]) -> None:
    with pytest.raises(UserError, match="no text is to be scored"):
        resolve(tasks=["blimp"], **limit)


def test_missing_suites_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no suite"):
        resolve(tmp_path / "nothing.toml")
