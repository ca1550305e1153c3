"""Damages a packed checkpoint at random and runs it: `python -m tests.runtime.fuzz MODEL WORK FIRST LAST`.

Prints one line per seed: what was damaged, and how it ended, which must be an answer or a CompressError.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.runtime.loading import load
from compress.runtime.protocol import SamplingParams

HOSTILE = (-1, 0, 1, 3, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64)
DTYPES = ("F32", "F16", "BF16", "I32", "I64", "U8", "I8", "F8_E4M3", "F64", "BOOL", "X9")
ODD: tuple[Any, ...] = (None, True, "x", "", [], {}, [1], -1.0, 0.0, 0.5, 1e300, float("nan"), float("inf"))


def leaves(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every place of a value in nested dictionaries: the dictionary and the key."""
    for key, value in list(config.items()):
        if isinstance(value, dict) and value:
            yield from leaves(value)
        else:
            yield config, key


def damage(model: Path, seed: int) -> str:
    """Damages the files of `model`; returns what was done."""
    draw = random.Random(seed)
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = struct.unpack_from("<Q", data)[0]
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    entry = header[draw.choice(names)]
    kind = draw.choice(("cut", "bytes", "length", "shape", "dtype", "offsets", "gone", "twice", "config", "values"))
    if kind == "cut":
        data = data[: draw.randrange(len(data))]
    elif kind == "bytes":
        for _ in range(draw.randint(1, 20)):
            data[draw.randrange(8 + length)] = draw.randrange(256)
    elif kind == "length":
        struct.pack_into("<Q", data, 0, draw.choice((0, 1, length - 1, length + 1, len(data), 2**40, 2**63, 2**64 - 1)))
    elif kind == "values":
        start = 8 + length + entry["data_offsets"][0]
        for at in range(start, min(start + 4096, 8 + length + entry["data_offsets"][1])):
            data[at] = draw.randrange(256)
    elif kind == "config":
        config = json.loads((model / "config.json").read_text())
        done = []
        for _ in range(draw.choice((1, 1, 2))):
            inside, key = draw.choice(list(leaves(config)))
            inside[key] = draw.choice((*HOSTILE, *ODD, 2, 8, 32, 64, 96))
            done.append(f"{key} = {inside[key]!r}")
        (model / "config.json").write_text(json.dumps(config))
        return f"config.json: {', '.join(done)}"
    else:
        if kind == "shape":
            entry["shape"][draw.randrange(len(entry["shape"]))] = draw.choice(HOSTILE)
        elif kind == "dtype":
            entry["dtype"] = draw.choice(DTYPES)
        elif kind == "offsets":
            entry["data_offsets"][draw.randrange(2)] = draw.choice((*HOSTILE, len(data), 64))
        elif kind == "gone":
            del header[draw.choice(names)]
        else:
            entry.update(header[draw.choice(names)])
        changed = json.dumps(header).encode()
        changed += b" " * (-len(changed) % 8)
        data = bytearray(struct.pack("<Q", len(changed))) + changed + data[8 + length :]
    file.write_bytes(data)
    return kind


def outcome(model: Path) -> str:
    """How loading and a short answer end."""
    try:
        (answer,) = load(model, device="cpu", kernel="auto").generate([[1, 2, 3]], SamplingParams(max_tokens=2))
    except CompressError as error:
        return type(error).__name__
    return answer.finish_reason


def main() -> None:
    source, work = Path(sys.argv[1]), Path(sys.argv[2])
    for seed in range(int(sys.argv[3]), int(sys.argv[4])):
        model = Path(shutil.copytree(source, work / f"damaged-{seed}"))
        done = damage(model, seed)
        print(f"{seed} {done}", end=": ", flush=True)
        print(outcome(model), flush=True)
        shutil.rmtree(model)


if __name__ == "__main__":
    main()
