"""Speed of the native engine beside llama.cpp's and transformers' in bfloat16, in turns in one run.

    python -m benchmarks.vs_llama_cpp --llama BUILD/bin --models DIR --json benchmarks/results/vs-llama-cpp.json

DIR holds, for every shape NAME, `NAME-w4` (W4A16, head in 8 bits), `NAME-w4h6` (head in 6 bits, as llama-quantize's
4-bit files have it) and `NAME-w8` as `compress quantize` writes them, the plain model `NAME`, and `NAME-Q4_0.gguf`,
`NAME-Q4_K_M.gguf`, `NAME-Q8_0.gguf`, `NAME-f16.gguf` as llama-quantize writes them; cases whose files are missing are
left out and named. Every round of a case runs each tool once, warm, after the machine has become quiet, in an order
that turns; ratios are taken within a round, ours over the best of llama.cpp's. A round in which others used more than
a tenth of a core is marked and does not count: llama.cpp spins at its barriers, so a busy neighbour makes it look
slow. `--only` takes parts of case names; the record keeps its other cases.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.workspace import ROOT

DISTURBED_CORES = 0.1


@dataclass(frozen=True)
class Case:
    """What is asked of all tools. `peers`: GGUF types, `!` after a type without repacking, or `torch`."""

    name: str
    model: str  # of ours
    peers: tuple[str, ...]
    bar: float
    threads: int
    batch: int = 1
    prompt: int = 0
    new: int = 32
    kernel: str = "cpu-int8"
    busy: bool = False  # one core is taken by another process, and our clean rate at 1 thread is the peer

    @property
    def shape(self) -> str:
        return self.model.split("-")[0]

    @property
    def reads_weights_alone(self) -> bool:
        """Whether nearly all of the work is to read every weight once a token."""
        return self.new > 0 and self.batch == 1 and not self.busy

    @property
    def tokens(self) -> int:
        return self.prompt if self.new == 0 else self.batch * self.new


FOUR_BIT = ("Q4_0", "Q4_K_M")
CASES = (
    Case("1.1B 4-bit decode, 1 thread", "r1b1-w4", FOUR_BIT, 1.3, 1, new=16),
    Case("1.1B 4-bit decode, 2 threads", "r1b1-w4", FOUR_BIT, 1.0, 2, new=24),
    Case("1.1B 8-bit decode, 1 thread", "r1b1-w8", ("Q8_0",), 1.4, 1, new=12),
    Case("148M 4-bit decode, 1 thread", "r150-w4", FOUR_BIT, 1.3, 1, new=64),
    Case("148M 4-bit decode, head in 6 bits, 1 thread", "r150-w4h6", FOUR_BIT, 1.3, 1, new=64),
    Case("1.1B 4-bit, 4 sequences", "r1b1-w4", FOUR_BIT, 2.0, 2, batch=4, new=12),
    Case("1.1B 4-bit, 8 sequences", "r1b1-w4", FOUR_BIT, 2.0, 2, batch=8, new=12),
    Case("1.1B 4-bit, 16 sequences", "r1b1-w4", FOUR_BIT, 1.7, 2, batch=16, new=12),
    Case("1.1B 4-bit prefill of 512", "r1b1-w4", ("Q4_K_M!",), 1.3, 2, prompt=512, new=0),
    Case("148M 4-bit prefill of 512", "r150-w4", ("Q4_K_M!",), 1.3, 2, prompt=512, new=0),
    Case("1.1B decode, transformers bfloat16", "r1b1-w4", ("torch",), 6.0, 2, new=8),
    Case("1.1B prefill of 512, transformers bfloat16", "r1b1-w4", ("torch",), 1.0, 2, prompt=512, new=0),
    Case("148M prefill of 512, transformers bfloat16", "r150-w4", ("torch",), 1.0, 2, prompt=512, new=0),
    Case("packaged model, same weights, 1 thread", "tales", ("f16",), 1.0, 1, new=128, kernel="cpu"),
    Case("packaged model 4-bit, 1 thread", "tales-w4", FOUR_BIT, 1.0, 1, new=128),
    Case("1.1B 4-bit decode, 2 threads, one core busy", "r1b1-w4", (), 0.5, 2, new=12, busy=True),
)


class Worker:
    """A process of `benchmarks.speed_worker`."""

    def __init__(self, engine: str, model: Path, kernel: str) -> None:
        command = [sys.executable, "-m", "benchmarks.speed_worker", "--engine", engine, "--model", str(model)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [*command, "--kernel", kernel], cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.facts = self._answer()

    def rate(self, case: Case, threads: int) -> float:
        """Tokens per second."""
        return case.tokens / float(self._asked(case, threads)["seconds"])

    def rate_and_bandwidth(self, case: Case) -> tuple[float, dict[str, float]]:
        """Tokens per second, and GB/s at which as many threads read memory just then, at best and usually."""
        answer = self._asked(case, case.threads, read=True)
        read = {f"{what}_gb_s": round(float(answer[what]) / 1e9, 1) for what in ("read", "usual")}
        return case.tokens / float(answer["seconds"]), read

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _asked(self, case: Case, threads: int, read: bool = False) -> dict[str, Any]:
        assert self._process.stdin is not None
        asked = {"threads": threads, "batch": case.batch, "prompt": case.prompt, "new": case.new, "read": read}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {' '.join(map(str, self._process.args))} ended")  # type: ignore[union-attr]
        return dict(json.loads(line))


def llama_rate(binaries: Path, gguf: Path, case: Case, repack: bool) -> float:
    """Tokens per second of llama-bench, or of llama-batched-bench for a batch: its last run."""
    common = ["-m", str(gguf), "-t", str(case.threads)]
    if case.batch == 1:
        work = ["-p", str(case.prompt), "-n", str(case.new), "-r", "3", "-o", "jsonl", "--repack", str(int(repack))]
        found = _last_json([str(binaries / "llama-bench"), *common, *work])
        return float(found["samples_ts"][-1])  # warm, as ours is
    twice = f"{case.batch},{case.batch}"  # the second is warm
    work = ["-c", "4096", "-npp", "1", "-ntg", str(case.new), "-npl", twice, "--output-format", "jsonl"]
    found = _last_json([str(binaries / "llama-batched-bench"), *common, *work])
    return float(found["speed_tg"])


def _last_json(command: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"error: {command[0]} ended with {done.returncode}: {done.stderr[-500:]}")
    return dict(json.loads(lines[-1]))


def one_round(
    number: int, case: Case, ours: Worker, peers: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Rates of all tools, once each, and at which rate memory was read then, where that is what bounds them."""
    first, turns = number % len(peers), list(peers)
    turns = turns[first:] + turns[:first]
    before = machine.wait_until_quiet(arguments.patience, watch=0.5)
    busy, started = machine.busy_seconds(), time.monotonic()
    rates: dict[str, float] = {}
    read: dict[str, float] = {}
    for name in turns:
        if name == "compress":
            spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if case.busy else None
            if case.reads_weights_alone:
                rates[name], read = ours.rate_and_bandwidth(case)
            else:
                rates[name] = ours.rate(case, case.threads)
            if spinner:
                spinner.kill()
                spinner.wait()
        elif name == "compress, 1 thread":
            rates[name] = ours.rate(case, 1)
        elif name == "torch":
            rates[name] = peers[name].rate(case, case.threads)
        else:
            rates[name] = llama_rate(arguments.llama, peers[name], case, not name.endswith("!"))
    seconds = time.monotonic() - started
    used = (machine.busy_seconds() - busy) / seconds
    # Everything that runs here is ours, on `threads` cores at most: what goes beyond that is others'.
    others = max(before, used - (2 if case.busy else case.threads), 0.0)
    found = {"rates": rates, "others_busy_cores": round(others, 3), "disturbed": others > DISTURBED_CORES}
    return {**found, **read}


