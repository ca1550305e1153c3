"""The user's own JSONL: every way of matching, choices, a Python scorer, and everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.errors import CompressError, UserError, WorkError
from compress.evaluation.harness import TaskScores, pair, run_tasks
from compress.evaluation.harness.matching import is_right
from compress.evaluation.harness.run import resolve
from compress.evaluation.suites import SuiteTask
from compress.runtime.protocol import SamplingParams
from compress.runtime.transformers_backend import TransformersRuntime, load

PROMPTS = ["Once upon a time", "The king said", "In the forest"]


@pytest.fixture(scope="module")
def runtime(packaged_model: Path) -> TransformersRuntime:
    return load(packaged_model, device="cpu")


@pytest.fixture(scope="module")
def answers(runtime: TransformersRuntime) -> list[str]:
    """What the model answers, whatever it is."""
    prompts = [runtime.encode_prompt(prompt) for prompt in PROMPTS]
    found = runtime.generate(prompts, SamplingParams(max_tokens=8, stop=("\n",)))
    assert all(answer.text.strip() for answer in found)
    return [answer.text for answer in found]


def write(path: Path, *lines: Any) -> SuiteTask:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return SuiteTask(name=str(path))


def score(runtime: TransformersRuntime, task: SuiteTask, **options: Any) -> TaskScores:
    (found,) = run_tasks(runtime, [task], **options)
    return found


BEGIN = {"settings": {"max_tokens": 8}}


def test_exact_contains_and_regex(runtime: TransformersRuntime, answers: list[str], tmp_path: Path) -> None:
    first, second, third = answers
    task = write(
        tmp_path / "mine.jsonl",
        BEGIN,
        {"prompt": PROMPTS[0], "reference": f"  {first.strip()} "},
        {"prompt": PROMPTS[0], "reference": first.strip() + "x"},
        {"prompt": PROMPTS[1], "reference": ["no", second.strip().split()[-1]], "match": "contains"},
        {"prompt": PROMPTS[0], "reference": first.strip().upper(), "match": "contains"},
        {"prompt": PROMPTS[2], "reference": r"^\s*\S+", "match": "regex"},
        {"prompt": PROMPTS[2], "reference": r"\d{5}", "match": "regex"},
    )
    found = score(runtime, task)
    assert found.correct == [1, 0, 1, 0, 1, 0]
    assert (found.name, found.kind, found.metric, found.chance) == ("mine", "generate", "acc", 0.0)
    assert found.items[4].answer == found.items[5].answer == third
    assert pair(found, found).gates is False


def test_exact_only_is_an_exact_match(runtime: TransformersRuntime, answers: list[str], tmp_path: Path) -> None:
    task = write(tmp_path / "mine.jsonl", BEGIN, {"prompt": PROMPTS[0], "reference": answers[0].strip(), "id": "one"})
    found = score(runtime, task)
    assert (found.metric, found.correct, found.item_ids) == ("exact_match", [1], ["one"])


def test_choices(runtime: TransformersRuntime, tmp_path: Path) -> None:
    task = write(
        tmp_path / "mine.jsonl",
        {"prompt": "Once upon a", "choices": ["time", "zebra telephone"], "reference": 0, "cluster": "tales"},
        {
            "prompt": "Once upon a",
            "choices": ["time", "zebra telephone"],
            "reference": "zebra telephone",
            "cluster": "x",
        },
        {"prompt": "The king and the\n", "choices": ["queen", "oxide", "of"], "reference": 0, "cluster": "x"},
    )
    found = score(runtime, task)
    assert (found.kind, found.metric, found.correct[:2]) == ("multiple_choice", "acc", [1, 0])
    assert found.chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)
    assert found.clusters == ("tales", "x", "x")
    assert len(found.items[2].choice_lls or ()) == 3


def test_a_choice_of_items_and_its_order(runtime: TransformersRuntime, tmp_path: Path) -> None:
    lines = [{"prompt": "a", "choices": ["b", "c"], "reference": 0, "id": f"i{n}"} for n in (3, 1, 2)]
    task = write(tmp_path / "mine.jsonl", *lines)
    assert score(runtime, task).item_ids == ["i1", "i2", "i3"]
    assert len(resolve(SuiteTask(name=task.name, items=2)).rows or {}) == 2
    with pytest.raises(UserError, match="3 items, not 4"):
        resolve(SuiteTask(name=task.name, items=4))


def test_the_hashes_follow_the_file(tmp_path: Path) -> None:
    line = {"prompt": "a", "reference": "b"}
    first = resolve(write(tmp_path / "a.jsonl", line))
    assert resolve(write(tmp_path / "a.jsonl", {"settings": {}}, line)).config_sha256 == first.config_sha256
    assert resolve(write(tmp_path / "a.jsonl", BEGIN, line)).config_sha256 != first.config_sha256


SCORER = """
from pathlib import Path
Path(__file__).with_name("executed").touch()

def longer(prompt, answer, item):
    return len(answer) > item["reference"]

def bad(prompt, answer, item):
    return 0.5

def broken(prompt, answer, item):
    raise KeyError("no")
