"""Between transformers' tensor names and the names on disk: prefixes left out, older names, tied tensors."""

from __future__ import annotations

import re
from functools import cached_property

from transformers import PreTrainedModel

from compress.errors import IntegrityError, UserError
from compress.models.checkpoint import Checkpoint
from compress.models.families import Family

_OLD_BUFFERS = (r"rotary_emb\.inv_freq",)  # stored by older checkpoints; transformers computes them and drops these


class Names:
    """The checkpoint name of each tensor of one model."""

    def __init__(self, checkpoint: Checkpoint, family: Family, model: PreTrainedModel) -> None:
        self._checkpoint = checkpoint
        self._renames = family.renames
        self._aliases = dict(model.all_tied_weights_keys)
        self._prefix = model.base_model_prefix + "."
        if any(name.startswith(self._prefix) for name in checkpoint.index):
            self._prefix = ""  # the checkpoint spells it out, so nothing is to be taken off

    def disk(self, name: str) -> str:
        """The name under which the checkpoint holds this tensor or module, or would hold it if it did."""
        name = name.removeprefix(self._prefix)
        for ours, theirs in self._renames:
            renamed = name.replace(ours, theirs)
            if renamed != name and (renamed in self._checkpoint.index or f"{renamed}.weight" in self._checkpoint.index):
                return renamed
        return name

    def stored(self, name: str) -> str:
        """The checkpoint tensor that gives this model tensor its value, through the tie where there is one."""
        disk = self.disk(name)
        return self.tied.get(disk, disk)

    @cached_property
    def tied(self) -> dict[str, str]:
        """Checkpoint names: alias -> the stored tensor it equals. Two stored tensors that differ are not tied."""
        ties = {}
        for alias, source in self._aliases.items():
            alias, source = self.disk(alias), self.disk(source)
            if source not in self._checkpoint.index:
                alias, source = source, alias
            if alias not in self._checkpoint.index or self._equal(alias, source):
                ties[alias] = source
        return ties

    def check(self, model: PreTrainedModel) -> None:
        """Raises IntegrityError for a tensor of the model that the checkpoint lacks or holds in another shape.

        So it does for one that the checkpoint holds and transformers has neither a place nor an exception for: what
        is made from such a checkpoint could not be loaded. Raises UserError for a weight that is stored in 8 bits or
        as integers: someone quantised it without saying so.
        """
        for name, tensor in model.state_dict().items():
            disk = self.stored(name)
            info = self._checkpoint.index.get(disk)
            if info is None:
                raise self._missing(disk)
            if info.shape != tuple(tensor.shape):
                raise IntegrityError(
                    f"{disk} has shape {list(info.shape)} where config.json asks for {list(tensor.shape)}",
                    "config.json and the weights belong to different models: fetch the directory again",
                )
            if tensor.is_floating_point() and (not info.dtype.is_floating_point or info.dtype.itemsize < 2):
                raise UserError(
                    f"{disk} is already quantised: it is stored as {info.dtype}", "start from the full-precision model"
                )
        if unplaced := self._unplaced(model):
            more = f" and {len(unplaced) - 1} more" if len(unplaced) > 1 else ""
            raise IntegrityError(
                f"{self._checkpoint.path} holds {unplaced[0]}{more}, which its config.json has no place for",
                "config.json belongs to another model, or transformers does not know these parts: leave them out",
            )

    def _unplaced(self, model: PreTrainedModel) -> list[str]:
        """Stored tensors that are no tensor of the model, and that its class does not leave out on loading."""
        placed = {place(name) for name in model.state_dict() for place in (self.disk, self.stored)}
        left_out = (*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_OLD_BUFFERS)
        others = (name for name in self._checkpoint.index if name not in placed)
        return [name for name in others if not any(re.search(pattern, name) for pattern in left_out)]

    def _missing(self, disk: str) -> Exception:
        fused = next((name for name in self._checkpoint.index if name.endswith("experts.gate_up_proj")), None)
        if fused is not None and ".experts." in disk:
            return UserError(
                f"{self._checkpoint.path} stores its experts fused ({fused}); one 2-D tensor per expert is supported",
                "load it with transformers and save it again with save_pretrained, which writes one tensor per expert",
            )
        return IntegrityError(
            f"{self._checkpoint.path} lacks the tensor {disk}, which its config.json asks for",
            "the checkpoint is incomplete or config.json belongs to another model: fetch the directory again",
        )

    def _equal(self, a: str, b: str) -> bool:
        first, second = self._checkpoint.index[a], self._checkpoint.index[b]
        alike = (first.dtype, first.shape) == (second.dtype, second.shape)
        return alike and self._checkpoint.sha256(a) == self._checkpoint.sha256(b)
