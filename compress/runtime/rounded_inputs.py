"""Dense linears that round their inputs as the checkpoint's kernels would, so that scores are those of its scheme."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from compress.errors import UserError
from compress.formats.inputs import round_inputs
from compress.types import InputScheme


def round_inputs_of(model: nn.Module, schemes: Mapping[str, tuple[InputScheme, Tensor | None]]) -> None:
    """Makes the linears of a dense model round what enters them.

    schemes: by checkpoint name of the linear, with the scale (1,) of static inputs.

    Raises:
        UserError: a linear that the model does not keep as a module of its own, as it fuses experts.
    """
    modules = dict(model.named_modules())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name, (scheme, scale) in schemes.items():
        module = modules.get(name, modules.get(prefix + name))
        if module is None:
            raise UserError(
                f"{name} rounds its inputs, and transformers has no linear of its own for it",
                "run the model in an engine that has, or make it again with a weight-only scheme",
            )
        module.register_forward_pre_hook(_hook(scheme, scale))


def _hook(scheme: InputScheme, scale: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def replace(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (round_inputs(args[0], scheme, scale), *args[1:])

    return replace
