"""The whole quantised model in memory, on dense weights that follow its tuned numbers, beside the original's outputs.

Windows go through in batches of a fixed number of tokens, one batch per worker at a time; gradients are summed in the
order of the batches, so that the result does not depend on how many workers there are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.formats import layouts
from compress.formats.inputs import round_inputs
from compress.models.skeleton import Call, Skeleton
from compress.models.tables import is_tied
from compress.pipeline.block import Workers
from compress.pipeline.curvature import covariance_draw
from compress.pipeline.job import Job
from compress.pipeline.linears import sample_of
from compress.pipeline.tables_stage import Rows, rows_of
from compress.quantization.tuning import TunedScales, TunedVector

BATCH_TOKENS = 1024

Tuned = TunedScales | TunedVector


@dataclass(frozen=True, eq=False, slots=True)
class _Place:
    """A parameter of a live block that follows a tuned number."""

    parameter: nn.Parameter
    tuned: Tuned
    transposed: bool

    def follow(self) -> None:
        dense = self.tuned.dense().to(self.parameter.dtype)
        self.parameter.data = dense.T.contiguous() if self.transposed else dense

    def backward(self, gradient: Tensor) -> None:
        self.tuned.backward(gradient.T if self.transposed else gradient)


@dataclass(frozen=True, eq=False, slots=True)
class Passed:
    """What one batch gave: the sum of its tokens' KL, and the gradients in the order of the places, if asked for."""

    divergence: float
    gradients: tuple[Tensor, ...] = ()


