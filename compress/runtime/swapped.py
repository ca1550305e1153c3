"""A transformers model of which some linears were exchanged for packed ones: what these and the rest hold and read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from compress.runtime.protocol import LayerUse
from compress.runtime.transformers_backend import TransformersRuntime


class PackedModule(Protocol):
    """A linear whose weight is packed. `weights` counts the bias too."""

    kernel: str

    @property
    def weights(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Swapped:
    """Which linears were exchanged, by module name, and why others stayed dense, by checkpoint name."""

    linears: dict[str, PackedModule]
    dense: dict[str, str]

    def layers(self) -> list[LayerUse]:
        """What each exchanged linear holds and reads."""
        return [
            LayerUse(name, (), linear.kernel, linear.weights, linear.nbytes, linear.nbytes)
            for name, linear in self.linears.items()
        ]


class SwappedRuntime(TransformersRuntime):
    """A transformers model with packed linears; `swapped` is set by what builds it."""

    swapped: Swapped

    def parameters(self) -> int:
        """Number of weights, tied ones once."""
        return super().parameters() + sum(linear.weights for linear in self.swapped.linears.values())

    def layers(self) -> list[LayerUse]:
        """The packed linears, then what is dense as it lies in memory."""
        rest = [use for use in self.dense_layers() if use.name not in self.swapped.linears]
        return [*self.swapped.layers(), *rest]


def place_of(name: str, model: nn.Module, modules: dict[str, Any]) -> str:
    """The name in `modules` of a checkpoint's linear, which may leave out the model's base prefix."""
    return name if name in modules else f"{getattr(model, 'base_model_prefix', '')}.{name}"


def exchange(modules: dict[str, Any], place: str, linear: nn.Module) -> None:
    """Puts a linear in the place of the module of that name."""
    parent, _, own = place.rpartition(".")
    setattr(modules[parent], own, linear)
