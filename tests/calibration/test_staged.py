"""A forward paused at each linear: order, true inputs, and no way to hang."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.calibration.staged import Stage, StagedForward
from compress.errors import WorkError

pytestmark = pytest.mark.timeout(60)  # a hang is a failure, and soon


class Block(nn.Module):
    """Two linears on one input, a third behind them, a fourth that only large inputs reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.rare = (nn.Linear(4, 4) for _ in range(4))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x) + self.b(x)
        hidden = self.c(hidden)
        return self.rare(hidden) if x.abs().max() > 10 else hidden


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before, "a thread was left behind"


def inputs(count: int, large: tuple[int, ...] = ()) -> list[Tensor]:
    """(batch, seq, 4) each; those numbered in `large` reach the rare linear."""
    generator = torch.Generator().manual_seed(1)
    found = [torch.randn(2, 3, 4, generator=generator) for _ in range(count)]
    return [x + 20 if i in large else x for i, x in enumerate(found)]


def staged(block: nn.Module, chunks: list[Tensor], workers: int = 2, names: str = "a b c rare") -> StagedForward:
    def bind(x: Tensor) -> Callable[[], Tensor]:
        return lambda: block(x)

    watched = {name: block.get_submodule(name) for name in names.split()}
    return StagedForward([bind(x) for x in chunks], watched, workers)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_stages_come_in_order_with_the_inputs_of_every_chunk(count: int, workers: int) -> None:
    block, chunks = Block(), inputs(count)
    forward = staged(block, chunks, workers)
    stages = list(forward)
    assert [stage.name for stage in stages] == ["a", "b", "c"], "nothing reaches the rare one"
    assert [stage.same_input for stage in stages] == [False, True, False]
    for stage in stages[:2]:
        assert len(stage.inputs) == count
        for found, x in zip(stage.inputs, chunks, strict=True):
            assert torch.equal(found, x.reshape(6, 4))
    for found, x in zip(stages[2].inputs, chunks, strict=True):
        assert torch.equal(found, (block.a(x) + block.b(x)).reshape(6, 4))
    assert len(forward.outputs) == count
    for output, x in zip(forward.outputs, chunks, strict=True):
        assert torch.equal(output, block(x))


def test_later_stages_see_what_was_changed_before_them() -> None:
    block, changed, chunks = Block(), Block(), inputs(3)
    changed.a.weight.data *= 2
    changed.c.weight.data -= 1
    forward = staged(block, chunks)
    seen: dict[str, Stage] = {}
    for stage in forward:
        seen[stage.name] = stage
        if stage.name == "a":
            block.a.weight.data *= 2
        if stage.name == "c":
            block.c.weight.data -= 1
    for i, x in enumerate(chunks):
        assert torch.equal(seen["c"].inputs[i], (changed.a(x) + changed.b(x)).reshape(6, 4))
        assert torch.equal(forward.outputs[i], changed(x))


@pytest.mark.parametrize("workers", [1, 3])
def test_chunks_that_skip_a_linear_wait_for_nobody(workers: int) -> None:
    block, chunks = Block(), inputs(5, large=(1, 3))
    forward = staged(block, chunks, workers)
    stages = {stage.name: stage for stage in forward}
    assert list(stages) == ["a", "b", "c", "rare"]
    assert len(stages["rare"].inputs) == 2
    for found, i in zip(stages["rare"].inputs, (1, 3), strict=True):
        hidden = block.c(block.a(chunks[i]) + block.b(chunks[i]))
        assert torch.equal(found, hidden.reshape(6, 4))
    for output, x in zip(forward.outputs, chunks, strict=True):
        assert torch.equal(output, block(x))


