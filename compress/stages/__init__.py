"""The stages of a recipe, one file a kind: quantise, prune, distil.

What contradicts itself is refused here, before any work.
"""

from compress.stages.distill import AnswersConfig, DistillStage
from compress.stages.prune import PruneStage
from compress.stages.quantize import Override, QuantizeStage

Stage = QuantizeStage | PruneStage | DistillStage

__all__ = [
    "AnswersConfig",
    "DistillStage",
    "Override",
    "PruneStage",
    "QuantizeStage",
    "Stage",
]
