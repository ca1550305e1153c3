"""plan() and run(): from a recipe and a model directory to an artifact. The only package that mutates a model.

work.py     what every kind of stage works from: source, calibration tokens, output; resolve.py makes it from a recipe
job.py      a quantisation: linears and their schemes; prune_job.py: linears and their sparsities
plan.py     the dry run: sizes, memory and time of a quantisation; prune_plan.py of a pruning; memory.py, duration.py
kinds.py    what the loop asks of a kind of stage; quantize_stage.py and prune_stage.py answer
inputs.py   the activations that flow from block to block
source.py   reading tensors, refusing what is not finite
block.py    what a method gives back for one block; rtn_block.py, gptq_block.py, awq_block.py,
            smoothquant_block.py, autoround_block.py go through it
twin.py     the original block beside the changed one, linear by linear; stream.py: the residual stream of both
curvature.py, curvature_plan.py  how the outputs of linears move the model's distributions, measured before the loop
handover.py from a method that folds scales to the one that rounds; rotated.py, hadamard_block.py: a model whose
            tensors are turned as they are read
rounded_inputs.py  rounding what enters the linears, where the scheme does
mask_block.py zeros in one block; width_job.py, width_block.py, width_stage.py, width_plan.py: whole neurons and heads
depth_job.py, depth_choice.py, depth_stage.py: whole blocks; experts_job.py, experts_stage.py: whole experts;
            cut_plan.py: plans of cuts that are counted in units
loaded_check.py  refusing a directory that transformers loads as another model than the one that was cut
fold.py     moving a scale from a linear into what feeds it, checked on the live block
linears.py  quantising one linear in row tiles, and measuring the error; masked.py: one linear with zeros;
            zeros.py, joint.py: zeros that stay through a quantisation, or are made by it
distill_job.py, distill_teacher.py, distill_student.py, distill_loop.py, distill_stage.py, distill_plan.py: training
distill_hidden.py  projections between hidden states; packed_student.py  codes that learn; on_policy.py  through trl
teacher_cache.py  what a teacher says, written once; teacher_answers.py its answers to prompts; shards.py how both lie
lineage.py  where a source comes from
output.py   which tensors a block writes, and the ledger
run.py      the loop over blocks: journal, resume, publish
"""

from compress.pipeline.cut_plan import CutPlan
from compress.pipeline.distill_plan import DistillPlan
from compress.pipeline.plan import AnyPlan, Plan, PlannedLinear, plan
from compress.pipeline.prune_plan import PrunedShape, PrunePlan
from compress.pipeline.run import RunResult, run
from compress.pipeline.width_plan import NarrowShape, WidthPlan

__all__ = [
    "AnyPlan",
    "CutPlan",
    "DistillPlan",
    "NarrowShape",
    "Plan",
    "PlannedLinear",
    "PrunePlan",
    "PrunedShape",
    "RunResult",
    "WidthPlan",
    "plan",
    "run",
]
