"""A served model scored like a local one, and what happens with servers that lack something."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import UserError, WorkError
from compress.evaluation.harness import ResponseCache, endpoint, run_tasks
from compress.evaluation.harness.endpoint import is_endpoint, open_endpoint
from compress.evaluation.suites import SuiteTask
from compress.runtime.transformers_backend import TransformersRuntime, load
from tests.evaluation.harness.server import serving

TASKS = [
    SuiteTask(name="blimp", items=10),
    SuiteTask(name="winogrande", items=5),
    SuiteTask(name="tales_cloze", items=8),
]


@pytest.fixture(scope="module")
def runtime(packaged_model: Path) -> TransformersRuntime:
    return load(packaged_model, device="cpu")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.delenv(endpoint.KEY_VARIABLE, raising=False)


@pytest.fixture
def mine(tmp_path: Path) -> SuiteTask:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "The king said", "reference": "to", "match": "contains"}\n')
    return SuiteTask(name=str(file))


def test_scores_are_those_of_the_model_behind_it(
    runtime: TransformersRuntime, mine: SuiteTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(runtime) as server:
        served = run_tasks(open_endpoint(server.url), [*TASKS, mine])
    monkeypatch.setattr(runtime, "encode_prompt", lambda text: [0, *runtime.encode(text)])  # as the server reads it
    local = run_tasks(runtime, [*TASKS, mine])
    for ours, theirs in zip(served, local, strict=True):
        assert ours.correct == theirs.correct
        assert (ours.prompts_sha256, ours.data_sha256) == (theirs.prompts_sha256, theirs.data_sha256)
        for a, b in zip(ours.items, theirs.items, strict=True):
            assert (a.choice_lls or ()) == pytest.approx(b.choice_lls or (), rel=1e-5)
            assert (a.nll or 0.0) == pytest.approx(b.nll or 0.0, rel=1e-5)
            assert (a.n_tok, a.n_bytes, a.answer) == (b.n_tok, b.n_bytes, b.answer)


def test_offsets_follow_from_tokens_where_the_server_gives_none(runtime: TransformersRuntime) -> None:
    with serving(runtime) as full, serving(runtime, lacks={"text_offset"}) as bare:
        texts = ["The king said so.", "Once"]
        for text in texts:
            assert open_endpoint(full.url).echo(text) == open_endpoint(bare.url).echo(text)


@pytest.mark.parametrize(
    ("lacks", "words"),
    [
        ("echo", "does not echo"),
        ("logprobs", "no `logprobs`"),
        ("token_logprobs", "no `logprobs`"),
        ("top_logprobs", "no `top_logprobs`"),
        ("permission", "echo is not supported"),
    ],
)
def test_what_is_missing_is_named_where_it_is_needed(
    lacks: str, words: str, runtime: TransformersRuntime, mine: SuiteTask
) -> None:
    with serving(runtime, lacks={lacks}) as server:
        model = open_endpoint(server.url)
        assert words in str(model.missing)
        assert len(run_tasks(model, [mine])[0].items) == 1  # generation works all the same
        with pytest.raises(UserError, match="gives no log-likelihoods") as caught:
            run_tasks(model, TASKS)
        assert words in caught.value.message


def test_a_first_token_without_a_probability_is_refused(runtime: TransformersRuntime) -> None:
    with serving(runtime, begin=False) as server:
        model = open_endpoint(server.url)
        assert len(run_tasks(model, TASKS[1:])[0].items) == 5
        with pytest.raises(UserError, match="first token"):
            run_tasks(model, TASKS[:1])


def test_models_are_chosen_by_name(runtime: TransformersRuntime) -> None:
    with serving(runtime, models=["a", "b"]) as server:
        with pytest.raises(UserError, match="which one"):
            open_endpoint(server.url)
        with pytest.raises(UserError, match="does not serve 'c'"):
            open_endpoint(f"{server.url}#c")
        assert open_endpoint(f"{server.url}/#b").model == "b"
        assert {body["model"] for body in server.asked} == {"b"}


def test_a_busy_server_is_asked_again(runtime: TransformersRuntime, mine: SuiteTask) -> None:
    with serving(runtime) as server:
        model = open_endpoint(server.url)
        server.failures += [429, 503]
        assert len(run_tasks(model, [mine])[0].items) == 1
        assert not server.failures
        server.failures += [500] * endpoint.TRIES
        with pytest.raises(WorkError, match="did not answer") as caught:
            run_tasks(model, [mine])
        assert "failure 500" in caught.value.message


def test_failures_are_told_in_words(runtime: TransformersRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(runtime, key="secret") as server:
        with pytest.raises(UserError, match="401") as caught:
            open_endpoint(server.url)
        assert endpoint.KEY_VARIABLE in caught.value.hint
        monkeypatch.setenv(endpoint.KEY_VARIABLE, "secret")
        assert open_endpoint(server.url).missing is None
    with serving(runtime, lacks={"json"}) as server, pytest.raises(WorkError, match="JSON"):
        open_endpoint(server.url)
    with serving(runtime) as server, pytest.raises(UserError, match="404"):
        open_endpoint(server.url.removesuffix("/v1"))
    with pytest.raises(WorkError, match="did not answer"):
        open_endpoint(server.url)  # it is gone
    for address in ("http://", "http:///v1", "https://#model"):
        with pytest.raises(UserError, match="no address"):
            open_endpoint(address)
    assert is_endpoint("https://example.org/v1")
    assert not is_endpoint("org/name")


def test_answers_are_kept_and_never_shared(runtime: TransformersRuntime, mine: SuiteTask, tmp_path: Path) -> None:
    with serving(runtime) as server:
        model = open_endpoint(server.url)
        cache = {"model": model.digest}
        first = run_tasks(model, [TASKS[1], mine], ResponseCache(tmp_path, cache))
        asked = len(server.asked)
        assert run_tasks(model, [TASKS[1], mine], ResponseCache(tmp_path, cache)) == first
        assert len(server.asked) == asked


def test_another_model_behind_the_address_is_another_model(runtime: TransformersRuntime, tiny: Path) -> None:
    with serving(runtime) as server:
        first, again = open_endpoint(server.url).digest, open_endpoint(server.url).digest
        server.runtime = load(tiny, device="cpu")
        assert first == again != open_endpoint(server.url).digest
