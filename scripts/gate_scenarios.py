"""What docs/ci/gate.sh must answer on real artifacts: for the slow test, and for the smoke test of the wheel.

A good artifact passes, a damaged one (plain rounding at 2 bits) fails, a policy that the data cannot decide is refused
beforehand or left open, and an artifact with one flipped bit is not even looked at. The policies are small, so that
each takes seconds: their limits lie far from what the artifacts lose on so few tokens, or exactly on it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TOKENS = 4096

RESULTS = frozenset({"verdict.json", "verdict.records.json.gz", "gate.xml", "gate.md", "gate.html"})
"""What gate.sh leaves where there is a verdict."""

POLICY = """version = 1
name = "small"
data = "tales_heldout"
max_tokens = {tokens}

[[gate]]
id = "kl"
kind = "kl_mean"
max = {limit}

[[gate]]
id = "size"
kind = "size_ratio"
min = 2.0
"""

HOPELESS = """version = 1
name = "hopeless"
suite = "smoke"

[[gate]]
id = "blimp"
kind = "accuracy_paired"
task = "blimp"
margin = 0.1
"""


@dataclass(frozen=True)
class Scenario:
    """Arguments of the script, the exit code that is right, and whether there is a verdict to look at."""

    name: str
    arguments: tuple[str, ...]
    code: int
    verdict: bool


SCENARIOS = (
    Scenario("good", ("good", "--baseline", "base", "--policy", "small.toml"), 0, True),
    Scenario("damaged", ("damaged", "--baseline", "base", "--policy", "small.toml"), 1, True),
    Scenario("open", ("good.json", "--policy", "open.toml"), 3, True),
    Scenario("hopeless", ("good", "--baseline", "base", "--policy", "hopeless.toml"), 2, False),
    Scenario("tampered", ("tampered", "--baseline", "base", "--policy", "small.toml"), 5, False),
    Scenario("tampered, records kept", ("edited.json", "--policy", "small.toml"), 5, False),
)


def prepare(work: Path, base: Path, compress: Callable[..., None]) -> None:
    """Makes the artifacts, records and policies in `work`; `compress(*arguments)` runs the program there.

    base: the packaged model.
    """
    shutil.copytree(base, work / "base")
    compress("quantize", "base", "--method", "gptq", "--bits", "4", "--samples", "16", "--no-eval", "--output", "good")
    compress("quantize", "base", "--method", "rtn", "--bits", "2", "--no-eval", "--output", "damaged")
    compress("eval", "good", "--baseline", "base", "--max-tokens", str(TOKENS), "--output", "good.json")
    shutil.copytree(work / "good", work / "tampered")
    weights = work / "tampered" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    text = (work / "good.json").read_text(encoding="utf-8")
    (work / "edited.json").write_text(text.replace('"quantized": true', '"quantized": false'), encoding="utf-8")
    kl = json.loads(text)["texts"][0]["summary"]["kl_mean"]["estimate"]
    (work / "small.toml").write_text(POLICY.format(tokens=TOKENS, limit=0.2), encoding="utf-8")
    (work / "open.toml").write_text(POLICY.format(tokens=TOKENS, limit=kl), encoding="utf-8")
    (work / "hopeless.toml").write_text(HOPELESS, encoding="utf-8")
