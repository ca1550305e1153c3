"""The processes that help with a training: started here, or launched beside this one; and how all of them meet.

They talk over a store of torch.distributed: that of the launcher, or one that the process of rank 0 opens. There rank 0
leaves one order for each training, numbered, and a helper that cannot go on what it has to say.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist

from compress.distillation import processes

WAITS = timedelta(days=7)
"""How long a process waits for another one that lives; one that died is noticed at once."""
LOSS_SECONDS = 5.0
"""A connection may break a moment before a process is gone, or has said why."""
HELPER = "compress.pipeline.helper"
LOST = "lost"
OVER = b"over"


def store() -> dist.Store:
    """The store where launched processes meet, and helpers that were started here."""
    found: dist.Store = next(dist.rendezvous("env://", timeout=WAITS))[0]
    return found


def order_key(number: int) -> str:
    """Under which the order for one training is, or `OVER` behind the last."""
    return f"order-{number}"


def of_training(store: dist.Store, number: int) -> dist.Store:
    """The part of the store that one training uses."""
    return dist.PrefixStore(f"training-{number}", store)


def awaited(store: dist.Store, key: str, meanwhile: Callable[[], None] = lambda: None) -> bytes:
    """The value of a key once it is there; asks again and again, so that an interrupt is heard."""
    while not store.check([key]):
        meanwhile()
        time.sleep(0.05)
    found: bytes = store.get(key)
    return found


class Helpers:
    """Of the process of rank 0: all others, and those of them that it started itself."""

    def __init__(self, store: dist.Store, started: list[subprocess.Popen[bytes]]) -> None:
        self._store, self._started, self._orders = store, started, 0

    def call(self, order: dict[str, Any]) -> dist.Store:
        """Has them help with the next training; returns its store."""
        found = of_training(self._store, self._orders)
        self._store.set(order_key(self._orders), json.dumps(order))
        self._orders += 1
        return found

    def dismiss(self) -> None:
        """There will be no training any more."""
        self._store.set(order_key(self._orders), OVER.decode())

    def lost(self, seconds: float = 0.0) -> str | None:
        """What ended one of them, if one ended; waits so long for it."""
        end = time.monotonic() + seconds
        while True:
            ended = next((helper for helper in self._started if helper.poll() is not None), None)
            if self._store.check([LOST]):
                return self._store.get(LOST).decode()
            if ended is not None:
                return f"exit code {ended.returncode}"
            if time.monotonic() >= end:
                return None
            time.sleep(0.05)

    def release(self) -> None:
        """Ends those that were started here, whatever they do: they hold nothing."""
        for helper in self._started:
            if helper.poll() is None:
                helper.kill()
            helper.wait()


def started(count: int) -> Helpers:
    """Starts so many helpers on this machine, of rank 1 and up."""
    opened = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=WAITS)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(opened.port), "WORLD_SIZE": str(count + 1)}
    return Helpers(opened, [_start({**meeting, "RANK": str(rank)}) for rank in range(1, count + 1)])


@cache
def launched() -> Helpers:
    """Those that were launched beside this process."""
    return Helpers(store(), [])


def dismissed(work: Callable[[], int]) -> int:
    """What `work` returns in the first of the launched processes, which lets the others go then."""
    with processes.joined():
        try:
            return work()
        finally:
            launched().dismiss()


def _start(meeting: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", HELPER], env={**os.environ, **meeting}, stdin=subprocess.DEVNULL)