class TunedModel:
    """The model as the finished blocks left it. `tuned` holds what can move, by checkpoint name.

    Args:
        stored: what was written of all blocks, by name.
        tokens: (samples, seq), all that the model will ever see here.
    """

    def __init__(self, job: Job, stored: Mapping[str, Tensor], tokens: Tensor, workers: Workers) -> None:
        self._workers, self._tokens = workers, tokens
        self._skeleton = Skeleton(job.checkpoint, torch.float32)
        self._low = job.skeleton.dtype
        self._head = threading.Lock()  # the skeleton's own modules serve one caller at a time
        self.per_batch = max(1, BATCH_TOKENS // tokens.shape[1])
        self._calls: dict[int, list[Call]] = {}
        original = torch.cat([self._embedded(part) for part in tokens.split(self.per_batch)])
        self._entering = self._behind_tables(job, stored, original)
        self.samples: dict[str, Tensor] = {}
        """Inputs (tokens, in) of each linear in the original model, for some tokens of the first batch."""
        self._targets = self._original(job, original)
        self.tuned: dict[str, Tuned] = {}
        self._places: list[_Place] = []
        self._blocks: list[nn.Module] = []
        self._live: dict[str, nn.Module] = {}
        for block in range(self._skeleton.num_blocks):
            self._blocks.append(self._opened(job, block, stored))
        self.follow()

    def follow(self) -> None:
        """Gives the dense weights the values of the tuned numbers."""
        list(self._workers.pool.map(_Place.follow, self._places))

    def divergence(self, windows: Sequence[int]) -> float:
        """Mean KL of the original's next-token distribution to this model's, in nats, over these windows."""
        total = sum(passed.divergence for passed in self._passes(windows, learn=False))
        return total / (len(windows) * self._tokens.shape[1])

    def learn(self, windows: Sequence[int]) -> float:
        """Sets the gradients of all tuned numbers; returns the mean KL over these windows."""
        divergence, gradients = self._learnt(windows)
        for place, gradient in zip(self._places, gradients, strict=True):
            place.backward(gradient)
        return divergence

    def slopes(self, windows: Sequence[int]) -> dict[str, Tensor]:
        """The gradient (out, in) float32 of the mean KL over these windows, by the dense weight of each linear."""
        return self._by_linear(self._learnt(windows)[1])

    def draws(self, windows: Sequence[int], seed: int) -> Iterator[tuple[dict[str, Tensor], int]]:
        """Of each window: what a draw of the softmax's covariance for every token, carried back, gives at the dense
        weight (out, in) float32 of each linear, and the number of tokens."""
        self._know_calls(1)
        for passed in self._workers.pool.map(lambda window: self._pass([window], True, (seed, window)), windows):
            yield self._by_linear(passed.gradients), self._tokens.shape[1]

    def _learnt(self, windows: Sequence[int]) -> tuple[float, list[Tensor]]:
        """The mean KL over these windows, and its gradients in the order of the places."""
        total, sums = 0.0, [torch.zeros(place.parameter.shape) for place in self._places]
        for passed in self._passes(windows, learn=True):
            total += passed.divergence
            for summed, gradient in zip(sums, passed.gradients, strict=True):
                summed += gradient
        tokens = len(windows) * self._tokens.shape[1]
        return total / tokens, [summed.div_(tokens) for summed in sums]

    def _by_linear(self, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        found = zip(self.tuned, self._places, gradients, strict=True)
        return {n: g.T if place.transposed else g for n, place, g in found if isinstance(place.tuned, TunedScales)}

    def sampled(self) -> dict[str, Tensor]:
        """Inputs of each linear now, for the same tokens as `samples`."""
        with _sampling(self._live) as found:
            self._pass(range(min(self.per_batch, len(self._tokens))), False)
        return found

    def _know_calls(self, count: int) -> None:
        """Finds out how blocks are called with so many windows, which does not depend on their tokens."""
        if count not in self._calls:
            self._embedded(self._tokens[:count])

    def _behind_tables(self, job: Job, stored: Mapping[str, Tensor], original: Tensor) -> Tensor:
        """What enters the first block behind a quantised embedding. A quantised head takes the place of the original's,
        of which a skeleton of its own makes the targets. Neither is tuned."""
        self._original_head, entering = self._skeleton, original
        for spec in job.tables:
            rows = rows_of(job, spec, stored)
            if spec.weight == self._skeleton.embedding:
                entering = torch.cat([self._embedded(part, rows) for part in self._tokens.split(self.per_batch)])
            if spec.weight != self._skeleton.embedding or is_tied(self._skeleton):
                self._original_head = Skeleton(job.checkpoint, torch.float32)
                self._skeleton.output_projection.replaced = rows(torch.arange(spec.out_features)).float()
        return entering

    def _embedded(self, tokens: Tensor, rows: Rows | None = None) -> Tensor:
        hidden, calls = self._skeleton.embed(tokens, rows)
        self._calls.setdefault(len(tokens), calls)
        return hidden

    def _original(self, job: Job, entering: Tensor) -> Tensor:
        """The last block's output for all tokens in the original model, and the samples on the way."""
        windows = [range(start, min(start + self.per_batch, len(self._tokens))) for start in self._starts()]
        hidden = [entering[part.start : part.stop] for part in windows]
        for block in range(self._skeleton.num_blocks):
            module = self._skeleton.materialise(block)
            live = _linears(job, self._skeleton.modules(block, module))
            with _sampling(live) as found:
                hidden[0] = self._through(module, block, hidden[0])
            self.samples |= found

            def through(entering: Tensor, module: nn.Module = module, block: int = block) -> Tensor:
                return self._through(module, block, entering)

            hidden[1:] = list(self._workers.pool.map(through, hidden[1:]))
            self._skeleton.release(module)
        return torch.cat(hidden)

    def _starts(self) -> range:
        return range(0, len(self._tokens), self.per_batch)

    def _through(self, module: nn.Module, block: int, hidden: Tensor) -> Tensor:
        with torch.no_grad(), self._autocast():
            return self._skeleton.run_block(module, hidden, self._calls[len(hidden)][block])

    def _opened(self, job: Job, block: int, stored: Mapping[str, Tensor]) -> nn.Module:
        """The block with everything that was written of it."""
        module = self._skeleton.materialise(block)
        for name, live in self._skeleton.modules(block, module).items():
            for local, parameter in list(live.named_parameters(recurse=False)):
                if f"{name}.{local}" in stored:
                    self._fill(job, live, local, f"{name}.{local}", stored[f"{name}.{local}"])
                else:
                    parameter.requires_grad_(False)
            if name in job.schemes:
                self._quantized(job, name, live, stored)
        return module

    def _fill(self, job: Job, live: nn.Module, local: str, name: str, value: Tensor) -> None:
        parameter = cast(nn.Parameter, getattr(live, local))
        if name.removesuffix(f".{local}") in job.schemes and local == "weight":
            return  # codes of a linear are stored under its own name where they fill whole bytes
        parameter.data = value.to(parameter.dtype)
        if _is_norm(live):
            parameter.requires_grad_(True)
            self._add(name, parameter, TunedVector(value, offset=self._skeleton.family.offset_norms), False)

    def _quantized(self, job: Job, name: str, live: nn.Module, stored: Mapping[str, Tensor]) -> None:
        local = {part: stored[f"{name}.{part}"] for part in layouts.PARTS if f"{name}.{part}" in stored}
        scheme = job.schemes[name]
        blank = torch.empty(0, dtype=self._low)
        live.weight = nn.Parameter(blank, requires_grad=True)
        self._live[name] = live
        self._add(name, live.weight, TunedScales(layouts.unpack(local, scheme)), isinstance(live, Conv1D))
        inputs, scale = scheme.inputs, local.get(layouts.INPUT_SCALE)
        if inputs is not None:

            def rounded(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                x = given[0].detach().to(self._low)
                return (given[0] + (round_inputs(x, inputs, scale) - given[0].detach()), *given[1:])

            live.register_forward_pre_hook(rounded)

    def _add(self, name: str, parameter: nn.Parameter, tuned: Tuned, transposed: bool) -> None:
        self.tuned[name] = tuned
        self._places.append(_Place(parameter, tuned, transposed))

    def _passes(self, windows: Sequence[int], *, learn: bool) -> Iterator[Passed]:
        parts = [windows[start : start + self.per_batch] for start in range(0, len(windows), self.per_batch)]
        for part in parts:
            self._know_calls(len(part))
        yield from self._workers.pool.map(lambda part: self._pass(part, learn), parts)

    def _pass(self, windows: Sequence[int], learn: bool, draw: tuple[int, int] | None = None) -> Passed:
        """draw: seed and number of the draw that is carried back in place of the KL's gradient."""
        chosen = torch.tensor(list(windows))
        with torch.set_grad_enabled(learn), self._autocast():
            hidden, calls = self._entering[chosen], self._calls[len(windows)]
            for module, call in zip(self._blocks, calls, strict=True):
                hidden = self._skeleton.run_block(module, hidden, call)
            with self._head:
                logits = self._skeleton.differentiable_head(hidden)
                with torch.no_grad():
                    wanted = torch.log_softmax(self._original_head.head(self._targets[chosen]), -1)
        with torch.no_grad():
            found = torch.log_softmax(logits.detach(), -1)
            share = wanted.exp()
            divergence = float((share * (wanted - found)).sum(dtype=torch.float64))
            pull = found.exp_().sub_(share) if draw is None else covariance_draw(found.exp_(), *draw)
        if not learn:
            return Passed(divergence)
        gradients = torch.autograd.grad(logits, [place.parameter for place in self._places], pull, allow_unused=True)
        return Passed(
            divergence,
            tuple(
                torch.zeros(place.parameter.shape) if gradient is None else gradient
                for place, gradient in zip(self._places, gradients, strict=True)
            ),
        )

    def _autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._low == torch.bfloat16)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1


def _linears(job: Job, live: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: module for name, module in live.items() if name in job.schemes}


@contextmanager
def _sampling(live: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collects some of the inputs (tokens, in) of each linear while it is open."""
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, module in live.items():

            def keep(module: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                found[name] = sample_of([given[0].detach().flatten(0, -2)])

            hooks.callback(module.register_forward_pre_hook(keep).remove)
        yield found
