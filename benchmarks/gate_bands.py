"""Where the limits of the default gate lie: losses of good artifacts of the packaged model, and of bad ones.

    python -m benchmarks.gate_bands --work build/gate-bands --json benchmarks/results/gate-bands.json

For each class of schemes the good (calibrated, or 8 bits) and the bad (plain rounding of fewer bits, a damaged block)
are scored on the packaged held-out text; a limit belongs between the worst bound of the good and the best bound of the
bad. The table shows both, the limit of the policy, and the noise floor; the script fails if the policy passes a bad
one or refuses a good one. Finished work is kept in --work and not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import compress
from benchmarks.machine import facts, versions
from compress.evaluation.evaluate import evaluate
from compress.evaluation.gate import measure_floor
from compress.evaluation.gating.comparable import compare
from compress.evaluation.gating.decide import decide
from compress.evaluation.gating.noise_record import read_noise, write_noise
from compress.evaluation.measures import Skipped, measure
from compress.evaluation.policy import Policy, load_policy
from compress.evaluation.records import EvalRecord, read_record, write_record
from compress.models.checkpoint import Checkpoint

DATA = "tales_heldout"


@dataclass(frozen=True)
class Case:
    """One artifact. `judged_as`: the scheme whose limits it is held against; `good`: whether it should pass them."""

    name: str
    judged_as: str
    good: bool
    settings: dict[str, Any]
    zeroed: str | None = None


def _case(method: str, bits: int, judged_as: str, good: bool, group: int | str = 128, *, asym: bool = False) -> Case:
    suffix = "-asym" if asym else ""
    name = f"{method}-w{bits}-{group if group == 'channel' else f'g{group}'}{suffix}"
    scheme = f"W{bits}A16{'_ASYM' if asym else ''}"
    return Case(name, judged_as, good, {"method": method, "scheme": scheme, "group_size": group})


W8, W4, W3, W2 = "w8a16-channel", "w4a16-g128", "w3a16-g128", "w2a16-g128"
W4_G64_ASYM, W4_G32_ASYM, W3_ASYM = "w4a16-g64-asym", "w4a16-g32-asym", "w3a16-g128-asym"
CASES: tuple[Case, ...] = (
    _case("rtn", 8, W8, True, "channel"),
    _case("rtn", 8, W8, True, 128),
    _case("rtn", 6, W8, False, "channel"),
    _case("rtn", 6, W8, False, 128),
    _case("rtn", 6, W8, False, 32, asym=True),
    _case("rtn", 5, W8, False, 128),
    _case("gptq", 4, W4, True),
    _case("awq", 4, W4, True),
    _case("rtn", 4, W4, False),
    _case("rtn", 4, W4, False, "channel"),
    _case("rtn", 4, W4, False, 32),
    _case("rtn", 4, W4, False, 128, asym=True),
    _case("awq", 4, W4_G64_ASYM, True, 64, asym=True),
    _case("awq", 4, W4_G32_ASYM, True, 32, asym=True),
    _case("rtn", 4, W4_G64_ASYM, False, 64, asym=True),
    _case("rtn", 4, W4_G32_ASYM, False, 32, asym=True),
    *(_case("awq", 4, f"w4a16-g{g}{'-asym' * a}", True, g, asym=a) for g in (16, 8) for a in (False, True)),
    *(_case("rtn", 4, f"w4a16-g{g}{'-asym' * a}", False, g, asym=a) for g in (16, 8) for a in (False, True)),
    _case("gptq", 3, W3, True),
    _case("awq", 3, W3, True),
    _case("rtn", 3, W3, False),
    _case("rtn", 3, W3, False, 32),
    _case("awq", 3, W3_ASYM, True, asym=True),
    _case("rtn", 3, W3_ASYM, False, asym=True),
    _case("rtn", 3, W3_ASYM, False, 32, asym=True),
    *(_case("awq", 3, f"w3a16-g{g}-asym", True, g, asym=True) for g in (16, 8)),
    *(_case("rtn", 3, f"w3a16-g{g}{'-asym' * a}", False, g, asym=a) for g in (16, 8) for a in (False, True)),
    _case("rtn", 2, W3, False),
    _case("rtn", 2, W2, False),
    Case("zeroed-block", W4, False, {}, zeroed=".layers.3."),
)


def artifact(case: Case, work: Path) -> Path:
    """The model of a case, made unless it is there."""
    path = work / case.name
    source = compress.default_model()
    if case.zeroed is None:
        return compress.quantize(source, output=path, evaluate=False, **case.settings).path
    if not path.exists():
        from safetensors.torch import load_file, save_file

        beside = path.with_suffix(".partial")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(source, beside)
        tensors = load_file(beside / "model.safetensors")
        zeroed = {name: torch.zeros_like(t) if case.zeroed in name else t for name, t in tensors.items()}
        save_file(zeroed, beside / "model.safetensors", {"format": "pt"})
        beside.rename(path)
    return path


def scored(case: Case, work: Path, tokens: int | None) -> EvalRecord:
    """The case's record against the packaged model, as if it had the scheme that it is judged as."""
    path = work / f"{case.name}.{tokens or 'all'}.eval.json"
    if not path.is_file():
        cache = work / "cache"
        found = evaluate(
            artifact(case, work), compress.default_model(), data=DATA, max_tokens=tokens, device="cpu", cache_dir=cache
        )
        write_record(found, path)
    record = read_record(path)
    return record.model_copy(update={"model": record.model.model_copy(update={"scheme": case.judged_as})}).sealed()


