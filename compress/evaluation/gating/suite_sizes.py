"""What a policy scores, for the plan: its items, prompts and tokens, from the policy and its data, without a model.

A gate on what the policy's suite does not score, and a text that gives no interval, are refused here, because no
candidate could ever be decided.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compress.errors import UserError
from compress.evaluation.gating.kinds import Degenerate, DeviceGate, Gate, GenerationIdentical, TextGate
from compress.evaluation.gating.scoring import suite_of
from compress.evaluation.policy import Policy
from compress.evaluation.suites import SuiteText
from compress.evaluation.text import DEFAULT, Text, read_text
from compress.evaluation.window_sizes import DEFAULT_SEQ_LEN, MIN_DOCUMENTS, fewest_windows

BYTES_PER_TOKEN = 8
"""More than the mean token of any text stands for, so that what is reckoned with it errs towards not refusing."""


def items_of(policy: Policy) -> Callable[[str], int | None]:
    """Task name -> its number of items; None where its data is not here to be counted.

    Raises (when called):
        UserError: the suite has no such task, so that no record of it could serve the gate.
    """
    tasks = {Path(task.name).stem: task for task in suite_of(policy).tasks}

    def items(name: str) -> int | None:
        if name not in tasks:
            raise UserError(
                f"a gate is about the task {name!r}, which the suite {policy.suite!r} does not hold",
                f"its tasks: {', '.join(tasks) or 'none'}",
            )
        task = tasks[name]
        if task.items is not None:
            return task.items
        from compress.evaluation.harness.run import resolve

        try:
            rows = resolve(task).rows
        except UserError:
            return None
        return None if rows is None else len(rows)

    return items


def prompts_of(policy: Policy) -> int | None:
    """Number of prompts; None where the suite does not generate."""
    generation = suite_of(policy).generation
    return None if generation is None else len(generation.prompts)


def tokens_of(policy: Policy) -> Callable[[str | None], int | None]:
    """Name of a text (None: that of gates which name none) -> its `max_tokens`, at most so many are scored.

    None where it has no such limit: without a tokenizer its tokens are not known.
    """
    texts = {_recorded(text.name): text for text in _texts(policy)}

    def tokens(name: str | None) -> int | None:
        text = next(iter(texts.values()), None) if name is None else texts.get(name)
        return None if text is None else text.max_tokens

    return tokens


def require_scored(policy: Policy) -> None:
    """Refuses gates on what the policy's suite does not score, and texts that are cut too short.

    Raises:
        UserError: a gate is about a text, generated answers or costs that the suite lacks, or a text gives no interval.
    """
    if policy.suite is not None:
        suite = suite_of(policy)
        texts = [_recorded(text.name) for text in suite.texts]
        for gate in policy.gate:
            lacks = _lacks(gate, texts, suite.generation is not None, suite.cost)
            if lacks is not None:
                raise UserError(
                    f"the gate {gate.id} is about {lacks}, which the suite {policy.suite!r} does not score",
                    f"name a suite that does, or leave the gate out; this one's texts: {', '.join(texts) or 'none'}",
                )
    for text in _texts(policy):
        _require_interval(text)


def _lacks(gate: Gate, texts: list[str], answers: bool, costs: bool) -> str | None:
    """What a gate is about and is not scored, in words; None if it is."""
    if isinstance(gate, TextGate):
        if gate.text is not None and gate.text not in texts:
            return f"the text {gate.text!r}"
        return None if texts else "a text"
    if isinstance(gate, GenerationIdentical | Degenerate):
        return None if answers else "generated answers"
    if isinstance(gate, DeviceGate):
        return None if costs else "speed and memory (`cost`)"
    return None


def _require_interval(text: SuiteText) -> None:
    """Refuses a text of which too few windows are kept for two blocks.

    Windows that end with their document are shorter, so `max_tokens` keeps more of them; how many at most follows from
    the documents. Where the text is not here, nothing is told.
    """
    source = _read(text)
    if text.max_tokens is None or source is None or len(source.documents) >= MIN_DOCUMENTS:
        return
    length = text.seq_len or DEFAULT_SEQ_LEN
    needed = fewest_windows(length)
    shortest = max(1, _bytes(source) or 0) / BYTES_PER_TOKEN
    keeps = int(text.max_tokens / (length - 1) + text.max_tokens * len(source.documents) / shortest)
    if keeps < needed:
        raise UserError(
            f"max_tokens {text.max_tokens} leaves at most {keeps} windows of {length} of {_recorded(text.name)}; an "
            f"interval needs {needed}",
            f"give max_tokens of at least {needed * (length - 1)}; for a model with a shorter context say its seq_len",
        )


def _texts(policy: Policy) -> list[SuiteText]:
    """What would be scored, the text of gates that name none first."""
    if policy.suite is not None:
        return suite_of(policy).texts
    return [SuiteText(name=policy.data or DEFAULT, max_tokens=policy.max_tokens, seq_len=policy.seq_len)]


def _read(text: SuiteText) -> Text | None:
    """The text; None where it is not here, as those of the data directory may not be."""
    try:
        return read_text(text.name)
    except UserError:
        return None


def _bytes(text: Text | None) -> int | None:
    return None if text is None else sum(len(document.encode()) for document in text.documents)


def _recorded(name: str) -> str:
    """What records call a text."""
    return Path(name).name.removesuffix(".txt").removesuffix(".jsonl")
