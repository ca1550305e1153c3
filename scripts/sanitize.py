"""Runs the native module's tests under AddressSanitizer and UndefinedBehaviorSanitizer; fails at their first report.

    python scripts/sanitize.py [--build DIR] [TEST ...]

Needs GCC with its sanitizers' libraries. The module is built apart from the installed one, into DIR or a temporary
folder; a `sitecustomize` there puts it in the installed one's place, in processes that tests start too. Leaks are not
looked for: Python's own would hide ours. What a sanitizer finds ends the process at once, and with it the run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/kernels",
    "tests/runtime/test_native_answers.py",
    "tests/runtime/test_native_artifacts.py",
    "tests/runtime/test_native_backend.py",
    "tests/runtime/test_native_caches.py",
    "tests/runtime/test_engine.py",
    "tests/runtime/test_packed_tables.py",
    "tests/runtime/test_two_bit_cache.py",
    "tests/runtime/test_cache_choice.py",
    "tests/runtime/test_fuzz.py",
    "tests/runtime/test_sampling.py",
    "tests/runtime/test_same_bits.py",
    "tests/runtime/test_continuations.py",
    "tests/runtime/test_speculation.py",
    "tests/runtime/test_packed_backend.py",
    "tests/runtime/test_rotary.py",
    "tests/runtime/test_native_reader.py",
    "tests/runtime/test_requests.py",
    "tests/runtime/test_hostile_configs.py",
)
IGNORED = ("tests/kernels/triton",)
INSTRUMENTED = (b"__asan_report_load", b"__ubsan_handle_type_mismatch_v1_abort")
SITE = '''"""Loads the sanitized `_native` in place of the installed one."""
import importlib.util
import sys
from importlib.abc import MetaPathFinder


class Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "compress.kernels.cpu._native":
            return importlib.util.spec_from_file_location(name, {module!r})


sys.meta_path.insert(0, Finder())
'''


def tool(name: str) -> str:
    """This environment's program of that name, or the system's."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        sys.exit(f"error: {name} is not installed\nhint: run `make install`, and install GCC")
    return found


def build(folder: Path) -> Path:
    """The sanitized module."""
    nanobind = subprocess.run([sys.executable, "-m", "nanobind", "--cmake_dir"], stdout=subprocess.PIPE, check=True)
    settings = {
        "CMAKE_BUILD_TYPE": "RelWithDebInfo",
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "CMAKE_CXX_COMPILER": tool("g++"),
        "Python_EXECUTABLE": sys.executable,
        "nanobind_DIR": nanobind.stdout.decode().strip(),
        "COMPRESS_SANITIZE": "ON",
    }
    cmake = tool("cmake")
    definitions = [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.run([cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *definitions], check=True)
    subprocess.run([cmake, "--build", str(folder)], check=True)
    (module,) = folder.glob("_native*.so")
    code = module.read_bytes()
    if missing := [name.decode() for name in INSTRUMENTED if name not in code]:
        sys.exit(f"error: {module} was built without {missing[0]}\nhint: use GCC, whose sanitizers report so")
    return module


def environment(module: Path, folder: Path) -> dict[str, str]:
    """What a process needs that is to load the sanitized module."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE.format(module=str(module)))
    libraries = []
    for name in ("libasan.so", "libstdc++.so.6"):  # the latter so that AddressSanitizer sees what it throws
        found = subprocess.run([tool("g++"), f"-print-file-name={name}"], stdout=subprocess.PIPE, text=True, check=True)
        path = Path(found.stdout.strip())
        if not path.is_absolute():
            sys.exit(f"error: g++ has no {name}\nhint: install the sanitizers' libraries of this GCC")
        libraries.append(str(path.resolve()))
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH")))),
        "PYTHONMALLOC": "malloc",  # so that arrays from Python's small blocks are watched too
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }


def run(folder: Path, tests: list[str]) -> int:
    """Builds and tests; 0 where all tests pass and nothing was reported."""
    module = build(folder)
    settings = environment(module, folder)
    loaded = subprocess.run(
        [sys.executable, "-c", "from compress.kernels.cpu import _native; print(_native.__file__)"],
        env=settings,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if loaded.returncode != 0 or Path(loaded.stdout.strip()) != module:
        sys.exit(f"error: python loads {loaded.stdout.strip() or 'nothing'}, not {module}\nhint: see the output above")
    # What is written to standard error in the process's last moment must come out, so its descriptors stay its own.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--timeout=0", "--capture=sys"]
    command += ["-m", "not slow and not gpu", *(f"--ignore={path}" for path in IGNORED), *tests]
    return subprocess.run(command, cwd=ROOT, env=settings, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=Path, help="where to build; kept")
    parser.add_argument("tests", nargs="*", default=list(TESTS))
    arguments = parser.parse_args()
    if arguments.build is not None:
        arguments.build.mkdir(parents=True, exist_ok=True)
        sys.exit(run(arguments.build.resolve(), arguments.tests))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(run(Path(folder).resolve(), arguments.tests))


if __name__ == "__main__":
    main()