"""


@pytest.fixture
def scorer(tmp_path: Path) -> Path:
    (tmp_path / "score.py").write_text(SCORER)
    return tmp_path


def scored(scorer: Path, name: str) -> SuiteTask:
    settings = {"settings": {"scorer": f"score.py:{name}", "max_tokens": 8}}
    lines = [{"prompt": PROMPTS[0], "reference": str(size)} for size in (1,)]
    return write(scorer / "mine.jsonl", settings, *lines)


def test_a_scorer_is_executed_only_when_allowed(runtime: TransformersRuntime, scorer: Path) -> None:
    text = SCORER.replace('item["reference"]', 'int(item["reference"])')
    (scorer / "score.py").write_text(text)
    task = scored(scorer, "longer")
    with pytest.raises(UserError, match=r"score\.py:longer") as caught:
        run_tasks(runtime, [task])
    assert "--trust-code" in caught.value.hint
    assert not (scorer / "executed").exists()
    assert score(runtime, task, trust_code=True).correct == [1]
    assert (scorer / "executed").exists()
    before = resolve(task, trust_code=True).config_sha256
    (scorer / "score.py").write_text(text + "\n# changed\n")
    assert resolve(task, trust_code=True).config_sha256 != before


@pytest.mark.parametrize(("name", "words"), [("bad", "gave 0.5"), ("broken", "KeyError")])
def test_a_scorer_that_fails_is_told(name: str, words: str, runtime: TransformersRuntime, scorer: Path) -> None:
    with pytest.raises(WorkError, match=words):
        run_tasks(runtime, [scored(scorer, name)], trust_code=True)


@pytest.mark.parametrize("spec", ["score.py", "none.py:f", "score.py:nothing", "score.py:a b"])
def test_a_scorer_that_is_not_there_is_told(spec: str, scorer: Path) -> None:
    task = write(scorer / "m.jsonl", {"settings": {"scorer": spec}}, {"prompt": "a", "reference": "b"})
    with pytest.raises(UserError, match=r"scorer|function"):
        resolve(task, trust_code=True)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["{"], "line 1: not JSON"),
        ([""], "no items"),
        (['{"prompt": "a"}'], "`reference`"),
        (['{"reference": "a"}'], "prompt: missing"),
        (['{"prompt": "a", "referense": "b"}'], "did you mean `reference`"),
        (['{"prompt": "a", "reference": ""}'], "`reference`"),
        (['{"prompt": "a", "reference": ["b", ""]}'], "empty reference"),
        (['{"prompt": "", "reference": "b"}'], "prompt is empty"),
        (['{"prompt": "a", "reference": 3}'], "`reference`"),
        (['{"prompt": "a", "reference": "(", "match": "regex"}'], "no regular expression"),
        (['{"prompt": "a", "reference": "b", "match": "fuzzy"}'], "not known"),
        (['{"prompt": "a", "choices": ["b"], "reference": 0}'], "at least 2 entries; it has 1"),
        (['{"prompt": "a", "choices": ["b", "b"], "reference": 0}'], "choices"),
        (['{"prompt": "a", "choices": ["b", "c"], "reference": 2}'], "choice or its index"),
        (['{"prompt": "a", "choices": ["b", "c"], "reference": "d"}'], "choice or its index"),
        (['{"prompt": "a", "choices": ["b", "c"], "reference": 0}', '{"prompt": "a", "reference": "b"}'], "mixes"),
        (['{"prompt": "a", "reference": "b", "id": "x"}'] * 2, "occurs twice"),
        (['{"settings": {"max_tokens": 0}}', '{"prompt": "a", "reference": "b"}'], "max_tokens"),
        (["[1]"], "mapping"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(lines: list[str], words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(CompressError) as caught:
        resolve(SuiteTask(name=str(path)))
    assert isinstance(caught.value, UserError)
    assert words in caught.value.message


def test_missing_files_and_equal_names(runtime: TransformersRuntime, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        resolve(SuiteTask(name=str(tmp_path / "none.jsonl")))
    (tmp_path / "d").mkdir()
    tasks = [write(place / "same.jsonl", {"prompt": "a", "reference": "b"}) for place in (tmp_path, tmp_path / "d")]
    with pytest.raises(UserError, match="two tasks"):
        run_tasks(runtime, tasks)


@pytest.mark.parametrize(
    ("answer", "references", "match", "ignore_case", "right"),
    [
        (" Paris\n", ["Paris"], "exact", False, True),
        ("paris", ["Paris"], "exact", False, False),
        ("paris", ["Paris"], "exact", True, True),
        ("It is Paris.", ["Rome", "Paris"], "contains", False, True),
        ("It is PARIS.", ["paris"], "contains", True, True),
        ("It is Par is.", ["Paris"], "contains", False, False),
        ("about 42 km", [r"\b\d+ km"], "regex", False, True),
        ("about 42 KM", [r"\b\d+ km"], "regex", True, True),
        ("about 42 KM", [r"\b\d+ km"], "regex", False, False),
    ],
)
def test_matching(answer: str, references: list[str], match: Any, ignore_case: bool, right: bool) -> None:
    assert is_right(answer, references, match, ignore_case) is right
