"""`--calib` from the command line: a mix is recorded, and scores on what was calibrated on are warned about."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import compress
from compress import content
from compress.artifact.reader import Artifact

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_mix_is_recorded_and_its_overlap_with_scored_text_is_found(run: Callable, tmp_path: Path) -> None:
    held_out = (content.eval_dir() / "data" / "tales_heldout.txt").read_text(encoding="utf-8")
    (tmp_path / "same.txt").write_text(held_out[:40_000], encoding="utf-8")
    rows = [{"text": held_out[place : place + 3000]} for place in range(100_000, 130_000, 3000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--samples", 64, "--seq-len", 64, "--no-eval", "--output", "out")
    mix = "same.txt:0.75,rows.jsonl:0.25"
    made = run("quantize", "--method", "awq", "--calib", mix, *flags)
    assert made.code == 0, made.err
    assert "complete already" in run("quantize", "--method", "awq", "--calib", mix, *flags).err
    artifact = Artifact.open("out")
    record = artifact.manifest.calibration
    assert record is not None
    assert record.parts is not None
    assert record.name == "same:0.75,rows:0.25"
    assert [(part.name, part.kind, part.samples) for part in record.parts] == [
        ("same", "text", 48),
        ("rows", "rows", 16),
    ]
    assert "| `rows` | rows | 16 |" in (artifact.path / "README.md").read_text()

    scores = ("eval", "out", "--baseline", compress.default_model(), "--json")
    (tmp_path / "other.txt").write_text(held_out[200_000:220_000], encoding="utf-8")
    other = run(*scores, "--data", "other.txt", "--max-tokens", 2600)
    assert other.json["texts"][0]["calibration_overlap"] == 0.0
    assert "calibrated on" not in other.err
    same = run(*scores, "--data", "same.txt", "--max-tokens", 4000, "--attach")
    overlap = same.json["texts"][0]["calibration_overlap"]
    assert 0.15 < overlap < 0.45
    assert f"warning: {overlap:.1%} of same is in the text that out was calibrated on" in same.err
    assert f"**{overlap:.1%} of `same` is in the calibration text too" in (artifact.path / "README.md").read_text()
    assert run("verify", "out").code == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("tales:0.5,", "names an empty source"),
        ("tales:0.5,tales:0.5", "names tales twice"),
        ("tales,missing.jsonl", "calibration text 'missing.jsonl' is neither a packaged name nor a file"),
        ("chat.jsonl", "the model has no chat template"),
    ],
)
def test_bad_sources_are_refused(given: str, said: str, run: Callable, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}))
    flags = ("--samples", 4, "--seq-len", 64, "--output", "out")
    assert said in run("quantize", "--method", "awq", "--calib", given, *flags).refused(2)
    assert not (tmp_path / "out").exists()
