"""Tasks on lm-eval: one model's answers item by item, ready to be paired with another's.

lm-eval builds the prompts, filters the answers and scores them; this package gives it our runtimes (or an endpoint) as
the model, the data, seeded choices of items, and a cache from which a killed run goes on. lm-eval is imported only
where tasks are run.
"""

from __future__ import annotations

from compress.evaluation.harness.cache import ResponseCache
from compress.evaluation.harness.pairing import pair
from compress.evaluation.harness.run import run_tasks
from compress.evaluation.harness.scores import ItemScore, TaskScores

__all__ = ["ItemScore", "ResponseCache", "TaskScores", "pair", "run_tasks"]
