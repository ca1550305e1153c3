"""The packaged tasks and suites: every one resolves, what ships equals what the whole data gives, prompts are right."""

from __future__ import annotations

import json
import lzma
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from compress import content
from compress.artifact.canonical import sha256_file
from compress.errors import UserError
from compress.evaluation.harness import data, rows
from compress.evaluation.harness.data import catalogue
from compress.evaluation.harness.definitions import definition, from_data, from_shipped, packaged_tasks
from compress.evaluation.harness.resolved import data_sha256
from compress.evaluation.harness.run import resolve
from compress.evaluation.harness.templates import quiet
from compress.evaluation.suites import SEED, SuiteTask, load_suite, packaged_suites

EVAL = Path(content.eval_dir())
SIZES = {
    "blimp": 67000,
    "tales_cloze": 560,
    "lambada_openai": 5153,
    "hellaswag": 10042,
    "arc_easy": 2376,
    "arc_challenge": 1170,
    "piqa": 1838,
    "winogrande": 1267,
    "wsc": 273,
    "boolq": 3270,
    "openbookqa": 500,
    "copa": 100,
    "mmlu": 14042,
    "truthfulqa_mc1": 817,
    "gsm8k": 1319,
    "humaneval": 164,
}


def documents(name: str, items: int | None) -> tuple[Any, list[Any]]:
    """lm-eval's task object and its documents."""
    from lm_eval.tasks import TaskManager

    with quiet():
        task = resolve(SuiteTask(name=name, items=items), trust_code=True)
        made = TaskManager(include_defaults=False).load([task.config])["tasks"][name]
        made.set_config("num_fewshot", made.config.num_fewshot or 0)
        made.set_fewshot_seed(SEED)
        return made, list(made.eval_docs)


def test_every_task_is_known() -> None:
    assert set(packaged_tasks()) == set(SIZES)
    for name in packaged_tasks():
        assert len(definition(name).about) > 60


@pytest.mark.parametrize("name", sorted(SIZES))
def test_every_task_makes_requests(name: str, shared: Path) -> None:
    made, docs = documents(name, 5)
    assert len(docs) == 5
    for doc in docs:
        with quiet():
            context = made.fewshot_context(doc, num_fewshot=made.config.num_fewshot)
            requests = made.construct_requests(doc, context, metadata=(name, 0, 1))
        for request in requests if isinstance(requests, list) else [requests]:
            assert all("{{" not in str(part) for part in request.args)
            if made.OUTPUT_TYPE != "generate_until":
                assert request.args[1].strip()


@pytest.mark.parametrize("name", sorted(set(SIZES) - {"tales_cloze"}))
def test_every_task_has_all_its_items(name: str, shared: Path) -> None:
    task = resolve(SuiteTask(name=name), trust_code=True)
    assert task.rows is not None
    assert len(task.rows) == SIZES[name]
    assert list(task.rows) == sorted(task.rows)


SHIPPED = {path.removeprefix("tasks/").removesuffix(".jsonl"): entry["items"]
           for path, entry in catalogue()["shipped"].items() if path.startswith("tasks/")}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_what_ships_is_what_the_whole_data_gives(name: str, shared: Path) -> None:
    for items in {1, 50, SHIPPED[name]}:
        task = SuiteTask(name=name, items=items)
        shipped, whole = from_shipped(task), from_data(task, definition(name).data)
        assert shipped == whole
        assert shipped is not None
        assert list(shipped) == list(whole)
        assert data_sha256(shipped) == data_sha256(whole)
    assert from_shipped(SuiteTask(name=name)) is None
    assert from_shipped(SuiteTask(name=name, items=50, seed=SEED + 1)) is None
    assert from_shipped(SuiteTask(name=name, items=SHIPPED[name] + 1)) is None


def test_choices_hold_each_other_and_keep_proportions() -> None:
    few, many = (resolve(SuiteTask(name="blimp", items=items)).rows or {} for items in (67, 670))
    assert set(few) < set(many)
    assert set(Counter(row["uid"] for row in few.values()).values()) == {1}
    assert set(Counter(row["uid"] for row in many.values()).values()) == {10}


def test_smoke_and_pr_need_no_data_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_directories", list)
    for suite in ("smoke", "pr"):
        for task in load_suite(suite).tasks:
            assert len(resolve(task).rows or {}) == (task.items or SIZES[task.name])


def test_every_suite_resolves(shared: Path) -> None:
    assert set(packaged_suites()) == {"smoke", "pr", "nightly", "release"}
    for name in packaged_suites():
        for task in load_suite(name).tasks:
            assert task.items is None or task.items <= SIZES[task.name]
            assert not definition(task.name).executes


