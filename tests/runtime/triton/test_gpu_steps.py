"""Inputs of steps, recorded steps and their memory, without a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from compress.errors import WorkError

pytest.importorskip("triton", reason="triton is not installed")

from compress.runtime.gpu_graphs import BATCHES, DecodeSteps, Recorder
from compress.runtime.gpu_inputs import Inputs, inputs_of, pages_of
from compress.runtime.gpu_memory import fitting_pages
from compress.runtime.paged_model import Chunk


def test_inputs_of_one_and_of_several_tokens() -> None:
    many = Chunk(list(range(100, 170)), 30, [4, 2, 9, 5], [], True)
    found = inputs_of([Chunk([7], 33, [6, 3], [0]), many], 2)
    assert found.singles == 2
    assert found.tokens.tolist() == [7, 0, *range(100, 170)]
    assert found.positions.tolist() == [33, 0, *range(30, 100)]
    slots = [pages * 32 + place for pages, place in [(4, 30), (4, 31), *((2, i) for i in range(32))]]
    assert found.slots.tolist()[: 2 + 34] == [3 * 32 + 1, -1, *slots]
    assert found.long.tolist() == [0, 0] + [1] * 70
    assert found.lengths.tolist() == [34, 1]
    assert found.tables[:, :5].tolist() == [[6, 3, 0, 0, 0], [0, 0, 0, 0, 0], [4, 2, 9, 5, 0]]
    assert found.blocks.tolist() == [[2, 2, 64, 30], [2, 66, 6, 94]]
    for part in (found.positions, found.slots, found.long, found.lengths, found.tables, found.blocks):
        assert (part.data_ptr() - found.tokens.data_ptr()) % 16 == 0  # or each number of tokens has kernels of its own
    copy = found.to(torch.device("cpu"))
    assert torch.equal(copy.flat, found.flat)
    assert copy.flat.data_ptr() != found.flat.data_ptr()


@pytest.mark.parametrize(("position", "pages"), [(0, 8), (255, 8), (256, 16), (512, 32), (1023, 32)])
def test_tables_have_few_widths(position: int, pages: int) -> None:
    assert pages_of([Chunk([1], position, [0] * 40, [0])]) == pages


def test_steps_are_recorded_once_for_a_number_of_sequences_and_a_width() -> None:
    ran: list[Inputs] = []

    def run(inputs: Inputs) -> torch.Tensor:
        ran.append(inputs)
        return inputs.tokens.unsqueeze(1).float()

    steps = DecodeSteps(run, torch.device("cpu"))
    chunks = [Chunk([10 + i], i, list(range(20)), [0]) for i in range(3)]
    first = steps(chunks)
    assert first.tolist() == [[10.0], [11.0], [12.0]]
    assert ran[0].slots.tolist() == [0, 1, 2, -1]
    second = steps([Chunk([20], 5, [3], [0]), *chunks[1:], Chunk([9], 0, [4], [0])])
    assert second.tolist() == [[20.0], [11.0], [12.0], [9.0]]
    assert first.tolist() == [[10.0], [11.0], [12.0]]  # what a step gave is not written over
    assert ran[1] is ran[0]  # four sequences read the buffer that three did
    assert ran[0].slots.tolist() == [3 * 32 + 5, 1, 2, 4 * 32]
    steps(chunks[:1])
    steps([Chunk([1], 300, list(range(20)), [0])])
    assert [(one.singles, one.tables.shape[1]) for one in ran] == [(4, 8), (4, 8), (1, 8), (1, 16)]
    assert steps._logits is not None
    shared = steps._logits.untyped_storage().data_ptr()
    assert {step.recorded().untyped_storage().data_ptr() for step in steps._steps.values()} == {shared}
    steps.forget()
    steps(chunks)
    assert ran[-1] is not ran[0]


def test_what_is_recorded() -> None:
    steps = DecodeSteps(lambda inputs: inputs.tokens, torch.device("cpu"))
    one = Chunk([1], 0, [0], [0])
    assert steps.takes([one] * BATCHES[-1])
    assert not steps.takes([one] * (BATCHES[-1] + 1))
    assert not steps.takes([one, Chunk([1, 2], 0, [1], [1])])
    assert not steps.takes([Chunk([1], 0, [0], [])])
    few = DecodeSteps(lambda inputs: inputs.tokens, torch.device("cpu"), 2)
    assert [few.takes([one] * count) for count in (1, 2, 3)] == [True, True, False]


class Device:
    """What recording asks of `torch.cuda`, written down instead of done."""

    OutOfMemoryError = torch.OutOfMemoryError

    def __init__(self, broken: bool = False) -> None:
        self.done: list[str] = []
        self._broken = broken

    def Stream(self, device: torch.device) -> Device:
        self.done.append("stream")
        return self

    def current_stream(self, device: torch.device) -> Device:
        return self

    def wait_stream(self, other: Device) -> None:
        self.done.append("wait")

    def graph_pool_handle(self) -> str:
        return "a pool"

    def CUDAGraph(self) -> Device:
        return self

    def replay(self) -> None:
        self.done.append("replay")

    @contextmanager
    def stream(self, stream: Device) -> Iterator[None]:
        self.done.append("aside")
        yield

    @contextmanager
    def graph(self, graph: Device, pool: object, stream: Device) -> Iterator[None]:
        self.done.append(f"capture in {pool}")
        yield
        if self._broken:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")


def test_steps_are_captured_once_on_one_stream_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Device()
    monkeypatch.setattr(torch, "cuda", cuda)
    result = torch.ones(1)

    def function() -> torch.Tensor:
        cuda.done.append("run")
        return result

    recorder = Recorder(torch.device("cuda"))
    recorded = recorder(function)
    capture = ["wait", "aside", "run", "wait", "capture in a pool", "run"]
    assert cuda.done == ["stream", *capture]
    assert recorded() is recorded() is result
    assert cuda.done[7:] == ["replay", "replay"]
    recorder(function)
    assert cuda.done[9:] == capture
    monkeypatch.setattr(torch, "cuda", Device(broken=True))
    with pytest.raises(WorkError, match=r"cannot be recorded as a CUDA graph: operation not permitted$"):
        Recorder(torch.device("cuda"))(function)


def test_a_cache_takes_what_is_left() -> None:
    assert fitting_pages(100, 1000, 10, 64, least=True) == 100
    assert fitting_pages(100, 500, 10, 64, least=False) == 50
    with pytest.raises(WorkError, match="1600 tokens, and 3200 are needed"):
        fitting_pages(100, 500, 10, 64, least=True)
    with pytest.raises(WorkError, match="0 tokens, and 96 are needed"):
        fitting_pages(100, -5, 10, 64, least=False)
