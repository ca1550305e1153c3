"""The Python API: the verbs of the command line as functions. Everything heavy is imported on call."""

from compress.workflows.api._distill import distill as distill
from compress.workflows.api._evaluate import evaluate as evaluate
from compress.workflows.api._gate import gate as gate
from compress.workflows.api._load import load as load
from compress.workflows.api._plan import plan as plan
from compress.workflows.api._prune import prune as prune
from compress.workflows.api._quantize import quantize as quantize