@pytest.mark.parametrize(
    ("name", "context", "continuations"),
    [
        ("arc_easy", r"Question: .*\nAnswer:", r" .+"),
        ("piqa", r"Question: .*\nAnswer:", r" .+"),
        ("truthfulqa_mc1", r"Q: .*\nA:", r" .+"),
        ("copa", r".*, (therefore|because)", r" .+"),
        ("mmlu", r"The following are multiple choice questions.*Answer: [ABCD]\n\n.*Answer:", r" [ABCD]"),
        ("blimp", r"", r"[A-Z].*\."),
        ("boolq", r"Passage: .*", r" (no|yes)"),
    ],
)
def test_prompts(name: str, context: str, continuations: str, shared: Path) -> None:
    made, docs = documents(name, 3)
    for doc in docs:
        with quiet():
            given = made.fewshot_context(doc, num_fewshot=made.config.num_fewshot)
            requests = made.construct_requests(doc, given, metadata=(name, 0, 1))
        assert re.fullmatch(context, given, re.DOTALL)
        assert all(re.fullmatch(continuations, request.args[1], re.DOTALL) for request in requests)


def test_mmlu_shots_are_the_subject_s_own(shared: Path) -> None:
    task = resolve(SuiteTask(name="mmlu", items=57))
    dev: dict[str, list[str]] = {}
    for row in rows.jsonl(shared / "data" / "mmlu" / "mmlu_dev.jsonl"):
        dev.setdefault(row["subject"], []).append(row["question"].strip())
    for row in (task.rows or {}).values():
        assert row["shots"].count("Answer:") == 5
        assert all(question in row["shots"] for question in dev[row["subject"]])


def test_gsm8k_answers_are_found(shared: Path) -> None:
    made, docs = documents("gsm8k", 4)
    assert made.config.num_fewshot == 5
    with quiet():
        context = made.fewshot_context(docs[0], num_fewshot=5)
    assert context.count("#### ") == 5
    scored = made.process_results(docs[0], [docs[0]["answer"].split("#### ")[1].replace(",", "")])
    assert scored == {"exact_match": 1.0}
    assert made.process_results(docs[0], ["-1"]) == {"exact_match": 0.0}


def test_code_is_not_executed_unasked(shared: Path) -> None:
    with pytest.raises(UserError, match="executes code") as caught:
        resolve(SuiteTask(name="humaneval"))
    assert "--trust-code" in caught.value.hint


def test_too_many_items_and_unknown_names(shared: Path) -> None:
    with pytest.raises(UserError, match="has 100 items, not 101"):
        resolve(SuiteTask(name="copa", items=101))
    with pytest.raises(UserError, match="hellaswag"):
        resolve(SuiteTask(name="helaswag"))


def test_the_catalogue_describes_what_ships() -> None:
    for path, entry in catalogue()["shipped"].items():
        file = EVAL / "data" / path
        assert sha256_file(file) == entry["sha256"]
        assert len(file.read_text(encoding="utf-8").splitlines()) == entry["items"]
    files = {str(file.relative_to(EVAL / "data")) for file in (EVAL / "data").rglob("*") if file.is_file()}
    assert files == {*catalogue()["shipped"], "catalogue.toml", "SOURCE.md"}
    assert sum((EVAL / "data" / file).stat().st_size for file in files) < 1_500_000


def test_the_source_note_names_every_file() -> None:
    note = (EVAL / "data" / "SOURCE.md").read_text(encoding="utf-8")
    for path, entry in catalogue()["shipped"].items():
        assert path in note
        assert entry["sha256"] in note


def test_every_cloze_item_is_held_out_and_answered_by_its_passage(shared: Path) -> None:
    text = (shared / "data" / "tales" / "tales_test.txt").read_text(encoding="utf-8").replace("\n", " ")
    calibration = (Path(content.calibration_dir()) / "tales.txt").read_text(encoding="utf-8")
    for line in (EVAL / "data" / "cloze.jsonl").read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        assert item["word"].lower() in re.findall(r"[a-z]+", item["context"].lower())
        longest = max(item["context"].split("\n"), key=len)[-60:]
        assert longest in text
        assert longest not in calibration


@pytest.mark.slow
def test_the_cloze_is_made_by_its_script(shared: Path) -> None:
    from scripts.build_cloze import build

    tales = shared / "data" / "tales"
    with lzma.open(tales / "tales_train.txt.xz", "rt", encoding="utf-8") as file:
        items, prompts = build((tales / "tales_test.txt").read_text(encoding="utf-8"), file.read())
    assert "".join(f"{line}\n" for line in items) == (EVAL / "data" / "cloze.jsonl").read_text(encoding="utf-8")
    assert "".join(f"{line}\n" for line in prompts) == (EVAL / "data" / "prompts.jsonl").read_text(encoding="utf-8")


def test_no_answer_of_truthfulqa_is_empty(tmp_path: Path) -> None:
    """Some of its lists end in a separator, behind which an empty answer would win by its length."""
    file = tmp_path / "TruthfulQA.csv"
    file.write_text('Question,Category,Best Answer,Incorrect Answers\nWhy?,Myths,Because,"Never; Always; "\n')
    (row,) = rows.READERS["truthfulqa"](file, None)
    assert row["choices"] == ["Because", "Never", "Always"]
