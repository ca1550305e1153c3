"""What a run would make, need and take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.recipe_build import Settings
from compress.workflows.api._given import PathLike, whole_recipe

if TYPE_CHECKING:
    from compress.pipeline import AnyPlan
    from compress.recipe import Recipe


def plan(
    model: PathLike | None = None,
    method: str | None = None,
    bits: int | None = None,
    *,
    recipe: Recipe | PathLike | None = None,
    group_size: int | str | None = None,
    symmetric: bool | None = None,
    scheme: str | None = None,
    kv_cache: str | None = None,
    ignore: Sequence[str] = (),
    embeddings: str | None = None,
    head: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    output: PathLike | None = None,
    device: str = "auto",
) -> AnyPlan:
    """What `quantize` with the same arguments would make and cost; of a recipe that prunes, what that would.

    Writes nothing.

    Returns:
        The scheme and bits per weight of every linear, bytes of the output, peak memory in bytes, seconds; `problems`
        holds what would make the run fail, such as a group size that does not divide a linear's input width.

    Raises:
        UserError, IntegrityError: as `quantize`.
    """
    from compress import pipeline

    settings = Settings(
        method=method,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        scheme=scheme,
        kv_cache=kv_cache,
        ignore=ignore,
        embeddings=embeddings,
        head=head,
        samples=samples,
        seq_len=seq_len,
    )
    return pipeline.plan(whole_recipe(recipe, settings), model=model, output=output, device=device, scored=True)
