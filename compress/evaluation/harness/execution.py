"""Running what a model wrote against a problem's tests (HumanEval, Chen et al. 2021). Only ever under --trust-code.

A process of its own, without the caller's environment, with limits on time, memory and file size. That keeps accidents
small; it is no sandbox against malice.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

SECONDS = 10
MEMORY_BYTES = 4 << 30
FILE_BYTES = 16 << 20


def passes_tests(doc: Mapping[str, Any], results: list[Any]) -> dict[str, int]:
    """lm-eval's `process_results`: whether the completed function passes the problem's tests."""
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"acc": int(runs(program))}


def runs(program: str) -> bool:
    """Whether a Python program reaches its last line without an error within the limits.

    A line behind it writes a word to a pipe, because a program that ends early succeeds at nothing.
    """
    word = secrets.token_hex(16)
    listen, tell = os.pipe()
    with tempfile.TemporaryDirectory() as directory, os.fdopen(listen, "rb") as heard:
        process = subprocess.Popen(
            [sys.executable, "-I", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={},
            start_new_session=True,
            preexec_fn=_limit,
            pass_fds=(tell,),
        )
        os.close(tell)
        report = f"\nimport os\nos.write({tell}, b'{word}')\n"
        try:
            process.communicate((program + report).encode("utf-8", "replace"), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)
        return process.returncode == 0 and heard.read(len(word) + 1) == word.encode()


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process with all that it started; its group is its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
