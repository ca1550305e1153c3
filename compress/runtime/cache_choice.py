"""How each layer keeps keys and values: what was asked for, without the layers that lose most by it.

What a cache loses is measured, in nats per token of KL to the same model over a cache that loses nothing, on the
beginning of the shipped calibration text. FP8 without calibrated scales holds nothing beyond 448, which breaks models
with large keys: such a model is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import UserError
from compress.runtime.loss import divergence, predictions

if TYPE_CHECKING:
    from compress.runtime.paged_model import PagedModel

CACHES = ("float32", "bfloat16", "fp8", "int8", "nvfp4", "int4", "int2")
SKIPPED = "bfloat16"
"""What a layer gets that is skipped."""

TOKENS = 256
COLLAPSED = 0.1
"""KL in nats per token from which an FP8 cache without calibrated scales is refused."""

_SHARE = 4  # `auto` skips until a fourth of the loss is left, and a fourth of the layers at most

Scales = tuple[float, float]


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's cache, and the scales of its keys and values where it is FP8."""

    kind: str
    scales: Scales = (1.0, 1.0)


@dataclass(frozen=True, slots=True)
class CacheChoice:
    """What every layer keeps. kl: measured for it, and kl_of_all: with no layer skipped; None: not measured."""

    kind: str
    layers: tuple[LayerCache, ...]
    skipped: tuple[int, ...] = ()
    kl: float | None = None
    kl_of_all: float | None = None


def choose(
    model: PagedModel, kind: str, skip: str, stored: Sequence[Scales] | None, tokens: Callable[[], Sequence[int]]
) -> CacheChoice:
    """The cache of every layer, already set in `model`.

    skip: `none`, `auto` (measured) or numbers of layers with commas. stored: calibrated scales by layer. tokens: what
    is measured on; asked for where something is.

    Raises:
        UserError: an unknown kind or layer, heads that a kind cannot hold, or FP8 without scales that breaks the model.
    """
    count, dim = model.shape.layers, model.shape.head_dim
    if kind not in model.caches:
        raise UserError(f"there is no {kind} key-value cache here", f"choose auto, {', '.join(model.caches)}")
    if kind == "nvfp4" and dim != 16 and dim % 32:
        raise UserError(f"an nvfp4 key-value cache has no place for heads of {dim}", "use --kv-cache int4")
    wanted = [LayerCache(kind, stored[i] if kind == "fp8" and stored else (1.0, 1.0)) for i in range(count)]
    named = _named(skip, count)
    if skip != "none" and kind in (model.caches[0], SKIPPED):
        raise UserError(f"--kv-skip has nothing to skip in a {kind} cache", "choose a smaller --kv-cache")
    choice = CacheChoice(kind, tuple(_without(wanted, named)), named)
    if skip == "auto" or (kind == "fp8" and not stored):
        sample = tokens()
        if not sample:
            raise UserError(
                f"what a {kind} key-value cache loses cannot be measured: no token of the sample is in the vocabulary",
                "name the layers of --kv-skip, or use --kv-cache int8",
            )
        losses = _Losses(model, sample)
        choice = _measured(losses, wanted) if skip == "auto" else _judged(losses, choice)
        if kind == "fp8" and not stored and not (choice.kl or 0.0) <= COLLAPSED:
            raise UserError(
                f"an fp8 key-value cache without calibrated scales breaks this model: KL {choice.kl:.3g} per token",
                "use --kv-cache int8, or store scales: compress quantize --kv-scales fp8",
            )
    model.keep(choice.layers)
    return choice


def _named(skip: str, count: int) -> tuple[int, ...]:
    if skip in ("none", "auto"):
        return ()
    parts = [part.strip() for part in str(skip).split(",")]
    if not all(part.isdecimal() and len(part) < 8 and int(part) < count for part in parts):
        raise UserError(
            f"--kv-skip {skip} names layers that are not there",
            f"give auto, or numbers from 0 to {count - 1} with commas",
        )
    return tuple(sorted({int(part) for part in parts}))


def _without(wanted: Sequence[LayerCache], skipped: Sequence[int]) -> list[LayerCache]:
    return [LayerCache(SKIPPED) if i in skipped else cache for i, cache in enumerate(wanted)]


def _judged(losses: _Losses, choice: CacheChoice) -> CacheChoice:
    return CacheChoice(choice.kind, choice.layers, choice.skipped, losses.of(choice.layers))


def _measured(losses: _Losses, wanted: Sequence[LayerCache]) -> CacheChoice:
    """Skips the layers that lose most alone, one by one, until little enough is lost by the others together."""
    exact = losses.exact
    alone = [losses.of([cache if j == i else exact for j in range(len(wanted))]) for i, cache in enumerate(wanted)]
    worst = sorted(range(len(wanted)), key=lambda i: (-alone[i], i))
    whole = kl = losses.of(wanted)
    skipped: tuple[int, ...] = ()
    for number in range(1, -(-len(wanted) // _SHARE) + 1):
        if kl <= whole / _SHARE:
            break
        skipped = tuple(sorted(worst[:number]))
        kl = losses.of(_without(wanted, skipped))
    return CacheChoice(wanted[0].kind, tuple(_without(wanted, skipped)), skipped, kl, whole)


class _Losses:
    """KL of caches to one that loses nothing, on the same tokens."""

    def __init__(self, model: PagedModel, tokens: Sequence[int]) -> None:
        self._model = model
        self._tokens = tokens
        self.exact = LayerCache(model.caches[0])
        model.keep([self.exact] * model.shape.layers)
        self._exact = predictions(model, tokens)

    def of(self, caches: Sequence[LayerCache]) -> float:
        self._model.keep(caches)
        return divergence(self._exact, predictions(self._model, self._tokens))