def run(case: Case, arguments: argparse.Namespace, workers: dict[tuple[str, str, str], Worker]) -> dict[str, Any]:
    """All rounds of a case, with medians and the ratio's median, least and greatest."""
    folder: Path = arguments.models

    def worker(engine: str, model: str, kernel: str) -> Worker:
        key = (engine, model, kernel)
        for other in [other for other in workers if other[0] == engine and other != key]:
            workers.pop(other).close()
        return workers.setdefault(key, workers.get(key) or Worker(engine, folder / model, kernel))

    ours = worker("native", case.model, case.kernel)
    peers: dict[str, Any] = {"compress": None}
    for name in case.peers:
        plain = name == "torch"
        peers[name] = (
            worker("transformers", case.shape, "") if plain else folder / f"{case.shape}-{name.rstrip('!')}.gguf"
        )
    if case.busy:
        peers["compress, 1 thread"] = None
    ours.rate(case, case.threads)
    rounds = [one_round(number, case, ours, peers, arguments) for number in range(arguments.rounds)]
    used = [r for r in rounds if not r["disturbed"]] or rounds
    rivals = [name for name in peers if name != "compress"]
    medians = {name: statistics.median(r["rates"][name] for r in used) for name in peers}
    best = max(rivals, key=lambda name: medians[name])
    ratios = [r["rates"]["compress"] / r["rates"][best] for r in used]
    result = {
        "case": case.name, "bar": case.bar, "threads": case.threads, "kernels": ours.facts["kernels"],
        "bytes_per_token": ours.facts["bytes_per_token"], "rates": {k: round(v, 2) for k, v in medians.items()},
        "best_peer": best, "ratio": round(statistics.median(ratios), 3), "ratio_least": round(min(ratios), 3),
        "ratio_greatest": round(max(ratios), 3), "undisturbed": sum(not r["disturbed"] for r in rounds),
        "rounds": rounds,
    }  # fmt: skip
    if case.reads_weights_alone:
        for share, bandwidth in (("share_of_bandwidth", "read_gb_s"), ("share_of_usual_bandwidth", "usual_gb_s")):
            shares = [r["rates"]["compress"] * ours.facts["bytes_per_token"] / 1e9 / r[bandwidth] for r in used]
            result[share] = round(statistics.median(shares), 3)
    return result


