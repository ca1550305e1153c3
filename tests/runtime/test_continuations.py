"""Continuations scored with shared beginnings, against the whole logits of each sequence alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress.errors import UserError, WorkError
from compress.runtime.continuations import Batch, Continuation, Likelihood, Row, plan
from compress.runtime.protocol import SamplingParams
from compress.runtime.transformers_backend import TransformersRuntime, load
from tests.tiny_models import FAMILIES, POSITIONS, VOCABULARY, tiny_tokens

SEQUENCES = st.lists(st.integers(0, 2), min_size=2, max_size=9).map(tuple)
REQUESTS = st.lists(
    SEQUENCES.flatmap(lambda ids: st.builds(Continuation, st.just(ids), st.integers(1, len(ids) - 1))),
    min_size=1,
    max_size=12,
)


def ancestors(row: Row, node: int) -> list[int]:
    """Tokens that a node attends to, by the row's own rule."""
    return [row.tokens[i] for i in range(len(row.tokens)) if i <= node < row.ends[i]]


@settings(max_examples=300, deadline=None)
@given(requests=REQUESTS, hidden=st.sampled_from([1, 4, 1000]), tree_depth=st.sampled_from([None, 5, 100]))
def test_every_token_is_read_once_after_all_before_it(
    requests: list[Continuation], hidden: int, tree_depth: int | None
) -> None:
    batches = plan(requests, batch_tokens=24, scored_tokens=10, hidden=hidden, tree_depth=tree_depth)
    assert sorted(number for batch in batches for number in batch.requests) == list(range(len(requests)))
    read: dict[tuple[int, int], tuple[list[int], int]] = {}
    for batch in batches:
        assert {row.branches for row in batch.rows} == {batch.branches}
        for row in batch.rows:
            assert row.branches is (len(set(row.depths)) < len(row.depths))
            if row.branches:
                assert tree_depth is not None
                assert max(row.depths) < tree_depth
            for item in row.reads:
                assert item.request in batch.requests
                before = ancestors(row, item.node)
                assert len(before) == row.depths[item.node] + 1
                key = (item.request, len(before))
                assert key not in read
                read[key] = (before, item.target)
    for number, request in enumerate(requests):
        for position in range(request.start, len(request.token_ids)):
            expected = (list(request.token_ids[:position]), request.token_ids[position])
            assert read.pop((number, position)) == expected
    assert not read


@settings(max_examples=100, deadline=None)
@given(requests=REQUESTS)
def test_batches_keep_to_their_size(requests: list[Continuation]) -> None:
    for batch in plan(requests, batch_tokens=16, scored_tokens=6, hidden=1000, tree_depth=100):
        if len(batch.rows) > 1:
            assert len(batch.rows) * max(len(row.tokens) for row in batch.rows) <= 16
            assert sum(row.scored for row in batch.rows) <= 6


def test_shared_beginnings_are_computed_once() -> None:
    beginning = tuple(range(20))
    requests = [Continuation((*beginning, 50 + i, 60 + i, 70), 20) for i in range(4)]
    batches = plan(requests, batch_tokens=1000, scored_tokens=1000, hidden=256, tree_depth=100)
    assert [len(row.tokens) for batch in batches for row in batch.rows] == [20 + 4 * 2]
    alone = plan(requests, batch_tokens=1000, scored_tokens=1000, hidden=256, tree_depth=None)
    assert [len(row.tokens) for batch in alone for row in batch.rows] == [22] * 4
    ones = [Continuation((*beginning, 50 + i), 20) for i in range(4)]  # one token each: one sequence serves all
    (single,) = plan(ones, batch_tokens=1000, scored_tokens=1000, hidden=256, tree_depth=None)
    assert [row.tokens for row in single.rows] == [beginning]
    assert single.rows[0].scored == 1


def everything(runtime: TransformersRuntime, requests: list[Continuation]) -> tuple[list[Likelihood], list[Batch]]:
    batches = runtime.plan_continuations(requests)
    found: dict[int, Likelihood] = {}
    for batch in batches:
        found.update(zip(batch.requests, runtime.score_continuations(batch), strict=True))
    return [found[number] for number in range(len(requests))], batches


def oracle(runtime: TransformersRuntime, request: Continuation) -> Likelihood:
    """From the whole logits of the sequence alone, in float64."""
    logits = runtime.score(torch.tensor([request.token_ids[:-1]]))[0, request.start - 1 :].double()
    targets = torch.tensor(request.token_ids[request.start :])
    total = logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).sum()
    return Likelihood(float(total), bool((logits.argmax(-1) == targets).all()))


def tree_requests() -> list[Continuation]:
    """Choices after one context, pairs that share a beginning, duplicates, beginnings of others, and loners."""
    ids = tiny_tokens(12, 24).tolist()
    context = ids[0][:10]
    choices = [Continuation((*context, *ids[k][: 2 + k]), 10) for k in range(1, 5)]
    pairs = [Continuation((*ids[5][:6], *ids[k][:5]), 1) for k in (6, 7)]
    again = [choices[0], Continuation(choices[3].token_ids[:12], 10), Continuation(choices[1].token_ids, 4)]
    loners = [Continuation(tuple(ids[k]), k) for k in range(8, 12)]
    return [*choices, *loners, *pairs, *again]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_scores_are_those_of_each_sequence_alone(model_type: str, tiny: Callable[..., Path]) -> None:
    runtime = load(tiny(model_type), device="cpu")
    requests = tree_requests()
    found, batches = everything(runtime, requests)
    windowed = getattr(runtime.model.config, "sliding_window", None) is not None
    assert any(batch.branches for batch in batches) is not windowed
    for request, ours in zip(requests, found, strict=True):
        expected = oracle(runtime, request)
        assert ours.total == pytest.approx(expected.total, rel=1e-5)
        assert ours.greedy == expected.greedy


