"""Tries the built wheel as a stranger would: installed into a clean environment, far from the checkout.

    python scripts/wheel_smoke.py dist constraints.txt

It looks at what the wheel holds, installs it with its dependencies, quantises and verifies the packaged model, and
lets docs/ci/gate.sh judge good, damaged and tampered artifacts, without a network where the system can take it away.
Exits with 1 and the reason at the first thing that is wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

from gate_scenarios import RESULTS, SCENARIOS, prepare

GATE = Path(__file__).resolve().parents[1] / "docs" / "ci" / "gate.sh"
ALONE = ("unshare", "--net", "--map-root-user")
"""Runs a program without a network, where the system lets us."""

NEEDED = (
    "compress/__init__.py",
    "compress/cli.py",
    "compress/py.typed",
    "compress/kernels/cpu/_native.pyi",
    "compress/packaged/tales-6m/model.safetensors",
    "compress/calib_data/MANIFEST.json",
    "compress/eval/gates/default.toml",
    "compress/evaluation/reports/page.html.j2",
    "compress/recipes/",
    "compress/kernels/cpu/_native.",
)


def check_names(names: list[str]) -> None:
    """One top-level package, all of the content, none of the C++ sources."""
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    if tops != {"compress"}:
        sys.exit(f"the wheel should hold `compress` alone, not {sorted(tops)}")
    missing = [prefix for prefix in NEEDED if not any(name.startswith(prefix) for name in names)]
    if missing:
        sys.exit(f"the wheel lacks {missing}")
    if sources := [name for name in names if "/csrc/" in name or name.endswith((".pyc", ".cpp"))]:
        sys.exit(f"the wheel should not hold {sources}")


class Installed:
    """The wheel in an environment of its own; `run` calls its programs from an empty directory."""

    def __init__(self, directory: Path, wheel: Path, constraints: Path) -> None:
        self.bin = directory / "venv" / "bin"
        self.work = directory / "work"
        self.work.mkdir()
        venv.create(directory / "venv", with_pip=True)
        pip = ("python", "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-compile")
        self.run(*pip, "--constraint", str(constraints), str(wheel))

    def run(self, program: str, *arguments: str) -> str:
        """Standard output of a program of the environment that must succeed."""
        return self.call(0, str(self.bin / program), *arguments)

    def call(self, code: int, *command: str) -> str:
        """Standard output of a command that must end with this exit code."""
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "COMPRESS": str(self.bin / "compress")}
        print("$", *(Path(word).name if word.startswith("/") else word for word in command), flush=True)
        result = subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True)
        if result.returncode != code:
            sys.exit(f"exit code {result.returncode}, not {code}\n{result.stdout}{result.stderr}")
        return result.stdout

    def json(self, *arguments: str) -> Any:
        """The one JSON document that `compress ... --json` prints."""
        return json.loads(self.run("compress", *arguments, "--json"))


def check_gate(installed: Installed, base: Path) -> None:
    """The shell form of the CI job, copied away from the checkout, gives the right answer on every artifact."""
    script = installed.work / "gate.sh"
    shutil.copy(GATE, script)
    probe = [*ALONE, "true"]
    can_be_alone = shutil.which(ALONE[0]) and subprocess.run(probe, capture_output=True).returncode == 0
    alone = ALONE if can_be_alone else ()
    if not alone:
        print("note: the system does not let us take the network away; only the hub is switched off")
    prepare(installed.work, base, lambda *words: installed.run("compress", *words, "--quiet"))
    for scenario in SCENARIOS:
        installed.call(scenario.code, *alone, "sh", str(script), *scenario.arguments)
        found = {path.name for path in (installed.work / "gate-results").iterdir()}
        wanted = RESULTS if scenario.verdict else frozenset()
        if found != wanted:
            sys.exit(f"gate.sh wrote {sorted(found)} for the scenario {scenario.name}, not {sorted(wanted)}")


def main() -> None:
    """Checks the one wheel in the directory given first, under the constraints file given second."""
    wheels = list(Path(sys.argv[1]).resolve().glob("*.whl"))
    if len(wheels) != 1:
        sys.exit(f"expected one wheel in {sys.argv[1]}, found {len(wheels)}")
    with zipfile.ZipFile(wheels[0]) as archive:
        check_names(archive.namelist())
    with tempfile.TemporaryDirectory(prefix="compress-wheel-") as name:
        directory = Path(name).resolve()
        installed = Installed(directory, wheels[0], Path(sys.argv[2]).resolve())
        origin = Path(installed.run("python", "-c", "import compress; print(compress.__file__)").strip())
        if directory not in origin.parents:
            sys.exit(f"imported compress from {origin}, not from the wheel")
        if "quantize" not in installed.run("compress", "--help"):
            sys.exit("`compress --help` does not list `quantize`")
        installed.json("methods")
        installed.run("compress", "quantize", "--method", "gptq", "--bits", "4", "--samples", "8", "--seq-len", "128",
                      "--no-eval", "--output", "small")  # fmt: skip
        installed.json("verify", "small")
        text = installed.run("compress", "generate", "small", "--prompt", "Once upon a time", "--max-tokens", "8")
        if not text.strip():
            sys.exit("`compress generate` wrote nothing")
        check_gate(installed, origin.parent / "packaged" / "tales-6m")
    print(f"ok: {wheels[0].name}")


if __name__ == "__main__":
    main()
