"""What drafts are worth: the packaged model and its 4-bit artifact, with a few of the blocks as draft, taught or not.

The acceptance does not depend on the machine, the speeds do. Needs what the recipes make:

    compress run depth-forward-kl --set stages.1.steps=100 --set stages.1.minutes=null --output build/draft --no-eval
    compress quantize --method gptq --bits 4 --samples 64 --output build/w4 --no-eval
    python -m benchmarks.drafts --draft cut=build/draft.stages/1-... --draft taught=build/draft --target w4=build/w4
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.machine import facts
from compress.content import default_model
from compress.evaluation.suites import packaged_prompts
from compress.runtime.loading import load
from compress.runtime.text_model import TextModel
from compress.workflows.drafts import PROMPTS, open_draft, worth

COLUMNS = (
    "target",
    "draft",
    "proposed at a time",
    "accepted",
    "tokens per step",
    "same answers",
    "tokens/s",
    "without",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draft", action="append", default=[], metavar="NAME=DIR", required=True)
    parser.add_argument("--target", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--count", action="append", type=int, metavar="N", help="tokens proposed at a time")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    targets = {"tales-6m": str(default_model()), **_named(options.target)}
    rows: list[dict[str, Any]] = []
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for target_name, path in targets.items():
        target = cast(TextModel, load(path))
        for draft_name, place in _named(options.draft).items():
            draft = open_draft(place, target)
            for count in options.count or (1, 2, 4):
                found = worth(target, draft, count, prompts=packaged_prompts(options.prompts))
                rows.append({"target": target_name, **asdict(found), "draft": draft_name})
                cells = (
                    target_name,
                    draft_name,
                    count,
                    f"{100 * (found.acceptance or 0):.1f}%",
                    f"{found.tokens_per_step:.2f}",
                    "yes" if found.equal else "no",
                    f"{found.tokens_per_second:.0f}",
                    f"{found.plain_tokens_per_second:.0f}",
                )
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": facts(), "rows": rows}, indent=1) + "\n")


def _named(given: list[str]) -> dict[str, str]:
    return dict(each.split("=", 1) for each in given)


if __name__ == "__main__":
    main()
