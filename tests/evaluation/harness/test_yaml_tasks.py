"""The user's own lm-eval YAML: scored as lm-eval scores it, and nothing executed without leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.errors import UserError
from compress.evaluation.harness import run_tasks
from compress.evaluation.harness.run import resolve
from compress.evaluation.suites import SuiteTask
from compress.runtime.transformers_backend import TransformersRuntime, load

BASE: dict[str, Any] = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_choice": "{{[a, b]}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [{"metric": "acc"}],
}
TRAP = "import pathlib\npathlib.Path(__file__).with_name('executed').touch()\ndef f(*a, **k):\n    return 'x'\n"


@pytest.fixture(scope="module")
def runtime(packaged_model: Path) -> TransformersRuntime:
    return load(packaged_model, device="cpu")


@pytest.fixture(autouse=True)
def _private_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"q": "Once upon a", "a": "time", "b": f"zebra {n} telephone", "gold": 0} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "trap.py").write_text(TRAP)
    return tmp_path


def write(folder: Path, **changes: Any) -> SuiteTask:
    config = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    return SuiteTask(name=str(folder / "mine.yaml"))


def test_a_task_with_its_data_beside_it(runtime: TransformersRuntime, folder: Path) -> None:
    (found,) = run_tasks(runtime, [write(folder)])
    assert (found.name, found.kind, found.metric, found.correct) == ("mine", "multiple_choice", "acc", [1] * 6)
    assert found.item_ids == [f"{number:06d}" for number in range(6)]
    assert found.chance == 0.5


def test_nothing_is_printed(runtime: TransformersRuntime, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tasks = [write(folder), SuiteTask(name="tales_cloze", items=2), SuiteTask(name="blimp", items=2)]
    run_tasks(runtime, tasks)
    assert capfd.readouterr() == ("", "")


def test_chosen_items_keep_their_numbers(runtime: TransformersRuntime, folder: Path) -> None:
    (whole,) = run_tasks(runtime, [write(folder)])
    (chosen,) = run_tasks(runtime, [SuiteTask(name=str(folder / "mine.yaml"), items=3)])
    assert len(chosen.items) == 3
    by_id = {item.item_id: item for item in whole.items}
    for item in chosen.items:
        assert item.doc_hash == by_id[item.item_id].doc_hash
        assert item.choice_lls == pytest.approx(by_id[item.item_id].choice_lls, rel=1e-6)
    with pytest.raises(UserError, match="6 items, not 7"):
        run_tasks(runtime, [SuiteTask(name=str(folder / "mine.yaml"), items=7)])


def test_included_files_are_read(runtime: TransformersRuntime, folder: Path) -> None:
    (folder / "base.yaml").write_text(yaml.safe_dump({**BASE, "task": "base"}))
    (folder / "mine.yaml").write_text(yaml.safe_dump({"include": "base.yaml", "task": "mine"}))
    (found,) = run_tasks(runtime, [SuiteTask(name=str(folder / "mine.yaml"))])
    assert (found.name, len(found.items)) == ("mine", 6)


def refused(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        resolve(SuiteTask(name=str(folder / "mine.yaml")))
    assert not (folder / "executed").exists()
    return caught.value.message


FUNCTION = "!function trap.f"


@pytest.mark.parametrize("key", ["doc_to_text", "process_docs", "process_results", "custom_dataset", "class"])
def test_functions_are_refused(key: str, folder: Path) -> None:
    text = yaml.safe_dump({name: value for name, value in BASE.items() if name != key}) + f"{key}: {FUNCTION}\n"
    assert "executes" in refused(folder, text)


def test_functions_of_an_included_file_are_refused(folder: Path) -> None:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE) + f"process_docs: {FUNCTION}\n")
    assert "trap.f" in refused(folder, "include: base.yaml\ntask: mine\n")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset_path": "./load.py"}, "reads its data"),
        ({"dataset_path": "pandas"}, "reads its data"),
        ({"dataset_path": None}, "reads its data"),
        ({"unsafe_code": True}, "unsafe_code"),
        ({"use_prompt": "promptsource:x"}, "use_prompt"),
        ({"metric_list": [{"metric": "code_eval"}]}, "code_eval"),
        ({"metric_list": [{"metric": "exact_match", "hf_evaluate": True}]}, "exact_match"),
        ({"metric_list": [{"metric": "bleu"}]}, "bleu"),
        (
            {"metric_list": [{"metric": "brier_score"}]},
            "right or wrong (it has brier_score)",
        ),
        ({"output_type": "loglikelihood_rolling"}, "neither right nor wrong"),
        ({"task": ["a", "b"]}, "no name"),
    ],
)
def test_other_ways_to_execute_and_other_kinds_are_refused(changes: dict[str, Any], words: str, folder: Path) -> None:
    write(folder, **changes)
    assert words in refused(folder, (folder / "mine.yaml").read_text())


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "!!python/object/apply:os.getcwd []", "include: mine.yaml\n"])
def test_what_is_no_task_is_refused(text: str, folder: Path) -> None:
    assert "mine.yaml" in refused(folder, text)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ q.__class__.__base__ }}",
        "{% for x in [] %}{% endfor %}{{ lipsum.__globals__['os'].getcwd() }}",
    ],
)
def test_templates_cannot_reach_python(template: str, runtime: TransformersRuntime, folder: Path) -> None:
    with pytest.raises(UserError, match="mine"):
        run_tasks(runtime, [write(folder, doc_to_text=template)])


def test_mistakes_in_a_task_are_told_as_such(runtime: TransformersRuntime, folder: Path) -> None:
    with pytest.raises(UserError, match=r"lm-eval cannot run mine: .*nothing"):
        run_tasks(runtime, [write(folder, doc_to_text="{{nothing}}")])
    with pytest.raises(UserError, match="mine"):
        run_tasks(runtime, [write(folder, dataset_kwargs={"data_files": {"test": "none.jsonl"}})])


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # lm-eval's own division by the length
def test_an_empty_choice_never_wins_by_its_length(runtime: TransformersRuntime, folder: Path) -> None:
    rows = [["time", "zebra"]] + [["time", ""]] * 5  # lm-eval looks at the first row's choices and refuses empty ones
    (folder / "rows.jsonl").write_text("".join(json.dumps({"q": "Once upon a", "c": row}) + "\n" for row in rows))
    task = write(folder, doc_to_choice="c", doc_to_target=0, metric_list=[{"metric": "acc_norm"}])
    (found,) = run_tasks(runtime, [task])
    assert found.correct == [1] * 6
    assert [item.pred for item in found.items] == [0] * 6


def test_code_runs_when_it_is_trusted(runtime: TransformersRuntime, folder: Path) -> None:
    (folder / "trap.py").write_text(TRAP.replace("return 'x'", "return a[0]['q']"))
    text = yaml.safe_dump({name: value for name, value in BASE.items() if name != "doc_to_text"})
    (folder / "mine.yaml").write_text(text + f"doc_to_text: {FUNCTION}\n")
    (found,) = run_tasks(runtime, [SuiteTask(name=str(folder / "mine.yaml"))], trust_code=True)
    assert found.correct == [1] * 6
    assert (folder / "executed").exists()