def test_one_stage_for_a_linear_that_chunks_reach_at_different_times() -> None:
    """Experts: chunk 0 goes 0, 2 and chunk 1 goes 1, 2; all that reach expert 2 must meet there."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            for number in range(3):
                if (number == 2) or (number == int(x[0, 0, 0])):
                    x = self.experts[number](x)
            return x

    block, chunks = Routed(), inputs(4)
    for i, x in enumerate(chunks):
        x[0, 0, 0] = i % 2
    forward = staged(block, chunks, names="experts.0 experts.1 experts.2")
    stages = list(forward)
    assert [(stage.name, len(stage.inputs)) for stage in stages] == [
        ("experts.0", 2),
        ("experts.1", 2),
        ("experts.2", 4),
    ]
    for output, x in zip(forward.outputs, chunks, strict=True):
        assert torch.equal(output, block(x))


def test_at_most_so_many_compute_at_a_time() -> None:
    lock, now, most = threading.Lock(), 0, 0
    done = threading.Event()

    class Slow(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal now, most
            with lock:
                now += 1
                most = max(most, now)
            done.wait(0.01)
            with lock:
                now -= 1
            return super().forward(x)

    block = Block()
    block.a = Slow(4, 4).requires_grad_(False)
    list(staged(block, inputs(8), workers=3))
    assert 1 <= most <= 3


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("where", ["a", "c"])
def test_an_exception_in_one_chunk_reaches_the_caller(where: str, workers: int) -> None:
    block, chunks = Block(), inputs(4)

    def explode(module: nn.Module, args: Any, output: Tensor) -> None:
        if torch.equal(args[0], chunks[2]) or where == "c":
            raise RuntimeError("no more memory")

    block.get_submodule(where).register_forward_hook(explode)
    forward = staged(block, chunks, workers)
    with pytest.raises(RuntimeError, match="no more memory"):
        list(forward)
    assert not block.a._forward_pre_hooks
    assert len(forward.outputs) < 4


def test_an_exception_before_the_first_stop() -> None:
    def fail() -> Tensor:
        raise MemoryError("nothing left")

    block, chunks = Block(), inputs(3)
    runs: list[Callable[[], Tensor]] = [lambda x=x: block(x) for x in chunks]  # type: ignore[misc]
    forward = StagedForward([*runs, fail], {"a": block.a}, 2)
    with pytest.raises(MemoryError):
        list(forward)


def test_an_exception_of_the_caller_ends_all_threads() -> None:
    block = Block()

    def disappoint() -> None:
        for stage in staged(block, inputs(4)):
            raise KeyError(stage.name)

    with pytest.raises(KeyError):
        disappoint()
    assert not block.a._forward_pre_hooks


@pytest.mark.parametrize("after", [0, 1, 2])
def test_closing_early_ends_all_threads(after: int) -> None:
    block, chunks = Block(), inputs(5)
    stages = iter(staged(block, chunks))
    for _ in range(after):
        next(stages)
    stages.close()  # type: ignore[attr-defined]
    for module in (block.a, block.b, block.c, block.rare):
        assert not module._forward_pre_hooks
    assert block(chunks[0]).shape == (2, 3, 4), "the block runs freely again"


def test_an_interrupt_while_chunks_compute_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C arrives while every chunk is busy: they must end at their next stop instead of waiting there for ever."""
    block, started, go_on = Block(), threading.Barrier(3), threading.Event()

    def busy(x: Tensor) -> Tensor:
        started.wait()
        go_on.wait()
        return block(x)

    forward = StagedForward([lambda x=x: busy(x) for x in inputs(2)], {"a": block.a}, 2)  # type: ignore[misc]
    wait_for = forward._changed.wait_for

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            started.wait()
            threading.Timer(0.05, go_on.set).start()
            raise KeyboardInterrupt
        return wait_for(*args, **kwargs)

    monkeypatch.setattr(forward._changed, "wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(forward)
    assert not block.a._forward_pre_hooks


def test_modules_run_outside_are_not_stopped() -> None:
    block, chunks = Block(), inputs(2)
    for stage in staged(block, chunks):
        if stage.name == "b":
            assert torch.equal(block(chunks[0]), block(chunks[0]))


def test_nothing_to_watch_just_runs() -> None:
    block, chunks = Block(), inputs(3)
    forward = StagedForward([lambda x=x: block(x) for x in chunks], {}, 2)  # type: ignore[misc]
    assert list(forward) == []
    for output, x in zip(forward.outputs, chunks, strict=True):
        assert torch.equal(output, block(x))


@pytest.mark.parametrize("started", [0, 2])
def test_threads_that_cannot_be_started_are_a_work_error(started: int, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, count = threading.Thread.start, 0

    def start(thread: threading.Thread) -> None:
        nonlocal count
        if count == started:
            raise RuntimeError("can't start new thread")
        count += 1
        begin(thread)

    block = Block()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(WorkError, match=f"started {started} of the 5 threads") as caught:
            list(staged(block, inputs(5)))
    assert "--samples" in caught.value.hint
    assert not block.a._forward_pre_hooks
