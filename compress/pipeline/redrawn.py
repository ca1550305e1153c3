"""More calibration windows out of the same ones: copies in which the original model has drawn some tokens anew.

Behind every place the original model gives a distribution of the next token. Copies of a window keep most of its
tokens and draw the others from those distributions, each behind the window as it was read. One forward pass serves all
copies of a window, where text that a model writes itself takes a pass per token. Statistics over few windows fit what
those happen to say; the copies are what else might have stood there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compress.errors import WorkError
from compress.models.skeleton import Skeleton
from compress.pipeline import inputs
from compress.pipeline.block import Workers
from compress.pipeline.work import Work
from compress.progress import Progress
from compress.recipe_sections import CalibrationConfig


def extended(job: Work, workers: Workers, progress: Progress) -> Work:
    """The job with its calibration windows (samples, seq) followed by the copies of the first, of the second, ...

    The same job where the recipe asks for none. Raises WorkError where the original model gives no distribution.
    """
    wanted, drawn = job.stage.calibration, job.calibration
    if not isinstance(wanted, CalibrationConfig) or not wanted.redrawn or drawn is None:
        return job
    progress.begin("drawing calibration tokens anew", job.skeleton.num_blocks)
    entering = inputs.enter(job.skeleton, drawn.tokens, False)
    for block in range(job.skeleton.num_blocks):
        module = job.skeleton.materialise(block)
        outputs = list(workers.pool.map(lambda run: run(), entering.runs(job.skeleton, module)))
        entering = entering.advanced(outputs)
        job.skeleton.release(module)
        progress.advance(f"block {block}")
    leaving = [window for chunk in entering.quantized for window in chunk.split(1)]
    copies = redraw(job.skeleton, drawn.tokens, leaving, wanted.redrawn, wanted.redrawn_share, job.recipe.seed)
    progress.end()
    return replace(job, learnt_from=replace(drawn, tokens=torch.cat([drawn.tokens, copies])))


def redraw(
    skeleton: Skeleton, tokens: Tensor, leaving: Sequence[Tensor], count: int, share: float, seed: int
) -> Tensor:
    """`count` copies of each window: (samples * count, seq) int64, those of one window side by side.

    tokens: (samples, seq). leaving: of each window the last block's output (1, seq, hidden). share: of the tokens
    behind the first, how many are drawn, on the average.
    """
    generator = torch.Generator().manual_seed(seed)
    copies = []
    for window, hidden in zip(tokens, leaving, strict=True):
        cumulative = skeleton.head(hidden)[0, :-1].softmax(-1).cumsum(-1)
        if not torch.isfinite(cumulative[:, -1]).all():
            raise WorkError(
                "the original model's distributions are not finite, so no token can be drawn from them",
                "set calibration.redrawn to 0, and check the source with `compress eval`",
            )
        shape = (cumulative.shape[0], count)
        level = torch.rand(shape, generator=generator) * cumulative[:, -1:]
        found = torch.searchsorted(cumulative, level, right=True).clamp_(max=cumulative.shape[1] - 1)
        stays = torch.rand(shape, generator=generator) >= share
        rest = torch.where(stays, window[1:, None], found)
        copies.append(torch.cat([window[:1].expand(count, 1), rest.T], dim=1))
    return torch.cat(copies)


def learning(windows: Sequence[int], samples: int, total: int) -> list[int]:
    """These of the `samples` windows with all their copies, by their places among `total` that `extended` gives."""
    count = total // samples - 1
    return [*windows, *(samples + window * count + copy for window in windows for copy in range(count))]
