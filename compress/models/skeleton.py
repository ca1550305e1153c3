"""A model as its decoder blocks, streamed: everything on the meta device, one block made real at a time.

The model's own forward is run with stand-ins for the blocks. They record the arguments each block gets (masks and
position embeddings differ by layer type), and let `head` start from given hidden states. No forward is rebuilt here,
so scaled embeddings, learned positions, final projections and softcapped logits are the model's own.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from compress.models import graph, meta
from compress.models.checkpoint import Checkpoint
from compress.models.families import Edge
from compress.models.names import Names
from compress.models.streamed_head import StreamedHead

Call = dict[str, Any]
"""How a block is called besides the hidden states: {"args": tuple, "kwargs": dict}."""


OUTSIDE = -1
"""What stands for the block of what is in none."""


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One quantisable linear. `name` is its checkpoint name without `.weight`, `weight` that of its 2-D tensor.

    block: OUTSIDE for the token embedding and the head.

    layout "linear": stored (out, in); "conv1d": stored (in, out), as GPT-2 does. `expert`: its number, or None.
    """

    name: str
    block: int
    in_features: int
    out_features: int
    layout: Literal["linear", "conv1d"]
    expert: int | None
    weight: str


class Skeleton:
    """The model of `checkpoint` without its weights; `dtype` is what blocks compute in.

    Raises UserError for a model that is not supported, IntegrityError for a tensor that the model needs and the
    checkpoint lacks or holds in another shape.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.family = meta.supported_family(checkpoint)
        self._model = meta.build(checkpoint.config, self.family, dtype)
        self._blocks = meta.blocks_of(self._model, self.family)
        self._names = Names(checkpoint, self.family, self._model)
        self._names.check(self._model)
        self._fp32 = tuple(getattr(self._model, "_keep_in_fp32_modules_strict", None) or ())
        self._load_outer()

    @property
    def num_blocks(self) -> int:
        """How many decoder blocks the model has."""
        return len(self._blocks)

    @property
    def max_positions(self) -> int:
        """The longest sequence, in tokens, that the model was made for."""
        return int(self._model.config.max_position_embeddings)

    @property
    def embedding(self) -> str:
        """Checkpoint name of the token embedding."""
        return self._embedding_name

    @property
    def head_weight(self) -> str:
        """Checkpoint name of the head's weight, whether it is stored or tied."""
        return self._head_weight

    @property
    def output_projection(self) -> StreamedHead:
        """What makes logits in `head`."""
        return cast(StreamedHead, self._model.get_output_embeddings())

    @property
    def vocabulary(self) -> int:
        """How many token ids the embedding has rows for."""
        return int(self.checkpoint.index[self._embedding_name].shape[0])

    @property
    def config(self) -> Any:
        """config.json as transformers reads it, every default filled in."""
        return self._model.config

    def linears(self, block: int | None = None) -> list[LinearSpec]:
        """The quantisable linears of one block, or of all, in the order the block defines them; no routers, no head."""
        if block is None:
            return [spec for number in range(self.num_blocks) for spec in self.linears(number)]
        return [
            self._spec(block, name, module) for name, module in graph.linears(self._blocks[block], self.family).items()
        ]

    def edges(self, block: int) -> list[Edge]:
        """Where a scale can move inside this block without changing it; names are checkpoint module names."""
        return [
            replace(
                edge,
                producer=self._disk(block, edge.producer),
                consumers=tuple(self._disk(block, name) for name in edge.consumers),
            )
            for edge in graph.edges(self._blocks[block], self.family, self._model.config)
        ]

    def branches(self, block: int) -> dict[str, str]:
        """Linears of this block that add to the residual stream -> the norms that read it where they add; by name."""
        found = graph.branches(self._blocks[block], self.family, self._model.config)
        return {self._disk(block, writer): self._disk(block, norm) for writer, norm in found.items()}

    def fusion_groups(self, block: int) -> list[tuple[str, ...]]:
        """Linears of this block that engines load as one matrix and that must share a scheme, by checkpoint name."""
        groups = graph.fusion_groups(self._blocks[block], self.family)
        return [tuple(self._disk(block, name) for name in group) for group in groups]

    def stored_name(self, parameter: str) -> str:
        """The checkpoint tensor behind a parameter of the model as transformers builds it, by its name there."""
        return self._names.stored(parameter)

    def tied(self) -> dict[str, str]:
        """Checkpoint tensor names, alias -> stored tensor that it equals, whether or not the alias is stored too."""
        return dict(self._names.tied)

    def stored_copies(self) -> set[str]:
        """Stored tensors that repeat the one they are tied to; they are no weights of their own."""
        index = self.checkpoint.index
        return {
            alias for alias, target in self.tied().items() if alias != target and alias in index and target in index
        }

    def parameters(self) -> int:
        """How many weights the checkpoint holds, stored copies of tied ones not counted."""
        index = self.checkpoint.source_index
        return sum(math.prod(index[name].shape) for name in index.keys() - self.stored_copies())

    def block_tensors(self, block: int) -> list[str]:
        """All checkpoint tensors under this block's name, those that no module uses included, sorted."""
        return [name for name in self.checkpoint.index if name.startswith(self.block_prefix(block))]

    def block_prefix(self, block: int) -> str:
        """What the checkpoint names of all tensors of this block begin with, the last dot included."""
        return self._names.disk(f"{self.family.blocks}.{block}") + "."

    def outer_tensors(self) -> list[str]:
        """All checkpoint tensors that belong to no block: embeddings, final norm, head, and extras such as MTP."""
        inside = {name for block in range(self.num_blocks) for name in self.block_tensors(block)}
        return [name for name in self.checkpoint.index if name not in inside]

    def outer_linears(self) -> list[str]:
        """Checkpoint names of the linears outside all blocks: the head, and projections around the blocks.

        Those that only the checkpoint knows count too, such as a multi-token-prediction layer's: any stored matrix
        that is not called what the model's embeddings are called.
        """
        modules = self._model.named_modules()
        embeddings = {self._names.disk(name).rpartition(".")[2] for name, m in modules if isinstance(m, nn.Embedding)}
        index = self.checkpoint.index
        matrices = [name for name in self.outer_tensors() if name.endswith(".weight") and len(index[name].shape) == 2]
        found = {name.removesuffix(".weight") for name in matrices}
        return sorted({name for name in found if name.rpartition(".")[2] not in embeddings} | {self._head_name})

    def materialise(self, block: int) -> nn.Module:
        """A new copy of the block with its weights in `dtype`, in eval mode, without gradients.

        Every call gives an independent module. Tensors that the architecture keeps in float32 stay so.
        """
        template = self._blocks[block]
        shared = {id(self._model.config): self._model.config}
        module = copy.deepcopy(template, shared)
        self._fill(module, f"{self.family.blocks}.{block}.")
        return module

    def modules(self, block: int, module: nn.Module) -> dict[str, nn.Module]:
        """Checkpoint module name -> live module of a materialised block: linears, norms, routers."""
        return {self._disk(block, name): child for name, child in graph.weighted(module).items()}

    def router_tensors(self, block: int) -> list[str]:
        """Checkpoint names of the tensors of this block's router, with a row or an entry for every expert."""
        prefixes = tuple(self._disk(block, name) + "." for name in self.family.routers)
        return [name for name in self.block_tensors(block) if name.startswith(prefixes)] if prefixes else []

    def release(self, module: nn.Module) -> None:
        """Frees a materialised block's memory even where something still refers to the module."""
        module.to("meta")

    @torch.no_grad()
    def embed(
        self, token_ids: torch.Tensor, rows: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[Call]]:
        """token_ids (batch, seq) -> the hidden states (batch, seq, hidden) entering block 0, and each block's Call.

        On the CPU. A Call holds for this batch size and sequence length. rows: gives rows (tokens, width) of another
        table in place of the checkpoint's.
        """
        used, positions = token_ids.cpu().unique(return_inverse=True)
        found = self.checkpoint.read_rows(self._embedding_name, used) if rows is None else rows(used)
        table = found.to(self.dtype)
        embedded = torch.func.functional_call(self._embedding, {"weight": table}, (positions,))
        first: list[torch.Tensor] = []
        calls: list[Call] = []

        def record(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            first.append(hidden)
            calls.append({"args": args, "kwargs": kwargs})
            return hidden

        with self._stand_ins([record] * self.num_blocks):
            self._model.base_model(inputs_embeds=embedded, use_cache=False)
        return first[0], calls

    def run_block(self, module: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """The block's output (batch, seq, hidden) for its input, called as the model calls it, on hidden's device."""
        call = tree_map_only(torch.Tensor, lambda tensor: tensor.to(hidden.device), call)
        output = module(hidden, *call["args"], **call["kwargs"])
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last block's output (batch, seq, hidden) -> logits (batch, seq, vocabulary) in float32, on the CPU."""
        return self.differentiable_head(hidden.cpu())

    def outer_modules(self) -> dict[str, nn.Module]:
        """Checkpoint module name -> live module outside the blocks with a weight in memory: norms, projections."""
        prefix = self.family.blocks + "."
        found = graph.weighted(self._model)
        return {
            self._names.disk(name): module
            for name, module in found.items()
            if not name.startswith(prefix) and not graph.weight_of(module).is_meta
        }

    @torch.no_grad()
    def before_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last block's output (batch, seq, hidden) -> what the head reads, on the CPU. One thread at a time."""
        read: list[torch.Tensor] = []

        def reads(head: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            read.append(given[0])
            return (given[0][:, :0],)  # the product is not asked for

        handle = self._model.get_output_embeddings().register_forward_pre_hook(reads)
        try:
            self.differentiable_head(hidden.cpu())
        finally:
            handle.remove()
        return read[0]

    def differentiable_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `head`, and gradients flow back to `hidden` where they are enabled. One thread at a time may call it."""
        blank = hidden.new_zeros(*hidden.shape[:2], self._embedding.embedding_dim)

        def skip(entering: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return entering

        def supply(entering: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return hidden

        with self._stand_ins([skip] * (self.num_blocks - 1) + [supply]):
            return self._model(inputs_embeds=blank, use_cache=False).logits.float()

    def _load_outer(self) -> None:
        """Makes real what stands outside the blocks; the two vocabulary-sized matrices stay mapped instead."""
        names = {module: name for name, module in self._model.named_modules()}
        self._embedding = cast(nn.Embedding, self._model.get_input_embeddings())
        self._embedding.padding_idx = None  # `embed` looks tokens up in a table of just the rows in use
        self._embedding_name = self._names.stored(names[self._embedding] + ".weight")
        self._head_name = self._names.disk(names[self._model.get_output_embeddings()])
        self._head_weight = self._names.disk(names[self._model.get_output_embeddings()] + ".weight")
        head = self._names.stored(names[self._model.get_output_embeddings()] + ".weight")
        self._model.set_output_embeddings(StreamedHead(self.checkpoint, head))
        self._fill(self._model, "", skip=(names[self._embedding] + ".", self.family.blocks + "."))

    def _fill(self, module: nn.Module, prefix: str, skip: tuple[str, ...] = ()) -> None:
        """Replaces the module's meta parameters and persistent buffers by the checkpoint's, cast and copied."""
        for name in module.state_dict():
            if name.startswith(skip):
                continue
            parent_path, _, leaf = name.rpartition(".")
            parent = module.get_submodule(parent_path)
            tensor = self.checkpoint.read(self._names.stored(prefix + name))
            tensor = tensor.to(self._dtype_of(prefix + name, tensor), copy=True)
            if leaf in parent._buffers:
                parent._buffers[leaf] = tensor
            else:
                parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def _dtype_of(self, name: str, tensor: torch.Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        keeps = any(re.search(rf"(^|\.){re.escape(part)}($|\.)", name) for part in self._fp32)
        return torch.promote_types(self.dtype, torch.float32) if keeps else self.dtype

    @contextmanager
    def _stand_ins(self, forwards: list[Callable[..., torch.Tensor]]) -> Iterator[None]:
        """The blocks of the model answer with these functions instead of their own forward."""
        try:
            for block, forward in zip(self._blocks, forwards, strict=True):
                block.forward = forward
            yield
        finally:
            for block in self._blocks:
                block.__dict__.pop("forward", None)

    def _spec(self, block: int, name: str, module: nn.Module) -> LinearSpec:
        in_features, out_features = graph.features(module)
        disk = self._disk(block, name)
        experts = self.family.experts
        number = name.removeprefix(experts.path + ".").split(".")[0] if experts is not None else ""
        return LinearSpec(
            name=disk,
            block=block,
            in_features=in_features,
            out_features=out_features,
            layout="conv1d" if isinstance(module, Conv1D) else "linear",
            expert=int(number) if number.isdigit() else None,
            weight=f"{disk}.weight",
        )

    def _disk(self, block: int, name: str) -> str:
        return self._names.disk(f"{self.family.blocks}.{block}.{name}")
