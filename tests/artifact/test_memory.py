"""Publishing costs the memory of one tensor at most, however large the artifact."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TENSORS = 12
TENSOR_BYTES = 24 << 20


def test_publishing_does_not_hold_a_shard_in_memory(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("anonymous memory is read from /proc")
    program = textwrap.dedent(
        f"""
        import json, pathlib, re, sys, threading, time
        import torch
        from compress.artifact.assemble import assemble
        from compress.artifact.tensorfile import load_tensors, write_tensors
        from compress.artifact.canonical import sha256_file

        def anonymous():
            text = pathlib.Path("/proc/self/status").read_text()
            return int(re.search(r"RssAnon:\\s+(\\d+) kB", text)[1]) * 1024

        folder = pathlib.Path(sys.argv[1])
        source = folder / "source.safetensors"
        with open(source, "wb") as file:
            header = {{}}
            for i in range({TENSORS}):
                span = [i * {TENSOR_BYTES}, (i + 1) * {TENSOR_BYTES}]
                header[f"t{{i}}"] = {{"dtype": "BF16", "shape": [{TENSOR_BYTES} // 2], "data_offsets": span}}
            text = json.dumps(header).encode()
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + {TENSORS * TENSOR_BYTES})
        torch.zeros(1)
        base = peak = anonymous()
        done = False

        def watch():
            global peak
            while not done:
                peak = max(peak, anonymous())
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        records, _ = write_tensors(folder / "part.safetensors", load_tensors(source))
        written = peak - base
        (folder / "out").mkdir()
        tensors, files = assemble(folder / "out", [(folder / "part.safetensors", records)], 100 * {TENSOR_BYTES})
        done = True
        watcher.join()
        print(json.dumps({{"write": written, "all": peak - base, "files": sorted(files), "tensors": len(tensors)}}))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["files"] == ["model.safetensors"]
    assert measured["tensors"] == TENSORS
    assert measured["all"] < TENSOR_BYTES + (16 << 20), measured
