"""Models that the native engine does not define, on a CPU: transformers, with quantised linears that stay packed.

Their products are the native ones, and what a scheme rounds is rounded in them; everything else, attention among it, is
transformers' own. A packed weight is never decoded, so memory does not reach a dense model's at load either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.formats.registry import Format
from compress.kernels import packed_linear
from compress.kernels.dispatch import native
from compress.models.checkpoint import Checkpoint
from compress.models.quiet import quiet
from compress.runtime import native_reader
from compress.runtime.native_weights import Stored, input_name, weight_name
from compress.runtime.native_weights import expected as stored_parts
from compress.runtime.swapped import Swapped, SwappedRuntime, exchange, place_of
from compress.runtime.transformers_loader import load_config, load_model, meta_model
from compress.types import Scheme


class NativeLinear(nn.Module):
    """A linear over a repacked weight; `kernel` is what reports call its product."""

    def __init__(self, packed: Any, bias: Tensor | None, kernel: str, eight_bit: bool) -> None:
        super().__init__()
        self.packed = packed
        self.kernel = kernel
        self.weights = int(packed.rows * packed.columns) + (0 if bias is None else bias.numel())
        self._eight_bit = eight_bit

    @property
    def nbytes(self) -> int:
        """Bytes in memory, all of which a token reads."""
        return int(self.packed.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) float32 -> (..., out) float32."""
        out = packed_linear.multiply(self.packed, x.reshape(-1, x.shape[-1]), self._eight_bit)
        return out.view(*x.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a quantised linear belongs in the module tree, and its size (out, in). shape: of the module's weight."""

    place: str
    size: tuple[int, int]
    shape: tuple[int, ...]
    scheme: Scheme


@dataclass(frozen=True, slots=True)
class Plan:
    """The quantised linears that stay packed, and why others do not, both by checkpoint name."""

    format: Format
    slots: dict[str, Slot]
    dense: dict[str, str]


def plan(checkpoint: Checkpoint) -> Plan | None:
    """Which linears stay packed; None where the checkpoint has no quantised ones that are read here. Reads no weight.

    Raises:
        UserError: an architecture that transformers does not build.
        IntegrityError: a quantised linear that the config does not describe.
    """
    if not native_reader.reads(checkpoint.config):
        return None
    with quiet():
        model = meta_model(checkpoint, load_config(checkpoint))
    modules = dict(model.named_modules())
    tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    transposed = native_reader.conv1d_linears(model)
    try:
        format, schemes = native_reader.packed_linears(checkpoint)
    except (KeyError, TypeError, ValueError):
        return None  # decoding says what is wrong with it
    found = Plan(format, {}, {})
    for name, scheme in schemes.items():
        place = place_of(name, model, modules)
        module: Any = modules.get(place)
        if not isinstance(module, nn.Linear) and place not in transposed:
            found.dense[name] = "transformers keeps it in another form than a linear of its own"
            continue
        shape = tuple(module.weight.shape)
        slot = Slot(place, (shape[1], shape[0]) if place in transposed else (shape[0], shape[1]), shape, scheme)
        reason = _obstacle(checkpoint, format, name, slot)
        if f"{place}.weight" in tied:
            reason = "another module shares its weight"
        if reason is None:
            found.slots[name] = slot
        else:
            found.dense[name] = reason
    return found


def _obstacle(checkpoint: Checkpoint, format: Format, name: str, slot: Slot) -> str | None:
    """Why the native product does not take a linear as it is stored; None if it does."""
    scheme, (out, columns) = slot.scheme, slot.size
    if checkpoint.config["quantization_config"].get("desc_act"):
        return "its groups of inputs follow the activation order"
    if not 2 <= scheme.bits <= 8 or not scheme.fits(columns):
        return f"it is packed in {scheme.bits} bits and groups of {scheme.group_size}"
    for part, (size, dtypes) in stored_parts(format, scheme, out, columns).items():
        info = checkpoint.index.get(f"{name}.{part}")
        if info is None or tuple(info.shape) != size or info.dtype not in dtypes:
            return f"its {part} is missing, or not of shape {size}"
    return packed_linear.obstacle(scheme, columns)


class PackedRuntime(SwappedRuntime):
    """A transformers model over native products."""

    name = "transformers+native"

    def __init__(self, checkpoint: Checkpoint, plan: Plan, eight_bit: bool = False) -> None:
        """plan: of this checkpoint. eight_bit: inputs of packed integers are rounded to 8 bits."""
        self._plan, self._eight_bit = plan, eight_bit
        self.kernel = f"cpu-{native().isa()}" + ("-int8" if eight_bit else "")
        super().__init__(checkpoint, torch.device("cpu"), torch.float32)

    def _build(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
        slots = self._plan.slots
        model = load_model(checkpoint, dtype, {name: slot.shape for name, slot in slots.items()})
        modules = dict(model.named_modules())
        self.swapped = Swapped({}, self._plan.dense)
        for name, slot in slots.items():
            linear = self._linear(name, slot, modules[slot.place].bias)
            exchange(modules, slot.place, linear)
            self.swapped.linears[slot.place] = linear
        return model

    def _linear(self, name: str, slot: Slot, bias: Tensor | None) -> NativeLinear:
        stored = Stored(self.checkpoint, self._plan.format, name, slot.size, slot.scheme)
        packed = stored.pack(slice(0, slot.size[0]), None if bias is None else bias.detach())
        eight_bit = self._eight_bit and packed.takes_eight_bit
        inputs = "int8" if eight_bit else input_name(slot.scheme)
        kernel = f"cpu-{native().isa()} {weight_name(slot.scheme, packed.bits)} x {inputs}"
        return NativeLinear(packed, bias, kernel, eight_bit)