def test_greedy_continuations_are_told(tiny: Callable[..., Path]) -> None:
    runtime = load(tiny("llama"), device="cpu")
    prompt = tuple(tiny_tokens(9).tolist())
    given_ids = runtime.generate([prompt], SamplingParams(max_tokens=4, ignore_end=True))[0].token_ids
    other = (given_ids[0], (given_ids[1] + 1) % VOCABULARY)
    requests = [Continuation((*prompt, *given_ids), 9), Continuation((*prompt, *other), 9)]
    assert [found.greedy for found in everything(runtime, requests)[0]] == [True, False]


def test_the_packaged_model_shares(packaged_model: Path) -> None:
    runtime = load(packaged_model, device="cpu")
    context = [runtime.prefix_id, *runtime.encode("The old king had three sons, and the youngest of them was")]
    endings = [" called the fool.", " called the wise.", " a brave boy."]
    requests = [Continuation((*context, *runtime.encode(ending)), len(context)) for ending in endings]  # type: ignore[arg-type]
    found, batches = everything(runtime, requests)
    assert [batch.branches for batch in batches] == [True]
    for request, ours in zip(requests, found, strict=True):
        assert ours.total == pytest.approx(oracle(runtime, request).total, rel=1e-6)


def test_a_model_that_ignores_masks_does_not_share(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load(tiny("llama"), device="cpu")
    forward = runtime.model.forward

    def deaf(*args: Any, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    monkeypatch.setattr(runtime.model, "forward", deaf)
    requests = tree_requests()
    found, batches = everything(runtime, requests)
    assert not any(batch.branches for batch in batches)
    assert found[0].total == pytest.approx(oracle(runtime, requests[0]).total, rel=1e-5)


def test_a_model_that_refuses_masks_does_not_share(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load(tiny("llama"), device="cpu")
    forward = runtime.model.forward
    monkeypatch.setattr(runtime.model, "forward", lambda input_ids, use_cache: forward(input_ids=input_ids))
    assert not any(batch.branches for batch in everything(runtime, tree_requests())[1])


def test_logits_are_taken_only_where_they_are_read(packaged_model: Path) -> None:
    runtime = load(packaged_model, device="cpu")
    rows: list[int] = []
    runtime.model.lm_head.register_forward_hook(lambda _m, _i, output: rows.append(output.numel() // output.shape[-1]))
    request = Continuation(tuple(range(100, 160)), 58)
    (batch,) = runtime.plan_continuations([request])
    rows.clear()  # the trial of the model
    runtime.score_continuations(batch)
    assert rows == [2]


def test_equal_requests_give_equal_batches_and_bits(tiny: Callable[..., Path]) -> None:
    first, second = (everything(load(tiny("llama"), device="cpu"), tree_requests()) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "request_",
    [
        Continuation(tuple(range(POSITIONS + 2)), 1),
        Continuation((1, VOCABULARY), 1),
        Continuation((1, -1), 1),
        Continuation((1, 2), 0),
        Continuation((1, 2), 2),
        Continuation((1,), 1),
    ],
)
def test_what_cannot_be_scored_is_refused(request_: Continuation, tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError):
        load(tiny("llama"), device="cpu").plan_continuations([request_])


def test_the_longest_sequence_fits(tiny: Callable[..., Path]) -> None:
    """The model sees all but the last token, so that one more than the context can be scored."""
    runtime = load(tiny("llama"), device="cpu")
    request = Continuation(tuple(tiny_tokens(POSITIONS + 1).tolist()), 1)
    assert everything(runtime, [request])[0][0].total == pytest.approx(oracle(runtime, request).total, rel=1e-5)


def test_nan_weights_are_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(WorkError, match="not finite"):
        everything(load(copy, device="cpu"), tree_requests())


def test_stop_strings_end_an_answer(packaged_model: Path) -> None:
    runtime = load(packaged_model, device="cpu")
    free = runtime.generate(["Once upon a time"], SamplingParams(max_tokens=24))[0]
    stop = free.text[12:16]
    stopped = runtime.generate(["Once upon a time"], SamplingParams(max_tokens=24, stop=(stop, "never said")))[0]
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) < len(free.token_ids)
    with pytest.raises(UserError, match="stop"):
        SamplingParams(stop=("",))


def test_token_ids_are_prompts_as_they_are(packaged_model: Path) -> None:
    runtime = load(packaged_model, device="cpu")
    params = SamplingParams(max_tokens=5)
    text = "The king said"
    ids = [0, *runtime.encode(text)]
    by_text, by_ids = (runtime.generate([prompt], params)[0] for prompt in (text, ids))
    assert by_ids.token_ids == by_text.token_ids
    assert by_ids.prompt_tokens == len(ids)
    with pytest.raises(UserError, match="vocabulary"):
        runtime.generate([[runtime.vocab_size]], params)
    assert runtime.encode_prompt(text) == runtime.encode(text)  # this tokenizer adds nothing by itself


def test_the_tokenizer_s_own_begin_token(shared: Path) -> None:
    runtime = load(shared / "models" / "stories260K", device="cpu")
    assert runtime.encode_prompt("Once") == [1, *runtime.encode("Once")]
