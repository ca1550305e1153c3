"""A width cut made concrete: how many neurons and query heads of every block stay, the same in all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from compress.errors import UserError
from compress.models.skeleton import LinearSpec, Skeleton
from compress.pipeline.cut_job import Cut, CutJob
from compress.pipeline.work import Problem
from compress.pruning.configs import WidthConfig
from compress.recipe_stages import PruneStage

# Families whose blocks are q, k, v, o and gate, up, down, one linear each, and whose config.json can say the cut.
FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
FED_BY_NEURONS, NEURONS = "mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj")
FED_BY_HEADS, HEADS = "self_attn.o_proj", "self_attn.q_proj"


@dataclass(frozen=True, slots=True)
class WidthCut(Cut):
    """Neurons and, of each of kv_heads groups of all_heads query heads of head_dim each, heads that stay."""

    neurons: int
    all_neurons: int
    heads: int
    all_heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    all_parameters: int


@dataclass(frozen=True, kw_only=True)
class WidthJob(CutJob):
    """Everything a plan or a run of a width cut needs."""

    cut: WidthCut

    @property
    def method(self) -> WidthConfig:
        assert isinstance(self.stage.method, WidthConfig)
        return self.stage.method

    @property
    def needs_original(self) -> bool:
        return True


def assign(stage: PruneStage, skeleton: Skeleton) -> tuple[WidthCut, list[Problem]]:
    """The cut nearest below what the stage asks for, and what forbids it.

    Raises UserError for a family whose width cannot be cut.
    """
    method, family = stage.method, skeleton.family.model_type
    assert isinstance(method, WidthConfig)
    assert stage.keep is not None
    if family not in FAMILIES:
        raise UserError(
            f"the width of {family} models cannot be cut yet", f"families that can: {', '.join(sorted(FAMILIES))}"
        )
    config, total = skeleton.checkpoint.config, skeleton.parameters()
    specs = skeleton.linears()
    query = next(spec for spec in specs if spec.name.endswith(HEADS))
    neurons = next(spec for spec in specs if spec.name.endswith(FED_BY_NEURONS)).in_features
    kv_heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    all_heads = int(config["num_attention_heads"]) // kv_heads
    head_dim = query.out_features // (kv_heads * all_heads)
    heads = max(1, math.ceil(all_heads * method.heads))
    lost = (all_heads - heads) * kv_heads * head_dim * _parameters_per_unit(skeleton, specs, FED_BY_HEADS, (HEADS,))
    per_neuron = _parameters_per_unit(skeleton, specs, FED_BY_NEURONS, NEURONS)
    room = math.floor(stage.keep * total) - (total - lost - neurons * per_neuron)
    kept = min(neurons, room // per_neuron // method.multiple * method.multiple)
    problems = []
    if kept < method.multiple:
        smallest = (total - lost - (neurons - method.multiple) * per_neuron) / total
        message = f"keep {stage.keep:g} would leave no neuron: embeddings and attention alone are more"
        problems.append(Problem(message, f"with these settings the smallest keep is {smallest:.3f}"))
        kept = method.multiple
    parameters = total - lost - (neurons - kept) * per_neuron
    return WidthCut(kept, neurons, heads, all_heads, kv_heads, head_dim, parameters, total), problems


def _parameters_per_unit(skeleton: Skeleton, specs: list[LinearSpec], consumer: str, producers: tuple[str, ...]) -> int:
    """Parameters of all blocks that go with one unit: its column in the consumer, its rows and biases before it."""
    index = skeleton.checkpoint.index
    count = 0
    for spec in specs:
        if spec.name.endswith(consumer):
            count += spec.out_features
        elif spec.name.endswith(producers):
            count += spec.in_features + (f"{spec.name}.bias" in index)
    return count


def config_of(job: WidthJob) -> dict[str, Any]:
    """config.json of the result: the source's with the new widths."""
    cut = job.cut
    changed = {"intermediate_size": cut.neurons, "num_attention_heads": cut.heads * cut.kv_heads}
    return {**job.checkpoint.config, **changed, "num_key_value_heads": cut.kv_heads, "head_dim": cut.head_dim}
