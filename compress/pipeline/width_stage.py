"""A width cut in the loop over blocks, and the check that what was written is the model that was cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compress.errors import WorkError
from compress.pipeline import output, width_block
from compress.pipeline.block import Workers
from compress.pipeline.inputs import Activations
from compress.pipeline.kinds import Fate, Written
from compress.pipeline.source import read_finite
from compress.pipeline.width_job import WidthJob, config_of

# The narrow model's logits may differ from the live blocks' by this share of their norm: the order of sums, no more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


class WidthKind:
    """As `kinds.Kind` has it."""

    keeps_last_state = True

    def doing(self, job: WidthJob) -> str:
        return f"cutting blocks ({job.cut.neurons} of {job.cut.all_neurons} neurons)"

    def through_block(self, job: WidthJob, block: int, entering: Activations | None, workers: Workers) -> Written:
        assert entering is not None
        list(workers.pool.map(lambda name: read_finite(job.checkpoint, name), job.skeleton.block_tensors(block)))
        narrow = width_block.through_block(job, block, entering, workers)
        fate: Fate = {name: ("repaired" if name in narrow.repaired else "pruned", [name]) for name in narrow.tensors}
        rest = [name for name in job.skeleton.block_tensors(block) if name not in fate]
        tensors, fate = output.keep(job, rest, narrow.tensors, fate)
        return Written(tensors, fate, layers=narrow.layers, activations=narrow.activations)

    def config(self, job: WidthJob) -> dict[str, Any]:
        return config_of(job)

    def check(self, job: WidthJob, directory: Path, leaving: Activations | None) -> None:
        """Refuses a directory that transformers does not load as the model that was cut.

        leaving: the activations behind the last block. Raises WorkError.
        """
        from transformers import AutoModelForCausalLM

        assert job.calibration is not None
        assert leaving is not None
        hidden = leaving.quantized[0][:1]
        wanted = job.skeleton.head(hidden)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=job.skeleton.dtype, output_loading_info=True, local_files_only=True
        )
        model, info = loaded
        strays = [name for names in info.values() for name in names]
        with torch.inference_mode():
            found = model.eval()(job.calibration.tokens[:1], use_cache=False).logits.float()
        change = float((found - wanted).norm() / wanted.norm())
        if strays or not change <= TOLERANCE[job.skeleton.dtype]:
            raise WorkError(
                f"transformers loads the cut model as another: its logits are {change:.1e} off, {len(strays)} tensors "
                "do not fit",
                "nothing was published; report this model's config.json",
            )
