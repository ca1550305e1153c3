"""The response cache: never shared, never torn, and a run that was killed gives what an undisturbed one gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from compress.errors import WorkError
from compress.evaluation.harness import ResponseCache, TaskScores, run_tasks
from compress.evaluation.suites import SuiteTask
from compress.runtime.transformers_backend import TransformersRuntime, load

TASKS = [SuiteTask(name="blimp", items=134), SuiteTask(name="winogrande", items=20)]
IDENTITY = {"model": "a" * 64, "kernel": "dense", "dtype": "float32"}


class Counting:
    """A progress that counts steps, and can stop a run."""

    def __init__(self, limit: int | None = None) -> None:
        self.totals: list[int] = []
        self.steps = 0
        self._limit = limit

    def begin(self, what: str, total: int) -> None:
        self.totals.append(total)

    def advance(self, note: str = "") -> None:
        self.steps += 1
        if self.steps == self._limit:
            raise KeyboardInterrupt

    def end(self) -> None: ...

    def warn(self, message: str) -> None: ...


def test_what_was_put_comes_back_after_reopening(tmp_path: Path) -> None:
    first = ResponseCache(tmp_path, IDENTITY)
    assert first.get([1, 2]) is None
    first.put([1, 2], [[-1.5, True]])
    first.put({"prompt": "x"}, "answer\n")
    again = ResponseCache(tmp_path, IDENTITY)
    assert again.get([1, 2]) == [[-1.5, True]]
    assert again.get({"prompt": "x"}) == "answer\n"
    assert again.get([2, 1]) is None


@pytest.mark.parametrize("change", [{"model": "b" * 64}, {"kernel": "cpu"}, {"dtype": "bfloat16"}, {"threads": 2}])
def test_nothing_is_shared_between_circumstances(change: dict[str, Any], tmp_path: Path) -> None:
    ResponseCache(tmp_path, IDENTITY).put([1], [[-1.0, True]])
    other = ResponseCache(tmp_path, {**IDENTITY, **change})
    assert other.get([1]) is None
    assert len(list((tmp_path / "tasks").iterdir())) == 2


def test_another_lm_eval_is_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    ResponseCache(tmp_path, IDENTITY).put([1], [[-1.0, True]])
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "9.9" if name == "lm-eval" else real(name))
    assert ResponseCache(tmp_path, IDENTITY).get([1]) is None


def test_a_line_cut_short_or_changed_is_not_there(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path, IDENTITY)
    for number in range(3):
        cache.put([number], [[-float(number), False]])
    data = cache.path.read_bytes()
    cache.path.write_bytes(data[:-7])
    torn = ResponseCache(tmp_path, IDENTITY)
    assert [torn.get([number]) is not None for number in range(3)] == [True, True, False]
    torn.put([9], [[-9.0, True]])  # goes on after the torn line
    assert ResponseCache(tmp_path, IDENTITY).get([9]) == [[-9.0, True]]
    cache.path.write_bytes(data.replace(b"-1.0", b"-1.1"))
    changed = ResponseCache(tmp_path, IDENTITY)
    assert [changed.get([number]) is not None for number in range(3)] == [True, False, True]
    cache.path.write_bytes(b"\xff\x00nonsense\n[1]\n{}\n" + data)
    assert ResponseCache(tmp_path, IDENTITY).get([0]) is not None


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "tasks").write_text("")
    with pytest.raises(WorkError):
        ResponseCache(tmp_path, IDENTITY)


@pytest.fixture(scope="module")
def runtime(packaged_model: Path) -> TransformersRuntime:
    return load(packaged_model, device="cpu")


@pytest.fixture(scope="module")
def undisturbed(runtime: TransformersRuntime) -> list[TaskScores]:
    return run_tasks(runtime, TASKS)


def test_a_stopped_run_goes_on_and_gives_the_same(
    runtime: TransformersRuntime, undisturbed: list[TaskScores], tmp_path: Path
) -> None:
    stopped = Counting(limit=2)
    with pytest.raises(KeyboardInterrupt):
        run_tasks(runtime, TASKS, ResponseCache(tmp_path, IDENTITY), stopped)
    resumed = Counting()
    assert run_tasks(runtime, TASKS, ResponseCache(tmp_path, IDENTITY), resumed) == undisturbed
    assert resumed.totals == [stopped.totals[0] - 2]
    assert resumed.steps == resumed.totals[0]
    third = Counting()
    assert run_tasks(runtime, TASKS, ResponseCache(tmp_path, IDENTITY), third) == undisturbed
    assert third.totals == [0]


def test_generated_answers_are_kept(runtime: TransformersRuntime, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "The king said", "reference": "x"}\n{"prompt": "Once", "reference": "y"}\n')
    tasks = [SuiteTask(name=str(file))]
    first, second = Counting(), Counting()
    scores = run_tasks(runtime, tasks, ResponseCache(tmp_path, IDENTITY), first)
    assert run_tasks(runtime, tasks, ResponseCache(tmp_path, IDENTITY), second) == scores
    assert (first.totals, second.totals) == ([2], [0])


DRIVER = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from compress.evaluation.harness import ResponseCache, run_tasks
from compress.evaluation.suites import SuiteTask
from compress.runtime.transformers_backend import load
from tests.evaluation.harness.test_cache import IDENTITY, TASKS
cache = ResponseCache(sys.argv[1], IDENTITY)
put = cache.put
def slowly(request, answers):
    put(request, answers)
    print("kept", flush=True)
    import time; time.sleep(0.3)
cache.put = slowly
run_tasks(load(sys.argv[2], device="cpu"), TASKS, cache)
"""


@pytest.mark.parametrize("moment", [1, 2])
def test_a_killed_process_loses_at_most_what_is_in_flight(
    moment: int, runtime: TransformersRuntime, undisturbed: list[TaskScores], packaged_model: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), str(packaged_model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).resolve().parents[3],
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for _ in range(moment):
        assert process.stdout.readline() == "kept\n"
    time.sleep(0.05 * moment)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (file,) = (tmp_path / "tasks").iterdir()
    kept = sum("key" in json.loads(line) for line in file.read_text().splitlines() if line.endswith("}"))
    assert kept >= moment
    resumed, fresh = Counting(), Counting()
    assert run_tasks(runtime, TASKS, ResponseCache(tmp_path, IDENTITY), resumed) == undisturbed
    run_tasks(runtime, TASKS, None, fresh)
    assert 0 < resumed.totals[0] == fresh.totals[0] - kept