def row(result: dict[str, Any]) -> str:
    rates = ", ".join(f"{name} {rate:.1f}" for name, rate in result["rates"].items())
    shares = [
        result[f"share_of_{which}"] for which in ("bandwidth", "usual_bandwidth") if f"share_of_{which}" in result
    ]
    share = ", ".join(f"{one:.1%}" for one in shares)
    spread = f"{result['ratio']:.2f} ({result['ratio_least']:.2f} to {result['ratio_greatest']:.2f})"
    return f"| {result['case']} | {rates} | {spread} | {result['bar']} | {share} | {result['undisturbed']} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--llama", type=Path, required=True, help="folder of llama-bench and llama-batched-bench")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the names of cases")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds to wait for a quiet machine, each round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.models, workers = arguments.models.resolve(), {}
    kept = json.loads(arguments.json.read_text())["results"] if arguments.json and arguments.json.exists() else []
    results: dict[str, Any] = {result["case"]: result for result in kept}
    print("| case | tokens/s | ratio to the best peer | bar | of bandwidth (best, usual) | quiet rounds |")
    print("|---|---|---|---|---|---|")
    for case in (case for case in CASES if any(part in case.name for part in arguments.only)):
        wanted = [
            case.model,
            *(f"{case.shape}-{p.rstrip('!')}.gguf" if p != "torch" else case.shape for p in case.peers),
        ]
        if missing := [name for name in wanted if not (arguments.models / name).exists()]:
            print(f"left out: {case.name}: no {', '.join(missing)}", file=sys.stderr)
            continue
        results[case.name] = {**run(case, arguments, workers), "date": machine.facts()["date"]}
        print(row(results[case.name]), flush=True)
        if arguments.json:
            versions = machine.versions("compress", "torch", "transformers")
            record = {"machine": machine.facts(), "versions": versions, "results": list(results.values())}
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    main()
