"""The engine's whole decode on a GPU, 4-bit weights against bfloat16: random weights, text that nobody reads.

The 4-bit model is timed in its deterministic mode too, in which no bit depends on how many answers there are.

The files hold one layer, which the checkpoint names once for every layer of the shape: each is read, packed and held in
memory on its own. The 4-bit model is made by `compress.quantize`; embedding and head stay bfloat16 in both.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import compress
from benchmarks.gpu_products import DENSE, Save
from benchmarks.gpu_shapes import Shape
from benchmarks.gpu_timing import Clock, ratios, summary
from benchmarks.make_random_llama import make_random_llama
from compress.models.checkpoint import Checkpoint
from compress.runtime.gpu_backend import GpuRuntime
from compress.runtime.gpu_model import GpuModel
from compress.runtime.loading import decide
from compress.runtime.paged_model import Chunk
from compress.runtime.protocol import SamplingParams

ROUNDS = 9
PROMPT, NEW = 64, 64
PACKED, SAME = "W4A16-g128", "W4A16-g128 deterministic"


def decode(shape: Shape, clock: Clock, found: dict[str, Any], save: Save) -> None:
    """By number of sequences: seconds of a step of each model, rounds taking turns, and their ratio.

    A step is what the device does for one token of each sequence: a recorded graph, its inputs copied. A whole step is
    all of `LLM.generate` between two tokens: inputs put together, layers, head, the choice of tokens.
    """
    with tempfile.TemporaryDirectory() as place:
        models = _models(shape, clock, Path(place))
        prompt, new, rounds = (3, 2, 1) if clock.dry else (PROMPT, NEW, ROUNDS)
        kernels = {name: sorted({use.kernel for use in model.layers()}) for name, model in models.items()}
        found |= {"prompt_tokens": prompt, "new_tokens": new, "kernels": kernels}
        for batch in (2,) if clock.dry else (1, 4, 8, 16, 32):
            with ExitStack() as lent:
                steps = clock.turns({name: _step(model, batch, prompt, lent) for name, model in models.items()}, False)
            whole: dict[str, list[float]] = {name: [] for name in models}
            for number in range(rounds + 1):
                for name, model in models.items():
                    taken = _step_seconds(model, batch, prompt, new)
                    if number and not clock.dry:  # the first records its steps
                        whole[name].append(taken)
            found[str(batch)] = {
                "step": {name: summary(taken) for name, taken in steps.items()},
                "times_faster_than_bfloat16": ratios(steps[DENSE], steps[PACKED]),
                "whole_step": {name: summary(taken) for name, taken in whole.items()},
                "whole_times_faster": ratios(whole[DENSE], whole[PACKED]),
                "times_slower_deterministic": ratios(steps[SAME], steps[PACKED]),
            }
            save()


def _step(model: GpuRuntime, batch: int, prompt: int, lent: ExitStack) -> Callable[[], object]:
    """A step of so many sequences behind their prompts, whose keys and values nobody computed."""
    pages = [lent.enter_context(model.model.pages.lend(prompt + 1)) for _ in range(batch)]
    chunks = [Chunk([1], prompt, own, [0]) for own in pages]
    return lambda: model.model.step(chunks)


def _models(shape: Shape, clock: Clock, place: Path) -> dict[str, GpuRuntime]:
    sizes = asdict(replace(shape, layers=1))
    make_random_llama(place / "dense", compress.default_model(), **sizes)
    compress.quantize(
        place / "dense", "rtn", 4, group_size=128, output=place / "packed", device="cpu", evaluate=False
    )  # fmt: skip
    paths = {DENSE: place / "dense", PACKED: place / "packed"}
    checkpoints = {name: repeated(path, shape.layers) for name, path in paths.items()}
    found = {name: _opened(checkpoint, clock) for name, checkpoint in checkpoints.items()}
    return {**found, SAME: _opened(checkpoints[PACKED], clock, deterministic=True)}


def repeated(path: Path, layers: int) -> Checkpoint:
    """The checkpoint of one layer as one of so many layers, all with its weights; its config says so from now on."""
    one = Checkpoint.open(path)
    config = {**one.config, "num_hidden_layers": layers}
    (path / "config.json").write_text(json.dumps(config))
    index = {}
    for name, info in one.index.items():
        for layer in range(layers if ".layers.0." in name else 1):
            copy = re.sub(r"\.layers\.0\.", f".layers.{layer}.", name)
            index[copy] = replace(info, name=copy)
    return Checkpoint(path, config, index)


def _opened(checkpoint: Checkpoint, clock: Clock, deterministic: bool = False) -> GpuRuntime:
    decision = decide(checkpoint, str(clock.device), kernel="triton")
    assert decision.shape is not None, decision.reason
    room = 32 if clock.dry else 32 * (PROMPT + NEW + 32)
    model = GpuModel(checkpoint, decision.shape, clock.device, torch.bfloat16, room, deterministic)
    return GpuRuntime(checkpoint, model)


def _step_seconds(model: GpuRuntime, batch: int, prompt: int, new: int) -> float:
    """Median over the steps of as many answers at once; prompts begin differently, so that none shares pages."""
    prompts = [[number, *range(1, prompt)] for number in range(batch)]
    answers = model.generate(prompts, SamplingParams(max_tokens=new, ignore_end=True))
    return statistics.median(answers[0].step_seconds)
