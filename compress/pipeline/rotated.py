"""A model with rotations fused into its weights, as a view of the one on disk: tensors are turned as they are read.

So the rotated model streams block by block like any other, nothing of it is held or written beforehand, and a resumed
run reads the same. Its float model is checked against the original before the first block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.errors import UserError, WorkError
from compress.models import residual
from compress.models.checkpoint import Checkpoint
from compress.models.safetensors_header import TensorInfo
from compress.models.skeleton import LinearSpec, Skeleton
from compress.pipeline.work import Problem
from compress.pipeline.zeros import recorded_as_pruned
from compress.pruning.masks import zero_mask
from compress.quantization.configs import HadamardConfig
from compress.quantization.hadamard import Rotation, Rows, Turn, order

if TYPE_CHECKING:
    from compress.progress import Progress

TOLERANCE = 1e-3
"""How far the rotated float model's logits may be from the original's, as a share of their norm, in float32."""


class Rotated(Checkpoint):
    """The checkpoint `source` after `turns` (by module name) and with `filled` norms (name -> value of every gain).

    untied: a head's tensor name -> the tensor that it was tied to, which becomes one of its own. exact: tensors that
    are given in float32, because they will be quantised; all others are rounded to the dtype in which they are stored.
    linears: weights that are refused where they were pruned, since turning fills zeros.
    Hashes and sizes are the source's.
    """

    def __init__(
        self,
        source: Checkpoint,
        turns: dict[str, Turn],
        filled: dict[str, float],
        untied: dict[str, str],
        exact: Iterable[str] | None,
        linears: Iterable[str],
    ) -> None:
        index = dict(source.index)
        for name, original in untied.items():
            index[name] = replace(source.index[original], name=name)
        config = {**source.config, "tie_word_embeddings": False} if untied else source.config
        super().__init__(source.path, config, dict(sorted(index.items())))
        self.source = source
        self._turns, self._filled, self._untied = turns, filled, untied
        self._exact = set(index) if exact is None else set(exact)
        self._linears, self._sparse = set(linears), recorded_as_pruned(source)

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    def origin(self, name: str) -> str:
        return self._untied.get(name, name)

    def changes(self, name: str) -> bool:
        module = name.rpartition(".")[0]
        if name in self._filled or name in self._untied:
            return True
        turn = self._turns.get(module)
        return turn is not None and (name.endswith(".weight") or turn.outputs is not None)

    def sha256(self, name: str) -> str:
        return self.source.sha256(name)

    def digest(self, progress: Progress | None = None) -> str:
        return self.source.digest(progress)

    @property
    def source_index(self) -> Mapping[str, TensorInfo]:
        return self.source.index

    def read(self, name: str) -> Tensor:
        stored = self.source.read(self.origin(name))
        if name in self._filled:
            return torch.full_like(stored, self._filled[name])
        if not self.changes(name):
            return stored
        return self._turned(name, stored)

    def read_rows(self, name: str, rows: Tensor | slice) -> Tensor:
        stored = self.source.read(self.origin(name))[rows]
        return self._turned(name, stored) if self.changes(name) else stored

    def _turned(self, name: str, stored: Tensor) -> Tensor:
        turn = self._turns[name.rpartition(".")[0]]
        recorded = name.removesuffix(".weight") in self._sparse
        if name in self._linears and zero_mask(stored, recorded) is not None:
            raise UserError(
                f"{name} was pruned, and a rotation would fill its zeros",
                "use a method that keeps them, such as gptq, or the model that it was pruned from",
            )
        dtype = torch.float32 if name in self._exact else stored.dtype
        return turn.weight(stored, dtype) if name.endswith(".weight") else turn.bias(stored).to(dtype)


def problems(method: HadamardConfig, skeleton: Skeleton) -> list[Problem]:
    """What of this rotation the model does not allow."""
    family = skeleton.family.model_type
    if family in residual.WITH_MEAN:
        said = f"{family} models cannot be rotated: their layer norms subtract a mean, which no rotation keeps"
        return [Problem(said, "against outliers use awq, with `rounding: gptq`")]
    if method.residual and family in residual.HEADS_ONLY:
        said = f"the residual stream of {family} models cannot be rotated: norms scale what is written to it"
        return [Problem(said, "set `residual: false` to rotate heads alone")]
    able = (*residual.ROTATABLE, *residual.HEADS_ONLY)
    if family not in able:
        return [Problem(f"{family} models cannot be rotated yet", f"families that can: {', '.join(sorted(able))}")]
    found = []
    strange = sorted(set(skeleton.outer_tensors()) - set(_outside(skeleton).values()) - skeleton.stored_copies())
    strange = [name for name in strange if not name.endswith("inv_freq")]
    if method.residual and strange:
        said = f"{strange[0]} stands outside the blocks, and what it does to the residual stream is not known"
        found.append(Problem(said, "set `residual: false` to rotate heads alone"))
    width, head = int(skeleton.checkpoint.config["hidden_size"]), _values(skeleton).size
    for wanted, size, key in ((method.residual, width, "residual"), (method.heads, head, "heads")):
        if wanted and order(size) is None:
            said = f"no Hadamard matrix of order {size} is known here"
            found.append(Problem(said, f"set `{key}: false` in the recipe"))
    return found


def rotated(method: HadamardConfig, skeleton: Skeleton, seed: int, exact: Iterable[str] | None) -> Checkpoint:
    """The rotated view of the model; `problems` must have found none. exact: as Rotated has it, None for all."""
    checkpoint = skeleton.checkpoint
    turns: dict[str, Turn] = {}
    filled: dict[str, float] = {}
    untied: dict[str, str] = {}
    stream = Rotation.random(int(checkpoint.config["hidden_size"]), seed) if method.residual else None
    for block in range(skeleton.num_blocks):
        specs = skeleton.linears(block)
        if stream is not None:
            for edge in skeleton.edges(block):
                if edge.producer.endswith(residual.NORMS):
                    gain = _gain(checkpoint, f"{edge.producer}.weight", edge.offset)
                    filled[f"{edge.producer}.weight"] = 0.0 if edge.offset else 1.0
                    turns |= {name: Turn(gain=gain, inputs=stream) for name in edge.consumers}
            turns |= {spec.name: Turn(outputs=stream) for spec in specs if spec.name.endswith(residual.WRITERS)}
        if method.heads:
            _turn_heads(turns, specs, _values(skeleton), seed + 1 + block)
    if stream is not None:
        outside = _outside(skeleton)
        offset = skeleton.family.offset_norms
        turns[_module(outside["embedding"])] = Turn(inputs=stream)
        gain = _gain(checkpoint, outside["norm"], offset)
        filled[outside["norm"]] = 0.0 if offset else 1.0
        turns[_module(outside["head"])] = Turn(gain=gain, inputs=stream)
        if outside["head"] not in checkpoint.index:
            untied[outside["head"]] = outside["embedding"]
        elif outside["head"] in skeleton.stored_copies():
            untied[outside["head"]] = outside["head"]
    linears = (spec.weight for spec in skeleton.linears())
    return Rotated(checkpoint, turns, filled, untied, exact, linears)


def check(method: HadamardConfig, source: Checkpoint, seed: int, tokens: Tensor) -> float:
    """How far the rotated float model's logits are from the original's on one window, as a share of their norm.

    Both stream block by block in float32. tokens: (1, seq). Raises WorkError where they are further than rounding, and
    UserError for a pruned model.
    """
    original = Skeleton(source, torch.float32)
    turned = Skeleton(rotated(method, original, seed, None), torch.float32)
    logits = []
    for skeleton in (original, turned):
        hidden, calls = skeleton.embed(tokens)
        with torch.inference_mode():
            for block in range(skeleton.num_blocks):
                hidden = skeleton.run_block(skeleton.materialise(block), hidden, calls[block])
        logits.append(skeleton.head(hidden))
    change = float((logits[1] - logits[0]).norm() / logits[0].norm())
    if not change <= TOLERANCE:
        raise WorkError(
            f"rotating the model moved its float logits by {change:.1e} of their norm",
            "nothing was written; report this model's config.json, or use another method",
        )
    return change


def _turn_heads(turns: dict[str, Turn], specs: list[LinearSpec], values: residual.Values, seed: int) -> None:
    """Adds the rotation of values and of what o_proj reads to the turns of one block."""
    rotation = Rotation.random(values.size, seed)
    rows = Rows(values.start, values.heads, values.stride, values.size)
    for spec in specs:
        before = turns.get(spec.name, Turn())
        if spec.name.endswith(values.linear):
            turns[spec.name] = replace(before, outputs=rotation, rows=rows)
        elif spec.name.endswith(".o_proj"):
            turns[spec.name] = replace(before, inputs=rotation)


def _outside(skeleton: Skeleton) -> dict[str, str]:
    """Checkpoint names of the embedding, the final norm and the head."""
    norms = [name for name in skeleton.outer_tensors() if name.endswith("norm.weight")]
    return {"embedding": skeleton.embedding, "head": skeleton.head_weight, **({"norm": norms[0]} if norms else {})}


def _values(skeleton: Skeleton) -> residual.Values:
    return residual.values(skeleton.checkpoint.config, skeleton.family.model_type)


def _gain(checkpoint: Checkpoint, norm: str, offset: bool) -> Tensor:
    return checkpoint.read(norm).double() + (1.0 if offset else 0.0)


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")
