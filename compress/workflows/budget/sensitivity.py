"""What it costs to round each unit under each option, measured.

Two measurements make one number:

- the output error of every option: tr(D H D^T) of the rounding error D, with H the mean x x^T of the inputs that the
  original model has;
- the KL of the logits to the original model with this unit alone rounded, on text that the method does not learn from,
  under a few options (the anchors: the fewest bits, where units differ most).

The KL of the other options follows from their errors: between anchors on the line through log KL and log error, beyond
them in proportion, because KL is quadratic in a small change of the logits. Losses of units are then taken to add up.

The weights are those of the recipe's own method on the original model's activations. GPTQ goes without what only the
finished artifact needs: its correction (earlier layers have no error here) and its polish of the codes. Methods that
change other tensors too (awq) are stood for by round to nearest with searched scales.

One thread computes one measurement, and sums are in a fixed order: numbers do not depend on the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor, nn

from compress.calibration.staged import StagedForward
from compress.calibration.statistics import collect
from compress.models.skeleton import LinearSpec, Skeleton
from compress.pipeline import inputs
from compress.pipeline.block import Workers, stages
from compress.pipeline.inputs import Activations
from compress.pipeline.linears import in_tiles, put
from compress.pipeline.source import read_weight
from compress.progress import Progress
from compress.quantization import gptq
from compress.quantization.configs import GptqConfig
from compress.quantization.grid import quantize, search_grid
from compress.types import IntScheme, QuantizedTensor
from compress.workflows.budget import table_losses
from compress.workflows.budget.losses import Measured, Signal, anchors
from compress.workflows.budget.units import Unit

ROWS_PER_TASK = 256


def measure(
    skeleton: Skeleton,
    units: Sequence[Unit],
    signal: Signal,
    known: Mapping[str, Measured],
    found: Callable[[Unit, Measured], None],
    workers: Workers,
    progress: Progress,
) -> None:
    """Measures every unit that is not `known`, and hands what it found to `found` as soon as it is there.

    skeleton: in float32. The whole model is held at once, and the log-probabilities of the measuring text.
    """
    progress.begin("measuring what each linear costs", len(units))
    for unit in units:
        if unit.name in known:
            progress.advance(f"{unit.name}: known")
    missing = [unit for unit in units if unit.name not in known]
    if missing:
        with torch.inference_mode():
            _measure(skeleton, missing, signal, found, workers, progress)
    progress.end()


def _measure(
    skeleton: Skeleton,
    missing: Sequence[Unit],
    signal: Signal,
    found: Callable[[Unit, Measured], None],
    workers: Workers,
    progress: Progress,
) -> None:
    outside = [unit for unit in missing if unit.table is not None]
    modules = [skeleton.materialise(block) for block in range(skeleton.num_blocks)]
    original = _Original(skeleton, modules, signal.measuring, workers)
    learning = inputs.enter(skeleton, signal.learning, False)
    last = skeleton.num_blocks - 1 if outside else max(unit.block for unit in missing)
    for block in range(last + 1):
        here = [unit for unit in missing if unit.block == block]
        rounding = _Rounding(skeleton, modules[block], here, signal.method, workers)
        learning = rounding.through(learning)
        for unit in here:

            def divergence(option: IntScheme, unit: Unit = unit, rounding: _Rounding = rounding) -> float:
                weights = {spec.name: rounding.kept[spec.name, option] for spec in unit.linears}
                return original.divergence(unit.block, weights)

            chosen = anchors(unit)
            measured = zip(chosen, workers.pool.map(divergence, chosen), strict=True)
            result = Measured(
                errors={option.label: rounding.errors[unit.name, option] for option in unit.options},
                divergences={option.label: value for option, value in measured},
            )
            found(unit, result)
            progress.advance(unit.name)
    if outside:
        measured_tables = table_losses.measure(skeleton, outside, signal, learning, original.with_table, workers)
        for unit, result in measured_tables:
            found(unit, result)
            progress.advance(unit.name)


class _Original:
    """The original model, and what it makes of the measuring text."""

    def __init__(self, skeleton: Skeleton, modules: Sequence[nn.Module], tokens: Tensor, workers: Workers) -> None:
        self._skeleton, self._modules, self._tokens = skeleton, modules, tokens
        self._entering = [inputs.enter(skeleton, tokens, False)]
        self._one_model = threading.Lock()  # its head runs with stand-ins for the blocks, which must not be copied then
        for module in modules:
            now = self._entering[-1]
            self._entering.append(now.advanced(list(workers.pool.map(_run, now.runs(skeleton, module)))))
        self._wanted = [torch.log_softmax(skeleton.head(hidden), -1) for hidden in self._entering[-1].quantized]

    @torch.inference_mode()
    def divergence(self, block: int, weights: Mapping[str, QuantizedTensor]) -> float:
        """Mean over tokens of KL(original || changed) in nats, with these weights of one block in place of its own."""
        with self._one_model:
            changed = self._skeleton.materialise(block)
        live = self._skeleton.modules(block, changed)
        for name, quantized in weights.items():
            put(live[name], quantized)
        return self._through(self._entering[block], [changed, *self._modules[block + 1 :]], block, None)

    @torch.inference_mode()
    def with_table(self, table: Tensor, looked_up: bool, multiplied: bool) -> float:
        """The same with this table (vocabulary, width) for the embedding, for the head, or for both."""
        start, modules = self._entering[-1], []
        if looked_up:
            with self._one_model:
                start = inputs.enter(self._skeleton, self._tokens, False, rows=lambda rows: table[rows])
            modules = list(self._modules)
        return self._through(start, modules, 0, table if multiplied else None)

    def _through(self, now: Activations, modules: Sequence[nn.Module], first: int, head: Tensor | None) -> float:
        """Mean over tokens of the KL, from these states through these blocks, of which the first has this number."""
        total, tokens = 0.0, 0
        for place, hidden in enumerate(now.quantized):
            for number, module in enumerate(modules, start=first):
                hidden = self._skeleton.run_block(module, hidden, now.calls[place][number])
            with self._one_model:
                self._skeleton.output_projection.replaced = head
                logits = self._skeleton.head(hidden)
                self._skeleton.output_projection.replaced = None
            wanted, found = self._wanted[place], torch.log_softmax(logits, -1)
            total += float((wanted.exp() * (wanted - found)).sum(dtype=torch.float64))
            tokens += wanted.shape[0] * wanted.shape[1]
        return max(total / tokens, 0.0)


class _Rounding:
    """The linears of some units of one block under every option: output errors, and the weights of the anchors.

    errors: summed over a unit's linears. kept: by linear and option.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        module: nn.Module,
        units: Sequence[Unit],
        method: GptqConfig | None,
        workers: Workers,
    ) -> None:
        self._skeleton, self._module, self._method, self._workers = skeleton, module, method, workers
        self._of = {spec.name: (spec, unit) for unit in units for spec in unit.linears}
        self.errors: dict[tuple[str, IntScheme], float] = {(u.name, o): 0.0 for u in units for o in u.options}
        self.kept: dict[tuple[str, IntScheme], QuantizedTensor] = {}

    def through(self, entering: Activations) -> Activations:
        """Runs the original block on the learning text, and rounds its linears on the way."""
        live = self._skeleton.modules(entering.block, self._module)
        watched = {name: module for name, module in live.items() if name in self._of}
        forward = StagedForward(entering.runs(self._skeleton, self._module), watched, self._workers.count)
        shared: gptq.Preconditioner | None = None
        reached_names = set()
        with closing(stages(forward)) as reached:
            for stage in reached:
                reached_names.add(stage.name)
                if shared is None or not stage.same_input:
                    statistics = collect(stage.inputs, {}, self._workers.pool)
                    shared = gptq.Preconditioner(
                        statistics, self._method or GptqConfig.model_validate({}), self._workers.pool
                    )
                self._round(*self._of[stage.name], shared)
        for name in self._of.keys() - reached_names:  # experts that no token of the text reached lose nothing here
            self._round(*self._of[name], None)
        return entering.advanced(forward.outputs)

    def _round(self, spec: LinearSpec, unit: Unit, shared: gptq.Preconditioner | None) -> None:
        weight = read_weight(self._skeleton.checkpoint, spec)
        wanted = anchors(unit)
        for option in unit.options:
            quantized = self._quantized(weight, spec, option, shared)
            if shared is not None:
                difference = weight - quantized.dequantize().float()
                parts = self._workers.pool.map(_error(shared.stats.hessian), difference.split(ROWS_PER_TASK))
                self.errors[unit.name, option] += sum(parts)
            if option in wanted:
                self.kept[spec.name, option] = quantized

    def _quantized(
        self, weight: Tensor, spec: LinearSpec, option: IntScheme, shared: gptq.Preconditioner | None
    ) -> QuantizedTensor:
        dtype, method = self._skeleton.checkpoint.index[spec.weight].dtype, self._method
        if method is None or shared is None or shared.factored is None:
            return in_tiles(weight, lambda rows: quantize(rows, search_grid(rows, option, dtype)), self._workers.pool)
        shared.prepare(option.groups(spec.in_features), self._workers.pool)
        return in_tiles(weight, lambda rows: gptq.transform(rows, shared, option, method, dtype), self._workers.pool)


def _error(hessian: Tensor) -> Callable[[Tensor], float]:
    return lambda rows: float(((rows @ hessian) * rows).sum(dtype=torch.float64))


def _run(run: Callable[[], Tensor]) -> Tensor:
    with torch.inference_mode():
        return run()
