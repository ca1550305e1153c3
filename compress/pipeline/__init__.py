"""plan() and run(): from a recipe and a model directory to an artifact. The only package that mutates a model.

job.py      what is to be done: source, linears and their schemes, calibration tokens, output
plan.py     the dry run: sizes, memory and time of a job
duration.py how long it takes on this machine
inputs.py   the activations that flow from block to block
source.py   reading tensors, refusing what is not finite
block.py    what a method gives back for one block; rtn_block.py, gptq_block.py, awq_block.py,
            smoothquant_block.py go through it
rounded_inputs.py  rounding what enters the linears, where the scheme does
fold.py     moving a scale from a linear into what feeds it, checked on the live block
linears.py  quantising one linear in row tiles, and measuring the error
output.py   which tensors a block writes, and the ledger
run.py      the loop over blocks: journal, resume, publish
"""

from compress.pipeline.plan import Plan, PlannedLinear, plan
from compress.pipeline.run import RunResult, run

__all__ = ["Plan", "PlannedLinear", "RunResult", "plan", "run"]