def rows(cases: Sequence[Case], work: Path, tokens: int | None, policy: Policy) -> Iterator[dict[str, Any]]:
    """Per case and gate: the estimate, its bounds, the limit; and what the policy says of the case."""
    for case in cases:
        record = scored(case, work, tokens)
        comparison = compare(record)
        profile, gates = policy.for_scheme(case.judged_as)
        found: dict[str, Any] = {}
        for gate in gates:
            measured = measure(gate, comparison, text=DATA)
            assert not isinstance(measured, Skipped)
            low, high = measured[0].bounds(policy.alpha)
            found[gate.id] = {
                "estimate": measured[0].estimate, "low": low, "high": high, "limit": measured[0].limit,
                "below": measured[0].below,
            }  # fmt: skip
        verdict = decide({"baseline": comparison}, policy, text=DATA)
        yield {
            "case": case.name, "judged_as": case.judged_as, "profile": profile, "good": case.good,
            "verdict": verdict.verdict, "failed": [g.id for g in verdict.gates if g.verdict == "FAIL"],
            "tokens": record.text().data.tokens, "gates": found,
        }  # fmt: skip


def room(found: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Per scheme and gate: the worst bound of the good, the best bound of the bad, and the limit between them."""
    for scheme in dict.fromkeys(row["judged_as"] for row in found):
        here = [row for row in found if row["judged_as"] == scheme]
        for gate, values in here[0]["gates"].items():
            below = values["below"]
            good = [row["gates"][gate]["high" if below else "low"] for row in here if row["good"]]
            bad = [row["gates"][gate]["low" if below else "high"] for row in here if not row["good"]]
            worst = (max if below else min)(good) if good else None
            best = (min if below else max)(bad) if bad else None
            yield {"scheme": scheme, "gate": gate, "good": worst, "limit": values["limit"], "bad": best}


def show(found: Sequence[dict[str, Any]], floor: dict[str, float]) -> None:
    """The tables, on stdout."""
    gates = list(found[0]["gates"])
    print(f"{'case':<18}{'judged as':<16}{'expected':<10}{'verdict':<14}" + "".join(f"{gate:>26}" for gate in gates))
    for row in found:
        values = (row["gates"][gate] for gate in gates)
        cells = "".join(f"{v['estimate']:>10.4g} [{v['low']:.4g}, {v['high']:.4g}]".rjust(26) for v in values)
        expected = "pass" if row["good"] else "refuse"
        print(f"{row['case']:<18}{row['judged_as']:<16}{expected:<10}{row['verdict']:<14}{cells}")
    print(f"\n{'scheme':<16}{'gate':<12}{'good up to':>12}{'limit':>12}{'bad from':>12}")
    for row in room(found):
        cells = "".join("-".rjust(12) if v is None else f"{v:>12.4g}" for v in (row["good"], row["limit"], row["bad"]))
        print(f"{row['scheme']:<16}{row['gate']:<12}{cells}")
    print("\nnoise floor: " + ", ".join(f"{name} {value:.3g}" for name, value in floor.items()))


def main() -> int:
    """Scores what is missing, shows the tables; 1 where the policy errs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where artifacts and scores are kept")
    parser.add_argument("--tokens", type=int, help="held-out tokens to score; all of them if left out")
    parser.add_argument("--policy", default="default", help="a packaged policy's name or a file")
    parser.add_argument("--only", help="comma-separated cases")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    policy = load_policy(arguments.policy)
    wanted = None if arguments.only is None else set(arguments.only.split(","))
    cases = [case for case in CASES if wanted is None or case.name in wanted]
    noise_file = arguments.work / "noise.json"
    if not noise_file.is_file():
        write_noise(measure_floor(compress.default_model(), policy.model_copy(update={"max_tokens": 4200})), noise_file)
    floor = read_noise(noise_file).largest()
    found = list(rows(cases, arguments.work, arguments.tokens, policy))
    show(found, floor)
    if arguments.json is not None:
        document = {
            "machine": facts(), "versions": versions("compress", "torch", "transformers", "compressed-tensors"),
            "model_digest": Checkpoint.open(compress.default_model()).digest(),
            "policy": policy.name, "policy_sha256": policy.sha256(), "noise_floor": floor, "cases": found,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    wrong = [row for row in found if (row["verdict"] == "PASS") is not row["good"]]
    for row in wrong:
        print(f"{row['case']}: {row['verdict']}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
